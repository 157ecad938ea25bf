"""The NumPy backend: scoring and the whole operation on the CPU."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mla_fp8.cli.bench_calls import operator
from mla_fp8.cli.bench_rows import Row, row
from mla_fp8.cli.cases import Arrays, Case
from mla_fp8.cli.roofline import Roofline
from mla_fp8.cli.timer import peer, wall_samples

_REPEATS = 7


def device() -> str:
    """The CPU, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"NumPy on {name}, {cores} cores"


def measure(case: Case, roofline: Roofline) -> Row:
    """The row of a case: medians of a few calls."""
    arrays, op = Arrays(case, 1, np), operator(case)
    inputs = arrays.inputs(arrays.tables[0])
    calls: dict[str, Callable[[], object]] = {"ours": partial(op.scores, *inputs)}
    calls["topk"] = partial(op, *inputs)
    torch = peer("torch")
    if torch is not None:

        def torch_topk() -> object:
            scores = torch.from_numpy(op.scores(*inputs))
            return torch.topk(scores, min(case.k, scores.shape[1]), dim=1)

        calls["torch_topk"] = torch_topk
    return row(case, wall_samples(calls, _REPEATS), roofline)
