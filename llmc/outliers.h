/*
Outliers of a training run: how far a step's loss and gradient norm lie from those of the steps before it.

    z = (x - mean) / deviation          of the last OUTLIER_STEPS values; 0 until there are so many

Every value joins the window, an outlier too: after a lasting change it is the window that gives way, not the run that stops.
Numerics        double; sums run from the oldest value to the newest, so that a window read back from state.json gives the same
                bits
Proved by       dev/test/test_parts.c, dev/test/test_runs.c (skipped steps, and resume in the middle of a window)
*/
#pragma once

#include <math.h>
#include <stdbool.h>
#include <string.h>

enum { OUTLIER_STEPS = 128 };

typedef struct {
    double x[OUTLIER_STEPS]; // [n], oldest first
    int n;
} Outliers;

static inline double outliers_z(const Outliers* o, double x) {
    double sum = 0, squares = 0;
    if (o->n < OUTLIER_STEPS) return 0;
    for (int i = 0; i < o->n; i++) sum += o->x[i];
    const double mean = sum / o->n;
    for (int i = 0; i < o->n; i++) squares += (o->x[i] - mean) * (o->x[i] - mean);
    return squares > 0 ? (x - mean) / sqrt(squares / o->n) : 0;
}

// the newest value; the oldest one makes room
static inline void outliers_add(Outliers* o, double x) {
    if (o->n == OUTLIER_STEPS) memmove(o->x, o->x + 1, (size_t)--o->n * sizeof *o->x);
    o->x[o->n++] = x;
}
