"""The inputs of a call as the caller gave them, and as the checked `Problem` of a backend."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import (
    CODES,
    FLOAT,
    FP8,
    INDEX,
    Array,
    Axis,
    check_array,
    check_contiguous,
    check_form,
    device_of,
)
from mla_fp8._check.interop import as_array, as_arrays, check_dtypes
from mla_fp8._check.parameters import DEPTHS, MAX_HEADS, check_int, finer_granularities
from mla_fp8._check.values import check_lengths, check_values, wants_check

_DTYPES: dict[str, tuple[Any, ...]] = {
    "q": CODES,
    "qs": FLOAT,
    "input_row_offsets": INDEX,
    "k_blocks": CODES,
    "k_cache_lengths": INDEX,
    "k_total_lengths": INDEX,
    "k_lookup_table": INDEX,
    "k_max_lengths": INDEX,
    "k_scales": FLOAT,
}
_START = {"q": 16, "k_blocks": 16}  # kernels load 16 bytes at once
_SCALES_AXES: tuple[Axis, ...] = (
    "num_blocks",
    1,
    "num_layers",
    "page_size",
    "kv_heads",
    "groups",
)
# Kernels count these extents in int32 and may step past the end by less than 2**16.
MOST = 2**31 - 2**16
_MOST_UNSIGNED = 2**32 - 1

_Form = tuple[Any, tuple[int, ...]]  # dtype and shape of an array


class Inputs(NamedTuple):
    """The inputs of one call as given; `MLAIndexerRaggedFloat8Paged.execute` documents each."""

    q: Any
    qs: Any
    input_row_offsets: Any
    k_blocks: Any
    k_cache_lengths: Any
    k_lookup_table: Any
    k_max_lengths: Any
    k_scales: Any
    layer_idx: Any
    k_total_lengths: Any = None  # given instead of k_cache_lengths

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that a backend reads, by argument name, in the order of `Problem`."""
        q, qs, offsets, blocks, lengths, table, _, scales, _, totals = self
        if totals is None:
            return dict(zip(_ARRAYS, (q, qs, offsets, blocks, lengths, table, scales), strict=True))
        return dict(zip(_TOTALS, (q, qs, offsets, blocks, totals, table, scales), strict=True))


@dataclass(frozen=True)
class Shape:
    """All plain numbers a call depends on. It is hashable, because plans are cached by it."""

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
    max_new: int  # bound of a sequence's new tokens; results do not depend on it, speed does
    max_keys: int  # bound of the keys a token sees
    signed_offsets: bool
    signed_lengths: bool
    total_lengths: bool = False  # lengths count the new tokens

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))


class Problem(NamedTuple):
    """A checked call: FP8 arrays are uint8, index arrays 32 bits wide, all are C-contiguous."""

    shape: Shape
    xp: Any  # numpy or cupy
    layer: int
    q: Array
    qs: Array
    input_row_offsets: Array
    k_blocks: Array
    k_cache_lengths: Array  # with shape.total_lengths they count the new tokens
    k_lookup_table: Array
    k_scales: Array

    @property
    def inputs(self) -> dict[str, Array]:
        """The input arrays by argument name."""
        return dict(zip(_TOTALS if self.shape.total_lengths else _ARRAYS, self[3:], strict=True))

    def cached(self, sequence: int, new: int) -> int:
        """Tokens before the ``new`` ones of a sequence; negative if a total length is too small."""
        return int(self.k_cache_lengths[sequence]) - (new if self.shape.total_lengths else 0)


_ARRAYS = Problem._fields[3:]
_TOTALS = tuple(name.replace("k_cache", "k_total") for name in _ARRAYS)


def check_problem(
    inputs: Inputs, num_heads: int, depth: int, groups: int, causal: bool, check: bool | None
) -> Problem:
    """Check the inputs of an operator with these parameters; for ``check`` see `wants_check`."""
    if inputs.k_total_lengths is not None and inputs.k_cache_lengths is not None:
        raise TypeError("k_cache_lengths must be None beside k_total_lengths; got both")
    total_lengths = inputs.k_total_lengths is not None
    xp, arrays = as_arrays(inputs.arrays, _DTYPES)
    bounds = _host_bounds(inputs.k_max_lengths, arrays["q"])
    forms = tuple((array.dtype, array.shape) for array in arrays.values())
    shape = _shape_of(forms, bounds, num_heads, depth, groups, causal, total_lengths)
    layer = check_int("layer_idx", inputs.layer_idx, range(shape.num_layers))
    for name, array in arrays.items():
        check_contiguous(name, array, _START.get(name, 0))
    if xp is np:  # CuPy has no FP8 dtype
        views = {n: a.view(np.uint8) for n, a in arrays.items() if a.dtype == FP8}
        arrays = arrays | views
    if wants_check(check, xp):
        with device_of(arrays["q"]):
            check_values(arrays, layer, bounds, total_lengths)
    return Problem(shape, xp, layer, *arrays.values())


def forms_of(inputs: Inputs) -> tuple[_Form, _Form]:
    """Dtype and shape of ``q`` and ``k_scales``, for `extents_of`."""
    _, arrays = as_arrays({"q": inputs.q, "k_scales": inputs.k_scales}, _DTYPES)
    q, k_scales = arrays["q"], arrays["k_scales"]
    return (q.dtype, q.shape), (k_scales.dtype, k_scales.shape)


def extents_of(q: _Form, k_scales: _Form) -> tuple[int, int, int]:
    """The number of heads, the depth and the granularity that these arrays imply."""
    check_form("q", *q, CODES, ("total_seq_len", "num_heads", "depth"))
    _, heads, depth = map(int, q[1])
    if depth not in DEPTHS or not 1 <= heads <= MAX_HEADS:
        raise ValueError(
            f"q must have 1 to {MAX_HEADS} heads of depth {_either(DEPTHS)}; got {q[1]}"
        )
    check_form("k_scales", *k_scales, FLOAT, _SCALES_AXES)
    groups = int(k_scales[1][-1])
    allowed = (1, *(depth // granularity for granularity in finer_granularities(depth)))
    if groups not in allowed:
        raise ValueError(
            f"k_scales must have {_either(allowed)} scales per key of depth {depth}; got {groups}"
        )
    return heads, depth, depth // groups


def _either(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))


@lru_cache(maxsize=1024)
def _shape_of(
    forms: tuple[_Form, ...],
    bounds: tuple[int, int] | None,
    num_heads: int,
    depth: int,
    groups: int,
    causal: bool,
    total_lengths: bool,
) -> Shape:
    """Check the dtype and shape of each array. Cached, because calls in a loop repeat them."""
    given = dict(zip(_TOTALS if total_lengths else _ARRAYS, forms, strict=True))
    lengths = "k_total_lengths" if total_lengths else "k_cache_lengths"

    def checked(name: str, *axes: Axis) -> tuple[int, ...]:
        check_form(name, *given[name], _DTYPES[name], axes)
        return tuple(map(int, given[name][1]))

    tokens, _, _ = checked("q", "total_seq_len", ("num_heads", num_heads), ("depth", depth))
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
    extents = blocks, 1, layers, page_size, kv_heads, groups
    checked(
        "k_scales",
        *((a, n) if isinstance(a, str) else n for a, n in zip(_SCALES_AXES, extents, strict=True)),
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
    """Raise on an extent that kernels cannot count."""
    if extent > most:
        raise ValueError(f"{name} must have {axis} <= {most}; got {extent}")


def _host_bounds(k_max_lengths: Any, q: Array) -> tuple[int, int] | None:
    """The bounds of [new, cached] tokens if they are on the host. On a device they are not read."""
    given = {"k_max_lengths": k_max_lengths}
    if isinstance(q, np.ndarray):  # then they must be on the host too
        array = as_arrays({"q": q} | given, _DTYPES)[1]["k_max_lengths"]
    else:
        check_dtypes(given, _DTYPES)
        array = as_array("k_max_lengths", k_max_lengths)
    check_array("k_max_lengths", array, INDEX, (1, 2))
    if not isinstance(array, np.ndarray):
        return None
    ((new, cached),) = array.tolist()
    if new < 0 or cached < 0:
        raise ValueError(f"k_max_lengths must be two lengths >= 0; got {[new, cached]}")
    return new, cached


def check_scores(scores: Any, lengths: Any, check: bool | None) -> dict[str, Array]:
    """Check a matrix of scores and, unless None, its row lengths: the arrays by argument name."""
    given = {"scores": scores} | ({} if lengths is None else {"lengths": lengths})
    xp, arrays = as_arrays(given, {"scores": FLOAT, "lengths": INDEX})
    check_array("scores", arrays["scores"], FLOAT, ("rows", "columns"))
    rows, columns = arrays["scores"].shape
    _check_extent("scores", "rows", rows, MOST)
    _check_extent("scores", "columns", columns, MOST)
    if "lengths" in arrays:
        check_array("lengths", arrays["lengths"], INDEX, (("rows", rows),))
        if wants_check(check, xp):
            check_lengths(arrays["lengths"], columns)
    return arrays
