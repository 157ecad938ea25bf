"""Which cached keys should each new token attend to? On the GPU if CuPy finds one, else in NumPy.

python examples/quickstart.py
"""

import numpy as np

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8

try:
    import cupy

    xp = cupy if cupy.is_available() else np
except ImportError:
    xp = np
to_numpy = getattr(xp, "asnumpy", np.asarray)

HEADS, DEPTH, K = 16, 64, 4
rng = np.random.default_rng(0)

# Two sequences of different lengths are in the cache; one gets a new token, the other three.
old_keys = [rng.standard_normal((n, DEPTH), np.float32) for n in (1000, 300)]
new_keys = [rng.standard_normal((n, DEPTH), np.float32) for n in (1, 3)]
cache = PagedKeyCache.from_dense([xp.asarray(keys) for keys in old_keys], page_size=64)
cache.append([xp.asarray(keys) for keys in new_keys])

# The four new tokens' queries. A head's query scale, weight and softmax scale make up its gate.
q, q_scales = fp8.quantize(xp.asarray(rng.standard_normal((4, HEADS, DEPTH), np.float32)))
head_weights = xp.asarray(rng.random((4, HEADS), np.float32))
qs = q_scales[..., 0] * head_weights * np.float32(DEPTH**-0.5)

op = MLAIndexerRaggedFloat8Paged(num_heads=HEADS, depth=DEPTH, k=K)
found = op(q, qs, cache.input_row_offsets, *cache.view(), sort="score", return_scores=True)
indices, scores = (to_numpy(array) for array in found)
print(f"top {K} keys of each new token, best first, by {xp.__name__}:")
for token, sequence in enumerate((0, 1, 1, 1)):
    pairs = zip(indices[token], scores[token], strict=True)
    print(f"token {token}, sequence {sequence}:", "  ".join(f"{i} ({s:.2f})" for i, s in pairs))

# The last token by hand: it sees all keys of its sequence, its own included.
keys = np.concatenate([old_keys[1], new_keys[1]])
keys = fp8.dequantize(*fp8.quantize(keys))  # what the cache holds
dots = to_numpy(fp8.decode(q[3])) @ keys.T  # [HEADS, 303]
by_hand = to_numpy(qs[3]) @ np.maximum(dots, 0)
print(f"token 3 by hand: key {by_hand.argmax()} ({by_hand.max():.2f})")
assert by_hand.argmax() == indices[3, 0]
