"""``kpool``: one cached row for several tokens; and calls without gates, and few heads."""

import dataclasses

import numpy as np
import pytest
from generators import Spec
from properties import check_case, host, message_of, same_bits, sanitized

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, index_topk
from mla_fp8.cli import oracle

SPECS = {
    "ragged": Spec((3, 0, 1, 20), (170, 9, 0, 230), num_heads=16, kpool=4),
    "no whole pool": Spec((1, 2, 3), (0, 1, 0), num_heads=64, kpool=4),
    "null mask": Spec((3, 4), (170, 9), num_heads=64, kpool=4, mask="null"),
    "kpool 3": Spec((7, 1), (100, 31), num_heads=16, kpool=3, page_size=16),
    "kpool 64": Spec((130, 1), (1000, 6300), num_heads=64, kpool=64, page_size=8),
    "prefill": Spec((400, 70), (0, 37), num_heads=16, kpool=2, page_size=16),
    "prefill, 64 heads": Spec((100,), (501,), num_heads=64, kpool=4),
    "decode": Spec((1,) * 9, (1, 3, 4, 255, 256, 257, 1023, 2000, 0), num_heads=32, kpool=4),
    "speculative": Spec((2, 3, 4), (1022, 3, 509), num_heads=64, kpool=4),
    "granules": Spec((3, 4), (170, 100), num_heads=12, kpool=4, granularity=32),
    "totals past the pages": Spec((3, 4), (170, 100), num_heads=64, kpool=4, slack=(0, 1000)),
    "ties": Spec((3, 66), (4000, 900), num_heads=16, kpool=2, page_size=16, values="zero_rows"),
}


@pytest.mark.parametrize("name", sanitized(SPECS, ["ragged", "speculative", "granules"]))
def test_against_the_oracle(name, xp):
    check_case(SPECS[name].build(), xp)


@pytest.mark.parametrize("name", ["ragged", "decode", "prefill", "speculative"])
def test_a_row_is_visible_once_its_last_token_is(name, xp):
    """Beyond what a token sees there may be anything, and k covers the row."""
    case = dataclasses.replace(SPECS[name], k=512).build()
    rows = host(MLAIndexerRaggedFloat8Paged(**case.params)(*case.to(xp).args))
    token = 0
    for new, cached in zip(case.spec.seq_lens, case.spec.cache_lens, strict=True):
        for i in range(new):
            n = (cached + i + 1) // case.spec.kpool
            assert rows[token, :n].tolist() == list(range(n))
            assert (rows[token, n:] == -1).all()
            token += 1


@pytest.mark.parametrize("mask", ["causal", "null"])
def test_totals_count_tokens(mask, xp):
    case = dataclasses.replace(SPECS["ragged"], mask=mask).build()
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp)
    totals = case.k_cache_lengths + np.diff(case.input_row_offsets).astype(np.uint32)
    there = here.replace(k_cache_lengths=None)
    found = op(*there.args, k_total_lengths=xp.asarray(totals), return_scores=True)
    for ours, theirs in zip(found, op(*here.args, return_scores=True), strict=True):
        assert same_bits(ours, theirs)


def test_kpool_is_a_small_integer():
    for kpool, error in ((0, ValueError), (65, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="kpool must be an integer from 1 to 64"):
            MLAIndexerRaggedFloat8Paged(kpool=kpool)
    case = SPECS["ragged"].build()
    text = message_of(lambda: index_topk(*case.args, k=3, kpool="4"))
    assert text.startswith("kpool must be an integer")


def test_rows_must_fit_the_table():
    case = SPECS["kpool 3"].build()
    lengths = case.k_cache_lengths.copy()
    lengths[0] += 300
    case = case.replace(
        k_cache_lengths=lengths, k_max_lengths=np.array([[7, lengths[0]]], np.uint32)
    )
    text = message_of(lambda: MLAIndexerRaggedFloat8Paged(**case.params)(*case.args))
    assert "fit pages_per_seq * page_size = 48 rows of 3 tokens; got 400 cached" in text


GATES = {
    "decode": Spec((1, 2), (300, 65), num_heads=32),
    "prefill": Spec((90, 3), (70, 0), num_heads=16, page_size=16),
    "portable": Spec((9, 3), (70, 0), num_heads=12, depth=32),
    "one head": Spec((2, 30), (300, 65), num_heads=1),
}


@pytest.mark.parametrize("name", sanitized(GATES, ["prefill", "portable"]))
def test_without_gates_each_is_1(name, xp):
    case = GATES[name].build()
    check_case(case.replace(qs=None), xp)
    here = case.to(xp)
    ones = xp.ones(case.qs.shape, np.float32)
    for sort in ("position", "score"):
        options = {"k": 64, "sort": sort, "return_scores": True}
        found = index_topk(*here.replace(qs=None).args, **options)
        for ours, theirs in zip(
            found, index_topk(*here.replace(qs=ones).args, **options), strict=True
        ):
            assert same_bits(ours, theirs)


@pytest.mark.parametrize("values", ["nan_codes", "special_gates"])
@pytest.mark.parametrize("heads", [2, 3, 7, 48, 127])
def test_any_number_of_heads(heads, values, xp):
    for lens in (((1, 2), (300, 65)), ((40, 1), (10, 129))):
        check_case(Spec(*lens, num_heads=heads, values=values).build(), xp)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "depth"), [(3, 128), (48, 128), (1, 64), (12, 64)])
def test_padded_heads_have_the_bits_of_heads_with_gate_zero(heads, depth, hopper_gpu):
    columns = max(8, 1 << (heads - 1).bit_length())
    for lens in (((1, 2), (300, 65)), ((70, 1), (10, 129))):
        case = Spec(*lens, num_heads=columns, depth=depth, values="wide").build()
        case.qs[:, heads:] = 0
        full = case.to(hopper_gpu)
        some = full.replace(q=full.q[:, :heads].copy(), qs=full.qs[:, :heads].copy())
        assert same_bits(index_scores(*some.args), index_scores(*full.args))


def test_the_oracle_counts_pools():
    case = Spec((5,), (6,), num_heads=1, depth=32, kpool=4).build()
    assert oracle.evaluate(case).counts.tolist() == [1, 2, 2, 2, 2]
