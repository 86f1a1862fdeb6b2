/*
RMSNorm: scale each row to unit root-mean-square, then by a learned weight.

    forward     r  = 1 / sqrt(mean(x^2) + eps)              one number per row
                y  = w * x * r
    backward    g  = w * dy
                dx = r * (g - x * r^2 * mean(g * x))
                dw = sum over rows of dy * x * r

Shapes          x y dx dy (N, C)    w dw (C)    r (N)       N = B*T rows
Numerics        sums in fp32 whatever the storage; r stays fp32 for the backward pass; the product with w is rounded once
Bound by        memory: forward moves 2*N*C elements, backward 4*N*C (dx is read and written)
Proved by       dev/test/test_ops.c (CPU against finite differences)
Source          Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; Llama multiplies by w after normalising
*/
#pragma once

#include <math.h>
#include <stddef.h>

// ---- CPU reference ---------------------------------------------------------------------------

// overwrites y (N, C) and r (N); y may be x
static inline void rmsnorm_forward_cpu(float* y, float* r, const float* x, const float* w, int N, int C, float eps) {
#pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        const float* xn = x + (size_t)n * C;
        float* yn = y + (size_t)n * C;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += xn[c] * xn[c];
        float rn = 1 / sqrtf(sum / C + eps);
        for (int c = 0; c < C; c++) yn[c] = w[c] * (xn[c] * rn);
        r[n] = rn;
    }
}

// adds to dx (N, C) and dw (C). Rows share dw, so it is summed in a second pass whose threads own columns: the order of
// the sum, hence its bits, does not depend on the number of threads
static inline void rmsnorm_backward_cpu(float* dx, float* dw, const float* dy, const float* x, const float* w,
                                        const float* r, int N, int C) {
#pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        const float *xn = x + (size_t)n * C, *dyn = dy + (size_t)n * C;
        float* dxn = dx + (size_t)n * C;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < C; c++) dot += w[c] * dyn[c] * xn[c];
        float rn = r[n], scale = dot / C * rn * rn;
        for (int c = 0; c < C; c++) dxn[c] += rn * (w[c] * dyn[c] - xn[c] * scale);
    }
    enum { COLUMNS = 32 };
#pragma omp parallel for if (N > 1)
    for (int start = 0; start < C; start += COLUMNS) {
        int end = start + COLUMNS < C ? start + COLUMNS : C;
        float sum[COLUMNS] = { 0 };
        for (int n = 0; n < N; n++) {
            const float *xn = x + (size_t)n * C, *dyn = dy + (size_t)n * C;
            for (int c = start; c < end; c++) sum[c - start] += dyn[c] * xn[c] * r[n];
        }
        for (int c = start; c < end; c++) dw[c] += sum[c - start];
    }
}
