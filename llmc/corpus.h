/*
The project's own sources, embedded in the program: what it learns when it is given no data. The Makefile lists the files and
joins them into two texts, one to train on and one of held-out files to validate with. In both, each file ends with one
byte 28, ASCII's file separator, which no source holds; in the token stream each begins with bos.
*/
#pragma once

#include <stddef.h>
#include <string.h>

#include "data.h"
#include "error.h"
#include "tokenizer.h"

#ifdef __APPLE__
#define EMBED_SECTION ".section __TEXT,__const\n"
#define EMBED_NAME(name) "_" #name
#else
#define EMBED_SECTION ".section .rodata\n"
#define EMBED_NAME(name) #name
#endif

// char name[], the bytes of the file at path, and char name_end[], where they end
#define EMBED(name, path)                                                                                              \
    __asm__(EMBED_SECTION ".globl " EMBED_NAME(name) "\n" EMBED_NAME(name) ":\n.incbin \"" path "\"\n"                  \
            ".globl " EMBED_NAME(name##_end) "\n" EMBED_NAME(name##_end) ":\n.byte 0\n.text\n");                       \
    extern const char name[], name##_end[]

enum { FILE_SEPARATOR = 28 };

// the two texts
typedef struct {
    const char *train, *train_end, *val, *val_end;
} Corpus;

// opens an embedded text, whose files become documents one after the other
static inline bool corpus_open(Data* d, const char* text, const char* end, Tokenizer* t, Error* err) {
    memset(d, 0, sizeof *d);
    while (text < end) {
        const char* stop = (const char*)memchr(text, FILE_SEPARATOR, (size_t)(end - text));
        size_t n = (size_t)((stop ? stop : end) - text);
        if (t->bos >= 0) tokens_push(&d->made, t->bos);
        if (!tokenizer_encode(t, &d->made, text, n, false, err)) return false;
        text += n + 1;
    }
    return data_finish(d, "the embedded corpus", t->V, err);
}
