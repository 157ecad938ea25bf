"""No launch writes past a part of scratch, whatever the plan, the budget, offsets and lengths."""

import dataclasses

import launches
import numpy as np
import pytest
from compile_table import shape

from mla_fp8._plan import topk as _plan
from mla_fp8._plan import workspace as _scratch
from mla_fp8._plan.kernel import Device

H200 = Device("sm_90a", 132, shared_bytes=227 << 10)
DEVICES = [H200, H200, dataclasses.replace(H200, multiprocessors=16), Device("sm_80", 108)]
# Where a kernel may write.
MEANT = {
    "schedule": {"spans", "shares", "ranges"},
    "index_scores_sm90": {"spans", "scores"},
    "index_scores": {"scores"},
    "topk_filter": {"indices", "values"},
    "select_topk": {"indices", "values"},
    "sort_topk": {"indices", "values", "spare"},
}


@pytest.fixture
def budget(monkeypatch):
    """Sets how much scratch there is, for the rest of a test."""

    def set_to(size: int) -> None:
        monkeypatch.setattr(_plan, "SCRATCH_BYTES", size)
        monkeypatch.setattr(_plan, "FEW_SCRATCH_BYTES", size)
        _plan.plan_topk.cache_clear()

    yield set_to
    _plan.plan_topk.cache_clear()


def _assert_meant(machine, regions):
    regions = list(regions)

    def around(access):
        return {name for name, low, high in regions if low <= access.start and access.stop <= high}

    for write in machine.writes:
        assert around(write) & MEANT[write.kernel], (write, regions)
    for read in machine.reads:
        assert "scores" in around(read), (read, regions)


def _assert_stays_inside(batch, k, by_score, values, device):
    """Each launch writes in parts of scratch that are meant for it, or in results."""
    machine, plan = launches.run(batch, k, by_score, values, device)
    tokens = batch.shape.total_seq_len
    _assert_meant(machine, launches.regions(plan.scratch, 4 * k * tokens, values))
    assert (machine.selected == 1).all()  # each row, by one launch
    assert (machine.scored == batch.spans()[1]).all()
    return plan


def _batch(rng, shape, hostile):
    """Offsets and lengths that fit, or anything at all."""
    n, tokens = shape.batch, shape.total_seq_len
    offsets = np.sort(rng.integers(0, tokens + 1, n + 1))
    offsets[0], offsets[-1] = 0, tokens
    room = max(shape.max_keys - shape.max_new, 0)
    lengths = rng.integers(0, room + 1, n) * rng.integers(0, 2, n)
    if hostile:
        wild = [0, 1, tokens, 2**31 - 1, 2**31, 2**32 - 1]
        offsets = np.where(
            rng.random(n + 1) < 0.3, rng.choice(wild, n + 1), rng.permutation(offsets)
        )
        lengths = np.where(rng.random(n) < 0.5, rng.choice(wild, n), lengths)
    offsets = offsets.astype(np.int32 if shape.signed_offsets else np.uint32)
    lengths = lengths.astype(np.int32 if shape.signed_lengths else np.uint32)
    return launches.Batch(shape, offsets, lengths)


def _log(rng, low, high):
    """A whole number, as likely small as large."""
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def _shape(rng):
    tokens, batch = _log(rng, 1, 400), _log(rng, 1, 40)
    return shape(
        num_heads=int(rng.choice(_plan.HOPPER_HEADS)),
        depth=int(rng.choice(_plan.HOPPER_DEPTHS)),
        causal=bool(rng.integers(2)),
        total_seq_len=tokens,
        batch=batch,
        max_new=_log(rng, 1, tokens),
        max_keys=int(rng.choice([0, _log(rng, 1, 20_000), 64 * _log(rng, 1, 100)])),
        signed_offsets=bool(rng.integers(2)),
        signed_lengths=bool(rng.integers(2)),
    )


def test_no_launch_writes_past_its_part_of_scratch(budget):
    """Over random shapes, budgets and batches, half of which hold anything."""
    rng = np.random.default_rng(0)
    seen = {"packed": 0, "by tokens": 0, "by keys": 0, "whole": 0, "own values": 0}
    for turn in range(3000):
        s = _shape(rng)
        k, by_score, values = _log(rng, 1, 6000), bool(rng.integers(2)), bool(rng.integers(2))
        budget(_log(rng, 1 << 8, 1 << 24))
        device = DEVICES[rng.integers(len(DEVICES))]
        plan = _assert_stays_inside(_batch(rng, s, turn % 2), k, by_score, values, device)
        cut = plan.scoring.cut
        seen["packed"] += cut.packed
        seen["by tokens"] += not cut.packed and cut.rows < s.total_seq_len
        seen["by keys"] += cut.chunk_keys < s.max_keys
        seen["whole"] += len(cut.parts) == 1
        seen["own values"] += plan.own_values
    assert min(seen.values()) > 50, seen


def test_all_scores_stay_inside_as_well(monkeypatch):
    monkeypatch.setitem(MEANT, "index_scores_sm90", {"spans", "values"})
    monkeypatch.setitem(MEANT, "index_scores", {"values"})
    rng = np.random.default_rng(1)
    for turn in range(300):
        s = _shape(rng)
        if s.max_keys == 0:
            continue  # nothing is launched
        batch = _batch(rng, s, turn % 2)
        machine, plan = launches.run_dense(batch, DEVICES[turn % len(DEVICES)])
        results = 4 * s.total_seq_len * s.max_keys
        _assert_meant(machine, launches.regions(plan.scratch(), results, True))
        assert (machine.scored == batch.spans()[1]).all()


# What was seen to write past the end: own values, in launches of any number of rows.
SEEN = {
    "causal": (32768, 512, (12, 23, 14, 3, 0, 3, 23, 1), {"num_heads": 128, "page_size": 128}),
    "null": (8192, 20, (20, 13, 1, 7, 19), {"num_heads": 64, "causal": False}),
}


@pytest.mark.parametrize("pages", [1, 3, 10, 32, 40])
@pytest.mark.parametrize("name", SEEN)
def test_what_was_seen_to_write_past_the_end(name, pages, budget):
    size, k, new, changes = SEEN[name]
    most = {"total_seq_len": sum(new), "batch": len(new), "max_new": 40}
    page = changes.get("page_size", 64)
    s = shape(**most, max_keys=pages * page, pages_per_seq=pages, **changes)
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.uint32)
    budget(size)
    for cached in (0, 30, 2**31):
        batch = launches.Batch(s, offsets, np.full(len(new), cached, np.uint32))
        for values in (False, True):
            _assert_stays_inside(batch, k, False, values, H200)


def test_packed_rows_have_no_memory_for_each_row():
    cut = _scratch.Cut(79, 1280, 4, 1280, 1280, packed=True)
    assert cut.rows == 79
    for memory in ({"own_values": True}, {"sorts": True}):
        with pytest.raises(ValueError, match="packed rows must not need memory for each row"):
            _scratch.lay_out(cut, launches=20, blocks=132, buffers=2, k=512, **memory)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"row_stride": 1276}, "row_stride must be at least chunk_keys"),
        ({"chunk_keys": 640, "packed": True}, "chunk_keys must be all keys"),
        ({"chunk_tokens": 1 << 20, "packed": True}, "window must be below 1073741824 elements"),
    ],
)
def test_a_cut_that_kernels_cannot_follow_is_refused(changes, names):
    fields = {"tokens": 79, "keys": 1280, "chunk_tokens": 4, "chunk_keys": 1280, "row_stride": 1280}
    with pytest.raises(ValueError, match=names):
        _scratch.Cut(**{**fields, **changes})
