/*
The tokenizer against golden ids of other implementations, what must survive a round trip, and files that lie.

The golden files (dev/test/golden/tokenizer, written by dev/reference/golden_tokenizer.py) hold a small tokenizer and ids of
Llama 3's; that one itself is test data, and the tests that need it are skipped where it is absent.
*/
#include <time.h>

#include "test.h"
#include "llmc/checkpoint.h"
#include "llmc/tokenizer.h"

#define GOLDEN "dev/test/golden/tokenizer/"

static char scratch[PATH_SIZE]; // a folder of this test's own

static int set_up(void** state) {
    (void)state;
    const char* tmp = getenv("TMPDIR");
    snprintf(scratch, sizeof scratch, "%s/test_tokenizer.XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(scratch) ? 0 : -1;
}

static int tear_down(void** state) {
    (void)state;
    Error err;
    return remove_all(scratch, &err) ? 0 : -1;
}

static Tokenizer open_tokenizer(const char* path) {
    Tokenizer t;
    Error err;
    if (!tokenizer_open(&t, path, &err)) test_fail("%s", err.text);
    return t;
}

static Text read_text(const char* path) {
    Text text = { 0 };
    Error err;
    if (!read_file(path, &text.data, &text.n, 1 << 28, &err)) test_fail("%s", err.text);
    return text;
}

// owned by the caller
static Tokens encode(Tokenizer* t, const char* text, size_t n, bool special) {
    Tokens out = { 0 };
    Error err;
    if (!tokenizer_encode(t, &out, text, n, special, &err)) test_fail("%s", err.text);
    return out;
}

static void expect_ids(const char* what, Tokens got, const int32_t* want, size_t n) {
    for (size_t i = 0; i < n && i < got.n; i++)
        if (got.ids[i] != want[i]) test_fail("%s: id %zu is %d, expected %d", what, i, got.ids[i], want[i]);
    if (got.n != n) test_fail("%s: %zu ids, expected %zu", what, got.n, n);
}

// the ids of text are these
static void expect_encoding(Tokenizer* t, const char* text, bool special, const int32_t* want, size_t n) {
    Tokens got = encode(t, text, strlen(text), special);
    expect_ids(text, got, want, n);
    tokens_free(&got);
}

#define IDS(...) (const int32_t[]){ __VA_ARGS__ }, sizeof((const int32_t[]){ __VA_ARGS__ }) / sizeof(int32_t)

// the bytes of all tokens, one after the other, are those of the text
static void expect_bytes(const Tokenizer* t, Tokens ids, const char* text, size_t n) {
    size_t at = 0, size;
    for (size_t i = 0; i < ids.n; i++) {
        const char* piece = tokenizer_piece(t, ids.ids[i], &size);
        if (!piece) test_fail("id %d is no token", ids.ids[i]);
        if (at + size > n || memcmp(piece, text + at, size) != 0) test_fail("token %zu is not the bytes at %zu", i, at);
        at += size;
    }
    if (at != n) test_fail("%zu bytes came back of %zu", at, n);
}

static void expect_round_trip(Tokenizer* t, const char* text, size_t n) {
    Tokens ids = encode(t, text, n, false);
    expect_bytes(t, ids, text, n);
    tokens_free(&ids);
}

// ---- golden ids ------------------------------------------------------------------------------

static size_t from_hex(char* bytes, const char* hex) {
    size_t n = 0;
    unsigned byte;
    for (; sscanf(hex + 2 * n, "%2x", &byte) == 1; n++) bytes[n] = (char)byte;
    return n;
}

// a line is "hex kind id id …"; returns how many lines
static int compare_golden(Tokenizer* t, const char* path) {
    FILE* file = fopen(path, "r");
    if (!file) test_fail("%s is missing", path);
    static char line[16384], text[8192];
    int lines = 0;
    while (fgets(line, sizeof line, file)) {
        char *hex = strtok(line, " \n"), *kind = strtok(NULL, " \n"), *id;
        size_t n = *hex == '-' ? 0 : from_hex(text, hex);
        Tokens want = { 0 }, got = encode(t, text, n, strcmp(kind, "special") == 0);
        while ((id = strtok(NULL, " \n"))) tokens_push(&want, atoi(id));
        char what[64];
        snprintf(what, sizeof what, "%.30s line %d", path + strlen(GOLDEN), ++lines);
        expect_ids(what, got, want.ids, want.n);
        expect_bytes(t, got, text, n);
        tokens_free(&want), tokens_free(&got);
    }
    fclose(file);
    return lines;
}

// text, which a NUL follows, with the first `from` replaced; owned by the caller
static Text replaced(const Text* text, const char* from, const char* to) {
    const char* at = strstr(text->data, from);
    if (!at) test_fail("the golden file has no %s", from);
    Text out = { 0 };
    text_add(&out, text->data, (size_t)(at - text->data));
    text_string(&out, to);
    at += strlen(from);
    text_add(&out, at, (size_t)(text->data + text->n - at));
    return out;
}

// the tokenizer of a golden .json with one thing replaced
static Tokenizer open_changed(const char* path, const char* from, const char* to) {
    Tokenizer t;
    Error err;
    Text json = read_text(path), changed = replaced(&json, from, to);
    if (!tokenizer_parse_json(&t, changed.data, changed.n, &err)) test_fail("%s: %s", to, err.text);
    text_free(&json), text_free(&changed);
    return t;
}

static void test_golden_tiny(void** state) {
    (void)state;
    Tokenizer t[3] = { open_tokenizer(GOLDEN "tiny.json"), open_tokenizer(GOLDEN "tiny_ignore.json"),
                       open_changed(GOLDEN "tiny_ignore.json", "\"ignore_merges\": true", "\"ignore_merges\": false") };
    static const char* const ids[] = { GOLDEN "tiny.ids", GOLDEN "tiny_ignore.ids", GOLDEN "tiny_cut.ids" };
    for (int i = 0; i < 3; i++) {
        assert_int_equal(t[i].V, 505);
        assert_int_equal(t[i].bos, 500);
        assert_int_equal(t[i].eos, 501);
        assert_true(compare_golden(&t[i], ids[i]) > 50);
        tokenizer_close(&t[i]);
    }
}

static void test_golden_llama3(void** state) {
    (void)state;
    static const char* const names[] = { "llama3/tokenizer.json", "llama3/tokenizer.model" };
    for (int i = 0; i < 2; i++) {
        Tokenizer t = open_tokenizer(test_data(names[i]));
        assert_int_equal(t.V, 128256);
        assert_int_equal(t.bos, 128000);
        assert_int_equal(t.eos, 128001);
        assert_int_equal(tokenizer_special(&t, "<|finetune_right_pad_id|>"), 128004);
        assert_int_equal(tokenizer_special(&t, "<|reserved_special_token_247|>"), 128255);
        assert_true(compare_golden(&t, GOLDEN "llama3.ids") > 50);
        expect_encoding(&t, "<|begin_of_text|>This is a test sentence.<|end_of_text|>", true,
                        IDS(128000, 2028, 374, 264, 1296, 11914, 13, 128001));
        expect_encoding(&t, "This is a response.", false, IDS(2028, 374, 264, 2077, 13));
        tokenizer_close(&t);
    }
}

// ---- round trips -----------------------------------------------------------------------------

static void test_every_byte(void** state) {
    (void)state;
    Tokenizer t[2];
    tokenizer_bytes(&t[0]);
    t[1] = open_tokenizer(GOLDEN "tiny.json");
    for (int which = 0; which < 2; which++) {
        char all[4 * 256];
        for (int i = 0; i < 256; i++) { // alone, in order, in reverse, beside a letter
            char byte = (char)i;
            expect_round_trip(&t[which], &byte, 1);
            all[i] = byte, all[511 - i] = byte, all[512 + 2 * i] = byte, all[513 + 2 * i] = 'a';
        }
        expect_round_trip(&t[which], all, sizeof all);
        tokenizer_close(&t[which]);
    }
}

static void test_bytes_are_ids(void** state) {
    (void)state;
    Tokenizer t;
    tokenizer_bytes(&t);
    assert_int_equal(t.V, 261);
    expect_encoding(&t, "A \xff the\n", false, IDS(65, 32, 255, 32, 116, 104, 101, 10));
    expect_encoding(&t, "<|eot_id|>x", true, IDS(260, 120));
    assert_int_equal(tokenizer_special(&t, "<|eot_id|>"), 260);
    assert_int_equal(tokenizer_special(&t, "<|eot_id|"), -1);
    size_t n;
    assert_null(tokenizer_piece(&t, 261, &n));
    assert_null(tokenizer_piece(&t, -1, &n));
    tokenizer_close(&t);
}

// each byte that is not part of valid UTF-8 is a token of its own; the text around it is as it was
static void test_invalid_utf8(void** state) {
    (void)state;
    static const char* const invalid[] = { "\xff",         "\x80",         "\xc3",
                                           "\xc0\xaf",     "\xe2\x82",     "\xed\xa0\x80",
                                           "\xf4\x90\x80", "\xf0\x9f\x98", "\xf8\x88\x80\x80",
                                           "\xe2\x28" };
    Tokenizer t = open_tokenizer(GOLDEN "tiny.json");
    for (size_t i = 0; i < sizeof invalid / sizeof *invalid; i++) {
        Tokens want = encode(&t, " the gradient", 13, false), after = encode(&t, " of the weights", 15, false);
        for (const char* p = invalid[i]; *p; p++) tokens_push(&want, t.byte_id[(uint8_t)*p]);
        for (size_t j = 0; j < after.n; j++) tokens_push(&want, after.ids[j]);
        char text[64];
        int n = snprintf(text, sizeof text, " the gradient%s of the weights", invalid[i]);
        Tokens got = encode(&t, text, (size_t)n, false);
        expect_ids(invalid[i], got, want.ids, want.n);
        tokens_free(&want), tokens_free(&after), tokens_free(&got);
    }
    tokenizer_close(&t);
}

// text never becomes a special token by itself, whatever the merges
static void test_no_injection(void** state) {
    (void)state;
    Tokenizer t = open_tokenizer(GOLDEN "tiny_ignore.json");
    for (int32_t id = 500; id < t.V; id++) {
        size_t n;
        const char* piece = tokenizer_piece(&t, id, &n);
        Tokens plain = encode(&t, piece, n, false), special = encode(&t, piece, n, true);
        for (size_t i = 0; i < plain.n; i++) assert_true(plain.ids[i] < 500);
        expect_ids("special", special, IDS(id));
        tokens_free(&plain), tokens_free(&special);
    }
    tokenizer_close(&t);
}

// of several added tokens the longest counts; one that is not special is recognised always; one that is in the vocabulary
// too still does not come from text
static void test_added_tokens(void** state) {
    (void)state;
    Tokenizer t = open_changed(GOLDEN "tiny.json", "\"<|eot_id|>\"", "\"<|begin_of_text|>x\"");
    expect_encoding(&t, "<|begin_of_text|>x<|begin_of_text|>", true, IDS(504, 500));
    tokenizer_close(&t);
    t = open_changed(GOLDEN "tiny.json", "\"special\": true", "\"special\": false");
    expect_encoding(&t, "<|begin_of_text|>", false, IDS(500));
    Tokens eot = encode(&t, "<|eot_id|>", 10, false);
    assert_true(eot.n > 1);
    tokenizer_close(&t);
    t = open_changed(GOLDEN "tiny_ignore.json", "\"!\": 0", "\"<|eot_id|>\": 504, \"!\": 0");
    expect_encoding(&t, "<|eot_id|>", true, IDS(504));
    Tokens again = encode(&t, "<|eot_id|>", 10, false);
    assert_true(again.n > 1);
    tokens_free(&eot), tokens_free(&again), tokenizer_close(&t);
}

// where plain words are found without the pattern, the pattern would find the same
static void test_plain_words(void** state) {
    (void)state;
    static const char* const units[] = { " ", "a",  "Zz",       "'s",        "'",        "1",
                                         ",", "\n", "\xc3\xa9", "e\xcc\x81", "\xc2\xa0", "[" };
    Tokenizer t = open_tokenizer(GOLDEN "tiny.json");
    uint32_t random = 1;
    int words = 0;
    for (int i = 0; i < 20000; i++) {
        Text text = { 0 };
        for (int j = 0; j < 6; j++) {
            random = random * 1664525u + 1013904223u;
            text_string(&text, units[(random >> 16) % (sizeof units / sizeof *units)]);
        }
        Error err;
        size_t word = plain_word(text.data, text.n);
        words += word > 0;
        if (word && word != tokenizer_split(&t, text.data, text.n, 0, &err))
            test_fail("%.*s: a word of %zu bytes", (int)text.n, text.data, word);
        text_free(&text);
    }
    assert_true(words > 1000);
    tokenizer_close(&t);
}

// ---- long pieces -----------------------------------------------------------------------------

// the heap and the search give the same ids
static void test_long_equals_short(void** state) {
    (void)state;
    Tokenizer t = open_tokenizer(GOLDEN "tiny.json");
    uint32_t random = 1;
    for (int i = 0; i < 3000; i++) {
        char piece[SHORT_PIECE];
        size_t n = 1 + (size_t)i % SHORT_PIECE;
        for (size_t j = 0; j < n; j++) {
            random = random * 1664525u + 1013904223u;
            piece[j] = " ethains\n1"[random >> 24 & (i % 2 ? 7 : 1)];
        }
        Tokens from_search = { 0 }, from_heap = { 0 };
        tokenizer_merge_short(&t, &from_search, piece, n);
        tokenizer_merge_long(&t, &from_heap, piece, n);
        expect_ids("heap", from_heap, from_search.ids, from_search.n);
        tokens_free(&from_search), tokens_free(&from_heap);
    }
    tokenizer_close(&t);
}

// n times the same character: merged in n log n, and split without a limit of PCRE2
static void expect_long_run(Tokenizer* t, char unit, size_t n) {
    char* text = allocate(n, 1);
    memset(text, unit, n);
    text[n - 1] = 'x'; // white space before it is looked at twice
    clock_t start = clock();
    Tokens ids = encode(t, text, n, false);
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    if (seconds > 10) test_fail("%zu times '%c' took %.1f s", n, unit, seconds);
    expect_bytes(t, ids, text, n);
    tokens_free(&ids), free(text);
}

static void test_long_runs(void** state) {
    (void)state;
    Tokenizer t = open_tokenizer(GOLDEN "tiny.json");
    expect_long_run(&t, 'e', 1000 * 1000);
    expect_long_run(&t, '\t', 10 * 1000 * 1000); // nothing merges
    tokenizer_close(&t);
}

static void test_long_runs_llama3(void** state) {
    (void)state;
    Tokenizer t = open_tokenizer(test_data("llama3/tokenizer.model"));
#ifdef __SANITIZE_ADDRESS__
    const size_t n = 1000 * 1000;
#else
    const size_t n = 10 * 1000 * 1000;
#endif
    expect_long_run(&t, 'a', n);
    expect_long_run(&t, ' ', n);
    tokenizer_close(&t);
}

// ---- decoding as it comes --------------------------------------------------------------------

// text in parts of `step` bytes gives want, and never an unfinished character
static void expect_stream(const char* text, size_t n, size_t step, const char* want) {
    Decoder d = { 0 };
    Text got = { 0 };
    size_t ready;
    for (size_t at = 0; at < n; at += step) {
        const char* bytes = decoder_push(&d, text + at, at + step < n ? step : n - at, &ready);
        assert_true(utf8_valid(bytes, ready) == ready);
        text_add(&got, bytes, ready);
        assert_true(got.n + 3 >= at || strstr(want, "\xef\xbf\xbd")); // at most three bytes are held
    }
    const char* bytes = decoder_flush(&d, &ready);
    text_add(&got, bytes, ready);
    if (got.n != strlen(want) || memcmp(got.data, want, got.n) != 0)
        test_fail("in steps of %zu: \"%.*s\", expected \"%s\"", step, (int)got.n, got.data, want);
    decoder_free(&d), text_free(&got);
}

#define BAD "\xef\xbf\xbd"

static void test_stream(void** state) {
    (void)state;
    // a text, and what Python's decode(errors="replace") makes of it
    static const char* const cases[][2] = {
        { "plain", "plain" },
        { "é中🙂 \x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xef\xbf\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf",
          "é中🙂 \x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xef\xbf\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf" },
        { "a\x80z", "a" BAD "z" },
        { "a\xe4\xb8z", "a" BAD "z" }, // a character broken off
        { "a\xe4\xb8", "a" BAD },      // at the end
        { "\xf0\x9f\x98", BAD },
        { "\xf0\x9f\x98\xe4\xb8\xad", BAD "中" },
        { "\xc0\xaf", BAD BAD }, // longer than needed
        { "\xe0\x80\xaf", BAD BAD BAD },
        { "\xed\xa0\x80", BAD BAD BAD },         // a surrogate
        { "\xf4\x90\x80\x80", BAD BAD BAD BAD }, // beyond U+10FFFF
        { "\xf0\x80\x80\x41", BAD BAD BAD "A" },
        { "\xff\xfe\xc3\xc3\xa9", BAD BAD BAD "é" },
        { "\xf1\x80\x80\xe1\x80\xc2\x41\x98\x42", BAD BAD BAD "A" BAD "B" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t step = 1; step <= 8; step++) expect_stream(cases[i][0], strlen(cases[i][0]), step, cases[i][1]);
}

// ---- chat ------------------------------------------------------------------------------------

static void test_chat(void** state) {
    (void)state;
    Tokenizer t;
    Error err;
    Tokens ids = { 0 };
    tokenizer_bytes(&t);
    static const char text[] = "\n\t \x1c\xc2\xa0\xe2\x80\x83"
                               "a \xe3\x80\x80"
                               "b<|eot_id|>\xe2\x80\xa9\r\n ";
    static const char body[] = "a \xe3\x80\x80"
                               "b<|eot_id|>"; // trimmed; special tokens in it are text
    Tokens want = { 0 };
    tokens_push(&want, 258), tokens_push(&want, 'm'), tokens_push(&want, 'e'), tokens_push(&want, 259);
    tokens_push(&want, '\n'), tokens_push(&want, '\n');
    for (size_t i = 0; i < sizeof body - 1; i++) tokens_push(&want, (uint8_t)body[i]);
    tokens_push(&want, 260);
    assert_true(tokenizer_chat_message(&t, &ids, "me", text, sizeof text - 1, &err));
    expect_ids("message", ids, want.ids, want.n);
    ids.n = 0;
    assert_true(tokenizer_chat_message(&t, &ids, "x", " \n ", 3, &err));
    expect_ids("empty message", ids, IDS(258, 'x', 259, '\n', '\n', 260));
    ids.n = 0;
    assert_true(tokenizer_chat_header(&t, &ids, "y", &err));
    expect_ids("header", ids, IDS(258, 'y', 259, '\n', '\n'));
    t.n_added = 0;
    assert_false(tokenizer_chat_message(&t, &ids, "x", "y", 1, &err));
    assert_non_null(strstr(err.text, "<|start_header_id|>"));
    tokens_free(&ids), tokens_free(&want), tokenizer_close(&t);
}

static void test_chat_llama3(void** state) {
    (void)state;
    Tokenizer t = open_tokenizer(test_data("llama3/tokenizer.json"));
    Error err;
    Tokens ids = { 0 };
    assert_true(tokenizer_chat_message(&t, &ids, "user", "\nThis is a response. ", 21, &err));
    assert_true(tokenizer_chat_header(&t, &ids, "assistant", &err));
    expect_ids("chat", ids,
               IDS(128006, 882, 128007, 271, 2028, 374, 264, 2077, 13, 128009, 128006, 78191, 128007, 271));
    tokens_free(&ids), tokenizer_close(&t);
}

// ---- writing ---------------------------------------------------------------------------------

static const char* in_scratch(const char* name) {
    static char path[PATH_SIZE];
    Error err;
    assert_true(path_join(path, scratch, name, &err));
    return path;
}

static void write_tokenizer(const Tokenizer* t) {
    Error err;
    if (!tokenizer_write(t, scratch, &err)) test_fail("%s", err.text);
}

static void expect_same_file(const char* path, const char* other) {
    Text a = read_text(path), b = read_text(other);
    if (a.n != b.n || memcmp(a.data, b.data, a.n) != 0) test_fail("%s and %s differ", path, other);
    text_free(&a), text_free(&b);
}

// bytes, written and read again, are what they were; that is then copied as it is
static void test_write_bytes(void** state) {
    (void)state;
    Tokenizer t;
    tokenizer_bytes(&t);
    write_tokenizer(&t);
    tokenizer_close(&t);
    t = open_tokenizer(scratch);
    assert_int_equal(t.V, 261);
    assert_int_equal(t.bos, 256);
    assert_int_equal(t.eos, 257);
    for (int i = 0; i < 256; i++) assert_int_equal(t.byte_id[i], i);
    expect_encoding(&t, "don't<|eot_id|>", true, IDS('d', 'o', 'n', '\'', 't', 260));
    Text first = read_text(in_scratch("tokenizer.json"));
    write_tokenizer(&t);
    Text second = read_text(in_scratch("tokenizer.json"));
    assert_int_equal(first.n, second.n);
    assert_memory_equal(first.data, second.data, first.n);
    text_free(&first), text_free(&second), tokenizer_close(&t);
}

static void test_write_verbatim(void** state) {
    (void)state;
    Tokenizer t = open_tokenizer(GOLDEN "tiny.json");
    write_tokenizer(&t);
    expect_same_file(in_scratch("tokenizer.json"), GOLDEN "tiny.json");
    tokenizer_close(&t);
}

// from tokenizer.model alone, every byte of the tokenizer.json that Llama 3.1 comes with
static void test_write_llama3(void** state) {
    (void)state;
    Tokenizer t = open_tokenizer(test_data("llama3/tokenizer.model"));
    write_tokenizer(&t);
    expect_same_file(in_scratch("tokenizer.json"), test_data("llama3/tokenizer.json"));
    tokenizer_close(&t);
}

static void test_write_fails(void** state) {
    (void)state;
    Tokenizer t;
    Error err;
    tokenizer_bytes(&t);
    assert_false(tokenizer_write(&t, "/nonexistent/folder", &err));
    assert_non_null(strstr(err.text, "/nonexistent/folder/tokenizer.json"));
    tokenizer_close(&t);
}

// bos and eos are those that tokenizer_config.json names
static void test_config(void** state) {
    (void)state;
    static const struct {
        const char *text, *error;
        int bos, eos;
    } cases[] = {
        { "{}", NULL, 500, 501 },
        { "{\"eos_token\": \"<|eot_id|>\"}", NULL, 500, 504 },
        { "{\"bos_token\": null, \"eos_token\": {\"content\": \"<|eot_id|>\", \"special\": true}}", NULL, -1, 504 },
        { "{\"bos_token\": \"<s>\"}", "bos_token is not the text of an added token", 0, 0 },
        { "{\"eos_token\": 7}", "eos_token is not the text of an added token", 0, 0 },
        { "{", "tokenizer_config.json: not valid JSON", 0, 0 },
    };
    Error err;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Text json = read_text(GOLDEN "tiny.json");
        assert_true(write_file(in_scratch("tokenizer.json"), json.data, json.n, &err));
        assert_true(write_file(in_scratch("tokenizer_config.json"), cases[i].text, strlen(cases[i].text), &err));
        text_free(&json);
        Tokenizer t;
        bool ok = tokenizer_open(&t, scratch, &err);
        if (ok != !cases[i].error) test_fail("%s: %s", cases[i].text, ok ? "accepted" : err.text);
        if (!ok && !strstr(err.text, cases[i].error)) test_fail("%s: %s", cases[i].text, err.text);
        if (ok && (t.bos != cases[i].bos || t.eos != cases[i].eos))
            test_fail("%s: bos %d eos %d", cases[i].text, t.bos, t.eos);
        if (ok) tokenizer_close(&t);
    }
}

// ---- files that lie --------------------------------------------------------------------------

static void expect_error(bool ok, const Error* err, const char* what, const char* fragment) {
    if (ok) test_fail("%s: accepted, expected an error with \"%s\"", what, fragment);
    if (!strstr(err->text, fragment)) test_fail("%s: \"%s\", expected \"%s\" in it", what, err->text, fragment);
    if (strchr(err->text, '\n')) test_fail("%s: more than one line: %s", what, err->text);
}

static void test_json_that_lies(void** state) {
    (void)state;
    // replace this, by this, and the error has this
    static const char* const cases[][3] = {
        { "\"truncation\": null", "\"truncation\": {\"max_length\": 9}", "truncation is {\"max_length\":9}" },
        { "\"padding\": null", "\"padding\": {}", "padding is {}" },
        { "\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", "normalizer is {\"type\":\"NFC\"}" },
        { "\"type\": \"Sequence\"", "\"type\": \"Whitespace\"", "pre_tokenizer.type is \"Whitespace\"" },
        { "\"type\": \"Split\"", "\"type\": \"Digits\"", "pre_tokenizer.pretokenizers.0.type is \"Digits\"" },
        { "\\\\p{N}{1,3}", "\\\\p{N}", "pre_tokenizer.pretokenizers.0.pattern is not Llama 3's" },
        { "\"Regex\":", "\"String\":", "pre_tokenizer.pretokenizers.0.pattern is not Llama 3's" },
        { "\"behavior\": \"Isolated\"", "\"behavior\": \"Removed\"", "behavior is \"Removed\"" },
        { "\"invert\": false", "\"invert\": true", "invert is true" },
        { "\"add_prefix_space\": false", "\"add_prefix_space\": true", "add_prefix_space is true" },
        { "\"use_regex\": false", "\"use_regex\": true", "use_regex is true" },
        { "\"decoder\": {", "\"decoder\": {}, \"other\": {", "decoder.type is null" },
        { "\"type\": \"BPE\"", "\"type\": \"Unigram\"", "model.type is \"Unigram\"" },
        { "\"dropout\": null", "\"dropout\": 0.1", "model.dropout is 0.1" },
        { "\"continuing_subword_prefix\": null", "\"continuing_subword_prefix\": \"##\"", "prefix is \"##\"" },
        { "\"end_of_word_suffix\": null", "\"end_of_word_suffix\": \"</w>\"", "suffix is \"</w>\"" },
        { "\"byte_fallback\": false", "\"byte_fallback\": true", "byte_fallback is true" },
        { "\"ignore_merges\": false", "\"ignore_merges\": 1", "ignore_merges is 1" },
        { "\"model\": {", "\"no_model\": {", "model.type is null" },
        { "\"vocab\":", "\"no_vocab\":", "model.vocab is missing" },
        { "\"merges\": [", "\"merges\": 3, \"old\": [", "model.merges is missing, or no array" },
        { "\"added_tokens\": [", "\"added_tokens\": 3, \"old\": [", "added_tokens is no array" },
        { "\"content\": \"<|eot_id|>\"", "\"content\": 7", "added_tokens: an entry without a content and a whole id" },
        { "\"content\": \"<|eot_id|>\"", "\"content\": \"\"", "token 504 is 0 bytes long" },
        { "\"content\": \"<|eot_id|>\"", "\"content\": \"<|end_of_text|>\"", "\"<|end_of_text|>\" occurs twice" },
        { "\"content\": \"<|eot_id|>\"", "\"content\": \"the\"", "\"the\" is 504 in added_tokens and" },
        { "\"lstrip\": false", "\"lstrip\": true", "lstrip of \"<|begin_of_text|>\" is true" },
        { "\"single_word\": false", "\"single_word\": true", "single_word of \"<|begin_of_text|>\" is true" },
        { "\"id\": 500", "\"id\": 501", "added_tokens: two tokens have the id 501" },
        { "\"id\": 500", "\"id\": 5.5", "added_tokens: an entry without a content and a whole id" },
        { "\"id\": 500", "\"id\": -1", "added_tokens: token id -1 is out of range" },
        { "\"id\": 500", "\"id\": 4194304", "token id 4194304 is out of range, 0 to 4194303 expected" },
        { "\"id\": 500", "\"id\": 1e300", "added_tokens: an entry without a content and a whole id" },
        { "\"id\": 500", "\"id\": 5", "model.vocab: two tokens have the id 5" },
        { "\"!\": 0", "\"!\": 1", "model.vocab: two tokens have the id 1" },
        { "\"!\": 0", "\"!\": \"0\"", "the id of \"!\" is no whole number" },
        { "\"!\": 0", "\"!\": 9007199254740992", "out of range" },
        { "\"!\": 0,", "", "no token for the byte 0x21" },
        { "\"!\": 0", "\" \": 0", "\" \" does not spell 1 to 1024 bytes" },
        { "\"!\": 0", "\"中\": 0", "does not spell 1 to 1024 bytes" },
        { "\"!\": 0", "\"\": 0", "does not spell 1 to 1024 bytes" },
        { "\"!\": 0", "\"!\": 0, \"!\": 0", "occurs twice" },
        { "\"merges\": [", "\"merges\": [\"ab\", ", "model.merges: entry 0 is not a pair" },
        { "\"merges\": [", "\"merges\": [[\"a\"], ", "model.merges: entry 0 is not a pair" },
        { "\"merges\": [", "\"merges\": [[\"a\", 3], ", "model.merges: entry 0 is not a pair" },
        { "\"merges\": [", "\"merges\": [\"zzzz q\", ", "entry 0: \"zzzz\", \"q\" and both" },
        { "\"merges\": [", "\"merges\": [\"z \", ", "entry 0: \"z\", \"\" and both" },
        { "\"merges\": [", "\"merges\": [\"! !\", ", "both together must be in model.vocab" },
        { "\"merges\": [", "\"merges\": [\"h e\", \"h e\", ", "merges: entry 1 repeats an earlier one" },
        { "{", "", "not valid JSON" },
    };
    Text golden = read_text(GOLDEN "tiny.json");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Text lie = replaced(&golden, cases[i][0], cases[i][1]);
        Tokenizer t;
        Error err = { "" };
        expect_error(tokenizer_parse_json(&t, lie.data, lie.n, &err), &err, cases[i][1], cases[i][2]);
        text_free(&lie);
    }
    for (size_t n = 0; n < golden.n - 1; n += 97) { // truncated
        Tokenizer t;
        Error err = { "" };
        expect_error(tokenizer_parse_json(&t, golden.data, n, &err), &err, "truncated", "not valid JSON");
    }
    text_free(&golden);
}

static void add_model_line(Text* model, const char* bytes, size_t n, int rank) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        uint32_t group = 0;
        for (size_t j = 0; j < 3; j++) group = group << 8 | (i + j < n ? (uint8_t)bytes[i + j] : 0);
        for (size_t j = 0; j < 4; j++) text_add(model, i + j <= n ? &digits[group >> (18 - 6 * j) & 63] : "=", 1);
    }
    text_add(model, " ", 1), text_whole(model, rank), text_add(model, "\n", 1);
}

// 256 bytes, then the tokens given; a NUL follows; owned by the caller
static Text small_model(const char* const* tokens, int n) {
    Text model = { 0 };
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        add_model_line(&model, &byte, 1, b);
    }
    for (int i = 0; i < n; i++) add_model_line(&model, tokens[i], strlen(tokens[i]), 256 + i);
    text_add(&model, "", 1);
    model.n--;
    return model;
}

// ranks decide, not length; a whole piece needs no merges; the merges are written in the order of HuggingFace's converter
static void test_small_model(void** state) {
    (void)state;
    static const char* const tokens[] = { "bc",          "abc",           "ab",           "cd", "abcd",
                                          "unreachable", "\xe1\xa0\x8e!", "\xe2\x80\x83!" };
    Text model = small_model(tokens, 8);
    Tokenizer t;
    Error err;
    if (!tokenizer_parse_model(&t, model.data, model.n, &err)) test_fail("%s", err.text);
    assert_int_equal(t.V, 264 + 256);
    assert_int_equal(t.bos, 264);
    expect_encoding(&t, "ab", false, IDS(258));
    expect_encoding(&t, "xabcd", false, IDS('x', 260));
    expect_encoding(&t, "bcd", false, IDS(256, 'd'));
    expect_encoding(&t, "unreachable", false, IDS(261));
    expect_encoding(&t, " unreach", false, IDS(' ', 'u', 'n', 'r', 'e', 'a', 'c', 'h'));
    expect_encoding(&t, "\xe1\xa0\x8e!", false, IDS(262));                   // U+180E is no white space: one piece
    expect_encoding(&t, "\xe2\x80\x83!", false, IDS(0xe2, 0x80, 0x83, '!')); // U+2003 is: two
    write_tokenizer(&t);
    Text json = read_text(in_scratch("tokenizer.json"));
    static const char merges[] = "    \"merges\": [\n      \"b c\",\n      \"a bc\",\n      \"ab c\",\n      \"a b\",\n"
                                 "      \"c d\",\n      \"abc d\",\n      \"ab cd\"\n    ]\n  }\n}";
    if (!strstr(json.data, merges)) test_fail("other merges: %s", strstr(json.data, "\"merges\""));
    tokenizer_close(&t), text_free(&model), text_free(&json);
}

static void test_model_that_lies(void** state) {
    (void)state;
    static const char* const cases[][3] = {
        { "IQ== 33\n", "IQ== 34\n", "line 34: the rank is \"34\", expected 33" },
        { "IQ== 33\n", "IQ== 033\n", "line 34: the rank is \"033\", expected 33" },
        { "IQ== 33\n", "IQ== \n", "line 34: the rank is \"\", expected 33" },
        { "IQ== 33\n", "IQ==\n", "line 34: not a token in base64" },
        { "IQ== 33\n", "IQ= 33\n", "line 34: not a token in base64" },
        { "IQ== 33\n", "I=== 33\n", "line 34: not a token in base64" },
        { "IQ== 33\n", "==== 33\n", "line 34: not a token in base64" },
        { "IQ== 33\n", "I!== 33\n", "line 34: not a token in base64" },
        { "IQ== 33\n", " 33\n", "line 34: not a token in base64" },
        { "IQ== 33\n", "\n", "line 34: not a token in base64" },
        { "IQ== 33\n", "IQ== 33\r\n", "line 34: the rank is" },
        { "IQ== 33\n", "IA== 33\n", "tokens 32 and 33 are the same bytes" },
        { "IQ== 33\n", "ISE= 33\n", "no token for the byte 0x21" },
        { "AA== 0\n", "", "line 1: the rank is \"1\", expected 0" },
    };
    Text golden = small_model(NULL, 0);
    Tokenizer t;
    Error err = { "" };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Text lie = replaced(&golden, cases[i][0], cases[i][1]);
        expect_error(tokenizer_parse_model(&t, lie.data, lie.n, &err), &err, cases[i][1], cases[i][2]);
        text_free(&lie);
    }
    for (size_t n = 0; n < golden.n - 1; n += 7) // truncated: some byte has no token
        if (tokenizer_parse_model(&t, golden.data, n, &err)) test_fail("accepted %zu of %zu bytes", n, golden.n);
    Text large = { 0 };
    for (int i = 0; i < 3000; i++) text_add(&large, "A", 1);
    text_string(&large, " 0\n");
    expect_error(tokenizer_parse_model(&t, large.data, large.n, &err), &err, "large", "line 1: a token too long");
    text_free(&golden), text_free(&large);
}

static void test_open_fails(void** state) {
    (void)state;
    Tokenizer t;
    Error err;
    char folder[PATH_SIZE];
    assert_true(path_join(folder, scratch, "empty", &err) && make_folders(folder, &err));
    expect_error(tokenizer_open(&t, folder, &err), &err, "folder",
                 "/empty: holds no tokenizer.json and no tokenizer.model");
    expect_error(tokenizer_open(&t, "/nonexistent", &err), &err, "path", "cannot read /nonexistent: ");
    assert_true(write_file(in_scratch("empty/tokenizer.model"), "", 0, &err));
    expect_error(tokenizer_open(&t, folder, &err), &err, "nothing",
                 "empty/tokenizer.model: no token for the byte 0x00");
    assert_true(write_file(in_scratch("empty/tokenizer.json"), " {}", 3, &err));
    expect_error(tokenizer_open(&t, folder, &err), &err, "empty", "empty/tokenizer.json: pre_tokenizer.type is null");
}

int main(void) {
    // clang-format off
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_tiny),
        cmocka_unit_test(test_golden_llama3),
        cmocka_unit_test(test_every_byte),
        cmocka_unit_test(test_bytes_are_ids),
        cmocka_unit_test(test_invalid_utf8),
        cmocka_unit_test(test_no_injection),
        cmocka_unit_test(test_added_tokens),
        cmocka_unit_test(test_plain_words),
        cmocka_unit_test(test_long_equals_short),
        cmocka_unit_test(test_long_runs),
        cmocka_unit_test(test_long_runs_llama3),
        cmocka_unit_test(test_stream),
        cmocka_unit_test(test_chat),
        cmocka_unit_test(test_chat_llama3),
        cmocka_unit_test(test_write_bytes),
        cmocka_unit_test(test_write_verbatim),
        cmocka_unit_test(test_write_llama3),
        cmocka_unit_test(test_write_fails),
        cmocka_unit_test(test_config),
        cmocka_unit_test(test_json_that_lies),
        cmocka_unit_test(test_small_model),
        cmocka_unit_test(test_model_that_lies),
        cmocka_unit_test(test_open_fails),
    };
    // clang-format on
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
