/*
The tokenizer: text to token ids and back. Byte-level BPE as Llama 3 has it, or plain bytes.

    encode      1 added tokens such as <|eot_id|> are cut out; special ones only when asked, so that text cannot inject them
                2 the rest is split into pieces by Llama 3's pattern: a word with the space before it, up to three digits …
                3 a piece that is a token is that token. Any other starts as single bytes; of the adjacent pairs that merge,
                  the one of lowest rank does, the leftmost of equals, until none is left
    decode      the bytes of the tokens, one after the other

Files           tokenizer.json      HuggingFace's; merges have ranks of their own. What it asks for and is not done here
                                    (a normalizer, another split, another model) is an error that names the field
                tokenizer.model     Meta's: a line "base64(token) rank" for each token. Two tokens merge when their bytes
                                    together are a token, and its id is the rank; 256 special tokens follow
Invalid UTF-8   the split sees the valid stretches; every byte between them is a token of its own, so that none is lost
Bound by        the split (PCRE2, compiled to machine code; plain words need it not) and cache misses: one look-up per piece
                and several where pairs merge. A piece of more than 64 bytes merges through a heap: n log n, for text may
                be one long run of the same character
Proved by       dev/test/test_tokenizer.c, dev/test/fuzz_tokenizer_json.c, fuzz_tokenizer_model.c, fuzz_encode.c, and
                dev/reference/parity_tokenizer.py beside HuggingFace's tokenizers and OpenAI's tiktoken
Source          Sennrich, Haddow, Birch 2016, "Neural Machine Translation of Rare Words with Subword Units"
*/
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "file.h"
#include "json.h"

enum {
    MAX_PIECE = 1024,  // bytes of a token
    MAX_IDS = 1 << 22, // ids are below
    SHORT_PIECE = 64,  // bytes up to which pairs are searched one by one
    N_RESERVED = 256,  // special tokens behind those of a tokenizer.model
};

// Llama 3's split, with white space spelled as asked: \s in files, Unicode's property for PCRE2, whose own \s is ASCII's
// or, if told to use Unicode, has U+180E too
#define LLAMA3_SPLIT(s, S)                                                                                             \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^" s "\\p{L}\\p{N}]+[\\r\\n]*|" s       \
    "*[\\r\\n]+|" s "+(?!" S ")|" s "+"

// the roles' part of Llama 3's chat template, in Jinja; tokenizer_chat_message does the same
#define LLAMA3_CHAT_TEMPLATE                                                                                           \
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "                        \
    "'<|end_header_id|>\\n\\n'"                                                                                        \
    " + (message['content'] | trim) + '<|eot_id|>' }}{% endfor %}"                                                     \
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"

// ---- arrays that grow ------------------------------------------------------------------------

typedef struct {
    int32_t* ids;
    size_t n, capacity;
} Tokens;

static inline void tokens_push(Tokens* t, int32_t id) {
    if (t->n == t->capacity) {
        t->capacity = t->capacity ? 2 * t->capacity : 1024;
        t->ids = (int32_t*)reallocate(t->ids, t->capacity, sizeof *t->ids);
    }
    t->ids[t->n++] = id;
}

static inline void tokens_free(Tokens* t) {
    free(t->ids);
    memset(t, 0, sizeof *t);
}

typedef struct {
    char* data;
    size_t n, capacity;
} Text;

static inline void text_add(Text* t, const char* bytes, size_t n) {
    if (n > t->capacity - t->n) {
        t->capacity = t->capacity + n + t->capacity / 2 + 64;
        t->data = (char*)reallocate(t->data, t->capacity, 1);
    }
    if (n) memcpy(t->data + t->n, bytes, n);
    t->n += n;
}

static inline void text_free(Text* t) {
    free(t->data);
    memset(t, 0, sizeof *t);
}

// ---- the table of tokens ---------------------------------------------------------------------

typedef struct {
    uint32_t at, n; // its bytes: n of them from bytes.data + at; n 0: there is no such id
} Piece;

typedef struct {
    int32_t id; // its text is its piece
    bool special;
} AddedToken;

typedef struct {
    int32_t left, right, id; // left and right become id
} Merge;

// of the hash tables, open addressing. All bits are set in an empty slot: its id is -1, its rank NO_MERGE
typedef struct {
    uint64_t print; // the bytes themselves when there are at most 8, else a hash of them
    uint32_t n;     // how many
    int32_t id;
} TokenSlot;

typedef struct {
    uint64_t pair; // left << 32 | right
    uint32_t rank;
    int32_t id;
} MergeSlot;

static const uint32_t NO_MERGE = UINT32_MAX;

// clang-format off

// begins as zeros; used by one thread at a time
typedef struct {
    int32_t V;            // the largest id + 1
    int32_t bos, eos;     // -1: none
    bool ignore_merges;   // a piece that is a token needs no merges to become it

    Piece* pieces;        // [V], room for capacity
    int32_t capacity;
    Text bytes;           // of all pieces
    int32_t byte_id[256];
    AddedToken* added;    // [n_added], the longest first
    int n_added;
    uint8_t starts[256];  // bit 0: an added token begins with this byte; bit 1: one that is not special does

    TokenSlot* tokens;    // 1 << token_bits slots for the tokens that are not added
    int token_bits;
    uint32_t longest;     // bytes of the longest of them
    Merge* merges;        // [n_merges], in the order of tokenizer.json
    size_t n_merges, merges_capacity;
    MergeSlot* merge_slots; // 1 << merge_bits of them
    int merge_bits;
    uint8_t* whole;       // [V]: do a token's own bytes merge into it? WHOLE_…

    Text source;          // the tokenizer.json it was read from
    pcre2_code* split;
    pcre2_match_data* match;
    pcre2_match_context* context;
    pcre2_jit_stack* jit_stack;
} Tokenizer;

// clang-format on

enum { WHOLE_UNKNOWN, WHOLE_YES, WHOLE_NO };

static inline void tokenizer_close(Tokenizer* t) {
    pcre2_code_free(t->split);
    pcre2_match_data_free(t->match);
    pcre2_match_context_free(t->context);
    pcre2_jit_stack_free(t->jit_stack);
    free(t->pieces), free(t->added), free(t->tokens), free(t->merges), free(t->merge_slots), free(t->whole);
    text_free(&t->bytes), text_free(&t->source);
    memset(t, 0, sizeof *t);
}

// the bytes of a token, owned by the tokenizer; NULL when there is no such id
static inline const char* tokenizer_piece(const Tokenizer* t, int32_t id, size_t* n) {
    *n = 0;
    if (id < 0 || id >= t->V || t->pieces[id].n == 0) return NULL;
    *n = t->pieces[id].n;
    return t->bytes.data + t->pieces[id].at;
}

static inline uint64_t load_8(const char* p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

static inline uint64_t load_4(const char* p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}

// n > 0 bytes as one number, the same for two pieces of the same length up to 8 only when they are equal
static inline uint64_t piece_print(const char* p, size_t n) {
    if (n < 4) return (uint64_t)(uint8_t)p[0] | (uint64_t)(uint8_t)p[n / 2] << 8 | (uint64_t)(uint8_t)p[n - 1] << 16;
    if (n <= 8) return load_4(p) | load_4(p + n - 4) << 32;
    uint64_t print = load_8(p + n - 8);
    for (size_t i = 0; i + 8 < n; i += 8) {
        print = (print ^ load_8(p + i)) * 0x9e3779b97f4a7c15u;
        print ^= print >> 32;
    }
    return print;
}

// the first slot to look at, of 1 << bits
static inline size_t hash_slot(uint64_t key, int bits) {
    return (size_t)((key ^ key >> 32) * 0x9e3779b97f4a7c15u >> (64 - bits));
}

// the bits of a table that stays at most two thirds full
static inline int hash_bits(size_t count) {
    int bits = 4;
    while (((size_t)1 << bits) * 2 / 3 < count) bits++;
    return bits;
}

// the slot where n > 0 bytes may be; if others are there, one of those that follow
static inline TokenSlot* tokenizer_first_slot(const Tokenizer* t, const char* bytes, size_t n) {
    return &t->tokens[hash_slot(piece_print(bytes, n) + n, t->token_bits)];
}

// the slot of n > 0 bytes, or the empty one where they belong
static inline TokenSlot* tokenizer_slot(const Tokenizer* t, const char* bytes, size_t n) {
    uint64_t print = piece_print(bytes, n);
    size_t mask = ((size_t)1 << t->token_bits) - 1;
    for (size_t i = (size_t)(tokenizer_first_slot(t, bytes, n) - t->tokens);; i = (i + 1) & mask) {
        TokenSlot* s = &t->tokens[i];
        if (s->id < 0) return s;
        if (s->print == print && s->n == n && (n <= 8 || !memcmp(t->bytes.data + t->pieces[s->id].at, bytes, n)))
            return s;
    }
}

// the id of the token (not an added one) of these bytes; -1: none
static inline int32_t tokenizer_find(const Tokenizer* t, const char* bytes, size_t n) {
    return n == 0 || n > t->longest ? -1 : tokenizer_slot(t, bytes, n)->id;
}

static inline uint64_t pair_of(int32_t left, int32_t right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }

// the slot of a pair; rank NO_MERGE when it does not merge
static inline MergeSlot* tokenizer_merge(const Tokenizer* t, int32_t left, int32_t right) {
    uint64_t pair = pair_of(left, right);
    size_t mask = ((size_t)1 << t->merge_bits) - 1;
    for (size_t i = hash_slot(pair, t->merge_bits);; i = (i + 1) & mask) {
        MergeSlot* s = &t->merge_slots[i];
        if (s->pair == pair || s->id < 0) return s;
    }
}

// the id of an added token by its text, -1 when there is none
static inline int32_t tokenizer_special(const Tokenizer* t, const char* text) {
    size_t length = strlen(text), n;
    for (int i = 0; i < t->n_added; i++) {
        const char* piece = tokenizer_piece(t, t->added[i].id, &n);
        if (n == length && memcmp(piece, text, n) == 0) return t->added[i].id;
    }
    return -1;
}

// ---- filling it ------------------------------------------------------------------------------

static inline void* empty_slots(int bits, size_t size) {
    void* slots = reallocate(NULL, (size_t)1 << bits, size);
    memset(slots, 0xff, size << bits);
    return slots;
}

// makes the bytes the piece of id
static inline bool tokenizer_set_piece(Tokenizer* t, int64_t id, const char* bytes, size_t n, Error* err) {
    if (id < 0 || id >= MAX_IDS)
        return set_error(err, "token id %lld is out of range, 0 to %d expected", (long long)id, MAX_IDS - 1);
    if (n == 0 || n > MAX_PIECE)
        return set_error(err, "token %lld is %zu bytes long, 1 to %d expected", (long long)id, n, MAX_PIECE);
    if (id >= t->capacity) {
        int32_t capacity = (int32_t)id + 1 + t->capacity / 2;
        t->pieces = (Piece*)reallocate(t->pieces, (size_t)capacity, sizeof *t->pieces);
        memset(t->pieces + t->capacity, 0, (size_t)(capacity - t->capacity) * sizeof *t->pieces);
        t->capacity = capacity;
    }
    Piece* piece = &t->pieces[id];
    if (piece->n) return set_error(err, "two tokens have the id %lld", (long long)id);
    piece->at = (uint32_t)t->bytes.n, piece->n = (uint32_t)n;
    text_add(&t->bytes, bytes, n);
    if (id >= t->V) t->V = (int32_t)id + 1;
    return true;
}

static inline bool tokenizer_add_token(Tokenizer* t, int64_t id, const char* bytes, size_t n, Error* err) {
    if (!tokenizer_set_piece(t, id, bytes, n, err)) return false;
    TokenSlot* slot = tokenizer_slot(t, bytes, n);
    if (slot->id >= 0) return set_error(err, "tokens %d and %lld are the same bytes", slot->id, (long long)id);
    slot->print = piece_print(bytes, n), slot->n = (uint32_t)n, slot->id = (int32_t)id;
    if (n > t->longest) t->longest = (uint32_t)n;
    return true;
}

// there is room for it in t->added
static inline bool tokenizer_add_special(Tokenizer* t, int64_t id, const char* text, bool special, Error* err) {
    if (tokenizer_special(t, text) >= 0) return set_error(err, "the added token \"%.100s\" occurs twice", text);
    if (!tokenizer_set_piece(t, id, text, strlen(text), err)) return false;
    AddedToken token = { (int32_t)id, special };
    int i = t->n_added++;
    for (; i && t->pieces[t->added[i - 1].id].n < t->pieces[id].n; i--) t->added[i] = t->added[i - 1];
    t->added[i] = token;
    t->starts[(uint8_t)text[0]] |= special ? 1 : 3;
    return true;
}

static inline void tokenizer_add_merge(Tokenizer* t, int32_t left, int32_t right, int32_t id) {
    if (t->n_merges == t->merges_capacity) {
        t->merges_capacity = t->merges_capacity ? 2 * t->merges_capacity : 1024;
        t->merges = (Merge*)reallocate(t->merges, t->merges_capacity, sizeof *t->merges);
    }
    Merge merge = { left, right, id };
    t->merges[t->n_merges++] = merge;
}

// the table of merges; the rank is the place in the list, or the id that it makes
static inline bool tokenizer_index_merges(Tokenizer* t, bool rank_is_id, Error* err) {
    t->merge_bits = hash_bits(t->n_merges);
    t->merge_slots = (MergeSlot*)empty_slots(t->merge_bits, sizeof *t->merge_slots);
    for (size_t i = 0; i < t->n_merges; i++) {
        const Merge* m = &t->merges[i];
        MergeSlot* slot = tokenizer_merge(t, m->left, m->right);
        if (slot->id >= 0) return set_error(err, "merges: entry %zu repeats an earlier one", i);
        slot->pair = pair_of(m->left, m->right);
        slot->rank = rank_is_id ? (uint32_t)m->id : (uint32_t)i;
        slot->id = m->id;
    }
    return true;
}

static inline bool tokenizer_compile_split(Tokenizer* t, Error* err) {
    static const char pattern[] = LLAMA3_SPLIT("\\p{White_Space}", "\\P{White_Space}");
    int code;
    PCRE2_SIZE at;
    t->split = pcre2_compile((PCRE2_SPTR)pattern, sizeof pattern - 1, PCRE2_UTF | PCRE2_ANCHORED, &code, &at, NULL);
    if (!t->split)
        return set_error(err, "PCRE2 refuses the split pattern at %zu (10.40 or newer expected)", (size_t)at);
    pcre2_jit_compile(t->split, PCRE2_JIT_COMPLETE); // where that is not supported PCRE2 interprets
    t->match = pcre2_match_data_create(1, NULL);
    t->context = pcre2_match_context_create(NULL);
    t->jit_stack = pcre2_jit_stack_create(32 << 10, 8 << 20, NULL);
    if (!t->match || !t->context || !t->jit_stack) die("out of memory in PCRE2");
    pcre2_set_match_limit(t->context, UINT32_MAX); // a piece may be the whole text
    pcre2_set_depth_limit(t->context, UINT32_MAX);
    pcre2_set_heap_limit(t->context, UINT32_MAX);
    pcre2_jit_stack_assign(t->context, NULL, t->jit_stack);
    return true;
}

// all tokens, added tokens and merges are in: the rest of what encoding needs
static inline bool tokenizer_finish(Tokenizer* t, bool rank_is_id, Error* err) {
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        t->byte_id[b] = tokenizer_find(t, &byte, 1);
        if (t->byte_id[b] < 0) return set_error(err, "no token for the byte 0x%02x: every byte must have one", b);
    }
    t->whole = (uint8_t*)allocate((size_t)t->V, 1);
    if (t->ignore_merges) memset(t->whole, WHOLE_YES, (size_t)t->V);
    return tokenizer_index_merges(t, rank_is_id, err) && tokenizer_compile_split(t, err);
}

static inline void tokenizer_reserve(Tokenizer* t, size_t tokens, size_t added) {
    t->token_bits = hash_bits(tokens);
    t->tokens = (TokenSlot*)empty_slots(t->token_bits, sizeof *t->tokens);
    t->added = (AddedToken*)allocate(added, sizeof *t->added);
}

// ---- bytes as tokens -------------------------------------------------------------------------

// ids 0 to 255 are the bytes; five special tokens follow
static inline void tokenizer_bytes(Tokenizer* t) {
    static const char* const specials[] = { "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                                            "<|end_header_id|>", "<|eot_id|>" };
    Error err = { "" };
    memset(t, 0, sizeof *t);
    tokenizer_reserve(t, 256, 5);
    bool ok = true;
    for (int b = 0; b < 256 && ok; b++) {
        char byte = (char)b;
        ok = tokenizer_add_token(t, b, &byte, 1, &err);
    }
    for (int i = 0; i < 5 && ok; i++) ok = tokenizer_add_special(t, 256 + i, specials[i], true, &err);
    t->bos = 256, t->eos = 257;
    if (!ok || !tokenizer_finish(t, false, &err)) die("%s", err.text);
}

// ---- tokenizer.model -------------------------------------------------------------------------

static inline int base64_value(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

// decodes n characters into bytes (room for 3 n / 4); returns how many, 0 when they are not base64
static inline size_t base64_decode(char* bytes, const char* text, size_t n) {
    if (n == 0 || n % 4) return 0;
    size_t padding = text[n - 1] != '=' ? 0 : text[n - 2] != '=' ? 1 : 2, length = n / 4 * 3 - padding, done = 0;
    for (size_t i = 0; i < n; i += 4) {
        uint32_t group = 0;
        for (size_t j = i; j < i + 4; j++) {
            int value = j < n - padding ? base64_value(text[j]) : 0;
            if (value < 0) return 0;
            group = group << 6 | (uint32_t)value;
        }
        for (int shift = 16; shift >= 0 && done < length; shift -= 8) bytes[done++] = (char)(group >> shift);
    }
    return length;
}

// two tokens merge when their bytes together are a token. Listed as tokenizer.json lists them: by the token made, by left
static inline void tokenizer_derive_merges(Tokenizer* t) {
    for (int32_t id = 0; id < t->V; id++) {
        size_t n, first = t->n_merges;
        const char* piece = tokenizer_piece(t, id, &n);
        for (size_t cut = 1; cut < n; cut++) {
            int32_t left = tokenizer_find(t, piece, cut);
            int32_t right = left < 0 ? -1 : tokenizer_find(t, piece + cut, n - cut);
            if (right < 0) continue;
            tokenizer_add_merge(t, left, right, id);
            for (size_t i = t->n_merges - 1; i > first && t->merges[i - 1].left > t->merges[i].left; i--) {
                Merge moved = t->merges[i];
                t->merges[i] = t->merges[i - 1], t->merges[i - 1] = moved;
            }
        }
    }
}

// the special tokens as Llama 3.1 and later name them; i counts from the first, the nameless ones have numbers
static inline void llama3_special_name(char name[64], int i) {
    // clang-format off
    static const char* const names[] = {
        "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
        "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id",
        "eom_id", "eot_id", "python_tag",
    };
    // clang-format on
    const int named = sizeof names / sizeof *names;
    if (i < named) snprintf(name, 64, "<|%s|>", names[i]);
    if (i >= named) snprintf(name, 64, "<|reserved_special_token_%d|>", i - named + 3);
}

// one line, "base64 rank", of n characters
static inline bool tokenizer_parse_line(Tokenizer* t, int64_t id, const char* line, size_t n, Error* err) {
    const char* space = (const char*)memchr(line, ' ', n);
    size_t length = space ? (size_t)(space - line) : n;
    char bytes[MAX_PIECE + 3], rank[32];
    if (length > MAX_PIECE / 3 * 4) return set_error(err, "line %lld: a token too long", (long long)id + 1);
    size_t decoded = space ? base64_decode(bytes, line, length) : 0;
    if (decoded == 0)
        return set_error(err, "line %lld: not a token in base64, a space and its rank", (long long)id + 1);
    size_t digits = (size_t)snprintf(rank, sizeof rank, "%lld", (long long)id);
    if (n - length - 1 != digits || memcmp(space + 1, rank, digits) != 0)
        return set_error(err, "line %lld: the rank is \"%.*s\", expected %s", (long long)id + 1,
                         (int)(n - length - 1 < 20 ? n - length - 1 : 20), space + 1, rank);
    return tokenizer_add_token(t, id, bytes, decoded, err);
}

static inline bool tokenizer_fill_from_model(Tokenizer* t, const char* text, size_t n, Error* err) {
    size_t lines = 1;
    for (size_t i = 0; i < n; i++) lines += text[i] == '\n';
    if (lines > MAX_IDS - N_RESERVED) return set_error(err, "%zu lines: more than there can be tokens", lines);
    tokenizer_reserve(t, lines, N_RESERVED);
    for (const char *line = text, *end = text + n; line < end;) {
        const char* stop = (const char*)memchr(line, '\n', (size_t)(end - line));
        if (!stop) stop = end;
        if (!tokenizer_parse_line(t, t->V, line, (size_t)(stop - line), err)) return false;
        line = stop + 1;
    }
    t->ignore_merges = true;
    tokenizer_derive_merges(t);
    t->bos = t->V, t->eos = t->V + 1;
    for (int i = 0; i < N_RESERVED; i++) {
        char name[64];
        llama3_special_name(name, i);
        if (!tokenizer_add_special(t, t->V, name, true, err)) return false;
    }
    return tokenizer_finish(t, true, err);
}

// the tokenizer of a tokenizer.model of n bytes; after an error there is nothing to close
static inline bool tokenizer_parse_model(Tokenizer* t, const char* text, size_t n, Error* err) {
    memset(t, 0, sizeof *t);
    if (tokenizer_fill_from_model(t, text, n, err)) return true;
    tokenizer_close(t);
    return false;
}

// ---- tokenizer.json --------------------------------------------------------------------------

// GPT-2's alphabet, in which tokenizer.json spells bytes: printable Latin-1 is itself, the rest moves to U+0100 and up
static inline int symbol_of_byte(int byte) {
    if ((byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad)) return byte;
    return byte <= 0x20 ? byte + 0x100 : byte == 0xad ? 0x143 : byte + 0xa2;
}

static inline int byte_of_symbol(int symbol) {
    int byte = symbol < 0x100 ? symbol : symbol <= 0x120 ? symbol - 0x100 : symbol == 0x143 ? 0xad : symbol - 0xa2;
    return byte < 0x100 && symbol_of_byte(byte) == symbol ? byte : -1;
}

// spells n bytes in that alphabet, in UTF-8
static inline void spell_bytes(Text* out, const char* bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        int symbol = symbol_of_byte((uint8_t)bytes[i]);
        char utf8[2] = { (char)(symbol < 0x80 ? symbol : 0xc0 | symbol >> 6), (char)(0x80 | (symbol & 0x3f)) };
        text_add(out, utf8, symbol < 0x80 ? 1 : 2);
    }
}

// the bytes (at most MAX_PIECE) that n bytes of UTF-8 spell; returns how many, 0 when they are not of the alphabet
static inline size_t unspell_bytes(char* bytes, const char* spelled, size_t n) {
    size_t done = 0;
    for (size_t i = 0; i < n; i++) {
        int symbol = (uint8_t)spelled[i];
        if (symbol >= 0x80) {
            if (symbol < 0xc2 || symbol > 0xc5 || ++i == n) return 0; // not two bytes, U+0080 to U+017F
            symbol = (symbol & 0x1f) << 6 | ((uint8_t)spelled[i] & 0x3f);
        }
        int byte = byte_of_symbol(symbol);
        if (byte < 0 || done == MAX_PIECE) return 0;
        bytes[done++] = (char)byte;
    }
    return done;
}

// clang-format off

// what a tokenizer.json must say; absent counts as null
static const struct {
    const char *path, *want, *or_want; // JSON text
} tokenizer_fields[] = {
    { "truncation",                                       "null",          NULL },
    { "padding",                                          "null",          NULL },
    { "normalizer",                                       "null",          NULL },
    { "pre_tokenizer.type",                               "\"Sequence\"",  NULL },
    { "pre_tokenizer.pretokenizers.0.type",               "\"Split\"",     NULL },
    { "pre_tokenizer.pretokenizers.0.behavior",           "\"Isolated\"",  NULL },
    { "pre_tokenizer.pretokenizers.0.invert",             "false",         NULL },
    { "pre_tokenizer.pretokenizers.1.type",               "\"ByteLevel\"", NULL },
    { "pre_tokenizer.pretokenizers.1.add_prefix_space",   "false",         NULL },
    { "pre_tokenizer.pretokenizers.1.use_regex",          "false",         NULL },
    { "pre_tokenizer.pretokenizers.2",                    "null",          NULL },
    { "decoder.type",                                     "\"ByteLevel\"", NULL },
    { "model.type",                                       "\"BPE\"",       NULL },
    { "model.dropout",                                    "null",          "0" },
    { "model.continuing_subword_prefix",                  "null",          "\"\"" },
    { "model.end_of_word_suffix",                         "null",          "\"\"" },
    { "model.byte_fallback",                              "false",         "null" },
    { "model.ignore_merges",                              "false",         "true" },
};

// clang-format on

// the item at a path such as "model.type" or "pretokenizers.0"; NULL when there is none
static inline const cJSON* json_at(const cJSON* item, const char* path) {
    char key[64];
    while (item && *path) {
        size_t n = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)n, path);
        item = cJSON_IsArray(item) ? cJSON_GetArrayItem(item, atoi(key)) : json_get(item, key);
        path += n + (path[n] == '.');
    }
    return item;
}

static inline bool tokenizer_check_fields(const cJSON* root, Error* err) {
    bool ok = true;
    for (size_t i = 0; i < sizeof tokenizer_fields / sizeof tokenizer_fields[0] && ok; i++) {
        const char* path = tokenizer_fields[i].path;
        const char *want = tokenizer_fields[i].want, *or_want = tokenizer_fields[i].or_want;
        const cJSON* item = json_at(root, path);
        char* printed = item ? cJSON_PrintUnformatted(item) : NULL;
        const char* found = item ? printed : "null";
        if (!found) die("out of memory");
        if (strcmp(found, want) != 0 && (!or_want || strcmp(found, or_want) != 0))
            ok = set_error(err, "%s is %.100s, not supported: expected %s", path, found, want);
        free(printed);
    }
    const cJSON* regex = json_at(root, "pre_tokenizer.pretokenizers.0.pattern.Regex");
    if (ok && (!cJSON_IsString(regex) || strcmp(regex->valuestring, LLAMA3_SPLIT("\\s", "\\S")) != 0))
        ok = set_error(err, "pre_tokenizer.pretokenizers.0.pattern is not Llama 3's split: not supported");
    return ok;
}

static inline bool tokenizer_read_added(Tokenizer* t, const cJSON* list, Error* err) {
    static const char* const unsupported[] = { "single_word", "lstrip", "rstrip" };
    const cJSON* item;
    cJSON_ArrayForEach(item, list) {
        const cJSON* content = json_get(item, "content");
        int64_t id;
        if (!cJSON_IsString(content) || !json_whole(json_get(item, "id"), &id))
            return set_error(err, "added_tokens: an entry without a content and a whole id");
        for (int i = 0; i < 3; i++)
            if (cJSON_IsTrue(json_get(item, unsupported[i])))
                return set_error(err, "added_tokens: %s of \"%.100s\" is true, not supported: expected false",
                                 unsupported[i], content->valuestring);
        bool special = cJSON_IsTrue(json_get(item, "special"));
        if (!tokenizer_add_special(t, id, content->valuestring, special, err)) return error_in(err, "added_tokens");
    }
    return true;
}

// every token of the vocabulary but those that are added tokens, which text does not become by itself
static inline bool tokenizer_read_vocab(Tokenizer* t, const cJSON* vocab, Error* err) {
    char bytes[MAX_PIECE];
    const cJSON* item;
    cJSON_ArrayForEach(item, vocab) {
        const char *key = item->string, *piece;
        size_t length = strlen(key), n;
        int64_t id;
        if (!json_whole(item, &id)) return set_error(err, "model.vocab: the id of \"%.100s\" is no whole number", key);
        piece = id >= 0 && id < MAX_IDS ? tokenizer_piece(t, (int32_t)id, &n) : NULL;
        if (piece && n == length && memcmp(piece, key, n) == 0 && tokenizer_special(t, key) == id) continue;
        n = unspell_bytes(bytes, key, length);
        if (n == 0)
            return set_error(err, "model.vocab: \"%.100s\" does not spell 1 to %d bytes in the byte-level alphabet",
                             key, MAX_PIECE);
        if (!tokenizer_add_token(t, id, bytes, n, err)) return error_in(err, "model.vocab");
    }
    for (int i = 0; i < t->n_added; i++) {
        size_t n;
        const char* text = tokenizer_piece(t, t->added[i].id, &n);
        int32_t id = tokenizer_find(t, bytes, unspell_bytes(bytes, text, n));
        if (id >= 0)
            return set_error(err, "\"%.*s\" is %d in added_tokens and %d in model.vocab", (int)n, text, t->added[i].id,
                             id);
    }
    return true;
}

// "left right" or ["left", "right"], in the order of their ranks
static inline bool tokenizer_read_merges(Tokenizer* t, const cJSON* merges, Error* err) {
    char bytes[2 * MAX_PIECE];
    size_t i = 0;
    const cJSON* item;
    cJSON_ArrayForEach(item, merges) {
        const char *left = NULL, *right = NULL;
        size_t left_length = 0;
        if (cJSON_IsString(item) && (right = strchr(item->valuestring, ' '))) {
            left = item->valuestring, left_length = (size_t)(right++ - left);
        } else if (cJSON_IsArray(item) && cJSON_GetArraySize(item) == 2 && cJSON_IsString(item->child) &&
                   cJSON_IsString(item->child->next)) {
            left = item->child->valuestring, left_length = strlen(left), right = item->child->next->valuestring;
        }
        if (!left) return set_error(err, "model.merges: entry %zu is not a pair of tokens", i);
        size_t nl = unspell_bytes(bytes, left, left_length), nr = unspell_bytes(bytes + nl, right, strlen(right));
        int32_t left_id = tokenizer_find(t, bytes, nl), right_id = tokenizer_find(t, bytes + nl, nr);
        int32_t id = tokenizer_find(t, bytes, nl + nr);
        if (left_id < 0 || right_id < 0 || id < 0)
            return set_error(err,
                             "model.merges: entry %zu: \"%.*s\", \"%.50s\" and both together must be in model.vocab", i,
                             (int)(left_length < 50 ? left_length : 50), left, right);
        tokenizer_add_merge(t, left_id, right_id, id);
        i++;
    }
    return true;
}

static inline bool tokenizer_fill_from_json(Tokenizer* t, const cJSON* root, Error* err) {
    const cJSON *vocab = json_at(root, "model.vocab"), *merges = json_at(root, "model.merges");
    const cJSON* added = json_get(root, "added_tokens");
    if (!tokenizer_check_fields(root, err)) return false;
    if (!cJSON_IsObject(vocab)) return set_error(err, "model.vocab is missing, or no object");
    if (!cJSON_IsArray(merges)) return set_error(err, "model.merges is missing, or no array");
    if (added && !cJSON_IsArray(added)) return set_error(err, "added_tokens is no array");
    t->ignore_merges = cJSON_IsTrue(json_at(root, "model.ignore_merges"));
    tokenizer_reserve(t, (size_t)cJSON_GetArraySize(vocab), (size_t)cJSON_GetArraySize(added));
    if (!tokenizer_read_added(t, added, err) || !tokenizer_read_vocab(t, vocab, err) ||
        !tokenizer_read_merges(t, merges, err) || !tokenizer_finish(t, false, err))
        return false;
    t->bos = tokenizer_special(t, "<|begin_of_text|>"), t->eos = tokenizer_special(t, "<|end_of_text|>");
    return true;
}

// the tokenizer of a tokenizer.json of n bytes; after an error there is nothing to close
static inline bool tokenizer_parse_json(Tokenizer* t, const char* text, size_t n, Error* err) {
    memset(t, 0, sizeof *t);
    cJSON* root = json_parse(text, n, err);
    if (!root) return false;
    bool ok = tokenizer_fill_from_json(t, root, err);
    cJSON_Delete(root);
    if (ok)
        text_add(&t->source, text, n);
    else
        tokenizer_close(t);
    return ok;
}

// bos or eos as tokenizer_config.json names it: a string, an object with a content, or null for none. Absent: as it was
static inline bool tokenizer_name_special(const Tokenizer* t, int32_t* id, const cJSON* root, const char* key,
                                          Error* err) {
    const cJSON *item = json_get(root, key), *content = cJSON_IsObject(item) ? json_get(item, "content") : item;
    if (!item) return true;
    *id = cJSON_IsString(content) ? tokenizer_special(t, content->valuestring) : -1;
    if (*id >= 0 || cJSON_IsNull(item)) return true;
    return set_error(err, "%s is not the text of an added token of tokenizer.json", key);
}

static inline bool tokenizer_parse_config(Tokenizer* t, const char* text, size_t n, Error* err) {
    cJSON* root = json_parse(text, n, err);
    bool ok = root && tokenizer_name_special(t, &t->bos, root, "bos_token", err) &&
              tokenizer_name_special(t, &t->eos, root, "eos_token", err);
    cJSON_Delete(root);
    return ok;
}

// ---- opening ---------------------------------------------------------------------------------

// reads the tokenizer_config.json beside a tokenizer.json, if there is one
static inline bool tokenizer_open_config(Tokenizer* t, const char* json_path, Error* err) {
    char path[PATH_SIZE], *text;
    const char* slash = strrchr(json_path, '/');
    size_t n;
    int folder = slash ? (int)(slash + 1 - json_path) : 0;
    if (snprintf(path, sizeof path, "%.*stokenizer_config.json", folder, json_path) >= PATH_SIZE || !file_exists(path))
        return true;
    if (!read_file(path, &text, &n, 1 << 24, err)) return false;
    bool ok = tokenizer_parse_config(t, text, n, err);
    free(text);
    return ok || error_in(err, path);
}

// opens a tokenizer.json, a tokenizer.model, or the one in a folder (the former when both are there). After an error
// there is nothing to close
static inline bool tokenizer_open(Tokenizer* t, const char* path, Error* err) {
    char inside[PATH_SIZE], *text;
    size_t n;
    memset(t, 0, sizeof *t);
    if (is_folder(path)) {
        const char* name = folder_has(path, "tokenizer.json") ? "tokenizer.json" : "tokenizer.model";
        if (!folder_has(path, name)) return set_error(err, "%s: holds no tokenizer.json and no tokenizer.model", path);
        if (!path_join(inside, path, name, err)) return false;
        path = inside;
    }
    if (!read_file(path, &text, &n, 1 << 28, err)) return false;
    bool json = text[strspn(text, " \t\r\n")] == '{'; // never begins base64
    bool ok = json ? tokenizer_parse_json(t, text, n, err) : tokenizer_parse_model(t, text, n, err);
    free(text);
    if (!ok) return error_in(err, path);
    if (!json || tokenizer_open_config(t, path, err)) return true;
    tokenizer_close(t);
    return false;
}

// ---- encoding --------------------------------------------------------------------------------

// merges the bytes of a piece of at most SHORT_PIECE
static inline void tokenizer_merge_short(const Tokenizer* t, Tokens* out, const char* bytes, size_t n) {
    int32_t ids[SHORT_PIECE], made[SHORT_PIECE]; // ids[i] and ids[i + 1] become made[i],
    uint32_t rank[SHORT_PIECE];                  // the lowest rank[i] first
    for (size_t i = 0; i < n; i++) ids[i] = t->byte_id[(uint8_t)bytes[i]];
    for (size_t i = 0; i + 1 < n; i++) {
        const MergeSlot* merge = tokenizer_merge(t, ids[i], ids[i + 1]);
        rank[i] = merge->rank, made[i] = merge->id;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == NO_MERGE) break;
        ids[best] = made[best];
        size_t behind = --n - best - 1; // ids behind the merged pair
        memmove(ids + best + 1, ids + best + 2, behind * sizeof *ids);
        memmove(rank + best, rank + best + 1, behind * sizeof *rank);
        memmove(made + best, made + best + 1, behind * sizeof *made);
        for (size_t i = best ? best - 1 : 0; i <= best && i + 1 < n; i++) {
            const MergeSlot* merge = tokenizer_merge(t, ids[i], ids[i + 1]);
            rank[i] = merge->rank, made[i] = merge->id;
        }
    }
    for (size_t i = 0; i < n; i++) tokens_push(out, ids[i]);
}

// A heap of numbers, the smallest first, four children to a node: they share a cache line, and it is half as deep as with two

typedef struct {
    uint64_t* keys;
    size_t n, capacity;
} Heap;

static inline void heap_push(Heap* h, uint64_t key) {
    if (h->n == h->capacity) {
        h->capacity = h->capacity ? 2 * h->capacity : 256;
        h->keys = (uint64_t*)reallocate(h->keys, h->capacity, sizeof *h->keys);
    }
    size_t i = h->n++;
    for (; i && h->keys[(i - 1) / 4] > key; i = (i - 1) / 4) h->keys[i] = h->keys[(i - 1) / 4];
    h->keys[i] = key;
}

static inline uint64_t heap_pop(Heap* h) {
    uint64_t top = h->keys[0], key = h->keys[--h->n];
    for (size_t i = 0;;) {
        size_t first = 4 * i + 1, end = first + 4 < h->n ? first + 4 : h->n, least = first;
        for (size_t c = first + 1; c < end; c++)
            if (h->keys[c] < h->keys[least]) least = c;
        if (first >= h->n || h->keys[least] >= key) {
            h->keys[i] = key;
            return top;
        }
        h->keys[i] = h->keys[least];
        i = least;
    }
}

// a token of a piece that is being merged; it covers the bytes from its own index to that of the next
typedef struct {
    int32_t id;              // -1: merged into the one before
    uint32_t previous, next; // indices; next is n behind the last
} PieceNode;

// enters the pair of node i and the next, if it merges
static inline void tokenizer_enter_pair(const Tokenizer* t, Heap* heap, const PieceNode* nodes, uint32_t i, size_t n) {
    if (nodes[i].next == n) return;
    uint32_t rank = tokenizer_merge(t, nodes[i].id, nodes[nodes[i].next].id)->rank;
    if (rank != NO_MERGE) heap_push(heap, (uint64_t)rank << 32 | i);
}

// the same for a long piece: the pairs wait in a heap, ordered by rank, then by place. A pair that changed since it
// entered has another rank, or none; it entered again
static inline void tokenizer_merge_long(const Tokenizer* t, Tokens* out, const char* bytes, size_t n) {
    PieceNode* nodes = (PieceNode*)allocate(n, sizeof *nodes);
    Heap heap = { NULL, 0, 0 };
    for (size_t i = 0; i < n; i++) {
        nodes[i].id = t->byte_id[(uint8_t)bytes[i]];
        nodes[i].previous = (uint32_t)i - 1, nodes[i].next = (uint32_t)i + 1;
    }
    for (size_t i = 0; i < n; i++) tokenizer_enter_pair(t, &heap, nodes, (uint32_t)i, n);
    while (heap.n) {
        uint64_t key = heap_pop(&heap);
        uint32_t i = (uint32_t)key, next = nodes[i].next;
        if (nodes[i].id < 0 || next == n) continue;
        const MergeSlot* merge = tokenizer_merge(t, nodes[i].id, nodes[next].id);
        if (merge->rank != key >> 32) continue;
        nodes[i].id = merge->id;
        nodes[next].id = -1;
        nodes[i].next = nodes[next].next;
        if (nodes[i].next < n) nodes[nodes[i].next].previous = i;
        tokenizer_enter_pair(t, &heap, nodes, i, n);
        if (i) tokenizer_enter_pair(t, &heap, nodes, nodes[i].previous, n);
    }
    for (size_t i = 0; i < n; i = nodes[i].next) tokens_push(out, nodes[i].id);
    free(nodes), free(heap.keys);
}

static inline void tokenizer_merge_piece(const Tokenizer* t, Tokens* out, const char* bytes, size_t n) {
    if (n <= SHORT_PIECE)
        tokenizer_merge_short(t, out, bytes, n);
    else
        tokenizer_merge_long(t, out, bytes, n);
}

// whether the bytes of a token merge into it, so that no merging is needed where they are a whole piece
static inline bool tokenizer_is_whole(Tokenizer* t, int32_t id) {
    if (t->whole[id] == WHOLE_UNKNOWN) {
        Tokens merged = { NULL, 0, 0 };
        size_t n;
        const char* piece = tokenizer_piece(t, id, &n);
        tokenizer_merge_piece(t, &merged, piece, n);
        t->whole[id] = merged.n == 1 && merged.ids[0] == id ? WHOLE_YES : WHOLE_NO;
        tokens_free(&merged);
    }
    return t->whole[id] == WHOLE_YES;
}

static inline bool tokenizer_encode_piece(Tokenizer* t, Tokens* out, const char* piece, size_t n, Error* err) {
    int32_t id = tokenizer_find(t, piece, n);
    if (id >= 0 && (t->ignore_merges || tokenizer_is_whole(t, id)))
        tokens_push(out, id);
    else if (n < UINT32_MAX)
        tokenizer_merge_piece(t, out, piece, n);
    else
        return set_error(err, "a single piece of %zu bytes: at most %u expected", n, UINT32_MAX - 1);
    return true;
}

// The commonest piece, known without the pattern: ASCII letters after a space or none, before what is in ASCII and no
// letter. Returns its length, 0 when text begins with none
static inline size_t plain_word(const char* text, size_t n) {
    size_t start = text[0] == ' ', i = start;
    while (i < n && ((uint8_t)text[i] | 0x20u) - 'a' < 26) i++;
    return i > start && (i == n || (uint8_t)text[i] < 0x80) ? i : 0;
}

// the end of the piece that begins at text + at, by the pattern, which matches everywhere; 0 with a line in err when
// PCRE2 gives up
static inline size_t tokenizer_split(Tokenizer* t, const char* text, size_t n, size_t at, Error* err) {
    int code = pcre2_match(t->split, (PCRE2_SPTR)text, n, at, PCRE2_NO_UTF_CHECK, t->match, t->context);
    if (code > 0) return pcre2_get_ovector_pointer(t->match)[1];
    set_error(err, "PCRE2 cannot split the text at byte %zu: its error %d", at, code);
    return 0;
}

// text is valid UTF-8. Some pieces are split off ahead, so that their slots are on the way from memory when looked up
static inline bool tokenizer_encode_valid(Tokenizer* t, Tokens* out, const char* text, size_t n, Error* err) {
    enum { AHEAD = 16 };
    size_t ends[AHEAD];
    for (size_t at = 0, start = 0; at < n;) {
        int pieces = 0;
        for (; pieces < AHEAD && at < n; ends[pieces++] = at) {
            size_t word = plain_word(text + at, n - at), end = word ? at + word : tokenizer_split(t, text, n, at, err);
            if (end == 0) return false;
            if (end - at <= t->longest) __builtin_prefetch(tokenizer_first_slot(t, text + at, end - at));
            at = end;
        }
        for (int i = 0; i < pieces; start = ends[i++])
            if (!tokenizer_encode_piece(t, out, text + start, ends[i] - start, err)) return false;
    }
    return true;
}

// the length of the valid UTF-8 that text begins with
static inline size_t utf8_valid(const char* text, size_t n) {
    size_t at = 0;
    while (at < n) {
        if (n - at >= 8 && !(load_8(text + at) & 0x8080808080808080u)) {
            at += 8;
            continue;
        }
        int length = utf8_length((const unsigned char*)text + at, (const unsigned char*)text + n);
        if (length == 0) break;
        at += (size_t)length;
    }
    return at;
}

// text without added tokens
static inline bool tokenizer_encode_plain(Tokenizer* t, Tokens* out, const char* text, size_t n, Error* err) {
    bool bytes_only = t->n_merges == 0 && !t->ignore_merges; // then it does not matter where the text is split
    for (size_t at = 0; at < n;) {
        size_t valid = bytes_only ? 0 : utf8_valid(text + at, n - at);
        if (!tokenizer_encode_valid(t, out, text + at, valid, err)) return false;
        at += valid;
        if (at < n) tokens_push(out, t->byte_id[(uint8_t)text[at++]]);
    }
    return true;
}

// the longest added token that text begins with, NULL when there is none
static inline const AddedToken* tokenizer_added_at(const Tokenizer* t, const char* text, size_t n, bool special) {
    if (!(t->starts[(uint8_t)text[0]] & (special ? 1 : 2))) return NULL;
    for (int i = 0; i < t->n_added; i++) {
        const Piece* p = &t->pieces[t->added[i].id];
        if ((special || !t->added[i].special) && p->n <= n && !memcmp(t->bytes.data + p->at, text, p->n))
            return &t->added[i];
    }
    return NULL;
}

// appends the ids of n bytes of text. With special, special tokens in it are recognised; without, they are text like any
// other. No bos is added
static inline bool tokenizer_encode(Tokenizer* t, Tokens* out, const char* text, size_t n, bool special, Error* err) {
    size_t start = 0;
    if (n == 0) return true; // then there may be no text to point at
    for (size_t i = 0; i < n;) {
        const AddedToken* added = tokenizer_added_at(t, text + i, n - i, special);
        if (!added) {
            i++;
            continue;
        }
        if (!tokenizer_encode_plain(t, out, text + start, i - start, err)) return false;
        tokens_push(out, added->id);
        start = i += t->pieces[added->id].n;
    }
    return tokenizer_encode_plain(t, out, text + start, n - start, err);
}

// ---- Llama 3's chat --------------------------------------------------------------------------

// bytes of the white space character that text begins with, 0 when it is none: Unicode's and U+001C to U+001F, as the
// trim of a chat template has it
static inline size_t white_space_length(const char* text, size_t n) {
    const uint8_t* p = (const uint8_t*)text;
    if (n >= 1 && ((p[0] >= 9 && p[0] <= 13) || (p[0] >= 28 && p[0] <= 32))) return 1;
    if (n >= 2 && p[0] == 0xc2 && (p[1] == 0x85 || p[1] == 0xa0)) return 2;
    if (n < 3) return 0;
    uint32_t three = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 8 | p[2];
    bool space = three == 0xe19a80 || (three >= 0xe28080 && three <= 0xe2808a) || three == 0xe280a8 ||
                 three == 0xe280a9 || three == 0xe280af || three == 0xe2819f || three == 0xe38080;
    return space ? 3 : 0;
}

// appends <|start_header_id|>role<|end_header_id|> and two line ends: what an answer follows
static inline bool tokenizer_chat_header(Tokenizer* t, Tokens* out, const char* role, Error* err) {
    int32_t start = tokenizer_special(t, "<|start_header_id|>"), end = tokenizer_special(t, "<|end_header_id|>");
    if (start < 0 || end < 0 || tokenizer_special(t, "<|eot_id|>") < 0)
        return set_error(err,
                         "the tokenizer has no <|start_header_id|>, <|end_header_id|> and <|eot_id|>: it cannot chat");
    tokens_push(out, start);
    if (!tokenizer_encode(t, out, role, strlen(role), false, err)) return false;
    tokens_push(out, end);
    return tokenizer_encode(t, out, "\n\n", 2, false, err);
}

// appends a header, the text without the white space around it, and <|eot_id|>. Special tokens in the text stay text.
// The line ends are a piece of their own since no white space follows them
static inline bool tokenizer_chat_message(Tokenizer* t, Tokens* out, const char* role, const char* text, size_t n,
                                          Error* err) {
    size_t start = 0, end, space;
    while ((space = white_space_length(text + start, n - start))) start += space;
    end = start;
    for (size_t i = start; i < n;) {
        space = white_space_length(text + i, n - i);
        i += space ? space : 1;
        if (!space) end = i;
    }
    if (!tokenizer_chat_header(t, out, role, err) || !tokenizer_encode(t, out, text + start, end - start, false, err))
        return false;
    tokens_push(out, tokenizer_special(t, "<|eot_id|>"));
    return true;
}

// ---- decoding as it comes --------------------------------------------------------------------

// turns the bytes of tokens into valid UTF-8: a character is given out when it is whole, and what can become none is
// replaced by U+FFFD at once, as few as Unicode recommends. Begins as zeros
typedef struct {
    Text text; // given out
    uint8_t held[4];
    int n_held; // the beginning of a character
} Decoder;

static inline void decoder_free(Decoder* d) {
    text_free(&d->text);
    memset(d, 0, sizeof *d);
}

// whether the n bytes at p are the beginning, but not the whole, of some character
static inline bool utf8_begins(const uint8_t* p, int n) {
    for (int fill = 0x80; fill <= 0xbf; fill += 0x3f) {
        uint8_t whole[4] = { (uint8_t)fill, (uint8_t)fill, (uint8_t)fill, (uint8_t)fill };
        memcpy(whole, p, (size_t)n);
        if (utf8_length(whole, whole + 4) > n) return true;
    }
    return false;
}

// adds n bytes and returns those that are ready to print, *ready of them, valid until the next call
static inline const char* decoder_push(Decoder* d, const char* bytes, size_t n, size_t* ready) {
    d->text.n = 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t byte = (uint8_t)bytes[i];
        d->held[d->n_held++] = byte;
        if (utf8_length(d->held, d->held + d->n_held) == d->n_held) {
            text_add(&d->text, (const char*)d->held, (size_t)d->n_held);
            d->n_held = 0;
        } else if (!utf8_begins(d->held, d->n_held)) {
            text_add(&d->text, "\xef\xbf\xbd", 3);
            if (d->n_held > 1) i--; // the byte may begin a character of its own
            d->n_held = 0;
        }
    }
    *ready = d->text.n;
    return d->text.data;
}

// the end: a character that never became whole is replaced too
static inline const char* decoder_flush(Decoder* d, size_t* ready) {
    d->text.n = 0;
    if (d->n_held) text_add(&d->text, "\xef\xbf\xbd", 3);
    d->n_held = 0;
    *ready = d->text.n;
    return d->text.data;
}

// ---- writing ---------------------------------------------------------------------------------

static inline void text_string(Text* out, const char* s) { text_add(out, s, strlen(s)); }

// JSON with ' for ", which C spells more readably
static inline void text_json(Text* out, const char* json) {
    size_t start = out->n;
    text_string(out, json);
    for (size_t i = start; i < out->n; i++)
        if (out->data[i] == '\'') out->data[i] = '"';
}

static inline void text_whole(Text* out, int64_t x) {
    char digits[32];
    text_add(out, digits, (size_t)snprintf(digits, sizeof digits, "%lld", (long long)x));
}

// a JSON string of valid UTF-8
static inline void text_quote(Text* out, const char* s, size_t n) {
    char escape[8];
    text_add(out, "\"", 1);
    for (size_t i = 0; i < n; i++) {
        if ((uint8_t)s[i] < 0x20)
            text_add(out, escape, (size_t)snprintf(escape, sizeof escape, "\\u%04x", (unsigned)s[i]));
        else {
            if (s[i] == '"' || s[i] == '\\') text_add(out, "\\", 1);
            text_add(out, s + i, 1);
        }
    }
    text_add(out, "\"", 1);
}

static inline void text_line(Text* out, int depth) {
    text_add(out, "\n", 1);
    for (int i = 0; i < depth; i++) text_add(out, "  ", 2);
}

// appends a compact JSON text as HuggingFace lays it out: two spaces a level, one item a line
static inline void text_pretty(Text* out, const char* json, size_t n) {
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < n; i++) {
        char c = json[i];
        if (quoted) {
            text_add(out, json + i, c == '\\' ? 2 : 1);
            i += c == '\\';
            quoted = c != '"';
        } else if ((c == '{' || c == '[') && json[i + 1] == c + 2) {
            text_add(out, json + i++, 2); // empty: the closing bracket is two characters on in ASCII
        } else {
            if (c == '}' || c == ']') text_line(out, --depth);
            text_add(out, &c, 1);
            if (c == ':') text_add(out, " ", 1);
            if (c == '{' || c == '[') text_line(out, ++depth);
            if (c == ',') text_line(out, depth);
            quoted = c == '"';
        }
    }
}

static inline void text_quote_token(Text* out, const Tokenizer* t, int32_t id) {
    size_t n;
    const char* piece = tokenizer_piece(t, id, &n);
    text_quote(out, piece, n);
}

// a token, or a pair of them, as the vocabulary spells it; right -1: none
static inline void text_quote_spelled(Text* out, const Tokenizer* t, int32_t left, int32_t right) {
    Text spelled = { NULL, 0, 0 };
    size_t n;
    const char* piece = tokenizer_piece(t, left, &n);
    spell_bytes(&spelled, piece, n);
    if (right >= 0) {
        piece = tokenizer_piece(t, right, &n);
        text_add(&spelled, " ", 1);
        spell_bytes(&spelled, piece, n);
    }
    text_quote(out, spelled.data, spelled.n);
    text_free(&spelled);
}

// the post-processor, which puts bos before a text, as Llama 3's file has it
static inline void tokenizer_write_bos(Text* out, const Tokenizer* t) {
    const char* const sequences[] = { "{'Sequence':{'id':'A','type_id':0}}", "{'Sequence':{'id':'B','type_id':1}}" };
    text_json(out, "'post_processor':{'type':'Sequence','processors':[{'type':'ByteLevel','add_prefix_space':true,"
                   "'trim_offsets':false,'use_regex':true},{'type':'TemplateProcessing'");
    for (int pair = 0; pair < 2; pair++) {
        text_json(out, pair ? "],'pair':[" : ",'single':[");
        for (int i = 0; i <= pair; i++) {
            text_json(out, i ? ",{'SpecialToken':{'id':" : "{'SpecialToken':{'id':");
            text_quote_token(out, t, t->bos);
            text_json(out, i ? ",'type_id':1}}," : ",'type_id':0}},");
            text_json(out, sequences[i]);
        }
    }
    text_json(out, "],'special_tokens':{");
    text_quote_token(out, t, t->bos);
    text_json(out, ":{'id':");
    text_quote_token(out, t, t->bos);
    text_json(out, ",'ids':[");
    text_whole(out, t->bos);
    text_json(out, "],'tokens':[");
    text_quote_token(out, t, t->bos);
    text_json(out, "]}}}]}");
}

// the tokenizer.json of bytes or of a tokenizer.model, compact. All added tokens are special, and bos is one of them
static inline void tokenizer_write_json(Text* out, const Tokenizer* t) {
    static const char split[] = LLAMA3_SPLIT("\\s", "\\S");
    bool* is_added = (bool*)allocate((size_t)t->V, sizeof *is_added);
    for (int i = 0; i < t->n_added; i++) is_added[t->added[i].id] = true;
    text_json(out, "{'version':'1.0','truncation':null,'padding':null,'added_tokens':[");
    const char* comma = "";
    for (int32_t id = 0; id < t->V; id++) {
        if (!is_added[id]) continue;
        text_string(out, comma), comma = ",";
        text_json(out, "{'id':");
        text_whole(out, id);
        text_json(out, ",'content':");
        text_quote_token(out, t, id);
        text_json(out, ",'single_word':false,'lstrip':false,'rstrip':false,'normalized':false,'special':true}");
    }
    text_json(out, "],'normalizer':null,'pre_tokenizer':{'type':'Sequence','pretokenizers':[{'type':'Split',"
                   "'pattern':{'Regex':");
    text_quote(out, split, sizeof split - 1);
    text_json(out, "},'behavior':'Isolated','invert':false},{'type':'ByteLevel','add_prefix_space':false,"
                   "'trim_offsets':true,'use_regex':false}]},");
    tokenizer_write_bos(out, t);
    text_json(out, ",'decoder':{'type':'ByteLevel','add_prefix_space':true,'trim_offsets':true,'use_regex':true},"
                   "'model':{'type':'BPE','dropout':null,'unk_token':null,'continuing_subword_prefix':null,"
                   "'end_of_word_suffix':null,'fuse_unk':false,'byte_fallback':false,'ignore_merges':");
    text_string(out, t->ignore_merges ? "true" : "false");
    text_json(out, ",'vocab':{");
    comma = "";
    for (int32_t id = 0; id < t->V; id++) {
        if (is_added[id]) continue;
        text_string(out, comma), comma = ",";
        text_quote_spelled(out, t, id, -1);
        text_string(out, ":");
        text_whole(out, id);
    }
    text_json(out, "},'merges':[");
    for (size_t i = 0; i < t->n_merges; i++) {
        if (i) text_string(out, ",");
        text_quote_spelled(out, t, t->merges[i].left, t->merges[i].right);
    }
    text_json(out, "]}}");
    free(is_added);
}

static inline void tokenizer_write_config(Text* out, const Tokenizer* t) {
    static const char chat_template[] = LLAMA3_CHAT_TEMPLATE;
    text_json(out, "{");
    if (t->bos >= 0) text_json(out, "'bos_token':"), text_quote_token(out, t, t->bos), text_json(out, ",");
    if (tokenizer_special(t, "<|start_header_id|>") >= 0) {
        text_json(out, "'chat_template':");
        text_quote(out, chat_template, sizeof chat_template - 1);
        text_json(out, ",");
    }
    text_json(out, "'clean_up_tokenization_spaces':false,");
    if (t->eos >= 0) text_json(out, "'eos_token':"), text_quote_token(out, t, t->eos), text_json(out, ",");
    text_json(out, "'model_input_names':['input_ids','attention_mask'],'tokenizer_class':'PreTrainedTokenizerFast'}");
}

// writes pretty JSON to folder/name
static inline bool tokenizer_write_pretty(const char* folder, const char* name, const Text* json, Error* err) {
    char path[PATH_SIZE];
    Text pretty = { NULL, 0, 0 };
    text_pretty(&pretty, json->data, json->n);
    bool ok = path_join(path, folder, name, err) && write_file(path, pretty.data, pretty.n, err);
    text_free(&pretty);
    return ok;
}

// writes tokenizer.json (the bytes it was read from, if it was) and tokenizer_config.json, which transformers loads
static inline bool tokenizer_write(const Tokenizer* t, const char* folder, Error* err) {
    char path[PATH_SIZE];
    Text json = { NULL, 0, 0 }, config = { NULL, 0, 0 };
    bool ok;
    if (t->source.n) {
        ok = path_join(path, folder, "tokenizer.json", err) && write_file(path, t->source.data, t->source.n, err);
    } else {
        tokenizer_write_json(&json, t);
        ok = tokenizer_write_pretty(folder, "tokenizer.json", &json, err);
    }
    tokenizer_write_config(&config, t);
    ok = ok && tokenizer_write_pretty(folder, "tokenizer_config.json", &config, err);
    text_free(&json), text_free(&config);
    return ok;
}
