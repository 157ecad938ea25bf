"""Pooled keys: the tokens behind selected rows of a cache whose rows stand for several tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_fp8._check.arrays import (
    INDEX,
    Array,
    check_array,
    check_writable,
    device_of,
    empty_beside,
    namespace_of,
)
from mla_fp8._check.interop import as_arrays
from mla_fp8._check.parameters import KPOOL_RANGE, Mask, check_int, check_mask
from mla_fp8._check.shape import MOST
from mla_fp8._check.streams import in_order, is_capturing, takes_from_pool
from mla_fp8._check.values import wants_check

_INT = (np.dtype(np.int32),)
_NOTHING = -(2**40)  # tokens that a token of no sequence sees, before it is clamped to 0


@in_order("rows")
def expand_pools(
    rows: Any,
    input_row_offsets: Any,
    k_cache_lengths: Any,
    kpool: int,
    *,
    k_total_lengths: Any = None,
    mask: Mask | str = Mask.CAUSAL,
    out: Any = None,
    check: bool | None = None,
) -> Any:
    """Return the token positions of selected rows of pooled keys, and of the tail after them.

    Row ``j`` of a pooled cache stands for the tokens ``kpool * j`` to ``kpool * j + kpool - 1``.
    A token's tail is what it sees after its last whole row: at most ``kpool - 1`` tokens, for which
    there is no row yet.

    Parameters
    ----------
    rows : int32, [total_seq_len, k]
        Positions of rows, from an operator with this ``kpool`` and ``sort="position"``: each row
        of the array ascends and is padded with -1.
    input_row_offsets, k_cache_lengths
        Those of the call that selected the rows. They count tokens.
    kpool : int
        Tokens that a cached row stands for, 1 to 64.
    k_total_lengths : uint32 or int32, [batch], optional
        Lengths that count the new tokens, if the call had them; ``k_cache_lengths`` must be None.
    mask : {"causal", "null"} or Mask
        The mask of the call.
    out : int32, [total_seq_len, k * kpool + kpool - 1], optional
        Where to write.
    check : bool, optional
        Whether to read the values of the arrays and raise on wrong ones; by default only on the
        host. Unchecked, offsets and lengths are clamped as in the call; wrong rows give wrong
        tokens.

    Returns
    -------
    int32, [total_seq_len, k * kpool + kpool - 1]
        The tokens of the rows, then the tail, in ascending order; then -1.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it, and nothing has been written.
    RuntimeError
        If a CUDA graph is being captured, and CuPy takes memory from its default pool. torch's
        tensors use torch's memory, which a graph of torch keeps.

    Examples
    --------
    A token that sees 11 tokens sees two whole rows of 4, and a tail of 3:

    >>> import numpy as np
    >>> from mla_fp8 import expand_pools
    >>> rows, offsets = np.array([[1, -1]], np.int32), np.array([0, 1], np.uint32)
    >>> expand_pools(rows, offsets, np.array([10], np.uint32), 4)
    array([[ 4,  5,  6,  7,  8,  9, 10, -1, -1, -1, -1]], dtype=int32)
    """
    kpool = check_int("kpool", kpool, KPOOL_RANGE)
    causal = check_mask(mask) is Mask.CAUSAL
    if k_total_lengths is not None and k_cache_lengths is not None:
        raise TypeError("k_cache_lengths must be None beside k_total_lengths; got both")
    total = k_total_lengths is not None
    name = "k_total_lengths" if total else "k_cache_lengths"
    given = {"rows": rows, "input_row_offsets": input_row_offsets}
    given[name] = k_total_lengths if total else k_cache_lengths
    dtypes = {"rows": _INT, "input_row_offsets": INDEX, name: INDEX, "out": _INT}
    xp, arrays = as_arrays(given if out is None else given | {"out": out}, dtypes)
    check_array("rows", arrays["rows"], _INT, ("total_seq_len", "k"))
    check_array(name, arrays[name], INDEX, ("batch",))
    batch = arrays[name].size
    check_array(
        "input_row_offsets", arrays["input_row_offsets"], INDEX, (("batch + 1", batch + 1),)
    )
    rows, offsets, lengths = (arrays[key] for key in given)
    tokens, k = rows.shape
    width = k * kpool + kpool - 1
    if out is not None:
        axes = ("total_seq_len", tokens), ("k * kpool + kpool - 1", width)
        check_array("out", arrays["out"], _INT, axes)
        check_writable({"out": arrays["out"]}, {key: arrays[key] for key in given})
    with device_of(rows):
        if xp is not np and is_capturing(xp.cuda.get_current_stream()) and takes_from_pool():
            raise RuntimeError(
                "expand_pools allocates memory, so a CUDA graph that captures it must have a pool "
                "(cupy.cuda.MemoryPool) that lives as long as the graph; got CuPy's default pool, "
                "which would give the memory to others while the graph still uses it"
            )
        bounds = _running_maximum(xp.clip(offsets.astype(np.int64), 0, tokens))
        seen = _tokens_seen(lengths.astype(np.int64), bounds, tokens, causal, total)
        if wants_check(check, xp):
            _check_values(name, offsets, lengths, total, rows, seen // kpool)
        result = arrays["out"] if out is not None else empty_beside(rows, (tokens, width), np.int32)
        _expand(rows, seen, kpool, result)
    return result if out is None else out


def _running_maximum(numbers: Array) -> Array:
    """The maximum of all numbers up to each, in place; CuPy has no ``maximum.accumulate``."""
    xp, step = namespace_of(numbers), 1
    while step < numbers.size:
        numbers[step:] = xp.maximum(numbers[step:], numbers[:-step])
        step *= 2
    return numbers


def _tokens_seen(lengths: Array, offsets: Array, tokens: int, causal: bool, total: bool) -> Array:
    """How many tokens each new token sees; 0 if it is in no sequence."""
    xp = namespace_of(lengths)
    by_last = lengths if total else lengths + offsets[1:] - offsets[:-1]
    token = xp.arange(tokens)
    # Tokens before the first sequence have -1 here, those behind the last one the batch size; both
    # index the last entry. (CuPy's concatenate would copy from the host, which stops a capture.)
    sequence = xp.searchsorted(offsets, token, side="right") - 1
    known = xp.full(offsets.size, _NOTHING, np.int64)
    known[:-1] = by_last - offsets[1:] if causal else by_last
    seen = known[sequence]
    return xp.clip(seen + token + 1 if causal else seen, 0, MOST)


def _expand(rows: Array, seen: Array, kpool: int, out: Array) -> None:
    """Write the tokens of the rows and the tail."""
    xp, (tokens, k) = namespace_of(rows), rows.shape
    inside = xp.arange(kpool, dtype=np.int32)
    row = rows[:, :, None]
    expanded = xp.where(row >= 0, row * np.int32(kpool) + inside, np.int32(-1))
    out[:, : k * kpool] = expanded.reshape(tokens, k * kpool)
    out[:, k * kpool :] = -1
    if kpool > 1:
        first = seen // kpool * kpool
        tail = first[:, None] + inside[:-1]
        place = ((rows >= 0).sum(axis=1) * kpool)[:, None] + inside[:-1]
        tail = xp.where(tail < seen[:, None], tail, -1).astype(np.int32)
        out[xp.arange(tokens)[:, None], place] = tail


def _check_values(
    lengths_name: str, offsets: Array, lengths: Array, total: bool, rows: Array, pools: Array
) -> None:
    """Raise on offsets, lengths or rows that no call can have; ``pools``: whole rows seen."""

    def host(array: Array) -> np.ndarray:
        there = array if isinstance(array, np.ndarray) else array.get()
        return there.astype(np.int64)

    offsets, lengths, rows, pools = map(host, (offsets, lengths, rows, pools))
    new = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(rows) or (new < 0).any():
        raise ValueError(
            f"input_row_offsets must start at 0, never decrease and end at total_seq_len "
            f"({len(rows)}); got {offsets[:3].tolist()} ... {offsets[-1]}"
        )
    cached = lengths - new * total
    if (cached < 0).any():
        worst = int(cached.argmin())
        least = f"the {new[worst]} new tokens" if total else "0"
        raise ValueError(
            f"{lengths_name} must be at least {least}; got {lengths[worst]} in sequence {worst}"
        )
    padding = rows == -1
    filled = np.where(padding, 2**31, rows)
    wrong = ~padding & ((rows < 0) | (rows >= pools[:, None]))
    wrong[:, 1:] |= ~padding[:, 1:] & (np.diff(filled, axis=1) <= 0)
    if wrong.any():
        token, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"rows must ascend below the {pools[token]} whole rows that the token sees, then be -1 "
            f"(as with sort='position'); got {rows[token, column]} at [{token}, {column}]"
        )
