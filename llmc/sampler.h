/*
Sampling: one token from the logits of a step.

    p[i] = exp((logit[i] - max) / temperature)              so that the likeliest token has 1; then, in transformers' order:
    top-k    keeps the k largest, and whatever equals the k-th
    top-p    keeps the fewest of those, from the largest down, whose sum reaches top_p of theirs; equal ones by index
    min-p    keeps of those what is at least min_p times the largest
    draw     one of those left, with probability p[i] / sum

The filters only ever cut a descending list short, so the tokens come off a heap, the largest first, until one of them cuts:
V + (tokens kept) * log V steps, no sort of the vocabulary. A token whose p underflows to 0 is never a candidate.
There is no state: the same (logits, options, seed, index) give the same token.

Numerics        p in fp32, sums in double in a fixed order; the draw uses 53 random bits, for V is more than 2^17
Bound by        expf: 128,256 of them are a millisecond; greedy is one pass
Proved by       dev/test/test_sampler.c: frequencies, and every filter against a plain reference
Source          Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p)
*/
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "random.h"

typedef struct {
    float temperature; // 0: greedy
    int top_k;         // 0: off
    float top_p;       // 1: off
    float min_p;       // 0: off
} SamplerOptions;

typedef struct {
    float p;
    int32_t id;
} Candidate;

enum { SAMPLER_STREAM = 0x5a3b1e }; // of the random numbers; any number that no other user of the seed takes

static inline bool candidate_before(Candidate a, Candidate b) { return a.p > b.p || (a.p == b.p && a.id < b.id); }

// moves heap[i] down to where no child comes before it; n candidates
static inline void candidates_sift(Candidate* heap, int n, int i) {
    Candidate moving = heap[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && candidate_before(heap[child + 1], heap[child])) child++;
        if (!candidate_before(heap[child], moving)) break;
        heap[i] = heap[child];
    }
    heap[i] = moving;
}

// takes the first of the n candidates on the heap off it and puts it behind them, at heap[n - 1]
static inline Candidate candidates_pop(Candidate* heap, int n) {
    Candidate first = heap[0];
    heap[0] = heap[n - 1];
    if (n > 1) candidates_sift(heap, n - 1, 0);
    return heap[n - 1] = first;
}

// applies the filters to n candidates whose p sum to total. Those kept lie, largest first, at list[n - 1], list[n - 2] …;
// returns how many, at least one
static inline int candidates_filter(Candidate* list, int n, double total, const SamplerOptions* o) {
    for (int i = n / 2 - 1; i >= 0; i--) candidates_sift(list, n, i);
    int popped = 0, limit = n, kept = 0;
    if (o->top_k > 0 && o->top_k < n) {
        total = 0;
        while (popped < n && (popped < o->top_k || list[0].p == list[n - popped].p))
            total += (double)candidates_pop(list, n - popped).p, popped++;
        limit = popped;
    }
    for (double sum = 0; kept < limit; kept++) {
        if (kept == popped) candidates_pop(list, n - popped), popped++;
        float p = list[n - 1 - kept].p;
        if (kept > 0 && (p < o->min_p || (o->top_p < 1 && sum >= (double)o->top_p * total))) break;
        sum += (double)p;
    }
    return kept;
}

// the index of the largest of logits (V), the first of equals; -1 when one is NaN or +infinity, or all are -infinity
static inline int sample_greedy(const float* logits, int V) {
    int best = -1;
    bool finite = true;
    float max = -INFINITY;
    for (int i = 0; i < V; i++) {
        if (logits[i] > max) max = logits[i], best = i;
        finite &= logits[i] < INFINITY; // false for NaN
    }
    return finite ? best : -1;
}

// a token for logits (V), or -1 as above. index counts the draws of a seed; scratch has room for V candidates
static inline int sample(const float* logits, int V, const SamplerOptions* o, uint64_t seed, uint64_t index,
                         Candidate* scratch) {
    int best = sample_greedy(logits, V), n = 0;
    if (best < 0 || !(o->temperature > 0)) return best;
    double total = 0;
    for (int i = 0; i < V; i++) {
        float p = logits[i] == logits[best] ? 1 : expf((logits[i] - logits[best]) / o->temperature);
        if (!(p > 0)) continue;
        scratch[n].p = p, scratch[n].id = i, n++;
        total += (double)p;
    }
    int kept = n;
    if (o->top_k > 0 || o->top_p < 1 || o->min_p > 0) {
        kept = candidates_filter(scratch, n, total, o);
        total = 0;
        for (int i = n - kept; i < n; i++) total += (double)scratch[i].p;
    }
    double target = (double)(random_bits(seed, SAMPLER_STREAM, index) >> 11) * 0x1p-53 * total;
    int drawn = n - kept;
    for (double sum = (double)scratch[drawn].p; sum <= target && drawn < n - 1;) sum += (double)scratch[++drawn].p;
    return scratch[drawn].id;
}
