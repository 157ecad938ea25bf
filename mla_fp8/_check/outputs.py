"""The arrays that a call writes: the caller's, checked, or new ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import (
    FLOAT,
    Array,
    Axis,
    check_array,
    check_writable,
    empty_beside,
)
from mla_fp8._check.interop import as_arrays
from mla_fp8._check.parameters import check_sort

_INT = (np.dtype(np.int32),)
_BYTE = (np.dtype(np.uint8),)
_Form = tuple[tuple[Any, ...], tuple[Axis, ...]]  # dtypes and axes
_WORKSPACE: _Form = (_BYTE, ("bytes",))


class Selection(NamedTuple):
    """Where the top-k of each row is written, and in which order."""

    k: int
    by_score: bool  # rows in score order; else in ascending position
    indices: Array
    values: Array | None  # the scores, if the caller wants them
    workspace: Array | None = None  # None: the backend allocates scratch memory for the call

    @property
    def results(self) -> Any:
        """What a public function returns."""
        return self.indices if self.values is None else (self.indices, self.values)


def check_selection(
    inputs: dict[str, Array],
    k: int,
    sort: Any,
    return_scores: bool,
    out: Any,
    workspace: Any,
    out_name: str = "out",
) -> Selection:
    """Check or allocate the outputs of a top-k over the rows of the first input."""
    by_score, (first, rows) = check_sort(sort), _rows_of(inputs)
    axes: tuple[Axis, ...] = ("total_seq_len" if first == "q" else "rows", rows), ("k", k)
    names, given = [out_name], [out]
    if return_scores and out is not None:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                f"{out_name} must be a tuple (indices, scores) with return_scores=True; "
                f"got {type(out).__name__}"
            )
        names, given = [f"{out_name}[0]", f"{out_name}[1]"], list(out)
    forms = dict(zip(names, ((_INT, axes), (FLOAT, axes)), strict=False))
    written = dict(zip(names, given, strict=True)) if out is not None else {}
    arrays = _check_written(inputs, written, workspace, forms)
    if out is None:
        dtypes = (np.int32, np.float32)[: 1 + return_scores]
        results = [empty_beside(inputs[first], (rows, k), dtype) for dtype in dtypes]
    else:
        results = [arrays[name] for name in names]
    values = results[1] if return_scores else None
    return Selection(k, by_score, results[0], values, arrays.get("workspace"))


def check_dense(
    inputs: dict[str, Array], columns: int, out: Any, workspace: Any
) -> tuple[Array, Array | None]:
    """Check or allocate a matrix of scores; the matrix and the workspace."""
    first, rows = _rows_of(inputs)
    forms: dict[str, _Form]
    forms = {"out": (FLOAT, (("total_seq_len", rows), ("max_keys", columns)))}
    arrays = _check_written(inputs, {} if out is None else {"out": out}, workspace, forms)
    if out is None:
        arrays["out"] = empty_beside(inputs[first], (rows, columns), np.float32)
    return arrays["out"], arrays.get("workspace")


def check_workspace(workspace: Array | None, size: int) -> None:
    """Raise if a caller's workspace has less than ``size`` bytes."""
    if workspace is not None and workspace.size < size:
        raise ValueError(f"workspace must have at least {size} bytes; got {workspace.size}")


def _rows_of(inputs: dict[str, Array]) -> tuple[str, int]:
    """The name of the first input, and its rows."""
    first = next(iter(inputs))
    return first, inputs[first].shape[0]


def _check_written(
    inputs: dict[str, Array], written: dict[str, Any], workspace: Any, forms: dict[str, _Form]
) -> dict[str, Array]:
    """The caller's arrays to write to, as arrays on the device of ``inputs``."""
    if workspace is not None:
        written = written | {"workspace": workspace}
    if not written:
        return {}
    forms = forms | {"workspace": _WORKSPACE}
    first, _ = _rows_of(inputs)
    _, arrays = as_arrays(
        {first: inputs[first]} | written, {name: form[0] for name, form in forms.items()}
    )
    arrays = {name: arrays[name] for name in written}
    for name, array in arrays.items():
        check_array(name, array, *forms[name], 16 if name == "workspace" else 0)
    check_writable(arrays, inputs)
    return arrays
