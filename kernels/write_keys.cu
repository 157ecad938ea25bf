// For each row r of keys, a (token, key head) pair, and each granule g of its channels:
//
//   scale[r, g] = max(amax / 448, 2 ** -126), or 1 if amax < 2 ** -126
//   values[r, c] = e4m3(keys[r, c] / scale[r, g])
//
// amax is the largest finite magnitude of the granule. The bytes are those of fp8.quantize in
// mla_fp8/fp8.py: divisions round to nearest, and subnormal numbers are not flushed. Rows go to the
// place of their token: a slot, block * page_size + offset, or a position of a sequence, or (for
// queries) the number of the token itself. Tokens whose place does not exist are skipped.
//
// A lane takes 16 channels, so kDepth / 16 lanes take a row. A lane reads the channels of kRows
// rows before it uses the first of them, because the kernel is bound by memory.
#include "common.cuh"
#include "e4m3.cuh"
#include "floats.cuh"

static_assert(kDepth == 32 || kDepth == 64 || kDepth == 128 || kDepth == 256, "depth of a key");
static_assert(kScaleGroups >= 1 && kDepth / kScaleGroups >= 32,
              "a granule has 32 channels or more");
static_assert(kDepth % kScaleGroups == 0, "granules of one size");
static_assert(kKeysAligned == 0 || kKeysAligned == 1, "whether all rows of keys begin on 16 bytes");
static_assert(kValuesAlignment == 16 || kValuesAlignment == 4 || kValuesAlignment == 1, "bytes");
static_assert(kThreads % kWarpSize == 0, "whole warps");

// Values of the macro kPlacedBy: how the place of a token is given (on the host: BY_SLOT and so on
// in mla_fp8/_plan/keys.py).
constexpr int kSlot = 0;
constexpr int kPosition = 1;
constexpr int kToken = 2;  // token t has slot t
static_assert(kPlacedBy >= kSlot && kPlacedBy <= kToken, "one of the three ways");

// Types of index arrays (on the host: INDEX_TYPES in mla_fp8/_plan/keys.py).
constexpr int kInt32 = 0;
constexpr int kUint32 = 1;
constexpr int kInt64 = 2;

struct Params {
    const void* keys;            // [tokens, heads, kDepth]
    const float* gates;          // [tokens, heads], factors of the stored scales; null: none
    const void* slots;           // [tokens]
    const void* sequences;       // [tokens]
    const void* positions;       // [tokens]
    const uint32* lookup_table;  // [batch, pages_per_seq]: the block of each page
    uint8* values;               // of the layer; [page_size, heads, kDepth] in each block
    float* scales;               // of the layer; [page_size, heads, kScaleGroups] in each block
    int64 block_stride;          // bytes from a block's values to the next block's
    int64 scales_stride;         // floats from a block's scales to the next block's
    uint32 places;               // slots of the pool, or positions of a sequence; <= 2 ** 31
    uint32 batch;
    uint32 num_blocks;
    uint32 page_size;
    uint32 page_factor;  // n / page_size is umulhi(2 n, page_factor) >> page_shift, n < 2 ** 31
    uint32 page_shift;
    uint32 pages_per_seq;
    uint32 rows;  // tokens * heads
    uint32 heads;
    int slots_type;
    int sequences_type;
    int positions_type;
    int power_of_two;  // round scales up to powers of two
    // With gates, gate * head_scale * scale * softmax_scale is stored in place of a scale.
    float head_scale;
    float softmax_scale;
};

constexpr int kChannels = 16;               // of a lane
constexpr int kLanes = kDepth / kChannels;  // of a row
constexpr int kLanesPerGranule = kLanes / kScaleGroups;
constexpr int kRows = 2;  // of a lane
constexpr int kRowsPerPass = kThreads / kLanes;
constexpr int kKeysAlignment = kKeysAligned ? 16 : kNumberBytes;
constexpr uint32 kNoBlock = 0xffffffffu;         // never a block: num_blocks is at most this
constexpr uint32 kSmallestNormal = 0x00800000u;  // 2 ** -126
constexpr uint32 kInfinity = 0x7f800000u;
constexpr uint32 kMagnitude = 0x7fffffffu;  // the bits beside the sign

__device__ __forceinline__ int64 index_at(const void* array, int type, uint32 i) {
    if (type == kInt64) return __ldg(static_cast<const int64*>(array) + i);
    const uint32 bits = __ldg(static_cast<const uint32*>(array) + i);
    return type == kUint32 ? int64(bits) : int64(int(bits));
}

// A token's place, as the arrays give it: not checked yet.
struct Given {
    int64 number;    // slot or position
    int64 sequence;  // if by position
};

__device__ __forceinline__ Given given_of(const Params& p, uint32 token) {
    if (kPlacedBy == kToken) return {token, 0};
    if (kPlacedBy == kSlot) return {index_at(p.slots, p.slots_type, token), 0};
    return {index_at(p.positions, p.positions_type, token),
            index_at(p.sequences, p.sequences_type, token)};
}

struct Place {
    uint32 block;  // kNoBlock: the token is skipped
    uint32 offset;
};

__device__ __forceinline__ Place place_of(const Params& p, Given given) {
    if (given.number < 0 || given.number >= p.places) return {kNoBlock, 0};
    const uint32 n = uint32(given.number);
    const uint32 page = __umulhi(2 * n, p.page_factor) >> p.page_shift;
    const uint32 offset = n - page * p.page_size;
    if (kPlacedBy != kPosition) return {page, offset};
    if (given.sequence < 0 || given.sequence >= p.batch) return {kNoBlock, 0};
    const uint32 block = __ldg(p.lookup_table + (given.sequence * p.pages_per_seq + page));
    return {block < p.num_blocks ? block : kNoBlock, offset};
}

// x / scale rounded to nearest, for finite x and the inverse of scale rounded to nearest: two
// corrections of x * inverse by its exact remainder (Markstein, Computation of elementary functions
// on the IBM RISC System/6000 processor, 1990). No remainder may be subnormal, because it would not
// be exact. __fdiv_rn has no such limit, but it takes twice as many instructions.
__device__ __forceinline__ float quotient_of(float x, float scale, float inverse) {
    const float first = __fmul_rn(x, inverse);
    const float second = __fmaf_rn(__fmaf_rn(-first, scale, x), inverse, first);
    const float third = __fmaf_rn(__fmaf_rn(-second, scale, x), inverse, second);
    return copysignf(third, x);  // a correction of -0 by +0 gives +0
}

// The scale of a granule whose largest finite magnitude has the bits `amax`.
__device__ __forceinline__ float scale_of(uint32 amax, bool power_of_two) {
    if (amax < kSmallestNormal) return 1.0f;
    const float quotient = quotient_of(__uint_as_float(amax), 448.0f, __frcp_rn(448.0f));
    uint32 bits = max(__float_as_uint(quotient), kSmallestNormal);
    if (power_of_two) bits = (bits + 0x7fffffu) & kInfinity;  // the exponent of the next power
    return __uint_as_float(bits);
}

// Replaces each finite x by x / scale. `finite`: no x is infinite or NaN.
__device__ __forceinline__ void divide(float (&x)[kChannels], float scale, bool finite) {
    // From a scale of 2**-60 on, no remainder is subnormal where the quotient is large enough for a
    // code other than zero.
    if (finite && scale >= 0x1p-60f) {
        const float inverse = __frcp_rn(scale);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) x[c] = quotient_of(x[c], scale, inverse);
        return;
    }
    const float factor = scale < 0x1p-60f ? 0x1p64f : 1.0f;
    scale = __fmul_rn(scale, factor);
    const float inverse = __frcp_rn(scale);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
        const float quotient = quotient_of(__fmul_rn(x[c], factor), scale, inverse);
        if ((__float_as_uint(x[c]) & kMagnitude) < kInfinity) x[c] = quotient;
    }
}

__device__ __forceinline__ void store(uint8* to, uint4 codes) {
    if constexpr (kValuesAlignment == 16) {
        *reinterpret_cast<uint4*>(to) = codes;
        return;
    }
    const uint32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (kValuesAlignment == 4) {
            reinterpret_cast<uint32*>(to)[i] = words[i];
        } else {
#pragma unroll
            for (int byte = 0; byte < 4; ++byte) to[4 * i + byte] = uint8(words[i] >> 8 * byte);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    write_keys(const __grid_constant__ Params p) {
    const uint32 lane = threadIdx.x % kLanes;
    const uint32 first = blockIdx.x * (kRows * kRowsPerPass) + threadIdx.x / kLanes;
    Numbers<kChannels> numbers[kRows];
    Given given[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        // Lanes past the end read the last row, so that whole warps take part in the shuffles.
        const uint32 row = min(first + i * kRowsPerPass, p.rows - 1);
        given[i] = given_of(p, p.heads == 1 ? row : row / p.heads);
        const int64 number = int64(row) * kDepth + lane * kChannels;
        const auto* keys = static_cast<const uint8*>(p.keys);
        numbers[i].template load<kKeysAlignment>(keys + number * kNumberBytes);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        float x[kChannels];
        uint32 amax = 0;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
            x[c] = numbers[i][c];
            amax = max(amax, __float_as_uint(x[c]) & kMagnitude);
        }
        const bool finite = amax < kInfinity;
        if (!finite) {
            amax = 0;
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
                const uint32 magnitude = __float_as_uint(x[c]) & kMagnitude;
                if (magnitude < kInfinity) amax = max(amax, magnitude);
            }
        }
#pragma unroll
        for (int distance = kLanesPerGranule / 2; distance > 0; distance /= 2) {
            amax = max(amax, __shfl_xor_sync(kFullWarp, amax, distance));
        }
        const uint32 row = first + i * kRowsPerPass;
        const Place place = place_of(p, given[i]);
        if (row >= p.rows || place.block == kNoBlock) continue;
        const float scale = scale_of(amax, p.power_of_two);
        divide(x, scale, finite);
        const uint32 head = p.heads == 1 ? 0 : row % p.heads;
        const int64 in_page = int64(place.offset) * p.heads + head;
        uint8* values = p.values + int64(place.block) * p.block_stride + in_page * kDepth;
        store(values + lane * kChannels,
              {e4m3_quad(x), e4m3_quad(x + 4), e4m3_quad(x + 8), e4m3_quad(x + 12)});
        if (lane % kLanesPerGranule == 0) {
            float* scales =
                p.scales + int64(place.block) * p.scales_stride + in_page * kScaleGroups;
            float stored = scale;
            if (p.gates) {
                const float gate = __fmul_rn(__ldg(p.gates + row), p.head_scale);
                stored = __fmul_rn(__fmul_rn(gate, scale), p.softmax_scale);
            }
            scales[lane / kLanesPerGranule] = stored;
        }
    }
}
