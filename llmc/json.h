/*
JSON, read strictly: what RFC 8259 calls JSON in UTF-8 and nothing else. cJSON builds the tree; it is lenient, so what
it lets pass is refused before and after:

    before      invalid UTF-8, a byte order mark, control characters, \u0000 (it would cut the string short), escapes
                that are not four hex digits, numbers such as 01 or 1. ; bytes after the value
    after       the same key twice in an object, numbers too large for a double

Nesting is limited to 1000 by cJSON. Numbers are doubles: json_whole gives those that are whole, exactly.
Look-ups are linear and case-sensitive: for large objects walk the children with cJSON_ArrayForEach.
Proved by       dev/test/test_files.c, dev/test/fuzz_json.c
*/
#pragma once

#include <cjson/cJSON.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "file.h"

// bytes of the UTF-8 character that begins at p and ends before end; 0 when there is no valid one
static inline int utf8_length(const unsigned char* p, const unsigned char* end) {
    unsigned char a = p[0];
    if (a < 0x80) return 1;
    int n = a >= 0xc2 && a <= 0xdf ? 2 : a >= 0xe0 && a <= 0xef ? 3 : a >= 0xf0 && a <= 0xf4 ? 4 : 0;
    if (n == 0 || end - p < n) return 0;
    for (int i = 1; i < n; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    if (a == 0xe0 && p[1] < 0xa0) return 0; // longer than needed
    if (a == 0xed && p[1] > 0x9f) return 0; // a surrogate
    if (a == 0xf0 && p[1] < 0x90) return 0; // longer than needed
    if (a == 0xf4 && p[1] > 0x8f) return 0; // beyond U+10FFFF
    return n;
}

static inline bool json_fail(Error* err, const char* text, const char* at, const char* what) {
    size_t line = 1, column = 1;
    for (const char* p = text; p < at; p++) column = *p == '\n' ? line++, 1 : column + 1;
    return set_error(err, "not valid JSON at line %zu, column %zu: %s", line, column, what);
}

static inline const char* json_digits(const char* p) {
    while (*p >= '0' && *p <= '9') p++;
    return p;
}

// the end of the number at p, NULL when it is not written as JSON wants it
static inline const char* json_number_end(const char* p) {
    if (*p == '-') p++;
    const char* digits = p;
    p = json_digits(p);
    if (p == digits || (*digits == '0' && p > digits + 1)) return NULL;
    if (*p == '.') {
        digits = ++p;
        if ((p = json_digits(p)) == digits) return NULL;
    }
    if (*p == 'e' || *p == 'E') {
        p++;
        if (*p == '+' || *p == '-') p++;
        digits = p;
        if ((p = json_digits(p)) == digits) return NULL;
    }
    return p;
}

// whether p begins with four hex digits that are not all 0
static inline bool json_unicode_escape(const char* p) {
    bool zero = true;
    for (int i = 0; i < 4; i++) {
        if (!(p[i] >= '0' && p[i] <= '9') && !(p[i] >= 'a' && p[i] <= 'f') && !(p[i] >= 'A' && p[i] <= 'F'))
            return false;
        zero = zero && p[i] == '0';
    }
    return !zero;
}

// the end of the string whose opening quote is at p, NULL when something in it is refused (*at: what)
static inline const char* json_string_end(const char* p, const char* end, const char** at, const char** what) {
    for (p++; p < end && *p != '"';) {
        *at = p;
        int n = utf8_length((const unsigned char*)p, (const unsigned char*)end);
        *what = n == 0 ? "invalid UTF-8" : "control character in a string";
        if (n == 0 || (unsigned char)*p < 0x20) return NULL;
        if (*p == '\\' && p + 1 < end) {
            *what = "\\u needs four hex digits, not all zero";
            if (p[1] == 'u' && !json_unicode_escape(p + 2)) return NULL;
            n = (unsigned char)p[1] < 0x80 ? 2 : 1;
        }
        p += n;
    }
    *at = end, *what = "a string without an end";
    return p < end ? p + 1 : NULL;
}

// refuses what cJSON would let pass; text ends with a NUL
static inline bool json_check_text(const char* text, size_t n, Error* err) {
    const char *end = text + n, *at, *what;
    for (const char* p = text; p < end;) {
        if (*p == '"') {
            if (!(p = json_string_end(p, end, &at, &what))) return json_fail(err, text, at, what);
        } else if (*p == '-' || (*p >= '0' && *p <= '9')) {
            at = p;
            if (!(p = json_number_end(p))) return json_fail(err, text, at, "malformed number");
        } else if (((unsigned char)*p < 0x20 && !strchr("\t\n\r", *p)) || *p == 0 || (unsigned char)*p >= 0x7f) {
            return json_fail(err, text, p, "unexpected byte");
        } else {
            p++;
        }
    }
    return true;
}

static inline int json_compare_keys(const void* a, const void* b) {
    return strcmp(*(const char* const*)a, *(const char* const*)b);
}

static inline bool json_check_keys(const cJSON* object, Error* err) {
    size_t n = 0, i = 0;
    const cJSON* child;
    cJSON_ArrayForEach(child, object) n++;
    const char** keys = (const char**)allocate(n, sizeof *keys);
    cJSON_ArrayForEach(child, object) keys[i++] = child->string;
    qsort(keys, n, sizeof *keys, json_compare_keys);
    bool ok = true;
    for (i = 1; i < n && ok; i++)
        if (strcmp(keys[i - 1], keys[i]) == 0)
            ok = set_error(err, "the key \"%.100s\" occurs twice in one object", keys[i]);
    free(keys);
    return ok;
}

// refuses duplicate keys and infinite numbers anywhere in the tree
static inline bool json_check_tree(const cJSON* item, Error* err) {
    if (cJSON_IsNumber(item) && !isfinite(item->valuedouble))
        return set_error(err, "number too large%s%.100s", item->string ? ": " : "", item->string ? item->string : "");
    if (cJSON_IsObject(item) && !json_check_keys(item, err)) return false;
    const cJSON* child;
    cJSON_ArrayForEach(child, item) if (!json_check_tree(child, err)) return false;
    return true;
}

// the tree of a JSON text of n bytes, owned by the caller (cJSON_Delete); NULL with a line in err when it is not one
static inline cJSON* json_parse(const char* text, size_t n, Error* err) {
    char* copy = (char*)allocate(n + 1, 1); // cJSON needs the NUL
    if (n) memcpy(copy, text, n);
    cJSON* root = NULL;
    if (json_check_text(copy, n, err)) {
        const char* end = copy;
        root = cJSON_ParseWithLengthOpts(copy, n + 1, &end, true);
        if (!root) json_fail(err, copy, end, n ? "unexpected text" : "empty");
    }
    free(copy);
    if (root && !json_check_tree(root, err)) {
        cJSON_Delete(root);
        root = NULL;
    }
    return root;
}

// the value of a key; NULL when absent or when object is not an object
static inline const cJSON* json_get(const cJSON* object, const char* key) {
    return cJSON_IsObject(object) ? cJSON_GetObjectItemCaseSensitive(object, key) : NULL;
}

// the value of a whole number of at most 2^53 in size, which a double holds exactly; false for anything else
static inline bool json_whole(const cJSON* item, int64_t* value) {
    if (!cJSON_IsNumber(item) || !(fabs(item->valuedouble) <= 0x1p53)) return false;
    *value = (int64_t)item->valuedouble;
    return (double)*value == item->valuedouble;
}

// ---- writing ---------------------------------------------------------------------------------

// a finite number with digits enough that the same double is read again: cJSON's own printing may lose the last
// bit. Whole ones are written 8.0, as readers that tell floats from integers want it
static inline cJSON* json_float(double x) {
    require(isfinite(x), "JSON has finite numbers only");
    char text[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text - 2, "%.*g", digits, x);
        if (strtod(text, NULL) == x) break;
    }
    if (!strpbrk(text, ".e")) strcat(text, ".0");
    return cJSON_CreateRaw(text);
}

static inline void json_add_float(cJSON* object, const char* key, double x) { cJSON_AddItemToObject(object, key, json_float(x)); }

static inline void json_add_floats(cJSON* object, const char* key, const double* x, int n) {
    cJSON* array = cJSON_AddArrayToObject(object, key);
    for (int i = 0; i < n; i++) cJSON_AddItemToArray(array, json_float(x[i]));
}

// writes the tree to folder/name, and deletes the tree
static inline bool json_write(cJSON* root, const char* folder, const char* name, Error* err) {
    char path[PATH_SIZE], *text = cJSON_Print(root);
    cJSON_Delete(root);
    if (!text) die("out of memory for %s", name);
    Writer w;
    bool ok = path_join(path, folder, name, err) && writer_open(&w, path, err) &&
              writer_put(&w, text, strlen(text), err) && writer_put(&w, "\n", 1, err) && writer_close(&w, err);
    free(text);
    return ok;
}
