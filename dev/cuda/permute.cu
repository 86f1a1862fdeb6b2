/*
Permute: heads between tokens, or tokens between heads.

    split       qkv (B, T, NH + 2*NKV, HD)      ->      q (B, NH, T, HD)    k v (B, NKV, T, HD)
    merge       att (B, NH, T, HD)              ->      out (B, T, NH, HD)

What an attention that wants each head's rows one below the other costs in every layer: its queries, keys and values, packed
side by side as the projection leaves them, are split, and what it returns is merged. Each launch here does both.

What must move  each number is read and written once: 2*B*T * (2*NH + 2*NKV) * HD numbers. 8B, 16384 tokens: 671 MB in bf16,
                156 us at the 4.30 TB/s of a copy on the H200; 32 layers forward and backward: 10 ms of each step
Bound by        memory; a head's row of one token is 128 or 256 bytes (HD 64 or 128 in bf16), whole lines, so that nothing
                is read or written in vain in any order
Reached         H200, bf16, in % of a copy: divisions 19, warp_per_row 37 to 40, all rows with 16-byte accesses 88 to 94: once
                they are wide it makes no difference which side is in runs, nor who computes the addresses
Metrics         smsp__inst_executed (index arithmetic), l1tex__average_t_sectors_per_request, dram__throughput
In llmc         nothing is permuted, which is faster than any row of the table. Attention reads heads where they lie: from
                one row of a head to the next it is (NH + 2*NKV) * HD numbers, one number for an index (or one stride of a
                TMA map), and a tile of 64 rows of 128 bytes arrives as fast from there. dq, dk, dv and the output are
                written the same way, RoPE turns q and k in place, and the product that follows reads out as the matrix it
                is
*/
#define YARDSTICK "head_run_per_block" // nothing ships: the row that the others are measured by
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "streams.cuh"

// clang-format off
static const Shape shapes[] = {
    { .name = "1B", .B = 8, .T = 2048, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "8B", .B = 2, .T = 8192, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "one row", .small = true, .B = 1, .T = 1, .NH = 1, .NKV = 1, .HD = 8 },
    { .name = "odd", .small = true, .B = 3, .T = 37, .NH = 6, .NKV = 2, .HD = 48 },
    { .name = "more than a tile", .small = true, .B = 2, .T = 133, .NH = 3, .NKV = 3, .HD = 128 },
};
// clang-format on

struct Problem {
    int B, T, NH, NKV, HD;
    floatX* heads; // q, k, v one after the other: (B, NH, T, HD), (B, NKV, T, HD) twice
    const floatX* qkv;
    floatX* out;
    const floatX* att;
};

// one of the two: heads of a packed row, of which the last 2*NKV are keys and values (merge: none)
struct Heads {
    int B, T, NH, NKV, HD;
    __host__ __device__ int all(void) const { return NH + 2 * NKV; }
    // heads of T rows that lie before head h of sequence b where heads are apart
    __host__ __device__ size_t before(int b, int h) const {
        if (h < NH) return (size_t)b * NH + h;
        const int part = h - NH >= NKV; // 0: k, 1: v
        return (size_t)B * (NH + part * NKV) + (size_t)b * NKV + (h - NH - part * NKV);
    }
    // where its row t begins
    __host__ __device__ size_t apart(int b, int t, int h) const { return (before(b, h) * T + t) * HD; }
    // and where they are packed
    __host__ __device__ size_t packed(int b, int t, int h) const { return (((size_t)b * T + t) * all() + h) * HD; }
};

static Heads split_of(const Problem* p) { return Heads{ p->B, p->T, p->NH, p->NKV, p->HD }; }
static Heads merge_of(const Problem* p) { return Heads{ p->B, p->T, p->NH, 0, p->HD }; }

static Problem setup(Bench* b, const Shape* s) {
    Problem p = { s->B, s->T, s->NH, s->NKV, s->HD, NULL, NULL, NULL, NULL };
    const size_t rows = (size_t)s->B * s->T * s->HD, qkv = rows * (s->NH + 2 * s->NKV), out = rows * s->NH;
    p.qkv = b->input<floatX>("qkv", qkv);
    p.att = b->input<floatX>("att", out);
    p.heads = b->output<floatX>("heads", qkv);
    p.out = b->output<floatX>("out", out);
    return p;
}

// tokens
static int64_t rows(const Problem* p) { return (int64_t)p->B * p->T; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const Heads split = split_of(p), merge = merge_of(p);
    const float *qkv = b->host(p->qkv), *att = b->host(p->att);
    for (int64_t row = first; row < first + count; row++) {
        const int seq = (int)(row / p->T), t = (int)(row % p->T);
        for (int h = 0; h < split.all(); h++)
            b->expect(p->heads, split.apart(seq, t, h), qkv + split.packed(seq, t, h), (size_t)p->HD);
        for (int h = 0; h < merge.all(); h++)
            b->expect(p->out, merge.packed(seq, t, h), att + merge.apart(seq, t, h), (size_t)p->HD);
    }
}

static double traffic(const Problem* p) {
    return 2.0 * p->B * p->T * (2.0 * p->NH + 2.0 * p->NKV) * p->HD * (double)sizeof(floatX);
}
static double flops(const Problem*) { return 0; }

// Kernels copy from the packed order to that apart, or with MERGE the other way

// ---- divisions -------------------------------------------------------------------------------
// idea    a thread for each number: its index, taken apart by / and %, says b, t, head and place
// limit   four divisions of 64 bits, some hundred instructions each, to move 2 bytes

template <bool MERGE>
static __global__ void divisions_kernel(floatX* to, const floatX* from, Heads s, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const size_t d = i % s.HD, h = i / s.HD % s.all(), row = i / s.HD / s.all();
    const size_t apart = s.apart((int)(row / s.T), (int)(row % s.T), (int)h) + d;
    if (MERGE)
        to[i] = from[apart];
    else
        to[apart] = from[i];
}

template <bool MERGE>
static void divisions_one(floatX* to, const floatX* from, Heads s, int block, cudaStream_t stream) {
    const size_t n = (size_t)s.B * s.T * s.all() * s.HD;
    divisions_kernel<MERGE><<<(unsigned)ceil_div((int64_t)n, block), block, 0, stream>>>(to, from, s, n);
    launch_check();
}

static void divisions(const Problem* p, int block, cudaStream_t stream) {
    divisions_one<false>(p->heads, p->qkv, split_of(p), block, stream);
    divisions_one<true>(p->out, p->att, merge_of(p), block, stream);
}

// ---- warp_per_row ----------------------------------------------------------------------------
// idea    the grid is (tokens, heads, sequences): a warp has one row of a head, and nobody divides
// limit   2 bytes a lane; a row is over after two or four of them

template <bool MERGE>
static __global__ void warp_per_row_kernel(floatX* to, const floatX* from, Heads s) {
    const int t = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, h = blockIdx.y, b = blockIdx.z;
    if (t >= s.T) return;
    const size_t apart = s.apart(b, t, h), packed = s.packed(b, t, h);
    for (int d = threadIdx.x % WARP; d < s.HD; d += WARP) {
        if (MERGE)
            to[packed + d] = from[apart + d];
        else
            to[apart + d] = from[packed + d];
    }
}

template <bool MERGE>
static void warp_per_row_one(floatX* to, const floatX* from, Heads s, int block, cudaStream_t stream) {
    const dim3 grid((unsigned)ceil_div(s.T, block / WARP), (unsigned)s.all(), (unsigned)s.B);
    warp_per_row_kernel<MERGE><<<grid, block, 0, stream>>>(to, from, s);
    launch_check();
}

static void warp_per_row(const Problem* p, int block, cudaStream_t stream) {
    warp_per_row_one<false>(p->heads, p->qkv, split_of(p), block, stream);
    warp_per_row_one<true>(p->out, p->att, merge_of(p), block, stream);
}

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes a thread, numbered over the whole of the packed array: an eighth of the threads, and divisions of 32
//         bits do
// limit   one load under way a thread, after four divisions that it must wait for

template <bool MERGE>
static __global__ void packs_kernel(floatX* to, const floatX* from, Heads s, unsigned n) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, P = (unsigned)(s.HD / PACK), H = (unsigned)s.all();
    if (i >= n) return;
    const unsigned head = i / P, row = head / H, b = row / (unsigned)s.T;
    const size_t apart = s.apart((int)b, (int)(row - b * s.T), (int)(head - row * H)) + (i - head * P) * PACK;
    const size_t packed = (size_t)i * PACK;
    if (MERGE)
        pack_store(to + packed, pack_load(from + apart));
    else
        pack_store(to + apart, pack_load(from + packed));
}

template <bool MERGE>
static void packs_one(floatX* to, const floatX* from, Heads s, int block, cudaStream_t stream) {
    const int64_t n = (int64_t)s.B * s.T * s.all() * (s.HD / PACK);
    launch_require(n <= UINT32_MAX - 1024, "packs", "all packs can be numbered in 32 bits");
    packs_kernel<MERGE><<<(unsigned)ceil_div(n, block), block, 0, stream>>>(to, from, s, (unsigned)n);
    launch_check();
}

static void packs(const Problem* p, int block, cudaStream_t stream) {
    packs_one<false>(p->heads, p->qkv, split_of(p), block, stream);
    packs_one<true>(p->out, p->att, merge_of(p), block, stream);
}

static const char* whole_packs(const Problem* p) { return p->HD % PACK ? "HD is to be a multiple of 16 bytes" : NULL; }

// ---- token_per_block -------------------------------------------------------------------------
// idea    a block has one token: the packed row is one run of 6 or 12 KB, several packs of which each thread has under way.
//         One division a pack is left, which head it belongs to
// limit   the other side is rows of 128 bytes, T * HD numbers apart

enum { IN_FLIGHT = 4 };

template <bool MERGE>
static __global__ void token_per_block_kernel(floatX* to, const floatX* from, Heads s) {
    const int t = blockIdx.x, b = blockIdx.y, P = s.HD / PACK, packs = s.all() * P;
    const size_t row = s.packed(b, t, 0);
    for (int first = threadIdx.x; first < packs; first += IN_FLIGHT * blockDim.x) {
        int4 v[IN_FLIGHT] = {};
        size_t apart[IN_FLIGHT];
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) {
            const int p = first + j * blockDim.x, h = p / P;
            apart[j] = s.apart(b, t, h) + (p - h * P) * PACK;
            if (p < packs) v[j] = hint_load<KEEP>((const int4*)(from + (MERGE ? apart[j] : row + p * PACK)));
        }
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) {
            const int p = first + j * blockDim.x;
            if (p < packs) hint_store<KEEP>((int4*)(to + (MERGE ? row + p * PACK : apart[j])), v[j]);
        }
    }
}

static void token_per_block(const Problem* p, int block, cudaStream_t stream) {
    const dim3 grid((unsigned)p->T, (unsigned)p->B);
    token_per_block_kernel<false><<<grid, block, 0, stream>>>(p->heads, p->qkv, split_of(p));
    launch_check();
    token_per_block_kernel<true><<<grid, block, 0, stream>>>(p->out, p->att, merge_of(p));
    launch_check();
}

// ---- head_run_per_block ----------------------------------------------------------------------
// idea    the other side in runs: a block has one head and so many tokens that each of its threads moves four packs, which
//         are one run of memory where heads are apart. A thread's packs are rows apart, whole rows of the block each: its
//         place in the row is the same for all, and computed once
// limit   memory; the packed side is in rows of 128 bytes now, but the blocks beside this one, of the next heads, want the
//         rows beside them at about the same time

template <bool MERGE>
static __global__ void head_run_kernel(floatX* to, const floatX* from, Heads s) {
    const int P = s.HD / PACK, at_once = blockDim.x / P; // rows that the block moves at once
    const int row = threadIdx.x / P, h = blockIdx.x, b = blockIdx.z, first = blockIdx.y * at_once * IN_FLIGHT + row;
    if (row >= at_once) return;
    const int d = (threadIdx.x - row * P) * PACK;
    const size_t apart = s.apart(b, first, h) + d, packed = s.packed(b, first, h) + d;
    const size_t apart_step = (size_t)at_once * s.HD, packed_step = apart_step * s.all();
    int4 v[IN_FLIGHT] = {};
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++)
        if (first + j * at_once < s.T)
            v[j] = hint_load<KEEP>((const int4*)(from + (MERGE ? apart + j * apart_step : packed + j * packed_step)));
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++)
        if (first + j * at_once < s.T)
            hint_store<KEEP>((int4*)(to + (MERGE ? packed + j * packed_step : apart + j * apart_step)), v[j]);
}

template <bool MERGE>
static void head_run_one(floatX* to, const floatX* from, Heads s, int block, cudaStream_t stream) {
    const int at_once = block / (s.HD / PACK);
    const dim3 grid((unsigned)s.all(), (unsigned)ceil_div(s.T, at_once * IN_FLIGHT), (unsigned)s.B);
    head_run_kernel<MERGE><<<grid, block, 0, stream>>>(to, from, s);
    launch_check();
}

static void head_run_per_block(const Problem* p, int block, cudaStream_t stream) {
    head_run_one<false>(p->heads, p->qkv, split_of(p), block, stream);
    head_run_one<true>(p->out, p->att, merge_of(p), block, stream);
}

// ---- copy_engine -----------------------------------------------------------------------------
// idea    Hopper's copy engine permutes by itself: a box of 64 tokens of one head is one command from the packed array, by
//         the strides of its map, and one to the other. One warp a block, of which one thread works. Tokens beyond the last
//         are read as zeros and not written: both maps know where T ends
// limit   memory

enum { TOKENS = 64 };

template <bool MERGE>
static __global__ void __launch_bounds__(WARP)
    copy_engine_kernel(const __grid_constant__ CUtensorMap to, const __grid_constant__ CUtensorMap from, Heads s) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char box[]; // [TOKENS][HD]
    __shared__ uint64_t full;
    if (threadIdx.x != 0) return;
    const int h = blockIdx.x, t = blockIdx.y * TOKENS, b = blockIdx.z;
    const int head = (int)s.before(b, h);
    const uint32_t bar = shared_address(&full), at = shared_address(box);
    mbarrier_init(bar, 1);
    mbarrier_init_done();
    mbarrier_expect(bar, (uint32_t)(TOKENS * s.HD * sizeof(floatX)));
    if (MERGE)
        tma_load(at, &from, bar, 0, t, head);
    else
        tma_load(at, &from, bar, h * s.HD, t, b);
    mbarrier_wait(bar, 0);
    if (MERGE)
        tma_store(&to, at, h * s.HD, t, b);
    else
        tma_store(&to, at, 0, t, head);
    tma_store_commit();
    tma_store_wait<0>();
#endif
}

template <bool MERGE>
static void copy_engine_one(floatX* to, const floatX* from, Heads s, cudaStream_t stream) {
    const int64_t row = (int64_t)s.all() * s.HD;
    const int64_t packed[3] = { row, s.T, s.B }, packed_strides[2] = { row, row * s.T };
    const int64_t apart[3] = { s.HD, s.T, (int64_t)s.all() * s.B }, apart_strides[2] = { s.HD, (int64_t)s.HD * s.T };
    const int box[3] = { s.HD, TOKENS, 1 };
    const CUtensorMap packed_map = tma_map(MERGE ? to : from, 3, packed, packed_strides, box, 0);
    const CUtensorMap apart_map = tma_map(MERGE ? from : to, 3, apart, apart_strides, box, 0);
    const dim3 grid((unsigned)s.all(), (unsigned)ceil_div(s.T, TOKENS), (unsigned)s.B);
    const size_t shared = (size_t)TOKENS * s.HD * sizeof(floatX);
    cuda_check(
        cudaFuncSetAttribute(copy_engine_kernel<MERGE>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    copy_engine_kernel<MERGE>
        <<<grid, WARP, shared, stream>>>(MERGE ? packed_map : apart_map, MERGE ? apart_map : packed_map, s);
    launch_check();
}

static void copy_engine(const Problem* p, int, cudaStream_t stream) {
    copy_engine_one<false>(p->heads, p->qkv, split_of(p), stream);
    copy_engine_one<true>(p->out, p->att, merge_of(p), stream);
}

static const char* hopper_packs(const Problem* p) {
    if (p->HD > 256) return "a box has at most 256 numbers in each direction";
    const char* why = whole_packs(p);
    return why ? why : hopper_refuses();
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "divisions",          divisions,          { 128, 256, 512 }, "a thread for each number, 64-bit / and %" },
    { "warp_per_row",       warp_per_row,       { 128, 256, 512 }, "a warp for each row of a head: no division" },
    { "packs",              packs,              { 128, 256, 512 }, "16 bytes a thread, 32-bit divisions", whole_packs },
    { "token_per_block",    token_per_block,    { 128, 256 },      "packed rows are runs, four packs under way", whole_packs },
    { "head_run_per_block", head_run_per_block, { 128, 256, 512 }, "a head's rows are runs, four packs a thread", whole_packs },
    { "copy_engine",        copy_engine,        { 0 },             "TMA: 64 rows of a head a command", hopper_packs },
};
// clang-format on

BENCH_MAIN("permute", shapes, setup, reference, rows, traffic, flops, variants)
