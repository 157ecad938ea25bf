"""``python -m mla_fp8 bench``: scoring and the whole operation beside peers, in one run.

Peers run if they can be imported (torch, and DeepGEMM as ``sgl-deep-gemm``). Times are medians in
microseconds:

``us``, ``deepgemm_us``
    Scoring alone: float32 scores of every key that a token sees. Work is scheduled beforehand, as
    for DeepGEMM; our decode kernel schedules its work itself.
``topk_us``
    The whole operation, k = 2048, replayed from a CUDA graph.
``real_us``
    The same on data as models give it (`patterns`), measured in turn with random data;
    ``real_ratio`` is its time over that of random data.
``eager_us``, ``host_us``
    The whole operation called on an idle GPU: until the GPU is done, until the call returns.
``bound_us``
    The same as ``host_us``, of a bound call (`BoundCall`).

L2 is cold. Prefill launches are timed one by one, after L2 has been flushed. Decode replays a CUDA
graph of many launches, each on other pages. The group ``select`` is selection alone, on all
patterns of scores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table

from mla_fp8.cli import bench_doors, bench_select, info
from mla_fp8.cli.cases import Arrays, Case, cases
from mla_fp8.cli.command import CommandError, Console, check_output
from mla_fp8.cli.timer import COLD_BYTES, Timer, Variant, peer

_PEER_HEADS, _PEER_PAGE = (32, 64), 64
_TOP_K = 2048
_DECODE_TOKENS = 8  # most new tokens of a sequence in decode


def _scoring(case: Case, arrays: Arrays) -> list[Callable[[], object]]:
    """A launch of the scoring kernel for each page table, on work scheduled beforehand."""
    import cupy

    from mla_fp8._check.problem import Inputs, check_problem
    from mla_fp8._check.shape import Parameters
    from mla_fp8._cuda import backend
    from mla_fp8._plan.scoring import plan_scores
    from mla_fp8._plan.tuning import H200

    parameters = Parameters(case.num_heads, case.depth, 1, True, 1)
    device = backend.device_facts(cupy.cuda.Device().id)
    tokens, keys = sum(case.new), int(arrays.most.sum())
    out = cupy.empty((tokens, keys), np.float32)
    calls: list[Callable[[], object]] = []
    for table in arrays.tables:
        pages = arrays.blocks, arrays.lengths, table, arrays.most, arrays.scales
        inputs = Inputs(arrays.q, arrays.qs, arrays.offsets, *pages, 0)
        problem = check_problem(inputs, parameters, False)
        pipeline = backend.ScoresPipeline(
            problem.shape, plan_scores(problem.shape, device, H200), device
        )
        memory = cupy.empty(pipeline.workspace.size, np.uint8)
        pipeline.bind(problem, out, memory.data.ptr)
        pipeline.schedule(cupy.cuda.get_current_stream().ptr)

        def call(pipeline: Any = pipeline, kept: Any = (out, problem, memory)) -> None:
            pipeline.score(cupy.cuda.get_current_stream().ptr)  # parameters hold addresses alone

        calls.append(call)
    return calls


def _whole(case: Case, arrays: Arrays, *, bound: bool = False) -> list[Callable[[], object]]:
    """The whole operation, a call per table; ``bound``: one bound call, on the first table."""
    import cupy

    from mla_fp8 import MLAIndexerRaggedFloat8Paged

    op = MLAIndexerRaggedFloat8Paged(case.num_heads, case.depth, _TOP_K)
    calls: list[Callable[[], object]] = []
    out, memory = cupy.empty((sum(case.new), _TOP_K), np.int32), None
    for table in arrays.tables:
        pages = arrays.blocks, arrays.lengths, table, arrays.most, arrays.scales
        inputs = arrays.q, arrays.qs, arrays.offsets, *pages, 0
        memory = op.workspace(*inputs) if memory is None else memory
        if bound:
            return [op.bind(*inputs, out=out, check=False, workspace=memory)]
        calls.append(partial(op, *inputs, out=out, check=False, workspace=memory))
    return calls


def _host_us(call: Callable[[], object]) -> float:
    """Median microseconds until a call returns, the GPU being idle when it comes."""
    import cupy

    times = []
    for _ in range(100):
        cupy.cuda.Device().synchronize()
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def _deep_gemm(case: Case, arrays: Arrays) -> list[Callable[[], object]] | None:
    """The same scores by DeepGEMM: contiguous keys for one sequence's prefill, else pages."""
    gemm, torch = peer("deep_gemm"), peer("torch")
    if gemm is None or case.num_heads not in _PEER_HEADS or case.depth != 128:
        return None
    e4m3 = torch.float8_e4m3fn
    q, qs = torch.as_tensor(arrays.q).view(e4m3), torch.as_tensor(arrays.qs)
    tokens, batch = sum(case.new), len(case.new)
    longest = max(case.keys)
    if batch == 1 and case.new[0] > 2:
        keys = torch.as_tensor(arrays.blocks).reshape(-1, case.depth)[: case.keys[0]].view(e4m3)
        scales = torch.as_tensor(arrays.scales).reshape(-1)[: case.keys[0]]
        first = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        last = torch.arange(tokens, dtype=torch.int32, device="cuda")
        last += case.keys[0] - tokens + 1
        return [lambda: gemm.fp8_mqa_logits(q, (keys, scales), qs, first, last)]
    if case.page_size != _PEER_PAGE or len(set(case.new)) > 1 or case.new[0] > 2:
        return None
    q = q.reshape(batch, case.new[0], case.num_heads, case.depth)
    fused = torch.as_tensor(arrays.blocks).reshape(-1, _PEER_PAGE * case.depth)
    scales = torch.as_tensor(arrays.scales).reshape(-1, _PEER_PAGE).view(torch.uint8)
    cache = torch.cat([fused, scales], 1).reshape(-1, _PEER_PAGE, 1, case.depth + 4)
    lengths = torch.as_tensor(arrays.keys)
    steps = torch.arange(case.new[0], device="cuda", dtype=torch.int32) - case.new[0] + 1
    lengths = (lengths[:, None] + steps).contiguous()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    plan = gemm.get_paged_mqa_logits_metadata(lengths, _PEER_PAGE, processors)
    calls: list[Callable[[], object]] = []
    for table in arrays.tables:
        pages = torch.as_tensor(table.view(np.int32))

        def call(pages: Any = pages) -> Any:
            return gemm.fp8_paged_mqa_logits(q, cache, qs, lengths, pages, plan, longest)

        calls.append(call)
    return calls


def _cublas(timer: Timer) -> float | None:
    """TFLOP/s of cuBLASLt's FP8 product of two 8192 x 8192 matrices: the ceiling."""
    torch = peer("torch")
    if torch is None:
        return None
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def call() -> Any:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    (median,) = timer.medians({(0, "cublaslt"): Variant([call])}, 20).values()
    return 2e-6 * float(n) ** 3 / median


def measure(cases: list[Case], timer: Timer) -> list[dict[str, Any]]:
    """Median microseconds of cases of one shape, ours and the peer's, all in turn."""
    import cupy

    graph = max(cases[0].new) <= _DECODE_TOKENS
    variants: dict[tuple[int, str], Variant] = {}
    host: dict[tuple[int, str], float] = {}
    for i, case in enumerate(cases):
        copies = -(-COLD_BYTES // (case.depth * sum(case.keys)))
        copies = min(max(1, copies), 64) if graph else 1
        arrays = Arrays(case, copies)
        ours = _scoring(case, arrays)
        variants[i, "ours"] = Variant(ours, "cupy" if graph else "")
        if "topk" in case.group:
            whole = _whole(case, arrays)
            variants[i, "topk"], variants[i, "eager"] = Variant(whole, "cupy"), Variant(whole)
            host[i, "host"] = _host_us(whole[0])
            host[i, "bound"] = _host_us(_whole(case, arrays, bound=True)[0])
            del whole
            if case.data == "random":
                real = Arrays(replace(case, data="real-like"), copies)
                variants[i, "real"] = Variant(_whole(case, real), "cupy")
                del real
        if (theirs := _deep_gemm(case, arrays)) is not None:
            variants[i, "deepgemm"] = Variant(theirs, "torch" if graph else "")
        del arrays, ours, theirs
    times = timer.medians(variants, 11)
    del variants
    cupy.get_default_memory_pool().free_all_blocks()
    torch = peer("torch")
    if torch is not None:
        torch.cuda.empty_cache()
    times |= host
    return [
        _row(case, {name: found for (number, name), found in times.items() if number == i})
        for i, case in enumerate(cases)
    ]


def _row(case: Case, times: dict[str, float]) -> dict[str, Any]:
    found = {
        "group": case.group,
        "heads": case.num_heads,
        "page": case.page_size,
        "data": case.data,
        "shape": case.name,
        "us": round(times["ours"], 2),
        "tflops": round(1e-6 * case.flop / times["ours"], 1),
        "tb_per_s": round(1e-6 * case.bytes / times["ours"], 3),
    }
    for name in ("deepgemm", "topk", "real", "eager", "host", "bound"):
        if name in times:
            found[f"{name}_us"] = round(times[name], 2)
    if "real" in times:
        found["real_ratio"] = round(times["real"] / times["topk"], 3)
    if "deepgemm" in times:
        found["speedup"] = round(times["deepgemm"] / times["ours"], 3)
    return found


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    """The table of all groups but ``select`` and ``doors``, which have other columns."""
    rows = [row for row in rows if row["group"] not in ("select", "doors")]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(str(row.get(name, "-")) for name in columns))
    return table


def _commit() -> str | None:
    """The commit of the checkout, if this is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def all_cases() -> list[Case]:
    """The cases of all groups."""
    return cases() + bench_doors.cases()


def run(only: str | None = None, out: Path | None = None) -> int:
    """Measure and print the table; ``only`` names groups, ``out`` takes the figures as JSON."""
    groups = list(dict.fromkeys(case.group for case in all_cases()))
    chosen = groups if only is None else only.split(",")
    if wrong := set(chosen) - set(groups):
        raise CommandError(f"--only must be some of {','.join(groups)}; got {sorted(wrong)}")
    if out is not None:
        check_output("--out", out)
    devices = info.gpus()
    if not devices:
        raise CommandError("no usable NVIDIA GPU (or no CuPy) here, so nothing was measured")
    from mla_fp8._cuda import backend

    try:
        backend.device_facts(0)
    except RuntimeError as error:  # too old
        raise CommandError(str(error)) from None
    console = Console(width=120)
    timer = Timer()
    wanted = [case for case in all_cases() if case.group in chosen]
    ceiling = _cublas(timer)
    together: dict[object, list[Case]] = {}
    for case in wanted:
        data = "" if case.group == "select" else case.data  # all patterns of a shape together
        key = case.group, case.new, case.keys, case.page_size, data
        together.setdefault(key, []).append(case)
    rows = []
    for cases_of_shape in track(list(together.values()), console=console, transient=True):
        group = cases_of_shape[0].group
        if group == "doors":
            rows += bench_doors.measure(cases_of_shape[0], timer, _scoring)
        else:
            rows += (bench_select.measure if group == "select" else measure)(cases_of_shape, timer)
    after = _cublas(timer)
    title = f"{devices[0]['name']}, sequences x new tokens x keys"
    for table in _table(rows, title), bench_select.table(rows), bench_doors.table(rows):
        if table.row_count:
            console.print(table)
    if ceiling is not None and after is not None:
        console.print(f"cuBLASLt FP8 8192^3: {ceiling:.0f} TFLOP/s before, {after:.0f} after")
    if out is not None:
        found = {
            "gpu": devices[0],
            "commit": _commit(),
            "versions": info.versions(),
            "cublaslt_tflops": [ceiling, after],
            "rows": rows,
            "cases": [asdict(case) for case in wanted],
        }
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0
