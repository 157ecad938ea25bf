"""How processes, each with one GPU, find one another and get a communicator of NCCL."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.parameters import brief, check_int
from mla_fp8._ranks import Wait, check_timeout, ranks_of

_RANK = struct.Struct("!4sII")  # magic, rank, number of ranks
_MAGIC = b"mla8"
_ANSWER = struct.Struct("!4sI")  # magic, bytes that follow
_RETRY = 0.05  # seconds until another attempt to connect
_ATTEMPT = 5.0  # seconds of an attempt for each address of a host
_ANNOUNCE = 1.0  # seconds that a connection has to say which rank it is
_LAUNCHERS = (  # variables of a process: its rank, the number of ranks, its rank on its host
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH and Intel MPI
)


class ProcessRank(NamedTuple):
    """Which rank this process has, among how many."""

    rank: int
    size: int
    local: int  # the rank among the processes of this host: the number of the GPU to take


def rank_of_process() -> ProcessRank:
    """Return the rank that the launcher gave to this process.

    Launchers are torchrun, and mpiexec of Open MPI, MPICH and Intel MPI. A process without a
    launcher is rank 0 of 1.

    Examples
    --------
    >>> from mla_fp8.distributed import rank_of_process
    >>> rank, size, gpu = rank_of_process()
    """
    for rank, size, local in _LAUNCHERS:
        if rank in os.environ and size in os.environ:
            number = int(os.environ[rank])
            return ProcessRank(number, int(os.environ[size]), int(os.environ.get(local, number)))
    return ProcessRank(0, 1, 0)


def nccl_communicator(
    rank: int | None = None,
    size: int | None = None,
    *,
    address: str | None = None,
    port: int | None = None,
    timeout: float | None = 60.0,
) -> Any:
    """Return a communicator of NCCL for this process, whose GPU is CuPy's current device.

    All processes call it, and no two of them use the same GPU. Call it in a trusted network only,
    because any program that reaches the port can pass for a rank.

    Parameters
    ----------
    rank, size : int, optional
        The rank of this process, and the number of ranks; by default what `rank_of_process` says.
    address, port : str and int, optional
        Where rank 0 listens until all ranks have come. The default address is ``MASTER_ADDR`` of
        the environment, or else this host. The default port is the one after ``MASTER_PORT``, on
        which torchrun itself listens, or else 29501.
    timeout : float, optional
        Seconds that the whole call may take; None: no limit. The error may come a second later.

    Returns
    -------
    cupy.cuda.nccl.NcclCommunicator
        Connected: one small collective has been run.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong.
    TimeoutError
        If a rank does not come in time. Rank 0 names the missing ranks. Another rank says why its
        last attempt to reach rank 0 failed.
    ConnectionError
        If another process has taken the port, a rank ends meanwhile, or NCCL fails.
    RuntimeError
        If NCCL is not installed.
    """
    wait = Wait("nccl_communicator", check_timeout(timeout), time.monotonic())
    of_launcher = rank_of_process()
    size = check_int("size", of_launcher.size if size is None else size, range(1, 1 << 16))
    rank = check_int("rank", of_launcher.rank if rank is None else rank, range(size))
    address = address or os.environ.get("MASTER_ADDR", "127.0.0.1")
    if port is None:
        port = int(os.environ.get("MASTER_PORT", "29500")) + 1
    port = check_int("port", port, range(1, 1 << 16))
    from cupy.cuda import nccl

    if not nccl.available:
        raise RuntimeError("NCCL must be installed (pip install nvidia-nccl-cu13); got no library")
    identity = nccl.get_unique_id() if rank == 0 else b""
    if size > 1:
        identity = share(identity, rank, size, address, port, wait.end)
    comm = _connected(nccl, size, identity, rank, wait)
    # The first collective connects the ranks, and the host waits for that. Later collectives wait
    # on GPUs only.
    ranks = ranks_of(comm)
    pair = ranks.xp.zeros(1, np.uint8), ranks.xp.zeros((size, 1), np.uint8)
    ranks.gather([pair], wait)
    return comm


def _connected(nccl: Any, size: int, identity: bytes, rank: int, wait: Wait) -> Any:
    """The communicator. NCCL blocks until all ranks have come, so a thread waits for it."""
    import cupy

    device, found, errors = cupy.cuda.Device(), [], []

    def work() -> None:
        try:
            with device:
                found.append(nccl.NcclCommunicator(size, identity, rank))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_left(wait.end))
    if errors:
        words = f"NCCL must connect rank {rank} of {size}; got {brief(errors[0], 200)}"
        raise ConnectionError(words) from errors[0]
    if not found:
        raise wait.error(rank, size)
    return found[0]


def share(identity: bytes, rank: int, size: int, address: str, port: int, end: float) -> bytes:
    """The bytes that rank 0 gives, on every rank, once all ranks have come.

    ``end`` is when they must have come, by ``time.monotonic()``.

    Raises
    ------
    TimeoutError
        If a rank has not come by then.
    ConnectionError
        If the port is taken, or a rank ends while others are missing.
    """
    if rank:
        return _receive(rank, size, address, port, end)
    host = address if address in ("127.0.0.1", "localhost") else ""
    try:
        server = socket.create_server((host, port), backlog=size)
    except OSError as error:
        raise ConnectionError(f"port {port} must be free on rank 0; got {error}") from error
    with server:
        _send_to_all(identity, size, server, end)
    return identity


def _left(end: float) -> float | None:
    """Seconds until ``end``, as a timeout: never 0, by which a socket means not to wait at all."""
    return None if end == float("inf") else max(end - time.monotonic(), 1e-3)


def _send_to_all(identity: bytes, size: int, server: socket.socket, end: float) -> None:
    came: dict[int, socket.socket] = {}
    with ExitStack() as closed_at_last:
        while len(came) < size - 1:
            server.settimeout(_left(end))
            try:
                connection, _ = server.accept()
            except ConnectionError:  # the other side has gone already
                continue
            except TimeoutError:
                missing = sorted(set(range(1, size)) - set(came))
                words = f"all {size} ranks must come in time; got none of the ranks {missing}"
                raise TimeoutError(words) from None
            rank = _announced(connection, size, end)
            if rank is None:  # a stranger, or a rank that is slow and will come again
                connection.close()
            else:
                came[rank] = closed_at_last.enter_context(connection)
        for rank, connection in came.items():
            with _staying(rank):
                _check_open(connection)
        for rank, connection in came.items():
            with _staying(rank):
                connection.settimeout(_left(end))
                connection.sendall(_ANSWER.pack(_MAGIC, len(identity)) + identity)


@contextmanager
def _staying(rank: int) -> Iterator[None]:
    """Say which rank an error of its connection comes from."""
    try:
        yield
    except OSError as error:
        words = f"rank {rank} must stay until all ranks have come; got {error}"
        raise ConnectionError(words) from error


def _check_open(connection: socket.socket) -> None:
    """Raise if the other side has closed the connection. Ranks say nothing more, and wait."""
    connection.setblocking(False)
    with suppress(BlockingIOError):
        if not connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("a closed connection")


def _announced(connection: socket.socket, size: int, end: float) -> int | None:
    """The rank that is at the other side, or None.

    Ranks announce themselves at once. So a connection that says nothing, of a port scanner for
    example, holds the ranks up for `_ANNOUNCE` only.
    """
    try:
        said = _read(connection, _RANK.size, min(end, time.monotonic() + _ANNOUNCE))
    except OSError:
        return None
    magic, rank, count = _RANK.unpack(said)
    return rank if magic == _MAGIC and count == size and 0 < rank < size else None


def _receive(rank: int, size: int, address: str, port: int, end: float) -> bytes:
    while True:
        attempt = _left(min(end, time.monotonic() + _ATTEMPT))
        try:
            with socket.create_connection((address, port), timeout=attempt) as connection:
                connection.sendall(_RANK.pack(_MAGIC, rank, size))
                magic, length = _ANSWER.unpack(_read(connection, _ANSWER.size, end))
                if magic != _MAGIC:
                    raise ConnectionError("another program has answered")
                return _read(connection, length, end)
        except OSError as error:  # perhaps rank 0 does not listen yet
            if time.monotonic() + _RETRY >= end:
                raise TimeoutError(
                    f"rank 0 must listen at {address}:{port} and all {size} ranks must come in "
                    f"time; got no answer on rank {rank}: {error}"
                ) from error
        time.sleep(_RETRY)


def _read(connection: socket.socket, count: int, end: float) -> bytes:
    """Exactly so many bytes, until ``end``."""
    found = b""
    while len(found) < count:
        connection.settimeout(_left(end))
        part = connection.recv(count - len(found))
        if not part:
            raise ConnectionError("the other side has closed the connection")
        found += part
    return found
