"""Query tokens spread over ranks: which tokens a rank has, and their call."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import Array, empty_beside
from mla_fp8._check.problem import Problem, host_bounds
from mla_fp8._check.shape import MOST

_MOST_UNSIGNED = 2**32 - 1


class Pieces(NamedTuple):
    """The tokens of a batch in ``2 * size`` pieces; rank r has piece r, and piece r of the end.

    A causal token sees more keys the later it stands, so that a rank with an early piece and a
    late one has as much work as any other.
    """

    tokens: int
    rank: int
    size: int

    @property
    def length(self) -> int:
        """Tokens of a piece; the last pieces may have fewer, or none."""
        return -(-self.tokens // (2 * self.size))

    @property
    def of_rank(self) -> tuple[slice, slice]:
        """The rank's two pieces."""
        return self._piece(self.rank), self._piece(2 * self.size - 1 - self.rank)

    @property
    def tokens_of_rank(self) -> int:
        """The rank's tokens."""
        return sum(piece.stop - piece.start for piece in self.of_rank)

    def _piece(self, number: int) -> slice:
        begin, end = (min(n * self.length, self.tokens) for n in (number, number + 1))
        return slice(begin, end)

    def joined(self, array: Array) -> Array:
        """A copy of the rows of an array [tokens, ...] that the rank has."""
        found = empty_beside(array, (self.tokens_of_rank, *array.shape[1:]), array.dtype)
        first, second = self.of_rank
        middle = first.stop - first.start
        found[:middle], found[middle:] = array[first], array[second]
        return found

    def in_order(self, every: Array) -> Array:
        """The rows of all ranks [size, 2 * length, ...] in the order of the tokens."""
        row, length, size = every.shape[2:], self.length, self.size
        every = every.reshape(size, 2, length, *row)
        found = empty_beside(every, (2, size, length, *row), every.dtype)
        found[0], found[1] = every[:, 0], every[::-1, 1]
        return found.reshape(-1, *row)[: self.tokens]


def call_of_rank(
    problem: Problem, k_max_lengths: Any, pieces: Pieces
) -> tuple[tuple[Any, ...], Any]:
    """The nine inputs of a rank's call, and its ``k_total_lengths``.

    The parts of each sequence in the first piece are sequences of the call, those in the second
    follow, and between them is a sequence of the tokens that no sequence covers: it has no keys.
    All is computed where the arrays are. Shapes depend on the shapes of the problem alone.
    """
    s, xp = problem.shape, problem.xp
    offsets = _running_maximum(problem.input_row_offsets.astype(np.int64).clip(0, s.total_seq_len))
    begin, end = offsets[:-1], offsets[1:]
    seen = problem.k_cache_lengths.astype(np.int64)
    if s.total_lengths:  # the tokens before the new ones, clamped as kernels do
        seen -= end - begin
    seen = xp.minimum(seen, MOST)
    found = empty_beside(offsets, (2, s.batch + 1), np.uint32)
    totals = empty_beside(offsets, (2 * s.batch + 1,), np.uint32)
    totals[s.batch : s.batch + 1] = 0
    first, second = pieces.of_rank
    shifts = -first.start, first.stop - first.start - second.start
    parts = slice(s.batch), slice(s.batch + 1, None)
    for place, piece, shift, part in zip((0, 1), (first, second), shifts, parts, strict=True):
        found[place] = offsets.clip(piece.start, piece.stop) + shift
        # A causal token sees the tokens of its sequence up to itself, in whatever piece.
        until = end.clip(piece.start, piece.stop) if s.causal else end
        totals[part] = (seen + until - begin).clip(0, _MOST_UNSIGNED)
    table = problem.k_lookup_table
    tables = empty_beside(table, (2 * s.batch + 1, s.pages_per_seq), table.dtype)
    tables[parts[0]], tables[parts[1]] = table, table
    tables[s.batch : s.batch + 1] = 0  # never read
    qs = None if problem.qs is None else pieces.joined(problem.qs)
    inputs = (
        *(pieces.joined(problem.q), qs, found.ravel(), problem.k_blocks, None, tables),
        *(_bounds(problem, k_max_lengths, pieces), problem.k_scales, problem.layer),
    )
    return inputs, totals


def _running_maximum(array: Array) -> Array:
    """The largest element up to each one; CuPy has no `numpy.maximum.accumulate`."""
    if isinstance(array, np.ndarray):
        return np.maximum.accumulate(array)
    from cupy import maximum

    step = 1
    while step < array.size:
        longer = array.copy()
        maximum(array[step:], array[:-step], out=longer[step:])
        array, step = longer, 2 * step
    return array


def _bounds(problem: Problem, k_max_lengths: Any, pieces: Pieces) -> Any:
    """``k_max_lengths`` of the rank's call: fewer new tokens, and the same sum.

    The sum bounds the keys that a token sees, so that bounds given too small lose the same keys.
    """
    given = host_bounds(k_max_lengths, problem.q)
    if given is None:
        return k_max_lengths
    new = min(given[0], pieces.length)
    return np.array([[new, min(sum(given) - new, _MOST_UNSIGNED)]], np.uint32)
