/*
Attention on Hopper: bf16 products of warpgroups (wgmma) out of shared memory that the copy engine (TMA) fills, softmax in
registers. Formulas and shapes are attention.h's, numbers the same as attention_flash.cuh's up to the order of sums.

Forward

    a block     one head, 64 queries to each of 2 (HD 128) or 3 (HD 64) warpgroups, which walk the same keys 128 at a time from
                the diagonal back to key 0; and a warpgroup more, of which one thread starts all copies
    a step      S  = Q · K^T            wgmma, both factors in shared memory
                P  = e^(S - max)        in the registers that received S: rounded to bf16 they are a factor as they are
                O += P · V              wgmma, P in registers, V the transposed factor

Tiles           all of shared memory is squares of 64 rows by 64 columns, 8 KB, as TMA writes them with its 128-byte swizzle. The
                map is (column, t, b), so that rows past T are zeros and never another sequence's. A key past T is to the right
                of every query that exists: the mask of the diagonal hides it. Queries past T compute on zeros and are not stored
Overlap         of the powers (16 a cycle and multiprocessor, 1 for 4*HD FLOPs) with the products, at two levels:
                  within a warpgroup    the products of a step are S of this tile and O of the one before: while the softmax works
                                        on S, O is still summed
                  between warpgroups    they take turns to start their products (a baton, two or three named barriers), so that
                                        one multiplies while the others are at their softmax
                Copies overlap with all of it: two buffers of K and two of V, each with a barrier "full" that counts bytes and
                one "empty" that counts the warps that are done. The producer runs ahead into the next task's K, Q and V
Causal          (forward) the first tile of a warpgroup holds its 64 diagonal numbers and is the only one that is masked. A tile
                that the block needs and a warpgroup does not (it lies above its rows) is passed on unread
Rescaling       of O is left out when no row of the warp has a new maximum: after a few tiles that is nearly always
Tasks           a persistent block on each multiprocessor takes the next task from a counter in memory, the longest first. Heads
                come in sections whose K and V fit in the L2 cache; those of a group lie next to each other
Numerics        as flash: S, maxima and sums in fp32, P rounded to bf16 as factor. A task sums in a fixed order, whichever block
                takes it: same bits at every run

Backward        five products, dQ added up in the L2 cache

    before      for each query, lse in powers of two and dout . out
    a block     128 keys of one kv head, 64 to each of 2 warpgroups, which walk the queries of each head of the group from the
                diagonal down, 64 (HD 128) or 128 (HD 64) at a time; and a warpgroup for loads and for dQ
    a step      S^T  = K · Q^T     dP^T = V · dO^T     P^T = e^(S^T - lse)     dS^T = P^T * (dP^T - dot)
                dV  += P^T · dO    P^T in registers
                dK  += dS^T · Q    dS^T passes through shared memory, because
                dQ   = dS · K      adds over the keys of both warpgroups: each computes a half of the queries or columns
    after       dQ, fp32 in the order that products leave, is scaled, rounded and put in its place

Order of dQ     a counter for each tile of queries says which block of keys is next, so that the sums are the same at each run. A
                thread waits for the turn, starts the copy engine's addition of 32 KB and passes the turn on when it is written;
                the warpgroups only wait until the engine has read their part. Two threads take the steps in turns: the ways to
                the L2 cache and back and the fences of one step lie beside the next (of one thread, the warpgroups waited a
                third of their time). Not ordered, parts are added as they come, on zeros. A block waits for blocks with lower
                numbers alone, and a block's number is a ticket that it draws when it starts: those it waits for are running
                or done, in whatever order the GPU starts them. The first one writes, so that only turns and tickets are zeroed
Overlap         S of the next step is started before dQ is taken out of its registers, dV works while dS is computed, the two
                warpgroups meet once a step

Bound by        FLOPs at HD 128; powers as much as FLOPs at HD 64, where 128 keys of 192 queries take 1536 cycles of either
Rate            H200, TFLOP/s, and how many times that of cuDNN (backward: its reproducible kernel) and of attention_flash.cuh
                in the same run. 32 query heads, 8 kv heads; HD 64: B 4 T 4096, B 2 T 8192; HD 128: the same

                                rate                    / cuDNN                     / flash
                    forward     440  460   553  554     1.07  1.06   1.02  0.97     1.42  1.50   1.57  1.56
                    backward    384  410   425  439     1.47  1.43   1.10  1.07     1.59  1.67   1.60  1.61
                    any order   390  436   423  465     and cuDNN's other kernel, whose bits differ from run to run too:
                                                        376  406   463  499

Sizes           HD 64, 128; any T, B; NKV divides NH. sm_90a
Proved by       dev/cuda/attention_forward.cu, dev/cuda/attention_backward.cu (against the CPU and against flash)
Source          Shah et al. 2024, "FlashAttention-3" (the two overlaps)
*/
#pragma once

#ifndef PRECISION_FP32

#include "hopper.cuh"

enum {
    HOPPER_KEYS = 128,         // of a tile
    HOPPER_BUFFERS = 2,        // of K, and of V
    HOPPER_SQUARE = 8192,      // bytes of 64 x 64
    HOPPER_BATON = 1,          // named barriers: 1 … 3, whose turn it is
    HOPPER_TOGETHER = 4,       // 4 … 6, the threads of one warpgroup
    HOPPER_SECTION = 32 << 20, // bytes of K and V whose heads are worked on at the same time
};

__host__ __device__ constexpr int hopper_warpgroups(int HD) { return HD <= 64 ? 3 : 2; } // that compute
__host__ __device__ constexpr int hopper_queries(int HD) { return 64 * hopper_warpgroups(HD); }
__host__ __device__ constexpr int hopper_threads(int HD) { return 128 * (hopper_warpgroups(HD) + 1); }

// bytes: Q and O, the buffers of K and V, barriers and the task, and what aligns the squares to 1024
template <int HD>
constexpr size_t hopper_forward_shared = sizeof(floatX) * HD*(2 * hopper_queries(HD) +
                                                              2 * HOPPER_BUFFERS * HOPPER_KEYS) +
                                         128 + 1024;

// ---- tasks -----------------------------------------------------------------------------------

typedef struct {
    int b, h, t0; // sequence, head, first query
    int tiles;    // of keys that its queries see
} HopperTask;

// what decides the order of tasks
typedef struct {
    int T, NH, heads, section, tiles; // heads in all (B*NH), in a section; tiles of queries in a sequence
} HopperTasks;

// task i of all: sections one after the other, in a section the last queries first
template <int HD>
__device__ __forceinline__ HopperTask hopper_task(HopperTasks all, int i) {
    const int first = i / (all.section * all.tiles) * all.section, heads = min(all.section, all.heads - first);
    const int rest = i - first * all.tiles, head = first + rest % heads;
    HopperTask x;
    x.b = head / all.NH, x.h = head % all.NH;
    x.t0 = (all.tiles - 1 - rest / heads) * hopper_queries(HD);
    x.tiles = (min(all.T, x.t0 + hopper_queries(HD)) + HOPPER_KEYS - 1) / HOPPER_KEYS;
    return x;
}

// ---- registers of a warpgroup ----------------------------------------------------------------

__device__ __forceinline__ float hopper_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// over the 4 lanes that share a row
__device__ __forceinline__ float hopper_row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float hopper_row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// s = -infinity where the column is more than `ahead` right of the row, both counted within the lane's warp
__device__ __forceinline__ void hopper_mask(float (&s)[HOPPER_KEYS / 2], int ahead, int lane) {
    const int limit = ahead + lane / 4 - lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HOPPER_KEYS / 2; i++)
        if (i / 4 * 8 + i % 2 - i / 2 % 2 * 8 > limit) s[i] = -INFINITY;
}

// the online softmax of a lane's two rows: scores become powers of 2 (c = scale * log2(e)); max and this lane's part of sum
// are brought up to date, rescale is what earlier sums are to be multiplied by
template <bool FIRST>
__device__ __forceinline__ void hopper_softmax(float (&s)[HOPPER_KEYS / 2], float (&max)[2], float (&sum)[2],
                                               float (&rescale)[2], float c) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = FIRST ? -INFINITY : max[r], part = 0;
#pragma unroll
        for (int i = 2 * r; i < HOPPER_KEYS / 2; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
        top = hopper_row_max(top);
        const float shift = top * c;
        rescale[r] = FIRST ? 0 : hopper_exp2(max[r] * c - shift);
        max[r] = top;
#pragma unroll
        for (int i = 2 * r; i < HOPPER_KEYS / 2; i += 4) {
            s[i] = hopper_exp2(s[i] * c - shift), s[i + 1] = hopper_exp2(s[i + 1] * c - shift);
            part += s[i] + s[i + 1];
        }
        sum[r] = FIRST ? part : sum[r] * rescale[r] + part;
    }
}

// the sums, which are not negative, are known from here on: the assembler must not move the next wait in front of their
// powers, as it does when nothing ties the two together. Stores nothing; a wait is not moved across what might store
__device__ __forceinline__ void hopper_done(const float (&sum)[2], uint32_t address) {
    asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p st.shared.f32 [%1], %0; }" ::"f"(sum[0] + sum[1]),
                 "r"(address)
                 : "memory");
}

template <int N>
__device__ __forceinline__ void hopper_rescale(float (&o)[N], const float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < N; i++) o[i] *= rescale[i / 2 % 2];
}

// sums become factors
__device__ __forceinline__ void hopper_round(uint32_t (&p)[HOPPER_KEYS / 16][4], const float (&s)[HOPPER_KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < HOPPER_KEYS / 2; i += 2) p[i / 8][i / 2 % 4] = bf16_pair(s[i], s[i + 1]);
}

// ---- the kernel ------------------------------------------------------------------------------

template <int HD>
__global__ void __launch_bounds__(hopper_threads(HD), 1)
    hopper_forward_kernel(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap out_map,
                          float* lse, unsigned* taken, HopperTasks all, int NKV, float scale) {
#ifdef HOPPER_CODE
    constexpr int W = hopper_warpgroups(HD), HALVES = HD / 64;       // squares in a row of heads
    constexpr uint32_t OWN = HALVES * HOPPER_SQUARE, TILE = 2 * OWN; // bytes: 64 rows, 128 rows
    extern __shared__ __align__(1024) unsigned char hopper_memory[];
    const uint32_t q_tile = (shared_address(hopper_memory) + 1023) / 1024 * 1024, o_tile = q_tile + W * OWN,
                   k_tile = o_tile + W * OWN, v_tile = k_tile + HOPPER_BUFFERS * TILE;
    const uint32_t q_full = v_tile + HOPPER_BUFFERS * TILE, q_empty = q_full + 8, k_full = q_empty + 8,
                   k_empty = k_full + 8 * HOPPER_BUFFERS, v_full = k_empty + 8 * HOPPER_BUFFERS,
                   v_empty = v_full + 8 * HOPPER_BUFFERS, task_full = v_empty + 8 * HOPPER_BUFFERS,
                   task_empty = task_full + 8, task = task_empty + 8;
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); // the compiler sees that a warp shares it
    const unsigned total = (unsigned)(all.heads * all.tiles);
    const int T = all.T;
    if (threadIdx.x == 0) {
        tma_prefetch(&qkv_map), tma_prefetch(&out_map);
        mbarrier_init(q_full, 1), mbarrier_init(q_empty, 4 * W);
        mbarrier_init(task_full, 1), mbarrier_init(task_empty, 4 * W);
        for (int i = 0; i < HOPPER_BUFFERS; i++) {
            mbarrier_init(k_full + 8 * i, 1), mbarrier_init(k_empty + 8 * i, 4 * W);
            mbarrier_init(v_full + 8 * i, 1), mbarrier_init(v_empty + 8 * i, 4 * W);
        }
        mbarrier_init_done();
    }
    __syncthreads();

    if (warpgroup == 0) { // the producer
        registers_give<W == 2 ? 40 : 32>();
        if (threadIdx.x == 0) {
            // 128 rows of keys or values
            auto load = [&](uint32_t to, uint32_t full, int head, int j0, int b) {
                mbarrier_expect(full, TILE);
#pragma unroll 1
                for (int i = 0; i < 2 * HALVES; i++)
                    tma_load(to + i * HOPPER_SQUARE, &qkv_map, full, head * HD + i / 2 * 64, j0 + i % 2 * 64, b);
            };
            unsigned i = blockIdx.x;
            for (uint32_t round = 0, use = 0;; round++) {
                mbarrier_wait(task_empty, round % 2 ^ 1);
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(task), "r"(i) : "memory");
                mbarrier_arrive(task_full);
                if (i >= total) break;
                const HopperTask x = hopper_task<HD>(all, (int)i);
                const int k_head = all.NH + x.h / (all.NH / NKV);
                i = gridDim.x + atomicAdd(taken, 1);
                for (int n = x.tiles - 1; n >= 0; n--, use++) {
                    const uint32_t buffer = use % HOPPER_BUFFERS, emptied = use / HOPPER_BUFFERS % 2 ^ 1;
                    mbarrier_wait(k_empty + 8 * buffer, emptied);
                    load(k_tile + buffer * TILE, k_full + 8 * buffer, k_head, n * HOPPER_KEYS, x.b);
                    if (n == x.tiles - 1) {
                        mbarrier_wait(q_empty, round % 2 ^ 1);
                        mbarrier_expect(q_full, W * OWN);
#pragma unroll 1
                        for (int i = 0; i < W * HALVES; i++)
                            tma_load(q_tile + i * HOPPER_SQUARE, &qkv_map, q_full, x.h * HD + i % HALVES * 64,
                                     x.t0 + i / HALVES * 64, x.b);
                    }
                    mbarrier_wait(v_empty + 8 * buffer, emptied);
                    load(v_tile + buffer * TILE, v_full + 8 * buffer, k_head + NKV, n * HOPPER_KEYS, x.b);
                }
            }
        }
    } else {
        registers_take<W == 2 ? 232 : 160>();
        const int w = warpgroup - 1, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
        const uint32_t own_o = o_tile + w * OWN;
        const uint64_t q = wgmma_rows(q_tile + w * OWN), k = wgmma_rows(k_tile),
                       v = wgmma_columns(v_tile, 2 * HOPPER_SQUARE);
        const float c = scale * 1.4426950408889634f;
        float s[HOPPER_KEYS / 2], o[HD / 2], max[2], sum[2], rescale[2];
        uint32_t p[HOPPER_KEYS / 16][4];

        // starts s = Q · K^T; o = P · V, or o += P · V
        auto start_s = [&](uint32_t buffer) {
#pragma unroll
            for (int i = 0; i < HD; i += 16)
                wgmma(s, q + (i / 64 * HOPPER_SQUARE + i % 64 * 2) / 16,
                      k + (buffer * TILE + i / 64 * 2 * HOPPER_SQUARE + i % 64 * 2) / 16, i > 0);
            wgmma_commit();
        };
        auto start_o = [&](uint32_t buffer, bool add) {
#pragma unroll
            for (int i = 0; i < HOPPER_KEYS; i += 16)
                wgmma<1>(o, p[i / 16], v + (buffer * TILE + i * 128) / 16, add || i > 0);
            wgmma_commit();
        };
        auto full = [&](uint32_t bars, uint32_t use) {
            mbarrier_wait(bars + 8 * (use % HOPPER_BUFFERS), use / HOPPER_BUFFERS % 2);
        };
        auto release = [&](uint32_t bars, uint32_t use) {
            if (lane == 0) mbarrier_arrive(bars + 8 * (use % HOPPER_BUFFERS));
        };
        auto turn_wait = [&] { barrier_sync(HOPPER_BATON + w, 256); };
        auto turn_pass = [&] { barrier_arrive(HOPPER_BATON + (w + 1) % W, 256); };

        if (w == W - 1) turn_pass(); // the first warpgroup begins
        for (uint32_t round = 0, use = 0;; round++) {
            unsigned i;
            mbarrier_wait(task_full, round % 2);
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(i) : "r"(task) : "memory");
            __syncwarp();
            if (lane == 0) mbarrier_arrive(task_empty);
            if (i >= total) break;
            const HopperTask x = hopper_task<HD>(all, (int)i);
            const int r0 = x.t0 + 64 * w, mine = min(x.tiles, r0 / HOPPER_KEYS + 1);
            for (int n = x.tiles; n > mine; n--, use++) { // above this warpgroup's rows
                full(k_full, use), full(v_full, use);
                release(k_empty, use), release(v_empty, use);
                turn_wait(), turn_pass();
            }
            mbarrier_wait(q_full, round % 2);
            full(k_full, use);
            wgmma_fence();
            start_s(use % HOPPER_BUFFERS);
            wgmma_wait<0>(s);
            release(k_empty, use);
            hopper_mask(s, r0 + 16 * warp - (mine - 1) * HOPPER_KEYS, lane);
            hopper_softmax<true>(s, max, sum, rescale, c);
            hopper_round(p, s);
            for (int n = mine - 1; n > 0; n--, use++) {
                full(k_full, use + 1), full(v_full, use);
                turn_wait();
                wgmma_fence();
                start_s((use + 1) % HOPPER_BUFFERS);
                start_o(use % HOPPER_BUFFERS, n < mine - 1);
                turn_pass();
                wgmma_wait<1>(s);
                release(k_empty, use + 1);
                hopper_softmax<false>(s, max, sum, rescale, c);
                hopper_done(sum, q_full);
                wgmma_wait<0>(o);
                release(v_empty, use);
                if (__any_sync(0xffffffffu, rescale[0] != 1 || rescale[1] != 1)) hopper_rescale(o, rescale);
                hopper_round(p, s);
            }
            if (lane == 0) mbarrier_arrive(q_empty);
            full(v_full, use);
            wgmma_fence();
            start_o(use % HOPPER_BUFFERS, mine > 1);
            wgmma_wait<0>(o);
            release(v_empty, use++);

#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float total_sum = hopper_row_sum(sum[r]);
                const int t = r0 + 16 * warp + lane / 4 + 8 * r;
                if (lane % 4 == 0 && t < T)
                    lse[((size_t)x.b * all.NH + x.h) * T + t] = max[r] * scale + logf(total_sum);
                rescale[r] = 1 / total_sum;
            }
            hopper_rescale(o, rescale);
            if (threadIdx.x % 128 == 0) tma_store_wait_read<0>(); // the task before is out of shared memory
            barrier_sync(HOPPER_TOGETHER + w, 128);
            const int row = 16 * warp + lane % 16;
#pragma unroll
            for (int i = 0; i < HD / 2; i += 8)
                stmatrix(own_o + i / 32 * HOPPER_SQUARE +
                             hopper_swizzle((uint32_t)(row * 128 + i % 32 * 4 + lane / 16 * 16)),
                         bf16_pair(o[i], o[i + 1]), bf16_pair(o[i + 2], o[i + 3]), bf16_pair(o[i + 4], o[i + 5]),
                         bf16_pair(o[i + 6], o[i + 7]));
            fence_async();
            barrier_sync(HOPPER_TOGETHER + w, 128);
            if (threadIdx.x % 128 == 0) {
#pragma unroll
                for (int i = 0; i < HALVES; i++)
                    tma_store(&out_map, own_o + i * HOPPER_SQUARE, x.h * HD + i * 64, r0, x.b);
                tma_store_commit();
            }
        }
        if (threadIdx.x % 128 == 0) tma_store_wait<0>();
    }
#endif
}

// ---- backward: numbers of queries, before ------------------------------------------------------
// stats (B, NH, tiles of queries): for each tile lse of all its queries, in powers of two, then dout . out of all. Queries past T:
// infinity and 0, so that their p and ds are 0

enum { HOPPER_STEP = 8192, HOPPER_PREPARE_THREADS = 256 };

__host__ __device__ constexpr int hopper_step(int HD) {
    return HOPPER_STEP / HD;
} // queries of a step of the backward pass

// HD / 8 lanes a query, 16 bytes a lane
template <int HD>
__global__ void __launch_bounds__(HOPPER_PREPARE_THREADS)
    hopper_prepare_kernel(float* stats, const floatX* dout, const floatX* out, const float* lse, int T, int padded,
                          int NH, int64_t rows) {
    constexpr int LANES = HD / PACK;
    const int64_t i = ((int64_t)blockIdx.x * HOPPER_PREPARE_THREADS + threadIdx.x) / LANES; // of (B, NH, padded)
    const int chunk = threadIdx.x % LANES, t = (int)(i % padded);
    const int64_t h = i / padded % NH, b = i / padded / NH;
    const bool exists = i < rows && t < T;
    float sum = 0;
    if (exists) {
        const int64_t at = ((b * T + t) * NH + h) * HD + chunk * PACK;
        const PackX x = pack_load(dout + at), y = pack_load(out + at);
#pragma unroll
        for (int j = 0; j < PACK; j++) sum += x.get(j) * y.get(j);
    }
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (i >= rows || chunk) return;
    constexpr int M = hopper_step(HD);
    float* to = stats + i / M * (2 * M) + i % M;
    to[0] = exists ? lse[(b * NH + h) * T + t] * 1.4426950408889634f : INFINITY, to[M] = sum;
}

// ---- backward: dK, dV and parts of dQ ----------------------------------------------------------

// a run of fp32 numbers, a multiple of 16 bytes, added to others by the copy engine; part of the group that tma_store_commit closes
__device__ __forceinline__ void hopper_run_add(float* to, uint32_t from, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void hopper_load(float (&x)[2], uint32_t from) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(from) : "memory");
}

// one thread: until `turn` blocks have had their turn at a tile of dQ; and the next one's turn. What the copy engine wrote
// before a turn is passed comes before what it writes after that turn is seen
__device__ __forceinline__ void hopper_turn_wait(const unsigned* turns, unsigned turn) {
    asm volatile("{ .reg .pred p; .reg .u32 now; .reg .u64 since, then;\n"
                 "mov.u64 since, %%globaltimer;\n"
                 "again:\n"
                 "ld.acquire.gpu.global.u32 now, [%0];\n"
                 "setp.eq.u32 p, now, %1;\n"
                 "@p bra done;\n"
                 "mov.u64 then, %%globaltimer;\n"
                 "sub.u64 then, then, since;\n"
                 "setp.lt.u64 p, then, %2;\n"
                 "@p bra again;\n"
                 "trap;\n"
                 "done: fence.proxy.async; }" ::"l"(turns),
                 "r"(turn), "n"(HOPPER_PATIENCE)
                 : "memory");
}
__device__ __forceinline__ void hopper_turn_pass(unsigned* turns, unsigned turn) {
    asm volatile("fence.proxy.async; st.release.gpu.global.u32 [%0], %1;" ::"l"(turns), "r"(turn + 1) : "memory");
}

// where the numbers of a tile of dQ (HOPPER_STEP fp32) lie: number e of register pack i of thread `thread` of warpgroup w at
// ((w * 8 + i) * 128 + thread) * 4 + e. It is d[4 * i + e] of a product m64n64: of 64 queries and 64 columns; at HD 128 the
// warpgroups have a half of the columns each, at HD 64 a half of the queries

struct HopperBackward {
    floatX* dqkv;
    float* dq;       // (B, NH, tiles, HOPPER_STEP)
    unsigned* turns; // (B, NH, tiles)
    unsigned* taken; // tickets
    const float* stats;
    int T, NH, NKV, tiles; // tiles: of hopper_step(HD) queries
    unsigned heads;        // B*NKV
    float scale;
};

// bytes: K and V; two buffers of Q, of dO, of dS and of stats; dQ; barriers; what aligns the squares
template <int HD>
constexpr size_t hopper_backward_shared = sizeof(floatX) * (2 * HOPPER_KEYS * HD + 4 * HOPPER_STEP +
                                                            2 * HOPPER_KEYS * hopper_step(HD)) +
                                          sizeof(float) * HOPPER_STEP + 4 * sizeof(float) * hopper_step(HD) + 128 +
                                          1024;

// 128 keys of one kv head; a block for each of B*NKV heads and each tile of keys, which its ticket names: the first tiles
// first, they have most queries, and a tile of dQ waits for them
template <int HD, bool ORDERED>
__global__ void __launch_bounds__(384, 1)
    hopper_backward_kernel(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap dout_map,
                           HopperBackward x) {
#ifdef HOPPER_CODE
    constexpr int M = hopper_step(HD), HALVES = HD / 64, BOXES = HOPPER_STEP / 4096;   // squares of a step of Q
    constexpr uint32_t KEYS_TILE = HALVES * 2 * HOPPER_SQUARE, STEP = 2 * HOPPER_STEP, // bytes: of K, of a step of Q
        DS = 2 * HOPPER_KEYS * M, STATS = 2 * sizeof(float) * M;
    extern __shared__ __align__(1024) unsigned char hopper_memory[];
    const uint32_t k_tile = (shared_address(hopper_memory) + 1023) / 1024 * 1024, v_tile = k_tile + KEYS_TILE,
                   q_tile = v_tile + KEYS_TILE, do_tile = q_tile + 2 * STEP, ds_tile = do_tile + 2 * STEP,
                   dq_tile = ds_tile + 2 * DS, stats = dq_tile + 4 * HOPPER_STEP;
    const uint32_t kv_full = stats + 2 * STATS, q_full = kv_full + 8, q_empty = q_full + 16, do_full = q_empty + 16,
                   do_empty = do_full + 16, dq_full = do_empty + 16, dq_empty = dq_full + 8, ticket = dq_empty + 8;
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), warp = threadIdx.x / WARP % 4;
    if (threadIdx.x == 0) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(ticket), "r"(atomicAdd(x.taken, 1)) : "memory");
        tma_prefetch(&qkv_map), tma_prefetch(&dout_map);
        mbarrier_init(kv_full, 1), mbarrier_init(dq_full, 8), mbarrier_init(dq_empty, 1);
        for (int i = 0; i < 2; i++) {
            mbarrier_init(q_full + 8 * i, 1), mbarrier_init(q_empty + 8 * i, 8);
            mbarrier_init(do_full + 8 * i, 1), mbarrier_init(do_empty + 8 * i, 8);
        }
        mbarrier_init_done();
    }
    __syncthreads();
    unsigned number;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(number) : "r"(ticket) : "memory");
    const unsigned turn = number / x.heads; // the tile of keys
    const int g = (int)(number % x.heads) % x.NKV, b = (int)(number % x.heads) / x.NKV, j0 = (int)turn * HOPPER_KEYS;
    const int G = x.NH / x.NKV;
    const int first = j0 / M, steps = G * (x.tiles - first); // the first tile of queries; of all heads

    if (warpgroup == 0) {
        registers_give<24>();
        if (threadIdx.x == 0) { // loads
            auto load = [&](uint32_t to, const CUtensorMap* map, uint32_t full, int column, int t0, int boxes,
                            int rows) {
#pragma unroll 1
                for (int i = 0; i < boxes; i++) // squares: those of 64 columns one below the other
                    tma_load(to + i * HOPPER_SQUARE, map, full, column + i / rows * 64, t0 + i % rows * 64, b);
            };
            const int k_column = (x.NH + g) * HD;
            mbarrier_expect(kv_full, 2 * KEYS_TILE);
            load(k_tile, &qkv_map, kv_full, k_column, j0, 2 * HALVES, 2);
            load(v_tile, &qkv_map, kv_full, k_column + x.NKV * HD, j0, 2 * HALVES, 2);
            int h = g * G, tile = first;
            for (uint32_t i = 0; i < (uint32_t)steps; i++) {
                const uint32_t buffer = i % 2, emptied = i / 2 % 2 ^ 1;
                mbarrier_wait(q_empty + 8 * buffer, emptied);
                mbarrier_expect(q_full + 8 * buffer, STEP + STATS);
                load(q_tile + buffer * STEP, &qkv_map, q_full + 8 * buffer, h * HD, tile * M, BOXES, M / 64);
                bulk_load(stats + buffer * STATS, x.stats + (((size_t)b * x.NH + h) * x.tiles + tile) * (2 * M),
                                STATS, q_full + 8 * buffer);
                mbarrier_wait(do_empty + 8 * buffer, emptied);
                mbarrier_expect(do_full + 8 * buffer, STEP);
                load(do_tile + buffer * STEP, &dout_map, do_full + 8 * buffer, h * HD, tile * M, BOXES, M / 64);
                if (++tile == x.tiles) tile = first, h++;
            }
        } else if (threadIdx.x == WARP || (ORDERED && threadIdx.x == 2 * WARP)) {
            // what a step has of dQ; ordered, the odd steps by one thread and the even ones by another
            int h = g * G, tile = first;
            for (uint32_t i = 0; i < (uint32_t)steps; i++) {
                if (!ORDERED || i % 2 == (uint32_t)(warp - 1)) {
                    const size_t at = ((size_t)b * x.NH + h) * x.tiles + tile;
                    if (ORDERED && turn) hopper_turn_wait(x.turns + at, turn);
                    if (ORDERED && i) mbarrier_wait(dq_empty, i % 2 ^ 1); // the step before is the other thread's
                    mbarrier_wait(dq_full, i % 2);
                    if (!ORDERED || turn)
                        hopper_run_add(x.dq + at * HOPPER_STEP, dq_tile, 4 * HOPPER_STEP);
                    else
                        bulk_store(x.dq + at * HOPPER_STEP, dq_tile, 4 * HOPPER_STEP);
                    tma_store_commit();
                    tma_store_wait_read<0>();
                    mbarrier_arrive(dq_empty);
                    if (ORDERED) {
                        tma_store_wait<0>();
                        hopper_turn_pass(x.turns + at, turn);
                    }
                }
                if (++tile == x.tiles) tile = first, h++;
            }
            tma_store_wait<0>();
        }
    } else {
        registers_take<240>();
        const int w = warpgroup - 1, lane = threadIdx.x % WARP, thread = threadIdx.x % 128;
        const int key = j0 + 64 * w + 16 * warp + lane / 4; // of this lane's first row
        const uint64_t k = wgmma_rows(k_tile + w * HOPPER_SQUARE), v = wgmma_rows(v_tile + w * HOPPER_SQUARE),
                       q_rows = wgmma_rows(q_tile), do_rows = wgmma_rows(do_tile),
                       q_columns = wgmma_columns(q_tile, M * 128), do_columns = wgmma_columns(do_tile, M * 128),
                       ds_rows = wgmma_rows(ds_tile + w * HOPPER_SQUARE), // of dK
            // of dQ: the queries of dS (a), the columns of K (b)
            ds = wgmma_columns(ds_tile + (HALVES == 1 ? w * 2 * HOPPER_SQUARE : 0), 0),
                       k_columns = wgmma_columns(k_tile + (HALVES == 2 ? w * 2 * HOPPER_SQUARE : 0), 0);
        const float c = x.scale * 1.4426950408889634f;
        float s[M / 2], dp[M / 2], dk[HD / 2], dv[HD / 2];
        float(&dq)[32] = *reinterpret_cast<float(*)[32]>(dp); // dP is used up when dQ begins
        uint32_t p[M / 16][4];

        // starts d (64 keys, M queries) = rows of K or V · a step of Q or dO
        auto start_dot = [&](float(&d)[M / 2], uint64_t rows, uint64_t step) {
#pragma unroll
            for (int i = 0; i < HD; i += 16)
                wgmma(d, rows + (i / 64 * 2 * HOPPER_SQUARE + i % 64 * 2) / 16,
                      step + (i / 64 * M * 128 + i % 64 * 2) / 16, i > 0);
            wgmma_commit();
        };
        auto release = [&](uint32_t bar) {
            if (lane == 0) mbarrier_arrive(bar);
        };

        mbarrier_wait(kv_full, 0);
        mbarrier_wait(q_full, 0);
        wgmma_fence();
        start_dot(s, k, q_rows);
        int tile = first;
        for (uint32_t i = 0; i < (uint32_t)steps; i++) {
            const uint32_t buffer = i % 2, at = buffer * (STEP / 16);
            mbarrier_wait(do_full + 8 * buffer, i / 2 % 2);
            wgmma_fence();
            start_dot(dp, v, do_rows + at);
            wgmma_wait<1>(s);
            const uint32_t numbers = stats + buffer * STATS + lane % 4 * 8;
#pragma unroll
            for (int n = 0; n < M / 8; n++) {
                float l[2];
                hopper_load(l, numbers + n * 32);
#pragma unroll
                for (int e = 0; e < 4; e++) s[4 * n + e] = hopper_exp2(s[4 * n + e] * c - l[e % 2]);
            }
            if (tile * M < j0 + HOPPER_KEYS) { // the diagonal: queries that do not see the key
                const int behind = key - tile * M - lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < M / 2; n++)
                    if (n / 4 * 8 + n % 2 < behind + n / 2 % 2 * 8) s[n] = 0;
            }
#pragma unroll
            for (int n = 0; n < M / 2; n += 2) p[n / 8][n / 2 % 4] = bf16_pair(s[n], s[n + 1]);
            wgmma_fence();
#pragma unroll
            for (int n = 0; n < M; n += 16) // dV += P^T · dO
                wgmma<1>(dv, p[n / 16], do_columns + at + n * 128 / 16, i > 0 || n > 0);
            wgmma_commit();
            wgmma_wait<(HD == 64 ? 0 : 1)>(dp); // at HD 64 the registers of p are needed: dV too
#pragma unroll
            for (int n = 0; n < M / 8; n++) {
                float d[2];
                hopper_load(d, numbers + 4 * M + n * 32);
#pragma unroll
                for (int e = 0; e < 4; e++) s[4 * n + e] *= dp[4 * n + e] - d[e % 2];
            }
            const int row = 64 * w + 16 * warp + lane % 16;
#pragma unroll
            for (int n = 0; n < M / 2; n += 8)
                stmatrix(ds_tile + buffer * DS + n / 32 * 2 * HOPPER_SQUARE +
                             hopper_swizzle((uint32_t)(row * 128 + n % 32 * 4 + lane / 16 * 16)),
                         bf16_pair(s[n], s[n + 1]), bf16_pair(s[n + 2], s[n + 3]), bf16_pair(s[n + 4], s[n + 5]),
                         bf16_pair(s[n + 6], s[n + 7]));
            fence_async();
            barrier_sync(1, 256); // dS of both warpgroups
            wgmma_fence();
#pragma unroll
            for (int n = 0; n < M; n += 16) // dK += dS^T · Q
                wgmma<0, 1>(dk, ds_rows + (buffer * DS + n / 64 * 2 * HOPPER_SQUARE + n % 64 * 2) / 16,
                            q_columns + at + n * 128 / 16, i > 0 || n > 0);
            wgmma_commit();
#pragma unroll
            for (int n = 0; n < HOPPER_KEYS; n += 16)
                wgmma<1, 1>(dq, ds + (buffer * DS + n * 128) / 16, k_columns + n * 128 / 16, n > 0);
            wgmma_commit();
            if (i + 1 < (uint32_t)steps) mbarrier_wait(q_full + 8 * (buffer ^ 1), (i + 1) / 2 % 2);
            wgmma_fence();
            start_dot(s, k, q_rows + (STEP / 16 - at)); // of the next step; after the last, of what lies there
            wgmma_wait<1>(dq);
            release(q_empty + 8 * buffer), release(do_empty + 8 * buffer);
            mbarrier_wait(dq_empty, i % 2 ^ 1);
#pragma unroll
            for (int n = 0; n < 8; n++)
                asm volatile(
                    "st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(dq_tile + ((w * 8 + n) * 128 + thread) * 16),
                    "f"(dq[4 * n]), "f"(dq[4 * n + 1]), "f"(dq[4 * n + 2]), "f"(dq[4 * n + 3])
                    : "memory");
            fence_async();
            __syncwarp();
            release(dq_full);
            if (++tile == x.tiles) tile = first;
        }
        wgmma_wait<0>(s);
        wgmma_keep(dk), wgmma_keep(dv);
        const size_t ld = (size_t)(x.NH + 2 * x.NKV) * HD;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (key + 8 * r >= x.T) continue;
            floatX* to = x.dqkv + ((size_t)b * x.T + key + 8 * r) * ld + (size_t)(x.NH + g) * HD + lane % 4 * 2;
#pragma unroll
            for (int n = 2 * r; n < HD / 2; n += 4) {
                *(uint32_t*)(to + n / 4 * 8) = bf16_pair(dk[n] * x.scale, dk[n + 1] * x.scale);
                *(uint32_t*)(to + (size_t)x.NKV * HD + n / 4 * 8) = bf16_pair(dv[n], dv[n + 1]);
            }
        }
    }
#endif
}

// ---- backward: dQ, after ------------------------------------------------------------------------

// a block a tile: fp32 sums, in the order that products left them, become rows of dqkv
template <int HD>
__global__ void __launch_bounds__(256)
    hopper_round_kernel(floatX* dqkv, const float* dq, int T, int tiles, int NH, int64_t ld, float scale) {
    constexpr int M = hopper_step(HD);
    const int tile = blockIdx.x % tiles, h = blockIdx.x / tiles % NH, b = blockIdx.x / tiles / NH;
    const int w = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % WARP;
    const float4* from = (const float4*)dq + (size_t)blockIdx.x * (HOPPER_STEP / 4) + w * 1024 + thread;
    const int t = tile * M + (HD == 64 ? 64 * w : 0) + thread / WARP * 16 + lane / 4;
    floatX* to = dqkv + ((int64_t)b * T + t) * ld + (int64_t)h * HD + (HD == 128 ? 64 * w : 0) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float4 sum = __ldcs(from + i * 128);
        if (t < T) *(uint32_t*)(to + i * 8) = bf16_pair(sum.x * scale, sum.y * scale);
        if (t + 8 < T) *(uint32_t*)(to + 8 * ld + i * 8) = bf16_pair(sum.z * scale, sum.w * scale);
    }
}

// ---- launchers -------------------------------------------------------------------------------

// (column, t, b) in squares of 64 x 64
static inline CUtensorMap hopper_attention_map(const floatX* x, int B, int T, int64_t columns) {
    const int64_t sizes[3] = { columns, T, B }, strides[2] = { columns, columns * T };
    const int box[3] = { 64, 64, 1 };
    return tma_map(x, 3, sizes, strides, box, 128);
}

template <int HD>
static void hopper_forward(floatX* out, float* lse, const floatX* qkv, AttentionShape s, void* scratch,
                           cudaStream_t stream) {
    HopperTasks all;
    all.T = s.T, all.NH = s.NH, all.heads = s.B * s.NH;
    all.tiles = (int)ceil_div(s.T, hopper_queries(HD));
    const int64_t groups = HOPPER_SECTION / ((int64_t)s.T * HD * 2 * (int64_t)sizeof(floatX)), G = s.NH / s.NKV;
    all.section = (int)(groups < 1 ? G : groups * G < all.heads ? groups * G : all.heads);
    const int64_t tasks = (int64_t)all.heads * all.tiles, processors = gpu_processors();
    cuda_check(cudaFuncSetAttribute(hopper_forward_kernel<HD>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)hopper_forward_shared<HD>));
    cuda_check(cudaMemsetAsync(scratch, 0, sizeof(unsigned), stream));
    hopper_forward_kernel<HD>
        <<<(unsigned)(tasks < processors ? tasks : processors), hopper_threads(HD), hopper_forward_shared<HD>,
           stream>>>(hopper_attention_map(qkv, s.B, s.T, (int64_t)(s.NH + 2 * s.NKV) * HD),
                     hopper_attention_map(out, s.B, s.T, (int64_t)s.NH * HD), lse, (unsigned*)scratch, all, s.NKV,
                     1 / sqrtf((float)HD));
    launch_check();
}

template <int HD, bool ORDERED>
static void hopper_backward(floatX* dqkv, const floatX* dout, const floatX* qkv, const floatX* out, const float* lse,
                            AttentionShape s, void* scratch, cudaStream_t stream) {
    const int M = hopper_step(HD), tiles = (int)ceil_div(s.T, M);
    const size_t all = (size_t)s.B * s.NH * tiles;
    const int64_t ld = (int64_t)(s.NH + 2 * s.NKV) * HD, rows = (int64_t)all * M;
    HopperBackward x;
    x.dqkv = dqkv, x.dq = (float*)scratch, x.T = s.T, x.NH = s.NH, x.NKV = s.NKV, x.tiles = tiles;
    float* stats = x.dq + all * HOPPER_STEP;
    x.stats = stats, x.turns = (unsigned*)(stats + 2 * rows), x.taken = x.turns + all;
    x.heads = (unsigned)(s.B * s.NKV), x.scale = 1 / sqrtf((float)HD);
    if (!ORDERED) cuda_check(cudaMemsetAsync(x.dq, 0, all * HOPPER_STEP * sizeof(float), stream));
    cuda_check(cudaMemsetAsync(x.turns, 0, (all + 1) * sizeof(unsigned), stream));
    hopper_prepare_kernel<HD>
        <<<(unsigned)ceil_div(rows * (HD / PACK), HOPPER_PREPARE_THREADS), HOPPER_PREPARE_THREADS, 0, stream>>>(
            stats, dout, out, lse, s.T, tiles * M, s.NH, rows);
    launch_check();
    cuda_check(cudaFuncSetAttribute(hopper_backward_kernel<HD, ORDERED>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)hopper_backward_shared<HD>));
    const unsigned blocks = x.heads * (unsigned)ceil_div(s.T, HOPPER_KEYS);
    hopper_backward_kernel<HD, ORDERED><<<blocks, 384, hopper_backward_shared<HD>, stream>>>(
        hopper_attention_map(qkv, s.B, s.T, ld), hopper_attention_map(dout, s.B, s.T, (int64_t)s.NH * HD), x);
    launch_check();
    hopper_round_kernel<HD><<<(unsigned)all, 256, 0, stream>>>(dqkv, x.dq, s.T, tiles, s.NH, ld, x.scale);
    launch_check();
}

static inline bool hopper_attention_supports(AttentionShape s, Error* why) {
    const char* refused = hopper_refuses();
    if (refused) return set_error(why, "%s", refused);
    if (s.HD != 64 && s.HD != 128) return set_error(why, "head_dim is %d, 64 or 128 expected", s.HD);
    if (s.NKV < 1 || s.NH % s.NKV)
        return set_error(why, "%d key/value heads do not divide %d query heads", s.NKV, s.NH);
    if ((int64_t)s.B * s.NH * ceil_div(s.T, hopper_queries(s.HD)) > (1 << 30))
        return set_error(why, "%d heads of %d sequences of %d tokens are more tasks than 2^30", s.NH, s.B, s.T);
    return true;
}

// tiles of queries of a backward pass, in all
static inline size_t hopper_backward_tiles(AttentionShape s) {
    return (size_t)s.B * s.NH * (size_t)ceil_div(s.T, hopper_step(s.HD));
}

// bytes: the counter of tasks taken; or dQ, stats, turns and the counter of tickets
static inline size_t hopper_attention_scratch(AttentionShape s, bool backward) {
    if (!backward) return sizeof(unsigned);
    return hopper_backward_tiles(s) *
               (HOPPER_STEP * sizeof(float) + (size_t)hopper_step(s.HD) * 2 * sizeof(float) + sizeof(unsigned)) +
           sizeof(unsigned);
}

// overwrites out (B*T, NH*HD) and lse (B, NH, T)
static inline void hopper_attention_forward(floatX* out, float* lse, const floatX* qkv, AttentionShape s, void* scratch,
                                            cudaStream_t stream) {
    switch (s.HD) {
    case 64: hopper_forward<64>(out, lse, qkv, s, scratch, stream); break;
    case 128: hopper_forward<128>(out, lse, qkv, s, scratch, stream); break;
    default: launch_require(false, "attention", "hopper takes the head_dim 64 or 128");
    }
}

// overwrites dqkv, which has the layout of qkv. ordered: the same bits at every run
static inline void hopper_attention_backward(floatX* dqkv, const floatX* dout, const floatX* qkv, const floatX* out,
                                             const float* lse, AttentionShape s, bool ordered, void* scratch,
                                             cudaStream_t stream) {
    const auto launch = s.HD == 64 ? (ordered ? hopper_backward<64, true> : hopper_backward<64, false>)
                                   : (ordered ? hopper_backward<128, true> : hopper_backward<128, false>);
    launch_require(s.HD == 64 || s.HD == 128, "attention", "hopper takes the head_dim 64 or 128");
    launch(dqkv, dout, qkv, out, lse, s, scratch, stream);
}
#endif
