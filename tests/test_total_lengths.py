"""``k_total_lengths``: lengths that count the new tokens give what the others give, bit for bit."""

import numpy as np
import pytest
from generators import Case, Spec
from properties import (
    POISON,
    assert_exact_topk,
    assert_helpful,
    assert_well_formed,
    host,
    same_bits,
)

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, index_topk
from mla_fp8._check.problem import Inputs
from mla_fp8._plan.kernel import Device
from mla_fp8._plan.topk import plan_topk
from mla_fp8._plan.tuning import Tuning
from mla_fp8.cli import oracle

ROUTES = {
    "decode": Spec((1, 2, 0, 4), (700, 30, 5, 1300), num_heads=64, k=64),
    "prefill": Spec((150, 0, 3, 70), (400, 70, 0, 5), num_heads=16, depth=64, k=64),
    "portable": Spec((3, 0, 2, 4), (40, 70, 3, 17), num_heads=4, kv_heads=2, depth=256, k=20),
}
SPLIT = {  # by the mode of the plan, with the default tuning
    "windows": Spec((3000, 3, 0, 1200), (1000, 2900, 5, 0), num_heads=8, depth=64, k=300),
    "parts": Spec((300, 3, 0), (170_000, 5, 9), num_heads=8, depth=64, k=300),
}
OPTIONS = [{"sort": "position", "return_scores": False}, {"sort": "score", "return_scores": True}]


def _totals(case: Case) -> np.ndarray:
    new = np.diff(case.input_row_offsets.astype(np.int64))
    return (case.k_cache_lengths + new).astype(case.k_cache_lengths.dtype)


def _both(case: Case, xp):
    """The arguments with each kind of lengths, and the totals."""
    here = case.to(xp)
    return here.args, here.replace(k_cache_lengths=None).args, xp.asarray(_totals(case))


def _check_same(case: Case, xp) -> None:
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    cached, bare, totals = _both(case, xp)
    for options in OPTIONS:
        want = op(*cached, **options)
        size = op.scratch_bytes(*bare, k_total_lengths=totals, **options)
        assert size == op.scratch_bytes(*cached, **options)
        memory = op.workspace(*bare, k_total_lengths=totals, **options)
        for more in ({}, {"check": True, "workspace": memory}):
            found = op(*bare, k_total_lengths=totals, **options, **more)
            pairs = zip(found, want, strict=True) if options["return_scores"] else [(found, want)]
            assert all(same_bits(a, b) for a, b in pairs), (options, list(more))


@pytest.mark.parametrize("index_dtype", ["uint32", "int32"])
@pytest.mark.parametrize("mask", ["causal", "null"])
@pytest.mark.parametrize("route", ROUTES)
def test_same_bits(route, mask, index_dtype, xp):
    case = Spec(**{**vars(ROUTES[route]), "mask": mask, "index_dtype": index_dtype}).build()
    _check_same(case, xp)
    cached, bare, totals = _both(case, xp)
    options = {"mask": mask}
    want = index_scores(*cached, **options)
    assert same_bits(index_scores(*bare, k_total_lengths=totals, **options), want)
    want = index_topk(*cached, k=7, **options)
    assert same_bits(index_topk(*bare, k_total_lengths=totals, k=7, **options), want)


@pytest.mark.parametrize("mode", SPLIT)
def test_work_is_split_as_named(mode):
    case = SPLIT[mode].build()
    shape = MLAIndexerRaggedFloat8Paged(**case.params)._problem(Inputs(*case.args), False).shape
    h200 = Device("sm_90a", 132, shared_bytes=227 << 10)
    assert plan_topk(shape, case.spec.k, False, False, h200, Tuning()).mode.value == mode


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["causal", "null"])
@pytest.mark.parametrize("mode", SPLIT)
def test_same_bits_however_the_work_is_split(mode, mask, cupy):
    _check_same(Spec(**{**vars(SPLIT[mode]), "mask": mask}).build(), cupy)


def _random(rng, shape, plausible: int, dtype) -> np.ndarray:
    garbage = rng.integers(0, 2**32, shape, np.uint32)
    small = rng.integers(0, plausible, shape, np.uint32)
    return np.where(rng.random(shape) < 0.6, small, garbage).astype(dtype)


@pytest.mark.parametrize("seed", range(16))
def test_unchecked_totals_gain_no_key(seed, xp):
    """Totals below the new tokens, below zero, past the table: clamped after the subtraction."""
    rng = np.random.default_rng(seed)
    dtype, mask = (np.uint32, np.int32)[seed % 2], ("causal", "null")[seed // 2 % 2]
    spec = ROUTES["prefill" if seed // 4 % 2 else "portable"]
    case = Spec(**{**vars(spec), "mask": mask, "seed": seed}).build()
    case = case.replace(k_scales=np.nan_to_num(case.k_scales, nan=0.5))
    if seed >= 8:
        case = case.replace(input_row_offsets=_random(rng, 5, case.tokens, dtype))
    totals = _random(rng, 4, 250, dtype)
    offsets = np.clip(case.input_row_offsets.astype(np.int64), 0, case.tokens)
    new = np.diff(np.maximum.accumulate(offsets))
    want = oracle.evaluate(case.replace(k_cache_lengths=totals.astype(np.int64) - new))
    bare, given = case.to(xp).replace(k_cache_lengths=None).args, xp.asarray(totals)
    options = {"k_total_lengths": given, "check": False}
    dense = index_scores(*bare, mask=mask, **options)
    np.testing.assert_array_equal(np.isneginf(host(dense)), ~want.selectable)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    indices = op(*bare, **options)
    assert_well_formed(indices, want.selectable, spec.k)
    assert_exact_topk(indices, dense, want.selectable)


@pytest.mark.parametrize("mask", ["causal", "null"])
def test_a_total_below_the_new_tokens(mask, xp):
    """The last token sees as many keys as the total says, those before it one less each."""
    case = Spec((5, 1), (0, 20), num_heads=8, mask=mask, k=5).build()
    bare = case.to(xp).replace(k_cache_lengths=None).args
    totals = xp.asarray(np.array([3, 21], np.uint32))
    options = {"mask": mask, "k_total_lengths": totals}
    rows = host(index_topk(*bare, k=5, check=False, **options))
    seen = [0, 0, 1, 2, 3] if mask == "causal" else [3] * 5
    assert [(row >= 0).sum() for row in rows[:5]] == seen
    with pytest.raises(ValueError, match="k_total_lengths must be at least the 5 new tokens; got"):
        index_topk(*bare, k=5, check=True, **options)


@pytest.mark.gpu
def test_a_graph_reads_totals_anew(cupy):
    case = ROUTES["decode"].build()
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    cached, bare, totals = _both(case, cupy)
    out = op(*bare, k_total_lengths=totals)
    memory = op.workspace(*bare, k_total_lengths=totals)
    rng = np.random.default_rng(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        op(*bare, k_total_lengths=totals, out=out, workspace=memory)
        graph = stream.end_capture()
        for _ in range(30):
            new = rng.permutation([1, 2, 0, 4])
            lengths = rng.integers(0, case.k_cache_lengths + 1)
            offsets = np.concatenate([[0], new.cumsum()])
            cached[2][...] = cupy.asarray(offsets.astype(np.uint32))
            cached[4][...] = cupy.asarray(lengths.astype(np.uint32))
            totals[...] = cupy.asarray((lengths + new).astype(np.uint32))
            out[...] = POISON
            graph.launch(stream)
            assert same_bits(out, op(*cached))


WRONG = {
    "both": ("k_cache_lengths|k_total_lengths", TypeError, lambda t: t, "both"),
    "neither": ("k_cache_lengths", TypeError, lambda t: None, "None"),
    "a list": ("k_total_lengths", TypeError, lambda t: [3, 4], "list"),
    "int64": ("k_total_lengths", ValueError, lambda t: t.astype(np.int64), "int64"),
    "of a smaller batch": ("k_total_lengths|input_row_offsets", ValueError, lambda t: t[:1], ""),
    "beyond the table": ("k_total_lengths", ValueError, lambda t: t + np.uint32(10), ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_totals_are_named(name, xp):
    names, exception, change, came = WRONG[name]
    case = Spec((2, 1), (5, 9), num_heads=4, page_size=8, k=6).build()
    case = case.replace(k_max_lengths=np.array([[9, 99]], np.uint32))
    cached, bare, totals = _both(case, xp)
    out = xp.full((case.tokens, 6), POISON, np.int32)
    with pytest.raises(exception) as caught:
        index_topk(
            *(cached if name == "both" else bare),
            k=6,
            k_total_lengths=change(totals),
            out=out,
            check=True,
        )
    assert_helpful(caught.value, names, came)
    assert (host(out) == POISON).all()


def test_output_over_totals(xp):
    case = Spec((2, 1), (5, 9), num_heads=4, k=1).build()
    _, bare, totals = _both(case, xp)
    room = xp.zeros(4, np.uint32)
    room[1:3] = totals
    out = room[:3].view(np.int32).reshape(3, 1)
    with pytest.raises(ValueError, match="out must not overlap k_total_lengths"):
        index_topk(*bare, k=1, k_total_lengths=room[1:3], out=out)
