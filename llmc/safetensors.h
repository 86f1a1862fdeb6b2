/*
Safetensors: the file format of model weights.

    8 bytes         N, the length of the header, little-endian
    N bytes         {"name": {"dtype": "BF16", "shape": [2048, 512], "data_offsets": [begin, end]}, …,
                     "__metadata__": {…}}
    the rest        the numbers; offsets count from here

Reading maps the file and points at the numbers where they lie, at any byte address. As in the reference reader every
byte of the data belongs to exactly one tensor: no holes, no overlap, nothing after the last; and every size agrees with
its shape.
A folder holds model.safetensors, or shards and model.safetensors.index.json, which says what lies in which.
Writing streams through a small buffer, converts on the way, and pads the header so that the data begin on a cache line.

Lifetime        a Safetensors owns its mapped files; its tensors are valid until safetensors_close
Proved by       dev/test/test_files.c (round trips, every truncation), dev/test/fuzz_safetensors.c
Source          huggingface/safetensors, README.md: the format
*/
#pragma once

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "error.h"
#include "file.h"
#include "json.h"

enum { SAFETENSORS_DIMS = 8, SAFETENSORS_HEADER_LIMIT = 100000000 }; // the limit is the reference reader's

typedef struct {
    const char* name;
    char dtype[8];
    int n_dims;
    int64_t shape[SAFETENSORS_DIMS];
    const uint8_t* data; // bytes of it, any alignment
    size_t bytes;
    int shard; // the file it lies in
} SafeTensor;

typedef struct {
    Map map;       // empty when the bytes are the caller's
    cJSON* header; // owns the names
} SafetensorsShard;

typedef struct {
    SafeTensor* tensors; // sorted by name
    size_t n;
    SafetensorsShard* shards;
    int n_shards;
} Safetensors;

static inline void safetensors_close(Safetensors* st) {
    for (int i = 0; i < st->n_shards; i++) {
        unmap_file(&st->shards[i].map);
        cJSON_Delete(st->shards[i].header);
    }
    free(st->shards);
    free(st->tensors);
    memset(st, 0, sizeof *st);
}

// ---- the header ------------------------------------------------------------------------------

// bytes of one number of a dtype; 0 when it is not supported
static inline int safetensors_dtype_bytes(const char* dtype) {
    static const struct {
        const char* name;
        int bytes;
    } dtypes[] = { { "F32", 4 },  { "BF16", 2 }, { "F16", 2 },     { "F64", 8 },     { "I64", 8 },    { "U64", 8 },
                   { "I32", 4 },  { "U32", 4 },  { "I16", 2 },     { "U16", 2 },     { "I8", 1 },     { "U8", 1 },
                   { "BOOL", 1 }, { "C64", 8 },  { "F8_E4M3", 1 }, { "F8_E5M2", 1 }, { "F8_E8M0", 1 } };
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (strcmp(dtypes[i].name, dtype) == 0) return dtypes[i].bytes;
    return 0;
}

// "[2048, 512]" into text
static inline const char* safetensors_shape_text(char* text, size_t size, const int64_t* shape, int n_dims) {
    size_t used = (size_t)snprintf(text, size, "[");
    for (int d = 0; d < n_dims && used < size; d++)
        used += (size_t)snprintf(text + used, size - used, "%s%" PRId64, d ? ", " : "", shape[d]);
    if (used < size) snprintf(text + used, size - used, "]");
    return text;
}

// one entry of the header, whose data are the size bytes at data
static inline bool safetensors_parse_entry(SafeTensor* t, const cJSON* entry, const uint8_t* data, size_t size,
                                           Error* err) {
    const cJSON *dtype = json_get(entry, "dtype"), *shape = json_get(entry, "shape");
    const cJSON *offsets = json_get(entry, "data_offsets"), *item;
    t->name = entry->string;
    if (!cJSON_IsString(dtype)) return set_error(err, "%.200s: dtype is missing or not a string", t->name);
    int element = safetensors_dtype_bytes(dtype->valuestring);
    if (element == 0) return set_error(err, "%.200s: dtype %.40s is not supported", t->name, dtype->valuestring);
    snprintf(t->dtype, sizeof t->dtype, "%s", dtype->valuestring);

    if (!cJSON_IsArray(shape)) return set_error(err, "%.200s: shape is missing or not a list", t->name);
    uint64_t bytes = (uint64_t)element;
    cJSON_ArrayForEach(item, shape) {
        int64_t dim;
        if (t->n_dims == SAFETENSORS_DIMS)
            return set_error(err, "%.200s: more than %d dimensions", t->name, SAFETENSORS_DIMS);
        if (!json_whole(item, &dim) || dim < 0)
            return set_error(err, "%.200s: dimension %d of the shape is not a whole number", t->name, t->n_dims);
        t->shape[t->n_dims++] = dim;
        if (__builtin_mul_overflow(bytes, (uint64_t)dim, &bytes))
            return set_error(err, "%.200s: shape too large", t->name);
    }

    int64_t begin, end;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 || !json_whole(offsets->child, &begin) ||
        !json_whole(offsets->child->next, &end) || begin < 0 || begin > end)
        return set_error(err, "%.200s: data_offsets are not two whole numbers, begin <= end", t->name);
    if ((uint64_t)end > size)
        return set_error(err, "%.200s: ends at byte %" PRId64 " of the data, the file has %zu: truncated?", t->name,
                         end, size);
    if ((uint64_t)(end - begin) != bytes) {
        char text[128];
        return set_error(err, "%.200s: %s %s takes %" PRIu64 " bytes, data_offsets give %" PRId64, t->name, t->dtype,
                         safetensors_shape_text(text, sizeof text, t->shape, t->n_dims), bytes, end - begin);
    }
    t->data = data + begin;
    t->bytes = (size_t)bytes;
    return true;
}

static inline int safetensors_compare_place(const void* a, const void* b) {
    const SafeTensor *x = (const SafeTensor*)a, *y = (const SafeTensor*)b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static inline int safetensors_compare_name(const void* a, const void* b) {
    return strcmp(((const SafeTensor*)a)->name, ((const SafeTensor*)b)->name);
}

// the n tensors of one file lie end to end and fill its data
static inline bool safetensors_check_places(SafeTensor* tensors, size_t n, const uint8_t* data, size_t size,
                                            Error* err) {
    qsort(tensors, n, sizeof *tensors, safetensors_compare_place);
    size_t expected = 0;
    for (size_t i = 0; i < n; i++) {
        size_t begin = (size_t)(tensors[i].data - data);
        if (begin < expected)
            return set_error(err, "%.200s: begins at byte %zu of the data, inside %.200s, which ends at %zu",
                             tensors[i].name, begin, tensors[i - 1].name, expected);
        if (begin > expected)
            return set_error(err,
                             "%.200s: begins at byte %zu of the data, %zu expected: bytes that belong to no tensor",
                             tensors[i].name, begin, expected);
        expected = begin + tensors[i].bytes;
    }
    if (expected != size)
        return set_error(err, "the tensors end at byte %zu of the data, the file has %zu", expected, size);
    return true;
}

// adds the tensors of one file, whose bytes are given, to st. The caller has made room for one more shard
static inline bool safetensors_add(Safetensors* st, const uint8_t* bytes, size_t size, Error* err) {
    if (size < 8) return set_error(err, "%zu bytes: too short for a safetensors file", size);
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | bytes[i];
    if (length > SAFETENSORS_HEADER_LIMIT)
        return set_error(err, "header of %" PRIu64 " bytes, at most %d expected: not a safetensors file?", length,
                         SAFETENSORS_HEADER_LIMIT);
    if (length > size - 8)
        return set_error(err, "header of %" PRIu64 " bytes in a file of %zu: truncated, or not a safetensors file",
                         length, size);
    cJSON* header = json_parse((const char*)bytes + 8, (size_t)length, err);
    if (!header) return error_in(err, "header");
    int shard = st->n_shards++;
    st->shards[shard].header = header;
    if (!cJSON_IsObject(header) || bytes[8] != '{') return set_error(err, "header is not a JSON object");

    const uint8_t* data = bytes + 8 + length;
    size -= 8 + (size_t)length;
    size_t first = st->n;
    const cJSON* entry;
    cJSON_ArrayForEach(entry, header) st->n++;
    st->tensors = (SafeTensor*)reallocate(st->tensors, st->n, sizeof *st->tensors);
    st->n = first;
    cJSON_ArrayForEach(entry, header) {
        if (strcmp(entry->string, "__metadata__") == 0) continue;
        SafeTensor* t = &st->tensors[st->n++];
        memset(t, 0, sizeof *t);
        t->shard = shard;
        if (!safetensors_parse_entry(t, entry, data, size, err)) return false;
    }
    return safetensors_check_places(st->tensors + first, st->n - first, data, size, err);
}

// all files are there: sorts by name, so that each can be found
static inline bool safetensors_sort(Safetensors* st, Error* err) {
    qsort(st->tensors, st->n, sizeof *st->tensors, safetensors_compare_name);
    for (size_t i = 1; i < st->n; i++)
        if (strcmp(st->tensors[i - 1].name, st->tensors[i].name) == 0)
            return set_error(err, "%.200s lies in two files", st->tensors[i].name);
    return true;
}

static inline const SafeTensor* safetensors_find(const Safetensors* st, const char* name) {
    SafeTensor key;
    key.name = name;
    if (st->n == 0) return NULL;
    return (const SafeTensor*)bsearch(&key, st->tensors, st->n, sizeof *st->tensors, safetensors_compare_name);
}

// ---- opening ---------------------------------------------------------------------------------

// a file in memory, which stays the caller's and must outlive st
static inline bool safetensors_parse(Safetensors* st, const uint8_t* data, size_t size, Error* err) {
    memset(st, 0, sizeof *st);
    st->shards = (SafetensorsShard*)allocate(1, sizeof *st->shards);
    if (safetensors_add(st, data, size, err) && safetensors_sort(st, err)) return true;
    safetensors_close(st);
    return false;
}

// maps one file and adds its tensors
static inline bool safetensors_add_file(Safetensors* st, const char* path, Error* err) {
    Map map;
    if (!map_file(&map, path, err)) return false;
    int shard = st->n_shards;
    bool ok = safetensors_add(st, map.data, map.size, err);
    if (st->n_shards > shard)
        st->shards[shard].map = map; // even after an error: safetensors_close gives it back
    else
        unmap_file(&map);
    return ok || error_in(err, path);
}

static inline int safetensors_compare_file(const void* a, const void* b) {
    return strcmp((*(const cJSON* const*)a)->valuestring, (*(const cJSON* const*)b)->valuestring);
}

// opens the files that an index names, and checks that each tensor lies where the index says
static inline bool safetensors_add_index(Safetensors* st, const char* folder, const cJSON* index, Error* err) {
    const cJSON *weight_map = json_get(index, "weight_map"), *item;
    if (!cJSON_IsObject(weight_map)) return set_error(err, "weight_map is missing or not an object");
    size_t n = 0, i = 0;
    cJSON_ArrayForEach(item, weight_map) {
        const char* file = cJSON_IsString(item) ? item->valuestring : "";
        if (!*file || strpbrk(file, "/\\") || strcmp(file, "..") == 0)
            return set_error(err, "weight_map: %.200s: \"%.200s\" is not the name of a file in this folder",
                             item->string, file);
        n++;
    }
    if (n == 0) return set_error(err, "weight_map is empty");
    const cJSON** entries = (const cJSON**)allocate(n, sizeof *entries);
    cJSON_ArrayForEach(item, weight_map) entries[i++] = item;
    qsort(entries, n, sizeof *entries, safetensors_compare_file);

    int* shard_of = (int*)allocate(n, sizeof *shard_of);
    st->shards = (SafetensorsShard*)allocate(n, sizeof *st->shards);
    bool ok = true;
    for (i = 0; i < n && ok; i++) {
        char path[PATH_SIZE];
        if (i == 0 || safetensors_compare_file(&entries[i - 1], &entries[i]) != 0)
            ok = path_join(path, folder, entries[i]->valuestring, err) && safetensors_add_file(st, path, err);
        shard_of[i] = st->n_shards - 1;
    }
    ok = ok && safetensors_sort(st, err);
    for (i = 0; i < n && ok; i++) {
        const SafeTensor* t = safetensors_find(st, entries[i]->string);
        if (!t || t->shard != shard_of[i])
            ok = set_error(err, "weight_map: %.200s is not in %.200s", entries[i]->string, entries[i]->valuestring);
    }
    free(shard_of);
    free(entries);
    return ok;
}

static inline bool safetensors_open_index(Safetensors* st, const char* folder, const char* path, Error* err) {
    char* text;
    size_t n;
    if (!read_file(path, &text, &n, SAFETENSORS_HEADER_LIMIT, err)) return false;
    cJSON* index = json_parse(text, n, err);
    free(text);
    bool ok = (index && safetensors_add_index(st, folder, index, err)) || error_in(err, path);
    cJSON_Delete(index);
    return ok;
}

// a file; or a folder that holds model.safetensors, or shards and their index
static inline bool safetensors_open(Safetensors* st, const char* path, Error* err) {
    char file[PATH_SIZE];
    memset(st, 0, sizeof *st);
    bool ok;
    if (is_folder(path) && !folder_has(path, "model.safetensors")) {
        if (!folder_has(path, "model.safetensors.index.json"))
            return set_error(err, "%s: neither model.safetensors nor model.safetensors.index.json in this folder",
                             path);
        ok = path_join(file, path, "model.safetensors.index.json", err) && safetensors_open_index(st, path, file, err);
    } else {
        st->shards = (SafetensorsShard*)allocate(1, sizeof *st->shards);
        if (is_folder(path))
            ok = path_join(file, path, "model.safetensors", err) && safetensors_add_file(st, file, err);
        else
            ok = safetensors_add_file(st, path, err);
        ok = ok && safetensors_sort(st, err);
    }
    if (!ok) safetensors_close(st);
    return ok;
}

// ---- writing ---------------------------------------------------------------------------------

typedef struct {
    char name[64];
    Tensor source;
    Dtype dtype; // as written
    int n_dims;  // 1 or 2
    int64_t shape[2];
} SafetensorsEntry;

static inline size_t safetensors_entry_size(const SafetensorsEntry* e) {
    return (size_t)e->shape[0] * (size_t)(e->n_dims == 2 ? e->shape[1] : 1);
}

// the header's text, padded with spaces; owned by the caller
static inline char* safetensors_header(const SafetensorsEntry* entries, size_t n) {
    cJSON *root = cJSON_CreateObject(), *metadata = cJSON_AddObjectToObject(root, "__metadata__");
    cJSON_AddStringToObject(metadata, "format", "pt"); // transformers asks for it
    double offset = 0;
    for (size_t i = 0; i < n; i++) {
        const SafetensorsEntry* e = &entries[i];
        cJSON* entry = cJSON_AddObjectToObject(root, e->name);
        cJSON_AddStringToObject(entry, "dtype", dtype_name(e->dtype));
        cJSON *shape = cJSON_AddArrayToObject(entry, "shape"), *offsets = cJSON_AddArrayToObject(entry, "data_offsets");
        for (int d = 0; d < e->n_dims; d++) cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)e->shape[d]));
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber(offset));
        offset += (double)(safetensors_entry_size(e) * dtype_bytes(e->dtype));
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber(offset));
    }
    char* text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    if (!text) die("out of memory for the header of a safetensors file");
    size_t length = strlen(text), padded = ((8 + length + 63) & ~(size_t)63) - 8;
    text = (char*)reallocate(text, padded + 1, 1);
    memset(text + length, ' ', padded - length);
    text[padded] = 0;
    return text;
}

// the numbers of one tensor, converted on the way where the types differ
static inline bool safetensors_put(Writer* w, const SafetensorsEntry* e, Error* err) {
    size_t n = safetensors_entry_size(e);
    if (e->source.dtype == e->dtype) return writer_put(w, e->source.data, n * dtype_bytes(e->dtype), err);
    float wide[8192];
    uint16_t narrow[8192];
    const size_t most = sizeof wide / sizeof wide[0];
    for (size_t start = 0; start < n; start += most) {
        size_t count = n - start < most ? n - start : most;
        for (size_t i = 0; i < count; i++) wide[i] = tensor_get(e->source, start + i);
        for (size_t i = 0; i < count && e->dtype != DTYPE_F32; i++)
            narrow[i] = e->dtype == DTYPE_BF16 ? float_to_bf16(wide[i]) : float_to_f16(wide[i]);
        const void* block = e->dtype == DTYPE_F32 ? (const void*)wide : (const void*)narrow;
        if (!writer_put(w, block, count * dtype_bytes(e->dtype), err)) return false;
    }
    return true;
}

static inline bool safetensors_write(const char* path, const SafetensorsEntry* entries, size_t n, Error* err) {
    char* header = safetensors_header(entries, n);
    size_t length = strlen(header);
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (uint8_t)((uint64_t)length >> (8 * i));
    Writer w;
    bool ok = writer_open(&w, path, err) && writer_put(&w, prefix, 8, err) && writer_put(&w, header, length, err);
    for (size_t i = 0; i < n && ok; i++) ok = safetensors_put(&w, &entries[i], err);
    free(header);
    return ok && writer_close(&w, err);
}
