/*
Cross-entropy on the GPU against the CPU: every number of blocks that share a row, and the kernel without; V that is no
multiple of 8; ignored labels; numbers so large that a power overflows; NaN; an index beyond 2^31.

Tolerance: the loss, and the gradient when floatX is float, 1e-5: powers and sums in fp32. A gradient in bf16 is rounded once.
It is compared twice, once without the label, whose number is so much larger than the others that it would hide them.
*/
#pragma once

#include "gpu_test.cuh"
#include "llmc/cross_entropy.h"

typedef struct {
    int N, V, ld;
} CrossEntropyTestShape;

// of bf16, the registers of one block hold 32768 columns; longer rows are the ring's on Hopper, up to 2^19, and elsewhere those
// of up to eight blocks or of none; of float half of that. 150 rows are more than there are clusters
static const CrossEntropyTestShape cross_entropy_test_shapes[] = {
    { 3, 1, 8 },         { 5, 7, 8 },         { 40, 261, 320 },      { 7, 2048, 2048 },     { 6, 32003, 32064 },
    { 6, 32768, 32768 }, { 5, 40001, 40064 }, { 6, 128256, 128256 }, { 4, 150000, 150016 }, { 3, 300007, 300032 },
    { 1, 128256, 128256 }, { 150, 70003, 70016 }, { 3, 600007, 600064 },
};

// labels at the ends, an ignored one, others anywhere
static int32_t* cross_entropy_test_labels(int N, int V) {
    int32_t* labels = (int32_t*)allocate((size_t)N, sizeof *labels);
    for (int n = 0; n < N; n++) labels[n] = (int32_t)(random_bits(9, 0, (uint64_t)n) % (uint64_t)V);
    labels[0] = V - 1;
    if (N > 1) labels[1] = 0;
    for (int n = 2; n < N; n += 33) labels[n] = IGNORED_LABEL; // of 66 clusters, all rows of one
    return labels;
}

// rows first .. first+N-1 of the gradient: with the label's number, and without
static void cross_entropy_test_gradient(const GpuArray* logits, float* want, const int32_t* labels, size_t first, int N,
                                        int V, int ld) {
    for (int n = 0; n < N; n++) {
        float *got = gpu_read(logits, (first + n) * ld, (size_t)V), *expected = want + (size_t)n * ld;
        gpu_check_values("cross_entropy gradient", got, expected, (size_t)V, gpu_tolerance(1.1));
        if (labels[n] != IGNORED_LABEL) got[labels[n]] = expected[labels[n]] = 0;
        if (V > 1)
            gpu_check_values("cross_entropy gradient beside the label", got, expected, (size_t)V, gpu_tolerance(1.1));
        free(got);
    }
}

static void cross_entropy_test_shape(CrossEntropyTestShape s) {
    const float scale = 1.0f / 37;
    const size_t numbers = (size_t)s.N * s.ld;
    float *values = (float*)allocate(numbers, sizeof(float)), *losses = (float*)allocate((size_t)s.N, sizeof(float));
    for (size_t i = 0; i < numbers; i++) // columns beyond V would outweigh all others
        values[i] = (int)(i % s.ld) < s.V ? 3 * random_normal(1, 0, i) : 60;
    int32_t* host_labels = cross_entropy_test_labels(s.N, s.V);
    GpuArray logits = gpu_upload(values, numbers), again = gpu_upload(values, numbers);
    GpuFloats got = gpu_poison_floats((size_t)s.N), got_again = gpu_poison_floats((size_t)s.N);
    GpuInts labels = gpu_upload_ints(host_labels, (size_t)s.N);
    memcpy(values, logits.host, numbers * sizeof *values);
    cross_entropy_cpu(losses, values, host_labels, scale, true, s.N, s.V, s.ld);

    cross_entropy(got.x, logits.x, labels.x, scale, false, s.N, s.V, s.ld, 0);
    gpu_check("cross_entropy loss alone", got, losses, (size_t)s.N, 1e-5);
    gpu_check_unchanged("cross_entropy without backward", logits);
    cross_entropy(got.x, logits.x, labels.x, scale, true, s.N, s.V, s.ld, 0);
    cross_entropy(got_again.x, again.x, labels.x, scale, true, s.N, s.V, s.ld, 0);
    gpu_check("cross_entropy loss", got, losses, (size_t)s.N, 1e-5);
    gpu_check_same("cross_entropy loss, again", got, got_again);
    gpu_check_same("cross_entropy gradient, again", logits, again);
    cross_entropy_test_gradient(&logits, values, host_labels, 0, s.N, s.V, s.ld);

    int touched = (s.V + PACK - 1) / PACK * PACK, wrong = 0;
    float* last = gpu_read(&logits, numbers - s.ld, (size_t)s.ld);
    for (int v = s.V; v < s.ld; v++) wrong += last[v] != (v < touched ? 0 : 60);
    gpu_expect(wrong == 0, "cross_entropy: %d of the columns beyond V", wrong);
    free(values), free(losses), free(host_labels), free(last);
    gpu_free(&logits), gpu_free(&again), gpu_free(&got), gpu_free(&got_again), gpu_free(&labels);
}

// a gradient of p - 1 with p near 1, which has no right digit if p is rounded to bf16 first
static void cross_entropy_test_sure(void) {
    enum { V = 64 };
    float values[V] = { 0 }, want[V], loss;
    const int32_t label = 5;
    values[label] = 12;
    GpuArray logits = gpu_upload(values, V);
    GpuFloats losses = gpu_poison_floats(1);
    GpuInts labels = gpu_upload_ints(&label, 1);
    memcpy(want, values, sizeof want);
    cross_entropy_cpu(&loss, want, &label, 1, true, 1, V, V);
    cross_entropy(losses.x, logits.x, labels.x, 1, true, 1, V, V, 0);
    gpu_check("cross_entropy, a sure one", losses, &loss, 1, 1e-3); // 4e-4 is the logarithm of a sum of 1.0004
    float* got = gpu_read(&logits, 0, V);
    gpu_expect(want[label] < -1e-4f && fabsf(got[label] / want[label] - 1) < 6e-3f,
               "cross_entropy: p - 1 is %g, expected %g", (double)got[label], (double)want[label]);
    free(got), gpu_free(&logits), gpu_free(&losses), gpu_free(&labels);
}

// as test_cross_entropy_huge does for the CPU, in a small row and in one that blocks share
static void cross_entropy_test_huge(int V) {
    const int32_t host_labels[] = { V - 3, 5, V - 3, 2 };
    float* values = (float*)allocate((size_t)4 * V, sizeof(float));
    for (int i = 0; i < 4 * V; i++) values[i] = random_normal(1, 0, (uint64_t)i);
    values[V - 3] = values[V + V - 3] = 1e30f;
    for (int v = 0; v < V; v++) values[2 * V + v] = v == V - 3 ? -1e30f : -3e38f;
    values[3 * V + 50] = NAN;
    GpuArray logits = gpu_upload(values, (size_t)4 * V);
    GpuFloats losses = gpu_poison_floats(4);
    GpuInts labels = gpu_upload_ints(host_labels, 4);
    cross_entropy(losses.x, logits.x, labels.x, 1, true, 4, V, V, 0);
    float *l = gpu_read(&losses, 0, 4), *d = gpu_read(&logits, 0, (size_t)4 * V);
    gpu_expect(l[0] == 0 && l[1] > 0.99e30f && l[1] < 1.01e30f && l[2] == 0 && isnan(l[3]),
               "cross_entropy of huge logits: %g %g %g %g", (double)l[0], (double)l[1], (double)l[2], (double)l[3]);
    int wrong = 0;
    for (int v = 0; v < V; v++) {
        wrong += d[v] != 0 || d[2 * V + v] != 0 || d[V + v] != (v == V - 3) - (v == 5);
        wrong += !isnan(d[3 * V + v]);
    }
    gpu_expect(wrong == 0, "cross_entropy of huge logits: %d wrong in the gradient", wrong);
    free(values), free(l), free(d), gpu_free(&logits), gpu_free(&losses), gpu_free(&labels);
}

// the last rows lie beyond index 2^31
static void cross_entropy_test_large(void) {
    const int N = 17000, V = 128256, rows[] = { 0, 8191, 16743, 16744, 16999 };
    const size_t numbers = (size_t)N * V;
    if (gpu_reduced || !gpu_has_room("cross_entropy beyond 2^31", numbers * sizeof(floatX))) return;
    GpuArray logits = gpu_poison(numbers);
    GpuFloats losses = gpu_poison_floats((size_t)N);
    int32_t* host_labels = cross_entropy_test_labels(N, V);
    GpuInts labels = gpu_upload_ints(host_labels, (size_t)N);
    float* before[5];
    gpu_fill(&logits, 0, numbers, 1, 3);
    for (int i = 0; i < 5; i++) before[i] = gpu_read(&logits, (size_t)rows[i] * V, (size_t)V);
    cross_entropy(losses.x, logits.x, labels.x, 1, true, N, V, V, 0);
    for (int i = 0; i < 5; i++) {
        float want;
        cross_entropy_cpu(&want, before[i], &host_labels[rows[i]], 1, true, 1, V, V);
        gpu_check_at("cross_entropy loss beyond 2^31", losses, (size_t)rows[i], &want, 1, 1e-5);
        cross_entropy_test_gradient(&logits, before[i], &host_labels[rows[i]], (size_t)rows[i], 1, V, V);
        free(before[i]);
    }
    free(host_labels), gpu_free(&logits), gpu_free(&losses), gpu_free(&labels);
}

static void test_cross_entropy(void) {
    for (size_t i = 0; i < sizeof cross_entropy_test_shapes / sizeof *cross_entropy_test_shapes; i++)
        cross_entropy_test_shape(cross_entropy_test_shapes[i]);
    cross_entropy_test_sure();
    cross_entropy_test_huge(104);
    cross_entropy_test_huge(128256);
    cross_entropy_test_large();
}
