/*
Every op against finite differences: the first rung. The headers of llmc/ are compiled here in double, so that a missing
term has nowhere to hide: agreement is to 1e-6 of the gradient's scale or the test fails.

    loss = sum(dy * y) for random dy; its gradient by the op's backward must equal (loss(x + h) - loss(x - h)) / 2h

Backward functions that add must add: every gradient starts from random numbers, which are taken off again.
*/
#include <math.h>
#include <omp.h>

#include "test.h"
#include "llmc/dtype.h"
#include "llmc/error.h"
#include "llmc/random.h"

// from here on the project's float is double. What really is a float (files, random numbers) was included above
#define float double
#define sqrtf sqrt
#define expf exp
#define logf log
#define powf pow
#define fabsf fabs
#define fmaxf fmax
#include "llmc/check.h"
#include "llmc/rmsnorm.h"

static const double TOLERANCE = 1e-6, H = 1e-5;

// n random numbers, normal with standard deviation 1; owned by the caller
static double* random_array(size_t n) {
    static uint64_t stream = 0;
    double* x = allocate(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = random_normal(1, stream, i);
    stream++;
    return x;
}

static double dot(const double* a, const double* b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

typedef double LossFn(void* problem);

// got is what backward added to a gradient that began as start: it must be the slope of loss in each of the n numbers at x
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
        added[i] = got[i] - start[i];
    }
    bool ok = check_close(name, added, slope, n, TOLERANCE);
    free(slope), free(added);
    if (!ok) test_fail("%s: the backward pass is not the gradient of the forward pass", name);
}

static double* copy_of(const double* x, size_t n) {
    double* y = allocate(n, sizeof *y);
    memcpy(y, x, n * sizeof *y);
    return y;
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
        RmsnormProblem p = { N, C, random_array(n), random_array(C), random_array(n), random_array(N), random_array(n) };
        double *dx = random_array(n), *dw = random_array(C), *dx_start = copy_of(dx, n), *dw_start = copy_of(dw, C);
        rmsnorm_loss(&p);
        rmsnorm_backward_cpu(dx, dw, p.dy, p.x, p.w, p.r, N, C);
        check_gradient("rmsnorm dx", p.x, dx, dx_start, n, rmsnorm_loss, &p);
        check_gradient("rmsnorm dw", p.w, dw, dw_start, C, rmsnorm_loss, &p);
        free(p.x), free(p.w), free(p.y), free(p.r), free(p.dy);
        free(dx), free(dw), free(dx_start), free(dw_start);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rmsnorm),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
