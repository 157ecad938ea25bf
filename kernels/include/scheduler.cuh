// The scheduler: divides the scoring of a ragged batch evenly among the blocks of a launch, on the
// device.
//
// A tile is up to tile_tokens tokens of one sequence with all keys that they see. Its work is
// counted in units of kUnitKeys keys, or of half_tile_unit_keys keys if the tile is at most half
// full: fewer tokens take less time per key. (On an H200 with 64 heads, 128 keys take 1.0 us in a
// half-full tile and 1.8 us in a full one.) A tile of one token takes less still: if a full tile
// has 8 tokens or more, its unit is twice as long. If a launch has U units and G blocks, each block
// scores U / G successive units: its work range, which may begin and end in the middle of a tile.
//
// A key may stand for several tokens (pooled keys), and the cache may hold only every key_step-th
// key of a sequence (a shard). In either case one more key becomes visible with every kTokensPerKey
// tokens. So the scheduler counts the tokens seen, shifted so that the first key of the cache needs
// kTokensPerKey of them, and keys_of turns them into keys.
//
// Every count is computed in closed form from offsets and lengths. So nothing is planned on the
// host, and the upper bounds on lengths that a captured graph keeps cost nothing.
#pragma once
#include "common.cuh"
#include "warp_scan.cuh"

static_assert(kTokensPerKey >= 1 && kTokensPerKey < 1 << 22,
              "tokens from one key to the next: 32 bits count those of a stage too many");

constexpr int kUnitKeys = 64;
constexpr int kMaxLength = 0x7fff0000;  // tokens of a sequence before the new ones

__device__ constexpr int log2(int n) { return n <= 1 ? 0 : 1 + log2(n / 2); }

// The logarithm of the keys in a work unit of a tile with that many tokens.
template <int tile_tokens, int half_tile_unit_keys>
__device__ __forceinline__ int unit_shift(int tokens) {
    const bool half_full = half_tile_unit_keys > kUnitKeys && tokens <= tile_tokens / 2;
    const int one_token = half_full && tile_tokens >= 8 && tokens == 1;
    return log2(half_full ? half_tile_unit_keys : kUnitKeys) + one_token;
}

// How many of the first `most` keys are visible once `tokens` tokens have been seen: none if
// `tokens` is negative. The number is clamped before the division, so that 32 bits are enough.
template <class Int>
__device__ __forceinline__ int keys_of(Int tokens, int most) {
    return uint32(min(max(tokens, Int(0)), Int(most * kTokensPerKey))) / kTokensPerKey;
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
    const uint32* lengths;            // [batch_size], tokens before the new ones
    const uint32* key_starts;         // [batch_size], in place of key_start; may be null
    int batch_size;
    int total_tokens;
    int max_kv_len;       // upper bound on the keys of a sequence
    int unscored_kv_len;  // tokens that see no more keys than this are not scored
    int key_start;        // key j of this cache is key key_start + key_step * j of the sequence
    int key_step;
    int kpool;           // tokens that a key stands for; kTokensPerKey is kpool * key_step
    int causal;          // a token sees the new tokens up to itself; else all of its sequence
    int signed_offsets;  // int32, else uint32
    int signed_lengths;
    int total_lengths;  // lengths count the new tokens, too

    __device__ __forceinline__ int clamp_offset(uint32 value) const {
        return signed_offsets ? min(max(int(value), 0), total_tokens)
                              : int(min(value, uint32(total_tokens)));
    }

    // The tokens before the new ones, not shifted. Negative if a total length is less than the
    // number of new tokens; the last of them has still seen as many tokens as the total says.
    __device__ __forceinline__ int64 clamp_length(uint32 value, int new_tokens) const {
        const uint32 counted = total_lengths ? new_tokens : 0;
        if (signed_lengths && int(value) < 0) value = total_lengths ? 0 : value;
        else value = min(value, kMaxLength + counted);
        return int64(int(value - counted));
    }

    // What to add to the number of tokens seen, so that keys_of gives the keys of this cache. Key j
    // is visible once kpool (key_start + key_step j + 1) tokens have been seen. With the shift,
    // that is (j + 1) kTokensPerKey.
    __device__ __forceinline__ int64 shift(int sequence) const {
        const uint32 value = key_starts ? __ldg(key_starts + sequence) : uint32(key_start);
        const int64 start = min(value, 0x7fffffffu);
        if (kTokensPerKey == 1) return -start;  // so that plain calls don't multiply
        return kpool * (key_step - 1 - start);
    }

    __device__ __forceinline__ int offset(int i) const {
        return clamp_offset(__ldg(input_row_offsets + i));
    }
    // The tokens seen before the new ones, shifted. They are clamped to what an int holds: at the
    // upper bound a token sees max_kv_len keys, and at the lower no new token sees a key.
    __device__ __forceinline__ int64 seen_before(int sequence, uint32 length,
                                                 int new_tokens) const {
        const int64 seen = clamp_length(length, new_tokens) + shift(sequence);
        return int(min(max(seen, int64(-0x7fffffff)), int64(0x7fffffff)));
    }
    __device__ __forceinline__ int64 seen_before(int sequence, int new_tokens) const {
        return seen_before(sequence, __ldg(lengths + sequence), new_tokens);
    }
    // The keys of a sequence that a token sees.
    __device__ __forceinline__ int kv_len(int64 seen) const { return keys_of(seen, max_kv_len); }
};

// What a launch scores: tokens [first_token, end_token) against num_keys keys from first_key on.
// Below, keys are counted from first_key, and the tokens that make the keys before it visible are
// subtracted from the tokens seen. So a number of tokens seen may be negative.
struct ScoringLaunch : RaggedBatch {
    int first_token, end_token;
    int first_key, num_keys;

    // The tokens that make all keys visible. The host has made sure that 2 ** 8 more fit in an int.
    __device__ __forceinline__ int all_seen() const { return num_keys * kTokensPerKey; }
};

// The tokens of one sequence that a launch scores, cut into tiles.
template <int tile_tokens, int half_tile_unit_keys>
struct SequenceTiles {
    static_assert(kUnitKeys % tile_tokens == 0, "whole tiles of tokens show a unit of keys");
    static_assert(half_tile_unit_keys >= kUnitKeys, "a half-full tile takes less time per key");
    static_assert(1 << log2(half_tile_unit_keys) == half_tile_unit_keys, "a power of two");
    int token, token_end;
    int seen;  // tokens, at most all_seen(), by each token; causal: by the token before the first

    // From the sequence's tokens [begin, end), and the tokens seen before them.
    __device__ __forceinline__ SequenceTiles(const ScoringLaunch& launch, int begin, int end,
                                             int64 before)
        : token(max(begin, launch.first_token)), token_end(min(end, launch.end_token)) {
        const int unscored = launch.unscored_kv_len;
        // A token is scored if it has seen at least this many tokens.
        const int64 enough = (int64(unscored) + 1) * kTokensPerKey;
        if (launch.causal) {
            token = int(max(int64(token), min(begin + enough - 1 - before, int64(end))));
        } else if (before + end - begin < enough) {
            token = token_end;
        }
        if (launch.max_kv_len <= unscored) token = token_end;
        const int64 shown = int64(launch.first_key) * kTokensPerKey;
        const int64 all = before - shown + (launch.causal ? token - begin : end - begin);
        seen = int(min(max(all, int64(-0x7fffffff)), int64(launch.all_seen())));
    }

    __device__ __forceinline__ int tiles() const {
        return max(token_end - token + tile_tokens - 1, 0) / tile_tokens;
    }

    // Keys that at least one of the first `tokens` tokens sees.
    __device__ __forceinline__ int keys(const ScoringLaunch& launch, int tokens) const {
        const int64 last = int64(seen) + (launch.causal ? min(tokens, token_end - token) : 0);
        return keys_of(last, launch.num_keys);
    }

    // Units of the first `tiles` tiles: the sum of count_units(keys of a tile). Under the causal
    // mask each tile has seen tile_tokens tokens more than the one before, until it sees num_keys
    // or the last token is reached.
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
            // between, the last token of tile j has seen y = seen + (j + 1) tile_tokens tokens, so
            // the tile has ceil(floor(y / kTokensPerKey) / kUnitKeys) units. With the m of
            // `quotients` this is floor((base + j + 1) / m), because tile_tokens divides kUnitKeys.
            constexpr int64 kRoundUp = int64(kUnitKeys - 1) * kTokensPerKey;
            const int64 no_key = int64(kTokensPerKey) - 1 - seen;
            const int64 blind = min(full, max(no_key, int64(0)) >> kTileShift);
            const int64 growing =
                min(max((int64(launch.all_seen()) - seen) >> kTileShift, blind), full);
            const int64 base = (int64(seen) + kRoundUp) >> kTileShift;
            units = quotients(uint32(base + growing + 1)) - quotients(uint32(base + blind + 1));
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

    // The sum of floor(i / m) over 0 <= i < n. With every m tiles of tokens, one more unit of keys
    // becomes visible.
    static __device__ __forceinline__ int64 quotients(uint32 n) {
        constexpr uint32 kM = kUnitKeys / tile_tokens * kTokensPerKey;
        const uint64 q = n / kM;
        return kM * (q * (q - 1) / 2) + q * (n % kM);
    }
};

// A block's part of the work: where it begins and how long it is.
struct alignas(16) WorkRange {
    int units = 0;  // 0: nothing to score
    int sequence = 0;
    int sequence_end = 0;  // the sequence's last token + 1, scored or not
    int token = 0;         // the tile's first
    int token_end = 0;     // the sequence's last token to score + 1
    int seen = 0;          // by each token of the tile; causal: by the token before the tile
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
        const int64 before = i == from ? launch.seen_before(i, first_length, end - at)
                                       : launch.seen_before(i, end - at);
        const Tiles sequence(launch, at, end, before);
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
        const int64 before = launch.seen_before(range.sequence, range.sequence_end - at);
        const Tiles sequence(launch, at, range.sequence_end, before);
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
            const int64 seen = sequence.seen + (launch.causal ? int64(low) * tile_tokens : 0);
            range.seen = int(min(seen, int64(launch.all_seen())));
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
        seen = min(seen, launch.all_seen());
        const int keys = keys_of(seen + (launch.causal ? tokens() : 0), launch.num_keys);
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
            seen += launch.causal ? tile_tokens : 0;
            while (token >= token_end && ++sequence < launch.batch_size) {
                const int begin = sequence_end;
                sequence_end = max(begin, launch.offset(sequence + 1));
                const Tiles next(launch, begin, sequence_end,
                                 launch.seen_before(sequence, sequence_end - begin));
                token = next.token;
                token_end = next.token_end;
                seen = next.seen;
            }
            if (token >= token_end) return false;  // offsets or lengths have been changed meanwhile
            key = 0;
            begin_tile();
        } while (key_end == 0);
        return true;
    }
};
