"""A checked problem and its plan in, kernel calls on CuPy's current stream out (`_streams`)."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from mla_fp8._check.arrays import Array
from mla_fp8._check.problem import Problem, Selection, Shape
from mla_fp8._cuda.launch import ADDRESS, Prepared
from mla_fp8._plan import topk as _plan
from mla_fp8._plan.kernel import OLDEST, Device, Kernel, architecture, ceil_div
from mla_fp8._plan.selection import select_kernel, sort_kernel
from mla_fp8._plan.topk import ScorePlan
from mla_fp8._plan.workspace import RANGE_BYTES, SHARE_BYTES, SHARED_OUT, Part, Scratch
from mla_fp8._streams import is_capturing, new_stream

_HOLE = np.uint32(0xFFFFFFFF).view(np.float32)  # kHole of common.cuh


@lru_cache(maxsize=64)
def device_facts(ordinal: int) -> Device:
    """The facts a plan needs of a GPU, or an error if it is too old."""
    device = cupy.cuda.Device(ordinal)
    capability = int(device.compute_capability)
    if capability < OLDEST:
        raise RuntimeError(
            f"mla_fp8 needs compute capability 8.0 or newer; GPU {ordinal} has "
            f"{capability // 10}.{capability % 10} (copy the arrays to the host to use NumPy)"
        )
    return Device(
        ordinal=ordinal,
        arch=architecture(capability),
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
        # A map takes up to 2 ** 32 rows, and is not used from 2 ** 31 on.
        [driver.cuuint64_t(row_bytes), driver.cuuint64_t(min(max(rows, 1), 1 << 31))],
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


_INT = np.int32(0)  # in place of one to be set


class _Scoring:
    """The launches of a scoring plan; `bind` before any. ``hole``: of keys without a page."""

    def __init__(self, shape: Shape, plan: ScorePlan, device: Device, hole: np.float32) -> None:
        s = self._shape = shape
        self._plan, cut = plan, plan.cut
        tokens, batch, keys = (np.int32(n) for n in (s.total_seq_len, s.batch, s.max_keys))
        chunk = np.int32(cut.chunk_tokens), np.int32(cut.chunk_keys), np.int32(plan.skip)
        blocks, stride = np.int32(plan.blocks), np.int64(cut.row_stride)
        self._locate = None
        if plan.locate:
            addresses = (ADDRESS,) * 5  # offsets, lengths, spans, shares, ranges
            launches = _INT, _INT, np.int32(plan.launches), blocks
            sizes = tokens, batch, keys, *chunk, *launches, stride, np.int64(cut.window)
            reserved = bytes(plan.reserved or _plan.RESERVED_LENGTHS)
            self._locate = Prepared(plan.locate, device, *addresses, *sizes, reserved)
        pages = np.uint32(s.num_blocks), np.uint32(s.num_layers), np.uint32(0), *_pages(s, plan)
        part, q, cache = (ADDRESS, _INT, _INT), (ADDRESS,) * 2, (ADDRESS,) * 3
        if plan.route == "portable":
            tile = np.int32(plan.tokens_per_tile), keys
            self._score = Prepared(
                plan.score, device, *part, *q, ADDRESS, *cache, *pages, *tile, stride
            )
            return
        flags = s.causal, s.signed_offsets, s.signed_lengths, s.total_lengths
        numbers = (np.int32(n) for n in (plan.skip, *flags))
        rest = batch, tokens, keys, *numbers, hole, stride, bytes(128)
        work = ADDRESS, ADDRESS, _INT, _INT  # shares, spans, first key, keys
        arguments = *part, *work, *q, ADDRESS, ADDRESS, *cache, *pages, *rest
        self._map_number = len(arguments) - 1
        self._box_rows = dict(plan.score.parameters)["kBoxRows"]
        self._score = Prepared(plan.score, device, *arguments)

    def bind(self, problem: Problem, memory: int, scratch: Scratch) -> None:
        """Take a problem's arrays, and scratch from an address on."""
        s, p = self._shape, problem
        offsets, lengths = p.input_row_offsets.data.ptr, p.k_cache_lengths.data.ptr
        q, qs, blocks = p.q.data.ptr, p.qs.data.ptr, p.k_blocks.data.ptr
        cache = blocks, p.k_scales.data.ptr, p.k_lookup_table.data.ptr
        spans = self._spans = memory + scratch.spans
        shares = self._shares = memory + scratch.shares
        if self._locate:
            self._locate.change(0, offsets, lengths, spans, shares, memory + scratch.ranges)
        if self._plan.route == "portable":
            self._score.change(3, q, qs, spans, *cache)
            self._score.change(11, p.layer)
            return
        self._inputs = q, qs, offsets, lengths, *cache
        self._score.change(16, p.layer)
        rows = s.num_blocks * s.num_layers * s.page_size
        box = _tensor_map(blocks, rows, s.depth, self._box_rows)
        self._score.change_bytes(self._map_number, box)

    def locate(self, first_launch: int, stream: int) -> None:
        """Find each token's sequence, and the shares of up to SHARED_OUT launches."""
        if not self._locate:
            return  # scoring does
        launches = min(self._plan.launches - first_launch, SHARED_OUT)
        self._locate.change(11, first_launch, launches)
        tokens = self._shape.total_seq_len if first_launch == 0 else 0
        self._locate(self._plan.locate_blocks(tokens, launches), stream)

    def score(self, to: int, part: Part, launch: int, stream: int) -> None:
        """Score a part into the memory at an address."""
        plan = self._plan
        first, end, key, keys = part
        if plan.route == "portable":
            self._score.change(0, to, first, end)
        else:
            shares = self._shares + SHARE_BYTES * plan.blocks * (launch % SHARED_OUT)
            self._score.change(0, to, first, end, shares, self._spans, key, keys, *self._inputs)
        self._score(plan.blocks, stream)


def _pages(shape: Shape, plan: ScorePlan) -> tuple[np.uint32, ...]:
    """Where keys stand: the last arguments that become ``PagedKeys`` of ``paged_keys.cuh``."""
    s = shape
    return np.uint32(s.page_size), plan.page_factor, plan.page_shift, np.uint32(s.pages_per_seq)


def _refuse_capture(what: str) -> None:
    if is_capturing(cupy.cuda.get_current_stream()):
        raise RuntimeError(
            f"{what} while a CUDA graph is captured: memory taken then would be given to others "
            "while the graph still uses it"
        )


def index_scores(problem: Problem, out: Array) -> None:
    """Write every score, -inf where the token does not see the key."""
    if out.size == 0:
        return
    with problem.q.device as current:
        _refuse_capture("index_scores cannot be called")
        device = device_facts(current.id)
        plan = _plan.plan_scores(problem.shape, device)
        scratch = plan.scratch()
        memory = cupy.cuda.alloc(scratch.end)
        scoring = _Scoring(problem.shape, plan, device, np.float32(-np.inf))
        scoring.bind(problem, memory.ptr, scratch)
        stream = cupy.cuda.get_current_stream().ptr
        scoring.locate(0, stream)
        (part,) = plan.cut.parts
        scoring.score(out.data.ptr, part, 0, stream)
        if plan.fill:
            tokens, keys = np.int32(problem.shape.total_seq_len), np.int32(problem.shape.max_keys)
            rows = np.uintp(memory.ptr + scratch.spans), tokens, keys, np.int64(plan.cut.row_stride)
            fill = Prepared(plan.fill, device, *rows, np.uintp(out.data.ptr))
            fill(plan.fill_blocks, stream)


def scratch_bytes(problem: Problem, k: int, by_score: bool, values: bool) -> int:
    """Device memory that `index_topk` takes beside the output, whatever the arrays hold."""
    with problem.q.device as current:
        device = device_facts(current.id)
        return _plan.plan_topk(problem.shape, k, by_score, values, device).scratch.end


class _Selecting:
    """The launches of a selection kernel."""

    def __init__(
        self,
        kernel: Kernel,
        device: Device,
        row_stride: int,
        pages: tuple[np.uint32, ...] | None = None,  # num_blocks and those of `_pages`
        early: bool = False,
    ) -> None:
        self._streams = kernel.template == "topk_filter"
        parameters = dict(kernel.parameters)
        self._rows, self._cluster = parameters.get("kRows", 1), parameters["kCluster"]
        arguments: tuple[Any, ...] = (*(ADDRESS,) * 4, _INT, _INT, _INT)
        if self._streams:
            none = [np.uint32(n) for n in (0, 1, 0, 0, 0)]
            arguments += ADDRESS, _INT, ADDRESS, *(pages or none)
        self._select = Prepared(kernel, device, *arguments, np.int64(row_stride), early=early)

    def __call__(
        self,
        addresses: tuple[int, int, int, int],  # scores, lengths, indices, values
        part: Part,
        counted: int,  # address of the TokenRange that says which tokens instead, or 0
        lookup_table: int,
        most: int | None,  # blocks; None: the GPU is free
        stream: int,
    ) -> None:
        first, end, column, columns = part
        rest = (counted, column, lookup_table) if self._streams else ()
        self._select.change(0, *addresses, columns, first, end, *rest)
        blocks = ceil_div(end - first, self._rows) * self._cluster
        self._select(blocks if most is None else min(blocks, most), stream)


@lru_cache(maxsize=64)
def _beside(ordinal: int, stream: int, thread: int) -> tuple[Any, Any]:
    """Streams for what goes on beside a stream: of its own, for with it they may be captured.

    Their work begins after its own and it waits for their end: a stream that gets the handle of one
    that is gone finds them idle.
    """
    return new_stream(), new_stream()


def _event(stream: Any) -> Any:
    return stream.record(cupy.cuda.Event(disable_timing=True))


class _Topk:
    """The launches of the whole operation on problems of one shape."""

    def __init__(self, shape: Shape, k: int, by_score: bool, values: bool, device: Device) -> None:
        self.plan = plan = _plan.plan_topk(shape, k, by_score, values, device)
        self._shape, self._k, self._ordinal = shape, k, device.ordinal
        self._multiprocessors = device.multiprocessors
        # Of each buffer. A wait is for what was recorded when it was asked for.
        self._scored = [cupy.cuda.Event(disable_timing=True) for _ in range(plan.buffers)]
        self._selected = [cupy.cuda.Event(disable_timing=True) for _ in range(plan.buffers)]
        early = plan.buffers == 1 and device.clusters
        self._scoring = _Scoring(shape, plan.scoring, device, _HOLE)
        pages = np.uint32(shape.num_blocks), *_pages(shape, plan.scoring)
        self._select = _Selecting(plan.select, device, plan.scoring.cut.row_stride, pages, early)
        self._sort = Prepared(plan.sort, device, *(ADDRESS,) * 4) if plan.sort else None

    def __call__(self, problem: Problem, selection: Selection, memory: int) -> None:
        """Launch everything, with scratch from an address on."""
        self._scoring.bind(problem, memory, self.plan.scratch)
        self._lookup_table = problem.k_lookup_table.data.ptr
        here = cupy.cuda.get_current_stream()
        if self.plan.buffers == 1:
            self._run(selection, memory, here, here, here)
            return
        aside, selecting = _beside(self._ordinal, here.ptr, threading.get_ident())
        try:
            self._run(selection, memory, here, aside, selecting)
        finally:  # what is under way uses the caller's memory
            for stream in (aside, selecting):
                here.wait_event(_event(stream))

    def _run(
        self, selection: Selection, memory: int, here: Any, aside: Any, selecting: Any
    ) -> None:
        """Score in two streams in turns, select in a third; or all in one.

        The blocks of odd chunks take what even ones leave idle at their end.
        """
        plan, launches, scratch = self.plan, self.plan.scoring.launches, self.plan.scratch
        several, parts = selecting is not here, plan.scoring.cut.parts
        scored, selected = self._scored, self._selected
        for number, part in enumerate(parts):
            first, end, key, keys = part
            buffer, before = number % plan.buffers, (number - 1) % plan.buffers
            scores = memory + scratch.scores[buffer]
            stream = aside if number % 2 else here
            if number == 0 or (launches and number % SHARED_OUT == 0):
                if several and number:
                    here.wait_event(scored[before])
                self._scoring.locate(number, here.ptr)
                if several:
                    aside.wait_event(_event(here))
            if several and number >= plan.buffers:
                stream.wait_event(selected[buffer])
            if keys:
                self._scoring.score(scores, part, number, stream.ptr)
            if several:
                stream.record(scored[buffer])
                selecting.wait_event(scored[buffer])
            is_last = number + 1 == len(parts)
            most = None
            if several:
                most = self._multiprocessors if is_last else plan.select_blocks
            counted = 0
            if plan.scoring.cut.packed:
                counted = memory + scratch.ranges + RANGE_BYTES * number
            indices, values = selection.indices.data.ptr, 0
            if plan.own_values:
                values = memory + scratch.values - 4 * self._k * first
            elif selection.values is not None:
                values = selection.values.data.ptr
            addresses = scores, memory + scratch.spans, indices, values
            self._select(addresses, part, counted, self._lookup_table, most, selecting.ptr)
            if self._sort and key + keys >= self._shape.max_keys:
                spare, skipped = (memory + start for start in scratch.spare), 4 * self._k * first
                self._sort.change(0, indices + skipped, values + skipped, *spare)
                self._sort(end - first, selecting.ptr)
            if several:
                selecting.record(selected[buffer])


@lru_cache(maxsize=256)
def _topk(thread: int, shape: Shape, k: int, by_score: bool, values: bool, ordinal: int) -> _Topk:
    """One for each thread, for launches change what has been prepared."""
    return _Topk(shape, k, by_score, values, device_facts(ordinal))


def warmup(problem: Problem, k: int, by_score: bool, values: bool) -> None:
    """Compile and load what `index_topk` needs."""
    with problem.q.device as current:
        _topk(threading.get_ident(), problem.shape, k, by_score, values, current.id)


def index_topk(problem: Problem, selection: Selection) -> None:
    """Write the top-k key positions of every token, and their scores where asked for."""
    if selection.indices.size == 0:
        return
    with problem.q.device as current:
        values = selection.values is not None
        launches = _topk(
            threading.get_ident(),
            problem.shape,
            selection.k,
            selection.by_score,
            values,
            current.id,
        )
        given, size = selection.workspace, launches.plan.scratch.end
        if given is None:
            _refuse_capture("workspace must be given")
            memory = cupy.cuda.alloc(size)
        else:
            if given.size < size:
                raise ValueError(f"workspace must have at least {size} bytes; got {given.size}")
            memory = given.data
        launches(problem, selection, memory.ptr)


def select_topk(scores: Array, lengths: Array | None, selection: Selection) -> None:
    """Write the top-k columns of each row among its first ``lengths`` columns."""
    if selection.indices.size == 0:
        return
    rows, columns = scores.shape
    with scores.device as current:
        _refuse_capture("select_topk cannot be called")
        device = device_facts(current.id)
        if lengths is None:
            lengths = cupy.full(rows, columns, np.int32)
        else:  # above columns first: a uint32 may exceed what the kernel reads as int32
            lengths = cupy.minimum(lengths, lengths.dtype.type(columns)).astype(np.int32)
        values, indices = selection.values, selection.indices
        if values is None and selection.by_score:
            values = cupy.empty(indices.shape, np.float32)
        k, has_values = selection.k, values is not None
        kernel = select_kernel(rows, columns, k, device, values=has_values, holes=False)
        stream = cupy.cuda.get_current_stream().ptr
        to = indices.data.ptr, values.data.ptr if values is not None else 0
        addresses, part = (scores.data.ptr, lengths.data.ptr, *to), Part(0, rows, 0, columns)
        _Selecting(kernel, device, columns)(addresses, part, 0, 0, None, stream)
        if selection.by_score:
            spare = cupy.empty((2, *indices.shape), np.int32)
            ends = np.uintp(spare[0].data.ptr), np.uintp(spare[1].data.ptr)
            arguments = *(np.uintp(address) for address in to), *ends
            Prepared(sort_kernel(k), device, *arguments)(rows, stream)
