"""``python -m mla_fp8 fuzz``: random calls, compared with an oracle of the contract."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mla_fp8.cli import fuzz_index, fuzz_lists, info
from mla_fp8.cli.command import CommandError, Console, check_int, check_output
from mla_fp8.cli.fuzz_calls import array_module
from mla_fp8.cli.fuzz_recipe import Recipe, described, failure, shrink
from mla_fp8.cli.oracle import MOST_POSITIONS

BACKENDS = ("numpy", "cuda")
DEFAULT_MINUTES = 1.0
_ONE_OPERATOR = 200  # successive cases of CUDA that share an operator's some 30 kernels
# Cases that a process takes at once. On CUDA, those of an operator: so one process compiles its
# kernels, and not several at the same time.
_BLOCK = {"numpy": 50, "cuda": _ONE_OPERATOR}
_LISTS = 0.15  # of the cases are of select_topk, merge_topk and write_keys
_THREADS = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"
_stop: Any = Event()  # set once a case has failed; all processes of a campaign share one


@dataclass
class Counts:
    """What the cases so far were, and what is wrong with those that failed, by number."""

    cases: int = 0
    routes: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Add the counts of other cases."""
        self.cases += other.cases
        self.routes += other.routes
        self.features += other.features
        self.failed |= other.failed


def _operator(rng: random.Random, cuda: bool) -> dict[str, int]:
    """Numbers for which CUDA compiles kernels."""

    def some(*values: int) -> int:
        return rng.choice(values)

    depth = some(64, 128, 128, 128, 32, 256) if cuda else some(32, 64, 64, 128, 128, 256)
    heads = some(1, 2, 3, 4, 5, 8, 8, 12, 16, 32, 64, 128)
    plain = rng.random() < 0.6  # as the kernels of Hopper want it
    divisors = [n for n in (1, 2, 3, 4, 8) if heads % n == 0]
    groups = [1, *(depth // n for n in (32, 64, 128) if n < depth)]
    return {
        "num_heads": heads,
        "depth": depth,
        "kv_heads": 1 if plain else some(*divisors),
        "groups": 1 if plain else some(*groups),
        "k": some(1, 2, 3, 7, 16, 16, 64, 64, 100, 300, 2048, some(4096, 5000, 5000, 65536)),
        "kpool": some(1, 1, 1, 1, 2, 3, some(4, 64)),
        "page_size": some(1, 2, 3, 7, 8, 16, 16, 24, 64, 64, 100, 256),
        "key_step": some(1, 1, 1, 1, 1, 2, 3, some(8, 256)),
    }


def case(seed: int, number: int, backend: str) -> Recipe:
    """Case ``number`` of a seed, which depends on nothing else."""
    cuda = backend == "cuda"
    group = number // _ONE_OPERATOR if cuda else number
    operator = _operator(random.Random(f"operator {seed}/{group}"), cuda)
    rng = random.Random(f"case {seed}/{number}")
    draw = fuzz_lists.draw if rng.random() < _LISTS else fuzz_index.draw
    return draw(rng, operator, cuda)


def run_block(seed: int, first: int, end: int, backend: str, deadline: float) -> Counts:
    """Run cases until the first that fails, the end, or the deadline in seconds of `time.time`."""
    array_module(backend)  # imported here, because warnings are faults in a case alone
    counts = Counts()
    for number in range(first, end):
        if time.time() > deadline or _stop.is_set():
            break
        recipe = case(seed, number, backend)
        routes: list[str] = []
        counts.cases += 1
        counts.features.update(recipe.features())
        error = failure(recipe, backend, routes)
        counts.routes.update(routes)
        if error is not None:
            counts.failed[number] = f"{type(recipe).__name__}: {described(error)}"
            break
    return counts


def _begin_worker(stop: Any) -> None:
    """Leave Ctrl-C to the main process, and end when that process does, however it ends."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=follow, daemon=True).start()


def _blocks(cases: int | None, size: int) -> Iterator[tuple[int, int]]:
    first = 0
    while cases is None or first < cases:
        end = first + size if cases is None else min(first + size, cases)
        yield first, end
        first = end


def _results(
    pool: Executor | None, jobs: int, seed: int, cases: int | None, backend: str, deadline: float
) -> Iterator[Counts]:
    """The counts of all blocks as they end."""
    blocks = _blocks(cases, _BLOCK[backend])
    if pool is None:
        for first, end in blocks:
            if time.time() > deadline:
                return
            yield run_block(seed, first, end, backend, deadline)
        return
    running: set[Future[Counts]] = set()
    while True:
        while len(running) < 2 * jobs and time.time() < deadline:
            block = next(blocks, None)
            if block is None:
                break
            running.add(pool.submit(run_block, seed, *block, backend, deadline))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def campaign(
    seed: int, minutes: float | None, cases: int | None, backend: str, jobs: int, console: Any
) -> Counts:
    """Run cases until one fails, all are done, or the time is over."""
    total, begin = Counts(), time.time()
    deadline = begin + 60 * minutes if minutes is not None else float("inf")
    pool = None
    if jobs > 1:
        for name in _THREADS:  # the processes share the cores
            os.environ.setdefault(name, "1")
        context = multiprocessing.get_context("spawn")  # a forked process can't use CUDA
        stop = context.Event()
        pool = ProcessPoolExecutor(jobs, context, _begin_worker, (stop,))
    columns = TextColumn("{task.completed:.0f} cases"), BarColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=cases)
            for counts in _results(pool, jobs, seed, cases, backend, deadline):
                total.add(counts)
                progress.update(task, completed=total.cases)
                if total.failed:
                    _say_failed(total, seed, console)
                    break
    except BrokenProcessPool:
        raise CommandError(
            f"a process died after {total.cases} cases of seed {seed}; --jobs 1 shows what it said"
        ) from None
    finally:
        if pool is not None:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return total


def _say_failed(counts: Counts, seed: int, console: Any) -> None:
    for number, error in counts.failed.items():
        console.print(
            f"Case {number} of seed {seed} failed: {error}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


def _print(counts: Counts, console: Any) -> None:
    for title, found in (("Routes", counts.routes), ("Features", counts.features)):
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column(title[:-1].lower())
        table.add_column("cases", justify="right")
        for name, count in sorted(found.items()):
            table.add_row(name, str(count))
        console.print(table)


def run(
    minutes: float | None,
    cases: int | None,
    seed: int,
    backend: str,
    jobs: int,
    json_file: Path | None,
) -> int:
    """Run random cases; shrink and print the first that fails.

    Returns
    -------
    int
        0 if all cases passed, 1 if one failed.

    Raises
    ------
    CommandError
        If a flag is wrong, or if there is no GPU for the CUDA backend.
    """
    if backend not in BACKENDS:
        raise CommandError(f"--backend must be one of {', '.join(BACKENDS)}; got {backend}")
    if minutes is not None and not minutes > 0:
        raise CommandError(f"--minutes must be above 0; got {minutes}")
    if cases is not None:
        check_int("--cases", cases, range(1, MOST_POSITIONS))
    check_int("--jobs", jobs, range(1, 257))
    if backend == "cuda" and not info.gpus():
        raise CommandError("no usable NVIDIA GPU (or no CuPy) for --backend cuda")
    if json_file is not None:
        check_output("--json", json_file)
    if minutes is None and cases is None:
        minutes = DEFAULT_MINUTES
    console, begin = Console(), time.time()
    counts = campaign(seed, minutes, cases, backend, jobs, console)
    seconds = time.time() - begin
    _print(counts, console)
    console.print(
        f"{counts.cases} cases of seed {seed} on {backend} in {seconds:.0f} s: "
        f"{len(counts.failed)} failed",
        soft_wrap=True,
    )
    if json_file is not None:
        report = {
            "seed": seed,
            "backend": backend,
            "cases": counts.cases,
            "failed": [
                {"seed": seed, "case": number, "error": error}
                for number, error in counts.failed.items()
            ],
            "seconds": round(seconds, 1),
            "routes": dict(sorted(counts.routes.items())),
            "features": dict(sorted(counts.features.items())),
            "versions": info.versions(),
            "gpus": info.gpus() if backend == "cuda" else [],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not counts.failed:
        return 0
    number = min(counts.failed)
    recipe = case(seed, number, backend)
    print(
        f"\nCase {number} failed. This code runs it again:\n\n{recipe.snippet(backend)}", flush=True
    )
    error = failure(recipe, backend)
    if error is None:
        print("# It passes alone: it fails after the cases before it.")
    elif not type(error).__module__.startswith("cupy"):  # after a fault, the GPU is of no more use
        recipe, error = shrink(recipe, backend, error)
        print(f"# A smaller case that fails:\n\n{recipe.snippet(backend)}\n# {described(error)}")
    return 1
