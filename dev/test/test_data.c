/*
Token streams: what a training run sees, in which order, and what bad data says. Also the random numbers that order them.

Most tests number their tokens 0, 1, 2 …, so that a window shows by its ids where it was cut. Files lie in a folder of
their own, removed at the end.
*/
#include <fcntl.h>
#include <math.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "test.h"
#include "llmc/data.h"
#include "llmc/hellaswag.h"

static char folder[] = "/tmp/test_data_XXXXXX";
static Tokenizer bytes_tokenizer;
static Error err;

static int set_up(void** state) {
    (void)state;
    tokenizer_bytes(&bytes_tokenizer);
    return mkdtemp(folder) ? 0 : -1;
}

static int tear_down(void** state) {
    (void)state;
    tokenizer_close(&bytes_tokenizer);
    char command[100];
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command);
}

// the path of a file in the test's folder; valid until eight calls later
static const char* path_of(const char* name) {
    static char paths[8][4096];
    static int next;
    char* path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static const char* put_file(const char* name, const void* data, size_t n) {
    const char* path = path_of(name);
    FILE* file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, n, file), n);
    fclose(file);
    return path;
}

static const char* put_text(const char* name, const char* text) { return put_file(name, text, strlen(text)); }

// a token file of n ids first, first + 1 …, written here from the format's description
static const char* put_bin(const char* name, bool wide, uint32_t first, uint32_t n) {
    uint32_t header[256] = { wide ? 20240801 : 20240520, wide ? 7 : 1, n };
    uint8_t* file = allocate(1024 + 4 * (size_t)n, 1);
    memcpy(file, header, 1024);
    for (uint32_t i = 0; i < n; i++)
        for (int b = 0; b < (wide ? 4 : 2); b++)
            file[1024 + i * (wide ? 4 : 2) + b] = (uint8_t)((first + i) >> (8 * b));
    const char* path = put_file(name, file, 1024 + (wide ? 4 : 2) * (size_t)n);
    free(file);
    return path;
}

static Data open_data(const char* path, int V) {
    Data d;
    if (!data_open(&d, path, &bytes_tokenizer, V, &err)) test_fail("%s", err.text);
    return d;
}

// opening must fail with one line that contains every one of the words, up to NULL
static void expect_error(const char* path, Tokenizer* t, int V, ...) {
    Data d;
    if (data_open(&d, path, t, V, &err)) test_fail("%s was opened", path);
    assert_null(strchr(err.text, '\n'));
    va_list words;
    va_start(words, V);
    for (const char* word; (word = va_arg(words, const char*));)
        if (!strstr(err.text, word)) test_fail("expected '%s' in: %s", word, err.text);
    va_end(words);
    Data closed = { 0 };
    assert_memory_equal(&d, &closed, sizeof d);
}

// ---- random numbers --------------------------------------------------------------------------

static void test_uniform(void** state) {
    (void)state;
    enum { N = 1000000, BINS = 64 };
    double sum = 0, squares = 0, lag = 0, before = 0.5, chi = 0;
    int count[BINS] = { 0 };
    for (uint64_t i = 0; i < N; i++) {
        double u = (double)random_uniform(3, 5, i);
        assert_true(u >= 0 && u < 1);
        sum += u, squares += u * u, lag += (u - 0.5) * (before - 0.5), before = u;
        count[(int)(u * BINS)]++;
    }
    for (int b = 0; b < BINS; b++) chi += pow(count[b] - (double)N / BINS, 2) / ((double)N / BINS);
    assert_true(fabs(sum / N - 1.0 / 2) < 5 * sqrt(1.0 / 12 / N)); // five standard deviations of each estimate
    assert_true(fabs(squares / N - 1.0 / 3) < 5 * sqrt(4.0 / 45 / N));
    assert_true(fabs(lag / N) < 5 / 12.0 / sqrt(N));
    assert_true(chi < 63 + 5 * sqrt(2 * 63));
}

static void test_normal(void** state) {
    (void)state;
    enum { N = 1000000 };
    double moment[5] = { 0 }, between_streams = 0;
    for (uint64_t i = 0; i < N; i++) {
        double x = (double)random_normal(3, 5, i);
        assert_true(fabs(x) <= 6);
        for (int k = 1; k <= 4; k++) moment[k] += pow(x, k) / N;
        between_streams += x * (double)random_normal(3, 6, i) / N;
    }
    assert_true(fabs(moment[1]) < 5e-3);
    assert_true(fabs(moment[2] - 1) < 5 * sqrt(2.0 / N));
    assert_true(fabs(moment[3]) < 5 * sqrt(15.0 / N));
    assert_true(fabs(moment[4] - 2.9) < 5 * sqrt(96.0 / N)); // 3 - 6 / (5 * 12), of twelve uniforms
    assert_true(fabs(between_streams) < 5e-3);
}

// every n up to 300, and some around powers of two: nothing is missed, nothing comes twice
static void test_permute(void** state) {
    (void)state;
    for (uint64_t n = 1; n < 70000; n = n < 300 ? n + 1 : n * 3 + 1) {
        uint8_t* seen = allocate(n, 1);
        uint64_t same = 0, in_place = 0;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t to = random_permute(7, 1, n, i);
            assert_true(to < n);
            assert_false(seen[to]++);
            same += to == random_permute(7, 2, n, i), in_place += to == i;
        }
        if (n >= 100) assert_true(same < 12 && in_place < 12); // one is expected of each
        free(seen);
    }
    const uint64_t large = ((uint64_t)1 << 40) + 1;
    for (uint64_t i = 0; i < 1000; i++) assert_true(random_permute(7, 1, large, large - 1 - i) < large);
}

// ---- .bin ------------------------------------------------------------------------------------

static void test_bin(void** state) {
    (void)state;
    for (int wide = 0; wide < 2; wide++) {
        int V = wide ? 128256 : 65536;
        uint32_t first = wide ? 128000 : 65000;
        Data d = open_data(put_bin("a.bin", wide, first, 100), V);
        int32_t ids[99], labels[99];
        assert_int_equal(data_tokens(&d), 100);
        assert_int_equal(data_eval_window(&d, ids, labels, 99, 0), 99);
        for (int i = 0; i < 99; i++) {
            assert_int_equal(ids[i], first + i);
            assert_int_equal(labels[i], first + i + 1);
        }
        data_close(&d);
    }
}

// what is written is byte for byte the file that the format describes, and nothing else is left in the folder
static void test_write_bin(void** state) {
    (void)state;
    enum { N = 10000 };
    int32_t* ids = allocate(N, sizeof *ids);
    for (int i = 0; i < N; i++) ids[i] = 50000 + i;
    const int vocabularies[] = { 60000, 65536, 65537, 128256 };
    for (int v = 0; v < 4; v++) {
        if (!data_write_bin(path_of("written.bin"), ids, N, vocabularies[v], &err)) test_fail("%s", err.text);
        Map got, want;
        assert_true(map_file(&got, path_of("written.bin"), &err));
        assert_true(map_file(&want, put_bin("wanted.bin", v >= 2, 50000, N), &err));
        assert_int_equal(got.size, want.size);
        assert_memory_equal(got.data, want.data, want.size);
        unmap_file(&got), unmap_file(&want);
    }
    assert_int_not_equal(access(path_of("written.bin.tmp"), F_OK), 0);
    assert_false(data_write_bin(path_of("no/such.bin"), ids, N, 60000, &err));
    free(ids);
}

static void test_bad_bin(void** state) {
    (void)state;
    Tokenizer* none = NULL; // .bin files need no tokenizer
    uint32_t file[256 + 4] = { 20240801, 7, 4 };
    file[256] = 1, file[257] = 300, file[258] = 2, file[259] = 3;
    put_file("x.bin", file, sizeof file);
    Data d;
    assert_true(data_open(&d, path_of("x.bin"), none, 301, &err));
    data_close(&d);
    expect_error(path_of("x.bin"), none, 300, "x.bin", "token 1 is 300", "299", NULL);
    file[259] = 0x80000001; // not to be taken for a masked token
    expect_error(put_file("x.bin", file, sizeof file), none, 1 << 27, "token 3 is 2147483649", NULL);
    expect_error(put_file("x.bin", file, sizeof file - 1), none, 400, "15 bytes", "4 tokens of 4 bytes", NULL);
    file[2] = 3;
    expect_error(put_file("x.bin", file, sizeof file), none, 400, "16 bytes", "3 tokens of 4 bytes", NULL);
    file[2] = 4;
    expect_error(put_file("x.bin", file, 1024), none, 400, "0 bytes", "4 tokens", NULL);
    expect_error(put_file("x.bin", file, 1023), none, 400, "1023 bytes", "1024", NULL);
    expect_error(put_file("x.bin", file, 0), none, 400, "0 bytes", NULL);
    file[1] = 1;
    expect_error(put_file("x.bin", file, sizeof file), none, 400, "version 1, expected 7", NULL);
    file[0] = 20240520, file[1] = 2;
    expect_error(put_file("x.bin", file, sizeof file), none, 400, "version 2, expected 1", NULL);
    file[0] = 1234;
    expect_error(put_file("x.bin", file, sizeof file), none, 400, "not a token file", "1234", "20240520", NULL);
    expect_error(put_bin("x.bin", false, 0, 0), none, 400, "no tokens", NULL);
    expect_error(put_bin("x.bin", true, 5, 1), none, 400, "one token", NULL);
    expect_error(put_bin("x.bin", false, 0, 257), none, 256, "token 256 is 256", NULL);
    expect_error(put_bin("x.bin", false, 65526, 10), none, 65535, "token 9 is 65535", NULL);
}

// ---- windows and their order -----------------------------------------------------------------

// opens four shards of 40, 0, 1 and 23 tokens that begin at 100, 200, 300, 400; windows of 7: 5 + 0 + 0 + 3, the last ones
// of both shards whole or partial
static Data open_shards(void) {
    const uint32_t sizes[] = { 40, 0, 1, 23 };
    char name[32];
    for (uint32_t s = 0; s < 4; s++) {
        snprintf(name, sizeof name, "shard%u.bin", s);
        put_bin(name, s % 2, 100 * (s + 1), sizes[s]);
    }
    return open_data(path_of("shard*.bin"), 1000);
}

// a window of whole length, all labels known, that starts at a multiple of T from the beginning of its shard; returns where
static int check_window(const int32_t* ids, const int32_t* labels, int T) {
    int shard = ids[0] / 100, start = ids[0] % 100;
    assert_true(shard == 1 || shard == 4);
    assert_int_equal(start % T, 0);
    for (int t = 0; t < T; t++) {
        assert_int_equal(ids[t], shard * 100 + start + t);
        assert_int_equal(labels[t], ids[t] + 1);
    }
    assert_true(start + T < (shard == 1 ? 40 : 23));
    return ids[0];
}

static void test_epochs(void** state) {
    (void)state;
    enum { T = 7, WINDOWS = 8, EPOCHS = 50 };
    Data d = open_shards();
    assert_int_equal(data_tokens(&d), 64);
    assert_int_equal(data_windows(&d, T), WINDOWS);
    int32_t ids[T], labels[T], order[EPOCHS][WINDOWS];
    int moved = 0, same_order = 0;
    for (uint64_t e = 0; e < EPOCHS; e++) {
        uint8_t seen[500] = { 0 };
        for (uint64_t w = 0; w < WINDOWS; w++) {
            data_batch(&d, ids, labels, 1, T, 11, e * WINDOWS + w);
            order[e][w] = check_window(ids, labels, T);
            assert_false(seen[order[e][w]]++); // eight of eight, none twice: each once an epoch
            data_batch(&d, ids, labels, 1, T, 12, e * WINDOWS + w);
            moved += ids[0] != order[e][w];
        }
        same_order += e > 0 && memcmp(order[e], order[e - 1], sizeof order[e]) == 0;
    }
    assert_true(moved > EPOCHS * WINDOWS / 2); // another seed, another order
    assert_int_equal(same_order, 0);
    data_close(&d);
}

// any cutting of the endless sequence into batches gives the same rows: a run that resumes at its position goes on exactly
static void test_resume(void** state) {
    (void)state;
    enum { T = 5, ROWS = 60 };
    Data d = open_shards();
    int32_t ids[ROWS * T], labels[ROWS * T], again[ROWS * T], labels_again[ROWS * T];
    data_batch(&d, ids, labels, ROWS, T, 3, 1000000000000);
    for (int B = 1; B <= ROWS; B++) {
        if (ROWS % B) continue;
        for (int r = 0; r < ROWS; r += B) {
            // nothing but the position is remembered
            Data other = open_shards();
            if (r % 2) data_eval_windows(&other, 9), data_windows(&other, 3); // another T in between does no harm
            data_batch(&other, again + r * T, labels_again + r * T, B, T, 3, 1000000000000 + (uint64_t)r);
            data_close(&other);
        }
        assert_memory_equal(ids, again, sizeof ids);
        assert_memory_equal(labels, labels_again, sizeof labels);
    }
    data_close(&d);
}

// each token but a shard's first is predicted exactly once, from the token before it
static void test_eval_windows(void** state) {
    (void)state;
    Data d = open_shards();
    for (int T = 1; T <= 50; T++) {
        int32_t ids[50], labels[50];
        int seen[500] = { 0 };
        uint64_t windows = data_eval_windows(&d, T);
        assert_int_equal(windows, (39 + T - 1) / T + (22 + T - 1) / T);
        for (uint64_t w = 0; w < windows; w++) {
            int n = data_eval_window(&d, ids, labels, T, w);
            assert_in_range(n, 1, T);
            for (int t = 0; t < n; t++) {
                assert_int_equal(labels[t], ids[t] + 1);
                seen[labels[t]]++;
            }
            for (int t = n; t < T; t++) assert_true(ids[t] == 0 && labels[t] == IGNORED_LABEL);
        }
        for (int i = 0; i < 500; i++) assert_int_equal(seen[i], (i > 100 && i < 140) || (i > 400 && i < 423));
        assert_int_equal(data_eval_window(&d, ids, labels, T, windows), 0);
        assert_int_equal(data_eval_window(&d, ids, labels, T, UINT64_MAX), 0);
        for (int t = 0; t < T; t++) assert_true(ids[t] == 0 && labels[t] == IGNORED_LABEL);
    }
    data_close(&d);
}

// notes every token that any window of d reads or predicts
static void note_tokens(Data* d, int T, int* seen) {
    int32_t ids[64], labels[64];
    for (uint64_t w = 0; w < data_windows(d, T); w++) {
        data_batch(d, ids, labels, 1, T, 1, w);
        for (int t = 0; t < T; t++) seen[ids[t]] = seen[labels[t]] = 1;
    }
}

static void test_split(void** state) {
    (void)state;
    for (int held = 0; held <= 64; held++) {
        Data train = open_shards(), val;
        assert_true(data_windows(&train, 1) == 61); // an index from before the split must not survive it
        data_split(&train, &val, (held + 0.5) / 64.5);
        int got = (int)data_tokens(&val), in_train[500] = { 0 }, in_val[500] = { 0 };
        assert_true(abs(got - held) <= 1);
        assert_int_equal(data_tokens(&train) + (uint64_t)got, 64);
        for (int T = 1; T < 40; T += 3) note_tokens(&train, T, in_train), note_tokens(&val, T, in_val);
        int last_train = 0, first_val = 500;
        for (int i = 0; i < 500; i++) {
            assert_false(in_train[i] && in_val[i]);
            if (in_train[i]) last_train = i;
            if (in_val[i] && i < first_val) first_val = i;
        }
        assert_true(last_train < first_val); // the tail is held out
        data_close(&val), data_close(&train);
    }
}

static void test_check_seq(void** state) {
    (void)state;
    Data d = open_data(put_bin("short.bin", false, 0, 50), 1000);
    assert_true(data_check_seq(&d, "--data", 49, &err));
    assert_false(data_check_seq(&d, "--data", 50, &err));
    assert_string_equal(err.text, "--data: 50 tokens, but --seq 50 needs 51; --seq 49 fits");
    data_close(&d);
    d = open_shards();
    assert_true(data_check_seq(&d, "--data", 39, &err));
    assert_false(data_check_seq(&d, "--data", 40, &err));
    assert_string_equal(err.text, "--data: 40 tokens in the longest shard, but --seq 40 needs 41; --seq 39 fits");
    data_close(&d);
}

// more shards than a process may have files open
static void test_many_shards(void** state) {
    (void)state;
    enum { SHARDS = 2000 };
    char name[32];
    for (int s = 0; s < SHARDS; s++) {
        snprintf(name, sizeof name, "many%04d.bin", s);
        put_bin(name, false, 10 * (uint32_t)s, 3 + s % 5); // 2 to 6 predictions
    }
    struct rlimit limit, low;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    low = limit, low.rlim_cur = 64;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
    Data d = open_data(path_of("many*.bin"), 65536);
    setrlimit(RLIMIT_NOFILE, &limit);
    assert_int_equal(data_windows(&d, 2), SHARDS / 5 * (1 + 1 + 2 + 2 + 3));
    for (uint64_t w = 0, s = 0; s < SHARDS; s++)
        for (uint64_t left = 2 + s % 5, t = 0; left; left -= left > 1 ? 2 : 1, t += 2, w++) {
            int32_t ids[2], labels[2];
            assert_int_equal(data_eval_window(&d, ids, labels, 2, w), left > 1 ? 2 : 1);
            assert_int_equal(ids[0], 10 * s + t);
        }
    data_close(&d);
}

// token numbers beyond 2^32: two sparse files of 2.2 and 2.3 thousand million tokens, marked at their ends
static void test_large(void** state) {
    (void)state;
    const uint32_t sizes[2] = { 2200000000u, 2300000000u };
    for (uint32_t s = 0; s < 2; s++) {
        char name[32];
        uint32_t header[256] = { 20240520, 1, sizes[s] };
        uint16_t marks[2] = { (uint16_t)(1000 + s), (uint16_t)(2000 + s) };
        snprintf(name, sizeof name, "large%u.bin", s);
        int fd = open(put_file(name, header, sizeof header), O_WRONLY);
        bool made = ftruncate(fd, 1024 + 2 * (off_t)sizes[s]) == 0 &&
                    pwrite(fd, marks, 4, 1024 + 2 * ((off_t)sizes[s] - 2)) == 4;
        close(fd);
        if (!made) {
            print_message("skipped: no room for a sparse file of 5 GB in /tmp\n");
            skip();
        }
    }
    Data d = open_data(path_of("large*.bin"), 65536);
    int32_t id, label;
    assert_int_equal(data_tokens(&d), 4500000000);
    assert_int_equal(data_windows(&d, 1), 4499999998);
    assert_int_equal(data_eval_window(&d, &id, &label, 1, 2199999998), 1);
    assert_true(id == 1000 && label == 2000);
    assert_int_equal(data_eval_window(&d, &id, &label, 1, 4499999997), 1);
    assert_true(id == 1001 && label == 2001);
    data_close(&d);
    unlink(path_of("large0.bin")), unlink(path_of("large1.bin"));
}

// ---- text ------------------------------------------------------------------------------------

// the ids of all of d, which must be one shard; -100 - id where it is masked. Owned by the caller
static int32_t* all_ids(const Data* d) {
    assert_int_equal(d->n_shards, 1);
    int32_t* ids = allocate(d->shards[0].n, sizeof *ids);
    for (uint64_t i = 0; i < d->shards[0].n; i++) {
        uint32_t token = shard_get(&d->shards[0], i);
        ids[i] = token & DATA_MASKED ? -100 - (int32_t)(token & ~DATA_MASKED) : (int32_t)token;
    }
    return ids;
}

static void check_ids(const Data* d, const int32_t* want, size_t n) {
    int32_t* ids = all_ids(d);
    for (size_t i = 0; i < n && i < data_tokens(d); i++)
        if (ids[i] != want[i]) test_fail("token %zu is %d, expected %d", i, ids[i], want[i]);
    assert_int_equal(data_tokens(d), n);
    free(ids);
}

static void test_text(void** state) {
    (void)state;
    const char text[] = "one\0two\xff\xfe three\r\n";
    int32_t want[sizeof text - 1];
    for (size_t i = 0; i < sizeof text - 1; i++) want[i] = (uint8_t)text[i];
    Data d = open_data(put_file("plain.txt", text, sizeof text - 1), 261);
    check_ids(&d, want, sizeof text - 1);
    data_close(&d);
    assert_true(data_text(&d, text, sizeof text - 1, &bytes_tokenizer, &err));
    check_ids(&d, want, sizeof text - 1);
    data_close(&d);
    expect_error(put_text("empty.txt", ""), &bytes_tokenizer, 261, "empty.txt", "no tokens", NULL);
    expect_error(put_text("one.txt", "x"), &bytes_tokenizer, 261, "one.txt", "one token", NULL);
    expect_error(path_of("plain.txt"), NULL, 261, "plain.txt", "tokenizer", NULL);
    expect_error(path_of("plain.txt"), &bytes_tokenizer, 200, "plain.txt", "token 7 is 255", "199", NULL);
    assert_false(data_text(&d, "", 0, &bytes_tokenizer, &err));
}

static void test_globs(void** state) {
    (void)state;
    put_text("g2.txt", "cd"), put_text("g1.txt", "ab"), put_text("g10.txt", ""), put_text("g[1].txt", "xyz");
    Data d = open_data(path_of("g?.txt"), 261); // several texts are packed end to end
    check_ids(&d, (int32_t[]){ 'a', 'b', 'c', 'd' }, 4);
    data_close(&d);
    d = open_data(path_of("g[1].txt"), 261); // a file of exactly that name comes first
    check_ids(&d, (int32_t[]){ 'x', 'y', 'z' }, 3);
    data_close(&d);
    unlink(path_of("g[1].txt"));
    d = open_data(path_of("g[1].txt"), 261);
    check_ids(&d, (int32_t[]){ 'a', 'b' }, 2);
    data_close(&d);
    put_bin("g3.bin", false, 0, 10);
    expect_error(path_of("g*"), &bytes_tokenizer, 261, "g1.txt", "g3.bin", "different kinds", NULL);
    expect_error(path_of("nothing*"), &bytes_tokenizer, 261, "nothing*", "no such file", NULL);
    expect_error(path_of("nothing.bin"), &bytes_tokenizer, 261, "nothing.bin", "no such file", NULL);
    expect_error(folder, &bytes_tokenizer, 261, folder, "not a regular file", NULL);
}

// text is tokenised a megabyte at a time; it must come out as if it were one piece. Returns the tokens of both
static void check_chunks(const char* text, size_t n, Tokenizer* t) {
    Tokens whole = { 0 };
    Data d;
    assert_true(tokenizer_encode(t, &whole, text, n, false, &err));
    assert_true(data_text(&d, text, n, t, &err));
    check_ids(&d, whole.ids, whole.n);
    data_close(&d);
    tokens_free(&whole);
}

static void test_cut(void** state) {
    (void)state;
    assert_int_equal(data_cut("ab cd", 5, 1), 2);
    assert_int_equal(data_cut("ab cd", 5, 2), 2);
    assert_int_equal(data_cut("ab cd", 5, 3), 5);
    assert_int_equal(data_cut("1 .  Z\nq", 8, 1), 6);
    enum { N = 3000000 };
    char* text = allocate(N, 1);
    for (size_t i = 0; i < N; i++) text[i] = " \n12.;aB"[random_bits(1, 2, i) % 8];
    check_chunks(text, N, &bytes_tokenizer);
    memset(text, '1', N); // nowhere to cut
    check_chunks(text, N, &bytes_tokenizer);
    free(text);
}

// ---- .jsonl ----------------------------------------------------------------------------------

static void test_documents(void** state) {
    (void)state;
    Data d = open_data(put_text("docs.jsonl", "{\"text\": \"ab\"}\n\n  \t\r\n{\"id\": 1, \"text\": \"\"}\r\n"
                                              "{\"text\":\"\\u00e9\\n\"}"),
                       261);
    check_ids(&d, (int32_t[]){ 256, 'a', 'b', 256, 256, 0xc3, 0xa9, '\n' }, 8);
    int32_t ids[7], labels[7];
    assert_int_equal(data_eval_window(&d, ids, labels, 7, 0), 7);
    assert_int_equal(labels[2], 256); // that a document ends is learned, as its begin token
    data_close(&d);
    int bos = bytes_tokenizer.bos;
    bytes_tokenizer.bos = -1; // a tokenizer without one
    d = open_data(path_of("docs.jsonl"), 261);
    check_ids(&d, (int32_t[]){ 'a', 'b', 0xc3, 0xa9, '\n' }, 5);
    data_close(&d);
    bytes_tokenizer.bos = bos;
}

/* Worked by hand from the template that transformers applies for Llama 3:

    {{ bos_token }} and for each message
    '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + content | trim + '<|eot_id|>'

so that apply_chat_template on these messages gives <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>
<|start_header_id|>assistant<|end_header_id|>\n\nYo!<|eot_id|> in one line. Learned are "Yo!" and the <|eot_id|> after it. */
static void test_chats(void** state) {
    (void)state;
#define M(id) (-100 - (id)) // masked
    // clang-format off
    const int32_t want[] = {
        M(256), M(258), M('u'), M('s'), M('e'), M('r'), M(259), M('\n'), M('\n'), M('H'), M('i'), M(260),
        M(258), M('a'), M('s'), M('s'), M('i'), M('s'), M('t'), M('a'), M('n'), M('t'), M(259), M('\n'), M('\n'),
        'Y', 'o', '!', 260,
        M(256), M(258), M('a'), M('s'), M('s'), M('i'), M('s'), M('t'), M('a'), M('n'), M('t'), M(259), M('\n'), M('\n'),
        'A', 260,
        M(258), M('u'), M('s'), M('e'), M('r'), M(259), M('\n'), M('\n'), M('B'), M(260),
    };
    // clang-format on
#undef M
    Data d =
        open_data(put_text("chat.jsonl",
                           "{\"messages\": [{\"role\": \"user\", \"content\": \"  Hi\\n\"}, {\"role\": \"assistant\", "
                           "\"content\": \"Yo!\"}]}\n{\"messages\": [{\"role\": \"assistant\", \"content\": \"A\"}, "
                           "{\"role\": \"user\", \"content\": \"B\"}]}\n"),
                  261);
    enum { N = sizeof want / sizeof want[0] };
    check_ids(&d, want, N);
    int32_t ids[N], labels[N];
    assert_int_equal(data_eval_window(&d, ids, labels, N, 0), N - 1);
    for (int t = 0; t < N - 1; t++) {
        assert_int_equal(ids[t], want[t] < 0 ? -100 - want[t] : want[t]); // masked tokens are read all the same
        assert_int_equal(labels[t], want[t + 1] < 0 ? IGNORED_LABEL : want[t + 1]);
    }
    data_batch(&d, ids, labels, 2, 20, 1, 0);
    for (int t = 0; t < 40; t++) assert_in_range(ids[t], 0, 260);
    data_close(&d);
}

static void test_bad_jsonl(void** state) {
    (void)state;
    const struct {
        const char *line, *words;
    } cases[] = {
        { "{\"text\": 3}", "\"text\" is not a string" },
        { "{\"messages\": {}}", "\"messages\" is not a list" },
        { "{\"messages\": [3]}", "role" },
        { "{\"messages\": [{\"role\": \"user\"}]}", "content" },
        { "{\"messages\": [{\"role\": \"user\", \"content\": [\"x\"]}]}", "content" },
        { "{\"messages\": [{\"content\": \"x\"}]}", "role" },
        { "{\"prompt\": \"x\"}", "expected {\"text\"" },
        { "{\"text\": \"x\", \"messages\": []}", "expected {\"text\"" },
        { "[\"text\"]", "expected {\"text\"" },
        { "\"text\"", "expected {\"text\"" },
        { "{\"text\": \"x\"", "JSON" },
        { "{\"text\": \"x\"} {\"text\": \"y\"}", "JSON" },
        { "{\"text\": \"\xff\"}", "UTF-8" },
        { "x", "JSON" },
    };
    char text[500];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        snprintf(text, sizeof text, "{\"text\": \"fine\"}\n\n%s\n{\"text\": \"fine\"}\n", cases[i].line);
        expect_error(put_text("bad.jsonl", text), &bytes_tokenizer, 261, "bad.jsonl, line 3: ", cases[i].words, NULL);
    }
    expect_error(put_text("bad.jsonl", "\n \n"), &bytes_tokenizer, 261, "bad.jsonl", "no tokens", NULL);
    expect_error(put_text("bad.jsonl", "{\"text\": \"\"}"), &bytes_tokenizer, 261, "bad.jsonl", "one token", NULL);
    expect_error(put_text("bad.jsonl", "{\"text\": \"x\"}\n"), NULL, 261, "tokenizer", NULL);
    expect_error(put_text("bad.jsonl", "{\"text\": \"x\"}\n"), &bytes_tokenizer, 256, "bad.jsonl: token 0 is 256",
                 NULL);
}

// ---- with Llama 3's tokenizer ----------------------------------------------------------------

// ids from the tests of meta-llama/llama-models
static void test_llama3_chat(void** state) {
    (void)state;
    Tokenizer t = { 0 };
    if (!tokenizer_open(&t, test_data("llama3/tokenizer.json"), &err)) test_fail("%s", err.text);
    const char* path =
        put_text("llama3.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"This is a test sentence.\"},"
                                 "{\"role\": \"assistant\", \"content\": \" This is a response.\\n\"}]}\n");
    const int32_t want[] = { 128000, 128006, 882,   128007, 271, 2028, 374, 264, 1296, 11914, 13,
                             128009, 128006, 78191, 128007, 271, 2028, 374, 264, 2077, 13,    128009 };
    enum { N = sizeof want / sizeof want[0], ANSWER = 16 };
    Data d;
    if (!data_open(&d, path, &t, 128256, &err)) test_fail("%s", err.text);
    int32_t ids[N], labels[N];
    assert_int_equal(data_tokens(&d), N);
    assert_int_equal(data_eval_window(&d, ids, labels, N, 0), N - 1);
    for (int i = 0; i < N - 1; i++) {
        assert_int_equal(ids[i], want[i]);
        assert_int_equal(labels[i], i + 1 < ANSWER ? IGNORED_LABEL : want[i + 1]);
    }
    data_close(&d);
    tokenizer_close(&t);
}

static void test_llama3_text(void** state) {
    (void)state;
    Tokenizer t = { 0 };
    char *text, *random_text;
    size_t n;
    if (!tokenizer_open(&t, test_data("llama3/tokenizer.model"), &err)) test_fail("%s", err.text);
    assert_true(read_file(test_data("tinystories_10k.txt"), &text, &n, 1 << 30, &err));
    assert_true(n > 1 << 20);
    check_chunks(text, n, &t);
    free(text);
    enum { N = 2 << 20 };
    random_text = allocate(N, 1);
    for (size_t i = 0; i < N; i++) random_text[i] = "  \n\r\t12.'sTab"[random_bits(1, 3, i) % 13];
    check_chunks(random_text, N, &t);
    free(random_text);
    tokenizer_close(&t);
}

// ---- hellaswag -------------------------------------------------------------------------------

static bool parse_hellaswag(Hellaswag* h, const char* text) {
    char* copy = strdup(text);
    return hellaswag_parse(h, "tasks", copy, strlen(text), &err);
}

static void test_hellaswag(void** state) {
    (void)state;
    Hellaswag h;
    assert_true(hellaswag_open(&h, put_text("h.txt", "Cooking: A man\n3\na\nb\nc\nd\r\nctx two\n0\n1\n2\n3\n4"), &err));
    assert_int_equal(h.n, 2);
    assert_string_equal(h.tasks[0].context, "Cooking: A man");
    assert_int_equal(h.tasks[0].label, 3);
    assert_string_equal(h.tasks[0].endings[0], "a");
    assert_string_equal(h.tasks[0].endings[3], "d");
    assert_string_equal(h.tasks[1].context, "ctx two");
    assert_int_equal(h.tasks[1].label, 0);
    assert_string_equal(h.tasks[1].endings[3], "4");
    hellaswag_close(&h);
    const struct {
        const char *text, *words;
    } bad[] = {
        { "", "0 lines" },
        { "c\n1\na\nb\nc\n", "5 lines" },
        { "c\n1\na\nb\nc\nd\nc\n", "7 lines" },
        { "c\n4\na\nb\nc\nd\n", "line 2: '4'" },
        { "c\n1\na\nb\nc\nd\nc\n11\na\nb\nc\nd\n", "line 8: '11'" },
        { "c\n-\na\nb\nc\nd\n", "line 2" },
        { "c\n1\na\n\nc\nd\n", "line 4: empty" },
        { "c\n1\na\nb\nc\n\r\n", "line 6: empty" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_false(parse_hellaswag(&h, bad[i].text));
        if (!strstr(err.text, bad[i].words)) test_fail("expected '%s' in: %s", bad[i].words, err.text);
    }
    assert_false(hellaswag_open(&h, put_file("nul.txt", "c\0\n1\na\nb\nc\nd\n", 13), &err));
    assert_non_null(strstr(err.text, "NUL"));
    assert_false(hellaswag_open(&h, put_file("h.txt.gz", "\x1f\x8b\x08", 3), &err));
    assert_non_null(strstr(err.text, "gunzip"));
    assert_false(hellaswag_open(&h, path_of("no such"), &err));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_uniform),   cmocka_unit_test(test_normal),      cmocka_unit_test(test_permute),
        cmocka_unit_test(test_bin),       cmocka_unit_test(test_write_bin),   cmocka_unit_test(test_bad_bin),
        cmocka_unit_test(test_epochs),    cmocka_unit_test(test_resume),      cmocka_unit_test(test_eval_windows),
        cmocka_unit_test(test_split),     cmocka_unit_test(test_check_seq),   cmocka_unit_test(test_many_shards),
        cmocka_unit_test(test_large),     cmocka_unit_test(test_text),        cmocka_unit_test(test_globs),
        cmocka_unit_test(test_cut),       cmocka_unit_test(test_documents),   cmocka_unit_test(test_chats),
        cmocka_unit_test(test_bad_jsonl), cmocka_unit_test(test_llama3_chat), cmocka_unit_test(test_llama3_text),
        cmocka_unit_test(test_hellaswag),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
