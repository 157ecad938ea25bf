"""The seed's own answers: indices that MAX 26.7 gave on an H200 (golden/README in shared)."""

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
from generators import FP8, Case, Spec
from properties import SCORE_ERROR, assert_set_close, assert_well_formed

from mla_fp8 import MLAIndexerRaggedFloat8Paged
from mla_fp8.cli import oracle

FOLDER = Path(__file__).with_name("golden")
GOLDEN = json.loads((FOLDER / "cases.json").read_text())


def _raw(seed: int, count: int) -> np.ndarray:
    return np.random.PCG64(seed).random_raw(count)


def _codes(seed: int, shape: tuple[int, ...], wide: bool) -> np.ndarray:
    count = prod(shape)
    codes = _raw(seed, -(-count // 8)).astype("<u8").view(np.uint8)[:count].reshape(shape)
    if not wide:
        codes = codes & 0xBF
    return np.where((codes & 0x7F) == 0x7F, 0, codes).astype(np.uint8).view(FP8)


def _unit(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    raw = _raw(seed, prod(shape)) >> np.uint64(40)
    return (raw / 2**24).astype(np.float32).reshape(shape)


def _build(g: dict) -> Case:
    """Arrays from a case's numbers, as golden/README.md says."""
    seed, lens, cached = g["seed"], np.array(g["seq_lens"]), np.array(g["cache_lens"])
    total, batch, page, depth = lens.sum(), len(lens), g["page_size"], g["depth"]
    pages = -(-(lens + cached).max() // page)
    blocks = batch * pages + 3
    slots = (blocks, 1, g["num_layers"], page, 1)
    order = np.argsort(_raw(seed + 5, blocks), kind="stable")
    return Case(
        spec=Spec(
            seq_lens=tuple(lens),
            cache_lens=tuple(cached),
            **{name: g[name] for name in ("num_heads", "depth", "k", "page_size", "num_layers")},
            granularity=128,
            layer=g["layer_idx"],
            mask=g["mask"],
        ),
        q=_codes(seed + 1, (total, g["num_heads"], depth), g["wide"]),
        qs=_unit(seed + 3, (total, g["num_heads"])) - np.float32(0.25),
        input_row_offsets=np.concatenate([[0], lens.cumsum()]).astype(np.uint32),
        k_blocks=_codes(seed + 2, (*slots, depth), g["wide"]),
        k_cache_lengths=cached.astype(np.uint32),
        k_lookup_table=order[: batch * pages].astype(np.uint32).reshape(batch, pages),
        k_max_lengths=np.array([[lens.max(), cached.max()]], np.uint32),
        k_scales=_unit(seed + 4, (*slots, 1)) + np.float32(2**-10),
        layer_idx=g["layer_idx"],
    )


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: g["name"])
def test_max_agrees_with_the_oracle(golden):
    """No swap at any boundary, says golden/README.md: so the oracle can stand for MAX below."""
    case = _build(golden)
    want = oracle.evaluate(case)
    with np.load(FOLDER / "indices.npz") as recorded:
        theirs = recorded[golden["name"]]
    assert ((theirs >= 0).sum(axis=1) == np.minimum(case.spec.k, want.counts)).all()
    assert_set_close(theirs, want, np.abs(want.scores), error=0)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: g["name"])
def test_same_sets_as_max(golden, xp):
    case = _build(golden)
    want = oracle.evaluate(case)
    magnitude = oracle.evaluate(case, absolute=True).scores
    got = MLAIndexerRaggedFloat8Paged(**case.params)(*case.to(xp).args)
    assert_well_formed(got, want.selectable, case.spec.k)
    assert_set_close(got, want, magnitude, SCORE_ERROR[xp.__name__])
