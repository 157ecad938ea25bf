// Selects from a short row that a block keeps in shared memory. Parameters: kTopK, kThreads,
// kStaged, and kRowsFit: whether no row has more than kStaged columns.
//
// Each warp takes a run of adjacent columns. It reads them once and keeps as many in shared memory
// as fit (kStaged columns of a block); the rest is read again in each step:
//   1. Scores are counted in 1024 bins, laid between two order statistics of a sample.
//   2. In the bin that holds the kTopK-th score, scores are ranked one by one if there are few;
//      else they are counted by the bits of their keys (histogram.cuh). This gives the threshold.
//   3. Each warp counts its columns above the threshold and equal to it. Sums over the preceding
//   warps tell each warp where its first selected column is written.
//   4. The selected columns are written in order.
// Every count is exact, and none depends on the order of additions, so the result is exact and
// always the same.
#pragma once
#include "common.cuh"
#include "histogram.cuh"
#include "ptx.cuh"
#include "row.cuh"

namespace staged {

constexpr int kStagedVectors = kStaged / (kVectorColumns * kWarps);  // of a warp
static_assert(kStaged % (kVectorColumns * kWarps) == 0 && kStaged > 0, "whole vectors");
constexpr int kTogether = 4;  // vectors that a thread has in registers at a time
static_assert(kVectorColumns < 256 && kTogether == 4, "a byte of a word counts for each vector");
static_assert(kStagedVectors % kTogether == 0, "all of a step are staged, or none");

// What the threads of a row share beside the histogram.
struct Memory {
    uint32 ranked_warps[kMaxRanked];  // the warp that has the column of each ranked key
    uint32 above[kWarps];             // columns of each warp whose score is above the threshold
    uint32 equal[kWarps];             // columns of each warp whose score equals the threshold
    alignas(16) float scores[kStaged];
};

struct Row {
    const float* scores;
    int length;

    // Loaded columns, with kMissing from `length` on and a caller's NaNs as kQuietNaN.
    __device__ __forceinline__ float4 mask(float4 four, int column) const {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            float& score = (&four.x)[e];
            if (!kOwnScores && score != score) score = __uint_as_float(kQuietNaN);
            if (column + e >= length) score = __uint_as_float(kMissing);
        }
        return four;
    }

    __device__ __forceinline__ float4 load(int column) const {
        return mask(load_columns(scores, column, length), column);
    }
};

__device__ __forceinline__ bool is_missing(float score) {
    return __float_as_uint(score) == kMissing;
}

__device__ __forceinline__ uint32 selectable_key(float score) {
    return is_missing(score) ? kNotSelectable : ordered_key(score);
}

// The columns of a warp: `vectors` vectors of each lane, from the lane's first column on.
struct Run {
    const Row& row;
    float4* staged;  // the lane's
    int column;
    int vectors;

    __device__ __forceinline__ Run(Memory& memory, const Row& row) : row(row) {
        const int warp = warp_of_row(), lane = threadIdx.x % kWarpSize;
        const int all = (row.length + kVectorColumns - 1) / kVectorColumns;
        const int each = (all + kWarps - 1) / kWarps;
        vectors = min(max(all - warp * each, 0), each);
        column = warp * each * kVectorColumns + lane * kVector;
        staged =
            reinterpret_cast<float4*>(memory.scores) + warp * (kStagedVectors * kWarpSize) + lane;
    }

    // The i-th vector of the lane.
    __device__ __forceinline__ float4 vector(int i) const {
        if (kRowsFit || i < kStagedVectors) return staged[i * kWarpSize];
        return row.load(column + i * kVectorColumns);
    }

    // Loads kTogether vectors, from the i-th on. What is beyond the run is kMissing. The loads are
    // in flight together, so no branch and no mask comes between them.
    __device__ __forceinline__ void load_step(float4 (&scores)[kTogether], int i) const {
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int end = i + j < vectors ? row.length : 0;
            scores[j] = load_columns(row.scores, column + (i + j) * kVectorColumns, end);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int from = i + j < vectors ? column + (i + j) * kVectorColumns : row.length;
            scores[j] = row.mask(scores[j], from);
        }
    }

    // Fills the shared memory.
    __device__ __forceinline__ void stage() const {
#pragma unroll 1
        for (int i = 0; i < min(vectors, kStagedVectors); i += kTogether) {
            float4 scores[kTogether];
            load_step(scores, i);
#pragma unroll
            for (int j = 0; j < kTogether; ++j) staged[(i + j) * kWarpSize] = scores[j];
        }
    }

    // Whether the j-th vector from the i-th on may be in the run; asked for each half of
    // kTogether, because a branch for each vector takes longer than the vector.
    __device__ __forceinline__ bool has(int i, int j) const {
        return j % (kTogether / 2) > 0 || i + j < vectors;
    }

    // Calls visit(scores, i) for kTogether vectors of the lane at a time, from the i-th on.
    template <class Visit>
    __device__ __forceinline__ void for_each_step(const Visit& visit) const {
#pragma unroll 1
        for (int i = 0; i < vectors; i += kTogether) {
            float4 scores[kTogether];
            if (kRowsFit || i < kStagedVectors) {
#pragma unroll
                for (int j = 0; j < kTogether; ++j) scores[j] = staged[(i + j) * kWarpSize];
            } else {
                load_step(scores, i);
            }
            visit(scores, i);
        }
    }

    // Calls visit(score) for all scores. Little code, for what is done to few rows.
    template <class Visit>
    __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll 1
        for (int i = 0; i < vectors; ++i) {
            const float4 four = vector(i);
#pragma unroll
            for (int e = 0; e < kVector; ++e) visit((&four.x)[e]);
        }
    }
};

// All scores of a run, and what is beyond it as kMissing, for what is done to each row.
struct AllScores {
    const Run& run;
    template <class Visit>
    __device__ __forceinline__ void for_each(const Visit& visit) const {
        run.for_each_step([&](const float4(&scores)[kTogether], int i) {
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                if (!run.has(i, j)) break;
#pragma unroll
                for (int e = 0; e < kVector; ++e) visit((&scores[j].x)[e]);
            }
        });
    }
};

// The scores of a run that may be selected.
struct SelectableScores {
    const Run& run;
    template <class Visit>
    __device__ __forceinline__ void for_each(const Visit& visit) const {
        run.for_each([&](float score) {
            if (!is_missing(score)) visit(score);
        });
    }
};

// The keys of two scores between which bins of equal width are laid, from a sample: one vector of
// each thread, spread over the row. Not the least and the greatest score, for with one outlier all
// others would share a bin. Threads with the same place in their warps form a group, whose columns
// are spread over the row.
//   High is the least of the groups' maxima: one independent score in thirty is above it.
//   Low is the least of the threads' maxima, which four fifths of the scores exceed, if kTopK is
//   less than half of the row. Else it is the greatest of the groups' minima: one score in thirty
//   is below it.
// Where the kTopK-th score may lie beyond, it is the least or the greatest of the sample instead.
__device__ __forceinline__ KeyRange spread_of_sample(Histogram& shared, const float4& sample,
                                                     int length) {
    const bool upper_half = kTopK < length / 2;
    const bool low_known = kTopK < length - length / 16;
    const bool high_known = kTopK > length / 16;
    // fminf and fmaxf ignore NaN.
    const float least = fminf(fminf(sample.x, sample.y), fminf(sample.z, sample.w));
    const float most = fmaxf(fmaxf(sample.x, sample.y), fmaxf(sample.z, sample.w));
    uint32(&group_keys)[2][kWarps] = shared.totals;  // the greatest and the least of each group
    if (threadIdx.x < kWarps) {
        group_keys[0][threadIdx.x] = 0;
        group_keys[1][threadIdx.x] = 0xffffffffu;
    }
    __syncthreads();
    KeyRange own;
    const int group = threadIdx.x % kWarps;
    if (least <= most) {
        own = {ordered_key(upper_half ? most : least), ordered_key(most)};
        atomicMax(&group_keys[0][group], own.high);
        atomicMin(&group_keys[1][group], own.low);
    }
    KeyRange all = range_of_row(shared, own);
    if (high_known) all.high = __reduce_min_sync(kFullWarp, group_keys[0][group]);
    // 0xffffffff: a group without numbers.
    const uint32 least_of_group = group_keys[1][group];
    const uint32 low = __reduce_max_sync(kFullWarp, ~least_of_group ? least_of_group : 0);
    if (low_known && !upper_half) all.low = max(low, all.low);
    return all;
}

constexpr Threshold kAll{kNaNKey, kTopK, true};  // if at most kTopK columns are selectable

// The threshold if the bin found has too many scores to rank, or if it is bin 0, which has NaN
// scores and kMissing as well. Not inlined: rarely needed, and much code.
__device__ __noinline__ Threshold look_closer(Histogram& shared, Memory& memory, Row row,
                                              ByScore by_score) {
    const Run run(memory, row);
    const SelectableScores scores{run};
    uint32 own = 0, selectable;
    const uint32 bin = shared.bin, needed = shared.needed;
    if (bin == 0) {
        scores.for_each([&](float score) { own += by_score(score) == bin; });
        int turn = 1;  // find_bin begins with the other turn
        sum_of_warps(shared, turn, __reduce_add_sync(kFullWarp, own), selectable);
        if (selectable < needed) return kAll;
    }
    return search_range(shared, scores, range_of_bin(shared, scores, by_score, bin));
}

// Where a warp begins to write.
struct Before {
    uint32 above = 0, equal = 0;  // columns above the threshold and equal to it in the warps before
    uint32 own_equal = 0;         // columns of the warp that are equal to it
    uint32 all = 0;               // columns of all warps above the threshold or equal to it
};

// Tells the other warps how many columns of the threads are above the threshold and equal to it.
__device__ __forceinline__ void publish_counts(Memory& memory, uint32 above, uint32 equal) {
    above = __reduce_add_sync(kFullWarp, above);
    equal = __reduce_add_sync(kFullWarp, equal);
    if (threadIdx.x % kWarpSize == 0) {
        memory.above[warp_of_row()] = above;
        memory.equal[warp_of_row()] = equal;
    }
    __syncthreads();
}

__device__ __forceinline__ Before sum_counts(const Memory& memory) {
    const int lane = threadIdx.x % kWarpSize, warp = warp_of_row();
    const uint32 above = lane < kWarps ? memory.above[lane] : 0;
    const uint32 equal = lane < kWarps ? memory.equal[lane] : 0;
    return {__reduce_add_sync(kFullWarp, lane < warp ? above : 0),
            __reduce_add_sync(kFullWarp, lane < warp ? equal : 0), memory.equal[warp],
            __reduce_add_sync(kFullWarp, above + equal)};
}

// Counts by reading all columns once more.
__device__ __noinline__ Before count_before(Histogram& shared, Memory& memory, Row row,
                                            Threshold threshold) {
    const Run run(memory, row);
    uint32 above = 0, equal = 0;
    run.for_each([&](float score) {
        const uint32 key = selectable_key(score);
        above += key > threshold.key;
        equal += key == threshold.key;
    });
    publish_counts(memory, above, equal);
    return sum_counts(memory);
}

// Writes the run's columns that reach the limit, to `place` and on.
__device__ __forceinline__ void write_by_limit(const Run& run, const ResultRow& result, float limit,
                                               uint32 place) {
    run.for_each_step([&](const float4(&scores)[kTogether], int i) {
        const int column = run.column + i * kVectorColumns;
        uint32 own = 0;  // a byte for each vector
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            add_if_at_least<1>(own, (&scores[0].x)[e], limit);
            add_if_at_least<1 << 8>(own, (&scores[1].x)[e], limit);
            add_if_at_least<1 << 16>(own, (&scores[2].x)[e], limit);
            add_if_at_least<1u << 24>(own, (&scores[3].x)[e], limit);
        }
        const uint32 inclusive = inclusive_sum_of_lanes(own);
        const uint32 of_warp = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
        const uint32 before = inclusive - own;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            if (!run.has(i, j)) break;
            const uint32 first = place + (before >> 8 * j & 0xff);
            int* index = result.indices() + first;
            float* value = kValues ? result.values() + first : nullptr;
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                const float score = (&scores[j].x)[e];
                store_if_at_least(index, column + j * kVectorColumns + e, score, limit);
                if (kValues) store_if_at_least(value, score, score, limit);
            }
            place += of_warp >> 8 * j & 0xff;
        }
    });
}

// The same for any threshold, including NaN and one that selects some of the warp's ties. Not
// inlined: rarely needed.
__device__ __noinline__ void write_by_key(Histogram& shared, Memory& memory, Row row,
                                          ResultRow result, Threshold threshold, uint32 above,
                                          uint32 equal) {
    const Run run(memory, row);
    for (int i = 0; i < run.vectors; ++i) {
        const float4 four = run.vector(i);
        uint32 own = 0;  // above in the low half, equal in the high half
        uint32 keys[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            keys[e] = selectable_key((&four.x)[e]);
            own += uint32(keys[e] > threshold.key) + (uint32(keys[e] == threshold.key) << 16);
        }
        const uint32 inclusive = inclusive_sum_of_lanes(own);
        const uint32 of_warp = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
        const uint32 before = inclusive - own;
        uint32 my_above = above + (before & 0xffff), my_equal = equal + (before >> 16);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const bool is_above = keys[e] > threshold.key, is_equal = keys[e] == threshold.key;
            const int column = run.column + i * kVectorColumns + e;
            float score = (&four.x)[e];
            // A caller's NaN is written with its own bits.
            if (!kOwnScores && score != score && column < row.length) score = row.scores[column];
            result.emit_if(is_above || (is_equal && my_equal < threshold.ties),
                           my_above + min(my_equal, threshold.ties), column, score);
            my_above += is_above;
            my_equal += is_equal;
        }
        above += of_warp & 0xffff;
        equal += of_warp >> 16;
    }
}

// Finds the threshold of a row of more than kTopK columns, and where the warp begins to write.
__device__ __forceinline__ Threshold find_threshold(Histogram& shared, Memory& memory,
                                                    const float4& sample, const Row& row,
                                                    const Run& run, Before& before) {
    const KeyRange range = spread_of_sample(shared, sample, row.length);
    const ByScore by_score(score_of(range.low), score_of(range.high));
    find_bin(shared, kTopK, AllScores{run}, by_score);
    const uint32 needed = shared.needed, inside = shared.inside;
    if (shared.bin == 0 || inside > kMaxRanked) {
        const Threshold threshold = look_closer(shared, memory, row, by_score);
        before = count_before(shared, memory, row, threshold);
        return threshold;
    }
    // One pass counts the columns of the bin and above, and collects those of the bin.
    const float bin = ByScore::kFirst + float(shared.bin);
    uint32 reach = 0;
    run.for_each_step([&](const float4(&scores)[kTogether], int first) {
        uint32 found = 0;  // a bit for each score in the bin
#pragma unroll
        for (int i = 0; i < kTogether * kVector; ++i) {
            if (i % kVector == 0 && !run.has(first, i / kVector)) break;
            const float own = by_score.bin((&scores[i / kVector].x)[i % kVector]);
            add_if_at_least<1>(reach, own, bin);
            found |= uint32(own == bin) << i;
        }
        for (; found; found &= found - 1) {
            const int i = __ffs(found) - 1;
            const float4 four = run.vector(first + i / kVector);
            const float score = i & 2 ? (i & 1 ? four.w : four.z) : (i & 1 ? four.y : four.x);
            const uint32 place = take_number(shared.num_ranked);
            shared.ranked[place] = ordered_key(score);
            memory.ranked_warps[place] = warp_of_row();
        }
    });
    publish_counts(memory, reach, 0);
    rank_keys(shared, inside, needed);
    const Threshold threshold = ranked_threshold(shared);
    before = sum_counts(memory);
    // All columns of the bin have been counted as above the threshold. Those that are not are
    // subtracted.
    const uint32 lane = threadIdx.x % kWarpSize, warp = warp_of_row();
    for (uint32 i = lane; i - lane < inside; i += kWarpSize) {
        const uint32 key = i < inside ? shared.ranked[i] : ~0u;
        const uint32 its_warp = i < inside ? memory.ranked_warps[i] : ~0u;
        const uint32 from_before = __ballot_sync(kFullWarp, its_warp < warp);
        const uint32 equal = __ballot_sync(kFullWarp, key == threshold.key);
        before.above -= __popc(__ballot_sync(kFullWarp, key <= threshold.key) & from_before);
        before.equal += __popc(equal & from_before);
        before.own_equal += __popc(equal & __ballot_sync(kFullWarp, its_warp == warp));
    }
    return threshold;
}

// Returns how many columns are selected.
__device__ __forceinline__ int select(Histogram& shared, Memory& memory, const Row& row,
                                      const ResultRow& result) {
    const Run run(memory, row);
    const int sampled = int(int64(threadIdx.x) * (row.length / kVector) / kThreads);
    const float4 sample = load_columns(row.scores, sampled * kVector, row.length);
    run.stage();
    Threshold threshold = kAll;
    Before before;
    if (row.length > kTopK) {
        threshold =
            find_threshold(shared, memory, row.mask(sample, sampled * kVector), row, run, before);
    } else {
        before = count_before(shared, memory, row, threshold);
    }
    // Nearly always a warp selects all of its ties or none. Then one comparison tells.
    const bool all_ties = threshold.all_ties || before.equal + before.own_equal <= threshold.ties;
    if (threshold.key != kNaNKey && (all_ties || before.equal >= threshold.ties)) {
        const float limit = all_ties ? score_of(threshold.key) : limit_above(threshold.key);
        write_by_limit(run, result, limit, before.above + min(before.equal, threshold.ties));
    } else {
        write_by_key(shared, memory, row, result, threshold, before.above, before.equal);
    }
    const int taken = min(before.all, kTopK);
    result.pad(taken, threadIdx.x);
    return taken;
}

}  // namespace staged
