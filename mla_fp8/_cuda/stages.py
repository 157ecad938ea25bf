"""The stages of a call: each owns its kernel launches and sets their parameters by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_fp8._check.problem import Problem, Shape
from mla_fp8._cuda.launch import Launch, Struct
from mla_fp8._cuda.params import PAGED_KEYS, RAGGED_BATCH
from mla_fp8._cuda.tensor_map import tensor_map
from mla_fp8._plan.kernel import Device, Kernel, divider
from mla_fp8._plan.scoring import Route, ScorePlan
from mla_fp8._plan.selection import SelectPlan
from mla_fp8._plan.topk import SELECTION_LENGTHS
from mla_fp8._plan.workspace import SCHEDULED_LAUNCHES, WORK_RANGE, Part, Workspace

# Written beside a key whose page does not exist: kMissing of common.cuh for a selection.
MISSING_TO_SELECT = float(np.uint32(0xFFFFFFFF).view(np.float32))
MISSING_IN_MATRIX = -float("inf")


class Inputs:
    """The structs that kernels read their inputs from: of a shape, and bound to a problem."""

    def __init__(self, shape: Shape, unscored_kv_len: int) -> None:
        factor, shift = divider(shape.page_size)
        self.keys = Struct(
            PAGED_KEYS,
            num_blocks=shape.num_blocks,
            num_layers=shape.num_layers,
            page_size=shape.page_size,
            page_factor=factor,
            page_shift=shift,
            pages_per_seq=shape.pages_per_seq,
        )
        self.batch = Struct(
            RAGGED_BATCH,
            batch_size=shape.batch,
            total_tokens=shape.total_seq_len,
            max_kv_len=shape.max_keys,
            unscored_kv_len=unscored_kv_len,
            causal=shape.causal,
            signed_offsets=shape.signed_offsets,
            signed_lengths=shape.signed_lengths,
            total_lengths=shape.total_lengths,
        )

    def bind(self, problem: Problem) -> None:
        """Take the addresses of a problem's arrays."""
        self.q, self.qs = problem.q.data.ptr, problem.qs.data.ptr
        self.blocks = problem.k_blocks.data.ptr
        self.keys.set(
            blocks=self.blocks,
            scales=problem.k_scales.data.ptr,
            lookup_table=problem.k_lookup_table.data.ptr,
            layer=problem.layer,
        )
        self.batch.set(
            input_row_offsets=problem.input_row_offsets.data.ptr,
            lengths=problem.k_cache_lengths.data.ptr,
        )


class Schedule:
    """The scheduler kernel: token rows, and the work ranges and windows of scoring launches."""

    def __init__(
        self, plan: ScorePlan, device: Device, selection_blocks: tuple[int, ...] = ()
    ) -> None:
        self._plan, split = plan, plan.split
        blocks = selection_blocks or (0,) * SELECTION_LENGTHS
        self._launch = plan.schedule and Launch(
            plan.schedule,
            device,
            row_stride=split.row_stride,
            window_size=split.window_size,
            chunk_tokens=split.part_tokens,
            chunk_keys=split.part_keys,
            all_launches=plan.scheduled_launches,
            blocks=plan.blocks,
            selection_blocks=bytes(blocks) if len(blocks) == SELECTION_LENGTHS else b"",
        )

    def bind(self, inputs: Inputs, memory: int, workspace: Workspace) -> None:
        if self._launch:
            self._launch.set(
                batch=inputs.batch,
                token_rows=memory + workspace.token_rows,
                work_ranges=memory + workspace.work_ranges,
                windows=memory + workspace.windows,
            )

    def starts_at(self, number: int) -> bool:
        """Whether the scheduler has to run before the scoring launch of that number."""
        plan = self._plan
        if plan.scheduled_launches:
            return number % SCHEDULED_LAUNCHES == 0
        return number == 0

    def __call__(self, number: int, stream: int) -> None:
        """Schedule the scoring launches from ``number`` on, up to `SCHEDULED_LAUNCHES`."""
        if not self._launch:  # the scoring kernel finds its own work
            return
        launches = min(self._plan.scheduled_launches - number, SCHEDULED_LAUNCHES)
        self._launch.set(first_launch=number, launches=launches)
        total = self._plan.split.tokens if number == 0 else 0  # token rows that are not written yet
        self._launch(self._plan.schedule_blocks(total, launches), stream)


class PortableScore:
    """``index_scores``: scoring with mma on any GPU."""

    def __init__(self, shape: Shape, plan: ScorePlan, device: Device) -> None:
        self._blocks = plan.blocks
        self._launch = Launch(
            plan.kernel,
            device,
            row_stride=plan.split.row_stride,
            tokens_per_tile=plan.tile_tokens,
            max_kv_len=shape.max_keys,
        )

    def bind(self, inputs: Inputs, memory: int, workspace: Workspace) -> None:
        self._launch.set(
            keys=inputs.keys, q=inputs.q, qs=inputs.qs, token_rows=memory + workspace.token_rows
        )

    def __call__(self, scores: int, part: Part, number: int, stream: int) -> None:
        """Score a part; ``scores`` is the address of its rows."""
        self._launch.set(scores=scores, first_token=part.first_token, end_token=part.end_token)
        self._launch(self._blocks, stream)


class HopperScore:
    """``index_scores_sm90``: scoring with wgmma and TMA."""

    def __init__(self, shape: Shape, plan: ScorePlan, device: Device, missing_score: float) -> None:
        self._plan = plan
        self._rows = shape.num_blocks * shape.num_layers * shape.page_size
        self._row_bytes = shape.depth
        self._launch = Launch(
            plan.kernel, device, row_stride=plan.split.row_stride, missing_score=missing_score
        )

    def bind(self, inputs: Inputs, memory: int, workspace: Workspace) -> None:
        self._work_ranges = memory + workspace.work_ranges
        box_rows = self._plan.box_rows
        self._launch.set(
            keys_map=tensor_map(inputs.blocks, self._rows, self._row_bytes, box_rows),
            keys=inputs.keys,
            batch=inputs.batch,
            q=inputs.q,
            qs=inputs.qs,
            token_rows=memory + workspace.token_rows,
        )

    def __call__(self, scores: int, part: Part, number: int, stream: int) -> None:
        """Score a part, or the window of that number; ``scores`` is the address of its rows."""
        blocks = self._plan.blocks
        place = number % SCHEDULED_LAUNCHES * blocks
        self._launch.set(
            scores=scores,
            first_token=part.first_token,
            end_token=part.end_token,
            first_key=part.first_key,
            num_keys=part.num_keys,
            work_ranges=self._work_ranges + WORK_RANGE.itemsize * place,
        )
        self._launch(blocks, stream)


def score_stage(
    shape: Shape, plan: ScorePlan, device: Device, missing_score: float
) -> PortableScore | HopperScore:
    """The scoring stage of a route."""
    if plan.route is Route.PORTABLE:
        return PortableScore(shape, plan, device)
    return HopperScore(shape, plan, device, missing_score)


class Select:
    """A selection kernel, on our own scores or a caller's."""

    def __init__(
        self, plan: SelectPlan, device: Device, row_stride: int, *, early: bool = False
    ) -> None:
        self._plan = plan
        self._filters = plan.kernel.template == "topk_filter"
        self._launch = Launch(plan.kernel, device, early=early, row_stride=row_stride)

    def bind(self, **values: Any) -> None:
        """Set parameters that stay the same from launch to launch."""
        self._launch.set(**values)

    def bind_keys(self, keys: Struct) -> None:
        """Take the pages, which tell whether a key exists whose row has no scores."""
        if self._filters:
            self._launch.set(keys=keys)

    def __call__(
        self, scores: int, values: int, part: Part, stream: int, *, window: int = 0, most: int = 0
    ) -> None:
        """Select from the rows of a part, with at most so many blocks (0: any number).

        ``window``: address of the `WINDOW` that tells the rows; 0: the part does.
        """
        first, end = part.first_token, part.end_token
        if self._filters:
            self._launch.set(window=window, first_column=part.first_key)
        self._launch.set(
            scores=scores, values=values, first_row=first, end_row=end, columns=part.num_keys
        )
        blocks = self._plan.blocks(end - first)
        self._launch(min(blocks, most) if most else blocks, stream)


class Sort:
    """``sort_topk``: selected rows in the order of their scores."""

    def __init__(self, kernel: Kernel, device: Device) -> None:
        self._launch = Launch(kernel, device)

    def __call__(
        self, rows: int, indices: int, values: int, spare: tuple[int, int], stream: int
    ) -> None:
        """Sort so many rows from these addresses on."""
        self._launch.set(
            indices=indices, values=values, spare_indices=spare[0], spare_values=spare[1]
        )
        self._launch(rows, stream)
