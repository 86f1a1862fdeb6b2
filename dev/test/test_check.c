/*
The comparer itself: what every other test leans on must reject what is wrong. Each wrong array below differs from the right
one in one way that a kernel's mistake would leave.
*/
#include <math.h>

#include "test.h"
#include "llmc/check.h"

enum { N = 100 };
static const double TOLERANCE = 1e-6;

static float want[N], got[N];

static int set_up(void** state) {
    (void)state;
    for (int i = 0; i < N; i++) want[i] = got[i] = sinf((float)i + 1) * 3;
    return 0;
}

static void rejects(size_t worst) {
    Check c = check_compare(got, want, N, TOLERANCE);
    assert_false(c.ok);
    assert_int_equal(c.worst, worst);
    assert_true(c.used > 1);
    assert_false(check_close("wrong on purpose", got, want, N, TOLERANCE));
}

static void test_accepts_equal(void** state) {
    (void)state;
    Check c = check_compare(got, want, N, TOLERANCE);
    assert_true(c.ok && c.used == 0 && c.error == 0);
    assert_true(check_close("equal", got, want, N, TOLERANCE));
    assert_true(check_compare(got, want, 0, TOLERANCE).ok);
}

// the scale is that of the largest number wanted, so a small number may be off by more than itself
static void test_tolerance(void** state) {
    (void)state;
    const float big[] = { 1000, 0, -4 }, near[] = { 1000, 0.0005f, -4 }, far[] = { 1000, 0.002f, -4 };
    Check c = check_compare(near, big, 3, TOLERANCE);
    assert_true(c.ok && c.worst == 1);
    assert_true(fabs(c.used - 0.5) < 1e-6 && fabs(c.error - 5e-7) < 1e-12);
    c = check_compare(far, big, 3, TOLERANCE);
    assert_false(c.ok);
    assert_true(c.worst == 1 && fabs(c.used - 2) < 1e-6);
}

// nothing wanted but zeros: the tolerance is then absolute
static void test_zeros(void** state) {
    (void)state;
    const float zeros[] = { 0, -0.0f }, small[] = { 5e-7f, 0 }, large[] = { 0, 5e-6f };
    assert_true(check_compare(zeros, zeros, 2, TOLERANCE).ok);
    assert_true(check_compare(small, zeros, 2, TOLERANCE).ok);
    assert_false(check_compare(large, zeros, 2, TOLERANCE).ok);
}

static void test_rejects_nan(void** state) {
    (void)state;
    got[0] = NAN;
    rejects(0);
    got[0] = want[0], got[N - 1] = -NAN;
    rejects(N - 1);
    got[N - 1] = want[N - 1], want[7] = NAN;
    rejects(7);
    got[7] = NAN; // equal bits are no excuse
    rejects(7);
    for (int i = 0; i < N; i++) want[i] = got[i] = NAN;
    rejects(0);
}

static void test_rejects_infinity(void** state) {
    (void)state;
    got[3] = INFINITY;
    rejects(3);
    got[3] = want[3], got[4] = -INFINITY;
    rejects(4);
    got[4] = want[4], want[5] = INFINITY; // also as the scale, by which every error would be divided
    rejects(5);
    got[5] = INFINITY;
    rejects(5);
}

static void test_rejects_off_by_one(void** state) {
    (void)state;
    for (int i = 0; i < N; i++) got[i] = want[i + 1 < N ? i + 1 : i];
    assert_false(check_compare(got, want, N, TOLERANCE).ok);
    assert_false(check_compare(got, want, N, 0.1).ok);
}

static void test_rejects_skipped_tail(void** state) {
    (void)state;
    got[N - 1] = 0; // as calloc left it
    rejects(N - 1);
    got[N - 1] = NAN; // as a careful harness left it
    rejects(N - 1);
}

static void test_rejects_sign_and_swap(void** state) {
    (void)state;
    got[2] = -want[2];
    rejects(2);
    got[2] = want[3], got[3] = want[2];
    assert_false(check_compare(got, want, N, TOLERANCE).ok);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_accepts_equal, set_up),
        cmocka_unit_test_setup(test_tolerance, set_up),
        cmocka_unit_test_setup(test_zeros, set_up),
        cmocka_unit_test_setup(test_rejects_nan, set_up),
        cmocka_unit_test_setup(test_rejects_infinity, set_up),
        cmocka_unit_test_setup(test_rejects_off_by_one, set_up),
        cmocka_unit_test_setup(test_rejects_skipped_tail, set_up),
        cmocka_unit_test_setup(test_rejects_sign_and_swap, set_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
