/*
RoPE on the GPU, in place on packed rows, against rope_forward_cpu and rope_backward_cpu: one rounding, at the store. What is
not turned (the values behind the heads, the gap up to ldx) keeps its bits.
*/
#include "gpu_test.cuh"
#include "llmc/rope.h"

typedef struct {
    GpuFloats cos, sin;
} RopeTables;

static RopeTables rope_tables(int positions, int HD) {
    size_t n = (size_t)positions * HD / 2;
    float *c = (float*)allocate(n, sizeof *c), *s = (float*)allocate(n, sizeof *s);
    rope_table_cpu(c, s, positions, HD, 500000, 32, 1, 4, 8192);
    RopeTables tables = { gpu_upload_floats(c, n), gpu_upload_floats(s, n) };
    free(c), free(s);
    return tables;
}

static void rope_shape(int B, int T, int pos, int heads, int HD, int ldx) {
    size_t rows = (size_t)B * T, n = rows * ldx;
    RopeTables t = rope_tables(pos + T, HD);
    GpuArray original = gpu_random(n, 1, 1), x = gpu_upload(original.host, n), dx = gpu_upload(original.host, n);
    float *want = (float*)allocate(n, sizeof *want), *want_dx = (float*)allocate(n, sizeof *want);
    memcpy(want, original.host, n * sizeof *want);
    memcpy(want_dx, original.host, n * sizeof *want);
    rope_forward_cpu(want, t.cos.host, t.sin.host, B, T, pos, heads, HD, ldx);
    rope_backward_cpu(want_dx, t.cos.host, t.sin.host, B, T, pos, heads, HD, ldx);
    rope_forward(x.x, t.cos.x, t.sin.x, B, T, pos, heads, HD, ldx, 0);
    rope_backward(dx.x, t.cos.x, t.sin.x, B, T, pos, heads, HD, ldx, 0);
    gpu_check("rope forward", x, want, n, gpu_tolerance(1.01));
    gpu_check("rope backward", dx, want_dx, n, gpu_tolerance(1.01));
    float *got = gpu_read(&x, 0, n), *got_dx = gpu_read(&dx, 0, n);
    size_t changed = 0;
    for (size_t row = 0; row < rows; row++)
        for (int i = heads * HD; i < ldx; i++) {
            size_t at = row * ldx + i;
            changed += got[at] != original.host[at] || got_dx[at] != original.host[at];
        }
    gpu_expect(changed == 0, "rope: %zu numbers behind the heads were changed", changed);
    gpu_free(&original), gpu_free(&x), gpu_free(&dx), gpu_free(&t.cos), gpu_free(&t.sin);
    free(want), free(want_dx), free(got), free(got_dx);
}

// the last row starts beyond element 2^31
static void rope_large(void) {
    const int T = 512, HD = 128, heads = 40, ldx = 48 * HD, n = T * ldx;
    const int B = (int)(((size_t)1 << 31) / n) + 2;
    const size_t last = (size_t)(B - 1) * n;
    if (gpu_reduced || !gpu_has_room("rope beyond 2^31", (size_t)B * n * sizeof(floatX))) return;
    RopeTables t = rope_tables(T, HD);
    GpuArray x = gpu_poison((size_t)B * n), sequence = gpu_random(n, 1, 1);
    cuda_check(cudaMemcpy(x.x + last, sequence.x, n * sizeof(floatX), cudaMemcpyDeviceToDevice));
    rope_forward_cpu(sequence.host, t.cos.host, t.sin.host, 1, T, 0, heads, HD, ldx);
    rope_forward(x.x, t.cos.x, t.sin.x, B, T, 0, heads, HD, ldx, 0);
    gpu_check_at("rope beyond 2^31", x, last, sequence.host, n, gpu_tolerance(1.01));
    gpu_free(&x), gpu_free(&sequence), gpu_free(&t.cos), gpu_free(&t.sin);
}

static void test_rope(void) {
    rope_shape(1, 1, 0, 1, 8, 8);
    rope_shape(2, 5, 3, 3, 8, 40);        // half a head is 8 bytes in bf16
    rope_shape(2, 7, 0, 5, 24, 128);      // 24 bytes
    rope_shape(3, 9, 2, 8, 48, 10 * 48);  // three lanes a head
    rope_shape(2, 33, 0, 6, 32, 8 * 32);
    rope_shape(2, 17, 5, 40, 64, 48 * 64);
    rope_shape(1, 65, 0, 40, 128, 48 * 128);
    rope_shape(2, 3, 0, 72, 128, 80 * 128);
    rope_shape(1, 4, 1, 32, 256, 32 * 256);
    rope_shape(2, 2, 0, 3, 520, 4 * 520); // more than 32 lanes a head, and not a multiple
    rope_shape(1, 3, 0, 2, 1032, 2 * 1032);
    rope_shape(1, 3, 0, 2, 1040, 2 * 1040);
    rope_large();
}
