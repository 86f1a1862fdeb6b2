/*
Softmax of rows of logits.

    y[n, v] = e^(x[n, v] - top[n]) / sum over u of e^(x[n, u] - top[n])         top[n] = max over v of x[n, v]

x and y (N, V) are floatX; powers and sums are fp32, and y is rounded once.

What must move  2*N*V numbers: 8192 x 4096 in bf16 is 134 MB, 31 us at the 4.30 TB/s of a copy on the H200; 4096 x 128256 is
                2.10 GB, 489 us
Passes          the largest number, then the sum, then the numbers: three readings and one writing, unless the row waits
                somewhere. Online (Milakov and Gimelshein 2018) the first two are one: a sum of e^(x - top) for the largest
                so far becomes one for a larger top by a single factor. A row that waits on the multiprocessor is read once:

                    registers of a block       128 KB: 65536 numbers of bf16
                    its shared memory          227 KB: 116224; a vocabulary of 128256 just does not fit
                    registers of a cluster     eight blocks of 512 threads: 262144

Also bound by   powers: a multiprocessor makes 16 a cycle, and each number needs two where they are not kept. At the speed
                of memory that is over half of the time
Numerics        the top starts at the lowest float, not at 0, or a row of large negative numbers would become 0 / 0
Reached         H200, bf16, in % of a copy: at 4096 columns thread_per_row 3, warp_per_row 31, block_per_row 35, online 38,
                packs 89, row_in_shared 92, row_in_registers 99, cluster 94, cluster_ahead 71; at 128256 thread_per_row 2,
                warp_per_row 20, block_per_row 19, online 26, packs 65, cluster 77, cluster_ahead 73, which lost
Metrics         dram__bytes_read (1, 2 or 3 times x), smsp__inst_executed_pipe_xu (powers, and conversions),
                lts__t_sector_hit_rate, l1tex__average_t_sectors_per_request (32 for the first row)
In llmc         never alone: within cross_entropy (llmc/cross_entropy.h), whose parts the last rows are made of, and within
                attention, where a row never leaves the registers at all
*/
#define YARDSTICK "cluster" // nothing ships alone: the row that the others are measured by
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "llmc/cross_entropy.h"
#include "llmc/softmax.h"
#include "streams.cuh"

// clang-format off
static const Shape shapes[] = {
    { .name = "attention", .N = 8192, .V = 4096 },
    { .name = "vocabulary", .N = 4096, .V = 128256 },
    { .name = "one pack", .small = true, .N = 1, .V = 8 },
    { .name = "no packs", .small = true, .N = 5, .V = 37 },
    { .name = "odd", .small = true, .N = 37, .V = 1000 },
    { .name = "long", .small = true, .N = 3, .V = 70008 },
};
// clang-format on

struct Problem {
    int N, V;
    floatX* y; // overwritten
    const floatX* x;
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = { s->N, s->V, NULL, NULL };
    const size_t n = (size_t)s->N * s->V;
    p.x = b->input<floatX>("x", n, 3, s->small ? -200.0f : 0.0f); // nobody may begin with a top of 0
    p.y = b->output<floatX>("y", n, s->V);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    float* y = (float*)allocate((size_t)p->V, sizeof *y);
    for (int64_t n = first; n < first + count; n++) {
        const size_t row = (size_t)n * p->V;
        memcpy(y, b->host(p->x, row, (size_t)p->V), (size_t)p->V * sizeof *y);
        const float sum = softmax_powers(y, p->V, softmax_max(y, p->V, -INFINITY));
        for (int v = 0; v < p->V; v++) y[v] /= sum;
        b->expect(p->y, row, y, (size_t)p->V);
    }
    free(y);
}

static double traffic(const Problem* p) { return 2.0 * p->N * p->V * (double)sizeof(floatX); }
static double flops(const Problem*) { return 0; }

// e^x, by the instruction for 2^x
__device__ __forceinline__ float power(float x) { return cross_entropy_power(x); }

// ---- thread_per_row --------------------------------------------------------------------------
// idea    the CPU's loops, a row to a thread: largest, sum, numbers
// limit   the lanes of a warp read numbers V apart, 32 sectors for 32 numbers, three times; and there are fewer rows than
//         the GPU has places for threads

static __global__ void thread_per_row_kernel(floatX* y, const floatX* x, int N, int V) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    x += (size_t)n * V, y += (size_t)n * V;
    float top = -FLT_MAX, sum = 0;
    for (int v = 0; v < V; v++) top = fmaxf(top, to_float(x[v]));
    for (int v = 0; v < V; v++) sum += power(to_float(x[v]) - top);
    const float factor = 1 / sum;
    for (int v = 0; v < V; v++) y[v] = from_float<floatX>(power(to_float(x[v]) - top) * factor);
}

static void thread_per_row(const Problem* p, int block, cudaStream_t stream) {
    thread_per_row_kernel<<<(unsigned)ceil_div(p->N, block), block, 0, stream>>>(p->y, p->x, p->N, p->V);
    launch_check();
}

// ---- warp_per_row ----------------------------------------------------------------------------
// idea    32 lanes share a row, side by side: a load is 64 bytes in a piece, maximum and sum are five shuffles
// limit   a row of the vocabulary is 4008 steps for a warp, three times, and 4096 rows are half of the warps that fit

static __global__ void warp_per_row_kernel(floatX* y, const floatX* x, int N, int V) {
    const int n = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    x += (size_t)n * V, y += (size_t)n * V;
    float top = -FLT_MAX, sum = 0;
    for (int v = lane; v < V; v += WARP) top = fmaxf(top, to_float(x[v]));
    top = warp_max(top);
    for (int v = lane; v < V; v += WARP) sum += power(to_float(x[v]) - top);
    const float factor = 1 / warp_sum(sum);
    for (int v = lane; v < V; v += WARP) y[v] = from_float<floatX>(power(to_float(x[v]) - top) * factor);
}

static void warp_per_row(const Problem* p, int block, cudaStream_t stream) {
    warp_per_row_kernel<<<(unsigned)ceil_div(p->N, block / WARP), block, 0, stream>>>(p->y, p->x, p->N, p->V);
    launch_check();
}

// ---- block_per_row ---------------------------------------------------------------------------
// idea    all threads of a block share a row: fewer rows are on their way at a time, and the second and third reading may
//         still find theirs in the L2 cache
// limit   three readings

__device__ __forceinline__ float block_max(float x) {
    __shared__ float most[WARP];
    const int lane = threadIdx.x % WARP;
    x = warp_max(x);
    if (lane == 0) most[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_max(lane < (int)blockDim.x / WARP ? most[lane] : -FLT_MAX);
}

static __global__ void block_per_row_kernel(floatX* y, const floatX* x, int V) {
    x += (size_t)blockIdx.x * V, y += (size_t)blockIdx.x * V;
    float top = -FLT_MAX, sum = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) top = fmaxf(top, to_float(x[v]));
    top = block_max(top);
    for (int v = threadIdx.x; v < V; v += blockDim.x) sum += power(to_float(x[v]) - top);
    const float factor = 1 / block_sum(sum);
    for (int v = threadIdx.x; v < V; v += blockDim.x) y[v] = from_float<floatX>(power(to_float(x[v]) - top) * factor);
}

static void block_per_row(const Problem* p, int block, cudaStream_t stream) {
    block_per_row_kernel<<<(unsigned)p->N, block, 0, stream>>>(p->y, p->x, p->V);
    launch_check();
}

// ---- online ----------------------------------------------------------------------------------
// idea    largest and sum in one reading: when the top grows, the old sum is scaled to the new one
// limit   two powers for each number of that pass, and 2 bytes a load

// of all threads of a block, the same in all of them
__device__ __forceinline__ CrossEntropySum block_combine(CrossEntropySum s) {
    __shared__ CrossEntropySum warps[WARP];
    const int lane = threadIdx.x % WARP;
    s = cross_entropy_warp(s);
    if (lane == 0) warps[threadIdx.x / WARP] = s;
    __syncthreads();
    return cross_entropy_warp(lane < (int)blockDim.x / WARP ? warps[lane] : CrossEntropySum{ -FLT_MAX, 0 });
}

static __global__ void online_kernel(floatX* y, const floatX* x, int V) {
    x += (size_t)blockIdx.x * V, y += (size_t)blockIdx.x * V;
    CrossEntropySum s = { -FLT_MAX, 0 };
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        const float number = to_float(x[v]);
        cross_entropy_add<1>(s, &number);
    }
    s = block_combine(s);
    const float factor = 1 / s.sum;
    for (int v = threadIdx.x; v < V; v += blockDim.x) y[v] = from_float<floatX>(power(to_float(x[v]) - s.top) * factor);
}

static void online(const Problem* p, int block, cudaStream_t stream) {
    online_kernel<<<(unsigned)p->N, block, 0, stream>>>(p->y, p->x, p->V);
    launch_check();
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes a load: an eighth of the instructions, and one more power for 8 numbers instead of for each
// limit   the row is read twice; what of the second time comes from the L2 cache depends on how many rows are on their way

__device__ __forceinline__ PackX pack_powers(PackX v, float top, float factor) {
    for (int k = 0; k < PACK; k++) v.set(k, power(v.get(k) - top) * factor);
    return v;
}

__device__ __forceinline__ void store_pack(floatX* p, PackX v) {
    int4 bits;
    memcpy(&bits, &v, 16);
    hint_store<KEEP>((int4*)p, bits);
}

__device__ __forceinline__ void add_pack(CrossEntropySum& s, PackX v) {
    float x[PACK];
    for (int k = 0; k < PACK; k++) x[k] = v.get(k);
    cross_entropy_add<PACK>(s, x);
}

static __global__ void packs_kernel(floatX* y, const floatX* x, int V) {
    x += (size_t)blockIdx.x * V, y += (size_t)blockIdx.x * V;
    const int first = threadIdx.x * PACK, step = blockDim.x * PACK;
    CrossEntropySum s = { -FLT_MAX, 0 };
#pragma unroll 4
    for (int v = first; v < V; v += step) add_pack(s, pack_load(x + v));
    s = block_combine(s);
    const float factor = 1 / s.sum;
#pragma unroll 4
    for (int v = first; v < V; v += step) store_pack(y + v, pack_powers(pack_load(x + v), s.top, factor));
}

static void packs(const Problem* p, int block, cudaStream_t stream) {
    packs_kernel<<<(unsigned)p->N, block, 0, stream>>>(p->y, p->x, p->V);
    launch_check();
}

static const char* whole_packs(const Problem* p) { return p->V % PACK ? "V is to be a multiple of 16 bytes" : NULL; }

// ---- row_in_shared ---------------------------------------------------------------------------
// idea    the row waits in shared memory from its one reading to its writing. Each thread keeps what it read itself in
//         places that nobody else reads
// limit   V: 227 KB. And every number is written to shared memory and read from it, for nothing

static __global__ void row_in_shared_kernel(floatX* y, const floatX* x, int V) {
    extern __shared__ int4 row[];
    x += (size_t)blockIdx.x * V, y += (size_t)blockIdx.x * V;
    const int packs = V / PACK;
    CrossEntropySum s = { -FLT_MAX, 0 };
#pragma unroll 4
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        const PackX v = pack_load(x + (size_t)p * PACK);
        pack_store((floatX*)(row + p), v);
        add_pack(s, v);
    }
    s = block_combine(s);
    const float factor = 1 / s.sum;
#pragma unroll 4
    for (int p = threadIdx.x; p < packs; p += blockDim.x)
        store_pack(y + (size_t)p * PACK, pack_powers(pack_load((const floatX*)(row + p)), s.top, factor));
}

static int most_shared(void) {
    int device, most;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return most - 1024; // what the kernel has beside the row
}

static void row_in_shared(const Problem* p, int block, cudaStream_t stream) {
    const size_t bytes = (size_t)p->V * sizeof(floatX);
    cuda_check(cudaFuncSetAttribute(row_in_shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    row_in_shared_kernel<<<(unsigned)p->N, block, bytes, stream>>>(p->y, p->x, p->V);
    launch_check();
}

static const char* fits_shared(const Problem* p) {
    if ((int64_t)p->V * (int64_t)sizeof(floatX) > most_shared())
        return "a row does not fit the shared memory of a block";
    return whole_packs(p);
}

// ---- row_in_registers ------------------------------------------------------------------------
// idea    the row waits where it was loaded to: up to 8 packs a thread stay packed in 32 registers. All loads of a row are
//         under way before the first is used
// limit   V: a block of 1024 threads has room for 65536 numbers of bf16

enum { HELD = CROSS_ENTROPY_HELD };

// the row of `count` blocks of which this one is number `rank`; whole(s) makes the sum of this thread that of the row
template <typename Whole>
__device__ __forceinline__ void held_row(floatX* y, const floatX* x, int V, int rank, int count, Whole whole) {
    const int packs = V / PACK, first = rank * blockDim.x + threadIdx.x, stride = count * blockDim.x;
    int4 held[HELD] = {};
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (first + i * stride < packs) held[i] = hint_load<KEEP>((const int4*)x + first + i * stride);
    CrossEntropySum s = { -FLT_MAX, 0 };
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (first + i * stride >= packs) continue;
        float v[PACK];
        cross_entropy_unpack(v, held[i], first + i * stride, V);
        cross_entropy_add<PACK>(s, v);
    }
    s = whole(s);
    const float factor = 1 / s.sum;
    asm volatile("" : "+l"(y)); // addresses are to be computed again, not kept
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (first + i * stride >= packs) continue;
        asm volatile(""
                     : "+r"(held[i].x), "+r"(held[i].y), "+r"(held[i].z), "+r"(held[i].w)); // and packs unpacked again
        PackX v;
        memcpy(&v, &held[i], 16);
        store_pack(y + (size_t)(first + i * stride) * PACK, pack_powers(v, s.top, factor));
    }
}

static __global__ void __launch_bounds__(1024) row_in_registers_kernel(floatX* y, const floatX* x, int V) {
    const size_t row = (size_t)blockIdx.x * V;
    held_row(y + row, x + row, V, 0, 1, [](CrossEntropySum s) { return block_combine(s); });
}

static int threads_for(const Problem* p, int blocks) {
    return (int)ceil_div(p->V / PACK, (int64_t)blocks * HELD * WARP) * WARP;
}

static void row_in_registers(const Problem* p, int, cudaStream_t stream) {
    row_in_registers_kernel<<<(unsigned)p->N, threads_for(p, 1), 0, stream>>>(p->y, p->x, p->V);
    launch_check();
}

static const char* fits_registers(const Problem* p) {
    if (p->V > 1024 * HELD * PACK) return "a row does not fit the registers of a block";
    return whole_packs(p);
}

// ---- cluster ---------------------------------------------------------------------------------
// idea    several blocks share a row, each with a part in its registers, and read each other's sums: a cluster of Hopper,
//         as cross_entropy of llmc has it. On other GPUs one block of up to 512 threads
// limit   a block loads, then computes, then stores, and only one more shares its multiprocessor: a long row keeps memory busy
//         for three quarters of the time

static __global__ void __launch_bounds__(CROSS_ENTROPY_THREADS, 2) cluster_kernel(floatX* y, const floatX* x, int V) {
    __shared__ CrossEntropySum warp_sums[CROSS_ENTROPY_THREADS / WARP];
    CrossEntropyRow blocks;
    const int count = blocks.count(), lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const size_t row = (size_t)(blockIdx.x / count) * V;
    held_row(y + row, x + row, V, blocks.rank(), count, [&](CrossEntropySum s) {
        s = cross_entropy_warp(s);
        if (lane == 0) warp_sums[threadIdx.x / WARP] = s;
        blocks.arrive();
        blocks.wait();
        s = CrossEntropySum{ -FLT_MAX, 0 };
        for (int i = lane; i < count * warps; i += WARP) {
            const CrossEntropySum other = blocks.shared_of(warp_sums, i / warps)[i % warps];
            const float top = fmaxf(s.top, other.top);
            s.sum = s.sum * power(s.top - top) + other.sum * power(other.top - top);
            s.top = top;
        }
        blocks.leave(); // nobody ends while another reads its sums
        return cross_entropy_warp(s);
    });
    blocks.wait();
}

static int cluster_blocks(const Problem* p) {
    const int most = cross_entropy_most_blocks();
    int blocks = 1;
    while (blocks < most && blocks * CROSS_ENTROPY_THREADS * HELD * PACK < p->V) blocks *= 2;
    return blocks;
}

static void cluster(const Problem* p, int, cudaStream_t stream) {
    const int blocks = cluster_blocks(p);
    cudaLaunchAttribute together;
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim.x = (unsigned)blocks, together.val.clusterDim.y = 1, together.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)p->N * (unsigned)blocks);
    config.blockDim = dim3((unsigned)threads_for(p, blocks));
    config.stream = stream;
    config.attrs = &together;
    config.numAttrs = blocks > 1;
    cuda_check(cudaLaunchKernelEx(&config, cluster_kernel, p->y, p->x, p->V));
    launch_check();
}

static const char* fits_cluster(const Problem* p) {
    if (cluster_blocks(p) * CROSS_ENTROPY_THREADS * HELD * PACK < p->V)
        return "a row does not fit the registers of a cluster";
    return whole_packs(p);
}

// ---- cluster_ahead ---------------------------------------------------------------------------
// idea    the next rows are on their way while one is computed: clusters stay and walk the rows, and in each block the copy
//         engine fills a ring of three places in shared memory, 64 KB each at most; powers take the place of the numbers there,
//         and the copy engine brings them away. A block adds up first, so that only one sum of each passes between blocks
// limit   powers, two for each number, and a barrier of the cluster for each row

enum { AHEAD_STAGES = 3, AHEAD_PACKS = (64 << 10) / 16 };

// part: packs of a row that a block has, the last maybe fewer. Cluster c computes rows c, c + clusters …
static __global__ void __launch_bounds__(1024)
    cluster_ahead_kernel(floatX* y, const floatX* x, int N, int V, int part) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) int4 stages[]; // [AHEAD_STAGES][part]
    __shared__ uint64_t full[AHEAD_STAGES];
    __shared__ CrossEntropySum warp_sums[WARP], block_sums[2][CROSS_ENTROPY_BLOCKS]; // those of a row, then of the next
    CrossEntropyRow blocks;
    const int count = blocks.count(), rank = blocks.rank(), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int clusters = gridDim.x / count, cluster = blockIdx.x / count,
              mine = (N - cluster + clusters - 1) / clusters;
    const int packs = min(part, V / PACK - rank * part);
    const uint32_t bytes = (uint32_t)packs * 16;
    auto start = [&](int i) { return (size_t)(cluster + i * clusters) * V + (size_t)rank * part * PACK; };
    auto fetch = [&](int i) { // thread 0
        const uint32_t bar = shared_address(&full[i % AHEAD_STAGES]);
        mbarrier_expect(bar, bytes);
        bulk_load(shared_address(stages + i % AHEAD_STAGES * part), x + start(i), bytes, bar);
    };
    if (threadIdx.x == 0) {
        for (int s = 0; s < AHEAD_STAGES; s++) mbarrier_init(shared_address(&full[s]), 1);
        mbarrier_init_done();
        for (int i = 0; i < AHEAD_STAGES - 1 && i < mine; i++) fetch(i);
    }
    __syncwarp();
    cluster_sync(); // all blocks of the cluster are there
    for (int i = 0; i < mine; i++) {
        int4* const row = stages + i % AHEAD_STAGES * part;
        mbarrier_wait(shared_address(&full[i % AHEAD_STAGES]), i / AHEAD_STAGES % 2);
        CrossEntropySum s = { -FLT_MAX, 0 };
#pragma unroll 4
        for (int p = threadIdx.x; p < packs; p += blockDim.x) add_pack(s, pack_load((const floatX*)(row + p)));
        __syncwarp();
        s = cross_entropy_warp(s);
        if (lane == 0) warp_sums[warp] = s;
        __syncthreads();
        if (warp == 0) {
            s = cross_entropy_warp(lane < (int)blockDim.x / WARP ? warp_sums[lane] : CrossEntropySum{ -FLT_MAX, 0 });
            if (lane < count) *blocks.shared_of(&block_sums[i % 2][rank], lane) = s;
            __syncwarp();
        }
        cluster_sync(); // who writes these sums again, two rows on, has passed the barrier that follows their being read
        s = cross_entropy_warp(lane < count ? block_sums[i % 2][lane] : CrossEntropySum{ -FLT_MAX, 0 });
        const float factor = 1 / s.sum;
#pragma unroll 4
        for (int p = threadIdx.x; p < packs; p += blockDim.x)
            pack_store((floatX*)(row + p), pack_powers(pack_load((const floatX*)(row + p)), s.top, factor));
        fence_async();
        __syncthreads(); // the row is done
        if (threadIdx.x == 0) {
            bulk_store(y + start(i), shared_address(row), bytes);
            tma_store_commit();
            if (i + AHEAD_STAGES - 1 < mine) {
                tma_store_wait_read<1>(); // the row before this one has left its place
                fetch(i + AHEAD_STAGES - 1);
            }
        }
        __syncwarp();
    }
    if (threadIdx.x == 0) tma_store_wait<0>();
#endif
}

static int ahead_blocks(const Problem* p) {
    const int most = cross_entropy_most_blocks();
    int blocks = 1;
    while (blocks < most && blocks * AHEAD_PACKS < p->V / PACK) blocks *= 2;
    return blocks;
}

static void cluster_ahead(const Problem* p, int block, cudaStream_t stream) {
    const int blocks = ahead_blocks(p), part = (int)ceil_div(p->V / PACK, blocks);
    const size_t shared = (size_t)AHEAD_STAGES * part * 16;
    int clusters;
    cudaLaunchAttribute together;
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim.x = (unsigned)blocks, together.val.clusterDim.y = 1, together.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks), config.blockDim = dim3((unsigned)block);
    config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &together, config.numAttrs = 1;
    cuda_check(cudaFuncSetAttribute(cluster_ahead_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    cuda_check(cudaOccupancyMaxActiveClusters(&clusters, cluster_ahead_kernel, &config));
    launch_require(clusters > 0, "cluster_ahead", "a cluster of these blocks fits the GPU");
    config.gridDim = dim3((unsigned)(min(clusters, p->N) * blocks));
    cuda_check(cudaLaunchKernelEx(&config, cluster_ahead_kernel, p->y, p->x, p->N, p->V, part));
    launch_check();
}

static const char* fits_ahead(const Problem* p) {
    if (hopper_refuses()) return hopper_refuses();
    if (ahead_blocks(p) * AHEAD_PACKS < p->V / PACK) return "a row does not fit the shared memory of a cluster";
    return whole_packs(p);
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "thread_per_row",   thread_per_row,   { 32, 64, 128 },         "three readings by one thread" },
    { "warp_per_row",     warp_per_row,     { 128, 256, 512 },       "32 lanes side by side" },
    { "block_per_row",    block_per_row,    { 128, 256, 512, 1024 }, "fewer rows on their way, more of them in the cache" },
    { "online",           online,           { 128, 256, 512, 1024 }, "largest and sum in one reading" },
    { "packs",            packs,            { 128, 256, 512, 1024 }, "16 bytes a load", whole_packs },
    { "row_in_shared",    row_in_shared,    { 128, 256, 512, 1024 }, "the row waits in shared memory", fits_shared },
    { "row_in_registers", row_in_registers, { 0 },                   "the row waits in registers", fits_registers },
    { "cluster",          cluster,          { 0 },                   "in those of up to eight blocks", fits_cluster },
    { "cluster_ahead",    cluster_ahead,    { 256, 512, 1024 },      "in shared memory, the next rows coming", fits_ahead },
};
// clang-format on

BENCH_MAIN("softmax", shapes, setup, reference, rows, traffic, flops, variants)
