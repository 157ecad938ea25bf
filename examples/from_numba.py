"""Numba: a kernel written in Python makes the queries, and another one uses the positions.

It needs a GPU, and says so without one.

python examples/from_numba.py
"""

import sys

import numpy as np

try:
    import cupy  # noqa: F401  the kernels of mla_fp8 are launched by CuPy
    from numba import cuda

    missing = "" if cuda.is_available() else "Numba finds no GPU"
except ImportError as error:
    missing = str(error)
if missing:
    print(f"this example needs a GPU, Numba and CuPy: {missing}")
    sys.exit(0)

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8

HEADS, DEPTH, K, LENGTH = 16, 128, 8, 500
rng = np.random.default_rng(0)


@cuda.jit
def scale(x, factor):
    """Multiply in place: stands for whatever a Numba kernel does before the call."""
    i = cuda.grid(1)
    if i < x.size:
        x[i] *= factor


@cuda.jit
def gather(values, indices, sums):
    """Add up the values of each token's selected keys."""
    token = cuda.grid(1)
    if token < indices.shape[0]:
        for place in range(indices.shape[1]):
            if indices[token, place] >= 0:  # -1: fewer than K keys
                sums[token] += values[indices[token, place]]


# Device arrays of Numba are taken by every function, and results are device arrays of Numba.
keys = rng.standard_normal((LENGTH, DEPTH), np.float32)
cache = PagedKeyCache.from_dense([cuda.to_device(keys[:-1])])
cache.append([cuda.to_device(keys[-1:])])
queries = rng.standard_normal((1, HEADS, DEPTH), np.float32)
on_device = cuda.to_device(queries.ravel())
scale[queries.size // 128, 128](on_device, np.float32(2))
q, q_scales = fp8.quantize(on_device.reshape(queries.shape))
qs = q_scales.reshape(1, HEADS)
print("queries:", type(q).__name__, q.shape, q.dtype)

op = MLAIndexerRaggedFloat8Paged(num_heads=HEADS, depth=DEPTH, k=K)
indices = op(q, qs, cache.input_row_offsets, *cache.view())
print("positions:", type(indices).__name__, indices.copy_to_host())

values = rng.standard_normal(LENGTH, np.float32)
sums = cuda.to_device(np.zeros(1, np.float32))
gather[1, 32](cuda.to_device(values), indices, sums)

# The same in NumPy.
q8, k8 = fp8.quantize(2 * queries), fp8.dequantize(*fp8.quantize(keys))
dots = np.maximum(fp8.decode(q8[0])[0] @ k8.T, 0)
best = np.sort(np.argsort(-(q8[1][0, :, 0] @ dots), kind="stable")[:K])
np.testing.assert_allclose(sums.copy_to_host()[0], values[best].sum(), rtol=1e-4)
print("NumPy agrees")
