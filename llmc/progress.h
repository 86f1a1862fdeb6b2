/*
How far long work is: "reading books.txt: 34 %, 12s left" on stderr. Work that is done within a second and a half says
nothing. On a terminal the line is rewritten in place; elsewhere a new one is written every ten seconds.
*/
#pragma once

#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>

#include "log.h"

typedef struct {
    const char* what;    // "reading books.txt"; must outlive the work
    double total, done;  // in any unit
    double start, shown; // seconds; shown: when a line was last written
    bool terminal;
} Progress;

static inline void progress_begin(Progress* p, const char* what, double total) {
    p->what = what, p->total = total, p->done = 0;
    p->start = p->shown = now();
    p->terminal = isatty(STDERR_FILENO);
}

// amount more of the total is done
static inline void progress_add(Progress* p, double amount) {
    p->done += amount;
    double time = now(), every = p->shown == p->start ? 1.5 : p->terminal ? 0.2 : 10;
    if (time - p->shown < every || !(p->done > 0) || p->done > p->total) return;
    double left = (time - p->start) * (p->total / p->done - 1);
    fprintf(stderr, "%s%s: %.0f %%, %s left%s", p->terminal ? "\r" : "", p->what, 100 * p->done / p->total,
            duration(left), p->terminal ? "\033[K" : "\n");
    p->shown = time;
}

// takes the line off the terminal
static inline void progress_end(Progress* p) {
    if (p->terminal && p->shown != p->start) fputs("\r\033[K", stderr);
}
