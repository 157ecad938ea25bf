// Conversions of numbers that C++ has no word for.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float float_of_half(unsigned short bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
// The E4M3 codes of two numbers, `low` in the low byte: rounded to nearest even, saturated to 448.
// NaN of either sign becomes 0x7f.
__device__ __forceinline__ uint32 e4m3_pair(float low, float high) {
    unsigned short codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}
#endif
