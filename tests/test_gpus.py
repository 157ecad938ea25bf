"""One process for each GPU: what they find together has the bits that one GPU finds alone.

`test_one_process` runs the same program on a machine with one GPU. The collectives of NCCL with a
timeout are also tested without a GPU.
"""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
from nccl_stub import StubOfArray, StubOfCuPy, StubOfNccl, free_port

from mla_fp8._ranks import Wait, ranks_of
from mla_fp8.cli import bench_gpus

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "nccl_program.py"


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
def test_ranks_on_one_gpu(nccl):
    """No second GPU is needed: the ranks meet, and NCCL says that it cannot connect them."""
    for rank, line in enumerate(passed("crowded", 2)):
        assert "ConnectionError after" in line
        assert f"NCCL must connect rank {rank} of 2; got NCCL_ERROR" in line


@pytest.mark.gpu
def test_a_rank_never_comes(nccl):
    """No second GPU is needed: NCCL is not reached."""
    first, _ = passed("absent", 2)
    assert "got none of the ranks [1]" in first


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
