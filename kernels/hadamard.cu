// out[r, i] = depth ** -0.5 * sum over j of (-1) ** popcount(i & j) * x[r, j]
//
// The Walsh-Hadamard transform of each row in natural (Sylvester) order, in float32. Stage by stage
// it replaces the numbers a and b at distance 1, then 2, 4, ... kDepth / 2 by a + b and a - b. The
// order of the additions is that of hadamard in mla_fp8/_reference/keys.py, so the bytes are equal.
//
// A lane takes eight consecutive channels, so kDepth / 8 lanes take a row.
#include "common.cuh"
#include "floats.cuh"

static_assert(kDepth == 32 || kDepth == 64 || kDepth == 128 || kDepth == 256, "depth of a row");
static_assert(kAligned == 0 || kAligned == 1, "whether all rows of x begin on 16 bytes");
static_assert(kThreads % kWarpSize == 0, "whole warps");

struct Params {
    const void* x;  // [rows, kDepth]
    float* out;     // [rows, kDepth]
    int64 rows;
    float factor;  // kDepth ** -0.5
};

constexpr int kChannels = 8;  // of a lane
constexpr int kLanes = kDepth / kChannels;

extern "C" __global__ void __launch_bounds__(kThreads) hadamard(const __grid_constant__ Params p) {
    const int64 row = (int64(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const uint32 lane = threadIdx.x % kLanes;
    // Lanes past the end read the last row, so that whole warps take part in the shuffles.
    const int64 first = min(row, p.rows - 1) * kDepth + lane * kChannels;
    Numbers<kChannels> numbers;
    numbers.load<kAligned ? 16 : kNumberBytes>(static_cast<const uint8*>(p.x) +
                                               first * kNumberBytes);
    float y[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) y[c] = numbers[c];
#pragma unroll
    for (int distance = 1; distance < kChannels; distance *= 2) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
            if (c & distance) continue;
            const float a = y[c], b = y[c + distance];
            y[c] = __fadd_rn(a, b);
            y[c + distance] = __fsub_rn(a, b);
        }
    }
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
            const float other = __shfl_xor_sync(kFullWarp, y[c], distance);
            y[c] = lane & distance ? __fsub_rn(other, y[c]) : __fadd_rn(y[c], other);
        }
    }
    if (row >= p.rows) return;
    float4* out = reinterpret_cast<float4*>(p.out + first);
#pragma unroll
    for (int i = 0; i < kChannels / 4; ++i) {
        out[i] = make_float4(__fmul_rn(y[4 * i], p.factor), __fmul_rn(y[4 * i + 1], p.factor),
                             __fmul_rn(y[4 * i + 2], p.factor), __fmul_rn(y[4 * i + 3], p.factor));
    }
}
