/*
Attention's back ends against the CPU's and against each other; cuDNN's has more in test_attention_cudnn.cuh.

Tolerances      out: p is rounded before it is multiplied, out when stored. dq, dk, dv: p, ds (with p rounded in it), the sum.
                lse is fp32 whatever floatX is: sums in another order, powers to 2^-22. Two back ends each have their own
                roundings. The CPU's backward pass is given the GPU's out and lse, so that only the pass itself is compared
*/
#pragma once

#include "gpu_test.cuh"
#include "llmc/attention.h"

static const double ATTENTION_OUT = 2, ATTENTION_GRADIENT = 4, ATTENTION_LSE = 1e-5; // roundings; relative

static size_t attention_row(AttentionShape s) { return (size_t)(s.NH + 2 * s.NKV) * s.HD; } // numbers in a row of qkv
static size_t attention_rows(AttentionShape s) { return (size_t)s.B * s.T; }
static size_t attention_k(AttentionShape s) { return (size_t)s.NH * s.HD; } // where k begins in a row
static size_t attention_v(AttentionShape s) { return (size_t)(s.NH + s.NKV) * s.HD; }

static bool attention_accepts(AttentionBackend backend, AttentionShape s) {
    Error why;
    if (gpu_ours && backend != ATTENTION_MMA && backend != ATTENTION_HOPPER) return false;
    return attention_built_with(backend) && attention_supports(backend, s, true, &why);
}

// dq, dk and dv each by their own scale. One key has p = 1 and so dq = dk = 0, of which sums in any order leave dust
// only_v: dq and dk need only be finite, they are small differences of large numbers
static void attention_check_gradients(const char* name, const float* got, const float* want, AttentionShape s, bool only_v,
                                      double tolerance) {
    const size_t row = attention_row(s), first[] = { 0, attention_k(s), attention_v(s), row };
    for (int part = 0; part < 3; part++) {
        char label[128];
        const size_t width = first[part + 1] - first[part], n = attention_rows(s) * width;
        float *x = (float*)allocate(n, sizeof *x), *y = (float*)allocate(n, sizeof *y);
        for (size_t i = 0; i < n; i++) {
            const size_t at = i / width * row + first[part] + i % width;
            x[i] = got[at], y[i] = s.T == 1 && part < 2 ? 0 : want[at];
        }
        snprintf(label, sizeof label, "%s d%c", name, "qkv"[part]);
        if (only_v && part < 2) memcpy(y, x, n * sizeof *y);
        gpu_check_values(label, x, y, n, tolerance);
        free(x), free(y);
    }
}

// what one back end makes of qkv and dout; in scratch that was NaN everywhere
typedef struct {
    GpuArray out, dqkv;
    GpuFloats lse;
} AttentionResult;

static AttentionResult attention_result(AttentionBackend backend, const GpuArray* qkv, const GpuArray* dout, AttentionShape s) {
    AttentionResult r = { gpu_poison(dout->n), gpu_poison(qkv->n), gpu_poison_floats(attention_rows(s) * s.NH) };
    GpuBytes scratch = gpu_scratch(attention_scratch(backend, s, false));
    attention_forward(backend, r.out.x, r.lse.x, qkv->x, s, scratch.x, 0);
    gpu_free(&scratch);
    scratch = gpu_scratch(attention_scratch(backend, s, true));
    attention_backward(backend, r.dqkv.x, dout->x, qkv->x, r.out.x, r.lse.x, s, scratch.x, scratch.n, 0);
    gpu_free(&scratch);
    return r;
}

static void attention_result_free(AttentionResult* r) { gpu_free(&r->out), gpu_free(&r->dqkv), gpu_free(&r->lse); }

// both passes of a back end against the CPU's, and the same bits again, unless dq may be added up in any order
static void attention_check_backend(AttentionBackend backend, AttentionShape s, const GpuArray* qkv, const GpuArray* dout,
                                    const char* what, bool only_v, bool any_order) {
    char name[96], label[128];
    snprintf(name, sizeof name, "%s%s B %d T %d NH %d NKV %d HD %d", attention_names[backend], what, s.B, s.T, s.NH, s.NKV, s.HD);
    const double slack = *what && sizeof(floatX) == 4 ? 10 : 1; // a score of 200 is off by 200 epsilon, in an exponent
    attention_fast(any_order);
    AttentionResult r = attention_result(backend, qkv, dout, s), again = attention_result(backend, qkv, dout, s);
    attention_fast(false);
    float *out = gpu_read(&r.out, 0, r.out.n), *lse = gpu_read(&r.lse, 0, r.lse.n), *dqkv = gpu_read(&r.dqkv, 0, r.dqkv.n);
    float *want = (float*)allocate(r.out.n, sizeof *want), *want_lse = (float*)allocate(r.lse.n, sizeof *want);
    float* gradients = (float*)allocate(r.dqkv.n, sizeof *want);
    const size_t k = attention_k(s), v = attention_v(s);
    const int row = (int)attention_row(s);
    attention_forward_cpu(want, want_lse, qkv->host, qkv->host + k, qkv->host + v, s.B, s.T, s.T, 0, s.NH, s.NKV, s.HD, row, row);
    attention_backward_cpu(gradients, gradients + k, gradients + v, dout->host, qkv->host, qkv->host + k, qkv->host + v, out, lse,
                           s.B, s.T, s.NH, s.NKV, s.HD, row);
    snprintf(label, sizeof label, "%s out", name), gpu_check(label, r.out, want, r.out.n, slack * gpu_tolerance(ATTENTION_OUT));
    snprintf(label, sizeof label, "%s lse", name), gpu_check(label, r.lse, want_lse, r.lse.n, ATTENTION_LSE);
    attention_check_gradients(name, dqkv, gradients, s, only_v, slack * gpu_tolerance(ATTENTION_GRADIENT));
    gpu_check_same(name, r.out, again.out), gpu_check_same(name, r.lse, again.lse);
    if (!any_order) gpu_check_same(name, r.dqkv, again.dqkv);
    gpu_check_unchanged(name, *qkv), gpu_check_unchanged(name, *dout);
    free(out), free(lse), free(dqkv), free(want), free(want_lse), free(gradients);
    attention_result_free(&r), attention_result_free(&again);
}

// flash against the reference, on the GPU alone: shapes that take the CPU too long
static void attention_check_flash(AttentionShape s) {
    if (!attention_accepts(ATTENTION_MMA, s)) return;
    char name[96], label[128];
    snprintf(name, sizeof name, "flash and reference B %d T %d NH %d NKV %d HD %d", s.B, s.T, s.NH, s.NKV, s.HD);
    GpuArray qkv = gpu_random(attention_rows(s) * attention_row(s), 3, 1), dout = gpu_random(attention_rows(s) * attention_k(s), 7, 1);
    AttentionResult a = attention_result(ATTENTION_MMA, &qkv, &dout, s), b = attention_result(ATTENTION_REFERENCE, &qkv, &dout, s),
                    again = attention_result(ATTENTION_MMA, &qkv, &dout, s);
    float *out = gpu_read(&b.out, 0, b.out.n), *lse = gpu_read(&b.lse, 0, b.lse.n);
    float *got = gpu_read(&a.dqkv, 0, a.dqkv.n), *want = gpu_read(&b.dqkv, 0, b.dqkv.n);
    snprintf(label, sizeof label, "%s out", name), gpu_check(label, a.out, out, a.out.n, gpu_tolerance(2 * ATTENTION_OUT));
    snprintf(label, sizeof label, "%s lse", name), gpu_check(label, a.lse, lse, a.lse.n, 2 * ATTENTION_LSE);
    attention_check_gradients(name, got, want, s, false, gpu_tolerance(2 * ATTENTION_GRADIENT));
    gpu_check_same(name, a.out, again.out), gpu_check_same(name, a.dqkv, again.dqkv);
    free(out), free(lse), free(got), free(want);
    attention_result_free(&a), attention_result_free(&b), attention_result_free(&again);
    gpu_free(&qkv), gpu_free(&dout);
}

static void attention_test_shapes(void) {
    const int lengths[] = { 1, 7, 64, 65, 128, 129, 300, 1000 };
    const struct {
        int B, NH, NKV, HD;
    } heads[] = { { 2, 4, 2, 64 }, { 3, 4, 1, 64 }, { 1, 2, 2, 64 }, { 2, 4, 2, 128 }, { 1, 3, 1, 128 }, { 2, 2, 2, 128 },
                  { 2, 4, 2, 32 }, { 2, 6, 2, 48 }, { 2, 2, 1, 40 }, { 1, 2, 1, 256 } };
    for (int T : lengths)
        for (const auto& h : heads) {
            const AttentionShape s = { h.B, T, h.NH, h.NKV, h.HD };
            if (gpu_reduced && (T > 300 || (T > 65 && h.B > 1))) continue;
            GpuArray qkv = gpu_random(attention_rows(s) * attention_row(s), 3, 1),
                     dout = gpu_random(attention_rows(s) * attention_k(s), 7, 1);
            for (int backend = 0; backend < N_ATTENTION; backend++)
                if (backend != ATTENTION_CUDNN && attention_accepts((AttentionBackend)backend, s))
                    attention_check_backend((AttentionBackend)backend, s, &qkv, &dout, "", false, false);
            if (attention_accepts(ATTENTION_HOPPER, s))
                attention_check_backend(ATTENTION_HOPPER, s, &qkv, &dout, " any order", false, true);
            gpu_free(&qkv), gpu_free(&dout);
        }
}

// scores of about -100 everywhere, which no maximum that starts at 0 survives; and one key that takes all of every row
static void attention_test_scores(void) {
    const AttentionShape s = { 2, 150, 4, 2, 64 };
    const size_t row = attention_row(s), n = attention_rows(s) * row;
    float* x = (float*)allocate(n, sizeof *x);
    for (int test = 0; test < 2; test++) {
        for (size_t i = 0; i < n; i++) {
            const size_t head = i % row / s.HD, t = i / row % s.T;
            const bool q = head < (size_t)s.NH, k = !q && head < (size_t)(s.NH + s.NKV), first = i % s.HD == 0;
            x[i] = random_normal(11, 0, i) * (first && test == 0 ? 0.01f : 1);
            if (first && q) x[i] += 4;
            if (first && k) x[i] += test == 0 ? -200 : t == 70 ? 200 : 0;
        }
        GpuArray qkv = gpu_upload(x, n), dout = gpu_random(attention_rows(s) * attention_k(s), 7, 1);
        for (int backend = 0; backend < N_ATTENTION; backend++)
            if (backend != ATTENTION_CUDNN && attention_accepts((AttentionBackend)backend, s))
                attention_check_backend((AttentionBackend)backend, s, &qkv, &dout, test ? " one large score" : " low scores", test == 0, false);
        gpu_free(&qkv), gpu_free(&dout);
    }
    free(x);
}

// a NaN in a query is seen in that query's output, and in no other's
static void attention_test_nan(void) {
    const AttentionShape s = { 1, 100, 2, 1, 64 };
    const size_t row = attention_row(s), n = attention_rows(s) * row, nan_row = 37;
    float* x = (float*)allocate(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = random_normal(13, 0, i);
    x[nan_row * row + (size_t)s.HD + 5] = NAN; // head 1
    GpuArray qkv = gpu_upload(x, n), dout = gpu_random(attention_rows(s) * attention_k(s), 7, 1);
    for (int backend = 0; backend < N_ATTENTION; backend++) {
        if (backend == ATTENTION_CUDNN || !attention_accepts((AttentionBackend)backend, s)) continue;
        AttentionResult r = attention_result((AttentionBackend)backend, &qkv, &dout, s);
        float* out = gpu_read(&r.out, 0, r.out.n);
        for (size_t i = 0; i < r.out.n; i++) {
            const bool expected = i / attention_k(s) == nan_row && i % attention_k(s) >= (size_t)s.HD;
            if (!gpu_expect(check_finite((double)out[i]) != expected, "%s: NaN in one query, out[%zu] is %g", attention_names[backend],
                            i, (double)out[i]))
                break;
        }
        free(out), attention_result_free(&r);
    }
    free(x), gpu_free(&qkv), gpu_free(&dout);
}

// arrays of more than 2^31 numbers: the last sequence against the CPU
static void attention_test_large_index(void) {
    const AttentionShape s = { 11200, 64, 32, 8, 64 }, one = { 1, 64, 32, 8, 64 };
    const size_t n = attention_rows(s) * attention_row(s), n_out = attention_rows(s) * attention_k(s), n_lse = attention_rows(s) * s.NH;
    const size_t last = n - n / s.B, last_out = n_out - n_out / s.B, last_lse = n_lse - n_lse / s.B;
    if (gpu_reduced || !attention_accepts(ATTENTION_MMA, s) || !gpu_has_room("attention large index", 4 * (n + n_out) + 8 * n_lse))
        return;
    GpuArray qkv = gpu_poison(n), dout = gpu_poison(n_out), out = gpu_poison(n_out), dqkv = gpu_poison(n);
    GpuFloats lse = gpu_poison_floats(n_lse);
    GpuBytes scratch = gpu_scratch(attention_scratch(ATTENTION_MMA, s, true));
    gpu_fill(&qkv, 0, n, 3, 1), gpu_fill(&dout, 0, n_out, 7, 1);
    attention_forward(ATTENTION_MMA, out.x, lse.x, qkv.x, s, scratch.x, 0);
    attention_backward(ATTENTION_MMA, dqkv.x, dout.x, qkv.x, out.x, lse.x, s, scratch.x, scratch.n, 0);
    float *x = gpu_read(&qkv, last, n - last), *dy = gpu_read(&dout, last_out, n_out - last_out);
    float *y = gpu_read(&out, last_out, n_out - last_out), *l = gpu_read(&lse, last_lse, n_lse - last_lse);
    float *want = (float*)allocate(n_out - last_out, sizeof *x), *gradients = (float*)allocate(n - last, sizeof *x);
    float* got = gpu_read(&dqkv, last, n - last);
    const size_t k = attention_k(s), v = attention_v(s);
    const int row = (int)attention_row(s);
    attention_forward_cpu(want, NULL, x, x + k, x + v, 1, s.T, s.T, 0, s.NH, s.NKV, s.HD, row, row);
    attention_backward_cpu(gradients, gradients + k, gradients + v, dy, x, x + k, x + v, y, l, 1, s.T, s.NH, s.NKV, s.HD, row);
    gpu_check_at("flash out, large index", out, last_out, want, n_out - last_out, gpu_tolerance(ATTENTION_OUT));
    attention_check_gradients("flash, large index", got, gradients, one, false, gpu_tolerance(ATTENTION_GRADIENT));
    free(x), free(dy), free(y), free(l), free(want), free(gradients), free(got);
    gpu_free(&qkv), gpu_free(&dout), gpu_free(&out), gpu_free(&dqkv), gpu_free(&lse), gpu_free(&scratch);
}

static void test_attention(void) {
    attention_test_shapes();
    attention_test_scores();
    attention_test_nan();
    attention_test_large_index();
    if (gpu_reduced) return;
    attention_check_flash(AttentionShape{ 2, 2048, 32, 8, 64 }); // blocks outnumber what runs at once
    attention_check_flash(AttentionShape{ 1, 4000, 24, 8, 128 });
    attention_check_flash(AttentionShape{ 33, 130, 6, 1, 64 });
}
