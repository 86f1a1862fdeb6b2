/*
SwiGLU: one half of a row, through SiLU, gates the other half.

    forward     s = 1 / (1 + e^-gate)
                y = gate * s * up
    backward    dgate = dy * up * s * (1 + gate * (1 - s))
                dup   = dy * gate * s

Shapes          gate_up dgate_up (N, 2F): a row is F gates, then F ups    y dy (N, F)
Numerics        fp32; s is computed again in the backward pass, so nothing is kept for it
Bound by        memory: forward moves 3*N*F elements, backward 5*N*F; the exponentials vectorise (exp.h)
Proved by       dev/test/test_ops.c (finite differences, also in place)
Source          Shazeer 2020, "GLU Variants Improve Transformer"
*/
#pragma once

#include <stddef.h>

#include "exp.h"

// ---- CPU reference ---------------------------------------------------------------------------

// overwrites y (N, F)
static inline void swiglu_forward_cpu(float* y, const float* gate_up, int N, int F) {
#pragma omp parallel for if ((size_t)N * F > 4096)
    for (int n = 0; n < N; n++) {
        const float *gate = gate_up + (size_t)n * 2 * F, *up = gate + F;
        float* yn = y + (size_t)n * F;
#pragma omp simd
        for (int f = 0; f < F; f++) yn[f] = gate[f] / (1 + exp32(-gate[f])) * up[f];
    }
}

// overwrites dgate_up (N, 2F), which may be gate_up
static inline void swiglu_backward_cpu(float* dgate_up, const float* dy, const float* gate_up, int N, int F) {
#pragma omp parallel for if ((size_t)N * F > 4096)
    for (int n = 0; n < N; n++) {
        const float *gate = gate_up + (size_t)n * 2 * F, *up = gate + F, *dyn = dy + (size_t)n * F;
        float *dgate = dgate_up + (size_t)n * 2 * F, *dup = dgate + F;
#pragma omp simd
        for (int f = 0; f < F; f++) {
            float g = gate[f], u = up[f], s = 1 / (1 + exp32(-g));
            dgate[f] = dyn[f] * u * s * (1 + g * (1 - s));
            dup[f] = dyn[f] * g * s;
        }
    }
}
