/*
The sum of N numbers: the oldest ladder of GPU programming, each rung with a name.

    y = sum over i of x[i]                  x is floatX; sums are fp32 (double between the blocks where it costs nothing)

What must move  N numbers, read once: 2^28 bf16 numbers are 537 MB, 125 us at the 4.30 TB/s of a copy on the H200. A copy
                writes half of what it moves, a sum nothing: reading alone is a little faster, and more than 100 % of the
                peak no error
Bound by        memory, in the end. Before that, in the order of the ladder: atomics on one address, divergence, bank
                conflicts, barriers, launches, and the number of bytes that one instruction asks for
Reached         H200, 2^28 numbers of bf16, in % of a copy: atomics 0.03 (570 million a second: the L2 cache takes one in
                three cycles), trees 9 to 10 with bank conflicts last, two numbers a thread 20, no barriers in the last warp
                27, shuffles 28, eight loads of 2 bytes under way 48, 16 bytes a load 106, cub 94. What a rung is worth has
                changed since 2007: conflicts cost more than divergence, and the width of a load more than all else
Numerics        an fp32 sum of n numbers one after the other loses sqrt(n) * 2^-24 of its size or so; trees lose log2(n) *
                2^-24. Inputs have a mean of 4 / sqrt(n) beside their variance of 1: without it the sum might be next to
                nothing, and any rounding large beside it
Same bits       trees and two steps add in a fixed order: the same bits at every run. Rows whose blocks end in an atomic do
                not
Metrics         smsp__thread_inst_executed_per_inst_executed (32: no divergence),
                l1tex__data_bank_conflicts_pipe_lsu_mem_shared, smsp__warps_issue_stalled_barrier, dram__throughput;
                lts__t_sectors_op_atom and _red for the first rung
Source          Harris 2007, "Optimizing parallel reduction in CUDA", whose order the trees follow
In llmc         no op is a plain sum; sum_of_squares (llmc/adamw.h) is this one's last rung with a square in it, see
                global_norm.cu
*/
#define YARDSTICK "cub" // NVIDIA's own
#include <cub/device/device_reduce.cuh>

#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "llmc/adamw.h"

// clang-format off
static const Shape shapes[] = {
    { .name = "2^28", .N = 1 << 28 },
    { .name = "2^24", .N = 1 << 24 },
    { .name = "one", .small = true, .N = 1 },
    { .name = "few", .small = true, .N = 37 },
    { .name = "one more than a block", .small = true, .N = 257 },
    { .name = "odd", .small = true, .N = 100003 },
    { .name = "three levels", .small = true, .N = 300007 },
};
// clang-format on

struct Problem {
    size_t n;
    float* y; // one number
    const floatX* x;
    float* partial[2]; // room for the blocks of a level, and for those of the next
    double* sums;      // room for the blocks that run at a time
    void* cub;
    size_t cub_bytes;
};

struct ToFloat {
    __host__ __device__ float operator()(floatX x) const { return (float)x; }
};
struct Plus {
    __host__ __device__ float operator()(float a, float b) const { return a + b; }
};

static cudaError_t cub_sum(void* memory, size_t* bytes, const floatX* x, float* y, size_t n, cudaStream_t stream) {
    return cub::DeviceReduce::TransformReduce(memory, *bytes, x, y, (int64_t)n, Plus(), ToFloat(), 0.0f, stream);
}

static Problem setup(Bench* b, const Shape* s) {
    Problem p = {};
    p.n = (size_t)s->N;
    p.x = b->input<floatX>("x", p.n, 1, (float)(4 / sqrt((double)p.n)));
    p.y = b->output<float>("y", 1, (double)p.n);
    for (float*& partial : p.partial) partial = b->scratch<float>((size_t)ceil_div(s->N, 128) + 4096);
    p.sums = b->scratch<double>(4096);
    cuda_check(cub_sum(NULL, &p.cub_bytes, p.x, p.y, p.n, 0));
    p.cub = b->scratch<char>(p.cub_bytes);
    return p;
}

static int64_t rows(const Problem*) { return 1; }

static void reference(Bench* b, const Problem* p, int64_t, int64_t) {
    const float* x = b->host(p->x);
    double sum = 0;
#pragma omp parallel for reduction(+ : sum) if (p->n > 4096)
    for (size_t i = 0; i < p->n; i++) sum += (double)x[i];
    b->expect(p->y, 0, &sum, 1);
}

static double traffic(const Problem* p) { return (double)p->n * sizeof(floatX); }
static double flops(const Problem*) { return 0; }

// ---- atomic_per_thread -----------------------------------------------------------------------
// idea    each thread adds its number to the one sum
// limit   they take turns: one address, one place in the L2 cache that adds a number every few cycles, whatever else the
//         GPU has. And the sum is rounded as often as it is added to

static __global__ void atomic_per_thread_kernel(float* y, const floatX* x, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(y, to_float(x[i]));
}

static void atomic_per_thread(const Problem* p, int block, cudaStream_t stream) {
    cuda_check(cudaMemsetAsync(p->y, 0, sizeof(float), stream));
    atomic_per_thread_kernel<<<(unsigned)ceil_div((int64_t)p->n, block), block, 0, stream>>>(p->y, p->x, p->n);
    launch_check();
}

// ---- levels: what the trees share ------------------------------------------------------------
// A kernel leaves one number for each block, which sums `each` numbers; it is launched on what it has left until that is one
// number. first: on x; next: the same on fp32 numbers. Blocks are powers of two

template <typename T>
using Level = void (*)(float* sums, const T* x, size_t n);

static void levels(Level<floatX> first, Level<float> next, const Problem* p, int block, int each, cudaStream_t stream) {
    const size_t shared = (size_t)block * sizeof(float);
    int64_t n = ceil_div((int64_t)p->n, each);
    int to = 0;
    first<<<(unsigned)n, block, shared, stream>>>(n == 1 ? p->y : p->partial[to], p->x, p->n);
    launch_check();
    while (n > 1) {
        const int64_t left = ceil_div(n, each);
        const float* from = p->partial[to];
        to = 1 - to;
        next<<<(unsigned)left, block, shared, stream>>>(left == 1 ? p->y : p->partial[to], from, (size_t)n);
        launch_check();
        n = left;
    }
}

template <typename T>
__device__ __forceinline__ float number_or_zero(const T* x, size_t i, size_t n) {
    return i < n ? to_float(x[i]) : 0;
}

// ---- tree_divergent --------------------------------------------------------------------------
// idea    a block adds in shared memory, in pairs: neighbours first, then those 2 apart, 4 apart … One number a block is
//         left, and the next launch adds those
// limit   the threads that add are every second, every fourth …: all warps stay in the loop to the end, with ever fewer
//         lanes at work

template <typename T>
static __global__ void tree_divergent_kernel(float* sums, const T* x, size_t n) {
    extern __shared__ float part[];
    const int t = threadIdx.x;
    part[t] = number_or_zero(x, (size_t)blockIdx.x * blockDim.x + t, n);
    __syncthreads();
    for (int apart = 1; apart < (int)blockDim.x; apart *= 2) {
        if ((t & (2 * apart - 1)) == 0) part[t] += part[t + apart];
        __syncthreads();
    }
    if (t == 0) sums[blockIdx.x] = part[0];
}

static void tree_divergent(const Problem* p, int block, cudaStream_t stream) {
    levels(tree_divergent_kernel<floatX>, tree_divergent_kernel<float>, p, block, block, stream);
}

// ---- tree_first_threads ----------------------------------------------------------------------
// idea    the same pairs, but the first threads do the work: whole warps are idle, and the others whole
// limit   thread t reads place 2 * apart * t: two numbers apart, then four … which lie 2, 4, … 32 to a bank, and are served
//         in as many turns. That costs more than the divergence did: a step back, which the next one needs

template <typename T>
static __global__ void tree_first_threads_kernel(float* sums, const T* x, size_t n) {
    extern __shared__ float part[];
    const int t = threadIdx.x;
    part[t] = number_or_zero(x, (size_t)blockIdx.x * blockDim.x + t, n);
    __syncthreads();
    for (int apart = 1; apart < (int)blockDim.x; apart *= 2) {
        const int at = 2 * apart * t;
        if (at < (int)blockDim.x) part[at] += part[at + apart];
        __syncthreads();
    }
    if (t == 0) sums[blockIdx.x] = part[0];
}

static void tree_first_threads(const Problem* p, int block, cudaStream_t stream) {
    levels(tree_first_threads_kernel<floatX>, tree_first_threads_kernel<float>, p, block, block, stream);
}

// ---- tree_halves -----------------------------------------------------------------------------
// idea    pairs half a block apart, then a quarter …: the first threads work, and on neighbouring places, each in a bank of
//         its own
// limit   half of the threads never add at all: they load one number and wait

template <typename T>
static __global__ void tree_halves_kernel(float* sums, const T* x, size_t n) {
    extern __shared__ float part[];
    const int t = threadIdx.x;
    part[t] = number_or_zero(x, (size_t)blockIdx.x * blockDim.x + t, n);
    __syncthreads();
    for (int apart = blockDim.x / 2; apart > 0; apart /= 2) {
        if (t < apart) part[t] += part[t + apart];
        __syncthreads();
    }
    if (t == 0) sums[blockIdx.x] = part[0];
}

static void tree_halves(const Problem* p, int block, cudaStream_t stream) {
    levels(tree_halves_kernel<floatX>, tree_halves_kernel<float>, p, block, block, stream);
}

// ---- add_on_load -----------------------------------------------------------------------------
// idea    the first addition on the way in: two loads to a thread, half the blocks, half the numbers left for the next
//         level
// limit   from 32 threads on one warp works alone, and still meets seven others at a barrier, five times

template <typename T>
static __global__ void add_on_load_kernel(float* sums, const T* x, size_t n) {
    extern __shared__ float part[];
    const int t = threadIdx.x;
    const size_t i = (size_t)blockIdx.x * 2 * blockDim.x + t;
    part[t] = number_or_zero(x, i, n) + number_or_zero(x, i + blockDim.x, n);
    __syncthreads();
    for (int apart = blockDim.x / 2; apart > 0; apart /= 2) {
        if (t < apart) part[t] += part[t + apart];
        __syncthreads();
    }
    if (t == 0) sums[blockIdx.x] = part[0];
}

static void add_on_load(const Problem* p, int block, cudaStream_t stream) {
    levels(add_on_load_kernel<floatX>, add_on_load_kernel<float>, p, block, 2 * block, stream);
}

// ---- last_warp_unrolled ----------------------------------------------------------------------
// idea    the last warp needs no barrier of the block. Since Volta its lanes may drift apart, so that "lanes run in step"
//         is no excuse: __syncwarp between each read and the write that follows it
// limit   the numbers still pass through shared memory, a write and a read for each step

template <typename T>
static __global__ void last_warp_unrolled_kernel(float* sums, const T* x, size_t n) {
    extern __shared__ float part[];
    const int t = threadIdx.x;
    const size_t i = (size_t)blockIdx.x * 2 * blockDim.x + t;
    part[t] = number_or_zero(x, i, n) + number_or_zero(x, i + blockDim.x, n);
    __syncthreads();
    for (int apart = blockDim.x / 2; apart > WARP; apart /= 2) {
        if (t < apart) part[t] += part[t + apart];
        __syncthreads();
    }
    if (t >= WARP) return;
    float sum = part[t];
#pragma unroll
    for (int apart = WARP; apart > 0; apart /= 2) { // blocks are of 64 threads or more
        sum += part[t + apart];
        __syncwarp();
        part[t] = sum;
        __syncwarp();
    }
    if (t == 0) sums[blockIdx.x] = sum;
}

static void last_warp_unrolled(const Problem* p, int block, cudaStream_t stream) {
    levels(last_warp_unrolled_kernel<floatX>, last_warp_unrolled_kernel<float>, p, block, 2 * block, stream);
}

// ---- warp_shuffle ----------------------------------------------------------------------------
// idea    lanes read each other's registers: five shuffles for a warp, one number a warp through shared memory, two
//         barriers (block_sum of llmc/gpu.cuh)
// limit   two numbers to a thread, 8 bytes at most: threads and blocks come and go for next to nothing, and four launches
//         follow each other

template <typename T>
static __global__ void warp_shuffle_kernel(float* sums, const T* x, size_t n) {
    const size_t i = (size_t)blockIdx.x * 2 * blockDim.x + threadIdx.x;
    const float sum = block_sum(number_or_zero(x, i, n) + number_or_zero(x, i + blockDim.x, n));
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

static void warp_shuffle(const Problem* p, int block, cudaStream_t stream) {
    levels(warp_shuffle_kernel<floatX>, warp_shuffle_kernel<float>, p, block, 2 * block, stream);
}

// ---- grid_stride -----------------------------------------------------------------------------
// idea    as many blocks as run at a time, whose threads walk the array with eight loads under way each: one sum a block is
//         left, and one more block adds those
// limit   a second launch, some 2 us that small arrays feel; and 2 bytes a load

enum { LOADS = 8 };

template <typename T>
__device__ __forceinline__ float grid_stride_sum(const T* x, size_t n) {
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    float sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += LOADS * stride) {
        float v[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) v[j] = number_or_zero(x, i + j * stride, n);
            // in pairs: fewer additions wait for each other, and the sum is rounded once for all
#pragma unroll
        for (int apart = LOADS / 2; apart > 0; apart /= 2)
            for (int j = 0; j < apart; j++) v[j] += v[j + apart];
        sum += v[0];
    }
    return block_sum(sum);
}

template <typename T>
static __global__ void grid_stride_kernel(float* sums, const T* x, size_t n) {
    const float sum = grid_stride_sum(x, n);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// blocks that run at a time, or fewer where there is little to do
static unsigned resident(int64_t n, int block, int each) {
    const int64_t most = (int64_t)gpu_processors() * (2048 / block), blocks = ceil_div(n, (int64_t)block * each);
    return (unsigned)(blocks < most ? blocks : most);
}

static void grid_stride(const Problem* p, int block, cudaStream_t stream) {
    const unsigned blocks = resident((int64_t)p->n, block, LOADS);
    grid_stride_kernel<floatX><<<blocks, block, 0, stream>>>(p->partial[0], p->x, p->n);
    launch_check();
    grid_stride_kernel<float><<<1, 1024, 0, stream>>>(p->y, p->partial[0], blocks);
    launch_check();
}

// ---- atomic_per_block ------------------------------------------------------------------------
// idea    a thousand blocks may add to one place: an atomic for each instead of the second launch
// limit   2 bytes a load. And the order of the blocks is that of chance: the last bits differ from run to run

static __global__ void atomic_per_block_kernel(float* y, const floatX* x, size_t n) {
    const float sum = grid_stride_sum(x, n);
    if (threadIdx.x == 0) atomicAdd(y, sum);
}

static void atomic_per_block(const Problem* p, int block, cudaStream_t stream) {
    cuda_check(cudaMemsetAsync(p->y, 0, sizeof(float), stream));
    atomic_per_block_kernel<<<resident((int64_t)p->n, block, LOADS), block, 0, stream>>>(p->y, p->x, p->n);
    launch_check();
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes a load, four under way: a multiprocessor has 128 KB coming, more than the 25 KB or so that memory can
//         bring in the time it takes
// limit   memory. What is left to want is the same sum at every run

enum { PACKS = 4 };

// the sum over the block, in T: fp32 within a pack, then T
template <typename T>
__device__ __forceinline__ T packs_sum(const floatX* x, size_t n) {
    const size_t packs = n / PACK, stride = (size_t)gridDim.x * blockDim.x;
    const size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    T sum = 0;
    for (size_t i = first; i < packs; i += PACKS * stride) {
        int4 v[PACKS] = {};
#pragma unroll
        for (int j = 0; j < PACKS; j++)
            if (i + j * stride < packs) v[j] = ((const int4*)x)[i + j * stride];
#pragma unroll
        for (int j = 0; j < PACKS; j++) {
            PackX pack;
            memcpy(&pack, &v[j], 16);
            float part = 0;
            for (int k = 0; k < PACK; k++) part += pack.get(k);
            sum += part;
        }
    }
    if (first < n % PACK) sum += to_float(x[packs * PACK + first]); // what fills no pack
    return sum;
}

static __global__ void packs_kernel(float* y, const floatX* x, size_t n) {
    const float sum = block_sum(packs_sum<float>(x, n));
    if (threadIdx.x == 0) atomicAdd(y, sum);
}

static void packs(const Problem* p, int block, cudaStream_t stream) {
    cuda_check(cudaMemsetAsync(p->y, 0, sizeof(float), stream));
    packs_kernel<<<resident((int64_t)p->n, block, PACKS * PACK), block, 0, stream>>>(p->y, p->x, p->n);
    launch_check();
}

// ---- two_steps -------------------------------------------------------------------------------
// idea    each block leaves its sum in a place of its own, and a second kernel adds those in their order: the same bits at
//         every run. In double, which a thread needs for one number in 8. As sum_of_squares and global_norm of llmc/adamw.h
//         do it
// limit   memory, and a second launch

static __global__ void two_steps_kernel(double* sums, const floatX* x, size_t n) {
    const double sum = adamw_block_sum(packs_sum<double>(x, n));
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

static __global__ void two_steps_end_kernel(float* y, const double* sums, int n) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += sums[i];
    sum = adamw_block_sum(sum);
    if (threadIdx.x == 0) *y = (float)sum;
}

static void two_steps(const Problem* p, int block, cudaStream_t stream) {
    const unsigned blocks = resident((int64_t)p->n, block, PACKS * PACK);
    two_steps_kernel<<<blocks, block, 0, stream>>>(p->sums, p->x, p->n);
    launch_check();
    two_steps_end_kernel<<<1, 1024, 0, stream>>>(p->y, p->sums, (int)blocks);
    launch_check();
}

// ---- copy_engine -----------------------------------------------------------------------------
// idea    Hopper's copy engine fills shared memory, 16 KB at a command of one thread: 192 KB under way on a multiprocessor
//         with no register waiting for them. Then as two_steps
// limit   memory: bytes enough were under way before, and barriers have come on top

enum { STAGES = 6, STAGE_BYTES = 16384, STAGE_NUMBERS = STAGE_BYTES / sizeof(floatX), ENGINE_THREADS = 256 };

// block b sums runs b, b + grid … of STAGE_NUMBERS; the last run may be shorter
static __global__ void __launch_bounds__(ENGINE_THREADS) copy_engine_kernel(double* sums, const floatX* x, size_t n) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char stages[]; // [STAGES][STAGE_BYTES]
    __shared__ uint64_t full[STAGES];
    const size_t whole = n / PACK * PACK, runs = (whole + STAGE_NUMBERS - 1) / STAGE_NUMBERS;
    const int mine = blockIdx.x < runs ? (int)((runs - blockIdx.x + gridDim.x - 1) / gridDim.x) : 0;
    auto start = [&](int i) { return (blockIdx.x + (size_t)i * gridDim.x) * STAGE_NUMBERS; };
    auto bytes = [&](int i) {
        const size_t left = (whole - start(i)) * sizeof(floatX);
        return (uint32_t)(left < STAGE_BYTES ? left : STAGE_BYTES);
    };
    auto fetch = [&](int i) { // thread 0
        const uint32_t bar = shared_address(&full[i % STAGES]);
        mbarrier_expect(bar, bytes(i));
        bulk_load(shared_address(stages) + i % STAGES * STAGE_BYTES, x + start(i), bytes(i), bar);
    };
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) mbarrier_init(shared_address(&full[s]), 1);
        mbarrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES && i < mine; i++) fetch(i);
    double sum = 0;
    for (int i = 0; i < mine; i++) {
        const char* stage = stages + i % STAGES * STAGE_BYTES;
        mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES % 2);
        for (uint32_t at = threadIdx.x * 16; at < bytes(i); at += ENGINE_THREADS * 16) {
            const PackX pack = pack_load((const floatX*)(stage + at));
            float part = 0;
            for (int k = 0; k < PACK; k++) part += pack.get(k);
            sum += part;
        }
        __syncthreads(); // nobody reads the stage any more
        if (threadIdx.x == 0 && i + STAGES < mine) fetch(i + STAGES);
    }
    if (blockIdx.x == 0 && threadIdx.x < n - whole) sum += to_float(x[whole + threadIdx.x]);
    sum = adamw_block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
#endif
}

static void copy_engine(const Problem* p, int, cudaStream_t stream) {
    const int shared = STAGES * STAGE_BYTES;
    const int64_t most = (int64_t)gpu_processors() * 2, runs = ceil_div((int64_t)p->n, (int64_t)STAGE_NUMBERS);
    const unsigned blocks = (unsigned)(runs < most ? runs : most);
    cuda_check(cudaFuncSetAttribute(copy_engine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    copy_engine_kernel<<<blocks, ENGINE_THREADS, shared, stream>>>(p->sums, p->x, p->n);
    launch_check();
    two_steps_end_kernel<<<1, 1024, 0, stream>>>(p->y, p->sums, (int)blocks);
    launch_check();
}

static const char* hopper_only(const Problem*) { return hopper_refuses(); }

// ---- cub -------------------------------------------------------------------------------------
// idea    cub::DeviceReduce::TransformReduce: what one would call
// limit   fp32 all the way

static void cub_reduce(const Problem* p, int, cudaStream_t stream) {
    size_t bytes = p->cub_bytes;
    cuda_check(cub_sum(p->cub, &bytes, p->x, p->y, p->n, stream));
    launch_check();
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "atomic_per_thread",  atomic_per_thread,  { 256 },                 "each number added to one place" },
    { "tree_divergent",     tree_divergent,     { 128, 256, 512, 1024 }, "a tree in shared memory, every second thread" },
    { "tree_first_threads", tree_first_threads, { 128, 256, 512, 1024 }, "whole warps work, on places far apart" },
    { "tree_halves",        tree_halves,        { 128, 256, 512, 1024 }, "on neighbouring places: no bank conflicts" },
    { "add_on_load",        add_on_load,        { 128, 256, 512, 1024 }, "two numbers to a thread" },
    { "last_warp_unrolled", last_warp_unrolled, { 128, 256, 512, 1024 }, "one warp needs no barrier of the block" },
    { "warp_shuffle",       warp_shuffle,       { 128, 256, 512, 1024 }, "registers instead of shared memory" },
    { "grid_stride",        grid_stride,        { 128, 256, 512, 1024 }, "resident blocks, eight loads under way" },
    { "atomic_per_block",   atomic_per_block,   { 128, 256, 512, 1024 }, "an atomic a block instead of the second launch" },
    { "packs",              packs,              { 128, 256, 512, 1024 }, "16 bytes a load" },
    { "two_steps",          two_steps,          { 128, 256, 512, 1024 }, "fixed order, in double: the same bits at every run" },
    { "copy_engine",        copy_engine,        { 0 },                   "TMA brings the bytes to shared memory", hopper_only },
    { "cub",                cub_reduce,         { 0 },                   "cub::DeviceReduce" },
};
// clang-format on

BENCH_MAIN("reduce", shapes, setup, reference, rows, traffic, flops, variants)
