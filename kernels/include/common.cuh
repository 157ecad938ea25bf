// Shared by every kernel: exact-width names, the total order as an integer, a block-wide scan.
#pragma once

using uint8 = unsigned char;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

// Shared memory of a multiprocessor, of which each block takes 1 KiB more than it asks for: what says how many blocks
// there will be, and so how many registers each may have.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMultiprocessorBytes = 100 * 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr int kMultiprocessorBytes = 164 * 1024;
#else
constexpr int kMultiprocessorBytes = 228 * 1024;
#endif

constexpr uint32 kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// What index_scores writes beside a key that may not be selected (its page does not exist), when the
// reader is topk_histogram: a NaN no computation yields, because index_scores makes every NaN kQuietNaN.
constexpr uint32 kMissing = 0xffffffffu;
constexpr uint32 kQuietNaN = 0x7fffffffu;
constexpr uint32 kMinusInfinity = 0xff800000u;

// Which keys a token sees: the sequence it belongs to (-1: none), how many keys it sees, and where its row of scores
// begins, in elements.
struct alignas(16) TokenRow {
    int sequence;
    int kv_len;
    int64 row;
};

// The tokens of a launch, from the first on, up to the end; and how many blocks select from their rows at most.
struct WindowTokens {
    int first, end, blocks;
};

// What a selection reads of a row: our own have token_rows, a caller's a length each and row_stride from one to the next.
template <bool ours>
__device__ __forceinline__ TokenRow span_of_row(const void* lengths, int64 row, int64 row_stride) {
    if (ours) return static_cast<const TokenRow*>(lengths)[row];
    return {0, static_cast<const int*>(lengths)[row], row * row_stride};
}

// An index or length of the caller's, int32 or uint32.
__device__ __forceinline__ int64 widen(uint32 value, bool is_signed) {
    return is_signed ? int64(int(value)) : int64(value);
}

// The total order of the contract as an unsigned integer: a larger key ranks first, equal keys are
// ties. 0 is "not selectable", NaN is 1, -inf is 0x007fffff; -0.0 and +0.0 share one key.
constexpr uint32 kNotSelectable = 0;
constexpr uint32 kNaNKey = 1;
constexpr uint32 kMinusInfinityKey = 0x007fffffu;  // between the two there is nothing
constexpr uint32 kZeroKey = 0x80000000u;

__device__ __forceinline__ uint32 ordered_key(float score) {
    if (score != score) return kNaNKey;
    const uint32 bits = __float_as_uint(score + 0.0f);  // -0.0 + 0.0 is +0.0
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// Exclusive sum over the block in thread order, and the block's total. Needs blockDim.x a multiple of
// 32 and warp_totals[32]; holds two barriers, so warp_totals may be reused by the next call.
__device__ __forceinline__ uint32 block_exclusive_sum(uint32 value, uint32* warp_totals, uint32& total) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int warps = blockDim.x / kWarpSize;
    uint32 inclusive = value;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const uint32 below = __shfl_up_sync(kFullWarp, inclusive, offset);
        if (lane >= offset) inclusive += below;
    }
    __syncthreads();  // the last call's readers are done with warp_totals
    if (lane == kWarpSize - 1) warp_totals[warp] = inclusive;
    __syncthreads();
    // Every warp sums all warp totals itself: 32 loads and 5 shuffles beat a third barrier.
    uint32 warp_inclusive = lane < warps ? warp_totals[lane] : 0;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const uint32 below = __shfl_up_sync(kFullWarp, warp_inclusive, offset);
        if (lane >= offset) warp_inclusive += below;
    }
    total = __shfl_sync(kFullWarp, warp_inclusive, kWarpSize - 1);
    const uint32 before_warp = __shfl_sync(kFullWarp, warp_inclusive, warp == 0 ? 0 : warp - 1);
    return inclusive - value + (warp == 0 ? 0 : before_warp);
}
