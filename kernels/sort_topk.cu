// Sorts each row of selected columns, which stand in ascending order, by the total order of
// docs/contract.md: higher score first, and among equal scores the smaller column. The -1s at the
// end of a row stay there.
//
// A stable radix sort by score alone, in four passes of 8 bits starting with the lowest. The rows
// are in ascending column order, so a stable sort puts equal scores in the required order. A pass
// reads the row in blocks of kThreads elements. The place of an element is the number of smaller
// digits, plus the number of equal digits in the blocks, warps and lanes before. The passes
// alternate between the rows and the scratch rows, so the fourth ends in the rows.
//
// One block per row.
#include "common.cuh"
#include "warp_scan.cuh"

static_assert(kTopK >= 1 && kTopK <= 65536, "indices per row");

struct Params {
    int* indices;        // [rows, kTopK], sorted in place
    float* values;       // [rows, kTopK]
    int* spare_indices;  // [rows, kTopK], scratch
    float* spare_values;
};

constexpr int kDigits = 256;
static_assert(kThreads == kDigits, "thread d counts digit d");
constexpr int kWarps = kThreads / kWarpSize;

struct Shared {
    uint32 place[kDigits];             // of the next element with a digit
    uint32 per_warp[kWarps][kDigits];  // elements with a digit, then the place of the warp's first
    uint32 warp_totals[32];
};

extern "C" __global__ void __launch_bounds__(kThreads) sort_topk(const __grid_constant__ Params p) {
    __shared__ Shared shared;
    const int own_digit = threadIdx.x;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64 offset = int64(blockIdx.x) * kTopK;
    int* from_indices = p.indices + offset;
    float* from_values = p.values + offset;
    int* to_indices = p.spare_indices + offset;
    float* to_values = p.spare_values + offset;

    uint32 own = 0;
    for (int i = threadIdx.x; i < kTopK; i += kThreads) own += from_indices[i] >= 0;
    uint32 count;
    block_exclusive_sum(own, shared.warp_totals, count);

    for (int shift = 0; shift < 32; shift += 8) {
        shared.place[own_digit] = 0;
        for (int w = 0; w < kWarps; ++w) shared.per_warp[w][own_digit] = 0;
        __syncthreads();
        for (uint32 i = threadIdx.x; i < count; i += kThreads) {
            atomicAdd(&shared.place[~ordered_key(from_values[i]) >> shift & 0xffu], 1u);
        }
        __syncthreads();
        uint32 total;
        const uint32 before =
            block_exclusive_sum(shared.place[own_digit], shared.warp_totals, total);
        shared.place[own_digit] = before;
        __syncthreads();

        for (uint32 base = 0; base < count; base += kThreads) {
            const uint32 i = base + threadIdx.x;
            const bool valid = i < count;
            const float value = valid ? from_values[i] : 0.0f;
            const uint32 digit = valid ? ~ordered_key(value) >> shift & 0xffu : kDigits;
            const uint32 peers = __match_any_sync(kFullWarp, digit);
            const uint32 rank = __popc(peers & ((1u << lane) - 1));
            if (valid && rank == 0) shared.per_warp[warp][digit] = __popc(peers);
            __syncthreads();
            uint32 next = shared.place[own_digit];
            for (int w = 0; w < kWarps; ++w) {
                const uint32 elements = shared.per_warp[w][own_digit];
                shared.per_warp[w][own_digit] = next;
                next += elements;
            }
            shared.place[own_digit] = next;
            __syncthreads();
            if (valid) {
                const uint32 place = shared.per_warp[warp][digit] + rank;
                to_indices[place] = from_indices[i];
                to_values[place] = value;
            }
            __syncthreads();
            for (int w = 0; w < kWarps; ++w) shared.per_warp[w][own_digit] = 0;
            __syncthreads();
        }
        int* const indices_read = from_indices;
        float* const values_read = from_values;
        from_indices = to_indices;
        from_values = to_values;
        to_indices = indices_read;
        to_values = values_read;
        __syncthreads();  // the next pass reads what this one wrote
    }
}
