/*
Whole files: read, mapped, written.

Reading         read_file copies a file of bounded size and ends it with a NUL; map_file shows it where it lies
Writing         a Writer fills PATH.tmp, flushes it to the disk and renames it to PATH: whoever looks at PATH sees
                all of the old file or all of the new one, whatever happens in between. What is no regular file (a
                pipe, /dev/null) is written directly
Errors          one line: the path and what the system said
Proved by       dev/test/test_files.c, dev/test/test_checkpoint.c (a full disk, a read-only folder)
*/
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

enum { PATH_SIZE = 4096 }; // room for any path, its NUL included

// puts "path: " before the line in err; returns false, like set_error
static inline bool error_in(Error* err, const char* path) {
    Error inner = *err;
    return set_error(err, "%.500s: %.500s", path, inner.text);
}

// ---- paths -----------------------------------------------------------------------------------

// folder/name into path (PATH_SIZE bytes)
static inline bool path_join(char* path, const char* folder, const char* name, Error* err) {
    size_t n = strlen(folder);
    const char* slash = n && folder[n - 1] == '/' ? "" : "/";
    if (snprintf(path, PATH_SIZE, "%s%s%s", folder, slash, name) < PATH_SIZE) return true;
    return set_error(err, "path too long: %.100s…/%.100s", folder, name);
}

static inline bool is_folder(const char* path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

static inline bool file_exists(const char* path) {
    struct stat s;
    return stat(path, &s) == 0;
}

// whether folder holds something called name
static inline bool folder_has(const char* folder, const char* name) {
    char path[PATH_SIZE];
    Error ignored;
    return path_join(path, folder, name, &ignored) && file_exists(path);
}

// makes the folder, and those above it that are missing
static inline bool make_folders(const char* path, Error* err) {
    char partial[PATH_SIZE];
    if (!*path) return set_error(err, "the name of the folder is empty");
    if (snprintf(partial, sizeof partial, "%s", path) >= PATH_SIZE)
        return set_error(err, "path too long: %.100s…", path);
    for (char* p = partial + 1;; p++) {
        char kept = *p;
        if (kept != '/' && kept != 0) continue;
        *p = 0;
        int code = mkdir(partial, 0777) == 0 ? 0 : errno;
        if (code != 0 && !is_folder(partial))
            return set_error(err, "cannot make the folder %s: %s", partial, code == EEXIST ? "there is a file of that name" : strerror(code));
        if (kept == 0) return true;
        *p = kept;
    }
}

// ---- reading ---------------------------------------------------------------------------------

// all of a file (or pipe) of at most limit bytes into *text, owned by the caller, with a NUL after its *n bytes
static inline bool read_file(const char* path, char** text, size_t* n, size_t limit, Error* err) {
    *text = NULL, *n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat s;
    if (fd < 0 || fstat(fd, &s) != 0) {
        int code = errno;
        if (fd >= 0) close(fd);
        return set_error(err, "cannot read %s: %s", path, code == EEXIST ? "there is a file of that name" : strerror(code));
    }
    size_t size = 0, capacity = 1 << 16;
    if (S_ISREG(s.st_mode) && s.st_size >= 0 && (uint64_t)s.st_size < limit) capacity = (size_t)s.st_size + 2;
    char* bytes = (char*)allocate(capacity, 1);
    ssize_t got;
    while ((got = read(fd, bytes + size, capacity - size - 1)) != 0) {
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 || (size += (size_t)got) > limit) break;
        if (size + 1 == capacity) bytes = (char*)reallocate(bytes, capacity *= 2, 1);
    }
    int code = errno;
    close(fd);
    if (got != 0) {
        free(bytes);
        if (got < 0) return set_error(err, "cannot read %s: %s", path, code == EEXIST ? "there is a file of that name" : strerror(code));
        return set_error(err, "%s: too large, at most %zu bytes expected", path, limit);
    }
    bytes[size] = 0;
    *text = bytes, *n = size;
    return true;
}

// a file's bytes, read-only, loaded by the system as they are touched
typedef struct {
    const uint8_t* data;
    size_t size;
} Map;

static inline bool map_file(Map* map, const char* path, Error* err) {
    map->data = NULL, map->size = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return set_error(err, "cannot read %s: %s", path, strerror(errno));
    struct stat s;
    void* data = NULL;
    bool regular = fstat(fd, &s) == 0 && S_ISREG(s.st_mode);
    if (regular && s.st_size > 0) data = mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    int code = errno;
    close(fd);
    if (!regular) return set_error(err, "cannot read %s: not a regular file", path);
    if (data == MAP_FAILED) return set_error(err, "cannot map %s: %s", path, code == EEXIST ? "there is a file of that name" : strerror(code));
    map->data = (const uint8_t*)data, map->size = (size_t)s.st_size;
    return true;
}

static inline void unmap_file(Map* map) {
    if (map->data) munmap((void*)map->data, map->size);
    map->data = NULL, map->size = 0;
}

// ---- writing ---------------------------------------------------------------------------------

typedef struct {
    FILE* file;
    bool temporary; // partial is to be renamed to path
    char path[PATH_SIZE], partial[PATH_SIZE];
} Writer;

// gives up: closes the file and removes what was written of it
static inline void writer_abandon(Writer* w) {
    if (w->file) fclose(w->file);
    w->file = NULL;
    if (w->temporary) unlink(w->partial);
}

static inline bool writer_fail(Writer* w, Error* err) {
    int code = errno;
    writer_abandon(w);
    return set_error(err, "cannot write %s: %s", w->path, code == EEXIST ? "there is a file of that name" : strerror(code));
}

static inline bool writer_open(Writer* w, const char* path, Error* err) {
    struct stat s;
    w->file = NULL;
    w->temporary = stat(path, &s) != 0 || S_ISREG(s.st_mode);
    if (snprintf(w->path, PATH_SIZE, "%s", path) >= PATH_SIZE ||
        snprintf(w->partial, PATH_SIZE, "%s%s", path, w->temporary ? ".tmp" : "") >= PATH_SIZE)
        return set_error(err, "path too long: %.100s…", path);
    w->file = fopen(w->partial, "wbe");
    if (w->file) return true;
    w->temporary = false; // nothing of ours to remove
    return writer_fail(w, err);
}

// after a failure there is nothing left to close
static inline bool writer_put(Writer* w, const void* data, size_t n, Error* err) {
    return n == 0 || fwrite(data, 1, n, w->file) == n || writer_fail(w, err);
}

// the file is whole: onto the disk and under its name
static inline bool writer_close(Writer* w, Error* err) {
    if (fflush(w->file) != 0) return writer_fail(w, err);
    if (w->temporary && fsync(fileno(w->file)) != 0) return writer_fail(w, err);
    FILE* file = w->file;
    w->file = NULL;
    if (fclose(file) != 0) return writer_fail(w, err);
    if (w->temporary && rename(w->partial, w->path) != 0) return writer_fail(w, err);
    return true;
}

static inline bool write_file(const char* path, const void* data, size_t n, Error* err) {
    Writer w;
    return writer_open(&w, path, err) && writer_put(&w, data, n, err) && writer_close(&w, err);
}
