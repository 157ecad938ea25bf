"""`index_topk` and `index_scores`: the operator, with parameters taken from the arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mla_fp8._check.parameters import K_RANGE, KPOOL_RANGE, Mask, check_int, check_mask
from mla_fp8._check.problem import Inputs, extents_of, forms_of
from mla_fp8.indexer import MLAIndexerRaggedFloat8Paged


def _operator_for(inputs: Inputs, k: Any, mask: Any, kpool: Any) -> MLAIndexerRaggedFloat8Paged:
    """The operator with the parameters that the shapes of the inputs imply."""
    k, kpool = check_int("k", k, K_RANGE), check_int("kpool", kpool, KPOOL_RANGE)
    return _operator(k, check_mask(mask), kpool, *forms_of(inputs))


@lru_cache(maxsize=256)
def _operator(k: int, mask: Mask, kpool: int, *forms: Any) -> MLAIndexerRaggedFloat8Paged:
    num_heads, depth, granularity = extents_of(*forms)
    return MLAIndexerRaggedFloat8Paged(num_heads, depth, k, granularity, mask, kpool)


def index_topk(
    q: Any,
    qs: Any,
    input_row_offsets: Any,
    k_blocks: Any,
    k_cache_lengths: Any,
    k_lookup_table: Any,
    k_max_lengths: Any,
    k_scales: Any,
    layer_idx: Any,
    *,
    k: int,
    mask: Mask | str = Mask.CAUSAL,
    kpool: int = 1,
    k_total_lengths: Any = None,
    key_start: Any = None,
    key_step: int = 1,
    output: str = "positions",
    out: Any = None,
    return_scores: bool = False,
    sort: str = "position",
    check: bool | None = None,
    workspace: Any = None,
) -> Any:
    """Return the top-k key positions of every token.

    It calls the `MLAIndexerRaggedFloat8Paged` whose ``num_heads`` and ``depth`` are extents of
    ``q`` and whose granularity follows from the last extent of ``k_scales``.

    Parameters
    ----------
    q, ..., layer_idx
        See `MLAIndexerRaggedFloat8Paged.execute`.
    k : int
        Indices per token, 1 to 65536.
    mask : {"causal", "null"} or Mask
        Which keys a token sees.
    kpool : int
        Tokens that a cached row stands for.
    k_total_lengths, key_start, key_step, output, out, return_scores, sort, check, workspace
        See `MLAIndexerRaggedFloat8Paged.__call__`.

    Returns
    -------
    indices : int32, [total_seq_len, k]
    slots : int32, [total_seq_len, k]
        Only with ``output="both"``.
    scores : float32, [total_seq_len, k]
        Only with ``return_scores``.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        See `MLAIndexerRaggedFloat8Paged.__call__`.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import PagedKeyCache, index_topk
    >>> keys = np.arange(1, 5, dtype=np.float32)[:, None] * np.ones(32, np.float32)
    >>> cache = PagedKeyCache.from_dense([keys])
    >>> q = np.full((4, 2, 32), 0x38, np.uint8)  # 1.0 in E4M3
    >>> qs = np.full((4, 2), 0.5, np.float32)
    >>> index_topk(q, qs, cache.input_row_offsets, *cache.view(), k=3, sort="score")
    array([[ 0, -1, -1],
           [ 1,  0, -1],
           [ 2,  1,  0],
           [ 3,  2,  1]], dtype=int32)
    """
    cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
    inputs = Inputs(q, qs, input_row_offsets, *cached)
    return _operator_for(inputs, k, mask, kpool)(
        *inputs[:9],
        k_total_lengths=k_total_lengths,
        key_start=key_start,
        key_step=key_step,
        output=output,
        out=out,
        return_scores=return_scores,
        sort=sort,
        check=check,
        workspace=workspace,
    )


def index_scores(
    q: Any,
    qs: Any,
    input_row_offsets: Any,
    k_blocks: Any,
    k_cache_lengths: Any,
    k_lookup_table: Any,
    k_max_lengths: Any,
    k_scales: Any,
    layer_idx: Any,
    *,
    mask: Mask | str = Mask.CAUSAL,
    kpool: int = 1,
    k_total_lengths: Any = None,
    key_start: Any = None,
    key_step: int = 1,
    out: Any = None,
    check: bool | None = None,
    workspace: Any = None,
) -> Any:
    """Return the scores of all keys as a dense matrix.

    It calls `MLAIndexerRaggedFloat8Paged.scores` with the parameters that the arrays imply, as
    `index_topk` does.

    Parameters
    ----------
    q, ..., layer_idx
        See `MLAIndexerRaggedFloat8Paged.execute`.
    mask : {"causal", "null"} or Mask
        Which keys a token sees.
    kpool : int
        Tokens that a cached row stands for.
    k_total_lengths, key_start, key_step, out, check, workspace
        See `MLAIndexerRaggedFloat8Paged.scores`.

    Returns
    -------
    scores : float32, [total_seq_len, max_keys]
        -inf where the token does not see the key; for ``max_keys`` see
        `MLAIndexerRaggedFloat8Paged.scores`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        See `MLAIndexerRaggedFloat8Paged.__call__`.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import PagedKeyCache, index_scores
    >>> keys = np.arange(1, 4, dtype=np.float32)[:, None] * np.ones(32, np.float32)
    >>> cache = PagedKeyCache.from_dense([keys], page_size=3)
    >>> q = np.full((3, 2, 32), 0x38, np.uint8)  # 1.0 in E4M3
    >>> qs = np.full((3, 2), 0.5, np.float32)
    >>> index_scores(q, qs, cache.input_row_offsets, *cache.view()).round(3)
    array([[ 32., -inf, -inf],
           [ 32.,  64., -inf],
           [ 32.,  64.,  96.]], dtype=float32)
    """
    cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
    inputs = Inputs(q, qs, input_row_offsets, *cached)
    return _operator_for(inputs, 1, mask, kpool).scores(
        *inputs[:9],
        k_total_lengths=k_total_lengths,
        key_start=key_start,
        key_step=key_step,
        out=out,
        check=check,
        workspace=workspace,
    )
