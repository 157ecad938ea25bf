"""The operation as a whole: every shape of the parameter table, against the float64 oracle."""

import dataclasses

import numpy as np
import pytest
from generators import Spec
from properties import check_case, guarded, host, same_bits

from mla_fp8 import Mask, MLAIndexerRaggedFloat8Paged, index_topk
from mla_fp8.cli import oracle

RAGGED = Spec(seq_lens=(5, 0, 1, 9), cache_lens=(0, 40, 31, 300), page_size=64)


def _vary(**fields) -> Spec:
    return dataclasses.replace(RAGGED, **fields)


SMALL = {  # these also run under compute-sanitizer
    "ragged": RAGGED,
    "granules": _vary(granularity=32, mask="null"),
    "odd heads": _vary(num_heads=3, depth=64, page_size=7),
    "long rows": _vary(seq_lens=(2, 1), cache_lens=(900, 5000), num_heads=2, depth=32, k=2048),
}
CASES = {
    "null mask": _vary(mask="null"),
    "several layers": _vary(num_layers=3, layer=2),
    "first of layers": _vary(num_layers=2, layer=0, mask="null"),
    "page size 1": _vary(page_size=1),
    "page size 48": _vary(page_size=48),
    "page size 128": _vary(page_size=128),
    "page beyond all": _vary(page_size=1000),
    "shared pages": _vary(seq_lens=(3, 4, 2), cache_lens=(200, 200, 131), shared=True),
    "spare pages": _vary(spare_pages=5, mask="null"),
    "slack": _vary(slack=(100, 1000)),
    "int32 and uint8": _vary(index_dtype="int32", fp8_dtype="uint8"),
    "empty batch": Spec(seq_lens=(), cache_lens=()),
    "empty batch, wide table": Spec(seq_lens=(), cache_lens=(), spare_pages=3),
    "no tokens": Spec(seq_lens=(0, 0), cache_lens=(5, 0)),
    "one key": Spec(seq_lens=(1,), cache_lens=(0,)),
    "empty ends": Spec(seq_lens=(0, 2, 0), cache_lens=(0, 7, 9)),
    "k = 1": _vary(k=1),
    "k far above the row": _vary(k=5000),
    "k = 65536": Spec(seq_lens=(1, 2), cache_lens=(3, 1), k=65536),
    **{f"n around k = {k}": Spec((1, 1, 1, 3), (k - 2, k - 1, k, k - 2), k=k) for k in (2, 64)},
    **{f"{h} heads": _vary(num_heads=h) for h in (1, 12, 16, 32, 64, 100, 128)},
    **{f"{h} heads, depth 64": _vary(num_heads=h, depth=64, mask="null") for h in (5, 64)},
    **{f"depth {d}": _vary(depth=d, num_heads=16) for d in (32, 64, 256)},
    "depth 256, granules of 64": _vary(depth=256, granularity=64),
    "depth 256, granules of 128": _vary(depth=256, granularity=128, num_heads=12),
    "depth 64, granules of 32": _vary(depth=64, granularity=32, values="wide"),
    "granularity above depth": _vary(granularity=1000),
    "two kv heads": _vary(kv_heads=2),
    "a kv head per head": _vary(num_heads=6, kv_heads=6, mask="null"),
    "kv heads and granules": _vary(kv_heads=4, granularity=64, page_size=16),
    "prefill": Spec((40, 70), (0, 60), num_heads=16, page_size=16),
    "decode": Spec((1,) * 9, (1, 63, 64, 65, 127, 128, 129, 500, 0), num_heads=32),
    **{f"values {v}": _vary(values=v) for v in ("wide", "zero_rows", "equal", "negative_zero")},
    **{f"values {v}": _vary(values=v, mask="null") for v in ("nan_codes", "special_gates")},
    "plateau over k": Spec((2, 3), (4000, 9), num_heads=2, depth=32, k=2048, values="plateau"),
    "plateau of gates": Spec((2,), (3000,), num_heads=5, depth=64, values="negative_gates"),
    "NaN codes in granules": _vary(values="nan_codes", granularity=32),
    "special gates, kv heads": _vary(values="special_gates", kv_heads=2),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.sanitize
def test_against_the_oracle_small(name, xp):
    check_case(SMALL[name].build(), xp)


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name, xp):
    check_case(CASES[name].build(), xp)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged", "long rows"])
def test_maximum_lengths_on_the_device(name, cupy):
    """Not read there: the extents follow from the shapes alone."""
    case = SMALL[name].build()
    case = case.replace(k_max_lengths=np.zeros((1, 2), np.uint32))  # wrong, were it read
    check_case(case, cupy, device_max_lengths=True)


def test_every_key_when_k_covers_the_row(xp):
    """Strict completeness: with k >= n(t) the row is 0 .. n(t) - 1, whatever the scores are."""
    case = Spec((4, 1), (60, 127), k=128, values="nan_codes").build()
    rows = host(MLAIndexerRaggedFloat8Paged(**case.params)(*case.to(xp).args))
    for row, n in zip(rows, [61, 62, 63, 64, 128], strict=True):
        np.testing.assert_array_equal(row[:n], np.arange(n))
        assert (row[n:] == -1).all()


def test_causal_tokens_do_not_see_the_future(xp):
    """Later keys that would win every row must not be chosen by earlier tokens."""
    case = Spec((8,), (0,), num_heads=1, k=1, page_size=8).build()
    slot = int(case.k_lookup_table[0, 0])
    keys, scales = case.k_blocks.copy(), case.k_scales.copy()
    keys.view(np.uint8)[slot] = 0x38  # 1.0
    scales[slot, 0, 0, :, 0, 0] = np.arange(1, 9)  # the later, the better
    q = np.full_like(case.q.view(np.uint8), 0x38).view(case.q.dtype)
    case = case.replace(q=q, qs=np.ones_like(case.qs), k_blocks=keys, k_scales=scales)
    for mask, best in (("causal", np.arange(8)), ("null", np.full(8, 7))):
        rows = index_topk(*case.to(xp).args, k=1, mask=mask)
        np.testing.assert_array_equal(host(rows)[:, 0], best)


@pytest.mark.sanitize
def test_execute_fills_the_output_and_nothing_else(xp):
    case = RAGGED.build()
    here, op = case.to(xp), MLAIndexerRaggedFloat8Paged(**case.params)
    out, intact = guarded(xp, (case.tokens, case.spec.k), np.int32)
    assert op.execute(out, *here.args) is None
    intact()
    assert same_bits(out, op(*here.args))


@pytest.mark.parametrize("sort", ["position", "score"])
@pytest.mark.parametrize("k", [64, 2048, 5000])
def test_out_is_filled_returned_and_guarded(sort, k, xp):
    case = dataclasses.replace(RAGGED, k=k).build()
    here, op = case.to(xp), MLAIndexerRaggedFloat8Paged(**case.params)
    indices, intact = guarded(xp, (case.tokens, k), np.int32)
    assert op(*here.args, sort=sort, out=indices) is indices
    intact()
    assert same_bits(indices, op(*here.args, sort=sort))

    both = [guarded(xp, (case.tokens, k), dtype) for dtype in (np.int32, np.float32)]
    out = (both[0][0], both[1][0])
    given = op(*here.args, sort=sort, out=out, return_scores=True)
    assert given[0] is out[0]
    assert given[1] is out[1]
    for _, intact in both:
        intact()
    for ours, fresh in zip(out, op(*here.args, sort=sort, return_scores=True), strict=True):
        assert same_bits(ours, fresh)


def test_inputs_are_not_modified(xp):
    case = RAGGED.build()
    here = case.to(xp)
    MLAIndexerRaggedFloat8Paged(**case.params)(*here.args, return_scores=True)
    fresh = RAGGED.build().to(xp)  # built again: NumPy's `to` copies nothing
    for before, after in zip(fresh.args, here.args, strict=True):
        assert same_bits(before, after)


def test_results_are_of_the_inputs_library(xp):
    case = RAGGED.build()
    for array in index_topk(*case.to(xp).args, k=7, return_scores=True):
        assert isinstance(array, xp.ndarray)
        assert array.shape == (case.tokens, 7)


@pytest.mark.parametrize("spec", [RAGGED, _vary(granularity=32, num_heads=4)])
def test_index_topk_infers_the_parameters(spec, xp):
    here = spec.build().to(xp)
    op = MLAIndexerRaggedFloat8Paged(**spec.build().params)
    for options in ({}, {"sort": "score"}, {"check": False}):
        assert same_bits(index_topk(*here.args, k=spec.k, **options), op(*here.args, **options))
    assert not same_bits(index_topk(*here.args, k=spec.k, mask="null"), op(*here.args))


@pytest.mark.parametrize("layer", [1, np.uint32(1), np.int64(1), np.array(1, np.uint32)])
def test_layer_index_forms(layer, xp):
    case = _vary(num_layers=2, layer=1).build()
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    assert same_bits(op(*case.replace(layer_idx=layer).to(xp).args), op(*case.to(xp).args))


def test_parameters_make_a_value():
    default = MLAIndexerRaggedFloat8Paged()
    same = MLAIndexerRaggedFloat8Paged(128, 128, 2048, 128, Mask.CAUSAL)
    assert default == same
    assert hash(default) == hash(same)
    assert default != MLAIndexerRaggedFloat8Paged(k=7)
    for word in ("num_heads=128", "depth=128", "k=2048", "quantization_granularity=128", "CAUSAL"):
        assert word.lower() in repr(default).lower()
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.k = 7


@pytest.mark.parametrize("text", ["null", "NULL", "causal", "CAUSAL"])
def test_mask_names(text):
    mask = MLAIndexerRaggedFloat8Paged(mask=text).mask
    assert mask is Mask[text.upper()]
    assert MLAIndexerRaggedFloat8Paged(mask=mask).mask is mask


def test_the_oracle_knows_the_order():
    """The oracle is judge elsewhere; here it is judged by hand."""
    scores = np.array([0.0, 2.0, np.nan, -0.0, 2.0, -np.inf, np.inf, 9.0], np.float32)
    seen = np.array([True] * 7 + [False])
    assert oracle.best_first(scores, seen).tolist() == [6, 1, 4, 0, 3, 5, 2]
    assert oracle.expected_topk(scores, seen, 3).tolist() == [1, 4, 6]
    assert oracle.expected_topk(scores, seen, 8, "score")[-2:].tolist() == [2, -1]
