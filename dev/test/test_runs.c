/*
Training as a person meets it: what a run writes, that it can be stopped at any moment and resumed to the bit, that neither
threads nor evaluation nor checkpoints change its losses, and that what goes in is what is learnt. Written from the
description of the command line alone; dev/test/test_cli.c has the other commands.
*/
#define _GNU_SOURCE
#include "program.h"

// ---- what a run leaves -----------------------------------------------------------------------

enum { MAX_STEPS = 1024 };

typedef struct {
    int n, n_val;             // training steps logged; evaluations logged
    int first, last;          // step
    char loss[MAX_STEPS][32]; // of a step, as the log spells it; the last one where a step is logged twice
    double train_loss[MAX_STEPS], lr[MAX_STEPS], grad_norm[MAX_STEPS];
    char val[MAX_STEPS][32];
} Log;

// the number that a line gives for a key, as it is spelt there
static void copy_number(char* to, const char* line, const char* key) {
    const char* at = strstr(line, text("\"%s\":", key));
    at = at ? at + strlen(key) + 3 : "";
    while (*at == ' ') at++;
    snprintf(to, 32, "%.*s", (int)strcspn(at, ",} "), at);
}

static bool number_of(const cJSON* object, const char* key, double* value) {
    const cJSON* item = cJSON_GetObjectItemCaseSensitive(object, key);
    *value = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    return isfinite(*value);
}

// OUT/log.jsonl: every line is an object of the kinds described
static Log* read_log(const char* out) {
    Log* log = keep(calloc(1, sizeof *log));
    log->first = MAX_STEPS;
    char *rest = file_bytes(text("%s/log.jsonl", out), NULL), *line;
    expect(!*rest || rest[strlen(rest) - 1] == '\n', "%s/log.jsonl ends within a line", out);
    while ((line = strsep(&rest, "\n")) && *line) {
        cJSON* object = cJSON_ParseWithOpts(line, NULL, 1);
        double step = -1, loss = 0, norm = 0, lr = 0, ms, speed, val;
        bool known = number_of(object, "step", &step) && step >= 0 && step < MAX_STEPS;
        int s = known ? (int)step : 0;
        if (known && number_of(object, "train_loss", &loss)) {
            known = number_of(object, "grad_norm", &norm) && number_of(object, "lr", &lr) &&
                    number_of(object, "ms", &ms) && number_of(object, "tok_s", &speed);
            log->n += log->loss[s][0] == 0;
            copy_number(log->loss[s], line, "train_loss");
            log->train_loss[s] = loss, log->lr[s] = lr, log->grad_norm[s] = norm;
            if (s < log->first) log->first = s;
            if (s > log->last) log->last = s;
        } else if (known && number_of(object, "val_loss", &val)) {
            log->n_val += log->val[s][0] == 0;
            copy_number(log->val[s], line, "val_loss");
        } else {
            known = false;
        }
        expect(known, "%s/log.jsonl has the line %s", out, line);
        cJSON_Delete(object);
    }
    return log;
}

// both logs have steps 1 to n with the same losses, to the last digit
static void expect_same_losses(const char* a, const char* b, int n) {
    Log *x = read_log(a), *y = read_log(b);
    for (int s = 1; s <= n; s++)
        if (!expect(x->loss[s][0] && strcmp(x->loss[s], y->loss[s]) == 0, "step %d: train_loss %s in %s, %s in %s", s,
                    x->loss[s], a, y->loss[s], b))
            return;
}

static const char* step_folder(const char* out, int step) { return text("%s/step-%08d", out, step); }

// the steps that have a checkpoint: their number, and the newest (-1: none)
static int checkpoints(const char* out, int* newest) {
    int n = 0;
    *newest = -1;
    DIR* d = opendir(out);
    for (struct dirent* e; d && (e = readdir(d));) {
        int step;
        if (strlen(e->d_name) != 13 || sscanf(e->d_name, "step-%8d", &step) != 1) continue;
        n++;
        if (step > *newest) *newest = step;
    }
    if (d) closedir(d);
    return n;
}

// a safetensors file whose tensors end where the file ends
static bool whole_safetensors(const char* path) {
    if (!exists(path)) return false;
    size_t n;
    const char* bytes = file_bytes(path, &n);
    uint64_t length = 0;
    if (n >= 8) memcpy(&length, bytes, 8);
    if (n < 8 || length > n - 8) return false;
    cJSON *header = cJSON_ParseWithLength(bytes + 8, length), *tensor;
    double end = -1;
    cJSON_ArrayForEach(tensor, header) {
        const cJSON* at = cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(tensor, "data_offsets"), 1);
        if (at && at->valuedouble > end) end = at->valuedouble;
    }
    cJSON_Delete(header);
    return end == (double)(n - 8 - length);
}

static bool parses(const char* path) {
    if (!exists(path)) return false;
    cJSON* json = cJSON_ParseWithOpts(file_bytes(path, NULL), NULL, 1);
    cJSON_Delete(json);
    return json != NULL;
}

static void expect_whole(const char* out, int step, bool tokenizer) {
    const char* folder = step_folder(out, step);
    const char* json[] = { "config.json", "generation_config.json", "state.json", "tokenizer.json",
                           "tokenizer_config.json" };
    for (int i = 0; i < (tokenizer ? 5 : 3); i++)
        expect(parses(text("%s/%s", folder, json[i])), "%s/%s is missing or no JSON", folder, json[i]);
    const char* tensors[] = { "model.safetensors", "optimizer.safetensors" };
    for (int i = 0; i < 2; i++)
        expect(whole_safetensors(text("%s/%s", folder, tensors[i])), "%s/%s is missing or not whole", folder,
               tensors[i]);
}

// the two checkpoints are the same bytes: weights, optimizer, state (but for the folder's own name in it)
static void expect_same_checkpoint(const char* a, const char* b, int step) {
    const char* file[] = { "model.safetensors", "optimizer.safetensors", "config.json" };
    for (int i = 0; i < 3; i++) {
        const char *x = text("%s/%s", step_folder(a, step), file[i]), *y = text("%s/%s", step_folder(b, step), file[i]);
        if (expect(exists(x) && exists(y), "no %s or no %s", x, y)) expect(same_file(x, y), "%s and %s differ", x, y);
    }
}

#define TRAIN(out, ...)                                                                                                \
    "train", "--model", "model", "--data", "data.bin", "--out", out, "--batch", "2", "--seq", "16", __VA_ARGS__

static void make_model_and_data(void) {
    make_model("model", SMALL);
    make_data("data.bin", 3000);
}

static const char* listing(const char* out) {
    const char* all = text("%s", "");
    DIR* d = opendir(out);
    for (struct dirent* e; d && (e = readdir(d));) all = text("%s %s", all, e->d_name);
    if (d) closedir(d);
    return all;
}

// ---- files of a run --------------------------------------------------------------------------

static void test_checkpoint_files(void) {
    make_model_and_data();
    RUN_WELL(TRAIN("out", "--steps", "5", "--checkpoint-every", "2", "--keep", "9", "--warmup", "2", "--eval-every",
                   "2", "--eval-steps", "2"));
    int newest;
    expect(checkpoints("out", &newest) == 3 && newest == 5, "5 steps, --checkpoint-every 2: %s", listing("out"));
    for (int step = 2; step <= 5; step += 1 + (step == 2)) expect_whole("out", step, false);
    Log* log = read_log("out");
    expect(log->n == 5 && log->first == 1 && log->last == 5, "log.jsonl: %d steps, %d to %d", log->n, log->first,
           log->last);
    expect(log->val[2][0] && log->val[4][0], "log.jsonl: no val_loss at steps 2 and 4");
    expect(log->lr[1] > 0 && log->lr[2] > log->lr[1] && log->lr[5] < log->lr[2], "learning rates %g %g … %g",
           log->lr[1], log->lr[2], log->lr[5]);
    for (int s = 1; s <= 5; s++) expect(log->grad_norm[s] > 0, "step %d: grad_norm %g", s, log->grad_norm[s]);
    // OUT is a model: the newest step
    Result a = RUN("generate", "--model", "out", "--ids", "1 2", "--tokens", "9", "--print-ids", "--temperature", "0");
    Result b = RUN("generate", "--model", step_folder("out", 5), "--ids", "1 2", "--tokens", "9", "--print-ids",
                   "--temperature", "0");
    expect(well(a).code == 0 && strcmp(a.out, b.out) == 0, "--model out: %s%s: %s", a.out, step_folder("out", 5),
           b.out);
    expect(!same_file(text("%s/model.safetensors", step_folder("out", 2)),
                      text("%s/model.safetensors", step_folder("out", 4))),
           "the weights of steps 2 and 4 are the same");
}

static void test_checkpoint_with_tokenizer(void) {
    make_model("model", SMALL);
    give_tokenizer("model");
    char* words = text("%s", "to be or not to be, that is the question\n");
    for (int i = 0; i < 6; i++) words = text("%s%s", words, words);
    put_text("text.txt", words);
    RUN_WELL("train", "--model", "model", "--data", "text.txt", "--out", "out", "--steps", "2", "--batch", "2", "--seq",
             "32");
    expect_whole("out", 2, true);
    const char* config = file_bytes(text("%s/tokenizer_config.json", step_folder("out", 2)), NULL);
    expect(contains(config, "PreTrainedTokenizerFast") && contains(config, "chat_template"),
           "tokenizer_config.json: %s", config);
    Result r = well(RUN("tokenize", "--tokenizer", step_folder("out", 2), "--data", "text.txt", "--print-ids"));
    expect(strncmp(r.out, "116 111 32 98 101 32", 20) == 0, "tokenize with the saved tokenizer: %.60s", r.out);
    well(RUN("generate", "--model", "out", "--prompt", "to be", "--tokens", "8"));
}

static void test_keep(void) {
    make_model_and_data();
    for (int keep_n = 1; keep_n <= 2; keep_n++) {
        const char* out = text("keep%d", keep_n);
        RUN_WELL(TRAIN(out, "--steps", "5", "--checkpoint-every", "1", "--keep", text("%d", keep_n)));
        int newest, n = checkpoints(out, &newest);
        expect(n == keep_n && newest == 5, "--keep %d: %s", keep_n, listing(out));
    }
}

static void test_no_checkpoints(void) {
    make_model_and_data();
    RUN_WELL(TRAIN("out", "--steps", "3", "--checkpoint-every", "0"));
    expect(!contains(tree("out"), "safetensors"), "--checkpoint-every 0: %s", tree("out"));
    expect(read_log("out")->n == 3, "--checkpoint-every 0: no log");
}

static void test_steps_0(void) {
    put_text("text.txt", "a short text\n");
    RUN_WELL("train", "--model", "tiny", "--steps", "0", "--out", "out");
    RUN_WELL("train", "--model", "tiny", "--steps", "0", "--out", "same");
    RUN_WELL("train", "--model", "tiny", "--steps", "0", "--out", "other", "--seed", "99");
    const char *out = text("%s/model.safetensors", step_folder("out", 0)),
               *same = text("%s/model.safetensors", step_folder("same", 0));
    expect(whole_safetensors(out) && same_file(out, same), "--steps 0: not the same weights for the same seed");
    expect(!same_file(out, text("%s/model.safetensors", step_folder("other", 0))),
           "--steps 0: the same weights for another seed");
    const char* files[] = { "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json" };
    for (int i = 0; i < 4; i++)
        expect(parses(text("%s/%s", step_folder("out", 0), files[i])), "--steps 0 writes no %s", files[i]);
    expect(!exists(text("%s/optimizer.safetensors", step_folder("out", 0))), "--steps 0 writes an optimizer");
    size_t size;
    tensor_offset(out, "model.embed_tokens.weight", &size);
    expect(size == 261 * 128 * 4, "tiny: the embedding has %zu bytes", size);
    well(RUN("generate", "--model", "out", "--prompt", "a", "--tokens", "3"));
    well(RUN("eval", "--model", "out", "--data", "text.txt"));
}

// an OUT that holds a run is not touched
static void test_numbered_sibling(void) {
    make_model_and_data();
    mkdir("out", 0777);
    put_text("out/notes.txt", "other files are no hindrance");
    RUN_WELL(TRAIN("out", "--steps", "2"));
    expect(exists("out/log.jsonl"), "a folder without a run was not used: %s", tree("."));
    const char* before = tree("out");
    Result r = RUN_WELL(TRAIN("out", "--steps", "3"));
    expect(strcmp(before, tree("out")) == 0, "a second run changed the first; before:\n%safter:\n%s", before,
           tree("out"));
    DIR* d = opendir(".");
    const char* sibling = NULL;
    for (struct dirent* e; (e = readdir(d));)
        if (strncmp(e->d_name, "out", 3) == 0 && e->d_name[3]) sibling = text("%s", e->d_name);
    closedir(d);
    if (!expect(sibling != NULL, "no numbered folder beside out:%s", listing("."))) return;
    expect(read_log(sibling)->n == 3, "%s is not the second run", sibling);
    expect(contains(r.err, sibling) || contains(r.out, sibling), "the second run does not say that it writes to %s: %s",
           sibling, r.err);
    RUN_WELL(TRAIN("out", "--steps", "1"));
    expect(strcmp(before, tree("out")) == 0 && read_log(sibling)->n == 3, "a third run changed an earlier one");
}

// ---- the same numbers ------------------------------------------------------------------------

static void test_threads(void) {
    Shape s = { 261, 48, 2, 6, 2, 10, 100, 64, false, DTYPE_F32, 3 }; // awkward sizes
    make_model("model", s);
    make_data("data.bin", 5000);
    const int threads[] = { 1, 2, 8 };
    for (int i = 0; i < 3; i++) {
        const char* out = text("out%d", threads[i]);
        const How how = { .threads = threads[i] };
        well(finish(start(how, ARGS("train", "--model", "model", "--data", "data.bin", "--out", out, "--steps", "4",
                                    "--batch", "3", "--seq", "33", "--eval-every", "2"))));
        expect(read_log(out)->n == 4, "%d threads: no log of 4 steps", threads[i]);
        if (i == 0) continue;
        expect_same_losses("out1", out, 4);
        expect_same_checkpoint("out1", out, 4);
    }
}

// evaluation, samples, checkpoints and the folder's name change no loss; the seed and the learning rate do
static void test_side_shows(void) {
    make_model("model", SMALL);
    give_tokenizer("model");
    char* words = text("%s", "some words that are said again and again, 0123456789\n");
    for (int i = 0; i < 6; i++) words = text("%s%s", words, words);
    put_text("data.txt", words);
#define TRAIN_TEXT(out, ...)                                                                                           \
    "train", "--model", "model", "--data", "data.txt", "--out", out, "--batch", "2", "--seq", "16", "--steps", "8",    \
        __VA_ARGS__
    RUN_WELL(TRAIN_TEXT("plain", "--eval-every", "0", "--sample-every", "0", "--checkpoint-every", "0"));
    RUN_WELL(
        TRAIN_TEXT("eval", "--eval-every", "1", "--eval-steps", "3", "--sample-every", "0", "--checkpoint-every", "0"));
    RUN_WELL(TRAIN_TEXT("sample", "--eval-every", "0", "--sample-every", "1", "--checkpoint-every", "0"));
    RUN_WELL(TRAIN_TEXT("save", "--eval-every", "0", "--sample-every", "0", "--checkpoint-every", "1", "--keep", "1"));
    RUN_WELL(TRAIN_TEXT("half", "--checkpoint-every", "3", "--dtype", "BF16"));
    RUN_WELL(TRAIN_TEXT("seed", "--seed", "99", "--checkpoint-every", "0"));
    RUN_WELL(TRAIN_TEXT("lr", "--lr", "0.01", "--checkpoint-every", "0"));
    const char* same[] = { "eval", "sample", "save", "half" };
    for (int i = 0; i < 4; i++) expect_same_losses("plain", same[i], 8);
    expect(read_log("eval")->n_val >= 8, "--eval-every 1: %d evaluations in 8 steps", read_log("eval")->n_val);
    expect(read_log("plain")->n_val == 0, "--eval-every 0: %d evaluations", read_log("plain")->n_val);
    const Log *plain = read_log("plain"), *seed = read_log("seed"), *lr = read_log("lr");
    expect(strcmp(plain->loss[8], seed->loss[8]) != 0, "another seed, the same loss %s", seed->loss[8]);
    expect(strcmp(plain->loss[8], lr->loss[8]) != 0, "another learning rate, the same loss %s", lr->loss[8]);
}

// a step of two or four micro-batches is the step of one large batch
static void test_accumulation(void) {
    make_model_and_data();
#define BATCHES(out, batch)                                                                                            \
    "train", "--model", "model", "--data", "data.bin", "--out", out, "--seq", "16", "--steps", "6", "--lr", "1e-3",    \
        "--batch", batch, "--total-batch", "128"
    RUN_WELL(BATCHES("eight", "8"));
    RUN_WELL(BATCHES("four", "4"));
    RUN_WELL(BATCHES("two", "2"));
    const Log *eight = read_log("eight"), *four = read_log("four"), *two = read_log("two");
    for (int s = 1; s <= 6; s++) {
        double want = eight->train_loss[s];
        expect(want > 0 && fabs(four->train_loss[s] - want) < 1e-5 * want &&
                   fabs(two->train_loss[s] - want) < 1e-5 * want,
               "step %d: loss %s with --batch 8, %s with 4, %s with 2", s, eight->loss[s], four->loss[s], two->loss[s]);
        want = eight->grad_norm[s];
        expect(want > 0 && fabs(two->grad_norm[s] - want) < 1e-4 * want,
               "step %d: grad_norm %g with --batch 8, %g with 2", s, want, two->grad_norm[s]);
    }
    expect(strcmp(eight->loss[1], eight->loss[6]) != 0, "every step has the same loss");
}

// the steps that the log calls skipped, in order, and their number
static int skipped_steps(const char* out, int steps[MAX_STEPS]) {
    int n = 0;
    char *rest = file_bytes(text("%s/log.jsonl", out), NULL), *line;
    while ((line = strsep(&rest, "\n")) && *line)
        if (contains(line, "\"skipped\":true") && sscanf(line, "{\"step\":%d", &steps[n]) == 1) n++;
    return n;
}

// steps that lie far above the 128 before them change no weights; all others are as they were, also in a run that goes on
static void test_skip_outliers(void) {
    make_model_and_data();
#define SKIPPING(out, z, steps)                                                                                        \
    TRAIN(out, "--steps", steps, "--skip-outliers", z, "--schedule", "constant", "--checkpoint-every", "140", "--keep", "0",   \
          "--eval-every", "0")
    int skipped[MAX_STEPS];
    Result r = RUN_WELL(SKIPPING("none", "0", "170"));
    expect(skipped_steps("none", skipped) == 0 && !contains(r.err, "skipped"), "--skip-outliers 0 skips");
    r = RUN_WELL(SKIPPING("some", "0.3", "170"));
    int n = skipped_steps("some", skipped), first = skipped[0];
    if (!expect(n > 1 && first > 128, "--skip-outliers 0.3 skips %d of 170 steps, the first is %d", n, first)) return;
    expect(contains(r.err, "skipped"), "the terminal does not say that step %d is skipped: %s", first, r.err);
    expect_same_losses("none", "some", first);
    const Log *none = read_log("none"), *some = read_log("some");
    expect(some->n == 170 && strcmp(none->loss[170], some->loss[170]) != 0, "skipped steps make no difference");

    RUN_WELL(SKIPPING("before", "0.3", text("%d", first - 1)));
    RUN_WELL(SKIPPING("after", "0.3", text("%d", first)));
    const char* const file[] = { "model.safetensors", "optimizer.safetensors" };
    for (int i = 0; i < 2; i++)
        expect(same_file(text("%s/%s", step_folder("before", first - 1), file[i]), text("%s/%s", step_folder("after", first), file[i])),
               "skipping step %d changes %s", first, file[i]);

    copy_folder("part", "some");
    remove_folder(step_folder("part", 170));
    RUN_WELL("train", "--resume", "--out", "part");
    expect(strcmp(read_log("part")->loss[170], some->loss[170]) == 0, "resumed within a window: another loss");
    expect_same_checkpoint("part", "some", 170);
}

// ---- stop and go on --------------------------------------------------------------------------

// a run copied as it was at an earlier step goes on to the same end
static void expect_resume(const char* dtype) {
    const char *whole = text("whole%s", dtype), *part = text("part%s", dtype);
    RUN_WELL(TRAIN(whole, "--steps", "8", "--checkpoint-every", "1", "--keep", "99", "--dtype", dtype, "--total-batch",
                   "64", "--eval-every", "2"));
    for (int at = 1; at <= 7; at += 3) {
        remove_folder(part);
        copy_folder(part, whole);
        for (int step = at + 1; step <= 8; step++) remove_folder(step_folder(part, step));
        remove(text("%s/log.jsonl", part));
        Result r = RUN_WELL("train", "--resume", "--out", part);
        expect(!contains(r.err, "warning"), "%s, with no option changed: %s", r.command, r.err);
        Log *want = read_log(whole), *got = read_log(part);
        expect(got->first == at + 1 && got->last == 8, "resumed at %d: steps %d to %d", at, got->first, got->last);
        for (int s = at + 1; s <= 8; s++) {
            expect(strcmp(got->loss[s], want->loss[s]) == 0, "resumed at %d, step %d: loss %s, expected %s", at, s,
                   got->loss[s], want->loss[s]);
            expect(strcmp(got->val[s], want->val[s]) == 0, "resumed at %d, step %d: val_loss %s, expected %s", at, s,
                   got->val[s], want->val[s]);
            expect_same_checkpoint(whole, part, s);
        }
    }
}

static void test_resume(void) {
    make_model_and_data();
    expect_resume("F32");
    expect_resume("BF16");
}

static void test_resume_further(void) {
    make_model_and_data();
    RUN_WELL(TRAIN("whole", "--schedule", "constant", "--steps", "6"));
    RUN_WELL(TRAIN("part", "--schedule", "constant", "--steps", "3"));
    Result r = RUN_WELL("train", "--resume", "--out", "part", "--steps", "6");
    expect(contains(r.err, "steps"), "--resume with other --steps says nothing of it: %s", r.err);
    expect_same_losses("whole", "part", 6);
    expect_same_checkpoint("whole", "part", 6);
    // a changed option is named; a run that is over is left as it is
    r = RUN_WELL("train", "--resume", "--out", "part", "--steps", "7", "--lr", "0.5", "--seed", "5");
    expect(contains(r.err, "--lr") && contains(r.err, "--seed"), "--resume with another --lr and --seed: %s", r.err);
    const char* before = tree("part");
    r = RUN_WELL("train", "--resume", "--out", "part");
    expect(strcmp(before, tree("part")) == 0, "resuming a run that is over changes files; before:\n%safter:\n%s",
           before, tree("part"));
    // the newest checkpoint cannot be read: said in one line, nothing changed
    put_text(text("%s/state.json", step_folder("part", 7)), "{");
    expect_mistake(WORDS("state.json"), ARGS("train", "--resume", "--out", "part"));
    RUN_WELL(TRAIN("cut", "--steps", "3", "--checkpoint-every", "1"));
    remove_folder(step_folder("cut", 3));
    if (truncate(text("%s/optimizer.safetensors", step_folder("cut", 2)), 9000) != 0) test_fail("cannot cut a file");
    expect_mistake(WORDS("optimizer.safetensors"), ARGS("train", "--resume", "--out", "cut"));
}

// --resume needs only --out: what the run was started from may be gone
static void test_resume_alone(void) {
    make_model("model", SMALL);
    give_tokenizer("model");
    char* words = text("%s", "a text of a few words to be learnt\n");
    for (int i = 0; i < 4; i++) words = text("%s%s", words, words);
    put_text("text.txt", words);
    rename("model/tokenizer.json", "tokenizer.json");
    RUN_WELL("train", "--model", "model", "--tokenizer", "tokenizer.json", "--data", "text.txt", "--out", "out",
             "--steps", "2", "--batch", "2", "--seq", "16", "--checkpoint-every", "1");
    remove_folder(step_folder("out", 2));
    remove_folder("model");
    remove("tokenizer.json");
    RUN_WELL("train", "--resume", "--out", "out");
    expect_whole("out", 2, true);
}

static void pause_ms(double ms) {
    struct timespec t = { (time_t)(ms / 1000), (long)(fmod(ms, 1000) * 1e6) };
    nanosleep(&t, NULL);
}

static bool alive(Process p) {
    siginfo_t info = { 0 };
    return waitid(P_PID, (id_t)p.pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0;
}

// waits, for 20 seconds at most, until the log has so many lines
static bool wait_for_lines(Process p, const char* path, int lines) {
    for (int i = 0; i < 10000; i++) {
        if (exists(path)) {
            size_t n;
            char* bytes = file_bytes(path, &n);
            int found = count_lines(bytes);
            free(kept[--n_kept]);
            if (found >= lines) return true;
        }
        if (!alive(p)) return false;
        pause_ms(2);
    }
    return false;
}

static void test_interrupt(void) {
    make_model_and_data();
    const int signals[] = { SIGINT, SIGTERM };
    for (int i = 0; i < 2; i++) {
        const char* out = text("out%d", i);
        Process p = start(AS_USUAL, ARGS(TRAIN(out, "--steps", "100000", "--checkpoint-every", "100000", "--eval-every",
                                               "0", "--sample-every", "0")));
        expect(wait_for_lines(p, text("%s/log.jsonl", out), 3), "no three steps in 20 s");
        kill(p.pid, signals[i]);
        Result r = finish(p);
        bool ended = signals[i] == SIGINT ? r.code == 130 : r.code == 130 || r.code == 143;
        expect(ended, "signal %d: exit %d: %s", signals[i], r.code, r.err);
        expect(!contains(r.err, "error: "), "signal %d: %s", signals[i], r.err);
        int newest, n = checkpoints(out, &newest);
        size_t last_line = 0, size;
        char* log = file_bytes(text("%s/log.jsonl", out), &size);
        for (size_t j = 0; j + 1 < size; j++)
            if (log[j] == '\n') last_line = j + 1;
        int step = -1;
        bool logged = sscanf(log + last_line, "{\"step\": %d", &step) == 1; // with a space or without
        expect(logged && n == 1 && newest == step && step >= 3,
               "signal %d: %d checkpoints, the newest of step %d; the log ends: %s", signals[i], n, newest,
               log + last_line);
        if (n != 1) continue;
        expect_whole(out, newest, false);
        // it goes on from there, as if nothing had been
        RUN_WELL("train", "--resume", "--out", out, "--steps", text("%d", newest + 3));
        int after;
        checkpoints(out, &after);
        expect(after == newest + 3, "resumed at %d for 3 steps: newest checkpoint %d", newest, after);
    }
    // where no weights are wanted, none are written
    Process p =
        start(AS_USUAL, ARGS(TRAIN("none", "--steps", "100000", "--checkpoint-every", "0", "--eval-every", "0")));
    expect(wait_for_lines(p, "none/log.jsonl", 2), "no two steps in 20 s");
    kill(p.pid, SIGINT);
    Result r = finish(p);
    expect(r.code == 130 && !contains(tree("none"), "safetensors"), "--checkpoint-every 0 and SIGINT: exit %d: %s",
           r.code, tree("none"));
}

// twenty times SIGKILL, at random moments of a run that does little but write checkpoints: there is always a whole one,
// the run goes on from it, and ends as if nothing had been
static void test_kill(void) {
    enum { KILLS = 20, STEPS = 100 };
    make_model_and_data();
#define KILLED(out)                                                                                                    \
    TRAIN(out, "--steps", text("%d", STEPS), "--checkpoint-every", "1", "--keep", "2", "--eval-every", "0")
    RUN_WELL(KILLED("whole"));
    int kills = 0, before = -1, newest = -1;
    uint64_t draw = 0;
    for (int attempt = 0; kills < KILLS && attempt < 3 * KILLS; attempt++) {
        Process p = before < 0 ? start(AS_USUAL, ARGS(KILLED("out")))
                               : start(AS_USUAL, ARGS("train", "--resume", "--out", "out"));
        double waited = 0; // until this run has written a checkpoint
        for (; waited < 20000 && alive(p) && newest <= before; waited += 0.2, pause_ms(0.2))
            checkpoints("out", &newest);
        pause_ms(15 * random_uniform(1, 2, draw++));
        if (!expect(alive(p), "a run ended before it was killed")) {
            Result r = finish(p);
            expect(false, "exit %d: %s", r.code, r.err);
            return;
        }
        kill(p.pid, SIGKILL);
        Result r = finish(p);
        expect(r.code == -SIGKILL, "exit %d before the kill: %s", r.code, r.err);
        kills++;
        int n = checkpoints("out", &newest);
        expect(n >= 1 && newest > before, "kill %d: %d checkpoints, newest %d", kills, n, newest);
        expect_whole("out", newest, false);
        if (complaints) return;
        before = newest;
        if (before >= STEPS - 8) { // start over, so that every kill meets a run at work
            remove_folder("out");
            before = newest = -1;
        }
    }
    expect(kills == KILLS, "only %d kills", kills);
    if (before < 0) RUN_WELL(KILLED("out"));
    RUN_WELL("train", "--resume", "--out", "out");
    expect_same_losses("whole", "out", STEPS);
    expect_same_checkpoint("whole", "out", STEPS);
    int n = checkpoints("out", &newest);
    expect(n == 2 && !contains(listing("out"), "tmp"), "after the kills:%s", listing("out"));
}

// ---- what is learnt --------------------------------------------------------------------------

// the mean loss of the last five of n steps
static double final_loss(const char* out, int n) {
    const Log* log = read_log(out);
    double sum = 0;
    for (int s = n - 4; s <= n; s++) sum += log->train_loss[s] / 5;
    return sum;
}

#define LEARN(data, out, ...)                                                                                          \
    "train", "--model", "model", "--data", data, "--out", out, "--batch", "4", "--seq", "64", "--lr", "0.01",          \
        "--steps", "80", "--checkpoint-every", "0", "--eval-every", "0", "--sample-every", "0", __VA_ARGS__

static void test_loss_falls(void) {
    make_model_and_data(); // three in four ids follow from the one before: at best 0.75 * log(4/3) + 0.25 * log(4 * 256)
    Result r = RUN_WELL(LEARN("data.bin", "out", "--warmup", "5"));
    double first = read_log("out")->train_loss[1], last = final_loss("out", 80);
    expect(first > 5 && last < 4.2, "loss %f at first, %f after 80 steps", first, last);
    expect(contains(r.err, "tok/s") || contains(r.out, "tok/s"), "steps print no tok/s: %s%s", r.err, r.out);
}

static void test_text_documents(void) {
    make_model("model", SMALL);
    give_tokenizer("model");
    const char* lines = text("%s", "");
    for (int i = 0; i < 60; i++)
        lines = text("%s{\"text\": \"the quick brown fox \\u00e9 jumps over the lazy dog\", \"id\": %d}\n", lines, i);
    put_text("docs.jsonl", lines);
    RUN_WELL(LEARN("docs.jsonl", "out", "--val", "docs.jsonl"));
    expect(final_loss("out", 80) < 0.3, "one document said again and again: loss %f after 80 steps",
           final_loss("out", 80));
}

// the user's letters are random and cannot be learnt, the answer is always the same: the loss is that of the answer
static void test_chats(void) {
    make_model("model", SMALL);
    give_tokenizer("model");
    const char* lines = text("%s", "");
    for (int i = 0; i < 200; i++) {
        char letters[17] = { 0 };
        for (int j = 0; j < 16; j++) letters[j] = (char)('a' + random_bits(3, (uint64_t)i, (uint64_t)j) % 26);
        lines = text("%s{\"messages\": [{\"role\": \"user\", \"content\": \"%s\"}, {\"role\": \"assistant\", "
                     "\"content\": \"A\"}]}\n",
                     lines, letters);
    }
    put_text("chats.jsonl", lines);
    RUN_WELL(LEARN("chats.jsonl", "out", "--val", "chats.jsonl"));
    // with the user's tokens in it, it could not be below 16 log(26) / 41 = 1.27
    expect(final_loss("out", 80) < 0.4, "chats: loss %f after 80 steps", final_loss("out", 80));
    // and in a talk it answers just that, then waits
    RUN_WELL("train", "--model", "model", "--data", "chats.jsonl", "--out", "chatty", "--batch", "4", "--seq", "64",
             "--lr", "0.01", "--steps", "60");
    const How talk = { .input = "hello\nanything else?\n" };
    Result r = well(finish(start(talk, ARGS("chat", "--model", "chatty", "--temperature", "0"))));
    expect(strcmp(r.out, "A\nA\n") == 0, "chat: %s", r.out);
}

// too little to validate on: no loss is made up
static void test_no_validation(void) {
    make_model("model", SMALL);
    make_data("data.bin", 24); // one token of them is held out
    Result r = RUN("train", "--model", "model", "--data", "data.bin", "--out", "out", "--batch", "1", "--seq", "8",
                   "--steps", "2", "--eval-every", "1");
    expect(r.code == 0 || r.code == 1, "exit %d: %s", r.code, r.err);
    if (r.code == 0) expect(read_log("out")->n_val == 0, "one held-out token, and a validation loss: %s", r.err);
    if (r.code == 1) expect_error(r, WORDS("data.bin"));
}

// nothing given at all
static void test_embedded(void) {
    Result r = RUN_WELL("train", "--steps", "2", "--batch", "1", "--seq", "32", "--eval-steps", "2");
    expect_whole("out", 2, true);
    expect(*r.err || *r.out, "train prints nothing");
    r = well(RUN("info", "--model", "out"));
    expect(contains(r.out, "820,992") || contains(r.out, "820992"), "the embedded default is not tiny: %s", r.out);
}

int main(int argc, char** argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]); // those alone: a name, with * and ?
    const struct CMUnitTest tests[] = {
        TEST(test_checkpoint_files),
        TEST(test_checkpoint_with_tokenizer),
        TEST(test_keep),
        TEST(test_no_checkpoints),
        TEST(test_steps_0),
        TEST(test_numbered_sibling),
        TEST(test_threads),
        TEST(test_side_shows),
        TEST(test_accumulation),
        TEST(test_skip_outliers),
        TEST(test_resume),
        TEST(test_resume_further),
        TEST(test_resume_alone),
        TEST(test_interrupt),
        TEST(test_kill),
        TEST(test_loss_falls),
        TEST(test_text_documents),
        TEST(test_chats),
        TEST(test_no_validation),
        TEST(test_embedded),
    };
    return cmocka_run_group_tests(tests, open_group, NULL);
}
