"""Collectives between ranks: arrays on the host travel by mpi4py, arrays on GPUs by CuPy's NCCL."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import Array
from mla_fp8._check.parameters import brief
from mla_fp8._check.streams import is_capturing

_NCCL_UINT8 = 1  # ncclUint8 of nccl.h
_POLL = 1e-4  # seconds between two looks at what other ranks do
# Seconds to wait until NCCL has aborted. It stops the GPU at once, but then waits, as long as it
# takes, for CUDA graphs that have captured its collectives to be dropped.
_ABORT = 1.0

# Arrays that MPI or NCCL may still write to, because a late rank can come after all.
_abandoned: list[Any] = []


class Wait(NamedTuple):
    """How long a rank waits for the others, and in which function."""

    function: str
    seconds: float | None  # None: as long as it takes
    begin: float | None = None  # by ``time.monotonic()``; None: the seconds begin at each exchange

    @property
    def end(self) -> float:
        """When an exchange that begins now is too late, by ``time.monotonic()``."""
        if self.seconds is None:
            return float("inf")
        return self.seconds + (time.monotonic() if self.begin is None else self.begin)

    def error(self, rank: int, size: int) -> TimeoutError:
        """The error of a rank that has waited too long."""
        return TimeoutError(
            f"{self.function} must be called on all {size} ranks within {self.seconds:g} s; "
            f"got no answer from the others on rank {rank}. "
            "The communicator is of no further use"
        )


def check_timeout(timeout: Any) -> float | None:
    """``timeout`` in seconds, or None."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float | np.number):
        raise TypeError(f"timeout must be None or seconds > 0; got {type(timeout).__name__}")
    if not timeout > 0:
        raise ValueError(f"timeout must be None or seconds > 0; got {brief(timeout)}")
    return float(timeout)


class Ranks(ABC):
    """A communicator of mpi4py or CuPy."""

    xp: Any  # numpy or cupy: whose arrays it takes
    size: int
    rank: int

    @abstractmethod
    def gather(self, pairs: Sequence[tuple[Array, Array]], wait: Wait) -> None:
        """Gather the first array of each pair, from all ranks, into the second: [ranks, ...].

        If ``wait`` has seconds, the second arrays are complete on return. If not, nothing waits for
        a GPU.

        Raises
        ------
        TimeoutError
            If another rank does not come in time. The communicator is of no further use.
        ConnectionError
            If NCCL finds that another rank has failed.
        """


class _HostRanks(Ranks):
    def __init__(self, comm: Any) -> None:
        self.xp, self._comm = np, comm
        self.size, self.rank = comm.Get_size(), comm.Get_rank()

    def gather(self, pairs: Sequence[tuple[Array, Array]], wait: Wait) -> None:
        end = wait.end
        for own, every in pairs:
            if wait.seconds is None or self.size == 1:
                self._comm.Allgather(own, every)
                continue
            request = self._comm.Iallgather(own, every)
            while not request.Test():
                if time.monotonic() > end:
                    _abandoned.append((request, own, every))
                    raise wait.error(self.rank, self.size)
                time.sleep(_POLL)


class _GpuRanks(Ranks):
    """Ranks whose arrays are on GPUs.

    ``enqueue`` enqueues a collective on a stream. ``nccl`` is CuPy's `NcclCommunicator`, or None.
    """

    def __init__(
        self, size: int, rank: int, enqueue: Callable[[Array, Array, Any], None], nccl: Any
    ) -> None:
        import cupy

        self.xp, self.size, self.rank = cupy, size, rank
        self._enqueue, self._nccl = enqueue, nccl

    def gather(self, pairs: Sequence[tuple[Array, Array]], wait: Wait) -> None:
        stream = self.xp.cuda.get_current_stream()
        if wait.seconds is None:
            self._enqueue_all(pairs, stream)
        else:
            self._gather_in_time(pairs, stream, wait)

    def _enqueue_all(self, pairs: Sequence[tuple[Array, Array]], stream: Any) -> None:
        with _one_launch():
            for own, every in pairs:
                self._enqueue(own, every, stream)

    def _gather_in_time(
        self, pairs: Sequence[tuple[Array, Array]], stream: Any, wait: Wait
    ) -> None:
        """Enqueue in a thread, because NCCL connects ranks there, and wait for the GPU here."""
        if is_capturing(stream):
            raise RuntimeError("timeout must be None while a CUDA graph is captured; got seconds")
        device, errors, end = self.xp.cuda.Device(), list[Exception](), wait.end
        before, after = (self.xp.cuda.Event(disable_timing=True) for _ in range(2))
        before.record(stream)

        def work() -> None:
            try:
                with device:
                    # A thread's own default stream has the same handle in every thread.
                    stream.wait_event(before)
                    self._enqueue_all(pairs, stream)
                    after.record(stream)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while not (failed := errors or self._failures()):
            try:
                if not thread.is_alive() and not errors and after.done:
                    return
            except Exception as error:  # the GPU's, when the memory of a rank is gone
                errors.append(error)
            if time.monotonic() > end:
                self._abort(pairs)
                raise wait.error(self.rank, self.size)
            time.sleep(_POLL)
        self._abort(pairs)
        words = f"{wait.function} must succeed on all ranks; got an error from NCCL or the GPU"
        # The type too, because a status that CuPy has no name for is a KeyError with a number.
        what = f"{type(failed[0]).__name__}: {brief(failed[0], 200)}"
        raise ConnectionError(f"{words}: {what}") from failed[0]

    def _failures(self) -> list[Exception]:
        """The error that NCCL has found since, if any."""
        try:
            if hasattr(self._nccl, "check_async_error"):
                self._nccl.check_async_error()
        except Exception as error:
            return [error]
        return []

    def _abort(self, pairs: Sequence[tuple[Array, Array]]) -> None:
        """End the collective on the GPU, which would otherwise wait for ever.

        The GPU may write to the arrays until NCCL has aborted. So the thread keeps them.
        """
        if not hasattr(self._nccl, "abort"):
            _abandoned.append(pairs)
            return
        thread = threading.Thread(target=lambda _: self._nccl.abort(), args=(pairs,), daemon=True)
        thread.start()
        thread.join(_ABORT)


@contextmanager
def _one_launch() -> Iterator[None]:
    """The collectives of NCCL that the body enqueues are one launch."""
    from cupy.cuda import nccl

    if not nccl.available:
        yield
        return
    nccl.groupStart()
    try:
        yield
    finally:
        nccl.groupEnd()


def ranks_of(comm: Any) -> Ranks:
    """The ranks of a communicator of mpi4py or CuPy, recognised by its methods."""
    if hasattr(comm, "Allgather"):
        return _HostRanks(comm)
    if hasattr(comm, "all_gather"):

        def of_backend(own: Array, every: Array, stream: Any) -> None:
            comm.all_gather(own, every, own.size, stream)

        # CuPy has no public names for the number of ranks and the communicator within.
        nccl = getattr(comm, "_comm", None)
        return _GpuRanks(comm._n_devices, comm.rank, of_backend, nccl)
    if hasattr(comm, "allGather"):

        def of_nccl(own: Array, every: Array, stream: Any) -> None:
            pointers = own.data.ptr, every.data.ptr
            comm.allGather(*pointers, own.nbytes, _NCCL_UINT8, stream.ptr)

        return _GpuRanks(comm.size(), comm.rank_id(), of_nccl, comm)
    raise TypeError(
        "comm must be a communicator of mpi4py, or an NCCLBackend or NcclCommunicator of CuPy; "
        f"got {type(comm).__name__}"
    )
