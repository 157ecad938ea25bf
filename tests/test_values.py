"""Values that the spec calls wrong: refused where they are looked at, harmless where not."""

import dataclasses

import numpy as np
import pytest
from generators import Case, Spec
from properties import POISON, assert_helpful, check_case, host, sanitized

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, index_topk

# Two sequences of 7 and 10 keys on pages of 8; the table has room for 16 each.
SPEC = Spec(seq_lens=(2, 1), cache_lens=(5, 9), num_heads=4, page_size=8, k=6, index_dtype="int32")
U, I = np.uint32, np.int32  # noqa: E741


def _page(number, dtype):
    def change(case: Case) -> Case:
        table = case.k_lookup_table.astype(dtype)
        table[1, 1] = number
        return case.replace(k_lookup_table=table)

    return change


def _scale(value):
    def change(case: Case) -> Case:
        scales = case.k_scales.copy()
        scales[int(case.k_lookup_table[1, 1]), 0, 0, 1] = value  # position 9, the last one
        return case.replace(k_scales=scales)

    return change


def _with(**arrays):
    return lambda case: case.replace(**{n: np.array(*v) for n, v in arrays.items()})


def _offsets(*values, dtype=U):
    return _with(input_row_offsets=(values, dtype))


def _lengths(*values, dtype=U, bounds=(2, 9)):
    return _with(k_cache_lengths=(values, dtype), k_max_lengths=([bounds], np.uint32))


WRONG = {  # names that the message may use, and the change
    "offsets start late": ("input_row_offsets", _offsets(1, 2, 3)),
    "offsets start below zero": ("input_row_offsets", _offsets(-1, 2, 3, dtype=I)),
    "offsets run backwards": ("input_row_offsets", _offsets(0, 4, 3)),
    "offsets run below zero": ("input_row_offsets", _offsets(0, -1, 3, dtype=I)),
    "offsets end early": ("input_row_offsets", _offsets(0, 1, 2)),
    "offsets end late": ("input_row_offsets", _offsets(0, 2, 4)),
    "a length beyond the table": ("k_cache_lengths", _lengths(5, 16, bounds=(2, 16))),
    "a length that overflows": ("k_cache_lengths", _lengths(5, 2**32 - 1, bounds=(2, 2**32 - 1))),
    "a negative length": ("k_cache_lengths", _lengths(5, -1, dtype=I)),
    "more cached than maximum": ("k_cache_lengths|k_max_lengths", _lengths(5, 9, bounds=(2, 8))),
    "more new than maximum": ("input_row_offsets|k_max_lengths", _lengths(5, 9, bounds=(1, 9))),
    "a page one past": ("k_lookup_table", _page(6, U)),
    "a page far past": ("k_lookup_table", _page(2**32 - 1, U)),
    "a negative page": ("k_lookup_table", _page(-1, I)),
    "a NaN scale": ("k_scales", _scale(np.nan)),
    "an infinite scale": ("k_scales", _scale(np.inf)),
    "a negative scale": ("k_scales", _scale(-1.0)),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("check", [True, None])
def test_wrong_values_are_refused(check, name, xp, monkeypatch):
    if check is None and xp is not np:  # on the host it is the default
        monkeypatch.setenv("MLA_FP8_CHECK", "1")
    names, change = WRONG[name]
    case = change(SPEC.build())
    here, op = case.to(xp), MLAIndexerRaggedFloat8Paged(**case.params)
    out = xp.full((case.tokens, SPEC.k), POISON, np.int32)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at below
        op(*here.args, out=out, check=check)
    assert_helpful(caught.value, names)
    assert (host(out) == POISON).all()


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize(
    ("length", "dtype", "name"),
    [(91, U, "k_max_lengths"), (2**32 - 1, U, "k_max_lengths"), (-1, I, "k_(cache|total)_lengths")],
)
def test_lengths_of_idle_sequences_are_checked(length, dtype, name, total, xp):
    """Bounds are over the batch; what the table says of such a sequence matters to nobody."""
    case = Spec((2, 0, 1), (5, 90, 9), num_heads=2, page_size=8, k=6).build()
    table, lengths = case.k_lookup_table.copy(), case.k_cache_lengths.astype(dtype)
    table[1] = 2**32 - 1
    offsets = case.input_row_offsets.astype(np.int64)

    def call(values):
        here = case.replace(k_lookup_table=table, k_cache_lengths=values).to(xp)
        if not total:
            return index_topk(*here.args, k=6, check=True)
        totals = xp.asarray((values + np.diff(offsets)).astype(dtype))
        args = here.replace(k_cache_lengths=None).args
        return index_topk(*args, k=6, check=True, k_total_lengths=totals)

    call(lengths)
    lengths[1] = length
    with pytest.raises(ValueError, match=f"{name} must .* got .* sequence 1"):
        call(lengths)


@pytest.mark.parametrize("function", [index_scores, lambda *a, **o: index_topk(*a, k=6, **o)])
def test_the_functions_check_too(function, xp):
    here = _page(6, U)(SPEC.build()).to(xp)
    with pytest.raises(ValueError, match="k_lookup_table"):
        function(*here.args, check=True)
    function(*here.args, check=False)


def test_the_layer_is_always_checked(xp):
    """An index that would address memory outside of the blocks is no matter of `check`."""
    here = SPEC.build().to(xp)
    with pytest.raises(ValueError, match="layer_idx"):
        index_topk(*here.replace(layer_idx=1).args, k=6, check=False)


@pytest.mark.parametrize("index_dtype", ["int32", "uint32"])
def test_what_is_not_used_is_not_checked(index_dtype, xp):
    """The generator fills free pages, other layers and table tails with garbage."""
    many = {"page_size": 8, "num_layers": 2, "spare_pages": 3, "index_dtype": index_dtype}
    case = Spec((2, 0, 1), (5, 90, 9), num_heads=2, k=6, **many).build()
    assert np.isnan(case.k_scales).any()
    assert (case.k_lookup_table.astype(np.int64) & 0xFFFFFFFF >= len(case.k_blocks)).any()
    check_case(case, xp, check=True)


@pytest.mark.parametrize(
    "name",  # no rule says what a score with a wrong scale is
    sanitized([n for n in WRONG if "scale" not in n], ["a page one past"]),
)
@pytest.mark.parametrize("mask", ["causal", "null"])
def test_wrong_values_are_clamped(mask, name, xp):
    """Unchecked, the same input must neither fault nor gain a key: the spec's clamping rules."""
    case = WRONG[name][1](dataclasses.replace(SPEC, mask=mask).build())
    check_case(case, xp, check=False)
    if xp is not np:
        check_case(case, xp)  # the default on a device
        check_case(case, xp, device_max_lengths=True)
