"""JAX arrays in, JAX arrays out, on the device where they are.

JAX's arrays cannot be written to, so results are always new ones. The call is not traceable: it
stands between jitted functions, not inside one.

python examples/from_jax.py
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take the whole GPU

import importlib.util

import jax
import jax.numpy as jnp

from mla_fp8 import fp8, index_topk

# The kernels need CuPy beside JAX. Without it, JAX's CPU arrays run through NumPy.
has_cupy = importlib.util.find_spec("cupy") is not None
device = jax.devices()[0] if has_cupy else jax.devices("cpu")[0]
HEADS, DEPTH, PAGE, K = 8, 128, 64, 8

with jax.default_device(device):
    key, query, gate = jax.random.split(jax.random.key(0), 3)

    # One sequence of 250 tokens in four pages, which lie in the cache in another order.
    tokens, blocks = 250, jnp.array([[2, 0, 3, 1]], jnp.int32)
    dense = jax.random.normal(key, (tokens, DEPTH))
    codes, scales = fp8.quantize(dense)  # float8_e4m3fn and float32, both of JAX
    pad = (0, 4 * PAGE - tokens), (0, 0)
    codes = jnp.pad(codes.view(jnp.uint8), pad).reshape(4, PAGE, DEPTH)
    scales = jnp.pad(scales, pad).reshape(4, PAGE, 1)
    place = jnp.argsort(blocks[0])  # block b holds page place[b]
    k_blocks = codes[place].reshape(4, 1, 1, PAGE, 1, DEPTH)
    k_scales = scales[place].reshape(4, 1, 1, PAGE, 1, 1)

    # The last two tokens are new: their queries, and a gate for each head.
    q, q_scales = fp8.quantize(jax.random.normal(query, (2, HEADS, DEPTH)))
    qs = q_scales[..., 0] * jax.random.uniform(gate, (2, HEADS)) * DEPTH**-0.5

    indices, values = index_topk(
        q,
        qs,
        jnp.array([0, 2], jnp.int32),  # where each sequence's new tokens begin
        k_blocks,
        jnp.array([tokens - 2], jnp.int32),  # tokens cached before
        blocks,
        jnp.array([[2, tokens - 2]], jnp.int32),  # the most new and cached tokens
        k_scales,
        0,
        k=K,
        sort="score",
        return_scores=True,
    )
print("positions, best first:", type(indices).__name__, indices.devices())
print(indices)


# The same in JAX, jitted. The last token sees all keys, the one before it all but the last.
@jax.jit
def by_jax(q, qs, keys):
    dots = jnp.einsum("thd,sd->ths", q, keys, precision="highest")
    scores = jnp.einsum("th,ths->ts", qs, jax.nn.relu(dots), precision="highest")
    seen = jnp.arange(tokens) <= jnp.array([[tokens - 2], [tokens - 1]])
    return jax.lax.top_k(jnp.where(seen, scores, -jnp.inf), K)


expected, _ = by_jax(fp8.decode(q), qs, fp8.dequantize(*fp8.quantize(dense)))
assert jnp.allclose(values, expected, rtol=1e-3)
print(f"jitted JAX agrees on {device.platform}")
