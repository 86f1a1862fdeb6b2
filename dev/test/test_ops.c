/*
Every op against its formula and against finite differences: the first rung. The headers of llmc/ are compiled here in
double, so that a missing term has nowhere to hide: agreement is to 1e-6 of the scale or the test fails.

    loss = sum(dy * y) for random dy; its gradient by the op's backward must equal (loss(x + h) - loss(x - h)) / 2h

Backward functions that add must add: their gradients start from random numbers, which are taken off again. Outputs that
are overwritten start as NaN.
*/
#include <math.h>
#include <omp.h>

#include "test.h"
#include "llmc/dtype.h"
#include "llmc/error.h"
#include "llmc/exp.h"
#include "llmc/random.h"

// from here on the project's float is double. What really is a float (files, random numbers, the bits of exp32) was
// included above
#define float double
#define sqrtf sqrt
#define expf exp
#define logf log
#define powf pow
#define fabsf fabs
#define fmaxf fmax
#define exp32 exp
#include "llmc/check.h"
#include "llmc/adamw.h"
#include "llmc/attention.h"
#include "llmc/cross_entropy.h"
#include "llmc/embedding.h"
#include "llmc/matmul.h"
#include "llmc/repeat_kv.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
#include "llmc/swiglu.h"

static const double TOLERANCE = 1e-6, H = 1e-5;

// n random numbers, normal with standard deviation 1; owned by the caller
static double* random_array(size_t n) {
    static uint64_t stream = 0;
    double* x = allocate(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = random_normal(1, stream, i);
    stream++;
    return x;
}

// n times NaN: what an op that overwrites must leave nothing of; owned by the caller
static double* nan_array(size_t n) {
    double* x = allocate(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = NAN;
    return x;
}

// n random tokens below V; owned by the caller
static int32_t* random_ids(size_t n, int V) {
    static uint64_t stream = 1000000;
    int32_t* ids = allocate(n, sizeof *ids);
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(random_bits(1, stream, i) % (uint64_t)V);
    stream++;
    return ids;
}

static double* copy_of(const double* x, size_t n) {
    double* y = allocate(n, sizeof *y);
    memcpy(y, x, n * sizeof *y);
    return y;
}

static Tensor tensor_of(double* data) { return (Tensor){ data, DTYPE_F32 }; }

static double dot(const double* a, const double* b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

typedef double LossFn(void* problem);

// got is what backward added to a gradient that began as start (NULL: what it wrote): it must be the slope of loss in each
// of the n numbers at x
static void check_gradient(const char* name, double* x, const double* got, const double* start, size_t n, LossFn* loss,
                           void* problem) {
    double *slope = allocate(n, sizeof *slope), *added = allocate(n, sizeof *added);
    for (size_t i = 0; i < n; i++) {
        double kept = x[i];
        x[i] = kept + H;
        double above = loss(problem);
        x[i] = kept - H;
        double below = loss(problem);
        x[i] = kept;
        slope[i] = (above - below) / (2 * H);
        added[i] = got[i] - (start ? start[i] : 0);
    }
    bool ok = check_close(name, added, slope, n, TOLERANCE);
    free(slope), free(added);
    if (!ok) test_fail("%s: the backward pass is not the gradient of the forward pass", name);
}

static void check_equal(const char* name, const double* got, const double* want, size_t n) {
    if (!check_close(name, got, want, n, TOLERANCE)) test_fail("%s: not what the formula says", name);
}

// ---- rmsnorm ---------------------------------------------------------------------------------

typedef struct {
    int N, C;
    double *x, *w, *y, *r, *dy;
} RmsnormProblem;

static double rmsnorm_loss(void* problem) {
    RmsnormProblem* p = problem;
    rmsnorm_forward_cpu(p->y, p->r, p->x, p->w, p->N, p->C, 1e-5);
    return dot(p->y, p->dy, (size_t)p->N * p->C);
}

static void test_rmsnorm(void** state) {
    (void)state;
    const int shapes[][2] = { { 1, 1 }, { 1, 8 }, { 3, 33 }, { 5, 64 }, { 2, 100 } };
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        int N = shapes[s][0], C = shapes[s][1];
        size_t n = (size_t)N * C;
        RmsnormProblem p = {
            N, C, random_array(n), random_array(C), random_array(n), random_array(N), random_array(n)
        };
        double *dx = random_array(n), *dw = random_array(C), *dx_start = copy_of(dx, n), *dw_start = copy_of(dw, C);
        rmsnorm_loss(&p);
        rmsnorm_backward_cpu(dx, dw, p.dy, p.x, p.w, p.r, N, C);
        check_gradient("rmsnorm dx", p.x, dx, dx_start, n, rmsnorm_loss, &p);
        check_gradient("rmsnorm dw", p.w, dw, dw_start, C, rmsnorm_loss, &p);
        free(p.x), free(p.w), free(p.y), free(p.r), free(p.dy);
        free(dx), free(dw), free(dx_start), free(dw_start);
    }
}

// ---- embedding -------------------------------------------------------------------------------

typedef struct {
    int N, V, C;
    int32_t* ids;
    double *w, *x, *dx;
} EmbeddingProblem;

static double embedding_loss(void* problem) {
    EmbeddingProblem* p = problem;
    embedding_forward_cpu(p->x, p->ids, tensor_of(p->w), p->N, p->C);
    return dot(p->x, p->dx, (size_t)p->N * p->C);
}

static void test_embedding(void** state) {
    (void)state;
    const int shapes[][3] = {
        { 1, 1, 1 }, { 1, 3, 8 }, { 40, 7, 33 }, { 9, 2, 100 }
    }; // more tokens than rows: repeats
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        int N = shapes[s][0], V = shapes[s][1], C = shapes[s][2];
        size_t n = (size_t)N * C, table = (size_t)V * C;
        EmbeddingProblem p = { N, V, C, random_ids(N, V), random_array(table), nan_array(n), random_array(n) };
        double *dw = random_array(table), *dw_start = copy_of(dw, table);
        embedding_loss(&p);
        for (int i = 0; i < N; i++)
            assert_memory_equal(p.x + (size_t)i * C, p.w + (size_t)p.ids[i] * C, C * sizeof *p.x);
        embedding_backward_cpu(dw, p.dx, p.ids, N, C);
        check_gradient("embedding dw", p.w, dw, dw_start, table, embedding_loss, &p);
        free(p.ids), free(p.w), free(p.x), free(p.dx), free(dw), free(dw_start);
    }
}

// ---- matmul ----------------------------------------------------------------------------------

typedef struct {
    int N, C, OC, ldy;
    double *x, *w, *y, *dy;
} MatmulProblem;

static double matmul_loss(void* problem) {
    MatmulProblem* p = problem;
    matmul_forward_cpu(p->y, p->ldy, p->x, tensor_of(p->w), p->N, p->C, p->OC);
    double sum = 0;
    for (int n = 0; n < p->N; n++) sum += dot(p->y + (size_t)n * p->ldy, p->dy + (size_t)n * p->OC, p->OC);
    return sum;
}

static void test_matmul(void** state) {
    (void)state;
    const int shapes[][4] = { { 1, 1, 1, 1 }, { 1, 33, 5, 5 }, { 3, 8, 17, 20 }, { 9, 50, 49, 49 }, { 17, 5, 3, 3 } };
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        int N = shapes[s][0], C = shapes[s][1], OC = shapes[s][2], ldy = shapes[s][3];
        size_t nx = (size_t)N * C, nw = (size_t)OC * C;
        MatmulProblem p = {
            N, C, OC, ldy, random_array(nx), random_array(nw), nan_array((size_t)N * ldy), random_array((size_t)N * OC)
        };
        double *dx = random_array(nx), *dw = random_array(nw), *dx_start = copy_of(dx, nx), *dw_start = copy_of(dw, nw);
        matmul_loss(&p);
        for (int n = 0; n < N; n++)
            for (int o = OC; o < ldy; o++) assert_true(isnan(p.y[(size_t)n * ldy + o])); // beyond the row: not ours
        matmul_backward_cpu(dx, true, dw, p.dy, p.x, tensor_of(p.w), N, C, OC);
        check_gradient("matmul dx, added", p.x, dx, dx_start, nx, matmul_loss, &p);
        check_gradient("matmul dw", p.w, dw, dw_start, nw, matmul_loss, &p);
        for (size_t i = 0; i < nx; i++) dx[i] = NAN;
        matmul_backward_cpu(dx, false, NULL, p.dy, p.x, tensor_of(p.w), N, C, OC);
        check_gradient("matmul dx, overwritten", p.x, dx, NULL, nx, matmul_loss, &p);
        free(p.x), free(p.w), free(p.y), free(p.dy), free(dx), free(dw), free(dx_start), free(dw_start);
    }
}

// ---- rope ------------------------------------------------------------------------------------

typedef struct {
    int B, T, pos, heads, HD, ldx;
    double *cos, *sin, *x, *y, *dy;
} RopeProblem;

static double rope_loss(void* problem) {
    RopeProblem* p = problem;
    size_t n = (size_t)p->B * p->T * p->ldx;
    memcpy(p->y, p->x, n * sizeof *p->y);
    rope_forward_cpu(p->y, p->cos, p->sin, p->B, p->T, p->pos, p->heads, p->HD, p->ldx);
    return dot(p->y, p->dy, n);
}

// number i of head h in row (b, t), turned as the formula says, in complex numbers
static double rope_expected(const RopeProblem* p, int b, int t, int h, int i) {
    int half = p->HD / 2, pair = i % half;
    const double* x = p->x + ((size_t)b * p->T + t) * p->ldx + (size_t)h * p->HD;
    double angle = (p->pos + t) * pow(500, -2.0 * pair / p->HD);
    double re = x[pair], im = x[pair + half];
    return i < half ? re * cos(angle) - im * sin(angle) : re * sin(angle) + im * cos(angle);
}

static void test_rope(void** state) {
    (void)state;
    const int shapes[][6] = {
        { 1, 1, 0, 1, 2, 2 }, { 2, 3, 0, 2, 6, 17 }, { 1, 5, 11, 3, 32, 100 }, { 3, 2, 1, 1, 10, 10 }
    };
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        int B = shapes[s][0], T = shapes[s][1], pos = shapes[s][2], heads = shapes[s][3], HD = shapes[s][4];
        int ldx = shapes[s][5];
        size_t n = (size_t)B * T * ldx, table = (size_t)(pos + T) * (HD / 2);
        RopeProblem p = { B,
                          T,
                          pos,
                          heads,
                          HD,
                          ldx,
                          nan_array(table),
                          nan_array(table),
                          random_array(n),
                          nan_array(n),
                          random_array(n) };
        rope_table_cpu(p.cos, p.sin, pos + T, HD, 500, 1, 1, 4, 8192);
        rope_loss(&p);
        double* want = copy_of(p.x, n); // beyond the heads nothing changes
        for (int b = 0; b < B; b++)
            for (int t = 0; t < T; t++)
                for (int i = 0; i < heads * HD; i++)
                    want[((size_t)b * T + t) * ldx + i] = rope_expected(&p, b, t, i / HD, i % HD);
        check_equal("rope", p.y, want, n);
        double* dx = copy_of(p.dy, n);
        rope_backward_cpu(dx, p.cos, p.sin, B, T, pos, heads, HD, ldx);
        check_gradient("rope dx", p.x, dx, NULL, n, rope_loss, &p);
        free(p.cos), free(p.sin), free(p.x), free(p.y), free(p.dy), free(want), free(dx);
    }
}

// the frequencies of the scaled models, computed from the published rule to ten digits: kept, blended and divided
static void test_rope_scaling(void** state) {
    (void)state;
    const struct {
        int HD;
        double factor;
        int first, n; // of the blended ones
        double blended[6], last;
    } models[] = {
        { 128,
          8,
          29,
          6,
          { 2.166570764e-03, 1.371893568e-03, 8.567514129e-04, 5.248461610e-04, 3.126937504e-04, 1.785078128e-04 },
          3.068925989e-07 },
        { 64, 32, 15, 3, { 1.290547928e-03, 4.295567966e-04, 9.708287803e-05 }, 9.418306725e-08 },
        { 128,
          32,
          29,
          6,
          { 2.118406997e-03, 1.290547928e-03, 7.625412034e-04, 4.295567966e-04, 2.227635015e-04, 9.708287803e-05 },
          7.672314972e-08 },
    };
    for (size_t m = 0; m < sizeof models / sizeof models[0]; m++) {
        int HD = models[m].HD, first = models[m].first, n = models[m].n;
        for (int i = 0; i < HD / 2; i++) {
            double got = rope_frequency(i, HD, 500000, models[m].factor, 1, 4, 8192),
                   plain = pow(500000, -2.0 * i / HD);
            double want = i < first ? plain : i < first + n ? models[m].blended[i - first] : plain / models[m].factor;
            if (!(fabs(got / want - 1) < 1e-9))
                test_fail("HD %d, frequency %d: got %.10g, want %.10g", HD, i, got, want);
            assert_true(rope_frequency(i, HD, 500000, 1, 1, 4, 8192) == plain);
        }
        double last = rope_frequency(HD / 2 - 1, HD, 500000, models[m].factor, 1, 4, 8192);
        assert_true(fabs(last / models[m].last - 1) < 1e-9);
    }
}

// ---- repeat_kv -------------------------------------------------------------------------------

typedef struct {
    int N, NH, NKV, HD;
    double *x, *y, *dy;
} RepeatProblem;

static double repeat_loss(void* problem) {
    RepeatProblem* p = problem;
    repeat_kv_forward_cpu(p->y, p->x, p->N, p->NH, p->NKV, p->HD);
    return dot(p->y, p->dy, (size_t)p->N * p->NH * p->HD);
}

static void test_repeat_kv(void** state) {
    (void)state;
    const int shapes[][4] = { { 1, 1, 1, 1 }, { 3, 4, 2, 5 }, { 2, 6, 1, 8 }, { 5, 3, 3, 4 } };
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        int N = shapes[s][0], NH = shapes[s][1], NKV = shapes[s][2], HD = shapes[s][3];
        size_t n = (size_t)N * NKV * HD, repeated = (size_t)N * NH * HD;
        RepeatProblem p = { N, NH, NKV, HD, random_array(n), nan_array(repeated), random_array(repeated) };
        double* dx = nan_array(n);
        repeat_loss(&p);
        repeat_kv_backward_cpu(dx, p.dy, N, NH, NKV, HD);
        check_gradient("repeat_kv dx", p.x, dx, NULL, n, repeat_loss, &p);
        free(p.x), free(p.y), free(p.dy), free(dx);
    }
}

// ---- attention -------------------------------------------------------------------------------

// q, k and v packed in rows of (NH + 2*NKV) * HD numbers, as a layer has them
typedef struct {
    int B, T, NH, NKV, HD, ld;
    double *qkv, *out, *lse, *dout;
} AttentionProblem;

static AttentionProblem attention_problem(int B, int T, int NH, int NKV, int HD) {
    int ld = (NH + 2 * NKV) * HD;
    size_t n = (size_t)B * T * NH * HD;
    return (AttentionProblem){ B,
                               T,
                               NH,
                               NKV,
                               HD,
                               ld,
                               random_array((size_t)B * T * ld),
                               nan_array(n),
                               nan_array((size_t)B * NH * T),
                               random_array(n) };
}

static void attention_free(AttentionProblem* p) { free(p->qkv), free(p->out), free(p->lse), free(p->dout); }

static double attention_loss(void* problem) {
    AttentionProblem* p = problem;
    const double *k = p->qkv + p->NH * p->HD, *v = k + p->NKV * p->HD;
    attention_forward_cpu(p->out, p->lse, p->qkv, k, v, p->B, p->T, p->T, 0, p->NH, p->NKV, p->HD, p->ld, p->ld);
    return dot(p->out, p->dout, (size_t)p->B * p->T * p->NH * p->HD);
}

// the T x T softmax, written plainly; overwrites out and lse
static void attention_plain(double* out, double* lse, const AttentionProblem* p) {
    int B = p->B, T = p->T, NH = p->NH, HD = p->HD, G = NH / p->NKV;
    double* power = allocate(T, sizeof *power);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int t = 0; t < T; t++) {
                const double* rows = p->qkv + (size_t)b * T * p->ld;
                const double *q = rows + (size_t)t * p->ld + h * HD, *k = rows + (NH + h / G) * HD,
                             *v = k + p->NKV * HD;
                double sum = 0, *o = out + (((size_t)b * T + t) * NH + h) * HD;
                for (int j = 0; j <= t; j++) sum += power[j] = exp(dot(q, k + (size_t)j * p->ld, HD) / sqrt(HD));
                for (int i = 0; i < HD; i++) o[i] = 0;
                for (int j = 0; j <= t; j++)
                    for (int i = 0; i < HD; i++) o[i] += power[j] / sum * v[(size_t)j * p->ld + i];
                lse[((size_t)b * NH + h) * T + t] = log(sum);
            }
    free(power);
}

static void attention_check_forward(AttentionProblem* p) {
    size_t n = (size_t)p->B * p->T * p->NH * p->HD, rows = (size_t)p->B * p->NH * p->T;
    double *out = nan_array(n), *lse = nan_array(rows);
    attention_loss(p);
    attention_plain(out, lse, p);
    check_equal("attention out", p->out, out, n);
    check_equal("attention lse", p->lse, lse, rows);
    free(out), free(lse);
}

// overwrites dqkv, the gradient of attention_loss
static void attention_gradient(double* dqkv, AttentionProblem* p) {
    size_t k = (size_t)p->NH * p->HD, v = k + (size_t)p->NKV * p->HD;
    attention_loss(p);
    attention_backward_cpu(dqkv, dqkv + k, dqkv + v, p->dout, p->qkv, p->qkv + k, p->qkv + v, p->out, p->lse, p->B,
                           p->T, p->NH, p->NKV, p->HD, p->ld);
}

static void test_attention(void** state) {
    (void)state;
    const int shapes[][5] = { { 1, 1, 1, 1, 1 },  { 2, 3, 4, 2, 5 }, { 1, 31, 1, 1, 2 }, { 1, 33, 2, 1, 3 },
                              { 2, 7, 6, 2, 16 }, { 3, 5, 3, 3, 4 }, { 1, 70, 3, 1, 2 }, { 2, 65, 2, 2, 1 } };
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        AttentionProblem p = attention_problem(shapes[s][0], shapes[s][1], shapes[s][2], shapes[s][3], shapes[s][4]);
        size_t n = (size_t)p.B * p.T * p.ld;
        double* dqkv = nan_array(n);
        attention_check_forward(&p);
        attention_gradient(dqkv, &p);
        check_gradient("attention dqkv", p.qkv, dqkv, NULL, n, attention_loss, &p);
        attention_free(&p), free(dqkv);
    }
}

// many tiles; scores that are all far below zero; scores in rising order, so that the running maximum moves in every tile
static void test_attention_long(void** state) {
    (void)state;
    AttentionProblem p = attention_problem(2, 300, 6, 2, 8);
    attention_check_forward(&p);
    for (int row = 0; row < p.B * p.T; row++)
        for (int i = 0; i < (p.NH + p.NKV) * p.HD; i++) p.qkv[(size_t)row * p.ld + i] = i < p.NH * p.HD ? -8 : 5;
    attention_check_forward(&p);
    for (int row = 0; row < p.B * p.T; row++)
        for (int i = 0; i < (p.NH + p.NKV) * p.HD; i++)
            p.qkv[(size_t)row * p.ld + i] = i < p.NH * p.HD ? 1 : 0.1 * (row % p.T);
    attention_check_forward(&p);
    attention_free(&p);
}

// heads copied by repeat_kv, attended to one by one, are the grouped heads; so are their gradients
static void test_attention_groups(void** state) {
    (void)state;
    const int B = 2, T = 40, NH = 6, NKV = 2, HD = 5, N = B * T;
    AttentionProblem grouped = attention_problem(B, T, NH, NKV, HD), whole = attention_problem(B, T, NH, NH, HD);
    size_t kv = (size_t)N * NKV * HD, repeated = (size_t)N * NH * HD, n = (size_t)N * grouped.ld;
    double *few = nan_array(kv), *many = nan_array(repeated);
    memcpy(whole.dout, grouped.dout, repeated * sizeof *whole.dout);
    for (int r = 0; r < N; r++)
        memcpy(whole.qkv + (size_t)r * whole.ld, grouped.qkv + (size_t)r * grouped.ld, NH * HD * sizeof *few);
    for (int part = 0; part < 2; part++) { // k, then v
        for (int r = 0; r < N; r++)
            memcpy(few + (size_t)r * NKV * HD, grouped.qkv + (size_t)r * grouped.ld + (NH + part * NKV) * HD,
                   NKV * HD * sizeof *few);
        repeat_kv_forward_cpu(many, few, N, NH, NKV, HD);
        for (int r = 0; r < N; r++)
            memcpy(whole.qkv + (size_t)r * whole.ld + (1 + part) * NH * HD, many + (size_t)r * NH * HD,
                   NH * HD * sizeof *few);
    }
    double *got = nan_array(n), *want = nan_array(n), *dwhole = nan_array((size_t)N * whole.ld);
    attention_gradient(got, &grouped);
    attention_gradient(dwhole, &whole);
    check_equal("grouped attention", grouped.out, whole.out, repeated);
    for (int r = 0; r < N; r++) {
        const double* from = dwhole + (size_t)r * whole.ld;
        double* to = want + (size_t)r * grouped.ld;
        memcpy(to, from, NH * HD * sizeof *to);
        repeat_kv_backward_cpu(to + NH * HD, from + NH * HD, 1, NH, NKV, HD);
        repeat_kv_backward_cpu(to + (NH + NKV) * HD, from + 2 * NH * HD, 1, NH, NKV, HD);
    }
    check_equal("grouped attention dqkv", got, want, n);
    attention_free(&grouped), attention_free(&whole), free(few), free(many), free(got), free(want), free(dwhole);
}

// queries in pieces over a cache with room to spare give the rows of the whole; what lies beyond the keys is never read
static void test_attention_cache(void** state) {
    (void)state;
    const int B = 2, T = 150, NH = 4, NKV = 2, HD = 6, S = 160, pieces[] = { 70, 1, 1, 33, 45 };
    AttentionProblem p = attention_problem(B, T, NH, NKV, HD);
    attention_loss(&p);
    const size_t q_row = (size_t)NH * HD, kv_row = (size_t)NKV * HD;
    double *k = nan_array(B * S * kv_row), *v = nan_array(B * S * kv_row);
    int pos = 0;
    for (size_t piece = 0; piece < sizeof pieces / sizeof pieces[0]; piece++) {
        int n = pieces[piece];
        double *q = nan_array(B * n * q_row), *out = nan_array(B * n * q_row), *want = nan_array(B * n * q_row);
        for (int b = 0; b < B; b++)
            for (int t = 0; t < n; t++) {
                const double* row = p.qkv + ((size_t)b * T + pos + t) * p.ld;
                memcpy(q + (b * n + t) * q_row, row, q_row * sizeof *q);
                memcpy(k + (b * S + pos + t) * kv_row, row + q_row, kv_row * sizeof *q);
                memcpy(v + (b * S + pos + t) * kv_row, row + q_row + kv_row, kv_row * sizeof *q);
                memcpy(want + (b * n + t) * q_row, p.out + ((size_t)b * T + pos + t) * q_row, q_row * sizeof *q);
            }
        attention_forward_cpu(out, NULL, q, k, v, B, n, S, pos, NH, NKV, HD, (int)q_row, (int)kv_row);
        check_equal("attention over a cache", out, want, B * n * q_row);
        free(q), free(out), free(want);
        pos += n;
    }
    assert_int_equal(pos, T);
    attention_free(&p), free(k), free(v);
}

// ---- swiglu ----------------------------------------------------------------------------------

typedef struct {
    int N, F;
    double *gate_up, *y, *dy;
} SwigluProblem;

static double swiglu_loss(void* problem) {
    SwigluProblem* p = problem;
    swiglu_forward_cpu(p->y, p->gate_up, p->N, p->F);
    return dot(p->y, p->dy, (size_t)p->N * p->F);
}

static void test_swiglu(void** state) {
    (void)state;
    const int shapes[][2] = { { 1, 1 }, { 3, 33 }, { 5, 64 }, { 2, 100 } };
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        int N = shapes[s][0], F = shapes[s][1];
        size_t n = (size_t)N * F;
        SwigluProblem p = { N, F, random_array(2 * n), nan_array(n), random_array(n) };
        double* dgate_up = nan_array(2 * n);
        swiglu_loss(&p);
        for (size_t i = 0; i < n; i++) {
            double gate = p.gate_up[i / F * 2 * F + i % F], up = p.gate_up[i / F * 2 * F + F + i % F];
            assert_true(fabs(p.y[i] - gate * up / (1 + exp(-gate))) < 1e-12);
        }
        swiglu_backward_cpu(dgate_up, p.dy, p.gate_up, N, F);
        check_gradient("swiglu dgate_up", p.gate_up, dgate_up, NULL, 2 * n, swiglu_loss, &p);
        swiglu_backward_cpu(p.gate_up, p.dy, p.gate_up, N, F);
        assert_memory_equal(p.gate_up, dgate_up, 2 * n * sizeof *dgate_up);
        free(p.gate_up), free(p.y), free(p.dy), free(dgate_up);
    }
}

// ---- cross-entropy and lm_head -----------------------------------------------------------------

typedef struct {
    int N, V, ld;
    int32_t* labels;
    double *logits, *copy, *losses;
} LossProblem;

static const double SCALE = 0.7;

static double cross_entropy_loss(void* problem) {
    LossProblem* p = problem;
    double sum = 0;
    cross_entropy_cpu(p->losses, p->logits, p->labels, SCALE, false, p->N, p->V, p->ld);
    for (int n = 0; n < p->N; n++) sum += SCALE * p->losses[n];
    return sum;
}

static void test_cross_entropy(void** state) {
    (void)state;
    const int shapes[][3] = { { 1, 1, 1 }, { 2, 17, 64 }, { 5, 100, 100 }, { 2, 5000, 5000 } }; // the last: two runs
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        int N = shapes[s][0], V = shapes[s][1], ld = shapes[s][2];
        size_t n = (size_t)N * ld;
        LossProblem p = { N, V, ld, random_ids(N, V), random_array(n), NULL, nan_array(N) };
        if (N > 1) p.labels[1] = IGNORED_LABEL;
        cross_entropy_loss(&p);
        for (int i = 0; i < N; i++) {
            double sum = 0, *row = p.logits + (size_t)i * ld;
            for (int v = 0; v < V; v++) sum += exp(row[v]);
            double want = p.labels[i] == IGNORED_LABEL ? 0 : log(sum) - row[p.labels[i]];
            assert_true(fabs(p.losses[i] - want) < 1e-12);
        }
        double* dlogits = copy_of(p.logits, n);
        cross_entropy_cpu(p.losses, dlogits, p.labels, SCALE, true, N, V, ld);
        for (int i = 0; i < N; i++)
            for (int v = V; v < ld; v++) { // beyond the row: not ours
                assert_true(dlogits[(size_t)i * ld + v] == p.logits[(size_t)i * ld + v]);
                dlogits[(size_t)i * ld + v] = 0;
            }
        check_gradient("cross_entropy dlogits", p.logits, dlogits, NULL, n, cross_entropy_loss, &p);
        free(p.labels), free(p.logits), free(p.losses), free(dlogits);
    }
}

typedef struct {
    int N, C, V;
    int32_t* labels;
    double *x, *w, *scratch;
} HeadProblem;

static double head_loss(void* problem) {
    HeadProblem* p = problem;
    return SCALE * lm_head_loss_cpu(NULL, NULL, p->x, tensor_of(p->w), p->labels, SCALE, p->N, p->C, p->V, p->scratch);
}

static void test_lm_head(void** state) {
    (void)state;
    const int shapes[][3] = { { 1, 1, 1 }, { 9, 33, 50 }, { lm_head_rows(3) + 5, 2, 3 } }; // the last: two chunks
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        int N = shapes[s][0], C = shapes[s][1], V = shapes[s][2];
        size_t nx = (size_t)N * C, nw = (size_t)V * C;
        HeadProblem p = {
            N, C, V, random_ids(N, V), random_array(nx), random_array(nw), nan_array(lm_head_scratch(V))
        };
        if (N > 1) p.labels[0] = p.labels[N - 1] = IGNORED_LABEL;
        double *dx = nan_array(nx), *dw = random_array(nw), *dw_start = copy_of(dw, nw);
        double loss = lm_head_loss_cpu(dx, dw, p.x, tensor_of(p.w), p.labels, SCALE, N, C, V, p.scratch), want = 0;
        for (int n = 0; n < N; n++) {
            double sum = 0;
            for (int v = 0; v < V; v++) sum += exp(dot(p.x + (size_t)n * C, p.w + (size_t)v * C, C));
            if (p.labels[n] != IGNORED_LABEL)
                want += log(sum) - dot(p.x + (size_t)n * C, p.w + (size_t)p.labels[n] * C, C);
        }
        check_equal("lm_head loss", &loss, &want, 1);
        check_gradient("lm_head dx", p.x, dx, NULL, nx, head_loss, &p);
        check_gradient("lm_head dw", p.w, dw, dw_start, nw, head_loss, &p);
        free(p.labels), free(p.x), free(p.w), free(p.scratch), free(dx), free(dw), free(dw_start);
    }
}

// ---- adamw -----------------------------------------------------------------------------------

static void test_adamw(void** state) {
    (void)state;
    const size_t n = 101;
    const double lr = 0.01, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, decay = 0.1, clip = 0.5;
    double *w = random_array(n), *m = allocate(n, sizeof *m), *v = allocate(n, sizeof *v);
    double *want_w = copy_of(w, n), *want_m = copy_of(m, n), *want_v = copy_of(v, n);
    for (int step = 1; step <= 3; step++) {
        double* g = random_array(n);
        adamw_cpu(w, m, v, g, n, lr, beta1, beta2, eps, decay, step, clip);
        for (size_t i = 0; i < n; i++) {
            double gi = clip * g[i];
            want_m[i] = beta1 * want_m[i] + (1 - beta1) * gi;
            want_v[i] = beta2 * want_v[i] + (1 - beta2) * gi * gi;
            double m_hat = want_m[i] / (1 - pow(beta1, step)), v_hat = want_v[i] / (1 - pow(beta2, step));
            want_w[i] = (1 - lr * decay) * want_w[i] - lr * m_hat / (sqrt(v_hat) + eps);
        }
        check_equal("adamw m", m, want_m, n);
        check_equal("adamw v", v, want_v, n);
        check_equal("adamw w", w, want_w, n);
        free(g);
    }
    free(w), free(m), free(v), free(want_w), free(want_m), free(want_v);
}

static void test_sum_of_squares(void** state) {
    (void)state;
    const size_t sizes[] = { 0, 1, 63, 64, 65, 1000, 5001 };
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        double *g = random_array(sizes[s]), want = dot(g, g, sizes[s]), got = sum_of_squares_cpu(g, sizes[s]);
        check_equal("sum_of_squares", &got, &want, 1);
        free(g);
    }
}

int main(void) {
    omp_set_num_threads(1); // thousands of tiny calls; threads are the matter of test_ops_float.c
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rmsnorm),          cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_matmul),           cmocka_unit_test(test_rope),
        cmocka_unit_test(test_rope_scaling),     cmocka_unit_test(test_repeat_kv),
        cmocka_unit_test(test_attention),        cmocka_unit_test(test_attention_long),
        cmocka_unit_test(test_attention_groups), cmocka_unit_test(test_attention_cache),
        cmocka_unit_test(test_swiglu),           cmocka_unit_test(test_cross_entropy),
        cmocka_unit_test(test_lm_head),          cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_sum_of_squares),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
