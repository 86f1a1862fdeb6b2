/*
The back end `reference` of attention: matrix products of cuBLAS and a softmax between them, the simplest right way. Any HD and
T, bf16 and fp32; formulas and shapes are attention.h's, which includes this file.

One key/value head of one sequence at a time, with its G query heads as a batch: a stride of 0 lets them share k and v.

    forward     S (G, T, T) = Q K^T;  P = softmax of each row up to the diagonal, 0 beyond it;  O = P V
    backward    S again, P = e^(S - lse);  dP = dO V^T;  dS = P * (dP - dO . O);
                dQ = dS K;  dK = sum over the heads of dS^T Q;  dV = sum over the heads of P^T dO

Memory          G * T^2 numbers in fp32 and as many in floatX, twice that for the backward pass: for short sequences, odd shapes,
                and to check the others against
Numerics        sums, S and dP in fp32; P and dS are rounded to floatX as factors of the next product. Heads of a group are
                added in fp32, in order: same bits at every run
Bound by        memory: 4 passes over S forward, 7 backward, above the diagonal too
Proved by       dev/test/gpu/test_attention.cuh (against the CPU)
*/
#pragma once

#include <cublas_v2.h>

#include "gpu.cuh"

enum { REFERENCE_THREADS = 256 };

static inline void reference_check(cublasStatus_t status) {
    if (status != CUBLAS_STATUS_SUCCESS) die("attention: cuBLAS: %s", cublasGetStatusString(status));
}

// ---- one group: a key/value head of one sequence and its query heads ---------------------------

// where it lies in the arrays of the whole batch, and where the scratch is. ldt: T rounded up, rows of whole vectors
typedef struct {
    int G, T, HD;
    int64_t ldt, ld, ldo; // from a row of S to the next, of qkv, of out
    float scale;
    size_t q, k, v, out, lse; // offsets
    float *s, *dp, *dk, *dv;  // (G, T, ldt) twice, (T, HD) twice
    floatX *p, *ds;           // (G, T, ldt) twice
} ReferenceGroup;

static inline size_t reference_square(AttentionShape s) { return (size_t)(s.NH / s.NKV) * s.T * ((s.T + 7) / 8 * 8); }

static inline size_t reference_attention_scratch(AttentionShape s, bool backward) {
    const size_t pass = reference_square(s) * (sizeof(float) + sizeof(floatX));
    return backward ? 2 * pass + 2 * (size_t)s.T * s.HD * sizeof(float) : pass;
}

static inline ReferenceGroup reference_group(AttentionShape s, int b, int g, void* scratch) {
    ReferenceGroup x;
    const size_t row = (size_t)b * s.T, square = reference_square(s);
    x.G = s.NH / s.NKV, x.T = s.T, x.HD = s.HD, x.ldt = (s.T + 7) / 8 * 8;
    x.ld = (int64_t)(s.NH + 2 * s.NKV) * s.HD, x.ldo = (int64_t)s.NH * s.HD, x.scale = 1 / sqrtf((float)s.HD);
    x.q = row * x.ld + (size_t)g * x.G * s.HD;
    x.k = row * x.ld + (size_t)(s.NH + g) * s.HD, x.v = x.k + (size_t)s.NKV * s.HD;
    x.out = row * x.ldo + (size_t)g * x.G * s.HD, x.lse = ((size_t)b * s.NH + (size_t)g * x.G) * s.T;
    x.s = (float*)scratch, x.p = (floatX*)(x.s + square),
    x.ds = x.p + square; // used by the backward pass only, like what follows
    x.dp = (float*)(x.ds + square), x.dk = x.dp + square, x.dv = x.dk + (size_t)s.T * s.HD;
    return x;
}

// ---- products --------------------------------------------------------------------------------
// In cuBLAS's order, columns first, a row-major matrix is its transpose: what is written c (n, m) = b (n, k) · a (k, m) here
// is C = A · B there. One number from a row to the next, one from a matrix of the batch to the next (0: shared).

typedef struct {
    const void* x;
    int64_t ld, stride;
    bool transposed;
} ReferenceFactor;

static inline ReferenceFactor reference_factor(const floatX* x, int64_t ld, int64_t stride, bool transposed = false) {
    return ReferenceFactor{ x, ld, stride, transposed };
}

// overwrites c (count matrices of n rows, m numbers each, floatX or float), or with add adds to it
template <typename Out>
static void reference_product(Out* c, int64_t ldc, int64_t stride, ReferenceFactor b, ReferenceFactor a, int n, int m,
                              int k, int count, bool add, cudaStream_t stream) {
    static cublasHandle_t handle = NULL;
    if (!handle) reference_check(cublasCreate(&handle));
    reference_check(cublasSetStream(handle, stream));
    const cudaDataType_t in = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F,
                         to = sizeof(Out) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    const float one = 1, beta = add;
    reference_check(cublasGemmStridedBatchedEx(handle, a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                                               b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &one, a.x, in,
                                               (int)a.ld, a.stride, b.x, in, (int)b.ld, b.stride, &beta, c, to,
                                               (int)ldc, stride, count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// ---- kernels ---------------------------------------------------------------------------------

// a warp a row of S: its softmax over the keys up to the diagonal, zeros beyond
static __global__ void __launch_bounds__(REFERENCE_THREADS)
    reference_softmax_kernel(floatX* p, float* lse, const float* s, int T, int64_t ldt, int64_t rows, float scale) {
    const int64_t row = (int64_t)blockIdx.x * (REFERENCE_THREADS / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    const int lane = threadIdx.x % WARP, t = (int)(row % T);
    const float* x = s + row * ldt;
    float max = -INFINITY, sum = 0;
    for (int j = lane; j <= t; j += WARP) max = fmaxf(max, x[j]);
    max = warp_max(max);
    for (int j = lane; j <= t; j += WARP) sum += expf(scale * (x[j] - max));
    sum = warp_sum(sum);
    for (int j = lane; j < T; j += WARP)
        p[row * ldt + j] = from_float<floatX>(j <= t ? expf(scale * (x[j] - max)) / sum : 0);
    if (lane == 0) lse[row] = scale * max + logf(sum);
}

// a warp a row: P again, and dS. dout and out: row t of head h at t * ldo + h * HD
static __global__ void __launch_bounds__(REFERENCE_THREADS)
    reference_backward_kernel(floatX* p, floatX* ds, const float* s, const float* dp, const floatX* dout,
                              const floatX* out, const float* lse, int T, int HD, int64_t ldt, int64_t ldo,
                              int64_t rows, float scale) {
    const int64_t row = (int64_t)blockIdx.x * (REFERENCE_THREADS / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    const int lane = threadIdx.x % WARP, t = (int)(row % T);
    const int64_t at = t * ldo + row / T * HD, square = row * ldt;
    float dot = 0;
    for (int i = lane; i < HD; i += WARP) dot += to_float(dout[at + i]) * to_float(out[at + i]);
    dot = warp_sum(dot);
    for (int j = lane; j < T; j += WARP) {
        const float power = j <= t ? expf(scale * s[square + j] - lse[row]) : 0;
        p[square + j] = from_float<floatX>(power);
        ds[square + j] = from_float<floatX>(j <= t ? scale * power * (dp[square + j] - dot) : 0);
    }
}

// a thread a number: dx (T, HD), rows ld apart, is x (T, HD), rounded
static __global__ void __launch_bounds__(REFERENCE_THREADS)
    reference_round_kernel(floatX* dx, const float* x, int HD, int64_t ld, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * REFERENCE_THREADS + threadIdx.x;
    if (i < n) dx[i / HD * ld + i % HD] = from_float<floatX>(x[i]);
}

// ---- launchers -------------------------------------------------------------------------------

static inline bool reference_attention_supports(AttentionShape s, Error* why) {
    if (s.NKV < 1 || s.NH % s.NKV)
        return set_error(why, "%d key/value heads do not divide %d query heads", s.NKV, s.NH);
    return true;
}

// overwrites s (G, T, ldt): the products of each row of x, at `at`, with each row of a (T, HD)
static inline void reference_dots(float* s, const ReferenceGroup* x, const floatX* rows, int64_t ld, const floatX* a,
                                  cudaStream_t stream) {
    reference_product(s, x->ldt, x->T * x->ldt, reference_factor(rows, ld, x->HD), reference_factor(a, x->ld, 0, true),
                      x->T, x->T, x->HD, x->G, false, stream);
}

// overwrites out (B*T, NH*HD) and lse (B, NH, T)
static inline void reference_attention_forward(floatX* out, float* lse, const floatX* qkv, AttentionShape shape,
                                               void* scratch, cudaStream_t stream) {
    for (int b = 0; b < shape.B; b++)
        for (int g = 0; g < shape.NKV; g++) {
            const ReferenceGroup x = reference_group(shape, b, g, scratch);
            const int64_t rows = (int64_t)x.G * x.T, square = x.T * x.ldt;
            reference_dots(x.s, &x, qkv + x.q, x.ld, qkv + x.k, stream);
            reference_softmax_kernel<<<(unsigned)ceil_div(rows, REFERENCE_THREADS / WARP), REFERENCE_THREADS, 0,
                                       stream>>>(x.p, lse + x.lse, x.s, x.T, x.ldt, rows, x.scale);
            launch_check();
            reference_product(out + x.out, x.ldo, x.HD, reference_factor(x.p, x.ldt, square),
                              reference_factor(qkv + x.v, x.ld, 0), x.T, x.HD, x.T, x.G, false, stream);
        }
}

// overwrites dqkv, which has the layout of qkv
static inline void reference_attention_backward(floatX* dqkv, const floatX* dout, const floatX* qkv, const floatX* out,
                                                const float* lse, AttentionShape shape, void* scratch,
                                                cudaStream_t stream) {
    for (int b = 0; b < shape.B; b++)
        for (int g = 0; g < shape.NKV; g++) {
            const ReferenceGroup x = reference_group(shape, b, g, scratch);
            const int64_t rows = (int64_t)x.G * x.T, square = x.T * x.ldt, n = (int64_t)x.T * x.HD;
            reference_dots(x.s, &x, qkv + x.q, x.ld, qkv + x.k, stream);
            reference_dots(x.dp, &x, dout + x.out, x.ldo, qkv + x.v, stream);
            reference_backward_kernel<<<(unsigned)ceil_div(rows, REFERENCE_THREADS / WARP), REFERENCE_THREADS, 0,
                                        stream>>>(x.p, x.ds, x.s, x.dp, dout + x.out, out + x.out, lse + x.lse, x.T,
                                                  x.HD, x.ldt, x.ldo, rows, x.scale);
            launch_check();
            reference_product(dqkv + x.q, x.ld, x.HD, reference_factor(x.ds, x.ldt, square),
                              reference_factor(qkv + x.k, x.ld, 0), x.T, x.HD, x.T, x.G, false, stream);
            for (int h = 0; h < x.G; h++) {
                reference_product(x.dk, x.HD, 0, reference_factor(x.ds + h * square, x.ldt, 0, true),
                                  reference_factor(qkv + x.q + (size_t)h * x.HD, x.ld, 0), x.T, x.HD, x.T, 1, h > 0,
                                  stream);
                reference_product(x.dv, x.HD, 0, reference_factor(x.p + h * square, x.ldt, 0, true),
                                  reference_factor(dout + x.out + (size_t)h * x.HD, x.ldo, 0), x.T, x.HD, x.T, 1, h > 0,
                                  stream);
            }
            const unsigned blocks = (unsigned)ceil_div(n, REFERENCE_THREADS);
            reference_round_kernel<<<blocks, REFERENCE_THREADS, 0, stream>>>(dqkv + x.k, x.dk, x.HD, x.ld, n);
            launch_check();
            reference_round_kernel<<<blocks, REFERENCE_THREADS, 0, stream>>>(dqkv + x.v, x.dv, x.HD, x.ld, n);
            launch_check();
        }
}
