"""The launches of a call in order: in one stream, or with selection beside scoring."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import cupy

from mla_fp8._check.outputs import Selection
from mla_fp8._check.problem import Problem
from mla_fp8._check.shape import Shape
from mla_fp8._check.streams import new_stream
from mla_fp8._cuda.stages import (
    MISSING_TO_SELECT,
    Inputs,
    Schedule,
    Select,
    Sort,
    Translate,
    score_stage,
)
from mla_fp8._plan.kernel import Device
from mla_fp8._plan.topk import Mode, TopkPlan
from mla_fp8._plan.workspace import WINDOW, Part


@lru_cache(maxsize=64)
def _side_streams(ordinal: int, stream: int, thread: int) -> tuple[Any, Any]:
    """Two streams for work beside a stream.

    Each caller's stream has two of its own, so that they can be captured with it. They start after
    work of that stream, and it waits for them, so they are idle between calls. If a stream is
    destroyed and a new one gets its handle, it can safely use the same two.
    """
    return new_stream(), new_stream()


def _event(stream: Any) -> Any:
    return stream.record(cupy.cuda.Event(disable_timing=True))


class TopkPipeline:
    """The stages of the whole operation for problems of one shape, run by a plan."""

    def __init__(self, shape: Shape, plan: TopkPlan, k: int, device: Device) -> None:
        self.plan, self._k, self._device = plan, k, device
        self._max_keys = shape.max_keys
        self._inputs = Inputs(shape, plan.scoring.unscored_kv_len)
        windows = plan.mode is Mode.WINDOWS
        self._schedule = Schedule(plan.scoring, device, plan.selection_blocks if windows else ())
        early = device.clusters and not plan.mode.pipelined
        self._score = score_stage(shape, plan.scoring, device, MISSING_TO_SELECT, early=early)
        stride = plan.scoring.split.row_stride
        self._select = Select(plan.selection, device, stride, early=early)
        self._sort = Sort(plan.sort, device) if plan.sort else None
        self._translate = Translate(plan.translate, k, device) if plan.translate else None
        # An event for each buffer. wait_event waits for what had been recorded when it was called.
        buffers = len(plan.workspace.scores)
        self._scored = [cupy.cuda.Event(disable_timing=True) for _ in range(buffers)]
        self._selected = [cupy.cuda.Event(disable_timing=True) for _ in range(buffers)]

    def bind(self, problem: Problem, selection: Selection, memory: int) -> None:
        """Take the arrays of a call, and the address of its workspace."""
        workspace, values = self.plan.workspace, selection.values
        self._inputs.bind(problem)
        self._schedule.bind(self._inputs, memory, workspace)
        self._score.bind(self._inputs, memory, workspace)
        self._memory, self._indices = memory, selection.indices.data.ptr
        self._slots = selection.slots.data.ptr if selection.slots is not None else 0
        self._values = values.data.ptr if values is not None else 0
        self._token_rows = memory + workspace.token_rows
        self._select.bind_inputs(self._inputs, self._token_rows, self._indices, self._slots)
        if self._translate:
            self._translate.bind(self._inputs)

    def run(self) -> None:
        """Launch everything on CuPy's current stream."""
        here = cupy.cuda.get_current_stream()
        if self.plan.mode.pipelined:
            self._run_pipelined(here)
        else:
            self._run_sequential(here.ptr)
        if self._translate:
            rows = self.plan.scoring.split.tokens
            self._translate(rows, self._token_rows, self._indices, self._slots, here.ptr)

    def _run_sequential(self, stream: int) -> None:
        for number, part in enumerate(self.plan.scoring.split.parts):
            if self._schedule.starts_at(number):
                self._schedule(number, stream)
            if part.num_keys:
                self._score(self._scores(0), part, number, stream)
            self._select_part(part, number, stream)

    def _run_pipelined(self, here: Any) -> None:
        """Score in two streams alternately, and select in a third.

        Blocks that score part i + 1 take the multiprocessors that part i leaves idle at its end.
        """
        aside, selecting = _side_streams(self._device.ordinal, here.ptr, threading.get_ident())
        scored, selected = self._scored, self._selected
        parts = self.plan.scoring.split.parts
        try:
            for number, part in enumerate(parts):
                buffer = number % len(scored)
                stream = aside if number % 2 else here
                if self._schedule.starts_at(number):
                    if number:  # earlier launches have read the work ranges
                        here.wait_event(scored[(number - 1) % len(scored)])
                    self._schedule(number, here.ptr)
                    aside.wait_event(_event(here))
                if number >= len(scored):
                    stream.wait_event(selected[buffer])
                self._score(self._scores(buffer), part, number, stream.ptr)
                stream.record(scored[buffer])
                selecting.wait_event(scored[buffer])
                is_last = number + 1 == len(parts)  # then selection has the GPU to itself
                blocks = (
                    self._device.multiprocessors if is_last else max(self.plan.selection_blocks)
                )
                self._select_part(part, number, selecting.ptr, blocks)
                selecting.record(selected[buffer])
        finally:  # what is under way uses the caller's memory
            for stream in (aside, selecting):
                here.wait_event(_event(stream))

    def _scores(self, buffer: int) -> int:
        return self._memory + self.plan.workspace.scores[buffer]

    def _select_part(self, part: Part, number: int, stream: int, most: int = 0) -> None:
        """Select from the rows of a part, and sort them once all their keys have been seen."""
        plan, workspace = self.plan, self.plan.workspace
        first_entry = 4 * self._k * part.first_token  # bytes to the part's first row of results
        window, values = 0, self._values
        if plan.mode is Mode.WINDOWS:
            window = self._memory + workspace.windows + WINDOW.itemsize * number
        if plan.keeps_values:  # memory for the rows of one part
            values = self._memory + workspace.values - first_entry
        scores = self._scores(number % len(workspace.scores))
        self._select(scores, values, part, stream, window=window, most=most)
        if self._sort and part.first_key + part.num_keys >= self._max_keys:
            spare = self._memory + workspace.spare[0], self._memory + workspace.spare[1]
            indices, values = self._indices + first_entry, values + first_entry
            rows = part.end_token - part.first_token
            self._sort(rows, indices, values, spare, stream)
