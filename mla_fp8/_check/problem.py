"""Arrays in, a frozen and checked problem out, or an error that names the argument."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import (
    FP8,
    Array,
    Axis,
    as_array,
    as_arrays,
    check_array,
    check_dtypes,
    check_form,
    check_outputs,
    device_of,
    empty_beside,
    plain,
)
from mla_fp8._check.parameters import DEPTHS, MAX_HEADS, check_int, finer
from mla_fp8._check.values import check_lengths, check_values, wants_check

_INDEX = (np.dtype(np.uint32), np.dtype(np.int32))
_BYTES = (FP8, np.dtype(np.uint8))
_FLOAT = (np.dtype(np.float32),)
_OUTPUTS = (np.dtype(np.int32), np.dtype(np.float32))  # indices and their scores
_SCRATCH = (np.dtype(np.uint8),)
_ARRAYS = (
    "q",
    "qs",
    "input_row_offsets",
    "k_blocks",
    "k_cache_lengths",
    "k_lookup_table",
    "k_scales",
)
_TOTAL_ARRAYS = tuple(name.replace("cache_lengths", "total_lengths") for name in _ARRAYS)
_DTYPES: dict[str, tuple[Any, ...]] = {
    "q": _BYTES,
    "qs": _FLOAT,
    "input_row_offsets": _INDEX,
    "k_blocks": _BYTES,
    "k_cache_lengths": _INDEX,
    "k_total_lengths": _INDEX,
    "k_lookup_table": _INDEX,
    "k_max_lengths": _INDEX,
    "k_scales": _FLOAT,
}
_VECTOR = {"q": 16, "k_blocks": 16, "workspace": 16}  # bytes that kernels load at once
MOST = 2**31 - 2**16  # of what kernels count in int32, with room to step past the end by a tile
_MOST_UNSIGNED = 2**32 - 1


@dataclass(frozen=True)
class Shape:
    """Every plain number a scoring call depends on; hashable, so that plans are cached by it."""

    num_heads: int
    depth: int
    kv_heads: int
    scale_groups: int
    causal: bool
    total_seq_len: int
    batch: int
    num_blocks: int
    num_layers: int
    page_size: int
    pages_per_seq: int
    max_new: int  # tokens of one sequence; only what is fastest depends on it
    max_keys: int
    signed_offsets: bool
    signed_lengths: bool
    total_lengths: bool = False  # lengths count the new tokens

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))


class Problem(NamedTuple):
    """A checked scoring call: FP8 arrays are uint8, index arrays 32 bits wide, all C-contiguous."""

    shape: Shape
    xp: Any
    layer: int
    q: Array
    qs: Array
    input_row_offsets: Array
    k_blocks: Array
    k_cache_lengths: Array
    k_lookup_table: Array
    k_scales: Array

    @property
    def inputs(self) -> dict[str, Array]:
        """The input arrays by argument name."""
        names = _TOTAL_ARRAYS if self.shape.total_lengths else _ARRAYS
        return dict(zip(names, self[-len(names) :], strict=True))

    def cached(self, sequence: int, new: int) -> int:
        """Tokens of a sequence before its ``new`` ones; below zero if its length says so."""
        return int(self.k_cache_lengths[sequence]) - (new if self.shape.total_lengths else 0)


class Selection(NamedTuple):
    """Where the top-k of each row goes, and in which order."""

    k: int
    by_score: bool
    indices: Array
    values: Array | None
    workspace: Array | None = None  # scratch memory; None: taken for the call


def scoring_problem(
    q: Any,
    qs: Any,
    input_row_offsets: Any,
    k_blocks: Any,
    k_cache_lengths: Any,
    k_lookup_table: Any,
    k_max_lengths: Any,
    k_scales: Any,
    layer_idx: Any,
    *,
    causal: bool,
    check: bool | None,
    k_total_lengths: Any = None,
    num_heads: int | None = None,
    depth: int | None = None,
    groups: int | None = None,
) -> Problem:
    """Check the operation's arguments; ``None`` for a parameter takes it from the arrays."""
    total_lengths = k_total_lengths is not None
    if total_lengths and k_cache_lengths is not None:
        raise TypeError("k_cache_lengths must be None beside k_total_lengths; got both")
    lengths = k_total_lengths if total_lengths else k_cache_lengths
    objects = q, qs, input_row_offsets, k_blocks, lengths, k_lookup_table, k_scales
    given = dict(zip(_TOTAL_ARRAYS if total_lengths else _ARRAYS, objects, strict=True))
    xp, arrays = as_arrays(given, _DTYPES)
    bounds = _host_bounds(k_max_lengths, xp)
    forms = tuple((array.dtype, array.shape) for array in arrays.values())
    shape = _shape_of(forms, bounds, num_heads, depth, groups, causal, total_lengths)
    layer = check_int("layer_idx", layer_idx, range(shape.num_layers))
    arrays = {name: plain(name, array, _VECTOR.get(name, 0)) for name, array in arrays.items()}
    if wants_check(check, xp):
        with device_of(arrays["q"]):
            check_values(arrays, layer, bounds, total_lengths)
    return Problem(shape, xp, layer, *arrays.values())


@lru_cache(maxsize=1024)
def _shape_of(
    forms: tuple[tuple[Any, tuple[int, ...]], ...],
    bounds: tuple[int, int] | None,
    num_heads: int | None,
    depth: int | None,
    groups: int | None,
    causal: bool,
    total_lengths: bool,
) -> Shape:
    """Check dtypes and shapes, in the order of ``_ARRAYS``; a loop's are nearly always the same."""
    given = dict(zip(_TOTAL_ARRAYS if total_lengths else _ARRAYS, forms, strict=True))
    lengths = "k_total_lengths" if total_lengths else "k_cache_lengths"

    def checked(name: str, *axes: Axis) -> tuple[int, ...]:
        check_form(name, *given[name], _DTYPES[name], axes)
        return tuple(map(int, given[name][1]))

    tokens, num_heads, depth = checked(
        "q", "total_seq_len", ("num_heads", num_heads), ("depth", depth)
    )
    check_int("num_heads, q.shape[1],", num_heads, range(1, MAX_HEADS + 1))
    check_int("depth, q.shape[2],", depth, DEPTHS)
    checked("qs", ("total_seq_len", tokens), ("num_heads", num_heads))
    (batch,) = checked(lengths, "batch")
    checked("input_row_offsets", ("batch + 1", batch + 1))
    blocks, _, layers, page_size, kv_heads, _ = checked(
        "k_blocks", "num_blocks", 1, "num_layers", "page_size", "kv_heads", ("depth", depth)
    )
    if layers < 1 or page_size < 1 or kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"k_blocks must have num_layers and page_size >= 1 and kv_heads dividing {num_heads} "
            f"heads; got num_layers {layers}, page_size {page_size}, kv_heads {kv_heads}"
        )
    _, pages = checked("k_lookup_table", ("batch", batch), "pages_per_seq")
    *_, groups = checked(
        "k_scales",
        ("num_blocks", blocks),
        1,
        ("num_layers", layers),
        ("page_size", page_size),
        ("kv_heads", kv_heads),
        ("groups", groups),
    )
    allowed = (1, *(depth // granularity for granularity in finer(depth)))
    if groups not in allowed:
        raise ValueError(
            f"k_scales must have {' or '.join(map(str, allowed))} scales a key of depth {depth}; "
            f"got {groups}"
        )
    for name, axis, extent, most in (
        ("q", "total_seq_len", tokens, MOST),
        (lengths, "batch", batch, MOST),
        ("k_blocks", "num_blocks", blocks, _MOST_UNSIGNED),
        ("k_blocks", "num_layers", layers, _MOST_UNSIGNED),
        ("k_blocks", "page_size", page_size, MOST),
        ("k_lookup_table", "pages_per_seq", pages, _MOST_UNSIGNED),
    ):
        _check_extent(name, axis, extent, most)
    capacity = pages * page_size
    max_keys = capacity if bounds is None else min(capacity, sum(bounds))
    if max_keys > MOST:
        raise ValueError(
            f"k_lookup_table must address at most {MOST} positions a sequence; "
            f"got {pages} pages of {page_size}"
        )
    return Shape(
        num_heads=num_heads,
        depth=depth,
        kv_heads=kv_heads,
        scale_groups=groups,
        causal=causal,
        total_seq_len=tokens,
        batch=batch,
        num_blocks=blocks,
        num_layers=layers,
        page_size=page_size,
        pages_per_seq=pages,
        max_new=tokens if bounds is None else min(tokens, bounds[0]),
        max_keys=max_keys,
        signed_offsets=given["input_row_offsets"][0] == np.int32,
        signed_lengths=given[lengths][0] == np.int32,
        total_lengths=total_lengths,
    )


def _check_extent(name: str, axis: str, extent: int, most: int) -> None:
    """Raise on what kernels cannot count."""
    if extent > most:
        raise ValueError(f"{name} must have {axis} <= {most}; got {extent}")


def _host_bounds(k_max_lengths: Any, xp: Any) -> tuple[int, int] | None:
    """[max new, max cached tokens] if they are on the host; on a device they are not read."""
    if xp is np:  # then it is an array like the others
        _, arrays = as_arrays({"q": np.empty(0), "k_max_lengths": k_max_lengths}, _DTYPES)
        array = arrays["k_max_lengths"]
    else:
        check_dtypes({"k_max_lengths": k_max_lengths}, _DTYPES)
        array = as_array("k_max_lengths", k_max_lengths)
    check_array("k_max_lengths", array, _INDEX, (1, 2))
    if not isinstance(array, np.ndarray):
        return None
    ((new, cached),) = array.tolist()
    if new < 0 or cached < 0:
        raise ValueError(f"k_max_lengths must be two lengths >= 0; got {[new, cached]}")
    return new, cached


def selection(
    rows: int,
    k: int,
    by_score: bool,
    out: Any,
    return_scores: bool,
    inputs: dict[str, Array],
    out_name: str = "out",
    workspace: Any = None,
) -> Selection:
    """Check or allocate the outputs of a top-k over ``rows`` rows, and check scratch memory."""
    first = next(iter(inputs))
    names: tuple[str, ...] = (out_name,)
    given: tuple[Any, ...] = (out,)
    if return_scores and out is not None:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                f"{out_name} must be a tuple (indices, scores) with return_scores=True; "
                f"got {type(out).__name__}"
            )
        names, given = (f"{out_name}[0]", f"{out_name}[1]"), out
    theirs = {} if out is None else dict(zip(names, given, strict=True))
    if workspace is not None:
        theirs["workspace"] = workspace
    if theirs:
        axes: tuple[Axis, ...] = ("total_seq_len" if first == "q" else "rows", rows), ("k", k)
        forms: dict[str, tuple[tuple[Any, ...], tuple[Axis, ...]]]
        forms = {name: ((dtype,), axes) for name, dtype in zip(names, _OUTPUTS, strict=False)}
        forms["workspace"] = _SCRATCH, ("bytes",)
        expected = {name: form[0] for name, form in forms.items()}
        _, arrays = as_arrays({first: inputs[first]} | theirs, expected)
        theirs = {name: arrays[name] for name in theirs}
        for name, array in theirs.items():
            check_array(name, array, *forms[name], _VECTOR.get(name, 0))
        check_outputs(theirs, inputs)
    if out is None:
        dtypes = _OUTPUTS[: 1 + return_scores]
        results = [empty_beside(inputs[first], (rows, k), dtype) for dtype in dtypes]
    else:
        results = [theirs[name] for name in names]
    values = results[1] if return_scores else None
    return Selection(k, by_score, results[0], values, theirs.get("workspace"))


def dense_output(out: Any, shape: tuple[int, ...], inputs: dict[str, Array]) -> Array:
    """A caller's matrix of scores, checked against the inputs it goes with."""
    first = next(iter(inputs))
    _, arrays = as_arrays({first: inputs[first], "out": out}, {"out": _FLOAT})
    axes = tuple(zip(("total_seq_len", "max_keys"), shape, strict=True))
    array = check_array("out", arrays["out"], _FLOAT, axes)
    check_outputs({"out": array}, inputs)
    return array


def selection_input(
    scores: Any, lengths: Any, check: bool | None = None
) -> tuple[Any, Array, Array | None]:
    """Check the arguments of a selection on given scores: (namespace, scores, lengths)."""
    given = {"scores": scores} | ({} if lengths is None else {"lengths": lengths})
    xp, a = as_arrays(given, {"scores": _FLOAT, "lengths": _INDEX})
    check_array("scores", a["scores"], _FLOAT, ("rows", "columns"))
    rows, columns = a["scores"].shape
    _check_extent("scores", "rows", rows, MOST)
    _check_extent("scores", "columns", columns, MOST)
    if lengths is None:
        return xp, a["scores"], None
    check_array("lengths", a["lengths"], _INDEX, (("rows", rows),))
    if wants_check(check, xp):
        check_lengths(a["lengths"], columns)
    return xp, a["scores"], a["lengths"]
