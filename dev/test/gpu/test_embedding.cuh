/*
The embedding on the GPU against embedding_forward_cpu (the same bits) and embedding_backward_cpu (fp32 sums in another order,
rounded once), on tokens that repeat in every way the kernels tell apart.
*/
#include "gpu_test.cuh"
#include "llmc/embedding.h"

static void embedding_ids(const char* name, const int32_t* ids, int N, int C, int V) {
    size_t nx = (size_t)N * C, nw = (size_t)V * C;
    GpuInts tokens = gpu_upload_ints(ids, N);
    GpuArray w = gpu_random(nw, 1, 1), dx = gpu_random(nx, 2, 1), x = gpu_poison(nx);
    GpuArray dw = gpu_random(nw, 3, 1), again = gpu_upload(dw.host, nw);
    GpuBytes scratch = gpu_scratch(embedding_backward_scratch(N, C));
    float* want = (float*)allocate(nx, sizeof *want);
    embedding_forward_cpu(want, ids, Tensor{ w.host, DTYPE_F32 }, N, C);
    embedding_backward_cpu(dw.host, dx.host, ids, N, C);
    embedding_forward(x.x, tokens.x, w.x, N, C, 0);
    embedding_backward(dw.x, dx.x, tokens.x, N, C, V, scratch.x, 0);
    embedding_backward(again.x, dx.x, tokens.x, N, C, V, scratch.x, 0);
    GpuArray want_x = gpu_upload(want, nx);
    gpu_check_same(name, x, want_x);
    gpu_check(name, dw, dw.host, nw, gpu_tolerance(1.05));
    gpu_check_same(name, dw, again);
    gpu_check_unchanged(name, w);
    gpu_check_unchanged(name, dx);
    gpu_free(&tokens), gpu_free(&w), gpu_free(&dx), gpu_free(&x), gpu_free(&dw), gpu_free(&again), gpu_free(&scratch);
    gpu_free(&want_x);
    free(want);
}

static void embedding_random(const char* name, int N, int C, int V, bool skewed) {
    int32_t* ids = (int32_t*)allocate(N, sizeof *ids);
    for (int n = 0; n < N; n++) {
        double u = random_uniform(4, 0, (uint64_t)n);
        ids[n] = (int32_t)((skewed ? u * u * u * u : u) * V);
    }
    embedding_ids(name, ids, N, C, V);
    free(ids);
}

// N times the token V - 1, as in padding
static void embedding_same(const char* name, int N, int C, int V) {
    int32_t* ids = (int32_t*)allocate(N, sizeof *ids);
    for (int n = 0; n < N; n++) ids[n] = V - 1;
    embedding_ids(name, ids, N, C, V);
    free(ids);
}

// tokens that occur 1, 2, 31, 32, 33, 63, 64, 65, 100 and 1000 times, shuffled
static void embedding_runs(int C) {
    const int counts[] = { 1, 2, 31, 32, 33, 63, 64, 65, 100, 1000, 1 };
    int32_t sorted[2000], ids[2000];
    int N = 0, id = 0;
    for (int count : counts) {
        for (int i = 0; i < count; i++) sorted[N++] = 3 * id;
        id++;
    }
    for (int n = 0; n < N; n++) ids[random_permute(5, 0, (uint64_t)N, (uint64_t)n)] = sorted[n];
    embedding_ids("embedding, sorted runs", sorted, N, C, 40);
    embedding_ids("embedding, shuffled runs", ids, N, C, 40);
}

// the row of the last token starts beyond element 2^31
static void embedding_large(void) {
    const int C = 16384, V = (int)(((size_t)1 << 31) / C) + 2, N = 2;
    const int32_t ids[2] = { V - 1, V - 1 };
    const size_t last = (size_t)(V - 1) * C;
    if (gpu_reduced || !gpu_has_room("embedding beyond 2^31", (size_t)V * C * sizeof(floatX))) return;
    GpuInts tokens = gpu_upload_ints(ids, N);
    GpuBytes scratch = gpu_scratch(embedding_backward_scratch(N, C));
    GpuArray w = gpu_poison((size_t)V * C), row = gpu_random(C, 1, 1), dx = gpu_random(N * C, 2, 1), x = gpu_poison(N * C);
    cuda_check(cudaMemcpy(w.x + last, row.x, C * sizeof(floatX), cudaMemcpyDeviceToDevice));
    embedding_forward(x.x, tokens.x, w.x, N, C, 0);
    gpu_check_at("embedding beyond 2^31", x, C, row.host, C, gpu_tolerance(0.01));
    embedding_backward(w.x, dx.x, tokens.x, N, C, V, scratch.x, 0);
    for (int c = 0; c < C; c++) row.host[c] += dx.host[c] + dx.host[C + c];
    gpu_check_at("embedding backward beyond 2^31", w, last, row.host, C, gpu_tolerance(1.05));
    gpu_free(&tokens), gpu_free(&scratch), gpu_free(&w), gpu_free(&row), gpu_free(&dx), gpu_free(&x);
}

static void test_embedding(void) {
    const int32_t one[] = { 0 };
    embedding_ids("embedding, one token", one, 1, 8, 1);
    embedding_random("embedding, 2 tokens", 300, 24, 2, false);
    embedding_random("embedding, bytes", 2000, 288, 260, true);
    embedding_random("embedding, few repeats", 700, 2048, 3000, false);
    embedding_random("embedding, skewed", 1500, 768, 1000, true);
    embedding_random("embedding, more tokens than the threads hold", 20001, 8, 3000, true);
    embedding_random("embedding, more ids than 128 blocks count", 1001, 8, 500003, false);
    embedding_same("embedding, one token of many", 1, 8, 300);
    for (int N : { 15, 16, 17, 31, 32, 33 }) embedding_same("embedding, tiles of one token", N, 264, 2);
    embedding_same("embedding, more of one token than a block lists", 6001, 8, 200);
    embedding_runs(8);
    embedding_runs(264);
    embedding_runs(4104);
    embedding_large();
}
