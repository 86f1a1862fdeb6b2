/*
Writing text: the commands generate and chat, and the samples during training.

A Generation feeds the tokens that the model has not seen yet, samples the next, and prints it; a prompt goes through as a
batch, each further token alone, over the keys and values kept in a Sequence.
Proved by       dev/test/test_cli.c, test_model.c (through the cache as without it), dev/reference/parity.py (greedy ids)
*/
#pragma once

#include "log.h"
#include "run.h"
#include "sampler.h"

typedef struct {
    const Model* m;
    Config c;               // the model's
    Tokenizer* t;           // NULL: nothing is printed
    Sequence* s;            // the ids that have been through the model
    int capacity;           // its room
    Tokens ids;             // those, and the ones that have not been
    SamplerOptions sampler;
    uint64_t seed;
    bool ignore_eos;
    float* logits;          // (V)
    Candidate* scratch;     // (V)
    double prefill_s, decode_s;
    int prefilled, decoded; // tokens
} Generation;

static inline Generation generation_make(const Model* m, Tokenizer* t, int capacity, const Options* o) {
    Generation g;
    memset(&g, 0, sizeof g);
    g.m = m;
    g.c = *model_config(m);
    g.t = t;
    g.s = sequence_make(m, capacity);
    g.capacity = capacity;
    g.sampler.temperature = (float)o->temperature;
    g.sampler.top_k = (int)o->top_k;
    g.sampler.top_p = (float)o->top_p;
    g.sampler.min_p = (float)o->min_p;
    g.seed = (uint64_t)o->seed;
    g.ignore_eos = o->ignore_eos;
    g.logits = (float*)allocate((size_t)g.c.V, sizeof *g.logits);
    g.scratch = (Candidate*)allocate((size_t)g.c.V, sizeof *g.scratch);
    return g;
}

static inline void generation_free(Generation* g) {
    sequence_free(g->s);
    tokens_free(&g->ids);
    free(g->logits), free(g->scratch);
}

static inline bool is_end(const Config* c, int32_t id) {
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos[i] == id) return true;
    return false;
}

// the next token, appended to g->ids; -1 when the logits are not numbers
static inline int32_t generate_token(Generation* g) {
    double start = now();
    int fed = sequence_length(g->s), n = (int)g->ids.n - fed;
    sequence_feed(g->s, g->ids.ids + fed, n, g->logits);
    int32_t id = sample(g->logits, g->c.V, &g->sampler, g->seed, g->ids.n, g->scratch);
    if (id >= 0) tokens_push(&g->ids, id);
    if (n > 1) g->prefill_s += now() - start, g->prefilled += n;
    else g->decode_s += now() - start, g->decoded++;
    return id;
}

// up to n new tokens, printed to file as they come; an end token ends the text and is not printed. False when the weights
// hold NaN
static inline bool generate_text(Generation* g, int64_t n, FILE* file) {
    Decoder decoder;
    size_t n_piece, ready;
    memset(&decoder, 0, sizeof decoder);
    for (int64_t i = 0; i < n && (int)g->ids.n < g->capacity; i++) {
        int32_t id = generate_token(g);
        if (id < 0) return false;
        if (is_end(&g->c, id) && !g->ignore_eos) break;
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

// ---- generate --------------------------------------------------------------------------------

// "1 2 3", with spaces or commas between
static inline void parse_ids(Tokens* ids, const char* text, int V) {
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

static inline void print_pieces(const Tokenizer* t, const Tokens* ids, size_t from) {
    for (size_t i = from, n; i < ids->n; i++) {
        const char* piece = tokenizer_piece(t, ids->ids[i], &n);
        if (piece) fwrite(piece, 1, n, stdout);
    }
}

static inline void print_ids(const Tokens* ids) {
    for (size_t i = 0; i < ids->n; i++) printf("%s%d", i ? " " : "", ids->ids[i]);
    printf("\n");
}

// the tokens to go on from, --ids or text behind bos
static inline Tokens read_prompt(Run* r) {
    Error err;
    Tokens ids = { NULL, 0, 0 };
    char* text = NULL;
    size_t n = r->o.prompt ? strlen(r->o.prompt) : 0;
    if (!!r->o.prompt + !!r->o.prompt_file + !!r->o.ids > 1) die("--prompt, --prompt-file and --ids: one of them at a time");
    if (r->o.ids) {
        parse_ids(&ids, r->o.ids, r->c.V);
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

static inline void print_speed(const Generation* g) {
    if (g->prefilled) fprintf(stderr, "prompt %d tokens, %.0f tok/s", g->prefilled, g->prefilled / g->prefill_s);
    if (g->decoded)
        fprintf(stderr, "%swrote %d tokens, %.1f tok/s, %.2f GB/s of weights", g->prefilled ? "; " : "", g->decoded,
                g->decoded / g->decode_s, g->decoded / g->decode_s * model_weight_bytes(g->m) * 1e-9);
    fprintf(stderr, "\n");
}

static inline void command_generate(Run* r) {
    open_model(r);
    Tokens prompt = read_prompt(r);
    int64_t room = r->c.context - (int64_t)prompt.n, n = r->o.tokens;
    if (room < 1) die("the prompt has %zu tokens, but the model's context is %d", prompt.n, r->c.context);
    if (n > room) fprintf(stderr, "warning: %lld new tokens at most, for the model's context is %d\n", (long long)room, r->c.context);
    n = n < room ? n : room;
    Generation g = generation_make(r->m, r->has_tokenizer && !r->o.print_ids ? &r->t : NULL, (int)((int64_t)prompt.n + n), &r->o);
    g.ids = prompt;
    if (g.t) print_pieces(&r->t, &prompt, prompt.ids[0] == r->t.bos ? 1 : 0);
    if (!generate_text(&g, n, stdout)) die_not_finite(r, "the logits are");
    if (r->o.print_ids || !r->has_tokenizer) print_ids(&g.ids);
    else printf("\n");
    print_speed(&g);
    generation_free(&g);
}

// the user's turn and the beginning of the answer, behind what was said so far
static inline void chat_turn(Generation* g, const char* line, size_t n) {
    Error err;
    if (!g->ids.n && g->t->bos >= 0) tokens_push(&g->ids, g->t->bos);
    must(tokenizer_chat_message(g->t, &g->ids, "user", line, n, &err) && tokenizer_chat_header(g->t, &g->ids, "assistant", &err), &err);
}

static inline void command_chat(Run* r) {
    char* line = NULL;
    size_t size = 0;
    ssize_t n;
    bool terminal = isatty(STDIN_FILENO);
    open_model(r);
    Tokenizer* t = need_tokenizer(r, "chat");
    int32_t turn = tokenizer_special(t, "<|eot_id|>");
    int capacity = r->c.context < 8192 ? r->c.context : 8192;
    Generation g = generation_make(r->m, t, capacity, &r->o);
    if (turn >= 0 && !is_end(&g.c, turn) && g.c.n_eos < MAX_EOS) g.c.eos[g.c.n_eos++] = turn; // an answer ends with its turn
    while ((terminal ? fputs("> ", stderr) : 0, n = getline(&line, &size, stdin)) >= 0) {
        if (n && line[n - 1] == '\n') n--;
        if (!n) continue;
        chat_turn(&g, line, (size_t)n);
        if ((int)g.ids.n >= capacity) { // forget what was said before
            fprintf(stderr, "the conversation is longer than %d tokens; a new one begins\n", capacity);
            g.ids.n = 0;
            sequence_clear(g.s);
            chat_turn(&g, line, (size_t)n);
        }
        if ((int)g.ids.n >= capacity) die("a message of %zu tokens, but there is room for %d", g.ids.n, capacity);
        if (!generate_text(&g, r->o.tokens, stdout)) die_not_finite(r, "the logits are");
        if (!is_end(&g.c, g.ids.ids[g.ids.n - 1])) tokens_push(&g.ids, turn);
        printf("\n");
        fflush(stdout);
    }
    if (terminal) print_speed(&g);
    free(line);
    generation_free(&g);
}
