"""E4M3 numbers: encode, decode, and quantisation with one scale per granule.

E4M3FN of the OCP 8-bit floating point specification: 1 sign, 4 exponent (bias 7) and 3 mantissa
bits, no infinity, NaN where the low seven bits are all set, magnitudes from 2**-9 to 448.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_fp8._check.arrays import (
    FP8,
    Array,
    as_array,
    as_floats,
    cast_hint,
    check_aligned,
    namespace_of,
)
from mla_fp8._check.parameters import check_int
from mla_fp8._streams import in_order

E4M3_MAX = 448.0
_NAN_CODE = 0x7F
_POSITIVE = range(1, 2**31)
_SMALLEST_NORMAL = 2.0**-6
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # a subnormal scale would lose bits
_DECODED = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def _elements(name: str, array: Array) -> Array:
    """An array, if its elements can be read where they are."""
    check_aligned(name, array)
    return array


@in_order("x")
def encode(x: Any) -> Array:
    """E4M3 codes of ``x``.

    Parameters
    ----------
    x : array of float, any shape
        NumPy or CuPy, or exchangeable with them; bfloat16 too. The result is of its library.

    Returns
    -------
    array of uint8, the shape of ``x``
        Rounded to nearest, ties to even. Magnitudes beyond 448, infinity included, saturate;
        NaN becomes 0x7F.
    """
    x = _elements("x", as_floats("x", x))
    xp = namespace_of(x)
    x = x.astype(np.float32)
    magnitude = xp.minimum(xp.abs(x), np.float32(E4M3_MAX))
    bits = magnitude.view(np.uint32)
    # Round 23 mantissa bits to 3, then move the exponent's bias from 127 to 7.
    normal = (bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) >> 20
    normal = normal - np.uint32((127 - 7) << 3)
    # Below 2**-6 the codes count multiples of 2**-9, and 8 of them are the first normal number.
    subnormal = xp.rint(xp.where(magnitude < _SMALLEST_NORMAL, magnitude, np.float32(0)) * 512)
    codes = xp.where(magnitude < _SMALLEST_NORMAL, subnormal.astype(np.uint32), normal)
    codes = codes | (xp.signbit(x).astype(np.uint32) << 7)
    return xp.where(xp.isnan(x), np.uint32(_NAN_CODE), codes).astype(np.uint8)


@in_order("values")
def decode(values: Any) -> Array:
    """The float32 numbers that E4M3 codes stand for.

    Parameters
    ----------
    values : array of float8_e4m3fn or uint8, any shape
        Codes.

    Returns
    -------
    array of float32, the shape of ``values``
    """
    values = _elements("values", as_array("values", values))
    if values.dtype not in (FP8, np.dtype(np.uint8)):
        raise ValueError(f"values must be float8_e4m3fn or uint8; got {values.dtype.name}")
    xp = namespace_of(values)
    return xp.take(xp.asarray(_DECODED), values.view(np.uint8))


@in_order("x", codes=True)
def quantize(
    x: Any, granularity: int | None = None, *, power_of_two: bool = False
) -> tuple[Array, Array]:
    """Quantise to E4M3 with one float32 scale per ``granularity`` channels.

    Parameters
    ----------
    x : array of float, [..., depth]
        As for `encode`. Non-finite entries do not affect the scale: infinity saturates, NaN stays.
    granularity : int, optional
        Channels per scale, a divisor of ``depth``; all of them by default.
    power_of_two : bool
        Round each scale up to a power of two, so that scaling is exact.

    Returns
    -------
    values : float8_e4m3fn, or uint8 where the library has no such dtype (CuPy), [..., depth]
    scales : float32, [..., depth // granularity]
        amax / 448, at least 2**-126, so that ``x`` is about ``values * scale``; 1 where a granule
        is all zero or subnormal.

    Raises
    ------
    ValueError
        If ``x`` is no float array with a last axis, or ``granularity`` does not divide it.

    Examples
    --------
    >>> import numpy as np
    >>> values, scales = quantize(np.array([[448.0, 1.0, -2.0, 0.0]], np.float32))
    >>> scales
    array([[1.]], dtype=float32)
    """
    x = _elements("x", as_floats("x", x))
    xp = namespace_of(x)
    if x.ndim == 0 or not (np.issubdtype(x.dtype, np.floating) or "float" in x.dtype.name):
        raise ValueError(f"x must be a float array [..., depth]; got {x.dtype.name} {x.shape}")
    depth = x.shape[-1]
    width = depth if granularity is None else check_int("granularity", granularity, _POSITIVE)
    if width < 1 or depth % width:
        raise ValueError(f"granularity must divide depth ({depth}); got {granularity}")
    granules = x.astype(np.float32).reshape(*x.shape[:-1], depth // width, width)
    finite = xp.where(xp.isfinite(granules), xp.abs(granules), np.float32(0))
    amax = finite.max(axis=-1)
    scales = xp.maximum(amax / np.float32(E4M3_MAX), np.float32(_SMALLEST_SCALE))
    if power_of_two:
        mantissa, exponent = xp.frexp(scales)  # mantissa in [0.5, 1)
        scales = xp.ldexp(xp.ones_like(scales), exponent - (mantissa == 0.5))
    # Subnormal granules count as zero: CuPy's own kernels flush them, and both backends agree.
    scales = xp.where(amax >= np.float32(_SMALLEST_SCALE), scales, np.float32(1))
    codes = encode(granules / scales[..., None]).reshape(x.shape)
    return (codes.view(FP8) if xp is np else codes), scales


@in_order("values")
def dequantize(values: Any, scales: Any) -> Array:
    """Undo `quantize`, up to rounding.

    Parameters
    ----------
    values : float8_e4m3fn or uint8, [..., depth]
    scales : float32, [..., groups], ``groups`` dividing ``depth``

    Returns
    -------
    array of float32, [..., depth]
    """
    numbers = decode(as_array("values", values))
    scales = _elements("scales", as_array("scales", scales))
    groups = scales.shape[-1] if scales.ndim else 0
    fits = scales.shape[:-1] == numbers.shape[:-1] and groups and numbers.shape[-1] % groups == 0
    if scales.dtype != np.float32 or not fits:
        raise ValueError(
            f"scales must be float32 [..., groups] beside values {numbers.shape}; got "
            f"{scales.dtype} {scales.shape}{cast_hint(scales.dtype.name, (np.dtype(np.float32),))}"
        )
    width = numbers.shape[-1] // groups
    granules = numbers.reshape(*scales.shape, width) * scales[..., None]
    return granules.reshape(numbers.shape)
