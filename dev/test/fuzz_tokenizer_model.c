/*
Any bytes as a tokenizer.model: refused with a line, or a tokenizer whose encoding gives the text back, and whose
tokenizer.json is read as the same tokenizer. Tokens for all bytes are put before what the fuzzer finds.
*/
#include "fuzz_tokenizer.h"

// 256 lines, one for each byte
static void add_byte_lines(Text* model) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int byte = 0; byte < 256; byte++) {
        char token[4] = { digits[byte >> 2], digits[(byte & 3) << 4], '=', '=' };
        text_add(model, token, 4), text_add(model, " ", 1), text_whole(model, byte), text_add(model, "\n", 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Tokenizer t, again;
    Error err;
    if (tokenizer_parse_model(&t, (const char*)data, size, &err))
        tokenizer_close(&t);
    else
        fuzz_refused(&err);
    Text model = { NULL, 0, 0 };
    add_byte_lines(&model);
    text_add(&model, (const char*)data, size);
    bool ok = tokenizer_parse_model(&t, model.data, model.n, &err);
    text_free(&model);
    if (!ok) return fuzz_refused(&err);
    fuzz_round_trip(&t, FUZZ_TEXT, sizeof FUZZ_TEXT - 1);
    Text json = { NULL, 0, 0 };
    tokenizer_write_json(&json, &t);
    ok = tokenizer_parse_json(&again, json.data, json.n, &err);
    require(ok && again.V == t.V && again.n_merges == t.n_merges, "what was written is read as what it was");
    tokenizer_close(&t), tokenizer_close(&again), text_free(&json);
    return 0;
}
