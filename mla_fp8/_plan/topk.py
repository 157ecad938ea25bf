"""The plan of the whole operation: scoring and selection, and how the work is split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from mla_fp8._check.parameters import Output
from mla_fp8._check.shape import Shape
from mla_fp8._plan.kernel import WARP, Device, Kernel, ceil_div
from mla_fp8._plan.scoring import (
    Route,
    ScorePlan,
    head_columns,
    hopper_tile,
    plan_scoring,
    route_of,
)
from mla_fp8._plan.selection import (
    MAX_FILTER_K,
    ROW_THREADS,
    SelectPlan,
    filter_bytes,
    filter_plan,
    plan_select,
    sort_kernel,
    translate_kernel,
)
from mla_fp8._plan.tuning import Tuning
from mla_fp8._plan.workspace import Split, Workspace, aligned_row

SELECTION_LENGTHS = 16  # selection_blocks of schedule.cu
_PIPELINE_BUFFERS = 2  # one buffer of scores is written while the other is selected from


# kSlots of the kernels that write slots: in place of positions, or beside them.
_SLOTS = {Output.POSITIONS: 0, Output.SLOTS: 1, Output.BOTH: 2}


class Mode(Enum):
    """How the scores of a call pass through the workspace."""

    SEQUENTIAL = "sequential"  # scores a part (or all), then selects from it, and so on
    WINDOWS = "windows"  # pipelined: packed rows in windows that the scheduler fills
    PARTS = "parts"  # pipelined: parts of equally many tokens, and of keys where rows are long

    @property
    def pipelined(self) -> bool:
        """Whether one part is selected from while the next is scored."""
        return self is not Mode.SEQUENTIAL


@dataclass(frozen=True)
class TopkPlan:
    """How to score and to select.

    ``selection_blocks``: in a pipelined mode, how many multiprocessors scoring leaves to
    selection: one number for `Mode.PARTS`; for `Mode.WINDOWS` a number for each of
    `SELECTION_LENGTHS` mean lengths of rows: the bound of all lengths divided by 1, sqrt(2), 2, ...
    The scheduler takes the number for the lengths that it finds.
    """

    mode: Mode
    scoring: ScorePlan
    selection: SelectPlan
    selection_blocks: tuple[int, ...]
    keeps_values: bool  # selection stores scores that the caller does not ask for
    sort: Kernel | None
    translate: Kernel | None  # after all else: selected columns become positions or slots
    workspace: Workspace

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels that a call launches."""
        scoring = self.scoring.schedule, self.scoring.kernel
        kernels = *scoring, self.selection.kernel, self.sort, self.translate
        return tuple(kernel for kernel in kernels if kernel)


@lru_cache(maxsize=1024)
def plan_topk(
    shape: Shape,
    k: int,
    by_score: bool,
    values: bool,
    device: Device,
    tuning: Tuning,
    output: Output = Output.POSITIONS,
) -> TopkPlan:
    """Plan scoring and selection of a call.

    ``by_score``: rows are sorted by score. ``values``: the caller gets the scores too.
    """
    return _Planner(shape, k, by_score, values, device, tuning, output).plan()


@dataclass(frozen=True)
class _Planner:
    """What the steps of planning a call share."""

    shape: Shape
    k: int
    by_score: bool
    values: bool
    device: Device
    tuning: Tuning
    output: Output

    def plan(self) -> TopkPlan:
        route = route_of(self.shape, self.device)
        decode = route is Route.DECODE
        budget = self.tuning.decode_bytes if decode else self.tuning.prefill_bytes
        tokens, keys = self.shape.total_seq_len, self.shape.max_keys
        rows = budget // max(self._row_bytes(1), 1)
        fits = keys == 0 or tokens <= rows
        if fits or self.k > MAX_FILTER_K or route is Route.PORTABLE:
            return self._sequential(route, max(1, min(rows, tokens)))
        return self._pipelined(decode, budget)

    @property
    def _keeps_values(self) -> bool:
        return self.by_score and not self.values

    def _slots_of_selection(self, part_keys: int) -> int:
        """kSlots of the selection kernel.

        It is 0 if ``translate_topk`` finds them at the end: because positions of a shard are to be
        translated too, because columns are read again when a row is continued with its next keys,
        or because the sort moves one array of indices alone.
        """
        positions = self.shape.sharded and self.output is not Output.SLOTS
        sorted_twice = self.by_score and self.output is Output.BOTH
        if positions or part_keys < self.shape.max_keys or sorted_twice:
            return 0
        return _SLOTS[self.output]

    def _translate(self, split: Split) -> Kernel | None:
        slots = _SLOTS[self.output]
        positions = self.shape.sharded and self.output is not Output.SLOTS
        if slots == self._slots_of_selection(split.part_keys) and not positions:
            return None
        return translate_kernel(self.k, slots, positions)

    def _row_bytes(self, buffers: int) -> int:
        """Workspace of one row: scores in ``buffers`` buffers, and the selected entries."""
        selected = self.k * self._keeps_values + 2 * self.k * self.by_score
        return 4 * (buffers * aligned_row(self.shape.max_keys) + selected)

    def _sequential(self, route: Route, rows: int) -> TopkPlan:
        tokens, keys = self.shape.total_seq_len, self.shape.max_keys
        has_values = self.values or self._keeps_values
        selection = plan_select(
            rows,
            keys,
            self.k,
            self.device,
            self.tuning,
            values=has_values,
            unscored=route is not Route.PORTABLE and not has_values,
            slots=self._slots_of_selection(keys),
            tokens_per_key=self.shape.tokens_per_key if route is Route.DECODE else 0,
        )
        split = Split(tokens, keys, rows, keys, aligned_row(keys))
        return self._finish(Mode.SEQUENTIAL, split, selection, ())

    def _pipelined(self, decode: bool, budget: int) -> TopkPlan:
        tokens, keys, k = self.shape.total_seq_len, self.shape.max_keys, self.k
        buffers, keeps_values = _PIPELINE_BUFFERS, self._keeps_values
        if self.tuning.min_part_rows * self._row_bytes(buffers) > budget:
            selected = 4 * k * (not self.values) + 8 * k * self.by_score
            room = budget // self.tuning.min_part_rows - selected
            parts = ceil_div(keys, max(room // (4 * buffers), MAX_FILTER_K))
            if parts > 1:  # rows are split by keys too: selection needs the scores it found before
                keeps_values = not self.values
                keys = 2 * WARP * ceil_div(ceil_div(keys, parts), 2 * WARP)
        selected = 4 * k * keeps_values + 8 * k * self.by_score
        row_bytes = 4 * buffers * aligned_row(keys) + selected
        tile = hopper_tile(self.shape).all_tokens
        rows = min(max(budget // row_bytes // tile, 1) * tile, tokens)
        has_values = self.values or keeps_values
        # A part has few long rows: more threads for each leave less of the GPU idle at the end.
        long = keys >= self.tuning.long_row and filter_bytes(k, 512) <= self.device.shared_bytes
        threads = 512 if long else ROW_THREADS
        at_once = max(1, min(1024 // threads, self.device.shared_bytes // filter_bytes(k, threads)))
        selection = filter_plan(
            k,
            threads,
            values=has_values,
            rows_per_block=at_once,
            unscored=not has_values,
            slots=self._slots_of_selection(keys),
        )
        # Rows in parts, or rows that are sorted, have memory for each row: no packing.
        packed = not decode and keys == self.shape.max_keys and not self.by_score
        split = Split(tokens, self.shape.max_keys, rows, keys, aligned_row(keys), packed)
        blocks = tuple(
            self._selection_blocks(tile, round(rows * shorter), math.ceil(keys / shorter), at_once)
            for shorter in (math.sqrt(2) ** i for i in range(SELECTION_LENGTHS if packed else 1))
        )
        mode = Mode.WINDOWS if packed else Mode.PARTS
        return self._finish(mode, split, selection, blocks, keeps_values)

    def _selection_blocks(self, tile: int, rows: int, keys: int, at_once: int) -> int:
        """Multiprocessors that select from a part while the others score the next.

        The number for which the slower of the two is fastest. A multiprocessor selects from
        ``at_once`` rows at the same time, and the tokens of a tile read a key together.
        """
        t, processors = self.tuning, self.device.multiprocessors
        reading = t.read_key_ns / max(min(self.shape.max_new, tile), 1)
        columns = head_columns(self.shape.num_heads)
        scoring = rows * keys * max(t.score_key_ns * max(columns, 16) / 64, reading)
        selecting = at_once * (t.select_row_ns + t.select_key_ns * keys)

        def longer(blocks: int) -> float:
            rounds = ceil_div(rows, blocks * at_once)
            return max(scoring / (processors - blocks), rounds * selecting)

        return min(range(1, max(processors // 2, 2)), key=longer)

    def _finish(
        self,
        mode: Mode,
        split: Split,
        selection: SelectPlan,
        selection_blocks: tuple[int, ...],
        keeps_values: bool | None = None,
    ) -> TopkPlan:
        keeps = self._keeps_values if keeps_values is None else keeps_values
        scoring = plan_scoring(
            self.shape,
            self.device,
            self.tuning,
            split,
            unscored_kv_len=selection.unscored_kv_len,
            # In windows the scheduler leaves blocks without work instead.
            selection_blocks=selection_blocks[0] if mode is Mode.PARTS else 0,
        )
        buffers = _PIPELINE_BUFFERS if mode.pipelined else 1
        return TopkPlan(
            mode=mode,
            scoring=scoring,
            selection=selection,
            selection_blocks=selection_blocks,
            keeps_values=keeps,
            sort=sort_kernel(self.k) if self.by_score else None,
            translate=self._translate(split),
            workspace=scoring.lay_out(buffers, self.k, keeps, self.by_score),
        )
