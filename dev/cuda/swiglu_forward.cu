/*
SwiGLU forward: the gate, through SiLU, times the other half of the row.

    y = gate * s * up       s = 1 / (1 + e^-gate)           gate_up (N, 2F): a row is F gates, then F ups    y (N, F)

What must move  3*N*F numbers: gates and ups read, y written. N 16384, bf16: F 8192 805 MB, 187 us at the 4.30 TB/s of a copy
                on the H200; F 14336 1409 MB, 328 us
Arithmetic      for 8 numbers of y, 48 bytes: 8 exponentials and 8 reciprocals. The special function unit takes 16 lanes a
                cycle on each of 132 multiprocessors: 2 * 134 million in 0.07 ms, of the 0.19 ms that the bytes take. expf and
                a rounded quotient are twice the instructions, and nearly all of them still fit beside the memory
Last percents   a copy writes half of its bytes, this op a third: more than 100 % of a copy can be had. What costs: starting
                65536 blocks, each idle until its first loads are back; the end, where the last blocks do not fill the card;
                and what the caches are told, see "once"
Reached         H200, bf16, % of a copy, 1B and 8B: two_kernels 21.2 21.1, one_kernel 40.2 39.8, packs 101.8 101.7,
                special_functions 103.7 103.1, lean 103.6 103.1, stores_once 103.5 103.1, production 103.5 103.3. Lost: once and
                past_l1 99 98, ahead 97 97, resident 99 98, copy_engine 98 98
Metrics         dram__throughput, smsp__inst_executed (instructions a pack), smsp__inst_executed_pipe_xu,
                smsp__warps_issue_stalled_long_scoreboard, lts__t_sectors_op_write beside dram__sectors_write (what stayed in L2)
*/
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "swiglu_parts.cuh"

// ---- the problem -----------------------------------------------------------------------------

// clang-format off
static const Shape shapes[] = {
    { .name = "1B", .N = 16384, .F = 8192 },
    { .name = "8B", .N = 16384, .F = 14336 },
    { .name = "one pack", .small = true, .N = 1, .F = 8 },
    { .name = "narrow", .small = true, .N = 14, .F = 8 },
    { .name = "odd", .small = true, .N = 37, .F = 264 },
    { .name = "three packs", .small = true, .N = 301, .F = 24 },
    { .name = "42M", .small = true, .N = 129, .F = 1376 },
    { .name = "wide", .small = true, .N = 3, .F = 14336 },
    { .name = "uneven", .small = true, .N = 5, .F = 10248 },
};
// clang-format on

struct Problem {
    int N, F;
    floatX* y;             // (N, F), overwritten
    const floatX* gate_up; // (N, 2F)
    floatX* activated;     // (N, F): scratch
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = { s->N, s->F, NULL, NULL, NULL };
    const size_t n = (size_t)p.N * p.F;
    p.gate_up = b->input<floatX>("gate_up", 2 * n, 2);
    p.y = b->output<floatX>("y", n);
    p.activated = b->scratch<floatX>(n);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const size_t F = (size_t)p->F, n = (size_t)count * F;
    float* y = (float*)allocate(n, sizeof *y);
    swiglu_forward_cpu(y, b->host(p->gate_up, first * 2 * F, 2 * n), (int)count, p->F);
    b->expect(p->y, first * F, y, n);
    free(y);
}

static double traffic(const Problem* p) { return 3.0 * p->N * p->F * sizeof(floatX); }
static double flops(const Problem*) { return 0; }

// ---- two_kernels -----------------------------------------------------------------------------
// idea    as a framework without fusion: SiLU of the gates in one kernel, the product with the ups in another
// limit   SiLU's result goes to memory and comes back: 5*N*F numbers instead of 3*N*F, and one rounding more

static __global__ void silu_kernel(floatX* activated, const floatX* gate_up, unsigned n, unsigned F) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float gate = to_float(gate_up[(size_t)(i / F) * 2 * F + i % F]);
    activated[i] = from_float<floatX>(gate / (1 + expf(-gate)));
}

static __global__ void product_kernel(floatX* y, const floatX* activated, const floatX* gate_up, unsigned n,
                                      unsigned F) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    y[i] = from_float<floatX>(to_float(activated[i]) * to_float(gate_up[((size_t)(i / F) * 2 + 1) * F + i % F]));
}

static void two_kernels(const Problem* p, int block, cudaStream_t stream) {
    const unsigned n = (unsigned)p->N * (unsigned)p->F, blocks = blocks_for(p->F, n, block);
    silu_kernel<<<blocks, block, 0, stream>>>(p->activated, p->gate_up, n, (unsigned)p->F);
    launch_check();
    product_kernel<<<blocks, block, 0, stream>>>(p->y, p->activated, p->gate_up, n, (unsigned)p->F);
    launch_check();
}

// ---- one_kernel ------------------------------------------------------------------------------
// idea    both in one: SiLU's result stays in a register
// limit   two loads of 2 bytes and a division for the index for each number: a warp's request brings 64 bytes

static __global__ void one_kernel_kernel(floatX* y, const floatX* gate_up, unsigned n, unsigned F) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const floatX* at = gate_up + (size_t)(i / F) * 2 * F + i % F;
    const float gate = to_float(at[0]), up = to_float(at[F]);
    y[i] = from_float<floatX>(gate / (1 + expf(-gate)) * up);
}

static void one_kernel(const Problem* p, int block, cudaStream_t stream) {
    const unsigned n = (unsigned)p->N * (unsigned)p->F;
    one_kernel_kernel<<<blocks_for(p->F, n, block), block, 0, stream>>>(p->y, p->gate_up, n, (unsigned)p->F);
    launch_check();
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes of gates, 16 of ups, 16 of y to a thread: an eighth of the requests and of the indices
// limit   expf and the rounded quotient: twice the instructions of the next variant, most of them hidden behind the memory

// ---- special_functions -----------------------------------------------------------------------
// idea    e^x and 1/x from the special function unit (llmc's swiglu_sigmoid): off by 1e-5 of itself, a bf16 rounds at 4e-3
// limit   140 instructions for 8 numbers: each exponential guards against results below 2^-126, the upper of two bf16 is
//         taken out by a permutation and a shift, and the address waits for a division of integers

template <typename How>
static __global__ void packs_kernel(floatX* __restrict__ y, const floatX* __restrict__ gate_up, unsigned packs,
                                    unsigned P) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    const size_t from = ((size_t)i + (size_t)(i / P) * P) * PACK;
    const PackX gate = pack_load(gate_up + from), up = pack_load(gate_up + from + (size_t)P * PACK);
    PackX out;
    for (int k = 0; k < PACK; k++) out.set(k, gate.get(k) * How::sigmoid(gate.get(k)) * up.get(k));
    pack_store(y + (size_t)i * PACK, out);
}

template <typename How>
static void packs(const Problem* p, int block, cudaStream_t stream) {
    const unsigned P = (unsigned)(p->F / PACK), all = (unsigned)p->N * P;
    packs_kernel<How><<<blocks_for(p->F, all, block), block, 0, stream>>>(p->y, p->gate_up, all, P);
    launch_check();
}

// ---- lean ------------------------------------------------------------------------------------
// idea    two thirds of the instructions. ex2 that flushes what is below 2^-126: 1 + that is 1 either way. A mask instead of
//         permutation and shift (streams.cuh). A block stays within one row, which the grid's y names: nothing is divided, and
//         the row is split evenly, so that no block is half empty (F 14336 is 7 blocks of 256): <1, KEEP, KEEP>
// limit   a thread asks for 32 bytes, waits, and is replaced

__device__ __forceinline__ int4 gated(int4 gate_bits, int4 up_bits) {
    const Widened<int4> gate = widen(gate_bits), up = widen(up_bits);
    Widened<int4> y;
#pragma unroll
    for (int k = 0; k < PACK; k++) y.x[k] = gate.x[k] * lean_sigmoid(gate.x[k]) * up.x[k];
    return narrow(y);
}

// P packs to a row of y, whose pieces are one block each; thread t of the block takes packs t, t + threads, … Rows are numbered
// by y and z of the grid
template <int PACKS, Hint LOAD, Hint STORE>
static __global__ void pieces_kernel(floatX* y, const floatX* gate_up, unsigned rows, unsigned P) {
    const unsigned row = blockIdx.z * gridDim.y + blockIdx.y, first = blockIdx.x * PACKS * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const int4* gates = reinterpret_cast<const int4*>(gate_up) + (size_t)row * 2 * P + first;
    int4* out = reinterpret_cast<int4*>(y) + (size_t)row * P + first;
    int4 gate[PACKS] = {}, up[PACKS] = {};
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const unsigned i = j * blockDim.x;
        if (first + i < P) gate[j] = hint_load<LOAD>(gates + i), up[j] = hint_load<LOAD>(gates + P + i);
    }
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const unsigned i = j * blockDim.x;
        if (first + i < P) hint_store<STORE>(out + i, gated(gate[j], up[j]));
    }
}

template <int PACKS, Hint LOAD, Hint STORE>
static void pieces(const Problem* p, int block, cudaStream_t stream) {
    const Pieces row(p->F, (int64_t)block * PACKS);
    pieces_kernel<PACKS, LOAD, STORE>
        <<<row.grid(p->N), row.threads(PACKS), 0, stream>>>(p->y, p->gate_up, (unsigned)p->N, row.P);
    launch_check();
}

// ---- two_packs, four_packs -------------------------------------------------------------------
// idea    several packs to a thread, a block's width apart, all loads before the first store: fewer blocks, more bytes under
//         way from each, longer runs of memory touched at once. With four, a row of F 8192 is one block of 256 threads
// limit   while the block computes and stores, its places load nothing

// ---- once, past_l1, ahead, stores_once -------------------------------------------------------
// idea    what the caches are told, with one pack a thread: lines that are read once leave first; take no line of the first
//         level; and fetch 256 bytes from memory at a miss; and of the lines that are written, that they leave first
// limit   all move the same bytes. Saying something about the loads costs some percents here: the cache orders what it is not
//         told about well enough

// ---- resident --------------------------------------------------------------------------------
// idea    as many blocks as the card holds, each of which walks down the rows with its piece: the loads of the next row are
//         under way before this one is computed, and no block is ever started on an empty place
// limit   rows are dealt out beforehand: a multiprocessor that is farther from memory ends later, and all wait for it

template <int PACKS>
static __global__ void __launch_bounds__(512, 2)
    resident_kernel(floatX* y, const floatX* gate_up, unsigned rows, unsigned P) {
    const unsigned first = blockIdx.x * PACKS * blockDim.x + threadIdx.x;
    int4 gate[PACKS] = {}, up[PACKS] = {};
    auto fetch = [&](unsigned row, int j) {
        const unsigned i = first + j * blockDim.x;
        const int4* from = reinterpret_cast<const int4*>(gate_up) + (size_t)row * 2 * P + i;
        if (row < rows && i < P) gate[j] = hint_load<KEEP>(from), up[j] = hint_load<KEEP>(from + P);
    };
#pragma unroll
    for (int j = 0; j < PACKS; j++) fetch(blockIdx.y, j);
    for (unsigned row = blockIdx.y; row < rows; row += gridDim.y) {
        int4* out = reinterpret_cast<int4*>(y) + (size_t)row * P;
#pragma unroll
        for (int j = 0; j < PACKS; j++) {
            const unsigned i = first + j * blockDim.x;
            const int4 g = gate[j], u = up[j];
            fetch(row + gridDim.y, j);
            if (i < P) hint_store<KEEP>(out + i, gated(g, u));
        }
    }
}

static void resident(const Problem* p, int block, cudaStream_t stream) {
    enum { PACKS = 2 };
    const Pieces row(p->F, (int64_t)block * PACKS);
    const int threads = (int)row.threads(PACKS);
    const int64_t held = resident_blocks(resident_kernel<PACKS>, threads, 0) / row.count;
    const dim3 grid(row.count, (unsigned)(held < 1 ? 1 : held < p->N ? held : p->N));
    resident_kernel<PACKS><<<grid, threads, 0, stream>>>(p->y, p->gate_up, (unsigned)p->N, row.P);
    launch_check();
}

// ---- copy_engine -----------------------------------------------------------------------------
// idea    Hopper's copy engine brings 8 KB of gates and 8 KB of ups at a command of one thread and takes y back from where the
//         gates were. What is under way has no register: three blocks with four stages, 144 KB of loads on a multiprocessor
// limit   a barrier of the block for each stage, and numbers pass through shared memory on their way

enum { STAGES = 4, STAGE_BYTES = 8192, ENGINE_THREADS = 256, ENGINE_BLOCKS = 3 };

// stage i % STAGES holds this block's piece i: gates, then ups
static __global__ void __launch_bounds__(ENGINE_THREADS, ENGINE_BLOCKS)
    copy_engine_kernel(floatX* y, const floatX* gate_up, unsigned P, unsigned pieces, unsigned piece, unsigned tasks) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char stages[]; // [STAGES][2][STAGE_BYTES]
    __shared__ uint64_t full[STAGES];
    const unsigned mine = (tasks - blockIdx.x + gridDim.x - 1) / gridDim.x; // at least one
    const char* from = reinterpret_cast<const char*>(gate_up);
    char* to = reinterpret_cast<char*>(y);
    struct Piece {
        size_t row, first; // in bytes of y's row, and from there
        uint32_t bytes;
    };
    auto place = [&](unsigned k) {
        const unsigned task = blockIdx.x + k * gridDim.x, first = task % pieces * piece;
        return Piece{ (size_t)(task / pieces) * P * 16, (size_t)first * 16, min(piece, P - first) * 16 };
    };
    auto fetch = [&](unsigned k) { // thread 0
        const Piece at = place(k);
        const uint32_t bar = shared_address(&full[k % STAGES]);
        const uint32_t stage = shared_address(stages) + k % STAGES * 2 * STAGE_BYTES;
        mbarrier_expect(bar, 2 * at.bytes);
        bulk_load(stage, from + 2 * at.row + at.first, at.bytes, bar);
        bulk_load(stage + STAGE_BYTES, from + 2 * at.row + (size_t)P * 16 + at.first, at.bytes, bar);
    };
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) mbarrier_init(shared_address(&full[s]), 1);
        mbarrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (unsigned k = 0; k < STAGES - 1 && k < mine; k++) fetch(k);
    for (unsigned k = 0; k < mine; k++) {
        const Piece at = place(k);
        char* stage = stages + k % STAGES * 2 * STAGE_BYTES;
        mbarrier_wait(shared_address(&full[k % STAGES]), k / STAGES % 2);
        for (uint32_t i = threadIdx.x * 16; i < at.bytes; i += ENGINE_THREADS * 16) {
            int4* gate = reinterpret_cast<int4*>(stage + i);
            *gate = gated(*gate, *reinterpret_cast<const int4*>(stage + STAGE_BYTES + i));
        }
        fence_async();
        __syncthreads(); // y is there, and nobody reads the stage before this one any more
        if (threadIdx.x != 0) continue;
        bulk_store(to + at.row + at.first, shared_address(stage), at.bytes);
        tma_store_commit();
        if (k + STAGES - 1 >= mine) continue;
        tma_store_wait_read<1>(); // y of the stage before this one has left it
        fetch(k + STAGES - 1);
    }
    if (threadIdx.x == 0) tma_store_wait<0>();
#endif
}

static void copy_engine(const Problem* p, int, cudaStream_t stream) {
    const int shared = STAGES * 2 * STAGE_BYTES;
    const Pieces row(p->F, STAGE_BYTES / 16);
    const int64_t tasks = (int64_t)p->N * row.count, most = (int64_t)ENGINE_BLOCKS * gpu_processors();
    cuda_check(cudaFuncSetAttribute(copy_engine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    copy_engine_kernel<<<(unsigned)(tasks < most ? tasks : most), ENGINE_THREADS, shared, stream>>>(
        p->y, p->gate_up, row.P, row.count, row.packs, (unsigned)tasks);
    launch_check();
}

static const char* hopper_only(const Problem*) { return hopper_refuses(); }

// ---- production ------------------------------------------------------------------------------

static void production(const Problem* p, int, cudaStream_t stream) {
    swiglu_forward(p->y, p->gate_up, p->N, p->F, stream);
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "two_kernels",       two_kernels,               { 256, 512 },            "SiLU, then the product: 5*N*F numbers" },
    { "one_kernel",        one_kernel,                { 256, 512 },            "one pass, 2 bytes a load" },
    { "packs",             packs<Exact>,              { 128, 256, 512 },       "16 bytes a load, expf and a rounded quotient" },
    { "special_functions", packs<Special>,            { 128, 256, 512 },       "e^x and 1/x of the special function unit" },
    { "lean",              pieces<1, KEEP, KEEP>,     { 128, 256, 512 },       "fewer instructions, blocks within a row" },
    { "two_packs",         pieces<2, KEEP, KEEP>,     { 128, 256, 512 },       "two packs a thread, loads first" },
    { "four_packs",        pieces<4, KEEP, KEEP>,     { 128, 256, 512 },       "four packs a thread, loads first" },
    { "once",              pieces<1, ONCE, KEEP>,     { 128, 256, 512 },       "one pack, lines that are read leave the cache first" },
    { "past_l1",           pieces<1, PAST_L1, KEEP>,  { 128, 256, 512 },       "one pack, loads past the first level" },
    { "ahead",             pieces<1, AHEAD, KEEP>,    { 128, 256, 512 },       "one pack, past the first level, 256 bytes at a miss" },
    { "stores_once",       pieces<1, KEEP, ONCE>,     { 128, 256, 512 },       "one pack, lines that are written leave the cache first" },
    { "resident",          resident,                  { 128, 256, 512 },       "blocks stay and fetch ahead" },
    { "copy_engine",       copy_engine,               { 0 },                   "TMA moves all bytes, three blocks with four stages of 2 x 8 KB", hopper_only },
    { "production",        production,                { 0 },                   "llmc/swiglu.h" },
};
// clang-format on
BENCH_MAIN("swiglu_forward", shapes, setup, reference, rows, traffic, flops, variants)
