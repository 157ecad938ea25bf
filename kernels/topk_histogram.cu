// indices[r] = the min(kTopK, selectable) first columns of row r in the total order of the contract,
// in ascending column order, then -1; values[r] (kValues) the scores beside them, then -inf.
//
// scores float32, of which row r may use the columns below lengths[r]; rows begin row_stride elements after one
// another, or where token_rows say. A launch selects from rows [first_row, end_row).
//
// A cluster of kCluster blocks takes a row. Each warp has a run of its columns, read once and kept in shared memory as
// far as kStaged columns of a block go; what does not fit is read again for each step:
//   1. how many scores are in each of 1024 bins, laid between two order statistics of a sample of the row;
//   2. in the bin that holds the kTopK-th, if few scores are in it, they are ranked one by one, else their keys are
//      counted by their bits in the same way, which ends whatever the scores;
//   3. how many columns above that score, and equal to it, come before those of each warp: so it knows where to write;
//   4. the columns, in order.
// Every count is exact and none depends on the order of additions, so neither does anything written.
//
// kOwnScores = 1: scores are ours: they have token_rows, rows begin on 16 bytes, and kMissing marks columns that may not be
// selected.
#include "histogram.cuh"
#include "cluster.cuh"
#include "common.cuh"
#include "ptx.cuh"

static_assert(kTopK >= 1 && kTopK <= 65536, "indices per row");
static_assert(kThreads % kWarpSize == 0 && kThreads >= kFew && kThreads <= kBins, "a thread for a key or some bins");
static_assert(kCluster >= 1 && kCluster <= 8, "blocks of a cluster: what every GPU with clusters takes");
static_assert(kValues == 0 || kValues == 1, "whether scores are written beside the indices");
static_assert(kOwnScores == 0 || kOwnScores == 1, "whether kMissing marks columns or is a NaN like any other");
static_assert(kStaged >= kThreads, "room for every warp");

constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBinsPerThread = kBins / kThreads;
static_assert(kBins % kThreads == 0, "every bin has one owner");
constexpr int kVector = 4;                           // columns side by side in a thread
constexpr int kVectorColumns = kVector * kWarpSize;  // of a warp
constexpr int kStagedVectors = kStaged / (kVectorColumns * kWarps);  // of a warp
static_assert(kStaged % (kVectorColumns * kWarps) == 0, "whole vectors of every warp");
constexpr int kAlone = 8192;  // columns that one block is done with before a cluster has agreed
constexpr int kTogether = 4;  // vectors at a time, counted in a byte each
static_assert(kVectorColumns < 256 && kTogether == 4, "bytes of a word");

// Keys, and the number of the warp in the cluster that has each of them.
struct Few {
    uint32 keys[kFew];
    uint32 warps[kFew];
};

struct Shared {
    alignas(16) float scores[kStaged];
    uint32 histogram[kBins];
    Few few;               // of this block in the bin
    Few all_few;           // of the cluster
    uint32 above[kWarps];  // columns of each warp above the threshold
    uint32 equal[kWarps];  // and equal to it
    uint32 totals[kWarps];
    uint32 low, high, count;
    uint32 bin, needed, inside;
};
static_assert(sizeof(Shared) <= kSharedBytes, "shared memory");
// Blocks of a multiprocessor.
constexpr int kFitting = kMultiprocessorBytes / (kSharedBytes + 1024);
constexpr int kResident = kFitting < 1 ? 1 : kFitting < 1024 / kThreads ? kFitting : 1024 / kThreads;

struct Row {
    const float* scores;
    int length;
    int blocks;  // at work on it
    int* indices;
    float* values;

    // A score of those below `length`: a NaN that is not kMissing is kQuietNaN.
    __device__ __forceinline__ float score(int column) const {
        const float found = scores[column];
        return kOwnScores || found == found ? found : __uint_as_float(kQuietNaN);
    }

    // Four columns side by side, kMissing from `length` on.
    __device__ __forceinline__ float4 load(int column) const {
        const float hole = __uint_as_float(kMissing);
        if (kOwnScores && column + kVector <= length) return *reinterpret_cast<const float4*>(scores + column);
        float4 found{hole, hole, hole, hole};
        if (column < length) found.x = score(column);
        if (column + 1 < length) found.y = score(column + 1);
        if (column + 2 < length) found.z = score(column + 2);
        if (column + 3 < length) found.w = score(column + 3);
        return found;
    }
};

// The columns of a warp: so many vectors, from the lane's first column on.
struct Run {
    const Row& row;
    float4* staged;  // the lane's
    int column;
    int vectors;

    __device__ __forceinline__ Run(Shared& shared, const Row& row) : row(row) {
        const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        const int all = (row.length + kVectorColumns - 1) / kVectorColumns;
        const int of_block = row.blocks == 1 ? all : (all + kCluster - 1) / kCluster;
        const int of_warp = (of_block + kWarps - 1) / kWarps;
        const int end = min(int(rank_in_cluster() + 1) * of_block, all);
        const int first = int(rank_in_cluster()) * of_block + warp * of_warp;
        vectors = min(max(end - first, 0), of_warp);
        column = first * kVectorColumns + lane * kVector;
        staged = reinterpret_cast<float4*>(shared.scores) + warp * (kStagedVectors * kWarpSize) + lane;
    }

    __device__ __forceinline__ float4 vector(int i) const {
        if (i < kStagedVectors) return staged[i * kWarpSize];
        return row.load(column + i * kVectorColumns);
    }

    template <class What>
    __device__ __forceinline__ void for_each(const What& what) const {
#pragma unroll 2
        for (int i = 0; i < min(vectors, kStagedVectors); ++i) {
            const float4 four = staged[i * kWarpSize];
#pragma unroll
            for (int e = 0; e < kVector; ++e) what((&four.x)[e]);
        }
#pragma unroll 1
        for (int i = kStagedVectors; i < vectors; ++i) {
            const float4 four = row.load(column + i * kVectorColumns);
#pragma unroll
            for (int e = 0; e < kVector; ++e) what((&four.x)[e]);
        }
    }

    // Keeps what there is room for: before all else.
    __device__ __forceinline__ void stage() const {
#pragma unroll 4
        for (int i = 0; i < min(vectors, kStagedVectors); ++i) {
            staged[i * kWarpSize] = row.load(column + i * kVectorColumns);
        }
    }
};

__device__ __forceinline__ bool is_hole(float score) { return __float_as_uint(score) == kMissing; }

// The range of all threads' ranges, of all blocks; low > high if all are empty.
__device__ __forceinline__ Range range_of_row(Shared& shared, int blocks, Range own) {
    if (threadIdx.x == 0) {
        shared.low = 0xffffffffu;
        shared.high = 0;
    }
    own = {__reduce_min_sync(kFullWarp, own.low), __reduce_max_sync(kFullWarp, own.high)};
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) {
        atomicMin(&shared.low, own.low);
        atomicMax(&shared.high, own.high);
    }
    sync_blocks(blocks);
    const uint32 rank = threadIdx.x % kWarpSize;
    const bool is_block = rank < blocks;
    return {__reduce_min_sync(kFullWarp, is_block ? load_from_block(shared.low, rank, blocks) : 0xffffffffu),
            __reduce_max_sync(kFullWarp, is_block ? load_from_block(shared.high, rank, blocks) : 0)};
}

// The thread's bins of a histogram, from the top down, so that sums run from large scores to small.
struct Bins {
    uint32 inside[kBinsPerThread] = {};
    uint32 above = 0;  // scores in bins above these
    uint32 total;

    // Of all blocks' histograms together. Holds a barrier.
    static __device__ __forceinline__ Bins count(Shared& shared, int blocks) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        Bins bins;
        uint32 own = 0;
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) {
            if (rank >= blocks) break;
#pragma unroll
            for (int i = 0; i < kBinsPerThread; ++i) {
                bins.inside[i] += load_from_block(shared.histogram[number(i)], rank, blocks);
            }
        }
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) own += bins.inside[i];
        const uint32 inclusive = inclusive_sum_of_lanes(own);
        if (lane == kWarpSize - 1) shared.totals[warp] = inclusive;
        __syncthreads();
        const uint32 warps = inclusive_sum_of_lanes(lane < kWarps ? shared.totals[lane] : 0);
        const uint32 before = __shfl_sync(kFullWarp, warps, max(warp - 1, 0));
        bins.above = (warp == 0 ? 0 : before) + inclusive - own;
        bins.total = __shfl_sync(kFullWarp, warps, kWarps - 1);
        return bins;
    }

    static __device__ __forceinline__ int number(int i) { return kBins - 1 - int(threadIdx.x) * kBinsPerThread - i; }

    // Calls found(bin, above, inside) in the one thread whose bin holds the `needed`-th largest, if there is one.
    template <class Found>
    __device__ __forceinline__ void find(uint32 needed, const Found& found) const {
        uint32 before = above;
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) {
            if (before < needed && needed <= before + inside[i]) found(number(i), before, inside[i]);
            before += inside[i];
        }
    }
};

__device__ __forceinline__ void clear_histogram(Shared& shared) {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) shared.histogram[i * kThreads + threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
}

// The bin that holds the `needed`-th largest: shared.bin, .needed of the .inside that are in it. Returns how many
// scores were counted; with fewer than `needed` nothing is found.
__device__ __forceinline__ uint32 find_bin(Shared& shared, int blocks, uint32 needed) {
    const Bins bins = Bins::count(shared, blocks);
    bins.find(needed, [&](int bin, uint32 above, uint32 inside) {
        shared.bin = bin;
        shared.needed = needed - above;
        shared.inside = inside;
    });
    __syncthreads();
    return bins.total;
}

// Of the scores in the bin.
__device__ __forceinline__ void add_to_few(Shared& shared, float score) {
    const uint32 place = atomicAdd(&shared.count, 1u);
    shared.few.keys[place] = ordered_key(score);
    shared.few.warps[place] = rank_in_cluster() * kWarps + threadIdx.x / kWarpSize;
}

// The cluster's few, which every block has found a part of.
__device__ __forceinline__ const Few& gather_few(Shared& shared, int blocks) {
    if (blocks == 1) return shared.few;
    const int lane = threadIdx.x % kWarpSize;
    const uint32 own = lane < blocks ? load_from_block(shared.count, lane, blocks) : 0;
    uint32 start = 0;
#pragma unroll
    for (int rank = 0; rank < kCluster; ++rank) {
        const uint32 count = __shfl_sync(kFullWarp, own, rank);
        if (threadIdx.x < count) {
            shared.all_few.keys[start + threadIdx.x] = load_from_block(shared.few.keys[threadIdx.x], rank, blocks);
            shared.all_few.warps[start + threadIdx.x] = load_from_block(shared.few.warps[threadIdx.x], rank, blocks);
        }
        start += count;
    }
    __syncthreads();
    return shared.all_few;
}

// Counts the cluster's scores by bin_of(score), which must not fall as scores rise (kNoBin: not counted), and finds the
// bin as above.
template <class BinOf>
__device__ __forceinline__ uint32 count_and_find_bin(Shared& shared, uint32 needed, const Run& run,
                                                     const BinOf& bin_of) {
    clear_histogram(shared);
    run.for_each([&](float score) {
        const uint32 bin = bin_of(score);
        if (!is_hole(score) && bin < kNoBin) atomicAdd(&shared.histogram[bin], 1u);
    });
    sync_blocks(run.row.blocks);
    return find_bin(shared, run.row.blocks, needed);
}

// The range of the keys in the bin found.
template <class BinOf>
__device__ __forceinline__ Range range_of_bin(Shared& shared, const Run& run, const BinOf& bin_of) {
    const uint32 bin = shared.bin;
    Range own;
    run.for_each([&](float score) {
        if (!is_hole(score) && bin_of(score) == bin) own.add(ordered_key(score));
    });
    return range_of_row(shared, run.row.blocks, own);
}

// What is taken: columns whose key is above this one, and of those equal to it the first `ties`, or all.
struct Threshold {
    uint32 key = kNotSelectable;
    uint32 ties = 0;
    bool all_ties = false;
};

__device__ __forceinline__ Threshold found_threshold(const Shared& shared) {
    return {shared.bin, shared.needed, shared.needed == shared.inside};
}

// The `needed`-th of the scores whose keys are in a range, by their bits; whole: they are all of the row's.
__device__ __forceinline__ Threshold look_into_bits(Shared& shared, const Run& run, Range range, uint32 needed,
                                                    bool whole) {
    for (bool first = true;; first = false) {
        const ByBits by_bits(range);
        const uint32 counted = count_and_find_bin(shared, first ? needed : shared.needed, run, by_bits);
        if (first && whole && counted <= kTopK) return {};  // all are taken
        if (range.low == range.high) return {range.low, shared.needed, shared.needed == shared.inside};
        const uint32 bin = shared.bin, needed = shared.needed, inside = shared.inside;
        if (inside <= kFew) {
            run.for_each([&](float score) {
                if (!is_hole(score) && by_bits(score) == bin) add_to_few(shared, score);
            });
            sync_blocks(run.row.blocks);
            rank_few(shared, gather_few(shared, run.row.blocks).keys, threadIdx.x, inside, needed);
            __syncthreads();
            return found_threshold(shared);
        }
        range = range_of_bin(shared, run, by_bits);
    }
}

// Where a warp begins to write: columns above the threshold and equal to it that come before it. Equal ones of its own,
// and all above.
struct Before {
    uint32 above = 0, equal = 0, own_equal = 0, total = 0;
};

// Tells the other warps and blocks what this warp has.
__device__ __forceinline__ void tell(Shared& shared, int blocks, uint32 above, uint32 equal) {
    above = __reduce_add_sync(kFullWarp, above);
    equal = __reduce_add_sync(kFullWarp, equal);
    if (threadIdx.x % kWarpSize == 0) {
        shared.above[threadIdx.x / kWarpSize] = above;
        shared.equal[threadIdx.x / kWarpSize] = equal;
    }
    sync_blocks(blocks);
}

// What has been told.
__device__ __forceinline__ Before add_told(Shared& shared, int blocks) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    uint32 above = 0, equal = 0, total = 0;  // of a lane's warps
#pragma unroll
    for (int rank = 0; rank < kCluster; ++rank) {
        const bool is_warp = rank < blocks && lane < kWarps;
        const uint32 more = is_warp ? load_from_block(shared.above[lane], rank, blocks) : 0;
        const uint32 ties = is_warp ? load_from_block(shared.equal[lane], rank, blocks) : 0;
        const bool comes_before = rank < rank_in_cluster() || (rank == rank_in_cluster() && lane < warp);
        total += more;
        above += comes_before ? more : 0;
        equal += comes_before ? ties : 0;
    }
    return {__reduce_add_sync(kFullWarp, above), __reduce_add_sync(kFullWarp, equal), shared.equal[warp],
            __reduce_add_sync(kFullWarp, total)};
}

// By a pass over all columns.
__device__ __noinline__ Before count_before(Shared& shared, Row row, Threshold threshold) {
    const Run run(shared, row);
    uint32 above = 0, equal = 0;
    run.for_each([&](float score) {
        const uint32 key = is_hole(score) ? kNotSelectable : ordered_key(score);
        above += key > threshold.key;
        equal += key == threshold.key && threshold.ties > 0;
    });
    tell(shared, row.blocks, above, equal);
    return add_told(shared, row.blocks);
}

__device__ __forceinline__ void emit(const Row& row, uint32 place, int column, float score) {
    row.indices[place] = column;
    if (kValues) row.values[place] = score;
}

// Writes the run's columns that reach the limit, from a place on.
__device__ __forceinline__ void write_by_limit(const Run& run, float limit, uint32 place) {
    const float nan = __uint_as_float(kMissing);
    for (int i = 0; i < run.vectors; i += kTogether) {
        float4 scores[kTogether];
        uint32 own = 0;  // a byte for each vector
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            scores[j] = i + j < run.vectors ? run.vector(i + j) : float4{nan, nan, nan, nan};
        }
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            add_if_at_least<1>(own, (&scores[0].x)[e], limit);
            add_if_at_least<1 << 8>(own, (&scores[1].x)[e], limit);
            add_if_at_least<1 << 16>(own, (&scores[2].x)[e], limit);
            add_if_at_least<1u << 24>(own, (&scores[3].x)[e], limit);
        }
        const uint32 inclusive = inclusive_sum_of_lanes(own);
        const uint32 of_warp = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1), before = inclusive - own;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            uint32 at = place + (before >> 8 * j & 0xff);
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                const float score = (&scores[j].x)[e];
                if (score >= limit) emit(run.row, at++, run.column + (i + j) * kVectorColumns + e, score);
            }
            place += of_warp >> 8 * j & 0xff;
        }
    }
}

// The same for any threshold, NaN and some of several equal columns included.
__device__ __noinline__ void write_by_key(Row row, Shared& shared, Threshold threshold, uint32 above, uint32 equal) {
    const Run run(shared, row);
    for (int i = 0; i < run.vectors; ++i) {
        const float4 four = run.vector(i);
        uint32 own = 0;  // above in the low half, equal in the high half
        uint32 keys[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const float score = (&four.x)[e];
            keys[e] = is_hole(score) ? kNotSelectable : ordered_key(score);
            own += uint32(keys[e] > threshold.key) + (uint32(threshold.ties > 0 && keys[e] == threshold.key) << 16);
        }
        const uint32 inclusive = inclusive_sum_of_lanes(own);
        const uint32 of_warp = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1), before = inclusive - own;
        uint32 my_above = above + (before & 0xffff), my_equal = equal + (before >> 16);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const bool is_above = keys[e] > threshold.key, is_equal = threshold.ties > 0 && keys[e] == threshold.key;
            if (is_above || (is_equal && my_equal < threshold.ties)) {
                emit(run.row, my_above + min(my_equal, threshold.ties), run.column + i * kVectorColumns + e,
                     (&four.x)[e]);
            }
            my_above += is_above;
            my_equal += is_equal;
        }
        above += of_warp & 0xffff;
        equal += of_warp >> 16;
    }
}

// The two scores that bins of equal width are laid between, from a sample: four scores side by side of each thread,
// spread over the row. Not the least and the greatest, for one far score would make all others share a bin. Low is the
// least of the threads' greatest: some four fifths of independent scores are above it. Threads with the same place in
// their warps make a group, whose columns are spread over the row; high is the least of the groups' greatest: a
// thirtieth part is above it. Where the kTopK-th score may lie beyond, the least or the greatest of all instead. Clears
// the histogram.
__device__ __forceinline__ Range spread_of_sample(Shared& shared, const float4& sample, int length) {
    const bool low_known = kTopK < length / 2, high_known = kTopK > length / 16;
    const float least = fminf(fminf(sample.x, sample.y), fminf(sample.z, sample.w));  // these ignore NaN
    const float most = fmaxf(fmaxf(sample.x, sample.y), fmaxf(sample.z, sample.w));
    const int group = threadIdx.x % kWarps;
    if (threadIdx.x == 0) shared.low = 0xffffffffu;
    if (threadIdx.x < kWarps) shared.totals[threadIdx.x] = 0;
    clear_histogram(shared);
    const bool found = least <= most;
    const uint32 low = __reduce_min_sync(kFullWarp, found ? ordered_key(low_known ? most : least) : 0xffffffffu);
    if (threadIdx.x % kWarpSize == 0) atomicMin(&shared.low, low);
    if (found) atomicMax(&shared.totals[group], ordered_key(most));
    __syncthreads();
    const uint32 high = shared.totals[group];
    return {shared.low, high_known ? __reduce_min_sync(kFullWarp, high) : __reduce_max_sync(kFullWarp, high)};
}

// Where the bin found is crowded. Not inlined: rarely needed, and much code.
__device__ __noinline__ Threshold look_closer(Shared& shared, Row row, ByScore by_score) {
    const Run run(shared, row);
    const uint32 bin = shared.bin, needed = shared.needed;
    const bool whole = bin == 0;  // in bin 0 there are NaN and holes as well
    Range own;
    run.for_each([&](float score) {
        if (!is_hole(score) && (whole || by_score(score) == bin)) own.add(ordered_key(score));
    });
    const Range range = range_of_row(shared, run.row.blocks, own);
    return look_into_bits(shared, run, range, whole ? kTopK : needed, whole);
}

__device__ __forceinline__ void select(Shared& shared, const Row& row) {
    const Run run(shared, row);
    Threshold threshold;
    Before before;
    bool counted = false;
    if (row.length > kTopK) {
        const int vector = int(int64(threadIdx.x) * (row.length / kVector) / kThreads);
        const float4 sample = row.load(vector * kVector);
        run.stage();
        const Range range = spread_of_sample(shared, sample, row.length);
        const ByScore by_score(score_of(range.low), score_of(range.high));
        const uint32 histogram = uint32(__cvta_generic_to_shared(shared.histogram));
        const uint32 first = histogram - 4 * __float_as_uint(ByScore::kFirst);
        run.for_each([&](float score) {  // lanes with one bin make one addition
            add_one(first + 4 * __float_as_uint(by_score.bin(score)));
        });
        sync_blocks(row.blocks);
        find_bin(shared, row.blocks, kTopK);
        const uint32 needed = shared.needed, inside = shared.inside;
        if (shared.bin > 0 && inside <= kFew) {
            const float bin = ByScore::kFirst + float(shared.bin);
            uint32 above = 0;
            run.for_each([&](float score) {
                const float own = by_score.bin(score);
                add_if_at_least<1>(above, own, bin);
                if (own == bin) add_to_few(shared, score);
            });
            tell(shared, row.blocks, above, 0);  // those in the bin among them
            const Few& few = gather_few(shared, row.blocks);
            rank_few(shared, few.keys, threadIdx.x, inside, needed);
            __syncthreads();
            threshold = found_threshold(shared);
            before = add_told(shared, row.blocks);
            const uint32 lane = threadIdx.x % kWarpSize, me = rank_in_cluster() * kWarps + threadIdx.x / kWarpSize;
            for (uint32 i = lane; i - lane < inside; i += kWarpSize) {
                const uint32 key = i < inside ? few.keys[i] : ~0u, warp = i < inside ? few.warps[i] : ~0u;
                const uint32 lanes_before = __ballot_sync(kFullWarp, warp < me);
                const uint32 equal = __ballot_sync(kFullWarp, key == threshold.key);
                before.above -= __popc(__ballot_sync(kFullWarp, key <= threshold.key) & lanes_before);
                before.equal += __popc(equal & lanes_before);
                before.own_equal += __popc(equal & __ballot_sync(kFullWarp, warp == me));
            }
            counted = true;
        } else {
            threshold = look_closer(shared, row, by_score);
        }
    } else {
        run.stage();
    }
    if (!counted) before = count_before(shared, row, threshold);
    // Nearly always a warp takes all ties that it has, or none.
    const bool all = threshold.all_ties || before.equal + before.own_equal <= threshold.ties;
    if (threshold.key > kNaNKey && (all || before.equal >= threshold.ties)) {
        write_by_limit(run, all ? score_of(threshold.key) : limit_above(threshold.key),
                       before.above + min(before.equal, threshold.ties));
    } else {
        write_by_key(row, shared, threshold, before.above, before.equal);
    }
    const uint32 taken = threshold.ties > 0 ? kTopK : before.total;
    for (uint32 i = taken + rank_in_cluster() * kThreads + threadIdx.x; i < kTopK; i += row.blocks * kThreads) {
        row.indices[i] = -1;
        if (kValues) row.values[i] = __uint_as_float(kMinusInfinity);
    }
    sync_blocks(row.blocks);  // before the next row: nobody reads any more what this block has
}

extern "C" __global__ void __launch_bounds__(kThreads, kResident)
#if kCluster > 1
__cluster_dims__(kCluster, 1, 1)
#endif
topk_histogram(const float* __restrict__ scores, const void* __restrict__ lengths, int* __restrict__ indices,
            float* __restrict__ values, int columns, int first_row, int end_row, int64 row_stride) {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    wait_for_launch_before();
    for (int64 row = first_row + blockIdx.x / kCluster; row < end_row; row += gridDim.x / kCluster) {
        const TokenRow span = span_of_row<kOwnScores>(lengths, row, row_stride);
        const int length = min(max(span.kv_len, 0), columns);
        const int blocks = length <= kAlone ? 1 : kCluster;
        if (rank_in_cluster() >= blocks) continue;
        select(shared, {scores + span.row, length, blocks, indices + row * kTopK, values + row * kTopK});
    }
}
