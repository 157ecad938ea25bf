// score[t, s] = kscale[s] * sum_h qs[t, h] * max(0, sum_d q[t, h, d] * k[s, d])
//
// On Hopper's FP8 tensor cores, keys read in place from their pages. Layouts as in index_scores.cu,
// with one key head and one scale per key.
//
// A tile is kTileTokens tokens of one sequence, whose heads (the columns of the products) stay in
// shared memory while the keys they see (the rows) stream by, up to kStageKeys at a time. One
// warpgroup copies, two score: they share the keys and split the tokens (kTokenGroups = 2: many
// tokens, fewest bytes per product), or share the tokens and split the keys (kTokenGroups = 1: few
// tokens). A scoring warpgroup has two accumulators, so that one is being reduced while the tensor
// cores fill the other: halves of its tokens, or where all fit one, two lots of keys.
//
// Work is counted in units of (tile, 64 keys), and block c of G takes units c U / G to (c + 1) U / G of
// the batch, which each block counts for itself from offsets and lengths: no block waits for another,
// nothing is planned on the host, and frozen extents cost nothing.
//
// Invariant: the bits of score[t, s] depend on the data of t and s alone. A product's depth is summed
// in one fixed order whatever its columns are, heads in ascending order within each lane of a quad
// (two chains where there are 128), then (lane 0 + lane 1) + (lane 2 + lane 3).
//
// Writes only keys the token sees, `hole` where the page does not exist.
#include "common.cuh"
#include "paged_keys.cuh"
#include "sm90.cuh"

static_assert(kHeads == 8 || kHeads == 16 || kHeads == 32 || kHeads == 64 || kHeads == 128, "query heads");
static_assert(kDepth == 64 || kDepth == 128, "channels per head: rows that one swizzle covers");
static_assert(kTokens >= 1 && (kTokens & (kTokens - 1)) == 0, "tokens of a warpgroup: a power of two");
static_assert(kTokens * kHeads <= 256, "columns of a warpgroup: two accumulators");
static_assert(kTokenGroups == 1 || kTokenGroups == 2, "warpgroups share the tokens, or split them");
static_assert(kSharedBytes <= 227 * 1024, "shared memory of a block");

constexpr int kUnitKeys = 64;  // rows of one warpgroup's products
constexpr int kColumns = kTokens * kHeads;
constexpr int kTokenBlocks = kColumns > 128 ? 2 : 1;  // of a warpgroup's accumulators, 2 in all
constexpr int kKeyBlocks = 2 / kTokenBlocks;
constexpr int kAccColumns = kColumns / kTokenBlocks;
constexpr int kAccTokens = kTokens / kTokenBlocks;
constexpr int kRegisters = kAccColumns / 2;  // of one accumulator, per thread
constexpr int kTileTokens = kTokens * kTokenGroups;
constexpr int kKeyGroups = 2 / kTokenGroups;
constexpr int kStageKeys = kUnitKeys * kKeyGroups * kKeyBlocks;
constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kProducer = 2;  // the warpgroup that copies
constexpr int kConsumerWarps = 8;
constexpr int kWarpKeys = 64;  // of a stage, copied by one warp: a lane's two are 32 apart
constexpr int kCopyWarps = kStageKeys / kWarpKeys;
constexpr int kTurns = 4 / kCopyWarps;  // copying warps take stages in turns
constexpr int kAhead = kCopyWarps;      // of a warp's stages, and 4 in all, whose table entries are being
                                        // read: that takes as long as a copy
constexpr int kPieces = kDepth / 16;           // 16-byte pieces of a row
constexpr bool kTensorCopies = kBoxRows >= 8;  // whole swizzle groups; else threads copy
static_assert(kBoxRows >= 1 && kWarpSize % kBoxRows == 0, "keys copied at once: they divide a page");

// The turn of a ring of stages.
struct Place {
    int stage = 0;
    uint32 parity = 0;
    __device__ __forceinline__ void advance();
};

// What the producer tells of a stage, and of the tile in a buffer of heads.
struct Stage {
    int key;     // position of the first
    int end;     // of the positions, at most max_keys
    int buffer;  // of heads; -1: no more work
    uint32 exists[kStageKeys / kWarpSize];  // a bit per key
    float scales[kStageKeys];
};

struct Tile {
    int token;   // first
    int tokens;  // how many
    int seen;    // keys seen: seen + (causal ? place in the tile + 1 : 0), or up to the stage's end
};

template <int count>
struct SharedOf {
    alignas(1024) uint8 keys[count][kStageKeys * kDepth];
    alignas(1024) uint8 heads[2][kTileTokens * kHeads * kDepth];
    float gates[2][kTileTokens * kHeads];
    Tile tiles[2];
    Stage stages[count];
    uint64 full[count], empty[count], heads_full[2], heads_empty[2];
};
// As many stages as fit: the copies in flight are what hides the memory's latency.
constexpr int kMostStages = 16;
constexpr int kPerStage = int(sizeof(SharedOf<9>) - sizeof(SharedOf<1>)) / 8 + 16;
constexpr int kFitting = 1 + (kSharedBytes - int(sizeof(SharedOf<1>))) / kPerStage;
constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
using Shared = SharedOf<kStages>;
__device__ __forceinline__ void Place::advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
}
static_assert(kStages >= 4 && sizeof(Shared) <= kSharedBytes, "shared memory");

// Which tokens are to be scored, against which keys.
struct Batch {
    const uint32* offsets;
    const uint32* lengths;
    int size;
    int total;          // tokens of the batch
    int first, end;     // those to score
    int max_keys;
    bool causal, signed_offsets, signed_lengths;

    __device__ __forceinline__ int offset(int i) const {
        return int(min(max(widen(offsets[i], signed_offsets), int64(0)), int64(total)));
    }
};

// The tokens of one sequence that are to be scored.
struct Sequence {
    int index;
    int first, end;
    int64 seen;  // keys that each token sees, or under the causal mask the one before `first`

    // Tokens [begin, end) of the batch, not yet cut to those to score.
    __device__ __forceinline__ Sequence(const Batch& batch, int index, int begin, int end)
        : index(index), first(max(begin, batch.first)), end(min(end, batch.end)) {
        seen = widen(batch.lengths[index], batch.signed_lengths) + (batch.causal ? first - begin : end - begin);
    }
    __device__ __forceinline__ int tiles() const { return max(end - first + kTileTokens - 1, 0) / kTileTokens; }

    // Keys that the first `tokens` tokens see together.
    __device__ __forceinline__ int keys(const Batch& batch, int tokens) const {
        const int64 keys = seen + (batch.causal ? min(tokens, end - first) : 0);
        return int(min(max(keys, int64(0)), int64(batch.max_keys)));
    }
};

__device__ constexpr int log2(int n) { return n <= 1 ? 0 : 1 + log2(n / 2); }

// The sum of floor(i / m) over 0 <= i < n, m = unit keys per tile token.
__device__ __forceinline__ int64 sum_of_quotients(int64 n) {
    constexpr int kM = kUnitKeys / kTileTokens;
    const int64 q = n >> log2(kM);
    return kM * (q * (q - 1) / 2) + q * (n & (kM - 1));
}

__device__ __forceinline__ int64 units_of(int64 keys) { return (keys + kUnitKeys - 1) / kUnitKeys; }

// Units of the first `tiles` tiles of a sequence: sum over its tiles of ceil(keys(tile) / kUnitKeys), in
// closed form, for under the causal mask keys(tile) rises by kTileTokens until max_keys or the end.
__device__ __forceinline__ int64 units_before(const Batch& batch, const Sequence& sequence, int tiles) {
    static_assert(kUnitKeys % kTileTokens == 0, "ceil((a + j T) / K) has a period of K / T");
    if (tiles <= 0) return 0;
    if (!batch.causal) return tiles * units_of(sequence.keys(batch, 0));
    constexpr int kShift = log2(kTileTokens);
    const int64 whole = min(tiles, (sequence.end - sequence.first) >> kShift);
    // Of the whole tiles, the first `blind` see nothing and those after `growing` see max_keys.
    const int64 blind = min(whole, max(-sequence.seen, int64(0)) >> kShift);
    const int64 growing = min(max((batch.max_keys - sequence.seen) >> kShift, blind), whole);
    const int64 base = (sequence.seen + kUnitKeys - 1) >> kShift;
    int64 units = sum_of_quotients(base + growing + 1) - sum_of_quotients(base + blind + 1);
    units += (whole - growing) * units_of(batch.max_keys);
    if (tiles > whole) units += units_of(sequence.keys(batch, tiles * kTileTokens));
    return units;
}

// 32 sequences, one a lane; offsets are replaced by their running maximum.
struct Sequences {
    int index, begin, end;
    int64 units, before;  // of the lane's, and of the lanes below

    // Those from `base` on, whose first token is at `last` or later; returns their units. All lanes of
    // the warp take part.
    __device__ __forceinline__ int64 load(const Batch& batch, int base, int& last) {
        const int lane = threadIdx.x % kWarpSize;
        index = min(base + lane, batch.size - 1);
        const int count = min(batch.size - base, kWarpSize);
        end = max(batch.offset(index + 1), last);
        for (int step = 1; step < count; step *= 2) {
            const int other = __shfl_up_sync(kFullWarp, end, step);
            if (lane >= step) end = max(end, other);
        }
        begin = __shfl_up_sync(kFullWarp, end, 1);
        if (lane == 0) begin = last;
        last = __shfl_sync(kFullWarp, end, count - 1);
        const Sequence sequence(batch, index, begin, end);
        units = lane < count ? units_before(batch, sequence, sequence.tiles()) : 0;
        int64 inclusive = units;
        for (int step = 1; step < count; step *= 2) {
            const int64 other = __shfl_up_sync(kFullWarp, inclusive, step);
            if (lane >= step) inclusive += other;
        }
        before = inclusive - units;
        return __shfl_sync(kFullWarp, inclusive, count - 1);
    }
};

// Where a block is in its share of the work. The same in all lanes of all copying warps.
struct Cursor {
    const Batch& batch;
    int64 left;                // units of the block
    int sequence = 0;
    int end_of_sequence = 0;   // its last token + 1, scored or not
    int token = 0;             // first of the tile
    int end = 0;               // of the sequence's tokens to score
    int64 seen = 0;            // see Tile
    int key = 0;
    int keys = 0;              // that the tile sees

    __device__ __forceinline__ explicit Cursor(const Batch& batch) : batch(batch) {
        Sequences some;
        int last = batch.offset(0);
        int64 total = 0;
        for (int base = 0; base < batch.size; base += kWarpSize) total += some.load(batch, base, last);
        const int64 share = total / gridDim.x;
        const int more = int(total - share * gridDim.x);  // blocks with one unit more
        left = share + (int(blockIdx.x) < more);
        if (left == 0) return;
        int64 first = share * blockIdx.x + min(int(blockIdx.x), more);
        if (batch.size > kWarpSize) {
            last = batch.offset(0);
            for (int base = 0; base < batch.size; base += kWarpSize) {
                const int64 units = some.load(batch, base, last);
                if (first < units) break;
                first -= units;
            }
        }
        const uint32 mine = __ballot_sync(kFullWarp, some.before <= first && first < some.before + some.units);
        const int lane = __ffs(mine) - 1;
        sequence = __shfl_sync(kFullWarp, some.index, lane);
        end_of_sequence = __shfl_sync(kFullWarp, some.end, lane);
        const Sequence found(batch, sequence, __shfl_sync(kFullWarp, some.begin, lane), end_of_sequence);
        first -= __shfl_sync(kFullWarp, some.before, lane);
        int low = 0, high = found.tiles();  // units_before(low) <= first < units_before(high)
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (units_before(batch, found, middle) <= first) low = middle;
            else high = middle;
        }
        enter(found, low);
        key = int(first - units_before(batch, found, low)) * kUnitKeys;
    }

    __device__ __forceinline__ void enter(const Sequence& found, int tile) {
        token = found.first + tile * kTileTokens;
        end = found.end;
        seen = found.seen + (batch.causal ? token - found.first : 0);
        count_keys();
    }

    __device__ __forceinline__ void count_keys() {
        const int64 all = seen + (batch.causal ? tokens() : 0);
        keys = int(min(max(all, int64(0)), int64(batch.max_keys)));
        key = 0;
    }

    __device__ __forceinline__ int tokens() const { return min(end - token, kTileTokens); }

    __device__ __forceinline__ int units() const {
        return int(min(left, min(units_of(keys - key), int64(kStageKeys / kUnitKeys))));
    }

    // To the next stage; tells whether it is another tile's.
    __device__ __forceinline__ bool advance() {
        left -= units();
        if (left == 0) return false;
        key += kStageKeys;
        if (key < keys) return false;
        do {
            token += kTileTokens;
            seen += batch.causal ? kTileTokens : 0;
            while (token >= end && ++sequence < batch.size) {
                const int begin = end_of_sequence;
                end_of_sequence = max(begin, batch.offset(sequence + 1));
                enter(Sequence(batch, sequence, begin, end_of_sequence), 0);
            }
            if (token >= end) {  // lengths changed under our feet
                left = 0;
                return false;
            }
            count_keys();
        } while (keys == 0);
        return true;
    }
};

struct Inputs {
    const uint8* q;
    const float* qs;
    PagedKeys cache;
};

// The tile's heads and gates: kTileTokens tokens in one piece of memory.
__device__ __forceinline__ void load_heads(Shared& shared, int buffer, const Inputs& in, const Cursor& at) {
    const int thread = threadIdx.x % kWarpgroup;
    const uint8* q = in.q + int64(at.token) * (kHeads * kDepth);
    for (int offset = 16 * thread; offset < at.tokens() * kHeads * kDepth; offset += 16 * kWarpgroup) {
        copy_16(shared.heads[buffer] + swizzled<kDepth>(offset), q + offset);
    }
    const float* qs = in.qs + int64(at.token) * kHeads;
    for (int i = thread; i < at.tokens() * kHeads; i += kWarpgroup) copy_4(shared.gates[buffer] + i, qs + i);
}

// Table entries of a lane's keys of one stage.
struct Entries {
    PagedKeys::Entry entry[2];

    __device__ __forceinline__ void look_up(const PagedKeys& cache, const Cursor& at, int first) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int position = at.key + first + i * kWarpSize + threadIdx.x % kWarpSize;
            if (position < at.keys) entry[i] = cache.look_up(at.sequence, position);
            else entry[i].block = kNoBlock;
        }
    }
};

// The warp's keys of a stage from `first` on, and their scales; fills in which exist.
__device__ __forceinline__ void load_keys(Shared& shared, int stage, int first, const Inputs& in,
                                          const TensorMap& map, const Entries& entries) {
    const int lane = threadIdx.x % kWarpSize;
    uint64& full = shared.full[stage];
    uint8* keys = shared.keys[stage];
    uint32 bytes = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i, first += kWarpSize) {
        const int64 row = in.cache.row(entries.entry[i]);
        const uint32 exists = __ballot_sync(kFullWarp, row >= 0);
        if (lane == 0) shared.stages[stage].exists[first / kWarpSize] = exists;
        if constexpr (kTensorCopies) {
            constexpr uint32 kLeaders = kFullWarp / ((2u << kBoxRows - 1) - 1);  // every kBoxRows-th lane
            bytes += __popc(exists & kLeaders) * (kBoxRows * kDepth);
            if (row >= 0 && kLeaders >> lane & 1) copy_box(keys + (first + lane) * kDepth, map, 0, int(row), full);
        } else {
#pragma unroll
            for (int j = 0; j < kWarpSize; j += kWarpSize / kPieces) {
                const int64 source = __shfl_sync(kFullWarp, row, j + lane / kPieces);
                const uint32 offset = (first + j) * kDepth + lane * 16;
                const uint8* from = in.cache.blocks + source * kDepth + lane % kPieces * 16;
                if (source >= 0) copy_16(keys + swizzled<kDepth>(offset), from);
            }
        }
        if (row >= 0) copy_4(&shared.stages[stage].scales[first + lane], in.cache.scales + row);
    }
    if (lane == 0) barrier_arrive_expect(full, bytes);
    barrier_arrive_after_copies(full);
}

__device__ __forceinline__ void load_tiles(Shared& shared, const Inputs& in, const TensorMap& map,
                                           const Batch& batch) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize % 4, 0);
    const int part = warp % kCopyWarps;
    int turn = warp / kCopyWarps;  // stages until this warp's next
    Cursor at(batch);
    Place to;
    uint32 tiles = 0;
    Entries entries[kAhead];
    bool fresh = true;
    while (at.left > 0) {
        const uint32 buffer = tiles % 2 ^ !fresh;
        if (fresh) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                entries[i].look_up(in.cache, at, (turn + i * kTurns) * kStageKeys + part * kWarpKeys);
            }
            barrier_wait(shared.heads_empty[buffer], tiles / 2 % 2 ^ 1);
            load_heads(shared, buffer, in, at);
            if (warp == 0 && lane == 0) {
                const int64 seen = min(max(at.seen, int64(-kTileTokens)), int64(batch.max_keys));
                shared.tiles[buffer] = {at.token, at.tokens(), int(seen)};
                barrier_arrive(shared.heads_full[buffer]);
            }
            barrier_arrive_after_copies(shared.heads_full[buffer]);
            ++tiles;
        }
        if (turn == 0) {
            barrier_wait(shared.empty[to.stage], to.parity ^ 1);
            if (part == 0 && lane == 0) {
                Stage& stage = shared.stages[to.stage];
                stage.key = at.key;
                stage.end = min(at.key + at.units() * kUnitKeys, at.keys);
                stage.buffer = buffer;
            }
            load_keys(shared, to.stage, part * kWarpKeys, in, map, entries[0]);
#pragma unroll
            for (int i = 1; i < kAhead; ++i) entries[i - 1] = entries[i];
            entries[kAhead - 1].look_up(in.cache, at, kAhead * kTurns * kStageKeys + part * kWarpKeys);
            turn = kTurns;
        }
        --turn;
        fresh = at.advance();
        to.advance();
    }
    if (turn == 0) {
        barrier_wait(shared.empty[to.stage], to.parity ^ 1);
        if (part == 0 && lane == 0) shared.stages[to.stage].buffer = -1;
        if (lane == 0) barrier_arrive(shared.full[to.stage]);
        barrier_arrive_after_copies(shared.full[to.stage]);
    }
}

// One accumulator's products of a stage.
__device__ __forceinline__ void start_products(float (&acc)[kRegisters], uint64 rows, uint64 columns) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDepth / 32; ++step) wgmma(acc, rows + 2 * step, columns + 2 * step, step != 0);
    wgmma_commit();
}

constexpr int kAtOnce = kAccTokens > 1 ? 2 : 1;  // tokens of a quad's stores

// What a lane writes of a tile: tokens first, first + kAtOnce ... at one row.
struct Target {
    float* scores;  // of its first token, position `row`
    int room;       // of its tokens below the tile's last
    int seen;       // its token i sees the keys below seen + i, and the stage's end
};

// Sums gated products over the heads, and writes scores: lane l of a quad those of row l % 2 and, where
// there are two tokens, of token l / 2 of each pair.
__device__ __forceinline__ void write_scores(const float (&acc)[kRegisters], const float (&gates)[kRegisters / 2],
                                             const Stage& stage, int first_token, int row, const Target& target,
                                             int64 row_stride, float hole) {
    constexpr int kChains = kHeads == 128 ? 2 : 1;  // 32 dependent additions are too long a wait
    constexpr int kSteps = kHeads / 8;
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const int key = stage.key + row;
    const int first_seeing = key < stage.end ? key - target.seen : kTileTokens;
    const bool exists = stage.exists[row / kWarpSize] >> row % kWarpSize & 1;
    const float scale = stage.scales[row];
    float* scores = target.scores + key;
#pragma unroll
    for (int at = 0; at < kAccTokens; at += kAtOnce) {
        float mine[kAtOnce];
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
            float parts[2][kChains] = {};
#pragma unroll
            for (int j = 0; j < kSteps; ++j) {
                const int column = (at + t) * kSteps + j;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {  // fmaxf(NaN, 0) is 0: a NaN product counts as nothing
                        float& part = parts[i][j % kChains];
                        part = fmaf(gates[2 * column + e], fmaxf(acc[4 * column + 2 * i + e], 0.0f), part);
                    }
                }
            }
            const float upper_row = kChains == 2 ? parts[0][0] + parts[0][kChains - 1] : parts[0][0];
            const float lower_row = kChains == 2 ? parts[1][0] + parts[1][kChains - 1] : parts[1][0];
            const float other = __shfl_xor_sync(kFullWarp, odd ? upper_row : lower_row, 1);
            mine[t] = (odd ? lower_row : upper_row) + other;
        }
        const float given = kAtOnce == 2 && !upper ? mine[kAtOnce - 1] : mine[0];
        const float kept = kAtOnce == 2 && upper ? mine[kAtOnce - 1] : mine[0];
        const float sum = kept + __shfl_xor_sync(kFullWarp, given, 2);
        const int token = first_token + at;
        // A product's NaN is 0x7fffffff on every NVIDIA GPU: never kHole.
        if (first_seeing <= token && token < target.room) {
            scores[token * row_stride] = exists ? scale * sum : hole;
        }
    }
}

__device__ __forceinline__ void load_gates(float (&gates)[kRegisters / 2], const float* shared) {
    const int quarter = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kRegisters / 4; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(shared + 8 * j + 2 * quarter);
        gates[2 * j] = pair.x;
        gates[2 * j + 1] = pair.y;
    }
}

__device__ __forceinline__ void release(uint64& barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) barrier_arrive(barrier);
}

struct Output {
    float* scores;
    int64 row_stride;
    int first_token;
    bool causal;
    float hole;
};

__device__ __forceinline__ void score_tiles(Shared& shared, const Output& out) {
    const int lane = threadIdx.x % kWarpSize;
    const int group = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroup, 0);  // known to be uniform
    const int first_row = kKeyGroups == 2 ? group * kUnitKeys : 0;
    const int first_token = kTokenGroups == 2 ? group * kTokens : 0;
    const int row = first_row + threadIdx.x / kWarpSize % 4 * 16 + lane / 4 + 8 * (lane & 1);
    // From an accumulator to the next: other keys, or other tokens.
    constexpr int kNextRow = kKeyBlocks == 2 ? kUnitKeys * kKeyGroups : 0;
    constexpr int kNextToken = kTokenBlocks == 2 ? kAccTokens : 0;
    const uint64 rows = operand_descriptor<kDepth>(shared.keys[0] + first_row * kDepth);
    const uint64 columns = operand_descriptor<kDepth>(shared.heads[0] + first_token * kHeads * kDepth);

    float acc[2][kRegisters];
    float gates[kTokenBlocks][kRegisters / 2];
    Target target;
    int held = -1;  // the buffer of heads in use
    uint32 tiles = 0;
    Place at;
    while (true) {
        barrier_wait(shared.full[at.stage], at.parity);
        const Stage& stage = shared.stages[at.stage];
        const int buffer = __shfl_sync(kFullWarp, stage.buffer, 0);
        if (buffer < 0) return;
        if (buffer != held) {  // the last tile's products are done
            if (held >= 0) release(shared.heads_empty[held]);
            held = buffer;
            barrier_wait(shared.heads_full[buffer], tiles++ / 2 % 2);
            // What threads copied. Not in every stage: it waits for all scores on their way to memory.
            if (kTensorCopies) fence_proxy_async();
#pragma unroll
            for (int i = 0; i < kTokenBlocks; ++i) {
                load_gates(gates[i], shared.gates[buffer] + (first_token + i * kAccTokens) * kHeads);
            }
            const Tile& tile = shared.tiles[buffer];
            const int own = first_token + (kAtOnce == 2 && lane & 2 ? 1 : 0);
            target.scores = out.scores + (tile.token + own - out.first_token) * out.row_stride;
            target.room = kAtOnce == 2 || !(lane & 2) ? tile.tokens - own : 0;
            target.seen = out.causal ? tile.seen + own : 0x7fffffff;
        }
        if (!kTensorCopies) fence_proxy_async();
#pragma unroll
        for (int a = 0; a < 2; ++a) {
            start_products(acc[a], rows + (at.stage * kStageKeys + a * kNextRow) * (kDepth / 16),
                           columns + (buffer * kTileTokens + a * kNextToken) * (kHeads * kDepth / 16));
        }
        // One accumulator is reduced while the tensor cores fill the other, then while they fill the
        // other warpgroup's. Keeping products in flight over the loop's end instead makes ptxas
        // serialise them all (C7514).
        wgmma_wait<1>(acc[0]);
        write_scores(acc[0], gates[0], stage, 0, row, target, out.row_stride, out.hole);
        __syncwarp();  // or ptxas reduces both after the second wait
        wgmma_wait<0>(acc[1]);
        write_scores(acc[1], gates[kTokenBlocks - 1], stage, kNextToken, row + kNextRow, target, out.row_stride,
                     out.hole);
        release(shared.empty[at.stage]);
        at.advance();
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) index_scores_sm90(
    const __grid_constant__ TensorMap keys_map, const uint8* __restrict__ q, const float* __restrict__ qs,
    const uint32* __restrict__ input_row_offsets, const uint32* __restrict__ k_cache_lengths,
    const uint8* __restrict__ k_blocks,
    const float* __restrict__ k_scales, const uint32* __restrict__ k_lookup_table, uint32 num_blocks,
    uint32 num_layers, uint32 layer, uint32 page_size, uint32 pages_per_seq, int batch_size, int total_seq_len,
    int first_token, int end_token, int max_keys, int causal, int signed_offsets, int signed_lengths,
    float hole, int64 row_stride, float* __restrict__ scores) {
    extern __shared__ __align__(1024) uint8 dynamic_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared.full[i], kCopyWarps * (kWarpSize + 1));  // threads' copies, and boxes
            barrier_init(shared.empty[i], kConsumerWarps);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared.heads_full[i], kWarpgroup + 1);
            barrier_init(shared.heads_empty[i], kConsumerWarps);
        }
    }
    __syncthreads();
    if (threadIdx.x / kWarpgroup == kProducer) {
        lower_registers<72>();
        const PagedKeys cache{k_blocks, k_scales, k_lookup_table, num_blocks,
                              num_layers, layer, page_size, pages_per_seq};
        const Batch batch{input_row_offsets, k_cache_lengths, batch_size, total_seq_len, first_token, end_token,
                          max_keys, bool(causal), bool(signed_offsets), bool(signed_lengths)};
        load_tiles(shared, Inputs{q, qs, cache}, keys_map, batch);
    } else {
        raise_registers<216>();
        score_tiles(shared, Output{scores, row_stride, first_token, bool(causal), hole});
    }
}
