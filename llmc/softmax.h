/*
What attention and cross-entropy share of a softmax: the largest number of a row, and the row's powers.

Numerics        fp32; NaN is passed over by the maximum and reaches the sum
Proved by       dev/test/test_ops.c and test_ops_float.c, through both users
*/
#pragma once

#include "exp.h"

// the largest of max and the n numbers of x. Sixteen maxima side by side, a loop that every compiler vectorises; a plain
// maximum is not, since its result for NaN would depend on the order
static inline float softmax_max(const float* x, int n, float max) {
    enum { LANES = 16 };
    float most[LANES];
    int i = 0;
    for (int l = 0; l < LANES; l++) most[l] = max;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) most[l] = x[i + l] > most[l] ? x[i + l] : most[l];
    for (; i < n; i++) most[0] = x[i] > most[0] ? x[i] : most[0];
    for (int l = 0; l < LANES; l++) max = most[l] > max ? most[l] : max;
    return max;
}

// x (n) becomes e^(x - max); returns the sum
static inline float softmax_powers(float* x, int n, float max) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        x[i] = exp32(x[i] - max);
        sum += x[i];
    }
    return sum;
}
