"""Checks of lists of selected positions, which `merge_topk` merges."""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_fp8._check.arrays import FLOAT, Array, Axis, check_array
from mla_fp8._check.interop import as_arrays
from mla_fp8._check.shape import MOST

_INT = (np.dtype(np.int32),)


def check_lists(indices: Any, scores: Any) -> dict[str, Array]:
    """Check positions and their scores, [lists, rows, width]: the arrays by argument name."""
    given = {"indices": indices, "scores": scores}
    _, arrays = as_arrays(given, {"indices": _INT, "scores": FLOAT})
    names = "lists", "rows", "width"
    check_array("indices", arrays["indices"], _INT, names)
    shape: tuple[int, int, int] = arrays["indices"].shape
    axes: tuple[Axis, ...] = tuple(zip(names, shape, strict=True))
    check_array("scores", arrays["scores"], FLOAT, axes)
    lists, rows, width = shape
    if lists == 0 or width == 0:
        raise ValueError(f"indices must have lists >= 1 and width >= 1; got {shape}")
    if max(rows, lists * width) > MOST:
        raise ValueError(f"indices must have rows and lists * width <= {MOST}; got {shape}")
    return arrays
