/*
repeat_kv on the GPU against repeat_kv_forward_cpu (the same bits) and repeat_kv_backward_cpu (the same sums in the same
order, rounded once).
*/
#include "gpu_test.cuh"
#include "llmc/repeat_kv.h"

static void repeat_kv_shape(int N, int NH, int NKV, int HD) {
    size_t nx = (size_t)N * NKV * HD, ny = (size_t)N * NH * HD;
    GpuArray x = gpu_random(nx, 1, 1), dy = gpu_random(ny, 2, 1), y = gpu_poison(ny), dx = gpu_poison(nx);
    float *want_y = (float*)allocate(ny, sizeof(float)), *want_dx = (float*)allocate(nx, sizeof(float));
    repeat_kv_forward_cpu(want_y, x.host, N, NH, NKV, HD);
    repeat_kv_backward_cpu(want_dx, dy.host, N, NH, NKV, HD);
    repeat_kv_forward(y.x, x.x, N, NH, NKV, HD, 0);
    repeat_kv_backward(dx.x, dy.x, N, NH, NKV, HD, 0);
    GpuArray want = gpu_upload(want_y, ny);
    gpu_check_same("repeat_kv forward", y, want);
    gpu_check("repeat_kv backward", dx, want_dx, nx, gpu_tolerance(1.01));
    gpu_check_unchanged("repeat_kv x", x);
    gpu_check_unchanged("repeat_kv dy", dy);
    gpu_free(&x), gpu_free(&dy), gpu_free(&y), gpu_free(&dx), gpu_free(&want);
    free(want_y), free(want_dx);
}

static void test_repeat_kv(void) {
    repeat_kv_shape(1, 1, 1, 8);
    repeat_kv_shape(3, 6, 2, 48);
    repeat_kv_shape(37, 32, 8, 64);
    repeat_kv_shape(5, 64, 8, 128);
    repeat_kv_shape(9, 7, 1, 24);
    repeat_kv_shape(11, 4, 4, 32);
}
