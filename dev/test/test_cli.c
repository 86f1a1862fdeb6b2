/*
The program as a person meets it: what the commands print, to the byte where scripts rely on it, and what happens when
something is mistyped, missing, broken or full. Written from the description of the command line alone; dev/test/test_runs.c
has training.

A mistake must end in one line on stderr that begins with "error: " and names the thing, exit 1, and not a file touched.
*/
#define _GNU_SOURCE
#include "program.h"

// ---- help and options ------------------------------------------------------------------------

typedef struct {
    const char* command;
    const char* option[32];
} Command;

// clang-format off
static const Command commands[] = {
    { "train", { "--model", "--data", "--val", "--tokenizer", "--out", "--batch", "--seq", "--total-batch", "--steps", "--lr",
                 "--warmup", "--schedule", "--lr-final", "--weight-decay", "--beta1", "--beta2", "--clip", "--seed",
                 "--dtype", "--eval-every", "--eval-steps", "--sample-every", "--checkpoint-every", "--keep", "--resume" } },
    { "generate", { "--model", "--prompt", "--prompt-file", "--ids", "--tokens", "--temperature", "--top-k", "--top-p",
                    "--min-p", "--seed", "--print-ids", "--ignore-eos" } },
    { "chat", { "--model" } },
    { "eval", { "--model", "--data", "--seq", "--hellaswag" } },
    { "tokenize", { "--tokenizer", "--data", "--out", "--print-ids", "--bos", "--special" } },
    { "detokenize", { "--tokenizer", "--ids" } },
    { "info", { "--model" } },
};
// clang-format on
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void test_help(void) {
    Result all = well(RUN("--help"));
    expect(*all.err == 0, "--help writes to stderr: %s", all.err);
    for (int i = 0; i < N_COMMANDS; i++) {
        const Command* c = &commands[i];
        expect(contains(all.out, c->command), "--help does not name %s:\n%s", c->command, all.out);
        Result one = well(RUN(c->command, "--help"));
        expect(*one.err == 0, "%s --help writes to stderr: %s", c->command, one.err);
        for (int o = 0; c->option[o]; o++) {
            bool listed = contains(one.out, text("%s ", c->option[o])) || contains(one.out, text("%s\n", c->option[o]));
            expect(listed, "%s --help does not list %s:\n%s", c->command, c->option[o], one.out);
        }
    }
    expect(*tree(".") == 0, "--help leaves files: %s", tree("."));
}

static void test_version(void) {
    Result r = well(RUN("--version"));
    expect(count_lines(r.out) == 1 && *r.err == 0, "--version: expected one line on stdout: %s%s", r.out, r.err);
}

static void test_mistyped(void) {
    make_model("model", SMALL);
    make_data("data.bin", 2000);
    put_text("text.txt", "some text to read\n");
    give_tokenizer("model");
#define MISTAKE(words, ...) expect_mistake(words, ARGS(__VA_ARGS__))
    MISTAKE(WORDS("generat"), "generat");
    MISTAKE(WORDS("Train"), "Train", "--steps", "0");
    MISTAKE(WORDS("--frobnicate"), "--frobnicate");
    MISTAKE(WORDS("--modle"), "train", "--modle", "model");
    MISTAKE(WORDS("--Model"), "train", "--Model", "model");
    MISTAKE(WORDS("-model"), "info", "-model", "model");
    MISTAKE(WORDS("--top-p"), "train", "--model", "model", "--top-p", "0.5");
    MISTAKE(WORDS("--batch"), "generate", "--model", "model", "--batch", "2");
    MISTAKE(WORDS("stray"), "train", "stray");
    MISTAKE(WORDS("one"), "info", "--model", "model", "one", "two");
    MISTAKE(WORDS("yes"), "train", "--resume", "yes");
    // an option without its value
    MISTAKE(WORDS("--model"), "info", "--model");
    MISTAKE(WORDS("--ids"), "generate", "--model", "model", "--ids");
    for (int o = 0; o + 1 < 25 && strcmp(commands[0].option[o], "--resume") != 0; o++) {
        MISTAKE(WORDS(commands[0].option[o]), "train", commands[0].option[o]);
        MISTAKE(WORDS(commands[0].option[o]), "train", commands[0].option[o], "--resume");
    }
    MISTAKE(WORDS("--out"), "train", "--model", "model", "--data", "data.bin", "--steps", "0", "--out", "");
    // something missing
    MISTAKE(WORDS("--model"), "generate", "--ids", "1 2");
    MISTAKE(WORDS("--model"), "chat");
    MISTAKE(WORDS("--model"), "eval", "--data", "data.bin");
    MISTAKE(WORDS("--model"), "info");
    MISTAKE(WORDS("--data"), "eval", "--model", "model");
    MISTAKE(WORDS("--prompt", "--ids"), "generate", "--model", "model", "--prompt", "a", "--ids", "1");
    MISTAKE(WORDS("--prompt", "--prompt-file"), "generate", "--model", "model", "--prompt", "a", "--prompt-file",
            "text.txt");
    MISTAKE(WORDS("--data", "--hellaswag"), "eval", "--model", "model", "--data", "data.bin", "--hellaswag",
            "text.txt");
    MISTAKE(WORDS("--data"), "tokenize", "--print-ids");
    MISTAKE(WORDS("--out", "--print-ids"), "tokenize", "--data", "text.txt");
    MISTAKE(WORDS("--ids"), "detokenize");
    // nothing of that name
    MISTAKE(WORDS("tinny"), "info", "--model", "tinny");
    MISTAKE(WORDS("tinny"), "train", "--model", "tinny", "--steps", "0");
    MISTAKE(WORDS("tinny"), "generate", "--model", "tinny", "--ids", "1");
    MISTAKE(WORDS("nothing.txt"), "train", "--model", "model", "--data", "nothing.txt");
    MISTAKE(WORDS("nothing*.bin"), "train", "--model", "model", "--data", "nothing*.bin");
    MISTAKE(WORDS("nothing.txt"), "train", "--model", "model", "--data", "data.bin", "--val", "nothing.txt");
    MISTAKE(WORDS("nothing.txt"), "eval", "--model", "model", "--data", "nothing.txt");
    MISTAKE(WORDS("nothing.txt"), "eval", "--model", "model", "--hellaswag", "nothing.txt");
    MISTAKE(WORDS("nothing.txt"), "tokenize", "--data", "nothing.txt", "--print-ids");
    MISTAKE(WORDS("nothing.txt"), "generate", "--model", "model", "--prompt-file", "nothing.txt");
    MISTAKE(WORDS("nothing"), "tokenize", "--tokenizer", "nothing", "--data", "text.txt", "--print-ids");
    MISTAKE(WORDS("nothing"), "detokenize", "--tokenizer", "nothing", "--ids", "1");
    MISTAKE(WORDS("nothing"), "train", "--model", "tiny", "--tokenizer", "nothing", "--steps", "0");
    // a run to resume
    MISTAKE(WORDS("out"), "train", "--resume", "--out", "out");
    MISTAKE(WORDS("model"), "train", "--resume", "--out", "model");
    MISTAKE(WORDS("out"), "train", "--resume");
}

static void test_bad_values(void) {
    make_model("model", SMALL);
    make_data("data.bin", 2000);
    static const struct {
        const char *option, *value[8];
    } bad[] = {
        { "--batch", { "0", "-1", "two", "1.5", "3x", "", "99999999999", "18446744073709551617" } },
        { "--seq", { "-8", "x", "1 6", "99999999999" } },
        { "--steps", { "-1", "abc", "1e", "99999999999999999999", "1.5", " " } },
        { "--total-batch", { "-1", "x", "7" } },
        { "--lr", { "x", "-1", "nan", "inf", "1e999", "0.1.2", "0,001" } },
        { "--warmup", { "-1", "x" } },
        { "--schedule", { "exponential", "", "Cosine" } },
        { "--lr-final", { "-0.1", "2", "x" } },
        { "--weight-decay", { "-1", "x", "nan" } },
        { "--beta1", { "1", "-0.1", "1.5", "x" } },
        { "--beta2", { "1", "-0.1", "1.5", "x" } },
        { "--clip", { "-1", "x", "nan" } },
        { "--seed", { "x", "1.5" } },
        { "--dtype", { "F16", "f64", "" } },
        { "--eval-every", { "-1", "x" } },
        { "--eval-steps", { "-1", "x" } },
        { "--sample-every", { "-1", "x" } },
        { "--checkpoint-every", { "-1", "x" } },
        { "--keep", { "-1", "x" } },
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        for (int v = 0; v < 8 && bad[i].value[v]; v++)
            MISTAKE(WORDS(bad[i].option, bad[i].value[v]), "train", "--model", "model", "--data", "data.bin", "--out",
                    "out", bad[i].option, bad[i].value[v]);
    static const struct {
        const char *option, *value[8];
    } bad_generate[] = {
        { "--tokens", { "-1", "x", "1.5", "99999999999" } },
        { "--temperature", { "-1", "nan", "x", "inf" } },
        { "--top-k", { "-1", "x", "1.5" } },
        { "--top-p", { "-0.1", "2", "x", "nan" } },
        { "--min-p", { "-0.1", "2", "x" } },
        { "--ids", { "1 2 x", "1;2", "-1", "999", "1.5", "99999999999999999999" } },
    };
    for (size_t i = 0; i < sizeof bad_generate / sizeof bad_generate[0]; i++)
        for (int v = 0; v < 8 && bad_generate[i].value[v]; v++) {
            const char *option = bad_generate[i].option, *value = bad_generate[i].value[v];
            bool ids = strcmp(option, "--ids") == 0;
            MISTAKE(WORDS(option), "generate", "--model", "model", ids ? "--tokens" : "--ids", "1", option, value);
        }
    MISTAKE(WORDS("999"), "generate", "--model", "model", "--ids", "1 999 2");
    MISTAKE(WORDS("--ids"), "generate", "--model", "model", "--ids", "");
    MISTAKE(WORDS("x"), "detokenize", "--ids", "104 x");
    MISTAKE(WORDS("999"), "detokenize", "--ids", "104 999");
    MISTAKE(WORDS("-1"), "detokenize", "--ids", "-1");
}

// ---- broken models ---------------------------------------------------------------------------

// neither generation nor training nor evaluation accepts the folder "model"; makes it whole again
static void expect_bad_model(Words words) {
    MISTAKE(words, "generate", "--model", "model", "--ids", "1 2 3", "--tokens", "2", "--print-ids");
    MISTAKE(words, "train", "--model", "model", "--data", "data.bin", "--out", "out", "--steps", "2", "--batch", "1",
            "--seq", "16");
    MISTAKE(words, "eval", "--model", "model", "--data", "data.bin");
    remove_folder("model");
    make_model("model", SMALL);
}

static void test_bad_config(void) {
    make_model("model", SMALL);
    make_data("data.bin", 2000);
    // clang-format off
    static const struct {
        const char *from, *to;
        Words words;
    } bad[] = {
        { "\"attention_bias\": false", "\"attention_bias\": true", { { "attention_bias" } } },
        { "\"mlp_bias\": false", "\"mlp_bias\": true", { { "mlp_bias" } } },
        { "\"silu\"", "\"gelu\"", { { "hidden_act", "gelu" } } },
        { "\"model_type\": \"llama\"", "\"model_type\": \"mistral\"", { { "model_type", "mistral" } } },
        { "\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0}", { { "yarn" } } },
        { "\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 4.0}", { { "linear" } } },
        { "\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"llama3\"}", { { "factor" } } },
        { "\"rope_scaling\": null", "\"rope_scaling\": 7", { { "rope_scaling" } } },
        { "\"mlp_bias\": false", "\"mlp_bias\": false, \"quantization_config\": {\"bits\": 4}", { { "quantization_config" } } },
        { "\"rope_theta\": 10000.0, ", "", { { "rope_theta" } } },
        { "\"rope_theta\": 10000.0", "\"rope_theta\": 0", { { "rope_theta" } } },
        { "\"rope_theta\": 10000.0", "\"rope_theta\": \"big\"", { { "rope_theta" } } },
        { "\"hidden_size\": 32, ", "", { { "hidden_size" } } },
        { "\"hidden_size\": 32", "\"hidden_size\": 0", { { "hidden_size", "0" } } },
        { "\"hidden_size\": 32", "\"hidden_size\": -32", { { "hidden_size", "-32" } } },
        { "\"hidden_size\": 32", "\"hidden_size\": 32.5", { { "hidden_size" } } },
        { "\"hidden_size\": 32", "\"hidden_size\": \"32\"", { { "hidden_size" } } },
        { "\"hidden_size\": 32", "\"hidden_size\": 4294967328", { { "hidden_size" } } },
        { "\"hidden_size\": 32", "\"hidden_size\": 1e300", { { "hidden_size" } } },
        { "\"hidden_size\": 32", "\"hidden_size\": 1e999", { { "config.json" } } },
        { "\"intermediate_size\": 64", "\"intermediate_size\": 0", { { "intermediate_size" } } },
        { "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 0", { { "num_hidden_layers" } } },
        { "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 2000000000", { { "num_hidden_layers" } } },
        { "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", { { "model.layers.2." } } },
        { "\"num_attention_heads\": 4", "\"num_attention_heads\": 0", { { "num_attention_heads" } } },
        { "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", { { "num_key_value_heads", "3" } } },
        { "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 8", { { "num_key_value_heads", "8" } } },
        { "\"head_dim\": 8", "\"head_dim\": 7", { { "head_dim", "7" } } },
        { "\"head_dim\": 8", "\"head_dim\": -8", { { "head_dim" } } },
        { "\"vocab_size\": 261, ", "", { { "vocab_size" } } },
        { "\"vocab_size\": 261", "\"vocab_size\": 0", { { "vocab_size" } } },
        { "\"vocab_size\": 261", "\"vocab_size\": 1e12", { { "vocab_size" } } },
        { "\"vocab_size\": 261", "\"vocab_size\": 262", { { "model.embed_tokens.weight", "262", "261" } } },
        { "\"max_position_embeddings\": 64", "\"max_position_embeddings\": 0", { { "max_position_embeddings" } } },
        { "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": -1", { { "rms_norm_eps" } } },
        { "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": NaN", { { "config.json" } } },
        { "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": \"yes\"", { { "tie_word_embeddings" } } },
        { "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", { { "lm_head.weight" } } },
        { "\"eos_token_id\": 257", "\"eos_token_id\": \"end\"", { { "eos_token_id" } } },
        { "\"mlp_bias\": false", "\"mlp_bias\": false, \"hidden_size\": 64", { { "hidden_size" } } },
        { "\"hidden_size\": 32", "\"hidden_size\": 32,", { { "config.json" } } },
        { "float32\"}", "float32\"", { { "config.json" } } },
        { "float32\"}", "float32\"} and more", { { "config.json" } } },
        { "{\"architectures\"", "[\"architectures\"", { { "config.json" } } },
    };
    // clang-format on
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        edit("model/config.json", bad[i].from, bad[i].to);
        expect_bad_model(bad[i].words);
    }
    remove("model/config.json");
    expect_bad_model(WORDS("config.json"));
    put_text("model/config.json", "");
    expect_bad_model(WORDS("config.json"));
    put_text("model/config.json", "[]");
    expect_bad_model(WORDS("config.json"));
    char* deep = keep(calloc(1, 200001));
    memset(deep, '[', 200000);
    put_text("model/config.json", deep);
    expect_bad_model(WORDS("config.json"));
    put_file("model/config.json", "{\"model_type\": \"ll\0ama\"}", 24);
    expect_bad_model(WORDS("config.json"));
}

// unknown fields, and other spellings of known ones, change nothing
static void test_config_spellings(void) {
    make_model("model", SMALL);
    const char* want = OUTPUT_OF("generate", "--model", "model", "--ids", "5 9 13", "--tokens", "12", "--temperature",
                                 "0", "--print-ids", "--ignore-eos");
    // clang-format off
    static const struct {
        const char *from, *to;
        bool same;
    } spelling[] = {
        { "\"mlp_bias\": false", "\"mlp_bias\": false, \"use_cache\": true, \"pretraining_tp\": 1", true },
        { "\"attention_bias\": false, \"mlp_bias\": false, ", "", true },
        { "\"head_dim\": 8, ", "", true },
        { "\"torch_dtype\"", "\"dtype\"", true },
        { "\"rope_theta\": 10000.0, \"rope_scaling\": null", "\"rope_parameters\": {\"rope_theta\": 10000.0, \"rope_type\": \"default\"}", true },
        { "\"rope_theta\": 10000.0", "\"rope_theta\": 2.0", false },
        { "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 10", false },
    };
    // clang-format on
    for (size_t i = 0; i < sizeof spelling / sizeof spelling[0]; i++) {
        make_model("model", SMALL);
        edit("model/config.json", spelling[i].from, spelling[i].to);
        Result r = well(RUN("generate", "--model", "model", "--ids", "5 9 13", "--tokens", "12", "--temperature", "0",
                            "--print-ids", "--ignore-eos"));
        expect((strcmp(r.out, want) == 0) == spelling[i].same, "config.json with %s: ids %sexpected%s %s",
               spelling[i].to, r.out, spelling[i].same ? "" : " anything but", want);
    }
}

static void test_bad_safetensors(void) {
    const char* file = "model/model.safetensors";
    make_model("model", SMALL);
    make_data("data.bin", 2000);
    // cut short, or with a wrong length of the header
    size_t n;
    const char* whole = file_bytes(file, &n);
    uint64_t length;
    memcpy(&length, whole, 8);
    const size_t cut[] = { 0, 7, 8, 9, 8 + length / 2, 8 + length, n / 2, n - 1 };
    for (size_t i = 0; i < sizeof cut / sizeof cut[0]; i++) {
        put_file(file, whole, cut[i]);
        expect_bad_model(WORDS("model.safetensors"));
    }
    const uint64_t wrong[] = { 0, 1, length - 1, length + 1, n - 7, n, (uint64_t)1 << 40, INT64_MAX, UINT64_MAX };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        char* bytes = file_bytes(file, NULL);
        memcpy(bytes, &wrong[i], 8);
        put_file(file, bytes, n);
        expect_bad_model(WORDS("model.safetensors"));
    }
    remove(file);
    MISTAKE(WORDS("model.safetensors"), "generate", "--model", "model", "--ids", "1 2 3");
    make_model("model", SMALL);
    // the embedding has 261 * 32 * 4 = 33408 bytes, the norm after it 128
    // clang-format off
    static const struct {
        const char *from, *to;
        Words words;
    } bad[] = {
        { "[33408,33536]", "[33404,33532]", { { "safetensors" } } },                              // overlaps, and a hole
        { "[33408,33536]", "[0,128]", { { "safetensors" } } },
        { "[33408,33536]", "[33536,33408]", { { "input_layernorm" } } },
        { "[33408,33536]", "[-128,0]", { { "input_layernorm" } } },
        { "[33408,33536]", "[33408.5,33536.5]", { { "input_layernorm" } } },
        { "[33408,33536]", "[9007199254740992,9007199254741120]", { { "input_layernorm" } } },
        { "[33408,33536]", "[33408]", { { "input_layernorm" } } },
        { "[33408,33536]", "\"all\"", { { "input_layernorm" } } },
        { "[261,32]", "[261,33]", { { "model.embed_tokens.weight" } } },
        { "[261,32]", "[32,261]", { { "model.embed_tokens.weight", "32, 261", "261, 32" } } },
        { "[261,32]", "[8352]", { { "model.embed_tokens.weight", "8352" } } },
        { "[261,32]", "[1,261,32]", { { "model.embed_tokens.weight" } } },
        { "[261,32]", "[4294967557,32]", { { "model.embed_tokens.weight" } } },
        { "[261,32]", "[9223372036854775807,9223372036854775807]", { { "model.embed_tokens.weight" } } },
        { "[261,32]", "[-261,-32]", { { "model.embed_tokens.weight" } } },
        { "[32,32]", "[16,64]", { { "model.layers.0.self_attn.q_proj.weight", "32, 32", "16, 64" } } },
        { "\"F32\"", "\"I32\"", { { "model.embed_tokens.weight", "I32", "F32" } } },
        { "\"F32\"", "\"F64\"", { { "model.embed_tokens.weight" } } },
        { "\"F32\"", "\"BF16\"", { { "model.embed_tokens.weight" } } },
        { "\"F32\"", "32", { { "model.embed_tokens.weight" } } },
        { "\"dtype\":\"F32\",", "", { { "model.embed_tokens.weight" } } },
        { "model.layers.1.mlp.up_proj", "model.layers.1.mlp.UP_proj", { { "model.layers.1.mlp.up_proj.weight" } } },
        { "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj", { { "safetensors" } } },  // twice
        { "model.norm.weight", "norm.weight", { { "model.norm.weight" } } },
        { "{\"__metadata__\"", "[\"__metadata__\"", { { "model.safetensors" } } },
        { "{\"__metadata__\"", "{__metadata__", { { "model.safetensors" } } },
        { "{\"format\":\"pt\"}", "{\"format\":\"\xff\xfe\"}", { { "model.safetensors" } } },
    };
    // clang-format on
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        edit(file, bad[i].from, bad[i].to);
        expect_bad_model(bad[i].words);
    }
}

static void test_shards(void) {
    make_model("model", SMALL);
    const char* want = OUTPUT_OF("generate", "--model", "model", "--ids", "5 9", "--tokens", "8", "--temperature", "0",
                                 "--print-ids", "--ignore-eos");
    const char *index = "model/model.safetensors.index.json", *shard = "model/model-00001-of-00001.safetensors";
    const char* bytes = file_bytes("model/model.safetensors", NULL);
    uint64_t length;
    memcpy(&length, bytes, 8);
    cJSON *header = cJSON_ParseWithLength(bytes + 8, length), *tensor;
    const char* map = "";
    cJSON_ArrayForEach(tensor, header) if (strcmp(tensor->string, "__metadata__") != 0) map =
        text("%s%s\"%s\": \"model-00001-of-00001.safetensors\"", map, *map ? ", " : "", tensor->string);
    cJSON_Delete(header);
    const char* good = text("{\"metadata\": {\"total_size\": 1}, \"weight_map\": {%s}}", map);
    rename("model/model.safetensors", shard);
    put_text(index, good);
    Result r = well(RUN("generate", "--model", "model", "--ids", "5 9", "--tokens", "8", "--temperature", "0",
                        "--print-ids", "--ignore-eos"));
    expect(strcmp(r.out, want) == 0, "sharded: ids %sexpected %s", r.out, want);

#define BAD_INDEX(words, contents)                                                                                     \
    put_text(index, contents);                                                                                         \
    MISTAKE(words, "generate", "--model", "model", "--ids", "1 2 3", "--print-ids")
    BAD_INDEX(WORDS("index.json"), "");
    BAD_INDEX(WORDS("index.json"), "{\"weight_map\": 3}");
    BAD_INDEX(WORDS("index.json"), "{}");
    BAD_INDEX(WORDS("model-00002"), replaced(good, "model-00001", "model-00002"));
    BAD_INDEX(WORDS("model"),
              replaced(good, "\"model-00001-of-00001.safetensors\"", "\"../model/model-00001-of-00001.safetensors\""));
    BAD_INDEX(WORDS("model"), replaced(good, "\"model-00001-of-00001.safetensors\"", "7"));
    BAD_INDEX(WORDS("model.norm.w"), replaced(good, "model.norm.weight", "model.norm.w"));
    put_text(index, good);
    if (truncate(shard, 5000) != 0) test_fail("cannot cut %s", shard);
    MISTAKE(WORDS("model-00001-of-00001.safetensors"), "generate", "--model", "model", "--ids", "1 2 3");
}

static bool names_nan(const char* s) { return strcasestr(s, "nan") || contains(s, "finite"); }

static void test_nan_in_weights(void) {
    make_data("data.bin", 2000);
    const float bad[] = { NAN, INFINITY };
    for (int i = 0; i < 2; i++) {
        make_model("model", SMALL);
        fill_tensor("model/model.safetensors", "model.layers.1.mlp.up_proj.weight", bad[i]);
        const char* before = tree(".");
        Result r[] = {
            RUN("generate", "--model", "model", "--ids", "1 2 3", "--tokens", "4", "--print-ids"),
            RUN("generate", "--model", "model", "--ids", "1 2 3", "--tokens", "4", "--print-ids", "--temperature", "0"),
            RUN("eval", "--model", "model", "--data", "data.bin"),
            RUN("train", "--model", "model", "--data", "data.bin", "--out", "out", "--steps", "3", "--batch", "1"),
        };
        for (int j = 0; j < 4; j++) {
            const char* error = strstr(r[j].err, "error: ");
            expect(r[j].code == 1, "%s\n    exit %d, expected 1; stdout %s stderr %s", r[j].command, r[j].code,
                   r[j].out, r[j].err);
            expect(error && (error == r[j].err || error[-1] == '\n') && count_lines(error) == 1 && names_nan(error),
                   "%s\n    expected a last line \"error: …\" that speaks of NaN:\n%s", r[j].command, r[j].err);
        }
        const char* after = tree(".");
        expect(strcmp(before, after) == 0, "NaN in the weights; files before:\n%sfiles after:\n%s", before, after);
    }
}

// ---- broken tokenizers and data --------------------------------------------------------------

static void test_bad_tokenizer(void) {
    make_data("data.bin", 2000);
    char* lines = text("%s", "");
    for (int i = 0; i < 100; i++) lines = text("%sa line of text to learn, number %d\n", lines, i);
    put_text("text.txt", lines);
    make_model("model", SMALL);
    give_tokenizer("model");
    const char* tokenizer = "model/tokenizer.json";
    // without one: said, and ids need none
    Shape few = SMALL;
    few.V = 200;
    make_model("few", few);
    MISTAKE(WORDS("few", "tokenizer"), "generate", "--model", "few", "--prompt", "hi", "--tokens", "2");
    MISTAKE(WORDS("few", "tokenizer"), "chat", "--model", "few");
    MISTAKE(WORDS("text.txt", "tokenizer"), "eval", "--model", "few", "--data", "text.txt");
    MISTAKE(WORDS("text.txt", "tokenizer"), "train", "--model", "few", "--data", "text.txt", "--out", "out", "--steps",
            "1", "--seq", "16");
    well(RUN("generate", "--model", "few", "--ids", "1 2", "--tokens", "2", "--print-ids"));
    // with ids up to 260 where the model knows 200: given, then the folder's own
    for (int own = 0; own < 2; own++) {
        const char *option = own ? "--seed" : "--tokenizer", *value = own ? "1" : tokenizer;
        const Words words = WORDS("260", "199");
        MISTAKE(words, "generate", "--model", "few", "--prompt", "hi", "--tokens", "2", option, value);
        MISTAKE(words, "generate", "--model", "few", "--ids", "1 2", "--tokens", "2", option, value);
        MISTAKE(words, "chat", "--model", "few", option, value);
        MISTAKE(words, "train", "--model", "few", "--data", "text.txt", "--out", "out", "--steps", "1", "--seq", "16",
                option, value);
        MISTAKE(words, "train", "--model", "few", "--steps", "0", "--out", "out", option, value);
        if (own) MISTAKE(words, "eval", "--model", "few", "--data", "text.txt");
        size_t n;
        const char* bytes = file_bytes(tokenizer, &n);
        put_file("few/tokenizer.json", bytes, n);
    }
    // files that are no tokenizer
    size_t n;
    const char* whole = file_bytes(tokenizer, &n);
    const struct {
        const char* bytes;
        size_t n;
    } bad[] = { { "", 0 },   { whole, n - 1 }, { whole, n / 2 },
                { "{}", 2 }, { "[]", 2 },      { "{\"model\": {\"type\": \"Unigram\"}}", 30 } };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        put_file("tokenizer.json", bad[i].bytes, bad[i].n);
        MISTAKE(WORDS("tokenizer.json"), "tokenize", "--tokenizer", "tokenizer.json", "--data", "text.txt",
                "--print-ids");
        MISTAKE(WORDS("tokenizer.json"), "train", "--model", "tiny", "--tokenizer", "tokenizer.json", "--data",
                "text.txt", "--out", "out", "--steps", "0");
    }
    const char* no_model[] = { "",         "abc\n",     "YQ== 0\nYQ== 1\n",  "YQ== x\n",
                               "!!!! 0\n", "YQ== -1\n", "YQ== 99999999999\n" };
    for (size_t i = 0; i < sizeof no_model / sizeof no_model[0]; i++) {
        put_text("tokenizer.model", no_model[i]);
        MISTAKE(WORDS("tokenizer.model"), "tokenize", "--tokenizer", "tokenizer.model", "--data", "text.txt",
                "--print-ids");
    }
    mkdir("empty", 0777);
    MISTAKE(WORDS("empty"), "tokenize", "--tokenizer", "empty", "--data", "text.txt", "--print-ids");
}

static void expect_bad_data(Words words, const char* path) {
    MISTAKE(words, "train", "--model", "model", "--data", path, "--out", "out", "--steps", "1", "--batch", "1", "--seq",
            "16");
    MISTAKE(words, "eval", "--model", "model", "--data", path);
}

static void test_bad_data(void) {
    make_model("model", SMALL);
    give_tokenizer("model");
    make_data("data.bin", 2000);
    size_t n;
    const char* whole = file_bytes("data.bin", &n);
    // empty, one token
    put_text("data.txt", "");
    expect_bad_data(WORDS("data.txt"), "data.txt");
    put_text("data.txt", "x");
    expect_bad_data(WORDS("data.txt"), "data.txt");
    int ids[2000];
    put_bin("short.bin", ids, 0, false);
    expect_bad_data(WORDS("short.bin"), "short.bin");
    ids[0] = 5;
    put_bin("short.bin", ids, 1, false);
    expect_bad_data(WORDS("short.bin"), "short.bin");
    put_text("data.jsonl", "");
    expect_bad_data(WORDS("data.jsonl"), "data.jsonl");
    // not what the header says
    const size_t cut[] = { 0, 3, 100, 1024, 1025, n - 2, n - 1 };
    for (size_t i = 0; i < sizeof cut / sizeof cut[0]; i++) {
        put_file("cut.bin", whole, cut[i]);
        expect_bad_data(WORDS("cut.bin"), "cut.bin");
    }
    const int32_t header[][3] = {
        { 7, 1, 2000 },        { 20240520, 2, 2000 }, { 20240520, 7, 2000 },      { 20240801, 1, 2000 },
        { 20240801, 7, 2000 }, { 20240520, 1, -1 },   { 20240520, 1, INT32_MAX }, { 20240520, 1, 0 }
    };
    for (size_t i = 0; i < sizeof header / sizeof header[0]; i++) {
        char* bytes = file_bytes("data.bin", NULL);
        memcpy(bytes, header[i], sizeof header[i]);
        put_file("head.bin", bytes, n);
        expect_bad_data(WORDS("head.bin"), "head.bin");
    }
    // ids that the model does not know, at the ends and in the middle; both widths
    for (int wide = 0; wide < 2; wide++)
        for (int where = 0; where < 3; where++) {
            int* some = make_ids(2000, 256, 7);
            some[where == 0 ? 0 : where == 1 ? 1000 : 1999] = wide ? 70000 : 261;
            put_bin("ids.bin", some, 2000, wide);
            expect_bad_data(WORDS("ids.bin", wide ? "70000" : "261", "260"), "ids.bin");
        }
    int* negative = make_ids(2000, 256, 7);
    negative[1000] = -1;
    put_bin("ids.bin", negative, 2000, true);
    expect_bad_data(WORDS("ids.bin"), "ids.bin");
    // as validation data; one bad file among good ones
    negative[1000] = 300;
    put_bin("ids.bin", negative, 2000, false);
    MISTAKE(WORDS("ids.bin", "300"), "train", "--model", "model", "--data", "data.bin", "--val", "ids.bin", "--out",
            "out", "--steps", "1", "--seq", "16");
    mkdir("shards", 0777);
    put_file("shards/a.bin", whole, n);
    put_bin("shards/b.bin", negative, 2000, false);
    expect_bad_data(WORDS("b.bin", "300"), "shards/*.bin");
    // JSONL that is none
    const char* lines[] = { "{\"text\": 3}\n",
                            "{\"txt\": \"a\"}\n",
                            "{\"text\": \"abc\"\n",
                            "[]\n",
                            "words\n",
                            "{\"text\": \"fine and long enough to train\"}\n{\"text\": broken}\n",
                            "{\"messages\": []}\n",
                            "{\"messages\": [{\"role\": \"user\"}]}\n",
                            "{\"messages\": \"hi\"}\n",
                            "{\"messages\": [{\"role\": 1, \"content\": \"a\"}]}\n" };
    for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        put_text("data.jsonl", lines[i]);
        MISTAKE(WORDS("data.jsonl"), "train", "--model", "model", "--data", "data.jsonl", "--out", "out", "--steps",
                "1", "--batch", "1", "--seq", "8");
    }
    // longer than the model's context of 64
    MISTAKE(WORDS("--seq", "65", "64"), "train", "--model", "model", "--data", "data.bin", "--out", "out", "--seq",
            "65");
    MISTAKE(WORDS("--seq", "65", "64"), "eval", "--model", "model", "--data", "data.bin", "--seq", "65");
    const char* many = "1";
    for (int i = 1; i < 65; i++) many = text("%s %d", many, i);
    MISTAKE(WORDS("65", "64"), "generate", "--model", "model", "--ids", many, "--tokens", "1", "--print-ids");
    // a folder where a file should be
    MISTAKE(WORDS("shards"), "eval", "--model", "model", "--data", "shards");
    // HellaSwag: six lines a task
    const char* tasks[] = { "", "a: b\n0\none\ntwo\nthree\n", "a: b\n4\none\ntwo\nthree\nfour\n",
                            "a: b\nx\none\ntwo\nthree\nfour\n" };
    for (size_t i = 0; i < sizeof tasks / sizeof tasks[0]; i++) {
        put_text("tasks.txt", tasks[i]);
        MISTAKE(WORDS("tasks.txt"), "eval", "--model", "model", "--hellaswag", "tasks.txt");
    }
}

// ---- no place to write -----------------------------------------------------------------------

static void test_no_place_to_write(void) {
    make_model("model", SMALL);
    make_data("data.bin", 2000);
    put_text("text.txt", "a text\n");
    put_text("file", "a file, not a folder");
    const struct {
        const char* out;
        Words words;
    } bad[] = { { "file", WORDS("file") },
                { "file/run", WORDS("file") },
                { "/proc/run", WORDS("/proc/run") },
                { "/dev/null/run", WORDS("/dev/null") } };
    for (int i = 0; i < 4; i++) {
        MISTAKE(bad[i].words, "train", "--model", "model", "--data", "data.bin", "--out", bad[i].out, "--steps", "1",
                "--seq", "16");
        MISTAKE(bad[i].words, "train", "--model", "tiny", "--steps", "0", "--out", bad[i].out);
    }
    MISTAKE(WORDS("file/x.bin"), "tokenize", "--data", "text.txt", "--out", "file/x.bin");
    MISTAKE(WORDS("none/x.bin"), "tokenize", "--data", "text.txt", "--out", "none/x.bin");
    // results that cannot be delivered
    const How full = { .full = true };
    Result r[] = {
        finish(start(full, ARGS("tokenize", "--data", "text.txt", "--print-ids"))),
        finish(start(full, ARGS("detokenize", "--ids", "104 105"))),
        finish(start(full, ARGS("generate", "--model", "model", "--ids", "1 2", "--tokens", "3", "--print-ids"))),
        finish(start(full, ARGS("generate", "--model", "model", "--ids", "1 2", "--tokens", "3"))),
        finish(start(full, ARGS("eval", "--model", "model", "--data", "data.bin"))),
        finish(start(full, ARGS("info", "--model", "tiny"))),
        finish(start(full, ARGS("--help"))),
    };
    for (size_t i = 0; i < sizeof r / sizeof r[0]; i++)
        expect(r[i].code == 1 && contains(r[i].err, "error: "),
               "%s > /dev/full\n    exit %d, expected 1 and an error: %s", r[i].command, r[i].code, r[i].err);
}

static void test_read_only_disk(void) {
    make_model("model", SMALL);
    make_data("data.bin", 2000);
    put_text("text.txt", "a text\n");
    mount_disk("disk", 1024);
    mkdir("disk/out", 0777);
    if (!make_disk_read_only("disk")) test_fail("cannot make the disk read-only");
    MISTAKE(WORDS("disk"), "train", "--model", "model", "--data", "data.bin", "--out", "disk/run", "--steps", "1",
            "--seq", "16");
    MISTAKE(WORDS("disk"), "train", "--model", "model", "--data", "data.bin", "--out", "disk/out", "--steps", "1",
            "--seq", "16");
    MISTAKE(WORDS("disk"), "train", "--model", "tiny", "--steps", "0", "--out", "disk/run");
    MISTAKE(WORDS("disk"), "tokenize", "--data", "text.txt", "--out", "disk/x.bin");
    unmount_disk("disk");
}

// the run ended in an error at a checkpoint: nothing half-written lies about, and what was whole before still works
static void expect_no_room(Result r, const char* out, int whole) {
    const char* error = strstr(r.err, "error: ");
    expect(r.code == 1, "%s\n    exit %d, expected 1; stderr:\n%s", r.command, r.code, r.err);
    expect(error && (error == r.err || error[-1] == '\n') && count_lines(error) == 1 && contains(error, out),
           "%s\n    expected a last line \"error: …\" that names %s:\n%s", r.command, out, r.err);
    DIR* d = opendir(out);
    int steps = 0;
    for (struct dirent* e; d && (e = readdir(d));) {
        steps += strncmp(e->d_name, "step-", 5) == 0;
        expect(!contains(e->d_name, "tmp"), "%s\n    leaves %s/%s", r.command, out, e->d_name);
    }
    if (d) closedir(d);
    expect(steps == whole, "%s\n    leaves %d checkpoints, expected %d:\n%s", r.command, steps, whole,
           d ? tree(out) : "");
    if (whole) well(RUN("generate", "--model", out, "--ids", "1 2", "--tokens", "2", "--print-ids"));
}

static void test_full_disk(void) {
    make_model("model", SMALL);
    make_data("data.bin", 2000);
    char* words = text("%s", "some words\n");
    for (int i = 0; i < 13; i++) words = text("%s%s", words, words); // 90 KB, 180 KB of ids
    put_text("text.txt", words);
    mount_disk("disk", 128);
#define TRAIN_ON_DISK                                                                                                  \
    "train", "--model", "model", "--data", "data.bin", "--out", "disk/run", "--steps", "4", "--batch", "1", "--seq",   \
        "16"
    // no room for one checkpoint: 108 KB of weights, twice that for AdamW
    expect_no_room(RUN(TRAIN_ON_DISK, "--checkpoint-every", "1"), "disk/run", 0);
    Result r = RUN("tokenize", "--data", "text.txt", "--out", "disk/x.bin");
    expect_error(r, WORDS("disk/x.bin"));
    expect(!exists("disk/x.bin"), "%s\n    leaves half a file", r.command);
    unmount_disk("disk");
    // room for two
    mount_disk("disk", 1000);
    expect_no_room(RUN(TRAIN_ON_DISK, "--checkpoint-every", "1", "--keep", "9"), "disk/run", 2);
    unmount_disk("disk");
}

// the same by a limit on the size of a file, which needs no right to mount
static void test_file_limit(void) {
    make_model("model", SMALL);
    make_data("data.bin", 2000);
    put_text("text.txt", "words to be tokenized, more than fifty of them would not be needed\n");
    mkdir("disk", 0777);
    How how = { .file_limit = 64 << 10 };
    expect_no_room(finish(start(how, ARGS(TRAIN_ON_DISK, "--checkpoint-every", "1"))), "disk/run", 0);
    how.file_limit = 150 << 10; // the weights fit, the optimizer's state does not
    remove_folder("disk/run");
    expect_no_room(finish(start(how, ARGS(TRAIN_ON_DISK, "--checkpoint-every", "1"))), "disk/run", 0);
    how.file_limit = 1000;
    Result r = finish(start(how, ARGS("tokenize", "--data", "text.txt", "--out", "disk/x.bin")));
    expect_error(r, WORDS("disk/x.bin"));
    expect(!exists("disk/x.bin"), "%s\n    leaves half a file", r.command);
}

// ---- exact output ----------------------------------------------------------------------------

static void expect_out(Result r, const char* out) {
    expect(r.code == 0 && strcmp(r.out, out) == 0, "%s\n    exit %d, stdout: %s    expected: %s    stderr: %s",
           r.command, r.code, r.out, out, r.err);
}

static void test_tokenize_bytes(void) {
    put_text("text.txt", "h\xc3\xa9\n<|eot_id|>");
    expect_out(RUN("tokenize", "--data", "text.txt", "--print-ids"),
               "104 195 169 10 60 124 101 111 116 95 105 100 124 62\n");
    expect_out(RUN("tokenize", "--data", "text.txt", "--print-ids", "--bos"),
               "256 104 195 169 10 60 124 101 111 116 95 105 100 124 62\n");
    expect_out(RUN("tokenize", "--data", "text.txt", "--print-ids", "--special"), "104 195 169 10 260\n");
    put_file("text.txt", "a\0\xff\xc3", 4); // NUL and broken UTF-8 are bytes like others
    expect_out(RUN("tokenize", "--data", "text.txt", "--print-ids"), "97 0 255 195\n");
    put_text("text.txt", "");
    expect_out(RUN("tokenize", "--data", "text.txt", "--print-ids", "--bos"), "256\n");

    put_text("text.txt", "abc");
    RUN_WELL("tokenize", "--data", "text.txt", "--out", "x.bin");
    put_bin("want.bin", (const int[]){ 97, 98, 99 }, 3, false);
    expect(same_file("x.bin", "want.bin"), "tokenize --out: x.bin is not llm.c's token file of 97 98 99");
    const char* text_of[] = { "hi", "hi\n" };
    Result r = well(RUN("detokenize", "--ids", "104 105"));
    expect(strcmp(r.out, text_of[0]) == 0 || strcmp(r.out, text_of[1]) == 0, "detokenize: %s", r.out);
}

static void test_tokenize_llama3(void) {
    const char* folder = text("%s", test_data("llama3"));
    put_text("text.txt", "This is a test sentence.");
    const char* file[] = { "", "/tokenizer.json", "/tokenizer.model" };
    for (int i = 0; i < 3; i++) {
        const char* path = text("%s%s", folder, file[i]);
        expect_out(RUN("tokenize", "--tokenizer", path, "--data", "text.txt", "--print-ids"),
                   "2028 374 264 1296 11914 13\n");
        expect_out(RUN("tokenize", "--tokenizer", path, "--data", "text.txt", "--print-ids", "--bos"),
                   "128000 2028 374 264 1296 11914 13\n");
        Result r =
            well(RUN("detokenize", "--tokenizer", path, "--ids", "128006 882 128007 271 2028 374 264 2077 13 128009"));
        expect(strncmp(r.out, "<|start_header_id|>user<|end_header_id|>\n\nThis is a response.<|eot_id|>", 70) == 0,
               "detokenize: %s", r.out);
    }
    const char* json = text("%s/tokenizer.json", folder);
    RUN_WELL("tokenize", "--tokenizer", json, "--data", "text.txt", "--out", "x.bin");
    put_bin("want.bin", (const int[]){ 2028, 374, 264, 1296, 11914, 13 }, 6, true);
    expect(same_file("x.bin", "want.bin"),
           "tokenize --out with 128,256 tokens: x.bin is not llm.c's token file of uint32");
    put_text("text.txt", "<|eot_id|>");
    expect_out(RUN("tokenize", "--tokenizer", json, "--data", "text.txt", "--print-ids", "--special"), "128009\n");
    Result r = well(RUN("tokenize", "--tokenizer", json, "--data", "text.txt", "--print-ids"));
    expect(!contains(r.out, "128009"), "special tokens in plain text: %s", r.out);
}

static int count_ids(const char* s) {
    int n = 0;
    for (; *s; s++) n += *s >= '0' && *s <= '9' && !(s[1] >= '0' && s[1] <= '9');
    return n;
}

// one line of ids that begins with the prompt's
static void expect_ids(Result r, const char* prompt, int n) {
    well(r);
    expect(count_lines(r.out) == 1 && strspn(r.out, "0123456789 ") == strlen(r.out) - 1,
           "%s\n    expected one line of ids: %s", r.command, r.out);
    expect(strncmp(r.out, text("%s ", prompt), strlen(prompt) + 1) == 0 && !contains(r.out, "  "),
           "%s\n    expected ids that begin with %s: %s", r.command, prompt, r.out);
    expect(count_ids(r.out) == n, "%s\n    %d ids, expected %d: %s", r.command, count_ids(r.out), n, r.out);
}

#define GREEDY(...) "generate", "--model", "model", "--temperature", "0", "--print-ids", "--ignore-eos", __VA_ARGS__

static void test_generate_ids(void) {
    make_model("model", SMALL);
    Result ten = RUN(GREEDY("--ids", "1 2 3", "--tokens", "10"));
    expect_ids(ten, "1 2 3", 13);
    expect_ids(RUN(GREEDY("--ids", "1", "--tokens", "63")), "1", 64);
    expect_ids(RUN(GREEDY("--ids", "1 2 3", "--tokens", "1")), "1 2 3", 4);
    expect_out(RUN(GREEDY("--ids", "1 2 3", "--tokens", "0")), "1 2 3\n");
    // a prompt's text begins with bos; from a file it is the same
    give_tokenizer("model");
    put_text("prompt.txt", "hi");
    Result text_prompt = RUN(GREEDY("--prompt", "hi", "--tokens", "5"));
    expect_ids(text_prompt, "256 104 105", 8);
    expect_out(RUN(GREEDY("--prompt-file", "prompt.txt", "--tokens", "5")), text_prompt.out);
    expect_out(RUN(GREEDY("--ids", "256 104 105", "--tokens", "5")), text_prompt.out);
    // special tokens in a prompt are text
    expect_ids(RUN(GREEDY("--prompt", "<|eot_id|>", "--tokens", "1")), "256 60 124 101 111 116 95 105 100 124 62", 12);
    // the cache and the batch agree: from any point of a long text on, the next id is the same
    const char* all = OUTPUT_OF(GREEDY("--ids", "1 2 3", "--tokens", "60"));
    for (int known = 4; known < 63; known += 6) {
        const char* end = all;
        for (int spaces = 0; *end && spaces < known; end++) spaces += *end == ' ';
        const char* next = end + strcspn(end, " \n");
        expect_out(RUN(GREEDY("--ids", text("%.*s", (int)(end - all) - 1, all), "--tokens", "1")),
                   text("%.*s\n", (int)(next - all), all));
    }
    // any number of threads too
    for (int threads = 2; threads <= 8; threads *= 4) {
        const How how = { .threads = threads };
        expect_out(finish(start(how, ARGS(GREEDY("--ids", "1 2 3", "--tokens", "10")))), ten.out);
    }
    // text on stdout, nothing but
    Result said = well(RUN("generate", "--model", "model", "--prompt", "hi", "--tokens", "5", "--temperature", "0"));
    expect(*said.out && !contains(said.out, "tok/s"), "generate: stdout is %s", said.out);
}

static void test_sampling(void) {
    make_model("model", SMALL);
#define SAMPLE(...)                                                                                                    \
    "generate", "--model", "model", "--ids", "1 2 3", "--tokens", "20", "--print-ids", "--ignore-eos", __VA_ARGS__
    const char* greedy = OUTPUT_OF(SAMPLE("--temperature", "0"));
    Result one = RUN(SAMPLE("--temperature", "1", "--seed", "1")),
           two = RUN(SAMPLE("--temperature", "1", "--seed", "2"));
    expect_ids(one, "1 2 3", 23);
    expect_ids(two, "1 2 3", 23);
    expect_out(RUN(SAMPLE("--temperature", "1", "--seed", "1")), one.out);
    expect(strcmp(one.out, two.out) != 0, "seeds 1 and 2 give the same ids: %s", one.out);
    expect(strcmp(one.out, greedy) != 0, "temperature 1 is greedy: %s", one.out);
    // each of these leaves the likeliest token alone
    expect_out(RUN(SAMPLE("--temperature", "1", "--top-k", "1")), greedy);
    expect_out(RUN(SAMPLE("--temperature", "1", "--top-p", "1e-6")), greedy);
    expect_out(RUN(SAMPLE("--temperature", "1", "--min-p", "1")), greedy);
    expect_out(RUN(SAMPLE("--temperature", "1e-6")), greedy);
}

static void test_stop_tokens(void) {
    make_model("model", SMALL);
    Result r = well(RUN(GREEDY("--ids", "1 2", "--tokens", "6")));
    int id[8] = { 0 };
    expect(sscanf(r.out, "%d %d %d %d %d %d %d %d", id, id + 1, id + 2, id + 3, id + 4, id + 5, id + 6, id + 7) == 8,
           "expected eight ids: %s", r.out);
    int first = 4; // where id[4] comes first among the new ones
    for (int i = 3; i >= 2; i--)
        if (id[i] == id[4]) first = i;
    const char* stop[] = { text("%d", id[4]), text("[259, %d]", id[4]) };
    for (int i = 0; i < 2; i++) {
        make_model("model", SMALL);
        edit("model/config.json", "\"eos_token_id\": 257", text("\"eos_token_id\": %s", stop[i]));
        expect_out(RUN(GREEDY("--ids", "1 2", "--tokens", "6")), r.out);
        Result stopped = well(
            RUN("generate", "--model", "model", "--temperature", "0", "--print-ids", "--ids", "1 2", "--tokens", "6"));
        int n = count_ids(stopped.out); // with the stop token or without it
        expect(n == first || n == first + 1, "eos_token_id %s: %d ids, expected %d or %d: %s", stop[i], n, first,
               first + 1, stopped.out);
    }
    make_model("model", SMALL);
    put_text("model/generation_config.json", text("{\"eos_token_id\": [%d, 257]}", id[4]));
    Result stopped =
        well(RUN("generate", "--model", "model", "--temperature", "0", "--print-ids", "--ids", "1 2", "--tokens", "6"));
    expect(count_ids(stopped.out) <= first + 1, "eos_token_id of generation_config.json is not used: %s", stopped.out);
}

// the closing line of eval; loss and count in numbers
static double eval_line(Result r, int* predictions) {
    well(r);
    size_t n = strlen(r.out);
    const char* line = r.out;
    for (size_t i = 0; i + 1 < n; i++)
        if (r.out[i] == '\n') line = r.out + i + 1;
    double loss = 0, perplexity = 0;
    int count = -1;
    if (!expect(sscanf(line, "loss %lf perplexity %lf predictions %d", &loss, &perplexity, &count) == 3,
                "%s\n    no closing line: %s", r.command, r.out))
        return NAN;
    const char* exact = text("loss %.6f  perplexity %.4f  predictions %d\n", loss, perplexity, count);
    expect(strcmp(line, exact) == 0, "%s\n    closing line %s    expected %s", r.command, line, exact);
    expect(fabs(perplexity / exp(loss) - 1) < 1e-4, "%s\n    perplexity is not exp(loss): %s", r.command, line);
    if (predictions) *predictions = count;
    return loss;
}

static void test_eval(void) {
    make_model("model", SMALL);
    make_data("data.bin", 2000);
    const int* ids = make_ids(2000, 256, 7);
    // every token but the first is predicted once, whatever the window
    const int lengths[] = { 2, 3, 16, 17, 18, 33, 64, 65, 66, 129, 1000 };
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        int predictions;
        put_bin("some.bin", ids, (size_t)lengths[i], i % 2);
        eval_line(RUN("eval", "--model", "model", "--data", "some.bin", "--seq", "16"), &predictions);
        expect(predictions == lengths[i] - 1, "eval of %d tokens, --seq 16: %d predictions", lengths[i], predictions);
        eval_line(RUN("eval", "--model", "model", "--data", "some.bin"), &predictions);
        expect(predictions == lengths[i] - 1, "eval of %d tokens: %d predictions", lengths[i], predictions);
    }
    // windows stand alone: three of them, evaluated apart, give the loss of the whole
    double sum = 0;
    const struct { size_t from, n; } window[] = { { 0, 17 }, { 16, 17 }, { 32, 9 } };
    put_bin("some.bin", ids, 41, false);
    double whole = eval_line(RUN("eval", "--model", "model", "--data", "some.bin", "--seq", "16"), NULL);
    for (int i = 0; i < 3; i++) {
        put_bin("some.bin", ids + window[i].from, window[i].n, false);
        sum += eval_line(RUN("eval", "--model", "model", "--data", "some.bin", "--seq", "16"), NULL) *
               (double)(window[i].n - 1);
    }
    expect(fabs(sum / 40 - whole) < 3e-6, "eval: windows apart %.7f, together %.6f", sum / 40, whole);
    // a longer window has more to go by, another number of threads changes nothing
    put_bin("some.bin", ids, 500, false);
    Result r = RUN("eval", "--model", "model", "--data", "some.bin");
    const How eight = { .threads = 8 };
    expect_out(finish(start(eight, ARGS("eval", "--model", "model", "--data", "some.bin"))), r.out);
    // all logits 0: the loss is log V
    fill_tensor("model/model.safetensors", "model.norm.weight", 0);
    double uniform = eval_line(RUN("eval", "--model", "model", "--data", "data.bin"), NULL);
    expect(fabs(uniform - log(261)) < 2e-6, "eval of equal logits: %.6f, expected %.6f", uniform, log(261));
    // text, eval adds no bos
    give_tokenizer("model");
    put_text("text.txt", "twenty characters..!");
    int predictions;
    eval_line(RUN("eval", "--model", "model", "--data", "text.txt"), &predictions);
    expect(predictions == 19, "eval of 20 bytes of text: %d predictions", predictions);
}

static void test_hellaswag(void) {
    make_model("model", SMALL);
    give_tokenizer("model");
    const char* task = "Cooking: He breaks an egg and\n%d\nlaughs.\nstirs it.\nflies off.\nsings a long song to it.\n";
    const char *one = text(task, 1), *other = text(task, 3);
    put_text("tasks.txt", text("%s%s%s", one, other, one));
    Result r = well(RUN("eval", "--model", "model", "--hellaswag", "tasks.txt"));
    expect(strpbrk(r.out, "0123456789") && strcasestr(r.out, "acc"), "eval --hellaswag: no accuracy on stdout: %s",
           r.out);
}

static void test_dtypes(void) {
    make_data("data.bin", 500);
    Shape s = SMALL;
    double loss[3];
    for (int d = 0; d < 3; d++) {
        s.dtype = (Dtype)d; // F32, BF16, F16
        make_model("model", s);
        loss[d] = eval_line(RUN("eval", "--model", "model", "--data", "data.bin"), NULL);
        expect_ids(RUN(GREEDY("--ids", "1 2 3", "--tokens", "10")), "1 2 3", 13);
    }
    expect(fabs(loss[1] - loss[0]) < 0.02 * loss[0] && loss[1] != loss[0], "BF16 loss %f, F32 %f", loss[1], loss[0]);
    expect(fabs(loss[2] - loss[0]) < 0.002 * loss[0] && loss[2] != loss[0], "F16 loss %f, F32 %f", loss[2], loss[0]);
    s = SMALL;
    make_model("model", s);
    RUN_WELL("train", "--model", "model", "--steps", "0", "--dtype", "BF16", "--out", "half");
    double half = eval_line(RUN("eval", "--model", "half", "--data", "data.bin"), NULL);
    expect(half == loss[1], "train --steps 0 --dtype BF16: loss %f, of the same weights in BF16 %f", half, loss[1]);
    expect(contains(file_bytes("half/step-00000000/config.json", NULL), "bfloat16"),
           "config.json does not say bfloat16");
    size_t size;
    tensor_offset("half/step-00000000/model.safetensors", "model.norm.weight", &size);
    expect(size == 64, "model.norm.weight has %zu bytes, expected 64", size);
    // a model folder fine-tuned for no steps is the model
    RUN_WELL("train", "--model", "model", "--steps", "0", "--out", "full");
    double full = eval_line(RUN("eval", "--model", "full", "--data", "data.bin"), NULL);
    expect(full == loss[0], "train --steps 0: loss %f, of the model it began from %f", full, loss[0]);
}

static void test_info(void) {
    // clang-format off
    static const struct {
        const char *model, *parameters;
    } preset[] = { { "tiny", "820992" },           { "15M", NULL },  { "42M", NULL }, { "110M", NULL }, { "350M", NULL },
                   { "llama3-150M", NULL },        { "llama3.2-1B", "1235814400" },   { "llama3.2-3B", "3212749824" },
                   { "llama3.1-8B", "8030261248" }, { "llama3.1-70B", "70553706496" } };
    // clang-format on
    for (size_t i = 0; i < sizeof preset / sizeof preset[0]; i++) {
        const How quick = { .seconds = 20 };
        Result r = well(finish(start(quick, ARGS("info", "--model", preset[i].model))));
        char* digits = text("%s", r.out);
        int n = 0;
        for (const char* s = r.out; *s; s++)
            if (*s != ',') digits[n++] = *s;
        digits[n] = 0;
        if (preset[i].parameters)
            expect(contains(digits, preset[i].parameters), "info --model %s does not say %s parameters:\n%s",
                   preset[i].model, preset[i].parameters, r.out);
        expect(n > 0 && strcasestr(r.out, "FLOP") && strcasestr(r.out, "MiB"), "info --model %s:\n%s", preset[i].model,
               r.out);
    }
    make_model("model", SMALL);
    Result r = well(RUN("info", "--model", "model"));
    expect(contains(r.out, "26,944") || contains(r.out, "26944"), "info of a folder with 26,944 parameters:\n%s",
           r.out);
}

static void test_stories260K(void) {
    const char* folder = text("%s", test_data("stories260K/hf"));
    const char* want = file_bytes(test_data("stories260K/greedy_ids.txt"), NULL);
    Result r =
        well(RUN("generate", "--model", folder, "--ids", "1", "--tokens", "200", "--temperature", "0", "--print-ids"));
    expect(strcmp(r.out, want) == 0 || strcmp(r.out, text("%s\n", want)) == 0, "stories260K: ids %sexpected %s", r.out,
           want);
}

// ---- conversation and pipes ------------------------------------------------------------------

static void test_chat(void) {
    Shape s = SMALL;
    s.context = 512;
    make_model("model", s);
    give_tokenizer("model");
    const char* input[] = { "", "hello\n", "hello\nhow are you?\n", "no end of line", "\n\n", "<|eot_id|>\n" };
    for (size_t i = 0; i < sizeof input / sizeof input[0]; i++) {
        const How how = { .input = input[i], .seconds = 60 };
        Result r = well(finish(start(how, ARGS("chat", "--model", "model"))));
        expect(!contains(r.err, "error"), "chat with \"%s\": %s", input[i], r.err);
        if (contains(input[i], "hello")) expect(*r.out, "chat with \"%s\" answers nothing", input[i]);
    }
    // a talk that outgrows the context ends in words or goes on, but does not crash
    char* long_talk = text("%s", "tell me more about it\n");
    for (int i = 0; i < 6; i++) long_talk = text("%s%s", long_talk, long_talk);
    make_model("model", SMALL);
    const How how = { .input = long_talk, .seconds = 60 };
    Result r = finish(start(how, ARGS("chat", "--model", "model")));
    expect(r.code == 0 || (r.code == 1 && contains(r.err, "error: ")), "chat beyond the context: exit %d, %s", r.code,
           r.err);
}

// llama3 … | head: no words about it, and no crash
static void test_reader_gone(void) {
    make_model("model", SMALL);
    give_tokenizer("model");
    put_text("text.txt", "a text\n");
    const How gone = { .reader_gone = true, .seconds = 20 };
    const char* const* args[] = {
        ARGS("generate", "--model", "model", "--ids", "1 2", "--tokens", "40"),
        ARGS("tokenize", "--data", "text.txt", "--print-ids"),
        ARGS("--help"),
    };
    for (int i = 0; i < 3; i++) {
        Result r = well(finish(start(AS_USUAL, args[i])));
        expect(*r.out, "%s prints nothing", r.command);
        r = finish(start(gone, args[i]));
        bool quiet = r.code == -SIGPIPE || (r.code >= 0 && r.code <= 1 && count_lines(r.err) <= 1) || r.code == 141;
        expect(quiet, "%s | (no reader)\n    exit %d: %s", r.command, r.code, r.err);
    }
}

int main(int argc, char** argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]); // those alone: a name, with * and ?
    const struct CMUnitTest tests[] = {
        TEST(test_help),
        TEST(test_version),
        TEST(test_mistyped),
        TEST(test_bad_values),
        TEST(test_bad_config),
        TEST(test_config_spellings),
        TEST(test_bad_safetensors),
        TEST(test_shards),
        TEST(test_nan_in_weights),
        TEST(test_bad_tokenizer),
        TEST(test_bad_data),
        TEST(test_no_place_to_write),
        TEST(test_read_only_disk),
        TEST(test_full_disk),
        TEST(test_file_limit),
        TEST(test_tokenize_bytes),
        TEST(test_tokenize_llama3),
        TEST(test_generate_ids),
        TEST(test_sampling),
        TEST(test_stop_tokens),
        TEST(test_eval),
        TEST(test_hellaswag),
        TEST(test_dtypes),
        TEST(test_info),
        TEST(test_stories260K),
        TEST(test_chat),
        TEST(test_reader_gone),
    };
    return cmocka_run_group_tests(tests, open_group, NULL);
}
