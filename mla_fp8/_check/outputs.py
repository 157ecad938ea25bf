"""The arrays that a call writes: the caller's, checked, or new ones."""

from __future__ import annotations

from functools import lru_cache
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
from mla_fp8._check.parameters import Output, check_output, check_sort

_INT = (np.dtype(np.int32),)
_BYTE = (np.dtype(np.uint8),)
_MOST_SLOTS = 2**31 - 1


class _Forms(NamedTuple):
    """The dtypes and axes of the arrays that a call writes, by their names in messages."""

    dtypes: dict[str, tuple[Any, ...]]
    axes: dict[str, tuple[Axis, ...]]

    @classmethod
    def of(cls, dtypes: dict[str, tuple[Any, ...]], axes: tuple[Axis, ...]) -> _Forms:
        """Results of these dtypes, all with these axes; and a workspace."""
        same = dict.fromkeys(dtypes, axes)
        return cls(dtypes | {"workspace": _BYTE}, same | {"workspace": ("bytes",)})


class Selection(NamedTuple):
    """Where the top-k of each row is written, and in which order."""

    k: int
    by_score: bool  # rows in score order; else in ascending position
    indices: Array  # positions; slots if these alone are wanted
    values: Array | None  # the scores, if the caller wants them
    workspace: Array | None = None  # None: the backend allocates scratch memory for the call
    output: Output = Output.POSITIONS
    slots: Array | None = None  # with Output.BOTH

    @property
    def results(self) -> Any:
        """What a public function returns."""
        found = [a for a in (self.indices, self.slots, self.values) if a is not None]
        return found[0] if len(found) == 1 else tuple(found)


def check_selection(
    inputs: dict[str, Array],
    k: int,
    sort: Any,
    return_scores: bool,
    out: Any,
    workspace: Any,
    out_name: str = "out",
    output: Any = Output.POSITIONS,
) -> Selection:
    """Check or allocate the outputs of a top-k over the rows of the first input."""
    by_score, output, (first, rows) = check_sort(sort), check_output(output), _rows_of(inputs)
    if output is not Output.POSITIONS:
        num_blocks, _, _, page_size, _, _ = inputs["k_blocks"].shape
        check_slots(num_blocks, page_size)
    with_scores = bool(return_scores)
    names, forms = _forms_of(first, rows, k, output is Output.BOTH, with_scores, out_name)
    if out is None:
        written: dict[str, Any] = {}
    elif len(names) == 1:
        written = {out_name: out}
    else:
        given = _check_tuple(out, out_name, output is Output.BOTH, with_scores)
        written = dict(zip(names, given, strict=True))
    arrays = _check_written(inputs, written, workspace, forms)
    workspace, results = arrays.pop("workspace", None), list(arrays.values())
    if out is None:
        dtypes = [forms.dtypes[name][0] for name in names]
        results = [empty_beside(inputs[first], (rows, k), dtype) for dtype in dtypes]
    values = results[-1] if with_scores else None
    slots = results[1] if output is Output.BOTH else None
    return Selection(k, by_score, results[0], values, workspace, output, slots)


@lru_cache(maxsize=1024)
def _forms_of(
    first: str, rows: int, k: int, both: bool, with_scores: bool, out_name: str
) -> tuple[tuple[str, ...], _Forms]:
    """The name of each result in messages, and their forms. Cached, because calls repeat it."""
    dtypes = (_INT,) * (1 + both) + (FLOAT,) * with_scores
    axes: tuple[Axis, ...] = ("total_seq_len" if first == "q" else "rows", rows), ("k", k)
    names: tuple[str, ...] = (out_name,)
    if len(dtypes) > 1:
        names = tuple(f"{out_name}[{i}]" for i in range(len(dtypes)))
    return names, _Forms.of(dict(zip(names, dtypes, strict=True)), axes)


def _check_tuple(out: Any, out_name: str, both: bool, with_scores: bool) -> tuple[Any, ...]:
    """``out``, if it is a tuple with an array for each result."""
    wanted = ["positions", "slots"] if both else ["indices"]
    wanted += ["scores"] * with_scores
    if isinstance(out, tuple) and len(out) == len(wanted):
        return out
    options = ["output='both'"] * both + ["return_scores=True"] * with_scores
    raise TypeError(
        f"{out_name} must be a tuple ({', '.join(wanted)}) with {' and '.join(options)}; "
        f"got {type(out).__name__}{f' of {len(out)}' if isinstance(out, tuple) else ''}"
    )


def check_slots(num_blocks: int, page_size: int) -> None:
    """Raise if an int32 does not hold every slot."""
    if num_blocks * page_size > _MOST_SLOTS:
        raise ValueError(
            f"k_blocks must have num_blocks * page_size <= {_MOST_SLOTS} for slots; "
            f"got {num_blocks} * {page_size}"
        )


def check_dense(
    inputs: dict[str, Array], columns: int, out: Any, workspace: Any
) -> tuple[Array, Array | None]:
    """Check or allocate a matrix of scores; the matrix and the workspace."""
    first, rows = _rows_of(inputs)
    forms = _Forms.of({"out": FLOAT}, (("total_seq_len", rows), ("max_keys", columns)))
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
    inputs: dict[str, Array], written: dict[str, Any], workspace: Any, forms: _Forms
) -> dict[str, Array]:
    """The caller's arrays to write to, as arrays on the device of ``inputs``."""
    if workspace is not None:
        written = {**written, "workspace": workspace}
    if not written:
        return {}
    first = next(iter(inputs))
    _, arrays = as_arrays({first: inputs[first], **written}, forms.dtypes, written)
    del arrays[first]
    for name, array in arrays.items():
        multiple = 16 if name == "workspace" else 0
        check_array(name, array, forms.dtypes[name], forms.axes[name], multiple)
    check_writable(arrays, inputs)
    return arrays
