"""E4M3 numbers, and the transforms that an indexer applies before it quantises.

E4M3FN of the OCP 8-bit floating point specification: 1 sign, 4 exponent (bias 7) and 3 mantissa
bits, no infinity, NaN where the low seven bits are all set, magnitudes from 2**-9 to 448.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_fp8 import _e4m3
from mla_fp8._backend import backend_of
from mla_fp8._check.arrays import (
    CODES,
    FLOAT,
    FP8,
    Array,
    cast_hint,
    check_aligned,
    empty_beside,
    namespace_of,
)
from mla_fp8._check.interop import as_array, as_floats
from mla_fp8._check.parameters import check_int
from mla_fp8._check.streams import in_order
from mla_fp8._check.transforms import check_rotation, check_rows

_POSITIVE = range(1, 2**31)


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
    return _e4m3.encode(_readable("x", as_floats("x", x)))


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
    return _e4m3.decode(values)


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
        The largest finite magnitude of the channels that share the scale, divided by 448, and at
        least 2**-126; 1 if all these channels are zero or subnormal. ``x`` is about
        ``values * scales``.

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
    if x.ndim == 0 or not (np.issubdtype(x.dtype, np.floating) or "float" in x.dtype.name):
        raise ValueError(f"x must be a float array [..., depth]; got {x.dtype.name} {x.shape}")
    depth = x.shape[-1]
    width = depth if granularity is None else check_int("granularity", granularity, _POSITIVE)
    if width < 1 or depth % width:
        raise ValueError(f"granularity must divide depth ({depth}); got {granularity}")
    codes, scales = _e4m3.quantize(x, width, power_of_two)
    return (codes.view(FP8) if namespace_of(codes) is np else codes), scales


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


@in_order("x")
def rope(x: Any, cos: Any, sin: Any, *, interleaved: bool) -> Array:
    """Rotate the first channels by the angles of their token (rotary position embedding).

    A pair (a, b) of channels becomes (a cos - b sin, b cos + a sin), in float32.

    Parameters
    ----------
    x : bfloat16, float16 or float32, [tokens, heads, depth] or [tokens, depth]
        ``depth`` is even. C-contiguous.
    cos, sin : float32, [tokens, angles]
        Cosines and sines of the angles for each token's position. The first ``2 * angles`` channels
        are rotated, and the others are copied.
    interleaved : bool
        True: pair ``j`` is the channels ``2 j`` and ``2 j + 1``. False (half-split): it is the
        channels ``j`` and ``j + angles``. DeepSeek-V3.2 has both: its indexer
        is half-split, on the first 64 of 128 channels, and its attention is interleaved.

    Returns
    -------
    float32, the shape of ``x``

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it.

    Notes
    -----
    NumPy and GPU give the same bits, except for the bits of a NaN. DeepSeek's code casts the result
    back to bfloat16, and so must a caller who wants its bits. The two styles are those of
    ``apply_rotary_emb`` in ``inference/model.py`` of DeepSeek-V3.2-Exp.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import fp8
    >>> x = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], np.float32)
    >>> quarter_turn = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    >>> fp8.rope(x, *quarter_turn, interleaved=True)
    array([[-2.,  1., -4.,  3.,  5.,  6.]], dtype=float32)
    >>> fp8.rope(x, *quarter_turn, interleaved=False)
    array([[-3., -4.,  1.,  2.,  5.,  6.]], dtype=float32)
    """
    rotation = check_rotation(x, cos, sin, interleaved)
    out = empty_beside(rotation.x, rotation.x.shape, np.float32)
    if out.size:
        backend_of(namespace_of(out)).rope(rotation, out)
    return out


@in_order("x")
def hadamard(x: Any) -> Array:
    """Return the orthonormal Walsh-Hadamard transform of the last axis, in float32.

    It is the product with the matrix of the entries
    ``(-1) ** popcount(i & j) * depth ** -0.5`` (natural order), which is its own inverse.
    DeepSeek-V3.2's indexer applies it to queries and keys after `rope` and before it quantises them
    (``rotate_activation`` in its ``inference/model.py``): dot products stay the same, and outliers
    are spread over all channels.

    Parameters
    ----------
    x : bfloat16, float16 or float32, [..., depth]
        ``depth`` is 32, 64, 128 or 256. C-contiguous.

    Returns
    -------
    float32, the shape of ``x``

    Raises
    ------
    ValueError, TypeError
        If ``x`` is not such an array.

    Notes
    -----
    NumPy and GPU give the same bits, except for the bits of a NaN. The numbers at distance 1, then
    2, 4 and so on, are replaced by their sums and differences. DeepSeek's code casts the result
    back to bfloat16, and so must a caller who wants its bits.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import fp8
    >>> fp8.hadamard(np.ones((1, 64), np.float32))[0, :3]
    array([8., 0., 0.], dtype=float32)
    """
    x = check_rows(x)
    out = empty_beside(x, x.shape, np.float32)
    if out.size:
        backend_of(namespace_of(out)).hadamard(x, out)
    return out
