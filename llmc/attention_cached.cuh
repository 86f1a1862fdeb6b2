/*
Attention over a cache of keys and values, for generation.

    out[t, h] = sum over j <= pos + t of softmax_j(scale * q[t, h] . k[j]) * v[j]

Row j of the cache holds k[j], then v[j], of all NKV heads. Two kernels:

ring            one query, a token of its own: bf16, HD 64 or 128, at most 16 query heads to a kv head. The keys are split among
                blocks, so that one sequence has work for all multiprocessors. Each warp has a ring of buffers of its own in
                shared memory, 16 keys and their values each, that cp.async fills ahead; it waits for its own copies alone, and
                there is no barrier before the end. Both products are m16n8k16 of the tensor cores with the heads of a group as
                rows: S = Q · K^T, then P, still in registers, times V, so that what is loaded serves all of them. A block
                leaves a partial result for its keys (m, l and o, below), and a second kernel adds up those of a head
simple          the rest: several queries at once (a prompt), fp32, other sizes. A block a query and head walks the keys 256
                at a time with an online softmax: a thread has one key's score, then each thread sums one or more columns

Numerics        S, m, l and o in fp32; ring rounds P to bf16 as a factor, as attention_flash.cuh does. Splits, and so the order
                of sums, follow from the sizes alone: same bits at every run on one kind of GPU
Bound by        memory: (pos + t) * 2*NKV*HD numbers a token. On an H200, HD 128 and 8 kv heads, ring reads 16 sequences of 8192
                at 4.2 TB/s (as fast as a copy), one of 65536 at 3.9 TB/s (93 %), and takes 12 us for one of 2048,
                where simple takes 445: that reads at 19 GB/s, each head of a group for itself
Proved by       dev/cuda/attention_decode.cu, dev/test/gpu/test_attention_cached.cuh (against the CPU); test_llama3.cu: greedy
                tokens are as likely as llama3.c's
*/
#pragma once

#include "gpu.cuh"
#ifndef PRECISION_FP32
#include "attention_flash.cuh"
#endif

// ---- simple ----------------------------------------------------------------------------------

enum { CACHED_KEYS = 256 }; // and threads

static __global__ void __launch_bounds__(CACHED_KEYS)
    cached_simple_kernel(floatX* out, const floatX* q, const floatX* cache, int pos, int NH, int NKV, int HD, int ldq) {
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

static void cached_simple(floatX* out, const floatX* q, const floatX* cache, int T, int pos, int NH, int NKV, int HD,
                          int ldq, cudaStream_t stream) {
    launch_require(HD <= 1024, "attention_cached", "head_dim is at most 1024");
    cached_simple_kernel<<<dim3((unsigned)T, (unsigned)NH), CACHED_KEYS, 2 * sizeof(float) * (size_t)HD, stream>>>(
        out, q, cache, pos, NH, NKV, HD, ldq);
    launch_check();
}

// ---- partial results, and how they are put together ------------------------------------------
// Of a head, over some of the keys: m, the largest score in powers of two; l = sum of 2^(s - m); o (HD) = sum of 2^(s - m) * v.
// Of several, M = largest m: out = sum of 2^(m - M) * o / sum of 2^(m - M) * l. Splits are gridDim.x of a kernel, blockIdx.x is
// a block's own; of one split nothing is left behind

enum { CACHED_SPLITS = 256, CACHED_SPLIT_KEYS = 128, CACHED_ADD_THREADS = 512 }; // at most; at least

__device__ __forceinline__ float cached_weight(float m, float largest) {
    return m == -INFINITY ? 0 : exp2f(m - largest);
}

// the keys of a block's split: a share that is a multiple of `unit`
__device__ __forceinline__ void cached_split(int length, int unit, int* first, int* last) {
    const int splits = (int)gridDim.x, share = ((length + splits - 1) / splits + unit - 1) / unit * unit;
    *first = min(length, (int)blockIdx.x * share), *last = min(length, *first + share);
}

// the block puts `groups` partial results of `heads` heads together that lie in shared memory: o (groups, stride, HD), m and l
// (groups, stride). To out (heads in all, HD) from head `head` on, or to part (heads in all, splits, HD + 2). A barrier comes
// before
template <int HD>
__device__ __forceinline__ void cached_merge(floatX* out, float* part, size_t head, int heads, const float* o,
                                             const float* m, const float* l, int groups, int stride) {
    for (int i = threadIdx.x; i < heads * HD; i += blockDim.x) {
        const int h = i / HD, column = i % HD;
        float largest = -INFINITY, sum = 0, total = 0;
        for (int g = 0; g < groups; g++) largest = fmaxf(largest, m[g * stride + h]);
        for (int g = 0; g < groups; g++) {
            const float w = cached_weight(m[g * stride + h], largest);
            total += w * l[g * stride + h], sum += w * o[(size_t)(g * stride + h) * HD + column];
        }
        if (gridDim.x == 1) {
            out[(head + h) * HD + column] = from_float<floatX>(sum / total);
            continue;
        }
        float* to = part + ((head + h) * gridDim.x + blockIdx.x) * (HD + 2);
        to[column] = sum;
        if (column == 0) to[HD] = largest, to[HD + 1] = total;
    }
}

// a block a head: the splits are added up, HD threads for every so many of them, so that many loads are under way
template <int HD>
static __global__ void __launch_bounds__(CACHED_ADD_THREADS)
    cached_add_kernel(floatX* out, const float* part, int splits) {
    constexpr int SHARES = CACHED_ADD_THREADS / HD;
    __shared__ float w[CACHED_SPLITS], sums[SHARES][HD];
    const int column = threadIdx.x % HD, share = threadIdx.x / HD, lane = threadIdx.x % WARP;
    const float* from = part + (size_t)blockIdx.x * splits * (HD + 2);
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize(); // when launched early: the splits are written
#endif
    if (threadIdx.x < WARP) { // the weights, divided by the sum of all
        float largest = -INFINITY, total = 0;
        for (int i = lane; i < splits; i += WARP) largest = fmaxf(largest, from[(size_t)i * (HD + 2) + HD]);
        largest = warp_max(largest);
        for (int i = lane; i < splits; i += WARP) {
            w[i] = cached_weight(from[(size_t)i * (HD + 2) + HD], largest);
            total += w[i] * from[(size_t)i * (HD + 2) + HD + 1];
        }
        total = warp_sum(total);
        for (int i = lane; i < splits; i += WARP) w[i] /= total;
    }
    __syncthreads();
    float sum = 0;
#pragma unroll 8
    for (int i = share; i < splits; i += SHARES) sum += w[i] * from[(size_t)i * (HD + 2) + column];
    sums[share][column] = sum;
    __syncthreads();
    if (share) return;
    for (int i = 1; i < SHARES; i++) sum += sums[i][column];
    out[(size_t)blockIdx.x * HD + column] = from_float<floatX>(sum);
}

// early, on Hopper: it is launched while the kernel before it ends, and the launch costs nothing
template <int HD>
static void cached_add(floatX* out, const float* part, int heads, int splits, bool early, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    int device, major;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    config.gridDim = dim3((unsigned)heads), config.blockDim = dim3(CACHED_ADD_THREADS), config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early && major >= 9;
    cuda_check(cudaLaunchKernelEx(&config, cached_add_kernel<HD>, out, part, splits));
    launch_check();
}

// so many that there are so many blocks to a multiprocessor; others: blocks that there are for each split
static inline int cached_splits(int keys, int64_t others, int blocks) {
    const int64_t most = ceil_div(keys, CACHED_SPLIT_KEYS), splits = blocks * (int64_t)gpu_processors() / others;
    const int64_t some = splits < most ? splits : most;
    return some < 1 ? 1 : some < CACHED_SPLITS ? (int)some : CACHED_SPLITS;
}

#ifndef PRECISION_FP32
// ---- ring ------------------------------------------------------------------------------------
// Instructions, fragments and swizzle are those of attention_flash.cuh

enum { RING_KEYS = 16, RING_HEADS = 16, RING_THREADS = 128, RING_THREADS_MOST = 256 };
// to a multiprocessor: as many as run at once. With 8, in waves of shorter blocks, it takes 4 to 11 % longer
enum { RING_BLOCKS = 2 };

template <int HD>
constexpr int RING_BUFFERS = HD <= 64 ? 6 : 3;
template <int HD>
constexpr uint32_t RING_BYTES = 2 * RING_KEYS* flash_pitch(HD); // of a buffer: keys, then values

// where rows lie: one sequence, row by row. Another struct with these three functions makes another cache of it
struct CachedRows {
    const floatX* cache;
    int keys;
    __device__ __forceinline__ int length(int) const { return keys; } // of sequence b
    // what there is to be looked up for 16 keys from j on, a multiple of 16: a tile before they are asked for
    __device__ __forceinline__ int find(int, int) const { return 0; }
    // where the first of them lies: of sequence b, with what was found
    __device__ __forceinline__ const floatX* at(int, int, int j, size_t row) const { return cache + j * row; }
};

// grid (splits, NKV, sequences)
template <int HD, typename Rows>
static __global__ void __launch_bounds__(RING_THREADS_MOST)
    cached_ring_kernel(floatX* out, float* part, const floatX* queries, Rows cache, int NH, int NKV, float scale) {
    constexpr int BUFFERS = RING_BUFFERS<HD>, PITCH = flash_pitch(HD), LANES = HD / 8, STEP = WARP / LANES;
    extern __shared__ __align__(256) unsigned char flash_memory[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int g = blockIdx.y, b = blockIdx.z, G = NH / NKV;
    const uint32_t ring = flash_shared() + (uint32_t)warp * BUFFERS * RING_BYTES<HD>;
    const size_t row = (size_t)2 * NKV * HD, v = row / 2;
    int first, last;
    cached_split(cache.length(b), RING_KEYS * warps, &first, &last);
    first += warp * RING_KEYS;
    const int step = RING_KEYS * warps, tiles = last > first ? (last - first + step - 1) / step : 0;

    auto find = [&](int i) { return i < tiles ? cache.find(b, first + i * step) : 0; };
    // starts to copy tile i, all lanes; beyond the last nothing, but a group all the same
    auto load = [&](int i, int found) {
        const int j0 = first + i * step, r0 = lane / LANES, chunk = lane % LANES;
        const uint32_t to = ring + (uint32_t)(i % BUFFERS) * RING_BYTES<HD>;
        if (i < tiles) {
            const floatX* from = cache.at(b, found, j0, row) + (size_t)g * HD + chunk * 8;
#pragma unroll
            for (int r = r0; r < RING_KEYS; r += STEP) {
                const uint32_t at = to + (uint32_t)(r * PITCH + (chunk ^ r % 8) * 16);
                const bool valid = j0 + r < last;
                const floatX* x = from + (valid ? r * row : 0);
                flash_copy(at, x, valid), flash_copy(at + RING_KEYS * PITCH, x + v, valid);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    // the fragments of q: rows are heads, lane / 4 and that + 8
    uint32_t q[HD / 16][4];
    const floatX* heads = queries + ((size_t)b * NH + (size_t)g * G) * HD + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HD / 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int h = lane / 4 + e % 2 * 8;
            q[i][e] = h < G ? *(const uint32_t*)(heads + (size_t)h * HD + i * 16 + e / 2 * 8) : 0;
        }
    float o[HD / 8][4] = {}, m[2] = { -INFINITY, -INFINITY }, l[2] = {};
#pragma unroll
    for (int i = 0; i < BUFFERS - 1; i++) load(i, find(i));
    int next = find(BUFFERS - 1);
    for (int i = 0; i < tiles; i++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(BUFFERS - 2) : "memory");
        __syncwarp(); // tile i is there, and all lanes are done with the one before it
        load(i + BUFFERS - 1, next);
        next = find(i + BUFFERS);
        const uint32_t keys = ring + (uint32_t)(i % BUFFERS) * RING_BYTES<HD>, values = keys + RING_KEYS * PITCH;
        float s[2][4] = {};
#pragma unroll
        for (int n = 0; n < HD; n += 16) {
            uint32_t f[4];
            flash_ldmatrix(f, keys + (flash_by_columns<HD>(lane) ^ (uint32_t)(2 * n)));
            flash_mma(s[0], q[n / 16], f[0], f[1]);
            flash_mma(s[1], q[n / 16], f[2], f[3]);
        }
        const int left = last - first - i * step; // keys of this tile
        if (left < RING_KEYS) {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (flash_column(n, e, lane) >= left) s[n][e] = -INFINITY;
        }
        flash_softmax<HD, RING_KEYS>(s, o, &m[0], &l[0], 0, scale);
        if (G > 8) flash_softmax<HD, RING_KEYS>(s, o, &m[1], &l[1], 2, scale);
        uint32_t p[1][4];
        flash_round<RING_KEYS>(p, s);
#pragma unroll
        for (int n = 0; n < HD; n += 16) {
            uint32_t f[4];
            flash_ldmatrix_transposed(f, values + (flash_by_rows<HD>(lane) ^ (uint32_t)(2 * n)));
            flash_mma(o[n / 8], p[0], f[0], f[1]);
            flash_mma(o[n / 8 + 1], p[0], f[2], f[3]);
        }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads(); // the rings are free
    float *o_all = (float*)flash_memory, *m_all = o_all + warps * RING_HEADS * HD, *l_all = m_all + warps * RING_HEADS;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int head = warp * RING_HEADS + lane / 4 + 8 * r;
        const float sum = flash_row_sum(l[r]);
        if (lane / 4 + 8 * r >= G) continue;
        if (lane % 4 == 0) m_all[head] = m[r] * scale, l_all[head] = sum;
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
            *(float2*)(o_all + head * HD + flash_column(n, 0, lane)) = make_float2(o[n][2 * r], o[n][2 * r + 1]);
    }
    __syncthreads();
    cached_merge<HD>(out, part, (size_t)b * NH + (size_t)g * G, G, o_all, m_all, l_all, warps, RING_HEADS);
}

// out and q (B, NH*HD); keys: of the longest sequence; scratch as attention_cached_scratch says, times B
template <int HD, typename Rows>
static void cached_ring(floatX* out, const floatX* q, Rows cache, int B, int keys, int NH, int NKV, void* scratch,
                        int threads, cudaStream_t stream) {
    const size_t warps = (size_t)threads / WARP, merge = warps * RING_HEADS * (HD + 2) * sizeof(float),
                 rings = warps * RING_BUFFERS<HD> * RING_BYTES<HD>, shared = rings > merge ? rings : merge;
    const int splits = cached_splits(keys, (int64_t)B * NKV, RING_BLOCKS);
    flash_allow(cached_ring_kernel<HD, Rows>, shared);
    cached_ring_kernel<HD, Rows><<<dim3((unsigned)splits, (unsigned)NKV, (unsigned)B), threads, shared, stream>>>(
        out, (float*)scratch, q, cache, NH, NKV, 1.4426950408889634f / sqrtf((float)HD));
    launch_check();
    if (splits > 1) cached_add<HD>(out, (const float*)scratch, B * NH, splits, true, stream);
}
#endif

// ---- launchers -------------------------------------------------------------------------------

static inline bool cached_ring_takes(int T, int NH, int NKV, int HD) {
#ifdef PRECISION_FP32
    (void)T, (void)NH, (void)NKV, (void)HD;
    return false;
#else
    return T == 1 && (HD == 64 || HD == 128) && NH / NKV <= RING_HEADS;
#endif
}

// bytes for attention_cached over up to `keys` rows of a cache: what the splits leave behind. The same on any GPU, for `info`
// may have none
static inline size_t attention_cached_scratch(int keys, int NH, int NKV, int HD) {
    if (!cached_ring_takes(1, NH, NKV, HD)) return 0;
    const int64_t most = ceil_div(keys, CACHED_SPLIT_KEYS), splits = most < CACHED_SPLITS ? most : (int64_t)CACHED_SPLITS;
    return (size_t)NH * (size_t)splits * (size_t)(HD + 2) * sizeof(float);
}

// overwrites out (T, NH*HD) for the queries at positions pos .. pos+T-1, whose keys and values are in the cache already;
// row t of q is ldq apart from the next
static inline void attention_cached(floatX* out, const floatX* q, const floatX* cache, int T, int pos, int NH, int NKV,
                                    int HD, int ldq, void* scratch, cudaStream_t stream) {
    const double keys = T * (pos + (T + 1) / 2.0); // of all queries
    const double numbers = 2.0 * ((double)(pos + T) * NKV + (double)T * NH) * HD;
    GpuOp op("attention_cached", numbers * sizeof(floatX), 4 * keys * NH * HD, stream);
    (void)scratch;
    if (!cached_ring_takes(T, NH, NKV, HD)) {
        cached_simple(out, q, cache, T, pos, NH, NKV, HD, ldq, stream);
        return;
    }
#ifndef PRECISION_FP32
    const CachedRows rows = { cache, pos + 1 };
    if (HD == 64)
        cached_ring<64>(out, q, rows, 1, pos + 1, NH, NKV, scratch, RING_THREADS, stream);
    else
        cached_ring<128>(out, q, rows, 1, pos + 1, NH, NKV, scratch, RING_THREADS, stream);
#endif
}
