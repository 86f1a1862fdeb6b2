/*
Cross-entropy: softmax over the vocabulary, the loss of each row's label, and the gradient, which replaces the logits.

    loss[n]   = log(sum over v of e^l[n, v]) - l[n, label[n]]
    dl[n, v]  = scale * (e^l[n, v] / sum - [v = label[n]])              a label of -100: loss 0, a row of zeros

Counted         2*N*V numbers: each logit is read once, each gradient written once. 8192 x 128256 in bf16: 4.2 GB, 0.98 ms at
                the 4.30 TB/s of a copy on an H200. Beside that the arithmetic is not free: two powers for each number, of
                which 132 multiprocessors make 16 each in a clock: 0.6 ms, in which memory must not rest
The difficulty  A row of 128256 bf16 is 250 KB, more than the shared memory of a multiprocessor (227 KB), and no gradient is
                known before the whole row has been seen. Either the row is read twice, or several blocks keep it together: a
                cluster, whose blocks send each other their sums
Reached         not measured: the one run of this table on an H200 ended at its first shape, since ring_ahead asked for 1024
                threads that compute and 32 that copy, more than a block may have. There production was right; of the rings
                no check is on record
*/
#include "bench.cuh"
#include "bulk.cuh"
#include "llmc/cross_entropy.h"

// ---- the problem -----------------------------------------------------------------------------

struct Problem {
    int N, V, ld;
    float scale;
    const int32_t* labels;
    floatX* logits;                 // (N, ld); becomes the gradient, with zeros from V to the next multiple of PACK
    float* losses;                  // (N)
    float *log_probs, *d_log_probs; // (N, V), of six_passes
    float *tops, *sums;             // (N), of the variants in two kernels
};

static const Shape shapes[] = {
    { .name = "Llama 3", .N = 8192, .V = 128256 },
    { .name = "Llama 2", .N = 16384, .V = 32000 },
    { .name = "bytes", .N = 65536, .V = 260 },
    { .name = "one number", .small = true, .N = 3, .V = 1 },
    { .name = "less than a pack", .small = true, .N = 5, .V = 7 },
    { .name = "odd", .small = true, .N = 40, .V = 261 },
    { .name = "odd, beside the labels", .small = true, .N = 40, .V = 261 },
    { .name = "a part in four", .small = true, .N = 400, .V = 32003 },
    { .name = "half", .small = true, .N = 7, .V = 65541 },
    { .name = "whole", .small = true, .N = 200, .V = 128256 },
    { .name = "whole, beside the labels", .small = true, .N = 200, .V = 128256 },
    { .name = "beyond a cluster", .small = true, .N = 3, .V = 600007 },
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = {};
    p.N = s->N, p.V = s->V, p.ld = lm_head_stride(s->V);
    p.scale = 1 / (float)s->N;
    const size_t n = (size_t)p.N * p.ld;
    std::vector<int32_t> labels((size_t)p.N);
    for (int i = 0; i < p.N; i++) labels[i] = (int32_t)(random_bits(9, 0, (uint64_t)i) % (uint64_t)p.V);
    labels[0] = p.V - 1;
    if (p.N > 1) labels[1] = 0;
    for (int i = 2; i < p.N; i += s->small ? 7 : p.N) labels[i] = IGNORED_LABEL; // of a real shape, one
    p.labels = b->input_from("labels", labels.data(), labels.size());
    p.logits = b->in_place<floatX>("logits", n, 3, p.V);
    p.losses = b->output<float>("losses", (size_t)p.N, p.V);
    p.log_probs = b->scratch<float>((size_t)p.N * p.V), p.d_log_probs = b->scratch<float>((size_t)p.N * p.V);
    p.tops = b->scratch<float>((size_t)p.N), p.sums = b->scratch<float>((size_t)p.N);
    // the label's number is so much larger than the others that it would hide their errors: some shapes leave it out
    const bool beside = strstr(s->name, "beside") != NULL;
    const int touched = (int)ceil_div(p.V, PACK) * PACK;
    for (int i = 0; i < p.N; i++) {
        if (touched < p.ld) b->unspecified(p.logits, (size_t)i * p.ld + touched, (size_t)(p.ld - touched));
        if (beside && labels[i] >= 0) b->unspecified(p.logits, (size_t)i * p.ld + labels[i], 1);
    }
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }
static double traffic(const Problem* p) { return 2.0 * p->N * p->V * sizeof(floatX); }
static double flops(const Problem*) { return 0; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const int touched = (int)ceil_div(p->V, PACK) * PACK;
    const int32_t* labels = b->host_ids(p->labels);
    for (int64_t n = first; n < first + count; n++) {
        const float* logits = b->host(p->logits, (size_t)n * p->ld, (size_t)touched);
        std::vector<float> row(logits, logits + touched);
        float loss;
        cross_entropy_cpu(&loss, row.data(), labels + n, p->scale, true, 1, p->V, p->ld);
        std::fill(row.begin() + p->V, row.end(), 0.0f);
        b->expect(p->logits, (size_t)n * p->ld, row.data(), touched);
        b->expect(p->losses, (size_t)n, &loss, 1);
    }
}

// ---- six_passes ------------------------------------------------------------------------------
// idea    log-softmax, the loss and their gradients, each by itself, as the formulas stand in a book: what a framework does
//         that knows nothing of the whole. Log-probabilities and their gradient exist in fp32
// limit   memory sees 4 reads and 1 write of the logits' size and, in fp32, 3 reads and 2 writes: 15 times the bytes of one
//         pass in 16 bits

__device__ __forceinline__ float block_max(float x) {
    __shared__ float partial[WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    __syncthreads(); // an earlier one may still be read
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? partial[lane] : -FLT_MAX);
}

static __global__ void row_max_kernel(float* tops, const floatX* logits, int V, int ld) {
    const floatX* x = logits + (size_t)blockIdx.x * ld;
    float top = -FLT_MAX;
    for (int v = threadIdx.x; v < V; v += blockDim.x) top = fmaxf(top, to_float(x[v]));
    top = block_max(top);
    if (threadIdx.x == 0) tops[blockIdx.x] = top;
}

static __global__ void row_sum_kernel(float* sums, const floatX* logits, const float* tops, int V, int ld) {
    const floatX* x = logits + (size_t)blockIdx.x * ld;
    const float top = tops[blockIdx.x];
    float sum = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) sum += expf(to_float(x[v]) - top);
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

static __global__ void log_softmax_kernel(float* log_probs, const floatX* logits, const float* tops, const float* sums,
                                          int V, int ld) {
    const floatX* x = logits + (size_t)blockIdx.x * ld;
    const float top = tops[blockIdx.x], log_sum = logf(sums[blockIdx.x]);
    for (int v = threadIdx.x; v < V; v += blockDim.x)
        log_probs[(size_t)blockIdx.x * V + v] = to_float(x[v]) - top - log_sum;
}

static __global__ void nll_kernel(float* losses, const float* log_probs, const int32_t* labels, int N, int V) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) losses[n] = labels[n] == IGNORED_LABEL ? 0 : -log_probs[(size_t)n * V + labels[n]];
}

static __global__ void nll_backward_kernel(float* d_log_probs, const int32_t* labels, float scale, int V) {
    const int label = labels[blockIdx.x];
    for (int v = threadIdx.x; v < V; v += blockDim.x) d_log_probs[(size_t)blockIdx.x * V + v] = v == label ? -scale : 0;
}

static __global__ void log_softmax_backward_kernel(floatX* d_logits, const float* d_log_probs, const float* log_probs,
                                                   int V, int ld) {
    const float *d = d_log_probs + (size_t)blockIdx.x * V, *x = log_probs + (size_t)blockIdx.x * V;
    floatX* dx = d_logits + (size_t)blockIdx.x * ld;
    const int touched = (V + PACK - 1) / PACK * PACK;
    float sum = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) sum += d[v];
    sum = block_sum(sum);
    for (int v = threadIdx.x; v < touched; v += blockDim.x)
        dx[v] = from_float<floatX>(v < V ? d[v] - expf(x[v]) * sum : 0);
}

static void six_passes(const Problem* p, int block, cudaStream_t stream) {
    const unsigned N = (unsigned)p->N, threads = (unsigned)block;
    row_max_kernel<<<N, threads, 0, stream>>>(p->tops, p->logits, p->V, p->ld);
    launch_check();
    row_sum_kernel<<<N, threads, 0, stream>>>(p->sums, p->logits, p->tops, p->V, p->ld);
    launch_check();
    log_softmax_kernel<<<N, threads, 0, stream>>>(p->log_probs, p->logits, p->tops, p->sums, p->V, p->ld);
    launch_check();
    nll_kernel<<<(unsigned)ceil_div(p->N, block), threads, 0, stream>>>(p->losses, p->log_probs, p->labels, p->N, p->V);
    launch_check();
    nll_backward_kernel<<<N, threads, 0, stream>>>(p->d_log_probs, p->labels, p->scale, p->V);
    launch_check();
    log_softmax_backward_kernel<<<N, threads, 0, stream>>>(p->logits, p->d_log_probs, p->log_probs, p->V, p->ld);
    launch_check();
}

// ---- softmax_and_loss ------------------------------------------------------------------------
// idea    the gradient of both together is softmax minus one at the label: two numbers a row, the maximum and the sum, are
//         all that backward needs of forward. No intermediate array
// limit   three reads of the logits, 2 bytes a thread at a time: too few bytes under way to fill the memory's pipes

static __global__ void loss_kernel(float* losses, float* tops, float* sums, const floatX* logits, const int32_t* labels,
                                   int V, int ld) {
    const floatX* x = logits + (size_t)blockIdx.x * ld;
    const int label = labels[blockIdx.x];
    float top = -FLT_MAX, sum = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) top = fmaxf(top, to_float(x[v]));
    top = block_max(top);
    for (int v = threadIdx.x; v < V; v += blockDim.x) sum += cross_entropy_power(to_float(x[v]) - top);
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    tops[blockIdx.x] = top, sums[blockIdx.x] = sum;
    losses[blockIdx.x] = label == IGNORED_LABEL ? 0 : logf(sum) + (top - to_float(x[label]));
}

static __global__ void gradient_kernel(floatX* logits, const float* tops, const float* sums, const int32_t* labels,
                                       float scale, int V, int ld) {
    floatX* x = logits + (size_t)blockIdx.x * ld;
    const int label = labels[blockIdx.x], touched = (V + PACK - 1) / PACK * PACK;
    const float top = tops[blockIdx.x], factor = label == IGNORED_LABEL ? 0 : scale / sums[blockIdx.x];
    for (int v = threadIdx.x; v < touched; v += blockDim.x) {
        const float p = v < V ? factor * cross_entropy_power(to_float(x[v]) - top) : 0;
        x[v] = from_float<floatX>(v == label ? p - scale : p);
    }
}

static void softmax_and_loss(const Problem* p, int block, cudaStream_t stream) {
    loss_kernel<<<(unsigned)p->N, (unsigned)block, 0, stream>>>(p->losses, p->tops, p->sums, p->logits, p->labels, p->V,
                                                                p->ld);
    launch_check();
    gradient_kernel<<<(unsigned)p->N, (unsigned)block, 0, stream>>>(p->logits, p->tops, p->sums, p->labels, p->scale,
                                                                    p->V, p->ld);
    launch_check();
}

// ---- online_softmax --------------------------------------------------------------------------
// idea    the sum is carried along with the maximum so far, and scaled when that grows: one read instead of two. 16 bytes
//         and several of them for each thread
// limit   the kernel ends between the two reads: by then 2.1 GB have passed the 50 MB of L2, and the second read comes from
//         memory again

static __global__ void online_loss_kernel(float* losses, float* tops, float* sums, const floatX* logits,
                                          const int32_t* labels, int V, int ld) {
    __shared__ CrossEntropySum warp_sums[WARP];
    const int packs = (V + PACK - 1) / PACK, label = labels[blockIdx.x], warps = blockDim.x / WARP;
    const floatX* x = logits + (size_t)blockIdx.x * ld;
    CrossEntropySum s = { -FLT_MAX, 0 };
#pragma unroll 4
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        float v[PACK];
        cross_entropy_unpack(v, __ldcs((const int4*)x + p), p, V);
        cross_entropy_add<PACK>(s, v);
    }
    s = cross_entropy_warp(s);
    if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = s;
    __syncthreads();
    s = cross_entropy_warp(threadIdx.x % WARP < warps ? warp_sums[threadIdx.x % WARP] : CrossEntropySum{ -FLT_MAX, 0 });
    if (threadIdx.x != 0) return;
    tops[blockIdx.x] = s.top, sums[blockIdx.x] = s.sum;
    losses[blockIdx.x] = label == IGNORED_LABEL ? 0 : logf(s.sum) + (s.top - to_float(x[label]));
}

// one thread for four packs
static __global__ void online_gradient_kernel(floatX* logits, const float* tops, const float* sums,
                                              const int32_t* labels, float scale, int V, int ld) {
    const int packs = (V + PACK - 1) / PACK, label = labels[blockIdx.x],
              first = blockIdx.y * 4 * blockDim.x + threadIdx.x;
    floatX* x = logits + (size_t)blockIdx.x * ld;
    const float top = tops[blockIdx.x], factor = scale / sums[blockIdx.x];
    int4 held[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (first + i * (int)blockDim.x < packs) held[i] = __ldcs((const int4*)x + first + i * blockDim.x);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int p = first + i * blockDim.x;
        float v[PACK];
        if (p >= packs) continue;
        cross_entropy_unpack(v, held[i], p, V);
        if (label == IGNORED_LABEL)
            pack_store_once(x + (size_t)p * PACK, PackX{});
        else
            cross_entropy_store(x, v, top, factor, scale, p, label);
    }
}

static void online_softmax(const Problem* p, int block, cudaStream_t stream) {
    const dim3 grid((unsigned)p->N, (unsigned)ceil_div(ceil_div(p->V, PACK), 4 * block));
    online_loss_kernel<<<(unsigned)p->N, (unsigned)block, 0, stream>>>(p->losses, p->tops, p->sums, p->logits,
                                                                       p->labels, p->V, p->ld);
    launch_check();
    online_gradient_kernel<<<grid, (unsigned)block, 0, stream>>>(p->logits, p->tops, p->sums, p->labels, p->scale, p->V,
                                                                 p->ld);
    launch_check();
}

// ---- in_place --------------------------------------------------------------------------------
// idea    one kernel for loss and gradient: the block that has just read a row reads it again, and finds most of it in L2.
//         What llmc/cross_entropy.h runs where there are no clusters
// limit   132 rows of 250 KB and the gradients on their way out share the L2; what a row pays twice is also the way from L2
//         to the multiprocessor, and while a block adds up its last sums it asks for nothing

static void in_place(const Problem* p, int, cudaStream_t stream) {
    cross_entropy_plain_kernel<<<(unsigned)p->N, CROSS_ENTROPY_PLAIN_THREADS, 0, stream>>>(
        p->losses, p->logits, p->labels, p->scale, true, p->V, p->ld);
    launch_check();
}

// ---- ring ------------------------------------------------------------------------------------
// idea    memory never waits for arithmetic. The blocks of a cluster share a row and stay for many rows; in each, one warp
//         has the copy engine bring chunks of 16 KB into a ring in shared memory, as fast as places become free, of this row
//         and the next one alike. The other warps add up the chunks as they come, send their sums to all blocks, wait for
//         those of the others, take the chunks up again and store gradients. No barrier of the block, none of the cluster:
//         each warp waits for bytes alone. Two blocks to a multiprocessor: while one waits for sums, the other computes
// limit   a block has three chunks of the next row at most while it waits for the sums of this one

enum {
    RING_PACKS = 1024, // of a chunk, at most: 16 KB
    RING_SLOTS = 16,   // chunks in shared memory, at most
    RING_BLOCKS = 8,   // that may share a row
    RING_MEMORY =
        233472, // bytes of shared memory on a multiprocessor, of which each block there takes 1 KB for the system
};

// how a row is cut
struct RingPlan {
    int blocks; // of a cluster, a power of 2; 0: the row is too long
    int part;   // packs of a block; the last one has what is left
    int chunks; // of a part
    int chunk;  // packs of a chunk; the last one of a part has what is left
    int slots, slot_bytes;
};

// the numbers of 16 bytes, one instruction each
__device__ __forceinline__ void ring_unpack(float (&x)[PACK], int4 bits) {
    const uint32_t word[4] = { (uint32_t)bits.x, (uint32_t)bits.y, (uint32_t)bits.z, (uint32_t)bits.w };
    if constexpr (sizeof(floatX) == 2)
        for (int i = 0; i < 4; i++) {
            x[2 * i] = __uint_as_float(word[i] << 16);
            x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
        }
    else
        for (int i = 0; i < 4; i++) x[i] = __uint_as_float(word[i]);
}

// e^x * 2^shift
__device__ __forceinline__ float ring_power(float x, float shift) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaf(x, 1.44269504f, shift)));
    return y;
}

// THREADS that compute, SHARING blocks to a multiprocessor. AHEAD: the next row is added up before the gradients of this one
template <int THREADS, int SHARING, bool AHEAD>
struct Ring {
    static_assert(THREADS % WARP == 0 && THREADS + WARP <= 1024,
                  "a block has at most 1024 threads, one warp of which copies");
    static_assert(RING_PACKS % THREADS == 0, "each thread has as many packs of a chunk as every other");
    enum {
        WARPS = THREADS / WARP,
        HELD = RING_PACKS / THREADS, // packs of a chunk for each thread
        SEEN = HELD < 2 ? HELD : 2,  // of them added up at once
        EXCHANGES = AHEAD ? 4 : 2,   // see write
        BYTES = RING_MEMORY / SHARING - 1024,
    };
    struct Shared {
        CrossEntropySum sums[EXCHANGES][RING_BLOCKS * WARPS];
        uint64_t full[RING_SLOTS], empty[RING_SLOTS]; // barriers: a chunk has come; all warps have taken it
        uint64_t summed[EXCHANGES];                   // barriers: the sums of all warps of all blocks have come
    };
    enum { SLOTS_FROM = (sizeof(Shared) + 127) / 128 * 128 };

    static RingPlan plan(int V, int part_chunks) {
        const int packs = (int)ceil_div(V, PACK);
        RingPlan plan = {};
        int blocks = 1;
        while (blocks < RING_BLOCKS && blocks * part_chunks * RING_PACKS < packs) blocks *= 2;
        if (blocks * part_chunks * RING_PACKS < packs) return plan;
        plan.blocks = blocks;
        plan.part = (int)ceil_div(packs, blocks);
        plan.chunks = (int)ceil_div(plan.part, RING_PACKS);
        plan.chunk = (int)ceil_div(plan.part, plan.chunks);
        plan.slot_bytes = (int)ceil_div(plan.chunk * 16, 128) * 128;
        plan.slots =
            ((int)BYTES - (int)SLOTS_FROM - RING_PACKS * 16) / plan.slot_bytes + 1; // the last one is read in full
        if (plan.slots > RING_SLOTS) plan.slots = RING_SLOTS;
        require(plan.slots >= (AHEAD ? 2 : 1) * plan.chunks, "the ring holds what is kept of a row");
        return plan;
    }

#ifdef HOPPER_CODE
    // a row on its way: where its chunks begin in the ring, which exchange of sums is its own
    struct Row {
        int n, label, slot, exchange;
        uint32_t phase;
        bool mine;   // this thread has the label's logit
        float right; // which is this
    };

    float* losses;
    floatX* logits;
    const int32_t* labels;
    float scale;
    bool backward;
    int N, V, ld;
    RingPlan plan_of;
    int rank, first, packs; // of this block: its number, its part of a row
    char* memory;

    __device__ __forceinline__ Shared* shared(void) { return (Shared*)memory; }
    __device__ __forceinline__ const int4* data(int slot) {
        return (const int4*)(memory + SLOTS_FROM + slot * plan_of.slot_bytes);
    }
    __device__ __forceinline__ int clusters(void) { return (int)gridDim.x / plan_of.blocks; }
    __device__ __forceinline__ int chunk_packs(int c) { return min(plan_of.chunk, packs - c * plan_of.chunk); }
    __device__ __forceinline__ void step(int& slot, uint32_t& phase, int by) {
        slot += by;
        if (slot >= plan_of.slots) slot -= plan_of.slots, phase ^= 1;
    }
    __device__ __forceinline__ uint32_t exchange_bytes(void) {
        return (uint32_t)(plan_of.blocks * WARPS * sizeof(CrossEntropySum));
    }

    // 8 bytes to the same place of block `to`; they count at its barrier
    __device__ __forceinline__ void send(CrossEntropySum* place, CrossEntropySum s, uint64_t* bar, int to) {
        asm volatile(
            "{ .reg .b32 there, counter;\n"
            "mapa.shared::cluster.u32 there, %0, %4;\n"
            "mapa.shared::cluster.u32 counter, %3, %4;\n"
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%1, %2}, [counter]; }" ::"r"(
                shared_address(place)),
            "f"(s.top), "f"(s.sum), "r"(shared_address(bar)), "r"(to)
            : "memory");
    }

    // as mbarrier_wait; then what other blocks sent is seen, too
    __device__ __forceinline__ void wait_for_blocks(uint64_t* bar, uint32_t parity) {
        mbarrier_wait(shared_address(bar), parity);
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1; }" ::"r"(
                         shared_address(bar)),
                     "r"(parity)
                     : "memory");
    }

    // this warp has taken the chunk
    __device__ __forceinline__ void release(int slot) {
        __syncwarp();
        if (threadIdx.x % WARP == 0) mbarrier_arrive(shared_address(&shared()->empty[slot]));
    }

    // one thread: fills the ring
    __device__ __forceinline__ void produce(void) {
        int slot = 0, n = (int)blockIdx.x / plan_of.blocks, label = n < N ? labels[n] : 0, next = 0;
        uint32_t phase = 1; // of a new barrier, parity 1 counts as ended: the slots are empty
        for (; n < N; n += clusters(), label = next) {
            const floatX* x = logits + (size_t)n * ld + (size_t)first * PACK;
            next = n + clusters() < N ? labels[n + clusters()] : 0;
            for (int c = 0; c < plan_of.chunks && label != IGNORED_LABEL; c++, step(slot, phase, 1)) {
                const uint32_t bar = shared_address(&shared()->full[slot]), bytes = (uint32_t)chunk_packs(c) * 16;
                mbarrier_wait(shared_address(&shared()->empty[slot]), phase);
                mbarrier_expect(bar, bytes);
                bulk_load(shared_address(data(slot)), x + (size_t)c * plan_of.chunk * PACK, bytes, bar);
            }
        }
    }

    // the next row with a label, from row.n on; those without are dealt with. next_label is row.n's, then the one after it
    __device__ __forceinline__ void find(Row& row, int& next_label) {
        for (; row.n < N; row.n += clusters()) {
            row.label = next_label;
            next_label = row.n + clusters() < N ? labels[row.n + clusters()] : 0;
            if (row.label != IGNORED_LABEL) return;
            floatX* x = logits + (size_t)row.n * ld + (size_t)first * PACK;
            if (rank == 0 && threadIdx.x == 0) losses[row.n] = 0;
            for (int p = threadIdx.x; p < packs && backward; p += THREADS)
                pack_store_once(x + (size_t)p * PACK, PackX{});
        }
    }

    // pack j of a chunk; what lies beyond the chunk or beyond V is so low that it counts for nothing
    __device__ __forceinline__ void take(float (&v)[PACK], int4 bits, int j, int count, int from) {
        const int low = sizeof(floatX) == 2 ? (int)0xff78ff78 : (int)0xff784377; // about -3.3e38
        if (j >= count) bits = int4{ low, low, low, low };
        ring_unpack(v, bits);
        if (V % PACK && from + count == (V + PACK - 1) / PACK && j == count - 1)
            for (int k = 0; k < PACK; k++) v[k] = k < V % PACK ? v[k] : -3.3e38f;
    }

    // adds up the row's chunks, and sends the sum of each warp to all blocks
    __device__ __forceinline__ void read(Row& row) {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        CrossEntropySum s = { -FLT_MAX, 0 };
        int slot = row.slot;
        uint32_t phase = row.phase;
        row.mine = false;
        for (int c = 0; c < plan_of.chunks; c++, step(slot, phase, 1)) {
            const int4* x = data(slot);
            const int count = chunk_packs(c), from = first + c * plan_of.chunk, label = row.label / PACK - from;
            mbarrier_wait(shared_address(&shared()->full[slot]), phase);
#pragma unroll
            for (int i = 0; i < HELD; i += SEEN) {
                float v[SEEN][PACK];
                for (int k = 0; k < SEEN; k++) {
                    const int j = (i + k) * THREADS + (int)threadIdx.x;
                    take(v[k], x[j], j, count, from); // beyond count: some bytes of the ring, which are not looked at
                }
                cross_entropy_add<SEEN * PACK>(s, v[0]);
            }
            if (label >= 0 && label < count && label % THREADS == (int)threadIdx.x) {
                row.mine = true;
                row.right = to_float(((const floatX*)(x + label))[row.label % PACK]);
            }
            if (!backward) release(slot);
        }
        s = cross_entropy_warp(s);
        const int e = row.exchange % EXCHANGES;
        if (lane < plan_of.blocks) send(&shared()->sums[e][rank * WARPS + warp], s, &shared()->summed[e], lane);
    }

    // Waits for the sums of all blocks; the loss and the gradients. An exchange's place is used again EXCHANGES rows later.
    // By then all warps have read it: whoever sends for row i + 2 has the sums of row i + 1, which each warp sends after it
    // has read those of row i; and with AHEAD, whoever sends for row i + 4 has those of row i + 2, which are sent after that
    __device__ __forceinline__ void write(const Row& row) {
        const int lane = threadIdx.x % WARP, e = row.exchange % EXCHANGES;
        wait_for_blocks(&shared()->summed[e], (uint32_t)(row.exchange / EXCHANGES & 1));
        if (threadIdx.x == 0) mbarrier_expect(shared_address(&shared()->summed[e]), exchange_bytes());
        CrossEntropySum s = { -FLT_MAX, 0 };
        for (int i = lane; i < plan_of.blocks * WARPS; i += WARP) {
            const CrossEntropySum other = shared()->sums[e][i];
            const float top = fmaxf(s.top, other.top);
            s.sum = s.sum * cross_entropy_power(s.top - top) + other.sum * cross_entropy_power(other.top - top);
            s.top = top;
        }
        s = cross_entropy_warp(s);
        if (row.mine) losses[row.n] = logf(s.sum) + (s.top - row.right);
        if (!backward) return;
        const float factor = scale / s.sum, shift = log2f(factor);
        int slot = row.slot;
        uint32_t phase = row.phase;
        for (int c = 0; c < plan_of.chunks; c++, step(slot, phase, 1)) {
            const int4* x = data(slot);
            const int count = chunk_packs(c), from = first + c * plan_of.chunk, label = row.label / PACK - from;
            floatX* to = logits + (size_t)row.n * ld + (size_t)from * PACK;
            int4 held[HELD];
#pragma unroll
            for (int i = 0; i < HELD; i++) held[i] = x[i * THREADS + (int)threadIdx.x];
            release(slot);
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const int j = i * THREADS + (int)threadIdx.x;
                float v[PACK];
                PackX d;
                take(v, held[i], j, count, from);
                for (int k = 0; k < PACK; k++) d.set(k, ring_power(v[k] - s.top, shift));
                if (j == label)
                    for (int k = 0; k < PACK; k++)
                        if (k == row.label % PACK) d.set(k, factor * cross_entropy_power(v[k] - s.top) - scale);
                if (j < count) pack_store_once(to + (size_t)j * PACK, d);
            }
        }
    }

    __device__ __forceinline__ void consume(void) {
        Row row = {}, next;
        row.n = (int)blockIdx.x / plan_of.blocks;
        int next_label = row.n < N ? labels[row.n] : 0;
        find(row, next_label);
        if (row.n < N) read(row);
        while (row.n < N) {
            next = row;
            next.n += clusters(), next.exchange++;
            step(next.slot, next.phase, plan_of.chunks);
            find(next, next_label);
            if (AHEAD && next.n < N) read(next);
            write(row);
            if (!AHEAD && next.n < N) read(next);
            row = next;
        }
    }

    __device__ __forceinline__ void run(void) {
        rank = (int)cluster_rank();
        first = rank * plan_of.part;
        packs = min(plan_of.part, (V + PACK - 1) / PACK - first);
        if (threadIdx.x == 0) {
            for (int i = 0; i < plan_of.slots; i++) {
                mbarrier_init(shared_address(&shared()->full[i]), 1);
                mbarrier_init(shared_address(&shared()->empty[i]), WARPS);
            }
            for (int e = 0; e < EXCHANGES; e++) mbarrier_init(shared_address(&shared()->summed[e]), 1);
            mbarrier_init_done();
            for (int e = 0; e < EXCHANGES; e++) mbarrier_expect(shared_address(&shared()->summed[e]), exchange_bytes());
        }
        cluster_sync();
        if (threadIdx.x >= THREADS) {
            if (threadIdx.x == THREADS) produce();
        } else {
            consume();
        }
        __syncwarp();
        cluster_sync(); // nobody ends while another may still send to it
    }
#endif
};

template <int THREADS, int SHARING, bool AHEAD>
static __global__ void __launch_bounds__(THREADS + WARP, SHARING)
    ring_kernel(float* losses, floatX* logits, const int32_t* labels, float scale, bool backward, int N, int V, int ld,
                RingPlan plan) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char ring_memory[];
    Ring<THREADS, SHARING, AHEAD> ring = {
        losses, logits, labels, scale, backward, N, V, ld, plan, 0, 0, 0, ring_memory
    };
    ring.run();
#endif
}

template <int THREADS, int SHARING, bool AHEAD>
static void ring_launch(const Problem* p, int part_chunks, cudaStream_t stream) {
    typedef Ring<THREADS, SHARING, AHEAD> R;
    const auto kernel = ring_kernel<THREADS, SHARING, AHEAD>;
    static int most[RING_BLOCKS + 1]; // clusters that run at once, by their blocks
    const RingPlan plan = R::plan(p->V, part_chunks);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = (unsigned)plan.blocks, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)plan.blocks);
    config.blockDim = dim3(THREADS + WARP);
    config.dynamicSmemBytes = R::BYTES;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    if (!most[plan.blocks]) {
        cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, R::BYTES));
        cuda_check(cudaOccupancyMaxActiveClusters(&most[plan.blocks], kernel, &config));
    }
    config.gridDim.x = (unsigned)(plan.blocks * std::min(p->N, most[plan.blocks]));
    cuda_check(
        cudaLaunchKernelEx(&config, kernel, p->losses, p->logits, p->labels, p->scale, true, p->N, p->V, p->ld, plan));
    launch_check();
}

enum { RING_PART = 4, RING_LONG_PART = 8 }; // chunks of a part, at most

static void ring(const Problem* p, int block, cudaStream_t stream) {
    if (block == 256) ring_launch<256, 2, false>(p, RING_PART, stream);
    if (block == 512) ring_launch<512, 2, false>(p, RING_PART, stream);
}

template <int CHUNKS>
static const char* ring_refuses(const Problem* p) {
    if (hopper_refuses()) return hopper_refuses();
    return ceil_div(p->V, PACK) > (int64_t)RING_BLOCKS * CHUNKS * RING_PACKS
               ? "a row does not fit the shared memory of a cluster"
               : NULL;
}

// ---- ring_of_pairs ---------------------------------------------------------------------------
// idea    one block to a multiprocessor has all its shared memory: two blocks hold a row, so that fewer must wait for each
//         other, and six chunks of the next row
// limit   nothing computes while sums are under way, and the ring may run full

static void ring_of_pairs(const Problem* p, int block, cudaStream_t stream) {
    if (block == 512) ring_launch<512, 1, false>(p, RING_LONG_PART, stream);
}

// ---- ring_ahead ------------------------------------------------------------------------------
// idea    a part of 64 KB leaves room for two rows: the next row is added up while the sums of this one are under way. Nobody
//         waits for an answer that it has only just asked for
// limit   clusters of four, one block to a multiprocessor: of 18 multiprocessors that lie together, two have no work

static void ring_ahead(const Problem* p, int block, cudaStream_t stream) {
    if (block == 512) ring_launch<512, 1, true>(p, RING_PART, stream);
}

// ---- the table: to add a variant, write it above and add one row ------------------------------

static void production(const Problem* p, int, cudaStream_t stream) {
    cross_entropy(p->losses, p->logits, p->labels, p->scale, true, p->N, p->V, p->ld, stream);
}

// clang-format off
static const Variant<Problem> variants[] = {
    { "six_passes",       six_passes,       { 256, 1024 }, "each formula by itself, log-probabilities in fp32" },
    { "softmax_and_loss", softmax_and_loss, { 256, 1024 }, "loss and gradient in closed form: three reads, one write" },
    { "online_softmax",   online_softmax,   { 512, 1024 }, "maximum and sum in one read, 16 bytes at once: two reads" },
    { "in_place",         in_place,         { 0 },         "one kernel: the second read mostly from L2" },
    { "ring",             ring,             { 256, 512 },  "a cluster keeps the row; the copy engine runs ahead", ring_refuses<RING_PART> },
    { "ring_of_pairs",    ring_of_pairs,    { 512 },       "two blocks to a row, one to a multiprocessor", ring_refuses<RING_LONG_PART> },
    { "ring_ahead",       ring_ahead,       { 512 },       "the next row is added up before this one's gradients", ring_refuses<RING_PART> },
    { "production",       production,       { 0 },         "llmc/cross_entropy.h: a row in the registers of a cluster" },
};
// clang-format on
BENCH_MAIN("cross_entropy", shapes, setup, reference, rows, traffic, flops, variants)
