// A consumer warpgroup of index_scores_sm90: multiplies the keys of each stage by its heads of the
// tile, adds the gated products over the heads, and writes the scores.
#pragma once

__device__ __forceinline__ void release(uint64& barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) barrier_arrive(barrier);
}

constexpr int kBlockStep = kUnitKeys * kKeyGroups;  // keys from one block of a consumer to its next

// A consumer's products of a stage and a tile.
template <class Columns>
struct Products {
    static constexpr int kHalves = Columns::kHalves, kAccumulators = Columns::kAccumulators;

    Shared& shared;
    uint32 keys;   // descriptor of its first keys in stage 0
    uint32 heads;  // descriptor of its heads
    float acc[kAccumulators][Columns::kAccRegisters];
    typename Columns::Sums sums;

    // Issues product i: 64 keys by half of the columns, or by all if kHalves is 1.
    __device__ __forceinline__ void start(int i, int stage) {
        auto& products = acc[i % kAccumulators];
        const uint32 a = keys + (stage * kStageKeys + i / kHalves * kBlockStep) * (kDepth / 16);
        const uint32 b = heads + i % kHalves * Columns::kAccColumns * (kDepth / 16);
        wgmma_fence();
        wgmma<kDepth>(products, a, b);
#pragma unroll
        for (int step = 1; step < kDepth / 32; ++step) {
            wgmma_add<kDepth>(products, a + 2 * step, b + 2 * step);
        }
        wgmma_commit();
    }

    // Scores `blocks` blocks of 64 keys of a stage. Calls prepare(first key) before each block and
    // write(token, row, sum) for each sum over heads. One accumulator is reduced while the tensor
    // cores fill the other; while the last of a stage is reduced, they work for the other
    // consumers. No product is in flight across the end of a stage, because ptxas would then
    // serialise all of them (warning C7514).
    template <int blocks, class Prepare, class Write>
    __device__ __forceinline__ void score(int stage, const Prepare& prepare, const Write& write) {
        constexpr int kCount = blocks * kHalves;
#pragma unroll
        for (int i = 0; i < kAccumulators && i < kCount; ++i) start(i, stage);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (i % kHalves == 0) prepare(i / kHalves * kBlockStep);
            auto& products = acc[i % kAccumulators];
            if (i + 1 < kCount) wgmma_wait<1>(products);
            else wgmma_wait<0>(products);
            if (i + 1 == kCount) release(shared.empty[stage]);
            sums.add(products, i % kHalves, write);
            __syncwarp();  // else ptxas moves this reduction behind the next wait
            if (i + 2 < kCount) start(i + 2, stage);
        }
    }
};

// Scores a tile of one token in prefill: its heads alone are multiplied, and the consumers split
// the keys. With the columns of a whole consumer, 48 decode requests beside two prefill requests
// took twice as long as alone (H200, 64 heads).
__device__ __forceinline__ void score_one_token(Shared& shared, const Params& p, int buffer,
                                                RingPlace<kStages>& place) {
    using Sums = OneToken::Sums;
    const int consumer = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroup, 0);
    const Tile& tile = shared.tiles[buffer];
    Products<OneToken> products{shared};
    products.sums.load_gates(shared.gates[buffer]);
    products.keys = operand(shared.keys[0] + consumer * kUnitKeys * kDepth);
    products.heads = operand(shared.heads[buffer]);
    const int lane_key = consumer * kUnitKeys + threadIdx.x / kWarpSize % 4 * 16 +
                         threadIdx.x % kWarpSize / 4 + Sums::first_row();
    float* const scores = p.scores + tile.row_offset + lane_key;
    // Whole vectors of 4 keys are written, as below.
    const int vector_mask = p.missing_score == p.missing_score ? ~0 : ~3;
    bool last;
    do {
        barrier_wait(shared.full[place.stage()], place.parity());
        if (!kUseTma) fence_proxy_async();
        const Stage& stage = shared.stages[place.stage()];
        last = __shfl_sync(kFullWarp, stage.last, 0);
        if (stage.end - stage.key <= consumer * kUnitKeys) {
            release(shared.empty[place.stage()]);  // no keys for this consumer
        } else {
            // The token sees all keys of the tile. What is read here may be overwritten once the
            // stage is released.
            float* const to = scores + stage.key;
            const bool in_row = ((stage.key + lane_key) & vector_mask) < stage.end;
            const bool exists = stage.exists[lane_key / kWarpSize] >> lane_key % kWarpSize & 1;
            const float scale = stage.scales[lane_key];
            const auto write = [&](int, int, float sum) {
                store_if(Sums::writes() && in_row, to, exists ? scale * sum : p.missing_score);
            };
            products.score<1>(place.stage(), [](int) {}, write);
        }
        place.advance();
    } while (!last);
}

__device__ __forceinline__ void score_tiles(Shared& shared, const Params& p) {
    using Sums = AllTokens::Sums;
    const int lane = threadIdx.x % kWarpSize, quarter = lane % 4;
    // The shuffle tells the compiler that the number is uniform in a warp.
    const int consumer = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroup, 0);
    const int lane_row = threadIdx.x / kWarpSize % 4 * 16 + lane / 4 + Sums::first_row();
    Products<AllTokens> products{shared};
    RingPlace<kStages> place;
    for (int tiles = 0;; ++tiles) {
        const int buffer = tiles % 2;
        barrier_wait(shared.heads_full[buffer], tiles / 2 % 2);
        const Tile& tile = shared.tiles[buffer];
        const int tokens = __shfl_sync(kFullWarp, tile.tokens, 0);
        if (tokens == 0) return;
        // Makes what cp.async wrote visible to the tensor cores. With TMA this is done once per
        // tile, not per stage, because the fence also waits for all scores on their way to memory.
        fence_proxy_async();
        __syncwarp();
        if (is_one_token(tokens)) {
            score_one_token(shared, p, buffer, place);
            release(shared.heads_empty[buffer]);
            continue;
        }
        // If the tokens fit one consumer, both take all of them and split the keys.
        const bool one_group = kTokenGroups > 1 && tokens <= kTokens;
        const int token_group = kTokenGroups > 1 && !one_group ? consumer : 0;
        const int key_group = kKeyGroups > 1 || one_group ? consumer : 0;
        products.sums.load_gates(shared.gates[buffer] + token_group * AllTokens::kColumns);
        products.keys = operand(shared.keys[0] + key_group * kUnitKeys * kDepth);
        products.heads = operand(shared.heads[buffer] + token_group * AllTokens::kColumns * kDepth);
        // The lane's first token, and its first key in a stage.
        const int lane_token = token_group * kTokens + quarter / Sums::kSharing;
        const int lane_key = key_group * kUnitKeys + lane_row;
        // The lane's token i is in the tile if i * kQuadTokens < room.
        int room = Sums::writes() ? tokens - lane_token : 0;
        const int64 stride = kDecode ? p.row_stride : int64(tile.row_stride);
        const int64 token_stride = Sums::kQuadTokens * stride;
        float* const scores = p.scores + tile.row_offset + lane_token * stride + lane_key;
        bool last;
        do {
            barrier_wait(shared.full[place.stage()], place.parity());
            if (!kUseTma) fence_proxy_async();
            const Stage& stage = shared.stages[place.stage()];
            last = __shfl_sync(kFullWarp, stage.last, 0);
            // Hides the value from the compiler, which otherwise keeps a predicate for each of the
            // lane's tokens, and with pooled keys spills some of them.
            if constexpr (kTokensPerKey > 1 || !kUseTma) asm volatile("" : "+r"(room));
            float* to;
            float scales[Sums::kRows];
            if (!one_group && __shfl_sync(kFullWarp, stage.whole, 0)) {
                const auto prepare = [&](int first) {
                    to = scores + stage.key + first;
#pragma unroll
                    for (int i = 0; i < Sums::kRows; ++i) {
                        scales[i] = stage.scales[lane_key + first + 8 * i];
                    }
                };
                const auto write = [&](int token, int i, float sum) {
                    store_if(token * Sums::kQuadTokens < room, to + token * token_stride + 8 * i,
                             scales[i] * sum);
                };
                products.score<kKeyBlocks>(place.stage(), prepare, write);
            } else if ((kKeyBlocks == 1 || one_group) &&
                       stage.end - stage.key <= key_group * kUnitKeys) {
                release(shared.empty[place.stage()]);  // no keys for this consumer
            } else {
                // A key is counted as the tokens that show all keys before it: one number less to
                // keep than the key as well.
                const uint32 end = uint32(stage.end) * kTokensPerKey;
                // A token i places after the lane's first has seen tile.seen + lane_token + i + 1
                // tokens. It sees a key if these are at least key + kTokensPerKey, and so if
                // key - i <= last_seen.
                const int last_seen =
                    p.batch.causal ? tile.seen + lane_token + 1 - kTokensPerKey : 0x7fffffff;
                bool exists[Sums::kRows];
                uint32 key;
                // Selection reads whole vectors of 4 keys, so whole vectors are written. The rows
                // of a dense matrix, whose missing_score is not a NaN, have no padding for that.
                const int vector_mask = p.missing_score == p.missing_score ? ~0 : ~3;
                const auto prepare = [&](int first) {
                    key = ((stage.key + lane_key + first) & vector_mask) * uint32(kTokensPerKey);
                    to = scores + stage.key + first;
#pragma unroll
                    for (int i = 0; i < Sums::kRows; ++i) {
                        const int k = lane_key + first + 8 * i;
                        scales[i] = stage.scales[k];
                        exists[i] = stage.exists[k / kWarpSize] >> k % kWarpSize & 1;
                    }
                };
                const auto write = [&](int token, int i, float sum) {
                    const int after = token * Sums::kQuadTokens;
                    // A NaN product is 0x7fffffff on every NVIDIA GPU, so never kMissing.
                    const uint32 own = key + 8 * i * kTokensPerKey;
                    store_if(after < room && own < end && int(own - after) <= last_seen,
                             to + token * token_stride + 8 * i,
                             exists[i] ? scales[i] * sum : p.missing_score);
                };
                if (one_group) products.score<1>(place.stage(), prepare, write);
                else products.score<kKeyBlocks>(place.stage(), prepare, write);
            }
            place.advance();
        } while (!last);
        release(shared.heads_empty[buffer]);
    }
}
