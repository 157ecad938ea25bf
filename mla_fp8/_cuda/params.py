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
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._plan.topk import SELECTION_LENGTHS
from mla_fp8._plan.workspace import TOKEN_ROW, WINDOW, WORK_RANGE

_POINTER = np.uint64
# NVRTC has no offsetof. __INTADDR__ is the intrinsic that its front end, EDG, makes offsetof from.
_OFFSET_OF = (
    "#define OFFSET_OF(type, member) ((unsigned long long)__INTADDR__(&(((type*)0)->member)))\n"
)


def _struct(**fields: object) -> np.dtype:
    return np.dtype(list(fields.items()), align=True)


# paged_keys.cuh
PAGED_KEYS = _struct(
    blocks=_POINTER,
    scales=_POINTER,
    lookup_table=_POINTER,
    num_blocks=np.uint32,
    num_layers=np.uint32,
    layer=np.uint32,
    page_size=np.uint32,
    page_factor=np.uint32,  # the two numbers with which kernels divide by page_size: `divider`
    page_shift=np.uint32,
    pages_per_seq=np.uint32,
)
# scheduler.cuh
RAGGED_BATCH = _struct(
    input_row_offsets=_POINTER,
    lengths=_POINTER,
    batch_size=np.int32,
    total_tokens=np.int32,
    max_kv_len=np.int32,
    unscored_kv_len=np.int32,  # tokens that see no more keys than this are not scored
    causal=np.int32,
    signed_offsets=np.int32,
    signed_lengths=np.int32,
    total_lengths=np.int32,  # lengths count the new tokens
)
TENSOR_MAP = np.dtype((np.uint64, 16))


class Params(NamedTuple):
    """The struct ``Params`` of a kernel, and the structs that the kernel reads or writes."""

    dtype: np.dtype
    structs: dict[str, np.dtype]


PARAMS = {
    "schedule": Params(
        _struct(
            batch=RAGGED_BATCH,
            token_rows=_POINTER,
            work_ranges=_POINTER,
            windows=_POINTER,
            row_stride=np.int64,
            window_size=np.int64,  # elements; 0: rows are not packed
            chunk_tokens=np.int32,
            chunk_keys=np.int32,
            first_launch=np.int32,  # the launches whose work ranges are written
            launches=np.int32,
            all_launches=np.int32,
            blocks=np.int32,  # of a launch
            selection_blocks=np.dtype((np.uint8, SELECTION_LENGTHS)),
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
            keys=PAGED_KEYS,
            q=_POINTER,
            qs=_POINTER,
            token_rows=_POINTER,
            scores=_POINTER,
            row_stride=np.int64,
            first_token=np.int32,
            end_token=np.int32,
            tokens_per_tile=np.int32,
            max_kv_len=np.int32,
        ),
        {"PagedKeys": PAGED_KEYS, "TokenRow": TOKEN_ROW},
    ),
    "index_scores_sm90": Params(
        _struct(
            keys_map=TENSOR_MAP,  # first, for it begins on 64 bytes
            keys=PAGED_KEYS,
            batch=RAGGED_BATCH,
            q=_POINTER,
            qs=_POINTER,
            work_ranges=_POINTER,
            token_rows=_POINTER,
            scores=_POINTER,
            row_stride=np.int64,
            first_token=np.int32,
            end_token=np.int32,
            first_key=np.int32,
            num_keys=np.int32,
            missing_score=np.float32,  # written where a key's page does not exist
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
            token_rows=_POINTER,
            scores=_POINTER,
            row_stride=np.int64,
            tokens=np.int32,
            max_kv_len=np.int32,
        ),
        {"TokenRow": TOKEN_ROW},
    ),
    "topk_filter": Params(
        _struct(
            keys=PAGED_KEYS,
            scores=_POINTER,
            token_rows=_POINTER,  # of our own scores
            lengths=_POINTER,  # of a caller's rows: int32 or uint32, or null for all columns
            indices=_POINTER,
            values=_POINTER,
            window=_POINTER,  # or null: the rows are first_row ... end_row - 1
            row_stride=np.int64,
            first_row=np.int32,
            end_row=np.int32,
            first_column=np.int32,
            columns=np.int32,
            signed_lengths=np.int32,
        ),
        {"PagedKeys": PAGED_KEYS, "TokenRow": TOKEN_ROW, "Window": WINDOW},
    ),
    "topk_histogram": Params(
        _struct(
            scores=_POINTER,
            token_rows=_POINTER,
            lengths=_POINTER,
            indices=_POINTER,
            values=_POINTER,
            row_stride=np.int64,
            first_row=np.int32,
            end_row=np.int32,
            columns=np.int32,
            signed_lengths=np.int32,
        ),
        {"TokenRow": TOKEN_ROW},
    ),
    "sort_topk": Params(
        _struct(
            indices=_POINTER,
            values=_POINTER,
            spare_indices=_POINTER,
            spare_values=_POINTER,
        ),
        {},
    ),
}


def fields_of(dtype: np.dtype) -> Iterator[tuple[str, np.dtype, int]]:
    """Name, dtype and offset of each field of a struct."""
    for name, (kind, offset, *_) in (dtype.fields or {}).items():
        yield name, kind, offset


@lru_cache(maxsize=32)
def struct_type(dtype: np.dtype) -> type[Any]:
    """The `ctypes.Structure` with the fields of a dtype; a wrong field name is an AttributeError.

    Setting a field of it takes 50 ns, and of a NumPy structured array five times as long.
    """

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
