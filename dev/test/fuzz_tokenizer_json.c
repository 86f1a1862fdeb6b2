/*
Any bytes as a tokenizer.json: refused with a line, or a tokenizer whose encoding gives the text back, also after it was
written and read again.

A good first corpus: the .json files of dev/test/golden/tokenizer.
*/
#include "fuzz_tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Tokenizer t, again;
    Error err;
    if (!tokenizer_parse_json(&t, (const char*)data, size, &err)) return fuzz_refused(&err);
    if (t.V > 1 << 16) return tokenizer_close(&t), 0; // sparse ids, all well
    fuzz_round_trip(&t, FUZZ_TEXT, sizeof FUZZ_TEXT - 1);
    bool read_again = tokenizer_parse_json(&again, t.source.data, t.source.n, &err);
    require(read_again && again.V == t.V, "what was read can be read again");
    tokenizer_close(&t), tokenizer_close(&again);
    return 0;
}
