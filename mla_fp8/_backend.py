"""The choice of a backend: NumPy for host arrays, CUDA kernels for CuPy arrays."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from mla_fp8 import _reference


@cache  # the import statement takes half a microsecond
def backend_of(xp: Any) -> ModuleType:
    """The backend for arrays of ``xp``; `_reference` lists the functions that both have."""
    if xp is np:
        return _reference
    from mla_fp8._cuda import backend  # it imports CuPy, which may be absent

    return backend
