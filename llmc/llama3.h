/*
What a Llama 3 is: its sizes, its presets, and the one list of its parameters.

    x = embed[token]
    for each layer:     x += attention(rope(rmsnorm(x) · q, k, v)) · o
                        x += swiglu(rmsnorm(x) · gate, up) · down
    logits = rmsnorm(x) · lm_head

The legend, the same everywhere. Single capitals are only ever dimensions:

    B   batch                       C    model width            NH   query heads
    T   sequence length             L    layers                 NKV  key/value heads, a divisor of NH
    N   B*T, rows                   V    vocabulary             HD   head size, even
    F   feed-forward width          Vp   V rounded up to 64: the row stride of logits
    QKV (NH + 2*NKV) * HD, the width of q, k and v side by side

Every matrix is stored (outputs, inputs), as HuggingFace stores it. In training q, k, v lie one after the other, so that
one product makes all three; so do gate and up. Models read from a file stay where the file put them.
*/
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "dtype.h"
#include "error.h"
#include "random.h"

// ---- sizes -----------------------------------------------------------------------------------

enum { MAX_EOS = 8 };

typedef struct {
    int C, L, NH, NKV, HD, F, V;
    bool tied;      // lm_head is the embedding
    int context;    // longest sequence the model was made for
    float eps;      // of RMSNorm
    double theta;   // RoPE's base
    double factor;  // RoPE's llama3 scaling: 1 none, 8 in Llama 3.1, 32 in 3.2; with
    double low, high;
    int original;   // the context before scaling
    int bos;        // -1: none
    int eos[MAX_EOS], n_eos;
} Config;

static inline int config_qkv(const Config* c) { return (c->NH + 2 * c->NKV) * c->HD; }

// ---- presets ---------------------------------------------------------------------------------

typedef struct {
    const char* name;
    int C, L, NH, NKV, HD, F, V; // V 0: the tokenizer's
    bool tied;
    int context;
    double factor;
} Preset;

// clang-format off
static const Preset presets[] = {
//    name             C    L  NH NKV   HD      F       V   tied   context  factor
    { "tiny",        128,   4,  4,  2,  32,   384,      0,  true,      256,  1 },
    { "15M",         288,   6,  6,  2,  48,   768,      0,  true,      256,  1 },
    { "42M",         512,   8,  8,  4,  64,  1376,      0,  true,     1024,  1 },
    { "110M",        768,  12, 12,  4,  64,  2048,      0,  true,     1024,  1 },
    { "350M",       1024,  24, 16,  4,  64,  2816,      0,  true,     2048,  1 },
    { "llama3-150M", 768,  12, 12,  4,  64,  2048, 128256,  true,     8192,  1 },
    { "llama3.2-1B", 2048, 16, 32,  8,  64,  8192, 128256,  true,   131072, 32 },
    { "llama3.2-3B", 3072, 28, 24,  8, 128,  8192, 128256,  true,   131072, 32 },
    { "llama3.1-8B", 4096, 32, 32,  8, 128, 14336, 128256, false,   131072,  8 },
    { "llama3.1-70B",8192, 80, 64,  8, 128, 28672, 128256, false,   131072,  8 },
};
// clang-format on
enum { N_PRESETS = sizeof presets / sizeof presets[0] };

// false when there is no preset of that name. V stays 0 where the tokenizer decides it; bos and eos are none for those,
// and Llama 3's own for the others
static inline bool config_preset(Config* c, const char* name) {
    for (int i = 0; i < N_PRESETS; i++) {
        const Preset* p = &presets[i];
        if (strcmp(p->name, name) != 0) continue;
        memset(c, 0, sizeof *c);
        c->C = p->C, c->L = p->L, c->NH = p->NH, c->NKV = p->NKV, c->HD = p->HD, c->F = p->F, c->V = p->V;
        c->tied = p->tied;
        c->context = p->context;
        c->eps = 1e-5f;
        c->theta = 500000;
        c->factor = p->factor, c->low = 1, c->high = 4, c->original = 8192;
        c->bos = p->V ? 128000 : -1;
        c->n_eos = p->V ? 1 : 0;
        c->eos[0] = 128001;
        return true;
    }
    return false;
}

// ---- parameters ------------------------------------------------------------------------------

typedef struct {
    Tensor attn_norm;        // (C)
    Tensor q, k, v;          // (NH*HD, C), (NKV*HD, C), (NKV*HD, C)
    Tensor o;                // (C, NH*HD)
    Tensor ffn_norm;         // (C)
    Tensor gate, up, down;   // (F, C), (F, C), (C, F)
} LayerParams;

typedef struct {
    Tensor embed;            // (V, C)
    LayerParams* layer;      // [L]
    Tensor norm;             // (C)
    Tensor lm_head;          // (V, C); the same numbers as embed when tied
} Params;

// one entry of the list: what everything that walks the parameters needs to know of a tensor
typedef struct {
    char name[64];           // HuggingFace's
    Tensor* tensor;          // the field of Params that holds it
    int rows, cols;          // rows 0: a vector of cols numbers
    float std;               // of its initial values; 0: they are all 1
    bool joined;             // lies right behind the one before it, without padding
} Param;

static inline size_t param_size(const Param* p) { return (size_t)(p->rows ? p->rows : 1) * (size_t)p->cols; }
static inline bool param_decays(const Param* p) { return p->rows != 0; } // weight decay is for matrices

static inline int llama3_count(const Config* c) { return 2 + 9 * c->L + (c->tied ? 0 : 1); }

// THE list. Every parameter tensor of p once, in file order, into list (llama3_count entries). Allocation, initialisation,
// loading, saving, AdamW and the tests all walk it. To add a tensor: one field above, one line here, one in the count.
static inline void llama3_list(Param* list, Params* p, const Config* c) {
    const float std = 0.02f, residual_std = 0.02f / sqrtf(2.0f * (float)c->L);
    const int Q = c->NH * c->HD, KV = c->NKV * c->HD;
    const bool joined = true, apart = false;
    int n = 0;
#define ADD(tensor, rows, cols, std, joined, ...)                                                                      \
    do {                                                                                                               \
        Param entry = { "", tensor, rows, cols, std, joined };                                                         \
        snprintf(entry.name, sizeof entry.name, __VA_ARGS__);                                                          \
        list[n++] = entry;                                                                                             \
    } while (0)
    // clang-format off
    ADD(&p->embed,           c->V, c->C, std,          apart,  "model.embed_tokens.weight");
    for (int l = 0; l < c->L; l++) {
        LayerParams* w = &p->layer[l];
        ADD(&w->attn_norm,   0,    c->C, 0,            apart,  "model.layers.%d.input_layernorm.weight", l);
        ADD(&w->q,           Q,    c->C, std,          apart,  "model.layers.%d.self_attn.q_proj.weight", l);
        ADD(&w->k,           KV,   c->C, std,          joined, "model.layers.%d.self_attn.k_proj.weight", l);
        ADD(&w->v,           KV,   c->C, std,          joined, "model.layers.%d.self_attn.v_proj.weight", l);
        ADD(&w->o,           c->C, Q,    residual_std, apart,  "model.layers.%d.self_attn.o_proj.weight", l);
        ADD(&w->ffn_norm,    0,    c->C, 0,            apart,  "model.layers.%d.post_attention_layernorm.weight", l);
        ADD(&w->gate,        c->F, c->C, std,          apart,  "model.layers.%d.mlp.gate_proj.weight", l);
        ADD(&w->up,          c->F, c->C, std,          joined, "model.layers.%d.mlp.up_proj.weight", l);
        ADD(&w->down,        c->C, c->F, residual_std, apart,  "model.layers.%d.mlp.down_proj.weight", l);
    }
    ADD(&p->norm,            0,    c->C, 0,            apart,  "model.norm.weight");
    if (!c->tied)
        ADD(&p->lm_head,     c->V, c->C, std,          apart,  "lm_head.weight");
    // clang-format on
#undef ADD
    require(n == llama3_count(c), "llama3_count counts the tensors that llama3_list lists");
}

// points the tensors at base, each 256-byte aligned unless joined, a layer in one contiguous range; returns the bytes
// needed. With base NULL it only counts
static inline size_t llama3_place(Param* list, int n, Dtype dtype, void* base) {
    size_t bytes = 0;
    for (int i = 0; i < n; i++) {
        if (!list[i].joined) bytes = (bytes + 255) & ~(size_t)255;
        if (base) list[i].tensor->data = (char*)base + bytes, list[i].tensor->dtype = dtype;
        bytes += param_size(&list[i]) * dtype_bytes(dtype);
    }
    return bytes;
}

// initial values of F32 tensors: normal, or 1 for the norms. They depend on (seed, place in the list, index) alone
static inline void llama3_init(Param* list, int n, uint64_t seed) {
    for (int i = 0; i < n; i++) {
        float *w = (float*)list[i].tensor->data, std = list[i].std;
        int64_t size = (int64_t)param_size(&list[i]);
#pragma omp parallel for
        for (int64_t j = 0; j < size; j++) w[j] = std != 0 ? std * random_normal(seed, (uint64_t)i, (uint64_t)j) : 1;
    }
}

// ---- llama3.c as a library -------------------------------------------------------------------
// Compiled with -DLLAMA3_LIBRARY, llama3.c exports these and nothing else: the oracle of the tests. All in fp32.

typedef struct CpuModel CpuModel;

#ifdef __cplusplus
extern "C" {
#endif

// a model folder; prints the reason and ends the program when it cannot be read. Freed with cpu_model_free
CpuModel* cpu_model_load(const char* folder);
void cpu_model_free(CpuModel* m);
const Config* cpu_model_config(const CpuModel* m);

// the mean loss over labels (B, T) that are not -100; label t is the token after ids t. labels may be NULL (returns 0);
// overwrites logits (B, T, V) unless NULL
float cpu_forward(CpuModel* m, const int32_t* ids, const int32_t* labels, int B, int T, float* logits);

// clears the gradients, then forward and backward; returns the loss
float cpu_backward(CpuModel* m, const int32_t* ids, const int32_t* labels, int B, int T);

// by HuggingFace name: n numbers owned by the model; NULL when there is no such tensor
float* cpu_parameter(CpuModel* m, const char* name, size_t* n);
float* cpu_gradient(CpuModel* m, const char* name, size_t* n);

// one AdamW step; returns the gradient norm before clipping. clip 0: none
float cpu_update(CpuModel* m, float lr, float beta1, float beta2, float eps, float weight_decay, float clip);

// fills ids[n_prompt .. n_total) with the likeliest tokens, through the key/value cache
void cpu_generate_greedy(CpuModel* m, int32_t* ids, int n_prompt, int n_total);

// ---- train_llama3.cu as a library ------------------------------------------------------------
// The same of train_llama3.cu, for test_llama3.cu. Numbers go in and out as floats, whatever the GPU stores

typedef struct GpuModel GpuModel;

// an option as on the command line, for the models loaded afterwards: "attention" "flash", "recompute" "norms", "moments"
// "bf16", "master" "none", "timing" "on"; false when this build or this GPU cannot do that
bool gpu_set(const char* option, const char* value);

GpuModel* gpu_model_load(const char* folder);
GpuModel* gpu_model_resume(const char* folder, int64_t updates); // as gpu_save left it, after that many updates
void gpu_save(GpuModel* m, const char* folder);                  // weights and optimizer, into a folder that exists
void gpu_model_free(GpuModel* m);
const Config* gpu_model_config(const GpuModel* m);
const char* gpu_attention(const GpuModel* m);                    // the back end of the last pass: another than the one that
                                                                 // was set when that does not take the sizes

float gpu_forward(GpuModel* m, const int32_t* ids, const int32_t* labels, int B, int T, float* logits);
float gpu_backward(GpuModel* m, const int32_t* ids, const int32_t* labels, int B, int T);

// adds the gradient of scale * (the sum of the losses), and returns the sum since the last update
double gpu_accumulate(GpuModel* m, const int32_t* ids, const int32_t* labels, int B, int T, float scale);

// copies, valid until the next call: the weights as the passes read them
const float* gpu_parameter(GpuModel* m, const char* name, size_t* n);
const float* gpu_gradient(GpuModel* m, const char* name, size_t* n);

// of the GPU's memory: what is allocated, and what a model and training it on batches (B, T) are planned to take
double gpu_bytes(void);
double gpu_planned_bytes(const Config* c, int B, int T);

// milliseconds of a step that all calls of an op took, by its name; NULL: the whole step. 0: not timed
double gpu_timed(const char* op);

float gpu_update(GpuModel* m, float lr, float beta1, float beta2, float eps, float weight_decay, float clip);
void gpu_generate_greedy(GpuModel* m, int32_t* ids, int n_prompt, int n_total);

#ifdef __cplusplus
}
#endif
