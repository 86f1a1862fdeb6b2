/*
The matrix product of a linear layer in fp32: the ladder of the CUDA cores, matmul_cores.cuh, with every factor a float.

    y[m][n] = sum over k of a[m][k] * b[n][k]       a (M, K)    b (N, K)    y (M, N)    fp32, no TF32

FLOPs           2*M*N*K. An H200 multiplies 128 pairs a cycle on each of 132 multiprocessors: 67 TFLOP/s at its highest clock.
                4096 x 4096 x 4096 takes 2.1 ms at that rate, its 200 MB 0.05 ms: FLOPs bound it, as soon as each number that
                is fetched serves enough of them
                device_info's cuBLAS keeps up 48.8 TFLOP/s at 1830 MHz, and reaches 51.0 alone
Why it matters  -DPRECISION_FP32 trains so; and it is the ladder without tensor cores, where every load is in sight
Measured        on an H200, TFLOP/s and beside it the ratio to cublasSgemm in the same run

                                    1024 cubed      4096 cubed      1B qkv          1B down
                    naive           0.5     0.01    -               -               -
                    coalesced       6.3     0.19    6.6     0.13    6.4     0.13    -
                    shared_tile     6.6     0.20    6.9     0.14    7.2     0.14    7.0     0.14
                    register_tile   5.9     0.18    23.0    0.45    22.5    0.45    22.8    0.45
                    vectors         16.3    0.49    43.4    0.85    44.0    0.87    44.1    0.86
                    double_buffer   18.6    0.56    46.3    0.91    46.8    0.93    46.6    0.91
                    production      35.9    1.09    50.9    1.00    50.2    1.00    50.7    0.99
                    cublasSgemm     33.0    1       50.8    1       50.4    1       51.0    1

                1024 cubed is 64 blocks of 128 x 128, not one for each of the 132 multiprocessors
ncu             1B qkv: issue slots are 49 % in use under register_tile, 76 under vectors, 82 under double_buffer, 90 under
                production; register_tile waits for memory two thirds of the time (results/nvidia-h200/matmul_fp32.md)
Shapes          M any, N and K multiples of 4 (vectors of 16 bytes)
Look at         sm__inst_executed_pipe_fma (of all instructions: 64 of 80 in register_tile, more with vectors),
                l1tex__data_pipe_lsu_wavefronts_mem_shared, smsp__average_warps_issue_stalled_long_scoreboard (vectors waits
                for memory, double_buffer does not)
*/
#undef PRECISION_FP32
#define PRECISION_FP32 // this file is about fp32 in every build; matmul.cu is about bf16

#include "matmul_cores.cuh"

#include <cublas_v2.h>

typedef Product Problem;

static Problem setup(Bench* bench, const Shape* s) {
    Problem p = product_setup(bench, s);
    matmul_choose(matmul_shape(MATMUL_FORWARD, false, false, p.M, p.K, p.N, p.N), bench->stream);
    return p;
}

static void reference(Bench* bench, const Problem* p, int64_t first, int64_t count) {
    product_reference(bench, p, first, count);
}
static int64_t rows(const Problem* p) { return p->M; }
static double traffic(const Problem* p) {
    return 4.0 * ((double)p->M * p->K + (double)p->N * p->K + (double)p->M * p->N);
}
static double flops(const Problem* p) { return product_flops(p); }

// ---- production, library ---------------------------------------------------------------------

static void production(const Problem* p, int, cudaStream_t stream) {
    matmul_forward(p->y, p->N, p->a, p->b, p->M, p->K, p->N, stream);
}

// columns first: y^T (N, M) = b (K, N)^T · a (K, M)
static void sgemm(const Problem* p, int, cudaStream_t stream) {
    static cublasHandle_t handle = NULL;
    const float one = 1, zero = 0;
    if (!handle) cublas_check(cublasCreate(&handle)); // products are fp32 unless TF32 is asked for
    cublas_check(cublasSetStream(handle, stream));
    cublas_check(cublasSgemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, p->N, p->M, p->K, &one, p->b, p->K, p->a, p->K, &zero,
                             p->y, p->N));
}

// ---- the table -------------------------------------------------------------------------------

// clang-format off
static const Shape shapes[] = { // N: rows (M), C: summed (K), F: outputs (N)
    { .name = "1024 cubed", .N = 1024, .C = 1024, .F = 1024 },
    { .name = "4096 cubed", .N = 4096, .C = 4096, .F = 4096 },
    { .name = "1B qkv", .N = 16384, .C = 2048, .F = 3072 },
    { .name = "1B down", .N = 16384, .C = 8192, .F = 2048 },
    { .name = "smallest", .small = true, .N = 1, .C = 4, .F = 4 },
    { .name = "odd", .small = true, .N = 37, .C = 76, .F = 268 },
    { .name = "one row", .small = true, .N = 1, .C = 512, .F = 512 },
    { .name = "a row more", .small = true, .N = 257, .C = 328, .F = 252 },
};

static const Variant<Problem> variants[] = {
    // name            launcher       block sizes       what changed
    { "naive",         naive,         { 64, 256 },      "one thread an output",                          refuses_half_tflops },
    { "coalesced",     coalesced,     { 128, 256 },     "one warp an output, its lanes along k",         refuses_one_tflops },
    { "shared_tile",   shared_tile,   { 0 },            "32 x 32 outputs from tiles in shared memory",   refuses_five_tflops },
    { "register_tile", register_tile, { 0 },            "8 x 8 outputs a thread, in registers" },
    { "vectors",       vectors,       { 0 },            "16 bytes an instruction" },
    { "double_buffer", double_buffer, { 0 },            "the next tile comes while this one is multiplied" },
    { "production",    production,    { 0 },            "cuBLASLt's fastest candidate: llmc/matmul_cublas.cuh" },
    { "library",       sgemm,         { 0 },            "cublasSgemm, without TF32" },
};
// clang-format on
BENCH_MAIN("matmul_fp32", shapes, setup, reference, rows, traffic, flops, variants)
