// Device mirror of mla_fp8/cache.py: where the bytes of a key stand.
// k_blocks [num_blocks, 1, num_layers, page_size, kv_heads, depth], E4M3 codes
// k_scales [num_blocks, 1, num_layers, page_size, kv_heads, scale_groups], float32
// k_lookup_table [batch, pages_per_seq]: page p of sequence b lives in block table[b, p]
#pragma once
#include "common.cuh"

struct PagedKeys {
    const uint8* blocks;
    const float* scales;
    const uint32* lookup_table;
    uint32 num_blocks;
    uint32 num_layers;
    uint32 layer;
    uint32 page_size;
    uint32 pages_per_seq;

    // The row (block, layer, slot) a position's key stands in, or -1 if there is no such page: a
    // position past the table, or a table entry that names no block. Never touches what it returns.
    __device__ __forceinline__ int64 row(int sequence, uint32 position) const {
        const uint32 page = position / page_size;
        if (page >= pages_per_seq) return -1;
        const uint32 block = lookup_table[int64(sequence) * pages_per_seq + page];
        if (block >= num_blocks) return -1;
        return (int64(block) * num_layers + layer) * page_size + position % page_size;
    }
};
