/*
RoPE forward: each pair of a head's numbers, half a head apart, is turned by the angle of its position.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)          x1 = x[i], x2 = x[i + HD/2], cos and sin (T, HD/2) in fp32

Problem         x (B*T, ldx): rows of NH query, NKV key and NKV value heads, as the projection leaves them. The queries and
                keys are turned in place, the values stay. In the shapes named "apart", as frameworks want it, x is read and
                the heads are written one after the other: q (B, NH, T, HD), k and v (B, NKV, T, HD), v as it was
What must move  2*B*T*(NH + NKV)*HD numbers, and the tables once, T*HD floats. B*T 16384, bf16, 32 + 8 heads: HD 64 168 MB,
                39 us at the 4.30 TB/s of a copy on the H200; HD 128 337 MB, 78 us. Apart: all 48 heads, 20 % more
Arithmetic      4 for two numbers. What there is besides is the tables: 8 bytes of cosine and sine for 4 bytes of x in bf16,
                twice what is turned, unless they serve many heads
Last percents   these launches are short: the 3 us in which a kernel starts and ends are 4 to 8 %, of the copy too. What this
                kernel has beyond a copy: the angles, which must be there before anything can be stored, and which x, passing
                between two sequences, drives out of the cache; rows with a gap where the values lie; at HD 64 in bf16 half a
                head is 64 bytes, half a line, and two requests meet in each line
Reached         H200, bf16, % of a copy

                                        1B          8B          8B, long    back, 1B    back, 8B    back, long
                    pair_per_thread     43.3        43.3        43.3        43.2        43.6        43.1
                    one_launch          44.7        44.1        44.3        44.7        44.4        44.0
                    packs               95.9        96.6        95.7        96.2        97.1        95.1
                    table_in_shared     94.5        96.2        95.0        93.4        96.7        94.8
                    row_block           97.4        97.3        96.5        96.7        98.1        96.0
                    together            93.3        94.9        96.8        94.0        95.5        96.5
                    tables_stay         95.6        97.7        98.3        96.1        98.2        98.2
                    heads_share_angles  93.8        95.1        94.7        94.1        95.9        94.3
                    whole_lines         95.0        96.5        95.6        95.4        97.3        95.1
                    two_lines           96.2        96.8        94.3        97.9        97.4        94.0
                    lines_ahead         93.4        94.4        93.6        93.4        95.0        93.4
                    resident            94.0        94.5        94.5        93.9        95.3        94.1
                    copy_engine         95.6        91.9        91.9        94.3        93.1        91.9
                    production          97.7        98.1        98.8        98.0        98.9        98.4

                Wide loads are all of it, the rest is within 7 %: production is tables_stay with x asked for before the tables,
                which is the last 1 %; sequences that share angles, lines ahead and the copy engine lose. Apart:
                fused_with_split 94.4, back 93.5; production 50.1, back 51.7
Metrics         dram__throughput, dram__bytes_read (beyond half of what must move: tables read again),
                l1tex__t_sectors_pipe_lsu_mem_global_op_ld, launch__waves_per_multiprocessor,
                smsp__warps_issue_stalled_long_scoreboard
*/
#include "bench.cuh"
#include "llmc/hopper.cuh"
#include "llmc/rope.h"
#include "streams.cuh"

#ifndef ROPE_DIRECTION // rope_backward.cu is this file with -1
#define ROPE_DIRECTION 1
#endif

// ---- the problem -----------------------------------------------------------------------------

// clang-format off
static const Shape shapes[] = {
    { .name = "1B", .B = 8, .T = 2048, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "8B", .B = 8, .T = 2048, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "8B, long", .B = 2, .T = 8192, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "8B, apart", .B = 8, .T = 2048, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "one head", .small = true, .B = 1, .T = 1, .NH = 1, .NKV = 1, .HD = 8 },
    { .name = "smallest heads", .small = true, .B = 2, .T = 7, .NH = 2, .NKV = 1, .HD = 8 }, // half a head is 8 bytes
    { .name = "24", .small = true, .B = 3, .T = 5, .NH = 3, .NKV = 1, .HD = 24 },
    { .name = "15M", .small = true, .B = 2, .T = 9, .NH = 6, .NKV = 2, .HD = 48 },           // three packs
    { .name = "tiny", .small = true, .B = 2, .T = 33, .NH = 4, .NKV = 2, .HD = 32 },
    { .name = "small 1B", .small = true, .B = 5, .T = 17, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "small 8B", .small = true, .B = 2, .T = 35, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "70B", .small = true, .B = 1, .T = 19, .NH = 64, .NKV = 8, .HD = 128 },
    { .name = "wide heads", .small = true, .B = 2, .T = 3, .NH = 3, .NKV = 1, .HD = 520 },   // more than 32 lanes
    { .name = "small, apart", .small = true, .B = 2, .T = 7, .NH = 6, .NKV = 2, .HD = 48 },
    { .name = "smallest heads, apart", .small = true, .B = 3, .T = 5, .NH = 2, .NKV = 1, .HD = 8 },
};
// clang-format on

struct Problem {
    int B, T, NH, NKV, HD;
    int heads, ldx;         // NH + NKV are turned; a row has NKV more
    floatX* x;              // (B*T, ldx), in place. Apart: forward an input, backward overwritten
    const float *cos, *sin; // (T, HD/2)
    bool apart;
    floatX *q, *k, *v; // apart: forward overwritten, backward inputs
};

static Problem setup(Bench* b, const Shape* s) {
    Problem p = { s->B, s->T, s->NH, s->NKV, s->HD, s->NH + s->NKV, (s->NH + 2 * s->NKV) * s->HD,
                  NULL, NULL, NULL,  false,  NULL,  NULL,           NULL };
    const size_t table = (size_t)p.T * p.HD / 2, rows = (size_t)p.B * p.T, n = rows * p.ldx;
    std::vector<float> c(table), si(table);
    rope_table_cpu(c.data(), si.data(), p.T, p.HD, 500000, 32, 1, 4, 8192);
    p.cos = b->input_from("cos", c.data(), table);
    p.sin = b->input_from("sin", si.data(), table);
    p.apart = strstr(s->name, "apart") != NULL;
    const size_t nq = rows * p.NH * p.HD, nkv = rows * p.NKV * p.HD;
    if (!p.apart) {
        p.x = b->in_place<floatX>("x", n);
    } else if (ROPE_DIRECTION > 0) {
        p.x = b->input<floatX>("x", n);
        p.q = b->output<floatX>("q", nq), p.k = b->output<floatX>("k", nkv), p.v = b->output<floatX>("v", nkv);
    } else {
        p.x = b->output<floatX>("dx", n);
        p.q = b->input<floatX>("dq", nq), p.k = b->input<floatX>("dk", nkv), p.v = b->input<floatX>("dv", nkv);
    }
    return p;
}

static int64_t rows(const Problem* p) { return (int64_t)p->B * p->T; }

static void turn_cpu(float* x, const float* cos_table, const float* sin_table, int pos, int heads, int HD, int ldx) {
    if (ROPE_DIRECTION > 0)
        rope_forward_cpu(x, cos_table, sin_table, 1, 1, pos, heads, HD, ldx);
    else
        rope_backward_cpu(x, cos_table, sin_table, 1, 1, pos, heads, HD, ldx);
}

// where head h of row (b, t) lies when heads are apart: of which array, and from which number on
struct Place {
    floatX* array;
    size_t first;
};
static __host__ __device__ __forceinline__ Place place_of(const Problem& p, int b, int t, int h) {
    const int of = h < p.NH ? p.NH : p.NKV, g = h < p.NH ? h : (h - p.NH) % p.NKV;
    return Place{ h < p.NH ? p.q : h < p.heads ? p.k : p.v, (((size_t)b * of + g) * p.T + t) * p.HD };
}

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const size_t ldx = (size_t)p->ldx, HD = (size_t)p->HD;
    const float *c = b->host(p->cos), *s = b->host(p->sin);
    std::vector<float> row(ldx);
    const bool merge = p->apart && ROPE_DIRECTION < 0;
    for (int64_t r = first; r < first + count; r++) {
        const int bi = (int)(r / p->T), t = (int)(r % p->T);
        if (!merge) memcpy(row.data(), b->host(p->x, r * ldx, ldx), ldx * sizeof(float));
        for (int h = 0; merge && h < p->heads + p->NKV; h++) {
            const Place from = place_of(*p, bi, t, h);
            memcpy(row.data() + h * HD, b->host(from.array, from.first, HD), HD * sizeof(float));
        }
        turn_cpu(row.data(), c, s, t, p->heads, p->HD, p->ldx);
        if (!p->apart || merge)
            b->expect(p->x, r * ldx, row.data(), ldx);
        else
            for (int h = 0; h < p->heads + p->NKV; h++) {
                const Place to = place_of(*p, bi, t, h);
                b->expect(to.array, to.first, row.data() + h * HD, HD);
            }
    }
}

static double traffic(const Problem* p) {
    const double heads = p->heads + (p->apart ? p->NKV : 0);
    return 2.0 * p->B * p->T * heads * p->HD * sizeof(floatX) + 1.0 * p->T * p->HD * sizeof(float);
}
static double flops(const Problem*) { return 0; }

static const char* in_place_only(const Problem* p) { return p->apart ? "turns in place" : NULL; }
static const char* apart_only(const Problem* p) { return p->apart ? NULL : "writes heads apart"; }
// ---- one pair, or 16 bytes of each half ------------------------------------------------------

// in the backward pass the sine has the other sign, and that is all
static __device__ __forceinline__ float direct(float sine) { return ROPE_DIRECTION > 0 ? sine : -sine; }

// of neighbouring pairs, as many as Bits holds numbers
template <typename Bits>
struct Angles {
    enum { N = Widened<Bits>::N };
    float c[N], s[N];
};

// from the place of the first pair in either table; STAY: which the second level is to keep
template <typename Bits, bool STAY = false>
__device__ __forceinline__ Angles<Bits> angles_at(const float* cos_table, const float* sin_table) {
    Angles<Bits> a;
#pragma unroll
    for (int j = 0; j < Angles<Bits>::N; j += 4) {
        const Pack<float> c = STAY ? pack_load_staying(cos_table + j) : pack_load(cos_table + j);
        const Pack<float> s = STAY ? pack_load_staying(sin_table + j) : pack_load(sin_table + j);
#pragma unroll
        for (int k = 0; k < 4; k++) a.c[j + k] = c.x[k], a.s[j + k] = direct(s.x[k]);
    }
    return a;
}

template <typename Bits>
__device__ __forceinline__ void turn(Bits& low, Bits& high, const Angles<Bits>& a) {
    Widened<Bits> x1 = widen(low), x2 = widen(high);
#pragma unroll
    for (int k = 0; k < Widened<Bits>::N; k++) {
        const float u = x1.x[k], v = x2.x[k];
        x1.x[k] = u * a.c[k] - v * a.s[k];
        x2.x[k] = v * a.c[k] + u * a.s[k];
    }
    low = narrow(x1), high = narrow(x2);
}

// calls f with int4, or int2 where half a head is no multiple of 16 bytes, and how many of these half a head has
template <typename F>
static void with_bits(const Problem* p, F f) {
    if constexpr (sizeof(floatX) == 2)
        if (p->HD / 2 % PACK) return f(int2(), p->HD / 2 / 4);
    f(int4(), p->HD / 2 / PACK);
}

static int pieces_of_half(const Problem* p) {
    int n = 0;
    with_bits(p, [&](auto, int pieces) { n = pieces; });
    return n;
}

static const char* a_warp_holds_half(const Problem* p) {
    return pieces_of_half(p) > WARP ? "half a head is more than 32 lanes" : in_place_only(p);
}
static const char* a_warp_holds_head(const Problem* p) {
    return 2 * pieces_of_half(p) > WARP ? "a head is more than 32 lanes" : in_place_only(p);
}

// ---- pair_per_thread -------------------------------------------------------------------------
// idea    one thread for one pair, the queries in one launch and the keys in another
// limit   the second launch waits for the last block of the first, and has a fifth of the work; loads of 2 bytes; quotients by
//         three sizes for each pair

static __global__ void pairs_kernel(floatX* x, const float* cos_table, const float* sin_table, unsigned pairs,
                                    unsigned T, unsigned heads, unsigned half, unsigned ldx) {
    const unsigned n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= pairs) return;
    const unsigned i = n % half, h = n / half % heads, row = n / half / heads;
    floatX* at = x + (size_t)row * ldx + h * 2 * half + i;
    const float u = to_float(at[0]), v = to_float(at[half]);
    const size_t table = (size_t)(row % T) * half + i;
    const float c = cos_table[table], s = direct(sin_table[table]);
    at[0] = from_float<floatX>(u * c - v * s);
    at[half] = from_float<floatX>(v * c + u * s);
}

static void pairs(const Problem* p, int first, int heads, int block, cudaStream_t stream) {
    const int64_t n = (int64_t)p->B * p->T * heads * p->HD / 2;
    launch_require(n <= UINT32_MAX - block, "rope", "B * T * heads is more than one launch can number");
    pairs_kernel<<<(unsigned)ceil_div(n, block), block, 0, stream>>>(p->x + first * p->HD, p->cos, p->sin, (unsigned)n,
                                                                     p->T, heads, p->HD / 2, p->ldx);
    launch_check();
}

static void pair_per_thread(const Problem* p, int block, cudaStream_t stream) {
    pairs(p, 0, p->NH, block, stream);
    pairs(p, p->NH, p->NKV, block, stream);
}

// ---- one_launch ------------------------------------------------------------------------------
// idea    the keys lie behind the queries and are turned by the same angles: NH + NKV heads in one launch
// limit   loads of 2 bytes: a request of a warp is 64 bytes of x, beside 256 of the tables

static void one_launch(const Problem* p, int block, cudaStream_t stream) { pairs(p, 0, p->heads, block, stream); }

// ---- packs -----------------------------------------------------------------------------------
// idea    16 bytes of each half of a head to a thread
// limit   64 bytes of cosines and sines come with the 32 of x: a thread that turns one head reads its angles for it alone

template <typename Bits>
static __global__ void packs_kernel(floatX* x, const float* __restrict__ cos_table, const float* __restrict__ sin_table,
                                    unsigned tasks, unsigned T, unsigned heads, unsigned pieces, unsigned ldx) {
    enum { N = Widened<Bits>::N };
    const unsigned n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= tasks) return;
    const unsigned piece = n % pieces, h = n / pieces % heads, row = n / pieces / heads;
    Bits* at = reinterpret_cast<Bits*>(x + (size_t)row * ldx) + h * 2 * pieces + piece;
    Bits low = hint_load<KEEP>(at), high = hint_load<KEEP>(at + pieces);
    const size_t table = ((size_t)(row % T) * pieces + piece) * N;
    turn(low, high, angles_at<Bits>(cos_table + table, sin_table + table));
    hint_store<KEEP>(at, low);
    hint_store<KEEP>(at + pieces, high);
}

static void packs(const Problem* p, int block, cudaStream_t stream) {
    with_bits(p, [&](auto bits, int pieces) {
        const int64_t n = (int64_t)p->B * p->T * p->heads * pieces;
        packs_kernel<decltype(bits)><<<(unsigned)ceil_div(n, block), block, 0, stream>>>(
            p->x, p->cos, p->sin, (unsigned)n, p->T, p->heads, pieces, p->ldx);
        launch_check();
    });
}

// ---- table_in_shared -------------------------------------------------------------------------
// idea    a block turns a row: its angles are read once, into shared memory, for all heads. The grid names b and t: no
//         quotient by T
// limit   x is asked for only when the table has come and all warps have met; then every head reads its angles from shared
//         memory, as many bytes as before

template <typename Bits>
static __global__ void table_in_shared_kernel(floatX* x, const float* __restrict__ cos_table,
                                              const float* __restrict__ sin_table, int T, int heads, int pieces,
                                              int ldx) {
    enum { N = Widened<Bits>::N };
    extern __shared__ __align__(16) float table[]; // half a head of cosines, then of sines
    const int half = pieces * N, t = (int)blockIdx.x;
    for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) {
        table[i] = cos_table[(size_t)t * half + i];
        table[half + i] = sin_table[(size_t)t * half + i];
    }
    __syncthreads();
    Bits* row = reinterpret_cast<Bits*>(x + ((size_t)blockIdx.y * T + t) * ldx);
    for (int i = (int)threadIdx.x; i < heads * pieces; i += (int)blockDim.x) {
        const int piece = i % pieces;
        Bits* at = row + (i - piece) * 2 + piece;
        Bits low = hint_load<KEEP>(at), high = hint_load<KEEP>(at + pieces);
        turn(low, high, angles_at<Bits>(table + piece * N, table + half + piece * N));
        hint_store<KEEP>(at, low);
        hint_store<KEEP>(at + pieces, high);
    }
}

static void table_in_shared(const Problem* p, int block, cudaStream_t stream) {
    with_bits(p, [&](auto bits, int pieces) {
        table_in_shared_kernel<decltype(bits)><<<dim3(p->T, p->B), block, p->HD * sizeof(float), stream>>>(
            p->x, p->cos, p->sin, p->T, p->heads, pieces, p->ldx);
        launch_check();
    });
}

// ---- row_block -------------------------------------------------------------------------------
// idea    the same without the barrier: threads are (piece, head) of a row, and all heads' threads ask for the same angles,
//         which the first level of the cache hands out. No quotients at all, and short threads: one head each, so that a
//         multiprocessor always has some that load
// limit   the sequences follow each other: when the next one comes to a position, all of x that has passed in between, 50 MB
//         and more, has driven its angles out of the second level

// where the grid names a row: along x the rows of a sequence, or TOGETHER the sequences of a row
template <bool TOGETHER>
struct Order {
    static dim3 grid(int blocks, int B) {
        if (!TOGETHER) return dim3((unsigned)blocks, (unsigned)B);
        const unsigned deep = (unsigned)ceil_div(blocks, 32768);
        return dim3((unsigned)B, (unsigned)ceil_div(blocks, deep), deep);
    }
    static __device__ __forceinline__ int block(void) {
        return (int)(TOGETHER ? blockIdx.z * gridDim.y + blockIdx.y : blockIdx.x);
    }
    static __device__ __forceinline__ int sequence(void) { return (int)(TOGETHER ? blockIdx.x : blockIdx.y); }
};

template <typename Bits, bool TOGETHER, bool STAY>
static __global__ void row_block_kernel(floatX* x, const float* __restrict__ cos_table,
                                        const float* __restrict__ sin_table, int T, int heads, int ldx) {
    enum { N = Widened<Bits>::N };
    const int t = Order<TOGETHER>::block(), pieces = (int)blockDim.x;
    if (t >= T) return;
    Bits* row = reinterpret_cast<Bits*>(x + ((size_t)Order<TOGETHER>::sequence() * T + t) * ldx) + threadIdx.x;
    const size_t table = ((size_t)t * pieces + threadIdx.x) * N;
    for (int h = (int)threadIdx.y; h < heads; h += (int)blockDim.y) {
        Bits* at = row + h * 2 * pieces;
        Bits low = hint_load<KEEP>(at), high = hint_load<KEEP>(at + pieces);
        turn(low, high, angles_at<Bits, STAY>(cos_table + table, sin_table + table));
        hint_store<KEEP>(at, low);
        hint_store<KEEP>(at + pieces, high);
    }
}

template <bool TOGETHER, bool STAY>
static void row_block(const Problem* p, int block, cudaStream_t stream) {
    with_bits(p, [&](auto bits, int pieces) {
        const int passes = (int)ceil_div((int64_t)p->heads * pieces, block);
        const dim3 threads((unsigned)pieces, (unsigned)ceil_div(p->heads, passes));
        row_block_kernel<decltype(bits), TOGETHER, STAY>
            <<<Order<TOGETHER>::grid(p->T, p->B), threads, 0, stream>>>(p->x, p->cos, p->sin, p->T, p->heads, p->ldx);
        launch_check();
    });
}

// ---- together --------------------------------------------------------------------------------
// idea    the blocks of one position in all sequences are neighbours: its angles come from memory once
// limit   x is touched in B places megabytes apart; where B is 1 nothing changes

// ---- tables_stay -----------------------------------------------------------------------------
// idea    the order of row_block, but the second level is told to keep the tables (evict last), a megabyte at T 2048, while x
//         passes. What ships: llmc/rope.h
// limit   a table of 131072 positions is as large as the cache

// ---- heads_share_angles ----------------------------------------------------------------------
// idea    the angles stay in registers: a warp turns several heads of a row, a lane always the same pairs. Five heads a lane
//         and all their loads before the first store: 5 KB under way for each warp. This was llmc/rope.h
// limit   at HD 64 in bf16 a lane's halves are 64 bytes apart: each line is asked for twice, by halves, and written twice

// lanes that share a head, heads at once, and how the turns of a row are spread over warps
struct Warps {
    int lanes, at_once, row_tasks, per_warp, rows; // rows: of a block
    Warps(const Problem* p, int lanes_of_a_head, int turns, int block) {
        lanes = lanes_of_a_head, at_once = WARP / lanes;
        const int64_t all = ceil_div(p->heads, at_once);
        row_tasks = (int)ceil_div(all, turns);
        per_warp = (int)ceil_div(all, row_tasks) * at_once;
        launch_require(row_tasks <= 32, "rope", "a row is turned by one block");
        rows = block / WARP / row_tasks;
        rows = rows < 1 ? 1 : rows > p->T ? p->T : rows;
    }
    dim3 block(void) const { return dim3(WARP, (unsigned)row_tasks, (unsigned)rows); }
    int blocks(const Problem* p) const { return (int)ceil_div(p->T, rows); } // of a sequence
};

// a block is (32 lanes, the warps of a row, rows)
template <typename Bits, int TURNS>
static __global__ void heads_share_kernel(floatX* x, const float* __restrict__ cos_table,
                                          const float* __restrict__ sin_table, int T, int heads, int per_warp,
                                          int lanes, int ldx) {
    enum { N = Widened<Bits>::N };
    const int t = (int)(blockIdx.x * blockDim.z + threadIdx.z), lane = (int)threadIdx.x, at_once = WARP / lanes;
    if (t >= T || lane >= at_once * lanes) return;
    const int start = (int)threadIdx.y * per_warp, end = min(start + per_warp, heads), first = start + lane / lanes;
    const int piece = lane % lanes;
    Bits* row = reinterpret_cast<Bits*>(x + ((size_t)blockIdx.y * T + t) * ldx) + piece;
    Bits low[TURNS], high[TURNS];
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int h = first + k * at_once;
        if (h >= end) continue;
        low[k] = hint_load<KEEP>(row + h * 2 * lanes);
        high[k] = hint_load<KEEP>(row + h * 2 * lanes + lanes);
    }
    const size_t table = ((size_t)t * lanes + piece) * N;
    const Angles<Bits> angles = angles_at<Bits>(cos_table + table, sin_table + table);
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int h = first + k * at_once;
        if (h >= end) continue;
        turn(low[k], high[k], angles);
        hint_store<KEEP>(row + h * 2 * lanes, low[k]);
        hint_store<KEEP>(row + h * 2 * lanes + lanes, high[k]);
    }
}

template <int TURNS>
static void heads_share_angles(const Problem* p, int block, cudaStream_t stream) {
    with_bits(p, [&](auto bits, int pieces) {
        const Warps w(p, pieces, TURNS, block);
        heads_share_kernel<decltype(bits), TURNS><<<dim3(w.blocks(p), p->B), w.block(), 0, stream>>>(
            p->x, p->cos, p->sin, p->T, p->heads, w.per_warp, w.lanes, p->ldx);
        launch_check();
    });
}

// ---- sequences_share_angles ------------------------------------------------------------------
// idea    position t of every sequence has the same angles: a thread turns the same pairs of the same head in all of them, four
//         loaded at a time
// limit   what a block touches lies in B places megabytes apart, and where B is 1 nothing is shared

enum { SEQUENCES = 4 };

template <typename Bits>
static __global__ void sequences_share_kernel(floatX* x, const float* __restrict__ cos_table,
                                              const float* __restrict__ sin_table, unsigned tasks, int B, int T,
                                              unsigned heads, unsigned pieces, int ldx) {
    enum { N = Widened<Bits>::N };
    const unsigned n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= tasks) return;
    const unsigned piece = n % pieces, h = n / pieces % heads, t = n / pieces / heads;
    floatX* at = x + (size_t)t * ldx + (h * 2 * pieces + piece) * N;
    const size_t table = ((size_t)t * pieces + piece) * N, sequence = (size_t)T * ldx;
    const Angles<Bits> angles = angles_at<Bits>(cos_table + table, sin_table + table);
    for (int first = 0; first < B; first += SEQUENCES) {
        Bits low[SEQUENCES], high[SEQUENCES];
#pragma unroll
        for (int k = 0; k < SEQUENCES; k++) {
            if (first + k >= B) continue;
            const Bits* from = reinterpret_cast<const Bits*>(at + (first + k) * sequence);
            low[k] = hint_load<KEEP>(from), high[k] = hint_load<KEEP>(from + pieces);
        }
#pragma unroll
        for (int k = 0; k < SEQUENCES; k++) {
            if (first + k >= B) continue;
            Bits* to = reinterpret_cast<Bits*>(at + (first + k) * sequence);
            turn(low[k], high[k], angles);
            hint_store<KEEP>(to, low[k]);
            hint_store<KEEP>(to + pieces, high[k]);
        }
    }
}

static void sequences_share_angles(const Problem* p, int block, cudaStream_t stream) {
    with_bits(p, [&](auto bits, int pieces) {
        const int64_t n = (int64_t)p->T * p->heads * pieces;
        sequences_share_kernel<decltype(bits)><<<(unsigned)ceil_div(n, block), block, 0, stream>>>(
            p->x, p->cos, p->sin, (unsigned)n, p->B, p->T, p->heads, pieces, p->ldx);
        launch_check();
    });
}

// ---- whole_lines -----------------------------------------------------------------------------
// idea    lanes side by side over the whole head, not over its halves: a request of a warp is 512 bytes in a row, as a copy's
//         is. The halves of a pair, then in two lanes, meet by four shuffles of 4 bytes
// limit   both lanes of a pair convert both halves: half as many instructions again

// this lane's part of the head, turned: s has the sign of the half that the lane is in
template <typename Bits>
__device__ __forceinline__ Bits turn_half(Bits bits, const Angles<Bits>& a, int partner) {
    uint32_t words[Widened<Bits>::WORDS];
    memcpy(words, &bits, sizeof bits);
#pragma unroll
    for (int k = 0; k < Widened<Bits>::WORDS; k++) words[k] = __shfl_sync(0xffffffffu, words[k], partner);
    Bits other_bits;
    memcpy(&other_bits, words, sizeof bits);
    Widened<Bits> mine = widen(bits);
    const Widened<Bits> other = widen(other_bits);
#pragma unroll
    for (int k = 0; k < Widened<Bits>::N; k++) mine.x[k] = mine.x[k] * a.c[k] + other.x[k] * a.s[k];
    return narrow(mine);
}

// which part of which of the heads at once a lane has, and who has the other half of its pairs
struct Seat {
    bool taken;
    int head, part, piece, partner;
    float sign;
    __device__ __forceinline__ Seat(int lane, int lanes) { // lanes of a head, half of them to each half
        const int half = lanes / 2;
        taken = lane < WARP / lanes * lanes;
        head = lane / lanes, part = lane % lanes, piece = part % half;
        partner = !taken ? lane : part < half ? lane + half : lane - half;
        sign = part < half ? -1.0f : 1.0f;
    }
};

template <typename Bits>
__device__ __forceinline__ Angles<Bits> angles_of(Seat seat, const float* cos_table, const float* sin_table) {
    Angles<Bits> a = angles_at<Bits>(cos_table, sin_table);
#pragma unroll
    for (int k = 0; k < Angles<Bits>::N; k++) a.s[k] *= seat.sign;
    return a;
}

template <typename Bits, int TURNS, Hint LOAD, Hint STORE, bool TOGETHER>
static __global__ void whole_lines_kernel(floatX* x, const float* __restrict__ cos_table,
                                          const float* __restrict__ sin_table, int T, int heads, int per_warp,
                                          int lanes, int ldx) {
    enum { N = Widened<Bits>::N };
    const int t = Order<TOGETHER>::block() * (int)blockDim.z + (int)threadIdx.z, at_once = WARP / lanes;
    if (t >= T) return; // all lanes of a warp
    const Seat seat((int)threadIdx.x, lanes);
    const int start = (int)threadIdx.y * per_warp, first = start + seat.head;
    const int end = seat.taken ? min(start + per_warp, heads) : 0;
    Bits* row = reinterpret_cast<Bits*>(x + ((size_t)Order<TOGETHER>::sequence() * T + t) * ldx) + seat.part;
    Bits bits[TURNS] = {};
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int h = first + k * at_once;
        if (h < end) bits[k] = hint_load<LOAD>(row + h * lanes);
    }
    const size_t table = ((size_t)t * (lanes / 2) + seat.piece) * N;
    const Angles<Bits> angles = angles_of<Bits>(seat, cos_table + table, sin_table + table);
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int h = first + k * at_once;
        const Bits turned = turn_half(bits[k], angles, seat.partner);
        if (h < end) hint_store<STORE>(row + h * lanes, turned);
    }
}

template <int TURNS, Hint LOAD, Hint STORE, bool TOGETHER = false>
static void whole_lines(const Problem* p, int block, cudaStream_t stream) {
    with_bits(p, [&](auto bits, int pieces) {
        const Warps w(p, 2 * pieces, TURNS, block);
        whole_lines_kernel<decltype(bits), TURNS, LOAD, STORE, TOGETHER>
            <<<Order<TOGETHER>::grid(w.blocks(p), p->B), w.block(), 0, stream>>>(p->x, p->cos, p->sin, p->T, p->heads,
                                                                                 w.per_warp, w.lanes, p->ldx);
        launch_check();
    });
}

// ---- two_lines -------------------------------------------------------------------------------
// idea    two turns a warp instead of five: shorter threads, more warps, a shorter end
// limit   the angles are read more often, from the first level

static const char* two_lines_refuses(const Problem* p) {
    if (a_warp_holds_head(p)) return a_warp_holds_head(p);
    const int at_once = WARP / (2 * pieces_of_half(p));
    return ceil_div(ceil_div(p->heads, at_once), 2) > 32 ? "a row is more than 32 warps" : NULL;
}

// ---- lines_together --------------------------------------------------------------------------
// idea    five turns, the sequences of a position as neighbours: angles come from memory once

// ---- lines_past_l1, lines_ahead, lines_once --------------------------------------------------
// idea    what the caches are told (streams.cuh): no line of the first level for x, so that it is left to the tables; 256 bytes
//         at a miss; lines that leave first when they have been written
// limit   they all move the same bytes

// ---- resident --------------------------------------------------------------------------------
// idea    as many warps as the card holds walk over the rows: the next row's x and angles are under way before this one is
//         turned
// limit   registers for two rows; and rows are dealt out beforehand

template <typename Bits, int TURNS>
static __global__ void __launch_bounds__(256)
    resident_kernel(floatX* x, const float* __restrict__ cos_table, const float* __restrict__ sin_table, unsigned rows,
                    unsigned T, int heads, int per_warp, int lanes, int ldx) {
    enum { N = Widened<Bits>::N };
    const int at_once = WARP / lanes;
    const unsigned step = gridDim.x * blockDim.z;
    const Seat seat((int)threadIdx.x, lanes);
    const int start = (int)threadIdx.y * per_warp, first = start + seat.head;
    const int end = seat.taken ? min(start + per_warp, heads) : 0;
    auto at = [&](unsigned row) { return reinterpret_cast<Bits*>(x + (size_t)row * ldx) + seat.part; };
    Bits next[TURNS] = {};
    Angles<Bits> next_angles = {};
    auto fetch = [&](unsigned row) {
        if (row >= rows) return;
#pragma unroll
        for (int k = 0; k < TURNS; k++) {
            const int h = first + k * at_once;
            if (h < end) next[k] = hint_load<KEEP>(at(row) + h * lanes);
        }
        const size_t table = ((size_t)(row % T) * (lanes / 2) + seat.piece) * N;
        next_angles = angles_of<Bits>(seat, cos_table + table, sin_table + table);
    };
    unsigned row = blockIdx.x * blockDim.z + threadIdx.z;
    fetch(row);
    for (; row < rows; row += step) {
        const Angles<Bits> angles = next_angles;
        Bits bits[TURNS];
#pragma unroll
        for (int k = 0; k < TURNS; k++) bits[k] = next[k];
        fetch(row + step);
#pragma unroll
        for (int k = 0; k < TURNS; k++) {
            const int h = first + k * at_once;
            const Bits turned = turn_half(bits[k], angles, seat.partner);
            if (h < end) hint_store<KEEP>(at(row) + h * lanes, turned);
        }
    }
}

enum { RESIDENT_TURNS = 5 };

static const char* resident_refuses(const Problem* p) {
    if (a_warp_holds_head(p)) return a_warp_holds_head(p);
    return Warps(p, 2 * pieces_of_half(p), RESIDENT_TURNS, 256).row_tasks > 8 ? "a row is more than 8 warps" : NULL;
}

static void resident(const Problem* p, int block, cudaStream_t stream) {
    enum { TURNS = RESIDENT_TURNS };
    with_bits(p, [&](auto bits, int pieces) {
        const Warps w(p, 2 * pieces, TURNS, block);
        const int64_t rows = (int64_t)p->B * p->T, needed = ceil_div(rows, w.rows);
        const int64_t held = resident_blocks(resident_kernel<decltype(bits), TURNS>, WARP * w.row_tasks * w.rows, 0);
        resident_kernel<decltype(bits), TURNS><<<(unsigned)(needed < held ? needed : held), w.block(), 0, stream>>>(
            p->x, p->cos, p->sin, (unsigned)rows, p->T, p->heads, w.per_warp, w.lanes, p->ldx);
        launch_check();
    });
}

// ---- copy_engine -----------------------------------------------------------------------------
// idea    the queries and keys of a row are one run of bytes, 10 KB at HD 128: Hopper's copy engine brings it to shared memory
//         at one command, its angles by two more, and takes it back when it is turned. Four rows are under way for each block
// limit   a barrier of the block for each row, and numbers pass through shared memory on their way

enum { STAGES = 4, ENGINE_THREADS = 256 };

// a block is (pieces of half a head, heads at once); stage k % STAGES holds its row k: x, cosines, sines
template <typename Bits>
static __global__ void __launch_bounds__(ENGINE_THREADS)
    copy_engine_kernel(floatX* x, const float* cos_table, const float* sin_table, unsigned rows, unsigned T, int heads,
                       int ldx, uint32_t stage_bytes) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(128) char stages[];
    __shared__ uint64_t full[STAGES];
    enum { N = Widened<Bits>::N };
    const int pieces = (int)blockDim.x, half = pieces * N;
    const uint32_t x_bytes = (uint32_t)(heads * 2 * half) * sizeof(floatX),
                   table_bytes = (uint32_t)half * sizeof(float);
    const unsigned mine = (rows - blockIdx.x + gridDim.x - 1) / gridDim.x; // at least one
    const bool commander = threadIdx.x == 0 && threadIdx.y == 0;
    auto row_of = [&](unsigned k) { return blockIdx.x + k * gridDim.x; };
    auto fetch = [&](unsigned k) { // the commander
        const uint32_t bar = shared_address(&full[k % STAGES]);
        const uint32_t stage = shared_address(stages) + k % STAGES * stage_bytes;
        const size_t table = (size_t)(row_of(k) % T) * half;
        mbarrier_expect(bar, x_bytes + 2 * table_bytes);
        bulk_load(stage, x + (size_t)row_of(k) * ldx, x_bytes, bar);
        bulk_load(stage + x_bytes, cos_table + table, table_bytes, bar);
        bulk_load(stage + x_bytes + table_bytes, sin_table + table, table_bytes, bar);
    };
    if (commander) {
        for (int s = 0; s < STAGES; s++) mbarrier_init(shared_address(&full[s]), 1);
        mbarrier_init_done();
    }
    __syncthreads();
    if (commander)
        for (unsigned k = 0; k < STAGES - 1 && k < mine; k++) fetch(k);
    for (unsigned k = 0; k < mine; k++) {
        char* stage = stages + k % STAGES * stage_bytes;
        const float* table = reinterpret_cast<const float*>(stage + x_bytes) + threadIdx.x * N;
        mbarrier_wait(shared_address(&full[k % STAGES]), k / STAGES % 2);
        const Angles<Bits> angles = angles_at<Bits>(table, table + half);
        for (int h = (int)threadIdx.y; h < heads; h += (int)blockDim.y) {
            Bits* at = reinterpret_cast<Bits*>(stage) + h * 2 * pieces + threadIdx.x;
            Bits low = at[0], high = at[pieces];
            turn(low, high, angles);
            at[0] = low, at[pieces] = high;
        }
        fence_async();
        __syncthreads(); // the row is turned, and nobody reads the stage before this one any more
        if (!commander) continue;
        bulk_store(x + (size_t)row_of(k) * ldx, shared_address(stage), x_bytes);
        tma_store_commit();
        if (k + STAGES - 1 >= mine) continue;
        tma_store_wait_read<1>(); // the row of the stage before this one has left it
        fetch(k + STAGES - 1);
    }
    if (commander) tma_store_wait<0>();
#endif
}

static uint32_t engine_stage(const Problem* p) {
    return (uint32_t)ceil_div(p->heads * p->HD * sizeof(floatX) + p->HD * sizeof(float), 128) * 128;
}

static void copy_engine(const Problem* p, int, cudaStream_t stream) {
    with_bits(p, [&](auto bits, int pieces) {
        const auto kernel = copy_engine_kernel<decltype(bits)>;
        const int shared = (int)(STAGES * engine_stage(p)), passes = (int)ceil_div(p->heads * pieces, ENGINE_THREADS);
        const dim3 block((unsigned)pieces, (unsigned)ceil_div(p->heads, passes));
        cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        const int64_t rows = (int64_t)p->B * p->T, held = resident_blocks(kernel, (int)(block.x * block.y), shared);
        kernel<<<(unsigned)(rows < held ? rows : held), block, shared, stream>>>(
            p->x, p->cos, p->sin, (unsigned)rows, p->T, p->heads, p->ldx, engine_stage(p));
        launch_check();
    });
}

static const char* engine_refuses(const Problem* p) {
    if (in_place_only(p)) return in_place_only(p);
    if (STAGES * engine_stage(p) > 220 * 1024) return "four rows do not fit into shared memory";
    return hopper_refuses();
}

// ---- fused_with_split ------------------------------------------------------------------------
// idea    where attention wants the heads apart, they are moved anyway: turned on the way, they cost no pass of their own.
//         Backward the gradients are gathered into rows and turned back on the way
// limit   an attention that reads the projection's rows as they lie (attention.h) needs no such move at all, and in place a
//         sixth of the bytes, the values, is not touched

// heads apart are those of p.q, p.k, p.v; TURN: by its angle, or just moved
template <typename Bits, bool TURN>
static __global__ void split_kernel(const Problem p, unsigned tasks, unsigned pieces) {
    enum { N = Widened<Bits>::N };
    const unsigned n = blockIdx.x * blockDim.x + threadIdx.x, all = (unsigned)(p.heads + p.NKV);
    if (n >= tasks) return;
    const unsigned piece = n % pieces, h = n / pieces % all, row = n / pieces / all, t = row % (unsigned)p.T;
    const Place place = place_of(p, (int)(row / (unsigned)p.T), (int)t, (int)h);
    Bits* packed = reinterpret_cast<Bits*>(p.x + (size_t)row * p.ldx) + h * 2 * pieces + piece;
    Bits* apart = reinterpret_cast<Bits*>(place.array + place.first) + piece;
    const Bits* from = ROPE_DIRECTION > 0 ? packed : apart;
    Bits* to = ROPE_DIRECTION > 0 ? apart : packed;
    Bits low = hint_load<ONCE>(from), high = hint_load<ONCE>(from + pieces);
    const size_t table = ((size_t)t * pieces + piece) * N;
    if (TURN && h < (unsigned)p.heads) turn(low, high, angles_at<Bits>(p.cos + table, p.sin + table));
    hint_store<KEEP>(to, low);
    hint_store<KEEP>(to + pieces, high);
}

template <bool TURN>
static void split(const Problem* p, int block, cudaStream_t stream) {
    with_bits(p, [&](auto bits, int pieces) {
        const int64_t n = (int64_t)p->B * p->T * (p->heads + p->NKV) * pieces;
        split_kernel<decltype(bits), TURN><<<(unsigned)ceil_div(n, block), block, 0, stream>>>(*p, (unsigned)n, pieces);
        launch_check();
    });
}

// ---- production ------------------------------------------------------------------------------
// where heads are wanted apart, a second kernel moves them

static void production(const Problem* p, int, cudaStream_t stream) {
#if ROPE_DIRECTION > 0
    if (p->apart) {
        split<false>(p, 256, stream);
        rope_forward(p->q, p->cos, p->sin, p->B * p->NH, p->T, 0, 1, p->HD, p->HD, stream);
        rope_forward(p->k, p->cos, p->sin, p->B * p->NKV, p->T, 0, 1, p->HD, p->HD, stream);
    } else {
        rope_forward(p->x, p->cos, p->sin, p->B, p->T, 0, p->heads, p->HD, p->ldx, stream);
    }
#else
    if (p->apart) split<false>(p, 256, stream);
    rope_backward(p->x, p->cos, p->sin, p->B, p->T, 0, p->heads, p->HD, p->ldx, stream);
#endif
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "pair_per_thread",        pair_per_thread,                          { 128, 256, 512 },    "a thread for a pair, queries, then keys", in_place_only },
    { "one_launch",             one_launch,                               { 128, 256, 512 },    "queries and keys in one launch", in_place_only },
    { "packs",                  packs,                                    { 128, 256, 512 },    "16 bytes of each half", in_place_only },
    { "table_in_shared",        table_in_shared,                          { 64, 128, 192, 320 }, "a block for a row, its angles in shared memory", in_place_only },
    { "row_block",              row_block<false, false>,                  { 80, 160, 320 },     "a block for a row, its angles in the first level, no quotients", in_place_only },
    { "together",               row_block<true, false>,                   { 80, 160, 320 },     "a position of all sequences by neighbouring blocks", in_place_only },
    { "tables_stay",            row_block<false, true>,                   { 80, 160, 320 },     "the second level is told to keep the tables", in_place_only },
    { "sequences_share_angles", sequences_share_angles,                   { 128, 256 },         "a position of all sequences, angles in registers", in_place_only },
    { "heads_share_angles",     heads_share_angles<5>,                    { 64, 128, 256 },     "five heads a lane, angles in registers", a_warp_holds_half },
    { "whole_lines",            whole_lines<5, KEEP, KEEP>,               { 64, 128, 256 },     "512 bytes in a row for a warp, halves meet by shuffles", a_warp_holds_head },
    { "two_lines",              whole_lines<2, KEEP, KEEP>,               { 160, 320 },         "two turns a warp", two_lines_refuses },
    { "lines_together",         whole_lines<5, KEEP, KEEP, true>,         { 64, 128, 256 },     "five turns, a position of all sequences by neighbouring blocks", a_warp_holds_head },
    { "lines_past_l1",          whole_lines<5, PAST_L1, KEEP>,            { 64, 128, 256 },     "five, x past the first level", a_warp_holds_head },
    { "lines_ahead",            whole_lines<5, AHEAD, KEEP>,              { 64, 128, 256 },     "five, 256 bytes at a miss", a_warp_holds_head },
    { "lines_once",             whole_lines<5, ONCE, ONCE>,               { 64, 128, 256 },     "five, lines leave the cache first", a_warp_holds_head },
    { "resident",               resident,                                 { 128, 256 },         "warps stay and fetch ahead", resident_refuses },
    { "copy_engine",            copy_engine,                              { 0 },                "TMA moves rows and angles, four under way for a block", engine_refuses },
    { "fused_with_split",       split<true>,                              { 128, 256, 512 },    "turned while the heads are moved apart (backward: together)", apart_only },
    { "production",             production,                               { 0 },                "llmc/rope.h: tables_stay, rows of few threads side by side; apart: and a kernel that moves" },
};
// clang-format on
BENCH_MAIN(ROPE_DIRECTION > 0 ? "rope_forward" : "rope_backward", shapes, setup, reference, rows, traffic, flops,
           variants)
