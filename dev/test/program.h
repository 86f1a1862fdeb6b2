/*
What the tests of the finished program share: they run ./llama3 (or $LLAMA3_PROGRAM) as a person does and look at what it
prints, how it ends and which files it leaves.

    each test       runs in an empty folder of its own, removed afterwards; paths in it are relative to that folder
    run, start      fork and exec with an argument vector, no shell; stdout, stderr, exit code
    expect          notes what is wrong and goes on; a test with a complaint fails at its end
    make_model      a small model folder, written here from the format's description, not by the code under test
    edit            one substitution in a file of such a folder, which must find its text: a test cannot miss its target

Results and texts live until the end of the test.
*/
#pragma once

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include <cjson/cJSON.h>

#include "test.h"
#include "llmc/dtype.h"
#include "llmc/random.h"

// ---- texts and complaints --------------------------------------------------------------------

static void* kept[1 << 14]; // freed at the end of the test
static int n_kept, complaints;

static inline void* keep(void* p) {
    if (!p || n_kept == sizeof kept / sizeof kept[0]) test_fail("the test keeps too much");
    return kept[n_kept++] = p;
}

__attribute__((format(printf, 1, 2))) static inline char* text(const char* format, ...) {
    va_list args;
    char* p = NULL;
    va_start(args, format);
    if (vasprintf(&p, format, args) < 0) p = NULL;
    va_end(args);
    return (char*)keep(p);
}

// when what is false: says why and lets the test go on to its other checks; returns what
#define expect(what, ...)                                                                                              \
    ({                                                                                                                 \
        bool expected_ = (what);                                                                                       \
        if (!expected_) {                                                                                              \
            complaints++;                                                                                              \
            print_error("%s:%d: ", __FILE__, __LINE__);                                                                \
            print_error(__VA_ARGS__);                                                                                  \
            print_error("\n");                                                                                         \
        }                                                                                                              \
        expected_;                                                                                                     \
    })

static inline bool contains(const char* s, const char* part) { return strstr(s, part) != NULL; }

static inline int count_lines(const char* s) {
    int n = 0;
    for (; *s; s++) n += *s == '\n';
    return n;
}

// ---- files -----------------------------------------------------------------------------------

// the bytes of a file with NUL appended; the test fails when there is none
static inline char* file_bytes(const char* path, size_t* n) {
    FILE* f = fopen(path, "rb");
    if (!f) test_fail("no file %s", path);
    struct stat st;
    fstat(fileno(f), &st);
    char* bytes = (char*)keep(calloc(1, (size_t)st.st_size + 1));
    size_t got = fread(bytes, 1, (size_t)st.st_size, f);
    fclose(f);
    if (got != (size_t)st.st_size) test_fail("cannot read %s", path);
    if (n) *n = got;
    return bytes;
}

static inline void put_file(const char* path, const void* bytes, size_t n) {
    FILE* f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) test_fail("cannot write %s", path);
}

static inline void put_text(const char* path, const char* s) { put_file(path, s, strlen(s)); }

static inline bool exists(const char* path) { return access(path, F_OK) == 0; }

static inline bool same_file(const char* a, const char* b) {
    size_t na, nb;
    const char *x = file_bytes(a, &na), *y = file_bytes(b, &nb);
    return na == nb && memcmp(x, y, na) == 0;
}

static inline bool is_folder(const char* path) {
    struct stat st;
    return lstat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

// every path under a folder, sorted, one a line, with size and a hash of the contents
static inline char* tree(const char* folder) {
    struct dirent** entry;
    char* all = text("%s", "");
    int n = scandir(folder, &entry, NULL, alphasort);
    for (int i = 0; i < n; i++) {
        char* path = text("%s/%s", folder, entry[i]->d_name);
        bool dots = strcmp(entry[i]->d_name, ".") == 0 || strcmp(entry[i]->d_name, "..") == 0;
        free(entry[i]);
        if (dots) continue;
        if (is_folder(path)) {
            all = text("%s%s/\n%s", all, path, tree(path));
            continue;
        }
        size_t size;
        const char* bytes = file_bytes(path, &size);
        uint64_t hash = 14695981039346656037u;
        for (size_t j = 0; j < size; j++) hash = (hash ^ (uint8_t)bytes[j]) * 1099511628211u;
        all = text("%s%s %zu %016llx\n", all, path, size, (unsigned long long)hash);
    }
    if (n >= 0) free(entry);
    return all;
}

static inline int remove_entry(const char* path, const struct stat* st, int kind, struct FTW* where) {
    (void)st, (void)kind, (void)where;
    return remove(path);
}

static inline void remove_folder(const char* path) { nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }

static inline void copy_folder(const char* to, const char* from) {
    mkdir(to, 0777);
    DIR* d = opendir(from);
    if (!d) test_fail("no folder %s", from);
    for (struct dirent* e; (e = readdir(d));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        const char *source = text("%s/%s", from, e->d_name), *target = text("%s/%s", to, e->d_name);
        size_t n;
        if (is_folder(source)) {
            copy_folder(target, source);
        } else {
            const char* bytes = file_bytes(source, &n);
            put_file(target, bytes, n);
        }
    }
    closedir(d);
}

// ---- running the program ---------------------------------------------------------------------

static char program[PATH_MAX];

typedef struct {
    const char* input; // on stdin; NULL: nothing
    int threads;       // OMP_NUM_THREADS; 0: 1
    size_t file_limit; // no file may grow beyond so many bytes; 0: no limit
    int seconds;       // SIGALRM ends it then; 0: 120
    bool reader_gone;  // stdout is a pipe that nobody reads any more
    bool full;         // stdout is a full device
} How;

typedef struct {
    pid_t pid;
    FILE *out, *err;
    const char* command; // as a person would type it
} Process;

typedef struct {
    int code; // exit code, or minus the signal that ended it
    char *out, *err;
    const char* command;
} Result;

static inline Process start(How how, const char* const* args) {
    Process p = { 0, tmpfile(), tmpfile(), "llama3" };
    FILE* in = tmpfile();
    if (!p.out || !p.err || !in) test_fail("no temporary files");
    if (how.input) fputs(how.input, in);
    rewind(in);
    const char* argv[64] = { program };
    for (int i = 0; args[i]; i++) {
        argv[i + 1] = args[i];
        p.command = text(strpbrk(args[i], " \n<|") || !*args[i] ? "%s '%s'" : "%s %s", p.command, args[i]);
    }
    int gone[2] = { -1, -1 };
    if (how.reader_gone && (pipe(gone) != 0 || close(gone[0]) != 0)) test_fail("no pipe");
    int full = how.full ? open("/dev/full", O_WRONLY) : -1;
    int out = how.reader_gone ? gone[1] : how.full ? full : fileno(p.out);
    fflush(NULL);
    p.pid = fork();
    if (p.pid < 0) test_fail("cannot fork");
    if (p.pid == 0) {
        dup2(fileno(in), 0);
        dup2(out, 1);
        dup2(fileno(p.err), 2);
        signal(SIGPIPE, SIG_DFL);
        signal(SIGXFSZ, SIG_IGN);
        struct rlimit limit = { how.file_limit, how.file_limit };
        if (how.file_limit) setrlimit(RLIMIT_FSIZE, &limit);
        char threads[16];
        snprintf(threads, sizeof threads, "%d", how.threads ? how.threads : 1);
        setenv("OMP_NUM_THREADS", threads, 1);
        alarm((unsigned)(how.seconds ? how.seconds : 120));
        execv(program, (char* const*)argv);
        _exit(127);
    }
    fclose(in);
    if (how.reader_gone) close(gone[1]);
    if (how.full) close(full);
    return p;
}

static inline char* captured(FILE* f) {
    fseek(f, 0, SEEK_END);
    long n = ftell(f);
    rewind(f);
    char* s = (char*)keep(calloc(1, (size_t)n + 1));
    if (fread(s, 1, (size_t)n, f) != (size_t)n) test_fail("cannot read back the output");
    fclose(f);
    return s;
}

static inline Result finish(Process p) {
    int status = 0;
    while (waitpid(p.pid, &status, 0) < 0 && errno == EINTR) {}
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    return (Result){ code, captured(p.out), captured(p.err), p.command };
}

static const How AS_USUAL = { 0 };
#define ARGS(...) ((const char* const[]){ __VA_ARGS__, NULL })
#define RUN(...) finish(start(AS_USUAL, ARGS(__VA_ARGS__)))

// the end of a long text, where the reason stands
static inline const char* tail(const char* s) { return strlen(s) > 1500 ? s + strlen(s) - 1500 : s; }

// the run went well; returns it
static inline Result well(Result r) {
    expect(r.code == 0, "%s\n    exit %d, expected 0; stderr:\n%s", r.command, r.code, tail(r.err));
    return r;
}

// runs what must go well, or gives the test up: what follows needs its files
#define RUN_WELL(...)                                                                                                  \
    ({                                                                                                                 \
        Result well_ = well(RUN(__VA_ARGS__));                                                                         \
        if (well_.code != 0) fail();                                                                                   \
        well_;                                                                                                         \
    })

#define OUTPUT_OF(...) (RUN_WELL(__VA_ARGS__).out)

// ---- a user's mistake ------------------------------------------------------------------------

typedef struct {
    const char* word[6]; // what the message must name
} Words;
#define WORDS(...) ((Words){ { __VA_ARGS__ } })

// one line on stderr that begins with "error: " and names the words, exit 1, nothing on stdout
static inline void expect_error(Result r, Words words) {
    bool one_line = strncmp(r.err, "error: ", 7) == 0 && count_lines(r.err) == 1 && *r.out == 0;
    if (!expect(r.code == 1 && one_line,
                "%s\n    exit %d; expected 1, nothing on stdout and one line \"error: …\" on stderr:\n%.300s%.600s",
                r.command, r.code, r.out, r.err))
        return;
    for (int i = 0; i < 6 && words.word[i]; i++)
        expect(contains(r.err, words.word[i]), "%s\n    does not name \"%s\": %s", r.command, words.word[i], r.err);
}

// the same, and no file in the test's folder is made, changed or removed
static inline void expect_mistake(Words words, const char* const* args) {
    const char* before = tree(".");
    const How how = { .seconds = 10 };
    Result r = finish(start(how, args));
    expect_error(r, words);
    const char* after = tree(".");
    expect(strcmp(before, after) == 0, "%s\n    files before:\n%sfiles after:\n%.2000s", r.command, before, after);
}

// ---- models and data made here ---------------------------------------------------------------

typedef struct {
    int V, C, L, NH, NKV, HD, F, context;
    bool tied;
    Dtype dtype;
    uint64_t seed;
} Shape;

// 261 tokens: bytes and Llama 3's special ones. 26,944 parameters
static const Shape SMALL = { 261, 32, 2, 4, 2, 8, 64, 64, true, DTYPE_F32, 1 };

typedef struct {
    const char* header; // grows
    char* data;
    size_t bytes;
    uint64_t seed, n;
    Dtype dtype;
} TensorFile;

// appends a tensor: random numbers, or ones when std is 0
static inline void add_tensor(TensorFile* f, const char* name, int rows, int cols, float std) {
    size_t size = (size_t)(rows ? rows : 1) * (size_t)cols, width = dtype_bytes(f->dtype), begin = f->bytes;
    f->bytes += size * width;
    f->data = (char*)realloc(f->data, f->bytes);
    for (size_t i = 0; i < size; i++) {
        float x = std != 0 ? std * random_normal(f->seed, f->n, i) : 1;
        uint32_t bits = f->dtype == DTYPE_F32   ? bits_of_float(x)
                        : f->dtype == DTYPE_F16 ? float_to_f16(x)
                                                : float_to_bf16(x);
        memcpy(f->data + begin + i * width, &bits, width); // little-endian
    }
    f->n++;
    f->header = text("%s,\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", f->header, name,
                     dtype_name(f->dtype), rows ? text("%d,%d", rows, cols) : text("%d", cols), begin, f->bytes);
}

static inline void put_safetensors(const char* path, const char* header, const void* data, size_t bytes) {
    uint64_t length = strlen(header);
    char* all = (char*)keep(malloc(8 + length + bytes));
    memcpy(all, &length, 8);
    memcpy(all + 8, header, length);
    memcpy(all + 8 + length, data, bytes);
    put_file(path, all, 8 + length + bytes);
}

// config.json as transformers 4 writes it
static inline void make_config(const char* folder, Shape s) {
    put_text(text("%s/config.json", folder),
             text("{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": %d, "
                  "\"intermediate_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": %d, "
                  "\"num_key_value_heads\": %d, \"head_dim\": %d, \"vocab_size\": %d, \"max_position_embeddings\": %d, "
                  "\"rms_norm_eps\": 1e-05, \"rope_theta\": 10000.0, \"rope_scaling\": null, "
                  "\"tie_word_embeddings\": %s, \"hidden_act\": \"silu\", \"attention_bias\": false, "
                  "\"mlp_bias\": false, \"bos_token_id\": %d, \"eos_token_id\": %d, \"torch_dtype\": \"float32\"}\n",
                  s.C, s.F, s.L, s.NH, s.NKV, s.HD, s.V, s.context, s.tied ? "true" : "false", s.V > 260 ? 256 : 1,
                  s.V > 260 ? 257 : 2));
}

// a model folder with config.json and model.safetensors, no tokenizer. The weights are larger than a fresh model's, so
// that its predictions differ
static inline void make_model(const char* folder, Shape s) {
    mkdir(folder, 0777);
    make_config(folder, s);
    TensorFile f = { "{\"__metadata__\":{\"format\":\"pt\"}", NULL, 0, s.seed, 0, s.dtype };
    const float std = 0.25f;
    add_tensor(&f, "model.embed_tokens.weight", s.V, s.C, std);
    for (int l = 0; l < s.L; l++) {
        const char* layer = text("model.layers.%d", l);
        add_tensor(&f, text("%s.input_layernorm.weight", layer), 0, s.C, 0);
        add_tensor(&f, text("%s.self_attn.q_proj.weight", layer), s.NH * s.HD, s.C, std);
        add_tensor(&f, text("%s.self_attn.k_proj.weight", layer), s.NKV * s.HD, s.C, std);
        add_tensor(&f, text("%s.self_attn.v_proj.weight", layer), s.NKV * s.HD, s.C, std);
        add_tensor(&f, text("%s.self_attn.o_proj.weight", layer), s.C, s.NH * s.HD, std);
        add_tensor(&f, text("%s.post_attention_layernorm.weight", layer), 0, s.C, 0);
        add_tensor(&f, text("%s.mlp.gate_proj.weight", layer), s.F, s.C, std);
        add_tensor(&f, text("%s.mlp.up_proj.weight", layer), s.F, s.C, std);
        add_tensor(&f, text("%s.mlp.down_proj.weight", layer), s.C, s.F, std);
    }
    add_tensor(&f, "model.norm.weight", 0, s.C, 0);
    if (!s.tied) add_tensor(&f, "lm_head.weight", s.V, s.C, std);
    put_safetensors(text("%s/model.safetensors", folder), text("%s}", f.header), f.data, f.bytes);
    free(f.data);
}

// the offset of a tensor's first byte in a safetensors file; the test fails when it has no such tensor
static inline size_t tensor_offset(const char* path, const char* name, size_t* size) {
    const char* bytes = file_bytes(path, NULL);
    uint64_t length;
    memcpy(&length, bytes, 8);
    cJSON* header = cJSON_ParseWithLength(bytes + 8, length);
    const cJSON* at = cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItemCaseSensitive(header, name), "data_offsets");
    if (cJSON_GetArraySize(at) != 2) test_fail("%s has no tensor %s", path, name);
    size_t begin = (size_t)cJSON_GetArrayItem(at, 0)->valuedouble, end = (size_t)cJSON_GetArrayItem(at, 1)->valuedouble;
    cJSON_Delete(header);
    if (size) *size = end - begin;
    return 8 + length + begin;
}

// sets every number of an F32 tensor
static inline void fill_tensor(const char* path, const char* name, float value) {
    size_t n, size, at = tensor_offset(path, name, &size);
    char* bytes = file_bytes(path, &n);
    for (size_t i = 0; i + 4 <= size; i += 4) memcpy(bytes + at + i, &value, 4);
    put_file(path, bytes, n);
}

static inline char* replaced(const char* s, const char* from, const char* to) {
    const char* at = strstr(s, from);
    if (!at) test_fail("the text to edit does not contain: %s", from);
    return text("%.*s%s%s", (int)(at - s), s, to, at + strlen(from));
}

// substitutes in a text file, or in the header of a safetensors file, whose length is set right again
static inline void edit(const char* path, const char* from, const char* to) {
    size_t n;
    const char* bytes = file_bytes(path, &n);
    if (!contains(path, ".safetensors")) {
        put_text(path, replaced(bytes, from, to));
        return;
    }
    uint64_t length;
    memcpy(&length, bytes, 8);
    const char* header = replaced(text("%.*s", (int)length, bytes + 8), from, to);
    put_safetensors(path, header, bytes + 8 + length, n - 8 - length);
}

// llm.c's token file: 256 int32 of header, then the ids
static inline void put_bin(const char* path, const int* ids, size_t n, bool wide) {
    int32_t header[256] = { wide ? 20240801 : 20240520, wide ? 7 : 1, (int32_t)n };
    size_t width = wide ? 4 : 2;
    char* all = (char*)keep(calloc(1, sizeof header + n * width + 1));
    memcpy(all, header, sizeof header);
    for (size_t i = 0; i < n; i++) {
        uint32_t id = (uint32_t)ids[i];
        memcpy(all + sizeof header + i * width, &id, width); // little-endian
    }
    put_file(path, all, sizeof header + n * width);
}

// n ids below V with something to learn: each is a fixed function of the one before it, but for one in four
static inline int* make_ids(size_t n, int V, uint64_t seed) {
    int* ids = (int*)keep(calloc(n + 1, sizeof *ids));
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = random_bits(seed, 0, i);
        ids[i] = i && bits % 4 ? (ids[i - 1] * 5 + 3) % (V < 64 ? V : 64) : (int)(bits >> 8) % V;
        if (ids[i] < 0) ids[i] += V;
    }
    return ids;
}

static inline void make_data(const char* path, size_t n) { put_bin(path, make_ids(n, 256, 7), n, false); }

// gives a model folder a tokenizer.json: 256 bytes and Llama 3's special tokens, as the program itself writes it
static inline void give_tokenizer(const char* folder) {
    RUN_WELL("train", "--model", "tiny", "--steps", "0", "--out", "tiny");
    size_t n;
    const char* bytes = file_bytes("tiny/step-00000000/tokenizer.json", &n);
    put_file(text("%s/tokenizer.json", folder), bytes, n);
    remove_folder("tiny");
}

// ---- the group -------------------------------------------------------------------------------

typedef void Body(void);
static char scratch[PATH_MAX];
static bool own_mounts; // this process may mount file systems that nobody else sees

static inline int open_scratch(void** state) {
    (void)state;
    const char* tmp = getenv("TMPDIR");
    snprintf(scratch, sizeof scratch, "%s/llama3-test-XXXXXX", tmp ? tmp : "/tmp");
    complaints = 0;
    return mkdtemp(scratch) && chdir(scratch) == 0 ? 0 : -1;
}

static inline int close_scratch(void** state) {
    (void)state;
    int left = chdir("/");
    remove_folder(scratch);
    while (n_kept) free(kept[--n_kept]);
    return left;
}

static inline void run_body(void** state) {
    ((Body*)*state)();
    if (complaints) test_fail("%d complaints", complaints);
}

#define TEST(body)                                                                                                     \
    { #body, run_body, open_scratch, close_scratch, (void*)body }

#ifdef __linux__
static inline bool write_line(const char* path, const char* line) {
    FILE* f = fopen(path, "w");
    return f && fputs(line, f) >= 0 && fclose(f) == 0;
}

// a mount namespace of our own: as root at once, else inside a user namespace where the system allows it
static inline bool enter_own_mounts(void) {
    unsigned uid = getuid(), gid = getgid();
    if (unshare(CLONE_NEWNS) != 0) {
        char line[64];
        if (unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0) return false;
        write_line("/proc/self/setgroups", "deny");
        snprintf(line, sizeof line, "0 %u 1\n", uid);
        if (!write_line("/proc/self/uid_map", line)) return false;
        snprintf(line, sizeof line, "0 %u 1\n", gid);
        if (!write_line("/proc/self/gid_map", line)) return false;
    }
    return mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0;
}

// a file system of so many KB at folder, until unmount; the test is skipped where that is not allowed
static inline void mount_disk(const char* folder, int kilobytes) {
    mkdir(folder, 0777);
    if (!own_mounts || mount("tmpfs", folder, "tmpfs", 0, text("size=%dk", kilobytes)) != 0) {
        print_message("skipped: may not mount a file system (a full and a read-only disk)\n");
        skip();
    }
}

static inline bool make_disk_read_only(const char* folder) {
    return mount("none", folder, NULL, MS_REMOUNT | MS_RDONLY, NULL) == 0;
}

static inline void unmount_disk(const char* folder) { umount2(folder, MNT_DETACH); }
#else
static inline bool enter_own_mounts(void) { return false; }
static inline void mount_disk(const char* folder, int kilobytes) {
    (void)folder, (void)kilobytes;
    print_message("skipped: may not mount a file system (a full and a read-only disk)\n");
    skip();
}
static inline bool make_disk_read_only(const char* folder) { return folder == NULL; }
static inline void unmount_disk(const char* folder) { (void)folder; }
#endif

// finds the program and the data before the tests change folders. A sanitizer's report must not look like exit 1
static inline int open_group(void** state) {
    (void)state;
    const char *path = getenv("LLAMA3_PROGRAM"), *data = getenv("LLAMA3_DATA");
    char folder[PATH_MAX];
    if (!realpath(path ? path : "./llama3", program) || access(program, X_OK) != 0) {
        print_error("no program %s: run make llama3, or set LLAMA3_PROGRAM\n", path ? path : "./llama3");
        return -1;
    }
    if (realpath(data ? data : "../shared/data", folder)) setenv("LLAMA3_DATA", folder, 1);
    setenv("ASAN_OPTIONS", "exitcode=99", 1);
    setenv("UBSAN_OPTIONS", "exitcode=99:print_stacktrace=1", 1);
    own_mounts = enter_own_mounts();
    return 0;
}
