/*
What the variants of attention share that give a warp 16 rows: products of one fragment of rows. Instructions, fragments and
swizzled tiles are those of llmc/attention_flash.cuh, whose warps have 32 rows.
*/
#pragma once

#include "llmc/attention.h"

// c (16, N) += a (16, HD) · b (N, HD)^T
template <int HD, int N>
__device__ __forceinline__ void rows_dot(float (&c)[N / 8][4], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < HD; k += 16) {
        uint32_t fa[4], fb[4];
        flash_ldmatrix(fa, a ^ (uint32_t)(2 * k));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            flash_ldmatrix(fb, (b ^ (uint32_t)(2 * k)) + (uint32_t)(n * flash_pitch(HD)));
            flash_mma(c[n / 8], fa, fb[0], fb[1]);
            flash_mma(c[n / 8 + 1], fa, fb[2], fb[3]);
        }
    }
}

// c (16, COLUMNS) += p (16, N) · b (N, HD), of whose columns as many count
template <int HD, int N, int COLUMNS = HD>
__device__ __forceinline__ void rows_multiply(float (&c)[COLUMNS / 8][4], const uint32_t (&p)[N / 16][4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < N; k += 16)
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 16) {
            uint32_t fb[4];
            flash_ldmatrix_transposed(fb, (b ^ (uint32_t)(2 * n)) + (uint32_t)(k * flash_pitch(HD)));
            flash_mma(c[n / 8], p[k / 16], fb[0], fb[1]);
            flash_mma(c[n / 8 + 1], p[k / 16], fb[2], fb[3]);
        }
}

// p (16, N) of a product goes to shared memory: 16 swizzled rows of 128 bytes
template <int N>
__device__ __forceinline__ void rows_store(uint32_t tile, const float (&s)[N / 8][4], int lane) {
    static_assert(N == 64, "a row is 128 bytes");
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int row = flash_row(0, e, lane);
            flash_store(tile + (uint32_t)(row * 128 + (n ^ row % 8) * 16 + lane % 4 * 4),
                        flash_pack(s[n][e], s[n][e + 1]));
        }
}

// and back as the a of a product
template <int N>
__device__ __forceinline__ void rows_detour(uint32_t (&p)[N / 16][4], const float (&s)[N / 8][4], uint32_t tile,
                                            int lane) {
    __syncwarp();
    rows_store<N>(tile, s, lane);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < N; k += 16) flash_ldmatrix(p[k / 16], tile + (flash_by_rows<64>(lane) ^ (uint32_t)(2 * k)));
}
