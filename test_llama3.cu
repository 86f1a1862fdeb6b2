/*
What the GPU must prove. Linked with train_llama3.cu and llama3.c as libraries and with the tests of the ops
(dev/test/gpu/test_ops.cu):

    test_llama3cu [--reduced] [NAME …]          --reduced: small shapes alone, for compute-sanitizer

    ops           each against its CPU reference: dev/test/gpu/test_<op>.cuh
    golden        the models of dev/test/golden: logits, loss, every gradient, ten AdamW steps of PyTorch
    gradients     seeded models with awkward sizes: every attention back end against llama3.c, and every recompute level
                  the same bits as none
    one test each for: later tokens, lengths that change, no labels, accumulation, two runs, resume, bf16 moments, no master
                  weights, planned memory, --timing, generation

Tolerance       FP32: 1e-4 of the scale, losses 1e-5, as llama3.c against PyTorch.
                BF16: computed. llama3.c runs again with each weight moved by up to one rounding to bf16, eight times; what
                moves most is what one rounding of every weight does. A pass on the GPU rounds weights, activations and, on
                the way back, gradients: about 9, 12 and 12 tensors in a layer. Variances add: the square root of 33 / 9 is
                about 2; the bound is four times, and one rounding of the result itself. (A bf16 model of PyTorch, which
                rounds more often, uses 0.2 to 0.7 of it.)
*/
#include <unistd.h>

#include "dev/test/golden.h"
#include "dev/test/gpu/gpu_test.cuh"
#include "llmc/config.h"
#include "llmc/file.h"
#include "llmc/llama3.h"
#include "llmc/params.h"

enum { STEPS = 10, DRAWS = 8, MAX_CONTEXT = 512 };
static const bool BF16 = sizeof(floatX) == 2;

// of a result that moved by that much in llama3.c when every weight was rounded once
static double tolerance_for(double moved, double fp32) { return BF16 ? 4 * moved + BF16_EPS : fp32; }

// of a loss: it is not rounded to bf16, but one number moves more by chance than the most of many does
static double loss_tolerance_for(double moved, double fp32) { return BF16 ? 4 * moved + BF16_EPS / 4 : fp32; }

// ---- cases: a model folder and a batch -------------------------------------------------------

typedef struct {
    char name[32], folder[64];
    int B, T;
    int32_t *ids, *labels; // (B, T)
    Golden golden;         // of a golden state, what PyTorch says
} Case;

typedef struct {
    const char* name;
    int C, L, NH, NKV, HD, F, V;
    bool tied;
    double factor;
    int B, T;
} Sizes;

// clang-format off
static const Sizes seeded[] = {
//    name       C   L  NH NKV   HD    F     V   tied  factor  B    T
    { "tiny",   128,  2,  4,  2,  32, 384,  261,  true,   1,   4,   65 },
    { "row",     64,  2,  4,  2,  16,  88,   67, false,   1,   1,    1 },
    { "wide",   128,  3,  4,  2,  64, 344,  509, false,   1,   3,  130 }, // NH*HD is not C; F and V no multiples of 64
    { "one_kv",  72,  2,  3,  1,  64, 136,  256,  true,   8,   2,  257 }, // one row more than two tiles
    { "large",  192,  2,  6,  2, 128, 520, 1003, false,  32,   2,  200 }, // three query heads share a key
};
// clang-format on
static const char* const golden_names[] = { "group1", "group2", "aligned" }; // those whose sizes are multiples of 8
enum { N_SEEDED = sizeof seeded / sizeof seeded[0], N_GOLDEN = sizeof golden_names / sizeof golden_names[0] };

// a folder of the test's own, removed by folder_remove
static void folder_make(char* path, size_t size) {
    snprintf(path, size, "/tmp/llama3-test-XXXXXX");
    if (!mkdtemp(path)) die("cannot make %s", path);
}

static void folder_remove(const char* path) {
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", path);
    if (system(command) != 0) die("cannot remove %s", path);
}

// ids that are random, and labels of which every ninth does not count
static void random_batch(int32_t* ids, int32_t* labels, int n, int V, uint64_t seed) {
    for (int i = 0; i < n; i++) {
        ids[i] = (int32_t)(random_bits(seed, 1, (uint64_t)i) % (uint64_t)V);
        labels[i] = n > 1 && i % 9 == 5 ? IGNORED_LABEL : (int32_t)(random_bits(seed, 2, (uint64_t)i) % (uint64_t)V);
    }
}

// weights large enough for attention to be far from uniform, and norms that are not all 1
static void write_model(const Config* c, const char* folder) {
    Error err;
    ParamSet s = params_make(c);
    ParamsFile file = { NULL, 0 };
    for (int i = 0; i < s.n; i++) {
        float* w = params_floats(&s, i);
        bool matrix = s.list[i].rows != 0;
        for (size_t j = 0; j < param_size(&s.list[i]); j++) {
            float x = random_normal(7, (uint64_t)i, j);
            w[j] = matrix ? x / sqrtf((float)s.list[i].cols) : 1 + 0.2f * x;
        }
    }
    params_add(&file, "", &s, DTYPE_F32);
    if (!params_write(&file, folder, "model.safetensors", &err) || !config_write(c, folder, DTYPE_F32, &err))
        die("%s", err.text);
    params_free(&s);
}

static Case case_seeded(const Sizes* z) {
    Case k = {};
    Config c = {};
    c.C = z->C, c.L = z->L, c.NH = z->NH, c.NKV = z->NKV, c.HD = z->HD, c.F = z->F, c.V = z->V, c.tied = z->tied;
    c.context = MAX_CONTEXT, c.eps = 1e-5f, c.theta = 10000;
    c.factor = z->factor, c.low = 1, c.high = 4, c.original = 64, c.bos = -1;
    snprintf(k.name, sizeof k.name, "%s", z->name);
    folder_make(k.folder, sizeof k.folder);
    write_model(&c, k.folder);
    k.B = z->B, k.T = z->T;
    k.ids = (int32_t*)allocate((size_t)k.B * k.T, sizeof *k.ids);
    k.labels = (int32_t*)allocate((size_t)k.B * k.T, sizeof *k.labels);
    random_batch(k.ids, k.labels, k.B * k.T, c.V, 3);
    return k;
}

static Case case_golden(const char* name) {
    Case k = {};
    k.golden = golden_open(name);
    snprintf(k.name, sizeof k.name, "%s", name);
    snprintf(k.folder, sizeof k.folder, "%s", k.golden.folder);
    k.B = k.golden.B, k.T = k.golden.T, k.ids = k.golden.ids, k.labels = k.golden.labels;
    return k;
}

static void case_free(Case* k) {
    if (k->golden.name) {
        golden_close(&k->golden);
    } else {
        folder_remove(k->folder);
        free(k->ids), free(k->labels);
    }
}

static int count_valid(const int32_t* labels, int n) {
    int valid = 0;
    for (int i = 0; i < n; i++) valid += labels[i] != IGNORED_LABEL;
    return valid;
}

// ---- results ---------------------------------------------------------------------------------

// all numbers of the model, tensor after tensor in the order of the list; get is one of {cpu,gpu}_{parameter,gradient}
template <typename Model, typename Get>
static float* copy_all(Model* m, const ParamSet* set, Get get, size_t* total) {
    *total = 0;
    for (int i = 0; i < set->n; i++) *total += param_size(&set->list[i]);
    float* all = (float*)allocate(*total, sizeof *all);
    size_t at = 0;
    for (int i = 0; i < set->n; i++) {
        size_t n = 0;
        const float* numbers = get(m, set->list[i].name, &n);
        if (!numbers || n != param_size(&set->list[i])) die("no %s of that size", set->list[i].name);
        memcpy(all + at, numbers, n * sizeof *all);
        at += n;
    }
    return all;
}

// of one forward and backward pass over a case
typedef struct {
    float loss;
    float *logits, *gradients;
} Pass;

static void pass_free(Pass* p) { free(p->logits), free(p->gradients); }

// what llama3.c says of a case, and how far the GPU may be from it
typedef struct {
    Config c;
    ParamSet set;       // names and sizes
    size_t n_logits, n; // of logits, of all parameters
    Pass want;
    double loss, logits, *gradient; // tolerances; [set.n]
} Oracle;

static Pass cpu_pass(CpuModel* m, const Case* k, const Oracle* o) {
    Pass p;
    size_t n;
    p.logits = (float*)allocate(o->n_logits, sizeof *p.logits);
    cpu_forward(m, k->ids, NULL, k->B, k->T, p.logits);
    p.loss = cpu_backward(m, k->ids, k->labels, k->B, k->T);
    p.gradients = copy_all(m, &o->set, cpu_gradient, &n);
    return p;
}

static Pass gpu_pass(GpuModel* m, const Case* k, const Oracle* o) {
    Pass p;
    size_t n;
    p.logits = (float*)allocate(o->n_logits, sizeof *p.logits);
    for (size_t i = 0; i < o->n_logits; i++) p.logits[i] = NAN;
    gpu_forward(m, k->ids, NULL, k->B, k->T, p.logits);
    p.loss = gpu_backward(m, k->ids, k->labels, k->B, k->T);
    p.gradients = copy_all(m, &o->set, gpu_gradient, &n);
    return p;
}

// moves every weight by up to one rounding to bf16
static void perturb(CpuModel* m, const ParamSet* set, uint64_t seed) {
    for (int i = 0; i < set->n; i++) {
        size_t n;
        float* w = cpu_parameter(m, set->list[i].name, &n);
        for (size_t j = 0; j < n; j++) w[j] *= 1 + (float)BF16_EPS * (2 * random_uniform(seed, (uint64_t)i, j) - 1);
    }
}

// the largest difference, relative to the largest number
static double moved_by(const float* x, const float* want, size_t n) { return check_compare(x, want, n, 1).used; }

static void widen(double* moved, double by) { *moved = by > *moved ? by : *moved; }

static float largest(const float* x, size_t n) {
    float most = 0;
    for (size_t i = 0; i < n; i++) most = fmaxf(most, fabsf(x[i]));
    return most;
}

typedef struct {
    float* numbers; // owned by the caller
    size_t n;
} Scaled;

// the gradient of tensor i, which begins at `at`. Where it should be noise alone (a single token attends to itself: q and k
// get none), the largest of all gradients stands behind it, so that the comparison is relative to that
static Scaled scaled(const Oracle* o, const float* gradients, int i, size_t at) {
    size_t n = param_size(&o->set.list[i]);
    Scaled x = { (float*)allocate(n + 1, sizeof(float)), n };
    memcpy(x.numbers, gradients + at, n * sizeof(float));
    float scale = largest(o->want.gradients, o->n);
    if (largest(o->want.gradients + at, n) < 1e-5f * scale) x.numbers[x.n++] = scale;
    return x;
}

static Oracle oracle_make(const Case* k) {
    Oracle o = {};
    CpuModel* m = cpu_model_load(k->folder);
    o.c = *cpu_model_config(m);
    o.set = params_list(&o.c);
    o.n_logits = (size_t)k->B * k->T * o.c.V;
    for (int i = 0; i < o.set.n; i++) o.n += param_size(&o.set.list[i]);
    o.gradient = (double*)allocate((size_t)o.set.n, sizeof *o.gradient);
    o.want = cpu_pass(m, k, &o);
    cpu_model_free(m);
    for (int draw = 0; draw < DRAWS && BF16; draw++) {
        m = cpu_model_load(k->folder);
        perturb(m, &o.set, (uint64_t)draw);
        Pass p = cpu_pass(m, k, &o);
        widen(&o.loss, moved_by(&p.loss, &o.want.loss, 1));
        widen(&o.logits, moved_by(p.logits, o.want.logits, o.n_logits));
        size_t at = 0;
        for (int i = 0; i < o.set.n; at += param_size(&o.set.list[i++])) {
            Scaled x = scaled(&o, p.gradients, i, at), want = scaled(&o, o.want.gradients, i, at);
            widen(&o.gradient[i], moved_by(x.numbers, want.numbers, x.n));
            free(x.numbers), free(want.numbers);
        }
        pass_free(&p);
        cpu_model_free(m);
    }
    o.loss = loss_tolerance_for(o.loss, 1e-5);
    o.logits = tolerance_for(o.logits, 1e-4);
    for (int i = 0; i < o.set.n; i++) o.gradient[i] = tolerance_for(o.gradient[i], 1e-4);
    return o;
}

static void oracle_free(Oracle* o) {
    pass_free(&o->want);
    free(o->gradient);
    params_free(&o->set);
}

static void check_gradients(const char* what, const Oracle* o, const float* got) {
    size_t at = 0;
    for (int i = 0; i < o->set.n; at += param_size(&o->set.list[i++])) {
        char label[160];
        snprintf(label, sizeof label, "%s: gradient of %s", what, o->set.list[i].name);
        Scaled x = scaled(o, got, i, at), want = scaled(o, o->want.gradients, i, at);
        gpu_check_values(label, x.numbers, want.numbers, x.n, o->gradient[i]);
        free(x.numbers), free(want.numbers);
    }
}

static void check_pass(const char* what, const Oracle* o, const Pass* got) {
    char label[160];
    snprintf(label, sizeof label, "%s: loss", what);
    gpu_check_values(label, &got->loss, &o->want.loss, 1, o->loss);
    snprintf(label, sizeof label, "%s: logits", what);
    gpu_check_values(label, got->logits, o->want.logits, o->n_logits, o->logits);
    check_gradients(what, o, got->gradients);
}

static void check_bits(const char* what, const float* got, const float* want, size_t n) {
    size_t i = 0;
    while (i < n && memcmp(&got[i], &want[i], sizeof *got) == 0 && check_finite((double)got[i])) i++;
    gpu_expect(i == n, "%s[%zu of %zu]: %.9g and %.9g, expected the same bits", what, i, n, i < n ? (double)got[i] : 0,
               i < n ? (double)want[i] : 0);
}

static void check_same_pass(const char* what, const Oracle* o, const Pass* got, const Pass* want) {
    check_bits(what, &got->loss, &want->loss, 1);
    check_bits(what, got->logits, want->logits, o->n_logits);
    check_bits(what, got->gradients, want->gradients, o->n);
}

// ---- back ends and recompute levels ----------------------------------------------------------

static const char* const backends[] = { "reference", "mma", "hopper", "cudnn" };
static const char* const levels[] = { "none", "norms", "ffn", "block" };
enum { N_BACKENDS = 4, N_LEVELS = 4 };

// the case's model with that back end; NULL when this build has none or it does not take the model's sizes, which those
// of the presets' heads it must
static GpuModel* load_with(const Case* k, const char* backend, const char* level) {
    if (!gpu_set("attention", backend)) return NULL;
    if (!gpu_set("recompute", level)) die("no recompute level %s", level);
    GpuModel* m = gpu_model_load(k->folder);
    gpu_forward(m, k->ids, k->labels, k->B, k->T, NULL); // the back end is chosen when the batch is known
    if (strcmp(gpu_attention(m), backend) == 0) return m;
    int HD = gpu_model_config(m)->HD, device = 0, major = 0;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (strcmp(backend, "hopper") != 0 || major == 9)
        gpu_expect(HD != 64 && HD != 128, "%s: %s does not run with HD %d", k->name, backend, HD);
    gpu_model_free(m);
    return NULL;
}

static GpuModel* load_default(const Case* k) {
    if (!gpu_set("attention", "hopper") && !gpu_set("attention", "reference")) die("no attention");
    if (!gpu_set("recompute", "none")) die("no recompute level none");
    return gpu_model_load(k->folder);
}

// ---- golden states ---------------------------------------------------------------------------

// losses and norms of ten AdamW steps on one batch
typedef struct {
    float loss[STEPS], norm[STEPS];
    float* parameters; // after them
} Curve;

static Curve cpu_curve(CpuModel* m, const Case* k, const ParamSet* set, const float* hyper) {
    Curve curve;
    size_t n;
    for (int step = 0; step < STEPS; step++) {
        curve.loss[step] = cpu_backward(m, k->ids, k->labels, k->B, k->T);
        curve.norm[step] = cpu_update(m, hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5]);
    }
    curve.parameters = copy_all(m, set, cpu_parameter, &n);
    return curve;
}

static Curve gpu_curve(GpuModel* m, const Case* k, const ParamSet* set, const float* hyper) {
    Curve curve;
    size_t n;
    for (int step = 0; step < STEPS; step++) {
        curve.loss[step] = gpu_backward(m, k->ids, k->labels, k->B, k->T);
        curve.norm[step] = gpu_update(m, hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5]);
    }
    curve.parameters = copy_all(m, set, gpu_parameter, &n);
    return curve;
}

typedef struct {
    double loss[STEPS], norm[STEPS], *parameter;
} CurveTolerance;

static CurveTolerance curve_tolerance(const Case* k, const ParamSet* set, const Curve* want, const float* hyper) {
    CurveTolerance t = {};
    t.parameter = (double*)allocate((size_t)set->n, sizeof *t.parameter);
    for (int draw = 0; draw < DRAWS && BF16; draw++) {
        CpuModel* m = cpu_model_load(k->folder);
        perturb(m, set, (uint64_t)draw);
        Curve moved = cpu_curve(m, k, set, hyper);
        for (int step = 0; step < STEPS; step++) {
            widen(&t.loss[step], moved_by(&moved.loss[step], &want->loss[step], 1));
            widen(&t.norm[step], moved_by(&moved.norm[step], &want->norm[step], 1));
        }
        size_t at = 0;
        for (int i = 0; i < set->n; at += param_size(&set->list[i++]))
            widen(&t.parameter[i], moved_by(moved.parameters + at, want->parameters + at, param_size(&set->list[i])));
        free(moved.parameters);
        cpu_model_free(m);
    }
    for (int step = 0; step < STEPS; step++) {
        t.loss[step] = loss_tolerance_for(t.loss[step], 1e-5);
        t.norm[step] = tolerance_for(t.norm[step], 1e-4);
    }
    for (int i = 0; i < set->n; i++) t.parameter[i] = tolerance_for(t.parameter[i], 1e-4);
    return t;
}

static void check_curve(const char* what, const ParamSet* set, const Curve* got, const Curve* want,
                        const CurveTolerance* t) {
    char label[160];
    size_t at = 0;
    for (int step = 0; step < STEPS; step++) {
        snprintf(label, sizeof label, "%s: loss of step %d", what, step);
        gpu_check_values(label, &got->loss[step], &want->loss[step], 1, t->loss[step]);
        snprintf(label, sizeof label, "%s: norm of step %d", what, step);
        gpu_check_values(label, &got->norm[step], &want->norm[step], 1, t->norm[step]);
    }
    for (int i = 0; i < set->n; at += param_size(&set->list[i++])) {
        snprintf(label, sizeof label, "%s: %s after %d steps", what, set->list[i].name, STEPS);
        gpu_check_values(label, got->parameters + at, want->parameters + at, param_size(&set->list[i]),
                         t->parameter[i]);
    }
}

// PyTorch's numbers in place of llama3.c's
static void use_golden(Oracle* o, const Case* k) {
    size_t at = 0;
    pass_free(&o->want);
    float* loss = (float*)golden_copy(&k->golden, "loss", "F32", 1);
    o->want.loss = *loss;
    free(loss);
    o->want.logits = (float*)golden_copy(&k->golden, "logits", "F32", o->n_logits);
    o->want.gradients = (float*)allocate(o->n, sizeof(float));
    for (int i = 0; i < o->set.n; at += param_size(&o->set.list[i++])) {
        char name[128];
        snprintf(name, sizeof name, "grad.%s", o->set.list[i].name);
        float* gradient = (float*)golden_copy(&k->golden, name, "F32", param_size(&o->set.list[i]));
        memcpy(o->want.gradients + at, gradient, param_size(&o->set.list[i]) * sizeof *gradient);
        free(gradient);
    }
}

// the losses and norms are PyTorch's; of the parameters it left two, which llama3.c's own test compares: here all are
// compared with llama3.c
static void test_golden_case(const Case* k) {
    Oracle o = oracle_make(k);
    use_golden(&o, k);
    float *hyper = (float*)golden_copy(&k->golden, "hyperparameters", "F32", 6),
          *losses = (float*)golden_copy(&k->golden, "losses", "F32", STEPS);
    float* norms = (float*)golden_copy(&k->golden, "norms", "F32", STEPS);
    Curve want = cpu_curve(k->golden.model, k, &o.set, hyper);
    CurveTolerance tolerance = curve_tolerance(k, &o.set, &want, hyper);
    memcpy(want.loss, losses, sizeof want.loss);
    memcpy(want.norm, norms, sizeof want.norm);
    for (int b = 0; b < N_BACKENDS; b++) {
        char what[64];
        snprintf(what, sizeof what, "%s, %s", k->name, backends[b]);
        GpuModel* m = load_with(k, backends[b], "none");
        if (!m) continue;
        Pass got = gpu_pass(m, k, &o);
        check_pass(what, &o, &got);
        Curve curve = gpu_curve(m, k, &o.set, hyper);
        check_curve(what, &o.set, &curve, &want, &tolerance);
        free(curve.parameters);
        pass_free(&got);
        gpu_model_free(m);
    }
    free(want.parameters), free(tolerance.parameter), free(hyper), free(losses), free(norms);
    oracle_free(&o);
}

static void test_golden(void) {
    for (int i = 0; i < N_GOLDEN; i++) {
        Case k = case_golden(golden_names[i]);
        test_golden_case(&k);
        case_free(&k);
    }
}
GPU_TEST(golden);

// ---- one pass --------------------------------------------------------------------------------

// each back end against llama3.c; the other levels compute the same again, so that they must find the same bits
static void test_gradients(void) {
    for (int i = 0; i < (gpu_reduced ? 2 : N_SEEDED); i++) {
        Case k = case_seeded(&seeded[i]);
        Oracle o = oracle_make(&k);
        for (int b = 0; b < N_BACKENDS; b++) {
            Pass none = {};
            for (int l = 0; l < N_LEVELS; l++) {
                char what[96];
                GpuModel* m = load_with(&k, backends[b], levels[l]);
                if (!m) break;
                Pass got = gpu_pass(m, &k, &o);
                snprintf(what, sizeof what, "%s, %s, recompute %s", k.name, backends[b], levels[l]);
                if (l == 0)
                    check_pass(what, &o, &got), none = got;
                else
                    check_same_pass(what, &o, &got, &none), pass_free(&got);
                gpu_model_free(m);
            }
            pass_free(&none);
        }
        oracle_free(&o);
        case_free(&k);
    }
}
GPU_TEST(gradients);

// the logits of a prefix are those of the whole sequence: attention looks back only, and a short sequence that follows a
// long one finds nothing of it
static void test_prefix(void) {
    Case k = case_seeded(&seeded[0]);
    Oracle o = oracle_make(&k);
    size_t V = (size_t)o.c.V;
    float *whole = (float*)allocate(k.T * V, sizeof *whole), *part = (float*)allocate(k.T * V, sizeof *part);
    for (int b = 0; b < N_BACKENDS; b++) {
        GpuModel* m = load_with(&k, backends[b], "none");
        if (!m) continue;
        gpu_forward(m, k.ids, NULL, 1, k.T, whole);
        for (int T = 1; T < k.T; T += gpu_reduced ? 31 : 9) {
            for (size_t j = 0; j < k.T * V; j++) part[j] = NAN;
            gpu_forward(m, k.ids, NULL, 1, T, part);
            gpu_check_values("logits of a prefix", part, whole, T * V, BF16 ? o.logits : 1e-5);
        }
        gpu_model_free(m);
    }
    free(whole), free(part);
    oracle_free(&o);
    case_free(&k);
}
GPU_TEST(prefix);

// other lengths in between change nothing: what they leave behind is not read
static void test_lengths(void) {
    Case k = case_seeded(&seeded[0]);
    Oracle o = oracle_make(&k);
    enum { LONG = 200 };
    int32_t ids[LONG], labels[LONG];
    random_batch(ids, labels, LONG, o.c.V, 11);
    for (int b = 0; b < N_BACKENDS; b++) {
        GpuModel* m = load_with(&k, backends[b], "none");
        if (!m) continue;
        Pass before = gpu_pass(m, &k, &o);
        const int shapes[][2] = { { 1, 7 }, { 1, LONG }, { 2, 33 }, { LONG, 1 } };
        for (int i = 0; i < 4; i++) {
            float loss = gpu_forward(m, ids, labels, shapes[i][0], shapes[i][1], NULL);
            gpu_expect(check_finite((double)loss) && loss > 0, "loss %g of a batch (%d, %d)", (double)loss,
                       shapes[i][0], shapes[i][1]);
            gpu_backward(m, ids, labels, shapes[i][0], shapes[i][1]);
        }
        Pass after = gpu_pass(m, &k, &o);
        check_same_pass("after other lengths", &o, &after, &before);
        pass_free(&before), pass_free(&after);
        gpu_model_free(m);
    }
    oracle_free(&o);
    case_free(&k);
}
GPU_TEST(lengths);

// a batch in which no label counts: loss 0, gradients 0
static void test_no_labels(void) {
    Case k = case_seeded(&seeded[0]);
    GpuModel* m = load_default(&k);
    ParamSet set = params_list(gpu_model_config(m));
    size_t n;
    for (int i = 0; i < k.B * k.T; i++) k.labels[i] = IGNORED_LABEL;
    float loss = gpu_backward(m, k.ids, k.labels, k.B, k.T);
    float *got = copy_all(m, &set, gpu_gradient, &n), *zero = (float*)allocate(n, sizeof *zero);
    gpu_expect(loss == 0, "loss %g, expected 0", (double)loss);
    gpu_check_values("gradients", got, zero, n, 1e-30);
    free(got), free(zero);
    params_free(&set);
    gpu_model_free(m);
    case_free(&k);
}
GPU_TEST(no_labels);

// the rows of a batch one by one are the batch; a new backward pass forgets them
static void test_accumulation(void) {
    Case k = case_seeded(&seeded[0]);
    Oracle o = oracle_make(&k);
    size_t n;
    float scale = 1 / (float)count_valid(k.labels, k.B * k.T);
    double sum = 0;
    GpuModel* m = load_default(&k);
    for (int b = 0; b < k.B; b++) sum = gpu_accumulate(m, k.ids + b * k.T, k.labels + b * k.T, 1, k.T, scale);
    float *rows = copy_all(m, &o.set, gpu_gradient, &n), mean = (float)sum * scale;
    gpu_check_values("mean loss of the rows", &mean, &o.want.loss, 1, o.loss);
    for (int i = 0; i < o.set.n && BF16; i++) o.gradient[i] += (k.B - 1) * BF16_EPS; // each sum is rounded
    check_gradients("rows one by one", &o, rows);

    Pass whole = gpu_pass(m, &k, &o);
    GpuModel* fresh = load_default(&k);
    Pass alone = gpu_pass(fresh, &k, &o);
    check_same_pass("a backward pass after others", &o, &whole, &alone);

    gpu_accumulate(m, k.ids, k.labels, k.B, k.T, scale); // twice the gradient
    float* twice = copy_all(m, &o.set, gpu_gradient, &n);
    for (size_t i = 0; i < n; i++) twice[i] /= 2;
    check_gradients("half of twice", &o, twice);

    gpu_update(m, 0, 0.9f, 0.95f, 1e-8f, 0, 0); // changes no weight, and leaves gradients of zero
    gpu_accumulate(m, k.ids, k.labels, k.B, k.T, scale);
    float* once = copy_all(m, &o.set, gpu_gradient, &n);
    check_gradients("after an update", &o, once);
    free(rows), free(twice), free(once);
    pass_free(&whole), pass_free(&alone);
    gpu_model_free(m), gpu_model_free(fresh);
    oracle_free(&o);
    case_free(&k);
}
GPU_TEST(accumulation);

// ---- several steps ---------------------------------------------------------------------------

enum { RUN_STEPS = 4 };

// losses and norms of a few steps on different batches, then every parameter
typedef struct {
    float loss[RUN_STEPS], norm[RUN_STEPS], *parameters;
    size_t n;
} Run;

static void run_step(GpuModel* m, const Case* k, Run* run, int step) {
    int n = k->B * k->T;
    int32_t *ids = (int32_t*)allocate((size_t)n, sizeof *ids), *labels = (int32_t*)allocate((size_t)n, sizeof *labels);
    random_batch(ids, labels, n, gpu_model_config(m)->V, 100 + (uint64_t)step);
    run->loss[step] = gpu_backward(m, ids, labels, k->B, k->T);
    run->norm[step] = gpu_update(m, 1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1);
    free(ids), free(labels);
}

static void run_end(GpuModel* m, Run* run) {
    ParamSet set = params_list(gpu_model_config(m));
    run->parameters = copy_all(m, &set, gpu_parameter, &run->n);
    params_free(&set);
    gpu_model_free(m);
}

static Run run_whole(GpuModel* m, const Case* k) {
    Run run = {};
    for (int step = 0; step < RUN_STEPS; step++) run_step(m, k, &run, step);
    run_end(m, &run);
    return run;
}

// stopped after step `at`, saved, forgotten and gone on with
static Run run_resumed(GpuModel* m, const Case* k, int at) {
    Run run = {};
    char folder[64];
    folder_make(folder, sizeof folder);
    for (int step = 0; step < RUN_STEPS; step++) {
        if (step == at) {
            gpu_save(m, folder);
            gpu_model_free(m);
            m = gpu_model_resume(folder, at);
        }
        run_step(m, k, &run, step);
    }
    run_end(m, &run);
    folder_remove(folder);
    return run;
}

static void check_same_run(const char* what, Run* got, const Run* want) {
    gpu_expect(want->loss[0] != want->loss[1] && want->norm[0] > 0, "%s: nothing happens", what);
    check_bits(what, got->loss, want->loss, RUN_STEPS);
    check_bits(what, got->norm, want->norm, RUN_STEPS);
    check_bits(what, got->parameters, want->parameters, want->n);
    free(got->parameters);
}

// two runs, and a run that was stopped, find the same bits, with an option as it is and then as it was
static void test_runs_and_resume(const char* option, const char* value, const char* usual) {
    if (!gpu_set(option, value)) die("no %s %s", option, value);
    for (int i = 0; i < 3; i += 2) { // HD 32 and 64
        if (gpu_reduced && i) break;
        Case k = case_seeded(&seeded[i]);
        for (int b = 0; b < N_BACKENDS; b++) {
            char what[96];
            GpuModel* m = load_with(&k, backends[b], "none");
            if (!m) continue;
            Run first = run_whole(m, &k), again = run_whole(load_with(&k, backends[b], "none"), &k);
            Run resumed = run_resumed(load_with(&k, backends[b], "none"), &k, 2);
            Run levels_differ = run_whole(load_with(&k, backends[b], "block"), &k);
            snprintf(what, sizeof what, "%s, %s, %s %s: a second run", k.name, backends[b], option, value);
            check_same_run(what, &again, &first);
            snprintf(what, sizeof what, "%s, %s, %s %s: resumed", k.name, backends[b], option, value);
            check_same_run(what, &resumed, &first);
            snprintf(what, sizeof what, "%s, %s, %s %s: recompute block", k.name, backends[b], option, value);
            check_same_run(what, &levels_differ, &first);
            free(first.parameters);
        }
        case_free(&k);
    }
    gpu_set(option, usual);
}

static void test_runs(void) { test_runs_and_resume("moments", "fp32", "fp32"); }
static void test_moments(void) { test_runs_and_resume("moments", "bf16", "fp32"); }
GPU_TEST(runs);
GPU_TEST(moments);

static void test_master(void) {
    if (BF16) test_runs_and_resume("master", "none", "fp32");
    else gpu_expect(!gpu_set("master", "none"), "fp32 weights have master weights");
}
GPU_TEST(master);

// taking times changes no bits; the times of the ops add up to less than the step
static void test_timing(void) {
    Case k = case_seeded(&seeded[0]);
    const char* const ops[] = { "embedding_forward", "rope_forward", "attention_forward", "matmul_dw", "rmsnorm_backward", "adamw" };
    double sum = 0;
    Run plain = run_whole(load_default(&k), &k);
    if (!gpu_set("timing", "on")) die("no timing");
    Run timed = run_whole(load_default(&k), &k);
    gpu_set("timing", "off");
    check_same_run("timed", &timed, &plain);
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++) {
        gpu_expect(gpu_timed(ops[i]) > 0, "%s took no time", ops[i]);
        sum += gpu_timed(ops[i]);
    }
    gpu_expect(sum < gpu_timed(NULL), "ops of %g ms in a step of %g ms", sum, gpu_timed(NULL));
    free(plain.parameters);
    case_free(&k);
}
GPU_TEST(timing);

// what is planned is what is allocated, and all of it is given back
static void test_memory(void) {
    Case k = case_seeded(&seeded[2]);
    GpuModel* m = load_default(&k);
    const Config c = *gpu_model_config(m);
    gpu_model_free(m);
    const double before = gpu_bytes();
    for (int kind = 0; kind < 4; kind++)
        for (int l = 0; l < N_LEVELS; l++) {
            gpu_set("moments", kind & 1 ? "bf16" : "fp32");
            gpu_set("master", kind & 2 ? "none" : "fp32");
            gpu_set("recompute", levels[l]);
            m = gpu_model_load(k.folder);
            gpu_forward(m, k.ids, NULL, k.B, k.T, NULL);
            const double planned = gpu_planned_bytes(&c, k.B, k.T);
            gpu_expect(gpu_bytes() == planned, "recompute %s, kind %d: %.0f bytes planned, %.0f allocated", levels[l], kind, planned,
                       gpu_bytes());
            gpu_model_free(m);
            gpu_expect(gpu_bytes() == before, "%.0f bytes are not given back", gpu_bytes() - before);
        }
    gpu_set("moments", "fp32"), gpu_set("master", "fp32"), gpu_set("recompute", "none");
    case_free(&k);
}
GPU_TEST(memory);

// one batch is learned by heart, with fp32 and bf16 moments, and without master weights: the loss falls to a tenth
static void test_learning(void) {
    Case k = case_seeded(&seeded[0]);
    const char *const kinds[] = { "fp32", "bf16", "bf16" }, *const masters[] = { "fp32", "fp32", "none" };
    for (int i = 0; i < (BF16 ? 3 : 2); i++) {
        if (!gpu_set("moments", kinds[i])) die("no moments %s", kinds[i]);
        gpu_set("master", masters[i]);
        GpuModel* m = load_default(&k);
        float first = gpu_backward(m, k.ids, k.labels, k.B, k.T), last = first;
        for (int step = 0; step < (gpu_reduced ? 5 : 100); step++) {
            gpu_update(m, 3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1);
            last = gpu_backward(m, k.ids, k.labels, k.B, k.T);
        }
        gpu_expect(last < (gpu_reduced ? 0.9f : 0.1f) * first, "moments %s, master %s: loss %g -> %g", kinds[i], masters[i],
                   (double)first, (double)last);
        gpu_model_free(m);
    }
    gpu_set("moments", "fp32"), gpu_set("master", "fp32");
    case_free(&k);
}
GPU_TEST(learning);

// ---- generation ------------------------------------------------------------------------------

// through the cache, each token is the likeliest by llama3.c's logits for what stands before it, or as near to it as the
// logits may be wrong
static void test_generation(void) {
    enum { TOTAL = 80 };
    const int prompts[] = { 1, 7, 64, TOTAL - 1 };
    for (int i = 0; i < (gpu_reduced ? 1 : N_SEEDED); i++) {
        Case k = case_seeded(&seeded[i]);
        Oracle o = oracle_make(&k);
        size_t V = (size_t)o.c.V;
        float* logits = (float*)allocate(TOTAL * V, sizeof *logits);
        GpuModel* m = load_default(&k);
        CpuModel* cpu = cpu_model_load(k.folder);
        for (int p = 0; p < 4; p++) {
            int32_t ids[TOTAL], labels[TOTAL];
            random_batch(ids, labels, TOTAL, o.c.V, 20 + (uint64_t)p);
            for (int t = prompts[p]; t < TOTAL; t++) ids[t] = -1;
            gpu_generate_greedy(m, ids, prompts[p], TOTAL);
            for (int t = 0; t < TOTAL; t++)
                if (!gpu_expect(ids[t] >= 0 && (size_t)ids[t] < V, "%s: token %d is %d", k.name, t, ids[t])) ids[t] = 0;
            cpu_forward(cpu, ids, NULL, 1, TOTAL, logits);
            float scale = 0;
            for (size_t j = 0; j < TOTAL * V; j++) scale = fmaxf(scale, fabsf(logits[j]));
            for (int t = prompts[p]; t < TOTAL; t++) {
                const float* row = logits + (size_t)(t - 1) * V;
                float best = row[0];
                for (size_t v = 1; v < V; v++) best = fmaxf(best, row[v]);
                float short_of = (best - row[ids[t]]) / scale;
                gpu_expect(short_of <= 2 * o.logits,
                           "%s, prompt of %d: token %d is %g of the scale below the likeliest", k.name, prompts[p], t,
                           (double)short_of);
            }
        }
        free(logits);
        cpu_model_free(cpu);
        gpu_model_free(m);
        oracle_free(&o);
        case_free(&k);
    }
}
GPU_TEST(generation);

int main(int argc, char** argv) { return gpu_test_main(argc, argv); }
