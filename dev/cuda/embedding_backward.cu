/*
Embedding, backward: each row of the table receives the sum of the gradients of the tokens that name it.

    dw[v] += sum over the rows n with ids[n] = v of dx[n]            dx (N, C)    dw (V, C)    ids (N)

Counted         dx is read once; the rows of dw that are named are read and written once: (N + 2 * distinct) * C numbers, and
                the ids. Text names few rows often, random tokens many rows once: both are shapes here
The card        an H200 copies 4.30 TB/s: N 16384, C 2048 in bf16, 193 MB for random tokens, a floor of 45 us; about 120 MB
                for text, 28 us. Times so short are spoilt by every kernel that is launched and by every look-up that waits
The difficulty  A sum of floats depends on its order, and the same run twice shall give the same bits: no atomics. So the
                tokens must be put in order first. And one token can be a third of the batch: padding
Reached         on an H200, % of a copy, each row at its best block size

                                              1B                       8B           bytes
                                            text  random  padded     text  random    text
                    row_of_table_per_block   1.5     2.2     0.3      2.9     4.3     0.9
                    atomics                   17      18      13       18      19      15
                    tiles                     37      46      32       50      60      31
                    buckets                   59      72      43       69      79      39
                    pieces                    53      74      34       65      81      23
                    pieces_early              55      79      33       66      84      23
                    production                26      31      16       36      42      17

                1B, text: production 123 us, buckets 54, pieces_early 59; random: 152, 65, 60. buckets is the best for text and
                padding, pieces_early for random tokens. Repeated runs differ by 1 to 6 % where a row takes less than 100 us
Metrics         not collected yet: dram__throughput of each kernel, and the time between them
*/
#include "bench.cuh"
#include "llmc/embedding.h"
#include "llmc/hopper.cuh"
#include "token_ids.cuh"

// ---- the problem -----------------------------------------------------------------------------

struct Problem {
    int N, C, V;
    int64_t distinct;
    const int32_t* ids;
    const floatX* dx;
    floatX* dw;
    char* sort;                      // of production
    float* sums;                     // (N, C), of atomics
    int32_t* owners;                 // (V), of atomics
    float* parts;                    // (2 * tiles, C): see tiles
    int32_t *list, *sorted, *places; // (N) each: see buckets
    int32_t* rests;                  // (N): see pieces
};

enum { TILE = 32, TILE_LEAST = 8 }; // rows of dx in their new order that one warp sums

static const Shape shapes[] = {
    { .name = "1B, text", .N = 16384, .C = 2048, .V = 128256 },
    { .name = "1B, uniform", .N = 16384, .C = 2048, .V = 128256 },
    { .name = "1B, padded text", .N = 16384, .C = 2048, .V = 128256 },
    { .name = "8B, text", .N = 16384, .C = 4096, .V = 128256 },
    { .name = "8B, uniform", .N = 16384, .C = 4096, .V = 128256 },
    { .name = "bytes, text", .N = 32768, .C = 768, .V = 260 },
    { .name = "one row", .small = true, .N = 1, .C = 8, .V = 3 },
    { .name = "all the same", .small = true, .N = 700, .C = 8, .V = 1 },
    { .name = "odd", .small = true, .N = 37, .C = 264, .V = 50 },
    { .name = "few", .small = true, .N = 1000, .C = 40, .V = 3 },
    { .name = "text", .small = true, .N = 4001, .C = 520, .V = 1000 },
    { .name = "padded text", .small = true, .N = 20000, .C = 16, .V = 5000 },
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = {};
    p.N = s->N, p.C = s->C, p.V = s->V;
    std::vector<int32_t> ids = token_ids(p.N, p.V, strstr(s->name, "text") != NULL);
    if (strstr(s->name, "padded")) // rows of 1024 tokens, the last third of each is padding
        for (int n = 0; n < p.N; n++)
            if (n % 1024 >= 683) ids[n] = p.V - 1;
    p.distinct = token_ids_distinct(ids, p.V);
    p.ids = b->input_from("ids", ids.data(), ids.size());
    p.dx = b->input<floatX>("dx", (size_t)p.N * p.C);
    p.dw = b->in_place<floatX>("dw", (size_t)p.V * p.C, 1, p.N);
    p.sort = b->scratch<char>(embedding_backward_scratch(p.N, p.V));
    p.sums = b->scratch<float>((size_t)p.N * p.C);
    p.owners = b->scratch<int32_t>((size_t)p.V);
    p.parts = b->scratch<float>(2 * (size_t)ceil_div(p.N, TILE_LEAST) * p.C);
    p.list = b->scratch<int32_t>((size_t)p.N);
    p.sorted = b->scratch<int32_t>((size_t)p.N), p.places = b->scratch<int32_t>((size_t)p.N);
    p.rests = b->scratch<int32_t>((size_t)p.N);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }
static double traffic(const Problem* p) {
    return (double)(p->N + 2 * p->distinct) * p->C * sizeof(floatX) + (double)p->N * sizeof(int32_t);
}
static double flops(const Problem*) { return 0; }

// a row is a token: what its row of dw becomes
static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const int32_t* ids = b->host_ids(p->ids);
    if (first == 0 && count == p->N) {
        std::vector<float> dw(b->host(p->dw), b->host(p->dw) + (size_t)p->V * p->C);
        embedding_backward_cpu(dw.data(), b->host(p->dx), ids, p->N, p->C);
        b->expect(p->dw, 0, dw.data(), dw.size());
        return;
    }
    for (int64_t i = first; i < first + count; i++) {
        const float* start = b->host(p->dw, (size_t)ids[i] * p->C, p->C);
        std::vector<float> row(start, start + p->C);
        const int32_t zero = 0;
        for (int n = 0; n < p->N; n++)
            if (ids[n] == ids[i])
                embedding_backward_cpu(row.data(), b->host(p->dx, (size_t)n * p->C, p->C), &zero, 1, p->C);
        b->expect(p->dw, (size_t)ids[i] * p->C, row.data(), p->C);
    }
}

// ---- row_of_table_per_block ------------------------------------------------------------------
// idea    the sum as the formula has it: a block for each row of the table looks through all tokens and adds up those that
//         name it, in their order
// limit   V * N comparisons, 2 billion, to find 16384 rows; nine of ten blocks find none

enum { TABLE_THREADS = 256, TABLE_COLUMNS = 16 }; // columns that one thread sums

static __global__ void __launch_bounds__(TABLE_THREADS)
    row_of_table_kernel(floatX* dw, const floatX* dx, const int32_t* ids, int N, int C) {
    __shared__ unsigned found[TABLE_THREADS / WARP];
    floatX* to = dw + (size_t)blockIdx.x * C;
    float sum[TABLE_COLUMNS] = { 0 };
    bool any = false;
    for (int start = 0; start < N; start += TABLE_THREADS) {
        const int n = start + threadIdx.x;
        const bool mine = n < N && ids[n] == (int)blockIdx.x;
        if (!__syncthreads_or(mine)) continue;
        const unsigned mask = __ballot_sync(0xffffffffu, mine);
        if (threadIdx.x % WARP == 0) found[threadIdx.x / WARP] = mask;
        __syncthreads();
        any = true;
        for (int warp = 0; warp < TABLE_THREADS / WARP; warp++)
            for (unsigned left = found[warp]; left; left &= left - 1) {
                const floatX* row = dx + (size_t)(start + warp * WARP + __ffs((int)left) - 1) * C;
#pragma unroll
                for (int k = 0; k < TABLE_COLUMNS; k++) {
                    const int c = threadIdx.x + k * TABLE_THREADS;
                    if (c < C) sum[k] += to_float(row[c]);
                }
            }
    }
    if (!any) return;
#pragma unroll
    for (int k = 0; k < TABLE_COLUMNS; k++) {
        const int c = threadIdx.x + k * TABLE_THREADS;
        if (c < C) to[c] = from_float<floatX>(to_float(to[c]) + sum[k]);
    }
}

static const char* row_of_table_refuses(const Problem* p) {
    return p->C > TABLE_THREADS * TABLE_COLUMNS ? "a row is too wide for the registers of a block" : NULL;
}

static void row_of_table_per_block(const Problem* p, int, cudaStream_t stream) {
    row_of_table_kernel<<<(unsigned)p->V, TABLE_THREADS, 0, stream>>>(p->dw, p->dx, p->ids, p->N, p->C);
    launch_check();
}

// ---- atomics ---------------------------------------------------------------------------------
// idea    every token adds its row where it belongs, at once, by atomic additions. They are in fp32, or each would round: the
//         first token of an id lends its row of an array (N, C), which is empty before and added to dw at the end
// limit   not deterministic: the sum depends on who comes first, and the same run twice gives two results. What is empty must
//         be emptied, and the sums pass memory three times in fp32

static __global__ void owners_kernel(int32_t* owners, const int32_t* ids, int N) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) atomicMin(&owners[ids[n]], n);
}

static __global__ void atomics_kernel(float* sums, const floatX* dx, const int32_t* owners, const int32_t* ids, int C) {
    const floatX* from = dx + (size_t)blockIdx.x * C;
    float* to = sums + (size_t)owners[ids[blockIdx.x]] * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) atomicAdd(&to[c], to_float(from[c]));
}

static __global__ void owners_add_kernel(floatX* dw, const float* sums, const int32_t* owners, const int32_t* ids,
                                         int C) {
    const int n = blockIdx.x, id = ids[n];
    if (owners[id] != n) return;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        floatX* to = dw + (size_t)id * C + c;
        *to = from_float<floatX>(to_float(*to) + sums[(size_t)n * C + c]);
    }
}

static void atomics(const Problem* p, int block, cudaStream_t stream) {
    cuda_check(cudaMemsetAsync(p->owners, 0x7f, (size_t)p->V * sizeof *p->owners, stream)); // larger than any token
    cuda_check(cudaMemsetAsync(p->sums, 0, (size_t)p->N * p->C * sizeof *p->sums, stream));
    owners_kernel<<<(unsigned)ceil_div(p->N, block), (unsigned)block, 0, stream>>>(p->owners, p->ids, p->N);
    launch_check();
    atomics_kernel<<<(unsigned)p->N, (unsigned)block, 0, stream>>>(p->sums, p->dx, p->owners, p->ids, p->C);
    launch_check();
    owners_add_kernel<<<(unsigned)p->N, (unsigned)block, 0, stream>>>(p->dw, p->sums, p->owners, p->ids, p->C);
    launch_check();
}

// ---- tiles -----------------------------------------------------------------------------------
// idea    production sorts the tokens, and then a block for each token looks where a run of equal ids begins and ends, which
//         is five look-ups in a row before the first byte of dx. Here a warp takes 32 neighbours of the new order, wherever
//         runs begin and end, and a slice of 32 packs: one load of ids tells it all, every warp has the same work whatever
//         the text is, and rows of dx and dw are under way in fours. A run that crosses into the next tile leaves the sums
//         of its parts in fp32; a second, short kernel adds them up in order
// limit   the sort: seven kernels for 16384 numbers

enum { TILE_AHEAD = 4, TILE_THREADS = 256 };

// sum += the numbers of a pack. What is kept for a while stays 16 bytes: taken apart, it would fill twice the registers
__device__ __forceinline__ void tile_add(float (&sum)[PACK], int4 bits) {
    PackX x;
    asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    memcpy(&x, &bits, 16);
    for (int k = 0; k < PACK; k++) sum[k] += x.get(k);
}

__device__ __forceinline__ void tile_leave(float* to, const float (&sum)[PACK]) {
    for (int k = 0; k < PACK; k += 4) *(float4*)(to + k) = make_float4(sum[k], sum[k + 1], sum[k + 2], sum[k + 3]);
}

// where a tile's sums lie: of its first run, when that began before it; of its last run, when that began in it and goes on
template <typename T>
__device__ __forceinline__ T* tile_first(T* parts, int tile, int C) {
    return parts + (size_t)tile * 2 * C;
}
template <typename T>
__device__ __forceinline__ T* tile_last(T* parts, int tile, int C) {
    return parts + ((size_t)tile * 2 + 1) * C;
}

// ids (N) sorted, places (N): where each stood; not __restrict__, or they might be read before the wait. `rows` of them, at
// most 32, are a tile
static __global__ void __launch_bounds__(TILE_THREADS, 4)
    tiles_kernel(floatX* dw, float* parts, const floatX* __restrict__ dx, const int32_t* ids, const int32_t* places,
                 int rows, int N, int C) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); // see pieces_early
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int lane = threadIdx.x % WARP, slices = (C + WARP * PACK - 1) / (WARP * PACK);
    const int item = (blockIdx.x * TILE_THREADS + threadIdx.x) / WARP, tile = item / slices;
    const int start = tile * rows, c = (item % slices * WARP + lane) * PACK;
    if (start >= N) return;
    const int count = min(rows, N - start);
    const int id = lane < count ? ids[start + lane] : -1, place = lane < count ? places[start + lane] : 0;
    const int before = start ? ids[start - 1] : -1, after = start + count < N ? ids[start + count] : -1;
    int next = __shfl_down_sync(0xffffffffu, id, 1);
    if (lane == count - 1) next = after;
    const unsigned ends = __ballot_sync(0xffffffffu, lane < count && next != id); // runs end here
    const int foreign = before == __shfl_sync(0xffffffffu, id, 0) ? (ends ? __ffs((int)ends) - 1 : count) : -1;
    // up to row `foreign`, the run is one that began before

    float sum[PACK] = { 0 };
    for (int j = 0; j < count; j += TILE_AHEAD) {
        int4 d[TILE_AHEAD], w[TILE_AHEAD];
#pragma unroll
        for (int i = 0; i < TILE_AHEAD; i++) {
            const int n = __shfl_sync(0xffffffffu, place, (j + i) % WARP),
                      v = __shfl_sync(0xffffffffu, id, (j + i) % WARP);
            if (j + i >= count || c >= C) continue;
            d[i] = __ldcs((const int4*)(dx + (size_t)n * C + c));
            if ((ends >> (j + i) & 1) && j + i != foreign) w[i] = *(const int4*)(dw + (size_t)v * C + c);
        }
#pragma unroll
        for (int i = 0; i < TILE_AHEAD; i++) {
            const int v = __shfl_sync(0xffffffffu, id, (j + i) % WARP);
            if (j + i >= count || c >= C) continue;
            tile_add(sum, d[i]);
            if (!(ends >> (j + i) & 1)) continue;
            if (j + i == foreign) {
                tile_leave(tile_first(parts, tile, C) + c, sum);
            } else {
                PackX whole;
                tile_add(sum, w[i]);
                for (int k = 0; k < PACK; k++) whole.set(k, sum[k]);
                pack_store(dw + (size_t)v * C + c, whole);
            }
            for (int k = 0; k < PACK; k++) sum[k] = 0;
        }
    }
    if ((ends >> (count - 1) & 1) || c >= C) return;
    tile_leave((foreign == count ? tile_first(parts, tile, C) : tile_last(parts, tile, C)) + c, sum);
}

// Block (i, j): the run that begins in tile i and goes on behind it, if there is one, in the columns of slice j. Each warp
// adds the parts of every 8th tile; their sums are added in the order of the warps
static __global__ void __launch_bounds__(TILE_THREADS)
    tile_seams_kernel(floatX* dw, const float* parts, const int32_t* ids, int rows, int N, int C) {
    enum { WARPS = TILE_THREADS / WARP };
    __shared__ float sums[WARPS][PACK][WARP];
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int tile = blockIdx.x, end = (tile + 1) * rows, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int c = (blockIdx.y * WARP + lane) * PACK;
    if (end >= N) return;
    const int id = ids[end - 1];
    if (ids[end] != id || (tile && ids[tile * rows] == id && ids[tile * rows - 1] == id)) return;
    // parts of the run: number 0 lies in this tile, number i at the beginning of tile + i
    int number = 1;
    for (unsigned mask = ~0u; mask == ~0u;) {
        const int64_t place = (int64_t)(tile + number + lane) * rows;
        mask = __ballot_sync(0xffffffffu, place < N && ids[place] == id);
        number += mask == ~0u ? WARP : __ffs((int)~mask) - 1;
    }
    float sum[PACK] = { 0 };
#pragma unroll 4
    for (int i = warp; i < number; i += WARPS) {
        const float* part = (i ? tile_first(parts, tile + i, C) : tile_last(parts, tile, C)) + c;
        for (int k = 0; k < PACK && c < C; k += 4) {
            const float4 x = *(const float4*)(part + k);
            sum[k] += x.x, sum[k + 1] += x.y, sum[k + 2] += x.z, sum[k + 3] += x.w;
        }
    }
    for (int k = 0; k < PACK; k++) sums[warp][k][lane] = sum[k];
    __syncthreads();
    if (warp || c >= C) return;
    PackX w = pack_load(dw + (size_t)id * C + c);
    for (int i = 1; i < WARPS; i++)
        for (int k = 0; k < PACK; k++) sum[k] += sums[i][k][lane];
    for (int k = 0; k < PACK; k++) w.set(k, w.get(k) + sum[k]);
    pack_store(dw + (size_t)id * C + c, w);
}

// early: a kernel starts while the one before it ends
static void tiles_launch(const Problem* p, const int32_t* ids, const int32_t* places, int rows, bool early,
                         cudaStream_t stream) {
    const int64_t tiles = ceil_div(p->N, rows), slices = ceil_div(p->C, WARP * PACK);
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)ceil_div(tiles * slices, TILE_THREADS / WARP));
    config.blockDim = dim3(TILE_THREADS);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = early;
    cuda_check(cudaLaunchKernelEx(&config, tiles_kernel, p->dw, p->parts, p->dx, ids, places, rows, p->N, p->C));
    launch_check();
    config.gridDim = dim3((unsigned)tiles, (unsigned)slices);
    cuda_check(cudaLaunchKernelEx(&config, tile_seams_kernel, p->dw, p->parts, ids, rows, p->N, p->C));
    launch_check();
}

static void tiles(const Problem* p, int rows, cudaStream_t stream) {
    EmbeddingScratch s = embedding_scratch(p->sort, p->N, p->V);
    embedding_rows_kernel<<<(unsigned)ceil_div(p->N, 256), 256, 0, stream>>>(s.rows, p->N);
    launch_check();
    cuda_check(cub::DeviceRadixSort::SortPairs(s.sort, s.sort_bytes, p->ids, s.sorted_ids, (const int32_t*)s.rows,
                                               s.sorted_rows, p->N, 0, s.bits, stream));
    tiles_launch(p, s.sorted_ids, s.sorted_rows, rows, false, stream);
}

// ---- buckets ---------------------------------------------------------------------------------
// idea    one kernel puts the tokens in order, and no block waits for another: each of 128 blocks looks through all ids, 64
//         KB that lie in L2, and takes those that leave its number as the rest of a division by 128. How many leave a lower
//         one it counts on the way: there its part of the order begins. Within the part it counts each id, and a warp gives
//         the tokens their places, in their old order
// limit   a warp walks through rows of which it takes 512 bytes, and 32 of those one after another

enum { BUCKETS = 128, BUCKET_THREADS = 1024, BUCKET_LIST = 4096, BUCKET_HELD = 16, BUCKET_AT_ONCE = 4, PIECE = 32 };

// Block b sorts the tokens whose id leaves the rest b: sorted (N) are the ids, places (N) where each stood. rests (N): of
// each PIECE-th token of an id the number of those that follow, itself counted, negative where the id has more than PIECE
// tokens; 0 of the others. list (N) is used when a bucket has more tokens than fit in shared memory
static __global__ void __launch_bounds__(BUCKET_THREADS)
    buckets_kernel(int32_t* sorted, int32_t* places, int32_t* rests, int32_t* list, const int32_t* __restrict__ ids,
                   int N, int V) {
    enum { WARPS = BUCKET_THREADS / WARP };
    extern __shared__ int counters[];
    __shared__ int found[WARPS], lower[WARPS], totals[WARPS];
    __shared__ int32_t near[BUCKET_LIST];
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, bucket = blockIdx.x;
    const int kinds = (V + BUCKETS - 1) / BUCKETS;
    int *next = counters,
        *begin = counters + kinds; // of each id of the bucket: where its next token goes; where its run begins
    const unsigned below = (1u << lane) - 1;
    // a warp looks through a stretch of its own, and keeps the first ids of it
    const int stretch = (N + BUCKET_THREADS - 1) / BUCKET_THREADS * WARP, start = warp * stretch;
    const int end = min(start + stretch, N);
    int32_t held[BUCKET_HELD];
#pragma unroll
    for (int i = 0; i < BUCKET_HELD; i++) held[i] = start + i * WARP + lane < end ? ids[start + i * WARP + lane] : -1;
    for (int i = threadIdx.x; i < kinds; i += BUCKET_THREADS) next[i] = 0;
    int mine = 0, less = 0;
#pragma unroll
    for (int i = 0; i < BUCKET_HELD; i++) {
        const int rest = held[i] % BUCKETS; // of -1 it is -1
        mine += rest == bucket, less += (unsigned)rest < (unsigned)bucket;
    }
    for (int n = start + BUCKET_HELD * WARP + lane; n < end; n += WARP) {
        const int rest = ids[n] % BUCKETS;
        mine += rest == bucket, less += rest < bucket;
    }
    mine = __reduce_add_sync(0xffffffffu, mine), less = __reduce_add_sync(0xffffffffu, less);
    if (lane == 0) found[warp] = mine, lower[warp] = less;
    __syncthreads();
    const int number = __reduce_add_sync(0xffffffffu, found[lane]); // tokens of the bucket
    const int first = __reduce_add_sync(0xffffffffu, lower[lane]);  // before them in the new order
    int at = __reduce_add_sync(0xffffffffu, lane < warp ? found[lane] : 0);
    int32_t* tokens = number <= BUCKET_LIST ? near : list + first;
    const auto keep = [&](int n, int id) {
        const bool here = id % BUCKETS == bucket;
        const unsigned mask = __ballot_sync(0xffffffffu, here);
        if (here) {
            tokens[at + __popc(mask & below)] = n;
            atomicAdd(&next[id / BUCKETS], 1);
        }
        at += __popc(mask);
    };
#pragma unroll
    for (int i = 0; i < BUCKET_HELD; i++) keep(start + i * WARP + lane, held[i]);
    for (int n = start + BUCKET_HELD * WARP; n < end; n += WARP) keep(n + lane, n + lane < end ? ids[n + lane] : -1);
    __syncthreads();
    // the counts become sums of those before
    for (int from = 0, base = 0; from < kinds; from += BUCKET_THREADS) {
        const int i = from + threadIdx.x, count = i < kinds ? next[i] : 0;
        int sum = count;
        for (int offset = 1; offset < WARP; offset *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, sum, offset);
            if (lane >= offset) sum += other;
        }
        if (lane == WARP - 1) totals[warp] = sum;
        __syncthreads();
        const int total = totals[lane];
        sum += base + __reduce_add_sync(0xffffffffu, lane < warp ? total : 0);
        base += __reduce_add_sync(0xffffffffu, total);
        if (i < kinds) next[i] = begin[i] = sum - count;
        __syncthreads();
    }
    if (threadIdx.x == 0) begin[kinds] = number;
    if (warp) return;
    __syncwarp();
    for (int from = 0; from < number; from += BUCKET_AT_ONCE * WARP) {
        int token[BUCKET_AT_ONCE], id[BUCKET_AT_ONCE];
        unsigned same[BUCKET_AT_ONCE];
#pragma unroll
        for (int i = 0; i < BUCKET_AT_ONCE; i++) {
            const int n = from + i * WARP + lane;
            token[i] = n < number ? tokens[n] : -1;
        }
#pragma unroll
        for (int i = 0; i < BUCKET_AT_ONCE; i++) id[i] = token[i] < 0 ? -1 : ids[token[i]];
#pragma unroll
        for (int i = 0; i < BUCKET_AT_ONCE; i++) same[i] = __match_any_sync(0xffffffffu, id[i]);
#pragma unroll
        for (int i = 0; i < BUCKET_AT_ONCE; i++) {
            const int kind = id[i] < 0 ? 0 : id[i] / BUCKETS, place = next[kind];
            __syncwarp();
            if (id[i] >= 0) {
                const int to = place + __popc(same[i] & below), run = begin[kind], length = begin[kind + 1] - run;
                const int left = (to - run) % PIECE ? 0 : length - (to - run);
                sorted[first + to] = id[i], places[first + to] = token[i];
                rests[first + to] = length > PIECE ? -left : left;
                if (!(same[i] & below)) next[kind] = place + __popc(same[i]);
            }
            __syncwarp();
        }
    }
}

static void buckets_sort(const Problem* p, cudaStream_t stream) {
    const size_t bytes = (2 * (size_t)ceil_div(p->V, BUCKETS) + 1) * sizeof(int);
    buckets_kernel<<<BUCKETS, BUCKET_THREADS, bytes, stream>>>(p->sorted, p->places, p->rests, p->list, p->ids, p->N,
                                                               p->V);
    launch_check();
}

static void buckets(const Problem* p, int rows, cudaStream_t stream) {
    buckets_sort(p, stream);
    tiles_launch(p, p->sorted, p->places, rows, false, stream);
}

static const char* buckets_refuses(const Problem* p) {
    return p->V > 3500 * BUCKETS ? "the counts of a bucket do not fit in shared memory" : NULL;
}

// ---- pieces ----------------------------------------------------------------------------------
// idea    the order comes with what a look-up was for: how many rows the run has that begins here. Whole rows again, 256
//         threads for each, so that its bytes are asked for together; blocks that stay, and know what comes next before they
//         have done what is now. A piece of a run is 32 rows at most; only runs of several pieces need the second kernel,
//         which has 1024 threads for them, a quarter of the pieces each
// limit   three launches of a few microseconds each, in which little else happens

enum { PIECE_THREADS = 256, PIECE_AHEAD = 4, SEAM_GROUPS = 4 };

// where the sum of a piece lies whose run has several; `first`: it is the first of them. Pieces of one run begin PIECE apart,
// and so do runs that have several: no two share a place
__device__ __forceinline__ float* piece_sum(float* parts, int start, bool first, int C) {
    return parts + (size_t)(start / PIECE * 2 + first) * C;
}

// block (i, j): pieces that begin at i, i + blocks …, in the columns of slice j. Not __restrict__: see tiles_kernel
static __global__ void __launch_bounds__(PIECE_THREADS, 5)
    pieces_kernel(floatX* dw, float* parts, const floatX* __restrict__ dx, const int32_t* ids, const int32_t* places,
                  const int32_t* rests, int N, int C) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int c = (blockIdx.y * PIECE_THREADS + threadIdx.x) * PACK, blocks = gridDim.x, lane = threadIdx.x % WARP;
    const bool inside = c < C;
    int start = blockIdx.x, rest = rests[start], id = ids[start], place = places[start];
    for (; start < N;) {
        const int next = start + blocks, known = min(next, N - 1);
        const int next_rest = rests[known], next_id = ids[known], next_place = places[known];
        const int count = min(abs(rest), PIECE);
        if (rest) {
            float sum[PACK] = { 0 };
            int4 w = {}, d = {};
            if (rest > 0 && inside) w = *(const int4*)(dw + (size_t)id * C + c);
            if (inside) d = __ldcs((const int4*)(dx + (size_t)place * C + c));
            const int row = lane < count ? places[start + lane] : 0;
            for (int j = 1; j < count; j += PIECE_AHEAD) {
                int4 more[PIECE_AHEAD];
#pragma unroll
                for (int i = 0; i < PIECE_AHEAD; i++) {
                    const int n = __shfl_sync(0xffffffffu, row, (j + i) % WARP);
                    more[i] = int4{};
                    if (j + i < count && inside) more[i] = __ldcs((const int4*)(dx + (size_t)n * C + c));
                }
                tile_add(sum, d);
                d = int4{};
#pragma unroll
                for (int i = 0; i < PIECE_AHEAD; i++) tile_add(sum, more[i]);
            }
            tile_add(sum, d);
            if (rest > 0 && inside) {
                PackX whole;
                tile_add(sum, w);
                for (int k = 0; k < PACK; k++) whole.set(k, sum[k]);
                pack_store(dw + (size_t)id * C + c, whole);
            } else if (inside) {
                tile_leave(piece_sum(parts, start, start == 0 || ids[start - 1] != id, C) + c, sum);
            }
        }
        start = next, rest = next_rest, id = next_id, place = next_place;
    }
}

// Block (i, j): the run of several pieces that begins among places 32 * i and on, if there is one, in the columns of slice j.
// A group of threads adds the sums of every 4th piece; the groups' sums are added in their order
static __global__ void __launch_bounds__(SEAM_GROUPS* PIECE_THREADS)
    piece_seams_kernel(floatX* dw, float* parts, const int32_t* ids, const int32_t* rests, int N, int C) {
    __shared__ float sums[SEAM_GROUPS][PACK][PIECE_THREADS];
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int lane = threadIdx.x % WARP, group = threadIdx.x / PIECE_THREADS, thread = threadIdx.x % PIECE_THREADS;
    const int place = blockIdx.x * PIECE + lane, c = (blockIdx.y * PIECE_THREADS + thread) * PACK;
    const int rest = place < N ? rests[place] : 0;
    const unsigned mask = __ballot_sync(0xffffffffu, rest < 0 && (place == 0 || ids[place - 1] != ids[place]));
    if (!mask) return;
    const int start = blockIdx.x * PIECE + __ffs((int)mask) - 1, id = ids[start],
              pieces = (PIECE - 1 - rests[start]) / PIECE;
    float sum[PACK] = { 0 };
#pragma unroll 4
    for (int i = group; i < pieces; i += SEAM_GROUPS) {
        const float* part = piece_sum(parts, start + i * PIECE, i == 0, C) + c;
        for (int k = 0; k < PACK && c < C; k += 4) {
            const float4 x = *(const float4*)(part + k);
            sum[k] += x.x, sum[k + 1] += x.y, sum[k + 2] += x.z, sum[k + 3] += x.w;
        }
    }
    for (int k = 0; k < PACK; k++) sums[group][k][thread] = sum[k];
    __syncthreads();
    if (group || c >= C) return;
    PackX w = pack_load(dw + (size_t)id * C + c);
    for (int i = 1; i < SEAM_GROUPS; i++)
        for (int k = 0; k < PACK; k++) sum[k] += sums[i][k][thread];
    for (int k = 0; k < PACK; k++) w.set(k, w.get(k) + sum[k]);
    pack_store(dw + (size_t)id * C + c, w);
}

// early: a kernel starts while the one before it ends
static void pieces_launch(const Problem* p, int share, bool early, cudaStream_t stream) {
    const unsigned slices = (unsigned)ceil_div(p->C, PIECE_THREADS * PACK), most = (unsigned)(share * gpu_processors());
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(std::min((unsigned)p->N, (unsigned)ceil_div(most, slices)), slices);
    config.blockDim = dim3(PIECE_THREADS);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = early;
    buckets_sort(p, stream);
    cuda_check(cudaLaunchKernelEx(&config, pieces_kernel, p->dw, p->parts, p->dx, (const int32_t*)p->sorted,
                                  (const int32_t*)p->places, (const int32_t*)p->rests, p->N, p->C));
    launch_check();
    config.gridDim = dim3((unsigned)ceil_div(p->N, PIECE), slices);
    config.blockDim = dim3(SEAM_GROUPS * PIECE_THREADS);
    cuda_check(cudaLaunchKernelEx(&config, piece_seams_kernel, p->dw, p->parts, (const int32_t*)p->sorted,
                                  (const int32_t*)p->rests, p->N, p->C));
    launch_check();
}

static void pieces(const Problem* p, int share, cudaStream_t stream) { pieces_launch(p, share, false, stream); }

// ---- pieces_early ----------------------------------------------------------------------------
// idea    each kernel is launched while the one before it still runs, and waits inside for its end: the way from the host's
//         queue to the multiprocessors is no longer between them
// limit   memory, and the first look through the ids

static void pieces_early(const Problem* p, int share, cudaStream_t stream) { pieces_launch(p, share, true, stream); }

static const char* pieces_early_refuses(const Problem* p) {
    return hopper_refuses() ? hopper_refuses() : buckets_refuses(p);
}

// ---- the table: to add a variant, write it above and add one row ------------------------------

static void production(const Problem* p, int, cudaStream_t stream) {
    embedding_backward(p->dw, p->dx, p->ids, p->N, p->C, p->V, p->sort, stream);
}

// clang-format off
static const Variant<Problem> variants[] = {
//    name                       launch                   rows of a tile, blocks    what changed
    { "row_of_table_per_block",  row_of_table_per_block,  { 0 },                    "baseline: the sum as the formula has it", row_of_table_refuses },
    { "atomics",                 atomics,                 { 128, 256 },             "each token adds at once; not deterministic" },
    { "tiles",                   tiles,                   { 8, 16, 32 },            "sorted, then equal work for each warp" },
    { "buckets",                 buckets,                 { 8, 16, 32 },            "the order in one kernel", buckets_refuses },
    { "pieces",                  pieces,                  { 4, 5, 8 },              "whole rows, nothing looked up on the way", buckets_refuses },
    { "pieces_early",            pieces_early,            { 4, 5, 8 },              "launches overlap", pieces_early_refuses },
    { "production",              production,              { 0 },                    "llmc/embedding.h: sorted, a block for each run" },
};
// clang-format on
BENCH_MAIN("embedding_backward", shapes, setup, reference, rows, traffic, flops, variants)
