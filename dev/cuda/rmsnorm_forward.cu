/*
RMSNorm forward: each row is read, its root mean square is taken, and it goes out scaled. residual_rmsnorm_forward.cu measures
the same ideas with the residual add before the norm.

    r = 1 / sqrt(mean(x^2) + eps)       y = w * x * r           x y (N, C)    w (C)    r (N)
    residual                            x = a + b, rounded; stored as sum (N, C)

Bytes           x in, y out, r out: 2*N*C numbers and N floats; with the residual add a, b in and sum, y out: 4*N*C. w stays in
                the caches. The arithmetic, 5 operations a number, is little beside that
Floor           H200, 132 multiprocessors, 4.30 TB/s for a copy; N 16384, bf16: C 2048 31 us, C 4096 62 us, C 8192 125 us, C 16384
                250 us; with the residual add, or in fp32, twice that
What decides    a row must be in before any of it goes out. So all that counts is that other rows are under way meanwhile: 4.30
                TB/s for the 0.8 us that memory takes to answer are 3.4 MB, half of them loads: 13 KB of loads for each
                multiprocessor at any time, and more to be safe
Reached         H200, bf16, % of a copy; "add" with the residual add

                                        C 2048      C 4096      C 16384     add, 2048   add, 4096   add, 16384
                    two_kernels         -           -           -           75.6        76.6        77.8
                    thread_per_row      4.9         4.8         4.7         5.3         5.2         4.9
                    warp_per_row        45.0        37.6        35.4        38.2        37.9        37.3
                    cooperative_groups  65.2        67.9        39.1        59.7        51.7        44.0
                    loads_of_16_bytes   77.0        65.9        65.5        85.5        78.0        75.6
                    rows_in_shared      91.9        88.2        40.0        92.4        86.6        31.7
                    waits_in_shared     95.2        97.6        98.6        96.3        96.1        96.7
                    waits_in_registers  98.1        99.0        98.3        98.9        97.0        97.2
                    marked_as_once      93.3        94.7        93.5        95.7        93.1        93.8
                    ring                92.3        93.7        92.1        95.0        93.1        93.0
                    tickets             73.5        87.4        92.9        87.3        91.5        92.8
                    bulk_copy           85.5        89.4        91.3        89.5        90.8        91.3
                    bulk_rings          88.0        91.3        95.0        93.7        90.7        92.1
                    production          98.1        97.0        98.2        99.1        97.1        97.9

                All loads of a row under way at once reach it. Lost: marks for the caches (stores leave early), rings, tickets
                and the copy engine, which blocks that come and go beat; rows_in_shared where a long row leaves few warps
Metrics         dram__bytes_read (two_kernels: the sum again), lts__t_sectors_op_read (loads_of_16_bytes: the row twice),
                l1tex__average_t_sectors_per_request (32 for thread_per_row), smsp__warps_issue_stalled_long_scoreboard,
                dram__throughput (the limit of the last rows). ncu's figures for each variant stand in
                results/nvidia-h200/rmsnorm_forward.md and residual_rmsnorm_forward.md
*/
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "rmsnorm_rows.cuh"

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

#ifdef RMSNORM_RESIDUAL
enum { RESIDUAL = 1 };
#else
enum { RESIDUAL = 0 };
#endif

// ---- the problem -----------------------------------------------------------------------------

// clang-format off
static const Shape shapes[] = {
    { .name = "1B",         .N = 16384, .C = 2048 },
    { .name = "3B",         .N = 16384, .C = 3072 },
    { .name = "8B",         .N = 16384, .C = 4096 },
    { .name = "70B",        .N = 16384, .C = 8192 },
    { .name = "wide",       .N = 16384, .C = 16384 },
    { .name = "one row",    .small = true, .N = 1,   .C = 8 },
    { .name = "odd",        .small = true, .N = 37,  .C = 264 },
    { .name = "five warps", .small = true, .N = 301, .C = 1288 },
    { .name = "one more",   .small = true, .N = 3,   .C = 2056 },
    { .name = "full packs", .small = true, .N = 530, .C = 4096 },
    { .name = "odd, wide",  .small = true, .N = 141, .C = 16376 },
};
// clang-format on

static const float EPS = 1e-5f;

// what is normed: a, or with RESIDUAL the sum of a and b
struct Problem {
    int N, C;
    const floatX *a, *b, *w;
    floatX *sum, *y;
    float *r, mean;       // mean: 1 / C
    unsigned* rows_taken; // scratch
};

static Problem setup(Bench* b, const Shape* s) {
    const size_t n = (size_t)s->N * s->C;
    Problem p = {};
    p.N = s->N, p.C = s->C, p.mean = 1.0f / s->C;
    p.a = b->input<floatX>(RESIDUAL ? "a" : "x", n, 2, 0.5f);
    if (RESIDUAL) p.b = b->input<floatX>("b", n);
    p.w = b->input<floatX>("w", s->C, 0.3f, 1);
    if (RESIDUAL) p.sum = b->output<floatX>("sum", n);
    p.y = b->output<floatX>("y", n, s->C);
    p.r = b->output<float>("r", s->N, s->C);
    p.rows_taken = b->scratch<unsigned>(1);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const size_t at = (size_t)first * p->C, n = (size_t)count * p->C;
    const float *x = b->host(p->a, at, n), *w = b->host(p->w);
    std::vector<float> sum, y(n), r(count);
    if (RESIDUAL) {
        const float* add = b->host(p->b, at, n);
        for (size_t i = 0; i < n; i++) sum.push_back((float)(floatX)(x[i] + add[i]));
        x = sum.data();
        b->expect(p->sum, at, x, n);
    }
    rmsnorm_forward_cpu(y.data(), r.data(), x, w, (int)count, p->C, EPS);
    b->expect(p->y, at, y.data(), n);
    b->expect(p->r, first, r.data(), count);
}

static double traffic(const Problem* p) {
    return (RESIDUAL ? 4.0 : 2.0) * p->N * p->C * sizeof(floatX) + sizeof(float) * p->N;
}

static double flops(const Problem*) { return 0; }

// ---- production ------------------------------------------------------------------------------

static void production(const Problem* p, int, cudaStream_t stream) {
    if (RESIDUAL)
        residual_rmsnorm_forward(p->sum, p->y, p->r, p->a, p->b, p->w, p->N, p->C, EPS, stream);
    else
        rmsnorm_forward(p->y, p->r, p->a, p->w, p->N, p->C, EPS, stream);
}

#ifdef RMSNORM_RESIDUAL
// ---- two_kernels -----------------------------------------------------------------------------
// idea    with the residual add: one kernel adds, the next one is the plain norm
// limit   the sum is written and read again: 5 arrays move where 4 would do

static __global__ void add_kernel(Problem p, size_t packs) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i < packs * PACK) pack_store(p.sum + i, rmsnorm_add(pack_load_once(p.a + i), pack_load_once(p.b + i)));
}

static void two_kernels(const Problem* p, int block, cudaStream_t stream) {
    const size_t packs = (size_t)p->N * p->C / PACK;
    add_kernel<<<(unsigned)ceil_div((int64_t)packs, block), block, 0, stream>>>(*p, packs);
    launch_check();
    rmsnorm_forward(p->y, p->r, p->sum, p->w, p->N, p->C, EPS, stream);
}
#endif

// ---- thread_per_row --------------------------------------------------------------------------
// idea    the loops of the CPU: a thread takes a row
// limit   neighbouring threads are a row apart, so that a load brings 32 sectors for 32 numbers; and N threads are few: 4 warps
//         to a multiprocessor

// row n by those who call with `first` of their own and the same `step`; total adds up over them
template <typename Total>
__device__ __forceinline__ void by_numbers(const Problem& p, int n, int first, int step, Total total) {
    const size_t row = (size_t)n * p.C;
    float squares = 0;
    for (int c = first; c < p.C; c += step) {
        floatX x = p.a[row + c];
        if (RESIDUAL) p.sum[row + c] = x = from_float<floatX>(to_float(x) + to_float(p.b[row + c]));
        squares += to_float(x) * to_float(x);
    }
    const float r = rsqrtf(total(squares) * p.mean + EPS);
    if (first == 0) p.r[n] = r;
    const floatX* x = RESIDUAL ? p.sum : p.a;
    for (int c = first; c < p.C; c += step)
        p.y[row + c] = from_float<floatX>(to_float(p.w[c]) * (to_float(x[row + c]) * r));
}

static __global__ void thread_per_row_kernel(Problem p) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < p.N) by_numbers(p, n, 0, 1, [](float squares) { return squares; });
}

static void thread_per_row(const Problem* p, int block, cudaStream_t stream) {
    thread_per_row_kernel<<<(unsigned)ceil_div(p->N, block), block, 0, stream>>>(*p);
    launch_check();
}

// ---- warp_per_row ----------------------------------------------------------------------------
// idea    the 32 lanes of a warp take neighbouring numbers, and add up by shuffles
// limit   in bf16 a load brings 64 bytes, half a line, and a row of 4096 takes 128 of them in each of two passes; the second
//         pass waits for the last lane of the first

static __global__ void warp_per_row_kernel(Problem p) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n < p.N) by_numbers(p, n, threadIdx.x % WARP, WARP, warp_sum);
}

static void warp_per_row(const Problem* p, int block, cudaStream_t stream) {
    warp_per_row_kernel<<<(unsigned)ceil_div(p->N, block / WARP), block, 0, stream>>>(*p);
    launch_check();
}

// ---- cooperative_groups ----------------------------------------------------------------------
// idea    4 warps to a row, and so a quarter of the loads one after the other; a group of 128 threads of the library adds up
//         over warps, which shuffles cannot
// limit   still 2 bytes a lane, and two instructions for each of them to move it and to make a float of it

static __global__ void __launch_bounds__(512) cooperative_groups_kernel(Problem p) {
    namespace cg = cooperative_groups;
    __shared__ cg::block_tile_memory<512> memory;
    const auto group = cg::tiled_partition<128>(cg::this_thread_block(memory));
    const int n = blockIdx.x * group.meta_group_size() + group.meta_group_rank();
    if (n < p.N)
        by_numbers(p, n, group.thread_rank(), 128, [&](float x) { return cg::reduce(group, x, cg::plus<float>()); });
}

static void cooperative(const Problem* p, int block, cudaStream_t stream) {
    cooperative_groups_kernel<<<(unsigned)ceil_div(p->N, block / 128), block, 0, stream>>>(*p);
    launch_check();
}

// ---- loads_of_16_bytes -----------------------------------------------------------------------
// idea    a lane takes 8 numbers (4 in fp32) at a time: an eighth of the instructions, 512 bytes to a load of a warp
// limit   the row is read twice. The second time it comes from the L1 or the L2, behind the loads of all other warps

static __global__ void loads_of_16_bytes_kernel(Problem p) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, first = threadIdx.x % WARP * PACK, step = WARP * PACK;
    if (n >= p.N) return;
    const size_t row = (size_t)n * p.C;
    float squares = 0;
#pragma unroll 4
    for (int c = first; c < p.C; c += step) {
        PackX x = pack_load(p.a + row + c);
        if (RESIDUAL) {
            x = rmsnorm_add(x, pack_load(p.b + row + c));
            pack_store(p.sum + row + c, x);
        }
        squares += rmsnorm_squares(x);
    }
    const float r = rsqrtf(warp_sum(squares) * p.mean + EPS);
    if (first == 0) p.r[n] = r;
    const floatX* x = RESIDUAL ? p.sum : p.a;
#pragma unroll 4
    for (int c = first; c < p.C; c += step)
        pack_store(p.y + row + c, rmsnorm_scale(pack_load(x + row + c), r, pack_load(p.w + c)));
}

static void loads_of_16_bytes(const Problem* p, int block, cudaStream_t stream) {
    loads_of_16_bytes_kernel<<<(unsigned)ceil_div(p->N, block / WARP), block, 0, stream>>>(*p);
    launch_check();
}

// ---- rows_in_shared --------------------------------------------------------------------------
// idea    the row waits in shared memory for its r, and is read once. Several rows to a block, a warp to each, have one copy of
//         w beside them
// limit   on its way there each number passes through a register, and a lane has only as many loads under way as the compiler
//         found registers for. At C 4096 a row takes 16 loads of a lane, one after the other or nearly so

static __global__ void __launch_bounds__(1024) rows_in_shared_kernel(Problem p) {
    extern __shared__ int4 shared[]; // w (C), then the rows (rows, C)
    floatX *const w = (floatX*)shared, *const x = w + (size_t)(1 + threadIdx.y) * p.C;
    const int n = blockIdx.x * blockDim.y + threadIdx.y, first = threadIdx.x * PACK, step = WARP * PACK;
    const size_t row = (size_t)n * p.C;
    for (int c = threadIdx.y * step + first; c < p.C; c += blockDim.y * step) pack_store(w + c, pack_load(p.w + c));
    __syncthreads();
    if (n >= p.N) return;
    float squares = 0;
#pragma unroll 4
    for (int c = first; c < p.C; c += step) {
        PackX v = pack_load(p.a + row + c);
        if (RESIDUAL) {
            v = rmsnorm_add(v, pack_load(p.b + row + c));
            pack_store(p.sum + row + c, v);
        }
        pack_store(x + c, v);
        squares += rmsnorm_squares(v);
    }
    const float r = rsqrtf(warp_sum(squares) * p.mean + EPS);
    if (first == 0) p.r[n] = r;
#pragma unroll 4
    for (int c = first; c < p.C; c += step)
        pack_store(p.y + row + c, rmsnorm_scale(pack_load(x + c), r, pack_load(w + c)));
}

static void rows_in_shared(const Problem* p, int block, cudaStream_t stream) {
    int rows = block / WARP;
    const int64_t row = (int64_t)p->C * sizeof(floatX);
    while (rows > 1 && !rmsnorm_shared(rows_in_shared_kernel, (1 + rows) * row)) rows /= 2;
    launch_require(rmsnorm_shared(rows_in_shared_kernel, (1 + rows) * row), "rows_in_shared", "two rows fit a block");
    rows_in_shared_kernel<<<(unsigned)ceil_div(p->N, rows), dim3(WARP, rows), (1 + rows) * row, stream>>>(*p);
    launch_check();
}

// ---- waits_in_shared -------------------------------------------------------------------------
// idea    asynchronous copies (cp.async) bring the row to shared memory past the registers: a block to a row, a thread to 64
//         bytes of it in places of its own, which no barrier guards. All copies of a row are under way at once
// limit   what is not held in registers is read from shared memory, twice. This was llmc/rmsnorm.h, 95 to 98 % of a copy

static __global__ void __launch_bounds__(1024) waits_in_shared_kernel(Problem p) {
    extern __shared__ int4 shared[]; // (rows, C) of a, with RESIDUAL (rows, 2, C) of a and b
    const int n = blockIdx.x * blockDim.y + threadIdx.y, first = threadIdx.x * PACK, step = blockDim.x * PACK;
    const size_t row = (size_t)n * p.C;
    floatX* const place = (floatX*)shared + (RESIDUAL ? 2 : 1) * threadIdx.y * p.C; // of the row
    if (n >= p.N) return;
#pragma unroll 4
    for (int c = first; c < p.C; c += step) {
        rmsnorm_copy(place + c, p.a + row + c);
        if (RESIDUAL) rmsnorm_copy(place + p.C + c, p.b + row + c);
    }
    rmsnorm_copies_end();
    rmsnorm_copies_wait<0>();
    float squares = 0;
#pragma unroll 2
    for (int c = first; c < p.C; c += step) {
        PackX v = pack_load(place + c);
        if (RESIDUAL) {
            v = rmsnorm_add(v, pack_load(place + p.C + c));
            pack_store(place + c, v);
            pack_store(p.sum + row + c, v);
        }
        squares += rmsnorm_squares(v);
    }
    squares = blockDim.y > 1 ? warp_sum(squares) : block_sum(squares);
    const float r = rsqrtf(squares * p.mean + EPS);
    if (threadIdx.x == 0) p.r[n] = r;
#pragma unroll 4
    for (int c = first; c < p.C; c += step)
        pack_store(p.y + row + c, rmsnorm_scale(pack_load(place + c), r, pack_load(p.w + c)));
}

static void waits_in_shared(const Problem* p, int, cudaStream_t stream) {
    const int threads = rmsnorm_threads(p->C, 4), rows = threads == WARP ? 4 : 1;
    const int64_t bytes = (int64_t)rows * (RESIDUAL ? 2 : 1) * p->C * (int64_t)sizeof(floatX);
    launch_require(rmsnorm_shared(waits_in_shared_kernel, bytes), "waits_in_shared", "a row fits a block");
    const unsigned blocks = (unsigned)ceil_div(p->N, rows);
    waits_in_shared_kernel<<<blocks, dim3(std::min(threads, 1024), rows), bytes, stream>>>(*p);
    launch_check();
}

// ---- waits_in_registers ----------------------------------------------------------------------
// idea    the row waits in registers, 2 to 8 packs to a thread, all loads of it under way at once: nothing is read twice
// limit   w is asked for when the sum is known: one more wait, if only for the caches, before anything goes out. This was
//         llmc/rmsnorm.h, 97 to 99 % of a copy; w beside the row, before the sum: from 1 % less to 3 % more

enum { NOTHING, LOADS, LOADS_AND_STORES }; // what is marked

template <int PACKS, int MARKED>
static __global__ void __launch_bounds__(512) marked_kernel(Problem p) {
    const size_t row = (size_t)blockIdx.x * p.C;
    const int step = blockDim.x * PACK, first = threadIdx.x * PACK;
    PackX x[PACKS] = {}, add[PACKS];
    float squares = 0;
    auto load = [](const floatX* from) { return MARKED == NOTHING ? pack_load(from) : pack_load_once(from); };
    auto store = [](floatX* to, PackX v) { MARKED == LOADS_AND_STORES ? pack_store_once(to, v) : pack_store(to, v); };
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const size_t i = row + first + k * step;
        if (first + k * step >= p.C) continue;
        x[k] = load(p.a + i);
        if (RESIDUAL) add[k] = load(p.b + i);
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        if (RESIDUAL && first + k * step < p.C) {
            x[k] = rmsnorm_add(x[k], add[k]);
            store(p.sum + row + first + k * step, x[k]);
        }
        squares += rmsnorm_squares(x[k]);
    }
    const float r = rsqrtf(block_sum(squares) * p.mean + EPS);
    if (first == 0) p.r[blockIdx.x] = r;
    rmsnorm_forget(x);
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = first + k * step;
        if (c < p.C) store(p.y + row + c, rmsnorm_scale(x[k], r, pack_load(p.w + c)));
    }
}

template <int MARKED>
static void marked(const Problem* p, int block, cudaStream_t stream) {
    const int threads = row_threads(p->C, block, 8);
    with_packs<8>(p->C, threads, [&](auto packs) {
        marked_kernel<decltype(packs)::value, MARKED><<<(unsigned)p->N, threads, 0, stream>>>(*p);
        launch_check();
    });
}

static const char* keeps_row(const Problem* p) {
    return rmsnorm_threads(p->C, 8) <= 512 ? NULL : "the registers of 512 threads hold no row";
}

static void waits_in_registers(const Problem* p, int block, cudaStream_t stream) { marked<NOTHING>(p, block, stream); }

// ---- marked_as_once --------------------------------------------------------------------------
// idea    loads and stores say that their lines are not needed again (ld.cs, st.cs): the L2 gives them up first
// limit   what is stored leaves the L2 at once, in small pieces between the loads, where it would have left in larger ones later

static void marked_as_once(const Problem* p, int block, cudaStream_t stream) {
    marked<LOADS_AND_STORES>(p, block, stream);
}

// ---- loads_marked ----------------------------------------------------------------------------
// idea    the loads alone: what is read makes room for what is written
// limit   memory itself

static void loads_marked(const Problem* p, int block, cudaStream_t stream) { marked<LOADS>(p, block, stream); }

// ---- ring ------------------------------------------------------------------------------------
// idea    as many blocks as the GPU runs at a time walk the rows. Each has a ring of rows in shared memory, which asynchronous
//         copies (cp.async) fill past the registers, and refills each place as soon as it has been read for the last time: 2 or 3
//         rows of each block are under way always. w stays in registers
// limit   a block works on one row at a time, with a barrier in the middle: between rows it is the other blocks of the
//         multiprocessor that keep memory busy, and long rows leave room for one

// TICKETS: after the first rows each block takes the next one that nobody has
template <int PACKS, int STAGES, bool TICKETS>
static __global__ void __launch_bounds__(512) ring_kernel(Problem p) {
    enum { ARRAYS = RESIDUAL ? 2 : 1 };
    extern __shared__ int4 shared[]; // (STAGES, ARRAYS, PACKS, threads)
    __shared__ float sums[2][WARP];
    __shared__ int tickets[2];
    const int step = blockDim.x * PACK, first = threadIdx.x * PACK;
    floatX* const ring = (floatX*)shared + first;

    auto place = [&](int stage, int k) { return ring + (size_t)(stage * ARRAYS * PACKS + k) * step; };
    auto fetch = [&](int n, int stage, int k) {
        const size_t at = (size_t)n * p.C + first + k * step;
        if (n >= p.N || first + k * step >= p.C) return;
        rmsnorm_copy(place(stage, k), p.a + at);
        if (RESIDUAL) rmsnorm_copy(place(stage, k + PACKS), p.b + at);
    };
    int rows[STAGES]; // that are in the ring, or on their way: the next one first
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
        rows[stage] = blockIdx.x + stage * gridDim.x;
#pragma unroll
        for (int k = 0; k < PACKS; k++) fetch(rows[stage], stage, k);
        rmsnorm_copies_end();
    }
    PackX w[PACKS] = {};
    int taken = 0; // by thread 0, for the row after the next
    if (TICKETS && threadIdx.x == 0) taken = STAGES * gridDim.x + atomicAdd(p.rows_taken, 1);
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if (first + k * step < p.C) w[k] = pack_load(p.w + first + k * step);

    for (int stage = 0, turn = 0; rows[0] < p.N; turn ^= 1, stage = stage + 1 < STAGES ? stage + 1 : 0) {
        const size_t row = (size_t)rows[0] * p.C;
        PackX x[PACKS] = {};
        float squares = 0;
        rmsnorm_forget(w);
        if (TICKETS && threadIdx.x == 0) {
            tickets[turn] = taken;
            taken = STAGES * gridDim.x + atomicAdd(p.rows_taken, 1);
        }
        rmsnorm_copies_wait<STAGES - 1>();
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int c = first + k * step;
            if (c >= p.C) continue;
            x[k] = pack_load(place(stage, k));
            if (RESIDUAL) {
                x[k] = rmsnorm_add(x[k], pack_load(place(stage, k + PACKS)));
                pack_store(p.sum + row + c, x[k]);
            }
            squares += rmsnorm_squares(x[k]);
        }
        const float r = rsqrtf(rmsnorm_block_sum(squares, sums[turn]) * p.mean + EPS);
        const int after = TICKETS ? tickets[turn] : rows[STAGES - 1] + gridDim.x; // goes to this row's places
        rmsnorm_forget(x);
        if (first == 0) p.r[rows[0]] = r;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int c = first + k * step;
            if (c < p.C) pack_store(p.y + row + c, rmsnorm_scale(x[k], r, w[k]));
            fetch(after, stage, k);
        }
        rmsnorm_copies_end();
#pragma unroll
        for (int i = 0; i < STAGES; i++) rows[i] = i + 1 < STAGES ? rows[i + 1] : after;
    }
}

template <bool TICKETS>
static void ring_any(const Problem* p, int block, cudaStream_t stream) {
    const int threads = row_threads(p->C, block, 8);
    with_packs<8>(p->C, threads, [&](auto packs) {
        const int64_t row = (RESIDUAL ? 2 : 1) * 16 * (int64_t) decltype(packs)::value * threads;
        with_stages(row, [&](auto stages) {
            auto kernel = ring_kernel<decltype(packs)::value, decltype(stages)::value, TICKETS>;
            const size_t bytes = (size_t)row * decltype(stages)::value;
            launch_require(rmsnorm_shared(kernel, (int64_t)bytes), "ring", "a row fits a block");
            const int blocks = std::min(resident_blocks(kernel, threads, bytes), p->N);
            kernel<<<blocks, threads, bytes, stream>>>(*p);
            launch_check();
        });
    });
}

static void ring(const Problem* p, int block, cudaStream_t stream) { ring_any<false>(p, block, stream); }

// ---- tickets ---------------------------------------------------------------------------------
// idea    a block takes the next row that nobody has, by an atomic addition, as a block of a kernel that does not walk would
// limit   the counter is set to 0 before each launch

static void tickets(const Problem* p, int block, cudaStream_t stream) {
    cuda_check(cudaMemsetAsync(p->rows_taken, 0, sizeof *p->rows_taken, stream));
    ring_any<true>(p, block, stream);
}

// ---- bulk_copy -------------------------------------------------------------------------------
// idea    one instruction of one thread brings the whole row to shared memory (cp.async.bulk), and a barrier that counts bytes
//         tells when it is there: no address and no register of any other thread is spent on loads
// limit   each block begins with nothing under way: it makes a barrier, asks, waits for the first byte, and is gone after one row

static __global__ void __launch_bounds__(1024) bulk_copy_kernel(Problem p) {
#ifdef HOPPER_CODE
    extern __shared__ int4 shared[]; // a (C), with RESIDUAL also b (C)
    __shared__ uint64_t full;
    floatX* const place = (floatX*)shared;
    const uint32_t bar = shared_address(&full), bytes = p.C * sizeof(floatX);
    const size_t row = (size_t)blockIdx.x * p.C;
    const int first = threadIdx.x * PACK, step = blockDim.x * PACK;
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        mbarrier_init_done();
        mbarrier_expect(bar, RESIDUAL ? 2 * bytes : bytes);
        bulk_load(shared_address(place), p.a + row, bytes, bar);
        if (RESIDUAL) bulk_load(shared_address(place + p.C), p.b + row, bytes, bar);
    }
    __syncthreads();
    mbarrier_wait(bar, 0);
    float squares = 0;
#pragma unroll 2
    for (int c = first; c < p.C; c += step) {
        PackX v = pack_load(place + c);
        if (RESIDUAL) {
            v = rmsnorm_add(v, pack_load(place + p.C + c));
            pack_store(place + c, v);
            pack_store(p.sum + row + c, v);
        }
        squares += rmsnorm_squares(v);
    }
    const float r = rsqrtf(block_sum(squares) * p.mean + EPS);
    if (first == 0) p.r[blockIdx.x] = r;
#pragma unroll 4
    for (int c = first; c < p.C; c += step)
        pack_store(p.y + row + c, rmsnorm_scale(pack_load(place + c), r, pack_load(p.w + c)));
#endif
}

static void bulk_copy(const Problem* p, int block, cudaStream_t stream) {
    const int threads = row_threads(p->C, block, 1 << 20);
    const int64_t bytes = (RESIDUAL ? 2 : 1) * (int64_t)p->C * sizeof(floatX);
    launch_require(rmsnorm_shared(bulk_copy_kernel, bytes), "bulk_copy", "a row fits a block");
    bulk_copy_kernel<<<(unsigned)p->N, threads, bytes, stream>>>(*p);
    launch_check();
}

static const char* needs_hopper(const Problem*) { return hopper_refuses(); }

// ---- bulk_rings ------------------------------------------------------------------------------
// idea    a ring for each warp, of its own columns, which its first lane keeps filled by bulk copies. y (and the sum) go back to
//         where x came from and leave by bulk copies too: the multiprocessor moves rows in and out like a copy that does nothing
//         else, and its threads never wait for a store. One barrier to a row, in the sum
// limit   y passes through shared memory, and a place is free only once its store has been read from it

template <int PACKS, int STAGES>
static __global__ void __launch_bounds__(512) bulk_rings_kernel(Problem p) {
#ifdef HOPPER_CODE
    enum { ARRAYS = RESIDUAL ? 2 : 1, PART = WARP * PACKS * PACK }; // a warp's columns: PART neighbours
    extern __shared__ int4 shared[];                                // (warps, STAGES, ARRAYS, PART)
    __shared__ uint64_t full[WARP][STAGES];
    __shared__ float sums[2][WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n = blockIdx.x, start = warp * PART;
    const int columns = min(PART, p.C - start); // may be none
    const uint32_t bytes = columns > 0 ? columns * sizeof(floatX) : 0, bar = shared_address(full[warp]);
    const int rows = (p.N - n + (int)gridDim.x - 1) / (int)gridDim.x;
    floatX* const ring = (floatX*)shared + (size_t)warp * STAGES * ARRAYS * PART;

    auto at = [&](int i) {
        return (size_t)(n + (size_t)i * gridDim.x) * p.C + start;
    }; // the columns of row i of the block
    auto fetch = [&](int i) {
        if (i >= rows || !bytes) return;
        const int stage = i % STAGES;
        const uint32_t place = shared_address(ring + stage * ARRAYS * PART);
        mbarrier_expect(bar + 8 * stage, ARRAYS * bytes);
        bulk_load(place, p.a + at(i), bytes, bar + 8 * stage);
        if (RESIDUAL) bulk_load(place + PART * sizeof(floatX), p.b + at(i), bytes, bar + 8 * stage);
    };
    if (lane == 0) {
        for (int stage = 0; stage < STAGES; stage++) mbarrier_init(bar + 8 * stage, 1);
        mbarrier_init_done();
        for (int i = 0; i < STAGES - 2; i++) fetch(i);
    }
    __syncwarp();
    PackX w[PACKS] = {};
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if ((k * WARP + lane) * PACK < columns) w[k] = pack_load(p.w + start + (k * WARP + lane) * PACK);

    for (int i = 0; i < rows; i++) {
        const int stage = i % STAGES;
        floatX* const place = ring + stage * ARRAYS * PART;
        PackX x[PACKS] = {};
        float squares = 0;
        rmsnorm_forget(w);
        if (lane == 0) { // into the place of row i - 2, whose store had all of row i - 1 to read it
            tma_store_wait_read<1>();
            fetch(i + STAGES - 2);
        }
        if (bytes) mbarrier_wait(bar + 8 * stage, i / STAGES % 2);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int c = (k * WARP + lane) * PACK;
            if (c >= columns) continue;
            x[k] = pack_load(place + c);
            if (RESIDUAL) {
                x[k] = rmsnorm_add(x[k], pack_load(place + PART + c));
                pack_store(place + PART + c, x[k]);
            }
            squares += rmsnorm_squares(x[k]);
        }
        const float r = rsqrtf(rmsnorm_block_sum(squares, sums[i % 2]) * p.mean + EPS);
        rmsnorm_forget(x);
        if (threadIdx.x == 0) p.r[n + (size_t)i * gridDim.x] = r;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int c = (k * WARP + lane) * PACK;
            if (c < columns) pack_store(place + c, rmsnorm_scale(x[k], r, w[k]));
        }
        fence_async();
        __syncwarp();
        if (lane == 0 && bytes) {
            bulk_store(p.y + at(i), shared_address(place), bytes);
            if (RESIDUAL) bulk_store(p.sum + at(i), shared_address(place + PART), bytes);
            tma_store_commit();
        }
    }
    tma_store_wait<0>();
#endif
}

static void bulk_rings(const Problem* p, int block, cudaStream_t stream) {
    const int threads = row_threads(p->C, block, 8);
    with_packs<8>(p->C, threads, [&](auto packs) {
        const int64_t row = (RESIDUAL ? 2 : 1) * 16 * (int64_t) decltype(packs)::value * threads;
        auto launch = [&](auto kernel, int stages) {
            const size_t bytes = (size_t)stages * row;
            launch_require(rmsnorm_shared(kernel, (int64_t)bytes), "bulk_rings", "3 rows fit a block");
            const int blocks = std::min(resident_blocks(kernel, threads, bytes), p->N);
            kernel<<<blocks, threads, bytes, stream>>>(*p);
            launch_check();
        };
        if (4 * row <= most_shared())
            launch(bulk_rings_kernel<decltype(packs)::value, 4>, 4);
        else
            launch(bulk_rings_kernel<decltype(packs)::value, 3>, 3);
    });
}

static const char* bulk_rings_refuses(const Problem* p) {
    const int threads = rmsnorm_threads(p->C, 8);
    if (hopper_refuses()) return hopper_refuses();
    if (threads > 512) return "the registers of 512 threads hold no row";
    return 3 * (RESIDUAL ? 2 : 1) * 16 * 8 * (int64_t)threads <= most_shared() ? NULL : "3 rows fit no block";
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
#ifdef RMSNORM_RESIDUAL
    { "two_kernels",        two_kernels,        { 256 },                    "an add, then production's plain norm" },
#endif
    { "thread_per_row",     thread_per_row,     { 32, 64, 256 },            "the loops of the CPU" },
    { "warp_per_row",       warp_per_row,       { 64, 128, 256, 512 },      "neighbouring lanes, neighbouring numbers; shuffles add up" },
    { "cooperative_groups", cooperative,        { 128, 256, 512 },          "4 warps to a row, added up by the library" },
    { "loads_of_16_bytes",  loads_of_16_bytes,  { 64, 128, 256, 512 },      "a warp to a row, 512 bytes to a load" },
    { "rows_in_shared",     rows_in_shared,     { 128, 256, 512 },          "several rows and w in shared memory, read once" },
    { "waits_in_shared",    waits_in_shared,    { 0 },                      "a block to a row, by cp.async past the registers" },
    { "waits_in_registers", waits_in_registers, { 64, 128, 256, 512 },      "a block to a row, a few packs to a thread", keeps_row },
    { "marked_as_once",     marked_as_once,     { 64, 128, 256, 512 },      "its loads marked ld.cs, its stores st.cs", keeps_row },
    { "loads_marked",       loads_marked,       { 64, 128, 256, 512 },      "its loads alone marked ld.cs", keeps_row },
    { "ring",               ring,               { 64, 128, 256, 512 },      "blocks walk the rows, the next ones on their way (cp.async)", keeps_row },
    { "tickets",            tickets,            { 64, 128, 256, 512 },      "ring, rows to who is free", keeps_row },
    { "bulk_copy",          bulk_copy,          { 64, 128, 256, 512 },      "a row is one copy of the copy engine", needs_hopper },
    { "bulk_rings",         bulk_rings,         { 64, 128, 256, 512 },      "a ring for each warp, in and out by the copy engine", bulk_rings_refuses },
    { "production",         production,         { 0 },                      "llmc/rmsnorm.h: the row waits in registers, w beside it" },
};
// clang-format on

#ifdef RMSNORM_RESIDUAL
BENCH_MAIN("residual_rmsnorm_forward", shapes, setup, reference, rows, traffic, flops, variants)
#else
BENCH_MAIN("rmsnorm_forward", shapes, setup, reference, rows, traffic, flops, variants)
#endif
