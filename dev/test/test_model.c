/*
The whole model against PyTorch: the second rung. dev/test/golden holds tiny models and what LlamaForCausalLM and
torch.optim.AdamW make of them in fp32, written by dev/reference/golden.py, which also says what is in the files:

    logits, every gradient      within 1e-4 of the reference's scale
    losses of ten AdamW steps   within 1e-5
    norms of the gradient       within 1e-4, of itself

Then what needs no reference: the cache generates what the whole sequence would, the number of threads changes no bit, a
batch is the mean of its rows, later tokens do not change earlier logits. Last a trained model, stories260K.
*/
#include <math.h>
#include <omp.h>

#include "golden.h"
#include "test.h"
#include "llmc/check.h"
#include "llmc/config.h"
#include "llmc/file.h"
#include "llmc/llama3.h"
#include "llmc/random.h"
#include "llmc/safetensors.h"

static const double TOLERANCE = 1e-4, LOSS_TOLERANCE = 1e-5;

// ---- golden states ---------------------------------------------------------------------------

static const char* const names[] = { "group1", "group2", "group4", "one_kv", "aligned" };
enum { N_GOLDEN = sizeof names / sizeof names[0], STEPS = 10 };

// got (n) must be what tensor name of the golden state says
static bool golden_close_to(const Golden* g, const char* name, const float* got, size_t n, double tolerance) {
    char label[128];
    float* want = golden_copy(g, name, "F32", n);
    snprintf(label, sizeof label, "%s %s", g->name, name);
    bool ok = check_close(label, got, want, n, tolerance);
    free(want);
    return ok;
}

static void test_forward(void** state) {
    (void)state;
    for (int i = 0; i < N_GOLDEN; i++) {
        Golden g = golden_open(names[i]);
        size_t n = (size_t)g.B * g.T * g.c->V;
        float* logits = allocate(n, sizeof *logits);
        float loss = cpu_forward(g.model, g.ids, g.labels, g.B, g.T, logits);
        assert_true(golden_close_to(&g, "logits", logits, n, TOLERANCE));
        assert_true(golden_close_to(&g, "loss", &loss, 1, LOSS_TOLERANCE));
        free(logits);
        golden_close(&g);
    }
}

// every gradient of the file is compared, and every parameter of the list has one in the file
static void test_gradients(void** state) {
    (void)state;
    for (int i = 0; i < N_GOLDEN; i++) {
        Golden g = golden_open(names[i]);
        float loss = cpu_backward(g.model, g.ids, g.labels, g.B, g.T);
        assert_true(golden_close_to(&g, "loss", &loss, 1, LOSS_TOLERANCE));
        int compared = 0;
        bool ok = true;
        for (size_t j = 0; j < g.file.n; j++) {
            const char* name = g.file.tensors[j].name;
            if (strncmp(name, "grad.", 5) != 0) continue;
            size_t n;
            const float* gradient = cpu_gradient(g.model, name + 5, &n);
            if (!gradient) test_fail("%s: llama3.c knows no %s", g.name, name + 5);
            ok &= golden_close_to(&g, name, gradient, n, TOLERANCE);
            compared++;
        }
        assert_true(ok);
        assert_int_equal(compared, llama3_count(g.c));
        golden_close(&g);
    }
}

static void test_adamw(void** state) {
    (void)state;
    for (int i = 0; i < N_GOLDEN; i++) {
        Golden g = golden_open(names[i]);
        float* hyper = golden_copy(&g, "hyperparameters", "F32", 6);
        float *want_losses = golden_copy(&g, "losses", "F32", STEPS),
              *want_norms = golden_copy(&g, "norms", "F32", STEPS);
        for (int step = 0; step < STEPS; step++) {
            float loss = cpu_backward(g.model, g.ids, g.labels, g.B, g.T);
            float norm = cpu_update(g.model, hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5]);
            char label[128];
            snprintf(label, sizeof label, "%s step %d loss", g.name, step);
            assert_true(check_close(label, &loss, &want_losses[step], 1, LOSS_TOLERANCE));
            snprintf(label, sizeof label, "%s step %d norm", g.name, step);
            assert_true(check_close(label, &norm, &want_norms[step], 1, TOLERANCE));
        }
        const char* const kept[] = { "final.model.norm.weight", "final.model.layers.0.self_attn.k_proj.weight" };
        for (int j = 0; j < 2; j++) {
            size_t n;
            const float* w = cpu_parameter(g.model, kept[j] + strlen("final."), &n);
            assert_non_null(w);
            assert_true(golden_close_to(&g, kept[j], w, n, TOLERANCE));
        }
        free(hyper), free(want_losses), free(want_norms);
        golden_close(&g);
    }
}

// transformers 4 and 5 spell RoPE and the type differently; the model is the same
static void test_spellings(void** state) {
    (void)state;
    Error err;
    Config c[2];
    const char* const paths[] = { "dev/test/golden/group2/config.json", "dev/test/golden/group2/config_v5.json" };
    for (int i = 0; i < 2; i++) {
        char* text;
        size_t n;
        memset(&c[i], 0, sizeof c[i]);
        if (!read_file(paths[i], &text, &n, 1 << 20, &err)) test_fail("%s", err.text);
        if (!config_parse(&c[i], text, n, &err)) test_fail("%s: %s", paths[i], err.text);
        free(text);
    }
    assert_true(c[0].factor == 8 && c[0].original == 32 && c[0].n_eos == 2);
    assert_memory_equal(&c[0], &c[1], sizeof c[0]);
}

// ---- what needs no reference -----------------------------------------------------------------

static int argmax(const float* x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

// greedy generation through the cache = the argmax of the whole sequence's logits, at every position
static void test_cache(void** state) {
    (void)state;
    enum { TOTAL = 60 };
    const int prompts[] = { 1, 7, TOTAL - 1 };
    for (int i = 0; i < N_GOLDEN; i++) {
        Golden g = golden_open(names[i]);
        float* logits = allocate((size_t)TOTAL * g.c->V, sizeof *logits);
        for (int p = 0; p < 3; p++) {
            int32_t ids[TOTAL];
            for (int t = 0; t < TOTAL; t++) ids[t] = t < prompts[p] ? (int32_t)(random_bits(3, p, t) % g.c->V) : -1;
            cpu_generate_greedy(g.model, ids, prompts[p], TOTAL);
            assert_true(cpu_forward(g.model, ids, NULL, 1, TOTAL, logits) == 0);
            for (int t = prompts[p]; t < TOTAL; t++)
                if (ids[t] != argmax(logits + (size_t)(t - 1) * g.c->V, g.c->V))
                    test_fail("%s, prompt of %d: token %d is not the likeliest", g.name, prompts[p], t);
        }
        free(logits);
        golden_close(&g);
    }
}

// the logits of a prefix are those of the whole sequence: attention looks back only, and a shorter sequence that follows
// a longer one finds nothing of it
static void test_prefix(void** state) {
    (void)state;
    for (int i = 0; i < N_GOLDEN; i++) {
        Golden g = golden_open(names[i]);
        size_t n = (size_t)g.T * g.c->V;
        float *whole = allocate(n, sizeof *whole), *part = allocate(n, sizeof *part);
        cpu_forward(g.model, g.ids, NULL, 1, g.T, whole);
        for (int T = 1; T < g.T; T += 5) {
            cpu_forward(g.model, g.ids, NULL, 1, T, part);
            assert_true(check_close("logits of a prefix", part, whole, (size_t)T * g.c->V, 1e-5));
        }
        free(whole), free(part);
        golden_close(&g);
    }
}

static int count_valid(const int32_t* labels, int n) {
    int valid = 0;
    for (int i = 0; i < n; i++) valid += labels[i] != -100;
    return valid;
}

// all parameters (get = cpu_parameter) or gradients (cpu_gradient), one after the other; owned by the caller
static float* copy_all(CpuModel* model, float* get(CpuModel*, const char*, size_t*), size_t* total) {
    const Config* c = cpu_model_config(model);
    Params params;
    params.layer = allocate(c->L, sizeof *params.layer);
    int n = llama3_count(c);
    Param* list = allocate(n, sizeof *list);
    llama3_list(list, &params, c);
    float* all = NULL;
    *total = 0;
    for (int i = 0; i < n; i++) {
        size_t size = 0;
        const float* numbers = get(model, list[i].name, &size);
        if (!numbers || size != param_size(&list[i])) test_fail("llama3.c knows no %s of that size", list[i].name);
        all = reallocate(all, *total + size, sizeof *all);
        memcpy(all + *total, numbers, size * sizeof *all);
        *total += size;
    }
    free(list), free(params.layer);
    return all;
}

// the gradient of a batch is the mean of its rows' gradients, each weighed by its valid labels: what makes accumulation
// over micro-batches equal to one large batch
static void test_batch_is_mean_of_rows(void** state) {
    (void)state;
    for (int i = 0; i < N_GOLDEN; i++) {
        Golden g = golden_open(names[i]);
        if (g.B > 1) {
            size_t n;
            int valid = count_valid(g.labels, g.B * g.T);
            float loss = cpu_backward(g.model, g.ids, g.labels, g.B, g.T), mean_loss = 0;
            float *whole = copy_all(g.model, cpu_gradient, &n), *mean = allocate(n, sizeof *mean);
            for (int b = 0; b < g.B; b++) {
                const int32_t* labels = g.labels + (size_t)b * g.T;
                float weight = (float)count_valid(labels, g.T) / (float)valid;
                mean_loss += weight * cpu_backward(g.model, g.ids + (size_t)b * g.T, labels, 1, g.T);
                float* row = copy_all(g.model, cpu_gradient, &n);
                for (size_t j = 0; j < n; j++) mean[j] += weight * row[j];
                free(row);
            }
            assert_true(check_close("mean loss of the rows", &mean_loss, &loss, 1, 1e-5));
            assert_true(check_close("mean gradient of the rows", mean, whole, n, 1e-5));
            free(whole), free(mean);
        }
        golden_close(&g);
    }
}

// ---- the number of threads -------------------------------------------------------------------

enum { B_THREADS = 4, T_THREADS = 65, STEPS_THREADS = 3 };

// losses and norms of a few steps, then every parameter
typedef struct {
    float steps[2 * STEPS_THREADS];
    float* parameters;
    size_t n;
} Run;

// writes a model large enough that every loop is shared out: the tiny preset with two layers
static void write_model(const char* folder) {
    Config c;
    Error err;
    assert_true(config_preset(&c, "tiny"));
    c.V = 261, c.L = 2;
    Params params;
    params.layer = allocate(c.L, sizeof *params.layer);
    int n = llama3_count(&c);
    Param* list = allocate(n, sizeof *list);
    llama3_list(list, &params, &c);
    char* memory = allocate(llama3_place(list, n, DTYPE_F32, NULL), 1);
    llama3_place(list, n, DTYPE_F32, memory);
    llama3_init(list, n, 1);
    SafetensorsEntry* entries = allocate(n, sizeof *entries);
    for (int i = 0; i < n; i++) {
        SafetensorsEntry* e = &entries[i];
        memcpy(e->name, list[i].name, sizeof e->name);
        e->source = *list[i].tensor;
        e->dtype = DTYPE_F32;
        e->n_dims = list[i].rows ? 2 : 1;
        e->shape[0] = list[i].rows ? list[i].rows : list[i].cols;
        e->shape[1] = list[i].rows ? list[i].cols : 0;
    }
    char path[PATH_SIZE];
    assert_true(path_join(path, folder, "model.safetensors", &err));
    if (!safetensors_write(path, entries, n, &err) || !config_write(&c, folder, DTYPE_F32, &err))
        test_fail("%s", err.text);
    free(entries), free(memory), free(list), free(params.layer);
}

static Run run_with_threads(const char* folder, int threads) {
    omp_set_num_threads(threads);
    CpuModel* model = cpu_model_load(folder);
    const Config* c = cpu_model_config(model);
    int32_t ids[B_THREADS * T_THREADS], labels[B_THREADS * T_THREADS];
    Run run = { .n = 0 };
    for (int step = 0; step < STEPS_THREADS; step++) {
        for (int i = 0; i < B_THREADS * T_THREADS; i++) {
            ids[i] = (int32_t)(random_bits(step, 0, i) % c->V);
            labels[i] = (int32_t)(random_bits(step, 1, i) % c->V);
        }
        run.steps[2 * step] = cpu_backward(model, ids, labels, B_THREADS, T_THREADS);
        run.steps[2 * step + 1] = cpu_update(model, 1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f);
    }
    run.parameters = copy_all(model, cpu_parameter, &run.n);
    cpu_model_free(model);
    return run;
}

static void test_threads(void** state) {
    (void)state;
    char folder[] = "/tmp/llama3-test-XXXXXX", command[64];
    assert_non_null(mkdtemp(folder));
    write_model(folder);
    int before = omp_get_max_threads();
    const int threads[] = { 1, 2, 8 };
    Run first = run_with_threads(folder, threads[0]);
    assert_true(check_finite(first.steps[0]) && first.steps[0] != first.steps[2]);
    for (int i = 1; i < 3; i++) {
        Run run = run_with_threads(folder, threads[i]);
        assert_memory_equal(run.steps, first.steps, sizeof run.steps);
        assert_int_equal(run.n, first.n);
        assert_memory_equal(run.parameters, first.parameters, run.n * sizeof *run.parameters);
        free(run.parameters);
    }
    free(first.parameters);
    omp_set_num_threads(before);
    snprintf(command, sizeof command, "rm -r %s", folder);
    assert_int_equal(system(command), 0);
}

// ---- a trained model -------------------------------------------------------------------------

static void test_stories(void** state) {
    (void)state;
    enum { N = 201 }; // token 1, which begins every text, and 200 that follow
    char folder[PATH_SIZE];
    snprintf(folder, sizeof folder, "%s", test_data("stories260K/hf/config.json"));
    *strrchr(folder, '/') = 0;
    FILE* file = fopen(test_data("stories260K/greedy_ids.txt"), "r");
    assert_non_null(file);
    int32_t want[N], got[N] = { 1 };
    for (int i = 0; i < N; i++) assert_int_equal(fscanf(file, "%d", &want[i]), 1);
    fclose(file);
    assert_int_equal(want[0], 1);
    CpuModel* model = cpu_model_load(folder);
    cpu_generate_greedy(model, got, 1, N);
    cpu_model_free(model);
    for (int i = 0; i < N; i++)
        if (got[i] != want[i]) test_fail("stories260K: token %d is %d, expected %d", i, got[i], want[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward), cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_adamw),   cmocka_unit_test(test_spellings),
        cmocka_unit_test(test_cache),   cmocka_unit_test(test_prefix),
        cmocka_unit_test(test_threads), cmocka_unit_test(test_batch_is_mean_of_rows),
        cmocka_unit_test(test_stories),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
