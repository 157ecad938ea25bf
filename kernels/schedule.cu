// token_rows[t] = {the sequence token t belongs to, how many keys t sees, where its row of scores begins}, -1 and 0 for a
// token of none;
// work_ranges[i, j, c] = the share of block c in the launch that scores the i-th tokens against the j-th chunk_keys keys
// (scheduler.cuh), counted as one row of launches, of which those from first_launch on are written.
//
// Which tokens a launch scores: the i-th chunk_tokens, whose rows begin row_stride elements after one another; or, with
// a window, those whose rows begin in it (row_layout.cuh), and then ranges[i] tells them, and the last blocks have no
// share, as many as are left to selection from the launch before.
//
// input_row_offsets [batch + 1] is read as if clamped to [0, total_seq_len] and then replaced by its
// running maximum, so that offsets which run backwards or out of range give no token two sequences.
// kv_len = cache_length + (causal: place in the sequence + 1, null: sequence length), within [0, max_keys]; of
// lengths that count the new tokens (kTotalLengths) cache_length is what is left without them.
//
// One warp per token, 32 offsets a step, and then one per share.
#include "common.cuh"
#include "row_layout.cuh"
#include "scheduler.cuh"

static_assert(kThreads % kWarpSize == 0, "a warp per token");
static_assert(kCausal == 0 || kCausal == 1, "which keys a token sees");
static_assert(kSignedOffsets == 0 || kSignedOffsets == 1, "input_row_offsets: int32 or uint32");
static_assert(kSignedLengths == 0 || kSignedLengths == 1, "k_cache_lengths: int32 or uint32");
static_assert(kTotalLengths == 0 || kTotalLengths == 1, "whether lengths count the new tokens");
static_assert(sizeof(TokenRow) == kSpanBytes && sizeof(WindowTokens) == kRangeBytes, "what the host lays out");
static_assert(sizeof(WorkRange) == kShareBytes && sizeof(Reserved) == kReservedLengths, "what the host lays out");
static_assert(kRowAlignment == 4, "elements that the room of a row is a multiple of: 16 bytes, which selection reads");
static_assert(kWindows >= 1, "windows that packed rows are cut into at least");
static_assert(kTileTokens >= 0 && kTileTokens <= kUnitKeys, "tokens of a tile; 0: no work_ranges");

extern "C" __global__ void __launch_bounds__(kThreads) schedule(
    const uint32* __restrict__ input_row_offsets, const uint32* __restrict__ k_cache_lengths,
    TokenRow* __restrict__ token_rows, WorkRange* __restrict__ work_ranges, WindowTokens* __restrict__ ranges, int total_seq_len,
    int batch_size, int max_keys, int chunk_tokens, int chunk_keys, int skip, int first_launch, int launches,
    int all_launches, int blocks, int64 row_stride, int64 window, const __grid_constant__ Reserved reserved) {
    const bool first_lane = threadIdx.x % kWarpSize == 0;
    const int64 warp = int64(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    Batch batch{input_row_offsets, k_cache_lengths, batch_size, total_seq_len, 0, total_seq_len, max_keys, 0,
                max_keys, skip, bool(kCausal), bool(kSignedOffsets), bool(kSignedLengths), bool(kTotalLengths)};
    const int tokens = first_launch == 0 ? total_seq_len : 0;  // whose token_rows are not written yet
    if (warp < tokens) {
        const int token = int(warp);
        TokenRow span = locate(batch, token);
        if (window > 0) span.row = place_in_window(batch, token, span.sequence, window, all_launches);
        else span.row = token % chunk_tokens * row_stride;
        if (first_lane) token_rows[token] = span;
        return;
    }
    if (kTileTokens == 0) return;
    const int64 share = warp - tokens;
    if (share >= int64(launches) * blocks) return;
    const int64 launch = first_launch + share / blocks;
    const int block = int(share % blocks);
    int sharing = blocks;
    if (window > 0) {
        WindowTokens range = tokens_of_window(batch, window, row_stride, launch, all_launches, reserved);
        batch.first = range.first;
        batch.end = range.end;
        if (range.first > 0 || range.end == 0) sharing -= range.blocks;  // nothing is selected beside the first
        if (launch + 1 == all_launches) range.blocks = blocks;
        if (first_lane && block == 0) ranges[launch] = range;
    } else {
        const int64 key_chunks = (int64(max_keys) + chunk_keys - 1) / chunk_keys;
        const int64 first = launch / key_chunks * chunk_tokens;
        batch.first = int(first);
        batch.end = int(min(first + chunk_tokens, int64(total_seq_len)));
        batch.first_key = int(launch % key_chunks * chunk_keys);
        batch.max_keys = min(chunk_keys, max_keys - batch.first_key);
    }
    WorkRange counted;
    constexpr bool kWeighted = true;  // work_ranges are counted here for two token groups, see index_scores_sm90.cu
    if (block < sharing) counted = work_range_of_block<kTileTokens ? kTileTokens : 1, kWeighted>(batch, block, sharing);
    if (first_lane) work_ranges[share] = counted;
}
