/*
Cross-entropy: softmax over the vocabulary, the loss of the right token, and the gradient, in one pass over the logits; and
the same fused with the product that makes the logits.

    forward     loss[n]   = log(sum over v of e^l[n, v]) - l[n, label[n]]           l: logits
    backward    dl[n, v]  = scale * (e^l[n, v] / sum - [v = label[n]])
    lm_head     l = x · w^T,  dx = dl · w,  dw += dl^T · x

A label of -100 is ignored: its loss is 0, its gradient a row of zeros. scale is 1 / (valid labels of the whole step).

Shapes          logits (N, V) of row stride ld    losses labels (N), labels below V    x dx (N, C)    w dw (V, C)
Numerics        the largest logit is taken off before exp; sums of 4096 terms in fp32, and those in double; the loss in
                double until it is stored. A NaN logit gives a NaN loss
Bound by        the logits, alone: three passes over N*V numbers. With the product: 6*N*V*C FLOPs, beside which they vanish
Memory          lm_head_loss_cpu works on a chunk of rows, so that the logits of all rows never exist at once. Each chunk
                reads w and reads and writes dw in full, which 128 rows or more pay for: 256 FLOPs per number of dw. 16M
                numbers (64 MiB) are as many rows for every V up to 128K. The chunk depends on V alone, and so do the bits
Proved by       dev/test/test_ops.c (finite differences, ignored labels, several chunks), test_ops_float.c (same bits for
                any threads; one huge logit)
Source          Milakov and Gimelshein 2018; fused in chunks as in Hsu et al. 2024, "Liger Kernel"
*/
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "dtype.h"
#include "error.h"
#include "exp.h"
#include "matmul.h"
#include "softmax.h"

// ---- CPU reference ---------------------------------------------------------------------------

// the sum of e^(x - max), in runs; with store, x becomes those powers
static inline double cross_entropy_sum(float* x, float max, int V, bool store) {
    enum { RUN = 4096 };
    double total = 0;
    for (int start = 0; start < V; start += RUN) {
        int end = start + RUN < V ? start + RUN : V;
        float sum = 0;
        if (store)
            sum = softmax_powers(x + start, end - start, max);
        else {
#pragma omp simd reduction(+ : sum)
            for (int v = start; v < end; v++) sum += exp32(x[v] - max);
        }
        total += sum;
    }
    return total;
}

// overwrites losses (N) and, with backward, logits by their gradient times scale
static inline void cross_entropy_cpu(float* losses, float* logits, const int32_t* labels, float scale, bool backward,
                                     int N, int V, int ld) {
#pragma omp parallel for if ((size_t)N * V > 4096)
    for (int n = 0; n < N; n++) {
        float* x = logits + (size_t)n * ld;
        int32_t label = labels[n];
        if (label == IGNORED_LABEL) {
            losses[n] = 0;
            if (backward) memset(x, 0, sizeof(float) * V);
            continue;
        }
        require(label >= 0 && label < V, "labels are checked before they reach the loss");
        float right = x[label], max = softmax_max(x, V, -INFINITY);
        double sum = cross_entropy_sum(x, max, V, backward);
        losses[n] = (float)(log(sum) + (double)max - (double)right);
        if (!backward) continue;
        float factor = (float)(scale / sum);
#pragma omp simd
        for (int v = 0; v < V; v++) x[v] *= factor;
        x[label] -= scale;
    }
}

static inline int lm_head_rows(int V) {
    const int most = 1024, least = 64, numbers = 1 << 24;
    int rows = numbers / V / least * least;
    return rows < least ? least : rows < most ? rows : most;
}

// numbers of scratch that lm_head_loss_cpu needs
static inline size_t lm_head_scratch(int V) { return (size_t)lm_head_rows(V) * ((size_t)V + 1); }

// returns the sum of the losses of the valid labels; overwrites dx with its gradient times scale, adds to dw the same. Both may
// be NULL: then the loss alone is computed, from a w of any dtype
static inline double lm_head_loss_cpu(float* dx, float* dw, const float* x, Tensor w, const int32_t* labels,
                                      float scale, int N, int C, int V, float* scratch) {
    const int chunk = lm_head_rows(V);
    const bool backward = dx || dw;
    float *losses = scratch, *logits = scratch + chunk;
    double total = 0;
    for (int start = 0; start < N; start += chunk) {
        const int rows = N - start < chunk ? N - start : chunk;
        const float* xs = x + (size_t)start * C;
        matmul_forward_cpu(logits, V, xs, w, rows, C, V);
        cross_entropy_cpu(losses, logits, labels + start, scale, backward, rows, V, V);
        if (backward) matmul_backward_cpu(dx ? dx + (size_t)start * C : NULL, false, dw, logits, xs, w, rows, C, V);
        for (int n = 0; n < rows; n++) total += losses[n];
    }
    return total;
}
