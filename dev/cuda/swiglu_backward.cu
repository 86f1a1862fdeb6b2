/*
SwiGLU backward: the gradients of gate and up from that of their product.

    dgate = dy * up * s * (1 + gate * (1 - s))      s = 1 / (1 + e^-gate)
    dup   = dy * gate * s                           gate_up dgate_up (N, 2F): a row is F of gate, then F of up    dy (N, F)

What must move  5*N*F numbers: gates, ups and dy read, both gradients written. N 16384, bf16: F 8192 1342 MB, 312 us at the
                4.30 TB/s of a copy on the H200; F 14336 2349 MB, 546 us. In training dgate_up takes the place of gate_up, which
                nobody needs any more: the shapes named 1B and 8B are such
To keep s or not    the forward pass has s in a register and could keep it. In fp32 that is 4 more bytes a number to read here
                (and to write there) beside the 10 that must move: activation_kept. In bf16, 2 bytes, 1 - s would be lost
                where s is near 1. An exponential and a reciprocal cost nothing that memory would not hide: llmc makes s again
In place        a line is read, and written when it still lies in the L2 cache: every thread, or stage of the copy engine, reads
                all that it will overwrite before it writes
Reached         H200, bf16, % of a copy, 1B, 8B and 8B apart: one_number 57.6 57.2 57.8, packs 102.2 101.6 102.2, lean 102.3
                101.8 102.4, production 102.2 101.7 102.3; 1B activation_kept 73.9. Lost: four_packs 101 101 101, once 99 98 98,
                ahead 98 97 97, resident 98 97 98, copy_engine 96 96 97
Metrics         dram__throughput, smsp__inst_executed, smsp__inst_executed_pipe_xu, l1tex__t_requests_pipe_lsu_mem_global_op_st
                (a pack that the compiler stores in four pieces of 4 bytes shows here), lts__t_sectors_op_write
*/
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "swiglu_parts.cuh"

// ---- the problem -----------------------------------------------------------------------------

// clang-format off
static const Shape shapes[] = {
    { .name = "1B", .B = 1, .N = 16384, .F = 8192 },                             // B: dgate_up is gate_up
    { .name = "8B", .B = 1, .N = 16384, .F = 14336 },
    { .name = "8B, apart", .N = 16384, .F = 14336 },
    { .name = "one pack", .small = true, .N = 1, .F = 8 },
    { .name = "narrow, in place", .small = true, .B = 1, .N = 14, .F = 8 },
    { .name = "odd", .small = true, .N = 37, .F = 264 },
    { .name = "odd, in place", .small = true, .B = 1, .N = 37, .F = 264 },
    { .name = "three packs, in place", .small = true, .B = 1, .N = 301, .F = 24 },
    { .name = "42M", .small = true, .N = 129, .F = 1376 },
    { .name = "wide, in place", .small = true, .B = 1, .N = 3, .F = 14336 },
    { .name = "uneven, in place", .small = true, .B = 1, .N = 5, .F = 10248 },
};
// clang-format on

struct Problem {
    int N, F;
    floatX* dgate_up;      // (N, 2F), overwritten; may be gate_up
    const floatX* dy;      // (N, F)
    const floatX* gate_up; // (N, 2F)
    const float* kept;     // (N, F): s of the forward pass, or NULL
};

static Problem setup(Bench* b, const Shape* shape) {
    Problem p = { shape->N, shape->F, NULL, NULL, NULL, NULL };
    const size_t F = (size_t)p.F, n = (size_t)p.N * F;
    p.dy = b->input<floatX>("dy", n);
    if (shape->B) {
        p.dgate_up = b->in_place<floatX>("gate_up", 2 * n, 2);
        p.gate_up = p.dgate_up;
    } else {
        p.gate_up = b->input<floatX>("gate_up", 2 * n, 2);
        p.dgate_up = b->output<floatX>("dgate_up", 2 * n);
    }
    if (n > (size_t)16384 * 8192) return p;
    const float* gate_up = b->host(p.gate_up);
    float* s = (float*)allocate(n, sizeof *s);
#pragma omp parallel for
    for (size_t row = 0; row < (size_t)p.N; row++)
        for (size_t i = 0; i < F; i++) s[row * F + i] = 1 / (1 + exp32(-gate_up[row * 2 * F + i]));
    p.kept = b->input_from<float>("s", s, n);
    free(s);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const size_t F = (size_t)p->F, n = (size_t)count * F;
    float* d = (float*)allocate(2 * n, sizeof *d);
    swiglu_backward_cpu(d, b->host(p->dy, first * F, n), b->host(p->gate_up, first * 2 * F, 2 * n), (int)count, p->F);
    b->expect(p->dgate_up, first * 2 * F, d, 2 * n);
    free(d);
}

static double traffic(const Problem* p) { return 5.0 * p->N * p->F * sizeof(floatX); }
static double flops(const Problem*) { return 0; }

static const char* nothing_kept(const Problem* p) {
    return p->kept ? NULL : "the harness keeps s for up to 16384 x 8192 numbers";
}

// gate_up and dgate_up may be the same array: no pointer to them is __restrict__

// ---- one_number ------------------------------------------------------------------------------
// idea    one thread for each number of dy
// limit   three loads and two stores of 2 bytes, and a division for the index: requests of 64 bytes

static __global__ void one_number_kernel(floatX* dgate_up, const floatX* dy, const floatX* gate_up, unsigned n,
                                         unsigned F) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const size_t at = (size_t)(i / F) * 2 * F + i % F;
    const float gate = to_float(gate_up[at]), up = to_float(gate_up[at + F]), d = to_float(dy[i]);
    const float s = 1 / (1 + expf(-gate));
    dgate_up[at] = from_float<floatX>(d * up * s * (1 + gate * (1 - s)));
    dgate_up[at + F] = from_float<floatX>(d * gate * s);
}

static void one_number(const Problem* p, int block, cudaStream_t stream) {
    const unsigned n = (unsigned)p->N * (unsigned)p->F;
    one_number_kernel<<<blocks_for(p->F, n, block), block, 0, stream>>>(p->dgate_up, p->dy, p->gate_up, n,
                                                                        (unsigned)p->F);
    launch_check();
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes of each of the five arrays to a thread
// limit   expf and a rounded quotient: twice the instructions of the next variant, all hidden behind the memory

// ---- special_functions -----------------------------------------------------------------------
// idea    e^x and 1/x from the special function unit (llmc's swiglu_sigmoid)
// limit   200 instructions for 8 numbers (see swiglu_forward.cu)

template <typename How>
static __global__ void packs_kernel(floatX* dgate_up, const floatX* dy, const floatX* gate_up, unsigned packs,
                                    unsigned P) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    const size_t from = ((size_t)i + (size_t)(i / P) * P) * PACK, F = (size_t)P * PACK;
    const PackX gate = pack_load(gate_up + from), up = pack_load(gate_up + from + F);
    const PackX d = pack_load(dy + (size_t)i * PACK);
    PackX dgate, dup;
    for (int k = 0; k < PACK; k++) {
        const float g = gate.get(k), s = How::sigmoid(g);
        dgate.set(k, d.get(k) * up.get(k) * s * (1 + g * (1 - s)));
        dup.set(k, d.get(k) * g * s);
    }
    pack_store(dgate_up + from, dgate);
    pack_store(dgate_up + from + F, dup);
}

template <typename How>
static void packs(const Problem* p, int block, cudaStream_t stream) {
    const unsigned P = (unsigned)(p->F / PACK), all = (unsigned)p->N * P;
    packs_kernel<How><<<blocks_for(p->F, all, block), block, 0, stream>>>(p->dgate_up, p->dy, p->gate_up, all, P);
    launch_check();
}

// ---- lean ------------------------------------------------------------------------------------
// idea    as in swiglu_forward.cu: two thirds of the instructions, a block within a row, an even row, no division; whole packs
//         stored by one instruction each (streams.cuh)
// limit   a thread asks for 48 bytes, waits, and is replaced

// gate and up become their gradients
__device__ __forceinline__ void gradients(int4& gate_bits, int4& up_bits, int4 d_bits) {
    Widened<int4> gate = widen(gate_bits), up = widen(up_bits), d = widen(d_bits);
#pragma unroll
    for (int k = 0; k < PACK; k++) {
        const float s = lean_sigmoid(gate.x[k]), activated = gate.x[k] * s;
        gate.x[k] = d.x[k] * up.x[k] * (activated * (1 - s) + s);
        up.x[k] = d.x[k] * activated;
    }
    gate_bits = narrow(gate), up_bits = narrow(up);
}

// P packs to a row of dy, whose pieces are one block each; thread t of the block takes packs t, t + threads, … Rows are
// numbered by y and z of the grid
template <int PACKS, Hint LOAD, Hint STORE>
static __global__ void pieces_kernel(floatX* dgate_up, const floatX* dy, const floatX* gate_up, unsigned rows,
                                     unsigned P) {
    const unsigned row = blockIdx.z * gridDim.y + blockIdx.y, first = blockIdx.x * PACKS * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const int4* gates = reinterpret_cast<const int4*>(gate_up) + (size_t)row * 2 * P + first;
    const int4* from = reinterpret_cast<const int4*>(dy) + (size_t)row * P + first;
    int4* to = reinterpret_cast<int4*>(dgate_up) + (size_t)row * 2 * P + first;
    int4 gate[PACKS] = {}, up[PACKS] = {}, d[PACKS] = {};
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const unsigned i = j * blockDim.x;
        if (first + i >= P) continue;
        gate[j] = hint_load<LOAD>(gates + i), up[j] = hint_load<LOAD>(gates + P + i), d[j] = hint_load<LOAD>(from + i);
    }
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const unsigned i = j * blockDim.x;
        if (first + i >= P) continue;
        gradients(gate[j], up[j], d[j]);
        hint_store<STORE>(to + i, gate[j]);
        hint_store<STORE>(to + P + i, up[j]);
    }
}

template <int PACKS, Hint LOAD, Hint STORE>
static void pieces(const Problem* p, int block, cudaStream_t stream) {
    const Pieces row(p->F, (int64_t)block * PACKS);
    pieces_kernel<PACKS, LOAD, STORE>
        <<<row.grid(p->N), row.threads(PACKS), 0, stream>>>(p->dgate_up, p->dy, p->gate_up, (unsigned)p->N, row.P);
    launch_check();
}

// ---- activation_kept -------------------------------------------------------------------------
// idea    s from the forward pass, in fp32: no exponential, no reciprocal
// limit   14 bytes a number instead of 10, for arithmetic that was free

static __global__ void activation_kept_kernel(floatX* dgate_up, const floatX* dy, const floatX* gate_up,
                                              const float* kept, unsigned rows, unsigned P) {
    const unsigned row = blockIdx.z * gridDim.y + blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows || i >= P) return;
    const size_t at = (size_t)row * P + i, gate_at = at + (size_t)row * P;
    const int4* gates = reinterpret_cast<const int4*>(gate_up) + gate_at;
    Widened<int4> gate = widen(hint_load<KEEP>(gates)), up = widen(hint_load<KEEP>(gates + P));
    const Widened<int4> d = widen(hint_load<KEEP>(reinterpret_cast<const int4*>(dy) + at));
    Pack<float> s[PACK / 4];
#pragma unroll
    for (int j = 0; j < PACK / 4; j++) s[j] = pack_load(kept + at * PACK + 4 * j);
#pragma unroll
    for (int k = 0; k < PACK; k++) {
        const float sk = s[k / 4].x[k % 4], activated = gate.x[k] * sk;
        gate.x[k] = d.x[k] * up.x[k] * (activated * (1 - sk) + sk);
        up.x[k] = d.x[k] * activated;
    }
    int4* to = reinterpret_cast<int4*>(dgate_up) + gate_at;
    hint_store<KEEP>(to, narrow(gate));
    hint_store<KEEP>(to + P, narrow(up));
}

static void activation_kept(const Problem* p, int block, cudaStream_t stream) {
    const Pieces row(p->F, block);
    activation_kept_kernel<<<row.grid(p->N), row.threads(1), 0, stream>>>(p->dgate_up, p->dy, p->gate_up, p->kept,
                                                                          (unsigned)p->N, row.P);
    launch_check();
}

// ---- two_packs, four_packs -------------------------------------------------------------------
// idea    several packs to a thread, a block's width apart, all loads before the first store: fewer blocks, more bytes under
//         way from each, longer runs of memory touched at once. With four, a row of F 8192 is one block of 256 threads
// limit   while the block computes and stores, its places load nothing

// ---- once, past_l1, ahead, stores_once -------------------------------------------------------
// idea    what the caches are told, with one pack a thread: lines that are read once leave first; take no line of the first
//         level; and fetch 256 bytes from memory at a miss; and of the lines that are written, that they leave first
// limit   all move the same bytes, and saying something about the loads costs some percents (see swiglu_forward.cu)

// ---- resident --------------------------------------------------------------------------------
// idea    as many blocks as the card holds, each of which walks down the rows with its piece: the loads of the next row are
//         under way before this one is computed, and no block is ever started on an empty place
// limit   rows are dealt out beforehand: a multiprocessor that is farther from memory ends later, and all wait for it

template <int PACKS>
static __global__ void __launch_bounds__(512, 2)
    resident_kernel(floatX* dgate_up, const floatX* dy, const floatX* gate_up, unsigned rows, unsigned P) {
    const unsigned first = blockIdx.x * PACKS * blockDim.x + threadIdx.x;
    int4 gate[PACKS] = {}, up[PACKS] = {}, d[PACKS] = {};
    auto fetch = [&](unsigned row, int j) { // a row that no other block touches
        const unsigned i = first + j * blockDim.x;
        const int4* from = reinterpret_cast<const int4*>(gate_up) + (size_t)row * 2 * P + i;
        if (row >= rows || i >= P) return;
        gate[j] = hint_load<KEEP>(from), up[j] = hint_load<KEEP>(from + P);
        d[j] = hint_load<KEEP>(reinterpret_cast<const int4*>(dy) + (size_t)row * P + i);
    };
#pragma unroll
    for (int j = 0; j < PACKS; j++) fetch(blockIdx.y, j);
    for (unsigned row = blockIdx.y; row < rows; row += gridDim.y) {
        int4* to = reinterpret_cast<int4*>(dgate_up) + (size_t)row * 2 * P;
#pragma unroll
        for (int j = 0; j < PACKS; j++) {
            const unsigned i = first + j * blockDim.x;
            int4 dgate = gate[j], dup = up[j], dj = d[j];
            fetch(row + gridDim.y, j);
            gradients(dgate, dup, dj);
            if (i < P) hint_store<KEEP>(to + i, dgate), hint_store<KEEP>(to + P + i, dup);
        }
    }
}

static void resident(const Problem* p, int block, cudaStream_t stream) {
    enum { PACKS = 1 };
    const Pieces row(p->F, (int64_t)block * PACKS);
    const int threads = (int)row.threads(PACKS);
    const int64_t held = resident_blocks(resident_kernel<PACKS>, threads, 0) / row.count;
    const dim3 grid(row.count, (unsigned)(held < 1 ? 1 : held < p->N ? held : p->N));
    resident_kernel<PACKS><<<grid, threads, 0, stream>>>(p->dgate_up, p->dy, p->gate_up, (unsigned)p->N, row.P);
    launch_check();
}

// ---- copy_engine -----------------------------------------------------------------------------
// idea    Hopper's copy engine brings 8 KB of gates, of ups and of dy at a command of one thread and takes the gradients back
//         from where gates and ups were. Three blocks with three stages: 144 KB of loads under way on a multiprocessor
// limit   a barrier of the block for each stage, and numbers pass through shared memory on their way

enum { STAGES = 3, STAGE_BYTES = 8192, ENGINE_THREADS = 256, ENGINE_BLOCKS = 3 };

// stage k % STAGES holds this block's piece k: gates, ups, dy
static __global__ void __launch_bounds__(ENGINE_THREADS, ENGINE_BLOCKS)
    copy_engine_kernel(floatX* dgate_up, const floatX* dy, const floatX* gate_up, unsigned P, unsigned pieces,
                       unsigned piece, unsigned tasks) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char stages[]; // [STAGES][3][STAGE_BYTES]
    __shared__ uint64_t full[STAGES];
    const unsigned mine = (tasks - blockIdx.x + gridDim.x - 1) / gridDim.x; // at least one
    const char *from = reinterpret_cast<const char*>(gate_up), *from_dy = reinterpret_cast<const char*>(dy);
    char* to = reinterpret_cast<char*>(dgate_up);
    const size_t width = (size_t)P * 16; // bytes of a row of dy
    struct Piece {
        size_t row, first; // in bytes of dy's row, and from there
        uint32_t bytes;
    };
    auto place = [&](unsigned k) {
        const unsigned task = blockIdx.x + k * gridDim.x, first = task % pieces * piece;
        return Piece{ task / pieces * width, (size_t)first * 16, min(piece, P - first) * 16 };
    };
    auto fetch = [&](unsigned k) { // thread 0
        const Piece at = place(k);
        const uint32_t bar = shared_address(&full[k % STAGES]);
        const uint32_t stage = shared_address(stages) + k % STAGES * 3 * STAGE_BYTES;
        mbarrier_expect(bar, 3 * at.bytes);
        bulk_load(stage, from + 2 * at.row + at.first, at.bytes, bar);
        bulk_load(stage + STAGE_BYTES, from + 2 * at.row + width + at.first, at.bytes, bar);
        bulk_load(stage + 2 * STAGE_BYTES, from_dy + at.row + at.first, at.bytes, bar);
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
        char* stage = stages + k % STAGES * 3 * STAGE_BYTES;
        mbarrier_wait(shared_address(&full[k % STAGES]), k / STAGES % 2);
        for (uint32_t i = threadIdx.x * 16; i < at.bytes; i += ENGINE_THREADS * 16) {
            int4* gate = reinterpret_cast<int4*>(stage + i);
            int4* up = reinterpret_cast<int4*>(stage + STAGE_BYTES + i);
            int4 dgate = *gate, dup = *up;
            gradients(dgate, dup, *reinterpret_cast<const int4*>(stage + 2 * STAGE_BYTES + i));
            *gate = dgate, *up = dup;
        }
        fence_async();
        __syncthreads(); // the gradients are there, and nobody reads the stage before this one any more
        if (threadIdx.x != 0) continue;
        bulk_store(to + 2 * at.row + at.first, shared_address(stage), at.bytes);
        bulk_store(to + 2 * at.row + width + at.first, shared_address(stage) + STAGE_BYTES, at.bytes);
        tma_store_commit();
        if (k + STAGES - 1 >= mine) continue;
        tma_store_wait_read<1>(); // the gradients of the stage before this one have left it
        fetch(k + STAGES - 1);
    }
    if (threadIdx.x == 0) tma_store_wait<0>();
#endif
}

static void copy_engine(const Problem* p, int, cudaStream_t stream) {
    const int shared = STAGES * 3 * STAGE_BYTES;
    const Pieces row(p->F, STAGE_BYTES / 16);
    const int64_t tasks = (int64_t)p->N * row.count, most = (int64_t)ENGINE_BLOCKS * gpu_processors();
    cuda_check(cudaFuncSetAttribute(copy_engine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    copy_engine_kernel<<<(unsigned)(tasks < most ? tasks : most), ENGINE_THREADS, shared, stream>>>(
        p->dgate_up, p->dy, p->gate_up, row.P, row.count, row.packs, (unsigned)tasks);
    launch_check();
}

static const char* hopper_only(const Problem*) { return hopper_refuses(); }

// ---- production ------------------------------------------------------------------------------

static void production(const Problem* p, int, cudaStream_t stream) {
    swiglu_backward(p->dgate_up, p->dy, p->gate_up, p->N, p->F, stream);
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "one_number",        one_number,                { 256, 512 },       "a thread for each number, 2 bytes a load" },
    { "packs",             packs<Exact>,              { 128, 256, 512 },  "16 bytes a load, expf and a rounded quotient" },
    { "special_functions", packs<Special>,            { 128, 256, 512 },  "e^x and 1/x of the special function unit" },
    { "activation_kept",   activation_kept,           { 128, 256, 512 },  "s comes from the forward pass, in fp32: 14 bytes a number, not 10", nothing_kept },
    { "lean",              pieces<1, KEEP, KEEP>,     { 128, 256, 512 },  "fewer instructions, blocks within a row" },
    { "two_packs",         pieces<2, KEEP, KEEP>,     { 128, 256, 512 },  "two packs a thread, loads first" },
    { "four_packs",        pieces<4, KEEP, KEEP>,     { 128, 256, 512 },  "four packs a thread, loads first" },
    { "once",              pieces<1, ONCE, KEEP>,     { 128, 256, 512 },  "one pack, lines that are read leave the cache first" },
    { "past_l1",           pieces<1, PAST_L1, KEEP>,  { 128, 256, 512 },  "one pack, loads past the first level" },
    { "ahead",             pieces<1, AHEAD, KEEP>,    { 128, 256, 512 },  "one pack, past the first level, 256 bytes at a miss" },
    { "stores_once",       pieces<1, KEEP, ONCE>,     { 128, 256, 512 },  "one pack, lines that are written leave the cache first" },
    { "resident",          resident,                  { 128, 256, 512 },  "blocks stay and fetch ahead" },
    { "copy_engine",       copy_engine,               { 0 },              "TMA moves all bytes, three blocks with three stages of 3 x 8 KB", hopper_only },
    { "production",        production,                { 0 },              "llmc/swiglu.h; s is made again, in place" },
};
// clang-format on
BENCH_MAIN("swiglu_backward", shapes, setup, reference, rows, traffic, flops, variants)
