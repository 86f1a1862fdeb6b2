/*
What only Hopper (sm_90a) has, each instruction under a plain name: the copy engine (TMA), barriers that count bytes,
products of a warpgroup (wgmma), clusters, and registers that pass from one warpgroup to another.

    host        CUtensorMap m = tma_map_rows(x, rows, columns, stride, box_rows);      a kernel takes it as
                                                                                       const __grid_constant__ CUtensorMap
    one thread  mbarrier_expect(full, bytes);                                          bytes of all boxes that count here
                tma_load(tile, &m, full, column, row);
    consumers   mbarrier_wait(full, parity);                                           the first time 0, then 1, 0, 1 …
                wgmma_fence();
                for (k = 0; k < 64; k += 16)                                           d (64, N) += a (64, 16) · b (N, 16)^T
                    wgmma(d, wgmma_rows(a + 2 * k), wgmma_rows(b + 2 * k), true);
                wgmma_commit();
                wgmma_wait<0>(d);                                                      now d may be read
                mbarrier_arrive(empty);                                                now the tile may be overwritten

Addresses       of shared memory are 32 bits, as shared_address() gives them; the same number names the same place of its own
                shared memory in every block of a cluster
Swizzle         a tile is rows of 64 bf16, 128 bytes, one right below the other; it begins at a multiple of 1024 bytes. The 16
                bytes called chunk c of row r lie at chunk c xor (r % 8) of that row. tma_load with a map of tma_map_rows
                writes that, wgmma reads it, hopper_swizzle(byte) says it. A wider matrix is several tiles, 64 columns each
Products        of 4 warps that begin at a multiple of 4: a warpgroup. Warp w of them, lane 4*g + t, holds of d (64, N)

                    d[4*j + 0], d[4*j + 1]      row 16*w + g,       columns 8*j + 2*t, 8*j + 2*t + 1
                    d[4*j + 2], d[4*j + 3]      row 16*w + g + 8,   the same columns                      j = 0 … N/8 - 1

                and, where a (64, 16) comes from registers, two bf16 to a register, the lower column in the lower half,

                    a[0]  row 16*w + g,     columns 2*t, 2*t+1          a[2]  row 16*w + g,     columns 2*t+8, 2*t+9
                    a[1]  row 16*w + g + 8, columns 2*t, 2*t+1          a[3]  row 16*w + g + 8, columns 2*t+8, 2*t+9

                so d rounded to bf16 is the a of a next product: the a[0 … 3] of its columns 16*i … 16*i + 15 are the pairs
                that begin at d[8*i], d[8*i + 2], d[8*i + 4] and d[8*i + 6]
Asynchronous    wgmma and TMA run beside the program. Registers of a product (d, and a) must not be touched between
                wgmma_commit and wgmma_wait. What ordinary stores put into shared memory is seen by wgmma and TMA only after
                fence_async() in the writing threads and then a barrier
Elsewhere       kernels keep their body inside #ifdef HOPPER_CODE and are not launched where hopper_refuses() gives a reason
Source          NVIDIA, PTX ISA 8 and 9: "Asynchronous warpgroup level matrix instructions", "Tensors", "mbarrier"
*/
#pragma once

#include <cuda.h> // CUtensorMap; nothing of libcuda is linked

#include "gpu.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER_CODE // this pass of the compiler is for sm_90a
#endif

// ns after which a wait in a kernel gives up and ends the kernel with an error: a missing arrival is no reason to hang
#ifndef HOPPER_PATIENCE
#define HOPPER_PATIENCE 10000000000ull
#endif

// ---- host ------------------------------------------------------------------------------------

// NULL on a Hopper GPU, else why its kernels do not run
static inline const char* hopper_refuses(void) {
    static int major = 0;
    int device;
    if (!major) {
        cuda_check(cudaGetDevice(&device));
        cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    }
    return major == 9 ? NULL : "needs a Hopper GPU (sm_90a)";
}

typedef CUresult (*TmaEncode)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// the driver's cuTensorMapEncodeTiled, found at run time
static inline TmaEncode tma_encode(void) {
    static void* encode = NULL;
    cudaDriverEntryPointQueryResult found;
    if (!encode) {
        cuda_check(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
        launch_require(encode && found == cudaDriverEntryPointSuccess, "tma_map",
                       "the driver knows tensor maps (CUDA 12)");
    }
    return (TmaEncode)encode;
}

static inline CUtensorMapDataType tma_type(const float*) { return CU_TENSOR_MAP_DATA_TYPE_FLOAT32; }
static inline CUtensorMapDataType tma_type(const __nv_bfloat16*) { return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; }

// describes an array of `rank` (1 to 5) sizes, the contiguous one first; strides[i] numbers from one step of size i + 1 to the
// next (rank - 1 of them). A copy moves a box; what of it lies outside the array is read as zero and not written.
// swizzle: 128, 64, 32 or 0 bytes, within which the box's rows, at most so long, are permuted.
// p and strides are multiples of 16 bytes; a box is at most 256 in each direction
template <typename T>
static inline CUtensorMap tma_map(const T* p, int rank, const int64_t* sizes, const int64_t* strides, const int* box,
                                  int swizzle) {
    CUtensorMap map;
    cuuint64_t size[5], bytes[5];
    cuuint32_t boxes[5], every[5];
    for (int i = 0; i < rank; i++) size[i] = (cuuint64_t)sizes[i], boxes[i] = (cuuint32_t)box[i], every[i] = 1;
    for (int i = 0; i < rank - 1; i++) bytes[i] = (cuuint64_t)strides[i] * sizeof(T);
    CUresult code = tma_encode()(&map, tma_type(p), (cuuint32_t)rank, (void*)p, size, bytes, boxes, every,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                 : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                 : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                 : CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS)
        die("tma_map: the driver refuses an array of %lld x %lld in boxes of %d x %d: code %d", (long long)sizes[0],
            rank > 1 ? (long long)sizes[1] : 1, box[0], rank > 1 ? box[1] : 1, (int)code);
    return map;
}

// a matrix (rows, columns) of bf16, its rows `stride` numbers apart, in tiles of box_rows rows of 64 columns, 128-byte swizzle
static inline CUtensorMap tma_map_rows(const __nv_bfloat16* p, int64_t rows, int64_t columns, int64_t stride,
                                       int box_rows) {
    const int64_t sizes[2] = { columns, rows };
    const int box[2] = { 64, box_rows };
    return tma_map(p, 2, sizes, &stride, box, 128);
}

// where the byte at this offset of a tile of 128-byte rows lies
__host__ __device__ constexpr uint32_t hopper_swizzle(uint32_t byte) { return byte ^ (byte >> 3 & 0x70); }

// ---- addresses, fences, registers ------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// one lane of a warp whose lanes are all here; always the same
__device__ __forceinline__ bool elect_one(void) {
    uint32_t yes;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(yes));
    return yes != 0;
}

// ordinary stores of this thread to shared memory come before what TMA and wgmma do after the next barrier
__device__ __forceinline__ void fence_async(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// all 4 warps of a warpgroup give back, or ask for, registers: N (24 to 256, a multiple of 8) for each thread from now on.
// The kernel has __launch_bounds__(threads, 1); asking waits until others have given
template <int N>
__device__ __forceinline__ void registers_give(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_take(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// barrier `id` (1 to 15; 0 is __syncthreads) of some warps of the block: waits until `threads` have come to it
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// counts as having come, and goes on
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarrier: counts arrivals and bytes -----------------------------------------------------
// 8 bytes of shared memory. A phase ends when `count` arrivals and all the bytes expected in it have come; then the next
// begins. mbarrier_wait(bar, parity) returns when the phase of that parity has ended: of a new barrier, parity 1 counts as
// ended and 0 is the phase that runs. Nobody may fall a whole phase behind.

__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// after the inits, in the thread that made them, before __syncthreads or cluster_sync: TMA and other blocks see them
__device__ __forceinline__ void mbarrier_init_done(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}

// one arrival; what this thread did before is seen by those who wait
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// one arrival at that barrier of block `rank` of the cluster
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t bar, uint32_t rank) {
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(bar),
                 "r"(rank)
                 : "memory");
}

// the same by readers: they are done with the place, but what they stored is not yet seen by those who wait. A release to
// another block is MEMBAR.ALL.GPU in SASS: hundreds of cycles, in which a warp starts no product
__device__ __forceinline__ void mbarrier_used_at(uint32_t bar, uint32_t rank) {
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
                 "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there]; }" ::"r"(bar),
                 "r"(rank)
                 : "memory");
}

// one arrival, and so many more bytes to come in this phase
__device__ __forceinline__ void mbarrier_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// has the phase of this parity ended? May sleep for a short time before it says no
__device__ __forceinline__ bool mbarrier_ended(uint32_t bar, uint32_t parity) {
    uint32_t yes;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(yes)
                 : "r"(bar), "r"(parity)
                 : "memory");
    return yes != 0;
}

// waits until the phase of this parity has ended. One asm block: a trap that the compiler sees as a way out of the kernel makes it
// give up what registers_take promised, and wgmma is serialised (C7512)
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile("{ .reg .pred p; .reg .u32 polls; .reg .u64 since, now;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "mov.u64 since, %%globaltimer;\n"
                 "mov.u32 polls, 0;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "add.u32 polls, polls, 1;\n"
                 "and.b32 polls, polls, 255;\n"
                 "setp.ne.u32 p, polls, 0;\n"
                 "@p bra again;\n"
                 "mov.u64 now, %%globaltimer;\n"
                 "sub.u64 now, now, since;\n"
                 "setp.lt.u64 p, now, %2;\n"
                 "@p bra again;\n"
                 "trap;\n"
                 "done: }" ::"r"(bar),
                 "r"(parity), "n"(HOPPER_PATIENCE)
                 : "memory");
}

// ---- TMA: one thread starts the copy of a box ------------------------------------------------
// x counts numbers of the contiguous direction, y and z the next ones; they may lie outside the array, x may be negative.
// Tiles of shared memory begin at multiples of 128 bytes, swizzled ones at multiples of 1024.

// fetches the map itself, once at the start of a kernel
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// to shared memory; its bytes (the whole box, zeros too) count at bar
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t bar, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(map), "r"(x), "r"(y), "r"(bar)
        : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t bar, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(bar)
        : "memory");
}

// to the same place of every block of the cluster whose bit is set in `ranks`; the bytes count at bar in each of them
__device__ __forceinline__ void tma_load_multicast(uint32_t to, const CUtensorMap* map, uint32_t bar, int x, int y,
                                                   uint16_t ranks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(bar), "h"(ranks)
                 : "memory");
}

// from shared memory; what lies outside the array is not written. Part of the group that tma_store_commit closes
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x),
                 "r"(y), "r"(from)
                 : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map), "r"(x),
                 "r"(y), "r"(z), "r"(from)
                 : "memory");
}

// runs of bytes, without a map: addresses and lengths are multiples of 16, a run is shorter than 1 MB. To shared memory, where the
// bytes count at bar; and from there, part of the group that tma_store_commit closes
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void tma_store_commit(void) { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// until all but the last N groups of this thread have read their shared memory, which may then be written again
template <int N>
__device__ __forceinline__ void tma_store_wait_read(void) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// until all but the last N groups of this thread are written. A block must not end before its last stores have been read
template <int N>
__device__ __forceinline__ void tma_store_wait(void) {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// ---- clusters: up to 8 blocks on multiprocessors that lie together ---------------------------

__device__ __forceinline__ uint32_t cluster_rank(void) {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// __syncthreads of all blocks of the cluster. A block must not end while another may still send to it
__device__ __forceinline__ void cluster_sync(void) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- wgmma -----------------------------------------------------------------------------------

// before the first product, and whenever d or a were touched since: their registers are ready
__device__ __forceinline__ void wgmma_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// the products since the last commit are a group
__device__ __forceinline__ void wgmma_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// tells the compiler that d changes here: it keeps what reads d behind this line, what writes d before it
template <int N>
__device__ __forceinline__ void wgmma_keep(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// until all but the last GROUPS groups are done. With d named, what reads d stays behind the wait
template <int GROUPS>
__device__ __forceinline__ void wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}
template <int GROUPS, int N>
__device__ __forceinline__ void wgmma_wait(float (&d)[N]) {
    wgmma_wait<GROUPS>();
    wgmma_keep(d);
}

// Descriptors say where in shared memory a factor lies. The lower 14 bits are the address in units of 16 bytes, so that
// desc + n is the same n * 16 bytes further on.

// a (64, 16) or b (N, 16), row by row: k runs along the rows. address: of row 0, column 0 of a tile, plus 32 bytes (desc + 2)
// for each 16 columns further. The fields: 1024 bytes from 8 rows to the next 8, swizzle of 128 bytes
__device__ __forceinline__ uint64_t wgmma_rows(uint32_t address) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 / 16) << 32 | (uint64_t)1 << 16 | (address & 0x3ffff) / 16;
}

// the factor transposed: b stored (16, N), or a stored (16, 64); k runs down the rows. address: of row 0 of a tile, plus 2048
// bytes (desc + 128) for each 16 rows further. next: bytes from a tile to that of the next 64 columns. For wgmma with
// TRANSPOSED. The fields: 1024 bytes from 8 rows (k) to the next 8, `next` from 64 columns to the next 64
__device__ __forceinline__ uint64_t wgmma_columns(uint32_t address, uint32_t next) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 / 16) << 32 | (uint64_t)(next / 16) << 16 | (address & 0x3ffff) / 16;
}

// clang-format off
#define HOPPER_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define HOPPER_NAMES_32  HOPPER_TEN() HOPPER_TEN(1) HOPPER_TEN(2) "%30, %31"
#define HOPPER_NAMES_64  HOPPER_TEN() HOPPER_TEN(1) HOPPER_TEN(2) HOPPER_TEN(3) HOPPER_TEN(4) HOPPER_TEN(5) "%60, %61, %62, %63"
#define HOPPER_NAMES_128 HOPPER_TEN() HOPPER_TEN(1) HOPPER_TEN(2) HOPPER_TEN(3) HOPPER_TEN(4) HOPPER_TEN(5) HOPPER_TEN(6)      \
                         HOPPER_TEN(7) HOPPER_TEN(8) HOPPER_TEN(9) HOPPER_TEN(10) HOPPER_TEN(11)                               \
                         "%120, %121, %122, %123, %124, %125, %126, %127"
#define HOPPER_SUMS_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]),                                           \
                         "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define HOPPER_SUMS_32(i) HOPPER_SUMS_8(i), HOPPER_SUMS_8(i + 8), HOPPER_SUMS_8(i + 16), HOPPER_SUMS_8(i + 24)
#define HOPPER_SUMS_64(i) HOPPER_SUMS_32(i), HOPPER_SUMS_32(i + 32)
#define HOPPER_SUMS_128(i) HOPPER_SUMS_64(i), HOPPER_SUMS_64(i + 64)

// wgmma(d, a, b, add): d (64, N) = a (64, 16) · b (N, 16)^T, added to d's old numbers if `add`. N is twice the length of d. a
// and b are descriptors, or a the registers described above. TRANSPOSED_A, TRANSPOSED_B: that descriptor is of wgmma_columns.
// R: how many sums a thread has; p0 … p6: R, R + 1, … R + 6, the numbers of the operands behind them
#define HOPPER_WGMMA(N, R, p0, p1, p2, p3, p4, p5, p6)                                                                         \
    template <int TRANSPOSED_A = 0, int TRANSPOSED_B = 0>                                                                      \
    __device__ __forceinline__ void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool add) {                                   \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #p2 ", 0;\n"                                                       \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" HOPPER_NAMES_##R "}, "                       \
                     "%" #p0 ", %" #p1 ", add, 1, 1, %" #p3 ", %" #p4 "; }"                                                    \
                     : HOPPER_SUMS_##R(0)                                                                                      \
                     : "l"(a), "l"(b), "r"((int)add), "n"(TRANSPOSED_A), "n"(TRANSPOSED_B));                                   \
    }                                                                                                                          \
    template <int TRANSPOSED_B = 0>                                                                                            \
    __device__ __forceinline__ void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool add) {                       \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #p5 ", 0;\n"                                                       \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" HOPPER_NAMES_##R "}, "                       \
                     "{%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", add, 1, 1, %" #p6 "; }"                              \
                     : HOPPER_SUMS_##R(0)                                                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(TRANSPOSED_B));                  \
    }
HOPPER_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
HOPPER_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
HOPPER_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)
// clang-format on

// ---- registers to shared memory --------------------------------------------------------------

// two numbers as bf16, x in the lower half
__device__ __forceinline__ uint32_t bf16_pair(float x, float y) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}

// four 8 x 8 squares of bf16 from the registers of a warp: lane l names the address (a multiple of 16) of row l % 8 of square
// l / 8, and has in r[i] the numbers (l / 4, 2 * (l % 4)) and (…, 2 * (l % 4) + 1) of square i
__device__ __forceinline__ void stmatrix(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}
