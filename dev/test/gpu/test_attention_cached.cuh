/*
Attention over a cache against attention_forward_cpu: one query (ring where it takes the shape, with one split and with several)
and several at once (simple), rows of the cache past the last key never read.

Tolerance       as attention's out: p is rounded before it is multiplied, out when stored
*/
#pragma once

#include "gpu_test.cuh"
#include "llmc/attention.h"
#include "llmc/attention_cached.cuh"

static void attention_cached_shape(int T, int pos, int NH, int NKV, int HD) {
    const int keys = pos + T, ldq = (NH + 2 * NKV) * HD, spare = 3;
    const size_t row = (size_t)2 * NKV * HD, n_out = (size_t)T * NH * HD, n_cache = (size_t)(keys + spare) * row;
    char name[96];
    snprintf(name, sizeof name, "attention_cached T %d pos %d NH %d NKV %d HD %d", T, pos, NH, NKV, HD);
    GpuArray q = gpu_random((size_t)T * ldq, 1, 2), filled = gpu_random((size_t)keys * row, 2, 1);
    GpuArray cache = gpu_poison(n_cache), out = gpu_poison(n_out), again = gpu_poison(n_out);
    cuda_check(cudaMemcpy(cache.x, filled.x, filled.n * sizeof(floatX), cudaMemcpyDeviceToDevice)); // NaN behind
    GpuBytes scratch = gpu_scratch(attention_cached_scratch(keys, NH, NKV, HD));
    float* want = (float*)allocate(n_out, sizeof *want);
    attention_forward_cpu(want, NULL, q.host, filled.host, filled.host + row / 2, 1, T, keys, pos, NH, NKV, HD, ldq,
                          (int)row);
    attention_cached(out.x, q.x, cache.x, T, pos, NH, NKV, HD, ldq, scratch.x, 0);
    attention_cached(again.x, q.x, cache.x, T, pos, NH, NKV, HD, ldq, scratch.x, 0);
    gpu_check(name, out, want, n_out, gpu_tolerance(2));
    gpu_check_same(name, out, again);
    gpu_check_unchanged(name, q);
    gpu_free(&q), gpu_free(&filled), gpu_free(&cache), gpu_free(&out), gpu_free(&again), gpu_free(&scratch);
    free(want);
}

static void test_attention_cached(void) {
    attention_cached_shape(1, 0, 1, 1, 64);      // one key
    attention_cached_shape(1, 0, 4, 2, 48);      // ring takes it not
    attention_cached_shape(1, 16, 6, 2, 128);    // a tile and a key more
    attention_cached_shape(1, 127, 32, 8, 64);   // one split
    attention_cached_shape(1, 128, 32, 8, 64);   // two, the second of one key
    attention_cached_shape(1, 1029, 32, 8, 128); // several
    attention_cached_shape(1, 700, 22, 2, 128);  // more than 8 heads to a kv head
    attention_cached_shape(1, 300, 34, 2, 64);   // more than ring takes
    attention_cached_shape(1, 513, 5, 5, 64);    // no groups
    attention_cached_shape(7, 0, 4, 2, 64);      // a prompt
    attention_cached_shape(33, 290, 6, 2, 128);  // the rest of one
    attention_cached_shape(3, 40, 4, 1, 24);
    attention_cached_shape(1, 39999, 8, 1, 64); // as many splits as there may be
}
