// Slots: where selected keys are in the paged cache.
#pragma once
#include "common.cuh"
#include "paged_keys.cuh"

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
};

// Without slots it is empty, so that it takes no registers where a row is passed to a function.
template <>
struct SlotFinder<false> {
    static constexpr int* all_slots = nullptr;

    template <class Params>
    __device__ __forceinline__ SlotFinder(const Params&, const int&) {}
    __device__ __forceinline__ PagedKeys::Entry look_up(int) const { return {}; }
    __device__ __forceinline__ int slot(PagedKeys::Entry) const { return -1; }
};
