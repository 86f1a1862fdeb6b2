/*
A golden state: the tiny model in dev/test/golden/NAME, a batch, and what PyTorch makes of them, as dev/reference/golden.py
wrote it and describes it. What is not as expected ends the test program.
*/
#pragma once

#include "llmc/error.h"
#include "llmc/file.h"
#include "llmc/llama3.h"
#include "llmc/safetensors.h"

typedef struct {
    const char* name;
    char folder[64];
    CpuModel* model; // what llama3.c loads from it
    const Config* c;
    Safetensors file;
    int B, T;
    int32_t *ids, *labels; // (B, T)
} Golden;

// a copy of a tensor, which must be of that type and hold n numbers of 4 bytes; owned by the caller
static inline void* golden_copy(const Golden* g, const char* name, const char* dtype, size_t n) {
    const SafeTensor* t = safetensors_find(&g->file, name);
    if (!t) die("%s: no %s in golden.safetensors", g->name, name);
    if (strcmp(t->dtype, dtype) != 0 || t->bytes != n * 4)
        die("%s: %s is %zu bytes of %s, expected %zu numbers of %s", g->name, name, t->bytes, t->dtype, n, dtype);
    void* copy = allocate(n, 4);
    memcpy(copy, t->data, n * 4);
    return copy;
}

static inline Golden golden_open(const char* name) {
    char path[PATH_SIZE];
    Error err;
    Golden g;
    memset(&g, 0, sizeof g);
    g.name = name;
    snprintf(g.folder, sizeof g.folder, "dev/test/golden/%s", name);
    if (!path_join(path, g.folder, "golden.safetensors", &err) || !safetensors_open(&g.file, path, &err))
        die("%s", err.text);
    g.model = cpu_model_load(g.folder);
    g.c = cpu_model_config(g.model);
    const SafeTensor* ids = safetensors_find(&g.file, "ids");
    if (!ids || ids->n_dims != 2) die("%s: no ids of two dimensions in golden.safetensors", name);
    g.B = (int)ids->shape[0], g.T = (int)ids->shape[1];
    g.ids = (int32_t*)golden_copy(&g, "ids", "I32", (size_t)g.B * (size_t)g.T);
    g.labels = (int32_t*)golden_copy(&g, "labels", "I32", (size_t)g.B * (size_t)g.T);
    return g;
}

static inline void golden_close(Golden* g) {
    free(g->ids), free(g->labels);
    cpu_model_free(g->model);
    safetensors_close(&g->file);
}
