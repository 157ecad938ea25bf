"""Merging lists of selected keys in NumPy."""

from __future__ import annotations

import numpy as np

from mla_fp8._check.arrays import Array
from mla_fp8._check.outputs import Selection

_BLOCK_ENTRIES = 1 << 18  # entries that are merged at once
_PADDING, _NAN_KEY = np.int64(-(2**63)), np.int64(-(2**31))


def _ranks(positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """int64 numbers in the total order: higher score, then smaller position; padding is least."""
    with np.errstate(invalid="ignore"):  # raised for a signalling NaN
        keys = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # -0.0 becomes 0.0
    np.bitwise_xor(keys, 0x7FFFFFFF, out=keys, where=keys < 0)  # reverse negative numbers
    keys[np.isnan(scores)] = _NAN_KEY
    ranks: np.ndarray = np.where(positions < 0, _PADDING, (keys << 31) - positions)
    return ranks


def _merge_rows(
    positions: np.ndarray, scores: np.ndarray, selection: Selection, rows: slice
) -> None:
    """Merge rows of entries, [rows, entries], into the same rows of the result."""
    ranks, k = _ranks(positions, scores), min(selection.k, positions.shape[1])
    best = np.argpartition(ranks, -k, axis=1)[:, -k:]
    ranks, positions = (np.take_along_axis(a, best, axis=1) for a in (ranks, positions))
    padding = positions < 0
    order = ~ranks if selection.by_score else np.where(padding, np.int64(2**31), positions)
    order = np.argsort(order, axis=1)
    positions = np.where(padding, -1, positions)
    selection.indices[rows, :k] = np.take_along_axis(positions, order, axis=1)
    if selection.values is not None:
        scores = np.take_along_axis(scores, best, axis=1)
        scores[padding] = -np.inf
        selection.values[rows, :k] = np.take_along_axis(scores, order, axis=1)


def merge_topk(indices: Array, scores: Array, selection: Selection) -> None:
    """Write the best k entries of each row of several lists, [lists, rows, width]."""
    lists, rows, width = indices.shape
    selection.indices[:, lists * width :] = -1
    if selection.values is not None:
        selection.values[:, lists * width :] = -np.inf
    step = max(1, _BLOCK_ENTRIES // (lists * width))
    for first in range(0, rows, step):
        block = slice(first, min(first + step, rows))
        positions, beside = (
            array[:, block].swapaxes(0, 1).reshape(-1, lists * width) for array in (indices, scores)
        )
        _merge_rows(positions, beside, selection, block)
