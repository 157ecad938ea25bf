// Candidates of a row of several lists: all entries whose rank reaches a limit. A sample of the row
// gives the limit. The limit decides how long merging takes, but not the result: if at least kTopK
// entries reach it, the best kTopK entries do.
#pragma once
#include "merge_row.cuh"
#include "ptx.cuh"

constexpr int kSampleVectors = 8 / kVector;  // of a thread: _plan/merge.py samples 8 entries too
constexpr int kSampleParts = kThreads * kSampleVectors;
constexpr uint32 kSampleCrowd = kSampleRank / 8 + 4;
static_assert(kVectors >= 1, "loads that a thread has in flight for each array");
static_assert(kVector == 1 || kVector == 4 && kWidth % 4 == 0,
              "entries that a thread loads at once");

// kVector adjacent entries of a list.
struct Entries {
    int positions[kVector];
    float scores[kVector];
};

__device__ __forceinline__ Entries load_entries(const Row& row, uint32 vector) {
    constexpr uint32 kListVectors = kWidth / kVector;
    const int64 between = row.list_stride - kWidth;  // from the end of a list to the next
    const int64 offset = int64(vector) * kVector + vector / kListVectors * between;
    Entries found;
    if constexpr (kVector == 4) {
        const int4 positions = __ldg(reinterpret_cast<const int4*>(row.indices + offset));
        const float4 scores = __ldg(reinterpret_cast<const float4*>(row.scores + offset));
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            found.positions[e] = (&positions.x)[e];
            found.scores[e] = (&scores.x)[e];
        }
    } else {
        found.positions[0] = __ldg(row.indices + offset);
        found.scores[0] = __ldg(row.scores + offset);
    }
    return found;
}

// The thread's ranks of a sample.
struct Sample {
    static constexpr bool kReadsPositions = false;
    uint64 ranks[kSampleVectors * kVector];

    template <bool, class Visit>
    __device__ __forceinline__ void for_each_in(uint64 low, uint64 high, const Visit& visit) const {
#pragma unroll
        for (int i = 0; i < kSampleVectors * kVector; ++i) {
            if (low <= ranks[i] && ranks[i] <= high) visit(i, ranks[i]);
        }
    }
};

// A rank that slightly more than kTopK entries reach if the sample is fair: the kSampleRank-th of
// the sample, or a little less. kLowestRank if the sample has fewer than kSampleRank entries.
__device__ __forceinline__ uint64 guess_limit(Shared& shared, const Row& row) {
    // Each part of the row gives one vector. Its place differs from part to part, so that periodic
    // scores are sampled fairly.
    const uint32 vectors = row.entries / kVector;
    Entries loaded[kSampleVectors];
#pragma unroll
    for (int j = 0; j < kSampleVectors; ++j) {
        const uint32 part = threadIdx.x + j * kThreads;
        const uint32 first = uint32(uint64(part) * vectors / kSampleParts);
        loaded[j] = load_entries(row, first + __umulhi(part * 0x9e3779b1u, vectors / kSampleParts));
    }
    Sample sample;
    uint32 low = 0xffffffffu, high = kNotSelectable, valid = 0;
#pragma unroll
    for (int i = 0; i < kSampleVectors * kVector; ++i) {
        const int position = loaded[i / kVector].positions[i % kVector];
        const uint32 key = ordered_key(loaded[i / kVector].scores[i % kVector]);
        sample.ranks[i] = position < 0 ? 0 : rank_of(key, position);
        if (position >= 0) {
            low = min(low, key);
            high = max(high, key);
            ++valid;
        }
    }
    add_keys(shared, low, high, valid);
    if (int(shared.valid) < kSampleRank) return kLowestRank;
    RankRange range{rank_of(shared.low_key, ~0u), rank_of(shared.high_key, 0), kSampleRank};
    narrow(shared, sample, range, kSampleCrowd);
    return uint32(range.low >> 32) < kMinusInfinityKey ? kLowestRank : range.low;
}

// A limit in a form that takes five instructions to compare with an entry.
struct Limit {
    bool all;     // every entry reaches it
    uint32 last;  // a score equal to `score` reaches it up to this position, `above` at any
    float score, above;

    __device__ __forceinline__ explicit Limit(uint64 rank)
        : all(rank <= kLowestRank), last(~uint32(rank)) {
        const uint32 key = uint32(rank >> 32);
        score = number_of(key);
        above = number_of(key + 1);  // above infinity this is a NaN, which no score reaches
    }
    __device__ __forceinline__ static float number_of(uint32 key) {
        return __uint_as_float(key ^ (~uint32(int(key) >> 31) | 0x80000000u));
    }
    // The position if it is less than `end` and the entry reaches the limit, else -1.
    __device__ __forceinline__ int reached(int position, float own, uint32 end) const {
        const bool reached = own >= (uint32(position) <= last ? score : above) || all;
        return reached && uint32(position) < end ? position : -1;
    }
};

// Collects the candidates in shared memory, in any order, and counts them. Counting stops once they
// are more than kMaxCandidates. Also finds a key that no candidate exceeds.
__device__ __forceinline__ void collect_candidates(Shared& shared, const Row& row,
                                                   const Limit& limit) {
    const uint32 vectors = row.entries / kVector;
    const uint32 candidates = uint32(__cvta_generic_to_shared(shared.entries));
    float most = __uint_as_float(kMinusInfinity);
    for (uint32 base = 0; base < vectors; base += kThreads * kVectors) {
        Entries loaded[kVectors];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            const uint32 vector = base + j * kThreads + threadIdx.x;
            loaded[j] = load_entries(row, min(vector, vectors - 1));
        }
        uint32 own = kVectors * kVector;
#pragma unroll
        for (int i = 0; i < kVectors * kVector; ++i) {
            const uint32 vector = base + i / kVector * kThreads + threadIdx.x;
            const uint32 end = vector < vectors ? 0x80000000u : 0;  // padding is beyond it too
            const float score = loaded[i / kVector].scores[i % kVector];
            int& position = loaded[i / kVector].positions[i % kVector];
            position = limit.reached(position, score, end);
            own -= uint32(position) >> 31;
            most = fmaxf(most, score);  // ignores NaN
        }
        const uint32 place = inclusive_sum_of_lanes(own);
        const uint32 of_warp = __shfl_sync(kFullWarp, place, kWarpSize - 1);
        uint32 first = 0;
        if (threadIdx.x % kWarpSize == 0) first = atomicAdd(&shared.num_candidates, of_warp);
        first = __shfl_sync(kFullWarp, first, 0);
        if (first + of_warp > kMaxCandidates) break;
        uint32 address = candidates + sizeof(uint64) * (first + place - own);
#pragma unroll
        for (int i = 0; i < kVectors * kVector; ++i) {
            const float score = loaded[i / kVector].scores[i % kVector];
            append_if_not_negative(address, __float_as_uint(score),
                                   loaded[i / kVector].positions[i % kVector]);
        }
    }
    const uint32 highest = __reduce_max_sync(kFullWarp, ordered_key(most));
    if (threadIdx.x % kWarpSize == 0) atomicMax(&shared.highest_key, highest);
    __syncthreads();
}

// The ranks of entries in shared memory.
struct Candidates {
    static constexpr bool kReadsPositions = false;
    const uint64* entries;
    int count;

    template <bool, class Visit>
    __device__ __forceinline__ void for_each_in(uint64 low, uint64 high, const Visit& visit) const {
#pragma unroll 4
        for (int i = threadIdx.x; i < count; i += kThreads) {
            const uint64 rank = rank_of(entries[i]);
            if (low <= rank && rank <= high) visit(i, rank);
        }
    }
};
