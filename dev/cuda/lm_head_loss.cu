/*
lm_head and loss, forward and backward: how much memory the logits may have, and what it costs to give them less.

    l = x · w^T,  loss and dl as in cross_entropy.cu,  dx = dl · w,  dw += dl^T · x        x (N, C)    w (V, C)

Counted         6 * N * V * C FLOPs: N 8192, V 128256, C 2048 are 12.9 TFLOP, 19 ms at the 674 TFLOP/s of such a product on an
                H200. The logits are read and written once beside that, 1 ms. "% of peak" is beside the row "whole", which
                has no other overhead than that
Memory          beyond x, w, dx, dw and the losses: the logits of a chunk of rows, rows * Vp numbers, and with dw32 the sum of
                the chunks' parts of dw in fp32, 4 * V * C bytes. Printed above each table of bf16, with the error of dw when
                it is rounded to bf16 after each chunk and when it is rounded once
Rows            in the column of block sizes. A chunk must be large: each reads w twice and reads and writes dw, and a product
                of few rows does not fill 132 multiprocessors. dx = dl · w has rows / 128 * C / 256 tiles: 64 for 1024 rows of
                2048
Reached         on an H200, ms, with the best number of rows; MB beyond x, w, dx, dw and the losses

                                    1B                          8B
                    whole        20.20, 2101 MB              40.39, 2101 MB     spread 27 % and 19 %
                    chunks       19.04,  525 MB              40.33,  263 MB
                    chunks_fp32  20.91, 1576 MB              39.16, 3152 MB
                    two_streams  19.01, 1051 MB              38.80, 1051 MB     chunks of 2048 rows, the logits of two of them
                    production   19.04,  525 MB              38.28,  525 MB     678 and 675 TFLOP/s

                torch.compile in the same call: 18.78 and 37.44 ms, 0.99 and 0.98 x production; torch eager 29.2 and 46.3.
                The card's clock is all the difference: of production, 19.0 to 19.7 and 37.7 to 38.3 in three runs
ncu             8B, all kernels: 48 GB read and written under whole, 45 under chunks and two_streams, 38 under production; in the
                products the tensor cores work 99 % of the time, and nothing else matters (results/nvidia-h200/lm_head_loss.md)
Error of dw     root mean square, 1B and 8B: 1.23e-3 and 1.12e-3 when the sum is fp32 and is rounded once; rounded after each
                chunk 1.48e-3 and 1.31e-3 with 2048 rows, as production, 1.51e-3 and 1.33e-3 with 1024
*/
#define YARDSTICK "whole"
#include "bench.cuh"
#include "llmc/cross_entropy.h"
#include "llmc/matmul_cublas.cuh"

// ---- the problem -----------------------------------------------------------------------------

enum { ALL_ROWS = 8192 }; // of the real shapes. Small ones are cut into as many chunks

struct Problem {
    int N, C, V, ld;
    float scale;
    const floatX *x, *w;
    const int32_t* labels;
    float* losses;
    floatX *dx, *dw;
    floatX* logits; // for all rows, of which a variant takes what it is allowed
    float* dw32;    // (V, C)
};

static const Shape shapes[] = {
    { .name = "1B", .N = ALL_ROWS, .C = 2048, .V = 128256 },
    { .name = "8B", .N = ALL_ROWS, .C = 4096, .V = 128256 },
    { .name = "one row", .small = true, .N = 1, .C = 64, .V = 261 },
    { .name = "odd", .small = true, .N = 40, .C = 64, .V = 261 },
    { .name = "a rest", .small = true, .N = 300, .C = 96, .V = 1000 },
    { .name = "wide", .small = true, .N = 17, .C = 64, .V = 32003 },
};

// rows of a chunk; `most` of ALL_ROWS
static int chunk_rows(const Problem* p, int most) { return (int)ceil_div((int64_t)p->N * most, ALL_ROWS); }

// ---- what the ways cost, printed -------------------------------------------------------------

static __global__ void error_kernel(double* sums, const floatX* x, const float* exact, size_t n) {
    double error = 0, size = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        const double d = (double)to_float(x[i]) - (double)exact[i];
        error += d * d, size += (double)exact[i] * (double)exact[i];
    }
    atomicAdd(&sums[0], error), atomicAdd(&sums[1], size);
}

// root mean square of the difference over that of `exact`
static double error_of(const floatX* x, const float* exact, size_t n, cudaStream_t stream) {
    double *sums, host[2];
    cuda_check(cudaMalloc(&sums, sizeof host));
    cuda_check(cudaMemsetAsync(sums, 0, sizeof host, stream));
    error_kernel<<<(unsigned)(8 * gpu_processors()), 256, 0, stream>>>(sums, x, exact, n);
    launch_check();
    cuda_check(cudaMemcpyAsync(host, sums, sizeof host, cudaMemcpyDeviceToHost, stream));
    cuda_check(cudaStreamSynchronize(stream));
    cuda_check(cudaFree(sums));
    return sqrt(host[0] / host[1]);
}

static void print_costs(Bench* b, const Problem* p) {
    const size_t n = (size_t)p->V * p->C;
    floatX* dw = b->scratch<floatX>(n);
    printf("\n     rows   MB beyond inputs and gradients   error of dw, rounded to bf16     (all: root mean square, to "
           "fp32)\n");
    printf("                with dw32     without        once   after each chunk\n");
    for (int rows = 1024; rows <= p->N; rows *= 2) {
        double error[2];
        for (int each = 0; each < 2; each++) { // the fp32 sums of the first are what both are compared with
            cuda_check(cudaMemsetAsync(dw, 0, n * sizeof *dw, b->stream));
            lm_head_loss(p->losses, p->dx, dw, p->x, p->w, p->labels, p->scale, p->N, p->C, p->V, rows, p->logits,
                         each ? NULL : p->dw32, b->stream);
            error[each] = error_of(dw, p->dw32, n, b->stream);
        }
        const double logits = (double)rows * p->ld * sizeof(floatX) * 1e-6;
        printf("     %4d     %10.0f  %10.0f    %.2e           %.2e\n", rows, logits + (double)n * 4e-6, logits,
               error[0], error[1]);
    }
    fflush(stdout);
}

static Problem setup(Bench* b, const Shape* s) {
    Problem p = {};
    p.N = s->N, p.C = s->C, p.V = s->V, p.ld = lm_head_stride(s->V);
    p.scale = 1 / (float)s->N;
    const size_t nx = (size_t)p.N * p.C, nw = (size_t)p.V * p.C;
    std::vector<int32_t> labels((size_t)p.N);
    for (int n = 0; n < p.N; n++)
        labels[n] = n % 7 == 3 && s->small ? IGNORED_LABEL : (int32_t)(random_bits(9, 0, (uint64_t)n) % (uint64_t)p.V);
    p.x = b->input<floatX>("x", nx);
    p.w = b->input<floatX>("w", nw, 1 / sqrtf((float)p.C));
    p.labels = b->input_from("labels", labels.data(), labels.size());
    p.losses = b->output<float>("losses", (size_t)p.N, p.C, 1); // the logits are rounded
    p.dx = b->output<floatX>("dx", nx, p.V, 2);                 // the logits and their gradient
    p.dw = b->in_place<floatX>("dw", nw, p.scale, p.N, 0, 2);   // the same
    p.logits = b->scratch<floatX>((size_t)p.N * p.ld);
    p.dw32 = b->scratch<float>(nw);
    if (!s->small && sizeof(floatX) == 2) print_costs(b, &p);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }
static double traffic(const Problem* p) {
    return ((double)p->N * p->V * 2 + (double)p->V * p->C * 3 + (double)p->N * p->C * 2) * sizeof(floatX);
}
static double flops(const Problem* p) { return 6.0 * p->N * p->V * p->C; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const int32_t* labels = b->host_ids(p->labels);
    const size_t nw = (size_t)p->V * p->C;
    const Tensor w = { (void*)b->host(p->w), DTYPE_F32 };
    std::vector<float> dx((size_t)p->C), scratch(lm_head_scratch(p->V));
    for (int64_t n = first; n < first + count; n++) {
        const float* x = b->host(p->x, (size_t)n * p->C, p->C);
        const double loss =
            lm_head_loss_cpu(dx.data(), NULL, x, w, labels + n, p->scale, 1, p->C, p->V, scratch.data());
        b->expect(p->losses, (size_t)n, &loss, 1);
        b->expect(p->dx, (size_t)n * p->C, dx.data(), p->C);
    }
    if (first != 0 || count != p->N) return;
    std::vector<float> dw(b->host(p->dw), b->host(p->dw) + nw);
    lm_head_loss_cpu(NULL, dw.data(), b->host(p->x), w, labels, p->scale, p->N, p->C, p->V, scratch.data());
    b->expect(p->dw, 0, dw.data(), nw);
}

// ---- whole -----------------------------------------------------------------------------------
// idea    the logits of all rows at once: the largest products, each of them once
// limit   2.1 GB for 8192 rows, more than all that a layer of the model keeps; and with every further sequence as much again

static void whole(const Problem* p, int, cudaStream_t stream) {
    lm_head_loss(p->losses, p->dx, p->dw, p->x, p->w, p->labels, p->scale, p->N, p->C, p->V, p->N, p->logits, NULL,
                 stream);
}

// ---- chunks ----------------------------------------------------------------------------------
// idea    a chunk of rows at a time, from the logits to dx and dw; then its logits are forgotten
// limit   dw is added to once for each chunk, and rounded each time; small chunks leave multiprocessors idle in dx = dl · w

static void chunks(const Problem* p, int most, cudaStream_t stream) {
    lm_head_loss(p->losses, p->dx, p->dw, p->x, p->w, p->labels, p->scale, p->N, p->C, p->V, chunk_rows(p, most),
                 p->logits, NULL, stream);
}

// ---- chunks_fp32 -----------------------------------------------------------------------------
// idea    the chunks' parts of dw are summed in fp32, and rounded once at the end
// limit   an array of 4 * V * C bytes, 1.05 GB, twice as much as dw itself, that each chunk reads and writes

static void chunks_fp32(const Problem* p, int most, cudaStream_t stream) {
    lm_head_loss(p->losses, p->dx, p->dw, p->x, p->w, p->labels, p->scale, p->N, p->C, p->V, chunk_rows(p, most),
                 p->logits, p->dw32, stream);
}

// ---- two_streams -----------------------------------------------------------------------------
// idea    products wait for FLOPs and the loss for memory: the loss of a chunk runs in a second stream, beside the logits of
//         the next chunk and the gradients of the one before. Two chunks have logits
// limit   a product takes all shared memory of a multiprocessor: the loss runs where one has just ended, and what it takes of
//         the memory's pipes the product misses

static void two_streams(const Problem* p, int most, cudaStream_t stream) {
    static cudaStream_t second;
    static cudaEvent_t made, lost[2];
    if (!second) {
        cuda_check(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
        cuda_check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
        for (int i = 0; i < 2; i++) cuda_check(cudaEventCreateWithFlags(&lost[i], cudaEventDisableTiming));
    }
    const int rows = chunk_rows(p, most), count = (int)ceil_div(p->N, rows);
    const auto logits_of = [&](int i) { return p->logits + (size_t)(i % 2) * rows * p->ld; };
    const auto rows_of = [&](int i) { return std::min(rows, p->N - i * rows); };
    const auto make = [&](int i) { // the logits and, in the second stream, the loss
        const int start = i * rows;
        matmul_forward(logits_of(i), p->ld, p->x + (size_t)start * p->C, p->w, rows_of(i), p->C, p->V, stream);
        cuda_check(cudaEventRecord(made, stream));
        cuda_check(cudaStreamWaitEvent(second, made, 0));
        cross_entropy(p->losses + start, logits_of(i), p->labels + start, p->scale, true, rows_of(i), p->V, p->ld,
                      second);
        cuda_check(cudaEventRecord(lost[i % 2], second));
    };
    make(0);
    for (int i = 0; i < count; i++) {
        const size_t start = (size_t)i * rows;
        if (i + 1 < count) make(i + 1);
        cuda_check(cudaStreamWaitEvent(stream, lost[i % 2], 0));
        matmul_dw_strided(p->dw, logits_of(i), p->ld, p->x + start * p->C, rows_of(i), p->C, p->V, true, stream);
        matmul_dx_strided(p->dx + start * p->C, logits_of(i), p->ld, p->w, rows_of(i), p->C, p->V, false, stream);
    }
}

// two chunks of the logits of all rows
static const char* two_streams_refuses(const Problem* p) { return p->N < 2 ? "one row is one chunk" : NULL; }

// ---- the table: to add a variant, write it above and add one row ------------------------------

// as train_llama3.cu: 512 MiB of logits
static void production(const Problem* p, int, cudaStream_t stream) {
    const int64_t most = ((int64_t)1 << 29) / (p->ld * (int64_t)sizeof(floatX)) / 128 * 128;
    lm_head_loss(p->losses, p->dx, p->dw, p->x, p->w, p->labels, p->scale, p->N, p->C, p->V,
                 (int)std::min<int64_t>(most, p->N), p->logits, NULL, stream);
}

// clang-format off
static const Variant<Problem> variants[] = {
//    name            launch        rows of a chunk         what changed
    { "whole",        whole,        { 0 },                  "baseline: the logits of all rows, 2.1 GB" },
    { "chunks",       chunks,       { 1024, 2048, 4096 },   "rows in chunks; dw rounded after each" },
    { "chunks_fp32",  chunks_fp32,  { 1024, 2048, 4096 },   "dw summed in fp32: 1.05 GB more" },
    { "two_streams",  two_streams,  { 1024, 2048 },         "the loss beside the products; logits of two chunks", two_streams_refuses },
    { "production",   production,   { 0 },                  "llmc/cross_entropy.h, chunks of 512 MiB, as train_llama3.cu" },
};
// clang-format on
BENCH_MAIN("lm_head_loss", shapes, setup, reference, rows, traffic, flops, variants)
