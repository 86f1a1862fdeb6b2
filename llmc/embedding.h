/*
Embedding: row n of x is the row of the table that token n names.

    forward     x[n] = w[ids[n]]
    backward    dw[v] = sum over the rows n with ids[n] = v of dx[n]

Shapes          x dx (N, C)    w dw (V, C)    ids (N), each in 0 .. V-1: whoever reads tokens checks that
Numerics        on the CPU w is F32, BF16 or F16 at any address; x and both gradients are fp32. On the GPU all are floatX, and
                the rows of one token are summed in fp32, in a fixed order, before the sum is added to dw
Bound by        memory: forward moves 2*N*C elements, backward 3*N*C (dw is read and written), scattered by rows
Proved by       dev/test/test_ops.c (finite differences, repeated tokens), test_ops_float.c (same bits for any threads),
                test_llama3.cu (GPU against CPU)
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

#ifdef __CUDACC__
#include <cub/device/device_radix_sort.cuh>

#include "gpu.cuh"

// ---- GPU -------------------------------------------------------------------------------------

enum {
    EMBEDDING_LONG = 32,  // rows of one token that one block still sums alone
    EMBEDDING_WARPS = 16, // that sum more than those
};

// one warp copies one row, in blocks of four
static __global__ void __launch_bounds__(4 * WARP)
    embedding_forward_kernel(floatX* __restrict__ x, const int32_t* __restrict__ ids, const floatX* __restrict__ w,
                             int N, int C) {
    int n = blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= N) return;
    const floatX* from = w + (size_t)ids[n] * C;
    floatX* to = x + (size_t)n * C;
#pragma unroll 4
    for (int c = threadIdx.x * PACK; c < C; c += WARP * PACK) pack_store(to + c, pack_load(from + c));
}

// overwrites x (N, C)
static inline void embedding_forward(floatX* x, const int32_t* ids, const floatX* w, int N, int C,
                                     cudaStream_t stream) {
    GpuOp op("embedding_forward", 2.0 * N * C * sizeof(floatX), 0, stream);
    launch_require(C > 0 && C % 8 == 0, "embedding", "C (hidden_size) must be a multiple of 8");
    embedding_forward_kernel<<<(unsigned)ceil_div(N, 4), dim3(WARP, 4), 0, stream>>>(x, ids, w, N, C);
    launch_check();
}

// Backward: many rows may add to one row of dw, and floating-point atomics would add them in any order. The tokens are
// sorted instead, stably: the rows of one token become a run of neighbours, in their old order. Each run is summed by one
// block, or by one for every few columns when it is long, and added to dw once.

static __global__ void embedding_rows_kernel(int32_t* rows, int N) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) rows[n] = n;
}

// sum += rows first, first + step … before end of dx, at the columns that dx points to; four loads are under way at once
__device__ __forceinline__ void embedding_sum_rows(float (&sum)[PACK], const floatX* __restrict__ dx,
                                                   const int32_t* __restrict__ rows, int first, int end, int step,
                                                   int C) {
    enum { AHEAD = 4 };
    for (; first < end; first += AHEAD * step) {
        PackX d[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (first + j * step < end) d[j] = pack_load_once(dx + (size_t)rows[first + j * step] * C);
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (first + j * step < end)
                for (int k = 0; k < PACK; k++) sum[k] += d[j].get(k);
    }
}

__device__ __forceinline__ void embedding_add_sum(floatX* dw, const float (&sum)[PACK]) {
    PackX d = pack_load(dw);
    for (int k = 0; k < PACK; k++) d.set(k, d.get(k) + sum[k]);
    pack_store(dw, d);
}

// the first place from first on, and before last, whose id is at least `id`; last if there is none
__device__ __forceinline__ int embedding_lower_bound(const int32_t* ids, int first, int last, int id) {
    while (first < last) {
        int middle = first + (last - first) / 2;
        if (ids[middle] < id) first = middle + 1;
        else last = middle;
    }
    return first;
}

// ids (N) sorted, rows (N): where each stood. Block i sums the run that begins at i, if one does and it is short; a thread
// owns 16 bytes of columns
static __global__ void __launch_bounds__(256)
    embedding_short_runs_kernel(floatX* dw, const floatX* __restrict__ dx, const int32_t* __restrict__ ids,
                                const int32_t* __restrict__ rows, int N, int C) {
    int first = blockIdx.x, id = ids[first];
    if (first && ids[first - 1] == id) return;
    if (N - first > EMBEDDING_LONG && ids[first + EMBEDDING_LONG] == id) return;
    int end = embedding_lower_bound(ids, first, min(first + EMBEDDING_LONG, N), id + 1);
    for (int c = threadIdx.x * PACK; c < C; c += blockDim.x * PACK) {
        float sum[PACK] = { 0 };
        embedding_sum_rows(sum, dx + c, rows, first, end, 1, C);
        embedding_add_sum(dw + (size_t)id * C + c, sum);
    }
}

// A long run crosses a multiple of EMBEDDING_LONG: block (i, j) sums the run whose first such place is number i, over
// columns j*32 packs and on. Its warps take every 16th row; their sums are added in the order of the warps
static __global__ void __launch_bounds__(EMBEDDING_WARPS* WARP)
    embedding_long_runs_kernel(floatX* dw, const floatX* __restrict__ dx, const int32_t* __restrict__ ids,
                               const int32_t* __restrict__ rows, int N, int C) {
    __shared__ float sums[EMBEDDING_WARPS][PACK][WARP];
    int place = blockIdx.x * EMBEDDING_LONG, id = ids[place], lane = threadIdx.x, warp = threadIdx.y;
    if (place && ids[place - EMBEDDING_LONG] == id) return;
    int first = embedding_lower_bound(ids, max(place - EMBEDDING_LONG, 0), place, id);
    if (N - first <= EMBEDDING_LONG || ids[first + EMBEDDING_LONG] != id) return;
    int end = embedding_lower_bound(ids, place, N, id + 1), c = (blockIdx.y * WARP + lane) * PACK;

    float sum[PACK] = { 0 };
    if (c < C) embedding_sum_rows(sum, dx + c, rows, first + warp, end, EMBEDDING_WARPS, C);
    for (int k = 0; k < PACK; k++) sums[warp][k][lane] = sum[k];
    __syncthreads();
    if (warp || c >= C) return;
    for (int i = 1; i < EMBEDDING_WARPS; i++)
        for (int k = 0; k < PACK; k++) sum[k] += sums[i][k][lane];
    embedding_add_sum(dw + (size_t)id * C + c, sum);
}

// what the sort works in, as one piece of memory
typedef struct {
    int32_t *rows, *sorted_ids, *sorted_rows; // (N) each
    void* sort;
    size_t sort_bytes, bytes;
    int bits; // of an id
} EmbeddingScratch;

static inline EmbeddingScratch embedding_scratch(void* memory, int N, int V) {
    EmbeddingScratch s = {};
    size_t part = ((size_t)N * sizeof(int32_t) + 255) / 256 * 256;
    while (s.bits < 31 && (int64_t)1 << s.bits < V) s.bits++;
    s.bits = s.bits ? s.bits : 1;
    s.rows = (int32_t*)memory;
    s.sorted_ids = (int32_t*)((char*)memory + part);
    s.sorted_rows = (int32_t*)((char*)memory + 2 * part);
    s.sort = (char*)memory + 3 * part;
    cuda_check(cub::DeviceRadixSort::SortPairs(NULL, s.sort_bytes, (const int32_t*)NULL, (int32_t*)NULL,
                                               (const int32_t*)NULL, (int32_t*)NULL, N, 0, s.bits));
    s.bytes = 3 * part + s.sort_bytes;
    return s;
}

// bytes, to lie at a multiple of 256
static inline size_t embedding_backward_scratch(int N, int V) { return embedding_scratch(NULL, N, V).bytes; }

// adds to dw (V, C)
static inline void embedding_backward(floatX* dw, const floatX* dx, const int32_t* ids, int N, int C, int V,
                                      void* scratch, cudaStream_t stream) {
    GpuOp op("embedding_backward", (N + 2.0 * (N < V ? N : V)) * C * sizeof(floatX), 0, stream);
    launch_require(C > 0 && C % 8 == 0, "embedding", "C (hidden_size) must be a multiple of 8");
    EmbeddingScratch s = embedding_scratch(scratch, N, V);
    embedding_rows_kernel<<<(unsigned)ceil_div(N, 256), 256, 0, stream>>>(s.rows, N);
    launch_check();
    cuda_check(cub::DeviceRadixSort::SortPairs(s.sort, s.sort_bytes, ids, s.sorted_ids, (const int32_t*)s.rows,
                                               s.sorted_rows, N, 0, s.bits, stream));
    int threads = C / PACK < 256 ? (int)ceil_div(C / PACK, WARP) * WARP : 256;
    embedding_short_runs_kernel<<<(unsigned)N, (unsigned)threads, 0, stream>>>(dw, dx, s.sorted_ids, s.sorted_rows, N,
                                                                               C);
    launch_check();
    dim3 grid((unsigned)ceil_div(N, EMBEDDING_LONG), (unsigned)ceil_div(C, WARP * PACK)), block(WARP, EMBEDDING_WARPS);
    embedding_long_runs_kernel<<<grid, block, 0, stream>>>(dw, dx, s.sorted_ids, s.sorted_rows, N, C);
    launch_check();
}
#endif
