// The scheduler: divides the scoring of a ragged batch evenly among the blocks of a launch, on the
// device.
//
// A tile is up to tile_tokens tokens of one sequence with all keys that they see. Its work is
// counted in units of kUnitKeys keys, or of half_tile_unit_keys keys if the tile is at most half
// full: fewer tokens take less time per key. (On an H200 with 64 heads, 128 keys take 1.0 us in a
// half-full tile and 1.8 us in a full one.) If a launch has U units and G blocks, each block scores
// U / G successive units: its work range, which may begin and end in the middle of a tile.
//
// Every count is computed in closed form from offsets and lengths. So nothing is planned on the
// host, and the upper bounds on lengths that a captured graph keeps cost nothing.
#pragma once
#include "common.cuh"
#include "warp_scan.cuh"

constexpr int kUnitKeys = 64;

__device__ constexpr int log2(int n) { return n <= 1 ? 0 : 1 + log2(n / 2); }

// The logarithm of the keys in a work unit of a tile with that many tokens.
template <int tile_tokens, int half_tile_unit_keys>
__device__ __forceinline__ int unit_shift(int tokens) {
    return log2(tokens <= tile_tokens / 2 ? half_tile_unit_keys : kUnitKeys);
}

__device__ __forceinline__ int count_units(int keys, int shift) {
    return int((uint32(keys) + (1u << shift) - 1) >> shift);
}

// A ragged batch, as the caller describes it in device memory. Sequence b has tokens
// [input_row_offsets[b], input_row_offsets[b + 1]). A kernel must not fault on any values: they are
// clamped to their legal range, and each offset is then replaced by the largest up to it, so that
// offsets that run backwards give no token to two sequences.
struct RaggedBatch {
    const uint32* input_row_offsets;  // [batch_size + 1], where sequences begin
    const uint32* lengths;            // [batch_size], cached keys before the new tokens
    int batch_size;
    int total_tokens;
    int max_kv_len;       // upper bound on the keys of a sequence
    int unscored_kv_len;  // tokens that see no more keys than this are not scored
    int causal;           // a token sees the new tokens up to itself; else all of its sequence
    int signed_offsets;   // int32, else uint32
    int signed_lengths;
    int total_lengths;  // lengths count the new tokens, too

    __device__ __forceinline__ int clamp_offset(uint32 value) const {
        return signed_offsets ? min(max(int(value), 0), total_tokens)
                              : int(min(value, uint32(total_tokens)));
    }

    // The keys cached before the new tokens. Negative if a total length is less than the number of
    // new tokens; the last of them still sees as many keys as the total says.
    __device__ __forceinline__ int64 clamp_length(uint32 value, int new_tokens) const {
        const uint32 counted = total_lengths ? new_tokens : 0;
        if (signed_lengths && int(value) < 0) value = total_lengths ? 0 : value;
        else value = min(value, max_kv_len + counted);
        return int64(int(value - counted));
    }

    __device__ __forceinline__ int offset(int i) const {
        return clamp_offset(__ldg(input_row_offsets + i));
    }
    __device__ __forceinline__ int64 cached_keys(int sequence, int new_tokens) const {
        return clamp_length(__ldg(lengths + sequence), new_tokens);
    }
};

// What a launch scores: tokens [first_token, end_token) against num_keys keys from first_key on.
// Below, keys are counted from first_key, so a kv_len may be negative.
struct ScoringLaunch : RaggedBatch {
    int first_token, end_token;
    int first_key, num_keys;
};

// The tokens of one sequence that a launch scores, cut into tiles.
template <int tile_tokens, int half_tile_unit_keys>
struct SequenceTiles {
    static_assert(kUnitKeys % tile_tokens == 0, "`quotients` needs whole tiles in a unit");
    static_assert(half_tile_unit_keys >= kUnitKeys, "a half-full tile takes less time per key");
    static_assert(1 << log2(half_tile_unit_keys) == half_tile_unit_keys, "a power of two");
    int token, token_end;
    int kv_len;  // at most num_keys; of each token; causal: of the token before the first

    // From the sequence's tokens [begin, end) and its cached keys.
    __device__ __forceinline__ SequenceTiles(const ScoringLaunch& launch, int begin, int end,
                                             int64 cached)
        : token(max(begin, launch.first_token)), token_end(min(end, launch.end_token)) {
        const int unscored = launch.unscored_kv_len;
        if (launch.causal) {
            token = int(max(int64(token), min(int64(begin) + unscored - cached, int64(end))));
        } else if (cached + end - begin <= unscored) {
            token = token_end;
        }
        if (launch.max_kv_len <= unscored) token = token_end;
        const int64 seen =
            cached - launch.first_key + (launch.causal ? token - begin : end - begin);
        kv_len = int(min(max(seen, int64(-0x7fffffff)), int64(launch.num_keys)));
    }

    __device__ __forceinline__ int tiles() const {
        return max(token_end - token + tile_tokens - 1, 0) / tile_tokens;
    }

    // Keys that at least one of the first `tokens` tokens sees.
    __device__ __forceinline__ int keys(const ScoringLaunch& launch, int tokens) const {
        const int64 seen = int64(kv_len) + (launch.causal ? min(tokens, token_end - token) : 0);
        return int(min(max(seen, int64(0)), int64(launch.num_keys)));
    }

    // Units of the first `tiles` tiles: the sum of count_units(keys of a tile). Under the causal
    // mask each tile sees tile_tokens keys more than the one before, until num_keys or the last
    // token is reached.
    __device__ __forceinline__ int64 units(const ScoringLaunch& launch, int tiles) const {
        constexpr int kTileShift = log2(tile_tokens), kFullShift = log2(kUnitKeys);
        if (tiles <= 1) {
            const int tokens = min(token_end - token, tile_tokens);
            const int shift = unit_shift<tile_tokens, half_tile_unit_keys>(tokens);
            return tiles * count_units(keys(launch, tile_tokens), shift);
        }
        const int64 full = min(tiles, (token_end - token) >> kTileShift);
        int64 units = 0;
        if (launch.causal) {
            // The first `blind` full tiles see no key, those from `growing` on see num_keys. In
            // between, tile j has ceil((kv_len + (j + 1) tile_tokens) / kUnitKeys) units, which is
            // floor((base + j + 1) / m) with the m of `quotients`.
            const int64 blind = min(full, max(-int64(kv_len), int64(0)) >> kTileShift);
            const int64 growing =
                min(max((int64(launch.num_keys) - kv_len) >> kTileShift, blind), full);
            const int64 base = (int64(kv_len) + kUnitKeys - 1) >> kTileShift;
            units = quotients(base + growing + 1) - quotients(base + blind + 1);
            units += (full - growing) * count_units(launch.num_keys, kFullShift);
        } else {
            units = full * count_units(keys(launch, 0), kFullShift);
        }
        if (tiles > full) {
            const int rest = (token_end - token) & (tile_tokens - 1);
            const int shift = unit_shift<tile_tokens, half_tile_unit_keys>(rest);
            units += count_units(keys(launch, tiles * tile_tokens), shift);
        }
        return units;
    }

    // The sum of floor(i / m) over 0 <= i < n, with m = kUnitKeys / tile_tokens.
    static __device__ __forceinline__ int64 quotients(int64 n) {
        constexpr int kM = kUnitKeys / tile_tokens;
        const int64 q = n >> log2(kM);
        return kM * (q * (q - 1) / 2) + q * (n & (kM - 1));
    }
};

// A block's part of the work: where it begins and how long it is.
struct alignas(16) WorkRange {
    int units = 0;  // 0: nothing to score
    int sequence = 0;
    int sequence_end = 0;  // the sequence's last token + 1, scored or not
    int token = 0;         // the tile's first
    int token_end = 0;     // the sequence's last token to score + 1
    int kv_len = 0;        // of each token of the tile; causal: of the token before the tile
    int key = 0;           // the first to score
    int launch_end = 0;    // the last token that the launch scores + 1
};

// The work range of a block. All lanes of a warp take part, and all get it.
template <int tile_tokens, int half_tile_unit_keys>
__device__ __forceinline__ WorkRange find_work_range(const ScoringLaunch& launch, int block,
                                                     int blocks) {
    using Tiles = SequenceTiles<tile_tokens, half_tile_unit_keys>;
    WorkRange range;
    range.launch_end = launch.end_token;
    if (launch.batch_size == 0) return range;
    // Each lane counts the units of several successive sequences. The loads for the first of them
    // are issued at once: a small batch has no others.
    const int lane = threadIdx.x % kWarpSize;
    const int each = (launch.batch_size + kWarpSize - 1) / kWarpSize;
    const int from = min(lane * each, launch.batch_size), to = min(from + each, launch.batch_size);
    const uint32 first_end = __ldg(launch.input_row_offsets + min(from, launch.batch_size - 1) + 1);
    const uint32 first_length = __ldg(launch.lengths + min(from, launch.batch_size - 1));
    const int batch_begin = launch.offset(0);
    int last_end = from < to ? launch.clamp_offset(first_end) : 0;
#pragma unroll 4
    for (int i = from + 1; i < to; ++i) last_end = max(last_end, launch.offset(i + 1));
    const int lanes = min(launch.batch_size, kWarpSize);
    last_end = inclusive_scan<Max>(last_end, lanes);
    const int lane_before_end = __shfl_up_sync(kFullWarp, last_end, 1);
    const int begin = lane == 0 ? batch_begin : max(batch_begin, lane_before_end);
    int64 units = 0;
    for (int i = from, at = begin; i < to; ++i) {
        const int end = max(at, i == from ? launch.clamp_offset(first_end) : launch.offset(i + 1));
        const int64 cached = i == from ? launch.clamp_length(first_length, end - at)
                                       : launch.cached_keys(i, end - at);
        const Tiles sequence(launch, at, end, cached);
        units += sequence.units(launch, sequence.tiles());
        at = end;
    }
    const int64 units_end = inclusive_scan<Sum>(units, lanes);
    // An int holds the total, because a unit's scores take at least 256 bytes of memory.
    const int total = int(__shfl_sync(kFullWarp, units_end, lanes - 1));
    const int longer = total % blocks;  // blocks with one unit more than the others
    const int range_units = total / blocks + (block < longer);
    if (range_units == 0) return range;
    int64 first = int64(total / blocks) * block + min(block, longer);
    const int owner =
        __ffs(__ballot_sync(kFullWarp, units_end - units <= first && first < units_end)) - 1;
    range.sequence = __shfl_sync(kFullWarp, from, owner);
    first -= __shfl_sync(kFullWarp, units_end - units, owner);
    int at = __shfl_sync(kFullWarp, begin, owner);
    while (true) {
        range.sequence_end = max(at, launch.offset(range.sequence + 1));
        const int64 cached = launch.cached_keys(range.sequence, range.sequence_end - at);
        const Tiles sequence(launch, at, range.sequence_end, cached);
        const int64 sequence_units = sequence.units(launch, sequence.tiles());
        if (first < sequence_units) {
            int low = 0, high = sequence.tiles();  // units(low) <= first < units(high)
            while (high - low > 1) {
                const int middle = low + (high - low) / 2;
                if (sequence.units(launch, middle) <= first) low = middle;
                else high = middle;
            }
            range.units = range_units;
            range.token = sequence.token + low * tile_tokens;
            range.token_end = sequence.token_end;
            range.kv_len = sequence.kv_len + (launch.causal ? low * tile_tokens : 0);
            const int tokens = min(range.token_end - range.token, tile_tokens);
            const int shift = unit_shift<tile_tokens, half_tile_unit_keys>(tokens);
            range.key = int(first - sequence.units(launch, low)) << shift;
            return range;
        }
        // Past the last sequence only if offsets or lengths have been changed meanwhile.
        if (++range.sequence == launch.batch_size) return range;
        first -= sequence_units;
        at = range.sequence_end;
    }
}

// Walks through a work range, stage_keys keys of a tile at a time. `sequence`, `token` and tokens()
// are those of the tile, `key` is the first key of the stage. At the end, key >= key_end.
template <int tile_tokens, int stage_keys, int half_tile_unit_keys>
struct WorkCursor : WorkRange {
    const ScoringLaunch& launch;
    int key_end = 0;  // the tile's last key in the work range + 1

    using Tiles = SequenceTiles<tile_tokens, half_tile_unit_keys>;

    __device__ __forceinline__ WorkCursor(const ScoringLaunch& launch, const WorkRange& range)
        : WorkRange(range), launch(launch) {
        if (units > 0) begin_tile();
    }

    // Takes the tile's units off the work range, which may end within the tile.
    __device__ __forceinline__ void begin_tile() {
        kv_len = min(kv_len, launch.num_keys);
        const int keys = max(min(kv_len + (launch.causal ? tokens() : 0), launch.num_keys), 0);
        const int shift = unit_shift<tile_tokens, half_tile_unit_keys>(tokens());
        const int before = key >> shift;
        const int taken = min(count_units(keys, shift) - before, units);
        key_end = int(min(int64(before + taken) << shift, int64(keys)));
        units -= taken;
    }

    __device__ __forceinline__ int tokens() const { return min(token_end - token, tile_tokens); }

    // To the next stage. Returns whether another tile begins there.
    __device__ __forceinline__ bool advance() {
        key += stage_keys;
        if (key < key_end) return false;
        key_end = 0;
        if (units == 0) return false;
        do {
            token += tile_tokens;
            kv_len += launch.causal ? tile_tokens : 0;
            while (token >= token_end && ++sequence < launch.batch_size) {
                const int begin = sequence_end;
                sequence_end = max(begin, launch.offset(sequence + 1));
                const Tiles next(launch, begin, sequence_end,
                                 launch.cached_keys(sequence, sequence_end - begin));
                token = next.token;
                token_end = next.token_end;
                kv_len = next.kv_len;
            }
            if (token >= token_end) return false;  // offsets or lengths have been changed meanwhile
            key = 0;
            begin_tile();
        } while (key_end == 0);
        return true;
    }
};
