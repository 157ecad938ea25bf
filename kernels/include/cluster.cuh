// A cluster of kCluster blocks, which read one another's shared memory. With kCluster = 1 it is a
// single block, as on GPUs before Hopper.
#pragma once
#include "common.cuh"

__device__ __forceinline__ uint32 rank_in_cluster() {
    uint32 rank = 0;
    if constexpr (kCluster > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier for all threads of the cluster. Writes to shared memory before it are seen after it. A
// cluster barrier with release semantics would wait for global memory as well; the fence, which
// compilers have from 12.8 on, is restricted to shared memory.
__device__ __forceinline__ void sync_cluster() {
    if constexpr (kCluster > 1) {
        __syncwarp();
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
        asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
}

// The value, of 4 or 8 bytes, that stands where `own` stands in the shared memory of another block.
template <class T>
__device__ __forceinline__ T load_from_block(const T& own, uint32 rank) {
    T found = own;
    if constexpr (kCluster > 1) {
        uint32 there;
        const uint32 here = uint32(__cvta_generic_to_shared(&own));
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
        if constexpr (sizeof(T) == 4) {
            asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(found) : "r"(there) : "memory");
        } else {
            asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                         : "=r"(found.x), "=r"(found.y)
                         : "r"(there)
                         : "memory");
        }
    }
    return found;
}
