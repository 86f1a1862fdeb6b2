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
                    block_per_run             26      31      16       36      41      17
                    tiles                     37      45      32       49      59      31
                    production                61      72      45       69      79      40
                    pieces                    53      75      34       64      82      23
                    pieces_early              55      78      34       66      83      23

                us, 1B and 8B: text: block_per_run 124 and 175, production 53 and 90, pieces_early 59 and 95; random: 153 and
                224, 65 and 117, 60 and 111. Production, of tiles of 32 rows, is the best for text and padding; pieces_early is
                for random tokens. Repeated runs differ by 1 to 6 % where a row takes less than 100 us
Metrics         dram__throughput and the loads that are waited for, by ncu (results/nvidia-h200/embedding_backward.md), 8B, random
                tokens: memory is 51 % busy under block_per_run, 74 under production's longest kernel, 56 under pieces; 80 % of
                the waiting is for loads, whose addresses the order of the tokens gives
*/
#include <cub/device/device_radix_sort.cuh>

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
    char* scratch;                   // of production
    char* sort;                      // see block_per_run
    float* sums;                     // (N, C), of atomics
    int32_t* owners;                 // (V), of atomics
    float* parts;                    // (2 * tiles, C): see tiles
    int32_t *list, *sorted, *places; // (N) each: see pieces
    int32_t* rests;                  // (N), likewise
};

enum { TILE_LEAST = 8 }; // rows of dx in their new order that one warp sums, at least

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
    { .name = "many ids", .small = true, .N = 777, .C = 8, .V = 450007 },
};

// what CUB sorts in, as one piece of memory
struct Sort {
    int32_t *rows, *sorted_ids, *sorted_rows; // (N) each
    void* memory;
    size_t memory_bytes, bytes;
    int bits; // of an id
};

static Sort sort_carve(void* memory, int N, int V) {
    Sort s = {};
    const size_t part = ((size_t)N * sizeof(int32_t) + 255) / 256 * 256;
    while (s.bits < 31 && (int64_t)1 << s.bits < V) s.bits++;
    s.bits = s.bits ? s.bits : 1;
    s.rows = (int32_t*)memory;
    s.sorted_ids = (int32_t*)((char*)memory + part);
    s.sorted_rows = (int32_t*)((char*)memory + 2 * part);
    s.memory = (char*)memory + 3 * part;
    cuda_check(cub::DeviceRadixSort::SortPairs(NULL, s.memory_bytes, (const int32_t*)NULL, (int32_t*)NULL,
                                               (const int32_t*)NULL, (int32_t*)NULL, N, 0, s.bits));
    s.bytes = 3 * part + s.memory_bytes;
    return s;
}

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
    p.scratch = b->scratch<char>(embedding_backward_scratch(p.N, p.C));
    p.sort = b->scratch<char>(sort_carve(NULL, p.N, p.V).bytes);
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

// ---- block_per_run ---------------------------------------------------------------------------
// idea    the tokens are sorted by their ids, stably, with CUB's radix sort: the rows of one token become a run of neighbours,
//         in their old order. A block for each place of the order sums the run that begins there, if one does; a run of more
//         than 32 rows is left to a second kernel, with 16 warps for every 32 packs of columns. Each run is added to dw once
// limit   the sort is seven kernels for 16384 numbers. And a block looks where its run begins and ends, five look-ups in a row,
//         before the first byte of dx

enum {
    RUN_LONG = 32,  // rows of one token that one block still sums alone
    RUN_WARPS = 16, // that sum more than those
};

static __global__ void rows_kernel(int32_t* rows, int N) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) rows[n] = n;
}

static Sort sort_launch(const Problem* p, cudaStream_t stream) {
    Sort s = sort_carve(p->sort, p->N, p->V);
    rows_kernel<<<(unsigned)ceil_div(p->N, 256), 256, 0, stream>>>(s.rows, p->N);
    launch_check();
    cuda_check(cub::DeviceRadixSort::SortPairs(s.memory, s.memory_bytes, p->ids, s.sorted_ids, (const int32_t*)s.rows,
                                               s.sorted_rows, p->N, 0, s.bits, stream));
    return s;
}

// sum += rows first, first + step … before end of dx, at the columns that dx points to; four loads are under way at once
__device__ __forceinline__ void run_sum_rows(float (&sum)[PACK], const floatX* __restrict__ dx,
                                             const int32_t* __restrict__ rows, int first, int end, int step, int C) {
    enum { AHEAD = 4 };
    for (; first < end; first += AHEAD * step) {
        PackX d[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (first + j * step < end) d[j] = pack_load_once(dx + (size_t)rows[first + j * step] * C);
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (first + j * step < end)
                for (int k = 0; k < PACK; k++) sum[k] += d[j].get(k);
    }
}

__device__ __forceinline__ void run_add_sum(floatX* dw, const float (&sum)[PACK]) {
    PackX d = pack_load(dw);
    for (int k = 0; k < PACK; k++) d.set(k, d.get(k) + sum[k]);
    pack_store(dw, d);
}

// the first place from first on, and before last, whose id is at least `id`; last if there is none
__device__ __forceinline__ int lower_bound(const int32_t* ids, int first, int last, int id) {
    while (first < last) {
        int middle = first + (last - first) / 2;
        if (ids[middle] < id) first = middle + 1;
        else last = middle;
    }
    return first;
}

// ids (N) sorted, rows (N): where each stood. Block i sums the run that begins at i, if one does and it is short; a thread
// owns 16 bytes of columns
static __global__ void __launch_bounds__(256)
    short_runs_kernel(floatX* dw, const floatX* __restrict__ dx, const int32_t* __restrict__ ids,
                      const int32_t* __restrict__ rows, int N, int C) {
    int first = blockIdx.x, id = ids[first];
    if (first && ids[first - 1] == id) return;
    if (N - first > RUN_LONG && ids[first + RUN_LONG] == id) return;
    int end = lower_bound(ids, first, min(first + RUN_LONG, N), id + 1);
    for (int c = threadIdx.x * PACK; c < C; c += blockDim.x * PACK) {
        float sum[PACK] = { 0 };
        run_sum_rows(sum, dx + c, rows, first, end, 1, C);
        run_add_sum(dw + (size_t)id * C + c, sum);
    }
}

// A long run crosses a multiple of RUN_LONG: block (i, j) sums the run whose first such place is number i, over
// columns j*32 packs and on. Its warps take every 16th row; their sums are added in the order of the warps
static __global__ void __launch_bounds__(RUN_WARPS* WARP)
    long_runs_kernel(floatX* dw, const floatX* __restrict__ dx, const int32_t* __restrict__ ids,
                     const int32_t* __restrict__ rows, int N, int C) {
    __shared__ float sums[RUN_WARPS][PACK][WARP];
    int place = blockIdx.x * RUN_LONG, id = ids[place], lane = threadIdx.x, warp = threadIdx.y;
    if (place && ids[place - RUN_LONG] == id) return;
    int first = lower_bound(ids, max(place - RUN_LONG, 0), place, id);
    if (N - first <= RUN_LONG || ids[first + RUN_LONG] != id) return;
    int end = lower_bound(ids, place, N, id + 1), c = (blockIdx.y * WARP + lane) * PACK;

    float sum[PACK] = { 0 };
    if (c < C) run_sum_rows(sum, dx + c, rows, first + warp, end, RUN_WARPS, C);
    for (int k = 0; k < PACK; k++) sums[warp][k][lane] = sum[k];
    __syncthreads();
    if (warp || c >= C) return;
    for (int i = 1; i < RUN_WARPS; i++)
        for (int k = 0; k < PACK; k++) sum[k] += sums[i][k][lane];
    run_add_sum(dw + (size_t)id * C + c, sum);
}

static void block_per_run(const Problem* p, int, cudaStream_t stream) {
    const Sort s = sort_launch(p, stream);
    const int threads = p->C / PACK < 256 ? (int)ceil_div(p->C / PACK, WARP) * WARP : 256;
    short_runs_kernel<<<(unsigned)p->N, (unsigned)threads, 0, stream>>>(p->dw, p->dx, s.sorted_ids, s.sorted_rows, p->N, p->C);
    launch_check();
    const dim3 grid((unsigned)ceil_div(p->N, RUN_LONG), (unsigned)ceil_div(p->C, WARP * PACK)), block(WARP, RUN_WARPS);
    long_runs_kernel<<<grid, block, 0, stream>>>(p->dw, p->dx, s.sorted_ids, s.sorted_rows, p->N, p->C);
    launch_check();
}

// ---- tiles -----------------------------------------------------------------------------------
// idea    no look-ups: a warp takes up to 32 neighbours of the new order, wherever runs begin and end, and a slice of 32 packs.
//         One load of ids tells it all, every warp has the same work whatever the text is, and rows of dx and dw are under way
//         in fours. A run that crosses into the next tile leaves the sums of its parts in fp32; a second, short kernel adds
//         them up in order. Its kernels ship: llmc/embedding.h
// limit   the sort

static void tiles(const Problem* p, int rows, cudaStream_t stream) {
    const Sort s = sort_launch(p, stream);
    embedding_add_tiles(p->dw, p->parts, p->dx, s.sorted_ids, s.sorted_rows, p->N, p->C, rows, stream);
}

// ---- production ------------------------------------------------------------------------------
// idea    one kernel puts the tokens in order, and no block waits for another: each of 128 blocks looks through all ids, 64
//         KB that lie in L2, and takes those that leave its number as the rest of a division by 128. How many leave a lower
//         one it counts on the way: there its part of the order begins. Within the part it counts each id, and a warp gives
//         the tokens their places, in their old order. Then tiles, of 16 rows
// limit   a warp walks through rows of which it takes 512 bytes, one after another. Three launches of a few microseconds each

static void production(const Problem* p, int, cudaStream_t stream) {
    embedding_backward(p->dw, p->dx, p->ids, p->N, p->C, p->V, p->scratch, stream);
}

// ---- pieces ----------------------------------------------------------------------------------
// idea    the order comes with what a look-up was for: how many rows the run has that begins here. Whole rows again, 256
//         threads for each, so that its bytes are asked for together; blocks that stay, and know what comes next before they
//         have done what is now. A piece of a run is 32 rows at most; only runs of several pieces need the second kernel,
//         which has 1024 threads for them, a quarter of the pieces each
// limit   three launches of a few microseconds each, in which little else happens

enum { PIECE = 32, PIECE_THREADS = 256, PIECE_AHEAD = 4, SEAM_GROUPS = 4 };

// production's order, and rests (N): of each PIECE-th token of an id the number of those that follow, itself counted, negative
// where the id has more than PIECE tokens; 0 of the others
static __global__ void __launch_bounds__(EMBEDDING_BUCKET_THREADS)
    pieces_order_kernel(int32_t* sorted, int32_t* places, int32_t* rests, int32_t* list, const int32_t* __restrict__ ids,
                        int N, int V, int bits) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); // see pieces_early
#endif
    embedding_bucket(list, ids, N, V, bits, [=](int to, int id, int n, int i, int length) {
        const int left = i % PIECE ? 0 : length - i;
        sorted[to] = id, places[to] = n;
        rests[to] = length > PIECE ? -left : left;
    });
}

// where the sum of a piece lies whose run has several; `first`: it is the first of them. Pieces of one run begin PIECE apart,
// and so do runs that have several: no two share a place
__device__ __forceinline__ float* piece_sum(float* parts, int start, bool first, int C) {
    return parts + (size_t)(start / PIECE * 2 + first) * C;
}

// block (i, j): pieces that begin at i, i + blocks …, in the columns of slice j. ids, places and rests are not
// __restrict__, or they might be read before the wait
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
                embedding_add_pack(sum, d);
                d = int4{};
#pragma unroll
                for (int i = 0; i < PIECE_AHEAD; i++) embedding_add_pack(sum, more[i]);
            }
            embedding_add_pack(sum, d);
            if (rest > 0 && inside) {
                PackX whole;
                embedding_add_pack(sum, w);
                for (int k = 0; k < PACK; k++) whole.set(k, sum[k]);
                pack_store(dw + (size_t)id * C + c, whole);
            } else if (inside) {
                embedding_leave(piece_sum(parts, start, start == 0 || ids[start - 1] != id, C) + c, sum);
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
    const int bits = embedding_bucket_bits(p->V);
    pieces_order_kernel<<<1u << bits, EMBEDDING_BUCKET_THREADS, embedding_bucket_bytes(p->V), stream>>>(
        p->sorted, p->places, p->rests, p->list, p->ids, p->N, p->V, bits);
    launch_check();
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

static const char* pieces_early_refuses(const Problem*) { return hopper_refuses(); }

// ---- the table: to add a variant, write it above and add one row ------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
//    name                       launch                   rows or blocks       what changed
    { "row_of_table_per_block",  row_of_table_per_block,  { 0 },                "baseline: the sum as the formula has it",
                                                                                      row_of_table_refuses },
    { "atomics",                 atomics,                 { 128, 256 },         "each token adds at once; not deterministic" },
    { "block_per_run",           block_per_run,           { 0 },                "sorted, then a block for each run" },
    { "tiles",                   tiles,                   { 8, 16, 32 },        "equal work for each warp" },
    { "production",              production,              { 0 },                "llmc/embedding.h: the order in one kernel" },
    { "pieces",                  pieces,                  { 4, 5, 8 },          "whole rows, nothing looked up on the way" },
    { "pieces_early",            pieces_early,            { 4, 5, 8 },          "launches overlap", pieces_early_refuses },
};
// clang-format on
BENCH_MAIN("embedding_backward", shapes, setup, reference, rows, traffic, flops, variants)
