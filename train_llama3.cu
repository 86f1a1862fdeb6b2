/*
train_llama3.cu: Llama 3 on one NVIDIA GPU, whole: train, generate, chat, eval, tokenize, detokenize, info.

    make train_llama3cu && ./train_llama3cu          learns to write its own sources, offline, in a minute
    ./train_llama3cu --help

Contents    1 state     2 memory     3 blocks     4 model     5 the model as the commands see it     6 main
Reading     llama3.c first: the same sections and the same names, on the CPU. The kernels are in llmc/<op>.h, below the CPU
            half of each op; what both programs do around the model is llmc/commands.h
Precision   weights, activations and gradients are floatX: bf16 with fp32 master weights, or fp32 (make PRECISION=FP32)
Library     with -DLLAMA3_LIBRARY there is no main; the gpu_ functions of llmc/llama3.h are exported and nothing else
*/
#ifdef LLAMA3_LIBRARY
#define MODEL_API static __attribute__((unused))
#else
#include "llmc/commands.h"
#endif

#include "llmc/adamw.h"
#include "llmc/arena.h"
#include "llmc/attention.h"
#include "llmc/attention_cached.cuh"
#include "llmc/attention_choice.cuh"
#include "llmc/cross_entropy.h"
#include "llmc/embedding.h"
#include "llmc/gpu.cuh"
#include "llmc/llama3.h"
#include "llmc/matmul.h"
#include "llmc/model.h"
#include "llmc/params.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
#include "llmc/swiglu.h"
#include "llmc/timing.cuh"

// ---- 1. state --------------------------------------------------------------------------------

// how much of the forward pass is computed again in the backward pass instead of kept, least first
typedef enum { RECOMPUTE_NONE, RECOMPUTE_NORMS, RECOMPUTE_FFN, RECOMPUTE_BLOCK, KEEP_NOTHING } Recompute;
static const char* const recompute_names[] = { "none", "norms", "ffn", "block" };

// one set of numbers in the shape of the parameters, in the GPU's memory
typedef struct {
    ParamSet set;     // its tensors point at the GPU's memory
    void* memory;
    size_t bytes;
} GpuSet;

// what one layer's backward pass needs of its forward pass. N = B*T rows
typedef struct {
    floatX* x;        // (N, C) residual stream before the layer
    floatX* norm1;    // (N, C)
    float* r1;        // (N)
    floatX* qkv;      // (N, QKV) after RoPE
    float* lse;       // (B, NH, T)
    floatX* att;      // (N, NH*HD)
    // spent once the feed-forward's backward pass is done
    float* r2;        // (N)
    floatX* mid;      // (N, C) residual stream between attention and feed-forward
    floatX* norm2;    // (N, C)
    floatX* gate_up;  // (N, 2F)
    floatX* ffn;      // (N, F)
    size_t spent;     // where those begin in the arena
} LayerActs;

// a place for a batch on its way to the GPU. There are two: one is filled and copied while the pass before reads the other
typedef struct {
    int32_t *host, *device;   // (2, rows) each: ids, then labels, N of each; host is pinned memory, which copies need not wait for
    cudaEvent_t copied, read; // the last copy is done; the last pass that read it is
} Feed;

// what a step adds up, on the GPU
typedef struct {
    double loss;        // the sum over its passes
    float norm, factor; // of the gradients, and what clips them
} StepNumbers;

// everything of a pass through the model but its parameters
typedef struct {
    int B, T;             // of this pass: B*T of at most `rows` rows
    int rows;
    Recompute recompute;
    AttentionBackend attention;
    Error passed_over;    // the faster back ends that do not take these sizes, and why
    LayerActs* layer;     // [L + 1]; what is not kept, the layers share. Of the last entry there is only x, norm1 and r1: the
                          // residual stream after the last layer and the final norm
    Feed feed[2];
    int turn;             // the place that this pass reads, where its
    int32_t *ids, *labels; // lie, (N) each
    float* losses;        // (N)
    floatX* out;          // (N, C) what a block adds to the residual stream
    floatX* logits;       // (head_rows, Vp), of one chunk of rows
    int head_rows;
    float *cos, *sin;     // (positions, HD/2)
    void* scratch;        // of one op at a time
    double* loss;         // of a pass outside of training
    double* sums;         // of squares of the gradients
    StepNumbers* step;

    // gradients, in training: each holds one block's at a time
    floatX *dx, *dnorm;   // (N, C)
    floatX *dqkv, *datt;  // (N, QKV), (N, NH*HD)
    floatX* dffn;         // (N, F)

    // generation: keys and values of the tokens so far, a row k‖v for each
    floatX* cache;        // (L, capacity, 2*NKV*HD); NULL: no cache
    int capacity, pos;    // rows there are, rows in use

    Arena arena;          // block: the GPU's memory
    size_t first, layers; // bytes in it: of the first layer, with what the layers share; of all layers
    size_t spent;         // where what attention_room counts ends in it
} Acts;

struct Model {
    Config c;
    GpuSet w, master, dw, m, v;   // weights, their fp32 originals, gradients, AdamW's moments
    int64_t updates;              // AdamW steps done
    bool dw_empty;                // the gradients are to be overwritten, not added to
    Acts s;                       // of training and evaluation, with room for
    int B, T;                     // B sequences of T tokens
};

struct Sequence {
    const Model* m;
    Acts s;
};

// what the options say of how to compute: read-only once the first model is made
typedef struct {
    Recompute recompute;
    AttentionBackend attention; // N_ATTENTION: the fastest
    bool bf16_moments, master; // master: bf16 weights have fp32 originals
    int64_t logits_bytes;      // that a chunk of the head may have
} Settings;

enum { LOGITS_MOST = 1 << 29, LOGITS_LEAST = 1 << 25 }; // bytes: large products, or little memory

static struct {
    Settings set;
    bool accumulates;            // a step has several passes
    bool chunk_noted;            // logits_bytes is that of the run that is resumed
    cudaStream_t stream, copies; // copies: of batches, while stream computes
    size_t bytes;                // allocated
} gpu = { { RECOMPUTE_NONE, ATTENTION_REFERENCE, false, DTYPE_X == DTYPE_BF16, LOGITS_MOST }, false, false, 0, 0, 0 };

// ---- 2. memory -------------------------------------------------------------------------------

static void* gpu_allocate(size_t bytes, const char* what) {
    void* p = NULL;
    size_t free_bytes = 0, total = 0;
    gpu.bytes += bytes;
    if (cudaMalloc(&p, bytes ? bytes : 1) == cudaSuccess) return p;
    cudaGetLastError();
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    die("out of GPU memory: %.2f GiB asked for %s, %.2f of %.2f GiB are free; try a smaller --batch or --seq, --recompute block, "
        "or --moments bf16", (double)bytes / 0x1p30, what, (double)free_bytes / 0x1p30, (double)total / 0x1p30);
}

static void gpu_free(void* p, size_t bytes) {
    cuda_check(cudaFree(p));
    gpu.bytes -= bytes;
}

// zeros of one type in the shape of the parameters
static GpuSet gpu_set_make(const Config* c, Dtype dtype, const char* what) {
    GpuSet s = { params_list(c), NULL, 0 };
    s.bytes = llama3_place(s.set.list, s.set.n, dtype, NULL);
    s.memory = gpu_allocate(s.bytes, what);
    cuda_check(cudaMemsetAsync(s.memory, 0, s.bytes, gpu.stream));
    llama3_place(s.set.list, s.set.n, dtype, s.memory);
    if (c->tied) s.set.p->lm_head = s.set.p->embed;
    return s;
}

static void gpu_set_free(GpuSet* s) {
    params_free(&s->set);
    gpu_free(s->memory, s->bytes);
    s->memory = NULL;
    s->bytes = 0;
}

// a copy in host memory, to be written to a file or looked at; freed with params_free
static ParamSet gpu_set_download(const GpuSet* s, const Config* c, Dtype dtype) {
    ParamSet host = params_list(c);
    timing_spoil();
    host.memory = allocate(s->bytes, 1);
    llama3_place(host.list, host.n, dtype, host.memory);
    if (c->tied) host.p->lm_head = host.p->embed;
    cuda_check(cudaMemcpyAsync(host.memory, s->memory, s->bytes, cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
    return host;
}

static Dtype gpu_set_dtype(const GpuSet* s) { return s->set.list[0].tensor->dtype; }

// tensor i becomes these numbers, rounded to nearest
static void gpu_set_upload(GpuSet* s, int i, const float* numbers) {
    const Param* p = &s->set.list[i];
    int64_t n = (int64_t)param_size(p);
    const void* from = numbers;
    uint16_t* rounded = NULL;
    if (gpu_set_dtype(s) == DTYPE_BF16) {
        from = rounded = (uint16_t*)allocate((size_t)n, sizeof *rounded);
#pragma omp parallel for
        for (int64_t j = 0; j < n; j++) rounded[j] = float_to_bf16(numbers[j]);
    }
    cuda_check(cudaMemcpyAsync(p->tensor->data, from, (size_t)n * dtype_bytes(gpu_set_dtype(s)), cudaMemcpyHostToDevice, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
    free(rounded);
}

// fills sets (either may be NULL) from the tensors of a file whose names are prefix and the list's
static bool gpu_set_read(GpuSet* a, GpuSet* b, const Config* c, const Safetensors* file, const char* prefix, Error* err) {
    ParamSet mapped = params_list(c);
    bool ok = true;
    for (int i = 0; i < mapped.n && ok; i++) {
        Param p = mapped.list[i];
        params_name(p.name, prefix, mapped.list[i].name);
        float* numbers = (float*)allocate(param_size(&p), sizeof *numbers);
        ok = llama3_map_tensor(&p, file, err) && params_convert(numbers, &p, err);
        if (ok && a && a->memory) gpu_set_upload(a, i, numbers);
        if (ok && b && b->memory) gpu_set_upload(b, i, numbers);
        free(numbers);
    }
    params_free(&mapped);
    return ok;
}

#define KEEP(type, n) ((type*)arena_take(arena, (size_t)(n), sizeof(type)))

// what a layer keeps is its own; the rest it shares with the others, in `shared`
static void layer_layout(LayerActs* a, LayerActs* shared, Arena* arena, const Config* c, size_t N, Recompute recompute) {
    const size_t C = (size_t)c->C, F = (size_t)c->F, Q = (size_t)c->NH * (size_t)c->HD;
    const bool first = a == shared; // the first layer makes what is shared
#define KEEP_BELOW(level, field, type, n) a->field = recompute < (level) || first ? KEEP(type, n) : shared->field
    KEEP_BELOW(KEEP_NOTHING, x, floatX, N * C);
    KEEP_BELOW(KEEP_NOTHING, r1, float, N);
    KEEP_BELOW(RECOMPUTE_NORMS, norm1, floatX, N * C);
    KEEP_BELOW(RECOMPUTE_BLOCK, qkv, floatX, N * (size_t)config_qkv(c));
    KEEP_BELOW(RECOMPUTE_BLOCK, lse, float, N * (size_t)c->NH);
    KEEP_BELOW(RECOMPUTE_BLOCK, att, floatX, N * Q);
    a->spent = arena_end(arena);
    KEEP_BELOW(KEEP_NOTHING, r2, float, N);
    KEEP_BELOW(RECOMPUTE_BLOCK, mid, floatX, N * C);
    KEEP_BELOW(RECOMPUTE_NORMS, norm2, floatX, N * C);
    KEEP_BELOW(RECOMPUTE_NORMS, ffn, floatX, N * F);
    KEEP_BELOW(RECOMPUTE_FFN, gate_up, floatX, N * 2 * F);
#undef KEEP_BELOW
}

// Attention's backward pass finds its scratch in what is spent by then: of its layer from r2 on, of the layers above all of it,
// and what lies behind them up to s->spent. So it costs no memory, and there is more of it with every layer
static size_t attention_room(const Acts* s, int l) { return s->spent - s->layer[l].spent; }

// scratch for whichever op needs most
static size_t scratch_bytes(const Acts* s, const Config* c, int B, int T, bool training) {
    const AttentionShape shape = { B, T, c->NH, c->NKV, c->HD };
    const bool has_room = training && attention_scratch(s->attention, shape, true) <= attention_room(s, c->L - 1);
    size_t most = s->capacity ? attention_cached_scratch(s->capacity, c->NH, c->NKV, c->HD)
                              : attention_scratch(s->attention, shape, training && !has_room);
    if (!training) return most;
    size_t others[] = { embedding_backward_scratch(B * T, c->C), rmsnorm_backward_scratch(c->C) };
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) most = others[i] > most ? others[i] : most;
    return most;
}

static void acts_layout(Acts* s, const Config* c, int B, int T, bool training) {
    const size_t N = (size_t)s->rows, C = (size_t)c->C, Q = (size_t)c->NH * (size_t)c->HD, row = (size_t)(2 * c->NKV * c->HD);
    Arena* arena = &s->arena;
    for (int l = 0; l < c->L; l++) {
        layer_layout(&s->layer[l], &s->layer[0], arena, c, N, s->recompute);
        if (l == 0) s->first = arena->used;
    }
    s->layers = arena->used;
    s->layer[c->L].x = KEEP(floatX, N * C);
    s->layer[c->L].norm1 = KEEP(floatX, N * C);
    s->layer[c->L].r1 = KEEP(float, N);
    s->out = KEEP(floatX, N * C);
    s->logits = KEEP(floatX, (size_t)s->head_rows * (size_t)lm_head_stride(c->V));
    if (training) s->dffn = KEEP(floatX, N * (size_t)c->F);
    s->spent = arena->used;
    for (int i = 0; i < 2; i++) s->feed[i].device = KEEP(int32_t, 2 * N);
    s->losses = KEEP(float, N);
    s->loss = KEEP(double, 1);
    s->cos = KEEP(float, (size_t)T * (size_t)c->HD / 2);
    s->sin = KEEP(float, (size_t)T * (size_t)c->HD / 2);
    s->scratch = KEEP(char, scratch_bytes(s, c, B, T, training));
    if (s->capacity) s->cache = KEEP(floatX, (size_t)c->L * (size_t)s->capacity * row);
    if (!training) return;
    s->sums = (double*)KEEP(char, global_norm_scratch());
    s->step = KEEP(StepNumbers, 1);
    s->dx = KEEP(floatX, N * C);
    s->dnorm = KEEP(floatX, N * C);
    s->dqkv = KEEP(floatX, N * (size_t)config_qkv(c));
    s->datt = KEEP(floatX, N * Q);
}

// rows of a chunk of the head
static int head_rows(const Config* c, int rows) {
    int64_t most = gpu.set.logits_bytes / (lm_head_stride(c->V) * (int64_t)sizeof(floatX)) / 128 * 128;
    return most < 128 ? (rows < 128 ? rows : 128) : most < rows ? (int)most : rows;
}

static Acts acts_begin(const Config* c, int B, int T, int rows, int capacity, bool training) {
    Acts s;
    memset(&s, 0, sizeof s);
    s.rows = rows;
    s.capacity = capacity;
    s.recompute = training ? gpu.set.recompute : KEEP_NOTHING;
    const AttentionShape shape = { B, T, c->NH, c->NKV, c->HD };
    s.attention = capacity ? ATTENTION_REFERENCE
                  : gpu.set.attention == N_ATTENTION
                      ? attention_fastest(shape, training, &s.passed_over, gpu.stream)
                      : attention_choose(gpu.set.attention, shape, training, &s.passed_over);
    s.head_rows = capacity ? 1 : head_rows(c, rows);
    s.layer = (LayerActs*)allocate((size_t)c->L + 1, sizeof *s.layer);
    acts_layout(&s, c, B, T, training);
    return s;
}

static void feeds_make(Acts* s) {
    for (Feed* f = s->feed; f < s->feed + 2; f++) {
        cuda_check(cudaMallocHost((void**)&f->host, 2 * (size_t)s->rows * sizeof *f->host));
        cuda_check(cudaEventCreateWithFlags(&f->copied, cudaEventDisableTiming));
        cuda_check(cudaEventCreateWithFlags(&f->read, cudaEventDisableTiming));
    }
}

static void feeds_free(Acts* s) {
    for (Feed* f = s->feed; f < s->feed + 2; f++) {
        if (!f->host) continue;
        cuda_check(cudaFreeHost(f->host));
        cuda_check(cudaEventDestroy(f->copied));
        cuda_check(cudaEventDestroy(f->read));
    }
}

// sends the ids and labels (N; labels may be NULL) of the next pass. The host waits for the copy of the pass before the last
// one alone, so that a pass is always under way
static void feed_pass(Acts* s, const int32_t* ids, const int32_t* labels, size_t N) {
    const size_t bytes = N * sizeof *ids;
    cuda_check(cudaEventRecord(s->feed[s->turn].read, gpu.stream)); // all that reads it has been launched
    s->turn ^= 1;
    Feed* f = &s->feed[s->turn];
    cuda_check(cudaEventSynchronize(f->copied));
    memcpy(f->host, ids, bytes);
    if (labels) memcpy(f->host + N, labels, bytes);
    cuda_check(cudaStreamWaitEvent(gpu.copies, f->read, 0));
    cuda_check(cudaMemcpyAsync(f->device, f->host, labels ? 2 * bytes : bytes, cudaMemcpyHostToDevice, gpu.copies));
    cuda_check(cudaEventRecord(f->copied, gpu.copies));
    cuda_check(cudaStreamWaitEvent(gpu.stream, f->copied, 0));
    s->ids = f->device;
    s->labels = f->device + N;
}

// room for passes of up to B x T tokens, or, with a capacity, for `rows` tokens at a time of one sequence of T
static Acts acts_make(const Config* c, int B, int T, int rows, int capacity, bool training) {
    Acts s = acts_begin(c, B, T, rows, capacity, training);
    s.arena.block = (char*)gpu_allocate(s.arena.used, "activations");
    cuda_check(cudaMemsetAsync(s.arena.block, 0, s.arena.used, gpu.stream));
    s.arena.used = 0;
    acts_layout(&s, c, B, T, training);
    feeds_make(&s);
    size_t n = (size_t)T * (size_t)c->HD / 2;
    float* table = (float*)allocate(2 * n, sizeof *table);
    rope_table_cpu(table, table + n, T, c->HD, c->theta, c->factor, c->low, c->high, c->original);
    cuda_check(cudaMemcpyAsync(s.cos, table, n * sizeof *table, cudaMemcpyHostToDevice, gpu.stream));
    cuda_check(cudaMemcpyAsync(s.sin, table + n, n * sizeof *table, cudaMemcpyHostToDevice, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
    free(table);
    return s;
}

static void acts_free(Acts* s) {
    free(s->layer);
    gpu_free(s->arena.block, s->arena.used); // waits for the GPU
    feeds_free(s);
    memset(s, 0, sizeof *s);
}

// ---- what training takes, before any of it is taken ------------------------------------------

enum { RESERVE = 512 << 20 }; // bytes that stay free: kernels are loaded when they are first used, a sample has memory of its own

// in bytes
typedef struct {
    double weights, master, gradients, moments;
    double total; // with activations and the workspace of products
    Acts s;       // laid out, not allocated
} Plan;

static double set_bytes(const Config* c, Dtype dtype) {
    ParamSet s = params_list(c);
    const size_t bytes = llama3_place(s.list, s.n, dtype, NULL);
    params_free(&s);
    return (double)bytes;
}

// what does not depend on the batch
static Plan plan_sets(const Config* c) {
    Plan p;
    memset(&p, 0, sizeof p);
    p.weights = p.gradients = set_bytes(c, DTYPE_X);
    p.master = gpu.set.master ? set_bytes(c, DTYPE_F32) : 0;
    p.moments = 2 * set_bytes(c, gpu.set.bf16_moments ? DTYPE_BF16 : DTYPE_F32);
    p.total = p.weights + p.master + p.gradients + p.moments + MATMUL_WORKSPACE;
    return p;
}

static Plan plan_make(const Config* c, int B, int T) {
    Plan p = plan_sets(c);
    p.s = acts_begin(c, B, T, B * T, 0, true);
    p.total += (double)p.s.arena.used;
    free(p.s.layer);
    return p;
}

// that this program may have in all
static double gpu_room(void) {
    size_t free_bytes, total;
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    return (double)free_bytes + (double)gpu.bytes - RESERVE;
}

// whether B x T fits, if need be with a smaller chunk of the head, which then becomes the setting
static bool plan_fits(Plan* p, const Config* c, int B, int T) {
    const int64_t most = gpu.set.logits_bytes;
    const double room = gpu_room();
    *p = plan_make(c, B, T);
    while (p->total > room && gpu.set.logits_bytes > LOGITS_LEAST) {
        gpu.set.logits_bytes /= 2;
        *p = plan_make(c, B, T);
    }
    if (p->total <= room) return true;
    gpu.set.logits_bytes = most;
    return false;
}

// changes settings, B and T to the nearest that fit, what costs least first; tokens are those of a step, which stay
static bool plan_search(Plan* p, const Config* c, int* B, int* T, int64_t tokens) {
    const Settings asked = gpu.set;
    const int B0 = *B, T0 = *T;
    for (int master = asked.master; master >= 0; master--)
        for (*T = T0; *T == T0 || *T >= 64; *T /= 2)
            for (*B = *T == T0 ? B0 : 1; *B >= 1; --*B)
                for (int moments = asked.bf16_moments; moments <= 1; moments++)
                    for (int level = asked.recompute; level < KEEP_NOTHING; level++) {
                        if (tokens % ((int64_t)*B * *T)) continue;
                        gpu.set = asked;
                        gpu.set.master = master, gpu.set.bf16_moments = moments, gpu.set.recompute = (Recompute)level;
                        if (plan_sets(c).total <= gpu_room() && plan_fits(p, c, *B, *T)) return true;
                    }
    return false;
}

// says what would fit; always false
static bool plan_refuse(const Plan* p, const Config* c, int B, int T, int64_t rows, Error* err) {
    const Settings asked = gpu.set;
    const int B0 = B, T0 = T;
    const double GiB = 0x1p30, room = gpu_room();
    Plan fits;
    char batch[96] = "", seq[32] = "";
    if (!plan_search(&fits, c, &B, &T, rows * T))
        return set_error(err, "training takes %.2f GiB of the GPU's memory, %.2f can be had, and no batch of this model fits", p->total / GiB,
                         room / GiB);
    if (T != T0) snprintf(seq, sizeof seq, " --seq %d", T);
    if (B != B0 || T != T0) snprintf(batch, sizeof batch, " --batch %d --total-batch %lld", B, (long long)rows * T0);
    return set_error(err, "training takes %.2f GiB of the GPU's memory, %.2f can be had; this takes %.2f:%s%s%s%s%s%s", p->total / GiB,
                     room / GiB, fits.total / GiB, gpu.set.recompute != asked.recompute ? " --recompute " : "",
                     gpu.set.recompute != asked.recompute ? recompute_names[gpu.set.recompute] : "",
                     gpu.set.bf16_moments != asked.bf16_moments ? " --moments bf16" : "",
                     gpu.set.master != asked.master ? " --master none" : "", batch, seq);
}

static void plan_print(const Config* c, int B, int T) {
    const Plan p = plan_make(c, B, T);
    const double GiB = 0x1p30, logits = (double)p.s.head_rows * lm_head_stride(c->V) * sizeof(floatX);
    const double layers = (double)p.s.layers, first = (double)p.s.first, layer = c->L > 1 ? (layers - first) / (c->L - 1) : layers;
    const double scratch = (double)scratch_bytes(&p.s, c, B, T, true), rest = (double)p.s.arena.used - layers - logits - scratch;
    fprintf(stderr, "memory     weights %.2f, master %.2f, gradients %.2f, moments %.2f, activations %d x %.3f + %.2f GiB (layers, shared)\n",
            p.weights / GiB, p.master / GiB, p.gradients / GiB, p.moments / GiB, c->L, layer / GiB, (first - layer + rest) / GiB);
    fprintf(stderr, "memory     logits of %d rows %.2f, attention and other scratch %.2f GiB; %.2f in all, %.2f more could be had\n",
            p.s.head_rows, logits / GiB, scratch / GiB, p.total / GiB, (gpu_room() - p.total) / GiB);
    fprintf(stderr, "attention  %s%s%s; recompute %s\n", attention_names[p.s.attention], *p.s.passed_over.text ? ", " : "",
            p.s.passed_over.text, recompute_names[p.s.recompute]);
}

// the kernels move 16 bytes at a time
static bool sizes_supported(const Config* c, Error* err) {
    const char* const names[] = { "hidden_size", "intermediate_size", "head_dim" };
    const int sizes[] = { c->C, c->F, c->HD };
    for (int i = 0; i < 3; i++)
        if (sizes[i] % 8) return set_error(err, "%s is %d, on the GPU a multiple of 8 is expected; llama3 takes any", names[i], sizes[i]);
    return true;
}

static floatX* X(Tensor t) { return (floatX*)t.data; }

// ---- 3. blocks -------------------------------------------------------------------------------
// x, the residual stream, comes in as s->layer[l].x with its norm; a block adds what it computes to the stream and leaves the
// sum and its norm for the next. Backward: s->dx is the gradient of the sum on entry, of the stream before the block on return.

static void attention_block_forward(const Config* c, const LayerParams* w, Acts* s, int l) {
    NvtxRange range("attention_block_forward");
    LayerActs* a = &s->layer[l];
    const int N = s->B * s->T, C = c->C, Q = c->NH * c->HD, KV = c->NKV * c->HD, QKV = Q + 2 * KV;
    const AttentionShape shape = { s->B, s->T, c->NH, c->NKV, c->HD };
    matmul_forward(a->qkv, QKV, a->norm1, X(w->q), N, C, QKV, gpu.stream); // q, k and v lie together
    rope_forward(a->qkv, s->cos, s->sin, s->B, s->T, s->pos, c->NH + c->NKV, c->HD, QKV, gpu.stream);
    if (s->cache) {
        floatX* cache = s->cache + (size_t)l * (size_t)s->capacity * 2 * (size_t)KV;
        cuda_check(cudaMemcpy2DAsync(cache + (size_t)s->pos * 2 * (size_t)KV, 2 * (size_t)KV * sizeof(floatX), a->qkv + Q,
                                     (size_t)QKV * sizeof(floatX), 2 * (size_t)KV * sizeof(floatX), (size_t)N,
                                     cudaMemcpyDeviceToDevice, gpu.stream));
        attention_cached(a->att, a->qkv, cache, s->T, s->pos, c->NH, c->NKV, c->HD, QKV, s->scratch, gpu.stream);
    } else {
        attention_forward(s->attention, a->att, a->lse, a->qkv, shape, s->scratch, gpu.stream);
    }
    matmul_forward(s->out, C, a->att, X(w->o), N, Q, C, gpu.stream);
    residual_rmsnorm_forward(a->mid, a->norm2, a->r2, a->x, s->out, X(w->ffn_norm), N, C, c->eps, gpu.stream);
}

static void attention_block_backward(const Config* c, const LayerParams* w, LayerParams* dw, Acts* s, int l, bool add) {
    NvtxRange range("attention_block_backward");
    const LayerActs* a = &s->layer[l];
    const int N = s->B * s->T, C = c->C, Q = c->NH * c->HD, QKV = config_qkv(c);
    const AttentionShape shape = { s->B, s->T, c->NH, c->NKV, c->HD };
    const size_t least = attention_scratch(s->attention, shape, true), room = attention_room(s, l);
    void* scratch = room < least ? s->scratch : s->arena.block + a->spent;
    matmul_dx(s->datt, s->dx, X(w->o), N, Q, C, false, gpu.stream);
    matmul_dw(X(dw->o), s->dx, a->att, N, Q, C, add, gpu.stream);
    attention_backward(s->attention, s->dqkv, s->datt, a->qkv, a->att, a->lse, shape, scratch, room < least ? least : room, gpu.stream);
    rope_backward(s->dqkv, s->cos, s->sin, s->B, s->T, 0, c->NH + c->NKV, c->HD, QKV, gpu.stream);
    matmul_dx(s->dnorm, s->dqkv, X(w->q), N, C, QKV, false, gpu.stream);
    if (s->recompute == RECOMPUTE_NORMS || s->recompute == RECOMPUTE_FFN)
        rmsnorm_again(a->norm1, a->x, a->r1, X(w->attn_norm), N, C, gpu.stream);
    matmul_dw(X(dw->q), s->dqkv, a->norm1, N, C, QKV, add, gpu.stream);
    rmsnorm_backward(s->dx, X(dw->attn_norm), s->dnorm, s->dx, a->x, X(w->attn_norm), a->r1, N, C, s->scratch, gpu.stream);
}

// next_norm: the weights of the norm behind this block, the next layer's or the final one
static void mlp_block_forward(const Config* c, const LayerParams* w, Tensor next_norm, Acts* s, int l) {
    NvtxRange range("mlp_block_forward");
    LayerActs *a = &s->layer[l], *next = &s->layer[l + 1];
    const int N = s->B * s->T, C = c->C, F = c->F;
    matmul_forward(a->gate_up, 2 * F, a->norm2, X(w->gate), N, C, 2 * F, gpu.stream); // gate and up lie together
    swiglu_forward(a->ffn, a->gate_up, N, F, gpu.stream);
    matmul_forward(s->out, C, a->ffn, X(w->down), N, F, C, gpu.stream);
    residual_rmsnorm_forward(next->x, next->norm1, next->r1, a->mid, s->out, X(next_norm), N, C, c->eps, gpu.stream);
}

static void mlp_block_backward(const Config* c, const LayerParams* w, LayerParams* dw, Acts* s, int l, bool add) {
    NvtxRange range("mlp_block_backward");
    const LayerActs* a = &s->layer[l];
    const int N = s->B * s->T, C = c->C, F = c->F;
    matmul_dx(s->dffn, s->dx, X(w->down), N, F, C, false, gpu.stream);
    matmul_dw(X(dw->down), s->dx, a->ffn, N, F, C, add, gpu.stream);
    swiglu_backward(a->gate_up, s->dffn, a->gate_up, N, F, gpu.stream); // the gradient takes the place of gate and up
    matmul_dx(s->dnorm, a->gate_up, X(w->gate), N, C, 2 * F, false, gpu.stream);
    matmul_dw(X(dw->gate), a->gate_up, a->norm2, N, C, 2 * F, add, gpu.stream);
    rmsnorm_backward(s->dx, X(dw->ffn_norm), s->dnorm, s->dx, a->mid, X(w->ffn_norm), a->r2, N, C, s->scratch, gpu.stream);
}

// makes again what the layer's forward pass did not keep
static void recompute_layer(const Config* c, const LayerParams* w, Acts* s, int l) {
    const LayerActs* a = &s->layer[l];
    const int N = s->B * s->T, C = c->C, F = c->F;
    if (s->recompute == RECOMPUTE_BLOCK) {
        rmsnorm_again(a->norm1, a->x, a->r1, X(w->attn_norm), N, C, gpu.stream);
        attention_block_forward(c, w, s, l); // and with it mid and norm2
    } else if (s->recompute >= RECOMPUTE_NORMS) {
        rmsnorm_again(a->norm2, a->mid, a->r2, X(w->ffn_norm), N, C, gpu.stream);
    }
    if (s->recompute >= RECOMPUTE_FFN) matmul_forward(a->gate_up, 2 * F, a->norm2, X(w->gate), N, C, 2 * F, gpu.stream);
    if (s->recompute >= RECOMPUTE_NORMS) swiglu_forward(a->ffn, a->gate_up, N, F, gpu.stream);
}

// the losses of all rows to s->losses; with dw also the gradient of scale * their sum, to s->dnorm and dw
static void head_forward(const Config* c, const Params* w, Params* dw, Acts* s, float scale) {
    NvtxRange range("head_forward");
    lm_head_loss(s->losses, dw ? s->dnorm : NULL, dw ? X(dw->lm_head) : NULL, s->layer[c->L].norm1, X(w->lm_head), s->labels, scale,
                 s->B * s->T, c->C, c->V, s->head_rows, s->logits, NULL, gpu.stream);
}

static void head_backward(const Config* c, const Params* w, Params* dw, Acts* s) {
    const LayerActs* a = &s->layer[c->L];
    rmsnorm_backward(s->dx, X(dw->norm), s->dnorm, NULL, a->x, X(w->norm), a->r1, s->B * s->T, c->C, s->scratch, gpu.stream);
}

// ---- 4. model --------------------------------------------------------------------------------

// ids (B, T) through all layers and the final norm, to s->layer[L]; labels (B, T), or NULL, are for what follows. With a cache,
// B is 1 and the tokens stand at positions s->pos and on
static void llama3_forward(const Model* m, Acts* s, const int32_t* ids, const int32_t* labels, int B, int T) {
    const Config* c = &m->c;
    const Params* w = m->w.set.p;
    const int N = B * T;
    require(N <= s->rows && (!s->cache || (B == 1 && s->pos + T <= s->capacity)), "the pass fits its memory");
    s->B = B;
    s->T = T;
    feed_pass(s, ids, labels, (size_t)N);
    embedding_forward(s->layer[0].x, s->ids, X(w->embed), N, c->C, gpu.stream);
    rmsnorm_forward(s->layer[0].norm1, s->layer[0].r1, s->layer[0].x, X(w->layer[0].attn_norm), N, c->C, c->eps, gpu.stream);
    for (int l = 0; l < c->L; l++) {
        attention_block_forward(c, &w->layer[l], s, l);
        mlp_block_forward(c, &w->layer[l], l + 1 < c->L ? w->layer[l + 1].attn_norm : w->norm, s, l);
    }
}

// waits for the stream and copies what lies on the GPU
static void fetch(void* to, const void* from, size_t bytes) {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
}

// one block; in double, and in a fixed order
static __global__ void __launch_bounds__(1024) add_losses_kernel(double* sum, const float* losses, int N) {
    double part = 0;
    for (int n = threadIdx.x; n < N; n += blockDim.x) part += (double)losses[n];
    part = adamw_block_sum(part);
    if (threadIdx.x == 0) *sum += part;
}

// adds the losses of the pass to a sum on the GPU
static void add_losses(double* sum, const Acts* s) {
    const int N = s->B * s->T;
    GpuOp op("add_losses", (double)N * sizeof(float), 0, gpu.stream);
    add_losses_kernel<<<1, 1024, 0, gpu.stream>>>(sum, s->losses, N);
    launch_check();
}

// after llama3_forward with labels: the sum of the losses
static double llama3_loss(const Model* m, Acts* s) {
    double sum;
    head_forward(&m->c, m->w.set.p, NULL, s, 1);
    cuda_check(cudaMemsetAsync(s->loss, 0, sizeof *s->loss, gpu.stream));
    add_losses(s->loss, s);
    fetch(&sum, s->loss, sizeof sum);
    return sum;
}

// after llama3_forward with labels: adds the gradient of scale * (sum of the losses) to m->dw and that sum to s->step
static void llama3_backward(Model* m, Acts* s, float scale) {
    const Config* c = &m->c;
    Params *w = m->w.set.p, *dw = m->dw.set.p;
    const bool add = !m->dw_empty; // the first products of a layer after an update overwrite; norms, embedding and head are zeros
    head_forward(c, w, dw, s, scale);
    add_losses(&s->step->loss, s);
    head_backward(c, w, dw, s);
    for (int l = c->L - 1; l >= 0; l--) {
        recompute_layer(c, &w->layer[l], s, l);
        mlp_block_backward(c, &w->layer[l], &dw->layer[l], s, l, add);
        attention_block_backward(c, &w->layer[l], &dw->layer[l], s, l, add);
    }
    embedding_backward(X(dw->embed), s->dx, s->ids, s->B * s->T, c->C, c->V, s->scratch, gpu.stream);
    m->dw_empty = false;
}

// a new step: the gradients are empty (what is added to becomes zero, the rest is marked to be overwritten), and so is the loss
static void llama3_begin_step(Model* m) {
    cuda_check(cudaMemsetAsync(m->s.step, 0, sizeof *m->s.step, gpu.stream));
    for (int i = 0; i < m->dw.set.n; i++) {
        const Param* p = &m->dw.set.list[i];
        const bool added_to = !p->rows || p->tensor == &m->dw.set.p->embed || p->tensor == &m->dw.set.p->lm_head;
        const size_t bytes = param_size(p) * sizeof(floatX);
        if (!added_to) continue;
        GpuOp op("clear_gradient", (double)bytes, 0, gpu.stream);
        cuda_check(cudaMemsetAsync(p->tensor->data, 0, bytes, gpu.stream));
    }
    m->dw_empty = true;
}

// the norm of all gradients and what clips it, to s->step, which the host waits for
static StepNumbers llama3_norm(Model* m, float clip) {
    StepNumbers step;
    sum_of_squares(m->s.sums, (const floatX*)m->dw.memory, m->dw.bytes / sizeof(floatX) / 8 * 8, gpu.stream); // padding is zeros
    global_norm(&m->s.step->norm, m->s.sums, clip, gpu.stream);
    fetch(&step, m->s.step, sizeof step);
    timing_step();
    return step;
}

// one AdamW step with m->dw, clipped by s->step
static void llama3_update(Model* m, AdamWOptions o) {
    NvtxRange range("llama3_update");
    const float* factor = &m->s.step->factor;
    const int n = m->w.set.n;
    AdamWTensor* tensors = (AdamWTensor*)allocate((size_t)n, sizeof *tensors);
    m->updates++;
    for (int i = 0; i < n; i++) {
        const Param* p = &m->w.set.list[i];
        AdamWTensor* t = &tensors[i];
        t->w = X(*p->tensor);
        t->master = m->master.memory ? (float*)m->master.set.list[i].tensor->data : NULL;
        t->m = m->m.set.list[i].tensor->data, t->v = m->v.set.list[i].tensor->data;
        t->g = X(*m->dw.set.list[i].tensor);
        t->n = param_size(p);
        t->weight_decay = param_decays(p) ? o.weight_decay : 0;
        t->number = (uint64_t)i;
    }
    if (gpu_set_dtype(&m->m) == DTYPE_BF16)
        adamw_tensors<__nv_bfloat16>(tensors, n, o.lr, o.beta1, o.beta2, o.eps, (int)m->updates, factor, o.seed, gpu.stream);
    else
        adamw_tensors<float>(tensors, n, o.lr, o.beta1, o.beta2, o.eps, (int)m->updates, factor, o.seed, gpu.stream);
    free(tensors);
}

// overwrites logits (V, in host memory) with those of row n
static void llama3_logits(const Model* m, Acts* s, float* logits, int n) {
    const Config* c = &m->c;
    const size_t V = (size_t)c->V;
    const floatX* x = s->layer[c->L].norm1 + (size_t)n * (size_t)c->C;
    matmul_forward(s->logits, lm_head_stride(c->V), x, X(m->w.set.p->lm_head), 1, c->C, c->V, gpu.stream);
    floatX* stored = (floatX*)allocate(V, sizeof *stored);
    fetch(stored, s->logits, V * sizeof *stored);
    const Tensor t = { stored, DTYPE_X };
    for (size_t i = 0; i < V; i++) logits[i] = tensor_get(t, i);
    free(stored);
}

// runs n tokens behind those in the cache, as many at a time as s holds, and overwrites logits (V) with the last one's
static void llama3_feed(const Model* m, Acts* s, const int32_t* ids, int n, float* logits) {
    while (n > 0) {
        const int T = n < s->rows ? n : s->rows;
        llama3_forward(m, s, ids, NULL, 1, T);
        s->pos += T;
        ids += T;
        n -= T;
    }
    llama3_logits(m, s, logits, s->T - 1);
}

enum { PREFILL_ROWS = 512 }; // tokens of a prompt that go through the model at a time

// ---- 5. the model, as llmc/model.h promises it -----------------------------------------------

// a thread a number; the same numbers as llama3_init makes on the CPU
static __global__ void init_kernel(floatX* w, float* master, size_t n, float std, uint64_t seed, uint64_t tensor) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = std != 0 ? std * random_normal(seed, tensor, i) : 1;
    w[i] = from_float<floatX>(x);
    if (master) master[i] = x;
}

// whether there is a GPU that this program runs on
static bool gpu_usable(Error* why) {
    int count = 0, driver = 0, device = 0, major = 0, minor = 0;
    cudaFuncAttributes kernel;
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaErrorInsufficientDriver && (cudaDriverGetVersion(&driver) != cudaSuccess || !driver))
        return set_error(why, "no NVIDIA GPU that this program can use: there is no driver; llama3 runs on the CPU");
    if (code == cudaErrorInsufficientDriver)
        return set_error(why, "the NVIDIA driver is too old: it knows CUDA %d.%d, this program was built with %d.%d; install a newer "
                              "driver, or build with an older toolkit", driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                         CUDART_VERSION % 1000 / 10);
    if (code != cudaSuccess || count == 0)
        return set_error(why, "no NVIDIA GPU that this program can use: %s; llama3 runs on the CPU",
                         code == cudaSuccess ? "none found" : cudaGetErrorString(code));
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (major < 8)
        return set_error(why, "this GPU has compute capability %d.%d, but 8.0 (Ampere) is the least that is supported", major, minor);
    if (cudaFuncGetAttributes(&kernel, init_kernel) == cudaErrorNoKernelImageForDevice)
        return set_error(why, "this GPU has compute capability %d.%d, for which this program was not built: "
                              "make train_llama3cu CUDA_ARCH=%d", major, minor, 10 * (major > 9 ? 10 : major));
    return true;
}

static void gpu_start(void) {
    Error why;
    if (gpu.stream) return;
    if (!gpu_usable(&why)) die("%s", why.text);
    cuda_check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    cuda_check(cudaStreamCreateWithFlags(&gpu.copies, cudaStreamNonBlocking));
    matmul_init();
    gpu.bytes += MATMUL_WORKSPACE;
}

static int index_of(const char* word, const char* const* words, int n) {
    for (int i = 0; i < n; i++)
        if (strcmp(words[i], word) == 0) return i;
    return -1;
}

bool model_configure(const Options* o, Error* err) {
    const bool ours = strcmp(o->attention, "flash") == 0;
    const int wanted = ours ? ATTENTION_HOPPER : index_of(o->attention, attention_names, N_ATTENTION); // -1: auto
    if (wanted >= 0 && !attention_built_with((AttentionBackend)wanted))
        return set_error(err, "--attention %s: this program was built without it (PRECISION=FP32 has reference alone, cudnn needs "
                              "make train_llama3cu USE_CUDNN=1)", o->attention);
    const bool master = strcmp(o->master, "fp32") == 0;
    if (!master && DTYPE_X == DTYPE_F32)
        return set_error(err, "--master none: this program was built with PRECISION=FP32, whose weights are fp32 themselves");
    gpu.set.attention = wanted >= 0 ? (AttentionBackend)wanted : N_ATTENTION;
    gpu.set.recompute = (Recompute)index_of(o->recompute, recompute_names, KEEP_NOTHING);
    gpu.set.bf16_moments = strcmp(o->moments, "bf16") == 0;
    gpu.set.master = master && DTYPE_X == DTYPE_BF16;
    timing.wanted = o->timing;
    attention_fast(o->fast_attention);
    return true;
}

static Model* model_empty(const Config* c, bool training) {
    Model* m = (Model*)allocate(1, sizeof *m);
    Error err;
    if (!sizes_supported(c, &err)) die("%s", err.text);
    gpu_start();
    matmul_cache_read(); // behind the choices of a resumed run, which count first
    m->c = *c;
    m->w = gpu_set_make(c, DTYPE_X, "the weights");
    if (training && gpu.set.master) m->master = gpu_set_make(c, DTYPE_F32, "the master weights");
    return m;
}

Model* model_make(const Config* c, uint64_t seed) {
    Model* m = model_empty(c, true);
    for (int i = 0; i < m->w.set.n; i++) {
        const Param* p = &m->w.set.list[i];
        const size_t n = param_size(p);
        float* master = m->master.memory ? (float*)m->master.set.list[i].tensor->data : NULL;
        init_kernel<<<(unsigned)ceil_div((int64_t)n, 256), 256, 0, gpu.stream>>>(X(*p->tensor), master, n, p->std, seed, (uint64_t)i);
        launch_check();
    }
    return m;
}

static Model* model_read(const char* folder, bool training, Error* err) {
    Config c;
    Safetensors file;
    if (!config_read(&c, folder, err) || !safetensors_open(&file, folder, err)) return NULL;
    Model* m = model_empty(&c, training);
    bool ok = gpu_set_read(&m->w, &m->master, &c, &file, "", err) || error_in(err, folder);
    safetensors_close(&file);
    if (ok) return m;
    model_free(m);
    return NULL;
}

Model* model_load(const char* folder, Error* err) { return model_read(folder, true, err); }
Model* model_open(const char* folder, Error* err) { return model_read(folder, false, err); }

void model_free(Model* m) {
    matmul_cache_write();
    gpu_set_free(&m->w), gpu_set_free(&m->master), gpu_set_free(&m->dw), gpu_set_free(&m->m), gpu_set_free(&m->v);
    acts_free(&m->s);
    free(m);
}

const Config* model_config(const Model* m) { return &m->c; }

double model_weight_bytes(const Model* m) {
    const double embed = m->c.tied ? 0 : (double)m->c.V * m->c.C * (double)sizeof(floatX); // a row of it is read
    return (double)m->w.bytes - embed;
}

bool model_is_finite(const Model* m, Error* err) {
    const GpuSet* sets[] = { &m->w, &m->dw };
    const char* const what[] = { "", "the gradient of " };
    for (int i = 0; i < 2; i++) {
        Error which;
        if (!sets[i]->memory) continue;
        ParamSet host = gpu_set_download(sets[i], &m->c, DTYPE_X);
        const bool finite = params_finite(&host, &which);
        params_free(&host);
        if (!finite) return set_error(err, "%s%.900s", what[i], which.text);
    }
    return true;
}

bool model_plan(const Config* c, int B, int T, int64_t rows, Error* err) {
    Plan p;
    const int64_t noted = gpu.set.logits_bytes;
    if (!sizes_supported(c, err)) return false;
    gpu_start();
    gpu.accumulates = rows > B;
    if (!plan_fits(&p, c, B, T)) return plan_refuse(&p, c, B, T, rows, err);
    if (gpu.chunk_noted && gpu.set.logits_bytes != noted)
        fprintf(stderr, "warning: less memory is free than when the run began: it goes on in smaller chunks, and losses may differ in "
                        "their last bits\n");
    return true;
}

// has the algorithms of a step's products chosen: they are timed in memory that is not there any more later
static void choose_products(const Config* c, int N, bool training) {
    const int Q = c->NH * c->HD, ld = lm_head_stride(c->V), chunk = head_rows(c, N);
    const int sizes[][2] = { { c->C, config_qkv(c) }, { Q, c->C }, { c->C, 2 * c->F }, { c->F, c->C } }; // inputs, outputs
    const int chunks[] = { chunk, N % chunk };
    for (int i = 0; i < 4; i++) {
        const int in = sizes[i][0], out = sizes[i][1];
        matmul_choose(matmul_shape(MATMUL_FORWARD, false, false, N, in, out, out), gpu.stream);
        if (training) matmul_choose(matmul_shape(MATMUL_DX, false, false, N, in, out, out), gpu.stream);
        for (int add = 0; add <= gpu.accumulates && training; add++)
            matmul_choose(matmul_shape(MATMUL_DW, add, false, N, in, out, out), gpu.stream);
    }
    for (int i = 0; i < 2 && chunks[i]; i++) {
        matmul_choose(matmul_shape(MATMUL_FORWARD, false, false, chunks[i], c->C, c->V, ld), gpu.stream);
        if (training) matmul_choose(matmul_shape(MATMUL_DX, false, false, chunks[i], c->C, c->V, ld), gpu.stream);
        if (training) matmul_choose(matmul_shape(MATMUL_DW, true, false, chunks[i], c->C, c->V, ld), gpu.stream);
    }
}

void model_reserve(Model* m, int B, int T, bool training) {
    acts_free(&m->s);
    if (training && !m->dw.memory) {
        const Dtype moments = gpu.set.bf16_moments ? DTYPE_BF16 : DTYPE_F32;
        m->dw = gpu_set_make(&m->c, DTYPE_X, "the gradients");
        m->m = gpu_set_make(&m->c, moments, "AdamW's first moments");
        m->v = gpu_set_make(&m->c, moments, "AdamW's second moments");
        m->dw_empty = true;
    }
    choose_products(&m->c, B * T, training);
    m->s = acts_make(&m->c, B, T, B * T, 0, training);
    m->B = B, m->T = T;
}

void model_print_memory(const Model* m) { plan_print(&m->c, m->B, m->T); }

double model_loss(Model* m, const int32_t* ids, const int32_t* labels, int B, int T) {
    timing_spoil();
    llama3_forward(m, &m->s, ids, labels, B, T);
    return llama3_loss(m, &m->s);
}

void model_backward(Model* m, const int32_t* ids, const int32_t* labels, int B, int T, float scale) {
    timing_begin();
    llama3_forward(m, &m->s, ids, labels, B, T);
    llama3_backward(m, &m->s, scale);
}

StepSums model_sums(Model* m, float clip) {
    const StepNumbers step = llama3_norm(m, clip);
    return StepSums{ step.loss, step.norm };
}

void model_skip(Model* m) { llama3_begin_step(m); }

void model_update(Model* m, AdamWOptions o) {
    llama3_update(m, o);
    llama3_begin_step(m);
}

// of random numbers, for a fifth of a second: the clock has settled by then
double model_matrix_rate(void) {
    enum { SIDE = DTYPE_X == DTYPE_BF16 ? 8192 : 4096 };
    const double flops = 2.0 * SIDE * SIDE * SIDE;
    const int64_t n = (int64_t)SIDE * SIDE;
    float us = INFINITY;
    gpu_start();
    matmul_cache_read();
    const MatmulChoice* c = matmul_choose(matmul_shape(MATMUL_FORWARD, false, false, SIDE, SIDE, SIDE, SIDE), gpu.stream);
    MatmulBench b = { NULL, NULL, NULL, 0, 0, gpu.stream };
    b.x = matmul_random<floatX>(n, 1, gpu.stream), b.w = matmul_random<floatX>(n, 2, gpu.stream), b.y = matmul_random<floatX>(n, 3, gpu.stream);
    if (b.x && b.w && b.y) {
        cuda_check(cudaEventCreate(&b.start));
        cuda_check(cudaEventCreate(&b.stop));
        us = matmul_time(&b, c, &c->algorithm, 2);
        us = matmul_time(&b, c, &c->algorithm, 1 + (int)(2e5f / fmaxf(us, 1)));
        cudaEventDestroy(b.start), cudaEventDestroy(b.stop);
    }
    cudaFree(b.x), cudaFree(b.w), cudaFree(b.y);
    return flops / (double)us * 1e6;
}

void model_report(const Model* m) {
    (void)m;
    timing_print();
}

Sequence* sequence_make(const Model* m, int capacity) {
    Sequence* s = (Sequence*)allocate(1, sizeof *s);
    const int rows = capacity < PREFILL_ROWS ? capacity : PREFILL_ROWS;
    s->m = m;
    s->s = acts_make(&m->c, 1, capacity, rows, capacity, false);
    return s;
}

void sequence_free(Sequence* s) {
    acts_free(&s->s);
    free(s);
}

int sequence_length(const Sequence* s) { return s->s.pos; }
void sequence_clear(Sequence* s) { s->s.pos = 0; }
void sequence_feed(Sequence* s, const int32_t* ids, int n, float* logits) {
    timing_spoil();
    llama3_feed(s->m, &s->s, ids, n, logits);
}

// the numbers that training goes on from: fp32, also where passes use bf16, if there are master weights
static const GpuSet* exact_weights(const Model* m) { return m->master.memory ? &m->master : &m->w; }

// what they are saved as: bf16 numbers are no better for 32 bits
static Dtype saved_dtype(const Model* m, Dtype dtype) {
    return gpu_set_dtype(exact_weights(m)) == DTYPE_BF16 ? DTYPE_BF16 : dtype;
}

bool model_save(const Model* m, const char* folder, Dtype dtype, Error* err) {
    ParamsFile file = { NULL, 0 };
    ParamSet host = gpu_set_download(exact_weights(m), &m->c, gpu_set_dtype(exact_weights(m)));
    dtype = saved_dtype(m, dtype);
    params_add(&file, "", &host, dtype);
    const bool ok = config_write(&m->c, folder, dtype, err) && params_write(&file, folder, "model.safetensors", err);
    params_free(&host);
    return ok;
}

bool model_save_optimizer(const Model* m, const char* folder, Dtype dtype, Error* err) {
    const Dtype moments = gpu_set_dtype(&m->m), exact = gpu_set_dtype(exact_weights(m));
    ParamsFile file = { NULL, 0 };
    ParamSet hm = gpu_set_download(&m->m, &m->c, moments), hv = gpu_set_download(&m->v, &m->c, moments), hw = { NULL, NULL, 0, NULL };
    params_add(&file, "m.", &hm, moments);
    params_add(&file, "v.", &hv, moments);
    if (saved_dtype(m, dtype) != exact) {
        hw = gpu_set_download(exact_weights(m), &m->c, exact);
        params_add(&file, "master.", &hw, exact);
    }
    const bool ok = params_write(&file, folder, "optimizer.safetensors", err);
    params_free(&hm), params_free(&hv), params_free(&hw);
    return ok;
}

bool model_load_optimizer(Model* m, const char* folder, int64_t updates, Error* err) {
    char path[PATH_SIZE];
    Safetensors file;
    if (!path_join(path, folder, "optimizer.safetensors", err) || !safetensors_open(&file, path, err)) return false;
    const bool master = safetensors_find(&file, "master.model.norm.weight") != NULL;
    const bool ok = gpu_set_read(&m->m, NULL, &m->c, &file, "m.", err) && gpu_set_read(&m->v, NULL, &m->c, &file, "v.", err) &&
                    (!master || gpu_set_read(&m->w, &m->master, &m->c, &file, "master.", err));
    safetensors_close(&file);
    m->updates = updates;
    return ok || error_in(err, path);
}

// the products' algorithms, attention's back end, and the chunk of the head: where it ends, sums are rounded
char* model_choices_write(void) {
    matmul_cache_write();
    char *text = matmul_choices_write(), *attention = attention_choices_write();
    const size_t n = strlen(text), room = strlen(attention) + 64;
    text = (char*)reallocate(text, n + room, 1);
    snprintf(text + n, room, "%schunk of logits: %lld bytes\n", attention, (long long)gpu.set.logits_bytes);
    free(attention);
    return text;
}

void model_choices_read(const char* text) {
    long long bytes;
    const char* chunk = strstr(text, "chunk of logits:");
    gpu_start();
    matmul_choices_read(text);
    attention_choices_read(text);
    if (chunk && sscanf(chunk, "chunk of logits: %lld bytes", &bytes) == 1 && bytes >= LOGITS_LEAST && bytes <= LOGITS_MOST) {
        gpu.set.logits_bytes = bytes;
        gpu.chunk_noted = true;
    }
}

bool model_training_bytes(const Config* c, int B, int T, double* bytes, Error* why) {
    if (!gpu.stream && !gpu_usable(why)) return false; // what sorting and attention take depends on the GPU
    gpu_start();
    *bytes = plan_make(c, B, T).total;
    return true;
}

const char* model_storage(void) {
    return DTYPE_X == DTYPE_BF16 ? "weights and gradients in BF16, master weights and moments in F32" : "weights, gradients and moments in F32";
}

double model_sequence_bytes(const Config* c, int capacity) {
    Acts s = acts_begin(c, 1, capacity, capacity < PREFILL_ROWS ? capacity : PREFILL_ROWS, capacity, false);
    free(s.layer);
    return (double)s.arena.used;
}

#ifndef LLAMA3_LIBRARY

// ---- 6. main ---------------------------------------------------------------------------------

EMBED(corpus_train, "build/corpus/train.txt");
EMBED(corpus_val, "build/corpus/val.txt");

int main(int argc, char** argv) {
    const Program program = { "train_llama3cu", VERSION, "train", { corpus_train, corpus_train_end, corpus_val, corpus_val_end } };
    return commands_main(&program, argc, argv);
}

#else

// ---- the library, for test_llama3.cu ---------------------------------------------------------

#include "llmc/library.h"

struct GpuModel {
    Model* m;
    float* numbers; // last handed out
};

bool gpu_set(const char* option, const char* value) {
    static const char *const moments[] = { "fp32", "bf16" }, *const masters[] = { "none", "fp32" }, *const off_on[] = { "off", "on" };
    int i = -1;
    if (strcmp(option, "recompute") == 0) {
        if ((i = index_of(value, recompute_names, KEEP_NOTHING)) >= 0) gpu.set.recompute = (Recompute)i;
    } else if (strcmp(option, "attention") == 0) {
        if ((i = index_of(value, attention_names, N_ATTENTION)) < 0 || !attention_built_with((AttentionBackend)i)) return false;
        gpu.set.attention = (AttentionBackend)i;
    } else if (strcmp(option, "moments") == 0) {
        if ((i = index_of(value, moments, 2)) >= 0) gpu.set.bf16_moments = i;
    } else if (strcmp(option, "master") == 0 && DTYPE_X == DTYPE_BF16) {
        if ((i = index_of(value, masters, 2)) >= 0) gpu.set.master = i;
    } else if (strcmp(option, "timing") == 0) {
        if ((i = index_of(value, off_on, 2)) >= 0) timing.wanted = i;
        if (i == 0) gpu_calls.on = false;
    }
    return i >= 0;
}

double gpu_bytes(void) { return (double)gpu.bytes; }

double gpu_planned_bytes(const Config* c, int B, int T) {
    gpu_start();
    return plan_make(c, B, T).total;
}

double gpu_timed(const char* op) {
    double ms = 0;
    if (!op) return timing.steps ? timing.ms / (double)timing.steps : 0;
    for (int i = 0; i < timing.n; i++)
        if (strcmp(timing.rows[i].op, op) == 0) ms += timing.rows[i].ms / (double)timing.steps;
    return ms;
}

GpuModel* gpu_model_load(const char* folder) {
    Error err;
    GpuModel* g = (GpuModel*)allocate(1, sizeof *g);
    g->m = model_load(folder, &err);
    if (!g->m) die("%s", err.text);
    return g;
}

GpuModel* gpu_model_resume(const char* folder, int64_t updates) {
    Error err;
    GpuModel* g = gpu_model_load(folder);
    model_reserve(g->m, 1, 1, true);
    if (!model_load_optimizer(g->m, folder, updates, &err)) die("%s", err.text);
    return g;
}

void gpu_save(GpuModel* g, const char* folder) {
    Error err;
    if (!model_save(g->m, folder, DTYPE_F32, &err) || !model_save_optimizer(g->m, folder, DTYPE_F32, &err)) die("%s", err.text);
}

void gpu_model_free(GpuModel* g) {
    model_free(g->m);
    free(g->numbers);
    free(g);
}

const Config* gpu_model_config(const GpuModel* g) { return &g->m->c; }
const char* gpu_attention(const GpuModel* g) { return attention_names[g->m->s.attention]; }

// makes room for a batch (B, T)
static void gpu_reserve(Model* m, int B, int T) {
    if (m->s.rows != B * T || m->s.B != B) model_reserve(m, B, T, true);
}

float gpu_forward(GpuModel* g, const int32_t* ids, const int32_t* labels, int B, int T, float* logits) {
    gpu_reserve(g->m, B, T);
    llama3_forward(g->m, &g->m->s, ids, labels, B, T);
    for (int n = 0; logits && n < B * T; n++) llama3_logits(g->m, &g->m->s, logits + (size_t)n * (size_t)g->m->c.V, n);
    return labels ? (float)(llama3_loss(g->m, &g->m->s) / count_labels(labels, B * T)) : 0;
}

double gpu_accumulate(GpuModel* g, const int32_t* ids, const int32_t* labels, int B, int T, float scale) {
    double loss;
    gpu_reserve(g->m, B, T);
    model_backward(g->m, ids, labels, B, T, scale);
    fetch(&loss, &g->m->s.step->loss, sizeof loss);
    return loss;
}

float gpu_backward(GpuModel* g, const int32_t* ids, const int32_t* labels, int B, int T) {
    const int count = count_labels(labels, B * T);
    gpu_reserve(g->m, B, T);
    llama3_begin_step(g->m);
    return (float)(gpu_accumulate(g, ids, labels, B, T, 1 / (float)count) / count);
}

static const float* gpu_numbers(GpuModel* g, const GpuSet* s, const char* name, size_t* n) {
    for (int i = 0; i < s->set.n; i++) {
        const Param* p = &s->set.list[i];
        if (strcmp(p->name, name) != 0) continue;
        Tensor host = { NULL, gpu_set_dtype(s) };
        *n = param_size(p);
        host.data = allocate(*n, dtype_bytes(host.dtype));
        cuda_check(cudaStreamSynchronize(gpu.stream));
        cuda_check(cudaMemcpy(host.data, p->tensor->data, *n * dtype_bytes(host.dtype), cudaMemcpyDeviceToHost));
        g->numbers = (float*)reallocate(g->numbers, *n, sizeof *g->numbers);
        for (size_t j = 0; j < *n; j++) g->numbers[j] = tensor_get(host, j);
        free(host.data);
        return g->numbers;
    }
    return NULL;
}

const float* gpu_parameter(GpuModel* g, const char* name, size_t* n) { return gpu_numbers(g, &g->m->w, name, n); }
const float* gpu_gradient(GpuModel* g, const char* name, size_t* n) { return gpu_numbers(g, &g->m->dw, name, n); }

float gpu_update(GpuModel* g, float lr, float beta1, float beta2, float eps, float weight_decay, float clip) {
    const AdamWOptions o = { lr, beta1, beta2, eps, weight_decay, 1 };
    const float norm = model_sums(g->m, clip).norm;
    if (isfinite(norm)) model_update(g->m, o);
    return norm;
}

void gpu_generate_greedy(GpuModel* g, int32_t* ids, int n_prompt, int n_total) { generate_greedy(g->m, ids, n_prompt, n_total); }

#endif
