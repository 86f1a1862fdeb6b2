/*
RMSNorm on the GPU against rmsnorm_forward_cpu and rmsnorm_backward_cpu: plain and with the residual add, recomputed from r, in
place, with and without a gradient to add to. Results are rounded once; what the order of the sums changes is far less.
*/
#include "gpu_test.cuh"
#include "llmc/rmsnorm.h"

static const float RMSNORM_EPS = 1e-5f;

// of r: the CPU adds up a row in fp32, almost one number after the other, the GPU in some thousand sums
static double rmsnorm_r_tolerance(int C) { return C <= 16384 ? 1e-5 : 1e-4; }

// of y: one rounding, or what r is off by
static double rmsnorm_y_tolerance(int C) { return fmax(gpu_tolerance(1.01), rmsnorm_r_tolerance(C)); }

static void rmsnorm_forward_shape(int N, int C) {
    size_t n = (size_t)N * C;
    GpuArray x = gpu_random(n, 1, 2, 0.5f), w = gpu_random(C, 2, 0.3f, 1), y = gpu_poison(n), again = gpu_poison(n);
    GpuFloats r = gpu_poison_floats(N);
    float *want = (float*)allocate(n, sizeof *want), *want_r = (float*)allocate(N, sizeof *want);
    rmsnorm_forward_cpu(want, want_r, x.host, w.host, N, C, RMSNORM_EPS);
    rmsnorm_forward(y.x, r.x, x.x, w.x, N, C, RMSNORM_EPS, 0);
    rmsnorm_again(again.x, x.x, r.x, w.x, N, C, 0);
    gpu_check("rmsnorm y", y, want, n, rmsnorm_y_tolerance(C));
    gpu_check("rmsnorm r", r, want_r, N, rmsnorm_r_tolerance(C));
    gpu_check_same("rmsnorm again", y, again);
    gpu_check_unchanged("rmsnorm x", x);
    gpu_check_unchanged("rmsnorm w", w);
    gpu_free(&x), gpu_free(&w), gpu_free(&y), gpu_free(&again), gpu_free(&r);
    free(want), free(want_r);
}

static void rmsnorm_residual_shape(int N, int C) {
    size_t n = (size_t)N * C;
    GpuArray a = gpu_random(n, 1, 1), b = gpu_random(n, 2, 1), w = gpu_random(C, 3, 0.3f, 1);
    GpuArray sum = gpu_poison(n), y = gpu_poison(n), in_place = gpu_upload(a.host, n), y_in_place = gpu_poison(n);
    GpuFloats r = gpu_poison_floats(N), r_in_place = gpu_poison_floats(N);
    float *want = (float*)allocate(n, sizeof *want), *want_r = (float*)allocate(N, sizeof *want);
    float* want_sum = (float*)allocate(n, sizeof *want);
    for (size_t i = 0; i < n; i++) want_sum[i] = gpu_unround(gpu_round<floatX>(a.host[i] + b.host[i]));
    rmsnorm_forward_cpu(want, want_r, want_sum, w.host, N, C, RMSNORM_EPS);
    residual_rmsnorm_forward(sum.x, y.x, r.x, a.x, b.x, w.x, N, C, RMSNORM_EPS, 0);
    residual_rmsnorm_forward(in_place.x, y_in_place.x, r_in_place.x, in_place.x, b.x, w.x, N, C, RMSNORM_EPS, 0);
    GpuArray stored_sum = gpu_upload(want_sum, n);
    gpu_check_same("residual sum", sum, stored_sum);
    gpu_check("residual rmsnorm y", y, want, n, rmsnorm_y_tolerance(C));
    gpu_check("residual rmsnorm r", r, want_r, N, rmsnorm_r_tolerance(C));
    gpu_check_same("residual sum in place", sum, in_place);
    gpu_check_same("residual rmsnorm in place", y, y_in_place);
    gpu_check_same("residual rmsnorm r in place", r, r_in_place);
    rmsnorm_again(y_in_place.x, sum.x, r.x, w.x, N, C, 0);
    gpu_check_same("residual rmsnorm again", y, y_in_place);
    gpu_check_unchanged("residual a", a);
    gpu_check_unchanged("residual b", b);
    gpu_free(&a), gpu_free(&b), gpu_free(&w), gpu_free(&sum), gpu_free(&y), gpu_free(&in_place), gpu_free(&y_in_place);
    gpu_free(&r), gpu_free(&r_in_place), gpu_free(&stored_sum);
    free(want), free(want_r), free(want_sum);
}

// with a gradient to add to: into an array of its own, and in place, which must be the same. Without one: as if it were zero
static void rmsnorm_backward_shape(int N, int C) {
    size_t n = (size_t)N * C;
    GpuArray x = gpu_random(n, 1, 2, 0.5f), w = gpu_random(C, 2, 0.3f, 1), dy = gpu_random(n, 3, 1);
    GpuArray dres = gpu_random(n, 4, 1), dx = gpu_poison(n), in_place = gpu_upload(dres.host, n);
    GpuArray dw = gpu_random(C, 5, 1), dw_in_place = gpu_upload(dw.host, C);
    GpuBytes scratch = gpu_scratch(rmsnorm_backward_scratch(C));
    float *want_dx = (float*)allocate(n, sizeof(float)), *want_dw = (float*)allocate(C, sizeof(float));
    float *r_values = (float*)allocate(N, sizeof(float)), *unused = (float*)allocate(n, sizeof(float));
    rmsnorm_forward_cpu(unused, r_values, x.host, w.host, N, C, RMSNORM_EPS);
    GpuFloats r = gpu_upload_floats(r_values, N);

    memcpy(want_dx, dres.host, n * sizeof(float));
    memcpy(want_dw, dw.host, C * sizeof(float));
    rmsnorm_backward_cpu(want_dx, want_dw, dy.host, x.host, w.host, r.host, N, C);
    rmsnorm_backward(dx.x, dw.x, dy.x, dres.x, x.x, w.x, r.x, N, C, scratch.x, 0);
    rmsnorm_backward(in_place.x, dw_in_place.x, dy.x, in_place.x, x.x, w.x, r.x, N, C, scratch.x, 0);
    gpu_check("rmsnorm dx", dx, want_dx, n, gpu_tolerance(1.05));
    gpu_check("rmsnorm dw", dw, want_dw, C, gpu_tolerance(1.05));
    gpu_check_same("rmsnorm dx in place", dx, in_place);
    gpu_check_same("rmsnorm dw, second run", dw, dw_in_place);

    GpuArray dw_alone = gpu_upload(dw.host, C);
    memset(want_dx, 0, n * sizeof(float));
    memcpy(want_dw, dw.host, C * sizeof(float));
    rmsnorm_backward_cpu(want_dx, want_dw, dy.host, x.host, w.host, r.host, N, C);
    rmsnorm_backward(dx.x, dw_alone.x, dy.x, NULL, x.x, w.x, r.x, N, C, scratch.x, 0);
    gpu_check("rmsnorm dx alone", dx, want_dx, n, gpu_tolerance(1.05));
    gpu_check_same("rmsnorm dw alone", dw, dw_alone);
    gpu_check_unchanged("rmsnorm x", x);
    gpu_check_unchanged("rmsnorm dy", dy);
    gpu_check_unchanged("rmsnorm dres", dres);
    gpu_free(&x), gpu_free(&w), gpu_free(&dy), gpu_free(&dres), gpu_free(&dx), gpu_free(&in_place), gpu_free(&dw);
    gpu_free(&dw_in_place), gpu_free(&dw_alone), gpu_free(&scratch), gpu_free(&r);
    free(want_dx), free(want_dw), free(r_values), free(unused);
}

// the last row starts beyond element 2^31
static void rmsnorm_large(void) {
    const int C = 8192, N = (int)(((size_t)1 << 31) / C) + 2;
    const size_t n = (size_t)N * C, last = n - C;
    if (gpu_reduced || !gpu_has_room("rmsnorm beyond 2^31", 3 * n * sizeof(floatX))) return;
    GpuArray x = gpu_poison(n), y = gpu_poison(n), dx = gpu_poison(n);
    GpuArray row = gpu_random(C, 1, 2), w = gpu_random(C, 2, 0.3f, 1), dw = gpu_random(C, 3, 1);
    GpuFloats r = gpu_poison_floats(N);
    GpuBytes scratch = gpu_scratch(rmsnorm_backward_scratch(C));
    float *want = (float*)allocate(C, sizeof *want), *want_dw = (float*)allocate(C, sizeof *want), want_r;
    cuda_check(cudaMemset(x.x, 0, n * sizeof(floatX)));
    cuda_check(cudaMemcpy(x.x + last, row.x, C * sizeof(floatX), cudaMemcpyDeviceToDevice));
    rmsnorm_forward_cpu(want, &want_r, row.host, w.host, 1, C, RMSNORM_EPS);
    rmsnorm_forward(y.x, r.x, x.x, w.x, N, C, RMSNORM_EPS, 0);
    gpu_check_at("rmsnorm beyond 2^31", y, last, want, C, gpu_tolerance(1.01));
    // the gradient is what the forward pass just made: zero but in the last row
    float* dy = gpu_read(&y, last, C);
    memset(want, 0, C * sizeof *want);
    memcpy(want_dw, dw.host, C * sizeof *want_dw);
    rmsnorm_backward_cpu(want, want_dw, dy, row.host, w.host, &want_r, 1, C);
    rmsnorm_backward(dx.x, dw.x, y.x, NULL, x.x, w.x, r.x, N, C, scratch.x, 0);
    gpu_check_at("rmsnorm backward beyond 2^31", dx, last, want, C, gpu_tolerance(1.05));
    gpu_check("rmsnorm dw beyond 2^31", dw, want_dw, C, gpu_tolerance(1.05));
    gpu_free(&x), gpu_free(&y), gpu_free(&dx), gpu_free(&row), gpu_free(&w), gpu_free(&dw), gpu_free(&r), gpu_free(&scratch);
    free(want), free(want_dw), free(dy);
}

static void test_rmsnorm(void) {
    // one warp to a row, one block to a row with 2, 4 and 8 packs to a thread, rows that no block holds
    const int shapes[][2] = { { 1, 8 },     { 3, 16 },    { 5, 128 },  { 21, 288 },  { 130, 768 }, { 33, 1024 },  { 70, 1032 },
                              { 130, 2048 }, { 65, 4096 }, { 17, 8192 }, { 9, 16384 },  { 26, 20480 }, { 2, 131088 } };
    for (auto& s : shapes) {
        rmsnorm_forward_shape(s[0], s[1]);
        rmsnorm_residual_shape(s[0], s[1]);
        rmsnorm_backward_shape(s[0], s[1]);
    }
    // many rows to a block of the backward pass
    if (!gpu_reduced) rmsnorm_backward_shape(36 * gpu_processors(), 1024 * PACK);
    rmsnorm_large();
}
