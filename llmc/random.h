/*
Random numbers by counting: the i-th number of a stream is a hash of (seed, stream, i). No state: any thread, on the CPU
or the GPU, computes any number of it, and a run resumes by remembering how far it was.

    bits        three rounds of SplitMix64's finaliser over seed, stream and index
    uniform     24 of those bits, in [0, 1)
    normal      twelve 21-bit uniforms, summed and centred (Irwin-Hall): integers, so that the sum is exact and CPU and GPU
                agree to the bit, which logf and cosf would not. Tails end at 6 standard deviations; kurtosis is 2.9
    permute     a bijection of 0 .. n-1: a Feistel network over the next even power of two, walked until it lands below n

Proved by       dev/test/test_data.c: moments of both, permutations that miss nothing
Source          Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (constants of the finaliser)
*/
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define RANDOM_FUNCTION __host__ __device__ static inline
#else
#define RANDOM_FUNCTION static inline
#endif

RANDOM_FUNCTION uint64_t random_mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

RANDOM_FUNCTION uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
    return random_mix(random_mix(random_mix(seed) ^ stream) ^ index);
}

// in [0, 1)
RANDOM_FUNCTION float random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    return (float)(random_bits(seed, stream, index) >> 40) * 0x1p-24f;
}

// mean 0, variance 1
RANDOM_FUNCTION float random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
    const uint32_t mask = (1u << 21) - 1;
    uint64_t key = random_mix(random_mix(seed) ^ stream);
    int32_t sum = -6 * (1 << 21) + 6; // twelve times the mean, (2^21 - 1) / 2
    for (uint64_t word = 0; word < 4; word++) {
        uint64_t bits = random_mix(key ^ (index * 4 + word));
        sum += (int32_t)((bits & mask) + (bits >> 21 & mask) + (bits >> 42 & mask));
    }
    return (float)sum * 0x1p-21f;
}

// where i goes in the permutation of 0 .. n-1 that belongs to (seed, stream); 0 <= i < n
RANDOM_FUNCTION uint64_t random_permute(uint64_t seed, uint64_t stream, uint64_t n, uint64_t i) {
    int half = 1; // bits in each half
    while (half < 32 && (uint64_t)1 << (2 * half) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t mixed = left ^ (random_bits(seed, stream ^ round << 56, right) & mask);
            left = right;
            right = mixed;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}
