// safetensors from anyone: never a crash, and every byte of a tensor that is accepted lies in the file. The first byte
// chooses: 255, and the rest is a file; else the rest is a header, and this many bytes of data follow it
#include "llmc/safetensors.h"

static void check(const uint8_t* file, size_t size) {
    Safetensors st;
    Error err;
    if (!safetensors_parse(&st, file, size, &err)) return;
    size_t total = 0;
    for (size_t i = 0; i < st.n; i++) {
        const SafeTensor* t = &st.tensors[i];
        require(t->data >= file && t->bytes <= size && t->data + t->bytes <= file + size, "a tensor lies in its file");
        require(safetensors_find(&st, t->name) == t, "a tensor is found by its name");
        size_t bytes = (size_t)safetensors_dtype_bytes(t->dtype);
        for (int d = 0; d < t->n_dims; d++) bytes *= (size_t)t->shape[d];
        require(bytes == t->bytes, "a tensor's shape says how many bytes it has");
        total += bytes;
    }
    require(total <= size, "tensors do not overlap");
    safetensors_close(&st);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    if (data[0] == 255) {
        check(data + 1, size - 1);
        return 0;
    }
    size_t length = size - 1, total = 8 + length + data[0];
    uint8_t* file = (uint8_t*)allocate(total, 1);
    for (int i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)length >> (8 * i));
    memcpy(file + 8, data + 1, length);
    check(file, total);
    free(file);
    return 0;
}
