/*
Matrix product: nearly all the time of training and of generation is spent here.

    forward     y  = x · w^T             y[n][o]  = sum over c of x[n][c] * w[o][c]
    backward    dx = dy · w              dx[n][c] = sum over o of dy[n][o] * w[o][c]
                dw = dy^T · x            dw[o][c] = sum over n of dy[n][o] * x[n][c]

Shapes          x dx (N, C)    w dw (OC, C)    y dy (N, OC)    N = B*T rows; all sizes at least 1
                w is F32, BF16 or F16 at any byte address
Numerics        sums in fp32 whatever the storage of w. The order of a sum depends on the shapes alone, so that the bits are
                the same for any number of threads. NaN and infinity reach every output that they belong to
Bound by        many rows: FLOPs, 2*N*C*OC for each of the three products
                few rows (generation): memory, OC*C stored weights, each read once and used N times

Many rows. All three are one product y (M, N) = a (M, K) · b (K, N); they differ in which index of a factor is contiguous,
and packing hides that. Each number of a is used N times, each of b M times, so the art is to have them near:

    registers   a tile of y, 8 x 48 with AVX-512: 24 vectors of sums, which leave 8 of the 32 registers for 3 vectors of b and
                a number of a. 11 loads feed 24 multiply-adds, none of which waits for another
    L1, L2      strips of 8 rows or 48 columns, 384 deep, packed in the order in which the tile reads them: whatever the
                strides were, it streams. A thread packs a block of 192 rows or columns for itself (288 KiB)
    L3          of the smaller factor, up to 384 x 3072 numbers (4.5 MiB) are packed by all threads together and used by all.
                That is a phase; the smaller the shared factor, the fewer times threads wait for each other
    threads     take blocks of the larger factor as they get free

Few rows. Packing would cost more than it gains: rows of w are read once, in order, with prefetch, converted in registers
and multiplied with all rows of x; threads take runs of outputs.

On the GPU      matmul_cublas.cuh

Proved by       dev/test/test_matmul.c (float, every storage type, odd addresses and shapes, threads), dev/test/test_ops.c
                (finite differences); measured beside OpenBLAS and a plain read of memory by dev/cpu/matmul.c
Source          Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication", for the blocking
*/
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "dtype.h"
#include "error.h"

// ---- sizes -----------------------------------------------------------------------------------

#if defined(__AVX512F__)
enum { MATMUL_BYTES = 64, MATMUL_ROWS = 8, MATMUL_VECTORS = 3 };
#elif defined(__AVX__)
enum { MATMUL_BYTES = 32, MATMUL_ROWS = 4, MATMUL_VECTORS = 3 };
#elif defined(__ARM_NEON)
enum { MATMUL_BYTES = 16, MATMUL_ROWS = 8, MATMUL_VECTORS = 2 };
#else
enum { MATMUL_BYTES = 16, MATMUL_ROWS = 4, MATMUL_VECTORS = 2 };
#endif

// clang-format off
enum {
    MATMUL_LANES = MATMUL_BYTES / sizeof(float),
    MATMUL_COLS = MATMUL_VECTORS * MATMUL_LANES, // a tile is MATMUL_ROWS x MATMUL_COLS
    MATMUL_CHUNK = 48,                           // indices: whole strips of either kind, whatever the tile
    MATMUL_DEPTH = 384,                          // of a strip, at most
    MATMUL_BLOCK = 192,                          // indices of a thread's own block, at most
    MATMUL_OWN = MATMUL_BLOCK * MATMUL_DEPTH,    // numbers of it
    MATMUL_SHARED = 3072 * MATMUL_DEPTH,         // numbers of the shared factor in one phase
    MATMUL_FEW = 8,                              // rows, up to which weights are not packed
    MATMUL_ALONE = 1 << 20,                      // multiply-adds, up to which waking threads costs more than it gains
    MATMUL_FEW_ALONE = 1 << 17,                  // the same for few rows, in weights
    MATMUL_AHEAD = 2048,                         // bytes, prefetch distance beyond the next group of rows
    MATMUL_RUN = 1 << 16,                        // bytes of weights that a thread takes of them, at least
};
// clang-format on

// for what must become one copy for each constant that it is called with
#define MATMUL_INLINE static inline __attribute__((always_inline))

static inline int matmul_min(int a, int b) { return a < b ? a : b; }
static inline int matmul_ceil(int a, int b) { return (a + b - 1) / b; }     // a / b, rounded up
static inline int matmul_up(int a, int b) { return matmul_ceil(a, b) * b; } // a, rounded up to a multiple of b

// how many threads a product is worth. Used as num_threads alone: beside an `if` that is false, clang 14's OpenMP runs the
// next parallel region on one thread as well
static inline int matmul_threads(double work, double alone) {
#ifdef _OPENMP
    if (work > alone) return omp_get_max_threads();
#endif
    (void)work, (void)alone;
    return 1;
}

static inline int matmul_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// ---- loads: stored numbers to floats ---------------------------------------------------------

// In the double build an F32 weight is a double, like every float there, but the bits of a 16-bit one still are a float's
typedef __typeof__(float_from_bits(0)) matmul_f32;

// vector##_load: v = n stored numbers from any address, with the values of dtype.h's conversions. Vectors that the processor
// lacks have no fixed way to be returned from a function, so they go through a pointer. F16: the sign is extended, and so
// ends in the right place; the multiplication moves the exponent and brings subnormals to their value
#define MATMUL_LOAD(vector, n)                                                                                         \
    typedef float vector __attribute__((vector_size((n) * sizeof(float))));                                            \
    typedef matmul_f32 vector##_f32 __attribute__((vector_size((n)*4)));                                               \
    typedef uint32_t vector##_u32 __attribute__((vector_size((n)*4)));                                                 \
    typedef int32_t vector##_i32 __attribute__((vector_size((n)*4)));                                                  \
    typedef int16_t vector##_i16 __attribute__((vector_size((n)*2)));                                                  \
    MATMUL_INLINE void vector##_load(vector* v, const char* p, Dtype dtype) {                                          \
        if (dtype == DTYPE_F32) {                                                                                      \
            memcpy(v, p, sizeof *v);                                                                                   \
            return;                                                                                                    \
        }                                                                                                              \
        vector##_i16 stored;                                                                                           \
        memcpy(&stored, p, sizeof stored);                                                                             \
        vector##_u32 h = (vector##_u32) __builtin_convertvector(stored, vector##_i32), bits = h << 16;                 \
        if (dtype == DTYPE_F16) {                                                                                      \
            vector##_u32 full = (vector##_u32)((h & 0x7c00) == 0x7c00) & 0x7f800000u;                                  \
            bits = (vector##_u32)((vector##_f32)(h << 13 & 0x8fffe000u) * 0x1p112f) | full;                            \
        }                                                                                                              \
        *v = __builtin_convertvector((vector##_f32)bits, vector);                                                      \
    }
MATMUL_LOAD(matmul_vec, MATMUL_LANES)
MATMUL_LOAD(matmul_quad, 4)

static inline float matmul_load(const char* p, Dtype dtype) {
    float x;
    if (dtype == DTYPE_BF16) return bf16_to_float(*(const unaligned_u16*)p);
    if (dtype == DTYPE_F16) return f16_to_float(*(const unaligned_u16*)p);
    memcpy(&x, p, sizeof x);
    return x;
}

static inline size_t matmul_bytes(Dtype dtype) { return dtype == DTYPE_F32 ? sizeof(float) : 2; }

// ---- packing ---------------------------------------------------------------------------------

// a factor of the product: its number (i, k) is element i*outer + k*inner of data; k is summed over. One of the strides is 1
typedef struct {
    const void* data;
    Dtype dtype;
    size_t outer, inner;
} MatmulFactor;

// outer stride 1: for each k, a run of i goes out over the strips
MATMUL_INLINE void matmul_pack_runs(float* out, const char* from, size_t stride, int count, int depth, int width,
                                    Dtype dtype) {
    const size_t bytes = matmul_bytes(dtype);
    for (int k = 0; k < depth; k++, from += stride * bytes, out += width) {
        const char* p = from;
        float* strip = out;
        for (int start = 0; start < count; start += width, strip += (size_t)width * depth) {
            int n = matmul_min(width, count - start), i = 0;
            for (; i + 4 <= n; i += 4, p += 4 * bytes) {
                matmul_quad v;
                matmul_quad_load(&v, p, dtype);
                memcpy(strip + i, &v, sizeof v);
            }
            for (; i < width; i++, p += bytes) strip[i] = i < n ? matmul_load(p, dtype) : 0;
        }
    }
}

// inner stride 1: four indices i, runs of k, transposed 4 x 4 in registers
MATMUL_INLINE void matmul_pack_four(float* out, const char* p, size_t stride, int count, int depth, int width,
                                    Dtype dtype) {
    const size_t bytes = matmul_bytes(dtype), row = stride * bytes;
    int k = 0;
    for (; count >= 4 && k + 4 <= depth; k += 4, p += 4 * bytes, out += 4 * width) {
        matmul_quad v[4], low[2], high[2]; // rows 0 and 1 interleaved, rows 2 and 3 interleaved
        for (int i = 0; i < 4; i++) matmul_quad_load(&v[i], p + i * row, dtype);
        for (int i = 0; i < 2; i++) {
            low[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 4, 1, 5);
            high[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 6, 3, 7);
        }
        v[0] = __builtin_shufflevector(low[0], low[1], 0, 1, 4, 5);
        v[1] = __builtin_shufflevector(low[0], low[1], 2, 3, 6, 7);
        v[2] = __builtin_shufflevector(high[0], high[1], 0, 1, 4, 5);
        v[3] = __builtin_shufflevector(high[0], high[1], 2, 3, 6, 7);
        for (int i = 0; i < 4; i++) memcpy(out + i * width, &v[i], sizeof v[i]);
    }
    for (; k < depth; k++, p += bytes, out += width)
        for (int i = 0; i < 4; i++) out[i] = i < count ? matmul_load(p + i * row, dtype) : 0;
}

// dtype is a constant in each copy of this
MATMUL_INLINE void matmul_pack_as(float* out, MatmulFactor m, int i0, int count, int k0, int depth, int width,
                                  Dtype dtype) {
    const size_t bytes = matmul_bytes(dtype);
    const char* from = (const char*)m.data + ((size_t)i0 * m.outer + (size_t)k0 * m.inner) * bytes;
    if (m.outer == 1) { // eight strips at a time: each is a stream of writes, and more of them thrash the L1 cache
        for (int start = 0; start < count; start += 8 * width)
            matmul_pack_runs(out + (size_t)start * depth, from + start * bytes, m.inner,
                             matmul_min(8 * width, count - start), depth, width, dtype);
        return;
    }
    for (int start = 0; start < count; start += width, out += (size_t)width * depth)
        for (int i = 0; i < width; i += 4)
            matmul_pack_four(out + i, from + (start + i) * m.outer * bytes, m.outer, count - start - i, depth, width,
                             dtype);
}

MATMUL_INLINE void matmul_pack_width(float* out, MatmulFactor m, int i0, int count, int k0, int depth, int width) {
    if (m.dtype == DTYPE_BF16)
        matmul_pack_as(out, m, i0, count, k0, depth, width, DTYPE_BF16);
    else if (m.dtype == DTYPE_F16)
        matmul_pack_as(out, m, i0, count, k0, depth, width, DTYPE_F16);
    else
        matmul_pack_as(out, m, i0, count, k0, depth, width, DTYPE_F32);
}

// the numbers (i0 .. i0+count, k0 .. k0+depth) as strips of `width` indices, each strip [depth][width]; the last is filled
// up with zeros. width is MATMUL_ROWS or MATMUL_COLS, multiples of 4
static inline void matmul_pack(float* out, MatmulFactor m, int i0, int count, int k0, int depth, int width) {
    if (width == MATMUL_ROWS)
        matmul_pack_width(out, m, i0, count, k0, depth, MATMUL_ROWS);
    else
        matmul_pack_width(out, m, i0, count, k0, depth, MATMUL_COLS);
}

// ---- tiles -----------------------------------------------------------------------------------

// y (MATMUL_ROWS, vectors) = (add: +=) a strip of a · a strip of b. Its sums must stay in registers: `vectors` is a constant
// in each copy, and nothing but vectors is made of sum. y is asked for before the sums, which take longer than it needs to
// arrive: without that the adding waits for memory (0.85 of OpenBLAS instead of 1.0)
MATMUL_INLINE void matmul_tile_of(float* y, size_t ldy, bool add, const float* a, const float* b, int depth,
                                  const int vectors) {
    matmul_vec sum[MATMUL_ROWS][MATMUL_VECTORS] = { { { 0 } } };
    for (int i = 0; i < MATMUL_ROWS; i++)
        for (int j = 0; j < vectors; j++) __builtin_prefetch(y + i * ldy + j * MATMUL_LANES, 1);
    for (int k = 0; k < depth; k++, a += MATMUL_ROWS, b += MATMUL_COLS) {
        matmul_vec v[MATMUL_VECTORS];
        for (int j = 0; j < vectors; j++) memcpy(&v[j], b + j * MATMUL_LANES, sizeof v[j]);
        for (int i = 0; i < MATMUL_ROWS; i++)
            for (int j = 0; j < vectors; j++) sum[i][j] += a[i] * v[j];
    }
    for (int i = 0; i < MATMUL_ROWS; i++)
        for (int j = 0; j < vectors; j++) {
            float* to = y + i * ldy + j * MATMUL_LANES;
            matmul_vec out = sum[i][j], old;
            if (add) memcpy(&old, to, sizeof old), out += old;
            memcpy(to, &out, sizeof out);
        }
}

// the same for what is left of y: (rows, cols), of which at most a tile is made. Columns beyond cols are computed only to the
// end of their vector; what does not fill vectors goes through a tile of its own
static inline void matmul_tile(float* y, size_t ldy, bool add, const float* a, const float* b, int depth, int rows,
                               int cols) {
    rows = matmul_min(rows, MATMUL_ROWS), cols = matmul_min(cols, MATMUL_COLS);
    const bool whole = rows == MATMUL_ROWS && cols % MATMUL_LANES == 0;
    float edge[MATMUL_ROWS * MATMUL_COLS];
    float* to = whole ? y : edge;
    const size_t ld = whole ? ldy : (size_t)MATMUL_COLS;
    if (cols > 2 * MATMUL_LANES)
        matmul_tile_of(to, ld, add && whole, a, b, depth, MATMUL_VECTORS);
    else if (cols > MATMUL_LANES)
        matmul_tile_of(to, ld, add && whole, a, b, depth, 2);
    else
        matmul_tile_of(to, ld, add && whole, a, b, depth, 1);
    for (int i = 0; i < rows && !whole; i++)
        for (int j = 0; j < cols; j++) y[i * ldy + j] = edge[i * MATMUL_COLS + j] + (add ? y[i * ldy + j] : 0);
}

// y (rows, cols) = (add: +=) packed rows of a · packed columns of b
static inline void matmul_block(float* y, size_t ldy, bool add, const float* a, const float* b, int depth, int rows,
                                int cols) {
    for (int j = 0; j < cols; j += MATMUL_COLS)
        for (int i = 0; i < rows; i += MATMUL_ROWS)
            matmul_tile(y + i * ldy + j, ldy, add, a + (size_t)i * depth, b + (size_t)j * depth, depth, rows - i,
                        cols - j);
}

// ---- many rows -------------------------------------------------------------------------------

// room for a phase of the shared factor and, behind it, a block of the other one for each thread. It belongs to the calling
// thread, which keeps it
static inline float* matmul_scratch(int threads) {
    static __thread void* buffer = NULL;
    static __thread int room = 0;
    if (room < threads) {
        free(buffer);
        buffer = allocate((size_t)MATMUL_SHARED + (size_t)threads * MATMUL_OWN + MATMUL_LANES, sizeof(float));
        room = threads;
    }
    return (float*)(((uintptr_t)buffer + MATMUL_BYTES - 1) / MATMUL_BYTES * MATMUL_BYTES);
}

// y (M, N) = (add: +=) a (M, K) · b (K, N). The factor with fewer rows or columns is shared: `all` packed numbers of it are
// one phase, a range of its S indices and a range of K in steps of equal depth. The other has O indices, cut into blocks
static inline void matmul_product(float* y, size_t ldy, bool add, MatmulFactor a, MatmulFactor b, int M, int N, int K) {
    const bool share_a = M < N;
    const MatmulFactor shared = share_a ? a : b, own = share_a ? b : a;
    const int S = share_a ? M : N, shared_strip = share_a ? (int)MATMUL_ROWS : (int)MATMUL_COLS;
    const int O = share_a ? N : M, own_strip = share_a ? (int)MATMUL_COLS : (int)MATMUL_ROWS;
    const int threads = matmul_threads((double)M * N * K, MATMUL_ALONE);
    const int k_step = matmul_ceil(K, matmul_ceil(K, MATMUL_DEPTH));
    const int s_phase =
        matmul_min(matmul_up(S, shared_strip), MATMUL_SHARED / MATMUL_DEPTH / MATMUL_CHUNK * MATMUL_CHUNK);
    const int k_phase = MATMUL_SHARED / (s_phase * k_step) * k_step;
    // as many blocks as threads or a multiple, unless they get too small: then threads share out the phase too
    const int blocks = matmul_min(matmul_up(matmul_ceil(O, MATMUL_BLOCK), threads), matmul_ceil(O, MATMUL_CHUNK));
    const int o_step = matmul_up(matmul_ceil(O, blocks), own_strip);
    const int s_step = matmul_up(matmul_ceil(s_phase, matmul_ceil(threads, matmul_ceil(O, o_step))), shared_strip);
    float *all = matmul_scratch(threads), *blocks_of_threads = all + MATMUL_SHARED;

#pragma omp parallel num_threads(threads)
    for (int s0 = 0; s0 < S; s0 += s_phase)
        for (int k0 = 0; k0 < K; k0 += k_phase) {
            const int s1 = matmul_min(s0 + s_phase, S), k1 = matmul_min(k0 + k_phase, K);
            if (s0 || k0) {
#pragma omp barrier
            }
#pragma omp for collapse(2) schedule(dynamic)
            for (int k = k0; k < k1; k += k_step)
                for (int s = s0; s < s1; s += MATMUL_CHUNK) {
                    const int depth = matmul_min(k_step, k1 - k), count = matmul_min(MATMUL_CHUNK, s1 - s);
                    float* to = all + (size_t)(k - k0) * s_phase + (size_t)(s - s0) * depth;
                    matmul_pack(to, shared, s, count, k, depth, shared_strip);
                }
#pragma omp for collapse(2) schedule(dynamic) nowait
            for (int s = s0; s < s1; s += s_step)
                for (int o = 0; o < O; o += o_step) {
                    const int s_count = matmul_min(s_step, s1 - s), o_count = matmul_min(o_step, O - o);
                    float* block = blocks_of_threads + (size_t)matmul_thread() * MATMUL_OWN;
                    float* out = share_a ? y + s * ldy + o : y + o * ldy + s;
                    for (int k = k0; k < k1; k += k_step) {
                        const int depth = matmul_min(k_step, k1 - k);
                        const float* phase = all + (size_t)(k - k0) * s_phase + (size_t)(s - s0) * depth;
                        matmul_pack(block, own, o, o_count, k, depth, own_strip);
                        if (share_a)
                            matmul_block(out, ldy, add || k > 0, phase, block, depth, s_count, o_count);
                        else
                            matmul_block(out, ldy, add || k > 0, block, phase, depth, o_count, s_count);
                    }
                }
        }
}

// ---- few rows --------------------------------------------------------------------------------

// y[n][o] for `rows` rows and outputs o0 .. o1, a group of outputs at a time. rows (1, 4 or 8) and dtype are constants in
// each copy; of rows beyond N and outputs beyond o1 the last one is computed again and not kept.
// The rows of a group are several streams, which the processor fetches badly. They lie side by side, so their successors are
// asked for as one stream, into the L2 cache: that reads at the speed of a plain read, a prefetch for each row at 0.7 of it
MATMUL_INLINE void matmul_few_as(float* y, size_t ldy, const float* x, const char* w, int N, int C, int o0, int o1,
                                 const int rows, Dtype dtype) {
    enum { GROUP = 4, MOST = 8 };
    const int group = rows > GROUP ? 2 : GROUP; // rows * group sums, in registers
    const size_t bytes = matmul_bytes(dtype), stride = C * bytes, step = MATMUL_LANES * bytes;
    const float* xn[MOST];
    for (int n = 0; n < rows; n++) xn[n] = x + (size_t)matmul_min(n, N - 1) * C;
    for (int o = o0; o < o1; o += group) {
        const char *p[GROUP], *next = w + (o + group) * stride + MATMUL_AHEAD;
        matmul_vec sum[MOST][GROUP]; // in registers: those beyond `rows` do not exist
        int c = 0;
        for (int n = 0; n < rows; n++) memset(sum[n], 0, group * sizeof sum[n][0]);
        for (int g = 0; g < group; g++) p[g] = w + matmul_min(o + g, o1 - 1) * stride;
        for (; c + MATMUL_LANES <= C; c += MATMUL_LANES, next += group * step) {
            matmul_vec v[GROUP], xv;
            for (size_t line = 0; line < group * step; line += 64) __builtin_prefetch(next + line, 0, 2);
            for (int g = 0; g < group; g++) matmul_vec_load(&v[g], p[g] + c * bytes, dtype);
            for (int n = 0; n < rows; n++) {
                memcpy(&xv, xn[n] + c, sizeof xv);
                for (int g = 0; g < group; g++) sum[n][g] += xv * v[g];
            }
        }
        for (int n = 0; n < rows && n < N; n++)
            for (int g = 0; g < group && o + g < o1; g++) {
                float total = 0;
                for (int l = 0; l < MATMUL_LANES; l++) total += sum[n][g][l];
                for (int i = c; i < C; i++) total += xn[n][i] * matmul_load(p[g] + i * bytes, dtype);
                y[n * ldy + o + g] = total;
            }
    }
}

MATMUL_INLINE void matmul_few_of(float* y, size_t ldy, const float* x, const char* w, int N, int C, int o0, int o1,
                                 Dtype dtype) {
    if (N == 1)
        matmul_few_as(y, ldy, x, w, N, C, o0, o1, 1, dtype);
    else if (N <= 4)
        matmul_few_as(y, ldy, x, w, N, C, o0, o1, 4, dtype);
    else
        matmul_few_as(y, ldy, x, w, N, C, o0, o1, 8, dtype);
}

// y (N, OC) = x (N, C) · w^T for N up to MATMUL_FEW. Threads take runs of outputs, long ones first: whenever a thread goes to
// another place of w, the processor's own prefetching starts anew (64 KiB of weights at a time read at 0.7 of a plain read's
// speed, a MiB at 0.9); short ones last, so that none waits for another. Taking 16-bit weights apart as even and odd ones,
// with half the instructions, gained nothing
static inline void matmul_few(float* y, size_t ldy, const float* x, Tensor w, int N, int C, int OC) {
    const int run = matmul_up(matmul_ceil(MATMUL_RUN, C * (int)matmul_bytes(w.dtype)), 4);
    const int threads = matmul_threads((double)C * OC, MATMUL_FEW_ALONE);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(guided)
    for (int o = 0; o < OC; o += run) {
        const char* weights = (const char*)w.data;
        const int end = matmul_min(o + run, OC);
        if (w.dtype == DTYPE_BF16)
            matmul_few_of(y, ldy, x, weights, N, C, o, end, DTYPE_BF16);
        else if (w.dtype == DTYPE_F16)
            matmul_few_of(y, ldy, x, weights, N, C, o, end, DTYPE_F16);
        else
            matmul_few_of(y, ldy, x, weights, N, C, o, end, DTYPE_F32);
    }
}

// ---- CPU reference ---------------------------------------------------------------------------

static inline MatmulFactor matmul_factor(const void* data, Dtype dtype, size_t outer, size_t inner) {
    MatmulFactor factor = { data, dtype, outer, inner };
    return factor;
}

// overwrites y (N, OC), whose rows are ldy apart
static inline void matmul_forward_cpu(float* y, int ldy, const float* x, Tensor w, int N, int C, int OC) {
    if (N <= MATMUL_FEW)
        matmul_few(y, ldy, x, w, N, C, OC);
    else
        matmul_product(y, ldy, false, matmul_factor(x, DTYPE_F32, C, 1), matmul_factor(w.data, w.dtype, C, 1), N, OC,
                       C);
}

// overwrites dx (N, C), or adds to it; adds to dw (OC, C). Either may be NULL. w is used for dx, x for dw
static inline void matmul_backward_cpu(float* dx, bool accumulate_dx, float* dw, const float* dy, const float* x,
                                       Tensor w, int N, int C, int OC) {
    if (dx)
        matmul_product(dx, C, accumulate_dx, matmul_factor(dy, DTYPE_F32, OC, 1), matmul_factor(w.data, w.dtype, 1, C),
                       N, C, OC);
    if (dw)
        matmul_product(dw, C, true, matmul_factor(dy, DTYPE_F32, 1, OC), matmul_factor(x, DTYPE_F32, 1, C), OC, C, N);
}

#ifdef __CUDACC__
#include "matmul_cublas.cuh"
#endif
