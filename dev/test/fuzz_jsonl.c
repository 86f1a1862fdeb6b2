/*
Documents and chats from anywhere: the bytes are a .jsonl file for the byte tokenizer. What is read must be in the
vocabulary, and each evaluation window a valid one.
*/
#include "llmc/data.h"

int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
    static Tokenizer t;
    if (t.V == 0) tokenizer_bytes(&t);
    Data d = { 0 };
    Progress progress;
    Error err;
    progress_begin(&progress, "", (double)size);
    if (data_add(&d, DATA_JSONL, "a", bytes, size, &t, t.V, &progress, &err) && data_finish(&d, "a", t.V, &err)) {
        enum { T = 5 };
        int32_t ids[T], labels[T];
        uint64_t predictions = 0, windows = data_eval_windows(&d, T);
        for (uint64_t w = 0; w < windows; w++) {
            predictions += (uint64_t)data_eval_window(&d, ids, labels, T, w);
            for (int i = 0; i < T; i++)
                if (ids[i] < 0 || ids[i] >= t.V || labels[i] < IGNORED_LABEL || labels[i] >= t.V) abort();
        }
        if (predictions != data_tokens(&d) - 1) abort();
    }
    data_close(&d);
    return 0;
}
