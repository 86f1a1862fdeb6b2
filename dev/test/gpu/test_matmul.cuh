/*
Matrix products on the GPU: the three products in every form against the CPU, NaN, two runs bit for bit, and the choices of
algorithms written as text and read again.

Tolerance: one rounding at the store, and the order of the sums. check.h measures errors against the largest number of the
array, which is some 4 standard deviations; sums in fp32 over up to 6000 terms add less than a tenth of a rounding to bf16.
*/
#pragma once

#include "gpu_test.cuh"
#include "llmc/matmul.h"

typedef struct {
    int N, C, OC, ldy;
} MatmulTestShape;

// odd numbers of rows everywhere; C and ldy are multiples of 8
static const MatmulTestShape matmul_test_shapes[] = {
    { 1, 8, 8, 8 },         { 1, 128, 320, 320 },      { 3, 64, 261, 320 },       { 127, 72, 40, 56 },
    { 500, 288, 864, 864 }, { 1031, 512, 1376, 1376 }, { 257, 96, 32003, 32064 }, { 6000, 64, 200, 200 },
};

// of fp32 results: tensor cores cut their sums off where others round, a bit of 2^-24 for each 16 terms, all in one direction
static const double MATMUL_WIDE_EPS = sizeof(floatX) == 2 ? 1e-4 : 1e-5;

static Tensor matmul_test_tensor(float* data) {
    Tensor t = { data, DTYPE_F32 };
    return t;
}

// rows of ldy numbers, of which OC count
static float* matmul_test_pack(const float* y, int N, int OC, int ldy) {
    float* packed = (float*)allocate((size_t)N * OC, sizeof(float));
    for (int n = 0; n < N; n++) memcpy(packed + (size_t)n * OC, y + (size_t)n * ldy, (size_t)OC * sizeof(float));
    return packed;
}

static void matmul_test_forward(MatmulTestShape s) {
    size_t numbers = (size_t)s.N * s.ldy;
    GpuArray x = gpu_random((size_t)s.N * s.C, 1, 1), w = gpu_random((size_t)s.OC * s.C, 2, 0.1f),
             y = gpu_poison(numbers);
    float* want = (float*)allocate((size_t)s.N * s.OC, sizeof(float));
    matmul_forward(y.x, s.ldy, x.x, w.x, s.N, s.C, s.OC, 0);
    matmul_forward_cpu(want, s.OC, x.host, matmul_test_tensor(w.host), s.N, s.C, s.OC);
    float *got = gpu_read(&y, 0, numbers), *packed = matmul_test_pack(got, s.N, s.OC, s.ldy);
    gpu_check_values("matmul forward", packed, want, (size_t)s.N * s.OC, gpu_tolerance(1.1));
    size_t written = 0;
    for (int n = 0; n < s.N; n++)
        for (int o = s.OC; o < s.ldy; o++) written += !isnan(got[(size_t)n * s.ldy + o]);
    gpu_expect(written == 0, "matmul forward: %zu numbers between the rows were written", written);
    free(want), free(got), free(packed), gpu_free(&x), gpu_free(&w), gpu_free(&y);
}

// dx and dw, overwriting and adding
static void matmul_test_backward(MatmulTestShape s) {
    size_t nx = (size_t)s.N * s.C, nw = (size_t)s.OC * s.C;
    GpuArray x = gpu_random(nx, 1, 1), w = gpu_random(nw, 2, 0.1f), dy = gpu_random((size_t)s.N * s.ldy, 3, 1);
    GpuArray dx = gpu_poison(nx), dx_sum = gpu_random(nx, 4, 1), dw = gpu_poison(nw), dw_sum = gpu_random(nw, 5, 1);
    GpuFloats wide = gpu_poison_floats(nw), wide_sum = gpu_random_floats(nw, 6, 1);
    matmul_dx_strided(dx.x, dy.x, s.ldy, w.x, s.N, s.C, s.OC, false, 0);
    matmul_dx_strided(dx_sum.x, dy.x, s.ldy, w.x, s.N, s.C, s.OC, true, 0);
    matmul_dw_strided(dw.x, dy.x, s.ldy, x.x, s.N, s.C, s.OC, false, 0);
    matmul_dw_strided(dw_sum.x, dy.x, s.ldy, x.x, s.N, s.C, s.OC, true, 0);
    matmul_dw_fp32(wide.x, dy.x, s.ldy, x.x, s.N, s.C, s.OC, false, 0);
    matmul_dw_fp32(wide_sum.x, dy.x, s.ldy, x.x, s.N, s.C, s.OC, true, 0);

    float *dys = matmul_test_pack(dy.host, s.N, s.OC, s.ldy), *want_dx = (float*)allocate(nx, sizeof(float)),
          *want_dw = (float*)allocate(nw, sizeof(float));
    matmul_backward_cpu(want_dx, false, want_dw, dys, x.host, matmul_test_tensor(w.host), s.N, s.C, s.OC);
    gpu_check("matmul dx", dx, want_dx, nx, gpu_tolerance(1.1));
    gpu_check("matmul dw", dw, want_dw, nw, gpu_tolerance(1.1));
    gpu_check("matmul dw fp32", wide, want_dw, nw, MATMUL_WIDE_EPS);
    for (size_t i = 0; i < nw; i++) wide_sum.host[i] += want_dw[i], dw_sum.host[i] += want_dw[i];
    for (size_t i = 0; i < nx; i++) dx_sum.host[i] += want_dx[i];
    // some of cuBLASLt's kernels round the product before they add it, and the sum again: seen on an H200, up to 1.8
    gpu_check("matmul dx +=", dx_sum, dx_sum.host, nx, gpu_tolerance(2.2));
    gpu_check("matmul dw +=", dw_sum, dw_sum.host, nw, gpu_tolerance(2.2));
    gpu_check("matmul dw fp32 +=", wide_sum, wide_sum.host, nw, MATMUL_WIDE_EPS);
    free(dys), free(want_dx), free(want_dw);
    gpu_free(&x), gpu_free(&w), gpu_free(&dy), gpu_free(&dx), gpu_free(&dx_sum), gpu_free(&dw), gpu_free(&dw_sum);
    gpu_free(&wide), gpu_free(&wide_sum);
}

// a long sum and few outputs invite the library to share sums among blocks: the bits must not depend on who is first
static void matmul_test_twice(int N, int C, int OC) {
    GpuArray x = gpu_random((size_t)N * C, 1, 1), w = gpu_random((size_t)OC * C, 2, 1),
             dy = gpu_random((size_t)N * OC, 3, 1);
    GpuArray y = gpu_poison((size_t)N * OC), dx = gpu_poison((size_t)N * C), dw = gpu_poison((size_t)OC * C);
    for (int run = 0; run < 8; run++) {
        GpuArray y2 = gpu_poison(y.n), dx2 = gpu_poison(dx.n), dw2 = gpu_poison(dw.n);
        matmul_forward(run ? y2.x : y.x, OC, x.x, w.x, N, C, OC, 0);
        matmul_dx(run ? dx2.x : dx.x, dy.x, w.x, N, C, OC, false, 0);
        matmul_dw(run ? dw2.x : dw.x, dy.x, x.x, N, C, OC, false, 0);
        if (run) {
            gpu_check_same("matmul forward, again", y, y2);
            gpu_check_same("matmul dx, again", dx, dx2);
            gpu_check_same("matmul dw, again", dw, dw2);
        }
        gpu_free(&y2), gpu_free(&dx2), gpu_free(&dw2);
    }
    gpu_free(&x), gpu_free(&w), gpu_free(&dy), gpu_free(&y), gpu_free(&dx), gpu_free(&dw);
}

static void matmul_test_nan(void) {
    const int N = 40, C = 64, OC = 48, row = 7, column = 5;
    float* values = (float*)allocate((size_t)N * C, sizeof(float));
    values[row * C + column] = NAN;
    GpuArray x = gpu_upload(values, (size_t)N * C), w = gpu_random((size_t)OC * C, 2, 1),
             y = gpu_poison((size_t)N * OC);
    matmul_forward(y.x, OC, x.x, w.x, N, C, OC, 0);
    float* got = gpu_read(&y, 0, y.n);
    size_t wrong = 0;
    for (int i = 0; i < N * OC; i++) wrong += (i / OC == row) != (bool)isnan(got[i]);
    gpu_expect(wrong == 0, "matmul: a NaN in row %d: %zu outputs wrong", row, wrong);
    free(values), free(got), gpu_free(&x), gpu_free(&w), gpu_free(&y);
}

// a second state that reads the text makes the same choices without timing; garbage is left out
static void matmul_test_choices(void) {
    char* text = matmul_choices_write();
    int n = matmul.n;
    matmul_free();
    gpu_expect(n > 8 && matmul_choices_read(text) == n, "all %d choices are read", n);
    gpu_expect(matmul_choices_read(text) == 0, "a shape keeps its choice");
    for (int i = 0; i < n; i++) {
        uint64_t wanted = matmul.choices[i].mark;
        matmul_choose(matmul.choices[i].shape, 0);
        gpu_expect(matmul.choices[i].mark == wanted, "choice %d: the heuristic names the same candidates again", i);
    }
    char* again = matmul_choices_write();
    gpu_expect(strcmp(text, again) == 0, "the same text is written again");
    matmul_free();
    gpu_expect(matmul_choices_read("products of another GPU\n") == 0 && matmul_choices_read("") == 0,
               "another GPU's text");
    memset(text, 'x', strlen(text) / 2);
    gpu_expect(matmul_choices_read(text) == 0, "a text with another title");
    char* damaged = again + strlen(again) / 2;
    for (char* p = damaged; *p; p++) *p ^= 0x55;
    int taken = matmul_choices_read(again);
    gpu_expect(taken >= 1 && taken < n, "of a damaged text, %d of %d lines are read", taken, n);
    free(text), free(again);
    matmul_free();
}

// a cache in a folder of the test's own
static void matmul_test_cache(void) {
    char folder[] = "/tmp/test_matmul_XXXXXX", path[PATH_SIZE], *old = getenv("XDG_CACHE_HOME");
    Error err;
    old = old ? strdup(old) : NULL;
    if (!gpu_expect(mkdtemp(folder) != NULL, "a folder in /tmp")) return;
    setenv("XDG_CACHE_HOME", folder, 1);
    matmul_cache_read(); // there is none
    const MatmulShape shape = matmul_shape(MATMUL_FORWARD, false, false, 512, 256, 512, 512);
    const uint64_t mark = matmul_choose(shape, 0)->mark;
    matmul_cache_write();
    matmul_free();
    matmul_cache_read();
    gpu_expect(matmul.n == 1 && matmul.choices[0].mark == mark && !matmul.choices[0].ready,
               "the cache holds the choice");
    matmul_choose(shape, 0);
    gpu_expect(matmul.timed == 0, "and it is not timed again");
    gpu_expect(matmul_cache_path(path, &err) && unlink(path) == 0, "the cache is a file: %s", path);
    if (old)
        setenv("XDG_CACHE_HOME", old, 1);
    else
        unsetenv("XDG_CACHE_HOME");
    snprintf(path, sizeof path, "%s/llama3.c", folder);
    rmdir(path), rmdir(folder), free(old);
    matmul_free();
}

static void test_matmul(void) {
    for (size_t i = 0; i < sizeof matmul_test_shapes / sizeof *matmul_test_shapes; i++) {
        matmul_test_forward(matmul_test_shapes[i]);
        matmul_test_backward(matmul_test_shapes[i]);
    }
    matmul_test_twice(8192, 128, 64);
    matmul_test_twice(64, 128, 8192);
    matmul_test_nan();
    matmul_test_choices();
    matmul_test_cache();
}
