/*
HellaSwag as text: six lines a task.

    context             "activity: what happened so far"; what follows the first ": " is the context without the activity
    label               0 to 3, the index of the right ending
    four endings

A model scores by the ending to which it gives the highest probability, whole or per token.
Proved by       dev/test/test_data.c
Source          Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?"
*/
#pragma once

#include <stdbool.h>
#include <string.h>

#include "error.h"
#include "file.h"

enum { HELLASWAG_ENDINGS = 4, HELLASWAG_LINES = 2 + HELLASWAG_ENDINGS };

typedef struct {
    const char *context, *endings[HELLASWAG_ENDINGS];
    int label;
} HellaswagTask;

typedef struct {
    HellaswagTask* tasks;
    size_t n;
    char* text; // holds the strings of the tasks
} Hellaswag;

static inline void hellaswag_close(Hellaswag* h) {
    free(h->tasks), free(h->text);
    memset(h, 0, sizeof *h);
}

// takes line i (from 0) of the file into the list; lines beyond the last task make a new one
static inline bool hellaswag_line(Hellaswag* h, size_t i, char* line, const char* name, Error* err) {
    HellaswagTask* task = &h->tasks[i / HELLASWAG_LINES];
    int part = (int)(i % HELLASWAG_LINES);
    size_t n = strlen(line);
    if (n && line[n - 1] == '\r') line[n - 1] = 0;
    if (!*line) return set_error(err, "%s, line %zu: empty, expected six lines a task", name, i + 1);
    if (part == 1 && (line[0] < '0' || line[0] >= '0' + HELLASWAG_ENDINGS || line[1]))
        return set_error(err, "%s, line %zu: '%.40s' where the index of the right ending is expected, 0 to 3", name,
                         i + 1, line);
    if (part == 0)
        task->context = line;
    else if (part == 1)
        task->label = line[0] - '0';
    else
        task->endings[part - 2] = line;
    return true;
}

// splits text of n bytes and a NUL, which h then owns, into tasks
static inline bool hellaswag_parse(Hellaswag* h, const char* name, char* text, size_t n, Error* err) {
    size_t lines = 0;
    h->text = text, h->tasks = NULL, h->n = 0;
    for (size_t i = 0; i < n; i++) lines += text[i] == '\n' || i + 1 == n;
    h->tasks = (HellaswagTask*)allocate(lines / HELLASWAG_LINES + 1, sizeof *h->tasks);
    bool ok = memchr(text, 0, n) == NULL || set_error(err, "%s: a NUL byte in it, expected text", name);
    char* line = text;
    for (size_t i = 0; i < lines && ok; i++) {
        char* next = line + strcspn(line, "\n") + 1;
        next[-1] = 0;
        ok = hellaswag_line(h, i, line, name, err);
        line = next;
    }
    h->n = lines / HELLASWAG_LINES;
    if (ok && (h->n == 0 || lines % HELLASWAG_LINES))
        ok = set_error(err, "%s: %zu lines, expected six a task", name, lines);
    if (!ok) hellaswag_close(h);
    return ok;
}

static inline bool hellaswag_open(Hellaswag* h, const char* path, Error* err) {
    char* text;
    size_t n;
    memset(h, 0, sizeof *h);
    if (!read_file(path, &text, &n, (size_t)1 << 30, err)) return false;
    if (n >= 2 && (unsigned char)text[0] == 0x1f && (unsigned char)text[1] == 0x8b) {
        free(text);
        return set_error(err, "%s is compressed: unpack it first with gunzip -k %s", path, path);
    }
    return hellaswag_parse(h, path, text, n, err);
}
