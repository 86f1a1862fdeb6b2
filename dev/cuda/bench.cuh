/*
The kernel lab's harness: one table per problem and shape, one row per variant; a variant is checked before it is timed.

    #include "bench.cuh"
    struct Problem { … };                                                      a file's own: sizes and pointers
    static const Shape shapes[] = { { .name = "1B", .N = 16384, .C = 2048 }, { .name = "one row", .small = true, … } };
    static Problem setup(Bench* b, const Shape* s);                            allocates, through b
    static void reference(Bench* b, const Problem* p, int64_t first, int64_t count);    the CPU's rows, given to b->expect
    static int64_t rows(const Problem* p);                                     how many rows reference knows
    static double traffic(const Problem* p);                                   bytes any right kernel must move, at least once
    static double flops(const Problem* p);                                     0 where bytes are what bounds it
    static const Variant<Problem> variants[] = { { name, launcher, { block sizes }, what changed, refuses }, … };
    BENCH_MAIN("op", shapes, setup, reference, rows, traffic, flops, variants)

Arrays          belong to the Bench, which frees them after the shape. Around each lie 64 KB of fence, all bits set: NaN to
                whoever reads them, and a write there is found. pointer arithmetic aside, a file sees plain T*

    b->input<T>(name, n, scale, mean)       random normal numbers, rounded to T. b->input_ids(name, n, below): 0 … below-1
    b->input_from(name, host, n)            a copy of these
    b->output<T>(name, n, terms)            all bits set (NaN, -1) before every checked launch; terms: see Tolerance
    b->in_place<T>(name, n, scale, terms, mean)     random at the start, restored before every launch; an output too
    b->in_place_from(name, host, n, terms)  the same, from these numbers
    b->scratch<T>(n)                        all bits set before every checked launch; what is written there is not compared
    b->host(x)                              an input (or an in_place array as it is at the start), as floats; made once
    b->host(x, first, n)                    n numbers of it from first on: [0] is number first. For arrays too large to keep
    b->host_ids(ids), b->stored(x)          the same as they are stored: int32_t, T
    b->expect(y, first, values, n)          the CPU's numbers first … first+n-1 of that output
    b->unspecified(y, first, n)             the op says nothing of these (padding): they are not compared

Checks          Every block size of every variant, two launches at least, on every shape. After each launch: no CUDA error, no
                fence touched, no input changed, what the CPU expects, and on real shapes what production wrote, in full.
    small       reference is called once, for all rows. All of every output must be expected or unspecified
    real        reference is called for sampled rows: the first, the last, some between. (Outputs that sum over rows are
                expected when first == 0 && count == rows.) Production is checked first and its outputs are kept: they
                must be finite, and those of the other variants are compared with them on the GPU
    streams     launches go to a stream that waits for no other, behind work that delays it: a launch that forgets its
                stream runs before the outputs are poisoned, and is found to have written nothing
    afterwards  the outputs of the last timed launch are compared once more
A variant that is wrong on one shape is timed on none. A fault (an illegal address) ends the program and names the variant.

Tolerance       |got - want| <= tolerance * max |want|, per output, as in llmc/check.h; NaN is found by its bits. From the
                arithmetic, the same for all files: 2 roundings to T, 2^-24 * (16 + 4 sqrt(terms)) for fp32 arithmetic, where
                terms is how many products a number is the sum of. output and in_place take one more number, roundings: how
                often a number on the way is rounded to floatX (probabilities of attention, sums stored between two steps);
                each allows two more. Twice as much between two variants. Integers must be equal

Times           For each launch: in_place arrays restored; the L2 filled with lines that are only read; event, launch, event.
                The queue is kept full, so that no launch waits for the host. The median, and the range from 10 to 90 % of the
                launches relative to it ("spread"); 5 launches choose the block size, at most 0.3 s and 50 launches give the
                figures. Copies of as many bytes (half read, half written) run between them under the same rules: "% of
                peak" is beside their median. Where flops are given, it is beside the row YARDSTICK: "library", unless the file
                defines another name before it includes this one
Reference row   "x production" is beside the row "production"; in files without one, beside YARDSTICK, else the last row

    #define BENCH_DTYPE "fp32"              before the include, in a file whose problem does not follow floatX
*/
#pragma once

#include <cuda_profiler_api.h>
#include <math.h>
#include <time.h>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "llmc/check.h"
#include "llmc/gpu.cuh"
#include "llmc/random.h"

#ifndef YARDSTICK
#define YARDSTICK "library"
#endif
#ifndef BENCH_DTYPE
#define BENCH_DTYPE (sizeof(floatX) == 2 ? "bf16" : "fp32")
#endif

// sizes by the legend's letters (llmc/llama3.h); 0: the op does not use it
struct Shape {
    const char* name = "";
    bool small = false; // checked in full, not timed
    int B = 0, T = 0, N = 0, C = 0, NH = 0, NKV = 0, HD = 0, F = 0, V = 0;
};

template <typename P>
struct Variant {
    const char* name; // the idea, never a number
    void (*launch)(const P* p, int block, cudaStream_t stream);
    int blocks[6];    // block sizes to try; 0 ends the list. { 0 }: the launcher knows
    const char* what; // what changed, or why it ships
    const char* (*refuses)(const P* p) =
        nullptr; // NULL, or why it does not take this problem; returns NULL when it does
};

enum {
    BENCH_FENCE = 1 << 16, // bytes on each side
    BENCH_SAMPLES = 6,     // rows that the CPU computes of a real shape
    BENCH_LAUNCHES = 50,
    BENCH_TRIES = 5, // launches that choose the block size
    BENCH_FAULT = 99 // the exit code after a fault
};
static const double BENCH_ROW_SECONDS = 0.3;

static inline double bench_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

__attribute__((format(printf, 1, 2))) static inline std::string bench_text(const char* format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return text;
}

// ---- kernels of the harness ------------------------------------------------------------------

// what a kernel below found
struct BenchFound {
    unsigned long long first, bad; // index of the first bad number (all ones: none), how many there are
    unsigned long long sum;
    unsigned worst; // bits of a float that is not negative
};

static inline unsigned bench_grid(size_t n) {
    return (unsigned)std::min<size_t>((size_t)ceil_div((int64_t)n, 256), 8 * (size_t)gpu_processors());
}

__device__ __forceinline__ bool bench_finite(float x) { return (__float_as_uint(x) >> 23 & 0xff) != 0xff; }

__device__ __forceinline__ void bench_found(BenchFound* found, unsigned long long first, unsigned long long bad,
                                            float worst) {
    if (bad) atomicMin(&found->first, first), atomicAdd(&found->bad, bad);
    if (worst > 0) atomicMax(&found->worst, __float_as_uint(worst));
}

template <typename T>
static __global__ void bench_fill_kernel(T* x, size_t n, uint64_t seed, uint64_t stream, float scale, float mean) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        x[i] = from_float<T>(mean + scale * random_normal(seed, stream, i));
}

static __global__ void bench_fill_ids_kernel(int32_t* x, size_t n, uint64_t seed, uint64_t stream, int32_t below) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        x[i] = (int32_t)(random_bits(seed, stream, i) % (uint64_t)below);
}

// got beside want; where is_open is 1 nothing is said of a number
template <typename T>
static __global__ void bench_compare_kernel(const T* got, const T* want, const uint8_t* is_open, size_t n,
                                            float allowed, BenchFound* found) {
    unsigned long long first = ~0ull, bad = 0;
    float worst = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        if (is_open && is_open[i]) continue;
        bool ok;
        if constexpr (std::is_integral<T>::value) {
            ok = got[i] == want[i];
        } else {
            const float g = to_float(got[i]), w = to_float(want[i]), error = fabsf(g - w);
            ok = bench_finite(g) && bench_finite(w) && error <= allowed;
            if (ok && error / allowed > worst) worst = error / allowed;
        }
        if (!ok) first = first < i ? first : i, bad++;
    }
    bench_found(found, first, bad, warp_max(worst) == worst ? worst : 0);
}

// the largest |x|; bad: what is not finite
template <typename T>
static __global__ void bench_scale_kernel(const T* x, const uint8_t* is_open, size_t n, BenchFound* found) {
    unsigned long long first = ~0ull, bad = 0;
    float largest = 0;
    if constexpr (!std::is_integral<T>::value)
        for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
            if (is_open && is_open[i]) continue;
            const float value = to_float(x[i]);
            if (bench_finite(value))
                largest = fmaxf(largest, fabsf(value));
            else
                first = first < i ? first : i, bad++;
        }
    bench_found(found, first, bad, warp_max(largest) == largest ? largest : 0);
}

// bytes of a fence whose bits are not all set
static __global__ void bench_fence_kernel(const uint8_t* x, BenchFound* found) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < BENCH_FENCE; i += gridDim.x * blockDim.x)
        if (x[i] != 0xff) bench_found(found, i, 1, 0);
}

// a number that changes with any byte
static __global__ void bench_sum_kernel(const uint8_t* x, size_t bytes, BenchFound* found) {
    const size_t words = bytes / 4;
    unsigned long long sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (size_t)gridDim.x * blockDim.x)
        sum += (((const uint32_t*)x)[i] + 0x9e3779b97f4a7c15ull) * (2 * i + 1) * 0xbf58476d1ce4e5b9ull;
    if (blockIdx.x == 0 && threadIdx.x == 0)
        for (size_t i = words * 4; i < bytes; i++) sum += (x[i] + 1ull) * (2 * i + 1) * 0x94d049bb133111ebull;
    for (int offset = WARP / 2; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % WARP == 0) atomicAdd(&found->sum, sum);
}

static __global__ void bench_flush_kernel(int4* x, size_t n) {
    int sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        sum += x[i].x;
    if (sum == 123456789) x[0].x = sum; // never: the memory is zero
}

// one thread that lets time pass
static __global__ void bench_delay_kernel(unsigned long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now - start < nanoseconds);
}

// ---- arrays ----------------------------------------------------------------------------------

struct BenchArray;

// what is done with numbers of one type
struct BenchType {
    bool exact;
    double eps; // the largest relative error of one rounding
    void (*to_floats)(float* to, const void* from, size_t n);
    void (*to_doubles)(double* to, const void* from, size_t n);
    void (*compare)(const BenchArray* a, float allowed, BenchFound* found, cudaStream_t stream);
    void (*scale)(const BenchArray* a, BenchFound* found, cudaStream_t stream);
};

enum BenchRole { BENCH_INPUT, BENCH_OUTPUT, BENCH_IN_PLACE, BENCH_SCRATCH };

struct BenchExpected {
    size_t first;
    std::vector<double> values;
};

struct BenchArray {
    const char* name;
    BenchRole role;
    const BenchType* type;
    size_t n, bytes;
    char *memory, *data;        // data == memory + BENCH_FENCE
    std::function<void()> fill; // of inputs: sets the numbers again
    unsigned long long sum;     // of inputs: of the bytes
    char* start;                // of in_place arrays: the numbers at the start, on the GPU
    char* trusted;              // of outputs: what the trusted variant wrote, on the GPU
    double trusted_scale;
    double tolerance;
    std::vector<BenchExpected> expected;
    uint8_t* is_open; // on the GPU: 1 where nothing is said of a number; NULL: nowhere
    size_t n_open;
    float* host_floats;
    char* host_stored;
    bool compared(void) const { return role == BENCH_OUTPUT || role == BENCH_IN_PLACE; }
    const char* from(void) const { return role == BENCH_IN_PLACE ? start : data; }
};

template <typename T>
static double bench_number(T x) {
    if constexpr (std::is_same<T, __nv_bfloat16>::value)
        return (double)__bfloat162float(x);
    else
        return (double)x;
}

template <typename T, typename To>
static void bench_convert(To* to, const void* from, size_t n) {
    const T* x = (const T*)from;
#pragma omp parallel for if (n > 1 << 16)
    for (size_t i = 0; i < n; i++) to[i] = (To)bench_number(x[i]);
}

template <typename T>
static void bench_compare(const BenchArray* a, float allowed, BenchFound* found, cudaStream_t stream) {
    bench_compare_kernel<T><<<bench_grid(a->n), 256, 0, stream>>>((const T*)a->data, (const T*)a->trusted, a->is_open,
                                                                  a->n, allowed, found);
    launch_check();
}

template <typename T>
static void bench_scale(const BenchArray* a, BenchFound* found, cudaStream_t stream) {
    bench_scale_kernel<T><<<bench_grid(a->n), 256, 0, stream>>>((const T*)a->data, a->is_open, a->n, found);
    launch_check();
}

template <typename T>
static const BenchType* bench_type(void) {
    static_assert(std::is_integral<T>::value || sizeof(to_float(T())) == 4, "numbers are integers, float or bf16");
    static const BenchType type = { std::is_integral<T>::value, sizeof(T) == 2 ? 0x1p-8 : 0x1p-24,
                                    bench_convert<T, float>,    bench_convert<T, double>,
                                    bench_compare<T>,           bench_scale<T> };
    return &type;
}

struct BenchNoRoom {
    size_t bytes;
};

static inline char* bench_allocate(size_t bytes) {
    void* memory;
    cudaError_t code = cudaMalloc(&memory, bytes ? bytes : 1);
    if (code == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        throw BenchNoRoom{ bytes };
    }
    cuda_check(code);
    return (char*)memory;
}

// ---- Bench: what setup and reference use -----------------------------------------------------

struct Bench {
    template <typename T>
    T* input(const char* name, size_t n, float scale = 1, float mean = 0) {
        BenchArray* a = add(name, BENCH_INPUT, bench_type<T>(), n, sizeof(T));
        fill_with<T>(a, scale, mean);
        return (T*)a->data;
    }

    int32_t* input_ids(const char* name, size_t n, int32_t below) {
        require(below > 0, "ids are below a positive number");
        BenchArray* a = add(name, BENCH_INPUT, bench_type<int32_t>(), n, 4);
        int32_t* x = (int32_t*)a->data;
        const uint64_t key = seed, number = arrays.size();
        cudaStream_t on = stream;
        a->fill = [=] {
            bench_fill_ids_kernel<<<bench_grid(n), 256, 0, on>>>(x, n, key, number, below);
            launch_check();
        };
        ready(a);
        return x;
    }

    template <typename T>
    T* input_from(const char* name, const T* values, size_t n) {
        BenchArray* a = add(name, BENCH_INPUT, bench_type<T>(), n, sizeof(T));
        fill_from(a, values);
        return (T*)a->data;
    }

    template <typename T>
    T* output(const char* name, size_t n, double terms = 1, double roundings = 0) {
        BenchArray* a = add(name, BENCH_OUTPUT, bench_type<T>(), n, sizeof(T));
        a->tolerance = tolerance(a->type, terms, roundings);
        return (T*)a->data;
    }

    template <typename T>
    T* in_place(const char* name, size_t n, float scale = 1, double terms = 1, float mean = 0, double roundings = 0) {
        BenchArray* a = add(name, BENCH_IN_PLACE, bench_type<T>(), n, sizeof(T));
        a->tolerance = tolerance(a->type, terms, roundings);
        fill_with<T>(a, scale, mean);
        return (T*)a->data;
    }

    template <typename T>
    T* in_place_from(const char* name, const T* values, size_t n, double terms = 1, double roundings = 0) {
        BenchArray* a = add(name, BENCH_IN_PLACE, bench_type<T>(), n, sizeof(T));
        a->tolerance = tolerance(a->type, terms, roundings);
        fill_from(a, values);
        return (T*)a->data;
    }

    template <typename T>
    T* scratch(size_t n) {
        return (T*)add("scratch", BENCH_SCRATCH, NULL, n, sizeof(T))->data;
    }

    template <typename T>
    const float* host(const T* gpu) {
        BenchArray* a = find(gpu, false);
        if (!a->host_floats) {
            a->host_floats = (float*)malloc(a->n * sizeof(float) + 1);
            char* bits = (char*)malloc(a->bytes + 1);
            if (!a->host_floats || !bits) die("%s: out of memory for %zu numbers", a->name, a->n);
            cuda_check(cudaMemcpy(bits, a->from(), a->bytes, cudaMemcpyDeviceToHost));
            a->type->to_floats(a->host_floats, bits, a->n);
            free(bits);
        }
        return a->host_floats;
    }

    template <typename T>
    const float* host(const T* gpu, size_t first, size_t n) {
        BenchArray* a = find(gpu, false);
        require(first + n <= a->n, "host: the numbers asked for are in the array");
        std::vector<char> bits(n * sizeof(T) + 1);
        float* values = (float*)allocate(n, sizeof(float));
        cuda_check(cudaMemcpy(bits.data(), a->from() + first * sizeof(T), n * sizeof(T), cudaMemcpyDeviceToHost));
        a->type->to_floats(values, bits.data(), n);
        parts.push_back(values);
        return values;
    }

    template <typename T>
    const T* stored(const T* gpu) {
        BenchArray* a = find(gpu, false);
        if (!a->host_stored) {
            a->host_stored = (char*)allocate(a->bytes, 1);
            cuda_check(cudaMemcpy(a->host_stored, a->from(), a->bytes, cudaMemcpyDeviceToHost));
        }
        return (const T*)a->host_stored;
    }
    const int32_t* host_ids(const int32_t* gpu) { return stored(gpu); }

    template <typename T, typename V>
    void expect(const T* output, size_t first, const V* values, size_t n) {
        BenchArray* a = find(output, true);
        if (first + n > a->n) die("%s: numbers %zu to %zu are expected of %zu", a->name, first, first + n - 1, a->n);
        a->expected.push_back(BenchExpected{ first, std::vector<double>(values, values + n) });
    }

    template <typename T>
    void unspecified(const T* output, size_t first, size_t n) {
        BenchArray* a = find(output, true);
        if (first + n > a->n) die("%s: numbers %zu to %zu are left open of %zu", a->name, first, first + n - 1, a->n);
        if (!a->is_open) {
            a->is_open = (uint8_t*)bench_allocate(a->n);
            cuda_check(cudaMemsetAsync(a->is_open, 0, a->n, stream));
        }
        cuda_check(cudaMemsetAsync(a->is_open + first, 1, n, stream));
        a->n_open += n;
    }

    // ---- the harness's own -------------------------------------------------------------------

    std::vector<BenchArray> arrays;
    std::vector<float*> parts; // of arrays, on the host
    uint64_t seed = 1;
    cudaStream_t stream = NULL;

    static double tolerance(const BenchType* type, double terms, double roundings) {
        const double floatX_eps = sizeof(floatX) == 2 ? 0x1p-8 : 0x1p-24;
        return 2 * type->eps + 2 * roundings * floatX_eps + 0x1p-24 * (16 + 4 * sqrt(terms));
    }

    BenchArray* add(const char* name, BenchRole role, const BenchType* type, size_t n, size_t size) {
        BenchArray a = {};
        a.name = name, a.role = role, a.type = type, a.n = n, a.bytes = n * size;
        arrays.push_back(a);
        BenchArray* added = &arrays.back();
        added->memory = bench_allocate(a.bytes + 2 * BENCH_FENCE);
        added->data = added->memory + BENCH_FENCE;
        cuda_check(cudaMemsetAsync(added->memory, 0xff, a.bytes + 2 * BENCH_FENCE, stream));
        return added;
    }

    template <typename T>
    void fill_with(BenchArray* a, float scale, float mean) {
        static_assert(!std::is_integral<T>::value, "random integers: input_ids, input_from");
        T* x = (T*)a->data;
        const size_t n = a->n;
        const uint64_t key = seed, number = arrays.size();
        cudaStream_t on = stream;
        a->fill = [=] {
            bench_fill_kernel<T><<<bench_grid(n), 256, 0, on>>>(x, n, key, number, scale, mean);
            launch_check();
        };
        ready(a);
    }

    void fill_from(BenchArray* a, const void* values) {
        a->host_stored = (char*)allocate(a->bytes, 1);
        memcpy(a->host_stored, values, a->bytes);
        const char* from = a->host_stored;
        char* to = a->data;
        const size_t bytes = a->bytes;
        cudaStream_t on = stream;
        a->fill = [=] { cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, on)); };
        ready(a);
    }

    // an input, or the start of an in_place array, is complete
    void ready(BenchArray* a) {
        if (a->n) a->fill();
        if (a->role == BENCH_IN_PLACE) {
            a->start = bench_allocate(a->bytes);
            cuda_check(cudaMemcpyAsync(a->start, a->data, a->bytes, cudaMemcpyDeviceToDevice, stream));
        }
        cuda_check(cudaStreamSynchronize(stream));
        if (a->role == BENCH_INPUT) a->sum = sum_of(a);
    }

    BenchArray* find(const void* gpu, bool output) {
        for (BenchArray& a : arrays)
            if (a.data == gpu && a.type && (output ? a.compared() : a.role == BENCH_INPUT || a.role == BENCH_IN_PLACE))
                return &a;
        die("%s: this is not the first number of an %s", output ? "expect" : "host", output ? "output" : "input");
    }

    // what a kernel of the harness finds
    BenchFound look(const std::function<void(BenchFound*)>& kernel) {
        static BenchFound* found;
        if (!found) cuda_check(cudaMalloc((void**)&found, sizeof *found));
        BenchFound value = { ~0ull, 0, 0, 0 };
        cuda_check(cudaMemcpyAsync(found, &value, sizeof value, cudaMemcpyHostToDevice, stream));
        kernel(found);
        cuda_check(cudaMemcpyAsync(&value, found, sizeof value, cudaMemcpyDeviceToHost, stream));
        cuda_check(cudaStreamSynchronize(stream));
        return value;
    }

    unsigned long long sum_of(const BenchArray* a) {
        return look([&](BenchFound* found) {
                   bench_sum_kernel<<<bench_grid(a->bytes / 4 + 1), 256, 0, stream>>>((const uint8_t*)a->data, a->bytes,
                                                                                      found);
                   launch_check();
               })
            .sum;
    }

    void restore(void) {
        for (BenchArray& a : arrays)
            if (a.role == BENCH_IN_PLACE)
                cuda_check(cudaMemcpyAsync(a.data, a.start, a.bytes, cudaMemcpyDeviceToDevice, stream));
    }

    void poison(void) {
        for (BenchArray& a : arrays)
            if (a.role == BENCH_OUTPUT || a.role == BENCH_SCRATCH)
                cuda_check(cudaMemsetAsync(a.data, 0xff, a.bytes, stream));
    }

    void release(void) {
        for (BenchArray& a : arrays) {
            cudaFree(a.memory), cudaFree(a.start), cudaFree(a.trusted), cudaFree(a.is_open);
            free(a.host_floats), free(a.host_stored);
        }
        for (float* part : parts) free(part);
        arrays.clear(), parts.clear();
    }
};

// ---- the run ---------------------------------------------------------------------------------

struct BenchOptions {
    std::vector<std::string> only;
    std::string shape, json, csv;
    bool check, profile;
    int block; // of --profile; 0: the first in the row
    double time_limit;
    uint64_t seed;
};

// one variant on one problem
struct BenchCandidate {
    const char* name;
    const char* kind; // variant, production, yardstick
    const char* what;
    std::vector<int> blocks;
    std::function<void(int block, cudaStream_t stream)> launch;
    std::string refusal;
    bool selected;
};

struct BenchRow {
    std::string check; // ok, WRONG …, not here: …
    bool timed, once;
    int block;
    double us, spread, used;
};

struct BenchCopies {
    std::vector<float> us;
};

// all of a program
struct BenchRun {
    const char* op;
    const char* yardstick;
    BenchOptions options;
    std::string gpu;
    std::map<std::string, std::string> wrong; // variants, and what was first found
    std::map<size_t, BenchCopies> copies;     // by bytes
    double start, deadline;                   // of the shape at hand
    bool quiet;
    Bench bench;
    // of the shape at hand
    const Shape* shape;
    std::vector<BenchCandidate> candidates;
    std::vector<BenchRow> rows;
    double traffic, flops;
    bool table;          // there is one to be printed
    const char* running; // the variant that runs now, or NULL
    int running_block;
};

static BenchRun* bench_run; // for what is said when the program ends early

static inline std::string bench_sizes(const Shape* s, const char* format) {
    const char* letters[] = { "B", "T", "N", "C", "NH", "NKV", "HD", "F", "V" };
    const int sizes[] = { s->B, s->T, s->N, s->C, s->NH, s->NKV, s->HD, s->F, s->V };
    std::string text;
    for (int i = 0; i < 9; i++)
        if (sizes[i]) {
            if (!text.empty()) text += format[0] == '"' ? "," : "  ";
            char one[64];
            snprintf(one, sizeof one, format[0] == '"' ? "\"%s\":%d" : "%s %d", letters[i], sizes[i]);
            text += one;
        }
    return text;
}

// ---- checks ----------------------------------------------------------------------------------

// waits for the GPU; a fault is told with the variant's name, and ends the program (see bench_ended)
static inline void bench_wait(BenchRun* run) {
    cudaError_t code = cudaGetLastError();
    if (code == cudaSuccess) code = cudaDeviceSynchronize();
    if (code == cudaSuccess) return;
    const std::string message = bench_text("WRONG %s (%s)", cudaGetErrorString(code), cudaGetErrorName(code));
    for (size_t i = 0; i < run->candidates.size() && run->running; i++)
        if (run->candidates[i].name == run->running && i < run->rows.size()) run->rows[i].check = message;
    fprintf(stderr, "error: %s\n", message.c_str() + 6);
    fflush(NULL);
    exit(BENCH_FAULT);
}

static inline std::string bench_wrong(const BenchArray* a, size_t i, double got, double want, double allowed,
                                      size_t bad, size_t n, const char* beside) {
    const std::string wrote = isnan(got) ? "nan" : bench_text("%.6g", got); // of either sign
    std::string text = bench_text("%s[%zu]: got %s, want %.6g", a->name, i, wrote.c_str(), want);
    if (!a->type->exact) text += bench_text(", tolerance %.2g", allowed);
    return text + bench_text("; %zu of %zu bad%s", bad, n, beside);
}

// what the CPU expects of an output, beside what is there; empty: all is well
static inline std::string bench_check_expected(const BenchArray* a, double* used) {
    std::vector<double> got, want;
    std::vector<size_t> at;
    std::vector<char> bits;
    const size_t size = a->bytes / a->n;
    for (const BenchExpected& e : a->expected) {
        const size_t n = e.values.size(), before = got.size();
        bits.resize(n * size + 1);
        got.resize(before + n);
        cuda_check(cudaMemcpy(bits.data(), a->data + e.first * size, n * size, cudaMemcpyDeviceToHost));
        a->type->to_doubles(got.data() + before, bits.data(), n);
        want.insert(want.end(), e.values.begin(), e.values.end());
        for (size_t i = 0; i < n; i++) at.push_back(e.first + i);
    }
    const size_t n = got.size();
    double scale = 0, allowed = 0;
    bool ok = true;
    if (!a->type->exact && n) {
        std::vector<float> got_floats(got.begin(), got.end()), want_floats(want.begin(), want.end());
        Check c = check_compare(got_floats.data(), want_floats.data(), n, a->tolerance);
        *used = fmax(*used, c.used);
        ok = c.ok;
        for (double x : want) scale = fmax(scale, fabs(x));
        allowed = a->tolerance * (scale == 0 ? 1 : scale);
    } else
        ok = got == want;
    if (ok) return "";
    size_t first = n, bad = 0;
    for (size_t i = 0; i < n; i++)
        if (!(check_finite(got[i]) && fabs(got[i] - want[i]) <= allowed) && bad++ == 0) first = i;
    if (first == n) return bench_text("%s: the CPU's numbers are not finite", a->name);
    return bench_wrong(a, at[first], got[first], want[first], allowed, bad, n, "");
}

static inline double bench_number_at(const BenchArray* a, const char* memory, size_t i) {
    const size_t size = a->bytes / a->n;
    char bits[8];
    double value;
    cuda_check(cudaMemcpy(bits, memory + i * size, size, cudaMemcpyDeviceToHost));
    a->type->to_doubles(&value, bits, 1);
    return value;
}

// what the trusted variant wrote, beside what is there
static inline std::string bench_check_trusted(Bench* b, const BenchArray* a, double* used) {
    const double allowed = 2 * a->tolerance * a->trusted_scale;
    BenchFound found = b->look([&](BenchFound* f) { a->type->compare(a, (float)allowed, f, b->stream); });
    float worst;
    memcpy(&worst, &found.worst, 4);
    *used = fmax(*used, worst);
    if (!found.bad) return "";
    return bench_wrong(a, found.first, bench_number_at(a, a->data, found.first),
                       bench_number_at(a, a->trusted, found.first), allowed, found.bad, a->n,
                       " beside the reference row");
}

// keeps what was written, against which the other variants are compared; empty: it is all finite
static inline std::string bench_trust(Bench* b) {
    for (BenchArray& a : b->arrays) {
        if (!a.compared() || !a.n) continue;
        BenchFound found = b->look([&](BenchFound* f) { a.type->scale(&a, f, b->stream); });
        if (found.bad)
            return bench_text("%s[%llu]: got %s; %llu of %zu are not finite", a.name, found.first,
                              isnan(bench_number_at(&a, a.data, found.first)) ? "nan" : "inf", found.bad, a.n);
        float scale;
        memcpy(&scale, &found.worst, 4);
        a.trusted_scale = scale == 0 ? 1 : scale;
    }
    for (BenchArray& a : b->arrays)
        if (a.compared() && a.n) {
            a.trusted = bench_allocate(a.bytes);
            cuda_check(cudaMemcpyAsync(a.trusted, a.data, a.bytes, cudaMemcpyDeviceToDevice, b->stream));
        }
    return "";
}

// the outputs as they are now
static inline std::string bench_check_outputs(Bench* b, double* used) {
    for (BenchArray& a : b->arrays) {
        if (!a.compared() || !a.n) continue;
        std::string wrong = bench_check_expected(&a, used);
        if (wrong.empty() && a.trusted) wrong = bench_check_trusted(b, &a, used);
        if (!wrong.empty()) return wrong;
    }
    return "";
}

// fences and inputs; what was changed is set right again
static inline std::string bench_check_untouched(Bench* b) {
    std::string wrong;
    for (BenchArray& a : b->arrays) {
        const char* fences[2] = { a.memory, a.data + a.bytes };
        for (int after = 0; after < 2; after++) {
            BenchFound found = b->look([&](BenchFound* f) {
                bench_fence_kernel<<<16, 256, 0, b->stream>>>((const uint8_t*)fences[after], f);
                launch_check();
            });
            if (!found.bad) continue;
            if (wrong.empty())
                wrong = bench_text("%s: %llu bytes were written in the fence %s it, the first at byte %lld", a.name,
                                   found.bad, after ? "after" : "before",
                                   after ? (long long)(a.bytes + found.first) : (long long)found.first - BENCH_FENCE);
            cuda_check(cudaMemsetAsync((void*)fences[after], 0xff, BENCH_FENCE, b->stream));
        }
        if (a.role == BENCH_INPUT && a.n && b->sum_of(&a) != a.sum) {
            if (wrong.empty()) wrong = bench_text("%s: an input was changed", a.name);
            a.fill();
            cuda_check(cudaStreamSynchronize(b->stream));
        }
    }
    return wrong;
}

// on a small shape, all of every output is expected or left open
static inline void bench_require_expected(BenchRun* run) {
    for (const BenchArray& a : run->bench.arrays) {
        if (!a.compared()) continue;
        size_t expected = a.n_open;
        for (const BenchExpected& e : a.expected) expected += e.values.size();
        if (run->shape->small ? expected < a.n
                              : a.expected.empty() && a.n_open < a.n && a.trusted == NULL && run->shape->small)
            die("%s, shape %s: reference expects %zu of the %zu numbers of %s", run->op, run->shape->name, expected,
                a.n, a.name);
    }
}

// one launch, with everything around it checked
static inline std::string bench_checked_launch(BenchRun* run, const BenchCandidate* v, int block, double* used) {
    Bench* b = &run->bench;
    bench_delay_kernel<<<1, 1, 0, b->stream>>>(300000);
    launch_check();
    b->restore();
    b->poison();
    run->running = v->name, run->running_block = block;
    v->launch(block, b->stream);
    bench_wait(run);
    run->running = NULL;
    std::string wrong = bench_check_untouched(b);
    return wrong.empty() ? bench_check_outputs(b, used) : wrong;
}

// all block sizes; fills in row->check
static inline bool bench_check(BenchRun* run, const BenchCandidate* v, BenchRow* row, bool trust) {
    row->used = 0;
    for (size_t i = 0; i < v->blocks.size() || i < 2; i++) {
        const int block = v->blocks[i < v->blocks.size() ? i : 0];
        std::string wrong = bench_checked_launch(run, v, block, &row->used);
        if (wrong.empty() && trust && i == 0) wrong = bench_trust(&run->bench);
        if (wrong.empty()) continue;
        row->block = block;
        row->check = "WRONG " + wrong;
        if (i >= v->blocks.size()) row->check += "; at the second launch alone";
        run->wrong.emplace(v->name, wrong);
        return false;
    }
    row->check = "ok";
    return true;
}

// ---- times -----------------------------------------------------------------------------------

static inline double bench_quantile(std::vector<float> x, double q) {
    std::sort(x.begin(), x.end());
    return x[(size_t)(q * (double)(x.size() - 1) + 0.5)];
}

static inline void bench_flush(cudaStream_t stream) {
    static int4* memory;
    static size_t bytes;
    if (!memory) {
        int device, l2;
        cuda_check(cudaGetDevice(&device));
        cuda_check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
        bytes = std::max<size_t>((size_t)1 << 27, 3 * (size_t)l2);
        cuda_check(cudaMalloc((void**)&memory, bytes));
        cuda_check(cudaMemset(memory, 0, bytes));
        cuda_check(cudaDeviceSynchronize());
    }
    bench_flush_kernel<<<(unsigned)(4 * gpu_processors()), 512, 0, stream>>>(memory, bytes / 16);
    launch_check();
}

// launches in a row, a pair of events around each
struct BenchTimer {
    enum { MOST = 2 * BENCH_LAUNCHES };
    cudaEvent_t events[2 * MOST];
    int n, owner[MOST];
    BenchTimer(void) {
        for (cudaEvent_t& e : events) cuda_check(cudaEventCreate(&e));
        n = 0;
    }
    template <typename F>
    void add(int who, double host_us, cudaStream_t stream, F launch) {
        bench_flush(stream);
        if (host_us > 20) { // longer than the flush keeps the GPU busy: let it wait for the host
            bench_delay_kernel<<<1, 1, 0, stream>>>((unsigned long long)(1500 * std::min(host_us, 5000.0)));
            launch_check();
        }
        cuda_check(cudaEventRecord(events[2 * n], stream));
        launch();
        cuda_check(cudaEventRecord(events[2 * n + 1], stream));
        owner[n++] = who;
    }
    // waits; adds the times of each owner to its list
    void take(BenchRun* run, std::vector<float>* lists[2]) {
        bench_wait(run);
        for (int i = 0; i < n; i++) {
            float ms;
            cuda_check(cudaEventElapsedTime(&ms, events[2 * i], events[2 * i + 1]));
            lists[owner[i]]->push_back(1e3f * ms);
        }
        n = 0;
    }
};

// n launches of a variant, and copies of as many bytes between them
static inline void bench_time_some(BenchRun* run, const BenchCandidate* v, int block, int n, int copies, double host_us,
                                   std::vector<float>* us) {
    static BenchTimer* timer = new BenchTimer;
    static char *from, *to;
    static size_t room;
    Bench* b = &run->bench;
    const size_t half = (size_t)(run->traffic / 2);
    if (copies && room < half) {
        cudaFree(from), cudaFree(to);
        from = to = NULL, room = 0;
        from = bench_allocate(half), to = bench_allocate(half), room = half;
        cuda_check(cudaMemsetAsync(from, 0, half, b->stream));
    }
    run->running = v->name, run->running_block = block;
    for (int i = 0; i < n; i++) {
        if (copies && i * copies / n != (i - 1) * copies / n)
            timer->add(1, 0, b->stream,
                       [&] { cuda_check(cudaMemcpyAsync(to, from, half, cudaMemcpyDeviceToDevice, b->stream)); });
        b->restore();
        timer->add(0, host_us, b->stream, [&] { v->launch(block, b->stream); });
    }
    std::vector<float>* lists[2] = { us, copies ? &run->copies[half].us : us };
    timer->take(run, lists);
    run->running = NULL;
}

// the best block size, then its figures
static inline void bench_time(BenchRun* run, const BenchCandidate* v, BenchRow* row) {
    Bench* b = &run->bench;
    double best = 0, best_host = 0;
    const double share = BENCH_ROW_SECONDS / (double)(v->blocks.size() + 1);
    std::vector<float> us;
    for (int block : v->blocks) {
        std::vector<float> tries;
        b->restore();
        run->running = v->name, run->running_block = block;
        double start = bench_seconds();
        v->launch(block, b->stream);
        const double host_us = 1e6 * (bench_seconds() - start);
        bench_wait(run);
        bench_time_some(run, v, block, 1, 0, host_us, &tries);
        if (tries[0] < 1e6 * share) {
            const double each = tries[0] + 100 + host_us;
            const int n = (int)std::min<double>(BENCH_TRIES, std::max(1.0, 1e6 * share / each));
            tries.clear();
            bench_time_some(run, v, block, n, 0, host_us, &tries);
        }
        const double median = bench_quantile(tries, 0.5);
        if (best == 0 || median < best) best = median, row->block = block, us = tries, best_host = host_us;
    }
    if (best < 1e6 * BENCH_ROW_SECONDS) {
        const double each = best + 100 + best_host + (run->flops == 0 ? 0.2 * best : 0);
        const int n = (int)std::min<double>(BENCH_LAUNCHES, std::max(3.0, 1e6 * BENCH_ROW_SECONDS / each));
        us.clear();
        bench_time_some(run, v, row->block, n, run->flops == 0 ? std::max(n / 5, 1) : 0, best_host, &us);
    }
    row->timed = true, row->once = us.size() < 3;
    row->us = bench_quantile(us, 0.5);
    row->spread = row->once ? 0 : 100 * (bench_quantile(us, 0.9) - bench_quantile(us, 0.1)) / row->us;
    std::string wrong = bench_check_untouched(b);
    if (wrong.empty()) wrong = bench_check_outputs(b, &row->used);
    if (wrong.empty()) return;
    row->timed = false;
    row->check = "WRONG " + wrong + "; after " + std::to_string(us.size()) + " launches in a row";
    run->wrong.emplace(v->name, wrong);
}

// ---- what is said ----------------------------------------------------------------------------

static inline std::string bench_json_text(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        if ((unsigned char)c < 32)
            out += ' ';
        else
            out += c;
    }
    return out + "\"";
}

static inline std::string bench_csv_text(const std::string& text) {
    std::string out = "\"";
    for (char c : text) out += c == '"' ? "\"\"" : c == '\n' ? " " : std::string(1, c);
    return out + "\"";
}

struct BenchFigures {
    double copy_us, peak_us, production_us; // 0: there is none
    const char* production;
};

static inline BenchFigures bench_figures(const BenchRun* run) {
    BenchFigures f = { 0, 0, 0, "production" };
    auto copies = run->copies.find((size_t)(run->traffic / 2));
    if (run->flops == 0 && copies != run->copies.end() && !copies->second.us.empty())
        f.copy_us = f.peak_us = bench_quantile(copies->second.us, 0.5);
    int reference = -1;
    for (size_t i = 0; i < run->rows.size(); i++) {
        const char* kind = run->candidates[i].kind;
        const bool production = strcmp(kind, "production") == 0, yardstick = strcmp(kind, "yardstick") == 0;
        if (run->flops > 0 && yardstick && run->rows[i].timed) f.peak_us = run->rows[i].us;
        if (production || (yardstick && (reference < 0 || strcmp(run->candidates[reference].kind, "production") != 0)))
            reference = (int)i;
    }
    if (reference < 0) reference = (int)run->rows.size() - 1;
    if (reference >= 0) {
        f.production = run->candidates[reference].name;
        if (run->rows[reference].timed) f.production_us = run->rows[reference].us;
    }
    return f;
}

static inline void bench_write_rows(const BenchRun* run, const BenchFigures* f) {
    FILE* json = run->options.json.empty() ? NULL : fopen(run->options.json.c_str(), "a");
    FILE* csv = run->options.csv.empty() ? NULL : fopen(run->options.csv.c_str(), "a");
    if (!run->options.json.empty() && !json) die("--json %s: %s", run->options.json.c_str(), strerror(errno));
    if (!run->options.csv.empty() && !csv) die("--csv %s: %s", run->options.csv.c_str(), strerror(errno));
    const char* rate_name = run->flops > 0 ? "TFLOPs" : "GBps";
    if (csv && fseek(csv, 0, SEEK_END) == 0 && ftell(csv) == 0)
        fprintf(csv, "op,shape,dtype,variant,kind,check,block,median_us,spread_percent,GBps,TFLOPs,percent_of_peak,"
                     "times_production,what,gpu\n");
    for (size_t i = 0; i < run->rows.size(); i++) {
        const BenchCandidate* v = &run->candidates[i];
        const BenchRow* r = &run->rows[i];
        if (!v->selected || r->check.empty()) continue;
        const double rate = !r->timed ? 0 : run->flops > 0 ? run->flops / r->us * 1e-6 : run->traffic / r->us * 1e-3;
        const double percent = r->timed && f->peak_us > 0 ? 100 * f->peak_us / r->us : 0;
        const double times = r->timed && f->production_us > 0 ? f->production_us / r->us : 0;
        if (json) {
            fprintf(
                json,
                "{\"op\":%s,\"shape\":%s,\"sizes\":{%s},\"dtype\":\"%s\",\"variant\":%s,\"kind\":\"%s\",\"check\":%s",
                bench_json_text(run->op).c_str(), bench_json_text(run->shape->name).c_str(),
                bench_sizes(run->shape, "\"").c_str(), BENCH_DTYPE, bench_json_text(v->name).c_str(), v->kind,
                bench_json_text(r->check).c_str());
            fprintf(json, ",\"used_percent\":%.1f,\"block\":%d", 100 * r->used, r->block);
            if (r->timed)
                fprintf(json, ",\"median_us\":%.3f,\"spread_percent\":%.2f,\"%s\":%.2f", r->us, r->spread, rate_name,
                        rate);
            if (r->once) fprintf(json, ",\"once\":true");
            if (percent > 0) fprintf(json, ",\"percent_of_peak\":%.2f", percent);
            if (times > 0) fprintf(json, ",\"times_production\":%.4f", times);
            if (f->copy_us > 0) fprintf(json, ",\"copy_GBps\":%.1f", run->traffic / f->copy_us * 1e-3);
            fprintf(json, ",\"work\":%.6g,\"what\":%s,\"gpu\":%s,\"seed\":%llu}\n",
                    run->flops > 0 ? run->flops : run->traffic, bench_json_text(v->what).c_str(),
                    bench_json_text(run->gpu).c_str(), (unsigned long long)run->options.seed);
        }
        if (csv)
            fprintf(csv, "%s,%s,%s,%s,%s,%s,%d,%.3f,%.2f,%.2f,%.2f,%.2f,%.4f,%s,%s\n", run->op,
                    bench_csv_text(run->shape->name).c_str(), BENCH_DTYPE, bench_csv_text(v->name).c_str(), v->kind,
                    bench_csv_text(r->check).c_str(), r->block, r->us, r->spread, run->flops > 0 ? 0 : rate,
                    run->flops > 0 ? rate : 0, percent, times, bench_csv_text(v->what).c_str(),
                    bench_csv_text(run->gpu).c_str());
    }
    if (json && fclose(json) != 0) die("--json %s: %s", run->options.json.c_str(), strerror(errno));
    if (csv && fclose(csv) != 0) die("--csv %s: %s", run->options.csv.c_str(), strerror(errno));
}

// the table of the shape at hand, as far as it is known; once
static inline void bench_print(BenchRun* run) {
    if (!run->table || run->quiet) return;
    run->table = false;
    const BenchFigures f = bench_figures(run);
    const Shape* s = run->shape;
    int width = 12;
    for (const BenchCandidate& v : run->candidates) width = std::max(width, (int)strlen(v.name));
    printf("\n%s   %s   %s: %s   ", run->op, BENCH_DTYPE, s->name, bench_sizes(s, "").c_str());
    if (run->flops > 0)
        printf("%.4g TFLOP", run->flops * 1e-12);
    else
        printf("must move %.1f MB", run->traffic * 1e-6);
    if (f.copy_us > 0) printf("   copy %.0f GB/s", run->traffic / f.copy_us * 1e-3);
    if (run->flops > 0 && f.peak_us > 0) printf("   %s %.1f TFLOP/s", run->yardstick, run->flops / f.peak_us * 1e-6);
    printf("   %s   seed %llu\n", run->gpu.c_str(), (unsigned long long)run->options.seed);
    printf("  %-*s  %-8s %5s  %10s  %7s  %9s  %9s  %12s   what changed\n", width, "variant", "check", "block",
           "median us", "spread", run->flops > 0 ? "TFLOP/s" : "GB/s", "% of peak",
           (std::string("x ") + f.production).c_str());
    for (size_t i = 0; i < run->rows.size(); i++) {
        const BenchCandidate* v = &run->candidates[i];
        const BenchRow* r = &run->rows[i];
        if (!v->selected || r->check.empty()) continue;
        char block[16] = "-", spread[16] = "once", used[16] = "";
        if (r->block) snprintf(block, sizeof block, "%d", r->block);
        if (!r->once) snprintf(spread, sizeof spread, "%.1f %%", r->spread);
        if (r->check == "ok") snprintf(used, sizeof used, " %.0f%%", 100 * r->used);
        printf("  %-*s  ", width, v->name);
        if (!r->timed) {
            printf("%s%s%s\n", r->check.c_str(), used,
                   r->check == "ok" ? "   not timed"
                   : r->block       ? (std::string("   block ") + block).c_str()
                                    : "");
            continue;
        }
        printf("%-8s %5s  %10.*f  %7s  ", (r->check + used).c_str(), block,
               r->us < 10     ? 3
               : r->us < 1000 ? 2
                              : 1,
               r->us, spread);
        printf(run->flops > 0 ? "%9.1f  " : "%9.0f  ",
               run->flops > 0 ? run->flops / r->us * 1e-6 : run->traffic / r->us * 1e-3);
        if (f.peak_us > 0)
            printf("%9.1f  ", 100 * f.peak_us / r->us);
        else
            printf("%9s  ", "-");
        if (f.production_us > 0)
            printf("%12.2f   ", f.production_us / r->us);
        else
            printf("%12s   ", "-");
        printf("%s\n", v->what);
    }
    fflush(stdout);
    bench_write_rows(run, &f);
}

// when a launcher ends the program, or a fault does
static inline void bench_ended(void) {
    BenchRun* run = bench_run;
    if (!run || !run->running) return;
    fprintf(stderr, "error: %s: variant %s, block %d, shape %s (%s): the program ends here\n", run->op, run->running,
            run->running_block, run->shape->name, bench_sizes(run->shape, "").c_str());
    run->running = NULL;
    bench_print(run);
}

// ---- one shape -------------------------------------------------------------------------------

static inline int bench_rank(const BenchCandidate* v) {
    return strcmp(v->kind, "production") == 0 ? 0 : strcmp(v->kind, "yardstick") == 0 ? 1 : 2;
}

// production first, then the yardstick, then the others as they are listed; without either, the last row first
static inline std::vector<size_t> bench_order(const BenchRun* run) {
    std::vector<size_t> order;
    for (int rank = 0; rank < 3; rank++)
        for (size_t i = 0; i < run->candidates.size(); i++)
            if (bench_rank(&run->candidates[i]) == rank) order.push_back(i);
    if (!order.empty() && bench_rank(&run->candidates[order[0]]) == 2)
        std::rotate(order.begin(), order.end() - 1, order.end());
    return order;
}

// candidates are set; reference(first, count) expects rows of it
static inline void bench_shape(BenchRun* run, int64_t rows, const std::function<void(int64_t, int64_t)>& reference) {
    const Shape* s = run->shape;
    run->rows.assign(run->candidates.size(), BenchRow());
    run->table = true;
    if (s->small) {
        reference(0, rows);
        bench_require_expected(run);
    } else {
        std::vector<int64_t> samples = { 0, rows - 1 };
        for (int i = 2; i < BENCH_SAMPLES; i++)
            samples.push_back((int64_t)(random_bits(run->options.seed, 1, i) % (uint64_t)rows));
        std::sort(samples.begin(), samples.end());
        samples.erase(std::unique(samples.begin(), samples.end()), samples.end());
        for (int64_t row : samples) reference(row, 1);
    }
    bool trusted = s->small, failed = false, timing = !s->small && !run->options.check;
    int n_ok = 0;
    for (size_t i : bench_order(run)) {
        const BenchCandidate* v = &run->candidates[i];
        BenchRow* row = &run->rows[i];
        if (!v->selected && bench_rank(v) == 2 && trusted) continue;
        if (!v->refusal.empty()) {
            row->check = "not here: " + v->refusal;
            continue;
        }
        if (!s->small && run->deadline > 0 && bench_seconds() > run->deadline) {
            row->check = "not run: the time limit";
            continue;
        }
        if (!bench_check(run, v, row, !trusted)) {
            failed = true;
            continue;
        }
        trusted = true, n_ok++;
        auto elsewhere = run->wrong.find(v->name);
        if (elsewhere != run->wrong.end())
            row->check = "WRONG on another shape: " + elsewhere->second;
        else if (timing)
            bench_time(run, v, row);
    }
    if (s->small && !failed) {
        if (!run->quiet)
            printf("%s   %s   %s: %s   checked, %d variants ok\n", run->op, BENCH_DTYPE, s->name,
                   bench_sizes(s, "").c_str(), n_ok);
    } else
        bench_print(run);
    fflush(stdout);
}

// ---- the program -----------------------------------------------------------------------------

static inline void bench_help(const char* op) {
    printf("%s [options]      checks all variants, times them on the real shapes, prints the tables\n\n"
           "  --only NAME[,NAME]  these variants (and production, with which they are compared)\n"
           "  --shape NAME        one shape of --list; or N=4096,C=3072: the first real shape with other sizes,\n"
           "                      small=1 among them: checked in full, not timed\n"
           "  --check             check, but do not time\n"
           "  --profile           launch each variant once, unchecked, on one shape:\n"
           "                      ncu --profile-from-start off PROGRAM --only NAME --profile\n"
           "  --block N           of --profile: this block size instead of the first\n"
           "  --time-limit S      stop after about S seconds, shared between the real shapes\n"
           "  --json FILE         append one object a row\n"
           "  --csv FILE          append one line a row\n"
           "  --seed N            of the random inputs (1)\n"
           "  --list              shapes and variants; needs no GPU\n"
           "  --help\n\n"
           "The exit code is the number of variants that are wrong; %d after a fault.\n",
           op, BENCH_FAULT);
}

static inline std::vector<std::string> bench_split(const std::string& text) {
    std::vector<std::string> parts;
    for (size_t at = 0; at <= text.size();) {
        size_t end = std::min(text.find(',', at), text.size());
        parts.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    return parts;
}

// "N=4096,C=3072" beside the first real shape
static inline Shape bench_custom_shape(const std::string& text, const Shape* shapes, int n_shapes) {
    Shape s = shapes[0];
    for (int i = n_shapes - 1; i >= 0; i--)
        if (!shapes[i].small) s = shapes[i];
    s.name = strdup(text.c_str());
    s.small = false;
    for (const std::string& part : bench_split(text)) {
        struct {
            const char* name;
            int* value;
        } letters[] = { { "B", &s.B },     { "T", &s.T },   { "N", &s.N }, { "C", &s.C }, { "NH", &s.NH },
                        { "NKV", &s.NKV }, { "HD", &s.HD }, { "F", &s.F }, { "V", &s.V } };
        const size_t equals = part.find('=');
        const std::string name = part.substr(0, equals);
        char* end = NULL;
        const long value = equals == std::string::npos ? 0 : strtol(part.c_str() + equals + 1, &end, 10);
        bool known = name == "small";
        if (known) s.small = value != 0;
        for (auto& letter : letters)
            if (name == letter.name) *letter.value = (int)value, known = true;
        if (!known || !end || *end || value < 1 || value > INT32_MAX)
            die("--shape %s: expected a name of --list, or sizes such as N=4096,C=3072", text.c_str());
    }
    return s;
}

template <typename P, int N_SHAPES, int N_VARIANTS>
struct BenchProgram {
    const Shape (&shapes)[N_SHAPES];
    P (*setup)(Bench*, const Shape*);
    void (*reference)(Bench*, const P*, int64_t, int64_t);
    int64_t (*rows)(const P*);
    double (*traffic)(const P*);
    double (*flops)(const P*);
    const Variant<P> (&variants)[N_VARIANTS];

    void list(const BenchRun* run) const {
        printf("%s   %s\n\nshapes\n", run->op, BENCH_DTYPE);
        for (const Shape& s : shapes)
            printf("  %-24s %-8s %s\n", s.name, s.small ? "small" : "real", bench_sizes(&s, "").c_str());
        printf("\nvariants\n");
        for (const Variant<P>& v : variants) {
            std::string blocks;
            for (int i = 0; i < 6 && v.blocks[i]; i++) blocks += (i ? " " : "") + std::to_string(v.blocks[i]);
            printf("  %-24s %-20s %s\n", v.name, blocks.empty() ? "-" : blocks.c_str(), v.what);
        }
    }

    void one_shape(BenchRun* run, const Shape* s) const {
        run->shape = s;
        run->bench.seed = run->options.seed;
        try {
            const P p = setup(&run->bench, s);
            run->traffic = traffic(&p), run->flops = flops(&p);
            if (!(run->traffic > 0 || run->flops > 0)) die("%s: traffic and flops are both 0", run->op);
            run->candidates.clear();
            for (const Variant<P>& v : variants) {
                BenchCandidate c;
                c.name = v.name, c.what = v.what;
                c.kind = strcmp(v.name, "production") == 0     ? "production"
                         : strcmp(v.name, run->yardstick) == 0 ? "yardstick"
                                                               : "variant";
                for (int i = 0; i < 6 && (v.blocks[i] || i == 0); i++) c.blocks.push_back(v.blocks[i]);
                void (*launch)(const P*, int, cudaStream_t) = v.launch;
                const P* problem = &p;
                c.launch = [=](int block, cudaStream_t stream) { launch(problem, block, stream); };
                const char* refusal = v.refuses ? v.refuses(&p) : NULL;
                c.refusal = refusal ? refusal : "";
                c.selected = run->options.only.empty();
                for (const std::string& name : run->options.only) c.selected |= name == v.name;
                c.selected |= bench_rank(&c) < 2 && !run->options.profile;
                run->candidates.push_back(c);
            }
            if (run->options.profile)
                profile(run);
            else
                bench_shape(run, rows(&p),
                            [&](int64_t first, int64_t count) { reference(&run->bench, &p, first, count); });
        } catch (BenchNoRoom& e) {
            printf("%s   %s   %s: %s   skipped: no room for %.1f MB more on this GPU\n", run->op, BENCH_DTYPE, s->name,
                   bench_sizes(s, "").c_str(), (double)e.bytes * 1e-6);
        }
        run->bench.release();
    }

    static void profile(BenchRun* run) {
        for (const BenchCandidate& v : run->candidates) {
            if (!v.selected) continue;
            if (!v.refusal.empty()) die("%s: not here: %s", v.name, v.refusal.c_str());
            const int block = run->options.block ? run->options.block : v.blocks[0];
            run->bench.restore();
            bench_flush(run->bench.stream);
            bench_wait(run);
            run->running = v.name, run->running_block = block;
            cuda_check(cudaProfilerStart());
            v.launch(block, run->bench.stream);
            bench_wait(run);
            cuda_check(cudaProfilerStop());
            run->running = NULL;
            printf("%s   %s: %s   %s, block %d: launched once\n", run->op, run->shape->name,
                   bench_sizes(run->shape, "").c_str(), v.name, block);
        }
    }

    // small shapes first, so that what is wrong on one is timed on none
    void all(BenchRun* run) const {
        const std::string& wanted = run->options.shape;
        Shape custom;
        std::vector<const Shape*> chosen;
        for (int small = 1; small >= 0; small--)
            for (const Shape& s : shapes)
                if (s.small == (small == 1) && (wanted.empty() || wanted == s.name)) chosen.push_back(&s);
        if (chosen.empty()) {
            custom = bench_custom_shape(wanted, shapes, N_SHAPES);
            chosen.push_back(&custom);
        }
        if (run->options.profile && wanted.empty()) {
            std::vector<const Shape*> real;
            for (const Shape* s : chosen)
                if (!s->small) real.push_back(s);
            chosen.assign(1, real.empty() ? chosen[0] : real[0]);
        }
        run->start = bench_seconds();
        int left = 0;
        for (const Shape* s : chosen) left += !s->small;
        for (const Shape* s : chosen) {
            const double now = bench_seconds();
            run->deadline = 0;
            if (run->options.time_limit > 0 && !s->small)
                run->deadline = now + std::max(0.0, run->start + run->options.time_limit - now) / left--;
            one_shape(run, s);
        }
    }
};

static inline BenchOptions bench_options(int argc, char** argv, const char* op, bool* list) {
    BenchOptions o = {};
    o.seed = 1;
    *list = false;
    for (int i = 1; i < argc; i++) {
        const std::string name = argv[i];
        if (name == "--help" || name == "-h") bench_help(op), exit(0);
        if (name == "--list") {
            *list = true;
            continue;
        }
        if (name == "--check" || name == "--profile") {
            (name == "--check" ? o.check : o.profile) = true;
            continue;
        }
        static const char* const valued[] = { "--only", "--shape", "--json",      "--csv",
                                              "--seed", "--block", "--time-limit" };
        bool known = false;
        for (const char* v : valued) known |= name == v;
        if (!known) die("%s: no such option; see --help", argv[i]);
        if (i + 1 == argc) die("%s: expected a value; see --help", argv[i]);
        const std::string value = argv[++i];
        char* end = NULL;
        const double number = strtod(value.c_str(), &end);
        const bool is_number = !value.empty() && *end == 0 && number >= 0;
        if (name == "--only") o.only = bench_split(value);
        if (name == "--shape") o.shape = value;
        if (name == "--json") o.json = value;
        if (name == "--csv") o.csv = value;
        if (name == "--seed" || name == "--block" || name == "--time-limit") {
            if (!is_number) die("%s %s: expected a number", name.c_str(), value.c_str());
            if (name == "--seed") o.seed = (uint64_t)number;
            if (name == "--block") o.block = (int)number;
            if (name == "--time-limit") o.time_limit = number;
        }
    }
    return o;
}

// the GPU is ready and warm
static inline void bench_begin(BenchRun* run) {
    int device;
    cudaDeviceProp properties;
    cudaError_t code = cudaGetDevice(&device);
    if (code != cudaSuccess) die("no GPU: %s. --list and --help need none", cudaGetErrorString(code));
    cuda_check(cudaGetDeviceProperties(&properties, device));
    run->gpu = properties.name;
    cuda_check(cudaStreamCreateWithFlags(&run->bench.stream, cudaStreamNonBlocking));
    bench_run = run;
    atexit(bench_ended);
    const double start = bench_seconds();
    while (!run->quiet && bench_seconds() - start < 0.1) { // clocks rise when there is work
        for (int i = 0; i < 50; i++) bench_flush(run->bench.stream);
        bench_wait(run);
    }
}

template <typename P, int N_SHAPES, int N_VARIANTS>
static int bench_main(int argc, char** argv, const char* op, const char* yardstick,
                      const BenchProgram<P, N_SHAPES, N_VARIANTS>& program) {
    static BenchRun run;
    bool list;
    run.op = op, run.yardstick = yardstick;
    run.options = bench_options(argc, argv, op, &list);
    if (list) return program.list(&run), 0;
    for (const std::string& name : run.options.only) {
        bool known = false;
        for (const Variant<P>& v : program.variants) known |= name == v.name;
        if (!known) die("--only %s: no such variant; see --list", name.c_str());
    }
    bench_begin(&run);
    program.all(&run);
    fflush(stdout);
    for (auto& wrong : run.wrong) fprintf(stderr, "WRONG %s: %s\n", wrong.first.c_str(), wrong.second.c_str());
    return (int)std::min<size_t>(run.wrong.size(), BENCH_FAULT - 1);
}

template <typename P, int N_SHAPES, int N_VARIANTS>
static BenchProgram<P, N_SHAPES, N_VARIANTS>
bench_program(const Shape (&shapes)[N_SHAPES], P (*setup)(Bench*, const Shape*),
              void (*reference)(Bench*, const P*, int64_t, int64_t), int64_t (*rows)(const P*),
              double (*traffic)(const P*), double (*flops)(const P*), const Variant<P> (&variants)[N_VARIANTS]) {
    return BenchProgram<P, N_SHAPES, N_VARIANTS>{ shapes, setup, reference, rows, traffic, flops, variants };
}

#define BENCH_MAIN(op, shapes, setup, reference, rows, traffic, flops, variants)                                       \
    int main(int argc, char** argv) {                                                                                  \
        return bench_main(argc, argv, op, YARDSTICK,                                                                   \
                          bench_program(shapes, setup, reference, rows, traffic, flops, variants));                    \
    }
