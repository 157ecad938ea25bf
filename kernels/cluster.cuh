// A cluster of kCluster blocks, which see one another's shared memory; or, with kCluster = 1, a block by itself, as on
// GPUs before Hopper.
#pragma once
#include "common.cuh"

__device__ __forceinline__ uint32 rank_in_cluster() {
    uint32 rank = 0;
    if constexpr (kCluster > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of so many blocks, one or all; what was written to shared memory before can be read after, from every
// one. The fence, which compilers know from 12.8 on, is for shared memory alone: that of the barrier's own release
// waits for all of global memory too. What was read from other blocks has been used by then, so they may write again.
__device__ __forceinline__ void sync_blocks(int blocks) {
    if constexpr (kCluster > 1) {
        if (blocks > 1) {
            __syncwarp();
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
            asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
            asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
            asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
            asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
            return;
        }
    }
    __syncthreads();
}

// What stands at the place of `own` in the shared memory of the block of that rank, one of so many.
__device__ __forceinline__ uint32 load_from_block(const uint32& own, uint32 rank, int blocks) {
    if constexpr (kCluster > 1) {
        if (blocks > 1) {
            uint32 found;
            const uint32 here = uint32(__cvta_generic_to_shared(&own));
            asm volatile(
                "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.u32 %0, [there];\n}"
                : "=r"(found) : "r"(here), "r"(rank) : "memory");
            return found;
        }
    }
    return own;
}

__device__ __forceinline__ uint2 load_from_block(const uint2& own, uint32 rank) {
    uint2 found = own;
#if kCluster > 1
    const uint32 here = uint32(__cvta_generic_to_shared(&own));
    asm volatile(
        "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %2, %3;\n"
        "ld.shared::cluster.v2.u32 {%0, %1}, [there];\n}"
        : "=r"(found.x), "=r"(found.y) : "r"(here), "r"(rank) : "memory");
#endif
    return found;
}
