/*
How fast does the tokenizer encode? One thread.

    tokenizer TOKENIZER FILE [RUNS]     one line: load ms, tokens, median MB/s of RUNS (5) encodings of FILE, best
*/
#include <time.h>

#include "llmc/tokenizer.h"

// of this thread on a processor: the rate is that of an idle machine also on a busy one
static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

int main(int argc, char** argv) {
    Tokenizer t;
    Error err;
    char* text;
    size_t n;
    int runs = argc > 3 ? atoi(argv[3]) : 5;
    if (argc < 3 || runs < 1) die("expected: tokenizer TOKENIZER FILE [RUNS]");
    double start = seconds();
    if (!tokenizer_open(&t, argv[1], &err)) die("%s", err.text);
    double load = seconds() - start;
    if (!read_file(argv[2], &text, &n, (size_t)1 << 33, &err)) die("%s", err.text);
    double* rates = (double*)allocate((size_t)runs, sizeof *rates);
    Tokens ids = { NULL, 0, 0 };
    for (int run = 0; run < runs; run++) {
        ids.n = 0;
        start = seconds();
        if (!tokenizer_encode(&t, &ids, text, n, false, &err)) die("%s", err.text);
        rates[run] = (double)n / 1e6 / (seconds() - start);
    }
    qsort(rates, (size_t)runs, sizeof *rates, compare);
    printf("load %.0f ms  tokens %zu  median %.1f MB/s  best %.1f MB/s\n", load * 1e3, ids.n, rates[runs / 2],
           rates[runs - 1]);
    free(rates), free(text), tokens_free(&ids), tokenizer_close(&t);
}
