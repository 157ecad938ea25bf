"""No launch uses memory outside its part of the workspace, and launches do not race.

So for random plans and sizes of the workspace, whatever offsets and lengths are.
"""

import dataclasses
from collections import Counter
from functools import cache

import launches
import numpy as np
import pytest
from compile_table import shape
from machine import INDICES, MEMORY, SCORES, SLOTS, VALUES
from machine_batch import Batch

from mla_fp8._check.parameters import Output
from mla_fp8._plan.kernel import Device
from mla_fp8._plan.scoring import HOPPER_DEPTHS
from mla_fp8._plan.tuning import Tuning
from mla_fp8._plan.workspace import Split, lay_out

H200 = Device("sm_90a", 132, shared_bytes=227 << 10)
SMALL = dataclasses.replace(H200, multiprocessors=16, ordinal=1)
A100 = Device("sm_80", 108, ordinal=2, shared_bytes=163 << 10)
DEVICES = [H200, H200, SMALL, A100]
# Which memory each kernel may read and write.
READS = {
    "schedule": set(),
    "index_scores_sm90": {"token_rows", "work_ranges"},
    "index_scores": {"token_rows"},
    "fill_invalid": {"token_rows"},
    "topk_filter": {"scores", "token_rows", "windows"},
    "topk_histogram": {"scores", "token_rows"},
    "sort_topk": set(),
    "translate_topk": {"token_rows"},
}
WRITES = {
    "schedule": {"token_rows", "work_ranges", "windows"},
    "index_scores_sm90": {"token_rows", "scores"},
    "index_scores": {"scores"},
    "fill_invalid": {"scores"},
    "topk_filter": {"indices", "slots", "values"},
    "topk_histogram": {"indices", "slots", "values"},
    "sort_topk": {"indices", "values", "spare"},
    "translate_topk": {"indices", "slots"},
}


@cache
def _limited(size):
    """A tuning with so many bytes for scores that wait for their selection."""
    return Tuning(prefill_bytes=size, decode_bytes=size)


def _assert_inside(machine, regions):
    for access in machine.accesses:
        names = (WRITES if access.writes else READS)[access.kernel]
        inside = {
            name for name, low, high in regions if low <= access.start and access.stop <= high
        }
        assert inside & names, (access, regions)


def _assert_right(
    batch, k, by_score, values, device, tuning, memory=MEMORY, output=Output.POSITIONS
):
    """Run a call: memory is used as planned, and each key is scored and selected from once."""
    machine, plan = launches.run_topk(batch, k, by_score, values, device, tuning, memory, output)
    size = 4 * k * batch.shape.total_seq_len
    results = {"indices": (INDICES, size)}
    if values:
        results["values"] = VALUES, size
    if output is Output.BOTH:
        results["slots"] = SLOTS, size
    assert machine.slots == [*Output].index(output)
    assert machine.sharded == (batch.shape.sharded and output is not Output.SLOTS)
    _assert_inside(machine, launches.regions(plan.workspace, memory, **results))
    kv_lens = batch.kv_lens
    assert (machine.scored == np.where(kv_lens <= machine.unscored_kv_len, 0, kv_lens)).all()
    assert (machine.selected == batch.shape.max_keys).all()
    assert (machine.sorted == by_score).all()
    return plan


def _batch(rng, shape, hostile):
    """Offsets and lengths that fit, or, if hostile, any numbers."""
    n, tokens = shape.batch, shape.total_seq_len
    offsets = np.sort(rng.integers(0, tokens + 1, n + 1))
    offsets[0], offsets[-1] = 0, tokens
    room = max(shape.max_keys * shape.tokens_per_key - shape.max_new, 0)
    lengths = rng.integers(0, room + 1, n) * rng.integers(0, 2, n)
    if hostile:
        wild = [0, 1, tokens, 2**31 - 1, 2**31, 2**32 - 1]
        offsets = np.where(
            rng.random(n + 1) < 0.3, rng.choice(wild, n + 1), rng.permutation(offsets)
        )
        lengths = np.where(rng.random(n) < 0.5, rng.choice(wild, n), lengths)
    starts = None
    if shape.sharded and rng.integers(2):
        starts = rng.choice([0, 1, 9, 1000, *([2**31 - 1, 2**32 - 1] if hostile else [])], n)
        starts = starts.astype(np.uint32)
    offsets = offsets.astype(np.int32 if shape.signed_offsets else np.uint32)
    lengths = lengths.astype(np.int32 if shape.signed_lengths else np.uint32)
    return Batch(shape, offsets, lengths, starts)


def _log(rng, low, high):
    """A random whole number whose logarithm is evenly distributed."""
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def _shape(rng):
    tokens, batch = _log(rng, 1, 400), _log(rng, 1, 41) - 1
    return shape(
        num_heads=int(rng.choice([1, 4, 8, 12, 16, 32, 64, 128])),
        depth=int(rng.choice(HOPPER_DEPTHS)),
        causal=bool(rng.integers(2)),
        total_seq_len=tokens,
        batch=batch,
        max_new=_log(rng, 1, tokens),
        max_keys=int(rng.choice([0, _log(rng, 1, 20_000), 64 * _log(rng, 1, 100)])),
        signed_offsets=bool(rng.integers(2)),
        signed_lengths=bool(rng.integers(2)),
        total_lengths=bool(rng.integers(2)),
        kpool=int(rng.choice([1, 1, 3, 4])),
        key_step=(step := int(rng.choice([1, 1, 1, 2, 5]))),
        sharded=step > 1 or bool(rng.integers(4) == 0),
        key_alignment=int(rng.choice([16, 16, 4, 1])),
    )


def test_launches_of_random_plans_use_memory_as_planned():
    rng, seen = np.random.default_rng(0), Counter()
    for turn in range(1200):
        s, k = _shape(rng), _log(rng, 1, 4096)
        if turn % 10 == 9:
            k = _log(rng, 4097, 65536)
        by_score, values = map(bool, rng.integers(0, 2, 2))
        tuning, device = _limited(1 << int(rng.integers(12, 24))), DEVICES[rng.integers(4)]
        batch = _batch(rng, s, turn % 2)
        output = [*Output][rng.integers(3)]
        plan = _assert_right(batch, k, by_score, values, device, tuning, output=output)
        split = plan.scoring.split
        seen["translated"] += plan.translate is not None
        seen[f"slots {dict(plan.selection.kernel.macros)['kSlots']}"] += 1
        seen[plan.mode] += 1
        seen[plan.scoring.route] += 1
        seen["parts by tokens"] += not split.packed and split.part_rows < s.total_seq_len
        seen["parts by keys"] += split.part_keys < s.max_keys
        seen["one part"] += len(split.parts) == 1
        seen["keeps values"] += plan.keeps_values
        seen["unscored rows"] += plan.scoring.unscored_kv_len > 0
    assert len(seen) == 15, seen
    assert min(seen.values()) > 20, seen


def test_a_pipeline_takes_the_arrays_of_each_call():
    """Pipelines are kept by shape, so a call must not use the addresses of the call before."""
    rng = np.random.default_rng(2)
    for turn in range(100):
        s, device = _shape(rng), DEVICES[turn % 4]
        tuning = _limited(1 << int(rng.integers(12, 24)))
        for memory in (MEMORY, MEMORY + (1 << 40)):
            _assert_right(_batch(rng, s, False), 300, turn % 3 == 0, False, device, tuning, memory)


def test_all_scores():
    rng = np.random.default_rng(1)
    for turn in range(300):
        s = _shape(rng)
        if s.max_keys == 0:
            continue  # nothing is launched
        batch, size = _batch(rng, s, turn % 2), 4 * s.total_seq_len * s.max_keys
        machine, workspace = launches.run_scores(batch, DEVICES[turn % 4])
        _assert_inside(machine, launches.regions(workspace, scores=(SCORES, size)))
        assert (machine.scored == batch.kv_lens).all()
        assert machine.filled == 1


@pytest.mark.parametrize("device", [H200, A100])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("by_score", [False, True])
def test_selection_from_given_scores(by_score, values, device):
    for rows in (1, 8, 33, 400, 5000):
        for columns in (1, 5000, 20000, 1 << 20):
            for k in (1, 2048, 4096, 65536):
                machine, workspace = launches.run_select(rows, columns, k, by_score, values, device)
                results = {"indices": (INDICES, 4 * k * rows)}
                if values:
                    results["values"] = VALUES, 4 * k * rows
                results["scores"] = SCORES, 4 * rows * columns
                _assert_inside(machine, launches.regions(workspace, **results))
                assert (machine.selected == columns).all()
                assert (machine.sorted == by_score).all()


# An earlier plan kept values in windows, which may have any number of rows. Selection from these
# batches then wrote past the end of the workspace.
SEEN = {
    "causal": (32768, 512, (12, 23, 14, 3, 0, 3, 23, 1), {"num_heads": 128, "page_size": 128}),
    "null": (8192, 20, (20, 13, 1, 7, 19), {"num_heads": 64, "causal": False}),
}


@pytest.mark.parametrize("pages", [1, 3, 10, 32, 40])
@pytest.mark.parametrize("name", SEEN)
def test_batches_that_once_wrote_past_the_end(name, pages):
    size, k, new, changes = SEEN[name]
    most = {"total_seq_len": sum(new), "batch": len(new), "max_new": 40}
    page = changes.get("page_size", 64)
    s = shape(**most, max_keys=pages * page, pages_per_seq=pages, **changes)
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.uint32)
    for cached in (0, 30, 2**31):
        batch = Batch(s, offsets, np.full(len(new), cached, np.uint32))
        for values in (False, True):
            _assert_right(batch, k, False, values, H200, _limited(size))


def test_packed_rows_have_no_memory_for_each_row():
    split = Split(79, 1280, 4, 1280, 1280, packed=True)
    for memory in ({"keeps_values": True}, {"sorts": True}):
        with pytest.raises(ValueError, match="packed rows must not need memory for each row"):
            lay_out(split, scheduled_launches=20, blocks=132, buffers=2, k=512, **memory)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"row_stride": 1276}, "row_stride must be at least part_keys"),
        ({"part_keys": 640, "packed": True}, "part_keys must be all keys"),
        ({"part_tokens": 1 << 20, "packed": True}, "window_size must be below 1073741824"),
    ],
)
def test_a_split_that_kernels_cannot_follow_is_refused(changes, names):
    fields = {"tokens": 79, "keys": 1280, "part_tokens": 4, "part_keys": 1280, "row_stride": 1280}
    with pytest.raises(ValueError, match=names):
        Split(**{**fields, **changes})
