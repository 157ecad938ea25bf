"""Arrays in, a frozen and checked problem out, or an error that names the argument."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._arrays import (
    FP8,
    Array,
    as_array,
    as_arrays,
    check_array,
    check_form,
    check_outputs,
    device_of,
    empty_beside,
    plain,
)
from mla_fp8._parameters import DEPTHS, GRANULARITIES, MAX_HEADS, check_int
from mla_fp8._values import check_lengths, check_values, wants_check

_ARRAYS = (
    "q",
    "qs",
    "input_row_offsets",
    "k_blocks",
    "k_cache_lengths",
    "k_lookup_table",
    "k_scales",
)
_INDEX = (np.dtype(np.uint32), np.dtype(np.int32))
_BYTES = (FP8, np.dtype(np.uint8))
_FLOAT = (np.dtype(np.float32),)
_OUTPUTS = (np.dtype(np.int32), np.dtype(np.float32))  # indices and their scores
_SCRATCH = (np.dtype(np.uint8),)
_MAX_POSITION = 2**31 - 2**16  # positions are int32, with room to step past the end by a tile


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
        return dict(zip(_ARRAYS, self[-len(_ARRAYS) :], strict=True))


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
    num_heads: int | None,
    depth: int | None,
    groups: int | None,
    causal: bool,
    check: bool | None,
) -> Problem:
    """Check the operation's arguments; ``None`` for a parameter takes it from the arrays."""
    given = {
        "q": q,
        "qs": qs,
        "input_row_offsets": input_row_offsets,
        "k_blocks": k_blocks,
        "k_cache_lengths": k_cache_lengths,
        "k_lookup_table": k_lookup_table,
        "k_scales": k_scales,
    }
    xp, arrays = as_arrays(given)
    bounds = _host_bounds(k_max_lengths, xp)
    forms = tuple((array.dtype, array.shape) for array in arrays.values())
    shape = _shape_of(forms, bounds, num_heads, depth, groups, causal)
    layer = check_int("layer_idx", layer_idx, range(shape.num_layers))
    arrays = {name: plain(name, array) for name, array in arrays.items()}
    if xp is not np:
        _check_alignment("q", arrays["q"])
        _check_alignment("k_blocks", arrays["k_blocks"])
    if wants_check(check, xp):
        with device_of(arrays["q"]):
            check_values(arrays, layer, bounds)
    return Problem(shape, xp, layer, *arrays.values())


@lru_cache(maxsize=1024)
def _shape_of(
    forms: tuple[tuple[Any, tuple[int, ...]], ...],
    bounds: tuple[int, int] | None,
    num_heads: int | None,
    depth: int | None,
    groups: int | None,
    causal: bool,
) -> Shape:
    """Check dtypes and shapes, in the order of ``_ARRAYS``; a loop's are nearly always the same."""
    given = dict(zip(_ARRAYS, forms, strict=True))

    def checked(name: str, dtypes: tuple[Any, ...], *shape: int | str) -> tuple[int, ...]:
        check_form(name, *given[name], dtypes, shape)
        return tuple(map(int, given[name][1]))

    tokens, num_heads, depth = checked(
        "q", _BYTES, "total_seq_len", num_heads or "num_heads", depth or "depth"
    )
    check_int("num_heads, q.shape[1],", num_heads, range(1, MAX_HEADS + 1))
    check_int("depth, q.shape[2],", depth, DEPTHS)
    checked("qs", _FLOAT, tokens, num_heads)
    (batch,) = checked("k_cache_lengths", _INDEX, "batch")
    checked("input_row_offsets", _INDEX, batch + 1)
    blocks, _, layers, page_size, kv_heads, _ = checked(
        "k_blocks", _BYTES, "num_blocks", 1, "num_layers", "page_size", "kv_heads", depth
    )
    if page_size < 1 or kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"k_blocks must have page_size >= 1 and kv_heads dividing {num_heads} heads; "
            f"got page_size {page_size}, kv_heads {kv_heads}"
        )
    _, pages = checked("k_lookup_table", _INDEX, batch, "pages_per_seq")
    *_, groups = checked(
        "k_scales", _FLOAT, blocks, 1, layers, page_size, kv_heads, groups or "scale_groups"
    )
    if groups != 1 and groups not in (depth // g for g in GRANULARITIES):
        raise ValueError(
            f"k_scales must have depth / granularity scales per key, granularity one of "
            f"{GRANULARITIES} or >= depth ({depth}); got {groups} scales"
        )
    capacity = pages * page_size
    max_keys = capacity if bounds is None else min(capacity, sum(bounds))
    if max_keys > _MAX_POSITION:
        raise ValueError(
            f"k_lookup_table must address at most {_MAX_POSITION} positions a sequence; "
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
        signed_lengths=given["k_cache_lengths"][0] == np.int32,
    )


def _host_bounds(k_max_lengths: Any, xp: Any) -> tuple[int, int] | None:
    """[max new, max cached tokens] if they are on the host; on a device they are not read."""
    if xp is np:  # then it is an array like the others
        _, arrays = as_arrays({"q": np.empty(0), "k_max_lengths": k_max_lengths})
        array = arrays["k_max_lengths"]
    else:
        array = as_array("k_max_lengths", k_max_lengths)
    check_array("k_max_lengths", array, _INDEX, (1, 2))
    if not isinstance(array, np.ndarray):
        return None
    ((new, cached),) = array.tolist()
    if new < 0 or cached < 0:
        raise ValueError(f"k_max_lengths must be two lengths >= 0; got {[new, cached]}")
    return new, cached


def _check_alignment(name: str, array: Array) -> None:
    """The kernels load vectors of up to 16 bytes."""
    if array.data.ptr % 16:
        raise ValueError(
            f"{name} must start at a multiple of 16 bytes; got address {array.data.ptr:#x}"
        )


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
        xp, arrays = as_arrays({first: inputs[first]} | theirs)
        theirs = {name: arrays[name] for name in theirs}
        for name, dtype in zip(names, _OUTPUTS, strict=False):
            if name in theirs:
                check_array(name, theirs[name], (dtype,), (rows, k))
        if workspace is not None:
            check_array("workspace", theirs["workspace"], _SCRATCH, ("bytes",))
            if xp is not np:
                _check_alignment("workspace", theirs["workspace"])
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
    _, arrays = as_arrays({first: inputs[first], "out": out})
    array = check_array("out", arrays["out"], _FLOAT, shape)
    check_outputs({"out": array}, inputs)
    return array


def selection_input(
    scores: Any, lengths: Any, check: bool | None = None
) -> tuple[Any, Array, Array | None]:
    """Check the arguments of a selection on given scores: (namespace, scores, lengths)."""
    xp, a = as_arrays({"scores": scores} | ({} if lengths is None else {"lengths": lengths}))
    check_array("scores", a["scores"], _FLOAT, ("rows", "columns"))
    rows, columns = a["scores"].shape
    if columns > _MAX_POSITION:
        raise ValueError(f"scores must have at most {_MAX_POSITION} columns; got {columns}")
    if lengths is None:
        return xp, a["scores"], None
    check_array("lengths", a["lengths"], _INDEX, (rows,))
    if wants_check(check, xp):
        check_lengths(a["lengths"], columns)
    return xp, a["scores"], a["lengths"]
