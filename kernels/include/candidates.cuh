// A list of candidates in shared memory, in ascending column order, and the kTopK first of it by the total order:
// what topk_filter.cu keeps of a row. Its parameters: kTopK, kThreads a row, kRows rows in a block, kCluster blocks a
// row, kCapacity.
#pragma once
#include "histogram.cuh"
#include "cluster.cuh"
#include "common.cuh"
#include "ptx.cuh"

constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBinsPerThread = kBins / kThreads;
static_assert(kBins % kThreads == 0, "every bin has one owner");
static_assert(kFew <= kThreads, "a thread each");

struct Candidate {
    uint32 score;  // its bits
    int column;
};

struct Shared {
    alignas(8) Candidate list[kCapacity + kThreads];  // and NaN up to a multiple of kThreads
    uint32 histogram[kBins];  // all zero but while scores are counted
    uint32 few[kFew];
    uint32 totals[2][kWarps];  // in turns, so that one barrier a sum is enough
    float lowest, highest;  // what was guessed: a score that kTopK columns should reach, and one that fewer should
    uint32 crowded;         // whether many candidates have the lowest score, and none has less
    Range ranges[kWarps];
    uint32 bin, needed, inside, count;
    uint32 upper_bin;
    uint32 listed;          // of the list, for the cluster's other blocks
};

__device__ __forceinline__ int thread_of_row() { return kRows == 1 ? threadIdx.x : threadIdx.x % kThreads; }

__device__ __forceinline__ void sync_row() {
    if (kRows == 1) __syncthreads();
    else barrier_of_some<kThreads>(1 + threadIdx.x / kThreads);
}

// Exclusive sum of one value per warp, in warp order, and the block's total. One barrier.
__device__ __forceinline__ uint32 sum_of_warps(Shared& shared, int& turn, uint32 value, uint32& total) {
    const int lane = threadIdx.x % kWarpSize, warp = thread_of_row() / kWarpSize;
    turn ^= 1;
    if (lane == 0) shared.totals[turn][warp] = value;
    sync_row();
    const uint32 found = lane < kWarps ? shared.totals[turn][lane] : 0;
    total = __reduce_add_sync(kFullWarp, found);
    return __reduce_add_sync(kFullWarp, lane < warp ? found : 0);
}

// The range of all threads' ranges; low > high if all are empty. One barrier, and another before the next call.
__device__ __forceinline__ Range range_of_block(Shared& shared, Range own) {
    const int lane = threadIdx.x % kWarpSize;
    own = {__reduce_min_sync(kFullWarp, own.low), __reduce_max_sync(kFullWarp, own.high)};
    if (lane == 0) shared.ranges[thread_of_row() / kWarpSize] = own;
    sync_row();
    const Range found = lane < kWarps ? shared.ranges[lane] : Range{};
    return {__reduce_min_sync(kFullWarp, found.low), __reduce_max_sync(kFullWarp, found.high)};
}

// The scores of a list, padded to a multiple of kThreads: each thread has as many of its own. Functions below take
// these, or others that each thread has.
struct ListScores {
    const Candidate* list;
    int count;
    template <class What>
    __device__ __forceinline__ void for_each(const What& what) const {
        const Candidate* own = list + thread_of_row();
#pragma unroll 4
        for (int i = 0; i < count; i += kThreads) what(__uint_as_float(own[i].score));
    }
};

// The range of scores, as far as they are numbers.
template <class Source>
__device__ __forceinline__ Range range_of_scores(Shared& shared, const Source& scores) {
    const float infinity = __uint_as_float(0x7f800000u);
    float low = infinity, high = -infinity;
    scores.for_each([&](float score) {  // these ignore NaN
        low = fminf(low, score);
        high = fmaxf(high, score);
    });
    return range_of_block(shared, {ordered_key(low), ordered_key(high)});
}

// Counts scores by bin_of(score), which must not fall as scores rise (kNoBin: not counted), and finds the bin that
// holds the `needed`-th largest score: shared.bin, and .needed of the .inside scores in that bin. shared.upper_bin is
// the bin of the `upper`-th largest; 0: not wanted.
template <class Source, class BinOf>
__device__ __forceinline__ void find_bin(Shared& shared, uint32 needed, const Source& scores, const BinOf& bin_of,
                                         uint32 upper = 0) {
    const uint32 histogram = uint32(__cvta_generic_to_shared(shared.histogram));
    scores.for_each([&](float score) {  // lanes with one bin make one addition
        const uint32 bin = bin_of(score);
        add_one_if(BinOf::kTakesAll || bin < kNoBin, histogram + sizeof(uint32) * bin);
    });
    sync_row();
    // Thread i owns the bins from the top down, so that the sum runs from large scores to small.
    const int top = kBins - 1 - thread_of_row() * kBinsPerThread;
    uint32 bins[kBinsPerThread], own = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
        own += bins[i] = shared.histogram[top - i];
        shared.histogram[top - i] = 0;
    }
    uint32 total;
    int turn = 0;
    const uint32 of_warp = __reduce_add_sync(kFullWarp, own);
    uint32 above = sum_of_warps(shared, turn, of_warp, total);
    const auto holds = [](uint32 rank, uint32 above, uint32 inside) { return above < rank && rank <= above + inside; };
    if (holds(needed, above, of_warp) || holds(upper, above, of_warp)) {  // one warp or two
        above += inclusive_sum_of_lanes(own) - own;
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) {
            if (holds(needed, above, bins[i])) {
                shared.bin = top - i;
                shared.needed = needed - above;
                shared.inside = bins[i];
                shared.count = 0;
            }
            if (holds(upper, above, bins[i])) shared.upper_bin = top - i;
            above += bins[i];
        }
    }
    sync_row();
}

// The range of the keys in a bin. One barrier, and another before the next call.
template <class Source, class BinOf>
__device__ __forceinline__ Range range_of_bin(Shared& shared, const Source& scores, const BinOf& bin_of, uint32 bin) {
    Range own;
    scores.for_each([&](float score) {
        if (bin_of(score) == bin) own.add(ordered_key(score));
    });
    return range_of_block(shared, own);
}

// If the bin found holds few scores, ranks them: then shared.bin is the key of the `needed`-th, and .needed of the
// .inside equal to it are needed; true. Else the range of its keys is written to `range`.
template <class BinOf>
__device__ __forceinline__ bool look_into_bin(Shared& shared, const ListScores& scores, const BinOf& bin_of,
                                              Range& range) {
    const uint32 bin = shared.bin, needed = shared.needed, inside = shared.inside;
    if (inside > kFew) {
        range = range_of_bin(shared, scores, bin_of, bin);
        return false;
    }
    scores.for_each([&](float score) {
        if (bin_of(score) == bin) shared.few[atomicAdd(&shared.count, 1u)] = ordered_key(score);
    });
    sync_row();
    rank_few(shared, shared.few, thread_of_row(), inside, needed);
    sync_row();
    return true;
}

// What is taken of a list: scores that reach the limit, and the first `ties` of those with the key.
struct Threshold {
    float limit;
    uint32 key;
    uint32 ties;
};

// NaN up to a multiple of kThreads: it does no harm in the last place, for what is sought is among the candidates.
__device__ __forceinline__ void pad(Shared& shared, int count) {
    shared.list[count + thread_of_row()].score = kQuietNaN;
}

// The kTopK first of a padded list. Bins by score first, and then by the keys' bits, which ends
// whatever the scores. Not inlined, for the registers that a walk holds meanwhile.
__device__ __noinline__ Threshold find_threshold(Shared& shared, int count) {
    if (count <= kTopK) return {__uint_as_float(kMinusInfinity), kNaNKey, kTopK};  // all
    const ListScores scores{shared.list, (count + kThreads - 1) / kThreads * kThreads};
    float lowest = shared.lowest, highest = shared.highest;
    if (shared.crowded) {  // then that is nearly always the kTopK-th, and zeros are normal input
        const uint32 key = ordered_key(lowest);
        uint32 above = 0, total;
        scores.for_each([&](float score) { add_if_at_least<1>(above, score, limit_above(key)); });
        int turn = 1;  // what follows begins with the other: nobody has to wait until all have read this sum
        sum_of_warps(shared, turn, __reduce_add_sync(kFullWarp, above), total);
        if (total < kTopK) return {limit_above(key), key, kTopK - total};
    }
    if (!(lowest < highest)) {
        const Range range = range_of_scores(shared, scores);
        lowest = score_of(range.low);
        highest = score_of(range.high);
    }
    const ByScore by_score(lowest, highest);
    find_bin(shared, kTopK, scores, by_score);
    Range range;
    bool found = look_into_bin(shared, scores, by_score, range);
    while (!found) {
        if (range.low == range.high) return {limit_above(range.low), range.low, shared.needed};
        const ByBits by_bits(range);
        find_bin(shared, shared.needed, scores, by_bits);
        found = look_into_bin(shared, scores, by_bits, range);
    }
    const uint32 key = shared.bin;
    // Nearly always all that are equal are needed, and take() has less to do.
    if (shared.needed == shared.inside && key != kNaNKey) return {score_of(key), key, 0};
    return {limit_above(key), key, shared.needed};
}

// Hands the candidates that the threshold takes to emit(place, candidate), in column order; returns how many. They
// may be written to the list at their places.
template <bool has_ties, class Emit>
__device__ __forceinline__ int take(Shared& shared, int count, const Threshold& threshold, const Emit& emit) {
    constexpr int kTaken = 4;  // of a thread in a step
    const int lane = threadIdx.x % kWarpSize, first = thread_of_row() / kWarpSize * (kWarpSize * kTaken) + lane;
    const uint32 lanes_below = (1u << lane) - 1;
    int turn = 0;
    uint32 above = 0, equal = 0;
    for (int base = first; base < count + first; base += kThreads * kTaken) {
        Candidate candidates[kTaken];
        uint32 ups[kTaken], ties[kTaken] = {};
        uint32 own = 0;  // above in the low half, equal in the high half
#pragma unroll
        for (int j = 0; j < kTaken; ++j) {
            const int i = base + j * kWarpSize;
            candidates[j] = i < count ? shared.list[i] : Candidate{kQuietNaN, 0};
            const float score = __uint_as_float(candidates[j].score);
            ups[j] = __ballot_sync(kFullWarp, score >= threshold.limit);
            own += __popc(ups[j]);
            if (has_ties) {
                ties[j] = __ballot_sync(kFullWarp, i < count && ordered_key(score) == threshold.key);
                own += __popc(ties[j]) << 16;
            }
        }
        uint32 total;
        const uint32 before = sum_of_warps(shared, turn, own, total);
        uint32 my_above = above + (before & 0xffffu), my_equal = equal + (before >> 16);
#pragma unroll
        for (int j = 0; j < kTaken; ++j) {
            const uint32 ties_before = my_equal + __popc(ties[j] & lanes_below);
            const uint32 place = my_above + __popc(ups[j] & lanes_below) + min(ties_before, threshold.ties);
            const bool tie = has_ties && (ties[j] >> lane & 1) && ties_before < threshold.ties;
            if (__uint_as_float(candidates[j].score) >= threshold.limit || tie) emit(int(place), candidates[j]);
            my_above += __popc(ups[j]);
            my_equal += __popc(ties[j]);
        }
        above += total & 0xffffu;
        equal += total >> 16;
    }
    return int(above + min(equal, threshold.ties));
}

template <class Emit>
__device__ __forceinline__ int take(Shared& shared, int count, const Threshold& threshold, const Emit& emit) {
    if (threshold.ties == 0) return take<false>(shared, count, threshold, emit);
    return take<true>(shared, count, threshold, emit);
}

// Cuts a padded list of more than kTopK down to its kTopK first; returns the least score above the last of these.
__device__ __noinline__ float cut(Shared& shared, int count) {
    const Threshold threshold = find_threshold(shared, count);
    take(shared, count, threshold, [&](int place, const Candidate& found) { shared.list[place] = found; });
    sync_row();
    return limit_above(threshold.key);
}

// Appends the lists of the cluster's other blocks to that of the first, in the order of their ranks; of each the kTopK
// first are enough, where there is no room for all. Returns in all blocks how many candidates that makes. Not inlined,
// as find_threshold.
__device__ __noinline__ int gather(Shared& shared, int count, int blocks) {
    if (kCluster == 1 || blocks == 1) return count;
    const uint32 lane = threadIdx.x % kWarpSize;
    uint32 upto;
    int total = 0;
    for (bool short_enough = false; !short_enough;) {
        if (total > kCapacity && count > kTopK) {
            cut(shared, count);
            count = kTopK;
        }
        if (thread_of_row() == 0) shared.listed = count;
        sync_blocks(blocks);
        upto = inclusive_sum_of_lanes(lane < blocks ? load_from_block(shared.listed, lane, blocks) : 0);
        total = __shfl_sync(kFullWarp, upto, kCluster - 1);
        short_enough = total <= kCapacity;
        if (!short_enough) sync_blocks(blocks);  // all have read
    }
    if (rank_in_cluster() == 0) {
        constexpr int kLoads = 4096 / kThreads;  // of a thread under way
        int ends[kCluster];
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) ends[rank] = __shfl_sync(kFullWarp, upto, rank);
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
                const uint2& there = reinterpret_cast<const uint2&>(shared.list[i - start]);
                if (i < total) found[j] = load_from_block(there, rank, kCluster);
            }
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                const int i = base + j * kThreads;
                if (i < total) shared.list[i] = {found[j].x, int(found[j].y)};
            }
        }
    }
    pad(shared, total);
    sync_blocks(blocks);  // no list is read any more
    return total;
}
