"""The tensor map with which TMA copies keys from their pages."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from mla_fp8._plan.scoring import MAX_TENSOR_ROWS


@lru_cache(maxsize=256)
def tensor_map(address: int, rows: int, row_bytes: int, box_rows: int) -> Any:
    """The 16 words of a ``CUtensorMap``: boxes of whole rows, swizzled over their width.

    Parameters
    ----------
    address : int
        Device address of uint8 [rows, row_bytes].
    rows, row_bytes : int
        Extents of the matrix.
    box_rows : int
        Rows that one instruction copies.
    """
    from cuda.bindings import driver

    swizzle = getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{row_bytes}B")
    status, found = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        address,
        [driver.cuuint64_t(row_bytes), driver.cuuint64_t(min(max(rows, 1), MAX_TENSOR_ROWS))],
        [driver.cuuint64_t(row_bytes)],
        [driver.cuuint32_t(row_bytes), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuTensorMapEncodeTiled: {status.name}")
    return (ctypes.c_uint64 * 16)(*map(int, found.opaque))
