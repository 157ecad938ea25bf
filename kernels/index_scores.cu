// score[t, s] = kscale[s] * sum_h qs[t, h] * max(0, sum_d q[t, h, d] * k[s, d])
// and with kScaleGroups > 1 scales per key
// score[t, s] = sum_h qs[t, h] * max(0, sum_g kscale[s, g] * sum_{d in g} q[t, h, d] * k[s, d]).
// qs may be null: then every gate is 1.
//
// The portable kernel, for GPUs from sm_80 on. A block scores one tile of keys (kWarps warps of
// kKeysPerWarp) against tokens_per_tile tokens. Keys are the rows of fp16 tensor-core products;
// they are decoded once and stay in registers while the block works through the tokens. Heads are
// the columns and pass through shared memory, kHeadChunk at a time.
//
// Exactness: E4M3 numbers are exact in fp16, and their products are exact in fp32, so only
// additions round.
//
// Invariant: the bits of score[t, s] depend on the data of t and s alone. Each product sums depth
// in one fixed order. A lane adds its heads in ascending order, and a fixed tree adds the four
// lanes of a quad, whatever tile the token and the key are in.
//
// Channels may take the k indices of the instruction in any order, if keys and heads use the same
// one. Here lane c of a quad takes the 8 neighbouring channels 32 j + 8 c ... + 7 of block j, so
// that it reads a key from its page in 8-byte loads (if the key is aligned to so many bytes) and a
// head from shared memory in 16-byte loads.
//
// With kDense = 1, every element of a row is written: -inf where the token does not see the key or
// the key's page does not exist. With kDense = 0, only the keys that the token sees are written
// (and the rest of their vector of 4, which selection reads): kMissing where the page does not
// exist.
#include "common.cuh"
#include "mma.cuh"
#include "paged_keys.cuh"
#include "token_row.cuh"

static_assert(kHeads >= 1 && kHeads <= 128, "query heads");
static_assert(kKvHeads >= 1 && kHeads % kKvHeads == 0, "key heads divide the query heads");
static_assert(kDepth == 32 || kDepth == 64 || kDepth == 128 || kDepth == 256, "channels per head");
static_assert(kScaleGroups >= 1 && kDepth / kScaleGroups >= 32, "scales per key");
static_assert(kKeysPerWarp == 16 || kKeysPerWarp == 32,
              "keys of a warp: one or two products of 16 rows");
static_assert(kWarps == 4 || kWarps == 8, "warps of a block");
static_assert(kHeadChunk % 8 == 0, "heads staged at once: columns of whole products");
static_assert(kKeyAlignment == 16 || kKeyAlignment == 4 || kKeyAlignment == 1,
              "bytes to which the values of every key are aligned");
static_assert(kDense == 0 || kDense == 1, "what is written where there is no score");

struct Params {
    PagedKeys keys;
    const uint8* q;              // [tokens, kHeads, kDepth], E4M3 codes
    const float* qs;             // [tokens, kHeads], or null
    const TokenRow* token_rows;  // [tokens], from schedule
    float* scores;               // [end_token - first_token, row_stride]
    int64 row_stride;            // elements
    int first_token, end_token;  // the tokens to score
    int tokens_per_tile;
    int max_kv_len;  // columns of a row
};

constexpr int kThreads = kWarps * kWarpSize;
constexpr int kKeysPerTile = kWarps * kKeysPerWarp;
constexpr int kProducts = kKeysPerWarp / 16;  // stacked m16n8k16 products per warp
constexpr int kKeysPerLane = 2 * kProducts;   // rows lane/4, +8, +16, +24 of the warp's keys
constexpr int kChannelBlocks = kDepth / 32;   // of two k-steps each
constexpr int kBlocksPerGroup = kChannelBlocks / kScaleGroups;
constexpr int kHeadsPerKv = kHeads / kKvHeads;

// 16 warps on a multiprocessor leave a thread 128 registers. With several scales per key, a thread
// needs more.
constexpr int kMinBlocks = (kScaleGroups == 1 ? 16 : 12) / kWarps;

struct Shared {
    // Padded by 64 bytes if a row is a multiple of 128 bytes, so that the two heads that a quarter
    // of a warp reads at once are in different halves of the banks.
    static constexpr int kRowWords = kDepth / 2 + (kDepth % 64 == 0 ? 16 : 0);
    alignas(16) uint32 heads[kHeadChunk][kRowWords];  // fp16 pairs
    float gates[kHeadChunk];
};
static_assert(sizeof(Shared) <= 48 * 1024, "static shared memory");

// The keys of a lane, rows lane / 4 + 8 i of its warp: fp16 fragments and scales.
struct KeyFragments {
    uint32 a[kProducts][kChannelBlocks][2][4];
    float scales[kKeysPerLane][kScaleGroups];
    bool exists[kKeysPerLane];
};

// Loads 8 codes of a key, whatever its alignment.
__device__ __forceinline__ uint2 load_codes(const uint8* from) {
    if constexpr (kKeyAlignment == 16) return __ldg(reinterpret_cast<const uint2*>(from));
    uint32 words[2] = {};
    if constexpr (kKeyAlignment == 4) {
#pragma unroll
        for (int i = 0; i < 2; ++i) words[i] = __ldg(reinterpret_cast<const uint32*>(from) + i);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) words[i / 4] |= uint32(__ldg(from + i)) << i % 4 * 8;
    }
    return {words[0], words[1]};
}

__device__ __forceinline__ void load_keys(KeyFragments& keys, const PagedKeys& cache, int sequence,
                                          int kv_head, uint32 first_position) {
    const int quarter = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
        const PagedKeys::Entry entry = cache.look_up(sequence, first_position + 8 * i);
        keys.exists[i] = cache.exists(entry);
        const uint8* values = cache.values_of(entry, kKvHeads * kDepth) + kv_head * kDepth;
        const float* scales = cache.scales_of(entry, kKvHeads * kScaleGroups);
#pragma unroll
        for (int j = 0; j < kChannelBlocks; ++j) {
            const uint8* channels = values + 32 * j + 8 * quarter;
            const uint2 codes = keys.exists[i] ? load_codes(channels) : uint2{0, 0};
            uint32(&steps)[2][4] = keys.a[i / 2][j];
            steps[0][i % 2] = decode_e4m3x2<0>(codes.x);
            steps[0][i % 2 + 2] = decode_e4m3x2<1>(codes.x);
            steps[1][i % 2] = decode_e4m3x2<0>(codes.y);
            steps[1][i % 2 + 2] = decode_e4m3x2<1>(codes.y);
        }
#pragma unroll
        for (int g = 0; g < kScaleGroups; ++g) {
            keys.scales[i][g] = keys.exists[i] ? __ldg(scales + kv_head * kScaleGroups + g) : 0.0f;
        }
    }
}

// Copies the next num_heads heads of a token to shared memory, at most kHeadChunk. If there are
// fewer, the rest are zero.
__device__ __forceinline__ void stage_heads(Shared& shared, const uint8* __restrict__ q,
                                            const float* __restrict__ qs, int num_heads) {
    constexpr int kPieces = kDepth / 8;  // of 8 codes
    for (int i = threadIdx.x; i < kHeadChunk * kPieces; i += kThreads) {
        const int head = i / kPieces;
        const int piece = i % kPieces;
        const uint2* pieces = reinterpret_cast<const uint2*>(q);
        const uint2 codes = head < num_heads ? pieces[head * kPieces + piece] : uint2{0, 0};
        *reinterpret_cast<uint4*>(&shared.heads[head][4 * piece]) = {
            decode_e4m3x2<0>(codes.x), decode_e4m3x2<1>(codes.x), decode_e4m3x2<0>(codes.y),
            decode_e4m3x2<1>(codes.y)};
    }
    for (int head = threadIdx.x; head < kHeadChunk; head += kThreads) {
        shared.gates[head] = head >= num_heads ? 0.0f : qs ? qs[head] : 1.0f;
    }
}

// Adds the gated products of the staged heads to the lane's partial sum of each of its keys.
__device__ __forceinline__ void add_heads(float (&sums)[kKeysPerLane], const KeyFragments& keys,
                                          const Shared& shared) {
    const int lane = threadIdx.x % kWarpSize;
    const int quarter = lane % 4;
#pragma unroll 2  // 13 % faster than no unrolling (H200, 64 heads)
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
                                     ? group[p][e]
                                     : fmaf(keys.scales[2 * p + e / 2][g], group[p][e], dots[p][e]);
                }
            }
        }
        const float gates[2] = {shared.gates[first + 2 * quarter],
                                shared.gates[first + 2 * quarter + 1]};
#pragma unroll
        for (int p = 0; p < kProducts; ++p) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {  // fmaxf(NaN, 0) is 0, as the contract wants it
                sums[2 * p + e / 2] =
                    fmaf(gates[e % 2], fmaxf(dots[p][e], 0.0f), sums[2 * p + e / 2]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    index_scores(const __grid_constant__ Params p) {
    __shared__ Shared shared;
    const int lane = threadIdx.x % kWarpSize;
    const int quarter = lane % 4;
    const int key_tiles = (p.max_kv_len + kKeysPerTile - 1) / kKeysPerTile;
    const int first_key = blockIdx.x % key_tiles * kKeysPerTile;
    const int warp_key = first_key + threadIdx.x / kWarpSize * kKeysPerWarp + lane / 4;
    // Lane i of a quad writes the i-th key of the quad, so that one store does for the warp.
    const int own_key = warp_key + 8 * quarter;
    // Selection reads whole vectors of 4 keys, so whole vectors are written. The rows of a dense
    // matrix have no padding for that.
    const int vector_key = kDense ? own_key : own_key & ~3;
    const bool writes = quarter < kKeysPerLane && vector_key < p.max_kv_len;

    KeyFragments keys;
    int loaded = -1;  // sequence * kKvHeads + key head whose keys are in registers
    const int tile_token = p.first_token + blockIdx.x / key_tiles * p.tokens_per_tile;
    const int tile_end = min(tile_token + p.tokens_per_tile, p.end_token);
    for (int token = tile_token; token < tile_end; ++token) {
        const TokenRow token_row = p.token_rows[token];
        float* row = p.scores + (token - p.first_token) * p.row_stride;
        if (first_key >= token_row.kv_len) {  // the same for the whole block
            if (kDense && writes) row[own_key] = __uint_as_float(kMinusInfinity);
            continue;
        }
        float totals[kKeysPerLane] = {};
        for (int kv_head = 0; kv_head < kKvHeads; ++kv_head) {
            if (loaded != token_row.sequence * kKvHeads + kv_head) {
                load_keys(keys, p.keys, token_row.sequence, kv_head, warp_key);
                loaded = token_row.sequence * kKvHeads + kv_head;
            }
            float sums[kKeysPerLane] = {};
            for (int head = 0; head < kHeadsPerKv; head += kHeadChunk) {
                const int64 q_head = int64(token) * kHeads + kv_head * kHeadsPerKv + head;
                __syncthreads();  // the readers of the last chunk are done
                stage_heads(shared, p.q + q_head * kDepth, p.qs ? p.qs + q_head : nullptr,
                            kHeadsPerKv - head);
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
            const bool visible = vector_key < token_row.kv_len;
            if (!visible || !keys.exists[i]) {
                const uint32 missing = kDense ? kMinusInfinity : kMissing;
                if (kDense || visible) row[own_key] = __uint_as_float(missing);
            } else {
                row[own_key] = totals[i] == totals[i] ? totals[i] : __uint_as_float(kQuietNaN);
            }
        }
    }
}
