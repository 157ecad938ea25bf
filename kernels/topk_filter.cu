// indices[r] = the min(kTopK, selectable) first columns of row r in the total order of the contract,
// in ascending column order, then -1; values[r] (kValues) the scores beside them, then -inf.
//
// scores float32, of which row r may use the columns below lengths[r]; rows begin row_stride elements after one
// another, or where token_rows say. They may be a part of a longer row, from first_column on: then indices and values hold
// what the columns before gave, and are continued. A launch selects from rows [first_row, end_row), or from those of
// `range` by as many blocks as it says (kCluster is 1 then).
//
// Reads a row once, a chunk at a time; kThreads threads a row, kRows rows at once in a block. Or a cluster of kCluster
// blocks work_ranges a row: each makes a list of its part, and the first block goes on with all. Columns whose score is
// at least the limit join a list, in ascending column order; of the list, the kTopK first are the answer. The limit
// begins as a guess from a sample of the row, a little below the score that kTopK columns should reach. Once the list
// holds kTopK columns, the limit becomes the least score above the guess. Should the list overflow, it is cut down to
// its kTopK first, and the limit becomes the least score above the kTopK-th of these.
//
// Why nothing is lost. A guess is judged by what came of it: if the list does not reach kTopK columns, the row is
// walked again with a lower limit, and in the end without one. A limit that is raised leaves out columns whose score is
// at most that of kTopK columns before them; they come after those in the total order, where of equal scores the
// smaller column is first. A dense plateau at the guess may be listed from a first part of the row alone: then the
// list has every column above the guess, and of those equal to it the first ones. If these are kTopK, the answer is
// among them; if not, the guess is judged wrong. Why the list cannot overflow after a cut: it has room for kTopK
// columns and a chunk.
//
// kOwnScores = 1: scores are ours: they have token_rows, rows begin on 16 bytes, and kMissing marks columns that may not be
// selected. kUnscored = 1: rows of up to kTopK columns have not been scored, for they are taken whole but for columns
// whose page does not exist.
#include "common.cuh"
#include "paged_keys.cuh"
#include "ptx.cuh"

static_assert(kTopK >= 1 && kTopK <= 4096, "indices per row: more is topk_histogram.cu's");
static_assert(kThreads % kWarpSize == 0 && kRows >= 1 && kRows * kThreads <= 1024, "threads of a row, rows of a block");
static_assert(kCluster >= 1 && kCluster <= 8, "blocks of a cluster: what every GPU with clusters takes");
static_assert(kCluster == 1 || kRows == 1, "a row is shared among blocks, or a block among rows");
static_assert(kValues == 0 || kValues == 1, "whether scores are written beside the indices");
static_assert(kOwnScores == 0 || kOwnScores == 1, "whether kMissing marks columns or is a NaN like any other");
static_assert(kUnscored == 0 || (kUnscored == 1 && kOwnScores == 1 && kValues == 0), "what has no scores gives none");

constexpr int kVector = 4;   // columns side by side in a thread
constexpr int kVectors = 4;  // of a thread in a chunk
constexpr int kVectorColumns = kVector * kWarpSize;  // of a warp
static_assert(kVectors == 4 && kVectorColumns < 256, "columns of a warp are counted in a byte for each vector");
constexpr int kChunk = kThreads * kVector * kVectors;
// Blocks of a multiprocessor: more hide more of the memory's latency. Where a caller's rows are not aligned, or scores
// are kept and the target is sm_100a, threads take more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kManyRegisters = !kOwnScores || kValues;
#else
constexpr int kManyRegisters = !kOwnScores;
#endif
constexpr int kFitting = kMultiprocessorBytes / (kSharedBytes + 1024);
constexpr int kThreadsWanted = kManyRegisters ? 768 : 1024;
constexpr int kWanted = kCluster > 1 || kRows * kThreads == 1024 ? 1 : kThreadsWanted / (kRows * kThreads);
constexpr int kResident = kFitting < 1 ? 1 : kFitting < kWanted ? kFitting : kWanted;
// Of the list: kTopK columns and a chunk, or kTopK of each block.
constexpr int kCapacity = kTopK + (kChunk > (kCluster - 1) * kTopK ? kChunk : (kCluster - 1) * kTopK);
constexpr int kAlone = kChunk;  // columns that one block is done with before a cluster has agreed
#include "candidates.cuh"
static_assert(kCluster == 1 || kAlone >= kTopK, "what is taken whole is not shared");
static_assert(kRows * sizeof(Shared) <= kSharedBytes, "shared memory");
#include "threshold_guess.cuh"

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

    // Of a row's first chunk: the first column, and that of the warp, whose columns are side by side.
    static __device__ __forceinline__ int first_of_warp() {
        return thread_of_row() / kWarpSize * (kVectorColumns * kVectors);
    }
    static __device__ __forceinline__ int first() { return first_of_warp() + threadIdx.x % kWarpSize * kVector; }

    __device__ __forceinline__ void load(const Row& row, int column) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            vectors[j] = load_columns(row.scores, column + j * kVectorColumns, row.length);
        }
    }

    __device__ __forceinline__ float& operator()(int j, int e) { return (&vectors[j].x)[e]; }
};

// By one thread: there is no guess.
__device__ __forceinline__ void know_nothing(Shared& shared) {
    shared.lowest = shared.highest = __uint_as_float(kQuietNaN);
    shared.crowded = false;
}

// Adds the columns of the row that reach the limit to a list of `count`; everything: all that may be selected, until
// there is a limit. Returns the list's new count. A plateau at the guessed limit is listed until there are kTopK
// columns; `once`: in the first chunk alone, by the warps that come with that limit. `ahead`: scores of the first
// chunk, where they are read ahead.
template <bool everything>
__device__ __forceinline__ int walk(Shared& shared, int count, const Row& row, float limit, bool once, Scores ahead) {
    const int first = Scores::first();
    const float infinity = __uint_as_float(0x7f800000u), nan = __uint_as_float(kMissing);
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
            return (kOwnScores ? __float_as_uint(score) != kMissing : is_column) ? infinity : nan;
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
        if (!everything && (once || count >= kTopK) && limit == shared.lowest) limit = limit_above(ordered_key(limit));
    }
    pad(shared, count);
    sync_row();
    return count;
}

template <bool everything>
__device__ __forceinline__ int walk(Shared& shared, int count, const Row& row, float limit) {
    Scores ahead;
    if (kReadsAhead) ahead.load(row, Scores::first());
    return walk<everything>(shared, count, row, limit, false, ahead);
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
    if (thread_of_row() == 0) know_nothing(shared);
    if (kUnscored && all_columns <= kTopK) {
        count = list_existing(shared, row.length, cache, sequence);
    } else if (row.first_column > 0 || row.length <= kTopK) {
        Range before;  // what the columns before gave
        if (kOwnScores && kValues && row.first_column > 0) {
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
        const Row part = part_of(row, blocks);
        for (bool again = false;; again = true) {
            Scores ahead;
            if (kReadsAhead) ahead.load(part, Scores::first());
            const Guess guess = guess_from_sample(shared, row.scores, row.length, again ? 4 * kTopK : kTopK);
            if (thread_of_row() == 0) {
                shared.lowest = guess.limit;
                shared.highest = guess.highest;
                shared.crowded = guess.plateau > kSamples / 16;
            }
            // The first columns of a plateau are wanted. Where it is dense, warps that begin beyond `reach` list none
            // of it, and after the first chunk no warp does. `reach` is below a chunk, so a block's part ends within
            // its first chunk, or the parts after it begin beyond `reach`: what is listed comes before what is not.
            constexpr float kEnough = (1.1f * kTopK + 32.0f) * kSamples;
            const float reach = __fdividef(kEnough, float(guess.plateau));
            const bool once = !again && guess.plateau > kEnough / kChunk;
            float limit = guess.limit;
            if (once && part.first_column + Scores::first_of_warp() >= reach) limit = limit_above(ordered_key(limit));
            count = gather(shared, walk<false>(shared, 0, part, limit, once, ahead), blocks);
            if (again || count >= kTopK || guess.limit == __uint_as_float(kMinusInfinity)) break;
        }
        if (count < kTopK) {  // with NaN in place of scores, or after two bad guesses
            if (thread_of_row() == 0) know_nothing(shared);
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
topk_filter(const float* __restrict__ scores, const void* __restrict__ lengths, int* indices, float* values,
    int columns, uint32 first_row, uint32 end_row, const WindowTokens* range, int first_column,
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
        const TokenRow span = span_of_row<kOwnScores>(lengths, r, row_stride);
        const int length = min(max(span.kv_len - first_column, 0), columns);
        if (first_column > 0 && length == 0) continue;
        const int blocks = first_column > 0 || length <= kAlone ? 1 : kCluster;
        if (rank_in_cluster() >= blocks) continue;
        const Row row{scores + span.row, length, first_column, r, indices, values};
        select(shared, row, span.kv_len, cache, span.sequence, blocks);
        sync_row();
    }
}
