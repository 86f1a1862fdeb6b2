/*
What the commands ask of a model. llama3.c answers on the CPU, train_llama3.cu on the GPU; train.h, generate.h and evaluate.h
know nothing else of either.
*/
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "dtype.h"
#include "error.h"
#include "llama3.h"
#include "options.h"

#ifndef MODEL_API // llama3.c as a library makes them its own
#define MODEL_API
#endif

typedef struct Model Model; // weights, and what it takes to run or train them

#ifdef __cplusplus
extern "C" {
#endif

// takes what the options say of how to compute, before models are made; false when it cannot be done
MODEL_API bool model_configure(const Options* o, Error* err);

// ---- making one: NULL with the reason in err; freed with model_free ---------------------------

MODEL_API Model* model_make(const Config* c, uint64_t seed);             // random weights, to be trained
MODEL_API Model* model_load(const char* folder, Error* err);             // a folder's weights, to be trained
MODEL_API Model* model_open(const char* folder, Error* err);             // a folder's weights, to be run from where they lie
MODEL_API void model_free(Model* m);
MODEL_API const Config* model_config(const Model* m);
MODEL_API double model_weight_bytes(const Model* m);                     // that one generated token reads

// names the first weight or gradient that holds a NaN or an infinity in err; true when none does
MODEL_API bool model_is_finite(const Model* m, Error* err);

// ---- passes: ids and labels (B, T), label t is the token after id t, IGNORED_LABEL does not count ----

// whether there is memory to train with batches (B, T), `rows` sequences to a step, before any is taken; else err has the nearest
// configuration that fits
MODEL_API bool model_plan(const Config* c, int B, int T, int64_t rows, Error* err);

// memory for passes of up to B sequences of up to T tokens; training: with backward and updates
MODEL_API void model_reserve(Model* m, int B, int T, bool training);

// says on stderr where the memory of training goes, and who computes attention; on the CPU there is nothing to say
MODEL_API void model_print_memory(const Model* m);

// the sum of the losses
MODEL_API double model_loss(Model* m, const int32_t* ids, const int32_t* labels, int B, int T);

// adds the gradient of scale * (the sum of the losses) to the model's, and that sum to the step's. May return before it is
// done; ids and labels are the caller's again
MODEL_API void model_backward(Model* m, const int32_t* ids, const int32_t* labels, int B, int T, float scale);

typedef struct {
    double loss; // the sum over the step's passes
    float norm;  // of the gradients, before they are clipped
} StepSums;

// waits for the step's passes. clip: the largest norm that its update lets the gradients have, 0: any
MODEL_API StepSums model_sums(Model* m, float clip);

typedef struct {
    float lr, beta1, beta2, eps, weight_decay;
    uint64_t seed; // of what is rounded at random
} AdamWOptions;

// after model_sums, whose norm was finite: one AdamW step. The gradients are zero afterwards, and a new step begins
MODEL_API void model_update(Model* m, AdamWOptions o);

// the same without the AdamW step
MODEL_API void model_skip(Model* m);

// FLOP/s of a large matrix product, measured: what a step's are compared with; 0 where that says nothing
MODEL_API double model_matrix_rate(void);

// what was measured because the options ask for it, on stderr
MODEL_API void model_report(const Model* m);

// ---- a text, token by token -------------------------------------------------------------------

typedef struct Sequence Sequence; // keys and values of the tokens so far; its model must outlive it

MODEL_API Sequence* sequence_make(const Model* m, int capacity);         // room for that many tokens
MODEL_API void sequence_free(Sequence* s);
MODEL_API int sequence_length(const Sequence* s);
MODEL_API void sequence_clear(Sequence* s);

// n more tokens; overwrites logits (V) with those after the last
MODEL_API void sequence_feed(Sequence* s, const int32_t* ids, int n, float* logits);

// ---- files ------------------------------------------------------------------------------------

// model.safetensors and config.json in a folder: weights of that dtype, or a narrower one that holds them as they are
MODEL_API bool model_save(const Model* m, const char* folder, Dtype dtype, Error* err);

// optimizer.safetensors: m and v, and the fp32 weights where those that model_save wrote with that dtype are rounded; and back,
// into a model that was reserved for training. updates: the AdamW steps it has seen
MODEL_API bool model_save_optimizer(const Model* m, const char* folder, Dtype dtype, Error* err);
MODEL_API bool model_load_optimizer(Model* m, const char* folder, int64_t updates, Error* err);

// what else a resumed run needs to repeat its bits: the chosen algorithms of matrix products, as text that the caller frees;
// NULL where there is nothing to choose. Read back before the first model is made
MODEL_API char* model_choices_write(void);
MODEL_API void model_choices_read(const char* text);

// bytes to train with batches (B, T), weights included; false, and why, where this machine cannot tell
MODEL_API bool model_training_bytes(const Config* c, int B, int T, double* bytes, Error* why);
MODEL_API const char* model_storage(void); // the types of what they hold, in words

// bytes of a sequence of that capacity, without the weights
MODEL_API double model_sequence_bytes(const Config* c, int capacity);

#ifdef __cplusplus
}
#endif
