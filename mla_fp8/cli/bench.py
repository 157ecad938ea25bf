"""``python -m mla_fp8 bench``: scoring and the whole operation beside peers, in one run.

Peers run if they can be imported: torch, and DeepGEMM as ``sgl-deep-gemm``. Times are medians in
microseconds, with the quartiles of their samples as ``..._q1`` and ``..._q3``:

``us``, ``deepgemm_us``
    Scoring alone: float32 scores of every key that a token sees. Work is scheduled beforehand, as
    for DeepGEMM; our decode kernel schedules its work itself.
``topk_us``
    The whole operation, replayed from a CUDA graph.
``torch_topk_us``
    Our scores as a matrix, then `torch.topk`, replayed from a CUDA graph.
``real_us``
    ``topk_us`` on data as models give it (`patterns`), measured in turn with random data;
    ``real_ratio`` is its time over that of random data.
``eager_us``, ``host_us``
    The whole operation called on an idle GPU: until the GPU is done, until the call returns.
``bound_us``
    The same as ``host_us``, of a bound call (`BoundCall`).

L2 is cold. Prefill launches are timed one by one, after L2 has been flushed. Decode replays a CUDA
graph of many launches, each on other pages. The group ``select`` is selection alone, on all
patterns of scores; ``gpus`` is one process for each GPU (`bench_gpus`). Without a GPU the NumPy
backend is timed by the host's clock, on smaller shapes.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from mla_fp8.cli import (
    bench_compare,
    bench_cuda,
    bench_doors,
    bench_gpus,
    bench_numpy,
    bench_plot,
    bench_report,
    bench_select,
    info,
    roofline,
)
from mla_fp8.cli.bench_presets import PRESETS, SMALLER, one, preset
from mla_fp8.cli.bench_rows import Row
from mla_fp8.cli.cases import Case, cases
from mla_fp8.cli.command import CommandError, Console, check_output
from mla_fp8.cli.roofline import Roofline
from mla_fp8.cli.timer import Timer

_SHAPE = {  # flags of one shape
    "heads": (int, "query heads (64)"),
    "depth": (int, "channels per head (128)"),
    "k": (int, "positions per token (2048)"),
    "kpool": (int, "tokens per cached row (1)"),
    "batch": (int, "how many times the sequences of --new and --keys (1)"),
    "new": (str, "new tokens of each sequence: a number, or several with commas (1)"),
    "keys": (str, "keys of each sequence, the new ones included (131072)"),
    "page": (int, "keys per page (64)"),
    "data": (str, "random, real-like, zeros, ascending, descending, equal or two values (random)"),
}
_COLD = (
    "L2 is cold: 256 MiB are written before each sample, and the launches of a decode graph read "
    "at least 160 MiB of pages in turn, or 64 copies of the pages if these are less"
)
_WARM = "CPU caches are as the call before left them"


@dataclass
class _Device:
    """Where the benchmark runs."""

    name: str
    gpu: dict[str, Any] | None
    caches: str
    roofline: Callable[[], Roofline]
    measure: Callable[[list[Case], Roofline], list[Row]]


def add_flags(command: argparse.ArgumentParser) -> None:
    """Declare the flags of this command."""
    listed = "; ".join(f"{name}: {what}" for name, what in PRESETS.items())
    command.add_argument("preset", nargs="?", choices=PRESETS, help=f"{listed} (default: quick)")
    groups = ",".join(dict.fromkeys(case.group for case in all_cases()))
    command.add_argument(
        "--only",
        metavar="GROUPS",
        help=f"instead of a preset, groups of docs/benchmarks.md: all, or any of {groups}",
    )
    shape = command.add_argument_group("one shape instead of a preset")
    for name, (kind, what) in _SHAPE.items():
        shape.add_argument(f"--{name}", type=kind, help=what)
    result = command.add_argument_group("results")
    result.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    result.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each case")
    result.add_argument("--plot", type=Path, metavar="FILE.png|svg", help="draw times and shares")
    result.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="compare with what --json wrote; the exit status is 1 if something is slower",
    )
    result.add_argument(
        "--tolerance",
        type=float,
        default=bench_compare.TOLERANCE,
        metavar="PERCENT",
        help="what --compare lets pass beside the spread (%(default)g)",
    )


def all_cases() -> list[Case]:
    """The cases of all groups."""
    return cases() + bench_doors.cases() + bench_gpus.cases()


def _commit() -> str | None:
    """The commit of the checkout, if this is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def chosen(name: str | None, only: str | None, shape: dict[str, Any], *, small: bool) -> list[Case]:
    """The cases of a preset, of groups or of one shape.

    Raises
    ------
    CommandError
        If more than one of these is given, or one is wrong.
    """
    if (name is not None) + (only is not None) + bool(shape) > 1:
        raise CommandError("a preset, --only and the flags of one shape exclude each other")
    if shape:
        return [one(**shape)]
    if only is None:
        return preset(name or "quick", small=small)
    groups = list(dict.fromkeys(case.group for case in all_cases()))
    one_gpu = [group for group in groups if group != "gpus"]
    named = one_gpu if only == "all" else only.split(",")
    if wrong := set(named) - set(groups):
        words = f"--only must be all or some of {','.join(groups)}; got {sorted(wrong)}"
        raise CommandError(words)
    if small:
        raise CommandError(
            "--only needs an NVIDIA GPU and CuPy, so nothing was measured; presets and single "
            "shapes run on the CPU too"
        )
    if "gpus" in named:
        bench_gpus.check()
    return [case for case in all_cases() if case.group in named]


def _cuda() -> _Device:
    from mla_fp8._cuda import backend

    try:
        backend.device_facts(0)
    except RuntimeError as error:  # too old
        raise CommandError(str(error)) from None
    timer = Timer()

    def measure(together: list[Case], roof: Roofline) -> list[Row]:
        group = together[0].group
        if group == "gpus":
            return bench_gpus.measure(together)
        if group == "doors":
            return bench_doors.measure(together[0], timer)
        if group == "select":
            return bench_select.measure(together, timer)
        return bench_cuda.measure(together, timer, roof)

    gpu = info.gpus()[0]
    return _Device(gpu["name"], gpu, _COLD, lambda: roofline.on_gpu(timer), measure)


def _numpy() -> _Device:
    def measure(together: list[Case], roof: Roofline) -> list[Row]:
        return [bench_numpy.measure(case, roof) for case in together]

    return _Device(bench_numpy.device(), None, _WARM, roofline.on_cpu, measure)


def _together(wanted: list[Case]) -> list[list[Case]]:
    """Cases that are measured together: those of one shape, in ``select`` of all patterns."""
    found: dict[object, list[Case]] = {}
    for case in wanted:
        data = "" if case.group == "select" else case.data
        key: tuple[object, ...] = case.group, case.new, case.keys, case.page_size, data
        if case.group == "gpus":  # processes are started once
            key = (case.group,)
        found.setdefault(key, []).append(case)
    return list(found.values())


def run(
    preset: str | None,
    only: str | None,
    json: Path | None,
    csv: Path | None,
    plot: Path | None,
    compare: Path | None,
    tolerance: float,
    **shape: Any,
) -> int:
    """Measure, print tables, write files; 1 if something is slower than in ``compare``."""
    given = {name: value for name, value in shape.items() if value is not None}
    has_gpu = bool(info.gpus())
    wanted = chosen(preset, only, given, small=not has_gpu)
    for flag, path in (("--json", json), ("--csv", csv)):
        if path is not None:
            check_output(flag, path)
    if plot is not None:
        bench_plot.check(plot, wanted)
    if not tolerance >= 0:
        raise CommandError(f"--tolerance must be at least 0; got {tolerance}")
    device = _cuda() if has_gpu else _numpy()
    old = None if compare is None else bench_compare.load(compare, device.name, wanted)
    console = Console(width=120)
    if not has_gpu:
        smaller = "" if given else f"; shapes and k are {SMALLER} times smaller than on a GPU"
        _say(console, f"No usable NVIDIA GPU (or no CuPy): this is the NumPy backend{smaller}.")
    before = device.roofline()
    _say(console, f"{device.name}. Roofline: {before}. {device.caches}.")
    rows: list[Row] = []
    for cases_of_shape in track(_together(wanted), "Measuring", console=console, transient=True):
        try:
            rows += device.measure(cases_of_shape, before)
        except MemoryError as error:
            raise CommandError(f"{cases_of_shape[0].name} needs more memory: {error}") from None
    after = device.roofline()
    tables = bench_report.tables(rows)
    for table in tables:
        console.print(table)
    if tables:
        _say(console, bench_report.legend(rows))
    for table in bench_select.table(rows), bench_doors.table(rows), bench_gpus.table(rows):
        if table.row_count:
            console.print(table)
    _say(console, f"Roofline after the run: {after}.")
    if json is not None:
        found = {
            "device": device.name,
            "gpu": device.gpu,
            "commit": _commit(),
            "versions": info.versions(),
            "caches": device.caches,
            "roofline": [asdict(before), asdict(after)],
            "cublaslt_tflops": [roof.tflops if device.gpu else None for roof in (before, after)],
            "rows": rows,
            "cases": [asdict(case) for case in wanted],
        }
        bench_report.write_json(json, found)
    if csv is not None:
        bench_report.write_csv(csv, rows)
    if plot is not None:
        bench_plot.draw(plot, rows, f"{device.name}\n{before}")
    return 0 if old is None else _compare(console, old, rows, tolerance)


def _say(console: Console, words: str) -> None:
    console.print(words, highlight=False, markup=False)


def _compare(console: Console, old: dict[str, Any], rows: list[Row], tolerance: float) -> int:
    found = bench_compare.changes(old["rows"], rows)
    console.print(bench_compare.table(found, tolerance))
    _say(console, bench_compare.summary(found, rows, tolerance))
    for roof, when in zip(old.get("roofline", ()), ("before", "after"), strict=False):
        _say(console, f"The old run's roofline, {when}: {Roofline(**roof)}.")
    return int(any(change.verdict(tolerance) == "slower" for change in found))
