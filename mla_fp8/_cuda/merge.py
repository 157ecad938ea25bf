"""Merging lists of selected keys on a GPU."""

from __future__ import annotations

from functools import lru_cache

import cupy

from mla_fp8._check.arrays import Array
from mla_fp8._check.outputs import Selection
from mla_fp8._cuda.launch import Launch
from mla_fp8._plan.kernel import Device
from mla_fp8._plan.merge import merge_kernel


class Merge:
    """``merge_topk`` for lists of one shape; ``aligned``: both arrays begin at multiples of 16."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        k: int,
        by_score: bool,
        values: bool,
        aligned: bool,
        device: Device,
    ) -> None:
        lists, self._rows, width = shape
        kernel = merge_kernel(lists, width, k, by_score, values, aligned, device)
        self._launch = Launch(kernel, device)
        p = self._launch.params
        p.list_stride, p.entries = self._rows * width, lists * width

    def __call__(self, indices: Array, scores: Array, selection: Selection) -> None:
        """Merge on CuPy's current stream."""
        p, values = self._launch.params, selection.values
        p.listed_indices, p.listed_scores = indices.data.ptr, scores.data.ptr
        p.indices, p.values = selection.indices.data.ptr, 0 if values is None else values.data.ptr
        self._launch(self._rows, cupy.cuda.get_current_stream().ptr)


@lru_cache(maxsize=64)
def merge_stage(
    thread: int,
    shape: tuple[int, int, int],
    k: int,
    by_score: bool,
    values: bool,
    aligned: bool,
    device: Device,
) -> Merge:
    """One stage for each thread, because a call changes its parameters."""
    return Merge(shape, k, by_score, values, aligned, device)
