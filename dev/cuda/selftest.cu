/*
Does the harness reject what is wrong? Variants with a mistake planted in each, and a few that are right.

    y (N, C) = x - 2 z      s (N) = sum of a row of x      m (N) = how many of a row of x are positive      t (N) += s

    make -C dev/cuda selftest

A line for each variant; the exit code is 0 when every mistake was rejected for its own reason and not timed, and every right
variant was accepted and timed. What ends a program (a fault, a launch that is refused) is tried in programs of their own.
*/
#include <unistd.h>

#include "bench.cuh"

// ---- the problem -----------------------------------------------------------------------------

static const Shape shapes[] = {
    { .name = "real", .N = 1500, .C = 256 },
    { .name = "one row", .small = true, .N = 1, .C = 8 },
    { .name = "odd", .small = true, .N = 37, .C = 72 },
};

struct Problem {
    int N, C;
    floatX *x, *z, *y;
    float *s, *t, *sums;
    int32_t* m;
};

static Problem setup(Bench* b, const Shape* shape) {
    Problem p;
    const size_t N = (size_t)shape->N, n = N * shape->C;
    p.N = shape->N, p.C = shape->C;
    p.x = b->input<floatX>("x", n);
    p.z = b->input<floatX>("z", n, 0.5f, 0.25f);
    p.y = b->output<floatX>("y", n);
    p.s = b->output<float>("s", N, shape->C);
    p.m = b->output<int32_t>("m", N);
    p.t = b->in_place<float>("t", N, 1, shape->C);
    p.sums = b->scratch<float>(N);
    return p;
}

static int64_t rows(const Problem* p) { return p->N; }

static void reference(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const float *x = b->host(p->x), *z = b->host(p->z), *t = b->host(p->t);
    for (int64_t n = first; n < first + count; n++) {
        std::vector<float> y(p->C);
        float s = 0;
        int m = 0;
        for (int c = 0; c < p->C; c++) {
            const size_t i = (size_t)n * p->C + c;
            y[c] = x[i] - 2 * z[i], s += x[i], m += x[i] > 0;
        }
        const float sum = t[n] + s;
        b->expect(p->y, (size_t)n * p->C, y.data(), p->C);
        b->expect(p->s, (size_t)n, &s, 1);
        b->expect(p->m, (size_t)n, &m, 1);
        b->expect(p->t, (size_t)n, &sum, 1);
    }
}

static double traffic(const Problem* p) { return 3.0 * p->N * p->C * sizeof(floatX); }

static double flops(const Problem*) { return 0; }

// ---- one kernel, and what may be wrong with it -----------------------------------------------

enum Mistake {
    NONE,
    NAN_IN_ONE_PLACE,
    INFINITE,
    NOTHING_WRITTEN,
    SKIPPED_ROWS,
    SKIPPED_COLUMN,
    ROW_BEFORE,
    PAST_THE_END,
    BEFORE_THE_START,
    SWAPPED,
    BIASED,
    HALVED,
    COUNT_OFF_BY_ONE,
    OVERWRITES,
    READS_PAST_THE_END,
    READS_SCRATCH,
    INPUT_WRITTEN,
    REAL_LAST_ROW,
    REAL_ONE_PLACE,
    REAL_COUNT,
    ONE_BLOCK_SIZE,
    LATER_LAUNCHES,
    MANY_LAUNCHES,
    NO_STREAM
};

static __device__ int launches[2]; // of variants that remember

static __global__ void launched_kernel(int of) { launches[of]++; }

static __global__ void forget_kernel(void) { launches[0] = launches[1] = 0; }

// one thread a row
template <int MISTAKE>
static __global__ void selftest_kernel(floatX* y, float* s, int32_t* m, float* t, floatX* x, floatX* z, float* sums,
                                       int N, int C) {
    const int n = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (n >= (MISTAKE == SKIPPED_ROWS ? N / 4 * 4 : N) || MISTAKE == NOTHING_WRITTEN) return;
    const floatX* xn = x + (size_t)n * C;
    float sum = MISTAKE == READS_SCRATCH ? sums[n] : 0;
    int positive = 0;
    for (int c = 0; c < C; c++) {
        const size_t i = (size_t)n * C + c, from = MISTAKE == ROW_BEFORE && n > 0 ? i - C : i;
        const float a = to_float(MISTAKE == SWAPPED ? z[from] : x[from]),
                    b = to_float(MISTAKE == SWAPPED ? x[from] : z[from]);
        float value = a - 2 * b;
        if (MISTAKE == BIASED) value *= sizeof(floatX) == 2 ? 1 + 4 * 0x1p-8f : 1 + 64 * 0x1p-24f;
        if (MISTAKE == HALVED) value = 2 * to_float(from_float<floatX>(0.5f * value)); // right
        if (MISTAKE == NAN_IN_ONE_PLACE && i == (size_t)N * C / 2) value = __int_as_float(0x7fc00000);
        if (MISTAKE == INFINITE && i == (size_t)N * C / 2) value = __int_as_float(0x7f800000);
        if (MISTAKE == REAL_ONE_PLACE && N > 1000 && n == 777 && c == 33) value = -value;
        if (MISTAKE == REAL_LAST_ROW && N > 1000 && n == N - 1) value = 0;
        if (MISTAKE == LATER_LAUNCHES && launches[0] > 0) value += 1;
        if (MISTAKE == MANY_LAUNCHES && launches[1] > 20) value += 1;
        if (MISTAKE == ONE_BLOCK_SIZE && blockDim.x == 64 && c == 1) value = 0;
        if (MISTAKE == SKIPPED_COLUMN && c == C - 1) continue;
        y[i] = from_float<floatX>(value);
    }
    for (int c = 0; c < C; c++) sum += to_float(xn[c]), positive += to_float(xn[c]) > 0;
    if (MISTAKE == READS_PAST_THE_END) sum += 0 * to_float(xn[C]); // of the last row: a fence
    if (MISTAKE == READS_SCRATCH) sums[n] = 0;
    if (MISTAKE == COUNT_OFF_BY_ONE || (MISTAKE == REAL_COUNT && N > 1000 && n == 777)) positive++;
    s[n] = sum, m[n] = positive;
    t[n] = (MISTAKE == OVERWRITES ? 0 : t[n]) + sum;
    if (MISTAKE == PAST_THE_END && n == N - 1) y[(size_t)N * C] = from_float<floatX>(0);
    if (MISTAKE == BEFORE_THE_START && n == 0) s[-1] = 0;
    if (MISTAKE == INPUT_WRITTEN && n == 0) z[0] = from_float<floatX>(0);
}

template <int MISTAKE>
static void plant(const Problem* p, int block, cudaStream_t stream) {
    const cudaStream_t on = MISTAKE == NO_STREAM ? 0 : stream;
    selftest_kernel<MISTAKE>
        <<<(unsigned)ceil_div(p->N, block), block, 0, on>>>(p->y, p->s, p->m, p->t, p->x, p->z, p->sums, p->N, p->C);
    launch_check();
    if (MISTAKE == LATER_LAUNCHES || MISTAKE == MANY_LAUNCHES) {
        launched_kernel<<<1, 1, 0, on>>>(MISTAKE == MANY_LAUNCHES);
        launch_check();
    }
}

// right: what was remembered is forgotten
static void right_and_forgets(const Problem* p, int block, cudaStream_t stream) {
    forget_kernel<<<1, 1, 0, stream>>>();
    launch_check();
    plant<NONE>(p, block, stream);
}

static const char* never(const Problem*) { return "it takes no problem"; }

// ---- the tables: the last column is a text that the rejection must hold; empty: it is right -----

// clang-format off
static const Variant<Problem> variants[] = {
    { "right",                   plant<NONE>,               { 32, 64, 256 }, "" },
    { "right_in_halves",         plant<HALVED>,             { 128 },         "" },
    { "nothing_written",         plant<NOTHING_WRITTEN>,    { 128 },         "y[0]: got nan" },
    { "nan_in_one_place",        plant<NAN_IN_ONE_PLACE>,   { 128 },         "got nan" },
    { "infinite_in_one_place",   plant<INFINITE>,           { 128 },         "got inf" },
    { "skipped_tail_of_rows",    plant<SKIPPED_ROWS>,       { 128 },         "got nan" },
    { "skipped_last_column",     plant<SKIPPED_COLUMN>,     { 128 },         "got nan" },
    { "off_by_one_row",          plant<ROW_BEFORE>,         { 128 },         "y[" },
    { "past_the_end",            plant<PAST_THE_END>,       { 128 },         "y: 2 bytes were written in the fence after it" },
    { "before_the_start",        plant<BEFORE_THE_START>,   { 128 },         "s: 4 bytes were written in the fence before it" },
    { "swapped_arguments",       plant<SWAPPED>,            { 128 },         "y[" },
    { "biased",                  plant<BIASED>,             { 128 },         "y[" },
    { "count_off_by_one",        plant<COUNT_OFF_BY_ONE>,   { 128 },         "m[0]" },
    { "overwrites_what_it_adds_to", plant<OVERWRITES>,      { 128 },         "t[0]" },
    { "reads_past_the_end",      plant<READS_PAST_THE_END>, { 128 },         "got nan" },
    { "reads_what_scratch_held", plant<READS_SCRATCH>,      { 128 },         "s[0]: got nan" },
    { "writes_its_input",        plant<INPUT_WRITTEN>,      { 128 },         "z: an input was changed" },
    { "real_shape_last_row",     plant<REAL_LAST_ROW>,      { 128 },         "y[383744]" },
    { "real_shape_one_number",   plant<REAL_ONE_PLACE>,     { 128 },         "y[198945]" },
    { "real_shape_one_integer",  plant<REAL_COUNT>,         { 128 },         "m[777]" },
    { "one_block_size_alone",    plant<ONE_BLOCK_SIZE>,     { 128, 64 },     "y[1]: got 0" },
    { "later_launches",          plant<LATER_LAUNCHES>,     { 128 },         "at the second launch" },
    { "many_launches",           plant<MANY_LAUNCHES>,      { 128 },         "launches in a row" },
    { "right_and_forgets",       right_and_forgets,         { 128 },         "" }, // rows are tried from the last one up
    { "forgets_its_stream",      plant<NO_STREAM>,          { 128 },         "got nan" },
    { "production",              plant<NONE>,               { 128 },         "" },
};

// production itself is wrong, in a row that the CPU computes or by a NaN elsewhere; the right ones must be accepted all the same
static const Variant<Problem> wrong_production[] = {
    { "right",                   plant<NONE>,               { 64 },          "" },
    { "production",              plant<REAL_LAST_ROW>,      { 128 },         "y[383744]" },
};
static const Variant<Problem> nan_production[] = {
    { "right",                   plant<NONE>,               { 64 },          "" },
    { "production",              plant<NAN_IN_ONE_PLACE>,   { 128 },         "got nan" },
};

static const Variant<Problem> refused_production[] = {
    { "nan_in_one_place",        plant<NAN_IN_ONE_PLACE>,   { 128 },         "got nan" },
    { "right",                   plant<NONE>,               { 64 },          "" },
    { "production",              plant<NONE>,               { 128 },         "not here: it takes no problem", never },
};
// clang-format on

// ---- what ends the program -------------------------------------------------------------------

static __global__ void fault_kernel(floatX* y) { y[(size_t)1 << 45] = from_float<floatX>(0); }

static void writes_far_away(const Problem* p, int block, cudaStream_t stream) {
    fault_kernel<<<1, block, 0, stream>>>(p->y);
    launch_check();
}

static void too_many_threads(const Problem* p, int, cudaStream_t stream) { plant<NONE>(p, 4096, stream); }

static void expects_too_little(Bench* b, const Problem* p, int64_t first, int64_t count) {
    const float* t = b->host(p->t);
    b->expect(p->t, (size_t)first, t + first, (size_t)count);
}

static const Variant<Problem> faults[] = { { "writes_far_away", writes_far_away, { 32 }, "" } };
static const Variant<Problem> refused[] = { { "too_many_threads", too_many_threads, { 32 }, "" } };
static const Variant<Problem> fine[] = { { "right", plant<NONE>, { 32 }, "" } };

// what a program of its own must say, and its exit code
static const struct {
    const char* name;
    const char* says;
    int code;
} endings[] = {
    { "fault", "variant writes_far_away, block 32, shape one row", BENCH_FAULT },
    { "refused", "variant too_many_threads, block 32, shape one row", 1 },
    { "unexpected", "reference expects 0 of the 8 numbers of y", 1 },
};

template <int N>
static int end(const char* name, const Variant<Problem> (&table)[N]) {
    char program[] = "selftest";
    char* argv[] = { program, NULL };
    return bench_main(1, argv, name, "none",
                      bench_program(shapes, setup, strcmp(name, "unexpected") == 0 ? expects_too_little : reference,
                                    rows, traffic, flops, table));
}

static int ending(const char* name) {
    return strcmp(name, "fault") == 0     ? end(name, faults)
           : strcmp(name, "refused") == 0 ? end(name, refused)
                                          : end(name, fine);
}

// ---- the judge -------------------------------------------------------------------------------

static int tried, missed;

static void judge(bool ok, const char* table, const char* name, const std::string& said) {
    tried++, missed += !ok;
    printf("%-6s %-18s %-28s %s\n", ok ? "ok" : "MISSED", table, name, said.c_str());
    fflush(stdout);
}

template <int N>
static void judge_table(const char* name, BenchRun* run, const Variant<Problem> (&table)[N]) {
    run->op = name;
    run->wrong.clear();
    bench_program(shapes, setup, reference, rows, traffic, flops, table).all(run);
    for (int i = 0; i < N; i++) { // rows are those of the real shape, which comes last
        const bool right = !table[i].what[0], timed = run->rows[i].timed;
        const std::string check = run->rows[i].check;
        const bool ok = right ? check == "ok" && timed && run->rows[i].us > 0 && !run->wrong.count(table[i].name)
                              : check != "ok" && !timed && check.find(table[i].what) != std::string::npos;
        judge(ok, name, table[i].name, check + (timed ? ", timed" : ""));
    }
}

static void judge_ending(int i) {
    char path[1024], text[4096];
    const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    if (length < 0) die("/proc/self/exe: %s", strerror(errno));
    path[length] = 0;
    const std::string command = bench_text("'%s' --end %s 2>&1", path, endings[i].name);
    FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) die("%s: %s", command.c_str(), strerror(errno));
    text[fread(text, 1, sizeof text - 1, pipe)] = 0;
    const int status = pclose(pipe), code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    const char* line = strstr(text, endings[i].says);
    const bool ok = line && code == endings[i].code;
    judge(ok, "ends the program", endings[i].name, bench_text("exit code %d: %.200s", code, line ? line : text));
}

int main(int argc, char** argv) {
    if (argc == 3 && strcmp(argv[1], "--end") == 0) return ending(argv[2]);
    if (argc > 1) die("%s: selftest takes no options", argv[1]);
    static BenchRun run;
    run.yardstick = "none", run.quiet = true, run.options.seed = 1;
    bench_begin(&run);
    judge_table("variants", &run, variants);
    judge_table("wrong production", &run, wrong_production);
    judge_table("NaN production", &run, nan_production);
    judge_table("refused production", &run, refused_production);
    for (int i = 0; i < 3; i++) judge_ending(i);
    printf("selftest   %s   %s   %d tried, %d missed\n", BENCH_DTYPE, run.gpu.c_str(), tried, missed);
    return missed != 0;
}
