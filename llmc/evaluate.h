/*
Measuring a model: the mean loss over a text, and accuracy on HellaSwag.

    windows     i reads tokens iT .. iT+T-1 and predicts the next of each; the last of a shard may be shorter; positions begin
                at 0 in each. The loss is the mean over all predictions, the perplexity its exponential
    HellaSwag   of four endings the one with the highest probability given the context is the model's answer: accuracy by the
                whole ending, accuracy_norm by its log-probability per byte (as EleutherAI's lm-evaluation-harness does)

Proved by       dev/test/test_cli.c, dev/reference/parity.py (the loss on the same windows)
*/
#pragma once

#include "data.h"
#include "hellaswag.h"
#include "progress.h"
#include "run.h"

// room for a batch (B, T)
typedef struct {
    int32_t *ids, *labels;
    int B, T;
} Batch;

static inline Batch batch_make(int64_t B, int64_t T) {
    if (B * T > 1 << 26)
        die("--batch %lld x --seq %lld: at most %d tokens at a time", (long long)B, (long long)T, 1 << 26);
    Batch b = { NULL, NULL, (int)B, (int)T };
    b.ids = (int32_t*)allocate((size_t)(B * T), sizeof *b.ids);
    b.labels = (int32_t*)allocate((size_t)(B * T), sizeof *b.labels);
    return b;
}

static inline void batch_free(Batch* b) { free(b->ids), free(b->labels); }

static inline int64_t batch_predictions(const Batch* b, int64_t rows) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows * b->T; i++) count += b->labels[i] != IGNORED_LABEL;
    return count;
}

// ---- loss ------------------------------------------------------------------------------------

// the mean loss over the first `windows` windows of d, of *predictions predictions; shows how far it is when it has a name
static inline double evaluate(Model* m, Data* d, uint64_t windows, Batch* b, const char* name, int64_t* predictions) {
    Progress progress;
    double sum = 0;
    *predictions = 0;
    progress_begin(&progress, name, (double)windows);
    for (uint64_t i = 0; i < windows; i += (uint64_t)b->B) {
        int rows = windows - i < (uint64_t)b->B ? (int)(windows - i) : b->B;
        for (int r = 0; r < rows; r++) {
            size_t at = (size_t)r * (size_t)b->T;
            data_eval_window(d, b->ids + at, b->labels + at, b->T, i + (uint64_t)r);
        }
        *predictions += batch_predictions(b, rows);
        sum += model_loss(m, b->ids, b->labels, rows, b->T);
        if (name) progress_add(&progress, rows);
    }
    if (name) progress_end(&progress);
    return *predictions ? sum / (double)*predictions : 0;
}

// ---- HellaSwag -------------------------------------------------------------------------------

// the log-probability of ids[from .. n) given what stands before each; b has room for n
static inline double continuation_logprob(Run* r, Batch* b, const int32_t* ids, int from, int n) {
    for (int i = 0; i < n; i++) b->labels[i] = i + 1 >= from && i + 1 < n ? ids[i + 1] : IGNORED_LABEL;
    double loss = model_loss(r->m, ids, b->labels, 1, n);
    if (!isfinite(loss)) die_not_finite(r, "the loss is");
    return -loss;
}

// whether the model finds the right ending likeliest: as a whole, and per byte of its text
static inline void score_task(Run* r, Batch* b, const HellaswagTask* task, bool* right, bool* right_per_byte) {
    Error err;
    Tokens ids = { NULL, 0, 0 };
    double best = -INFINITY, best_per_byte = -INFINITY;
    must(tokenizer_encode(&r->t, &ids, task->context, strlen(task->context), false, &err), &err);
    size_t context = ids.n;
    for (int e = 0; e < HELLASWAG_ENDINGS; e++) {
        size_t length = strlen(task->endings[e]);
        char* ending = (char*)allocate(length + 2, 1);
        ending[0] = ' ';
        memcpy(ending + 1, task->endings[e], length);
        ids.n = context;
        must(tokenizer_encode(&r->t, &ids, ending, length + 1, false, &err), &err);
        size_t skip = ids.n > (size_t)b->T ? ids.n - (size_t)b->T : 0; // keep the end of what is too long
        int from = context > skip ? (int)(context - skip) : 0;
        double logprob = continuation_logprob(r, b, ids.ids + skip, from, (int)(ids.n - skip));
        double per_byte = logprob / (double)length;
        if (logprob > best) best = logprob, *right = e == task->label;
        if (per_byte > best_per_byte) best_per_byte = per_byte, *right_per_byte = e == task->label;
        free(ending);
    }
    tokens_free(&ids);
}

static inline void eval_hellaswag(Run* r, Batch* b) {
    Error err;
    Hellaswag h;
    Progress progress;
    size_t right = 0, right_per_byte = 0;
    need_tokenizer(r, "--hellaswag");
    must(hellaswag_open(&h, r->o.hellaswag, &err), &err);
    progress_begin(&progress, "scoring", (double)h.n);
    for (size_t i = 0; i < h.n; i++) {
        bool whole = false, per_byte = false;
        score_task(r, b, &h.tasks[i], &whole, &per_byte);
        right += whole;
        right_per_byte += per_byte;
        progress_add(&progress, 1);
    }
    progress_end(&progress);
    printf("accuracy %.4f  accuracy_norm %.4f  tasks %zu\n", (double)right / (double)h.n, (double)right_per_byte / (double)h.n, h.n);
    hellaswag_close(&h);
}

// ---- eval ------------------------------------------------------------------------------------

static inline void command_eval(Run* r) {
    Error err;
    Data data;
    int64_t predictions;
    const Options* o = &r->o;
    if (!o->data == !o->hellaswag) die("eval needs --data or --hellaswag, one of them");
    open_model(r);
    if (o->seq > r->c.context) die("--seq %lld: the model's context is %d", (long long)o->seq, r->c.context);
    const int usual = o->hellaswag ? 1024 : 256, T = r->c.context < usual ? r->c.context : usual;
    Batch b = batch_make(o->hellaswag ? 1 : o->batch, o->seq ? o->seq : T);
    if (o->data) must(data_open(&data, o->data, r->has_tokenizer ? &r->t : NULL, r->c.V, &err), &err);
    model_reserve(r->m, b.B, b.T, false);
    if (o->hellaswag) {
        eval_hellaswag(r, &b);
    } else {
        double loss = evaluate(r->m, &data, data_eval_windows(&data, b.T), &b, "evaluating", &predictions);
        if (!isfinite(loss)) die_not_finite(r, "the loss is");
        printf("loss %.6f  perplexity %.4f  predictions %lld\n", loss, exp(loss), (long long)predictions);
        data_close(&data);
    }
    batch_free(&b);
}
