/*
AdamW: one step of all parameters, and what the ways to store them cost.

    g = grad_scale * g,  w = keep * w,  m += (1 - beta1) * (g - m),  v = beta2 * v + (1 - beta2) * g^2
    w -= step_size * m / (sqrt(v) / root + eps)                      keep, step_size, root: see llmc/adamw.h

Counted         bytes that are read and written for each parameter, with bf16 weights:

                    master weights, fp32 moments       28      the default
                    no master, fp32 moments            22      w is rounded at random
                    master weights, bf16 moments       20      m and v are rounded at random
                    no master, bf16 moments            14
                    master weights, 8-bit moments      16.06   see eight_bits
                    no master, 8-bit moments           10.06

The card        an H200 copies 4.30 TB/s: four layers of the 1B model, 243M parameters, 28 bytes each, a floor of 1.58 ms
Reached         on an H200, % of a copy of the same bytes; m: master weights, 32, 16, 8: bits of a moment

                                        m 32      32    m 16      16     m 8       8    6 layers of 15M, m 32
                    kernel_per_formula    44                                                     8
                    one_each              88      80      76      58                            23
                    launch_each           90      85      78      61                            18
                    packs_of_gradients    87                                                    14
                    segments              97      98      97      82                           101
                    eight_bits                                            96      68
                    production            97      98      97      98                            99

                in us: production 1661, 1292, 1178 and 816, eight_bits 965 and 852, lean 1182 and 832
Metrics         dram__throughput, sm__inst_issued and why warps wait, by ncu (results/nvidia-h200/adamw.md): without master
                weights memory is 71 % busy under one_each, 78 under launch_each, 86 under segments and production, which
                wait for loads more than half of the time at 60 % of the issue slots
Not here        2026-11-20: bulk, a ring in shared memory that the copy engine fills, raced: 1975 and 1613 of 243 million
                weights were wrong in two runs, in other places; the cause was not found
                2026-11-20: one hash for two parameters, tried in lean: it rounds bf16 moments with other bits than the CPU's
                rows and llmc/adamw.h, so that nothing agrees after two steps
Small shapes    take two steps, so that what the first one has stored is read again
*/
#include "bench.cuh"
#include "llmc/adamw.h"

// ---- the problem -----------------------------------------------------------------------------

enum { BLOCK = 256, CHUNK = 2048 }; // numbers that share the scale of an 8-bit code; that a block of segments updates

// one tensor: built once, on the GPU, for the launch of all
struct Segment {
    size_t first, n; // numbers from the beginning of all arrays, a multiple of BLOCK; of the tensor
    bool decays;
};

struct Problem {
    bool master, eight_bits;
    int moment_bytes, steps;
    size_t n, padded; // numbers of all tensors; with what lies between them
    std::vector<Segment> tensors;
    const Segment* segments; // the same, on the GPU
    const uint16_t* owners;  // of each CHUNK numbers of the arrays: the tensor
    const floatX* g;
    const float* grad_scale;
    floatX* w;
    float* full;  // master weights
    float *m, *v; // of one kind, the others are NULL
    __nv_bfloat16 *m16, *v16;
    uint8_t *m8, *v8;     // codes
    float *m_max, *v_max; // of each BLOCK: what the largest code stands for
};

static const float LR = 0.01f, BETA1 = 0.9f, BETA2 = 0.95f, EPS = 1e-8f, DECAY = 0.1f;
static const int STEP = 10; // the first one that is taken
static const uint64_t SEED = 7;

// N: parameters, in one tensor. Else the layers' tensors, L of them in the name
static const Shape shapes[] = {
    { .name = "4 layers of 1B", .C = 2048, .NH = 32, .NKV = 8, .HD = 64, .F = 8192 },
    { .name = "4 layers of 1B, no master", .C = 2048, .NH = 32, .NKV = 8, .HD = 64, .F = 8192 },
    { .name = "4 layers of 1B, bf16 moments", .C = 2048, .NH = 32, .NKV = 8, .HD = 64, .F = 8192 },
    { .name = "4 layers of 1B, bf16 moments, no master", .C = 2048, .NH = 32, .NKV = 8, .HD = 64, .F = 8192 },
    { .name = "4 layers of 1B, 8-bit moments", .C = 2048, .NH = 32, .NKV = 8, .HD = 64, .F = 8192 },
    { .name = "4 layers of 1B, 8-bit moments, no master", .C = 2048, .NH = 32, .NKV = 8, .HD = 64, .F = 8192 },
    { .name = "6 layers of 15M", .C = 288, .NH = 6, .NKV = 2, .HD = 48, .F = 768 },
    { .name = "one pack", .small = true, .N = 8 },
    { .name = "odd packs", .small = true, .N = 8 * 1237 },
    { .name = "odd packs, no master", .small = true, .N = 8 * 1237 },
    { .name = "odd packs, bf16 moments", .small = true, .N = 8 * 1237 },
    { .name = "odd packs, bf16 moments, no master", .small = true, .N = 8 * 1237 },
    { .name = "odd packs, 8-bit moments", .small = true, .N = 8 * 1237 },
    { .name = "odd packs, 8-bit moments, no master", .small = true, .N = 8 * 1237 },
    { .name = "2 layers of a tiny model", .small = true, .C = 40, .NH = 2, .NKV = 1, .HD = 20, .F = 72 },
    { .name = "2 layers of a tiny model, bf16 moments, no master",
      .small = true,
      .C = 40,
      .NH = 2,
      .NKV = 1,
      .HD = 20,
      .F = 72 },
    { .name = "2 layers of a tiny model, 8-bit moments", .small = true, .C = 40, .NH = 2, .NKV = 1, .HD = 20, .F = 72 },
};

// each tensor begins at a multiple of CHUNK, so that a chunk has one owner
static void add_tensor(Problem* p, size_t n, bool decays) {
    p->tensors.push_back(Segment{ p->padded, n, decays });
    p->n += n;
    p->padded += (size_t)ceil_div((int64_t)n, CHUNK) * CHUNK;
}

static void add_layers(Problem* p, const Shape* s, int layers) {
    const size_t C = (size_t)s->C, Q = (size_t)(s->NH * s->HD), KV = (size_t)(s->NKV * s->HD), F = (size_t)s->F;
    for (int l = 0; l < layers; l++) { // as llmc/llama3.h lists them
        add_tensor(p, C, false);
        add_tensor(p, Q * C, true), add_tensor(p, KV * C, true), add_tensor(p, KV * C, true),
            add_tensor(p, C * Q, true);
        add_tensor(p, C, false);
        add_tensor(p, F * C, true), add_tensor(p, F * C, true), add_tensor(p, C * F, true);
    }
}

// what lies between the tensors is nobody's
template <typename T>
static void leave_open(Bench* b, const Problem* p, T* x, size_t numbers) {
    for (const Segment& t : p->tensors) {
        const size_t used = (size_t)ceil_div((int64_t)t.n, (int64_t)numbers),
                     all = (size_t)ceil_div((int64_t)t.n, CHUNK) * CHUNK / numbers;
        if (used < all) b->unspecified(x, t.first / numbers + used, all - used);
    }
}

static uint8_t* random_codes(Bench* b, const char* name, size_t n, uint64_t stream) {
    std::vector<uint8_t> codes(n);
#pragma omp parallel for
    for (int64_t i = 0; i < (int64_t)n; i++) codes[i] = (uint8_t)(random_bits(SEED, stream, (uint64_t)i) & 0xff);
    uint8_t* x = b->in_place_from<uint8_t>(name, codes.data(), n);
    b->unspecified(x, 0, n); // a code may be the next one where the CPU rounds otherwise; the next step reads it
    return x;
}

static Problem setup(Bench* b, const Shape* s) {
    Problem p = {};
    int layers = 0;
    p.master = strstr(s->name, "no master") == NULL;
    p.moment_bytes = strstr(s->name, "8-bit") ? 1 : strstr(s->name, "bf16") ? 2 : 4;
    p.eight_bits = p.moment_bytes == 1;
    p.steps = s->small ? 2 : 1;
    if (sscanf(s->name, "%d layers", &layers) == 1)
        add_layers(&p, s, layers);
    else
        add_tensor(&p, (size_t)s->N, true);
    const size_t n = p.padded, terms = 8;
    std::vector<uint16_t> owners;
    std::vector<char> bytes((const char*)p.tensors.data(), (const char*)(p.tensors.data() + p.tensors.size()));
    for (size_t i = 0; i < p.tensors.size(); i++)
        owners.resize(owners.size() + (size_t)ceil_div((int64_t)p.tensors[i].n, CHUNK), (uint16_t)i);
    const float scale = 0.5f;
    p.segments = (const Segment*)b->input_from("segments", bytes.data(), bytes.size());
    p.owners = b->input_from("owners", owners.data(), owners.size());
    p.g = b->input<floatX>("g", n, 0.2f);
    p.grad_scale = b->input_from("grad_scale", &scale, 1);
    p.w = b->in_place<floatX>("w", n, 0.02f, terms);
    leave_open(b, &p, p.w, 1);
    if (p.master) p.full = b->in_place<float>("master", n, 0.02f, terms), leave_open(b, &p, p.full, 1);
    if (p.moment_bytes == 4) {
        p.m = b->in_place<float>("m", n, 0.05f, terms), leave_open(b, &p, p.m, 1);
        p.v = b->in_place<float>("v", n, 0.0015f, terms, 0.01f), leave_open(b, &p, p.v, 1); // tails end at 6 deviations
    } else if (p.moment_bytes == 2) {
        p.m16 = b->in_place<__nv_bfloat16>("m", n, 0.05f, terms), leave_open(b, &p, p.m16, 1);
        p.v16 = b->in_place<__nv_bfloat16>("v", n, 0.0015f, terms, 0.01f), leave_open(b, &p, p.v16, 1);
    } else {
        p.m8 = random_codes(b, "m", n, 1), p.v8 = random_codes(b, "v", n, 2);
        p.m_max = b->in_place<float>("m_max", n / BLOCK, 0.01f, terms, 0.2f), leave_open(b, &p, p.m_max, BLOCK);
        p.v_max = b->in_place<float>("v_max", n / BLOCK, 0.001f, terms, 0.04f), leave_open(b, &p, p.v_max, BLOCK);
    }
    return p;
}

static double bytes_each(const Problem* p) {
    return 3.0 * sizeof(floatX) + (p->master ? 2.0 * sizeof(float) - (double)sizeof(floatX) : 0) +
           4.0 * p->moment_bytes + (p->eight_bits ? 4.0 * sizeof(float) / BLOCK : 0);
}
static double traffic(const Problem* p) { return (double)p->n * bytes_each(p); }
static double flops(const Problem*) { return 0; }

static AdamWStep step_of(const Segment& t, uint64_t tensor, int step) {
    return adamw_step(LR, BETA1, BETA2, EPS, t.decays ? DECAY : 0, step, adamw_key(SEED, tensor, step));
}

// ---- 8 bits ----------------------------------------------------------------------------------
// A moment is a float of 8 bits times the largest of its 256 neighbours: m a sign, 4 bits of exponent and 3 of mantissa, v 5
// and 3. So each number has its own precision, be it a hundredth of the largest; a linear code, of 1/255 of the largest,
// makes a third of v zeros where the gradients of a block span two decades, and a zero there is a division by eps. Rounded at
// random, or moments that change by a thousandth a step would stand still; v never to zero. Each rounding moves m by 3.7 % of
// itself, sqrt(v) by 1.9 %, root mean square, and sqrt(v) by 6.1 % at most; on the mean by nothing

// the largest code stands for 1.875. Numbers are scaled to a hair below it: then rounding never goes beyond
static const float CODE_SCALE = 1.874999f, CODE_UNIT = 1 / 1.875f;

__host__ __device__ static inline float code_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    return float_from_bits(bits);
#endif
}
__host__ __device__ static inline uint32_t code_bits(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    return bits_of_float(x);
#endif
}

// 2^exponent
__host__ __device__ static inline float code_power(int exponent) {
    return code_float((uint32_t)(127 + exponent) << 23);
}

// unit: the block's largest number * CODE_UNIT. The exponent and mantissa of the code become those of a float
__host__ __device__ static inline float decode_m(uint8_t code, float unit) {
    const int32_t bits = (int32_t)((uint32_t)code << 24) >> 4; // the sign goes along
    return code_float((uint32_t)bits & 0x87f00000u) * code_power(112) * unit;
}
__host__ __device__ static inline float decode_v(uint8_t code, float unit) {
    return code_float((uint32_t)code << 20) * code_power(96) * unit;
}

// inverse: CODE_SCALE / the block's largest number. 20 random bits are added below the last place of the code
__host__ __device__ static inline uint8_t encode_m(float x, float inverse, uint32_t random) {
    const uint32_t size = code_bits(fabsf(x) * inverse * code_power(-112)) + (random & 0xfffffu);
    return (uint8_t)(size >> 20 | (code_bits(x) >> 24 & 0x80));
}
__host__ __device__ static inline uint8_t encode_v(float x, float inverse, uint32_t random) {
    const uint32_t code = (code_bits(x * inverse * code_power(-96)) + (random & 0xfffffu)) >> 20;
    return (uint8_t)(code ? code : 1);
}

// 32 random bits for parameter i: two share a hash. m is rounded with the lower ones, v with the upper, w with those between
__host__ __device__ static inline uint32_t lean_bits(uint64_t key, uint64_t i) {
    return (uint32_t)(adamw_bits(key, i / 2) >> (i % 2 * 32));
}

// ---- the CPU's rows --------------------------------------------------------------------------

// a row is BLOCK numbers of the arrays
static int64_t rows(const Problem* p) { return (int64_t)(p->padded / BLOCK); }

// what the block's codes stand for, in place of what was computed; returns the largest
static float recode(float* x, int n, const uint32_t* random, bool is_v) {
    float most = 0;
    for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(x[i]));
    const float inverse = most > 0 ? CODE_SCALE / most : 0, unit = most * CODE_UNIT;
    for (int i = 0; i < n; i++)
        x[i] = is_v ? decode_v(encode_v(x[i], inverse, random[i] >> 12), unit)
                    : decode_m(encode_m(x[i], inverse, random[i]), unit);
    return most;
}

static void reference_row(Bench* b, const Problem* p, size_t first, uint64_t tensor) {
    const Segment t = p->tensors[tensor];
    const int n = (int)std::min<size_t>(BLOCK, t.n - (first - t.first));
    float w[BLOCK], m[BLOCK], v[BLOCK], m_max = 0, v_max = 0;
    const float *g = b->host(p->g, first, n), scale = *b->host(p->grad_scale);
    const float* w0 = p->master ? b->host(p->full, first, n) : b->host(p->w, first, n);
    memcpy(w, w0, sizeof(float) * n);
    if (p->eight_bits) {
        const float unit_m = *b->host(p->m_max, first / BLOCK, 1) * CODE_UNIT,
                    unit_v = *b->host(p->v_max, first / BLOCK, 1) * CODE_UNIT;
        const uint8_t *m8 = b->stored(p->m8) + first, *v8 = b->stored(p->v8) + first;
        for (int i = 0; i < n; i++) m[i] = decode_m(m8[i], unit_m), v[i] = decode_v(v8[i], unit_v);
    } else {
        memcpy(m, p->m ? b->host(p->m, first, n) : b->host(p->m16, first, n), sizeof(float) * n);
        memcpy(v, p->v ? b->host(p->v, first, n) : b->host(p->v16, first, n), sizeof(float) * n);
    }
    for (int step = STEP; step < STEP + p->steps; step++) {
        const uint64_t key = adamw_key(SEED, tensor, step), from = first - t.first;
        uint32_t lean[BLOCK];
        adamw_cpu(w, m, v, g, (size_t)n, LR, BETA1, BETA2, EPS, t.decays ? DECAY : 0, step, scale);
        for (int i = 0; i < n; i++) {
            const uint64_t random = adamw_bits(key, from + i);
            lean[i] = lean_bits(key, from + i);
            if (p->m16) m[i] = bf16_to_float(adamw_round(m[i], (uint32_t)random));
            if (p->m16) v[i] = bf16_to_float(adamw_round(v[i], (uint32_t)(random >> 16)));
            if (!p->master && sizeof(floatX) == 2)
                w[i] = bf16_to_float(adamw_round(w[i], p->eight_bits ? lean[i] >> 8 : (uint32_t)(random >> 32)));
        }
        if (p->eight_bits) m_max = recode(m, n, lean, false), v_max = recode(v, n, lean, true);
    }
    b->expect(p->w, first, w, n);
    if (p->full) b->expect(p->full, first, w, n);
    if (p->m) b->expect(p->m, first, m, n), b->expect(p->v, first, v, n);
    if (p->m16) b->expect(p->m16, first, m, n), b->expect(p->v16, first, v, n);
    if (p->m8) b->expect(p->m_max, first / BLOCK, &m_max, 1), b->expect(p->v_max, first / BLOCK, &v_max, 1);
}

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; row++)
        for (size_t i = 0; i < p->tensors.size(); i++) {
            const Segment t = p->tensors[i];
            const size_t at = (size_t)row * BLOCK;
            if (at >= t.first && at < t.first + t.n) reference_row(b, p, at, i);
        }
}

// ---- what the launchers share ----------------------------------------------------------------

// calls launch(tensor, its AdamWStep) for each tensor, as training does, and for each step of the problem
template <typename Launch>
static void each_tensor(const Problem* p, Launch launch) {
    for (int step = STEP; step < STEP + p->steps; step++)
        for (size_t i = 0; i < p->tensors.size(); i++) launch(p->tensors[i], step_of(p->tensors[i], i, step));
}

// launch is a template on how moments are stored and whether there are master weights
#define EACH_KIND(launch, ...)                                                                                         \
    do {                                                                                                               \
        if (p->m && p->master) launch<float, true>(__VA_ARGS__, p->m, p->v);                                           \
        if (p->m && !p->master) launch<float, false>(__VA_ARGS__, p->m, p->v);                                         \
        if (p->m16 && p->master) launch<__nv_bfloat16, true>(__VA_ARGS__, p->m16, p->v16);                             \
        if (p->m16 && !p->master) launch<__nv_bfloat16, false>(__VA_ARGS__, p->m16, p->v16);                           \
    } while (0)

static const char* refuses_codes(const Problem* p) { return p->eight_bits ? "moments are not codes" : NULL; }
static const char* refuses_all_but_master(const Problem* p) {
    return p->m && p->master ? NULL : "for master weights and fp32 moments";
}

// what the moments take from a weight. LEAN: a root and an inverse of one instruction each, wrong by 2^-22 at most; then
// s.root is 1 / root
template <bool LEAN>
__device__ __forceinline__ float change(float m, float v, const AdamWStep& s) {
    float root, inverse;
    if (!LEAN) return s.step_size * m / (sqrtf(v) / s.root + s.eps);
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(root * s.root + s.eps));
    return s.step_size * m * inverse;
}

// are numbers rounded at random?
template <typename M, bool MASTER>
static const bool AT_RANDOM = sizeof(M) == 2 || (!MASTER && sizeof(floatX) == 2);

// one parameter and its random bits
template <typename M, bool MASTER, bool LEAN = false>
__device__ __forceinline__ void update(floatX& w, float& full, M& m, M& v, floatX g, const AdamWStep& s, float scale,
                                       uint64_t random) {
    const float grad = to_float(g) * scale, old_m = to_float(m);
    const float new_m = old_m + s.mix1 * (grad - old_m), new_v = to_float(v) * s.beta2 + s.mix2 * grad * grad;
    full = (MASTER ? full : to_float(w)) * s.keep - change<LEAN>(new_m, new_v, s);
    adamw_store(m, new_m, random), adamw_store(v, new_v, random >> 16);
    if (MASTER)
        w = from_float<floatX>(full);
    else
        adamw_store(w, full, random >> 32);
}

// ---- kernel_per_formula ----------------------------------------------------------------------
// idea    one kernel for each line of the formula, and one that rounds the master weights: what a framework does that has no
//         optimizer of its own
// limit   42 bytes for each parameter instead of 28: the gradient is read twice, each moment and the weights once more

static __global__ void formula_m_kernel(float* m, const floatX* g, size_t n, float mix, const float* scale) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) m[i] += mix * (to_float(g[i]) * *scale - m[i]);
}
static __global__ void formula_v_kernel(float* v, const floatX* g, size_t n, float beta, float mix,
                                        const float* scale) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float grad = to_float(g[i]) * *scale;
    v[i] = v[i] * beta + mix * grad * grad;
}
static __global__ void formula_w_kernel(float* full, const float* m, const float* v, size_t n, AdamWStep s) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) full[i] = full[i] * s.keep - s.step_size * m[i] / (sqrtf(v[i]) / s.root + s.eps);
}
static __global__ void formula_round_kernel(floatX* w, const float* full, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) w[i] = from_float<floatX>(full[i]);
}

static void kernel_per_formula(const Problem* p, int block, cudaStream_t stream) {
    each_tensor(p, [&](const Segment& t, const AdamWStep& s) {
        const unsigned grid = (unsigned)ceil_div((int64_t)t.n, block), threads = (unsigned)block;
        float *m = p->m + t.first, *v = p->v + t.first, *full = p->full + t.first;
        formula_m_kernel<<<grid, threads, 0, stream>>>(m, p->g + t.first, t.n, s.mix1, p->grad_scale);
        launch_check();
        formula_v_kernel<<<grid, threads, 0, stream>>>(v, p->g + t.first, t.n, s.beta2, s.mix2, p->grad_scale);
        launch_check();
        formula_w_kernel<<<grid, threads, 0, stream>>>(full, m, v, t.n, s);
        launch_check();
        formula_round_kernel<<<grid, threads, 0, stream>>>(p->w + t.first, full, t.n);
        launch_check();
    });
}

// ---- one_each --------------------------------------------------------------------------------
// idea    all of it in one kernel, one thread for each parameter: what is stored is touched once
// limit   4 loads and 4 stores of 4 bytes at most for each thread: there are not enough threads to fill the memory's pipes

template <typename M, bool MASTER>
static __global__ void one_each_kernel(floatX* w, float* full, M* m, M* v, const floatX* g, size_t n, AdamWStep s,
                                       const float* grad_scale) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float master = MASTER ? full[i] : 0;
    floatX weight = MASTER ? floatX() : w[i];
    M new_m = m[i], new_v = v[i];
    update<M, MASTER>(weight, master, new_m, new_v, g[i], s, *grad_scale,
                      AT_RANDOM<M, MASTER> ? adamw_bits(s.key, i) : 0);
    w[i] = weight, m[i] = new_m, v[i] = new_v;
    if (MASTER) full[i] = master;
}

template <typename M, bool MASTER>
static void one_each_launch(const Problem* p, int block, cudaStream_t stream, M* m, M* v) {
    each_tensor(p, [&](const Segment& t, const AdamWStep& s) {
        one_each_kernel<M, MASTER><<<(unsigned)ceil_div((int64_t)t.n, block), (unsigned)block, 0, stream>>>(
            p->w + t.first, MASTER ? p->full + t.first : NULL, m + t.first, v + t.first, p->g + t.first, t.n, s,
            p->grad_scale);
        launch_check();
    });
}

static void one_each(const Problem* p, int block, cudaStream_t stream) { EACH_KIND(one_each_launch, p, block, stream); }

// ---- launch_each -----------------------------------------------------------------------------
// idea    16 bytes of the widest type for a lane, twice, so that a warp's accesses leave no gaps and several are under way
// limit   a launch for each tensor: while its last blocks run, most of the GPU is idle. Of four layers of the 1B model that
//         is 8 % of the time, of a small model nearly all of it

// Each thread updates COUNT neighbours twice, a block's width apart, so that its loads are in flight together. Grid: n over
// 2 * COUNT * threads
template <typename M, bool MASTER, int COUNT>
static __global__ void __launch_bounds__(256) launch_each_kernel(floatX* w, float* master, M* m, M* v, const floatX* g,
                                                                 size_t n, AdamWStep s, const float* grad_scale) {
    const float scale = *grad_scale;
    AdamWPack<floatX, COUNT> wi[2], gi[2];
    AdamWPack<float, COUNT> full[2];
    AdamWPack<M, COUNT> mi[2], vi[2];
    size_t start[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        start[j] = (((size_t)blockIdx.x * 2 + j) * blockDim.x + threadIdx.x) * COUNT;
        if (start[j] >= n) continue;
        gi[j] = *(const AdamWPack<floatX, COUNT>*)(g + start[j]);
        mi[j] = *(const AdamWPack<M, COUNT>*)(m + start[j]);
        vi[j] = *(const AdamWPack<M, COUNT>*)(v + start[j]);
        if (MASTER)
            full[j] = *(const AdamWPack<float, COUNT>*)(master + start[j]);
        else
            wi[j] = *(const AdamWPack<floatX, COUNT>*)(w + start[j]);
    }
    if (!isfinite(scale)) return;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (start[j] >= n) continue;
        for (int k = 0; k < COUNT; k++) {
            const uint64_t random =
                sizeof(M) == 2 || (!MASTER && sizeof(floatX) == 2) ? adamw_bits(s.key, start[j] + k) : 0;
            const float grad = to_float(gi[j].x[k]) * scale, old_m = to_float(mi[j].x[k]);
            const float new_m = old_m + s.mix1 * (grad - old_m);
            const float new_v = to_float(vi[j].x[k]) * s.beta2 + s.mix2 * grad * grad;
            const float old_w = MASTER ? full[j].x[k] : to_float(wi[j].x[k]);
            const float new_w = old_w * s.keep - s.step_size * new_m / (sqrtf(new_v) / s.root + s.eps);
            adamw_store(mi[j].x[k], new_m, random);
            adamw_store(vi[j].x[k], new_v, random >> 16);
            full[j].x[k] = new_w;
            if (MASTER)
                wi[j].x[k] = from_float<floatX>(new_w);
            else
                adamw_store(wi[j].x[k], new_w, random >> 32);
        }
        *(AdamWPack<M, COUNT>*)(m + start[j]) = mi[j];
        *(AdamWPack<M, COUNT>*)(v + start[j]) = vi[j];
        *(AdamWPack<floatX, COUNT>*)(w + start[j]) = wi[j];
        if (MASTER) *(AdamWPack<float, COUNT>*)(master + start[j]) = full[j];
    }
}

template <typename M, bool MASTER, int COUNT>
static void launch_each_kind(const Problem* p, cudaStream_t stream, M* m, M* v) {
    each_tensor(p, [&](const Segment& t, const AdamWStep& s) {
        launch_each_kernel<M, MASTER, COUNT><<<(unsigned)ceil_div((int64_t)t.n, 2 * COUNT * 256), 256, 0, stream>>>(
            p->w + t.first, MASTER ? p->full + t.first : NULL, m + t.first, v + t.first, p->g + t.first, t.n, s,
            p->grad_scale);
        launch_check();
    });
}

template <typename M, bool MASTER>
static void launch_each_launch(const Problem* p, cudaStream_t stream, M* m, M* v) {
    launch_each_kind<M, MASTER, !MASTER && sizeof(M) == 2 && sizeof(floatX) == 2 ? 8 : 4>(p, stream, m, v);
}

static void launch_each(const Problem* p, int, cudaStream_t stream) { EACH_KIND(launch_each_launch, p, stream); }

// ---- packs_of_gradients ----------------------------------------------------------------------
// idea    16 bytes of gradients for a thread, 8 parameters, and 32 bytes of each fp32 array: the same kernel, with 8
//         neighbours where it takes 4
// limit   a load of fp32 then leaves gaps of 16 bytes between the lanes; the next load fills them, out of L1 or not. And two
//         packs of each array in flight are more registers than let eight blocks run

static void packs_of_gradients(const Problem* p, int, cudaStream_t stream) {
    launch_each_kind<float, true, 8>(p, stream, p->m, p->v);
}

// ---- segments --------------------------------------------------------------------------------
// idea    one launch for all tensors. Each begins at a multiple of 2048 parameters, so that a block has one owner, which a
//         table names; where a tensor ends and whether it decays is looked up while the numbers are already on their way. A
//         small model has nothing but small tensors, and each launch of its own has a tail in which most of the GPU is idle
// limit   memory, with 28 bytes a parameter; the arithmetic, with 14

// stores 4, 8 or 16 bytes if ok, without a branch: behind a branch that waits for a look-up the compiler puts all loads, too,
// and what should be one latency becomes three in a row
template <typename T>
__device__ __forceinline__ void store_if(bool ok, T* p, const T& x) {
    uint32_t v[sizeof(T) / 4];
    memcpy(v, &x, sizeof x);
    if constexpr (sizeof(T) == 32) {
        asm volatile("{ .reg .pred ok; setp.ne.b32 ok, %0, 0; @ok st.global.v4.b32 [%1], {%2, %3, %4, %5};\n"
                     "@ok st.global.v4.b32 [%1 + 16], {%6, %7, %8, %9}; }" ::"r"((int)ok),
                     "l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(v[4]), "r"(v[5]), "r"(v[6]), "r"(v[7])
                     : "memory");
    } else if constexpr (sizeof(T) == 16) {
        asm volatile(
            "{ .reg .pred ok; setp.ne.b32 ok, %0, 0; @ok st.global.v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"((int)ok),
            "l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
            : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("{ .reg .pred ok; setp.ne.b32 ok, %0, 0; @ok st.global.v2.b32 [%1], {%2, %3}; }" ::"r"((int)ok),
                     "l"(p), "r"(v[0]), "r"(v[1])
                     : "memory");
    } else {
        asm volatile("{ .reg .pred ok; setp.ne.b32 ok, %0, 0; @ok st.global.b32 [%1], %2; }" ::"r"((int)ok), "l"(p),
                     "r"(v[0])
                     : "memory");
    }
}

// two packs of COUNT for a thread: 256 threads for packs of 4, 128 for packs of 8
template <typename M, bool MASTER, bool LEAN, int COUNT>
static __global__ void __launch_bounds__(CHUNK / (2 * COUNT))
    segments_kernel(floatX* w, float* full, M* m, M* v, const floatX* g, const Segment* segments,
                    const uint16_t* owners, AdamWStep s, uint64_t seed, uint64_t step, const float* grad_scale) {
    const size_t chunk = (size_t)blockIdx.x * CHUNK;
    AdamWPack<floatX, COUNT> wi[2], gi[2];
    AdamWPack<float, COUNT> fi[2];
    AdamWPack<M, COUNT> mi[2], vi[2];
#pragma unroll
    for (int j = 0; j < 2;
         j++) { // what lies behind the end of a tensor may be read: the next one begins where this chunk ends
        const size_t i = chunk + (j * blockDim.x + threadIdx.x) * COUNT;
        gi[j] = *(const AdamWPack<floatX, COUNT>*)(g + i);
        mi[j] = *(const AdamWPack<M, COUNT>*)(m + i), vi[j] = *(const AdamWPack<M, COUNT>*)(v + i);
        if (MASTER)
            fi[j] = *(const AdamWPack<float, COUNT>*)(full + i);
        else
            wi[j] = *(const AdamWPack<floatX, COUNT>*)(w + i);
    }
    __syncwarp(); // loads stay above it: or some are put off, to save registers
    const float scale = *grad_scale;
    const int tensor = owners[blockIdx.x];
    const Segment segment = segments[tensor];
    if (!segment.decays) s.keep = 1;
    const uint64_t key = random_bits(seed, (uint64_t)tensor, step);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const size_t i = chunk + (j * blockDim.x + threadIdx.x) * COUNT, own = i - segment.first;
        const bool ok = own < segment.n && isfinite(scale);
        for (int k = 0; k < COUNT; k++) {
            const uint64_t random = AT_RANDOM<M, MASTER> ? adamw_bits(key, own + k) : 0;
            update<M, MASTER, LEAN>(wi[j].x[k], fi[j].x[k], mi[j].x[k], vi[j].x[k], gi[j].x[k], s, scale, random);
        }
        store_if(ok, (AdamWPack<M, COUNT>*)(m + i), mi[j]);
        store_if(ok, (AdamWPack<M, COUNT>*)(v + i), vi[j]);
        store_if(ok, (AdamWPack<floatX, COUNT>*)(w + i), wi[j]);
        if (MASTER) store_if(ok, (AdamWPack<float, COUNT>*)(full + i), fi[j]);
    }
}

// lean: bf16 moments only
template <typename M, bool MASTER>
static void segments_launch(const Problem* p, bool lean, cudaStream_t stream, M* m, M* v) {
    constexpr int COUNT = sizeof(M) == 2 && sizeof(floatX) == 2 && !MASTER ? 8 : 4;
    const auto kernel =
        lean ? segments_kernel<M, MASTER, sizeof(M) == 2, COUNT> : segments_kernel<M, MASTER, false, COUNT>;
    for (int step = STEP; step < STEP + p->steps; step++) {
        AdamWStep s = adamw_step(LR, BETA1, BETA2, EPS, DECAY, step, 0);
        if (lean) s.root = 1 / s.root;
        kernel<<<(unsigned)(p->padded / CHUNK), CHUNK / (2 * COUNT), 0, stream>>>(
            p->w, p->full, m, v, p->g, p->segments, p->owners, s, SEED, (uint64_t)step, p->grad_scale);
        launch_check();
    }
}

static void segments(const Problem* p, int, cudaStream_t stream) { EACH_KIND(segments_launch, p, false, stream); }

// ---- lean ------------------------------------------------------------------------------------
// idea    the narrower the storage, the more the arithmetic weighs: a root and two quotients, right to the last bit, are 60
//         instructions with what guards their ends. Here the root and the inverse are single instructions of the special unit,
//         wrong by 2^-22. For bf16 moments alone: with those in fp32 memory is the limit without it, and results stay exact
// limit   memory

static void lean(const Problem* p, int, cudaStream_t stream) {
    if (p->master)
        segments_launch<__nv_bfloat16, true>(p, true, stream, p->m16, p->v16);
    else
        segments_launch<__nv_bfloat16, false>(p, true, stream, p->m16, p->v16);
}

static const char* lean_refuses(const Problem* p) { return p->m16 ? NULL : "for bf16 moments"; }

// ---- eight_bits ------------------------------------------------------------------------------
// idea    moments in 8 bits, see above. A warp has the 256 numbers of a block, so that their largest is known without a
//         barrier; a lane has 4 neighbours and the 4 that lie 128 further on, so that no array is read with gaps
// limit   memory, of which 28 bytes have become 16; and some 60 instructions for each parameter

template <bool MASTER>
static __global__ void __launch_bounds__(256)
    eight_bits_kernel(floatX* w, float* full, uint8_t* m, uint8_t* v, float* m_max, float* v_max, const floatX* g,
                      const Segment* segments, const uint16_t* owners, AdamWStep s, uint64_t seed, uint64_t step,
                      const float* grad_scale) {
    const size_t block = ((size_t)blockIdx.x * 256 + threadIdx.x) / WARP, from = block * BLOCK + threadIdx.x % WARP * 4;
    AdamWPack<floatX, 4> wi[2], gi[2];
    AdamWPack<float, 4> fi[2];
    uint32_t codes_m[2], codes_v[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const size_t i = from + j * (BLOCK / 2);
        gi[j] = *(const AdamWPack<floatX, 4>*)(g + i);
        codes_m[j] = *(const uint32_t*)(m + i), codes_v[j] = *(const uint32_t*)(v + i);
        if (MASTER)
            fi[j] = *(const AdamWPack<float, 4>*)(full + i);
        else
            wi[j] = *(const AdamWPack<floatX, 4>*)(w + i);
    }
    const float unit_m = m_max[block] * CODE_UNIT, unit_v = v_max[block] * CODE_UNIT;
    __syncwarp(); // loads stay above it: or some are put off, to save registers
    const float scale = *grad_scale;
    const int tensor = owners[blockIdx.x];
    const Segment segment = segments[tensor];
    const float keep = segment.decays ? s.keep : 1;
    const uint64_t key = random_bits(seed, (uint64_t)tensor, step);
    float new_m[2][4], new_v[2][4], most_m = 0, most_v = 0;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const bool mine = from + j * (BLOCK / 2) < segment.first + segment.n;
        for (int k = 0; k < 4; k++) {
            const float grad = to_float(gi[j].x[k]) * scale, old_m = decode_m((uint8_t)(codes_m[j] >> 8 * k), unit_m);
            new_m[j][k] = old_m + s.mix1 * (grad - old_m);
            new_v[j][k] = decode_v((uint8_t)(codes_v[j] >> 8 * k), unit_v) * s.beta2 + s.mix2 * grad * grad;
            most_m = fmaxf(most_m, mine ? fabsf(new_m[j][k]) : 0), most_v = fmaxf(most_v, mine ? new_v[j][k] : 0);
        }
    }
    most_m = warp_max(most_m), most_v = warp_max(most_v);
    const float inverse_m = most_m > 0 ? __fdividef(CODE_SCALE, most_m) : 0;
    const float inverse_v = most_v > 0 ? __fdividef(CODE_SCALE, most_v) : 0;
    const bool first = threadIdx.x % WARP == 0 && block * BLOCK < segment.first + segment.n && isfinite(scale);
    store_if(first, m_max + block, most_m), store_if(first, v_max + block, most_v);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const size_t i = from + j * (BLOCK / 2), own = i - segment.first;
        const bool ok = own < segment.n && isfinite(scale);
        uint32_t code_m[4], code_v[4];
        for (int k = 0; k < 4; k++) {
            const uint32_t random = (uint32_t)(adamw_bits(key, own / 2 + k / 2) >> (k % 2 * 32));
            const float old_w = MASTER ? fi[j].x[k] : to_float(wi[j].x[k]);
            fi[j].x[k] = old_w * keep - change<true>(new_m[j][k], new_v[j][k], s);
            code_m[k] = encode_m(new_m[j][k], inverse_m, random);
            code_v[k] = encode_v(new_v[j][k], inverse_v, random >> 12);
            if (MASTER)
                wi[j].x[k] = from_float<floatX>(fi[j].x[k]);
            else
                adamw_store(wi[j].x[k], fi[j].x[k], random >> 8);
        }
        store_if(ok, (uint32_t*)(m + i), code_m[0] | code_m[1] << 8 | code_m[2] << 16 | code_m[3] << 24);
        store_if(ok, (uint32_t*)(v + i), code_v[0] | code_v[1] << 8 | code_v[2] << 16 | code_v[3] << 24);
        store_if(ok, (AdamWPack<floatX, 4>*)(w + i), wi[j]);
        if (MASTER) store_if(ok, (AdamWPack<float, 4>*)(full + i), fi[j]);
    }
}

static void eight_bits(const Problem* p, int, cudaStream_t stream) {
    static_assert(CHUNK == 256 / WARP * BLOCK, "a block of threads has one owner");
    const auto kernel = p->master ? eight_bits_kernel<true> : eight_bits_kernel<false>;
    for (int step = STEP; step < STEP + p->steps; step++) {
        AdamWStep s = adamw_step(LR, BETA1, BETA2, EPS, DECAY, step, 0);
        s.root = 1 / s.root;
        kernel<<<(unsigned)(p->padded / CHUNK), 256, 0, stream>>>(p->w, p->full, p->m8, p->v8, p->m_max, p->v_max, p->g,
                                                                  p->segments, p->owners, s, SEED, (uint64_t)step,
                                                                  p->grad_scale);
        launch_check();
    }
}

static const char* eight_bits_refuses(const Problem* p) { return p->eight_bits ? NULL : "moments are codes"; }

// ---- the table: to add a variant, write it above and add one row ------------------------------

template <typename M, bool MASTER>
static void production_launch(const Problem* p, cudaStream_t stream, M* m, M* v) {
    std::vector<AdamWTensor> tensors;
    for (size_t i = 0; i < p->tensors.size(); i++) {
        const Segment& t = p->tensors[i];
        tensors.push_back(AdamWTensor{ p->w + t.first, MASTER ? p->full + t.first : NULL, m + t.first, v + t.first,
                                       p->g + t.first, t.n, t.decays ? DECAY : 0, (uint64_t)i });
    }
    for (int step = STEP; step < STEP + p->steps; step++)
        adamw_tensors<M>(tensors.data(), (int)tensors.size(), LR, BETA1, BETA2, EPS, step, p->grad_scale, SEED, stream);
}

static void production(const Problem* p, int, cudaStream_t stream) { EACH_KIND(production_launch, p, stream); }

// clang-format off
static const Variant<Problem> variants[] = {
    { "kernel_per_formula", kernel_per_formula, { 256, 512 },  "baseline: a kernel for each line", refuses_all_but_master },
    { "one_each",           one_each,           { 256, 512 },  "one kernel, one thread a parameter", refuses_codes },
    { "launch_each",        launch_each,        { 0 },         "16 bytes a lane; a launch for each tensor", refuses_codes },
    { "packs_of_gradients", packs_of_gradients, { 0 },         "16 bytes of gradients: 8 parameters a thread", refuses_all_but_master },
    { "segments",           segments,           { 0 },         "one launch: a table names the owner of each chunk", refuses_codes },
    { "lean",               lean,               { 0 },         "root and inverse in one instruction each", lean_refuses },
    { "eight_bits",         eight_bits,         { 0 },         "8-bit moments, one launch for all tensors", eight_bits_refuses },
    { "production",         production,         { 0 },         "llmc/adamw.h: one launch, the tensors in its arguments", refuses_codes },
};
// clang-format on
BENCH_MAIN("adamw", shapes, setup, reference, rows, traffic, flops, variants)
