// A cluster of kCluster blocks, which write to one another's shared memory. With kCluster = 1 it is
// a single block, as on GPUs before Hopper.
#pragma once
#include "common.cuh"
#include "ptx_sm90.cuh"

__device__ __forceinline__ uint32 rank_in_cluster() {
    uint32 rank = 0;
    if constexpr (kCluster > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier for all threads of the cluster. Barriers that a block has initialised before are ready
// for the other blocks after it.
__device__ __forceinline__ void sync_cluster() {
    if constexpr (kCluster > 1) {
        __syncwarp();
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
}

// Writes to another block's shared memory: to where `to` stands in this block's. The barrier that
// stands where `barrier` does counts the bytes once they are there.
__device__ __forceinline__ void send(uint32& to, uint32 value, uint32 rank, uint64& barrier) {
    asm volatile(
        "{\n.reg .u32 there, counter;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 counter, %3, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [counter];\n}" ::
            "r"(shared_address(&to)),
        "r"(value), "r"(rank), "r"(shared_address(&barrier))
        : "memory");
}

__device__ __forceinline__ void send(uint2& to, uint2 value, uint32 rank, uint64& barrier) {
    asm volatile(
        "{\n.reg .u32 there, counter;\n"
        "mapa.shared::cluster.u32 there, %0, %3;\nmapa.shared::cluster.u32 counter, %4, %3;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 "
        "[there], {%1, %2}, [counter];\n}" ::"r"(shared_address(&to)),
        "r"(value.x), "r"(value.y), "r"(rank), "r"(shared_address(&barrier))
        : "memory");
}

// Waits for what other blocks send, until the barrier's phase of that parity is complete.
__device__ __forceinline__ void wait_for_cluster(uint64& barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
}
