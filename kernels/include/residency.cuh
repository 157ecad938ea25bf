// How many blocks share a multiprocessor.
#pragma once
#include "common.cuh"

// As many as are wanted and fit its shared memory, but at least one. A block takes 1 KiB more than
// it asks for. __launch_bounds__ takes this number, so it limits the registers of a thread.
__device__ constexpr int resident_blocks(int shared_bytes, int wanted) {
    const int fitting = kMultiprocessorBytes / (shared_bytes + 1024);
    return fitting < 1 ? 1 : fitting < wanted ? fitting : wanted;
}
