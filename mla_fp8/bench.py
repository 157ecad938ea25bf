"""``python -m mla_fp8 bench``: scoring beside its peers, in one run on one GPU.

Peers run where they can be imported (torch, and DeepGEMM as ``sgl-deep-gemm``); without them the
table holds our figures alone. Data is random, times are medians, and every call writes all scores
the tokens see as float32. Prefill: single launches timed by events, L2 flushed before each. Decode:
replays of a CUDA graph of many launches, each on pages of its own, so that L2 is cold. How the work
is shared out among blocks is settled beforehand on both sides; ``locate_us`` is what it takes here.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mla_fp8 import info

_FLUSH_BYTES = 256 << 20
_COLD_BYTES = 160 << 20  # keys that a graph's launches read in turn: three times an H200's L2
_LOCATES = 16  # launches in a graph that times them
_PEER_HEADS, _PEER_PAGE = (32, 64), 64


@dataclass(frozen=True)
class Case:
    """A causal batch: sequences of ``keys`` keys each, the last ``new`` of them new."""

    group: str
    num_heads: int
    new: tuple[int, ...]
    keys: tuple[int, ...]
    page_size: int = 64
    depth: int = 128

    @property
    def pairs(self) -> int:
        """(token, key) pairs that are seen."""
        return sum(t * (n - t) + t * (t + 1) // 2 for t, n in zip(self.new, self.keys, strict=True))

    @property
    def flop(self) -> int:
        return 2 * self.num_heads * self.depth * self.pairs

    @property
    def bytes(self) -> int:
        """Keys with their scales read once, scores written once."""
        return (self.depth + 4) * sum(self.keys) + 4 * self.pairs

    @property
    def name(self) -> str:
        batch, new, keys = len(self.new), sorted(set(self.new)), sorted(set(self.keys))
        tokens = f"{new[0]}" if len(new) == 1 else f"{new[0]}..{new[-1]}"
        length = f"{keys[0]}" if len(keys) == 1 else f"{keys[0]}..{keys[-1]}"
        return f"{batch} x {tokens} x {length}"


def _ragged(batch: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Log-uniform lengths in a fixed shuffle."""
    lengths = np.exp(np.linspace(math.log(shortest), math.log(longest), batch)).astype(int)
    return tuple(int(n) for n in np.random.default_rng(0).permutation(lengths))


def cases() -> list[Case]:
    """What is measured: the shapes of ``docs/benchmarks.md``."""
    found = []
    shapes = [(2048, 8192), (4096, 16384), (4096, 65536), (4096, 131072)]
    for heads in (64, 32, 128, 16, 8):
        found += [Case("prefill", heads, (t,), (n,)) for t, n in shapes]
    for new in (1, 2):
        for batch in (1, 4, 16, 64, 256):
            for keys in (8192, 32768, 131072):
                found.append(Case("decode", 64, (new,) * batch, (keys,) * batch))
    for heads in (32, 128):
        for batch, keys in ((1, 131072), (16, 32768), (64, 131072), (256, 32768)):
            found.append(Case("decode", heads, (1,) * batch, (keys,) * batch))
    for new in (1, 64):
        lengths = _ragged(64, 128, 131072)
        mean = round(sum(lengths) / 64)
        found.append(Case("ragged", 64, tuple(min(new, n) for n in lengths), lengths))
        found.append(Case("ragged", 64, (new,) * 64, (mean,) * 64))
    for page in (1, 16, 48, 64, 128, 256):
        found.append(Case("pages", 64, (4096,), (16384,), page))
        found.append(Case("pages", 64, (1,) * 64, (32768,) * 64, page))
    return found


class _Arrays:
    """Inputs of a case on the device; ``copies`` disjoint sets of pages, one table for each."""

    def __init__(self, case: Case, copies: int) -> None:
        import cupy

        rng = cupy.random.default_rng(0)

        def codes(*shape: int) -> Any:  # +-0 ... 448, no NaN
            drawn = rng.integers(0, 254, shape, dtype=cupy.uint8)
            return drawn + (drawn >= 127).astype(cupy.uint8)

        page, batch = case.page_size, len(case.new)
        tokens, used = sum(case.new), [-(-n // page) for n in case.keys]
        columns, pages = max(used), sum(used)
        self.q = codes(tokens, case.num_heads, case.depth)
        self.qs = rng.standard_normal((tokens, case.num_heads), dtype=cupy.float32)
        self.offsets = cupy.asarray(np.concatenate([[0], np.cumsum(case.new)]), dtype=np.uint32)
        cached = np.array(case.keys) - np.array(case.new)
        self.lengths = cupy.asarray(cached, dtype=np.uint32)
        self.keys = cupy.asarray(case.keys, dtype=np.int32)
        self.most = np.array([[max(case.new), cached.max()]], np.uint32)
        # As DeepGEMM stores a block: its keys, then its scales.
        self.blocks = codes(copies * pages, 1, 1, page, 1, case.depth)
        self.scales = rng.random((copies * pages, 1, 1, page, 1, 1), dtype=cupy.float32)
        order = np.random.default_rng(1).permutation(copies * pages).reshape(copies, pages)
        self.tables = []
        for numbers in order:
            table = np.zeros((batch, columns), np.uint32)
            first = 0
            for b, count in enumerate(used):
                table[b, :count] = numbers[first : first + count]
                first += count
            self.tables.append(cupy.asarray(table))


def _ours(
    case: Case, arrays: _Arrays
) -> tuple[list[Callable[[], object]], list[Callable[[], object]]]:
    """A launch of the scoring kernel per table; launches of the one that shares out its work."""
    import cupy

    from mla_fp8 import _launch, _plan, _problem

    device = _launch.device_facts(cupy.cuda.Device().id)
    tokens, keys = sum(case.new), int(arrays.most.sum())
    out = cupy.empty((tokens, keys), np.float32)
    calls: list[Callable[[], object]] = []
    for table in arrays.tables:
        problem = _problem.scoring_problem(
            arrays.q,
            arrays.qs,
            arrays.offsets,
            arrays.blocks,
            arrays.lengths,
            table,
            arrays.most,
            arrays.scales,
            0,
            num_heads=None,
            depth=None,
            groups=None,
            causal=True,
            check=False,
        )
        plan = _plan.plan_scores(problem.shape, device)
        located = _launch._located(problem, plan)
        locate = partial(_launch._locate, problem, plan, device, located)
        locate()  # beforehand, as the peer's schedule
        chosen = (problem, plan, device, located, 0, out, np.float32(-np.inf))
        calls.append(partial(_launch._score, *chosen))
    return calls, [locate] * _LOCATES


def _peer(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def _deep_gemm(case: Case, arrays: _Arrays) -> list[Callable[[], object]] | None:
    """The same scores by DeepGEMM: contiguous keys for one sequence's prefill, else pages."""
    gemm, torch = _peer("deep_gemm"), _peer("torch")
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


class _Timer:
    """Times callables of CuPy and of torch on one stream, alternating between them."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._junk = cupy.empty(_FLUSH_BYTES, np.uint8)
        self._torch = _peer("torch")
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def _on_stream(self) -> Any:
        import contextlib

        stack = contextlib.ExitStack()
        stack.enter_context(self._stream)
        if self._torch is not None:
            external = self._torch.cuda.ExternalStream(self._stream.ptr)
            stack.enter_context(self._torch.cuda.stream(external))
        return stack

    def _graph(self, calls: list[Callable[[], object]]) -> tuple[Callable[[], object], object]:
        for call in calls[:2]:
            call()
        self._stream.synchronize()
        kept = []
        self._stream.begin_capture()
        for call in calls:
            kept.append(call())
        return self._stream.end_capture().launch, kept

    def _microseconds(self, call: Callable[[], object]) -> float:
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        self._junk.fill(0)
        begin.record(self._stream)
        call()
        end.record(self._stream)
        end.synchronize()
        return 1000 * float(self._cupy.cuda.get_elapsed_time(begin, end))

    def medians(
        self, variants: dict[str, list[Callable[[], object]]], repeats: int, graph: bool
    ) -> dict[str, float]:
        """Median microseconds of a call of each variant."""
        self._cupy.cuda.Device().synchronize()  # inputs come from another stream
        with self._on_stream():
            calls: dict[str, Callable[[], object]] = {}
            kept = []
            for name, launches in variants.items():
                if graph and name == "deepgemm":
                    calls[name] = self._torch_graph(launches)
                elif graph:
                    calls[name], keep = self._graph(launches)
                    kept.append(keep)
                else:
                    calls[name] = launches[0]
                calls[name]()
            self._stream.synchronize()
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(repeats):
                for name, call in calls.items():
                    each = len(variants[name]) if graph else 1
                    times[name].append(self._microseconds(call) / each)
            return {name: statistics.median(found) for name, found in times.items()}

    def _torch_graph(self, calls: list[Callable[[], object]]) -> Callable[[], object]:
        torch = self._torch
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        replay: Callable[[], object] = graph.replay
        return replay


def _cublas(timer: _Timer) -> float | None:
    """TFLOP/s of cuBLASLt's FP8 product of two 8192 x 8192 matrices: the ceiling."""
    torch = _peer("torch")
    if torch is None:
        return None
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def call() -> Any:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    times = timer.medians({"cublaslt": [call]}, 20, graph=False)
    return 2e-6 * float(n) ** 3 / times["cublaslt"]


def measure(case: Case, timer: _Timer) -> dict[str, Any]:
    """Median microseconds of one case, ours and the peer's."""
    import cupy

    graph = max(case.new) <= 2
    one = case.depth * sum(case.keys)
    copies = min(max(1, -(-_COLD_BYTES // one)), 64) if graph else 1
    arrays = _Arrays(case, copies)
    ours, locate = _ours(case, arrays)
    variants = {"ours": ours} | ({"locate": locate} if graph else {})
    peer = _deep_gemm(case, arrays)
    if peer is not None:
        variants["deepgemm"] = peer
    times = timer.medians(variants, 11, graph)
    del arrays, ours, locate, variants, peer
    cupy.get_default_memory_pool().free_all_blocks()
    torch = _peer("torch")
    if torch is not None:
        torch.cuda.empty_cache()
    microseconds = times["ours"]
    found = {
        "group": case.group,
        "num_heads": case.num_heads,
        "page_size": case.page_size,
        "shape": case.name,
        "us": round(microseconds, 2),
        "tflops": round(1e-6 * case.flop / microseconds, 1),
        "tb_per_s": round(1e-6 * case.bytes / microseconds, 3),
    }
    if "locate" in times:
        found["locate_us"] = round(times["locate"], 2)
    if "deepgemm" in times:
        found["deepgemm_us"] = round(times["deepgemm"], 2)
        found["speedup"] = round(times["deepgemm"] / microseconds, 3)
    return found


def run(only: str | None = None, out: Path | None = None) -> int:
    """Measure and print the table; ``only`` names groups, ``out`` takes the figures as JSON."""
    console = Console(width=120)
    devices = info.gpus()
    if not devices:
        console.print("bench: no usable NVIDIA GPU (or no CuPy) here, so nothing was measured")
        return 2
    timer = _Timer()
    wanted = [c for c in cases() if only is None or c.group in only.split(",")]
    ceiling = _cublas(timer)
    rows = [measure(case, timer) for case in track(wanted, console=console, transient=True)]
    after = _cublas(timer)
    shown = "group", "num_heads", "page_size", "shape", "us", "tflops", "tb_per_s"
    columns = (*shown, "locate_us", "deepgemm_us", "speedup")
    table = Table(*columns, title=f"{devices[0]['name']}, sequences x new tokens x keys")
    for row in rows:
        table.add_row(*(str(row.get(name, "-")) for name in columns))
    console.print(table)
    if ceiling is not None and after is not None:
        console.print(f"cuBLASLt FP8 8192^3: {ceiling:.0f} TFLOP/s before, {after:.0f} after")
    if out is not None:
        found = {
            "gpu": devices[0],
            "versions": info.versions(),
            "cublaslt_tflops": [ceiling, after],
            "rows": rows,
            "cases": [asdict(case) for case in wanted],
        }
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0
