/*
How fast attention's back ends are: causal, 32 query and 8 key/value heads, the causal half counted, backward 2.5 x forward.

    nvcc … bench_attention.cu -lcublas && ./a.out [BACKEND …]

Of each pass the median of some launches, back to back, and the slowest. For flash's backward pass its three kernels too,
products counted as they run: 4 of dK and dV, 3 of dQ.
*/
#include "gpu_test.cuh"
#include "llmc/attention.h"

enum { BENCH_MOST = 20 };

typedef struct {
    double ms, slowest;
} BenchTime;

static int bench_compare(const void* a, const void* b) {
    const float x = *(const float*)a, y = *(const float*)b;
    return (x > y) - (x < y);
}

// of about 0.3 s of launches, after two to warm up
template <typename Launch> static BenchTime bench_time(Launch launch) {
    cudaEvent_t event[2];
    float ms[BENCH_MOST];
    int n = 0;
    double total = 0;
    for (int i = 0; i < 2; i++) cuda_check(cudaEventCreate(&event[i])), launch();
    while (n < BENCH_MOST && (n < 3 || total < 300)) {
        cuda_check(cudaEventRecord(event[0], 0));
        launch();
        cuda_check(cudaEventRecord(event[1], 0));
        cuda_check(cudaEventSynchronize(event[1]));
        cuda_check(cudaEventElapsedTime(&ms[n], event[0], event[1]));
        total += ms[n++];
    }
    for (int i = 0; i < 2; i++) cuda_check(cudaEventDestroy(event[i]));
    qsort(ms, (size_t)n, sizeof *ms, bench_compare);
    return BenchTime{ ms[n / 2], ms[n - 1] };
}

static void bench_print(const char* name, const char* pass, AttentionShape s, double flops, BenchTime t) {
    printf("%-10s %d x %5d, HD %3d  %-9s %8.3f ms (slowest %8.3f)", name, s.B, s.T, s.HD, pass, t.ms, t.slowest);
    if (flops > 0) printf(" %6.0f TFLOP/s", flops / t.ms * 1e-9);
    printf("\n"), fflush(stdout);
}

typedef struct {
    GpuArray qkv, dout, out, dqkv;
    GpuFloats lse;
    GpuBytes scratch;
} BenchArrays;

#ifndef PRECISION_FP32
template <int HD> static void bench_flash_parts(AttentionShape s, double flops, const BenchArrays* a) {
    float* dot = (float*)a->scratch.x;
    bench_print("", " dot", s, 0, bench_time([&] { flash_backward_dot<HD>(dot, a->dout.x, a->out.x, s, 0); }));
    bench_print("", " dK dV", s, 2 * flops,
                bench_time([&] { flash_backward_kv<HD>(a->dqkv.x, a->dout.x, a->qkv.x, a->lse.x, dot, s, 0); }));
    bench_print("", " dQ", s, 1.5 * flops,
                bench_time([&] { flash_backward_q<HD>(a->dqkv.x, a->dout.x, a->qkv.x, a->lse.x, dot, s, 0); }));
}
#endif

static void bench_shape(AttentionBackend backend, AttentionShape s) {
    const char* name = attention_names[backend];
    const double flops = 2.0 * s.B * s.NH * s.HD * s.T * s.T;
    const size_t rows = (size_t)s.B * s.T, n = rows * (size_t)(s.NH + 2 * s.NKV) * s.HD, n_out = rows * s.NH * s.HD;
    Error why;
    if (!attention_supports(backend, s, true, &why)) {
        printf("%-10s %d x %5d, HD %3d  %s\n", name, s.B, s.T, s.HD, why.text);
        return;
    }
    BenchArrays a = { gpu_poison(n), gpu_poison(n_out), gpu_poison(n_out), gpu_poison(n), gpu_poison_floats(rows * s.NH),
                      gpu_scratch(attention_scratch(backend, s, true)) };
    gpu_fill(&a.qkv, 0, n, 3, 1), gpu_fill(&a.dout, 0, n_out, 7, 1);
    bench_print(name, "forward", s, flops,
                bench_time([&] { attention_forward(backend, a.out.x, a.lse.x, a.qkv.x, s, a.scratch.x, 0); }));
    bench_print(name, "backward", s, 2.5 * flops, bench_time([&] {
                    attention_backward(backend, a.dqkv.x, a.dout.x, a.qkv.x, a.out.x, a.lse.x, s, a.scratch.x, a.scratch.n, 0);
                }));
#ifndef PRECISION_FP32
    if (backend == ATTENTION_MMA && s.HD == 64) bench_flash_parts<64>(s, flops, &a);
    if (backend == ATTENTION_MMA && s.HD == 128) bench_flash_parts<128>(s, flops, &a);
#endif
    gpu_free(&a.qkv), gpu_free(&a.dout), gpu_free(&a.out), gpu_free(&a.dqkv), gpu_free(&a.lse), gpu_free(&a.scratch);
}

int main(int argc, char** argv) {
    const AttentionShape shapes[] = { { 4, 4096, 32, 8, 64 }, { 2, 8192, 32, 8, 64 }, { 4, 4096, 32, 8, 128 }, { 2, 8192, 32, 8, 128 } };
    for (int backend = N_ATTENTION - 1; backend >= 0; backend--) {
        bool named = argc < 2;
        for (int i = 1; i < argc; i++) named |= strcmp(argv[i], attention_names[backend]) == 0;
        if (!named || !attention_built_with((AttentionBackend)backend)) continue;
        for (const AttentionShape& s : shapes) bench_shape((AttentionBackend)backend, s);
    }
    return gpu_failures != 0;
}
