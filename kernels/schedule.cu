// Runs before scoring and writes what each token, block and launch needs to know:
//
// token_rows[t]: the sequence of token t, its kv_len, and where its row of scores begins.
// work_ranges[i, c]: what block c of scoring launch first_launch + i scores (scheduler.cuh).
// windows[l]: if rows are packed, the tokens whose rows launch l scores (row_layout.cuh).
//
// kv_len(t) = floor((seen(t) + kpool (key_step - 1 - key_start)) / (kpool key_step)), within
// [0, max_kv_len]. seen(t) = cache_length + (causal: place in the sequence + 1; null: tokens of the
// sequence). cache_length is k_cache_lengths, or k_total_lengths minus the number of new tokens.
// In a plain call kpool and key_step are 1 and key_start is 0, so kv_len(t) = seen(t).
//
// If rows are not packed, the launches take the batch in parts of part_tokens tokens by part_keys
// keys; the parts of the same tokens follow one another. If rows are packed, each launch takes a
// window and all keys. Beside a selection, the last blocks of a window's launch get no work range:
// their multiprocessors are left to the selection.
//
// The first warps take a token each and read 32 offsets at a time. The others take a work range
// each.
#include "common.cuh"
#include "row_layout.cuh"
#include "scheduler.cuh"

static_assert(kThreads % kWarpSize == 0, "whole warps");
static_assert(kTileTokens >= 0 && kTileTokens <= kUnitKeys, "tokens of a tile; 0: no work ranges");
static_assert(kMinWindows >= 1, "windows of packed rows, if there are that many launches");

struct Params {
    RaggedBatch batch;
    TokenRow* token_rows;    // [total_tokens], written if first_launch is 0
    WorkRange* work_ranges;  // [launches, blocks]
    Window* windows;         // [all_launches]; null if rows are not packed
    int64 row_stride;        // elements; if rows are packed, of the longest row possible
    int64 window_size;       // elements; 0: rows are not packed
    int part_tokens;         // tokens that a launch scores
    int part_keys;           // keys that it scores them against
    int first_launch;        // the launches whose work ranges are written
    int launches;
    int all_launches;
    int blocks;  // of a scoring launch
    SelectionBlocks selection_blocks;
};

__device__ __forceinline__ void write_token_row(const Params& p, int token) {
    TokenRow row = locate_token(p.batch, token);
    if (p.window_size > 0) {
        const int min_windows = min(p.all_launches, kMinWindows);
        row.offset = offset_in_window(p.batch, token, row.sequence, p.window_size, min_windows);
    } else {
        row.offset = token % p.part_tokens * p.row_stride;
    }
    if (threadIdx.x % kWarpSize == 0) p.token_rows[token] = row;
}

__device__ __forceinline__ void write_work_range(const Params& p, int64 i) {
    const bool first_lane = threadIdx.x % kWarpSize == 0;
    const int64 launch = p.first_launch + i / p.blocks;
    const int block = int(i % p.blocks);
    int scoring_blocks = p.blocks;
    ScoringLaunch work{p.batch, 0, p.batch.total_tokens, 0, p.batch.max_kv_len};
    if (p.window_size > 0) {
        const int min_windows = min(p.all_launches, kMinWindows);
        Window window = find_window(p.batch, p.window_size, min_windows, p.row_stride, launch,
                                    p.all_launches, p.selection_blocks);
        work.first_token = window.first_token;
        work.end_token = window.end_token;
        // No selection runs beside the first window that has rows. After the last window, selection
        // has the whole GPU.
        const bool beside = window.first_token > 0 || window.end_token == 0;
        if (beside) scoring_blocks -= window.selection_blocks;
        if (launch + 1 == p.all_launches) window.selection_blocks = p.blocks;
        if (first_lane && block == 0) p.windows[launch] = window;
    } else {
        const int64 key_chunks = (int64(p.batch.max_kv_len) + p.part_keys - 1) / p.part_keys;
        const int64 first_token = launch / key_chunks * p.part_tokens;
        work.first_token = int(first_token);
        work.end_token = int(min(first_token + p.part_tokens, int64(p.batch.total_tokens)));
        work.first_key = int(launch % key_chunks * p.part_keys);
        work.num_keys = min(p.part_keys, p.batch.max_kv_len - work.first_key);
    }
    constexpr int kTile = kTileTokens > 0 ? kTileTokens : 1;
    WorkRange range;
    if (block < scoring_blocks) {
        range = find_work_range<kTile, kHalfTileUnitKeys>(work, block, scoring_blocks);
    }
    if (first_lane) p.work_ranges[i] = range;
}

extern "C" __global__ void __launch_bounds__(kThreads) schedule(const __grid_constant__ Params p) {
    const int64 warp = int64(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    const int tokens = p.first_launch == 0 ? p.batch.total_tokens : 0;
    if (warp < tokens) {
        write_token_row(p, int(warp));
    } else if (kTileTokens > 0 && warp - tokens < int64(p.launches) * p.blocks) {
        write_work_range(p, warp - tokens);
    }
}
