/*
Attention in generation: one query a sequence over a long cache of keys and values.

    s[j] = q . k[j] / sqrt(HD)      out = sum over j < length of softmax_j(s) * v[j]        for each sequence and query head

    q out (B, NH*HD)        cache (B, T, 2*NKV*HD): row j holds k[j], then v[j], of all kv heads; length[b] <= T rows count

Bound by        memory: each number of the cache is used for one product with each of the G = NH / NKV heads of its group
Bytes           K and V once: 2*NKV*HD numbers a cached token, 4096 bytes for 8B's shape in bf16; 16 sequences of 8192 tokens
                are 537 MB. All else (q, out, what splits leave behind) is less than a hundredth of that
The floor       an H200 (132 multiprocessors) copies 4.30 TB/s: 125 us. A multiprocessor then takes in 19 bytes a cycle, and one
                byte waits about 1 us: 33 KB must be under way on each, all the time
Measured        H200, bf16, us (TB/s), all in one run

                                        8B              8B one long     8B one short    1B
                block_a_head            28852 (0.02)    14404           455             24125
                lanes_share_a_key       530 (1.01)      4092            135             277 (0.97)
                heads_share_loads       517 (1.04)      4063            135             255 (1.05)
                split_cache             298 (1.81)      157 (1.71)      19              153 (1.75)
                ring                    127 (4.24)      70 (3.86)       12              68 (3.95)
                paged                   128 (4.21)      70 (3.82)       12              71 (3.79)
                production              -               69 (3.88)       12              -
                FlashAttention-2        133 (4.04)      83 (3.23)       17              81 (3.32)
                cuDNN (torch)           124 (4.33)      70 (3.84)       13              72 (3.72)
                a copy                  127 (4.23)      65 (4.15)       6 (1.37)        65 (4.15)

Look at         dram__bytes_read.sum.per_second; lts__t_sectors (heads that read the same K and V again);
                sm__warps_active (blocks that end before others); smsp__inst_executed and the stall reasons
                long_scoreboard (too few bytes under way), math_pipe (lanes) against those of ring
*/
#define YARDSTICK "ring" // of several sequences, which production does not take
#include "bench.cuh"

#include "llmc/attention.h"
#include "llmc/attention_cached.cuh"

// ---- the problem: what is allocated, what is right, what must move ----------------------------

static const Shape shapes[] = {
    { .name = "8B", .B = 16, .T = 8192, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "8B one long", .B = 1, .T = 65536, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "8B one short", .B = 1, .T = 2048, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "1B", .B = 16, .T = 8192, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "one token", .small = true, .B = 1, .T = 1, .NH = 1, .NKV = 1, .HD = 64 },
    { .name = "odd", .small = true, .B = 3, .T = 201, .NH = 6, .NKV = 2, .HD = 64 },
    { .name = "many heads", .small = true, .B = 2, .T = 700, .NH = 22, .NKV = 2, .HD = 128 },
    { .name = "no groups", .small = true, .B = 5, .T = 1030, .NH = 4, .NKV = 4, .HD = 128 },
    { .name = "one odd", .small = true, .B = 1, .T = 333, .NH = 6, .NKV = 2, .HD = 64 },
    { .name = "one of many heads", .small = true, .B = 1, .T = 2100, .NH = 22, .NKV = 1, .HD = 128 },
};

enum { PAGE = 64 }; // tokens

struct Problem {
    int B, T, NH, NKV, HD, pages; // pages of a sequence, those behind its length not used
    floatX *q, *cache, *pool, *out;
    int32_t *length, *table; // table (B, pages): where in the pool (pages of PAGE rows) a page of a sequence lies
    const int32_t* host_length;
    double tokens; // of all sequences
    float* scratch;
};

static size_t row_of(const Problem* p) { return (size_t)2 * p->NKV * p->HD; }

// the cache again, cut into pages that lie in any order
static void make_pages(Bench* bench, Problem* p) {
    const size_t row = row_of(p), used = (size_t)p->B * p->pages;
    const floatX* cache = bench->stored(p->cache);
    int32_t* table = (int32_t*)allocate(used, sizeof *table);
    floatX* pool = (floatX*)allocate(used * PAGE * row, sizeof *pool);
    for (size_t i = 0; i < used; i++) table[i] = (int32_t)i;
    for (size_t i = used - 1; i > 0; i--) std::swap(table[i], table[random_bits(bench->seed, 77, i) % (i + 1)]);
#pragma omp parallel for
    for (int64_t i = 0; i < (int64_t)used; i++) {
        const size_t b = (size_t)i / p->pages, t = (size_t)i % p->pages * PAGE;
        const size_t n = std::min<size_t>(PAGE, p->T - t) * row;
        memcpy(pool + (size_t)table[i] * PAGE * row, cache + (b * p->T + t) * row, n * sizeof *pool);
        memset((void*)(pool + (size_t)table[i] * PAGE * row + n), 0xff, (PAGE * row - n) * sizeof *pool); // NaN
    }
    p->table = bench->input_from<int32_t>("table", table, used);
    p->pool = bench->input_from<floatX>("pool", pool, used * PAGE * row);
    free(table), free(pool);
}

static Problem setup(Bench* bench, const Shape* s) {
    Problem p;
    p.B = s->B, p.T = s->T, p.NH = s->NH, p.NKV = s->NKV, p.HD = s->HD, p.pages = (int)ceil_div(s->T, PAGE);
    // of deviation 2: scores deviate by 4, so that a query looks at a few keys; a mean of thousands would be too small to be wrong
    p.q = bench->input<floatX>("q", (size_t)p.B * p.NH * p.HD, 2);
    p.cache = bench->input<floatX>("cache", (size_t)p.B * p.T * row_of(&p), 2);
    int32_t* length = (int32_t*)allocate((size_t)p.B, sizeof *length);
    p.tokens = 0;
    for (int b = 0; b < p.B; b++) { // real shapes: all T, small ones: any, the last T
        length[b] =
            s->small && b < p.B - 1 ? 1 + (int32_t)(random_bits(bench->seed, 78, (uint64_t)b) % (uint64_t)p.T) : p.T;
        p.tokens += length[b];
    }
    p.length = bench->input_from<int32_t>("length", length, (size_t)p.B);
    p.host_length = bench->host_ids(p.length);
    free(length);
    make_pages(bench, &p);
    p.out = bench->output<floatX>("out", (size_t)p.B * p.NH * p.HD, p.T, 1); // powers are rounded to be factors
    p.scratch = bench->scratch<float>((size_t)p.B * p.NH * CACHED_SPLITS * (p.HD + 2));
    return p;
}

// a row is a sequence
static int64_t rows(const Problem* p) { return p->B; }

static void reference(Bench* bench, const Problem* p, int64_t first, int64_t count) {
    const size_t size = (size_t)p->NH * p->HD, row = row_of(p);
    float* out = (float*)allocate(size, sizeof *out);
    for (int64_t b = first; b < first + count; b++) {
        const int n = p->host_length[b];
        const float* k = bench->host(p->cache, (size_t)b * p->T * row, (size_t)n * row);
        attention_forward_cpu(out, NULL, bench->host(p->q) + b * size, k, k + row / 2, 1, 1, n, n - 1, p->NH, p->NKV,
                              p->HD, (int)size, (int)row);
        bench->expect(p->out, (size_t)b * size, out, size);
    }
    free(out);
}

static double traffic(const Problem* p) { return p->tokens * (double)row_of(p) * sizeof(floatX); }
static double flops(const Problem*) { return 0; }

// ---- block_a_head -----------------------------------------------------------------------------
// idea    the simplest right kernel, in llmc/attention_cached.cuh still that of several queries at once and of fp32: a block a
//         query head, a thread a key for the scores, a thread a column for the sums
// limit   one sequence a launch, so 32 blocks for 132 multiprocessors; a thread reads its key 2 bytes at a time, 4 KB from its
//         neighbour's; four barriers for 256 keys: 0.02 TB/s

static void block_a_head(const Problem* p, int, cudaStream_t stream) {
    const size_t size = (size_t)p->NH * p->HD;
    for (int b = 0; b < p->B; b++)
        cached_simple(p->out + b * size, p->q + b * size, p->cache + (size_t)b * p->T * row_of(p), 1,
                      p->host_length[b] - 1, p->NH, p->NKV, p->HD, (int)size, stream);
}

// ---- what a kernel reads and writes -----------------------------------------------------------
// Partial results of splits, and how they are put together: llmc/attention_cached.cuh

struct Decode {
    floatX* out;
    float* part; // (B, NH, splits, HD + 2): o, m, l. Not used when there is one split
    const floatX *q, *cache;
    const int32_t* length;
    int T, NH, NKV;
    float scale; // with the factor log2(e)
};

// ---- lanes: three variants of one kernel ------------------------------------------------------
// HD / PACK neighbouring lanes share a key: each reads 16 bytes of k and of v. A warp has 32 * PACK / HD keys at a time, each such
// group of lanes its own online softmax; all groups of the block are put together at the end

template <int HD, int HEADS>
static __global__ void __launch_bounds__(256) lanes_kernel(Decode d) {
    constexpr int LANES = HD / PACK, KEYS = WARP / LANES;
    extern __shared__ float lanes_memory[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int G = d.NH / d.NKV, blocks = (G + HEADS - 1) / HEADS; // blocks that share a kv head; HEADS 1: G
    const int g = blockIdx.y / blocks, h0 = g * G + blockIdx.y % blocks * HEADS, heads = min(HEADS, (g + 1) * G - h0);
    const int b = blockIdx.z, column = lane % LANES * PACK;
    const size_t row = (size_t)2 * d.NKV * HD;
    const floatX* k = d.cache + (size_t)b * d.T * row + (size_t)g * HD + column;
    const floatX* v = k + row / 2;
    float q[HEADS][PACK], o[HEADS][PACK] = {}, m[HEADS], l[HEADS] = {};
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        m[h] = -INFINITY;
        const PackX x = pack_load(d.q + ((size_t)b * d.NH + h0 + min(h, heads - 1)) * HD + column);
#pragma unroll
        for (int i = 0; i < PACK; i++) q[h][i] = x.get(i) * d.scale;
    }
    int first, last;
    cached_split(d.length[b], KEYS * warps, &first, &last);
    for (int j0 = first + warp * KEYS; j0 < last; j0 += KEYS * warps) {
        const int j = j0 + lane / LANES;
        const size_t at = (size_t)min(j, last - 1) * row;
        const PackX key = pack_load_once(k + at), value = pack_load_once(v + at);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float s = 0;
#pragma unroll
            for (int i = 0; i < PACK; i++) s += q[h][i] * key.get(i);
#pragma unroll
            for (int offset = LANES / 2; offset; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
            if (j < last) {
                const float top = fmaxf(m[h], s), rescale = exp2f(m[h] - top), p = exp2f(s - top);
                m[h] = top, l[h] = l[h] * rescale + p;
#pragma unroll
                for (int i = 0; i < PACK; i++) o[h][i] = o[h][i] * rescale + p * value.get(i);
            }
        }
    }
    const int groups = warps * KEYS, group = warp * KEYS + lane / LANES;
    float *m_all = lanes_memory, *l_all = m_all + groups * HEADS, *o_all = l_all + groups * HEADS;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (lane % LANES == 0) m_all[group * HEADS + h] = m[h], l_all[group * HEADS + h] = l[h];
#pragma unroll
        for (int i = 0; i < PACK; i++) o_all[(group * HEADS + h) * HD + column + i] = o[h][i];
    }
    __syncthreads();
    cached_merge<HD>(d.out, d.part, (size_t)b * d.NH + h0, heads, o_all, m_all, l_all, groups, HEADS);
}

template <int HD, int HEADS>
static void lanes_launch(const Problem* p, int splits, int block, cudaStream_t stream) {
    const int groups = block / (HD / PACK), G = p->NH / p->NKV;
    const size_t shared = (size_t)groups * HEADS * (HD + 2) * sizeof(float);
    const dim3 grid((unsigned)splits, (unsigned)(p->NKV * ceil_div(G, HEADS)), (unsigned)p->B);
    cuda_check(cudaFuncSetAttribute(lanes_kernel<HD, HEADS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    lanes_kernel<HD, HEADS><<<grid, block, shared, stream>>>(Decode{
        p->out, p->scratch, p->q, p->cache, p->length, p->T, p->NH, p->NKV, 1.4426950408889634f / sqrtf((float)HD) });
    launch_check();
    if (splits > 1) cached_add<HD>(p->out, p->scratch, p->B * p->NH, splits, false, stream);
}

template <int HEADS>
static void lanes(const Problem* p, int splits, int block, cudaStream_t stream) {
    if (p->HD == 64)
        lanes_launch<64, HEADS>(p, splits, block, stream);
    else
        lanes_launch<128, HEADS>(p, splits, block, stream);
}

// ---- lanes_share_a_key ------------------------------------------------------------------------
// idea    16 bytes a lane and load, neighbouring lanes on neighbouring bytes; no barrier before the end; all sequences in one
//         grid: 55 to 87 times as fast for 16 sequences, 3.5 times for one
// limit   the heads of a group read the same keys and values, each for itself: 4 times the bytes through L2, from memory too
//         when their blocks drift apart

static void lanes_share_a_key(const Problem* p, int block, cudaStream_t stream) { lanes<1>(p, 1, block, stream); }

// ---- heads_share_loads ------------------------------------------------------------------------
// idea    a block works for 4 heads of a group: what is loaded is used 4 times. It gains 8 % at most
// limit   a quarter of the blocks: one for each kv head and sequence. A single sequence has 8, for 132 multiprocessors, and 16
//         have 128, one block of 8 warps to a multiprocessor

enum { SHARED_HEADS = 4 };

static void heads_share_loads(const Problem* p, int block, cudaStream_t stream) {
    lanes<SHARED_HEADS>(p, 1, block, stream);
}

// ---- split_cache ------------------------------------------------------------------------------
// idea    the keys are split among blocks too; each leaves m, l and o behind, and a second kernel adds them up: 1.7 times as
//         fast for 16 sequences, 24 times for a long one
// limit   what is under way waits in registers: 2 loads a thread and 512 threads, which the registers of 4 heads leave, are 16 KB
//         a multiprocessor. And every number is converted and multiplied 4 times by the CUDA cores, with shuffles between

enum { SPLIT_BLOCKS = 8 }; // to a multiprocessor

static void split_cache(const Problem* p, int block, cudaStream_t stream) {
    const int64_t others = (int64_t)p->B * p->NKV * ceil_div(p->NH / p->NKV, SHARED_HEADS);
    lanes<SHARED_HEADS>(p, cached_splits(p->T, others, SPLIT_BLOCKS), block, stream);
}

#ifndef PRECISION_FP32
// ---- ring -------------------------------------------------------------------------------------
// idea    copies go straight to shared memory and take no registers: 8 warps with 2 tiles of 8 KB under way are 128 KB. The tensor
//         cores multiply for all heads of the group at once. The second kernel is launched while the first ends. 1.6 to 2.3
//         times split_cache: 100 % of a copy for 16 sequences of HD 128, 95 at HD 64, 93 for a long one. Lost: 8 blocks to a
//         multiprocessor instead of 2, which run in four waves: 4 to 11 % longer
// limit   the memory; what is left is the start of a block and the end of the last: half of the time of a short sequence (12
//         us, a copy 6), a fifteenth of that of a long one

// all sequences of the batch, T rows each
struct BatchRows {
    const floatX* cache;
    const int32_t* lengths;
    int T;
    __device__ __forceinline__ int length(int b) const { return lengths[b]; }
    __device__ __forceinline__ int find(int, int) const { return 0; }
    __device__ __forceinline__ const floatX* at(int b, int, int j, size_t row) const {
        return cache + ((size_t)b * T + j) * row;
    }
};

template <typename Rows>
static void ring_launch(const Problem* p, Rows rows, int block, cudaStream_t stream) {
    if (p->HD == 64)
        cached_ring<64>(p->out, p->q, rows, p->B, p->T, p->NH, p->NKV, p->scratch, block, stream);
    else
        cached_ring<128>(p->out, p->q, rows, p->B, p->T, p->NH, p->NKV, p->scratch, block, stream);
}

static void ring(const Problem* p, int block, cudaStream_t stream) {
    ring_launch(p, BatchRows{ p->cache, p->length, p->T }, block, stream);
}

// ---- paged ------------------------------------------------------------------------------------
// idea    a server's cache grows by pages of 64 tokens that lie anywhere; a table says where. One look-up a tile, made a tile
//         early, so that it costs 1 to 4 %
// limit   the same as ring's

struct PagedRows {
    const floatX* pool;
    const int32_t *lengths, *table;
    int pages; // of a sequence in the table
    __device__ __forceinline__ int length(int b) const { return lengths[b]; }
    __device__ __forceinline__ int find(int b, int j) const { return table[(size_t)b * pages + j / PAGE]; }
    __device__ __forceinline__ const floatX* at(int, int page, int j, size_t row) const {
        return pool + ((size_t)page * PAGE + j % PAGE) * row;
    }
};

static void paged(const Problem* p, int block, cudaStream_t stream) {
    ring_launch(p, PagedRows{ p->pool, p->length, p->table, p->pages }, block, stream);
}

static const char* ring_takes(const Problem* p) {
    return cached_ring_takes(1, p->NH, p->NKV, p->HD) ? NULL : "takes at most 16 query heads to a kv head";
}
#endif

// ---- production -------------------------------------------------------------------------------
// what generation calls, which has one sequence: ring where ring takes the shape, else block_a_head

static void production(const Problem* p, int, cudaStream_t stream) {
    attention_cached(p->out, p->q, p->cache, 1, p->host_length[0] - 1, p->NH, p->NKV, p->HD, p->NH * p->HD, p->scratch,
                     stream);
}

static const char* has_one_sequence(const Problem* p) { return p->B == 1 ? NULL : "generation has one sequence"; }

// ---- the table: to add a variant, write it above and add one row ------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
//    name                 launch              block sizes      what changed
    { "block_a_head",      block_a_head,       { 0 },           "baseline: a thread a key, a launch a sequence" },
    { "lanes_share_a_key", lanes_share_a_key,  { 128, 256 },    "16 bytes a lane, no barriers, all sequences at once" },
    { "heads_share_loads", heads_share_loads,  { 128, 256 },    "4 heads of a group use what is loaded" },
    { "split_cache",       split_cache,        { 128, 256 },    "blocks for parts of the cache, added up by a second kernel" },
#ifndef PRECISION_FP32
    { "ring",              ring,               { 64, 128, 256 },  "cp.async into a ring for each warp, tensor cores", ring_takes },
    { "paged",             paged,              { 64, 128, 256 },  "the same through a table of pages", ring_takes },
#endif
    { "production",        production,         { 0 },           "llmc/attention_cached.cuh", has_one_sequence },
};
// clang-format on
BENCH_MAIN("attention_decode", shapes, setup, reference, rows, traffic, flops, variants)
