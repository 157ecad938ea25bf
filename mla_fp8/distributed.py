"""The indexer on several ranks, which share the keys or the query tokens of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.arrays import Array, empty_beside, namespace_of
from mla_fp8._check.interop import as_array
from mla_fp8._check.parameters import SORTS, check_bool, check_sort
from mla_fp8._check.problem import Inputs, Problem
from mla_fp8._check.streams import in_order
from mla_fp8._check.values import wants_check
from mla_fp8._ranks import Ranks, Wait, check_timeout, ranks_of
from mla_fp8._rendezvous import ProcessRank as ProcessRank
from mla_fp8._rendezvous import nccl_communicator as nccl_communicator
from mla_fp8._rendezvous import rank_of_process as rank_of_process
from mla_fp8._rows import Pieces, call_of_rank
from mla_fp8.topk import merge_topk


class _Call(NamedTuple):
    """The form of a rank's call, in whole numbers: the same on all ranks, or an error."""

    failed: int
    tokens: int = 0
    k: int = 0
    key_step: int = 0  # 0: all keys are on every rank
    sort: int = 0  # place in `SORTS`
    gather: int = 1
    return_scores: int = 1


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
    timeout: float | None = None,
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
        See the operator's call. The workspace serves that call alone: this function also
        allocates memory for the lists of all ranks.
    check : bool, optional
        See the operator's call. If values are checked, the ranks also compare their calls, which
        on a GPU waits for the device. All ranks must pass the same value.
    timeout : float, optional
        Seconds that a rank waits for the others in each exchange. The host then waits until the
        lists have come, and no CUDA graph can be captured. None: a call on a GPU does not wait, and
        a call on the host waits as long as it takes.

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
    TimeoutError, ConnectionError
        With ``timeout``: if another rank did not call in time, or NCCL finds that it has ended.
        Then NCCL's communicator is aborted. Make a new one, or end the process.

    Notes
    -----
    If the ranks do not compare their calls, which is the default on a GPU, a rank whose call fails
    leaves the others waiting, and ranks that disagree get undefined results. So pass
    ``check=True`` with the first call of each shape, and a ``timeout``. What has been captured in
    a CUDA graph uses memory of the allocator that was current then (see the page on CUDA graphs).

    Examples
    --------
    Interleaved keys: rank ``r`` of ``R`` holds the positions ``r``, ``r + R``, ``r + 2 R``, ...::

        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        index_topk_sharded(op, *inputs, comm=comm, key_start=comm.rank, key_step=comm.size)
    """
    ranks, wait = ranks_of(comm), Wait("index_topk_sharded", check_timeout(timeout))
    with _agreement(ranks, check, wait) as announce:
        by_score = check_sort(sort)
        _check_library(ranks, inputs)
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
        announce(_Call(0, tokens, k, key_step, by_score))
    lists = _gathered(own, ranks, wait)
    return merge_topk(*lists, sort=sort, return_scores=return_scores)


@in_order("inputs")
def index_topk_split_rows(
    op: Any,
    *inputs: Any,
    comm: Any,
    gather: bool = True,
    k_total_lengths: Any = None,
    return_scores: bool = False,
    sort: str = "position",
    check: bool | None = None,
    workspace: Any = None,
    timeout: float | None = None,
) -> Any:
    """Return the top-k key positions of every token, where each rank finds those of some tokens.

    It is for prefill. Every rank holds all keys. All ranks call this function together, with the
    same queries, and each gets what the operator gives, bit for bit.

    Parameters
    ----------
    op : MLAIndexerRaggedFloat8Paged
        The operator, with the same parameters on every rank.
    *inputs
        ``q, ..., layer_idx`` of the operator's call, in its order. Every rank passes them for the
        whole call. Ranks may keep a page in different blocks.
    comm : communicator
        See `index_topk_sharded`.
    gather : bool
        Whether every rank gets the rows of all tokens. If not, each rank gets the rows of the
        tokens that it has, see `tokens_of_rank`, and no result travels.
    k_total_lengths, return_scores, sort
        See the operator's call.
    check, timeout
        See `index_topk_sharded`.
    workspace : uint8, [bytes], optional
        Scratch memory, from `split_rows_workspace`. It serves the operator's call alone: this
        function also allocates memory for results and for copies of the rank's queries.

    Returns
    -------
    indices : int32, [total_seq_len, k]
        The same on all ranks, in the library of ``q``. With ``gather=False``: [tokens of the rank,
        k].
    scores : float32, of the same shape
        Only with ``return_scores``.

    Raises
    ------
    ValueError, TypeError, RuntimeError, TimeoutError, ConnectionError
        See `index_topk_sharded`.

    Notes
    -----
    The tokens of the batch are cut into ``2 R`` pieces of equal length for ``R`` ranks. Rank ``r``
    has piece ``r``, which is early, and piece ``2 R - 1 - r``, which is late, because a late causal
    token sees more keys than an early one. So ranks have equal work in prefill of one sequence,
    however many tokens are cached, and nearly equal work for sequences of equal lengths.

    On a GPU nothing is read back: a rank's offsets and lengths are computed there.

    Examples
    --------
    ::

        from mpi4py import MPI

        index_topk_split_rows(op, *inputs, comm=MPI.COMM_WORLD)
    """
    ranks, wait = ranks_of(comm), Wait("index_topk_split_rows", check_timeout(timeout))
    with _agreement(ranks, check, wait) as announce:
        options = {"sort": sort, "return_scores": check_bool("return_scores", return_scores)}
        by_score, gather = check_sort(sort), check_bool("gather", gather)
        _check_library(ranks, inputs)
        problem = _problem_of(op, inputs, k_total_lengths, check)
        pieces = Pieces(problem.shape.total_seq_len, ranks.rank, ranks.size)
        own = [empty_beside(problem.q, (2 * pieces.length, op.k), np.int32)]
        if return_scores:
            own.append(empty_beside(problem.q, own[0].shape, np.float32))
        parts = [array[: pieces.tokens_of_rank] for array in own]
        arguments, totals = call_of_rank(problem, inputs[6], pieces)
        out = tuple(parts) if return_scores else parts[0]
        more = {"out": out, "check": False, "workspace": workspace}
        op(*arguments, k_total_lengths=totals, **options, **more)
        announce(_Call(0, pieces.tokens, op.k, 0, by_score, gather, return_scores))
    if gather:
        parts = [pieces.in_order(every) for every in _gathered(own, ranks, wait)]
    return tuple(parts) if return_scores else parts[0]


@in_order("inputs", written=True)
def split_rows_workspace(
    op: Any, *inputs: Any, comm: Any, k_total_lengths: Any = None, **options: Any
) -> Array:
    """Return scratch memory for `index_topk_split_rows` on this rank, for one call at a time.

    Parameters
    ----------
    op, *inputs, comm, k_total_lengths
        The arguments of the call. If they are on a GPU, only shapes and dtypes matter.
    **options
        ``return_scores`` and ``sort`` of the call.

    Returns
    -------
    uint8, [bytes]
        See `MLAIndexerRaggedFloat8Paged.workspace`.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it.
    """
    ranks = ranks_of(comm)
    problem = _problem_of(op, inputs, k_total_lengths, False)
    pieces = Pieces(problem.shape.total_seq_len, ranks.rank, ranks.size)
    arguments, totals = call_of_rank(problem, inputs[6], pieces)
    size = op.scratch_bytes(*arguments, k_total_lengths=totals, **options)
    return empty_beside(problem.q, (size,), np.uint8)


def tokens_of_rank(total_seq_len: int, rank: int, size: int) -> tuple[slice, slice]:
    """Return the tokens that a rank has in `index_topk_split_rows`, as two slices of the batch.

    Examples
    --------
    >>> from mla_fp8.distributed import tokens_of_rank
    >>> tokens_of_rank(10, rank=0, size=2)
    (slice(0, 3, None), slice(9, 10, None))
    """
    return Pieces(total_seq_len, rank, size).of_rank


def _check_library(ranks: Ranks, inputs: tuple[Any, ...]) -> None:
    """Raise if the communicator is for arrays on a GPU and ``q`` is on the host, or vice versa."""
    q = as_array("q", inputs[0] if inputs else None)
    if namespace_of(q) is not ranks.xp:
        where = "on the host" if ranks.xp is np else "on a GPU"
        raise TypeError(f"q must be {where} for this comm; got {type(q).__name__}")


def _problem_of(
    op: Any, inputs: tuple[Any, ...], k_total_lengths: Any, check: bool | None
) -> Problem:
    """The whole call, checked."""
    if len(inputs) != len(names := Inputs._fields[:9]):
        raise TypeError(f"the inputs must be {', '.join(names)}; got {len(inputs)} of them")
    problem: Problem = op._problem(Inputs(*inputs)._replace(k_total_lengths=k_total_lengths), check)
    return problem


@contextmanager
def _agreement(ranks: Ranks, check: bool | None, wait: Wait) -> Iterator[Callable[[_Call], None]]:
    """Compare the calls of all ranks, once the body has made this rank's.

    The body gets a function and passes the form of its call to it. If ``check`` asks for it, the
    ranks tell one another these forms, or that the body has failed.
    """
    compares, calls = wants_check(check, ranks.xp), list[_Call]()
    try:
        yield calls.append
    except Exception:
        if compares:
            _compare(ranks, _Call(failed=1), wait)
        raise
    if compares:
        _compare(ranks, calls[0], wait)


def _gathered(own: list[Array], ranks: Ranks, wait: Wait) -> list[Array]:
    """These arrays of all ranks, each as [ranks, ...]."""
    every = [empty_beside(array, (ranks.size, *array.shape), array.dtype) for array in own]
    ranks.gather(list(zip(own, every, strict=True)), wait)
    return every


def _compare(ranks: Ranks, call: _Call, wait: Wait) -> None:
    """Raise if the call of another rank has failed, or if the calls differ."""
    (every,) = _gathered([ranks.xp.array(call, np.int64)], ranks, wait)
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
