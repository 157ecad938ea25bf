"""How the benchmark times: variants in turn; on a GPU on one stream, with a cold L2."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

COLD_BYTES = 160 << 20  # that a graph's launches read in turn: three times an H200's L2
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Variant:
    """What is timed: all calls in one graph of ``graph``, "cupy" or "torch", or the first alone."""

    calls: list[Callable[[], object]]
    graph: str = ""


def peer(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def gpu_torch() -> Any:
    """torch, if it is installed and finds the GPU."""
    torch = peer("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def spread(name: str, samples: Sequence[float]) -> dict[str, float]:
    """The median as ``name``, and the quartiles as ``name_q1`` and ``name_q3``."""
    values = zip(("", "_q1", "_q3"), np.percentile(samples, (50, 25, 75)), strict=True)
    return {name + which: round(float(value), 2) for which, value in values}


def wall_samples(
    variants: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Microseconds of host time of each call, all in turn, after one call of each."""
    for call in variants.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            begin = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - begin))
    return times


class Timer:
    """Times callables of CuPy and of torch on one stream, alternating between them.

    ``before`` is called on that stream before each sample, once L2 has been flushed.
    """

    def __init__(
        self, before: Callable[[], object] | None = None, *, with_torch: bool = True
    ) -> None:
        import cupy

        self._before = before

        self._cupy = cupy
        self._junk = cupy.empty(_FLUSH_BYTES, np.uint8)
        self._torch: Any = gpu_torch() if with_torch else None
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
        if self._before is not None:
            self._before()
        begin.record(self._stream)
        call()
        end.record(self._stream)
        end.synchronize()
        return 1000 * float(self._cupy.cuda.get_elapsed_time(begin, end))

    def samples(
        self, variants: dict[tuple[int, str], Variant], repeats: int
    ) -> dict[tuple[int, str], list[float]]:
        """Microseconds of a call of each variant, as often as ``repeats`` says."""
        self._cupy.cuda.Device().synchronize()  # inputs come from another stream
        with self._on_stream():
            calls: dict[tuple[int, str], Callable[[], object]] = {}
            kept = []
            for name, variant in variants.items():
                if variant.graph == "torch":
                    calls[name] = self._torch_graph(variant.calls)
                elif variant.graph == "cupy":
                    calls[name], keep = self._graph(variant.calls)
                    kept.append(keep)
                else:
                    calls[name] = variant.calls[0]
                calls[name]()
            self._stream.synchronize()
            times: dict[tuple[int, str], list[float]] = {name: [] for name in calls}
            for _ in range(repeats):
                for name, call in calls.items():
                    each = len(variants[name].calls) if variants[name].graph else 1
                    times[name].append(self._microseconds(call) / each)
            return times

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
