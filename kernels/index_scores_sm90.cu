// score[t, s] = kscale[s] * sum_h qs[t, h] * max(0, sum_d q[t, h, d] * k[s, d])
//
// On Hopper's FP8 tensor cores, with keys read in place from their pages. One key head, one scale
// per key. qs may be null: then every gate is 1.
//
// A tile is kTileTokens tokens of one sequence. The heads of these tokens (the columns of the
// products) stay in shared memory. A token takes kHeadColumns columns. If it has fewer heads, the
// columns left over hold anything, and their gates are 0: a product is then finite or a NaN, and
// max(0, NaN) is 0, so they add 0. The keys that they see (the rows) pass through a ring of
// pipeline stages of kStageKeys keys each. The last warpgroup is the producer and copies; the
// others are consumers and score. In prefill (kTokenGroups consumers) each consumer takes some of
// the tile's tokens and all keys: so a product reads the fewest bytes of shared memory. In decode
// (kKeyGroups consumers) a tile has few tokens, and each consumer takes all tokens and some of the
// keys. A prefill tile whose tokens fit one consumer is scored as in decode. If it has one token,
// for instance a decode request in a mixed batch, only the columns of that token are multiplied.
//
// A consumer with several products (64 keys by up to 128 columns) in a stage has two accumulators:
// it reduces one while the tensor cores fill the other.
//
// In prefill, schedule has written the work range of each block and the token rows. In decode, each
// block finds its own work range (scheduler.cuh), and this kernel writes the token rows as well.
//
// Invariant: the bits of score[t, s] depend on the data of t and s alone. The tensor cores sum the
// depth of a product in one fixed order, which does not depend on the columns, and head_sums.cuh
// adds the heads by one fixed tree.
//
// Writes the scores of the keys that each token sees, and missing_score for a key whose page does
// not exist. Tokens that see at most batch.unscored_kv_len keys are left out. If selection reads
// the scores, whole vectors of 4 keys are written.
#include "common.cuh"
#include "head_sums.cuh"
#include "paged_keys.cuh"
#include "ptx.cuh"
#include "ptx_sm90.cuh"
#include "row_layout.cuh"
#include "scheduler.cuh"

static_assert(kHeads >= 1 && kHeads <= kHeadColumns, "query heads: each has a column");
static_assert(kHeadColumns == 8 || kHeadColumns == 16 || kHeadColumns == 32 || kHeadColumns == 64 ||
                  kHeadColumns == 128,
              "columns of a token");
static_assert(kDepth == 64 || kDepth == 128, "channels per head: rows that one swizzle covers");
static_assert(kTokens >= 1 && (kTokens & (kTokens - 1)) == 0,
              "tokens of a consumer: a power of two");
static_assert(kTokens <= 16, "more leave a lane too few registers for what it keeps of each token");
static_assert(kTokens * kHeadColumns <= 256,
              "columns of a consumer: 128 registers of accumulators");
static_assert(kTokenGroups > 1 || kHalfTileUnitKeys == kUnitKeys,
              "in decode, all work units are alike");
static_assert(kTokenGroups >= 1 && kKeyGroups >= 1,
              "consumers that split the tokens, and that split the keys");
static_assert(kBoxRows >= 1 && kUnitKeys % kBoxRows == 0,
              "keys of a TMA box: a divisor of the page size");
static_assert(kSharedBytes <= 227 * 1024, "shared memory of a block");

struct Params {
    TensorMap
        keys_map;  // keys.blocks as [num_blocks, page_size, kDepth], in boxes of kBoxRows keys
    PagedKeys keys;
    RaggedBatch batch;
    const uint8* q;                // [tokens, kHeads, kDepth], E4M3 codes
    const float* qs;               // [tokens, kHeads], or null
    const WorkRange* work_ranges;  // prefill: [blocks], from schedule
    TokenRow* token_rows;  // [tokens]; prefill: from schedule; decode: output, if first_key is 0
    float* scores;         // column s - first_key of a row is key s
    int64 row_stride;      // elements; decode only
    int first_token, end_token;  // the tokens to score; decode only
    int first_key, num_keys;     // the keys to score them against
    float missing_score;         // written if a key's page does not exist
};

// Shapes.
constexpr bool kDecode = kKeyGroups > 1;
constexpr int kConsumers = kTokenGroups * kKeyGroups;
constexpr int kKeyBlocks = kConsumers == 2 ? 2 : 1;  // of 64 keys that a consumer scores per stage

// The columns that a consumer multiplies by keys: the heads of some tokens.
template <int tokens, int key_blocks>
struct ConsumerColumns {
    static constexpr int kColumns = tokens * kHeadColumns;
    static constexpr int kHalves = kColumns > 128 ? 2 : 1;  // a product has at most 128 columns
    static constexpr int kAccumulators = key_blocks * kHalves > 1 ? 2 : 1;
    static constexpr int kAccColumns = kColumns / kHalves;
    static constexpr int kAccRegisters = kAccColumns / 2;  // of one accumulator, per thread
    using Sums = HeadSums<kHeadColumns, tokens, kAccRegisters>;

    // The column of a head, counted over the tokens of all consumers, kHeadColumns to a token. The
    // bits of the number are permuted, so column_of(a | b) is column_of(a) | column_of(b).
    static __device__ constexpr int column_of(int head) {
        const int token = head / kHeadColumns;
        return token / tokens * kColumns + Sums::column_of(token % tokens, head % kHeadColumns);
    }
};
using AllTokens = ConsumerColumns<kTokens, kKeyBlocks>;
using OneToken = ConsumerColumns<1, 1>;

// Whether a tile is scored with the columns of one token, by score_one_token.
__device__ __forceinline__ bool is_one_token(int tokens) { return kTokenGroups > 1 && tokens == 1; }

constexpr int kTileTokens = kTokens * kTokenGroups;
constexpr int kStageKeys = kUnitKeys * kKeyGroups * kKeyBlocks;
// Enough to hide the latency of memory. With more stages in flight, each arrives later.
constexpr int kStages = 4;
using Cursor = WorkCursor<kTileTokens, kStageKeys, kHalfTileUnitKeys>;

constexpr int kWarpgroup = 128;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
// setmaxnreg deadlocks if the warpgroups together ask for more registers than the block was given.
constexpr int kGivenRegisters = 65536 / kThreads / 8 * 8;
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(kConsumers != 2 || kProducerRegisters + 2 * kConsumerRegisters <= 3 * kGivenRegisters,
              "registers");

// The producer copies keys by TMA if a box is whole swizzle groups of 8 rows, else by cp.async.
constexpr bool kUseTma = kBoxRows >= 8;
static_assert(kKeyAlignment == 16 || kKeyAlignment == 4 || kKeyAlignment == 1,
              "bytes to which the values of every key are aligned");
static_assert(kKeyAlignment == 16 || !kUseTma, "TMA copies from addresses aligned to 16 bytes");
// Several producer warps take stages in turns. With one warp, stages arrive in the order of use,
// which is faster; but one warp can't issue small boxes fast enough.
constexpr int kCopyWarps = kBoxRows == kUnitKeys ? 1 : 4;
static_assert(kStages >= kCopyWarps,
              "otherwise a warp could be a ring ahead, and parity could not tell the phases apart");
constexpr int kBoxes = kStageKeys / kBoxRows;  // of a stage
static_assert(!kUseTma || kBoxes <= kWarpSize, "each lane copies a box");
// Stages whose table entries a warp reads at once.
constexpr int kBatchStages = kUseTma ? kWarpSize / kBoxes : 1;

// Shared memory.
struct Stage {
    int key;    // the stage's first
    int end;    // its last + 1
    int whole;  // all kStageKeys keys exist, and all tokens of the tile see all of them
    int last;   // the last stage of the tile
    uint32 exists[kStageKeys / kWarpSize];  // a bit per key
    alignas(16) float scales[kStageKeys];
};

struct Tile {
    int64 row_offset;  // elements, of the first token
    int row_stride;    // prefill only
    int tokens;        // 0: no more tiles
    int seen;          // tokens, by each token; causal: by the token before the first
};

struct Shared {
    alignas(1024) uint8 keys[kStages][kStageKeys * kDepth];
    alignas(1024) uint8 heads[2][kTileTokens * kHeadColumns * kDepth];  // of two tiles
    float gates[2][kTileTokens * kHeadColumns];
    Tile tiles[2];
    Stage stages[kStages];
    uint64 full[kStages], empty[kStages], heads_full[2], heads_empty[2];
};
static_assert(sizeof(Shared) <= kSharedBytes, "shared memory");

// The two roles. Both are written in terms of the shapes and the shared memory above.
#include "sm90_producer.cuh"
#include "sm90_consumer.cuh"

__device__ __forceinline__ void init_barriers(Shared& shared) {
    const int warp = threadIdx.x / kWarpSize;
    for (int i = warp; i < kStages; i += kThreads / kWarpSize) {
        barrier_init(shared.full[i], kUseTma ? 1 : 1 + kWarpSize);
        barrier_init(shared.empty[i], 4 * kConsumers);
    }
    if (warp < 2) {
        barrier_init(shared.heads_full[warp], kWarpgroup + 1);
        barrier_init(shared.heads_empty[warp], 4 * kConsumers);
    }
    fence_barrier_init();
}

// The gates that load_heads doesn't copy: of columns without a head, and of all if there are none.
__device__ __forceinline__ void fill_gates(Shared& shared, const Params& p) {
    if (kHeads == kHeadColumns && p.qs) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * kTileTokens * kHeadColumns; i += kThreads) {
        (&shared.gates[0][0])[i] = i % kHeadColumns < kHeads ? 1.0f : 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    index_scores_sm90(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8 dynamic_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    const bool is_producer = threadIdx.x / kWarpgroup == kConsumers;
    const bool has_work = kDecode || __ldg(&p.work_ranges[blockIdx.x].units) > 0;
    if (threadIdx.x % kWarpSize == 0) {
        init_barriers(shared);
        if (kUseTma && threadIdx.x / kWarpSize == 2) prefetch(p.keys_map);
    }
    fill_gates(shared, p);
    if (kDecode) {
        wait_for_launch_before();
        let_next_launch_begin();
    }
    __syncthreads();
    if (!has_work) return;
    if (is_producer) {
        if (kConsumers == 2) lower_registers<kProducerRegisters>();
        produce(shared, p);
        // There is time while the last keys are scored.
        if (kDecode && p.first_key == 0) write_token_rows(p);
    } else {
        if (kConsumers == 2) raise_registers<kConsumerRegisters>();
        score_tiles(shared, p);
    }
}
