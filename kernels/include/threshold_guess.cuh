// A sample of a row gives two scores: one that somewhat more than the wanted columns should reach, with which
// topk_filter.cu begins as its limit, and one that fewer columns should reach. The time of a selection depends on them,
// its result does not.
#pragma once
#include "histogram.cuh"
#include "candidates.cuh"
#include "common.cuh"

constexpr int kSampleVectors = kThreads < 1024 ? 2 : 1;  // of a thread
constexpr int kSamples = kThreads * kVector * kSampleVectors;
// Vectors of a sample side by side. Of neighbours that are alike one tells as much as two, so with single vectors fewer
// guesses are bad, and one bad guess makes all rows wait that are selected from at the same time. But two are what
// memory gives at a time: single ones take 20 % longer where a block has rows in turn, 3 % with one row
// (docs/design.md#decisions).
constexpr bool kInTurn = kCluster == 1 && kThreads < 1024;
constexpr int kTogether = kInTurn || kCluster == 8 ? 2 : 1;

struct SampleScores {
    float scores[kSampleVectors * kVector];
    template <class What>
    __device__ __forceinline__ void for_each(const What& what) const {
#pragma unroll
        for (int i = 0; i < kSampleVectors * kVector; ++i) what(scores[i]);
    }
};

// Four columns side by side, of which those from `length` on do not count. Our own rows hold whole vectors.
__device__ __forceinline__ float4 load_columns(const float* row, int column, int length) {
    if (kOwnScores) return column < length ? *reinterpret_cast<const float4*>(row + column) : float4{};
    float4 found{};
    if (column < length) found.x = row[column];
    if (column + 1 < length) found.y = row[column + 1];
    if (column + 2 < length) found.z = row[column + 2];
    if (column + 3 < length) found.w = row[column + 3];
    return found;
}

// Scores of a sample that bins of equal width are laid between. Far outliers and long tails must not widen them, for
// then most scores would share a bin; so they are order statistics that no single score decides.
struct Spread {
    float low;   // the least of the threads' greatest: of independent scores the median or lower; or the least of all
    float high;  // the least of the greatest of some warps together: a score that some of `upper` should be above
    float top;   // the greatest of all
};

__device__ __forceinline__ Spread spread_of_sample(Shared& shared, const SampleScores& sample, bool least_of_all,
                                                   int upper) {
    const float infinity = __uint_as_float(0x7f800000u);
    float most = -infinity, least = infinity;
    sample.for_each([&](float score) { most = fmaxf(most, score); });  // ignores NaN
    if (least_of_all) sample.for_each([&](float score) { least = fminf(least, score); });
    const uint32 none = 0xffffffffu;  // of a thread that has no numbers: never the least
    const uint32 key = most == -infinity ? none : ordered_key(most);
    const uint32 low = __reduce_min_sync(kFullWarp, !least_of_all || key == none ? key : ordered_key(least));
    const uint32 greatest = __reduce_max_sync(kFullWarp, key == none ? 0 : key);
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) shared.ranges[thread_of_row() / kWarpSize] = {low, greatest};
    sync_row();
    const Range found = lane < kWarps ? shared.ranges[lane] : Range{};
    // Each group of warps should have one of the `upper` greatest scores: then the least of the groups' greatest is one
    // of these. With at most 2 / 15 upper groups that nearly always holds (4 groups, upper = 30: it fails in 0.0007).
    uint32 high = found.high;
    for (int warps = 1; warps < kWarps && 15 * kWarps > 2 * warps * upper; warps *= 2) {
        high = max(high, __shfl_xor_sync(kFullWarp, high, warps));
    }
    high = __reduce_min_sync(kFullWarp, high ? high : none);
    return {score_of(__reduce_min_sync(kFullWarp, found.low)), score_of(high),
            score_of(__reduce_max_sync(kFullWarp, found.high))};
}

// The result of a sample.
struct Guess {
    float limit;    // a score that somewhat more than the wanted columns should reach; minus infinity: not known
    float highest;  // a score that fewer than the wanted columns should reach
    int plateau;    // scores of the sample that equal the limit, if it was found to be one of them
};

// Looks for a score of the sample among those in one bin, until there are not more than `crowd` beside it.
template <class BinOf>
__device__ __forceinline__ void look_closer(Shared& shared, const SampleScores& sample, const BinOf& bin_of, int upper,
                                            uint32 crowd, Guess& guess) {
    uint32 needed = shared.needed, inside = shared.inside;
    Range range = range_of_bin(shared, sample, bin_of, shared.bin);
    if (range.low <= kZeroKey && kZeroKey <= range.high) {  // zeros are normal input, and are told from others at once
        const uint32 bin = shared.bin;
        uint32 own = 0, total;  // positive in the low half, zeros in the high half
        sample.for_each([&](float score) {
            if (bin_of(score) == bin) own += score > 0.0f ? 1u : score == 0.0f ? 1u << 16 : 0u;
        });
        int turn = 1;  // what follows begins with the other
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
        const uint32 width = min(((shared.upper_bin + 1) << by_bits.shift) - 1, range.high - range.low);
        if (upper > 0) guess.highest = score_of(range.low + width);
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

// Takes a sample of the row and estimates its `wanted`-th score.
__device__ __forceinline__ Guess guess_from_sample(Shared& shared, const float* row, int length, float wanted) {
    Guess guess{__uint_as_float(kMinusInfinity), __uint_as_float(kMinusInfinity), 0};
    const float share = __fdividef(wanted * kSamples, float(length));
    const float margin = 4.0f * sqrtf(share) + 2.0f;  // four standard deviations
    const int rank = int(share + margin), upper = max(int(share - margin), 1);
    if (length <= kTopK + kTopK / 2 || length <= kSamples || rank >= kSamples) return guess;
    // Every part of the row gives kTogether vectors, from a place in it that differs from part to part: columns that
    // repeat with some period are met as often as they are there. A warp's are spread over the row, so that each warp
    // sees scores of the same kind.
    constexpr uint32 kParts = kSamples / (kVector * kTogether);
    const uint32 places = length / (kVector * kTogether);
    SampleScores sample;
#pragma unroll
    for (int j = 0; j < kSampleVectors; ++j) {
        const uint32 number = threadIdx.x % kWarpSize + j * kWarpSize;
        const uint32 part = number / kTogether * kWarps + thread_of_row() / kWarpSize;
        const uint32 place = uint32(uint64(part) * places / kParts) + __umulhi(part * 0x9e3779b1u, places / kParts);
        const uint32 vector = place * kTogether + number % kTogether;
        const float4 four = load_columns(row, int(vector) * kVector, length);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sample.scores[j * kVector + e] = (&four.x)[e];
    }
    const Spread spread = spread_of_sample(shared, sample, rank > kSamples / 4, upper);
    const ByScore by_score(spread.low, spread.high);
    find_bin(shared, rank, sample, by_score, upper);
    const uint32 bin = shared.bin, upper_bin = shared.upper_bin;
    guess.highest = upper_bin == kBins - 1 ? spread.top : by_score.edge(upper_bin + 1);
    // If the bin holds at most a third of the rank, its edge is close enough.
    if (const uint32 crowd = max(rank / 3, 8); shared.inside > crowd) {
        const int above = rank - int(shared.needed);
        look_closer(shared, sample, by_score, upper_bin == bin ? upper - above : 0, crowd, guess);
    } else if (bin > 0) {  // below the first bin anything may be
        guess.limit = by_score.edge(bin);
    }
    return guess;
}
