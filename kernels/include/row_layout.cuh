// Where the rows of scores stand in a workspace.
//
// Rows have one stride, or they are packed: every row of a sequence is as long as the sequence's
// longest, rounded up to whole vectors, and the rows of the batch follow one another. Packed rows
// are cut into windows of equal size, counted back from the end. Each launch scores one window,
// namely the rows that begin in it. So a launch needs the memory of one window and one row,
// whatever the lengths are. The host knows only upper bounds on lengths, so it fixes the number of
// launches for the longest rows possible; if rows are shorter, the first launches find no rows. The
// last launch, whose selection has no scoring beside it, always has some. A window may have any
// number of rows, so nothing else may be kept for each of them (mla_fp8/_plan/workspace.py).
#pragma once
#include "scheduler.cuh"
#include "token_row.cuh"

// Finds a token's sequence and kv_len; its row's offset is up to the caller. All lanes of a warp
// take part. The sequence ends at the first offset greater than the token and begins at the largest
// offset before that one, so the running maximum of offsets need not be stored.
__device__ __forceinline__ TokenRow locate_token(const RaggedBatch& batch, int token) {
    const int lane = threadIdx.x % kWarpSize;
    int begin = 0;  // the largest offset so far; all of them are <= token
    for (int base = 0; base <= batch.batch_size; base += kWarpSize) {
        const int i = base + lane;
        const int offset = i <= batch.batch_size ? batch.offset(i) : 0;
        const uint32 greater = __ballot_sync(kFullWarp, offset > token);
        const int first = greater ? __ffs(greater) - 1 : kWarpSize;
        begin = max(begin, __reduce_max_sync(kFullWarp, lane < first ? offset : 0));
        if (greater) {
            const int sequence = base + first - 1;
            if (sequence < 0) break;  // even the first offset is greater than the token
            const int tokens = __shfl_sync(kFullWarp, offset, first) - begin;
            const int new_seen = batch.causal ? token - begin + 1 : tokens;
            const int64 seen = batch.seen_before(sequence, tokens) + new_seen;
            return {sequence, batch.kv_len(seen), 0};
        }
    }
    return {-1, 0, 0};
}

// The packed rows of one sequence.
struct PackedSequence {
    int sequence;
    int first_token, end_token;
    int64 offset;  // of its first row, among all rows of the batch
    int row_stride;
};

// Calls visit(PackedSequence) for each sequence, one in each lane; in the last round some lanes
// have a sequence past the last, without tokens. All lanes of a warp take part. Returns the
// elements of all rows.
template <class Visit>
__device__ __forceinline__ int64 for_each_sequence(const RaggedBatch& batch, const Visit& visit) {
    const int lane = threadIdx.x % kWarpSize;
    int first_token = batch.offset(0);
    int64 elements = 0;
    for (int base = 0; base < batch.batch_size; base += kWarpSize) {
        const int i = base + lane;
        const bool exists = i < batch.batch_size;
        const int end = inclusive_scan<Max>(max(first_token, exists ? batch.offset(i + 1) : 0));
        const int end_before = __shfl_up_sync(kFullWarp, end, 1);
        const int begin = lane == 0 ? first_token : end_before;
        const int tokens = end - begin;
        const int keys = exists ? batch.kv_len(batch.seen_before(i, tokens) + tokens) : 0;
        const int row_stride = (keys + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
        const int64 size = int64(tokens) * row_stride;
        const int64 size_end = inclusive_scan<Sum>(size);
        visit(PackedSequence{i, begin, end, elements + size_end - size, row_stride});
        elements += __shfl_sync(kFullWarp, size_end, kWarpSize - 1);
        first_token = __shfl_sync(kFullWarp, end, kWarpSize - 1);
    }
    return elements;
}

// The elements of a window: at most max_size, and less if all rows together have fewer than
// min_windows times that. Shorter windows leave less to select from after the last launch.
__device__ __forceinline__ int64 window_size(int64 elements, int64 max_size, int min_windows) {
    if (elements >= min_windows * max_size) return max_size;
    // The host keeps min_windows * max_size below 2 ** 32, so 32 bits hold the elements here.
    const uint32 even = (uint32(elements) + min_windows - 1) / min_windows;
    return max((even + kRowAlignment - 1) / kRowAlignment, 1u) * kRowAlignment;
}

// Where in its window a token's row begins: below `max_size` whatever offsets and lengths are.
__device__ __forceinline__ int64 offset_in_window(const RaggedBatch& batch, int token, int sequence,
                                                  int64 max_size, int min_windows) {
    int64 offset = 0;
    const int64 elements = for_each_sequence(batch, [&](const PackedSequence& rows) {
        if (rows.sequence != sequence) return;
        offset = rows.offset + int64(token - rows.first_token) * rows.row_stride;
    });
    offset = __shfl_sync(kFullWarp, offset, max(sequence, 0) % kWarpSize);
    const int64 size = window_size(elements, max_size, min_windows);
    return (size - (elements - offset) % size) % size;
}

// The first token whose row begins at `offset` or later.
__device__ __forceinline__ int first_token_from(const RaggedBatch& batch, int64 offset) {
    if (offset <= 0) return 0;
    int token = batch.total_tokens;  // kept only if offsets or lengths have been changed meanwhile
    for_each_sequence(batch, [&](const PackedSequence& rows) {
        const int64 end = rows.offset + int64(rows.end_token - rows.first_token) * rows.row_stride;
        if (offset <= rows.offset || end < offset) return;
        const int64 rows_before = (offset - rows.offset + rows.row_stride - 1) / rows.row_stride;
        token = rows.first_token + int(rows_before);
    });
    return __reduce_min_sync(kFullWarp, token);
}

// How many blocks the host sets apart for selection while the next window is scored: of_length[i]
// if rows have 2 ** (-i / 2) times the greatest length, on average.
struct SelectionBlocks {
    uint8 of_length[16];

    __device__ __forceinline__ int get(int64 elements, int tokens, int64 max_row) const {
        const float ratio =
            __fdividef(float(max_row) * float(tokens), float(max(elements, int64(1))));
        return of_length[min(int(2.0f * __log2f(fmaxf(ratio, 1.0f)) + 0.5f), 15)];
    }
};

// The window of one of `launches` launches.
__device__ __forceinline__ Window find_window(const RaggedBatch& batch, int64 max_size,
                                              int min_windows, int64 max_row, int64 launch,
                                              int64 launches,
                                              const SelectionBlocks& selection_blocks) {
    const int64 elements = for_each_sequence(batch, [](const PackedSequence&) {});
    const int64 size = window_size(elements, max_size, min_windows);
    const int64 begin = elements - (launches - launch) * size;
    const bool is_last = launch + 1 == launches;
    return {first_token_from(batch, begin),
            is_last ? batch.total_tokens : first_token_from(batch, begin + size),
            selection_blocks.get(elements, batch.total_tokens, max_row)};
}
