"""The parameter structs of the kernels, as NumPy structured dtypes.

Each kernel takes one struct, ``Params``, by value. The dtypes here have the fields of the structs
in ``kernels/``, in their order and with their names. `layout_asserts` writes a ``static_assert``
for each field, and `jit.source` appends them to the kernel's source: if host and device disagree,
the kernel does not compile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._plan.topk import SELECTION_LENGTHS
from mla_fp8._plan.workspace import TOKEN_ROW, WINDOW, WORK_RANGE

_POINTER = np.uint64
# NVRTC has no offsetof. Its front end, EDG, implements offsetof with the intrinsic __INTADDR__.
_OFFSET_OF = (
    "#define OFFSET_OF(type, member) ((unsigned long long)__INTADDR__(&(((type*)0)->member)))\n"
)


def _struct(*groups: tuple[Any, str]) -> np.dtype:
    """A struct of groups of fields: a type, and the names of the fields that have it."""
    return np.dtype([(name, kind) for kind, names in groups for name in names.split()], align=True)


# paged_keys.cuh
PAGED_KEYS = _struct(
    (_POINTER, "blocks scales lookup_table"),
    (np.int64, "block_stride scales_stride"),
    (np.uint32, "num_blocks page_size page_factor page_shift pages_per_seq"),
)
# scheduler.cuh
RAGGED_BATCH = _struct(
    (_POINTER, "input_row_offsets lengths key_starts"),
    (np.int32, "batch_size total_tokens max_kv_len unscored_kv_len key_start key_step kpool"),
    (np.int32, "causal signed_offsets signed_lengths total_lengths"),
)
_TENSOR_MAP = np.dtype((np.uint64, 16))
_SELECTION_BLOCKS = np.dtype((np.uint8, SELECTION_LENGTHS))


class Params(NamedTuple):
    """The struct ``Params`` of a kernel, and the structs that the kernel reads or writes."""

    dtype: np.dtype
    structs: dict[str, np.dtype]


# The .cu files say what each field means.
PARAMS = {
    "schedule": Params(
        _struct(
            (RAGGED_BATCH, "batch"),
            (_POINTER, "token_rows work_ranges windows"),
            (np.int64, "row_stride window_size"),
            (np.int32, "part_tokens part_keys first_launch launches all_launches blocks"),
            (_SELECTION_BLOCKS, "selection_blocks"),
        ),
        {
            "RaggedBatch": RAGGED_BATCH,
            "TokenRow": TOKEN_ROW,
            "WorkRange": WORK_RANGE,
            "Window": WINDOW,
        },
    ),
    "index_scores": Params(
        _struct(
            (PAGED_KEYS, "keys"),
            (_POINTER, "q qs token_rows scores"),
            (np.int64, "row_stride"),
            (np.int32, "first_token end_token tokens_per_tile max_kv_len"),
        ),
        {"PagedKeys": PAGED_KEYS, "TokenRow": TOKEN_ROW},
    ),
    "index_scores_sm90": Params(
        _struct(
            (_TENSOR_MAP, "keys_map"),
            (PAGED_KEYS, "keys"),
            (RAGGED_BATCH, "batch"),
            (_POINTER, "q qs work_ranges token_rows scores"),
            (np.int64, "row_stride"),
            (np.int32, "first_token end_token first_key num_keys"),
            (np.float32, "missing_score"),
        ),
        {
            "PagedKeys": PAGED_KEYS,
            "RaggedBatch": RAGGED_BATCH,
            "TokenRow": TOKEN_ROW,
            "WorkRange": WORK_RANGE,
        },
    ),
    "fill_invalid": Params(
        _struct(
            (_POINTER, "token_rows scores"),
            (np.int64, "row_stride"),
            (np.int32, "tokens max_kv_len"),
        ),
        {"TokenRow": TOKEN_ROW},
    ),
    "topk_filter": Params(
        _struct(
            (PAGED_KEYS, "keys"),
            (_POINTER, "scores token_rows lengths indices slots values window"),
            (np.int64, "row_stride"),
            (np.int32, "first_row end_row first_column columns signed_lengths"),
            (RAGGED_BATCH, "batch"),
        ),
        {
            "PagedKeys": PAGED_KEYS,
            "TokenRow": TOKEN_ROW,
            "Window": WINDOW,
            "RaggedBatch": RAGGED_BATCH,
        },
    ),
    "topk_histogram": Params(
        _struct(
            (_POINTER, "scores token_rows lengths indices values"),
            (np.int64, "row_stride"),
            (np.int32, "first_row end_row columns signed_lengths"),
            (PAGED_KEYS, "keys"),
            (_POINTER, "slots"),
            (RAGGED_BATCH, "batch"),
        ),
        {"PagedKeys": PAGED_KEYS, "TokenRow": TOKEN_ROW, "RaggedBatch": RAGGED_BATCH},
    ),
    "translate_topk": Params(
        _struct(
            (PAGED_KEYS, "keys"),
            (_POINTER, "token_rows key_starts indices slots"),
            (np.int64, "rows"),
            (np.int32, "key_start key_step"),
        ),
        {"PagedKeys": PAGED_KEYS, "TokenRow": TOKEN_ROW},
    ),
    "write_keys": Params(
        _struct(
            (_POINTER, "keys gates slots sequences positions lookup_table values scales"),
            (np.int64, "block_stride scales_stride"),
            (np.uint32, "places batch num_blocks page_size page_factor page_shift pages_per_seq"),
            (np.uint32, "rows heads"),
            (np.int32, "slots_type sequences_type positions_type power_of_two"),
            (np.float32, "head_scale softmax_scale"),
        ),
        {},
    ),
    "hadamard": Params(
        _struct((_POINTER, "x out"), (np.int64, "rows"), (np.float32, "factor")), {}
    ),
    "rope": Params(
        _struct(
            (_POINTER, "x cos sin out"),
            (np.int64, "pairs"),
            (np.uint32, "heads half_depth angles"),
            (np.int32, "interleaved"),
        ),
        {},
    ),
    "pool_keys": Params(
        _struct((_POINTER, "x weights out"), (np.int64, "numbers"), (np.uint32, "width pool")), {}
    ),
    "merge_topk": Params(
        _struct(
            (_POINTER, "listed_indices listed_scores indices values"),
            (np.int64, "list_stride"),
            (np.int32, "entries"),
        ),
        {},
    ),
    "sort_topk": Params(_struct((_POINTER, "indices values spare_indices spare_values")), {}),
}


def fields_of(dtype: np.dtype) -> Iterator[tuple[str, np.dtype, int]]:
    """Name, dtype and offset of each field of a struct."""
    for name, (kind, offset, *_) in (dtype.fields or {}).items():
        yield name, kind, offset


_structs: dict[np.dtype, type[Any]] = {}
_making = RLock()


def struct_type(dtype: np.dtype) -> type[Any]:
    """The `ctypes.Structure` with the fields of a dtype; a wrong field name is an AttributeError.

    A field that is a struct takes instances of one class only. So a dtype has one class, also
    where threads ask for it at once. Setting a field of it takes 50 ns, and of a NumPy structured
    array five times as long.
    """
    with _making:
        if dtype not in _structs:
            _structs[dtype] = _make_struct(dtype)
        return _structs[dtype]


def _make_struct(dtype: np.dtype) -> type[Any]:
    def c_type(kind: np.dtype) -> Any:
        if kind.subdtype:
            return c_type(kind.subdtype[0]) * kind.shape[0]
        return struct_type(kind) if kind.names else np.ctypeslib.as_ctypes_type(kind)

    members = [(name, c_type(kind)) for name, kind, _ in fields_of(dtype)]
    struct = type("Struct", (ctypes.Structure,), {"__slots__": (), "_fields_": members})
    for name, _, offset in fields_of(dtype):
        if getattr(struct, name).offset != offset:
            raise TypeError(f"{name} stands at {getattr(struct, name).offset}, not at {offset}")
    return struct


@lru_cache(maxsize=16)
def layout_asserts(template: str) -> str:
    """C++ that does not compile unless a kernel's structs have the layout of the dtypes here."""
    params, structs = PARAMS[template]
    lines = []
    for struct, dtype in {**structs, "Params": params}.items():
        for field, kind, offset in fields_of(dtype):
            lines.append(f"static_assert(OFFSET_OF({struct}, {field}) == {offset});")
            lines.append(f"static_assert(sizeof({struct}::{field}) == {kind.itemsize});")
    for struct, dtype in structs.items():
        lines.append(f"static_assert(sizeof({struct}) == {dtype.itemsize});")
    # Params may end in padding, which the alignment of a tensor map asks for.
    lines.append(f"static_assert(sizeof(Params) - {params.itemsize} < alignof(Params));")
    return f'#line 1 "params.py, {template}"\n{_OFFSET_OF}' + "\n".join(lines) + "\n"
