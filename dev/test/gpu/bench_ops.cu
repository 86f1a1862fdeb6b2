/*
How near the memory-bound ops come to a copy of the same number of bytes, in the same run: N 16384 rows.

    nvcc -std=c++17 -O3 -I. … dev/test/gpu/bench_ops.cu && ./a.out [FILTER]       rows whose name contains FILTER

Before each launch the L2 is filled with lines that are only read, so that nothing is found there and nothing has to be
written back. Medians of 40 launches, timed by events, after three to warm up; the copy between them, launch by launch.
*/
#include "gpu_test.cuh"
#include "llmc/embedding.h"
#include "llmc/repeat_kv.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
#include "llmc/swiglu.h"

enum { BENCH_ROWS = 16384, BENCH_LAUNCHES = 40, BENCH_FLUSH = 1 << 27 };

static const char* bench_filter = "";
static int4 *bench_flush_memory, *bench_copy_from, *bench_copy_to;
static size_t bench_copy_bytes;

static __global__ void bench_flush_kernel(int4* x, size_t n) {
    int sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) sum += x[i].x;
    if (sum == 123456789) x[0].x = sum; // never: the memory is zero
}

template <typename Launch> static float bench_once(Launch launch) {
    static cudaEvent_t event[2];
    if (!event[0])
        for (int i = 0; i < 2; i++) cuda_check(cudaEventCreate(&event[i]));
    bench_flush_kernel<<<(unsigned)(4 * gpu_processors()), 512, 0, 0>>>(bench_flush_memory, BENCH_FLUSH / 16);
    launch_check();
    cuda_check(cudaEventRecord(event[0], 0));
    launch();
    cuda_check(cudaEventRecord(event[1], 0));
    cuda_check(cudaEventSynchronize(event[1]));
    float ms;
    cuda_check(cudaEventElapsedTime(&ms, event[0], event[1]));
    return ms;
}

static int bench_compare(const void* a, const void* b) {
    const float x = *(const float*)a, y = *(const float*)b;
    return (x > y) - (x < y);
}

#define NAME(op, width) (snprintf(name, sizeof name, "%s, %d", op, width), name)

// bytes: read and written by any kernel that is right
template <typename Launch> static void bench(const char* name, size_t bytes, Launch launch) {
    float ms[BENCH_LAUNCHES], copy[BENCH_LAUNCHES];
    if (!strstr(name, bench_filter)) return;
    require(bytes / 2 <= bench_copy_bytes, "the copied arrays are large enough");
    auto copy_launch = [&] {
        cuda_check(cudaMemcpyAsync(bench_copy_to, bench_copy_from, bytes / 2, cudaMemcpyDeviceToDevice, 0));
    };
    for (int i = 0; i < 3; i++) bench_once(launch), bench_once(copy_launch);
    for (int i = 0; i < BENCH_LAUNCHES; i++) ms[i] = bench_once(launch), copy[i] = bench_once(copy_launch);
    qsort(ms, BENCH_LAUNCHES, sizeof *ms, bench_compare);
    qsort(copy, BENCH_LAUNCHES, sizeof *copy, bench_compare);
    double median = ms[BENCH_LAUNCHES / 2], median_copy = copy[BENCH_LAUNCHES / 2];
    printf("%-44s %8.1f us (%8.1f to %8.1f) %7.0f GB/s   copy %7.0f GB/s   %5.1f %%\n", name, 1e3 * median, 1e3 * ms[0],
           1e3 * ms[BENCH_LAUNCHES - 1], bytes / median * 1e-6, bytes / median_copy * 1e-6, 100 * median_copy / median);
    fflush(stdout);
}

static void bench_rmsnorm(int C) {
    const int N = BENCH_ROWS;
    size_t n = (size_t)N * C, bytes = n * sizeof(floatX);
    char name[64];
    GpuArray x = gpu_random(n, 1, 1), b = gpu_random(n, 2, 1), w = gpu_random(C, 3, 1), y = gpu_poison(n), sum = gpu_poison(n);
    GpuArray dw = gpu_random(C, 4, 1);
    GpuFloats r = gpu_poison_floats(N);
    GpuBytes scratch = gpu_scratch(rmsnorm_backward_scratch(C));
    bench(NAME("rmsnorm forward", C), 2 * bytes, [&] { rmsnorm_forward(y.x, r.x, x.x, w.x, N, C, 1e-5f, 0); });
    bench(NAME("rmsnorm again", C), 2 * bytes, [&] { rmsnorm_again(y.x, x.x, r.x, w.x, N, C, 0); });
    bench(NAME("residual rmsnorm forward", C), 4 * bytes,
          [&] { residual_rmsnorm_forward(sum.x, y.x, r.x, x.x, b.x, w.x, N, C, 1e-5f, 0); });
    bench(NAME("rmsnorm backward", C), 3 * bytes,
          [&] { rmsnorm_backward(sum.x, dw.x, b.x, NULL, x.x, w.x, r.x, N, C, scratch.x, 0); });
    bench(NAME("residual rmsnorm backward", C), 4 * bytes,
          [&] { rmsnorm_backward(y.x, dw.x, b.x, y.x, x.x, w.x, r.x, N, C, scratch.x, 0); });
    gpu_free(&x), gpu_free(&b), gpu_free(&w), gpu_free(&y), gpu_free(&sum), gpu_free(&dw), gpu_free(&r), gpu_free(&scratch);
}

static void bench_rope(int heads, int NKV, int HD) {
    const int T = 2048, B = BENCH_ROWS / T, ldx = (heads + NKV) * HD;
    char name[64];
    GpuArray x = gpu_random((size_t)B * T * ldx, 1, 1);
    GpuFloats c = gpu_random_floats((size_t)T * HD / 2, 2, 0.3f), s = gpu_random_floats((size_t)T * HD / 2, 3, 0.3f);
    snprintf(name, sizeof name, "rope forward, %d heads, HD %d", heads, HD);
    bench(name, 2 * (size_t)B * T * heads * HD * sizeof(floatX),
          [&] { rope_forward(x.x, c.x, s.x, B, T, 0, heads, HD, ldx, 0); });
    gpu_free(&x), gpu_free(&c), gpu_free(&s);
}

static void bench_swiglu(int F) {
    const size_t n = (size_t)BENCH_ROWS * F;
    char name[64];
    GpuArray gate_up = gpu_poison(2 * n), y = gpu_poison(n);
    gpu_fill(&gate_up, 0, 2 * n, 1, 1), gpu_fill(&y, 0, n, 2, 1);
    bench(NAME("swiglu forward", F), 3 * n * sizeof(floatX), [&] { swiglu_forward(y.x, gate_up.x, BENCH_ROWS, F, 0); });
    bench(NAME("swiglu backward in place", F), 5 * n * sizeof(floatX),
          [&] { swiglu_backward(gate_up.x, y.x, gate_up.x, BENCH_ROWS, F, 0); });
    gpu_free(&gate_up), gpu_free(&y);
}

static void bench_embedding(const char* ids_name, int C, int V, double power) {
    const int N = BENCH_ROWS;
    size_t n = (size_t)N * C;
    char name[64];
    int32_t* ids = (int32_t*)allocate(N, sizeof *ids);
    for (int i = 0; i < N; i++) ids[i] = (int32_t)(pow(random_uniform(4, 0, (uint64_t)i), power) * V);
    GpuInts tokens = gpu_upload_ints(ids, N);
    GpuArray w = gpu_poison((size_t)V * C), x = gpu_random(n, 2, 1);
    gpu_fill(&w, 0, (size_t)V * C, 1, 1);
    GpuBytes scratch = gpu_scratch(embedding_backward_scratch(N, V));
    snprintf(name, sizeof name, "embedding forward, %s, C %d", ids_name, C);
    bench(name, 2 * n * sizeof(floatX), [&] { embedding_forward(x.x, tokens.x, w.x, N, C, 0); });
    snprintf(name, sizeof name, "embedding backward, %s, C %d", ids_name, C);
    bench(name, 3 * n * sizeof(floatX), [&] { embedding_backward(w.x, x.x, tokens.x, N, C, V, scratch.x, 0); });
    gpu_free(&tokens), gpu_free(&w), gpu_free(&x), gpu_free(&scratch);
    free(ids);
}

int main(int argc, char** argv) {
    if (argc > 1) bench_filter = argv[1];
    bench_copy_bytes = (size_t)5 * BENCH_ROWS * 14336 / 2 * sizeof(floatX);
    cuda_check(cudaMalloc((void**)&bench_flush_memory, BENCH_FLUSH));
    cuda_check(cudaMemset(bench_flush_memory, 0, BENCH_FLUSH));
    cuda_check(cudaMalloc((void**)&bench_copy_from, bench_copy_bytes));
    cuda_check(cudaMalloc((void**)&bench_copy_to, bench_copy_bytes));
    cuda_check(cudaMemset(bench_copy_from, 0, bench_copy_bytes));
    for (int C : { 768, 2048, 3072, 4096, 8192, 16384 }) bench_rmsnorm(C);
    bench_rope(40, 8, 64), bench_rope(40, 8, 128), bench_rope(32, 8, 128), bench_rope(16, 4, 64);
    for (int F : { 2048, 8192, 14336 }) bench_swiglu(F);
    bench_embedding("uniform", 2048, 128256, 1);
    bench_embedding("skewed", 2048, 128256, 6);
    bench_embedding("bytes", 768, 260, 2);
    return 0;
}
