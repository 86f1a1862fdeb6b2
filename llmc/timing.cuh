/*
Where a step's time goes: a row for each op, from the calls that GpuOp notes between two events each.

    timing_begin();                 a pass of training begins: its ops count, until
    timing_spoil();                 something else does, validation say: the step it falls into is left out
    timing_step();                  a step is done, and the GPU was waited for: its calls go to the table
    timing_print();

A step lasts from the end of one's last op to the end of the next one's, so that what the GPU waits in between is part of it:
the table's last row is all that no op took, gaps, copies and the events themselves (about a microsecond an op) too. The first
TIMING_WARM_UP steps choose algorithms and load kernels, and do not count.
*/
#pragma once

#include "gpu.cuh"

enum { TIMING_WARM_UP = 2 };

// sums over the steps that count
typedef struct {
    const char* op;
    int64_t N, C, OC; // of a product
    int64_t calls;
    double ms, bytes, flops;
} TimingRow;

static struct {
    bool wanted, spoiled;
    int64_t seen, steps; // steps, and those that count
    double ms;           // of those
    cudaEvent_t last;    // end of the last op of the step before
    TimingRow* rows;     // [n]
    int n;
} timing;

static inline void timing_begin(void) { gpu_calls.on = timing.wanted; }

static inline void timing_spoil(void) {
    gpu_calls.on = false;
    timing.spoiled = true;
}

static inline double timing_between(cudaEvent_t start, cudaEvent_t stop) {
    float ms;
    cuda_check(cudaEventElapsedTime(&ms, start, stop));
    return (double)ms;
}

// the row of a call, a new one when there is none
static inline TimingRow* timing_row(const GpuCall* c) {
    for (int i = 0; i < timing.n; i++) {
        TimingRow* row = &timing.rows[i];
        if (strcmp(row->op, c->op) == 0 && row->N == c->N && row->C == c->C && row->OC == c->OC) return row;
    }
    timing.rows = (TimingRow*)reallocate(timing.rows, (size_t)timing.n + 1, sizeof *timing.rows);
    timing.rows[timing.n] = TimingRow{ c->op, c->N, c->C, c->OC, 0, 0, 0, 0 };
    return &timing.rows[timing.n++];
}

static inline void timing_step(void) {
    if (!gpu_calls.on || !gpu_calls.n) return;
    GpuCall* end = &gpu_calls.calls[gpu_calls.n - 1];
    if (timing.seen++ >= TIMING_WARM_UP && !timing.spoiled) {
        for (const GpuCall* c = gpu_calls.calls; c <= end; c++) {
            TimingRow* row = timing_row(c);
            row->calls++, row->ms += timing_between(c->start, c->stop), row->bytes += c->bytes, row->flops += c->flops;
        }
        timing.ms += timing_between(timing.last, end->stop);
        timing.steps++;
    }
    if (!timing.last) cuda_check(cudaEventCreate(&timing.last));
    const cudaEvent_t swap = timing.last; // the next step begins here
    timing.last = end->stop, end->stop = swap;
    timing.spoiled = false;
    gpu_calls.n = 0;
}

static inline int timing_compare(const void* a, const void* b) {
    const double x = ((const TimingRow*)a)->ms, y = ((const TimingRow*)b)->ms;
    return x < y ? 1 : x > y ? -1 : 0;
}

// the most time first; calls and milliseconds are those of one step
static inline void timing_print(void) {
    double between = timing.ms;
    const double steps = (double)timing.steps;
    if (!timing.wanted) return;
    if (!timing.steps) {
        fprintf(stderr, "timing     no step to time: the first %d warm up, and those after a validation or a sample are left out\n",
                TIMING_WARM_UP);
        return;
    }
    qsort(timing.rows, (size_t)timing.n, sizeof *timing.rows, timing_compare);
    fprintf(stderr, "timing     of %lld steps, %.3f ms each\n", (long long)timing.steps, timing.ms / steps);
    fprintf(stderr, "  %-26s %24s %7s %9s %7s %8s %6s\n", "op", "N x C x OC", "calls", "ms", "GB/s", "TFLOP/s", "%");
    for (const TimingRow* row = timing.rows; row < timing.rows + timing.n; row++) {
        char shape[64] = "", rate[16] = "";
        if (row->N) snprintf(shape, sizeof shape, "%lld x %lld x %lld", (long long)row->N, (long long)row->C, (long long)row->OC);
        if (row->flops > 0) snprintf(rate, sizeof rate, "%.1f", row->flops / row->ms * 1e-9);
        fprintf(stderr, "  %-26s %24s %7.1f %9.3f %7.0f %8s %6.2f\n", row->op, shape, (double)row->calls / steps, row->ms / steps,
                row->bytes / row->ms * 1e-6, rate, 100 * row->ms / timing.ms);
        between -= row->ms;
    }
    fprintf(stderr, "  %-26s %24s %7s %9.3f %7s %8s %6.2f\n", "between ops", "", "", between / steps, "", "", 100 * between / timing.ms);
}
