// Reads consecutive bfloat16, float16 or float32 numbers as float32.
#pragma once
#include "common.cuh"
#include "ptx_convert.cuh"

// Values of the macro kNumberType (on the host: NUMBER_TYPES in mla_fp8/_cuda/keys.py).
constexpr int kBfloat16 = 0;
constexpr int kFloat16 = 1;
constexpr int kFloat32 = 2;

constexpr int kNumberBytes = kNumberType == kFloat32 ? 4 : 2;
static_assert(kNumberType >= kBfloat16 && kNumberType <= kFloat32, "one of the three types");

__device__ __forceinline__ float number_at(const void* numbers, int64 i) {
    if constexpr (kNumberType == kFloat32) return __ldg(static_cast<const float*>(numbers) + i);
    const unsigned short bits = __ldg(static_cast<const unsigned short*>(numbers) + i);
    return kNumberType == kBfloat16 ? __uint_as_float(uint32(bits) << 16) : float_of_half(bits);
}

// kCount numbers in the form that they have in memory, so that several loads can be in flight
// before the first use.
template <int kCount>
struct Numbers {
    static constexpr int kWords = kCount * kNumberBytes / 4;
    uint32 words[kWords];

    // Reads from an address that is a multiple of kAlignment: 16, or kNumberBytes.
    template <int kAlignment>
    __device__ __forceinline__ void load(const void* source) {
        if constexpr (kAlignment == 16) {
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) {
                const uint4 four = __ldg(static_cast<const uint4*>(source) + i);
                words[4 * i] = four.x;
                words[4 * i + 1] = four.y;
                words[4 * i + 2] = four.z;
                words[4 * i + 3] = four.w;
            }
        } else if constexpr (kNumberType == kFloat32) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                words[i] = __ldg(static_cast<const uint32*>(source) + i);
            }
        } else {
            const auto* halves = static_cast<const unsigned short*>(source);
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                words[i] = __ldg(halves + 2 * i) | uint32(__ldg(halves + 2 * i + 1)) << 16;
            }
        }
    }

    __device__ __forceinline__ float operator[](int i) const {
        if constexpr (kNumberType == kFloat32) return __uint_as_float(words[i]);
        const uint32 word = words[i / 2];
        if constexpr (kNumberType == kBfloat16) {
            return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
        }
        return float_of_half(static_cast<unsigned short>(i % 2 ? word >> 16 : word & 0xffffu));
    }
};
