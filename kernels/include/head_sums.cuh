// Sums of gated products over heads, from the accumulators of m64nNk32 products of keys and heads.
//
// The four lanes of a quad hold columns 8 j + 2 lane + e of the same two rows (keys). Which head of
// which token goes to which column is our choice. With four tokens or more, each lane gets all
// heads of its own tokens and sums them alone. With two tokens, two lanes share a token; with one
// token, all four do (kSharing).
//
// Invariant: a token's heads are added by the same tree, however many tokens there are. The heads
// are pairs (2 p, 2 p + 1). Chain p % 4 adds its pairs in ascending order, and the sum is
// (chain 0 + chain 1) + (chain 2 + chain 3). With 128 heads a chain adds alternately to two parts,
// because 32 dependent additions would take too long.
#pragma once
#include "common.cuh"

template <int heads, int tokens, int registers>
struct HeadSums {
    static_assert(heads % 8 == 0, "each of the four chains adds at least one pair of heads");
    static constexpr int kColumns = tokens * heads;
    // Lanes of a quad that share a token.
    static constexpr int kSharing = tokens >= 4 ? 1 : 4 / tokens;
    static constexpr int kQuadTokens = 4 / kSharing;      // from a token of a lane to its next
    static constexpr int kRows = kSharing == 1 ? 2 : 1;   // whose sums a lane gets, 8 apart
    static constexpr int kChains = 4 / kSharing;          // per lane and token
    static constexpr int kSplits = heads == 128 ? 2 : 1;  // parts of a chain
    static constexpr int kPairs = heads / 2 / kSharing;   // per lane and token
    static constexpr int kAccPairs = registers / 4;       // per lane, in one accumulator
    static constexpr int kParts = kChains * kSplits;      // per lane and token, added to in turns

    // The column to which a head of a token goes.
    static __device__ constexpr int column_of(int token, int head) {
        const int pair = head / 2, chain = pair % 4 % kChains, sharer = pair % 4 / kChains;
        const int part = chain * kSplits + pair / 4 % kSplits, step = pair / 4 / kSplits;
        const int lane = token % kQuadTokens * kSharing + sharer;
        return 8 * (token / kQuadTokens * kPairs + step * kParts + part) + 2 * lane + head % 2;
    }

    float gates[kColumns / 4];  // of the lane's columns, 2 per pair
    float parts[2][kParts];     // partial sums of two rows

    // The first row whose sums the lane gets: lanes that share a token get one row each.
    static __device__ __forceinline__ int first_row() {
        return kSharing > 1 ? threadIdx.x % 2 * 8 : 0;
    }
    // Whether the lane writes its sums. Of four lanes that share a token, two have the same sums as
    // the others.
    static __device__ __forceinline__ bool writes() { return kSharing < 4 || threadIdx.x % 4 < 2; }

    // Loads the lane's gates from gates [tokens, heads] in shared memory.
    __device__ __forceinline__ void load_gates(const float* shared) {
        const int lane = threadIdx.x % 4;
        shared += lane / kSharing * heads + lane % kSharing * kChains * 2;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
            const int i = j % kPairs, chain = i % kParts / kSplits;
            const int row = i / kParts * kSplits + i % kSplits;
            const float* token = shared + j / kPairs * kQuadTokens * heads;
            const float2 two = *reinterpret_cast<const float2*>(token + 8 * row + 2 * chain);
            gates[2 * j] = two.x;
            gates[2 * j + 1] = two.y;
            // Else ptxas keeps more loads in flight than there are registers for.
            if (j % 8 == 7) __syncwarp();
        }
    }

    // Adds the products of one half of the columns. Calls write(i, row, sum) for each complete sum:
    // the i-th token of the lane, and row 0 or 1 of those that the lane gets.
    template <class Write>
    __device__ __forceinline__ void add(const float (&acc)[registers], int half,
                                        const Write& write) {
#pragma unroll
        for (int j = 0; j < kAccPairs; ++j) {
            const int own = half * kAccPairs + j, i = own % kPairs;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    float& part = parts[row][i % kParts];
                    // fmaxf(NaN, 0) is 0, as the contract wants it.
                    const float product = fmaxf(acc[4 * j + 2 * row + e], 0.0f);
                    part = fmaf(gates[2 * own + e], product, i < kParts && e == 0 ? 0.0f : part);
                }
            }
            if (i + 1 == kPairs) {
                float sums[2];
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const float (&p)[kParts] = parts[row];
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
