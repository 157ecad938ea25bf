// indices[r] = the min(kTopK, selectable) first columns of row r in the total order of the contract,
// in ascending column order, then -1; values[r] (kValues) the scores beside them, then -inf.
//
// scores [rows, row_stride] float32, of which row r may use the columns below lengths[r].
//
// A radix select, linear in the row: three passes narrow down the key of the kTopK-th score, 11, 11
// and 10 bits at a time, by counting; a fourth walks the row once more and writes every column above
// that key, and of those equal to it the first few, each at the place a running count gives it.
// Counts do not depend on the order of additions, so neither does anything written.
//
// One block per row. kHoles = 1: the pattern kHole marks columns that may not be selected.
#include "common.cuh"

static_assert(kTopK >= 1 && kTopK <= 65536, "indices per row");
static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024, "one block scan");
static_assert(kValues == 0 || kValues == 1, "whether scores are written beside the indices");
static_assert(kHoles == 0 || kHoles == 1, "whether kHole marks columns or is a NaN like any other");
static_assert(kLengthStride == 1 || kLengthStride == 2, "lengths alone, or inside TokenSpan");

constexpr int kBins = 2048;
constexpr int kBinsPerThread = kBins / kThreads;
static_assert(kBinsPerThread >= 1 && kBins % kThreads == 0, "every bin has one owner");
constexpr int kColumnsPerThread = 4;

struct Shared {
    uint32 histogram[kBins];
    uint32 warp_totals[32];
    uint32 bin;
    uint32 needed;
};

__device__ __forceinline__ uint32 column_key(const float* row, int column) {
    const float score = row[column];
    if (kHoles && __float_as_uint(score) == kHole) return kNotSelectable;
    return ordered_key(score);
}

// Counts the selectable keys that agree with `prefix` above `shift + 11` bits, by their next bits.
__device__ __forceinline__ void count_keys(Shared& shared, const float* row, int length,
                                           uint32 prefix, uint32 prefix_mask, int shift, uint32 bin_mask) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    // Whole warps stay in the loop: the vote below needs every lane.
    const int padded = (length + kWarpSize - 1) / kWarpSize * kWarpSize;
#pragma unroll 4
    for (int column = threadIdx.x; column < padded; column += kThreads) {
        const uint32 key = column < length ? column_key(row, column) : kNotSelectable;
        const bool counts = key != kNotSelectable && (key & prefix_mask) == prefix;
        const uint32 bin = counts ? (key >> shift) & bin_mask : kBins;
        // A plateau (ReLU zeros) puts a whole warp into one bin: one addition instead of 32 in turn.
        int uniform;
        __match_all_sync(kFullWarp, bin, &uniform);
        if (uniform) {
            if (bin < kBins && threadIdx.x % kWarpSize == 0) atomicAdd(&shared.histogram[bin], uint32(kWarpSize));
        } else if (counts) {
            atomicAdd(&shared.histogram[bin], 1u);
        }
    }
    __syncthreads();
}

// Finds the bin that holds the `needed`-th largest counted key, and what is still needed inside it.
// Returns the number of keys counted; below `needed` of them, nothing is found.
__device__ __forceinline__ uint32 find_bin(Shared& shared, uint32 needed) {
    // Thread i owns the bins from the top down, so that the scan runs from large keys to small.
    const int top = kBins - 1 - int(threadIdx.x) * kBinsPerThread;
    uint32 own = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) own += shared.histogram[top - i];
    uint32 total;
    uint32 above = block_exclusive_sum(own, shared.warp_totals, total);
    if (above < needed && needed <= above + own) {
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) {
            const uint32 count = shared.histogram[top - i];
            if (above < needed && needed <= above + count) {
                shared.bin = top - i;
                shared.needed = needed - above;
            }
            above += count;
        }
    }
    __syncthreads();
    return total;
}

extern "C" __global__ void __launch_bounds__(kThreads) select_topk(
    const float* __restrict__ scores, const int* __restrict__ lengths, int* __restrict__ indices,
    float* __restrict__ values, int columns, int64 row_stride) {
    __shared__ Shared shared;
    const float* row = scores + blockIdx.x * row_stride;
    int* row_indices = indices + int64(blockIdx.x) * kTopK;
    float* row_values = kValues ? values + int64(blockIdx.x) * kTopK : nullptr;
    const int length = min(max(lengths[int64(blockIdx.x) * kLengthStride + kLengthStride - 1], 0), columns);

    // Keys above `threshold` are taken, and of those equal to it the first `ties`.
    uint32 threshold = kNotSelectable;
    uint32 ties = 0;
    if (length > kTopK) {
        count_keys(shared, row, length, 0, 0, 21, 0x7ffu);
        if (find_bin(shared, kTopK) > kTopK) {
            threshold = shared.bin << 21;
            count_keys(shared, row, length, threshold, 0x7ffu << 21, 10, 0x7ffu);
            find_bin(shared, shared.needed);
            threshold |= shared.bin << 10;
            count_keys(shared, row, length, threshold, 0x3fffffu << 10, 0, 0x3ffu);
            find_bin(shared, shared.needed);
            threshold |= shared.bin;
            ties = shared.needed;
        }
    }

    uint32 taken = 0;      // columns written so far
    uint32 ties_seen = 0;  // columns equal to the threshold so far
    for (int base = 0; base < length && taken < kTopK; base += kThreads * kColumnsPerThread) {
        const int first = base + int(threadIdx.x) * kColumnsPerThread;
        uint32 keys[kColumnsPerThread];
        uint32 own = 0;  // greater in the low half, equal in the high half: both at most 4096 a block
#pragma unroll
        for (int i = 0; i < kColumnsPerThread; ++i) {
            keys[i] = first + i < length ? column_key(row, first + i) : kNotSelectable;
            own += uint32(keys[i] > threshold) + (uint32(ties > 0 && keys[i] == threshold) << 16);
        }
        uint32 total;
        const uint32 before = block_exclusive_sum(own, shared.warp_totals, total);
        uint32 equal = ties_seen + (before >> 16);
        uint32 place = taken + (before & 0xffffu) + min(equal, ties) - min(ties_seen, ties);
#pragma unroll
        for (int i = 0; i < kColumnsPerThread; ++i) {
            const bool tie = ties > 0 && keys[i] == threshold;
            if (keys[i] > threshold || (tie && equal < ties)) {
                row_indices[place] = first + i;
                if (kValues) row_values[place] = row[first + i];
                ++place;
            }
            equal += tie;
        }
        const uint32 all_ties = ties_seen + (total >> 16);
        taken += (total & 0xffffu) + min(all_ties, ties) - min(ties_seen, ties);
        ties_seen = all_ties;
    }
    for (int i = taken + threadIdx.x; i < kTopK; i += kThreads) {
        row_indices[i] = -1;
        if (kValues) row_values[i] = __uint_as_float(kMinusInfinity);
    }
}
