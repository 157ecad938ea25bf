// A row of scores, which selection reads, and a row of results, which it writes.
#pragma once
#include "common.cuh"
#include "slots.cuh"
#include "token_row.cuh"

static_assert(kSlots == 0 || ((kSlots == 1 || kSlots == 2) && kOwnScores == 1),
              "a caller's columns have no slots");

constexpr int kVector = 4;                           // columns that one load of a thread takes
constexpr int kVectorColumns = kVector * kWarpSize;  // columns that one load of a warp takes

// Where a row stands and how many columns it has: from token_rows if this package has scored it,
// else from the caller's lengths, int32 or uint32; without lengths a row has all columns.
template <class Params>
__device__ __forceinline__ TokenRow find_row(const Params& p, int64 row) {
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

// A row of results: the selected columns or their slots, or both, and their scores if kValues.
struct ResultRow : SlotFinder<(kSlots > 0)> {
    int* all_indices;   // [rows, kTopK]
    float* all_values;  // [rows, kTopK]
    uint32 row;

    template <class Params>
    __device__ __forceinline__ ResultRow(const Params& p, uint32 row, const int& sequence)
        : SlotFinder(p, sequence), all_indices(p.indices), all_values(p.values), row(row) {}

    __device__ __forceinline__ int* indices() const { return all_indices + int64(row) * kTopK; }
    __device__ __forceinline__ float* values() const { return all_values + int64(row) * kTopK; }
    __device__ __forceinline__ int* slots() const { return all_slots + int64(row) * kTopK; }

    // The one function that writes a selected column. `entry` is look_up(column).
    __device__ __forceinline__ void emit(int place, int column, float score,
                                         PagedKeys::Entry entry) const {
        indices()[place] = kSlots == 1 ? slot(entry) : column;
        if (kSlots == 2) slots()[place] = slot(entry);
        if (kValues) values()[place] = score;
    }

    // Fills the places from `first` on, for which there are no columns. Called by kThreads threads.
    __device__ __forceinline__ void pad(int first, int thread) const {
        for (int i = first + thread; i < kTopK; i += kThreads) {
            indices()[i] = -1;
            if (kSlots == 2) slots()[i] = -1;
            if (kValues) values()[i] = __uint_as_float(kMinusInfinity);
        }
    }
};
