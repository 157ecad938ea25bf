"""Several processes, each with one GPU: in decode they share the keys, in prefill the tokens.

mpiexec -n 2 python examples/two_gpus.py    or    torchrun --nproc-per-node 2 examples/two_gpus.py

Any number of processes works, if each has a GPU. GPUs need NCCL (pip install nvidia-nccl-cu13, or
-cu12). Without a GPU, mpiexec runs this on NumPy and MPI (pip install mpi4py).
"""

import numpy as np

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8
from mla_fp8.distributed import (
    index_topk_sharded,
    index_topk_split_rows,
    nccl_communicator,
    rank_of_process,
)

try:
    import cupy as xp

    if not xp.is_available():
        raise ImportError
except ImportError:
    xp = np

rank, size, gpu = rank_of_process()  # as torchrun or mpiexec told this process


class Alone:
    """The methods of an MPI communicator that are needed, for a single process."""

    def Get_size(self):
        return 1

    def Get_rank(self):
        return 0

    def Allgather(self, own, every):
        every[0] = own


if xp is not np:
    if gpu >= (count := xp.cuda.runtime.getDeviceCount()):
        raise SystemExit(f"each process needs a GPU; this host has {count} for process {gpu}")
    xp.cuda.Device(gpu).use()
    comm = nccl_communicator(timeout=60)  # an error if a process has not come by then
elif size == 1:
    comm = Alone()
else:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.size != size:
        raise SystemExit("without GPUs start this with mpiexec")

HEADS, DEPTH, K = 8, 128, 256
rng = np.random.default_rng(0)  # every process draws the same numbers
op = MLAIndexerRaggedFloat8Paged(num_heads=HEADS, depth=DEPTH, k=K)
keys = rng.standard_normal((3000, DEPTH), np.float32)


def queries(new):
    """FP8 queries of ``new`` tokens with their gates, and the offsets of one sequence."""
    q, scales = fp8.quantize(rng.standard_normal((new, HEADS, DEPTH), np.float32))
    gates = scales[..., 0] * rng.standard_normal((new, HEADS)).astype(np.float32)
    return xp.asarray(q.view(np.uint8)), xp.asarray(gates), xp.asarray([0, new], dtype=np.uint32)


def cached(part, new):
    """A cache with a part of the keys; lengths are those of the whole sequence."""
    lengths = xp.asarray([len(keys) - new], dtype=np.uint32)
    bounds = np.array([[new, len(keys) - new]], np.uint32)
    view = PagedKeyCache.from_dense([xp.asarray(part)]).view()
    return view._replace(k_cache_lengths=lengths, k_max_lengths=bounds)


# Decode: rank r holds the keys r, r + size, ... Ranks exchange lists of k positions and scores.
first = queries(new=1)
found = index_topk_sharded(
    op,
    *first,
    *cached(keys[rank::size], new=1),
    comm=comm,
    key_start=rank,
    key_step=size,
    timeout=60,  # seconds, after which a rank that does not answer is an error
)
assert (found == op(*first, *cached(keys, new=1))).all()

# Prefill: every rank holds all keys and computes some of the tokens. Ranks exchange the results.
many = queries(new=100)
found = index_topk_split_rows(op, *many, *cached(keys, new=100), comm=comm, timeout=60)
assert (found == op(*many, *cached(keys, new=100))).all()

if rank == 0:
    processes = f"{size} process{'es' * (size > 1)}"
    print(f"{processes} on {xp.__name__}: decode by keys and prefill by rows give what one gives")
    if size == 1:
        print("mpiexec -n 2 python examples/two_gpus.py starts two processes")
