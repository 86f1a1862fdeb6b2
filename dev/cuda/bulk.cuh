/*
Copies of one run of bytes by Hopper's copy engine, without a tensor map: what llmc/hopper.cuh has for boxes of matrices.
Addresses and bytes are multiples of 16; a run is shorter than 1 MB.
*/
#pragma once

#include "llmc/hopper.cuh"

// to shared memory; the bytes count at bar
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}

// from shared memory; part of the group that tma_store_commit closes
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}
