/*
repeat_kv backward: the gradients of a group's copies are those of one head.

    dx[n, g] = sum of dy[n, h] over the group's heads h = g*G ... g*G + G-1        dy (N, NH, HD)    dx (N, NKV, HD)

Summed in fp32, in the order of the heads, rounded once: the same bits every time, which atomics would not give.

What must move  N*(NKV + NH)*HD numbers, four fifths of them read where G is 4. N 16384, bf16, 32 and 8 heads: HD 64 84 MB,
                20 us at the 4.30 TB/s of a copy on the H200; HD 128 168 MB, 39 us
Not repeating   has no row here either: the backward kernels of our attention add up a group's heads where they have them, in
                registers (attention_flash.cuh), and write dk and dv once. repeat_kv_forward.cu has the bytes saved
Under way       G loads to a thread, and nothing can be stored before the last has come. All must be asked for at once: a loop
                that adds after each load waits G times for the memory
Reached         H200, bf16, % of a copy, HD 64 and 128: one_number 32.5 30.3, packs 96.6 99.1, group_at_once 105.4 105.2,
                copy_engine 96.3 96.9, production 101.0 103.0. Beyond 100, as four fifths are read and reading is the faster half
Metrics         smsp__warps_issue_stalled_long_scoreboard, dram__throughput, l1tex__t_sectors_pipe_lsu_mem_global_op_ld beside
                the requests
*/
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "llmc/repeat_kv.h"
#include "streams.cuh"

// ---- the problem -----------------------------------------------------------------------------

// clang-format off
static const Shape shapes[] = {
    { .name = "1B", .N = 16384, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "8B", .N = 16384, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "one head", .small = true, .N = 1, .NH = 1, .NKV = 1, .HD = 8 },
    { .name = "one shared head", .small = true, .N = 14, .NH = 3, .NKV = 1, .HD = 8 },
    { .name = "G 3", .small = true, .N = 37, .NH = 12, .NKV = 4, .HD = 48 },
    { .name = "G 7", .small = true, .N = 9, .NH = 7, .NKV = 1, .HD = 24 },
    { .name = "G 1", .small = true, .N = 11, .NH = 4, .NKV = 4, .HD = 32 },
    { .name = "G 16", .small = true, .N = 5, .NH = 32, .NKV = 2, .HD = 128 },
    { .name = "70B", .small = true, .N = 19, .NH = 64, .NKV = 8, .HD = 128 },
    { .name = "wide heads", .small = true, .N = 5, .NH = 6, .NKV = 2, .HD = 264 },
};
// clang-format on

struct Problem {
    int N, NH, NKV, HD, G;
    floatX* dx;       // (N, NKV, HD), overwritten
    const floatX* dy; // (N, NH, HD)
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = { s->N, s->NH, s->NKV, s->HD, s->NH / s->NKV, NULL, NULL };
    p.dy = b->input<floatX>("dy", (size_t)p.N * p.NH * p.HD);
    p.dx = b->output<floatX>("dx", (size_t)p.N * p.NKV * p.HD, p.G);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const size_t from = (size_t)p->NH * p->HD, to = (size_t)p->NKV * p->HD;
    float* dx = (float*)allocate(count * to, sizeof *dx);
    repeat_kv_backward_cpu(dx, b->host(p->dy, first * from, count * from), (int)count, p->NH, p->NKV, p->HD);
    b->expect(p->dx, first * to, dx, count * to);
    free(dx);
}

static double traffic(const Problem* p) { return 1.0 * p->N * (p->NKV + p->NH) * p->HD * sizeof(floatX); }
static double flops(const Problem*) { return 0; }

// Shared head s of all rows is the sum of heads s*G … s*G + G-1 of all rows: rows need not be told apart

// ---- one_number ------------------------------------------------------------------------------
// idea    one thread for one number of dx adds its G numbers
// limit   loads of 2 bytes, one after the other

static __global__ void one_number_kernel(floatX* dx, const floatX* dy, unsigned n, unsigned G, unsigned HD) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const floatX* from = dy + (size_t)(i / HD) * G * HD + i % HD;
    float sum = 0;
#pragma unroll 1
    for (unsigned j = 0; j < G; j++) sum += to_float(from[(size_t)j * HD]);
    dx[i] = from_float<floatX>(sum);
}

static void one_number(const Problem* p, int block, cudaStream_t stream) {
    const int64_t n = (int64_t)p->N * p->NKV * p->HD;
    one_number_kernel<<<(unsigned)ceil_div(n, block), block, 0, stream>>>(p->dx, p->dy, (unsigned)n, p->G, p->HD);
    launch_check();
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes of dx to a thread
// limit   a load, eight additions, the next load: of G loads one is under way

static __global__ void packs_kernel(int4* dx, const int4* dy, unsigned packs, unsigned G, unsigned P) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    const int4* from = dy + (size_t)(i / P) * G * P + i % P;
    Widened<int4> sum = {};
#pragma unroll 1
    for (unsigned j = 0; j < G; j++) {
        const Widened<int4> d = widen(hint_load<KEEP>(from + (size_t)j * P));
#pragma unroll
        for (int k = 0; k < PACK; k++) sum.x[k] += d.x[k];
    }
    hint_store<KEEP>(dx + i, narrow(sum));
}

static void packs(const Problem* p, int block, cudaStream_t stream) {
    const unsigned P = (unsigned)(p->HD / PACK), packs = (unsigned)p->N * (unsigned)p->NKV * P;
    packs_kernel<<<(unsigned)ceil_div(packs, block), block, 0, stream>>>(
        reinterpret_cast<int4*>(p->dx), reinterpret_cast<const int4*>(p->dy), packs, p->G, P);
    launch_check();
}

// ---- four_at_once ----------------------------------------------------------------------------
// production's: the loop in steps of four loads, of lines that leave the cache first

// ---- group_at_once ---------------------------------------------------------------------------
// idea    G is known to the compiler where it is 1, 2, 4 or 8: all loads of the group, and of a second pack a block further,
//         before the first addition
// limit   a thread stores a fifth of what it loads, then ends: its block waits for the slowest line of all

enum { GROUP_PACKS = 2 };

template <int G>
static __global__ void group_kernel(int4* dx, const int4* dy, unsigned packs, unsigned P) {
    const unsigned first = blockIdx.x * GROUP_PACKS * blockDim.x + threadIdx.x;
    int4 d[GROUP_PACKS][G] = {};
#pragma unroll
    for (int m = 0; m < GROUP_PACKS; m++) {
        const unsigned i = first + m * blockDim.x;
        const int4* from = dy + (size_t)(i / P) * G * P + i % P;
#pragma unroll
        for (int j = 0; j < G; j++)
            if (i < packs) d[m][j] = hint_load<ONCE>(from + (size_t)j * P);
    }
#pragma unroll
    for (int m = 0; m < GROUP_PACKS; m++) {
        const unsigned i = first + m * blockDim.x;
        Widened<int4> sum = {};
#pragma unroll
        for (int j = 0; j < G; j++) {
            const Widened<int4> dj = widen(d[m][j]);
#pragma unroll
            for (int k = 0; k < PACK; k++) sum.x[k] += dj.x[k];
        }
        if (i < packs) hint_store<KEEP>(dx + i, narrow(sum));
    }
}

static void group_at_once(const Problem* p, int block, cudaStream_t stream) {
    const unsigned P = (unsigned)(p->HD / PACK), packs = (unsigned)p->N * (unsigned)p->NKV * P;
    const auto kernel = p->G == 1   ? group_kernel<1>
                        : p->G == 2 ? group_kernel<2>
                        : p->G == 4 ? group_kernel<4>
                                    : group_kernel<8>;
    kernel<<<(unsigned)ceil_div(packs, GROUP_PACKS * block), block, 0, stream>>>(
        reinterpret_cast<int4*>(p->dx), reinterpret_cast<const int4*>(p->dy), packs, P);
    launch_check();
}

static const char* group_refuses(const Problem* p) {
    return p->G == 1 || p->G == 2 || p->G == 4 || p->G == 8 ? NULL : "compiled for groups of 1, 2, 4 and 8 heads";
}

// ---- copy_engine -----------------------------------------------------------------------------
// idea    the heads of some groups are one run of bytes: Hopper's copy engine brings up to 16 KB of them at a command, four
//         runs under way for each block, and takes the sums back as one run
// limit   two barriers of the block for each run, and numbers pass through shared memory

enum { STAGES = 4, STAGE_BYTES = 16384, ENGINE_THREADS = 128 };

// tile k of this block is shared heads tile_heads * (blockIdx.x + k * gridDim.x) …, of `heads`. sums: one more than loads may
// still be read, hence two
static __global__ void __launch_bounds__(ENGINE_THREADS)
    copy_engine_kernel(floatX* dx, const floatX* dy, unsigned heads, unsigned tile_heads, unsigned G, unsigned HD) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char shared[]; // [STAGES][STAGE_BYTES] of dy, [2][STAGE_BYTES] of dx
    __shared__ uint64_t full[STAGES];
    const unsigned tiles = (heads + tile_heads - 1) / tile_heads, P = HD / PACK;
    const unsigned mine = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x; // at least one
    auto first = [&](unsigned k) { return (blockIdx.x + k * gridDim.x) * tile_heads; };
    auto held = [&](unsigned k) { return min(tile_heads, heads - first(k)); };
    auto fetch = [&](unsigned k) { // thread 0
        const uint32_t bar = shared_address(&full[k % STAGES]), bytes = held(k) * G * HD * (uint32_t)sizeof(floatX);
        mbarrier_expect(bar, bytes);
        bulk_load(shared_address(shared) + k % STAGES * STAGE_BYTES, dy + (size_t)first(k) * G * HD, bytes, bar);
    };
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) mbarrier_init(shared_address(&full[s]), 1);
        mbarrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (unsigned k = 0; k < STAGES && k < mine; k++) fetch(k);
    for (unsigned k = 0; k < mine; k++) {
        const int4* from = reinterpret_cast<const int4*>(shared + k % STAGES * STAGE_BYTES);
        int4* to = reinterpret_cast<int4*>(shared + (STAGES + k % 2) * STAGE_BYTES);
        mbarrier_wait(shared_address(&full[k % STAGES]), k / STAGES % 2);
        if (threadIdx.x == 0) tma_store_wait_read<1>(); // the sums before the last have left their place
        __syncthreads();
        for (unsigned i = threadIdx.x; i < held(k) * P; i += ENGINE_THREADS) {
            Widened<int4> sum = {};
            for (unsigned j = 0; j < G; j++) {
                const Widened<int4> d = widen(from[(i / P * G + j) * P + i % P]);
#pragma unroll
                for (int n = 0; n < PACK; n++) sum.x[n] += d.x[n];
            }
            to[i] = narrow(sum);
        }
        fence_async();
        __syncthreads(); // the sums are there, and nobody reads this stage any more
        if (threadIdx.x != 0) continue;
        bulk_store(dx + (size_t)first(k) * HD, shared_address(to), held(k) * HD * (uint32_t)sizeof(floatX));
        tma_store_commit();
        if (k + STAGES < mine) fetch(k + STAGES);
    }
    if (threadIdx.x == 0) tma_store_wait<0>();
#endif
}

static void copy_engine(const Problem* p, int, cudaStream_t stream) {
    const int64_t heads = (int64_t)p->N * p->NKV,
                  tile_heads = STAGE_BYTES / ((int64_t)p->G * p->HD * (int)sizeof(floatX));
    const int64_t tiles = ceil_div(heads, tile_heads);
    const int shared = (STAGES + 2) * STAGE_BYTES;
    cuda_check(cudaFuncSetAttribute(copy_engine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    const int64_t held = resident_blocks(copy_engine_kernel, ENGINE_THREADS, shared);
    copy_engine_kernel<<<(unsigned)(tiles < held ? tiles : held), ENGINE_THREADS, shared, stream>>>(
        p->dx, p->dy, (unsigned)heads, (unsigned)tile_heads, (unsigned)p->G, (unsigned)p->HD);
    launch_check();
}

static const char* engine_refuses(const Problem* p) {
    return p->G * p->HD * (int)sizeof(floatX) > STAGE_BYTES ? "a group's heads are more than a stage holds"
                                                            : hopper_refuses();
}

// ---- production ------------------------------------------------------------------------------
// the last idea is not to repeat: see the head

static void production(const Problem* p, int, cudaStream_t stream) {
    repeat_kv_backward(p->dx, p->dy, p->N, p->NH, p->NKV, p->HD, stream);
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "one_number",    one_number,     { 256, 512 },       "a thread for each number of dx" },
    { "packs",         packs,          { 128, 256, 512 },  "16 bytes of dx to a thread, one load at a time" },
    { "group_at_once", group_at_once,  { 128, 256, 512 },  "all loads of two packs' groups before the first addition", group_refuses },
    { "copy_engine",   copy_engine,    { 0 },              "TMA reads runs of groups, four under way for a block", engine_refuses },
    { "production",    production,     { 0 },              "llmc/repeat_kv.h: four loads at once. Training does not call it: attention adds up a group's heads itself and saves all of these bytes" },
};
// clang-format on
BENCH_MAIN("repeat_kv_backward", shapes, setup, reference, rows, traffic, flops, variants)
