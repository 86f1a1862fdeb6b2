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
Bound by        for V 128,256 about 0.05 ms greedy, 0.4 ms without filters, 0.4 to 1.5 ms with filters that cut most; filters
                that keep most cost a sort, 20 ms
Proved by       dev/test/test_sampler.c: frequencies, and every filter against a plain reference
Source          Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p)
*/
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "exp.h"
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
    float max = -INFINITY;
    int bad = 0, best = 0;
#pragma omp simd reduction(max : max) reduction(| : bad)
    for (int i = 0; i < V; i++) {
        bad |= !(logits[i] < INFINITY); // true for NaN
        max = logits[i] > max ? logits[i] : max;
    }
    if (bad || !(max > -INFINITY)) return -1;
    while (logits[best] != max) best++;
    return best;
}

// p of every token that may be drawn into list (room for V), in order of ids; returns how many, *total is the sum of all p
static inline int candidates_make(Candidate* list, double* total, const float* logits, int V, float max,
                                  const SamplerOptions* o) {
#pragma omp simd
    for (int i = 0; i < V; i++) list[i].p = exp32((logits[i] - max) / o->temperature), list[i].id = i;
    double sum = 0;
    for (int i = 0; i < V; i++) sum += list[i].p > 0 ? (double)list[i].p : 0; // a NaN is -infinity / infinity
    // where top-k does not need them, leave out what min-p would drop, and what is so little that all of it together is
    // less than half of what top-p cuts off
    float floor = 0, least = 0;
    if (o->top_k <= 0 && o->top_p < 1) floor = (float)(0.5 * (1 - (double)o->top_p) * sum / V);
    if (o->top_k <= 0) least = o->min_p < 1 ? o->min_p : 1;
    int n = 0;
    for (int i = 0; i < V; i++)
        if (list[i].p > floor && list[i].p >= least) list[n++] = list[i];
    *total = sum;
    return n;
}

// a token for logits (V), or -1 as above. index counts the draws of a seed; scratch has room for V candidates
static inline int sample(const float* logits, int V, const SamplerOptions* o, uint64_t seed, uint64_t index,
                         Candidate* scratch) {
    int best = sample_greedy(logits, V);
    if (best < 0 || !(o->temperature > 0)) return best;
    double total;
    int n = candidates_make(scratch, &total, logits, V, logits[best], o), kept = n;
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
