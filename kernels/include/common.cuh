// Shared by all kernels: integer names, constants of a warp, and the total order of scores as an
// unsigned integer.
#pragma once

using uint8 = unsigned char;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

constexpr uint32 kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// Shared memory of a multiprocessor. A block takes 1 KiB more than it asks for. How many blocks fit
// decides how many registers a thread may have.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMultiprocessorBytes = 100 * 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr int kMultiprocessorBytes = 164 * 1024;
#else
constexpr int kMultiprocessorBytes = 228 * 1024;
#endif

// Scoring writes kMissing where the page of a key does not exist, and selection skips such keys.
// kMissing is a NaN that no score can be: scoring writes every NaN score as kQuietNaN.
constexpr uint32 kMissing = 0xffffffffu;
constexpr uint32 kQuietNaN = 0x7fffffffu;
constexpr uint32 kMinusInfinity = 0xff800000u;

// The total order of scores (docs/contract.md) as an unsigned integer: a larger key ranks first,
// and equal keys are ties. -0.0 and +0.0 have the same key. A NaN ranks below every number.
constexpr uint32 kNotSelectable = 0;
constexpr uint32 kNaNKey = 1;
constexpr uint32 kMinusInfinityKey = 0x007fffffu;  // no score has a key between kNaNKey and this
constexpr uint32 kZeroKey = 0x80000000u;

__device__ __forceinline__ uint32 ordered_key(float score) {
    if (score != score) return kNaNKey;
    const uint32 bits = __float_as_uint(score + 0.0f);  // -0.0 + 0.0 is +0.0
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
