// A row of scores, which selection reads, and a row of results, which it writes.
#pragma once
#include "common.cuh"
#include "paged_keys.cuh"
#include "ptx.cuh"
#include "row_layout.cuh"

static_assert(kLocates == 0 || (kLocates == 1 && kOwnScores == 1),
              "whether rows are found in the batch; a caller's rows are not");
static_assert(kSlots == 0 || ((kSlots == 1 || kSlots == 2) && kOwnScores == 1),
              "where slots go; a caller's columns have none");

constexpr int kVector = 4;                           // columns that one load of a thread takes
constexpr int kVectorColumns = kVector * kWarpSize;  // columns that one load of a warp takes

// Where a row stands and how many columns it has. If this package has scored it: from the batch
// (kLocates) or from token_rows. Else from the caller's lengths, int32 or uint32; without lengths a
// row has all columns. All lanes of a warp take part.
//
// With kLocates, nothing is read that the launch before has written. So a decode selection that
// begins early finds its first row while scoring ends: one row of 8192 columns takes 0.5 us less on
// an H200.
template <class Params>
__device__ __forceinline__ TokenRow find_row(const Params& p, int64 row) {
    if constexpr (kLocates) {
        TokenRow found = locate_token(p.batch, int(row));
        found.offset = (row - p.first_row) * p.row_stride;
        return found;
    }
    if (kOwnScores) return p.token_rows[row];
    const int64 offset = row * p.row_stride;
    if (!p.lengths) return {0, p.columns, offset};
    const uint32 length = p.lengths[row];
    if (p.signed_lengths && int(length) < 0) return {0, 0, offset};
    return {0, int(min(length, uint32(p.columns))), offset};
}

// Loads kVector columns. Those from `length` on are unspecified. The package's own scoring writes
// whole vectors. The loads are ld.global.nc: no kernel here writes scores.
__device__ __forceinline__ float4 load_columns(const float* scores, int column, int length) {
    float4 found{};
    if (kOwnScores) {
        if (column < length) found = __ldg(reinterpret_cast<const float4*>(scores + column));
        return found;
    }
    const float* const own = scores + column;
    const int left = length - column;
    if (left > 0) found.x = __ldg(own);
    if (left > 1) found.y = __ldg(own + 1);
    if (left > 2) found.z = __ldg(own + 2);
    if (left > 3) found.w = __ldg(own + 3);
    return found;
}

// A row of results: the selected columns, or (kSlots = 1) their slots in the cache, and their
// scores if kValues.
struct ResultRow {
    int* all_indices;   // [rows, kTopK]
    float* all_values;  // [rows, kTopK]
    uint32 row;

    __device__ __forceinline__ int* indices() const { return all_indices + int64(row) * kTopK; }
    __device__ __forceinline__ float* values() const { return all_values + int64(row) * kTopK; }

    // Writes the slots of the row's `count` columns, where kSlots says. Called by kThreads threads.
    // The columns are looked up after all are known, in order: the threads' loads are in flight
    // together, and neighbours find the same entries. To look up each column where it is selected
    // took 0.5 us longer for one row of 131072 columns (H200).
    template <class ColumnOf>
    __device__ __forceinline__ void write_slots(const PagedKeys& keys, int sequence, int* all_slots,
                                                int count, int thread,
                                                const ColumnOf& column_of) const {
        constexpr int kTogether = 4;
        int* const slots = (kSlots == 1 ? all_indices : all_slots) + int64(row) * kTopK;
        for (int base = thread; base < count; base += kThreads * kTogether) {
            PagedKeys::Entry entries[kTogether];
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                const int place = base + j * kThreads;
                entries[j] = keys.look_up(sequence, column_of(place < count ? place : base));
            }
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                const int place = base + j * kThreads;
                if (place < count) slots[place] = keys.slot(entries[j]);
            }
        }
        for (int i = count + thread; kSlots == 2 && i < kTopK; i += kThreads) slots[i] = -1;
    }

    // Writes a column if it is selected. A branch would take longer than stores with a condition.
    __device__ __forceinline__ void emit_if(bool selected, int place, int column,
                                            float score) const {
        store_if(selected, indices() + place, column);
        if (kValues) store_if(selected, values() + place, score);
    }

    // Fills the places from `first` on, for which there are no columns. Called by kThreads threads.
    __device__ __forceinline__ void pad(int first, int thread) const {
        for (int i = first + thread; i < kTopK; i += kThreads) {
            indices()[i] = -1;
            if (kValues) values()[i] = __uint_as_float(kMinusInfinity);
        }
    }
};
