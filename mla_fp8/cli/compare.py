"""Whether results are what the oracle says, for arrays of either backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mla_fp8.cli.oracle import Expected

SCORE_GATE = 5e-6  # "How exact" in docs/contract.md
# Largest error of one score, relative to the sum of the magnitudes of its terms. NumPy: float32
# sums of a few hundred terms. CUDA: Hopper's tensor cores truncate to 13 fraction bits as they add.
SCORE_ERROR = {"numpy": 2.0**-18, "cupy": 2.0**-11}


class Mismatch(AssertionError):
    """A result is not what the contract says."""


def demand(condition: Any, message: str) -> None:
    """Raise `Mismatch` unless the condition holds. Unlike ``assert``, it is there under -O too."""
    if not condition:
        raise Mismatch(message)


def host(array: Any) -> np.ndarray:
    """A NumPy array of the same values."""
    for name in ("get", "cpu", "copy_to_host"):  # of CuPy, torch, Numba
        if hasattr(array, name):
            array = getattr(array, name)()
    return np.asarray(array)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays have one shape, one dtype and the same bytes."""
    a, b = (np.ascontiguousarray(host(x)) for x in (a, b))
    return bool(a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes())


def demand_same(name: str, got: Any, want: np.ndarray) -> None:
    """Raise `Mismatch`, which says where, unless dtype, shape and bits are the same."""
    got = host(got)
    demand(got.dtype == want.dtype, f"{name} of dtype {got.dtype}, not {want.dtype}")
    demand(got.shape == want.shape, f"{name} of shape {got.shape}, not {want.shape}")
    x, y = (np.ascontiguousarray(a).view(np.uint32) for a in (got, want))
    wrong = np.argwhere(x != y)
    if len(wrong):
        t, j = wrong[0]
        raise Mismatch(
            f"{name}: {len(wrong)} entries differ; row {t} has {got[t, j]} at {j}, not {want[t, j]}"
        )


def score_gap(x: np.ndarray, y: np.ndarray) -> float:
    """1 - 2 sum(xy) / (sum(x^2) + sum(y^2)): zero when equal."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norm = (x * x).sum() + (y * y).sum()
    return 0.0 if norm == 0 else float(1 - 2 * (x * y).sum() / norm)


def assert_scores_close(
    got: Any, want: Expected, magnitude: np.ndarray, error: float, gate: bool = True
) -> None:
    """Every single score within its own rounding error, and all within the gate of the contract.

    The gate is for ordinary numbers. Where the error is infinite, a score must be infinite or NaN,
    whichever.
    """
    got = host(got)
    demand(got.dtype == np.float32, f"scores of dtype {got.dtype}")
    demand(got.shape == want.scores.shape, f"shape {got.shape}, not {want.scores.shape}")
    demand(np.isneginf(got[~want.selectable]).all(), "an unseen key without -inf")
    x, y, m = (a[want.selectable] for a in (got, want.scores, error * magnitude))
    demand(not np.isfinite(x[np.isinf(m)]).any(), "a finite score with an infinite gate")
    x, y, m = (a[~np.isinf(m)] for a in (x, y, m))
    demand((np.isnan(x) == np.isnan(y)).all(), "NaN scores differ")
    odd = ~np.isfinite(y)
    demand(np.array_equal(x[odd], y[odd].astype(np.float32), equal_nan=True), "inf differ")
    x, y, m = x[~odd], y[~odd], m[~odd]
    if x.size:
        off = np.abs(x - y) - m
        i = off.argmax()
        demand((off <= 0).all(), f"a score is {x[i]}, not {y[i]}, which allows an error of {m[i]}")
    if gate:
        gap = score_gap(x, y)
        demand(gap < SCORE_GATE, f"scores have the gap {gap}")


def guarded(
    xp: Any, shape: tuple[int, ...], dtype: Any, poison: int = 0x5A, margin: int = 1020
) -> tuple[Any, Callable[[], None]]:
    """An output carved out of a poisoned buffer, and a function that checks the guard bands.

    The margin keeps it on four bytes and no better, as a slice of a user's array may be.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = xp.full(size + 2 * margin, poison, np.uint8)
    inner = buffer[margin : margin + size].view(dtype).reshape(shape)

    def intact() -> None:
        bands = xp.concatenate([buffer[:margin], buffer[margin + size :]])
        demand((host(bands) == poison).all(), "written outside of the output")

    return inner, intact
