/*
Embedding: row n of x is the row of the table that token n names.

    forward     x[n] = w[ids[n]]
    backward    dw[v] = sum over the rows n with ids[n] = v of dx[n]

Shapes          x dx (N, C)    w dw (V, C)    ids (N), each in 0 .. V-1: whoever reads tokens checks that
Numerics        on the CPU w is F32, BF16 or F16 at any address; x and both gradients are fp32. On the GPU all are floatX, and
                the rows of one token are summed in fp32, in a fixed order, before the sum is added to dw
Bound by        memory: forward moves 2*N*C elements, backward 3*N*C at most (dw is read and written once for each token that
                occurs), scattered by rows. On an H200, bf16, N 16384, backward reaches 61 % of a copy for text and 72 % for
                random tokens at C 2048 (53 and 65 us), 69 and 79 % at C 4096 (89 and 117 us), tiles of 32 rows
Proved by       dev/test/test_ops.c (finite differences, repeated tokens), test_ops_float.c (same bits for any threads),
                test_llama3.cu (GPU against CPU)
Source          none needed: a product with one-hot rows, written as what it does
Tried           dev/cuda/embedding_forward.cu, embedding_backward.cu: what lost, and by how much
*/
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "dtype.h"

// ---- CPU reference ---------------------------------------------------------------------------

// overwrites x (N, C)
static inline void embedding_forward_cpu(float* x, const int32_t* ids, Tensor w, int N, int C) {
#pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        float* xn = x + (size_t)n * C;
        size_t row = (size_t)ids[n] * C;
        if (w.dtype == DTYPE_F32)
            memcpy(xn, (const char*)w.data + row * sizeof(float), C * sizeof(float));
        else
            for (int c = 0; c < C; c++) xn[c] = tensor_get(w, row + c);
    }
}

// adds to dw (V, C). Threads own columns and walk the tokens in order: rows that share a token are summed in that order,
// whatever the number of threads
static inline void embedding_backward_cpu(float* dw, const float* dx, const int32_t* ids, int N, int C) {
    enum { COLUMNS = 32 };
#pragma omp parallel for if (N > 1)
    for (int start = 0; start < C; start += COLUMNS) {
        int end = start + COLUMNS < C ? start + COLUMNS : C;
        for (int n = 0; n < N; n++) {
            const float* dxn = dx + (size_t)n * C;
            float* dwv = dw + (size_t)ids[n] * C;
            for (int c = start; c < end; c++) dwv[c] += dxn[c];
        }
    }
}

#ifdef __CUDACC__
#include "gpu.cuh"

// ---- GPU -------------------------------------------------------------------------------------

enum { EMBEDDING_ROWS = 4, EMBEDDING_THREADS = 128 }; // of a block: rows of x; each thread has one pack of each

// four look-ups are under way together, and so are the four loads that depend on them
static __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_forward_kernel(floatX* __restrict__ x, const int32_t* __restrict__ ids, const floatX* __restrict__ w,
                             int N, int C) {
    const int n = blockIdx.x * EMBEDDING_ROWS, c = (blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * PACK;
    if (c >= C) return;
    int32_t id[EMBEDDING_ROWS];
    PackX row[EMBEDDING_ROWS];
#pragma unroll
    for (int i = 0; i < EMBEDDING_ROWS; i++) id[i] = ids[min(n + i, N - 1)];
#pragma unroll
    for (int i = 0; i < EMBEDDING_ROWS; i++)
        if (n + i < N) row[i] = pack_load(w + (size_t)id[i] * C + c);
#pragma unroll
    for (int i = 0; i < EMBEDDING_ROWS; i++)
        if (n + i < N) pack_store(x + (size_t)(n + i) * C + c, row[i]);
}

// overwrites x (N, C)
static inline void embedding_forward(floatX* x, const int32_t* ids, const floatX* w, int N, int C,
                                     cudaStream_t stream) {
    GpuOp op("embedding_forward", 2.0 * N * C * sizeof(floatX), 0, stream);
    launch_require(C > 0 && C % 8 == 0, "embedding", "C (hidden_size) must be a multiple of 8");
    const dim3 grid((unsigned)ceil_div(N, EMBEDDING_ROWS), (unsigned)ceil_div(C, EMBEDDING_THREADS * PACK));
    embedding_forward_kernel<<<grid, EMBEDDING_THREADS, 0, stream>>>(x, ids, w, N, C);
    launch_check();
}

// Backward: many rows may add to one row of dw, and floating-point atomics would add them in any order. So the tokens are put
// in order first, stably: the rows of one token become a run of neighbours, in their old order. Then a warp sums the rows of a
// tile, some neighbours of the new order, wherever runs begin and end, in a slice of 32 packs: every warp has the same work
// whatever the text is. A run that ends in the tile it began in is added to dw there. One that crosses into the next leaves the
// sums of its parts in fp32; a second, short kernel adds them up in order.
//
// The order is one kernel, in which no block waits for another: each of 128 blocks looks through all ids, which lie in L2, and
// takes those whose low 7 bits are its number. How many have lower ones it counts on the way: there its part of the order
// begins. Within the part it counts each id, and a warp gives the tokens their places. The counters lie in shared memory, which
// has room for V up to 448000; beyond, there are twice the blocks, or four times, …: right for any V, slow from millions on.

enum {
    EMBEDDING_BUCKET_BITS = 7,       // of an id, at least: 128 blocks
    EMBEDDING_BUCKET_IDS = 3500,     // different ones that a block may count
    EMBEDDING_BUCKET_THREADS = 1024, // 32 warps: a lane for each
    EMBEDDING_BUCKET_LIST = 4096,    // tokens that a block lists in shared memory; of more the list is in the scratch
    EMBEDDING_BUCKET_HELD = 16,      // ids that a thread keeps in registers
    EMBEDDING_BUCKET_AHEAD = 4,      // times 32 tokens are looked up at once
    EMBEDDING_TILE = 32,             // rows, at most 32; of each the scratch holds two rows in fp32
    EMBEDDING_TILE_THREADS = 256,
    EMBEDDING_TILE_AHEAD = 4,        // rows under way at once
};

static inline int embedding_bucket_bits(int V) {
    int bits = EMBEDDING_BUCKET_BITS;
    while ((V - 1) >> bits >= EMBEDDING_BUCKET_IDS) bits++;
    return bits;
}

// of shared memory, beside what is declared
static inline size_t embedding_bucket_bytes(int V) {
    return (2 * ((size_t)((V - 1) >> embedding_bucket_bits(V)) + 1) + 1) * sizeof(int);
}

// Block b puts the tokens in order whose low `bits` bits are b. leave(to, id, n, i, length): place `to` of the new order is row
// n's, which is number i of the `length` rows of that id. list (N) is used when there are more than fit in shared memory
template <typename Leave>
__device__ __forceinline__ void embedding_bucket(int32_t* list, const int32_t* __restrict__ ids, int N, int V, int bits,
                                                 Leave leave) {
    enum { WARPS = EMBEDDING_BUCKET_THREADS / WARP };
    static_assert((int)WARPS == (int)WARP, "a lane reads what a warp counted");
    extern __shared__ int embedding_counters[];
    __shared__ int found[WARPS], lower[WARPS], totals[WARPS];
    __shared__ int32_t near[EMBEDDING_BUCKET_LIST];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int kinds = ((V - 1) >> bits) + 1;
    int *next = embedding_counters, *begin = next + kinds; // of each id: where its next token goes; where its run begins
    const unsigned below = (1u << lane) - 1;
    // the sign stays, so that -1, which stands for no token, is above every bucket
    const unsigned bucket = blockIdx.x, low = ((1u << bits) - 1) | 1u << 31;
    // a warp looks through a stretch of its own, and keeps the first ids of it
    const int stretch = (N + EMBEDDING_BUCKET_THREADS - 1) / EMBEDDING_BUCKET_THREADS * WARP, start = warp * stretch;
    const int end = min(start + stretch, N);
    int32_t held[EMBEDDING_BUCKET_HELD];
#pragma unroll
    for (int i = 0; i < EMBEDDING_BUCKET_HELD; i++)
        held[i] = start + i * WARP + lane < end ? ids[start + i * WARP + lane] : -1;
    for (int i = threadIdx.x; i < kinds; i += EMBEDDING_BUCKET_THREADS) next[i] = 0;
    int mine = 0, less = 0;
#pragma unroll
    for (int i = 0; i < EMBEDDING_BUCKET_HELD; i++) {
        const unsigned rest = (unsigned)held[i] & low;
        mine += rest == bucket, less += rest < bucket;
    }
    for (int n = start + EMBEDDING_BUCKET_HELD * WARP + lane; n < end; n += WARP) {
        const unsigned rest = (unsigned)ids[n] & low;
        mine += rest == bucket, less += rest < bucket;
    }
    mine = __reduce_add_sync(0xffffffffu, mine), less = __reduce_add_sync(0xffffffffu, less);
    if (lane == 0) found[warp] = mine, lower[warp] = less;
    __syncthreads();
    const int number = __reduce_add_sync(0xffffffffu, found[lane]); // tokens of the bucket
    const int first = __reduce_add_sync(0xffffffffu, lower[lane]);  // before them in the new order
    int at = __reduce_add_sync(0xffffffffu, lane < warp ? found[lane] : 0);
    int32_t* tokens = number <= EMBEDDING_BUCKET_LIST ? near : list + first;
    const auto keep = [&](int n, int id) {
        const bool here = ((unsigned)id & low) == bucket;
        const unsigned mask = __ballot_sync(0xffffffffu, here);
        if (here) {
            tokens[at + __popc(mask & below)] = n;
            atomicAdd(&next[id >> bits], 1);
        }
        at += __popc(mask);
    };
#pragma unroll
    for (int i = 0; i < EMBEDDING_BUCKET_HELD; i++) keep(start + i * WARP + lane, held[i]);
    for (int n = start + EMBEDDING_BUCKET_HELD * WARP; n < end; n += WARP) keep(n + lane, n + lane < end ? ids[n + lane] : -1);
    __syncthreads();
    // the counts become sums of those before
    for (int from = 0, base = 0; from < kinds; from += EMBEDDING_BUCKET_THREADS) {
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
    for (int from = 0; from < number; from += EMBEDDING_BUCKET_AHEAD * WARP) {
        int token[EMBEDDING_BUCKET_AHEAD], id[EMBEDDING_BUCKET_AHEAD];
        unsigned same[EMBEDDING_BUCKET_AHEAD];
#pragma unroll
        for (int i = 0; i < EMBEDDING_BUCKET_AHEAD; i++) {
            const int n = from + i * WARP + lane;
            token[i] = n < number ? tokens[n] : -1;
        }
#pragma unroll
        for (int i = 0; i < EMBEDDING_BUCKET_AHEAD; i++) id[i] = token[i] < 0 ? -1 : ids[token[i]];
#pragma unroll
        for (int i = 0; i < EMBEDDING_BUCKET_AHEAD; i++) same[i] = __match_any_sync(0xffffffffu, id[i]);
#pragma unroll
        for (int i = 0; i < EMBEDDING_BUCKET_AHEAD; i++) {
            const int kind = id[i] < 0 ? 0 : id[i] >> bits, place = next[kind];
            __syncwarp();
            if (id[i] >= 0) {
                const int to = place + __popc(same[i] & below), run = begin[kind];
                leave(first + to, id[i], token[i], to - run, begin[kind + 1] - run);
                if (!(same[i] & below)) next[kind] = place + __popc(same[i]);
            }
            __syncwarp();
        }
    }
}

// sorted (N): the ids in their new order; places (N): where each stood
static __global__ void __launch_bounds__(EMBEDDING_BUCKET_THREADS)
    embedding_buckets_kernel(int32_t* sorted, int32_t* places, int32_t* list, const int32_t* __restrict__ ids, int N, int V,
                             int bits) {
    embedding_bucket(list, ids, N, V, bits,
                     [=](int to, int id, int n, int, int) { sorted[to] = id, places[to] = n; });
}

// sum += the numbers of a pack. What is kept for a while stays 16 bytes: taken apart, it would fill twice the registers
__device__ __forceinline__ void embedding_add_pack(float (&sum)[PACK], int4 bits) {
    PackX x;
    asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    memcpy(&x, &bits, 16);
    for (int k = 0; k < PACK; k++) sum[k] += x.get(k);
}

__device__ __forceinline__ void embedding_leave(float* to, const float (&sum)[PACK]) {
    for (int k = 0; k < PACK; k += 4) *(float4*)(to + k) = make_float4(sum[k], sum[k + 1], sum[k + 2], sum[k + 3]);
}

// where a tile's sums lie: of its first run, when that began before it; of its last run, when that began in it and goes on
template <typename T>
__device__ __forceinline__ T* embedding_first_part(T* parts, int tile, int C) {
    return parts + (size_t)tile * 2 * C;
}
template <typename T>
__device__ __forceinline__ T* embedding_last_part(T* parts, int tile, int C) {
    return parts + ((size_t)tile * 2 + 1) * C;
}

// ids (N) in their new order, places (N): where each stood. `rows` of them, at most 32, are a tile
static __global__ void __launch_bounds__(EMBEDDING_TILE_THREADS, 4)
    embedding_tiles_kernel(floatX* dw, float* parts, const floatX* __restrict__ dx, const int32_t* ids,
                           const int32_t* places, int rows, int N, int C) {
    const int lane = threadIdx.x % WARP, slices = (C + WARP * PACK - 1) / (WARP * PACK);
    const int item = (blockIdx.x * EMBEDDING_TILE_THREADS + threadIdx.x) / WARP, tile = item / slices;
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
    for (int j = 0; j < count; j += EMBEDDING_TILE_AHEAD) {
        int4 d[EMBEDDING_TILE_AHEAD], w[EMBEDDING_TILE_AHEAD];
#pragma unroll
        for (int i = 0; i < EMBEDDING_TILE_AHEAD; i++) {
            const int n = __shfl_sync(0xffffffffu, place, (j + i) % WARP),
                      v = __shfl_sync(0xffffffffu, id, (j + i) % WARP);
            if (j + i >= count || c >= C) continue;
            d[i] = __ldcs((const int4*)(dx + (size_t)n * C + c));
            if ((ends >> (j + i) & 1) && j + i != foreign) w[i] = *(const int4*)(dw + (size_t)v * C + c);
        }
#pragma unroll
        for (int i = 0; i < EMBEDDING_TILE_AHEAD; i++) {
            const int v = __shfl_sync(0xffffffffu, id, (j + i) % WARP);
            if (j + i >= count || c >= C) continue;
            embedding_add_pack(sum, d[i]);
            if (!(ends >> (j + i) & 1)) continue;
            if (j + i == foreign) {
                embedding_leave(embedding_first_part(parts, tile, C) + c, sum);
            } else {
                PackX whole;
                embedding_add_pack(sum, w[i]);
                for (int k = 0; k < PACK; k++) whole.set(k, sum[k]);
                pack_store(dw + (size_t)v * C + c, whole);
            }
            for (int k = 0; k < PACK; k++) sum[k] = 0;
        }
    }
    if ((ends >> (count - 1) & 1) || c >= C) return;
    embedding_leave((foreign == count ? embedding_first_part(parts, tile, C) : embedding_last_part(parts, tile, C)) + c, sum);
}

// Block (i, j): the run that begins in tile i and goes on behind it, if there is one, in the columns of slice j. A warp
// adds the parts of every 8th tile; their sums are added in the order of the warps
static __global__ void __launch_bounds__(EMBEDDING_TILE_THREADS)
    embedding_seams_kernel(floatX* dw, const float* parts, const int32_t* ids, int rows, int N, int C) {
    enum { WARPS = EMBEDDING_TILE_THREADS / WARP };
    __shared__ float sums[WARPS][PACK][WARP];
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
        const float* part = (i ? embedding_first_part(parts, tile + i, C) : embedding_last_part(parts, tile, C)) + c;
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

// adds to dw: the second half of backward, with tiles of `rows`
static inline void embedding_add_tiles(floatX* dw, float* parts, const floatX* dx, const int32_t* sorted,
                                       const int32_t* places, int N, int C, int rows, cudaStream_t stream) {
    const int64_t tiles = ceil_div(N, rows), slices = ceil_div(C, WARP * PACK);
    const unsigned blocks = (unsigned)ceil_div(tiles * slices, EMBEDDING_TILE_THREADS / WARP);
    embedding_tiles_kernel<<<blocks, EMBEDDING_TILE_THREADS, 0, stream>>>(dw, parts, dx, sorted, places, rows, N, C);
    launch_check();
    const dim3 grid((unsigned)tiles, (unsigned)slices);
    embedding_seams_kernel<<<grid, EMBEDDING_TILE_THREADS, 0, stream>>>(dw, parts, sorted, rows, N, C);
    launch_check();
}

// the scratch, as one piece of memory
typedef struct {
    int32_t *sorted, *places, *list; // (N) each
    float* parts;                    // (2 * tiles, C)
    size_t bytes;
} EmbeddingScratch;

static inline EmbeddingScratch embedding_scratch(void* memory, int N, int C) {
    const size_t part = ((size_t)N * sizeof(int32_t) + 255) / 256 * 256;
    EmbeddingScratch s = {};
    s.sorted = (int32_t*)memory;
    s.places = (int32_t*)((char*)memory + part);
    s.list = (int32_t*)((char*)memory + 2 * part);
    s.parts = (float*)((char*)memory + 3 * part);
    s.bytes = 3 * part + 2 * (size_t)ceil_div(N, EMBEDDING_TILE) * (size_t)C * sizeof(float);
    return s;
}

// bytes, to lie at a multiple of 256
static inline size_t embedding_backward_scratch(int N, int C) { return embedding_scratch(NULL, N, C).bytes; }

// adds to dw (V, C)
static inline void embedding_backward(floatX* dw, const floatX* dx, const int32_t* ids, int N, int C, int V,
                                      void* scratch, cudaStream_t stream) {
    GpuOp op("embedding_backward", (N + 2.0 * (N < V ? N : V)) * C * sizeof(floatX), 0, stream);
    launch_require(C > 0 && C % 8 == 0, "embedding", "C (hidden_size) must be a multiple of 8");
    const EmbeddingScratch s = embedding_scratch(scratch, N, C);
    const int bits = embedding_bucket_bits(V);
    embedding_buckets_kernel<<<1u << bits, EMBEDDING_BUCKET_THREADS, embedding_bucket_bytes(V), stream>>>(
        s.sorted, s.places, s.list, ids, N, V, bits);
    launch_check();
    embedding_add_tiles(dw, s.parts, dx, s.sorted, s.places, N, C, EMBEDDING_TILE, stream);
}
#endif
