"""Sharded keys: every rank gets what one rank with all keys computes, bit for bit."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread
from types import SimpleNamespace

import numpy as np
import pytest
from properties import assert_helpful, message_of, same_bits
from sharding import (
    ROWS,
    SPECS,
    check_disagreement,
    check_rows,
    check_rows_disagreement,
    check_shards,
    hostile,
    operator,
)

from mla_fp8 import _ranks, distributed
from mla_fp8._ranks import Wait, ranks_of
from mla_fp8.distributed import (
    index_topk_sharded,
    index_topk_split_rows,
    split_rows_workspace,
    tokens_of_rank,
)

PROGRAM = Path(__file__).with_name("mpi_program.py")


class SimulatedRanks:
    """A communicator of one process; each rank is a thread. The methods are mpi4py's and CuPy's."""

    def __init__(self, size: int) -> None:
        self._n_devices = size
        self._arrays = [None] * size
        self._barrier = Barrier(size, timeout=60)

    def end(self) -> None:
        """Let go those that wait for a rank that never comes."""
        self._barrier.abort()

    def rank(self, rank: int, xp):
        ranks = self

        def exchange(own, every):
            ranks._arrays[rank] = own
            ranks._barrier.wait()
            for other, array in enumerate(ranks._arrays):
                every[other] = array
            ranks._barrier.wait()

        class Request:
            def __init__(self, *arrays) -> None:
                self._thread = Thread(target=self._work, args=arrays, daemon=True)
                self._thread.start()

            def _work(self, *arrays) -> None:
                with suppress(BrokenBarrierError):
                    exchange(*arrays)

            def Test(self):
                return not self._thread.is_alive()

        class Host:
            Allgather = staticmethod(exchange)
            Iallgather = Request

            def Get_size(self):
                return ranks._n_devices

            def Get_rank(self):
                return rank

        class Gpu:
            _n_devices = ranks._n_devices

            def __init__(self) -> None:
                self.rank = rank

            def all_gather(self, own, every, count, stream):
                assert count == own.size
                with stream:
                    exchange(own, every)

        return Host() if xp is np else Gpu()


def run_ranks(size: int, program) -> None:
    """Run ``program(rank)`` in a thread for each rank; the first error is raised."""
    with ThreadPoolExecutor(size) as threads:
        for done in [threads.submit(program, rank) for rank in range(size)]:
            done.result()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", SPECS)
def test_simulated_ranks(name, size, interleaved, xp):
    ranks = SimulatedRanks(size)
    run_ranks(
        size,
        lambda rank: check_shards(ranks.rank(rank, xp), rank, size, xp, name, interleaved),
    )


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_disagree_or_fail(size, xp):
    ranks = SimulatedRanks(size)
    run_ranks(size, lambda rank: check_disagreement(ranks.rank(rank, xp), rank, size, xp))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ROWS)
def test_simulated_ranks_split_rows(name, size, xp):
    ranks = SimulatedRanks(size)
    run_ranks(size, lambda rank: check_rows(ranks.rank(rank, xp), rank, size, xp, name))


@pytest.mark.parametrize("seed", range(40))
def test_split_rows_of_wrong_values(seed, xp):
    """Offsets and lengths that are not checked: the bits of the whole call all the same."""
    case, totals = hostile(seed)
    size, op, case = 1 + seed % 4, operator(case), case.to(xp)
    totals = None if totals is None else xp.asarray(totals)
    options = {"k_total_lengths": totals, "return_scores": True, "check": False}
    want = op(*case.args, **options)
    ranks = SimulatedRanks(size)

    def program(rank):
        comm = ranks.rank(rank, xp)
        found = index_topk_split_rows(op, *case.args, comm=comm, **options)
        assert all(map(same_bits, found, want))

    run_ranks(size, program)


@pytest.mark.parametrize("tokens", range(10))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_has_one_rank(tokens, size):
    found = [np.arange(tokens)[p] for r in range(size) for p in tokens_of_rank(tokens, r, size)]
    assert sorted(np.concatenate(found)) == list(range(tokens))


def test_causal_ranks_have_equal_work():
    """Prefill of a sequence without cached tokens: a rank's last token sees all, and so on."""
    pairs = [sum(map(sum, (range(p.start, p.stop) for p in tokens_of_rank(4096, r, 4))))
             for r in range(4)]  # fmt: skip
    assert max(pairs) == min(pairs)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_disagree_or_fail_on_rows(size, xp):
    ranks = SimulatedRanks(size)
    run_ranks(size, lambda rank: check_rows_disagreement(ranks.rank(rank, xp), rank, size, xp))


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("name", ["index_topk_sharded", "index_topk_split_rows"])
def test_a_rank_that_never_comes(name, check, xp):
    """An error after the timeout on each rank that came, not a hang, and it says what to do."""
    case = SPECS["ties"].build()
    op, inputs, ranks = operator(case), case.to(xp).args, SimulatedRanks(3)
    more = {"key_start": 0} if name == "index_topk_sharded" else {}

    def program(rank):
        begin = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            getattr(distributed, name)(
                op, *inputs, comm=ranks.rank(rank, xp), check=check, timeout=0.2, **more
            )
        assert time.monotonic() - begin < 30
        assert str(caught.value) == (
            f"{name} must be called on all 3 ranks within 0.2 s; got no answer from the others on "
            f"rank {rank}. The communicator is of no further use"
        )

    try:
        run_ranks(2, program)
    finally:
        ranks.end()


def test_an_error_is_not_lost_where_others_never_come(xp):
    """The rank's own error is the context of the error that it raises."""
    case = SPECS["few keys"].build()
    comm, more = SimulatedRanks(2).rank(0, xp), {"check": True, "timeout": 0.2, "sort": "index"}
    with pytest.raises(TimeoutError) as caught:
        index_topk_split_rows(operator(case), *case.to(xp).args, comm=comm, **more)
    assert "sort must be" in str(caught.value.__context__)


def test_the_lists_of_an_exchange_share_its_timeout(monkeypatch):
    """The first list takes most of the time, and the second never comes."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + 0.01)
    monkeypatch.setattr(_ranks, "time", clock)
    ends = [100.8, 200.0]

    class Request:
        def __init__(self, own, every) -> None:
            self._end = ends.pop(0)

        def Test(self):
            return clock.now > self._end

    comm = SimpleNamespace(
        Allgather=None, Iallgather=Request, Get_size=lambda: 2, Get_rank=lambda: 1
    )
    pair = np.zeros(1), np.zeros((2, 1))
    with pytest.raises(TimeoutError, match="a function must be called on all 2 ranks within 1 s"):
        ranks_of(comm).gather([pair, pair], Wait("a function", 1.0))
    assert not ends
    assert clock.now < 101.1


def test_results_within_a_timeout(xp):
    case = SPECS["random"].build()
    op, inputs, ranks = operator(case), case.to(xp).args, SimulatedRanks(2)
    want = op(*inputs)

    def program(rank):
        comm = ranks.rank(rank, xp)
        assert same_bits(index_topk_split_rows(op, *inputs, comm=comm, timeout=60), want)

    run_ranks(2, program)


@pytest.mark.parametrize(
    ("timeout", "error"), [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError),
                           ("1", TypeError), (True, TypeError)],
)  # fmt: skip
def test_wrong_timeouts(timeout, error):
    case = SPECS["few keys"].build()
    op, comm = operator(case), SimulatedRanks(1).rank(0, np)
    for call in (
        lambda: index_topk_sharded(op, *case.args, comm=comm, key_start=0, timeout=timeout),
        lambda: index_topk_split_rows(op, *case.args, comm=comm, timeout=timeout),
    ):
        with pytest.raises(error, match=r"timeout must be None or seconds > 0; got"):
            call()


def test_workspace_of_split_rows(xp):
    """The workspace serves the rank's call; on the host it is empty."""
    case = ROWS["causal"].build()
    op, inputs, comm = operator(case), case.to(xp).args, SimulatedRanks(1).rank(0, xp)
    memory = split_rows_workspace(op, *inputs, comm=comm, sort="score", return_scores=True)
    assert memory.dtype == np.uint8
    assert (memory.size == 0) == (xp is np)
    options = {"comm": comm, "sort": "score", "return_scores": True}
    found = index_topk_split_rows(op, *inputs, **options, workspace=memory)
    want = op(*inputs, sort="score", return_scores=True)
    assert all(map(same_bits, found, want))
    assert_helpful(message_of(lambda: split_rows_workspace(op, *inputs[:5], comm=comm)), "inputs")


@pytest.mark.gpu
def test_ranks_on_a_gpu_compare_their_calls_on_request_only(cupy):
    """Without ``check`` the two lists alone are exchanged, and nothing waits for the device."""
    case = SPECS["ties"].build()
    op, exchanged = operator(case), []

    class OneRank:
        _n_devices, rank = 1, 0

        def all_gather(self, own, every, count, stream):
            exchanged.append((own.dtype, own.shape))
            every[0] = own

    index_topk_sharded(op, *case.to(cupy).args, comm=OneRank(), key_start=0)
    shape = case.tokens, case.spec.k
    assert exchanged == [(np.int32, shape), (np.float32, shape)]


@pytest.mark.gpu
def test_nccl(cupy, nccl):
    """NCCL itself, with one rank: several ranks need a process each."""
    comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    for name in SPECS:
        check_shards(comm, 0, 1, cupy, name, True)
    for name in ROWS:
        check_rows(comm, 0, 1, cupy, name)


def test_wrong_communicators(xp):
    case = SPECS["few keys"].build()
    op, inputs = operator(case), case.to(xp).args

    def message(comm, *arrays):
        found = message_of(lambda: index_topk_sharded(op, *arrays, comm=comm, key_start=0))
        if arrays:
            assert message_of(lambda: index_topk_split_rows(op, *arrays, comm=comm)) == found
        return found

    for comm in (None, "mpi", object()):
        assert_helpful(message(comm, *inputs), "comm", type(comm).__name__)
    assert_helpful(message(SimulatedRanks(1).rank(0, np)), "q")
    if xp is not np:
        assert_helpful(message(SimulatedRanks(1).rank(0, np), *inputs), "q", "ndarray")
        assert_helpful(message(SimulatedRanks(1).rank(0, xp), *case.args), "q", "ndarray")


def run_mpi(size: int, *command: str) -> str:
    """What processes print. OpenMPI refuses root and few cores unless told otherwise."""
    if shutil.which("mpiexec") is None or find_spec("mpi4py") is None:
        pytest.skip("needs mpiexec and mpi4py (apt-get install openmpi-bin; pip install mpi4py)")
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",  # containers forbid it
        "OPENBLAS_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = ("mpiexec", "-n", str(size), sys.executable, *command)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_mpi(size):
    """Real processes."""
    assert f"{size} ranks passed" in run_mpi(size, "-m", "mpi4py", str(PROGRAM))


def test_example_of_several_processes():
    printed = run_mpi(2, "-m", "mpi4py", str(PROGRAM.parents[1] / "examples" / "two_gpus.py"))
    assert "2 processes on numpy" in printed
