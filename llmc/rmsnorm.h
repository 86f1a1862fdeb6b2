/*
RMSNorm: scale each row to unit root-mean-square, then by a learned weight.

    forward     r  = 1 / sqrt(mean(x^2) + eps)              one number per row
                y  = w * x * r
    backward    g  = w * dy
                dx = r * (g - x * r^2 * mean(g * x))
                dw = sum over rows of dy * x * r

Shapes          x y dx dy (N, C)    w dw (C)    r (N)       N = B*T rows
Numerics        sums in fp32 whatever the storage; r stays fp32 for the backward pass; the product with w is rounded once.
                With the residual add, the sum is rounded first, and what is stored is what is normalised
Bound by        memory: forward moves 2*N*C elements, 4*N*C with the residual add, backward 4*N*C (dx is read and written)
Proved by       dev/test/test_ops.c (CPU against finite differences), test_llama3.cu (GPU against CPU)
Source          Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; Llama multiplies by w after normalising.
                Rows that wait in registers, and blocks that keep their part of dw: as in Liger-Kernel and QuACK
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

#ifdef __CUDACC__
#include "gpu.cuh"

// ---- GPU: what both passes use ---------------------------------------------------------------
// Rows wait in shared memory, not in registers: each thread copies its 16 bytes of every so many into places of its own, the
// copies run on their own (cp.async), and nobody else reads those places, so that no barrier guards them. A multiprocessor
// then has 100 KB and more under way, several times what its share of the bandwidth needs. Held in registers, packed and
// unpacked, the same rows leave a quarter of the threads.

// 16 bytes from global to shared memory
__device__ __forceinline__ void rmsnorm_copy(void* shared, const void* global) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// ends a group of copies
__device__ __forceinline__ void rmsnorm_copies_end(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }

// until all groups of this thread but the last LEFT have arrived
template <int LEFT> __device__ __forceinline__ void rmsnorm_copies_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// lets a kernel have so many bytes of shared memory in a block; whether the GPU has them
template <typename Kernel> static inline bool rmsnorm_shared(Kernel kernel, int64_t bytes) {
    int device, most;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (bytes > most - 1024) return false; // what kernels have beside it
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    return true;
}

// threads, in whole warps, of which each takes up to `packs` times 16 bytes of a row
static inline int rmsnorm_threads(int C, int packs) { return (int)ceil_div(C, (int64_t)packs * PACK * WARP) * WARP; }

static inline void rmsnorm_require(int C) {
    launch_require(C > 0 && C % 8 == 0, "rmsnorm", "C (hidden_size) must be a multiple of 8");
}

// ---- GPU: forward ----------------------------------------------------------------------------

__device__ __forceinline__ PackX rmsnorm_add(PackX a, PackX b) {
    for (int k = 0; k < PACK; k++) a.set(k, a.get(k) + b.get(k));
    return a;
}

__device__ __forceinline__ float rmsnorm_squares(PackX x) {
    float sum = 0;
    for (int k = 0; k < PACK; k++) sum += x.get(k) * x.get(k);
    return sum;
}

__device__ __forceinline__ PackX rmsnorm_scale(PackX x, float r, PackX w) {
    for (int k = 0; k < PACK; k++) x.set(k, w.get(k) * (x.get(k) * r));
    return x;
}

// RESIDUAL: sum = a + b, and x is the sum; else x is a. Block (threads, rows): the threads of a row take 16 bytes each, in
// turn, four times or less; several rows to a block only where one warp takes a row. SHARED: the row waits in shared memory,
// else it does not fit and is read again. mean: 1 / C. sum may be a
template <bool RESIDUAL, bool SHARED>
static __global__ void __launch_bounds__(1024)
    rmsnorm_forward_kernel(floatX* sum, floatX* y, float* r, const floatX* a, const floatX* b,
                           const floatX* __restrict__ w, int N, int C, float mean, float eps) {
    extern __shared__ int4 rmsnorm_rows[]; // (rows, C) of a, with RESIDUAL (rows, 2, C) of a and b
    const int n = blockIdx.x * blockDim.y + threadIdx.y, first = threadIdx.x * PACK, step = blockDim.x * PACK;
    const size_t row = (size_t)n * C;
    if (n >= N) return;
    floatX* const place = (floatX*)rmsnorm_rows + (RESIDUAL ? 2 : 1) * threadIdx.y * C; // of the row in shared memory
    const floatX *from = SHARED ? place : a + row, *add = SHARED ? place + C : b + row;
    if (SHARED) {
#pragma unroll 4
        for (int c = first; c < C; c += step) {
            rmsnorm_copy(place + c, a + row + c);
            if (RESIDUAL) rmsnorm_copy(place + C + c, b + row + c);
        }
        rmsnorm_copies_end();
        rmsnorm_copies_wait<0>();
    }
    float squares = 0;
#pragma unroll 2
    for (int c = first; c < C; c += step) {
        PackX v = pack_load(from + c);
        if (RESIDUAL) {
            v = rmsnorm_add(v, pack_load(add + c));
            if (SHARED) pack_store(place + c, v);
            pack_store(sum + row + c, v);
        }
        squares += rmsnorm_squares(v);
    }
    squares = blockDim.y > 1 ? warp_sum(squares) : block_sum(squares);
    const float rn = rsqrtf(squares * mean + eps);
    if (threadIdx.x == 0) r[n] = rn;
    if (RESIDUAL && !SHARED) from = sum + row;
#pragma unroll 4
    for (int c = first; c < C; c += step)
        pack_store(y + row + c, rmsnorm_scale(pack_load(from + c), rn, pack_load(w + c)));
}

template <bool RESIDUAL>
static inline void rmsnorm_forward_any(floatX* sum, floatX* y, float* r, const floatX* a, const floatX* b,
                                       const floatX* w, int N, int C, float eps, cudaStream_t stream) {
    rmsnorm_require(C);
    int threads = rmsnorm_threads(C, 4), rows = threads == WARP ? 4 : 1;
    int64_t shared = (int64_t)rows * (RESIDUAL ? 2 : 1) * C * (int64_t)sizeof(floatX);
    const float mean = 1.0f / C;
    dim3 grid((unsigned)ceil_div(N, rows)), block((unsigned)(threads < 1024 ? threads : 1024), (unsigned)rows);
    if (rmsnorm_shared(rmsnorm_forward_kernel<RESIDUAL, true>, shared))
        rmsnorm_forward_kernel<RESIDUAL, true>
            <<<grid, block, (size_t)shared, stream>>>(sum, y, r, a, b, w, N, C, mean, eps);
    else rmsnorm_forward_kernel<RESIDUAL, false><<<grid, block, 0, stream>>>(sum, y, r, a, b, w, N, C, mean, eps);
    launch_check();
}

// overwrites y (N, C) and r (N)
static inline void rmsnorm_forward(floatX* y, float* r, const floatX* x, const floatX* w, int N, int C, float eps,
                                   cudaStream_t stream) {
    GpuOp op("rmsnorm_forward", 2.0 * N * C * sizeof(floatX), 0, stream);
    rmsnorm_forward_any<false>(NULL, y, r, x, NULL, w, N, C, eps, stream);
}

// overwrites sum (N, C) with a + b, and y (N, C) and r (N) with the norm of sum; sum may be a
static inline void residual_rmsnorm_forward(floatX* sum, floatX* y, float* r, const floatX* a, const floatX* b,
                                            const floatX* w, int N, int C, float eps, cudaStream_t stream) {
    GpuOp op("residual_rmsnorm_forward", 4.0 * N * C * sizeof(floatX), 0, stream);
    rmsnorm_forward_any<true>(sum, y, r, a, b, w, N, C, eps, stream);
}

// one thread for 16 bytes, P to a row
static __global__ void __launch_bounds__(256)
    rmsnorm_again_kernel(floatX* __restrict__ y, const floatX* __restrict__ x, const float* __restrict__ r,
                         const floatX* __restrict__ w, unsigned packs, unsigned P) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x, n = i / P;
    if (i >= packs) return;
    PackX v = pack_load_once(x + (size_t)i * PACK), weight = pack_load(w + (size_t)(i - n * P) * PACK);
    pack_store(y + (size_t)i * PACK, rmsnorm_scale(v, r[n], weight));
}

// overwrites y (N, C) with what rmsnorm_forward made of x, to the bit, from its r
static inline void rmsnorm_again(floatX* y, const floatX* x, const float* r, const floatX* w, int N, int C,
                                 cudaStream_t stream) {
    GpuOp op("rmsnorm_again", 2.0 * N * C * sizeof(floatX), 0, stream);
    rmsnorm_require(C);
    int64_t packs = (int64_t)N * (C / PACK);
    launch_require(packs <= UINT32_MAX - 255, "rmsnorm", "N * C is more than one launch can number");
    rmsnorm_again_kernel<<<(unsigned)ceil_div(packs, 256), 256, 0, stream>>>(y, x, r, w, (unsigned)packs,
                                                                             (unsigned)(C / PACK));
    launch_check();
}

// ---- GPU: backward ---------------------------------------------------------------------------
// dw sums over all rows. So few blocks as the GPU runs at a time walk the rows, block b those with n % grid = b, one at a
// time; a thread owns 16 bytes of columns and keeps their sums for dw in registers. At the end each block stores its sums,
// and a second kernel adds those of all blocks, in order.
// While a row is worked on, the next RMSNORM_STAGES - 1 are on their way into a ring in shared memory.

enum { RMSNORM_STAGES = 3 };

// adds x over the block, with one barrier: callers use two `sums` in turns, and who writes one again has passed the barrier
// that everyone reached after reading it
__device__ __forceinline__ float rmsnorm_block_sum(float x, float* sums) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    x = warp_sum(x);
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < (int)(blockDim.x / WARP) ? sums[lane] : 0);
}

__device__ __forceinline__ float rmsnorm_dot(PackX x, PackX dy, PackX w) {
    float dot = 0;
    for (int k = 0; k < PACK; k++) dot += dy.get(k) * x.get(k) * w.get(k);
    return dot;
}

// dx of 16 bytes of columns; adds to their dw. scale: r^3 * mean(g * x)
__device__ __forceinline__ PackX rmsnorm_dx(float (&dw)[PACK], PackX x, PackX dy, PackX dres, PackX w, float r,
                                            float scale) {
    PackX dx;
    for (int k = 0; k < PACK; k++) {
        dw[k] += dy.get(k) * x.get(k) * r;
        dx.set(k, dres.get(k) + (w.get(k) * dy.get(k) * r - x.get(k) * scale));
    }
    return dx;
}

// block: C / PACK threads, in whole warps; 1024 of them must fit the registers of a multiprocessor. partial (grid, C): the
// blocks' sums for dw. mean: 1 / C. dres may be NULL; dx may be dres
static __global__ void __launch_bounds__(1024)
    rmsnorm_backward_kernel(floatX* dx, float* partial, const floatX* dy, const floatX* dres, const floatX* x,
                            const floatX* w, const float* r, int N, int C, float mean) {
    extern __shared__ int4 rmsnorm_rows[]; // (stages, 3, threads): x, dy, dres
    __shared__ float sums[2][WARP];
    const int c = threadIdx.x * PACK, part = blockDim.x * PACK, stage = 3 * part;
    const int rows = (N - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x; // of this block
    const size_t next = (size_t)gridDim.x * C; // from one of them to the one after it
    const int lane = threadIdx.x % WARP;
    const bool inside = c < C;
    floatX* const ring = (floatX*)rmsnorm_rows + c;
    for (int i = 0; i < 3 * RMSNORM_STAGES; i++) // what nobody copies is zero
        if (!inside || (i % 3 == 2 && !dres)) pack_store(ring + i * part, PackX{});

    auto fetch = [&](int i, floatX* to, size_t from) { // row i of the block
        if (inside && i < rows) {
            rmsnorm_copy(to, x + from);
            rmsnorm_copy(to + part, dy + from);
            if (dres) rmsnorm_copy(to + 2 * part, dres + from);
        }
        rmsnorm_copies_end();
    };
    size_t at = (size_t)blockIdx.x * C + c;
#pragma unroll
    for (int i = 0; i < RMSNORM_STAGES - 1; i++) fetch(i, ring + i * stage, at + i * next);

    PackX weight = {};
    if (inside) weight = pack_load(w + c);
    float dw[PACK] = { 0 }, r_lane = 0; // r of 32 rows, one a lane
    int now = 0;                        // the place of the ring that is read
    for (int i = 0; i < rows; i++, at += next) {
        const int before = now ? now - 1 : RMSNORM_STAGES - 1; // the place read before, free now
        fetch(i + RMSNORM_STAGES - 1, ring + before * stage, at + (RMSNORM_STAGES - 1) * next);
        if (i % WARP == 0 && i + lane < rows) r_lane = r[blockIdx.x + (i + lane) * gridDim.x];
        rmsnorm_copies_wait<RMSNORM_STAGES - 1>();
        const floatX* from = ring + now * stage;
        PackX xn = pack_load(from), dyn = pack_load(from + part);
        const float dot = rmsnorm_block_sum(rmsnorm_dot(xn, dyn, weight), sums[i % 2]);
        const float rn = __shfl_sync(0xffffffffu, r_lane, i % WARP);
        PackX out = rmsnorm_dx(dw, xn, dyn, pack_load(from + 2 * part), weight, rn, dot * mean * rn * rn * rn);
        if (inside) pack_store(dx + at, out);
        now = now + 1 < RMSNORM_STAGES ? now + 1 : 0;
    }
    if (!inside) return;
    float* sum = partial + (size_t)blockIdx.x * C + c;
    for (int k = 0; k < PACK; k += 4) pack_store(sum + k, Pack<float>{ dw[k], dw[k + 1], dw[k + 2], dw[k + 3] });
}

// the same for rows that no block holds: the row is read twice, and the sums for dw lie in `partial` from the start
static __global__ void __launch_bounds__(1024)
    rmsnorm_backward_long_kernel(floatX* dx, float* partial, const floatX* dy, const floatX* dres, const floatX* x,
                                 const floatX* w, const float* r, int N, int C, float mean) {
    const int first = threadIdx.x * PACK, step = blockDim.x * PACK;
    float* const sum = partial + (size_t)blockIdx.x * C;
    for (int c = first; c < C; c += step)
        for (int k = 0; k < PACK; k++) sum[c + k] = 0;
    for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
        const size_t row = (size_t)n * C;
        float dot = 0;
        for (int c = first; c < C; c += step)
            dot += rmsnorm_dot(pack_load(x + row + c), pack_load(dy + row + c), pack_load(w + c));
        dot = block_sum(dot);
        const float rn = r[n], scale = dot * mean * rn * rn * rn;
        for (int c = first; c < C; c += step) {
            PackX add = {};
            if (dres) add = pack_load(dres + row + c);
            float dw[PACK];
            for (int k = 0; k < PACK; k++) dw[k] = sum[c + k];
            pack_store(dx + row + c, rmsnorm_dx(dw, pack_load(x + row + c), pack_load(dy + row + c), add,
                                                pack_load(w + c), rn, scale));
            for (int k = 0; k < PACK; k++) sum[c + k] = dw[k];
        }
    }
}

// one warp for 32 columns of every 32nd of the `blocks` rows of partial; the warps' sums are added in their order, to dw once
static __global__ void __launch_bounds__(WARP* WARP)
    rmsnorm_dw_kernel(floatX* dw, const float* __restrict__ partial, int blocks, int C) {
    __shared__ float sums[WARP][WARP];
    const int c = blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    if (c < C) {
#pragma unroll 8
        for (int b = threadIdx.y; b < blocks; b += WARP) sum += partial[(size_t)b * C + c];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || c >= C) return;
    for (int i = 1; i < WARP; i++) sum += sums[i][threadIdx.x];
    dw[c] = from_float<floatX>(to_float(dw[c]) + sum);
}

// the most blocks of the backward pass: 1024 threads a multiprocessor
static inline int rmsnorm_backward_blocks(int C) {
    int threads = rmsnorm_threads(C, 1);
    return gpu_processors() * (threads < 1024 ? 1024 / threads : 1);
}

// bytes, to lie at a multiple of 16
static inline size_t rmsnorm_backward_scratch(int C) { return (size_t)rmsnorm_backward_blocks(C) * C * sizeof(float); }

// overwrites dx (N, C) with dres + the gradient through the norm; dres (N, C) may be NULL, and may be dx. Adds to dw (C)
static inline void rmsnorm_backward(floatX* dx, floatX* dw, const floatX* dy, const floatX* dres, const floatX* x,
                                    const floatX* w, const float* r, int N, int C, void* scratch, cudaStream_t stream) {
    GpuOp op("rmsnorm_backward", (dres ? 4.0 : 3.0) * N * C * sizeof(floatX), 0, stream);
    rmsnorm_require(C);
    float *partial = (float*)scratch, mean = 1.0f / C;
    // at least 8 rows to a block, or its sums would be much to move beside its rows
    unsigned blocks = (unsigned)min(ceil_div(N, 8), (int64_t)rmsnorm_backward_blocks(C));
    unsigned threads = (unsigned)rmsnorm_threads(C, 1);
    size_t shared = (size_t)RMSNORM_STAGES * 3 * 16 * threads;
    if (threads <= 1024 && rmsnorm_shared(rmsnorm_backward_kernel, (int64_t)shared))
        rmsnorm_backward_kernel<<<blocks, threads, shared, stream>>>(dx, partial, dy, dres, x, w, r, N, C, mean);
    else rmsnorm_backward_long_kernel<<<blocks, 1024, 0, stream>>>(dx, partial, dy, dres, x, w, r, N, C, mean);
    launch_check();
    rmsnorm_dw_kernel<<<(unsigned)ceil_div(C, WARP), dim3(WARP, WARP), 0, stream>>>(dw, partial, (int)blocks, C);
    launch_check();
}
#endif
