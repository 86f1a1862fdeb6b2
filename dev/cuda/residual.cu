/*
Residual add: the stream, and what a block adds to it.

    y[n, c] = a[n, c] + b[n, c]             summed in fp32, rounded once; y may be a

What must move  3*N*C numbers: a and b read, y written. 16384 x 4096 in bf16: 403 MB, 94 us at the 4.30 TB/s of a copy on
                the H200. One addition for 6 bytes: the arithmetic units sleep
In llmc         nothing adds alone: residual_rmsnorm_forward (llmc/rmsnorm.h) adds within the norm that follows, where y
                need not be read again, and rmsnorm_backward adds the gradient of the stream where it makes dx. What is left
                to learn here is how a kernel with nothing to compute keeps memory busy. Little's law: 4.30 TB/s for some
                700 ns is 3 MB under way at a time, 23 KB for each of the 132 multiprocessors, of which two thirds are loads
Reached         H200, bf16, in % of a copy: scalar 49, packs 103 (of three numbers two are read, and reading is the faster
                half), four packs a thread the same; marked as seen once 96, resident blocks 100, the copy engine 100. The
                simplest kernel with 16-byte loads is the best one
Metrics         l1tex__average_t_sectors_per_request (how many sectors a request brings: 2 of scalar bf16, 16 of 16-byte
                loads), smsp__warps_issue_stalled_long_scoreboard (waiting for loads), dram__throughput
*/
#define YARDSTICK "packs" // no module of llmc adds two arrays alone: the row that the others are measured by
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "streams.cuh"

// clang-format off
static const Shape shapes[] = {
    { .name = "1B", .N = 16384, .C = 2048 },
    { .name = "8B", .N = 16384, .C = 4096 },
    { .name = "8B, in place", .B = 1, .N = 16384, .C = 4096 }, // B: y is a
    { .name = "one row", .small = true, .N = 1, .C = 8 },
    { .name = "odd", .small = true, .N = 37, .C = 264 },
    { .name = "odd, in place", .small = true, .B = 1, .N = 301, .C = 1032 },
};
// clang-format on

struct Problem {
    int N, C;
    size_t n;  // N * C
    floatX* y; // overwritten
    const floatX *a, *b;
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = { s->N, s->C, (size_t)s->N * s->C, NULL, NULL, NULL };
    if (s->B) {
        p.y = b->in_place<floatX>("a", p.n);
        p.a = p.y;
    } else {
        p.y = b->output<floatX>("y", p.n);
        p.a = b->input<floatX>("a", p.n);
    }
    p.b = b->input<floatX>("b", p.n);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const size_t start = (size_t)first * p->C, n = (size_t)count * p->C;
    const float *x = b->host(p->a, start, n), *add = b->host(p->b, start, n);
    float* sum = (float*)allocate(n, sizeof(float));
    for (size_t i = 0; i < n; i++) sum[i] = x[i] + add[i];
    b->expect(p->y, start, sum, n);
    free(sum);
}

static double traffic(const Problem* p) { return 3.0 * (double)p->n * sizeof(floatX); }
static double flops(const Problem*) { return 0; }

// y and a may be the same array, so that none is __restrict__: a thread reads all it needs before it writes

// ---- scalar ----------------------------------------------------------------------------------
// idea    one thread for each number
// limit   a warp's load of bf16 is 64 bytes, half of what a request can bring, for a dozen instructions of indices and
//         conversions: the load units take one request a cycle, and 2048 threads have 8 KB of loads under way

static __global__ void scalar_kernel(floatX* y, const floatX* a, const floatX* b, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<floatX>(to_float(a[i]) + to_float(b[i]));
}

static void scalar(const Problem* p, int block, cudaStream_t stream) {
    scalar_kernel<<<(unsigned)ceil_div((int64_t)p->n, block), block, 0, stream>>>(p->y, p->a, p->b, p->n);
    launch_check();
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes to a thread: 8 numbers for the price of one, 512 bytes to a request, 64 KB of loads under way
// limit   memory, it turns out. What might be left to gain: a thread has two loads, one addition and one store, and while
//         the last warps of a block store, their places on the multiprocessor load nothing

__device__ __forceinline__ int4 add_packs(int4 a, int4 b) {
    Widened<int4> x = widen(a);
    const Widened<int4> y = widen(b);
    for (int k = 0; k < PACK; k++) x.x[k] += y.x[k];
    return narrow<int4>(x);
}

static __global__ void packs_kernel(floatX* y, const floatX* a, const floatX* b, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    const int4 v = hint_load<KEEP>((const int4*)(a + i)), w = hint_load<KEEP>((const int4*)(b + i));
    hint_store<KEEP>((int4*)(y + i), add_packs(v, w));
}

static void packs(const Problem* p, int block, cudaStream_t stream) {
    const int64_t blocks = ceil_div((int64_t)p->n, (int64_t)block * PACK);
    packs_kernel<<<(unsigned)blocks, block, 0, stream>>>(p->y, p->a, p->b, p->n);
    launch_check();
}

// ---- packs_in_flight -------------------------------------------------------------------------
// idea    four packs of either array to a thread, a block's width apart, all loads before the first store: a quarter of the
//         blocks, four times the bytes under way
// limit   there were enough under way before. What is left is how the L2 cache shares memory between reading and writing

enum { IN_FLIGHT = 4 };

template <Hint HINT>
static __global__ void in_flight_kernel(floatX* y, const floatX* a, const floatX* b, size_t n) {
    const size_t first = ((size_t)blockIdx.x * IN_FLIGHT * blockDim.x + threadIdx.x) * PACK, step = blockDim.x * PACK;
    int4 v[IN_FLIGHT] = {}, w[IN_FLIGHT] = {};
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++) {
        const size_t i = first + j * step;
        if (i >= n) continue;
        v[j] = hint_load<HINT>((const int4*)(a + i));
        w[j] = hint_load<HINT>((const int4*)(b + i));
    }
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++) {
        const size_t i = first + j * step;
        if (i < n) hint_store<HINT>((int4*)(y + i), add_packs(v[j], w[j]));
    }
}

template <Hint HINT>
static void in_flight(const Problem* p, int block, cudaStream_t stream) {
    const int64_t blocks = ceil_div((int64_t)p->n, (int64_t)block * IN_FLIGHT * PACK);
    in_flight_kernel<HINT><<<(unsigned)blocks, block, 0, stream>>>(p->y, p->a, p->b, p->n);
    launch_check();
}

// ---- once ------------------------------------------------------------------------------------
// idea    the same, with loads and stores marked as seen once (ld.global.cs, st.global.cs): their lines leave the L2 cache
//         first. in_flight_kernel<ONCE>
// limit   a step back by 7 %: the cache has nothing better to keep, and what leaves it early is written early, between the
//         reads. In a training step the next kernel would have found y there, too

// ---- resident --------------------------------------------------------------------------------
// idea    only as many blocks as run at a time, which walk the arrays: none is ever launched into a half-empty
//         multiprocessor, and the loads of the next turn are under way while this one is stored
// limit   a step back by 3 %: blocks come and go at no cost that could be saved

static __global__ void __launch_bounds__(512, 2)
    resident_kernel(floatX* y, const floatX* a, const floatX* b, size_t n) {
    enum { LOADS = 2 };
    const size_t stride = (size_t)gridDim.x * blockDim.x * PACK;
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    int4 v[LOADS] = {}, w[LOADS] = {};
    auto fetch = [&](int j, size_t at) {
        if (at < n) v[j] = hint_load<KEEP>((const int4*)(a + at)), w[j] = hint_load<KEEP>((const int4*)(b + at));
    };
#pragma unroll
    for (int j = 0; j < LOADS; j++) fetch(j, i + j * stride);
    for (; i < n; i += LOADS * stride)
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            const size_t at = i + j * stride;
            const int4 sum = add_packs(v[j], w[j]);
            fetch(j, at + LOADS * stride); // places of this thread alone
            if (at < n) hint_store<KEEP>((int4*)(y + at), sum);
        }
}

static void resident(const Problem* p, int block, cudaStream_t stream) {
    const int64_t most = (int64_t)gpu_processors() * (1024 / block);
    const int64_t blocks = ceil_div((int64_t)p->n, (int64_t)block * PACK);
    resident_kernel<<<(unsigned)(blocks < most ? blocks : most), block, 0, stream>>>(p->y, p->a, p->b, p->n);
    launch_check();
}

// ---- copy_engine -----------------------------------------------------------------------------
// idea    Hopper's copy engine brings both arrays to shared memory, 8 KB at a command of one thread, and takes the sums
//         back: 64 KB under way for each block, three blocks on a multiprocessor, and no register holds a byte of it
// limit   memory itself, and a barrier a stage

enum { STAGES = 4, STAGE_BYTES = 8192, STAGE_NUMBERS = STAGE_BYTES / sizeof(floatX), ENGINE_THREADS = 256 };

// one run of STAGE_NUMBERS for block b, b + grid, … Stage i % STAGES holds run i: a, then b; the sum replaces a there
static __global__ void __launch_bounds__(ENGINE_THREADS)
    copy_engine_kernel(floatX* y, const floatX* a, const floatX* b, size_t n) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char stages[]; // [STAGES][2][STAGE_BYTES]
    __shared__ uint64_t full[STAGES];
    const size_t runs = (n + STAGE_NUMBERS - 1) / STAGE_NUMBERS;
    const int mine = (int)((runs - blockIdx.x + gridDim.x - 1) / gridDim.x); // of this block: at least one
    auto start = [&](int i) { return (blockIdx.x + (size_t)i * gridDim.x) * STAGE_NUMBERS; };
    auto bytes = [&](int i) {
        const size_t left = (n - start(i)) * sizeof(floatX);
        return (uint32_t)(left < STAGE_BYTES ? left : STAGE_BYTES);
    };
    auto fetch = [&](int i) { // thread 0
        const uint32_t bar = shared_address(&full[i % STAGES]);
        const uint32_t to = shared_address(stages) + i % STAGES * 2 * STAGE_BYTES;
        mbarrier_expect(bar, 2 * bytes(i));
        bulk_load(to, a + start(i), bytes(i), bar);
        bulk_load(to + STAGE_BYTES, b + start(i), bytes(i), bar);
    };
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) mbarrier_init(shared_address(&full[s]), 1);
        mbarrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES - 1 && i < mine; i++) fetch(i);
    for (int i = 0; i < mine; i++) {
        char* stage = stages + i % STAGES * 2 * STAGE_BYTES;
        mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES % 2);
        for (uint32_t at = threadIdx.x * 16; at < bytes(i); at += ENGINE_THREADS * 16) {
            int4* sum = (int4*)(stage + at);
            *sum = add_packs(*sum, *(const int4*)(stage + STAGE_BYTES + at));
        }
        fence_async();
        __syncthreads(); // the sums are there, and nobody reads the stage before this one any more
        if (threadIdx.x != 0) continue;
        bulk_store(y + start(i), shared_address(stage), bytes(i));
        tma_store_commit();
        if (i + STAGES - 1 >= mine) continue;
        tma_store_wait_read<1>(); // the sums of the stage before this one have left it
        fetch(i + STAGES - 1);
    }
    if (threadIdx.x == 0) tma_store_wait<0>();
#endif
}

static void copy_engine(const Problem* p, int, cudaStream_t stream) {
    const int shared = STAGES * 2 * STAGE_BYTES;
    const int64_t most = (int64_t)gpu_processors() * 3, runs = ceil_div((int64_t)p->n, (int64_t)STAGE_NUMBERS);
    cuda_check(cudaFuncSetAttribute(copy_engine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    copy_engine_kernel<<<(unsigned)(runs < most ? runs : most), ENGINE_THREADS, shared, stream>>>(p->y, p->a, p->b,
                                                                                                  p->n);
    launch_check();
}

static const char* hopper_only(const Problem*) { return hopper_refuses(); }

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "scalar",          scalar,          { 128, 256, 512 }, "a thread for each number" },
    { "packs",           packs,           { 128, 256, 512 }, "16 bytes to a thread" },
    { "packs_in_flight", in_flight<KEEP>, { 128, 256, 512 }, "four packs of either array, loads before stores" },
    { "once",            in_flight<ONCE>, { 128, 256, 512 }, "marked as seen once in the L2 cache" },
    { "resident",        resident,        { 128, 256, 512 }, "blocks stay and fetch ahead" },
    { "copy_engine",     copy_engine,     { 0 },             "TMA moves all bytes, in stages of 2 x 8 KB", hopper_only },
};
// clang-format on

BENCH_MAIN("residual", shapes, setup, reference, rows, traffic, flops, variants)
