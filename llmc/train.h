/*
Training: where a run starts, its steps, what it writes.

    OUT/log.jsonl               every step's loss, and the validations
    OUT/step-00000100/          a model folder that transformers loads as it is, with optimizer.safetensors (AdamW's moments,
                                and master weights when those of the folder are rounded) and state.json

A resumed run equals an uninterrupted one to the bit: random numbers are counted, so seed, step and place in the data are all
there is to remember. Validation and samples have their own random numbers and change nothing.
Proved by       dev/test/test_runs.c: resume, kills, signals, accumulation
*/
#pragma once

#include <signal.h>

#include "corpus.h"
#include "evaluate.h"
#include "generate.h"
#include "json.h"
#include "params.h"
#include "schedule.h"

typedef struct {
    Run* run;
    char out[PATH_SIZE];      // this run's folder
    Data train, val;
    Batch step_batch;         // (rows, T): what a step reads, the batches of B that accumulate one after the other
    Batch val_batch;          // (B, T)
    int B, T;
    int64_t rows;             // sequences of a step, a multiple of B
    int64_t step, saved;      // steps done; the step of the newest checkpoint, -1: none
    int64_t tokens;           // of the training data of the run that is resumed
    uint64_t position;        // sequences drawn from the training data so far
    double best;              // lowest validation loss
    cJSON* state;             // of the run that is resumed: options point into it
    double start, show;       // seconds: when the loop began; after how many of them the next step is shown
    Log log;
} Training;

// what a signal asked for; the loop looks at it between steps
static volatile sig_atomic_t interrupted = 0;

static inline void on_signal(int number) {
    interrupted = number;
    signal(number, SIG_DFL); // a second one ends the program at once
}

// ---- checkpoints -----------------------------------------------------------------------------

static inline bool save_state(const Training* t, const char* folder, Error* err) {
    cJSON* root = cJSON_CreateObject();
    cJSON_AddNumberToObject(root, "step", (double)t->step);
    cJSON_AddNumberToObject(root, "position", (double)t->position);
    cJSON_AddNumberToObject(root, "train_tokens", (double)data_tokens(&t->train));
    if (isfinite(t->best)) json_add_float(root, "best_val_loss", t->best);
    cJSON_AddItemToObject(root, "options", options_to_json(&t->run->o));
    char* choices = model_choices_write();
    if (choices) cJSON_AddStringToObject(root, "matrix_algorithms", choices);
    free(choices);
    return json_write(root, folder, "state.json", err);
}

// whole, or not there at all
static inline bool save_checkpoint(const Training* t, Error* err) {
    const Run* r = t->run;
    Dtype dtype = strcmp(r->o.dtype, "BF16") == 0 ? DTYPE_BF16 : DTYPE_F32;
    Checkpoint c;
    if (!checkpoint_begin(&c, t->out, t->step, err)) return false;
    bool ok = model_save(r->m, c.path, dtype, err) && (!r->has_tokenizer || tokenizer_write(&r->t, c.path, err)) &&
              (r->o.steps == 0 || model_save_optimizer(r->m, c.path, dtype != DTYPE_F32, err)) &&
              save_state(t, c.path, err) && checkpoint_commit(&c, (int)r->o.keep, err);
    if (!ok) checkpoint_abandon(&c);
    return ok;
}

// a checkpoint, unless this step has one or the run writes none
static inline void checkpoint(Training* t) {
    Error err;
    if (!t->run->o.checkpoint_every || t->saved == t->step) return;
    must(save_checkpoint(t, &err), &err);
    t->saved = t->step;
}

static inline bool state_number(const cJSON* root, const char* name, const char* path, int64_t* value, Error* err) {
    return (json_whole(json_get(root, name), value) && *value >= 0) ||
           set_error(err, "%s: %s is expected to be a whole number", path, name);
}

// the newest checkpoint in --out: its options, step and place in the data. The options point into its JSON tree
static inline void load_state(Training* t) {
    Error err;
    Run* r = t->run;
    char path[PATH_SIZE], *text = NULL;
    size_t n = 0;
    int64_t position = 0;
    must(checkpoint_latest(r->o.out, r->folder, sizeof r->folder, &t->step, &err), &err);
    must(path_join(path, r->folder, "state.json", &err) && read_file(path, &text, &n, 1 << 20, &err), &err);
    cJSON* root = t->state = json_parse(text, n, &err);
    free(text);
    if (!root) die("%s: %s", path, err.text);
    must(state_number(root, "step", path, &t->step, &err) && state_number(root, "position", path, &position, &err) &&
         state_number(root, "train_tokens", path, &t->tokens, &err) && options_from_json(&r->o, json_get(root, "options"), &err), &err);
    t->saved = t->step;
    t->position = (uint64_t)position;
    const cJSON* best = json_get(root, "best_val_loss");
    if (cJSON_IsNumber(best)) t->best = best->valuedouble;
    const cJSON* choices = json_get(root, "matrix_algorithms");
    if (cJSON_IsString(choices)) model_choices_read(choices->valuestring);
}

// ---- the start -------------------------------------------------------------------------------

// weights and options: from a checkpoint, a preset or a folder
static inline void start_model(Training* t) {
    Error err;
    Run* r = t->run;
    if (r->o.resume) {
        load_state(t);
        must(model_configure(&r->o, &err), &err);
    }
    if (!r->o.model) r->o.model = "tiny";
    if (!r->o.resume && open_preset(r)) {
        take_model(r, model_make(&r->c, (uint64_t)r->o.seed), &err);
        return;
    }
    if (!r->o.resume) find_folder(r);
    find_tokenizer(r);
    take_model(r, model_load(r->folder, &err), &err);
}

// the sizes of a step, and the learning rate where none was given
static inline void start_step(Training* t) {
    Options* o = &t->run->o;
    const Config* c = &t->run->c;
    if (o->seq > c->context) die("--seq %lld: the model's context is %d", (long long)o->seq, c->context);
    t->val_batch = batch_make(o->batch, o->seq ? o->seq : c->context < 256 ? c->context : 256);
    t->B = t->val_batch.B;
    t->T = t->val_batch.T;
    int64_t tokens = (int64_t)t->B * t->T;
    if (o->total_batch % tokens)
        die("--total-batch %lld: expected a multiple of B*T = %lld", (long long)o->total_batch, (long long)tokens);
    t->rows = o->total_batch ? o->total_batch / t->T : t->B;
    t->step_batch = batch_make(t->rows, t->T);
    if (o->lr == 0) o->lr = (t->run->folder[0] ? 0.05 : 0.5) / c->C;
}

static inline void start_data(Training* t, const Corpus* corpus) {
    Error err;
    Run* r = t->run;
    const Options* o = &r->o;
    Tokenizer* tokenizer = r->has_tokenizer ? &r->t : NULL;
    if (o->data) {
        must(data_open(&t->train, o->data, tokenizer, r->c.V, &err), &err);
        if (o->val) must(data_open(&t->val, o->val, tokenizer, r->c.V, &err), &err);
        else data_split(&t->train, &t->val, 0.05);
    } else {
        need_tokenizer(r, "the embedded corpus");
        must(corpus_open(&t->train, corpus->train, corpus->train_end, tokenizer, &err), &err);
        must(corpus_open(&t->val, corpus->val, corpus->val_end, tokenizer, &err), &err);
    }
    must(data_check_seq(&t->train, o->data ? o->data : "the embedded corpus", t->T, &err), &err);
    if (o->resume && t->tokens != (int64_t)data_tokens(&t->train))
        fprintf(stderr, "warning: the training data has %lld tokens now, the run had %lld\n",
                (long long)data_tokens(&t->train), (long long)t->tokens);
}

static inline void start_memory(Training* t) {
    Error err;
    Run* r = t->run;
    model_reserve(r->m, t->B, t->T, true);
    if (r->o.resume) must(model_load_optimizer(r->m, r->folder, t->step, &err), &err);
}

static inline void start_output(Training* t) {
    Error err;
    const Options* o = &t->run->o;
    if (!*o->out) die("--out: expected the name of a folder");
    if (o->resume) snprintf(t->out, sizeof t->out, "%s", o->out);
    else must(output_folder(o->out, t->out, sizeof t->out, &err), &err);
    must(make_folders(t->out, &err), &err);
    if (o->steps > 0) must(log_open(&t->log, t->out, t->step, &err), &err);
}

static inline void print_banner(const Training* t) {
    const Options* o = &t->run->o;
    const Config* c = &t->run->c;
    fprintf(stderr, "model      %s: %.2f M parameters, C %d, L %d, NH %d, NKV %d, HD %d, F %d, V %d\n", o->model,
            params_count(c).total * 1e-6, c->C, c->L, c->NH, c->NKV, c->HD, c->F, c->V);
    if (o->steps > 0)
        fprintf(stderr, "data       %s: %llu tokens to train on, %llu to validate\n",
                o->data ? o->data : "the project's own sources", (unsigned long long)data_tokens(&t->train),
                (unsigned long long)data_tokens(&t->val));
    fprintf(stderr, "step       %lld sequences of %d tokens, %d at a time; AdamW, learning rate %.3g, %s\n",
            (long long)t->rows, t->T, t->B, o->lr, o->schedule);
    fprintf(stderr, "output     %s\n", t->out);
}

// ---- a step ----------------------------------------------------------------------------------

typedef struct {
    double loss, norm, lr, ms;
} StepResult;

static inline StepResult train_step(Training* t) {
    Run* r = t->run;
    const Options* o = &r->o;
    Batch* b = &t->step_batch;
    StepResult result;
    double start = now(), loss = 0;
    data_batch(&t->train, b->ids, b->labels, b->B, b->T, (uint64_t)o->seed, t->position);
    int64_t count = batch_predictions(b, t->rows);
    for (int64_t row = 0; row < t->rows; row += t->B)
        loss += model_backward(r->m, b->ids + row * t->T, b->labels + row * t->T, t->B, t->T, count ? 1 / (float)count : 0);
    result.lr = schedule_lr(o->schedule, t->step, o->steps, o->warmup, o->lr, o->lr_final);
    result.loss = count ? loss / (double)count : 0;
    AdamWOptions adamw = { (float)result.lr, (float)o->beta1, (float)o->beta2, 1e-8f, (float)o->weight_decay, (float)o->clip };
    result.norm = isfinite(result.loss) ? (double)model_update(r->m, adamw) : NAN;
    if (!isfinite(result.norm)) die_not_finite(r, isfinite(result.loss) ? "the gradient is" : "the loss is");
    result.ms = (now() - start) * 1e3;
    t->position += (uint64_t)t->rows;
    t->step++;
    return result;
}

// the log has every step, the terminal at most one in half a second, and fewer the longer the run
static inline void report_step(Training* t, StepResult s, bool last) {
    Error err;
    double tokens_s = (double)(t->rows * t->T) / s.ms * 1e3;
    must(log_line(&t->log, &err, "{\"step\":%lld,\"train_loss\":%.9g,\"grad_norm\":%.6g,\"lr\":%.6g,\"ms\":%.3f,\"tok_s\":%.0f}",
                  (long long)t->step, s.loss, s.norm, s.lr, s.ms, tokens_s), &err);
    double elapsed = now() - t->start;
    if (!last && elapsed < t->show) return;
    t->show = elapsed + (elapsed < 30 ? 0.5 : elapsed < 1800 ? elapsed / 60 : 30);
    fprintf(stderr, "step %6lld/%lld  loss %.4f  norm %.3f  lr %.2e  %.1f ms  %.0f tok/s  %s left\n", (long long)t->step,
            (long long)t->run->o.steps, s.loss, s.norm, s.lr, s.ms, tokens_s,
            duration((double)(t->run->o.steps - t->step) * s.ms * 1e-3));
}

// the loss of the first --eval-steps batches of the validation data
static inline void validate(Training* t) {
    Error err;
    int64_t predictions;
    uint64_t windows = data_eval_windows(&t->val, t->T), most = (uint64_t)t->run->o.eval_steps * (uint64_t)t->B;
    double loss = evaluate(t->run->m, &t->val, windows < most ? windows : most, &t->val_batch, NULL, &predictions);
    if (!predictions) return;
    if (loss < t->best) t->best = loss;
    fprintf(stderr, "step %6lld  validation loss %.4f   best %.4f\n", (long long)t->step, loss, t->best);
    must(log_line(&t->log, &err, "{\"step\":%lld,\"val_loss\":%.9g}", (long long)t->step, loss), &err);
}

// a text from its beginning, with random numbers of its own
static inline void sample_text(Training* t) {
    Run* r = t->run;
    int n = r->c.context < 256 ? r->c.context : 256;
    Generation g = generation_make(r->m, &r->t, n, &r->o);
    g.seed = random_bits((uint64_t)r->o.seed, SAMPLER_STREAM, (uint64_t)t->step);
    tokens_push(&g.ids, r->t.bos >= 0 ? r->t.bos : 0);
    fprintf(stderr, "--- sample after %lld steps ---\n", (long long)t->step);
    generate_text(&g, n, stderr);
    fprintf(stderr, "\n---\n");
    generation_free(&g);
}

// ---- train -----------------------------------------------------------------------------------

static inline void train_loop(Training* t) {
    const Options* o = &t->run->o;
    t->start = now();
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    while (t->step < o->steps && !interrupted) {
        StepResult result = train_step(t);
        bool last = t->step == o->steps;
        report_step(t, result, last || interrupted);
        if (o->eval_every && (last || t->step % o->eval_every == 0)) validate(t);
        if (o->sample_every && t->run->has_tokenizer && (last || t->step % o->sample_every == 0)) sample_text(t);
        if (o->checkpoint_every && t->step % o->checkpoint_every == 0) checkpoint(t);
    }
    checkpoint(t);
}

static inline void print_end(const Training* t) {
    if (t->saved >= 0) fprintf(stderr, "saved      %s/step-%08lld\n", t->out, (long long)t->saved);
    if (!interrupted) return;
    fprintf(stderr, "stopped after step %lld", (long long)t->step);
    if (t->saved == t->step) fprintf(stderr, "; go on with: %s train --resume --out %s", t->run->program, t->out);
    fprintf(stderr, "\n");
}

// returns the exit status
static inline int command_train(Run* r, const Corpus* corpus) {
    Training* t = (Training*)allocate(1, sizeof *t);
    t->run = r;
    t->best = INFINITY;
    t->saved = -1;
    start_model(t);
    start_step(t);
    if (r->o.steps > 0) {
        start_data(t, corpus);
        start_memory(t);
    }
    start_output(t);
    print_banner(t);
    if (r->o.resume && t->step >= r->o.steps)
        fprintf(stderr, "the run has done its %lld steps; with a larger --steps it goes on\n", (long long)t->step);
    train_loop(t);
    print_end(t);
    log_close(&t->log);
    data_close(&t->val), data_close(&t->train);
    batch_free(&t->step_batch), batch_free(&t->val_batch);
    cJSON_Delete(t->state);
    free(t);
    return interrupted ? 128 + interrupted : 0;
}
