"""The memory of a cache's pages: values and scales in arrays of their own, or in fused pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import Array, check_start, namespace_of
from mla_fp8._check.interop import as_array, check_mutable
from mla_fp8._check.parameters import DEPTHS, MAX_HEADS, brief, check_int, scale_groups

_SCALE_BYTES = 4


@dataclass(frozen=True)
class Form:
    """Extents of a page."""

    num_layers: int
    page_size: int
    kv_heads: int
    depth: int
    groups: int  # scales per key
    fused: bool

    @property
    def value_bytes(self) -> int:
        """Bytes of the values in a page."""
        return self.num_layers * self.page_size * self.kv_heads * self.depth

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, its scales included."""
        return self.value_bytes // self.depth * (self.depth + _SCALE_BYTES * self.groups)

    @property
    def granularity(self) -> int:
        """Channels per scale."""
        return self.depth // self.groups

    @property
    def axes(self) -> tuple[int, int, int, int]:
        """Axes of ``k_blocks`` and ``k_scales`` between their first and their last."""
        return 1, self.num_layers, self.page_size, self.kv_heads


def checked_form(
    depth: Any, num_layers: Any, kv_heads: Any, page_size: Any, granularity: Any, layout: Any
) -> Form:
    """The page of these extents, which a caller gave. Granularity None stands for ``depth``."""
    if layout not in ("split", "fused"):
        raise ValueError(f"layout must be 'split' or 'fused'; got {brief(layout)}")
    positive = range(1, 2**31)
    depth = check_int("depth", depth, DEPTHS)
    num_layers = check_int("num_layers", num_layers, positive)
    kv_heads = check_int("kv_heads", kv_heads, range(1, MAX_HEADS + 1))
    page_size = check_int("page_size", page_size, positive)
    width = depth if granularity is None else check_int("granularity", granularity, positive)
    groups = scale_groups("granularity", depth, width)
    form = Form(num_layers, page_size, kv_heads, depth, groups, layout == "fused")
    check_int("num_layers * page_size * kv_heads * depth", form.value_bytes, range(1, 2**48))
    if form.fused and (num_layers, kv_heads, groups) != (1, 1, 1):
        raise ValueError(
            "layout must be 'split' unless num_layers, kv_heads and scales per key are 1; "
            f"got 'fused' with {num_layers}, {kv_heads} and {groups}"
        )
    return form


class Pool(NamedTuple):
    """Blocks of memory, one for each page.

    ``arrays`` holds values uint8 [num_blocks, 1, num_layers, page_size, kv_heads, depth] and
    scales float32 [..., groups]; of fused pages one array, uint8 [num_blocks, page_bytes].
    """

    form: Form
    arrays: tuple[Array, ...]

    @classmethod
    def zeros(cls, form: Form, xp: Any, blocks: int) -> Pool:
        """A new pool in NumPy's or CuPy's memory."""
        if blocks * form.page_bytes >= 2**63:  # beyond NumPy's sizes
            raise MemoryError(f"no room for {blocks} blocks of {form.page_bytes} bytes")
        if form.fused:
            return cls(form, (xp.zeros((blocks, form.page_bytes), np.uint8),))
        values = xp.zeros((blocks, *form.axes, form.depth), np.uint8)
        return cls(form, (values, xp.zeros((blocks, *form.axes, form.groups), np.float32)))

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return int(self.arrays[0].shape[0])

    @property
    def xp(self) -> Any:
        """The module of the arrays, numpy or cupy."""
        return namespace_of(self.arrays[0])

    @property
    def values(self) -> Array:
        """The codes of all pages, uint8 [num_blocks, 1, num_layers, page_size, kv_heads, depth]."""
        if not self.form.fused:
            return self.arrays[0]
        codes = self.arrays[0][:, : self.form.value_bytes]
        return codes.reshape(self.num_blocks, *self.form.axes, self.form.depth)

    @property
    def scales(self) -> Array:
        """The scales of all pages, float32, with ``groups`` in place of ``depth``."""
        if not self.form.fused:
            return self.arrays[1]
        scales = self.arrays[0][:, self.form.value_bytes :].view(np.float32)
        return scales.reshape(self.num_blocks, *self.form.axes, self.form.groups)

    def grown(self, blocks: int) -> Pool:
        """This pool, or a copy with more blocks."""
        if blocks <= self.num_blocks:
            return self
        larger = Pool.zeros(self.form, self.xp, blocks)
        for old, new in zip(self.arrays, larger.arrays, strict=True):
            new[: self.num_blocks] = old
        return larger

    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy whole pages: all layers, values and scales."""
        if sources.size:
            source, target = (self.xp.asarray(p.astype(np.int64)) for p in (sources, targets))
            for array in self.arrays:
                array[target] = array[source]


def fused_pool(buffer: Any, page_size: Any) -> Pool:
    """A pool over a caller's fused pages, without a copy."""
    page_size = check_int("page_size", page_size, range(1, 2**31))
    check_mutable({"buffer": buffer})
    array = as_array("buffer", buffer)
    shape = array.shape
    # [num_blocks, page_size, 1, D + 4], [num_blocks, page_size, D + 4] or [num_blocks, bytes]
    middle = {4: (page_size, 1), 3: (page_size,)}.get(array.ndim, ())
    row_bytes, rest = divmod(shape[-1], 1 if middle else page_size) if array.ndim else (0, 0)
    depth = row_bytes - _SCALE_BYTES
    fits = array.ndim in (2, 3, 4) and shape[1:-1] == middle and not rest and depth in DEPTHS
    if array.dtype != np.uint8 or not fits:
        raise ValueError(
            f"buffer must be uint8 [num_blocks, page_size = {page_size}, 1, depth + 4], "
            f"[num_blocks, {page_size}, depth + 4] or [num_blocks, {page_size} * (depth + 4)] "
            f"with depth 32, 64, 128 or 256; got {array.dtype} {shape}"
        )
    form = Form(1, page_size, 1, depth, 1, fused=True)
    blocks, stride = shape[0], array.strides[0]
    if not array[:1].flags.c_contiguous or (blocks > 1 and stride < form.page_bytes):
        raise ValueError(
            f"buffer must have pages of {form.page_bytes} contiguous bytes that do not overlap; "
            f"got strides {array.strides} for shape {shape}"
        )
    if isinstance(array, np.ndarray):
        if not array.flags.writeable:
            raise ValueError("buffer must be writable; got a read-only array")
    else:
        check_start("buffer", array, _SCALE_BYTES)
        if blocks > 1 and stride % _SCALE_BYTES:
            raise ValueError(
                f"buffer must have pages at multiples of {_SCALE_BYTES} bytes; "
                f"got strides {array.strides}"
            )
    return Pool(form, (array.reshape(blocks, form.page_bytes),))
