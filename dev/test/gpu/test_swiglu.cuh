/*
SwiGLU on the GPU against swiglu_forward_cpu and swiglu_backward_cpu. One rounding, at the store; the GPU's exponential and
quotient are off by far less.
*/
#include "gpu_test.cuh"
#include "llmc/swiglu.h"

static void swiglu_shape(int N, int F, float scale) {
    size_t n = (size_t)N * F;
    GpuArray gate_up = gpu_random(2 * n, 1, scale), dy = gpu_random(n, 2, 1);
    GpuArray y = gpu_poison(n), dgate_up = gpu_poison(2 * n), in_place = gpu_upload(gate_up.host, 2 * n);
    float *want = (float*)allocate(n, sizeof *want), *want_dgate_up = (float*)allocate(2 * n, sizeof *want);
    swiglu_forward_cpu(want, gate_up.host, N, F);
    swiglu_backward_cpu(want_dgate_up, dy.host, gate_up.host, N, F);
    swiglu_forward(y.x, gate_up.x, N, F, 0);
    swiglu_backward(dgate_up.x, dy.x, gate_up.x, N, F, 0);
    swiglu_backward(in_place.x, dy.x, in_place.x, N, F, 0);
    gpu_check("swiglu forward", y, want, n, gpu_tolerance(1.05));
    gpu_check("swiglu backward", dgate_up, want_dgate_up, 2 * n, gpu_tolerance(1.05));
    gpu_check_same("swiglu backward in place", dgate_up, in_place);
    gpu_check_unchanged("swiglu gate_up", gate_up);
    gpu_check_unchanged("swiglu dy", dy);
    gpu_free(&gate_up), gpu_free(&dy), gpu_free(&y), gpu_free(&dgate_up), gpu_free(&in_place);
    free(want), free(want_dgate_up);
}

// gates from which e^-x overflows, or vanishes beside 1
static void swiglu_extremes(void) {
    const float gates[8] = { -1000, -104, -88.5f, -87, 0, 30, 89, 1000 };
    float gate_up[16], want[8], want_dgate_up[16];
    for (int i = 0; i < 8; i++) gate_up[i] = gates[i], gate_up[8 + i] = 1;
    GpuArray x = gpu_upload(gate_up, 16), dy = gpu_upload(gate_up + 8, 8), y = gpu_poison(8), dx = gpu_poison(16);
    swiglu_forward_cpu(want, x.host, 1, 8);
    swiglu_backward_cpu(want_dgate_up, dy.host, x.host, 1, 8);
    swiglu_forward(y.x, x.x, 1, 8, 0);
    swiglu_backward(dx.x, dy.x, x.x, 1, 8, 0);
    gpu_check("swiglu forward, extremes", y, want, 8, gpu_tolerance(1.05));
    gpu_check("swiglu backward, extremes", dx, want_dgate_up, 16, gpu_tolerance(1.05));
    gpu_free(&x), gpu_free(&dy), gpu_free(&y), gpu_free(&dx);
}

// the last row of gate_up starts beyond element 2^31
static void swiglu_large(void) {
    const int F = 8192;
    const size_t N = ((size_t)1 << 31) / (2 * F) + 2, last = N - 1;
    if (gpu_reduced || !gpu_has_room("swiglu beyond 2^31", 3 * N * F * sizeof(floatX))) return;
    GpuArray gate_up = gpu_poison(2 * N * F), y = gpu_poison(N * F), row = gpu_random(2 * F, 3, 1);
    cuda_check(cudaMemcpy(gate_up.x + last * 2 * F, row.x, 2 * F * sizeof(floatX), cudaMemcpyDeviceToDevice));
    float* want = (float*)allocate(F, sizeof *want);
    swiglu_forward_cpu(want, row.host, 1, F);
    swiglu_forward(y.x, gate_up.x, (int64_t)N, F, 0);
    gpu_check_at("swiglu beyond 2^31", y, last * F, want, F, gpu_tolerance(1.05));
    gpu_free(&gate_up), gpu_free(&y), gpu_free(&row);
    free(want);
}

static void test_swiglu(void) {
    const int shapes[][2] = { { 1, 8 }, { 3, 24 }, { 7, 384 }, { 5, 1376 }, { 33, 2816 }, { 2, 14336 }, { 257, 768 } };
    for (auto& s : shapes) swiglu_shape(s[0], s[1], 2);
    swiglu_shape(16, 256, 20);
    swiglu_extremes();
    swiglu_large();
}
