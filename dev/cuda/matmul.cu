/*
The matrix product of a linear layer in bf16: how it got fast.

    y[m][n] = sum over k of a[m][k] * b[n][k]       a (M, K)    b (N, K)    y (M, N)    bf16, sums in fp32

FLOPs           2*M*N*K. At some 700 TFLOP/s, which the power limit leaves an H200 (132 multiprocessors), 8192 x 8192 x 8192 is
                1.57 ms; its factors and result are 400 MB, 0.09 ms at 4.3 TB/s: FLOPs bound it, if each number is used often
The ladder      in three parts. What a multiprocessor can do in a cycle, and what it must be fed for that:

                    CUDA cores      128 multiply-adds       floats in registers                 matmul_cores.cuh
                    mma.sync       1024 multiply-adds       registers, loaded by the warps      a warp, 16 x 8 x 16
                    wgmma          2048 multiply-adds       straight from shared memory         4 warps, 64 x 256 x 16

                Each part begins with its instruction used plainly and goes on by feeding it better
Measured        on an H200, TFLOP/s and beside it the ratio to cuBLASLt, all in one run (results/nvidia-h200/matmul.md)

                                        8192 cubed      1B qkv          2048 cubed
                    naive                                               0.5     0.00
                    coalesced                           5.5     0.01    6.6     0.01
                    shared_tile         7.0     0.01    7.3     0.01    7.1     0.01
                    register_tile       27      0.03    27      0.03    26      0.04
                    vectors             45      0.05    44      0.05    43      0.07
                    double_buffer       47      0.06    47      0.06    46      0.07
                    mma_sync            68      0.08    66      0.08    65      0.10
                    ldmatrix            247     0.30    235     0.29    222     0.35
                    cp_async            323     0.39    328     0.40    307     0.48
                    wgmma_tma           541     0.66    577     0.70    506     0.80
                    warp_specialised    644     0.78    564     0.68    513     0.81
                    grouped             665     0.81    576     0.70    525     0.82
                    multicast           669     0.81    554     0.67    498     0.78
                    persistent          694     0.84    751     0.91    609     0.96
                    staggered           732     0.89    781     0.95    593     0.93
                    cuBLASLt            825     1       825     1       637     1

                "nine": the ratio over the nine shapes that are timed, geometric mean, in an earlier run: staggered 0.945,
                persistent 0.94, grouped 0.83, warp_specialised 0.78, wgmma_tma 0.73

                staggered elsewhere, TFLOP/s and ratio: 1B o 767, 1.00; gate_up 711, 0.88; down 745, 0.97; 8B qkv
                719, 0.86; gate_up 704, 0.97; down 711, 0.98. Long shapes meet the power limit: within a run
                times of one kernel mostly spread over 2 to 10 %, and cuBLASLt's 8192 cubed was 730 to 825 in five runs, so
                that staggered was 0.89 to 0.93 of it. Only 1B qkv and o are quiet, 1 to 2 %. Differences of a few per cent
                elsewhere, and of 0.01 in "nine", are noise
Lost            over the nine: three stages with room for all outputs of a tile, 0.93, 0.93, 0.945 in groups of 4, 8, 16, a draw
                with staggered; four stages in step, in groups of 4 and 16, 0.92; 512 cycles late instead of 1024, 0.94; no
                clusters, 0.88 with four stages (its spread 22 and 26 % at two shapes), 0.92 with three
Shapes          M any, N and K multiples of 8 (16 bytes, as copies and tensor maps want them). Beyond the edges factors read as
                zero and nothing is written
ncu             8B qkv: the tensor cores work 11 % of the time under mma_sync, whose fragments keep shared memory 88 % busy, 38
                under ldmatrix, 58 under cp_async, 78 under wgmma_tma, 80 under warp_specialised, 93 under persistent and
                staggered, 98 under cuBLASLt. From memory come 3.3 GB under warp_specialised, 0.8 under grouped
                (results/nvidia-h200/matmul.md)
Look at         sm__inst_executed_pipe_tensor (is the tensor core what runs), l1tex__data_bank_conflicts_pipe_lsu (plain
                fragments), smsp__average_warps_issue_stalled_barrier (wgmma_tma), dram__bytes_read (what grouped saves),
                lts__t_sectors (what multicast saves)
*/
#undef PRECISION_FP32 // this file is about bf16 in every build; matmul_fp32.cu is about fp32

#include "matmul_cores.cuh"

#include "llmc/hopper.cuh"

struct Problem : Product {
    // for TMA: tiles of 64 numbers of K and so many rows
    CUtensorMap a_map, b_map, b_half_map; // 128, 256, 128 rows
    CUtensorMap y_map;                    // 16 rows and 64 columns of the result
};

static MatmulShape forward_shape(const Product* p) {
    return matmul_shape(MATMUL_FORWARD, false, false, p->M, p->K, p->N, p->N);
}

static Problem setup(Bench* bench, const Shape* s) {
    Problem p;
    memset((void*)&p, 0, sizeof p);
    (Product&)p = product_setup(bench, s);
    matmul_choose(forward_shape(&p), bench->stream); // cuBLASLt's candidates are timed now
    if (hopper_refuses()) return p;
    p.a_map = tma_map_rows(p.a, p.M, p.K, p.K, 128);
    p.b_map = tma_map_rows(p.b, p.N, p.K, p.K, 256);
    p.b_half_map = tma_map_rows(p.b, p.N, p.K, p.K, 128);
    p.y_map = tma_map_rows(p.y, p.M, p.N, p.N, 16);
    return p;
}

static void reference(Bench* bench, const Problem* p, int64_t first, int64_t count) {
    product_reference(bench, p, first, count);
}
static int64_t rows(const Problem* p) { return p->M; }
static double traffic(const Problem* p) {
    return 2.0 * ((double)p->M * p->K + (double)p->N * p->K + (double)p->M * p->N);
}
static double flops(const Problem* p) { return product_flops(p); }

// ---- the tensor cores of a warp: mma.sync ----------------------------------------------------
// A block computes 128 x 128 outputs with 8 warps, each 64 x 32 of them: 4 x 4 squares of m16n8k16, 64 sums a thread. Tiles are
// 128 rows of 64 bf16, 128 bytes a row, in chunks of 16 bytes. Fragments, with lane = 4*g + t, two bf16 to a register:
//
//     a   columns 2t 2t+1   2t+8 2t+9         b   column g                c   columns 2t 2t+1
//     row g       a[0]        a[2]            rows 2t   2t+1   b[0]       row g      c[0] c[1]
//     row g+8     a[1]        a[3]            rows 2t+8 2t+9   b[1]       row g+8    c[2] c[3]

enum {
    MMA_TILE = 128,
    MMA_K = 64,
    MMA_THREADS = 256,
    MMA_ROW = 2 * MMA_K,            // bytes
    MMA_BYTES = MMA_TILE * MMA_ROW, // of a tile
    MMA_SHARE = MMA_BYTES / 16 / MMA_THREADS,
};

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// where this warp's outputs begin in those of the block
__device__ __forceinline__ int mma_row(void) { return threadIdx.x / 128 * 64; }
__device__ __forceinline__ int mma_column(void) { return threadIdx.x / WARP % 4 * 32; }

typedef float MmaSums[4][4][4]; // 16 rows, 8 columns, of a square

__device__ __forceinline__ void mma_store(floatX* y, const MmaSums& sum, int M, int N) {
    int lane = threadIdx.x % WARP, m0 = blockIdx.y * MMA_TILE + mma_row() + lane / 4,
        n0 = blockIdx.x * MMA_TILE + mma_column() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int m = m0 + 16 * i + 8 * half, n = n0 + 8 * j;
                if (m < M && n < N)
                    *(uint32_t*)(y + (size_t)m * N + n) = bf16_pair(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
            }
}

// ---- mma_sync --------------------------------------------------------------------------------
// idea     the same double buffer, but the product is one instruction of a warp, 4096 FLOPs
// limit    fragments are read 4 bytes at a time, and the 8 rows of a load begin at the same bank: 8 cycles instead of 1. Shared
//          memory is busy many times longer than the tensor cores

// the fragments of columns k … k+15 of this warp's rows
__device__ __forceinline__ void fragments_plain(uint32_t (&a)[4][4], uint32_t (&b)[4][2], const unsigned char* as,
                                                const unsigned char* bs, int k) {
    int lane = threadIdx.x % WARP;
    const unsigned char *row_a = as + (mma_row() + lane / 4) * MMA_ROW + 2 * k + lane % 4 * 4,
                        *row_b = bs + (mma_column() + lane / 4) * MMA_ROW + 2 * k + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) a[i][j] = *(const uint32_t*)(row_a + (16 * i + j % 2 * 8) * MMA_ROW + j / 2 * 16);
#pragma unroll
        for (int j = 0; j < 2; j++) b[i][j] = *(const uint32_t*)(row_b + 8 * i * MMA_ROW + j * 16);
    }
}

// ---- ldmatrix --------------------------------------------------------------------------------
// idea     chunk c of row r lies at chunk c xor (r % 8), so that the 8 rows of a square lie in 8 different groups of banks, and
//          ldmatrix fetches four squares of fragments at once
// limit    each thread fetches 64 bytes of either tile into registers and stores them to shared memory again: 32 registers and
//          the instructions; and one tile ahead is not far enough for memory's latency

__device__ __forceinline__ void ldmatrix(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(address)
                 : "memory");
}

// the same from swizzled tiles. Lane l names row l % 8 of square l / 8; squares in the order of the registers: of a, rows 0 and
// 8, then the next 8 columns; of b, the columns of 8 outputs, then the next 8 outputs
__device__ __forceinline__ void fragments_swizzled(uint32_t (&a)[4][4], uint32_t (&b)[4][2], uint32_t as, uint32_t bs,
                                                   int k) {
    int lane = threadIdx.x % WARP;
    uint32_t byte_a = (uint32_t)((mma_row() + lane % 16) * MMA_ROW + 2 * k + lane / 16 * 16),
             byte_b = (uint32_t)((mma_column() + lane / 16 * 8 + lane % 8) * MMA_ROW + 2 * k + lane / 8 % 2 * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) // 16 rows further on, the same swizzle
        ldmatrix(a[i][0], a[i][1], a[i][2], a[i][3], as + hopper_swizzle(byte_a) + 16 * i * MMA_ROW);
#pragma unroll
    for (int i = 0; i < 4; i += 2)
        ldmatrix(b[i][0], b[i][1], b[i + 1][0], b[i + 1][1], bs + hopper_swizzle(byte_b) + 8 * i * MMA_ROW);
}

template <bool SWIZZLED>
__device__ __forceinline__ void mma_multiply(MmaSums& sum, const unsigned char* as, const unsigned char* bs) {
#pragma unroll
    for (int k = 0; k < MMA_K; k += 16) {
        uint32_t a[4][4], b[4][2];
        if constexpr (SWIZZLED)
            fragments_swizzled(a, b, shared_address(as), shared_address(bs), k);
        else
            fragments_plain(a, b, as, bs, k);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) mma(sum[i][j], a[i], b[j]);
    }
}

// a thread's chunks of rows row0 … of x (rows, K), columns k0 …: 8 threads a row, 32 rows at a time
__device__ __forceinline__ void mma_fetch(int4 (&v)[MMA_SHARE], const floatX* x, int rows, int K, int row0, int k0) {
    int k = k0 + threadIdx.x % 8 * 8;
#pragma unroll
    for (int i = 0; i < MMA_SHARE; i++) {
        int row = row0 + i * (MMA_THREADS / 8) + threadIdx.x / 8;
        v[i] = row < rows && k < K ? *(const int4*)(x + (size_t)row * K + k) : make_int4(0, 0, 0, 0);
    }
}

template <bool SWIZZLED>
__device__ __forceinline__ void mma_place(unsigned char* tile, const int4 (&v)[MMA_SHARE]) {
    uint32_t byte = threadIdx.x * 16; // 32 rows further on, the same swizzle
    if (SWIZZLED) byte = hopper_swizzle(byte);
#pragma unroll
    for (int i = 0; i < MMA_SHARE; i++) *(int4*)(tile + byte + i * MMA_THREADS * 16) = v[i];
}

template <bool SWIZZLED>
static __global__ void __launch_bounds__(MMA_THREADS, 1)
    mma_kernel(floatX* y, const floatX* a, const floatX* b, int M, int N, int K) {
    extern __shared__ __align__(1024) unsigned char shared[]; // two buffers of a tile of a and one of b
    MmaSums sum = {};
    int4 av[MMA_SHARE], bv[MMA_SHARE];
    int m0 = blockIdx.y * MMA_TILE, n0 = blockIdx.x * MMA_TILE;
    mma_fetch(av, a, M, K, m0, 0), mma_fetch(bv, b, N, K, n0, 0);
    mma_place<SWIZZLED>(shared, av), mma_place<SWIZZLED>(shared + MMA_BYTES, bv);
    __syncthreads();
    for (int k = 0, buffer = 0; k < K; k += MMA_K, buffer ^= 1) {
        unsigned char *now = shared + buffer * 2 * MMA_BYTES, *next = shared + (buffer ^ 1) * 2 * MMA_BYTES;
        bool more = k + MMA_K < K;
        if (more) mma_fetch(av, a, M, K, m0, k + MMA_K), mma_fetch(bv, b, N, K, n0, k + MMA_K);
        mma_multiply<SWIZZLED>(sum, now, now + MMA_BYTES);
        if (more) mma_place<SWIZZLED>(next, av), mma_place<SWIZZLED>(next + MMA_BYTES, bv);
        __syncthreads();
    }
    mma_store(y, sum, M, N);
}

static void mma_launch(CoreKernel kernel, int stages, const Problem* p, cudaStream_t stream) {
    dim3 grid((unsigned)ceil_div(p->N, MMA_TILE), (unsigned)ceil_div(p->M, MMA_TILE));
    int bytes = stages * 2 * MMA_BYTES;
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<grid, MMA_THREADS, (size_t)bytes, stream>>>(p->y, p->a, p->b, p->M, p->N, p->K);
    launch_check();
}

static void mma_sync(const Problem* p, int, cudaStream_t stream) { mma_launch(mma_kernel<false>, 2, p, stream); }
static void swizzled(const Problem* p, int, cudaStream_t stream) { mma_launch(mma_kernel<true>, 2, p, stream); }

// ---- cp_async --------------------------------------------------------------------------------
// idea     copies go from memory to shared memory past the registers, three tiles deep; the registers that this frees let a
//          second block live on the multiprocessor.
//          8192 cubed: 321 TFLOP/s, 0.41 of cuBLASLt; 0.40 to 0.48 everywhere
// limit    mma.sync itself: half the rate of wgmma, and its fragments have to pass through registers

enum { ASYNC_STAGES = 3 };

__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_tile_async(unsigned char* tile, const floatX* x, int rows, int K, int row0,
                                                int k0) {
    uint32_t to = shared_address(tile) + hopper_swizzle(threadIdx.x * 16);
    int k = k0 + threadIdx.x % 8 * 8;
#pragma unroll
    for (int i = 0; i < MMA_SHARE; i++) {
        int row = row0 + i * (MMA_THREADS / 8) + threadIdx.x / 8;
        bool inside = row < rows && k < K;
        copy_async(to + i * MMA_THREADS * 16, inside ? x + (size_t)row * K + k : x, inside);
    }
}

static __global__ void __launch_bounds__(MMA_THREADS, 2)
    cp_async_kernel(floatX* y, const floatX* a, const floatX* b, int M, int N, int K) {
    extern __shared__ __align__(1024) unsigned char shared[];
    MmaSums sum = {};
    int m0 = blockIdx.y * MMA_TILE, n0 = blockIdx.x * MMA_TILE, steps = (K + MMA_K - 1) / MMA_K;
    int fill = 0, use = 0; // the stages that are filled and used next
    for (int i = -(ASYNC_STAGES - 1); i < steps; i++) {
        if (i >= 0) {
            asm volatile("cp.async.wait_group %0;" ::"n"(ASYNC_STAGES - 2) : "memory"); // tile i has arrived
            __syncthreads(); // everybody's part of it; and all have used tile i - 1, whose stage is filled now
        }
        int k = (i + ASYNC_STAGES - 1) * MMA_K;
        if (k < K) {
            unsigned char* stage = shared + fill * 2 * MMA_BYTES;
            copy_tile_async(stage, a, M, K, m0, k), copy_tile_async(stage + MMA_BYTES, b, N, K, n0, k);
            fill = fill + 1 < ASYNC_STAGES ? fill + 1 : 0;
        }
        asm volatile("cp.async.commit_group;" ::: "memory"); // an empty one at the end, so that the count is right
        if (i >= 0) {
            const unsigned char* stage = shared + use * 2 * MMA_BYTES;
            mma_multiply<true>(sum, stage, stage + MMA_BYTES);
            use = use + 1 < ASYNC_STAGES ? use + 1 : 0;
        }
    }
    mma_store(y, sum, M, N);
}

static void cp_async(const Problem* p, int, cudaStream_t stream) {
    mma_launch(cp_async_kernel, ASYNC_STAGES, p, stream);
}

// ---- wgmma_tma -------------------------------------------------------------------------------
// idea     4 warps multiply 64 x 128 x 16 at once, straight from shared memory, and one thread starts the copies of whole tiles,
//          which arrive swizzled: no fragments, no addresses, few instructions. 8192 cubed: 532 TFLOP/s, 0.67 of cuBLASLt;
//          0.80 to 0.82 at 1B qkv, o and down
// limit    a stage is filled again only when all threads have come past a barrier, and each waits for its products first: the
//          tensor cores pause in every step. Tiles of 128 x 128 take 32 KB of L2 for 512 cycles of products

enum {
    TMA_TILE = 128,
    TMA_K = 64,
    TMA_BYTES = TMA_TILE * 2 * TMA_K, // of a tile
    TMA_STAGES = 3,
    TMA_THREADS = 256,
    TMA_SHARED = TMA_STAGES * 2 * TMA_BYTES + TMA_STAGES * 8, // tiles, then barriers
};

// where the kernel's shared memory begins; tiles have to lie at multiples of 1024 bytes
__device__ __forceinline__ uint32_t shared_begin(void) {
    extern __shared__ __align__(1024) unsigned char shared[];
    uint32_t begin = shared_address(shared);
    if (begin % 1024) __trap();
    return begin;
}

// writes a warp's 16 rows of d (64, 2 * COUNT): row m0 and below, column n0 and to the right of the result
template <int COUNT>
__device__ __forceinline__ void wgmma_store(floatX* y, const float (&d)[COUNT], int M, int N, int m0, int n0) {
    int lane = threadIdx.x % WARP, m = m0 + lane / 4;
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        int n = n0 + 2 * i + lane % 4 * 2;
        if (n >= N) continue;
        if (m < M) *(uint32_t*)(y + (size_t)m * N + n) = bf16_pair(d[i], d[i + 1]);
        if (m + 8 < M) *(uint32_t*)(y + (size_t)(m + 8) * N + n) = bf16_pair(d[i + 2], d[i + 3]);
    }
}

static __global__ void __launch_bounds__(TMA_THREADS, 2)
    wgmma_tma_kernel(floatX* y, const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                     int M, int N, int K) {
#ifdef HOPPER_CODE
    uint32_t tiles = shared_begin(), full = tiles + TMA_STAGES * 2 * TMA_BYTES;
    int m0 = blockIdx.y * TMA_TILE, n0 = blockIdx.x * TMA_TILE, steps = (K + TMA_K - 1) / TMA_K;
    int group = threadIdx.x / 128;
    auto fetch = [&](int step) {
        uint32_t tile = tiles + step % TMA_STAGES * 2 * TMA_BYTES, bar = full + step % TMA_STAGES * 8;
        mbarrier_expect(bar, 2 * TMA_BYTES);
        tma_load(tile, &a_map, bar, step * TMA_K, m0);
        tma_load(tile + TMA_BYTES, &b_map, bar, step * TMA_K, n0);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < TMA_STAGES; i++) mbarrier_init(full + 8 * i, 1);
        mbarrier_init_done();
        for (int i = 0; i < TMA_STAGES && i < steps; i++) fetch(i);
    }
    __syncthreads();
    float d[TMA_TILE / 2];
    for (int step = 0; step < steps; step++) {
        uint32_t a = tiles + step % TMA_STAGES * 2 * TMA_BYTES + group * (TMA_BYTES / 2),
                 b = tiles + step % TMA_STAGES * 2 * TMA_BYTES + TMA_BYTES;
        mbarrier_wait(full + step % TMA_STAGES * 8, step / TMA_STAGES % 2);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TMA_K; k += 16) wgmma(d, wgmma_rows(a + 2 * k), wgmma_rows(b + 2 * k), step > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<0>();
        __syncthreads(); // this stage has been used
        if (threadIdx.x == 0 && step + TMA_STAGES < steps) fetch(step + TMA_STAGES);
    }
    wgmma_keep(d);
    wgmma_store(y, d, M, N, m0 + threadIdx.x / WARP * 16, n0);
#endif
}

static void wgmma_tma(const Problem* p, int, cudaStream_t stream) {
    dim3 grid((unsigned)ceil_div(p->N, TMA_TILE), (unsigned)ceil_div(p->M, TMA_TILE));
    cuda_check(cudaFuncSetAttribute(wgmma_tma_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, TMA_SHARED));
    wgmma_tma_kernel<<<grid, TMA_THREADS, TMA_SHARED, stream>>>(p->y, p->a_map, p->b_half_map, p->M, p->N, p->K);
    launch_check();
}

// ---- the ring of stages between a producer and its consumers ---------------------------------
// A block computes 128 x 256 outputs: two warpgroups 64 x 256 each, all of it in 128 registers a thread. For a product of 1024
// cycles 48 KB are copied. A third warpgroup gives its registers to these two and starts copies, one thread of it.
//
//     full[i]     ends when the 48 KB of stage i have arrived                    1 arrival, with the bytes to come
//     empty[i]    ends when the consumers' warps have used what is in stage i    1 arrival of each warp of each block
//     note[i]     row and column of the tile that begins with stage i            written by the producer before its arrival
//
// The producer waits for the end of the phase before (parity xor 1: a new barrier counts as ended), so both go round the ring
// with the same index and parity.

enum {
    RING_M = 128,
    RING_N = 256,
    RING_K = 64,
    RING_THREADS = 384,
    RING_CONSUMERS = 8, // warps
    RING_A = RING_M * 2 * RING_K,
    RING_B = RING_N * 2 * RING_K,
    RING_STAGE = RING_A + RING_B, // bytes of one
    RING_STAGES = 4,
};

// bytes of shared memory: stages, then room for outputs on their way out, then barriers and notes
constexpr int ring_shared(int outputs) { return RING_STAGES * (RING_STAGE + 3 * 8) + outputs; }

struct Ring {
    uint32_t tiles, bars; // addresses
    int index, before;    // of the stage at hand and of the one before
    uint32_t parity;
    __device__ __forceinline__ uint32_t a(void) const { return tiles + index * RING_STAGE; }
    __device__ __forceinline__ uint32_t b(void) const { return a() + RING_A; }
    __device__ __forceinline__ uint32_t full(void) const { return bars + index * 8; }
    __device__ __forceinline__ uint32_t empty_of(int i) const { return bars + (RING_STAGES + i) * 8; }
    __device__ __forceinline__ uint32_t note(void) const { return bars + (2 * RING_STAGES + index) * 8; }
    __device__ __forceinline__ void next(void) {
        before = index;
        if (++index == RING_STAGES) index = 0, parity ^= 1;
    }
};

// by all threads, at the start: blocks of a cluster (1: none) see each other's barriers afterwards
template <int CLUSTER>
__device__ __forceinline__ Ring ring_begin(uint32_t tiles, uint32_t bars) {
    Ring r = { tiles, bars, 0, 0, 0 };
    if (threadIdx.x == 0) {
        for (int i = 0; i < RING_STAGES; i++) {
            mbarrier_init(bars + i * 8, 1);
            mbarrier_init(r.empty_of(i), CLUSTER * RING_CONSUMERS);
        }
        mbarrier_init_done();
    }
    if (CLUSTER > 1)
        cluster_sync();
    else
        __syncthreads();
    return r;
}

// one thread: brings rows m0 … of a and n0 … of b, all of K, stage by stage. In a cluster of two, which share the rows of b, each
// block brings half of them to both
template <int CLUSTER>
__device__ __forceinline__ void ring_produce(Ring* r, const CUtensorMap* a_map, const CUtensorMap* b_map, int steps,
                                             int m0, int n0) {
    int rank = CLUSTER > 1 ? (int)cluster_rank() : 0;
    for (int step = 0; step < steps; step++, r->next()) {
        mbarrier_wait(r->empty_of(r->index), r->parity ^ 1);
        if (step == 0) asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(r->note()), "r"(m0), "r"(n0) : "memory");
        mbarrier_expect(r->full(), RING_STAGE);
        tma_load(r->a(), a_map, r->full(), step * RING_K, m0);
        if (CLUSTER > 1)
            tma_load_multicast(r->b() + rank * (RING_B / 2), b_map, r->full(), step * RING_K, n0 + rank * (RING_N / 2),
                               3);
        else
            tma_load(r->b(), b_map, r->full(), step * RING_K, n0);
    }
}

// the consumers' word that the stage before may be filled again, to the producers of all blocks that fill it
template <int CLUSTER>
__device__ __forceinline__ void ring_release(const Ring* r) {
    int lane = threadIdx.x % WARP;
    if (CLUSTER > 1) {
        if (lane < CLUSTER) mbarrier_used_at(r->empty_of(r->before), lane);
    } else if (lane == 0)
        mbarrier_arrive(r->empty_of(r->before));
}

// the descriptor of what lies `bytes` further; of its two words only the lower changes
__device__ __forceinline__ uint64_t further(uint64_t descriptor, int bytes) {
    return descriptor >> 32 << 32 | ((uint32_t)descriptor + (uint32_t)(bytes / 16));
}

// a warpgroup (group 0 or 1): starts d = its 64 rows of a · b^T. The products of a step run while those of the step before are
// waited for; when these are done, their stage is given back. Those of the last step still run at the end: ring_finish
template <int CLUSTER>
__device__ __forceinline__ void ring_consume(Ring* r, float (&d)[RING_N / 2], int group, int steps) {
    uint64_t a0 = wgmma_rows(r->tiles + group * (RING_A / 2)), b0 = wgmma_rows(r->tiles + RING_A);
    for (int step = 0; step < steps; step++, r->next()) {
        uint64_t a = further(a0, r->index * RING_STAGE), b = further(b0, r->index * RING_STAGE);
        mbarrier_wait(r->full(), r->parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < RING_K; k += 16) wgmma(d, further(a, 2 * k), further(b, 2 * k), step > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) ring_release<CLUSTER>(r);
    }
}

// now d may be read
template <int CLUSTER>
__device__ __forceinline__ void ring_finish(const Ring* r, float (&d)[RING_N / 2]) {
    wgmma_wait<0>(d);
    ring_release<CLUSTER>(r);
}

// a consumer, at the first step of a tile: where it lies. The producer has divided for it: between two tiles
// the tensor cores would wait for the two divisions
__device__ __forceinline__ void ring_tile(const Ring* r, int* m0, int* n0) {
    mbarrier_wait(r->full(), r->parity);
    asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(*m0), "=r"(*n0) : "r"(r->note()) : "memory");
}

// number of this thread's warp among those of the consumers (below 0: not one); the compiler knows that a warp agrees
__device__ __forceinline__ int ring_warp(void) { return __shfl_sync(~0u, (int)threadIdx.x / WARP, 0) - 4; }

// ---- warp_specialised ------------------------------------------------------------------------
// idea     one warp does nothing but start copies, two warpgroups nothing but products; they meet at barriers in shared memory,
//          four stages apart, and nobody waits for everybody. 232 registers for consumers make tiles of 128 x 256 possible.
//          8192 cubed: 633 TFLOP/s, 0.86 of cuBLASLt. Where K is 2048 (1B qkv: 0.70, wgmma_tma 0.80) it loses: of wgmma_tma two
//          blocks fit a multiprocessor, and one may multiply while the other ends
// limit    blocks start in the order of the grid, here down the rows: those that run together have all of a and a strip of b,
//          and every wave of blocks fetches all of a from memory again

// number i of (rows, columns) tiles, in groups of `group` rows, column by column within a group: *m, *n
__device__ __forceinline__ void tile_order(int i, int group, int rows, int columns, int* m, int* n) {
    int before = i / (group * columns) * group, left = i % (group * columns), height = min(rows - before, group);
    *m = before + left % height, *n = left / height;
}

// a block a tile; the two of a cluster lie one above the other and have the same rows of b
template <int CLUSTER>
static __global__ void __launch_bounds__(RING_THREADS, 1)
    ring_kernel(floatX* y, const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, int M,
                int N, int K, int group) {
#ifdef HOPPER_CODE
    uint32_t tiles = shared_begin();
    Ring r = ring_begin<CLUSTER>(tiles, tiles + RING_STAGES * RING_STAGE);
    int steps = (K + RING_K - 1) / RING_K, rows = (M + CLUSTER * RING_M - 1) / (CLUSTER * RING_M), m, n;
    tile_order(blockIdx.x / CLUSTER, group, rows, (N + RING_N - 1) / RING_N, &m, &n);
    int m0 = (m * CLUSTER + blockIdx.x % CLUSTER) * RING_M, n0 = n * RING_N, warp = ring_warp();
    if (warp < 0) {
        registers_give<40>();
        if (threadIdx.x == 0) ring_produce<CLUSTER>(&r, &a_map, &b_map, steps, m0, n0);
        __syncwarp();
    } else {
        registers_take<232>();
        float d[RING_N / 2];
        ring_consume<CLUSTER>(&r, d, warp / 4, steps);
        ring_finish<CLUSTER>(&r, d);
        wgmma_store(y, d, M, N, m0 + warp * 16, n0);
    }
    if (CLUSTER > 1) cluster_sync(); // the other block may still send bytes and arrivals here
#endif
}

// a launch in clusters of so many blocks; grid 0: as many blocks as fit at once, but at most `most`
static void launch_clusters(const void* kernel, int cluster, int bytes, dim3 grid, int64_t most, void** arguments,
                            cudaStream_t stream) {
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = grid, config.blockDim = dim3(RING_THREADS), config.dynamicSmemBytes = (size_t)bytes;
    config.stream = stream, config.attrs = &attribute, config.numAttrs = 1;
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (grid.x == 0) {
        int clusters;
        config.gridDim = dim3((unsigned)gpu_processors() / cluster * cluster);
        cuda_check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
        config.gridDim = dim3((unsigned)(cluster * (clusters < most ? clusters : most)));
    }
    cuda_check(cudaLaunchKernelExC(&config, kernel, arguments));
    launch_check();
}

static int64_t cluster_tiles(const Problem* p, int cluster) {
    return ceil_div(p->M, cluster * RING_M) * ceil_div(p->N, RING_N);
}

template <int CLUSTER>
static void ring_launch(const Problem* p, int group, cudaStream_t stream) {
    Problem q = *p;
    CUtensorMap* b_map = CLUSTER > 1 ? &q.b_half_map : &q.b_map;
    void* arguments[] = { &q.y, &q.a_map, b_map, &q.M, &q.N, &q.K, &group };
    dim3 grid((unsigned)(cluster_tiles(p, CLUSTER) * CLUSTER));
    launch_clusters((const void*)ring_kernel<CLUSTER>, CLUSTER, ring_shared(0), grid, 0, arguments, stream);
}

static void warp_specialised(const Problem* p, int, cudaStream_t stream) {
    ring_launch<1>(p, (int)ceil_div(p->M, RING_M), stream);
}

// ---- grouped ---------------------------------------------------------------------------------
// idea     tiles in groups of 16 rows of tiles, column by column: the 132 that run together cover 2048 rows and some 2112 columns,
//          near a square, and what they share is fetched from memory once for all of them. 8192 cubed: 648 TFLOP/s, 0.88 of
//          cuBLASLt; 1B gate_up 0.64 -> 0.73, 8B gate_up 0.75 -> 0.85
// limit    48 KB from L2 for 1024 cycles of products, on every multiprocessor at once: 7.6 TB/s at these 648 TFLOP/s, above the
//          6.9 TB/s at which device_info reads from L2

static void grouped(const Problem* p, int, cudaStream_t stream) { ring_launch<1>(p, 16, stream); }

// ---- multicast -------------------------------------------------------------------------------
// idea     two blocks one above the other need the same rows of b. As a cluster each fetches half of them and the copy engine
//          delivers it to both: 32 KB from L2 instead of 48. The consumers' word goes to both producers, and only says "used":
//          as a release to the other block it would be a memory barrier of the whole GPU in every step (an earlier version, not
//          grouped either: 510 TFLOP/s). 8192 cubed: 647 TFLOP/s, 0.88. It gains nothing yet, and loses 2 to 5 % where K is
//          2048 (1B qkv: 0.73 -> 0.69): L2 was not what held these up. With the next idea it pays: 0.94 over the nine shapes, 0.88
//          without clusters
// limit    between two tiles the tensor cores stand still: outputs leave in pieces of 16 bytes, the block ends, another begins
//          and fills its ring

static void multicast(const Problem* p, int, cudaStream_t stream) { ring_launch<2>(p, 8, stream); }

// ---- persistent ------------------------------------------------------------------------------
// idea     as many clusters as fit, each takes one tile after the other: the producer fills the ring for the next one while the
//          outputs of this one leave, through shared memory, in whole rows, by the copy engine. 8192 cubed: 684 TFLOP/s, 0.93
//          of cuBLASLt; it gains most where K is short: 1B qkv 0.69 -> 0.91, o 0.76 -> 0.97
// limit    both consumers come to the end of a tile at the same time, and nobody multiplies while their outputs go to shared
//          memory, in two parts, as beside four stages there is room for half of them

enum {
    STORE_BYTES = 16 * 128, // 16 rows, 64 columns: what one copy stores
    STORE_BUFFERS = 2,      // of a warp: half of its outputs
    STORE_ALL = RING_CONSUMERS * STORE_BUFFERS * STORE_BYTES,
};

// a warp's 16 rows of d (64, 256), by TMA, from row m0, column n0 on, through its buffers
__device__ __forceinline__ void store_tile(const CUtensorMap* y_map, const float (&d)[RING_N / 2], uint32_t buffers,
                                           int M, int m0, int n0) {
    int lane = threadIdx.x % WARP;
    uint32_t byte = lane % 16 * 128 + lane / 16 * 16;
#pragma unroll
    for (int c0 = 0; c0 < 4; c0 += STORE_BUFFERS) {
        if (lane == 0) tma_store_wait_read<0>(); // what was in the buffers has left them
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4 * STORE_BUFFERS; i++) { // 16 columns: two chunks
            const int j = 32 * c0 + 8 * i;
            stmatrix(buffers + i / 4 * STORE_BYTES + hopper_swizzle(byte + i % 4 * 32), bf16_pair(d[j], d[j + 1]),
                     bf16_pair(d[j + 2], d[j + 3]), bf16_pair(d[j + 4], d[j + 5]), bf16_pair(d[j + 6], d[j + 7]));
        }
        fence_async();
        __syncwarp();
        if (lane == 0) {
            if (m0 < M)
                for (int c = 0; c < STORE_BUFFERS; c++)
                    tma_store(y_map, buffers + c * STORE_BYTES, n0 + 64 * (c0 + c), m0);
            tma_store_commit();
        }
    }
}

enum { CLUSTER_GROUP = 8 }; // rows of tiles in a group, each of two blocks: 2048 rows, as in grouped

// late: cycles that the second warpgroup waits, once, when its first stage has arrived
static __global__ void __launch_bounds__(RING_THREADS, 1)
    persistent_kernel(const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap a_map,
                      const __grid_constant__ CUtensorMap b_map, int M, int N, int K, int late) {
#ifdef HOPPER_CODE
    uint32_t shared = shared_begin(), buffers = shared + RING_STAGES * RING_STAGE;
    Ring r = ring_begin<2>(shared, buffers + STORE_ALL);
    int steps = (K + RING_K - 1) / RING_K, warp = ring_warp(), m, n;
    int rows = (M + 2 * RING_M - 1) / (2 * RING_M), columns = (N + RING_N - 1) / RING_N;
    int first = blockIdx.x / 2, stride = gridDim.x / 2, rank = blockIdx.x % 2;
    if (warp < 0) {
        registers_give<40>();
        if (threadIdx.x == 0)
            for (int i = first; i < rows * columns; i += stride) {
                tile_order(i, CLUSTER_GROUP, rows, columns, &m, &n);
                ring_produce<2>(&r, &a_map, &b_map, steps, (m * 2 + rank) * RING_M, n * RING_N);
            }
        __syncwarp();
    } else {
        registers_take<232>();
        float d[RING_N / 2];
        if (late > 0 && warp >= 4) {
            mbarrier_wait(r.full(), 0);
            for (long long start = clock64(); clock64() - start < late;) continue;
        }
        for (int i = first; i < rows * columns; i += stride) {
            ring_tile(&r, &m, &n);
            ring_consume<2>(&r, d, warp / 4, steps);
            ring_finish<2>(&r, d);
            store_tile(&y_map, d, buffers + warp * STORE_BUFFERS * STORE_BYTES, M, m + warp * 16, n);
        }
        if (threadIdx.x % WARP == 0) tma_store_wait_read<0>(); // shared memory is there until it has been read
        __syncwarp();
    }
    cluster_sync();
#endif
}

static void persistent_launch(const Problem* p, int late, cudaStream_t stream) {
    Problem q = *p;
    void* arguments[] = { &q.y_map, &q.a_map, &q.b_half_map, &q.M, &q.N, &q.K, &late };
    launch_clusters((const void*)persistent_kernel, 2, ring_shared(STORE_ALL), dim3(0), cluster_tiles(p, 2), arguments,
                    stream);
}

static void persistent(const Problem* p, int, cudaStream_t stream) { persistent_launch(p, 0, stream); }

// ---- staggered -------------------------------------------------------------------------------
// idea     one consumer begins 1024 cycles later, the products of a stage, once: the ring's four stages let the two stay
//          apart, so that one can multiply while the other stores. 1B qkv, o: 734 and 720 TFLOP/s, 0.93 and 0.98 of
//          cuBLASLt, 2 and 1 % more than in step; 8192 cubed 697, 0.95. Over the nine shapes 0.936 -> 0.945, within the noise
//          (1B gate_up and down: 4 to 5 % less)
// limit    not found yet: 5 % to cuBLASLt. Three stages and room for all outputs do as well (see Lost), not better

static void staggered(const Problem* p, int, cudaStream_t stream) { persistent_launch(p, 1024, stream); }

// ---- library ---------------------------------------------------------------------------------

static void library(const Problem* p, int, cudaStream_t stream) {
    matmul_forward(p->y, p->N, p->a, p->b, p->M, p->K, p->N, stream);
}

static const char* refuses_elsewhere(const Problem*) { return hopper_refuses(); }

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Shape shapes[] = { // N: rows (M), C: summed (K), F: outputs (N)
    { .name = "2048 cubed", .N = 2048, .C = 2048, .F = 2048 },
    { .name = "8192 cubed", .N = 8192, .C = 8192, .F = 8192 },
    { .name = "1B qkv", .N = 16384, .C = 2048, .F = 3072 },
    { .name = "1B o", .N = 16384, .C = 2048, .F = 2048 },
    { .name = "1B gate_up", .N = 16384, .C = 2048, .F = 16384 },
    { .name = "1B down", .N = 16384, .C = 8192, .F = 2048 },
    { .name = "8B qkv", .N = 16384, .C = 4096, .F = 6144 },
    { .name = "8B gate_up", .N = 16384, .C = 4096, .F = 28672 },
    { .name = "8B down", .N = 16384, .C = 14336, .F = 4096 },
    { .name = "smallest", .small = true, .N = 1, .C = 8, .F = 8 },
    { .name = "odd", .small = true, .N = 37, .C = 72, .F = 264 },
    { .name = "one row", .small = true, .N = 1, .C = 512, .F = 512 },
    { .name = "one step", .small = true, .N = 130, .C = 64, .F = 520 },
    { .name = "a row more", .small = true, .N = 257, .C = 328, .F = 248 },
    { .name = "many tiles", .small = true, .N = 2600, .C = 200, .F = 2312 },
};

static const Variant<Problem> variants[] = {
    // name               launcher          block sizes       what changed
    { "naive",            naive,            { 64, 256 },      "one thread an output",                          refuses_half_tflops },
    { "coalesced",        coalesced,        { 128, 256 },     "one warp an output, its lanes along k",         refuses_one_tflops },
    { "shared_tile",      shared_tile,      { 0 },            "32 x 32 outputs from tiles in shared memory",   refuses_five_tflops },
    { "register_tile",    register_tile,    { 0 },            "8 x 8 outputs a thread, in registers" },
    { "vectors",          vectors,          { 0 },            "16 bytes an instruction" },
    { "double_buffer",    double_buffer,    { 0 },            "the next tile comes while this one is multiplied" },
    { "mma_sync",         mma_sync,         { 0 },            "tensor cores, 16 x 8 x 16 a warp" },
    { "ldmatrix",         swizzled,         { 0 },            "swizzled tiles: no bank conflicts, fragments four at once" },
    { "cp_async",         cp_async,         { 0 },            "copies past the registers, three tiles deep" },
    { "wgmma_tma",        wgmma_tma,        { 0 },            "64 x 128 x 16 from shared memory; the copy engine",       refuses_elsewhere },
    { "warp_specialised", warp_specialised, { 0 },            "a producer, two consumers, 128 x 256 outputs",            refuses_elsewhere },
    { "grouped",          grouped,          { 0 },            "tiles that run together lie near a square",               refuses_elsewhere },
    { "multicast",        multicast,        { 0 },            "clusters of two fetch the rows of b once",                refuses_elsewhere },
    { "persistent",       persistent,       { 0 },            "outputs leave while the next tile comes in",              refuses_elsewhere },
    { "staggered",        staggered,        { 0 },            "one consumer stores while the other multiplies",          refuses_elsewhere },
    { "library",          library,          { 0 },            "cuBLASLt's fastest candidate, what ships: llmc/matmul_cublas.cuh" },
};
// clang-format on
BENCH_MAIN("matmul", shapes, setup, reference, rows, traffic, flops, variants)
