// The paged key cache, as kernels read it (on the host: mla_fp8/cache.py).
#pragma once
#include "common.cuh"

constexpr uint32 kNoBlock = 0xffffffffu;  // never a block: num_blocks is at most this

struct PagedKeys {
    const uint8* blocks;  // of the layer: [num_blocks, page_size, kv_heads, depth], E4M3 codes
    const float* scales;  // of the layer: [num_blocks, page_size, kv_heads, scale_groups]
    const uint32* lookup_table;  // [batch, pages_per_seq]: the block of each page
    int64 block_stride;          // bytes from a block's values to the next block's
    int64 scales_stride;         // floats from a block's scales to the next block's
    uint32 num_blocks;
    uint32 page_size;
    uint32 page_factor;  // position / page_size is umulhi(2 position, page_factor) >> page_shift
    uint32 page_shift;
    uint32 pages_per_seq;

    struct Entry {
        uint32 block;  // unchecked; kNoBlock if the position is past the table
        uint32 slot;   // within the page
    };

    // Looks up a position below 2 ** 31. The multiplication replaces a division, which takes 20
    // instructions.
    __device__ __forceinline__ Entry look_up(int sequence, uint32 position) const {
        const uint32 page = __umulhi(2 * position, page_factor) >> page_shift;
        const uint32 slot = position - page * page_size;
        const uint32* entry = lookup_table + (int64(sequence) * pages_per_seq + page);
        return {page < pages_per_seq ? __ldg(entry) : kNoBlock, slot};
    }

    __device__ __forceinline__ bool exists(int sequence, uint32 position) const {
        return look_up(sequence, position).block < num_blocks;
    }
};
