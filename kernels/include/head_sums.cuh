// Sums of gated products over heads, from the accumulators of m64nNk32 products of keys and heads.
//
// The four lanes of a quad hold columns 8 j + 2 lane + e of the same two rows, and which head of which token
// is a column is for us to choose. With four tokens or more, each lane gets all heads of its own tokens and
// needs no other's sums; with two tokens two lanes share one, with one token all four (kSharing).
//
// Invariant: whatever the tokens, a token's sum is the same tree. Heads are pairs (2 p, 2 p + 1); chain p % 4
// adds its pairs in ascending order (alternately to two parts where there are 128 heads, for 32 dependent
// additions are too long a wait), and the sum is (chain 0 + chain 1) + (chain 2 + chain 3).
#pragma once
#include "common.cuh"

template <int heads, int tokens, int registers>
struct HeadSums {
    static constexpr int kColumns = tokens * heads;
    static constexpr int kSharing = tokens >= 4 ? 1 : 4 / tokens;  // lanes of a quad that share a token
    static constexpr int kQuadTokens = 4 / kSharing;               // a lane's tokens are so far apart
    static constexpr int kRows = kSharing == 1 ? 2 : 1;            // that a lane has the sums of, 8 apart
    static constexpr int kChains = 4 / kSharing;                   // of a lane and token
    static constexpr int kSplits = heads == 128 ? 2 : 1;           // of a chain
    static constexpr int kPairs = heads / 2 / kSharing;            // of a lane and token
    static constexpr int kAccPairs = registers / 4;                // of a lane, in one accumulator
    static constexpr int kParts = kChains * kSplits;               // added to in turns

    static __device__ constexpr int column_of(int token, int head) {
        const int pair = head / 2, chain = pair % 4 % kChains, sharer = pair % 4 / kChains;
        const int part = chain * kSplits + pair / 4 % kSplits, step = pair / 4 / kSplits;
        const int lane = token % kQuadTokens * kSharing + sharer;
        return 8 * (token / kQuadTokens * kPairs + step * kParts + part) + 2 * lane + head % 2;
    }

    float gates[kColumns / 4];  // of the lane's columns
    float parts[2][kParts];     // of the sums of two rows

    // The place of a lane's first row, where lanes that share a token keep one row each.
    static __device__ __forceinline__ int first_row() { return kSharing > 1 ? threadIdx.x % 2 * 8 : 0; }
    // Whether the lane's sums are not another's.
    static __device__ __forceinline__ bool writes() { return kSharing < 4 || threadIdx.x % 4 < 2; }

    // From gates [tokens, heads] in shared memory.
    __device__ __forceinline__ void load_gates(const float* shared) {
        const int lane = threadIdx.x % 4;
        shared += lane / kSharing * heads + lane % kSharing * kChains * 2;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
            const int i = j % kPairs, chain = i % kParts / kSplits, row = i / kParts * kSplits + i % kSplits;
            const float* token = shared + j / kPairs * kQuadTokens * heads;
            const float2 two = *reinterpret_cast<const float2*>(token + 8 * row + 2 * chain);
            gates[2 * j] = two.x;
            gates[2 * j + 1] = two.y;
            if (j % 8 == 7) __syncwarp();  // or ptxas has more in flight than there are registers
        }
    }

    // Adds the products of accumulator `half` of the columns; calls write(place of the token among the lane's,
    // row, sum) for each sum that is complete.
    template <class Write>
    __device__ __forceinline__ void add(const float (&acc)[registers], int half, const Write& write) {
#pragma unroll
        for (int j = 0; j < kAccPairs; ++j) {
            const int own = half * kAccPairs + j, i = own % kPairs;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    float& part = parts[row][i % kParts];
                    const float product = fmaxf(acc[4 * j + 2 * row + e], 0.0f);  // fmaxf(NaN, 0) is 0
                    part = fmaf(gates[2 * own + e], product, i < kParts && e == 0 ? 0.0f : part);
                }
            }
            if (i + 1 == kPairs) {
                float sums[2];
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const float(&p)[kParts] = parts[row];
                    sums[row] = p[0];
                    if constexpr (kParts == 2) sums[row] += p[1];
                    if constexpr (kParts == 4) sums[row] = (p[0] + p[1]) + (p[2] + p[3]);
                }
                if constexpr (kSharing == 1) {
                    write(own / kPairs, 0, sums[0]);
                    write(own / kPairs, 1, sums[1]);
                } else {
                    const bool odd = threadIdx.x & 1;
                    float sum = odd ? sums[1] : sums[0];
                    sum += __shfl_xor_sync(kFullWarp, odd ? sums[0] : sums[1], 1);
                    if (kSharing == 4) sum += __shfl_xor_sync(kFullWarp, sum, 2);
                    write(own / kPairs, 0, sum);
                }
            }
        }
    }
};
