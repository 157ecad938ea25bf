// PTX that every target has. The compiler needs more instructions for predicated additions and
// stores than the hardware, and it has no names for barriers of some warps and for dependent
// launches.
#pragma once
#include "common.cuh"

// sum += add if a >= b; false if either is a NaN.
template <uint32 add>
__device__ __forceinline__ void add_if_at_least(uint32& sum, float a, float b) {
    asm("{\n.reg .pred p;\nsetp.ge.f32 p, %1, %2;\n@p add.u32 %0, %0, %3;\n}"
        : "+r"(sum)
        : "f"(a), "f"(b), "n"(add));
}

// If a >= b, stores two words to shared memory and moves the address past them.
__device__ __forceinline__ void append_if_at_least(uint32& address, uint32 x, int y, float a,
                                                   float b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ge.f32 p, %3, %4;\n"
        "@p st.shared.v2.b32 [%0], {%1, %2};\n@p add.u32 %0, %0, 8;\n}"
        : "+r"(address)
        : "r"(x), "r"(y), "f"(a), "f"(b)
        : "memory");
}

// If a >= b, stores a word to global memory and moves the address past it.
template <class T>
__device__ __forceinline__ void store_if_at_least(T*& address, T value, float a, float b) {
    static_assert(sizeof(T) == 4, "a word");
    asm volatile(
        "{\n.reg .pred p;\nsetp.ge.f32 p, %2, %3;\n"
        "@p st.global.b32 [%0], %1;\n@p add.u64 %0, %0, 4;\n}"
        : "+l"(address)
        : "r"(*reinterpret_cast<uint32*>(&value)), "f"(a), "f"(b)
        : "memory");
}

// If the condition holds, stores a word to global memory, without a branch around the store.
template <class T>
__device__ __forceinline__ void store_if(bool condition, T* address, T value) {
    static_assert(sizeof(T) == 4, "a word");
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}"
                 :
                 : "r"(int(condition)), "l"(address), "r"(*reinterpret_cast<uint32*>(&value))
                 : "memory");
}

// If y is not negative, stores two words to shared memory and moves the address past them.
__device__ __forceinline__ void append_if_not_negative(uint32& address, uint32 x, int y) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ge.s32 p, %2, 0;\n"
        "@p st.shared.v2.b32 [%0], {%1, %2};\n@p add.u32 %0, %0, 8;\n}"
        : "+r"(address)
        : "r"(x), "r"(y)
        : "memory");
}

// Adds one to a word in shared memory.
__device__ __forceinline__ void add_one_if(bool condition, uint32 address) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p red.shared.add.u32 [%1], 1;\n}"
                 :
                 : "r"(int(condition)), "r"(address)
                 : "memory");
}

// Adds one to a word in shared memory and returns what it was. The compiler would combine the
// additions of a warp by some thirty instructions, where few lanes add.
__device__ __forceinline__ uint32 take_number(uint32& word) {
    uint32 before;
    asm volatile("atom.shared.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "r"(uint32(__cvta_generic_to_shared(&word)))
                 : "memory");
    return before;
}

// Lane l gets the sum over lanes 0 to l. Faster than inclusive_scan (warp_scan.cuh): the shuffle
// itself says whether there is a lane below.
__device__ __forceinline__ uint32 inclusive_sum_of_lanes(uint32 value) {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
        asm volatile(
            "{\n.reg .pred p;\n.reg .u32 below;\nshfl.sync.up.b32 below|p, %0, %1, 0, 0xffffffff;\n"
            "@p add.u32 %0, %0, below;\n}"
            : "+r"(value)
            : "r"(step));
    }
    return value;
}

// A barrier for `threads` threads, which are whole warps. Barrier 0 is that of __syncthreads.
template <int threads>
__device__ __forceinline__ void sync_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" : : "r"(barrier), "n"(threads) : "memory");
}

// Programmatic dependent launch (from Hopper on): a kernel may begin while the kernel before it
// still runs. It must wait before it reads what that kernel writes.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin once all blocks have called this or ended.
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
