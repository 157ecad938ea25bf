"""Scoring and the whole operation on a GPU, ours and the peers' in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from mla_fp8.cli.bench_calls import deep_gemm, scoring, torch_topk, whole
from mla_fp8.cli.bench_presets import DECODE_TOKENS
from mla_fp8.cli.bench_rows import Row, row
from mla_fp8.cli.cases import Arrays, Case
from mla_fp8.cli.roofline import Roofline
from mla_fp8.cli.timer import COLD_BYTES, Timer, Variant, gpu_torch


def _host_samples(call: Callable[[], object]) -> list[float]:
    """Microseconds until a call returns, the GPU being idle when it comes."""
    import cupy

    times = []
    for _ in range(100):
        cupy.cuda.Device().synchronize()
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return times


def measure(cases: list[Case], timer: Timer, roofline: Roofline) -> list[Row]:
    """Rows of cases of one shape, all timed in turn."""
    import cupy

    graph = max(cases[0].new) <= DECODE_TOKENS
    variants: dict[tuple[int, str], Variant] = {}
    host: dict[tuple[int, str], list[float]] = {}
    for i, case in enumerate(cases):
        copies = -(-COLD_BYTES // (case.depth * sum(case.rows)))
        copies = min(max(1, copies), 64) if graph else 1
        arrays = Arrays(case, copies)
        ours = scoring(case, arrays)
        variants[i, "ours"] = Variant(ours, "cupy" if graph else "")
        if "topk" in case.group:
            calls = whole(case, arrays)
            variants[i, "topk"], variants[i, "eager"] = Variant(calls, "cupy"), Variant(calls)
            host[i, "host"] = _host_samples(calls[0])
            host[i, "bound"] = _host_samples(whole(case, arrays, bound=True)[0])
            del calls
            if (peers := torch_topk(case, arrays)) is not None:
                variants[i, "torch_topk"] = Variant(peers, "torch")
            del peers
            if case.data == "random":
                real = Arrays(replace(case, data="real-like"), copies)
                variants[i, "real"] = Variant(whole(case, real), "cupy")
                del real
        if (theirs := deep_gemm(case, arrays)) is not None:
            variants[i, "deepgemm"] = Variant(theirs, "torch" if graph else "")
        del arrays, ours, theirs
    times = timer.samples(variants, 11)
    del variants
    cupy.get_default_memory_pool().free_all_blocks()
    torch = gpu_torch()
    if torch is not None:
        torch.cuda.empty_cache()
    times |= host
    return [
        row(case, {name: found for (n, name), found in times.items() if n == i}, roofline)
        for i, case in enumerate(cases)
    ]
