// Encoding of E4M3 numbers, the bytes of fp8.encode in mla_fp8/fp8.py.
#pragma once
#include "common.cuh"
#include "ptx_convert.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 890
// sm_80 has no instruction for it.
__device__ __forceinline__ uint32 e4m3_code(float x) {
    if (x != x) return 0x7f;
    const float magnitude = fminf(fabsf(x), 448.0f);
    const uint32 bits = __float_as_uint(magnitude);
    // Round 23 mantissa bits to 3, then change the exponent's bias from 127 to 7.
    const uint32 normal = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3);
    // Below 2**-6 a code counts multiples of 2**-9, the last place of a sum with 2**14.
    const float sum = __fadd_rn(magnitude, 16384.0f);
    const uint32 subnormal = __float_as_uint(sum) - __float_as_uint(16384.0f);
    return (magnitude < 0.015625f ? subnormal : normal) | (__float_as_uint(x) >> 24 & 0x80);
}

__device__ __forceinline__ uint32 e4m3_pair(float low, float high) {
    return e4m3_code(low) | e4m3_code(high) << 8;
}
#endif

// Four codes, `x[0]` in the lowest byte.
__device__ __forceinline__ uint32 e4m3_quad(const float* x) {
    return e4m3_pair(x[0], x[1]) | e4m3_pair(x[2], x[3]) << 16;
}
