"""Writers: quantise keys into their pages, make pooled rows, quantise queries."""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_fp8._backend import backend_of
from mla_fp8._check.arrays import FP8, Array, empty_beside, namespace_of
from mla_fp8._check.keys import check_key_write
from mla_fp8._check.streams import in_order
from mla_fp8._check.transforms import check_pooling, check_queries


@in_order("keys")
def write_keys(
    keys: Any,
    k_blocks: Any,
    k_scales: Any,
    layer_idx: Any = 0,
    *,
    slots: Any = None,
    sequences: Any = None,
    positions: Any = None,
    k_lookup_table: Any = None,
    power_of_two: bool = False,
) -> None:
    """Quantise keys and write their values and scales into the pages of a pool.

    Values and scales are what `fp8.quantize` returns, bit for bit. The place of a token is given
    either by ``slots`` or by ``sequences``, ``positions`` and ``k_lookup_table``. A token whose
    place does not exist is skipped.

    Parameters
    ----------
    keys : bfloat16, float16 or float32, [tokens, kv_heads, depth]
        [tokens, depth] too, if the pool has one key head. C-contiguous.
    k_blocks : float8_e4m3fn or uint8, [num_blocks, 1, num_layers, page_size, kv_heads, depth]
        The pool's values. The last three axes are contiguous; blocks and layers may have any
        strides. So ``k_blocks`` and ``k_scales`` may be views of one buffer, as long as they share
        no byte.
    k_scales : float32, [num_blocks, 1, num_layers, page_size, kv_heads, groups]
        The pool's scales, one for each ``depth / groups`` channels; strided likewise.
    layer_idx : int
        The layer to write.
    slots : int32 or int64, [tokens], optional
        ``block * page_size + offset`` of each token. A slot below 0, or past the last block, does
        not exist.
    sequences, positions : int32, uint32 or int64, [tokens], optional
        Row of ``k_lookup_table``, and position in that sequence, of each token.
    k_lookup_table : uint32 or int32, [batch, pages_per_seq], optional
        Block of each page. An entry of ``num_blocks`` or more, or below 0, names no block.
    power_of_two : bool
        Round each scale up to a power of two (ue8m0).

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it, and nothing has been written.

    Notes
    -----
    If two tokens have the same place, NumPy keeps the later one; on a GPU it is unspecified which
    values and scales stay.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import write_keys
    >>> k_blocks = np.zeros((2, 1, 1, 4, 1, 32), np.uint8)  # two blocks of four tokens
    >>> k_scales = np.zeros((2, 1, 1, 4, 1, 1), np.float32)
    >>> keys = np.array([[448.0], [896.0]], np.float32) * np.ones(32, np.float32)
    >>> write_keys(keys, k_blocks, k_scales, slots=np.array([5, -1], np.int32))
    >>> k_scales[1].ravel()
    array([0., 1., 0., 0.], dtype=float32)
    """
    places = {
        "slots": slots,
        "sequences": sequences,
        "positions": positions,
        "k_lookup_table": k_lookup_table,
    }
    write = check_key_write(keys, k_blocks, k_scales, layer_idx, places, power_of_two)
    if len(write.keys):
        backend_of(namespace_of(write.keys)).write_keys(write)


@in_order("keys")
def pool_keys(keys: Any, kpool: int, weights: Any = None) -> Array:
    """Return one row for each ``kpool`` consecutive tokens, in float32.

    The row is the mean of the tokens' keys or, with ``weights``, the sum of their products with the
    weights. Tokens after the last whole pool are left out.

    Parameters
    ----------
    keys : bfloat16, float16 or float32, [tokens, kv_heads, depth] or [tokens, depth]
        Keys of successive tokens of one sequence. The first token begins a pool. C-contiguous.
    kpool : int
        Tokens of a pool, 1 to 64.
    weights : float32, the shape of ``keys``, optional
        A weight for each channel of each token. GLM-5.3-Flash pools four tokens in this way: its
        weights are the softmax of a gate over the tokens of a pool (``get_pooled_states`` in
        ``models/glm5_next`` of transformers).

    Returns
    -------
    float32, [tokens // kpool, kv_heads, depth] or [tokens // kpool, depth]

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it.

    Notes
    -----
    Terms are added from the first token to the last, and a mean is divided at the end. So NumPy and
    GPU give the same bits, except for the bits of a NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import pool_keys
    >>> pool_keys(np.arange(10, dtype=np.float32).reshape(5, 2), 2)
    array([[1., 2.],
           [5., 6.]], dtype=float32)
    """
    pooling, shape = check_pooling(keys, kpool, weights)
    out = empty_beside(pooling.keys, shape, np.float32)
    if out.size:
        backend_of(namespace_of(out)).pool_keys(pooling, out.reshape(shape[0], -1))
    return out


@in_order("q", codes=True)
def quantize_queries(
    q: Any,
    weights: Any,
    softmax_scale: float | None = None,
    *,
    head_scale: float | None = None,
    power_of_two: bool = False,
) -> tuple[Array, Array]:
    """Quantise queries with one scale per head, and fold the scale into the head gates.

    Parameters
    ----------
    q : bfloat16, float16 or float32, [total_seq_len, num_heads, depth]
        ``depth`` is 32, 64, 128 or 256. C-contiguous.
    weights : float32, [total_seq_len, num_heads]
        The head weights that the model computes for each token.
    softmax_scale : float, optional
        By default ``depth ** -0.5``, as in DeepSeek-V3.2.
    head_scale : float, optional
        Another factor, by default ``num_heads ** -0.5``: DeepSeek-V3.2 and GLM-5 multiply the
        weights by it. Pass 1.0 if ``weights`` already contain it.
    power_of_two : bool
        Round each query scale up to a power of two (ue8m0).

    Returns
    -------
    q : float8_e4m3fn, [total_seq_len, num_heads, depth]
        What `fp8.quantize` returns; uint8 if the library has no such dtype, as CuPy.
    qs : float32, [total_seq_len, num_heads]
        ``weights * head_scale * query scale * softmax_scale``, multiplied in this order, that of
        ``Indexer.forward`` in ``inference/model.py`` of DeepSeek-V3.2-Exp.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import quantize_queries
    >>> q, weights = np.full((1, 4, 64), 896.0, np.float32), np.ones((1, 4), np.float32)
    >>> values, qs = quantize_queries(q, weights)
    >>> values[0, 0, 0], qs
    (448, array([[0.125, 0.125, 0.125, 0.125]], dtype=float32))
    """
    queries = check_queries(q, weights, softmax_scale, head_scale, power_of_two)
    codes = empty_beside(queries.q, queries.q.shape, np.uint8)
    qs = empty_beside(queries.q, queries.q.shape[:2], np.float32)
    if codes.size:
        backend_of(namespace_of(codes)).quantize_queries(queries, codes, qs)
    return (codes.view(FP8) if namespace_of(codes) is np else codes), qs
