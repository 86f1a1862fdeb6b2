/*
The GPU in this machine, as one wants to know it before one writes a kernel: what it has, and what it reaches. The figures that
it advertises are asked of the driver; the rates are measured here, on random data, since both matter: a table of peaks goes
stale, and zeros are multiplied faster than any data that one cares about.

    device_info [--json FILE] [--check]         --json appends one object; --check: nothing is measured

Copy            cudaMemcpy of 1 GiB, bytes read plus bytes written, as the lab counts them: the peak of its tables
Read, write     a kernel that sums 1 GiB, 16 bytes a load, and cudaMemset: reading alone is a little faster than a copy
L2 cache        the same kernel, twenty times over a piece that stays in the cache
Products        y = x · w^T, 8192 rows, columns and terms, by cuBLASLt, the fastest of its heuristic's candidates.
                sustained: one after the other for a second; the card gets as hot as it does in training, and its power
                limit holds the clock down. alone: one after a rest, the median of some. fp8 needs sm_89; its sums are those
                of the tensor cores (fast accumulation), which have fewer bits than fp32
Ridge           FLOPs a byte above which a kernel is bound by the products, below which by memory: the rate over that of a
                copy. A product of N rows with a weight in bf16 does N FLOPs for each byte of the weight
*/
#include <cuda_fp8.h>

#include "bench.cuh"
#include "llmc/matmul.h"

template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x) {
    return __nv_fp8_e4m3(x);
}

// ---- the report: one line each, and one field of the JSON object ------------------------------

static std::string json;

static void json_field(const char* key, const std::string& value) {
    json += bench_text("%s\"%s\":", json.empty() ? "" : ",", key) + value;
}

static void section(const char* title) { printf("\n%s\n", title); }

static void fact(const char* key, const char* label, double value, const char* format) {
    char text[128];
    snprintf(text, sizeof text, format, value);
    printf("  %-34s %s\n", label, text);
    json_field(key, bench_text("%.10g", value));
}

static int attribute(cudaDeviceAttr which) {
    int device, value = 0;
    cuda_check(cudaGetDevice(&device));
    if (cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) cudaGetLastError(), value = 0;
    return value;
}

// ---- what it has -----------------------------------------------------------------------------

static void describe(const cudaDeviceProp* gpu) {
    int driver, runtime;
    size_t free_bytes, total;
    cuda_check(cudaDriverGetVersion(&driver));
    cuda_check(cudaRuntimeGetVersion(&runtime));
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    printf("%s, sm_%d%d; the driver knows CUDA %d.%d, this program was built with %d.%d\n", gpu->name, gpu->major,
           gpu->minor, driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    json_field("gpu", bench_json_text(gpu->name));
    json_field("sm", std::to_string(10 * gpu->major + gpu->minor));
    json_field("driver_cuda", std::to_string(driver));

    section("memory");
    fact("memory_bytes", "size", (double)total, "%.0f bytes");
    fact("memory_free_bytes", "free", (double)free_bytes, "%.0f bytes");
    fact("memory_bus_bits", "bus", attribute(cudaDevAttrGlobalMemoryBusWidth), "%.0f bits");
    fact("memory_clock_mhz", "clock", attribute(cudaDevAttrMemoryClockRate) * 1e-3, "%.0f MHz");
    fact("ecc", "error correction", attribute(cudaDevAttrEccEnabled), "%.0f (1: on)");
    fact("l2_bytes", "L2 cache", attribute(cudaDevAttrL2CacheSize), "%.0f bytes");

    section("a multiprocessor");
    fact("processors", "of these", gpu->multiProcessorCount, "%.0f");
    fact("clock_mhz", "clock, at most", attribute(cudaDevAttrClockRate) * 1e-3, "%.0f MHz");
    fact("threads_per_processor", "threads", gpu->maxThreadsPerMultiProcessor, "%.0f");
    fact("blocks_per_processor", "blocks", gpu->maxBlocksPerMultiProcessor, "%.0f");
    fact("registers_per_processor", "registers", gpu->regsPerMultiprocessor, "%.0f of 4 bytes");
    fact("shared_per_processor", "shared memory", (double)gpu->sharedMemPerMultiprocessor, "%.0f bytes");

    section("a block");
    fact("threads_per_block", "threads, at most", gpu->maxThreadsPerBlock, "%.0f");
    fact("registers_per_block", "registers, at most", gpu->regsPerBlock, "%.0f");
    fact("shared_per_block", "shared memory", (double)gpu->sharedMemPerBlock, "%.0f bytes");
    fact("shared_per_block_optin", "  when asked for", (double)gpu->sharedMemPerBlockOptin, "%.0f bytes");
    fact("shared_reserved", "  kept by the system", (double)gpu->reservedSharedMemPerBlock, "%.0f bytes");
    fact("clusters", "clusters of blocks", attribute(cudaDevAttrClusterLaunch), "%.0f (1: yes)");
}

// ---- times -----------------------------------------------------------------------------------

static BenchRun run; // of the harness: its stream, and its timer's errors

// median microseconds of some launches under the lab's rules: the L2 cache flushed before each
template <typename F>
static double median_us(F launch) {
    static BenchTimer* timer = new BenchTimer;
    std::vector<float> us, none, *lists[2] = { &us, &none };
    for (int i = 0; i < 20; i++) timer->add(0, 0, run.bench.stream, launch);
    timer->take(&run, lists);
    return bench_quantile(us, 0.5);
}

// microseconds from before to after what is launched
template <typename F>
static double elapsed_us(F launch) {
    static cudaEvent_t start, stop;
    float ms;
    if (!start) cuda_check(cudaEventCreate(&start)), cuda_check(cudaEventCreate(&stop));
    cuda_check(cudaEventRecord(start, run.bench.stream));
    launch();
    cuda_check(cudaEventRecord(stop, run.bench.stream));
    cuda_check(cudaEventSynchronize(stop));
    cuda_check(cudaEventElapsedTime(&ms, start, stop));
    return 1e3 * ms;
}

// ticks of a multiprocessor's clock in some 200 us
static __global__ void clock_kernel(unsigned long long* ticks_and_ns) {
    unsigned long long start, now;
    const long long ticks = clock64();
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start)::"memory");
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    while (now - start < 200000);
    ticks_and_ns[0] = (unsigned long long)(clock64() - ticks), ticks_and_ns[1] = now - start;
}

// MHz, of the moment when what was launched before has ended
static double clock_mhz(void) {
    static unsigned long long* gpu;
    unsigned long long ticks_and_ns[2];
    if (!gpu) cuda_check(cudaMalloc((void**)&gpu, sizeof ticks_and_ns));
    clock_kernel<<<1, 1, 0, run.bench.stream>>>(gpu);
    launch_check();
    cuda_check(cudaMemcpyAsync(ticks_and_ns, gpu, sizeof ticks_and_ns, cudaMemcpyDeviceToHost, run.bench.stream));
    cuda_check(cudaStreamSynchronize(run.bench.stream));
    return 1e3 * (double)ticks_and_ns[0] / (double)ticks_and_ns[1];
}

// ---- bandwidth -------------------------------------------------------------------------------

// reads n times 16 bytes, `times` over
static __global__ void __launch_bounds__(512) read_kernel(const uint4* x, size_t n, int times, unsigned* never) {
    enum { LOADS = 4 };
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    unsigned sum = 0;
#pragma unroll 1
    for (int t = 0; t < times; t++)
#pragma unroll 1
        for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += LOADS * stride) {
            uint4 v[LOADS] = {};
#pragma unroll
            for (int j = 0; j < LOADS; j++)
                if (i + j * stride < n) v[j] = __ldcg(x + i + j * stride); // past the first level
#pragma unroll
            for (int j = 0; j < LOADS; j++) sum += v[j].x + v[j].y + v[j].z + v[j].w;
        }
    if (sum == 123456789) *never = sum; // else the loads would be left out
}

static __global__ void empty_kernel(void) {}

// bytes a microsecond are MB/s; returns GB/s of a copy
static double bandwidth(void) {
    enum { CACHED_TIMES = 20, LAUNCHES = 1000 };
    const cudaStream_t stream = run.bench.stream;
    const size_t bytes = (size_t)1 << 30, cached = (size_t)attribute(cudaDevAttrL2CacheSize) / 4 / 16 * 16;
    const unsigned blocks = (unsigned)gpu_processors() * 4;
    char* from = (char*)matmul_random<floatX>((int64_t)(bytes / sizeof(floatX)), 1, stream);
    char* to = bench_allocate(bytes);
    unsigned* never = (unsigned*)bench_allocate(sizeof(unsigned));
    if (!from) die("no room for 2 GiB on this GPU");
    auto read = [&](size_t n, int times) {
        read_kernel<<<blocks, 512, 0, stream>>>((const uint4*)from, n / 16, times, never);
        launch_check();
    };
    const double copy_us =
        median_us([&] { cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream)); });
    const double read_us = median_us([&] { read(bytes, 1); });
    const double write_us = median_us([&] { cuda_check(cudaMemsetAsync(to, 1, bytes, stream)); });
    read(cached, CACHED_TIMES);
    const double cached_us = elapsed_us([&] { read(cached, CACHED_TIMES); });
    const double launch_us = elapsed_us([&] {
        for (int i = 0; i < LAUNCHES; i++) empty_kernel<<<1, 32, 0, stream>>>();
    });
    launch_check();
    section("bandwidth, measured");
    fact("copy_GBps", "copy, read + written", 2e-3 * (double)bytes / copy_us, "%.0f GB/s");
    fact("read_GBps", "read", 1e-3 * (double)bytes / read_us, "%.0f GB/s");
    fact("write_GBps", "write", 1e-3 * (double)bytes / write_us, "%.0f GB/s");
    fact("l2_read_GBps", "read from the L2 cache", 1e-3 * (double)cached * CACHED_TIMES / cached_us, "%.0f GB/s");
    fact("launch_us", "an empty kernel after another", launch_us / LAUNCHES, "%.2f us");
    cudaFree(from), cudaFree(to), cudaFree(never);
    return 2e-3 * (double)bytes / copy_us;
}

// ---- products --------------------------------------------------------------------------------

enum { SIDE = 8192 };

struct Kind {
    const char* name;
    cudaDataType_t in, out;
    cublasComputeType_t compute;
    int sm; // the first that has it
    void* (*random)(int64_t n, uint64_t seed, cudaStream_t stream);
};

// clang-format off
static const Kind kinds[] = {
    { "bf16", CUDA_R_16BF,    CUDA_R_16BF, CUBLAS_COMPUTE_32F,           80, matmul_random<__nv_bfloat16> },
    { "tf32", CUDA_R_32F,     CUDA_R_32F,  CUBLAS_COMPUTE_32F_FAST_TF32, 80, matmul_random<float> },
    { "fp32", CUDA_R_32F,     CUDA_R_32F,  CUBLAS_COMPUTE_32F,           0,  matmul_random<float> },
    { "fp8",  CUDA_R_8F_E4M3, CUDA_R_16BF, CUBLAS_COMPUTE_32F,           89, matmul_random<__nv_fp8_e4m3> },
};
// clang-format on

// one product of a kind: y = x · w^T, in cuBLAS's order of columns y = w^T · x
struct Product {
    cublasLtMatmulDesc_t what;
    cublasLtMatrixLayout_t in, out;
    cublasLtMatmulAlgo_t algorithm;
    void *x, *w, *y;
};

static cublasStatus_t multiply(const Product* p, const cublasLtMatmulAlgo_t* algorithm) {
    const float one = 1, zero = 0;
    return cublasLtMatmul(matmul.handle, p->what, &one, p->w, p->in, p->x, p->in, &zero, p->y, p->out, p->y, p->out,
                          algorithm, matmul.workspace, MATMUL_WORKSPACE, run.bench.stream);
}

// the fastest of the candidates; false when there is none
static bool choose(Product* p) {
    cublasLtMatmulHeuristicResult_t found[MATMUL_CANDIDATES];
    cublasLtMatmulPreference_t preference;
    const size_t workspace = MATMUL_WORKSPACE;
    int n = 0;
    double best = INFINITY;
    cublas_check(cublasLtMatmulPreferenceCreate(&preference));
    cublas_check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                      sizeof workspace));
    const cublasStatus_t code = cublasLtMatmulAlgoGetHeuristic(matmul.handle, p->what, p->in, p->in, p->out, p->out,
                                                               preference, MATMUL_CANDIDATES, found, &n);
    cublasLtMatmulPreferenceDestroy(preference);
    for (int i = 0; i < n && code == CUBLAS_STATUS_SUCCESS; i++) {
        if (multiply(p, &found[i].algo) != CUBLAS_STATUS_SUCCESS) continue; // the first time the kernel is loaded
        const double us = elapsed_us([&] { cublas_check(multiply(p, &found[i].algo)); });
        if (us < best) best = us, p->algorithm = found[i].algo;
    }
    return isfinite(best);
}

static Product product_make(const Kind* kind) {
    Product p;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const int64_t n = (int64_t)SIDE * SIDE;
    cublas_check(cublasLtMatmulDescCreate(&p.what, kind->compute, CUDA_R_32F));
    cublas_check(cublasLtMatmulDescSetAttribute(p.what, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    if (kind->in == CUDA_R_8F_E4M3) {
        const int8_t fast = 1;
        cublas_check(cublasLtMatmulDescSetAttribute(p.what, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast));
    }
    cublas_check(cublasLtMatrixLayoutCreate(&p.in, kind->in, SIDE, SIDE, SIDE));
    cublas_check(cublasLtMatrixLayoutCreate(&p.out, kind->out, SIDE, SIDE, SIDE));
    p.x = kind->random(n, 1, run.bench.stream), p.w = kind->random(n, 2, run.bench.stream);
    p.y = bench_allocate((size_t)n * sizeof(float));
    if (!p.x || !p.w) die("no room for three matrices of %d x %d on this GPU", (int)SIDE, (int)SIDE);
    return p;
}

static void product_free(Product* p) {
    cuda_check(cudaStreamSynchronize(run.bench.stream));
    cublasLtMatmulDescDestroy(p->what), cublasLtMatrixLayoutDestroy(p->in), cublasLtMatrixLayoutDestroy(p->out);
    cudaFree(p->x), cudaFree(p->w), cudaFree(p->y);
}

static void products(double copy_GBps) {
    const double flops = 2.0 * SIDE * SIDE * (double)SIDE;
    section("products of 8192 x 8192 x 8192, measured");
    printf("  %-6s %18s %12s %16s %20s\n", "", "sustained TFLOP/s", "its clock", "alone TFLOP/s",
           "ridge, FLOPs a byte");
    for (const Kind& kind : kinds) {
        if (10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor) <
            kind.sm) {
            printf("  %-6s this GPU has no such products: they begin with sm_%d\n", kind.name, kind.sm);
            continue;
        }
        Product p = product_make(&kind);
        if (!choose(&p)) {
            printf("  %-6s cuBLASLt has none for this GPU\n", kind.name);
            product_free(&p);
            continue;
        }
        std::vector<float> alone;
        for (int i = 0; i < 5; i++) {
            const struct timespec rest = { 0, 50000000 };
            nanosleep(&rest, NULL);
            alone.push_back((float)elapsed_us([&] { cublas_check(multiply(&p, &p.algorithm)); }));
        }
        const double alone_us = bench_quantile(alone, 0.5);
        const int times = (int)std::max(3.0, 1e6 / alone_us); // for a second, or somewhat more
        const double us = elapsed_us([&] {
                              for (int i = 0; i < times; i++) cublas_check(multiply(&p, &p.algorithm));
                          }) /
                          times;
        const double mhz = clock_mhz(), rate = flops / us * 1e-6;
        printf("  %-6s %18.1f %8.0f MHz %16.1f %20.0f\n", kind.name, rate, mhz, flops / alone_us * 1e-6,
               1e3 * rate / copy_GBps);
        json_field((std::string(kind.name) + "_TFLOPs").c_str(), bench_text("%.1f", rate));
        json_field((std::string(kind.name) + "_alone_TFLOPs").c_str(), bench_text("%.1f", flops / alone_us * 1e-6));
        json_field((std::string(kind.name) + "_clock_mhz").c_str(), bench_text("%.0f", mhz));
        product_free(&p);
    }
}

// ---- the program -----------------------------------------------------------------------------

int main(int argc, char** argv) {
    const char* file = NULL;
    bool measure = true;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            printf("device_info [--json FILE] [--check]\n\nWhat the GPU has, and what it reaches.\n"
                   "  --json FILE  append one object\n  --check      measure nothing\n");
            return 0;
        }
        if (strcmp(argv[i], "--check") == 0)
            measure = false;
        else if (strcmp(argv[i], "--json") == 0 && i + 1 < argc)
            file = argv[++i];
        else
            die("%s: expected --json FILE, --check or --help", argv[i]);
    }
    cudaDeviceProp gpu;
    int device;
    const cudaError_t code = cudaGetDevice(&device);
    if (code != cudaSuccess) die("no GPU: %s", cudaGetErrorString(code));
    cuda_check(cudaGetDeviceProperties(&gpu, device));
    describe(&gpu);
    if (measure) {
        run.op = "device_info";
        bench_begin(&run);
        matmul_init();
        try {
            products(bandwidth());
        } catch (BenchNoRoom& e) { die("no room for %.0f MB more on this GPU", (double)e.bytes * 1e-6); }
        matmul_free();
    }
    if (!file) return 0;
    FILE* out = fopen(file, "a");
    if (!out) die("--json %s: %s", file, strerror(errno));
    fprintf(out, "{\"device_info\":{%s}}\n", json.c_str());
    if (fclose(out) != 0) die("--json %s: %s", file, strerror(errno));
    return 0;
}
