"""One process for each GPU: what they find together has the bits that one GPU finds alone.

`test_one_process` runs the same program on a machine with one GPU.
"""

import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from mla_fp8 import distributed
from mla_fp8._ranks import Wait, ranks_of
from mla_fp8._rendezvous import share
from mla_fp8.cli import bench_gpus

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "nccl_program.py"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_program(mode: str, size: int, seconds: float) -> list[tuple[int, str]]:
    """The exit status of each rank and what it printed. None of them is left behind."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port() - 1)}
    common = {"NCCL_NVLS_ENABLE": "0"} | os.environ | place
    common |= {"PYTHONPATH": paths, "WORLD_SIZE": str(size)}
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
    assert "got no answer on rank 2: " in str(found[2])


@pytest.mark.parametrize(
    ("address", "cause"),
    [("127.0.0.1", ConnectionRefusedError), ("no-such-host.invalid", socket.gaierror)],
)
def test_why_rank_0_is_not_reached(address, cause):
    port = free_port()
    with pytest.raises(TimeoutError) as caught:
        share(b"", 1, 2, address, port, time.monotonic() + 0.3)
    assert isinstance(caught.value.__cause__, cause)
    assert str(caught.value) == (
        f"rank 0 must listen at {address}:{port} and all 2 ranks must come in time; "
        f"got no answer on rank 1: {caught.value.__cause__}"
    )


def test_a_stranger_listens_at_the_port():
    """What another program answers is not taken for the bytes of rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
                connection.recv(100)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(TimeoutError) as caught:
            share(b"", 1, 2, "127.0.0.1", server.getsockname()[1], time.monotonic() + 0.04)
        thread.join(30)
    assert "got no answer on rank 1: another program has answered" in str(caught.value)


def connected(port: int) -> socket.socket:
    """A connection to rank 0, as soon as it listens."""
    for _ in range(100):
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.02)
    raise AssertionError("rank 0 does not listen")


@pytest.mark.parametrize("said", [b"", b"mla8\0\0"], ids=["nothing", "a byte now and then"])
def test_a_stranger_that_stays(said):
    """Such a connection, of a port scanner for example, does not keep the ranks from meeting."""
    port, found, stop = free_port(), [], threading.Event()
    begin = time.monotonic()
    first = threading.Thread(
        target=lambda: found.append(share(b"id", 0, 2, "127.0.0.1", port, begin + 20))
    )
    first.start()
    with connected(port) as stranger:

        def talk():
            for number in said:
                stop.wait(0.6)
                with suppress(OSError):
                    stranger.sendall(bytes([number]))

        talker = threading.Thread(target=talk)
        talker.start()
        assert share(b"", 1, 2, "127.0.0.1", port, begin + 20) == b"id"
        first.join(30)
        assert time.monotonic() - begin < 3
        stop.set()
        talker.join(30)
    assert found == [b"id"]


def test_a_rank_ends_while_others_are_missing():
    """Rank 0 says which one."""
    port, found = free_port(), []
    end = time.monotonic() + 1.5

    def first():
        with pytest.raises(ConnectionError, match="rank 1 must stay until all ranks have come"):
            share(b"id", 0, 3, "127.0.0.1", port, end)
        found.append("error")

    thread = threading.Thread(target=first)
    thread.start()
    with connected(port) as one:
        one.sendall(struct.pack("!4sII", b"mla8", 1, 3))
        time.sleep(0.2)
        at_once = struct.pack("ii", 1, 0)  # closed by a reset, as when a process is killed
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    time.sleep(0.2)
    with connected(port) as two:
        two.sendall(struct.pack("!4sII", b"mla8", 2, 3))
        thread.join(30)
    assert found == ["error"]


def test_strangers_at_the_port():
    """Neither another program nor a rank of another run is taken for a rank."""
    port, found = free_port(), []
    end = time.monotonic() + 20
    first = threading.Thread(
        target=lambda: found.append(share(b"id", 0, 2, "127.0.0.1", port, end))
    )
    first.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"mla8" + bytes([0, 0, 0, 1, 0, 0, 0, 3]), b"mla8"):
        with connected(port) as stranger:
            stranger.sendall(words)
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


class StubOfArray(SimpleNamespace):
    """A piece of a GPU's memory."""

    def __init__(self) -> None:
        super().__init__(data=SimpleNamespace(ptr=64), nbytes=4)


class StubOfCuPy(SimpleNamespace):
    """As much of CuPy as a collective with a timeout uses, without a GPU."""

    def __init__(self, *, done: bool = True) -> None:
        stub, stub.recorded, stub.waited = self, [], []

        class Event:
            def __init__(self, disable_timing: bool) -> None:
                assert disable_timing

            def record(self, stream) -> None:
                stub.recorded.append(self)

            @property
            def done(self) -> bool:
                assert self in stub.recorded, "an event that was not recorded counts as done"
                return done

        self.nccl = SimpleNamespace(
            available=True,
            groupStart=lambda: None,
            groupEnd=lambda: None,
            get_unique_id=lambda: b"id",
        )
        stream = SimpleNamespace(ptr=0, wait_event=stub.waited.append)
        self.cuda = SimpleNamespace(
            nccl=self.nccl, Event=Event, Device=nullcontext, get_current_stream=lambda: stream
        )
        self.zeros = lambda *_: StubOfArray()

    def replace_cupy(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "cupy", self)
        monkeypatch.setitem(sys.modules, "cupy.cuda", self.cuda)


class StubOfNccl:
    """A communicator of NCCL; ``gather`` is what a collective does."""

    def __init__(self, gather, async_error=None) -> None:
        self.allGather, self._async_error = gather, async_error
        self.aborted, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()

    def size(self):
        return 2

    def rank_id(self):
        return 1

    def check_async_error(self):
        if self._async_error:
            raise self._async_error

    def abort(self):
        self.aborted.set()
        self.may_end.wait(30)


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
    stub.replace_cupy(monkeypatch)
    array = StubOfArray()
    ranks, wait = ranks_of(comm), Wait("a function", 0.3)
    if error is None:
        ranks.gather([(array, array)], wait)
        before, after = stub.recorded
        assert stub.waited == [before] != [after]
    else:
        with pytest.raises(error, match=r"a function must .* on all"):
            ranks.gather([(array, array)], wait)
    assert comm.aborted.is_set() == (error is not None)


def test_a_status_that_cupy_has_no_name_for(monkeypatch):
    """CuPy 14 raises KeyError then, with the number alone."""
    StubOfCuPy().replace_cupy(monkeypatch)
    ranks, array = ranks_of(StubOfNccl(_nothing, KeyError(8))), StubOfArray()
    with pytest.raises(ConnectionError, match="got an error from NCCL or the GPU: KeyError: 8"):
        ranks.gather([(array, array)], Wait("a function", 30))


def test_nccl_cannot_abort(monkeypatch):
    """The error comes all the same, and arrays live as long as the GPU may write to them."""
    StubOfCuPy(done=False).replace_cupy(monkeypatch)
    comm, array = StubOfNccl(_nothing), StubOfArray()
    comm.may_end.clear()
    alive, begin = weakref.ref(array), time.monotonic()
    try:
        with suppress(TimeoutError):
            ranks_of(comm).gather([(array, array)], Wait("a function", 0.1))
        assert time.monotonic() - begin < 3
        del array
        gc.collect()
        assert alive() is not None
    finally:
        comm.may_end.set()
    end = time.monotonic() + 10
    while alive() is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert alive() is None


@pytest.mark.parametrize("aborts", [True, False])
def test_one_timeout_for_all_of_nccl_communicator(aborts, monkeypatch):
    """The meeting and the communicator take most of the time, and the first collective hangs."""
    stub, comm, port = StubOfCuPy(done=False), StubOfNccl(_nothing), free_port()
    stub.replace_cupy(monkeypatch)
    if not aborts:
        comm.may_end.clear()

    def communicator(size, identity, rank):
        time.sleep(0.5)
        return comm

    stub.nccl.NcclCommunicator = communicator
    begin = time.monotonic()
    other = threading.Timer(0.4, share, (b"", 1, 2, "127.0.0.1", port, begin + 30))
    other.start()
    with pytest.raises(TimeoutError, match="nccl_communicator must be called on all 2 ranks"):
        distributed.nccl_communicator(0, 2, address="127.0.0.1", port=port, timeout=1.2)
    assert time.monotonic() - begin < (1.7 if aborts else 3)
    comm.may_end.set()
    other.join(30)


def test_nccl_fails_to_connect(monkeypatch):
    stub, cause = StubOfCuPy(), RuntimeError("NCCL_ERROR_INVALID_USAGE: invalid usage")
    stub.replace_cupy(monkeypatch)

    def communicator(*_):
        raise cause

    stub.nccl.NcclCommunicator = communicator
    with pytest.raises(ConnectionError) as caught:
        distributed.nccl_communicator(0, 1)
    assert str(caught.value) == f"NCCL must connect rank 0 of 1; got {cause}"
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_is_none(port, monkeypatch):
    StubOfCuPy().replace_cupy(monkeypatch)
    with pytest.raises(ValueError, match=f"port must be .*; got {port}"):
        distributed.nccl_communicator(0, 1, port=port)


@pytest.mark.parametrize("given", [None, "1"])
def test_the_benchmark_turns_multicast_off(given, monkeypatch, tmp_path):
    """Unless the environment says otherwise."""
    seen = []

    class Process:
        returncode = 0

        def __init__(self, command, *, env, **_) -> None:
            seen.append((env["RANK"], env["LOCAL_RANK"], env["NCCL_NVLS_ENABLE"]))

        def poll(self):
            return 0

        wait = poll

    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    if given:
        monkeypatch.setenv("NCCL_NVLS_ENABLE", given)
    monkeypatch.setattr(subprocess, "Popen", Process)
    bench_gpus._run(2, [], tmp_path)
    assert seen == [("0", "0", given or "0"), ("1", "1", given or "0")]
