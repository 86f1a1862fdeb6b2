/*
Attention in generation: one query a sequence over a long cache of keys and values.

    s[j] = q . k[j] / sqrt(HD)      out = sum over j < length of softmax_j(s) * v[j]        for each sequence and query head

    q out (B, NH*HD)        cache (B, T, 2*NKV*HD): row j holds k[j], then v[j], of all kv heads; length[b] <= T rows count

Bound by        memory: each number of the cache is used for one product with each of the G = NH / NKV heads of its group
Bytes           K and V once: 2*NKV*HD numbers a cached token, 4096 bytes for 8B's shape in bf16; 16 sequences of 8192 tokens
                are 537 MB. All else (q, out, what splits leave behind) is less than a hundredth of that
The floor       an H200 (132 multiprocessors) copies 4.30 TB/s: 125 us. A multiprocessor then takes in 19 bytes a cycle, and one
                byte waits about 1 us: 33 KB must be under way on each, all the time
Look at         dram__bytes_read.sum.per_second; lts__t_sectors (heads that read the same K and V again);
                sm__warps_active (blocks that end before others); smsp__inst_executed and the stall reasons
                long_scoreboard (too few bytes under way), math_pipe (lanes) against those of ring
*/
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

enum { SPLITS = 256 }; // at most

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
    p.scratch = bench->scratch<float>((size_t)p.B * p.NH * SPLITS * (p.HD + 2));
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

// ---- production -------------------------------------------------------------------------------
// idea    the simplest right kernel: a block a query head, a thread a key for the scores, a thread a column for the sums
// limit   one sequence a launch, so 32 blocks for 132 multiprocessors; a thread reads its key 2 bytes at a time, 4 KB from its
//         neighbour's; four barriers for 256 keys

static void production(const Problem* p, int, cudaStream_t stream) {
    const size_t size = (size_t)p->NH * p->HD;
    for (int b = 0; b < p->B; b++)
        attention_cached(p->out + b * size, p->q + b * size, p->cache + (size_t)b * p->T * row_of(p), 1,
                         p->host_length[b] - 1, p->NH, p->NKV, p->HD, (int)size, stream);
}

// ---- what all below share: partial results and how they are put together ----------------------
// A partial result of a head, over some of the keys: m, the largest score in powers of two; l = sum of 2^(s - m);
// o (HD) = sum of 2^(s - m) * v. Of several, M = largest m: out = sum of 2^(m - M) * o / sum of 2^(m - M) * l

// what a kernel reads and writes
struct Decode {
    floatX* out;
    float* part; // (B, NH, splits, HD + 2): o, m, l. Not used when splits is 1
    const floatX *q, *cache;
    const int32_t *length, *table;
    int T, NH, NKV, splits, pages;
    float scale; // with the factor log2(e)
};

static Decode decode_of(const Problem* p, int splits) {
    return Decode{ p->out, p->scratch, p->q,   p->cache, p->length, p->table,
                   p->T,   p->NH,      p->NKV, splits,   p->pages,  1.4426950408889634f / sqrtf((float)p->HD) };
}

__device__ __forceinline__ float weight(float m, float largest) { return m == -INFINITY ? 0 : exp2f(m - largest); }

// the block adds up `groups` partial results of `heads` heads, the first of them h0, that lie in shared memory: o (groups, stride,
// HD), m and l (groups, stride). A barrier comes before
template <int HD>
__device__ __forceinline__ void put_together(const Decode& d, int b, int h0, int heads, int split, const float* o,
                                             const float* m, const float* l, int groups, int stride) {
    for (int i = threadIdx.x; i < heads * HD; i += blockDim.x) {
        const int h = i / HD, column = i % HD;
        float largest = -INFINITY, sum = 0, total = 0;
        for (int g = 0; g < groups; g++) largest = fmaxf(largest, m[g * stride + h]);
        for (int g = 0; g < groups; g++) {
            const float w = weight(m[g * stride + h], largest);
            total += w * l[g * stride + h], sum += w * o[(size_t)(g * stride + h) * HD + column];
        }
        const size_t head = (size_t)b * d.NH + h0 + h;
        if (d.splits == 1) {
            d.out[head * HD + column] = from_float<floatX>(sum / total);
            continue;
        }
        float* part = d.part + (head * d.splits + split) * (HD + 2);
        part[column] = sum;
        if (column == 0) part[HD] = largest, part[HD + 1] = total;
    }
}

// the keys of a split: a share that is a multiple of `unit`
__device__ __forceinline__ void split_range(int length, int splits, int split, int unit, int* first, int* last) {
    const int share = ((length + splits - 1) / splits + unit - 1) / unit * unit;
    *first = min(length, split * share), *last = min(length, *first + share);
}

// a block a head: the splits are added up, HD threads for every so many of them, so that many loads are under way
enum { ADD_THREADS = 512 };

template <int HD>
static __global__ void __launch_bounds__(ADD_THREADS) add_splits_kernel(floatX* out, const float* part, int splits) {
    constexpr int SHARES = ADD_THREADS / HD;
    __shared__ float w[SPLITS], sums[SHARES][HD];
    const int column = threadIdx.x % HD, share = threadIdx.x / HD, lane = threadIdx.x % WARP;
    const float* from = part + (size_t)blockIdx.x * splits * (HD + 2);
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize(); // when started early: the splits are written
#endif
    if (threadIdx.x < WARP) { // the weights, divided by the sum of all
        float largest = -INFINITY, total = 0;
        for (int i = lane; i < splits; i += WARP) largest = fmaxf(largest, from[(size_t)i * (HD + 2) + HD]);
        largest = warp_max(largest);
        for (int i = lane; i < splits; i += WARP) {
            w[i] = weight(from[(size_t)i * (HD + 2) + HD], largest);
            total += w[i] * from[(size_t)i * (HD + 2) + HD + 1];
        }
        total = warp_sum(total);
        for (int i = lane; i < splits; i += WARP) w[i] /= total;
    }
    __syncthreads();
    float sum = 0;
#pragma unroll 8
    for (int i = share; i < splits; i += SHARES) sum += w[i] * from[(size_t)i * (HD + 2) + column];
    sums[share][column] = sum;
    __syncthreads();
    if (share) return;
    for (int i = 1; i < SHARES; i++) sum += sums[i][column];
    out[(size_t)blockIdx.x * HD + column] = from_float<floatX>(sum);
}

// early: its blocks may start while the last of the kernel before still run (on Hopper; a launch costs nothing then)
template <int HD>
static void add_splits(const Problem* p, int splits, bool early, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    int device, major;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    config.gridDim = dim3((unsigned)(p->B * p->NH)), config.blockDim = dim3(ADD_THREADS), config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early && major >= 9;
    cuda_check(cudaLaunchKernelEx(&config, add_splits_kernel<HD>, p->out, (const float*)p->scratch, splits));
    launch_check();
}

// so many splits that there are `blocks` in all, of 128 keys at least
static int splits_for(const Problem* p, int64_t blocks, int64_t others) {
    const int64_t most = std::min<int64_t>(SPLITS, ceil_div(p->T, 128));
    return (int)std::max<int64_t>(1, std::min(blocks / others, most));
}

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
    split_range(d.length[b], d.splits, blockIdx.x, KEYS * warps, &first, &last);
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
    put_together<HD>(d, b, h0, heads, blockIdx.x, o_all, m_all, l_all, groups, HEADS);
}

template <int HD, int HEADS>
static void lanes_launch(const Problem* p, int splits, int block, cudaStream_t stream) {
    const int groups = block / (HD / PACK), G = p->NH / p->NKV;
    const size_t shared = (size_t)groups * HEADS * (HD + 2) * sizeof(float);
    const dim3 grid((unsigned)splits, (unsigned)(p->NKV * ceil_div(G, HEADS)), (unsigned)p->B);
    cuda_check(cudaFuncSetAttribute(lanes_kernel<HD, HEADS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    lanes_kernel<HD, HEADS><<<grid, block, shared, stream>>>(decode_of(p, splits));
    launch_check();
    if (splits > 1) add_splits<HD>(p, splits, false, stream);
}

template <int HEADS>
static void lanes(const Problem* p, int splits, int block, cudaStream_t stream) {
    if (p->HD == 64)
        lanes_launch<64, HEADS>(p, splits, block, stream);
    else
        lanes_launch<128, HEADS>(p, splits, block, stream);
}

// ---- lanes_share_a_key ------------------------------------------------------------------------
// idea    16 bytes a lane and load, neighbouring lanes on neighbouring bytes; no barrier before the end; all sequences in one grid
// limit   the heads of a group read the same keys and values, each for itself: 4 times the bytes through L2, from memory too
//         when their blocks drift apart

static void lanes_share_a_key(const Problem* p, int block, cudaStream_t stream) { lanes<1>(p, 1, block, stream); }

// ---- heads_share_loads ------------------------------------------------------------------------
// idea    a block works for 4 heads of a group: what is loaded is used 4 times
// limit   a quarter of the blocks: one for each kv head and sequence. A single sequence has 8, for 132 multiprocessors

enum { SHARED_HEADS = 4 };

static void heads_share_loads(const Problem* p, int block, cudaStream_t stream) {
    lanes<SHARED_HEADS>(p, 1, block, stream);
}

// ---- split_cache ------------------------------------------------------------------------------
// idea    the keys are split among blocks too; each leaves m, l and o behind, and a second kernel adds them up
// limit   what is under way waits in registers: 2 loads a thread and 512 threads, which the registers of 4 heads leave, are 16 KB
//         a multiprocessor. And every number is converted and multiplied 4 times by the CUDA cores, with shuffles between

static void split_cache(const Problem* p, int block, cudaStream_t stream) {
    const int64_t others = (int64_t)p->B * p->NKV * ceil_div(p->NH / p->NKV, SHARED_HEADS);
    lanes<SHARED_HEADS>(p, splits_for(p, gpu_processors() * 8, others), block, stream);
}

#ifndef PRECISION_FP32
// ---- ring: two variants of one kernel ---------------------------------------------------------
// Each warp has a ring of buffers of its own in shared memory, 16 keys and their values each, that cp.async fills ahead; a warp
// waits for its own copies only, and there is no barrier before the end. Both products are m16n8k16 of the tensor cores
// with the heads of the group as rows (up to 16, the others are zero): S = Q · K^T, then P, still in registers, times V.
// Instructions, fragments and swizzle are those of llmc/attention_flash.cuh

enum { RING_KEYS = 16, RING_HEADS = 16 };

template <int HD>
constexpr int RING_BUFFERS = HD <= 64 ? 6 : 3;
template <int HD>
constexpr uint32_t RING_BYTES = 2 * RING_KEYS* flash_pitch(HD); // of a buffer: keys, then values

template <int HD, bool PAGED>
static __global__ void __launch_bounds__(256) ring_kernel(Decode d) {
    constexpr int BUFFERS = RING_BUFFERS<HD>, PITCH = flash_pitch(HD), LANES = HD / 8, STEP = WARP / LANES;
    extern __shared__ __align__(256) unsigned char flash_memory[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int g = blockIdx.y, b = blockIdx.z, G = d.NH / d.NKV;
    const uint32_t ring = flash_shared() + (uint32_t)warp * BUFFERS * RING_BYTES<HD>;
    const size_t row = (size_t)2 * d.NKV * HD, v = row / 2;
    const floatX* k = d.cache + (PAGED ? 0 : (size_t)b * d.T * row) + (size_t)g * HD;
    const int32_t* table = d.table + (size_t)b * d.pages;
    int first, last;
    split_range(d.length[b], d.splits, blockIdx.x, RING_KEYS * warps, &first, &last);
    first += warp * RING_KEYS;
    const int step = RING_KEYS * warps, tiles = last > first ? (last - first + step - 1) / step : 0;

    // which rows of the pool hold the keys of tile i; asked for one tile before it is needed
    auto page = [&](int i) { return PAGED && i < tiles ? table[(first + i * step) / PAGE] : 0; };
    // starts to copy tile i, all lanes; beyond the last nothing, but a group all the same
    auto load = [&](int i, int page_row) {
        const int j0 = first + i * step, r0 = lane / LANES, chunk = lane % LANES;
        const uint32_t to = ring + (uint32_t)(i % BUFFERS) * RING_BYTES<HD>;
        if (i < tiles) {
            const floatX* from = k + (size_t)(PAGED ? page_row * PAGE + j0 % PAGE : j0) * row + chunk * 8;
#pragma unroll
            for (int r = r0; r < RING_KEYS; r += STEP) {
                const uint32_t at = to + (uint32_t)(r * PITCH + (chunk ^ r % 8) * 16);
                const bool valid = j0 + r < last;
                const floatX* x = from + (valid ? r * row : 0);
                flash_copy(at, x, valid), flash_copy(at + RING_KEYS * PITCH, x + v, valid);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    // the fragments of q: rows are heads, lane / 4 and that + 8
    uint32_t q[HD / 16][4];
    const floatX* heads = d.q + ((size_t)b * d.NH + (size_t)g * G) * HD + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HD / 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int h = lane / 4 + e % 2 * 8;
            q[i][e] = h < G ? *(const uint32_t*)(heads + (size_t)h * HD + i * 16 + e / 2 * 8) : 0;
        }
    float o[HD / 8][4] = {}, m[2] = { -INFINITY, -INFINITY }, l[2] = {};
#pragma unroll
    for (int i = 0; i < BUFFERS - 1; i++) load(i, page(i));
    int next = page(BUFFERS - 1);
    for (int i = 0; i < tiles; i++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(BUFFERS - 2) : "memory");
        __syncwarp(); // tile i is there, and all lanes are done with the one before it
        load(i + BUFFERS - 1, next);
        next = page(i + BUFFERS);
        const uint32_t keys = ring + (uint32_t)(i % BUFFERS) * RING_BYTES<HD>, values = keys + RING_KEYS * PITCH;
        float s[2][4] = {};
#pragma unroll
        for (int n = 0; n < HD; n += 16) {
            uint32_t f[4];
            flash_ldmatrix(f, keys + (flash_by_columns<HD>(lane) ^ (uint32_t)(2 * n)));
            flash_mma(s[0], q[n / 16], f[0], f[1]);
            flash_mma(s[1], q[n / 16], f[2], f[3]);
        }
        const int left = last - first - i * step; // keys of this tile
        if (left < RING_KEYS) {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (flash_column(n, e, lane) >= left) s[n][e] = -INFINITY;
        }
        flash_softmax<HD, RING_KEYS>(s, o, &m[0], &l[0], 0, d.scale);
        if (G > 8) flash_softmax<HD, RING_KEYS>(s, o, &m[1], &l[1], 2, d.scale);
        uint32_t p[1][4];
        flash_round<RING_KEYS>(p, s);
#pragma unroll
        for (int n = 0; n < HD; n += 16) {
            uint32_t f[4];
            flash_ldmatrix_transposed(f, values + (flash_by_rows<HD>(lane) ^ (uint32_t)(2 * n)));
            flash_mma(o[n / 8], p[0], f[0], f[1]);
            flash_mma(o[n / 8 + 1], p[0], f[2], f[3]);
        }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads(); // the rings are free
    float *o_all = (float*)flash_memory, *m_all = o_all + warps * RING_HEADS * HD, *l_all = m_all + warps * RING_HEADS;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int head = warp * RING_HEADS + lane / 4 + 8 * r;
        const float sum = flash_row_sum(l[r]);
        if (lane / 4 + 8 * r >= G) continue;
        if (lane % 4 == 0) m_all[head] = m[r] * d.scale, l_all[head] = sum;
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
            *(float2*)(o_all + head * HD + flash_column(n, 0, lane)) = make_float2(o[n][2 * r], o[n][2 * r + 1]);
    }
    __syncthreads();
    put_together<HD>(d, b, g * G, G, blockIdx.x, o_all, m_all, l_all, warps, RING_HEADS);
}

template <int HD, bool PAGED>
static void ring_launch(const Problem* p, int block, cudaStream_t stream) {
    const size_t warps = (size_t)block / WARP, merge = warps * RING_HEADS * (HD + 2) * sizeof(float);
    const size_t shared = std::max(warps * RING_BUFFERS<HD> * RING_BYTES<HD>, merge);
    const int splits = splits_for(p, gpu_processors() * 8, (int64_t)p->B * p->NKV);
    Decode d = decode_of(p, splits);
    if (PAGED) d.cache = p->pool;
    flash_allow(ring_kernel<HD, PAGED>, shared);
    ring_kernel<HD, PAGED><<<dim3((unsigned)splits, (unsigned)p->NKV, (unsigned)p->B), block, shared, stream>>>(d);
    launch_check();
    if (splits > 1) add_splits<HD>(p, splits, true, stream);
}

// ---- ring -------------------------------------------------------------------------------------
// idea    copies go straight to shared memory and take no registers: 8 warps with 2 tiles of 8 KB under way are 128 KB. The tensor
//         cores multiply for all heads of the group at once. The second kernel starts while the last splits still run
// limit   the memory; what is left is the start of a block and the end of the last

static void ring(const Problem* p, int block, cudaStream_t stream) {
    if (p->HD == 64)
        ring_launch<64, false>(p, block, stream);
    else
        ring_launch<128, false>(p, block, stream);
}

// ---- paged ------------------------------------------------------------------------------------
// idea    a server's cache grows by pages of 64 tokens that lie anywhere; a table says where. One look-up a tile, made a tile
//         early, so that it costs nothing
// limit   the same as ring's

static void paged(const Problem* p, int block, cudaStream_t stream) {
    if (p->HD == 64)
        ring_launch<64, true>(p, block, stream);
    else
        ring_launch<128, true>(p, block, stream);
}

static const char* ring_takes(const Problem* p) {
    return p->NH / p->NKV > RING_HEADS ? "takes at most 16 query heads to a kv head" : NULL;
}
#endif

// ---- the table: to add a variant, write it above and add one row ------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
//    name                 launch              block sizes      what changed
    { "production",        production,         { 0 },           "baseline: llmc/attention_cached.cuh, a block a head, a launch a sequence" },
    { "lanes_share_a_key", lanes_share_a_key,  { 128, 256 },    "16 bytes a lane, no barriers, all sequences at once" },
    { "heads_share_loads", heads_share_loads,  { 128, 256 },    "4 heads of a group use what is loaded" },
    { "split_cache",       split_cache,        { 128, 256 },    "blocks for parts of the cache, added up by a second kernel" },
#ifndef PRECISION_FP32
    { "ring",              ring,               { 64, 128, 256 },  "cp.async into a ring for each warp, tensor cores", ring_takes },
    { "paged",             paged,              { 64, 128, 256 },  "the same through a table of pages", ring_takes },
#endif
};
// clang-format on
BENCH_MAIN("attention_decode", shapes, setup, reference, rows, traffic, flops, variants)
