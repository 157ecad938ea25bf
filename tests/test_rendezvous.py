"""How processes find one another on the host, and how NCCL connects them, without a GPU."""

import socket
import struct
import threading
import time
from contextlib import suppress

import pytest
from nccl_stub import StubOfCuPy, StubOfNccl, free_port

from mla_fp8 import distributed
from mla_fp8._rendezvous import share


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


@pytest.mark.parametrize("killed", [False, True])
def test_a_rank_ends_while_others_are_missing(killed):
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
        at_once = struct.pack("ii", killed, 0)  # closed by a reset, as when a process is killed
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


@pytest.mark.parametrize("aborts", [True, False])
def test_one_timeout_for_all_of_nccl_communicator(aborts, monkeypatch):
    """The meeting and the communicator take most of the time, and the first collective hangs."""
    stub, comm, port = StubOfCuPy(done=False), StubOfNccl(lambda *_: None), free_port()
    stub.replace_cupy(monkeypatch)
    if not aborts:
        comm.may_end.clear()

    def communicator(size, identity, rank):
        time.sleep(1)
        return comm

    stub.nccl.NcclCommunicator = communicator
    begin = time.monotonic()
    other = threading.Timer(0.4, share, (b"", 1, 2, "127.0.0.1", port, begin + 30))
    other.start()
    with pytest.raises(TimeoutError, match="nccl_communicator must be called on all 2 ranks"):
        distributed.nccl_communicator(0, 2, address="127.0.0.1", port=port, timeout=1.5)
    assert time.monotonic() - begin < (2.3 if aborts else 4)
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
