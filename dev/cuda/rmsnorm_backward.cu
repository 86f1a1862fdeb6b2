/*
RMSNorm backward: the gradient through the norm to each row, and to w the sum over all rows. residual_rmsnorm_backward.cu
measures the same ideas where the gradient of the residual stream is added on the way, in place.

    g = w * dy      dx = r * (g - x * r^2 * mean(g * x))    dw += sum over rows of dy * x * r     x dy dx (N, C)  w dw (C)  r (N)
    residual        dx = dres + that, where dres is dx

Bytes           x, dy in and dx out: 3*N*C numbers, r N floats; with dres 4*N*C. About 12 operations a number
Floor           H200, 132 multiprocessors, 4.30 TB/s for a copy; N 16384, bf16: C 2048 47 us, C 4096 94 us, C 8192 187 us, C 16384
                375 us; with dres a third more; in fp32 twice as much
What decides    dx wants a sum over the row, dw one over the column. The first asks for a row to be in one place, the second for
                few places that each see many rows: 132 blocks that keep their sums for dw store them once, 132*C floats, where a
                block to each row would store N*C. And while a block adds up its row, other rows must be under way
Reached         H200, bf16, % of a copy; "dres" with the residual gradient; - where the registers or threads hold no row

                                        C 2048      C 4096      C 8192      C 16384     dres, 2048  dres, 4096  dres, 16384
                    added_apart         -           -           -           -           60.4        63.0        64.7
                    loops_of_the_cpu    1.5         2.2         3.0         3.4         1.9         2.8         3.9
                    atomics             2.3         3.9         5.1         7.5         2.9         5.0         10.1
                    two_kernels         40.1        41.4        42.2        42.6        47.4        47.4        49.6
                    block_atomics       45.3        64.3        65.7        -           55.0        76.1        -
                    partial_sums        79.7        76.4        69.2        -           84.0        86.2        -
                    last_block          46.9        63.6        62.2        -           58.1        76.2        -
                    row_ahead           80.8        87.6        52.3        -           93.0        97.5        -
                    pack_each           86.0        90.5        95.4        -           90.3        93.4        -
                    side_by_side        80.0        91.2        94.3        85.1        89.5        92.1        97.5
                    tickets             74.8        87.6        90.9        80.5        85.3        94.9        99.2
                    producer_warp       87.5        92.2        97.2        94.3        90.1        93.6        98.3
                    cluster             67.9        82.5        90.6        93.2        81.4        89.1        83.7
                    production          85.2        92.1        94.2        95.1        88.7        93.4        97.9

                Lost: tickets on every shape without dres; cluster on short rows, and with dres at C 16384; row_ahead at
                C 8192, for want of registers; one_launch and early_sum are within 2 % of side_by_side
Metrics         lts__t_sectors_op_red (atomics), dram__bytes_read (two_kernels: x and dy twice),
                smsp__average_warps_issue_stalled_barrier (cluster, pack_each), smsp__warps_issue_stalled_long_scoreboard
                (block_atomics, partial_sums), dram__throughput (production). ncu's figures for each variant stand in
                results/nvidia-h200/rmsnorm_backward.md and residual_rmsnorm_backward.md
*/
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "rmsnorm_rows.cuh"

#include <cooperative_groups.h>

#ifdef RMSNORM_RESIDUAL
enum { RESIDUAL = 1 };
#else
enum { RESIDUAL = 0 };
#endif

enum { MOST = RMSNORM_KEPT }; // packs of a row that a thread may have

// ---- the problem -----------------------------------------------------------------------------

// clang-format off
static const Shape shapes[] = {
    { .name = "1B",         .N = 16384, .C = 2048 },
    { .name = "3B",         .N = 16384, .C = 3072 },
    { .name = "8B",         .N = 16384, .C = 4096 },
    { .name = "70B",        .N = 16384, .C = 8192 },
    { .name = "wide",       .N = 16384, .C = 16384 },
    { .name = "one row",    .small = true, .N = 1,    .C = 8 },
    { .name = "odd",        .small = true, .N = 37,   .C = 264 },
    { .name = "five warps", .small = true, .N = 301,  .C = 1288 },
    { .name = "one more",   .small = true, .N = 3,    .C = 2056 },
    { .name = "many rows",  .small = true, .N = 8193, .C = 40 },
    { .name = "full packs", .small = true, .N = 2300, .C = 1024 },
    { .name = "odd, wide",  .small = true, .N = 141,  .C = 16376 },
};
// clang-format on

struct Problem {
    int N, C;
    const floatX *dy, *dres, *x, *w; // dres: with RESIDUAL dx, else NULL
    const float* r;
    floatX *dx, *dw;
    float* sums;   // scratch: (blocks, C)
    int blocks;    // the most that leave sums
    float mean;    // 1 / C
    floatX* apart; // scratch: with RESIDUAL (N, C)
};

static Problem setup(Bench* b, const Shape* s) {
    const size_t n = (size_t)s->N * s->C;
    Problem p = {};
    p.N = s->N, p.C = s->C, p.mean = 1.0f / s->C;
    p.dy = b->input<floatX>("dy", n);
    p.x = b->input<floatX>("x", n, 2, 0.5f);
    p.w = b->input<floatX>("w", s->C, 0.3f, 1);
    p.r = b->input<float>("r", s->N, 0.05f, 0.5f); // x has about that; the formulas hold for any
    if (RESIDUAL)
        p.dres = p.dx = b->in_place<floatX>("dx", n, 1, s->C);
    else
        p.dx = b->output<floatX>("dx", n, s->C);
    p.dw = b->in_place<floatX>("dw", s->C, 1, s->N);
    p.blocks = gpu_processors() * (int)std::max<int64_t>(2, 2048 * PACK / s->C);
    const size_t floats = std::max((size_t)p.blocks * s->C, rmsnorm_backward_scratch(s->C) / sizeof(float));
    p.sums = b->scratch<float>(floats);
    if (RESIDUAL) p.apart = b->scratch<floatX>(n);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const size_t at = (size_t)first * p->C, n = (size_t)count * p->C;
    std::vector<float> dx(n), dw(b->host(p->dw), b->host(p->dw) + p->C);
    if (RESIDUAL) {
        const float* dres = b->host(p->dx, at, n);
        dx.assign(dres, dres + n);
    }
    rmsnorm_backward_cpu(dx.data(), dw.data(), b->host(p->dy, at, n), b->host(p->x, at, n), b->host(p->w),
                         b->host(p->r) + first, (int)count, p->C);
    b->expect(p->dx, at, dx.data(), n);
    if (first == 0 && count == p->N) b->expect(p->dw, 0, dw.data(), p->C);
}

static double traffic(const Problem* p) {
    return (RESIDUAL ? 4.0 : 3.0) * p->N * p->C * sizeof(floatX) + sizeof(float) * p->N;
}

static double flops(const Problem*) { return 0; }

// blocks that walk the rows: no more than run at a time, and 8 rows to each, or their sums would be much beside the rows.
// side_by_side: rows that a block works on at a time
template <typename Kernel>
static int walking_blocks(const Problem* p, Kernel kernel, int threads, size_t shared, int side_by_side = 1) {
    const int64_t most = std::min(resident_blocks(kernel, threads, shared), p->blocks);
    return (int)std::min(most, ceil_div(p->N, 8 * side_by_side));
}

// one warp for 32 columns of every 32nd of the `blocks` rows of sums; the warps' sums are added in their order, to dw once
static __global__ void __launch_bounds__(1024) add_sums_kernel(Problem p, int blocks) {
    __shared__ float sums[WARP][WARP];
    const int c = blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    if (c < p.C) {
#pragma unroll 8
        for (int b = threadIdx.y; b < blocks; b += WARP) sum += p.sums[(size_t)b * p.C + c];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || c >= p.C) return;
    for (int i = 1; i < WARP; i++) sum += sums[i][threadIdx.x];
    p.dw[c] = from_float<floatX>(to_float(p.dw[c]) + sum);
}

static void add_sums(const Problem* p, int blocks, cudaStream_t stream) {
    add_sums_kernel<<<(unsigned)ceil_div(p->C, WARP), dim3(WARP, WARP), 0, stream>>>(*p, blocks);
    launch_check();
}

// ---- production ------------------------------------------------------------------------------

static void production(const Problem* p, int, cudaStream_t stream) {
    rmsnorm_backward(p->dx, p->dw, p->dy, p->dres, p->x, p->w, p->r, p->N, p->C, p->sums, stream);
}

#ifdef RMSNORM_RESIDUAL
// ---- added_apart -----------------------------------------------------------------------------
// idea    the gradient through the norm by one op, the residual add by the next
// limit   what the first wrote is read again, and dx written twice: 6 arrays move where 4 would do

static __global__ void add_kernel(Problem p, size_t packs) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i < packs * PACK) pack_store(p.dx + i, rmsnorm_add(pack_load_once(p.apart + i), pack_load(p.dres + i)));
}

static void added_apart(const Problem* p, int block, cudaStream_t stream) {
    const size_t packs = (size_t)p->N * p->C / PACK;
    rmsnorm_backward(p->apart, p->dw, p->dy, NULL, p->x, p->w, p->r, p->N, p->C, p->sums, stream);
    add_kernel<<<(unsigned)ceil_div((int64_t)packs, block), block, 0, stream>>>(*p, packs);
    launch_check();
}
#endif

// ---- loops_of_the_cpu ------------------------------------------------------------------------
// idea    as rmsnorm_backward_cpu: a thread takes a row of dx, then a thread takes a column of dw
// limit   the rows: neighbouring threads are a row apart, a load brings 32 sectors for 32 numbers. The columns: C threads, a few
//         warps to a multiprocessor, each with a load or two under way, walk N rows

static __global__ void rows_by_threads_kernel(Problem p) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t row = (size_t)n * p.C;
    if (n >= p.N) return;
    float dot = 0;
    for (int c = 0; c < p.C; c++) dot += to_float(p.w[c]) * to_float(p.dy[row + c]) * to_float(p.x[row + c]);
    const float r = p.r[n], scale = dot * p.mean * r * r * r;
    for (int c = 0; c < p.C; c++) {
        float dx = r * to_float(p.w[c]) * to_float(p.dy[row + c]) - to_float(p.x[row + c]) * scale;
        if (RESIDUAL) dx += to_float(p.dres[row + c]);
        p.dx[row + c] = from_float<floatX>(dx);
    }
}

static __global__ void columns_by_threads_kernel(Problem p) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= p.C) return;
    float sum = 0;
#pragma unroll 8
    for (int n = 0; n < p.N; n++)
        sum += to_float(p.dy[(size_t)n * p.C + c]) * to_float(p.x[(size_t)n * p.C + c]) * p.r[n];
    p.dw[c] = from_float<floatX>(to_float(p.dw[c]) + sum);
}

static void loops_of_the_cpu(const Problem* p, int block, cudaStream_t stream) {
    rows_by_threads_kernel<<<(unsigned)ceil_div(p->N, block), block, 0, stream>>>(*p);
    launch_check();
    columns_by_threads_kernel<<<(unsigned)ceil_div(p->C, block), block, 0, stream>>>(*p);
    launch_check();
}

// ---- atomics ---------------------------------------------------------------------------------
// idea    a warp takes a row, 16 bytes to a lane, and adds what the row gives to dw to sums in fp32 by atomics: one kernel sees
//         each row, and N rows may be under way
// limit   N*C atomic additions, as many as numbers; they are done in the L2, in whatever order: two runs differ in their bits

template <bool ATOMICS>
static __global__ void warp_per_row_kernel(Problem p) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, first = threadIdx.x % WARP * PACK, step = WARP * PACK;
    const size_t row = (size_t)n * p.C;
    if (n >= p.N) return;
    float dot = 0;
#pragma unroll 4
    for (int c = first; c < p.C; c += step)
        dot += rmsnorm_dot(pack_load(p.x + row + c), pack_load(p.dy + row + c), pack_load(p.w + c));
    const float r = p.r[n], scale = warp_sum(dot) * p.mean * r * r * r;
    for (int c = first; c < p.C; c += step) {
        float dw[PACK] = { 0 };
        const PackX x = pack_load(p.x + row + c), dy = pack_load(p.dy + row + c);
        PackX dres = {};
        if (RESIDUAL) dres = pack_load(p.dres + row + c);
        pack_store(p.dx + row + c, rmsnorm_dx(dw, x, dy, dres, pack_load(p.w + c), r, scale));
        if (ATOMICS)
            for (int k = 0; k < PACK; k++) atomicAdd(p.sums + c + k, dw[k]);
    }
}

static void atomics(const Problem* p, int block, cudaStream_t stream) {
    cuda_check(cudaMemsetAsync(p->sums, 0, p->C * sizeof(float), stream));
    warp_per_row_kernel<true><<<(unsigned)ceil_div(p->N, block / WARP), block, 0, stream>>>(*p);
    launch_check();
    add_sums(p, 1, stream);
}

// ---- two_kernels -----------------------------------------------------------------------------
// idea    dx as before; then dw by columns: a warp takes 512 bytes of columns of some rows, and leaves sums that are added in
//         order. No atomics, the same bits in each run
// limit   x and dy are read twice from memory: 5 arrays move where 3 would do, 6 where 4

static __global__ void __launch_bounds__(256) columns_kernel(Problem p) {
    __shared__ float part[8][WARP][PACK];
    const int c = (blockIdx.x * WARP + threadIdx.x) * PACK;
    float sum[PACK] = { 0 };
    if (c < p.C)
#pragma unroll 4
        for (int n = blockIdx.y * 8 + threadIdx.y; n < p.N; n += gridDim.y * 8) {
            const PackX x = pack_load(p.x + (size_t)n * p.C + c), dy = pack_load(p.dy + (size_t)n * p.C + c);
            const float r = p.r[n];
            for (int k = 0; k < PACK; k++) sum[k] += dy.get(k) * x.get(k) * r;
        }
    for (int k = 0; k < PACK; k++) part[threadIdx.y][threadIdx.x][k] = sum[k];
    __syncthreads();
    if (threadIdx.y || c >= p.C) return;
    for (int k = 0; k < PACK; k++) {
        for (int i = 1; i < 8; i++) sum[k] += part[i][threadIdx.x][k];
        p.sums[(size_t)blockIdx.y * p.C + c + k] = sum[k];
    }
}

static void two_kernels(const Problem* p, int block, cudaStream_t stream) {
    const int across = (int)ceil_div(p->C, WARP * PACK);
    const int down = (int)std::min(ceil_div(8 * gpu_processors(), across), (int64_t)p->blocks);
    warp_per_row_kernel<false><<<(unsigned)ceil_div(p->N, block / WARP), block, 0, stream>>>(*p);
    launch_check();
    columns_kernel<<<dim3(across, down), dim3(WARP, 8), 0, stream>>>(*p);
    launch_check();
    add_sums(p, down, stream);
}

// ---- block_atomics ---------------------------------------------------------------------------
// idea    as many blocks as the GPU runs at a time walk the rows; a thread owns 16 bytes of columns, or a few times that, keeps
//         its row in registers while the block adds up, and its sums for dw until the end: each row is read once, and the atomics
//         are as many as threads
// limit   still in any order. And a block waits three times in turn: for its row, for the barrier, for the next row

enum { ATOMICS, PARTIAL_SUMS, LAST_BLOCK, ALL_BLOCKS, EARLY }; // how dw is added up at the end
enum { KEPT = PACK == 8 ? 2 : 4 };                             // packs of a row that a thread can keep beside its sums

static __device__ unsigned blocks_done; // 0 whenever no kernel runs

// leaves the sums of this block, C / 4 of 4 columns in turn; with LAST_BLOCK the one that comes last adds up those of all
template <int END, int PACKS>
__device__ __forceinline__ void leave_sums(const Problem& p, const float (&dw)[PACKS][PACK]) {
    float* const sum = p.sums + (END == ATOMICS ? 0 : (size_t)blockIdx.x * p.C);
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = (k * blockDim.x + threadIdx.x) * PACK;
        if (c >= p.C) continue;
        for (int j = 0; j < PACK; j += 4)
            if (END == ATOMICS)
                for (int i = j; i < j + 4; i++) atomicAdd(sum + c + i, dw[k][i]);
            else
                pack_store(sum + c + j, Pack<float>{ dw[k][j], dw[k][j + 1], dw[k][j + 2], dw[k][j + 3] });
    }
    if (END != LAST_BLOCK) return;
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(&blocks_done, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int c = threadIdx.x * 4; c < p.C; c += blockDim.x * 4) {
        float4 total = { 0, 0, 0, 0 };
#pragma unroll 8
        for (unsigned b = 0; b < gridDim.x; b++) {
            const float4 part = __ldcg((const float4*)(p.sums + (size_t)b * p.C + c));
            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
        const float add[4] = { total.x, total.y, total.z, total.w };
        for (int k = 0; k < 4; k++) p.dw[c + k] = from_float<floatX>(to_float(p.dw[c + k]) + add[k]);
    }
}

// AHEAD: the next row is loaded before this one is added up
template <int PACKS, bool AHEAD, int END>
static __global__ void __launch_bounds__(512, 1) walk_kernel(Problem p) {
    __shared__ float sums[2][WARP];
    const int step = blockDim.x * PACK, first = threadIdx.x * PACK;
    PackX w[PACKS] = {}, x[PACKS] = {}, dy[PACKS] = {}, dres[PACKS] = {};
    float dw[PACKS][PACK] = {};
    auto load = [&](PackX(&to)[PACKS], const floatX* from, int n) {
#pragma unroll
        for (int k = 0; k < PACKS; k++)
            if (n < p.N && first + k * step < p.C) to[k] = pack_load(from + (size_t)n * p.C + first + k * step);
    };
    float next_r = p.r[blockIdx.x];
    load(w, p.w, 0);
    if (AHEAD) load(x, p.x, blockIdx.x), load(dy, p.dy, blockIdx.x);
    for (int n = blockIdx.x, turn = 0; n < p.N; n += gridDim.x, turn ^= 1) {
        PackX next_x[PACKS] = {}, next_dy[PACKS] = {};
        float dot = 0;
        rmsnorm_forget(w);
        if (AHEAD)
            load(next_x, p.x, n + gridDim.x), load(next_dy, p.dy, n + gridDim.x);
        else
            load(x, p.x, n), load(dy, p.dy, n);
        if (RESIDUAL) load(dres, p.dres, n);
        const float r = next_r;
        if (n + (int)gridDim.x < p.N) next_r = p.r[n + gridDim.x];
#pragma unroll
        for (int k = 0; k < PACKS; k++) dot += rmsnorm_dot(x[k], dy[k], w[k]);
        const float scale = rmsnorm_block_sum(dot, sums[turn]) * p.mean * r * r * r;
        rmsnorm_forget(x), rmsnorm_forget(dy);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const size_t at = (size_t)n * p.C + first + k * step;
            const bool inside = first + k * step < p.C;
            const PackX dx = rmsnorm_dx(dw[k], x[k], dy[k], dres[k], w[k], r, scale);
            if (inside) pack_store(p.dx + at, dx);
            if (AHEAD) x[k] = next_x[k], dy[k] = next_dy[k];
        }
    }
    leave_sums<END>(p, dw);
}

template <bool AHEAD, int END, int PACKS>
static void walk(const Problem* p, int block, cudaStream_t stream) {
    const int threads = row_threads(p->C, block, PACKS);
    with_packs<PACKS>(p->C, threads, [&](auto packs) {
        auto kernel = walk_kernel<decltype(packs)::value, AHEAD, END>;
        const int blocks = walking_blocks(p, kernel, threads, 0);
        if (END == ATOMICS) cuda_check(cudaMemsetAsync(p->sums, 0, p->C * sizeof(float), stream));
        kernel<<<blocks, threads, 0, stream>>>(*p);
        launch_check();
        if (END != LAST_BLOCK) add_sums(p, END == ATOMICS ? 1 : blocks, stream);
    });
}

static void block_atomics(const Problem* p, int block, cudaStream_t stream) {
    walk<false, ATOMICS, KEPT>(p, block, stream);
}

static const char* keeps_row(const Problem* p) {
    return rmsnorm_threads(p->C, KEPT) <= 512 ? NULL : "the registers of 512 threads hold no row";
}

// ---- partial_sums ----------------------------------------------------------------------------
// idea    the blocks store their sums, and a second kernel adds them in order: the same bits in each run
// limit   it cannot begin before the first has ended: a few us at the end, whatever N

static void partial_sums(const Problem* p, int block, cudaStream_t stream) {
    walk<false, PARTIAL_SUMS, KEPT>(p, block, stream);
}

// ---- last_block ------------------------------------------------------------------------------
// idea    a single launch: the block that finishes last adds up the sums of all, in order
// limit   it does so alone: 132*C floats and more through one multiprocessor, whose share of the L2 is a hundredth

static void last_block(const Problem* p, int block, cudaStream_t stream) {
    walk<false, LAST_BLOCK, KEPT>(p, block, stream);
}

// ---- row_ahead -------------------------------------------------------------------------------
// idea    the next row is on its way to registers while this one is added up
// limit   8 registers more for each pack: half the rows are too long, and one row ahead of few blocks is not much

static void row_ahead(const Problem* p, int block, cudaStream_t stream) {
    walk<true, PARTIAL_SUMS, 2>(p, block, stream);
}

static const char* keeps_two_rows(const Problem* p) {
    return rmsnorm_threads(p->C, 2) <= 512 ? NULL : "the registers of 512 threads hold no two rows";
}

// ---- pack_each -------------------------------------------------------------------------------
// idea    rows wait in shared memory, not in registers: asynchronous copies (cp.async) bring them to a ring of three, past the
//         registers, each thread 16 bytes of each array to places of its own, which no barrier guards. At its top a turn asks for
//         the row after the next, in the places that were read a turn ago
// limit   one pack to a thread: 32 warps for each barrier, and no rows beyond 1024 packs. This was llmc/rmsnorm.h

enum { TURNS = 3 };

static __global__ void __launch_bounds__(1024) pack_each_kernel(Problem p) {
    extern __shared__ int4 shared[]; // (TURNS, 3, threads): x, dy, dres
    __shared__ float sums[2][WARP];
    const int c = threadIdx.x * PACK, part = blockDim.x * PACK, stage = 3 * part;
    const int rows = (p.N - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x; // of this block
    const size_t next = (size_t)gridDim.x * p.C;
    const int lane = threadIdx.x % WARP;
    const bool inside = c < p.C;
    floatX* const ring = (floatX*)shared + c;
    for (int i = 0; i < 3 * TURNS; i++) // what nobody copies is zero
        if (!inside || (i % 3 == 2 && !p.dres)) pack_store(ring + i * part, PackX{});

    auto fetch = [&](int i, floatX* to, size_t from) { // row i of the block
        if (inside && i < rows) {
            rmsnorm_copy(to, p.x + from);
            rmsnorm_copy(to + part, p.dy + from);
            if (p.dres) rmsnorm_copy(to + 2 * part, p.dres + from);
        }
        rmsnorm_copies_end();
    };
    size_t at = (size_t)blockIdx.x * p.C + c;
#pragma unroll
    for (int i = 0; i < TURNS - 1; i++) fetch(i, ring + i * stage, at + i * next);

    PackX w = {};
    if (inside) w = pack_load(p.w + c);
    float dw[PACK] = { 0 }, r_lane = 0; // r of 32 rows, one a lane
    int now = 0;                        // the place of the ring that is read
    for (int i = 0; i < rows; i++, at += next) {
        const int before = now ? now - 1 : TURNS - 1; // the place read before, free now
        fetch(i + TURNS - 1, ring + before * stage, at + (TURNS - 1) * next);
        if (i % WARP == 0 && i + lane < rows) r_lane = p.r[blockIdx.x + (i + lane) * gridDim.x];
        rmsnorm_copies_wait<TURNS - 1>();
        const floatX* from = ring + now * stage;
        PackX x = pack_load(from), dy = pack_load(from + part);
        const float dot = rmsnorm_block_sum(rmsnorm_dot(x, dy, w), sums[i % 2]);
        const float r = __shfl_sync(0xffffffffu, r_lane, i % WARP);
        PackX dx = rmsnorm_dx(dw, x, dy, pack_load(from + 2 * part), w, r, dot * p.mean * r * r * r);
        if (inside) pack_store(p.dx + at, dx);
        now = now + 1 < TURNS ? now + 1 : 0;
    }
    if (!inside) return;
    float* sum = p.sums + (size_t)blockIdx.x * p.C + c;
    for (int k = 0; k < PACK; k += 4) pack_store(sum + k, Pack<float>{ dw[k], dw[k + 1], dw[k + 2], dw[k + 3] });
}

static void pack_each(const Problem* p, int, cudaStream_t stream) {
    const int threads = rmsnorm_threads(p->C, 1), most = gpu_processors() * (1024 / threads);
    const int blocks = (int)std::min<int64_t>(std::min(most, p->blocks), ceil_div(p->N, 8));
    const size_t bytes = (size_t)TURNS * 3 * 16 * threads;
    launch_require(rmsnorm_shared(pack_each_kernel, (int64_t)bytes), "pack_each", "3 rows fit a block");
    pack_each_kernel<<<blocks, threads, bytes, stream>>>(*p);
    launch_check();
    add_sums(p, blocks, stream);
}

static const char* needs_1024_packs(const Problem* p) {
    return rmsnorm_threads(p->C, 1) <= 1024 ? NULL : "1024 threads of a pack hold no row";
}

// ---- side_by_side ----------------------------------------------------------------------------
// idea    production: a few packs to a thread, and each place of the ring is refilled as soon as it was read for the last time.
//         Here one block to a multiprocessor, with several rows at a time, each with its own threads, ring and barrier. At the
//         end it adds up over them: 132 sums in all, whatever the length of a row
// limit   the second kernel, which has less to add, and is as long as before

static __device__ unsigned rows_taken; // 0 whenever no kernel runs

// x added up over the threads of a row; sums: of this row's warps
__device__ __forceinline__ float row_sum(float x, float* sums) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (warps == 1) return x;
    if (lane == 0) sums[warp] = x;
    barrier_sync(1 + threadIdx.y, blockDim.x);
    return warp_sum(lane < warps ? sums[lane] : 0);
}

// threads of a block whose registers hold so many packs each, their weights and sums
__host__ __device__ constexpr int ring_threads(int packs) { return packs == 1 ? 1024 : packs == 2 ? 640 : 512; }

// block: (threads of a row, rows side by side). TICKETS: after the first rows each takes the next one that nobody has
template <int PACKS, int STAGES, int END, bool TICKETS>
static __global__ void __launch_bounds__(ring_threads(PACKS), 1) ring_kernel(Problem p) {
    enum { ARRAYS = 2 + RESIDUAL };
    extern __shared__ int4 shared[]; // (rows side by side, STAGES, ARRAYS, PACKS, threads of a row)
    __shared__ float sums[2][WARP];
    __shared__ int tickets[2][WARP];
    const int C = p.C, step = blockDim.x * PACK, first = threadIdx.x * PACK, apart = gridDim.x * blockDim.y;
    floatX* const ring = (floatX*)shared + threadIdx.y * STAGES * ARRAYS * PACKS * step + first;
#if __CUDA_ARCH__ >= 900
    if (END == EARLY) cudaTriggerProgrammaticLaunchCompletion();
#endif
    auto place = [&](int stage, int array, int k) { return ring + ((stage * ARRAYS + array) * PACKS + k) * step; };
    auto fetch = [&](int n, int stage, int k) {
        if (n >= p.N || first + k * step >= C) return;
        const size_t at = (size_t)n * C + first + k * step;
        rmsnorm_copy(place(stage, 0, k), p.x + at);
        rmsnorm_copy(place(stage, 1, k), p.dy + at);
        if (RESIDUAL) rmsnorm_copy(place(stage, 2, k), p.dres + at);
    };
    int rows[STAGES]; // that are in the ring, or on their way: the next one first
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
        rows[stage] = blockIdx.x * blockDim.y + threadIdx.y + stage * apart;
#pragma unroll
        for (int k = 0; k < PACKS; k++) fetch(rows[stage], stage, k);
        rmsnorm_copies_end();
    }
    PackX w[PACKS] = {};
    float dw[PACKS][PACK] = {}, next_r = rows[0] < p.N ? p.r[rows[0]] : 0;
    int taken = 0; // by thread 0, for the row after the next
    if (TICKETS && threadIdx.x == 0) taken = STAGES * apart + atomicAdd(&rows_taken, 1);
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if (first + k * step < C) w[k] = pack_load(p.w + first + k * step);

    for (int stage = 0, turn = 0; rows[0] < p.N; turn ^= 1, stage = stage + 1 < STAGES ? stage + 1 : 0) {
        PackX x[PACKS] = {}, dy[PACKS] = {};
        const size_t row = (size_t)rows[0] * C;
        const float r = next_r;
        float dot = 0;
        rmsnorm_forget(w);
        if (TICKETS && threadIdx.x == 0) {
            tickets[turn][threadIdx.y] = taken;
            taken = STAGES * apart + atomicAdd(&rows_taken, 1);
        }
        rmsnorm_copies_wait<STAGES - 1>();
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (first + k * step >= C) continue;
            x[k] = pack_load(place(stage, 0, k)), dy[k] = pack_load(place(stage, 1, k));
            dot += rmsnorm_dot(x[k], dy[k], w[k]);
        }
        const float scale = row_sum(dot, sums[turn] + threadIdx.y * (blockDim.x / WARP)) * p.mean * r * r * r;
        if (TICKETS && blockDim.x == WARP) __syncwarp();
        const int after = TICKETS ? tickets[turn][threadIdx.y] : rows[STAGES - 1] + apart; // goes to this row's places
        rmsnorm_forget(x), rmsnorm_forget(dy);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (first + k * step >= C) continue;
            PackX dres = {};
            if (PACKS > 2) // too many to keep
                x[k] = pack_load(place(stage, 0, k)), dy[k] = pack_load(place(stage, 1, k));
            if (RESIDUAL) dres = pack_load(place(stage, 2, k));
            pack_store(p.dx + row + first + k * step, rmsnorm_dx(dw[k], x[k], dy[k], dres, w[k], r, scale));
            fetch(after, stage, k);
        }
        rmsnorm_copies_end();
#pragma unroll
        for (int i = 0; i < STAGES; i++) rows[i] = i + 1 < STAGES ? rows[i + 1] : after;
        if (rows[0] < p.N) next_r = p.r[rows[0]];
    }

    if (blockDim.y == 1) {
        leave_sums<PARTIAL_SUMS>(p, dw);
    } else { // add those of the rows side by side: they lie in the ring, (rows side by side, PACKS, threads of a row, PACK)
        float* const all = (float*)shared;
        rmsnorm_copies_wait<0>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < PACKS; k++)
            for (int j = 0; j < PACK; j++) all[(threadIdx.y * PACKS + k) * step + first + j] = dw[k][j];
        __syncthreads();
        for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < C; c += blockDim.x * blockDim.y) {
            float sum = 0;
            for (unsigned i = 0; i < blockDim.y; i++) sum += all[i * PACKS * step + c];
            p.sums[(size_t)blockIdx.x * C + c] = sum;
        }
    }
    if (END != ALL_BLOCKS) return;
    cooperative_groups::this_grid().sync();
    for (int c = blockIdx.x * WARP; c < C; c += gridDim.x * WARP) rmsnorm_add_sums(p.dw, p.sums, gridDim.x, C, c);
}

// as many rows to a block as its threads can take. launch(kernel, blocks, threads, bytes of shared memory)
template <int END, bool TICKETS, typename Launch>
static void ring_launch(const Problem* p, int block, Launch launch) {
    int threads = row_threads(p->C, block, MOST);
    if (threads > 512 && threads * PACK < p->C) threads = 512; // more have registers for one pack
    with_packs<MOST>(p->C, threads, [&](auto packs) {
        constexpr int PACKS = decltype(packs)::value;
        const int most = threads == WARP ? 32 : 15; // 15 barriers, which a row of one warp does not need
        const int rows = std::max(1, std::min(ring_threads(PACKS) / threads, most));
        const int64_t bytes = (2 + RESIDUAL) * 16 * (int64_t)PACKS * threads * rows;
        with_stages(bytes, [&](auto stages) {
            auto kernel = ring_kernel<PACKS, decltype(stages)::value, END, TICKETS>;
            const size_t shared = (size_t)bytes * decltype(stages)::value;
            launch_require(rmsnorm_shared(kernel, (int64_t)shared), "ring", "a row fits a block");
            launch(kernel, walking_blocks(p, kernel, threads * rows, shared, rows), dim3(threads, rows), shared);
        });
    });
}

static const char* ring_refuses(const Problem* p) {
    const int threads = rmsnorm_threads(p->C, MOST);
    if (threads > 512) return "512 threads hold no row";
    return (2 + RESIDUAL) * 16 * MOST * (int64_t)threads <= most_shared() ? NULL : "a row fits no block";
}

// production's second kernel
static void add_sums_at_once(const Problem* p, int blocks, cudaStream_t stream) {
    rmsnorm_dw_kernel<<<(unsigned)ceil_div(p->C, WARP), 1024, 0, stream>>>(p->dw, p->sums, blocks, p->C);
    launch_check();
}

static void side_by_side(const Problem* p, int block, cudaStream_t stream) {
    ring_launch<PARTIAL_SUMS, false>(p, block, [&](auto kernel, int blocks, dim3 threads, size_t shared) {
        kernel<<<blocks, threads, shared, stream>>>(*p);
        launch_check();
        add_sums_at_once(p, blocks, stream);
    });
}

// ---- one_launch ------------------------------------------------------------------------------
// idea    the blocks, which all run at the same time, wait for each other at the end (a barrier of the whole grid), and then each
//         adds up 32 columns or so
// limit   they must run at the same time: a cooperative launch, which waits for the whole GPU

static void one_launch(const Problem* p, int block, cudaStream_t stream) {
    ring_launch<ALL_BLOCKS, false>(p, block, [&](auto kernel, int blocks, dim3 threads, size_t shared) {
        Problem problem = *p;
        void* arguments[] = { &problem };
        cuda_check(cudaLaunchCooperativeKernel(kernel, dim3(blocks), threads, arguments, shared, stream));
        launch_check();
    });
}

// ---- early_sum -------------------------------------------------------------------------------
// idea    the second kernel is launched before the first has ended (a programmatic dependent launch), and waits on the GPU for
//         its results: no gap between the two
// limit   blocks with fixed rows: the last one decides, wherever on the chip it runs

static __global__ void __launch_bounds__(1024) early_sum_kernel(Problem p, int blocks) {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    rmsnorm_add_sums(p.dw, p.sums, blocks, p.C, blockIdx.x * WARP);
}

static void early_sum(const Problem* p, int block, cudaStream_t stream) {
    ring_launch<EARLY, false>(p, block, [&](auto kernel, int blocks, dim3 threads, size_t shared) {
        kernel<<<blocks, threads, shared, stream>>>(*p);
        launch_check();
        cudaLaunchAttribute early = {};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3((unsigned)ceil_div(p->C, WARP)), config.blockDim = dim3(1024), config.stream = stream;
        config.attrs = &early, config.numAttrs = 1;
        cuda_check(cudaLaunchKernelEx(&config, early_sum_kernel, *p, blocks));
        launch_check();
    });
}

static const char* early_refuses(const Problem* p) { return hopper_refuses() ? hopper_refuses() : ring_refuses(p); }

// ---- tickets ---------------------------------------------------------------------------------
// idea    each takes the next row that nobody has taken, by an atomic addition: multiprocessors far from memory take fewer, and
//         the rows under way lie close together
// limit   which rows a block adds up changes from run to run, and so do the bits of dw

static __global__ void __launch_bounds__(1024) ticket_sum_kernel(Problem p, int blocks) {
    if (blockIdx.x == 0 && threadIdx.x == 0) rows_taken = 0;
    rmsnorm_add_sums(p.dw, p.sums, blocks, p.C, blockIdx.x * WARP);
}

static void tickets(const Problem* p, int block, cudaStream_t stream) {
    ring_launch<PARTIAL_SUMS, true>(p, block, [&](auto kernel, int blocks, dim3 threads, size_t shared) {
        kernel<<<blocks, threads, shared, stream>>>(*p);
        launch_check();
        ticket_sum_kernel<<<(unsigned)ceil_div(p->C, WARP), 1024, 0, stream>>>(*p, blocks);
        launch_check();
    });
}

// ---- producer_warp ---------------------------------------------------------------------------
// idea    a warp that does nothing else keeps the ring full, three bulk copies (cp.async.bulk) to a row; the others wait at
//         barriers that count bytes, and say by arriving at another that a stage is free, which is when it is in registers
// limit   a stage is free only as a whole: where a row leaves room for one, nothing is under way while it is worked on

template <int PACKS>
static __global__ void __launch_bounds__(544, 1) producer_warp_kernel(Problem p, int stages) {
#ifdef HOPPER_CODE
    enum { ARRAYS = 2 + RESIDUAL, ONCE = PACKS <= 2 }; // ONCE: the row goes to registers, else it is read twice
    extern __shared__ int4 shared[];                   // (stages, ARRAYS, C), then two barriers for each stage
    __shared__ float sums[2][WARP];
    const int C = p.C, threads = blockDim.x - WARP, warps = threads / WARP; // that work
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, step = threads * PACK, first = threadIdx.x * PACK;
    const int start = blockIdx.x, apart = gridDim.x, rows = (p.N - start + apart - 1) / apart;
    const size_t next = (size_t)apart * C;
    const uint32_t bytes = C * sizeof(floatX), ring = shared_address(shared);
    const uint32_t full = ring + stages * ARRAYS * bytes, empty = full + 8 * stages;
    size_t row = (size_t)start * C;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < stages; stage++) {
            mbarrier_init(full + 8 * stage, 1);
            mbarrier_init(empty + 8 * stage, warps);
        }
        mbarrier_init_done();
    }
    __syncthreads();

    if (warp == warps) { // the producer
        if (lane) return;
        for (int i = 0, stage = 0, turn = 0; i < rows; i++, row += next) {
            const uint32_t place = ring + stage * ARRAYS * bytes, bar = full + 8 * stage;
            mbarrier_wait(empty + 8 * stage, turn ^ 1);
            mbarrier_expect(bar, ARRAYS * bytes);
            bulk_load(place, p.x + row, bytes, bar);
            bulk_load(place + bytes, p.dy + row, bytes, bar);
            if (RESIDUAL) bulk_load(place + 2 * bytes, p.dres + row, bytes, bar);
            if (++stage == stages) stage = 0, turn ^= 1;
        }
        return;
    }

    PackX w[PACKS] = {};
    float dw[PACKS][PACK] = {}, next_r = p.r[start];
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if (first + k * step < C) w[k] = pack_load(p.w + first + k * step);
    for (int i = 0, stage = 0, turn = 0; i < rows; i++, row += next) {
        const floatX* const place = (const floatX*)shared + stage * ARRAYS * C + first;
        PackX x[PACKS] = {}, dy[PACKS] = {}, dres[PACKS] = {};
        const float r = next_r;
        float dot = 0;
        rmsnorm_forget(w);
        if (i + 1 < rows) next_r = p.r[start + (i + 1) * apart];
        mbarrier_wait(full + 8 * stage, turn);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (first + k * step >= C) continue;
            x[k] = pack_load(place + k * step), dy[k] = pack_load(place + C + k * step);
            if (RESIDUAL && ONCE) dres[k] = pack_load(place + 2 * C + k * step);
            dot += rmsnorm_dot(x[k], dy[k], w[k]);
        }
        if (ONCE) {
            __syncwarp();
            if (lane == 0) mbarrier_arrive(empty + 8 * stage);
        }
        dot = warp_sum(dot);
        if (lane == 0) sums[i % 2][warp] = dot;
        barrier_sync(1, threads);
        const float scale = warp_sum(lane < warps ? sums[i % 2][lane] : 0) * p.mean * r * r * r;
        rmsnorm_forget(x), rmsnorm_forget(dy);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (first + k * step >= C) continue;
            if (!ONCE) x[k] = pack_load(place + k * step), dy[k] = pack_load(place + C + k * step);
            if (!ONCE && RESIDUAL) dres[k] = pack_load(place + 2 * C + k * step);
            pack_store(p.dx + row + first + k * step, rmsnorm_dx(dw[k], x[k], dy[k], dres[k], w[k], r, scale));
        }
        if (!ONCE) {
            __syncwarp();
            if (lane == 0) mbarrier_arrive(empty + 8 * stage);
        }
        if (++stage == stages) stage = 0, turn ^= 1;
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if (first + k * step < C)
            for (int j = 0; j < PACK; j += 4)
                pack_store(p.sums + (size_t)blockIdx.x * C + first + k * step + j,
                           Pack<float>{ dw[k][j], dw[k][j + 1], dw[k][j + 2], dw[k][j + 3] });
#endif
}

static void producer_warp(const Problem* p, int block, cudaStream_t stream) {
    const int threads = row_threads(p->C, block, 4);
    const int64_t row = (2 + RESIDUAL) * (int64_t)p->C * sizeof(floatX) + 16;
    const int stages = (int)std::min<int64_t>(3, most_shared() / row);
    with_packs<4>(p->C, threads, [&](auto packs) {
        auto kernel = producer_warp_kernel<decltype(packs)::value>;
        launch_require(rmsnorm_shared(kernel, stages * row), "producer_warp", "a row fits a block");
        const int blocks = walking_blocks(p, kernel, threads + WARP, stages * row);
        kernel<<<blocks, threads + WARP, stages * row, stream>>>(*p, stages);
        launch_check();
        add_sums_at_once(p, blocks, stream);
    });
}

static const char* producer_refuses(const Problem* p) {
    if (hopper_refuses()) return hopper_refuses();
    return rmsnorm_threads(p->C, 4) <= 512 ? NULL : "512 threads of 4 packs hold no row";
}

// ---- cluster ---------------------------------------------------------------------------------
// idea    two blocks on neighbouring multiprocessors share a row, half the columns each, and tell each other their sums through
//         shared memory (a cluster): half as much of a row in each leaves room for more stages, and there are half as many sums
//         for dw
// limit   a barrier of the cluster for each row, several times slower than one of a block

enum { CLUSTER = 2 };

template <int PACKS, int STAGES>
static __global__ void __launch_bounds__(512, 1) cluster_kernel(Problem p, int columns) {
#ifdef HOPPER_CODE
    enum { ARRAYS = 2 + RESIDUAL };
    extern __shared__ int4 shared[];          // (STAGES, ARRAYS, PACKS, threads)
    __shared__ float sums[2][CLUSTER * WARP]; // of the warps of all blocks of the cluster
    const auto cluster = cooperative_groups::this_cluster();
    const int rank = cluster_rank(), warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int step = blockDim.x * PACK, first = rank * columns + threadIdx.x * PACK,
              last = min(p.C, (rank + 1) * columns);
    const int start = blockIdx.x / CLUSTER, apart = gridDim.x / CLUSTER, rows = (p.N - start + apart - 1) / apart;
    const size_t next = (size_t)apart * p.C;
    floatX* const ring = (floatX*)shared + threadIdx.x * PACK;
    auto place = [&](int stage, int array, int k) { return ring + ((stage * ARRAYS + array) * PACKS + k) * step; };
    auto fetch = [&](int i, size_t row, int stage, int k) {
        if (i >= rows || first + k * step >= last) return;
        const size_t at = row + first + k * step;
        rmsnorm_copy(place(stage, 0, k), p.x + at);
        rmsnorm_copy(place(stage, 1, k), p.dy + at);
        if (RESIDUAL) rmsnorm_copy(place(stage, 2, k), p.dres + at);
    };
    size_t row = (size_t)start * p.C;
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
#pragma unroll
        for (int k = 0; k < PACKS; k++) fetch(stage, row + stage * next, stage, k);
        rmsnorm_copies_end();
    }
    PackX w[PACKS] = {};
    float dw[PACKS][PACK] = {}, next_r = p.r[start];
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if (first + k * step < last) w[k] = pack_load(p.w + first + k * step);
    cluster_sync(); // nobody sends to a block that has not begun

    for (int i = 0, stage = 0; i < rows; i++, row += next, stage = stage + 1 < STAGES ? stage + 1 : 0) {
        PackX x[PACKS] = {}, dy[PACKS] = {};
        const float r = next_r;
        float dot = 0;
        rmsnorm_forget(w);
        if (i + 1 < rows) next_r = p.r[start + (i + 1) * apart];
        rmsnorm_copies_wait<STAGES - 1>();
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (first + k * step >= last) continue;
            x[k] = pack_load(place(stage, 0, k)), dy[k] = pack_load(place(stage, 1, k));
            dot += rmsnorm_dot(x[k], dy[k], w[k]);
        }
        dot = warp_sum(dot);
        if (lane < CLUSTER) *cluster.map_shared_rank(&sums[i % 2][rank * warps + warp], lane) = dot;
        __syncwarp();
        cluster_sync();
        const float total = warp_sum(lane < CLUSTER * warps ? sums[i % 2][lane] : 0),
                    scale = total * p.mean * r * r * r;
        rmsnorm_forget(x), rmsnorm_forget(dy);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (first + k * step >= last) continue;
            PackX dres = {};
            if (PACKS > 2) x[k] = pack_load(place(stage, 0, k)), dy[k] = pack_load(place(stage, 1, k));
            if (RESIDUAL) dres = pack_load(place(stage, 2, k));
            pack_store(p.dx + row + first + k * step, rmsnorm_dx(dw[k], x[k], dy[k], dres, w[k], r, scale));
            fetch(i + STAGES, row + STAGES * next, stage, k);
        }
        rmsnorm_copies_end();
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if (first + k * step < last)
            for (int j = 0; j < PACK; j += 4)
                pack_store(p.sums + (size_t)start * p.C + first + k * step + j,
                           Pack<float>{ dw[k][j], dw[k][j + 1], dw[k][j + 2], dw[k][j + 3] });
#endif
}

static void cluster(const Problem* p, int block, cudaStream_t stream) {
    const int columns = (int)ceil_div(p->C / PACK, CLUSTER) * PACK, threads = row_threads(columns, block, MOST);
    with_packs<MOST>(columns, threads, [&](auto packs) {
        const int64_t row = (2 + RESIDUAL) * 16 * (int64_t) decltype(packs)::value * threads;
        with_stages(row, [&](auto stages) {
            auto kernel = cluster_kernel<decltype(packs)::value, decltype(stages)::value>;
            const size_t bytes = (size_t)row * decltype(stages)::value;
            launch_require(rmsnorm_shared(kernel, (int64_t)bytes), "cluster", "half a row fits a block");
            cudaLaunchAttribute size = {};
            size.id = cudaLaunchAttributeClusterDimension;
            size.val.clusterDim.x = CLUSTER, size.val.clusterDim.y = 1, size.val.clusterDim.z = 1;
            cudaLaunchConfig_t config = {};
            config.gridDim = dim3(CLUSTER), config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes;
            config.stream = stream, config.attrs = &size, config.numAttrs = 1;
            int clusters;
            cuda_check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
            clusters = (int)std::min<int64_t>(std::min(clusters, p->blocks), ceil_div(p->N, 8));
            config.gridDim = dim3(CLUSTER * clusters);
            cuda_check(cudaLaunchKernelEx(&config, kernel, *p, columns));
            launch_check();
            add_sums_at_once(p, clusters, stream);
        });
    });
}

static const char* cluster_refuses(const Problem* p) {
    const int columns = (int)ceil_div(p->C / PACK, CLUSTER) * PACK, threads = rmsnorm_threads(columns, MOST);
    if (hopper_refuses()) return hopper_refuses();
    if (threads > 512) return "two times 512 threads hold no row";
    return (2 + RESIDUAL) * 16 * MOST * (int64_t)threads <= most_shared() ? NULL : "half a row fits no block";
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
#ifdef RMSNORM_RESIDUAL
    { "added_apart",      added_apart,      { 256 },                "production without dres, then an add" },
#endif
    { "loops_of_the_cpu", loops_of_the_cpu, { 32, 64, 256 },        "a thread to a row of dx, a thread to a column of dw" },
    { "atomics",          atomics,          { 64, 128, 256, 512 },  "a warp to a row, dw by atomics. Not deterministic" },
    { "two_kernels",      two_kernels,      { 64, 128, 256, 512 },  "dx by rows, then dw by columns" },
    { "block_atomics",    block_atomics,    { 128, 256, 512 },      "blocks walk the rows and keep sums for dw; atomics at the end. Not deterministic", keeps_row },
    { "partial_sums",     partial_sums,     { 128, 256, 512 },      "the blocks' sums are stored, and added in order by a second kernel", keeps_row },
    { "last_block",       last_block,       { 128, 256, 512 },      "... by the block that is done last", keeps_row },
    { "row_ahead",        row_ahead,        { 128, 256, 512 },      "partial_sums, the next row on its way to registers", keeps_two_rows },
    { "pack_each",        pack_each,        { 0 },                  "partial_sums, rows in a ring of three in shared memory (cp.async)", needs_1024_packs },
    { "side_by_side",     side_by_side,     { 128, 192, 256, 512 }, "production, several rows at a time in one block to a multiprocessor", ring_refuses },
    { "one_launch",       one_launch,       { 128, 192, 256, 512 }, "side_by_side, a barrier of the grid in place of the second kernel", ring_refuses },
    { "early_sum",        early_sum,        { 128, 192, 256, 512 }, "side_by_side, the second kernel launched early", early_refuses },
    { "tickets",          tickets,          { 128, 192, 256, 512 }, "side_by_side, rows to who is free. Not deterministic", ring_refuses },
    { "producer_warp",    producer_warp,    { 128, 256, 512 },      "the ring by bulk copies, which a warp of its own asks for", producer_refuses },
    { "cluster",          cluster,          { 128, 256, 512 },      "half a row to each of two blocks that form a cluster", cluster_refuses },
    { "production",       production,       { 0 },                  "llmc/rmsnorm.h: a ring refilled as it is read, a few packs to a thread" },
};
// clang-format on

#ifdef RMSNORM_RESIDUAL
BENCH_MAIN("residual_rmsnorm_backward", shapes, setup, reference, rows, traffic, flops, variants)
#else
BENCH_MAIN("rmsnorm_backward", shapes, setup, reference, rows, traffic, flops, variants)
#endif
