/*
The only comparer: do two arrays agree?

    every element       |got - want| <= tolerance * scale        scale = max |want|, or 1 when want is all zero

tolerance is a small multiple of the epsilon of the type that computed got: it comes from the arithmetic and is not tuned.
NaN and infinity are rejected by their bits, so that no compiler option can let them through.
Proved by       dev/test/test_check.c: what must be rejected is rejected
*/
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct {
    size_t worst;   // index of the element that used most of its tolerance, or of the first that is not finite
    double used;    // the fraction of the tolerance it used: at most 1 when all is well
    double error;   // |got - want| / scale there
    bool ok;
} Check;

static inline bool check_finite(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    return (bits >> 52 & 0x7ff) != 0x7ff;
}

static inline Check check_compare(const float* got, const float* want, size_t n, double tolerance) {
    double scale = 0;
    for (size_t i = 0; i < n; i++)
        if (fabs((double)want[i]) > scale) scale = fabs((double)want[i]);
    if (scale == 0) scale = 1;
    Check c = { 0, 0, 0, true };
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)got[i] - (double)want[i]) / scale;
        if (!check_finite((double)got[i]) || !check_finite((double)want[i])) {
            Check bad = { i, INFINITY, INFINITY, false };
            return bad;
        }
        if (error / tolerance > c.used) {
            c.worst = i;
            c.used = error / tolerance;
            c.error = error;
        }
    }
    c.ok = c.used <= 1;
    return c;
}

// compares, prints one line when the arrays differ, returns whether they agree
static inline bool check_close(const char* name, const float* got, const float* want, size_t n, double tolerance) {
    Check c = check_compare(got, want, n, tolerance);
    if (!c.ok)
        fprintf(stderr, "%s[%zu of %zu]: got %.9g, want %.9g, error %.3g of the scale, tolerance %.3g\n", name, c.worst, n,
                (double)got[c.worst], (double)want[c.worst], c.error, tolerance);
    return c.ok;
}
