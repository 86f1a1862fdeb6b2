/*
SwiGLU: one half of a row, through SiLU, gates the other half.

    forward     s = 1 / (1 + e^-gate)
                y = gate * s * up
    backward    dgate = dy * up * s * (1 + gate * (1 - s))
                dup   = dy * gate * s

Shapes          gate_up dgate_up (N, 2F): a row is F gates, then F ups    y dy (N, F)
Numerics        fp32; s is computed again in the backward pass, so nothing is kept for it. The GPU takes e^x and 1/x of its
                special function unit (__expf, __fdividef): s is off by less than 1e-5 of itself, where it does not vanish
Bound by        memory: forward moves 3*N*F elements, backward 5*N*F; the exponentials vectorise (exp.h). Loads marked as
                read once (ld.cs) cost 3 to 5 % on an H200 (dev/cuda/swiglu_forward.cu, swiglu_backward.cu)
Proved by       dev/test/test_ops.c (finite differences, also in place), test_llama3.cu (GPU against CPU)
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

#ifdef __CUDACC__
#include "gpu.cuh"

// ---- GPU -------------------------------------------------------------------------------------
// One thread for 16 bytes of y, in blocks of 256: enough loads are under way at once because 2048 threads share a
// multiprocessor. With P packs to a row, pack i of y is in row i / P; the gates of all rows before it have as many ups
// between them, so that its gate is pack i + (i / P) * P of gate_up, and its up P packs further on.

__device__ __forceinline__ float swiglu_sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

static __global__ void __launch_bounds__(256)
    swiglu_forward_kernel(floatX* __restrict__ y, const floatX* __restrict__ gate_up, unsigned packs, unsigned P) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    size_t from = ((size_t)i + (size_t)(i / P) * P) * PACK;
    PackX gate = pack_load(gate_up + from), up = pack_load(gate_up + from + (size_t)P * PACK), out;
    for (int k = 0; k < PACK; k++) out.set(k, gate.get(k) * swiglu_sigmoid(gate.get(k)) * up.get(k));
    pack_store(y + (size_t)i * PACK, out);
}

// a thread reads all it needs before it writes: dgate_up may be gate_up
static __global__ void __launch_bounds__(256)
    swiglu_backward_kernel(floatX* dgate_up, const floatX* dy, const floatX* gate_up, unsigned packs, unsigned P) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    size_t from = ((size_t)i + (size_t)(i / P) * P) * PACK, F = (size_t)P * PACK;
    PackX gate = pack_load(gate_up + from), up = pack_load(gate_up + from + F);
    PackX dout = pack_load(dy + (size_t)i * PACK), dgate, dup;
    for (int k = 0; k < PACK; k++) {
        float g = gate.get(k), d = dout.get(k), s = swiglu_sigmoid(g);
        dgate.set(k, d * up.get(k) * s * (1 + g * (1 - s)));
        dup.set(k, d * g * s);
    }
    pack_store(dgate_up + from, dgate);
    pack_store(dgate_up + from + F, dup);
}

static inline void swiglu_require(int64_t N, int F) {
    launch_require(F > 0 && F % 8 == 0, "swiglu", "F (intermediate_size) must be a multiple of 8");
    launch_require(N > 0 && N * (F / PACK) <= UINT32_MAX - 255, "swiglu", "N * F is more than one launch can number");
}

// overwrites y (N, F)
static inline void swiglu_forward(floatX* y, const floatX* gate_up, int64_t N, int F, cudaStream_t stream) {
    GpuOp op("swiglu_forward", 3.0 * N * F * sizeof(floatX), 0, stream);
    swiglu_require(N, F);
    unsigned P = (unsigned)(F / PACK), packs = (unsigned)N * P;
    swiglu_forward_kernel<<<(unsigned)ceil_div(packs, 256), 256, 0, stream>>>(y, gate_up, packs, P);
    launch_check();
}

// overwrites dgate_up (N, 2F), which may be gate_up
static inline void swiglu_backward(floatX* dgate_up, const floatX* dy, const floatX* gate_up, int64_t N, int F,
                                   cudaStream_t stream) {
    GpuOp op("swiglu_backward", 5.0 * N * F * sizeof(floatX), 0, stream);
    swiglu_require(N, F);
    unsigned P = (unsigned)(F / PACK), packs = (unsigned)N * P;
    swiglu_backward_kernel<<<(unsigned)ceil_div(packs, 256), 256, 0, stream>>>(dgate_up, dy, gate_up, packs, P);
    launch_check();
}
#endif
