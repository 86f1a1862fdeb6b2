/*
Attention backward, causal and grouped-query: who adds up dQ?

    p[t, j]  = e^(scale * q[t] . k[j] - lse[t])                     dv[j] = sum over t >= j of p[t, j] * dout[t]
    ds[t, j] = p[t, j] * (dout[t] . v[j] - dout[t] . out[t])        dk[j] = scale * sum over t >= j of ds[t, j] * q[t]
                                                                    dq[t] = scale * sum over j <= t of ds[t, j] * k[j]

    qkv dqkv (B*T, (NH + 2*NKV)*HD)      out dout (B*T, NH*HD)      lse (B, NH, T)
    dk and dv are sums over the NH / NKV heads of a group too

The question    a tile of ds is a factor of dk (a sum down its columns) and of dq (a sum along its rows). A block that walks down
                the columns owns dk and dv, and what it has of dq belongs to all the blocks of the row. Added by atomics, dq is
                another at each run; in a fixed order, blocks wait for each other; in a second pass, s and dp are computed
                twice: 7 products instead of 5
FLOPs           5 * B*NH*HD * T^2: five products of 2*HD for each of T^2/2 pairs, whatever a kernel does twice
The floor       at some 700 TFLOP/s: HD 128, B 4, T 4096 is 1.37 TFLOP, 2.0 ms. All arrays together are 0.9 GB, 0.2 ms
Measured        H200, bf16, TFLOP/s, all in one run

                                        1B      1B long     8B      8B long     HD 64, B 4 T 4096; B 2 T 8192; HD 128, the same
                unfused                 38      45          72      88
                dq_atomics              221     229         222     231
                dq_in_order             66      65          61      60
                dq_second_pass          234     238         246     249
                dq_wide_atomics         311     324         306     328
                pairs_of_warps          239     244         263     272
                FlashAttention-2        241     261         277     296
                hopper                  384     414         424     450
                hopper_any_order        403     443         438     472
                production              389     418         428     465         hopper's kernel, run first
                cudnn                   261     286         387     408         reproducible
                cudnn_any_order         375     408         465     492
                dq_wide / FlashAttn-2   1.29    1.24        1.10    1.11
                dq_wide / pairs_of_w.   1.30    1.33        1.16    1.21
                hopper / cudnn          1.47    1.45        1.10    1.10
                hopper / cudnn_any_o.   1.02    1.01        0.91    0.91
                any order, both         1.07    1.09        0.94    0.96

The answer      with mma.sync, nobody, if the bits must be the same at each run: two products more cost less than the atomics of
                dq_atomics, and much less than turns that all warps of a block wait for. Where bits may differ from run to run,
                atomics, with 128 keys to a block and reductions of 16 bytes: dq_wide_atomics is the fastest of the mma.sync
                rows, FlashAttention-2 included. With wgmma, in order: the copy engine adds and one thread waits, while the
                products go on

ncu             8B: the tensor cores work 37 % of the time under dq_atomics, 53 under dq_second_pass, 54 under dq_wide_atomics, 60
                under pairs_of_warps, and 56 at twice the rate under hopper (59 in any order). Fragments keep shared memory
                85 % busy under dq_second_pass, 59 under pairs_of_warps; 5.3 GB go to and from memory under dq_atomics, 2.7
                under pairs_of_warps, 4.2 under hopper (results/nvidia-h200/attention_backward.md)
Look at         lts__t_sectors_op_red (atomics: 4 bytes of fp32 for each 10 FLOPs and key of a tile),
                smsp__average_warps_issue_stalled_barrier (dq_in_order: the wait for a turn), sm__pipe_tensor_cycles_active
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
    { .name = "1B", .B = 4, .T = 4096, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "1B long", .B = 2, .T = 8192, .NH = 32, .NKV = 8, .HD = 64 },
    { .name = "8B", .B = 4, .T = 4096, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "8B long", .B = 2, .T = 8192, .NH = 32, .NKV = 8, .HD = 128 },
    { .name = "one token", .small = true, .B = 1, .T = 1, .NH = 1, .NKV = 1, .HD = 64 },
    { .name = "one key over a tile", .small = true, .B = 2, .T = 129, .NH = 4, .NKV = 2, .HD = 64 },
    { .name = "one short of a tile", .small = true, .B = 3, .T = 63, .NH = 4, .NKV = 4, .HD = 128 },
    { .name = "odd", .small = true, .B = 2, .T = 201, .NH = 6, .NKV = 2, .HD = 128 },
    { .name = "one kv head", .small = true, .B = 3, .T = 577, .NH = 5, .NKV = 1, .HD = 64 },
};

struct Problem {
    AttentionShape s;
    floatX *qkv, *out, *dout, *dqkv;
    float* lse;
    float *dot, *dq; // (B, NH, T); (B*T, NH*HD), or (B, NH, tiles of 64 queries, 64*HD)
    unsigned* turns; // (B, NH, tiles of 64 queries), then the counter of tickets
    char* scratch;
    size_t room; // its bytes
};

static int64_t row_of(const AttentionShape* s) { return (int64_t)(s->NH + 2 * s->NKV) * s->HD; }

// of our own what ships on this card and for this shape: hopper, pairs_of_warps or, in fp32, unfused
static AttentionBackend ours(const Problem* p) {
    Error passed_over;
    return attention_choose(ATTENTION_HOPPER, p->s, true, &passed_over);
}

// what the forward pass left behind is an input here: production computes it
static void make_forward(Bench* bench, Problem* p) {
    const size_t n = (size_t)p->s.B * p->s.T, n_out = n * p->s.NH * p->s.HD, n_lse = n * p->s.NH;
    floatX *out, *host = (floatX*)allocate(n_out, sizeof *host);
    float *lse, *host_lse = (float*)allocate(n_lse, sizeof *host_lse);
    cuda_check(cudaMalloc(&out, n_out * sizeof *out));
    cuda_check(cudaMalloc(&lse, n_lse * sizeof *lse));
    attention_forward(ours(p), out, lse, p->qkv, p->s, p->scratch, bench->stream);
    cuda_check(cudaMemcpyAsync(host, out, n_out * sizeof *out, cudaMemcpyDeviceToHost, bench->stream));
    cuda_check(cudaMemcpyAsync(host_lse, lse, n_lse * sizeof *lse, cudaMemcpyDeviceToHost, bench->stream));
    cuda_check(cudaStreamSynchronize(bench->stream));
    p->out = bench->input_from<floatX>("out", host, n_out);
    p->lse = bench->input_from<float>("lse", host_lse, n_lse);
    cuda_check(cudaFree(out));
    cuda_check(cudaFree(lse));
    free(host), free(host_lse);
}

static Problem setup(Bench* bench, const Shape* s) {
    Problem p;
    p.s = AttentionShape{ s->B, s->T, s->NH, s->NKV, s->HD };
    const size_t n = (size_t)s->B * s->T, n_out = n * s->NH * s->HD;
    // of deviation 2, so that scores deviate by 4 and each query looks at a few keys, wherever they are
    p.qkv = bench->input<floatX>("qkv", n * (size_t)row_of(&p.s), 2);
    p.dout = bench->input<floatX>("dout", n_out);
    p.dqkv = bench->output<floatX>("dqkv", n * (size_t)row_of(&p.s), (double)s->T * s->NH / s->NKV,
                                   2); // p and ds, as factors
    p.dot = bench->scratch<float>(n * s->NH);
    const size_t tiles = (size_t)s->B * s->NH * (size_t)ceil_div(s->T, 64);
    p.dq = bench->scratch<float>(tiles * 64 * s->HD);
    p.turns = (unsigned*)bench->scratch<float>(tiles + 1);
    p.room = attention_scratch(ATTENTION_REFERENCE, p.s, true);
#ifdef USE_CUDNN
    Error why;
    if (attention_supports(ATTENTION_CUDNN, p.s, true, &why))
        p.room = std::max(p.room, attention_scratch(ATTENTION_CUDNN, p.s, true));
#endif
#ifndef PRECISION_FP32
    p.room = std::max(p.room, hopper_attention_scratch(p.s, true));
#endif
    p.scratch = bench->scratch<char>(p.room);
    make_forward(bench, &p);
    return p;
}

// a row of dqkv: the gradients of one token's queries, keys and values
static int64_t rows(const Problem* p) { return (int64_t)p->s.B * p->s.T; }

// one row, straight from the formulas above: attention_backward_cpu computes a sequence or nothing
static void reference_row(Bench* bench, const Problem* p, int64_t row) {
    const int T = p->s.T, NH = p->s.NH, NKV = p->s.NKV, HD = p->s.HD, G = NH / NKV;
    const int64_t ld = row_of(&p->s), ldo = (int64_t)NH * HD, b = row / T, i = row % T;
    const float *x = bench->host(p->qkv, (size_t)(b * T * ld), (size_t)(T * ld)),
                *out = bench->host(p->out, (size_t)(b * T * ldo), (size_t)(T * ldo)),
                *dout = bench->host(p->dout, (size_t)(b * T * ldo), (size_t)(T * ldo)),
                *lse = bench->host(p->lse, (size_t)(b * NH * T), (size_t)NH * T);
    std::vector<double> dx((size_t)ld, 0.0);
    const double scale = 1 / sqrt((double)HD);
    auto dots = [&](const float* a, const float* c) {
        double sum = 0;
        for (int e = 0; e < HD; e++) sum += (double)a[e] * c[e];
        return sum;
    };
#pragma omp parallel for
    for (int g = 0; g < NKV; g++)
        for (int h = g * G; h < (g + 1) * G; h++) {
            double *dq = &dx[(size_t)h * HD], *dk = &dx[(size_t)(NH + g) * HD], *dv = dk + (size_t)NKV * HD;
            auto pair = [&](int64_t t, int64_t j, double* power, double* ds) {
                const float *q = x + t * ld + h * HD, *k = x + j * ld + (NH + g) * HD, *v = k + NKV * HD;
                const float* d = dout + t * ldo + h * HD;
                *power = exp(scale * dots(q, k) - lse[(int64_t)h * T + t]);
                *ds = *power * (dots(d, v) - dots(d, out + t * ldo + h * HD));
            };
            double power, ds;
            for (int64_t j = 0; j <= i; j++) { // this token's query, the keys that it sees
                pair(i, j, &power, &ds);
                for (int e = 0; e < HD; e++) dq[e] += scale * ds * x[j * ld + (NH + g) * HD + e];
            }
            for (int64_t t = i; t < T; t++) { // this token's key, the queries that see it
                pair(t, i, &power, &ds);
                for (int e = 0; e < HD; e++) {
                    dk[e] += scale * ds * x[t * ld + h * HD + e];
                    dv[e] += power * dout[t * ldo + h * HD + e];
                }
            }
        }
    bench->expect(p->dqkv, (size_t)(row * ld), dx.data(), (size_t)ld);
}

static void reference(Bench* bench, const Problem* p, int64_t first, int64_t count) {
    const AttentionShape s = p->s;
    if (count < rows(p)) {
        for (int64_t row = first; row < first + count; row++) reference_row(bench, p, row);
        return;
    }
    const int ld = (int)row_of(&s);
    const size_t k = (size_t)s.NH * s.HD, v = k + (size_t)s.NKV * s.HD, n = (size_t)count * (size_t)ld;
    const float* x = bench->host(p->qkv);
    float* dx = (float*)allocate(n, sizeof *dx);
    attention_backward_cpu(dx, dx + k, dx + v, bench->host(p->dout), x, x + k, x + v, bench->host(p->out),
                           bench->host(p->lse), s.B, s.T, s.NH, s.NKV, s.HD, ld);
    bench->expect(p->dqkv, 0, dx, n);
    free(dx);
}

static double traffic(const Problem* p) {
    return (double)rows(p) * (2.0 * (double)(row_of(&p->s) + p->s.NH * p->s.HD) * sizeof(floatX) + 4.0 * p->s.NH);
}
static double flops(const Problem* p) { return 5.0 * p->s.B * p->s.NH * p->s.HD * p->s.T * p->s.T; }

// ---- unfused ----------------------------------------------------------------------------------
// idea    the formulas as they stand: matrix products of the library, and a kernel for p and ds between them
// limit   four squares of T x T in memory, 12 bytes for each pair, written once and read up to three times: 38 to 88 TFLOP/s

static void unfused(const Problem* p, int, cudaStream_t stream) {
    reference_attention_backward(p->dqkv, p->dout, p->qkv, p->out, p->lse, p->s, p->scratch, stream);
}

#ifndef PRECISION_FP32
// ---- columns: three variants of one kernel ----------------------------------------------------
// 64 keys of one kv head to a block, 16 to each of 4 warps; it walks the queries of each head of the group from the diagonal
// down, 64 at a time, the next tile under way (cp.async):
//
//     S^T = K · Q^T       P^T = e^(S^T - lse)         dP^T = V · dO^T      dS^T = P^T * (dP^T - dot)
//     dV += P^T · dO      dK += dS^T · Q              and, but for DQ_LATER, dQ = dS · K: a product over all keys of the block,
//                                                     so that dS^T passes through shared memory, to be read transposed

enum { COLUMNS_TILE = 64, COLUMNS_THREADS = 128 };
enum { DQ_LATER, DQ_ATOMIC, DQ_IN_ORDER };

// K and V; two buffers of Q and of dO; dS^T; two buffers of lse and of dot
template <int HD>
constexpr size_t columns_shared = (size_t)6 * COLUMNS_TILE* flash_pitch(HD) + COLUMNS_TILE * 128 +
                                  4 * COLUMNS_TILE * sizeof(float);

struct Columns {
    floatX* dqkv;
    float* dq; // fp32: sums of dQ, not scaled
    unsigned *turns, *taken;
    const floatX *dout, *qkv;
    const float *lse, *dot;
    int T, NH, NKV;
    float scale;
};

// two neighbours of dQ, added up by whoever comes
__device__ __forceinline__ void add_atomic(float* to, float x, float y) {
#if __CUDA_ARCH__ >= 900
    atomicAdd((float2*)to, make_float2(x, y));
#else
    atomicAdd(to, x), atomicAdd(to + 1, y);
#endif
}

// the block's number, a ticket: all blocks with lower ones have started. All threads call it
__device__ __forceinline__ unsigned ticket_take(unsigned* taken) {
    __shared__ unsigned ticket;
    if (threadIdx.x == 0) ticket = atomicAdd(taken, 1);
    __syncthreads();
    return ticket;
}

// until blocks before this one have had their turn; all threads call it
__device__ __forceinline__ void turn_wait(const unsigned* turns, unsigned turn) {
    if (threadIdx.x == 0) {
        unsigned now, polls = 0;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turns) : "memory");
            if (++polls == 1u << 25) __trap(); // some 10 s: a mistake is no reason to hang
        } while (now != turn);
    }
    __syncthreads();
}

__device__ __forceinline__ void turn_pass(unsigned* turns, unsigned turn) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turns), "r"(turn + 1) : "memory");
    }
}

template <int HD, int DQ>
static __global__ void __launch_bounds__(COLUMNS_THREADS, HD <= 64 ? 3 : 2) columns_kernel(Columns c) {
    constexpr int N = COLUMNS_TILE;
    constexpr uint32_t TILE = N * flash_pitch(HD);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, T = c.T, G = c.NH / c.NKV;
    const unsigned number = DQ == DQ_IN_ORDER ? ticket_take(c.taken) : blockIdx.y * gridDim.x + blockIdx.x;
    const unsigned head = number % gridDim.x, turn = number / gridDim.x; // of B*NKV heads; the tile of keys
    const int g = head % c.NKV, b = head / c.NKV, j0 = (int)turn * N;
    const size_t ld = (size_t)(c.NH + 2 * c.NKV) * HD, ldo = (size_t)c.NH * HD, row = (size_t)b * T;
    const floatX *k = c.qkv + (row + j0) * ld + (size_t)(c.NH + g) * HD, *v = k + (size_t)c.NKV * HD;
    const uint32_t k_tile = flash_shared(), v_tile = k_tile + TILE, q_tile = v_tile + TILE, do_tile = q_tile + 2 * TILE,
                   ds_tile = do_tile + 2 * TILE, lse_tile = ds_tile + N * 128, dot_tile = lse_tile + 2 * N * 4;
    const uint32_t own = (uint32_t)(warp * 16 * flash_pitch(HD)), by_rows = flash_by_rows<HD>(lane),
                   by_columns = flash_by_columns<HD>(lane);
    auto load = [&](int h, int t0, uint32_t buffer) {
        const size_t at = ((size_t)b * c.NH + h) * T + t0;
        const int i = threadIdx.x % N, rows = T - t0;
        flash_tile_load<HD, N>(q_tile + buffer * TILE, c.qkv + (row + t0) * ld + (size_t)h * HD, ld, rows);
        flash_tile_load<HD, N>(do_tile + buffer * TILE, c.dout + (row + t0) * ldo + (size_t)h * HD, ldo, rows);
        flash_copy((threadIdx.x < N ? lse_tile : dot_tile) + (buffer * N + i) * 4,
                   (threadIdx.x < N ? c.lse : c.dot) + at + (i < rows ? i : 0), i < rows);
    };

    float dk[HD / 8][4] = {}, dv[HD / 8][4] = {};
    const float powers = c.scale * 1.4426950408889634f;
    flash_tile_load<HD, N>(k_tile, k, ld, T - j0);
    flash_tile_load<HD, N>(v_tile, v, ld, T - j0);
    load(g * G, j0, 0);
    uint32_t buffer = 0;
    for (int h = g * G; h < (g + 1) * G; h++)
        for (int t0 = j0; t0 < T; t0 += N, buffer ^= 1) {
            flash_copies_wait();
            __syncthreads();
            if (t0 + N < T)
                load(h, t0 + N, buffer ^ 1);
            else if (h + 1 < (g + 1) * G)
                load(h + 1, j0, buffer ^ 1);
            const uint32_t q = q_tile + buffer * TILE, dout = do_tile + buffer * TILE;
            const uint32_t numbers = (uint32_t)(buffer * N + lane % 4 * 2) * 4;
            float s[N / 8][4] = {}, dp[N / 8][4] = {};
            uint32_t p[N / 16][4];
            rows_dot<HD, N>(s, k_tile + own + by_rows, q + by_columns);
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                float l[2];
                flash_load(l, lse_tile + numbers + n * 32);
#pragma unroll
                for (int e = 0; e < 4; e++) s[n][e] = flash_exp2(s[n][e] * powers - l[e % 2] * 1.4426950408889634f);
            }
            if (t0 == j0) { // the diagonal: queries that do not see the key
                const int key = warp * 16;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (flash_column(n, e, lane) < key + flash_row(0, e, lane)) s[n][e] = 0;
            }
            flash_round<N>(p, s);
            rows_multiply<HD, N>(dv, p, dout + by_rows);
            rows_dot<HD, N>(dp, v_tile + own + by_rows, dout + by_columns);
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                float d[2];
                flash_load(d, dot_tile + numbers + n * 32);
#pragma unroll
                for (int e = 0; e < 4; e++) s[n][e] *= dp[n][e] - d[e % 2];
            }
            flash_round<N>(p, s);
            rows_multiply<HD, N>(dk, p, q + by_rows);
            if (DQ == DQ_LATER) continue;

            // this warp's 16 queries of dQ
            rows_store<N>(ds_tile + warp * 16 * 128, s, lane);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < N; i += 16)
                flash_ldmatrix_transposed(p[i / 16],
                                          ds_tile + i * 128 + (flash_by_columns<64>(lane) ^ (uint32_t)(warp * 32)));
            unsigned* turns = c.turns + ((size_t)b * c.NH + h) * gridDim.y + t0 / N;
            if (DQ == DQ_IN_ORDER && turn) turn_wait(turns, turn);
#pragma unroll
            for (int half = 0; half < HD; half += 64) { // 64 columns at a time: registers
                float dq[8][4] = {};
                rows_multiply<HD, N, 64>(dq, p, k_tile + (by_rows ^ (uint32_t)(2 * half)));
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    const int t = t0 + warp * 16 + flash_row(0, e, lane);
                    if (t >= T) continue;
                    float* to = c.dq + (row + t) * ldo + (size_t)h * HD + half + lane % 4 * 2;
                    floatX* rounded = c.dqkv + (row + t) * ld + (size_t)h * HD + half + lane % 4 * 2;
#pragma unroll
                    for (int n = 0; n < 8; n++) {
                        float2 x = make_float2(dq[n][e], dq[n][e + 1]);
                        if (DQ == DQ_ATOMIC) {
                            add_atomic(to + n * 8, x.x, x.y);
                            continue;
                        }
                        if (turn) { // what the blocks before have added up, past this multiprocessor's cache
                            const float2 before = __ldcg((const float2*)(to + n * 8));
                            x.x += before.x, x.y += before.y;
                        }
                        if (t0 == j0) // the diagonal: the last turn
                            *(uint32_t*)(rounded + n * 8) = flash_pack(x.x * c.scale, x.y * c.scale);
                        else
                            __stcg((float2*)(to + n * 8), x);
                    }
                }
            }
            if (DQ == DQ_IN_ORDER && t0 > j0) turn_pass(turns, turn);
        }
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
        const int j = warp * 16 + flash_row(0, e, lane);
        if (j0 + j >= T) continue;
        floatX *to_k = c.dqkv + (row + j0 + j) * ld + (size_t)(c.NH + g) * HD + lane % 4 * 2,
               *to_v = to_k + (size_t)c.NKV * HD;
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            *(uint32_t*)(to_k + n * 8) = flash_pack(dk[n][e] * c.scale, dk[n][e + 1] * c.scale);
            *(uint32_t*)(to_v + n * 8) = flash_pack(dv[n][e], dv[n][e + 1]);
        }
    }
}

// the queries' part of dqkv is what atomics added up, scaled and rounded: a thread two numbers
static __global__ void __launch_bounds__(256)
    round_dq_kernel(floatX* dqkv, const float* dq, int64_t pairs, int row_pairs, int64_t ld, float scale) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pairs) return;
    const float2 x = ((const float2*)dq)[i];
    *(uint32_t*)(dqkv + i / row_pairs * ld + i % row_pairs * 2) = flash_pack(x.x * scale, x.y * scale);
}

template <int HD, int DQ>
static void columns_launch(const Problem* p, cudaStream_t stream) {
    const AttentionShape s = p->s;
    const int tiles = (int)ceil_div(s.T, COLUMNS_TILE);
    const size_t n_dq = (size_t)s.B * s.T * s.NH * HD;
    const Columns c = { p->dqkv, p->dq,  p->turns, p->turns + (size_t)s.B * s.NH * tiles,
                        p->dout, p->qkv, p->lse,   p->dot,
                        s.T,     s.NH,   s.NKV,    1 / sqrtf((float)HD) };
    flash_backward_dot<HD>(p->dot, p->dout, p->out, s, stream);
    if (DQ == DQ_ATOMIC) cuda_check(cudaMemsetAsync(p->dq, 0, n_dq * sizeof(float), stream));
    if (DQ == DQ_IN_ORDER)
        cuda_check(cudaMemsetAsync(p->turns, 0, ((size_t)s.B * s.NH * tiles + 1) * sizeof(unsigned), stream));
    flash_allow(columns_kernel<HD, DQ>, columns_shared<HD>);
    columns_kernel<HD, DQ>
        <<<dim3((unsigned)(s.B * s.NKV), (unsigned)tiles), COLUMNS_THREADS, columns_shared<HD>, stream>>>(c);
    launch_check();
    if (DQ == DQ_LATER) flash_backward_q<HD>(p->dqkv, p->dout, p->qkv, p->lse, p->dot, s, stream);
    if (DQ != DQ_ATOMIC) return;
    round_dq_kernel<<<(unsigned)ceil_div((int64_t)n_dq / 2, 256), 256, 0, stream>>>(
        p->dqkv, p->dq, (int64_t)n_dq / 2, s.NH * HD / 2, row_of(&p->s), c.scale);
    launch_check();
}

template <int DQ>
static void columns(const Problem* p, cudaStream_t stream) {
    if (p->s.HD == 64)
        columns_launch<64, DQ>(p, stream);
    else
        columns_launch<128, DQ>(p, stream);
}

// ---- dq_atomics -------------------------------------------------------------------------------
// idea    p is computed again from lse, tile by tile; each block owns the dk and dv of 64 keys and adds what it has of dq to an
//         array of fp32 by atomics: five products, nothing of the square in memory. 2.6 to 5.8 times unfused
// limit   the sums come in another order at each run, and so do their last bits; and 32 KB of atomics (HD 128) for each tile
//         meet in the L2 cache, beside an array to be zeroed before and rounded after

static void dq_atomics(const Problem* p, int, cudaStream_t stream) { columns<DQ_ATOMIC>(p, stream); }

// ---- dq_in_order ------------------------------------------------------------------------------
// idea    a counter for each tile of queries says whose turn it is: blocks add in the order of their keys, the same at each run;
//         the first writes, the last (on the diagonal) rounds. A block's number is a ticket, so that it waits only for
//         blocks that have started
// limit   the chain: a tile of dq passes through all the blocks above it one by one, and each turn is a way to the L2 cache and
//         back, with the four warps at a barrier: 60 to 66 TFLOP/s, 0.26 to 0.30 of dq_atomics

static void dq_in_order(const Problem* p, int, cudaStream_t stream) { columns<DQ_IN_ORDER>(p, stream); }

// ---- dq_second_pass ---------------------------------------------------------------------------
// idea    dq by blocks that walk along the rows (the step of pairs_of_warps): they compute S and dP again, and no block needs
//         another. 7 products instead of 5, and still 1.03 to 1.08 times dq_atomics, with the same bits at every run
// limit   registers: dk and dv of 16 keys, s and dp take most of 255 at HD 128, and each fragment of Q and dO that a warp
//         fetches from shared memory serves only 16 keys

static void dq_second_pass(const Problem* p, int, cudaStream_t stream) { columns<DQ_LATER>(p, stream); }

// ---- dq_wide_atomics --------------------------------------------------------------------------
// idea    dq_atomics with what held it back halved: a fragment serves 32 keys, not 16, and a part of dq is the sum over 128 keys,
//         not 64. A warp owns the dk and dv of 32 keys at HD 64; at HD 128 a pair of warps does, as in pairs_of_warps. dS waits in
//         shared memory for the next step, whose barrier is then the only one. dq lies in the order of the accumulators, so
//         that a warp adds 512 neighbouring bytes an instruction (sm_90), and is put in order when it is rounded
// limit   the fifth product: dq is cut into parts of 32 queries by 32 columns, for which shared memory gives 256 bytes a mma
//         (those of pairs_of_warps: 160); at HD 64 68 bytes of a thread's registers spill; and the bits differ from run to run

enum { WIDE_KEYS = 128, WIDE_TILE = 64, WIDE_BUFFERS = 2 }; // of dS: with one, a second barrier a step
__host__ __device__ constexpr int wide_warps(int HD) { return HD / 16; } // of a block; each has 32 x 32 of dQ's 64 x HD

// K and V; two buffers of Q and of dO; dS^T, rows of 64 queries; two buffers of lse and of dot
template <int HD>
constexpr size_t wide_shared = (size_t)(2 * WIDE_KEYS + 4 * WIDE_TILE) * flash_pitch(HD) +
                               WIDE_BUFFERS* WIDE_KEYS * 128 + 4 * WIDE_TILE * sizeof(float);

#if __CUDA_ARCH__ >= 900
#define WIDE_RED 1
#else
#define WIDE_RED 0
#endif

// a warp adds 128 numbers, 4 a lane, to those at `to`: those of a lane are neighbours where an instruction takes four, else 32
// apart
__device__ __forceinline__ void wide_add(float* to, const float (&x)[4], int lane) {
#if WIDE_RED
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + lane * 4), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3]));
#else
#pragma unroll
    for (int e = 0; e < 4; e++) atomicAdd(to + e * WARP + lane, x[e]);
#endif
}

// a warp's p (32, 64), the a of a product, goes to 32 swizzled rows of 128 bytes; at: the rows' flash_by_rows<64>
__device__ __forceinline__ void wide_store(uint32_t at, const uint32_t (&p)[2][4][4], int lane) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
#if WIDE_RED
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             (at ^ (uint32_t)(32 * k)) + m * 16 * 128),
                         "r"(p[m][k][0]), "r"(p[m][k][1]), "r"(p[m][k][2]), "r"(p[m][k][3])
                         : "memory");
#else
            const uint32_t rows = at - flash_by_rows<64>(lane) + (uint32_t)((m * 16 + lane / 4) * 128 + lane % 4 * 4);
#pragma unroll
            for (int i = 0; i < 4; i++)
                flash_store(rows + i % 2 * 8 * 128 + ((2 * k + i / 2) ^ lane / 4) * 16, p[m][k][i]);
#endif
        }
}

__device__ __forceinline__ void wide_load(uint32_t (&p)[2][4][4], uint32_t at) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < 4; k++) flash_ldmatrix(p[m][k], (at ^ (uint32_t)(32 * k)) + m * 16 * 128);
}

// p = P^T, rounded, from S^T; lse: that of this lane's queries, 8 apart
__device__ __forceinline__ void wide_powers(uint32_t (&p)[2][4][4], float (&s)[2][8][4], uint32_t lse, float c) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float l[2];
        flash_load(l, lse + n * 32);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[m][n][e] = flash_exp2(s[m][n][e] * c - l[e % 2] * 1.4426950408889634f);
    }
#pragma unroll
    for (int m = 0; m < 2; m++) flash_round<WIDE_TILE>(p[m], s[m]);
}

// p = dS^T from P^T and dP^T
__device__ __forceinline__ void wide_ds(uint32_t (&p)[2][4][4], const float (&dp)[2][8][4], uint32_t dot) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float d[2];
        flash_load(d, dot + n * 32);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                uint32_t& pe = p[m][n / 2][n % 2 * 2 + e / 2];
                pe = flash_pack(flash_low(pe) * (dp[m][n][e] - d[0]), flash_high(pe) * (dp[m][n][e + 1] - d[1]));
            }
    }
}

// 128 keys of one key/value head; grid (B*NKV, tiles of keys, the first first)
template <int HD>
static __global__ void __launch_bounds__(wide_warps(HD) * WARP, HD <= 64 ? 2 : 1) wide_kernel(Columns x) {
    constexpr int N = WIDE_TILE, WARPS = wide_warps(HD), THREADS = WARPS * WARP;
    constexpr bool PAIRS = HD > 64;
    constexpr uint32_t TILE = N * flash_pitch(HD), DS = WIDE_KEYS * 128;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, T = x.T, G = x.NH / x.NKV;
    const int g = blockIdx.x % x.NKV, b = blockIdx.x / x.NKV, j0 = (int)blockIdx.y * WIDE_KEYS;
    // this warp's 32 keys; of a pair, the first computes P^T and dV, the second dP^T and dK. A scheduler gets one of each
    const int unit = PAIRS ? warp / 2 : warp, first = unit * FLASH_ROWS;
    const bool second = PAIRS && (warp + warp / 4) % 2;
    const int ld = (x.NH + 2 * x.NKV) * HD, ldo = x.NH * HD;
    const size_t row = (size_t)b * T;
    const floatX *k = x.qkv + (row + j0) * ld + (size_t)(x.NH + g) * HD, *v = k + (size_t)x.NKV * HD;
    const uint32_t k_tile = flash_shared(), v_tile = k_tile + 2 * TILE, q_tile = v_tile + 2 * TILE,
                   do_tile = q_tile + 2 * TILE, ds_tile = do_tile + 2 * TILE, lse_tile = ds_tile + WIDE_BUFFERS * DS,
                   dot_tile = lse_tile + 2 * N * 4;
    const uint32_t by_rows = flash_by_rows<HD>(lane), by_columns = flash_by_columns<HD>(lane),
                   own = (uint32_t)(first * flash_pitch(HD)) + by_rows;
    auto load = [&](int h, int t0, uint32_t buffer) {
        const size_t at = ((size_t)b * x.NH + h) * T + t0;
        const int i = threadIdx.x % N, rows = T - t0;
        flash_tile_load<HD, N, THREADS>(q_tile + buffer * TILE, x.qkv + (row + t0) * ld + (size_t)h * HD, ld, rows);
        flash_tile_load<HD, N, THREADS>(do_tile + buffer * TILE, x.dout + (row + t0) * ldo + (size_t)h * HD, ldo, rows);
        if (threadIdx.x < 2 * N)
            flash_copy((threadIdx.x < N ? lse_tile : dot_tile) + (buffer * N + i) * 4,
                       (threadIdx.x < N ? x.lse : x.dot) + at + (i < rows ? i : 0), i < rows);
    };
    // this warp's 32 queries by 32 columns of dQ = dS · K
    auto add = [&](int tile, uint32_t buffer) {
        const uint32_t ds = ds_tile + (WIDE_BUFFERS == 2 ? buffer * DS : 0),
                       a = ds + (flash_by_columns<64>(lane) ^ (uint32_t)(warp % 2 * 64)),
                       right = k_tile + (by_rows ^ (uint32_t)(warp / 2 * 64));
        float dq[2][4][4] = {};
#pragma unroll
        for (int i = 0; i < WIDE_KEYS; i += 16) {
            uint32_t fa[2][4], fb[4];
#pragma unroll
            for (int m = 0; m < 2; m++) flash_ldmatrix_transposed(fa[m], (a ^ (uint32_t)(32 * m)) + i * 128);
#pragma unroll
            for (int n = 0; n < 32; n += 16) {
                flash_ldmatrix_transposed(fb, (right ^ (uint32_t)(2 * n)) + i * flash_pitch(HD));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    flash_mma(dq[m][n / 8], fa[m], fb[0], fb[1]);
                    flash_mma(dq[m][n / 8 + 1], fa[m], fb[2], fb[3]);
                }
            }
        }
        float* to = x.dq + ((size_t)tile * WARPS + warp) * 1024;
#pragma unroll
        for (int i = 0; i < 8; i++) wide_add(to + i * 128, dq[i / 4][i % 4], lane);
    };

    float sum[PAIRS ? 1 : 2][2][HD / 8][4] = {}; // dV, dK; or one of them
    const float c = x.scale * 1.4426950408889634f;
    flash_tile_load<HD, WIDE_KEYS, THREADS>(k_tile, k, ld, T - j0);
    flash_tile_load<HD, WIDE_KEYS, THREADS>(v_tile, v, ld, T - j0);
    load(g * G, j0, 0);
    const int tiles = (T + N - 1) / N;
    uint32_t buffer = 0;
    int to = -1; // the last step's tile of dQ
    for (int h = g * G; h < (g + 1) * G; h++)
        for (int t0 = j0; t0 < T; t0 += N, buffer ^= 1) {
            flash_copies_wait();
            __syncthreads();
            const bool more = t0 + N < T;
            if (more || h + 1 < (g + 1) * G) load(h + !more, more ? t0 + N : j0, buffer ^ 1);
            if (to >= 0) add(to, buffer ^ 1);
            if (WIDE_BUFFERS == 1) __syncthreads();
            to = (b * x.NH + h) * tiles + t0 / N;
            const uint32_t q = q_tile + buffer * TILE, dout = do_tile + buffer * TILE;
            const uint32_t lse = lse_tile + (buffer * N + lane % 4 * 2) * 4, dot = lse + 2 * N * 4;
            const uint32_t mine = ds_tile + (WIDE_BUFFERS == 2 ? buffer * DS : 0) + first * 128 + flash_by_rows<64>(lane);
            float s[2][N / 8][4] = {};
            uint32_t p[2][N / 16][4] = {};
            if (first >= t0 - j0 + N) { // none of these queries sees this warp's keys
                wide_store(mine, p, lane);
                continue;
            }
            flash_dot<HD, N>(s, (second ? v_tile : k_tile) + own, (second ? dout : q) + by_columns);
            if (!second) {
                if (t0 - j0 - first < FLASH_ROWS - 1) flash_mask<N, true>(s, t0 - j0 - first, lane);
                wide_powers(p, s, lse, c);
            }
            if (PAIRS) {
                if (!second) {
                    wide_store(mine, p, lane);
                    asm volatile("bar.arrive %0, 64;" ::"r"(unit + 1) : "memory");
                } else { // dS^T takes the place of P^T
                    asm volatile("bar.sync %0, 64;" ::"r"(unit + 1) : "memory");
                    wide_load(p, mine);
                    wide_ds(p, s, dot);
                    wide_store(mine, p, lane);
                }
                flash_multiply<HD, N>(sum[0], p, (second ? q : dout) + by_rows);
            } else {
                flash_multiply<HD, N>(sum[0], p, dout + by_rows);
                float dp[2][N / 8][4] = {};
                flash_dot<HD, N>(dp, v_tile + own, dout + by_columns);
                wide_ds(p, dp, dot);
                wide_store(mine, p, lane);
                flash_multiply<HD, N>(sum[PAIRS ? 0 : 1], p, q + by_rows);
            }
        }
    __syncthreads();
    add(to, buffer ^ 1);
#pragma unroll
    for (int i = 0; i < (PAIRS ? 1 : 2); i++) {
        const bool is_dk = PAIRS ? second : i == 1;
        const float scale = is_dk ? x.scale : 1;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < HD / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[i][m][n][e] *= scale;
        floatX* dx = x.dqkv + (row + j0 + first) * ld + (size_t)(x.NH + (is_dk ? 0 : x.NKV) + g) * HD;
        // through Q and dO, which no warp reads any more
        flash_tile_store<HD>(dx, ld, T - j0 - first, sum[i], q_tile + warp * FLASH_ROWS * flash_pitch(HD), lane);
    }
}

// dQ in order, scaled and rounded: a block a tile, 8 columns of 2 rows a thread
template <int HD>
static __global__ void __launch_bounds__(wide_warps(HD) * 64)
    wide_round_kernel(floatX* dqkv, const float* dq, int T, int tiles, int NH, int64_t ld, float scale) {
    const int tile = blockIdx.x % tiles, h = blockIdx.x / tiles % NH, b = blockIdx.x / tiles / NH;
    const int n = threadIdx.x % 4, r = threadIdx.x / 4 % 8, m = threadIdx.x / WARP % 2, warp = threadIdx.x / 64;
    const float* from = dq + ((size_t)blockIdx.x * wide_warps(HD) + warp) * 1024 + (m * 4 + n) * 128;
    const int t = tile * WIDE_TILE + warp % 2 * 32 + m * 16 + r;
    floatX* to = dqkv + ((int64_t)b * T + t) * ld + (int64_t)h * HD + warp / 2 * 32 + n * 8;
    float x[4][4]; // the numbers e of the lanes 4*r + i: as wide_add puts them
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float4 four = __ldcs((const float4*)(from + (WIDE_RED ? (4 * r + i) * 4 : i * WARP + 4 * r)));
        const float f[4] = { four.x, four.y, four.z, four.w };
#pragma unroll
        for (int j = 0; j < 4; j++) x[WIDE_RED ? i : j][WIDE_RED ? j : i] = f[j] * scale;
    }
#pragma unroll
    for (int e = 0; e < 4; e += 2)
        if (t + e * 4 < T)
            *(uint4*)(to + e * 4 * ld) = make_uint4(flash_pack(x[0][e], x[0][e + 1]), flash_pack(x[1][e], x[1][e + 1]),
                                                    flash_pack(x[2][e], x[2][e + 1]), flash_pack(x[3][e], x[3][e + 1]));
}

template <int HD>
static void wide_launch(const Problem* p, cudaStream_t stream) {
    const AttentionShape s = p->s;
    const int tiles = (int)ceil_div(s.T, WIDE_TILE);
    const size_t all = (size_t)s.B * s.NH * tiles;
    const Columns c = { p->dqkv, p->dq, NULL, NULL, p->dout, p->qkv, p->lse, p->dot, s.T, s.NH, s.NKV,
                        1 / sqrtf((float)HD) };
    flash_backward_dot<HD>(p->dot, p->dout, p->out, s, stream);
    cuda_check(cudaMemsetAsync(p->dq, 0, all * WIDE_TILE * HD * sizeof(float), stream));
    flash_allow(wide_kernel<HD>, wide_shared<HD>);
    const dim3 grid((unsigned)(s.B * s.NKV), (unsigned)ceil_div(s.T, WIDE_KEYS));
    wide_kernel<HD><<<grid, wide_warps(HD) * WARP, wide_shared<HD>, stream>>>(c);
    launch_check();
    wide_round_kernel<HD><<<(unsigned)all, wide_warps(HD) * 64, 0, stream>>>(p->dqkv, p->dq, s.T, tiles, s.NH,
                                                                            row_of(&p->s), c.scale);
    launch_check();
}

static void dq_wide_atomics(const Problem* p, int, cudaStream_t stream) {
    if (p->s.HD == 64)
        wide_launch<64>(p, stream);
    else
        wide_launch<128>(p, stream);
}

static const char* wide_takes(const Problem* p) {
    int device, most;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return (p->s.HD == 64 ? wide_shared<64> : wide_shared<128>) <= (size_t)most
               ? NULL
               : "needs more shared memory than a block has here";
}

// ---- pairs_of_warps ---------------------------------------------------------------------------
// idea    two warps share 32 keys, one computes P^T and dV, the other dP^T and dK: a fragment serves 32 keys, and the sums of a
//         warp are half as many. dQ in a second pass. What ships where hopper does not run: llmc/attention_flash.cuh
// limit   the instruction: mma.sync reaches half of the tensor cores' rate on Hopper. 239 to 272 TFLOP/s, 1.02 to 1.09 times
//         dq_second_pass

static void pairs_of_warps(const Problem* p, int, cudaStream_t stream) {
    attention_backward(ATTENTION_MMA, p->dqkv, p->dout, p->qkv, p->out, p->lse, p->s, p->scratch, p->room, stream);
}

// ---- hopper -----------------------------------------------------------------------------------
// idea    wgmma: two warpgroups share 128 keys; dS passes through shared memory as a factor of dK and of dQ. Five products: a
//         warp of its own hands parts of dQ to the copy engine, which adds them in the L2 cache, in the order of the keys (turns, as
//         in dq_in_order), while the warpgroups go on; the part of the next step's S that fills the wait is already started.
//         1.6 times pairs_of_warps, 6 to 7 times dq_in_order. Lost: one thread for the turns, which left the warpgroups waiting for
//         it a third of their time (ncu: 27 % of all samples at one barrier; HD 128 365 and 394 TFLOP/s)
// limit   registers: dK, dV, S and dP of 64 keys a warpgroup take 230 of 240, so that little more can overlap: the tensor cores
//         work half of the time (sm__pipe_tensor_cycles_active 46 to 53 %)

static void hopper(const Problem* p, int, cudaStream_t stream) {
    hopper_attention_backward(p->dqkv, p->dout, p->qkv, p->out, p->lse, p->s, true, p->scratch, stream);
}

static const char* hopper_takes(const Problem* p) {
    static Error why;
    return hopper_attention_supports(p->s, &why) ? NULL : why.text;
}

// ---- hopper_any_order -------------------------------------------------------------------------
// idea    nobody waits for a turn: the copy engine adds parts of dQ as they come, on zeros
// limit   other bits at each run; and dQ is cleared before, 4*HD bytes a query and head

static void hopper_any_order(const Problem* p, int, cudaStream_t stream) {
    hopper_attention_backward(p->dqkv, p->dout, p->qkv, p->out, p->lse, p->s, false, p->scratch, stream);
}
#endif

// ---- production -------------------------------------------------------------------------------

static void production(const Problem* p, int, cudaStream_t stream) {
    attention_backward(ours(p), p->dqkv, p->dout, p->qkv, p->out, p->lse, p->s, p->scratch, p->room, stream);
}

#ifdef USE_CUDNN
static void cudnn(const Problem* p, int, cudaStream_t stream) {
    attention_backward(ATTENTION_CUDNN, p->dqkv, p->dout, p->qkv, p->out, p->lse, p->s, p->scratch, p->room, stream);
}

// the library's other kernel, whose bits differ from run to run
static void cudnn_any_order(const Problem* p, int, cudaStream_t stream) {
    attention_fast(true);
    attention_backward(ATTENTION_CUDNN, p->dqkv, p->dout, p->qkv, p->out, p->lse, p->s, p->scratch, p->room, stream);
    attention_fast(false);
}

static const char* cudnn_takes(const Problem* p) {
    static Error why;
    return attention_supports(ATTENTION_CUDNN, p->s, true, &why) ? NULL : why.text;
}
#endif

// ---- the table: to add a variant, write it above and add one row ------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
//    name              launch           block sizes    what changed
    { "unfused",        unfused,         { 0 },         "baseline: cuBLAS and kernels between (llmc/attention_reference.cuh)" },
#ifndef PRECISION_FP32
    { "dq_atomics",     dq_atomics,      { 0 },         "tiles, tensor cores; dq added up by atomics" },
    { "dq_in_order",    dq_in_order,     { 0 },         "dq added up block by block: the same bits at each run" },
    { "dq_second_pass", dq_second_pass,  { 0 },         "dq by blocks of its own, 7 products instead of 5" },
    { "dq_wide_atomics", dq_wide_atomics, { 0 },        "dq_atomics of 128 keys, 32 to a warp or a pair, 16 bytes a lane", wide_takes },
    { "pairs_of_warps", pairs_of_warps,  { 0 },         "llmc/attention_flash.cuh: 32 rows; dq by a second pass" },
    { "hopper",         hopper,          { 0 },         "llmc/attention_hopper.cuh: wgmma, dq added up by the copy engine", hopper_takes },
    { "hopper_any_order", hopper_any_order, { 0 },      "hopper, dq added up as blocks come: no turns", hopper_takes },
#endif
    { "production",     production,      { 0 },         "our own that ships here" },
#ifdef USE_CUDNN
    { "cudnn",          cudnn,           { 0 },         "the library; reproducible", cudnn_takes },
    { "cudnn_any_order", cudnn_any_order, { 0 },        "the library; other bits at each run", cudnn_takes },
#endif
};
// clang-format on
BENCH_MAIN("attention_backward", shapes, setup, reference, rows, traffic, flops, variants)
