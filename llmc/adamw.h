/*
AdamW: Adam with weight decay applied to the weight itself, and the gradient's norm that clipping needs.

    g = grad_scale * g
    w = w - lr * weight_decay * w
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g^2
    w = w - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)          step = 1, 2, …

Clipping to a norm of c is grad_scale = min(1, c / |g|) with |g| over all parameters, sqrt(sum of sum_of_squares_cpu).

Shapes          w m v g (n)
Numerics        fp32 in PyTorch's order of operations; the factors that depend on the step alone in double, rounded once.
                Squares are summed in double: the norm cannot overflow before the gradient itself does
Bound by        memory: reads 4*n elements, writes 3*n
Proved by       dev/test/test_ops.c (against the formula), test_ops_float.c, the golden ten steps of the model
Source          Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"
*/
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

// ---- CPU reference ---------------------------------------------------------------------------

// one step: updates w, m and v (n); m and v start as zeros
static inline void adamw_cpu(float* w, float* m, float* v, const float* g, size_t n, float lr, float beta1, float beta2,
                             float eps, float weight_decay, int step, float grad_scale) {
    const float keep = (float)(1 - (double)lr * weight_decay), mix1 = 1 - beta1, mix2 = 1 - beta2;
    const float step_size = (float)(lr / (1 - pow(beta1, step))), root = (float)sqrt(1 - pow(beta2, step));
#pragma omp parallel for simd if (n > 4096)
    for (size_t i = 0; i < n; i++) {
        float gi = g[i] * grad_scale;
        m[i] += mix1 * (gi - m[i]);
        v[i] = v[i] * beta2 + mix2 * gi * gi;
        w[i] = w[i] * keep - step_size * m[i] / (sqrtf(v[i]) / root + eps);
    }
}

// the sum of g^2, in double. 64 chunks, whatever the number of threads, summed in order: always the same bits. NaN and
// infinity in g reach the result
static inline double sum_of_squares_cpu(const float* g, size_t n) {
    enum { CHUNKS = 64 };
    double sums[CHUNKS], total = 0;
    size_t length = (n + CHUNKS - 1) / CHUNKS;
#pragma omp parallel for if (n > 4096)
    for (int c = 0; c < CHUNKS; c++) {
        size_t start = c * length < n ? c * length : n, end = start + length < n ? start + length : n;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = start; i < end; i++) sum += (double)g[i] * (double)g[i];
        sums[c] = sum;
    }
    for (int c = 0; c < CHUNKS; c++) total += sums[c];
    return total;
}
