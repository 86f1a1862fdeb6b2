/*
The small things: learning rate schedules, outliers, the arena, the log that a resumed run shortens, options.
*/
#include "test.h"

#include "llmc/arena.h"
#include "llmc/check.h"
#include "llmc/log.h"
#include "llmc/options.h"
#include "llmc/outliers.h"
#include "llmc/schedule.h"

static void assert_near(double got, double want) {
    if (!(fabs(got - want) <= 1e-12)) test_fail("got %.17g, want %.17g", got, want);
}

// ---- schedules -------------------------------------------------------------------------------

static void test_schedule(void** state) {
    (void)state;
    const char* names[] = { "constant", "linear", "cosine", "wsd" };
    for (int i = 0; i < 4; i++) {
        assert_near(schedule_lr(names[i], 0, 100, 10, 2, 0.1), 0.2); // the first step already learns
        assert_near(schedule_lr(names[i], 9, 100, 10, 2, 0.1), 2);
        assert_near(schedule_lr(names[i], 10, 100, 10, 2, 0.1), 2); // no jump after the warm-up
        assert_near(schedule_lr(names[i], 99, 100, 10, 2, 0.1), i == 0 ? 2 : 0.2);
        assert_near(schedule_lr(names[i], 500, 100, 10, 2, 0.1), i == 0 ? 2 : 0.2); // nor a rise after the end
    }
    assert_near(schedule_lr("linear", 55, 101, 10, 2, 0), 2 * (1 - 45.0 / 90));
    assert_near(schedule_lr("cosine", 55, 101, 10, 2, 0), 1); // half way
    assert_near(schedule_lr("wsd", 70, 101, 0, 2, 0), 2);
    assert_near(schedule_lr("wsd", 90, 101, 0, 2, 0), 1); // half of the last fifth
    assert_near(schedule_lr("cosine", 0, 1, 0, 2, 0.1), 0.2); // a run of one step is at its end
}

// ---- outliers --------------------------------------------------------------------------------

static void test_outliers(void** state) {
    (void)state;
    static Outliers o; // empty
    for (int i = 0; i < OUTLIER_STEPS; i++) {
        assert_near(outliers_z(&o, 100), 0); // too few to tell
        outliers_add(&o, i % 2 ? 3 : 1);     // mean 2, deviation 1
    }
    assert_near(outliers_z(&o, 5), 3);
    assert_near(outliers_z(&o, 1.5), -0.5);
    outliers_add(&o, 1), outliers_add(&o, 3); // the oldest two make room
    assert_near(outliers_z(&o, 5), 3);
    outliers_add(&o, 257); // mean 4
    assert_near(o.x[OUTLIER_STEPS - 1], 257);
    double squares = 253.0 * 253 + 64 * 1 + 63 * 9;
    assert_near(outliers_z(&o, 4 + sqrt(squares / OUTLIER_STEPS)), 1);
    for (int i = 0; i < OUTLIER_STEPS; i++) outliers_add(&o, 7);
    assert_near(outliers_z(&o, 8), 0); // of what never changes, nothing is known
}

// ---- arena -----------------------------------------------------------------------------------

typedef struct {
    float *a, *b, *c;
} Arrays;

static void layout(Arrays* x, Arena* arena) {
    x->a = arena_floats(arena, 3);
    x->b = arena_floats(arena, 0);
    x->c = arena_floats(arena, 100);
}

static void test_arena(void** state) {
    (void)state;
    Arena arena = { 0 };
    Arrays x;
    layout(&x, &arena);
    assert_null(x.a);
    assert_null(x.c);
    assert_int_equal(arena.used, 256 + 400);
    arena_allocate(&arena);
    layout(&x, &arena);
    assert_int_equal((uintptr_t)x.a % 256, 0);
    assert_int_equal((uintptr_t)x.c % 256, 0);
    assert_int_equal(x.c - x.a, 64);
    for (int i = 0; i < 100; i++) assert_true(x.c[i] == 0);
    arena_free(&arena);
}

// ---- log -------------------------------------------------------------------------------------

static void test_log_cut(void** state) {
    (void)state;
    const char text[] = "{\"step\":1,\"train_loss\":5}\n{\"step\":2,\"train_loss\":4}\n{\"step\":2,\"val_loss\":4}\n"
                        "{\"step\":3,\"train_loss\":3}\n{\"step\":4,\"trai";
    char path[] = "/tmp/llama3-test-XXXXXX", kept[512] = "";
    int file = mkstemp(path);
    assert_int_equal(write(file, text, sizeof text - 1), sizeof text - 1);
    close(file);
    Error err;
    assert_true(log_cut(path, 2, &err));
    FILE* f = fopen(path, "r");
    size_t n = fread(kept, 1, sizeof kept - 1, f);
    fclose(f);
    unlink(path);
    assert_int_equal(n, strstr(text, "{\"step\":3") - text);
    assert_memory_equal(kept, text, n);
    assert_true(log_cut("/tmp/llama3-test-absent/log.jsonl", 2, &err)); // nothing to shorten
}

// ---- options ---------------------------------------------------------------------------------

static bool parse(Options* o, const char* command, const char** words, Error* err) {
    char* argv[8];
    int argc = 0;
    for (; words[argc]; argc++) argv[argc] = (char*)words[argc];
    *o = options_default();
    return options_parse(o, command_find(command), argc, argv, err);
}

static void test_options(void** state) {
    (void)state;
    Options o;
    Error err;
    const char* good[] = { "--batch", "4", "--lr=1e-3", "--resume", "--schedule", "wsd", "--model=tiny", NULL };
    assert_true(parse(&o, "train", good, &err));
    assert_int_equal(o.batch, 4);
    assert_true(o.lr == 1e-3 && o.resume);
    assert_string_equal(o.schedule, "wsd");
    assert_string_equal(o.model, "tiny");
    assert_true(option_given(&o, "batch") && !option_given(&o, "seq"));

    const char* bad[][3] = {
        { "--batch", "0" },      { "--batch", "1.5" },  { "--batch", "4x" },    { "--batch", NULL },     { "--lr", "nan" },
        { "--schedule", "cos" }, { "--tokens", "4" },   { "batch", "4" },       { "--resume=yes", NULL }, { "--batc", "4" },
        { "--lr-final", "1.1" }, { "--seed", "-1" },    { "--batch=", NULL },   { "--data", "--val" },   { "--", NULL },
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        err.text[0] = 0;
        if (parse(&o, "train", bad[i], &err)) test_fail("%s %s was taken", bad[i][0], bad[i][1] ? bad[i][1] : "");
        assert_true(strlen(err.text) > 10);
    }
}

// every option of a run comes back from its JSON form to the bit
static void test_options_json(void** state) {
    (void)state;
    Options o = options_default(), back = options_default();
    Error err;
    o.lr = 0.1 + 0.2; // needs 17 digits
    o.batch = 3, o.seed = 123456789012345, o.data = "a \"quoted\" path", o.clip = 0;
    cJSON* object = options_to_json(&o);
    assert_true(options_from_json(&back, object, &err));
    assert_true(back.lr == o.lr && back.batch == 3 && back.seed == o.seed && back.clip == 0);
    assert_string_equal(back.data, o.data);
    assert_null(back.val);
    cJSON_Delete(object);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_schedule), cmocka_unit_test(test_outliers), cmocka_unit_test(test_arena),        cmocka_unit_test(test_log_cut),
        cmocka_unit_test(test_options),  cmocka_unit_test(test_options_json),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
