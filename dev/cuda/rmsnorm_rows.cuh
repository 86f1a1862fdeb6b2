/*
What the RMSNorm files share: how many threads take a row, and how many packs of 16 bytes each of them has.
*/
#pragma once

#include <type_traits>

#include "llmc/rmsnorm.h"

// threads, in whole warps, that take a row: `block`, or as many more as hold the row with `most` packs each, or as many fewer
// as have a pack at all
static inline int row_threads(int C, int block, int most) {
    const int fewest = rmsnorm_threads(C, most), all = rmsnorm_threads(C, 1);
    const int threads = block > fewest ? block : fewest;
    return threads < all ? threads : all;
}

// calls f with 1, 2, 4 or 8, MOST at most, as a type: the fewest packs for each of `threads` threads to hold a row
template <int MOST, typename F>
static void with_packs(int C, int threads, F f) {
    const int64_t packs = ceil_div(C / PACK, threads);
    launch_require(packs <= MOST, "with_packs", "threads of so many packs hold a row");
    if (packs <= 1) return f(std::integral_constant<int, 1>());
    if (packs <= 2 || MOST == 2) return f(std::integral_constant<int, 2>());
    if constexpr (MOST >= 4)
        if (packs <= 4 || MOST == 4) return f(std::integral_constant<int, 4>());
    if constexpr (MOST >= 8) f(std::integral_constant<int, 8>());
}

// the most bytes of shared memory that a block may have, beside 1 KB for what kernels declare themselves
static inline int64_t most_shared(void) {
    int device, most;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return most - 1024;
}

// calls f with how many stages of so many bytes a block may have, 3 at most, as a type
template <typename F>
static void with_stages(int64_t bytes, F f) {
    if (3 * bytes <= most_shared())
        f(std::integral_constant<int, 3>());
    else if (2 * bytes <= most_shared())
        f(std::integral_constant<int, 2>());
    else
        f(std::integral_constant<int, 1>());
}

// blocks of this kernel that the GPU runs at a time
template <typename Kernel>
static int resident_blocks(Kernel kernel, int threads, size_t shared) {
    int blocks;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared));
    return blocks * gpu_processors();
}
