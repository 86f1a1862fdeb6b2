/*
Cross-entropy: softmax over the vocabulary, the loss of the right token, and the gradient, in one pass over the logits; and
the same fused with the product that makes the logits.

    forward     loss[n]   = log(sum over v of e^l[n, v]) - l[n, label[n]]           l: logits
    backward    dl[n, v]  = scale * (e^l[n, v] / sum - [v = label[n]])
    lm_head     l = x · w^T,  dx = dl · w,  dw += dl^T · x

A label of -100 is ignored: its loss is 0, its gradient a row of zeros. scale is 1 / (valid labels of the whole step).

Shapes          logits (N, V) of row stride ld    losses labels (N), labels below V    x dx (N, C)    w dw (V, C)
Numerics        the largest logit is taken off before exp; sums in double, or a sure token's loss, log of a sum just above
                1, would lose its digits; the loss in double until it is stored. A NaN logit gives a NaN loss
                On the GPU: sums in fp32, powers by the ex2 instruction (relative error 2^-22, results below 2^-126 become 0);
                the gradient is rounded once, after 1 was taken off at the label
Bound by        the logits, alone: three passes over N*V numbers. With the product: 6*N*V*C FLOPs, beside which they vanish.
                On the GPU one pass: each logit is read once and written once, 4*N*V bytes in bf16. A row waits for its sum in
                the registers of one block or, when it is longer, in a ring in shared memory (cross_entropy_ring.cuh)
Memory          lm_head_loss_cpu works on a chunk of rows, so that the logits of all rows never exist at once. Each chunk
                reads w and reads and writes dw in full, which 128 rows or more pay for: 256 FLOPs per number of dw. 16M
                numbers (64 MiB) are as many rows for every V up to 128K. The chunk depends on V alone, and so do the bits. On
                the GPU the chunk is the caller's: rows * lm_head_stride(V) logits
Proved by       dev/test/test_ops.c (finite differences, ignored labels, several chunks), test_ops_float.c (same bits for
                any threads; one huge logit), dev/test/gpu/test_cross_entropy.cuh, dev/test/gpu/test_lm_head.cuh
Source          Milakov and Gimelshein 2018; fused in chunks as in Hsu et al. 2024, "Liger Kernel"
*/
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "dtype.h"
#include "error.h"
#include "exp.h"
#include "matmul.h"
#include "softmax.h"

// ---- CPU reference ---------------------------------------------------------------------------

// the sum of e^(x - max), in runs; with store, x becomes those powers
static inline double cross_entropy_sum(float* x, float max, int V, bool store) {
    double sum = 0;
    if (store) {
#pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) {
            x[v] = exp32(x[v] - max);
            sum += (double)x[v];
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += (double)exp32(x[v] - max);
    }
    return sum;
}

// overwrites losses (N) and, with backward, logits by their gradient times scale
static inline void cross_entropy_cpu(float* losses, float* logits, const int32_t* labels, float scale, bool backward,
                                     int N, int V, int ld) {
#pragma omp parallel for if ((size_t)N * V > 4096)
    for (int n = 0; n < N; n++) {
        float* x = logits + (size_t)n * ld;
        int32_t label = labels[n];
        if (label == IGNORED_LABEL) {
            losses[n] = 0;
            if (backward) memset(x, 0, sizeof(float) * V);
            continue;
        }
        require(label >= 0 && label < V, "labels are checked before they reach the loss");
        float right = x[label], max = softmax_max(x, V, -INFINITY);
        double sum = cross_entropy_sum(x, max, V, backward);
        losses[n] = (float)(log(sum) + (double)max - (double)right);
        if (!backward) continue;
        float factor = (float)(scale / sum);
#pragma omp simd
        for (int v = 0; v < V; v++) x[v] *= factor;
        x[label] -= scale;
    }
}

static inline int lm_head_rows(int V) {
    const int most = 1024, least = 64, numbers = 1 << 24;
    int rows = numbers / V / least * least;
    return rows < least ? least : rows < most ? rows : most;
}

// numbers of scratch that lm_head_loss_cpu needs
static inline size_t lm_head_scratch(int V) { return (size_t)lm_head_rows(V) * ((size_t)V + 1); }

// returns the sum of the losses of the valid labels; overwrites dx with its gradient times scale, adds to dw the same. Both may
// be NULL: then the loss alone is computed, from a w of any dtype
static inline double lm_head_loss_cpu(float* dx, float* dw, const float* x, Tensor w, const int32_t* labels,
                                      float scale, int N, int C, int V, float* scratch) {
    const int chunk = lm_head_rows(V);
    const bool backward = dx || dw;
    float *losses = scratch, *logits = scratch + chunk;
    double total = 0;
    for (int start = 0; start < N; start += chunk) {
        const int rows = N - start < chunk ? N - start : chunk;
        const float* xs = x + (size_t)start * C;
        matmul_forward_cpu(logits, V, xs, w, rows, C, V);
        cross_entropy_cpu(losses, logits, labels + start, scale, backward, rows, V, V);
        if (backward) matmul_backward_cpu(dx ? dx + (size_t)start * C : NULL, false, dw, logits, xs, w, rows, C, V);
        for (int n = 0; n < rows; n++) total += losses[n];
    }
    return total;
}

// ---- GPU -------------------------------------------------------------------------------------

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <float.h>

#include "gpu.cuh"

// of some logits: the largest, and the sum of e^(x - top). Of none: { -FLT_MAX, 0 }
struct CrossEntropySum {
    float top, sum;
};

// e^x, by the instruction for 2^x
__device__ __forceinline__ float cross_entropy_power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f)); // log2 e
    return y;
}

// the logits of pack p of a row; columns beyond V become so low that they count for nothing. A kept pack stays 16 bytes: taken
// apart, it would fill twice the registers
__device__ __forceinline__ void cross_entropy_unpack(float* x, int4 bits, int p, int V) {
    PackX pack;
    memcpy(&pack, &bits, 16);
    for (int k = 0; k < PACK; k++) x[k] = pack.get(k);
    const int valid = V - p * PACK;
    if (valid < PACK)
        for (int k = 0; k < PACK; k++) x[k] = k < valid ? x[k] : -3.3e38f;
}

// adds some logits: the old sum is scaled to the new top, once for all of them
template <int COUNT>
__device__ __forceinline__ void cross_entropy_add(CrossEntropySum& s, const float* x) {
    float top = s.top;
    for (int k = 0; k < COUNT; k++) top = fmaxf(top, x[k]);
    s.sum *= cross_entropy_power(s.top - top);
    for (int k = 0; k < COUNT; k++) s.sum += cross_entropy_power(x[k] - top);
    s.top = top;
}

// the sum over the lanes of a warp, the same in all of them
__device__ __forceinline__ CrossEntropySum cross_entropy_warp(CrossEntropySum s) {
    float top = warp_max(s.top);
    return CrossEntropySum{ top, warp_sum(s.sum * cross_entropy_power(s.top - top)) };
}

// the gradient of pack p, which replaces it: factor is scale / sum
__device__ __forceinline__ void cross_entropy_store(floatX* row, const float* x, float top, float factor, float scale,
                                                    int p, int label) {
    float d[PACK];
    PackX dx;
    for (int k = 0; k < PACK; k++) d[k] = factor * cross_entropy_power(x[k] - top);
    if (p == label / PACK)
        for (int k = 0; k < PACK; k++) d[k] -= k == label % PACK ? scale : 0;
    for (int k = 0; k < PACK; k++) dx.set(k, d[k]);
    pack_store_once(row + (size_t)p * PACK, dx);
}

#include "cross_entropy_ring.cuh"

// clang-format off
enum {
    CROSS_ENTROPY_THREADS = 512,       // of a block, at most
    CROSS_ENTROPY_HELD = 8,            // packs that a thread keeps: 32 registers
    CROSS_ENTROPY_BLOCKS = 8,          // that may share a row
    CROSS_ENTROPY_PLAIN_THREADS = 1024,
};
// clang-format on

// the blocks that share a row: a cluster, whose shared memory all of them see. Before Hopper a row has one block
struct CrossEntropyRow {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::cluster_group blocks = cooperative_groups::this_cluster();
    __device__ int count() { return (int)blocks.num_blocks(); }
    __device__ int rank() { return (int)blocks.block_rank(); }
    __device__ CrossEntropySum* shared_of(CrossEntropySum* own, int block) {
        return blocks.map_shared_rank(own, block);
    }
    __device__ void arrive() { cooperative_groups::cluster_group::barrier_arrive(); }
    __device__ void leave() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); } // after reads
    __device__ void wait() { cooperative_groups::cluster_group::barrier_wait(); }
#else
    __device__ int count() { return 1; }
    __device__ int rank() { return 0; }
    __device__ CrossEntropySum* shared_of(CrossEntropySum* own, int) { return own; }
    __device__ void arrive() {}
    __device__ void leave() {}
    __device__ void wait() { __syncthreads(); }
#endif
};

// One row of logits lives in the registers of 1 to 8 blocks from its load to its store, so that memory sees it twice: a row
// of 128256 bf16 is 256 KB, the registers of four blocks of 512 threads with 8 packs each, two of which fit on a processor:
// one of them loads while the other computes. Each warp's sum goes to shared memory; after one barrier of all blocks of the
// row every warp adds all sums up in the same order. Grid: N rows of `count` blocks
static __global__ void __launch_bounds__(CROSS_ENTROPY_THREADS, 2)
    cross_entropy_kernel(float* losses, floatX* logits, const int32_t* labels, float scale, bool backward, int V,
                         int ld) {
    __shared__ CrossEntropySum warp_sums[CROSS_ENTROPY_THREADS / WARP];
    CrossEntropyRow blocks;
    const int count = blocks.count(), rank = blocks.rank(), warps = blockDim.x / WARP;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int n = blockIdx.x / count, packs = (V + PACK - 1) / PACK;
    const int first = rank * blockDim.x + threadIdx.x, stride = count * blockDim.x;
    const int label = labels[n];
    floatX* x = logits + (size_t)n * ld;
    int4 held[CROSS_ENTROPY_HELD] = {};
#pragma unroll
    for (int i = 0; i < CROSS_ENTROPY_HELD; i++) // under way before the label is known
        if (first + i * stride < packs) held[i] = __ldcs((const int4*)x + first + i * stride);
    if (label == IGNORED_LABEL) {
        if (first == 0) losses[n] = 0;
        for (int p = first; p < packs && backward; p += stride) pack_store_once(x + (size_t)p * PACK, PackX{});
        return;
    }
    float right = first == 0 ? to_float(x[label]) : 0; // before the barrier, hence before anyone overwrites it

    CrossEntropySum s = { -FLT_MAX, 0 };
#pragma unroll
    for (int i = 0; i < CROSS_ENTROPY_HELD; i += 2) {
        if (i * stride >= packs) continue;
        float v[2 * PACK];
        cross_entropy_unpack(v, held[i], first + i * stride, V);
        cross_entropy_unpack(v + PACK, held[i + 1], first + (i + 1) * stride, V);
        cross_entropy_add<2 * PACK>(s, v);
    }
    s = cross_entropy_warp(s);
    if (lane == 0) warp_sums[warp] = s;
    blocks.arrive();
    blocks.wait();

    s = { -FLT_MAX, 0 };
    for (int i = lane; i < count * warps; i += WARP) {
        CrossEntropySum other = blocks.shared_of(warp_sums, i / warps)[i % warps];
        float top = fmaxf(s.top, other.top);
        s.sum = s.sum * cross_entropy_power(s.top - top) + other.sum * cross_entropy_power(other.top - top);
        s.top = top;
    }
    s = cross_entropy_warp(s);
    blocks.leave(); // nobody ends while another reads its sums
    if (first == 0) losses[n] = logf(s.sum) + (s.top - right);
    const float factor = scale / s.sum;
    // what the compiler has unpacked and addressed above it would keep, in more registers than there are: it must forget
    asm volatile("" : "+l"(x));
#pragma unroll
    for (int i = 0; i < CROSS_ENTROPY_HELD; i++) {
        const int p = first + i * stride;
        float v[PACK];
        if (!backward || p >= packs) continue;
        asm volatile("" : "+r"(held[i].x), "+r"(held[i].y), "+r"(held[i].z), "+r"(held[i].w));
        cross_entropy_unpack(v, held[i], p, V);
        cross_entropy_store(x, v, s.top, factor, scale, p, label);
    }
    blocks.wait();
}

// Any V on any GPU: a block reads its row twice, the second time mostly from the L2 cache. Grid: N
static __global__ void __launch_bounds__(CROSS_ENTROPY_PLAIN_THREADS)
    cross_entropy_plain_kernel(float* losses, floatX* logits, const int32_t* labels, float scale, bool backward, int V,
                               int ld) {
    __shared__ CrossEntropySum warp_sums[CROSS_ENTROPY_PLAIN_THREADS / WARP];
    const int packs = (V + PACK - 1) / PACK, label = labels[blockIdx.x];
    floatX* x = logits + (size_t)blockIdx.x * ld;
    if (label == IGNORED_LABEL) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        for (int p = threadIdx.x; p < packs && backward; p += blockDim.x)
            pack_store_once(x + (size_t)p * PACK, PackX{});
        return;
    }
    float right = threadIdx.x == 0 ? to_float(x[label]) : 0; // before the barrier, hence before anyone overwrites it
    CrossEntropySum s = { -FLT_MAX, 0 };
#pragma unroll 4
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        float v[PACK];
        cross_entropy_unpack(v, ((const int4*)x)[p], p, V);
        cross_entropy_add<PACK>(s, v);
    }
    s = cross_entropy_warp(s);
    if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = s;
    __syncthreads();
    s = cross_entropy_warp(warp_sums[threadIdx.x % WARP]);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(s.sum) + (s.top - right);
    const float factor = scale / s.sum;
#pragma unroll 4
    for (int p = threadIdx.x; p < packs && backward; p += blockDim.x) {
        float v[PACK];
        cross_entropy_unpack(v, __ldcs((const int4*)x + p), p, V);
        cross_entropy_store(x, v, s.top, factor, scale, p, label);
    }
}

// how many blocks may share a row: clusters need Hopper, and code that was compiled for it
static inline int cross_entropy_most_blocks(void) {
    static int most = 0;
    cudaFuncAttributes kernel;
    if (!most) {
        cuda_check(cudaFuncGetAttributes(&kernel, cross_entropy_kernel));
        most = kernel.ptxVersion >= 90 ? CROSS_ENTROPY_BLOCKS : 1;
    }
    return most;
}

// how many blocks keep a row of V numbers in their registers; 0: no cluster does
static inline int cross_entropy_blocks(int V) {
    const int packs = (int)ceil_div(V, PACK), most = cross_entropy_most_blocks();
    int blocks = 1;
    while (blocks < most && blocks * CROSS_ENTROPY_THREADS * CROSS_ENTROPY_HELD < packs) blocks *= 2;
    return blocks * CROSS_ENTROPY_THREADS * CROSS_ENTROPY_HELD < packs ? 0 : blocks;
}

// as cross_entropy, of rows that `blocks` blocks keep in their registers
static inline void cross_entropy_registers(float* losses, floatX* logits, const int32_t* labels, float scale,
                                           bool backward, int N, int V, int ld, int blocks, cudaStream_t stream) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = (unsigned)blocks, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)N * (unsigned)blocks);
    config.blockDim = dim3((unsigned)(ceil_div(ceil_div(V, PACK), blocks * CROSS_ENTROPY_HELD * WARP) * WARP));
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = blocks > 1;
    cuda_check(cudaLaunchKernelEx(&config, cross_entropy_kernel, losses, logits, labels, scale, backward, V, ld));
    launch_check();
}

// overwrites losses (N) and, with backward, logits by their gradient times scale; columns from V to the next multiple of 8
// become zero then. scale is not negative: the ring takes its logarithm. By the clock: rows that one block keeps in registers
// are its own, longer ones the ring's
static inline void cross_entropy(float* losses, floatX* logits, const int32_t* labels, float scale, bool backward,
                                 int N, int V, int ld, cudaStream_t stream) {
    GpuOp op("cross_entropy", (backward ? 2.0 : 1.0) * N * V * sizeof(floatX), 0, stream);
    launch_require(ld % PACK == 0 && ld >= V && V > 0 && N > 0, "cross_entropy",
                   "V fits the row stride, a multiple of 8");
    launch_require(scale >= 0, "cross_entropy", "scale is not negative");
    const int blocks = cross_entropy_blocks(V);
    if (blocks != 1 && cross_entropy_ring_takes(V, CROSS_ENTROPY_RING_PART)) {
        cross_entropy_ring<512, 1, false>(losses, logits, labels, scale, backward, N, V, ld, CROSS_ENTROPY_RING_PART,
                                          stream);
    } else if (blocks) {
        cross_entropy_registers(losses, logits, labels, scale, backward, N, V, ld, blocks, stream);
    } else {
        cross_entropy_plain_kernel<<<(unsigned)N, CROSS_ENTROPY_PLAIN_THREADS, 0, stream>>>(losses, logits, labels,
                                                                                            scale, backward, V, ld);
        launch_check();
    }
}

// ---- GPU: with the product that makes the logits ---------------------------------------------

// numbers from one row of logits to the next
static inline int lm_head_stride(int V) { return (int)ceil_div(V, 64) * 64; }

// dw += dw32, rounded once. Each thread one pack of dw
static __global__ void lm_head_add_kernel(floatX* dw, const float* dw32, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    PackX sum = pack_load(dw + i);
    for (int k = 0; k < PACK; k += 4) {
        Pack<float> more = pack_load_once(dw32 + i + k);
        for (int j = 0; j < 4; j++) sum.set(k + j, sum.get(k + j) + more.get(j));
    }
    pack_store(dw + i, sum);
}

static inline void lm_head_add(floatX* dw, const float* dw32, size_t n, cudaStream_t stream) {
    GpuOp op("lm_head_add", (double)n * (2 * sizeof(floatX) + sizeof(float)), 0, stream);
    lm_head_add_kernel<<<(unsigned)ceil_div((int64_t)n, 256 * PACK), 256, 0, stream>>>(dw, dw32, n);
    launch_check();
}

// Overwrites losses (N). With dx, overwrites dx (N, C) with its gradient times scale and adds to dw (V, C) the same; dx may be
// x. The rest is scratch: logits for `rows` rows, lm_head_stride(V) numbers each, and dw32 (V, C), in which the chunks' parts
// of dw are summed in fp32. Without it (NULL) they are added to dw one by one, and dw is rounded each time
static inline void lm_head_loss(float* losses, floatX* dx, floatX* dw, const floatX* x, const floatX* w,
                                const int32_t* labels, float scale, int N, int C, int V, int rows, floatX* logits,
                                float* dw32, cudaStream_t stream) {
    NvtxRange range("lm_head_loss");
    launch_require(rows > 0 && !dx == !dw, "lm_head_loss", "there are rows in a chunk, and dx and dw come together");
    const int ld = lm_head_stride(V);
    for (int start = 0; start < N; start += rows) {
        const int chunk = N - start < rows ? N - start : rows;
        const floatX* xs = x + (size_t)start * C;
        matmul_forward(logits, ld, xs, w, chunk, C, V, stream);
        cross_entropy(losses + start, logits, labels + start, scale, dx != NULL, chunk, V, ld, stream);
        if (!dx) continue;
        if (dw32)
            matmul_dw_fp32(dw32, logits, ld, xs, chunk, C, V, start > 0, stream);
        else
            matmul_dw_strided(dw, logits, ld, xs, chunk, C, V, true, stream);
        matmul_dx_strided(dx + (size_t)start * C, logits, ld, w, chunk, C, V, false, stream);
    }
    if (dx && dw32) lm_head_add(dw, dw32, (size_t)V * C, stream);
}
#endif
