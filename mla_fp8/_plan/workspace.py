"""How rows of scores are split into launches, and where each buffer lies in the workspace.

A launch writes what its `Part` says. The workspace is laid out for the same parts, so no size is
written down twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mla_fp8._plan.kernel import ceil_div

ALIGNMENT = 256  # bytes: each buffer begins on a multiple
ROW_ALIGNMENT = 4  # elements: a row begins on 16 bytes
MIN_WINDOWS = 4  # windows that packed rows are split into, at least (if there are the launches)
SCHEDULED_LAUNCHES = 64  # launches whose work ranges the scheduler writes at a time, at most

# What the scheduler writes: structs of kernels/include/token_row.cuh and scheduler.cuh.
TOKEN_ROW = np.dtype(
    [("sequence", np.int32), ("kv_len", np.int32), ("offset", np.int64)], align=True
)
WORK_RANGE = np.dtype(
    [
        (name, np.int32)
        for name in (
            "units",
            "sequence",
            "sequence_end",
            "token",
            "token_end",
            "seen",
            "key",
            "launch_end",
        )
    ],
    align=True,
)
WINDOW = np.dtype(
    [("first_token", np.int32), ("end_token", np.int32), ("selection_blocks", np.int32)], align=True
)


def aligned_row(columns: int) -> int:
    """Elements from one row of scores to the next."""
    return ROW_ALIGNMENT * ceil_div(columns, ROW_ALIGNMENT)


class Part(NamedTuple):
    """The tokens and keys that one launch scores; of a window: all tokens."""

    first_token: int
    end_token: int
    first_key: int
    num_keys: int


@dataclass(frozen=True)
class Split:
    """Rows of scores, one for each token, split into launches.

    Without packing, a launch takes ``part_tokens`` tokens and ``part_keys`` keys, and its rows are
    ``row_stride`` elements apart. With packing (``row_layout.cuh``), each row takes only the room
    that its sequence needs, and a launch takes the rows that begin in its window. The device
    counts which rows these are, so a launch may have any number of tokens.
    """

    tokens: int  # of the whole call
    keys: int  # of the longest row
    part_tokens: int  # with packing: rows of the longest length that fill a window
    part_keys: int
    row_stride: int  # elements
    packed: bool = False

    def __post_init__(self) -> None:
        if min(self.part_keys, self.keys) > self.row_stride:
            raise ValueError(
                f"row_stride must be at least part_keys ({self.part_keys}); got {self.row_stride}"
            )
        if self.packed and self.part_keys < self.keys:
            raise ValueError(
                f"part_keys must be all keys ({self.keys}) where rows are packed; "
                f"got {self.part_keys}"
            )
        if MIN_WINDOWS * self.window_size >= 1 << 32:  # the device counts them in 32 bits
            raise ValueError(
                f"window_size must be below {(1 << 32) // MIN_WINDOWS} elements; "
                f"got {self.window_size}"
            )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The tokens and keys of each launch; with packing the device decides, so all are equal."""
        tokens, keys = max(self.part_tokens, 1), max(self.part_keys, 1)
        if self.packed:
            return (Part(0, self.tokens, 0, self.keys),) * ceil_div(self.tokens, tokens)
        return tuple(
            Part(first, min(first + tokens, self.tokens), key, min(keys, self.keys - key))
            for first in range(0, self.tokens, tokens)
            for key in range(0, max(self.keys, 1), keys)
        )

    @property
    def part_rows(self) -> int:
        """The most rows of a launch, without packing."""
        return min(max(self.part_tokens, 1), self.tokens)

    @property
    def window_size(self) -> int:
        """Elements of a window; 0 without packing."""
        return self.part_tokens * self.row_stride * self.packed

    @property
    def buffer_bytes(self) -> int:
        """Bytes of one buffer of scores; a window's last row may end behind the window."""
        rows = self.part_tokens + 1 if self.packed else self.part_rows
        return 4 * rows * self.row_stride


@dataclass(frozen=True)
class Workspace:
    """Where the buffers begin in the workspace of a call, in bytes."""

    token_rows: int  # [tokens] TOKEN_ROW
    work_ranges: int  # [launches, blocks] WORK_RANGE, of up to SCHEDULED_LAUNCHES launches
    windows: int  # [launches] WINDOW, of all launches if rows are packed
    scores: tuple[int, ...]  # buffers of float32 scores
    values: int  # float32 [rows, k], if selection keeps scores that the caller does not get
    spare: tuple[int, int]  # int32 and float32 [rows, k], if rows are sorted
    size: int


def lay_out(
    split: Split,
    *,
    token_rows: int = 0,
    scheduled_launches: int = 0,
    blocks: int = 0,
    buffers: int = 0,
    k: int = 0,
    keeps_values: bool = False,
    sorts: bool = False,
) -> Workspace:
    """Lay out the workspace of a call; each scheduled launch has ``blocks`` work ranges."""
    if split.packed and (keeps_values or sorts):
        raise ValueError(
            "packed rows must not need memory for each row of a launch, which may have any "
            f"number of rows; got keeps_values={keeps_values}, sorts={sorts}"
        )
    selected = 4 * k * split.part_rows
    sizes = [
        TOKEN_ROW.itemsize * token_rows,
        WORK_RANGE.itemsize * min(scheduled_launches, SCHEDULED_LAUNCHES) * blocks,
        WINDOW.itemsize * len(split.parts) * split.packed,
        *(split.buffer_bytes for _ in range(buffers)),
        selected * keeps_values,
        selected * sorts,
        selected * sorts,
    ]
    starts = [0]
    for size in sizes:
        starts.append(ALIGNMENT * ceil_div(starts[-1] + size, ALIGNMENT))
    rows, work_ranges, windows, *scores, values, indices, sorted_values, end = starts
    spare = indices, sorted_values
    return Workspace(rows, work_ranges, windows, tuple(scores), values, spare, end)
