"""Selection alone, on all patterns of scores in turn: the group ``select`` of the benchmark.

Rows of float32 scores in memory, k = 2048. A CUDA graph of up to 64 launches is replayed; each
launch reads other rows, so L2 is cold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from mla_fp8.cli import patterns
from mla_fp8.cli.cases import Case
from mla_fp8.cli.timer import COLD_BYTES, Timer, Variant, spread
from mla_fp8.topk import select_topk

_TOP_K = 2048
_DISTINCT = 64  # rows that NumPy makes; the others are copies of them


def lengths(case: Case) -> np.ndarray:
    """Columns of each row: ``new`` rows of each of the ``keys``."""
    return np.repeat(np.array(case.keys, np.int32), case.new)


def _selections(case: Case) -> list[Callable[[], object]]:
    """A call of `select_topk` for each set of rows."""
    import cupy

    of_rows = lengths(case)
    count, columns = len(of_rows), int(of_rows.max())
    copies = min(64, -(-COLD_BYTES // (4 * int(of_rows.sum()))))
    made = patterns.rows(case.data, min(_DISTINCT, copies * count), columns)
    scores = cupy.asarray(made)[cupy.arange(copies * count) % len(made)]
    on_device, out = cupy.asarray(of_rows), cupy.empty((count, _TOP_K), np.int32)
    return [
        partial(select_topk, rows, on_device, _TOP_K, out=out)
        for rows in scores.reshape(copies, count, columns)
    ]


def measure(cases: list[Case], timer: Timer) -> list[dict[str, Any]]:
    """Median microseconds of selections from rows of one shape, all patterns in turn."""
    import cupy

    variants = {(i, "select"): Variant(_selections(case), "cupy") for i, case in enumerate(cases)}
    times = timer.samples(variants, 11)
    variants.clear()
    cupy.get_default_memory_pool().free_all_blocks()
    return figures(cases, [times[i, "select"] for i in range(len(cases))])


def figures(cases: list[Case], times: list[list[float]]) -> list[dict[str, Any]]:
    """Rows of the result; the first case's data is what the others are compared with."""
    return [
        {
            "group": case.group,
            "data": case.data,
            "shape": case.name,
            **spread("us", samples),
            "over_random": round(float(np.median(samples) / np.median(times[0])), 3),
        }
        for case, samples in zip(cases, times, strict=True)
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """Patterns by shapes: microseconds, and how many times those of random data."""
    rows = [row for row in rows if row["group"] == "select"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    found = {(row["data"], row["shape"]): row for row in rows}
    result = Table("scores", *shapes, title="Selection alone, us and ratio to normal")
    for name in dict.fromkeys(row["data"] for row in rows):
        cells = (found[name, shape] for shape in shapes)
        result.add_row(name, *(f"{cell['us']} ({cell['over_random']:.2f})" for cell in cells))
    return result
