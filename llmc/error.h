/*
Errors, of three kinds.

    the user's      a file, an option, a shape     functions that meet one return false and leave one line in an Error;
                                                   the program prints it and exits 1
    the machine's   memory, disk                   the same; running out of memory ends the program at once
    ours            a broken promise in the code   require(): always on, says what was promised

A line says what is wrong, the value found, what was expected and, where that helps, what to run.
Readers of files never exit and never abort: they are fuzzed, and a long run may survive what they report.
*/
#pragma once

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    char text[1024];
} Error;

// writes the line and returns false, so that a reader ends in `return set_error(err, "…", …);`
__attribute__((format(printf, 2, 3))) static inline bool set_error(Error* err, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return false;
}

// prints "error: …" on stderr and exits 1
__attribute__((format(printf, 1, 2), noreturn)) static inline void die(const char* format, ...) {
    va_list args;
    va_start(args, format);
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

// a promise between functions of this project; the message names the promise
#define require(promise, message)                                                                                      \
    do {                                                                                                               \
        if (!(promise)) {                                                                                              \
            fprintf(stderr, "%s:%d: broken promise: %s\n", __FILE__, __LINE__, message);                               \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

// count * size bytes of zeros, owned by the caller (free); ends the program when there is no memory left
static inline void* allocate(size_t count, size_t size) {
    void* p = calloc(count ? count : 1, size ? size : 1);
    if (!p) die("out of memory: %zu x %zu bytes asked for", count, size);
    return p;
}

// p with room for count * size bytes, old contents kept, the rest not set; owned by the caller
static inline void* reallocate(void* p, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) die("out of memory: %zu x %zu bytes asked for", count, size);
    size_t bytes = count * size;
    p = realloc(p, bytes ? bytes : 1);
    if (!p) die("out of memory: %zu x %zu bytes asked for", count, size);
    return p;
}
