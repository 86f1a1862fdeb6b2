/*
Attention: causal, grouped-query, without ever holding the T x T matrix.

    forward     s[t, j] = scale * q[t] . k[j]                   for the keys j = 0 .. pos + t; scale = 1 / sqrt(HD)
                lse[t]  = log(sum over j of e^s[t, j])
                out[t]  = sum over j of p[t, j] * v[j]          p[t, j] = e^(s[t, j] - lse[t])
    backward    dv[j]   = sum over t of p[t, j] * dout[t]
                ds[t, j] = p[t, j] * (dout[t] . v[j] - dout[t] . out[t])
                dq[t]   = scale * sum over j of ds[t, j] * k[j]
                dk[j]   = scale * sum over t of ds[t, j] * q[t]

Query head h reads key/value head h / G, G = NH / NKV, where it lies: nothing is copied per query head.

Tiles           a task of the forward pass is one sequence, one kv head, 32 queries: it walks the keys 64 at a time with an
                online softmax (running maximum m and sum l; when m grows, what was summed is scaled by e^(old - new)).
                A task of the backward pass is one sequence and one kv head; p is computed again from lse. The key tile is
                transposed once for all heads of the group, so that every product is rows += number * row: contiguous
                vectors, no sum across lanes
Shapes          out dout (B, T, NH*HD)    lse (B, NH, T)    q, k, v: rows of any stride, heads side by side
Numerics        fp32. Each task owns what it writes and sums in a fixed order: same bits for any number of threads.
                A NaN in v also reaches earlier queries of the same tile, which multiply it by 0
On the GPU      three back ends behind one interface; queries, keys and values are rows q, k, v side by side (B*T, QKV), as the
                projection leaves them, and so are their gradients. Causal, T keys for T queries, any T and B

                reference   attention_reference.cuh: matrix products and a softmax between them, T x T in memory. Any HD
                mma         attention_flash.cuh: our own tensor-core kernels. bf16; HD 32, 48, 64, 128
                hopper      attention_hopper.cuh: our own for sm_90, with wgmma and the copy engine. bf16; HD 64, 128
                cudnn       attention_cudnn.cuh: cuDNN's kernels, when built with USE_CUDNN. bf16
Bound by        FLOPs in training: 2 * NH*HD * T^2 a sequence forward (half of the 4 * NH*HD * T^2 of the full square) and
                2.5 times that backward; memory in generation: 2 * NKV*HD numbers per key and token
Proved by       dev/test/test_ops.c (finite differences; against a plain T x T softmax; against repeat_kv; with a cache),
                test_ops_float.c (same bits for any threads; one huge score; NaN), gpu/test_attention.cuh (back ends)
Source          Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022,
                "FlashAttention"
*/
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "exp.h"
#include "softmax.h"

typedef struct {
    int B, T, NH, NKV, HD;
} AttentionShape;

enum { ATTENTION_QUERIES = 32, ATTENTION_KEYS = 64 };

// ---- tiles ------------------------------------------------------------------------------------

// n numbers on a cache line's boundary, not set; owned by the caller (free)
static inline float* attention_aligned(size_t n) {
    float* p = (float*)aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64);
    if (!p) die("out of memory: %zu numbers for attention", n);
    return p;
}

// c (M, N) += scale * a (M, K) · b (K, N). Rows of c and b are contiguous, ldc and ldb apart; element (i, k) of a is
// a[i * row + k * col]. Eight rows of b at a time, so that c is not written more often than arithmetic hides
static inline void attention_product(float* c, size_t ldc, const float* a, size_t row, size_t col, const float* b,
                                     size_t ldb, int M, int K, int N, float scale) {
    for (int i = 0; i < M; i++) {
        float* ci = c + i * ldc;
        const float* ai = a + i * row;
        int k = 0;
        for (; k + 8 <= K; k += 8) {
            const float *b0 = b + k * ldb, *b1 = b0 + ldb, *b2 = b1 + ldb, *b3 = b2 + ldb;
            const float *b4 = b3 + ldb, *b5 = b4 + ldb, *b6 = b5 + ldb, *b7 = b6 + ldb;
            float f[8];
            for (int u = 0; u < 8; u++) f[u] = scale * ai[(k + u) * col];
#pragma omp simd
            for (int j = 0; j < N; j++)
                ci[j] += f[0] * b0[j] + f[1] * b1[j] + f[2] * b2[j] + f[3] * b3[j] + f[4] * b4[j] + f[5] * b5[j] +
                         f[6] * b6[j] + f[7] * b7[j];
        }
        for (; k < K; k++) {
            float f = scale * ai[k * col];
#pragma omp simd
            for (int j = 0; j < N; j++) ci[j] += f * b[k * ldb + j];
        }
    }
}

// s[j] = scale * q (HD) . row j of k, for n rows
static inline void attention_dots(float* s, const float* q, const float* k, size_t ldk, int n, int HD, float scale) {
    for (int j = 0; j < n; j++, k += ldk) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int i = 0; i < HD; i++) dot += q[i] * k[i];
        s[j] = scale * dot;
    }
}

// overwrites xt (HD, ATTENTION_KEYS): the transpose of n rows of x, then columns of zeros up to a multiple of 16
static inline void attention_transpose(float* xt, const float* x, size_t ldx, int n, int HD) {
    for (int j = 0; j < n; j += 16)
        for (int i = 0; i < HD; i++) {
            const float* from = x + j * ldx + i;
            float column[16] = { 0 };
            if (n - j >= 16)
                for (int r = 0; r < 16; r++) column[r] = from[r * ldx];
            else
                for (int r = 0; r < n - j; r++) column[r] = from[r * ldx];
            memcpy(xt + (size_t)i * ATTENTION_KEYS + j, column, sizeof column);
        }
}

// ---- CPU reference ---------------------------------------------------------------------------

// one row of scores s (n keys that the query sees, then others up to width) becomes e^(s - m) with 0 for the others;
// returns what earlier sums must be scaled by, and updates the running maximum m and sum l
static inline float attention_softmax(float* s, int n, int width, float* m, float* l) {
    float max = softmax_max(s, n, *m), rescale = exp32(*m - max);
    *l = *l * rescale + softmax_powers(s, n, max);
    *m = max;
    for (int j = n; j < width; j++) s[j] = 0;
    return rescale;
}

// the queries t0 .. t0 + rows - 1 of one sequence, for the G heads that share k and v; all pointers at row 0 and the
// group's first head, lse (G, T). kt (HD, ATTENTION_KEYS), m and l (G, ATTENTION_QUERIES) are scratch
static inline void attention_forward_task(float* out, float* lse, const float* q, const float* k, const float* v,
                                          int t0, int rows, int T, int pos, int G, int NH, int HD, int ldq, int ldkv,
                                          float* kt, float* m, float* l) {
    const size_t ldo = (size_t)NH * HD;
    const float scale = 1 / sqrtf((float)HD);
    float s[ATTENTION_QUERIES * ATTENTION_KEYS] __attribute__((aligned(64)));
    for (int i = 0; i < G * ATTENTION_QUERIES; i++) m[i] = -INFINITY, l[i] = 0;
    for (int r = 0; r < rows; r++) memset(out + (t0 + r) * ldo, 0, sizeof(float) * G * HD);
    const int keys = pos + t0 + rows; // that the last query sees
    for (int j0 = 0; j0 < keys; j0 += ATTENTION_KEYS) {
        const int n = keys - j0 < ATTENTION_KEYS ? keys - j0 : ATTENTION_KEYS, width = (n + 15) & ~15;
        if (rows > 1) attention_transpose(kt, k + (size_t)j0 * ldkv, ldkv, n, HD); // a query alone does not pay for it
        for (int h = 0; h < G; h++) {
            float *oh = out + t0 * ldo + (size_t)h * HD, *mh = m + h * ATTENTION_QUERIES,
                  *lh = l + h * ATTENTION_QUERIES;
            const float* qh = q + (size_t)t0 * ldq + (size_t)h * HD;
            if (rows == 1) {
                attention_dots(s, qh, k + (size_t)j0 * ldkv, ldkv, n, HD, scale);
            } else {
                memset(s, 0, sizeof(float) * ATTENTION_KEYS * rows);
                attention_product(s, ATTENTION_KEYS, qh, ldq, 1, kt, ATTENTION_KEYS, rows, HD, width, scale);
            }
            for (int r = 0; r < rows; r++) {
                int seen = pos + t0 + r + 1 - j0;
                seen = seen < 0 ? 0 : seen < n ? seen : n;
                float rescale = attention_softmax(s + r * ATTENTION_KEYS, seen, n, mh + r, lh + r);
                for (int i = 0; i < HD; i++) oh[r * ldo + i] *= rescale;
            }
            attention_product(oh, ldo, s, ATTENTION_KEYS, 1, v + (size_t)j0 * ldkv, ldkv, rows, n, HD, 1);
        }
    }
    for (int h = 0; h < G; h++)
        for (int r = 0; r < rows; r++) {
            float sum = l[h * ATTENTION_QUERIES + r], *o = out + (t0 + r) * ldo + (size_t)h * HD;
            for (int i = 0; i < HD; i++) o[i] /= sum;
            if (lse) lse[(size_t)h * T + t0 + r] = m[h * ATTENTION_QUERIES + r] + logf(sum);
        }
}

// overwrites out (B, T, NH*HD) and lse (B, NH, T), which may be NULL. Row t of sequence b of q is at q + (b*T + t) * ldq and
// sees the keys 0 .. pos + t; row j of k and v is at k + (b*S + j) * ldkv. S is the rows kept per sequence: T in training,
// the capacity of the cache in generation
static inline void attention_forward_cpu(float* out, float* lse, const float* q, const float* k, const float* v, int B,
                                         int T, int S, int pos, int NH, int NKV, int HD, int ldq, int ldkv) {
    const int G = NH / NKV, tiles = (T + ATTENTION_QUERIES - 1) / ATTENTION_QUERIES;
    const int64_t tasks = (int64_t)tiles * B * NKV;
#pragma omp parallel if (tasks > 1 && (double)B * T * (pos + T) * NH * HD > 16384)
    {
        float* kt = attention_aligned((size_t)HD * ATTENTION_KEYS + 2 * (size_t)G * ATTENTION_QUERIES);
        float *m = kt + (size_t)HD * ATTENTION_KEYS, *l = m + (size_t)G * ATTENTION_QUERIES;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) { // the longest first
            const int tile = tiles - 1 - (int)(task / (B * NKV)), b = (int)(task / NKV % B), g = (int)(task % NKV);
            const int t0 = tile * ATTENTION_QUERIES, rows = T - t0 < ATTENTION_QUERIES ? T - t0 : ATTENTION_QUERIES;
            const size_t row = (size_t)b * T, key = (size_t)b * S * ldkv + (size_t)g * HD, head = (size_t)g * G;
            attention_forward_task(out + (row * NH + head) * HD, lse ? lse + ((size_t)b * NH + head) * T : NULL,
                                   q + row * ldq + head * HD, k + key, v + key, t0, rows, T, pos, G, NH, HD, ldq, ldkv,
                                   kt, m, l);
        }
        free(kt);
    }
}

// one sequence and one kv head with the G query heads that share it; pointers as in the forward task. kt and vt
// (HD, ATTENTION_KEYS) and dots (G, T) are scratch
static inline void attention_backward_task(float* dq, float* dk, float* dv, const float* dout, const float* q,
                                           const float* k, const float* v, const float* out, const float* lse, int T,
                                           int G, int NH, int HD, int ld, float* kt, float* vt, float* dots) {
    const size_t ldo = (size_t)NH * HD;
    const float scale = 1 / sqrtf((float)HD);
    float p[ATTENTION_QUERIES * ATTENTION_KEYS] __attribute__((aligned(64)));
    float ds[ATTENTION_QUERIES * ATTENTION_KEYS] __attribute__((aligned(64)));
    for (int t = 0; t < T; t++) {
        memset(dq + (size_t)t * ld, 0, sizeof(float) * G * HD);
        memset(dk + (size_t)t * ld, 0, sizeof(float) * HD);
        memset(dv + (size_t)t * ld, 0, sizeof(float) * HD);
        for (int h = 0; h < G; h++) {
            const float *a = dout + t * ldo + (size_t)h * HD, *o = out + t * ldo + (size_t)h * HD;
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int i = 0; i < HD; i++) dot += a[i] * o[i];
            dots[(size_t)h * T + t] = dot;
        }
    }
    for (int j0 = 0; j0 < T; j0 += ATTENTION_KEYS) {
        const size_t key = (size_t)j0 * ld;
        const int all = T - j0 < ATTENTION_KEYS ? T - j0 : ATTENTION_KEYS;
        attention_transpose(kt, k + key, ld, all, HD);
        attention_transpose(vt, v + key, ld, all, HD);
        for (int h = 0; h < G; h++)
            for (int t0 = j0; t0 < T; t0 += ATTENTION_QUERIES) {
                const int rows = T - t0 < ATTENTION_QUERIES ? T - t0 : ATTENTION_QUERIES;
                const int n = t0 + rows - j0 < all ? t0 + rows - j0 : all, width = (n + 15) & ~15; // keys seen
                const size_t query = (size_t)t0 * ld + (size_t)h * HD;
                const float* dout_tile = dout + t0 * ldo + (size_t)h * HD;
                memset(p, 0, sizeof(float) * ATTENTION_KEYS * rows),
                    memset(ds, 0, sizeof(float) * ATTENTION_KEYS * rows);
                attention_product(p, ATTENTION_KEYS, q + query, ld, 1, kt, ATTENTION_KEYS, rows, HD, width, scale);
                attention_product(ds, ATTENTION_KEYS, dout_tile, ldo, 1, vt, ATTENTION_KEYS, rows, HD, width, 1);
                for (int r = 0; r < rows; r++) {
                    float *pr = p + r * ATTENTION_KEYS, *dsr = ds + r * ATTENTION_KEYS;
                    const float l = lse[(size_t)h * T + t0 + r], dot = dots[(size_t)h * T + t0 + r];
                    const int seen = t0 + r + 1 - j0 < n ? t0 + r + 1 - j0 : n;
                    for (int j = 0; j < seen; j++) {
                        pr[j] = exp32(pr[j] - l);
                        dsr[j] = scale * pr[j] * (dsr[j] - dot);
                    }
                    for (int j = seen; j < n; j++) pr[j] = dsr[j] = 0;
                }
                attention_product(dv + key, ld, p, 1, ATTENTION_KEYS, dout_tile, ldo, n, rows, HD, 1);
                attention_product(dk + key, ld, ds, 1, ATTENTION_KEYS, q + query, ld, n, rows, HD, 1);
                attention_product(dq + query, ld, ds, ATTENTION_KEYS, 1, k + key, ld, rows, n, HD, 1);
            }
    }
}

// overwrites dq, dk and dv, which have the layout and the stride ld of q, k and v (pos 0, S = T)
static inline void attention_backward_cpu(float* dq, float* dk, float* dv, const float* dout, const float* q,
                                          const float* k, const float* v, const float* out, const float* lse, int B,
                                          int T, int NH, int NKV, int HD, int ld) {
    const int G = NH / NKV;
    const int64_t tasks = (int64_t)B * NKV;
#pragma omp parallel if (tasks > 1)
    {
        const size_t tile = (size_t)HD * ATTENTION_KEYS;
        float *kt = attention_aligned(2 * tile + (size_t)G * T), *vt = kt + tile, *dots = vt + tile;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const size_t b = (size_t)(task / NKV), g = (size_t)(task % NKV), head = g * G;
            const size_t query = b * T * ld + head * HD, key = b * T * ld + g * HD, row = (b * T * NH + head) * HD;
            attention_backward_task(dq + query, dk + key, dv + key, dout + row, q + query, k + key, v + key, out + row,
                                    lse + (b * NH + head) * T, T, G, NH, HD, ld, kt, vt, dots);
        }
        free(kt);
    }
}

// ---- CUDA: the back ends ----------------------------------------------------------------------

#ifdef __CUDACC__
#include "gpu.cuh"

#include "attention_reference.cuh"
#ifndef PRECISION_FP32
#include "attention_flash.cuh"
#include "attention_hopper.cuh"
#endif
#ifdef USE_CUDNN
#include "attention_cudnn.cuh"
#endif

// the first choice last
typedef enum { ATTENTION_REFERENCE, ATTENTION_MMA, ATTENTION_HOPPER, ATTENTION_CUDNN, N_ATTENTION } AttentionBackend;
static const char* const attention_names[N_ATTENTION] = { "reference", "mma", "hopper", "cudnn" };

static inline bool attention_built_with(AttentionBackend backend) {
#ifndef USE_CUDNN
    if (backend == ATTENTION_CUDNN) return false;
#endif
    return sizeof(floatX) == 2 || backend == ATTENTION_REFERENCE;
}

static bool attention_any_order = false; // see attention_fast

// lets the backward passes of hopper and cudnn add up dq in whatever order their blocks finish. Set before the first call
static inline void attention_fast(bool fast) {
    attention_any_order = fast;
#ifdef USE_CUDNN
    cudnn_attention_fast = fast;
#endif
}

static inline bool attention_is_fast(void) { return attention_any_order; }

// whether the back end takes the shape: for the forward pass and, when backward, for that too
static inline bool attention_supports(AttentionBackend backend, AttentionShape shape, bool backward, Error* why) {
    (void)backward;
    if (sizeof(floatX) == 4 && backend != ATTENTION_REFERENCE) return set_error(why, "built for fp32, bf16 expected");
    switch (backend) {
#ifdef USE_CUDNN
    case ATTENTION_CUDNN: return cudnn_attention_supports(shape, backward, why);
#endif
#ifndef PRECISION_FP32
    case ATTENTION_HOPPER: return hopper_attention_supports(shape, why);
    case ATTENTION_MMA: return flash_attention_supports(shape, why);
#endif
    case ATTENTION_REFERENCE: return reference_attention_supports(shape, why);
    default: return set_error(why, "built without cuDNN: make USE_CUDNN=1");
    }
}

// the first back end that takes the shape, from `most` down. why: what was passed over for which reason,
// empty when nothing was
static inline AttentionBackend attention_choose(AttentionBackend most, AttentionShape shape, bool backward,
                                                Error* why) {
    int backend = (int)most;
    size_t n = 0;
    why->text[0] = 0;
    for (; backend > (int)ATTENTION_REFERENCE; backend--) {
        Error reason;
        if (attention_supports((AttentionBackend)backend, shape, backward, &reason)) break;
        if (n < sizeof why->text)
            n += (size_t)snprintf(why->text + n, sizeof why->text - n, "%snot %s: %s", n ? "; " : "",
                                  attention_names[backend], reason.text);
    }
    return (AttentionBackend)backend;
}

// bytes of scratch for a forward pass or, when backward, for either pass
static inline size_t attention_scratch(AttentionBackend backend, AttentionShape shape, bool backward) {
    switch (backend) {
#ifdef USE_CUDNN
    case ATTENTION_CUDNN: return cudnn_attention_scratch(shape, backward);
#endif
#ifndef PRECISION_FP32
    case ATTENTION_HOPPER: return hopper_attention_scratch(shape, backward);
    case ATTENTION_MMA: return flash_attention_scratch(shape, backward);
#endif
    default: return reference_attention_scratch(shape, backward);
    }
}

// of qkv, out and, twice, their gradients
static inline double attention_bytes(AttentionShape s, int times) {
    return times * 2.0 * s.B * s.T * (s.NH + s.NKV) * s.HD * sizeof(floatX);
}

// of the two products of a forward pass below the diagonal; a backward pass has five
static inline double attention_flops(AttentionShape s) { return 2.0 * s.B * s.NH * s.HD * s.T * (s.T + 1.0); }

// overwrites out (B*T, NH*HD) and lse (B, NH, T); qkv (B*T, (NH + 2*NKV)*HD). Of a shape that is supported, as below
static inline void attention_forward(AttentionBackend backend, floatX* out, float* lse, const floatX* qkv,
                                     AttentionShape shape, void* scratch, cudaStream_t stream) {
    GpuOp op("attention_forward", attention_bytes(shape, 1), attention_flops(shape), stream);
    switch (backend) {
#ifdef USE_CUDNN
    case ATTENTION_CUDNN: cudnn_attention_forward(out, lse, qkv, shape, scratch, stream); break;
#endif
#ifndef PRECISION_FP32
    case ATTENTION_HOPPER: hopper_attention_forward(out, lse, qkv, shape, scratch, stream); break;
    case ATTENTION_MMA: flash_attention_forward(out, lse, qkv, shape, stream); break;
#endif
    default: reference_attention_forward(out, lse, qkv, shape, scratch, stream);
    }
}

// overwrites dqkv, which has the layout of qkv. room: bytes of scratch, at least attention_scratch; cudnn uses more
static inline void attention_backward(AttentionBackend backend, floatX* dqkv, const floatX* dout, const floatX* qkv,
                                      const floatX* out, const float* lse, AttentionShape shape, void* scratch, size_t room,
                                      cudaStream_t stream) {
    GpuOp op("attention_backward", attention_bytes(shape, 2), 2.5 * attention_flops(shape), stream);
    switch (backend) {
#ifdef USE_CUDNN
    case ATTENTION_CUDNN: cudnn_attention_backward(dqkv, dout, qkv, out, lse, shape, scratch, room, stream); break;
#endif
#ifndef PRECISION_FP32
    case ATTENTION_HOPPER:
        hopper_attention_backward(dqkv, dout, qkv, out, lse, shape, !attention_any_order, scratch, stream);
        break;
    case ATTENTION_MMA: flash_attention_backward(dqkv, dout, qkv, out, lse, shape, scratch, stream); break;
#endif
    default: reference_attention_backward(dqkv, dout, qkv, out, lse, shape, scratch, stream);
    }
    (void)room;
}
#endif
