// The list of candidates that topk_filter.cu keeps of a row, in shared memory and in ascending
// column order, and the selection of its kTopK first in the total order. Parameters: kTopK,
// kThreads of a row, kRows of a block, kCluster blocks of a row, kCapacity of the list.
#pragma once
#include "cluster.cuh"
#include "common.cuh"
#include "histogram.cuh"
#include "ptx.cuh"
#include "row_threads.cuh"

struct Candidate {
    uint32 score;  // its bits
    int column;
};

struct CandidateList {
    alignas(8) Candidate list[kCapacity + kThreads];  // padded with NaN to a multiple of kThreads
};

// The list comes first, so that its address, which is computed often, needs no offset.
struct Shared : CandidateList, Histogram {
    float lowest, highest;  // guessed: a score that kTopK columns reach, and one that fewer reach
    uint32 crowded;         // whether many candidates have the lowest score, and none has less
    uint32 listed;          // candidates of this block, for the other blocks of the cluster
    int sequence;           // whose keys are selected, if kSlots
};

// The scores of a padded list. Each thread has the same number of them.
struct ListScores {
    const Candidate* list;
    int count;
    template <class Visit>
    __device__ __forceinline__ void for_each(const Visit& visit) const {
        const Candidate* own = list + thread_of_row();
#pragma unroll 4
        for (int i = 0; i < count; i += kThreads) visit(__uint_as_float(own[i].score));
    }
};

// The range of the scores that are numbers.
template <class Scores>
__device__ __forceinline__ KeyRange range_of_numbers(Shared& shared, const Scores& scores) {
    const float infinity = __uint_as_float(0x7f800000u);
    float low = infinity, high = -infinity;
    scores.for_each([&](float score) {  // these ignore NaN
        low = fminf(low, score);
        high = fmaxf(high, score);
    });
    return range_of_row(shared, {ordered_key(low), ordered_key(high)});
}

// Pads a list with NaN. These are counted with the candidates, but they rank last, and the rank
// that is looked for is among the candidates.
__device__ __forceinline__ void pad(Shared& shared, int count) {
    shared.list[count + thread_of_row()].score = kQuietNaN;
}

// The threshold that selects the kTopK first of a padded list. Not inlined: its registers would add
// to those that filter_row holds.
__device__ __noinline__ Threshold find_threshold(Shared& shared, int count) {
    if (count <= kTopK) return {kNaNKey, kTopK, false};  // all
    const ListScores scores{shared.list, (count + kThreads - 1) / kThreads * kThreads};
    float lowest = shared.lowest, highest = shared.highest;
    if (shared.crowded) {  // then `lowest` is nearly always the kTopK-th score
        const uint32 key = ordered_key(lowest);
        uint32 above = 0, total;
        scores.for_each([&](float score) { add_if_at_least<1>(above, score, limit_above(key)); });
        int turn = 1;  // find_bin begins with the other turn, so no barrier is needed between
        sum_of_warps(shared, turn, __reduce_add_sync(kFullWarp, above), total);
        if (total < kTopK) return {key, kTopK - total, false};
    }
    if (!(lowest < highest)) {
        const KeyRange range = range_of_numbers(shared, scores);
        lowest = score_of(range.low);
        highest = score_of(range.high);
    }
    const ByScore by_score(lowest, highest);
    find_bin(shared, kTopK, scores, by_score);
    KeyRange range;
    if (rank_bin(shared, scores, by_score, range)) return ranked_threshold(shared);
    return search_range(shared, scores, range);
}

// Calls emit(place, candidate) for the candidates that the threshold selects, in column order, and
// returns how many. `limit` is the score that they reach, except for ties. emit may write to the
// list at `place`.
template <bool has_ties, class Emit>
__device__ __forceinline__ int take(Shared& shared, int count, float limit,
                                    const Threshold& threshold, const Emit& emit) {
    constexpr int kTaken = 4;  // candidates of a thread in a step
    const int lane = threadIdx.x % kWarpSize, first = warp_of_row() * (kWarpSize * kTaken) + lane;
    const uint32 lanes_below = (1u << lane) - 1, max_ties = has_ties ? threshold.ties : 0;
    int turn = 0;
    uint32 above = 0, equal = 0;
    for (int base = first; base < count + first; base += kThreads * kTaken) {
        Candidate candidates[kTaken];
        uint32 reach[kTaken], ties[kTaken] = {};
        uint32 own = 0;  // above in the low half, equal in the high half
#pragma unroll
        for (int j = 0; j < kTaken; ++j) {
            const int i = base + j * kWarpSize;
            candidates[j] = i < count ? shared.list[i] : Candidate{kQuietNaN, 0};
            const float score = __uint_as_float(candidates[j].score);
            reach[j] = __ballot_sync(kFullWarp, score >= limit);
            own += __popc(reach[j]);
            if (has_ties) {
                const bool is_tie = i < count && ordered_key(score) == threshold.key;
                ties[j] = __ballot_sync(kFullWarp, is_tie);
                own += __popc(ties[j]) << 16;
            }
        }
        uint32 total;
        const uint32 before = sum_of_warps(shared, turn, own, total);
        uint32 my_above = above + (before & 0xffffu), my_equal = equal + (before >> 16);
#pragma unroll
        for (int j = 0; j < kTaken; ++j) {
            const uint32 ties_before = my_equal + __popc(ties[j] & lanes_below);
            const uint32 place =
                my_above + __popc(reach[j] & lanes_below) + min(ties_before, max_ties);
            const bool is_tie = has_ties && (ties[j] >> lane & 1) && ties_before < max_ties;
            if (__uint_as_float(candidates[j].score) >= limit || is_tie) {
                emit(int(place), candidates[j]);
            }
            my_above += __popc(reach[j]);
            my_equal += __popc(ties[j]);
        }
        above += total & 0xffffu;
        equal += total >> 16;
    }
    return int(above + min(equal, max_ties));
}

template <class Emit>
__device__ __forceinline__ int take(Shared& shared, int count, const Threshold& threshold,
                                    const Emit& emit) {
    // Nearly always all ties are selected. Then one comparison tells.
    if (threshold.all_ties && threshold.key != kNaNKey) {
        return take<false>(shared, count, score_of(threshold.key), threshold, emit);
    }
    return take<true>(shared, count, limit_above(threshold.key), threshold, emit);
}

// Cuts a padded list of more than kTopK candidates down to its kTopK first. Returns the least score
// above the kTopK-th.
__device__ __noinline__ float cut(Shared& shared, int count) {
    const Threshold threshold = find_threshold(shared, count);
    take(shared, count, threshold,
         [&](int place, const Candidate& found) { shared.list[place] = found; });
    sync_row();
    return limit_above(threshold.key);
}

// Appends the lists of the cluster's other blocks to that of the first block, by rank. Lists are
// cut first if there is no room for all. Returns the number of candidates, in all blocks. Not
// inlined, as find_threshold.
__device__ __noinline__ int gather(Shared& shared, int count) {
    if (kCluster == 1) return count;
    const uint32 lane = threadIdx.x % kWarpSize;
    uint32 end;  // of the list of block `lane` in the joined list
    int total = 0;
    for (bool fits = false; !fits;) {
        if (total > kCapacity && count > kTopK) {
            cut(shared, count);
            count = kTopK;
        }
        if (thread_of_row() == 0) shared.listed = count;
        sync_cluster();
        end = inclusive_sum_of_lanes(lane < kCluster ? load_from_block(shared.listed, lane) : 0);
        total = __shfl_sync(kFullWarp, end, kCluster - 1);
        fits = total <= kCapacity;
        if (!fits) sync_cluster();  // all have read shared.listed
    }
    if (rank_in_cluster() == 0) {
        constexpr int kLoads = 4096 / kThreads;  // loads that a thread has in flight
        int ends[kCluster];
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) ends[rank] = __shfl_sync(kFullWarp, end, rank);
        for (int base = count + threadIdx.x; base < total; base += kLoads * kThreads) {
            uint2 found[kLoads];
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                const int i = base + j * kThreads;
                int rank = 0, start = 0;
#pragma unroll
                for (int before = 0; before < kCluster - 1; ++before) {
                    if (i >= ends[before]) rank = before + 1, start = ends[before];
                }
                const uint2& own = reinterpret_cast<const uint2&>(shared.list[i - start]);
                if (i < total) found[j] = load_from_block(own, rank);
            }
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                const int i = base + j * kThreads;
                if (i < total) shared.list[i] = {found[j].x, int(found[j].y)};
            }
        }
    }
    pad(shared, total);
    sync_cluster();  // no other list is read any more
    return total;
}
