"""E4M3 numbers: encode, decode, and quantise with one scale per granule of channels.

E4M3FN of the OCP 8-bit floating point specification: 1 sign, 4 exponent (bias 7) and 3 mantissa
bits, no infinity, NaN where the low seven bits are all set, magnitudes from 2**-9 to 448.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_fp8._check.arrays import CODES, FLOAT, FP8, Array, cast_hint, check_aligned, namespace_of
from mla_fp8._check.interop import as_array, as_floats
from mla_fp8._check.parameters import check_int
from mla_fp8._check.streams import in_order

E4M3_MAX = 448.0
_NAN_CODE = 0x7F
_POSITIVE = range(1, 2**31)
_SMALLEST_NORMAL = 2.0**-6
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # a subnormal scale would lose bits
_DECODED = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def _readable(name: str, array: Array) -> Array:
    """``array``, or an error that names it if its elements are misaligned."""
    check_aligned(name, array)
    return array


@in_order("x")
def encode(x: Any) -> Array:
    """Return the E4M3 codes of ``x``.

    Parameters
    ----------
    x : array of float, any shape
        An array of NumPy or CuPy, or one that they can read; bfloat16 too.

    Returns
    -------
    uint8, the shape of ``x``
        An array of the library of ``x``. Numbers are rounded to nearest, ties to even. Magnitudes
        above 448, infinity included, saturate. NaN becomes 0x7F.

    Raises
    ------
    ValueError, TypeError
        If ``x`` is not such an array.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import fp8
    >>> fp8.encode(np.array([1.0, -2.0, 1000.0], np.float32))
    array([ 56, 192, 126], dtype=uint8)
    """
    x = _readable("x", as_floats("x", x))
    xp = namespace_of(x)
    x = x.astype(np.float32)
    magnitude = xp.minimum(xp.abs(x), np.float32(E4M3_MAX))
    bits = magnitude.view(np.uint32)
    # Round 23 mantissa bits to 3, then change the exponent's bias from 127 to 7.
    normal = (bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) >> 20
    normal = normal - np.uint32((127 - 7) << 3)
    # Below 2**-6 a code counts multiples of 2**-9; code 8 is the first normal number, 2**-6.
    subnormal = xp.rint(xp.where(magnitude < _SMALLEST_NORMAL, magnitude, np.float32(0)) * 512)
    codes = xp.where(magnitude < _SMALLEST_NORMAL, subnormal.astype(np.uint32), normal)
    codes = codes | (xp.signbit(x).astype(np.uint32) << 7)
    return xp.where(xp.isnan(x), np.uint32(_NAN_CODE), codes).astype(np.uint8)


@in_order("values")
def decode(values: Any) -> Array:
    """Return the numbers of E4M3 codes.

    Parameters
    ----------
    values : float8_e4m3fn or uint8, any shape
        Codes.

    Returns
    -------
    float32, the shape of ``values``

    Raises
    ------
    ValueError, TypeError
        If ``values`` is not such an array.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import fp8
    >>> fp8.decode(np.array([56, 192, 126], np.uint8))
    array([  1.,  -2., 448.], dtype=float32)
    """
    values = _readable("values", as_array("values", values))
    if values.dtype not in CODES:
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
        As for `encode`. Infinity and NaN do not affect the scale: infinity saturates, NaN stays.
    granularity : int, optional
        Channels per scale, a divisor of ``depth``; by default ``depth``.
    power_of_two : bool
        Round each scale up to a power of two, so that dividing by it is exact.

    Returns
    -------
    values : float8_e4m3fn, [..., depth]
        uint8 if the library has no such dtype, as CuPy.
    scales : float32, [..., depth // granularity]
        The largest finite magnitude of a granule divided by 448, at least 2**-126; 1 if the whole
        granule is zero or subnormal. ``x`` is about ``values * scales``.

    Raises
    ------
    ValueError, TypeError
        If ``x`` is not a float array with at least one axis, or ``granularity`` does not divide
        ``depth``.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import fp8
    >>> values, scales = fp8.quantize(np.array([[896.0, 2.0, -4.0, 0.0]], np.float32))
    >>> scales
    array([[2.]], dtype=float32)
    >>> values.astype(np.float32)
    array([[448.,   1.,  -2.,   0.]], dtype=float32)
    """
    x = _readable("x", as_floats("x", x))
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
    # Subnormal granules count as zero on both backends, because CuPy's kernels flush subnormals.
    scales = xp.where(amax >= np.float32(_SMALLEST_SCALE), scales, np.float32(1))
    codes = encode(granules / scales[..., None]).reshape(x.shape)
    return (codes.view(FP8) if xp is np else codes), scales


@in_order("values")
def dequantize(values: Any, scales: Any) -> Array:
    """Return ``values * scales``, which undoes `quantize` up to rounding.

    Parameters
    ----------
    values : float8_e4m3fn or uint8, [..., depth]
    scales : float32, [..., groups]
        ``groups`` divides ``depth``.

    Returns
    -------
    float32, [..., depth]

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import fp8
    >>> fp8.dequantize(*fp8.quantize(np.array([[896.0, 2.0, -4.0, 0.0]], np.float32)))
    array([[896.,   2.,  -4.,   0.]], dtype=float32)
    """
    numbers = decode(as_array("values", values))
    scales = _readable("scales", as_array("scales", scales))
    groups = scales.shape[-1] if scales.ndim else 0
    fits = scales.shape[:-1] == numbers.shape[:-1] and groups and numbers.shape[-1] % groups == 0
    if scales.dtype != np.float32 or not fits:
        raise ValueError(
            f"scales must be float32 [..., groups] beside values {numbers.shape}; got "
            f"{scales.dtype} {scales.shape}{cast_hint(scales.dtype.name, FLOAT)}"
        )
    width = numbers.shape[-1] // groups
    granules = numbers.reshape(*scales.shape, width) * scales[..., None]
    return granules.reshape(numbers.shape)
