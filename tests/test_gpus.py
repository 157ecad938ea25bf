"""One process for each GPU: what they find together has the bits that one GPU finds alone.

`test_one_process` runs the same program on a machine with one GPU.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from mla_fp8 import distributed
from mla_fp8._ranks import Wait, ranks_of
from mla_fp8._rendezvous import share

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "nccl_program.py"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_program(mode: str, size: int, seconds: float) -> list[tuple[int, str]]:
    """The exit status of each rank and what it printed. None of them is left behind."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port() - 1)}
    common = os.environ | {"PYTHONPATH": paths, "WORLD_SIZE": str(size)} | place
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), mode],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    end, found = time.monotonic() + seconds, []
    try:
        for process in processes:
            printed, _ = process.communicate(timeout=max(end - time.monotonic(), 1.0))
            found.append((process.returncode, printed))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def passed(mode: str, size: int, *, seconds: float = 240.0, last: int = 0) -> list[str]:
    """The last line of each rank, all of which passed; the last rank ends with status ``last``."""
    found = run_program(mode, size, seconds)
    text = "\n".join(f"--- rank {r}, status {s}\n{p}" for r, (s, p) in enumerate(found))
    assert [status for status, _ in found] == [0] * (size - 1) + [last], text
    lines = [printed.strip().splitlines()[-1] for _, printed in found]
    assert all(line.startswith("passed") for line in lines), text
    return lines


@pytest.fixture
def several(cupy):
    """How many GPUs there are, at least two."""
    count = cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip("needs two GPUs: processes with a GPU each were NOT tested together")
    return count


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["batches", "graph"])
def test_one_process(mode, nccl):
    passed(mode, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["batches", "graph"])
def test_a_process_for_each_gpu(mode, nccl, several):
    passed(mode, several)


@pytest.mark.gpu
def test_a_rank_is_killed(nccl, several):
    *others, _ = passed("killed", several, last=-signal.SIGKILL)
    assert all("Error after" in line for line in others), others


@pytest.mark.gpu
def test_a_rank_never_calls(nccl, several):
    *others, _ = passed("silent", several)
    assert all("TimeoutError after" in line for line in others), others


@pytest.mark.gpu
def test_a_rank_never_comes(nccl):
    """No second GPU is needed: NCCL is not reached."""
    first, _ = passed("absent", 2)
    assert "got none of the ranks [1]" in first


# The tests below are of how processes find one another on the host, before NCCL connects them.


def meet(size: int, seconds: float, ranks) -> dict[int, object]:
    """What each rank gets, bytes or an error."""
    found, port = {}, free_port()
    end = time.monotonic() + seconds

    def work(rank):
        try:
            found[rank] = share(
                b"id" * 64 if rank == 0 else b"", rank, size, "127.0.0.1", port, end
            )
        except OSError as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_all_ranks_meet(ranks):
    """In any order; rank 0 may be the last."""
    assert meet(4, 30, ranks) == dict.fromkeys(range(4), b"id" * 64)


def test_ranks_that_do_not_meet():
    found = meet(4, 0.5, (0, 2))
    assert all(isinstance(error, TimeoutError) for error in found.values())
    assert "got none of the ranks [1, 3]" in str(found[0])
    assert "rank 2 got no answer" in str(found[2])
    (error,) = meet(2, 0.3, (1,)).values()
    assert isinstance(error, TimeoutError)
    assert "rank 0 must listen at 127.0.0.1:" in str(error)


def test_strangers_at_the_port():
    """Neither one that says nothing sensible nor one of another run is taken for a rank."""
    port, found = free_port(), []
    end = time.monotonic() + 20
    first = threading.Thread(
        target=lambda: found.append(share(b"id", 0, 2, "127.0.0.1", port, end))
    )
    first.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"mla8" + bytes([0, 0, 0, 1, 0, 0, 0, 3]), b"mla8"):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(words)
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
    assert share(b"", 1, 2, "127.0.0.1", port, end) == b"id"
    first.join(30)
    assert found == [b"id"]


def test_a_taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"port {port} must be free on rank 0; got"):
            share(b"id", 0, 2, "127.0.0.1", port, time.monotonic() + 1)


LAUNCHERS = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    },
    "MPICH": {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_rank_of_process(launcher, monkeypatch):
    for names in LAUNCHERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert distributed.rank_of_process() == (0, 1, 0)
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    assert distributed.rank_of_process() == (3, 8, 1)


class StubOfCuPy(SimpleNamespace):
    """As much of CuPy as a collective with a timeout uses, without a GPU."""

    def __init__(self, *, done: bool = True) -> None:
        stub, stub.recorded = self, []

        class Event:
            def __init__(self, disable_timing: bool) -> None:
                assert disable_timing

            def record(self, stream) -> None:
                stub.recorded.append(stream)

            @property
            def done(self) -> bool:
                assert stub.recorded, "an event that was not recorded counts as done"
                return done

        self.nccl = SimpleNamespace(available=False)
        stream = SimpleNamespace(ptr=0)
        self.cuda = SimpleNamespace(
            nccl=self.nccl, Event=Event, Device=nullcontext, get_current_stream=lambda: stream
        )


class StubOfNccl:
    """A communicator of NCCL; ``gather`` is what a collective does."""

    def __init__(self, gather, async_error=None) -> None:
        self.allGather, self._async_error, self.aborted = gather, async_error, threading.Event()

    def size(self):
        return 2

    def rank_id(self):
        return 1

    def check_async_error(self):
        if self._async_error:
            raise self._async_error

    def abort(self):
        self.aborted.set()


def _nothing(*_):
    pass


def _fail(*_):
    raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR")


def _blocked(comm):
    """NCCL connects the ranks in the first collective, and blocks until all have come."""
    comm.allGather = lambda *_: comm.aborted.wait(30)
    return comm


@pytest.mark.parametrize(
    ("make", "done", "error"),
    [
        (lambda: StubOfNccl(_nothing), True, None),
        (lambda: StubOfNccl(_nothing), False, TimeoutError),
        (lambda: _blocked(StubOfNccl(None)), True, TimeoutError),
        (lambda: StubOfNccl(_fail), True, ConnectionError),
        (lambda: StubOfNccl(_nothing, RuntimeError("a rank is gone")), False, ConnectionError),
    ],
    ids=["all came", "none came", "none connected", "error", "error of another rank"],
)
def test_a_collective_of_nccl_with_a_timeout(make, done, error, monkeypatch):
    """It ends in time, and NCCL is aborted where it would go on."""
    stub, comm = StubOfCuPy(done=done), make()
    monkeypatch.setitem(sys.modules, "cupy", stub)
    monkeypatch.setitem(sys.modules, "cupy.cuda", stub.cuda)
    array = SimpleNamespace(data=SimpleNamespace(ptr=64), nbytes=4)
    ranks, wait = ranks_of(comm), Wait("a function", 0.3)
    if error is None:
        ranks.gather([(array, array)], wait)
        assert stub.recorded
    else:
        with pytest.raises(error, match=r"a function must .* on all"):
            ranks.gather([(array, array)], wait)
    assert comm.aborted.is_set() == (error is not None)
