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
On the GPU      w and g are floatX. bf16 weights have fp32 master weights, which are updated and then rounded; without them, and
                for moments kept in bf16, what is stored is rounded up or down at random, with the probability that makes its
                mean right: else a change below half a unit in the last place would never arrive. The random number is a hash
                of (seed, tensor, step, index), so that a resumed run has the same. Bytes for each parameter with bf16 weights
                and fp32 moments: 28 with master weights (half read, half written), 22 without; with bf16 moments 20 and 14.
                Squares are summed in fp32 for 8 numbers, then in double, by 1024 blocks at most, always in the same order; a
                gradient above 1.8e19 counts as infinite
Proved by       dev/test/test_ops.c (against the formula), test_ops_float.c, the golden ten steps of the model,
                dev/test/gpu/test_adamw.cuh
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

// ---- GPU -------------------------------------------------------------------------------------

#ifdef __CUDACC__
#include "gpu.cuh"
#include "random.h"

// x rounded to bf16, up with the probability of its distance from the lower neighbour: 16 random bits are added below the last
// place. Infinity and NaN stay what they are
__host__ __device__ static inline uint16_t adamw_round(float x, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000u) == 0x7f800000u) return (uint16_t)(bits >> 16 | ((bits & 0x7fffffu) ? 0x40 : 0));
    return (uint16_t)((bits + (random & 0xffffu)) >> 16);
}

// 64 random bits for parameter i: 16 each for w, m and v
__host__ __device__ static inline uint64_t adamw_bits(uint64_t key, uint64_t i) { return random_mix(key ^ i); }
static inline uint64_t adamw_key(uint64_t seed, uint64_t tensor, int step) {
    return random_bits(seed, tensor, (uint64_t)step);
}

// what of a step is the same for all parameters
typedef struct {
    float keep, mix1, mix2, beta2, step_size, root, eps;
    uint64_t key;
} AdamWStep;

static inline AdamWStep adamw_step(float lr, float beta1, float beta2, float eps, float weight_decay, int step,
                                   uint64_t key) {
    AdamWStep s;
    s.keep = (float)(1 - (double)lr * weight_decay);
    s.mix1 = 1 - beta1, s.mix2 = 1 - beta2, s.beta2 = beta2, s.eps = eps;
    s.step_size = (float)(lr / (1 - pow(beta1, step))), s.root = (float)sqrt(1 - pow(beta2, step));
    s.key = key;
    return s;
}

// COUNT numbers that one thread moves at once: 16 bytes of the widest type in play, so that a warp's accesses leave no gaps
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) AdamWPack {
    T x[COUNT];
};

__device__ __forceinline__ void adamw_store(float& to, float x, uint64_t) { to = x; }
__device__ __forceinline__ void adamw_store(__nv_bfloat16& to, float x, uint64_t random) {
    to = __ushort_as_bfloat16(adamw_round(x, (uint32_t)random));
}

// Each thread updates COUNT neighbours twice, a block's width apart, so that its loads are in flight together. Grid: n over
// 2 * COUNT * threads
template <typename M, bool MASTER, int COUNT>
static __global__ void __launch_bounds__(256) adamw_kernel(floatX* w, float* master, M* m, M* v, const floatX* g,
                                                           size_t n, AdamWStep s, const float* grad_scale) {
    const float scale = *grad_scale;
    AdamWPack<floatX, COUNT> wi[2], gi[2];
    AdamWPack<float, COUNT> full[2];
    AdamWPack<M, COUNT> mi[2], vi[2];
    size_t start[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        start[j] = (((size_t)blockIdx.x * 2 + j) * blockDim.x + threadIdx.x) * COUNT;
        if (start[j] >= n) continue;
        gi[j] = *(const AdamWPack<floatX, COUNT>*)(g + start[j]);
        mi[j] = *(const AdamWPack<M, COUNT>*)(m + start[j]);
        vi[j] = *(const AdamWPack<M, COUNT>*)(v + start[j]);
        if (MASTER)
            full[j] = *(const AdamWPack<float, COUNT>*)(master + start[j]);
        else
            wi[j] = *(const AdamWPack<floatX, COUNT>*)(w + start[j]);
    }
    if (!isfinite(scale)) return;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (start[j] >= n) continue;
        for (int k = 0; k < COUNT; k++) {
            const uint64_t random =
                sizeof(M) == 2 || (!MASTER && sizeof(floatX) == 2) ? adamw_bits(s.key, start[j] + k) : 0;
            const float grad = to_float(gi[j].x[k]) * scale, old_m = to_float(mi[j].x[k]);
            const float new_m = old_m + s.mix1 * (grad - old_m);
            const float new_v = to_float(vi[j].x[k]) * s.beta2 + s.mix2 * grad * grad;
            const float old_w = MASTER ? full[j].x[k] : to_float(wi[j].x[k]);
            const float new_w = old_w * s.keep - s.step_size * new_m / (sqrtf(new_v) / s.root + s.eps);
            adamw_store(mi[j].x[k], new_m, random);
            adamw_store(vi[j].x[k], new_v, random >> 16);
            full[j].x[k] = new_w;
            if (MASTER)
                wi[j].x[k] = from_float<floatX>(new_w);
            else
                adamw_store(wi[j].x[k], new_w, random >> 32);
        }
        *(AdamWPack<M, COUNT>*)(m + start[j]) = mi[j];
        *(AdamWPack<M, COUNT>*)(v + start[j]) = vi[j];
        *(AdamWPack<floatX, COUNT>*)(w + start[j]) = wi[j];
        if (MASTER) *(AdamWPack<float, COUNT>*)(master + start[j]) = full[j];
    }
}

// One step: updates w, master, m and v (n each) with grad_scale * g; m and v start as zeros, step = 1, 2, … master may be
// NULL; w is then rounded at random (in fp32, not at all). grad_scale lies on the GPU; when it is not finite, nothing changes.
// tensor is a number of its own for each tensor
template <typename M>
static inline void adamw(floatX* w, float* master, M* m, M* v, const floatX* g, size_t n, float lr, float beta1,
                         float beta2, float eps, float weight_decay, int step, const float* grad_scale, uint64_t seed,
                         uint64_t tensor, cudaStream_t stream) {
    const double bytes = 4.0 * sizeof(M) + (master ? 2.0 * sizeof(float) + 2.0 * sizeof(floatX) : 3.0 * sizeof(floatX));
    GpuOp op("adamw", (double)n * bytes, 0, stream);
    constexpr int THREADS = 256, NARROW = sizeof(M) == 2 && sizeof(floatX) == 2 ? 8 : 4;
    launch_require(n % 8 == 0 && n > 0, "adamw", "tensors have a multiple of 8 numbers");
    const AdamWStep s = adamw_step(lr, beta1, beta2, eps, weight_decay, step, adamw_key(seed, tensor, step));
    const int64_t count = master ? 4 : NARROW;
    const unsigned blocks = (unsigned)ceil_div((int64_t)n, 2 * count * THREADS);
    if (master)
        adamw_kernel<M, true, 4><<<blocks, THREADS, 0, stream>>>(w, master, m, v, g, n, s, grad_scale);
    else
        adamw_kernel<M, false, NARROW><<<blocks, THREADS, 0, stream>>>(w, master, m, v, g, n, s, grad_scale);
    launch_check();
}

// ---- GPU: the gradient's norm ----------------------------------------------------------------

enum { GLOBAL_NORM_BLOCKS = 1024, GLOBAL_NORM_THREADS = 256, GLOBAL_NORM_LOADS = 4 };

// bytes of what sum_of_squares adds to and global_norm clears; zeros at first
static inline size_t global_norm_scratch(void) { return GLOBAL_NORM_BLOCKS * sizeof(double); }

// the sum over the threads of a block, in a fixed order; thread 0 gets the result
static __device__ __forceinline__ double adamw_block_sum(double x) {
    __shared__ double partial[WARP];
    for (int offset = WARP / 2; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < (int)blockDim.x / WARP && threadIdx.x == 0; i++) x += partial[i];
    return x;
}

// Each block adds its part to a number of its own; each thread has GLOBAL_NORM_LOADS packs in flight. Grid:
// GLOBAL_NORM_BLOCKS at most, by n alone
static __global__ void __launch_bounds__(GLOBAL_NORM_THREADS)
    sum_of_squares_kernel(double* sums, const floatX* g, size_t n) {
    const size_t stride = (size_t)gridDim.x * blockDim.x * PACK;
    double sum = 0;
    for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < n; i += GLOBAL_NORM_LOADS * stride) {
        PackX v[GLOBAL_NORM_LOADS];
        for (int j = 0; j < GLOBAL_NORM_LOADS; j++) v[j] = i + j * stride < n ? pack_load(g + i + j * stride) : PackX{};
        for (int j = 0; j < GLOBAL_NORM_LOADS; j++) {
            float part = 0;
            for (int k = 0; k < PACK; k++) part += v[j].get(k) * v[j].get(k);
            sum += part;
        }
    }
    sum = adamw_block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] += sum;
}

// adds the squares of g (n) to sums, global_norm_scratch() bytes
static inline void sum_of_squares(double* sums, const floatX* g, size_t n, cudaStream_t stream) {
    GpuOp op("sum_of_squares", (double)n * sizeof(floatX), 0, stream);
    launch_require(n % 8 == 0 && n > 0, "sum_of_squares", "tensors have a multiple of 8 numbers");
    int64_t blocks = ceil_div((int64_t)n, GLOBAL_NORM_LOADS * PACK * GLOBAL_NORM_THREADS);
    if (blocks > GLOBAL_NORM_BLOCKS) blocks = GLOBAL_NORM_BLOCKS;
    sum_of_squares_kernel<<<(unsigned)blocks, GLOBAL_NORM_THREADS, 0, stream>>>(sums, g, n);
    launch_check();
}

// one block, a thread for each sum
static __global__ void __launch_bounds__(GLOBAL_NORM_BLOCKS) global_norm_kernel(float* norm, double* sums, float clip) {
    const double total = adamw_block_sum(sums[threadIdx.x]);
    sums[threadIdx.x] = 0;
    if (threadIdx.x != 0) return;
    const float length = (float)sqrt(total), factor = clip / (length + 1e-6f);
    norm[0] = length;
    norm[1] = !isfinite(length) ? NAN : clip > 0 && factor < 1 ? factor : 1;
}

// overwrites norm[0] with the root of all sums and norm[1] with the factor that clips to it (clip 0: 1), which is NaN when the
// norm is not finite: adamw then changes nothing, and the host learns it from these 8 bytes. Clears sums
static inline void global_norm(float* norm, double* sums, float clip, cudaStream_t stream) {
    GpuOp op("global_norm", (double)global_norm_scratch(), 0, stream);
    global_norm_kernel<<<1, GLOBAL_NORM_BLOCKS, 0, stream>>>(norm, sums, clip);
    launch_check();
}
#endif
