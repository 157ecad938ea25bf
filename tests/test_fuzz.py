"""The fuzzer: the same cases every time, and no planted fault gets past it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from mla_fp8 import _reference
from mla_fp8.__main__ import main
from mla_fp8._check.parameters import Output
from mla_fp8._check.problem import Inputs
from mla_fp8._plan.kernel import Device
from mla_fp8._plan.topk import plan_topk
from mla_fp8._plan.tuning import H200
from mla_fp8.cli import fuzz, info, oracle
from mla_fp8.cli.compare import Mismatch, demand_same
from mla_fp8.cli.fuzz_calls import _Call, _tuning
from mla_fp8.cli.fuzz_data import LAYOUTS, VALUES
from mla_fp8.cli.fuzz_index import Index
from mla_fp8.cli.fuzz_lists import Merge, Select, Write
from mla_fp8.cli.fuzz_recipe import failure, shrink

ROOT = Path(__file__).parents[1]
NEVER = float("inf")


def found_by(seed: int = 0, cases: int = 400):
    """The first case that fails, and its error."""
    failed = fuzz.run_block(seed, 0, cases, "numpy", NEVER).failed
    assert failed, f"no fault in {cases} cases"
    (number,) = failed
    recipe = fuzz.case(seed, number, "numpy")
    return recipe, failure(recipe, "numpy")


def after(monkeypatch, name, change, **only):
    """Let a function of the NumPy backend make a mistake once it has done its work."""
    real = getattr(_reference, name)

    def wrong(*arguments):
        real(*arguments)
        change(*arguments)

    monkeypatch.setattr(_reference, name, wrong)


def _swap(*arguments):
    """Exchange the first two picks of the last row."""
    indices = arguments[-1].indices
    if indices.size and indices.shape[1] > 1:
        indices[-1, :2] = indices[-1, 1::-1].copy()


def _lose_the_last(*arguments):
    indices = arguments[-1].indices
    found = np.argwhere(indices >= 0)
    if len(found):
        indices[tuple(found[-1])] = -1


def _next_slot(problem, selection):
    slots = selection.indices if selection.output is Output.SLOTS else selection.slots
    if slots is not None:
        slots[slots >= 0] += 1


def _other_scores(*arguments):
    values = arguments[-1].values
    if values is not None:
        values[np.isfinite(values)] *= np.float32(1 + 2.0**-23)


def _foreign_key(problem, selection):
    """A key past the last that a token sees, in place of its worst."""
    indices = selection.indices
    if indices.size:
        indices[-1, -1] = problem.shape.max_keys


def _write_an_input(problem, selection):
    if problem.k_scales.size:
        problem.k_scales[-1, ..., -1] = 7


def _write_behind(*arguments):
    indices = arguments[-1].indices
    if indices.base is not None and indices.base.dtype == np.uint8 and indices.size:
        indices.base[-8] = 0


def _wrong_scores(problem, out, workspace):
    out[np.isfinite(out)] *= np.float32(1 + 2.0**-20)


def _show_one_more(problem, out, workspace):
    out[np.isneginf(out)] = -3e38


def _skip_a_token(write):
    write.k_scales[-1, -1] = 3


FAULTS = {
    "a swapped pick": ("index_topk", _swap, Index),
    "a lost pick": ("index_topk", _lose_the_last, Index),
    "the next slot": ("index_topk", _next_slot, Index),
    "scores of others": ("index_topk", _other_scores, Index),
    "a foreign key": ("index_topk", _foreign_key, Index),
    "an input is written": ("index_topk", _write_an_input, Index),
    "memory behind out is written": ("index_topk", _write_behind, Index),
    "scores are off": ("index_scores", _wrong_scores, Index),
    "an unseen key is shown": ("index_scores", _show_one_more, Index),
    "a swapped pick of select_topk": ("select_topk", _swap, Select),
    "a swapped pick of merge_topk": ("merge_topk", _swap, Merge),
    "a scale that was not given": ("write_keys", _skip_a_token, Write),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_shrunk(name, monkeypatch):
    function, change, kind = FAULTS[name]
    with monkeypatch.context() as patch:
        after(patch, function, change)
        recipe, error = found_by()
        assert isinstance(recipe, kind)
        assert isinstance(error, Mismatch), error
        small, other = shrink(recipe, "numpy", error)
        assert isinstance(other, Mismatch)
        assert len(small.snippet("numpy")) < len(recipe.snippet("numpy"))
        for change in small.smaller():  # nothing simpler fails
            try:
                simpler = type(small)(**{**vars(small), **change})
            except ValueError:
                continue
            assert simpler == small or not isinstance(failure(simpler, "numpy"), Mismatch)
        with pytest.raises(Mismatch, match=re.escape(str(other))):
            exec(small.snippet("numpy"), {})
    exec(small.snippet("numpy"), {})  # without the fault all is well


def test_a_swapped_pick_shrinks_to_two_keys(monkeypatch):
    after(monkeypatch, "index_topk", _swap)
    small, _ = shrink(*(found_by()[0], "numpy", found_by()[1]))
    assert small.k == 2
    assert sum(small.new) <= 2
    assert small.layout == "contiguous"
    assert small.hostile == small.signed == ()


def test_an_exception_and_a_warning_are_faults(monkeypatch):
    def warn(*_):
        np.float32(3e38) * np.float32(10)

    after(monkeypatch, "index_topk", warn)
    recipe, error = found_by(cases=3)
    assert isinstance(error, RuntimeWarning)
    with monkeypatch.context() as patch:
        patch.setattr(_reference, "index_topk", lambda *_: 1 / 0)
        assert isinstance(failure(recipe, "numpy"), ZeroDivisionError)


def test_the_command_prints_code_that_runs_the_case_again(monkeypatch, capsys, tmp_path):
    report = tmp_path / "counts.json"
    with monkeypatch.context() as patch:
        after(patch, "index_topk", _swap)
        command = ["fuzz", "--cases", "300", "--seed", "4", "--json", str(report)]
        assert main(command) == 1
        printed = capsys.readouterr().out
        code = printed[printed.index("from mla_fp8.cli.fuzz_index import Index") :]
        with pytest.raises(Mismatch):
            exec(code, {})
    exec(code, {})
    counts = json.loads(report.read_text())
    (failed,) = counts["failed"]
    assert failed["seed"] == 4
    assert re.search(r"Index: Mismatch: .* \(_compare, fuzz_calls.py:\d+\)$", failed["error"])
    # The reason is there before anything else, for who stops the command while it shrinks.
    assert printed.startswith(f"Case {failed['case']} of seed 4 failed: {failed['error']}\n")
    assert f"Case {failed['case']} failed. This code runs it again" in printed


def test_cases_depend_on_seed_and_number_alone():
    wanted = [repr(fuzz.case(5, number, "numpy")) for number in range(30)]
    assert wanted != [repr(fuzz.case(6, number, "numpy")) for number in range(30)]
    assert [repr(fuzz.case(5, number, "numpy")) for number in reversed(range(30))] == wanted[::-1]
    code = "from mla_fp8.cli import fuzz\nfor i in range(30): print(repr(fuzz.case(5, i, 'numpy')))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines() == wanted


def test_arrays_of_a_case_are_the_same_every_time():
    for number in range(20):
        recipe = fuzz.case(1, number, "numpy")
        if isinstance(recipe, Index):
            one, two = (_Call(recipe, np).inputs() for _ in range(2))
            assert one == two


def test_counts_do_not_depend_on_the_processes(tmp_path, capsys):
    reports = []
    for jobs in ("1", "2"):
        file = tmp_path / f"{jobs}.json"
        assert main(["fuzz", "--cases", "120", "--jobs", jobs, "--json", str(file)]) == 0
        assert "120 cases of seed 0 on numpy" in capsys.readouterr().out
        reports.append(json.loads(file.read_text()))
    for name in ("cases", "routes", "features"):
        assert reports[0][name] == reports[1][name]
    assert reports[0]["cases"] == sum(
        count for name, count in reports[0]["features"].items() if name.startswith("operation:")
    )


def test_a_failure_stops_the_other_processes(monkeypatch):
    stop = Event()
    monkeypatch.setattr(fuzz, "_stop", stop)
    assert fuzz.run_block(0, 0, 3, "numpy", NEVER).cases == 3
    stop.set()
    assert fuzz.run_block(0, 0, 3, "numpy", NEVER).cases == 0


def test_the_time_is_a_limit(capsys):
    assert main(["fuzz", "--minutes", "0.02"]) == 0
    cases = int(re.search(r"(\d+) cases of seed", capsys.readouterr().out)[1])
    assert cases > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "torch"], "--backend must be one of numpy, cuda; got torch"),
        (["--minutes", "0"], "--minutes must be above 0; got 0.0"),
        (["--minutes", "nan"], "--minutes must be above 0; got nan"),
        (["--cases", "0"], "--cases must be 1 to .*; got 0"),
        (["--jobs", "0"], "--jobs must be 1 to .*; got 0"),
        (["--json", "/nowhere/x.json"], "--json can't be written: .*/nowhere/x.json"),
        (["--backend", "cuda"], "no usable NVIDIA GPU"),
    ],
)
def test_wrong_flags_are_refused(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(info, "gpus", list)
    assert main(["fuzz", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"mla_fp8 fuzz: {words}.*\n", printed.err)


def test_every_feature_is_tried():
    seen = Counter()
    for number in range(2000):
        seen.update(fuzz.case(0, number, "numpy").features())
    for wanted in (
        *(f"values: {name}" for name in VALUES),
        *(f"layout: {name}" for name in LAYOUTS),
        *(f"hostile: {n}" for n in ("offsets", "lengths", "table", "maxima", "starts", "scales")),
        *(f"operation: {n}" for n in ("select_topk", "merge_topk", "write_keys")),
        *(f"entry: {n}" for n in ("call", "execute", "function", "bind")),
        *(f"output: {n}" for n in ("positions", "slots", "both")),
        "k: 1",
        "k: above 4096",
        "page size: 1",
        "batch: empty",
        "batch: an empty sequence",
        "qs: None",
        "maxima: far above the lengths",
    ):
        assert seen[wanted] >= 5, wanted


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_pools_are_strided(layout):
    recipe = Index(new=(3, 2), cached=(9, 5), num_layers=2, layout=layout, page_size=2)
    case = recipe.build()
    assert not case.k_blocks.flags.c_contiguous
    assert recipe.check("numpy") == ["NumPy"]


def test_hostile_values_that_are_checked_are_refused():
    recipe = Index(new=(2, 1), cached=(5, 9), page_size=4, hostile=("table",), check_values=True)
    routes = Counter(Index(**{**vars(recipe), "seed": seed}).check("numpy")[0] for seed in range(9))
    assert routes["refused: wrong values, as asked"] > 0


def test_cases_of_cuda_take_every_route():
    """By their plans for an H200, which need no GPU."""
    h200, seen, kernels = Device("sm_90a", 132, shared_bytes=227 << 10), Counter(), set()
    for number in range(0, 6000, 20):
        recipe = fuzz.case(0, number, "cuda")
        if not isinstance(recipe, Index):
            continue
        call = _Call(recipe, np)
        problem = call.op._problem(Inputs(*call.args)._replace(**call.more), False)
        tuning = _tuning(recipe.scratch) if recipe.scratch else H200
        order = recipe.sort == "score", recipe.return_scores
        output = Output(recipe.output)
        plan = plan_topk(problem.shape, recipe.k, *order, h200, tuning, output)
        seen[plan.scoring.route.value, plan.mode.value] += 1
        seen["keys are split"] += plan.scoring.split.part_keys < problem.shape.max_keys
        kernels.update(plan.kernels)
    for wanted in (
        ("portable", "sequential"),
        ("decode", "sequential"),
        ("decode", "parts"),
        ("prefill", "sequential"),
        ("prefill", "parts"),
        ("prefill", "windows"),
        "keys are split",
    ):
        assert seen[wanted] > 1, wanted
    assert {"topk_filter", "topk_histogram"} <= {kernel.template for kernel in kernels}


def test_the_oracle_knows_shards():
    case = Index(new=(2,), cached=(8,), start=1, key_step=3, page_size=4).build()
    seen = oracle.evaluate(case, key_start=1, key_step=3).selectable
    assert seen.sum(axis=1).tolist() == [3, 3]  # of 9 and 10 keys: 1, 4 and 7


def test_same_means_the_same_bits_also_of_nans():
    bits = np.array([[0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]], np.uint32)
    nan, zeros = bits.view(np.float32), np.array([[0.0, -0.0]], np.float32)
    demand_same("NaN", nan, nan.copy())
    for one, other, words in (
        (zeros, zeros[:, ::-1], "x: 2 entries differ; row 0 has 0.0 at 0, not -0.0"),
        (nan, nan[:, ::-1], "x: 4 entries differ; row 0 has nan at 0, not nan"),
        (nan[:, :1], np.full((1, 1), np.inf, np.float32), "row 0 has nan at 0, not inf"),
        (zeros, zeros.astype(np.float64), "x of dtype float32, not float64"),
        (zeros, zeros[:, :1], r"x of shape \(1, 2\), not \(1, 1\)"),
    ):
        with pytest.raises(Mismatch, match=words):
            demand_same("x", one, other)


@pytest.mark.gpu
def test_cases_of_cuda(cupy):
    counts = fuzz.run_block(0, 0, 200, "cuda", NEVER)
    assert not counts.failed
    assert counts.cases == 200


@pytest.mark.gpu
def test_a_fault_on_a_gpu_is_found(cupy, monkeypatch):
    from mla_fp8._cuda import backend

    real = backend.index_topk

    def wrong(problem, selection, *tuning):
        real(problem, selection, *tuning)
        if selection.indices.size and selection.k > 1:
            selection.indices[-1, :2] = selection.indices[-1, 1::-1].copy()

    monkeypatch.setattr(backend, "index_topk", wrong)
    recipe = Index(new=(3,), cached=(9,), k=2, page_size=4)
    assert isinstance(failure(recipe, "cuda"), Mismatch)
    small, error = shrink(recipe, "cuda", failure(recipe, "cuda"))
    assert isinstance(error, Mismatch)
    assert small.cached == (0,)
