/*
A set of parameters in host memory: a number for every parameter of a model. The weights are one, so are their gradients and
each of AdamW's moments. Here they are allocated, converted, checked, and written to and read from safetensors files.

Proved by       dev/test/test_runs.c (resume to the bit), dev/reference/parity.py (what transformers reads back)
*/
#pragma once

#include "config.h"
#include "llama3.h"
#include "safetensors.h"

typedef struct {
    Params* p;
    Param* list;    // llama3_list of p, into which it points
    int n;          // its entries
    void* memory;   // what the tensors lie in, or part of them; freed with the set
} ParamSet;

// a set without memory: all tensors NULL
static inline ParamSet params_list(const Config* c) {
    ParamSet s = { NULL, NULL, llama3_count(c), NULL };
    s.p = (Params*)allocate(1, sizeof *s.p);
    s.p->layer = (LayerParams*)allocate((size_t)c->L, sizeof *s.p->layer);
    s.list = (Param*)allocate((size_t)s.n, sizeof *s.list);
    llama3_list(s.list, s.p, c);
    return s;
}

// F32 zeros, laid out for training
static inline ParamSet params_make(const Config* c) {
    ParamSet s = params_list(c);
    size_t bytes = llama3_place(s.list, s.n, DTYPE_F32, NULL);
    s.memory = aligned_alloc(256, (bytes + 255) & ~(size_t)255);
    if (!s.memory) die("out of memory: %.1f MiB of parameters asked for", (double)bytes / 0x1p20);
    memset(s.memory, 0, bytes);
    llama3_place(s.list, s.n, DTYPE_F32, s.memory);
    if (c->tied) s.p->lm_head = s.p->embed;
    return s;
}

static inline void params_free(ParamSet* s) {
    if (s->p) free(s->p->layer);
    free(s->p), free(s->list), free(s->memory);
    memset(s, 0, sizeof *s);
}

static inline float* params_floats(const ParamSet* s, int i) { return (float*)s->list[i].tensor->data; }

static inline void params_zero(ParamSet* s) { memset(s->memory, 0, llama3_place(s->list, s->n, DTYPE_F32, NULL)); }

// out becomes a tensor's numbers; false, with the tensor named in err, when one of them is NaN or infinite
static inline bool params_convert(float* out, const Param* from, Error* err) {
    int64_t size = (int64_t)param_size(from), bad = 0;
#pragma omp parallel for reduction(+ : bad)
    for (int64_t j = 0; j < size; j++) {
        out[j] = tensor_get(*from->tensor, (size_t)j);
        bad += (bits_of_float(out[j]) & 0x7f800000u) == 0x7f800000u;
    }
    return bad ? set_error(err, "%s holds a NaN or an infinity", from->name) : true;
}

// names the first tensor that holds a NaN or an infinity; true when none does
static inline bool params_finite(const ParamSet* s, Error* err) {
    bool finite = true;
    for (int i = 0; i < s->n && finite; i++) {
        float* copy = (float*)allocate(param_size(&s->list[i]), sizeof *copy);
        finite = params_convert(copy, &s->list[i], err);
        free(copy);
    }
    return finite;
}

// points every vector (the norms' weights) at an F32 copy that the set owns; matrices stay where they are
static inline bool params_expand_vectors(ParamSet* s, Error* err) {
    size_t total = 0;
    for (int i = 0; i < s->n; i++) total += s->list[i].rows ? 0 : param_size(&s->list[i]);
    float* copy = (float*)allocate(total, sizeof *copy);
    s->memory = copy;
    for (int i = 0; i < s->n; i++) {
        Param* p = &s->list[i];
        if (p->rows) continue;
        if (!params_convert(copy, p, err)) return false;
        p->tensor->data = copy;
        p->tensor->dtype = DTYPE_F32;
        copy += p->cols;
    }
    return true;
}

// how many parameters there are, by kind
typedef struct {
    double embed, attention, ffn, norms, head, total;
} ParamCount;

static inline ParamCount params_count(const Config* c) {
    ParamSet s = params_list(c);
    ParamCount count = { 0, 0, 0, 0, 0, 0 };
    for (int i = 0; i < s.n; i++) {
        const Param* p = &s.list[i];
        double* kind = &count.ffn;
        if (p->tensor == &s.p->embed) kind = &count.embed;
        else if (p->tensor == &s.p->lm_head) kind = &count.head;
        else if (!p->rows) kind = &count.norms;
        else if (strstr(p->name, "self_attn")) kind = &count.attention;
        *kind += (double)param_size(p);
        count.total += (double)param_size(p);
    }
    params_free(&s);
    return count;
}

// of a forward pass over T tokens, for each of them: two FLOPs for each parameter of a product; attention's two products meet
// half of T keys on average. A backward pass costs twice that
static inline double flops_per_token(const Config* c, int T) {
    const ParamCount n = params_count(c);
    return 2 * (n.attention + n.ffn + (c->tied ? n.embed : n.head)) + 2.0 * c->L * c->NH * c->HD * T;
}

// ---- files -----------------------------------------------------------------------------------

// a safetensors file under construction: several sets, each with a prefix to its names
typedef struct {
    SafetensorsEntry* entries;
    size_t n;
} ParamsFile;

// the name of a tensor in such a file
static inline void params_name(char to[64], const char* prefix, const char* name) {
    size_t n = strlen(prefix), m = strlen(name);
    require(n + m < 64, "names with their prefix fit");
    memcpy(to, prefix, n);
    memcpy(to + n, name, m + 1);
}

static inline void params_add(ParamsFile* file, const char* prefix, const ParamSet* s, Dtype dtype) {
    file->entries = (SafetensorsEntry*)reallocate(file->entries, file->n + (size_t)s->n, sizeof *file->entries);
    for (int i = 0; i < s->n; i++) {
        SafetensorsEntry* e = &file->entries[file->n++];
        const Param* p = &s->list[i];
        memset(e, 0, sizeof *e);
        params_name(e->name, prefix, p->name);
        e->source = *p->tensor;
        e->dtype = dtype;
        e->n_dims = p->rows ? 2 : 1;
        e->shape[0] = p->rows ? p->rows : p->cols;
        e->shape[1] = p->cols;
    }
}

// writes folder/name and forgets the entries
static inline bool params_write(ParamsFile* file, const char* folder, const char* name, Error* err) {
    char path[PATH_SIZE];
    bool ok = path_join(path, folder, name, err) && safetensors_write(path, file->entries, file->n, err);
    free(file->entries);
    memset(file, 0, sizeof *file);
    return ok;
}

// fills a set of F32 from the tensors of a file whose names are prefix and the list's
static inline bool params_read(ParamSet* s, const Config* c, const Safetensors* file, const char* prefix, Error* err) {
    ParamSet mapped = params_list(c);
    bool ok = true;
    for (int i = 0; i < s->n && ok; i++) {
        Param p = mapped.list[i];
        params_name(p.name, prefix, mapped.list[i].name);
        ok = llama3_map_tensor(&p, file, err) && params_convert(params_floats(s, i), &p, err);
    }
    params_free(&mapped);
    return ok;
}
