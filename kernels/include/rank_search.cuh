// The search for the n-th greatest among distinct ranks of 64 bits. Ranks are counted in bins of
// equal width between the least and the greatest rank. If the bin that holds the wanted rank holds
// many ranks, they are counted again in narrower bins, between the least and the greatest of the
// bin. Each count takes kBinBits bits off the range, so the search ends for all ranks.
//
// The functions take ranks as an object whose for_each_in<kWholeKeys>(low, high, visit) calls
// visit(number, rank) for each rank of the thread in a range. With kWholeKeys, the low word of the
// ranks that are visited may be wrong; an object with kReadsPositions does not read positions then.
// All threads of the block call these functions.
#pragma once
#include "common.cuh"
#include "ptx.cuh"
#include "warp_scan.cuh"

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kMaxCompared = 256;  // ranks that are compared pairwise
static_assert(kBins % kThreads == 0, "each bin belongs to one thread");
static_assert(kMaxCompared <= kThreads, "each compared rank belongs to one thread");

// The rank of an entry: the key of its score, then the complement of its position. Ranks of
// distinct positions are distinct, and a greater rank is better.
__device__ __forceinline__ uint64 rank_of(uint32 key, uint32 position) {
    return uint64(key) << 32 | ~position;
}
constexpr uint64 kLowestRank = uint64(kNaNKey) << 32;  // every entry is above it, no padding is

struct RankSearch {
    uint64 compared[kMaxCompared];  // ranks
    uint64 threshold;               // the wanted rank
    uint64 low, high;               // the least and the greatest rank of a bin
    uint32 bins[kBins];             // all zero except while ranks are counted
    uint32 warp_totals[kWarpSize];
    uint32 bin, needed;  // the bin that holds the wanted rank, and its place in the bin
    uint32 inside;       // ranks in the bin
    uint32 num_compared;
};

__device__ __forceinline__ void clear_bins(RankSearch& shared) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
}

// Ranks from low to high. The needed-th of the block's ranks among them is wanted.
struct RankRange {
    uint64 low, high;
    uint32 needed;
};

// Counts the ranks of a range in bins of 2 ** shift ranks, and finds the bin with the wanted rank.
template <bool kWholeKeys, class Ranks>
__device__ __forceinline__ void find_bin(RankSearch& shared, const Ranks& ranks,
                                         const RankRange& range, int shift) {
    const uint32 bins = uint32(__cvta_generic_to_shared(shared.bins));
    ranks.template for_each_in<kWholeKeys>(range.low, range.high, [&](int, uint64 rank) {
        add_one_if(true, bins + sizeof(uint32) * uint32(rank - range.low >> shift));
    });
    __syncthreads();
    // Thread i has the i-th bins from the top, because ranks count from the greatest.
    const int top = kBins - 1 - threadIdx.x * kBinsPerThread;
    uint32 counts[kBinsPerThread], own = 0, total;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
        own += counts[i] = shared.bins[top - i];
        shared.bins[top - i] = 0;
    }
    uint32 above = block_exclusive_sum(own, shared.warp_totals, total);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
        if (above < range.needed && range.needed <= above + counts[i]) {
            shared.bin = top - i;
            shared.needed = range.needed - above;
            shared.inside = counts[i];
            shared.num_compared = 0;
            shared.low = ~0ull;
            shared.high = 0;
        }
        above += counts[i];
    }
    __syncthreads();
}

// Narrows a range until it holds at most `enough` ranks, or only equal ranks.
template <class Ranks>
__device__ __forceinline__ void narrow(RankSearch& shared, const Ranks& ranks, RankRange& range,
                                       uint32 enough) {
    while (range.low < range.high) {
        const int shift = max(64 - __clzll(range.high - range.low) - kBinBits, 0);
        const bool whole_keys = uint32(range.low) == 0 && ~uint32(range.high) == 0 && shift >= 32;
        if (Ranks::kReadsPositions && whole_keys) find_bin<true>(shared, ranks, range, shift);
        else find_bin<false>(shared, ranks, range, shift);
        range.needed = shared.needed;
        range.low += uint64(shared.bin) << shift;
        range.high = min(range.high, range.low + (1ull << shift) - 1);
        if (shared.inside <= enough) return;
        // A bin with many ranks usually has equal scores. Then the next bits are of positions.
        uint64 least = ~0ull, greatest = 0;
        ranks.template for_each_in<false>(range.low, range.high, [&](int, uint64 rank) {
            least = min(least, rank);
            greatest = max(greatest, rank);
        });
#pragma unroll
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            least = min(least, __shfl_xor_sync(kFullWarp, least, step));
            greatest = max(greatest, __shfl_xor_sync(kFullWarp, greatest, step));
        }
        if (threadIdx.x % kWarpSize == 0) {
            atomicMin(&shared.low, least);
            atomicMax(&shared.high, greatest);
        }
        __syncthreads();
        range.low = shared.low;
        range.high = shared.high;
    }
}

// The wanted rank. range.needed becomes how many ranks equal to it are selected: one, unless
// positions are repeated, which is wrong input.
template <class Ranks>
__device__ __forceinline__ uint64 find_threshold(RankSearch& shared, const Ranks& ranks,
                                                 RankRange& range) {
    narrow(shared, ranks, range, kMaxCompared);
    if (range.low == range.high) return range.low;
    ranks.template for_each_in<false>(range.low, range.high, [&](int, uint64 rank) {
        shared.compared[atomicAdd(&shared.num_compared, 1u)] = rank;
    });
    __syncthreads();
    if (threadIdx.x < shared.inside) {
        const uint64 own = shared.compared[threadIdx.x];
        uint32 above = 0, equal = 0;
#pragma unroll 4
        for (uint32 i = 0; i < shared.inside; ++i) {
            above += shared.compared[i] > own;
            equal += shared.compared[i] == own;
        }
        if (above < range.needed && range.needed <= above + equal) {  // equal ranks write the same
            shared.threshold = own;
            shared.needed = range.needed - above;
        }
    }
    __syncthreads();
    range.needed = shared.needed;
    return shared.threshold;
}
