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

// The least and the greatest of some keys; low > high if there are none.
struct KeyRange {
    uint32 low = 0xffffffffu, high = 0;
    __device__ __forceinline__ void add(uint32 key) {
        low = min(low, key);
        high = max(high, key);
    }
};

// What the threads of a row exchange, in shared memory.
struct RowExchange {
    uint32 totals[2][kWarps];  // used in turns, so that a sum needs one barrier
    KeyRange ranges[kWarps];
};

// The exclusive sum of one value per warp, in warp order, and their total. One barrier. Calls in
// succession use the two `turn`s alternately.
__device__ __forceinline__ uint32 sum_of_warps(RowExchange& shared, int& turn, uint32 value,
                                               uint32& total) {
    const int lane = threadIdx.x % kWarpSize;
    turn ^= 1;
    if (lane == 0) shared.totals[turn][warp_of_row()] = value;
    sync_row();
    const uint32 found = lane < kWarps ? shared.totals[turn][lane] : 0;
    total = __reduce_add_sync(kFullWarp, found);
    return __reduce_add_sync(kFullWarp, lane < warp_of_row() ? found : 0);
}

// The range of the keys of all threads. One barrier, and another is needed before the next call.
__device__ __forceinline__ KeyRange range_of_row(RowExchange& shared, KeyRange own) {
    const int lane = threadIdx.x % kWarpSize;
    own = {__reduce_min_sync(kFullWarp, own.low), __reduce_max_sync(kFullWarp, own.high)};
    if (lane == 0) shared.ranges[warp_of_row()] = own;
    sync_row();
    const KeyRange found = lane < kWarps ? shared.ranges[lane] : KeyRange{};
    return {__reduce_min_sync(kFullWarp, found.low), __reduce_max_sync(kFullWarp, found.high)};
}
