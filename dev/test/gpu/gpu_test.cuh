/*
What every GPU test uses: arrays on the GPU whose surroundings are watched, comparison with the CPU's result, a count of
failures.

    inputs      gpu_random, gpu_upload: on the GPU rounded to the storage type; host holds the rounded values, so that the
                CPU reference sees the same numbers
    outputs     gpu_poison: NaN everywhere, so that what a kernel does not write is noticed
    guards      256 bytes of NaN before and after each array: a read beyond poisons the result, a write beyond is found by
                gpu_check and gpu_free
    tolerance   gpu_tolerance(roundings): of that many roundings to bf16, relative to the largest number of the array (see
                llmc/check.h); 1e-5 when floatX is float, where the order of the sums is what differs

    static void test_op(void) {
        GpuArray x = gpu_random(n, 1, 1), y = gpu_poison(n);
        op_forward(y.x, x.x, n, 0);
        op_forward_cpu(want, x.host, n);
        gpu_check("op forward", y, want, n, gpu_tolerance(1));
        gpu_free(&x), gpu_free(&y);
    }

A test that fails goes on. gpu_test_main prints a line for each test. Numbers are compared by llmc/check.h alone.
*/
#pragma once

#include <stdarg.h>
#include <stdlib.h>
#include <time.h>
#include <type_traits>

#include "llmc/check.h"
#include "llmc/gpu.cuh"
#include "llmc/random.h"

// ---- failures --------------------------------------------------------------------------------

inline int gpu_checks, gpu_failures; // of the test that runs
inline bool gpu_reduced;             // under compute-sanitizer, a hundred times slower: leave the large shapes out
inline bool gpu_ours;                // run no library's kernels: racecheck does not survive those of cuBLAS

// counts a check; when it does not hold, prints the line and counts a failure. Returns whether it held
__attribute__((format(printf, 2, 3))) static inline bool gpu_expect(bool ok, const char* format, ...) {
    gpu_checks++;
    if (ok) return true;
    gpu_failures++;
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return false;
}

// ---- tolerance -------------------------------------------------------------------------------

// half a unit in the last place of 1: the largest relative error of one rounding
static const double BF16_EPS = 0x1p-8, FP32_EPS = 0x1p-24;
static const double FLOATX_EPS = sizeof(floatX) == 2 ? BF16_EPS : FP32_EPS;

static inline double gpu_tolerance(double roundings) { return sizeof(floatX) == 2 ? roundings * BF16_EPS : 1e-5; }

// ---- arrays ----------------------------------------------------------------------------------

enum { GPU_GUARD = 256 }; // bytes on each side; keeps the alignment of cudaMalloc

template <typename T> struct Gpu {
    T* x;        // on the GPU, n numbers
    float* host; // inputs: the same numbers, as float. Outputs: NULL
    size_t n;
};
typedef Gpu<floatX> GpuArray;
typedef Gpu<float> GpuFloats; // r of RMSNorm, lse of attention, losses, master weights
typedef Gpu<int32_t> GpuInts; // ids and labels: no host copy
typedef Gpu<char> GpuBytes;   // scratch

// n numbers whose bits are all ones: NaN as bf16 and as float, -1 as an integer
template <typename T> static Gpu<T> gpu_allocate(size_t n) {
    char* base;
    size_t bytes = n * sizeof(T);
    cuda_check(cudaMalloc((void**)&base, bytes + 2 * GPU_GUARD));
    cuda_check(cudaMemset(base, 0xff, bytes + 2 * GPU_GUARD));
    cuda_check(cudaDeviceSynchronize());
    return Gpu<T>{ (T*)(base + GPU_GUARD), NULL, n };
}

static inline GpuArray gpu_poison(size_t n) { return gpu_allocate<floatX>(n); }
static inline GpuFloats gpu_poison_floats(size_t n) { return gpu_allocate<float>(n); }
static inline GpuBytes gpu_scratch(size_t bytes) { return gpu_allocate<char>(bytes); }

// whether nothing was written beside the array
template <typename T> static bool gpu_guards_hold(const Gpu<T>* a) {
    unsigned char guard[GPU_GUARD];
    const char* sides[2] = { (const char*)a->x - GPU_GUARD, (const char*)(a->x + a->n) };
    for (int side = 0; side < 2; side++) {
        cuda_check(cudaMemcpy(guard, sides[side], GPU_GUARD, cudaMemcpyDeviceToHost));
        for (int i = 0; i < GPU_GUARD; i++)
            if (guard[i] != 0xff) {
                int distance = side ? i : GPU_GUARD - i;
                fprintf(stderr, "written %d bytes %s an array of %zu\n", distance, side ? "after" : "before", a->n);
                return false;
            }
    }
    return true;
}

// waits for the GPU first, so that what its kernels did wrong is reported here
template <typename T> static void gpu_free(Gpu<T>* a) {
    cuda_check(cudaDeviceSynchronize());
    gpu_expect(gpu_guards_hold(a), "a guard was overwritten");
    cuda_check(cudaFree((char*)a->x - GPU_GUARD));
    free(a->host);
    *a = Gpu<T>{ NULL, NULL, 0 };
}

// ---- between host and GPU --------------------------------------------------------------------

// as stored in a T, and back
template <typename T> static T gpu_round(float x) {
    if constexpr (std::is_same<T, __nv_bfloat16>::value) return __float2bfloat16_rn(x);
    else return (T)x;
}
template <typename T> static float gpu_unround(T x) {
    if constexpr (std::is_same<T, __nv_bfloat16>::value) return __bfloat162float(x);
    else return (float)x;
}

template <typename T> static Gpu<T> gpu_upload_as(const float* values, size_t n) {
    Gpu<T> a = gpu_allocate<T>(n);
    T* stored = (T*)allocate(n, sizeof(T));
    a.host = (float*)allocate(n, sizeof(float));
    for (size_t i = 0; i < n; i++) {
        stored[i] = gpu_round<T>(values[i]);
        a.host[i] = gpu_unround(stored[i]);
    }
    cuda_check(cudaMemcpy(a.x, stored, n * sizeof(T), cudaMemcpyHostToDevice));
    free(stored);
    return a;
}
static inline GpuArray gpu_upload(const float* values, size_t n) { return gpu_upload_as<floatX>(values, n); }
static inline GpuFloats gpu_upload_floats(const float* values, size_t n) { return gpu_upload_as<float>(values, n); }

static inline GpuInts gpu_upload_ints(const int32_t* values, size_t n) {
    GpuInts a = gpu_allocate<int32_t>(n);
    cuda_check(cudaMemcpy(a.x, values, n * sizeof *values, cudaMemcpyHostToDevice));
    return a;
}

// normal, standard deviation scale, mean offset; the same for a seed on every run
template <typename T> static Gpu<T> gpu_random_as(size_t n, uint64_t seed, float scale, float offset) {
    float* values = (float*)allocate(n, sizeof *values);
#pragma omp parallel for
    for (int64_t i = 0; i < (int64_t)n; i++) values[i] = offset + scale * random_normal(seed, 0, (uint64_t)i);
    Gpu<T> a = gpu_upload_as<T>(values, n);
    free(values);
    return a;
}
static inline GpuArray gpu_random(size_t n, uint64_t seed, float scale, float offset = 0) {
    return gpu_random_as<floatX>(n, seed, scale, offset);
}
static inline GpuFloats gpu_random_floats(size_t n, uint64_t seed, float scale, float offset = 0) {
    return gpu_random_as<float>(n, seed, scale, offset);
}

// the numbers on the GPU from first on, as floats; owned by the caller. Waits for the kernels
template <typename T> static float* gpu_read(const Gpu<T>* a, size_t first, size_t n) {
    T* stored = (T*)allocate(n, sizeof(T));
    float* values = (float*)allocate(n, sizeof *values);
    cuda_check(cudaDeviceSynchronize());
    cuda_check(cudaMemcpy(stored, a->x + first, n * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) values[i] = gpu_unround(stored[i]);
    free(stored);
    return values;
}

// ---- large arrays: filled and read in part, so that the host needs no copy ---------------------

// one thread a number, in strides of the grid
template <typename T>
static __global__ void gpu_fill_kernel(T* x, size_t n, size_t first, uint64_t seed, float scale) {
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        x[i] = from_float<T>(scale * random_normal(seed, 0, first + i));
}

// overwrites n numbers from first on with what gpu_random(…, seed, scale) has there
template <typename T> static void gpu_fill(Gpu<T>* a, size_t first, size_t n, uint64_t seed, float scale) {
    gpu_fill_kernel<T><<<(unsigned)(8 * gpu_processors()), 256, 0, 0>>>(a->x + first, n, first, seed, scale);
    launch_check();
    cuda_check(cudaDeviceSynchronize());
}

// whether the GPU has that much memory free; prints that the test is skipped when not
static inline bool gpu_has_room(const char* name, size_t bytes) {
    size_t unused, total;
    cuda_check(cudaMemGetInfo(&unused, &total));
    if (bytes + ((size_t)1 << 30) <= unused) return true;
    fprintf(stderr, "skipped: %s needs %.1f GB, %.1f are free\n", name, (double)bytes / 1e9, (double)unused / 1e9);
    return false;
}

// ---- comparison ------------------------------------------------------------------------------

// the largest fraction of its tolerance that any check of this test used, and which
inline double gpu_worst_used;
inline char gpu_worst_name[256];

static inline bool gpu_check_values(const char* name, const float* got, const float* want, size_t n, double tolerance) {
    Check c = check_compare(got, want, n, tolerance);
    if (n && c.ok && c.used >= gpu_worst_used) {
        gpu_worst_used = c.used;
        snprintf(gpu_worst_name, sizeof gpu_worst_name, "%s", name);
    }
    return gpu_expect(n && check_close(name, got, want, n, tolerance), "%s: differs", name);
}

// numbers first .. first+n-1 of the array
template <typename T>
static bool gpu_check_at(const char* name, Gpu<T> a, size_t first, const float* want, size_t n, double tolerance) {
    if (!gpu_expect(first + n <= a.n, "%s: %zu numbers at %zu of an array of %zu", name, n, first, a.n)) return false;
    float* got = gpu_read(&a, first, n);
    bool ok = gpu_check_values(name, got, want, n, tolerance);
    ok &= gpu_expect(gpu_guards_hold(&a), "%s: a guard was overwritten", name);
    free(got);
    return ok;
}

// the first n numbers of the array
template <typename T> static bool gpu_check(const char* name, Gpu<T> a, const float* want, size_t n, double tolerance) {
    return gpu_check_at(name, a, 0, want, n, tolerance);
}

// the same bits in both arrays, and no NaN
template <typename T> static bool gpu_check_same(const char* name, Gpu<T> a, Gpu<T> b) {
    if (!gpu_expect(a.n == b.n && a.n, "%s: %zu and %zu numbers", name, a.n, b.n)) return false;
    float *x = gpu_read(&a, 0, a.n), *y = gpu_read(&b, 0, b.n);
    size_t i = 0;
    while (i < a.n && memcmp(&x[i], &y[i], sizeof *x) == 0 && check_finite((double)x[i])) i++;
    bool ok = gpu_expect(i == a.n, "%s[%zu of %zu]: %.9g and %.9g, expected the same bits", name, i, a.n,
                         (double)x[i == a.n ? 0 : i], (double)y[i == a.n ? 0 : i]);
    free(x), free(y);
    return ok;
}

// the array still holds what was uploaded: its host copy, bit for bit
template <typename T> static bool gpu_check_unchanged(const char* name, Gpu<T> a) {
    float* got = gpu_read(&a, 0, a.n);
    bool ok = gpu_expect(memcmp(got, a.host, a.n * sizeof *got) == 0, "%s: an input was changed", name);
    free(got);
    return ok;
}

// ---- running ---------------------------------------------------------------------------------

typedef struct {
    const char* name;
    void (*run)(void);
} GpuTest;

// of all files that are linked together, in the order of linking
inline GpuTest gpu_tests[64];
inline int gpu_n_tests;

// at the end of a file: adds test_NAME to the list
#define GPU_TEST(name) GPU_TEST_(name)
#define GPU_TEST_(name) static const bool listed_##name = gpu_list_test(#name, test_##name)
static inline bool gpu_list_test(const char* name, void (*run)(void)) {
    require(gpu_n_tests < 64, "the list of tests is long enough");
    gpu_tests[gpu_n_tests++] = GpuTest{ name, run };
    return true;
}

static inline double gpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// runs one test and prints a line; returns whether it passed. A test that checks nothing has failed
static inline bool gpu_run_test(const GpuTest* test) {
    gpu_checks = gpu_failures = 0;
    gpu_worst_used = 0;
    gpu_worst_name[0] = 0;
    double start = gpu_seconds();
    test->run();
    cuda_check(cudaDeviceSynchronize());
    bool ok = gpu_checks && !gpu_failures;
    printf("%-4s %-20s %5d checks %4d failed %6.1f s   %5.1f%% of the tolerance used: %s\n", ok ? "ok" : "FAIL",
           test->name, gpu_checks, gpu_failures, gpu_seconds() - start, 100 * gpu_worst_used, gpu_worst_name);
    fflush(stdout);
    return ok;
}

// the main function of a test program: [--reduced] [--ours] [NAME …]; without names, all tests. 0: all passed
static inline int gpu_test_main(int argc, char** argv) {
    int device = 0, failed = 0, named = 0;
    cudaDeviceProp properties;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaGetDeviceProperties(&properties, device));
    printf("%s, sm_%d%d, %s\n", properties.name, properties.major, properties.minor,
           sizeof(floatX) == 2 ? "BF16" : "FP32");
    for (int i = 1; i < argc; i++) {
        const bool reduced = strcmp(argv[i], "--reduced") == 0, ours = strcmp(argv[i], "--ours") == 0;
        bool known = reduced || ours;
        for (int j = 0; j < gpu_n_tests; j++) known |= strcmp(argv[i], gpu_tests[j].name) == 0;
        if (!known) die("no test %s: [--reduced] [--ours] [NAME …]", argv[i]);
        gpu_reduced |= reduced;
        gpu_ours |= ours;
        named += !reduced && !ours;
    }
    for (int j = 0; j < gpu_n_tests; j++) {
        bool selected = !named;
        for (int i = 1; i < argc; i++) selected |= strcmp(argv[i], gpu_tests[j].name) == 0;
        if (selected && !gpu_run_test(&gpu_tests[j])) failed++;
    }
    printf(failed ? "%d tests failed\n" : "all passed\n", failed);
    return failed != 0;
}
