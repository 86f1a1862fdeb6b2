/*
The ops in float, as the programs run them: the same bits for any number of threads, an exp that is exact enough, numbers so
large that a careless softmax overflows, NaN that stays visible, 16-bit tables at odd addresses.
*/
#include <math.h>
#include <omp.h>

#include "test.h"
#include "llmc/adamw.h"
#include "llmc/attention.h"
#include "llmc/check.h"
#include "llmc/cross_entropy.h"
#include "llmc/dtype.h"
#include "llmc/embedding.h"
#include "llmc/error.h"
#include "llmc/exp.h"
#include "llmc/matmul.h"
#include "llmc/random.h"
#include "llmc/repeat_kv.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
#include "llmc/swiglu.h"

// n random numbers, normal with standard deviation 1, the same for the same stream; owned by the caller
static float* random_array(uint64_t stream, size_t n) {
    float* x = allocate(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = random_normal(2, stream, i);
    return x;
}

static Tensor tensor_of(float* data) { return (Tensor){ data, DTYPE_F32 }; }

// ---- the same bits for any number of threads ---------------------------------------------------

// Each runs one op, forward and backward, on the same inputs every time, and writes everything it computes into out, which
// begins as random numbers; returns how many. Sizes are past every "worth a thread" limit and divide into nothing
typedef size_t Run(float* out);

static size_t run_embedding(float* out) {
    enum { N = 500, V = 40, C = 100 };
    float* dx = random_array(1, N * C);
    int32_t ids[N];
    for (int n = 0; n < N; n++) ids[n] = (int32_t)(random_bits(2, 2, n) % V);
    embedding_backward_cpu(out, dx, ids, N, C);
    embedding_forward_cpu(out + V * C, ids, tensor_of(out), N, C);
    free(dx);
    return V * C + N * C;
}

static size_t run_rmsnorm(float* out) {
    enum { N = 301, C = 100 };
    float *x = random_array(1, N * C), *w = random_array(2, C), *dy = random_array(3, N * C), *r = out, *y = r + N;
    rmsnorm_forward_cpu(y, r, x, w, N, C, 1e-5f);
    rmsnorm_backward_cpu(y + N * C, y + 2 * N * C, dy, x, w, r, N, C);
    free(x), free(w), free(dy);
    return N + 2 * N * C + C;
}

static size_t run_matmul(float* out) {
    enum { N = 301, C = 100, OC = 203 };
    float *x = random_array(1, N * C), *w = random_array(2, OC * C), *dy = random_array(3, N * OC);
    matmul_forward_cpu(out, OC, x, tensor_of(w), N, C, OC);
    matmul_backward_cpu(out + N * OC, true, out + N * OC + N * C, dy, x, tensor_of(w), N, C, OC);
    free(x), free(w), free(dy);
    return N * OC + N * C + OC * C;
}

static size_t run_rope(float* out) {
    enum { B = 3, T = 50, HEADS = 3, HD = 10, LD = 37, ALL = B * T * LD };
    float table[2 * T * HD];
    rope_table_cpu(table, table + T * HD, T, HD, 500000, 8, 1, 4, 16);
    rope_forward_cpu(out, table, table + T * HD, B, T, 0, HEADS, HD, LD);
    rope_backward_cpu(out + ALL, table, table + T * HD, B, T, 0, HEADS, HD, LD);
    return 2 * ALL;
}

static size_t run_repeat_kv(float* out) {
    enum { N = 301, NH = 6, NKV = 2, HD = 5 };
    float *x = random_array(1, N * NKV * HD), *dy = random_array(2, N * NH * HD);
    repeat_kv_forward_cpu(out, x, N, NH, NKV, HD);
    repeat_kv_backward_cpu(out + N * NH * HD, dy, N, NH, NKV, HD);
    free(x), free(dy);
    return N * (NH + NKV) * HD;
}

static size_t run_attention(float* out) {
    enum { B = 2, T = 203, NH = 6, NKV = 2, HD = 12, LD = (NH + 2 * NKV) * HD, K = NH * HD, VALUES = K + NKV * HD };
    enum { ROWS = B * T * NH, ALL = ROWS * HD };
    float *qkv = random_array(1, B * T * LD), *dout = random_array(2, ALL), *lse = out + ALL, *d = lse + ROWS;
    attention_forward_cpu(out, lse, qkv, qkv + K, qkv + VALUES, B, T, T, 0, NH, NKV, HD, LD, LD);
    attention_backward_cpu(d, d + K, d + VALUES, dout, qkv, qkv + K, qkv + VALUES, out, lse, B, T, NH, NKV, HD, LD);
    free(qkv), free(dout);
    return ALL + ROWS + B * T * LD;
}

static size_t run_swiglu(float* out) {
    enum { N = 301, F = 100 };
    float *gate_up = random_array(1, 2 * N * F), *dy = random_array(2, N * F);
    swiglu_forward_cpu(out, gate_up, N, F);
    swiglu_backward_cpu(out + N * F, dy, gate_up, N, F);
    free(gate_up), free(dy);
    return 3 * N * F;
}

static size_t run_lm_head(float* out) {
    enum { N = 1500, C = 20, V = 203 }; // two chunks
    float *x = random_array(1, N * C), *w = random_array(2, V * C),
          *scratch = allocate(lm_head_scratch(V), sizeof(float));
    int32_t labels[N];
    for (int n = 0; n < N; n++) labels[n] = n % 7 ? n % V : IGNORED_LABEL;
    out[0] = (float)lm_head_loss_cpu(out + 1, out + 1 + N * C, x, tensor_of(w), labels, 1e-3f, N, C, V, scratch);
    free(x), free(w), free(scratch);
    return 1 + N * C + V * C;
}

static size_t run_adamw(float* out) {
    enum { N = 20011 };
    float *g = random_array(1, N), *w = out, *m = out + N, *v = out + 2 * N;
    for (int i = 0; i < N; i++) v[i] = fabsf(v[i]);
    adamw_cpu(w, m, v, g, N, 1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 3, 0.5f);
    double sum = sum_of_squares_cpu(g, N);
    memcpy(out + 3 * N, &sum, sizeof sum);
    free(g);
    return 3 * N + 2;
}

static void test_threads(void** state) {
    (void)state;
    const struct {
        const char* name;
        Run* run;
    } ops[] = { { "embedding", run_embedding }, { "rmsnorm", run_rmsnorm },     { "matmul", run_matmul },
                { "rope", run_rope },           { "repeat_kv", run_repeat_kv }, { "attention", run_attention },
                { "swiglu", run_swiglu },       { "lm_head", run_lm_head },     { "adamw", run_adamw } };
    const int threads[] = { 1, 2, 8, 8, 3 };
    const size_t most = 200000;
    const int before = omp_get_max_threads();
    for (size_t o = 0; o < sizeof ops / sizeof ops[0]; o++) {
        float* first = NULL;
        for (size_t t = 0; t < sizeof threads / sizeof threads[0]; t++) {
            omp_set_num_threads(threads[t]);
            int team = 0;
#pragma omp parallel
#pragma omp single
            team = omp_get_num_threads();
            assert_int_equal(team, threads[t]);
            float *out = random_array(9, most), *start = random_array(9, most);
            size_t n = ops[o].run(out);
            assert_true(n > 0 && n <= most);
            assert_memory_not_equal(out, start, n * sizeof *out);
            assert_memory_equal(out + n, start + n, (most - n) * sizeof *out);
            if (first && memcmp(out, first, n * sizeof *out) != 0)
                test_fail("%s: %d threads give other bits than 1", ops[o].name, threads[t]);
            free(start);
            if (first)
                free(out);
            else
                first = out;
        }
        free(first);
    }
    omp_set_num_threads(before);
}

// ---- exp -------------------------------------------------------------------------------------

// a sample of all floats, subnormal results included, in units of the last place
static void test_exp(void** state) {
    (void)state;
    enum { N = 4096 };
    float x[N], y[N];
    double worst = 0;
    size_t compared = 0;
    for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += (uint64_t)N * 257) {
        for (int i = 0; i < N; i++) x[i] = float_from_bits((uint32_t)(bits + (uint64_t)i * 257));
        for (int i = 0; i < N; i++) y[i] = exp32(x[i]);
        for (int i = 0; i < N; i++) {
            double want = exp((double)x[i]);
            float rounded = (float)want;
            if (isnan(x[i]) || rounded == 0 || isinf(rounded)) {
                if (isnan(x[i]) ? !isnan(y[i]) : y[i] != rounded) test_fail("exp32(%g) = %g", x[i], y[i]);
                continue;
            }
            int exponent;
            frexp(want, &exponent);
            double error = fabs(y[i] - want) / ldexp(1, (exponent < -125 ? -125 : exponent) - 24);
            if (!(error <= worst)) worst = error;
            compared++;
        }
    }
    print_message("exp32: worst error %.3f units in the last place over %zu numbers\n", worst, compared);
    assert_true(worst <= 1.1 && compared > 1000000);
    assert_true(exp32(-INFINITY) == 0 && exp32(INFINITY) == INFINITY && exp32(0) == 1 && isnan(exp32(NAN)));
}

// ---- huge numbers and NaN ------------------------------------------------------------------------

// one score of 10^6 among ordinary ones: all weight is its, in whatever tile it lies, and gradients stay finite
static void test_attention_huge(void** state) {
    (void)state;
    enum { T = 150, HD = 4, ALL = T * HD };
    for (int huge = 0; huge < T; huge += 37) {
        float *q = random_array(1, ALL), *k = random_array(2, ALL), *v = random_array(3, ALL),
              *dout = random_array(4, ALL);
        float out[ALL], lse[T], dq[ALL], dk[ALL], dv[ALL];
        for (int t = 0; t < T; t++) q[t * HD] = 1000;
        k[huge * HD] = 2000;
        for (int t = 0; t < T; t++)
            if (t != huge) k[t * HD] = -2000 + (float)t;
        attention_forward_cpu(out, lse, q, k, v, 1, T, T, 0, 1, 1, HD, HD, HD);
        attention_backward_cpu(dq, dk, dv, dout, q, k, v, out, lse, 1, T, 1, 1, HD, HD);
        for (int t = huge; t < T; t++) assert_memory_equal(out + t * HD, v + huge * HD, HD * sizeof *v);
        for (int t = 0; t < huge; t++) assert_memory_equal(out + t * HD, v + t * HD, HD * sizeof *v);
        for (int i = 0; i < ALL; i++) assert_true(isfinite(dq[i]) && isfinite(dk[i]) && isfinite(dv[i]));
        free(q), free(k), free(v), free(dout);
    }
}

// a NaN in one query, key or value reaches every row that uses it and no other, but for a value: the rest of its tile
// multiplies it by 0
static void test_attention_nan(void** state) {
    (void)state;
    enum { T = 100, HD = 4, ALL = T * HD, BAD = 70 };
    for (int which = 0; which < 3; which++) {
        float* qkv[] = { random_array(1, ALL), random_array(2, ALL), random_array(3, ALL) };
        float out[ALL];
        qkv[which][BAD * HD + 1] = NAN;
        attention_forward_cpu(out, NULL, qkv[0], qkv[1], qkv[2], 1, T, T, 0, 1, 1, HD, HD, HD);
        for (int t = 0; t < T; t++) {
            bool tile = which == 2 && t < BAD && t >= BAD / ATTENTION_QUERIES * ATTENTION_QUERIES;
            if (!tile && (which == 0 ? t == BAD : t >= BAD) != (bool)isnan(out[t * HD + 1]))
                test_fail("NaN in %c of position %d: row %d holds %g", "qkv"[which], BAD, t, out[t * HD + 1]);
        }
        free(qkv[0]), free(qkv[1]), free(qkv[2]);
    }
}

static void test_cross_entropy_huge(void** state) {
    (void)state;
    enum { V = 100, HUGE_ONE = 63 };
    const int32_t labels[] = { HUGE_ONE, 5, HUGE_ONE, 2 };
    float *logits = random_array(1, 4 * V), losses[4];
    logits[HUGE_ONE] = logits[V + HUGE_ONE] = 1e30f;
    for (int v = 0; v < V; v++) logits[2 * V + v] = v == HUGE_ONE ? -1e30f : -3e38f; // all far below zero
    logits[3 * V + 50] = NAN;
    cross_entropy_cpu(losses, logits, labels, 1, true, 4, V, V);
    assert_true(losses[0] == 0 && losses[1] > 0.99e30f && losses[1] < 1.01e30f && losses[2] == 0 && isnan(losses[3]));
    for (int v = 0; v < V; v++) {
        assert_true(logits[v] == 0 && logits[2 * V + v] == 0);
        assert_true(logits[V + v] == (v == HUGE_ONE) - (v == 5));
        assert_true(isnan(logits[3 * V + v]));
    }
    free(logits);
}

static void test_swiglu_huge(void** state) {
    (void)state;
    float gate_up[] = { 1e4f, -1e4f, NAN, 0, 2, 2, 2, 2 }, y[4], d[8], dy[] = { 1, 1, 1, 1 };
    swiglu_forward_cpu(y, gate_up, 1, 4);
    assert_true(y[0] == 2e4f && y[1] == 0 && isnan(y[2]) && y[3] == 0);
    swiglu_backward_cpu(d, dy, gate_up, 1, 4);
    assert_true(d[0] == 2 && d[1] == 0 && isnan(d[2]) && d[3] == 1);
    assert_true(d[4] == 1e4f && d[5] == 0 && isnan(d[6]) && d[7] == 0);
}

static void test_sum_of_squares_nan(void** state) {
    (void)state;
    float* g = random_array(1, 10000);
    g[4321] = 3e38f; // its square is no float
    double sum = sum_of_squares_cpu(g, 10000);
    assert_true(sum > 8.9e76 && sum < 9.1e76);
    g[9999] = -INFINITY;
    assert_true(isinf(sum_of_squares_cpu(g, 10000)));
    g[0] = NAN;
    assert_true(isnan(sum_of_squares_cpu(g, 10000)));
    free(g);
}

// ---- against others ------------------------------------------------------------------------------

// ten steps of torch.optim.AdamW (2.13, fp32) with lr 1e-3, betas 0.9 and 0.95, eps 1e-8, weight decay 0.1, on the gradients
// below
static void test_adamw_torch(void** state) {
    (void)state;
    enum { N = 6 };
    float w[N] = { 1, -0.5f, 0.25f, 3, -0.001f, 0 }, m[N] = { 0 }, v[N] = { 0 }, g[N];
    const float want[N] = { 0x1.ff3118p-1f, -0x1.00eed0p-1f, 0x1.fdf3ccp-3f,
                            0x1.7fefe8p+1f, -0x1.235d12p-8f, 0x1.77f07ap-9f };
    for (int step = 1; step <= 10; step++) {
        for (int i = 0; i < N; i++) g[i] = (float)((i * 7 + step * 5) % 13 - 6) / 64;
        adamw_cpu(w, m, v, g, N, 1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, step, 1);
    }
    assert_true(check_close("adamw", w, want, N, 1e-7));
}

// rows of an embedding that lies in a file as 16-bit numbers, or as floats, one byte off any boundary
static void test_embedding_storage(void** state) {
    (void)state;
    enum { V = 7, C = 33, N = 4 };
    const int32_t ids[N] = { 6, 0, 3, 6 };
    float *w = random_array(1, V * C), x[N * C];
    char* file = allocate(V * C * 4 + 1, 1);
    for (int dtype = DTYPE_F32; dtype <= DTYPE_F16; dtype++) {
        Tensor table = { file + 1, (Dtype)dtype };
        for (int i = 0; i < V * C; i++) {
            uint16_t half = dtype == DTYPE_BF16 ? float_to_bf16(w[i]) : float_to_f16(w[i]);
            memcpy(file + 1 + i * dtype_bytes(table.dtype), dtype == DTYPE_F32 ? (void*)&w[i] : (void*)&half,
                   dtype_bytes(table.dtype));
        }
        embedding_forward_cpu(x, ids, table, N, C);
        for (int i = 0; i < N * C; i++) {
            float from = w[ids[i / C] * C + i % C], want = dtype == DTYPE_F32    ? from
                                                           : dtype == DTYPE_BF16 ? bf16_to_float(float_to_bf16(from))
                                                                                 : f16_to_float(float_to_f16(from));
            assert_true(x[i] == want);
        }
    }
    free(w), free(file);
}

// far positions: the angle must not have been rounded to float on the way
static void test_rope_far(void** state) {
    (void)state;
    enum { POSITIONS = 100001, HD = 4, HALF = HD / 2 };
    float *c = allocate((size_t)POSITIONS * HALF, sizeof *c), *s = allocate((size_t)POSITIONS * HALF, sizeof *s);
    rope_table_cpu(c, s, POSITIONS, HD, 500000, 1, 1, 4, 8192);
    for (int p = 99990; p < POSITIONS; p++)
        for (int i = 0; i < HALF; i++) {
            double angle = p * pow(500000, -2.0 * i / HD);
            assert_true(fabs(c[(size_t)p * HALF + i] - cos(angle)) < 1e-7);
            assert_true(fabs(s[(size_t)p * HALF + i] - sin(angle)) < 1e-7);
        }
    free(c), free(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_attention_huge),
        cmocka_unit_test(test_attention_nan),
        cmocka_unit_test(test_cross_entropy_huge),
        cmocka_unit_test(test_swiglu_huge),
        cmocka_unit_test(test_sum_of_squares_nan),
        cmocka_unit_test(test_adamw_torch),
        cmocka_unit_test(test_embedding_storage),
        cmocka_unit_test(test_rope_far),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
