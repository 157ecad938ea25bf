"""The stages of a call: each holds its launches and sets their parameters by name."""

from __future__ import annotations

import numpy as np

from mla_fp8._check.arrays import Array
from mla_fp8._check.problem import Problem
from mla_fp8._check.shape import Shape
from mla_fp8._cuda.launch import Launch
from mla_fp8._cuda.params import PAGED_KEYS, RAGGED_BATCH, struct_type
from mla_fp8._cuda.tensor_map import tensor_map
from mla_fp8._plan.kernel import Device, Kernel, ceil_div, divider
from mla_fp8._plan.scoring import Route, ScorePlan
from mla_fp8._plan.selection import TRANSLATED_AT_ONCE, SelectPlan
from mla_fp8._plan.workspace import SCHEDULED_LAUNCHES, WORK_RANGE, Part, Workspace

# Written beside a key whose page does not exist: kMissing of common.cuh for a selection.
MISSING_TO_SELECT = float(np.uint32(0xFFFFFFFF).view(np.float32))
MISSING_IN_MATRIX = -float("inf")


def _address(array: Array | None) -> int:
    """The address of an array, or 0 if there is none."""
    return 0 if array is None else array.data.ptr


class Inputs:
    """The structs of inputs: the constructor sets what the shape says, `bind` the addresses."""

    def __init__(self, shape: Shape, unscored_kv_len: int) -> None:
        factor, shift = divider(shape.page_size)
        self.keys = keys = struct_type(PAGED_KEYS)()
        keys.num_blocks, keys.pages_per_seq = shape.num_blocks, shape.pages_per_seq
        keys.page_size, keys.page_factor, keys.page_shift = shape.page_size, factor, shift
        self.batch = batch = struct_type(RAGGED_BATCH)()
        batch.batch_size, batch.total_tokens = shape.batch, shape.total_seq_len
        batch.max_kv_len, batch.unscored_kv_len = shape.max_keys, unscored_kv_len
        batch.causal, batch.total_lengths = shape.causal, shape.total_lengths
        batch.signed_offsets, batch.signed_lengths = shape.signed_offsets, shape.signed_lengths
        batch.kpool, batch.key_step = shape.kpool, shape.key_step

    def bind(self, problem: Problem) -> None:
        """Take the addresses of a problem's arrays."""
        keys, batch = self.keys, self.batch
        self.q, self.qs = problem.q.data.ptr, _address(problem.qs)
        blocks, scales, layer = problem.k_blocks, problem.k_scales, problem.layer
        keys.block_stride, keys.scales_stride = blocks.strides[0], scales.strides[0] // 4
        keys.blocks = blocks.data.ptr + layer * blocks.strides[2]
        keys.scales = scales.data.ptr + layer * scales.strides[2]
        keys.lookup_table = problem.k_lookup_table.data.ptr
        batch.input_row_offsets = problem.input_row_offsets.data.ptr
        batch.lengths = problem.k_cache_lengths.data.ptr
        batch.key_start, batch.key_starts = problem.key_start, _address(problem.key_starts)


class Schedule:
    """The scheduler kernel: token rows, and the work ranges and windows of scoring launches."""

    def __init__(
        self, plan: ScorePlan, device: Device, selection_blocks: tuple[int, ...] = ()
    ) -> None:
        self._plan, split = plan, plan.split
        self._launch = Launch(plan.schedule, device) if plan.schedule else None
        if self._launch:
            p = self._launch.params
            p.row_stride, p.window_size = split.row_stride, split.window_size
            p.part_tokens, p.part_keys = split.part_tokens, split.part_keys
            p.all_launches, p.blocks = plan.scheduled_launches, plan.blocks
            p.selection_blocks[: len(selection_blocks)] = selection_blocks

    def bind(self, inputs: Inputs, memory: int, workspace: Workspace) -> None:
        """Take the inputs, and the workspace at an address."""
        if self._launch:
            p = self._launch.params
            p.batch = inputs.batch
            p.token_rows = memory + workspace.token_rows
            p.work_ranges = memory + workspace.work_ranges
            p.windows = memory + workspace.windows

    def starts_at(self, number: int) -> bool:
        """Whether the scheduler has to run before the scoring launch of that number."""
        return number == 0 or (
            self._plan.scheduled_launches > 0 and number % SCHEDULED_LAUNCHES == 0
        )

    def __call__(self, number: int, stream: int) -> None:
        """Schedule the scoring launches from ``number`` on, up to `SCHEDULED_LAUNCHES`."""
        if not self._launch:  # the scoring kernel finds its own work
            return
        p, plan = self._launch.params, self._plan
        p.first_launch = number
        p.launches = min(plan.scheduled_launches - number, SCHEDULED_LAUNCHES)
        tokens = plan.split.tokens if number == 0 else 0  # token rows that are not written yet
        self._launch(plan.schedule_blocks(tokens, p.launches), stream)


class PortableScore:
    """``index_scores``: scoring with mma on any GPU."""

    def __init__(self, shape: Shape, plan: ScorePlan, device: Device) -> None:
        self._blocks, self._launch = plan.blocks, Launch(plan.kernel, device)
        p = self._launch.params
        p.row_stride, p.max_kv_len = plan.split.row_stride, shape.max_keys
        p.tokens_per_tile = plan.tile_tokens

    def bind(self, inputs: Inputs, memory: int, workspace: Workspace) -> None:
        """Take the inputs, and the workspace at an address."""
        p = self._launch.params
        p.keys, p.q, p.qs = inputs.keys, inputs.q, inputs.qs
        p.token_rows = memory + workspace.token_rows

    def __call__(self, scores: int, part: Part, number: int, stream: int) -> None:
        """Score a part; ``scores`` is the address of its rows."""
        p = self._launch.params
        p.scores, p.first_token, p.end_token = scores, part.first_token, part.end_token
        self._launch(self._blocks, stream)


class HopperScore:
    """``index_scores_sm90``: scoring with wgmma and TMA."""

    def __init__(
        self, shape: Shape, plan: ScorePlan, device: Device, missing_score: float, early: bool
    ) -> None:
        self._plan, self._launch = plan, Launch(plan.kernel, device, early=early)
        self._pages = shape.depth, shape.page_size, shape.num_blocks
        p = self._launch.params
        p.row_stride, p.missing_score = plan.split.row_stride, missing_score

    def bind(self, inputs: Inputs, memory: int, workspace: Workspace) -> None:
        """Take the inputs, and the workspace at an address."""
        p, box_rows = self._launch.params, self._plan.box_rows
        keys = inputs.keys
        p.keys_map = tensor_map(keys.blocks, *self._pages, keys.block_stride, box_rows)
        p.keys, p.batch, p.q, p.qs = inputs.keys, inputs.batch, inputs.q, inputs.qs
        p.token_rows = memory + workspace.token_rows
        self._work_ranges = memory + workspace.work_ranges

    def __call__(self, scores: int, part: Part, number: int, stream: int) -> None:
        """Score a part, or the window of that number; ``scores`` is the address of its rows."""
        p, blocks = self._launch.params, self._plan.blocks
        p.scores = scores
        p.first_token, p.end_token, p.first_key, p.num_keys = part
        place = number % SCHEDULED_LAUNCHES * blocks
        p.work_ranges = self._work_ranges + WORK_RANGE.itemsize * place
        self._launch(blocks, stream)


def score_stage(
    shape: Shape, plan: ScorePlan, device: Device, missing_score: float, *, early: bool = False
) -> PortableScore | HopperScore:
    """The scoring stage of a route.

    ``early``: in decode, blocks may start while the launch before on the stream still runs.
    """
    if plan.route is Route.PORTABLE:
        return PortableScore(shape, plan, device)
    early = early and plan.route is Route.DECODE
    return HopperScore(shape, plan, device, missing_score, early)


class Select:
    """A selection kernel, on our own scores or a caller's."""

    def __init__(
        self, plan: SelectPlan, device: Device, row_stride: int, *, early: bool = False
    ) -> None:
        self._plan, self._launch = plan, Launch(plan.kernel, device, early=early)
        self._filters = plan.kernel.template == "topk_filter"
        self._launch.params.row_stride = row_stride

    def bind_inputs(self, inputs: Inputs, token_rows: int, indices: int, slots: int = 0) -> None:
        """Select from our own scores, whose rows the scheduler has written.

        ``slots``: address of the slots that are written beside the indices, if any.
        """
        p = self._launch.params
        p.keys = inputs.keys  # for slots, and to find which keys exist in rows without scores
        p.batch = inputs.batch
        p.token_rows, p.indices, p.slots = token_rows, indices, slots

    def bind_rows(self, lengths: Array | None, indices: int) -> None:
        """Select from a caller's rows, of these lengths or of all columns."""
        p = self._launch.params
        p.lengths, p.indices = 0 if lengths is None else lengths.data.ptr, indices
        p.signed_lengths = lengths is not None and lengths.dtype == np.int32

    def __call__(
        self, scores: int, values: int, part: Part, stream: int, *, window: int = 0, most: int = 0
    ) -> None:
        """Select from the rows of a part, with at most ``most`` blocks (0: any number).

        ``window``: address of the `WINDOW` that names the rows, or 0 to use the part.
        """
        p, first, end = self._launch.params, part.first_token, part.end_token
        p.scores, p.values, p.first_row, p.end_row, p.columns = (
            scores,
            values,
            first,
            end,
            part.num_keys,
        )
        if self._filters:
            p.window, p.first_column = window, part.first_key
        blocks = self._plan.blocks(end - first)
        self._launch(min(blocks, most) if most else blocks, stream)


class Sort:
    """``sort_topk``: selected rows in the order of their scores."""

    def __init__(self, kernel: Kernel, device: Device) -> None:
        self._launch = Launch(kernel, device)

    def __call__(
        self, rows: int, indices: int, values: int, spare: tuple[int, int], stream: int
    ) -> None:
        """Sort ``rows`` rows that begin at these addresses."""
        p = self._launch.params
        p.indices, p.values = indices, values
        p.spare_indices, p.spare_values = spare
        self._launch(rows, stream)


class Translate:
    """``translate_topk``: selected columns become positions of a shard, slots, or both."""

    def __init__(self, kernel: Kernel, k: int, device: Device) -> None:
        self._launch, self._k = Launch(kernel, device), k
        self._elements = kernel.threads * TRANSLATED_AT_ONCE  # of a block at a time
        self._most = device.multiprocessors * (2048 // kernel.threads)  # blocks at the same time

    def bind(self, inputs: Inputs) -> None:
        """Take the inputs."""
        p, batch = self._launch.params, inputs.batch
        p.keys = inputs.keys
        p.key_starts, p.key_start, p.key_step = batch.key_starts, batch.key_start, batch.key_step

    def __call__(self, rows: int, token_rows: int, indices: int, slots: int, stream: int) -> None:
        """Translate ``rows`` rows whose token rows, indices and slots begin at these addresses."""
        p = self._launch.params
        p.rows, p.token_rows, p.indices, p.slots = rows, token_rows, indices, slots
        self._launch(min(ceil_div(rows * self._k, self._elements), self._most), stream)


class Fill:
    """``fill_invalid``: -inf where a dense matrix has no score."""

    def __init__(self, shape: Shape, plan: ScorePlan, device: Device) -> None:
        self._blocks = plan.fill_blocks
        self._launch = Launch(plan.fill, device) if plan.fill else None
        if self._launch:
            p = self._launch.params
            p.tokens, p.max_kv_len = shape.total_seq_len, shape.max_keys
            p.row_stride = plan.split.row_stride

    def __call__(self, scores: int, token_rows: int, stream: int) -> None:
        """Fill the matrix at an address, if the scoring kernel does not."""
        if self._launch:
            p = self._launch.params
            p.scores, p.token_rows = scores, token_rows
            self._launch(self._blocks, stream)
