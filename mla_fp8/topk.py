"""Exact top-k selection on given scores, and merging of such selections."""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_fp8._backend import backend_of
from mla_fp8._check.arrays import Array, empty_beside, namespace_of
from mla_fp8._check.lists import check_lists
from mla_fp8._check.outputs import check_selection
from mla_fp8._check.parameters import K_RANGE, check_int, check_sort
from mla_fp8._check.problem import check_scores
from mla_fp8._check.streams import in_order


@in_order("scores")
def select_topk(
    scores: Any,
    lengths: Any = None,
    k: int = 2048,
    *,
    sort: str = "position",
    return_scores: bool = False,
    out: Any = None,
    check: bool | None = None,
    workspace: Any = None,
) -> Any:
    """Return the columns of the ``k`` largest scores of each row, exactly and deterministically.

    Parameters
    ----------
    scores : float32, [rows, columns]
        NaN ranks below every number, -0.0 equals 0.0, and among equals the smaller column is first.
    lengths : uint32 or int32, [rows], optional
        Row ``r`` has the columns ``0`` to ``lengths[r] - 1``; by default all of them.
    k : int
        Indices per row, 1 to 65536.
    sort : {"position", "score"}
        Order of a row: ascending column, or higher score first.
    return_scores : bool
        Return the scores as well, -inf beside each -1.
    out : array or tuple of arrays, optional
        Where to write: int32 [rows, k]; with ``return_scores`` a tuple of that and float32
        [rows, k].
    check : bool, optional
        Whether to raise on ``lengths`` outside of 0 to ``columns``; by default only on the host.
        Unchecked lengths are clamped.
    workspace : uint8, [bytes], optional
        Scratch memory, from `topk_workspace`. By default it is allocated for the call, if the rows
        are to be sorted by score. With it and ``out`` a call allocates nothing, and can be captured
        in a CUDA graph after one call outside. Concurrent calls must not share a workspace.

    Returns
    -------
    indices : int32, [rows, k]
        -1 after the first ``min(k, lengths[r])`` entries.
    scores : float32, [rows, k]
        Only with ``return_scores``.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it, and nothing has been written.
    RuntimeError
        If a CUDA graph is being captured and scratch memory is needed, but there is no
        ``workspace``.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import select_topk
    >>> scores = np.array([[0.5, 2.0, 1.0, 2.0], [3.0, 1.0, 4.0, 9.0]], np.float32)
    >>> select_topk(scores, k=2)
    array([[1, 3],
           [2, 3]], dtype=int32)
    >>> select_topk(scores, np.array([1, 3], np.int32), 2, sort="score", return_scores=True)
    (array([[ 0, -1],
           [ 2,  0]], dtype=int32), array([[ 0.5, -inf],
           [ 4. ,  3. ]], dtype=float32))
    """
    k = check_int("k", k, K_RANGE)
    inputs = check_scores(scores, lengths, check)
    selection = check_selection(inputs, k, sort, return_scores, out, workspace)
    scores = inputs["scores"]
    backend_of(namespace_of(scores)).select_topk(scores, inputs.get("lengths"), selection)
    return selection.results if out is None else out


@in_order("scores", written=True)
def topk_workspace(
    scores: Any,
    lengths: Any = None,
    k: int = 2048,
    *,
    sort: str = "position",
    return_scores: bool = False,
) -> Array:
    """Return scratch memory for `select_topk`, for one call at a time.

    Parameters
    ----------
    scores, lengths, k, sort, return_scores
        Those of the call. Only shapes and dtypes of the arrays matter.

    Returns
    -------
    uint8, [bytes]
        An array of the library of ``scores``, except that it is CuPy's for JAX, whose arrays
        cannot be written. It has 0 bytes on the host.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import select_topk, topk_workspace
    >>> scores, out = np.eye(3, dtype=np.float32), np.empty((3, 1), np.int32)
    >>> memory = topk_workspace(scores, k=1)
    >>> select_topk(scores, k=1, out=out, workspace=memory).ravel()
    array([0, 1, 2], dtype=int32)
    """
    k, by_score = check_int("k", k, K_RANGE), check_sort(sort)
    inputs = check_scores(scores, lengths, False)
    scores = inputs["scores"]
    size = backend_of(namespace_of(scores)).select_workspace_bytes(
        scores, inputs.get("lengths"), k, by_score, return_scores
    )
    return empty_beside(scores, (size,), np.uint8)


@in_order("indices")
def merge_topk(
    indices: Any,
    scores: Any,
    *,
    k: int | None = None,
    sort: str = "position",
    return_scores: bool = False,
    out: Any = None,
) -> Any:
    """Return the best ``k`` entries of each row of several lists: the top-k of sharded keys.

    If list ``r`` has the best ``min(k, keys)`` keys of shard ``r``, the result is what
    `MLAIndexerRaggedFloat8Paged` gives on all keys, bit for bit.

    Parameters
    ----------
    indices : int32, [lists, rows, width]
        Positions, in any order; the lists of several ranks in one array, as ``np.stack`` makes it.
        An entry with a negative position is padding, whatever its score. No position may be in two
        lists of a row. This is not checked: such a position may be in the result twice.
    scores : float32, [lists, rows, width]
        The score of each position. NaN ranks below every number, -0.0 equals 0.0, and among equals
        the smaller position is first.
    k : int, optional
        Indices per row, 1 to 65536; by default ``width``.
    sort : {"position", "score"}
        Order of a row: ascending position, or higher score first.
    return_scores : bool
        Return the scores as well, -inf beside each -1.
    out : array or tuple of arrays, optional
        Where to write: int32 [rows, k]; with ``return_scores`` a tuple of that and float32
        [rows, k]. With it a call allocates nothing, and can be captured in a CUDA graph after one
        call outside.

    Returns
    -------
    indices : int32, [rows, k]
        -1 after the last entry, if the lists have fewer than ``k``.
    scores : float32, [rows, k]
        Only with ``return_scores``.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it, and nothing has been written.

    Examples
    --------
    Two ranks hold the even and the odd positions of one sequence:

    >>> import numpy as np
    >>> from mla_fp8 import merge_topk
    >>> indices = np.array([[[0, 2, 6]], [[3, 5, -1]]], np.int32)
    >>> scores = np.array([[[1.0, 4.0, 2.0]], [[2.0, 8.0, -np.inf]]], np.float32)
    >>> merge_topk(indices, scores)
    array([[2, 3, 5]], dtype=int32)
    >>> merge_topk(indices, scores, k=2, sort="score", return_scores=True)
    (array([[5, 2]], dtype=int32), array([[8., 4.]], dtype=float32))
    """
    lists = check_lists(indices, scores)
    k = check_int("k", lists["indices"].shape[2] if k is None else k, K_RANGE)
    by_row = {name: array.swapaxes(0, 1) for name, array in lists.items()}  # results have its rows
    selection = check_selection(by_row, k, sort, return_scores, out, None)
    backend_of(namespace_of(lists["indices"])).merge_topk(*lists.values(), selection)
    return selection.results if out is None else out
