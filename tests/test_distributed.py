"""Sharded keys: every rank gets what one rank with all keys computes, bit for bit."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from properties import assert_helpful, message_of
from sharding import SPECS, check_disagreement, check_shards, operator

from mla_fp8.distributed import index_topk_sharded

PROGRAM = Path(__file__).with_name("mpi_program.py")


class SimulatedRanks:
    """A communicator of one process; each rank is a thread. The methods are mpi4py's and CuPy's."""

    def __init__(self, size: int) -> None:
        self._n_devices = size
        self._arrays = [None] * size
        self._barrier = Barrier(size, timeout=60)

    def rank(self, rank: int, xp):
        ranks = self

        def exchange(own, every):
            ranks._arrays[rank] = own
            ranks._barrier.wait()
            for other, array in enumerate(ranks._arrays):
                every[other] = array
            ranks._barrier.wait()

        class Host:
            Allgather = staticmethod(exchange)

            def Get_size(self):
                return ranks._n_devices

        class Gpu:
            _n_devices = ranks._n_devices

            def all_gather(self, own, every, count):
                assert count == own.size
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


@pytest.mark.gpu
def test_ranks_on_a_gpu_compare_their_calls_on_request_only(cupy):
    """Without ``check`` the two lists alone are exchanged, and nothing waits for the device."""
    case = SPECS["ties"].build()
    op, exchanged = operator(case), []

    class OneRank:
        _n_devices = 1

        def all_gather(self, own, every, count):
            exchanged.append((own.dtype, own.shape))
            every[0] = own

    index_topk_sharded(op, *case.to(cupy).args, comm=OneRank(), key_start=0)
    shape = case.tokens, case.spec.k
    assert exchanged == [(np.int32, shape), (np.float32, shape)]


@pytest.mark.gpu
def test_nccl(cupy):
    """NCCL itself, with one rank: several ranks need a process each."""
    nccl = pytest.importorskip("cupy.cuda.nccl")
    comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    for name in SPECS:
        check_shards(comm, 0, 1, cupy, name, True)


def test_wrong_communicators(xp):
    case = SPECS["few keys"].build()
    op, inputs = operator(case), case.to(xp).args

    def message(comm, *arrays):
        return message_of(lambda: index_topk_sharded(op, *arrays, comm=comm, key_start=0))

    for comm in (None, "mpi", object()):
        assert_helpful(message(comm, *inputs), "comm", type(comm).__name__)
    assert_helpful(message(SimulatedRanks(1).rank(0, np)), "q")
    if xp is not np:
        assert_helpful(message(SimulatedRanks(1).rank(0, np), *inputs), "q", "ndarray")
        assert_helpful(message(SimulatedRanks(1).rank(0, xp), *case.args), "q", "ndarray")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_mpi(size):
    """Real processes. OpenMPI refuses to run as root and on few cores unless told otherwise."""
    if shutil.which("mpiexec") is None or find_spec("mpi4py") is None:
        pytest.skip("needs mpiexec and mpi4py (apt-get install openmpi-bin; pip install mpi4py)")
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",  # containers forbid it
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = ["mpiexec", "-n", str(size), sys.executable, "-m", "mpi4py", str(PROGRAM)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{size} ranks passed" in run.stdout
