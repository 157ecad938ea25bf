"""How processes with a GPU each find one another, and get a communicator of NCCL."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.parameters import check_int
from mla_fp8._ranks import Wait, check_timeout, ranks_of

_RANK = struct.Struct("!4sII")  # magic, rank, number of ranks
_MAGIC = b"mla8"
_RETRY = 0.05  # seconds until another attempt to connect
_LAUNCHERS = (  # rank, number of ranks, and rank on the host, as launchers tell their processes
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH and Intel MPI
)


class ProcessRank(NamedTuple):
    """Which of several processes this one is."""

    rank: int
    size: int
    local: int  # its place on this host, which is the GPU that it takes


def rank_of_process() -> ProcessRank:
    """Return what the launcher said: torchrun, or mpiexec of Open MPI, MPICH or Intel MPI.

    A process that none of these started is rank 0 of 1.

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

    All processes call it, each with another GPU. Processes of one trusted network only: whoever
    reaches the port first is taken for a rank.

    Parameters
    ----------
    rank, size : int, optional
        The number of this process and how many there are; by default what `rank_of_process` says.
    address, port : str and int, optional
        Where rank 0 listens until all have come. By default the environment's ``MASTER_ADDR``, or
        this host, and the port after ``MASTER_PORT``, on which torchrun itself listens, or 29501.
    timeout : float, optional
        Seconds that all ranks have to come; None: as long as it takes.

    Returns
    -------
    cupy.cuda.nccl.NcclCommunicator
        Connected: one small collective has been run.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong.
    TimeoutError
        If a rank does not come in time. Rank 0 names those that are missing.
    ConnectionError
        If another process has taken the port, or a rank ends meanwhile.
    """
    of_launcher = rank_of_process()
    size = check_int("size", of_launcher.size if size is None else size, range(1, 1 << 16))
    rank = check_int("rank", of_launcher.rank if rank is None else rank, range(size))
    address = address or os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = port or int(os.environ.get("MASTER_PORT", "29500")) + 1
    seconds = check_timeout(timeout)
    from cupy.cuda import nccl

    if not nccl.available:
        raise RuntimeError("NCCL must be installed (pip install nvidia-nccl-cu13); got no library")
    end = float("inf") if seconds is None else time.monotonic() + seconds
    identity = nccl.get_unique_id() if rank == 0 else b""
    if size > 1:
        identity = share(identity, rank, size, address, port, end)
    comm = _connected(nccl, size, identity, rank, end, seconds)
    # The first collective connects the ranks, which blocks the host. Later ones only wait on GPUs.
    ranks = ranks_of(comm)
    pair = ranks.xp.zeros(1, np.uint8), ranks.xp.zeros((size, 1), np.uint8)
    ranks.gather([pair], Wait("nccl_communicator", seconds))
    return comm


def _connected(
    nccl: Any, size: int, identity: bytes, rank: int, end: float, seconds: float | None
) -> Any:
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
    thread.join(None if seconds is None else max(end - time.monotonic(), 0.0))
    if errors:
        raise ConnectionError(f"NCCL could not connect rank {rank} of {size}: {errors[0]}")
    if not found:
        raise Wait("nccl_communicator", seconds).error(rank, size)
    return found[0]


def share(identity: bytes, rank: int, size: int, address: str, port: int, end: float) -> bytes:
    """The bytes that rank 0 gives, on every rank, once all have come; until ``time.monotonic()``.

    Raises
    ------
    TimeoutError
        If a rank has not come by then.
    ConnectionError
        If the port is taken.
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
    """Seconds until ``end``, for a socket, which takes 0 for something else."""
    return None if end == float("inf") else max(end - time.monotonic(), 1e-3)


def _send_to_all(identity: bytes, size: int, server: socket.socket, end: float) -> None:
    came: dict[int, socket.socket] = {}
    with ExitStack() as closed_at_last:
        while len(came) < size - 1:
            server.settimeout(_left(end))
            try:
                connection = closed_at_last.enter_context(server.accept()[0])
                connection.settimeout(_left(end))
                magic, rank, count = _RANK.unpack(_read(connection, _RANK.size))
            except TimeoutError:
                missing = sorted(set(range(1, size)) - set(came))
                words = f"all {size} ranks must come in time; got none of the ranks {missing}"
                raise TimeoutError(words) from None
            except OSError:
                continue  # not a rank, or one that has ended: it may come again
            if magic == _MAGIC and count == size and 0 < rank < size:
                came[rank] = connection
        for connection in came.values():
            connection.sendall(struct.pack("!I", len(identity)) + identity)


def _receive(rank: int, size: int, address: str, port: int, end: float) -> bytes:
    while time.monotonic() < end:
        try:
            with socket.create_connection((address, port), timeout=_left(end)) as connection:
                connection.sendall(_RANK.pack(_MAGIC, rank, size))
                connection.settimeout(_left(end))
                (length,) = struct.unpack("!I", _read(connection, 4))
                return _read(connection, length)
        except OSError:  # rank 0 does not listen yet
            time.sleep(_RETRY)
    raise TimeoutError(
        f"rank 0 must listen at {address}:{port} and all {size} ranks must come in time; "
        f"rank {rank} got no answer"
    )


def _read(connection: socket.socket, count: int) -> bytes:
    """Exactly so many bytes."""
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            raise ConnectionError("the other side has closed the connection")
        found += part
    return found
