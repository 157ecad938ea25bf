"""What each MPI process runs: ``mpiexec -n 4 python -m mpi4py tests/mpi_program.py``.

An exception on one rank ends all processes, because of ``-m mpi4py``.
"""

import numpy as np
from mpi4py import MPI
from sharding import (
    SPECS,
    check_disagreement,
    check_late_rank,
    check_rows,
    check_rows_disagreement,
    check_shards,
)

comm = MPI.COMM_WORLD
for name in SPECS:
    for interleaved in (False, True):
        check_shards(comm, comm.rank, comm.size, np, name, interleaved)
for name in ("causal", "null", "no token"):  # threads run all of `sharding.ROWS`
    check_rows(comm, comm.rank, comm.size, np, name)
if comm.size > 1:
    check_disagreement(comm, comm.rank, comm.size, np)
    check_rows_disagreement(comm, comm.rank, comm.size, np)
    check_late_rank(comm, comm.rank, comm.size)
if comm.gather("passed") == ["passed"] * comm.size:
    print(f"{comm.size} ranks passed")
