/*
Token streams for training and evaluation.

    .bin        llm.c's token shards: 256 int32 of header (magic, version, count), then the tokens
                20240520 version 1 uint16, 20240801 version 7 uint32; mapped, not read: not to be changed meanwhile
    .jsonl      a document {"text": …} a line: bos and its tokens; or a chat {"messages": [{"role", "content"} …]}: bos
                and each message in Llama 3's template, of which only the assistant's words and their <|eot_id|> are
                targets. Blank lines are ignored
    others      plain text

A path may be a glob; its files, of one kind, are taken in sorted order. Text of several files is packed end to end; each
.bin file is a shard of its own, and no window crosses from one into the next.

    training    windows start at 0, T, 2T … of a shard: T inputs, and the T tokens that follow each as labels. Row n of
                the endless sequence is window permute(epoch, n mod windows) of epoch n / windows, so a run resumes by
                remembering n
    evaluation  the same windows in order, and a shorter one at the end of each shard: every token but a shard's first is
                predicted exactly once

Labels that are not to be learned are -100. In memory such a token has its highest bit set, so that one array is enough.
Positions and counts are 64 bit; a window is found by binary search over the windows before each shard.
Proved by       dev/test/test_data.c, dev/test/fuzz_bin.c, dev/test/fuzz_jsonl.c
Source          the .bin format is that of karpathy/llm.c
*/
#pragma once

#include <glob.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>

#include "dtype.h"
#include "error.h"
#include "file.h"
#include "json.h"
#include "progress.h"
#include "random.h"
#include "tokenizer.h"

typedef uint32_t unaligned_u32 __attribute__((aligned(1)));

enum { BIN_HEADER = 1024 };
static const uint32_t DATA_MASKED = 1u << 31; // in a token that is no target

typedef struct {
    const void* tokens; // n of width bytes, at any address
    int width;          // 2 or 4
    uint64_t n;
} Shard;

typedef struct {
    int T;           // 0: not made yet
    uint64_t* first; // [n_shards + 1] windows in the shards before each
} WindowIndex;

typedef struct {
    Shard* shards;
    size_t n_shards;
    WindowIndex whole, all; // made at the first use of a T: windows of T, and with the shorter last ones
    Map* maps;              // what the shards point into; the views made by data_split own none of it
    size_t n_maps;
    Tokens made;
} Data;

static inline uint32_t shard_get(const Shard* s, uint64_t i) {
    return s->width == 2 ? ((const unaligned_u16*)s->tokens)[i] : ((const unaligned_u32*)s->tokens)[i];
}

static inline void data_close(Data* d) {
    for (size_t i = 0; i < d->n_maps; i++) unmap_file(&d->maps[i]);
    free(d->maps), free(d->shards), free(d->whole.first), free(d->all.first);
    tokens_free(&d->made);
    memset(d, 0, sizeof *d);
}

static inline void data_add_shard(Data* d, const void* tokens, int width, uint64_t n) {
    if ((d->n_shards & (d->n_shards + 1)) == 0) // 0, 1, 3, 7 …: full
        d->shards = (Shard*)reallocate(d->shards, 2 * d->n_shards + 1, sizeof *d->shards);
    Shard* s = &d->shards[d->n_shards++];
    s->tokens = tokens, s->width = width, s->n = n;
}

// ---- token files -----------------------------------------------------------------------------

// the largest of tokens start … end - 1
static inline uint32_t shard_max(const Shard* s, uint64_t start, uint64_t end) {
    const unaligned_u16* narrow = (const unaligned_u16*)s->tokens;
    const unaligned_u32* wide = (const unaligned_u32*)s->tokens;
    uint32_t max = 0;
    if (s->width == 2)
        for (uint64_t i = start; i < end; i++) max = narrow[i] > max ? narrow[i] : max;
    if (s->width == 4)
        for (uint64_t i = start; i < end; i++) max = wide[i] > max ? wide[i] : max;
    return max;
}

// whether all ids are below V
static inline bool data_check_ids(const Shard* s, const char* name, int V, Progress* progress, Error* err) {
    if (s->width == 2 && V > UINT16_MAX) return true;
    enum { CHUNK = 1 << 20 };
    for (uint64_t start = 0, end; start < s->n; start = end) {
        end = s->n - start < CHUNK ? s->n : start + CHUNK;
        if (shard_max(s, start, end) >= (uint32_t)V) {
            while (shard_get(s, start) < (uint32_t)V) start++;
            return set_error(err, "%s: token %llu is %u, but the vocabulary ends at %d", name,
                             (unsigned long long)start, shard_get(s, start), V - 1);
        }
        progress_add(progress, (double)(end - start) * s->width);
    }
    return true;
}

static inline bool data_add_bin(Data* d, const char* name, const uint8_t* bytes, size_t size, int V, Progress* progress,
                                Error* err) {
    if (size < BIN_HEADER)
        return set_error(err, "%s: %zu bytes, but the header of a token file has %d", name, size, BIN_HEADER);
    const unaligned_u32* header = (const unaligned_u32*)bytes;
    bool wide = header[0] == 20240801;
    if (!wide && header[0] != 20240520)
        return set_error(err,
                         "%s: not a token file: it begins with %u, expected 20240520 (uint16) or 20240801 (uint32)",
                         name, header[0]);
    if (header[1] != (wide ? 7 : 1))
        return set_error(err, "%s: version %u, expected %d", name, header[1], wide ? 7 : 1);
    int width = wide ? 4 : 2;
    uint64_t count = header[2], room = size - BIN_HEADER;
    if (count * (uint64_t)width != room)
        return set_error(err, "%s: %llu bytes of tokens, but the header counts %llu tokens of %d bytes", name,
                         (unsigned long long)room, (unsigned long long)count, width);
    data_add_shard(d, bytes + BIN_HEADER, width, count);
    return data_check_ids(&d->shards[d->n_shards - 1], name, V, progress, err);
}

// writes n ids below V as a .bin file, under its name only when it is whole
static inline bool data_write_bin(const char* path, const int32_t* ids, size_t n, int V, Error* err) {
    if (n > INT32_MAX) return set_error(err, "%s: %zu tokens, a token file holds at most %d", path, n, INT32_MAX);
    bool wide = V > 65536;
    size_t width = wide ? 4 : 2;
    int32_t header[BIN_HEADER / 4] = { wide ? 20240801 : 20240520, wide ? 7 : 1, (int32_t)n };
    enum { CHUNK = 4096 };
    uint8_t buffer[CHUNK * 4];
    Writer w;
    if (!writer_open(&w, path, err) || !writer_put(&w, header, sizeof header, err)) return false;
    for (size_t start = 0; start < n; start += CHUNK) {
        size_t count = n - start;
        if (count > CHUNK) count = CHUNK;
        for (size_t i = 0; i < count; i++) {
            uint32_t id = (uint32_t)ids[start + i];
            require(id < (uint32_t)V, "ids are in the vocabulary");
            memcpy(buffer + i * width, &id, width); // the low bytes come first
        }
        if (!writer_put(&w, buffer, count * width, err)) return false;
    }
    return writer_close(&w, err);
}

// ---- text ------------------------------------------------------------------------------------

// where n bytes of text can be cut in two without changing their tokens, at bytes in or later; n when there is no such
// place. Between a letter and a space or line end: no piece of Llama 3's split reaches over it
static inline size_t data_cut(const char* text, size_t n, size_t at) {
    for (; at < n; at++) {
        char before = text[at - 1] | 32;
        if (before >= 'a' && before <= 'z' && (text[at] == ' ' || text[at] == '\n')) return at;
    }
    return n;
}

// whether no added token could be cut there
static inline bool data_can_cut(const Tokenizer* t) {
    for (int i = 0; i < t->n_added; i++) {
        size_t n;
        const char* piece = tokenizer_piece(t, t->added[i].id, &n);
        if (piece && data_cut(piece, n, 1) < n) return false;
    }
    return true;
}

// appends the tokens of n bytes of text, a megabyte at a time, to show progress
static inline bool data_encode(Tokens* out, const char* text, size_t n, bool special, Tokenizer* t, Progress* progress,
                               Error* err) {
    const size_t chunk = data_can_cut(t) ? 1 << 20 : n;
    for (size_t start = 0, end; start < n; start = end) {
        end = n - start <= chunk ? n : data_cut(text, n, start + chunk);
        if (!tokenizer_encode(t, out, text + start, end - start, special, err)) return false;
        progress_add(progress, (double)(end - start));
    }
    return true;
}

static inline bool data_add_document(Data* d, const cJSON* text, Tokenizer* t, Error* err) {
    if (!cJSON_IsString(text)) return set_error(err, "\"text\" is not a string");
    if (t->bos >= 0) tokens_push(&d->made, t->bos);
    return tokenizer_encode(t, &d->made, text->valuestring, strlen(text->valuestring), false, err);
}

static inline bool data_add_chat(Data* d, const cJSON* messages, Tokenizer* t, Error* err) {
    if (!cJSON_IsArray(messages)) return set_error(err, "\"messages\" is not a list");
    Tokens* made = &d->made;
    size_t masked = made->n; // the first token whose mask is not decided yet
    if (t->bos >= 0) tokens_push(made, t->bos);
    const cJSON* message;
    cJSON_ArrayForEach(message, messages) {
        const cJSON *role = json_get(message, "role"), *content = json_get(message, "content");
        if (!cJSON_IsString(role) || !cJSON_IsString(content))
            return set_error(err, "a message is not {\"role\": \"…\", \"content\": \"…\"}");
        size_t start = made->n;
        if (!tokenizer_chat_header(t, made, role->valuestring, err)) return false;
        size_t words = made->n;
        made->n = start; // the message brings its header along
        if (!tokenizer_chat_message(t, made, role->valuestring, content->valuestring, strlen(content->valuestring),
                                    err))
            return false;
        bool learned = strcmp(role->valuestring, "assistant") == 0;
        for (; masked < (learned ? words : made->n); masked++)
            made->ids[masked] = (int32_t)((uint32_t)made->ids[masked] | DATA_MASKED);
        masked = made->n;
    }
    return true;
}

static inline bool data_add_line(Data* d, const char* line, size_t n, Tokenizer* t, Error* err) {
    cJSON* object = json_parse(line, n, err);
    if (!object) return false;
    const cJSON *text = json_get(object, "text"), *messages = json_get(object, "messages");
    bool ok = text && !messages   ? data_add_document(d, text, t, err)
              : messages && !text ? data_add_chat(d, messages, t, err)
                                  : set_error(err, "expected {\"text\": …} or {\"messages\": […]}");
    cJSON_Delete(object);
    return ok;
}

static inline bool data_add_jsonl(Data* d, const char* name, const char* text, size_t n, Tokenizer* t,
                                  Progress* progress, Error* err) {
    uint64_t number = 1;
    for (size_t start = 0, end; start < n; start = end + 1, number++) {
        const char* newline = (const char*)memchr(text + start, '\n', n - start);
        end = newline ? (size_t)(newline - text) : n;
        size_t blank = start;
        while (blank < end && strchr(" \t\r", text[blank]) && text[blank]) blank++;
        if (blank < end && !data_add_line(d, text + start, end - start, t, err)) {
            char where[PATH_SIZE];
            snprintf(where, sizeof where, "%.400s, line %llu", name, (unsigned long long)number);
            return error_in(err, where);
        }
        progress_add(progress, (double)(end - start + 1));
    }
    return true;
}

// ---- opening ---------------------------------------------------------------------------------

typedef enum { DATA_TEXT, DATA_JSONL, DATA_BIN } DataKind;

static inline bool ends_in(const char* text, const char* end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static inline DataKind data_kind(const char* path) {
    return ends_in(path, ".bin") ? DATA_BIN : ends_in(path, ".jsonl") ? DATA_JSONL : DATA_TEXT;
}

// adds the bytes of one file; those of a .bin file must outlive d
static inline bool data_add(Data* d, DataKind kind, const char* name, const uint8_t* bytes, size_t size, Tokenizer* t,
                            int V, Progress* progress, Error* err) {
    if (kind == DATA_BIN) return data_add_bin(d, name, bytes, size, V, progress, err);
    if (!t) return set_error(err, "%s: text needs a tokenizer; only .bin files do without one", name);
    if (kind == DATA_JSONL) return data_add_jsonl(d, name, (const char*)bytes, size, t, progress, err);
    return data_encode(&d->made, (const char*)bytes, size, false, t, progress, err) || error_in(err, name);
}

// the last step of opening: tokens made from text become a shard
static inline bool data_finish(Data* d, const char* name, int V, Error* err) {
    if (d->made.n) data_add_shard(d, d->made.ids, 4, d->made.n);
    uint64_t most = 0;
    for (size_t s = 0; s < d->n_shards; s++) most = d->shards[s].n > most ? d->shards[s].n : most;
    if (most < 2) return set_error(err, "%s: %s, at least two are needed", name, most ? "one token" : "no tokens");
    for (size_t i = 0; i < d->made.n; i++)
        if (((uint32_t)d->made.ids[i] & ~DATA_MASKED) >= (uint32_t)V)
            return set_error(err, "%s: token %zu is %u, but the vocabulary ends at %d", name, i,
                             (uint32_t)d->made.ids[i] & ~DATA_MASKED, V - 1);
    return true;
}

// the tokens of a text in memory, which need not outlive the call
static inline bool data_text(Data* d, const char* text, size_t n, Tokenizer* t, Error* err) {
    Progress progress;
    memset(d, 0, sizeof *d);
    progress_begin(&progress, "reading the text", (double)n);
    bool ok = data_add(d, DATA_TEXT, "the text", (const uint8_t*)text, n, t, t->V, &progress, err) &&
              data_finish(d, "the text", t->V, err);
    progress_end(&progress);
    if (!ok) data_close(d);
    return ok;
}

static inline bool data_add_files(Data* d, char** paths, size_t n, Tokenizer* t, int V, Progress* progress,
                                  Error* err) {
    DataKind kind = data_kind(paths[0]);
    d->maps = (Map*)allocate(n, sizeof *d->maps);
    for (size_t i = 0; i < n; i++) {
        if (data_kind(paths[i]) != kind)
            return set_error(err, "%s and %s are of different kinds (.bin, .jsonl or text)", paths[0], paths[i]);
        Map map;
        if (!map_file(&map, paths[i], err)) return false;
        bool ok = data_add(d, kind, paths[i], map.data, map.size, t, V, progress, err);
        if (kind == DATA_BIN) d->maps[d->n_maps++] = map; // also after an error: data_close unmaps it
        if (kind != DATA_BIN) unmap_file(&map);
        if (!ok) return false;
    }
    return true;
}

// the files that a path or glob names, sorted; free with globfree. Where there is a file of exactly that name, it is that
static inline bool data_find(glob_t* files, const char* path, Error* err) {
    char pattern[2 * PATH_SIZE], *p = pattern;
    if (strlen(path) >= PATH_SIZE) return set_error(err, "path too long: %.100s…", path);
    bool exact = file_exists(path);
    for (const char* from = path; *from; *p++ = *from++)
        if (exact && strchr("*?[\\", *from)) *p++ = '\\';
    *p = 0;
    int code = glob(pattern, 0, NULL, files);
    if (code == 0) return true;
    globfree(files);
    return set_error(err, "%s: %s", path, code == GLOB_NOMATCH ? "no such file" : "cannot look for files");
}

// opens a file or the files of a glob for a vocabulary of V. Without a tokenizer only .bin files will do
static inline bool data_open(Data* d, const char* path, Tokenizer* t, int V, Error* err) {
    memset(d, 0, sizeof *d);
    glob_t files;
    if (!data_find(&files, path, err)) return false;
    double bytes = 0;
    struct stat s;
    for (size_t i = 0; i < files.gl_pathc; i++)
        if (stat(files.gl_pathv[i], &s) == 0) bytes += (double)s.st_size;
    char what[80];
    snprintf(what, sizeof what, "reading %.60s", path);
    Progress progress;
    progress_begin(&progress, what, bytes);
    bool ok = data_add_files(d, files.gl_pathv, files.gl_pathc, t, V, &progress, err) && data_finish(d, path, V, err);
    progress_end(&progress);
    globfree(&files);
    if (!ok) data_close(d);
    return ok;
}

// ---- what is in it ---------------------------------------------------------------------------

static inline uint64_t data_tokens(const Data* d) {
    uint64_t n = 0;
    for (size_t s = 0; s < d->n_shards; s++) n += d->shards[s].n;
    return n;
}

static inline void data_forget_windows(Data* d) {
    free(d->whole.first), free(d->all.first);
    memset(&d->whole, 0, sizeof d->whole), memset(&d->all, 0, sizeof d->all);
}

// val becomes the last fraction of the tokens of train, which keeps the others. val is a view into what train owns: close
// it, but use it no longer than train is open
static inline void data_split(Data* train, Data* val, double fraction) {
    require(fraction >= 0 && fraction <= 1, "a fraction is held out");
    uint64_t total = data_tokens(train), kept = total - (uint64_t)((double)total * fraction);
    memset(val, 0, sizeof *val);
    data_forget_windows(train);
    for (size_t s = 0; s < train->n_shards; s++) {
        Shard* shard = &train->shards[s];
        uint64_t stay = shard->n < kept ? shard->n : kept;
        const char* rest = (const char*)shard->tokens + stay * (uint64_t)shard->width;
        if (stay < shard->n) data_add_shard(val, rest, shard->width, shard->n - stay);
        shard->n = stay;
        kept -= stay;
    }
}

// ---- windows ---------------------------------------------------------------------------------

// windows of T in the shards before each, and in all of them; partial: with the shorter one at the end of each
static inline const uint64_t* data_index(Data* d, int T, bool partial) {
    WindowIndex* index = partial ? &d->all : &d->whole;
    require(T > 0, "a window has a positive length");
    if (index->T == T) return index->first;
    index->first = (uint64_t*)reallocate(index->first, d->n_shards + 1, sizeof *index->first);
    index->T = T;
    index->first[0] = 0;
    for (size_t s = 0; s < d->n_shards; s++) {
        uint64_t predictions = d->shards[s].n ? d->shards[s].n - 1 : 0;
        index->first[s + 1] = index->first[s] + (predictions + (partial ? (uint64_t)T - 1 : 0)) / (uint64_t)T;
    }
    return index->first;
}

// copies window number w (a shorter one at the end of a shard too): its inputs and the labels after them; returns its length
static inline int data_window(const Data* d, const uint64_t* first, int32_t* ids, int32_t* labels, int T, uint64_t w) {
    size_t low = 0, high = d->n_shards; // first[low] <= w < first[high]
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (first[middle] <= w) low = middle;
        if (first[middle] > w) high = middle;
    }
    const Shard* s = &d->shards[low];
    uint64_t start = (w - first[low]) * (uint64_t)T, left = s->n - 1 - start;
    int n = left < (uint64_t)T ? (int)left : T;
    uint32_t token = shard_get(s, start);
    for (int i = 0; i < n; i++) {
        uint32_t next = shard_get(s, start + (uint64_t)i + 1);
        ids[i] = (int32_t)(token & ~DATA_MASKED);
        labels[i] = next & DATA_MASKED ? IGNORED_LABEL : (int32_t)next;
        token = next;
    }
    return n;
}

// whole windows of T inputs and T labels
static inline uint64_t data_windows(Data* d, int T) { return data_index(d, T, false)[d->n_shards]; }

// whether there is at least one whole window; name says in err which data it is
static inline bool data_check_seq(Data* d, const char* name, int T, Error* err) {
    if (data_windows(d, T) > 0) return true;
    uint64_t most = 0;
    for (size_t s = 0; s < d->n_shards; s++) most = d->shards[s].n > most ? d->shards[s].n : most;
    if (most < 2) return set_error(err, "%s: too few tokens to train on", name);
    return set_error(err, "%s: %llu tokens%s, but --seq %d needs %d; --seq %llu fits", name, (unsigned long long)most,
                     d->n_shards > 1 ? " in the longest shard" : "", T, T + 1, (unsigned long long)most - 1);
}

// fills ids and labels (B, T) with rows position … position + B - 1 of the endless sequence that belongs to seed
static inline void data_batch(Data* d, int32_t* ids, int32_t* labels, int B, int T, uint64_t seed, uint64_t position) {
    uint64_t windows = data_windows(d, T);
    require(windows > 0, "data_check_seq was asked");
    for (int r = 0; r < B; r++) {
        uint64_t n = position + (uint64_t)r, w = random_permute(seed, n / windows, windows, n % windows);
        size_t row = (size_t)r * (size_t)T;
        data_window(d, d->whole.first, ids + row, labels + row, T, w);
    }
}

// windows in order, with the shorter ones
static inline uint64_t data_eval_windows(Data* d, int T) { return data_index(d, T, true)[d->n_shards]; }

// fills ids and labels (T) with window i; a shorter one is filled up with id 0 and ignored labels. Returns its length, 0
// beyond the last
static inline int data_eval_window(Data* d, int32_t* ids, int32_t* labels, int T, uint64_t i) {
    int n = i < data_eval_windows(d, T) ? data_window(d, d->all.first, ids, labels, T, i) : 0;
    for (int t = n; t < T; t++) ids[t] = 0, labels[t] = IGNORED_LABEL;
    return n;
}
