// indices[r] = the min(kTopK, selectable) first columns of row r in the total order of the contract,
// in ascending column order, then -1; values[r] (kValues) the scores beside them, then -inf.
//
// scores float32, of which row r may use the columns below lengths[r]; rows begin row_stride elements after one
// another, or where spans say. They may be a part of a longer row, from first_column on: then indices and values hold
// what the columns before gave, and are continued. A launch selects from rows [first_row, end_row), or from those of
// `range` by as many blocks as it says.
//
// Reads a row once, a chunk at a time; kThreads threads a row, kRows rows at once in a block. Or a cluster of kCluster
// blocks shares a row: each makes a list of its part, and the first block goes on with all. Columns whose score is
// at least the limit join a list, in ascending column order; of the list, the kTopK first are the answer. The limit
// begins as a guess from a sample of the row, a little below the score that kTopK columns should reach. Should the
// list overflow, it is cut down to its kTopK first, and the limit becomes the least score above the kTopK-th of these.
//
// Why nothing is lost. A guess is judged by what came of it: if the list ever holds kTopK columns, any column left
// out has a lower score than all of these; if it does not, the row is walked again without a limit. After a cut,
// a column left out has at most the score of kTopK columns before it, and comes after them in the total order,
// where of equal scores the smaller column is first. Why the list cannot overflow after a cut: it has room for
// kTopK columns and a chunk.
//
// kHoles = 1: scores are ours: they have spans, rows begin on 16 bytes, and kHole marks columns that may not be
// selected. kSkips = 1: rows of up to kTopK columns have not been scored, for they are taken whole but for columns
// whose page does not exist.
#include "common.cuh"
#include "paged_keys.cuh"
#include "sm80.cuh"

static_assert(kTopK >= 1 && kTopK <= 4096, "indices per row: more is select_topk.cu's");
static_assert(kThreads % kWarpSize == 0 && kRows >= 1 && kRows * kThreads <= 1024, "threads of a row, rows of a block");
static_assert(kCluster >= 1 && kCluster <= 8, "blocks of a cluster: what every GPU with clusters takes");
static_assert(kCluster == 1 || kRows == 1, "a row is shared among blocks, or a block among rows");
static_assert(kValues == 0 || kValues == 1, "whether scores are written beside the indices");
static_assert(kHoles == 0 || kHoles == 1, "whether kHole marks columns or is a NaN like any other");
static_assert(kSkips == 0 || (kSkips == 1 && kHoles == 1 && kValues == 0), "what has no scores gives none");

constexpr int kVector = 4;   // columns side by side in a thread
constexpr int kVectors = 4;  // of a thread in a chunk
constexpr int kVectorColumns = kVector * kWarpSize;  // of a warp
static_assert(kVectors == 4 && kVectorColumns < 256, "columns of a warp are counted in a byte for each vector");
constexpr int kChunk = kThreads * kVector * kVectors;
constexpr int kSampleVectors = kThreads < 1024 ? 2 : 1;  // of a thread
constexpr int kSamples = kThreads * kVector * kSampleVectors;
// Blocks of a multiprocessor: more hide more of the memory's latency. A caller's unaligned rows take more registers.
constexpr int kFitting = kMultiprocessorBytes / (kSharedBytes + 1024);
constexpr int kWanted = kCluster > 1 || kRows * kThreads == 1024 ? 1 : (kHoles ? 1024 : 768) / (kRows * kThreads);
constexpr int kResident = kFitting < 1 ? 1 : kFitting < kWanted ? kFitting : kWanted;
// Of the list: kTopK columns and a chunk, or kTopK of each block.
constexpr int kCapacity = kTopK + (kChunk > (kCluster - 1) * kTopK ? kChunk : (kCluster - 1) * kTopK);
constexpr int kAlone = kChunk;  // columns that one block is done with before a cluster has agreed
#include "candidate_list.cuh"
static_assert(kCluster == 1 || kAlone >= kTopK, "what is taken whole is not shared");
static_assert(kRows * sizeof(Shared) <= kSharedBytes, "shared memory");

struct SampleScores {
    float scores[kSampleVectors * kVector];
    template <class What>
    __device__ __forceinline__ void for_each(const What& what) const {
#pragma unroll
        for (const float score : scores) what(score);
    }
};

// Four columns side by side, of which those from `length` on do not count.
__device__ __forceinline__ float4 load_columns(const float* row, int column, int length) {
    if (kHoles) return column < length ? *reinterpret_cast<const float4*>(row + column) : float4{};
    float4 found{};
    if (column < length) found.x = row[column];
    if (column + 1 < length) found.y = row[column + 1];
    if (column + 2 < length) found.z = row[column + 2];
    if (column + 3 < length) found.w = row[column + 3];
    return found;
}

// A score that somewhat more than kTopK of the row's columns should reach, by a sample of it.
__device__ __forceinline__ float guess_limit(Shared& shared, const float* row, int length) {
    const float share = __fdividef(float(kTopK) * kSamples, float(length));
    const int rank = int(share + 4.0f * sqrtf(share)) + 2;  // four standard deviations more
    if (rank >= kSamples) return __uint_as_float(kMinusInfinity);
    const int pairs = length / (2 * kVector);  // of vectors: what memory gives at a time
    SampleScores sample;
#pragma unroll
    for (int j = 0; j < kSampleVectors; ++j) {
        const int thread = thread_of_row() + j * kThreads;
        const int pair = int(int64(thread / 2) * pairs / (kThreads * kSampleVectors / 2));
        const float4 four = load_columns(row, (2 * pair + thread % 2) * kVector, length);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sample.scores[j * kVector + e] = (&four.x)[e];
    }
    const Range range = range_of_scores(shared, sample);
    const float low = score_of(range.low), high = score_of(range.high);
    const ByScore by_score(low, high);
    find_bin(shared, rank, sample, by_score);
    const int bin = shared.bin;
    float limit = low + (bin - 0.5f) * (1.0f / (kBins - 1)) * (high - low);  // bins are rounded to
    bool crowded = false;  // with one score, a plateau: then that is the limit
    if (shared.inside > kSamples / 16) {
        Range own;
        sample.for_each([&](float score) {
            if (by_score(score) == bin) own.add(ordered_key(score));
        });
        own = range_of_block(shared, own);
        const bool zeros = own.low <= kZeroKey && kZeroKey <= own.high;
        crowded = own.low > kNaNKey && (zeros || own.low == own.high);
        if (crowded) limit = zeros ? 0.0f : score_of(own.low);
    }
    if (bin == 0 && !crowded) return __uint_as_float(kMinusInfinity);
    if (thread_of_row() == 0) {
        shared.lowest = limit;
        shared.highest = high;
        shared.crowded = crowded;
    }
    return limit;
}

struct Row {
    const float* scores;
    int length;  // of the columns here
    int first_column;
    uint32 number;
    int* all_indices;  // of all rows
    float* all_values;

    __device__ __forceinline__ int* indices() const { return all_indices + int64(number) * kTopK; }
    __device__ __forceinline__ float* values() const { return all_values + int64(number) * kTopK; }
};

// What a block of the cluster walks.
__device__ __forceinline__ Row part_of(const Row& row, int blocks) {
    if (kCluster == 1 || blocks == 1) return row;
    const int vectors = (row.length + kVectorColumns - 1) / kVectorColumns;
    const int each = (vectors + kCluster - 1) / kCluster * kVectorColumns;
    const int first = min(int(rank_in_cluster()) * each, row.length);
    return {row.scores + first, min(row.length - first, each), first, row.number, row.all_indices, row.all_values};
}

// Where registers allow, the scores of a chunk are asked for while those of the one before are looked at.
constexpr bool kReadsAhead = kCluster > 1;

// A thread's part of a chunk.
struct Scores {
    float4 vectors[kVectors];

    // Of a row's first chunk: the first column.
    static __device__ __forceinline__ int first() {
        return thread_of_row() / kWarpSize * (kVectorColumns * kVectors) + threadIdx.x % kWarpSize * kVector;
    }

    __device__ __forceinline__ void load(const Row& row, int column) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            vectors[j] = load_columns(row.scores, column + j * kVectorColumns, row.length);
        }
    }

    __device__ __forceinline__ float& operator()(int j, int e) { return (&vectors[j].x)[e]; }
};

// Adds the columns of the row that reach the limit to a list of `count`; everything: all that may be selected, until
// there is a limit. Returns the list's new count. `ahead`: scores of the first chunk, where they are read ahead.
template <bool everything>
__device__ __forceinline__ int walk(Shared& shared, int count, const Row& row, float limit, Scores ahead) {
    const int first = Scores::first();
    const float infinity = __uint_as_float(0x7f800000u), nan = __uint_as_float(kHole);
    const int length = row.length;
    bool all = everything;
    int turn = 0;
    for (int base = first; base < length + first; base += kChunk) {  // the thread's first column of a chunk
        Scores scores = ahead;
        if (kReadsAhead) ahead.load(row, base + kChunk);
        else scores.load(row, base);
        if (base - first + kChunk > length) {
#pragma unroll
            for (int j = 0; j < kVectors; ++j) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    if (base + j * kVectorColumns + e >= length) scores(j, e) = nan;  // reaches no limit
                }
            }
        }
        const auto judged = [&](int j, int e) {  // against the limit
            const float score = scores(j, e);
            if (!everything || !all) return score;
            const bool is_column = base + j * kVectorColumns + e < length;
            return (kHoles ? __float_as_uint(score) != kHole : is_column) ? infinity : nan;
        };
        uint32 own = 0, total;  // a byte for each vector
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            add_if_at_least<1>(own, judged(0, e), limit);
            add_if_at_least<1 << 8>(own, judged(1, e), limit);
            add_if_at_least<1 << 16>(own, judged(2, e), limit);
            add_if_at_least<1u << 24>(own, judged(3, e), limit);
        }
        const uint32 inclusive = inclusive_sum_of_lanes(own);
        const uint32 of_warp = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
        int place = count + sum_of_warps(shared, turn, __dp4a(of_warp, 0x01010101u, 0u), total);
        if (count + int(total) > kCapacity) {
            pad(shared, count);
            sync_row();
            limit = cut(shared, count);
            count = kTopK;
            all = false;
            base -= kChunk;  // read once more, rather than kept in registers
            if (kReadsAhead) ahead.load(row, base + kChunk);
            continue;
        }
        count += total;
        const uint32 before = inclusive - own;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            uint32 at = uint32(__cvta_generic_to_shared(shared.list + place + (before >> 8 * j & 0xff)));
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                append_if_at_least(at, __float_as_uint(scores(j, e)),
                                   row.first_column + base + j * kVectorColumns + e, judged(j, e), limit);
            }
            place += of_warp >> 8 * j & 0xff;
        }
    }
    pad(shared, count);
    sync_row();
    return count;
}

template <bool everything>
__device__ __forceinline__ int walk(Shared& shared, int count, const Row& row, float limit) {
    Scores ahead;
    if (kReadsAhead) ahead.load(row, Scores::first());
    return walk<everything>(shared, count, row, limit, ahead);
}

// Makes a list of the row's columns whose page exists. Returns how many.
__device__ __forceinline__ int list_existing(Shared& shared, int length, const PagedKeys& cache, int sequence) {
    int count = 0, turn = 0;
    for (int base = 0; base < length; base += kThreads) {
        const int column = base + thread_of_row();
        const bool exists = column < length && cache.row(sequence, column) >= 0;
        const uint32 warp = __ballot_sync(kFullWarp, exists);
        uint32 total;
        const int place = count + sum_of_warps(shared, turn, __popc(warp), total);
        if (exists) shared.list[place + __popc(warp & ((1u << threadIdx.x % kWarpSize) - 1))] = {0, column};
        count += total;
    }
    sync_row();
    return count;
}

__device__ __forceinline__ void select(Shared& shared, const Row& row, int all_columns, const PagedKeys& cache,
                                       int sequence, int blocks) {
    int count = 0;
    if (thread_of_row() == 0) {
        shared.lowest = shared.highest = 0.0f;
        shared.crowded = false;
    }
    if (kSkips && all_columns <= kTopK) {
        count = list_existing(shared, row.length, cache, sequence);
    } else if (row.first_column > 0 || row.length <= kTopK) {
        Range before;  // what the columns before gave
        if (kHoles && kValues && row.first_column > 0) {
            Range places;
            for (int i = thread_of_row(); i < kTopK; i += kThreads) {
                const int column = row.indices()[i];
                if (column < 0) break;
                const float score = row.values()[i];
                shared.list[i] = {__float_as_uint(score), column};
                before.add(ordered_key(score));
                places.add(i + 1);
            }
            count = int(range_of_block(shared, places).high);
            sync_row();
            before = range_of_block(shared, before);
        }
        if (count == kTopK) count = walk<false>(shared, count, row, limit_above(before.low));
        else count = walk<true>(shared, count, row, 0.0f);
    } else {
        const bool many = row.length > kTopK + kTopK / 2 && row.length > kSamples;
        const Row part = part_of(row, blocks);
        Scores ahead;
        if (kReadsAhead) ahead.load(part, Scores::first());
        const float limit = many ? guess_limit(shared, row.scores, row.length) : __uint_as_float(kMinusInfinity);
        count = gather(shared, walk<false>(shared, 0, part, limit, ahead), blocks);
        if (count < kTopK) {  // after a wrong guess, or with NaN in place of scores
            if (thread_of_row() == 0) shared.crowded = false;
            count = gather(shared, walk<true>(shared, 0, part, 0.0f), blocks);
        }
        if (rank_in_cluster() > 0) return;
    }
    const Threshold threshold = find_threshold(shared, count);
    const int taken = take(shared, count, threshold, [&](int place, const Candidate& found) {
        row.indices()[place] = found.column;
        if (kValues) row.values()[place] = __uint_as_float(found.score);
    });
    for (int i = taken + thread_of_row(); i < kTopK; i += kThreads) {
        row.indices()[i] = -1;
        if (kValues) row.values()[i] = __uint_as_float(kMinusInfinity);
    }
}

extern "C" __global__ void __launch_bounds__(kRows* kThreads, kResident)
#if kCluster > 1
__cluster_dims__(kCluster, 1, 1)
#endif
stream_topk(const float* __restrict__ scores, const void* __restrict__ lengths, int* indices, float* values,
    int columns, uint32 first_row, uint32 end_row, const TokenRange* range, int first_column,
    const uint32* __restrict__ k_lookup_table, uint32 num_blocks, uint32 page_size, uint32 page_factor,
    uint32 page_shift, uint32 pages_per_seq, int64 row_stride) {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    const int part = threadIdx.x / kThreads;
    Shared& shared = reinterpret_cast<Shared*>(dynamic_shared)[part];
    const PagedKeys cache{nullptr, nullptr, k_lookup_table, num_blocks, 1, 0, page_size, page_factor, page_shift,
                          pages_per_seq};
    for (int i = thread_of_row(); i < kBins; i += kThreads) shared.histogram[i] = 0;
    wait_for_launch_before();
    if (range) first_row = range->first;
    // Read from memory each time, for registers are short.
    const auto blocks_at_work = [&] { return range ? min(range->blocks, int(gridDim.x)) : int(gridDim.x) / kCluster; };
    if (range && blockIdx.x >= range->blocks) return;
    for (uint32 r = first_row + blockIdx.x / kCluster * kRows + part; r < (range ? range->end : end_row);
         r += blocks_at_work() * kRows) {
        const TokenSpan span = span_of_row<kHoles>(lengths, r, row_stride);
        const int length = min(max(span.num_keys - first_column, 0), columns);
        if (first_column > 0 && length == 0) continue;
        const int blocks = length <= kAlone ? 1 : kCluster;
        if (rank_in_cluster() >= blocks) continue;
        const Row row{scores + span.row, length, first_column, r, indices, values};
        select(shared, row, span.num_keys, cache, span.sequence, blocks);
        sync_row();
    }
}
