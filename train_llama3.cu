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
    floatX* mid;      // (N, C) residual stream between attention and feed-forward
    floatX* norm2;    // (N, C)
    float* r2;        // (N)
    floatX* gate_up;  // (N, 2F)
    floatX* ffn;      // (N, F)
} LayerActs;

// everything of a pass through the model but its parameters
typedef struct {
    int B, T;             // of this pass: B*T of at most `rows` rows
    int rows;
    Recompute recompute;
    AttentionBackend attention;
    Error passed_over;    // the faster back ends that do not take these sizes, and why
    LayerActs* layer;     // [L + 1]; what is not kept, the layers share. Of the last entry there is only x, norm1 and r1: the
                          // residual stream after the last layer and the final norm
    int32_t *ids, *labels;
    float* losses;        // (N)
    floatX* out;          // (N, C) what a block adds to the residual stream
    floatX* logits;       // (head_rows, Vp), of one chunk of rows
    int head_rows;
    float *cos, *sin;     // (positions, HD/2)
    void* scratch;        // of one op at a time
    double* sums;         // of squares of the gradients, and
    float* norm;          // their norm and the factor that clips it

    // gradients, in training: each holds one block's at a time
    floatX *dx, *dnorm;   // (N, C)
    floatX *dqkv, *datt;  // (N, QKV), (N, NH*HD)
    floatX* dffn;         // (N, F)

    // generation: keys and values of the tokens so far, a row k‖v for each
    floatX* cache;        // (L, capacity, 2*NKV*HD); NULL: no cache
    int capacity, pos;    // rows there are, rows in use

    Arena arena;          // block: the GPU's memory
} Acts;

struct Model {
    Config c;
    GpuSet w, master, dw, m, v;   // weights, their fp32 originals, gradients, AdamW's moments
    int64_t updates;              // AdamW steps done
    bool dw_empty;                // the gradients are to be overwritten, not added to
    Acts s;                       // of training and evaluation
};

struct Sequence {
    const Model* m;
    Acts s;
};

// what the options say of how to compute: read-only once the first model is made
static struct {
    Recompute recompute;
    AttentionBackend attention;
    bool bf16_moments;
    cudaStream_t stream;
} gpu = { RECOMPUTE_NONE, ATTENTION_REFERENCE, false, 0 };

// ---- 2. memory -------------------------------------------------------------------------------

static void* gpu_allocate(size_t bytes, const char* what) {
    void* p = NULL;
    size_t free_bytes = 0, total = 0;
    if (!bytes) bytes = 1;
    if (cudaMalloc(&p, bytes) == cudaSuccess) return p;
    cudaGetLastError();
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    die("out of GPU memory: %.2f GiB asked for %s, %.2f of %.2f GiB are free; try a smaller --batch or --seq, --recompute block, "
        "or --moments bf16", (double)bytes / 0x1p30, what, (double)free_bytes / 0x1p30, (double)total / 0x1p30);
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
    cuda_check(cudaFree(s->memory));
    s->memory = NULL;
    s->bytes = 0;
}

// a copy in host memory, to be written to a file or looked at; freed with params_free
static ParamSet gpu_set_download(const GpuSet* s, const Config* c, Dtype dtype) {
    ParamSet host = params_list(c);
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
    KEEP_BELOW(KEEP_NOTHING, r2, float, N);
    KEEP_BELOW(RECOMPUTE_NORMS, norm1, floatX, N * C);
    KEEP_BELOW(RECOMPUTE_NORMS, norm2, floatX, N * C);
    KEEP_BELOW(RECOMPUTE_NORMS, ffn, floatX, N * F);
    KEEP_BELOW(RECOMPUTE_FFN, gate_up, floatX, N * 2 * F);
    KEEP_BELOW(RECOMPUTE_BLOCK, qkv, floatX, N * (size_t)config_qkv(c));
    KEEP_BELOW(RECOMPUTE_BLOCK, lse, float, N * (size_t)c->NH);
    KEEP_BELOW(RECOMPUTE_BLOCK, att, floatX, N * Q);
    KEEP_BELOW(RECOMPUTE_BLOCK, mid, floatX, N * C);
#undef KEEP_BELOW
}

// scratch for whichever op needs most
static size_t scratch_bytes(const Acts* s, const Config* c, int B, int T, bool training) {
    const AttentionShape shape = { B, T, c->NH, c->NKV, c->HD };
    size_t most = s->capacity ? 0 : attention_scratch(s->attention, shape, training);
    if (!training) return most;
    size_t others[] = { embedding_backward_scratch(B * T, c->V), rmsnorm_backward_scratch(c->C) };
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) most = others[i] > most ? others[i] : most;
    return most;
}

static void acts_layout(Acts* s, const Config* c, int B, int T, bool training) {
    const size_t N = (size_t)s->rows, C = (size_t)c->C, Q = (size_t)c->NH * (size_t)c->HD, row = (size_t)(2 * c->NKV * c->HD);
    Arena* arena = &s->arena;
    for (int l = 0; l < c->L; l++) layer_layout(&s->layer[l], &s->layer[0], arena, c, N, s->recompute);
    s->layer[c->L].x = KEEP(floatX, N * C);
    s->layer[c->L].norm1 = KEEP(floatX, N * C);
    s->layer[c->L].r1 = KEEP(float, N);
    s->ids = KEEP(int32_t, N);
    s->labels = KEEP(int32_t, N);
    s->losses = KEEP(float, N);
    s->out = KEEP(floatX, N * C);
    s->logits = KEEP(floatX, (size_t)s->head_rows * (size_t)lm_head_stride(c->V));
    s->cos = KEEP(float, (size_t)T * (size_t)c->HD / 2);
    s->sin = KEEP(float, (size_t)T * (size_t)c->HD / 2);
    s->scratch = KEEP(char, scratch_bytes(s, c, B, T, training));
    if (s->capacity) s->cache = KEEP(floatX, (size_t)c->L * (size_t)s->capacity * row);
    if (!training) return;
    s->sums = (double*)KEEP(char, global_norm_scratch());
    s->norm = KEEP(float, 2);
    s->dx = KEEP(floatX, N * C);
    s->dnorm = KEEP(floatX, N * C);
    s->dqkv = KEEP(floatX, N * (size_t)config_qkv(c));
    s->datt = KEEP(floatX, N * Q);
    s->dffn = KEEP(floatX, N * (size_t)c->F);
}

// rows of a chunk of the head: logits of about half a GiB, so that the products are large and the memory is not
static int head_rows(const Config* c, int rows) {
    int64_t most = ((int64_t)1 << 29) / (lm_head_stride(c->V) * (int64_t)sizeof(floatX)) / 128 * 128;
    return most < 128 ? (rows < 128 ? rows : 128) : most < rows ? (int)most : rows;
}

static Acts acts_begin(const Config* c, int B, int T, int rows, int capacity, bool training) {
    Acts s;
    memset(&s, 0, sizeof s);
    s.rows = rows;
    s.capacity = capacity;
    s.recompute = training ? gpu.recompute : KEEP_NOTHING;
    const AttentionShape shape = { B, T, c->NH, c->NKV, c->HD };
    s.attention = capacity ? ATTENTION_REFERENCE : attention_choose(gpu.attention, shape, training, &s.passed_over);
    s.head_rows = capacity ? 1 : head_rows(c, rows);
    s.layer = (LayerActs*)allocate((size_t)c->L + 1, sizeof *s.layer);
    acts_layout(&s, c, B, T, training);
    return s;
}

static size_t acts_bytes(const Config* c, int B, int T, int rows, int capacity, bool training) {
    Acts s = acts_begin(c, B, T, rows, capacity, training);
    free(s.layer);
    return s.arena.used;
}

// room for passes of up to B x T tokens, or, with a capacity, for `rows` tokens at a time of one sequence of T
static Acts acts_make(const Config* c, int B, int T, int rows, int capacity, bool training) {
    Acts s = acts_begin(c, B, T, rows, capacity, training);
    s.arena.block = (char*)gpu_allocate(s.arena.used, "activations");
    cuda_check(cudaMemsetAsync(s.arena.block, 0, s.arena.used, gpu.stream));
    s.arena.used = 0;
    acts_layout(&s, c, B, T, training);
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
    cuda_check(cudaFree(s->arena.block));
    memset(s, 0, sizeof *s);
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
        attention_cached(a->att, a->qkv, cache, s->T, s->pos, c->NH, c->NKV, c->HD, QKV, gpu.stream);
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
    matmul_dx(s->datt, s->dx, X(w->o), N, Q, C, false, gpu.stream);
    matmul_dw(X(dw->o), s->dx, a->att, N, Q, C, add, gpu.stream);
    attention_backward(s->attention, s->dqkv, s->datt, a->qkv, a->att, a->lse, shape, s->scratch,
                       attention_scratch(s->attention, shape, true), gpu.stream);
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

// ids (B, T) through all layers and the final norm, to s->layer[L]. With a cache, B is 1 and the tokens stand at positions
// s->pos and on
static void llama3_forward(const Model* m, Acts* s, const int32_t* ids, int B, int T) {
    const Config* c = &m->c;
    const Params* w = m->w.set.p;
    const int N = B * T;
    require(N <= s->rows && (!s->cache || (B == 1 && s->pos + T <= s->capacity)), "the pass fits its memory");
    s->B = B;
    s->T = T;
    cuda_check(cudaMemcpyAsync(s->ids, ids, (size_t)N * sizeof *ids, cudaMemcpyHostToDevice, gpu.stream));
    embedding_forward(s->layer[0].x, s->ids, X(w->embed), N, c->C, gpu.stream);
    rmsnorm_forward(s->layer[0].norm1, s->layer[0].r1, s->layer[0].x, X(w->layer[0].attn_norm), N, c->C, c->eps, gpu.stream);
    for (int l = 0; l < c->L; l++) {
        attention_block_forward(c, &w->layer[l], s, l);
        mlp_block_forward(c, &w->layer[l], l + 1 < c->L ? w->layer[l + 1].attn_norm : w->norm, s, l);
    }
}

// the sum of the losses of the pass, which the labels were sent for
static double sum_losses(const Acts* s) {
    const int N = s->B * s->T;
    double sum = 0;
    float* losses = (float*)allocate((size_t)N, sizeof *losses);
    cuda_check(cudaMemcpyAsync(losses, s->losses, (size_t)N * sizeof *losses, cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
    for (int n = 0; n < N; n++) sum += (double)losses[n];
    free(losses);
    return sum;
}

static void send_labels(Acts* s, const int32_t* labels, int N) {
    cuda_check(cudaMemcpyAsync(s->labels, labels, (size_t)N * sizeof *labels, cudaMemcpyHostToDevice, gpu.stream));
}

static double llama3_loss(const Model* m, Acts* s, const int32_t* labels) {
    send_labels(s, labels, s->B * s->T);
    head_forward(&m->c, m->w.set.p, NULL, s, 1);
    return sum_losses(s);
}

// after llama3_forward: adds the gradient of scale * (sum of the losses) to m->dw and returns that sum
static double llama3_backward(Model* m, Acts* s, const int32_t* labels, float scale) {
    const Config* c = &m->c;
    Params *w = m->w.set.p, *dw = m->dw.set.p;
    const bool add = !m->dw_empty; // the first products of a layer after an update overwrite; norms, embedding and head are zeros
    send_labels(s, labels, s->B * s->T);
    head_forward(c, w, dw, s, scale);
    head_backward(c, w, dw, s);
    for (int l = c->L - 1; l >= 0; l--) {
        recompute_layer(c, &w->layer[l], s, l);
        mlp_block_backward(c, &w->layer[l], &dw->layer[l], s, l, add);
        attention_block_backward(c, &w->layer[l], &dw->layer[l], s, l, add);
    }
    embedding_backward(X(dw->embed), s->dx, s->ids, s->B * s->T, c->C, c->V, s->scratch, gpu.stream);
    m->dw_empty = false;
    return sum_losses(s);
}

// the gradients are empty: what is added to becomes zero, the rest is marked to be overwritten
static void llama3_empty_gradients(Model* m) {
    for (int i = 0; i < m->dw.set.n; i++) {
        const Param* p = &m->dw.set.list[i];
        const bool added_to = !p->rows || p->tensor == &m->dw.set.p->embed || p->tensor == &m->dw.set.p->lm_head;
        if (added_to) cuda_check(cudaMemsetAsync(p->tensor->data, 0, param_size(p) * sizeof(floatX), gpu.stream));
    }
    m->dw_empty = true;
}

// one AdamW step with m->dw, clipped to a global norm, which is returned as it was before. Changes nothing when it is not finite
static float llama3_update(Model* m, AdamWOptions o) {
    NvtxRange range("llama3_update");
    float norm = 0;
    sum_of_squares(m->s.sums, (const floatX*)m->dw.memory, m->dw.bytes / sizeof(floatX) / 8 * 8, gpu.stream); // padding is zeros
    global_norm(m->s.norm, m->s.sums, o.clip, gpu.stream);
    cuda_check(cudaMemcpyAsync(&norm, m->s.norm, sizeof norm, cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
    if (!isfinite(norm)) return norm;
    m->updates++;
    for (int i = 0; i < m->w.set.n; i++) {
        const Param* p = &m->w.set.list[i];
        const float decay = param_decays(p) ? o.weight_decay : 0;
        float* master = m->master.memory ? (float*)m->master.set.list[i].tensor->data : NULL;
        const floatX* g = X(*m->dw.set.list[i].tensor);
        void *mi = m->m.set.list[i].tensor->data, *vi = m->v.set.list[i].tensor->data;
        if (gpu_set_dtype(&m->m) == DTYPE_BF16)
            adamw(X(*p->tensor), master, (__nv_bfloat16*)mi, (__nv_bfloat16*)vi, g, param_size(p), o.lr, o.beta1, o.beta2, o.eps,
                  decay, (int)m->updates, m->s.norm + 1, 0, (uint64_t)i, gpu.stream);
        else
            adamw(X(*p->tensor), master, (float*)mi, (float*)vi, g, param_size(p), o.lr, o.beta1, o.beta2, o.eps, decay,
                  (int)m->updates, m->s.norm + 1, 0, (uint64_t)i, gpu.stream);
    }
    return norm;
}

// overwrites logits (V, in host memory) with those of row n
static void llama3_logits(const Model* m, Acts* s, float* logits, int n) {
    const Config* c = &m->c;
    const size_t V = (size_t)c->V;
    const floatX* x = s->layer[c->L].norm1 + (size_t)n * (size_t)c->C;
    matmul_forward(s->logits, lm_head_stride(c->V), x, X(m->w.set.p->lm_head), 1, c->C, c->V, gpu.stream);
    floatX* stored = (floatX*)allocate(V, sizeof *stored);
    cuda_check(cudaMemcpyAsync(stored, s->logits, V * sizeof *stored, cudaMemcpyDeviceToHost, gpu.stream));
    cuda_check(cudaStreamSynchronize(gpu.stream));
    const Tensor t = { stored, DTYPE_X };
    for (size_t i = 0; i < V; i++) logits[i] = tensor_get(t, i);
    free(stored);
}

// runs n tokens behind those in the cache, as many at a time as s holds, and overwrites logits (V) with the last one's
static void llama3_feed(const Model* m, Acts* s, const int32_t* ids, int n, float* logits) {
    while (n > 0) {
        const int T = n < s->rows ? n : s->rows;
        llama3_forward(m, s, ids, 1, T);
        s->pos += T;
        ids += T;
        n -= T;
    }
    llama3_logits(m, s, logits, s->T - 1);
}

enum { PREFILL_ROWS = 512 }; // tokens of a prompt that go through the model at a time

// ---- 5. the model, as llmc/model.h promises it -----------------------------------------------

// the GPU in use: there is one, and it is new enough; said in one line otherwise
static void gpu_start(void) {
    int count = 0, major = 0, device = 0;
    if (gpu.stream) return;
    cudaError_t code = cudaGetDeviceCount(&count);
    if (code != cudaSuccess || count == 0)
        die("no NVIDIA GPU that this program can use: %s; llama3 runs on the CPU", code == cudaSuccess ? "none found" : cudaGetErrorString(code));
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 8) die("this GPU has compute capability %d, but 8.0 (Ampere) is the least that is supported", major);
    cuda_check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    matmul_init();
}

static int index_of(const char* word, const char* const* words, int n) {
    for (int i = 0; i < n; i++)
        if (strcmp(words[i], word) == 0) return i;
    return -1;
}

bool model_configure(const Options* o, Error* err) {
    const int wanted = index_of(o->attention, attention_names, N_ATTENTION); // -1: auto
    if (wanted >= 0 && !attention_built_with((AttentionBackend)wanted))
        return set_error(err, "--attention %s: this program was built without it (PRECISION=FP32 has reference alone, cudnn needs "
                              "make train_llama3cu USE_CUDNN=1)", o->attention);
    gpu.attention = wanted >= 0 ? (AttentionBackend)wanted : ATTENTION_CUDNN;
    gpu.recompute = (Recompute)index_of(o->recompute, recompute_names, KEEP_NOTHING);
    gpu.bf16_moments = strcmp(o->moments, "bf16") == 0;
    attention_fast(o->fast_attention);
    return true;
}

static Model* model_empty(const Config* c, bool training) {
    Model* m = (Model*)allocate(1, sizeof *m);
    gpu_start();
    matmul_cache_read(); // behind the choices of a resumed run, which count first
    m->c = *c;
    m->w = gpu_set_make(c, DTYPE_X, "the weights");
    if (training && DTYPE_X == DTYPE_BF16) m->master = gpu_set_make(c, DTYPE_F32, "the master weights");
    return m;
}

// a thread a number; the same numbers as llama3_init makes on the CPU
static __global__ void init_kernel(floatX* w, float* master, size_t n, float std, uint64_t seed, uint64_t tensor) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = std != 0 ? std * random_normal(seed, tensor, i) : 1;
    w[i] = from_float<floatX>(x);
    if (master) master[i] = x;
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

// what a training run takes, by kind
static __attribute__((unused)) void print_plan(const Model* m) {
    const double GiB = 0x1p30;
    size_t free_bytes = 0, total = 0;
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    fprintf(stderr, "memory     weights %.2f, master %.2f, gradients %.2f, moments %.2f, activations %.2f GiB; %.2f of %.2f GiB stay free\n",
            (double)m->w.bytes / GiB, (double)m->master.bytes / GiB, (double)m->dw.bytes / GiB,
            (double)(m->m.bytes + m->v.bytes) / GiB, (double)m->s.arena.used / GiB, (double)free_bytes / GiB, (double)total / GiB);
    fprintf(stderr, "attention  %s%s%s; recompute %s\n", attention_names[m->s.attention], *m->s.passed_over.text ? ", " : "",
            m->s.passed_over.text, recompute_names[m->s.recompute]);
}

void model_reserve(Model* m, int B, int T, bool training) {
    acts_free(&m->s);
    if (training && !m->dw.memory) {
        const Dtype moments = gpu.bf16_moments ? DTYPE_BF16 : DTYPE_F32;
        m->dw = gpu_set_make(&m->c, DTYPE_X, "the gradients");
        m->m = gpu_set_make(&m->c, moments, "AdamW's first moments");
        m->v = gpu_set_make(&m->c, moments, "AdamW's second moments");
        m->dw_empty = true;
    }
    m->s = acts_make(&m->c, B, T, B * T, 0, training);
#ifndef LLAMA3_LIBRARY
    if (training) print_plan(m);
#endif
}

double model_loss(Model* m, const int32_t* ids, const int32_t* labels, int B, int T) {
    llama3_forward(m, &m->s, ids, B, T);
    return llama3_loss(m, &m->s, labels);
}

double model_backward(Model* m, const int32_t* ids, const int32_t* labels, int B, int T, float scale) {
    llama3_forward(m, &m->s, ids, B, T);
    return llama3_backward(m, &m->s, labels, scale);
}

float model_update(Model* m, AdamWOptions o) {
    const float norm = llama3_update(m, o);
    if (isfinite(norm)) llama3_empty_gradients(m);
    return norm;
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
void sequence_feed(Sequence* s, const int32_t* ids, int n, float* logits) { llama3_feed(s->m, &s->s, ids, n, logits); }

// the numbers that training goes on from: fp32, also where passes use bf16
static const GpuSet* exact_weights(const Model* m) { return m->master.memory ? &m->master : &m->w; }

bool model_save(const Model* m, const char* folder, Dtype dtype, Error* err) {
    ParamsFile file = { NULL, 0 };
    ParamSet host = gpu_set_download(exact_weights(m), &m->c, gpu_set_dtype(exact_weights(m)));
    params_add(&file, "", &host, dtype);
    const bool ok = config_write(&m->c, folder, dtype, err) && params_write(&file, folder, "model.safetensors", err);
    params_free(&host);
    return ok;
}

bool model_save_optimizer(const Model* m, const char* folder, bool master, Error* err) {
    const Dtype dtype = gpu_set_dtype(&m->m);
    ParamsFile file = { NULL, 0 };
    ParamSet hm = gpu_set_download(&m->m, &m->c, dtype), hv = gpu_set_download(&m->v, &m->c, dtype), hw = { NULL, NULL, 0, NULL };
    params_add(&file, "m.", &hm, dtype);
    params_add(&file, "v.", &hv, dtype);
    if (master) {
        hw = gpu_set_download(exact_weights(m), &m->c, DTYPE_F32);
        params_add(&file, "master.", &hw, DTYPE_F32);
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

char* model_choices_write(void) {
    matmul_cache_write();
    return matmul_choices_write();
}

void model_choices_read(const char* text) {
    gpu_start();
    matmul_choices_read(text);
}

double model_training_bytes(const Config* c, int B, int T) {
    gpu_start(); // what sorting takes depends on the GPU
    const double numbers = params_count(c).total;
    const double moments = gpu.bf16_moments ? 4 : 8, master = DTYPE_X == DTYPE_BF16 ? 4 : 0;
    return numbers * (2 * (double)sizeof(floatX) + master + moments) + (double)acts_bytes(c, B, T, B * T, 0, true);
}

double model_sequence_bytes(const Config* c, int capacity) {
    return (double)acts_bytes(c, 1, capacity, capacity < PREFILL_ROWS ? capacity : PREFILL_ROWS, capacity, false);
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

struct GpuModel {
    Model* m;
    float* numbers; // last handed out
};

bool gpu_set(const char* option, const char* value) {
    if (strcmp(option, "recompute") == 0) {
        const int level = index_of(value, recompute_names, KEEP_NOTHING);
        gpu.recompute = level < 0 ? RECOMPUTE_NONE : (Recompute)level;
        return level >= 0;
    }
    if (strcmp(option, "attention") == 0) {
        const int backend = index_of(value, attention_names, N_ATTENTION);
        if (backend < 0 || !attention_built_with((AttentionBackend)backend)) return false;
        gpu.attention = (AttentionBackend)backend;
        return true;
    }
    if (strcmp(option, "moments") != 0) return false;
    gpu.bf16_moments = strcmp(value, "bf16") == 0;
    return gpu.bf16_moments || strcmp(value, "fp32") == 0;
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
    if (!model_save(g->m, folder, DTYPE_F32, &err) || !model_save_optimizer(g->m, folder, false, &err)) die("%s", err.text);
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

static int count_labels(const int32_t* labels, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) count += labels[i] != IGNORED_LABEL;
    return count ? count : 1;
}

float gpu_forward(GpuModel* g, const int32_t* ids, const int32_t* labels, int B, int T, float* logits) {
    gpu_reserve(g->m, B, T);
    llama3_forward(g->m, &g->m->s, ids, B, T);
    for (int n = 0; logits && n < B * T; n++) llama3_logits(g->m, &g->m->s, logits + (size_t)n * (size_t)g->m->c.V, n);
    return labels ? (float)(llama3_loss(g->m, &g->m->s, labels) / count_labels(labels, B * T)) : 0;
}

double gpu_accumulate(GpuModel* g, const int32_t* ids, const int32_t* labels, int B, int T, float scale) {
    gpu_reserve(g->m, B, T);
    return model_backward(g->m, ids, labels, B, T, scale);
}

float gpu_backward(GpuModel* g, const int32_t* ids, const int32_t* labels, int B, int T) {
    const int count = count_labels(labels, B * T);
    gpu_reserve(g->m, B, T);
    llama3_empty_gradients(g->m);
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
    const AdamWOptions o = { lr, beta1, beta2, eps, weight_decay, clip };
    return model_update(g->m, o);
}

void gpu_generate_greedy(GpuModel* g, int32_t* ids, int n_prompt, int n_total) {
    const int V = g->m->c.V;
    Sequence* s = sequence_make(g->m, n_total);
    float* logits = (float*)allocate((size_t)V, sizeof *logits);
    for (int n = 0; n_prompt < n_total; n = n_prompt++) {
        sequence_feed(s, ids + n, n_prompt - n, logits);
        ids[n_prompt] = 0;
        for (int i = 1; i < V; i++)
            if (logits[i] > logits[ids[n_prompt]]) ids[n_prompt] = i;
    }
    free(logits);
    sequence_free(s);
}

#endif
