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
Tried           dev/cuda/rmsnorm_forward.cu, rmsnorm_backward.cu and residual_…: what lost, and by how much
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
// A thread takes a few packs of 16 bytes of a row, blockDim.x packs apart.

// 16 bytes from global to shared memory
__device__ __forceinline__ void rmsnorm_copy(void* shared, const void* global) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// ends a group of copies
__device__ __forceinline__ void rmsnorm_copies_end(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }

// until all groups of this thread but the last LEFT have arrived
template <int LEFT>
__device__ __forceinline__ void rmsnorm_copies_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// lets a kernel have so many bytes of shared memory in a block; whether the GPU has them
template <typename Kernel>
static inline bool rmsnorm_shared(Kernel kernel, int64_t bytes) {
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

// packs of a row for each of 512 threads or fewer: 2, 4, … most; 0 when that is too few
static inline int rmsnorm_packs(int C, int most) {
    int packs = 2;
    while (packs <= most && rmsnorm_threads(C, packs) > 512) packs *= 2;
    return packs <= most ? packs : 0;
}

// Hides from the compiler what packs are, at an instruction for two numbers: else it keeps, in bf16, the floats it made of
// them beside them, across a barrier or before a loop, in three times the registers
template <int PACKS>
__device__ __forceinline__ void rmsnorm_forget(PackX (&x)[PACKS]) {
    const unsigned zero = gridDim.z - 1; // no grid here has three dimensions, which the compiler does not know
#pragma unroll
    for (int k = 0; k < (sizeof(floatX) == 2 ? PACKS : 0); k++) {
        uint4 bits;
        memcpy(&bits, &x[k], 16);
        bits.x ^= zero, bits.y ^= zero, bits.z ^= zero, bits.w ^= zero;
        memcpy(&x[k], &bits, 16);
    }
}

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

// RESIDUAL: sum = a + b, and x is the sum; else x is a. A block to a row, whose loads are all under way at once, and which waits
// in registers. EARLY: w beside it; asked for after the sum, it is one more wait before anything goes out, which only the many
// small blocks of short rows hide from each other. WARPS: a row is a warp's, threadIdx.y one of those of the block. mean: 1 / C.
// sum may be a
template <bool RESIDUAL, int PACKS, bool EARLY, bool WARPS>
static __global__ void __launch_bounds__(512)
    rmsnorm_forward_kernel(floatX* sum, floatX* y, float* r, const floatX* a, const floatX* b, const floatX* w, int N,
                           int C, float mean, float eps) {
    const int n = WARPS ? blockIdx.x * blockDim.y + threadIdx.y : blockIdx.x;
    const int first = threadIdx.x * PACK, step = blockDim.x * PACK;
    const size_t row = (size_t)n * C;
    PackX x[PACKS] = {}, add[PACKS], weight[PACKS] = {};
    float squares = 0;
    if (WARPS && n >= N) return;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = first + k * step;
        if (c >= C) continue;
        x[k] = pack_load(a + row + c);
        if (RESIDUAL) add[k] = pack_load(b + row + c);
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if (EARLY && first + k * step < C) weight[k] = pack_load(w + first + k * step);
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = first + k * step;
        if (RESIDUAL && c < C) {
            x[k] = rmsnorm_add(x[k], add[k]);
            pack_store(sum + row + c, x[k]);
        }
        squares += rmsnorm_squares(x[k]);
    }
    squares = WARPS ? warp_sum(squares) : block_sum(squares);
    const float rn = rsqrtf(squares * mean + eps);
    if (threadIdx.x == 0) r[n] = rn;
    rmsnorm_forget(x);
    if (EARLY) rmsnorm_forget(weight);
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = first + k * step;
        if (c < C) pack_store(y + row + c, rmsnorm_scale(x[k], rn, EARLY ? weight[k] : pack_load(w + c)));
    }
}

// the same for rows that the registers of no block hold: they are read twice. A block to a row
template <bool RESIDUAL>
static __global__ void __launch_bounds__(1024)
    rmsnorm_forward_long_kernel(floatX* sum, floatX* y, float* r, const floatX* a, const floatX* b,
                                const floatX* __restrict__ w, int C, float mean, float eps) {
    const int first = threadIdx.x * PACK, step = blockDim.x * PACK;
    const size_t row = (size_t)blockIdx.x * C;
    float squares = 0;
#pragma unroll 2
    for (int c = first; c < C; c += step) {
        PackX x = pack_load(a + row + c);
        if (RESIDUAL) {
            x = rmsnorm_add(x, pack_load(b + row + c));
            pack_store(sum + row + c, x);
        }
        squares += rmsnorm_squares(x);
    }
    const float rn = rsqrtf(block_sum(squares) * mean + eps);
    const floatX* x = RESIDUAL ? sum : a;
    if (threadIdx.x == 0) r[blockIdx.x] = rn;
#pragma unroll 4
    for (int c = first; c < C; c += step)
        pack_store(y + row + c, rmsnorm_scale(pack_load(x + row + c), rn, pack_load(w + c)));
}

template <bool RESIDUAL>
static inline void rmsnorm_forward_any(floatX* sum, floatX* y, float* r, const floatX* a, const floatX* b,
                                       const floatX* w, int N, int C, float eps, cudaStream_t stream) {
    rmsnorm_require(C);
    int packs = rmsnorm_packs(C, 8);
    if (packs == 2 && rmsnorm_threads(C, 4) >= 128) packs = 4; // by the clock at C 4096 and above; not tried with fewer threads
    const int threads = packs ? rmsnorm_threads(C, packs) : 1024;
    const float mean = 1.0f / C;
    const bool early = RESIDUAL || threads > 128;
    const dim3 grid((unsigned)N), block((unsigned)threads);
    if (threads == WARP)
        rmsnorm_forward_kernel<RESIDUAL, 2, true, true>
            <<<(unsigned)ceil_div(N, 4), dim3(WARP, 4), 0, stream>>>(sum, y, r, a, b, w, N, C, mean, eps);
    else if (packs == 2 && !early)
        rmsnorm_forward_kernel<RESIDUAL, 2, false, false><<<grid, block, 0, stream>>>(sum, y, r, a, b, w, N, C, mean, eps);
    else if (packs == 2)
        rmsnorm_forward_kernel<RESIDUAL, 2, true, false><<<grid, block, 0, stream>>>(sum, y, r, a, b, w, N, C, mean, eps);
    else if (packs == 4 && !early)
        rmsnorm_forward_kernel<RESIDUAL, 4, false, false><<<grid, block, 0, stream>>>(sum, y, r, a, b, w, N, C, mean, eps);
    else if (packs == 4)
        rmsnorm_forward_kernel<RESIDUAL, 4, true, false><<<grid, block, 0, stream>>>(sum, y, r, a, b, w, N, C, mean, eps);
    else if (packs == 8)
        rmsnorm_forward_kernel<RESIDUAL, 8, true, false><<<grid, block, 0, stream>>>(sum, y, r, a, b, w, N, C, mean, eps);
    else
        rmsnorm_forward_long_kernel<RESIDUAL><<<grid, block, 0, stream>>>(sum, y, r, a, b, w, C, mean, eps);
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
// time; a thread owns 16 bytes of columns, or a few times that, and keeps their sums for dw in registers. At the end each
// block stores its sums, and a second kernel adds those of all blocks, in order.
// Rows wait in a ring in shared memory, where asynchronous copies (cp.async) bring them past the registers. A thread copies to
// places of its own, which nobody else reads, so that no barrier guards them, and refills a place as soon as it has read it
// for the last time: even a single stage keeps memory busy.

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

// the packs of a row that a thread may have: beside them it has as many of w, and twice or once as many registers for dw
enum { RMSNORM_KEPT = PACK == 8 ? 4 : 8 };

// partial (grid, C): the blocks' sums for dw. mean: 1 / C. dres may be NULL; dx may be dres
template <int PACKS, int STAGES>
static __global__ void __launch_bounds__(512, 1)
    rmsnorm_backward_kernel(floatX* dx, float* partial, const floatX* dy, const floatX* dres, const floatX* x,
                            const floatX* w, const float* r, int N, int C, float mean) {
    extern __shared__ int4 rmsnorm_rows[]; // (STAGES, 3, PACKS, threads): x, dy, dres
    __shared__ float sums[2][WARP];
    const int first = threadIdx.x * PACK, step = blockDim.x * PACK, start = blockIdx.x, apart = gridDim.x;
    const int rows = (N - start + apart - 1) / apart; // of this block
    const size_t next = (size_t)apart * C;            // from one of them to the one after it
    floatX* const ring = (floatX*)rmsnorm_rows + first;

    auto place = [&](int stage, int array, int k) { return ring + ((stage * 3 + array) * PACKS + k) * step; };
    auto fetch = [&](int i, size_t from, int stage, int k) { // of row i of the block, which begins at `from`
        const size_t at = from + first + k * step;
        if (i >= rows || first + k * step >= C) return;
        rmsnorm_copy(place(stage, 0, k), x + at);
        rmsnorm_copy(place(stage, 1, k), dy + at);
        if (dres) rmsnorm_copy(place(stage, 2, k), dres + at);
    };
    size_t row = (size_t)start * C;
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
#pragma unroll
        for (int k = 0; k < PACKS; k++) fetch(stage, row + stage * next, stage, k);
        rmsnorm_copies_end();
    }
    PackX weight[PACKS] = {};
    float dw[PACKS][PACK] = {}, next_r = r[start];
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if (first + k * step < C) weight[k] = pack_load(w + first + k * step);

    for (int i = 0, stage = 0; i < rows; i++, row += next, stage = stage + 1 < STAGES ? stage + 1 : 0) {
        PackX xn[PACKS] = {}, dyn[PACKS] = {};
        const float rn = next_r;
        float dot = 0;
        rmsnorm_forget(weight);
        if (i + 1 < rows) next_r = r[start + (i + 1) * apart];
        rmsnorm_copies_wait<STAGES - 1>();
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (first + k * step >= C) continue;
            xn[k] = pack_load(place(stage, 0, k)), dyn[k] = pack_load(place(stage, 1, k));
            dot += rmsnorm_dot(xn[k], dyn[k], weight[k]);
        }
        const float scale = rmsnorm_block_sum(dot, sums[i % 2]) * mean * rn * rn * rn;
        rmsnorm_forget(xn), rmsnorm_forget(dyn);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            PackX add = {};
            if (first + k * step >= C) continue;
            if (PACKS > 2)
                xn[k] = pack_load(place(stage, 0, k)), dyn[k] = pack_load(place(stage, 1, k)); // too many to keep
            if (dres) add = pack_load(place(stage, 2, k));
            pack_store(dx + row + first + k * step, rmsnorm_dx(dw[k], xn[k], dyn[k], add, weight[k], rn, scale));
            fetch(i + STAGES, row + STAGES * next, stage, k);
        }
        rmsnorm_copies_end();
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        float* const sum = partial + (size_t)blockIdx.x * C + first + k * step;
        if (first + k * step >= C) continue;
        for (int j = 0; j < PACK; j += 4)
            pack_store(sum + j, Pack<float>{ dw[k][j], dw[k][j + 1], dw[k][j + 2], dw[k][j + 3] });
    }
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

// dw += 32 columns, from `first` on, of partial (blocks, C), once all warps of the block have added up; the order depends on
// their number alone. Each lane has 8 numbers under way at once
__device__ __forceinline__ void rmsnorm_add_sums(floatX* dw, const float* partial, int blocks, int C, int first) {
    __shared__ float sums[WARP][WARP + 1];
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / WARP;
    const int warp = thread / WARP, lane = thread % WARP, c = first + lane;
    float sum = 0;
    for (int b = warp; b < blocks; b += 8 * warps) {
        float part[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            part[i] = c < C && b + i * warps < blocks ? __ldcg(partial + (size_t)(b + i * warps) * C + c) : 0;
#pragma unroll
        for (int i = 0; i < 8; i++) sum += part[i];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    for (int column = warp; column < WARP; column += warps) {
        sum = warp_sum(lane < warps ? sums[lane][column] : 0);
        if (lane == 0 && first + column < C)
            dw[first + column] = from_float<floatX>(to_float(dw[first + column]) + sum);
    }
    __syncthreads(); // before they are written again
}

static __global__ void __launch_bounds__(1024) rmsnorm_dw_kernel(floatX* dw, const float* partial, int blocks, int C) {
    rmsnorm_add_sums(dw, partial, blocks, C, blockIdx.x * WARP);
}

// the most blocks of the backward pass: of two packs a thread, the registers of a multiprocessor hold 640 threads; of more, and
// of rows that no block holds, one block
static inline int rmsnorm_backward_blocks(int C) {
    return gpu_processors() * (rmsnorm_packs(C, RMSNORM_KEPT) == 2 ? 640 / rmsnorm_threads(C, 2) : 1);
}

// bytes, to lie at a multiple of 16
static inline size_t rmsnorm_backward_scratch(int C) { return (size_t)rmsnorm_backward_blocks(C) * C * sizeof(float); }

// whether rows fit the shared memory of a block; if so, launches
template <int PACKS, int STAGES>
static inline bool rmsnorm_backward_fits(int blocks, floatX* dx, float* partial, const floatX* dy, const floatX* dres,
                                         const floatX* x, const floatX* w, const float* r, int N, int C,
                                         cudaStream_t stream) {
    auto kernel = rmsnorm_backward_kernel<PACKS, STAGES>;
    const int threads = rmsnorm_threads(C, PACKS);
    const size_t shared = (size_t)STAGES * 3 * PACKS * 16 * threads;
    if (!rmsnorm_shared(kernel, (int64_t)shared)) return false;
    kernel<<<(unsigned)blocks, (unsigned)threads, shared, stream>>>(dx, partial, dy, dres, x, w, r, N, C, 1.0f / C);
    return true;
}

// overwrites dx (N, C) with dres + the gradient through the norm; dres (N, C) may be NULL, and may be dx. Adds to dw (C)
static inline void rmsnorm_backward(floatX* dx, floatX* dw, const floatX* dy, const floatX* dres, const floatX* x,
                                    const floatX* w, const float* r, int N, int C, void* scratch, cudaStream_t stream) {
    GpuOp op("rmsnorm_backward", (dres ? 4.0 : 3.0) * N * C * sizeof(floatX), 0, stream);
    rmsnorm_require(C);
    float* partial = (float*)scratch;
    // at least 8 rows to a block, or its sums would be much to move beside its rows
    const int blocks = (int)min(ceil_div(N, 8), (int64_t)rmsnorm_backward_blocks(C));
    const int packs = rmsnorm_packs(C, RMSNORM_KEPT);
    bool fits = false;
    if (packs == 2) fits = rmsnorm_backward_fits<2, 3>(blocks, dx, partial, dy, dres, x, w, r, N, C, stream);
    if (packs == 4)
        fits = rmsnorm_backward_fits<4, 2>(blocks, dx, partial, dy, dres, x, w, r, N, C, stream) ||
               rmsnorm_backward_fits<4, 1>(blocks, dx, partial, dy, dres, x, w, r, N, C, stream);
    if (packs == 8) fits = rmsnorm_backward_fits<RMSNORM_KEPT, 1>(blocks, dx, partial, dy, dres, x, w, r, N, C, stream);
    if (!fits)
        rmsnorm_backward_long_kernel<<<(unsigned)blocks, 1024, 0, stream>>>(dx, partial, dy, dres, x, w, r, N, C,
                                                                            1.0f / C);
    launch_check();
    rmsnorm_dw_kernel<<<(unsigned)ceil_div(C, WARP), 1024, 0, stream>>>(dw, partial, blocks, C);
    launch_check();
}
#endif
