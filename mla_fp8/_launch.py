"""A checked problem and its plan in, kernel calls on the current stream out."""

from __future__ import annotations

from functools import lru_cache

import cupy
import numpy as np

from mla_fp8 import _jit, _plan
from mla_fp8._arrays import Array
from mla_fp8._plan import Device, Kernel, ScorePlan
from mla_fp8._problem import Problem, Selection

_TENSOR_MAP = np.dtype([("opaque", np.uint64, 16)])
_HOLE = np.uint32(0xFFFFFFFF).view(np.float32)  # kHole of common.cuh
_OLDEST = 80  # the first compute capability with the tensor-core product we use


@lru_cache(maxsize=64)
def device_facts(ordinal: int) -> Device:
    """The facts a plan needs of a GPU, or an error if it is too old."""
    device = cupy.cuda.Device(ordinal)
    capability = int(device.compute_capability)
    if capability < _OLDEST:
        raise RuntimeError(
            f"mla_fp8 needs compute capability 8.0 or newer; GPU {ordinal} has "
            f"{capability // 10}.{capability % 10} (copy the arrays to the host to use NumPy)"
        )
    return Device(
        ordinal=ordinal,
        arch=_plan.architecture(capability),
        multiprocessors=device.attributes["MultiProcessorCount"],
    )


def _call(kernel: Kernel, device: Device, blocks: int, *arguments: object) -> None:
    function = _jit.load(kernel, device.arch, device.ordinal)
    function((blocks,), (kernel.threads,), arguments, shared_mem=kernel.shared_bytes)


def _pointer(array: Array | None) -> Array | np.uintp:
    return np.uintp(0) if array is None else array


@lru_cache(maxsize=256)
def _tensor_map(address: int, rows: int, row_bytes: int, box_rows: int) -> np.ndarray:
    """The ``TensorMap`` of ``sm90.cuh``: boxes of rows, swizzled over their whole width."""
    from cuda.bindings import driver

    swizzle = getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{row_bytes}B")
    status, found = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        address,
        [driver.cuuint64_t(row_bytes), driver.cuuint64_t(max(rows, 1))],
        [driver.cuuint64_t(row_bytes)],
        [driver.cuuint32_t(row_bytes), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuTensorMapEncodeTiled: {status.name}")
    words = np.array([int(word) for word in found.opaque], np.uint64)
    return words.view(_TENSOR_MAP)  # a structure is passed to a kernel by value


def _located(problem: Problem, plan: ScorePlan) -> tuple[Array, Array]:
    """Room for what the scoring launches need of offsets and lengths.

    Returns
    -------
    spans : [total_seq_len, 2] int32
        Sequence and number of keys of each token.
    shares : [launches, blocks, 8] int32
        What each block of each launch scores: ``Share`` of ``ragged_tiles.cuh``.
    """
    spans = cupy.empty((problem.shape.total_seq_len, 2), np.int32)
    return spans, cupy.empty((plan.launches, plan.blocks, 8), np.int32)


def _locate(
    problem: Problem, plan: ScorePlan, device: Device, located: tuple[Array, Array]
) -> None:
    """Fill in ``located``."""
    s = problem.shape
    _call(
        plan.locate,
        device,
        plan.locate_blocks,
        problem.input_row_offsets,
        problem.k_cache_lengths,
        *located,
        np.int32(s.total_seq_len),
        np.int32(s.batch),
        np.int32(s.max_keys),
        np.int32(plan.chunk_tokens),
        np.int32(plan.blocks),
    )


def _pages(problem: Problem) -> tuple[object, ...]:
    """The arguments that become ``PagedKeys`` of ``paged_keys.cuh``."""
    s = problem.shape
    return (
        problem.k_blocks,
        problem.k_scales,
        problem.k_lookup_table,
        np.uint32(s.num_blocks),
        np.uint32(s.num_layers),
        np.uint32(problem.layer),
        np.uint32(s.page_size),
        *_plan.divider(s.page_size),
        np.uint32(s.pages_per_seq),
    )


def _score(
    problem: Problem,
    plan: ScorePlan,
    device: Device,
    located: tuple[Array, Array],
    first: int,
    out: Array,
    hole: np.float32,
) -> None:
    """Scores of the ``chunk_tokens`` tokens from ``first`` on into the rows of ``out``.

    ``hole`` stands for a key whose page does not exist.
    """
    s = problem.shape
    spans, shares = located
    end = min(first + plan.chunk_tokens, s.total_seq_len)
    queries: tuple[object, ...] = (problem.q, problem.qs)
    if plan.route == "portable":
        keys = (*queries, spans, *_pages(problem))
        tile: tuple[object, ...] = (np.int32(plan.tokens_per_tile), np.int32(s.max_keys))
    else:
        rows = s.num_blocks * s.num_layers * s.page_size
        keys = (
            _tensor_map(
                problem.k_blocks.data.ptr, rows, s.depth, dict(plan.score.parameters)["kBoxRows"]
            ),
            *queries,
            problem.input_row_offsets,
            problem.k_cache_lengths,
            shares[first // plan.chunk_tokens],
            *_pages(problem),
            np.int32(s.batch),
            np.int32(s.total_seq_len),
        )
        tile = (
            np.int32(s.max_keys),
            np.int32(s.causal),
            np.int32(s.signed_offsets),
            np.int32(s.signed_lengths),
            hole,
        )
    _call(
        plan.score,
        device,
        plan.blocks,
        *keys,
        np.int32(first),
        np.int32(end),
        *tile,
        np.int64(plan.row_stride),
        out,
    )


def index_scores(problem: Problem, out: Array) -> None:
    """Write every score, -inf where the token does not see the key."""
    if out.size == 0:
        return
    with problem.q.device as current:
        device = device_facts(current.id)
        plan = _plan.plan_scores(problem.shape, device)
        rows = problem.shape.total_seq_len
        located = _located(problem, plan)
        _locate(problem, plan, device, located)
        _score(problem, plan, device, located, 0, out, np.float32(-np.inf))
        if plan.fill:
            _call(
                plan.fill,
                device,
                plan.fill_blocks,
                located[0],
                np.int32(rows),
                np.int32(problem.shape.max_keys),
                np.int64(plan.row_stride),
                out,
            )


def index_topk(problem: Problem, selection: Selection) -> None:
    """Write the top-k key positions of every token, and their scores where asked for."""
    if selection.indices.size == 0:
        return
    with problem.q.device as current:
        device = device_facts(current.id)
        wants_values = selection.values is not None
        plan = _plan.plan_topk(problem.shape, selection.k, selection.by_score, wants_values, device)
        scoring = plan.scoring
        located = _located(problem, scoring)
        _locate(problem, scoring, device, located)
        scores = cupy.empty((scoring.chunk_tokens, scoring.row_stride), np.float32)
        for first in range(0, problem.shape.total_seq_len, scoring.chunk_tokens):
            if scores.size:
                _score(problem, scoring, device, located, first, scores, _HOLE)
            spans = located[0][first : first + scoring.chunk_tokens]
            _select(plan.select, plan.sort, device, scores, spans, selection, first)


def select_topk(scores: Array, lengths: Array | None, selection: Selection) -> None:
    """Write the top-k columns of each row among its first ``lengths`` columns."""
    if selection.indices.size == 0:
        return
    rows, columns = scores.shape
    with scores.device as current:
        device = device_facts(current.id)
        if lengths is None:
            lengths = cupy.full(rows, columns, np.int32)
        else:  # above columns first: a uint32 may exceed what the kernel reads as int32
            lengths = cupy.minimum(lengths, lengths.dtype.type(columns)).astype(np.int32)
        values = selection.values is not None or selection.by_score
        select = _plan.select_kernel(selection.k, columns, values=values, holes=False)
        sort = _plan.sort_kernel(selection.k) if selection.by_score else None
        _select(select, sort, device, scores, lengths, selection, 0)


def _select(
    select: Kernel,
    sort: Kernel | None,
    device: Device,
    scores: Array,
    lengths: Array,
    selection: Selection,
    first: int,
) -> None:
    """Select from the first ``len(lengths)`` rows of ``scores`` into the rows from ``first`` on."""
    rows = lengths.shape[0]
    indices = selection.indices[first : first + rows]
    if selection.values is not None:
        values = selection.values[first : first + rows]
    else:
        values = cupy.empty(indices.shape, np.float32) if sort else None
    columns = scores.shape[1]
    _call(
        select,
        device,
        rows,
        scores,
        np.int64(columns),
        lengths,
        np.int32(columns),
        indices,
        _pointer(values),
    )
    if sort:
        spare = cupy.empty_like(indices), cupy.empty_like(values)
        _call(sort, device, rows, indices, values, *spare)
