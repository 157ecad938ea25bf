// indices[r] = the first min(kTopK, n) of the n selectable columns of row r, by the total order of
// docs/contract.md; in ascending column order, followed by -1. values[r] (if kValues) = the
// scores of these columns, then -inf. The slots of these columns in the cache, in the same order,
// take the place of the columns if kSlots = 1, and are written to slots[r] if kSlots = 2.
//
// A row has kv_len columns. If first_column > 0, `scores` holds the columns from there on, and
// indices and values hold the selection from the columns before; both are updated.
//
// The kThreads threads of a row read it once, in chunks. A block works on kRows rows at a time, or
// the kCluster blocks of a cluster share one row: each block lists the candidates of its part, and
// sends its list to the first block.
//   1. A sample of the row gives a limit, a little below the kTopK-th score (threshold_guess.cuh).
//   2. Columns whose score is at least the limit are appended to a list of candidates, in ascending
//      column order. Once the list holds kTopK, the limit rises to the least score above the guess.
//      If the list overflows, it is cut down to its kTopK first candidates, and the limit rises to
//      the least score above the kTopK-th.
//   3. A histogram of the list gives the threshold. The candidates that it selects are written in
//      order (candidates.cuh).
//
// Why the result is exact. If a guess was too high, the list has fewer than kTopK candidates; then
// the row is read again with a lower guess, and at last without one. When the limit rises, the list
// holds kTopK columns whose scores are at least that of any column left out later. A later column
// loses ties, so it cannot be among the kTopK first. If many columns equal the guess (a plateau),
// only those at the beginning of the row are listed. Then the list has all columns above the guess
// and the first of those equal to it; if these are at least kTopK, the result is among them, and if
// not, the guess counts as too high. A list that has been cut cannot overflow within a chunk: it
// has room for kTopK candidates and a chunk.
//
// kOwnScores = 1: this package's scoring has written the rows. They begin on 16 bytes and consist
// of whole vectors, and kMissing marks keys whose page does not exist, which are not selectable.
// kOwnScores = 0: the rows are a caller's matrix. kUnscored = 1: rows of at most kTopK columns have
// not been scored, because all their keys whose page exists are selected.
#include "common.cuh"
#include "paged_keys.cuh"
#include "ptx.cuh"
#include "residency.cuh"
#include "row.cuh"

static_assert(kTopK >= 1 && kTopK <= 4096, "topk_histogram.cu selects more");
static_assert(kRows >= 1 && kThreads * kRows <= 1024, "threads of a block");
static_assert(kCluster >= 1 && kCluster <= 8, "clusters that every GPU with clusters takes");
static_assert(kCluster == 1 || kRows == 1, "a cluster has one row at a time");
static_assert(kValues == 0 || kValues == 1, "whether scores are written beside the indices");
static_assert(kOwnScores == 0 || kOwnScores == 1, "whose scores these are");
static_assert(kUnscored == 0 || (kUnscored == 1 && kOwnScores == 1 && kValues == 0),
              "rows without scores have no values");

struct Params {
    PagedKeys keys;              // read if kUnscored or kSlots
    const float* scores;         // row r is at token_rows[r].offset, or at r * row_stride
    const TokenRow* token_rows;  // [rows], if kOwnScores
    const uint32* lengths;       // [rows] or null for all columns; if not kOwnScores
    int* indices;                // [rows, kTopK]
    int* slots;                  // [rows, kTopK], if kSlots == 2
    float* values;               // [rows, kTopK], if kValues
    const Window* window;        // the rows to select from, and by how many blocks; or null
    int64 row_stride;            // elements, if not kOwnScores
    int first_row, end_row;      // the rows to select from, if window is null
    int first_column;    // `scores` holds the columns from here on; 0 if kSlots or kCluster > 1
    int columns;         // columns of a row, at most
    int signed_lengths;  // lengths are int32
    RaggedBatch batch;   // if kLocates
};

constexpr int kVectors = 4;  // of a thread in a chunk
static_assert(kVectors == 4 && kVectorColumns < 256, "a byte of a word counts for each vector");
constexpr int kChunk = kThreads * kVector * kVectors;
// kTopK candidates and a chunk, or kTopK candidates of each block.
constexpr int kOfCluster = (kCluster - 1) * kTopK;
constexpr int kCapacity = kTopK + (kChunk > kOfCluster ? kChunk : kOfCluster);
// Columns up to which the first block of a cluster selects alone, from the row in shared memory: a
// graph that was captured for long rows may meet short ones, and for these that is faster than a
// list.
constexpr int kStaged = kChunk;
constexpr bool kRowsFit = true;  // those of staged_row.cuh
#include "candidates.cuh"
#include "staged_row.cuh"
static_assert(kCluster == 1 || kStaged >= kTopK, "one block has rows up to kTopK");
static_assert(sizeof(staged::Memory) <= sizeof(CandidateList), "they take the same memory");
static_assert(kRows * sizeof(Shared) == kSharedBytes, "_plan/selection.py computes it too");
#include "threshold_guess.cuh"

// More blocks on a multiprocessor hide more of the memory's latency. 64 registers a thread suffice
// for 1024 threads on sm_90a; other targets need more for a caller's rows, and sm_100a for values
// as well.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
constexpr bool kManyRegisters = false;
#elif __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr bool kManyRegisters = !kOwnScores || kValues;
#else
constexpr bool kManyRegisters = !kOwnScores;
#endif
constexpr int kResidentThreads = kManyRegisters ? 768 : 1024;
constexpr int kBlockThreads = kRows * kThreads;
constexpr bool kOneResident = kCluster > 1 || kBlockThreads == 1024;
constexpr int kWantedBlocks = kOneResident ? 1 : kResidentThreads / kBlockThreads;

// The columns of a row that a block reads.
struct Part {
    const float* scores;
    int length;
    int first_column;
};

__device__ __forceinline__ Part part_of_block(const Part& row) {
    if (kCluster == 1) return row;
    const int vectors = (row.length + kVectorColumns - 1) / kVectorColumns;
    const int each = (vectors + kCluster - 1) / kCluster * kVectorColumns;
    const int first = min(int(rank_in_cluster()) * each, row.length);
    return {row.scores + first, min(row.length - first, each), first};
}

// Whether the next chunk is loaded while this one is filtered. In clusters registers suffice.
constexpr bool kPrefetches = kCluster > 1;

// A thread's scores of a chunk.
struct ChunkScores {
    float4 vectors[kVectors];

    // The warp's and the thread's first column in the first chunk. A warp's columns are adjacent.
    static __device__ __forceinline__ int first_of_warp() {
        return warp_of_row() * (kVectorColumns * kVectors);
    }
    static __device__ __forceinline__ int first() {
        return first_of_warp() + threadIdx.x % kWarpSize * kVector;
    }

    __device__ __forceinline__ void load(const Part& part, int column) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            vectors[j] = load_columns(part.scores, column + j * kVectorColumns, part.length);
        }
    }

    __device__ __forceinline__ float& operator()(int j, int e) { return (&vectors[j].x)[e]; }
};

// Called by one thread, if there is no guess.
__device__ __forceinline__ void forget_guess(Shared& shared) {
    shared.lowest = shared.highest = __uint_as_float(kQuietNaN);
    shared.crowded = false;
}

// Appends the columns that reach the limit to a list of `count` candidates. Returns the new count.
// everything: there is no limit until the list is cut, so every selectable column is appended.
// first_chunk_only: scores that equal the guess are appended only in the first chunk, and only by
// warps whose `limit` is the guess; else they are appended until the list holds kTopK candidates.
// next: the first chunk, if chunks are prefetched.
template <bool everything>
__device__ __forceinline__ int filter_row(Shared& shared, int count, const Part& part, float limit,
                                          bool first_chunk_only, ChunkScores next) {
    const int first = ChunkScores::first();
    const float infinity = __uint_as_float(0x7f800000u), nan = __uint_as_float(kMissing);
    const int length = part.length;
    bool all = everything;
    int turn = 0;
    for (int start = 0; start < length; start += kChunk) {
        const int base = start + first;  // the thread's first column
        ChunkScores scores = next;
        if (kPrefetches) next.load(part, base + kChunk);
        else scores.load(part, base);
        if (start + kChunk > length) {  // a NaN reaches no limit
#pragma unroll
            for (int j = 0; j < kVectors; ++j) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    if (base + j * kVectorColumns + e >= length) scores(j, e) = nan;
                }
            }
        }
        const auto compared = [&](int j, int e) {  // what is compared with the limit
            const float score = scores(j, e);
            if (!everything || !all) return score;
            const bool is_column = base + j * kVectorColumns + e < length;
            const bool selectable = kOwnScores ? __float_as_uint(score) != kMissing : is_column;
            return selectable ? infinity : nan;
        };
        uint32 own = 0, total;  // a byte for each vector
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            add_if_at_least<1>(own, compared(0, e), limit);
            add_if_at_least<1 << 8>(own, compared(1, e), limit);
            add_if_at_least<1 << 16>(own, compared(2, e), limit);
            add_if_at_least<1u << 24>(own, compared(3, e), limit);
        }
        const uint32 inclusive = inclusive_sum_of_lanes(own);
        const uint32 of_warp = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
        const uint32 warp_count = __dp4a(of_warp, 0x01010101u, 0u);
        int place = count + sum_of_warps(shared, turn, warp_count, total);
        if (count + int(total) > kCapacity) {
            sync_row();
            limit = cut(shared, count);
            count = kTopK;
            all = false;
            start -= kChunk;  // the chunk is read again: to keep it would take registers
            if (kPrefetches) next.load(part, base);
            continue;
        }
        count += total;
        const uint32 before = inclusive - own;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            const Candidate* begin = shared.list + place + (before >> 8 * j & 0xff);
            uint32 address = uint32(__cvta_generic_to_shared(begin));
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                append_if_at_least(address, __float_as_uint(scores(j, e)),
                                   part.first_column + base + j * kVectorColumns + e,
                                   compared(j, e), limit);
            }
            place += of_warp >> 8 * j & 0xff;
        }
        if (!everything && (first_chunk_only || count >= kTopK) && limit == shared.lowest) {
            limit = limit_above(ordered_key(limit));
        }
    }
    sync_row();
    return count;
}

template <bool everything>
__device__ __forceinline__ int filter_row(Shared& shared, int count, const Part& part,
                                          float limit) {
    ChunkScores next;
    if (kPrefetches) next.load(part, ChunkScores::first());
    return filter_row<everything>(shared, count, part, limit, false, next);
}

// Lists the columns whose page exists and returns how many.
__device__ __forceinline__ int list_existing(Shared& shared, int length, const PagedKeys& keys,
                                             int sequence) {
    int count = 0, turn = 0;
    for (int base = 0; base < length; base += kThreads) {
        const int column = base + thread_of_row();
        const bool exists = column < length && keys.exists(sequence, column);
        const uint32 warp = __ballot_sync(kFullWarp, exists);
        const uint32 lanes_below = (1u << threadIdx.x % kWarpSize) - 1;
        uint32 total;
        const int place = count + sum_of_warps(shared, turn, __popc(warp), total);
        if (exists) shared.list[place + __popc(warp & lanes_below)] = {0, column};
        count += total;
    }
    sync_row();
    return count;
}

// A list that a selection from earlier columns has left in the results.
struct Restored {
    int count;
    uint32 least_key;
};

// Reads indices and values, which this kernel also writes, so the loads are not ld.global.nc. Not
// inlined, to save registers in filter_row.
__device__ __noinline__ Restored restore_list(Shared& shared, const int* indices,
                                              const float* values) {
    KeyRange keys, places;
    for (int i = thread_of_row(); i < kTopK; i += kThreads) {
        if (indices[i] < 0) break;
        shared.list[i] = {__float_as_uint(values[i]), indices[i]};
        keys.add(ordered_key(values[i]));
        places.add(i + 1);
    }
    const int count = int(range_of_row(shared, places).high);
    sync_row();
    return {count, range_of_row(shared, keys).low};
}

// Lists the columns of a short row. If the row is continued, the list begins with the selection
// from the columns before, and the columns are added that may replace some of it.
__device__ __forceinline__ int update_list(Shared& shared, const Part& row,
                                           const ResultRow& result) {
    Restored before{};
    if (kOwnScores && kValues && !kSlots && row.first_column > 0) {
        before = restore_list(shared, result.indices(), result.values());
    }
    if (before.count < kTopK) return filter_row<true>(shared, before.count, row, 0.0f);
    return filter_row<false>(shared, before.count, row, limit_above(before.least_key));
}

// Lists all selectable columns. Rarely needed: in clusters it is a function, so that the code of
// usual rows is together; elsewhere a call takes registers that are scarce.
__device__ __noinline__ int list_all_apart(Shared& shared, Part part) {
    return filter_row<true>(shared, 0, part, 0.0f);
}

__device__ __forceinline__ int list_all(Shared& shared, const Part& part) {
    if (kCluster > 1) return list_all_apart(shared, part);
    return filter_row<true>(shared, 0, part, 0.0f);
}

// Lists the candidates of a row of more than kTopK columns. The first block of a cluster has them.
__device__ __forceinline__ int list_candidates(Shared& shared, const Part& row) {
    const Part part = part_of_block(row);
    int count;
    for (bool again = false;; again = true) {
        ChunkScores next;
        const Guess guess =
            guess_from_sample(shared, row.scores, row.length, again ? 4 * kTopK : kTopK, [&] {
                if (kPrefetches) next.load(part, ChunkScores::first());
            });
        if (thread_of_row() == 0) {
            shared.lowest = guess.limit;
            shared.highest = guess.highest;
            shared.crowded = guess.plateau > kSamples / 16;
        }
        // Only the first columns of a plateau are needed. If it is dense, the columns before
        // `reach` should have enough: warps that begin beyond list none of it, and no warp does
        // after the first chunk. `reach` is below kChunk. So either a block's part ends within its
        // first chunk, or the next part begins beyond `reach`; in both cases the listed columns
        // precede those left out.
        constexpr float kEnough = (1.1f * kTopK + 32.0f) * kSamples;
        const float reach = __fdividef(kEnough, float(guess.plateau));
        const bool first_chunk_only = !again && guess.plateau > kEnough / kChunk;
        float limit = guess.limit;
        if (first_chunk_only && part.first_column + ChunkScores::first_of_warp() >= reach) {
            limit = limit_above(ordered_key(limit));
        }
        count = filter_row<false>(shared, 0, part, limit, first_chunk_only, next);
        count = gather(shared, count);
        if (again || count >= kTopK || guess.limit == __uint_as_float(kMinusInfinity)) break;
    }
    if (count < kTopK) {  // after two bad guesses, or because of NaN scores
        if (thread_of_row() == 0) forget_guess(shared);
        count = gather(shared, list_all(shared, part));
    }
    return count;
}

// Selects from a short row of a cluster, by its first block.
__device__ __forceinline__ void select_staged(Shared& shared, const Part& row,
                                              const ResultRow& result, const Params& p) {
    auto& memory = reinterpret_cast<staged::Memory&>(shared.list);
    const int taken = staged::select(shared, memory, {row.scores, row.length}, result);
    if constexpr (kSlots > 0) {
        __syncthreads();
        result.write_slots(p.keys, shared.sequence, p.slots, taken, thread_of_row(),
                           [&](int place) { return result.indices()[place]; });
    }
}

__device__ __forceinline__ void select(Shared& shared, const Part& row, const ResultRow& result,
                                       const Params& p, const TokenRow& token) {
    if (thread_of_row() == 0) {
        forget_guess(shared);
        if (kSlots) shared.sequence = token.sequence;
    }
    int count;
    if (kUnscored && token.kv_len <= kTopK) {
        count = list_existing(shared, row.length, p.keys, token.sequence);
    } else if (kCluster > 1 && row.length <= kStaged) {
        select_staged(shared, row, result, p);
        return;
    } else if (kCluster == 1 && (row.first_column > 0 || row.length <= kTopK)) {
        count = update_list(shared, row, result);
    } else {
        count = list_candidates(shared, row);
        if (rank_in_cluster() > 0) return;
    }
    const Threshold threshold = find_threshold(shared, count);
    const auto write = [&](bool selected, int place, const Candidate& found) {
        const float score = __uint_as_float(found.score);
        if (kSlots > 0 && selected) shared.list[place] = found;
        if (kSlots != 1) result.emit_if(selected, place, found.column, score);
        else if (kValues) store_if(selected, result.values() + place, score);
    };
    const int taken = take(shared, count, threshold, write);
    if constexpr (kSlots > 0) {
        sync_row();
        result.write_slots(p.keys, shared.sequence, p.slots, taken, thread_of_row(),
                           [&](int place) { return shared.list[place].column; });
    }
    result.pad(taken, thread_of_row());
}

extern "C" __global__ void __launch_bounds__(kBlockThreads,
                                             resident_blocks(kSharedBytes, kWantedBlocks))
#if kCluster > 1
    __cluster_dims__(kCluster, 1, 1)
#endif
        topk_filter(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    const int place = threadIdx.x / kThreads;  // of the row among the block's rows
    Shared& shared = reinterpret_cast<Shared*>(dynamic_shared)[place];
    clear_bins(shared);
    let_next_launch_begin();
#if kCluster > 1
    open_cluster(shared.received);
#endif
    if (!kLocates) wait_for_launch_before();
    const Window* window = p.window;
    if (window && blockIdx.x >= window->selection_blocks) return;
    // The window is read for each row, because registers are scarce.
    const auto blocks_at_work = [&] {
        return window ? min(window->selection_blocks, int(gridDim.x)) : int(gridDim.x) / kCluster;
    };
    const uint32 first_row = window ? window->first_token : p.first_row;
    for (uint32 r = first_row + blockIdx.x / kCluster * kRows + place;
         r < (window ? window->end_token : p.end_row); r += blocks_at_work() * kRows) {
        const TokenRow token = find_row(p, r);
        if (kLocates) wait_for_launch_before();
        const int length = min(max(token.kv_len - p.first_column, 0), p.columns);
        if (p.first_column > 0 && length == 0) continue;
        if (kCluster > 1 && length <= kStaged && rank_in_cluster() > 0) continue;
        select(shared, {p.scores + token.offset, length, p.first_column}, {p.indices, p.values, r},
               p, token);
        sync_row();
    }
}
