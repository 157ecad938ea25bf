// scores[t, s] = -inf for the keys s that token t does not see: kv_len(t) <= s < max_keys.
//
// token_rows [tokens] from schedule, scores [tokens, row_stride] float32. For a dense matrix behind a
// kernel that writes only what is seen. A warp takes kColumns columns of a row at a time, and goes on
// by the grid's warps: most of a long row is seen, and skipping it must cost little.
#include "common.cuh"

static_assert(kThreads % kWarpSize == 0, "whole warps");

constexpr int kColumns = 4096;

extern "C" __global__ void __launch_bounds__(kThreads) fill_invalid(
    const TokenRow* __restrict__ token_rows, int tokens, int max_keys, int64 row_stride,
    float* __restrict__ scores) {
    const int chunks = (max_keys + kColumns - 1) / kColumns;
    const int64 warps = int64(gridDim.x) * (kThreads / kWarpSize);
    const int64 warp = int64(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    for (int64 i = warp; i < int64(tokens) * chunks; i += warps) {
        const int token = int(i / chunks);
        const int first = int(i % chunks) * kColumns;
        const int end = min(first + kColumns, max_keys);
        float* row = scores + token * row_stride;
        const int unseen = max(first, token_rows[token].kv_len);
        for (int key = unseen + threadIdx.x % kWarpSize; key < end; key += kWarpSize) {
            row[key] = __uint_as_float(kMinusInfinity);
        }
    }
}
