/*
Transpose: rows become columns.

    y[c, n] = x[n, c]               x (N, C)    y (C, N)

What must move  2*N*C numbers, as a copy: 16384 x 4096 in bf16 is 268 MB, 62 us at the 4.30 TB/s of a copy on the H200
The difficulty  memory hands out sectors of 32 bytes, and wants whole lines of 128. One of the two arrays is walked against
                its grain: neighbours of y are C numbers apart in x. Whoever does both must hold a square of the matrix
                somewhere: in the caches, in shared memory, or in registers
Banks           shared memory is 32 columns of 4 bytes. A square of 32 x 32 floats has its column in one bank: 32 turns for
                a warp's load instead of one. In bf16 a row of 32 is 16 banks: 16 turns
Reached         H200, bf16, in % of a copy: columns written 7, columns read 21 (the L1 cache helps who reads, nothing helps
                who writes), a tile 30, without bank conflicts 36 to 37: what is left is that a lane moves 2 bytes at a
                time. 16 bytes a lane: registers 87 to 88, packs 88 to 90, strips 91, copy_engine 89 to 92
Metrics         l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld and _st (4 for whole lines of 4-byte numbers,
                32 for a column), l1tex__data_bank_conflicts_pipe_lsu_mem_shared, lts__t_sectors_srcunit_tex_op_write,
                dram__throughput
In llmc         nothing is transposed in memory: the matrix products read either order (cuBLASLt by its flags, our attention
                by ldmatrix.trans), and that is the fastest transpose of all
*/
#define YARDSTICK "packs" // nothing ships: the row that the others are measured by
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "streams.cuh"

// clang-format off
static const Shape shapes[] = {
    { .name = "1B", .N = 16384, .C = 2048 },
    { .name = "8B", .N = 16384, .C = 4096 },
    { .name = "8B, a weight", .N = 14336, .C = 4096 },
    { .name = "one pack", .small = true, .N = 8, .C = 8 },
    { .name = "odd packs", .small = true, .N = 72, .C = 264 },
    { .name = "tall", .small = true, .N = 1000, .C = 40 },
    { .name = "wide", .small = true, .N = 136, .C = 1304 },
    { .name = "no packs", .small = true, .N = 131, .C = 37 },
};
// clang-format on

struct Problem {
    int N, C;
    floatX* y;       // (C, N), overwritten
    const floatX* x; // (N, C)
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = { s->N, s->C, NULL, NULL };
    const size_t n = (size_t)s->N * s->C;
    p.x = b->input<floatX>("x", n);
    p.y = b->output<floatX>("y", n);
    return p;
}

// rows of y
static int64_t rows(const Problem* p) { return p->C; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const float* x = b->host(p->x);
    float* y = (float*)allocate((size_t)p->N, sizeof *y);
    for (int64_t c = first; c < first + count; c++) {
        for (int n = 0; n < p->N; n++) y[n] = x[(size_t)n * p->C + c];
        b->expect(p->y, (size_t)c * p->N, y, (size_t)p->N);
    }
    free(y);
}

static double traffic(const Problem* p) { return 2.0 * p->N * p->C * (double)sizeof(floatX); }
static double flops(const Problem*) { return 0; }

// the blocks of a grid whose blocks have `across` columns and `down` rows of x: x walks the columns
static dim3 tiles(const Problem* p, int across, int down) {
    return dim3((unsigned)ceil_div(p->C, across), (unsigned)ceil_div(p->N, down));
}

__device__ __forceinline__ void store_pack(floatX* p, PackX v) {
    int4 bits;
    memcpy(&bits, &v, 16);
    hint_store<KEEP>((int4*)p, bits);
}

// ---- coalesced_reads -------------------------------------------------------------------------
// idea    a thread for each number, neighbouring threads on neighbours of x: each warp reads one piece of a row
// limit   and writes a column of y: 32 numbers to 32 lines, 2 or 4 bytes of each sector. The L2 cache must gather the rest
//         of a sector from other warps before it is thrown out

template <int EACH>
static __global__ void coalesced_reads_kernel(floatX* y, const floatX* x, int N, int C) {
    const int c = blockIdx.x * WARP + threadIdx.x;
    const int first = blockIdx.y * blockDim.y * EACH + threadIdx.y;
    floatX v[EACH];
    if (c >= C) return;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int n = first + j * blockDim.y;
        if (n < N) v[j] = x[(size_t)n * C + c];
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int n = first + j * blockDim.y;
        if (n < N) y[(size_t)c * N + n] = v[j];
    }
}

template <int EACH>
static void coalesced_reads(const Problem* p, int block, cudaStream_t stream) {
    const dim3 threads(WARP, (unsigned)block / WARP);
    coalesced_reads_kernel<EACH><<<tiles(p, WARP, EACH * (int)threads.y), threads, 0, stream>>>(p->y, p->x, p->N, p->C);
    launch_check();
}

// ---- coalesced_writes ------------------------------------------------------------------------
// idea    the other way about: whole pieces of rows of y are written, columns of x are read. What is read of a sector too
//         much stays in the L1 cache, for the warp of the same block that is one column further
// limit   a column's load is 32 requests' worth of work for the load units, and each thread has one load under way

template <int EACH>
static __global__ void coalesced_writes_kernel(floatX* y, const floatX* x, int N, int C) {
    const int n = blockIdx.y * WARP + threadIdx.x;
    const int first = blockIdx.x * blockDim.y * EACH + threadIdx.y;
    floatX v[EACH];
    if (n >= N) return;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int c = first + j * blockDim.y;
        if (c < C) v[j] = x[(size_t)n * C + c];
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int c = first + j * blockDim.y;
        if (c < C) y[(size_t)c * N + n] = v[j];
    }
}

template <int EACH>
static void coalesced_writes(const Problem* p, int block, cudaStream_t stream) {
    const dim3 threads(WARP, (unsigned)block / WARP);
    coalesced_writes_kernel<EACH>
        <<<tiles(p, EACH * (int)threads.y, WARP), threads, 0, stream>>>(p->y, p->x, p->N, p->C);
    launch_check();
}

// ---- reads_unrolled, writes_unrolled ---------------------------------------------------------
// idea    four numbers to a thread, all loads before the first store. coalesced_reads_kernel<4>: four rows of x.
//         coalesced_writes_kernel<4>: four columns, whose sectors the block then uses up itself
// limit   one side still goes against the grain

// ---- tiled -----------------------------------------------------------------------------------
// idea    a block reads a square of 32 x 32 along the rows of x into shared memory, and writes it along the rows of y
// limit   the column of the square lies in one bank (fp32; bf16: two): 32 (16) turns for each load from shared memory

enum { TILE = 32 };
enum TileLayout { PLAIN, PADDED, SWIZZLED };

template <TileLayout L>
__device__ __forceinline__ int tile_at(int row, int column) {
    return L == PADDED ? row * (TILE + 1) + column : row * TILE + (L == SWIZZLED ? column ^ row : column);
}

// block (32, rows)
template <TileLayout L>
static __global__ void __launch_bounds__(512) tiled_kernel(floatX* y, const floatX* x, int N, int C) {
    __shared__ floatX tile[TILE * (TILE + (L == PADDED))];
    const int n0 = blockIdx.y * TILE, c0 = blockIdx.x * TILE, t = threadIdx.x;
#pragma unroll 4
    for (int row = threadIdx.y; row < TILE; row += blockDim.y)
        if (n0 + row < N && c0 + t < C) tile[tile_at<L>(row, t)] = x[(size_t)(n0 + row) * C + c0 + t];
    __syncthreads();
#pragma unroll 4
    for (int column = threadIdx.y; column < TILE; column += blockDim.y)
        if (c0 + column < C && n0 + t < N) y[(size_t)(c0 + column) * N + n0 + t] = tile[tile_at<L>(t, column)];
}

template <TileLayout L>
static void tiled(const Problem* p, int block, cudaStream_t stream) {
    const dim3 threads(WARP, (unsigned)block / WARP);
    tiled_kernel<L><<<tiles(p, TILE, TILE), threads, 0, stream>>>(p->y, p->x, p->N, p->C);
    launch_check();
}

// ---- padded ----------------------------------------------------------------------------------
// idea    rows of the square 33 numbers long: its column crosses all banks. tiled_kernel<PADDED>
// limit   an odd length is no multiple of anything: wider accesses cannot be aligned in it, and some shared memory is
//         wasted

// ---- swizzled --------------------------------------------------------------------------------
// idea    column c of row r is kept at c xor r: rows stay 32 long, rows and columns both cross all banks.
//         tiled_kernel<SWIZZLED>
// limit   a warp moves 64 bytes of bf16 at a time, one number a lane: half of a line

// ---- registers -------------------------------------------------------------------------------
// idea    16 bytes to a thread on both sides: it transposes a square of PACK x PACK on its own, PACK loads, one from each
//         row, and PACK stores; between them lie byte permutations of its registers. No shared memory, no barrier, 128
//         bytes under way a thread. A warp has 4 squares across x and 8 down: 64 bytes of a row read, 128 of a row written
// limit   half lines: the other half is read by another warp, when it comes to it

template <int ACROSS>
static __global__ void __launch_bounds__(256, 4) registers_kernel(floatX* y, const floatX* x, int N, int C) {
    enum { DOWN = WARP / ACROSS };
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int c = ((blockIdx.x * warps + warp) * ACROSS + lane / DOWN) * PACK,
              n = (blockIdx.y * DOWN + lane % DOWN) * PACK;
    if (c >= C || n >= N) return;
    PackX in[PACK];
#pragma unroll
    for (int j = 0; j < PACK; j++) in[j] = pack_load(x + (size_t)(n + j) * C + c);
#pragma unroll
    for (int k = 0; k < PACK; k++) {
        PackX out;
#pragma unroll
        for (int j = 0; j < PACK; j++) out.x[j] = in[j].x[k];
        store_pack(y + (size_t)(c + k) * N + n, out);
    }
}

static void registers(const Problem* p, int block, cudaStream_t stream) {
    enum { ACROSS = 4 };
    const dim3 grid = tiles(p, block / WARP * ACROSS * PACK, WARP / ACROSS * PACK);
    registers_kernel<ACROSS><<<grid, block, 0, stream>>>(p->y, p->x, p->N, p->C);
    launch_check();
}

static const char* whole_packs(const Problem* p) {
    return p->N % PACK || p->C % PACK ? "N and C are to be multiples of 16 bytes" : NULL;
}

// ---- packs -----------------------------------------------------------------------------------
// idea    shared memory again, in packs: a square whose rows are 8 packs long, 128 bytes, on both sides; 8 lanes read one
//         and 8 lanes write one. In between a thread collects its pack number by number; pack q of row r is kept at q xor
//         (r / PACK), so that the 8 lanes of one column, PACK rows apart, meet 8 different places
// limit   the blocks that run at the same time are neighbours along the rows of x: what they write are short pieces, 2 KB
//         or so, of many rows of y

// numbers along either side of the square; packs of it for each thread
enum { SIDE = 8 * PACK, PACKS_THREADS = 256, PACKS_EACH = SIDE * 8 / PACKS_THREADS, STRIP = 16 };

// which square this block has. STRIPS: they are numbered in strips STRIP squares wide, each from top to bottom
template <bool STRIPS>
__device__ __forceinline__ int2 square_of_block(void) {
    if (!STRIPS) return int2{ (int)blockIdx.x, (int)blockIdx.y };
    const int i = (int)(blockIdx.y * gridDim.x + blockIdx.x), strip = i / (int)(STRIP * gridDim.y);
    const int rest = i - strip * (int)(STRIP * gridDim.y), wide = min((int)STRIP, (int)gridDim.x - strip * STRIP);
    return int2{ strip * STRIP + rest % wide, rest / wide };
}

template <bool STRIPS>
static __global__ void __launch_bounds__(PACKS_THREADS) packs_kernel(floatX* y, const floatX* x, int N, int C) {
    __shared__ __align__(16) floatX tile[SIDE * SIDE];
    const int2 square = square_of_block<STRIPS>();
    const int n0 = square.y * SIDE, c0 = square.x * SIDE;
#pragma unroll
    for (int j = 0; j < PACKS_EACH; j++) {
        const int i = threadIdx.x + j * PACKS_THREADS, row = i / 8, q = i % 8;
        if (n0 + row < N && c0 + q * PACK < C)
            pack_store(tile + row * SIDE + (q ^ row / PACK) * PACK,
                       pack_load(x + (size_t)(n0 + row) * C + c0 + q * PACK));
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < PACKS_EACH; j++) {
        const int i = threadIdx.x + j * PACKS_THREADS, column = i / 8, q = i % 8; // pack q of row c0 + column of y
        if (c0 + column >= C || n0 + q * PACK >= N) continue;
        PackX out;
#pragma unroll
        for (int k = 0; k < PACK; k++)
            out.x[k] = tile[(q * PACK + k) * SIDE + (column / PACK ^ q) * PACK + column % PACK];
        store_pack(y + (size_t)(c0 + column) * N + n0 + q * PACK, out);
    }
}

template <bool STRIPS>
static void packs(const Problem* p, int, cudaStream_t stream) {
    packs_kernel<STRIPS><<<tiles(p, SIDE, SIDE), PACKS_THREADS, 0, stream>>>(p->y, p->x, p->N, p->C);
    launch_check();
}

// ---- strips ----------------------------------------------------------------------------------
// idea    the same squares in another order: strips of 16 across, so that the thousand blocks that run at a time are 16
//         squares wide and 60 high: pieces of 2 KB are read and of 8 KB written. packs_kernel<true>
// limit   memory, which turns round between reading and writing

// ---- copy_engine -----------------------------------------------------------------------------
// idea    Hopper's copy engine brings squares of 64 x 64 and takes them back (TMA, already swizzled), and the instructions
//         made for the tensor cores do the rest: ldmatrix.trans reads four 8 x 8 squares of a warp transposed, stmatrix
//         stores them. No address of x or y is computed by a thread. bf16 only
// limit   memory

#ifndef PRECISION_FP32

enum { BOX = 64, BOX_BYTES = BOX * BOX * 2, ENGINE_THREADS = 128 };

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// one square a block, 16 KB in and out: a dozen blocks share a multiprocessor. Warp w takes the columns 16*w … 16*w + 15
static __global__ void __launch_bounds__(ENGINE_THREADS)
    copy_engine_kernel(const __grid_constant__ CUtensorMap to, const __grid_constant__ CUtensorMap from) {
#ifdef HOPPER_CODE
    __shared__ __align__(1024) char in[BOX_BYTES], out[BOX_BYTES];
    __shared__ uint64_t full;
    const int n0 = blockIdx.y * BOX, c0 = blockIdx.x * BOX, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const uint32_t bar = shared_address(&full);
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        mbarrier_init_done();
        mbarrier_expect(bar, BOX_BYTES);
        tma_load(shared_address(in), &from, bar, c0, n0);
    }
    __syncthreads();
    mbarrier_wait(bar, 0);
    // square s = lane / 8 of four: rows 8*(2*i + s % 2) …, columns 16*warp + 8*(s / 2) …; lane % 8: the row of it
#pragma unroll
    for (int i = 0; i < BOX / 16; i++) {
        uint32_t r[4];
        const int row = 16 * i + lane / 8 % 2 * 8 + lane % 8, column = 16 * warp + lane / 16 * 8;
        ldmatrix_transposed(r, shared_address(in) + hopper_swizzle((uint32_t)(row * 128 + column * 2)));
        const int row_out = 16 * warp + lane / 16 * 8 + lane % 8, column_out = 16 * i + lane / 8 % 2 * 8;
        stmatrix(shared_address(out) + hopper_swizzle((uint32_t)(row_out * 128 + column_out * 2)), r[0], r[1], r[2],
                 r[3]);
    }
    fence_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    tma_store(&to, shared_address(out), n0, c0);
    tma_store_commit();
    tma_store_wait<0>();
#endif
}

static void copy_engine(const Problem* p, int, cudaStream_t stream) {
    const CUtensorMap to = tma_map_rows(p->y, p->C, p->N, p->N, BOX), from = tma_map_rows(p->x, p->N, p->C, p->C, BOX);
    copy_engine_kernel<<<tiles(p, BOX, BOX), ENGINE_THREADS, 0, stream>>>(to, from);
    launch_check();
}

static const char* hopper_packs(const Problem* p) {
    const char* why = whole_packs(p);
    return why ? why : hopper_refuses();
}
#endif

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "coalesced_reads",  coalesced_reads<1>,  { 128, 256, 512 }, "a thread for each number; rows are read, columns written" },
    { "coalesced_writes", coalesced_writes<1>, { 128, 256, 512 }, "columns are read, rows written" },
    { "reads_unrolled",   coalesced_reads<4>,  { 128, 256, 512 }, "coalesced_reads, four numbers to a thread" },
    { "writes_unrolled",  coalesced_writes<4>, { 128, 256, 512 }, "coalesced_writes, four numbers to a thread" },
    { "tiled",            tiled<PLAIN>,        { 128, 256, 512 }, "a square in shared memory: rows on both sides" },
    { "padded",           tiled<PADDED>,       { 128, 256, 512 }, "its rows are one number longer: no bank conflicts" },
    { "swizzled",         tiled<SWIZZLED>,     { 128, 256, 512 }, "column c of row r at c xor r: none either" },
    { "registers",        registers,           { 64, 128, 256 },  "a square of packs to a thread", whole_packs },
    { "packs",            packs<false>,        { 0 },             "16 bytes, whole lines on both sides", whole_packs },
    { "strips",           packs<true>,         { 0 },             "squares in strips of 16: longer pieces of y", whole_packs },
#ifndef PRECISION_FP32
    { "copy_engine",      copy_engine,         { 0 },             "TMA, ldmatrix.trans, stmatrix", hopper_packs },
#endif
};
// clang-format on

BENCH_MAIN("transpose", shapes, setup, reference, rows, traffic, flops, variants)
