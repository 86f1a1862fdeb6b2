/*
What both programs need when they are libraries, for the tests: over the functions of model.h.
*/
#pragma once

#include "model.h"

// how many of n labels count, at least 1: what a mean loss is divided by
static inline int count_labels(const int32_t* labels, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) count += labels[i] != IGNORED_LABEL;
    return count ? count : 1;
}

// fills ids[n_prompt .. n_total) with the likeliest tokens, through the key/value cache
static inline void generate_greedy(const Model* m, int32_t* ids, int n_prompt, int n_total) {
    const int V = model_config(m)->V;
    Sequence* s = sequence_make(m, n_total);
    float* logits = (float*)allocate((size_t)V, sizeof *logits);
    for (int n = 0; n_prompt < n_total; n = n_prompt++) {
        sequence_feed(s, ids + n, n_prompt - n, logits);
        ids[n_prompt] = 0;
        for (int i = 1; i < V; i++)
            if (logits[i] > logits[ids[n_prompt]]) ids[n_prompt] = i;
    }
    free(logits);
    sequence_free(s);
}
