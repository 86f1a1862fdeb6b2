/*
Attention forward, causal and grouped-query: how it got fast.

    s[t, j] = scale * q[t] . k[j]       lse[t] = log(sum over j <= t of e^s[t, j])
                                        out[t] = sum over j <= t of e^(s[t, j] - lse[t]) * v[j]

    qkv (B*T, (NH + 2*NKV)*HD)      out (B*T, NH*HD)      lse (B, NH, T)

FLOPs           2 * B*NH*HD * T^2: two products of 2*HD for each of T^2/2 pairs. A kernel that computes the whole square does
                twice that and gets no credit for it
Powers          B*NH * T^2/2, one for 4*HD FLOPs. An H200 (132 multiprocessors) has 16 a cycle on each beside 4096 FLOPs of the
                tensor cores: at HD 64 the powers take as long as the products, at HD 128 half as long
The floor       at some 700 TFLOP/s: HD 128, B 4, T 4096 is 550 GFLOP, 0.79 ms. q, k, v, out are 0.34 GB, 0.08 ms at 4.3 TB/s
Measured        H200, bf16, TFLOP/s, all in one run but online_softmax's 6.3

                                        1B      1B long     8B      8B long     HD 64, B 4 T 4096; B 2 T 8192; HD 128, the same
                unfused                 29      31          56      62
                online_softmax          4.1 (1B short)      6.3
                mma_tiles               123     125         140     142
                causal_tiles            243     252         277     286
                p_in_registers          274     278         295     289
                tiles_ahead             289     289         289     294
                rows_of_32              308     316         346     360
                hopper                  440     481         570     571
                production              442     494         574     642
                cudnn                   427     440         569     586
                hopper / cudnn          1.03    1.09        1.00    0.97
                hopper / rows_of_32     1.43    1.52        1.65    1.59

                production is the kernel of hopper, run first, when the card is cool: what is between the two is the power
                limit. Other runs: hopper 421 to 440 (1B) and 545 to 570 (8B), cudnn 420 to 445 and 540 to 594
ncu             8B: the tensor cores work 44 % of the time under mma_tiles, 49 under p_in_registers, 58 under rows_of_32, 67 under
                hopper, 68 under cudnn; fragments keep shared memory 77, 75, 52, 44 and 45 % busy
                (results/nvidia-h200/attention_forward.md)
Look at         dram__bytes (unfused: the square), sm__inst_executed_pipe_tensor and sm__pipe_tensor_cycles_active (how long the
                tensor cores work), l1tex__data_pipe_lsu_wavefronts_mem_shared (fragments; P on its detour),
                smsp__average_warps_issue_stalled_long_scoreboard and _barrier (copies that are waited for),
                sm__inst_executed_pipe_xu (powers)
*/
#ifdef USE_CUDNN
#define YARDSTICK "cudnn"
#else
#define YARDSTICK "production" // no library here: what the others are measured by
#endif
#include "bench.cuh"

#include "llmc/attention.h"
#ifndef PRECISION_FP32
#include "attention_rows.cuh"
#include "llmc/attention_hopper.cuh"
#endif

// ---- the problem: what is allocated, what is right, what it takes -----------------------------

static const Shape shapes[] = {
    { .name = "1B short", .B = 16, .T = 1024, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "1B", .B = 4, .T = 4096, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "1B long", .B = 2, .T = 8192, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "8B", .B = 4, .T = 4096, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "8B long", .B = 2, .T = 8192, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "one token", .small = true, .B = 1, .T = 1, .NH = 1, .NKV = 1, .HD = 64 },
    { .name = "one key over a tile", .small = true, .B = 2, .T = 129, .NH = 4, .NKV = 2, .HD = 64 },
    { .name = "one short of a tile", .small = true, .B = 3, .T = 63, .NH = 4, .NKV = 4, .HD = 128 },
    { .name = "odd", .small = true, .B = 2, .T = 201, .NH = 6, .NKV = 2, .HD = 128 },
    { .name = "one kv head", .small = true, .B = 3, .T = 577, .NH = 5, .NKV = 1, .HD = 64 },
    { .name = "many tasks", .small = true, .B = 5, .T = 300, .NH = 64, .NKV = 8, .HD = 128 },
};

struct Problem {
    AttentionShape s;
    floatX *qkv, *out;
    float* lse;
    char* scratch;
};

static int64_t row_of(const AttentionShape* s) { return (int64_t)(s->NH + 2 * s->NKV) * s->HD; }

static Problem setup(Bench* bench, const Shape* s) {
    Problem p;
    p.s = AttentionShape{ s->B, s->T, s->NH, s->NKV, s->HD };
    const size_t n = (size_t)s->B * s->T;
    // of deviation 2, so that scores deviate by 4 and each query looks at a few keys, wherever they are: a mean of thousands would
    // be too small to be wrong
    p.qkv = bench->input<floatX>("qkv", n * (size_t)row_of(&p.s), 2);
    p.out = bench->output<floatX>("out", n * s->NH * s->HD, s->T, 1); // powers are rounded to be factors
    p.lse = bench->output<float>("lse", n * s->NH, s->HD + s->T);
    size_t scratch = attention_scratch(ATTENTION_REFERENCE, p.s, false);
#ifdef USE_CUDNN
    Error why;
    if (attention_supports(ATTENTION_CUDNN, p.s, false, &why))
        scratch = std::max(scratch, attention_scratch(ATTENTION_CUDNN, p.s, false));
#endif
    p.scratch = bench->scratch<char>(scratch);
    return p;
}

// a row is a query, of all heads
static int64_t rows(const Problem* p) { return (int64_t)p->s.B * p->s.T; }

static void reference(Bench* bench, const Problem* p, int64_t first, int64_t count) {
    const AttentionShape s = p->s;
    const int ld = (int)row_of(&s);
    const size_t q_size = (size_t)s.NH * s.HD, k = q_size, v = k + (size_t)s.NKV * s.HD;
    if (count == rows(p)) {
        const float* x = bench->host(p->qkv);
        float *out = (float*)allocate((size_t)count * q_size, sizeof *out),
              *lse = (float*)allocate((size_t)count * s.NH, sizeof *lse);
        attention_forward_cpu(out, lse, x, x + k, x + v, s.B, s.T, s.T, 0, s.NH, s.NKV, s.HD, ld, ld);
        bench->expect(p->out, 0, out, (size_t)count * q_size);
        bench->expect(p->lse, 0, lse, (size_t)count * s.NH);
        free(out), free(lse);
        return;
    }
    for (int64_t row = first; row < first + count; row++) { // a query alone, at the end of the keys that it sees
        const int64_t b = row / s.T, t = row % s.T;
        const float* x = bench->host(p->qkv, (size_t)(b * s.T * ld), (size_t)((t + 1) * ld));
        float *out = (float*)allocate(q_size, sizeof *out), *lse = (float*)allocate((size_t)s.NH, sizeof *lse);
        attention_forward_cpu(out, lse, x + t * ld, x + k, x + v, 1, 1, s.T, (int)t, s.NH, s.NKV, s.HD, ld, ld);
        bench->expect(p->out, (size_t)row * q_size, out, q_size);
        for (int h = 0; h < s.NH; h++) bench->expect(p->lse, (size_t)((b * s.NH + h) * s.T + t), lse + h, 1);
        free(out), free(lse);
    }
}

static double traffic(const Problem* p) {
    return (double)rows(p) * ((double)(row_of(&p->s) + p->s.NH * p->s.HD) * sizeof(floatX) + 4.0 * p->s.NH);
}
static double flops(const Problem* p) { return 2.0 * p->s.B * p->s.NH * p->s.HD * p->s.T * p->s.T; }

// ---- unfused ----------------------------------------------------------------------------------
// idea    the formula as it stands: a matrix product of the library, a softmax of each row, another product
// limit   the T x T scores go to memory and back four times, in fp32 and rounded: 6 bytes of storage for each of them, which
//         is what llmc/attention_reference.cuh needs scratch for; and half of the square is never looked at. 29 TFLOP/s
//         at HD 64, 56 at 128: the same time, that of the square

static void unfused(const Problem* p, int, cudaStream_t stream) {
    reference_attention_forward(p->out, p->lse, p->qkv, p->s, p->scratch, stream);
}

// ---- online_softmax ---------------------------------------------------------------------------
// idea    a softmax can be summed up key by key: keep the largest score so far, m, the sum l and the weighted sum o; when m
//         grows, scale both by e^(old - new). No score is ever stored. A warp a query: each lane has HD / 32 columns of q and o
// limit   2 * HD multiplications of the CUDA cores (64 FLOPs a cycle and warp scheduler) and 5 shuffles for each score, one after
//         the other; and every warp reads all keys and values for itself. 4 to 6 TFLOP/s, a seventh
//         to a ninth of unfused, whose tensor cores make up for its traffic: not to store the square is not enough

template <int E>
__device__ __forceinline__ void load_columns(float (&x)[E], const floatX* from) {
#pragma unroll
    for (int i = 0; i < E; i++) x[i] = to_float(from[i]);
}

template <int HD>
static __global__ void online_softmax_kernel(floatX* out, float* lse, const floatX* qkv, int T, int NH, int NKV,
                                             float scale, int64_t queries) {
    constexpr int E = HD / WARP; // neighbouring columns of a lane
    const int64_t i =
        ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP; // (b, t, h), heads of a group side by side
    const int lane = threadIdx.x % WARP;
    if (i >= queries) return;
    const int h = (int)(i % NH), t = (int)(i / NH % T);
    const int64_t b = i / NH / T;
    const size_t ld = (size_t)(NH + 2 * NKV) * HD;
    const floatX* q = qkv + (size_t)(b * T + t) * ld + (size_t)h * HD + lane * E;
    const floatX* k = qkv + (size_t)(b * T) * ld + (size_t)(NH + h / (NH / NKV)) * HD + lane * E;
    const floatX* v = k + (size_t)NKV * HD;
    float query[E], o[E] = {}, m = -INFINITY, l = 0;
    load_columns(query, q);
    for (int j = 0; j <= t; j++, k += ld, v += ld) {
        float key[E], value[E], s = 0;
        load_columns(key, k), load_columns(value, v);
#pragma unroll
        for (int e = 0; e < E; e++) s += query[e] * key[e];
        s = warp_sum(s) * scale;
        const float top = fmaxf(m, s), rescale = expf(m - top), p = expf(s - top);
        m = top, l = l * rescale + p;
#pragma unroll
        for (int e = 0; e < E; e++) o[e] = o[e] * rescale + p * value[e];
    }
#pragma unroll
    for (int e = 0; e < E; e++) out[(size_t)i * HD + lane * E + e] = from_float<floatX>(o[e] / l);
    if (lane == 0) lse[(size_t)(b * NH + h) * T + t] = m + logf(l);
}

static void online_softmax(const Problem* p, int block, cudaStream_t stream) {
    const AttentionShape s = p->s;
    const int64_t queries = (int64_t)s.B * s.T * s.NH;
    const unsigned blocks = (unsigned)ceil_div(queries, block / WARP);
    auto kernel = s.HD == 64 ? online_softmax_kernel<64> : online_softmax_kernel<128>;
    kernel<<<blocks, block, 0, stream>>>(p->out, p->lse, p->qkv, s.T, s.NH, s.NKV, 1 / sqrtf((float)s.HD), queries);
    launch_check();
}

static const char* online_softmax_takes(const Problem* p) {
    return p->s.T > 1024 ? "too slow for longer sequences" : NULL;
}

#ifndef PRECISION_FP32
// ---- the tensor cores of a warp: four variants of one kernel ----------------------------------
// 64 queries of one head to a block, 16 to each of its 4 warps, against tiles of 64 keys. The instructions, the swizzled tiles and
// the softmax of a row are those of llmc/attention_flash.cuh, whose head explains them; here a warp has one fragment of 16 rows.
// What the variants switch on, one after the other: SKIP, tiles above the diagonal are left out; DIRECT, P stays in
// registers; AHEAD, the next tile is copied while this one is worked on

enum { LADDER_ROWS = 64, LADDER_KEYS = 64, LADDER_THREADS = 128 };

template <int HD, bool DIRECT, bool AHEAD>
constexpr size_t ladder_shared = (size_t)(LADDER_ROWS + (AHEAD ? 4 : 2) * LADDER_KEYS) * flash_pitch(HD) +
                                 (DIRECT ? 0 : LADDER_ROWS * LADDER_KEYS * sizeof(floatX));

template <int HD, bool SKIP, bool DIRECT, bool AHEAD>
static __global__ void __launch_bounds__(LADDER_THREADS)
    ladder_kernel(floatX* out, float* lse, const floatX* qkv, int T, int NH, int NKV, float scale) {
    constexpr int N = LADDER_KEYS;
    constexpr uint32_t TILE = N * flash_pitch(HD);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int h = blockIdx.x % NH, b = blockIdx.x / NH, t0 = (int)(gridDim.y - 1 - blockIdx.y) * LADDER_ROWS;
    const int r0 = t0 + 16 * warp; // the warp's first query
    const size_t ld = (size_t)(NH + 2 * NKV) * HD, row = (size_t)b * T;
    const floatX *q = qkv + (row + t0) * ld + (size_t)h * HD, *k = qkv + row * ld + (size_t)(NH + h / (NH / NKV)) * HD,
                 *v = k + (size_t)NKV * HD;
    const uint32_t q_tile = flash_shared(), k_tile = q_tile + LADDER_ROWS * flash_pitch(HD),
                   v_tile = k_tile + (AHEAD ? 2 : 1) * TILE, p_tile = v_tile + (AHEAD ? 2 : 1) * TILE + warp * 16 * 128;
    const uint32_t q_rows = q_tile + warp * 16 * flash_pitch(HD) + flash_by_rows<HD>(lane),
                   by_rows = flash_by_rows<HD>(lane), by_columns = flash_by_columns<HD>(lane);

    float o[HD / 8][4] = {}, max[2] = { -INFINITY, -INFINITY }, sum[2] = {};
    const float c = scale * 1.4426950408889634f;
    const int keys = SKIP ? min(T, t0 + LADDER_ROWS) : T;
    auto load = [&](int j0, uint32_t buffer) {
        flash_tile_load<HD, N>(k_tile + buffer, k + (size_t)j0 * ld, ld, T - j0);
        flash_tile_load<HD, N>(v_tile + buffer, v + (size_t)j0 * ld, ld, T - j0);
    };
    flash_tile_load<HD, LADDER_ROWS>(q_tile, q, ld, T - t0);
    if (AHEAD) load(0, 0);
    for (int j0 = 0; j0 < keys; j0 += N) {
        const uint32_t buffer = AHEAD ? j0 / N % 2 * TILE : 0;
        if (!AHEAD) {
            __syncthreads(); // all warps are done with the tile before
            load(j0, 0);
        }
        flash_copies_wait();
        __syncthreads();
        if (AHEAD && j0 + N < keys) load(j0 + N, TILE - buffer);
        float s[N / 8][4] = {};
        rows_dot<HD, N>(s, q_rows, k_tile + buffer + by_columns);
        if (j0 + N - 1 > r0) {
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (j0 + flash_column(n, e, lane) > r0 + flash_row(0, e, lane)) s[n][e] = -INFINITY;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) flash_softmax<HD, N>(s, o, &max[r], &sum[r], 2 * r, c);
        uint32_t p[N / 16][4];
        if (DIRECT)
            flash_round<N>(p, s);
        else
            rows_detour<N>(p, s, p_tile, lane);
        rows_multiply<HD, N>(o, p, v_tile + buffer + by_rows);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float all = flash_row_sum(sum[r]);
        const int t = r0 + flash_row(0, 2 * r, lane);
        if (t >= T) continue;
        if (lane % 4 == 0) lse[((size_t)b * NH + h) * T + t] = max[r] * scale + logf(all);
        floatX* to = out + ((row + t) * NH + h) * HD;
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
            *(uint32_t*)(to + flash_column(n, 0, lane)) = flash_pack(o[n][2 * r] / all, o[n][2 * r + 1] / all);
    }
}

template <int HD, bool SKIP, bool DIRECT, bool AHEAD>
static void ladder_launch(const Problem* p, cudaStream_t stream) {
    const AttentionShape s = p->s;
    constexpr size_t shared = ladder_shared<HD, DIRECT, AHEAD>;
    flash_allow(ladder_kernel<HD, SKIP, DIRECT, AHEAD>, shared);
    const dim3 grid((unsigned)(s.B * s.NH), (unsigned)ceil_div(s.T, LADDER_ROWS));
    ladder_kernel<HD, SKIP, DIRECT, AHEAD>
        <<<grid, LADDER_THREADS, shared, stream>>>(p->out, p->lse, p->qkv, s.T, s.NH, s.NKV, 1 / sqrtf((float)HD));
    launch_check();
}

template <bool SKIP, bool DIRECT, bool AHEAD>
static void ladder(const Problem* p, int, cudaStream_t stream) {
    if (p->s.HD == 64)
        ladder_launch<64, SKIP, DIRECT, AHEAD>(p, stream);
    else
        ladder_launch<128, SKIP, DIRECT, AHEAD>(p, stream);
}

// ---- mma_tiles --------------------------------------------------------------------------------
// idea    64 queries share each tile of keys and values in shared memory, and both products are instructions of a warp on
//         the tensor cores, 4096 FLOPs each. Scores never leave the multiprocessor: 127 TFLOP/s, 4 times unfused
// limit   every block walks all keys: half of the tiles lie above the diagonal and are computed to be masked

static void mma_tiles(const Problem* p, int block, cudaStream_t stream) {
    ladder<false, false, false>(p, block, stream);
}

// ---- causal_tiles -----------------------------------------------------------------------------
// idea    a block stops at its diagonal, and those with most tiles come first, so that the last to start are short
// limit   P, the result of one product, is written to shared memory and fetched again in the shape that a factor must have

static void causal_tiles(const Problem* p, int block, cudaStream_t stream) {
    ladder<true, false, false>(p, block, stream);
}

// ---- p_in_registers ---------------------------------------------------------------------------
// idea    two results of mma side by side are a factor already: rounded to bf16 in place, P is multiplied where it is
// limit   the four warps wait for each tile: between the barrier before the copy and the one behind it nothing is computed,
//         and only other blocks of the multiprocessor fill the time

static void p_in_registers(const Problem* p, int block, cudaStream_t stream) {
    ladder<true, true, false>(p, block, stream);
}

// ---- tiles_ahead ------------------------------------------------------------------------------
// idea    two buffers: cp.async fetches the next tile while this one is multiplied, one barrier a tile
// limit   each fragment of K and V that a warp fetches from shared memory serves 16 queries: 4 fetches of 16 x 16 for 8 mma.
//         Shared memory gives 128 bytes a cycle, fewer than the tensor cores eat

static void tiles_ahead(const Problem* p, int block, cudaStream_t stream) {
    ladder<true, true, true>(p, block, stream);
}

// ---- rows_of_32 -------------------------------------------------------------------------------
// idea    32 queries to a warp, 128 to a block: each fragment of K and V serves two fragments of queries. What ships where hopper
//         does not run: llmc/attention_flash.cuh
// limit   registers: S, P and O of 32 rows fill them, so there is one warp to a scheduler at HD 128, two or three at HD 64.
//         And mma.sync: 308 to 360 TFLOP/s

static void rows_of_32(const Problem* p, int, cudaStream_t stream) {
    attention_forward(ATTENTION_MMA, p->out, p->lse, p->qkv, p->s, p->scratch, stream);
}

// ---- hopper -----------------------------------------------------------------------------------
// idea    what bounds rows_of_32 is the warp itself: it issues fragment loads, products and softmax in turn, and mma.sync
//         reaches half of the tensor cores' rate here. wgmma reads both factors from shared memory that TMA fills, runs
//         beside the program, and two or three warpgroups take turns: one multiplies while the others take powers. 1.4 to 1.6
//         times rows_of_32, 0.97 to 1.09 times cudnn
// limit   the powers: 16 a cycle. At HD 64 they need as long as the products, and there it stays at 0.8 of its rate at HD 128

static void hopper(const Problem* p, int, cudaStream_t stream) {
    hopper_attention_forward(p->out, p->lse, p->qkv, p->s, p->scratch, stream);
}

static const char* hopper_takes(const Problem* p) {
    static Error why;
    return hopper_attention_supports(p->s, &why) ? NULL : why.text;
}
#endif

// ---- production -------------------------------------------------------------------------------
// what of our own ships on this card and for this shape: hopper, rows_of_32 or, in fp32, unfused

static void production(const Problem* p, int, cudaStream_t stream) {
    Error passed_over;
    const AttentionBackend ours = attention_choose(ATTENTION_HOPPER, p->s, false, &passed_over);
    attention_forward(ours, p->out, p->lse, p->qkv, p->s, p->scratch, stream);
}

#ifdef USE_CUDNN
static void cudnn(const Problem* p, int, cudaStream_t stream) {
    attention_forward(ATTENTION_CUDNN, p->out, p->lse, p->qkv, p->s, p->scratch, stream);
}

static const char* cudnn_takes(const Problem* p) {
    static Error why;
    return attention_supports(ATTENTION_CUDNN, p->s, false, &why) ? NULL : why.text;
}
#endif

// ---- the table: to add a variant, write it above and add one row ------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
//    name              launch           block sizes    what changed
    { "unfused",        unfused,         { 0 },         "baseline: cuBLAS, a softmax, cuBLAS (llmc/attention_reference.cuh)" },
    { "online_softmax", online_softmax,  { 128 },       "a warp a query, key by key; no score is stored", online_softmax_takes },
#ifndef PRECISION_FP32
    { "mma_tiles",      mma_tiles,       { 0 },         "tiles of 64 queries and 64 keys, tensor cores" },
    { "causal_tiles",   causal_tiles,    { 0 },         "tiles above the diagonal are left out, the longest first" },
    { "p_in_registers", p_in_registers,  { 0 },         "results of one product are factors of the next in place" },
    { "tiles_ahead",    tiles_ahead,     { 0 },         "cp.async: the next tile comes while this one is multiplied" },
    { "rows_of_32",     rows_of_32,      { 0 },         "llmc/attention_flash.cuh: 32 queries a warp" },
    { "hopper",         hopper,          { 0 },         "llmc/attention_hopper.cuh: wgmma, TMA, warpgroups in turn", hopper_takes },
#endif
    { "production",     production,      { 0 },         "our own that ships here" },
#ifdef USE_CUDNN
    { "cudnn",          cudnn,           { 0 },         "the library", cudnn_takes },
#endif
};
// clang-format on
BENCH_MAIN("attention_forward", shapes, setup, reference, rows, traffic, flops, variants)
