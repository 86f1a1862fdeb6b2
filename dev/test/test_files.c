/*
Files and what is in them: number formats, JSON, safetensors, config.json. Half of the tests are about what must be
refused, with a line that names the culprit.
*/
#include <math.h>

#include "test.h"
#include "llmc/check.h"
#include "llmc/checkpoint.h"
#include "llmc/config.h"

static char scratch[PATH_SIZE]; // a folder of this test's own

static int set_up(void** state) {
    (void)state;
    const char* tmp = getenv("TMPDIR");
    snprintf(scratch, sizeof scratch, "%s/test_files.XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(scratch) ? 0 : -1;
}

static int tear_down(void** state) {
    (void)state;
    Error err;
    return remove_all(scratch, &err) ? 0 : -1;
}

// a path in the scratch folder, valid until the call after the next
static const char* in_scratch(const char* name) {
    static char path[2][PATH_SIZE];
    static int turn = 0;
    turn = !turn;
    Error err;
    assert_true(path_join(path[turn], scratch, name, &err));
    return path[turn];
}

static void expect_error(bool ok, const Error* err, const char* what, const char* fragment) {
    if (ok) test_fail("%s: accepted, expected an error with \"%s\"", what, fragment);
    if (!strstr(err->text, fragment)) test_fail("%s: \"%s\", expected \"%s\" in it", what, err->text, fragment);
    if (strchr(err->text, '\n')) test_fail("%s: more than one line: %s", what, err->text);
}

static void expect_contents(const char* path, const char* want) {
    Error err;
    char* text;
    size_t n;
    if (!read_file(path, &text, &n, 1 << 20, &err)) test_fail("%s", err.text);
    if (n != strlen(want) || strcmp(text, want) != 0) test_fail("%s: \"%s\", expected \"%s\"", path, text, want);
    free(text);
}

// ---- dtype.h ---------------------------------------------------------------------------------

// the value of a 16-bit float by its definition
static double value_of(uint16_t h, int exponent_bits) {
    int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = h >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = h & ((1 << mantissa_bits) - 1);
    double sign = h & 0x8000 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) return mantissa ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

static void check_patterns(float wide(uint16_t), uint16_t narrow(float), int exponent_bits) {
    for (uint32_t h = 0; h < 0x10000; h++) {
        float got = wide((uint16_t)h);
        double want = value_of((uint16_t)h, exponent_bits);
        if (isnan(want)) {
            if (!isnan(got) || !isnan(wide(narrow(got)))) test_fail("%04x: NaN does not stay NaN", h);
        } else if ((double)got != want || !signbit(got) != !signbit(want) || narrow(got) != h) {
            test_fail("%04x is %.9g, want %.9g; back: %04x", h, (double)got, want, narrow(got));
        }
    }
}

// between two neighbours: what lies half-way goes to the even one, what lies beside that to the nearer
static void check_rounding(float wide(uint16_t), uint16_t narrow(float), uint16_t infinity) {
    for (uint16_t h = 0; h < infinity; h++) {
        uint16_t above = (uint16_t)(h + 1), even = h & 1 ? above : h;
        double low = (double)wide(h), high = (double)wide(above);
        if (above == infinity) high = 2 * low - (double)wide((uint16_t)(h - 1)); // where the next number would lie
        float half = (float)((low + high) / 2);
        assert_true((double)half == (low + high) / 2);
        if (narrow(half) != even || narrow(-half) != (even | 0x8000))
            test_fail("above %04x: half-way is not rounded to even", h);
        if (narrow(nextafterf(half, 0)) != h || narrow(nextafterf(half, INFINITY)) != above)
            test_fail("above %04x: not rounded to the nearest", h);
    }
    assert_int_equal(narrow(INFINITY), infinity);
    assert_int_equal(narrow(-INFINITY), infinity | 0x8000);
    assert_true(isnan(wide(narrow(NAN))) && isnan(wide(narrow(float_from_bits(0x7f800001))))); // a signalling one too
}

static void test_dtype(void** state) {
    (void)state;
    check_patterns(bf16_to_float, float_to_bf16, 8);
    check_patterns(f16_to_float, float_to_f16, 5);
    check_rounding(bf16_to_float, float_to_bf16, 0x7f80);
    check_rounding(f16_to_float, float_to_f16, 0x7c00);
}

static void test_tensor_get(void** state) {
    (void)state;
    uint8_t bytes[16];
    const float value = -1.5f;
    const uint16_t bf16 = float_to_bf16(value), f16 = float_to_f16(value);
    for (size_t offset = 0; offset < 4; offset++) {
        memcpy(bytes + offset + 4, &value, 4);
        assert_true(tensor_get((Tensor){ bytes + offset, DTYPE_F32 }, 1) == value);
        memcpy(bytes + offset + 2, &bf16, 2);
        assert_true(tensor_get((Tensor){ bytes + offset, DTYPE_BF16 }, 1) == value);
        memcpy(bytes + offset + 2, &f16, 2);
        assert_true(tensor_get((Tensor){ bytes + offset, DTYPE_F16 }, 1) == value);
    }
}

// ---- file.h ----------------------------------------------------------------------------------

static void test_read_and_map(void** state) {
    (void)state;
    Error err;
    char* text;
    size_t n;
    Map map;
    const char* path = in_scratch("file");
    expect_error(read_file(path, &text, &n, 100, &err), &err, "no file", "No such file");
    expect_error(map_file(&map, path, &err), &err, "no file", "No such file");
    expect_error(read_file(scratch, &text, &n, 100, &err), &err, "a folder", "Is a directory");
    expect_error(map_file(&map, scratch, &err), &err, "a folder", "not a regular file");
    assert_true(write_file(path, "", 0, &err));
    expect_contents(path, "");
    assert_true(map_file(&map, path, &err));
    assert_int_equal(map.size, 0);
    unmap_file(&map);
    assert_true(write_file(path, "hello", 5, &err));
    expect_contents(path, "hello");
    assert_true(read_file(path, &text, &n, 5, &err)); // the limit itself is allowed
    free(text);
    expect_error(read_file(path, &text, &n, 4, &err), &err, "over the limit", "at most 4 bytes");
    assert_true(map_file(&map, path, &err));
    assert_memory_equal(map.data, "hello", 5);
    unmap_file(&map);
}

static void test_read_pipe(void** state) {
    (void)state;
    const size_t size = 60000; // fits a pipe, and not the first buffer's half
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    char *bytes = allocate(size, 1), path[64], *text;
    for (size_t i = 0; i < size; i++) bytes[i] = (char)(i * 7 % 251);
    assert_int_equal(write(ends[1], bytes, size), size);
    close(ends[1]);
    size_t n;
    Error err;
    snprintf(path, sizeof path, "/dev/fd/%d", ends[0]);
    assert_true(read_file(path, &text, &n, 1 << 20, &err));
    assert_int_equal(n, size);
    assert_memory_equal(text, bytes, size);
    close(ends[0]);
    free(text), free(bytes);
}

static void test_write(void** state) {
    (void)state;
    Error err;
    char path[PATH_SIZE];
    Writer w;
    snprintf(path, sizeof path, "%s", in_scratch("written"));
    assert_true(write_file(path, "old", 3, &err));
    assert_true(writer_open(&w, path, &err) && writer_put(&w, "half", 4, &err));
    writer_abandon(&w);
    expect_contents(path, "old"); // given up: the old file is there, whole
    assert_false(file_exists(in_scratch("written.tmp")));
    assert_true(write_file(path, "new", 3, &err));
    expect_contents(path, "new");
    expect_error(write_file(in_scratch("no/such/folder"), "x", 1, &err), &err, "no folder", "No such file");
    // a device is written to, not replaced (the link would be)
    assert_int_equal(symlink("/dev/full", in_scratch("full")), 0);
    expect_error(write_file(in_scratch("full"), "x", 1, &err), &err, "a full device", "No space left");
    assert_int_equal(symlink("/dev/null", in_scratch("null")), 0);
    assert_true(write_file(in_scratch("null"), "x", 1, &err));
    expect_contents(in_scratch("null"), "");
    assert_true(make_folders(in_scratch("a/b/c"), &err) && is_folder(in_scratch("a/b/c")));
    expect_error(make_folders(in_scratch("written/d"), &err), &err, "a file in the way", "written");
}

// ---- json.h ----------------------------------------------------------------------------------

static void test_json(void** state) {
    (void)state;
    const char* good[] = { "{}",
                           " [ ] \n",
                           "0",
                           "-0",
                           "-1.5e+3",
                           "\"\"",
                           "\"\\\\u0000\"",
                           "\"\\ud83d\\ude00\"",
                           "\"é😀\"",
                           "{\"a\":1,\"A\":2,\"b\":{\"a\":1}}",
                           "[true,false,null]",
                           "\"\\u00e9\\n\"" };
    const struct {
        const char *text, *fragment;
    } bad[] = {
        { "", "empty" },
        { "{\"a\":1,\"b\":2,\"a\":3}", "\"a\" occurs twice" },
        { "[{\"x\":{\"k\":1,\"k\":1}}]", "\"k\" occurs twice" },
        { "{} x", "line 1, column 4" },
        { "{\n\"a\":\n01}", "line 3, column 1: malformed number" },
        { "[1.]", "malformed number" },
        { "[.5]", "unexpected text" },
        { "[-]", "malformed number" },
        { "[1e]", "malformed number" },
        { "[+1]", "unexpected text" },
        { "[1e999]", "too large" },
        { "{\"a\":-1e999}", "too large: a" },
        { "[1,]", "unexpected text" },
        { "{\"a\":1,}", "unexpected text" },
        { "[nul]", "unexpected text" },
        { "[NaN]", "unexpected text" },
        { "\"abc", "without an end" },
        { "\"abc\\", "without an end" },
        { "\"abc\\\"", "without an end" },
        { "\"a\nb\"", "control character" },
        { "[\v1]", "unexpected byte" },
        { "\xef\xbb\xbf{}", "unexpected byte" },
        { "\"\\u0000\"", "\\u needs" },
        { "\"\\u12g4\"", "\\u needs" },
        { "\"\\ud800\"", "unexpected text" },
        { "\"\\x\"", "unexpected text" },
        { "\"\xff\"", "invalid UTF-8" },
        { "\"\xc0\x80\"", "invalid UTF-8" },
        { "\"\xe0\x80\x80\"", "invalid UTF-8" },
        { "\"\xed\xa0\x80\"", "invalid UTF-8" },
        { "\"\xf4\x90\x80\x80\"", "invalid UTF-8" },
        { "\"\xf0\x9f\x98\"", "invalid UTF-8" },
    };
    Error err;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        cJSON* root = json_parse(good[i], strlen(good[i]), &err);
        if (!root) test_fail("%s: %s", good[i], err.text);
        cJSON_Delete(root);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        cJSON* root = json_parse(bad[i].text, strlen(bad[i].text), &err);
        expect_error(root != NULL, &err, bad[i].text, bad[i].fragment);
    }
    expect_error(json_parse("[1]\0", 4, &err) != NULL, &err, "a NUL", "unexpected byte");
    expect_error(json_parse("\"a\0b\"", 5, &err) != NULL, &err, "a NUL in a string", "control character");
    char* deep = allocate(100001, 1);
    memset(deep, '[', 100000);
    expect_error(json_parse(deep, 100000, &err) != NULL, &err, "deep nesting", "unexpected text");
    free(deep);
}

static void test_json_get(void** state) {
    (void)state;
    Error err;
    const char text[] = "{\"Key\":1,\"key\":2,\"list\":[3]}";
    cJSON* root = json_parse(text, strlen(text), &err);
    assert_non_null(root);
    assert_true(json_get(root, "key")->valuedouble == 2);
    assert_null(json_get(root, "KEY"));
    assert_null(json_get(json_get(root, "list"), "key"));
    assert_null(json_get(NULL, "key"));
    cJSON_Delete(root);
}

static void test_json_whole(void** state) {
    (void)state;
    const struct {
        const char* text;
        bool whole;
        int64_t value;
    } cases[] = { { "0", true, 0 },
                  { "-7", true, -7 },
                  { "5e3", true, 5000 },
                  { "3000000000", true, 3000000000 },
                  { "9007199254740992", true, (int64_t)1 << 53 },
                  { "9007199254740994", false, 0 },
                  { "1e300", false, 0 },
                  { "1.5", false, 0 },
                  { "\"1\"", false, 0 },
                  { "null", false, 0 } };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error err;
        int64_t value = 0;
        cJSON* root = json_parse(cases[i].text, strlen(cases[i].text), &err);
        assert_non_null(root);
        assert_int_equal(json_whole(root, &value), cases[i].whole);
        if (cases[i].whole) assert_int_equal(value, cases[i].value);
        cJSON_Delete(root);
    }
    int64_t value;
    assert_false(json_whole(NULL, &value));
}

// doubles come back to the bit, and whole ones keep their point
static void test_json_write(void** state) {
    (void)state;
    Error err;
    char *text, path[PATH_SIZE];
    size_t n;
    const double numbers[] = {
        0, -0.0, 1, 1e-5, 0.1, 1.0 / 3, 5511111111111111111111.0, 1e300, 5e-324, 0x1.fffffffffffffp1023, -2.5
    };
    const int count = sizeof numbers / sizeof numbers[0];
    cJSON *root = cJSON_CreateObject(), *back;
    for (int i = 0; i < count; i++) {
        char key[16];
        snprintf(key, sizeof key, "%d", i);
        json_add_float(root, key, numbers[i]);
    }
    snprintf(path, sizeof path, "%s", in_scratch("numbers.json"));
    assert_true(json_write(root, scratch, "numbers.json", &err) && read_file(path, &text, &n, 10000, &err));
    assert_non_null(strstr(text, "1.0,"));
    back = json_parse(text, n, &err);
    if (!back) test_fail("%s", err.text);
    for (int i = 0; i < count; i++) {
        char key[16];
        snprintf(key, sizeof key, "%d", i);
        double got = json_get(back, key)->valuedouble;
        if (memcmp(&got, &numbers[i], sizeof got) != 0) test_fail("%.17g comes back as %.17g", numbers[i], got);
    }
    cJSON_Delete(back);
    free(text);
}

// a tokenizer has 128,000 keys: a check that compared each with each would take minutes here
static void test_json_many_keys(void** state) {
    (void)state;
    const int n = 200000;
    char *text = allocate((size_t)n, 20), *p = text;
    Error err;
    for (int i = 0; i < n; i++) p += sprintf(p, "%c\"key-%06d\":%d", i ? ',' : '{', i, i);
    p += sprintf(p, "}");
    cJSON* root = json_parse(text, (size_t)(p - text), &err);
    assert_non_null(root);
    cJSON_Delete(root);
    memcpy(strstr(text, "key-199999"), "key-000007", 10);
    expect_error(json_parse(text, (size_t)(p - text), &err) != NULL, &err, "the last key again",
                 "\"key-000007\" occurs twice");
    free(text);
}

// ---- safetensors.h ---------------------------------------------------------------------------

// a file with the given header and data bytes, each its own number, in a block of just that size: the sanitizer sees
// every step beyond it. Owned by the caller
static uint8_t* make_safetensors(const char* header, size_t data, size_t* size) {
    size_t length = strlen(header);
    *size = 8 + length + data;
    uint8_t* bytes = allocate(*size, 1);
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)((uint64_t)length >> 8 * i);
    memcpy(bytes + 8, header, length);
    for (size_t i = 0; i < data; i++) bytes[8 + length + i] = (uint8_t)i;
    return bytes;
}

static const char two_tensors[] = "{\"__metadata__\":{\"format\":\"pt\"},"
                                  "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[6,14]},"
                                  "\"a\":{\"dtype\":\"BF16\",\"shape\":[1,3],\"data_offsets\":[0,6]},"
                                  "\"none\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[6,6]},"
                                  "\"one\":{\"dtype\":\"BOOL\",\"shape\":[],\"data_offsets\":[14,15]}}";

static void test_safetensors_parse(void** state) {
    (void)state;
    Safetensors st;
    Error err;
    size_t size;
    uint8_t* bytes = make_safetensors(two_tensors, 15, &size);
    if (!safetensors_parse(&st, bytes, size, &err)) test_fail("%s", err.text);
    assert_int_equal(st.n, 4);
    const SafeTensor *a = safetensors_find(&st, "a"), *b = safetensors_find(&st, "b");
    assert_true(a && b && safetensors_find(&st, "none") && safetensors_find(&st, "one") && !safetensors_find(&st, "c"));
    assert_null(safetensors_find(&st, "__metadata__"));
    assert_string_equal(a->dtype, "BF16");
    assert_true(a->n_dims == 2 && a->shape[0] == 1 && a->shape[1] == 3 && a->bytes == 6 && a->data[5] == 5);
    assert_true(b->n_dims == 1 && b->shape[0] == 2 && b->bytes == 8 && b->data[0] == 6);
    safetensors_close(&st);
    assert_null(safetensors_find(&st, "a"));
    free(bytes);
}

static void test_safetensors_refused(void** state) {
    (void)state;
    const struct {
        const char* header;
        size_t data;
        const char* fragment;
    } bad[] = {
        { "", 4, "header: not valid JSON" },
        { "{", 4, "header: not valid JSON" },
        { "[]", 0, "not a JSON object" },
        { " {}", 0, "not a JSON object" },
        { "{}", 1, "the tensors end at byte 0 of the data, the file has 1" },
        { "{\"a\":1}", 0, "a: dtype is missing" },
        { "{\"a\":{\"dtype\":3,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "a: dtype" },
        { "{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "a: dtype F33 is not supported" },
        { "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "a: shape is missing" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "a: data_offsets" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, "a: data_offsets" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4, "a: data_offsets" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4.5]}}", 4, "a: data_offsets" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 4, "a: data_offsets" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4, "a: data_offsets" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,1e17]}}", 4, "a: data_offsets" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[\"0\",4]}}", 4, "a: data_offsets" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4,
          "a: ends at byte 8 of the data, the file has 4" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,4]}}", 4,
          "a: F32 [2, 3] takes 24 bytes, data_offsets give 4" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "a: dimension 0" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,0.5],\"data_offsets\":[0,4]}}", 4, "a: dimension 1" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,1073741824,1],\"data_offsets\":[0,0]}}", 0,
          "a: shape too large" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[9007199254740992,2048],\"data_offsets\":[0,0]}}", 0,
          "a: shape too large" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1,
          "a: more than 8 dimensions" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_"
          "offsets\":[2,4]}}",
          4, "\"a\" occurs twice" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_"
          "offsets\":[2,4]}}",
          4, "b: begins at byte 2 of the data, inside a, which ends at 3" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_"
          "offsets\":[2,4]}}",
          4, "b: begins at byte 2 of the data, 1 expected" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 4,
          "the tensors end at byte 2 of the data, the file has 4" },
    };
    Safetensors st;
    Error err;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        size_t size;
        uint8_t* bytes = make_safetensors(bad[i].header, bad[i].data, &size);
        expect_error(safetensors_parse(&st, bytes, size, &err), &err, bad[i].header, bad[i].fragment);
        free(bytes);
    }
    const uint8_t long_header[] = { 0, 0, 0, 0, 0, 0, 0, 0x80, '{', '}' },
                  beyond[] = { 3, 0, 0, 0, 0, 0, 0, 0, '{', '}' };
    expect_error(safetensors_parse(&st, long_header, sizeof long_header, &err), &err, "2^63",
                 "header of 9223372036854775808 bytes");
    expect_error(safetensors_parse(&st, beyond, sizeof beyond, &err), &err, "beyond the file",
                 "header of 3 bytes in a file of 10");
}

static void test_safetensors_truncated(void** state) {
    (void)state;
    size_t size;
    uint8_t* bytes = make_safetensors(two_tensors, 15, &size);
    for (size_t n = 0; n < size; n++) {
        Safetensors st;
        Error err;
        uint8_t* part = allocate(n, 1); // of just that size, so that the sanitizer sees a step beyond it
        memcpy(part, bytes, n);
        expect_error(safetensors_parse(&st, part, n, &err), &err, "truncated", "");
        free(part);
    }
    free(bytes);
}

// three tensors of different types, converted to every type on the way out
static void test_safetensors_write(void** state) {
    (void)state;
    enum { ROWS = 101, COLS = 173 }; // more numbers than the block that converts
    float* numbers = allocate(ROWS * COLS, sizeof *numbers);
    uint16_t* halves = allocate(ROWS * COLS, sizeof *halves);
    for (int i = 0; i < ROWS * COLS; i++) {
        numbers[i] = random_normal(3, 0, (uint64_t)i);
        halves[i] = float_to_f16(random_normal(3, 1, (uint64_t)i));
    }
    const Dtype dtypes[] = { DTYPE_F32, DTYPE_BF16, DTYPE_F16 };
    for (int d = 0; d < 3; d++) {
        SafetensorsEntry entries[] = {
            { "z.weight", { numbers, DTYPE_F32 }, dtypes[d], 2, { ROWS, COLS } },
            { "a.weight", { halves, DTYPE_F16 }, dtypes[d], 2, { ROWS, COLS } },
            { "vector", { numbers, DTYPE_F32 }, DTYPE_F32, 1, { COLS, 0 } },
        };
        Error err;
        Safetensors st;
        const char* path = in_scratch("written.safetensors");
        if (!safetensors_write(path, entries, 3, &err) || !safetensors_open(&st, path, &err)) test_fail("%s", err.text);
        assert_int_equal(st.n, 3);
        for (int e = 0; e < 3; e++) {
            const SafeTensor* t = safetensors_find(&st, entries[e].name);
            assert_non_null(t);
            assert_string_equal(t->dtype, dtype_name(entries[e].dtype));
            assert_true(t->n_dims == entries[e].n_dims && t->shape[0] == entries[e].shape[0]);
            Tensor got = { (void*)t->data, entries[e].dtype };
            for (size_t i = 0; i < safetensors_entry_size(&entries[e]); i++) {
                float want = tensor_get(entries[e].source, i);
                if (entries[e].dtype == DTYPE_BF16) want = bf16_to_float(float_to_bf16(want));
                if (entries[e].dtype == DTYPE_F16) want = f16_to_float(float_to_f16(want));
                if (tensor_get(got, i) != want) test_fail("%s[%zu]: %g, want %g", t->name, i, tensor_get(got, i), want);
            }
        }
        assert_int_equal((size_t)safetensors_find(&st, "z.weight")->data % 64, 0);
        safetensors_close(&st);
    }
    free(numbers), free(halves);
}

static void write_text(const char* folder, const char* name, const char* text) {
    char path[PATH_SIZE];
    Error err;
    if (!path_join(path, folder, name, &err) || !write_file(path, text, strlen(text), &err)) test_fail("%s", err.text);
}

static void write_shard(const char* folder, const char* file, const char* first, const char* second) {
    const float numbers[] = { 1, 2, 3, 4 };
    SafetensorsEntry entries[2] = { { "", { (void*)numbers, DTYPE_F32 }, DTYPE_F32, 1, { 3, 0 } },
                                    { "", { (void*)numbers, DTYPE_F32 }, DTYPE_F32, 1, { 4, 0 } } };
    snprintf(entries[0].name, sizeof entries[0].name, "%s", first);
    snprintf(entries[1].name, sizeof entries[1].name, "%s", second ? second : "");
    char path[PATH_SIZE];
    Error err;
    if (!path_join(path, folder, file, &err) || !safetensors_write(path, entries, second ? 2 : 1, &err))
        test_fail("%s", err.text);
}

static void test_safetensors_folder(void** state) {
    (void)state;
    char folder[PATH_SIZE];
    Safetensors st;
    Error err;
    snprintf(folder, sizeof folder, "%s", in_scratch("shards"));
    expect_error(safetensors_open(&st, folder, &err), &err, "no folder", "No such file");
    assert_true(make_folders(folder, &err));
    expect_error(safetensors_open(&st, folder, &err), &err, "empty folder", "neither model.safetensors nor");
    write_shard(folder, "1.safetensors", "c", "a");
    write_shard(folder, "2.safetensors", "b", NULL);
    write_shard(folder, "3.safetensors", "a", NULL);
    const struct {
        const char *index, *fragment;
    } cases[] = {
        { "{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\",\"c\":\"1.safetensors\"}}", NULL },
        { "{}", "weight_map is missing" },
        { "{\"weight_map\":{}}", "weight_map is empty" },
        { "{\"weight_map\":{\"a\":1}}", "is not the name of a file" },
        { "{\"weight_map\":{\"a\":\"../1.safetensors\"}}",
          "a: \"../1.safetensors\" is not the name of a file in this folder" },
        { "{\"weight_map\":{\"a\":\"..\"}}", "is not the name of a file" },
        { "{\"weight_map\":{\"a\":\"\"}}", "is not the name of a file" },
        { "{\"weight_map\":{\"a\":\".\"}}", "not a regular file" },
        { "{\"weight_map\":{\"a\":\"4.safetensors\"}}", "4.safetensors: No such file" },
        { "{\"weight_map\":{\"a\":\"2.safetensors\"}}", "a is not in 2.safetensors" },
        { "{\"weight_map\":{\"a\":\"1.safetensors\",\"d\":\"2.safetensors\"}}", "d is not in 2.safetensors" },
        { "{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\",\"c\":\"2.safetensors\"}}", "is not in" },
        { "{\"weight_map\":{\"a\":\"1.safetensors\",\"d\":\"3.safetensors\"}}", "a lies in two files" },
        { "{\"weight_map\":{\"a\":\"model.safetensors.index.json\"}}", "model.safetensors.index.json: header" },
        { "{\"weight_map\"", "model.safetensors.index.json: not valid JSON" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_text(folder, "model.safetensors.index.json", cases[i].index);
        bool ok = safetensors_open(&st, folder, &err);
        if (cases[i].fragment) {
            expect_error(ok, &err, cases[i].index, cases[i].fragment);
        } else {
            if (!ok) test_fail("%s", err.text);
            const SafeTensor *a = safetensors_find(&st, "a"), *b = safetensors_find(&st, "b");
            assert_true(st.n == 3 && st.n_shards == 2 && a && b && a->bytes == 16 && b->bytes == 12);
            assert_true(tensor_get((Tensor){ (void*)a->data, DTYPE_F32 }, 3) == 4);
            safetensors_close(&st);
        }
    }
    write_shard(folder, "model.safetensors", "whole", NULL); // comes before the index
    assert_true(safetensors_open(&st, folder, &err) && st.n == 1 && safetensors_find(&st, "whole"));
    safetensors_close(&st);
}

// ---- config.h --------------------------------------------------------------------------------

static bool same_config(const Config* a, const Config* b) {
    return a->C == b->C && a->L == b->L && a->NH == b->NH && a->NKV == b->NKV && a->HD == b->HD && a->F == b->F &&
           a->V == b->V && a->tied == b->tied && a->context == b->context && a->eps == b->eps && a->theta == b->theta &&
           a->factor == b->factor && a->low == b->low && a->high == b->high && a->original == b->original &&
           a->bos == b->bos && a->n_eos == b->n_eos && memcmp(a->eos, b->eos, (size_t)a->n_eos * sizeof a->eos[0]) == 0;
}

static void test_config_round_trip(void** state) {
    (void)state;
    char folder[PATH_SIZE];
    Error err;
    snprintf(folder, sizeof folder, "%s", in_scratch("config"));
    assert_true(make_folders(folder, &err));
    for (int i = 0; i < N_PRESETS; i++)
        for (int n_eos = 0; n_eos <= 3; n_eos++) {
            Config c, back;
            assert_true(config_preset(&c, presets[i].name));
            if (c.V == 0) c.V = 262;
            c.n_eos = n_eos;
            for (int e = 0; e < n_eos; e++) c.eos[e] = 257 + e;
            if (n_eos == 2) c.eps = 1.2345678e-6f, c.theta = 500000.0 / 3, c.tied = !c.tied;
            if (!config_write(&c, folder, DTYPE_BF16, &err) || !config_read(&back, folder, &err))
                test_fail("%s", err.text);
            if (!same_config(&c, &back))
                test_fail("%s with %d eos does not come back as it was written", presets[i].name, n_eos);
        }
}

static const char small_config[] = "{\"model_type\":\"llama\",\"hidden_size\":64,\"intermediate_size\":172,\"num_"
                                   "hidden_layers\":5,\"num_attention_heads\":8,"
                                   "\"num_key_value_heads\":4,\"vocab_size\":512,\"max_position_embeddings\":256,\"rms_"
                                   "norm_eps\":1e-5,\"rope_theta\":10000.0,"
                                   "\"bos_token_id\":1,\"eos_token_id\":[2,3],\"hidden_act\":\"silu\"}";

// small_config with one field set to a JSON value, or taken out when value is NULL
static bool parse_changed(Config* c, const char* field, const char* value, Error* err) {
    cJSON *root = cJSON_Parse(small_config), *item = value ? cJSON_Parse(value) : NULL;
    assert_true(root && (item || !value));
    cJSON_DeleteItemFromObjectCaseSensitive(root, field);
    if (item) cJSON_AddItemToObject(root, field, item);
    char* text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    bool ok = config_parse(c, text, strlen(text), err);
    free(text);
    return ok;
}

static void test_config_spellings(void** state) {
    (void)state;
    Config c;
    Error err;
    assert_true(parse_changed(&c, "unknown", "{\"x\":1}", &err));
    assert_true(c.C == 64 && c.F == 172 && c.L == 5 && c.NH == 8 && c.NKV == 4 && c.HD == 8 && c.V == 512 &&
                c.context == 256);
    assert_true(!c.tied && c.eps == 1e-5f && c.theta == 10000 && c.factor == 1 && c.bos == 1 && c.n_eos == 2 &&
                c.eos[1] == 3);
    assert_true(parse_changed(&c, "num_key_value_heads", NULL, &err) && c.NKV == 8);
    assert_true(parse_changed(&c, "num_key_value_heads", "null", &err) && c.NKV == 8);
    assert_true(parse_changed(&c, "head_dim", "32", &err) && c.HD == 32);
    assert_true(parse_changed(&c, "head_dim", "null", &err) && c.HD == 8);
    assert_true(parse_changed(&c, "tie_word_embeddings", "true", &err) && c.tied);
    assert_true(parse_changed(&c, "eos_token_id", "511", &err) && c.n_eos == 1 && c.eos[0] == 511);
    assert_true(parse_changed(&c, "eos_token_id", "null", &err) && c.n_eos == 0);
    assert_true(parse_changed(&c, "bos_token_id", NULL, &err) && c.bos == -1);
    assert_true(parse_changed(&c, "attention_bias", "false", &err) && parse_changed(&c, "mlp_bias", "null", &err));
    assert_true(parse_changed(&c, "quantization_config", "null", &err));
    const char* llama3[] = {
        // the scaling of Llama 3.2, four ways
        "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":32.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
        "\"original_max_position_embeddings\":8192},\"rope_theta\":500000.0}",
        "\"rope_scaling\":{\"type\":\"llama3\",\"factor\":32,\"low_freq_factor\":1,\"high_freq_factor\":4,"
        "\"original_max_position_embeddings\":8192},\"rope_theta\":500000}",
        "\"rope_parameters\":{\"rope_theta\":500000.0,\"rope_type\":\"llama3\",\"factor\":32.0,\"low_freq_factor\":1.0,"
        "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}}",
        "\"rope_theta\":500000.0,\"rope_scaling\":null,\"rope_parameters\":{\"rope_type\":\"llama3\",\"factor\":32.0,"
        "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}}",
    };
    for (int i = 0; i < 4; i++) {
        char text[2048];
        snprintf(
            text, sizeof text,
            "{\"model_type\":\"llama\",\"hidden_size\":64,\"intermediate_size\":172,\"num_hidden_layers\":5,"
            "\"num_attention_heads\":8,\"vocab_size\":512,\"max_position_embeddings\":256,\"rms_norm_eps\":1e-5,%s",
            llama3[i]);
        if (!config_parse(&c, text, strlen(text), &err)) test_fail("spelling %d: %s", i, err.text);
        assert_true(c.theta == 500000 && c.factor == 32 && c.low == 1 && c.high == 4 && c.original == 8192);
    }
    assert_true(parse_changed(&c, "rope_parameters", "{\"rope_type\":\"default\",\"rope_theta\":7}", &err));
    assert_true(c.theta == 7 && c.factor == 1);
    assert_true(parse_changed(&c, "rope_scaling", "{\"type\":\"default\"}", &err) && c.theta == 10000 && c.factor == 1);
}

static void test_config_refused(void** state) {
    (void)state;
#define LLAMA3(factor, low, high, original)                                                                            \
    "{\"rope_type\":\"llama3\",\"factor\":" factor ",\"low_freq_factor\":" low ",\"high_freq_factor\":" high original  \
    "}"
#define ORIGINAL ",\"original_max_position_embeddings\":8192"
    const struct {
        const char *field, *value, *fragment;
    } bad[] = {
        { "model_type", "\"mistral\"", "model_type is \"mistral\": expected \"llama\"" },
        { "model_type", NULL, "model_type is missing" },
        { "hidden_act", "\"gelu\"", "hidden_act is \"gelu\": expected \"silu\"" },
        { "attention_bias", "true", "attention_bias is true: expected false" },
        { "attention_bias", "1", "attention_bias is 1: expected true or false" },
        { "mlp_bias", "true", "mlp_bias is true: expected false" },
        { "quantization_config", "{\"bits\":4}", "quantization_config is {\"bits\":4}: expected none" },
        { "partial_rotary_factor", "0.5", "partial_rotary_factor is 0.5: expected 1" },
        { "hidden_size", NULL, "hidden_size is missing: expected a whole number" },
        { "hidden_size", "0", "hidden_size is 0" },
        { "hidden_size", "-64", "hidden_size is -64" },
        { "hidden_size", "64.5", "hidden_size is 64.5" },
        { "hidden_size", "\"64\"", "hidden_size is \"64\"" },
        { "hidden_size", "16777217", "hidden_size is 16777217: expected a whole number from 1 to 16777216" },
        { "hidden_size", "60", "hidden_size is 60: expected a multiple of num_attention_heads, 8" },
        { "hidden_size", "4294967360", "hidden_size is 4294967360" }, // 64 in the lower half
        { "intermediate_size", "1e300", "intermediate_size is 1e+300" },
        { "num_hidden_layers", "4097", "num_hidden_layers is 4097" },
        { "num_attention_heads", "null", "num_attention_heads is missing" },
        { "num_key_value_heads", "3", "num_key_value_heads is 3: expected a divisor of num_attention_heads, 8" },
        { "num_key_value_heads", "16", "num_key_value_heads is 16" },
        { "num_key_value_heads", "0", "num_key_value_heads is 0" },
        { "head_dim", "7", "head_dim is 7: expected an even number" },
        { "head_dim", "16777216", "head_dim is 16777216 with 8 + 2 * 4 heads" },
        { "vocab_size", "134217729", "vocab_size is 134217729" },
        { "max_position_embeddings", "0", "max_position_embeddings is 0" },
        { "rms_norm_eps", NULL, "rms_norm_eps is missing: expected a positive number" },
        { "rms_norm_eps", "0", "rms_norm_eps is 0" },
        { "rms_norm_eps", "1e-300", "rms_norm_eps is 1e-300" },
        { "tie_word_embeddings", "\"yes\"", "tie_word_embeddings is \"yes\"" },
        { "bos_token_id", "512", "bos_token_id is 512: expected a token id from 0 to 511" },
        { "eos_token_id", "-1", "eos_token_id is -1" },
        { "eos_token_id", "[1,512]", "eos_token_id is 512" },
        { "eos_token_id", "[1,[2]]", "eos_token_id is [2]" },
        { "eos_token_id", "[1,2,3,4,5,6,7,8,9]", "eos_token_id is a list of 9: expected at most 8" },
        { "rope_theta", NULL, "rope_theta is missing" },
        { "rope_theta", "-1", "rope_theta is -1" },
        { "rope_theta", "1e39", "rope_theta is" },
        { "rope_scaling", "4", "rope_scaling is 4: expected an object" },
        { "rope_parameters", "[]", "rope_parameters is []: expected an object" },
        { "rope_scaling", "{\"type\":\"yarn\",\"factor\":2}",
          "rope_type is \"yarn\": expected \"llama3\" or \"default\"" },
        { "rope_scaling", "{\"rope_type\":3}", "rope_type is 3" },
        { "rope_scaling", "{\"rope_type\":\"default\",\"partial_rotary_factor\":0.25}",
          "partial_rotary_factor is 0.25" },
        { "rope_scaling", "{\"rope_type\":\"llama3\"}", "factor is missing" },
        { "rope_scaling", LLAMA3("8", "1", "4", ""), "original_max_position_embeddings is missing" },
        { "rope_scaling", LLAMA3("0.5", "1", "4", ORIGINAL), "factor is 0.5: expected at least 1" },
        { "rope_scaling", LLAMA3("8", "4", "4", ORIGINAL),
          "low_freq_factor is 4: expected less than high_freq_factor" },
        { "rope_scaling", LLAMA3("8", "0", "4", ORIGINAL), "low_freq_factor is 0: expected a positive number" },
    };
    Config c;
    Error err;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        expect_error(parse_changed(&c, bad[i].field, bad[i].value, &err), &err, bad[i].field, bad[i].fragment);
    expect_error(config_parse(&c, "[]", 2, &err), &err, "a list", "expected a JSON object");
    expect_error(config_parse(&c, "{", 1, &err), &err, "half", "not valid JSON");
    const char huge[] =
        "{\"model_type\":\"llama\",\"hidden_size\":16777216,\"intermediate_size\":16777216,\"num_hidden_layers\":4096,"
        "\"num_attention_heads\":1,\"vocab_size\":1,\"max_position_embeddings\":1,\"rms_norm_eps\":1,\"head_dim\":2,"
        "\"rope_theta\":1}";
    expect_error(config_parse(&c, huge, strlen(huge), &err), &err, "huge", "more than 2^48 parameters");
}

static void test_config_folder(void** state) {
    (void)state;
    char folder[PATH_SIZE];
    Config c;
    Error err;
    snprintf(folder, sizeof folder, "%s", in_scratch("config-folder"));
    assert_true(make_folders(folder, &err));
    expect_error(config_read(&c, folder, &err), &err, "empty folder", "config-folder/config.json: No such file");
    write_text(folder, "config.json", small_config);
    assert_true(config_read(&c, folder, &err) && c.n_eos == 2 && c.eos[0] == 2);
    write_text(folder, "generation_config.json", "{\"eos_token_id\":[7,8,9]}");
    assert_true(config_read(&c, folder, &err) && c.n_eos == 3 && c.eos[0] == 7);
    write_text(folder, "generation_config.json", "{\"temperature\":0.6}");
    assert_true(config_read(&c, folder, &err) && c.n_eos == 2);
    write_text(folder, "generation_config.json", "{\"eos_token_id\":512}");
    expect_error(config_read(&c, folder, &err), &err, "id too large", "generation_config.json: eos_token_id is 512");
    write_text(folder, "generation_config.json", "");
    expect_error(config_read(&c, folder, &err), &err, "empty file", "generation_config.json: not valid JSON");
    write_text(folder, "config.json", "{}");
    expect_error(config_read(&c, folder, &err), &err, "empty config", "config.json: model_type is missing");
}

// ---- the tensors of a model ------------------------------------------------------------------

typedef struct {
    Config config;
    Params params;
    Param* list;
    SafetensorsEntry* entries;
    size_t n; // entries; the caller may take the last one off
    float* numbers;
} Model;

// a model with random numbers and the entries that write it; one entry more than it needs when it is tied: an lm_head
static void make_model(Model* m, bool tied) {
    memset(m, 0, sizeof *m);
    Error err;
    assert_true(parse_changed(&m->config, "tie_word_embeddings", tied ? "true" : "false", &err));
    m->config.L = 2;
    int n = llama3_count(&m->config);
    m->params.layer = allocate(2, sizeof *m->params.layer);
    m->list = allocate((size_t)n, sizeof *m->list);
    llama3_list(m->list, &m->params, &m->config);
    m->numbers = allocate(llama3_place(m->list, n, DTYPE_F32, NULL), 1);
    llama3_place(m->list, n, DTYPE_F32, m->numbers);
    llama3_init(m->list, n, 1);
    m->entries = allocate((size_t)n + 1, sizeof *m->entries);
    for (int i = 0; i < n; i++) {
        const Param* p = &m->list[i];
        SafetensorsEntry* e = &m->entries[m->n++];
        snprintf(e->name, sizeof e->name, "%s", p->name);
        e->source = *p->tensor;
        e->dtype = DTYPE_F32;
        e->n_dims = p->rows ? 2 : 1;
        e->shape[0] = p->rows ? p->rows : p->cols;
        e->shape[1] = p->rows ? p->cols : 0;
    }
    if (!tied) return;
    m->entries[m->n] = m->entries[0];
    snprintf(m->entries[m->n++].name, sizeof m->entries[0].name, "lm_head.weight");
}

static void free_model(Model* m) { free(m->params.layer), free(m->list), free(m->entries), free(m->numbers); }

// writes the entries, maps them onto the config; true when the numbers come back
static bool write_and_map(Model* m, Error* err) {
    const char* path = in_scratch("model.safetensors");
    Safetensors st;
    Params p;
    memset(&p, 0, sizeof p);
    if (!safetensors_write(path, m->entries, m->n, err) || !safetensors_open(&st, path, err))
        test_fail("%s", err->text);
    p.layer = allocate((size_t)m->config.L, sizeof *p.layer);
    bool ok = llama3_map(&p, &m->config, &st, err);
    if (ok) {
        int n = llama3_count(&m->config);
        Param* list = allocate((size_t)n, sizeof *list);
        llama3_list(list, &p, &m->config);
        for (int i = 0; i < n; i++)
            assert_memory_equal(list[i].tensor->data, m->list[i].tensor->data, param_size(&list[i]) * sizeof(float));
        if (m->config.tied) assert_ptr_equal(p.lm_head.data, p.embed.data);
        free(list);
    }
    safetensors_close(&st);
    free(p.layer);
    return ok;
}

static void test_map(void** state) {
    (void)state;
    Error err;
    for (int tied = 0; tied < 2; tied++) {
        Model m;
        make_model(&m, tied);
        if (!write_and_map(&m, &err)) test_fail("%s", err.text);
        SafetensorsEntry *q = &m.entries[2], kept = *q;
        assert_string_equal(q->name, "model.layers.0.self_attn.q_proj.weight");
        q->shape[0] = 32, q->shape[1] = 128;
        expect_error(write_and_map(&m, &err), &err, "shape", "q_proj.weight: shape is [32, 128]: expected [64, 64]");
        q->n_dims = 1, q->shape[0] = 64 * 64;
        expect_error(write_and_map(&m, &err), &err, "a vector", "q_proj.weight: shape is [4096]: expected [64, 64]");
        *q = kept;
        snprintf(q->name, sizeof q->name, "another");
        expect_error(write_and_map(&m, &err), &err, "missing", "model.layers.0.self_attn.q_proj.weight is missing");
        *q = kept;
        m.n--; // lm_head
        bool ok = write_and_map(&m, &err);
        if (tied)
            assert_true(ok);
        else
            expect_error(ok, &err, "untied", "lm_head.weight is missing");
        free_model(&m);
    }
}

static void test_map_dtype(void** state) {
    (void)state;
    Tensor w;
    Param param = { "w", &w, 2, 3, 0, false };
    const char* dtypes[] = { "F32", "BF16", "F16", "I32", "F64" };
    for (int i = 0; i < 5; i++) {
        char header[128];
        size_t size, bytes = 6 * (size_t)safetensors_dtype_bytes(dtypes[i]);
        Safetensors st;
        Error err;
        snprintf(header, sizeof header, "{\"w\":{\"dtype\":\"%s\",\"shape\":[2,3],\"data_offsets\":[0,%zu]}}",
                 dtypes[i], bytes);
        uint8_t* file = make_safetensors(header, bytes, &size);
        assert_true(safetensors_parse(&st, file, size, &err));
        bool ok = llama3_map_tensor(&param, &st, &err);
        if (i < 3)
            assert_true(ok && w.dtype == (Dtype)i);
        else
            expect_error(ok, &err, dtypes[i], "expected F32, BF16 or F16");
        safetensors_close(&st);
        free(file);
    }
}

// a model that others have trained and written
static void test_real_model(void** state) {
    (void)state;
    char folder[PATH_SIZE];
    snprintf(folder, sizeof folder, "%s", test_data("stories260K/hf"));
    Config c;
    Safetensors st;
    Params p;
    Error err;
    memset(&p, 0, sizeof p);
    if (!config_read(&c, folder, &err) || !safetensors_open(&st, folder, &err)) test_fail("%s", err.text);
    assert_true(c.C == 64 && c.L == 5 && c.NH == 8 && c.NKV == 4 && c.tied && c.theta == 10000);
    p.layer = allocate((size_t)c.L, sizeof *p.layer);
    if (!llama3_map(&p, &c, &st, &err)) test_fail("%s", err.text);
    assert_true(check_finite((double)tensor_get(p.layer[4].down, 64 * 172 - 1)));
    safetensors_close(&st);
    free(p.layer);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dtype),
        cmocka_unit_test(test_tensor_get),
        cmocka_unit_test(test_read_and_map),
        cmocka_unit_test(test_read_pipe),
        cmocka_unit_test(test_write),
        cmocka_unit_test(test_json),
        cmocka_unit_test(test_json_get),
        cmocka_unit_test(test_json_whole),
        cmocka_unit_test(test_json_write),
        cmocka_unit_test(test_json_many_keys),
        cmocka_unit_test(test_safetensors_parse),
        cmocka_unit_test(test_safetensors_refused),
        cmocka_unit_test(test_safetensors_truncated),
        cmocka_unit_test(test_safetensors_write),
        cmocka_unit_test(test_safetensors_folder),
        cmocka_unit_test(test_config_round_trip),
        cmocka_unit_test(test_config_spellings),
        cmocka_unit_test(test_config_refused),
        cmocka_unit_test(test_config_folder),
        cmocka_unit_test(test_map),
        cmocka_unit_test(test_map_dtype),
        cmocka_unit_test(test_real_model),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
