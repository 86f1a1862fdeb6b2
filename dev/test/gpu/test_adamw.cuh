/*
AdamW on the GPU against the CPU, with and without master weights, with moments in fp32 and bf16; rounding at random; the norm
of the gradient.

Tolerance: arithmetic in fp32, 1e-5. What is rounded at random has the CPU's random bits: only where the two differ in the last
place of fp32 can it fall to the other side, one unit in the last place of bf16 away, which is two roundings.
*/
#pragma once

#include "gpu_test.cuh"
#include "llmc/adamw.h"

static const double ADAMW_TOLERANCE = 1e-5;
static const float ADAMW_LR = 1e-2f, ADAMW_BETA1 = 0.9f, ADAMW_BETA2 = 0.95f, ADAMW_EPS = 1e-8f, ADAMW_DECAY = 0.1f;
enum { ADAMW_SEED = 42, ADAMW_TENSOR = 7 };

// x as the kernel stores it in a T: bits are those of its 16 random ones
template <typename T>
static float adamw_test_stored(float x, uint64_t bits) {
    return sizeof(T) == 4 ? x : bf16_to_float(adamw_round(x, (uint32_t)bits));
}

// some steps on the GPU, each beside the same step on the CPU from the numbers that the GPU had
template <typename M>
static void adamw_test_steps(size_t n, bool with_master) {
    const float scale = 0.5f;
    GpuArray w = gpu_random(n, 1, 1);
    GpuFloats master = gpu_upload_floats(w.host, n), grad_scale = gpu_upload_floats(&scale, 1);
    float* zeros = (float*)allocate(n, sizeof(float));
    Gpu<M> m = gpu_upload_as<M>(zeros, n), v = gpu_upload_as<M>(zeros, n);
    for (int step = 1; step <= 4; step++) {
        GpuArray g = gpu_random(n, (uint64_t)(10 + step), 0.3f);
        float *want_w = with_master ? gpu_read(&master, 0, n) : gpu_read(&w, 0, n), *want_m = gpu_read(&m, 0, n),
              *want_v = gpu_read(&v, 0, n);
        adamw(w.x, with_master ? master.x : NULL, m.x, v.x, g.x, n, ADAMW_LR, ADAMW_BETA1, ADAMW_BETA2, ADAMW_EPS,
              ADAMW_DECAY, step, grad_scale.x, ADAMW_SEED, ADAMW_TENSOR, 0);
        adamw_cpu(want_w, want_m, want_v, g.host, n, ADAMW_LR, ADAMW_BETA1, ADAMW_BETA2, ADAMW_EPS, ADAMW_DECAY, step,
                  scale);
        if (with_master) gpu_check("adamw master", master, want_w, n, ADAMW_TOLERANCE);
        const uint64_t key = adamw_key(ADAMW_SEED, ADAMW_TENSOR, step);
        for (size_t i = 0; i < n; i++) {
            uint64_t bits = adamw_bits(key, i);
            want_m[i] = adamw_test_stored<M>(want_m[i], bits);
            want_v[i] = adamw_test_stored<M>(want_v[i], bits >> 16);
            want_w[i] = with_master ? gpu_unround(gpu_round<floatX>(want_w[i]))
                                    : adamw_test_stored<floatX>(want_w[i], bits >> 32);
        }
        const double moment = sizeof(M) == 2 ? 2 * BF16_EPS : ADAMW_TOLERANCE;
        gpu_check("adamw m", m, want_m, n, moment);
        gpu_check("adamw v", v, want_v, n, moment);
        gpu_check("adamw w", w, want_w, n, sizeof(floatX) == 2 ? 2 * BF16_EPS : ADAMW_TOLERANCE);
        free(want_w), free(want_m), free(want_v), gpu_free(&g);
    }
    free(zeros), gpu_free(&w), gpu_free(&master), gpu_free(&grad_scale), gpu_free(&m), gpu_free(&v);
}

// a change of a hundredth of a unit in the last place arrives in the mean: weights of 1, which all move by -lr
static void adamw_test_rounding(void) {
    const size_t n = 1 << 20;
    const float one = 1, lr = 1e-4f, place = 0x1p-8f; // below 1, units in the last place are 2^-8
    float *ones = (float*)allocate(n, sizeof(float)), *zeros = (float*)allocate(n, sizeof(float));
    for (size_t i = 0; i < n; i++) ones[i] = 1;
    GpuArray w = gpu_upload(ones, n), g = gpu_upload(ones, n), again = gpu_upload(ones, n);
    GpuFloats m = gpu_upload_floats(zeros, n), v = gpu_upload_floats(zeros, n), scale = gpu_upload_floats(&one, 1);
    adamw(w.x, (float*)NULL, m.x, v.x, g.x, n, lr, 0.9f, 0.95f, 0.0f, 0.0f, 1, scale.x, 1, 1, 0);
    cuda_check(cudaMemset(m.x, 0, n * sizeof(float)));
    cuda_check(cudaMemset(v.x, 0, n * sizeof(float)));
    adamw(again.x, (float*)NULL, m.x, v.x, g.x, n, lr, 0.9f, 0.95f, 0.0f, 0.0f, 1, scale.x, 1, 2, 0); // another tensor
    float *got = gpu_read(&w, 0, n), *other = gpu_read(&again, 0, n);
    double mean = 0, strange = 0, same = 0;
    for (size_t i = 0; i < n; i++) {
        mean += (1 - (double)got[i]) / (double)n;
        strange += sizeof(floatX) == 2 && got[i] != 1 && got[i] != 1 - place;
        same += got[i] != 1 && other[i] != 1;
    }
    const double chance = (double)lr / (double)place, deviation = (double)place * sqrt(chance / (double)n);
    gpu_expect(fabs(mean - (double)lr) < 5 * deviation + 1e-7, "adamw: the mean step is %.3g, expected %.3g", mean,
               (double)lr);
    gpu_expect(strange == 0, "adamw: %g weights left both neighbours", strange);
    if (sizeof(floatX) == 2) // both tensors step at the same index as often as chance has it
        gpu_expect(fabs(same - chance * chance * (double)n) < 5 * chance * sqrt((double)n),
                   "adamw: %g weights step in both tensors, expected %g", same, chance * chance * (double)n);
    free(ones), free(zeros), free(got), free(other);
    gpu_free(&w), gpu_free(&g), gpu_free(&again), gpu_free(&m), gpu_free(&v), gpu_free(&scale);
}

// what the norm of some tensors and the factor are; the sums are clear afterwards
static void adamw_test_norm(const size_t* sizes, int count, float size, float clip, float spoil) {
    GpuFloats norm = gpu_poison_floats(2);
    Gpu<double> sums = gpu_allocate<double>(global_norm_scratch() / sizeof(double));
    cuda_check(cudaMemset(sums.x, 0, global_norm_scratch()));
    float got[2][2];
    double total = 0;
    for (int run = 0; run < 2; run++) {
        total = 0;
        for (int i = 0; i < count; i++) {
            GpuArray g = gpu_random(sizes[i], (uint64_t)i, size);
            if (spoil != 0 && i == count - 1) {
                floatX bad = gpu_round<floatX>(spoil);
                cuda_check(cudaMemcpy(g.x + sizes[i] - 1, &bad, sizeof bad, cudaMemcpyHostToDevice));
                g.host[sizes[i] - 1] = gpu_unround(bad);
            }
            sum_of_squares(sums.x, g.x, sizes[i], 0);
            total += sum_of_squares_cpu(g.host, sizes[i]);
            gpu_free(&g);
        }
        global_norm(norm.x, sums.x, clip, 0);
        cuda_check(cudaMemcpy(got[run], norm.x, sizeof got[run], cudaMemcpyDeviceToHost));
    }
    const float want = (float)sqrt(total), factor = clip > 0 && clip / (want + 1e-6f) < 1 ? clip / (want + 1e-6f) : 1;
    if (isfinite(want)) {
        gpu_check_values("global norm", &got[0][0], &want, 1, 1e-6);
        gpu_check_values("clip factor", &got[0][1], &factor, 1, 1e-6);
        gpu_expect(memcmp(got[0], got[1], sizeof got[0]) == 0, "global norm: the same bits again, %.9g and %.9g",
                   (double)got[0][0], (double)got[1][0]);
    } else
        gpu_expect(!isfinite(got[0][0]) && isnan(got[0][1]), "a norm of %g, factor %g: expected neither to be finite",
                   (double)got[0][0], (double)got[0][1]);
    gpu_free(&norm), gpu_free(&sums);
}

// a factor that is not finite changes nothing
static void adamw_test_stop(void) {
    const size_t n = 4096;
    const float bad = NAN;
    GpuArray w = gpu_random(n, 1, 1), g = gpu_random(n, 2, 1);
    GpuFloats master = gpu_random_floats(n, 3, 1), m = gpu_random_floats(n, 4, 1), v = gpu_random_floats(n, 5, 1),
              scale = gpu_upload_floats(&bad, 1);
    adamw(w.x, master.x, m.x, v.x, g.x, n, 0.1f, 0.9f, 0.95f, 1e-8f, 0.1f, 1, scale.x, 1, 1, 0);
    gpu_check_unchanged("adamw w, norm not finite", w);
    gpu_check_unchanged("adamw master, norm not finite", master);
    gpu_check_unchanged("adamw m, norm not finite", m);
    gpu_check_unchanged("adamw v, norm not finite", v);
    gpu_free(&w), gpu_free(&g), gpu_free(&master), gpu_free(&m), gpu_free(&v), gpu_free(&scale);
}

static void test_adamw(void) {
    const size_t sizes[] = { 8, 2048, 2056, 8192, 100008, 3 * 1024 * 1024 + 8 };
    for (int i = 0; i < 5; i++)
        for (int with_master = 0; with_master < 2; with_master++) {
            adamw_test_steps<float>(sizes[i], with_master);
            adamw_test_steps<__nv_bfloat16>(sizes[i], with_master);
        }
    adamw_test_rounding();
    adamw_test_stop();
    adamw_test_norm(sizes, 6, 0.01f, 1, 0);
    adamw_test_norm(sizes, 6, 0.01f, 0, 0);
    adamw_test_norm(sizes, 6, 1e-5f, 1, 0);
    adamw_test_norm(sizes + 5, 1, 1, 1, 0);
    adamw_test_norm(sizes, 3, 1, 1, 1e18f);
    adamw_test_norm(sizes, 6, 1, 1, INFINITY);
    adamw_test_norm(sizes, 6, 1, 1, NAN);
}
