"""Values on which nothing was checked: never a fault, never a wrong key, always a whole output.

Single wrong values are in test_values.py; here they come in numbers, and with empty extents.
"""

import numpy as np
import pytest
from generators import ARGUMENTS, Case, Spec
from properties import (
    POISON,
    assert_exact_topk,
    assert_helpful,
    assert_well_formed,
    check_case,
    guarded,
    host,
    one_element_on,
    same_bits,
    sanitized,
)

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, index_topk
from mla_fp8.cli import oracle

SPEC = Spec((3, 0, 2, 4), (40, 70, 3, 17), num_heads=4, depth=64, page_size=16, k=20)


def _values(**arrays):
    return {name: np.array(*array) for name, array in arrays.items()}


def _cut(name, *index):
    return lambda case: {name: np.ascontiguousarray(getattr(case, name)[index])}


U, I = np.uint32, np.int32  # noqa: E741
HUGE = 2**32 - 1
CLAMPED = {
    "tokens before and after all sequences": lambda c: _values(
        input_row_offsets=([2, 3, 3, 6, 7], U)
    ),
    "no token covered": lambda c: _values(input_row_offsets=([9, 9, 9, 9, 9], U)),
    "one sequence takes all": lambda c: _values(input_row_offsets=([0, 0, HUGE, 0, 5], U)),
    "offsets in a zigzag": lambda c: _values(input_row_offsets=([0, 5, 2, 7, 4], U)),
    "offsets reversed": lambda c: _values(input_row_offsets=([9, 5, 3, 3, 0], U)),
    "negative offsets": lambda c: _values(input_row_offsets=([-(2**31), -1, 4, -7, 9], I)),
    "lengths of all sizes": lambda c: _values(k_cache_lengths=([HUGE, 2**31, 0, 2**31 - 1], U)),
    # n(t) = length + place + 1 may still come out above zero
    "negative lengths": lambda c: _values(k_cache_lengths=([-2, -1, -(2**31), 17], I)),
    "maxima of zero": lambda c: _values(k_max_lengths=([[0, 0]], U)),
    "maxima too small": lambda c: _values(k_max_lengths=([[1, 20]], U)),
    "maxima whose sum overflows": lambda c: _values(k_max_lengths=([[HUGE, HUGE]], U)),
    "maxima whose sum wraps to one": lambda c: _values(k_max_lengths=([[2, HUGE]], U)),
    "no page exists": lambda c: {"k_lookup_table": np.full_like(c.k_lookup_table, HUGE)},
    "every page is page zero": lambda c: {"k_lookup_table": np.zeros_like(c.k_lookup_table)},
    "no blocks": lambda c: {"k_blocks": c.k_blocks[:0], "k_scales": c.k_scales[:0]},
    "no table columns": _cut("k_lookup_table", np.s_[:], np.s_[:0]),
    "no sequences": lambda c: {
        "input_row_offsets": c.input_row_offsets[:1],
        "k_cache_lengths": c.k_cache_lengths[:0],
        "k_lookup_table": c.k_lookup_table[:0],
    },
}


def _check_unchecked(case: Case, xp) -> None:
    check_case(case, xp, check=False)
    if xp is not np:
        check_case(case, xp)  # the default there is the same
        check_case(case, xp, device_max_lengths=True)


@pytest.mark.parametrize("mask", ["causal", "null"])
@pytest.mark.parametrize("name", sanitized(CLAMPED, ["offsets in a zigzag", "no blocks"]))
def test_clamped(name, mask, xp):
    case = Spec(**{**vars(SPEC), "mask": mask}).build()
    # page tails become readable here, so they hold numbers: the scores stay comparable
    case = case.replace(k_scales=np.nan_to_num(case.k_scales, nan=0.5))
    _check_unchecked(case.replace(**CLAMPED[name](case)), xp)


@pytest.mark.parametrize("seed", range(25))
def test_random_garbage(seed, xp):
    """Offsets, lengths and tables of random bits, some of them small enough to be plausible."""
    rng = np.random.default_rng(seed)
    mask = ("causal", "null")[seed % 2]
    case = Spec(**{**vars(SPEC), "mask": mask, "seed": seed}).build()
    dtype = (np.uint32, np.int32)[seed // 2 % 2]

    def bits(shape, plausible):
        garbage = rng.integers(0, 2**32, shape, np.uint32)
        small = rng.integers(0, plausible, shape, np.uint32)
        return np.where(rng.random(shape) < 0.6, small, garbage).astype(dtype)

    case = case.replace(
        k_scales=np.nan_to_num(case.k_scales, nan=0.5),
        input_row_offsets=bits(5, 10),
        k_cache_lengths=bits(4, 90),
        k_lookup_table=bits(case.k_lookup_table.shape, len(case.k_blocks) + 2),
    )
    _check_unchecked(case, xp)


@pytest.mark.parametrize("name", ["tokens before and after all sequences", "no page exists"])
def test_every_element_of_a_poisoned_output_is_written(name, xp):
    case = SPEC.build()
    case = case.replace(**CLAMPED[name](case))
    want, here = oracle.evaluate(case), case.to(xp)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    dense, whole = guarded(xp, want.scores.shape, np.float32)
    index_scores(*here.args, out=dense, check=False)
    for sort in ("position", "score"):
        indices, intact = guarded(xp, (case.tokens, SPEC.k), np.int32)
        op(*here.args, out=indices, sort=sort, check=False)
        assert_well_formed(indices, want.selectable, SPEC.k, sort)
        assert_exact_topk(indices, dense, want.selectable, sort)
        intact()
    whole()


@pytest.mark.parametrize("which", ["q", "k_blocks"])
def test_fp8_and_bytes_may_be_mixed(which, xp):
    """One of them float8, the other uint8: the bits are E4M3FN either way."""
    case = SPEC.build()
    check_case(case.replace(**{which: getattr(case, which).view(np.uint8)}), xp)


@pytest.mark.parametrize("which", ["input_row_offsets", "k_cache_lengths", "k_lookup_table"])
def test_signed_and_unsigned_may_be_mixed(which, xp):
    case = SPEC.build()
    check_case(case.replace(**{which: getattr(case, which).astype(np.int32)}), xp)


@pytest.mark.parametrize("name", [n for n in ARGUMENTS if n not in ("layer_idx", "q", "k_blocks")])
def test_any_aligned_element_may_come_first(name, xp):
    here = SPEC.build().to(xp)
    lib = np if isinstance(getattr(here, name), np.ndarray) else xp
    shifted = here.replace(**{name: one_element_on(lib, getattr(here, name))})
    assert same_bits(index_topk(*shifted.args, k=20), index_topk(*here.args, k=20))


@pytest.mark.parametrize("name", ["q", "k_blocks"])
def test_bytes_at_odd_addresses_work_or_are_refused(name, xp):
    """Rows that vector loads cannot take: an error in words or the right answer, never a fault."""
    here = SPEC.build().to(xp)
    shifted = here.replace(**{name: one_element_on(xp, getattr(here, name))})
    out = xp.full((here.tokens, 20), POISON, np.int32)
    try:
        index_topk(*shifted.args, k=20, out=out)
    except ValueError as error:
        assert_helpful(error, name)
        assert (host(out) == POISON).all()
    else:
        assert same_bits(out, index_topk(*here.args, k=20))


def test_one_block_serves_all_sequences(xp):
    """Sequences of identical pages give identical rows, and none disturbs another."""
    case = Spec((1,) * 5, (15,) * 5, num_heads=4, page_size=16, k=8).build()
    table = np.full_like(case.k_lookup_table, case.k_lookup_table[2, 0])
    case = case.replace(
        k_lookup_table=table,
        q=np.repeat(case.q[:1], 5, axis=0),
        qs=np.repeat(case.qs[:1], 5, axis=0),
    )
    check_case(case, xp)
    rows = MLAIndexerRaggedFloat8Paged(**case.params)(*case.to(xp).args)
    assert (rows == rows[:1]).all()
