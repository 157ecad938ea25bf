// The search for the score of a given rank, by the threads of a row. Scores are counted in a
// histogram whose bins rise with them. In the bin that holds the rank, scores are ranked one by one
// if there are at most kMaxRanked; else they are counted again, by the bits of their keys. This
// ends whatever the scores are, because each count takes kBinBits bits off the range of keys.
//
// The functions take scores as an object whose for_each(visit) calls visit(score) for each score of
// the thread. All threads of the row take part.
#pragma once
#include "common.cuh"
#include "ptx.cuh"
#include "row_threads.cuh"

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr uint32 kNoBin = kBins;
constexpr int kMaxRanked = 256;  // keys that are ranked by comparing each with each
static_assert(kBins % kThreads == 0, "each bin belongs to one thread");
static_assert(kMaxRanked <= kThreads, "each ranked key belongs to one thread");

__device__ __forceinline__ float score_of(uint32 key) {
    return __uint_as_float(key == kNaNKey ? kQuietNaN
                                          : key ^ (~uint32(int(key) >> 31) | 0x80000000u));
}

// The least score above that of a key. Above infinity this is a NaN, and no score is >= a NaN.
__device__ __forceinline__ float limit_above(uint32 key) {
    return key <= kNaNKey ? __uint_as_float(kMinusInfinity) : score_of(key + 1);
}

// Selects from a row the scores with keys above `key`, and the first `ties` scores with that key.
struct Threshold {
    uint32 key;
    uint32 ties;
    bool all_ties;  // no more than `ties` scores have the key
};

// The least and the greatest of some keys; low > high if there are none.
struct KeyRange {
    uint32 low = 0xffffffffu, high = 0;
    __device__ __forceinline__ void add(uint32 key) {
        low = min(low, key);
        high = max(high, key);
    }
};

// The threads of a row share this during the search.
struct Histogram {
    uint32 bins[kBins];         // all zero except while scores are counted
    uint32 ranked[kMaxRanked];  // keys
    uint32 totals[2][kWarps];   // used in turns, so that a sum needs one barrier
    KeyRange ranges[kWarps];
    uint32 num_ranked;
    uint32 bin;     // that holds the rank, or the key that has it
    uint32 needed;  // the rank in the bin, from 1 on, or among equal keys
    uint32 inside;  // how many scores the bin holds, or how many keys are equal
    uint32 upper_bin;
};

__device__ __forceinline__ void clear_bins(Histogram& shared) {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) shared.bins[i * kThreads + thread_of_row()] = 0;
}

// The exclusive sum of one value per warp, in warp order, and their total. One barrier. Calls in
// succession use the two `turn`s alternately.
__device__ __forceinline__ uint32 sum_of_warps(Histogram& shared, int& turn, uint32 value,
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
__device__ __forceinline__ KeyRange range_of_row(Histogram& shared, KeyRange own) {
    const int lane = threadIdx.x % kWarpSize;
    own = {__reduce_min_sync(kFullWarp, own.low), __reduce_max_sync(kFullWarp, own.high)};
    if (lane == 0) shared.ranges[warp_of_row()] = own;
    sync_row();
    const KeyRange found = lane < kWarps ? shared.ranges[lane] : KeyRange{};
    return {__reduce_min_sync(kFullWarp, found.low), __reduce_max_sync(kFullWarp, found.high)};
}

// Bins of equal width from a low score to a high one: they divide usual scores evenly. The first
// and the last bin also take what lies beyond. A few instructions per score, none of them a
// conversion. If low and high are no range of ordinary numbers, all scores are in bin 0.
struct ByScore {
    static constexpr bool kTakesAll = true;      // every score has a bin
    static constexpr float kFirst = 8388608.0f;  // 2 ** 23: the last bit is worth 1 from here on
    float low, width, scale;
    __device__ __forceinline__ ByScore(float low, float high) : low(low), width(high - low) {
        scale = width > 0.0f ? __fdividef(1.0f, width) : 0.0f;  // need not be exact
        if (!(scale < 1e37f)) scale = 0.0f;
    }
    // kFirst + the bin. A NaN is in bin 0. The subtraction comes first because a product would
    // round away the last bits, in which close scores differ.
    __device__ __forceinline__ float bin(float score) const {
        return fmaf(__saturatef((score - low) * scale), float(kBins - 1), kFirst);
    }
    __device__ __forceinline__ uint32 operator()(float score) const {
        return __float_as_uint(bin(score)) - __float_as_uint(kFirst);
    }
    // The score between a bin above 0 and the one below it.
    __device__ __forceinline__ float edge(uint32 bin) const {
        return fmaf((float(bin) - 0.5f) * (1.0f / (kBins - 1)), width, low);
    }
};

// Bins by the first kBinBits bits in which keys of a range may differ.
struct ByBits {
    static constexpr bool kTakesAll = false;
    KeyRange range;
    int shift;
    __device__ __forceinline__ ByBits(const KeyRange& range)
        : range(range), shift(max(kWarpSize - __clz(range.high - range.low) - kBinBits, 0)) {}
    __device__ __forceinline__ uint32 operator()(float score) const {
        const uint32 key = ordered_key(score);
        return range.low <= key && key <= range.high ? key - range.low >> shift : kNoBin;
    }
};

// Counts scores by bin_of(score), which must not fall as scores rise (kNoBin: not counted), and
// finds the bin that holds the `needed`-th largest: shared.bin, and shared.needed of the
// shared.inside scores in it. shared.upper_bin is the bin of the `upper`-th largest (0: not
// wanted).
template <class Scores, class BinOf>
__device__ __forceinline__ void find_bin(Histogram& shared, uint32 needed, const Scores& scores,
                                         const BinOf& bin_of, uint32 upper = 0) {
    const uint32 bins = uint32(__cvta_generic_to_shared(shared.bins));
    scores.for_each([&](float score) {  // the additions of lanes with the same bin are combined
        const uint32 bin = bin_of(score);
        add_one_if(BinOf::kTakesAll || bin < kNoBin, bins + sizeof(uint32) * bin);
    });
    sync_row();
    // Thread i has the i-th bins from the top, because ranks count from large scores to small.
    const int top = kBins - 1 - thread_of_row() * kBinsPerThread;
    uint32 counts[kBinsPerThread], own = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
        own += counts[i] = shared.bins[top - i];
        shared.bins[top - i] = 0;
    }
    uint32 total;
    int turn = 0;
    const uint32 of_warp = __reduce_add_sync(kFullWarp, own);
    uint32 above = sum_of_warps(shared, turn, of_warp, total);
    const auto holds = [](uint32 rank, uint32 above, uint32 inside) {
        return above < rank && rank <= above + inside;
    };
    if (holds(needed, above, of_warp) || holds(upper, above, of_warp)) {  // one or two warps
        above += inclusive_sum_of_lanes(own) - own;
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) {
            if (holds(needed, above, counts[i])) {
                shared.bin = top - i;
                shared.needed = needed - above;
                shared.inside = counts[i];
                shared.num_ranked = 0;
            }
            if (holds(upper, above, counts[i])) shared.upper_bin = top - i;
            above += counts[i];
        }
    }
    sync_row();
}

// The range of the keys in a bin. One barrier, and another is needed before the next call.
template <class Scores, class BinOf>
__device__ __forceinline__ KeyRange range_of_bin(Histogram& shared, const Scores& scores,
                                                 const BinOf& bin_of, uint32 bin) {
    KeyRange own;
    scores.for_each([&](float score) {
        if (bin_of(score) == bin) own.add(ordered_key(score));
    });
    return range_of_row(shared, own);
}

// Ranks the keys of the bin found, of which shared.ranked has all `inside`: shared.bin becomes the
// key of the `needed`-th, and shared.needed of the shared.inside keys equal to it are needed.
__device__ __forceinline__ void rank_keys(Histogram& shared, uint32 inside, uint32 needed) {
    if (thread_of_row() < inside) {
        const uint32 key = shared.ranked[thread_of_row()];
        uint32 above = 0, equal = 0;
        for (uint32 i = 0; i < inside; i += 4) {
#pragma unroll
            for (uint32 j = 0; j < 4; ++j) {  // four loads are in flight together
                const uint32 other = shared.ranked[i + j];
                above += i + j < inside && other > key;
                equal += i + j < inside && other == key;
            }
        }
        if (above < needed && needed <= above + equal) {  // equal keys write the same values
            shared.bin = key;
            shared.needed = needed - above;
            shared.inside = equal;
        }
    }
    sync_row();
}

__device__ __forceinline__ Threshold ranked_threshold(const Histogram& shared) {
    return {shared.bin, shared.needed, shared.needed == shared.inside};
}

// If the bin found holds at most kMaxRanked scores, ranks them and returns true. Else returns false
// and the range of their keys.
template <class Scores, class BinOf>
__device__ __forceinline__ bool rank_bin(Histogram& shared, const Scores& scores,
                                         const BinOf& bin_of, KeyRange& range) {
    const uint32 bin = shared.bin, needed = shared.needed, inside = shared.inside;
    if (inside > kMaxRanked) {
        range = range_of_bin(shared, scores, bin_of, bin);
        return false;
    }
    scores.for_each([&](float score) {
        if (bin_of(score) == bin) {
            shared.ranked[take_number(shared.num_ranked)] = ordered_key(score);
        }
    });
    sync_row();
    rank_keys(shared, inside, needed);
    return true;
}

// The threshold of rank shared.needed among the scores, shared.inside in number, with keys in a
// range.
template <class Scores>
__device__ __forceinline__ Threshold search_range(Histogram& shared, const Scores& scores,
                                                  KeyRange range) {
    while (range.low < range.high) {
        const ByBits by_bits(range);
        find_bin(shared, shared.needed, scores, by_bits);
        if (rank_bin(shared, scores, by_bits, range)) return ranked_threshold(shared);
    }
    return {range.low, shared.needed, shared.needed == shared.inside};
}
