// The producer warpgroup of index_scores_sm90: copies the heads of each tile and, stage by stage,
// its keys.
//
// All four warps copy heads. Keys are copied by kCopyWarps warps, which take stages in turns: each
// warp looks up the pages of its stages in the table, waits until a stage is empty, and issues the
// copies. They are complete when the stage's barrier `full` has counted the bytes (TMA) or the
// arrivals (cp.async).
#pragma once

// Copies the heads of a tile of at most `most` tokens, which are contiguous in memory.
template <class Columns, int most>
__device__ __forceinline__ void copy_heads(uint8* shared, const Params& p, const Cursor& at) {
    int thread = threadIdx.x % kWarpgroup;
    // Hides the value from the compiler, which otherwise keeps each column below in a register.
    asm volatile("" : "+r"(thread));
    // A thread takes one 16-byte piece of every kStep-th head, so that most bits of a column are
    // known at compile time.
    constexpr int kPieces = kDepth / 16;
    constexpr int kStep = kWarpgroup / kPieces;
    const int first = thread / kPieces, piece = thread % kPieces;
    const uint8* q = p.q + int64(at.token) * (kHeads * kDepth) + thread * 16;
    const int heads = at.tokens() * kHeadColumns - first;
#pragma unroll
    for (int i = 0; i < most * kHeadColumns; i += kStep) {
        const int column = Columns::column_of(i) | Columns::column_of(first);
        uint8* to = shared + swizzled<kDepth>(column * kDepth + piece * 16);
        const int token = i / kHeadColumns + first / kHeadColumns;
        const bool has_head = (i + first) % kHeadColumns < kHeads;
        const int from = i - token * (kHeadColumns - kHeads);
        if (i < heads && has_head) copy_16(to, q + from * kDepth);
    }
}

// Copies a tile's heads and gates.
__device__ __forceinline__ void load_heads(Shared& shared, int buffer, const Params& p,
                                           const Cursor& at) {
    if (is_one_token(at.tokens())) copy_heads<OneToken, 1>(shared.heads[buffer], p, at);
    else copy_heads<AllTokens, kTileTokens>(shared.heads[buffer], p, at);
    if (!p.qs) return;
    const float* qs = p.qs + int64(at.token) * kHeads;
    for (int i = threadIdx.x % kWarpgroup; i < at.tokens() * kHeads; i += kWarpgroup) {
        copy_4(shared.gates[buffer] + i / kHeads * kHeadColumns + i % kHeads, qs + i);
    }
}

// Looks up the boxes of a warp's next kBatchStages stages, the first of which is `ahead` keys from
// here. Each lane gets the block of one box, or kNoBlock if the page does not exist or the tile has
// no such keys.
__device__ __forceinline__ uint32 look_up_boxes(const PagedKeys& keys, const Cursor& at,
                                                int ahead) {
    const int lane = threadIdx.x % kWarpSize;
    const int key =
        at.key + ahead + lane / kBoxes * (kCopyWarps * kStageKeys) + lane % kBoxes * kBoxRows;
    if (lane >= kBatchStages * kBoxes || key >= at.key_end) return kNoBlock;
    const PagedKeys::Entry entry = keys.look_up(at.sequence, at.launch.first_key + key);
    return keys.exists(entry) ? entry.block : kNoBlock;
}

// Copies 16 bytes of a key, whatever its alignment.
__device__ __forceinline__ void copy_piece(uint8* to, const uint8* from) {
    if constexpr (kKeyAlignment == 16) {
        copy_16(to, from);
    } else if constexpr (kKeyAlignment == 4) {
#pragma unroll
        for (int i = 0; i < 16; i += 4) copy_4(to + i, from + i);
    } else {  // plain stores: the last arrival of load_stage publishes them
        uint32 words[4] = {};
#pragma unroll
        for (int i = 0; i < 16; ++i) words[i / 4] |= uint32(__ldg(from + i)) << i % 4 * 8;
        *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    }
}

// Fills a stage, by one warp: keys, scales, and which keys exist. Lane l < kBoxes has the block of
// box l. One function for both ways of copying: split in two, prefill took up to 1 % longer on an
// H200.
__device__ __forceinline__ void load_stage(Shared& shared, int place, const Params& p,
                                           const Cursor& at, uint32 block) {
    const int lane = threadIdx.x % kWarpSize;
    uint64& full = shared.full[place];
    uint8* const keys = shared.keys[place];
    Stage& stage = shared.stages[place];
    const int count = min(at.key_end - at.key, kStageKeys);
    bool whole = keys_of(at.seen + at.launch.causal, at.key_end) - at.key >= kStageKeys;
    uint32 bytes = 0;  // that TMA counts on the barrier
    if constexpr (kUseTma) {
        const uint64 scales_address = reinterpret_cast<uint64>(p.keys.scales);
        const bool aligned = (scales_address | p.keys.scales_stride * sizeof(float)) % 16 == 0;
        const bool exists = lane < kBoxes && block != kNoBlock;
        if (exists) {
            const int key = at.launch.first_key + at.key + lane * kBoxRows;
            const PagedKeys::Entry first{block, p.keys.slot_in_page(key)};
            uint8* const to = keys + lane * kBoxRows * kDepth;
            if constexpr (kDecode) {
                copy_box(to, p.keys_map, 0, first.slot, block, full, read_once());
            } else {
                copy_box(to, p.keys_map, 0, first.slot, block, full);
            }
            const float* const from = p.keys.scales_of(first, 1);
            float* const scales = stage.scales + lane * kBoxRows;
            if (aligned) {
                copy_bytes(scales, from, kBoxRows * sizeof(float), full);
            } else {
                for (int j = 0; j < kBoxRows; ++j) scales[j] = from[j];
            }
        }
        const uint32 boxes = __ballot_sync(kFullWarp, exists);
        whole = whole && boxes == kFullWarp >> (kWarpSize - kBoxes);
        // One lane writes all words: it is the lane that arrives at the barrier below.
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < kStageKeys / kWarpSize; ++i) {
                uint32 exist = 0;
#pragma unroll
                for (int key = 0; key < kWarpSize; key += kBoxRows) {
                    const uint32 bits =
                        kBoxRows >= kWarpSize ? kFullWarp : (1u << kBoxRows % kWarpSize) - 1;
                    if (boxes >> (i * kWarpSize + key) / kBoxRows & 1) exist |= bits << key;
                }
                const int below_end = min(max(count - i * kWarpSize, 0), kWarpSize);
                stage.exists[i] = exist & uint32((uint64(1) << below_end) - 1);
            }
        }
        bytes = __popc(boxes) * kBoxRows * (kDepth + (aligned ? sizeof(float) : 0));
    } else {  // every lane looks up one key at a time; kPieces lanes copy a key together
        constexpr int kPieces = kDepth / 16;
#pragma unroll 2
        for (int i = 0; i < kStageKeys / kWarpSize; ++i) {
            const int key = i * kWarpSize + lane;
            PagedKeys::Entry entry{kNoBlock, 0};
            if (key < count) {
                entry = p.keys.look_up(at.sequence, at.launch.first_key + at.key + key);
            }
            const bool exists = p.keys.exists(entry);
            const int64 mine =
                exists ? reinterpret_cast<int64>(p.keys.values_of(entry, kDepth)) : 0;
            const uint32 exist = __ballot_sync(kFullWarp, exists);
            whole = whole && exist == kFullWarp;
            if (lane == 0) stage.exists[i] = exist;
#pragma unroll(kKeyAlignment == 1 ? 1 : kPieces)  // 16 loads in flight take 16 registers
            for (int j = 0; j < kWarpSize; j += kWarpSize / kPieces) {
                const int64 source = __shfl_sync(kFullWarp, mine, j + lane / kPieces);
                const uint32 offset = (i * kWarpSize + j) * kDepth + lane * 16;
                const uint8* from = reinterpret_cast<const uint8*>(source) + lane % kPieces * 16;
                if (source) copy_piece(keys + swizzled<kDepth>(offset), from);
            }
            if (exists) copy_4(stage.scales + key, p.keys.scales_of(entry, 1));
        }
        barrier_arrive_after_copies(full);
    }
    __syncwarp();
    if (lane == 0) {
        stage.key = at.key;
        stage.end = at.key + count;
        stage.whole = whole;
        stage.last = at.key + kStageKeys >= at.key_end;
        barrier_arrive_expect(full, bytes);
    }
}

// What the consumers need to know of a tile; with 0 tokens it tells them that there are no more.
__device__ __forceinline__ Tile describe_tile(const Params& p, const Cursor& at, int tokens) {
    if (kDecode) return {(at.token - p.first_token) * p.row_stride, 0, tokens, at.seen};
    if (tokens == 0) return {};
    // Both offsets come from memory, so rows stay in bounds even if lengths have been changed since
    // schedule ran.
    const int64 first = p.token_rows[at.token].offset;
    const int64 last = p.token_rows[at.token + tokens - 1].offset;
    return {first, int((last - first) / max(tokens - 1, 1)), tokens, at.seen};
}

__device__ __forceinline__ void load_tiles(Shared& shared, const Params& p, Cursor& at) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize % 4, 0);
    int turn = warp;  // stages until this warp's next
    // The blocks of the boxes in this batch of stages, and in the next batch.
    uint32 blocks = kNoBlock, next_blocks = kNoBlock;
    int stage_of_batch = 0;
    int tiles = 0;
    RingPlace<kStages> place;
    const auto hand_over_heads = [&](int tokens) {
        if (warp == 0 && lane == 0) {
            shared.tiles[tiles % 2] = describe_tile(p, at, tokens);
            barrier_arrive(shared.heads_full[tiles % 2]);
        }
        barrier_arrive_after_copies(shared.heads_full[tiles % 2]);
        ++tiles;
    };
    bool new_tile = true;
    while (at.key < at.key_end) {
        if (warp < kCopyWarps) {
            constexpr int kBatchKeys = kBatchStages * kCopyWarps * kStageKeys;
            if (kUseTma && new_tile) {
                blocks = look_up_boxes(p.keys, at, turn * kStageKeys);
                next_blocks = look_up_boxes(p.keys, at, turn * kStageKeys + kBatchKeys);
                stage_of_batch = 0;
            }
            if (turn-- == 0) {
                if (kUseTma && stage_of_batch == kBatchStages) {
                    blocks = next_blocks;
                    // The table entries arrive while this batch is copied.
                    next_blocks = look_up_boxes(p.keys, at, kBatchKeys);
                    stage_of_batch = 0;
                }
                barrier_wait(shared.empty[place.stage()], place.parity() ^ 1);
                const int box = stage_of_batch++ * kBoxes + lane;
                load_stage(shared, place.stage(), p, at, __shfl_sync(kFullWarp, blocks, box));
                turn = kCopyWarps - 1;
            }
            place.advance();
        }
        if (new_tile) {
            barrier_wait(shared.heads_empty[tiles % 2], tiles / 2 % 2 ^ 1);
            load_heads(shared, tiles % 2, p, at);
            hand_over_heads(at.tokens());
        }
        new_tile = at.advance();
    }
    barrier_wait(shared.heads_empty[tiles % 2], tiles / 2 % 2 ^ 1);
    hand_over_heads(0);
}

__device__ __forceinline__ void produce(Shared& shared, const Params& p) {
    WorkRange range;
    if (!kDecode) range = p.work_ranges[blockIdx.x];
    const ScoringLaunch launch{p.batch, kDecode ? p.first_token : 0,
                               kDecode ? p.end_token : range.launch_end, p.first_key, p.num_keys};
    if (kDecode) {
        range = find_work_range<kTileTokens, kHalfTileUnitKeys>(launch, blockIdx.x, gridDim.x);
    }
    Cursor at(launch, range);
    load_tiles(shared, p, at);
}

// In decode: finds the sequence and kv_len of each token, for selection.
__device__ __forceinline__ void write_token_rows(const Params& p) {
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize % 4, 0);
    for (int token = p.first_token + blockIdx.x * 4 + warp; token < p.end_token;
         token += gridDim.x * 4) {
        TokenRow row = locate_token(p.batch, token);
        row.offset = (token - p.first_token) * p.row_stride;
        if (threadIdx.x % kWarpSize == 0) p.token_rows[token] = row;
    }
}
