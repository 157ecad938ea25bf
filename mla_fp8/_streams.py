"""On whose stream a call runs, and in whose library its results come back.

An array is used on its library's current stream. A call runs on that of its first array, which
CuPy's current stream is meanwhile; the streams of the others wait for one another by events.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from mla_fp8._check.arrays import DLPACK_CUDA, FP8, Array, borrowed, is_cupy, reinterpret, torch_of

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Arguments that need no look; CuPy's arrays and our own classes join them. A call with no others
# costs a microsecond.
_OURS: set[type] = {np.ndarray, int, bool, str, tuple, type(None), np.uint32, np.int32, np.int64}
_are_ours = _OURS.issuperset
_DEFAULT, _LEGACY = 0, 1  # two handles of CUDA's legacy default stream


class _Handle(NamedTuple):
    """A stream of another library's, by the CUDA stream protocol."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class _Use(NamedTuple):
    """Where an array is used: GPU, and stream if its library has a current one."""

    ordinal: int
    stream: int | None


def is_capturing(stream: Any) -> bool:
    """Whether what is launched on a CuPy stream becomes part of a CUDA graph."""
    # The legacy stream can't be captured, and asking it is an error while others are.
    return stream.ptr not in (_DEFAULT, _LEGACY) and bool(stream.is_capturing())


def new_stream() -> Any:
    """A CuPy stream of our own. It can be had while torch captures, which forbids most else."""
    import cupy
    from cuda.bindings import driver

    exchange, modes = driver.cuThreadExchangeStreamCaptureMode, driver.CUstreamCaptureMode
    _, before = exchange(modes.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        return cupy.cuda.Stream(non_blocking=True)
    finally:
        exchange(before)


def _use_of(obj: Any) -> _Use | None:
    """Where an array on a GPU is used, else None."""
    if is_cupy(obj):
        ordinal = obj.device.id
        return _Use(ordinal, sys.modules["cupy"].cuda.get_current_stream(ordinal).ptr)
    if type(obj) in _OURS:
        return None
    torch = torch_of(obj)
    if torch is not None:
        if not obj.is_cuda:
            return None
        ordinal = obj.get_device()
        return _Use(ordinal, torch.cuda.current_stream(ordinal).cuda_stream)
    with suppress(Exception):  # what can't be told is an error with a name once the array is read
        if hasattr(obj, "__dlpack_device__"):  # it orders itself: __dlpack__(stream=...)
            kind, ordinal = obj.__dlpack_device__()
            return _Use(int(ordinal), None) if kind in DLPACK_CUDA else None
        interface = getattr(obj, "__cuda_array_interface__", None)
        if interface is None:
            return None
        from cupy.cuda import runtime

        ordinal, stream = runtime.pointerGetAttributes(interface["data"][0]).device, None
        if interface.get("stream") is not None:
            stream = _DEFAULT if interface["stream"] == _LEGACY else int(interface["stream"])
        return _Use(ordinal, stream) if ordinal >= 0 else None  # -2: of no array's memory
    return None


class _TorchMemory:
    """Device memory from torch's allocator, as an allocator of CuPy's.

    So results are tensors like any other (``record_stream`` works, graphs keep theirs), and scratch
    need not be what torch has left of the GPU. torch gives memory to others in the order of the
    stream that was its current one, on which the call runs.
    """

    def __init__(self, torch: Any, ordinal: int) -> None:
        self._torch, self._ordinal = torch, ordinal
        self._tensors: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __call__(self, size: int) -> Any:
        from cupy.cuda import MemoryPointer, UnownedMemory

        tensor = self._torch.empty(
            max(size, 1), dtype=self._torch.uint8, device=f"cuda:{self._ordinal}"
        )
        address = tensor.data_ptr()
        self._tensors[address] = tensor
        return MemoryPointer(UnownedMemory(address, size, tensor, self._ordinal), 0)

    def tensor(self, array: Array) -> Any:
        """The tensor of a whole CuPy array that was allocated here."""
        taken = self._tensors[array.data.ptr][: array.nbytes]
        return taken.view(getattr(self._torch, array.dtype.name)).view(array.shape)


_kept: list[tuple[Any, list[Array]]] = []
_kept_lock = threading.Lock()


def _keep_until(event: Any, arrays: list[Array]) -> None:
    """Keep arrays alive until an event: their library has no stream that could wait for it."""
    with _kept_lock:
        _kept[:] = [pair for pair in _kept if not pair[0].done]
        _kept.append((event, arrays))


@contextmanager
def stream_order(first: Any, others: Iterable[Any]) -> Iterator[_TorchMemory | None]:
    """Work on the current stream of ``first``, after what ``others``' streams have to do so far.

    Their streams go on after the work, so an array may be overwritten, freed or, if it is an
    output, read in its library's own order. That is why torch's allocator need not be told of our
    stream (``record_stream``): torch's current stream waits for it.
    """
    use = _use_of(first)
    if use is None:
        yield None
        return
    import cupy

    def event_of(stream: Any) -> Any:
        return stream.record(cupy.cuda.Event(disable_timing=True))

    torch, memory = torch_of(first), None
    uses = [_use_of(obj) for obj in others if torch is None or torch_of(obj) is None]
    handles = {other.stream for other in uses if other and other.ordinal == use.ordinal}
    with ExitStack() as stack:
        stack.enter_context(cupy.cuda.Device(use.ordinal))
        here = cupy.cuda.get_current_stream()
        if use.stream is not None and use.stream != here.ptr:
            here = cupy.cuda.Stream.from_external(_Handle(use.stream))
            stack.enter_context(here)
        # Without torch, memory is from CuPy's pool, which gives what was taken on a stream to that
        # stream alone. So scratch may be freed while kernels that were launched before still run.
        if torch is not None:
            memory = _TorchMemory(torch, use.ordinal)
            stack.enter_context(cupy.cuda.using_allocator(memory))
        streams = [
            cupy.cuda.Stream.from_external(_Handle(handle))
            for handle in handles - {here.ptr}
            if handle is not None
        ]
        # A captured stream can't wait for one that is not: the order of a replay is its caller's.
        capturing = is_capturing(here)
        streams = [stream for stream in streams if is_capturing(stream) == capturing]
        for stream in streams:
            here.wait_event(event_of(stream))
        outer, borrowed.arrays = borrowed.arrays, []
        try:
            yield memory
        finally:
            lent, borrowed.arrays = borrowed.arrays, outer
            for stream in streams:
                stream.wait_event(event_of(here))
            if lent and not capturing:
                _keep_until(event_of(here), lent)


def _library(obj: Any) -> str:
    """What library a foreign array is of, if its own functions take ours: "jax", "numba" or ""."""
    root = type(obj).__module__.partition(".")[0]
    return {"jax": "jax", "jaxlib": "jax", "numba": "numba", "numba_cuda": "numba"}.get(root, "")


def _given_back(first: Any, array: Array, memory: _TorchMemory | None, codes: bool) -> Any:
    """A result in the library of ``first``; ``codes``: uint8 stands for FP8."""
    torch, library = torch_of(first), _library(first)
    if torch is None and not library:
        return array
    is_fp8 = array.dtype == FP8 or (codes and array.dtype == np.uint8)
    plain = array.view(np.uint8) if array.dtype == FP8 else array
    if torch is not None:
        there = torch.from_numpy(plain) if memory is None else memory.tensor(plain)
    elif library == "jax":
        there = sys.modules["jax"].numpy.from_dlpack(plain)
    else:  # the device array knows our stream; waiting for it here would block the host
        return sys.modules["numba.cuda"].as_cuda_array(plain, sync=False)
    return reinterpret(there, "float8_e4m3fn") if is_fp8 else there


def _is_foreign(obj: Any) -> bool:
    return type(obj) not in _OURS and (
        hasattr(type(obj), "__dlpack__") or hasattr(obj, "__cuda_array_interface__")
    )


def in_order(
    name: str, *, codes: bool = False, written: bool = False
) -> Callable[[_Function], _Function]:
    """Let a function work in `stream_order` of its argument ``name``, and answer in its library.

    A caller's ``out`` comes back as it is. ``codes``: uint8 results stand for FP8. ``written``:
    results will be written to, which JAX's arrays can't be.
    """

    def decorate(function: _Function) -> _Function:
        names = list(inspect.signature(function).parameters)
        place, is_method = names.index(name), names[0] == "self"

        @functools.wraps(function)
        def ordered(*args: Any, **kwargs: Any) -> Any:
            out = kwargs.get("out")
            if (
                _are_ours(map(type, args))
                and _are_ours(map(type, kwargs.values()))
                and (type(out) is not tuple or _are_ours(map(type, out)))
            ):
                return function(*args, **kwargs)
            _OURS.add(getattr(sys.modules.get("cupy"), "ndarray", np.ndarray))
            _OURS.update(map(type, args[:is_method]))
            given = (*args, *kwargs.values(), *(out if type(out) is tuple else ()))
            if not any(map(_is_foreign, given)):
                return function(*args, **kwargs)
            first = args[place] if place < len(args) else kwargs.get(name)
            with stream_order(first, given) as memory:
                result = function(*args, **kwargs)
                if result is None or result is out or (written and _library(first) == "jax"):
                    return result
                if isinstance(result, tuple):
                    return tuple(_given_back(first, r, memory, codes) for r in result)
                return _given_back(first, result, memory, codes)

        return cast(_Function, ordered)

    return decorate
