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
Reached         on an H200, bf16, % of a copy

                                        Llama 3     Llama 2     bytes
                    online_softmax      62          61
                    in_place            72          82
                    registers           69          94          31
                    ring                81          84          1
                    ring_ahead          74          67          1
                    production          88          94          31

                50304 numbers, which two blocks would hold in registers: registers 70, ring 76 (in another run)
In a step       of the 1B model, between products, the ring gains nothing over registers: 2.7 TB/s either way. It fills two thirds
                of the issue slots at full clock (ncu), and the clock is lower there: probably it is instructions that count
*/
#include "bench.cuh"
#include "llmc/hopper.cuh"
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
    { .name = "whole", .small = true, .N = 140, .V = 128256 },
    { .name = "whole, beside the labels", .small = true, .N = 140, .V = 128256 },
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

// ---- registers -------------------------------------------------------------------------------
// idea    a row is read once: the blocks of a cluster keep it in their registers, 8 packs a thread, and send each other their
//         sums. What llmc/cross_entropy.h runs for rows of one block: of 32000 numbers 94 % of a copy
// limit   four blocks for 128256 numbers wait for each other at a barrier of the cluster, and while they do ask for nothing
//         new: 70 % of a copy, less than what reads twice

static void registers(const Problem* p, int, cudaStream_t stream) {
    cross_entropy_registers(p->losses, p->logits, p->labels, p->scale, true, p->N, p->V, p->ld, cross_entropy_blocks(p->V),
                            stream);
}

static const char* registers_refuse(const Problem* p) {
    return cross_entropy_blocks(p->V) ? NULL : "a row does not fit the registers of a cluster";
}

// ---- ring ------------------------------------------------------------------------------------
// idea    memory never waits for arithmetic. The blocks of a cluster share a row and stay for many rows; in each, one warp
//         has the copy engine bring chunks of 16 KB into a ring in shared memory, as fast as places become free, of this row
//         and the next one alike. The other warps add up the chunks as they come, send their sums to all blocks, wait for
//         those of the others, take the chunks up again and store gradients. No barrier of the block, none of the cluster:
//         each warp waits for bytes alone. Two blocks to a multiprocessor: while one waits for sums, the other computes
// limit   a block has three chunks of the next row at most while it waits for the sums of this one

enum { RING_PART = 4 }; // chunks of a part, at most

template <int THREADS, int SHARING, bool AHEAD>
static void ring_launch(const Problem* p, cudaStream_t stream) {
    cross_entropy_ring<THREADS, SHARING, AHEAD>(p->losses, p->logits, p->labels, p->scale, true, p->N, p->V, p->ld,
                                                RING_PART, stream);
}

static void ring(const Problem* p, int block, cudaStream_t stream) {
    if (block == 256) ring_launch<256, 2, false>(p, stream);
    if (block == 512) ring_launch<512, 2, false>(p, stream);
}

static const char* ring_refuses(const Problem* p) {
    if (hopper_refuses()) return hopper_refuses();
    return cross_entropy_ring_takes(p->V, RING_PART) ? NULL : "a row is shorter than two packs, or does not fit the shared memory of a cluster";
}

// ---- ring_ahead ------------------------------------------------------------------------------
// idea    one block to a multiprocessor, parts of 64 KB, which leaves room for two rows: the next row is added up while the sums
//         of this one are under way. Nobody waits for an answer that it has only just asked for
// limit   clusters of four: of 18 multiprocessors that lie together, two have no work

static void ring_ahead(const Problem* p, int block, cudaStream_t stream) {
    if (block == 512) ring_launch<512, 1, true>(p, stream);
}

// ---- production ------------------------------------------------------------------------------
// idea    of short rows registers. Of long ones the ring with one block to a multiprocessor, which has all its shared memory: two
//         blocks hold a row, so that fewer must wait for each other, and six chunks of the next row
// limit   nothing computes while sums are under way, and the ring may run full

static void production(const Problem* p, int, cudaStream_t stream) {
    cross_entropy(p->losses, p->logits, p->labels, p->scale, true, p->N, p->V, p->ld, stream);
}

// ---- the table: to add a variant, write it above and add one row ------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "six_passes",       six_passes,       { 256, 1024 }, "each formula by itself, log-probabilities in fp32" },
    { "softmax_and_loss", softmax_and_loss, { 256, 1024 }, "loss and gradient in closed form: three reads, one write" },
    { "online_softmax",   online_softmax,   { 512, 1024 }, "maximum and sum in one read, 16 bytes at once: two reads" },
    { "in_place",         in_place,         { 0 },         "one kernel: the second read mostly from L2" },
    { "registers",        registers,        { 0 },         "the row waits in the registers of a cluster: one read", registers_refuse },
    { "ring",             ring,             { 256, 512 },  "a cluster keeps the row; the copy engine runs ahead", ring_refuses },
    { "ring_ahead",       ring_ahead,       { 512 },       "the next row is added up before this one's gradients", ring_refuses },
    { "production",       production,       { 0 },         "llmc/cross_entropy.h: registers, or a ring of two blocks to a row" },
};
// clang-format on
BENCH_MAIN("cross_entropy", shapes, setup, reference, rows, traffic, flops, variants)
