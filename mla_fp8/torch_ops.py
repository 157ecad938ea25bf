"""The operation as operators of PyTorch, for use under ``torch.compile`` and in CUDA graphs.

Importing this module registers ``torch.ops.mla_fp8.index_topk``, ``index_scores`` and
``select_topk``. Each has a fake kernel, which tells the compiler the shapes of the results, and a
variant ``*_out``, which writes to tensors of the caller. The functions of this module call them.
Arguments and results are those of the functions of the same names in ``mla_fp8``, except that

- all arrays are tensors,
- ``k_max_lengths`` is a pair of integers or None: a tensor on the host would keep ``torch.compile``
  from using CUDA graphs,
- there is no ``workspace``. Scratch memory comes from torch's allocator. While torch captures a
  CUDA graph, this is the memory pool of the graph, so nothing else uses it between replays.

Before a capture, make one call of the same shapes outside: it compiles the kernels. ::

    @torch.compile(fullgraph=True)
    def attend(q, qs, hidden):
        chosen = torch_ops.index_topk(q, qs, offsets, blocks, lengths, table, (1, most), scales, 0,
                                      k=2048, output="slots")
        return attention(hidden, chosen)

The operators have no gradients. For an argument of the wrong type, such as an array that is no
tensor, torch raises a ``RuntimeError``; all other errors are those of the functions in ``mla_fp8``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mla_fp8._check.problem import Inputs
from mla_fp8._check.shape import MOST, rows_seen
from mla_fp8.functions import _operator_for
from mla_fp8.topk import select_topk as _select_topk
from mla_fp8.topk import topk_workspace

# The schemas. Options have no defaults here, because the functions below pass all of them.
_INPUTS = (
    "Tensor q, Tensor? qs, Tensor input_row_offsets, Tensor k_blocks, Tensor? k_cache_lengths, "
    "Tensor k_lookup_table, SymInt[]? k_max_lengths, Tensor k_scales, SymInt layer_idx, "
    "Tensor? k_total_lengths, Tensor? key_starts"
)
_KEYS = "str mask, SymInt kpool, SymInt? key_start, SymInt key_step, bool? check"
_ROWS = "str sort, bool return_scores"
_ARGUMENTS = {
    "index_topk": f"{_INPUTS}, *, SymInt k, str output, {_ROWS}, {_KEYS}",
    "index_scores": f"{_INPUTS}, *, {_KEYS}",
    "select_topk": f"Tensor scores, Tensor? lengths, SymInt k, *, {_ROWS}, bool? check",
}

_Bounds = Sequence[int] | None
_operators: dict[Any, Any] = {}  # by the extents and parameters that they follow from


def _is_captured(tensor: Tensor) -> bool:
    """Whether a call on this tensor is recorded in a CUDA graph."""
    return bool(tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _bounds_of(k_max_lengths: _Bounds, q: Tensor) -> tuple[int, int]:
    """The bounds of [new, cached] tokens. Without any, only the shapes of the arrays count."""
    if k_max_lengths is None:
        tokens = sum(q.shape[:1])  # 0 for a wrong q without axes
        return tokens, MOST - tokens
    if len(k_max_lengths) != 2:
        raise ValueError(f"k_max_lengths must be two integers; got {len(k_max_lengths)} of them")
    new, cached = k_max_lengths
    return new, cached


def _plain(results: list[Tensor]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _call(
    inputs: tuple[Any, ...], k: int, mask: str, kpool: int, key_start: int | None, key_step: int
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The operator of a call, its inputs, and the options that all methods take."""
    *first, k_max_lengths, k_scales, layer, k_total_lengths, key_starts = inputs
    bounds = [max(min(n, MOST), -1) for n in _bounds_of(k_max_lengths, first[0])]  # fit into int32
    inputs = *first, np.array([bounds], np.int32), k_scales, layer
    options = {
        "k_total_lengths": k_total_lengths,
        "key_start": key_start if key_starts is None else key_starts,
        "key_step": key_step,
    }
    form = first[0].shape[1:], k_scales.shape[-1:], k, mask, kpool
    if form not in _operators:  # looking it up here saves a fifth of the host time of a call
        _operators[form] = _operator_for(Inputs(*inputs), k, mask, kpool)
    return _operators[form], inputs, options


def _write_topk(
    out: list[Tensor] | None,
    *inputs: Any,
    k: int,
    output: str,
    sort: str,
    return_scores: bool,
    check: bool | None,
    **keys: Any,
) -> None:
    operator, inputs, options = _call(inputs, k, **keys)
    options |= {"output": output, "sort": sort, "return_scores": return_scores}
    memory = operator.workspace(*inputs, **options) if _is_captured(inputs[0]) else None
    operator(*inputs, **options, out=out and _plain(out), check=check, workspace=memory)


def _write_scores(out: Tensor | None, *inputs: Any, check: bool | None, **keys: Any) -> None:
    operator, inputs, options = _call(inputs, 1, **keys)
    memory = None
    if _is_captured(inputs[0]):
        memory = operator.workspace(*inputs, **options, for_scores=True)
    operator.scores(*inputs, **options, out=out, check=check, workspace=memory)


def _write_selected(
    out: list[Tensor] | None, scores: Tensor, lengths: Tensor | None, k: int, **options: Any
) -> None:
    check, memory = options.pop("check"), None
    if _is_captured(scores):
        memory = topk_workspace(scores, lengths, k, **options)
    _select_topk(
        scores, lengths, k, **options, out=out and _plain(out), check=check, workspace=memory
    )


# ---- results: the fake kernels, and the memory of the real ones


def _rows(first: Tensor, k: int, return_scores: bool, output: str = "positions") -> list[Tensor]:
    dtypes = [torch.int32] * (1 + (output == "both")) + [torch.float32] * return_scores
    return [first.new_empty((first.shape[0], k), dtype=dtype) for dtype in dtypes]


def _topk_results(
    q: Tensor, *_: Any, k: int, output: str, return_scores: bool, **__: Any
) -> list[Tensor]:
    return _rows(q, k, return_scores, output)


def _scores_result(
    q: Tensor, *inputs: Any, kpool: int, key_start: int | None, key_step: int, **_: Any
) -> Tensor:
    k_blocks, _lengths, k_lookup_table, k_max_lengths = inputs[2:6]
    visible = rows_seen(sum(_bounds_of(k_max_lengths, q)), kpool, key_start or 0, key_step)
    columns = min(k_lookup_table.shape[1] * k_blocks.shape[3], visible)
    return q.new_empty((q.shape[0], columns), dtype=torch.float32)


def _selected_results(
    scores: Tensor, lengths: Any, k: int, return_scores: bool, **_: Any
) -> list[Tensor]:
    return _rows(scores, k, return_scores)


def _register(name: str, write: Any, results: Any, result_type: str) -> None:
    """Register an operator that returns its results, and the variant that writes to ``out``."""

    def fresh(*inputs: Any, **options: Any) -> Any:
        try:
            out = results(*inputs, **options)
        except (IndexError, RuntimeError, ZeroDivisionError):
            write(None, *inputs, **options)  # if an argument is wrong, this error names it
            raise
        write(out, *inputs, **options)
        return out

    arguments, out_type = _ARGUMENTS[name], result_type.replace("Tensor", "Tensor(a!)")
    operator = torch.library.custom_op(
        f"mla_fp8::{name}", fresh, mutates_args=(), schema=f"({arguments}) -> {result_type}"
    )
    operator.register_fake(results)
    writer = torch.library.custom_op(
        f"mla_fp8::{name}_out",
        write,
        mutates_args=("out",),
        schema=f"({out_type} out, {arguments}) -> ()",
    )
    writer.register_fake(lambda *inputs, **options: None)


_register("index_topk", _write_topk, _topk_results, "Tensor[]")
_register("index_scores", _write_scores, _scores_result, "Tensor")
_register("select_topk", _write_selected, _selected_results, "Tensor[]")


# ---- the functions


def _listed(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def _starts(key_start: Any) -> tuple[int | None, Tensor | None]:
    """``key_start`` as the two arguments of the schema, which has no type for both."""
    if isinstance(key_start, Tensor):
        is_int = not (key_start.dim() or key_start.is_cuda or key_start.is_floating_point())
        return (int(key_start), None) if is_int else (None, key_start)
    return key_start, None


def index_topk(
    q: Tensor,
    qs: Tensor | None,
    input_row_offsets: Tensor,
    k_blocks: Tensor,
    k_cache_lengths: Tensor | None,
    k_lookup_table: Tensor,
    k_max_lengths: _Bounds,
    k_scales: Tensor,
    layer_idx: int,
    *,
    k: int,
    mask: str = "causal",
    kpool: int = 1,
    k_total_lengths: Tensor | None = None,
    key_start: Any = None,
    key_step: int = 1,
    output: str = "positions",
    out: Any = None,
    return_scores: bool = False,
    sort: str = "position",
    check: bool | None = None,
) -> Any:
    """Return the top-k key positions of every token, as `mla_fp8.index_topk` does.

    Parameters
    ----------
    q : float8_e4m3fn or uint8, [total_seq_len, num_heads, depth]
        Queries; their device and stream are those of the call.
    qs, input_row_offsets, k_blocks, k_cache_lengths, k_lookup_table, k_scales, layer_idx
        See `mla_fp8.MLAIndexerRaggedFloat8Paged.execute`.
    k_max_lengths : pair of int, or None
        Upper bounds of new and of cached tokens over the batch. None: they follow from the shapes
        of the arrays. Results are the same, but some launches may find nothing to do.
    k, mask, kpool
        Parameters of the operator, see `mla_fp8.index_topk`.
    k_total_lengths, key_start, key_step, output, return_scores, sort, check
        See `mla_fp8.MLAIndexerRaggedFloat8Paged.__call__`.
    out : tensor or tuple of tensors, optional
        Where to write; see `mla_fp8.MLAIndexerRaggedFloat8Paged.__call__`.

    Returns
    -------
    indices : int32, [total_seq_len, k]
        Positions, or slots with ``output="slots"``.
    slots : int32, [total_seq_len, k]
        Only with ``output="both"``.
    scores : float32, [total_seq_len, k]
        Only with ``return_scores``.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it, and nothing has been written.

    Examples
    --------
    >>> import torch
    >>> from mla_fp8 import PagedKeyCache, torch_ops
    >>> cache = PagedKeyCache.from_dense([torch.arange(1.0, 5)[:, None] * torch.ones(32)])
    >>> blocks, lengths, table, maxima, scales, layer = cache.view()
    >>> arrays = blocks.view("uint8"), lengths.view("int32"), table.view("int32"), scales
    >>> blocks, lengths, table, scales = map(torch.from_numpy, arrays)
    >>> q = torch.full((4, 2, 32), 0x38, dtype=torch.uint8)  # 1.0 in E4M3
    >>> offsets = torch.tensor([0, 4], dtype=torch.int32)
    >>> qs = torch.full((4, 2), 0.5)
    >>> torch_ops.index_topk(q, qs, offsets, blocks, lengths, table, (4, 0), scales, 0, k=2)
    tensor([[ 0, -1],
            [ 0,  1],
            [ 1,  2],
            [ 2,  3]], dtype=torch.int32)
    """
    start, starts = _starts(key_start)
    cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
    inputs = q, qs, input_row_offsets, *cached, k_total_lengths, starts
    keys = {"mask": mask, "kpool": kpool, "key_start": start, "key_step": key_step}
    rows = {"output": output, "sort": sort, "return_scores": return_scores}
    options = {"k": k, "check": check} | rows | keys
    if out is None:
        return _plain(torch.ops.mla_fp8.index_topk(*inputs, **options))
    torch.ops.mla_fp8.index_topk_out(_listed(out), *inputs, **options)
    return out


def index_scores(
    q: Tensor,
    qs: Tensor | None,
    input_row_offsets: Tensor,
    k_blocks: Tensor,
    k_cache_lengths: Tensor | None,
    k_lookup_table: Tensor,
    k_max_lengths: _Bounds,
    k_scales: Tensor,
    layer_idx: int,
    *,
    mask: str = "causal",
    kpool: int = 1,
    k_total_lengths: Tensor | None = None,
    key_start: Any = None,
    key_step: int = 1,
    out: Tensor | None = None,
    check: bool | None = None,
) -> Tensor:
    """Return the scores of all keys as a dense matrix, as `mla_fp8.index_scores` does.

    Parameters
    ----------
    q, ..., layer_idx
        See `index_topk`.
    mask, kpool, k_total_lengths, key_start, key_step, check
        See `mla_fp8.index_scores`.
    out : float32, [total_seq_len, max_keys], optional
        Where to write.

    Returns
    -------
    scores : float32, [total_seq_len, max_keys]
        -inf where the token does not see the key; for ``max_keys`` see
        `mla_fp8.MLAIndexerRaggedFloat8Paged.scores`.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it, and nothing has been written.

    Examples
    --------
    >>> import torch
    >>> from mla_fp8 import torch_ops
    >>> blocks = torch.full((1, 1, 1, 4, 1, 32), 0x38, dtype=torch.uint8)  # 1.0 in E4M3
    >>> q, scales = blocks.view(4, 1, 32)[:2], torch.ones(1, 1, 1, 4, 1, 1)
    >>> offsets, lengths, table = torch.tensor([[0, 2], [1, 0], [0, 0]], dtype=torch.int32)
    >>> torch_ops.index_scores(
    ...     q, None, offsets, blocks, lengths[:1], table[None, :1], (2, 1), scales, 0
    ... )
    tensor([[32., 32., -inf],
            [32., 32., 32.]])
    """
    start, starts = _starts(key_start)
    cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
    inputs = q, qs, input_row_offsets, *cached, k_total_lengths, starts
    keys = {"mask": mask, "kpool": kpool, "key_start": start, "key_step": key_step}
    options = keys | {"check": check}
    if out is None:
        scores: Tensor = torch.ops.mla_fp8.index_scores(*inputs, **options)
        return scores
    torch.ops.mla_fp8.index_scores_out(out, *inputs, **options)
    return out


def select_topk(
    scores: Tensor,
    lengths: Tensor | None = None,
    k: int = 2048,
    *,
    sort: str = "position",
    return_scores: bool = False,
    out: Any = None,
    check: bool | None = None,
) -> Any:
    """Return the columns of the ``k`` largest scores of each row, as `mla_fp8.select_topk` does.

    Parameters
    ----------
    scores, lengths, k, sort, return_scores, out, check
        See `mla_fp8.select_topk`.

    Returns
    -------
    indices : int32, [rows, k]
    scores : float32, [rows, k]
        Only with ``return_scores``.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it, and nothing has been written.

    Examples
    --------
    >>> import torch
    >>> from mla_fp8 import torch_ops
    >>> torch_ops.select_topk(torch.tensor([[0.5, 2.0, 1.0, 2.0]]), k=2)
    tensor([[1, 3]], dtype=torch.int32)
    """
    options = {"sort": sort, "return_scores": return_scores, "check": check}
    if out is None:
        return _plain(torch.ops.mla_fp8.select_topk(scores, lengths, k, **options))
    torch.ops.mla_fp8.select_topk_out(_listed(out), scores, lengths, k, **options)
    return out
