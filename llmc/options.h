/*
The command line: one table row per option. Parser, --help, the banner, state.json and --resume all read that row.

    llama3 COMMAND [--option value …]          --option=value is the same; a flag takes no value

To add an option: one field of Options, its default in options_default, one row of the table.
Proved by       dev/test/test_cli.c
*/
#pragma once

#include <cjson/cJSON.h>
#include <assert.h>
#include <math.h>

#include "error.h"

// ---- commands --------------------------------------------------------------------------------

enum { TRAIN = 1, GENERATE = 2, CHAT = 4, EVAL = 8, TOKENIZE = 16, DETOKENIZE = 32, INFO = 64 };

typedef struct {
    unsigned bit;
    const char *name, *what;
} Command;

// clang-format off
static const Command commands[] = {
    { TRAIN,      "train",      "train a model from random weights, or go on with one" },
    { GENERATE,   "generate",   "write on from a prompt" },
    { CHAT,       "chat",       "talk with an instruction-tuned model" },
    { EVAL,       "eval",       "mean loss and perplexity over a text, or accuracy on HellaSwag" },
    { TOKENIZE,   "tokenize",   "text to token ids" },
    { DETOKENIZE, "detokenize", "token ids to text" },
    { INFO,       "info",       "a model's shape, parameters, bytes and FLOPs" },
};
// clang-format on
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static inline const Command* command_find(const char* name) {
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
    return NULL;
}

// ---- options ---------------------------------------------------------------------------------

enum { MAX_OPTIONS = 64 };

typedef struct {
    const char *model, *data, *val, *tokenizer, *out, *schedule, *dtype, *prompt, *prompt_file, *ids, *hellaswag;
    int64_t batch, seq, total_batch, steps, warmup, seed, eval_every, eval_steps, sample_every, checkpoint_every, keep;
    int64_t tokens, top_k;
    double lr, lr_final, weight_decay, beta1, beta2, clip, skip_outliers, temperature, top_p, min_p;
    bool resume, print_ids, ignore_eos, bos, special;
#ifdef __CUDACC__ // of train_llama3cu alone
    const char *attention, *recompute, *moments, *master;
    bool fast_attention, timing;
#endif
    bool given[MAX_OPTIONS]; // by row: set on the command line
} Options;

static inline Options options_default(void) {
    Options o;
    memset(&o, 0, sizeof o);
    o.out = "out", o.schedule = "cosine", o.dtype = "F32";
    o.batch = 8, o.steps = 1000, o.warmup = 100, o.seed = 1;
    o.eval_every = 100, o.eval_steps = 20, o.sample_every = 500, o.checkpoint_every = 500, o.keep = 3;
    o.tokens = 256;
    o.lr_final = 0.1, o.weight_decay = 0.1, o.beta1 = 0.9, o.beta2 = 0.95, o.clip = 1;
    o.temperature = 0.8, o.top_p = 0.95;
#ifdef __CUDACC__
    o.attention = "auto", o.recompute = "none", o.moments = "fp32", o.master = "fp32";
#endif
    return o;
}

typedef enum { OPTION_TEXT, OPTION_CHOICE, OPTION_WHOLE, OPTION_REAL, OPTION_FLAG } OptionType;

typedef struct {
    const char* name;
    OptionType type;
    size_t field;         // offset in Options
    unsigned commands;    // that take it
    double min, max;      // of numbers
    const char* value;    // what the value is called in --help; for a choice, its words: "a|b|c"
    const char* help;
} Option;

#define FIELD(name) offsetof(Options, name)
// clang-format off
static const Option option_table[] = {
//    name               type           field                    commands                  min  max   value   help
    { "model",           OPTION_TEXT,   FIELD(model),            TRAIN|GENERATE|CHAT|EVAL|INFO, 0, 0, "DIR",  "model folder, a run's folder (its newest step), or for train and info a preset" },
    { "data",            OPTION_TEXT,   FIELD(data),             TRAIN|EVAL|TOKENIZE,      0, 0,      "PATH", "text, .jsonl of documents or chats, or .bin token files; a quoted glob takes several" },
    { "val",             OPTION_TEXT,   FIELD(val),              TRAIN,                    0, 0,      "PATH", "validation data (without it, the last 5% of --data)" },
    { "tokenizer",       OPTION_TEXT,   FIELD(tokenizer),        TRAIN|GENERATE|CHAT|EVAL|TOKENIZE|DETOKENIZE, 0, 0, "PATH", "tokenizer.json, tokenizer.model or their folder (default: the model folder's; bytes for a preset)" },
    { "out",             OPTION_TEXT,   FIELD(out),              TRAIN|TOKENIZE,           0, 0,      "PATH", "where the result goes: a run's folder, or the .bin file of tokenize" },
    { "resume",          OPTION_FLAG,   FIELD(resume),           TRAIN,                    0, 0,      "",     "go on from the newest step in --out, with its options" },
    { "batch",           OPTION_WHOLE,  FIELD(batch),            TRAIN|EVAL,               1, 65536,  "B",    "sequences computed at a time" },
    { "seq",             OPTION_WHOLE,  FIELD(seq),              TRAIN|EVAL,               0, 1<<24,  "T",    "tokens of a sequence (0: 256, or the model's context when that is shorter)" },
    { "total-batch",     OPTION_WHOLE,  FIELD(total_batch),      TRAIN,                    0, 1e12,   "TOKENS", "tokens of a step, a multiple of B*T: gradients accumulate (0: B*T)" },
    { "steps",           OPTION_WHOLE,  FIELD(steps),            TRAIN,                    0, 1e12,   "N",    "steps of the whole run (0: initialise, save and stop)" },
    { "lr",              OPTION_REAL,   FIELD(lr),               TRAIN,                    0, 1e3,    "X",    "learning rate (0: 0.5/C, a tenth of that for a model from a folder)" },
    { "warmup",          OPTION_WHOLE,  FIELD(warmup),           TRAIN,                    0, 1e12,   "N",    "steps over which the learning rate rises" },
    { "schedule",        OPTION_CHOICE, FIELD(schedule),         TRAIN,                    0, 0,      "cosine|linear|constant|wsd", "learning rate after the warm-up" },
    { "lr-final",        OPTION_REAL,   FIELD(lr_final),         TRAIN,                    0, 1,      "FRACTION", "of the learning rate, reached at the last step" },
    { "weight-decay",    OPTION_REAL,   FIELD(weight_decay),     TRAIN,                    0, 1e3,    "X",    "decoupled, on matrices only" },
    { "beta1",           OPTION_REAL,   FIELD(beta1),            TRAIN,                    0, 0.999999,"X",   "AdamW's first decay" },
    { "beta2",           OPTION_REAL,   FIELD(beta2),            TRAIN,                    0, 0.999999,"X",   "AdamW's second decay" },
    { "clip",            OPTION_REAL,   FIELD(clip),             TRAIN,                    0, 1e30,   "X",    "largest gradient norm (0: no clipping)" },
    { "skip-outliers",   OPTION_REAL,   FIELD(skip_outliers),    TRAIN,                    0, 1e6,    "Z",    "no update from a step whose loss or gradient norm lies more than Z deviations above the last 128 steps' mean (0: all update)" },
    { "dtype",           OPTION_CHOICE, FIELD(dtype),            TRAIN,                    0, 0,      "F32|BF16", "type of the saved weights" },
    { "eval-every",      OPTION_WHOLE,  FIELD(eval_every),       TRAIN,                    0, 1e12,   "N",    "steps between validations (0: none)" },
    { "eval-steps",      OPTION_WHOLE,  FIELD(eval_steps),       TRAIN,                    1, 1e12,   "N",    "batches of a validation" },
    { "sample-every",    OPTION_WHOLE,  FIELD(sample_every),     TRAIN,                    0, 1e12,   "N",    "steps between samples (0: none)" },
    { "checkpoint-every",OPTION_WHOLE,  FIELD(checkpoint_every), TRAIN,                    0, 1e12,   "N",    "steps between checkpoints; the last step has one too (0: none at all)" },
    { "keep",            OPTION_WHOLE,  FIELD(keep),             TRAIN,                    0, 1e9,    "N",    "checkpoints to keep (0: all)" },
    { "prompt",          OPTION_TEXT,   FIELD(prompt),           GENERATE,                 0, 0,      "TEXT", "what to go on from" },
    { "prompt-file",     OPTION_TEXT,   FIELD(prompt_file),      GENERATE,                 0, 0,      "FILE", "the prompt, from a file" },
    { "ids",             OPTION_TEXT,   FIELD(ids),              GENERATE|DETOKENIZE,      0, 0,      "\"1 2 3\"", "token ids, in place of text" },
    { "tokens",          OPTION_WHOLE,  FIELD(tokens),           GENERATE|CHAT,            0, 1<<24,  "N",    "most new tokens to write (chat: in one answer)" },
    { "temperature",     OPTION_REAL,   FIELD(temperature),      GENERATE|CHAT,            0, 1e6,    "X",    "0: always the likeliest token" },
    { "top-k",           OPTION_WHOLE,  FIELD(top_k),            GENERATE|CHAT,            0, 1e9,    "N",    "sample among the N likeliest (0: all)" },
    { "top-p",           OPTION_REAL,   FIELD(top_p),            GENERATE|CHAT,            0, 1,      "X",    "sample among the likeliest that add up to X (1: all)" },
    { "min-p",           OPTION_REAL,   FIELD(min_p),            GENERATE|CHAT,            0, 1,      "X",    "drop what is less likely than X times the likeliest (0: none)" },
    { "print-ids",       OPTION_FLAG,   FIELD(print_ids),        GENERATE|TOKENIZE,        0, 0,      "",     "write token ids, prompt included, instead of text" },
    { "ignore-eos",      OPTION_FLAG,   FIELD(ignore_eos),       GENERATE,                 0, 0,      "",     "go on after an end token" },
    { "hellaswag",       OPTION_TEXT,   FIELD(hellaswag),        EVAL,                     0, 0,      "FILE", "score the multiple-choice set instead: six lines a task" },
    { "bos",             OPTION_FLAG,   FIELD(bos),              TOKENIZE,                 0, 0,      "",     "begin with the begin-of-text token" },
    { "special",         OPTION_FLAG,   FIELD(special),          TOKENIZE,                 0, 0,      "",     "special tokens in the text are recognised, not spelled out" },
#ifdef __CUDACC__
    { "attention",       OPTION_CHOICE, FIELD(attention),        TRAIN|EVAL,               0, 0,      "auto|cudnn|flash|hopper|mma|reference", "who computes attention; auto: the fastest, flash: our own, hopper or mma" },
    { "fast-attention",  OPTION_FLAG,   FIELD(fast_attention),   TRAIN,                    0, 0,      "",     "attention's backward pass adds up dq in any order: faster, other bits at each run" },
    { "recompute",       OPTION_CHOICE, FIELD(recompute),        TRAIN,                    0, 0,      "none|norms|ffn|block", "what the backward pass computes again, to keep less" },
    { "moments",         OPTION_CHOICE, FIELD(moments),          TRAIN,                    0, 0,      "fp32|bf16", "type of AdamW's moments" },
    { "master",          OPTION_CHOICE, FIELD(master),           TRAIN,                    0, 0,      "fp32|none", "what updates go to: fp32 master weights, or the bf16 weights, rounded at random" },
    { "timing",          OPTION_FLAG,   FIELD(timing),           TRAIN,                    0, 0,      "",     "at the end, a table of where a step's time went" },
#endif
    { "seed",            OPTION_WHOLE,  FIELD(seed),             TRAIN|GENERATE|CHAT,      0, 1e15,   "N",    "of everything random" },
};
// clang-format on
#undef FIELD
enum { N_OPTIONS = sizeof option_table / sizeof option_table[0] };

static inline const void* option_field(const Options* o, const Option* row) { return (const char*)o + row->field; }

static inline bool option_given(const Options* o, const char* name) {
    for (int r = 0; r < N_OPTIONS; r++)
        if (strcmp(option_table[r].name, name) == 0) return o->given[r];
    return false;
}

// the value as text, as --help and the banner show it; valid until the next call
static inline const char* option_text(const Options* o, const Option* row) {
    static char text[64];
    const void* field = option_field(o, row);
    if (row->type == OPTION_TEXT || row->type == OPTION_CHOICE)
        return *(const char* const*)field ? *(const char* const*)field : "";
    if (row->type == OPTION_WHOLE) snprintf(text, sizeof text, "%lld", (long long)*(const int64_t*)field);
    else if (row->type == OPTION_REAL) {
        double x = *(const double*)field;
        snprintf(text, sizeof text, "%.15g", x);
        if (strtod(text, NULL) != x) snprintf(text, sizeof text, "%.17g", x);
    }
    else snprintf(text, sizeof text, "%s", *(const bool*)field ? "true" : "false");
    return text;
}

static inline bool option_is_word(const char* value, const char* words) {
    size_t n = strlen(value);
    for (const char* word = words; word && *word;) {
        const char* end = strchr(word, '|');
        size_t length = end ? (size_t)(end - word) : strlen(word);
        if (length == n && memcmp(word, value, n) == 0) return true;
        word = end ? end + 1 : NULL;
    }
    return false;
}

// sets one option from text; value is kept by pointer where the option is text
static inline bool option_set(Options* o, const Option* row, const char* value, Error* err) {
    void* field = (char*)o + row->field;
    char* end = NULL;
    if (row->type == OPTION_FLAG) {
        *(bool*)field = strcmp(value, "true") == 0;
    } else if (row->type == OPTION_TEXT) {
        *(const char**)field = value;
    } else if (row->type == OPTION_CHOICE) {
        if (!option_is_word(value, row->value))
            return set_error(err, "--%s %s: expected one of %s", row->name, value, row->value);
        *(const char**)field = value;
    } else {
        double x = strtod(value, &end);
        if (end == value || *end || !isfinite(x) || strpbrk(value, "xX"))
            return set_error(err, "--%s %s: expected a number", row->name, value);
        if (row->type == OPTION_WHOLE && x != floor(x))
            return set_error(err, "--%s %s: expected a whole number", row->name, value);
        if (x < row->min || x > row->max)
            return set_error(err, "--%s %s: expected a number from %g to %g", row->name, value, row->min, row->max);
        if (row->type == OPTION_WHOLE) *(int64_t*)field = (int64_t)x;
        else *(double*)field = x;
    }
    return true;
}

// reads argv[0 .. argc), the words after the command; o keeps pointers into argv
static inline bool options_parse(Options* o, const Command* command, int argc, char** argv, Error* err) {
    static_assert(sizeof option_table / sizeof option_table[0] <= MAX_OPTIONS, "Options.given has room for every row");
    for (int i = 0; i < argc; i++) {
        const char *word = argv[i], *value = strchr(word, '=');
        if (strncmp(word, "--", 2) != 0)
            return set_error(err, "'%s' is not an option: options begin with --; see llama3 %s --help", word, command->name);
        size_t length = value ? (size_t)(value - word - 2) : strlen(word) - 2;
        const Option* row = NULL;
        for (int r = 0; r < N_OPTIONS; r++)
            if (strlen(option_table[r].name) == length && memcmp(option_table[r].name, word + 2, length) == 0)
                row = &option_table[r];
        if (!row || !(row->commands & command->bit))
            return set_error(err, "%s has no option '%.*s'; see llama3 %s --help", command->name, (int)length + 2, word,
                             command->name);
        if (row->type == OPTION_FLAG) {
            if (value) return set_error(err, "--%s takes no value", row->name);
            value = "true";
        } else if (value) {
            value++;
        } else if (i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0) {
            value = argv[++i];
        } else {
            return set_error(err, "--%s needs a value: --%s %s", row->name, row->name, row->value);
        }
        if (!option_set(o, row, value, err)) return false;
        o->given[row - option_table] = true;
    }
    return true;
}

static inline void options_help(const char* program, const Command* command) {
    Options defaults = options_default();
    printf("%s %s: %s\n\n", program, command->name, command->what);
    for (int r = 0; r < N_OPTIONS; r++) {
        const Option* row = &option_table[r];
        if (!(row->commands & command->bit)) continue;
        char left[80];
        snprintf(left, sizeof left, "--%s %s", row->name, row->value);
        printf("  %-38s %s", left, row->help);
        const char* value = option_text(&defaults, row);
        bool of_train = strcmp(row->name, "out") == 0 && command->bit != TRAIN; // "out" is train's default folder
        if (row->type != OPTION_FLAG && *value && !of_train) printf("  [%s]", value);
        printf("\n");
    }
}

// ---- options of a run, kept in state.json ----------------------------------------------------

// an object with every option that train takes, but those of one call: where the run lies, whether it goes on, what it reports
static inline bool option_is_kept(const Option* row) {
    return (row->commands & TRAIN) && !option_is_word(row->name, "out|resume|timing");
}

static inline cJSON* options_to_json(const Options* o) {
    cJSON* object = cJSON_CreateObject();
    for (int r = 0; r < N_OPTIONS; r++)
        if (option_is_kept(&option_table[r]) && *option_text(o, &option_table[r]))
            cJSON_AddStringToObject(object, option_table[r].name, option_text(o, &option_table[r]));
    return object;
}

// fills in what was not given on the command line; where it was given and differs, says so on stderr. o keeps pointers
// into the object
static inline bool options_from_json(Options* o, const cJSON* object, Error* err) {
    const cJSON* item;
    cJSON_ArrayForEach(item, object) {
        for (int r = 0; r < N_OPTIONS; r++) {
            const Option* row = &option_table[r];
            if (strcmp(row->name, item->string) != 0 || !option_is_kept(row)) continue;
            if (!cJSON_IsString(item)) return set_error(err, "state.json: option %s is not a string", row->name);
            if (!o->given[r]) {
                if (!option_set(o, row, item->valuestring, err)) return false;
            } else if (strcmp(option_text(o, row), item->valuestring) != 0) {
                fprintf(stderr, "warning: --%s is %s now, the run had %s\n", row->name, option_text(o, row), item->valuestring);
            }
        }
    }
    return true;
}
