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
//   1. A sample of the row gives a limit: a rank that slightly more than kTopK entries should reach
//   (merge_candidates.cuh). If shared memory has room for all entries, kSampleRank is 0 and every
//   entry reaches the limit.
//   2. The entries that reach the limit are the candidates. They are collected in shared memory. If
//   there are at least kTopK candidates, the best kTopK entries are among them. The kTopK-th rank
//   is found (rank_search.cuh), and the candidates of at least that rank are selected.
//   3. The selected entries are put in order. By position, a bit is set for each entry, and the
//   bits before it give its place. If the positions are too far apart for the bits, or by score, a
//   bitonic network sorts.
// If the candidates are fewer than kTopK or more than kMaxCandidates, or kMaxCandidates is 0, the
// kTopK-th rank is searched among all entries: the keys of the first kStaged entries stay in shared
// memory, and the other keys are read again in each step. Entries of at least that rank are
// collected: position and score in shared memory if kTopK is at most kMaxCollected, else the number
// of each entry in the row of indices.
//
// The order of collection depends on atomics. The result does not, because step 3 sorts distinct
// entries.
#include "bitonic_sort.cuh"
#include "common.cuh"
#include "merge_candidates.cuh"
#include "merge_row.cuh"
#include "rank_search.cuh"
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

constexpr bool kAlwaysCandidates = kMaxCandidates > 0 && kSampleRank == 0;
static_assert(kMaxCandidates == 0 || kCollects, "candidates are ordered in shared memory");

// Where the results of a row are written.
struct Output {
    int* indices;
    float* values;

    __device__ __forceinline__ void write(int place, int position, float score) const {
        if (kValues) values[place] = score;
        indices[place] = position;
    }
    __device__ __forceinline__ void pad(int count) const {
        for (int place = count + threadIdx.x; place < kTopK; place += kThreads) {
            write(place, -1, __uint_as_float(kMinusInfinity));
        }
    }
};

// ---- order of entries in shared memory

// What is sorted of a selected entry: the position alone, if its score is not needed.
template <bool needs_score>
struct ResultOf {
    using Type = uint64;
};
template <>
struct ResultOf<false> {
    using Type = uint32;
};
using Result = ResultOf<kNeedsScores>::Type;

__device__ __forceinline__ Result result_of(uint64 entry) {
    return kNeedsScores ? entry : entry >> 32;
}

constexpr int kBitWords = kStaged - kResultWords;
constexpr uint32 kWindow = 32u * kBitWords;  // positions that have a bit at a time
constexpr uint32 kMaxWindows = 16;           // with more windows, a network sorts faster

struct Results {
    Result* entries;

    __device__ __forceinline__ uint64 order(Result result) const {
        return kByScore ? ~rank_of(result) : result;
    }
};

// The entries among the first `listed` in shared memory whose rank is at least the threshold. They
// are exactly the best ones, unless positions are repeated, which is wrong input: then they can be
// more.
struct Selected {
    const uint64* entries;
    int listed;
    uint64 threshold;

    template <class Visit>
    __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll 4
        for (int i = threadIdx.x; i < listed; i += kThreads) {
            const uint64 entry = entries[i];
            if (rank_of(entry) >= threshold) visit(entry);
        }
    }
};

// Puts the selected entries in ascending position: a bit is set for each position, and an entry's
// place is the number of bits before its own. Returns false if the positions are too far apart or
// if `count` positions are not distinct.
__device__ __forceinline__ bool order_by_bits(Shared& shared, const Selected& selected,
                                              const Results& results, uint32 count) {
    uint32 low = ~0u, high = 0;
    selected.for_each([&](uint64 entry) {
        low = min(low, uint32(entry >> 32));
        high = max(high, uint32(entry >> 32));
    });
    low = __reduce_min_sync(kFullWarp, low);
    high = __reduce_max_sync(kFullWarp, high);
    if (threadIdx.x % kWarpSize == 0) {
        atomicMin(&shared.low_position, low);
        atomicMax(&shared.high_position, high);
    }
    __syncthreads();
    low = shared.low_position;
    high = shared.high_position;
    if (count == 0 || (high - low) / kWindow >= kMaxWindows) return false;
    uint32* const bits = shared.words + kResultWords;
    for (uint32 before = 0;; low += kWindow) {
        // Each bin has the number of bits in adjacent words. It is an odd number of words, so that
        // the lanes of a warp read from different banks.
        const uint32 words = min((high - low) / 32 + 1, uint32(kBitWords));
        const uint32 each = (words + kBins - 1) / kBins | 1;
        for (uint32 word = threadIdx.x; word < words; word += kThreads) bits[word] = 0;
        __syncthreads();
        selected.for_each([&](uint64 entry) {
            const uint32 bit = uint32(entry >> 32) - low;
            if (bit < kWindow) atomicOr(&bits[bit / 32], 1u << bit % 32);
        });
        __syncthreads();
        for (uint32 bin = threadIdx.x; bin < kBins; bin += kThreads) {
            uint32 set = 0;
            for (uint32 word = bin * each; word < min((bin + 1) * each, words); ++word) {
                set += __popc(bits[word]);
            }
            shared.bins[bin] = set;
        }
        __syncthreads();
        uint32 counts[kBinsPerThread], own = 0, total;
        uint32* const bins = shared.bins + threadIdx.x * kBinsPerThread;
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) own += counts[i] = bins[i];
        uint32 place = before + block_exclusive_sum(own, shared.warp_totals, total);
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) {
            bins[i] = place;
            place += counts[i];
        }
        __syncthreads();
        selected.for_each([&](uint64 entry) {
            const uint32 bit = uint32(entry >> 32) - low;
            if (bit >= kWindow) return;
            const uint32 bin = bit / 32 / each;
            uint32 place = shared.bins[bin] + __popc(bits[bit / 32] & (1u << bit % 32) - 1);
            for (uint32 word = bin * each; word < bit / 32; ++word) place += __popc(bits[word]);
            results.entries[place] = result_of(entry);
        });
        __syncthreads();
        before += total;
        if (high - low < kWindow) return before == count;
    }
}

// The value of a counter before this thread raises it by one. Lanes of a warp that call together
// raise it with one atomic operation.
__device__ __forceinline__ uint32 next_place(uint32& counter) {
    const uint32 lanes = __activemask(), lane = threadIdx.x % kWarpSize;
    const int leader = __ffs(lanes) - 1;
    uint32 first = 0;
    if (lane == leader) first = atomicAdd(&counter, __popc(lanes));
    return __shfl_sync(lanes, first, leader) + __popc(lanes & (1u << lane) - 1);
}

__device__ __forceinline__ void write_in_order(Shared& shared, const Selected& selected, int count,
                                               const Output& output) {
    const Results results{reinterpret_cast<Result*>(shared.words)};
    if (kByScore || !order_by_bits(shared, selected, results, count)) {
        selected.for_each([&](uint64 entry) {
            const uint32 place = next_place(shared.num_results);
            if (place < count) results.entries[place] = result_of(entry);
        });
        __syncthreads();
        sort(results, count);
    }
    for (int place = threadIdx.x; place < count; place += kThreads) {
        const Result result = results.entries[place];
        if constexpr (kNeedsScores) output.write(place, position_of(result), score_of(result));
        else output.write(place, result, 0.0f);
    }
    output.pad(count);
}

// ---- selection from all entries

// Reads all entries, stages keys in shared memory, and finds the range of the keys and the number
// of entries that are not padding.
__device__ __forceinline__ void stage(Shared& shared, const Row& row) {
    constexpr int kLoads = Row::kLoads;
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
            if (entry < min(row.entries, kStaged)) shared.words[entry] = key;
            if (key != kNotSelectable) {
                low = min(low, key);
                high = max(high, key);
                ++valid;
            }
        }
    }
    add_keys(shared, low, high, valid);
}

// The selected entries in shared memory: the position, then first the entry's number, later its
// score.
struct Collected {
    Shared& shared;
    const Row& row;

    __device__ __forceinline__ void put(int place, int entry, int position) const {
        shared.entries[place] = uint64(position) << 32 | uint32(entry);
    }
    __device__ __forceinline__ void write(int count, const Output& output) const {
        // All scores are read together, when all entries are known.
#pragma unroll 4
        for (int place = threadIdx.x; kNeedsScores && place < count; place += kThreads) {
            const uint64 entry = shared.entries[place];
            shared.entries[place] = make_entry(position_of(entry), row.score(uint32(entry)));
        }
        __syncthreads();
        write_in_order(shared, {shared.entries, count, 0}, count, output);
    }
};

// The numbers of the selected entries, in the row of indices. They are sorted in place.
struct Numbers {
    int* entries;
    const Row& row;

    __device__ __forceinline__ void put(int place, int entry, int) const { entries[place] = entry; }
    __device__ __forceinline__ uint64 order(int entry) const {
        const uint32 position = row.position(entry);
        return kByScore ? ~rank_of(ordered_key(row.score(entry)), position) : position;
    }
    __device__ __forceinline__ void write(int count, const Output& output) const {
        sort(*this, count);
        for (int place = threadIdx.x; place < count; place += kThreads) {
            const int entry = entries[place];
            output.write(place, row.position(entry), row.score(entry));
        }
        output.pad(count);
    }
};

template <class Collector>
__device__ __forceinline__ void select(Shared& shared, const Row& row, const Collector& collector,
                                       const Output& output) {
    stage(shared, row);
    const bool all = shared.valid <= kTopK;
    RankRange range{rank_of(shared.low_key, ~0u), rank_of(shared.high_key, 0), kTopK};
    const uint64 threshold = all ? kLowestRank : find_threshold(shared, row, range);
    const uint32 ties = all ? 0 : shared.needed;
    const int count = all ? shared.valid : kTopK;
    row.for_each_in<false>(threshold, ~0ull, [&](int entry, uint64 rank) {
        const uint32 position = ~uint32(rank);
        if (rank > threshold) {
            collector.put(next_place(shared.num_above), entry, position);
        } else if (const uint32 tie = next_place(shared.num_equal); tie < ties) {
            collector.put(count - ties + tie, entry, position);
        }
    });
    __syncthreads();
    collector.write(count, output);
}

__device__ __forceinline__ void begin_keys(Shared& shared) {
    if (threadIdx.x == 0) {
        shared.low_key = 0xffffffffu;
        shared.high_key = kNotSelectable;
        shared.valid = 0;
    }
}

// Selects from the candidates. Returns false, and has written nothing, if they are too many or too
// few.
__device__ __forceinline__ bool select_candidates(Shared& shared, const Row& row,
                                                  const Output& output) {
    const uint64 limit = kSampleRank > 0 ? guess_limit(shared, row) : kLowestRank;
    collect_candidates(shared, row, Limit(limit));
    const int found = shared.num_candidates;
    if (!kAlwaysCandidates) {
        const bool enough = limit == kLowestRank || found >= kTopK;
        if (!enough || found > kMaxCandidates) return false;
    }
    uint64 threshold = 0;
    if (found > kTopK) {
        RankRange range{limit, rank_of(shared.highest_key, 0), kTopK};
        threshold = find_threshold(shared, Candidates{shared.entries, found}, range);
    }
    write_in_order(shared, {shared.entries, found, threshold}, min(found, kTopK), output);
    return true;
}

extern "C" __global__ void __launch_bounds__(kThreads, resident_blocks(kSharedBytes, kBlocks))
    merge_topk(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64 listed = int64(blockIdx.x) * kWidth, written = int64(blockIdx.x) * kTopK;
    const Row row{p.listed_indices + listed, p.listed_scores + listed, p.list_stride, shared.words,
                  p.entries};
    const Output output{p.indices + written, kValues ? p.values + written : nullptr};
    clear_bins(shared);
    begin_keys(shared);
    if (threadIdx.x == 0) {
        shared.num_above = shared.num_equal = shared.num_results = 0;
        shared.num_candidates = 0;
        shared.highest_key = 0;
        shared.low_position = ~0u;
        shared.high_position = 0;
    }
    __syncthreads();
    if constexpr (kMaxCandidates > 0) {
        if (select_candidates(shared, row, output)) return;
        begin_keys(shared);
        __syncthreads();
    }
    if constexpr (!kAlwaysCandidates) {
        if constexpr (kCollects) select(shared, row, Collected{shared, row}, output);
        else select(shared, row, Numbers{output.indices, row}, output);
    }
}
