"""CuPy: a decode step captured in a CUDA graph, replayed while the cache's lengths change.

It needs a GPU, and says so without one.

python examples/from_cupy.py
"""

import sys

import numpy as np

try:
    import cupy

    missing = "" if cupy.is_available() else "CuPy finds no GPU"
except ImportError as error:
    missing = str(error)
if missing:
    print(f"this example needs a GPU and CuPy: {missing}")
    sys.exit(0)

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8

HEADS, DEPTH, K, BATCH, MOST = 64, 128, 64, 4, 1000
stream = cupy.cuda.Stream(non_blocking=True)
stream.use()  # from here on, all work is on this stream; the default stream cannot be captured
rng = cupy.random.default_rng(0)

# A pool with room for MOST keys a sequence; the arrays stay where they are.
cache = PagedKeyCache.from_dense([rng.standard_normal((MOST, DEPTH), "f4") for _ in range(BATCH)])
blocks, _, table, _, scales, layer = cache.view()
offsets = cupy.arange(BATCH + 1, dtype=np.int32)  # one new token a sequence
lengths = cupy.array([10, 700, 300, 0], np.int32)  # tokens cached before; a graph reads them anew
bounds = np.array([[1, MOST - 1]], np.int32)  # on the host: the most they will ever be

q, q_scales = fp8.quantize(rng.standard_normal((BATCH, HEADS, DEPTH), "f4"))
qs = q_scales[..., 0] * np.float32(DEPTH**-0.5)
inputs = q, qs, offsets, blocks, lengths, table, bounds, scales, layer

# With a workspace and an output a call allocates nothing. The first call compiles the kernels.
op = MLAIndexerRaggedFloat8Paged(num_heads=HEADS, depth=DEPTH, k=K)
out, workspace = cupy.empty((BATCH, K), np.int32), op.workspace(*inputs)
op(*inputs, out=out, workspace=workspace)

stream.begin_capture()
op(*inputs, out=out, workspace=workspace)
graph = stream.end_capture()

for step in range(3):
    graph.launch()
    lengths += 1  # the next step finds one more token in the cache
    found = (out >= 0).sum(axis=1)
    print(f"step {step}: selected {found.get()} of {lengths.get()} keys")

# The last step again, without the graph.
lengths -= 1
assert (op(*inputs) == out).all()
print("the graph gave what a plain call gives")
