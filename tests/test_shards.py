"""``key_start`` and ``key_step``: what a rank finds in the rows that it holds."""

import dataclasses

import numpy as np
import pytest
from generators import Spec, tiny_arguments
from properties import host, message_of, same_bits, sanitized

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, index_topk
from mla_fp8.cli import oracle

SPECS = {
    "ragged": Spec((3, 0, 1, 20), (170, 9, 0, 230), num_heads=16, page_size=16),
    "null mask": Spec((3, 5), (170, 300), num_heads=32, mask="null"),
    "page size 1": Spec((3, 5), (170, 30), num_heads=8, page_size=1, values="plateau"),
    "prefill": Spec((150, 70), (30, 337), num_heads=8),
    "decode": Spec((1,) * 6, (1, 63, 64, 255, 1023, 2000), num_heads=32, values="equal"),
    "kpool": Spec((30, 1, 2), (170, 900, 3), num_heads=16, kpool=4),
    "granules": Spec((3, 4), (170, 100), num_heads=12, granularity=32),
}


def shard(case, start, step: int, rows: int):
    """The cache of a rank: rows start + step * j of each sequence, in pages for ``rows`` rows.

    ``start``: a number, or one for each sequence. NaN stands where a sequence has no row.
    """
    page_size, batch = case.spec.page_size, len(case.k_cache_lengths)
    pages = -(-max(rows, 1) // page_size)
    shape = (batch * pages + 1, *case.k_blocks.shape[1:])
    keys = np.full(shape, 0x7F, np.uint8)
    scales = np.full((*shape[:-1], case.k_scales.shape[-1]), 9.0, np.float32)
    table = np.arange(1, batch * pages + 1, dtype=np.uint32).reshape(batch, pages)[:, ::-1].copy()
    offsets, old = case.input_row_offsets.astype(np.int64), case.k_lookup_table.astype(np.int64)
    for b, first in enumerate(np.broadcast_to(start, batch)):
        n = (int(case.k_cache_lengths[b]) + int(offsets[b + 1] - offsets[b])) // case.spec.kpool
        position = first + step * np.arange(pages * page_size)
        position = position[position < n]
        j = np.arange(position.size)
        to = table[b, j // page_size], 0, case.layer_idx, j % page_size
        at = old[b, position // page_size], 0, case.layer_idx, position % page_size
        keys[to], scales[to] = case.k_blocks.view(np.uint8)[at], case.k_scales[at]
    return case.replace(
        k_blocks=keys.view(case.k_blocks.dtype), k_scales=scales, k_lookup_table=table
    )


def _rows(case) -> int:
    return max(
        (new + cached) // case.spec.kpool
        for new, cached in zip(case.spec.seq_lens, case.spec.cache_lens, strict=True)
    )


def _shards(case):
    """(start, step, rows) of ranks: contiguous, interleaved, and with starts by sequence."""
    most, page = _rows(case), case.spec.page_size
    third = -(-most // 3)
    for start in range(0, most, third):
        yield start, 1, third
    for rank in range(3):
        yield rank, 3, third
    batch = len(case.spec.seq_lens)
    yield np.arange(batch, dtype=np.uint32) * page, 1, most
    yield np.arange(batch, dtype=np.int32)[::-1].copy() % 3, 3, most // 5
    yield 10 * most, 1, 3  # beyond every row


@pytest.mark.parametrize("sort", ["position", "score"])
@pytest.mark.parametrize("name", sanitized(SPECS, ["ragged", "granules"]))
def test_each_rank_finds_the_best_of_its_rows(name, sort, xp):
    case = SPECS[name].build()
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    here = case.to(xp)
    dense = host(op.scores(*here.args))
    seen = oracle.evaluate(case).selectable
    sequence = np.repeat(np.arange(len(case.spec.seq_lens)), case.spec.seq_lens)
    for start, step, rows in _shards(case):
        mine = shard(case, start, step, rows).to(xp)
        given = xp.asarray(start) if isinstance(start, np.ndarray) else start
        options = {"key_start": given, "key_step": step, "check": False}
        indices, scores = op(*mine.args, sort=sort, return_scores=True, **options)
        assert same_bits(op(*mine.args, sort=sort, **options), indices)
        first = np.broadcast_to(start, len(case.spec.seq_lens))[sequence][:, None]
        capacity = -(-max(rows, 1) // case.spec.page_size) * case.spec.page_size
        position = np.arange(seen.shape[1])
        held = (position >= first) & ((position - first) % step == 0)
        held &= (position - first) // step < capacity
        for t, row in enumerate(host(indices)):
            want = oracle.expected_topk(dense[t], seen[t] & held[t], case.spec.k, sort)
            np.testing.assert_array_equal(row, want, err_msg=f"{start} {step} row {t}")
            chosen = want >= 0
            assert same_bits(host(scores)[t][chosen], dense[t, want[chosen]])


@pytest.mark.parametrize("output", ["slots", "both"])
def test_slots_are_those_of_the_shard(output, xp):
    case = SPECS["ragged"].build()
    mine = shard(case, 1, 3, _rows(case))
    op, there = MLAIndexerRaggedFloat8Paged(**case.params), mine.to(xp)
    options = {"key_start": 1, "key_step": 3, "check": False}
    positions = host(op(*there.args, **options))
    found = op(*there.args, output=output, **options)
    slots = host(found if output == "slots" else found[1])
    if output == "both":
        assert same_bits(found[0], positions)
    sequence = np.repeat(np.arange(4), case.spec.seq_lens)[:, None]
    j, page_size = (positions - 1) // 3, case.spec.page_size
    pages = mine.k_lookup_table.astype(np.int64)[sequence, np.maximum(j, 0) // page_size]
    want = np.where(positions < 0, -1, pages * page_size + j % page_size)
    np.testing.assert_array_equal(slots, want)


def test_dense_scores_have_a_column_for_each_row_of_the_shard(xp):
    case = SPECS["prefill"].build()
    whole = host(index_scores(*case.to(xp).args))
    mine = shard(case, 1, 3, _rows(case))
    part = host(index_scores(*mine.to(xp).args, key_start=1, key_step=3, check=False))
    columns = min(part.shape[1], whole[:, 1::3].shape[1])
    assert same_bits(part[:, :columns], whole[:, 1::3][:, :columns])
    assert np.isneginf(part[:, columns:]).all()


@pytest.mark.parametrize("entry", [2**32 - 1, -1])
def test_pages_of_other_shards_have_no_block(entry, xp):
    """Contiguous shards whose sequences begin at different rows: check=True knows the entry."""
    case = SPECS["ragged"].build()
    mine = shard(case, 0, 1, 96)
    dtype = np.uint32 if entry > 0 else np.int32
    table = mine.k_lookup_table.astype(np.int64)
    table[3, 2:] = entry
    there = mine.replace(k_lookup_table=table.astype(dtype)).to(xp)
    starts = xp.asarray(np.array([0, 0, 0, 96], np.uint32))
    for check in (None, True):
        rows = index_topk(*there.args, k=64, key_start=starts, check=check)
        last = host(rows)[-20:]
        assert last[last >= 0].min() >= 96
        assert last.max() < 96 + 2 * case.spec.page_size


def test_wrong_shards_are_refused(xp):
    case = Spec((2, 1), (5, 9), num_heads=4, depth=64, page_size=8, k=6).build().to(xp)
    wrong = {
        "key_start": [-1, 2**31, 1.5, "0", [0, 1], xp.zeros(3, np.uint32), xp.zeros(2, np.int64)],
        "key_step": [0, -1, 257, 1.5, None],
    }
    for name, values in wrong.items():
        for value in values:
            text = message_of(lambda o={name: value}: index_topk(*case.args, k=6, **o))
            assert text.startswith(f"{name} must be"), text


def test_wrong_starts_in_an_array_are_refused():
    arguments = tiny_arguments()
    for start in ([0, -1], [2**31 - 1, 0]):
        text = message_of(
            lambda s=start: index_topk(*arguments, k=6, key_start=np.array(s, np.int32))
        )
        assert text.startswith("key_start must be from 0 to")


@pytest.mark.parametrize("name", ["ragged", "decode", "kpool"])
def test_starts_that_nobody_checks(name, xp):
    """Negative starts and starts beyond every row show no rows, and nothing faults."""
    case = SPECS[name].build()
    batch = len(case.spec.seq_lens)
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp)
    endless = here.replace(k_cache_lengths=xp.full(batch, 2**32 - 1, np.uint32))
    for value in (-1, -(2**31), 2**31 - 1):
        starts = xp.full(batch, value, np.int32)
        for args in (here.args, endless.args):
            assert (host(op(*args, key_start=starts, check=False)) == -1).all()


def test_starts_that_nobody_checks_beside_lengths_that_nobody_checks(xp):
    """A length of up to 2**32 - 1 makes no row of such a start visible."""
    case = SPECS["decode"].build()
    batch = len(case.spec.seq_lens)
    op, most = MLAIndexerRaggedFloat8Paged(**case.params), np.full(batch, 2**32 - 1, np.uint32)
    here = case.replace(k_cache_lengths=most).to(xp)
    for value in (2**31 - 1, 2**31, 2**32 - 1):
        starts = xp.full(batch, value, np.uint32)
        assert (host(op(*here.args, key_start=starts, check=False)) == -1).all()


def test_a_start_of_zero_changes_nothing(xp):
    case = SPECS["ragged"].build()
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp)
    plain = op(*here.args, return_scores=True)
    starts = xp.zeros(4, np.uint32)
    for options in ({"key_start": 0, "key_step": 1}, {"key_start": starts}):
        for ours, theirs in zip(op(*here.args, return_scores=True, **options), plain, strict=True):
            assert same_bits(ours, theirs)
    case = dataclasses.replace(SPECS["ragged"], slack=(5, 1000)).build()
    assert index_scores(*case.args, key_start=3).shape[1] <= index_scores(*case.args).shape[1]
