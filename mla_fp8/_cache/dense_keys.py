"""Keys that a caller gives one array per sequence, on their way into pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mla_fp8._check.arrays import Array, check_aligned, is_array, namespace_of
from mla_fp8._check.interop import as_arrays, as_floats

_PLAIN = tuple(map(np.dtype, (np.float16, np.float32, np.float64)))
_JOINED_AT_ONCE = 1 << 20  # numbers: short sequences are joined in a copy of at most this size


def as_list(keys: Sequence[Any]) -> list[Any]:
    """The arrays of ``keys``."""
    try:
        return list(keys)
    except TypeError:
        raise TypeError(f"keys must be a sequence of arrays; got {type(keys).__name__}") from None


def as_keys(keys: Sequence[Any], cache: Array | None = None, of_layer: bool = False) -> list[Array]:
    """Each sequence's keys as [num_layers, length, kv_heads, depth], on the device of ``cache``.

    ``of_layer``: they are [length, kv_heads, depth] of one layer.
    """
    given = {f"keys[{i}]": _floats(f"keys[{i}]", value) for i, value in enumerate(keys)}
    if not given:
        return []
    _, arrays = as_arrays(given if cache is None else {"the cache": cache} | given)
    axes = "length, kv_heads, depth" if of_layer else "num_layers, length, kv_heads, depth"
    shaped = []
    for name in given:
        array = arrays[name]
        check_aligned(name, array)
        if not _is_float(array.dtype) or array.ndim not in (2, 3 if of_layer else 4):
            raise ValueError(
                f"{name} must be a float array [length, depth] or [{axes}]; "
                f"got {array.dtype} {array.shape}"
            )
        if array.ndim == 2:
            array = array[:, None]
        shaped.append(array if array.ndim == 4 else array[None])
    return shaped


def _floats(name: str, value: Any) -> Any:
    """`as_floats` where it is needed: a decode step has many small arrays."""
    return value if is_array(value) and value.dtype in _PLAIN else as_floats(name, value)


def _is_float(dtype: Any) -> bool:
    return dtype in _PLAIN or ("float" in dtype.name and "float8" not in dtype.name)


def joined(arrays: list[Array], slots: Array) -> Iterator[tuple[Array, Array]]:
    """Yield C-contiguous keys, float16 or float32 [num_layers, tokens, kv_heads, depth], and slots.

    Short sequences come together, because each pair is a call of `write_keys` for every layer. A
    long one comes alone, without a copy if that can be.
    """
    first = last = size = 0
    group: list[Array] = []
    for array in arrays:
        if group and size + array.size > _JOINED_AT_ONCE:
            yield _join(group), slots[first:last]
            first, size, group = last, 0, []
        if array.size:
            group.append(array)
            size += array.size
            last += array.shape[1]
    if group:
        yield _join(group), slots[first:last]


def _join(group: list[Array]) -> Array:
    xp = namespace_of(group[0])
    dtypes = {array.dtype for array in group}
    if len(dtypes) > 1 or dtypes.pop() not in (np.float16, np.float32):
        # NumPy has no common type for some pairs of float types, and cannot concatenate them.
        group = [array.astype(np.float32, copy=False) for array in group]
    return xp.ascontiguousarray(group[0] if len(group) == 1 else xp.concatenate(group, axis=1))
