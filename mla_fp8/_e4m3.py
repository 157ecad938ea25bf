"""E4M3 codes and scales of NumPy and CuPy arrays, which the caller has checked.

E4M3FN of the OCP 8-bit floating point specification: 1 sign, 4 exponent (bias 7) and 3 mantissa
bits, no infinity, NaN where the low seven bits are all set, magnitudes from 2**-9 to 448.
"""

from __future__ import annotations

import numpy as np

from mla_fp8._check.arrays import FP8, Array, namespace_of

E4M3_MAX = 448.0
_NAN_CODE = 0x7F
_SMALLEST_NORMAL = 2.0**-6
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # a subnormal scale would lose bits
_SMALL_SCALE = 2.0**-60  # beside a larger scale, a subnormal number has the code 0
_DECODED = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def encode(x: Array) -> Array:
    """Return the uint8 codes of floats."""
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


def decode(codes: Array) -> Array:
    """Return the float32 numbers of codes."""
    xp = namespace_of(codes)
    return xp.take(xp.asarray(_DECODED), codes.view(np.uint8))


def quantize(x: Array, width: int, power_of_two: bool) -> tuple[Array, Array]:
    """Return uint8 codes, and a float32 scale for each ``width`` channels of the last axis."""
    xp = namespace_of(x)
    granules = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // width, width)
    finite = xp.where(xp.isfinite(granules), xp.abs(granules), np.float32(0))
    amax = finite.max(axis=-1)
    scales = xp.maximum(amax / np.float32(E4M3_MAX), np.float32(_SMALLEST_SCALE))
    if power_of_two:
        mantissa, exponent = xp.frexp(scales)  # mantissa in [0.5, 1)
        scales = xp.ldexp(xp.ones_like(scales), exponent - (mantissa == 0.5))
    # Subnormal granules count as zero.
    scales = xp.where(amax >= np.float32(_SMALLEST_SCALE), scales, np.float32(1))
    divisors = scales[..., None]
    if xp is not np:
        is_small = divisors < np.float32(_SMALL_SCALE)
        granules = xp.where(is_small, _times_2_to_the_64(granules), granules)
        divisors = xp.where(is_small, divisors * np.float32(2.0**64), divisors)
    return encode(granules / divisors).reshape(x.shape), scales


def _times_2_to_the_64(x: Array) -> Array:
    """``x * 2**64``; CuPy's kernels would take a subnormal ``x`` for zero (-ftz=true)."""
    xp = namespace_of(x)
    bits = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
    counted = bits.astype(np.float32) * np.float32(2.0 ** (64 - 149))  # in units of 2**-149
    counted = xp.where(xp.signbit(x), -counted, counted)
    return xp.where(bits < np.uint32(0x00800000), counted, x * np.float32(2.0**64))
