"""The operation's launches without a GPU: what they are given, and the memory that they write.

`_launch.py` runs as it is, with stand-ins for CuPy and for launching. What a kernel writes is
counted by the kernel's own rules, which stand here once more in NumPy.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np

import mla_fp8
from mla_fp8._check.problem import Shape
from mla_fp8._plan import topk as _plan

MEMORY, INDICES, VALUES = 1 << 44, 2 << 44, 3 << 44  # where scratch and results begin
_SPAN, _SHARE, _RANGE = 16, 32, 12  # bytes


@dataclass(frozen=True)
class Access:
    """Bytes from ``start`` to ``stop`` that a launch of a kernel reads or writes."""

    kernel: str
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """Offsets and lengths as kernels read them, whatever they hold: `Batch` of ragged_tiles.cuh."""

    shape: Shape
    offsets: np.ndarray
    lengths: np.ndarray

    @property
    def bounds(self) -> np.ndarray:
        clamped = np.clip(self.offsets.astype(np.int64), 0, self.shape.total_seq_len)
        return np.maximum.accumulate(clamped)

    @property
    def cached(self) -> np.ndarray:
        return np.minimum(self.lengths.astype(np.int64), self.shape.max_keys)

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Each token's sequence, or -1, and how many keys it sees."""
        bounds, token = self.bounds, np.arange(self.shape.total_seq_len)
        sequence = np.searchsorted(bounds, token, side="right") - 1
        sequence[sequence == self.shape.batch] = -1
        begin, end = bounds[sequence], bounds[np.minimum(sequence + 1, self.shape.batch)]
        new = token - begin + 1 if self.shape.causal else end - begin
        cached = np.append(self.cached, 0)[sequence]
        keys = np.clip(cached + new, 0, self.shape.max_keys)
        return sequence, np.where(sequence < 0, 0, keys)


class PackedRows:
    """packed_rows.cuh: where rows stand that have only the room they need."""

    def __init__(self, batch: Batch, window: int, launches: int) -> None:
        self._batch, self._launches = batch, launches
        bounds, most = batch.bounds, batch.shape.max_keys
        self._begin, count = bounds[:-1], np.diff(bounds)
        self._stride = -(-np.clip(batch.cached + count, 0, most) // 4) * 4
        self._size = count * self._stride
        self._first = np.cumsum(self._size) - self._size
        self._all = int(self._size.sum())
        windows = min(launches, 4)
        self._window = window
        if self._all < windows * window:
            each = (self._all % 2**32 + windows - 1) % 2**32 // windows
            self._window = max((each + 3) % 2**32 // 4, 1) * 4

    def rows(self, sequence: np.ndarray) -> np.ndarray:
        """Where each token's row begins in its window."""
        token = np.arange(sequence.size)
        at = [np.append(a, 0)[sequence] for a in (self._first, self._begin, self._stride)]
        place = np.where(sequence < 0, 0, at[0] + (token - at[1]) * at[2])
        return (self._window - (self._all - place) % self._window) % self._window

    def tokens(self, launch: int) -> tuple[int, int]:
        """Those of a launch."""
        first = self._all - (self._launches - launch) * self._window
        is_last = launch + 1 == self._launches
        total = self._batch.shape.total_seq_len
        return self._from(first), total if is_last else self._from(first + self._window)

    def _from(self, place: int) -> int:
        if place <= 0:
            return 0
        ahead = place - self._first
        found = self._begin - -ahead // np.maximum(self._stride, 1)
        return int(found[(ahead > 0) & (ahead <= self._size)].min())


class _Anything:
    """In place of CuPy, its streams and a problem's arrays: has all attributes, takes all calls."""

    def __getattr__(self, name: str) -> _Anything:
        return _Anything()

    def __call__(self, *args: object, **options: object) -> _Anything:
        return _Anything()


class _Launched:
    """In place of `Prepared`: hands each launch to ``run(kernel, arguments, blocks)``."""

    def __init__(self, run, kernel, device, *arguments, early=False) -> None:
        self._run, self._kernel, self._arguments = run, kernel, list(arguments)

    def change(self, first: int, *values) -> None:
        self._arguments[first : first + len(values)] = values

    def change_bytes(self, number: int, value: bytes) -> None:
        self._arguments[number] = value

    def __call__(self, blocks: int, stream: object) -> None:
        self._run(self._kernel, self._arguments, blocks)


class Machine:
    """Runs launches on one batch as far as addresses go, and writes these down."""

    def __init__(self, batch: Batch) -> None:
        self.writes: list[Access] = []
        self.reads: list[Access] = []  # of scores, by selection
        self._batch, self._total = batch, batch.shape.total_seq_len
        self._sequence, self._seen = batch.spans()
        self._rows = np.full(self._total, -1)  # of the spans in memory
        self._shares: dict[int, tuple[int, int, int, int]] = {}  # by address: what a launch scores
        self._ranges: dict[int, tuple[int, int]] = {}  # by address
        self.scored = np.zeros(self._total, np.int64)  # keys of each token
        self.selected = np.zeros(self._total, np.int64)  # times, of a row's first part

    def run(self, kernel, arguments, blocks) -> None:
        values = [
            a if isinstance(a, (int, bytes)) or not np.isscalar(a) else a.item() for a in arguments
        ]
        getattr(self, f"_{kernel.template}")(dict(kernel.parameters), values, blocks)

    def _write(self, kernel: str, start: int, size: int) -> None:
        if size:
            self.writes.append(Access(kernel, start, start + size))

    def _locate_work(self, parameters, a, blocks) -> None:
        spans, shares, ranges, total, _, max_keys, tokens, chunk_keys = a[2:10]
        first_launch, launches, all_launches, of_launch, stride, window = a[11:17]
        assert 4 * blocks >= (total if first_launch == 0 else 0) + launches * of_launch
        packed = PackedRows(self._batch, window, all_launches) if window else None
        if first_launch == 0:
            self._write("schedule", spans, _SPAN * total)
            token = np.arange(total)
            self._rows = packed.rows(self._sequence) if packed else token % tokens * stride
        if not parameters["kTileTokens"]:
            return
        self._write("schedule", shares, _SHARE * launches * of_launch)
        for i in range(launches):
            launch = first_launch + i
            if packed:
                first, end = self._ranges[ranges + _RANGE * launch] = packed.tokens(launch)
                self._write("schedule", ranges + _RANGE * launch, _RANGE)
                share = first, end, 0, max_keys
            else:
                chunks = -(-max_keys // chunk_keys)
                first, key = launch // chunks * tokens, launch % chunks * chunk_keys
                share = first, min(first + tokens, total), key, min(chunk_keys, max_keys - key)
            self._shares[shares + _SHARE * i * of_launch] = share

    def _score(self, kernel: str, to: int, first: int, end: int, key: int, keys: int) -> None:
        """Write rows of tokens: they must stand apart."""
        seen = np.clip(self._seen[first:end] - key, 0, keys)
        rows = self._rows[first:end]
        order = np.argsort(rows[seen > 0], kind="stable")
        whole = seen if to == VALUES else -(-seen // 4) * 4  # for a selection, whole vectors
        starts, ends = rows[seen > 0][order], (rows + whole)[seen > 0][order]
        assert (ends[:-1] <= starts[1:]).all(), "rows overlap"
        self.scored[first:end] += seen
        if starts.size:
            self._write(kernel, to + 4 * int(starts[0]), 4 * int(ends.max() - starts[0]))

    def _index_scores_sm90(self, parameters, a, blocks) -> None:
        to, first, end, shares, spans, key, keys = a[:7]
        if parameters["kKeyGroups"] > 1:  # few tokens: nobody has counted
            if key == 0:
                self._write("index_scores_sm90", spans + _SPAN * first, _SPAN * (end - first))
                self._rows[first:end] = np.arange(end - first) * a[-2]
        else:
            first, end, *its = self._shares[shares]
            assert its == [key, keys]
        self._score("index_scores_sm90", to, first, end, key, keys)

    def _index_scores(self, parameters, a, blocks) -> None:
        to, first, end = a[:3]
        self._rows[first:end] = np.arange(end - first) * a[-1]
        self._score("index_scores", to, first, end, 0, a[-2])

    def _select(self, kernel: str, parameters, addresses, columns, first, end, column) -> None:
        k, (scores, _, indices, values) = parameters["kTopK"], addresses
        seen = np.clip(self._seen[first:end] - column, 0, columns)
        rows = self._rows[first:end][seen > 0]
        if rows.size:  # whole vectors
            ends = rows + -(-seen[seen > 0] // 4) * 4
            start, stop = (scores + 4 * int(at) for at in (rows.min(), ends.max()))
            self.reads.append(Access(kernel, start, stop))
        self._write(kernel, indices + 4 * k * first, 4 * k * (end - first))
        if parameters["kValues"]:
            self._write(kernel, values + 4 * k * first, 4 * k * (end - first))
        if column == 0:
            self.selected[first:end] += 1

    def _stream_topk(self, parameters, a, blocks) -> None:
        addresses, columns, first, end, counted, column = a[:4], *a[4:9]
        if counted:
            first, end = self._ranges[counted]
        self._select("topk_filter", parameters, addresses, columns, first, end, column)

    def _select_topk(self, parameters, a, blocks) -> None:
        self._select("select_topk", parameters, a[:4], *a[4:7], 0)

    def _sort_topk(self, parameters, a, blocks) -> None:
        for to in a:
            self._write("sort_topk", to, 4 * parameters["kTopK"] * blocks)


@cache
def _launching() -> ModuleType:
    """`mla_fp8._launch` with a stand-in for CuPy; a module of its own, that nobody else sees."""
    path = f"{mla_fp8.__path__[0]}/_launch.py"
    spec = importlib.util.spec_from_file_location("mla_fp8._launch_without_cupy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"cupy": _Anything()}):
        spec.loader.exec_module(module)
    module._tensor_map = lambda *_: bytes(128)
    module.new_stream = _Anything
    module.is_capturing = lambda _: False
    return module


def run_dense(batch: Batch, device) -> tuple[Machine, object]:
    """The launches of all scores on a batch, written to `VALUES`, and their plan."""
    launching, machine = _launching(), Machine(batch)
    launching.Prepared = lambda *args, **options: _Launched(machine.run, *args, **options)
    plan = _plan.plan_scores(batch.shape, device)
    scoring = launching._Scoring(batch.shape, plan, device, np.float32(-np.inf))
    scoring.bind(_Anything(), MEMORY, plan.scratch())
    scoring.locate(0, 0)
    (part,) = plan.cut.parts
    scoring.score(VALUES, part, 0, 0)
    return machine, plan


def run(batch: Batch, k: int, by_score: bool, values: bool, device) -> tuple[Machine, object]:
    """The whole operation's launches on a batch, and their plan."""
    launching, machine = _launching(), Machine(batch)
    launching.Prepared = lambda *args, **options: _Launched(machine.run, *args, **options)
    topk = launching._Topk(batch.shape, k, by_score, values, device)
    data = [SimpleNamespace(data=SimpleNamespace(ptr=at)) for at in (INDICES, VALUES)]
    selection = SimpleNamespace(indices=data[0], values=data[1] if values else None)
    topk(_Anything(), selection, MEMORY)
    return machine, topk.plan


def regions(scratch, results: int, values: bool) -> Iterator[tuple[str, int, int]]:
    """What may be written: name, first and past-the-end byte of each part of scratch, and results.

    These have so many bytes, and scores as many if there are ``values`` of the caller's.
    """
    starts = [("spans", scratch.spans), ("shares", scratch.shares), ("ranges", scratch.ranges)]
    starts += [("scores", start) for start in scratch.scores]
    starts += [("values", scratch.values), *(("spare", start) for start in scratch.spare)]
    ends = [start for _, start in starts[1:]] + [scratch.end]
    for (name, start), end in zip(starts, ends, strict=True):
        yield name, MEMORY + start, MEMORY + end
    yield "indices", INDICES, INDICES + results
    yield "values", VALUES, VALUES + results * values
