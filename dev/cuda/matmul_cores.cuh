/*
The product y = a · b^T on the CUDA cores, for floatX: the first rungs of matmul.cu (bf16) and all of matmul_fp32.cu.

    y[m][n] = sum over k of a[m][k] * b[n][k]       a (M, K)    b (N, K)    y (M, N)

Both factors run along k, as in x · w^T of a linear layer. What limits each rung is how often a number is fetched for one
multiply-add, first from L2, then from shared memory:

    of one multiply-add, numbers read from      L1 or L2        shared memory
    one thread, or one warp, an output             2                 0
    tiles of 32 x 32 outputs                      1/16               2
    128 x 128 outputs, 8 x 8 in a thread          1/64              1/4

A multiprocessor multiplies 128 pairs of floats a cycle and reads 128 bytes of shared memory a cycle: 32 numbers, fewer when
lanes hit the same bank. Sums are in fp32; the order of a sum depends on the shape alone.

The figures at each rung: fp32, 4096 x 4096 x 4096 on an H200, and the ratio to cublasSgemm in the same run (50.8 TFLOP/s).
*/
#pragma once

#include "bench.cuh"
#include "llmc/matmul.h"

struct Product {
    int M, N, K;
    floatX *a, *b, *y;
};

// ---- the problem -----------------------------------------------------------------------------
// In the legend's letters, as matmul.h has them: N rows (M here), C summed (K), F outputs (N).

static Product product_setup(Bench* bench, const Shape* s) {
    Product p = { s->N, s->F, s->C, NULL, NULL, NULL };
    p.a = bench->input<floatX>("a", (size_t)p.M * p.K);
    p.b = bench->input<floatX>("b", (size_t)p.N * p.K, 1 / sqrtf((float)p.K)); // so that y is about 1
    p.y = bench->output<floatX>("y", (size_t)p.M * p.N, p.K);
    return p;
}

static void product_reference(Bench* bench, const Product* p, int64_t first, int64_t count) {
    Tensor b = { (void*)bench->host(p->b), DTYPE_F32 };
    float* y = (float*)allocate((size_t)count * (size_t)p->N, sizeof *y);
    const float* a = bench->host(p->a, (size_t)(first * p->K), (size_t)(count * p->K));
    matmul_forward_cpu(y, p->N, a, b, (int)count, p->K, p->N);
    bench->expect(p->y, (size_t)(first * p->N), y, (size_t)(count * p->N));
    free(y);
}

static double product_flops(const Product* p) { return 2.0 * p->M * p->N * p->K; }

// the slow rungs: not where they would take more than 0.3 s at so many TFLOP/s
static const char* product_slow(const Product* p, double tflops) {
    return product_flops(p) > 0.3e12 * tflops ? "would take more than 0.3 s" : NULL;
}
template <typename P>
static const char* refuses_half_tflops(const P* p) {
    return product_slow(p, 0.3);
}
template <typename P>
static const char* refuses_one_tflops(const P* p) {
    return product_slow(p, 1.2);
}
template <typename P>
static const char* refuses_five_tflops(const P* p) {
    return product_slow(p, 5);
}

// ---- naive -----------------------------------------------------------------------------------
// idea     one thread an output: the CPU's loop without the two outer ones. 0.5 TFLOP/s (at 1024 cubed, 0.02 there)
// limit    the lanes of a warp have 32 rows of a: each load fetches 32 sectors to use 2 or 4 bytes of each, and the caches
//          have to keep the rest until the next k

static __global__ void naive_kernel(floatX* y, const floatX* a, const floatX* b, int M, int N, int K) {
    int m = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y * blockDim.y + threadIdx.y;
    if (m >= M || n >= N) return;
    float sum = 0;
    for (int k = 0; k < K; k++) sum += to_float(a[(size_t)m * K + k]) * to_float(b[(size_t)n * K + k]);
    y[(size_t)m * N + n] = from_float<floatX>(sum);
}

template <typename P>
static void naive(const P* p, int block, cudaStream_t stream) {
    dim3 threads(WARP, (unsigned)(block / WARP)),
        grid((unsigned)ceil_div(p->M, threads.x), (unsigned)ceil_div(p->N, threads.y));
    naive_kernel<<<grid, threads, 0, stream>>>(p->y, p->a, p->b, p->M, p->N, p->K);
    launch_check();
}

// ---- coalesced -------------------------------------------------------------------------------
// idea     one warp an output, its lanes side by side along k: every sector fetched is used whole, at once. 6.6 TFLOP/s, 0.13
// limit    nothing that is fetched serves a second output of the warp: 2 numbers from L1 or L2 for each multiply-add

static __global__ void coalesced_kernel(floatX* y, const floatX* a, const floatX* b, int M, int N, int K) {
    int m = blockIdx.x, n = blockIdx.y * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    float sum = 0;
    for (int k = lane; k < K; k += WARP) sum += to_float(a[(size_t)m * K + k]) * to_float(b[(size_t)n * K + k]);
    sum = warp_sum(sum);
    if (lane == 0) y[(size_t)m * N + n] = from_float<floatX>(sum);
}

template <typename P>
static void coalesced(const P* p, int block, cudaStream_t stream) {
    dim3 grid((unsigned)p->M, (unsigned)ceil_div(p->N, block / WARP));
    coalesced_kernel<<<grid, (unsigned)block, 0, stream>>>(p->y, p->a, p->b, p->M, p->N, p->K);
    launch_check();
}

// ---- shared_tile -----------------------------------------------------------------------------
// idea     a block computes 32 x 32 outputs from tiles of 32 x 32 numbers in shared memory: each number fetched serves 32
//          outputs. Rows of 33 floats, so that 32 lanes on 32 rows meet 32 banks. 6.9 TFLOP/s, 0.14
// limit    2 reads of shared memory for one multiply-add: a multiprocessor can feed 16 to 32 lanes a cycle of its 128

enum { SQUARE = 32 };

static __global__ void __launch_bounds__(SQUARE* SQUARE)
    shared_tile_kernel(floatX* y, const floatX* a, const floatX* b, int M, int N, int K) {
    __shared__ float as[SQUARE][SQUARE + 1], bs[SQUARE][SQUARE + 1];
    int tx = threadIdx.x, ty = threadIdx.y, m = blockIdx.y * SQUARE + ty, n = blockIdx.x * SQUARE + tx;
    int row = blockIdx.x * SQUARE + ty; // of b, that this thread fetches
    float sum = 0;
    for (int k0 = 0; k0 < K; k0 += SQUARE) {
        int k = k0 + tx;
        as[ty][tx] = m < M && k < K ? to_float(a[(size_t)m * K + k]) : 0;
        bs[ty][tx] = row < N && k < K ? to_float(b[(size_t)row * K + k]) : 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SQUARE; i++) sum += as[ty][i] * bs[tx][i];
        __syncthreads();
    }
    if (m < M && n < N) y[(size_t)m * N + n] = from_float<floatX>(sum);
}

template <typename P>
static void shared_tile(const P* p, int, cudaStream_t stream) {
    dim3 grid((unsigned)ceil_div(p->N, SQUARE), (unsigned)ceil_div(p->M, SQUARE));
    shared_tile_kernel<<<grid, dim3(SQUARE, SQUARE), 0, stream>>>(p->y, p->a, p->b, p->M, p->N, p->K);
    launch_check();
}

// ---- register_tile ---------------------------------------------------------------------------
// idea     a block computes 128 x 128 outputs, each of its 256 threads 8 x 8 of them in registers: 16 reads of shared memory
//          for 64 multiply-adds. Tiles lie k by k, so that a warp's reads are neighbours or one broadcast.
//          23.3 TFLOP/s, 0.46
// limit    instructions: numbers come one by one, 16 loads for 64 multiply-adds, and as many again to fill the tiles

enum {
    CORE_TILE = 128, // rows of a and of b of a block
    CORE_K = 16,     // numbers of each of them at a time
    CORE_THREADS = 256,
    CORE_EDGE = 8, // outputs of a thread, in each direction
};

static __global__ void __launch_bounds__(CORE_THREADS, 2)
    register_tile_kernel(floatX* y, const floatX* a, const floatX* b, int M, int N, int K) {
    enum { PITCH = CORE_TILE + 2, STEP = CORE_TILE / CORE_EDGE }; // PITCH: lanes on 16 k of 2 rows meet 32 banks
    __shared__ float as[CORE_K][PITCH], bs[CORE_K][PITCH];
    int tx = threadIdx.x % STEP, ty = threadIdx.x / STEP;
    int m0 = blockIdx.y * CORE_TILE, n0 = blockIdx.x * CORE_TILE;
    float sum[CORE_EDGE][CORE_EDGE] = {};
    for (int k0 = 0; k0 < K; k0 += CORE_K) {
        int k = k0 + tx;
#pragma unroll
        for (int i = ty; i < CORE_TILE; i += STEP) {
            as[tx][i] = m0 + i < M && k < K ? to_float(a[(size_t)(m0 + i) * K + k]) : 0;
            bs[tx][i] = n0 + i < N && k < K ? to_float(b[(size_t)(n0 + i) * K + k]) : 0;
        }
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < CORE_K; kk++) {
            float av[CORE_EDGE], bv[CORE_EDGE];
#pragma unroll
            for (int i = 0; i < CORE_EDGE; i++) av[i] = as[kk][ty + STEP * i], bv[i] = bs[kk][tx + STEP * i];
#pragma unroll
            for (int i = 0; i < CORE_EDGE; i++)
#pragma unroll
                for (int j = 0; j < CORE_EDGE; j++) sum[i][j] += av[i] * bv[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < CORE_EDGE; i++)
#pragma unroll
        for (int j = 0; j < CORE_EDGE; j++) {
            int m = m0 + ty + STEP * i, n = n0 + tx + STEP * j;
            if (m < M && n < N) y[(size_t)m * N + n] = from_float<floatX>(sum[i][j]);
        }
}

typedef void (*CoreKernel)(floatX*, const floatX*, const floatX*, int, int, int);

static void core_launch(CoreKernel kernel, const Product* p, cudaStream_t stream) {
    dim3 grid((unsigned)ceil_div(p->N, CORE_TILE), (unsigned)ceil_div(p->M, CORE_TILE));
    kernel<<<grid, CORE_THREADS, 0, stream>>>(p->y, p->a, p->b, p->M, p->N, p->K);
    launch_check();
}

template <typename P>
static void register_tile(const P* p, int, cudaStream_t stream) {
    core_launch(register_tile_kernel, p, stream);
}

// ---- vectors ---------------------------------------------------------------------------------
// idea     16 bytes an instruction: from memory along k, from shared memory along the rows. A thread has 2 x 2 squares of 4 x 4
//          outputs, a warp 8 threads along n and 4 along m: its 8 vectors of b are 128 bytes in a row, one cycle. 43.4 TFLOP/s,
//          0.85
// limit    every tile is fetched, then waited for, then used: memory and multipliers take turns

enum {
    CORE_PITCH = CORE_TILE + 4,            // floats: rows of vectors
    CORE_PARTS = CORE_K / PACK,            // vectors of a row of a tile
    CORE_ROWS = CORE_THREADS / CORE_PARTS, // rows that the block fetches at a time
    CORE_SHARE = CORE_TILE / CORE_ROWS,    // vectors of a tile that a thread fetches
};

typedef float CoreTile[CORE_K][CORE_PITCH];

// where a thread's share of rows row0 … row0+127 of x (rows, K) begins. Beyond the last row it is the last one again: what comes
// of it is not stored
struct CoreSource {
    const floatX* from[CORE_SHARE];
    int left; // numbers of K from there on
    __device__ __forceinline__ CoreSource(const floatX* x, int rows, int K, int row0) {
        int k = threadIdx.x % CORE_PARTS * PACK;
#pragma unroll
        for (int i = 0; i < CORE_SHARE; i++)
            from[i] = x + (size_t)min(row0 + i * CORE_ROWS + (int)threadIdx.x / CORE_PARTS, rows - 1) * K + k;
        left = K - k;
    }
};

// the share of the next tile, 16 numbers of each row; zeros beyond K
__device__ __forceinline__ void core_fetch(PackX (&v)[CORE_SHARE], CoreSource* s) {
#pragma unroll
    for (int i = 0; i < CORE_SHARE; i++) {
        if (s->left > 0)
            v[i] = pack_load(s->from[i]);
        else
            v[i] = PackX();
        s->from[i] += CORE_K;
    }
    s->left -= CORE_K;
}

__device__ __forceinline__ void core_place(CoreTile tile, const PackX (&v)[CORE_SHARE]) {
    int k = threadIdx.x % CORE_PARTS * PACK;
#pragma unroll
    for (int i = 0; i < CORE_SHARE; i++)
#pragma unroll
        for (int j = 0; j < PACK; j++) tile[k + j][i * CORE_ROWS + threadIdx.x / CORE_PARTS] = v[i].get(j);
}

// row (or column) of a thread's outputs 0 … 3; 4 … 7 are 64 further on
__device__ __forceinline__ int core_row(void) { return threadIdx.x / 64 * 16 + threadIdx.x % WARP / 8 * 4; }
__device__ __forceinline__ int core_column(void) { return threadIdx.x / WARP % 2 * 32 + threadIdx.x % 8 * 4; }

__device__ __forceinline__ void core_multiply(float (&sum)[CORE_EDGE][CORE_EDGE], const CoreTile as,
                                              const CoreTile bs) {
    int row = core_row(), column = core_column();
#pragma unroll
    for (int k = 0; k < CORE_K; k++) {
        float4 a0 = *(const float4*)&as[k][row], a1 = *(const float4*)&as[k][row + 64];
        float4 b0 = *(const float4*)&bs[k][column], b1 = *(const float4*)&bs[k][column + 64];
        float av[CORE_EDGE] = { a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w };
        float bv[CORE_EDGE] = { b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w };
#pragma unroll
        for (int i = 0; i < CORE_EDGE; i++)
#pragma unroll
            for (int j = 0; j < CORE_EDGE; j++) sum[i][j] += av[i] * bv[j];
    }
}

struct alignas(4 * sizeof(floatX)) Four {
    floatX x[4];
};

// N is a multiple of 4: four neighbours are all inside or all outside
__device__ __forceinline__ void core_store(floatX* y, const float (&sum)[CORE_EDGE][CORE_EDGE], int M, int N) {
    int m0 = blockIdx.y * CORE_TILE + core_row(), n0 = blockIdx.x * CORE_TILE + core_column();
#pragma unroll
    for (int i = 0; i < CORE_EDGE; i++)
#pragma unroll
        for (int j = 0; j < CORE_EDGE; j += 4) {
            int m = m0 + i % 4 + i / 4 * 64, n = n0 + j / 4 * 64;
            Four v;
#pragma unroll
            for (int l = 0; l < 4; l++) v.x[l] = from_float<floatX>(sum[i][j + l]);
            if (m < M && n < N) *(Four*)(y + (size_t)m * N + n) = v;
        }
}

static __global__ void __launch_bounds__(CORE_THREADS, 2)
    vectors_kernel(floatX* y, const floatX* a, const floatX* b, int M, int N, int K) {
    __shared__ __align__(16) CoreTile as, bs;
    float sum[CORE_EDGE][CORE_EDGE] = {};
    PackX av[CORE_SHARE], bv[CORE_SHARE];
    CoreSource a_next(a, M, K, blockIdx.y * CORE_TILE), b_next(b, N, K, blockIdx.x * CORE_TILE);
    for (int k = 0; k < K; k += CORE_K) {
        core_fetch(av, &a_next), core_fetch(bv, &b_next);
        __syncthreads(); // the tile before has been used
        core_place(as, av), core_place(bs, bv);
        __syncthreads();
        core_multiply(sum, as, bs);
    }
    core_store(y, sum, M, N);
}

template <typename P>
static void vectors(const P* p, int, cudaStream_t stream) {
    core_launch(vectors_kernel, p, stream);
}

// ---- double_buffer ---------------------------------------------------------------------------
// idea     the next tile is on its way to registers while this one is multiplied, and goes to a second buffer: one barrier a
//          tile, and memory's latency is hidden behind 1024 multiply-adds a thread. 46.4 TFLOP/s, 0.91
// limit    the multipliers themselves: 64 FFMA to 4 loads. bf16 gains nothing here from being half as long but in memory

static __global__ void __launch_bounds__(CORE_THREADS, 2)
    double_buffer_kernel(floatX* y, const floatX* a, const floatX* b, int M, int N, int K) {
    __shared__ __align__(16) CoreTile as[2], bs[2];
    float sum[CORE_EDGE][CORE_EDGE] = {};
    PackX av[CORE_SHARE], bv[CORE_SHARE];
    CoreSource a_next(a, M, K, blockIdx.y * CORE_TILE), b_next(b, N, K, blockIdx.x * CORE_TILE);
    core_fetch(av, &a_next), core_fetch(bv, &b_next);
    core_place(as[0], av), core_place(bs[0], bv);
    __syncthreads();
    for (int k = 0, buffer = 0; k < K; k += CORE_K, buffer ^= 1) {
        core_fetch(av, &a_next), core_fetch(bv, &b_next); // zeros after the last
        core_multiply(sum, as[buffer], bs[buffer]);
        core_place(as[buffer ^ 1], av), core_place(bs[buffer ^ 1], bv);
        __syncthreads();
    }
    core_store(y, sum, M, N);
}

template <typename P>
static void double_buffer(const P* p, int, cudaStream_t stream) {
    core_launch(double_buffer_kernel, p, stream);
}
