"""Keys that are spread over ranks: each rank selects from its keys, and all get the same answer.

With several processes they are the ranks. In a single process, the example plays all ranks itself.

mpiexec -n 4 python examples/sharded.py     or     python examples/sharded.py
"""

import numpy as np

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8, merge_topk

try:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
except (ImportError, RuntimeError):  # RuntimeError: mpi4py without an MPI library
    comm = None
real = comm is not None and comm.size > 1
ranks = comm.size if real else 3

HEADS, DEPTH, K, NEW = 8, 128, 16, 2
LENGTHS = [500, 37]  # tokens cached before this call
rng = np.random.default_rng(0)  # every rank draws the same numbers
keys = [rng.standard_normal((n + NEW, DEPTH), np.float32) for n in LENGTHS]
q, q_scales = fp8.quantize(rng.standard_normal((2 * NEW, HEADS, DEPTH), np.float32))
qs = q_scales[..., 0] * np.float32(DEPTH**-0.5)
op = MLAIndexerRaggedFloat8Paged(num_heads=HEADS, depth=DEPTH, k=K)

# Lengths and offsets are those of the whole sequences, on every rank.
offsets = np.array([0, NEW, 2 * NEW], np.int32)
lengths = np.array(LENGTHS, np.int32)
bounds = np.array([[NEW, max(LENGTHS)]], np.int32)


def inputs_of(rank, ranks):
    """The operator's inputs on a rank that holds the positions rank, rank + ranks, ..."""
    cache = PagedKeyCache.from_dense([key[rank::ranks] for key in keys])
    blocks, _, table, _, scales, layer = cache.view()
    return q, qs, offsets, blocks, lengths, table, bounds, scales, layer


whole = op(*inputs_of(0, 1), sort="score", return_scores=True)  # one rank with all keys

if real:
    from mla_fp8.distributed import index_topk_sharded

    found = index_topk_sharded(
        op,
        *inputs_of(comm.rank, ranks),
        comm=comm,
        key_start=comm.rank,
        key_step=ranks,
        sort="score",
        return_scores=True,
    )
else:  # what `index_topk_sharded` does: select, gather the lists of all ranks, merge
    lists = [
        op(*inputs_of(rank, ranks), key_start=rank, key_step=ranks, return_scores=True)
        for rank in range(ranks)
    ]
    indices, scores = map(np.stack, zip(*lists, strict=True))
    print("lists of the ranks:", indices.shape)
    found = merge_topk(indices, scores, sort="score", return_scores=True)

# Positions and scores are those of the unsharded call, bit for bit.
for ours, theirs in zip(found, whole, strict=True):
    assert ours.tobytes() == theirs.tobytes()
if not real or comm.rank == 0:
    print("best positions of the last token:", found[0][-1, :8])
    print(f"{ranks} ranks give what one gives")
