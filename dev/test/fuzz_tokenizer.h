/*
What the fuzzers of the tokenizer share.
*/
#pragma once

#include "llmc/tokenizer.h"

// some of everything: words, digits, white space of all kinds, invalid bytes, a special token, a long piece
#define FUZZ_TEXT                                                                                                      \
    "The weights, the gradients: 1234 don't \xc3\xa9\xe4\xb8\xad\xf0\x9f\x99\x82 \xff\xe4\xb8\r\n\r\n  \t<|eot_id|>x"  \
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa   \0 ab"

// a refusal is one line; returns 0
static inline int fuzz_refused(const Error* err) {
    require(err->text[0] && !strchr(err->text, '\n'), "an error is one line");
    return 0;
}

// text is encoded, with special tokens and without, and the bytes of its tokens are the text; decoded as a stream it is
// valid UTF-8, and itself when it was valid
static inline void fuzz_round_trip(Tokenizer* t, const char* text, size_t n) {
    for (int special = 0; special < 2; special++) {
        Tokens ids = { NULL, 0, 0 };
        Text bytes = { NULL, 0, 0 }, streamed = { NULL, 0, 0 };
        Decoder decoder = { { NULL, 0, 0 }, { 0 }, 0 };
        Error err;
        size_t size, ready;
        require(tokenizer_encode(t, &ids, text, n, special, &err), "any text can be encoded");
        for (size_t i = 0; i < ids.n; i++) {
            const char* piece = tokenizer_piece(t, ids.ids[i], &size);
            require(piece, "an id that was given out has bytes");
            text_add(&bytes, piece, size);
            const char* printed = decoder_push(&decoder, piece, size, &ready);
            require(utf8_valid(printed, ready) == ready, "what is ready to print is valid UTF-8");
            text_add(&streamed, printed, ready);
        }
        const char* rest = decoder_flush(&decoder, &ready);
        text_add(&streamed, rest, ready);
        require(bytes.n == n && (n == 0 || memcmp(bytes.data, text, n) == 0), "the bytes come back");
        bool valid = utf8_valid(text, n) == n;
        require(!valid || (streamed.n == n && (n == 0 || memcmp(streamed.data, text, n) == 0)),
                "valid text streams as it is");
        tokens_free(&ids), text_free(&bytes), text_free(&streamed), decoder_free(&decoder);
    }
}
