"""A pipeline with fixed arrays, captured in a CUDA graph once and replayed by each call."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import cupy

from mla_fp8._check.streams import is_capturing, new_stream
from mla_fp8._cuda.pipeline import TopkPipeline


@lru_cache(maxsize=64)
def _capture_stream(ordinal: int, thread: int) -> Any:
    """A stream that only captures. Its graphs can be launched on any stream."""
    return new_stream()


def _captured(pipeline: TopkPipeline, ordinal: int) -> Any:
    """The CUDA graph of a pipeline's launches.

    A graph keeps the parameters that each kernel was captured with. In thread-local mode other
    threads may do meanwhile what a capture forbids, such as taking memory.
    """
    stream = _capture_stream(ordinal, threading.get_ident())
    with stream:
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            pipeline.run()
        finally:
            graph = stream.end_capture()
    return graph


class BoundPipeline:
    """A pipeline that nobody else uses, bound to its arrays; ``memory`` is what they live in.

    Create it with the GPU ``ordinal`` current.
    """

    def __init__(self, pipeline: TopkPipeline, ordinal: int, memory: tuple[Any, ...]) -> None:
        self._pipeline, self._ordinal, self._memory = pipeline, ordinal, memory
        self._graph = _captured(pipeline, ordinal)

    def __call__(self) -> None:
        """Launch everything on CuPy's current stream of the GPU."""
        with cupy.cuda.Device(self._ordinal):
            stream = cupy.cuda.get_current_stream()
            if is_capturing(stream):  # a graph cannot be launched into a capture
                self._pipeline.run()
            else:
                self._graph.launch(stream)
