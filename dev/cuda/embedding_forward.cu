/*
Embedding, forward: row n of x is the row of the table that token n names.

    x[n] = w[ids[n]]            x (N, C)    w (V, C)    ids (N)

Counted         each row of w that is named is read once, each row of x written once, and the ids: (distinct + N) * C numbers.
                Text names the same rows again and again; those come from the L2, so that there writing is most of it
The card        an H200 copies 4.30 TB/s: N 16384, C 2048 in bf16 and all ids different, 134 MB, a floor of 31 us
Reached         on an H200, % of a copy, 1B and 8B, text: one_each 23 and 20, row_per_warp 40 and 35, packs 98 and 86, bulk 100
                and 84, production 102 and 90; random tokens: 25 and 23, 45 and 42, 101 and 91, 105 and 92, 103 and 92
Metrics         dram__throughput and what warps wait for, by ncu (results/nvidia-h200/embedding_forward.md), 8B: memory is 16 % busy
                under one_each, 29 under row_per_warp, 70 to 74 under packs, bulk and production
*/
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "llmc/embedding.h"
#include "token_ids.cuh"

// ---- the problem -----------------------------------------------------------------------------

struct Problem {
    int N, C, V;
    int64_t distinct;
    const int32_t* ids;
    const floatX* w;
    floatX* x;
};

static const Shape shapes[] = {
    { .name = "1B, text", .N = 16384, .C = 2048, .V = 128256 },
    { .name = "1B, uniform", .N = 16384, .C = 2048, .V = 128256 },
    { .name = "8B, text", .N = 16384, .C = 4096, .V = 128256 },
    { .name = "8B, uniform", .N = 16384, .C = 4096, .V = 128256 },
    { .name = "one row", .small = true, .N = 1, .C = 8, .V = 3 },
    { .name = "odd", .small = true, .N = 37, .C = 264, .V = 50 },
    { .name = "bytes, text", .small = true, .N = 1000, .C = 768, .V = 260 },
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = {};
    p.N = s->N, p.C = s->C, p.V = s->V;
    const std::vector<int32_t> ids = token_ids(p.N, p.V, strstr(s->name, "text") != NULL);
    p.distinct = token_ids_distinct(ids, p.V);
    p.ids = b->input_from("ids", ids.data(), ids.size());
    p.w = b->input<floatX>("w", (size_t)p.V * p.C);
    p.x = b->output<floatX>("x", (size_t)p.N * p.C);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }
static double traffic(const Problem* p) {
    return (double)(p->distinct + p->N) * p->C * sizeof(floatX) + (double)p->N * sizeof(int32_t);
}
static double flops(const Problem*) { return 0; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const int32_t *ids = b->host_ids(p->ids), zero = 0;
    std::vector<float> x((size_t)p->C);
    for (int64_t n = first; n < first + count; n++) {
        const Tensor row = { (void*)b->host(p->w, (size_t)ids[n] * p->C, p->C), DTYPE_F32 };
        embedding_forward_cpu(x.data(), &zero, row, 1, p->C);
        b->expect(p->x, (size_t)n * p->C, x.data(), p->C);
    }
}

// ---- one_each --------------------------------------------------------------------------------
// idea    one thread for each number of x: which row and which column it is, it finds by a division
// limit   a division and a look-up of the id for 2 bytes

static __global__ void one_each_kernel(floatX* x, const int32_t* ids, const floatX* w, size_t n, int C) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = w[(size_t)ids[i / C] * C + i % C];
}

static void one_each(const Problem* p, int block, cudaStream_t stream) {
    const size_t n = (size_t)p->N * p->C;
    one_each_kernel<<<(unsigned)ceil_div((int64_t)n, block), (unsigned)block, 0, stream>>>(p->x, p->ids, p->w, n, p->C);
    launch_check();
}

// ---- row_per_warp ----------------------------------------------------------------------------
// idea    a warp copies a row: one look-up and no division
// limit   2 bytes a lane: a row of 2048 takes 64 loads of a warp, each of 64 bytes

static __global__ void row_per_warp_kernel(floatX* x, const int32_t* ids, const floatX* w, int N, int C) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    const floatX* from = w + (size_t)ids[n] * C;
    for (int c = lane; c < C; c += WARP) x[(size_t)n * C + c] = from[c];
}

static void row_per_warp(const Problem* p, int block, cudaStream_t stream) {
    row_per_warp_kernel<<<(unsigned)ceil_div(p->N, block / WARP), (unsigned)block, 0, stream>>>(p->x, p->ids, p->w,
                                                                                                p->N, p->C);
    launch_check();
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes a lane: a row of 2048 is 8 loads of a warp, four of them under way. This was llmc/embedding.h
// limit   the look-up before the load: the first bytes of a row come two latencies after the warp has started

static __global__ void packs_kernel(floatX* __restrict__ x, const int32_t* __restrict__ ids,
                                    const floatX* __restrict__ w, int N, int C) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    const floatX* from = w + (size_t)ids[n] * C;
    floatX* to = x + (size_t)n * C;
#pragma unroll 4
    for (int c = lane * PACK; c < C; c += WARP * PACK) pack_store(to + c, pack_load(from + c));
}

static void packs(const Problem* p, int block, cudaStream_t stream) {
    packs_kernel<<<(unsigned)ceil_div(p->N, block / WARP), (unsigned)block, 0, stream>>>(p->x, p->ids, p->w, p->N,
                                                                                         p->C);
    launch_check();
}

// ---- bulk ------------------------------------------------------------------------------------
// idea    the copy engine moves whole rows through shared memory, and no register sees them: a block is one warp, which has
//         the ids of 32 rows at a time and a ring of rows on their way
// limit   memory

enum {
    BULK_SLOTS = 24,
    BULK_BEHIND = 2,
    BULK_BYTES = 112 << 10
}; // rows in the ring; stores that may still be read; of a block

static __global__ void __launch_bounds__(WARP)
    bulk_kernel(floatX* x, const int32_t* ids, const floatX* w, int N, int C, int slots) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char ring[];
    __shared__ uint64_t full[BULK_SLOTS];
    const int lane = threadIdx.x, blocks = gridDim.x, count = (N - (int)blockIdx.x + blocks - 1) / blocks;
    const uint32_t bytes = (uint32_t)(C * sizeof(floatX)), memory = shared_address(ring), bar = shared_address(full);
    const int ahead = slots - BULK_BEHIND;
    if (lane == 0) {
        for (int i = 0; i < slots; i++) mbarrier_init(bar + 8 * i, 1);
        mbarrier_init_done();
    }
    __syncwarp();
    int id = lane < count ? ids[blockIdx.x + lane * blocks] : 0, slot = 0, parity = 0, to = 0;
    // row i goes out while row i + ahead comes in, into the place that row i - BULK_BEHIND has left
    for (int i = -ahead; i < count; i++) {
        const int next = i + ahead, row = __shfl_sync(0xffffffffu, id, next % WARP);
        if (next % WARP == WARP - 1) id = next + 1 + lane < count ? ids[blockIdx.x + (next + 1 + lane) * blocks] : 0;
        if (lane == 0 && i >= 0) {
            mbarrier_wait(bar + 8 * slot, parity);
            bulk_store(x + (size_t)((int)blockIdx.x + i * blocks) * C, memory + slot * bytes, bytes);
            tma_store_commit();
            tma_store_wait_read<BULK_BEHIND>();
        }
        __syncwarp(); // the others wait: uniform registers, which the copy engine takes its orders from, are the whole warp's
        if (lane == 0 && next < count) {
            mbarrier_expect(bar + 8 * to, bytes);
            bulk_load(memory + to * bytes, w + (size_t)row * C, bytes, bar + 8 * to);
        }
        __syncwarp();
        if (i >= 0 && ++slot == slots) slot = 0, parity ^= 1;
        if (++to == slots) to = 0;
    }
    if (lane == 0) tma_store_wait_read<0>();
#endif
}

static int bulk_slots(const Problem* p) {
    const int64_t slots = BULK_BYTES / ((int64_t)p->C * (int64_t)sizeof(floatX));
    return (int)std::min<int64_t>(slots, BULK_SLOTS);
}

static void bulk(const Problem* p, int, cudaStream_t stream) {
    const int slots = bulk_slots(p), blocks = 2 * gpu_processors() < p->N ? 2 * gpu_processors() : p->N;
    cuda_check(cudaFuncSetAttribute(bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BULK_BYTES));
    bulk_kernel<<<(unsigned)blocks, WARP, (size_t)slots * p->C * sizeof(floatX), stream>>>(p->x, p->ids, p->w, p->N,
                                                                                           p->C, slots);
    launch_check();
}

static const char* bulk_refuses(const Problem* p) {
    if (hopper_refuses()) return hopper_refuses();
    return bulk_slots(p) < 2 * BULK_BEHIND ? "too few rows fit in shared memory" : NULL;
}

// ---- production ------------------------------------------------------------------------------
// idea    packs, but a thread takes one of each of four rows: four look-ups are under way together, and so are the four loads
//         that depend on them, in rows of any width
// limit   memory, and the two latencies at the start of each short block

static void production(const Problem* p, int, cudaStream_t stream) {
    embedding_forward(p->x, p->ids, p->w, p->N, p->C, stream);
}

// ---- the table: to add a variant, write it above and add one row ------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "one_each",     one_each,     { 256, 1024 },      "baseline: one thread, one number" },
    { "row_per_warp", row_per_warp, { 128, 256, 512 },  "one look-up for a row" },
    { "packs",        packs,        { 128, 256, 512 },  "16 bytes a lane" },
    { "bulk",         bulk,         { 0 },              "whole rows by the copy engine", bulk_refuses },
    { "production",   production,   { 0 },              "llmc/embedding.h: a pack of each of four rows a thread" },
};
// clang-format on
BENCH_MAIN("embedding_forward", shapes, setup, reference, rows, traffic, flops, variants)
