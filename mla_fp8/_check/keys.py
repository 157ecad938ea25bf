"""Checks of `write_keys`: keys, the pool that they are written to, and the place of each token."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import (
    CODES,
    FLOAT,
    FP8,
    INDEX,
    Array,
    Axis,
    check_contiguous,
    check_form,
    check_pool,
    check_writable,
    device_of,
)
from mla_fp8._check.interop import check_mutable
from mla_fp8._check.parameters import (
    DEPTHS,
    MAX_HEADS,
    allowed_groups,
    check_bool,
    check_int,
    either,
)
from mla_fp8._check.shape import MOST, check_extent
from mla_fp8._check.transforms import as_numbers

_INT64 = np.dtype(np.int64)
_DTYPES: dict[str, tuple[Any, ...]] = {
    "k_blocks": CODES,
    "k_scales": FLOAT,
    "slots": (np.dtype(np.int32), _INT64),
    "sequences": (*INDEX, _INT64),
    "positions": (*INDEX, _INT64),
    "k_lookup_table": INDEX,
}
_PLACES = ("sequences", "positions", "k_lookup_table")
_POOL = ("num_blocks", 1, "num_layers", "page_size", "kv_heads")
_MOST_BLOCKS = 2**32 - 1
_MOST_PLACES = 2**31  # the kernel divides numbers below it by the page size
_MOST_PAGES_COMPARED = 1 << 20


class KeyWrite(NamedTuple):
    """A checked call of `write_keys`; the pool's arrays are those of the layer."""

    keys: Array  # float16, float32 or uint16 (the bits of bfloat16) [tokens, kv_heads, depth]
    k_blocks: Array  # uint8 [num_blocks, page_size, kv_heads, depth], blocks at any stride
    k_scales: Array  # float32 [num_blocks, page_size, kv_heads, groups], blocks at any stride
    power_of_two: bool
    places: tuple[Array, ...]  # slots; or sequences, positions and the lookup table


def check_key_write(
    keys: Any,
    k_blocks: Any,
    k_scales: Any,
    layer_idx: Any,
    places: dict[str, Any],
    power_of_two: Any,
) -> KeyWrite:
    """Check a call of `write_keys`; ``places`` are the arguments that say where a token goes."""
    power_of_two = check_bool("power_of_two", power_of_two)
    places = _one_way(places)
    check_mutable({"k_blocks": k_blocks, "k_scales": k_scales})
    others = {"k_blocks": k_blocks, "k_scales": k_scales, **places}
    arrays = as_numbers("keys", keys, others, _DTYPES)
    _check_forms(arrays)
    layer = check_int("layer_idx", layer_idx, range(arrays["k_blocks"].shape[2]))
    for name in places:
        check_contiguous(name, arrays[name])
    written = {name: arrays[name] for name in ("k_blocks", "k_scales")}
    for name, array in written.items():
        check_pages(name, array)
    check_writable(written, {name: arrays[name] for name in ("keys", *places)})
    pool, scales, keys = arrays["k_blocks"], arrays["k_scales"], arrays["keys"]
    with device_of(pool):
        return KeyWrite(
            keys.reshape(-1, *pool.shape[4:]),
            (pool.view(np.uint8) if pool.dtype == FP8 else pool)[:, 0, layer],
            scales[:, 0, layer],
            power_of_two,
            tuple(arrays[name] for name in places),
        )


def _one_way(places: dict[str, Any]) -> dict[str, Any]:
    """The place arguments that were given, if they are slots alone or the other three."""
    given = {name: value for name, value in places.items() if value is not None}
    if tuple(given) not in (("slots",), _PLACES):
        raise TypeError(
            "slots must be given alone, or sequences, positions and k_lookup_table in its place; "
            f"got {', '.join(given) or 'none of the four'}"
        )
    return given


def _check_forms(arrays: dict[str, Array]) -> None:
    """Check dtypes and shapes."""
    pool, scales, keys = arrays["k_blocks"], arrays["k_scales"], arrays["keys"]
    check_form("k_blocks", pool.dtype, pool.shape, CODES, (*_POOL, "depth"))
    blocks, _, layers, page_size, kv_heads, depth = map(int, pool.shape)
    if depth not in DEPTHS or not 1 <= kv_heads <= MAX_HEADS or layers < 1 or page_size < 1:
        raise ValueError(
            f"k_blocks must have num_layers and page_size >= 1, 1 to {MAX_HEADS} kv_heads and a "
            f"depth of {either(DEPTHS)}; got {pool.shape}"
        )
    page: tuple[Axis, ...] = ("num_blocks", blocks), 1, ("num_layers", layers)
    page += ("page_size", page_size), ("kv_heads", kv_heads)
    check_form("k_scales", scales.dtype, scales.shape, FLOAT, (*page, "groups"))
    allowed = allowed_groups(depth)
    if scales.shape[-1] not in allowed:
        raise ValueError(
            f"k_scales must have {either(allowed)} scales per key of depth {depth}; "
            f"got {scales.shape[-1]}"
        )
    fits = keys.shape[1:] == (kv_heads, depth) or (kv_heads == 1 and keys.shape[1:] == (depth,))
    if not fits:
        flat = f" or [tokens, {depth}]" if kv_heads == 1 else ""
        raise ValueError(
            f"keys must be [tokens, {kv_heads}, {depth}]{flat} beside k_blocks {pool.shape}; "
            f"got shape {keys.shape}"
        )
    tokens = int(keys.shape[0])
    for name in (name for name in ("slots", *_PLACES) if name in arrays):
        form: tuple[Axis, ...] = (("tokens", tokens),)
        if name == "k_lookup_table":
            form = ("batch", "pages_per_seq")
        check_form(name, arrays[name].dtype, arrays[name].shape, _DTYPES[name], form)
    extents = {("keys", "tokens"): (tokens, MOST // kv_heads)}
    if "slots" in arrays:
        extents["k_blocks", "num_blocks * page_size"] = (blocks * page_size, _MOST_PLACES)
    else:
        batch, pages = map(int, arrays["k_lookup_table"].shape)
        extents["k_blocks", "num_blocks"] = (blocks, _MOST_BLOCKS)
        extents["k_lookup_table", "batch"] = (batch, MOST)
        places = pages * page_size
        extents["k_lookup_table", "pages_per_seq * page_size"] = (places, _MOST_PLACES)
    for (name, axis), (extent, most) in extents.items():
        check_extent(name, axis, extent, most)


# ---- strided pools


def check_pages(name: str, array: Array) -> None:
    """Raise unless an array of pages passes `check_pool` and no two of its pages share a byte."""
    check_pool(name, array)
    (blocks, _, layers), (by_block, _, by_layer) = array.shape[:3], array.strides[:3]
    page = array.itemsize * math.prod(array.shape[3:])
    if array.size and _pages_overlap(blocks, by_block, layers, by_layer, page):
        raise ValueError(
            f"{name} must have pages that do not overlap; got strides {array.strides} "
            f"for shape {array.shape}"
        )


@lru_cache(maxsize=1024)
def _pages_overlap(n: int, by_n: int, m: int, by_m: int, size: int) -> bool:
    """Whether two of the pages at ``i * by_n + j * by_m``, i < n and j < m, share a byte."""
    if n < m:
        n, by_n, m, by_m = m, by_m, n, by_n
    (inner, count), (outer, others) = sorted([(abs(by_n), n), (abs(by_m), m)])
    if (count == 1 or inner >= size) and (others == 1 or outer >= inner * (count - 1) + size):
        return False
    if by_n == 0 or m > _MOST_PAGES_COMPARED:  # a pool with so many of both is taken to overlap
        return n > 1 or abs(by_m) < size
    # Compare page (0, 0) with the pages (i, j) that are nearest to it, for each j.
    j = np.arange(m, dtype=np.int64)
    below = -(j * by_m) // by_n
    for i in (below.clip(1 - n, n - 1), (below + 1).clip(1 - n, n - 1)):
        distance = np.abs(i * by_n + j * by_m)
        if (distance[(i != 0) | (j != 0)] < size).any():
            return True
    return False
