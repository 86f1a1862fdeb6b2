/*
Programs without a race which compute-sanitizer's racecheck (of CUDA 13.0) misjudges, so that scripts/gpu_check.sh leaves kernels
like them out:

    racecheck_limits uneven         a race is reported: two halves of a block meet at barriers of their own, one oftener than
                                    the other, then all at the block's, which racecheck no longer takes for one
    racecheck_limits groups         a race is reported within cooperative_groups::reduce over several warps
    racecheck_limits cluster        racecheck dies: a kernel whose clusters meet, when its options leave it out (no _kernel in its name)

The copy engine is a fourth limit: that its writes are complete when an mbarrier says so is not known to racecheck.
*/
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

enum { THREADS = 128, HALF = THREADS / 2 }; // of a block; there are four

static __global__ void uneven_kernel(float* x) {
    x += blockIdx.x * THREADS;
    __shared__ float of_warp[4], all[THREADS];
    const int half = threadIdx.x / HALF, warp = threadIdx.x / 32, turns = half ? 7 : 3;
    float sum = 0;
    for (int i = 0; i < turns; i++) {
        if (threadIdx.x % 32 == 0) of_warp[warp] = x[threadIdx.x] + (float)i;
        asm volatile("bar.sync %0, %1;" ::"r"(1 + half), "r"((int)HALF) : "memory");
        sum += of_warp[2 * half] + of_warp[2 * half + 1];
        asm volatile("bar.sync %0, %1;" ::"r"(1 + half), "r"((int)HALF) : "memory");
    }
    __syncthreads();
    all[threadIdx.x] = sum;
    __syncthreads();
    x[threadIdx.x] = all[(threadIdx.x + HALF) % THREADS];
}

static __global__ void groups_kernel(float* x) {
    x += blockIdx.x * THREADS;
    namespace cg = cooperative_groups;
    __shared__ cg::block_tile_memory<THREADS> memory;
    const auto tile = cg::tiled_partition<THREADS>(cg::this_thread_block(memory));
    for (int i = 0; i < 3; i++) x[threadIdx.x] = cg::reduce(tile, x[threadIdx.x], cg::plus<float>());
}

static __global__ void in_cluster(float* x) {
    x += blockIdx.x * THREADS;
    __shared__ float all[THREADS];
    cooperative_groups::this_cluster().sync();
    all[threadIdx.x] = x[threadIdx.x];
    cooperative_groups::this_cluster().sync();
    x[threadIdx.x] = all[(threadIdx.x + HALF) % THREADS];
}

int main(int argc, char** argv) {
    const char* what = argc == 2 ? argv[1] : "";
    float* x;
    if (cudaMalloc(&x, 4 * THREADS * sizeof *x) != cudaSuccess ||
        cudaMemset(x, 0, 4 * THREADS * sizeof *x) != cudaSuccess)
        return 1;
    if (strcmp(what, "uneven") == 0) {
        uneven_kernel<<<4, THREADS, 0, 0>>>(x);
    } else if (strcmp(what, "groups") == 0) {
        groups_kernel<<<4, THREADS, 0, 0>>>(x);
    } else if (strcmp(what, "cluster") == 0) {
        cudaLaunchAttribute cluster = {};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = 2, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(4), config.blockDim = dim3(THREADS), config.attrs = &cluster, config.numAttrs = 1;
        cudaLaunchKernelEx(&config, in_cluster, x);
    } else {
        fprintf(stderr, "error: expected uneven, groups or cluster\n");
        return 2;
    }
    const cudaError_t code = cudaDeviceSynchronize();
    if (code != cudaSuccess) fprintf(stderr, "error: %s: %s\n", what, cudaGetErrorString(code));
    return code != cudaSuccess;
}
