/*
RoPE: turn each pair of a head's numbers by an angle that grows with the position.

    forward     (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)      x1 = x[i], x2 = x[i + HD/2], angle = position * f(i)
    backward    the same turn by the opposite angle

    f(i) = theta^(-2i/HD); with llama3 scaling, for the wavelength w = 2 pi / f(i),
        w < original / high         f(i)
        w > original / low          f(i) / factor
        between                     (1 - s) f(i) / factor + s f(i),     s = (original / w - low) / (high - low)

Shapes          x (B*T rows of stride ldx, of which the first heads * HD numbers are turned)    cos sin (positions, HD/2)
Layout          pairs are half a head apart, as in HuggingFace's files; Meta's own files pair neighbours, with the rows of
                q and k permuted to match
Numerics        tables in double, stored in fp32: at position 100,000 an angle computed in fp32 would be off by 0.004
Bound by        memory: 2 * B*T*heads*HD elements
Proved by       dev/test/test_ops.c (finite differences; the frequencies of Llama 3.1 and 3.2)
Source          Su et al. 2021, "RoFormer"; the scaling rule is that of Meta's llama-models, models/llama3/model.py
*/
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stddef.h>

// ---- CPU reference ---------------------------------------------------------------------------

// f(i), in radians per position; factor 1: no scaling
static inline double rope_frequency(int i, int HD, double theta, double factor, double low, double high, int original) {
    const double two_pi = 6.283185307179586;
    double f = pow(theta, -2.0 * i / HD), w = two_pi / f;
    if (factor == 1 || w < original / high) return f;
    if (w > original / low) return f / factor;
    double s = (original / w - low) / (high - low);
    return (1 - s) * f / factor + s * f;
}

// overwrites cos and sin (positions, HD/2)
static inline void rope_table_cpu(float* cos_table, float* sin_table, int positions, int HD, double theta,
                                  double factor, double low, double high, int original) {
    int half = HD / 2;
#pragma omp parallel for
    for (int i = 0; i < half; i++) {
        double f = rope_frequency(i, HD, theta, factor, low, high, original);
        for (int p = 0; p < positions; p++) {
            cos_table[(size_t)p * half + i] = (float)cos(p * f);
            sin_table[(size_t)p * half + i] = (float)sin(p * f);
        }
    }
}

// turns x in place, forward (direction 1) or back (-1)
static inline void rotate(float* x, const float* cos_table, const float* sin_table, int B, int T, int pos, int heads,
                          int HD, int ldx, float direction) {
    int half = HD / 2;
    size_t rows = (size_t)B * T;
#pragma omp parallel for if (rows > 1)
    for (size_t row = 0; row < rows; row++) {
        size_t position = (size_t)pos + row % T;
        const float *c = cos_table + position * half, *s = sin_table + position * half;
        for (int h = 0; h < heads; h++) {
            float *x1 = x + row * ldx + (size_t)h * HD, *x2 = x1 + half;
#pragma omp simd
            for (int i = 0; i < half; i++) {
                float a = x1[i], b = x2[i], si = direction * s[i];
                x1[i] = a * c[i] - b * si;
                x2[i] = b * c[i] + a * si;
            }
        }
    }
}

// in place on the first `heads` heads of each of the B*T rows of x; row (b, t) is at position pos + t. With q, k, v packed,
// heads = NH + NKV
static inline void rope_forward_cpu(float* x, const float* cos_table, const float* sin_table, int B, int T, int pos,
                                    int heads, int HD, int ldx) {
    rotate(x, cos_table, sin_table, B, T, pos, heads, HD, ldx, 1);
}

// dx in place, from the gradient of the output to that of the input
static inline void rope_backward_cpu(float* dx, const float* cos_table, const float* sin_table, int B, int T, int pos,
                                     int heads, int HD, int ldx) {
    rotate(dx, cos_table, sin_table, B, T, pos, heads, HD, ldx, -1);
}
