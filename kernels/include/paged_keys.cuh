// Device mirror of mla_fp8/cache.py: where the bytes of a key stand.
// k_blocks [num_blocks, 1, num_layers, page_size, kv_heads, depth], E4M3 codes
// k_scales [num_blocks, 1, num_layers, page_size, kv_heads, scale_groups], float32
// k_lookup_table [batch, pages_per_seq]: page p of sequence b lives in block table[b, p]
#pragma once
#include "common.cuh"

constexpr uint32 kNoBlock = 0xffffffffu;  // num_blocks is at most this

struct PagedKeys {
    const uint8* blocks;
    const float* scales;
    const uint32* lookup_table;
    uint32 num_blocks;
    uint32 num_layers;
    uint32 layer;
    uint32 page_size;
    uint32 page_factor;  // position / page_size is umulhi(2 position, page_factor) >> page_shift
    uint32 page_shift;
    uint32 pages_per_seq;

    // A table entry, read: where a position's key stands if there is such a block.
    struct Entry {
        uint32 block;  // kNoBlock if the position is past the table
        uint32 slot;
    };

    __device__ __forceinline__ Entry look_up(int sequence, uint32 position) const {  // below 2 ** 31
        const uint32 page = __umulhi(2 * position, page_factor) >> page_shift;  // a division takes 20 instructions
        const uint32 slot = position - page * page_size;
        return {page < pages_per_seq ? lookup_table[int64(sequence) * pages_per_seq + page] : kNoBlock, slot};
    }

    // The row (block, layer, slot), or -1 if there is no such block.
    __device__ __forceinline__ int64 row(Entry entry) const {
        if (entry.block >= num_blocks) return -1;
        return (int64(entry.block) * num_layers + layer) * page_size + entry.slot;
    }

    __device__ __forceinline__ int64 row(int sequence, uint32 position) const {
        return row(look_up(sequence, position));
    }
};
