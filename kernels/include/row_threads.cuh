// The kThreads threads that select from one row, of a block that has kRows rows at a time.
#pragma once
#include "common.cuh"
#include "ptx.cuh"

constexpr int kWarps = kThreads / kWarpSize;
static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize, "a lane for each warp of a row");

__device__ __forceinline__ int thread_of_row() {
    return kRows == 1 ? threadIdx.x : threadIdx.x % kThreads;
}

__device__ __forceinline__ int warp_of_row() { return thread_of_row() / kWarpSize; }

__device__ __forceinline__ void sync_row() {
    if (kRows == 1) __syncthreads();
    else sync_threads<kThreads>(1 + threadIdx.x / kThreads);
}
