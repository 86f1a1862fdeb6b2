/*
Who computes attention: of the back ends that take a shape, the fastest by the clock.

    attention_fastest(shape, backward, …)      cuDNN's or our own, each timed once for a shape over random numbers
    attention_choices_write, _read             what was chosen, as text: a resumed run repeats its bits

The clock decides between cudnn and hopper alone: mma, and reference behind it, are for what neither takes. What it found on
one H200, forward and backward together, milliseconds of hopper and of cuDNN, reproducible and (in brackets) not:

    1B, 32/8 heads of 64      8 x 2048     1.39 (1.38)   1.71 (1.44)        2 x 8192     4.33 (4.09)   6.85 (4.49)
    3B, 24/8 heads of 128     1 x 8192     2.98 (2.55)   3.62 (2.65)
    150M, 12/4 heads of 64    16 x 1024    0.37 (0.37)   0.41 (0.39)
*/
#pragma once

#include "attention.h"
#include "matmul_cublas.cuh"

enum { ATTENTION_TIMED_ROWS = 16384, ATTENTION_CHOICES = 64 }; // tokens that a back end is timed with, about; shapes remembered

typedef struct {
    AttentionShape shape; // B: as timed
    bool backward, fast;
    AttentionBackend backend;
    float ms[N_ATTENTION]; // 0: not timed here
} AttentionChoice;

static struct {
    AttentionChoice choices[ATTENTION_CHOICES];
    int n;
} attention_chosen;

// milliseconds of a forward pass, and of a backward pass when asked for: the fastest of three after one that warms up. 0 when
// there is no memory for it
static inline float attention_time(AttentionBackend backend, AttentionShape s, bool backward, cudaStream_t stream) {
    const int64_t rows = (int64_t)s.B * s.T, n = rows * (s.NH + 2 * s.NKV) * s.HD, n_out = rows * s.NH * s.HD;
    const size_t room = attention_scratch(backend, s, backward);
    floatX *qkv = (floatX*)matmul_random<floatX>(n, 1, stream), *out = (floatX*)matmul_random<floatX>(n_out, 2, stream);
    floatX *dqkv = (floatX*)matmul_random<floatX>(backward ? n : 1, 3, stream);
    floatX *dout = (floatX*)matmul_random<floatX>(backward ? n_out : 1, 4, stream);
    float* lse = (float*)matmul_random<float>(rows * s.NH, 5, stream);
    float* scratch = (float*)matmul_random<float>((int64_t)(room / sizeof(float)) + 1, 6, stream);
    float fastest = 0;
    if (qkv && out && dqkv && dout && lse && scratch) {
        cudaEvent_t start, stop;
        cuda_check(cudaEventCreate(&start));
        cuda_check(cudaEventCreate(&stop));
        for (int i = 0; i < 4; i++) {
            float ms;
            cuda_check(cudaEventRecord(start, stream));
            attention_forward(backend, out, lse, qkv, s, scratch, stream);
            if (backward) attention_backward(backend, dqkv, dout, qkv, out, lse, s, scratch, room, stream);
            cuda_check(cudaEventRecord(stop, stream));
            cuda_check(cudaEventSynchronize(stop));
            cuda_check(cudaEventElapsedTime(&ms, start, stop));
            if (i == 1 || (i > 1 && ms < fastest)) fastest = ms;
        }
        cudaEventDestroy(start), cudaEventDestroy(stop);
    }
    cuda_check(cudaStreamSynchronize(stream));
    cudaFree(qkv), cudaFree(out), cudaFree(dqkv), cudaFree(dout), cudaFree(lse), cudaFree(scratch);
    return fastest;
}

// the choice for a shape, a new one when there is none; NULL when there are too many
static inline AttentionChoice* attention_choice(AttentionShape s, bool backward, bool fast) {
    for (AttentionChoice* c = attention_chosen.choices; c < attention_chosen.choices + attention_chosen.n; c++)
        if (memcmp(&c->shape, &s, sizeof s) == 0 && c->backward == backward && c->fast == fast) return c;
    if (attention_chosen.n == ATTENTION_CHOICES) return NULL;
    AttentionChoice* c = &attention_chosen.choices[attention_chosen.n++];
    memset(c, 0, sizeof *c);
    c->shape = s, c->backward = backward, c->fast = fast, c->backend = N_ATTENTION;
    return c;
}

// the fastest back end. why: what was passed over, and for which reason; empty when nothing was
static inline AttentionBackend attention_fastest(AttentionShape shape, bool backward, Error* why, cudaStream_t stream) {
    AttentionShape s = shape;
    Error reason;
    const bool fast = attention_is_fast();
    if (!attention_supports(ATTENTION_CUDNN, s, backward, &reason) || !attention_supports(ATTENTION_HOPPER, s, backward, &reason))
        return attention_choose(ATTENTION_CUDNN, shape, backward, why);
    s.B = min(s.B, max(1, ATTENTION_TIMED_ROWS / s.T));
    AttentionChoice* c = attention_choice(s, backward, fast);
    if (!c) return attention_choose(ATTENTION_CUDNN, shape, backward, why);
    if (c->backend == N_ATTENTION) {
        float *ours = &c->ms[ATTENTION_HOPPER], *theirs = &c->ms[ATTENTION_CUDNN];
        *ours = attention_time(ATTENTION_HOPPER, s, backward, stream);
        *theirs = attention_time(ATTENTION_CUDNN, s, backward, stream);
        c->backend = *ours < *theirs ? ATTENTION_HOPPER : ATTENTION_CUDNN;
    }
    const AttentionBackend other = c->backend == ATTENTION_HOPPER ? ATTENTION_CUDNN : ATTENTION_HOPPER;
    why->text[0] = 0;
    if (c->ms[other] > 0)
        set_error(why, "%.2f ms for %d x %d tokens; not %s: %.2f ms", (double)c->ms[c->backend], s.B, s.T, attention_names[other],
                  (double)c->ms[other]);
    return c->backend;
}

// ---- what a resumed run goes by --------------------------------------------------------------

enum { ATTENTION_LINE = 128 };

// a line for each choice; owned by the caller
static inline char* attention_choices_write(void) {
    char* text = (char*)allocate((size_t)attention_chosen.n + 1, ATTENTION_LINE);
    size_t used = 0;
    for (int i = 0; i < attention_chosen.n; i++) {
        const AttentionChoice* c = &attention_chosen.choices[i];
        const AttentionShape s = c->shape;
        used += (size_t)snprintf(text + used, ATTENTION_LINE, "attention B %d T %d NH %d NKV %d HD %d backward %d fast %d: %s\n", s.B, s.T,
                                 s.NH, s.NKV, s.HD, c->backward, c->fast, attention_names[c->backend]);
    }
    return text;
}

// takes over the choices among the lines; others are left alone, and so is a back end that this program lacks
static inline void attention_choices_read(const char* text) {
    for (const char* line = strstr(text, "attention B "); line; line = strstr(line + 1, "attention B ")) {
        AttentionShape s;
        int backward, fast;
        char name[16];
        if (sscanf(line, "attention B %9d T %9d NH %9d NKV %9d HD %9d backward %1d fast %1d: %15s", &s.B, &s.T, &s.NH, &s.NKV, &s.HD,
                   &backward, &fast, name) != 8)
            continue;
        for (int i = 0; i < N_ATTENTION; i++) {
            const bool known = strcmp(name, attention_names[i]) == 0 && attention_built_with((AttentionBackend)i);
            AttentionChoice* c = known ? attention_choice(s, backward, fast) : NULL;
            if (c) c->backend = (AttentionBackend)i;
        }
    }
}
