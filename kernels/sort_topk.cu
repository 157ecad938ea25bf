// Reorders each row of selected indices [rows, kTopK] and their scores from ascending index to the
// total order of the contract: higher score first, among equals the smaller index.
//
// A stable radix sort by score alone, four passes of 8 bits from the least: the input stands in
// ascending index, so stability is the tie rule. Each pass walks the row in blocks of kThreads
// elements; an element's place is the count of smaller digits, plus that of its own digit in
// earlier blocks, warps and lanes. Four passes end where they began, in indices and values.
//
// One block per row; spare_indices and spare_values [rows, kTopK] are scratch.
#include "common.cuh"

static_assert(kTopK >= 1 && kTopK <= 65536, "indices per row");

constexpr int kDigits = 256;
constexpr int kThreads = kDigits;  // thread d owns digit d
constexpr int kWarps = kThreads / kWarpSize;

struct Shared {
    uint32 place[kDigits];               // where the next element of a digit goes
    uint32 per_warp[kWarps][kDigits];    // first a count, then the place of the warp's first one
    uint32 warp_totals[32];
};

extern "C" __global__ void __launch_bounds__(kThreads) sort_topk(
    int* indices, float* values, int* spare_indices, float* spare_values) {
    __shared__ Shared shared;
    const int digit_owned = threadIdx.x;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64 offset = int64(blockIdx.x) * kTopK;
    int* from_indices = indices + offset;
    float* from_values = values + offset;
    int* to_indices = spare_indices + offset;
    float* to_values = spare_values + offset;

    // The -1s stand last and stay there. The row is ordered, so its length is a count.
    __syncthreads();
    uint32 own = 0;
    for (int i = threadIdx.x; i < kTopK; i += kThreads) own += from_indices[i] >= 0;
    uint32 count;
    block_exclusive_sum(own, shared.warp_totals, count);

    for (int shift = 0; shift < 32; shift += 8) {
        shared.place[digit_owned] = 0;
        for (int w = 0; w < kWarps; ++w) shared.per_warp[w][digit_owned] = 0;
        __syncthreads();
        for (uint32 i = threadIdx.x; i < count; i += kThreads) {
            atomicAdd(&shared.place[~ordered_key(from_values[i]) >> shift & 0xffu], 1u);
        }
        __syncthreads();
        uint32 total;
        const uint32 before = block_exclusive_sum(shared.place[digit_owned], shared.warp_totals, total);
        shared.place[digit_owned] = before;
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
            uint32 next = shared.place[digit_owned];
            for (int w = 0; w < kWarps; ++w) {
                const uint32 amount = shared.per_warp[w][digit_owned];
                shared.per_warp[w][digit_owned] = next;
                next += amount;
            }
            shared.place[digit_owned] = next;
            __syncthreads();
            if (valid) {
                const uint32 place = shared.per_warp[warp][digit] + rank;
                to_indices[place] = from_indices[i];
                to_values[place] = value;
            }
            __syncthreads();
            for (int w = 0; w < kWarps; ++w) shared.per_warp[w][digit_owned] = 0;
            __syncthreads();
        }
        int* const indices_read = from_indices;
        float* const values_read = from_values;
        from_indices = to_indices;
        from_values = to_values;
        to_indices = indices_read;
        to_values = values_read;
        __syncthreads();  // the pass is visible to the block before the next reads it
    }
}
