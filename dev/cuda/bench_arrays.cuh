/*
The arrays of the lab's problems: see bench.cuh, which includes this.
*/
#pragma once

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
        if (a->host_floats) return a->host_floats + first;
        float*& values = parts[{ gpu, first, n }]; // asked for twice, made once
        if (!values) {
            std::vector<char> bits(n * sizeof(T) + 1);
            values = (float*)allocate(n, sizeof(float));
            cuda_check(cudaMemcpy(bits.data(), a->from() + first * sizeof(T), n * sizeof(T), cudaMemcpyDeviceToHost));
            a->type->to_floats(values, bits.data(), n);
        }
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
    std::map<std::tuple<const void*, size_t, size_t>, float*>
        parts; // of arrays, on the host, by first number and count
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
        for (auto& part : parts) free(part.second);
        arrays.clear(), parts.clear();
    }
};
