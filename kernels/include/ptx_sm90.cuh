// PTX wrappers for Hopper (sm_90a), one instruction each: mbarriers, asynchronous copies (cp.async
// and TMA), FP8 products of a warpgroup (wgmma), and register reallocation (setmaxnreg).
#pragma once
#include "common.cuh"

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return uint32(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64& barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
                 "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(uint64& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
                 : "memory");
}

// Arrives, and makes the phase wait for that many bytes of TMA copies.
__device__ __forceinline__ void barrier_arrive_expect(uint64& barrier, uint32 bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
        "r"(bytes)
        : "memory");
}

// Waits until the phase of that parity is complete. On a fresh barrier, parity 1 passes at once.
__device__ __forceinline__ void barrier_wait(uint64& barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
}

// A place in a ring of pipeline stages and the parity of its phase, in one register: there are none
// to spare.
template <int stages>
struct RingPlace {
    uint32 bits = 0;
    __device__ __forceinline__ int stage() const { return bits / 2; }
    __device__ __forceinline__ uint32 parity() const { return bits % 2; }
    __device__ __forceinline__ void advance() {
        bits += 2;
        if (bits / 2 == stages) bits = bits % 2 ^ 1;
    }
};

// Copies 16 bytes, bypassing L1: a block uses each key once.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)),
                 "l"(from)
                 : "memory");
}

__device__ __forceinline__ void copy_4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

// Arrives when all cp.async copies that this thread has issued are complete.
__device__ __forceinline__ void barrier_arrive_after_copies(uint64& barrier) {
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier))
        : "memory");
}

// CUtensorMap: an array of three axes in global memory, and the box that one TMA instruction copies
// from it. The outermost axis is the last.
struct alignas(64) TensorMap {
    uint64 opaque[16];
};

// Copies the box at that place, swizzled. The barrier counts its bytes as they arrive.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int x, int y, int z,
                                         uint64& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// L2 policy for data that is read once: evict it first.
__device__ __forceinline__ uint64 read_once() {
    uint64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// The same with an L2 policy.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int x, int y, int z,
                                         uint64& barrier, uint64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint "
        "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies a multiple of 16 bytes between addresses aligned to 16 bytes; the barrier counts them.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, uint32 bytes,
                                           uint64& barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(&barrier))
        : "memory");
}

// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes what threads wrote to shared memory visible to the tensor cores.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int registers>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// A wgmma operand in shared memory: rows of kRowBytes (64 or 128), swizzled over groups of 8 rows.
// The lower half of its descriptor holds the address in units of 16 bytes, so adding to it moves
// the operand. The upper half, operand_layout, is a constant.
__device__ __forceinline__ uint32 operand(const void* rows) {
    return shared_address(rows) >> 4 | 1u << 16;
}

template <int kRowBytes>
__device__ constexpr uint32 operand_layout() {
    static_assert(kRowBytes == 64 || kRowBytes == 128, "rows that have a swizzle");
    return (8 * kRowBytes >> 4) | (kRowBytes == 128 ? 1u : 2u) << 30;
}

// The swizzle: the place of byte `offset` of such rows. 16-byte pieces move within their row.
template <int kRowBytes>
__device__ __forceinline__ uint32 swizzled(uint32 offset) {
    return offset ^ (offset >> 7 & (kRowBytes / 16 - 1)) << 4;
}

// Operand lists for accumulators of 4 to 64 registers: MLA_R reads and writes, MLA_W only writes.
#define MLA_R4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MLA_R8(d, i) MLA_R4(d, i), MLA_R4(d, i + 4)
#define MLA_R16(d, i) MLA_R8(d, i), MLA_R8(d, i + 8)
#define MLA_R32(d, i) MLA_R16(d, i), MLA_R16(d, i + 16)
#define MLA_R64(d, i) MLA_R32(d, i), MLA_R32(d, i + 32)
#define MLA_N4 "%0,%1,%2,%3"
#define MLA_N8 MLA_N4 ",%4,%5,%6,%7"
#define MLA_N16 MLA_N8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MLA_N32 MLA_N16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MLA_N64                                                        \
    MLA_N32                                                            \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MLA_W4(d, i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3])
#define MLA_W8(d, i) MLA_W4(d, i), MLA_W4(d, i + 4)
#define MLA_W16(d, i) MLA_W8(d, i), MLA_W8(d, i + 8)
#define MLA_W32(d, i) MLA_W16(d, i), MLA_W16(d, i + 16)
#define MLA_W64(d, i) MLA_W32(d, i), MLA_W32(d, i + 32)
#define MLA_WGMMA(columns, count, a, b, layout, access, add)              \
    asm volatile(                                                         \
        "{\n.reg .pred add;\n.reg .b64 a, b;\n"                           \
        "mov.b64 a, {%" a ", %" layout "};\nmov.b64 b, {%" b ", %" layout \
        "};\n"                                                            \
        "setp.ne.b32 add, " add                                           \
        ", 0;\n"                                                          \
        "wgmma.mma_async.sync.aligned.m64n" #columns                      \
        "k32.f32.e4m3.e4m3 "                                              \
        "{" MLA_N##count "}, a, b, add, 1, 1;\n}"                         \
        : MLA_##access##count(d, 0)                                       \
        : "r"(keys), "r"(heads), "n"(operand_layout<kRowBytes>()))
#define MLA_WGMMAS(access, add)                                                       \
    if constexpr (kRegisters == 4) MLA_WGMMA(8, 4, "4", "5", "6", access, add);       \
    if constexpr (kRegisters == 8) MLA_WGMMA(16, 8, "8", "9", "10", access, add);     \
    if constexpr (kRegisters == 16) MLA_WGMMA(32, 16, "16", "17", "18", access, add); \
    if constexpr (kRegisters == 32) MLA_WGMMA(64, 32, "32", "33", "34", access, add); \
    if constexpr (kRegisters == 64) MLA_WGMMA(128, 64, "64", "65", "66", access, add)

// d[64 keys, columns] = keys[64, 32] * heads[columns, 32]^T, E4M3 in shared memory, float32 sums.
// Lane l of warp w holds rows 16 w + l / 4 (+ 8 i) and columns 8 j + 2 (l % 4) + e in d[4 j + 2 i +
// e].
template <int kRowBytes, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], uint32 keys, uint32 heads) {
    static_assert(kRegisters == 4 || kRegisters == 8 || kRegisters == 16 || kRegisters == 32 ||
                      kRegisters == 64,
                  "8, 16, 32, 64 or 128 columns");
    MLA_WGMMAS(W, "0");
}

// d += the same product.
template <int kRowBytes, int kRegisters>
__device__ __forceinline__ void wgmma_add(float (&d)[kRegisters], uint32 keys, uint32 heads) {
    MLA_WGMMAS(R, "1");
}

// Waits until at most `pending` committed groups are unfinished. The accumulator is an operand so
// that the compiler moves no read of it before the wait.
#define MLA_WAIT(count)                                       \
    asm volatile("wgmma.wait_group.sync.aligned %" #count ";" \
                 : MLA_R##count(d, 0)                         \
                 : "n"(pending)                               \
                 : "memory")
template <int pending, int kRegisters>
__device__ __forceinline__ void wgmma_wait(float (&d)[kRegisters]) {
    if constexpr (kRegisters == 4) MLA_WAIT(4);
    if constexpr (kRegisters == 8) MLA_WAIT(8);
    if constexpr (kRegisters == 16) MLA_WAIT(16);
    if constexpr (kRegisters == 32) MLA_WAIT(32);
    if constexpr (kRegisters == 64) MLA_WAIT(64);
}
