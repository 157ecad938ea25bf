"""``output="slots"`` and ``"both"``: where the selected keys stand, in the order of positions."""

import dataclasses

import numpy as np
import pytest
from generators import Spec, tiny_arguments
from properties import guarded, host, message_of, same_bits, sanitized

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_topk

RAGGED = Spec((3, 0, 1, 20), (170, 9, 0, 230), num_heads=16, k=64, page_size=16)
SPECS = {
    "ragged": RAGGED,
    "page size 1": dataclasses.replace(RAGGED, page_size=1, values="plateau"),
    "page size 24": dataclasses.replace(RAGGED, page_size=24),
    "shared pages": Spec((3, 4, 2), (200, 200, 131), shared=True),
    "int32, layers": dataclasses.replace(RAGGED, index_dtype="int32", num_layers=2, layer=1),
    "long rows": Spec((2, 1), (900, 20000), num_heads=8, k=2048),
    "k = 5000": Spec((2, 1), (900, 9000), num_heads=8, k=5000, values="equal"),
    "many rows": Spec((30, 7), (300, 2500), num_heads=16, page_size=16),
    "depth 256": Spec((2, 1), (900, 100), num_heads=16, depth=256),
    "kpool": dataclasses.replace(RAGGED, kpool=4),
    "empty": Spec((0, 0), (5, 0)),
}


def _slots(case, positions) -> np.ndarray:
    """The slot of each position, from the table."""
    positions, page_size = host(positions), case.spec.page_size
    slots = np.full_like(positions, -1)
    offsets = case.input_row_offsets
    for b, pages in enumerate(case.k_lookup_table.astype(np.int64)):
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        mine, found = positions[rows], positions[rows] >= 0
        slots[rows][found] = (pages[mine // page_size] * page_size + mine % page_size)[found]
    return slots


@pytest.mark.parametrize("sort", ["position", "score"])
@pytest.mark.parametrize(
    "name", sanitized(SPECS, ["ragged", "long rows", "many rows", "depth 256"])
)
def test_slots_of_the_positions(name, sort, xp):
    case = SPECS[name].build()
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp)
    positions, scores = op(*here.args, sort=sort, return_scores=True)
    want = _slots(case, positions)
    for with_scores in (False, True):
        options = {"sort": sort, "return_scores": with_scores}
        both = op(*here.args, output="both", **options)
        alone = op(*here.args, output="slots", **options)
        assert len(both) == 2 + with_scores
        assert same_bits(both[0], positions)
        assert same_bits(both[1], want)
        assert same_bits(alone[0] if with_scores else alone, want)
        if with_scores:
            assert same_bits(both[2], scores)
            assert same_bits(alone[1], scores)


@pytest.mark.parametrize("sort", ["position", "score"])
@pytest.mark.parametrize("output", ["slots", "both"])
def test_out_is_filled_and_nothing_else(output, sort, xp):
    case = RAGGED.build()
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp)
    options = {"output": output, "sort": sort, "return_scores": True}
    dtypes = [np.int32] * (1 + (output == "both")) + [np.float32]
    outs, intact = zip(*(guarded(xp, (case.tokens, 64), d) for d in dtypes), strict=True)
    memory = op.workspace(*here.args, **options)
    assert op(*here.args, out=outs, workspace=memory, **options) is outs
    for ours, fresh, check in zip(outs, op(*here.args, **options), intact, strict=True):
        assert same_bits(ours, fresh)
        check()


def test_pages_that_do_not_exist_have_no_slots(xp):
    """Their keys are not selectable, so rows that see other keys too have only those."""
    case = RAGGED.build()
    table = case.k_lookup_table.astype(np.int64)
    table[3, 1::2] = len(case.k_blocks) + np.arange(table[3, 1::2].size) % 3
    case = case.replace(k_lookup_table=table.astype(np.uint32))
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp)
    positions, slots = op(*here.args, output="both", check=False)
    assert same_bits(slots, _slots(case, positions))
    assert host(slots).max() < case.k_blocks.shape[0] * case.spec.page_size


@pytest.mark.gpu
def test_slots_where_rows_are_continued(cupy, monkeypatch):
    """With a small budget a row is selected from part by part, and translated at the end."""
    from mla_fp8._cuda import backend
    from mla_fp8._plan.tuning import Tuning

    case = Spec((60, 40), (20000, 15000), num_heads=8, k=300).build()
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(cupy)
    expected = {output: op(*here.args, output=output) for output in ("slots", "both")}
    small = Tuning(prefill_bytes=1 << 20, decode_bytes=1 << 20)
    plain = backend.index_topk
    monkeypatch.setattr(backend, "index_topk", lambda p, s: plain(p, s, small))
    assert same_bits(op(*here.args, output="slots"), expected["slots"])
    for ours, theirs in zip(op(*here.args, output="both"), expected["both"], strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("output", ["slot", None, 1, "Slots"])
def test_output_is_one_of_three_words(output, xp):
    case = RAGGED.build().to(xp)
    text = message_of(lambda: index_topk(*case.args, k=4, output=output))
    assert text.startswith("output must be 'positions' or 'slots' or 'both'; got")


def test_tuples_of_the_wrong_length():
    arguments = tiny_arguments()
    for output, scores, words in (
        ("both", False, "(positions, slots) with output='both'; got ndarray"),
        ("both", True, "(positions, slots, scores) with output='both' and return_scores=True"),
    ):
        out = np.empty((3, 6), np.int32)
        options = {"k": 6, "output": output, "return_scores": scores}
        text = message_of(
            lambda options=options, out=out: index_topk(*arguments, out=out, **options)
        )
        assert text.startswith(f"out must be a tuple {words}")
    out = (np.empty((3, 6), np.int32),) * 2
    text = message_of(lambda: index_topk(*arguments, k=6, out=out, output="both"))
    assert "must not overlap" in text


def test_slots_fit_an_int32():
    """More are refused where slots are asked for, and nowhere else."""
    case = Spec((1,), (3,), num_heads=1, depth=32, k=2, page_size=4).build()
    pools = {}
    for name in ("k_blocks", "k_scales"):  # the same block, very often
        one = getattr(case, name)[:1]
        strides = (0, *one.strides[1:])
        pools[name] = np.lib.stride_tricks.as_strided(one, (2**29, *one.shape[1:]), strides)
    case = case.replace(**pools)
    options = {"k": 2, "check": False}
    assert index_topk(*case.args, **options).shape == (1, 2)
    text = message_of(lambda: index_topk(*case.args, output="slots", **options))
    words = "k_blocks must have num_blocks * page_size <= 2147483647 for slots; got 536870912 * 4"
    assert text.startswith(words)
