"""The two backends take the same problems: NumPy, and the kernels by way of CuPy."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from mla_fp8 import _reference


def backend_of(xp: Any) -> ModuleType:
    """The module with ``index_topk``, ``index_scores``, ... for arrays of ``xp``."""
    if xp is np:
        return _reference
    from mla_fp8._cuda import backend  # imports CuPy, which may be absent

    return backend
