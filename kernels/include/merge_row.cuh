// A row of several lists (merge_topk.cu), and what the block that merges it shares.
#pragma once
#include "common.cuh"
#include "rank_search.cuh"

constexpr int kMaxCollected = 4096;
constexpr bool kCollects = kTopK <= kMaxCollected;
constexpr int kCollected = kCollects ? kTopK : 1;
constexpr int kMaxListed = kMaxCandidates > kCollected ? kMaxCandidates : kCollected;
constexpr bool kNeedsScores = kValues || kByScore;  // of the selected entries
constexpr int kResultWords = kCollected * (kNeedsScores ? 2 : 1);

struct Shared : RankSearch {
    uint32 low_key, high_key;            // of all entries or of a sample
    uint32 valid;                        // how many of them are not padding
    uint32 num_above, num_equal;         // entries collected from all
    uint32 num_candidates, highest_key;  // of the candidates
    uint32 num_results;
    uint32 low_position, high_position;  // of the selected entries
    // The candidates, or the entries collected from all: the position, then the bits of the score.
    uint64 entries[kMaxListed];
    // The staged keys; later the selected entries in order, then the bits of their positions.
    uint32 words[kStaged];
};
static_assert(sizeof(Shared) == kSharedBytes, "_plan/merge.py computes it too");
static_assert(kStaged > kResultWords, "room for the results and for bits");

__device__ __forceinline__ uint64 make_entry(int position, float score) {
    return uint64(uint32(position)) << 32 | __float_as_uint(score);
}
__device__ __forceinline__ int position_of(uint64 entry) { return int(entry >> 32); }
__device__ __forceinline__ float score_of(uint64 entry) { return __uint_as_float(uint32(entry)); }
__device__ __forceinline__ uint64 rank_of(uint64 entry) {
    return rank_of(ordered_key(score_of(entry)), position_of(entry));
}

struct Row {
    const int* indices;  // of the row in the first list
    const float* scores;
    int64 list_stride;
    const uint32* staged;
    int entries;

    __device__ __forceinline__ int64 offset(int entry) const {
        return entry / kWidth * list_stride + entry % kWidth;
    }
    __device__ __forceinline__ int position(int entry) const {
        return __ldg(indices + offset(entry));
    }
    __device__ __forceinline__ float score(int entry) const {
        return __ldg(scores + offset(entry));
    }
    __device__ __forceinline__ uint32 key(int entry) const {
        if (entry < kStaged) return staged[entry];
        return position(entry) < 0 ? kNotSelectable : ordered_key(score(entry));
    }

    // Ranks of all entries (rank_search.cuh). The loads of kLoads entries are in flight together.
    static constexpr bool kReadsPositions = true;
    static constexpr int kLoads = 8;
    template <bool kWholeKeys, class Visit>
    __device__ __forceinline__ void for_each_in(uint64 low, uint64 high, const Visit& visit) const {
        const uint32 low_key = uint32(low >> 32), high_key = uint32(high >> 32);
        for (int base = threadIdx.x; base < entries; base += kThreads * kLoads) {
            uint64 ranks[kLoads];
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                const int entry = base + j * kThreads;
                const uint32 own = entry < entries ? key(entry) : kNotSelectable;
                const bool near = low_key <= own && own <= high_key;
                ranks[j] = rank_of(own, near && !kWholeKeys ? position(entry) : 0);
            }
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                if (low <= ranks[j] && ranks[j] <= high) visit(base + j * kThreads, ranks[j]);
            }
        }
    }
};

// Adds to the range and the number of the keys in shared memory. One barrier.
__device__ __forceinline__ void add_keys(Shared& shared, uint32 low, uint32 high, uint32 valid) {
    low = __reduce_min_sync(kFullWarp, low);
    high = __reduce_max_sync(kFullWarp, high);
    valid = __reduce_add_sync(kFullWarp, valid);
    if (threadIdx.x % kWarpSize == 0) {
        atomicMin(&shared.low_key, low);
        atomicMax(&shared.high_key, high);
        atomicAdd(&shared.valid, valid);
    }
    __syncthreads();
}
