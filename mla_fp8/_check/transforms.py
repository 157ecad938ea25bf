"""Checks of the functions that transform rows of numbers before they are quantised."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mla_fp8._check.arrays import FLOAT, Array, Axis, check_array, check_contiguous, dtype_names
from mla_fp8._check.interop import as_arrays, as_bits
from mla_fp8._check.parameters import (
    DEPTHS,
    KPOOL_RANGE,
    MAX_HEADS,
    brief,
    check_bool,
    check_int,
    either,
)
from mla_fp8._check.shape import MOST

NUMBERS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
_BITS = (np.dtype(np.int16),)
_WEIGHTS = {"weights": FLOAT}
_SCALE = "a finite number"
_MOST_SCALE = float(np.finfo(np.float32).max)


def as_numbers(
    name: str, obj: Any, others: dict[str, Any], dtypes: dict[str, tuple[Any, ...]]
) -> dict[str, Array]:
    """``obj``, whose dtype is one of `NUMBERS`, and other arrays, on one device.

    bfloat16 becomes uint16, its bits, because CuPy has no bfloat16. ``dtypes`` is for `as_arrays`.
    """
    bits, is_bfloat16 = as_bits(name, obj)
    dtypes = {**dtypes, name: _BITS if is_bfloat16 else NUMBERS}
    _, arrays = as_arrays({name: bits, **others}, dtypes)
    array = arrays[name]
    if not is_bfloat16 and array.dtype not in NUMBERS[1:]:
        raise ValueError(f"{name} must be {dtype_names(NUMBERS)}; got {brief(array.dtype)}")
    check_contiguous(name, array)
    return arrays | {name: array.view(np.uint16)} if is_bfloat16 else arrays


def check_rows(x: Any) -> Array:
    """The rows of `hadamard`, as `as_numbers` has them."""
    x = as_numbers("x", x, {}, {})["x"]
    if x.ndim == 0 or x.shape[-1] not in DEPTHS:
        raise ValueError(f"x must be [..., depth] with a depth of {either(DEPTHS)}; got {x.shape}")
    return x


class Rotation(NamedTuple):
    """A checked call of `rope`."""

    x: Array  # [tokens, heads, depth] or [tokens, depth]; see `as_numbers`
    cos: Array  # float32 [tokens, angles]
    sin: Array
    interleaved: bool


def check_rotation(x: Any, cos: Any, sin: Any, interleaved: Any) -> Rotation:
    """Check a call of `rope`."""
    interleaved = check_bool("interleaved", interleaved)
    arrays = as_numbers("x", x, {"cos": cos, "sin": sin}, {"cos": FLOAT, "sin": FLOAT})
    x = arrays["x"]
    if x.ndim not in (2, 3) or max(x.shape) > MOST:
        raise ValueError(
            f"x must be [tokens, heads, depth] or [tokens, depth]; got shape {x.shape}"
        )
    tokens, depth = int(x.shape[0]), int(x.shape[-1])
    if depth % 2:
        raise ValueError(f"x must have an even depth; got {depth}")
    check_array("cos", arrays["cos"], FLOAT, (("tokens", tokens), "angles"))
    angles = int(arrays["cos"].shape[1])
    check_array("sin", arrays["sin"], FLOAT, (("tokens", tokens), ("angles", angles)))
    if 2 * angles > depth:
        raise ValueError(f"cos must have at most depth / 2 = {depth // 2} angles; got {angles}")
    return Rotation(x, arrays["cos"], arrays["sin"], interleaved)


class Pooling(NamedTuple):
    """A checked call of `pool_keys`, without the tokens after the last whole pool."""

    keys: Array  # [pools * pool, width]; see `as_numbers`
    weights: Array | None  # float32, the shape of keys
    pool: int


def check_pooling(keys: Any, kpool: Any, weights: Any) -> tuple[Pooling, tuple[int, ...]]:
    """Check a call of `pool_keys`; also return the shape of its result."""
    pool = check_int("kpool", kpool, KPOOL_RANGE)
    arrays = as_numbers("keys", keys, {} if weights is None else {"weights": weights}, _WEIGHTS)
    keys, weights = arrays["keys"], arrays.get("weights")
    if keys.ndim not in (2, 3) or max(keys.shape) > MOST:
        raise ValueError(
            f"keys must be [tokens, kv_heads, depth] or [tokens, depth]; got shape {keys.shape}"
        )
    if math.prod(keys.shape[1:]) > MOST:
        raise ValueError(f"keys must have kv_heads * depth <= {MOST}; got shape {keys.shape}")
    if weights is not None:
        axes: tuple[Axis, ...] = (("tokens", int(keys.shape[0])),)
        axes += tuple(map(int, keys.shape[1:]))
        check_array("weights", weights, FLOAT, axes)
    pools = int(keys.shape[0]) // pool
    used = pools * pool
    rows = keys[:used].reshape(used, -1) if used else keys[:0]
    if weights is not None:
        weights = weights[:used].reshape(used, -1) if used else weights[:0]
    return Pooling(rows, weights, pool), (pools, *keys.shape[1:])


class Queries(NamedTuple):
    """A checked call of `quantize_queries`."""

    q: Array  # [tokens, heads, depth]; see `as_numbers`
    weights: Array  # float32 [tokens, heads]
    head_scale: np.float32
    softmax_scale: np.float32
    power_of_two: bool


def check_queries(
    q: Any, weights: Any, softmax_scale: Any, head_scale: Any, power_of_two: Any
) -> Queries:
    """Check a call of `quantize_queries`."""
    power_of_two = check_bool("power_of_two", power_of_two)
    arrays = as_numbers("q", q, {"weights": weights}, _WEIGHTS)
    q = arrays["q"]
    if q.ndim != 3 or q.shape[2] not in DEPTHS or not 1 <= q.shape[1] <= MAX_HEADS:
        raise ValueError(
            f"q must be [total_seq_len, num_heads, depth] with 1 to {MAX_HEADS} heads and a depth "
            f"of {either(DEPTHS)}; got {q.shape}"
        )
    tokens, heads, depth = map(int, q.shape)
    if tokens > MOST // heads:
        raise ValueError(f"q must have total_seq_len <= {MOST // heads}; got {tokens}")
    axes = ("total_seq_len", tokens), ("num_heads", heads)
    check_array("weights", arrays["weights"], FLOAT, axes)
    scales = (
        _check_scale("head_scale", head_scale, heads**-0.5),
        _check_scale("softmax_scale", softmax_scale, depth**-0.5),
    )
    return Queries(q, arrays["weights"], *scales, power_of_two)


def _check_scale(name: str, value: Any, default: float) -> np.float32:
    """``value`` or, if it is None, the default, as float32."""
    if value is None:
        return np.float32(default)
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be {_SCALE}, on the host; got {type(value).__name__}")
    if not -_MOST_SCALE <= value <= _MOST_SCALE:
        raise ValueError(f"{name} must be {_SCALE}; got {brief(value)}")
    return np.float32(value)
