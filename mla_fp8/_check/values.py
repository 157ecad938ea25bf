"""Checks of what arrays hold: offsets, lengths, page numbers, key scales."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from mla_fp8._check.arrays import Array, namespace_of
from mla_fp8._check.shape import MOST, Shape, rows_seen

_NO_BLOCK = 2**32 - 1


def wants_check(check: bool | None, xp: Any) -> bool:
    """Whether to read values: always on the host, on a device only on request."""
    if check is None:
        return xp is np or os.environ.get("MLA_FP8_CHECK", "") not in ("", "0")
    return check


def _to_host(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def check_values(
    arrays: dict[str, Array],
    shape: Shape,
    layer: int,
    key_start: int,
    bounds: tuple[int, int] | None,
) -> None:
    """Raise on offsets, lengths, pages or scales that contradict the shapes or one another.

    ``bounds`` are the two numbers of ``k_max_lengths``, or None if they are on a device.
    """
    total_lengths = shape.total_lengths
    lengths_name = "k_total_lengths" if total_lengths else "k_cache_lengths"
    total_seq_len, pages_per_seq = shape.total_seq_len, shape.pages_per_seq
    num_blocks, page_size = shape.num_blocks, shape.page_size
    offsets = _to_host(arrays["input_row_offsets"]).astype(np.int64)
    new = np.diff(offsets)
    wrong = np.diff(offsets, prepend=0) < 0
    wrong[0] |= offsets[0] != 0
    wrong[-1] |= offsets[-1] != total_seq_len
    if wrong.any():
        first = max(int(wrong.argmax()) - 1, 0)
        raise ValueError(
            "input_row_offsets must start at 0, never decrease and end at total_seq_len "
            f"({total_seq_len}); got {offsets[first : first + 3].tolist()} from [{first}] on"
        )
    lengths = _to_host(arrays[lengths_name]).astype(np.int64)
    cached = lengths - new * total_lengths
    if (cached < 0).any():
        worst = int(cached.argmin())
        least = f"the {new[worst]} new tokens" if total_lengths else "0"
        raise ValueError(
            f"{lengths_name} must be at least {least}; got {lengths[worst]} in sequence {worst}"
        )
    if bounds is not None and new.size:
        most = int(new.max()), int(cached.max())
        if most[0] > bounds[0] or most[1] > bounds[1]:
            worst = int(new.argmax() if most[0] > bounds[0] else cached.argmax())
            raise ValueError(
                "k_max_lengths must be upper bounds of [new tokens, cached tokens] over the batch, "
                f"{list(most)}; got {list(bounds)}, below those of sequence {worst}"
            )
    starts = np.full(new.size, key_start)
    if "key_start" in arrays:
        starts = _to_host(arrays["key_start"]).astype(np.int64)
        if starts.size and not 0 <= starts.min() <= starts.max() <= MOST:
            raise ValueError(
                f"key_start must be from 0 to {MOST}; got {starts.min()} to {starts.max()}"
            )
    # The table row and length of a sequence without new tokens are never used.
    active = np.flatnonzero(new)
    rows = rows_seen((cached + new)[active], shape.kpool, starts[active], shape.key_step)
    capacity = pages_per_seq * page_size
    if shape.sharded:  # the other rows are in other shards
        rows = np.minimum(rows, capacity)
    if (rows > capacity).any():
        worst = active[int(rows.argmax())]
        hint = "" if total_lengths else " (lengths that count the new ones are k_total_lengths)"
        raise ValueError(
            f"{lengths_name} must, with the new tokens, fit pages_per_seq * page_size = {capacity} "
            f"{'keys' if shape.kpool == 1 else f'rows of {shape.kpool} tokens'}; "
            f"got {cached[worst]} cached and {new[worst]} new in sequence {worst}{hint}"
        )
    pages = -(-rows // page_size)
    table = _to_host(arrays["k_lookup_table"])[active].astype(np.int64)
    used = np.arange(pages_per_seq) < pages[:, None]
    if shape.sharded:  # no block: the page is in another shard
        used &= (table != _NO_BLOCK) & (table != -1)
    bad = np.argwhere(used & ((table < 0) | (table >= num_blocks)))
    if bad.size:
        row, page = bad[0]
        raise ValueError(
            f"k_lookup_table must name blocks below num_blocks ({num_blocks}) in its used pages; "
            f"got {table[row, page]} at [{active[row]}, {page}]"
        )
    xp, k_scales = namespace_of(arrays["k_scales"]), arrays["k_scales"]
    for row, sequence in enumerate(active):
        blocks = xp.asarray(table[row, used[row]])
        filled = rows[row] - page_size * np.flatnonzero(used[row])  # rows from each page on
        in_use = xp.arange(page_size) < xp.asarray(filled)[:, None]
        scales = k_scales[blocks, 0, layer][in_use]
        wrong = ~(xp.isfinite(scales) & (scales >= 0))
        if wrong.any():
            raise ValueError(
                "k_scales must be finite and >= 0; "
                f"got {float(scales[wrong][0])} in sequence {sequence}"
            )


def check_lengths(lengths: Array, columns: int) -> None:
    """Raise on row lengths below 0 or above ``columns``."""
    values = _to_host(lengths).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > columns):
        raise ValueError(
            f"lengths must be from 0 to the {columns} columns of scores; "
            f"got {values.min()} to {values.max()}"
        )
