// The paged key cache, as kernels read it (on the host: PagedKeyCache in mla_fp8/cache.py).
//
// A block has the values of page_size keys one after another and, at another address, their scales.
// The strides from block to block may have any value, even a negative one: the cache may be a view
// of a larger array, for instance one layer of it.
#pragma once
#include "common.cuh"

constexpr uint32 kNoBlock = 0xffffffffu;  // never a block: num_blocks is at most this

struct PagedKeys {
    const uint8* blocks;         // values of block 0: [page_size, kv_heads, depth], E4M3 codes
    const float* scales;         // scales of block 0: [page_size, kv_heads, scale_groups]
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

    // The page of a position below 2 ** 31. The multiplication replaces a division, which takes 20
    // instructions.
    __device__ __forceinline__ uint32 page(uint32 position) const {
        return __umulhi(2 * position, page_factor) >> page_shift;
    }
    __device__ __forceinline__ uint32 slot_in_page(uint32 position) const {
        return position - page(position) * page_size;
    }

    __device__ __forceinline__ Entry look_up(int sequence, uint32 position) const {
        const uint32 at = page(position);
        const uint32* entry = lookup_table + (int64(sequence) * pages_per_seq + at);
        return {at < pages_per_seq ? __ldg(entry) : kNoBlock, position - at * page_size};
    }

    // Whether the block of an entry exists. If not, its keys must not be read.
    __device__ __forceinline__ bool exists(Entry entry) const { return entry.block < num_blocks; }
    __device__ __forceinline__ bool exists(int sequence, uint32 position) const {
        return exists(look_up(sequence, position));
    }

    // The key's place among the slots of all blocks, or -1 if its block does not exist. Only for
    // caches whose slots an int can number: the host has made sure.
    __device__ __forceinline__ int slot(Entry entry) const {
        return exists(entry) ? int(entry.block * page_size + entry.slot) : -1;
    }

    // The address of a key's values. A key takes key_bytes.
    __device__ __forceinline__ const uint8* values_of(Entry entry, uint32 key_bytes) const {
        return blocks + entry.block * block_stride + uint64(entry.slot) * key_bytes;
    }
    // The address of a key's scales. A key has key_scales scales.
    __device__ __forceinline__ const float* scales_of(Entry entry, uint32 key_scales) const {
        return scales + entry.block * scales_stride + uint64(entry.slot) * key_scales;
    }
};
