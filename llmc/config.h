/*
A model folder: config.json and generation_config.json <-> Config, and a file's tensors -> Params.

    hidden_size                     C
    intermediate_size               F
    num_hidden_layers               L
    num_attention_heads             NH
    num_key_value_heads             NKV         absent: NH
    head_dim                        HD          absent: C / NH
    vocab_size                      V
    tie_word_embeddings             tied        absent: false
    max_position_embeddings         context
    rms_norm_eps                    eps
    bos_token_id                    bos         absent: none
    eos_token_id                    eos         one id or a list; generation_config.json's goes before; absent: none
    rope_theta                      theta       as transformers 4 writes it, with
    rope_scaling                    factor low high original, from {rope_type or type, factor, low_freq_factor,
                                    high_freq_factor, original_max_position_embeddings}; absent: no scaling
    rope_parameters                 all five, as transformers 5 writes them: {rope_theta, rope_type, factor, …}

A field that is null counts as absent; one that is not in the table is ignored, unless it says that the model computes
something else than llmc/llama3.h: that is an error, which names the field. We write the spelling of transformers 4,
which both read.
Proved by       dev/test/test_files.c, dev/test/fuzz_config.c
Source          transformers, LlamaConfig and modeling_rope_utils.py
*/
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "error.h"
#include "file.h"
#include "json.h"
#include "llama3.h"
#include "safetensors.h"

enum { CONFIG_BYTES = 1 << 24 }; // a config.json larger than this is none

// ---- fields ----------------------------------------------------------------------------------

// the field's value; NULL when it is absent or null
static inline const cJSON* config_get(const cJSON* object, const char* field) {
    const cJSON* item = json_get(object, field);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

// "field is VALUE: expected what"
static inline bool config_fail(Error* err, const char* field, const cJSON* item, const char* expected) {
    if (!item) return set_error(err, "%s is missing: expected %s", field, expected);
    char* value = cJSON_PrintUnformatted(item);
    set_error(err, "%s is %.100s: expected %s", field, value ? value : "?", expected);
    free(value);
    return false;
}

// a whole number from 1 to limit; absent: what *value holds, or an error when that is 0
static inline bool config_size(int* value, const cJSON* object, const char* field, int limit, Error* err) {
    const cJSON* item = config_get(object, field);
    int64_t x;
    if (!item && *value != 0) return true;
    char expected[64];
    snprintf(expected, sizeof expected, "a whole number from 1 to %d", limit);
    if (!json_whole(item, &x) || x < 1 || x > limit) return config_fail(err, field, item, expected);
    *value = (int)x;
    return true;
}

static inline bool config_positive(double* value, const cJSON* object, const char* field, Error* err) {
    const cJSON* item = config_get(object, field);
    // as a float too: what rounds to 0 or to infinity there is of no use
    if (!cJSON_IsNumber(item) || !((float)item->valuedouble > 0) || !isfinite((float)item->valuedouble))
        return config_fail(err, field, item, "a positive number");
    *value = item->valuedouble;
    return true;
}

// absent: what *value holds
static inline bool config_bool(bool* value, const cJSON* object, const char* field, Error* err) {
    const cJSON* item = config_get(object, field);
    if (item && !cJSON_IsBool(item)) return config_fail(err, field, item, "true or false");
    if (item) *value = cJSON_IsTrue(item);
    return true;
}

static inline bool config_id(int* id, const cJSON* item, const char* field, int V, Error* err) {
    int64_t x;
    char expected[64];
    snprintf(expected, sizeof expected, "a token id from 0 to %d (vocab_size - 1)", V - 1);
    if (!json_whole(item, &x) || x < 0 || x >= V) return config_fail(err, field, item, expected);
    *id = (int)x;
    return true;
}

// ---- reading ---------------------------------------------------------------------------------

// fields that must have one value, when they are there at all
static inline bool config_check_supported(const cJSON* root, Error* err) {
    bool attention_bias = false, mlp_bias = false;
    const cJSON* item = config_get(root, "model_type");
    if (!cJSON_IsString(item) || strcmp(item->valuestring, "llama") != 0)
        return config_fail(err, "model_type", item, "\"llama\", the only one supported");
    item = config_get(root, "hidden_act");
    if (item && (!cJSON_IsString(item) || strcmp(item->valuestring, "silu") != 0))
        return config_fail(err, "hidden_act", item, "\"silu\", the only one supported");
    if (!config_bool(&attention_bias, root, "attention_bias", err) || !config_bool(&mlp_bias, root, "mlp_bias", err))
        return false;
    if (attention_bias) return set_error(err, "attention_bias is true: expected false, biases are not supported");
    if (mlp_bias) return set_error(err, "mlp_bias is true: expected false, biases are not supported");
    item = config_get(root, "quantization_config");
    if (item) return config_fail(err, "quantization_config", item, "none, quantized weights are not supported");
    item = config_get(root, "partial_rotary_factor");
    if (item && item->valuedouble != 1)
        return config_fail(err, "partial_rotary_factor", item, "1, the only one supported");
    return true;
}

static inline bool config_parse_rope(Config* c, const cJSON* root, Error* err) {
    const cJSON *rope = config_get(root, "rope_scaling"), *item;
    const char* field = "rope_scaling";
    if (!rope) rope = config_get(root, field = "rope_parameters");
    if (rope && !cJSON_IsObject(rope)) return config_fail(err, field, rope, "an object");
    if (!config_positive(&c->theta, config_get(rope, "rope_theta") ? rope : root, "rope_theta", err)) return false;

    c->factor = c->low = 1, c->high = 4, c->original = 8192;
    item = config_get(rope, "rope_type");
    if (!item) item = config_get(rope, "type");
    bool scaled = cJSON_IsString(item) && strcmp(item->valuestring, "llama3") == 0;
    if (item && !scaled && (!cJSON_IsString(item) || strcmp(item->valuestring, "default") != 0))
        return config_fail(err, "rope_type", item, "\"llama3\" or \"default\", the only ones supported");
    item = config_get(rope, "partial_rotary_factor");
    if (item && item->valuedouble != 1)
        return config_fail(err, "partial_rotary_factor", item, "1, the only one supported");
    if (!scaled) return true;

    c->original = 0;
    if (!config_positive(&c->factor, rope, "factor", err) || !config_positive(&c->low, rope, "low_freq_factor", err) ||
        !config_positive(&c->high, rope, "high_freq_factor", err) ||
        !config_size(&c->original, rope, "original_max_position_embeddings", 1 << 30, err))
        return false;
    if (c->factor < 1) return config_fail(err, "factor", config_get(rope, "factor"), "at least 1");
    if (c->low >= c->high)
        return config_fail(err, "low_freq_factor", config_get(rope, "low_freq_factor"), "less than high_freq_factor");
    return true;
}

// eos_token_id: one id or a list; absent: eos stays as it is
static inline bool config_parse_eos(Config* c, const cJSON* root, Error* err) {
    const cJSON *eos = config_get(root, "eos_token_id"), *item;
    if (!eos) return true;
    c->n_eos = 0;
    if (!cJSON_IsArray(eos)) return config_id(&c->eos[c->n_eos++], eos, "eos_token_id", c->V, err);
    if (cJSON_GetArraySize(eos) > MAX_EOS)
        return set_error(err, "eos_token_id is a list of %d: expected at most %d", cJSON_GetArraySize(eos), MAX_EOS);
    cJSON_ArrayForEach(item, eos) if (!config_id(&c->eos[c->n_eos++], item, "eos_token_id", c->V, err)) return false;
    return true;
}

// sizes that are right one by one must also fit together; afterwards no product of them overflows 64 bits
static inline bool config_check_sizes(const Config* c, Error* err) {
    const int64_t widest = 1 << 24;
    if (c->NH % c->NKV != 0)
        return set_error(err, "num_key_value_heads is %d: expected a divisor of num_attention_heads, %d", c->NKV,
                         c->NH);
    if (c->HD % 2 != 0) return set_error(err, "head_dim is %d: expected an even number", c->HD);
    int64_t QKV = ((int64_t)c->NH + 2 * (int64_t)c->NKV) * c->HD;
    if (QKV > widest)
        return set_error(err, "head_dim is %d with %d + 2 * %d heads: expected a product of at most %d", c->HD, c->NH,
                         c->NKV, (int)widest);
    double layer = (double)c->C * ((double)QKV + (double)c->NH * c->HD + 3.0 * c->F + 2);
    if (c->L * layer + 2.0 * c->V * c->C > 0x1p48) return set_error(err, "more than 2^48 parameters");
    return true;
}

static inline bool config_parse_tree(Config* c, const cJSON* root, Error* err) {
    const int widest = 1 << 24;
    double eps = 0;
    if (!cJSON_IsObject(root)) return set_error(err, "expected a JSON object");
    if (!config_check_supported(root, err) || !config_size(&c->C, root, "hidden_size", widest, err) ||
        !config_size(&c->F, root, "intermediate_size", widest, err) ||
        !config_size(&c->L, root, "num_hidden_layers", 4096, err) ||
        !config_size(&c->NH, root, "num_attention_heads", widest, err) ||
        !config_size(&c->V, root, "vocab_size", 1 << 27, err) ||
        !config_size(&c->context, root, "max_position_embeddings", 1 << 30, err) ||
        !config_positive(&eps, root, "rms_norm_eps", err) || !config_bool(&c->tied, root, "tie_word_embeddings", err))
        return false;
    c->eps = (float)eps;
    c->NKV = c->NH;
    if (!config_size(&c->NKV, root, "num_key_value_heads", widest, err)) return false;
    if (!config_get(root, "head_dim") && c->C % c->NH != 0)
        return set_error(err,
                         "hidden_size is %d: expected a multiple of num_attention_heads, %d, as there is no head_dim",
                         c->C, c->NH);
    c->HD = c->C / c->NH;
    if (!config_size(&c->HD, root, "head_dim", widest, err) || !config_check_sizes(c, err)) return false;

    const cJSON* bos = config_get(root, "bos_token_id");
    c->bos = -1;
    if (bos && !config_id(&c->bos, bos, "bos_token_id", c->V, err)) return false;
    return config_parse_eos(c, root, err) && config_parse_rope(c, root, err);
}

// the text of a config.json
static inline bool config_parse(Config* c, const char* text, size_t n, Error* err) {
    memset(c, 0, sizeof *c);
    cJSON* root = json_parse(text, n, err);
    bool ok = root && config_parse_tree(c, root, err);
    cJSON_Delete(root);
    return ok;
}

static inline bool config_read_generation(Config* c, const char* path, Error* err) {
    char* text;
    size_t n;
    if (!read_file(path, &text, &n, CONFIG_BYTES, err)) return false;
    cJSON* root = json_parse(text, n, err);
    bool ok = (root && config_parse_eos(c, root, err)) || error_in(err, path);
    cJSON_Delete(root);
    free(text);
    return ok;
}

// folder/config.json, and what folder/generation_config.json says of the end of a text
static inline bool config_read(Config* c, const char* folder, Error* err) {
    char path[PATH_SIZE], *text;
    size_t n;
    if (!path_join(path, folder, "config.json", err) || !read_file(path, &text, &n, CONFIG_BYTES, err)) return false;
    bool ok = config_parse(c, text, n, err) || error_in(err, path);
    free(text);
    if (!ok || !folder_has(folder, "generation_config.json")) return ok;
    return path_join(path, folder, "generation_config.json", err) && config_read_generation(c, path, err);
}

// ---- writing ---------------------------------------------------------------------------------

// a float's shortest decimal: 1e-05, not 9.99999974737875e-06
static inline double config_decimal(float x) {
    char text[32];
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)x);
        if (strtof(text, NULL) == x) break;
    }
    return strtod(text, NULL);
}

// null where there is none: transformers would take ids 1 and 2 for fields that are missing
static inline void config_add_ids(cJSON* root, const Config* c) {
    if (c->bos < 0)
        cJSON_AddNullToObject(root, "bos_token_id");
    else
        cJSON_AddNumberToObject(root, "bos_token_id", c->bos);
    if (c->n_eos == 0)
        cJSON_AddNullToObject(root, "eos_token_id");
    else if (c->n_eos == 1)
        cJSON_AddNumberToObject(root, "eos_token_id", c->eos[0]);
    else
        cJSON_AddItemToObject(root, "eos_token_id", cJSON_CreateIntArray(c->eos, c->n_eos));
}

static inline void config_add_rope(cJSON* root, const Config* c) {
    json_add_float(root, "rope_theta", c->theta);
    if (c->factor == 1) {
        cJSON_AddNullToObject(root, "rope_scaling");
        return;
    }
    cJSON* rope = cJSON_AddObjectToObject(root, "rope_scaling");
    cJSON_AddStringToObject(rope, "rope_type", "llama3");
    json_add_float(rope, "factor", c->factor);
    json_add_float(rope, "low_freq_factor", c->low);
    json_add_float(rope, "high_freq_factor", c->high);
    cJSON_AddNumberToObject(rope, "original_max_position_embeddings", c->original);
}

static inline cJSON* config_tree(const Config* c, Dtype dtype) {
    static const char* const architecture = "LlamaForCausalLM";
    cJSON* root = cJSON_CreateObject();
    cJSON_AddItemToObject(root, "architectures", cJSON_CreateStringArray(&architecture, 1));
    cJSON_AddStringToObject(root, "model_type", "llama");
    cJSON_AddNumberToObject(root, "hidden_size", c->C);
    cJSON_AddNumberToObject(root, "intermediate_size", c->F);
    cJSON_AddNumberToObject(root, "num_hidden_layers", c->L);
    cJSON_AddNumberToObject(root, "num_attention_heads", c->NH);
    cJSON_AddNumberToObject(root, "num_key_value_heads", c->NKV);
    cJSON_AddNumberToObject(root, "head_dim", c->HD);
    cJSON_AddNumberToObject(root, "vocab_size", c->V);
    cJSON_AddBoolToObject(root, "tie_word_embeddings", c->tied);
    cJSON_AddNumberToObject(root, "max_position_embeddings", c->context);
    cJSON_AddStringToObject(root, "hidden_act", "silu");
    cJSON_AddBoolToObject(root, "attention_bias", false);
    cJSON_AddBoolToObject(root, "mlp_bias", false);
    json_add_float(root, "rms_norm_eps", config_decimal(c->eps));
    config_add_rope(root, c);
    config_add_ids(root, c);
    static const char* const dtypes[] = { "float32", "bfloat16", "float16" };
    cJSON_AddStringToObject(root, "torch_dtype", dtypes[dtype]);
    return root;
}

static inline bool config_write(const Config* c, const char* folder, Dtype dtype, Error* err) {
    cJSON* generation = cJSON_CreateObject();
    config_add_ids(generation, c);
    return json_write(config_tree(c, dtype), folder, "config.json", err) &&
           json_write(generation, folder, "generation_config.json", err);
}

// ---- tensors ---------------------------------------------------------------------------------

static inline bool llama3_map_tensor(const Param* param, const Safetensors* st, Error* err) {
    const SafeTensor* t = safetensors_find(st, param->name);
    if (!t) return set_error(err, "%s is missing", param->name);
    const Dtype dtypes[] = { DTYPE_F32, DTYPE_BF16, DTYPE_F16 };
    int found = 0;
    while (found < 3 && strcmp(t->dtype, dtype_name(dtypes[found])) != 0) found++;
    if (found == 3) return set_error(err, "%s: dtype is %s: expected F32, BF16 or F16", param->name, t->dtype);
    const int64_t matrix[2] = { param->rows, param->cols }, vector[1] = { param->cols };
    const int n_dims = param->rows ? 2 : 1;
    const int64_t* shape = param->rows ? matrix : vector;
    if (t->n_dims != n_dims || memcmp(t->shape, shape, (size_t)n_dims * sizeof *shape) != 0) {
        char got[128], want[64];
        return set_error(err, "%s: shape is %s: expected %s", param->name,
                         safetensors_shape_text(got, sizeof got, t->shape, t->n_dims),
                         safetensors_shape_text(want, sizeof want, shape, n_dims));
    }
    param->tensor->data = (void*)t->data; // mapped read-only
    param->tensor->dtype = dtypes[found];
    return true;
}

// points every tensor of p at its numbers in the file, where they stay: st must outlive p. p->layer has room for c->L
// layers. A tied model takes the embedding for lm_head, whatever else the file holds
static inline bool llama3_map(Params* p, const Config* c, const Safetensors* st, Error* err) {
    int n = llama3_count(c);
    Param* list = (Param*)allocate((size_t)n, sizeof *list);
    llama3_list(list, p, c);
    bool ok = true;
    for (int i = 0; i < n && ok; i++) ok = llama3_map_tensor(&list[i], st, err);
    free(list);
    if (ok && c->tied) p->lm_head = p->embed;
    return ok;
}
