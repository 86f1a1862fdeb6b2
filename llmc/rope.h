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
// A warp turns some heads of one row. A lane owns W neighbouring pairs, 16 bytes of each half: the lanes of one head side
// by side, then those of the next, as many heads at once as fit 32 lanes, and that up to ROPE_TURNS times. All loads of a
// lane come before its first store, and cosines and sines are read once for all its heads:
//
//     HD 64, bf16     lane   0 1 2 3  4 5 6 7  …        4 lanes a head, 8 heads at once, 40 heads in 5 turns
//                     pairs  0 8 16 24 of head 0, of head 1, …
//
// Half a head that is no multiple of 16 bytes (HD 8 or 24 in bf16) is moved by 8. A head of more than 32 lanes is split along
// blockIdx.y.

enum { ROPE_TURNS = 5, ROPE_WARPS = 4 };

// Bits: int4 or int2, what one lane moves of either half. per_warp: heads of a warp, row tasks: warps to a row
template <typename Bits>
static __global__ void __launch_bounds__(ROPE_WARPS* WARP)
    rope_kernel(floatX* x, const float* __restrict__ cos_table, const float* __restrict__ sin_table, unsigned tasks,
                unsigned row_tasks, int T, int pos, int heads, int per_warp, int HD, int ldx, float direction) {
    enum { W = sizeof(Bits) / sizeof(floatX) };
    const int half = HD / 2, lanes = min(half / W, (int)WARP), at_once = WARP / lanes, lane = threadIdx.x;
    const unsigned task = blockIdx.x * ROPE_WARPS + threadIdx.y, row = task / row_tasks;
    const int i = (int)(blockIdx.y * WARP + lane % lanes) * W;
    if (task >= tasks || lane >= at_once * lanes || i >= half) return;

    const int start = (int)(task % row_tasks) * per_warp, end = min(start + per_warp, heads),
              first = start + lane / lanes;
    floatX* x1 = x + (size_t)row * ldx + i;
    Bits low[ROPE_TURNS], high[ROPE_TURNS];
#pragma unroll
    for (int k = 0; k < ROPE_TURNS; k++) {
        int h = first + k * at_once;
        if (h >= end) continue;
        low[k] = *reinterpret_cast<const Bits*>(x1 + h * HD);
        high[k] = *reinterpret_cast<const Bits*>(x1 + h * HD + half);
    }
    const size_t table = ((size_t)pos + row % (unsigned)T) * half + i;
    Pack<float> c[W / 4], s[W / 4];
#pragma unroll
    for (int j = 0; j < W; j += 4) {
        c[j / 4] = pack_load(cos_table + table + j);
        s[j / 4] = pack_load(sin_table + table + j);
    }
#pragma unroll
    for (int k = 0; k < ROPE_TURNS; k++) {
        int h = first + k * at_once;
        if (h >= end) continue;
        floatX a[W], b[W];
        memcpy(a, &low[k], sizeof(Bits));
        memcpy(b, &high[k], sizeof(Bits));
#pragma unroll
        for (int j = 0; j < W; j++) {
            float v1 = to_float(a[j]), v2 = to_float(b[j]), co = c[j / 4].x[j % 4], si = direction * s[j / 4].x[j % 4];
            a[j] = from_float<floatX>(v1 * co - v2 * si);
            b[j] = from_float<floatX>(v2 * co + v1 * si);
        }
        memcpy(&low[k], a, sizeof(Bits));
        memcpy(&high[k], b, sizeof(Bits));
        *reinterpret_cast<Bits*>(x1 + h * HD) = low[k];
        *reinterpret_cast<Bits*>(x1 + h * HD + half) = high[k];
    }
}

template <typename Bits>
static inline void rope_launch(floatX* x, const float* cos_table, const float* sin_table, int64_t rows, int T, int pos,
                               int heads, int HD, int ldx, float direction, cudaStream_t stream) {
    int pieces = HD / 2 / (int)(sizeof(Bits) / sizeof(floatX)), at_once = WARP / (pieces < WARP ? pieces : (int)WARP);
    int64_t turns = ceil_div(heads, at_once), row_tasks = ceil_div(turns, ROPE_TURNS), tasks = rows * row_tasks;
    int per_warp = (int)ceil_div(turns, row_tasks) * at_once; // the turns of a row, spread evenly over its warps
    launch_require(tasks <= INT32_MAX, "rope", "B * T * heads is more than one launch can number");
    dim3 grid((unsigned)ceil_div(tasks, ROPE_WARPS), (unsigned)ceil_div(pieces, WARP)), block(WARP, ROPE_WARPS);
    rope_kernel<Bits><<<grid, block, 0, stream>>>(x, cos_table, sin_table, (unsigned)tasks, (unsigned)row_tasks, T, pos,
                                                  heads, per_warp, HD, ldx, direction);
    launch_check();
}

static inline void rope_turn(floatX* x, const float* cos_table, const float* sin_table, int B, int T, int pos,
                             int heads, int HD, int ldx, float direction, cudaStream_t stream) {
    launch_require(HD > 0 && HD % 8 == 0, "rope", "HD (head_dim) must be a multiple of 8");
    launch_require(ldx % 8 == 0 && (int64_t)heads * HD <= ldx, "rope",
                   "rows must hold all heads and start at multiples of 8");
    int64_t rows = (int64_t)B * T;
    if constexpr (sizeof(floatX) == 2)
        if (HD / 2 % PACK)
            return rope_launch<int2>(x, cos_table, sin_table, rows, T, pos, heads, HD, ldx, direction, stream);
    rope_launch<int4>(x, cos_table, sin_table, rows, T, pos, heads, HD, ldx, direction, stream);
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
