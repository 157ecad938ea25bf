// Rewrites the selected columns of whole rows, in place, as positions or slots. For a column of a
// token of sequence b:
//   position = key_start(b) + key_step * column
//   slot     = lookup_table[b, column / page_size] * page_size + column % page_size
// kSlots = 0: `indices` gets positions. 1: `indices` gets slots. 2: `slots` gets slots, and
// `indices` gets positions if kSharded, else it keeps the columns. A -1 stays a -1, and its slot is
// -1. A key whose block number is out of range also gets the slot -1: the table has been changed
// since the key was scored.
//
// The selection kernels write slots themselves where they can. This kernel is for the other cases:
// a shard's columns are not positions, a row that is selected from in parts must keep its columns
// until the last part, and a row with both positions and slots is sorted by score first.
//
// Each thread takes kTogether elements at a time, so that kTogether lookups are in flight.
#include "common.cuh"
#include "paged_keys.cuh"
#include "token_row.cuh"

static_assert(kTopK >= 1 && kTopK <= 65536, "indices per row");
static_assert(kSlots >= 0 && kSlots <= 2, "where slots go");
static_assert(kSharded == 0 || (kSharded == 1 && kSlots != 1), "whether positions are wanted");
static_assert(kSlots > 0 || kSharded == 1, "there is something to do");

struct Params {
    PagedKeys keys;              // if kSlots
    const TokenRow* token_rows;  // [rows]
    const uint32* key_starts;    // [batch], or null: all are key_start; if kSharded
    int* indices;                // [rows, kTopK]
    int* slots;                  // [rows, kTopK], if kSlots == 2
    int64 rows;
    int key_start, key_step;  // if kSharded
};

constexpr int kTogether = 4;
constexpr int64 kMaxPosition = 0x7fffffff;

// Positions of valid input fit in an int; others are clamped.
__device__ __forceinline__ int position_of(const Params& p, int sequence, int column) {
    const uint32 start = p.key_starts ? __ldg(p.key_starts + sequence) : p.key_start;
    const int64 first = min(int64(start), kMaxPosition);
    return int(min(first + int64(p.key_step) * column, kMaxPosition));
}

extern "C" __global__ void __launch_bounds__(kThreads)
    translate_topk(const __grid_constant__ Params p) {
    const int64 elements = p.rows * kTopK;
    const int64 step = int64(gridDim.x) * (kThreads * kTogether);
    for (int64 base = int64(blockIdx.x) * (kThreads * kTogether) + threadIdx.x; base < elements;
         base += step) {
        int columns[kTogether], positions[kTogether];
        PagedKeys::Entry entries[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int64 i = base + j * kThreads;
            columns[j] = i < elements ? p.indices[i] : -1;
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            if (columns[j] < 0) continue;
            const int sequence = __ldg(&p.token_rows[(base + j * kThreads) / kTopK].sequence);
            positions[j] = kSharded ? position_of(p, sequence, columns[j]) : columns[j];
            if (kSlots) entries[j] = p.keys.look_up(sequence, columns[j]);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int64 i = base + j * kThreads;
            const bool is_key = columns[j] >= 0;
            const int slot = kSlots && is_key ? p.keys.slot(entries[j]) : -1;
            if (kSlots == 2 && i < elements) p.slots[i] = slot;
            if (!is_key) continue;
            if (kSlots == 1) p.indices[i] = slot;
            else if (kSharded) p.indices[i] = positions[j];
        }
    }
}
