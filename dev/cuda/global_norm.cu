/*
The norm of all gradients, and the factor that clips it.

    norm   = sqrt(sum over i of g[i]^2)
    factor = min(1, clip / (norm + 1e-6))           what adamw multiplies each gradient by

What must move  N gradients, read once: the 1B model's 1.24 * 10^9 are 2.47 GB in bf16, 575 us at the 4.30 TB/s of a copy on
                the H200 (reading alone is a little faster)
Numerics        squares are summed in double from 8 numbers on. In fp32 this sum can fail: a billion squares of like size,
                of which each is less than half a unit in the last place of the sum, leave it where it is; and the sum of
                one block of 256 at a time is rounded up or down by the same fraction each time, so that the errors do not
                cancel
Same bits       all rows but the first add in a fixed order
Bound by        memory. A step has this kernel between the last gradient and the first update: what it takes, the step takes
Reached         H200, bf16, 1B, in % of a copy: an atomic a block 13, resident blocks with 2-byte loads 32, packs 105, four
                under way 109, in one launch 109 (and 3 us less, which shows at a layer's size), production 107
Metrics         dram__throughput, smsp__warps_issue_stalled_long_scoreboard; lts__t_sectors_op_atom for the first row
In llmc         sum_of_squares and global_norm of llmc/adamw.h; reduce.cu has the ladder that leads to their form
*/
#include "bench.cuh"
#include "llmc/adamw.h"

// clang-format off
static const Shape shapes[] = {
    { .name = "1B", .N = 1235814400 },
    { .name = "150M", .N = 173814528 },
    { .name = "a layer of 1B", .N = 60821504 },
    { .name = "one pack", .small = true, .N = 8 },
    { .name = "odd packs", .small = true, .N = 8 * 1237 },
    { .name = "more than a turn", .small = true, .N = 8 * 140003 },
};
// clang-format on

static const float CLIP = 1;

struct Problem {
    size_t n;
    float* norm; // the norm and the factor
    const floatX* g;
    double* sums;    // zeros before and after, as in training
    double* partial; // of the blocks that run at a time
    unsigned* done;  // blocks that are: 0 before and after
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = {};
    p.n = (size_t)s->N;
    p.g = b->input<floatX>("g", p.n, (float)(2 / sqrt((double)p.n))); // of norm 2
    p.norm = b->output<float>("norm", 2, (double)p.n);
    // what a launch must leave as it found it is an input
    const float zeros[2 * GLOBAL_NORM_BLOCKS] = {};
    p.sums = (double*)b->input_from<float>("sums", zeros, 2 * GLOBAL_NORM_BLOCKS);
    p.done = (unsigned*)b->input_from<float>("done", zeros, 1);
    p.partial = b->scratch<double>(4096);
    return p;
}

static int64_t rows(const Problem*) { return 1; }

static void reference(Bench* b, const Problem* p, int64_t, int64_t) {
    enum { PART = 1 << 26 }; // numbers at a time: all of them as floats would be 5 GB
    double sum = 0;
    for (size_t i = 0; i < p->n; i += PART) {
        const size_t n = p->n - i < PART ? p->n - i : (size_t)PART;
        sum += sum_of_squares_cpu(b->host(p->g, i, n), n);
    }
    const double norm = sqrt(sum), both[2] = { norm, fmin(1, (double)CLIP / (norm + 1e-6)) };
    b->expect(p->norm, 0, both, 2);
}

static double traffic(const Problem* p) { return (double)p->n * sizeof(floatX); }
static double flops(const Problem*) { return 0; }

// ---- atomic_per_block ------------------------------------------------------------------------
// idea    a thread squares one number, a block adds 256 of them, and adds its sum to the one double; a last thread takes
//         the root
// limit   a million blocks, each over after one load of 2 bytes a thread, and a million atomics on one place. In the order
//         of chance, too: two runs differ in their last bits

__device__ __forceinline__ void write_norm(float* norm, double sum) {
    const float length = (float)sqrt(sum), factor = CLIP / (length + 1e-6f);
    norm[0] = length;
    norm[1] = !isfinite(length) ? NAN : factor < 1 ? factor : 1;
}

static __global__ void atomic_per_block_kernel(double* sum, const floatX* g, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const float x = i < n ? to_float(g[i]) : 0, squares = block_sum(x * x);
    if (threadIdx.x == 0) atomicAdd(sum, (double)squares);
}

static __global__ void end_kernel(float* norm, double* sum) {
    write_norm(norm, *sum);
    *sum = 0;
}

static void atomic_per_block(const Problem* p, int block, cudaStream_t stream) {
    atomic_per_block_kernel<<<(unsigned)ceil_div((int64_t)p->n, block), block, 0, stream>>>(p->sums, p->g, p->n);
    launch_check();
    end_kernel<<<1, 1, 0, stream>>>(p->norm, p->sums);
    launch_check();
}

// ---- two_steps -------------------------------------------------------------------------------
// idea    as many blocks as run at a time walk the gradients; each leaves one sum in a place of its own, and a second
//         kernel adds those in their order
// limit   2 bytes to a load, and a thread waits for one before it asks for the next

// blocks that run at a time, or fewer where there is little to do
static unsigned resident(size_t n, int block, int each) {
    const int64_t most = (int64_t)gpu_processors() * (2048 / block),
                  blocks = ceil_div((int64_t)n, (int64_t)block * each);
    return (unsigned)(blocks < most ? blocks : most);
}

static __global__ void two_steps_kernel(double* partial, const floatX* g, size_t n) {
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    double sum = 0;
#pragma unroll 1
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
        const float x = to_float(g[i]);
        sum += x * x;
    }
    sum = adamw_block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__device__ __forceinline__ double sum_of_partials(const double* partial, int n) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += partial[i];
    return adamw_block_sum(sum);
}

static __global__ void two_steps_end_kernel(float* norm, const double* partial, int n) {
    const double sum = sum_of_partials(partial, n);
    if (threadIdx.x == 0) write_norm(norm, sum);
}

static void two_steps_end(const Problem* p, unsigned blocks, cudaStream_t stream) {
    two_steps_end_kernel<<<1, 1024, 0, stream>>>(p->norm, p->partial, (int)blocks);
    launch_check();
}

static void two_steps(const Problem* p, int block, cudaStream_t stream) {
    const unsigned blocks = resident(p->n, block, 1);
    two_steps_kernel<<<blocks, block, 0, stream>>>(p->partial, p->g, p->n);
    launch_check();
    two_steps_end(p, blocks, stream);
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes a load, squared and added in fp32, one double for each pack instead of one for each number
// limit   still one load under way a thread: 32 KB on a multiprocessor, about what memory brings in the time it takes

__device__ __forceinline__ float squares(int4 bits) {
    PackX v;
    memcpy(&v, &bits, 16);
    float sum = 0;
    for (int k = 0; k < PACK; k++) sum += v.get(k) * v.get(k);
    return sum;
}

// EACH packs under way a thread; n is a multiple of PACK
template <int EACH>
__device__ __forceinline__ double sum_of_packs(const floatX* g, size_t n) {
    const size_t packs = n / PACK, stride = (size_t)gridDim.x * blockDim.x;
    double sum = 0;
#pragma unroll 1
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < packs; i += EACH * stride) {
        int4 v[EACH] = {};
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (i + j * stride < packs) v[j] = ((const int4*)g)[i + j * stride];
#pragma unroll
        for (int j = 0; j < EACH; j++) sum += squares(v[j]);
    }
    return adamw_block_sum(sum);
}

template <int EACH>
static __global__ void packs_kernel(double* partial, const floatX* g, size_t n) {
    const double sum = sum_of_packs<EACH>(g, n);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <int EACH>
static void packs(const Problem* p, int block, cudaStream_t stream) {
    const unsigned blocks = resident(p->n, block, EACH * PACK);
    packs_kernel<EACH><<<blocks, block, 0, stream>>>(p->partial, p->g, p->n);
    launch_check();
    two_steps_end(p, blocks, stream);
}

// ---- packs_in_flight -------------------------------------------------------------------------
// idea    four packs under way a thread: 128 KB. packs_kernel<4>
// limit   the second launch: 2 us or so after everybody is done

// ---- pieces ----------------------------------------------------------------------------------
// idea    4096 blocks whatever the GPU, so that all GPUs add in the same order: four times as many as run at a time, and who is
//         done takes the next. 1024 of them (production) are 7 or 8 to a multiprocessor here: who has 8 ends 3 % later
// limit   memory, and the second launch

static const int64_t PIECES = 4096;

static void pieces(const Problem* p, int block, cudaStream_t stream) {
    const int64_t most = ceil_div((int64_t)p->n, (int64_t)block * 4 * PACK);
    const unsigned blocks = (unsigned)(most < PIECES ? most : PIECES);
    packs_kernel<4><<<blocks, block, 0, stream>>>(p->partial, p->g, p->n);
    launch_check();
    two_steps_end(p, blocks, stream);
}

// ---- last_block ------------------------------------------------------------------------------
// idea    one launch: each block leaves its sum, then counts itself; who counts last finds all sums there and adds them, in
//         their order, whoever it is. The count goes back to zero for the next time
// limit   memory; a fence and an atomic a block

static __global__ void last_block_kernel(float* norm, double* partial, unsigned* done, const floatX* g, size_t n) {
    __shared__ bool last;
    double sum = sum_of_packs<4>(g, n);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence(); // the sum is there before the count says so
        last = atomicAdd(done, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence(); // and is read after it
    sum = sum_of_partials(partial, gridDim.x);
    if (threadIdx.x != 0) return;
    write_norm(norm, sum);
    *done = 0;
}

static void last_block(const Problem* p, int block, cudaStream_t stream) {
    const unsigned blocks = resident(p->n, block, 4 * PACK);
    last_block_kernel<<<blocks, block, 0, stream>>>(p->norm, p->partial, p->done, p->g, p->n);
    launch_check();
}

// ---- production ------------------------------------------------------------------------------
// what a training step calls. sum_of_squares adds to what earlier calls left (a call for each tensor would do as well as one
// for all), and global_norm clears it

static void production(const Problem* p, int, cudaStream_t stream) {
    sum_of_squares(p->sums, p->g, p->n, stream);
    global_norm(p->norm, p->sums, CLIP, stream);
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "atomic_per_block", atomic_per_block, { 256, 512, 1024 },      "a thread a number, an atomic a block" },
    { "two_steps",        two_steps,        { 128, 256, 512, 1024 }, "resident blocks; a second kernel adds their sums" },
    { "packs",            packs<1>,         { 128, 256, 512, 1024 }, "16 bytes a load" },
    { "packs_in_flight",  packs<4>,         { 128, 256, 512, 1024 }, "four of them under way" },
    { "pieces",           pieces,           { 256 },                 "4096 blocks, on any GPU" },
    { "last_block",       last_block,       { 128, 256, 512, 1024 }, "one launch: the last block to end adds the sums" },
    { "production",       production,       { 0 },                   "llmc/adamw.h: packs_in_flight by 1024 blocks at most" },
};
// clang-format on

BENCH_MAIN("global_norm", shapes, setup, reference, rows, traffic, flops, variants)
