/*
How fast is generation? A token at a time reads every weight once, so a plain read of the mapped weights is the floor.

    decode MODEL [TOKENS]     one line: median tokens/s and GB/s of weights over TOKENS (40) tokens, of the read, of the ratio

Each token is timed between two reads of about the same bytes, for memory on a shared machine is fast one second and slow the
next: the ratio is that of neighbours.
*/
#define LLAMA3_LIBRARY
#include "llama3.c"

#include <omp.h>

static int compare(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

static double median(double* x, int n) {
    qsort(x, (size_t)n, sizeof *x, compare);
    return x[n / 2];
}

static uint64_t read_sum; // kept, so that the reading is

// bytes/s of all threads reading the mapped weight files, a MiB each at a time
static double read_rate(const Safetensors* file) {
    enum { PIECE = 1 << 20 };
    double start = omp_get_wtime(), bytes = 0;
    for (int f = 0; f < file->n_shards; f++) {
        const char* data = (const char*)file->shards[f].map.data;
        const size_t pieces = file->shards[f].map.size / PIECE;
        uint64_t sum = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : sum)
        for (size_t i = 0; i < pieces; i++) {
            const uint64_t* p = (const uint64_t*)(data + i * PIECE);
            for (int j = 0; j < PIECE / 8; j++) sum += p[j];
        }
        read_sum += sum;
        bytes += (double)pieces * PIECE;
    }
    return bytes / (omp_get_wtime() - start);
}

int main(int argc, char** argv) {
    Error err;
    const int tokens = argc > 2 ? atoi(argv[2]) : 40;
    if (argc < 2 || tokens < 1) die("expected: decode MODEL [TOKENS]");
    Model* m = model_open(argv[1], &err);
    if (!m) die("%s", err.text);
    Sequence* s = sequence_make(m, tokens + 1);
    float* logits = (float*)allocate((size_t)m->c.V, sizeof *logits);
    double *rate = (double*)allocate((size_t)tokens, sizeof *rate), *read = (double*)allocate((size_t)tokens, sizeof *read);
    double* ratio = (double*)allocate((size_t)tokens, sizeof *ratio);
    int32_t id = 1;
    sequence_feed(s, &id, 1, logits);
    double before = read_rate(&m->file);
    for (int i = 0; i < tokens; i++) {
        double start = omp_get_wtime();
        sequence_feed(s, &id, 1, logits);
        rate[i] = model_weight_bytes(m) / (omp_get_wtime() - start);
        double after = read_rate(&m->file);
        read[i] = (before + after) / 2;
        ratio[i] = rate[i] / read[i];
        before = after;
        for (int v = 0; v < m->c.V; v++)
            if (logits[v] > logits[id]) id = v;
    }
    const double decode = median(rate, tokens), plain = median(read, tokens); // sorted from here on
    printf("decode %.1f tokens/s, %.1f GB/s of weights; a plain read %.1f GB/s (%.1f to %.1f); median of the ratios %.2f\n",
           decode / model_weight_bytes(m), decode * 1e-9, plain * 1e-9, read[0] * 1e-9, read[tokens - 1] * 1e-9,
           median(ratio, tokens));
    free(logits), free(rate), free(read), free(ratio), sequence_free(s), model_free(m);
}
