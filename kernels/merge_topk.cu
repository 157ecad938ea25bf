// indices[t] = the best kTopK entries of row t of several lists, by the total order of
// docs/contract.md; in ascending position or (kByScore) in the total order, followed by -1.
// values[t] (if kValues) = the scores of these entries, then -inf.
//
// List r has kWidth entries of row t: positions listed_indices[r, t] and scores listed_scores[r,
// t], in any order. An entry with a negative position is padding. The positions of a row are
// distinct.
//
// One block per row. The rank of an entry is 64 bits: the key of its score, then the complement of
// its position. So ranks are distinct, and a greater rank is better.
//   1. All entries are read. The keys of the first kStaged stay in shared memory; those of the
//   others are read again in each step.
//   2. The kTopK-th rank is found: ranks are counted in bins of equal width between the least and
//   the greatest. In the bin that holds the kTopK-th, ranks are compared one by one if there are
//   few. Else they are counted again, between the least and the greatest rank of that bin.
//   3. Entries of at least that rank are collected: position and score in shared memory if kTopK is
//   at most kMaxCollected, else their numbers in the row of indices.
//   4. They are put in order. By position, a bit is set for each, and the bits before it give its
//   place. If the positions are too far apart for the bits, or by score, a bitonic network sorts.
// The order of collection depends on atomics. The result does not, because step 4 sorts distinct
// entries.
#include "bitonic_sort.cuh"
#include "common.cuh"
#include "ptx.cuh"
#include "residency.cuh"
#include "warp_scan.cuh"

static_assert(kTopK >= 1 && kTopK <= 65536, "indices per row");
static_assert(kWidth >= 1, "entries of a list");
static_assert(kValues == 0 || kValues == 1, "whether scores are written beside the indices");
static_assert(kByScore == 0 || kByScore == 1, "whether rows are in the total order");

struct Params {
    const int* listed_indices;   // [lists, rows, kWidth]
    const float* listed_scores;  // [lists, rows, kWidth]
    int* indices;                // [rows, kTopK]
    float* values;               // [rows, kTopK], if kValues
    int64 list_stride;           // elements from a list to the next: rows * kWidth
    int entries;                 // of a row: lists * kWidth
};

constexpr int kMaxCollected = 4096;
constexpr bool kCollects = kTopK <= kMaxCollected;
constexpr bool kCountsBits = kCollects && !kByScore;
constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kMaxCompared = 256;  // ranks that are compared pairwise
constexpr int kLoads = 8;          // entries that a thread loads at a time
static_assert(kBins % kThreads == 0, "each bin belongs to one thread");
static_assert(kMaxCompared <= kThreads, "each compared rank belongs to one thread");

__device__ __forceinline__ uint64 rank_of(uint32 key, uint32 position) {
    return uint64(key) << 32 | ~position;
}
constexpr uint64 kLowestRank = uint64(kNaNKey) << 32;  // every entry is above it, no padding is

struct Shared {
    uint64 collected[kCollects ? kTopK : 1];
    uint64 compared[kMaxCompared];  // ranks
    uint64 threshold;               // the kTopK-th rank
    uint64 low, high;               // the least and the greatest rank of a bin
    uint32 bins[kBins];             // all zero except while ranks are counted
    uint32 warp_totals[kWarpSize];
    uint32 low_key, high_key;  // of all entries
    uint32 valid;              // entries that are not padding
    uint32 bin, needed;        // the bin that holds the kTopK-th rank, and its place in the bin
    uint32 inside;             // ranks in the bin
    uint32 num_compared, num_above, num_equal;
    uint32 low_position, high_position;  // of the selected entries
    uint32 keys[kStaged];                // later the bits of the selected positions
};
static_assert(sizeof(Shared) == kSharedBytes, "_plan/merge.py computes it too");

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

    // Calls visit(entry, rank) for the thread's entries whose rank is in a range. kNoPosition: the
    // range consists of whole keys and a rank's low word may be anything, so no position is read.
    // The loads of kLoads entries are in flight together.
    template <bool kNoPosition, class Visit>
    __device__ __forceinline__ void for_each_in(uint64 low, uint64 high, const Visit& visit) const {
        const uint32 low_key = uint32(low >> 32), high_key = uint32(high >> 32);
        for (int base = threadIdx.x; base < entries; base += kThreads * kLoads) {
            uint64 ranks[kLoads];
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                const int entry = base + j * kThreads;
                const uint32 own = entry < entries ? key(entry) : kNotSelectable;
                const bool near = low_key <= own && own <= high_key;
                ranks[j] = rank_of(own, near && !kNoPosition ? position(entry) : 0);
            }
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                if (low <= ranks[j] && ranks[j] <= high) visit(base + j * kThreads, ranks[j]);
            }
        }
    }
};

// Reads all entries, keeps keys, and finds the range of the keys and how many entries there are.
__device__ __forceinline__ void stage(Shared& shared, const Row& row) {
    uint32 low = 0xffffffffu, high = kNotSelectable, valid = 0;
    for (int base = threadIdx.x; base < row.entries; base += kThreads * kLoads) {
        int positions[kLoads];
        float scores[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
            const int entry = base + j * kThreads;
            positions[j] = entry < row.entries ? row.position(entry) : -1;
            scores[j] = entry < row.entries ? row.score(entry) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
            const int entry = base + j * kThreads;
            const uint32 key = positions[j] < 0 ? kNotSelectable : ordered_key(scores[j]);
            if (entry < min(row.entries, kStaged)) shared.keys[entry] = key;
            if (key != kNotSelectable) {
                low = min(low, key);
                high = max(high, key);
                ++valid;
            }
        }
    }
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

// Counts the ranks of a range, in bins of 2 ** shift ranks, and finds the bin that holds the
// needed-th largest.
template <bool kNoPosition>
__device__ __forceinline__ void find_bin(Shared& shared, const Row& row, uint64 low, uint64 high,
                                         int shift, uint32 needed) {
    const uint32 bins = uint32(__cvta_generic_to_shared(shared.bins));
    row.for_each_in<kNoPosition>(low, high, [&](int, uint64 rank) {
        add_one_if(true, bins + sizeof(uint32) * uint32(rank - low >> shift));
    });
    __syncthreads();
    // Thread i has the i-th bins from the top, because ranks count from the greatest.
    const int top = kBins - 1 - threadIdx.x * kBinsPerThread;
    uint32 counts[kBinsPerThread], own = 0, total;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
        own += counts[i] = shared.bins[top - i];
        shared.bins[top - i] = 0;
    }
    uint32 above = block_exclusive_sum(own, shared.warp_totals, total);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
        if (above < needed && needed <= above + counts[i]) {
            shared.bin = top - i;
            shared.needed = needed - above;
            shared.inside = counts[i];
            shared.num_compared = 0;
            shared.low = ~0ull;
            shared.high = 0;
        }
        above += counts[i];
    }
    __syncthreads();
}

// The kTopK-th rank of more than kTopK entries; shared.needed entries equal to it are selected:
// one, unless positions are repeated, which is wrong input.
__device__ __forceinline__ uint64 find_threshold(Shared& shared, const Row& row) {
    uint64 low = rank_of(shared.low_key, ~0u), high = rank_of(shared.high_key, 0);
    uint32 needed = kTopK;
    for (bool first = true; low < high; first = false) {
        const int shift = max(64 - __clzll(high - low) - kBinBits, 0);
        // Only the first range begins and ends at whole keys. Usually its bins do too.
        if (first && shift >= 32) find_bin<true>(shared, row, low, high, shift, needed);
        else find_bin<false>(shared, row, low, high, shift, needed);
        needed = shared.needed;
        low += uint64(shared.bin) << shift;
        high = min(high, low + (1ull << shift) - 1);
        if (shared.inside <= kMaxCompared) {
            row.for_each_in<false>(low, high, [&](int, uint64 rank) {
                shared.compared[atomicAdd(&shared.num_compared, 1u)] = rank;
            });
            __syncthreads();
            if (threadIdx.x < shared.inside) {
                const uint64 own = shared.compared[threadIdx.x];
                uint32 above = 0, equal = 0;
#pragma unroll 4
                for (uint32 i = 0; i < shared.inside; ++i) {
                    above += shared.compared[i] > own;
                    equal += shared.compared[i] == own;
                }
                if (above < needed && needed <= above + equal) {  // equal ranks write the same
                    shared.threshold = own;
                    shared.needed = needed - above;
                }
            }
            __syncthreads();
            return shared.threshold;
        }
        // A bin with many ranks usually has equal scores. Then the next bits are of positions.
        uint64 least = ~0ull, greatest = 0;
        row.for_each_in<false>(low, high, [&](int, uint64 rank) {
            least = min(least, rank);
            greatest = max(greatest, rank);
        });
#pragma unroll
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            least = min(least, __shfl_xor_sync(kFullWarp, least, step));
            greatest = max(greatest, __shfl_xor_sync(kFullWarp, greatest, step));
        }
        if (threadIdx.x % kWarpSize == 0) {
            atomicMin(&shared.low, least);
            atomicMax(&shared.high, greatest);
        }
        __syncthreads();
        low = shared.low;
        high = shared.high;
    }
    return low;
}

// The selected entries in shared memory: the position, then the entry's number or, to sort by them,
// the bits of its score. `order` rises as rows do.
struct Collected {
    uint64* entries;
    const Row& row;

    __device__ __forceinline__ void put(int place, int entry, int position) const {
        entries[place] = uint64(position) << 32 | uint32(entry);
    }
    __device__ __forceinline__ uint32 second(int place) const { return uint32(entries[place]); }
    // All scores are read together, when all entries are known.
    __device__ __forceinline__ void prepare(int count) const {
        if (!kByScore) return;
#pragma unroll 4
        for (int place = threadIdx.x; place < count; place += kThreads) {
            put(place, __float_as_uint(row.score(second(place))), position(place));
        }
        __syncthreads();
    }
    __device__ __forceinline__ int position(int place) const { return int(entries[place] >> 32); }
    __device__ __forceinline__ float score(int place) const {
        return kByScore ? __uint_as_float(second(place)) : row.score(second(place));
    }
    __device__ __forceinline__ uint64 order(uint64 entry) const {
        if (!kByScore) return entry;
        return ~rank_of(ordered_key(__uint_as_float(uint32(entry))), uint32(entry >> 32));
    }
};

// The numbers of the selected entries, in the row of indices. They are sorted in place.
struct Numbers {
    int* entries;
    const Row& row;

    __device__ __forceinline__ void put(int place, int entry, int) const { entries[place] = entry; }
    __device__ __forceinline__ void prepare(int) const {}
    __device__ __forceinline__ int position(int place) const {
        return row.position(entries[place]);
    }
    __device__ __forceinline__ float score(int place) const { return row.score(entries[place]); }
    __device__ __forceinline__ uint64 order(int entry) const {
        const uint32 position = row.position(entry);
        return kByScore ? ~rank_of(ordered_key(row.score(entry)), position) : position;
    }
};

// Puts the collected entries in ascending position: a bit is set for each position, and an entry's
// place is the number of bits before its own. Returns false, and has changed no entry, if the
// positions are too far apart or repeated.
__device__ __forceinline__ bool order_by_bits(Shared& shared, int count) {
    constexpr int kOwn = (kTopK + kThreads - 1) / kThreads;  // entries of a thread
    const uint32 low = shared.low_position;
    if (count == 0 || shared.high_position - low >= 32u * kStaged) return false;
    const uint32 words = (shared.high_position - low) / 32 + 1;
    // Each thread counts the bits of adjacent words. It is an odd number of words, so that the
    // lanes of a warp read from different banks.
    const uint32 each = (words + kThreads - 1) / kThreads | 1, first = threadIdx.x * each;
    uint32* const bits = shared.keys;
    for (uint32 word = threadIdx.x; word < words; word += kThreads) bits[word] = 0;
    __syncthreads();
    uint64 own[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        const int i = threadIdx.x + j * kThreads;
        if (i < count) {
            own[j] = shared.collected[i];
            const uint32 bit = uint32(own[j] >> 32) - low;
            atomicOr(&bits[bit / 32], 1u << bit % 32);
        }
    }
    __syncthreads();
    uint32 set = 0, total;
    for (uint32 word = first; word < min(first + each, words); ++word) set += __popc(bits[word]);
    shared.bins[threadIdx.x] = block_exclusive_sum(set, shared.warp_totals, total);
    if (total != count) return false;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        if (threadIdx.x + j * kThreads < count) {
            const uint32 bit = uint32(own[j] >> 32) - low, thread = bit / 32 / each;
            uint32 place = shared.bins[thread] + __popc(bits[bit / 32] & (1u << bit % 32) - 1);
            for (uint32 word = thread * each; word < bit / 32; ++word) place += __popc(bits[word]);
            shared.collected[place] = own[j];
        }
    }
    __syncthreads();
    return true;
}

// The value of a counter before it is raised by one; lanes that are here together raise it at once.
__device__ __forceinline__ uint32 next_place(uint32& counter) {
    const uint32 lanes = __activemask(), lane = threadIdx.x % kWarpSize;
    const int leader = __ffs(lanes) - 1;
    uint32 first = 0;
    if (lane == leader) first = atomicAdd(&counter, __popc(lanes));
    return __shfl_sync(lanes, first, leader) + __popc(lanes & (1u << lane) - 1);
}

template <class Selected>
__device__ __forceinline__ void select(Shared& shared, const Row& row, const Selected& selected,
                                       int* indices, float* values) {
    const bool all = shared.valid <= kTopK;
    uint32 low = ~0u, high = 0;  // positions
    const uint64 threshold = all ? kLowestRank : find_threshold(shared, row);
    const uint32 ties = all ? 0 : shared.needed;
    const int count = all ? shared.valid : kTopK;
    row.for_each_in<false>(threshold, ~0ull, [&](int entry, uint64 rank) {
        const uint32 position = ~uint32(rank);
        low = min(low, position);
        high = max(high, position);
        if (rank > threshold) {
            selected.put(next_place(shared.num_above), entry, position);
        } else if (const uint32 tie = next_place(shared.num_equal); tie < ties) {
            selected.put(count - ties + tie, entry, position);
        }
    });
    if (kCountsBits) {
        low = __reduce_min_sync(kFullWarp, low);
        high = __reduce_max_sync(kFullWarp, high);
        if (threadIdx.x % kWarpSize == 0) {
            atomicMin(&shared.low_position, low);
            atomicMax(&shared.high_position, high);
        }
    }
    __syncthreads();
    selected.prepare(count);
    if (!kCountsBits || !order_by_bits(shared, count)) sort(selected, count);
    for (int place = threadIdx.x; place < kTopK; place += kThreads) {
        const bool filled = place < count;
        if (kValues)
            values[place] = filled ? selected.score(place) : __uint_as_float(kMinusInfinity);
        indices[place] = filled ? selected.position(place) : -1;  // the last use of the number
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, resident_blocks(kSharedBytes, 2))
    merge_topk(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64 listed = int64(blockIdx.x) * kWidth, written = int64(blockIdx.x) * kTopK;
    const Row row{p.listed_indices + listed, p.listed_scores + listed, p.list_stride, shared.keys,
                  p.entries};
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
    if (threadIdx.x == 0) {
        shared.low_key = 0xffffffffu;
        shared.high_key = kNotSelectable;
        shared.valid = shared.num_above = shared.num_equal = 0;
        shared.low_position = ~0u;
        shared.high_position = 0;
    }
    __syncthreads();
    stage(shared, row);
    int* const indices = p.indices + written;
    float* const values = kValues ? p.values + written : nullptr;
    if constexpr (kCollects) select(shared, row, Collected{shared.collected, row}, indices, values);
    else select(shared, row, Numbers{indices, row}, indices, values);
}
