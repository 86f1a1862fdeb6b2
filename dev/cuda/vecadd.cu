/*
c = a + b: the page that every other file of the lab imitates, and the smallest problem that shows what memory wants.

    c (N, C)  a (N, C)  b (N, C)        each number is read or written once; the additions are free

Bound by        memory: 3 * N * C numbers, 2 bytes each in bf16: 403 MB for N 16384, C 4096
The card        an H200 copies 4.30 TB/s (read + written): a floor of 94 us for those 403 MB
Measured        there, 2026-11-28, of a copy of as many bytes: a_run_each 12 %, one_each 49 %, grid_stride 62 %, packs 104 %,
                marked_as_once 98 %. Beyond 100, since two thirds are read, of a copy half, and reading is the faster half
Look at         l1tex__average_t_sectors_per_request (how scattered a warp's load is), smsp__inst_executed (a_run_each, one_each),
                dram__bytes.sum.per_second

    make -C dev/cuda bench-vecadd
*/
#define YARDSTICK "packs" // no module of llmc adds two arrays alone: the row that the others are measured by
#include "bench.cuh"

// ---- the problem: what is allocated, what is right, what must move ----------------------------

static const Shape shapes[] = {
    { .name = "1B", .N = 16384, .C = 2048 },
    { .name = "8B", .N = 16384, .C = 4096 },
    { .name = "one pack", .small = true, .N = 1, .C = 8 },
    { .name = "odd", .small = true, .N = 37, .C = 264 }, // 1221 packs: no multiple of a block
};

struct Problem {
    size_t n;
    int C;
    floatX *a, *b, *c;
};

static Problem setup(Bench* bench, const Shape* s) {
    Problem p;
    p.C = s->C;
    p.n = (size_t)s->N * s->C;
    p.a = bench->input<floatX>("a", p.n);
    p.b = bench->input<floatX>("b", p.n);
    p.c = bench->output<floatX>("c", p.n);
    return p;
}

static int64_t rows(const Problem* p) { return (int64_t)(p->n / p->C); }

static void reference(Bench* bench, const Problem* p, int64_t first, int64_t count) {
    const size_t start = (size_t)first * p->C, n = (size_t)count * p->C;
    const float *a = bench->host(p->a, start, n), *b = bench->host(p->b, start, n);
    float* c = (float*)allocate(n, sizeof *c);
    for (size_t i = 0; i < n; i++) c[i] = a[i] + b[i];
    bench->expect(p->c, start, c, n);
    free(c);
}

static double traffic(const Problem* p) { return 3.0 * (double)p->n * sizeof(floatX); }

static double flops(const Problem*) { return 0; }

// ---- a_run_each -------------------------------------------------------------------------------
// idea    share the numbers out as one would between processes: each thread adds a run of 32 neighbours
// limit   the lanes of a warp read addresses 64 bytes apart: one load of a warp touches 32 sectors and takes 2 bytes of each.
//         What is left of a sector must wait in the L1 for the next steps of the loop, and much is thrown out before

enum { RUN = 32 };

static __global__ void a_run_each_kernel(floatX* c, const floatX* a, const floatX* b, size_t n) {
    const size_t start = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * RUN;
    for (size_t i = start; i < start + RUN && i < n; i++) c[i] = from_float<floatX>(to_float(a[i]) + to_float(b[i]));
}

static void a_run_each(const Problem* p, int block, cudaStream_t stream) {
    a_run_each_kernel<<<(unsigned)ceil_div((int64_t)p->n, (int64_t)block * RUN), block, 0, stream>>>(p->c, p->a, p->b,
                                                                                                     p->n);
    launch_check();
}

// ---- one_each ---------------------------------------------------------------------------------
// idea    one thread, one number: neighbouring lanes touch neighbouring numbers, and a load of a warp is 64 bytes in a row
// limit   2 bytes a thread and load: a thread lives for one addition, and the index arithmetic is most of what it does

static __global__ void one_each_kernel(floatX* c, const floatX* a, const floatX* b, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = from_float<floatX>(to_float(a[i]) + to_float(b[i]));
}

static void one_each(const Problem* p, int block, cudaStream_t stream) {
    one_each_kernel<<<(unsigned)ceil_div((int64_t)p->n, block), block, 0, stream>>>(p->c, p->a, p->b, p->n);
    launch_check();
}

// ---- grid_stride ------------------------------------------------------------------------------
// idea    only as many blocks as the GPU holds at once; each thread walks on by the size of the grid, so that starting
//         blocks costs nothing
// limit   the loads are as small as before, and a thread waits for its two before it asks for the next: too few bytes under way

static __global__ void grid_stride_kernel(floatX* c, const floatX* a, const floatX* b, size_t n) {
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        c[i] = from_float<floatX>(to_float(a[i]) + to_float(b[i]));
}

static void grid_stride(const Problem* p, int block, cudaStream_t stream) {
    const int64_t most = (int64_t)gpu_processors() * (2048 / block), needed = ceil_div((int64_t)p->n, block);
    grid_stride_kernel<<<(unsigned)(needed < most ? needed : most), block, 0, stream>>>(p->c, p->a, p->b, p->n);
    launch_check();
}

// ---- packs ------------------------------------------------------------------------------------
// idea    16 bytes a thread and load, the most that one instruction moves: an eighth of the instructions for the same bytes
// limit   the memory: what is left is the turning round between reading and writing, which a copy has more of

template <bool ONCE>
static __global__ void packs_kernel(floatX* c, const floatX* a, const floatX* b, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    const PackX x = ONCE ? pack_load_once(a + i) : pack_load(a + i),
                y = ONCE ? pack_load_once(b + i) : pack_load(b + i);
    PackX sum;
    for (int k = 0; k < PACK; k++) sum.set(k, x.get(k) + y.get(k));
    if (ONCE)
        pack_store_once(c + i, sum);
    else
        pack_store(c + i, sum);
}

template <bool ONCE>
static void packs(const Problem* p, int block, cudaStream_t stream) {
    launch_require(p->n % PACK == 0, "packs", "N * C is a multiple of the numbers in 16 bytes");
    packs_kernel<ONCE><<<(unsigned)ceil_div((int64_t)(p->n / PACK), block), block, 0, stream>>>(p->c, p->a, p->b, p->n);
    launch_check();
}

// ---- marked_as_once ---------------------------------------------------------------------------
// idea    packs, but nothing is needed twice: ld.cs and st.cs tell the caches to throw these lines out before others
// limit   the mark of the loads costs 5 %, as it does in rmsnorm_forward.cu (loads_marked) and swiglu_forward.cu (once)

// ---- the table: to add a variant, write it above and add one row ------------------------------

// clang-format off
static const Variant<Problem> variants[] = {
//    name            launch        block sizes             what changed
    { "a_run_each",   a_run_each,   { 64, 128, 256, 512 },  "baseline: a thread adds 32 numbers in a row" },
    { "one_each",     one_each,     { 64, 128, 256, 512 },  "neighbouring lanes, neighbouring numbers" },
    { "grid_stride",  grid_stride,  { 128, 256, 512 },      "no more blocks than the GPU holds" },
    { "packs",        packs<false>, { 64, 128, 256, 512 },  "16 bytes a thread and load" },
    { "marked_as_once", packs<true>, { 64, 128, 256, 512 }, "its loads marked ld.cs, its stores st.cs" },
};
// clang-format on
BENCH_MAIN("vecadd", shapes, setup, reference, rows, traffic, flops, variants)
