/*
One block of memory for many arrays, laid out by code that runs twice: with no block it only counts, then the block is
allocated, and the same code places the arrays.

    Arena arena = { 0 };
    layout(&arena, …);                  // every arena_take() returns NULL; arena.used is the size needed
    arena_allocate(&arena);             // or arena.block = a block of that size on the GPU, and arena.used = 0
    layout(&arena, …);                  // now they point into the block
    arena_free(&arena);

Arrays are 256-byte aligned, zero at first, and live as long as the arena.
*/
#pragma once

#include "error.h"

typedef struct {
    char* block;   // NULL while counting; aligned, inside memory
    void* memory;
    size_t used;   // bytes
} Arena;

enum { ARENA_ALIGN = 256 };

// where the next thing will lie, in bytes from the block's start
static inline size_t arena_end(const Arena* a) { return (a->used + ARENA_ALIGN - 1) & ~(size_t)(ARENA_ALIGN - 1); }

// n things of size bytes
static inline void* arena_take(Arena* a, size_t n, size_t size) {
    a->used = arena_end(a);
    void* p = a->block ? a->block + a->used : NULL;
    require(n <= (SIZE_MAX - a->used) / size, "arena sizes are bounded before they are asked for");
    a->used += n * size;
    return p;
}

static inline float* arena_floats(Arena* a, size_t n) { return (float*)arena_take(a, n, sizeof(float)); }

// pages that nobody writes to take no memory: calloc maps large blocks lazily
static inline void arena_allocate(Arena* a) {
    a->memory = allocate(a->used + ARENA_ALIGN, 1);
    a->block = (char*)a->memory + (ARENA_ALIGN - (uintptr_t)a->memory % ARENA_ALIGN) % ARENA_ALIGN;
    a->used = 0;
}

static inline void arena_free(Arena* a) {
    free(a->memory);
    memset(a, 0, sizeof *a);
}
