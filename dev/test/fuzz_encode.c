/*
Any bytes as text: the split and BPE, with a small tokenizer, with the same ignoring its merges, and with bytes alone. What
is encoded must come back. The first byte of the input chooses, and may repeat the rest into long pieces.
*/
#include "fuzz_tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static Tokenizer tokenizers[3];
    if (!tokenizers[0].V) {
        Error err;
        tokenizer_bytes(&tokenizers[0]);
        if (!tokenizer_open(&tokenizers[1], "dev/test/golden/tokenizer/tiny.json", &err) ||
            !tokenizer_open(&tokenizers[2], "dev/test/golden/tokenizer/tiny_ignore.json", &err))
            die("%s", err.text);
    }
    if (size == 0) return 0;
    Text text = { NULL, 0, 0 };
    for (int i = 0; i <= data[0] >> 4; i++) text_add(&text, (const char*)data + 1, size - 1);
    fuzz_round_trip(&tokenizers[(data[0] & 15) % 3], text.data, text.n);
    text_free(&text);
    return 0;
}
