// A cluster of kCluster blocks, which see one another's shared memory; or, with kCluster = 1, a block by itself, as on
// GPUs before Hopper.
#pragma once
#include "common.cuh"

__device__ __forceinline__ uint32 rank_in_cluster() {
    uint32 rank = 0;
    if constexpr (kCluster > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of so many blocks, one or all; what was written to shared memory before can be read after, from every one.
__device__ __forceinline__ void sync_blocks(int blocks) {
    if constexpr (kCluster > 1) {
        if (blocks > 1) {
            asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
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
