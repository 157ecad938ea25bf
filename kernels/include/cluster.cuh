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

// What stands at the place of `own`, of 4 or 8 bytes, in the shared memory of the block of that rank, one of so many.
template <class T>
__device__ __forceinline__ T load_from_block(const T& own, uint32 rank, int blocks) {
    T found = own;
    if constexpr (kCluster > 1) {
        if (blocks == 1) return found;
        uint32 there;
        const uint32 here = uint32(__cvta_generic_to_shared(&own));
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
        if constexpr (sizeof(T) == 4) {
            asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(found) : "r"(there) : "memory");
        } else {
            asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                         : "=r"(found.x), "=r"(found.y) : "r"(there) : "memory");
        }
    }
    return found;
}
