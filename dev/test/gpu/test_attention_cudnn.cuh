/*
cuDNN's attention against the CPU's: small and ragged shapes, in pieces, the same bits twice, scores far below zero.

Tolerances      out: p is rounded before it is multiplied, out when stored. dq, dk, dv: p, ds, each query head's share, the
                sum. lse is fp32; its exponentials are approximate to 2^-22
*/
#pragma once

#include "gpu_test.cuh"
#include "llmc/attention.h"

#ifdef USE_CUDNN
static int cudnn_row(AttentionShape s) { return (s.NH + 2 * s.NKV) * s.HD; } // numbers in a row of qkv

// q, k or v alone (part 0, 1, 2) of rows of q‖k‖v; owned by the caller. *n numbers
static float* cudnn_part(const float* qkv, AttentionShape s, int part, size_t* n) {
    const size_t rows = (size_t)s.B * s.T, row = cudnn_row(s), width = (size_t)(part ? s.NKV : s.NH) * s.HD;
    const size_t first = (size_t)(!part ? 0 : part == 1 ? s.NH : s.NH + s.NKV) * s.HD;
    float* x = (float*)allocate(rows * width, sizeof *x);
    for (size_t r = 0; r < rows; r++) memcpy(x + r * width, qkv + r * row + first, width * sizeof *x);
    *n = rows * width;
    return x;
}

// q, k and v separately: each has its own scale
static void cudnn_check_parts(const char* name, const float* got, const float* want, AttentionShape s, bool only_v) {
    for (int part = only_v ? 2 : 0; part < 3; part++) {
        char label[96];
        size_t n;
        float *x = cudnn_part(got, s, part, &n), *y = cudnn_part(want, s, part, &n);
        snprintf(label, sizeof label, "%s d%c", name, "qkv"[part]);
        gpu_check_values(label, x, y, n, gpu_tolerance(4));
        free(x), free(y);
    }
}

static bool cudnn_supported(const char* name, AttentionShape s, bool backward) {
    Error why;
    bool ok = cudnn_attention_supports(s, backward, &why);
    return gpu_expect(ok, "%s: not supported: %s", name, ok ? "" : why.text);
}

// overwrites out and lse, with scratch that was NaN everywhere
static void cudnn_forward(const GpuArray* out, const GpuFloats* lse, const GpuArray* qkv, AttentionShape s) {
    GpuBytes scratch = gpu_scratch(cudnn_attention_scratch(s, false));
    cudnn_attention_forward(out->x, lse->x, qkv->x, s, scratch.x, 0);
    gpu_free(&scratch);
}

// dqkv, the same way
static GpuArray cudnn_backward(const GpuArray* dout, const GpuArray* qkv, const GpuArray* out, const GpuFloats* lse,
                               AttentionShape s) {
    GpuArray dqkv = gpu_poison(qkv->n);
    GpuBytes scratch = gpu_scratch(cudnn_attention_scratch(s, true));
    cudnn_attention_backward(dqkv.x, dout->x, qkv->x, out->x, lse->x, s, scratch.x, scratch.n, 0);
    gpu_free(&scratch);
    return dqkv;
}

// the forward pass, twice: out and lse are left for the backward pass
static void cudnn_check_forward(const char* name, AttentionShape s, GpuArray out, GpuFloats lse, GpuArray qkv) {
    char label[96];
    const int row = cudnn_row(s);
    const float *k = qkv.host + (size_t)s.NH * s.HD, *v = k + (size_t)s.NKV * s.HD;
    float *want_out = (float*)allocate(out.n, sizeof(float)), *want_lse = (float*)allocate(lse.n, sizeof(float));
    GpuArray first = gpu_poison(out.n);
    cudnn_forward(&first, &lse, &qkv, s);
    cudnn_forward(&out, &lse, &qkv, s);
    attention_forward_cpu(want_out, want_lse, qkv.host, k, v, s.B, s.T, s.T, 0, s.NH, s.NKV, s.HD, row, row);
    snprintf(label, sizeof label, "%s out", name), gpu_check(label, out, want_out, out.n, gpu_tolerance(2));
    snprintf(label, sizeof label, "%s lse", name), gpu_check(label, lse, want_lse, lse.n, 1e-4);
    gpu_check_same(label, out, first);
    free(want_out), free(want_lse), gpu_free(&first);
}

// the backward pass, reproducible and twice, then fast; the CPU's has the same out and lse. only_v: dq and dk need only be
// finite, they are small differences of large numbers
static void cudnn_check_backward(const char* name, AttentionShape s, GpuArray out, GpuFloats lse, GpuArray qkv,
                                 bool only_v) {
    char label[96];
    const size_t k = (size_t)s.NH * s.HD, v = k + (size_t)s.NKV * s.HD;
    const float* q = qkv.host;
    float *host_out = gpu_read(&out, 0, out.n), *host_lse = gpu_read(&lse, 0, lse.n);
    GpuArray dout = gpu_random(out.n, 7, 1);
    GpuArray dqkv = cudnn_backward(&dout, &qkv, &out, &lse, s), twice = cudnn_backward(&dout, &qkv, &out, &lse, s);
    float *got = gpu_read(&dqkv, 0, dqkv.n), *want = (float*)allocate(dqkv.n, sizeof(float));
    attention_backward_cpu(want, want + k, want + v, dout.host, q, q + k, q + v, host_out, host_lse, s.B, s.T, s.NH,
                           s.NKV, s.HD, cudnn_row(s));
    gpu_check_same(name, dqkv, twice); // neither has a NaN
    cudnn_check_parts(name, got, want, s, only_v);
    cudnn_attention_fast = true;
    if (cudnn_supported(name, s, true)) {
        GpuArray fast = cudnn_backward(&dout, &qkv, &out, &lse, s);
        float* got_fast = gpu_read(&fast, 0, fast.n);
        snprintf(label, sizeof label, "%s fast", name);
        gpu_check_same(label, fast, fast); // no NaN
        cudnn_check_parts(label, got_fast, want, s, only_v);
        free(got_fast), gpu_free(&fast);
    }
    cudnn_attention_fast = false;
    gpu_check_unchanged(name, dout);
    free(host_out), free(host_lse), free(got), free(want);
    gpu_free(&dout), gpu_free(&dqkv), gpu_free(&twice);
}

static void cudnn_check_shape(const char* name, AttentionShape s, GpuArray qkv, bool only_v) {
    const bool backward = s.T > 1;
    Error why;
    gpu_expect(backward || !cudnn_attention_supports(s, true, &why), "%s: a backward pass of one token is refused",
               name);
    if (!cudnn_supported(name, s, backward)) return;
    GpuArray out = gpu_poison((size_t)s.B * s.T * s.NH * s.HD);
    GpuFloats lse = gpu_poison_floats((size_t)s.B * s.T * s.NH);
    cudnn_check_forward(name, s, out, lse, qkv);
    if (backward) cudnn_check_backward(name, s, out, lse, qkv, only_v);
    gpu_check_unchanged(name, qkv);
    gpu_free(&out), gpu_free(&lse);
}

static void cudnn_test_shapes(void) {
    // B, T, NH, NKV, HD
    const AttentionShape shapes[] = { { 1, 64, 4, 4, 64 },    { 3, 128, 8, 2, 64 },   { 2, 256, 4, 2, 32 },
                                      { 2, 256, 6, 2, 48 },   { 1, 200, 4, 1, 128 },  { 3, 200, 6, 2, 64 },
                                      { 1, 1000, 8, 2, 128 }, { 3, 1000, 4, 2, 64 },  { 3, 64, 4, 2, 128 },
                                      { 1, 2, 2, 1, 64 },     { 2, 1024, 8, 4, 128 }, { 2, 77, 3, 3, 64 },
                                      { 3, 1, 4, 2, 64 } };
    for (const AttentionShape& s : shapes) {
        if (gpu_reduced && s.T > 256) continue;
        char name[64];
        snprintf(name, sizeof name, "cudnn B %d T %d NH %d NKV %d HD %d", s.B, s.T, s.NH, s.NKV, s.HD);
        GpuArray qkv = gpu_random((size_t)s.B * s.T * cudnn_row(s), 3, 1);
        cudnn_check_shape(name, s, qkv, false);
        gpu_free(&qkv);
    }
}

// one sequence and one kv head at a time: of ds, a kv head has 384 KB
static void cudnn_test_pieces(void) {
    const size_t limit = cudnn_attention_limit;
    const AttentionShape s = { 3, 200, 6, 2, 64 };
    cudnn_attention_limit = 512 << 10;
    GpuArray qkv = gpu_random((size_t)s.B * s.T * cudnn_row(s), 5, 1);
    cudnn_check_shape("cudnn in pieces", s, qkv, false);
    gpu_free(&qkv);
    cudnn_attention_limit = limit;
}

// every score is about -120, and lse with it: beyond a sequence's end lies a score of 0, e^120 times as likely
static void cudnn_test_low_scores(void) {
    const int lengths[] = { 64, 192, 200, 256, 1000 };
    for (int T : lengths) {
        if (gpu_reduced && T > 256) continue;
        char name[64];
        const AttentionShape s = { 2, T, 4, 2, 64 };
        const size_t row = cudnn_row(s), n = (size_t)s.B * s.T * row;
        snprintf(name, sizeof name, "cudnn scores of -120, T %d", T);
        float* x = (float*)allocate(n, sizeof *x);
        for (size_t i = 0; i < n; i++) {
            const size_t head = i % row / s.HD;
            const bool q = head < (size_t)s.NH, k = !q && head < (size_t)(s.NH + s.NKV), first = i % s.HD == 0;
            x[i] = first && q ? 1 : first && k ? -960 : random_normal(11, 0, i) * (q || k ? 0.1f : 1);
        }
        GpuArray qkv = gpu_upload(x, n);
        cudnn_check_shape(name, s, qkv, true);
        gpu_free(&qkv), free(x);
    }
}

// llama3.2-1B, 8 x 2048, where blocks outnumber what runs at once: the same bits twice, and close to the fast variant's
static void cudnn_test_large(void) {
    const AttentionShape s = { 8, 2048, 32, 8, 64 };
    const size_t rows = (size_t)s.B * s.T, n = rows * cudnn_row(s), n_out = rows * s.NH * s.HD;
    if (gpu_reduced || !gpu_has_room("cudnn large", (size_t)4 << 30) || !cudnn_supported("cudnn large", s, true))
        return;
    GpuArray qkv = gpu_poison(n), out = gpu_poison(n_out), dout = gpu_poison(n_out);
    GpuFloats lse = gpu_poison_floats(rows * s.NH);
    gpu_fill(&qkv, 0, n, 13, 1), gpu_fill(&dout, 0, n_out, 17, 1);
    cudnn_forward(&out, &lse, &qkv, s);
    GpuArray dqkv = cudnn_backward(&dout, &qkv, &out, &lse, s), twice = cudnn_backward(&dout, &qkv, &out, &lse, s);
    gpu_check_same("cudnn large", dqkv, twice);
    cudnn_attention_fast = true;
    if (cudnn_supported("cudnn large, fast", s, true)) {
        GpuArray fast = cudnn_backward(&dout, &qkv, &out, &lse, s);
        float *got = gpu_read(&fast, 0, n), *want = gpu_read(&dqkv, 0, n);
        cudnn_check_parts("cudnn large, fast", got, want, s, false);
        free(got), free(want), gpu_free(&fast);
    }
    cudnn_attention_fast = false;
    gpu_free(&qkv), gpu_free(&out), gpu_free(&dout), gpu_free(&lse), gpu_free(&dqkv), gpu_free(&twice);
}

static void test_attention_cudnn(void) {
    cudnn_test_shapes();
    cudnn_test_pieces();
    cudnn_test_low_scores();
    cudnn_test_large();
}
#else
static void test_attention_cudnn(void) {
    gpu_expect(true, "built without cuDNN");
    fprintf(stderr, "skipped: attention_cudnn needs USE_CUDNN=1\n");
}
#endif
