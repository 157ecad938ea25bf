// Where rows of scores stand when each has only the room it needs.
//
// All rows of a sequence are as long as that of its last token, in whole vectors, and those of the batch follow one
// another. They are cut into windows, counted from the end: one for each launch, and a row belongs to the window that
// it begins in. So a launch takes the room of a window and a row at most, whatever the lengths are; of the launches
// that rows of the longest length would need, the first find nothing to do, and the last, which has the GPU to
// itself, always has something. There are kWindows windows at least, where there are as many launches. A launch may
// have any number of rows: nothing else may be kept of each (mla_fp8/_scratch.py).
#pragma once
#include "scheduler.cuh"

// By a warp: calls visit(sequence, its first token, past its last, where its rows begin, elements from one to the
// next), a sequence in each lane and some that are none in the last round. Returns the elements of all rows.
template <class Visit>
__device__ __forceinline__ int64 for_each_sequence(const Batch& batch, const Visit& visit) {
    const int lane = threadIdx.x % kWarpSize;
    int so_far = batch.offset(0);
    int64 place = 0;
    for (int base = 0; base < batch.size; base += kWarpSize) {
        const int i = base + lane;
        const bool is_one = i < batch.size;
        int end = max(so_far, is_one ? batch.offset(i + 1) : 0);
#pragma unroll
        for (int step = 1; step < kWarpSize; step *= 2) {  // past values are in it already: no lane is left out
            end = max(end, __shfl_up_sync(kFullWarp, end, step));
        }
        const int before = __shfl_up_sync(kFullWarp, end, 1);
        const int begin = lane == 0 ? so_far : before;
        const int tokens = end - begin;
        const int64 keys = is_one ? min(max(batch.length(i, tokens) + tokens, int64(0)), int64(batch.max_keys)) : 0;
        const int stride = int((keys + kRowAlignment - 1) / kRowAlignment * kRowAlignment);
        const int64 size = int64(tokens) * stride;
        int64 up_to = size;
#pragma unroll
        for (int step = 1; step < kWarpSize; step *= 2) {
            const int64 other = __shfl_up_sync(kFullWarp, up_to, step);
            if (lane >= step) up_to += other;
        }
        visit(i, begin, end, place + up_to - size, stride);
        place += __shfl_sync(kFullWarp, up_to, kWarpSize - 1);
        so_far = __shfl_sync(kFullWarp, end, kWarpSize - 1);
    }
    return place;
}

// How long a window is, at most `window`: where there are few, shorter ones leave less to select from at the end.
__device__ __forceinline__ int64 shared_out(int64 all, int64 window, int64 launches) {
    const uint32 windows = uint32(min(launches, int64(kWindows)));
    if (all >= windows * window) return window;
    const uint32 each = (uint32(all) + windows - 1) / windows;  // 32 bits, for a window is a part of scratch
    return max((each + kRowAlignment - 1) / kRowAlignment, 1u) * kRowAlignment;
}

// Where in its window a token's row begins, below `window` whatever the numbers are.
__device__ __forceinline__ int64 place_in_window(const Batch& batch, int token, int sequence, int64 window,
                                                 int64 launches) {
    int64 place = 0;
    const int64 all = for_each_sequence(batch, [&](int i, int begin, int, int64 first, int stride) {
        if (i == sequence) place = first + int64(token - begin) * stride;
    });
    place = __shfl_sync(kFullWarp, place, max(sequence, 0) % kWarpSize);
    window = shared_out(all, window, launches);
    return (window - (all - place) % window) % window;
}

// The first token whose row begins at `place` or after; a place below all rows.
__device__ __forceinline__ int first_token_from(const Batch& batch, int64 place) {
    if (place <= 0) return 0;
    int found = batch.total;  // numbers changed under our feet
    for_each_sequence(batch, [&](int, int begin, int end, int64 first, int stride) {
        if (first < place && place <= first + int64(end - begin) * stride) {
            found = begin + int((place - first + stride - 1) / stride);
        }
    });
    return __reduce_min_sync(kFullWarp, found);
}

// How many multiprocessors are left to selection while others score: for rows of the longest length, of 1 / sqrt(2) of
// it, of half, and so on. From the host, which knows what takes how long.
struct Reserved {
    uint8 of_length[16];

    __device__ __forceinline__ int blocks(int64 all, int tokens, int64 longest) const {
        const float shorter = __fdividef(float(longest) * float(tokens), float(max(all, int64(1))));
        return of_length[min(int(2.0f * __log2f(fmaxf(shorter, 1.0f)) + 0.5f), 15)];
    }
};

// The tokens of a launch, one of so many, and what is left to selection.
__device__ __forceinline__ WindowTokens tokens_of_window(const Batch& batch, int64 window, int64 longest, int64 launch,
                                                       int64 launches, const Reserved& reserved) {
    const int64 all = for_each_sequence(batch, [](int, int, int, int64, int) {});
    window = shared_out(all, window, launches);
    const int64 first = all - (launches - launch) * window;
    const bool is_last = launch + 1 == launches;
    return {first_token_from(batch, first), is_last ? batch.total : first_token_from(batch, first + window),
            reserved.blocks(all, batch.total, longest)};
}
