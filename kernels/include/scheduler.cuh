// The work of a ragged batch, shared out among the blocks of a grid.
//
// A tile is up to tile_tokens tokens of one sequence and all keys that they see, 64 keys a unit; or, where work is
// weighted, 128 keys of a tile that is half empty at least. Block c of G scores units c U / G to (c + 1) U / G of
// the batch's U, wherever in a tile they begin. They are counted on the device from offsets and lengths, in closed
// form: nothing is planned on the host, and frozen extents cost nothing.
#pragma once
#include "common.cuh"

constexpr int kUnitKeys = 64;
// 128 keys of a tile that is half empty take some 1.0 us, of a full one of 64 heads 1.8 us on an H200.
constexpr int kEmptyUnitKeys = 128;

__device__ constexpr int log2(int n) { return n <= 1 ? 0 : 1 + log2(n / 2); }

// The logarithm of how many keys of a tile of so many tokens are a unit.
template <int tile_tokens, bool weighted>
__device__ __forceinline__ int unit_shift(int tokens) {
    return log2(weighted && tokens <= tile_tokens / 2 ? kEmptyUnitKeys : kUnitKeys);
}

__device__ __forceinline__ int units_of(int keys, int shift) {
    return int((uint32(keys) + (1u << shift) - 1) >> shift);
}

// Which tokens are to be scored, against which keys. Every number is read as if clamped to what it may be,
// and offsets are then replaced by their running maximum. Keys count from first_key on, and so may lengths be negative.
struct Batch {
    const uint32* offsets;
    const uint32* lengths;
    int size;
    int total;       // tokens of the batch
    int first, end;  // those to score
    int all_keys;    // that a sequence may have
    int first_key;   // to score against
    int max_keys;    // how many, at most
    int skip;        // tokens that see no more keys than this, before first_key or after, are not scored
    bool causal, signed_offsets, signed_lengths;
    bool total_lengths;  // lengths count the new tokens

    __device__ __forceinline__ int as_offset(uint32 value) const {
        return signed_offsets ? min(max(int(value), 0), total) : int(min(value, uint32(total)));
    }
    // Keys before those of a sequence's new tokens. Below zero where a total is less than these: then the last of them
    // sees just as many keys as it says.
    __device__ __forceinline__ int64 as_length(uint32 value, int tokens) const {
        const uint32 counted = total_lengths ? tokens : 0;
        if (signed_lengths && int(value) < 0) value = total_lengths ? 0 : value;
        else value = min(value, all_keys + counted);
        return int64(int(value - counted)) - first_key;
    }
    __device__ __forceinline__ int offset(int i) const { return as_offset(offsets[i]); }
    __device__ __forceinline__ int64 length(int i, int tokens) const { return as_length(lengths[i], tokens); }
};

// The sequence of a token and how many keys it sees, by a warp; the row is the caller's. The sequence ends at the first
// offset greater than the token and begins at the largest offset before it: no prefix maximum has to be written down.
__device__ __forceinline__ TokenRow locate(const Batch& batch, int token) {
    const int lane = threadIdx.x % kWarpSize;
    int begin = 0;  // the largest offset so far; all of them are <= token
    for (int base = 0; base <= batch.size; base += kWarpSize) {
        const int i = base + lane;
        const int offset = i <= batch.size ? batch.offset(i) : 0;
        const uint32 past = __ballot_sync(kFullWarp, offset > token);
        const int first = past ? __ffs(past) - 1 : kWarpSize;
        int before = lane < first ? offset : 0;
#pragma unroll
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            before = max(before, __shfl_xor_sync(kFullWarp, before, step));
        }
        begin = max(begin, before);
        if (past) {
            const int sequence = base + first - 1;
            if (sequence < 0) break;  // even the first offset lies beyond the token
            const int end = __shfl_sync(kFullWarp, offset, first);
            const int tokens = end - begin;
            const int64 keys = batch.length(sequence, tokens) + (batch.causal ? token - begin + 1 : tokens);
            return {sequence, int(min(max(keys, int64(0)), int64(batch.max_keys))), 0};
        }
    }
    return {-1, 0, 0};
}

// The tokens of one sequence that are to be scored.
template <int tile_tokens, bool weighted>
struct Sequence {
    static_assert(kUnitKeys % tile_tokens == 0, "ceil((a + j T) / K) has a period of K / T");
    int first, end;
    int seen;  // keys that each token sees, or under the causal mask the one before `first`; at most max_keys

    // Tokens [begin, end) of the batch, not yet cut to those to score.
    __device__ __forceinline__ Sequence(const Batch& batch, int begin, int end, int64 length)
        : first(max(begin, batch.first)), end(min(end, batch.end)) {
        const int64 cached = length + batch.first_key;
        if (batch.causal) first = int(max(int64(first), min(int64(begin) + batch.skip - cached, int64(end))));
        else if (cached + end - begin <= batch.skip) first = end;
        if (batch.all_keys <= batch.skip) first = end;
        const int64 all = length + (batch.causal ? first - begin : end - begin);
        seen = int(min(max(all, int64(-0x7fffffff)), int64(batch.max_keys)));
    }

    __device__ __forceinline__ int tiles() const { return max(end - first + tile_tokens - 1, 0) / tile_tokens; }

    // Keys that the first `tokens` tokens see together.
    __device__ __forceinline__ int keys(const Batch& batch, int tokens) const {
        const int64 all = int64(seen) + (batch.causal ? min(tokens, end - first) : 0);
        return int(min(max(all, int64(0)), int64(batch.max_keys)));
    }

    // Units of the first `tiles` tiles: the sum of units_of(keys of the tile), for under the causal mask a
    // tile sees tile_tokens keys more than the one before until max_keys or the end.
    __device__ __forceinline__ int64 units(const Batch& batch, int tiles) const {
        constexpr int kShift = log2(tile_tokens), kFull = log2(kUnitKeys);
        if (tiles <= 1) {
            const int shift = unit_shift<tile_tokens, weighted>(min(end - first, tile_tokens));
            return tiles * units_of(keys(batch, tile_tokens), shift);
        }
        const int64 whole = min(tiles, (end - first) >> kShift);
        int64 units = 0;
        if (batch.causal) {
            // Of the whole tiles, the first `blind` see nothing and those after `growing` see max_keys.
            const int64 blind = min(whole, max(-int64(seen), int64(0)) >> kShift);
            const int64 growing = min(max((int64(batch.max_keys) - seen) >> kShift, blind), whole);
            const int64 base = (int64(seen) + kUnitKeys - 1) >> kShift;
            units = quotients(base + growing + 1) - quotients(base + blind + 1);
            units += (whole - growing) * units_of(batch.max_keys, kFull);
        } else {
            units = whole * units_of(keys(batch, 0), kFull);
        }
        if (tiles > whole) {
            const int shift = unit_shift<tile_tokens, weighted>((end - first) & (tile_tokens - 1));
            units += units_of(keys(batch, tiles * tile_tokens), shift);
        }
        return units;
    }

    // The sum of floor(i / m) over 0 <= i < n, m = unit keys per tile token.
    static __device__ __forceinline__ int64 quotients(int64 n) {
        constexpr int kM = kUnitKeys / tile_tokens;
        const int64 q = n >> log2(kM);
        return kM * (q * (q - 1) / 2) + q * (n & (kM - 1));
    }
};

// A block's share of the work: where it begins, and how long it is.
struct alignas(16) WorkRange {
    int left = 0;             // units
    int sequence = 0;
    int end_of_sequence = 0;  // its last token + 1, scored or not
    int token = 0;            // first of the tile
    int end = 0;              // of the sequence's tokens to score
    int seen = 0;             // keys each of the tile's tokens sees, or under the causal mask the one before
    int key = 0;              // first of the stage
    int end_of_launch = 0;    // the last token to score + 1
};

// Counts the share of a block, by a warp; the same in all lanes, which all take part.
template <int tile_tokens, bool weighted>
__device__ __forceinline__ WorkRange work_range_of_block(const Batch& batch, int block, int blocks) {
    using Tokens = Sequence<tile_tokens, weighted>;
    WorkRange share;
    share.end_of_launch = batch.end;
    if (batch.size == 0) return share;
    // Each lane counts a run of sequences. What it needs of the first is asked for at once: in a
    // small batch there is no other.
    const int lane = threadIdx.x % kWarpSize, each = (batch.size + kWarpSize - 1) / kWarpSize;
    const int from = min(lane * each, batch.size), to = min(from + each, batch.size);
    const uint32 first_end = batch.offsets[min(from, batch.size - 1) + 1];
    const uint32 first_length = batch.lengths[min(from, batch.size - 1)];
    const int start = batch.offset(0);
    int last = from < to ? batch.as_offset(first_end) : 0;
#pragma unroll 4
    for (int i = from + 1; i < to; ++i) last = max(last, batch.offset(i + 1));
    for (int step = 1; step < min(batch.size, kWarpSize); step *= 2) {
        const int other = __shfl_up_sync(kFullWarp, last, step);
        if (lane >= step) last = max(last, other);
    }
    const int before_lane = __shfl_up_sync(kFullWarp, last, 1);
    const int begin = lane == 0 ? start : max(start, before_lane);
    int64 units = 0;
    for (int i = from, at = begin; i < to; ++i) {
        const int next = max(at, i == from ? batch.as_offset(first_end) : batch.offset(i + 1));
        const int64 length = i == from ? batch.as_length(first_length, next - at) : batch.length(i, next - at);
        const Tokens some(batch, at, next, length);
        units += some.units(batch, some.tiles());
        at = next;
    }
    int64 up_to = units;
    for (int step = 1; step < min(batch.size, kWarpSize); step *= 2) {
        const int64 other = __shfl_up_sync(kFullWarp, up_to, step);
        if (lane >= step) up_to += other;
    }
    // Fits, for a unit stands for 256 bytes of scores at least.
    const int total = int(__shfl_sync(kFullWarp, up_to, min(batch.size, kWarpSize) - 1));
    const int more = total % blocks;  // blocks with one unit more
    const int left = total / blocks + (block < more);
    if (left == 0) return share;
    int64 first = int64(total / blocks) * block + min(block, more);
    const int mine = __ffs(__ballot_sync(kFullWarp, up_to - units <= first && first < up_to)) - 1;
    share.sequence = __shfl_sync(kFullWarp, from, mine);
    first -= __shfl_sync(kFullWarp, up_to - units, mine);
    int at = __shfl_sync(kFullWarp, begin, mine);
    while (true) {
        share.end_of_sequence = max(at, batch.offset(share.sequence + 1));
        const int64 length = batch.length(share.sequence, share.end_of_sequence - at);
        const Tokens found(batch, at, share.end_of_sequence, length);
        const int64 units = found.units(batch, found.tiles());
        if (first < units) {
            int low = 0, high = found.tiles();  // units(low) <= first < units(high)
            while (high - low > 1) {
                const int middle = low + (high - low) / 2;
                if (found.units(batch, middle) <= first) low = middle;
                else high = middle;
            }
            share.left = left;
            share.token = found.first + low * tile_tokens;
            share.end = found.end;
            share.seen = found.seen + (batch.causal ? low * tile_tokens : 0);
            const int shift = unit_shift<tile_tokens, weighted>(min(share.end - share.token, tile_tokens));
            share.key = int(first - found.units(batch, low)) << shift;
            return share;
        }
        if (++share.sequence == batch.size) return share;  // numbers changed under our feet
        first -= units;
        at = share.end_of_sequence;
    }
}

// A warp at work on a share, stage_keys keys at a time: on those from `key` on, until there are none below `stop`.
template <int tile_tokens, int stage_keys, bool weighted>
struct Cursor : WorkRange {
    const Batch& batch;
    int stop = 0;  // of the tile's keys that are the block's share

    using Tokens = Sequence<tile_tokens, weighted>;

    __device__ __forceinline__ Cursor(const Batch& batch, const WorkRange& share) : WorkRange(share), batch(batch) {
        if (left > 0) take();
    }

    // Takes from what is left of the share what is of the tile.
    __device__ __forceinline__ void take() {
        seen = min(seen, batch.max_keys);
        const int keys = max(min(seen + (batch.causal ? tokens() : 0), batch.max_keys), 0);
        const int shift = unit_shift<tile_tokens, weighted>(tokens()), before = key >> shift;
        const int units = min(units_of(keys, shift) - before, left);
        stop = int(min(int64(before + units) << shift, int64(keys)));
        left -= units;
    }

    __device__ __forceinline__ int tokens() const { return min(end - token, tile_tokens); }

    // To the next stage; tells whether it is another tile's.
    __device__ __forceinline__ bool advance() {
        key += stage_keys;
        if (key < stop) return false;
        stop = 0;
        if (left == 0) return false;
        do {
            token += tile_tokens;
            seen += batch.causal ? tile_tokens : 0;
            while (token >= end && ++sequence < batch.size) {
                const int begin = end_of_sequence;
                end_of_sequence = max(begin, batch.offset(sequence + 1));
                const int64 length = batch.length(sequence, end_of_sequence - begin);
                const Tokens found(batch, begin, end_of_sequence, length);
                token = found.first;
                end = found.end;
                seen = found.seen;
            }
            if (token >= end) return false;  // numbers changed under our feet
            key = 0;
            take();
        } while (stop == 0);
        return true;
    }
};
