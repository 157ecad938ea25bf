// indices[r] = the first min(kTopK, n) of the n selectable columns of row r, by the total order of
// docs/contract.md; in ascending column order, followed by -1. values[r] (if kValues) = the
// scores of these columns, then -inf. The slots of these columns in the cache, in the same order,
// take the place of the columns if kSlots = 1, and are written to slots[r] if kSlots = 2.
//
// A block selects from one row at a time (staged_row.cuh).
//
// kOwnScores = 1: this package's scoring has written the rows. They begin on 16 bytes and consist
// of whole vectors, and kMissing marks keys whose page does not exist, which are not selectable.
// kOwnScores = 0: the rows are a caller's matrix.
#include "common.cuh"
#include "ptx.cuh"
#include "residency.cuh"
#include "row.cuh"

constexpr int kRows = 1;  // of a block
#include "histogram.cuh"
#include "staged_row.cuh"

static_assert(kTopK >= 1 && kTopK <= 65536, "indices per row");
static_assert(kRowsFit == 0 || kRowsFit == 1, "whether no row has more than kStaged columns");
static_assert(kValues == 0 || kValues == 1, "whether scores are written beside the indices");
static_assert(kOwnScores == 0 || kOwnScores == 1, "whose scores these are");

struct Params {
    const float* scores;         // row r is at token_rows[r].offset, or at r * row_stride
    const TokenRow* token_rows;  // [rows], if kOwnScores
    const uint32* lengths;       // [rows] or null for all columns; if not kOwnScores
    int* indices;                // [rows, kTopK]
    float* values;               // [rows, kTopK], if kValues
    int64 row_stride;            // elements, if not kOwnScores
    int first_row, end_row;      // the rows to select from
    int columns;                 // columns of a row, at most
    int signed_lengths;          // lengths are int32
    PagedKeys keys;              // if kSlots
    int* slots;                  // [rows, kTopK], if kSlots == 2
    RaggedBatch batch;           // if kLocates
};

struct Shared : Histogram {
    int sequence;  // whose keys are selected, if kSlots
    staged::Memory memory;
};
static_assert(sizeof(Shared) == kSharedBytes, "_plan/selection.py computes it too");

extern "C" __global__ void __launch_bounds__(kThreads,
                                             resident_blocks(kSharedBytes, 1024 / kThreads))
    topk_histogram(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    clear_bins(shared);
    let_next_launch_begin();
    if (!kLocates) wait_for_launch_before();
    for (uint32 r = p.first_row + blockIdx.x; r < p.end_row; r += gridDim.x) {
        const TokenRow token = find_row(p, r);
        if (kLocates) wait_for_launch_before();
        const int length = min(max(token.kv_len, 0), p.columns);
        if (kSlots > 0 && threadIdx.x == 0) shared.sequence = token.sequence;
        const ResultRow result{p.indices, p.values, r};
        const int taken =
            staged::select(shared, shared.memory, {p.scores + token.offset, length}, result);
        if constexpr (kSlots > 0) {
            __syncthreads();
            result.write_slots(p.keys, shared.sequence, p.slots, taken, threadIdx.x,
                               [&](int place) { return result.indices()[place]; });
        }
        __syncthreads();  // shared memory is free for the next row
    }
}
