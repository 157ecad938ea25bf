"""The inputs of a call as the caller gave them, and as the checked `Problem` of a backend."""

from __future__ import annotations

import math
from functools import lru_cache, reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import (
    CODES,
    FLOAT,
    FP8,
    INDEX,
    POOLS,
    Array,
    Axis,
    alignment_of,
    check_array,
    check_contiguous,
    check_form,
    check_pool,
    device_of,
)
from mla_fp8._check.interop import as_array, as_arrays, check_dtypes
from mla_fp8._check.parameters import (
    DEPTHS,
    KEY_STEP_RANGE,
    MAX_HEADS,
    allowed_groups,
    check_int,
    either,
)
from mla_fp8._check.shape import MOST, Parameters, Shape, check_extent, rows_seen
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
    "key_start": INDEX,
}
_START_RANGE = range(MOST + 1)
_STARTS = {"q": 16, "k_blocks": 1}  # bytes; kernels load 16 of q at once. Others: the item size, 4
_MOST_STRIDE = 2**40  # bytes from block to block that the tensor memory accelerator takes
_SCALES_AXES: tuple[Axis, ...] = (
    "num_blocks",
    1,
    "num_layers",
    "page_size",
    "kv_heads",
    "groups",
)
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
    key_start: Any = None  # an int or an array [batch]; None: this is no shard, or its start is 0
    key_step: Any = 1

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that a backend reads, by argument name, in the order of `Problem`.

        ``qs`` and ``key_start`` are missing if they are not arrays.
        """
        q, qs, offsets, blocks, lengths, table, _, scales, _, totals, start, _ = self
        lengths_name = "k_cache_lengths" if totals is None else "k_total_lengths"
        found = {
            "q": q,
            "qs": qs,
            "input_row_offsets": offsets,
            "k_blocks": blocks,
            lengths_name: lengths if totals is None else totals,
            "k_lookup_table": table,
            "k_scales": scales,
        }
        if qs is None:
            del found["qs"]
        if getattr(start, "shape", ()):
            found["key_start"] = start
        return found


class Problem(NamedTuple):
    """A checked call: FP8 arrays are uint8, index arrays 32 bits wide.

    All arrays are C-contiguous, but for the strides of blocks and layers of the two pools.
    """

    shape: Shape
    xp: Any  # numpy or cupy
    layer: int
    key_start: int  # the position of the shard's first row, if key_starts is None
    inputs: dict[str, Array]  # the arrays by argument name
    q: Array
    qs: Array | None  # None: every gate is 1
    input_row_offsets: Array
    k_blocks: Array
    k_cache_lengths: Array  # with shape.total_lengths they count the new tokens
    k_lookup_table: Array
    k_scales: Array
    key_starts: Array | None = None  # [batch]

    def cached(self, sequence: int, new: int) -> int:
        """Tokens before the ``new`` ones of a sequence; negative if a total length is too small.

        They are at most `MOST`, as in kernels.
        """
        counted = new if self.shape.total_lengths else 0
        return min(int(self.k_cache_lengths[sequence]) - counted, MOST)


_ARRAYS = *Problem._fields[5:-1], "key_start"  # argument names
_TOTALS = tuple(name.replace("k_cache", "k_total") for name in _ARRAYS)


def check_problem(inputs: Inputs, parameters: Parameters, check: bool | None) -> Problem:
    """Check the inputs of an operator with these parameters; for ``check`` see `wants_check`."""
    if inputs.k_total_lengths is not None and inputs.k_cache_lengths is not None:
        raise TypeError("k_cache_lengths must be None beside k_total_lengths; got both")
    if inputs.k_total_lengths is None and inputs.k_cache_lengths is None:
        raise TypeError("k_cache_lengths or k_total_lengths must be given; got None for both")
    total_lengths = inputs.k_total_lengths is not None
    xp, arrays = as_arrays(inputs.arrays, _DTYPES)
    bounds = host_bounds(inputs.k_max_lengths, arrays["q"])
    key_step = check_int("key_step", inputs.key_step, KEY_STEP_RANGE)
    is_number = inputs.key_start is not None and "key_start" not in arrays
    key_start = check_int("key_start", inputs.key_start, _START_RANGE) if is_number else 0
    sharded = inputs.key_start is not None or key_step > 1
    forms = tuple([(name, array.dtype, array.shape) for name, array in arrays.items()])
    shape = _shape_of(
        forms, bounds, parameters, key_start, key_step, sharded, _alignment_of(arrays["k_blocks"])
    )
    layer = check_int("layer_idx", inputs.layer_idx, range(shape.num_layers))
    on_host = xp is np
    for name, array in arrays.items():
        start = _STARTS.get(name, 4)
        if array.flags.c_contiguous and (on_host or not array.data.ptr % start):
            continue  # the usual case, without a call
        if name in POOLS and not array.flags.c_contiguous:
            check_pool(name, array)
        else:
            check_contiguous(name, array, start)
    if on_host:  # CuPy has no FP8 dtype
        views = {n: a.view(np.uint8) for n, a in arrays.items() if a.dtype == FP8}
        arrays = arrays | views
    if wants_check(check, xp):
        with device_of(arrays["q"]):
            check_values(arrays, shape, layer, key_start, bounds)
    names = _TOTALS if total_lengths else _ARRAYS
    return Problem(shape, xp, layer, key_start, arrays, *map(arrays.get, names))


def _alignment_of(k_blocks: Array) -> int:
    """The bytes of `Shape.key_alignment`: a multiple of them is the address of every key.

    Kernels load with the tensor memory accelerator where it is 16. It takes no negative strides
    and, by its documentation, no pages that overlap. Pools with either count as less.
    """
    if isinstance(k_blocks, np.ndarray):
        return 16
    if k_blocks.flags.c_contiguous:
        bits = k_blocks.data.ptr
    else:
        pool = zip(k_blocks.strides[:3], k_blocks.shape[:3], strict=True)
        strides = [stride for stride, extent in pool if extent > 1]
        bits = k_blocks.data.ptr | reduce(or_, strides, 0)
        page = k_blocks.itemsize * math.prod(k_blocks.shape[3:])
        if not all(page <= stride < _MOST_STRIDE for stride in strides):
            bits |= 4
    return alignment_of(bits)


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
            f"q must have 1 to {MAX_HEADS} heads of depth {either(DEPTHS)}; got {q[1]}"
        )
    check_form("k_scales", *k_scales, FLOAT, _SCALES_AXES)
    groups = int(k_scales[1][-1])
    allowed = allowed_groups(depth)
    if groups not in allowed:
        raise ValueError(
            f"k_scales must have {either(allowed)} scales per key of depth {depth}; got {groups}"
        )
    return heads, depth, depth // groups


@lru_cache(maxsize=1024)
def _shape_of(
    forms: tuple[tuple[str, Any, tuple[int, ...]], ...],
    bounds: tuple[int, int] | None,
    parameters: Parameters,
    key_start: int,
    key_step: int,
    sharded: bool,
    key_alignment: int,
) -> Shape:
    """Check the dtype and shape of each array. Cached, because calls in a loop repeat them."""
    given = {name: (dtype, shape) for name, dtype, shape in forms}
    num_heads, depth, groups, causal, kpool = parameters
    total_lengths = "k_total_lengths" in given
    lengths = "k_total_lengths" if total_lengths else "k_cache_lengths"

    def checked(name: str, *axes: Axis) -> tuple[int, ...]:
        check_form(name, *given[name], _DTYPES[name], axes)
        return tuple(map(int, given[name][1]))

    tokens, _, _ = checked("q", "total_seq_len", ("num_heads", num_heads), ("depth", depth))
    if "qs" in given:
        checked("qs", ("total_seq_len", tokens), ("num_heads", num_heads))
    (batch,) = checked(lengths, "batch")
    if "key_start" in given:
        checked("key_start", ("batch", batch))
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
        check_extent(name, axis, extent, most)
    capacity, tokens_per_key = pages * page_size, kpool * key_step
    max_keys = capacity
    if bounds is not None or sharded or kpool > 1:
        most = MOST if bounds is None else sum(bounds)
        max_keys = min(capacity, rows_seen(most, kpool, key_start, key_step))
    if max_keys * tokens_per_key > MOST:
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
        kpool=kpool,
        key_step=key_step,
        sharded=sharded,
        key_alignment=key_alignment,
    )


def host_bounds(k_max_lengths: Any, q: Array) -> tuple[int, int] | None:
    """The bounds of [new, cached] tokens if they are on the host. On a device they are not read."""
    if type(k_max_lengths) is np.ndarray:
        array = k_max_lengths
    elif isinstance(q, np.ndarray):  # then they must be on the host too
        array = as_arrays({"q": q, "k_max_lengths": k_max_lengths}, _DTYPES)[1]["k_max_lengths"]
    else:
        check_dtypes({"k_max_lengths": k_max_lengths}, _DTYPES)
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
    check_extent("scores", "rows", rows, MOST)
    check_extent("scores", "columns", columns, MOST)
    if "lengths" in arrays:
        check_array("lengths", arrays["lengths"], INDEX, (("rows", rows),))
        if wants_check(check, xp):
            check_lengths(arrays["lengths"], columns)
    return arrays
