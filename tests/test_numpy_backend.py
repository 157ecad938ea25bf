"""The NumPy backend's promises about bits and memory: neither depends on how work is cut up."""

import dataclasses
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from generators import Spec
from properties import same_bits

from mla_fp8 import index_scores, index_topk, select_topk
from mla_fp8._reference import operation
from mla_fp8.fp8 import decode

TESTS = Path(__file__).parent
# Sequences whose lengths are no multiple of anything, one of them without new tokens.
SPEC = Spec(seq_lens=(13, 1, 0, 6), cache_lens=(1, 1500, 5, 700), k=90)
VARIANTS = {
    "64 heads": {"num_heads": 64, "values": "wide"},
    "three key heads": {"num_heads": 6, "kv_heads": 3, "values": "wide"},
    "seven heads, NaN codes": {"num_heads": 7, "values": "nan_codes"},
    "granules of 32": {"num_heads": 10, "kv_heads": 2, "granularity": 32, "values": "wide"},
    "granules, NaN codes": {"num_heads": 4, "granularity": 64, "values": "nan_codes"},
    "infinite and NaN gates": {"num_heads": 5, "values": "special_gates"},
    "negative gates": {"num_heads": 8, "values": "negative_gates", "mask": "null"},
    "zeros of both signs": {"num_heads": 3, "kv_heads": 3, "values": "negative_zero"},
    "one head": {"num_heads": 1, "depth": 256, "page_size": 7, "values": "wide"},
}
# Bytes of dot products, fewest and most keys of a block, bytes of a chunk, scores looked through.
CUTS = {
    "a pair at a time": (1, 1, 1, 1, 1),
    "odd blocks": (8 * 64 * 37, 5, 37, 40_000, 3000),
    "all at once": (1 << 40, 1, 1 << 40, 1 << 40, 1 << 40),
}


def _cut(monkeypatch, name):
    names = "_DOTS_BYTES", "_FEWEST_KEYS", "_MOST_KEYS", "_CHUNK_BYTES", "_SELECTED_SCORES"
    for attribute, value in zip(names, CUTS[name], strict=True):
        monkeypatch.setattr(operation, attribute, value)


def _with_hole(case):
    """Page 1 of the first long sequence names no block: its keys can't be selected."""
    table = case.k_lookup_table.copy()
    table[1, 1] = np.iinfo(table.dtype).max
    return case.replace(k_lookup_table=table)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_do_not_depend_on_blocks(variant, cut, monkeypatch):
    spec = dataclasses.replace(SPEC, **VARIANTS[variant])
    if cut == "a pair at a time":
        spec = dataclasses.replace(spec, cache_lens=(1, 150, 5, 70))
    case = _with_hole(spec.build())
    options = {"mask": spec.mask, "check": False}

    def answers():
        dense = index_scores(*case.args, **options)
        whole = index_topk(*case.args, k=spec.k, sort="score", return_scores=True, **options)
        return dense, *whole, select_topk(dense, None, spec.k)

    before = answers()
    _cut(monkeypatch, cut)
    assert all(same_bits(a, b) for a, b in zip(before, answers(), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_do_not_depend_on_the_batch(variant):
    """Each token by itself, on just the keys that it sees, has the scores it has in the batch."""
    spec = dataclasses.replace(SPEC, **VARIANTS[variant])
    case = _with_hole(spec.build())
    dense = index_scores(*case.args, mask=spec.mask, check=False)
    causal = spec.mask == "causal"
    for b, i in ((0, 0), (0, 1), (0, 12), (1, 0), (3, 0), (3, 5)):
        alone = case.chunk(b, i, i + 1)
        row = index_scores(*alone.args, mask=spec.mask, check=False)[0]
        n = spec.cache_lens[b] + i + 1
        token = int(case.input_row_offsets[b]) + i
        assert same_bits(row[:n], dense[token, :n]), (b, i)
        assert not causal or np.isneginf(dense[token, n:]).all()


DIGEST = """
import dataclasses, hashlib, sys
from generators import Spec
from mla_fp8 import index_scores
from test_numpy_backend import SPEC, VARIANTS
for name in VARIANTS:
    spec = dataclasses.replace(SPEC, **VARIANTS[name])
    scores = index_scores(*spec.build().args, mask=spec.mask)
    print(name, hashlib.sha256(scores.tobytes()).hexdigest())
"""


def test_bits_do_not_depend_on_threads_of_blas():
    def digests(threads: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ
            | dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), str(threads))
            | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    one = digests(1)
    assert len(one.splitlines()) == len(VARIANTS)
    assert digests(2) == digests(3) == one


def _plain(case, k):
    """One sequence's top-k as a batched formula has it, all dot products at once in float32."""
    tokens, heads, depth = case.q.shape
    n = sum(case.spec.seq_lens + case.spec.cache_lens)
    keys = decode(case.k_blocks[case.k_lookup_table[0], 0, 0].reshape(-1, depth)[:n])
    scales = case.k_scales[case.k_lookup_table[0], 0, 0].reshape(-1)[:n]
    dots = (decode(case.q).reshape(-1, depth) @ keys.T).reshape(tokens, heads, n)
    np.maximum(dots, 0, out=dots)
    scores = np.matmul(case.qs[:, None], dots)[:, 0] * scales
    scores[np.arange(n) > np.arange(n - tokens, n)[:, None]] = -np.inf
    return np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)


def _peak(call) -> int:
    """Bytes allocated beyond what there was before, at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("tokens", "keys"), [(1, 8192), (1, 65_536), (64, 8192), (900, 64)], ids=str
)
def test_memory_is_that_of_blocks(tokens, keys):
    """At most 1.3 times the batched formula's, and bounded however large the problem is."""
    case = Spec((tokens,), (max(keys - tokens, 0),), num_heads=64, k=64).build()
    peak = _peak(lambda: index_topk(*case.args, k=64))
    assert peak < 1.3 * _peak(lambda: _plain(case, 64))
    assert peak < 2 * operation._CHUNK_BYTES + 4 * operation._DOTS_BYTES


def test_memory_of_a_selection_is_that_of_some_rows():
    scores = np.random.default_rng(0).standard_normal((500, 20_000), np.float32)
    peak = _peak(lambda: select_topk(scores, None, 64, sort="score", return_scores=True))
    assert peak < scores.nbytes / 4
