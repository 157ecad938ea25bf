// score[t, s] = kscale[s] * sum_h qs[t, h] * max(0, sum_d q[t, h, d] * k[s, d])
//
// On Hopper's FP8 tensor cores, keys read in place from their pages. Layouts as in index_scores.cu,
// with one key head and one scale per key.
//
// A tile is kTileTokens tokens of one sequence, whose heads (the columns of the products) stay in
// shared memory while the keys they see (the rows) stream by, up to kStageKeys at a time. One
// warpgroup copies, the others score: they share the keys and split the tokens (kTokenGroups: many
// tokens, fewest bytes per product), or share the tokens and split the keys (kKeyGroups: few tokens). Those that split
// the tokens split the keys instead in a tile whose tokens fit one of them: decode beside prefill.
// A scoring warpgroup that has more than one product of 64 keys and up to 128 columns a stage has two
// accumulators, so that one is being reduced while the tensor cores fill the other.
//
// Each block has its share of the work from schedule (see scheduler.cuh). With few tokens, where microseconds
// count, it counts its share itself, and the launch writes the tokens' token_rows as well.
//
// Invariant: the bits of score[t, s] depend on the data of t and s alone. A product's depth is summed
// in one fixed order whatever its columns are, and heads by the tree of head_sums.cuh.
//
// A launch scores some tokens against keys [first_key, first_key + max_keys), and not those that see no more than
// `skip` keys. Which tokens, and where the row of a token begins, has been counted (schedule); with few tokens
// they are [first_token, end_token), and rows row_stride elements from one to the next. Column s - first_key of a row
// is key s. Writes the keys the token sees, `hole` where the page does not exist; for a selection, whole vectors of 4.
#include "common.cuh"
#include "head_sums.cuh"
#include "paged_keys.cuh"
#include "scheduler.cuh"
#include "ptx.cuh"
#include "ptx_sm90.cuh"

static_assert(kHeads == 8 || kHeads == 16 || kHeads == 32 || kHeads == 64 || kHeads == 128, "query heads");
static_assert(kDepth == 64 || kDepth == 128, "channels per head: rows that one swizzle covers");
static_assert(kTokens >= 1 && (kTokens & (kTokens - 1)) == 0, "tokens of a warpgroup: a power of two");
static_assert(kTokens * kHeads <= 256, "columns of a warpgroup: 128 registers of accumulators");
static_assert(kTokenGroups >= 1 && kKeyGroups >= 1, "warpgroups that split the tokens, and the keys");
static_assert(kSharedBytes <= 227 * 1024, "shared memory of a block");

constexpr int kGroups = kTokenGroups * kKeyGroups;
constexpr int kColumns = kTokens * kHeads;
constexpr int kHalves = kColumns > 128 ? 2 : 1;   // of the columns, one product each
constexpr int kKeyBlocks = kGroups == 2 ? 2 : 1;  // of a stage, per warpgroup
constexpr int kProducts = kKeyBlocks * kHalves;
constexpr int kAccColumns = kColumns / kHalves;
constexpr int kAccumulators = kProducts > 1 ? 2 : 1;
constexpr int kRegisters = kAccColumns / 2;  // of one accumulator, per thread
using Sums = HeadSums<kHeads, kTokens, kRegisters>;
constexpr int kTileTokens = kTokens * kTokenGroups;
constexpr int kStageKeys = kUnitKeys * kKeyGroups * kKeyBlocks;
constexpr int kWarpgroup = 128;
constexpr int kThreads = (kGroups + 1) * kWarpgroup;  // the last warpgroup copies
constexpr int kPieces = kDepth / 16;                  // 16-byte pieces of a row
constexpr bool kTensorCopies = kBoxRows >= 8;  // whole swizzle groups; else threads copy
// Warps that copy keys, stages in turns. One is best, for then stages arrive in the order of use; but small
// boxes are too many for one.
constexpr int kCopyWarps = kBoxRows == kUnitKeys ? 1 : 4;
static_assert(kBoxRows >= 1 && kUnitKeys % kBoxRows == 0, "keys copied at once: they divide a page");
constexpr int kBoxes = kStageKeys / kBoxRows;
static_assert(!kTensorCopies || kBoxes <= kWarpSize, "a lane a box");
// Of a warp: their table entries are read at once.
constexpr int kBatchStages = kTensorCopies ? kWarpSize / kBoxes : 1;
// As many as hide the memory's latency: with more in flight each comes later.
constexpr int kStages = 4;
using Place = RingPlace<kStages>;
static_assert(kStages >= kCopyWarps, "a copying warp must not be a whole ring ahead: phases have but two names");
constexpr bool kWeighted = kTokenGroups > 1;  // tiles that are half empty are less work
using Work = Cursor<kTileTokens, kStageKeys, kWeighted>;

// What the producer tells of a stage, and of the tile in a buffer of heads.
struct Stage {
    int key;     // the first, counted from first_key as everywhere here
    int end;     // of the keys, at most max_keys
    int whole;   // all keys exist, and all tokens see them
    int last;    // of the tile
    uint32 exists[kStageKeys / kWarpSize];  // a bit per key
    alignas(16) float scales[kStageKeys];
};

struct Tile {
    int64 row;   // where the first token's begins
    int stride;  // from one to the next
    int tokens;  // how many; 0: no more work
    int seen;    // keys seen: seen + (causal ? place in the tile + 1 : 0), or up to the stage's end
};

struct Shared {
    alignas(1024) uint8 keys[kStages][kStageKeys * kDepth];
    alignas(1024) uint8 heads[2][kTileTokens * kHeads * kDepth];
    float gates[2][kTileTokens * kHeads];
    Tile tiles[2];
    Stage stages[kStages];
    uint64 full[kStages], empty[kStages], heads_full[2], heads_empty[2];
};
static_assert(sizeof(Shared) <= kSharedBytes, "shared memory");

// Few tokens, all of a sequence in a tile.
constexpr bool kFewTokens = kKeyGroups > 1;

// Registers of a thread, of those a block of three warpgroups is given: who asked for more would wait for ever.
constexpr int kGiven = 65536 / kThreads / 8 * 8, kCopying = 72, kScoring = 216;
static_assert(kGroups != 2 || kCopying + 2 * kScoring <= 3 * kGiven, "registers of a block");

struct Inputs {
    const uint8* q;
    const float* qs;
    PagedKeys cache;
};

// Where rows of scores begin.
struct Rows {
    const TokenRow* token_rows;  // counted
    int first_token;         // with few tokens: theirs are row_stride apart
    int64 row_stride;

    __device__ __forceinline__ Tile tile(int token, int tokens, int seen) const {
        if (kFewTokens) return {(token - first_token) * row_stride, 0, tokens, seen};
        if (tokens == 0) return {};
        const int64 row = token_rows[token].row;
        // Between rows that have been counted, so in bounds even where numbers changed meanwhile.
        const int64 last = token_rows[token + tokens - 1].row;
        return {row, int((last - row) / max(tokens - 1, 1)), tokens, seen};
    }
};

// Where a head of a tile stands, counted over all its tokens: bits of the number change places, no more.
__device__ constexpr int column_of(int head) {
    const int token = head / kHeads;
    return token / kTokens * kColumns + Sums::column_of(token % kTokens, head % kHeads);
}

// The tile's heads and gates: kTileTokens tokens in one piece of memory.
__device__ __forceinline__ void load_heads(Shared& shared, int buffer, const Inputs& in, const Work& at) {
    int thread = threadIdx.x % kWarpgroup;
    asm volatile("" : "+r"(thread));  // else every column below is kept in a register from tile to tile
    // A thread's heads are kStep apart: what that makes of the column is known when compiling.
    constexpr int kStep = kWarpgroup / kPieces;
    const int first = thread / kPieces, piece = thread % kPieces;
    const uint8* q = in.q + int64(at.token) * (kHeads * kDepth) + thread * 16;
    const int heads = at.tokens() * kHeads - first;
#pragma unroll
    for (int i = 0; i < kTileTokens * kHeads; i += kStep) {
        const int column = column_of(i) | column_of(first);
        uint8* to = shared.heads[buffer] + swizzled<kDepth>(column * kDepth + piece * 16);
        if (i < heads) copy_16(to, q + i * kDepth);
    }
    const float* qs = in.qs + int64(at.token) * kHeads;
    for (int i = thread; i < at.tokens() * kHeads; i += kWarpgroup) copy_4(shared.gates[buffer] + i, qs + i);
}

// Rows of the tensor map where the boxes of a warp's next kBatchStages stages begin, the first `ahead` keys from
// here: a lane a box, -1 where there is none.
__device__ __forceinline__ int look_up_boxes(const PagedKeys& cache, const Work& at, int ahead) {
    const int lane = threadIdx.x % kWarpSize;
    const int position = at.key + ahead + lane / kBoxes * (kCopyWarps * kStageKeys) + lane % kBoxes * kBoxRows;
    if (lane >= kBatchStages * kBoxes || position >= at.stop) return -1;
    return int(cache.row(at.sequence, at.batch.first_key + position));
}

// A stage, by one warp: keys, scales, and which there are. Lane l < kBoxes has the row of box l.
__device__ __forceinline__ void load_keys(Shared& shared, int place, const Inputs& in, const TensorMap& map,
                                          const Work& at, int row) {
    const int lane = threadIdx.x % kWarpSize;
    uint64& full = shared.full[place];
    uint8* keys = shared.keys[place];
    Stage& stage = shared.stages[place];
    const int count = min(at.stop - at.key, kStageKeys);
    bool whole = min(at.seen + at.batch.causal, at.stop) - at.key >= kStageKeys;
    uint32 bytes = 0;  // by the copy engine
    if constexpr (kTensorCopies) {
        const bool aligned = reinterpret_cast<uint64>(in.cache.scales) % 16 == 0;
        float* scales = stage.scales + lane * kBoxRows;
        const bool exists = lane < kBoxes && row >= 0;
        if (exists) {
            uint8* const to = keys + lane * kBoxRows * kDepth;
            if constexpr (kFewTokens) copy_box(to, map, 0, row, full, read_once());
            else copy_box(to, map, 0, row, full);
            if (aligned) copy_bytes(scales, in.cache.scales + row, kBoxRows * sizeof(float), full);
            else for (int j = 0; j < kBoxRows; ++j) scales[j] = in.cache.scales[row + j];
        }
        const uint32 boxes = __ballot_sync(kFullWarp, exists);
        whole = whole && boxes == kFullWarp >> (kWarpSize - kBoxes);
        if (lane < kStageKeys / kWarpSize) {
            uint32 exist = 0;
#pragma unroll
            for (int key = 0; key < kWarpSize; key += kBoxRows) {
                const uint32 bits = kBoxRows >= kWarpSize ? kFullWarp : (1u << kBoxRows % kWarpSize) - 1;
                if (boxes >> (lane * kWarpSize + key) / kBoxRows & 1) exist |= bits << key;
            }
            const int there = min(max(count - lane * kWarpSize, 0), kWarpSize);
            stage.exists[lane] = exist & uint32((uint64(1) << there) - 1);
        }
        bytes = __popc(boxes) * kBoxRows * (kDepth + (aligned ? sizeof(float) : 0));
    } else {
#pragma unroll 2
        for (int i = 0; i < kStageKeys / kWarpSize; ++i) {
            const int key = i * kWarpSize + lane;
            const int64 mine = key < count ? in.cache.row(at.sequence, at.batch.first_key + at.key + key) : -1;
            const uint32 exist = __ballot_sync(kFullWarp, mine >= 0);
            whole = whole && exist == kFullWarp;
            if (lane == 0) stage.exists[i] = exist;
#pragma unroll
            for (int j = 0; j < kWarpSize; j += kWarpSize / kPieces) {
                const int64 source = __shfl_sync(kFullWarp, mine, j + lane / kPieces);
                const uint32 offset = (i * kWarpSize + j) * kDepth + lane * 16;
                const uint8* from = in.cache.blocks + source * kDepth + lane % kPieces * 16;
                if (source >= 0) copy_16(keys + swizzled<kDepth>(offset), from);
            }
            if (mine >= 0) copy_4(stage.scales + key, in.cache.scales + mine);
        }
        barrier_arrive_after_copies(full);
    }
    __syncwarp();
    if (lane == 0) {
        stage.key = at.key;
        stage.end = at.key + count;
        stage.whole = whole;
        stage.last = at.key + kStageKeys >= at.stop;
        barrier_arrive_expect(full, bytes);
    }
}

__device__ __forceinline__ void load_tiles(Shared& shared, const Inputs& in, const TensorMap& map,
                                           const Rows& rows_of, Work& at) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize % 4, 0);
    int turn = warp;  // stages until this warp's next
    int rows = -1, next_rows = -1, stage_of_batch = 0;
    int tiles = 0;
    Place to;
    const auto tell = [&](int tokens) {
        if (warp == 0 && lane == 0) {
            shared.tiles[tiles % 2] = rows_of.tile(at.token, tokens, at.seen);
            barrier_arrive(shared.heads_full[tiles % 2]);
        }
        barrier_arrive_after_copies(shared.heads_full[tiles % 2]);
        ++tiles;
    };
    bool fresh = true;
    while (at.key < at.stop) {
        if (warp < kCopyWarps) {
            constexpr int kBatchKeys = kBatchStages * kCopyWarps * kStageKeys;
            if (kTensorCopies && fresh) {
                rows = look_up_boxes(in.cache, at, turn * kStageKeys);
                next_rows = look_up_boxes(in.cache, at, turn * kStageKeys + kBatchKeys);
                stage_of_batch = 0;
            }
            if (turn-- == 0) {
                if (kTensorCopies && stage_of_batch == kBatchStages) {
                    rows = next_rows;
                    next_rows = look_up_boxes(in.cache, at, kBatchKeys);  // read while this batch is copied
                    stage_of_batch = 0;
                }
                barrier_wait(shared.empty[to.stage()], to.parity() ^ 1);
                const int row = __shfl_sync(kFullWarp, rows, stage_of_batch++ * kBoxes + lane);
                load_keys(shared, to.stage(), in, map, at, row);
                turn = kCopyWarps - 1;
            }
            to.advance();
        }
        if (fresh) {
            barrier_wait(shared.heads_empty[tiles % 2], tiles / 2 % 2 ^ 1);
            load_heads(shared, tiles % 2, in, at);
            tell(at.tokens());
        }
        fresh = at.advance();
    }
    barrier_wait(shared.heads_empty[tiles % 2], tiles / 2 % 2 ^ 1);
    tell(0);
}

__device__ __forceinline__ void release(uint64& barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) barrier_arrive(barrier);
}

struct Output {
    float* scores;
    int64 row_stride;  // with few tokens
    bool causal;
    float hole;
};

constexpr int kNextRow = kUnitKeys * kKeyGroups;  // from a block of keys to the warpgroup's next

// A warpgroup's products of a stage and a tile.
struct Products {
    Shared& shared;
    uint32 rows;     // the warpgroup's keys of stage 0
    uint32 columns;  // its heads of the tile
    float acc[kAccumulators][kRegisters];
    Sums sums;

    __device__ __forceinline__ void start(int p, int stage) {
        float(&products)[kRegisters] = acc[p % kAccumulators];
        const uint32 a = rows + (stage * kStageKeys + p / kHalves * kNextRow) * (kDepth / 16);
        const uint32 b = columns + p % kHalves * kAccColumns * (kDepth / 16);
        wgmma_fence();
        wgmma<kDepth>(products, a, b);
#pragma unroll
        for (int step = 1; step < kDepth / 32; ++step) wgmma_add<kDepth>(products, a + 2 * step, b + 2 * step);
        wgmma_commit();
    }

    // One accumulator is reduced while the tensor cores fill the other, then while they fill the other
    // warpgroup's. Products in flight over the end of a stage would make ptxas serialise all of them (C7514).
    // `prepare` and `write` learn where a block of keys begins, and its sums.
    template <int blocks, class Prepare, class Write>
    __device__ __forceinline__ void score(int stage, const Prepare& prepare, const Write& write) {
        constexpr int kCount = blocks * kHalves;
#pragma unroll
        for (int p = 0; p < kAccumulators && p < kCount; ++p) start(p, stage);
#pragma unroll
        for (int p = 0; p < kCount; ++p) {
            if (p % kHalves == 0) prepare(p / kHalves * kNextRow);
            float(&products)[kRegisters] = acc[p % kAccumulators];
            if (p + 1 < kCount) wgmma_wait<1>(products);
            else wgmma_wait<0>(products);
            if (p + 1 == kCount) release(shared.empty[stage]);
            sums.add(products, p % kHalves, write);
            __syncwarp();  // or ptxas reduces both after the second wait
            if (p + 2 < kCount) start(p + 2, stage);
        }
    }
};

__device__ __forceinline__ void score_tiles(Shared& shared, const Output& out) {
    const int lane = threadIdx.x % kWarpSize, quarter = lane % 4;
    const int group = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroup, 0);  // known to be uniform
    const int lane_row = threadIdx.x / kWarpSize % 4 * 16 + lane / 4 + Sums::first_row();
    Products products{shared};
    Place at;
    for (int tile = 0;; ++tile) {
        const int buffer = tile % 2;
        barrier_wait(shared.heads_full[buffer], tile / 2 % 2);
        const Tile& its = shared.tiles[buffer];
        const int tokens = __shfl_sync(kFullWarp, its.tokens, 0);
        if (tokens == 0) return;
        // What threads copied. Not in every stage: it waits for all scores on their way to memory.
        fence_proxy_async();
        __syncwarp();
        // Tokens that fit one warpgroup are shared by both, which split the keys then.
        const bool few = kTokenGroups > 1 && tokens <= kTokens;
        const int token_group = kTokenGroups > 1 && !few ? group : 0, key_group = kKeyGroups > 1 || few ? group : 0;
        products.sums.load_gates(shared.gates[buffer] + token_group * kColumns);
        products.rows = operand(shared.keys[0] + key_group * kUnitKeys * kDepth);
        products.columns = operand(shared.heads[buffer] + token_group * kColumns * kDepth);
        const int first_token = token_group * kTokens + quarter / Sums::kSharing;  // of the lane
        const int row = key_group * kUnitKeys + lane_row;
        // Of the lane's first token, position `row`. A token i on from it is below the tile's last if i < room.
        const int64 stride = kFewTokens ? out.row_stride : int64(its.stride);
        const int64 token_stride = Sums::kQuadTokens * stride;  // from a token of the lane to its next
        float* const scores = out.scores + its.row + first_token * stride + row;
        const int room = Sums::writes() ? tokens - first_token : 0;
        bool last;
        do {
            barrier_wait(shared.full[at.stage()], at.parity());
            if (!kTensorCopies) fence_proxy_async();
            const Stage& stage = shared.stages[at.stage()];
            last = __shfl_sync(kFullWarp, stage.last, 0);
            float* to;
            float scales[Sums::kRows];
            if (!few && __shfl_sync(kFullWarp, stage.whole, 0)) {
                products.score<kKeyBlocks>(
                    at.stage(),
                    [&](int first) {
                        to = scores + stage.key + first;
#pragma unroll
                        for (int i = 0; i < Sums::kRows; ++i) scales[i] = stage.scales[row + first + 8 * i];
                    },
                    [&](int token, int i, float sum) {
                        store_if(token * Sums::kQuadTokens < room, to + token * token_stride + 8 * i, scales[i] * sum);
                    });
            } else if ((kKeyBlocks == 1 || few) && stage.end - stage.key <= key_group * kUnitKeys) {
                release(shared.empty[at.stage()]);  // no key of this warpgroup's: the others are done sooner
            } else {
                const int end = stage.end;
                // A token i on from the lane's first sees key k if k - i <= seen.
                const int seen = out.causal ? its.seen + first_token : 0x7fffffff;
                bool exists[Sums::kRows];
                int key;
                // Selection reads whole vectors of 4 keys, so they are written. A dense matrix has no room for that.
                const int of_four = out.hole == out.hole ? ~0 : ~3;
                const auto prepare = [&](int first) {
                    key = (stage.key + row + first) & of_four;
                    to = scores + stage.key + first;
#pragma unroll
                    for (int i = 0; i < Sums::kRows; ++i) {
                        const int place = row + first + 8 * i;
                        scales[i] = stage.scales[place];
                        exists[i] = stage.exists[place / kWarpSize] >> place % kWarpSize & 1;
                    }
                };
                const auto write = [&](int token, int i, float sum) {
                    const int on = token * Sums::kQuadTokens;
                    // A product's NaN is 0x7fffffff on every NVIDIA GPU: never kMissing.
                    store_if(on < room && key + 8 * i < end && key + 8 * i - on <= seen,
                             to + token * token_stride + 8 * i, exists[i] ? scales[i] * sum : out.hole);
                };
                if (few) products.score<1>(at.stage(), prepare, write);
                else products.score<kKeyBlocks>(at.stage(), prepare, write);
            }
            at.advance();
        } while (!last);
        release(shared.heads_empty[buffer]);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) index_scores_sm90(
    float* __restrict__ scores, int first_token, int end_token, const WorkRange* __restrict__ work_ranges,
    TokenRow* __restrict__ token_rows, int first_key, int max_keys, const uint8* __restrict__ q,
    const float* __restrict__ qs, const uint32* __restrict__ input_row_offsets,
    const uint32* __restrict__ k_cache_lengths, const uint8* __restrict__ k_blocks,
    const float* __restrict__ k_scales, const uint32* __restrict__ k_lookup_table, uint32 num_blocks,
    uint32 num_layers, uint32 layer, uint32 page_size, uint32 page_factor, uint32 page_shift, uint32 pages_per_seq,
    int batch_size, int total_seq_len, int all_keys, int skip, int causal, int signed_offsets, int signed_lengths,
    int total_lengths, float hole, int64 row_stride, const __grid_constant__ TensorMap keys_map) {
    extern __shared__ __align__(1024) uint8 dynamic_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    const bool copies = threadIdx.x / kWarpgroup == kGroups;
    const int warp = threadIdx.x / kWarpSize;
    const bool has_work = kFewTokens || work_ranges[blockIdx.x].left > 0;
    if (threadIdx.x % kWarpSize == 0) {
        for (int i = warp; i < kStages; i += kThreads / kWarpSize) {
            barrier_init(shared.full[i], kTensorCopies ? 1 : 1 + kWarpSize);
            barrier_init(shared.empty[i], 4 * kGroups);
        }
        if (warp < 2) {
            barrier_init(shared.heads_full[warp], kWarpgroup + 1);
            barrier_init(shared.heads_empty[warp], 4 * kGroups);
        }
        if (kTensorCopies && warp == 2) prefetch(keys_map);
        fence_barrier_init();
    }
    if (kFewTokens) let_next_launch_begin();
    __syncthreads();
    if (!has_work) return;
    if (copies) {
        if (kGroups == 2) lower_registers<kCopying>();
        const PagedKeys cache{k_blocks, k_scales, k_lookup_table, num_blocks, num_layers, layer, page_size,
                              page_factor, page_shift, pages_per_seq};
        WorkRange share;
        if (!kFewTokens) share = work_ranges[blockIdx.x];
        Batch batch{input_row_offsets, k_cache_lengths, batch_size, total_seq_len, kFewTokens ? first_token : 0,
                    kFewTokens ? end_token : share.end_of_launch, all_keys, first_key, max_keys, skip, bool(causal),
                    bool(signed_offsets), bool(signed_lengths), bool(total_lengths)};
        if (kFewTokens) share = work_range_of_block<kTileTokens, kWeighted>(batch, blockIdx.x, gridDim.x);
        Work at(batch, share);
        const Inputs inputs{q, qs, cache};
        const Rows rows{token_rows, first_token, row_stride};
        load_tiles(shared, inputs, keys_map, rows, at);
        if (!kFewTokens || first_key > 0) return;
        batch.max_keys = all_keys;  // there is time while the last keys are scored
        const int copier = __shfl_sync(kFullWarp, warp % 4, 0);
        for (int token = first_token + blockIdx.x * 4 + copier; token < end_token; token += gridDim.x * 4) {
            TokenRow span = locate(batch, token);
            span.row = (token - first_token) * row_stride;
            if (threadIdx.x % kWarpSize == 0) token_rows[token] = span;
        }
    } else {
        if (kGroups == 2) raise_registers<kScoring>();
        score_tiles(shared, Output{scores, row_stride, bool(causal), hole});
    }
}
