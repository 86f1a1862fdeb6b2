/*
The matrix product on the CPU: how it got fast, and how near it is to OpenBLAS and to the memory.

    make bench-cpu                                   check all, time all, print the tables
    build/lab/matmul --shape 2048,288,480          one shape: N rows, C inputs, OC outputs
    build/lab/matmul --shape 1,2048,65536          few rows: the weights are the work, GB/s beside a plain read
    build/lab/matmul --only tiled                  one variant

A variant is checked before it is timed, and a wrong one is not timed. Variants take turns, one call each a round, so that a
busy moment of the machine hits all of them: "of OpenBLAS" and "of read" are medians of the ratios within a round. The exit
code is the number of wrong variants.
*/
#include <float.h>
#include <math.h>
#include <omp.h>
#include <time.h>

#ifdef HAVE_OPENBLAS
#include <cblas.h>
#endif

#include "llmc/check.h"
#include "llmc/error.h"
#include "llmc/matmul.h"
#include "llmc/random.h"

// ---- the problem -----------------------------------------------------------------------------

typedef enum { FORWARD, DX, DW, PRODUCTS } Product;
static const char* const product_names[PRODUCTS] = { "y = x · w^T", "dx = dy · w", "dw += dy^T · x" };

typedef struct {
    int N, C, OC;
    float *x, *w, *dy;  // (N, C), (OC, C), (N, OC)
    float *y, *dx, *dw; // what a variant writes
    float* scratch;     // (C, OC)
    void* half;         // w's numbers in 16 bits, or NULL
    Tensor stored;      // w as the variant gets it
} Problem;

static float* random_numbers(size_t n, uint64_t stream) {
    float* x = (float*)allocate(n, sizeof *x);
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) x[i] = 2 * random_uniform(1, stream, i) - 1;
    return x;
}

static Problem setup(int N, int C, int OC) {
    const size_t x = (size_t)N * C, w = (size_t)OC * C, y = (size_t)N * OC;
    Problem p = { N,    C,    OC,   random_numbers(x, 1), random_numbers(w, 2), random_numbers(y, 3), NULL, NULL,
                  NULL, NULL, NULL, { NULL, DTYPE_F32 } };
    p.y = (float*)allocate(y, sizeof(float));
    p.dx = (float*)allocate(x, sizeof(float));
    p.dw = (float*)allocate(w, sizeof(float));
    p.scratch = (float*)allocate(w, sizeof(float));
    p.half = allocate(w, 2);
    p.stored.data = p.w;
    return p;
}

static void release(Problem* p) {
    free(p->x), free(p->w), free(p->dy), free(p->y), free(p->dx), free(p->dw), free(p->scratch), free(p->half);
}

static float* output_of(const Problem* p, Product product, int* rows, int* cols) {
    *rows = product == DW ? p->OC : p->N;
    *cols = product == FORWARD ? p->OC : p->C;
    return product == FORWARD ? p->y : product == DX ? p->dx : p->dw;
}

// output (i, j) in double, and the sum of the absolute values that went into it
static double reference(const Problem* p, Product product, int i, int j, double* size) {
    const int K = product == FORWARD ? p->C : product == DX ? p->OC : p->N;
    double sum = *size = product == DW;
    for (int k = 0; k < K; k++) {
        const size_t N = (size_t)(product == DW ? k : i), OC = (size_t)(product == DX ? k : product == DW ? i : j);
        const double a = product == FORWARD ? p->x[N * p->C + k] : p->dy[N * p->OC + OC];
        const double b = product == FORWARD ? tensor_get(p->stored, OC * p->C + k)
                         : product == DX    ? p->w[OC * p->C + j]
                                            : p->x[N * p->C + j];
        sum += a * b;
        *size += fabs(a * b);
    }
    return sum;
}

// ---- naive -----------------------------------------------------------------------------------
// idea    the formula: each output is the dot product of a row of x and a row of w
// limit   one chain of additions: each waits for the one before, and C forbids the compiler to split the sum

static void naive(Problem* p, Product product) {
    (void)product;
    for (int n = 0; n < p->N; n++)
        for (int o = 0; o < p->OC; o++) {
            float sum = 0;
            for (int c = 0; c < p->C; c++) sum += p->x[(size_t)n * p->C + c] * p->w[(size_t)o * p->C + c];
            p->y[(size_t)n * p->OC + o] = sum;
        }
}

// ---- simd_sum --------------------------------------------------------------------------------
// idea    allow the split: a vector of partial sums per output
// limit   two loads feed one multiply-add, and for each row of x all of w comes from the cache again

static void simd_sum(Problem* p, Product product) {
    (void)product;
    for (int n = 0; n < p->N; n++)
        for (int o = 0; o < p->OC; o++) {
            const float *x = p->x + (size_t)n * p->C, *w = p->w + (size_t)o * p->C;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int c = 0; c < p->C; c++) sum += x[c] * w[c];
            p->y[(size_t)n * p->OC + o] = sum;
        }
}

// ---- reordered -------------------------------------------------------------------------------
// idea    transpose w once and let the outputs run innermost: they are independent, every loop is contiguous, no sum is split
// limit   a load of w, a load and a store of y for each multiply-add

static void transpose(float* t, const float* w, int OC, int C) {
    for (int o = 0; o < OC; o++)
        for (int c = 0; c < C; c++) t[(size_t)c * OC + o] = w[(size_t)o * C + c];
}

static void reordered(Problem* p, Product product) {
    (void)product;
    transpose(p->scratch, p->w, p->OC, p->C);
    memset(p->y, 0, (size_t)p->N * p->OC * sizeof(float));
    for (int n = 0; n < p->N; n++)
        for (int c = 0; c < p->C; c++) {
            const float x = p->x[(size_t)n * p->C + c], *w = p->scratch + (size_t)c * p->OC;
            float* y = p->y + (size_t)n * p->OC;
#pragma omp simd
            for (int o = 0; o < p->OC; o++) y[o] += x * w[o];
        }
}

// ---- tiled -----------------------------------------------------------------------------------
// idea    a tile of outputs stays in registers for the whole sum: 11 loads feed 24 multiply-adds (AVX-512), none stores
// limit   each step reads another row of x and of w, far apart: cache sets and TLB entries run out as matrices grow

static void tiled(Problem* p, Product product) {
    transpose(p->scratch, p->w, p->OC, p->C);
    const int rows = p->N / MATMUL_ROWS * MATMUL_ROWS, cols = p->OC / MATMUL_COLS * MATMUL_COLS;
    for (int o = 0; o < cols; o += MATMUL_COLS)
        for (int n = 0; n < rows; n += MATMUL_ROWS) {
            matmul_vec sum[MATMUL_ROWS][MATMUL_VECTORS] = { { { 0 } } };
            for (int c = 0; c < p->C; c++) {
                matmul_vec v[MATMUL_VECTORS];
                for (int j = 0; j < MATMUL_VECTORS; j++)
                    memcpy(&v[j], p->scratch + (size_t)c * p->OC + o + j * MATMUL_LANES, sizeof v[j]);
                for (int i = 0; i < MATMUL_ROWS; i++)
                    for (int j = 0; j < MATMUL_VECTORS; j++) sum[i][j] += p->x[(size_t)(n + i) * p->C + c] * v[j];
            }
            for (int i = 0; i < MATMUL_ROWS; i++)
                for (int j = 0; j < MATMUL_VECTORS; j++)
                    memcpy(p->y + (size_t)(n + i) * p->OC + o + j * MATMUL_LANES, &sum[i][j], sizeof sum[i][j]);
        }
    Problem rest = *p; // what fills no tile: columns on the right, rows below
    for (int n = 0; n < p->N; n++)
        for (int o = n < rows ? cols : 0; o < p->OC; o++) {
            rest.N = rest.OC = 1, rest.x = p->x + (size_t)n * p->C, rest.w = p->w + (size_t)o * p->C;
            rest.y = p->y + (size_t)n * p->OC + o;
            simd_sum(&rest, product);
        }
}

// ---- production, and packed: the same on one thread ------------------------------------------
// idea    copy blocks of both into the order in which the tile reads, sized for the caches; then let threads take blocks
// limit   the multiply-add units: what is left is the packing and the waiting for each other at the end of a phase

static void production(Problem* p, Product product) {
    if (product == FORWARD) matmul_forward_cpu(p->y, p->OC, p->x, p->stored, p->N, p->C, p->OC);
    if (product == DX) matmul_backward_cpu(p->dx, false, NULL, p->dy, p->x, p->stored, p->N, p->C, p->OC);
    if (product == DW) matmul_backward_cpu(NULL, false, p->dw, p->dy, p->x, p->stored, p->N, p->C, p->OC);
}

static void packed(Problem* p, Product product) {
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    production(p, product);
    omp_set_num_threads(threads);
}

// ---- OpenBLAS --------------------------------------------------------------------------------

#ifdef HAVE_OPENBLAS
static void openblas(Problem* p, Product product) {
    const int N = p->N, C = p->C, OC = p->OC;
    if (product == FORWARD)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, N, OC, C, 1, p->x, C, p->w, C, 0, p->y, OC);
    if (product == DX)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, N, C, OC, 1, p->dy, OC, p->w, C, 0, p->dx, C);
    if (product == DW)
        cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, OC, C, N, 1, p->dy, OC, p->x, C, 1, p->dw, C);
}
#endif

// ---- few rows --------------------------------------------------------------------------------

static uint64_t read_sum; // kept, so that the reading is

// as many bytes as the weights have, read and added up
static void read_bytes(const void* data, size_t bytes) {
    const uint64_t* words = (const uint64_t*)data;
    uint64_t sum = 0;
#pragma omp parallel for simd reduction(+ : sum)
    for (size_t i = 0; i < bytes / 8; i++) sum += words[i];
    read_sum += sum;
}

static void read_f32(Problem* p, Product product) {
    (void)product;
    read_bytes(p->w, (size_t)p->OC * p->C * 4);
}

static void read_half(Problem* p, Product product) {
    (void)product;
    read_bytes(p->half, (size_t)p->OC * p->C * 2);
}

// ---- the tables: to add a variant, write it above and add one row ----------------------------

typedef struct {
    const char* name;
    void (*run)(Problem* p, Product product);
    int products;       // 1: forward alone
    double most;        // multiply-adds up to which it is run: slow variants only on small shapes
    const char* change; // what changed
} Variant;

// clang-format off
static const Variant many_rows[] = {
//    name          run         products  most   what changed
    { "naive",      naive,      1,        2e8,   "baseline" },
    { "simd_sum",   simd_sum,   1,        2e8,   "a vector of partial sums" },
    { "reordered",  reordered,  1,        2e8,   "w transposed, outputs innermost" },
    { "tiled",      tiled,      1,        2e8,   "a tile of sums in registers" },
    { "packed",     packed,     PRODUCTS, 2e8,   "blocks packed in the order of reading: llmc/matmul.h on one thread" },
    { "production", production, PRODUCTS, 1e15,  "threads: llmc/matmul.h, what the trainer runs" },
#ifdef HAVE_OPENBLAS
    { "OpenBLAS",   openblas,   PRODUCTS, 1e15,  "the library" },
#endif
};

static const Variant few_rows[] = {
    { "production", production, 1,        1e15,  "llmc/matmul.h: weights read once, converted in registers" },
#ifdef HAVE_OPENBLAS
    { "OpenBLAS",   openblas,   1,        1e15,  "the library" },
#endif
    { "read",       read_f32,   1,        1e15,  "the same bytes, read and added up" },
};

static const Variant few_rows_half[] = {
    { "production", production, 1,        1e15,  "llmc/matmul.h: weights read once, converted in registers" },
    { "read",       read_half,  1,        1e15,  "the same bytes, read and added up" },
};

static const int shapes[][3] = {
    {  512,  512,   512 },  // the ladder
    { 2048, 2048,  2048 },
    { 2048,  288,   480 }, { 2048,  288,  288 }, { 2048,  288,  1536 }, { 2048,  768,  288 }, { 256, 288, 32000 }, // 15M
    {  512, 2048,  3072 }, {  512, 2048, 2048 }, {  512, 2048, 16384 }, {  512, 8192, 2048 },                      // 1B
    { 1024,  128,   256 }, { 1024,  128,  768 }, { 1024,  384,   128 },                                            // tiny
    { 1, 2048, 65536 }, { 4, 2048, 65536 }, { 8, 2048, 65536 }, // weights far larger than the cache
};
// clang-format on

// ---- check -----------------------------------------------------------------------------------

// all outputs are compared with the reference while that takes no minute, else 4096 of them, among them the last rows and
// columns; all must be finite
static bool right(const char* name, Problem* p, Product product, void (*run)(Problem*, Product)) {
    int rows, cols;
    float* out = output_of(p, product, &rows, &cols);
    const size_t n = (size_t)rows * cols, most = (double)p->N * p->C * p->OC <= 2e8 ? n : 4096,
                 tested = n < most ? n : most;
    for (size_t i = 0; i < n; i++) out[i] = product == DW ? 1 : NAN;
    run(p, product);
    float *got = (float*)allocate(tested + 1, sizeof *got), *want = (float*)allocate(tested + 1, sizeof *want);
    double largest = 0, scale = 0;
#pragma omp parallel for reduction(max : largest, scale)
    for (size_t s = 0; s < tested; s++) {
        size_t at = tested == n ? s : random_bits(2, 0, s) % n;
        if (tested < n && s % 4 == 1) at = n - 1 - at % cols;                   // the last row
        if (tested < n && s % 4 == 2) at = at / cols * cols + (size_t)cols - 1; // the last column
        double size;
        got[s] = out[at];
        want[s] = (float)reference(p, product, (int)(at / cols), (int)(at % cols), &size);
        largest = fmax(largest, size);
        scale = fmax(scale, fabs(want[s]));
    }
    for (size_t i = 0; i < n; i++)
        if (!check_finite(out[i])) got[tested] = out[i];
    bool ok = check_close(name, got, want, tested + 1, 4 * FLT_EPSILON * largest / scale);
    free(got), free(want);
    return ok;
}

// ---- timing ----------------------------------------------------------------------------------

enum { MAX_VARIANTS = 16, MAX_ROUNDS = 101 };

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// sorts x
static double quantile(double* x, int n, double q) {
    qsort(x, (size_t)n, sizeof *x, ascending);
    return x[(int)(q * (n - 1) + 0.5)];
}

// one table; returns how many variants are wrong. The last variant is what the others are measured by
static int table(Problem* p, Product product, const Variant* variants, int n_variants, const char* only,
                 bool bandwidth) {
    static double times[MAX_VARIANTS][MAX_ROUNDS];
    const double work = (double)p->N * p->C * p->OC;
    bool active[MAX_VARIANTS] = { false }, is_right[MAX_VARIANTS] = { false };
    int wrong = 0;
    double round_time = 0;
    for (int v = 0; v < n_variants; v++) {
        const bool reads = strcmp(variants[v].name, "read") == 0;
        active[v] = (int)product < variants[v].products && work <= variants[v].most &&
                    (!only || strcmp(only, variants[v].name) == 0 || reads);
        if (!active[v]) continue;
        is_right[v] = reads || right(variants[v].name, p, product, variants[v].run);
        wrong += !is_right[v];
        double start = seconds();
        if (is_right[v]) variants[v].run(p, product);
        round_time += seconds() - start;
    }
    int rounds = (int)fmin(MAX_ROUNDS, fmax(9, 1.5 / round_time));
    for (int r = 0; r < rounds; r++)
        for (int v = 0; v < n_variants; v++) {
            if (!is_right[v]) continue;
            double start = seconds();
            variants[v].run(p, product);
            times[v][r] = seconds() - start;
        }

    const char* unit = bandwidth ? "GB/s" : "GFLOP/s";
    const char* peer = n_variants && is_right[n_variants - 1] ? variants[n_variants - 1].name : NULL;
    printf("\n%s   N %d  C %d  OC %d  w %s   %d threads, %d rounds\n", product_names[product], p->N, p->C, p->OC,
           dtype_name(p->stored.dtype), omp_get_max_threads(), rounds);
    printf("  %-11s %-6s %10s %7s %8s  of %-9s what changed\n", "variant", "check", "median ms", "spread", unit,
           peer ? peer : "-");
    double ratios[MAX_VARIANTS][MAX_ROUNDS];
    for (int v = 0; v < n_variants; v++)
        for (int r = 0; r < rounds; r++) ratios[v][r] = times[n_variants - 1][r] / times[v][r];
    for (int v = 0; v < n_variants; v++) {
        if (!active[v]) continue;
        printf("  %-11s %-6s ", variants[v].name, is_right[v] ? "ok" : "WRONG");
        if (is_right[v]) {
            const double median = quantile(times[v], rounds, 0.5);
            const double amount = bandwidth ? (double)p->OC * p->C * dtype_bytes(p->stored.dtype) : 2 * work;
            printf("%10.3f %5.0f %% %8.1f  ", 1e3 * median,
                   100 * (quantile(times[v], rounds, 0.9) - quantile(times[v], rounds, 0.1)) / median,
                   1e-9 * amount / median);
            if (peer)
                printf("%10.3f   ", quantile(ratios[v], rounds, 0.5));
            else
                printf("%10s   ", "-");
        }
        printf("%s\n", variants[v].change);
    }
    fflush(stdout);
    return wrong;
}

#define COUNT(array) (int)(sizeof(array) / sizeof(array)[0])

static int bench(int N, int C, int OC, const char* only) {
    Problem p = setup(N, C, OC);
    int wrong = 0;
    if (N <= MATMUL_FEW) {
        wrong += table(&p, FORWARD, few_rows, COUNT(few_rows), only, true);
        for (int dtype = DTYPE_BF16; dtype <= DTYPE_F16; dtype++) {
            uint16_t* half = (uint16_t*)p.half;
#pragma omp parallel for
            for (size_t i = 0; i < (size_t)OC * C; i++)
                half[i] = dtype == DTYPE_BF16 ? float_to_bf16(p.w[i]) : float_to_f16(p.w[i]);
            p.stored.data = half, p.stored.dtype = (Dtype)dtype;
            wrong += table(&p, FORWARD, few_rows_half, COUNT(few_rows_half), only, true);
        }
    } else
        for (int product = FORWARD; product < PRODUCTS; product++)
            wrong += table(&p, (Product)product, many_rows, COUNT(many_rows), only, false);
    release(&p);
    return wrong;
}

static void help(void) {
    printf("matmul [--shape N,C,OC] [--only VARIANT]\n\nvariants:");
    for (int v = 0; v < COUNT(many_rows); v++) printf(" %s", many_rows[v].name);
    printf("\nN up to %d times the path of few rows\n", MATMUL_FEW);
}

int main(int argc, char** argv) {
    int N = 0, C = 0, OC = 0, wrong = 0;
    const char* only = NULL;
    for (int i = 1; i < argc; i++) {
        char end;
        if (strcmp(argv[i], "--help") == 0) return help(), 0;
        if (i + 1 == argc) die("%s: expected an option and its value; see --help", argv[i]);
        if (strcmp(argv[i], "--only") == 0)
            only = argv[++i];
        else if (strcmp(argv[i], "--shape") == 0) {
            if (sscanf(argv[++i], "%d,%d,%d%c", &N, &C, &OC, &end) != 3 || N < 1 || C < 1 || OC < 1)
                die("--shape %s: expected three numbers, N,C,OC", argv[i]);
        } else
            die("%s: no such option; see --help", argv[i]);
    }
    bool known = !only;
    for (int v = 0; v < COUNT(many_rows) && only; v++) known |= strcmp(only, many_rows[v].name) == 0;
    if (!known) die("--only %s: no such variant; see --help", only);
#ifdef HAVE_OPENBLAS
    if (getenv("OPENBLAS_CORETYPE"))
        die("OPENBLAS_CORETYPE is set, which chooses OpenBLAS's kernel: unset it to compare");
    printf("OpenBLAS: %s, kernel %s, %s threads\n", openblas_get_config(), openblas_get_corename(),
           openblas_get_parallel() == OPENBLAS_OPENMP ? "OpenMP" : "its own");
#endif
    if (N) wrong = bench(N, C, OC, only);
    for (int s = 0; s < COUNT(shapes) && !N; s++) wrong += bench(shapes[s][0], shapes[s][1], shapes[s][2], only);
    return wrong;
}
