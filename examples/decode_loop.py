"""Prefill and decode as a server does it: the cache grows, each call says where to attend.

Every sequence has a topic that some of its keys are about. The queries ask for it, and in each step
the table says how many of the keys about it are among the K selected ones.

python examples/decode_loop.py
"""

import time

import numpy as np
from rich.console import Console
from rich.table import Table

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8

try:
    import cupy

    xp = cupy if cupy.is_available() else np
except ImportError:
    xp = np
to_numpy = getattr(xp, "asnumpy", np.asarray)

HEADS, DEPTH, K = 16, 128, 16
PROMPTS, STEPS = (900, 70, 350), 12  # lengths of the prompts; tokens to generate
EVERY = 4  # in decode, each fourth token is about the topic again
rng = np.random.default_rng(0)
topics = rng.standard_normal((len(PROMPTS), DEPTH), np.float32)


def about(topic, *shape):
    """Random vectors [*shape, DEPTH] that lean towards ``topic``."""
    return (topic + rng.standard_normal((*shape, DEPTH), np.float32)).astype(np.float32)


def select(queries, out=None):
    """The K best keys of each new token, for float queries [tokens, HEADS, DEPTH]."""
    q, q_scales = fp8.quantize(xp.asarray(queries))
    qs = q_scales[..., 0] * np.float32(1 / HEADS)
    return op(q, qs, cache.input_row_offsets, *cache.view(), out=out)


op = MLAIndexerRaggedFloat8Paged(num_heads=HEADS, depth=DEPTH, k=K)  # once, for all calls

# Prefill: the whole prompts are new tokens, and one call serves them all.
prompts, planted = [], []
for topic, length in zip(topics, PROMPTS, strict=True):
    prompt = rng.standard_normal((length, DEPTH), np.float32)
    places = rng.choice(length, size=5, replace=False)
    prompt[places] = about(topic, 5)
    prompts.append(prompt)
    planted.append({int(place) for place in places})
asked = [about(topic, n, HEADS) for topic, n in zip(topics, PROMPTS, strict=True)]
start = time.perf_counter()
cache = PagedKeyCache.from_dense([xp.asarray(prompt) for prompt in prompts], page_size=64)
rows = to_numpy(select(np.concatenate(asked)))
seconds = time.perf_counter() - start
console = Console()
console.print(f"{xp.__name__}: prefill of {len(rows)} tokens in {seconds:.3f} s")

# Decode: one new token per sequence and step, always into the same output array.
table = Table("step", "tokens cached", "about the topic: found", "ms")
out = xp.empty((len(PROMPTS), K), np.int32)
for step in range(1, STEPS + 1):
    on_topic = step % EVERY == 0
    new = [about(topic * on_topic, 1) for topic in topics]
    for places, length in zip(planted, cache.lengths, strict=True):
        if on_topic:
            places.add(int(length))
    queries = about(topics[:, None], len(PROMPTS), HEADS)
    start = time.perf_counter()
    cache.append([xp.asarray(keys) for keys in new])
    indices = to_numpy(select(queries, out=out))  # reading the result waits for the GPU
    ms = 1e3 * (time.perf_counter() - start)  # a GPU's first step also compiles the kernels
    hits = [len(places & set(row)) for places, row in zip(planted, indices.tolist(), strict=True)]
    found = ", ".join(f"{n} of {len(places)}" for n, places in zip(hits, planted, strict=True))
    table.add_row(str(step), str(cache.lengths.sum()), found, f"{ms:.1f}")
    assert hits == [len(places) for places in planted], found
console.print(table)
