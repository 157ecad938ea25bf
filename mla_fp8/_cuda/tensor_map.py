"""The tensor map with which TMA copies keys from their pages."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from mla_fp8._plan.scoring import MIN_BOX_ROWS


@lru_cache(maxsize=1024)
def tensor_map(
    address: int, row_bytes: int, page_size: int, num_blocks: int, block_stride: int, box_rows: int
) -> Any:
    """The 16 words of a ``CUtensorMap``: boxes of whole rows of a page, swizzled over their width.

    Parameters
    ----------
    address : int
        Device address of uint8 [num_blocks, page_size, row_bytes].
    row_bytes, page_size, num_blocks : int
        Extents of the pool.
    block_stride : int
        Bytes from one block to the next.
    box_rows : int
        Rows that one instruction copies; with less than MIN_BOX_ROWS no map is needed.
    """
    from cuda.bindings import driver

    if box_rows < MIN_BOX_ROWS or num_blocks == 0:
        return (ctypes.c_uint64 * 16)()
    if num_blocks == 1:  # the stride of one block has no meaning, and may be anything
        block_stride = row_bytes * page_size
    swizzle = getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{row_bytes}B")
    status, found = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        3,
        address,
        [driver.cuuint64_t(extent) for extent in (row_bytes, page_size, num_blocks)],
        [driver.cuuint64_t(stride) for stride in (row_bytes, block_stride)],
        [driver.cuuint32_t(extent) for extent in (row_bytes, box_rows, 1)],
        [driver.cuuint32_t(1)] * 3,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuTensorMapEncodeTiled: {status.name}")
    return (ctypes.c_uint64 * 16)(*map(int, found.opaque))
