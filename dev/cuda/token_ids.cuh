/*
Tokens for the embedding's lab files: uniform, or as in text, where a few tokens are most of it. Of N tokens of text the k-th
most frequent id comes with a probability that falls like 1 / (k + 2.7) (Zipf and Mandelbrot): of 128256 ids the first is 3 % of
all tokens, and 16384 tokens name some 7000 ids.
*/
#pragma once

#include "bench.cuh"

// N ids below V; the id is the rank of its frequency, as in a vocabulary that was made by merging frequent pairs first
static std::vector<int32_t> token_ids(int N, int V, bool text) {
    const double bend = 2.7;
    std::vector<int32_t> ids((size_t)N);
    for (int n = 0; n < N; n++) {
        const double u = random_uniform(4, 0, (uint64_t)n), id = text ? bend * (pow(V / bend + 1, u) - 1) : u * V;
        ids[n] = (int32_t)fmin(id, V - 1.0);
    }
    return ids;
}

static int64_t token_ids_distinct(const std::vector<int32_t>& ids, int V) {
    std::vector<bool> seen((size_t)V);
    int64_t count = 0;
    for (int32_t id : ids) count += !seen[id], seen[id] = true;
    return count;
}
