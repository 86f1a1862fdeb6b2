/*
Attention forward on Hopper: bf16 products of warpgroups (wgmma) out of shared memory that the copy engine (TMA) fills, softmax
in registers. Formulas and shapes are attention.h's, numbers the same as attention_flash.cuh's up to the order of sums.

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
Causal          the first tile of a warpgroup holds its 64 diagonal numbers and is the only one that is masked. A tile that the
                block needs and a warpgroup does not (it lies above its rows) is passed on unread
Rescaling       of O is left out when no row of the warp has a new maximum: after a few tiles that is nearly always
Tasks           a persistent block on each multiprocessor takes the next task from a counter in memory, the longest first. Heads
                come in sections whose K and V fit in the L2 cache; those of a group lie next to each other
Numerics        as flash: S, maxima and sums in fp32, P rounded to bf16 as factor. A task sums in a fixed order, whichever block
                takes it: same bits at every run
Bound by        FLOPs at HD 128; powers as much as FLOPs at HD 64, where 128 keys of 192 queries take 1536 cycles of either
Sizes           HD 64, 128; any T, B; NKV divides NH. sm_90a
Proved by       dev/cuda/attention_forward.cu (against the CPU and against flash)
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

// bytes: the counter of tasks taken
static inline size_t hopper_attention_scratch(void) { return sizeof(unsigned); }

// overwrites out (B*T, NH*HD) and lse (B, NH, T)
static inline void hopper_attention_forward(floatX* out, float* lse, const floatX* qkv, AttentionShape s, void* scratch,
                                            cudaStream_t stream) {
    switch (s.HD) {
    case 64: hopper_forward<64>(out, lse, qkv, s, scratch, stream); break;
    case 128: hopper_forward<128>(out, lse, qkv, s, scratch, stream); break;
    default: launch_require(false, "attention", "hopper takes the head_dim 64 or 128");
    }
}
#endif
