// Inclusive scans over the lanes of a warp, and an exclusive sum over the threads of a block.
#pragma once
#include "common.cuh"

struct Sum {
    template <class T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Max {
    template <class T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return max(a, b);
    }
};

// Lane l gets the combined values of lanes 0 to l. All lanes take part. If only the first `lanes`
// lanes are of interest, fewer steps are taken, and the results of the other lanes are unspecified.
template <class Combine, class T>
__device__ __forceinline__ T inclusive_scan(T value, int lanes = kWarpSize) {
    const int lane = threadIdx.x % kWarpSize;
    for (int step = 1; step < lanes; step *= 2) {
        const T below = __shfl_up_sync(kFullWarp, value, step);
        if (lane >= step) value = Combine()(value, below);
    }
    return value;
}

// Exclusive sum over the block in thread order, and the block's total. Needs whole warps and
// warp_totals[32] in shared memory. It passes two barriers, so the next call may use warp_totals
// again.
__device__ __forceinline__ uint32 block_exclusive_sum(uint32 value, uint32* warp_totals,
                                                      uint32& total) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int warps = blockDim.x / kWarpSize;
    const uint32 inclusive = inclusive_scan<Sum>(value);
    __syncthreads();  // the readers of the last call are done with warp_totals
    if (lane == kWarpSize - 1) warp_totals[warp] = inclusive;
    __syncthreads();
    // Every warp sums all warp totals itself: one load and 5 shuffles are faster than a third
    // barrier.
    const uint32 warp_inclusive = inclusive_scan<Sum>(lane < warps ? warp_totals[lane] : 0);
    total = __shfl_sync(kFullWarp, warp_inclusive, kWarpSize - 1);
    const uint32 before_warp = __shfl_sync(kFullWarp, warp_inclusive, warp == 0 ? 0 : warp - 1);
    return inclusive - value + (warp == 0 ? 0 : before_warp);
}
