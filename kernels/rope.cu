// Rotates pairs (a, b) of channels of each row by the angles of the row's token:
//
//   a' = a * cos[t, j] - b * sin[t, j],   b' = b * cos[t, j] + a * sin[t, j]
//
// Pair j < angles is the channels 2 j and 2 j + 1 (interleaved), or j and j + angles (half-split).
// The channels from 2 * angles on are copied. Each product, sum and difference is rounded, as in
// NumPy.
//
// One thread per pair.
#include "common.cuh"
#include "floats.cuh"

struct Params {
    const void* x;     // [tokens, heads, 2 * half_depth]
    const float* cos;  // [tokens, angles]
    const float* sin;  // [tokens, angles]
    float* out;        // as x
    int64 pairs;       // tokens * heads * half_depth
    uint32 heads;
    uint32 half_depth;
    uint32 angles;
    int interleaved;
};

extern "C" __global__ void __launch_bounds__(kThreads) rope(const __grid_constant__ Params p) {
    const int64 i = int64(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= p.pairs) return;
    const int64 row = i / p.half_depth;
    const uint32 j = uint32(i - row * p.half_depth);
    const bool is_split = !p.interleaved && j < p.angles;
    const int64 first = row * (2 * p.half_depth) + (is_split ? j : 2 * j);
    const int64 second = first + (is_split ? p.angles : 1);
    float a = number_at(p.x, first), b = number_at(p.x, second);
    if (j < p.angles) {
        const int64 angle = row / p.heads * p.angles + j;
        const float cos = __ldg(p.cos + angle), sin = __ldg(p.sin + angle);
        const float turned = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
        b = __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
        a = turned;
    }
    p.out[first] = a;
    p.out[second] = b;
}
