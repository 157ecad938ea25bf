"""The CUDA backend: plans a checked problem and launches its kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import cupy

from mla_fp8._check.arrays import Array
from mla_fp8._check.keys import KeyWrite
from mla_fp8._check.outputs import Selection, check_workspace
from mla_fp8._check.parameters import Output
from mla_fp8._check.problem import Problem
from mla_fp8._check.shape import Shape
from mla_fp8._check.streams import is_capturing
from mla_fp8._check.transforms import Pooling, Queries, Rotation
from mla_fp8._cuda import keys as _keys
from mla_fp8._cuda.bound import BoundPipeline
from mla_fp8._cuda.merge import merge_stage
from mla_fp8._cuda.pipeline import TopkPipeline
from mla_fp8._cuda.stages import (
    MISSING_IN_MATRIX,
    Fill,
    Inputs,
    Schedule,
    Select,
    Sort,
    score_stage,
)
from mla_fp8._plan.kernel import OLDEST, Device, architecture
from mla_fp8._plan.scoring import ScorePlan, plan_scores
from mla_fp8._plan.selection import plan_select, sort_kernel
from mla_fp8._plan.topk import TopkPlan, plan_topk
from mla_fp8._plan.tuning import H200, Tuning
from mla_fp8._plan.workspace import Part, Split, Workspace, lay_out


@lru_cache(maxsize=64)
def device_facts(ordinal: int) -> Device:
    """The facts about a GPU that plans depend on.

    Raises
    ------
    RuntimeError
        If the GPU is too old.
    """
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


def _take(workspace: Array | None, size: int) -> Any:
    """The caller's workspace if there is one, or memory for this call.

    Raises
    ------
    ValueError, RuntimeError
        If the workspace is too small, or missing while a CUDA graph is captured.
    MemoryError
        If the GPU has no room for it. Nothing is launched, so later calls are as before.
    """
    if workspace is not None:
        check_workspace(workspace, size)
        return workspace.data
    if size and is_capturing(cupy.cuda.get_current_stream()):
        raise RuntimeError(
            f"workspace must be given while a CUDA graph is captured ({size} bytes): memory "
            "allocated now could be reused by others while the graph still uses it"
        )
    try:
        return cupy.cuda.alloc(size)
    except MemoryError as error:
        raise MemoryError(f"no room for a workspace of {size} bytes ({error})") from error


# ---- the whole operation


@lru_cache(maxsize=256)
def _topk_pipeline(
    thread: int,
    shape: Shape,
    k: int,
    by_score: bool,
    values: bool,
    output: Output,
    tuning: Tuning,
    ordinal: int,
) -> TopkPipeline:
    """One pipeline for each thread, because a call changes its parameters."""
    device = device_facts(ordinal)
    plan = plan_topk(shape, k, by_score, values, device, tuning, output)
    return TopkPipeline(shape, plan, k, device)


def index_topk(problem: Problem, selection: Selection, tuning: Tuning = H200) -> None:
    """Write the top-k keys of every token, and their scores where asked for."""
    if selection.indices.size == 0:
        return
    thread, s, values = threading.get_ident(), selection, selection.values is not None
    with problem.q.device as device:
        pipeline = _topk_pipeline(
            thread, problem.shape, s.k, s.by_score, values, s.output, tuning, device.id
        )
        memory = _take(selection.workspace, pipeline.plan.workspace.size)
        pipeline.bind(problem, selection, memory.ptr)
        pipeline.run()


def _nothing() -> None:
    """The bound call of an empty output."""


def bind_topk(problem: Problem, selection: Selection, tuning: Tuning = H200) -> Callable[[], None]:
    """Return `index_topk` of these arrays, to be called many times.

    Raises
    ------
    ValueError, RuntimeError
        If the workspace is too small, or a CUDA graph is being captured.
    """
    if selection.indices.size == 0:
        return _nothing
    s, values = selection, selection.values is not None
    with problem.q.device as device:
        if is_capturing(cupy.cuda.get_current_stream()):
            raise RuntimeError(
                "bind must be called before a CUDA graph is captured; got a stream that is being "
                "captured (the bound call itself can be captured)"
            )
        facts = device_facts(device.id)
        plan = plan_topk(problem.shape, s.k, s.by_score, values, facts, tuning, s.output)
        pipeline = TopkPipeline(problem.shape, plan, s.k, facts)
        memory = _take(s.workspace, plan.workspace.size)
        pipeline.bind(problem, s, memory.ptr)
        return BoundPipeline(pipeline, device.id, (problem, s, memory))


def topk_plan(
    problem: Problem,
    k: int,
    by_score: bool,
    values: bool,
    tuning: Tuning = H200,
    output: Output = Output.POSITIONS,
) -> TopkPlan:
    """The plan by which `index_topk` runs."""
    device = device_facts(problem.q.device.id)
    return plan_topk(problem.shape, k, by_score, values, device, tuning, output)


def topk_workspace_bytes(
    problem: Problem, k: int, by_score: bool, values: bool, output: Output
) -> int:
    """Device memory that `index_topk` takes beside the output, whatever the arrays hold."""
    return topk_plan(problem, k, by_score, values, H200, output).workspace.size


def warmup(problem: Problem, k: int, by_score: bool, values: bool, output: Output) -> None:
    """Compile and load what `index_topk` needs."""
    with problem.q.device as device:
        thread = threading.get_ident()
        _topk_pipeline(thread, problem.shape, k, by_score, values, output, H200, device.id)


# ---- all scores


class ScoresPipeline:
    """The stages that write a dense matrix of scores, for problems of one shape."""

    def __init__(self, shape: Shape, plan: ScorePlan, device: Device) -> None:
        self.plan, self.workspace = plan, plan.lay_out()
        self._inputs = Inputs(shape, plan.unscored_kv_len)
        self._schedule = Schedule(plan, device)
        self._score = score_stage(shape, plan, device, MISSING_IN_MATRIX)
        self._fill = Fill(shape, plan, device)

    def bind(self, problem: Problem, out: Array, memory: int) -> None:
        """Take the arrays of a call, and the address of its workspace."""
        self._out = out.data.ptr
        self._inputs.bind(problem)
        self._schedule.bind(self._inputs, memory, self.workspace)
        self._score.bind(self._inputs, memory, self.workspace)
        self._token_rows = memory + self.workspace.token_rows

    def schedule(self, stream: int) -> None:
        """Launch the scheduler, if the route has one."""
        self._schedule(0, stream)

    def score(self, stream: int) -> None:
        """Launch the scoring kernel."""
        (part,) = self.plan.split.parts
        self._score(self._out, part, 0, stream)

    def run(self) -> None:
        """Launch everything on CuPy's current stream."""
        stream = cupy.cuda.get_current_stream().ptr
        self.schedule(stream)
        self.score(stream)
        self._fill(self._out, self._token_rows, stream)


@lru_cache(maxsize=64)
def _scores_pipeline(thread: int, shape: Shape, ordinal: int) -> ScoresPipeline:
    device = device_facts(ordinal)
    return ScoresPipeline(shape, plan_scores(shape, device, H200), device)


def index_scores(problem: Problem, out: Array, workspace: Array | None) -> None:
    """Write every score, -inf where the token does not see the key."""
    if out.size == 0:
        return
    with problem.q.device as device:
        pipeline = _scores_pipeline(threading.get_ident(), problem.shape, device.id)
        memory = _take(workspace, pipeline.workspace.size)
        pipeline.bind(problem, out, memory.ptr)
        pipeline.run()


def scores_workspace_bytes(problem: Problem) -> int:
    """Device memory that `index_scores` takes beside the output."""
    device = device_facts(problem.q.device.id)
    return plan_scores(problem.shape, device, H200).lay_out().size


# ---- selection from given scores


class _SelectPipeline:
    """The stages that select from a caller's rows of one shape."""

    def __init__(
        self, rows: int, columns: int, k: int, by_score: bool, values: bool, device: Device
    ) -> None:
        plan = plan_select(
            rows, columns, k, device, H200, values=values or by_score, own_scores=False
        )
        self.workspace = _select_workspace(rows, columns, k, by_score, values)
        self._select = Select(plan, device, columns)
        self._sort = Sort(sort_kernel(k), device) if by_score else None
        self._part = Part(0, rows, 0, columns)

    def run(self, scores: Array, lengths: Array | None, selection: Selection, memory: int) -> None:
        stream, indices = cupy.cuda.get_current_stream().ptr, selection.indices.data.ptr
        values = memory + self.workspace.values
        if selection.values is not None:
            values = selection.values.data.ptr
        self._select.bind_rows(lengths, indices)
        self._select(scores.data.ptr, values, self._part, stream)
        if self._sort:
            spare = memory + self.workspace.spare[0], memory + self.workspace.spare[1]
            self._sort(self._part.end_token, indices, values, spare, stream)


def _select_workspace(rows: int, columns: int, k: int, by_score: bool, values: bool) -> Workspace:
    """The workspace of a sort: spare rows, and the scores if the caller does not get them."""
    split = Split(rows, columns, rows, columns, columns)
    return lay_out(split, k=k, keeps_values=by_score and not values, sorts=by_score)


@lru_cache(maxsize=64)
def _select_pipeline(
    thread: int, rows: int, columns: int, k: int, by_score: bool, values: bool, ordinal: int
) -> _SelectPipeline:
    return _SelectPipeline(rows, columns, k, by_score, values, device_facts(ordinal))


def select_topk(scores: Array, lengths: Array | None, selection: Selection) -> None:
    """Write the top-k columns of each row among its first ``lengths`` columns."""
    if selection.indices.size == 0:
        return
    thread, values = threading.get_ident(), selection.values is not None
    with scores.device as device:
        pipeline = _select_pipeline(
            thread, *scores.shape, selection.k, selection.by_score, values, device.id
        )
        memory = _take(selection.workspace, pipeline.workspace.size)
        pipeline.run(scores, lengths, selection, memory.ptr)


def select_workspace_bytes(
    scores: Array, lengths: Array | None, k: int, by_score: bool, values: bool
) -> int:
    """Device memory that `select_topk` takes beside the output."""
    rows, columns = scores.shape
    return _select_workspace(rows, columns, k, by_score, values).size


# ---- keys and queries before they are scored


def _with_device(run: Any, array: Array, *arguments: Any) -> None:
    """Call a function of `_cuda.keys` on the GPU of ``array``."""
    with array.device as device:
        run(*arguments, threading.get_ident(), device_facts(device.id))


def write_keys(write: KeyWrite) -> None:
    """Quantise keys and store their values and scales."""
    _with_device(_keys.write_keys, write.keys, write)


def quantize_queries(queries: Queries, codes: Array, qs: Array) -> None:
    """Quantise queries with one scale per head, and multiply the scale into the head's gate."""
    _with_device(_keys.quantize_queries, codes, queries, codes, qs)


def rope(rotation: Rotation, out: Array) -> None:
    """Rotate the first channels of each row by the angles of its token."""
    _with_device(_keys.rope, out, rotation, out)


def hadamard(x: Array, out: Array) -> None:
    """The orthonormal Walsh-Hadamard transform of each row."""
    _with_device(_keys.hadamard, out, x, out)


def pool_keys(pooling: Pooling, out: Array) -> None:
    """The weighted sums, or means, of consecutive rows."""
    _with_device(_keys.pool_keys, out, pooling, out)


# ---- merging of lists


def merge_topk(indices: Array, scores: Array, selection: Selection) -> None:
    """Write the best k entries of each row of several lists, [lists, rows, width]."""
    if selection.indices.size == 0:
        return
    k, by_score, values = selection.k, selection.by_score, selection.values is not None
    aligned = (indices.data.ptr | scores.data.ptr) % 16 == 0
    with indices.device as device:
        facts, thread = device_facts(device.id), threading.get_ident()
        merge = merge_stage(thread, indices.shape, k, by_score, values, aligned, facts)
        merge(indices, scores, selection)
