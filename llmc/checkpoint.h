/*
Checkpoints: a training run's folders, of which a kill at any moment leaves the last whole one.

    OUT/log.jsonl
    OUT/step-00000100/      whole, always: it appears and disappears by a rename
    OUT/.tmp-step-…/        being written or being deleted; the next checkpoint removes what a kill left

    checkpoint_begin        makes OUT/.tmp-step-…; the caller writes files into checkpoint.path
    checkpoint_commit       files and folder onto the disk, rename to OUT/step-…, OUT onto the disk; then those beyond
                            keep go, oldest first
    checkpoint_abandon      instead of commit, after an error: removes what was written; earlier ones are untouched

One program writes to an OUT at a time. What lies in a checkpoint is the caller's matter.
Proved by       dev/test/test_checkpoint.c: killed while writing, a full disk, a read-only folder
*/
#pragma once

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "error.h"
#include "file.h"

typedef struct {
    char out[PATH_SIZE];
    char path[PATH_SIZE]; // write files here
    int64_t step;
} Checkpoint;

// ---- folders ---------------------------------------------------------------------------------

// removes a file, or a folder with all that is in it; symbolic links are not followed
static inline bool remove_all(const char* path, Error* err) {
    struct stat s;
    if (lstat(path, &s) != 0) return errno == ENOENT || set_error(err, "cannot remove %s: %s", path, strerror(errno));
    bool folder = S_ISDIR(s.st_mode), ok = true;
    DIR* d = folder ? opendir(path) : NULL;
    for (struct dirent* e; ok && d && (e = readdir(d));) {
        char inner[PATH_SIZE];
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        ok = path_join(inner, path, e->d_name, err) && remove_all(inner, err);
    }
    if (d) closedir(d);
    if (ok && (folder ? rmdir(path) : unlink(path)) != 0)
        ok = set_error(err, "cannot remove %s: %s", path, strerror(errno));
    return ok;
}

// a file's or folder's contents onto the disk
static inline bool sync_path(const char* path, Error* err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool ok = fd >= 0 && (fsync(fd) == 0 || errno == EINVAL); // EINVAL: a file system that has no fsync for folders
    if (!ok) set_error(err, "cannot flush %s to the disk: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

// every file in folder, then the folder itself
static inline bool sync_folder(const char* folder, Error* err) {
    DIR* d = opendir(folder);
    bool ok = d || set_error(err, "cannot read the folder %s: %s", folder, strerror(errno));
    for (struct dirent* e; ok && (e = readdir(d));) {
        char path[PATH_SIZE];
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        ok = path_join(path, folder, e->d_name, err) &&
             (is_folder(path) ? sync_folder(path, err) : sync_path(path, err));
    }
    if (d) closedir(d);
    return ok && sync_path(folder, err);
}

// ---- finding ---------------------------------------------------------------------------------

// OUT/PREFIXstep-00000100 into path
static inline bool checkpoint_path(char* path, const char* out, const char* prefix, int64_t step, Error* err) {
    char name[64];
    snprintf(name, sizeof name, "%sstep-%08" PRId64, prefix, step);
    return path_join(path, out, name, err);
}

// the step of a name such as step-00000100; -1 for any other name
static inline int64_t checkpoint_step(const char* name) {
    if (strncmp(name, "step-", 5) != 0) return -1;
    size_t digits = strspn(name + 5, "0123456789");
    if (digits < 8 || digits > 18 || name[5 + digits] != 0) return -1;
    return strtoll(name + 5, NULL, 10);
}

static inline int checkpoint_compare(const void* a, const void* b) {
    int64_t x = *(const int64_t*)a, y = *(const int64_t*)b;
    return x < y ? -1 : x > y;
}

// the steps of the checkpoints in out, ascending; *steps is owned by the caller. A folder that is not there has none
static inline size_t checkpoint_list(const char* out, int64_t** steps) {
    size_t n = 0, capacity = 0;
    *steps = NULL;
    DIR* d = opendir(out);
    for (struct dirent* e; d && (e = readdir(d));) {
        char path[PATH_SIZE];
        Error ignored;
        int64_t step = checkpoint_step(e->d_name);
        if (step < 0 || !path_join(path, out, e->d_name, &ignored) || !is_folder(path)) continue;
        if (n == capacity) *steps = (int64_t*)reallocate(*steps, capacity = 2 * capacity + 16, sizeof **steps);
        (*steps)[n++] = step;
    }
    if (d) closedir(d);
    if (n) qsort(*steps, n, sizeof **steps, checkpoint_compare);
    return n;
}

// the newest checkpoint of a run
static inline bool checkpoint_latest(const char* out, char* path, size_t size, int64_t* step, Error* err) {
    int64_t* steps;
    char newest[PATH_SIZE];
    size_t n = checkpoint_list(out, &steps);
    int64_t last = n ? steps[n - 1] : -1;
    free(steps);
    if (n == 0) return set_error(err, "%s: no checkpoint (a folder such as step-00000100) in it", out);
    if (!checkpoint_path(newest, out, "", last, err)) return false;
    if ((size_t)snprintf(path, size, "%s", newest) >= size) return set_error(err, "path too long: %.100s…", newest);
    *step = last;
    return true;
}

// where the model named by `--model DIR` lies: DIR itself when it has a config.json, else its newest checkpoint
static inline bool checkpoint_resolve(const char* folder, char* path, size_t size, Error* err) {
    int64_t step;
    Error none;
    if (!is_folder(folder)) return set_error(err, "%s: no such folder", folder);
    if (folder_has(folder, "config.json"))
        return (size_t)snprintf(path, size, "%s", folder) < size || set_error(err, "path too long: %.100s…", folder);
    if (checkpoint_latest(folder, path, size, &step, &none)) return true;
    return set_error(err, "%s: neither config.json (a model) nor a folder such as step-00000100 (a run) in it", folder);
}

// where a new run goes: wanted, or wanted-2, wanted-3 … when it already holds a run. Makes nothing
static inline bool output_folder(const char* wanted, char* path, size_t size, Error* err) {
    size_t length = strlen(wanted);
    while (length > 1 && wanted[length - 1] == '/') length--;
    for (int i = 1; i < 100000; i++) {
        int64_t* steps;
        char suffix[16] = "";
        if (i > 1) snprintf(suffix, sizeof suffix, "-%d", i);
        if ((size_t)snprintf(path, size, "%.*s%s", (int)length, wanted, suffix) >= size)
            return set_error(err, "path too long: %.100s…", wanted);
        size_t n = checkpoint_list(path, &steps);
        free(steps);
        if (n == 0 && !folder_has(path, "log.jsonl")) return true;
    }
    return set_error(err, "%s: too many runs beside it", wanted);
}

// ---- writing ---------------------------------------------------------------------------------

// removes what earlier checkpoints did not finish
static inline bool checkpoint_clean(const char* out, Error* err) {
    DIR* d = opendir(out);
    bool ok = d || set_error(err, "cannot read the folder %s: %s", out, strerror(errno));
    for (struct dirent* e; ok && (e = readdir(d));) {
        char path[PATH_SIZE];
        if (strncmp(e->d_name, ".tmp-step-", 10) == 0)
            ok = path_join(path, out, e->d_name, err) && remove_all(path, err);
    }
    if (d) closedir(d);
    return ok;
}

static inline bool checkpoint_begin(Checkpoint* c, const char* out, int64_t step, Error* err) {
    c->step = step;
    if (snprintf(c->out, sizeof c->out, "%s", out) >= PATH_SIZE) return set_error(err, "path too long: %.100s…", out);
    return checkpoint_path(c->path, out, ".tmp-", step, err) && make_folders(out, err) && checkpoint_clean(out, err) &&
           make_folders(c->path, err);
}

static inline void checkpoint_abandon(Checkpoint* c) {
    Error ignored;
    remove_all(c->path, &ignored);
}

// gives the folder its name. A checkpoint of the same step changes places with it in one move; a file system that
// cannot do that has, between two renames, neither
static inline bool checkpoint_rename(const Checkpoint* c, Error* err) {
    char path[PATH_SIZE], old[PATH_SIZE];
    if (!checkpoint_path(path, c->out, "", c->step, err) ||
        !checkpoint_path(old, c->out, ".tmp-step-old-", c->step, err))
        return false;
    if (rename(c->path, path) == 0) return true;
    if (errno != ENOTEMPTY && errno != EEXIST) return set_error(err, "cannot rename %s: %s", c->path, strerror(errno));
#ifdef SYS_renameat2
    const unsigned exchange = 2; // RENAME_EXCHANGE of linux/fs.h
    if (syscall(SYS_renameat2, AT_FDCWD, c->path, AT_FDCWD, path, exchange) == 0) return true;
#endif
    if (rename(path, old) == 0 && rename(c->path, path) == 0) return true;
    return set_error(err, "cannot rename %s: %s", c->path, strerror(errno));
}

// takes the names of the oldest until keep are left (0: all are kept), never that of the one just written
static inline bool checkpoint_prune(const Checkpoint* c, int keep, Error* err) {
    int64_t* steps;
    size_t n = checkpoint_list(c->out, &steps), left = n;
    bool ok = true;
    for (size_t i = 0; i < n && ok && keep > 0 && left > (size_t)keep; i++) {
        char path[PATH_SIZE], doomed[PATH_SIZE];
        if (steps[i] == c->step) continue;
        ok = checkpoint_path(path, c->out, "", steps[i], err);
        ok = ok && checkpoint_path(doomed, c->out, ".tmp-", steps[i], err);
        if (ok && rename(path, doomed) != 0) ok = set_error(err, "cannot rename %s: %s", path, strerror(errno));
        left--;
    }
    free(steps);
    return ok;
}

// each change of names reaches the disk before anything that relies on it
static inline bool checkpoint_commit(Checkpoint* c, int keep, Error* err) {
    return sync_folder(c->path, err) && checkpoint_rename(c, err) && sync_path(c->out, err) &&
           checkpoint_prune(c, keep, err) && sync_path(c->out, err) && checkpoint_clean(c->out, err);
}
