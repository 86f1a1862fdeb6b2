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
                Many tensors are one launch: between two launches most of the GPU would be idle. With bf16 moments the root
                and the quotient of the update are approximations, wrong by 2^-22.
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

// what the moments take from a weight. With bf16 moments a root and an inverse of one instruction each, wrong by 2^-22 at most:
// there the arithmetic weighs, and s.root is 1 / root
template <typename M>
__device__ __forceinline__ float adamw_change(float m, float v, const AdamWStep& s) {
    float root, inverse;
    if (sizeof(M) == 4) return s.step_size * m / (sqrtf(v) / s.root + s.eps);
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(root * s.root + s.eps));
    return s.step_size * m * inverse;
}

// stores 8 or 16 bytes if ok, without a branch: the compiler would put off loads until the branch is decided
template <typename T>
__device__ __forceinline__ void adamw_store_if(bool ok, T* p, const T& x) {
    uint32_t v[sizeof(T) / 4];
    memcpy(v, &x, sizeof x);
    if constexpr (sizeof(T) == 16)
        asm volatile(
            "{ .reg .pred ok; setp.ne.b32 ok, %0, 0; @ok st.global.v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"((int)ok),
            "l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
            : "memory");
    else
        asm volatile("{ .reg .pred ok; setp.ne.b32 ok, %0, 0; @ok st.global.v2.b32 [%1], {%2, %3}; }" ::"r"((int)ok),
                     "l"(p), "r"(v[0]), "r"(v[1])
                     : "memory");
}

// one tensor of a step. number is one of its own, from which its random bits come
typedef struct {
    floatX* w;
    float* master; // NULL: w is rounded at random (in fp32, not at all)
    void *m, *v;
    const floatX* g;
    size_t n;
    float weight_decay;
    uint64_t number;
} AdamWTensor;

enum { ADAMW_CHUNK = 2048, ADAMW_LIST = 56 }; // parameters of a block; tensors of a launch, whose arguments have 4 KB

typedef struct {
    struct {
        floatX* w;
        float* master;
        void *m, *v;
        const floatX* g;
        size_t n;
        uint64_t key;
        float keep;
        unsigned first; // block
    } tensor[ADAMW_LIST];
    int count;
} AdamWList;

// One launch for many tensors: the tail of one is the beginning of the next. A block has a chunk of one tensor; each thread
// updates COUNT neighbours twice, a block's width apart, so that its loads are in flight together
template <typename M, bool MASTER, int COUNT>
static __global__ void __launch_bounds__(ADAMW_CHUNK / (2 * COUNT))
    adamw_kernel(const __grid_constant__ AdamWList list, AdamWStep s, const float* grad_scale) {
    int t = 0;
#pragma unroll
    for (int half = 32; half; half /= 2)
        if (t + half < list.count && list.tensor[t + half].first <= blockIdx.x) t += half;
    const size_t n = list.tensor[t].n, chunk = (size_t)(blockIdx.x - list.tensor[t].first) * ADAMW_CHUNK;
    floatX* w = list.tensor[t].w;
    float* master = list.tensor[t].master;
    M *m = (M*)list.tensor[t].m, *v = (M*)list.tensor[t].v;
    const floatX* g = list.tensor[t].g;
    const uint64_t key = list.tensor[t].key;
    AdamWPack<floatX, COUNT> wi[2], gi[2];
    AdamWPack<float, COUNT> full[2];
    AdamWPack<M, COUNT> mi[2], vi[2];
    size_t start[2];
    s.keep = list.tensor[t].keep;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        start[j] = chunk + (j * blockDim.x + threadIdx.x) * COUNT;
        if (start[j] >= n) continue;
        gi[j] = *(const AdamWPack<floatX, COUNT>*)(g + start[j]);
        mi[j] = *(const AdamWPack<M, COUNT>*)(m + start[j]);
        vi[j] = *(const AdamWPack<M, COUNT>*)(v + start[j]);
        if (MASTER)
            full[j] = *(const AdamWPack<float, COUNT>*)(master + start[j]);
        else
            wi[j] = *(const AdamWPack<floatX, COUNT>*)(w + start[j]);
    }
    __syncwarp(); // the loads stay above it: some would be put off, to save registers
    const float scale = *grad_scale;
    const bool ok = isfinite(scale);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (start[j] >= n) continue;
        for (int k = 0; k < COUNT; k++) {
            const uint64_t random =
                sizeof(M) == 2 || (!MASTER && sizeof(floatX) == 2) ? adamw_bits(key, start[j] + k) : 0;
            const float grad = to_float(gi[j].x[k]) * scale, old_m = to_float(mi[j].x[k]);
            const float new_m = old_m + s.mix1 * (grad - old_m);
            const float new_v = to_float(vi[j].x[k]) * s.beta2 + s.mix2 * grad * grad;
            const float old_w = MASTER ? full[j].x[k] : to_float(wi[j].x[k]);
            const float new_w = old_w * s.keep - adamw_change<M>(new_m, new_v, s);
            adamw_store(mi[j].x[k], new_m, random);
            adamw_store(vi[j].x[k], new_v, random >> 16);
            full[j].x[k] = new_w;
            if (MASTER)
                wi[j].x[k] = from_float<floatX>(new_w);
            else
                adamw_store(wi[j].x[k], new_w, random >> 32);
        }
        adamw_store_if(ok, (AdamWPack<M, COUNT>*)(m + start[j]), mi[j]);
        adamw_store_if(ok, (AdamWPack<M, COUNT>*)(v + start[j]), vi[j]);
        adamw_store_if(ok, (AdamWPack<floatX, COUNT>*)(w + start[j]), wi[j]);
        if (MASTER) adamw_store_if(ok, (AdamWPack<float, COUNT>*)(master + start[j]), full[j]);
    }
}

// One step of `count` tensors, all with master weights or none: updates w, master, m and v (n each) with grad_scale * g; m and
// v start as zeros, step = 1, 2, … grad_scale lies on the GPU; when it is not finite, nothing changes. M: the type of m and v
template <typename M>
static inline void adamw_tensors(const AdamWTensor* tensors, int count, float lr, float beta1, float beta2, float eps,
                                 int step, const float* grad_scale, uint64_t seed, cudaStream_t stream) {
    constexpr int NARROW = sizeof(M) == 2 && sizeof(floatX) == 2 ? 8 : 4;
    const bool master = count && tensors[0].master;
    double parameters = 0;
    for (int i = 0; i < count; i++) {
        parameters += (double)tensors[i].n;
        launch_require(tensors[i].n % 8 == 0 && tensors[i].n > 0, "adamw", "tensors have a multiple of 8 numbers");
        launch_require(!tensors[i].master == !master, "adamw", "all tensors have master weights, or none");
    }
    const double bytes = 4.0 * sizeof(M) + (master ? 2.0 * sizeof(float) + 2.0 * sizeof(floatX) : 3.0 * sizeof(floatX));
    GpuOp op("adamw", parameters * bytes, 0, stream);
    AdamWStep s = adamw_step(lr, beta1, beta2, eps, 0, step, 0);
    if (sizeof(M) == 2) s.root = 1 / s.root;
    for (int start = 0; start < count; start += ADAMW_LIST) {
        AdamWList list;
        int64_t blocks = 0;
        list.count = count - start < ADAMW_LIST ? count - start : ADAMW_LIST;
        for (int i = 0; i < list.count; i++) {
            const AdamWTensor* t = &tensors[start + i];
            list.tensor[i].w = t->w, list.tensor[i].master = t->master, list.tensor[i].m = t->m,
            list.tensor[i].v = t->v;
            list.tensor[i].g = t->g, list.tensor[i].n = t->n, list.tensor[i].key = adamw_key(seed, t->number, step);
            list.tensor[i].keep = (float)(1 - (double)lr * t->weight_decay), list.tensor[i].first = (unsigned)blocks;
            blocks += ceil_div((int64_t)t->n, ADAMW_CHUNK);
        }
        launch_require(blocks <= INT32_MAX, "adamw", "the tensors of a launch have at most 2^31 chunks");
        if (master)
            adamw_kernel<M, true, 4><<<(unsigned)blocks, ADAMW_CHUNK / 8, 0, stream>>>(list, s, grad_scale);
        else
            adamw_kernel<M, false, NARROW>
                <<<(unsigned)blocks, ADAMW_CHUNK / (2 * NARROW), 0, stream>>>(list, s, grad_scale);
        launch_check();
    }
}

// the same for one tensor
template <typename M>
static inline void adamw(floatX* w, float* master, M* m, M* v, const floatX* g, size_t n, float lr, float beta1,
                         float beta2, float eps, float weight_decay, int step, const float* grad_scale, uint64_t seed,
                         uint64_t number, cudaStream_t stream) {
    const AdamWTensor tensor = { w, master, m, v, g, n, weight_decay, number };
    adamw_tensors<M>(&tensor, 1, lr, beta1, beta2, eps, step, grad_scale, seed, stream);
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
