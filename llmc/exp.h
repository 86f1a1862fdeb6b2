/*
exp for float, in a form that loops over it vectorise: no branch, no call, no table.

    e^x = 2^n * e^r        n = round(x / ln 2),  r = x - n * ln 2,  |r| <= ln 2 / 2
    e^r = 1 + r + r^2 * p(r)                     p of degree 4, minimax for the error relative to e^r

Numerics        within 1.1 units in the last place; subnormal results are rounded like any other; -inf gives 0, above 88.72
                infinity, NaN stays NaN
Proved by       dev/test/test_ops_float.c, against exp in double
In double       test_ops.c includes this header while float is float, then defines exp32 to be exp
*/
#pragma once

#include "dtype.h"

static inline float exp32(float x) {
    const float round = 0x1.8p23f;                                 // adding it leaves round(x) in the low bits
    const float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f; // n * ln2_high is exact
    x = x > 89 ? 89 : x;
    x = x < -104 ? -104 : x; // e^-104 is less than half of the smallest float
    float shifted = x * 0x1.715476p0f + round, n = shifted - round;
    float r = (x - n * ln2_high) - n * ln2_low;
    float p = 0x1.6a23ccp-10f;
    p = p * r + 0x1.123a20p-7f;
    p = p * r + 0x1.5558f2p-5f;
    p = p * r + 0x1.555492p-3f;
    p = p * r + 0x1.fffffcp-2f;
    // 2^n in two factors, since n reaches from -150 to 128
    int32_t k = (int32_t)(bits_of_float(shifted) - bits_of_float(round)), half = k >> 1;
    float first = float_from_bits((uint32_t)(half + 127) << 23),
          second = float_from_bits((uint32_t)(k - half + 127) << 23);
    return (p * (r * r) + r + 1) * first * second;
}
