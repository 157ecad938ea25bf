"""Writers of keys: quantise them into their pages, and make pooled rows."""

from __future__ import annotations

from typing import Any

from mla_fp8._backend import backend_of
from mla_fp8._check.arrays import namespace_of
from mla_fp8._check.keys import check_key_write
from mla_fp8._check.streams import in_order


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
        Block of each page. A block of ``num_blocks`` or more does not exist.
    power_of_two : bool
        Round each scale up to a power of two (ue8m0).

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it, and nothing has been written.

    Notes
    -----
    If two tokens have one place, NumPy keeps the later one; on a GPU it is unspecified which values
    and scales stay.

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
