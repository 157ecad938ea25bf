// How the kTopK-th score of a row is found: scores are counted in bins that rise with them, first by score and then by
// the bits of their keys, until few enough are left to be ranked one by one.
#pragma once
#include "common.cuh"

constexpr int kDigit = 10;  // bits that tell bins apart
constexpr int kBins = 1 << kDigit;
constexpr uint32 kNoBin = kBins;
constexpr int kFew = 256;  // keys that are ranked by comparing each with each

__device__ __forceinline__ float score_of(uint32 key) {
    return __uint_as_float(key == kNaNKey ? kQuietNaN : key ^ (~uint32(int(key) >> 31) | 0x80000000u));
}

// The least score above that of a key, as a limit; above infinity a NaN, which no score reaches.
__device__ __forceinline__ float limit_above(uint32 key) {
    return key <= kNaNKey ? __uint_as_float(kMinusInfinity) : score_of(key + 1);
}

// Keys in some range: the least and the greatest.
struct Range {
    uint32 low = 0xffffffffu, high = 0;
    __device__ __forceinline__ void add(uint32 key) {
        low = min(low, key);
        high = max(high, key);
    }
};

// Bins of equal width from a low score to a high one, which spreads usual scores evenly; the first and the last take
// what lies beyond. A few instructions a score, none of them a conversion. Without a range of ordinary numbers all are
// in bin 0.
struct ByScore {
    static constexpr bool kTakesAll = true;  // every score has a bin
    static constexpr float kFirst = 8388608.0f;  // 2 ** 23: the last bits of the sums from here on are whole numbers
    float low, width, scale;
    __device__ __forceinline__ ByScore(float low, float high) : low(low), width(high - low) {
        scale = width > 0.0f ? __fdividef(1.0f, width) : 0.0f;  // only has to be the same in all threads
        if (!(scale < 1e37f)) scale = 0.0f;
    }
    // The bin as a float, from kFirst on. A NaN is below all numbers. The difference comes first: of scores that agree
    // in most of their bits a product would lose the others.
    __device__ __forceinline__ float bin(float score) const {
        return fmaf(__saturatef((score - low) * scale), float(kBins - 1), kFirst);
    }
    __device__ __forceinline__ uint32 operator()(float score) const {
        return __float_as_uint(bin(score)) - __float_as_uint(kFirst);
    }
    // Between a bin above 0 and the one below it.
    __device__ __forceinline__ float edge(uint32 bin) const {
        return fmaf((float(bin) - 0.5f) * (1.0f / (kBins - 1)), width, low);
    }
};

// Bins by what is left of the keys' bits in a range.
struct ByBits {
    static constexpr bool kTakesAll = false;
    Range range;
    int shift;
    __device__ __forceinline__ ByBits(const Range& range)
        : range(range), shift(max(kWarpSize - __clz(range.high - range.low) - kDigit, 0)) {}
    __device__ __forceinline__ uint32 operator()(float score) const {
        const uint32 key = ordered_key(score);
        return range.low <= key && key <= range.high ? key - range.low >> shift : kNoBin;
    }
};

// Ranks a few keys, one of each thread below `count`: shared.bin becomes that of the `needed`-th, and shared.needed of
// the shared.inside equal to it are needed. Barriers are the caller's.
template <class Shared>
__device__ __forceinline__ void rank_few(Shared& shared, const uint32* keys, int thread, uint32 count, uint32 needed) {
    if (thread >= count) return;
    const uint32 key = keys[thread];
    uint32 above = 0, equal = 0;
#pragma unroll 4
    for (uint32 i = 0; i < count; ++i) {
        above += keys[i] > key;
        equal += keys[i] == key;
    }
    if (above < needed && needed <= above + equal) {  // the same for all equal to this
        shared.bin = key;
        shared.needed = needed - above;
        shared.inside = equal;
    }
}
