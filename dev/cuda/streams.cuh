/*
What files whose kernels stream through memory share: loads and stores that tell the caches what to do with the lines, 16 bytes
as floats in few instructions, how many blocks the card holds.

    KEEP        nothing is said: through the first level, kept in the second by age
    ONCE        .cs, evict first: these lines leave the caches before others
    PAST_L1     L1::no_allocate: no line of the first level is taken
    AHEAD       the same, and a miss in the second level brings 256 bytes from memory (loads; stores as PAST_L1)

Bits is int4 or int2. A load stays before the stores that follow it in the program: places may be read and written in turn.
*/
#pragma once

#include "llmc/gpu.cuh"

enum Hint { KEEP, ONCE, PAST_L1, AHEAD };

// ---- loads and stores ------------------------------------------------------------------------

// clang-format off
template <Hint HINT> __device__ __forceinline__ int4 hint_load(const int4* p) {
    int4 v;
    if constexpr (HINT == KEEP) v = *p;
    if constexpr (HINT == ONCE) v = __ldcs(p);
    if constexpr (HINT == PAST_L1)
        asm volatile("ld.global.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    if constexpr (HINT == AHEAD)
        asm volatile("ld.global.L1::no_allocate.L2::256B.v4.s32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

template <Hint HINT> __device__ __forceinline__ int2 hint_load(const int2* p) {
    int2 v;
    if constexpr (HINT == KEEP) v = *p;
    if constexpr (HINT == ONCE) v = __ldcs(p);
    if constexpr (HINT == PAST_L1)
        asm volatile("ld.global.L1::no_allocate.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    if constexpr (HINT == AHEAD)
        asm volatile("ld.global.L1::no_allocate.L2::256B.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}

template <Hint HINT> __device__ __forceinline__ void hint_store(int4* p, int4 v) {
    if constexpr (HINT == KEEP) // not *p = v: nvcc 13 may take such a store of bf16 apart, into four of 4 bytes
        asm volatile("st.global.v4.s32 [%0], {%1, %2, %3, %4};"
                     :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    if constexpr (HINT == ONCE) __stcs(p, v);
    if constexpr (HINT == PAST_L1 || HINT == AHEAD)
        asm volatile("st.global.L1::no_allocate.v4.s32 [%0], {%1, %2, %3, %4};"
                     :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

template <Hint HINT> __device__ __forceinline__ void hint_store(int2* p, int2 v) {
    if constexpr (HINT == KEEP)
        asm volatile("st.global.v2.s32 [%0], {%1, %2};" :: "l"(p), "r"(v.x), "r"(v.y) : "memory");
    if constexpr (HINT == ONCE) __stcs(p, v);
    if constexpr (HINT == PAST_L1 || HINT == AHEAD)
        asm volatile("st.global.L1::no_allocate.v2.s32 [%0], {%1, %2};" :: "l"(p), "r"(v.x), "r"(v.y) : "memory");
}
// clang-format on

// ---- 16 or 8 bytes as floats -----------------------------------------------------------------
// A bf16 is the upper half of a float: one shift for the lower of two, one mask for the upper. Two floats are rounded and
// packed by one instruction.

template <typename Bits>
struct Widened {
    enum { N = sizeof(Bits) / sizeof(floatX), WORDS = sizeof(Bits) / 4 };
    float x[N];
};

template <typename Bits>
__device__ __forceinline__ Widened<Bits> widen(Bits bits) {
    Widened<Bits> v;
    uint32_t words[Widened<Bits>::WORDS];
    memcpy(words, &bits, sizeof bits);
#pragma unroll
    for (int k = 0; k < Widened<Bits>::WORDS; k++)
        if constexpr (sizeof(floatX) == 2) {
            v.x[2 * k] = __uint_as_float(words[k] << 16);
            v.x[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
        } else {
            v.x[k] = __uint_as_float(words[k]);
        }
    return v;
}

template <typename Bits>
__device__ __forceinline__ Bits narrow(const Widened<Bits>& v) {
    uint32_t words[Widened<Bits>::WORDS];
#pragma unroll
    for (int k = 0; k < Widened<Bits>::WORDS; k++)
        if constexpr (sizeof(floatX) == 2) {
            const __nv_bfloat162 two = __floats2bfloat162_rn(v.x[2 * k], v.x[2 * k + 1]);
            memcpy(&words[k], &two, 4);
        } else {
            words[k] = __float_as_uint(v.x[k]);
        }
    Bits bits;
    memcpy(&bits, words, sizeof bits);
    return bits;
}

// ---- blocks that stay ------------------------------------------------------------------------

// blocks of this kernel that the card holds at a time
template <typename Kernel>
static int64_t resident_blocks(Kernel kernel, int threads, int shared) {
    int blocks;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, (size_t)shared));
    return (int64_t)blocks * gpu_processors();
}
