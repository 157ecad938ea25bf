"""How rows of scores are cut into launches, and memory for all that these launches write.

A launch writes to scratch what its `Part` says, at offsets that count from there. Memory is laid
out for the same parts. So no size is written down in two places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mla_fp8._plan.kernel import ceil_div

SHARED_OUT = 64  # launches whose work is shared out at a time
SHARE_BYTES = 32  # sizeof(Share) of ragged_tiles.cuh
SPAN_BYTES = 16  # sizeof(TokenSpan) of common.cuh
RANGE_BYTES = 12  # sizeof(TokenRange)
ALIGNMENT = 256  # bytes that each part of scratch begins on
ROW_ALIGNMENT = 4  # elements: rows of ours begin on 16 bytes
WINDOWS = 4  # that packed rows are cut into at least, and whose elements are counted in 32 bits


def aligned(columns: int) -> int:
    """Elements from one row of ours to the next."""
    return ROW_ALIGNMENT * ceil_div(columns, ROW_ALIGNMENT)


class Part(NamedTuple):
    """What a launch is of."""

    first: int  # token
    end: int
    key: int  # the first
    keys: int


@dataclass(frozen=True)
class Cut:
    """A row of scores for each token, cut into launches: by tokens, by keys, or by room.

    By room, rows are packed (``packed_rows.cuh``): they are as long as they need to be and a launch
    has as many as fit. Which these are is counted on the device, and may be any.
    """

    tokens: int  # of all launches
    keys: int  # of the longest row
    chunk_tokens: int  # of a launch; if packed, of rows that are as long as can be
    chunk_keys: int
    row_stride: int  # elements from one row to the next, if not packed
    packed: bool = False

    def __post_init__(self) -> None:
        if min(self.chunk_keys, self.keys) > self.row_stride:
            raise ValueError(
                f"row_stride must be at least chunk_keys ({self.chunk_keys}); got {self.row_stride}"
            )
        if self.packed and self.chunk_keys < self.keys:
            raise ValueError(
                f"chunk_keys must be all keys ({self.keys}) where rows are packed; "
                f"got {self.chunk_keys}"
            )
        if WINDOWS * self.window >= 1 << 32:
            raise ValueError(
                f"window must be below {(1 << 32) // WINDOWS} elements; got {self.window}"
            )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What each launch is of; where rows are packed, any tokens may be."""
        tokens, keys = max(self.chunk_tokens, 1), max(self.chunk_keys, 1)
        if self.packed:
            return (Part(0, self.tokens, 0, self.keys),) * ceil_div(self.tokens, tokens)
        return tuple(
            Part(first, min(first + tokens, self.tokens), key, min(keys, self.keys - key))
            for first in range(0, self.tokens, tokens)
            for key in range(0, max(self.keys, 1), keys)
        )

    @cached_property
    def rows(self) -> int:
        """The most rows that a launch may have."""
        return max((part.end - part.first for part in self.parts), default=0)

    @property
    def window(self) -> int:
        """Elements of a launch's rows, but for the end of the last; 0: not packed."""
        return self.chunk_tokens * self.row_stride * self.packed

    @property
    def buffer_bytes(self) -> int:
        """Of the scores of a launch: its rows, or a window and the row that begins at its end."""
        return 4 * (self.window + self.row_stride if self.packed else self.rows * self.row_stride)


@dataclass(frozen=True)
class Scratch:
    """Where the parts of a call's scratch memory begin, in bytes."""

    spans: int  # [tokens] TokenSpan
    shares: int  # [launches, blocks] Share: of up to SHARED_OUT launches
    ranges: int  # [launches] TokenRange: of all, if rows are packed
    scores: tuple[int, ...]  # buffer_bytes each
    values: int  # [rows, k] float32, where selection keeps them
    spare: tuple[int, int]  # [rows, k] int32 and float32, where rows are sorted
    end: int


def lay_out(
    cut: Cut,
    *,
    launches: int,
    blocks: int,
    buffers: int = 0,
    k: int = 0,
    own_values: bool = False,
    sorts: bool = False,
) -> Scratch:
    """Lay out scratch for a cut; ``launches`` of so many ``blocks`` have shares of work."""
    if cut.packed and (own_values or sorts):
        raise ValueError(
            "packed rows must not need memory for each row of a launch, which may be any number; "
            f"got own_values={own_values}, sorts={sorts}"
        )
    of_k = 4 * k * cut.rows
    sizes = [
        SPAN_BYTES * cut.tokens,
        SHARE_BYTES * min(launches, SHARED_OUT) * blocks,
        RANGE_BYTES * len(cut.parts) * cut.packed,
        *(cut.buffer_bytes for _ in range(buffers)),
        of_k * own_values,
        of_k * sorts,
        of_k * sorts,
    ]
    starts = [0]
    for size in sizes:
        starts.append(ALIGNMENT * ceil_div(starts[-1] + size, ALIGNMENT))
    spans, shares, ranges, *scores, values, indices, sorted_values, end = starts
    return Scratch(spans, shares, ranges, tuple(scores), values, (indices, sorted_values), end)
