/*
llama3.c: Llama 3 on the CPU, whole: train, generate, chat, eval, tokenize, detokenize, info.

    make deps llama3 && ./llama3 train          learns to write its own sources, offline, in two minutes
    ./llama3 --help

Contents    1 state     2 memory     3 blocks     4 model     5 the model as the commands see it     6 main
Reading     the ops (formula, forward, backward) are llmc/<op>.h; what the model is, with the legend of the capitals, is
            llmc/llama3.h; the training loop is llmc/train.h, and the commands are llmc/commands.h: both programs share them.
            train_llama3.cu has the same sections and the same names
Library     with -DLLAMA3_LIBRARY there is no main; the cpu_ functions of llmc/llama3.h are exported and nothing else
*/
#ifdef LLAMA3_LIBRARY
#define MODEL_API static __attribute__((unused))
#else
#include "llmc/commands.h"
#endif

#include "llmc/adamw.h"
#include "llmc/arena.h"
#include "llmc/attention.h"
#include "llmc/cross_entropy.h"
#include "llmc/embedding.h"
#include "llmc/llama3.h"
#include "llmc/matmul.h"
#include "llmc/model.h"
#include "llmc/params.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
#include "llmc/swiglu.h"

// ---- 1. state --------------------------------------------------------------------------------

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
    float* head;         // lm_head_scratch(V): logits of one chunk of rows, where a loss is asked for
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

struct Model {
    Config c;
    ParamSet w, dw, m, v;    // weights, gradients, AdamW's moments
    Safetensors file;        // holds the weights when they are mapped
    int64_t updates;         // AdamW steps done
    double loss;             // the sum of the step so far
    float scale;             // what clips the step's gradients
    Acts s;                  // of training and evaluation
};

struct Sequence {
    const Model* m;
    Acts s;
};

// ---- 2. memory -------------------------------------------------------------------------------

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
    if (!s->capacity) s->head = arena_floats(arena, lm_head_scratch(c->V));
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

// the norm of all gradients; m->scale becomes what clips it
static float llama3_norm(Model* m, float clip) {
    double sum = 0;
    for (int i = 0; i < m->dw.n; i++) sum += sum_of_squares_cpu(params_floats(&m->dw, i), param_size(&m->dw.list[i]));
    const float norm = (float)sqrt(sum), factor = clip / (norm + 1e-6f); // as torch.nn.utils.clip_grad_norm_
    m->scale = clip > 0 && factor < 1 ? factor : 1;
    return norm;
}

// one AdamW step with m->dw, clipped by m->scale
static void llama3_update(Model* m, AdamWOptions o) {
    m->updates++;
    for (int i = 0; i < m->w.n; i++) {
        const Param* p = &m->w.list[i];
        adamw_cpu(params_floats(&m->w, i), params_floats(&m->m, i), params_floats(&m->v, i), params_floats(&m->dw, i), param_size(p),
                  o.lr, o.beta1, o.beta2, o.eps, param_decays(p) ? o.weight_decay : 0, (int)m->updates, m->scale);
    }
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

// ---- 5. the model, as llmc/model.h promises it -----------------------------------------------

bool model_configure(const Options* o, Error* err) {
    (void)o, (void)err; // there is one way on the CPU
    return true;
}

Model* model_make(const Config* c, uint64_t seed) {
    Model* m = allocate(1, sizeof *m);
    m->c = *c;
    m->w = params_make(c);
    llama3_init(m->w.list, m->w.n, seed);
    return m;
}

// the weights where the folder's files have them
static bool model_map(Model* m, const char* folder, Error* err) {
    if (!config_read(&m->c, folder, err) || !safetensors_open(&m->file, folder, err)) return false;
    m->w = params_list(&m->c);
    return llama3_map(m->w.p, &m->c, &m->file, err) || error_in(err, folder);
}

Model* model_open(const char* folder, Error* err) {
    Model* m = allocate(1, sizeof *m);
    if (model_map(m, folder, err) && (params_expand_vectors(&m->w, err) || error_in(err, folder))) return m;
    model_free(m);
    return NULL;
}

Model* model_load(const char* folder, Error* err) {
    Model* m = allocate(1, sizeof *m);
    bool ok = model_map(m, folder, err);
    if (ok) {
        params_free(&m->w);
        m->w = params_make(&m->c);
        ok = params_read(&m->w, &m->c, &m->file, "", err) || error_in(err, folder);
        safetensors_close(&m->file);
    }
    if (ok) return m;
    model_free(m);
    return NULL;
}

void model_free(Model* m) {
    params_free(&m->w), params_free(&m->dw), params_free(&m->m), params_free(&m->v);
    safetensors_close(&m->file);
    acts_free(&m->s);
    free(m);
}

const Config* model_config(const Model* m) { return &m->c; }

double model_weight_bytes(const Model* m) {
    double bytes = 0;
    for (int i = m->c.tied ? 0 : 1; i < m->w.n; i++) // of an embedding that is not also the head, a row is read
        bytes += (double)param_size(&m->w.list[i]) * (double)dtype_bytes(m->w.list[i].tensor->dtype);
    return bytes;
}

bool model_is_finite(const Model* m, Error* err) {
    Error which;
    if (!params_finite(&m->w, err)) return false;
    return params_finite(&m->dw, &which) || set_error(err, "the gradient of %.900s", which.text);
}

// memory that nobody writes to is not taken, so that there is nothing to refuse ahead of time
bool model_plan(const Config* c, int B, int T, int64_t rows, Error* err) {
    (void)c, (void)B, (void)T, (void)rows, (void)err;
    return true;
}

void model_print_memory(const Model* m) { (void)m; }

void model_reserve(Model* m, int B, int T, bool training) {
    acts_free(&m->s);
    m->s = acts_make(&m->c, B * T, T, 0, training);
    if (!training || m->dw.memory) return;
    m->dw = params_make(&m->c);
    m->m = params_make(&m->c);
    m->v = params_make(&m->c);
}

double model_loss(Model* m, const int32_t* ids, const int32_t* labels, int B, int T) {
    llama3_forward(m, &m->s, ids, B, T);
    return llama3_loss(m, &m->s, labels);
}

void model_backward(Model* m, const int32_t* ids, const int32_t* labels, int B, int T, float scale) {
    llama3_forward(m, &m->s, ids, B, T);
    m->loss += llama3_backward(m, &m->s, ids, labels, scale);
}

StepSums model_sums(Model* m, float clip) {
    StepSums sums = { m->loss, llama3_norm(m, clip) };
    return sums;
}

void model_skip(Model* m) {
    params_zero(&m->dw);
    m->loss = 0;
}

void model_update(Model* m, AdamWOptions o) {
    llama3_update(m, o);
    model_skip(m);
}

double model_matrix_rate(void) { return 0; }
void model_report(const Model* m) { (void)m; }

Sequence* sequence_make(const Model* m, int capacity) {
    Sequence* s = allocate(1, sizeof *s);
    s->m = m;
    s->s = acts_for_sequence(&m->c, capacity);
    return s;
}

void sequence_free(Sequence* s) {
    acts_free(&s->s);
    free(s);
}

int sequence_length(const Sequence* s) { return s->s.pos; }
void sequence_clear(Sequence* s) { s->s.pos = 0; }
void sequence_feed(Sequence* s, const int32_t* ids, int n, float* logits) { llama3_feed(s->m, &s->s, ids, n, logits); }

bool model_save(const Model* m, const char* folder, Dtype dtype, Error* err) {
    ParamsFile file = { 0 };
    params_add(&file, "", &m->w, dtype);
    return config_write(&m->c, folder, dtype, err) && params_write(&file, folder, "model.safetensors", err);
}

bool model_save_optimizer(const Model* m, const char* folder, Dtype dtype, Error* err) {
    ParamsFile file = { 0 };
    params_add(&file, "m.", &m->m, DTYPE_F32);
    params_add(&file, "v.", &m->v, DTYPE_F32);
    if (dtype != DTYPE_F32) params_add(&file, "master.", &m->w, DTYPE_F32);
    return params_write(&file, folder, "optimizer.safetensors", err);
}

bool model_load_optimizer(Model* m, const char* folder, int64_t updates, Error* err) {
    char path[PATH_SIZE];
    Safetensors file = { 0 };
    if (!path_join(path, folder, "optimizer.safetensors", err) || !safetensors_open(&file, path, err)) return false;
    bool master = safetensors_find(&file, "master.model.norm.weight") != NULL;
    bool ok = params_read(&m->m, &m->c, &file, "m.", err) && params_read(&m->v, &m->c, &file, "v.", err) &&
              (!master || params_read(&m->w, &m->c, &file, "master.", err));
    safetensors_close(&file);
    m->updates = updates;
    return ok || error_in(err, path);
}

char* model_choices_write(void) { return NULL; }
void model_choices_read(const char* text) { (void)text; }

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

bool model_training_bytes(const Config* c, int B, int T, double* bytes, Error* why) {
    ParamSet s = params_list(c);
    *bytes = 4.0 * (double)llama3_place(s.list, s.n, DTYPE_F32, NULL) + acts_bytes(c, B * T, T, 0, true);
    params_free(&s);
    (void)why;
    return true;
}

const char* model_storage(void) { return "weights, gradients and moments in F32"; }

double model_sequence_bytes(const Config* c, int capacity) {
    return acts_bytes(c, capacity < PREFILL_ROWS ? capacity : PREFILL_ROWS, capacity, capacity, false);
}

#ifndef LLAMA3_LIBRARY

// ---- 6. main ---------------------------------------------------------------------------------

EMBED(corpus_train, "build/corpus/train.txt");
EMBED(corpus_val, "build/corpus/val.txt");

// A thread of OpenMP that waits for the others spins, by default for milliseconds. On a machine that others use too it keeps
// the very thread it waits for from running: beside one busy process training was 8 times slower. libgomp reads its
// environment before main, hence the second start; where that fails, the program goes on as it is
static void wait_briefly(char** argv) {
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    setenv("GOMP_SPINCOUNT", "10000", 1);
    execv("/proc/self/exe", argv);
}

int main(int argc, char** argv) {
    wait_briefly(argv);
    const Program program = { "llama3", VERSION, NULL, { corpus_train, corpus_train_end, corpus_val, corpus_val_end } };
    return commands_main(&program, argc, argv);
}

#else

// ---- the library: the oracle of the tests ----------------------------------------------------

#include "llmc/library.h"

struct CpuModel {
    Model model;
};

CpuModel* cpu_model_load(const char* folder) {
    Error err;
    Model* m = model_load(folder, &err);
    if (!m) die("%s", err.text);
    return (CpuModel*)m;
}

void cpu_model_free(CpuModel* m) { model_free(&m->model); }
const Config* cpu_model_config(const CpuModel* m) { return &m->model.c; }

// makes room for a batch of B*T
static void cpu_reserve(Model* m, int B, int T) {
    if (B * T > m->s.rows) model_reserve(m, 1, B * T, true);
}

float cpu_forward(CpuModel* cpu, const int32_t* ids, const int32_t* labels, int B, int T, float* logits) {
    Model* m = &cpu->model;
    cpu_reserve(m, B, T);
    llama3_forward(m, &m->s, ids, B, T);
    if (logits) llama3_logits(m, &m->s, logits, 0, B * T);
    return labels ? (float)(llama3_loss(m, &m->s, labels) / count_labels(labels, B * T)) : 0;
}

float cpu_backward(CpuModel* cpu, const int32_t* ids, const int32_t* labels, int B, int T) {
    Model* m = &cpu->model;
    int count = count_labels(labels, B * T);
    cpu_reserve(m, B, T);
    model_skip(m);
    model_backward(m, ids, labels, B, T, 1 / (float)count);
    return (float)(m->loss / count);
}

static float* cpu_tensor(ParamSet* s, const char* name, size_t* n) {
    for (int i = 0; i < s->n; i++) {
        if (strcmp(s->list[i].name, name) != 0) continue;
        *n = param_size(&s->list[i]);
        return params_floats(s, i);
    }
    return NULL;
}

float* cpu_parameter(CpuModel* m, const char* name, size_t* n) { return cpu_tensor(&m->model.w, name, n); }
float* cpu_gradient(CpuModel* m, const char* name, size_t* n) { return cpu_tensor(&m->model.dw, name, n); }

float cpu_update(CpuModel* m, float lr, float beta1, float beta2, float eps, float weight_decay, float clip) {
    const AdamWOptions o = { lr, beta1, beta2, eps, weight_decay, 0 };
    const float norm = llama3_norm(&m->model, clip);
    if (isfinite(norm)) llama3_update(&m->model, o);
    return norm;
}

void cpu_generate_greedy(CpuModel* m, int32_t* ids, int n_prompt, int n_total) { generate_greedy(&m->model, ids, n_prompt, n_total); }

#endif
