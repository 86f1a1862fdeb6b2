/*
Attention on the tensor cores: bf16 products with fp32 sums, the T x T matrix never leaves a multiprocessor. Formulas and
shapes are attention.h's, which includes this file. One warp does all of its work in two kinds of product:

    dot         c (32, N)  += a (32, HD) · b (N, HD)^T      a and b lie in shared memory, row by row
    multiply    c (32, HD) += p (32, N) · b (N, HD)         p is in registers: what a dot before it left there

    forward, 128 queries to a block                         backward, step 1: dot[t] = dout[t] . out[t]
        S  = Q · K^T        dot
        P  = e^(S - max)                                    step 2, 64 keys to a block      step 3, 128 queries to a block
        O += P · V          multiply                            S^T  = K · Q^T   dot            S   = Q · K^T    dot
                                                                dP^T = V · dO^T  dot            dP  = dO · V^T   dot
                                                                dV  += P^T · dO  multiply       dQ  += dS · K    multiply
                                                                dK  += dS^T · Q  multiply

Each block owns what it writes and sums in a fixed order: two runs give the same bits. The price is that S and dP are
computed twice in the backward pass (7 products, not 5); adding dQ up from step 2 would need atomics, or blocks that wait
for each other.

Tiles           what a block has to do with S (T x T, causal):

                        keys                            keys
                      0   64  128 192                 0   64  128 192
                queries                         queries
                  0   +---+                       0   +---+           A forward block (and one of step 3) walks its
                      |m  |                           |   |           rows from left to right. Each of its 4 warps
                  64  +---+---+                   64  +---+---+       has 32 rows, skips the tiles above the
                      | > |m  |                       |   |m  |       diagonal and masks (m) the tile that it cuts.
                  128 +---+---+---+               128 +---+---+---+   A block of step 2 walks its columns from the
                      | > | > |m  |                   |   | v |   |   diagonal down, once for each query head of
                  192 +---+---+---+---+           192 +---+---+---+   the group, with K and V in place all the time:
                      | > | > | > |m  |               |   | v |   |   that is the whole of grouped-query attention.

                The next tile is copied to a second buffer (cp.async) while the products of the present one run: one
                barrier a tile. Blocks with most tiles come first, so that the last to start are the shortest.
Pairs           dV and dK of 32 keys by 128 columns are 256 registers a thread, all there are. So in step 2 two warps share
                32 keys: the first computes P^T and dV, the second dP^T and dK; P^T passes from one to the other through
                shared memory. Both do the same two products, with K, Q and dO in the roles of V, dO and Q.
Fragments       a product of tensor cores, mma.m16n8k16, is c (16, 8) += a (16, 16) · b (16, 8) with the numbers spread over
                the warp: lane = 4*g + t holds, two neighbours to a register,

                    a   columns 2t 2t+1   2t+8 2t+9         b   column g                c   columns 2t 2t+1
                    row g       a[0]        a[2]            rows 2t   2t+1   b[0]       row g      c[0] c[1]
                    row g+8     a[1]        a[3]            rows 2t+8 2t+9   b[1]       row g+8    c[2] c[3]

                Two results side by side hold the columns 2t 2t+1 and 2t+8 2t+9 of a 16 x 16 square: rounded to bf16 they
                are the a of the next product, in the very lanes that need them. P never passes through shared memory
                to be multiplied.
                ldmatrix fetches four 8 x 8 squares at once; lane l names the address of row l % 8 of square l / 8 and
                receives from each square the numbers (g, 2t) and (g, 2t+1); with .trans (2t, g) and (2t+1, g).
Swizzle         a row of a tile is 128 bytes (256 from HD 65 on), so that the 8 rows of a square would begin at the same
                bank and be fetched one after the other. Therefore the 16 bytes called chunk c of row r are kept at
                c xor (r % 8): the 8 chunks of a square then lie in 8 different groups of banks.

                    row 0    0 1 2 3 4 5 6 7            chunk 2 of the rows 0 .. 7 is in the places
                    row 1    1 0 3 2 5 4 7 6            2 3 0 1 6 7 4 5
                    row 2    2 3 0 1 6 7 4 5
                    row 3    3 2 1 0 7 6 5 4 …

                A lane's r % 8 is the same for all squares it names, so the next 16 columns are one xor away.
Numerics        S, dP, maxima and sums in fp32; P and dS are rounded to bf16 as factors of the next product, dP . P included.
                e^x is ex2.approx(x * log2 e): relative error 2^-22, results below 2^-126 are 0. NaN stays visible; one in v
                also reaches the earlier queries of its tile
Bound by        FLOPs: 2 * NH*HD * T^2 a sequence forward, 3.5 times that backward. Shared memory is read at 160 to 213
                bytes a mma (4096 FLOPs), of the 128 a cycle that it gives; powers are 1 for 4*HD FLOPs, of 16 a cycle
Rate            H200, TFLOP/s, 32 query heads, 8 kv heads: forward 312 to 318 at HD 64, 349 to 353 at HD 128; backward 239 to
                241, 258 to 268. mma.sync reaches half of what Hopper's tensor cores can: attention_hopper.cuh is 1.4 to 1.7
                times as fast there
Sizes           HD 32, 48, 64, 128; any T, B; NKV divides NH. sm_80 and up
Proved by       dev/test/gpu/test_attention.cuh (against the CPU and the reference; two runs bit for bit)
Source          Dao 2023, "FlashAttention-2" (order of the loops, sum kept for the end); Milakov and Gimelshein 2018
*/
#pragma once

#ifndef PRECISION_FP32

#include "gpu.cuh"

enum {
    FLASH_THREADS = 128,
    FLASH_ROWS = 32,         // of a warp
    FLASH_QUERIES = 128,     // of a block, forward and step 3
    FLASH_TILE = 64,         // keys of a tile, forward; keys of a block and queries of a tile, step 2
    FLASH_DOT_THREADS = 256, // step 1
    FLASH_STEP3_KEYS = 32,   // of a tile: there S, dP and dQ share the registers
};

// bytes from one row of a tile to the next; what does not fill them is not used
__host__ __device__ constexpr int flash_pitch(int HD) { return HD <= 64 ? 128 : 256; }

// lanes that share a row when it is copied in chunks of 16 bytes: a power of two, of which 48 leaves two idle
__host__ __device__ constexpr int flash_lanes(int HD) { return HD <= 32 ? 4 : HD <= 64 ? 8 : 16; }

// ---- instructions ----------------------------------------------------------------------------
// Addresses are those of shared memory, 32 bits.

__device__ __forceinline__ uint32_t flash_shared(void) {
    extern __shared__ __align__(256) unsigned char flash_memory[];
    return (uint32_t)__cvta_generic_to_shared(flash_memory);
}

__device__ __forceinline__ void flash_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void flash_ldmatrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ __forceinline__ void flash_ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// starts a copy of 16 bytes to shared memory, or of zeros; that of a float
__device__ __forceinline__ void flash_copy(uint32_t to, const floatX* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void flash_copy(uint32_t to, const float* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

// this thread's copies have arrived; a barrier then says so of all
__device__ __forceinline__ void flash_copies_wait(void) { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void flash_store(uint32_t to, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void flash_store(uint32_t to, const uint32_t (&v)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}
__device__ __forceinline__ void flash_load(uint32_t (&v)[4], uint32_t from) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from)
                 : "memory");
}
__device__ __forceinline__ void flash_load(float (&v)[2], uint32_t from) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(from) : "memory");
}

// a barrier for each of two pairs of warps: the first warp has written and goes on, the second waits for that. Numbers known
// to the compiler, which otherwise reserves all 16
__device__ __forceinline__ void flash_pair_written(int pair) {
    if (pair)
        asm volatile("bar.arrive 2, 64;" ::: "memory");
    else
        asm volatile("bar.arrive 1, 64;" ::: "memory");
}
__device__ __forceinline__ void flash_pair_wait(int pair) {
    if (pair)
        asm volatile("bar.sync 2, 64;" ::: "memory");
    else
        asm volatile("bar.sync 1, 64;" ::: "memory");
}

__device__ __forceinline__ float flash_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// two numbers as bf16, the first in the lower half; and back
__device__ __forceinline__ uint32_t flash_pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
__device__ __forceinline__ float flash_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float flash_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// ---- fragments -------------------------------------------------------------------------------

// where a lane's addresses begin within a tile. By rows: squares (rows 0-7, chunk 0), (8-15, 0), (0-7, 1), (8-15, 1): the a
// of a product, or with .trans the b of two. By columns: (0-7, 0), (0-7, 1), (8-15, 0), (8-15, 1): the b of two
template <int HD>
__device__ __forceinline__ uint32_t flash_by_rows(int lane) {
    return (uint32_t)((lane % 16) * flash_pitch(HD) + ((lane / 16) ^ (lane % 8)) * 16);
}
template <int HD>
__device__ __forceinline__ uint32_t flash_by_columns(int lane) {
    return (uint32_t)((lane % 8 + lane / 16 * 8) * flash_pitch(HD) + ((lane / 8 % 2) ^ (lane % 8)) * 16);
}

// c (32, N) += a (32, HD) · b (N, HD)^T; a: a tile by rows, b: a tile by columns
template <int HD, int N>
__device__ __forceinline__ void flash_dot(float (&c)[2][N / 8][4], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < HD; k += 16) {
        uint32_t fa[2][4], fb[4];
#pragma unroll
        for (int m = 0; m < 2; m++)
            flash_ldmatrix(fa[m], (a ^ (uint32_t)(2 * k)) + (uint32_t)(m * 16 * flash_pitch(HD)));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            flash_ldmatrix(fb, (b ^ (uint32_t)(2 * k)) + (uint32_t)(n * flash_pitch(HD)));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                flash_mma(c[m][n / 8], fa[m], fb[0], fb[1]);
                flash_mma(c[m][n / 8 + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

// c (32, HD) += p (32, N) · b (N, HD); b: a tile by rows
template <int HD, int N>
__device__ __forceinline__ void flash_multiply(float (&c)[2][HD / 8][4], const uint32_t (&p)[2][N / 16][4],
                                               uint32_t b) {
#pragma unroll
    for (int k = 0; k < N; k += 16) {
#pragma unroll
        for (int n = 0; n < HD; n += 16) {
            uint32_t fb[4];
            flash_ldmatrix_transposed(fb, (b ^ (uint32_t)(2 * n)) + (uint32_t)(k * flash_pitch(HD)));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                flash_mma(c[m][n / 8], p[m][k / 16], fb[0], fb[1]);
                flash_mma(c[m][n / 8 + 1], p[m][k / 16], fb[2], fb[3]);
            }
        }
    }
}

// results become factors: p is s, rounded
template <int N>
__device__ __forceinline__ void flash_round(uint32_t (&p)[N / 16][4], const float (&s)[N / 8][4]) {
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
        p[n / 2][n % 2 * 2] = flash_pack(s[n][0], s[n][1]);
        p[n / 2][n % 2 * 2 + 1] = flash_pack(s[n][2], s[n][3]);
    }
}

// the place of s[m][n][e] in a (32, N) result
__device__ __forceinline__ int flash_row(int m, int e, int lane) { return 16 * m + e / 2 * 8 + lane / 4; }
__device__ __forceinline__ int flash_column(int n, int e, int lane) { return 8 * n + lane % 4 * 2 + e % 2; }

// s = -infinity above the diagonal: where the column is more than `ahead` right of the row; a transposed s below it
template <int N, bool TRANSPOSED = false>
__device__ __forceinline__ void flash_mask(float (&s)[2][N / 8][4], int ahead, int lane) {
    const int here = TRANSPOSED ? -flash_row(0, 0, lane) + flash_column(0, 0, lane)
                                : flash_row(0, 0, lane) - flash_column(0, 0, lane);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int right = 8 * n + e % 2 - 16 * m - e / 2 * 8;
                if ((TRANSPOSED ? -right : right) > ahead + here) s[m][n][e] = -INFINITY;
            }
}

// over the 4 lanes that share a row
__device__ __forceinline__ float flash_row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float flash_row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---- tiles -----------------------------------------------------------------------------------

// the block starts to copy ROWS rows of x, ld apart, of which the first `rows` exist; the others become zeros. A thread's
// rows are a multiple of 8 apart, so that their chunks have the same place
template <int HD, int ROWS, int THREADS = FLASH_THREADS>
__device__ __forceinline__ void flash_tile_load(uint32_t tile, const floatX* x, size_t ld, int rows) {
    constexpr int LANES = flash_lanes(HD), STEP = THREADS / LANES; // rows copied at once
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "whole steps, each of whole squares");
    const int row = threadIdx.x / LANES, chunk = threadIdx.x % LANES;
    if (chunk >= HD / 8) return;
    const floatX* from = x + (size_t)row * ld + chunk * 8;
    const uint32_t to = tile + (uint32_t)(row * flash_pitch(HD) + (chunk ^ row % 8) * 16);
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP, from += STEP * ld) flash_copy(to + r * flash_pitch(HD), from, row + r < rows);
}

// a warp stores c (32, HD), of which the first `rows` rows exist, to x: in 16 bytes a lane, by way of 32 rows of a tile that
// no other warp reads
template <int HD>
__device__ __forceinline__ void flash_tile_store(floatX* x, size_t ld, int rows, const float (&c)[2][HD / 8][4],
                                                 uint32_t tile, int lane) {
    constexpr int CHUNKS = HD / 8;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int row = flash_row(m, e, lane);
                flash_store(tile + (uint32_t)(row * flash_pitch(HD) + (n ^ row % 8) * 16 + lane % 4 * 4),
                            flash_pack(c[m][n][e], c[m][n][e + 1]));
            }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const int id = i * WARP + lane, row = id / CHUNKS, chunk = id % CHUNKS;
        uint32_t bits[4];
        flash_load(bits, tile + (uint32_t)(row * flash_pitch(HD) + (chunk ^ row % 8) * 16));
        if (row < rows)
            *reinterpret_cast<uint4*>(x + (size_t)row * ld + chunk * 8) =
                make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
}

// ---- forward ---------------------------------------------------------------------------------

// the online softmax of one row, whose scores lie in columns e and e+1 of s: they become powers, and o and sum are scaled to
// the row's new maximum. c = scale * log2(e) makes powers of e powers of 2; sum is this lane's part
template <int HD, int N>
__device__ __forceinline__ void flash_softmax(float (&s)[N / 8][4], float (&o)[HD / 8][4], float* max, float* sum,
                                              int e, float c) {
    float top = *max, part = 0;
#pragma unroll
    for (int n = 0; n < N / 8; n++) top = fmaxf(top, fmaxf(s[n][e], s[n][e + 1]));
    top = flash_row_max(top);
    const float rescale = flash_exp2((*max - top) * c), shift = top * c;
    *max = top;
#pragma unroll
    for (int n = 0; n < HD / 8; n++) o[n][e] *= rescale, o[n][e + 1] *= rescale;
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
        s[n][e] = flash_exp2(s[n][e] * c - shift);
        s[n][e + 1] = flash_exp2(s[n][e + 1] * c - shift);
        part += s[n][e] + s[n][e + 1];
    }
    *sum = *sum * rescale + part;
}

template <int HD>
constexpr size_t flash_forward_shared = (size_t)(FLASH_QUERIES + 4 * FLASH_TILE) * flash_pitch(HD);

// 128 queries of one head; grid (B*NH, tiles of queries, the last first). Shared: Q, then two buffers of K and two of V
template <int HD>
__global__ void __launch_bounds__(FLASH_THREADS, HD <= 64 ? 3 : 2)
    flash_forward_kernel(floatX* out, float* lse, const floatX* qkv, int T, int NH, int NKV, float scale) {
    constexpr int N = FLASH_TILE;
    constexpr uint32_t BUFFER = N * flash_pitch(HD);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int h = blockIdx.x % NH, b = blockIdx.x / NH, t0 = (int)(gridDim.y - 1 - blockIdx.y) * FLASH_QUERIES;
    const int r0 = t0 + warp * FLASH_ROWS; // the warp's first query
    const size_t ld = (size_t)(NH + 2 * NKV) * HD, row = (size_t)b * T;
    const floatX *q = qkv + (row + t0) * ld + (size_t)h * HD, *k = qkv + row * ld + (size_t)(NH + h / (NH / NKV)) * HD,
                 *v = k + (size_t)NKV * HD;
    const uint32_t q_tile = flash_shared(), k_tile = q_tile + FLASH_QUERIES * flash_pitch(HD),
                   v_tile = k_tile + 2 * BUFFER;
    const uint32_t q_rows = q_tile + warp * FLASH_ROWS * flash_pitch(HD), by_rows = flash_by_rows<HD>(lane),
                   by_columns = flash_by_columns<HD>(lane);

    float o[2][HD / 8][4] = {}, max[2][2], sum[2][2] = {};
#pragma unroll
    for (int m = 0; m < 2; m++) max[m][0] = max[m][1] = -INFINITY;
    const float c = scale * 1.4426950408889634f;
    const int keys = min(T, t0 + FLASH_QUERIES); // that the block's last query sees
    flash_tile_load<HD, FLASH_QUERIES>(q_tile, q, ld, T - t0);
    flash_tile_load<HD, N>(k_tile, k, ld, T);
    flash_tile_load<HD, N>(v_tile, v, ld, T);
    for (int j0 = 0; j0 < keys; j0 += N) {
        const uint32_t buffer = j0 / N % 2 * BUFFER;
        flash_copies_wait();
        __syncthreads(); // the tile is there, and no warp reads the other buffer any more
        if (j0 + N < keys) {
            flash_tile_load<HD, N>(k_tile + (BUFFER - buffer), k + (size_t)(j0 + N) * ld, ld, T - j0 - N);
            flash_tile_load<HD, N>(v_tile + (BUFFER - buffer), v + (size_t)(j0 + N) * ld, ld, T - j0 - N);
        }
        if (j0 > r0 + FLASH_ROWS - 1) continue; // all of it is above the diagonal
        float s[2][N / 8][4] = {};
        flash_dot<HD, N>(s, q_rows + by_rows, k_tile + buffer + by_columns);
        if (j0 + N - 1 > r0) flash_mask<N>(s, r0 - j0, lane);
        uint32_t p[2][N / 16][4];
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++)
                flash_softmax<HD, N>(s[m], o[m], &max[m][half], &sum[m][half], 2 * half, c);
            flash_round<N>(p[m], s[m]);
        }
        flash_multiply<HD, N>(o, p, v_tile + buffer + by_rows);
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float all = flash_row_sum(sum[m][half]), inverse = 1 / all;
            const int t = r0 + flash_row(m, 2 * half, lane);
            if (lane % 4 == 0 && t < T) lse[((size_t)b * NH + h) * T + t] = max[m][half] * scale + logf(all);
#pragma unroll
            for (int n = 0; n < HD / 8; n++) o[m][n][2 * half] *= inverse, o[m][n][2 * half + 1] *= inverse;
        }
    flash_tile_store<HD>(out + (row + r0) * NH * HD + (size_t)h * HD, (size_t)NH * HD, T - r0, o, q_rows, lane);
}

// ---- backward, step 1: dot[t] = dout[t] . out[t] ----------------------------------------------

// LANES lanes a row of one head, 16 bytes a lane; a block has FLASH_DOT_THREADS / LANES rows, of any heads and sequences
template <int HD>
__global__ void __launch_bounds__(FLASH_DOT_THREADS)
    flash_backward_dot_kernel(float* dot, const floatX* dout, const floatX* out, int T, int NH, int64_t rows) {
    constexpr int LANES = flash_lanes(HD);
    const int64_t i = ((int64_t)blockIdx.x * FLASH_DOT_THREADS + threadIdx.x) / LANES; // of (B, NH, T)
    const int chunk = threadIdx.x % LANES;
    float sum = 0;
    if (i < rows && chunk < HD / 8) {
        const int64_t t = i % T, h = i / T % NH, b = i / T / NH, at = ((b * T + t) * NH + h) * HD + chunk * 8;
        PackX x = pack_load(dout + at), y = pack_load(out + at);
#pragma unroll
        for (int j = 0; j < PACK; j++) sum += x.get(j) * y.get(j);
    }
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (i < rows && chunk == 0) dot[i] = sum;
}

// ---- backward, step 2: dK and dV --------------------------------------------------------------

// K and V; two buffers of Q and of dO; P^T of two pairs, 32 by 64; two buffers of lse and of dot
template <int HD>
constexpr size_t flash_backward_kv_shared = (size_t)6 * FLASH_TILE* flash_pitch(HD) +
                                            2 * FLASH_ROWS* FLASH_TILE * sizeof(floatX) +
                                            4 * FLASH_TILE * sizeof(float);

// 64 keys of one key/value head, 32 to each pair of warps; grid (B*NKV, tiles of keys, the first first)
template <int HD>
__global__ void __launch_bounds__(FLASH_THREADS, HD <= 64 ? 3 : 2)
    flash_backward_kv_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse, const float* dot,
                             int T, int NH, int NKV, float scale) {
    constexpr int N = FLASH_TILE;
    constexpr uint32_t TILE = N * flash_pitch(HD), EXCHANGE = FLASH_ROWS * N * sizeof(floatX);
    const int lane = threadIdx.x % WARP, pair = threadIdx.x / WARP / 2, G = NH / NKV;
    const int g = blockIdx.x % NKV, b = blockIdx.x / NKV, j0 = (int)blockIdx.y * N;
    // only the first of a pair computes powers: which warp that is alternates, so that all schedulers get their share
    const bool second = (threadIdx.x / WARP + blockIdx.x + blockIdx.y) % 2;
    const size_t ld = (size_t)(NH + 2 * NKV) * HD, ldo = (size_t)NH * HD, row = (size_t)b * T;
    const floatX *k = qkv + (row + j0) * ld + (size_t)(NH + g) * HD, *v = k + (size_t)NKV * HD;
    const uint32_t k_tile = flash_shared(), v_tile = k_tile + TILE, q_tile = v_tile + TILE, do_tile = q_tile + 2 * TILE;
    const uint32_t exchange = do_tile + 2 * TILE + pair * EXCHANGE + lane * 16,
                   lse_tile = do_tile + 2 * TILE + 2 * EXCHANGE, dot_tile = lse_tile + 2 * N * (uint32_t)sizeof(float);

    // this warp's rows, and the tiles it dots them with and multiplies
    const uint32_t own = (second ? v_tile : k_tile) + pair * FLASH_ROWS * flash_pitch(HD);
    const uint32_t a = own + flash_by_rows<HD>(lane), left = (second ? do_tile : q_tile) + flash_by_columns<HD>(lane),
                   right = (second ? q_tile : do_tile) + flash_by_rows<HD>(lane);

    // starts to copy the queries t0 .. of head h
    auto load = [&](int h, int t0, uint32_t buffer) {
        const size_t at = ((size_t)b * NH + h) * T + t0;
        const int i = threadIdx.x % N, rows = T - t0;
        flash_tile_load<HD, N>(q_tile + buffer * TILE, qkv + (row + t0) * ld + (size_t)h * HD, ld, rows);
        flash_tile_load<HD, N>(do_tile + buffer * TILE, dout + (row + t0) * ldo + (size_t)h * HD, ldo, rows);
        flash_copy((threadIdx.x < N ? lse_tile : dot_tile) + (buffer * N + i) * 4,
                   (threadIdx.x < N ? lse : dot) + at + (i < rows ? i : 0), i < rows);
    };

    float sum[2][HD / 8][4] = {}; // dV, or dK of the second
    const float c = scale * 1.4426950408889634f;
    flash_tile_load<HD, N>(k_tile, k, ld, T - j0);
    flash_tile_load<HD, N>(v_tile, v, ld, T - j0);
    load(g * G, j0, 0);
    uint32_t buffer = 0;
    for (int h = g * G; h < (g + 1) * G; h++)
        for (int t0 = j0; t0 < T; t0 += N, buffer ^= 1) {
            flash_copies_wait();
            __syncthreads();
            if (t0 + N < T)
                load(h, t0 + N, buffer ^ 1);
            else if (h + 1 < (g + 1) * G)
                load(h + 1, j0, buffer ^ 1);
            float s[2][N / 8][4] = {};
            uint32_t p[2][N / 16][4];
            flash_dot<HD, N>(s, a, left + buffer * TILE);
            const uint32_t numbers = (second ? dot_tile : lse_tile) + (buffer * N + lane % 4 * 2) * 4;
            if (!second) {
                if (t0 == j0) flash_mask<N, true>(s, -pair * FLASH_ROWS, lane); // the tile on the diagonal
#pragma unroll
                for (int n = 0; n < N / 8; n++) {
                    float l[2];
                    flash_load(l, numbers + n * 32);
#pragma unroll
                    for (int m = 0; m < 2; m++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            s[m][n][e] = flash_exp2(s[m][n][e] * c - l[e % 2] * 1.4426950408889634f);
                }
#pragma unroll
                for (int m = 0; m < 2; m++) flash_round<N>(p[m], s[m]);
#pragma unroll
                for (int i = 0; i < N / 8; i++) flash_store(exchange + i * WARP * 16, p[i % 2][i / 2]);
                flash_pair_written(pair);
            } else {
                flash_pair_wait(pair);
#pragma unroll
                for (int i = 0; i < N / 8; i++) flash_load(p[i % 2][i / 2], exchange + i * WARP * 16);
#pragma unroll
                for (int n = 0; n < N / 8; n++) {
                    float d[2];
                    flash_load(d, numbers + n * 32);
#pragma unroll
                    for (int m = 0; m < 2; m++)
#pragma unroll
                        for (int e = 0; e < 4; e += 2) {
                            uint32_t& pe = p[m][n / 2][n % 2 * 2 + e / 2];
                            pe = flash_pack(flash_low(pe) * (s[m][n][e] - d[0]),
                                            flash_high(pe) * (s[m][n][e + 1] - d[1]));
                        }
                }
            }
            flash_multiply<HD, N>(sum, p, right + buffer * TILE);
        }
    if (second) {
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < HD / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[m][n][e] *= scale;
    }
    const int first = pair * FLASH_ROWS;
    floatX* dx = dqkv + (row + j0 + first) * ld + (size_t)(NH + (second ? 0 : NKV) + g) * HD;
    flash_tile_store<HD>(dx, ld, T - j0 - first, sum, own, lane);
}

// ---- backward, step 3: dQ ---------------------------------------------------------------------

template <int HD>
constexpr size_t flash_backward_q_shared = (size_t)(2 * FLASH_QUERIES + 4 * FLASH_STEP3_KEYS) * flash_pitch(HD);

// 128 queries of one head; grid (B*NH, tiles of queries, the last first). Shared: Q, dO, then two buffers of K and two of V
template <int HD>
__global__ void __launch_bounds__(FLASH_THREADS, HD <= 64 ? 3 : 2)
    flash_backward_q_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse, const float* dot,
                            int T, int NH, int NKV, float scale) {
    constexpr int N = FLASH_STEP3_KEYS;
    constexpr uint32_t BUFFER = N * flash_pitch(HD);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int h = blockIdx.x % NH, b = blockIdx.x / NH, t0 = (int)(gridDim.y - 1 - blockIdx.y) * FLASH_QUERIES;
    const int r0 = t0 + warp * FLASH_ROWS;
    const size_t ld = (size_t)(NH + 2 * NKV) * HD, ldo = (size_t)NH * HD, row = (size_t)b * T;
    const floatX *q = qkv + (row + t0) * ld + (size_t)h * HD, *k = qkv + row * ld + (size_t)(NH + h / (NH / NKV)) * HD,
                 *v = k + (size_t)NKV * HD;
    const uint32_t q_tile = flash_shared(), do_tile = q_tile + FLASH_QUERIES * flash_pitch(HD),
                   k_tile = do_tile + FLASH_QUERIES * flash_pitch(HD), v_tile = k_tile + 2 * BUFFER;
    const uint32_t own = warp * FLASH_ROWS * flash_pitch(HD), by_rows = flash_by_rows<HD>(lane),
                   by_columns = flash_by_columns<HD>(lane);

    float l[2][2], d[2][2]; // lse in powers of two, and dot, of this lane's rows
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = r0 + flash_row(m, 2 * half, lane);
            const size_t at = ((size_t)b * NH + h) * T + t;
            l[m][half] = t < T ? lse[at] * 1.4426950408889634f : 0;
            d[m][half] = t < T ? dot[at] : 0;
        }
    float sum[2][HD / 8][4] = {};
    const float c = scale * 1.4426950408889634f;
    const int keys = min(T, t0 + FLASH_QUERIES);
    flash_tile_load<HD, FLASH_QUERIES>(q_tile, q, ld, T - t0);
    flash_tile_load<HD, FLASH_QUERIES>(do_tile, dout + (row + t0) * ldo + (size_t)h * HD, ldo, T - t0);
    flash_tile_load<HD, N>(k_tile, k, ld, T);
    flash_tile_load<HD, N>(v_tile, v, ld, T);
    for (int j0 = 0; j0 < keys; j0 += N) {
        const uint32_t buffer = j0 / N % 2 * BUFFER;
        flash_copies_wait();
        __syncthreads();
        if (j0 + N < keys) {
            flash_tile_load<HD, N>(k_tile + (BUFFER - buffer), k + (size_t)(j0 + N) * ld, ld, T - j0 - N);
            flash_tile_load<HD, N>(v_tile + (BUFFER - buffer), v + (size_t)(j0 + N) * ld, ld, T - j0 - N);
        }
        if (j0 > r0 + FLASH_ROWS - 1) continue;
        float s[2][N / 8][4] = {}, dp[2][N / 8][4] = {};
        flash_dot<HD, N>(s, q_tile + own + by_rows, k_tile + buffer + by_columns);
        flash_dot<HD, N>(dp, do_tile + own + by_rows, v_tile + buffer + by_columns);
        if (j0 + N - 1 > r0) flash_mask<N>(s, r0 - j0, lane);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[m][n][e] = flash_exp2(s[m][n][e] * c - l[m][e / 2]) * (dp[m][n][e] - d[m][e / 2]);
        uint32_t ds[2][N / 16][4];
#pragma unroll
        for (int m = 0; m < 2; m++) flash_round<N>(ds[m], s[m]);
        flash_multiply<HD, N>(sum, ds, k_tile + buffer + by_rows);
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[m][n][e] *= scale;
    flash_tile_store<HD>(dqkv + (row + r0) * ld + (size_t)h * HD, ld, T - r0, sum, q_tile + own, lane);
}
// ---- launchers -------------------------------------------------------------------------------

// a block may have more than 48 KB of shared memory only when the kernel says so
template <typename Kernel>
static void flash_allow(Kernel kernel, size_t bytes) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

template <int HD>
static void flash_forward(floatX* out, float* lse, const floatX* qkv, AttentionShape s, cudaStream_t stream) {
    flash_allow(flash_forward_kernel<HD>, flash_forward_shared<HD>);
    const dim3 grid((unsigned)(s.B * s.NH), (unsigned)ceil_div(s.T, FLASH_QUERIES));
    flash_forward_kernel<HD><<<grid, FLASH_THREADS, flash_forward_shared<HD>, stream>>>(out, lse, qkv, s.T, s.NH, s.NKV,
                                                                                        1 / sqrtf((float)HD));
    launch_check();
}

template <int HD>
static void flash_backward_dot(float* dot, const floatX* dout, const floatX* out, AttentionShape s,
                               cudaStream_t stream) {
    const int64_t rows = (int64_t)s.B * s.NH * s.T;
    const unsigned blocks = (unsigned)ceil_div(rows * flash_lanes(HD), FLASH_DOT_THREADS);
    flash_backward_dot_kernel<HD><<<blocks, FLASH_DOT_THREADS, 0, stream>>>(dot, dout, out, s.T, s.NH, rows);
    launch_check();
}

template <int HD>
static void flash_backward_kv(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse, const float* dot,
                              AttentionShape s, cudaStream_t stream) {
    flash_allow(flash_backward_kv_kernel<HD>, flash_backward_kv_shared<HD>);
    const dim3 grid((unsigned)(s.B * s.NKV), (unsigned)ceil_div(s.T, FLASH_TILE));
    flash_backward_kv_kernel<HD><<<grid, FLASH_THREADS, flash_backward_kv_shared<HD>, stream>>>(
        dqkv, dout, qkv, lse, dot, s.T, s.NH, s.NKV, 1 / sqrtf((float)HD));
    launch_check();
}

template <int HD>
static void flash_backward_q(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse, const float* dot,
                             AttentionShape s, cudaStream_t stream) {
    flash_allow(flash_backward_q_kernel<HD>, flash_backward_q_shared<HD>);
    const dim3 grid((unsigned)(s.B * s.NH), (unsigned)ceil_div(s.T, FLASH_QUERIES));
    flash_backward_q_kernel<HD><<<grid, FLASH_THREADS, flash_backward_q_shared<HD>, stream>>>(
        dqkv, dout, qkv, lse, dot, s.T, s.NH, s.NKV, 1 / sqrtf((float)HD));
    launch_check();
}

template <int HD>
static void flash_backward(floatX* dqkv, const floatX* dout, const floatX* qkv, const floatX* out, const float* lse,
                           AttentionShape s, float* dot, cudaStream_t stream) {
    flash_backward_dot<HD>(dot, dout, out, s, stream);
    flash_backward_kv<HD>(dqkv, dout, qkv, lse, dot, s, stream);
    flash_backward_q<HD>(dqkv, dout, qkv, lse, dot, s, stream);
}

// bytes of shared memory of the kernel that needs most
static inline size_t flash_attention_shared(int HD) {
    return HD <= 64 ? flash_backward_kv_shared<64> : flash_backward_kv_shared<128>;
}

static inline bool flash_attention_supports(AttentionShape s, Error* why) {
    int device, shared;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (s.HD != 32 && s.HD != 48 && s.HD != 64 && s.HD != 128)
        return set_error(why, "head_dim is %d, 32, 48, 64 or 128 expected", s.HD);
    if (s.NKV < 1 || s.NH % s.NKV)
        return set_error(why, "%d key/value heads do not divide %d query heads", s.NKV, s.NH);
    if (s.T > 65535 * FLASH_TILE)
        return set_error(why, "%d tokens in a sequence, at most %d expected", s.T, 65535 * FLASH_TILE);
    if ((size_t)shared < flash_attention_shared(s.HD))
        return set_error(why, "a block has %d bytes of shared memory here, head_dim %d needs %zu", shared, s.HD,
                         flash_attention_shared(s.HD));
    return true;
}

// dot (B, NH, T) of the backward pass; the forward pass needs none
static inline size_t flash_attention_scratch(AttentionShape s, bool backward) {
    return backward ? (size_t)s.B * s.NH * s.T * sizeof(float) : 0;
}

// overwrites out (B*T, NH*HD) and lse (B, NH, T)
static inline void flash_attention_forward(floatX* out, float* lse, const floatX* qkv, AttentionShape s,
                                           cudaStream_t stream) {
    switch (s.HD) {
    case 32: flash_forward<32>(out, lse, qkv, s, stream); break;
    case 48: flash_forward<48>(out, lse, qkv, s, stream); break;
    case 64: flash_forward<64>(out, lse, qkv, s, stream); break;
    case 128: flash_forward<128>(out, lse, qkv, s, stream); break;
    default: launch_require(false, "attention", "flash takes the head_dim 32, 48, 64 or 128");
    }
}

// overwrites dqkv, which has the layout of qkv
static inline void flash_attention_backward(floatX* dqkv, const floatX* dout, const floatX* qkv, const floatX* out,
                                            const float* lse, AttentionShape s, void* scratch, cudaStream_t stream) {
    float* dot = (float*)scratch;
    switch (s.HD) {
    case 32: flash_backward<32>(dqkv, dout, qkv, out, lse, s, dot, stream); break;
    case 48: flash_backward<48>(dqkv, dout, qkv, out, lse, s, dot, stream); break;
    case 64: flash_backward<64>(dqkv, dout, qkv, out, lse, s, dot, stream); break;
    case 128: flash_backward<128>(dqkv, dout, qkv, out, lse, s, dot, stream); break;
    default: launch_require(false, "attention", "flash takes the head_dim 32, 48, 64 or 128");
    }
}
#endif
