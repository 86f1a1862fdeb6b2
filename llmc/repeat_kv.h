/*
repeat_kv: give every query head its own copy of the key or value head that its group shares.

    forward     y[n, h] = x[n, h / G]                           G = NH / NKV query heads to a group
    backward    dx[n, g] = sum of dy[n, h] over the group's heads h = g*G .. g*G + G-1

Our attention reads shared heads where they lie and does not need this; it is here to be compared with (and for kernels that
know no groups).

Shapes          x dx (N, NKV, HD)    y dy (N, NH, HD)
Numerics        a group's sum in fp32, in the order of its heads
Bound by        memory: N * (NKV + NH) * HD elements either way
Proved by       dev/test/test_ops.c (finite differences; attention over repeated heads equals grouped attention),
                test_llama3.cu (GPU against CPU)
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

#ifdef __CUDACC__
#include "gpu.cuh"

// ---- GPU -------------------------------------------------------------------------------------
// One thread for 16 bytes of x or dx and the G places of y or dy that belong to it, in blocks of 256. Shared head q of all
// rows goes to heads q*G .. q*G + G-1 of all rows, so that rows need not be told apart.

static __global__ void __launch_bounds__(256)
    repeat_kv_forward_kernel(floatX* __restrict__ y, const floatX* __restrict__ x, unsigned packs, int G, int HD) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x, P = (unsigned)(HD / PACK);
    if (i >= packs) return;
    PackX v = pack_load(x + (size_t)i * PACK);
    floatX* to = y + (size_t)(i / P) * G * HD + i % P * PACK;
    for (int j = 0; j < G; j++) pack_store(to + (size_t)j * HD, v);
}

static __global__ void __launch_bounds__(256)
    repeat_kv_backward_kernel(floatX* __restrict__ dx, const floatX* __restrict__ dy, unsigned packs, int G, int HD) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x, P = (unsigned)(HD / PACK);
    if (i >= packs) return;
    const floatX* from = dy + (size_t)(i / P) * G * HD + i % P * PACK;
    float sum[PACK] = { 0 };
#pragma unroll 4
    for (int j = 0; j < G; j++) {
        PackX d = pack_load_once(from + (size_t)j * HD);
        for (int k = 0; k < PACK; k++) sum[k] += d.get(k);
    }
    PackX out;
    for (int k = 0; k < PACK; k++) out.set(k, sum[k]);
    pack_store(dx + (size_t)i * PACK, out);
}

// packs of x: what the kernels number
static inline unsigned repeat_kv_packs(int64_t N, int NH, int NKV, int HD) {
    launch_require(HD > 0 && HD % 8 == 0, "repeat_kv", "HD (head_dim) must be a multiple of 8");
    launch_require(NKV > 0 && NH % NKV == 0, "repeat_kv",
                   "num_attention_heads must be a multiple of num_key_value_heads");
    int64_t packs = N * NKV * (HD / PACK);
    launch_require(packs > 0 && packs <= UINT32_MAX - 255, "repeat_kv",
                   "N * NKV * HD is more than one launch can number");
    return (unsigned)packs;
}

// overwrites y (N, NH, HD)
static inline void repeat_kv_forward(floatX* y, const floatX* x, int64_t N, int NH, int NKV, int HD,
                                     cudaStream_t stream) {
    GpuOp op("repeat_kv_forward", 1.0 * N * (NKV + NH) * HD * sizeof(floatX), 0, stream);
    unsigned packs = repeat_kv_packs(N, NH, NKV, HD);
    repeat_kv_forward_kernel<<<(unsigned)ceil_div(packs, 256), 256, 0, stream>>>(y, x, packs, NH / NKV, HD);
    launch_check();
}

// overwrites dx (N, NKV, HD)
static inline void repeat_kv_backward(floatX* dx, const floatX* dy, int64_t N, int NH, int NKV, int HD,
                                      cudaStream_t stream) {
    GpuOp op("repeat_kv_backward", 1.0 * N * (NKV + NH) * HD * sizeof(floatX), 0, stream);
    unsigned packs = repeat_kv_packs(N, NH, NKV, HD);
    repeat_kv_backward_kernel<<<(unsigned)ceil_div(packs, 256), 256, 0, stream>>>(dx, dy, packs, NH / NKV, HD);
    launch_check();
}
#endif
