/*
Matrix product: y = x · w^T, with w stored (outputs, inputs).
*/
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "dtype.h"

// ---- CPU reference ---------------------------------------------------------------------------

static inline float matmul_weight(Tensor w, size_t i) {
    if (w.dtype == DTYPE_F32) {
        float value;
        memcpy(&value, (const char*)w.data + i * sizeof value, sizeof value);
        return value;
    }
    return tensor_get(w, i);
}

// overwrites y (N, OC), whose rows are ldy apart
static inline void matmul_forward_cpu(float* y, int ldy, const float* x, Tensor w, int N, int C, int OC) {
#pragma omp parallel for
    for (int o = 0; o < OC; o++) {
        for (int n = 0; n < N; n++) {
            float sum = 0;
            for (int c = 0; c < C; c++) sum += x[(size_t)n * C + c] * matmul_weight(w, (size_t)o * C + c);
            y[(size_t)n * ldy + o] = sum;
        }
    }
}

// overwrites dx (N, C), or adds to it; adds to dw (OC, C). Either may be NULL. w is F32
static inline void matmul_backward_cpu(float* dx, bool accumulate_dx, float* dw, const float* dy, const float* x, Tensor w,
                                       int N, int C, int OC) {
#pragma omp parallel for
    for (int n = 0; n < (dx ? N : 0); n++) {
        float* dxn = dx + (size_t)n * C;
        for (int c = 0; c < C && !accumulate_dx; c++) dxn[c] = 0;
        for (int o = 0; o < OC; o++)
            for (int c = 0; c < C; c++) dxn[c] += dy[(size_t)n * OC + o] * matmul_weight(w, (size_t)o * C + c);
    }
#pragma omp parallel for
    for (int o = 0; o < (dw ? OC : 0); o++)
        for (int n = 0; n < N; n++)
            for (int c = 0; c < C; c++) dw[(size_t)o * C + c] += dy[(size_t)n * OC + o] * x[(size_t)n * C + c];
}
