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
Reference row   "x production" is beside the row "production"; where that is not timed, beside YARDSTICK, else beside
                the last row. It is checked first, and the others from the last row up

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
#include <tuple>
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

#include "bench_arrays.cuh"
#include "bench_rows.cuh"

// ---- one shape -------------------------------------------------------------------------------

// production first, then the yardstick, then the others from the last row up: a time limit leaves out slow beginnings
static inline std::vector<size_t> bench_order(const BenchRun* run) {
    std::vector<size_t> order;
    for (int rank = 0; rank < 3; rank++)
        for (size_t i = run->candidates.size(); i-- > 0;)
            if (bench_rank(&run->candidates[i]) == rank) order.push_back(i);
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
           "  --small             the small shapes alone, which are checked and not timed: under compute-sanitizer\n"
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

    // each variant once, between its marks when there are several: a profile is a list of kernels, of which it says no more than
    // the name
    static void profile(BenchRun* run) {
        int selected = 0;
        for (const BenchCandidate& v : run->candidates) selected += v.selected;
        for (const BenchCandidate& v : run->candidates) {
            if (!v.selected) continue;
            if (!v.refusal.empty() && selected == 1) die("%s: not here: %s", v.name, v.refusal.c_str());
            if (!v.refusal.empty()) continue;
            const int block = run->options.block ? run->options.block : v.blocks[0];
            run->bench.restore();
            bench_flush(run->bench.stream);
            bench_wait(run);
            run->running = v.name, run->running_block = block;
            cuda_check(cudaProfilerStart());
            if (selected > 1) {
                bench_next_variant_kernel<<<1, 1, 0, run->bench.stream>>>();
                launch_check();
            }
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
        for (int small = 1; small >= run->options.small; small--)
            for (const Shape& s : shapes)
                if (s.small == (small == 1) && (wanted.empty() || wanted == s.name)) chosen.push_back(&s);
        if (chosen.empty()) {
            if (wanted.empty()) die("%s: no small shapes", run->op);
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
        if (name == "--check" || name == "--profile" || name == "--small") {
            (name == "--check" ? o.check : name == "--small" ? o.small : o.profile) = true;
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
