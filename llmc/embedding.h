/*
Embedding: row n of x is the row of the table that token n names.

    forward     x[n] = w[ids[n]]
    backward    dw[v] = sum over the rows n with ids[n] = v of dx[n]

Shapes          x dx (N, C)    w dw (V, C)    ids (N), each in 0 .. V-1: whoever reads tokens checks that
Numerics        w is F32, BF16 or F16 at any address; x and both gradients are fp32
Bound by        memory: forward moves 2*N*C elements, backward 3*N*C (dw is read and written), scattered by rows
Proved by       dev/test/test_ops.c (finite differences, repeated tokens), test_ops_float.c (same bits for any threads)
Source          none needed: a product with one-hot rows, written as what it does
*/
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "dtype.h"

// ---- CPU reference ---------------------------------------------------------------------------

// overwrites x (N, C)
static inline void embedding_forward_cpu(float* x, const int32_t* ids, Tensor w, int N, int C) {
#pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        float* xn = x + (size_t)n * C;
        size_t row = (size_t)ids[n] * C;
        if (w.dtype == DTYPE_F32)
            memcpy(xn, (const char*)w.data + row * sizeof(float), C * sizeof(float));
        else
            for (int c = 0; c < C; c++) xn[c] = tensor_get(w, row + c);
    }
}

// adds to dw (V, C). Threads own columns and walk the tokens in order: rows that share a token are summed in that order,
// whatever the number of threads
static inline void embedding_backward_cpu(float* dw, const float* dx, const int32_t* ids, int N, int C) {
    enum { COLUMNS = 32 };
#pragma omp parallel for if (N > 1)
    for (int start = 0; start < C; start += COLUMNS) {
        int end = start + COLUMNS < C ? start + COLUMNS : C;
        for (int n = 0; n < N; n++) {
            const float* dxn = dx + (size_t)n * C;
            float* dwv = dw + (size_t)ids[n] * C;
            for (int c = start; c < end; c++) dwv[c] += dxn[c];
        }
    }
}
