/*
lm_head and loss in chunks on the GPU against the CPU, and what the two ways to add the chunks' weight gradients cost in
accuracy.

Tolerance: logits are stored in floatX, so that one of size l is wrong by up to l roundings of 1 (see gpu_test.cuh), and its
power by that fraction; to these come the gradient of the logits, the result and each chunk, rounded once. l is at most 6 here.
*/
#pragma once

#include "gpu_test.cuh"
#include "llmc/cross_entropy.h"

typedef struct {
    int N, C, V, rows;
} LmHeadTestShape;

// chunks of all rows, of equal size, with a rest
static const LmHeadTestShape lm_head_test_shapes[] = {
    { 1, 64, 261, 64 }, { 40, 64, 261, 16 }, { 300, 96, 1000, 128 }, { 100, 128, 32003, 50 }, { 17, 64, 128256, 17 },
};

static int32_t* lm_head_test_labels(int N, int V) {
    int32_t* labels = (int32_t*)allocate((size_t)N, sizeof *labels);
    for (int n = 0; n < N; n++)
        labels[n] = n % 7 == 3 ? IGNORED_LABEL : (int32_t)(random_bits(9, 0, (uint64_t)n) % (uint64_t)V);
    return labels;
}

static GpuArray lm_head_test_zeros(size_t n) {
    GpuArray a = gpu_poison(n);
    cuda_check(cudaMemset(a.x, 0, n * sizeof(floatX)));
    return a;
}

static void lm_head_test_shape(LmHeadTestShape s, bool wide) {
    const float scale = 1.0f / 64;
    const size_t nx = (size_t)s.N * s.C, nw = (size_t)s.V * s.C;
    const double chunks = (double)ceil_div(s.N, s.rows), logit = 6;
    GpuArray x = gpu_random(nx, 1, 1), w = gpu_random(nw, 2, 1 / sqrtf((float)s.C));
    GpuArray dx = gpu_poison(nx), dw = gpu_random(nw, 3, scale);
    GpuArray logits = gpu_poison((size_t)s.rows * lm_head_stride(s.V));
    GpuFloats losses = gpu_poison_floats((size_t)s.N), dw32 = gpu_poison_floats(wide ? nw : 8);
    int32_t* host_labels = lm_head_test_labels(s.N, s.V);
    GpuInts labels = gpu_upload_ints(host_labels, (size_t)s.N);

    float *want_losses = (float*)allocate((size_t)s.N, sizeof(float)), *want_dx = (float*)allocate(nx, sizeof(float)),
          *want_dw = (float*)allocate(nw, sizeof(float)),
          *scratch = (float*)allocate(lm_head_scratch(s.V), sizeof(float));
    memcpy(want_dw, dw.host, nw * sizeof(float));
    Tensor weight = { w.host, DTYPE_F32 };
    for (int n = 0; n < s.N; n++) // one row at a time, for the loss of each
        want_losses[n] = (float)lm_head_loss_cpu(want_dx + (size_t)n * s.C, NULL, x.host + (size_t)n * s.C, weight,
                                                 host_labels + n, scale, 1, s.C, s.V, scratch);
    lm_head_loss_cpu(NULL, want_dw, x.host, weight, host_labels, scale, s.N, s.C, s.V, scratch);

    lm_head_loss(losses.x, NULL, NULL, x.x, w.x, labels.x, scale, s.N, s.C, s.V, s.rows, logits.x, NULL, 0);
    gpu_check("lm_head loss alone", losses, want_losses, (size_t)s.N, gpu_tolerance(2));
    gpu_check_unchanged("lm_head without backward", dw);
    lm_head_loss(losses.x, dx.x, dw.x, x.x, w.x, labels.x, scale, s.N, s.C, s.V, s.rows, logits.x, wide ? dw32.x : NULL,
                 0);
    gpu_check("lm_head loss", losses, want_losses, (size_t)s.N, gpu_tolerance(2));
    gpu_check("lm_head dx", dx, want_dx, nx, gpu_tolerance(2 + logit));
    gpu_check("lm_head dw", dw, want_dw, nw, gpu_tolerance(2 + logit + chunks));
    lm_head_loss(losses.x, x.x, dw.x, x.x, w.x, labels.x, scale, s.N, s.C, s.V, s.rows, logits.x, wide ? dw32.x : NULL,
                 0);
    gpu_check_same("lm_head dx in place of x", dx, x);
    free(host_labels), free(want_losses), free(want_dx), free(want_dw), free(scratch);
    gpu_free(&x), gpu_free(&w), gpu_free(&dx), gpu_free(&dw), gpu_free(&logits), gpu_free(&losses), gpu_free(&dw32);
    gpu_free(&labels);
}

// root mean square of the difference, over that of want
static double lm_head_test_error(const GpuArray* dw, const float* want) {
    float* got = gpu_read(dw, 0, dw->n);
    double error = 0, size = 0;
    for (size_t i = 0; i < dw->n; i++) {
        double difference = (double)got[i] - (double)want[i];
        error += difference * difference, size += (double)want[i] * (double)want[i];
    }
    free(got);
    return sqrt(error / size);
}

// prints the error of dw beside a sum of the same parts that stays in fp32: rounded once, and rounded at every chunk
static void lm_head_test_accumulation(void) {
    const int N = 1024, C = 128, V = 4000;
    const size_t nw = (size_t)V * C;
    GpuArray x = gpu_random((size_t)N * C, 1, 1), w = gpu_random(nw, 2, 0.1f), dx = gpu_poison((size_t)N * C);
    GpuArray logits = gpu_poison((size_t)N * lm_head_stride(V));
    GpuFloats losses = gpu_poison_floats((size_t)N), dw32 = gpu_poison_floats(nw);
    int32_t* host_labels = lm_head_test_labels(N, V);
    GpuInts labels = gpu_upload_ints(host_labels, (size_t)N);
    for (int chunks = 1; chunks <= 16; chunks *= 2) {
        const int rows = N / chunks;
        GpuArray once = lm_head_test_zeros(nw), each = lm_head_test_zeros(nw);
        lm_head_loss(losses.x, dx.x, once.x, x.x, w.x, labels.x, 1, N, C, V, rows, logits.x, dw32.x, 0);
        lm_head_loss(losses.x, dx.x, each.x, x.x, w.x, labels.x, 1, N, C, V, rows, logits.x, NULL, 0);
        float* exact = gpu_read(&dw32, 0, nw);
        double error_once = lm_head_test_error(&once, exact), error_each = lm_head_test_error(&each, exact);
        printf("     lm_head dw in %2d chunks: error %.2e in fp32, %.2e rounded at each chunk\n", chunks, error_once,
               error_each);
        gpu_expect(error_once < FLOATX_EPS, "lm_head dw in fp32 is rounded once: error %.3g", error_once);
        gpu_expect(error_each < FLOATX_EPS * sqrt(1.0 + chunks) + 1e-6, "lm_head dw: error %.3g", error_each);
        free(exact), gpu_free(&once), gpu_free(&each);
    }
    free(host_labels), gpu_free(&x), gpu_free(&w), gpu_free(&dx), gpu_free(&logits), gpu_free(&losses), gpu_free(&dw32);
    gpu_free(&labels);
}

static void test_lm_head(void) {
    for (size_t i = 0; i < sizeof lm_head_test_shapes / sizeof *lm_head_test_shapes; i++) {
        lm_head_test_shape(lm_head_test_shapes[i], false);
        lm_head_test_shape(lm_head_test_shapes[i], true);
    }
    lm_head_test_accumulation();
    matmul_free();
}
