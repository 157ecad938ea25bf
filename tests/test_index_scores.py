"""The dense scores: their extent, their edges, and their tie to the indices."""

import dataclasses

import numpy as np
import pytest
from generators import Spec
from properties import assert_helpful, guarded, host, same_bits

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, index_topk, select_topk
from mla_fp8.cli import oracle

SPEC = Spec(seq_lens=(3, 0, 2), cache_lens=(100, 7, 20), page_size=16, spare_pages=2)


@pytest.mark.parametrize(
    ("slack", "columns"),
    [((0, 0), 103), ((5, 10), 118), ((0, 1000), 9 * 16)],
    ids=["true maxima", "slack", "more than the table holds"],
)
def test_width_follows_the_smaller_bound(slack, columns, xp):
    case = dataclasses.replace(SPEC, slack=slack).build()
    dense = index_scores(*case.to(xp).args)
    assert isinstance(dense, xp.ndarray)
    assert dense.shape == (5, columns)
    assert oracle.max_keys(case) == columns, "the oracle is of the same opinion"


@pytest.mark.gpu
def test_width_is_the_table_with_lengths_on_the_device(cupy):
    here = SPEC.build().to(cupy, device_max_lengths=True)
    assert index_scores(*here.args).shape == (5, 9 * 16)


@pytest.mark.parametrize("mask", ["causal", "null"])
def test_unseen_keys_are_minus_infinity_and_only_they(mask, xp):
    dense = host(index_scores(*SPEC.build().to(xp).args, mask=mask))
    seen = np.isfinite(dense).sum(axis=1)
    assert seen.tolist() == ([101, 102, 103, 21, 22] if mask == "causal" else [103] * 3 + [22] * 2)
    assert np.isneginf(dense[~np.isfinite(dense)]).all()
    assert (np.diff(np.isfinite(dense).astype(int), axis=1) <= 0).all(), "a hole in the row"


def test_masks_agree_on_what_both_see(xp):
    here = SPEC.build().to(xp)
    causal, null = (host(index_scores(*here.args, mask=mask)) for mask in ("causal", "null"))
    both = np.isfinite(causal)
    assert same_bits(causal[both], null[both])


@pytest.mark.parametrize("k", [1, 4096])
@pytest.mark.parametrize("mask", ["causal", "null"])
def test_the_operator_gives_the_same(mask, k, xp):
    """Whatever its k, with either kind of lengths, into an array of the caller's or a new one."""
    here = dataclasses.replace(SPEC, num_heads=16).build().to(xp)
    op = MLAIndexerRaggedFloat8Paged(num_heads=16, k=k, mask=mask)
    want = index_scores(*here.args, mask=mask)
    assert same_bits(op.scores(*here.args), want)
    out, intact = guarded(xp, want.shape, np.float32)
    totals = xp.asarray(np.array([103, 7, 22], np.uint32))
    bare = here.replace(k_cache_lengths=None).args
    assert op.scores(*bare, k_total_lengths=totals, out=out, check=True) is out
    intact()
    assert same_bits(out, want)


def test_the_operator_refuses_queries_of_another_shape(xp):
    here = SPEC.build().to(xp)
    op = MLAIndexerRaggedFloat8Paged(num_heads=16, k=5)
    with pytest.raises(ValueError, match=r"^q must be .*num_heads = 16") as caught:
        op.scores(*here.args)
    assert_helpful(caught.value, "q", "8")
    with pytest.raises(ValueError, match=r"^out must be float32 \[.*max_keys = 103\]"):
        index_scores(*here.args, out=xp.zeros((5, 104), np.float32))


@pytest.mark.sanitize
def test_out_is_filled_returned_and_guarded(xp):
    here = SPEC.build().to(xp)
    out, intact = guarded(xp, (5, 103), np.float32)
    assert index_scores(*here.args, out=out) is out
    intact()
    assert same_bits(out, index_scores(*here.args))


def test_selecting_on_the_dense_scores_is_the_indexer(xp):
    """Three public functions, one answer (causal rows without holes: a length says it all)."""
    here = SPEC.build().to(xp)
    lengths = xp.asarray(np.array([101, 102, 103, 21, 22], np.uint32))
    for sort in ("position", "score"):
        pairs = zip(
            select_topk(index_scores(*here.args), lengths, 64, sort=sort, return_scores=True),
            index_topk(*here.args, k=64, sort=sort, return_scores=True),
            strict=True,
        )
        assert all(same_bits(a, b) for a, b in pairs)


@pytest.mark.parametrize("spec", [Spec((), ()), Spec((0, 0), (5, 0)), Spec((), (), spare_pages=2)])
def test_no_tokens_no_rows(spec, xp):
    case = spec.build()
    assert index_scores(*case.to(xp).args).shape == (0, oracle.max_keys(case))


def test_scores_by_hand(xp):
    """score[0] = 2 * (3 * max(0, 1.5) + -1 * max(0, 8)) for two heads, one channel each."""
    case = Spec((1,), (1,), num_heads=2, depth=32, page_size=2, k=2).build()
    slot = int(case.k_lookup_table[0, 0])
    q, keys = (x.view(np.uint8).copy() for x in (case.q, case.k_blocks))
    q[...] = 0
    q[0, 0, 3] = 0x3C  # 1.5
    q[0, 1, 4] = 0x50  # 8.0
    keys[slot] = 0
    keys[slot, 0, 0, 0, 0, [3, 4]] = 0x38  # key 0: (1, 1)
    keys[slot, 0, 0, 1, 0, [3, 4]] = 0x38, 0xB8  # key 1: (1, -1)
    scales = case.k_scales.copy()
    scales[slot, 0, 0, :, 0, 0] = 2.0, 0.5
    case = case.replace(
        q=q.view(case.q.dtype),
        qs=np.array([[3, -1]], np.float32),
        k_blocks=keys.view(case.q.dtype),
        k_scales=scales,
    )
    assert host(index_scores(*case.to(xp).args)).tolist() == [[2 * (4.5 - 8), 0.5 * 4.5]]
