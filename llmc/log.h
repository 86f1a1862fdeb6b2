/*
The log of a run: OUT/log.jsonl, one JSON object a line.

    {"step":12,"train_loss":3.21,"grad_norm":0.87,"lr":0.0004,"ms":41.2,"tok_s":49700}
    {"step":12,"val_loss":3.30}

A resumed run drops the lines of steps after the checkpoint it goes on from, so that each step stands once.
Proved by       dev/test/test_cli.c; drawn by scripts/plot_log.py
*/
#pragma once

#include <time.h>
#include <unistd.h>

#include "error.h"

typedef struct {
    FILE* file; // NULL: nothing is logged
} Log;

// seconds on a clock that only goes forward
static inline double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// keeps the whole lines of the log at path whose step is at most last_step, and drops the rest of the file
static inline bool log_cut(const char* path, int64_t last_step, Error* err) {
    FILE* file = fopen(path, "r");
    if (!file) return errno == ENOENT ? true : set_error(err, "cannot read %s: %s", path, strerror(errno));
    char line[512];
    long kept = 0;
    long long step;
    while (fgets(line, sizeof line, file) && strchr(line, '\n') && sscanf(line, "{\"step\":%lld,", &step) == 1 &&
           step <= last_step)
        kept = ftell(file);
    fclose(file);
    if (truncate(path, kept) != 0) return set_error(err, "cannot shorten %s: %s", path, strerror(errno));
    return true;
}

// opens OUT/log.jsonl to write on after last_step
static inline bool log_open(Log* log, const char* out, int64_t last_step, Error* err) {
    char path[4096];
    if (snprintf(path, sizeof path, "%s/log.jsonl", out) >= (int)sizeof path) return set_error(err, "%s: path too long", out);
    if (!log_cut(path, last_step, err)) return false;
    log->file = fopen(path, "a");
    return log->file ? true : set_error(err, "cannot write %s: %s", path, strerror(errno));
}

// writes one line, at once: a killed run has every step it finished
__attribute__((format(printf, 3, 4))) static inline bool log_line(Log* log, Error* err, const char* format, ...) {
    if (!log->file) return true;
    va_list args;
    va_start(args, format);
    bool ok = vfprintf(log->file, format, args) >= 0;
    va_end(args);
    ok = fputc('\n', log->file) != EOF && ok;
    ok = fflush(log->file) == 0 && ok;
    return ok ? true : set_error(err, "cannot write the log: %s", strerror(errno));
}

static inline void log_close(Log* log) {
    if (log->file) fclose(log->file);
    log->file = NULL;
}

// "1h02m", "3m20s", "45s": for estimates; valid until the next call
static inline const char* duration(double seconds) {
    static char text[32];
    long s = seconds > 0 && seconds < 1e9 ? (long)(seconds + 0.5) : 0;
    if (s >= 3600) snprintf(text, sizeof text, "%ldh%02ldm", s / 3600, s / 60 % 60);
    else if (s >= 60) snprintf(text, sizeof text, "%ldm%02lds", s / 60, s % 60);
    else snprintf(text, sizeof text, "%lds", s);
    return text;
}
