"""The indexer on keys that are spread over ranks: each rank selects, and all lists are merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import Array, empty_beside, namespace_of
from mla_fp8._check.interop import as_array
from mla_fp8._check.parameters import SORTS, check_sort
from mla_fp8._check.streams import in_order
from mla_fp8._check.values import wants_check
from mla_fp8.topk import merge_topk

_NCCL_UINT8 = 1  # ncclUint8 of nccl.h


class _Call(NamedTuple):
    """The form of a rank's call, in whole numbers. Ranks that have not failed have the same."""

    failed: int
    tokens: int = 0
    k: int = 0
    key_step: int = 0
    sort: int = 0  # place in `SORTS`


class _Ranks(NamedTuple):
    """A communicator, whichever library it is of."""

    xp: Any  # numpy or cupy: whose arrays it takes
    size: int
    gather: Callable[[Array, Array], object]  # from an array of each rank to [ranks, ...]


@in_order("inputs")
def index_topk_sharded(
    op: Any,
    *inputs: Any,
    comm: Any,
    key_start: Any,
    key_step: int = 1,
    k_total_lengths: Any = None,
    return_scores: bool = False,
    sort: str = "position",
    check: bool | None = None,
    workspace: Any = None,
) -> Any:
    """Return the top-k key positions of every token, over the keys of all ranks.

    Each rank holds a shard of every sequence's keys. All ranks call this function together, with
    the same queries, and each gets what the operator gives on all keys, bit for bit.

    Parameters
    ----------
    op : MLAIndexerRaggedFloat8Paged
        The operator, with the same parameters on every rank.
    *inputs
        ``q, ..., layer_idx`` of the operator's call, in its order. The pages hold this rank's keys.
        Lengths and ``k_max_lengths`` count the tokens of the whole sequences. A contiguous shard
        that is not the last of its sequence must end where a page ends, and table entries after
        that page must be 4294967295 (or -1).
    comm : communicator
        For arrays on the host: an mpi4py communicator. For arrays on a GPU: CuPy's
        ``cupyx.distributed.NCCLBackend`` or ``cupy.cuda.nccl.NcclCommunicator``; its GPU must be
        CuPy's current device.
    key_start : int, or uint32 or int32 [batch]
        The position of this rank's first key in each sequence. For interleaved keys: the number of
        this rank.
    key_step : int
        The distance between the positions of two successive keys of this rank: 1 for contiguous
        shards, the number of ranks for interleaved keys.
    k_total_lengths, return_scores, sort, workspace
        See the operator's call. The workspace serves that call; this function also allocates
        memory for the lists of all ranks.
    check : bool, optional
        See the operator's call. If values are checked, the ranks also compare their calls, which
        on a GPU waits for the device. All ranks must pass the same value.

    Returns
    -------
    indices : int32, [total_seq_len, k]
        The same on all ranks, in the library of ``q``.
    scores : float32, [total_seq_len, k]
        Only with ``return_scores``.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong, on the rank that has it. If ranks disagree, on all ranks.
    RuntimeError
        If the call of another rank has failed.

    Notes
    -----
    If the ranks do not compare their calls, which is the default on a GPU, a rank whose call fails
    leaves the others waiting, and ranks that disagree get undefined results. So pass
    ``check=True`` with the first call of each shape.

    Examples
    --------
    Interleaved keys: rank ``r`` of ``R`` holds the positions ``r``, ``r + R``, ``r + 2 R``, ...::

        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        index_topk_sharded(op, *inputs, comm=comm, key_start=comm.rank, key_step=comm.size)
    """
    ranks, call, own, failure = _ranks_of(comm), _Call(failed=1), [], None
    try:
        by_score, q = check_sort(sort), as_array("q", inputs[0] if inputs else None)
        if namespace_of(q) is not ranks.xp:
            where = "on the host" if ranks.xp is np else "on a GPU"
            raise TypeError(f"q must be {where} for this comm; got {type(q).__name__}")
        found = op(
            *inputs,
            key_start=key_start,
            key_step=key_step,
            k_total_lengths=k_total_lengths,
            return_scores=True,
            check=check,
            workspace=workspace,
        )
        own = [as_array("the operator's result", array) for array in found]
        tokens, k = own[0].shape
        call = _Call(0, tokens, k, key_step, by_score)
    except Exception as error:  # raised when the other ranks know
        failure = error
    if wants_check(check, ranks.xp):
        _compare(ranks, call)
    if failure is not None:
        raise failure
    lists = [empty_beside(array, (ranks.size, *array.shape), array.dtype) for array in own]
    for array, gathered in zip(own, lists, strict=True):
        ranks.gather(array, gathered)
    return merge_topk(*lists, sort=sort, return_scores=return_scores)


def _ranks_of(comm: Any) -> _Ranks:
    """The ranks of a communicator of mpi4py or CuPy, recognised by its method."""
    if hasattr(comm, "Allgather"):
        return _Ranks(np, comm.Get_size(), comm.Allgather)
    if hasattr(comm, "all_gather"):
        import cupy

        size = comm._n_devices  # CuPy has no public name for it
        return _Ranks(cupy, size, lambda own, every: comm.all_gather(own, every, own.size))
    if hasattr(comm, "allGather"):
        import cupy

        def gather(own: Array, every: Array) -> None:
            stream = cupy.cuda.get_current_stream().ptr
            comm.allGather(own.data.ptr, every.data.ptr, own.nbytes, _NCCL_UINT8, stream)

        return _Ranks(cupy, comm.size(), gather)
    raise TypeError(
        "comm must be a communicator of mpi4py, or an NCCLBackend or NcclCommunicator of CuPy; "
        f"got {type(comm).__name__}"
    )


def _compare(ranks: _Ranks, call: _Call) -> None:
    """Raise if the call of another rank has failed, or if the calls differ."""
    own = ranks.xp.array(call, np.int64)
    every = ranks.xp.empty((ranks.size, own.size), np.int64)
    ranks.gather(own, every)
    if call.failed:  # the rank raises its own error
        return
    calls = list(map(_Call._make, every.tolist()))
    if failed := [rank for rank, other in enumerate(calls) if other.failed]:
        raise RuntimeError(f"the calls of all ranks must succeed; got errors on ranks {failed}")
    for name in _Call._fields:
        found = [getattr(other, name) for other in calls]
        if len(set(found)) > 1:
            names = [SORTS[number] for number in found] if name == "sort" else found
            raise ValueError(f"{name} must be the same on all ranks; got {names}")
