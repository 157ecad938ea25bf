"""One case of `fuzz_index.Index`: its calls, and what the contract says of their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from mla_fp8._check.outputs import check_selection
from mla_fp8._check.parameters import Output
from mla_fp8._check.problem import Inputs
from mla_fp8._plan.scoring import runs_on_hopper
from mla_fp8._plan.tuning import H200, Tuning
from mla_fp8.cli import oracle
from mla_fp8.cli.compare import (
    assert_scores_close,
    demand,
    demand_same,
    guarded,
    host,
    same_bits,
)
from mla_fp8.cli.fuzz_data import FP8, make_pool
from mla_fp8.cli.rounding import Sums, largest_errors
from mla_fp8.functions import index_topk
from mla_fp8.indexer import MLAIndexerRaggedFloat8Paged

# Scores from which the contract's gate applies, where they are ordinary. Where heads cancel, an
# error of the right size is large beside the score: on Hopper in case 7259 of seed 3.
_FOR_THE_GATE = 256
_GARBAGE = 0x5A


def array_module(backend: str) -> Any:
    """NumPy or CuPy."""
    if backend == "numpy":
        return np
    import cupy

    return cupy


class _Call:
    """The arrays of a case on a backend, and the calls that it makes."""

    def __init__(self, recipe: Any, xp: Any) -> None:
        self.recipe, self.xp, self.case = recipe, xp, recipe.build()
        case, r = self.case, recipe
        lists = case.input_row_offsets, case.lengths, case.k_lookup_table
        offsets, lengths, table = map(xp.asarray, lists)
        pool = case.pool
        if xp is not np:
            form = r.num_layers, r.page_size, r.kv_heads, r.depth, r.groups
            buffer = xp.asarray(pool.buffer)
            pool = make_pool(xp, r.layout, len(pool.k_blocks), *form, buffer=buffer)
        maxima = case.k_max_lengths
        q, k_blocks = xp.asarray(case.q), pool.k_blocks
        if r.fp8 and xp is np:
            q, k_blocks = q.view(FP8), k_blocks.view(FP8)
        self.args = (
            q,
            None if case.qs is None else xp.asarray(case.qs),
            offsets,
            k_blocks,
            None if r.totals else lengths,
            table,
            xp.asarray(maxima) if self.device_maxima else maxima,
            pool.k_scales,
            r.layer,
        )
        start = xp.asarray(case.starts) if r.starts is not None else r.start
        shard: dict[str, Any] = {"key_start": start, "key_step": r.key_step}
        self.more: dict[str, Any] = {"k_total_lengths": lengths if r.totals else None, **shard}
        self._read = [q, self.args[1], offsets, pool.buffer, lengths, table, start]
        self.op = MLAIndexerRaggedFloat8Paged(
            r.num_heads, r.depth, r.k, r.depth // r.groups, r.mask, r.kpool
        )

    @property
    def device_maxima(self) -> bool:
        return self.recipe.device_maxima and self.xp is not np

    def inputs(self) -> list[bytes]:
        """The bytes of everything that the calls may read."""
        return [host(a).tobytes() for a in self._read if hasattr(a, "shape")]

    def oracle(self, **options: Any) -> oracle.Expected:
        """What the contract says of the scores."""
        starts = self.case.starts.astype(np.int64)
        start = starts if self.recipe.starts is not None else self.recipe.start
        return oracle.evaluate(
            self.case,
            device_max_lengths=self.device_maxima,
            key_start=start,
            key_step=self.recipe.key_step,
            **options,
        )

    def _workspace(self, **options: Any) -> Any:
        memory = self.op.workspace(*self.args, **self.more, **options)
        memory[...] = _GARBAGE
        return memory

    def scores(self, shape: tuple[int, ...]) -> Any:
        """All scores, from the operator."""
        given: dict[str, Any] = {}
        intact: Callable[[], None] | None = None
        if self.recipe.given:
            given["out"], intact = guarded(self.xp, shape, np.float32, _GARBAGE)
            given["workspace"] = self._workspace(for_scores=True)
        options = {**self.more, **given, "check": self.recipe.check_values}
        found = self.op.scores(*self.args, **options)
        if intact:
            intact()
            demand(found is given["out"], "scores must return out")
        return found

    def selection(self) -> tuple[Any, ...]:
        """Indices, slots and scores as the case asks for them."""
        r, tokens = self.recipe, self.case.q.shape[0]
        dtypes = [np.int32] * (1 + (r.output == "both")) + [np.float32] * r.return_scores
        options: dict[str, Any] = {
            "output": r.output,
            "sort": r.sort,
            "return_scores": r.return_scores,
        }
        outs, checks = [], []
        given: dict[str, Any] = {}
        if r.given:
            for dtype in dtypes:
                out, intact = guarded(self.xp, (tokens, r.k), dtype, _GARBAGE)
                outs.append(out)
                checks.append(intact)
            given["out"] = outs[0] if len(outs) == 1 else tuple(outs)
        found = self._run(options, given)
        for intact in checks:
            intact()
        found = found if isinstance(found, tuple) else (found,)
        demand(len(found) == len(dtypes), f"{len(found)} results, not {len(dtypes)}")
        if r.given:
            same = all(a is b for a, b in zip(found, outs, strict=True))
            demand(same, "results must be the arrays of out")
        return found

    def _run(self, options: dict[str, Any], given: dict[str, Any]) -> Any:
        r = self.recipe
        if r.entry == "execute":
            self.op.execute(given["out"], *self.args)
            return given["out"]
        if r.scratch and self.xp is not np and r.entry == "call":
            return self._run_in(r.scratch, options, given.get("out"))
        if r.given:
            given = {**given, "workspace": self._workspace(**options)}
        options = {**options, **self.more, **given, "check": r.check_values}
        if r.entry == "function":
            return index_topk(*self.args, k=r.k, mask=r.mask, kpool=r.kpool, **options)
        if r.entry == "bind":
            bound = self.op.bind(*self.args, **options)
            bound()
            return bound()
        return self.op(*self.args, **options)

    def _run_in(self, scratch: int, options: dict[str, Any], out: Any) -> Any:
        """The operator's call with other limits on scratch memory."""
        from mla_fp8._cuda import backend

        problem = self._problem()
        by, values = options["sort"], options["return_scores"]
        selection = check_selection(
            problem.inputs, self.op.k, by, values, out, None, output=options["output"]
        )
        backend.index_topk(problem, selection, _tuning(scratch))
        return selection.results if out is None else out

    def _problem(self) -> Any:
        return self.op._problem(Inputs(*self.args)._replace(**self.more), self.recipe.check_values)

    def sums(self) -> Sums:
        """How the backend adds products."""
        if self.xp is np:
            return Sums.FLOAT64
        from mla_fp8._cuda.backend import device_facts

        r, device = self.recipe, device_facts(self.xp.cuda.runtime.getDevice())
        hopper = runs_on_hopper(r.depth, r.kv_heads, r.groups, device)
        return Sums.HOPPER if hopper else Sums.PORTABLE

    def routes(self) -> list[str]:
        """The kernels and the mode by which the call ran."""
        if self.xp is np:
            return ["NumPy"]
        from mla_fp8._cuda import backend

        r = self.recipe
        tuning = _tuning(r.scratch) if r.scratch and r.entry == "call" else H200
        output, by_score = Output(r.output), r.sort == "score"
        plan = backend.topk_plan(self._problem(), r.k, by_score, r.return_scores, tuning, output)
        route, mode = plan.scoring.route.value, plan.mode.value
        return [route, f"{route}, {mode}", f"selection: {plan.selection.kernel.template}"]


@lru_cache(maxsize=64)
def _tuning(scratch: int) -> Tuning:
    """Limits on scratch memory; one object for each, because plans are cached by it."""
    return dataclasses.replace(H200, prefill_bytes=scratch, decode_bytes=scratch)


def _allowed(call: _Call) -> np.ndarray:
    """The largest error of each score."""
    errors: np.ndarray = call.oracle(score=partial(largest_errors, call.sums())).scores
    return errors


def check(recipe: Any, backend: str) -> list[str]:
    """Run a case, compare everything with the oracle, and return its routes."""
    call = _Call(recipe, array_module(backend))
    before, want = call.inputs(), call.oracle()
    try:
        dense = call.scores(want.scores.shape)
        found = call.selection()
    except ValueError as error:
        if recipe.hostile and recipe.check_values is not False and "must" in str(error):
            return ["refused: wrong values, as asked"]
        raise
    demand(call.inputs() == before, "a call must not write its inputs")
    gate = want.counts.sum() >= _FOR_THE_GATE and recipe.values == "normal" and not recipe.hostile
    assert_scores_close(dense, want, _allowed(call), 1.0, gate)
    _compare(recipe, call, want, host(dense), tuple(map(host, found)))
    return call.routes()


def _compare(
    recipe: Any,
    call: _Call,
    want: oracle.Expected,
    dense: np.ndarray,
    found: tuple[np.ndarray, ...],
) -> None:
    """Whether the selection is the best of the backend's own scores, in the form asked for."""
    case = call.case
    columns = oracle.expected_rows(dense, want.selectable, recipe.k, recipe.sort)
    row, place = np.nonzero(columns >= 0)
    column = columns[row, place].astype(np.int64)
    sequence = np.zeros(len(columns), np.int64)
    for b, (first, last) in enumerate(oracle.token_ranges(case)):
        sequence[first:last] = b
    of = sequence[row]
    start = case.starts.astype(np.int64)[of]
    page, offset = np.divmod(column, recipe.page_size)
    block = case.k_lookup_table[of, page].astype(np.int64)
    forms = {
        "positions": start + recipe.key_step * column,
        "slots": block * recipe.page_size + offset,
    }
    names = ["positions", "slots"] if recipe.output == "both" else [recipe.output]
    for name, got in zip(names, found, strict=False):
        expected = np.full(columns.shape, -1, np.int32)
        expected[row, place] = forms[name]
        demand_same(name, got, expected)
    if recipe.return_scores:
        values = np.full(columns.shape, -np.inf, np.float32)
        values[row, place] = dense[row, column]
        demand(same_bits(found[-1], values), "returned scores are not those of the keys beside")
