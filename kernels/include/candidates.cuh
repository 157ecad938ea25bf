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
    alignas(8) Candidate list[kCapacity];
};

// What a block gets from the other blocks of its cluster. Two places for counts are used in turns,
// each with its own barrier: one block may send its next count while another's is still on its way.
struct Received {
    uint64 counts_ready[2], list_ready;  // barriers
    uint32 exchanges;                    // of counts so far
    uint32 joined;                       // lists that have been joined so far
    uint32 counts[2][kCluster];          // of candidates of each block
};

// The list comes first, so that its address, which is computed often, needs no offset.
struct Shared : CandidateList, Histogram {
    float lowest, highest;  // guessed: a score that kTopK columns reach, and one that fewer reach
    uint32 crowded;         // whether many candidates have the lowest score, and none has less
    int sequence;           // whose keys are selected, if kSlots
#if kCluster > 1
    Received received;
#endif
};

// The scores of a list, in steps of some scores for each thread, which are loaded together. A last
// step that is not full has NaNs. They may be counted with the candidates: they rank last, and the
// rank that is looked for is among the candidates.
struct ListScores {
    const Candidate* list;
    int count;
    template <class Visit>
    __device__ __forceinline__ void for_each(const Visit& visit) const {
        constexpr int kTogether = kCluster > 1 ? 8 : 4;
#pragma unroll 1
        for (int base = thread_of_row(); base - thread_of_row() < count;
             base += kThreads * kTogether) {
            uint32 scores[kTogether];
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                const int i = base + j * kThreads;
                scores[j] = i < count ? list[i].score : kQuietNaN;
            }
#pragma unroll
            for (int j = 0; j < kTogether; ++j) visit(__uint_as_float(scores[j]));
        }
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

// The threshold that selects the kTopK first of a list. Not inlined: its registers would add to
// those that filter_row holds.
__device__ __noinline__ Threshold find_threshold(Shared& shared, int count) {
    if (count <= kTopK) return {kNaNKey, kTopK, false};  // all
    const ListScores scores{shared.list, count};
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

// Calls emit(whether the threshold selects it, place, candidate) for candidates in column order,
// and returns how many are selected. `limit` is the score that these reach, except for ties. emit
// may write to the list at `place`.
template <bool has_ties, class Emit>
__device__ __forceinline__ int take(Shared& shared, int count, float limit,
                                    const Threshold& threshold, const Emit& emit) {
    // Candidates of a thread in a step. Where a block has several rows, and slots or scores are
    // written, registers suffice for two.
    constexpr int kTaken = kRows > 1 && (kSlots > 0 || kValues) ? 2 : 4;
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
            const bool reaches = __uint_as_float(candidates[j].score) >= limit;
            emit(reaches || is_tie, int(place), candidates[j]);
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

// Cuts a list of more than kTopK candidates down to its kTopK first. Returns the least score
// above the kTopK-th.
__device__ __noinline__ float cut(Shared& shared, int count) {
    const Threshold threshold = find_threshold(shared, count);
    take(shared, count, threshold, [&](bool selected, int place, const Candidate& found) {
        if (selected) shared.list[place] = found;
    });
    sync_row();
    return limit_above(threshold.key);
}

#if kCluster > 1
// Prepares a block to receive. All threads of the cluster call it.
__device__ __forceinline__ void open_cluster(Received& received) {
    if (threadIdx.x == 0) {
        for (uint64& barrier : received.counts_ready) barrier_init(barrier, 1);
        barrier_init(received.list_ready, 1);
        fence_barrier_init();
        received.exchanges = received.joined = 0;
    }
    sync_cluster();
}

// Tells all blocks how many candidates each block has. Lane l gets the place in the joined list
// that follows the candidates of block l.
__device__ __forceinline__ uint32 exchange_counts(Received& received, int count, uint32 turn) {
    uint32(&counts)[kCluster] = received.counts[turn % 2];
    uint64& ready = received.counts_ready[turn % 2];
    if (threadIdx.x == 0) barrier_arrive_expect(ready, sizeof(counts));
    if (threadIdx.x < kCluster) send(counts[rank_in_cluster()], count, threadIdx.x, ready);
    wait_for_cluster(ready, turn / 2 % 2);
    const uint32 lane = threadIdx.x % kWarpSize;
    return inclusive_sum_of_lanes(lane < kCluster ? counts[lane] : 0);
}

// Appends the lists of the cluster's other blocks to that of the first block, by rank. Lists are
// cut first if there is no room for all. Returns the number of candidates, in all blocks. Not
// inlined, as find_threshold.
//
// A block sends candidates only after it has the counts of all blocks. So the first block has made
// its own list, and what it is sent overwrites nothing. A block waits for all that it is sent, so
// it does not end before.
__device__ __noinline__ int gather(Shared& shared, int count) {
    Received& received = shared.received;
    uint32 turn = received.exchanges;
    const uint32 joined = received.joined;
    uint32 end = exchange_counts(received, count, turn++);
    int total = __shfl_sync(kFullWarp, end, kCluster - 1);
    if (total > kCapacity) {
        if (count > kTopK) {
            cut(shared, count);
            count = kTopK;
        }
        sync_row();  // all have read the counts: two exchanges later their place is used again
        end = exchange_counts(received, count, turn++);
        total = __shfl_sync(kFullWarp, end, kCluster - 1);
    }
    if (rank_in_cluster() == 0) {
        const uint32 bytes = (total - count) * sizeof(Candidate);
        if (threadIdx.x == 0) barrier_arrive_expect(received.list_ready, bytes);
        wait_for_cluster(received.list_ready, joined % 2);
    } else {
        const int start = __shfl_sync(kFullWarp, end, rank_in_cluster() - 1);
        uint2* const list = reinterpret_cast<uint2*>(shared.list);
        for (int i = threadIdx.x; i < count; i += kThreads) {
            send(list[start + i], list[i], 0, received.list_ready);
        }
    }
    sync_row();
    if (threadIdx.x == 0) {
        received.exchanges = turn;
        received.joined = joined + 1;
    }
    return total;
}
#else
__device__ __forceinline__ int gather(Shared&, int count) { return count; }
#endif
