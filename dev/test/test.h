/*
What every test file includes: cmocka, and where the test data lies.

A test that needs real data (the Llama 3 tokenizer, trained weights, books) looks for it in $LLAMA3_DATA, else in
../shared/data, and says that it was skipped when the file is absent.
*/
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

// fails the test with a message of its own
#define test_fail(...)                                                                                                 \
    do {                                                                                                               \
        print_error(__VA_ARGS__);                                                                                      \
        print_error("\n");                                                                                             \
        fail();                                                                                                        \
    } while (0)

// the path of a data file, valid until the next call; skips the test when there is no such file
static inline const char* test_data(const char* name) {
    static char path[4096];
    const char* folder = getenv("LLAMA3_DATA");
    snprintf(path, sizeof path, "%s/%s", folder ? folder : "../shared/data", name);
    if (access(path, R_OK) != 0) {
        print_message("skipped: no %s (set LLAMA3_DATA to the folder of test data)\n", path);
        skip();
    }
    return path;
}
