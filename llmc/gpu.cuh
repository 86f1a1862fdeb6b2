/*
What every CUDA half uses: the storage type, checks, vectors of 16 bytes, sums within a block, names and times of ops.

    floatX      the type of weights, activations and gradients: bf16, or float when built with -DPRECISION_FP32
    launchers   the bare name of an op: outputs, inputs, sizes, scratch, stream. The first line says what it is and what it
                moves, GpuOp op(…); every launch is followed by launch_check()
    Numerics    arithmetic in fp32 whatever floatX is; a number is rounded once, when it is stored
*/
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include "dtype.h"
#include "error.h"

#ifdef PRECISION_FP32
typedef float floatX;
static const Dtype DTYPE_X = DTYPE_F32;
#else
typedef __nv_bfloat16 floatX;
static const Dtype DTYPE_X = DTYPE_BF16;
#endif

enum { WARP = 32, PACK = 16 / sizeof(floatX) }; // numbers in 16 bytes

// ---- checks ----------------------------------------------------------------------------------

// ends the program when a CUDA call fails: what was called, where, and what the driver says
#define cuda_check(call) cuda_check_at(call, #call, __FILE__, __LINE__)
static inline void cuda_check_at(cudaError_t code, const char* call, const char* file, int line) {
    if (code != cudaSuccess) die("%s:%d: %s: %s (%s)", file, line, call, cudaGetErrorString(code), cudaGetErrorName(code));
}

// after every launch: its arguments were good. -DGPU_SYNC also waits, so that a fault is reported where it happened
static inline void launch_check_at(const char* file, int line) {
    cuda_check_at(cudaGetLastError(), "kernel launch", file, line);
#ifdef GPU_SYNC
    cuda_check_at(cudaDeviceSynchronize(), "kernel", file, line);
#endif
}
#define launch_check() launch_check_at(__FILE__, __LINE__)

// a promise of a launcher's caller, in words: sizes that are no multiple of a vector, say
static inline void launch_require(bool ok, const char* op, const char* promise) {
    if (!ok) die("%s: %s", op, promise);
}

// ---- sizes -----------------------------------------------------------------------------------

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// multiprocessors of the GPU in use
static inline int gpu_processors(void) {
    static int count = 0;
    int device;
    if (!count) {
        cuda_check(cudaGetDevice(&device));
        cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    }
    return count;
}

// ---- numbers ---------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// 16 bytes of numbers, moved by one instruction; addresses are multiples of 16
template <typename T> struct alignas(16) Pack {
    enum { N = 16 / sizeof(T) };
    T x[N];
    __device__ __forceinline__ float get(int i) const { return to_float(x[i]); }
    __device__ __forceinline__ void set(int i, float value) { x[i] = from_float<T>(value); }
};
typedef Pack<floatX> PackX;

template <typename T> __device__ __forceinline__ Pack<T> pack_load(const T* p) {
    int4 bits = *reinterpret_cast<const int4*>(p);
    Pack<T> v;
    memcpy(&v, &bits, 16);
    return v;
}

// read or written once: it need not stay in the cache
template <typename T> __device__ __forceinline__ Pack<T> pack_load_once(const T* p) {
    int4 bits = __ldcs(reinterpret_cast<const int4*>(p));
    Pack<T> v;
    memcpy(&v, &bits, 16);
    return v;
}

// read again much later: the second level of the cache keeps it longer than others
__device__ __forceinline__ Pack<float> pack_load_staying(const float* p) {
    uint64_t policy;
    Pack<float> v;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm("ld.global.nc.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
        : "=f"(v.x[0]), "=f"(v.x[1]), "=f"(v.x[2]), "=f"(v.x[3])
        : "l"(p), "l"(policy));
    return v;
}

template <typename T> __device__ __forceinline__ void pack_store(T* p, Pack<T> v) {
    int4 bits;
    memcpy(&bits, &v, 16);
    *reinterpret_cast<int4*>(p) = bits;
}

template <typename T> __device__ __forceinline__ void pack_store_once(T* p, Pack<T> v) {
    int4 bits;
    memcpy(&bits, &v, 16);
    __stcs(reinterpret_cast<int4*>(p), bits);
}

// ---- sums ------------------------------------------------------------------------------------

// over the 32 lanes of a warp, in a fixed order; every lane gets the result
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = WARP / 2; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int offset = WARP / 2; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// over a one-dimensional block of whole warps, in a fixed order; every thread gets the result. All threads must call it
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads(); // an earlier sum may still be read
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? partial[lane] : 0);
}

// ---- names and times -------------------------------------------------------------------------

// a range with a name in NVIDIA's profilers, from here to the end of the scope
struct NvtxRange {
    explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
    ~NvtxRange() { nvtxRangePop(); }
};

// one call of an op while times are taken; timing.cuh makes a table of them
typedef struct {
    const char* op;
    int64_t N, C, OC;    // of a product; 0 of the rest
    double bytes, flops; // that it must move, at least once each, and compute
    cudaEvent_t start, stop;
} GpuCall;

static struct {
    bool on;
    GpuCall* calls; // [n] of the step so far, of room for `room`: their events are made once and used again
    int n, room;
} gpu_calls;

static inline GpuCall* gpu_calls_add(void) {
    if (gpu_calls.n == gpu_calls.room) {
        const int room = gpu_calls.room ? 2 * gpu_calls.room : 1024;
        gpu_calls.calls = (GpuCall*)reallocate(gpu_calls.calls, (size_t)room, sizeof *gpu_calls.calls);
        for (; gpu_calls.room < room; gpu_calls.room++) {
            cuda_check(cudaEventCreate(&gpu_calls.calls[gpu_calls.room].start));
            cuda_check(cudaEventCreate(&gpu_calls.calls[gpu_calls.room].stop));
        }
    }
    return &gpu_calls.calls[gpu_calls.n++];
}

// An op, from here to the end of the scope: the first line of every launcher, which calls no other. A range with its name,
// and when times are taken a call of it
struct GpuOp {
    NvtxRange range;
    cudaStream_t stream;
    int call; // -1: no times are taken
    GpuOp(const char* op, double bytes, double flops, cudaStream_t on, int64_t N = 0, int64_t C = 0, int64_t OC = 0)
        : range(op), stream(on), call(-1) {
        if (!gpu_calls.on) return;
        GpuCall* c = gpu_calls_add();
        call = gpu_calls.n - 1;
        c->op = op, c->N = N, c->C = C, c->OC = OC, c->bytes = bytes, c->flops = flops;
        cuda_check(cudaEventRecord(c->start, stream));
    }
    ~GpuOp() {
        if (call >= 0) cuda_check(cudaEventRecord(gpu_calls.calls[call].stop, stream));
    }
};
