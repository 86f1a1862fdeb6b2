/*
The three products of matmul.h on the GPU, through cuBLASLt.

    forward     y  (N, OC) = x · w^T             rows of y and dy are ldy apart, those of the others C
    dx          dx (N, C)  = dy · w              accumulate: added to dx
    dw          dw (OC, C) = dy^T · x            accumulate: added to dw; matmul_dw_fp32 has an fp32 dw

cuBLASLt counts columns first: what is (N, C) here is (C, N) there, without moving a number. So x is C x N, w is C x OC,
y is OC x N, and the products are y = w^T · x, dx = w · dy, dw = x · dy^T.

Numerics        sums in fp32, rounded once at the store; accumulate adds the old number before that rounding. -DPRECISION_FP32
                means fp32 products, TF32 only with matmul.tf32. Among an algorithm's ways to share one sum among blocks only
                that is allowed which puts fp32 parts into the workspace and adds them in order: the same bits at every run
Bound by        FLOPs, 2*N*C*OC each, from some 300 rows on (H200: 206 FLOPs per byte)
Choice          cuBLASLt's heuristic names candidates; at the first use of a shape they are timed on random numbers in memory
                of their own (zeros would be faster than any real data) and the fastest is kept. matmul_choose does that ahead
                of time: before the memory is full, before a graph is captured. Choices can be kept as text, a line each,
                where the algorithm is known by a hash of its 64 bytes: the text never reaches the library, and a line that no
                candidate answers to is timed anew. matmul_cache_read and _write keep them in the user's cache folder. A run
                that is resumed reads its own first: the first line for a shape counts
Memory          a workspace of MATMUL_WORKSPACE bytes, which one stream at a time may use
Proved by       dev/test/gpu/test_matmul.cuh (against the CPU; two runs bit for bit; choices written and read)
*/
#pragma once

#include <cublasLt.h>
#include <math.h>

#include "error.h"
#include "file.h"
#include "gpu.cuh"
#include "random.h"

// ---- state -----------------------------------------------------------------------------------

typedef enum { MATMUL_FORWARD, MATMUL_DX, MATMUL_DW } MatmulKind;

// all that the speed of a product depends on
typedef struct {
    MatmulKind kind;
    bool accumulate;
    bool wide; // the result is fp32 whatever floatX is
    int64_t N, C, OC;
    int64_t ldy; // numbers from one row of y or dy to the next
} MatmulShape;

typedef struct {
    MatmulShape shape;
    uint64_t mark; // of the algorithm chosen, or to be chosen; 0: none yet
    float us;      // its time when it was chosen, 0: not timed
    bool ready;    // what follows is set
    cublasLtMatmulAlgo_t algorithm;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, d; // of the factors and the result
} MatmulChoice;

typedef struct {
    cublasLtHandle_t handle;
    void* workspace;       // MATMUL_WORKSPACE bytes
    MatmulChoice* choices; // [n] of room for `room`; those not ready were read from text
    int n, room;
    int timed;    // choices made by timing, and not in the cache yet
    bool tf32;    // fp32 products may round their factors to TF32; set before the first use
    bool untimed; // new shapes get the heuristic's favourite: for those that come once, as prompts do
} Matmul;

// clang-format off
enum {
    MATMUL_WORKSPACE = 32 << 20,  // what NVIDIA advises for Hopper
    MATMUL_ALIGN = 16,            // bytes, of every pointer and row
    MATMUL_CANDIDATES = 16,       // asked of the heuristic
    MATMUL_TRIALS = 5,            // timings of a good candidate, of which the median counts
    MATMUL_MOST = 1024,           // choices read from text
};
// clang-format on

static Matmul matmul; // of the GPU in use

#define cublas_check(call) cublas_check_at(call, #call, __FILE__, __LINE__)
static inline void cublas_check_at(cublasStatus_t code, const char* call, const char* file, int line) {
    if (code != CUBLAS_STATUS_SUCCESS) die("%s:%d: %s: %s", file, line, call, cublasLtGetStatusString(code));
}

static inline void matmul_init(void) {
    if (matmul.handle) return;
    cublas_check(cublasLtCreate(&matmul.handle));
    cuda_check(cudaMalloc(&matmul.workspace, MATMUL_WORKSPACE));
}

static inline void matmul_free(void) {
    for (int i = 0; i < matmul.n; i++) {
        MatmulChoice* c = &matmul.choices[i];
        if (!c->ready) continue;
        cublasLtMatmulDescDestroy(c->product);
        cublasLtMatrixLayoutDestroy(c->a), cublasLtMatrixLayoutDestroy(c->b), cublasLtMatrixLayoutDestroy(c->d);
    }
    if (matmul.handle) cublasLtDestroy(matmul.handle);
    cudaFree(matmul.workspace);
    free(matmul.choices);
    memset(&matmul, 0, sizeof matmul);
}

// ---- one product -----------------------------------------------------------------------------

// which of x, w and y are the first factor, the second and the result
#define MATMUL_A(kind, x, w, y) ((kind) == MATMUL_DW ? (x) : (w))
#define MATMUL_B(kind, x, w, y) ((kind) == MATMUL_FORWARD ? (x) : (y))
#define MATMUL_D(kind, x, w, y) ((kind) == MATMUL_FORWARD ? (y) : (kind) == MATMUL_DX ? (x) : (w))

static inline void matmul_describe(MatmulChoice* c) {
    const MatmulShape s = c->shape;
    const cudaDataType_t type = DTYPE_X == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    const bool tf32 = DTYPE_X == DTYPE_F32 && matmul.tf32;
    const cublasOperation_t op_a = s.kind == MATMUL_FORWARD ? CUBLAS_OP_T : CUBLAS_OP_N,
                            op_b = s.kind == MATMUL_DW ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtMatrixLayout_t x, w, y;
    cublas_check(
        cublasLtMatmulDescCreate(&c->product, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublas_check(cublasLtMatmulDescSetAttribute(c->product, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a));
    cublas_check(cublasLtMatmulDescSetAttribute(c->product, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b));
    cublas_check(cublasLtMatrixLayoutCreate(&x, type, (uint64_t)s.C, (uint64_t)s.N, s.C));
    cublas_check(cublasLtMatrixLayoutCreate(&w, s.wide ? CUDA_R_32F : type, (uint64_t)s.C, (uint64_t)s.OC, s.C));
    cublas_check(cublasLtMatrixLayoutCreate(&y, type, (uint64_t)s.OC, (uint64_t)s.N, s.ldy));
    c->a = MATMUL_A(s.kind, x, w, y), c->b = MATMUL_B(s.kind, x, w, y), c->d = MATMUL_D(s.kind, x, w, y);
}

static inline cublasStatus_t matmul_launch(const MatmulChoice* c, const cublasLtMatmulAlgo_t* algorithm, void* x,
                                           void* w, void* y, cudaStream_t stream) {
    const float alpha = 1, beta = c->shape.accumulate ? 1 : 0;
    const MatmulKind kind = c->shape.kind;
    void* d = MATMUL_D(kind, x, w, y);
    return cublasLtMatmul(matmul.handle, c->product, &alpha, MATMUL_A(kind, x, w, y), c->a, MATMUL_B(kind, x, w, y),
                          c->b, &beta, d, c->d, d, c->d, algorithm, matmul.workspace, MATMUL_WORKSPACE, stream);
}

// ---- the choice of an algorithm --------------------------------------------------------------

static inline uint64_t matmul_mark(const cublasLtMatmulAlgo_t* algorithm) {
    uint64_t mark = 0;
    for (size_t i = 0; i < sizeof algorithm->data / sizeof *algorithm->data; i++)
        mark = random_mix(mark ^ algorithm->data[i]);
    return mark ? mark : 1;
}

// overwrites found with the heuristic's candidates, its favourite first; returns how many there are
static inline int matmul_candidates(const MatmulChoice* c, cublasLtMatmulAlgo_t* found) {
    const size_t workspace = MATMUL_WORKSPACE;
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, align = MATMUL_ALIGN;
    const cublasLtMatmulPreferenceAttributes_t aligned[] = { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                                                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES };
    cublasLtMatmulHeuristicResult_t results[MATMUL_CANDIDATES];
    cublasLtMatmulPreference_t preference;
    int n = 0, kept = 0;
    memset(results, 0, sizeof results);
    cublas_check(cublasLtMatmulPreferenceCreate(&preference));
    cublas_check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                      sizeof workspace));
    cublas_check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                      &reduction, sizeof reduction));
    for (int i = 0; i < 4; i++)
        cublas_check(cublasLtMatmulPreferenceSetAttribute(preference, aligned[i], &align, sizeof align));
    cublasStatus_t code = cublasLtMatmulAlgoGetHeuristic(matmul.handle, c->product, c->a, c->b, c->d, c->d, preference,
                                                         MATMUL_CANDIDATES, results, &n);
    cublasLtMatmulPreferenceDestroy(preference);
    for (int i = 0; i < n && code == CUBLAS_STATUS_SUCCESS; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS) found[kept++] = results[i].algo;
    if (!kept)
        die("cuBLASLt has no algorithm for a product of N %lld, C %lld, OC %lld: %s", (long long)c->shape.N,
            (long long)c->shape.C, (long long)c->shape.OC, cublasLtGetStatusString(code));
    return kept;
}

// uniform in [-1, 1); one thread a number, in strides of the grid
template <typename T>
static __global__ void matmul_fill_kernel(T* x, size_t n, uint64_t seed) {
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        x[i] = from_float<T>(2 * random_uniform(seed, 0, i) - 1);
}

// n random numbers of type T in new memory; NULL when there is not enough
template <typename T>
static inline void* matmul_random(int64_t n, uint64_t seed, cudaStream_t stream) {
    T* x;
    if (cudaMalloc(&x, (size_t)n * sizeof(T)) != cudaSuccess) {
        cudaGetLastError(); // it is dealt with
        return NULL;
    }
    matmul_fill_kernel<T><<<(unsigned)(8 * gpu_processors()), 256, 0, stream>>>(x, (size_t)n, seed);
    launch_check();
    return x;
}

// what a candidate is timed with
typedef struct {
    void *x, *w, *y;
    cudaEvent_t start, stop;
    cudaStream_t stream;
} MatmulBench;

// microseconds of one product, over `repeat` of them; infinity when the candidate does not run after all
static inline float matmul_time(const MatmulBench* b, const MatmulChoice* c, const cublasLtMatmulAlgo_t* algorithm,
                                int repeat) {
    float ms;
    cuda_check(cudaEventRecord(b->start, b->stream));
    for (int i = 0; i < repeat; i++)
        if (matmul_launch(c, algorithm, b->x, b->w, b->y, b->stream) != CUBLAS_STATUS_SUCCESS) return INFINITY;
    cuda_check(cudaEventRecord(b->stop, b->stream));
    cuda_check(cudaEventSynchronize(b->stop));
    cuda_check(cudaEventElapsedTime(&ms, b->start, b->stop));
    return 1000 * ms / (float)repeat;
}

// the index of the fastest of n candidates, whose time goes to c->us. Each is timed once; those within a fifth of the best
// MATMUL_TRIALS times more, in turns, so that the clock's moods meet all alike
static inline int matmul_fastest(const MatmulBench* b, MatmulChoice* c, const cublasLtMatmulAlgo_t* candidates, int n) {
    float first[MATMUL_CANDIDATES], trials[MATMUL_CANDIDATES][MATMUL_TRIALS], best = INFINITY;
    int fastest = 0, repeat = 1;
    for (int i = 0; i < n; i++) {
        first[i] = matmul_time(b, c, &candidates[i], 1); // the kernel is loaded
        if (i == 0 && first[0] < 200) repeat = 1 + (int)(200 / fmaxf(first[0], 10));
        if (isfinite(first[i])) first[i] = matmul_time(b, c, &candidates[i], repeat);
        best = fminf(best, first[i]);
    }
    for (int t = 0; t < MATMUL_TRIALS; t++)
        for (int i = 0; i < n; i++)
            if (first[i] <= 1.2f * best) trials[i][t] = matmul_time(b, c, &candidates[i], repeat);
    c->us = INFINITY;
    for (int i = 0; i < n; i++) {
        if (!(first[i] <= 1.2f * best)) continue;
        for (int k = 1; k < MATMUL_TRIALS; k++)
            for (int j = k; j > 0 && trials[i][j] < trials[i][j - 1]; j--) {
                float swap = trials[i][j];
                trials[i][j] = trials[i][j - 1], trials[i][j - 1] = swap;
            }
        float median = trials[i][MATMUL_TRIALS / 2];
        if (median < c->us) c->us = median, fastest = i;
    }
    return fastest;
}

// times the candidates in memory of their own; without that much memory, the heuristic's favourite is taken
static inline int matmul_trial(MatmulChoice* c, const cublasLtMatmulAlgo_t* candidates, int n, cudaStream_t stream) {
    const MatmulShape s = c->shape;
    int fastest = 0;
    MatmulBench b;
    b.stream = stream;
    b.x = matmul_random<floatX>(s.N * s.C, 1, stream);
    b.w = s.wide ? matmul_random<float>(s.OC * s.C, 2, stream) : matmul_random<floatX>(s.OC * s.C, 2, stream);
    b.y = matmul_random<floatX>(s.N * s.ldy, 3, stream);
    if (b.x && b.w && b.y) {
        cuda_check(cudaEventCreate(&b.start));
        cuda_check(cudaEventCreate(&b.stop));
        fastest = matmul_fastest(&b, c, candidates, n);
        cudaEventDestroy(b.start), cudaEventDestroy(b.stop);
    }
    cuda_check(cudaStreamSynchronize(stream));
    cudaFree(b.x), cudaFree(b.w), cudaFree(b.y);
    return fastest;
}

// the algorithm that text asked for, or else the fastest
static inline void matmul_prepare(MatmulChoice* c, cudaStream_t stream) {
    cublasLtMatmulAlgo_t candidates[MATMUL_CANDIDATES];
    cudaStreamCaptureStatus capturing;
    matmul_init();
    cuda_check(cudaStreamIsCapturing(stream, &capturing));
    launch_require(capturing == cudaStreamCaptureStatusNone, "matmul",
                   "a shape is chosen for before a graph is captured");
    matmul_describe(c);
    int n = matmul_candidates(c, candidates), chosen = -1;
    for (int i = 0; i < n && chosen < 0 && c->mark; i++)
        if (matmul_mark(&candidates[i]) == c->mark) chosen = i;
    if (chosen < 0 && c->mark)
        fprintf(stderr,
                "warning: cuBLASLt no longer offers the algorithm noted for a product of N %lld, C %lld, OC %lld; "
                "another is chosen, "
                "and its results may differ in their last bits\n",
                (long long)c->shape.N, (long long)c->shape.C, (long long)c->shape.OC);
    if (chosen < 0 && !matmul.untimed) {
        chosen = matmul_trial(c, candidates, n, stream);
        matmul.timed++;
    }
    if (chosen < 0) chosen = 0;
    c->algorithm = candidates[chosen];
    c->mark = matmul_mark(&c->algorithm);
    c->ready = true;
}

static inline bool matmul_same(const MatmulShape* a, const MatmulShape* b) {
    return a->kind == b->kind && a->accumulate == b->accumulate && a->wide == b->wide && a->N == b->N && a->C == b->C &&
           a->OC == b->OC && a->ldy == b->ldy;
}

// the entry of a shape, a new one when there is none; valid until the next call
static inline MatmulChoice* matmul_entry(MatmulShape shape) {
    for (int i = 0; i < matmul.n; i++)
        if (matmul_same(&matmul.choices[i].shape, &shape)) return &matmul.choices[i];
    if (matmul.n == matmul.room) {
        matmul.room = matmul.room ? 2 * matmul.room : 64;
        matmul.choices = (MatmulChoice*)reallocate(matmul.choices, (size_t)matmul.room, sizeof *matmul.choices);
    }
    MatmulChoice* c = &matmul.choices[matmul.n++];
    memset(c, 0, sizeof *c);
    c->shape = shape;
    return c;
}

// makes the choice for a shape, if it is still to be made
static inline const MatmulChoice* matmul_choose(MatmulShape shape, cudaStream_t stream) {
    MatmulChoice* c = matmul_entry(shape);
    if (!c->ready) matmul_prepare(c, stream);
    return c;
}

// ---- launchers -------------------------------------------------------------------------------

static const char* const matmul_names[] = { "matmul_forward", "matmul_dx", "matmul_dw" };

// of both factors and the result, which is read too when it is added to
static inline double matmul_bytes(const MatmulShape* s) {
    const double x = (double)s->N * s->C, w = (double)s->OC * s->C, y = (double)s->N * s->OC;
    const double result = MATMUL_D(s->kind, x, w, y), factors = x + w + y - result;
    return factors * sizeof(floatX) + (s->accumulate ? 2 : 1) * result * (s->wide ? sizeof(float) : sizeof(floatX));
}

static inline void matmul_product_gpu(MatmulShape s, void* x, void* w, void* y, cudaStream_t stream) {
    const uintptr_t address = (uintptr_t)x | (uintptr_t)w | (uintptr_t)y;
    const int64_t bytes = sizeof(floatX);
    launch_require(s.N > 0 && s.C > 0 && s.OC > 0 && s.ldy >= s.OC, "matmul",
                   "sizes are positive and a row of y fits its stride");
    launch_require(address % MATMUL_ALIGN == 0 && s.C * bytes % MATMUL_ALIGN == 0 && s.ldy * bytes % MATMUL_ALIGN == 0,
                   "matmul", "matrices and their rows begin at multiples of 16 bytes (C and ldy multiples of 8)");
    const MatmulChoice* c = matmul_choose(s, stream);
    GpuOp op(matmul_names[s.kind], matmul_bytes(&s), 2.0 * s.N * s.C * s.OC, stream, s.N, s.C, s.OC);
    cublas_check(matmul_launch(c, &c->algorithm, x, w, y, stream));
#ifdef GPU_SYNC
    cuda_check(cudaStreamSynchronize(stream));
#endif
}

static inline MatmulShape matmul_shape(MatmulKind kind, bool accumulate, bool wide, int64_t N, int64_t C, int64_t OC,
                                       int64_t ldy) {
    MatmulShape s = { kind, accumulate, wide, N, C, OC, ldy };
    return s;
}

// overwrites y (N, OC), whose rows are ldy apart: part of a wider matrix, say. What lies between its rows stays as it is
static inline void matmul_forward(floatX* y, int64_t ldy, const floatX* x, const floatX* w, int64_t N, int C, int OC,
                                  cudaStream_t stream) {
    matmul_product_gpu(matmul_shape(MATMUL_FORWARD, false, false, N, C, OC, ldy), (void*)x, (void*)w, y, stream);
}

// overwrites dx (N, C), or adds to it
static inline void matmul_dx_strided(floatX* dx, const floatX* dy, int64_t ldy, const floatX* w, int64_t N, int C,
                                     int OC, bool accumulate, cudaStream_t stream) {
    matmul_product_gpu(matmul_shape(MATMUL_DX, accumulate, false, N, C, OC, ldy), dx, (void*)w, (void*)dy, stream);
}

static inline void matmul_dx(floatX* dx, const floatX* dy, const floatX* w, int64_t N, int C, int OC, bool accumulate,
                             cudaStream_t stream) {
    matmul_dx_strided(dx, dy, OC, w, N, C, OC, accumulate, stream);
}

// overwrites dw (OC, C), or adds to it
static inline void matmul_dw_strided(floatX* dw, const floatX* dy, int64_t ldy, const floatX* x, int64_t N, int C,
                                     int OC, bool accumulate, cudaStream_t stream) {
    matmul_product_gpu(matmul_shape(MATMUL_DW, accumulate, false, N, C, OC, ldy), (void*)x, dw, (void*)dy, stream);
}

static inline void matmul_dw(floatX* dw, const floatX* dy, const floatX* x, int64_t N, int C, int OC, bool accumulate,
                             cudaStream_t stream) {
    matmul_dw_strided(dw, dy, OC, x, N, C, OC, accumulate, stream);
}

// the same, not rounded: for sums over many calls
static inline void matmul_dw_fp32(float* dw, const floatX* dy, int64_t ldy, const floatX* x, int64_t N, int C, int OC,
                                  bool accumulate, cudaStream_t stream) {
    matmul_product_gpu(matmul_shape(MATMUL_DW, accumulate, DTYPE_X != DTYPE_F32, N, C, OC, ldy), (void*)x, dw,
                       (void*)dy, stream);
}

// ---- choices as text -------------------------------------------------------------------------
//
//     products of NVIDIA H200, cuBLASLt 130100, BF16
//     forward = BF16 N 16384 C 2048 OC 3072 ldy 3072: 59c0…, 267.3 us
//     dw += F32 N 2048 C 2048 OC 128256 ldy 128256: 8d1f…, 1650.0 us

enum { MATMUL_LINE = 256 }; // bytes of a line, at most

static inline void matmul_title(char* line) {
    struct cudaDeviceProp gpu;
    int device;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaGetDeviceProperties(&gpu, device));
    snprintf(line, MATMUL_LINE, "products of %.200s, cuBLASLt %zu, %s", gpu.name, cublasLtGetVersion(),
             DTYPE_X == DTYPE_BF16 ? "BF16"
             : matmul.tf32         ? "TF32"
                                   : "FP32");
}

static const char* const matmul_kind_names[] = { "forward", "dx", "dw" };

// all choices, those read and not yet used too; owned by the caller
static inline char* matmul_choices_write(void) {
    char* text = (char*)allocate((size_t)matmul.n + 1, MATMUL_LINE);
    size_t used = 0;
    matmul_title(text);
    used = strlen(text);
    text[used++] = '\n';
    for (int i = 0; i < matmul.n; i++) {
        const MatmulChoice* c = &matmul.choices[i];
        const MatmulShape* s = &c->shape;
        used +=
            (size_t)snprintf(text + used, MATMUL_LINE, "%s %s %s N %lld C %lld OC %lld ldy %lld: %016llx, %.1f us\n",
                             matmul_kind_names[s->kind], s->accumulate ? "+=" : "=",
                             s->wide ? "F32" : dtype_name(DTYPE_X), (long long)s->N, (long long)s->C, (long long)s->OC,
                             (long long)s->ldy, (unsigned long long)c->mark, (double)c->us);
    }
    return text;
}

// a line of matmul_choices_write; false when it is something else
static inline bool matmul_choice_parse(MatmulChoice* c, const char* line) {
    char kind[8], add[3], type[5];
    long long N, C, OC, ldy;
    unsigned long long mark;
    float us;
    memset(c, 0, sizeof *c);
    if (sscanf(line, "%7s %2s %4s N %18lld C %18lld OC %18lld ldy %18lld: %16llx, %f us", kind, add, type, &N, &C, &OC,
               &ldy, &mark, &us) != 9 ||
        N < 1 || C < 1 || OC < 1 || ldy < OC)
        return false;
    bool wide = strcmp(type, dtype_name(DTYPE_X)) != 0, accumulate = strcmp(add, "+=") == 0;
    for (int k = MATMUL_FORWARD; k <= MATMUL_DW; k++) {
        if (strcmp(kind, matmul_kind_names[k]) != 0) continue;
        c->shape = matmul_shape((MatmulKind)k, accumulate, wide, N, C, OC, ldy);
        c->mark = mark, c->us = us;
        return true;
    }
    return false;
}

// takes over choices of shapes that have none yet; returns how many. None from another GPU, library or build, and lines that
// are not understood are left out
static inline int matmul_choices_read(const char* text) {
    char title[MATMUL_LINE], line[MATMUL_LINE];
    int taken = 0;
    matmul_title(title);
    if (strncmp(text, title, strlen(title)) != 0 || text[strlen(title)] != '\n') return 0;
    for (const char* end; (end = strchr(text, '\n')) && matmul.n < MATMUL_MOST; text = end + 1) {
        MatmulChoice parsed;
        if (end - text >= MATMUL_LINE) continue;
        snprintf(line, sizeof line, "%.*s", (int)(end - text), text);
        if (!matmul_choice_parse(&parsed, line)) continue;
        MatmulChoice* c = matmul_entry(parsed.shape);
        if (c->mark) continue;
        *c = parsed;
        taken++;
    }
    return taken;
}

// ---- the user's cache ------------------------------------------------------------------------

// llama3.c/products-of-….txt in $XDG_CACHE_HOME, else in ~/.cache; makes the folder
static inline bool matmul_cache_path(char* path, Error* err) {
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char folder[PATH_SIZE], title[MATMUL_LINE], name[MATMUL_LINE + 8];
    const bool named = cache && cache[0] == '/';
    if (!named && (!home || home[0] != '/')) return set_error(err, "HOME is not set");
    if (snprintf(folder, sizeof folder, "%s%s/llama3.c", named ? cache : home, named ? "" : "/.cache") >= PATH_SIZE)
        return set_error(err, "path too long: %.100s…", folder);
    matmul_title(title);
    for (char* p = title; *p; p++)
        if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", *p)) *p = '-';
    snprintf(name, sizeof name, "%s.txt", title);
    return make_folders(folder, err) && path_join(path, folder, name, err);
}

// takes over what earlier runs chose; a cache that is not there or cannot be read costs the time of choosing, no more
static inline void matmul_cache_read(void) {
    char path[PATH_SIZE], *text;
    size_t n;
    Error ignored;
    if (!matmul_cache_path(path, &ignored) || !read_file(path, &text, &n, 1 << 20, &ignored)) return;
    matmul_choices_read(text);
    free(text);
}

// keeps what was chosen since
static inline void matmul_cache_write(void) {
    char path[PATH_SIZE];
    Error ignored;
    if (!matmul.timed || !matmul_cache_path(path, &ignored)) return;
    char* text = matmul_choices_write();
    if (write_file(path, text, strlen(text), &ignored)) matmul.timed = 0;
    free(text);
}
