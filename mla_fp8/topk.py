"""Exact top-k selection on given scores: the second half of the operation, by itself."""

from __future__ import annotations

from typing import Any

from mla_fp8._backend import backend_of
from mla_fp8._check import problem as _problem
from mla_fp8._check.parameters import MAX_K, check_int, check_sort
from mla_fp8._streams import in_order


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
) -> Any:
    """Return the columns of the ``k`` largest scores of each row, exactly and deterministically.

    Parameters
    ----------
    scores : float32, [rows, columns]
        NaN ranks below every number, -0.0 equals 0.0, and among equals the smaller column is first.
    lengths : uint32 or int32, [rows], optional
        Row ``r`` has the columns ``0`` to ``lengths[r] - 1``; all of them by default.
    k : int
        Indices per row, 1 to 65536.
    sort : {"position", "score"}
        Ascending column, or the order of the scores.
    return_scores : bool
        Return the scores as well, -inf beside each -1.
    out : array or tuple of arrays, optional
        Where to write: int32 [rows, k], with ``return_scores`` a tuple of it and float32 [rows, k].
    check : bool, optional
        Whether to raise on ``lengths`` beyond the columns; by default on the host only. Unchecked
        they are clamped.

    Returns
    -------
    indices : int32, [rows, k]
        -1 after the first ``min(k, lengths[r])`` entries.
    scores : float32, [rows, k]
        Only with ``return_scores``.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong; it is named, and nothing has been written.
    """
    k = check_int("k", k, range(1, MAX_K + 1))
    xp, scores, lengths = _problem.selection_input(scores, lengths, check)
    inputs = {"scores": scores} if lengths is None else {"scores": scores, "lengths": lengths}
    selection = _problem.selection(scores.shape[0], k, check_sort(sort), out, return_scores, inputs)
    backend_of(xp).select_topk(scores, lengths, selection)
    if out is not None:
        return out
    return (selection.indices, selection.values) if return_scores else selection.indices
