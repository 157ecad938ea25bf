"""A checked problem and its plan in, kernel calls on the current stream out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from mla_fp8 import _plan
from mla_fp8._arrays import Array
from mla_fp8._plan import Device, Kernel, ScorePlan
from mla_fp8._prepared import Prepared
from mla_fp8._problem import Problem, Selection

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
        shared_bytes=device.attributes["MaxSharedMemoryPerBlockOptin"],
    )


@lru_cache(maxsize=256)
def _tensor_map(address: int, rows: int, row_bytes: int, box_rows: int) -> bytes:
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
    return np.array([int(word) for word in found.opaque], np.uint64).tobytes()


def _located(problem: Problem, plan: ScorePlan) -> tuple[Array, Array]:
    """Room for what the scoring launches need of offsets and lengths.

    Returns
    -------
    spans : [total_seq_len, 2] int32
        Sequence and number of keys of each token.
    shares : [launches, blocks, 8] int32
        What each block of each launch scores: ``Share`` of ``ragged_tiles.cuh``. A chunk of tokens
        has a launch for each chunk of keys; there is room for ``SHARED_OUT`` launches.
    """
    spans = cupy.empty((problem.shape.total_seq_len, 2), np.int32)
    launches = min(plan.launches, _plan.SHARED_OUT)
    return spans, cupy.empty((launches, plan.blocks, 8), np.int32)


def _locate(
    problem: Problem,
    plan: ScorePlan,
    device: Device,
    located: tuple[Array, Array],
    first_launch: int = 0,
) -> None:
    """Fill in ``located``: spans, and the shares of launches from ``first_launch`` on."""
    s = problem.shape
    launches = min(plan.launches - first_launch, _plan.SHARED_OUT)
    Prepared(
        plan.locate,
        device,
        problem.input_row_offsets,
        problem.k_cache_lengths,
        *located,
        np.int32(s.total_seq_len),
        np.int32(s.batch),
        np.int32(s.max_keys),
        np.int32(plan.chunk_tokens),
        np.int32(plan.chunk_keys),
        np.int32(plan.skip),
        np.int32(first_launch),
        np.int32(launches),
        np.int32(plan.blocks),
    )(plan.locate_blocks(s.total_seq_len if first_launch == 0 else 0, launches))


def _pages(problem: Problem, plan: ScorePlan) -> tuple[object, ...]:
    """Where keys stand: the last arguments that become ``PagedKeys`` of ``paged_keys.cuh``."""
    s = problem.shape
    return (
        np.uint32(s.page_size),
        plan.page_factor,
        plan.page_shift,
        np.uint32(s.pages_per_seq),
    )


def _scorer(
    problem: Problem,
    plan: ScorePlan,
    device: Device,
    located: tuple[Array, Array],
    hole: np.float32,
) -> Callable[..., None]:
    """Return what scores a chunk.

    Its arguments: the chunk's first token and first key, the number of the launch, the address to
    write to and, optionally, the stream. ``hole`` stands for a key whose page does not exist.
    """
    s = problem.shape
    spans, shares = located
    queries = problem.q, problem.qs
    cache = (
        problem.k_blocks,
        problem.k_scales,
        problem.k_lookup_table,
        np.uint32(s.num_blocks),
        np.uint32(s.num_layers),
        np.uint32(problem.layer),
        *_pages(problem, plan),
    )
    tokens, stride = (np.int32(0), np.int32(0)), np.int64(plan.row_stride)
    changed: tuple[object, ...]
    if plan.route == "portable":
        tile = np.int32(plan.tokens_per_tile), np.int32(s.max_keys)
        changed, share = (np.uintp(0), *tokens), None
        kept = *queries, spans, *cache, *tile, stride
    else:
        box_rows = dict(plan.score.parameters)["kBoxRows"]
        rows = s.num_blocks * s.num_layers * s.page_size
        changed, share = (np.uintp(0), *tokens, np.uintp(0), *tokens), shares.data.ptr
        kept = (
            *queries,
            problem.input_row_offsets,
            problem.k_cache_lengths,
            *cache,
            np.int32(s.batch),
            np.int32(s.total_seq_len),
            np.int32(s.max_keys),
            np.int32(plan.skip),
            np.int32(s.causal),
            np.int32(s.signed_offsets),
            np.int32(s.signed_lengths),
            hole,
            stride,
            _tensor_map(problem.k_blocks.data.ptr, rows, s.depth, box_rows),
        )
    kernel = Prepared(plan.score, device, *changed, *kept)

    def score(first: int, key: int, launch: int, to: int, stream: Any = None) -> None:
        kernel.change(0, to, first, min(first + plan.chunk_tokens, s.total_seq_len))
        if share is not None:
            of_launch = share + 32 * plan.blocks * (launch % _plan.SHARED_OUT)
            kernel.change(3, of_launch, key, min(plan.chunk_keys, s.max_keys - key))
        kernel(plan.blocks, stream)

    return score


def index_scores(problem: Problem, out: Array) -> None:
    """Write every score, -inf where the token does not see the key."""
    if out.size == 0:
        return
    with problem.q.device as current:
        device = device_facts(current.id)
        plan = _plan.plan_scores(problem.shape, device)
        located = _located(problem, plan)
        _locate(problem, plan, device, located)
        score = _scorer(problem, plan, device, located, np.float32(-np.inf))
        score(0, 0, 0, out.data.ptr)
        if plan.fill:
            Prepared(
                plan.fill,
                device,
                located[0],
                np.int32(problem.shape.total_seq_len),
                np.int32(problem.shape.max_keys),
                np.int64(plan.row_stride),
                out,
            )(plan.fill_blocks)


def scratch_bytes(problem: Problem, k: int, by_score: bool, values: bool) -> int:
    """Device memory that `index_topk` takes beside the output, whatever the arrays hold."""
    with problem.q.device as current:
        device = device_facts(current.id)
        return _plan.plan_topk(problem.shape, k, by_score, values, device).scratch_bytes


@lru_cache(maxsize=64)
def _beside(ordinal: int, thread: int) -> tuple[Any, Any]:
    """Streams for what goes on beside the caller's, of a thread's own: they may be captured."""
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    return first, second


def _event(stream: Any) -> Any:
    return stream.record(cupy.cuda.Event(disable_timing=True))


def index_topk(problem: Problem, selection: Selection) -> None:
    """Write the top-k key positions of every token, and their scores where asked for."""
    if selection.indices.size == 0:
        return
    with problem.q.device as current:
        device = device_facts(current.id)
        s, wants_values = problem.shape, selection.values is not None
        plan = _plan.plan_topk(s, selection.k, selection.by_score, wants_values, device)
        scoring = plan.scoring
        located = _located(problem, scoring)
        size = scoring.chunk_tokens, scoring.row_stride
        buffers = [cupy.empty(size, np.float32) for _ in range(plan.buffers)]
        own = cupy.empty((size[0], selection.k), np.float32) if plan.own_values else None
        score = _scorer(problem, scoring, device, located, _HOLE)
        pages = problem.k_lookup_table, np.uint32(s.num_blocks), *_pages(problem, scoring)
        select = _selector(
            plan.select, device, scoring.row_stride, located[0], pages, selection, own
        )
        sort = _sorter(plan.sort, device, selection, own)
        here = cupy.cuda.get_current_stream()

        def parts() -> Iterator[tuple[int, int, int, int]]:
            """Tokens, how many, keys, how many."""
            for first in range(0, s.total_seq_len, scoring.chunk_tokens):
                tokens = min(scoring.chunk_tokens, s.total_seq_len - first)
                for key in range(0, max(s.max_keys, 1), max(scoring.chunk_keys, 1)):
                    yield first, tokens, key, min(scoring.chunk_keys, s.max_keys - key)

        if plan.buffers == 1:
            scores = buffers[0].data.ptr
            for number, (first, tokens, key, keys) in enumerate(parts()):
                if number == 0 or (scoring.launches and number % _plan.SHARED_OUT == 0):
                    _locate(problem, scoring, device, located, number)
                if keys:
                    score(first, key, number, scores)
                select(scores, first, tokens, key, keys, None)
                sort(first, tokens)
            return
        # Odd chunks are scored in a stream of their own: their blocks take what the even ones leave
        # idle at the end, and a third selects meanwhile.
        aside, selecting = _beside(current.id, threading.get_ident())
        scored: list[Any] = []  # events, one for each chunk
        selected: list[Any] = []
        for number, (first, tokens, key, keys) in enumerate(parts()):
            scores, stream = buffers[number % plan.buffers].data.ptr, (here, aside)[number % 2]
            if number % _plan.SHARED_OUT == 0:
                if number:
                    here.wait_event(scored[-1])
                _locate(problem, scoring, device, located, number)
                aside.wait_event(_event(here))
            if number >= plan.buffers:
                stream.wait_event(selected[number - plan.buffers])
            score(first, key, number, scores, stream)
            scored.append(_event(stream))
            selecting.wait_event(scored[-1])
            is_last = number + 1 == scoring.launches
            blocks = None if is_last else plan.select_blocks
            select(scores, first, tokens, key, keys, blocks, selecting)
            if plan.sort and key + keys == s.max_keys:
                with selecting:
                    sort(first, tokens)
            selected.append(_event(selecting))
        here.wait_event(selected[-1])


def _selector(
    kernel: Kernel,
    device: Device,
    row_stride: int,
    lengths: Array,
    pages: tuple[object, ...],
    selection: Selection,
    own_values: Array | None = None,
) -> Callable[..., None]:
    """Return what selects from a chunk of scores.

    Its arguments: the address of scores, the first token and how many, the first column and how
    many, how many blocks (None: the GPU is free) and, optionally, the stream. ``own_values`` is for
    the values of a chunk.
    """
    stride, row_bytes = np.int64(row_stride), 4 * selection.k
    values = selection.values if own_values is None else own_values
    values_bytes = 0 if values is None or own_values is not None else row_bytes
    addresses = np.uintp(0), lengths, selection.indices, np.uintp(0) if values is None else values
    extent = np.int32(0), np.int32(0), np.int32(0)
    general = kernel.template == "select_topk"
    more = (extent[0],) if general else (*extent, *pages)
    prepared = Prepared(kernel, device, *addresses, *more, stride)
    rows_in_block = dict(kernel.parameters).get("kRows", 1)
    steps = lengths.strides[0], row_bytes, values_bytes
    starts = lengths.data.ptr, selection.indices.data.ptr, 0 if values is None else values.data.ptr

    def select(
        scores: int,
        first: int,
        rows: int,
        column: int,
        columns: int,
        blocks: int | None,
        stream: Any = None,
    ) -> None:
        rest = (columns,) if general else (columns, rows, column)
        at = (start + first * step for start, step in zip(starts, steps, strict=True))
        prepared.change(0, scores, *at, *rest)
        prepared(blocks or -(-rows // rows_in_block), stream)

    return select


def _sorter(
    kernel: Kernel | None, device: Device, selection: Selection, own_values: Array | None
) -> Callable[[int, int], None]:
    """Return what sorts so many selected rows from a first one on, where rows are to be sorted."""

    def sort(first: int, rows: int) -> None:
        if kernel is None:
            return
        indices = selection.indices[first : first + rows]
        values = own_values
        if values is None:
            assert selection.values is not None
            values = selection.values[first : first + rows]
        spare = cupy.empty_like(indices), cupy.empty(indices.shape, np.float32)
        Prepared(kernel, device, indices, values, *spare)(rows)

    return sort


_NO_PAGES = (np.uintp(0), *(np.uint32(n) for n in (0, 1, 0, 0, 0)))


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
        own = None
        if selection.values is None and selection.by_score:
            own = cupy.empty(selection.indices.shape, np.float32)
        values = selection.values is not None or own is not None
        kernel = _plan.plan_select(rows, columns, selection.k, values, device)
        sorting = _plan.sort_kernel(selection.k) if selection.by_score else None
        select = _selector(kernel, device, columns, lengths, _NO_PAGES, selection, own)
        select(scores.data.ptr, 0, rows, 0, columns, None)
        _sorter(sorting, device, selection, own)(0, rows)
