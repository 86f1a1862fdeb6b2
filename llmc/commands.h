/*
The command line of both programs: what it says of itself, the small commands, and the way to the others.

    train       train.h            generate chat   generate.h           eval   evaluate.h
    tokenize    text to ids        detokenize      ids to text          info   a model's shape, parameters, bytes, FLOPs

Proved by       dev/test/test_cli.c
*/
#pragma once

#include "corpus.h"
#include "evaluate.h"
#include "generate.h"
#include "params.h"
#include "train.h"

// ---- tokenize, detokenize --------------------------------------------------------------------

static inline void command_tokenize(Run* r) {
    Error err;
    Tokens ids = { NULL, 0, 0 };
    Map text;
    Progress progress;
    bool to_file = option_given(&r->o, "out");
    if (!r->o.data) die("tokenize needs --data: a text file");
    if (to_file == r->o.print_ids) die("tokenize needs --out FILE.bin or --print-ids, one of them");
    open_tokenizer(r);
    must(map_file(&text, r->o.data, &err), &err);
    progress_begin(&progress, "tokenizing", (double)text.size);
    if (r->o.bos && r->t.bos >= 0) tokens_push(&ids, r->t.bos);
    must(data_encode(&ids, (const char*)text.data, text.size, r->o.special, &r->t, &progress, &err), &err);
    progress_end(&progress);
    if (to_file) must(data_write_bin(r->o.out, ids.ids, ids.n, r->t.V, &err), &err);
    else print_ids(&ids);
    fprintf(stderr, "%zu bytes, %zu tokens\n", text.size, ids.n);
    unmap_file(&text);
    tokens_free(&ids);
}

static inline void command_detokenize(Run* r) {
    Tokens ids = { NULL, 0, 0 };
    if (!r->o.ids) die("detokenize needs --ids \"1 2 3\"");
    open_tokenizer(r);
    parse_ids(&ids, r->o.ids, r->t.V);
    print_pieces(&r->t, &ids, 0);
    printf("\n");
    tokens_free(&ids);
}

// ---- info ------------------------------------------------------------------------------------

// the shape of a preset, or of a folder whose tensors are all there; returns the bytes of its weights as stored, 0 of a preset
static inline double info_open(Run* r) {
    Error err;
    Safetensors file;
    double stored = 0;
    if (!r->o.model) die("info needs --model: a preset or a model folder");
    if (open_preset(r)) return 0;
    find_folder(r);
    must(config_read(&r->c, r->folder, &err) && safetensors_open(&file, r->folder, &err), &err);
    ParamSet s = params_list(&r->c);
    must(llama3_map(s.p, &r->c, &file, &err) || error_in(&err, r->folder), &err);
    for (int i = 0; i < s.n; i++) stored += (double)param_size(&s.list[i]) * (double)dtype_bytes(s.list[i].tensor->dtype);
    params_free(&s);
    safetensors_close(&file);
    return stored;
}

static inline void info_shape(const Config* c) {
    printf("width C                %d\n", c->C);
    printf("layers L               %d\n", c->L);
    printf("query heads NH         %d\n", c->NH);
    printf("key/value heads NKV    %d\n", c->NKV);
    printf("head size HD           %d\n", c->HD);
    printf("feed-forward F         %d\n", c->F);
    printf("vocabulary V           %d\n", c->V);
    printf("context                %d\n", c->context);
    printf("RoPE                   theta %g", c->theta);
    if (c->factor != 1) printf(", scaled by %g beyond %d", c->factor, c->original);
    printf("\n");
}

static inline void info_parameters(const Config* c) {
    ParamCount n = params_count(c);
    printf("parameters             %.0f\n", n.total);
    printf("  embedding            %.0f\n", n.embed);
    printf("  attention            %.0f\n", n.attention);
    printf("  feed-forward         %.0f\n", n.ffn);
    printf("  norms                %.0f\n", n.norms);
    if (c->tied) printf("  lm_head              the embedding\n");
    else printf("  lm_head              %.0f\n", n.head);
}

static inline void info_costs(const Config* c, double stored) {
    const double MiB = 0x1p20;
    double training;
    Error why;
    ParamCount n = params_count(c);
    int T = c->context < 2048 ? c->context : 2048, train_T = c->context < 256 ? c->context : 256;
    double forward = flops_per_token(c, T);
    printf("FLOPs per token        forward %.4g, training %.4g (T %d)\n", forward, 3 * forward, T);
    if (stored > 0) printf("weights                %.1f MiB as stored\n", stored / MiB);
    else printf("weights                %.1f MiB in F32, %.1f MiB in BF16\n", 4 * n.total / MiB, 2 * n.total / MiB);
    if (model_training_bytes(c, 8, train_T, &training, &why))
        printf("memory to train        %.1f MiB (B 8, T %d; %s)\n", training / MiB, train_T, model_storage());
    else printf("memory to train        not known here: %s\n", why.text);
    printf("memory to run          the weights and %.1f MiB (keys and values of %d tokens)\n", model_sequence_bytes(c, T) / MiB, T);
}

static inline void command_info(Run* r) {
    double stored = info_open(r);
    printf("model                  %s\n", r->folder[0] ? r->folder : r->o.model);
    info_shape(&r->c);
    info_parameters(&r->c);
    info_costs(&r->c, stored);
}

// ---- the way in ------------------------------------------------------------------------------

typedef struct {
    const char *name, *version;
    const char* usual; // the command when none is given; NULL: the help
    Corpus corpus;
} Program;

static inline void commands_help(const Program* p) {
    const char* program = p->name;
    printf("%s: train and run Llama 3 models\n\n  %s %s [--option value …]\n\n", program, program, p->usual ? "[COMMAND]" : "COMMAND");
    for (int i = 0; i < N_COMMANDS; i++) printf("  %-12s %s\n", commands[i].name, commands[i].what);
    printf("\n  %s COMMAND --help     the options of a command\n  %s --version\n\n", program, program);
    printf("To begin: %s train learns to write this program's own sources; then %s generate --model out\n\n", program, program);
    printf("Presets for --model of train and info:\n ");
    for (int i = 0; i < N_PRESETS; i++) printf(" %s", presets[i].name);
    printf("\n");
}

static inline bool is_word(const char* word, const char* a, const char* b) {
    return word && (strcmp(word, a) == 0 || strcmp(word, b) == 0);
}

static inline int command_run(Run* r, const Command* command, const Corpus* corpus) {
    int status = 0;
    switch (command->bit) {
    case TRAIN: status = command_train(r, corpus); break;
    case GENERATE: command_generate(r); break;
    case CHAT: command_chat(r); break;
    case EVAL: command_eval(r); break;
    case TOKENIZE: command_tokenize(r); break;
    case DETOKENIZE: command_detokenize(r); break;
    case INFO: command_info(r); break;
    }
    return status;
}

// what was printed is out, or an error
static inline void flush_output(void) {
    if (fflush(stdout) != 0) die("cannot write the output: %s", strerror(errno));
}

// the whole of main; returns the exit status
static inline int commands_main(const Program* program, int argc, char** argv) {
    Error err;
    const char* word = argc > 1 ? argv[1] : program->usual;
    if (!word || is_word(word, "--help", "-h") || is_word(word, "help", "help")) {
        commands_help(program);
        flush_output();
        return 0;
    }
    if (is_word(word, "--version", "-v")) {
        printf("%s %s\n", program->name, program->version);
        flush_output();
        return 0;
    }
    bool named = argc > 1 && !(program->usual && strncmp(word, "--", 2) == 0);
    int first = named ? 2 : 1; // of the options
    const Command* command = command_find(named ? word : program->usual);
    if (!command)
        die("'%s' is not a command: expected train, generate, chat, eval, tokenize, detokenize or info; see %s --help", word,
            program->name);
    for (int i = first; i < argc; i++)
        if (is_word(argv[i], "--help", "-h")) {
            options_help(program->name, command);
            flush_output();
            return 0;
        }
    Run* r = (Run*)allocate(1, sizeof *r);
    r->program = program->name;
    r->o = options_default();
    must(options_parse(&r->o, command, argc - first, argv + first, &err), &err);
    must(model_configure(&r->o, &err), &err);
    int status = command_run(r, command, &program->corpus);
    flush_output();
    run_free(r);
    free(r);
    return status;
}
