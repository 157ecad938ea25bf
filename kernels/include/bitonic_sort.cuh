// Sorting in place by the kThreads threads of a block, in shared or in global memory. The object
// `selected` has the array `entries`, and order(entry), which is to rise.
#pragma once
#include "common.cuh"

// One step: compares and exchanges pairs of entries. In each block of 2 * stride entries, the pairs
// are `stride` apart, or (kMirrored) the first with the last, the second with the last but one.
// A pair with a place from `count` on stays, as if the entries there were the greatest.
template <bool kMirrored, class Selected>
__device__ __forceinline__ void sort_pairs(const Selected& selected, int count, int stride) {
    for (int pair = threadIdx.x; 2 * (pair & -stride) < count; pair += kThreads) {
        const int left = 2 * pair - (pair & stride - 1);
        const int right = kMirrored ? left ^ 2 * stride - 1 : left + stride;
        if (right >= count) continue;
        const auto a = selected.entries[left], b = selected.entries[right];
        if (selected.order(b) < selected.order(a)) {
            selected.entries[left] = b;
            selected.entries[right] = a;
        }
    }
    // Up to this stride a warp has the same 64 entries in every step, and no other warp has them.
    if (stride <= kWarpSize) __syncwarp();
    else __syncthreads();
}

// A bitonic network in which every exchange puts the smaller entry first. So the count need not be
// a power of two.
template <class Selected>
__device__ __forceinline__ void sort(const Selected& selected, int count) {
    for (int half = 1; half < count; half *= 2) {
        if (half > kWarpSize) __syncthreads();
        sort_pairs<true>(selected, count, half);
        for (int stride = half / 2; stride > 0; stride /= 2) {
            sort_pairs<false>(selected, count, stride);
        }
    }
    __syncthreads();
}
