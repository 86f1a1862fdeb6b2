/*
repeat_kv forward: every query head gets its own copy of the key or value head that its group shares.

    y[n, h] = x[n, h / G]           G = NH / NKV            x (N, NKV, HD)    y (N, NH, HD)

What must move  N*(NKV + NH)*HD numbers, a fifth of them read where G is 4. N 16384, bf16, 32 and 8 heads: HD 64 84 MB, 20 us at
                the 4.30 TB/s of a copy on the H200; HD 128 168 MB, 39 us
Not repeating   is the last variant, and has no row, because it launches nothing: our attention reads query head h's keys at
                shared head h / G (llmc/attention.h). What that saves, for keys and for values, in each layer, N 16384:

                          moved by a kernel of this file     kept for the backward pass    and moved again there
                1B        2 *  84 MB   2 * 20 us             2 *  67 MB instead of 2 * 17  2 *  84 MB
                8B        2 * 168 MB   2 * 39 us             2 * 134 MB instead of 2 * 34  2 * 168 MB

                and the attention that follows reads a quarter of the keys and values: the tiles of a group's four heads are
                the same lines of the L2 cache
Writes          four fifths of the bytes are written, of a copy half: memory takes writes less readily than reads, and this op
                is measured by a copy
Reached         H200, bf16, % of a copy, HD 64 and 128: one_number 21 21, head_per_warp 42 47, packs 93 90, stores_once 91 94,
                copy_engine 93 90, production 94 90 (95 in another run). Once loads are wide, writing is the end
Metrics         lts__t_sectors_op_write beside dram__sectors_write, l1tex__t_sectors_pipe_lsu_mem_global_op_ld (x once or G
                times), l1tex__t_requests_pipe_lsu_mem_global_op_st
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
    { .name = "70B", .small = true, .N = 19, .NH = 64, .NKV = 8, .HD = 128 },
    { .name = "wide heads", .small = true, .N = 5, .NH = 6, .NKV = 2, .HD = 264 },
};
// clang-format on

struct Problem {
    int N, NH, NKV, HD, G;
    floatX* y;       // (N, NH, HD), overwritten
    const floatX* x; // (N, NKV, HD)
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = { s->N, s->NH, s->NKV, s->HD, s->NH / s->NKV, NULL, NULL };
    p.x = b->input<floatX>("x", (size_t)p.N * p.NKV * p.HD);
    p.y = b->output<floatX>("y", (size_t)p.N * p.NH * p.HD);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const size_t from = (size_t)p->NKV * p->HD, to = (size_t)p->NH * p->HD;
    float* y = (float*)allocate(count * to, sizeof *y);
    repeat_kv_forward_cpu(y, b->host(p->x, first * from, count * from), (int)count, p->NH, p->NKV, p->HD);
    b->expect(p->y, first * to, y, count * to);
    free(y);
}

static double traffic(const Problem* p) { return 1.0 * p->N * (p->NKV + p->NH) * p->HD * sizeof(floatX); }
static double flops(const Problem*) { return 0; }

// Shared head s of all rows goes to heads s*G … s*G + G-1 of all rows: rows need not be told apart

// ---- one_number ------------------------------------------------------------------------------
// idea    one thread for one number of y
// limit   loads and stores of 2 bytes, two quotients for each

static __global__ void one_number_kernel(floatX* y, const floatX* x, unsigned n, unsigned G, unsigned HD) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[(size_t)(i / HD / G) * HD + i % HD];
}

static void one_number(const Problem* p, int block, cudaStream_t stream) {
    const int64_t n = (int64_t)p->N * p->NH * p->HD;
    one_number_kernel<<<(unsigned)ceil_div(n, block), block, 0, stream>>>(p->y, p->x, (unsigned)n, p->G, p->HD);
    launch_check();
}

// ---- head_per_warp ---------------------------------------------------------------------------
// idea    a warp copies a head, 4 bytes to a lane: one quotient for 64 numbers, requests of 128 bytes
// limit   one load and one store of 4 bytes for each lane, then the warp is over: most of its life is being started

static __global__ void head_per_warp_kernel(uint32_t* y, const uint32_t* x, unsigned heads, unsigned G,
                                            unsigned words) {
    const unsigned h = blockIdx.x * blockDim.y + threadIdx.y;
    if (h >= heads) return;
    for (unsigned i = threadIdx.x; i < words; i += WARP) y[(size_t)h * words + i] = x[(size_t)(h / G) * words + i];
}

static void head_per_warp(const Problem* p, int block, cudaStream_t stream) {
    const unsigned heads = (unsigned)p->N * (unsigned)p->NH, words = (unsigned)(p->HD * sizeof(floatX) / 4);
    head_per_warp_kernel<<<(unsigned)ceil_div(heads, block / WARP), dim3(WARP, block / WARP), 0, stream>>>(
        reinterpret_cast<uint32_t*>(p->y), reinterpret_cast<const uint32_t*>(p->x), heads, p->G, words);
    launch_check();
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes of y to a thread: neighbouring threads write neighbouring packs through all of y
// limit   x is read G times; the caches keep that from memory, but not from the load units

template <Hint STORE>
static __global__ void packs_kernel(int4* y, const int4* x, unsigned packs, unsigned G, unsigned P) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < packs) hint_store<STORE>(y + i, x[(size_t)(i / P / G) * P + i % P]);
}

static void packs(const Problem* p, int block, cudaStream_t stream) {
    const unsigned P = (unsigned)(p->HD / PACK), packs = (unsigned)p->N * (unsigned)p->NH * P;
    packs_kernel<KEEP><<<(unsigned)ceil_div(packs, block), block, 0, stream>>>(
        reinterpret_cast<int4*>(p->y), reinterpret_cast<const int4*>(p->x), packs, p->G, P);
    launch_check();
}

// ---- read_once -------------------------------------------------------------------------------
// production's kernel: 16 bytes of x to a thread, and the G places of y that they belong to

// ---- stores_once -----------------------------------------------------------------------------
// idea    the same, and what is written leaves the caches first
// limit   what the next kernel would have found in the cache goes to memory at once. The memory's rate of writing is the end

static __global__ void stores_once_kernel(int4* y, const int4* x, unsigned packs, unsigned G, unsigned P) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    const int4 v = hint_load<ONCE>(x + i);
    int4* to = y + (size_t)(i / P) * G * P + i % P;
    for (unsigned j = 0; j < G; j++) hint_store<ONCE>(to + (size_t)j * P, v);
}

static void stores_once(const Problem* p, int block, cudaStream_t stream) {
    const unsigned P = (unsigned)(p->HD / PACK), packs = (unsigned)p->N * (unsigned)p->NKV * P;
    stores_once_kernel<<<(unsigned)ceil_div(packs, block), block, 0, stream>>>(
        reinterpret_cast<int4*>(p->y), reinterpret_cast<const int4*>(p->x), packs, p->G, P);
    launch_check();
}

// ---- copy_engine -----------------------------------------------------------------------------
// idea    no number passes through a register: Hopper's copy engine brings a run of shared heads, up to 8 KB, to shared memory
//         and writes it to y G times, each time to every G-th head: y is (N*NKV, G, HD) to it, a tensor map. A warp, of which
//         one lane gives commands
// limit   the memory's rate of writing

enum { STAGES = 4, STAGE_BYTES = 8192 };

// tile k of this block is shared heads tile_heads * (blockIdx.x + k * gridDim.x) …, of `heads`
static __global__ void __launch_bounds__(WARP)
    copy_engine_kernel(const __grid_constant__ CUtensorMap y, const floatX* x, unsigned heads, unsigned tile_heads,
                       int G, unsigned HD) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char stages[]; // [STAGES][STAGE_BYTES]
    __shared__ uint64_t full[STAGES];
    if (threadIdx.x != 0) return;
    const unsigned tiles = (heads + tile_heads - 1) / tile_heads;
    const unsigned mine = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x; // at least one
    auto first = [&](unsigned k) { return (blockIdx.x + k * gridDim.x) * tile_heads; };
    auto bar = [&](unsigned k) { return shared_address(&full[k % STAGES]); };
    auto stage = [&](unsigned k) { return shared_address(stages) + k % STAGES * STAGE_BYTES; };
    auto fetch = [&](unsigned k) {
        const uint32_t bytes = min(tile_heads, heads - first(k)) * HD * (uint32_t)sizeof(floatX);
        mbarrier_expect(bar(k), bytes);
        bulk_load(stage(k), x + (size_t)first(k) * HD, bytes, bar(k));
    };
    for (int s = 0; s < STAGES; s++) mbarrier_init(shared_address(&full[s]), 1);
    mbarrier_init_done();
    for (unsigned k = 0; k < STAGES - 1 && k < mine; k++) fetch(k);
    for (unsigned k = 0; k < mine; k++) {
        mbarrier_wait(bar(k), k / STAGES % 2);
        fence_async();
        for (int j = 0; j < G; j++)
            tma_store(&y, stage(k), 0, j, (int)first(k)); // heads beyond the last are not written
        tma_store_commit();
        if (k + STAGES - 1 >= mine) continue;
        tma_store_wait_read<1>(); // the stage before this one has been read
        fetch(k + STAGES - 1);
    }
    tma_store_wait<0>();
#endif
}

static void copy_engine(const Problem* p, int, cudaStream_t stream) {
    const int64_t heads = (int64_t)p->N * p->NKV, fit = STAGE_BYTES / (p->HD * (int64_t)sizeof(floatX));
    const int64_t tile_heads = fit < 256 ? fit : 256, tiles = ceil_div(heads, tile_heads);
    const int64_t sizes[3] = { p->HD, p->G, heads }, strides[2] = { p->HD, (int64_t)p->G * p->HD };
    const int box[3] = { p->HD, 1, (int)tile_heads }, shared = STAGES * STAGE_BYTES;
    const CUtensorMap map = tma_map(p->y, 3, sizes, strides, box, 0);
    cuda_check(cudaFuncSetAttribute(copy_engine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    const int64_t held = resident_blocks(copy_engine_kernel, WARP, shared);
    copy_engine_kernel<<<(unsigned)(tiles < held ? tiles : held), WARP, shared, stream>>>(
        map, p->x, (unsigned)heads, (unsigned)tile_heads, p->G, (unsigned)p->HD);
    launch_check();
}

static const char* engine_refuses(const Problem* p) {
    return p->HD > 256 ? "a box of the copy engine is at most 256 numbers wide" : hopper_refuses();
}

// ---- production ------------------------------------------------------------------------------
// the last idea is not to repeat: see the head

static void production(const Problem* p, int, cudaStream_t stream) {
    repeat_kv_forward(p->y, p->x, p->N, p->NH, p->NKV, p->HD, stream);
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "one_number",    one_number,     { 256, 512 },            "a thread for each number of y" },
    { "head_per_warp", head_per_warp,  { 128, 256, 512 },       "a warp for each head of y, 4 bytes a lane" },
    { "packs",         packs,          { 128, 256, 512 },       "16 bytes of y to a thread, x is read G times" },
    { "stores_once",   stores_once,    { 128, 256, 512 },       "16 bytes of x to a thread, written G times, stores leave the cache first" },
    { "copy_engine",   copy_engine,    { 0 },                   "TMA reads runs of heads and writes each G times", engine_refuses },
    { "production",    production,     { 0 },                   "llmc/repeat_kv.h: x is read once. Training does not call it: attention reads shared heads where they lie and saves all of these bytes" },
};
// clang-format on
BENCH_MAIN("repeat_kv_forward", shapes, setup, reference, rows, traffic, flops, variants)
