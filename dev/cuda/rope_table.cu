/*
RoPE's tables: the cosine and sine of every position and frequency, in fp32.

    cos[p, i] = cos(p * f(i))       sin[p, i] = sin(p * f(i))       f(i) = theta^(-2i/HD), scaled (llmc/rope.h)

What must move  T*HD numbers of fp32, written once: 33.6 MB for the 131072 positions of Llama 3.2 1B, 67 MB for HD 128. A copy
                that moves as many bytes on the H200 needs 8 and 16 us; what is only written, and fits the L2 cache for the
                most part, may take less
What is hard    the angle. Position 131071 at f(0) = 1 is 131071 radians, and a float that large is good to 2^-8 = 0.004. A
                frequency rounded to float is off by 2^-25 of itself, and so is the angle: 0.004 again. Neither is seen at
                position 100. So the two variants with angles in float refuse all shapes but short ones, and say by how
                much they would be off: refuses() makes the same products on the CPU and compares them with the tolerance of
                the check, which is that of a single rounding to float (bench.cuh) and which the others meet anywhere
What ships      the host's table. It is made once, before the first step, in 30 to 114 ms; train_llama3.cu and llama3.c
                then turn by the same bits, which is what lets one be tested against the other; and there is no kernel to keep.
                The kernels below are 400 to 6000 times faster at something that takes no time
Reached         H200, us and % of a copy: HD 64  in_double 91.7 (12), frequencies_once 21.6 (52), reduced_in_double 17.1 (66),
                turns_in_integers 11.7 (96); HD 128  166 (11), 39.0 (47), 29.9 (61), 18.9 (97)

Metrics         smsp__inst_executed_pipe_fp64 (variants in double), smsp__inst_executed_pipe_xu (conversions),
                dram__bytes_write, lts__t_sectors_op_write, l1tex__t_sectors_pipe_lsu_mem_global_op_st against requests
*/
#define BENCH_DTYPE "fp32"
#include "bench.cuh"
#include "llmc/rope.h"

// ---- the problem -----------------------------------------------------------------------------

// clang-format off
static const Shape shapes[] = {
    { .name = "1B", .T = 131072, .HD = 64 },
    { .name = "8B", .T = 131072, .HD = 128 },
    { .name = "one position", .small = true, .T = 1, .HD = 8 },
    { .name = "short", .small = true, .T = 33, .HD = 8 },
    { .name = "three packs", .small = true, .T = 301, .HD = 24 },
    { .name = "odd", .small = true, .T = 4099, .HD = 80 },
};
// clang-format on

// what the frequencies depend on; Llama 3.2's
struct Rule {
    double theta, factor, low, high;
    int original;
};
static const Rule rule = { 500000, 32, 1, 4, 8192 };

struct Problem {
    int T, HD;
    float *cos, *sin;      // (T, HD/2)
    const uint64_t* exact; // HD/2 doubles, bit for bit: the frequencies
    const uint64_t* turns; // HD/2: the frequencies in turns per position, times 2^64
    double off;            // by how much an angle computed in float misses, at the last position
    char refusal[128];
};

static double frequency(int i, int HD) {
    return rope_frequency(i, HD, rule.theta, rule.factor, rule.low, rule.high, rule.original);
}

static const double TABLE_TWO_PI = 6.283185307179586;

static Problem setup(Bench* b, const Shape* s) {
    Problem p = {};
    p.T = s->T, p.HD = s->HD;
    const int half = p.HD / 2;
    std::vector<uint64_t> exact(half), turns(half);
    for (int i = 0; i < half; i++) {
        const double f = frequency(i, p.HD);
        memcpy(&exact[i], &f, 8);
        turns[i] = (uint64_t)ldexp(f / TABLE_TWO_PI, 64); // below one turn: f is at most 1
        // the largest error of an angle, which is not always that of the last position
        for (int t = p.T > 64 ? p.T - 64 : 0; t < p.T; t++)
            p.off = fmax(p.off, fabs((double)((float)f * (float)t) - f * t));
    }
    const size_t n = (size_t)p.T * half;
    p.cos = b->output<float>("cos", n), p.sin = b->output<float>("sin", n);
    p.exact = b->input_from("frequencies", exact.data(), exact.size());
    p.turns = b->input_from("turns", turns.data(), turns.size());
    snprintf(p.refusal, sizeof p.refusal, "an angle in float is off by %.2g at about position %d, allowed are %.2g",
             p.off, p.T - 1, Bench::tolerance(bench_type<float>(), 1, 0));
    return p;
}

static int64_t rows(const Problem* p) { return p->T; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const int half = p->HD / 2;
    std::vector<double> c((size_t)count * half), s(c.size());
    for (int i = 0; i < half; i++) {
        const double f = frequency(i, p->HD);
        for (int64_t r = 0; r < count; r++) {
            c[r * half + i] = cos((double)(first + r) * f);
            s[r * half + i] = sin((double)(first + r) * f);
        }
    }
    b->expect(p->cos, (size_t)first * half, c.data(), c.size());
    b->expect(p->sin, (size_t)first * half, s.data(), s.size());
}

static double traffic(const Problem* p) { return 1.0 * p->T * p->HD * sizeof(float); }
static double flops(const Problem*) { return 0; }

// powf may be off by some units in the last place more than the CPU's frequency, rounded once: eight times as much is feared
static const char* refuses_float(const Problem* p) {
    return 8 * p->off > Bench::tolerance(bench_type<float>(), 1, 0) ? p->refusal : NULL;
}

static const char* refuses_thirds(const Problem* p) {
    return p->HD / 2 % 4 ? "HD (head_dim) must be a multiple of 8" : NULL;
}

// llmc's rope_frequency, in float or in double
template <typename Real>
__device__ __forceinline__ Real table_frequency(int i, int HD, Rule rule) {
    const Real f = pow((Real)rule.theta, (Real)(-2 * i) / (Real)HD), w = (Real)TABLE_TWO_PI / f,
               factor = (Real)rule.factor;
    const Real low = (Real)rule.low, high = (Real)rule.high, original = (Real)rule.original;
    if (factor == (Real)1 || w < original / high) return f;
    if (w > original / low) return f / factor;
    const Real s = (original / w - low) / (high - low);
    return ((Real)1 - s) * f / factor + s * f;
}

// ---- row_per_thread --------------------------------------------------------------------------
// idea    one thread for one position walks its frequencies: the CPU's loop, turned inside out
// limit   neighbouring threads write rows of 128 bytes or more apart: a request of a warp is 32 sectors for 32 numbers, and
//         2^17 positions are one wave of threads. And the angles are floats: right for short sequences only

static __global__ void row_per_thread_kernel(float* cos_table, float* sin_table, int T, int HD, Rule rule) {
    const int p = (int)(blockIdx.x * blockDim.x + threadIdx.x), half = HD / 2;
    if (p >= T) return;
    for (int i = 0; i < half; i++) {
        const float angle = (float)p * table_frequency<float>(i, HD, rule);
        sincosf(angle, sin_table + (size_t)p * half + i, cos_table + (size_t)p * half + i);
    }
}

static void row_per_thread(const Problem* p, int block, cudaStream_t stream) {
    row_per_thread_kernel<<<(unsigned)ceil_div(p->T, block), block, 0, stream>>>(p->cos, p->sin, p->T, p->HD, rule);
    launch_check();
}

// ---- number_per_thread -----------------------------------------------------------------------
// idea    one thread for one frequency of one position: neighbours write neighbours
// limit   still floats: powf, the product and sincosf are each good to a few units in the last place, of an angle whose last
//         place is worth 0.008

template <typename Real>
static __global__ void number_per_thread_kernel(float* cos_table, float* sin_table, unsigned n, int HD, Rule rule) {
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x, half = (unsigned)HD / 2;
    if (at >= n) return;
    const Real angle = (Real)(at / half) * table_frequency<Real>((int)(at % half), HD, rule);
    Real s, c;
    sincos(angle, &s, &c);
    cos_table[at] = (float)c;
    sin_table[at] = (float)s;
}

template <typename Real>
static void number_per_thread(const Problem* p, int block, cudaStream_t stream) {
    const unsigned n = (unsigned)p->T * (unsigned)(p->HD / 2);
    number_per_thread_kernel<Real><<<(unsigned)ceil_div(n, block), block, 0, stream>>>(p->cos, p->sin, n, p->HD, rule);
    launch_check();
}

// ---- in_double -------------------------------------------------------------------------------
// idea    the same in double: an angle of 131071 radians is good to 2^-37. Right everywhere
// limit   pow, sincos and a quotient in double for each number: some hundreds of instructions for 8 bytes; and sincos has a
//         slow path for angles beyond 105615, in which some of the last positions diverge

// ---- frequencies_once ------------------------------------------------------------------------
// idea    the HD/2 frequencies come from the host, in double: no pow, no scaling rule on the GPU
// limit   sincos in double: two polynomials of degree 13 and the reduction to a quarter turn, 60 or more instructions of the
//         double unit. The result is rounded to float: most of that exactness is thrown away

static __global__ void frequencies_once_kernel(float* cos_table, float* sin_table,
                                               const double* __restrict__ frequencies, unsigned n, unsigned half) {
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n) return;
    double s, c;
    sincos((double)(at / half) * frequencies[at % half], &s, &c);
    cos_table[at] = (float)c;
    sin_table[at] = (float)s;
}

static void frequencies_once(const Problem* p, int block, cudaStream_t stream) {
    const unsigned half = (unsigned)(p->HD / 2), n = (unsigned)p->T * half;
    frequencies_once_kernel<<<(unsigned)ceil_div(n, block), block, 0, stream>>>(
        p->cos, p->sin, reinterpret_cast<const double*>(p->exact), n, half);
    launch_check();
}

// ---- reduced_in_double -----------------------------------------------------------------------
// idea    only the reduction needs double: the angle in turns, less the whole turns, is at most half a turn, and as a float
//         it is off by less than 2^-25 of that. sincospif does the rest
// limit   a double from the frequency and the position, a product, a rounding, a difference, back to float: five instructions
//         of pipes that take 16 lanes or fewer a cycle, and scalar stores of 4 bytes

static __global__ void reduced_in_double_kernel(float* cos_table, float* sin_table,
                                                const double* __restrict__ frequencies, unsigned n, unsigned half,
                                                double per_turn) {
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n) return;
    const double turns = (double)(at / half) * (frequencies[at % half] * per_turn);
    sincospif(2 * (float)(turns - rint(turns)), sin_table + at, cos_table + at);
}

static void reduced_in_double(const Problem* p, int block, cudaStream_t stream) {
    const unsigned half = (unsigned)(p->HD / 2), n = (unsigned)p->T * half;
    reduced_in_double_kernel<<<(unsigned)ceil_div(n, block), block, 0, stream>>>(
        p->cos, p->sin, reinterpret_cast<const double*>(p->exact), n, half, 1 / TABLE_TWO_PI);
    launch_check();
}

// ---- turns_in_integers -----------------------------------------------------------------------
// idea    an angle as a 64-bit fraction of a turn: the product with the position wraps around by itself, so that whole turns
//         fall off the top and nothing is rounded. A frequency, from a double, is good to 2^-55 of a turn, and so the angle
//         of position 131071 to 2^-38; its upper 32 bits, read with their sign, are the angle between -1/2 and 1/2. Four
//         numbers a thread, stores of 16 bytes
// limit   sincospif, some 20 instructions a number, and then what the memory takes

static __global__ void turns_in_integers_kernel(float* cos_table, float* sin_table, const uint64_t* __restrict__ turns,
                                                unsigned packs, unsigned P) {
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= packs) return;
    const unsigned position = at / P, i = at % P * 4;
    Pack<float> s, c;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int32_t angle = (int32_t)(position * turns[i + j] >> 32);
        sincospif((float)angle * 0x1p-31f, &s.x[j], &c.x[j]);
    }
    pack_store(cos_table + (size_t)at * 4, c);
    pack_store(sin_table + (size_t)at * 4, s);
}

static void turns_in_integers(const Problem* p, int block, cudaStream_t stream) {
    const unsigned P = (unsigned)(p->HD / 8), packs = (unsigned)p->T * P;
    turns_in_integers_kernel<<<(unsigned)ceil_div(packs, block), block, 0, stream>>>(p->cos, p->sin, p->turns, packs,
                                                                                     P);
    launch_check();
}

// ---- production ------------------------------------------------------------------------------
// as in train_llama3.cu: made on the host in double, copied, waited for

static void production(const Problem* p, int, cudaStream_t stream) {
    const size_t n = (size_t)p->T * (size_t)p->HD / 2;
    float* table = (float*)allocate(2 * n, sizeof *table);
    rope_table_cpu(table, table + n, p->T, p->HD, rule.theta, rule.factor, rule.low, rule.high, rule.original);
    cuda_check(cudaMemcpyAsync(p->cos, table, n * sizeof *table, cudaMemcpyHostToDevice, stream));
    cuda_check(cudaMemcpyAsync(p->sin, table + n, n * sizeof *table, cudaMemcpyHostToDevice, stream));
    cuda_check(cudaStreamSynchronize(stream));
    free(table);
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
    { "row_per_thread",    row_per_thread,            { 64, 256 },       "the CPU's loop, a thread for a position; angles in float", refuses_float },
    { "number_per_thread", number_per_thread<float>,  { 128, 256, 512 }, "neighbours write neighbours; angles in float", refuses_float },
    { "in_double",         number_per_thread<double>, { 128, 256, 512 }, "pow and sincos in double: right at any position" },
    { "frequencies_once",  frequencies_once,          { 128, 256, 512 }, "frequencies in double from the host" },
    { "reduced_in_double", reduced_in_double,         { 128, 256, 512 }, "whole turns taken off in double, sincospif in float" },
    { "turns_in_integers", turns_in_integers,         { 128, 256, 512 }, "angles as 64-bit fractions of a turn: wrapping is the reduction; 16-byte stores", refuses_thirds },
    { "production",        production,                { 0 },             "llmc/rope.h on the host in double, then copied: once a run, the same bits as on the CPU" },
};
// clang-format on
BENCH_MAIN("rope_table", shapes, setup, reference, rows, traffic, flops, variants)
