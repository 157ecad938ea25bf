// spans[t] = {the sequence token t belongs to, how many keys t sees}, -1 and 0 for a token of none.
//
// input_row_offsets [batch + 1] is read as if clamped to [0, total_seq_len] and then replaced by its
// running maximum, so that offsets which run backwards or out of range give no token two sequences.
// Under that reading the sequence of t ends at the first offset greater than t, and begins at the
// largest offset before it: no prefix maximum has to be written down.
// num_keys = cache_length + (causal: place in the sequence + 1, null: sequence length), within [0, max_keys].
//
// One warp per token, 32 offsets a step.
#include "common.cuh"

static_assert(kThreads % kWarpSize == 0, "a warp per token");
static_assert(kCausal == 0 || kCausal == 1, "which keys a token sees");
static_assert(kSignedOffsets == 0 || kSignedOffsets == 1, "input_row_offsets: int32 or uint32");
static_assert(kSignedLengths == 0 || kSignedLengths == 1, "k_cache_lengths: int32 or uint32");

extern "C" __global__ void __launch_bounds__(kThreads) locate_tokens(
    const uint32* __restrict__ input_row_offsets, const uint32* __restrict__ k_cache_lengths,
    TokenSpan* __restrict__ spans, int total_seq_len, int batch, int max_keys) {
    const int lane = threadIdx.x % kWarpSize;
    const int token = blockIdx.x * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    if (token >= total_seq_len) return;

    int64 begin = 0;  // the largest offset so far; all of them are <= token
    int64 end = 0;
    int sequence = -1;
    for (int base = 0; base <= batch; base += kWarpSize) {
        const int i = base + lane;
        const int64 offset = i <= batch ? widen(input_row_offsets[i], kSignedOffsets) : int64(0);
        const uint32 past = __ballot_sync(kFullWarp, offset > token);
        const int first = past ? __ffs(past) - 1 : kWarpSize;
        int64 before = lane < first ? offset : int64(0);
#pragma unroll
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            before = max(before, __shfl_xor_sync(kFullWarp, before, step));
        }
        begin = max(begin, before);
        if (past) {
            sequence = base + first - 1;  // -1 where even the first offset lies beyond the token
            end = min(__shfl_sync(kFullWarp, offset, first), int64(total_seq_len));
            break;
        }
    }
    if (lane != 0) return;
    int64 num_keys = 0;
    if (sequence >= 0) {
        num_keys = widen(k_cache_lengths[sequence], kSignedLengths);
        num_keys += kCausal ? token - begin + 1 : end - begin;
        num_keys = min(max(num_keys, int64(0)), int64(max_keys));
    }
    spans[token] = {sequence, int(num_keys)};
}
