"""Quantising and transforming keys and queries on a GPU: one launch each.

A `Launch` serves one thread, because a call changes its parameters.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cupy

from mla_fp8._check.arrays import Array, alignment_of
from mla_fp8._check.keys import KeyWrite
from mla_fp8._check.transforms import Pooling, Queries, Rotation
from mla_fp8._cuda.launch import Launch
from mla_fp8._plan.kernel import Device, Kernel, divider
from mla_fp8._plan.keys import (
    BY_POSITION,
    BY_SLOT,
    BY_TOKEN,
    INDEX_TYPES,
    NUMBER_TYPES,
    WriteForm,
    hadamard_kernel,
    per_number_kernel,
    thread_blocks,
)


@lru_cache(maxsize=256)
def _launch(thread: int, kernel: Kernel, device: Device) -> Launch:
    return Launch(kernel, device)


def _run(launch: Launch, blocks: int) -> None:
    launch(blocks, cupy.cuda.get_current_stream().ptr)


def _number_type(array: Array) -> int:
    return NUMBER_TYPES[array.dtype.name]


def _is_aligned(array: Array) -> bool:
    return bool(array.data.ptr % 16 == 0)


def _values_alignment(values: Array) -> int:
    """The largest of 16, 4 and 1 bytes that all rows of a pool's values begin on."""
    return alignment_of(values.data.ptr | (values.strides[0] if values.shape[0] > 1 else 0))


def _bind_pool(p: Any, values: Array, scales: Array, page_size: int, rows: int, heads: int) -> None:
    """Set the fields that say where values and scales go."""
    p.values, p.scales = values.data.ptr, scales.data.ptr
    p.page_size, p.rows, p.heads = page_size, rows, heads
    p.page_factor, p.page_shift = map(int, divider(page_size))


def write_keys(write: KeyWrite, thread: int, device: Device) -> None:
    """Quantise keys and store their values and scales."""
    keys, values, scales = write.keys, write.k_blocks, write.k_scales
    tokens, heads, depth = keys.shape
    blocks, page_size = values.shape[:2]
    form = WriteForm(
        depth,
        scales.shape[-1],
        _number_type(keys),
        _is_aligned(keys),
        _values_alignment(values),
        BY_SLOT if len(write.places) == 1 else BY_POSITION,
    )
    launch = _launch(thread, form.kernel, device)
    p = launch.params
    _bind_pool(p, values, scales, page_size, tokens * heads, heads)
    p.keys, p.gates, p.power_of_two = keys.data.ptr, 0, write.power_of_two
    p.num_blocks, p.block_stride = blocks, values.strides[0]
    p.scales_stride = scales.strides[0] // scales.itemsize
    if len(write.places) == 1:
        (slots,) = write.places
        p.slots, p.slots_type = slots.data.ptr, INDEX_TYPES[slots.dtype.name]
        p.places = blocks * page_size
    else:
        sequences, positions, table = write.places
        p.sequences, p.sequences_type = sequences.data.ptr, INDEX_TYPES[sequences.dtype.name]
        p.positions, p.positions_type = positions.data.ptr, INDEX_TYPES[positions.dtype.name]
        p.lookup_table, (p.batch, p.pages_per_seq) = table.data.ptr, table.shape
        p.places = p.pages_per_seq * page_size
    _run(launch, form.blocks(p.rows))


def quantize_queries(
    queries: Queries, codes: Array, qs: Array, thread: int, device: Device
) -> None:
    """Quantise queries with one scale per head, and multiply the scale into the head's gate."""
    tokens, heads, depth = codes.shape
    q = queries.q
    form = WriteForm(depth, 1, _number_type(q), _is_aligned(q), 16, BY_TOKEN)
    launch = _launch(thread, form.kernel, device)
    p = launch.params
    _bind_pool(p, codes, qs, tokens, tokens * heads, heads)  # one block of all tokens
    p.keys, p.gates, p.power_of_two = q.data.ptr, queries.weights.data.ptr, queries.power_of_two
    p.num_blocks, p.places = 1, tokens
    p.head_scale, p.softmax_scale = float(queries.head_scale), float(queries.softmax_scale)
    _run(launch, form.blocks(p.rows))


def rope(rotation: Rotation, out: Array, thread: int, device: Device) -> None:
    """Rotate the first channels of each row by the angles of its token."""
    x, cos, sin, interleaved = rotation
    launch = _launch(thread, per_number_kernel("rope", _number_type(x)), device)
    p = launch.params
    p.x, p.cos, p.sin, p.out = (array.data.ptr for array in (x, cos, sin, out))
    p.pairs, p.half_depth = x.size // 2, x.shape[-1] // 2
    p.heads = 1 if x.ndim == 2 else x.shape[1]
    p.angles, p.interleaved = cos.shape[1], interleaved
    _run(launch, thread_blocks(p.pairs))


def hadamard(x: Array, out: Array, thread: int, device: Device) -> None:
    """The orthonormal Walsh-Hadamard transform of each row."""
    depth = x.shape[-1]
    kernel = hadamard_kernel(depth, _number_type(x), _is_aligned(x))
    launch = _launch(thread, kernel, device)
    p = launch.params
    p.x, p.out, p.rows, p.factor = x.data.ptr, out.data.ptr, x.size // depth, depth**-0.5
    _run(launch, thread_blocks(x.size // 8))


def pool_keys(pooling: Pooling, out: Array, thread: int, device: Device) -> None:
    """The weighted sums, or means, of consecutive rows."""
    keys, weights, pool = pooling
    launch = _launch(thread, per_number_kernel("pool_keys", _number_type(keys)), device)
    p = launch.params
    p.x, p.weights = keys.data.ptr, 0 if weights is None else weights.data.ptr
    p.out, p.numbers, p.width, p.pool = out.data.ptr, out.size, out.shape[1], pool
    _run(launch, thread_blocks(out.size))
