"""torch tensors in, torch tensors out: select keys, then gather values at the selected positions.

On the GPU if torch and CuPy find one, else on the CPU.

python examples/from_torch.py
"""

import importlib.util

import torch

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8

# The kernels need CuPy beside torch. Without it, CPU tensors run through NumPy.
on_gpu = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
device = "cuda" if on_gpu else "cpu"
HEADS, DEPTH, K = 16, 128, 8
torch.manual_seed(0)

# Two sequences with 1000 and 300 cached tokens. Each gets one new token, so this is a decode step.
lengths = [1000, 300]
keys = [torch.randn(n + 1, DEPTH, device=device) for n in lengths]
cache = PagedKeyCache.from_dense([key[:-1] for key in keys])
cache.append([key[-1:] for key in keys])

# FP8 tensors of torch. A head's gate is its query scale, its weight and the softmax scale together.
queries = torch.randn(2, HEADS, DEPTH, device=device)
q, q_scales = fp8.quantize(queries)
qs = q_scales[..., 0] * torch.rand(2, HEADS, device=device) * DEPTH**-0.5
print("queries:", tuple(q.shape), q.dtype, q.device)

# The call runs on torch's current stream and does not wait for it. The result is a tensor.
op = MLAIndexerRaggedFloat8Paged(num_heads=HEADS, depth=DEPTH, k=K)
indices, scores = op(q, qs, cache.input_row_offsets, *cache.view(), return_scores=True)
print("positions:", tuple(indices.shape), indices.dtype, indices.device)
print(indices.cpu())

# What torch computes from the same FP8 numbers: formula, then torch.topk.
for sequence, key in enumerate(keys):
    k8 = fp8.dequantize(*fp8.quantize(key))  # what the cache holds
    dots = fp8.decode(q[sequence]) @ k8.T  # [HEADS, tokens]
    by_torch = qs[sequence] @ dots.relu()  # [tokens]
    best = by_torch.topk(K)
    found = scores[sequence].sort(descending=True).values
    # Hopper's FP8 tensor cores keep about 14 bits while they add.
    torch.testing.assert_close(found, best.values, rtol=1e-3, atol=1e-2)
    # An attention layer gathers at the positions: here, values of the selected tokens.
    values = torch.randn(len(key), 64, device=device)
    gathered = values[indices[sequence].long()]  # [K, 64]
    assert gathered.shape == (K, 64)
print(f"torch's own formula and torch.topk agree on {device}")
