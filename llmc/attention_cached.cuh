/*
Attention over a cache of keys and values, for generation: the simplest right kernel.

    out[t, h] = sum over j = 0 .. pos + t of softmax_j(scale * q[t, h] . k[j]) * v[j]

One block a query and head walks the keys 256 at a time with an online softmax: a thread has one key's score, then each thread
sums one or more numbers of the output. Row j of the cache holds k, then v, of all NKV heads.

Bound by        memory: (pos + t) * 2*NKV*HD numbers a token, read by each of the G heads of a group for itself
Proved by       test_llama3.cu: greedy tokens equal those of llama3.c
*/
#pragma once

#include "gpu.cuh"

enum { CACHED_KEYS = 256 }; // and threads

static __global__ void __launch_bounds__(CACHED_KEYS) attention_cached_kernel(floatX* out, const floatX* q, const floatX* cache, int pos,
                                                                       int NH, int NKV, int HD, int ldq) {
    extern __shared__ float shared[]; // q (HD), then the sums of the output (HD)
    float *query = shared, *sum = shared + HD;
    __shared__ float p[CACHED_KEYS], largest;
    const int t = blockIdx.x, h = blockIdx.y, tid = threadIdx.x, keys = pos + t + 1;
    const size_t row = (size_t)2 * NKV * HD;
    const floatX *k = cache + (size_t)(h / (NH / NKV)) * HD, *v = k + (size_t)NKV * HD;
    for (int i = tid; i < HD; i += CACHED_KEYS) {
        query[i] = to_float(q[(size_t)t * ldq + (size_t)h * HD + i]) * rsqrtf((float)HD);
        sum[i] = 0;
    }
    float max = -INFINITY, total = 0;
    for (int j0 = 0; j0 < keys; j0 += CACHED_KEYS) {
        __syncthreads();
        float score = -INFINITY;
        if (j0 + tid < keys) {
            score = 0;
            for (int i = 0; i < HD; i++) score += query[i] * to_float(k[(size_t)(j0 + tid) * row + i]);
        }
        p[tid] = score;
        __syncthreads();
        if (tid < WARP) {
            float m = p[tid];
            for (int j = tid; j < CACHED_KEYS; j += WARP) m = fmaxf(m, p[j]);
            m = warp_max(m);
            if (tid == 0) largest = m;
        }
        __syncthreads();
        const float old = max;
        max = fmaxf(max, largest);
        const float scale = expf(old - max);
        const float e = expf(score - max);
        p[tid] = e; // each thread reads and writes its own until the sum's barrier
        total = total * scale + block_sum(e);
        const int n = min(CACHED_KEYS, keys - j0);
        for (int i = tid; i < HD; i += CACHED_KEYS) {
            float s = sum[i] * scale;
            for (int j = 0; j < n; j++) s += p[j] * to_float(v[(size_t)(j0 + j) * row + i]);
            sum[i] = s;
        }
    }
    for (int i = tid; i < HD; i += CACHED_KEYS)
        out[(size_t)t * NH * HD + (size_t)h * HD + i] = from_float<floatX>(sum[i] / total);
}

// overwrites out (T, NH*HD) for the queries at positions pos .. pos+T-1, whose keys and values are in the cache already;
// row t of q is ldq apart from the next
static inline void attention_cached(floatX* out, const floatX* q, const floatX* cache, int T, int pos, int NH, int NKV, int HD,
                                    int ldq, cudaStream_t stream) {
    const double keys = T * (pos + (T + 1) / 2.0); // of all queries
    const double numbers = 2.0 * ((double)(pos + T) * NKV + (double)T * NH) * HD;
    GpuOp op("attention_cached", numbers * sizeof(floatX), 4 * keys * NH * HD, stream);
    launch_require(HD <= 1024, "attention_cached", "head_dim is at most 1024");
    attention_cached_kernel<<<dim3((unsigned)T, (unsigned)NH), CACHED_KEYS, 2 * sizeof(float) * (size_t)HD, stream>>>(
        out, q, cache, pos, NH, NKV, HD, ldq);
    launch_check();
}
