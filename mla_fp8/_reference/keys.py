"""The NumPy backend's functions that quantise and transform keys and queries.

Sums and products of float32 arrays are rounded one by one, in an order that the kernels share.
"""

from __future__ import annotations

import numpy as np

from mla_fp8._check.keys import KeyWrite
from mla_fp8._check.transforms import Pooling, Queries, Rotation
from mla_fp8._e4m3 import quantize

_QUANTISED_AT_ONCE = 1 << 18  # numbers; `quantize` needs about 40 bytes of memory for each


def _floats(numbers: np.ndarray) -> np.ndarray:
    """Numbers as float32; uint16 is the bits of bfloat16."""
    if numbers.dtype == np.uint16:
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def _places(write: KeyWrite) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block and offset of each token that has both, and the numbers of these tokens."""
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
    """Quantise keys and store their values and scales; the last of two tokens in a place stays."""
    _, kv_heads, depth = write.keys.shape
    width = depth // write.k_scales.shape[-1]
    blocks, offsets, tokens = _places(write)
    step = max(1, _QUANTISED_AT_ONCE // (kv_heads * depth))
    for first in range(0, tokens.size, step):
        some = slice(first, first + step)
        with np.errstate(all="ignore"):  # NaN and infinity are legal
            keys = _floats(write.keys[tokens[some]])
            codes, scales = quantize(keys, width, write.power_of_two)
        places = blocks[some], offsets[some]
        write.k_blocks[places], write.k_scales[places] = codes, scales


def quantize_queries(queries: Queries, codes: np.ndarray, qs: np.ndarray) -> None:
    """Quantise queries with one scale per head, and multiply the scale into the head's gate."""
    _, heads, depth = queries.q.shape
    step = max(1, _QUANTISED_AT_ONCE // (heads * depth))
    with np.errstate(all="ignore"):
        for first in range(0, len(codes), step):
            some = slice(first, first + step)
            q = _floats(queries.q[some])
            codes[some], scales = quantize(q, depth, queries.power_of_two)
            gates = queries.weights[some] * queries.head_scale
            qs[some] = gates * scales[..., 0] * queries.softmax_scale


def rope(rotation: Rotation, out: np.ndarray) -> None:
    """Rotate the first channels of each row by the angles of its token."""
    angles = rotation.cos.shape[1]
    with np.errstate(all="ignore"):
        out[...] = _floats(rotation.x)
        shape = (len(out), *(1,) * (out.ndim - 2), angles)
        cos, sin = rotation.cos.reshape(shape), rotation.sin.reshape(shape)
        if rotation.interleaved:
            a, b = out[..., 0 : 2 * angles : 2], out[..., 1 : 2 * angles : 2]
        else:
            a, b = out[..., :angles], out[..., angles : 2 * angles]
        a[...], b[...] = a * cos - b * sin, b * cos + a * sin


def hadamard(x: np.ndarray, out: np.ndarray) -> None:
    """The orthonormal Walsh-Hadamard transform of each row."""
    depth, distance = x.shape[-1], 1
    with np.errstate(all="ignore"):
        out[...] = _floats(x)
        while distance < depth:
            pairs = out.reshape(-1, 2, distance)
            a, b = pairs[:, 0], pairs[:, 1]
            pairs[:, 0], pairs[:, 1] = a + b, a - b
            distance *= 2
        out *= np.float32(depth**-0.5)


def pool_keys(pooling: Pooling, out: np.ndarray) -> None:
    """The weighted sums, or means, of consecutive rows."""
    keys, weights, pool = pooling
    with np.errstate(all="ignore"):
        for token in range(pool):
            term = _floats(keys[token::pool])
            if weights is not None:
                term = weights[token::pool] * term
            out[...] = out + term if token else term
        if weights is None:
            out /= np.float32(pool)
