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
Proved by       dev/test/test_ops.c (finite differences; the frequencies of Llama 3.1 and 3.2), test_llama3.cu (GPU against
                CPU)
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

#ifdef __CUDACC__
#include "gpu.cuh"

// ---- GPU -------------------------------------------------------------------------------------
// A thread owns W neighbouring pairs of a head, 16 bytes of each half. A block has along x the pieces of half a head, along y
// the heads of a row, and along z, where those are few threads, neighbouring rows. The threads of all heads ask for the same
// cosines and sines, which the first level of the cache hands out; the second is told to keep them while x, of which there is a
// hundred times as much, passes. x is asked for first: it comes from further away.
//
// Half a head that is no multiple of 16 bytes (HD 8 or 24 in bf16) is moved by 8.

enum { ROPE_THREADS = 320, ROPE_FEW = 160 }; // of a block, at most: 40 heads of 128 in one turn; filled up with rows

// Bits: int4 or int2, what a thread moves of either half. The grid: rows of a sequence, and along y and z the sequences
template <typename Bits>
static __global__ void __launch_bounds__(ROPE_THREADS)
    rope_kernel(floatX* x, const float* __restrict__ cos_table, const float* __restrict__ sin_table, int B, int T,
                int pos, int heads, int ldx, float direction) {
    enum { W = sizeof(Bits) / sizeof(floatX) };
    const int t = (int)(blockIdx.x * blockDim.z + threadIdx.z), b = (int)(blockIdx.z * gridDim.y + blockIdx.y);
    if (t >= T || b >= B) return;
    const int pieces = (int)blockDim.x, half = pieces * W;
    const size_t table = ((size_t)pos + t) * half + threadIdx.x * W;
    Bits* at = reinterpret_cast<Bits*>(x + ((size_t)b * T + t) * ldx) + threadIdx.y * 2 * pieces + threadIdx.x;
    Bits low = at[0], high = at[pieces];
    Pack<float> c[W / 4], s[W / 4];
#pragma unroll
    for (int j = 0; j < W / 4; j++) {
        c[j] = pack_load_staying(cos_table + table + 4 * j);
        s[j] = pack_load_staying(sin_table + table + 4 * j);
    }
    for (int h = (int)threadIdx.y;;) {
        floatX v1[W], v2[W];
        memcpy(v1, &low, sizeof(Bits));
        memcpy(v2, &high, sizeof(Bits));
#pragma unroll
        for (int j = 0; j < W; j++) {
            const float a1 = to_float(v1[j]), a2 = to_float(v2[j]), co = c[j / 4].x[j % 4],
                        si = direction * s[j / 4].x[j % 4];
            v1[j] = from_float<floatX>(a1 * co - a2 * si);
            v2[j] = from_float<floatX>(a2 * co + a1 * si);
        }
        memcpy(&low, v1, sizeof(Bits));
        memcpy(&high, v2, sizeof(Bits));
        at[0] = low, at[pieces] = high;
        if ((h += (int)blockDim.y) >= heads) return;
        at += blockDim.y * 2 * pieces;
        low = at[0], high = at[pieces];
    }
}

template <typename Bits>
static inline void rope_launch(floatX* x, const float* cos_table, const float* sin_table, int B, int T, int pos,
                               int heads, int HD, int ldx, float direction, cudaStream_t stream) {
    const int pieces = HD / 2 / (int)(sizeof(Bits) / sizeof(floatX));
    launch_require(pieces <= ROPE_THREADS, "rope", "half a head is more than the threads of a block hold");
    const int turns = (int)ceil_div(heads, ROPE_THREADS / pieces), at_once = (int)ceil_div(heads, turns);
    // the z of a block ends at 64, the y of a grid at 65535
    const int rows = max(1, min(min(T, 64), ROPE_FEW / (pieces * at_once))), sequences = min(B, 65535);
    const dim3 grid((unsigned)ceil_div(T, rows), (unsigned)sequences, (unsigned)ceil_div(B, sequences));
    const dim3 block((unsigned)pieces, (unsigned)at_once, (unsigned)rows);
    rope_kernel<Bits><<<grid, block, 0, stream>>>(x, cos_table, sin_table, B, T, pos, heads, ldx, direction);
    launch_check();
}

static inline void rope_turn(floatX* x, const float* cos_table, const float* sin_table, int B, int T, int pos,
                             int heads, int HD, int ldx, float direction, cudaStream_t stream) {
    launch_require(HD > 0 && HD % 8 == 0, "rope", "HD (head_dim) must be a multiple of 8");
    launch_require(ldx % 8 == 0 && (int64_t)heads * HD <= ldx, "rope",
                   "rows must hold all heads and start at multiples of 8");
    if constexpr (sizeof(floatX) == 2)
        if (HD / 2 % PACK)
            return rope_launch<int2>(x, cos_table, sin_table, B, T, pos, heads, HD, ldx, direction, stream);
    rope_launch<int4>(x, cos_table, sin_table, B, T, pos, heads, HD, ldx, direction, stream);
}

// in place on the first `heads` heads of each of the B*T rows of x; row (b, t) is at position pos + t
static inline void rope_forward(floatX* x, const float* cos_table, const float* sin_table, int B, int T, int pos,
                                int heads, int HD, int ldx, cudaStream_t stream) {
    GpuOp op("rope_forward", 2.0 * B * T * heads * HD * sizeof(floatX) + 4.0 * T * HD, 0, stream);
    rope_turn(x, cos_table, sin_table, B, T, pos, heads, HD, ldx, 1, stream);
}

// dx in place, from the gradient of the output to that of the input
static inline void rope_backward(floatX* dx, const float* cos_table, const float* sin_table, int B, int T, int pos,
                                 int heads, int HD, int ldx, cudaStream_t stream) {
    GpuOp op("rope_backward", 2.0 * B * T * heads * HD * sizeof(floatX) + 4.0 * T * HD, 0, stream);
    rope_turn(dx, cos_table, sin_table, B, T, pos, heads, HD, ldx, -1, stream);
}
#endif
