/*
The learning rate of each step.

    warm-up     the first `warmup` steps rise linearly: lr * (step + 1) / warmup
    then, with t going from 0 to 1 at the last step:
    constant    lr
    linear      from lr to final * lr
    cosine      the same along half a cosine
    wsd         warm-up, stable, decay: lr until the last fifth of the run, then linear to final * lr

Proved by       dev/test/test_parts.c: end points, continuity, and the step after the last
*/
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

// step counts from 0; steps, warmup: of the whole run; final: the last learning rate as a fraction of lr
static inline double schedule_lr(const char* name, int64_t step, int64_t steps, int64_t warmup, double lr, double final) {
    if (step < warmup) return lr * (double)(step + 1) / (double)warmup;
    double t = steps - 1 > warmup ? (double)(step - warmup) / (double)(steps - 1 - warmup) : 1;
    if (t > 1) t = 1;
    double fall; // 0: still lr, 1: all the way down
    if (strcmp(name, "linear") == 0) fall = t;
    else if (strcmp(name, "cosine") == 0) fall = 0.5 - 0.5 * cos(3.14159265358979323846 * t);
    else if (strcmp(name, "wsd") == 0) fall = t < 0.8 ? 0 : (t - 0.8) / 0.2;
    else fall = 0;
    return lr * (1 - fall * (1 - final));
}
