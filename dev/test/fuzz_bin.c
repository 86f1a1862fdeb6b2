/*
Token files from anywhere: the bytes are the file. Its windows are read by training and evaluation, whole and split, and
every id that comes out must be in the vocabulary.
*/
#include "llmc/data.h"

static void read_windows(Data* d, int T, int V) {
    int32_t ids[2 * 16], labels[2 * 16];
    for (uint64_t w = 0; w <= data_eval_windows(d, T) && w < 1000; w++) data_eval_window(d, ids, labels, T, w);
    for (uint64_t p = 0; data_windows(d, T) && p < 100; p++) {
        data_batch(d, ids, labels, 2, T, 1, p * p * p);
        for (int i = 0; i < 2 * T; i++)
            if (ids[i] < 0 || ids[i] >= V || labels[i] < 0 || labels[i] >= V) abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
    const int vocabularies[] = { 1, 300, 65535, 65536, 128256, 1 << 27 }, lengths[] = { 1, 2, 7, 16 };
    int V = vocabularies[size % 6];
    Data train = { 0 }, val;
    Progress progress;
    Error err;
    progress_begin(&progress, "", (double)size);
    if (data_add(&train, DATA_BIN, "a", bytes, size, NULL, V, &progress, &err) && data_finish(&train, "a", V, &err)) {
        for (int i = 0; i < 4; i++) read_windows(&train, lengths[i], V);
        data_split(&train, &val, (double)bytes[size - 1] / 255);
        for (int i = 0; i < 4; i++) read_windows(&train, lengths[i], V), read_windows(&val, lengths[i], V);
        data_close(&val);
    }
    data_close(&train);
    return 0;
}
