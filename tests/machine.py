"""A GPU that runs launches as far as addresses go.

`Machine` takes each launch as a GPU would: it reads the bytes of ``Params``, and notes which memory
the kernel reads and writes. The rules by which kernels find this memory are written here once more,
in NumPy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from machine_batch import KEY_START, Batch, PackedRows

from mla_fp8._check.problem import Problem
from mla_fp8._cuda.params import PARAMS, fields_of
from mla_fp8._plan.kernel import Device, Kernel
from mla_fp8._plan.workspace import TOKEN_ROW, WINDOW, WORK_RANGE

ARRAYS = Problem._fields[5:]
ADDRESS = {name: (i + 8) << 44 for i, name in enumerate(ARRAYS)}  # of each input array
LAYER = 3
# The workspace and the results.
MEMORY, INDICES, VALUES, SCORES, SLOTS = ((i + 1) << 44 for i in range(5))
BLOCK_STRIDE, LAYER_STRIDE, SCALES_STRIDE = 1 << 20, 1 << 12, 1 << 10  # bytes of the pools
HERE = 2  # the handle of the caller's stream; 0 and 1 are the default stream, never captured
POISON = b"\xa5"  # the bytes of a parameter that is not set


class Access(NamedTuple):
    """Bytes from ``start`` to ``stop`` that a launch reads or writes."""

    launch: int
    kernel: str
    start: int
    stop: int
    writes: bool


class Machine:
    """Runs launches on one batch as far as addresses go, and notes the memory they use."""

    def __init__(self, batch: Batch, device: Device) -> None:
        self.accesses: list[Access] = []
        self.before: list[int] = []  # for each launch a bit for each launch that it comes after
        self.done: dict[int, int] = defaultdict(int)  # the same, of the next launch of a stream
        self.joined = {HERE}  # streams that a capture of the caller's stream would capture
        self.scored = np.zeros(batch.shape.total_seq_len, np.int64)  # keys of each row
        self.selected = np.zeros_like(self.scored)  # columns of each row
        self.sorted = np.zeros_like(self.scored)  # times
        self.slots = self.sharded = 0  # kSlots and kSharded of what the results hold
        self.filled = 0  # matrices
        self.blocks: list[tuple[str, int]] = []  # of each launch
        self.unscored_kv_len = 0
        self._batch, self._device, self._kernel = batch, device, ""
        self._offsets = np.full_like(self.scored, -1)  # what token_rows in memory hold
        self._ranges: dict[int, tuple[int, int, int, int]] = {}  # by the address of work ranges
        self._windows: dict[int, tuple[int, int]] = {}  # by address
        self._held: dict[int, tuple[int, int, int, int]] = {}  # what a buffer of scores holds

    def launch(self, kernel: Kernel, raw: bytes, blocks: int, stream: int) -> None:
        """Run a kernel with these bytes of parameters."""
        assert 0 < blocks < 2**31
        assert kernel.threads <= 1024
        assert kernel.shared_bytes <= self._device.shared_bytes
        assert stream in self.joined
        number = len(self.before)
        self.before.append(self.done[stream])
        self.done[stream] |= 1 << number
        self.blocks.append((kernel.template, blocks))
        macros, self._kernel = dict(kernel.macros), kernel.template
        params = np.frombuffer(raw, PARAMS[kernel.template].dtype, 1)[0]
        p = SimpleNamespace(**{name: params[name] for name in params.dtype.names})
        for name, offset, size in _leaves(kernel.template):
            unset = raw[offset : offset + size] == POISON * size
            assert not unset or name in _unread(macros, p), f"{self._kernel}: {name} is not set"
        for name, value in vars(p).items():
            if value.dtype.kind in "iuf" and not value.ndim:
                setattr(p, name, value.item())
        self._check_inputs(p, macros)
        getattr(self, f"_{kernel.template}")(p, macros, blocks)

    def _check_inputs(self, p: SimpleNamespace, macros: dict[str, int]) -> None:
        """What a kernel reads of the caller's inputs is what the caller gave."""
        s, own = self._batch.shape, macros.get("kOwnScores", 1)
        if hasattr(p, "keys") and own:
            n, (blocks, scales, table, *counts, factor, shift, pages) = s.max_keys, p.keys.item()
            assert blocks == ADDRESS["k_blocks"] + LAYER * LAYER_STRIDE
            assert scales == ADDRESS["k_scales"] + LAYER * LAYER_STRIDE
            assert table == ADDRESS["k_lookup_table"]
            assert counts == [BLOCK_STRIDE, SCALES_STRIDE // 4, s.num_blocks, s.page_size]
            assert (2 * n * factor >> 32) >> shift == n // s.page_size
            assert pages == s.pages_per_seq
        if hasattr(p, "batch") and macros.get("kLocates", 1):
            offsets, lengths, starts, *counts = p.batch.item()
            assert offsets == ADDRESS["input_row_offsets"]
            assert lengths == ADDRESS["k_cache_lengths"]
            self._check_shard(starts, *counts[4:7])
            assert counts[:3] == [s.batch, s.total_seq_len, s.max_keys]
            flags = s.causal, s.signed_offsets, s.signed_lengths, s.total_lengths
            assert tuple(counts[7:]) == flags
            self.unscored_kv_len = counts[3]
            assert macros.get("kTokensPerKey", 1) == s.kpool * s.key_step
        if hasattr(p, "q"):
            assert (p.q, p.qs) == (ADDRESS["q"], ADDRESS["qs"])

    def _check_shard(self, starts: int, key_start: int, key_step: int, kpool: int = 0) -> None:
        """Where the shard's rows stand is what the caller gave."""
        s, given = self._batch.shape, self._batch.starts
        assert starts == (0 if given is None else ADDRESS["key_starts"])
        assert key_start == (KEY_START if s.sharded and given is None else 0)
        assert (key_step, kpool or s.kpool) == (s.key_step, s.kpool)

    def _note(self, start: int, size: int, *, writes: bool) -> None:
        if size:
            access = len(self.before) - 1, self._kernel, start, start + size, writes
            self.accesses.append(Access(*access))

    def _read(self, start: int, size: int) -> None:
        self._note(start, size, writes=False)

    def _write(self, start: int, size: int) -> None:
        self._note(start, size, writes=True)

    def _token_rows(self, p: SimpleNamespace, first: int, end: int) -> np.ndarray:
        """Where rows begin, read from token_rows."""
        self._read(p.token_rows + TOKEN_ROW.itemsize * first, TOKEN_ROW.itemsize * (end - first))
        found = self._offsets[first:end]
        assert (found >= 0).all(), "token_rows are read before they are written"
        return found

    # ---- each kernel

    def _schedule(self, p: SimpleNamespace, macros: dict[str, int], blocks: int) -> None:
        total, most = self._batch.shape.total_seq_len, self._batch.shape.max_keys
        warps = blocks * (macros["kThreads"] // 32)
        assert warps >= (total if p.first_launch == 0 else 0) + p.launches * p.blocks
        packed = None
        if p.window_size:
            packed = PackedRows(self._batch, p.window_size, p.all_launches)
        if p.first_launch == 0:
            self._write(p.token_rows, TOKEN_ROW.itemsize * total)
            stride = np.arange(total) % p.part_tokens * p.row_stride
            self._offsets = packed.offsets() if packed else stride
        if not macros["kTileTokens"]:
            return
        self._write(p.work_ranges, WORK_RANGE.itemsize * p.launches * p.blocks)
        for i in range(p.launches):
            launch = p.first_launch + i
            if packed:
                assert 0 < p.selection_blocks.min() <= p.selection_blocks.max() < p.blocks
                window = p.windows + WINDOW.itemsize * launch
                first, end = self._windows[window] = packed.tokens(launch)
                self._write(window, WINDOW.itemsize)
                scored = first, end, 0, most
            else:
                key_chunks = -(-most // p.part_keys)
                first, key = launch // key_chunks * p.part_tokens, launch % key_chunks
                key *= p.part_keys
                end = min(first + p.part_tokens, total)
                scored = first, end, key, min(p.part_keys, most - key)
            self._ranges[p.work_ranges + WORK_RANGE.itemsize * i * p.blocks] = scored

    def _score(self, p, scored: tuple[int, int, int, int], offsets: np.ndarray, dense: int) -> None:
        """Write rows of scores, which must not overlap."""
        first, end, key, keys = scored
        kv_lens = self._batch.kv_lens[first:end]
        seen = np.where(kv_lens <= self.unscored_kv_len, 0, np.clip(kv_lens - key, 0, keys))
        self.scored[first:end] += seen
        width = seen if dense else -(-seen // 4) * 4  # selection reads whole vectors
        order = np.argsort(offsets[seen > 0], kind="stable")
        starts, ends = offsets[seen > 0][order], (offsets + width)[seen > 0][order]
        assert (ends[:-1] <= starts[1:]).all(), "rows overlap"
        if starts.size:
            self._write(p.scores + 4 * int(starts[0]), 4 * int(ends[-1] - starts[0]))
        self._held[p.scores] = scored

    def _index_scores_sm90(self, p: SimpleNamespace, macros: dict[str, int], blocks: int) -> None:
        scored = p.first_token, p.end_token, p.first_key, p.num_keys
        if macros["kKeyGroups"] > 1:  # decode: blocks find their own work
            first, tokens = p.first_token, p.end_token - p.first_token
            if p.first_key == 0:
                start = p.token_rows + TOKEN_ROW.itemsize * first
                self._write(start, TOKEN_ROW.itemsize * tokens)
                self._offsets[first : p.end_token] = np.arange(tokens) * p.row_stride
            offsets = self._offsets[first : p.end_token]
        else:
            self._read(p.work_ranges, WORK_RANGE.itemsize * blocks)
            scored = self._ranges[p.work_ranges]
            assert scored[2:] == (p.first_key, p.num_keys)
            offsets = self._token_rows(p, *scored[:2])
        self._score(p, scored, offsets, dense=np.isneginf(p.missing_score))

    def _index_scores(self, p: SimpleNamespace, macros: dict[str, int], blocks: int) -> None:
        first, end = p.first_token, p.end_token
        key_tiles = -(-p.max_kv_len // (macros["kWarps"] * macros["kKeysPerWarp"]))
        assert blocks >= key_tiles * -(-(end - first) // p.tokens_per_tile)
        offsets = np.arange(end - first) * p.row_stride
        assert (self._token_rows(p, first, end) == offsets).all()
        assert p.max_kv_len == self._batch.shape.max_keys
        self._score(p, (first, end, 0, p.max_kv_len), offsets, macros["kDense"])
        if macros["kDense"]:
            self._write(p.scores, 4 * (end - first) * p.row_stride)
            self.filled += 1

    def _fill_invalid(self, p: SimpleNamespace, macros: dict[str, int], blocks: int) -> None:
        assert (self._token_rows(p, 0, p.tokens) == np.arange(p.tokens) * p.row_stride).all()
        assert (p.tokens, p.max_kv_len) == (self.scored.size, self._batch.shape.max_keys)
        self._write(p.scores, 4 * p.tokens * p.row_stride)
        self.filled += 1

    def _select(self, p, macros: dict[str, int], first: int, end: int, column: int) -> None:
        k, read = macros["kTopK"], self._batch.kv_lens[first:end] > 0
        assert column + p.columns <= self._batch.shape.max_keys
        assert (self.selected[first:end] == column).all(), "columns are selected from in order"
        self.selected[first:end] += p.columns
        if macros["kOwnScores"]:
            if p.columns == 0:  # nothing was scored, so token_rows may hold anything
                assert self._batch.shape.max_keys == 0
                offsets = self._offsets[first:end]
            else:
                if macros["kLocates"]:  # rows of equal stride
                    offsets = np.arange(end - first) * p.row_stride
                    assert (self._offsets[first:end] == offsets).all()
                else:
                    offsets = self._token_rows(p, first, end)
                assert self._held[p.scores] == (first, end, column, p.columns)
            if macros.get("kUnscored"):
                read = self._batch.kv_lens[first:end] > k
            assert not (read & (self._batch.kv_lens[first:end] <= self.unscored_kv_len)).any()
        else:
            assert p.lengths == ADDRESS["k_cache_lengths"]
            assert p.signed_lengths == self._batch.shape.signed_lengths
            offsets = np.arange(first, end) * p.row_stride
        seen = np.where(read, np.clip(self._batch.kv_lens[first:end] - column, 0, p.columns), 0)
        if seen.any():
            vectors = -(-seen // 4) * 4 if macros["kOwnScores"] else seen
            start, stop = offsets[seen > 0].min(), (offsets + vectors)[seen > 0].max()
            self._read(p.scores + 4 * int(start), 4 * int(stop - start))
        self._write(p.indices + 4 * k * first, 4 * k * (end - first))
        if macros["kSlots"]:
            assert (column, p.columns) == (0, self._batch.shape.max_keys)
            assert macros["kOwnScores"]
        if macros["kSlots"] == 2:
            self._write(p.slots + 4 * k * first, 4 * k * (end - first))
        self.slots = macros["kSlots"]
        if macros["kValues"]:
            self._write(p.values + 4 * k * first, 4 * k * (end - first))

    def _topk_filter(self, p: SimpleNamespace, macros: dict[str, int], blocks: int) -> None:
        first, end = p.first_row, p.end_row
        if p.window:
            self._read(p.window, WINDOW.itemsize)
            first, end = self._windows[p.window]
        self._select(p, macros, first, end, p.first_column)

    def _topk_histogram(self, p: SimpleNamespace, macros: dict[str, int], blocks: int) -> None:
        self._select(p, macros, p.first_row, p.end_row, 0)

    def _sort_topk(self, p: SimpleNamespace, macros: dict[str, int], blocks: int) -> None:
        row = 4 * macros["kTopK"]
        first = (p.indices - INDICES) // row
        assert (self.selected[first : first + blocks] == self._batch.shape.max_keys).all()
        self.sorted[first : first + blocks] += 1
        for start in (p.indices, p.values, p.spare_indices, p.spare_values):
            self._write(start, row * blocks)

    def _translate_topk(self, p: SimpleNamespace, macros: dict[str, int], blocks: int) -> None:
        s, k = self._batch.shape, macros["kTopK"]
        assert (p.rows, p.indices) == (s.total_seq_len, INDICES)
        assert (self.selected == s.max_keys).all()
        assert not self.slots, "the selection has written slots already"
        if s.max_keys:
            self._token_rows(p, 0, p.rows)
        if macros["kSharded"]:
            self._check_shard(p.key_starts, p.key_start, p.key_step)
        self._write(p.indices, 4 * k * p.rows)
        if macros["kSlots"] == 2:
            self._write(p.slots, 4 * k * p.rows)
        self.slots = macros["kSlots"]
        self.sharded = macros["kSharded"]

    # ---- order

    def assert_ordered(self) -> None:
        """No launch may run beside another launch that writes what it reads or writes.

        When the caller's stream goes on, all launches are done.
        """
        assert self.done[HERE] == (1 << len(self.before)) - 1
        if len(self.done) == 1:
            return  # all launches are in one stream
        launch, start, stop, writes = (
            np.array([getattr(a, name) for a in self.accesses])
            for name in ("launch", "start", "stop", "writes")
        )
        overlaps = (start[:, None] < stop) & (start < stop[:, None]) & (writes[:, None] | writes)
        for i, j in zip(*np.nonzero(np.triu(overlaps, 1)), strict=True):
            one, two = int(launch[i]), int(launch[j])  # one was launched first
            ordered = one == two or self.before[two] >> one & 1
            assert ordered, (self.accesses[i], self.accesses[j])


def _unread(macros: dict[str, int], p: SimpleNamespace) -> set[str]:
    """Fields of Params that a specialisation does not read."""
    if hasattr(p, "selection_blocks"):
        return set() if p.window_size else {"selection_blocks"}
    if "kOwnScores" not in macros:
        return set()
    if macros["kOwnScores"]:
        return {"lengths", "signed_lengths"}
    structs = (n for n, _, _ in _leaves("topk_filter") if n.startswith(("keys.", "batch.")))
    return {"token_rows", "slots", *structs}


@cache
def _leaves(template: str) -> tuple[tuple[str, int, int], ...]:
    """Name, offset and size of each number in the Params of a kernel."""

    def walk(dtype: np.dtype, prefix: str, start: int) -> Iterator[tuple[str, int, int]]:
        for name, kind, offset in fields_of(dtype):
            if kind.names:
                yield from walk(kind, f"{prefix}{name}.", start + offset)
            else:
                yield prefix + name, start + offset, kind.itemsize

    return tuple(walk(PARAMS[template].dtype, "", 0))
