/*
Our tokenizer as a process that answers requests: what dev/reference/parity_tokenizer.py compares with others.

    tokenizer_pipe PATH         a tokenizer.json, a tokenizer.model, a folder, or "bytes"

    request     a letter, a uint32 count, that many bytes
                t text      s text with its special tokens      m message: role, NUL, text      h header of this role
                d int32 ids, to decode as a stream, one id at a time      w folder to write the tokenizer to
    answer      a uint32 count, that many bytes: int32 ids, or text. Numbers are little-endian
*/
#include "llmc/tokenizer.h"

static void answer(const void* data, size_t n) {
    uint32_t count = (uint32_t)n;
    fwrite(&count, sizeof count, 1, stdout);
    fwrite(data, 1, n, stdout);
    fflush(stdout);
}

static void answer_decoded(const Tokenizer* t, const char* request, size_t n) {
    Decoder decoder = { { NULL, 0, 0 }, { 0 }, 0 };
    Text text = { NULL, 0, 0 };
    size_t ready, size;
    for (size_t i = 0; i + 4 <= n; i += 4) {
        int32_t id;
        memcpy(&id, request + i, 4);
        const char* piece = tokenizer_piece(t, id, &size);
        const char* bytes = decoder_push(&decoder, piece, size, &ready);
        text_add(&text, bytes, ready);
    }
    const char* rest = decoder_flush(&decoder, &ready);
    text_add(&text, rest, ready);
    answer(text.data, text.n);
    text_free(&text), decoder_free(&decoder);
}

static bool serve(Tokenizer* t, Tokens* ids, char kind, const char* request, size_t n, Error* err) {
    size_t role = strlen(request) + 1; // a NUL follows the request
    ids->n = 0;
    switch (kind) {
    case 't':
    case 's': return tokenizer_encode(t, ids, request, n, kind == 's', err);
    case 'm': return role <= n && tokenizer_chat_message(t, ids, request, request + role, n - role, err);
    case 'h': return tokenizer_chat_header(t, ids, request, err);
    case 'w': return tokenizer_write(t, request, err);
    default: return set_error(err, "unknown request '%c'", kind);
    }
}

int main(int argc, char** argv) {
    Tokenizer t;
    Tokens ids = { NULL, 0, 0 };
    Error err = { "" };
    if (argc != 2) die("expected: tokenizer_pipe PATH");
    if (strcmp(argv[1], "bytes") == 0)
        tokenizer_bytes(&t);
    else if (!tokenizer_open(&t, argv[1], &err))
        die("%s", err.text);
    int kind;
    while ((kind = getchar()) != EOF) {
        uint32_t n;
        if (fread(&n, sizeof n, 1, stdin) != 1) die("a request that ends early");
        char* request = (char*)allocate((size_t)n + 1, 1);
        if (fread(request, 1, n, stdin) != n) die("a request that ends early");
        if (kind == 'd')
            answer_decoded(&t, request, n);
        else if (serve(&t, &ids, (char)kind, request, n, &err))
            answer(ids.ids, ids.n * sizeof *ids.ids);
        else
            die("%s", err.text);
        free(request);
    }
    tokens_free(&ids), tokenizer_close(&t);
}
