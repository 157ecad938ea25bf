// Slots: where selected keys are in the paged cache.
#pragma once
#include "common.cuh"
#include "paged_keys.cuh"
#include "ptx.cuh"
#include "row_threads.cuh"

// Finds the slots of a row's columns.
template <bool wanted>
struct SlotFinder {
    const PagedKeys& keys;
    const int& sequence;  // in shared memory, because registers are scarce
    int* all_slots;       // [rows, kTopK], if kSlots == 2

    template <class Params>
    __device__ __forceinline__ SlotFinder(const Params& p, const int& sequence)
        : keys(p.keys), sequence(sequence), all_slots(p.slots) {}

    // Reads the lookup table. A caller looks up several columns before it uses the first entry, so
    // that the loads are in flight together.
    __device__ __forceinline__ PagedKeys::Entry look_up(int column) const {
        return keys.look_up(sequence, column);
    }

    __device__ __forceinline__ int slot(PagedKeys::Entry entry) const { return keys.slot(entry); }

    // Asks for the table entries of `columns` columns, so that look_up finds them in the L1 cache.
    // Called by the kThreads threads of a row, early, and only where rows are few: the lookups at
    // the end would wait for the L2 cache, while nothing else is left to do.
    __device__ __forceinline__ void prefetch(int of_sequence, int columns) const {
        constexpr uint32 kLine = 128 / sizeof(uint32), kMost = 4096;
        const uint32 pages = min(keys.page(max(columns, 1) - 1) + 1, keys.pages_per_seq);
        const uint32* const table = keys.lookup_table + int64(of_sequence) * keys.pages_per_seq;
        for (uint32 i = thread_of_row() * kLine; i < min(pages, kMost); i += kThreads * kLine) {
            prefetch_global(table + i);
        }
    }
};

// Without slots it is empty, so that it takes no registers where a row is passed to a function.
template <>
struct SlotFinder<false> {
    static constexpr int* all_slots = nullptr;

    template <class Params>
    __device__ __forceinline__ SlotFinder(const Params&, const int&) {}
    __device__ __forceinline__ PagedKeys::Entry look_up(int) const { return {}; }
    __device__ __forceinline__ int slot(PagedKeys::Entry) const { return -1; }
    __device__ __forceinline__ void prefetch(int, int) const {}
};
