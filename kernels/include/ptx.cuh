// PTX wrappers for every GPU we take: what a compiler spreads over more instructions than there are (additions and
// stores under a condition that is not needed twice), and barriers of a part of the block.
#pragma once
#include "common.cuh"

// sum += add if a >= b; a NaN is neither.
template <uint32 add>
__device__ __forceinline__ void add_if_at_least(uint32& sum, float a, float b) {
    asm("{\n.reg .pred p;\nsetp.ge.f32 p, %1, %2;\n@p add.u32 %0, %0, %3;\n}" : "+r"(sum) : "f"(a), "f"(b), "n"(add));
}

// Two words to shared memory if a >= b, and the address moves on past them.
__device__ __forceinline__ void append_if_at_least(uint32& address, uint32 x, int y, float a, float b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ge.f32 p, %3, %4;\n@p st.shared.v2.b32 [%0], {%1, %2};\n@p add.u32 %0, %0, 8;\n}"
        : "+r"(address) : "r"(x), "r"(y), "f"(a), "f"(b) : "memory");
}

// Counts one more at an address in shared memory.
__device__ __forceinline__ void add_one(uint32 address) {
    asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory");
}

__device__ __forceinline__ void add_one_if(bool condition, uint32 address) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p red.shared.add.u32 [%1], 1;\n}" ::"r"(int(condition)),
                 "r"(address) : "memory");
}

// Of the values of the lanes up to and with this one.
__device__ __forceinline__ uint32 inclusive_sum_of_lanes(uint32 value) {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
        asm volatile(
            "{\n.reg .pred p;\n.reg .u32 below;\nshfl.sync.up.b32 below|p, %0, %1, 0, 0xffffffff;\n"
            "@p add.u32 %0, %0, below;\n}" : "+r"(value) : "r"(step));
    }
    return value;
}

// Of `threads` threads, whole warps; number 0 is __syncthreads's own.
template <int threads>
__device__ __forceinline__ void barrier_of_some(int number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(threads) : "memory");
}

// A launch may begin while the one before it still runs (programmatic dependent launch, from Hopper on). It must wait
// before it reads what that one writes; and that one says when it may begin, or else it may at the end.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
