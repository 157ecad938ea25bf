// scores[t, s] = -inf for the keys s that token t does not see: kv_len(t) <= s < max_kv_len.
//
// Fills the rest of a dense matrix of scores after a kernel that writes only the keys that tokens
// see. A warp takes 4096 columns of a row at a time. Tokens see most keys of a long row, so for
// most pieces the warp has nothing to write.
#include "common.cuh"
#include "token_row.cuh"

static_assert(kThreads % kWarpSize == 0, "whole warps");

struct Params {
    const TokenRow* token_rows;  // [tokens], from schedule
    float* scores;               // [tokens, row_stride]
    int64 row_stride;            // elements
    int tokens;
    int max_kv_len;  // columns of the matrix
};

constexpr int kColumns = 4096;

extern "C" __global__ void __launch_bounds__(kThreads)
    fill_invalid(const __grid_constant__ Params p) {
    const int column_chunks = (p.max_kv_len + kColumns - 1) / kColumns;
    const int64 warps = int64(gridDim.x) * (kThreads / kWarpSize);
    const int64 warp = int64(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    for (int64 i = warp; i < int64(p.tokens) * column_chunks; i += warps) {
        const int token = int(i / column_chunks);
        const int first = int(i % column_chunks) * kColumns;
        const int end = min(first + kColumns, p.max_kv_len);
        float* row = p.scores + token * p.row_stride;
        const int invalid = max(first, __ldg(&p.token_rows[token].kv_len));
        for (int key = invalid + threadIdx.x % kWarpSize; key < end; key += kWarpSize) {
            row[key] = __uint_as_float(kMinusInfinity);
        }
    }
}
