// A sample of a row gives two scores: one that somewhat more than the wanted columns should reach,
// with which topk_filter.cu begins as its limit, and one that fewer columns should reach. The guess
// decides how long a selection takes, but not its result.
#pragma once
#include "candidates.cuh"
#include "common.cuh"
#include "histogram.cuh"
#include "row.cuh"

constexpr int kSampleVectors = kThreads < 1024 ? 2 : 1;  // of a thread
constexpr int kSamples = kThreads * kVector * kSampleVectors;
// How many vectors of a sample are adjacent. Adjacent scores are often alike, and alike scores tell
// little more than one of them; so with single vectors fewer guesses are bad, and a bad guess in
// one row delays all rows that are selected from at the same time. But memory delivers two vectors
// at a time: single vectors take 20 % longer if a block selects from many rows in turn, 3 % longer
// with one row (docs/notes/2026-11-28-selection-on-any-scores.md).
constexpr bool kManyRowsPerBlock = kCluster == 1 && kThreads < 1024;
constexpr int kAdjacent = kManyRowsPerBlock || kCluster == 8 ? 2 : 1;

struct SampleScores {
    float scores[kSampleVectors * kVector];
    template <class Visit>
    __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll
        for (int i = 0; i < kSampleVectors * kVector; ++i) visit(scores[i]);
    }
};

// Scores between which bins of equal width are laid. A few outliers or a long tail must not widen
// them, for then most scores would share a bin. So low and high are order statistics that no single
// score decides.
struct Spread {
    // The least of the threads' maxima: of independent scores the median or lower. Or the least
    // score.
    float low;
    // The least of the maxima of groups of warps. Some of the `upper` largest scores are above it.
    float high;
    float top;  // the greatest score
};

__device__ __forceinline__ Spread spread_of_sample(Shared& shared, const SampleScores& sample,
                                                   bool least_of_all, int upper) {
    const float infinity = __uint_as_float(0x7f800000u);
    float most = -infinity, least = infinity;
    sample.for_each([&](float score) { most = fmaxf(most, score); });  // ignores NaN
    if (least_of_all) sample.for_each([&](float score) { least = fminf(least, score); });
    const uint32 none = 0xffffffffu;  // for a thread that has no numbers: never the least
    const uint32 key = most == -infinity ? none : ordered_key(most);
    const uint32 low_key = !least_of_all || key == none ? key : ordered_key(least);
    const uint32 low = __reduce_min_sync(kFullWarp, low_key);
    const uint32 greatest = __reduce_max_sync(kFullWarp, key == none ? 0 : key);
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) shared.ranges[warp_of_row()] = {low, greatest};
    sync_row();
    const KeyRange found = lane < kWarps ? shared.ranges[lane] : KeyRange{};
    // If each group of warps has one of the `upper` largest scores, the least of the groups' maxima
    // is one of these too. With at most 2 / 15 upper groups that nearly always holds (4 groups,
    // upper = 30: it fails in 0.07 % of all cases).
    uint32 high = found.high;
    for (int warps = 1; warps < kWarps && 15 * kWarps > 2 * warps * upper; warps *= 2) {
        high = max(high, __shfl_xor_sync(kFullWarp, high, warps));
    }
    high = __reduce_min_sync(kFullWarp, high ? high : none);
    return {score_of(__reduce_min_sync(kFullWarp, found.low)), score_of(high),
            score_of(__reduce_max_sync(kFullWarp, found.high))};
}

struct Guess {
    float limit;    // somewhat more than the wanted columns should reach it; -inf: not known
    float highest;  // fewer than the wanted columns should reach it
    int plateau;    // scores of the sample that equal the limit; 0 if it is not known to be a score
};

// Searches the bin found for the score of rank shared.needed, until at most `crowd` scores share
// its bin. Not search_range: a guess needs no exact score, but a second rank (`upper`) at the same
// time.
template <class BinOf>
__device__ __forceinline__ void look_closer(Shared& shared, const SampleScores& sample,
                                            const BinOf& bin_of, int upper, uint32 crowd,
                                            Guess& guess) {
    uint32 needed = shared.needed, inside = shared.inside;
    KeyRange range = range_of_bin(shared, sample, bin_of, shared.bin);
    if (range.low <= kZeroKey && kZeroKey <= range.high) {  // many zeros are usual: found at once
        const uint32 bin = shared.bin;
        uint32 own = 0, total;  // positive in the low half, zeros in the high half
        sample.for_each([&](float score) {
            if (bin_of(score) == bin) own += score > 0.0f ? 1u : score == 0.0f ? 1u << 16 : 0u;
        });
        int turn = 1;  // find_bin begins with the other turn
        sum_of_warps(shared, turn, __reduce_add_sync(kFullWarp, own), total);
        const uint32 positive = total & 0xffffu, zeros = total >> 16;
        if (positive < needed && needed <= positive + zeros) {
            range = {kZeroKey, kZeroKey};
            inside = zeros;
        }
    }
    while (range.low < range.high) {
        const ByBits by_bits(range);
        find_bin(shared, needed, sample, by_bits, max(upper, 0));
        const uint32 bin = shared.bin, least = range.low + (bin << by_bits.shift);
        const uint32 upper_end = ((shared.upper_bin + 1) << by_bits.shift) - 1;
        if (upper > 0) {
            guess.highest = score_of(range.low + min(upper_end, range.high - range.low));
        }
        upper = shared.upper_bin == bin ? upper - int(needed - shared.needed) : 0;
        needed = shared.needed;
        inside = shared.inside;
        if (inside <= crowd) {
            range.low = least;
            break;
        }
        range = range_of_bin(shared, sample, by_bits, bin);
    }
    guess.limit = score_of(max(range.low, kMinusInfinityKey));
    guess.plateau = range.low > kNaNKey && range.low == range.high ? inside : 0;
}

// The same as a function, where registers suffice for a call: rarely needed, so the code of usual
// rows is together. One row of 131072 columns takes 2 % less on an H200.
constexpr bool kApart = kCluster > 1 && kOwnScores;
__device__ __noinline__ Guess look_closer_apart(Shared& shared, SampleScores sample, ByScore bin_of,
                                                int upper, uint32 crowd, Guess guess) {
    look_closer(shared, sample, bin_of, upper, crowd, guess);
    return guess;
}

// Takes a sample of the row and estimates its `wanted`-th score. Calls meanwhile() once, while the
// sample is on its way.
template <class Meanwhile>
__device__ __forceinline__ Guess guess_from_sample(Shared& shared, const float* scores, int length,
                                                   float wanted, const Meanwhile& meanwhile) {
    Guess guess{__uint_as_float(kMinusInfinity), __uint_as_float(kMinusInfinity), 0};
    const float expected = __fdividef(wanted * kSamples, float(length));  // rank in the sample
    const float margin = 4.0f * sqrtf(expected) + 2.0f;  // four standard deviations
    const int rank = int(expected + margin), upper = max(int(expected - margin), 1);
    if (length <= kTopK + kTopK / 2 || length <= kSamples || rank >= kSamples) {
        meanwhile();
        return guess;
    }
    // Each part of the row gives kAdjacent vectors, from a place that differs from part to part, so
    // that scores with some period are sampled fairly. The parts of a warp are spread over the row,
    // so that all warps see scores of the same kind.
    constexpr uint32 kParts = kSamples / (kVector * kAdjacent);
    const uint32 places = length / (kVector * kAdjacent);
    SampleScores sample;
#pragma unroll
    for (int j = 0; j < kSampleVectors; ++j) {
        const uint32 number = threadIdx.x % kWarpSize + j * kWarpSize;
        const uint32 part = number / kAdjacent * kWarps + warp_of_row();
        const uint32 first = uint32(uint64(part) * places / kParts);
        const uint32 place = first + __umulhi(part * 0x9e3779b1u, places / kParts);
        const uint32 vector = place * kAdjacent + number % kAdjacent;
        const float4 four = load_columns(scores, int(vector) * kVector, length);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sample.scores[j * kVector + e] = (&four.x)[e];
    }
    meanwhile();
    const Spread spread = spread_of_sample(shared, sample, rank > kSamples / 4, upper);
    const ByScore by_score(spread.low, spread.high);
    find_bin(shared, rank, sample, by_score, upper);
    const uint32 bin = shared.bin, upper_bin = shared.upper_bin;
    guess.highest = upper_bin == kBins - 1 ? spread.top : by_score.edge(upper_bin + 1);
    // If the bin holds at most a third of the rank, its edge is close enough.
    if (const uint32 crowd = max(rank / 3, 8); shared.inside > crowd) {
        const int above = rank - int(shared.needed);
        const int more = upper_bin == bin ? upper - above : 0;
        if (kApart) guess = look_closer_apart(shared, sample, by_score, more, crowd, guess);
        else look_closer(shared, sample, by_score, more, crowd, guess);
    } else if (bin > 0) {  // bin 0 has no lower edge
        guess.limit = by_score.edge(bin);
    }
    return guess;
}
