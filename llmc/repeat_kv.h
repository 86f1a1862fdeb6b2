/*
repeat_kv: give every query head its own copy of the key or value head that its group shares.

    forward     y[n, h] = x[n, h / G]                           G = NH / NKV query heads to a group
    backward    dx[n, g] = sum of dy[n, h] over the group's heads h = g*G .. g*G + G-1

Our attention reads shared heads where they lie and does not need this; it is here to be compared with (and for kernels that
know no groups).

Shapes          x dx (N, NKV, HD)    y dy (N, NH, HD)
Numerics        a group's sum in fp32, in the order of its heads
Bound by        memory: N * (NKV + NH) * HD elements either way
Proved by       dev/test/test_ops.c (finite differences; attention over repeated heads equals grouped attention)
Source          Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models"
*/
#pragma once

#include <stddef.h>
#include <string.h>

// ---- CPU reference ---------------------------------------------------------------------------

// overwrites y (N, NH, HD)
static inline void repeat_kv_forward_cpu(float* y, const float* x, int N, int NH, int NKV, int HD) {
    int G = NH / NKV;
#pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++)
        for (int h = 0; h < NH; h++)
            memcpy(y + ((size_t)n * NH + h) * HD, x + ((size_t)n * NKV + h / G) * HD, sizeof(float) * HD);
}

// overwrites dx (N, NKV, HD)
static inline void repeat_kv_backward_cpu(float* dx, const float* dy, int N, int NH, int NKV, int HD) {
    int G = NH / NKV;
#pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++)
        for (int g = 0; g < NKV; g++) {
            const float* dyg = dy + ((size_t)n * NH + (size_t)g * G) * HD;
            float* dxg = dx + ((size_t)n * NKV + g) * HD;
            for (int i = 0; i < HD; i++) {
                float sum = 0;
                for (int j = 0; j < G; j++) sum += dyg[(size_t)j * HD + i];
                dxg[i] = sum;
            }
        }
}
