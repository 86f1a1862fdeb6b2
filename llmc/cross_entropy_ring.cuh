/*
Cross-entropy of long rows on Hopper: each logit is read once and each gradient written once, by clusters of blocks that keep
a row in shared memory. Formulas and semantics are cross_entropy.h's, which includes this.

A cluster       2 to 8 blocks share a row and stay for many rows, those with n % clusters = the cluster's number; each has the same
                part of every row
A block         a warp of its own, of which one thread has the copy engine bring chunks of 16 KB into a ring in shared memory, as
                fast as places become free, of this row and the next one alike. The other warps add up the chunks as they
                come, send their sums to all blocks of the cluster, wait for those of the others, take the chunks up again
                and store gradients
Waiting         no barrier of the block, none of the cluster: each warp waits for bytes alone, of chunks and of sums
Order           sums of warps are added in the order of the warps, whenever they come: the same bits at each run
Bound by        memory, and what a row costs once: the way of the sums. One block to a multiprocessor keeps a part of up to 128
                KB and has room for six chunks of the next row meanwhile. On an H200, 8192 x 128256 in bf16, two blocks a row:
                1127 us, 87 % of a copy; the row in the registers of four blocks (cross_entropy_kernel) 1418 us
Proved by       dev/cuda/cross_entropy.cu, dev/test/gpu/test_cross_entropy.cuh
*/
#pragma once

#include "hopper.cuh"

enum {
    CROSS_ENTROPY_RING_PACKS = 1024,    // of a chunk, at most: 16 KB
    CROSS_ENTROPY_RING_SLOTS = 16,      // chunks in shared memory, at most
    CROSS_ENTROPY_RING_BLOCKS = 8,      // that may share a row
    CROSS_ENTROPY_RING_PART = 8,        // chunks of a part, at most, when a block has a multiprocessor to itself
    CROSS_ENTROPY_RING_MEMORY = 233472, // bytes of shared memory on a multiprocessor, 1 KB of each block is the system's
};

// how a row is cut
struct CrossEntropyPlan {
    int blocks; // of a cluster, a power of 2; 0: the row is too long
    int part;   // packs of a block; the last one has what is left
    int chunks; // of a part
    int chunk;  // packs of a chunk; the last one of a part has what is left
    int slots, slot_bytes;
};

// the numbers of 16 bytes, one instruction each
__device__ __forceinline__ void cross_entropy_numbers(float (&x)[PACK], int4 bits) {
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
__device__ __forceinline__ float cross_entropy_power_of_two(float x, float shift) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaf(x, 1.44269504f, shift)));
    return y;
}

// THREADS that compute, SHARING blocks to a multiprocessor. AHEAD: the next row is added up before the gradients of this one
template <int THREADS, int SHARING, bool AHEAD>
struct CrossEntropyRing {
    static_assert(THREADS % WARP == 0 && THREADS + WARP <= 1024,
                  "a block has at most 1024 threads, one warp of which copies");
    static_assert(CROSS_ENTROPY_RING_PACKS % THREADS == 0, "each thread has as many packs of a chunk as every other");
    enum {
        WARPS = THREADS / WARP,
        HELD = CROSS_ENTROPY_RING_PACKS / THREADS, // packs of a chunk for each thread
        SEEN = HELD < 2 ? HELD : 2,                // of them added up at once
        EXCHANGES = AHEAD ? 4 : 2,                 // see write
        BYTES = CROSS_ENTROPY_RING_MEMORY / SHARING - 1024,
    };
    struct Shared {
        CrossEntropySum sums[EXCHANGES][CROSS_ENTROPY_RING_BLOCKS * WARPS];
        // barriers: a chunk has come; all warps have taken it; the sums of all warps of all blocks have come
        uint64_t full[CROSS_ENTROPY_RING_SLOTS], empty[CROSS_ENTROPY_RING_SLOTS], summed[EXCHANGES];
    };
    enum { SLOTS_FROM = (sizeof(Shared) + 127) / 128 * 128 };

    static CrossEntropyPlan plan(int V, int part_chunks) {
        const int packs = (int)ceil_div(V, PACK);
        CrossEntropyPlan plan = {};
        int blocks = 2; // a cluster of one may not send to itself by the rules of memcheck
        while (blocks < CROSS_ENTROPY_RING_BLOCKS && blocks * part_chunks * CROSS_ENTROPY_RING_PACKS < packs)
            blocks *= 2;
        if (blocks * part_chunks * CROSS_ENTROPY_RING_PACKS < packs) return plan;
        plan.blocks = blocks;
        plan.part = (int)ceil_div(packs, blocks);
        plan.chunks = (int)ceil_div(plan.part, CROSS_ENTROPY_RING_PACKS);
        plan.chunk = (int)ceil_div(plan.part, plan.chunks);
        plan.slot_bytes = (int)ceil_div(plan.chunk * 16, 128) * 128;
        // the last one is read in full
        plan.slots = ((int)BYTES - (int)SLOTS_FROM - CROSS_ENTROPY_RING_PACKS * 16) / plan.slot_bytes + 1;
        if (plan.slots > CROSS_ENTROPY_RING_SLOTS) plan.slots = CROSS_ENTROPY_RING_SLOTS;
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
    CrossEntropyPlan plan_of;
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
        cross_entropy_numbers(v, bits);
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
                for (int k = 0; k < PACK; k++) d.set(k, cross_entropy_power_of_two(v[k] - s.top, shift));
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
    cross_entropy_ring_kernel(float* losses, floatX* logits, const int32_t* labels, float scale, bool backward, int N,
                              int V, int ld, CrossEntropyPlan plan) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char cross_entropy_memory[];
    CrossEntropyRing<THREADS, SHARING, AHEAD> ring = {
        losses, logits, labels, scale, backward, N, V, ld, plan, 0, 0, 0, cross_entropy_memory
    };
    ring.run();
#endif
}

// whether the clusters of a ring take a row of V numbers, in parts of so many chunks: two blocks have something of it, and it
// is not too long for eight
static inline bool cross_entropy_ring_takes(int V, int part_chunks) {
    const int64_t packs = ceil_div(V, PACK);
    return !hopper_refuses() && packs >= 2 &&
           packs <= (int64_t)CROSS_ENTROPY_RING_BLOCKS * part_chunks * CROSS_ENTROPY_RING_PACKS;
}

// as cross_entropy, of rows that it takes
template <int THREADS, int SHARING, bool AHEAD>
static inline void cross_entropy_ring(float* losses, floatX* logits, const int32_t* labels, float scale, bool backward,
                                      int N, int V, int ld, int part_chunks, cudaStream_t stream) {
    typedef CrossEntropyRing<THREADS, SHARING, AHEAD> R;
    const auto kernel = cross_entropy_ring_kernel<THREADS, SHARING, AHEAD>;
    static int most[CROSS_ENTROPY_RING_BLOCKS + 1]; // clusters that run at once, by their blocks
    const CrossEntropyPlan plan = R::plan(V, part_chunks);
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
    config.gridDim.x = (unsigned)(plan.blocks * min(N, most[plan.blocks]));
    cuda_check(cudaLaunchKernelEx(&config, kernel, losses, logits, labels, scale, backward, N, V, ld, plan));
    launch_check();
}
