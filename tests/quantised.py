"""Keys to quantise, as arrays of either backend."""

from __future__ import annotations

import numpy as np

from mla_fp8.cli.fuzz_data import (
    BFLOAT16,
    CANARY,
    KEY_DTYPES,
    LAYOUTS,
    hard_rows,
    make_pool,
    view_of,
)
from mla_fp8.cli.oracle import quantised

__all__ = [
    "BFLOAT16",
    "CANARY",
    "KEY_DTYPES",
    "LAYOUTS",
    "Bfloat16",
    "hard_rows",
    "make_pool",
    "on",
    "quantised",
    "view_of",
]


class Bfloat16:
    """A CuPy array of bfloat16, as other libraries have it: CuPy has only the bits."""

    def __init__(self, bits):
        self._bits, self.dtype = bits, "bfloat16"

    def view(self, dtype):
        return self._bits.view(dtype)


def on(xp, array: np.ndarray):
    """A host array as one of ``xp``."""
    if xp is np:
        return array
    if array.dtype == BFLOAT16:
        return Bfloat16(xp.asarray(array.view(np.int16)))
    return xp.asarray(array)
