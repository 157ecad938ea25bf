// Tensor-core product of fp16 numbers, for every GPU from sm_80 on, and the exact decoding of E4M3
// codes to fp16.
#pragma once
#include "common.cuh"

// d[16 keys, 8 heads] += a[16, 16] * b[16, 8]: fp16 inputs, fp32 accumulation.
// Lane l holds rows l / 4 and l / 4 + 8, columns 2 * (l % 4) and the next one:
// d = {(row, col), (row, col + 1), (row + 8, col), (row + 8, col + 1)}.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32 (&a)[4], uint32 b0,
                                             uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32 mul_f16x2(uint32 a, uint32 b) {
    uint32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// Decodes the low (half = 0) or high (half = 1) two of four E4M3 codes to fp16. Every code is exact
// in fp16, subnormals included, and the NaN codes 0x7f and 0xff become NaN. Integer arithmetic
// instead of cvt.rn.f16x2.e4m3x2, which sm_80 lacks, gives the same bits on every GPU.
template <int half>
__device__ __forceinline__ uint32 decode_e4m3x2(uint32 codes) {
    const uint32 shifted =
        __byte_perm(codes, 0, half == 0 ? 0x1404 : 0x3424);  // each code in the high byte
    const uint32 magnitude =
        (shifted & 0x7f007f00u) >> 1;  // exponent and mantissa in fp16's fields
    // A code 0x7f is 0x3f80 now. Adding 0x7fff to the difference from it carries into bit 15 unless
    // the difference is zero.
    const uint32 is_nan = ~((magnitude ^ 0x3f803f80u) + 0x7fff7fffu) & 0x80008000u;
    const uint32 scaled = (shifted & 0x80008000u) | magnitude | (is_nan >> 15) * 0x7fffu;
    return mul_f16x2(scaled, 0x5c005c00u);  // * 2^8: from fp16's exponent bias 15 to E4M3's 7
}
