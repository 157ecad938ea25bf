// score[t, s] = kscale[s] * sum_h qs[t, h] * max(0, sum_d q[t, h, d] * k[s, d])
// and with kScaleGroups > 1 scales per key
// score[t, s] = sum_h qs[t, h] * max(0, sum_g kscale[s, g] * sum_{d in g} q[t, h, d] * k[s, d]).
//
// q [tokens, heads, depth] E4M3, qs [tokens, heads] float32, keys as in paged_keys.cuh,
// scores [tokens, row_stride] float32, one row per token.
//
// A block scores one tile of keys (kWarps warps of kKeysPerWarp) against tokens_per_tile tokens. Keys are
// the rows of fp16 tensor-core products and stay in registers while tokens go by; heads are the
// columns and pass through shared memory, kHeadChunk at a time. E4M3 numbers and their products are
// exact, so only additions round.
//
// Invariant: the bits of score[t, s] depend on the data of t and s alone. Each product sums depth in
// one fixed order, heads are added in ascending order per lane and then across the four lanes of a
// quad by a fixed tree, whatever tile the pair falls in.
//
// Which channel meets which k-slot of the instruction does not matter to the sum, as long as keys
// and heads agree. Lane quarter c takes the 8 neighbouring channels 32 j + 8 c ... + 7 of block j,
// so that keys are 8-byte loads from the page and heads one 16-byte load from shared memory.
//
// kDense = 1: every element of the row is written, -inf where the token does not see the key.
// kDense = 0: only keys the token sees, kMissing where the page does not exist (for topk_histogram).
#include "common.cuh"
#include "mma.cuh"
#include "paged_keys.cuh"

static_assert(kHeads >= 1 && kHeads <= 128, "query heads");
static_assert(kKvHeads >= 1 && kHeads % kKvHeads == 0, "key heads divide the query heads");
static_assert(kDepth == 32 || kDepth == 64 || kDepth == 128 || kDepth == 256, "channels per head");
static_assert(kScaleGroups >= 1 && kDepth / kScaleGroups >= 32, "scales per key");
static_assert(kKeysPerWarp == 16 || kKeysPerWarp == 32, "one or two products tall");
static_assert(kWarps == 4 || kWarps == 8, "warps of a block");
static_assert(kHeadChunk % 8 == 0, "heads staged at once: whole products wide");
static_assert(kDense == 0 || kDense == 1, "what is written where there is no score");

constexpr int kThreads = kWarps * kWarpSize;
constexpr int kKeysPerTile = kWarps * kKeysPerWarp;
constexpr int kProducts = kKeysPerWarp / 16;       // stacked m16n8k16 products per warp
constexpr int kKeysPerLane = 2 * kProducts;        // rows lane/4, +8, +16, +24 of the warp's keys
constexpr int kChannelBlocks = kDepth / 32;        // of two k-steps each
constexpr int kBlocksPerGroup = kChannelBlocks / kScaleGroups;
constexpr int kHeadsPerKv = kHeads / kKvHeads;

// Room for the registers: 168 a thread, or 128 where nothing but keys and sums is held.
constexpr int kMinBlocks = (kScaleGroups == 1 ? 16 : 12) / kWarps;

struct Shared {
    // 64 bytes of padding where a row is a multiple of 128: the two heads that a quarter warp
    // reads then fall into different halves of the banks.
    static constexpr int kRowWords = kDepth / 2 + (kDepth % 64 == 0 ? 16 : 0);
    alignas(16) uint32 heads[kHeadChunk][kRowWords];  // fp16 pairs
    float gates[kHeadChunk];
};
static_assert(sizeof(Shared) <= 48 * 1024, "static shared memory");

// The keys one lane holds: fp16 fragments and scales of rows lane/4 + 8 i of its warp.
struct KeyFragments {
    uint32 a[kProducts][kChannelBlocks][2][4];
    float scales[kKeysPerLane][kScaleGroups];
    bool exists[kKeysPerLane];
};

__device__ __forceinline__ void load_keys(KeyFragments& keys, const PagedKeys& cache, int sequence,
                                          int kv_head, uint32 first_position) {
    const int quarter = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
        const int64 row = cache.row(sequence, first_position + 8 * i);
        keys.exists[i] = row >= 0;
        const int64 head_row = row * kKvHeads + kv_head;
        const uint2* channels = reinterpret_cast<const uint2*>(cache.blocks + head_row * kDepth);
#pragma unroll
        for (int j = 0; j < kChannelBlocks; ++j) {
            const uint2 codes = keys.exists[i] ? channels[4 * j + quarter] : uint2{0, 0};
            uint32(&steps)[2][4] = keys.a[i / 2][j];
            steps[0][i % 2] = decode_e4m3x2<0>(codes.x);
            steps[0][i % 2 + 2] = decode_e4m3x2<1>(codes.x);
            steps[1][i % 2] = decode_e4m3x2<0>(codes.y);
            steps[1][i % 2 + 2] = decode_e4m3x2<1>(codes.y);
        }
#pragma unroll
        for (int g = 0; g < kScaleGroups; ++g) {
            keys.scales[i][g] = keys.exists[i] ? cache.scales[head_row * kScaleGroups + g] : 0.0f;
        }
    }
}

// Heads first_head ... of one token into shared memory; heads past the last weigh nothing.
__device__ __forceinline__ void stage_heads(Shared& shared, const uint8* __restrict__ q,
                                            const float* __restrict__ qs, int num_heads) {
    constexpr int kPieces = kDepth / 8;  // of 8 codes
    for (int i = threadIdx.x; i < kHeadChunk * kPieces; i += kThreads) {
        const int head = i / kPieces;
        const int piece = i % kPieces;
        const uint2 codes = head < num_heads
            ? reinterpret_cast<const uint2*>(q)[head * kPieces + piece] : uint2{0, 0};
        *reinterpret_cast<uint4*>(&shared.heads[head][4 * piece]) = {
            decode_e4m3x2<0>(codes.x), decode_e4m3x2<1>(codes.x),
            decode_e4m3x2<0>(codes.y), decode_e4m3x2<1>(codes.y)};
    }
    for (int head = threadIdx.x; head < kHeadChunk; head += kThreads) {
        shared.gates[head] = head < num_heads ? qs[head] : 0.0f;
    }
}

// Adds the staged heads' gated products to this lane's share of each of its keys' sums.
__device__ __forceinline__ void add_heads(float (&sums)[kKeysPerLane], const KeyFragments& keys,
                                          const Shared& shared) {
    const int lane = threadIdx.x % kWarpSize;
    const int quarter = lane % 4;
#pragma unroll 2  // 13 % faster than 1 on an H200 at 64 heads; 8 warps 13 % faster than 4
    for (int first = 0; first < kHeadChunk; first += 8) {
        const uint32* head = shared.heads[first + lane / 4];
        float dots[kProducts][4] = {};
#pragma unroll
        for (int g = 0; g < kScaleGroups; ++g) {
            float group[kProducts][4] = {};
#pragma unroll
            for (int j = g * kBlocksPerGroup; j < (g + 1) * kBlocksPerGroup; ++j) {
                const uint4 b = *reinterpret_cast<const uint4*>(head + 16 * j + 4 * quarter);
#pragma unroll
                for (int p = 0; p < kProducts; ++p) {
                    mma_m16n8k16(group[p], keys.a[p][j][0], b.x, b.y);
                    mma_m16n8k16(group[p], keys.a[p][j][1], b.z, b.w);
                }
            }
#pragma unroll
            for (int p = 0; p < kProducts; ++p) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    dots[p][e] = kScaleGroups == 1
                        ? group[p][e] : fmaf(keys.scales[2 * p + e / 2][g], group[p][e], dots[p][e]);
                }
            }
        }
        const float gates[2] = {shared.gates[first + 2 * quarter], shared.gates[first + 2 * quarter + 1]};
#pragma unroll
        for (int p = 0; p < kProducts; ++p) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {  // fmaxf(NaN, 0) is 0: a NaN product counts as nothing
                sums[2 * p + e / 2] = fmaf(gates[e % 2], fmaxf(dots[p][e], 0.0f), sums[2 * p + e / 2]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) index_scores(
    float* __restrict__ scores, int first_token, int end_token, const uint8* __restrict__ q,
    const float* __restrict__ qs, const TokenRow* __restrict__ token_rows, const uint8* __restrict__ k_blocks,
    const float* __restrict__ k_scales, const uint32* __restrict__ k_lookup_table, uint32 num_blocks,
    uint32 num_layers, uint32 layer, uint32 page_size, uint32 page_factor, uint32 page_shift, uint32 pages_per_seq,
    int tokens_per_tile, int max_keys, int64 row_stride) {
    __shared__ Shared shared;
    const PagedKeys cache{k_blocks, k_scales, k_lookup_table, num_blocks,
                          num_layers, layer, page_size, page_factor, page_shift, pages_per_seq};
    const int lane = threadIdx.x % kWarpSize;
    const int quarter = lane % 4;
    const int key_tiles = (max_keys + kKeysPerTile - 1) / kKeysPerTile;
    const int first_key = blockIdx.x % key_tiles * kKeysPerTile;
    const int warp_key = first_key + threadIdx.x / kWarpSize * kKeysPerWarp + lane / 4;
    // Lane quarter i of a quad writes the i-th of the quad's keys: one store for the whole warp.
    const int own_key = warp_key + 8 * quarter;
    // Selection reads whole vectors of 4 keys, so whole vectors are written. A dense matrix has no room for that.
    const int of_four = kDense ? own_key : own_key & ~3;
    const bool writes = quarter < kKeysPerLane && of_four < max_keys;

    KeyFragments keys;
    int loaded = -1;  // the sequence and key head whose keys are in registers
    const int tile_token = first_token + blockIdx.x / key_tiles * tokens_per_tile;
    const int tile_end = min(tile_token + tokens_per_tile, end_token);
    for (int token = tile_token; token < tile_end; ++token) {
        const TokenRow span = token_rows[token];
        float* row = scores + (token - first_token) * row_stride;
        if (first_key >= span.kv_len) {  // the same for the whole block
            if (kDense && writes) row[own_key] = __uint_as_float(kMinusInfinity);
            continue;
        }
        float totals[kKeysPerLane] = {};
        for (int kv_head = 0; kv_head < kKvHeads; ++kv_head) {
            if (loaded != span.sequence * kKvHeads + kv_head) {
                load_keys(keys, cache, span.sequence, kv_head, warp_key);
                loaded = span.sequence * kKvHeads + kv_head;
            }
            float sums[kKeysPerLane] = {};
            for (int head = 0; head < kHeadsPerKv; head += kHeadChunk) {
                const int64 q_head = int64(token) * kHeads + kv_head * kHeadsPerKv + head;
                __syncthreads();  // the last chunk's readers are done
                stage_heads(shared, q + q_head * kDepth, qs + q_head, kHeadsPerKv - head);
                __syncthreads();
                add_heads(sums, keys, shared);
            }
#pragma unroll
            for (int i = 0; i < kKeysPerLane; ++i) {
                sums[i] += __shfl_xor_sync(kFullWarp, sums[i], 1);
                sums[i] += __shfl_xor_sync(kFullWarp, sums[i], 2);
                totals[i] = kScaleGroups == 1 ? fmaf(keys.scales[i][0], sums[i], totals[i])
                                              : totals[i] + sums[i];
            }
        }
#pragma unroll
        for (int i = 0; i < kKeysPerLane; ++i) {
            if (i != quarter || !writes) continue;
            const bool visible = of_four < span.kv_len;
            if (!visible || !keys.exists[i]) {
                if (kDense || visible) row[own_key] = __uint_as_float(kDense ? kMinusInfinity : kMissing);
            } else {
                row[own_key] = totals[i] == totals[i] ? totals[i] : __uint_as_float(kQuietNaN);
            }
        }
    }
}
