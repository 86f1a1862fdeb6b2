/*
Training: where a run starts, its steps, what it writes.

    OUT/log.jsonl               every step's loss, and the validations
    OUT/step-00000100/          a model folder that transformers loads as it is, with optimizer.safetensors (AdamW's moments,
                                and master weights when those of the folder are rounded) and state.json

A resumed run equals an uninterrupted one to the bit: random numbers are counted, so seed, step and place in the data are all
there is to remember. Validation and samples have their own random numbers and change nothing.
The next step's batch is drawn while the passes of this one may still be under way; a step is waited for once, for its loss and
the norm of its gradients, on which hangs whether there is an update: outliers.h says how unusual they are.
Proved by       dev/test/test_runs.c: resume, kills, signals, accumulation, skipped outliers
*/
#pragma once

#include <signal.h>

#include "corpus.h"
#include "evaluate.h"
#include "generate.h"
#include "json.h"
#include "outliers.h"
#include "params.h"
#include "schedule.h"

typedef struct {
    Run* run;
    char out[PATH_SIZE];      // this run's folder
    Data train, val;
    Batch step_batch;         // (rows, T): what the next step reads, the batches of B that accumulate one after the other
    int64_t predictions;      // of step_batch
    Batch val_batch;          // (B, T)
    int B, T;
    int64_t rows;             // sequences of a step, a multiple of B
    int64_t step, saved;      // steps done; the step of the newest checkpoint, -1: none
    int64_t updates;          // steps that were not skipped
    int64_t tokens;           // of the training data of the run that is resumed
    uint64_t position;        // sequences of the training data that the steps done have read
    Outliers losses, norms;   // of the last steps
    double best;              // lowest validation loss
    cJSON* state;             // of the run that is resumed: options point into it
    double start, show;       // seconds: when the loop began; after how many of them the next step is shown
    double flops, rate;       // of a step; a second's of a large product (0: not known)
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
    cJSON_AddNumberToObject(root, "updates", (double)t->updates);
    cJSON_AddNumberToObject(root, "position", (double)t->position);
    cJSON_AddNumberToObject(root, "train_tokens", (double)data_tokens(&t->train));
    if (isfinite(t->best)) json_add_float(root, "best_val_loss", t->best);
    json_add_floats(root, "last_losses", t->losses.x, t->losses.n);
    json_add_floats(root, "last_norms", t->norms.x, t->norms.n);
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
              (r->o.steps == 0 || model_save_optimizer(r->m, c.path, dtype, err)) &&
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

// the numbers of a window; one that is not there stays empty
static inline void state_outliers(Outliers* o, const cJSON* window) {
    const cJSON* x;
    cJSON_ArrayForEach(x, window) if (cJSON_IsNumber(x)) outliers_add(o, x->valuedouble);
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
    if (!json_whole(json_get(root, "updates"), &t->updates)) t->updates = t->step;
    state_outliers(&t->losses, json_get(root, "last_losses"));
    state_outliers(&t->norms, json_get(root, "last_norms"));
    const cJSON* best = json_get(root, "best_val_loss");
    if (cJSON_IsNumber(best)) t->best = best->valuedouble;
    const cJSON* choices = json_get(root, "matrix_algorithms");
    if (cJSON_IsString(choices)) model_choices_read(choices->valuestring);
}

// ---- the start -------------------------------------------------------------------------------

// what is trained, and how: a checkpoint, a preset or a folder. The weights come later
static inline void start_shape(Training* t) {
    Error err;
    Run* r = t->run;
    if (r->o.resume) {
        load_state(t);
        must(model_configure(&r->o, &err), &err);
    }
    if (!r->o.model) r->o.model = "tiny";
    if (!r->o.resume && open_preset(r)) return;
    if (!r->o.resume) find_folder(r);
    find_tokenizer(r);
    must(config_read(&r->c, r->folder, &err), &err);
    check_vocabulary(r);
}

// the sizes of a step, if there is memory for them, and the learning rate where none was given
static inline void start_step(Training* t) {
    Error err;
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
    t->flops = 3 * flops_per_token(c, t->T) * (double)t->rows * t->T;
    if (o->lr == 0) o->lr = (t->run->folder[0] ? 0.05 : 0.5) / c->C;
    if (o->steps > 0) must(model_plan(c, t->B, t->T, t->rows, &err), &err);
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

// the weights and, where there is something to train, all that takes memory
static inline void start_model(Training* t) {
    Error err;
    Run* r = t->run;
    const bool training = r->o.steps > 0;
    if (training && t->flops > 1e12) t->rate = model_matrix_rate(); // beside smaller steps it says nothing
    take_model(r, r->folder[0] ? model_load(r->folder, &err) : model_make(&r->c, (uint64_t)r->o.seed), &err);
    if (training) model_reserve(r->m, t->B, t->T, true);
    if (training && r->o.resume) must(model_load_optimizer(r->m, r->folder, t->updates, &err), &err);
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
    if (t->rate > 0)
        fprintf(stderr, "speed      a step has %.3g FLOPs; a large matrix product runs at %.1f TFLOP/s here, of which a step's percentage is\n",
                t->flops, t->rate * 1e-12);
    if (o->steps > 0) model_print_memory(t->run->m);
    fprintf(stderr, "output     %s\n", t->out);
}

// ---- a step ----------------------------------------------------------------------------------

enum { OUTLIER_Z = 3 }; // from here on a step's z is worth a word

typedef struct {
    double loss, norm, lr, ms;
    double loss_z, norm_z; // how unusual they are: outliers.h
    bool skipped;
} StepResult;

// draws the batch that comes after the steps done
static inline void draw_batch(Training* t) {
    Batch* b = &t->step_batch;
    data_batch(&t->train, b->ids, b->labels, b->B, b->T, (uint64_t)t->run->o.seed, t->position);
    t->predictions = batch_predictions(b, t->rows);
}

// the passes of a step, which may still be under way on return
static inline void start_passes(Training* t) {
    const Batch* b = &t->step_batch;
    const float scale = t->predictions ? 1 / (float)t->predictions : 0;
    for (int64_t row = 0; row < t->rows; row += t->B)
        model_backward(t->run->m, b->ids + row * t->T, b->labels + row * t->T, t->B, t->T, scale);
    t->position += (uint64_t)t->rows;
}

// loss and norm of the passes, mean and finite, and how they compare with those before
static inline void finish_passes(Training* t, StepResult* s, int64_t predictions) {
    Run* r = t->run;
    const StepSums sums = model_sums(r->m, (float)r->o.clip);
    s->loss = predictions ? sums.loss / (double)predictions : 0;
    s->norm = (double)sums.norm;
    if (!isfinite(s->loss)) die_not_finite(r, "the loss is");
    if (!isfinite(s->norm)) die_not_finite(r, "the gradient is");
    s->loss_z = outliers_z(&t->losses, s->loss);
    s->norm_z = outliers_z(&t->norms, s->norm);
    outliers_add(&t->losses, s->loss);
    outliers_add(&t->norms, s->norm);
}

static inline StepResult train_step(Training* t) {
    Run* r = t->run;
    const Options* o = &r->o;
    const double start = now();
    const int64_t predictions = t->predictions;
    StepResult s;
    start_passes(t);
    if (t->step + 1 < o->steps) draw_batch(t);
    finish_passes(t, &s, predictions);
    s.lr = schedule_lr(o->schedule, t->step, o->steps, o->warmup, o->lr, o->lr_final);
    s.skipped = o->skip_outliers > 0 && fmax(s.loss_z, s.norm_z) > o->skip_outliers;
    const AdamWOptions adamw = { (float)s.lr, (float)o->beta1, (float)o->beta2, 1e-8f, (float)o->weight_decay, (uint64_t)o->seed };
    if (s.skipped) model_skip(r->m);
    else model_update(r->m, adamw);
    t->updates += !s.skipped;
    t->step++;
    s.ms = (now() - start) * 1e3;
    return s;
}

// the log has every step, the terminal at most one in half a second, and fewer the longer the run; an outlier stands in both
static inline void report_step(Training* t, StepResult s, bool last) {
    Error err;
    char z[96] = "", z_json[96] = "", rate[64] = "";
    const double tokens_s = (double)(t->rows * t->T) / s.ms * 1e3, elapsed = now() - t->start;
    const bool outlier = s.skipped || fmax(s.loss_z, s.norm_z) > OUTLIER_Z;
    if (outlier) {
        snprintf(z, sizeof z, "  outlier: loss z %.1f, norm z %.1f%s", s.loss_z, s.norm_z, s.skipped ? ", skipped" : "");
        snprintf(z_json, sizeof z_json, ",\"loss_z\":%.3g,\"norm_z\":%.3g,\"skipped\":%s", s.loss_z, s.norm_z,
                 s.skipped ? "true" : "false");
    }
    must(log_line(&t->log, &err, "{\"step\":%lld,\"train_loss\":%.9g,\"grad_norm\":%.6g,\"lr\":%.6g,\"ms\":%.3f,\"tok_s\":%.0f%s}",
                  (long long)t->step, s.loss, s.norm, s.lr, s.ms, tokens_s, z_json), &err);
    if (!last && !outlier && elapsed < t->show) return;
    t->show = elapsed + (elapsed < 30 ? 0.5 : elapsed < 1800 ? elapsed / 60 : 30);
    const double flop_s = t->flops / s.ms * 1e3;
    if (t->rate > 0) snprintf(rate, sizeof rate, "  %.1f TFLOP/s, %.0f %%", flop_s * 1e-12, 100 * flop_s / t->rate);
    fprintf(stderr, "step %6lld/%lld  loss %.4f  norm %.3f  lr %.2e  %.1f ms  %.0f tok/s%s  %s left%s\n", (long long)t->step,
            (long long)t->run->o.steps, s.loss, s.norm, s.lr, s.ms, tokens_s, rate,
            duration((double)(t->run->o.steps - t->step) * s.ms * 1e-3), z);
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
    if (t->step < o->steps) draw_batch(t);
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
    start_shape(t);
    start_step(t);
    if (r->o.steps > 0) start_data(t, corpus);
    start_model(t);
    start_output(t);
    print_banner(t);
    if (r->o.resume && t->step >= r->o.steps)
        fprintf(stderr, "the run has done its %lld steps; with a larger --steps it goes on\n", (long long)t->step);
    train_loop(t);
    model_report(r->m);
    print_end(t);
    log_close(&t->log);
    data_close(&t->val), data_close(&t->train);
    batch_free(&t->step_batch), batch_free(&t->val_batch);
    cJSON_Delete(t->state);
    free(t);
    return interrupted ? 128 + interrupted : 0;
}
