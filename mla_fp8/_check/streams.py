"""The CUDA stream that a call runs on, and the library that its results belong to.

A call runs on the current stream of its first array's library, and makes it CuPy's current stream
meanwhile. Events order the call with the current streams of the other arrays' libraries.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from mla_fp8._check.arrays import FP8, Array, is_cupy
from mla_fp8._check.interop import DLPACK_CUDA, borrowed, library_of, reinterpret, torch_of

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Types that need no stream order and no conversion. CuPy's arrays and this package's classes are
# added when first seen. A call with these types alone is recognised in a microsecond.
_OURS: set[type] = {np.ndarray, int, bool, str, tuple, type(None), np.uint32, np.int32, np.int64}
_are_ours = _OURS.issuperset
_DEFAULT, _LEGACY = 0, 1  # two handles of CUDA's legacy default stream
_NO_ORDER: AbstractContextManager[None] = nullcontext()


class _Handle(NamedTuple):
    """A stream of another library, as an object with the CUDA stream protocol."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class _Use(NamedTuple):
    """The GPU of an array, and the stream that its library uses it on."""

    ordinal: int
    stream: int | None  # None: the library has no current stream, or orders itself


def is_capturing(stream: Any) -> bool:
    """Whether a CUDA graph is being captured on a CuPy stream."""
    # The legacy stream cannot be captured. Querying it is an error while another stream captures.
    return stream.ptr not in (_DEFAULT, _LEGACY) and bool(stream.is_capturing())


def takes_from_pool() -> bool:
    """Whether CuPy takes memory from its default pool, which a captured graph cannot keep."""
    import cupy

    return bool(cupy.cuda.get_allocator() == cupy.get_default_memory_pool().malloc)


def new_stream() -> Any:
    """A new CuPy stream. Relaxed capture mode allows to create it while torch captures a graph."""
    import cupy
    from cuda.bindings import driver

    exchange, modes = driver.cuThreadExchangeStreamCaptureMode, driver.CUstreamCaptureMode
    _, before = exchange(modes.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        return cupy.cuda.Stream(non_blocking=True)
    finally:
        exchange(before)


def _use_of(obj: Any) -> _Use | None:
    """The GPU and stream of an array on a GPU, else None."""
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
    with suppress(Exception):  # `as_array` raises on such an object, and names the argument
        if hasattr(obj, "__dlpack_device__"):  # __dlpack__(stream=...) orders the streams
            kind, ordinal = obj.__dlpack_device__()
            return _Use(int(ordinal), None) if kind in DLPACK_CUDA else None
        interface = getattr(obj, "__cuda_array_interface__", None)
        if interface is None:
            return None
        from cupy.cuda import runtime

        ordinal, stream = runtime.pointerGetAttributes(interface["data"][0]).device, None
        if interface.get("stream") is not None:
            stream = _DEFAULT if interface["stream"] == _LEGACY else int(interface["stream"])
        return _Use(ordinal, stream) if ordinal >= 0 else None  # -2: not device memory
    return None


class _TorchMemory:
    """An allocator for CuPy that takes memory from torch.

    Results are then ordinary tensors: ``record_stream`` works and graph pools keep them. Scratch
    memory comes from torch's pool, which may hold most of the GPU. torch reuses freed memory in the
    order of its current stream, and the call runs on that stream.
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
        """The tensor under a whole CuPy array that was allocated here."""
        taken = self._tensors[array.data.ptr][: array.nbytes]
        return taken.view(getattr(self._torch, array.dtype.name)).view(array.shape)


_kept: list[tuple[Any, list[Array]]] = []
_kept_lock = threading.Lock()


def _keep_until(event: Any, arrays: list[Array]) -> None:
    """Keep arrays alive until an event, for libraries without a stream that could wait for it."""
    with _kept_lock:
        _kept[:] = [pair for pair in _kept if not pair[0].done]
        _kept.append((event, arrays))


@contextmanager
def stream_order(
    first: Any, others: Iterable[Any], *, on_cupy: bool = False, lent: Iterable[Array] = ()
) -> Iterator[_TorchMemory | None]:
    """Run the body on the current stream of ``first``, ordered with the streams of ``others``.

    The body's stream waits for their streams first, and their streams wait for the body at the
    end. So each library may afterwards overwrite, free or read its arrays in its own stream order,
    and torch's allocator need not know the body's stream (``record_stream``).

    ``on_cupy``: use CuPy's current stream and memory, on the GPU of ``first``. ``lent``: arrays
    that were `borrowed` before, and that the body uses.
    """
    use = _use_of(first)
    if use is None:
        yield None
        return
    torch, memory = torch_of(first), None
    if on_cupy:
        use, torch = _Use(use.ordinal, None), None
    import cupy

    def event_of(stream: Any) -> Any:
        return stream.record(cupy.cuda.Event(disable_timing=True))

    uses = [_use_of(obj) for obj in others if torch is None or torch_of(obj) is None]
    handles = {other.stream for other in uses if other and other.ordinal == use.ordinal}
    with ExitStack() as stack:
        stack.enter_context(cupy.cuda.Device(use.ordinal))
        here = cupy.cuda.get_current_stream()
        if use.stream is not None and use.stream != here.ptr:
            here = cupy.cuda.Stream.from_external(_Handle(use.stream))
            stack.enter_context(here)
        # Without torch, memory comes from CuPy's pool, which reuses freed memory on the stream that
        # it was allocated on. So scratch may be freed while the kernels that use it still run.
        if torch is not None:
            memory = _TorchMemory(torch, use.ordinal)
            stack.enter_context(cupy.cuda.using_allocator(memory))
        streams = [
            cupy.cuda.Stream.from_external(_Handle(handle))
            for handle in handles - {here.ptr}
            if handle is not None
        ]
        # A captured stream cannot wait for one that is not captured. The caller orders a graph's
        # replays.
        capturing = is_capturing(here)
        streams = [stream for stream in streams if is_capturing(stream) == capturing]
        for stream in streams:
            here.wait_event(event_of(stream))
        outer, borrowed.arrays = borrowed.arrays, [*lent]
        try:
            yield memory
        finally:
            lent, borrowed.arrays = borrowed.arrays or [], outer
            for stream in streams:
                stream.wait_event(event_of(here))
            if lent and not capturing:
                _keep_until(event_of(here), lent)


def _given_back(first: Any, array: Array, memory: _TorchMemory | None, codes: bool) -> Any:
    """A result as an array of the library of ``first``; ``codes``: uint8 becomes FP8."""
    torch, library = torch_of(first), library_of(first)
    if torch is None and not library:
        return array
    is_fp8 = array.dtype == FP8 or (codes and array.dtype == np.uint8)
    plain = array.view(np.uint8) if array.dtype == FP8 else array
    if torch is not None:
        there = torch.from_numpy(plain) if memory is None else memory.tensor(plain)
    elif library == "jax":
        there = sys.modules["jax"].numpy.from_dlpack(plain)
    else:  # sync=False: synchronising with the array's stream would block the host
        return sys.modules["numba.cuda"].as_cuda_array(plain, sync=False)
    return reinterpret(there, "float8_e4m3fn") if is_fp8 else there


def _results_given_back(
    first: Any,
    results: Any,
    memory: _TorchMemory | None,
    *,
    codes: bool = False,
    written: bool = False,
) -> Any:
    """A result, or a tuple of them, as arrays of the library of ``first``.

    ``codes``: uint8 results are FP8 numbers. ``written``: they will be written to again, so they
    stay as they are for JAX, whose arrays are read-only.
    """
    if written and library_of(first) == "jax":
        return results
    if isinstance(results, tuple):
        return tuple(_given_back(first, result, memory, codes) for result in results)
    return _given_back(first, results, memory, codes)


def _is_foreign(obj: Any) -> bool:
    return type(obj) not in _OURS and (
        hasattr(type(obj), "__dlpack__") or hasattr(obj, "__cuda_array_interface__")
    )


def _has_foreign(given: Iterable[Any]) -> bool:
    """Whether an array of another library than NumPy and CuPy is among the objects."""
    _OURS.add(getattr(sys.modules.get("cupy"), "ndarray", np.ndarray))
    return any(map(_is_foreign, given))


def in_order(
    name: str, *, codes: bool = False, written: bool = False
) -> Callable[[_Function], _Function]:
    """Run a function in the `stream_order` of its argument ``name``.

    Results are converted to the library of that argument; a caller's ``out`` is returned unchanged.
    For ``codes`` and ``written`` see `_results_given_back`.
    """

    def decorate(function: _Function) -> _Function:
        names = list(inspect.signature(function).parameters)
        place, is_method = names.index(name), names[0] == "self"

        @functools.wraps(function)
        def ordered(*args: Any, **kwargs: Any) -> Any:
            out = kwargs.get("out")
            given = (*args, *kwargs.values(), *(out if type(out) is tuple else ()))
            if _are_ours(map(type, given)):
                return function(*args, **kwargs)
            _OURS.update(map(type, args[:is_method]))
            if not _has_foreign(given):
                return function(*args, **kwargs)
            first = args[place] if place < len(args) else kwargs.get(name)
            with stream_order(first, given) as memory:
                result = function(*args, **kwargs)
                if result is None or result is out:
                    return result
                return _results_given_back(first, result, memory, codes=codes, written=written)

        return cast(_Function, ordered)

    return decorate


@contextmanager
def _on_torchs_stream(torch: Any, ordinal: int) -> Iterator[None]:
    """The `stream_order` of tensors alone, in a body that allocates nothing: nobody has to wait."""
    import cupy

    handle = torch.cuda.current_stream(ordinal).cuda_stream
    with cupy.cuda.Device(ordinal), cupy.cuda.Stream.from_external(_Handle(handle)):
        yield


class RepeatedOrder:
    """The `stream_order` of calls that are made many times with the same arrays.

    Every call asks the libraries for their current streams anew. There is nothing to ask if all
    arrays are NumPy's and CuPy's, or on the host.
    """

    def __init__(self, first: Any, given: tuple[Any, ...]) -> None:
        self._first, self._use = first, _use_of(first) if _has_foreign(given) else None
        self._memory: _TorchMemory | None = None
        self._lent: list[Array] = []
        # torch and CuPy use all arrays of a GPU on one stream, so one array of each is asked.
        asked: dict[Any, Any] = {}
        for obj in given if self._use else ():
            use, shares = _use_of(obj), torch_of(obj) is not None or is_cupy(obj)
            if use is not None:
                asked[(type(obj), use.ordinal) if shares else id(obj)] = obj
        self._others = list(asked.values())
        alone = all(torch_of(obj) is not None for obj in self._others)
        self._torch = torch_of(first) if alone else None

    def __call__(self) -> AbstractContextManager[Any]:
        """The order of one call, which allocates nothing."""
        if self._use is None:
            return _NO_ORDER
        if self._torch is not None:
            return _on_torchs_stream(self._torch, self._use.ordinal)
        return stream_order(self._first, self._others, lent=self._lent)

    @contextmanager
    def binding(self) -> Iterator[None]:
        """The order of the code that takes the arrays, once, and prepares the calls."""
        if self._use is None:
            yield
            return
        with stream_order(self._first, self._others) as self._memory:
            yield
            # Arrays of libraries without a current stream have been taken in the order of this
            # stream. Calls may come on others, so what they hold must be there by now.
            self._lent = borrowed.arrays or []
            if self._lent:
                sys.modules["cupy"].cuda.get_current_stream().synchronize()

    def given_back(self, results: Any) -> Any:
        """Results in the library of the first array; used inside `binding`."""
        return _results_given_back(self._first, results, self._memory, written=True)
