/*
One block of memory for many arrays, laid out by code that runs twice: with no block it only counts, then the block is
allocated, and the same code places the arrays.

    Arena arena = { 0 };
    layout(&arena, …);                  // every arena_floats() returns NULL; arena.used is the size needed
    arena_allocate(&arena);
    layout(&arena, …);                  // now they point into the block
    arena_free(&arena);

Arrays are 64-byte aligned, zero at first, and live as long as the arena.
*/
#pragma once

#include "error.h"

typedef struct {
    char* block;   // NULL while counting; 64-byte aligned, inside memory
    void* memory;
    size_t used;   // bytes
} Arena;

static inline float* arena_floats(Arena* a, size_t n) {
    a->used = (a->used + 63) & ~(size_t)63;
    float* p = a->block ? (float*)(void*)(a->block + a->used) : NULL;
    require(n <= (SIZE_MAX - a->used) / sizeof(float), "arena sizes are bounded before they are asked for");
    a->used += n * sizeof(float);
    return p;
}

// pages that nobody writes to take no memory: calloc maps large blocks lazily
static inline void arena_allocate(Arena* a) {
    a->memory = allocate(a->used + 64, 1);
    a->block = (char*)a->memory + (64 - (uintptr_t)a->memory % 64) % 64;
    a->used = 0;
}

static inline void arena_free(Arena* a) {
    free(a->memory);
    memset(a, 0, sizeof *a);
}
