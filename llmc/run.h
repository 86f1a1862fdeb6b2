/*
What a command works on: its options, a model, a tokenizer. Here they are found and opened; a mistake of the user's ends the
program with one line.
*/
#pragma once

#include "checkpoint.h"
#include "error.h"
#include "file.h"
#include "model.h"
#include "options.h"
#include "tokenizer.h"

typedef struct {
    const char* program;      // for messages: llama3 or train_llama3cu
    Options o;
    Model* m;
    Config c;                 // of the model
    Tokenizer t;
    bool has_tokenizer;       // false: token ids only
    char folder[PATH_SIZE];   // the model's; empty for a preset
} Run;

// ends the program with the line in err unless ok
static inline void must(bool ok, const Error* err) {
    if (!ok) die("%s", err->text);
}

// finds out which folder --model means
static inline void find_folder(Run* r) {
    Error err;
    Config preset;
    if (!r->o.model) die("--model is needed: a model folder, or the folder of a run");
    if (config_preset(&preset, r->o.model) && !is_folder(r->o.model))
        die("%s is a preset, which has no weights before %s train --model %s", r->o.model, r->program, r->o.model);
    must(checkpoint_resolve(r->o.model, r->folder, sizeof r->folder, &err), &err);
}

// opens --tokenizer, or the one in the model's folder; a resumed run's folder has its own
static inline void find_tokenizer(Run* r) {
    Error err;
    const char* path = r->o.resume && !option_given(&r->o, "tokenizer") ? NULL : r->o.tokenizer;
    if (!path && (folder_has(r->folder, "tokenizer.json") || folder_has(r->folder, "tokenizer.model"))) path = r->folder;
    r->has_tokenizer = path != NULL;
    if (path) must(tokenizer_open(&r->t, path, &err), &err);
}

static inline void check_vocabulary(const Run* r) {
    if (r->has_tokenizer && r->t.V > r->c.V)
        die("the tokenizer has token %d, but the model's vocabulary ends at %d", r->t.V - 1, r->c.V - 1);
}

// takes the model that was made or read; err says why there is none
static inline void take_model(Run* r, Model* m, const Error* err) {
    must(m != NULL, err);
    r->m = m;
    r->c = *model_config(m);
    check_vocabulary(r);
}

// --model, to be run
static inline void open_model(Run* r) {
    Error err;
    find_folder(r);
    find_tokenizer(r);
    take_model(r, model_open(r->folder, &err), &err);
}

// the tokenizer, or an error that says what it is needed for
static inline Tokenizer* need_tokenizer(Run* r, const char* what) {
    if (!r->has_tokenizer)
        die("%s has no tokenizer.json or tokenizer.model, which %s needs: give --tokenizer", r->folder, what);
    return &r->t;
}

// --tokenizer, or bytes
static inline void open_tokenizer(Run* r) {
    Error err;
    r->has_tokenizer = true;
    if (r->o.tokenizer) must(tokenizer_open(&r->t, r->o.tokenizer, &err), &err);
    else tokenizer_bytes(&r->t);
}

// a preset's shape; the tokenizer decides V where the preset leaves it open, and the tokens that begin and end a text.
// False when there is no preset of that name
static inline bool open_preset(Run* r) {
    if (!config_preset(&r->c, r->o.model)) return false;
    open_tokenizer(r);
    int32_t turn = tokenizer_special(&r->t, "<|eot_id|>");
    if (!r->c.V) r->c.V = r->t.V;
    r->c.bos = r->t.bos;
    r->c.n_eos = 0;
    if (r->t.eos >= 0) r->c.eos[r->c.n_eos++] = r->t.eos;
    if (turn >= 0) r->c.eos[r->c.n_eos++] = turn;
    return true;
}

// the reason why a loss or logits are no numbers
static inline void die_not_finite(const Run* r, const char* what) {
    Error err;
    if (model_is_finite(r->m, &err)) set_error(&err, "no weight or gradient is NaN, but they overflow");
    die("%s not finite: %s", what, err.text);
}

static inline void run_free(Run* r) {
    if (r->m) model_free(r->m);
    tokenizer_close(&r->t);
}
