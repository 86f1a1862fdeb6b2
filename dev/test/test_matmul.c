/*
The matrix product in float: every storage type, weights at odd addresses, shapes that fit no tile, row strides, adding and
overwriting, NaN and infinity, and the same bits for any number of threads. Its gradients are in test_ops.c.

The reference sums in double. Rounding in float is allowed four epsilons of the largest sum of absolute products: what a sum
of random numbers loses grows no faster.
*/
#include <float.h>
#include <math.h>
#include <omp.h>

#include "test.h"
#include "llmc/check.h"
#include "llmc/matmul.h"
#include "llmc/random.h"

enum { GUARD = 16 }; // numbers before and behind each output that nothing may touch
static const float FENCE = 12345.5f;

typedef struct {
    float* at; // n numbers
    size_t n;
    float* start;
} Buffer;

static void fill(float* x, size_t n) {
    static uint64_t stream = 0;
    for (size_t i = 0; i < n; i++) x[i] = random_normal(7, stream, i);
    stream++;
}

static Buffer buffer(size_t n) {
    Buffer b = { NULL, n, allocate(n + 2 * GUARD, sizeof(float)) };
    b.at = b.start + GUARD;
    for (size_t i = 0; i < n + 2 * GUARD; i++) b.start[i] = FENCE;
    fill(b.at, n);
    return b;
}

static Buffer copy_of(Buffer from) {
    Buffer b = buffer(from.n);
    memcpy(b.at, from.at, from.n * sizeof(float));
    return b;
}

static void release(Buffer b) {
    for (int i = 0; i < GUARD; i++)
        if (b.start[i] != FENCE || b.at[b.n + i] != FENCE) test_fail("a number outside of the array was written");
    free(b.start);
}

// w's numbers in storage of the given type, behind `odd` bytes; w itself is rounded to what the storage can hold
static Tensor store(Buffer w, Dtype dtype, int odd, void** memory) {
    char* p = (char*)(*memory = allocate(w.n * dtype_bytes(dtype) + (size_t)odd, 1)) + odd;
    for (size_t i = 0; i < w.n; i++) {
        uint16_t half = dtype == DTYPE_BF16 ? float_to_bf16(w.at[i]) : float_to_f16(w.at[i]);
        if (dtype == DTYPE_F32)
            memcpy(p + 4 * i, &w.at[i], 4);
        else {
            memcpy(p + 2 * i, &half, 2);
            w.at[i] = dtype == DTYPE_BF16 ? bf16_to_float(half) : f16_to_float(half);
        }
    }
    return (Tensor){ p, dtype };
}

// out[i][j] = (start ? start[i][j] : 0) + sum over k of a(i, k) * b(j, k); strides of both indices in each factor. Returns the
// largest sum of absolute values
static double reference(float* out, const float* start, const float* a, int ai, int ak, const float* b, int bj, int bk,
                        int I, int J, int K) {
    double largest = 0;
    for (int i = 0; i < I; i++)
        for (int j = 0; j < J; j++) {
            double sum = start ? start[(size_t)i * J + j] : 0, size = fabs(sum);
            for (int k = 0; k < K; k++) {
                double product = (double)a[(size_t)i * ai + (size_t)k * ak] * b[(size_t)j * bj + (size_t)k * bk];
                sum += product;
                size += fabs(product);
            }
            out[(size_t)i * J + j] = (float)sum;
            largest = fmax(largest, size);
        }
    return largest;
}

static void expect(const char* name, const float* got, const float* want, int N, int C, int OC, size_t n, double size) {
    double scale = 0;
    for (size_t i = 0; i < n; i++) scale = fmax(scale, fabs((double)want[i]));
    if (!check_close(name, got, want, n, 4 * FLT_EPSILON * size / scale))
        test_fail("%s of N %d, C %d, OC %d is wrong", name, N, C, OC);
}

// y is part of wider rows, whose other numbers must stay
static void check_forward(int N, int C, int OC, Dtype dtype, int odd, int ldy) {
    Buffer x = buffer((size_t)N * C), w = buffer((size_t)OC * C), y = buffer((size_t)(N - 1) * ldy + OC);
    void* memory;
    Tensor stored = store(w, dtype, odd, &memory);
    float *want = allocate((size_t)N * OC, sizeof *want), *got = allocate((size_t)N * OC, sizeof *got);
    for (size_t i = 0; i < y.n; i++) y.at[i] = i % ldy < (size_t)OC ? NAN : FENCE;
    matmul_forward_cpu(y.at, ldy, x.at, stored, N, C, OC);
    for (int n = 0; n < N; n++) {
        memcpy(got + (size_t)n * OC, y.at + (size_t)n * ldy, OC * sizeof *got);
        for (int o = OC; o < ldy && n < N - 1; o++)
            if (y.at[(size_t)n * ldy + o] != FENCE) test_fail("y[%d][%d] lies between the rows and was written", n, o);
    }
    double size = reference(want, NULL, x.at, C, 1, w.at, C, 1, N, OC, C);
    expect("y", got, want, N, C, OC, (size_t)N * OC, size);
    release(x), release(w), release(y);
    free(memory), free(want), free(got);
}

static void check_backward(int N, int C, int OC, bool accumulate) {
    Buffer x = buffer((size_t)N * C), w = buffer((size_t)OC * C), dy = buffer((size_t)N * OC);
    Buffer dx = buffer(x.n), dw = buffer(w.n), dx_start = copy_of(dx), dw_start = copy_of(dw), want = copy_of(dx);
    Tensor stored = { w.at, DTYPE_F32 };
    for (size_t i = 0; i < dx.n && !accumulate; i++) dx.at[i] = NAN;
    matmul_backward_cpu(dx.at, accumulate, dw.at, dy.at, x.at, stored, N, C, OC);
    double size = reference(want.at, accumulate ? dx_start.at : NULL, dy.at, OC, 1, w.at, 1, C, N, C, OC);
    expect("dx", dx.at, want.at, N, C, OC, dx.n, size);
    Buffer want_dw = copy_of(dw);
    size = reference(want_dw.at, dw_start.at, dy.at, 1, OC, x.at, 1, C, OC, C, N);
    expect("dw", dw.at, want_dw.at, N, C, OC, dw.n, size);
    // each alone, bit for bit the same
    Buffer alone = copy_of(dx_start), alone_dw = copy_of(dw_start);
    matmul_backward_cpu(alone.at, accumulate, NULL, dy.at, x.at, stored, N, C, OC);
    matmul_backward_cpu(NULL, accumulate, alone_dw.at, dy.at, x.at, stored, N, C, OC);
    assert_memory_equal(alone.at, dx.at, dx.n * sizeof(float));
    assert_memory_equal(alone_dw.at, dw.at, dw.n * sizeof(float));
    release(x), release(w), release(dy), release(dx), release(dw), release(dx_start), release(dw_start);
    release(want), release(want_dw), release(alone), release(alone_dw);
}

static const int sizes[] = { 1, 7, 31, 33, 100, 257 };
enum { SIZES = sizeof sizes / sizeof sizes[0] };

static void test_forward(void** state) {
    (void)state;
    for (int n = 0; n < SIZES; n++)
        for (int c = 0; c < SIZES; c++)
            for (int o = 0; o < SIZES; o++) {
                const int which = n + c + o, OC = sizes[o];
                check_forward(sizes[n], sizes[c], OC, (Dtype)(which % 3), which % 2, OC + (which % 4 ? 0 : 5));
            }
}

// few rows take another path than many: every count around the border, every type, every byte address
static void test_rows(void** state) {
    (void)state;
    for (int N = 1; N <= 2 * MATMUL_FEW + 1; N++)
        for (int dtype = DTYPE_F32; dtype <= DTYPE_F16; dtype++)
            for (int odd = 0; odd < 4; odd++) check_forward(N, 131, 45 + N % 4, (Dtype)dtype, odd, 50);
}

// deeper than a block, wider than a phase, more rows than a block
static void test_blocks(void** state) {
    (void)state;
    const int deep = 2 * MATMUL_DEPTH + 5, wide = MATMUL_SHARED / MATMUL_DEPTH + MATMUL_COLS + 3,
              high = 2 * MATMUL_BLOCK + 9;
    const int shapes[][3] = {
        { 9, deep, wide }, { high, 40, 50 }, { high, deep, 20 }, { 5, deep, wide }, { 1, 3, wide }
    };
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        const int* d = shapes[s];
        for (int dtype = DTYPE_F32; dtype <= DTYPE_F16; dtype++) check_forward(d[0], d[1], d[2], (Dtype)dtype, 1, d[2]);
        check_backward(d[0], d[1], d[2], s % 2);
    }
    check_forward(wide, 5, wide, DTYPE_BF16, 1, wide); // both factors wider than a phase
    check_backward(9, wide, 17, true);                 // dx and dw wider than a phase
    check_backward(deep, 20, 30, false);               // dw deeper than a block
    check_backward(10, 8, 100000, false);              // dx with K of several phases
}

static void test_backward(void** state) {
    (void)state;
    for (int n = 0; n < SIZES; n++)
        for (int c = 0; c < SIZES; c++)
            for (int o = 0; o < SIZES; o++) check_backward(sizes[n], sizes[c], sizes[o], (n + c + o) % 2);
}

// conversions in vectors must be those of dtype.h, for every pattern: x is 1 at one place, so y is that column of w
static void test_conversions(void** state) {
    (void)state;
    enum { C = 64, OC = 65536 / C };
    static uint16_t w[65536];
    static float x[32 * C], y[32 * OC];
    for (int i = 0; i < 65536; i++) w[i] = (uint16_t)i;
    for (int dtype = DTYPE_BF16; dtype <= DTYPE_F16; dtype++)
        for (int N = 1; N <= 32; N += 31) // both paths
            for (int c = 0; c < C; c++) {
                memset(x, 0, sizeof x);
                for (int n = 0; n < N; n++) x[n * C + c] = 1;
                Tensor stored = { w, (Dtype)dtype };
                matmul_forward_cpu(y, OC, x, stored, N, C, OC);
                for (int o = 0; o < OC; o++) {
                    float want = tensor_get(stored, (size_t)o * C + c), got = y[(size_t)(N - 1) * OC + o];
                    bool row_finite = true; // infinity times 0 is NaN
                    for (int k = 0; k < C; k++) row_finite &= check_finite(tensor_get(stored, (size_t)o * C + k));
                    if (row_finite ? got != want : check_finite(got))
                        test_fail("%s %#x became %g", dtype_name(stored.dtype), w[o * C + c], got);
                }
            }
}

// one bad number in a factor spoils exactly the outputs that it belongs to
static void test_nan(void** state) {
    (void)state;
    const float bads[] = { NAN, INFINITY, -INFINITY };
    const int rows[] = { 1, 3, 8, 9, 50 };
    for (int r = 0; r < 5; r++)
        for (int b = 0; b < 3; b++)
            for (int in_w = 0; in_w < 2; in_w++)
                for (int place = 0; place < 4; place++) {
                    const int N = rows[r], C = 37, OC = 53, c = place * 12, bad_n = N - 1, bad_o = place * 17;
                    Buffer x = buffer(N * C), w = buffer(OC * C), y = buffer(N * OC);
                    Buffer dy = buffer(N * OC), dx = buffer(N * C), dw = buffer(OC * C);
                    float* hit = in_w ? &w.at[bad_o * C + c] : &x.at[bad_n * C + c];
                    *hit = bads[b];
                    Tensor stored = { w.at, DTYPE_F32 };
                    matmul_forward_cpu(y.at, OC, x.at, stored, N, C, OC);
                    for (int n = 0; n < N; n++)
                        for (int o = 0; o < OC; o++)
                            assert_int_equal(!check_finite(y.at[n * OC + o]), in_w ? o == bad_o : n == bad_n);
                    matmul_backward_cpu(dx.at, false, dw.at, dy.at, x.at, stored, N, C, OC);
                    for (int n = 0; n < N; n++)
                        for (int k = 0; k < C; k++) assert_int_equal(!check_finite(dx.at[n * C + k]), in_w && k == c);
                    for (int o = 0; o < OC; o++)
                        for (int k = 0; k < C; k++) assert_int_equal(!check_finite(dw.at[o * C + k]), !in_w && k == c);
                    release(x), release(w), release(y), release(dy), release(dx), release(dw);
                }
}

static void test_threads(void** state) {
    (void)state;
    const int shapes[][3] = {
        { 1, 700, 900 }, { 5, 700, 900 }, { 100, 900, 130 }, { 900, 300, 100 }, { 33, 1000, 3500 }
    };
    const int most = omp_get_max_threads();
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        const int N = shapes[s][0], C = shapes[s][1], OC = shapes[s][2];
        Buffer x = buffer((size_t)N * C), w = buffer((size_t)OC * C), dy = buffer((size_t)N * OC);
        Buffer dw_start = buffer(w.n), first[3] = { { 0 } };
        Tensor stored = { w.at, DTYPE_F32 };
        for (int threads = 1; threads <= 8; threads = threads == 2 ? 3 : threads == 3 ? 8 : threads + 1) {
            Buffer y = buffer((size_t)N * OC), dx = buffer(x.n), dw = copy_of(dw_start), all[3] = { y, dx, dw };
            omp_set_num_threads(threads);
            matmul_forward_cpu(y.at, OC, x.at, stored, N, C, OC);
            matmul_backward_cpu(dx.at, false, dw.at, dy.at, x.at, stored, N, C, OC);
            for (int i = 0; i < 3; i++) {
                if (threads > 1)
                    assert_memory_equal(all[i].at, first[i].at, all[i].n * sizeof(float));
                else
                    first[i] = copy_of(all[i]);
                release(all[i]);
            }
        }
        for (int i = 0; i < 3; i++) release(first[i]);
        release(x), release(w), release(dy), release(dw_start);
    }
    omp_set_num_threads(most);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward),     cmocka_unit_test(test_rows), cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_backward),    cmocka_unit_test(test_nan),  cmocka_unit_test(test_threads),
        cmocka_unit_test(test_conversions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
