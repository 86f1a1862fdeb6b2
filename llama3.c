/*
llama3.c: Llama 3 on the CPU, whole: train, generate, chat, eval, tokenize, detokenize, info.

    make deps llama3 && ./llama3 train          learns to write its own sources, offline, in two minutes
    ./llama3 --help

Contents    1 options and run state     2 memory     3 blocks     4 model     5 once in a while     6 main
Reading     the ops (formula, forward, backward) are llmc/<op>.h; what the model is, with the legend of the capitals, is
            llmc/llama3.h. train_llama3.cu has the same sections and the same names.
Library     with -DLLAMA3_LIBRARY sections 5 and 6 fall away and the cpu_ functions of llmc/llama3.h are exported
*/
#include "llmc/adamw.h"
#include "llmc/arena.h"
#include "llmc/attention.h"
#include "llmc/config.h"
#include "llmc/cross_entropy.h"
#include "llmc/embedding.h"
#include "llmc/llama3.h"
#include "llmc/matmul.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
#include "llmc/safetensors.h"
#include "llmc/swiglu.h"

// ---- 1. options and run state ----------------------------------------------------------------

// one number for every parameter: the weights, their gradients, or one of AdamW's moments
typedef struct {
    Params* p;
    Param* list;     // llama3_list of p, into which it points
    void* memory;    // what the tensors lie in; NULL when they lie in a mapped file
} ParamSet;

typedef struct {
    Config c;
    int n;                       // tensors
    ParamSet w, dw, m, v;        // weights, gradients, moments
    Safetensors file;            // holds the weights when they are mapped
    int64_t updates;             // AdamW steps done
} Model;

// what one layer's backward pass needs of its forward pass. N = B*T rows
typedef struct {
    float* x;        // (N, C) residual stream before the layer
    float* norm1;    // (N, C)
    float* r1;       // (N)
    float* qkv;      // (N, QKV) after RoPE
    float* lse;      // (B, NH, T)
    float* att;      // (N, NH*HD)
    float* mid;      // (N, C) residual stream between attention and feed-forward
    float* norm2;    // (N, C)
    float* r2;       // (N)
    float* gate_up;  // (N, 2F)
    float* ffn;      // (N, F)
} LayerActs;

// everything of a pass through the model but its parameters
typedef struct {
    int B, T;            // rows this pass holds: B*T of at most `rows`
    int rows;
    LayerActs* layer;    // [L]; without a backward pass all layers share the arrays of the first
    float* x;            // (N, C) residual stream after the last layer
    float* norm;         // (N, C)
    float* r;            // (N)
    float* out;          // (N, C) what a block adds to the residual stream
    float* head;         // lm_head_scratch(V): logits of one chunk of rows
    float *cos, *sin;    // (positions, HD/2)

    // gradients, in training: each holds one block's at a time
    float *dx, *dnorm;   // (N, C)
    float *dqkv, *datt;  // (N, QKV), (N, NH*HD)
    float *dgate_up, *dffn;

    // generation: keys and values of the tokens so far, a row k‖v for each
    float* cache;        // (L, capacity, 2*NKV*HD); NULL: no cache
    int capacity, pos;   // rows there are, rows in use

    Arena arena;
} Acts;

// ---- 2. memory -------------------------------------------------------------------------------

// a set without memory: the list of its tensors, all NULL
static ParamSet params_list(const Config* c) {
    ParamSet s = { 0 };
    s.p = allocate(1, sizeof *s.p);
    s.p->layer = allocate((size_t)c->L, sizeof *s.p->layer);
    s.list = allocate((size_t)llama3_count(c), sizeof *s.list);
    llama3_list(s.list, s.p, c);
    return s;
}

// a set of F32 zeros
static ParamSet params_make(const Config* c) {
    ParamSet s = params_list(c);
    size_t bytes = llama3_place(s.list, llama3_count(c), DTYPE_F32, NULL);
    s.memory = aligned_alloc(256, (bytes + 255) & ~(size_t)255);
    if (!s.memory) die("out of memory: %.1f MiB of parameters asked for", (double)bytes / 0x1p20);
    memset(s.memory, 0, bytes);
    llama3_place(s.list, llama3_count(c), DTYPE_F32, s.memory);
    if (c->tied) s.p->lm_head = s.p->embed;
    return s;
}

static void params_free(ParamSet* s) {
    if (s->p) free(s->p->layer);
    free(s->p), free(s->list), free(s->memory);
    memset(s, 0, sizeof *s);
}

static void model_free(Model* m) {
    params_free(&m->w), params_free(&m->dw), params_free(&m->m), params_free(&m->v);
    safetensors_close(&m->file);
}

// opens a folder and points the weights at the mapped file
static bool model_map(Model* m, const char* folder, Error* err) {
    memset(m, 0, sizeof *m);
    if (!config_read(&m->c, folder, err) || !safetensors_open(&m->file, folder, err)) return false;
    m->n = llama3_count(&m->c);
    m->w = params_list(&m->c);
    return llama3_map(m->w.p, &m->c, &m->file, err);
}

// tensor i as floats; false when one is NaN or infinite
static bool params_convert(float* out, const Param* from) {
    int64_t size = (int64_t)param_size(from), bad = 0;
#pragma omp parallel for reduction(+ : bad)
    for (int64_t j = 0; j < size; j++) {
        out[j] = tensor_get(*from->tensor, (size_t)j);
        bad += (bits_of_float(out[j]) & 0x7f800000u) == 0x7f800000u;
    }
    return bad == 0;
}

// opens a folder to train it: all weights as F32 in memory
static bool model_load(Model* m, const char* folder, Error* err) {
    if (!model_map(m, folder, err)) return false;
    ParamSet mapped = m->w;
    m->w = params_make(&m->c);
    for (int i = 0; i < m->n; i++)
        if (!params_convert(m->w.list[i].tensor->data, &mapped.list[i]))
            return set_error(err, "%s/%s holds a NaN or an infinity", folder, mapped.list[i].name);
    params_free(&mapped);
    safetensors_close(&m->file);
    return true;
}

static void layer_layout(LayerActs* a, Arena* arena, const Config* c, size_t N) {
    size_t C = (size_t)c->C, F = (size_t)c->F;
    a->x = arena_floats(arena, N * C);
    a->norm1 = arena_floats(arena, N * C);
    a->r1 = arena_floats(arena, N);
    a->qkv = arena_floats(arena, N * (size_t)config_qkv(c));
    a->lse = arena_floats(arena, N * (size_t)c->NH);
    a->att = arena_floats(arena, N * (size_t)(c->NH * c->HD));
    a->mid = arena_floats(arena, N * C);
    a->norm2 = arena_floats(arena, N * C);
    a->r2 = arena_floats(arena, N);
    a->gate_up = arena_floats(arena, N * 2 * F);
    a->ffn = arena_floats(arena, N * F);
}

static void acts_layout(Acts* s, const Config* c, bool training, int positions) {
    size_t N = (size_t)s->rows, C = (size_t)c->C, F = (size_t)c->F;
    Arena* arena = &s->arena;
    for (int l = 0; l < c->L; l++) {
        if (l == 0 || training) layer_layout(&s->layer[l], arena, c, N);
        else s->layer[l] = s->layer[0];
    }
    s->x = training ? arena_floats(arena, N * C) : s->layer[0].x;
    s->norm = arena_floats(arena, N * C);
    s->r = arena_floats(arena, N);
    s->out = arena_floats(arena, N * C);
    s->head = arena_floats(arena, lm_head_scratch(c->V));
    s->cos = arena_floats(arena, (size_t)positions * (size_t)c->HD / 2);
    s->sin = arena_floats(arena, (size_t)positions * (size_t)c->HD / 2);
    if (s->capacity) s->cache = arena_floats(arena, (size_t)c->L * (size_t)s->capacity * (size_t)(2 * c->NKV * c->HD));
    if (!training) return;
    s->dx = arena_floats(arena, N * C);
    s->dnorm = arena_floats(arena, N * C);
    s->dqkv = arena_floats(arena, N * (size_t)config_qkv(c));
    s->datt = arena_floats(arena, N * (size_t)(c->NH * c->HD));
    s->dgate_up = arena_floats(arena, N * 2 * F);
    s->dffn = arena_floats(arena, N * F);
}

// room for passes of up to `rows` rows over positions 0 .. positions-1; with capacity > 0, a cache of that many rows
static Acts acts_make(const Config* c, int rows, int positions, int capacity, bool training) {
    Acts s = { 0 };
    s.rows = rows;
    s.capacity = capacity;
    s.layer = allocate((size_t)c->L, sizeof *s.layer);
    acts_layout(&s, c, training, positions);
    arena_allocate(&s.arena);
    acts_layout(&s, c, training, positions);
    rope_table_cpu(s.cos, s.sin, positions, c->HD, c->theta, c->factor, c->low, c->high, c->original);
    return s;
}

static void acts_free(Acts* s) {
    free(s->layer);
    arena_free(&s->arena);
}

// ---- 3. blocks -------------------------------------------------------------------------------
// x, the residual stream, comes in as s->layer[l].x; each block leaves what it adds to it in s->out.
// Backward: s->dx is the gradient of the block's result on entry, of the residual stream before it on return.

// y = a + b; y may be a
static void residual(float* y, const float* a, const float* b, int N, int C) {
#pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++)
        for (size_t i = (size_t)n * (size_t)C; i < (size_t)(n + 1) * (size_t)C; i++) y[i] = a[i] + b[i];
}

// y (N, sum of rows): the products of x (N, C) with several matrices, side by side; one product when they lie one after
// the other, as in training
static void matmul_group(float* y, const float* x, const Tensor* w, const int* rows, int count, int N, int C) {
    int width = 0, column = 0;
    bool joined = true;
    for (int i = 0; i < count; i++) {
        const char* start = (const char*)w[0].data + (size_t)width * (size_t)C * dtype_bytes(w[0].dtype);
        joined = joined && w[i].data == start && w[i].dtype == w[0].dtype;
        width += rows[i];
    }
    if (joined) {
        matmul_forward_cpu(y, width, x, w[0], N, C, width);
        return;
    }
    for (int i = 0; i < count; column += rows[i++]) matmul_forward_cpu(y + column, width, x, w[i], N, C, rows[i]);
}

static void embed_forward(const Config* c, const Params* w, Acts* s, const int32_t* ids) {
    embedding_forward_cpu(s->layer[0].x, ids, w->embed, s->B * s->T, c->C);
}

static void embed_backward(const Config* c, Params* dw, Acts* s, const int32_t* ids) {
    embedding_backward_cpu(dw->embed.data, s->dx, ids, s->B * s->T, c->C);
}

// appends this pass's keys and values to layer l's cache and returns its first row
static float* cache_append(const Config* c, Acts* s, int l) {
    size_t Q = (size_t)(c->NH * c->HD), width = (size_t)(2 * c->NKV * c->HD), QKV = Q + width;
    float* first = s->cache + (size_t)l * (size_t)s->capacity * width;
    for (size_t t = 0; t < (size_t)s->T; t++)
        memcpy(first + ((size_t)s->pos + t) * width, s->layer[l].qkv + t * QKV + Q, width * sizeof(float));
    return first;
}

static void attention_block_forward(const Config* c, const LayerParams* w, Acts* s, int l) {
    LayerActs* a = &s->layer[l];
    const int N = s->B * s->T, C = c->C, Q = c->NH * c->HD, KV = c->NKV * c->HD, QKV = Q + 2 * KV;
    const Tensor qkv[] = { w->q, w->k, w->v };
    const int rows[] = { Q, KV, KV };
    rmsnorm_forward_cpu(a->norm1, a->r1, a->x, w->attn_norm.data, N, C, c->eps);
    matmul_group(a->qkv, a->norm1, qkv, rows, 3, N, C);
    rope_forward_cpu(a->qkv, s->cos, s->sin, s->B, s->T, s->pos, c->NH + c->NKV, c->HD, QKV);
    const float* k = s->cache ? cache_append(c, s, l) : a->qkv + Q;
    const int S = s->cache ? s->capacity : s->T, ldkv = s->cache ? 2 * KV : QKV;
    attention_forward_cpu(a->att, a->lse, a->qkv, k, k + KV, s->B, s->T, S, s->pos, c->NH, c->NKV, c->HD, QKV, ldkv);
    matmul_forward_cpu(s->out, C, a->att, w->o, N, Q, C);
}

static void attention_block_backward(const Config* c, const LayerParams* w, LayerParams* dw, Acts* s, int l) {
    const LayerActs* a = &s->layer[l];
    const int N = s->B * s->T, C = c->C, Q = c->NH * c->HD, KV = c->NKV * c->HD, QKV = Q + 2 * KV;
    const float *q = a->qkv, *k = q + Q, *v = k + KV;
    float *dq = s->dqkv, *dk = dq + Q, *dv = dk + KV;
    matmul_backward_cpu(s->datt, false, dw->o.data, s->dx, a->att, w->o, N, Q, C);
    attention_backward_cpu(dq, dk, dv, s->datt, q, k, v, a->att, a->lse, s->B, s->T, c->NH, c->NKV, c->HD, QKV);
    rope_backward_cpu(s->dqkv, s->cos, s->sin, s->B, s->T, 0, c->NH + c->NKV, c->HD, QKV);
    matmul_backward_cpu(s->dnorm, false, dw->q.data, s->dqkv, a->norm1, w->q, N, C, QKV); // q, k and v lie together
    rmsnorm_backward_cpu(s->dx, dw->attn_norm.data, s->dnorm, a->x, w->attn_norm.data, a->r1, N, C);
}

static void mlp_block_forward(const Config* c, const LayerParams* w, Acts* s, int l) {
    LayerActs* a = &s->layer[l];
    const int N = s->B * s->T, C = c->C, F = c->F;
    const Tensor gate_up[] = { w->gate, w->up };
    const int rows[] = { F, F };
    rmsnorm_forward_cpu(a->norm2, a->r2, a->mid, w->ffn_norm.data, N, C, c->eps);
    matmul_group(a->gate_up, a->norm2, gate_up, rows, 2, N, C);
    swiglu_forward_cpu(a->ffn, a->gate_up, N, F);
    matmul_forward_cpu(s->out, C, a->ffn, w->down, N, F, C);
}

static void mlp_block_backward(const Config* c, const LayerParams* w, LayerParams* dw, Acts* s, int l) {
    const LayerActs* a = &s->layer[l];
    const int N = s->B * s->T, C = c->C, F = c->F;
    matmul_backward_cpu(s->dffn, false, dw->down.data, s->dx, a->ffn, w->down, N, F, C);
    swiglu_backward_cpu(s->dgate_up, s->dffn, a->gate_up, N, F);
    matmul_backward_cpu(s->dnorm, false, dw->gate.data, s->dgate_up, a->norm2, w->gate, N, C, 2 * F); // gate and up too
    rmsnorm_backward_cpu(s->dx, dw->ffn_norm.data, s->dnorm, a->mid, w->ffn_norm.data, a->r2, N, C);
}

// the sum of the losses over labels that are not -100. With dw, also the gradient of scale * that sum: s->dnorm, dw
static double head_forward(const Config* c, const Params* w, Params* dw, Acts* s, const int32_t* labels, float scale) {
    const int N = s->B * s->T;
    rmsnorm_forward_cpu(s->norm, s->r, s->x, w->norm.data, N, c->C, c->eps);
    return lm_head_loss_cpu(dw ? s->dnorm : NULL, dw ? dw->lm_head.data : NULL, s->norm, w->lm_head, labels, scale, N, c->C,
                            c->V, s->head);
}

static void head_backward(const Config* c, const Params* w, Params* dw, Acts* s) {
    const int N = s->B * s->T;
    memset(s->dx, 0, (size_t)N * (size_t)c->C * sizeof(float));
    rmsnorm_backward_cpu(s->dx, dw->norm.data, s->dnorm, s->x, w->norm.data, s->r, N, c->C);
}

// ---- 4. model --------------------------------------------------------------------------------

// ids (B, T) through all layers to s->x. With a cache, B is 1 and the tokens stand at positions s->pos and on
static void llama3_forward(const Model* m, Acts* s, const int32_t* ids, int B, int T) {
    const Config* c = &m->c;
    require(B * T <= s->rows && (!s->cache || (B == 1 && s->pos + T <= s->capacity)), "the pass fits its memory");
    s->B = B;
    s->T = T;
    embed_forward(c, m->w.p, s, ids);
    for (int l = 0; l < c->L; l++) {
        LayerActs* a = &s->layer[l];
        attention_block_forward(c, &m->w.p->layer[l], s, l);
        residual(a->mid, a->x, s->out, B * T, c->C);
        mlp_block_forward(c, &m->w.p->layer[l], s, l);
        residual(l + 1 < c->L ? s->layer[l + 1].x : s->x, a->mid, s->out, B * T, c->C);
    }
}

// after llama3_forward: the sum of the losses, and nothing else
static double llama3_loss(const Model* m, Acts* s, const int32_t* labels) {
    return head_forward(&m->c, m->w.p, NULL, s, labels, 1);
}

// after llama3_forward: adds the gradient of scale * (sum of the losses) to m->dw and returns that sum
static double llama3_backward(Model* m, Acts* s, const int32_t* ids, const int32_t* labels, float scale) {
    const Config* c = &m->c;
    Params *w = m->w.p, *dw = m->dw.p;
    double loss = head_forward(c, w, dw, s, labels, scale);
    head_backward(c, w, dw, s);
    for (int l = c->L - 1; l >= 0; l--) {
        mlp_block_backward(c, &w->layer[l], &dw->layer[l], s, l);
        attention_block_backward(c, &w->layer[l], &dw->layer[l], s, l);
    }
    embed_backward(c, dw, s, ids);
    return loss;
}

typedef struct {
    float lr, beta1, beta2, eps, weight_decay, clip; // clip 0: none
} AdamWOptions;

// one AdamW step on m->dw, clipped to a global norm; returns the norm before. Changes nothing when it is not finite
static float llama3_update(Model* m, AdamWOptions o) {
    double sum = 0;
    for (int i = 0; i < m->n; i++) sum += sum_of_squares_cpu(m->dw.list[i].tensor->data, param_size(&m->dw.list[i]));
    float norm = (float)sqrt(sum), scale = 1;
    if (!isfinite(norm)) return norm;
    if (o.clip > 0 && o.clip / (norm + 1e-6f) < 1) scale = o.clip / (norm + 1e-6f); // as torch.nn.utils.clip_grad_norm_
    m->updates++;
    for (int i = 0; i < m->n; i++) {
        const Param* p = &m->w.list[i];
        adamw_cpu(p->tensor->data, m->m.list[i].tensor->data, m->v.list[i].tensor->data, m->dw.list[i].tensor->data,
                  param_size(p), o.lr, o.beta1, o.beta2, o.eps, param_decays(p) ? o.weight_decay : 0, (int)m->updates, scale);
    }
    return norm;
}

static void llama3_zero_gradients(Model* m) {
    memset(m->dw.memory, 0, llama3_place(m->dw.list, m->n, DTYPE_F32, NULL));
}

// overwrites logits (count, V) with those of rows first .. first+count-1 of s->x
static void llama3_logits(const Model* m, Acts* s, float* logits, int first, int count) {
    const Config* c = &m->c;
    float *x = s->x + (size_t)first * (size_t)c->C, *norm = s->norm + (size_t)first * (size_t)c->C;
    rmsnorm_forward_cpu(norm, s->r + first, x, m->w.p->norm.data, count, c->C, c->eps);
    matmul_forward_cpu(logits, c->V, norm, m->w.p->lm_head, count, c->C, c->V);
}

// runs n tokens behind those in the cache, as many at a time as s holds, and overwrites logits (V) with the last one's
static void llama3_feed(const Model* m, Acts* s, const int32_t* ids, int n, float* logits) {
    while (n > 0) {
        int T = n < s->rows ? n : s->rows;
        llama3_forward(m, s, ids, 1, T);
        s->pos += T;
        ids += T;
        n -= T;
    }
    llama3_logits(m, s, logits, s->T - 1, 1);
}

enum { PREFILL_ROWS = 256 }; // tokens of a prompt that go through the model at a time

// memory to run the model on one sequence of up to n tokens
static Acts acts_for_sequence(const Config* c, int n) { return acts_make(c, n < PREFILL_ROWS ? n : PREFILL_ROWS, n, n, false); }

// ---- the library -----------------------------------------------------------------------------

#ifdef LLAMA3_LIBRARY

struct CpuModel {
    Model model;
    Acts acts;
};

CpuModel* cpu_model_load(const char* folder) {
    Error err;
    CpuModel* m = allocate(1, sizeof *m);
    if (!model_load(&m->model, folder, &err)) die("%s", err.text);
    return m;
}

void cpu_model_free(CpuModel* m) {
    model_free(&m->model);
    acts_free(&m->acts);
    free(m);
}

const Config* cpu_model_config(const CpuModel* m) { return &m->model.c; }

// makes room for a batch of B*T
static void cpu_reserve(CpuModel* m, int B, int T) {
    if (B * T <= m->acts.rows) return;
    acts_free(&m->acts);
    m->acts = acts_make(&m->model.c, B * T, B * T, 0, true);
    if (m->model.dw.memory) return;
    m->model.dw = params_make(&m->model.c);
    m->model.m = params_make(&m->model.c);
    m->model.v = params_make(&m->model.c);
}

static int count_labels(const int32_t* labels, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) count += labels[i] != -100;
    return count ? count : 1;
}

float cpu_forward(CpuModel* m, const int32_t* ids, const int32_t* labels, int B, int T, float* logits) {
    cpu_reserve(m, B, T);
    llama3_forward(&m->model, &m->acts, ids, B, T);
    if (logits) llama3_logits(&m->model, &m->acts, logits, 0, B * T);
    return labels ? (float)(llama3_loss(&m->model, &m->acts, labels) / count_labels(labels, B * T)) : 0;
}

float cpu_backward(CpuModel* m, const int32_t* ids, const int32_t* labels, int B, int T) {
    cpu_reserve(m, B, T);
    int count = count_labels(labels, B * T);
    llama3_zero_gradients(&m->model);
    llama3_forward(&m->model, &m->acts, ids, B, T);
    return (float)(llama3_backward(&m->model, &m->acts, ids, labels, 1 / (float)count) / count);
}

static float* cpu_tensor(ParamSet* s, int count, const char* name, size_t* n) {
    for (int i = 0; i < count && s->list; i++) {
        if (strcmp(s->list[i].name, name) != 0) continue;
        *n = param_size(&s->list[i]);
        return s->list[i].tensor->data;
    }
    return NULL;
}

float* cpu_parameter(CpuModel* m, const char* name, size_t* n) { return cpu_tensor(&m->model.w, m->model.n, name, n); }
float* cpu_gradient(CpuModel* m, const char* name, size_t* n) { return cpu_tensor(&m->model.dw, m->model.n, name, n); }

float cpu_update(CpuModel* m, float lr, float beta1, float beta2, float eps, float weight_decay, float clip) {
    AdamWOptions o = { lr, beta1, beta2, eps, weight_decay, clip };
    return llama3_update(&m->model, o);
}

void cpu_generate_greedy(CpuModel* m, int32_t* ids, int n_prompt, int n_total) {
    const Config* c = &m->model.c;
    Acts s = acts_for_sequence(c, n_total);
    float* logits = allocate((size_t)c->V, sizeof *logits);
    for (int n = 0; n_prompt < n_total; n = n_prompt++) {
        llama3_feed(&m->model, &s, ids + n, n_prompt - n, logits);
        int best = 0;
        for (int i = 1; i < c->V; i++)
            if (logits[i] > logits[best]) best = i;
        ids[n_prompt] = best;
    }
    free(logits);
    acts_free(&s);
}

#else // the program

#include <signal.h>

#include "llmc/checkpoint.h"
#include "llmc/corpus.h"
#include "llmc/data.h"
#include "llmc/hellaswag.h"
#include "llmc/log.h"
#include "llmc/options.h"
#include "llmc/progress.h"
#include "llmc/sampler.h"
#include "llmc/schedule.h"
#include "llmc/tokenizer.h"

EMBED(corpus_train, "build/corpus/train.txt");
EMBED(corpus_val, "build/corpus/val.txt");

// the state of one command
typedef struct {
    Options o;
    Model m;
    Acts s;
    Tokenizer t;
    bool has_tokenizer;       // false: token ids only
    char folder[PATH_SIZE];   // the model's; empty for a preset
    char out[PATH_SIZE];      // of this run
    Data train, val;
    int32_t *ids, *labels;    // (rows, T), what a step reads
    int B, T;
    int64_t rows;             // sequences of a step: B, or a multiple of it
    int64_t step, saved;      // steps done; the step of the newest checkpoint, -1: none
    int64_t train_tokens;     // of the run that is resumed
    uint64_t position;        // sequences drawn from the training data so far
    double best;              // lowest validation loss
    Log log;
} Run;

// what a signal asked for; the training loop looks at it between steps
static volatile sig_atomic_t interrupted = 0;
static void on_signal(int number) {
    interrupted = number;
    signal(number, SIG_DFL); // a second one ends the program at once
}

// ends the program with the line in err unless ok
static void must(bool ok, const Error* err) {
    if (!ok) die("%s", err->text);
}

// ---- 5. once in a while ----------------------------------------------------------------------

// -- models and tokenizers

// names the first tensor that holds a NaN or an infinity; true when none does
static bool params_finite(const ParamSet* s, int n, Error* err) {
    bool finite = true;
    for (int i = 0; i < n && finite; i++) {
        float* copy = allocate(param_size(&s->list[i]), sizeof *copy);
        finite = params_convert(copy, &s->list[i]);
        free(copy);
        if (!finite) set_error(err, "%s holds a NaN or an infinity", s->list[i].name);
    }
    return finite;
}

// opens a folder to run it: matrices stay in the mapped file, only the norms' vectors are expanded
static bool model_open(Model* m, const char* folder, Error* err) {
    if (!model_map(m, folder, err)) return false;
    float* norms = allocate((size_t)(2 * m->c.L + 1) * (size_t)m->c.C, sizeof *norms);
    m->w.memory = norms;
    for (int i = 0; i < m->n; i++) {
        const Param* p = &m->w.list[i];
        if (p->rows) continue;
        if (!params_convert(norms, p)) return set_error(err, "%s/%s holds a NaN or an infinity", folder, p->name);
        p->tensor->data = norms;
        p->tensor->dtype = DTYPE_F32;
        norms += p->cols;
    }
    return true;
}

// finds out which folder --model means
static void find_folder(Run* r) {
    Error err;
    if (!r->o.model) die("--model is needed: a model folder, or the folder of a run");
    must(checkpoint_resolve(r->o.model, r->folder, sizeof r->folder, &err), &err);
}

// opens the tokenizer in the model's folder, or that of --tokenizer
static void find_tokenizer(Run* r) {
    Error err;
    const char* tokenizer = r->o.tokenizer;
    if (!tokenizer && (folder_has(r->folder, "tokenizer.json") || folder_has(r->folder, "tokenizer.model")))
        tokenizer = r->folder;
    r->has_tokenizer = tokenizer != NULL;
    if (tokenizer) must(tokenizer_open(&r->t, tokenizer, &err), &err);
}

static void check_vocabulary(const Run* r) {
    if (r->has_tokenizer && r->t.V > r->m.c.V)
        die("the tokenizer has token %d, but the model's vocabulary ends at %d", r->t.V - 1, r->m.c.V - 1);
}

static void open_model(Run* r) {
    Error err;
    find_folder(r);
    find_tokenizer(r);
    must(model_open(&r->m, r->folder, &err), &err);
    check_vocabulary(r);
}

// the tokenizer, or an error that says what it is needed for
static Tokenizer* need_tokenizer(Run* r, const char* what) {
    if (!r->has_tokenizer)
        die("%s has no tokenizer.json or tokenizer.model, which %s needs: give --tokenizer", r->folder, what);
    return &r->t;
}

// the weights of a preset; the tokenizer decides V and the tokens that begin and end a text
static void make_model(Run* r) {
    Error err;
    Config* c = &r->m.c;
    r->has_tokenizer = true;
    if (r->o.tokenizer) must(tokenizer_open(&r->t, r->o.tokenizer, &err), &err);
    else tokenizer_bytes(&r->t);
    if (!c->V) c->V = r->t.V;
    check_vocabulary(r);
    int32_t turn = tokenizer_special(&r->t, "<|eot_id|>");
    c->bos = r->t.bos;
    c->n_eos = 0;
    if (r->t.eos >= 0) c->eos[c->n_eos++] = r->t.eos;
    if (turn >= 0) c->eos[c->n_eos++] = turn;
    r->m.n = llama3_count(c);
    r->m.w = params_make(c);
    llama3_init(r->m.w.list, r->m.n, (uint64_t)r->o.seed);
}

// -- checkpoints

static void add_entries(SafetensorsEntry* entries, size_t* n, const char* prefix, const ParamSet* s, int count, Dtype dtype) {
    for (int i = 0; i < count; i++) {
        SafetensorsEntry* e = &entries[(*n)++];
        const Param* p = &s->list[i];
        memset(e, 0, sizeof *e);
        require(snprintf(e->name, sizeof e->name, "%s%s", prefix, p->name) < (int)sizeof e->name, "names fit");
        e->source = *p->tensor;
        e->dtype = dtype;
        e->n_dims = p->rows ? 2 : 1;
        e->shape[0] = p->rows ? p->rows : p->cols;
        e->shape[1] = p->cols;
    }
}

// optimizer.safetensors: m, v, and the weights themselves when those of the model folder are rounded to BF16
static bool save_optimizer(const Run* r, const char* folder, bool master, Error* err) {
    const Model* m = &r->m;
    char path[PATH_SIZE];
    size_t n = 0;
    SafetensorsEntry* entries = allocate(3 * (size_t)m->n, sizeof *entries);
    add_entries(entries, &n, "m.", &m->m, m->n, DTYPE_F32);
    add_entries(entries, &n, "v.", &m->v, m->n, DTYPE_F32);
    if (master) add_entries(entries, &n, "master.", &m->w, m->n, DTYPE_F32);
    bool ok = path_join(path, folder, "optimizer.safetensors", err) && safetensors_write(path, entries, n, err);
    free(entries);
    return ok;
}

// state.json: what else a resumed run needs. Random numbers are counted, so seed, step and position are all their state
static bool save_state(const Run* r, const char* folder, Error* err) {
    cJSON* root = cJSON_CreateObject();
    cJSON_AddNumberToObject(root, "step", (double)r->step);
    cJSON_AddNumberToObject(root, "position", (double)r->position);
    cJSON_AddNumberToObject(root, "updates", (double)r->m.updates);
    cJSON_AddNumberToObject(root, "train_tokens", (double)data_tokens(&r->train));
    if (isfinite(r->best)) cJSON_AddNumberToObject(root, "best_val_loss", r->best);
    cJSON_AddItemToObject(root, "options", options_to_json(&r->o));
    return json_write(root, folder, "state.json", err);
}

// OUT/step-…: a model folder with the optimizer's state; whole or not there at all
static bool save_checkpoint(const Run* r, Error* err) {
    const Model* m = &r->m;
    Dtype dtype = strcmp(r->o.dtype, "BF16") == 0 ? DTYPE_BF16 : DTYPE_F32;
    Checkpoint c;
    char path[PATH_SIZE];
    size_t n = 0;
    if (!checkpoint_begin(&c, r->out, r->step, err)) return false;
    SafetensorsEntry* entries = allocate((size_t)m->n, sizeof *entries);
    add_entries(entries, &n, "", &m->w, m->n, dtype);
    bool ok = config_write(&m->c, c.path, dtype, err) && path_join(path, c.path, "model.safetensors", err) &&
              safetensors_write(path, entries, n, err) &&
              (!r->has_tokenizer || tokenizer_write(&r->t, c.path, err)) &&
              (!m->m.memory || save_optimizer(r, c.path, dtype != DTYPE_F32, err)) && save_state(r, c.path, err) &&
              checkpoint_commit(&c, (int)r->o.keep, err);
    free(entries);
    if (!ok) checkpoint_abandon(&c);
    return ok;
}

// fills a set from the tensors of a file whose names are prefix + the list's
static bool load_set(ParamSet* s, const Config* c, const Safetensors* file, const char* prefix, Error* err) {
    ParamSet mapped = params_list(c);
    bool ok = true;
    for (int i = 0; i < llama3_count(c) && ok; i++) {
        Param p = mapped.list[i];
        snprintf(p.name, sizeof p.name, "%s%.54s", prefix, mapped.list[i].name);
        ok = llama3_map_tensor(&p, file, err);
        if (ok && !params_convert(s->list[i].tensor->data, &p)) ok = set_error(err, "%s holds a NaN or an infinity", p.name);
    }
    params_free(&mapped);
    return ok;
}

// the moments, and the master weights where there are some, of the checkpoint in r->folder
static void load_optimizer(Run* r) {
    Error err;
    char path[PATH_SIZE];
    Safetensors file = { 0 };
    Model* m = &r->m;
    must(path_join(path, r->folder, "optimizer.safetensors", &err) && safetensors_open(&file, path, &err), &err);
    must(load_set(&m->m, &m->c, &file, "m.", &err) && load_set(&m->v, &m->c, &file, "v.", &err), &err);
    if (safetensors_find(&file, "master.model.norm.weight")) must(load_set(&m->w, &m->c, &file, "master.", &err), &err);
    safetensors_close(&file);
}

// the newest checkpoint in --out: its options, step and place in the data. Leaks the JSON tree, which options point into
static void load_state(Run* r) {
    Error err;
    char path[PATH_SIZE], *text;
    size_t n;
    int64_t position, updates;
    must(checkpoint_latest(r->o.out, r->folder, sizeof r->folder, &r->step, &err), &err);
    must(path_join(path, r->folder, "state.json", &err) && read_file(path, &text, &n, 1 << 20, &err), &err);
    cJSON* root = json_parse(text, n, &err);
    if (!root) die("%s: %s", path, err.text);
    if (!json_whole(json_get(root, "step"), &r->step) || !json_whole(json_get(root, "position"), &position) ||
        !json_whole(json_get(root, "updates"), &updates) || !json_whole(json_get(root, "train_tokens"), &r->train_tokens) ||
        r->step < 0 || position < 0 || updates < 0)
        die("%s: step, position, updates and train_tokens are expected to be whole numbers", path);
    must(options_from_json(&r->o, json_get(root, "options"), &err), &err);
    r->saved = r->step;
    r->position = (uint64_t)position;
    r->m.updates = updates;
    const cJSON* best = json_get(root, "best_val_loss");
    if (cJSON_IsNumber(best)) r->best = best->valuedouble;
    free(text);
}

// -- evaluation

// mean loss over `windows` windows of d from the first on, B at a time; counts the predictions, shows progress when named
static double evaluate(Run* r, Data* d, uint64_t windows, const char* progress_name, int64_t* predictions) {
    Progress progress = { 0 };
    double sum = 0;
    int64_t count = 0;
    int B = r->B, T = r->T;
    if (progress_name) progress_begin(&progress, progress_name, (double)windows);
    for (uint64_t i = 0; i < windows; i += (uint64_t)B) {
        int rows = windows - i < (uint64_t)B ? (int)(windows - i) : B;
        for (int b = 0; b < rows; b++) {
            size_t at = (size_t)b * (size_t)T;
            data_eval_window(d, r->ids + at, r->labels + at, T, i + (uint64_t)b);
        }
        for (int j = 0; j < rows * T; j++) count += r->labels[j] != IGNORED_LABEL;
        llama3_forward(&r->m, &r->s, r->ids, rows, T);
        sum += llama3_loss(&r->m, &r->s, r->labels);
        if (progress_name) progress_add(&progress, rows);
    }
    if (progress_name) progress_end(&progress);
    *predictions = count;
    return count ? sum / (double)count : 0;
}

// validation during training: the first --eval-steps batches
static void validate(Run* r) {
    Error err;
    int64_t predictions;
    uint64_t windows = data_eval_windows(&r->val, r->T), most = (uint64_t)r->o.eval_steps * (uint64_t)r->B;
    double loss = evaluate(r, &r->val, windows < most ? windows : most, NULL, &predictions);
    if (!(loss >= r->best)) r->best = loss;
    fprintf(stderr, "step %6lld  validation loss %.4f   best %.4f\n", (long long)r->step, loss, r->best);
    must(log_line(&r->log, &err, "{\"step\":%lld,\"val_loss\":%.6f}", (long long)r->step, loss), &err);
}

// the log-probability of ids[from .. n) given what stands before each; s has room for n tokens
static double continuation_logprob(Run* r, const int32_t* ids, int from, int n) {
    for (int i = 0; i < n; i++) r->labels[i] = i + 1 >= from && i + 1 < n ? ids[i + 1] : IGNORED_LABEL;
    llama3_forward(&r->m, &r->s, ids, 1, n);
    return -llama3_loss(&r->m, &r->s, r->labels);
}

// whether the model finds the right ending likeliest: as a whole, and per byte of its text
static void score_task(Run* r, const HellaswagTask* task, bool* right, bool* right_per_byte) {
    Error err;
    Tokens ids = { 0 };
    double best = -INFINITY, best_per_byte = -INFINITY;
    must(tokenizer_encode(&r->t, &ids, task->context, strlen(task->context), false, &err), &err);
    size_t context = ids.n;
    for (int e = 0; e < HELLASWAG_ENDINGS; e++) {
        char* ending = allocate(strlen(task->endings[e]) + 2, 1);
        sprintf(ending, " %s", task->endings[e]);
        ids.n = context;
        must(tokenizer_encode(&r->t, &ids, ending, strlen(ending), false, &err), &err);
        size_t skip = ids.n > (size_t)r->T ? ids.n - (size_t)r->T : 0; // keep the end of what is too long
        int from = context > skip ? (int)(context - skip) : 0;
        double logprob = continuation_logprob(r, ids.ids + skip, from, (int)(ids.n - skip));
        if (!isfinite(logprob)) die("%s: the model's loss is not finite", r->folder);
        double per_byte = logprob / (double)strlen(task->endings[e]);
        if (logprob > best) best = logprob, *right = e == task->label;
        if (per_byte > best_per_byte) best_per_byte = per_byte, *right_per_byte = e == task->label;
        free(ending);
    }
    tokens_free(&ids);
}

static void eval_hellaswag(Run* r) {
    Error err;
    Hellaswag h;
    Progress progress;
    size_t right = 0, right_per_byte = 0;
    need_tokenizer(r, "--hellaswag");
    must(hellaswag_open(&h, r->o.hellaswag, &err), &err);
    progress_begin(&progress, "scoring", (double)h.n);
    for (size_t i = 0; i < h.n; i++) {
        bool whole = false, per_byte = false;
        score_task(r, &h.tasks[i], &whole, &per_byte);
        right += whole;
        right_per_byte += per_byte;
        progress_add(&progress, 1);
    }
    progress_end(&progress);
    printf("accuracy %.4f  accuracy_norm %.4f  tasks %zu\n", (double)right / (double)h.n, (double)right_per_byte / (double)h.n, h.n);
    hellaswag_close(&h);
}

// -- writing text

typedef struct {
    const Model* m;
    Tokenizer* t;           // NULL: nothing is printed
    Acts s;
    Tokens ids;             // all so far, of which the first s.pos have been through the model
    SamplerOptions sampler;
    uint64_t seed;
    bool ignore_eos;
    float* logits;          // (V)
    Candidate* scratch;     // (V)
    double prefill_s, decode_s;
    int prefilled, decoded; // tokens
} Generation;

static Generation generation_make(const Model* m, Tokenizer* t, int capacity, const Options* o) {
    Generation g = { 0 };
    g.m = m;
    g.t = t;
    g.s = acts_for_sequence(&m->c, capacity);
    g.sampler.temperature = (float)o->temperature;
    g.sampler.top_k = (int)o->top_k;
    g.sampler.top_p = (float)o->top_p;
    g.sampler.min_p = (float)o->min_p;
    g.seed = (uint64_t)o->seed;
    g.ignore_eos = o->ignore_eos;
    g.logits = allocate((size_t)m->c.V, sizeof *g.logits);
    g.scratch = allocate((size_t)m->c.V, sizeof *g.scratch);
    return g;
}

static void generation_free(Generation* g) {
    acts_free(&g->s);
    tokens_free(&g->ids);
    free(g->logits), free(g->scratch);
}

static bool is_end(const Config* c, int32_t id) {
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos[i] == id) return true;
    return false;
}

// the next token, appended to g->ids; -1 when the logits are not numbers
static int32_t generate_token(Generation* g) {
    double start = now();
    int n = (int)g->ids.n - g->s.pos;
    llama3_feed(g->m, &g->s, g->ids.ids + g->s.pos, n, g->logits);
    int32_t id = sample(g->logits, g->m->c.V, &g->sampler, g->seed, g->ids.n, g->scratch);
    if (id >= 0) tokens_push(&g->ids, id);
    if (n > 1) g->prefill_s += now() - start, g->prefilled += n;
    else g->decode_s += now() - start, g->decoded++;
    return id;
}

// up to n new tokens, printed to file as they come; an end token ends the text and is not printed. False when the weights
// hold NaN
static bool generate_text(Generation* g, int64_t n, FILE* file) {
    Decoder decoder = { 0 };
    size_t n_piece, ready;
    for (int64_t i = 0; i < n && (int)g->ids.n < g->s.capacity; i++) {
        int32_t id = generate_token(g);
        if (id < 0) return false;
        if (is_end(&g->m->c, id) && !g->ignore_eos) break;
        if (!g->t) continue;
        const char* piece = tokenizer_piece(g->t, id, &n_piece);
        const char* text = decoder_push(&decoder, piece, n_piece, &ready);
        if (ready) fwrite(text, 1, ready, file), fflush(file);
    }
    const char* rest = decoder_flush(&decoder, &ready);
    if (ready) fwrite(rest, 1, ready, file);
    decoder_free(&decoder);
    return true;
}

// a sample during training, from the beginning of a text; its random numbers are its own
static void sample_text(Run* r) {
    int n = r->m.c.context < 256 ? r->m.c.context : 256;
    Generation g = generation_make(&r->m, &r->t, n, &r->o);
    g.seed = random_bits((uint64_t)r->o.seed, SAMPLER_STREAM, (uint64_t)r->step);
    tokens_push(&g.ids, r->t.bos >= 0 ? r->t.bos : 0);
    fprintf(stderr, "--- sample after %lld steps ---\n", (long long)r->step);
    generate_text(&g, n, stderr);
    fprintf(stderr, "\n---\n");
    generation_free(&g);
}

// -- training

// weights, options and place in the data: from a checkpoint, a preset or a folder
static void start_model(Run* r) {
    Error err;
    if (r->o.resume) load_state(r);
    if (!r->o.model) r->o.model = "tiny";
    if (!r->o.resume && config_preset(&r->m.c, r->o.model)) {
        make_model(r);
        return;
    }
    if (!r->o.resume) find_folder(r);
    find_tokenizer(r);
    int64_t updates = r->m.updates;
    must(model_load(&r->m, r->folder, &err), &err);
    r->m.updates = updates;
    check_vocabulary(r);
}

// the sizes of a step, and the learning rate where none was given
static void start_step(Run* r) {
    Options* o = &r->o;
    const Config* c = &r->m.c;
    if (o->seq > c->context) die("--seq %lld: the model's context is %d", (long long)o->seq, c->context);
    r->B = (int)o->batch;
    r->T = o->seq ? (int)o->seq : c->context < 256 ? c->context : 256;
    int64_t tokens = (int64_t)r->B * r->T;
    if (tokens > 1 << 26) die("--batch %d x --seq %d: at most %d tokens at a time", r->B, r->T, 1 << 26);
    if (o->total_batch % tokens) die("--total-batch %lld: expected a multiple of B*T = %lld", (long long)o->total_batch, (long long)tokens);
    r->rows = o->total_batch ? o->total_batch / r->T : r->B;
    if (o->lr == 0) o->lr = (r->folder[0] ? 0.05 : 0.5) / c->C;
    r->ids = allocate((size_t)r->rows * (size_t)r->T, sizeof *r->ids);
    r->labels = allocate((size_t)r->rows * (size_t)r->T, sizeof *r->labels);
}

static void start_data(Run* r) {
    Error err;
    const Options* o = &r->o;
    Tokenizer* t = r->has_tokenizer ? &r->t : NULL;
    int V = r->m.c.V;
    if (o->data) {
        must(data_open(&r->train, o->data, t, V, &err), &err);
        if (o->val) must(data_open(&r->val, o->val, t, V, &err), &err);
        else data_split(&r->train, &r->val, 0.05);
    } else {
        need_tokenizer(r, "the embedded corpus");
        must(corpus_open(&r->train, corpus_train, corpus_train_end, t, &err), &err);
        must(corpus_open(&r->val, corpus_val, corpus_val_end, t, &err), &err);
    }
    must(data_check_seq(&r->train, o->data ? o->data : "the embedded corpus", r->T, &err), &err);
    if (r->o.resume && r->train_tokens != (int64_t)data_tokens(&r->train))
        fprintf(stderr, "warning: the training data has %lld tokens now, the run had %lld\n", (long long)data_tokens(&r->train),
                (long long)r->train_tokens);
}

static void start_memory(Run* r) {
    r->m.dw = params_make(&r->m.c);
    r->m.m = params_make(&r->m.c);
    r->m.v = params_make(&r->m.c);
    if (r->o.resume) load_optimizer(r);
    r->s = acts_make(&r->m.c, r->B * r->T, r->T, 0, true);
}

static void start_output(Run* r) {
    Error err;
    if (r->o.resume) must(snprintf(r->out, sizeof r->out, "%s", r->o.out) < PATH_SIZE, &err);
    else must(output_folder(r->o.out, r->out, sizeof r->out, &err), &err);
    must(make_folders(r->out, &err), &err);
    if (r->o.steps > 0) must(log_open(&r->log, r->out, r->step, &err), &err);
}


static void print_banner(const Run* r) {
    const Config* c = &r->m.c;
    fprintf(stderr, "model      %s: %.2f M parameters, C %d, L %d, NH %d, NKV %d, HD %d, F %d, V %d\n", r->o.model,
            (double)llama3_size(r->m.w.list, r->m.n) * 1e-6, c->C, c->L, c->NH, c->NKV, c->HD, c->F, c->V);
    if (r->train.n_shards) fprintf(stderr, "data       %s: %.2f M tokens to train on, %.2f M to validate\n", r->o.data ? r->o.data : "the project's own sources",
            (double)data_tokens(&r->train) * 1e-6, (double)data_tokens(&r->val) * 1e-6);
    fprintf(stderr, "step       %lld sequences of %d tokens, %d at a time; AdamW, learning rate %.3g, %s\n", (long long)r->rows, r->T,
            r->B, r->o.lr, r->o.schedule);
    fprintf(stderr, "output     %s\n", r->out);
}

typedef struct {
    double loss, norm, lr, ms;
} StepResult;

// a loss or gradient that is not a number: says which tensor first
static void die_not_finite(Run* r, double loss) {
    Error err;
    set_error(&err, "no tensor does");
    if (params_finite(&r->m.w, r->m.n, &err)) params_finite(&r->m.dw, r->m.n, &err);
    die("step %lld: loss %g is not finite or its gradient is not: %s; the last checkpoint is whole", (long long)r->step + 1, loss,
        err.text);
}

static StepResult train_step(Run* r) {
    StepResult result;
    double start = now(), loss = 0;
    int64_t count = 0, tokens = r->rows * r->T, part = (int64_t)r->B * r->T;
    data_batch(&r->train, r->ids, r->labels, (int)r->rows, r->T, (uint64_t)r->o.seed, r->position);
    for (int64_t i = 0; i < tokens; i++) count += r->labels[i] != IGNORED_LABEL;
    float scale = count ? 1 / (float)count : 0;
    llama3_zero_gradients(&r->m);
    for (int64_t i = 0; i < tokens; i += part) {
        llama3_forward(&r->m, &r->s, r->ids + i, r->B, r->T);
        loss += llama3_backward(&r->m, &r->s, r->ids + i, r->labels + i, scale);
    }
    result.lr = schedule_lr(r->o.schedule, r->step, r->o.steps, r->o.warmup, r->o.lr, r->o.lr_final);
    AdamWOptions adamw = { (float)result.lr, (float)r->o.beta1, (float)r->o.beta2, 1e-8f, (float)r->o.weight_decay, (float)r->o.clip };
    result.loss = count ? loss / (double)count : 0;
    result.norm = isfinite(result.loss) ? llama3_update(&r->m, adamw) : NAN;
    if (!isfinite(result.norm)) die_not_finite(r, result.loss);
    result.ms = (now() - start) * 1e3;
    r->position += (uint64_t)r->rows;
    r->step++;
    return result;
}

// the terminal sees a step at most every half second, the log every one
static void report_step(Run* r, StepResult step, bool last, double* shown) {
    Error err;
    double tokens_s = (double)(r->rows * r->T) / step.ms * 1e3;
    must(log_line(&r->log, &err, "{\"step\":%lld,\"train_loss\":%.6f,\"grad_norm\":%.6g,\"lr\":%.6g,\"ms\":%.3f,\"tok_s\":%.0f}",
                  (long long)r->step, step.loss, step.norm, step.lr, step.ms, tokens_s), &err);
    if (!last && now() - *shown < 0.5) return;
    *shown = now();
    fprintf(stderr, "step %6lld/%lld  loss %.4f  norm %.3f  lr %.2e  %.1f ms  %.0f tok/s  %s left\n", (long long)r->step,
            (long long)r->o.steps, step.loss, step.norm, step.lr, step.ms, tokens_s, duration((double)(r->o.steps - r->step) * step.ms * 1e-3));
}

// a checkpoint, unless this step has one or the run writes none
static void checkpoint(Run* r) {
    Error err;
    if (!r->o.checkpoint_every || r->saved == r->step) return;
    must(save_checkpoint(r, &err), &err);
    r->saved = r->step;
}

static void train_loop(Run* r) {
    double shown = 0;
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    while (r->step < r->o.steps && !interrupted) {
        StepResult result = train_step(r);
        bool last = r->step == r->o.steps;
        report_step(r, result, last || interrupted, &shown);
        if (r->o.eval_every && (last || r->step % r->o.eval_every == 0)) validate(r);
        if (r->o.sample_every && r->has_tokenizer && (last || r->step % r->o.sample_every == 0)) sample_text(r);
        if (r->o.checkpoint_every && r->step % r->o.checkpoint_every == 0) checkpoint(r);
    }
    checkpoint(r);
}

static void command_train(Run* r) {
    r->best = INFINITY;
    r->saved = -1;
    start_model(r);
    start_step(r);
    if (r->o.steps > 0) {
        start_data(r);
        start_memory(r);
    }
    start_output(r);
    print_banner(r);
    if (r->o.resume && r->step >= r->o.steps)
        fprintf(stderr, "the run has done its %lld steps; with a larger --steps it goes on\n", (long long)r->step);
    train_loop(r);
    log_close(&r->log);
    if (r->saved >= 0) fprintf(stderr, "saved      %s/step-%08lld\n", r->out, (long long)r->saved);
    if (!interrupted) return;
    fprintf(stderr, "stopped after step %lld", (long long)r->step);
    if (r->saved == r->step) fprintf(stderr, "; go on with: llama3 train --resume --out %s", r->out);
    fprintf(stderr, "\n");
    exit(128 + interrupted);
}

// -- the other commands

// "1 2 3", with spaces or commas between
static void parse_ids(Tokens* ids, const char* text, int V) {
    for (const char* p = text; *p;) {
        char* end;
        errno = 0;
        long id = strtol(p, &end, 10);
        if (end == p || errno || (*end && !strchr(" ,\t\n", *end))) die("--ids: '%.20s' is not a token id", p);
        if (id < 0 || id >= V) die("--ids: token %ld is outside the vocabulary, 0 to %d", id, V - 1);
        tokens_push(ids, (int32_t)id);
        p = end + strspn(end, " ,\t\n");
    }
}

static void print_pieces(const Tokenizer* t, const Tokens* ids, size_t from) {
    for (size_t i = from, n; i < ids->n; i++) {
        const char* piece = tokenizer_piece(t, ids->ids[i], &n);
        if (piece) fwrite(piece, 1, n, stdout);
    }
}

static void print_ids(const Tokens* ids) {
    for (size_t i = 0; i < ids->n; i++) printf("%s%d", i ? " " : "", ids->ids[i]);
    printf("\n");
}

// the tokens to go on from, --ids or text behind bos
static Tokens read_prompt(Run* r) {
    Error err;
    Tokens ids = { 0 };
    char* text = NULL;
    size_t n = r->o.prompt ? strlen(r->o.prompt) : 0;
    if (r->o.ids) {
        parse_ids(&ids, r->o.ids, r->m.c.V);
    } else {
        need_tokenizer(r, "a prompt in words (--ids takes token ids)");
        if (r->t.bos >= 0) tokens_push(&ids, r->t.bos);
        if (r->o.prompt_file) must(read_file(r->o.prompt_file, &text, &n, (size_t)1 << 30, &err), &err);
        must(tokenizer_encode(&r->t, &ids, text ? text : r->o.prompt ? r->o.prompt : "", n, false, &err), &err);
        free(text);
    }
    if (!ids.n) die("nothing to go on from: give --prompt, --prompt-file or --ids");
    return ids;
}

// bytes of weights that go through the processor for one token: all but the embedding table, of which a row is read
static double weight_bytes(const Model* m) {
    double bytes = 0;
    for (int i = m->c.tied ? 0 : 1; i < m->n; i++) bytes += (double)param_size(&m->w.list[i]) * (double)dtype_bytes(m->w.list[i].tensor->dtype);
    return bytes;
}

static void print_speed(const Generation* g) {
    if (g->prefilled) fprintf(stderr, "prompt %d tokens, %.0f tok/s", g->prefilled, g->prefilled / g->prefill_s);
    if (g->decoded)
        fprintf(stderr, "%swrote %d tokens, %.1f tok/s, %.2f GB/s of weights", g->prefilled ? "; " : "", g->decoded,
                g->decoded / g->decode_s, g->decoded / g->decode_s * weight_bytes(g->m) * 1e-9);
    fprintf(stderr, "\n");
}

static void die_nan_logits(const Run* r) {
    Error err;
    if (params_finite(&r->m.w, r->m.n, &err)) set_error(&err, "no weight is NaN, but they overflow");
    die("%s: the logits are not finite: %s", r->folder, err.text);
}

static void command_generate(Run* r) {
    open_model(r);
    Tokens prompt = read_prompt(r);
    int64_t room = r->m.c.context - (int64_t)prompt.n, n = r->o.tokens;
    if (room < 1) die("the prompt has %zu tokens, but the model's context is %d", prompt.n, r->m.c.context);
    if (n > room) fprintf(stderr, "warning: %lld new tokens at most, for the model's context is %d\n", (long long)room, r->m.c.context);
    n = n < room ? n : room;
    Generation g = generation_make(&r->m, r->has_tokenizer && !r->o.print_ids ? &r->t : NULL, (int)((int64_t)prompt.n + n), &r->o);
    g.ids = prompt;
    if (g.t) print_pieces(&r->t, &prompt, prompt.ids[0] == r->t.bos ? 1 : 0);
    if (!generate_text(&g, n, stdout)) die_nan_logits(r);
    if (r->o.print_ids || !r->has_tokenizer) print_ids(&g.ids);
    else printf("\n");
    print_speed(&g);
    generation_free(&g);
}

static void command_chat(Run* r) {
    Error err;
    char* line = NULL;
    size_t size = 0;
    ssize_t n;
    bool terminal = isatty(STDIN_FILENO);
    open_model(r);
    Tokenizer* t = need_tokenizer(r, "chat");
    int32_t turn = tokenizer_special(t, "<|eot_id|>");
    int capacity = r->m.c.context < 8192 ? r->m.c.context : 8192;
    Generation g = generation_make(&r->m, t, capacity, &r->o);
    while ((terminal ? fputs("> ", stderr) : 0, n = getline(&line, &size, stdin)) >= 0) {
        if (n && line[n - 1] == '\n') n--;
        if (!n) continue;
        if (!g.ids.n && t->bos >= 0) tokens_push(&g.ids, t->bos);
        must(tokenizer_chat_message(t, &g.ids, "user", line, (size_t)n, &err) && tokenizer_chat_header(t, &g.ids, "assistant", &err), &err);
        if ((int)g.ids.n >= capacity) {
            fprintf(stderr, "the conversation has filled %d tokens; a new one begins\n", capacity);
            g.ids.n = 0;
            g.s.pos = 0;
            continue;
        }
        if (!generate_text(&g, r->o.tokens, stdout)) die_nan_logits(r);
        if (!is_end(&r->m.c, g.ids.ids[g.ids.n - 1])) tokens_push(&g.ids, turn);
        printf("\n");
        fflush(stdout);
    }
    if (terminal) print_speed(&g);
    free(line);
    generation_free(&g);
}

static void command_eval(Run* r) {
    Error err;
    open_model(r);
    const Options* o = &r->o;
    if (o->seq > r->m.c.context) die("--seq %lld: the model's context is %d", (long long)o->seq, r->m.c.context);
    if (!o->data == !o->hellaswag) die("eval needs --data or --hellaswag, one of them");
    int most = o->hellaswag ? 1024 : 256;
    r->T = o->seq ? (int)o->seq : r->m.c.context < most ? r->m.c.context : most;
    r->B = o->hellaswag ? 1 : (int)o->batch;
    if ((int64_t)r->B * r->T > 1 << 26) die("--batch %d x --seq %d: at most %d tokens at a time", r->B, r->T, 1 << 26);
    r->ids = allocate((size_t)r->B * (size_t)r->T, sizeof *r->ids);
    r->labels = allocate((size_t)r->B * (size_t)r->T, sizeof *r->labels);
    if (o->data) must(data_open(&r->val, o->data, r->has_tokenizer ? &r->t : NULL, r->m.c.V, &err), &err);
    r->s = acts_make(&r->m.c, r->B * r->T, r->T, 0, false);
    if (o->hellaswag) {
        eval_hellaswag(r);
        return;
    }
    int64_t predictions;
    double loss = evaluate(r, &r->val, data_eval_windows(&r->val, r->T), "evaluating", &predictions);
    if (!isfinite(loss)) die_nan_logits(r);
    printf("loss %.6f  perplexity %.4f  predictions %lld\n", loss, exp(loss), (long long)predictions);
}

static void open_tokenizer(Run* r) {
    Error err;
    if (r->o.tokenizer) must(tokenizer_open(&r->t, r->o.tokenizer, &err), &err);
    else tokenizer_bytes(&r->t);
}

static void command_tokenize(Run* r) {
    Error err;
    Tokens ids = { 0 };
    Map text;
    open_tokenizer(r);
    bool to_file = option_given(&r->o, "out");
    if (!r->o.data) die("tokenize needs --data: a text file");
    if (to_file == r->o.print_ids) die("tokenize needs --out FILE.bin or --print-ids, one of them");
    must(map_file(&text, r->o.data, &err), &err);
    if (r->o.bos && r->t.bos >= 0) tokens_push(&ids, r->t.bos);
    must(tokenizer_encode(&r->t, &ids, (const char*)text.data, text.size, r->o.special, &err), &err);
    if (to_file) must(data_write_bin(r->o.out, ids.ids, ids.n, r->t.V, &err), &err);
    else print_ids(&ids);
    fprintf(stderr, "%zu bytes, %zu tokens\n", text.size, ids.n);
    unmap_file(&text);
    tokens_free(&ids);
}

static void command_detokenize(Run* r) {
    Tokens ids = { 0 };
    open_tokenizer(r);
    if (!r->o.ids) die("detokenize needs --ids \"1 2 3\"");
    parse_ids(&ids, r->o.ids, r->t.V);
    print_pieces(&r->t, &ids, 0);
    printf("\n");
    tokens_free(&ids);
}

// the shape of a preset or a folder; for a folder also the type its weights are stored in
static void info_model(Run* r) {
    Error err;
    if (!r->o.model) die("info needs --model: a preset or a model folder");
    if (config_preset(&r->m.c, r->o.model)) {
        tokenizer_bytes(&r->t);
        if (!r->m.c.V) r->m.c.V = r->t.V;
        r->m.n = llama3_count(&r->m.c);
        r->m.w = params_list(&r->m.c);
        return;
    }
    must(checkpoint_resolve(r->o.model, r->folder, sizeof r->folder, &err) && model_map(&r->m, r->folder, &err), &err);
}

// bytes that acts_make would allocate
static double acts_bytes(const Config* c, int rows, int positions, int capacity, bool training) {
    Acts s = { 0 };
    s.rows = rows;
    s.capacity = capacity;
    s.layer = allocate((size_t)c->L, sizeof *s.layer);
    acts_layout(&s, c, training, positions);
    free(s.layer);
    return (double)s.arena.used;
}

static void command_info(Run* r) {
    info_model(r);
    const Config* c = &r->m.c;
    double embed = 0, attention = 0, ffn = 0, norms = 0, head = 0, stored = 0;
    for (int i = 0; i < r->m.n; i++) {
        const Param* p = &r->m.w.list[i];
        double size = (double)param_size(p);
        if (p->tensor == &r->m.w.p->embed) embed += size;
        else if (p->tensor == &r->m.w.p->lm_head) head += size;
        else if (!p->rows) norms += size;
        else if (strstr(p->name, "self_attn")) attention += size;
        else ffn += size;
        stored += size * (double)dtype_bytes(p->tensor->dtype);
    }
    double total = embed + attention + ffn + norms + head, products = attention + ffn + (c->tied ? embed : head);
    int T = c->context < 2048 ? c->context : 2048;
    double attention_flops = 2.0 * c->L * c->NH * c->HD * T; // two products over, on average, half of T keys
    printf("model                  %s\n", r->folder[0] ? r->folder : r->o.model);
    printf("width C                %d\nlayers L               %d\nquery heads NH         %d\nkey/value heads NKV    %d\n", c->C, c->L, c->NH, c->NKV);
    printf("head size HD           %d\nfeed-forward F         %d\nvocabulary V           %d\ncontext                %d\n", c->HD, c->F, c->V, c->context);
    printf("embeddings             %s\nRoPE                   theta %g", c->tied ? "tied" : "untied", c->theta);
    if (c->factor != 1) printf(", scaled by %g beyond %d", c->factor, c->original);
    printf("\n\nparameters             %.0f\n  embedding            %.0f\n  attention            %.0f\n  feed-forward         %.0f\n  norms                %.0f\n  lm_head              %.0f%s\n",
           total, embed, attention, ffn, norms, head, c->tied ? " (tied to the embedding)" : "");
    printf("\nFLOPs per token        forward %.4g, training %.4g, at T %d\n", 2 * products + attention_flops, 3 * (2 * products + attention_flops), T);
    if (r->folder[0]) printf("weights                %.1f MiB as stored\n", stored / 0x1p20);
    else printf("weights                %.1f MiB in F32, %.1f MiB in BF16\n", 4 * total / 0x1p20, 2 * total / 0x1p20);
    int B = 8, train_T = c->context < 256 ? c->context : 256;
    printf("memory to train        %.1f MiB (F32 weights, gradients and two moments; B %d, T %d)\n",
           (16 * total + acts_bytes(c, B * train_T, train_T, 0, true)) / 0x1p20, B, train_T);
    printf("memory to run          the weights as stored and %.1f MiB (a key/value cache of %d tokens)\n",
           acts_bytes(c, PREFILL_ROWS, T, T, false) / 0x1p20, T);
}

// ---- 6. main ---------------------------------------------------------------------------------

static void print_help(void) {
    printf("llama3: train and run Llama 3 models on the CPU\n\n  llama3 COMMAND [--option value …]\n\n");
    for (int i = 0; i < N_COMMANDS; i++) printf("  %-12s %s\n", commands[i].name, commands[i].what);
    printf("\n  llama3 COMMAND --help     the options of a command\n  llama3 --version\n\n"
           "Begin with: llama3 train (learns its own sources), then llama3 generate --model out\n\nPresets of --model:");
    for (int i = 0; i < N_PRESETS; i++) printf(" %s", presets[i].name);
    printf("\n");
}

static bool asks(const char* word, const char* flag) { return word && strcmp(word, flag) == 0; }

int main(int argc, char** argv) {
    Error err;
    Run* r = allocate(1, sizeof *r);
    const char* word = argc > 1 ? argv[1] : NULL;
    if (asks(word, "--version")) {
        printf("llama3 %s\n", VERSION);
        return 0;
    }
    if (!word || asks(word, "--help") || asks(word, "-h") || asks(word, "help")) {
        print_help();
        return 0;
    }
    const Command* command = command_find(word);
    if (!command) die("'%s' is not a command: expected train, generate, chat, eval, tokenize, detokenize or info; see llama3 --help", word);
    for (int i = 2; i < argc; i++)
        if (asks(argv[i], "--help") || asks(argv[i], "-h")) {
            options_help("llama3", command);
            return 0;
        }
    r->o = options_default();
    must(options_parse(&r->o, command, argc - 2, argv + 2, &err), &err);
    switch (command->bit) {
    case TRAIN: command_train(r); break;
    case GENERATE: command_generate(r); break;
    case CHAT: command_chat(r); break;
    case EVAL: command_eval(r); break;
    case TOKENIZE: command_tokenize(r); break;
    case DETOKENIZE: command_detokenize(r); break;
    case INFO: command_info(r); break;
    }
    if (fflush(stdout) != 0) die("cannot write the output: %s", strerror(errno));
    acts_free(&r->s);
    model_free(&r->m);
    if (r->val.n_maps || r->val.n_shards) data_close(&r->val);
    data_close(&r->train);
    tokenizer_close(&r->t);
    free(r->ids), free(r->labels), free(r);
    return 0;
}
#endif
