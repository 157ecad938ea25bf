"""Selection alone, on all patterns of scores in turn: the group ``select`` of the benchmark.

Float32 rows in memory, k = 2048, replays of a CUDA graph of up to 64 launches, each on rows of its
own, so that L2 is cold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from mla_fp8._plan.workspace import Part
from mla_fp8.cli import patterns
from mla_fp8.cli.cases import Case
from mla_fp8.cli.timer import COLD_BYTES, Timer, Variant

_TOP_K = 2048
_DISTINCT = 64  # rows that NumPy makes; the others are copies of them


def lengths(case: Case) -> np.ndarray:
    """Columns of each row: ``new`` rows of each of the ``keys``."""
    return np.repeat(np.array(case.keys, np.int32), case.new)


def _selections(case: Case) -> list[Callable[[], object]]:
    """A launch of the selection per set of rows."""
    import cupy

    from mla_fp8._cuda import backend
    from mla_fp8._plan import selection as _plan_select

    of_rows = lengths(case)
    count, columns = len(of_rows), int(of_rows.max())
    copies = min(64, -(-COLD_BYTES // (4 * int(of_rows.sum()))))
    made = patterns.rows(case.data, min(_DISTINCT, copies * count), columns)
    scores = cupy.asarray(made)[cupy.arange(copies * count) % len(made)]
    on_device = cupy.asarray(of_rows)
    out = cupy.empty((count, _TOP_K), np.int32)
    device = backend.device_facts(cupy.cuda.Device().id)
    kernel = _plan_select.select_kernel(count, columns, _TOP_K, device, values=False, holes=False)
    selecting = backend._Selecting(kernel, device, columns)

    def call(rows: Any) -> Any:
        addresses = rows.data.ptr, on_device.data.ptr, out.data.ptr, 0
        stream = cupy.cuda.get_current_stream().ptr
        selecting(addresses, Part(0, count, 0, columns), 0, 0, None, stream)
        return scores  # which the graph reads

    return [partial(call, rows) for rows in scores.reshape(copies, count, columns)]


def measure(cases: list[Case], timer: Timer) -> list[dict[str, Any]]:
    """Median microseconds of selections from rows of one shape, all patterns in turn."""
    import cupy

    variants = {(i, "select"): Variant(_selections(case), "cupy") for i, case in enumerate(cases)}
    times = timer.medians(variants, 11)
    variants.clear()
    cupy.get_default_memory_pool().free_all_blocks()
    return figures(cases, [times[i, "select"] for i in range(len(cases))])


def figures(cases: list[Case], times: list[float]) -> list[dict[str, Any]]:
    """Rows of the result; the first case's data is what the others are compared with."""
    return [
        {
            "group": case.group,
            "data": case.data,
            "shape": case.name,
            "us": round(time, 2),
            "over_random": round(time / times[0], 3),
        }
        for case, time in zip(cases, times, strict=True)
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
