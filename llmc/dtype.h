/*
How numbers are stored: F32, BF16 (the upper half of a float) and F16 (IEEE half).

    float   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
    bf16    s eeeeeeee mmmmmmm                       same range, 8 bits of precision
    f16     s eeeee mmmmmmmmmm                       range 6e-8 to 65504, 11 bits of precision

Conversions to a narrower type round to nearest even; NaN stays NaN, too large becomes infinite.
Proved by       dev/test/test_files.c (every 16-bit pattern there and back)
*/
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum { DTYPE_F32, DTYPE_BF16, DTYPE_F16 } Dtype;

// a view of stored numbers; who owns them is said where the view is made. data may sit at any byte address
typedef struct {
    void* data;
    Dtype dtype;
} Tensor;

enum { IGNORED_LABEL = -100 }; // in place of a token id: a position whose prediction does not count

// 16-bit patterns at any byte address, as they lie in a file
typedef uint16_t unaligned_u16 __attribute__((aligned(1)));
typedef float unaligned_f32 __attribute__((aligned(1)));

static inline size_t dtype_bytes(Dtype dtype) { return dtype == DTYPE_F32 ? 4 : 2; }

static inline const char* dtype_name(Dtype dtype) {
    return dtype == DTYPE_F32 ? "F32" : dtype == DTYPE_BF16 ? "BF16" : "F16";
}

static inline float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float bf16_to_float(uint16_t h) { return float_from_bits((uint32_t)h << 16); }

static inline uint16_t float_to_bf16(float x) {
    uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40); // NaN: keep it quiet
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// without branches, so that loops over it vectorise: the exponent is moved by multiplying with 2^112, which also
// brings subnormals to their value; infinity and NaN keep all exponent bits set
static inline float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t bits = bits_of_float(float_from_bits(rest) * 0x1p112f);
    return float_from_bits(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : bits));
}

static inline uint16_t float_to_f16(float x) {
    uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);  // NaN
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); // 65520 and more round to infinity
    if (rest < 0x38800000u) // below 2^-14: a multiple of 2^-24, which the addition rounds to
        return (uint16_t)(sign | (bits_of_float(float_from_bits(rest) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13));
}

// element i of a tensor, as float
static inline float tensor_get(Tensor t, size_t i) {
    if (t.dtype == DTYPE_BF16) return bf16_to_float(((const unaligned_u16*)t.data)[i]);
    if (t.dtype == DTYPE_F16) return f16_to_float(((const unaligned_u16*)t.data)[i]);
    return ((const unaligned_f32*)t.data)[i];
}
