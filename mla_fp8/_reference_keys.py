"""The NumPy backend's writer of keys."""

from __future__ import annotations

import numpy as np

from mla_fp8._check.keys import KeyWrite
from mla_fp8.fp8 import quantize

_QUANTISED_AT_ONCE = 1 << 18  # numbers; `quantize` needs about 40 bytes of memory for each


def _places(write: KeyWrite) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block and offset of each token, and the tokens that have both."""
    num_blocks, page_size = write.k_blocks.shape[:2]
    if len(write.places) == 1:
        slot = write.places[0].astype(np.int64)
        written = np.flatnonzero((slot >= 0) & (slot < num_blocks * page_size))
        return slot[written] // page_size, slot[written] % page_size, written
    sequence, position = (array.astype(np.int64) for array in write.places[:2])
    table = write.places[2]
    batch, pages = table.shape
    exists = (sequence >= 0) & (sequence < batch)
    exists &= (position >= 0) & (position < pages * page_size)
    written = np.flatnonzero(exists)
    page, offset = np.divmod(position[written], page_size)
    block = table[sequence[written], page].astype(np.int64)
    valid = (block >= 0) & (block < num_blocks)
    return block[valid], offset[valid], written[valid]


def write_keys(write: KeyWrite) -> None:
    """Quantise keys and store their values and scales; the last of two tokens in a slot stays."""
    _, kv_heads, depth = write.keys.shape
    width = depth // write.k_scales.shape[-1]
    blocks, offsets, tokens = _places(write)
    step = max(1, _QUANTISED_AT_ONCE // (kv_heads * depth))
    for first in range(0, tokens.size, step):
        some = slice(first, first + step)
        keys = write.keys[tokens[some]]
        if keys.dtype == np.uint16:  # bfloat16
            keys = (keys.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(all="ignore"):  # NaN and infinity are legal
            values, scales = quantize(keys, width, power_of_two=write.power_of_two)
        places = blocks[some], offsets[some]
        write.k_blocks[places], write.k_scales[places] = values.view(np.uint8), scales
