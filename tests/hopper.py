"""What Hopper's FP8 tensor cores and `index_scores_sm90` compute, bit for bit, in NumPy.

The accumulation is the published model (32 products at a time, aligned to the largest exponent with
13 fraction bits kept, the rest cut off), with what an H200 showed beyond it: the exponent of a
product is the sum of its factors', even where the product needs one more, and what is carried on to
the next 32 products is itself cut to 13 fraction bits.
"""

from __future__ import annotations

import numpy as np

from mla_fp8.cli.oracle import E4M3

FRACTION_BITS = 13
_NOTHING = -10_000  # below every exponent


def _exponent(x: np.ndarray) -> np.ndarray:
    """Floor of log2; far below everything for 0."""
    return np.where(x == 0, _NOTHING, np.frexp(x)[1] - 1)


def _cut(x: np.ndarray, exponent: np.ndarray, bits: int) -> np.ndarray:
    """Towards zero, to so many bits below 2 ** exponent."""
    unit = np.ldexp(1.0, np.maximum(exponent, -500) - bits)
    return np.trunc(x / unit) * unit


def dot_products(
    q: np.ndarray, keys: np.ndarray, step: int = 32, bits: int = FRACTION_BITS
) -> np.ndarray:
    """[n, D] and [S, D] E4M3 codes -> [n, S] float32; NaN where either holds a NaN.

    ``step`` products at a time are cut to so many bits; by default as in FP8 products of Hopper.
    """
    q, keys = E4M3[q], E4M3[keys]
    total = np.zeros((len(q), len(keys)))
    nan = np.isnan(q).any(1)[:, None] | np.isnan(keys).any(1)
    q, keys = np.nan_to_num(q), np.nan_to_num(keys)
    for d in range(0, q.shape[1], step):
        a, b = q[:, None, d : d + step], keys[None, :, d : d + step]
        largest = np.maximum((_exponent(a) + _exponent(b)).max(-1), _exponent(total))
        total = _cut(a * b, largest[..., None], bits).sum(-1) + _cut(total, largest, bits)
        total = _cut(total, _exponent(total), bits)
    return np.where(nan, np.nan, total).astype(np.float32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c, rounded once: in float64 rounded to odd, which leaves 29 bits to spare."""
    product = a.astype(np.float64) * b.astype(np.float64)
    c = c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even & np.isfinite(total), odd, total).astype(np.float32)


def scores(q, gates, keys, scales) -> np.ndarray:
    """[n, H, D] codes, [n, H], [S, D] codes, [S] -> [n, S], added in the kernel's order."""
    tokens, heads, _ = q.shape
    assert heads % 8 == 0, "heads are added in groups of 8"
    chains = 2 if heads == 128 else 1
    lanes = np.zeros((4, chains, tokens, len(keys)), np.float32)
    for j in range(heads // 8):
        for lane in range(4):
            for e in range(2):
                h = 8 * j + 2 * lane + e
                positive = np.fmax(dot_products(q[:, h], keys), np.float32(0))
                part = lanes[lane, j % chains]
                part[...] = fma(np.broadcast_to(gates[:, h, None], part.shape), positive, part)
    lane = lanes[:, 0] + lanes[:, 1] if chains == 2 else lanes[:, 0]
    return scales * ((lane[0] + lane[1]) + (lane[2] + lane[3]))
