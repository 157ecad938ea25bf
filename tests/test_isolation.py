"""No sequence sees another's keys: its results keep their bits, whatever all other memory holds."""

import dataclasses
from itertools import product

import numpy as np
import pytest
from generators import NAN_CODES, Spec
from properties import host, same_bits, sanitized
from routes import WAYS, longer
from test_scratch import H200
from test_shards import shard
from test_strided_pools import placed

from mla_fp8 import MLAIndexerRaggedFloat8Paged

LARGEST = 0x7E  # the code of 448
MOST = np.finfo(np.float32).max
# What stands in keys and scales that the sequence does not hold.
FOREIGN = {"largest scores": (LARGEST, MOST), "NaN": (NAN_CODES[0], np.nan)}
LAYOUTS = ["permuted pages", "shared pages", "strided pools", "pooled keys", "shard"]
SMALL = [  # for compute-sanitizer
    ("portable", "shard"),
    ("decode", "pooled keys"),
    ("prefill", "shared pages"),
    ("prefill, windows", "strided pools"),
]


def _options(layout: str) -> dict:
    return {"key_start": 1, "key_step": 3} if layout == "shard" else {}


def _case(spec: Spec, layout: str):
    """The batch in a layout. All queries and gates are positive: the largest key scores best.

    If a row of the cache stands for several tokens, sequences are longer, so that rows are not
    fewer.
    """
    times = {"pooled keys": 4, "shard": 3}.get(layout, 1)
    changes = {"shared pages": {"shared": True}, "pooled keys": {"kpool": 4}}.get(layout, {})
    case = dataclasses.replace(longer(spec, times), num_layers=2, layer=1, **changes).build()
    q = (case.q.view(np.uint8) & 0x7F).view(case.q.dtype)
    case = case.replace(q=q, qs=np.abs(case.qs) + 0.5)
    if layout != "shard":
        return case
    return shard(case, 1, 3, max(map(sum, zip(spec.seq_lens, spec.cache_lens, strict=True))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WAYS)
def test_each_way_is_taken(name, layout):
    """On an H200, by the plans. So the tests below meet every way there."""
    way = WAYS[name]
    plan = way.plan(H200, _case(way.spec, layout), **_options(layout))
    assert (plan.scoring.route, plan.mode) == (way.route, way.mode)
    split = plan.scoring.split
    assert (split.part_keys < split.keys) == (name == "prefill, parts")


def _rows(case, b: int, layout: str) -> int:
    """The rows that the cache holds of a sequence."""
    rows = (case.spec.seq_lens[b] + case.spec.cache_lens[b]) // case.spec.kpool
    return len(range(1, rows, 3)) if layout == "shard" else rows


def _with_foreign(case, b: int, layout: str, code: int, scale: float):
    """The case with this key in every place that does not hold a row of sequence ``b``."""
    row, page_size = np.arange(_rows(case, b, layout)), case.spec.page_size
    page = case.k_lookup_table[b, row // page_size].astype(np.int64)
    held = page, 0, case.layer_idx, row % page_size
    keys, scales = np.full_like(case.k_blocks.view(np.uint8), code), case.k_scales.copy()
    scales[...] = scale
    keys[held], scales[held] = case.k_blocks.view(np.uint8)[held], case.k_scales[held]
    return case.replace(k_blocks=keys.view(case.k_blocks.dtype), k_scales=scales)


def _to(case, xp, layout: str):
    """The case on a backend; strided pools have garbage between pages that scores 1e16."""
    here = case.to(xp)
    if layout != "strided pools":
        return here
    return here.replace(
        k_blocks=placed(xp, case.k_blocks, gap=16, layer_gap=32),
        k_scales=placed(xp, case.k_scales, gap=4, layer_gap=8),
    )


def _answers(op, here, layout: str) -> list:
    """Every kind of result; the first axis of each is that of tokens."""
    options = {"check": False, **_options(layout)}  # foreign scales are no scales at all
    both = op(*here.args, output="both", return_scores=True, **options)
    by_score = op(*here.args, sort="score", return_scores=True, **options)
    return [host(a) for a in (op(*here.args, **options), *both, *by_score)] + [
        host(op.scores(*here.args, **options))
    ]


@pytest.mark.parametrize(("name", "layout"), sanitized(product(WAYS, LAYOUTS), SMALL))
def test_foreign_keys_change_no_bit(name, layout, xp, monkeypatch):
    """Other sequences' pages, free pages, page ends, other layers, and bytes between pages."""
    way = WAYS[name]
    way.use(xp, monkeypatch)
    case = _case(way.spec, layout)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    want, offsets = _answers(op, _to(case, xp, layout), layout), case.input_row_offsets
    for b in np.flatnonzero(np.diff(offsets.astype(int)))[:3]:
        mine = np.s_[int(offsets[b]) : int(offsets[b + 1])]
        for what, (code, scale) in FOREIGN.items():
            foreign = _with_foreign(case, b, layout, code, scale)
            found = _answers(op, _to(foreign, xp, layout), layout)
            for ours, theirs in zip(found, want, strict=True):
                assert same_bits(ours[mine], theirs[mine]), f"sequence {b}, {what}"
            others = np.delete(found[-1], mine, axis=0)
            assert not same_bits(others, np.delete(want[-1], mine, axis=0)), "nothing was foreign"
            assert what == "NaN" or np.isposinf(others).any(), "not the largest scores"
