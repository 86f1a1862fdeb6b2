/*
Checkpoints survive what runs meet: a kill at any moment, a full disk, a folder that cannot be written.

A checkpoint here is three small files whose bytes follow from the step, so that "whole" can be checked to the byte.
*/
#define _GNU_SOURCE // unshare
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

#include "test.h"
#include "llmc/checkpoint.h"
#include "llmc/random.h"

enum { FILES = 3, BYTES = 9000 };

static char scratch[PATH_SIZE]; // a folder of this test's own

static int set_up(void** state) {
    (void)state;
    const char* tmp = getenv("TMPDIR");
    snprintf(scratch, sizeof scratch, "%s/test_checkpoint.XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(scratch) ? 0 : -1;
}

static int tear_down(void** state) {
    (void)state;
    Error err;
    return remove_all(scratch, &err) ? 0 : -1;
}

static const char* in_scratch(const char* name) {
    static char path[2][PATH_SIZE];
    static int turn = 0;
    turn = !turn;
    Error err;
    assert_true(path_join(path[turn], scratch, name, &err));
    return path[turn];
}

static void fill(uint8_t* bytes, int64_t step, int file, int version) {
    for (int i = 0; i < BYTES; i++)
        bytes[i] = (uint8_t)random_bits((uint64_t)step, (uint64_t)file, (uint64_t)(i + version * BYTES));
}

static bool save(const char* out, int64_t step, int version, int keep, Error* err) {
    Checkpoint c;
    bool ok = checkpoint_begin(&c, out, step, err);
    for (int f = 0; f < FILES && ok; f++) {
        char path[PATH_SIZE], name[32];
        uint8_t bytes[BYTES];
        snprintf(name, sizeof name, "file-%d", f);
        fill(bytes, step, f, version);
        ok = path_join(path, c.path, name, err) && write_file(path, bytes, BYTES, err);
    }
    ok = ok && checkpoint_commit(&c, keep, err);
    if (!ok) checkpoint_abandon(&c);
    return ok;
}

// whether the folder holds all files of one version of the step
static bool whole(const char* folder, int64_t step, int versions) {
    for (int version = 0; version < versions; version++) {
        int good = 0;
        for (int f = 0; f < FILES; f++) {
            char path[PATH_SIZE], name[32], *text;
            uint8_t bytes[BYTES];
            size_t n;
            Error err;
            snprintf(name, sizeof name, "file-%d", f);
            fill(bytes, step, f, version);
            if (!path_join(path, folder, name, &err) || !read_file(path, &text, &n, 1 << 20, &err)) continue;
            good += n == BYTES && memcmp(text, bytes, n) == 0;
            free(text);
        }
        if (good == FILES) return true;
    }
    return false;
}

// every step-… folder of out is whole; returns how many there are
static size_t check_all_whole(const char* out, int versions) {
    int64_t* steps;
    size_t n = checkpoint_list(out, &steps);
    for (size_t i = 0; i < n; i++) {
        char path[PATH_SIZE];
        Error err;
        assert_true(checkpoint_path(path, out, "", steps[i], &err));
        if (!whole(path, steps[i], versions)) test_fail("%s is not whole", path);
    }
    free(steps);
    return n;
}

static size_t count_entries(const char* folder, const char* prefix) {
    size_t n = 0;
    DIR* d = opendir(folder);
    for (struct dirent* e; d && (e = readdir(d));)
        n += e->d_name[0] != 0 && strncmp(e->d_name, prefix, strlen(prefix)) == 0;
    if (d) closedir(d);
    return n;
}

static void test_keep(void** state) {
    (void)state;
    const char* out = in_scratch("keep");
    char path[PATH_SIZE];
    int64_t step;
    Error err;
    assert_false(checkpoint_latest(out, path, sizeof path, &step, &err));
    for (int s = 1; s <= 5; s++) assert_true(save(out, s * 100, 0, 0, &err));
    assert_int_equal(check_all_whole(out, 1), 5); // 0 keeps all
    assert_true(save(out, 600, 0, 2, &err));
    assert_int_equal(check_all_whole(out, 1), 2);
    assert_true(folder_has(out, "step-00000500") && folder_has(out, "step-00000600"));
    assert_true(checkpoint_latest(out, path, sizeof path, &step, &err));
    assert_int_equal(step, 600);
    assert_string_equal(path + strlen(path) - 13, "step-00000600");
    assert_true(save(out, 300, 0, 1, &err)); // older than what is there, but the one just written stays
    assert_int_equal(check_all_whole(out, 1), 1);
    assert_true(folder_has(out, "step-00000300"));
    assert_int_equal(count_entries(out, ".tmp"), 0);
}

static void test_same_step_again(void** state) {
    (void)state;
    const char* out = in_scratch("again");
    char path[PATH_SIZE];
    Error err;
    assert_true(save(out, 7, 0, 3, &err));
    assert_true(save(out, 7, 1, 3, &err));
    assert_true(checkpoint_path(path, out, "", 7, &err));
    assert_false(whole(path, 7, 1));
    assert_true(whole(path, 7, 2));
    assert_int_equal(count_entries(out, ".tmp"), 0);
    assert_int_equal(count_entries(out, "step-"), 1);
}

static void test_names(void** state) {
    (void)state;
    assert_int_equal(checkpoint_step("step-00000100"), 100);
    assert_int_equal(checkpoint_step("step-123456789"), 123456789);
    const char* wrong[] = { "step-1",        "step-",         "step-00000100x", ".tmp-step-00000100",
                            "step--0000100", "step-0000010 ", "log.jsonl",      "step-99999999999999999999999" };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) assert_int_equal(checkpoint_step(wrong[i]), -1);
}

static void test_resolve(void** state) {
    (void)state;
    char path[PATH_SIZE];
    Error err;
    const char* run = in_scratch("resolve");
    assert_false(checkpoint_resolve(run, path, sizeof path, &err));
    assert_non_null(strstr(err.text, "no such folder"));
    assert_true(make_folders(run, &err));
    assert_false(checkpoint_resolve(run, path, sizeof path, &err));
    assert_non_null(strstr(err.text, "config.json"));
    assert_non_null(strstr(err.text, "step-"));
    assert_true(save(run, 9, 0, 0, &err) && save(run, 10, 0, 0, &err));
    assert_true(checkpoint_resolve(run, path, sizeof path, &err));
    assert_non_null(strstr(path, "step-00000010"));
    char config[PATH_SIZE];
    assert_true(path_join(config, run, "config.json", &err) && write_file(config, "{}", 2, &err));
    assert_true(checkpoint_resolve(run, path, sizeof path, &err));
    assert_string_equal(path, run);
    assert_false(checkpoint_resolve(run, path, 8, &err)); // does not fit
}

static void test_output_folder(void** state) {
    (void)state;
    char path[PATH_SIZE], wanted[PATH_SIZE], slash[PATH_SIZE + 1], file[PATH_SIZE];
    Error err;
    snprintf(wanted, sizeof wanted, "%s", in_scratch("out"));
    snprintf(slash, sizeof slash, "%s/", wanted);
    assert_true(output_folder(wanted, path, sizeof path, &err));
    assert_string_equal(path, wanted);
    assert_false(file_exists(path)); // nothing is made
    assert_true(make_folders(wanted, &err) && path_join(file, wanted, "notes.txt", &err) &&
                write_file(file, "x", 1, &err));
    assert_true(output_folder(wanted, path, sizeof path, &err));
    assert_string_equal(path, wanted); // other files are no hindrance
    assert_true(save(wanted, 1, 0, 0, &err));
    assert_true(output_folder(slash, path, sizeof path, &err));
    assert_string_equal(path, in_scratch("out-2"));
    assert_true(make_folders(path, &err) && path_join(file, path, "log.jsonl", &err) && write_file(file, "", 0, &err));
    assert_true(output_folder(wanted, path, sizeof path, &err));
    assert_string_equal(path, in_scratch("out-3"));
}

// a child writes checkpoints without end, each step twice; twenty times it is killed somewhere inside
static void test_killed(void** state) {
    (void)state;
    char out[PATH_SIZE];
    snprintf(out, sizeof out, "%s", in_scratch("killed"));
    int64_t last = 0;
    size_t interrupted = 0;
    Error err;
    for (int round = 0; round < 20; round++) {
        assert_true(
            save(out, last + 1, 0, 2, &err)); // so that there is one to survive, and the leavings of a kill are cleared
        assert_int_equal(count_entries(out, ".tmp"), 0);
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            for (int64_t step = last + 2;; step++)
                if (!save(out, step, 0, 2, &err) || !save(out, step, 1, 2, &err)) _exit(1);
        }
        struct timespec pause = { 0, (long)(random_bits(1, 2, (uint64_t)round) % 40000000) };
        nanosleep(&pause, NULL);
        int status;
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        assert_true(WIFSIGNALED(status)); // it had not ended by an error of its own
        interrupted += count_entries(out, ".tmp") > 0;
        size_t n = check_all_whole(out, 2);
        assert_true(n >= 1 && n <= 3);
        char path[PATH_SIZE];
        int64_t step;
        assert_true(checkpoint_latest(out, path, sizeof path, &step, &err));
        assert_true(step >= last + 1);
        last = step;
    }
    if (interrupted == 0) test_fail("no kill fell into the writing of a checkpoint: this run has proved nothing");
}

// an error in the middle of a checkpoint names the file, leaves nothing of it, and the one before is whole
static void check_failed_save(const char* out, const char* expected) {
    Error err = { "" };
    assert_false(save(out, 2, 0, 1, &err));
    if (!strstr(err.text, expected) || !strstr(err.text, out))
        test_fail("\"%s\": expected %s and %s", err.text, expected, out);
    assert_int_equal(check_all_whole(out, 1), 1);
    assert_true(folder_has(out, "step-00000001"));
    assert_int_equal(count_entries(out, ".tmp"), 0);
}

enum { CANNOT = 77 }; // what a child exits with when this machine does not let it set the stage

// in a child, whose limits, mounts and user end with it
static void in_child(void (*body)(void), const char* needs) {
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        setenv("CMOCKA_TEST_ABORT", "1", 1); // an assertion that fails here must not go on to the next test
        body();
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == CANNOT) {
        print_message("skipped: needs %s\n", needs);
        skip();
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) test_fail("the child failed: status %d", status);
}

// files may grow to 5000 bytes only: the write fails half-way, wherever the test runs
static void file_limit(void) {
    Error err;
    const char* out = in_scratch("limit");
    assert_true(save(out, 1, 0, 1, &err));
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = { 5000, 5000 };
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    check_failed_save(out, "File too large");
}

static void test_file_limit(void** state) {
    (void)state;
    in_child(file_limit, "");
}

// a file system with room for one checkpoint and a half
static void full_disk(void) {
    Error err;
    const char* out = in_scratch("full");
    assert_true(make_folders(out, &err));
    if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
        mount("tmpfs", out, "tmpfs", 0, "size=60k") != 0)
        _exit(CANNOT);
    assert_true(save(out, 1, 0, 1, &err));
    check_failed_save(out, "No space left on device");
}

static void test_full_disk(void** state) {
    (void)state;
    in_child(full_disk, "the right to mount a small tmpfs");
}

static void read_only(void) {
    Error err;
    const char* out = in_scratch("read-only");
    assert_true(save(out, 1, 0, 1, &err));
    assert_true(chmod(scratch, 0755) == 0 && chmod(out, 0555) == 0);
    if (geteuid() == 0 && setuid(65534) != 0) _exit(CANNOT); // root may write anywhere: be nobody
    if (access(out, W_OK) == 0) _exit(CANNOT);
    check_failed_save(out, "Permission denied");
}

static void test_read_only(void** state) {
    (void)state;
    in_child(read_only, "a user who is refused");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keep),       cmocka_unit_test(test_same_step_again), cmocka_unit_test(test_names),
        cmocka_unit_test(test_resolve),    cmocka_unit_test(test_output_folder),   cmocka_unit_test(test_killed),
        cmocka_unit_test(test_file_limit), cmocka_unit_test(test_full_disk),       cmocka_unit_test(test_read_only),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
