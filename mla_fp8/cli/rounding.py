"""How far scores may be from the exact scores, derived from how NumPy and the kernels add.

Products of E4M3 numbers are exact everywhere. Errors come from sums and from the products with
gates and scales. No score comes near the limits of float32: the largest that the fuzzer draws are
below 2 ** 70.
"""

from __future__ import annotations

from enum import Enum

import numpy as np

_FLOAT32 = 2.0**-24  # largest relative error of one rounding
_FLOAT64 = 2.0**-53
_LEAST = 2.0**-149  # above the error of one rounding of a subnormal number
# Rounded numbers are rounded again. In NumPy, float64 sums over heads also err, by less than
# 2 ** -44 of their terms.
_SECOND_ORDER = 1.001
# Hopper's FP8 tensor cores align 32 products and the running sum to the largest exponent, cut all
# 33 to 13 fraction bits, add them, and cut the sum (tests/hopper.py).
_HOPPER_STEP = 32
_HOPPER_CUT = 2.0**-13
# The fp16 tensor cores do the same with at least 23 fraction bits and 8 products or more in a step:
# a cut for each product, and two for the running sum of a step.
_PORTABLE_CUTS = 1 + 2 / 8  # for each channel
_PORTABLE_CUT = 2.0**-23
_NORM = 32  # sum(|x| ** 32) ** (1 / 32) of 32 numbers is at most 12 % above the largest
_HEAD_SUMS = 8  # roundings between a head's term and the score, beyond one for each head


class Sums(Enum):
    """What adds the products."""

    FLOAT64 = "NumPy: float64, and one rounding of the score to float32"
    PORTABLE = "fp16 tensor cores"
    HOPPER = "FP8 tensor cores of Hopper"


def largest_errors(
    sums: Sums, q: np.ndarray, qs: np.ndarray, keys: np.ndarray, scales: np.ndarray
) -> np.ndarray:
    """The largest error of each score, float64 [n, S].

    It is infinite where a gate is infinite and an error may change the sign of its dot product:
    such a score is infinite or NaN.

    Parameters
    ----------
    sums : Sums
    q, qs, keys, scales : float64, [n, H, D], [n, H], [S, kv, D] and [S, kv, G]
        The numbers that the E4M3 codes stand for.
    """
    tokens, heads, _ = q.shape
    count, groups, _ = keys.shape
    granules = scales.shape[2]
    gates = np.where(np.isfinite(qs), np.abs(qs), 0)
    scales = np.where(np.isfinite(scales), np.abs(scales), 0)
    errors, magnitudes = np.zeros((2, tokens, count))
    doubtful = np.zeros((tokens, count), bool)
    for kv in range(groups):
        mine = np.s_[:, kv * (heads // groups) : (kv + 1) * (heads // groups)]
        rows = q[mine].reshape(-1, q.shape[2])
        found = _dot_products(sums, rows, keys[:, kv], scales[:, kv])
        dots, error = (x.reshape(tokens, heads // groups, count) for x in found)
        gate = gates[mine][..., None]
        scale = scales[:, kv, 0] if granules == 1 else 1.0
        errors += scale * (gate * error).sum(axis=1)
        magnitudes += scale * (gate * (np.maximum(dots, 0) + error)).sum(axis=1)
        infinite = np.isinf(qs[mine])[..., None]
        doubtful |= (infinite & (error > 0) & (np.abs(dots) <= error)).any(axis=1)
    roundings = 1 if sums is Sums.FLOAT64 else heads + _HEAD_SUMS
    errors += roundings * (_FLOAT32 * magnitudes + _LEAST * np.maximum(scales.max(axis=(1, 2)), 1))
    return np.where(doubtful, np.inf, _SECOND_ORDER * errors)


def _dot_products(
    sums: Sums, q: np.ndarray, keys: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Dot products [n, S] of [n, D] and [S, D], and their largest errors.

    Several scales of a key are multiplied in; a single scale is not. Where a number is NaN, so is
    the dot product, which counts as 0: both results are 0 there.
    """
    nan = np.isnan(q).any(axis=1)[:, None] | np.isnan(keys).any(axis=1)
    q, keys = np.nan_to_num(q), np.nan_to_num(keys)
    granules = scales.shape[1]
    size = q.shape[1] // granules
    dots, errors, magnitudes = np.zeros((3, len(q), len(keys)))
    for g in range(granules):
        channels = np.s_[:, g * size : (g + 1) * size]
        scale = scales[:, g] if granules > 1 else 1.0
        dot, error = _granule(sums, q[channels], keys[channels])
        dots += scale * dot
        errors += scale * error
        magnitudes += scale * (np.abs(dot) + error)
    if granules > 1:
        errors += granules * (_FLOAT64 if sums is Sums.FLOAT64 else _FLOAT32) * magnitudes
    return np.where(nan, 0, dots), np.where(nan, 0, errors)


def _granule(sums: Sums, q: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dot products and their largest errors, for channels with one scale."""
    if sums is Sums.HOPPER:
        return _hopper(q, keys)
    total = q @ keys.T
    if sums is Sums.FLOAT64:
        return total, np.zeros_like(total)  # 44 bits hold any sum of 256 products
    cuts = _PORTABLE_CUTS * q.shape[1]  # each of at most this part of any partial sum
    return total, cuts * _PORTABLE_CUT * (np.abs(q) @ np.abs(keys).T)


def _hopper(q: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each cut is below `_HOPPER_CUT` times the largest product or the running sum."""
    total, error = np.zeros((2, len(q), len(keys)))
    for d in range(0, q.shape[1], _HOPPER_STEP):
        step = np.s_[:, d : d + _HOPPER_STEP]
        a, b = q[step], keys[step]
        largest = (np.abs(a) ** _NORM @ (np.abs(b) ** _NORM).T) ** (1 / _NORM)
        largest = np.maximum(largest, np.abs(total) + error)
        total = total + a @ b.T
        error = error + (_HOPPER_STEP + 1) * _HOPPER_CUT * largest
        error += _HOPPER_CUT * (np.abs(total) + error)
    return total, error
