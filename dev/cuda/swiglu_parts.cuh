/*
What SwiGLU's two files share: three ways to compute 1 / (1 + e^-x), and how rows are cut into blocks.
*/
#pragma once

#include "llmc/swiglu.h"
#include "streams.cuh"

// ---- 1 / (1 + e^-x) --------------------------------------------------------------------------

struct Exact { // good to some units in the last place
    static __device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }
};

struct Special { // llmc's, from the special function unit
    static __device__ __forceinline__ float sigmoid(float x) { return swiglu_sigmoid(x); }
};

// the same two instructions without what guards them: powers below 2^-126 become 0, and 1 + that is 1 either way
__device__ __forceinline__ float lean_sigmoid(float x) {
    float power, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f)); // -log2 e
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1 + power));
    return s;
}

// ---- blocks ----------------------------------------------------------------------------------

static inline unsigned blocks_for(int F, int64_t numbers, int64_t each) {
    launch_require(F % 8 == 0, "swiglu", "F (intermediate_size) must be a multiple of 8");
    return (unsigned)ceil_div(numbers, each);
}

// a row of F numbers, P packs, in `count` pieces of at most `most` packs, as even as they come
struct Pieces {
    unsigned P, count, packs; // packs: of a piece
    Pieces(int F, int64_t most) {
        P = blocks_for(F, F, PACK);
        count = (unsigned)ceil_div(P, most), packs = (unsigned)ceil_div(P, count);
    }
    // of a block, if each takes so many packs
    unsigned threads(int each) const { return (unsigned)ceil_div(packs, (int64_t)WARP * each) * WARP; }
    // pieces along x, rows along y and, where they are more than y can number, z
    dim3 grid(int rows) const {
        const unsigned deep = (unsigned)ceil_div(rows, 32768);
        return dim3(count, (unsigned)ceil_div(rows, deep), deep);
    }
};
