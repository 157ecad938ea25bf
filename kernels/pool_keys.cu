// out[j, c] = (x[p j, c] + x[p j + 1, c] + ... + x[p j + p - 1, c]) / p, or with weights
// out[j, c] = weights[p j, c] * x[p j, c] + ... + weights[p j + p - 1, c] * x[p j + p - 1, c]
//
// in float32, from left to right, each step rounded, as in NumPy. One thread per number of out.
#include "common.cuh"
#include "floats.cuh"

struct Params {
    const void* x;         // [tokens, width]
    const float* weights;  // [tokens, width], or null
    float* out;            // [tokens / pool, width]
    int64 numbers;         // of out
    uint32 width;          // channels of all key heads of a token
    uint32 pool;           // tokens of a pool
};

extern "C" __global__ void __launch_bounds__(kThreads) pool_keys(const __grid_constant__ Params p) {
    const int64 i = int64(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= p.numbers) return;
    const int64 row = i / p.width;
    const int64 first = row * p.pool * p.width + (i - row * p.width);
    float sum = 0;
    for (uint32 token = 0; token < p.pool; ++token) {
        const int64 at = first + int64(token) * p.width;
        float x = number_at(p.x, at);
        if (p.weights) x = __fmul_rn(__ldg(p.weights + at), x);
        sum = token ? __fadd_rn(sum, x) : x;
    }
    p.out[i] = p.weights ? sum : __fdiv_rn(sum, float(p.pool));
}
