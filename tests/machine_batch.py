"""What kernels make of offsets and lengths: the rows that each token sees, and packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mla_fp8._check.shape import Shape
from mla_fp8._plan.workspace import MIN_WINDOWS

KEY_START = 7


@dataclass(frozen=True)
class Batch:
    """Offsets and lengths as kernels read them, whatever they hold: `RaggedBatch`."""

    shape: Shape
    offsets: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray | None = None  # the first row of each sequence's shard; None: KEY_START

    @cached_property
    def bounds(self) -> np.ndarray:
        """The first token of each sequence, and the last token + 1."""
        clamped = np.clip(self.offsets.astype(np.int64), 0, self.shape.total_seq_len)
        return np.maximum.accumulate(clamped)

    @cached_property
    def cached(self) -> np.ndarray:
        """Tokens of each sequence before its new ones; negative if a total length is too small."""
        lengths, total = self.lengths.astype(np.int64), self.shape.total_lengths
        new = np.diff(self.bounds) * total
        return np.where(lengths < 0, 0 if total else lengths, lengths) - new

    def rows(self, tokens: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        """Rows of the shard that tokens see which see this many tokens of a sequence."""
        s = self.shape
        start = np.full(s.batch, KEY_START if s.sharded else 0)
        if self.starts is not None:
            start = np.minimum(self.starts.view(np.uint32).astype(np.int64), 2**31 - 1)
        start = np.append(start, 0)[sequence]
        rows = (tokens + s.kpool * (s.key_step - 1 - start)) // (s.kpool * s.key_step)
        return np.clip(rows, 0, s.max_keys)

    @cached_property
    def sequences(self) -> np.ndarray:
        """The sequence of each token, or -1."""
        found = np.searchsorted(self.bounds, np.arange(self.shape.total_seq_len), "right") - 1
        return np.where(found == self.shape.batch, -1, found)

    @cached_property
    def kv_lens(self) -> np.ndarray:
        """How many keys each token sees."""
        sequence, token = self.sequences, np.arange(self.shape.total_seq_len)
        begin, end = (np.append(b, 0)[sequence] for b in (self.bounds[:-1], self.bounds[1:]))
        new = token - begin + 1 if self.shape.causal else end - begin
        rows = self.rows(np.append(self.cached, 0)[sequence] + new, sequence)
        return np.where(sequence < 0, 0, rows)


class PackedRows:
    """Where packed rows begin, and which rows a window has: row_layout.cuh."""

    def __init__(self, batch: Batch, window: int, launches: int) -> None:
        self._batch, self._launches = batch, launches
        self._begin, tokens = batch.bounds[:-1], np.diff(batch.bounds)
        self._stride = -(-batch.rows(batch.cached + tokens, np.arange(tokens.size)) // 4) * 4
        self._size = tokens * self._stride
        self._first = np.cumsum(self._size) - self._size
        self._all = int(self._size.sum())
        windows = min(launches, MIN_WINDOWS)
        self._window = window
        if self._all < windows * window:
            even = (self._all % 2**32 + windows - 1) % 2**32 // windows
            self._window = max((even + 3) % 2**32 // 4, 1) * 4

    def offsets(self) -> np.ndarray:
        """Where each token's row begins in its window."""
        sequence, token = self._batch.sequences, np.arange(self._batch.shape.total_seq_len)
        first, begin, stride = (
            np.append(a, 0)[sequence] for a in (self._first, self._begin, self._stride)
        )
        offset = np.where(sequence < 0, 0, first + (token - begin) * stride)
        return (self._window - (self._all - offset) % self._window) % self._window

    def tokens(self, launch: int) -> tuple[int, int]:
        """The first and past-the-end token whose rows begin in the window of a launch."""
        first = self._all - (self._launches - launch) * self._window
        is_last = launch + 1 == self._launches
        total = self._batch.shape.total_seq_len
        return self._from(first), total if is_last else self._from(first + self._window)

    def _from(self, offset: int) -> int:
        if offset <= 0:
            return 0
        ahead = offset - self._first
        found = self._begin - -ahead // np.maximum(self._stride, 1)
        return int(found[(ahead > 0) & (ahead <= self._size)].min())
