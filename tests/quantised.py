"""Quantised rows, written from the definition, and pools of every layout to write them to."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KEY_DTYPES = [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)]
TINY = np.float32(2.0**-126)
LAYOUTS = ["contiguous", "layer-major", "fused", "reversed", "gaps of 4", "odd"]
CANARY = 0xA5
_POWERS = 2.0 ** np.arange(-126, 128)


class Bfloat16:
    """A CuPy array of bfloat16, as other libraries have it: CuPy has only the bits."""

    def __init__(self, bits):
        self._bits, self.dtype = bits, "bfloat16"

    def view(self, dtype):
        return self._bits.view(dtype)


def on(xp, array: np.ndarray):
    """A host array as one of ``xp``."""
    if xp is np:
        return array
    if array.dtype == BFLOAT16:
        return Bfloat16(xp.asarray(array.view(np.int16)))
    return xp.asarray(array)


def quantised(x: np.ndarray, groups: int, power_of_two: bool = False):
    """uint8 codes [..., depth] and float32 scales [..., groups]; ml_dtypes rounds to E4M3."""
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
        granules = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
        amax = np.where(np.isfinite(granules), np.abs(granules), 0).max(axis=-1)
        scales = np.maximum(amax / np.float32(448), TINY)
        if power_of_two:
            scales = _POWERS[np.searchsorted(_POWERS, scales)].astype(np.float32)
        scales[amax < TINY] = 1
        quotients = (granules / scales[..., None]).reshape(x.shape)
        codes = np.clip(quotients, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    codes[np.isnan(x)] = 0x7F
    return codes, scales


def hard_rows(count: int, depth: int, dtype, seed: int = 0) -> np.ndarray:
    """Rows of all magnitudes, then rows with zeros, subnormals, ties, infinities and NaN."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, depth)) * 10.0 ** rng.integers(-44, 38, (count, 1))
    x[::3] = rng.standard_normal(x[::3].shape) * 2.0 ** rng.integers(-9, 9, x[::3].shape)
    special = np.zeros((12, depth))
    special[1] = -0.0
    special[2] = rng.integers(-100, 100, depth) * 2.0**-149  # subnormal
    special[3] = rng.integers(-100, 100, depth) * 2.0**-133  # subnormal beside normal
    special[3, ::32] = 2.0**-126
    special[4] = rng.choice([np.inf, -np.inf, np.nan, 1.5, -3.0], depth)
    special[5] = np.nan
    special[6] = rng.choice([np.inf, -np.inf, np.nan, 0.0], depth)
    special[7] = rng.choice([3.4e38, -3.4e38, 1e-40, 1.0], depth)
    special[8] = np.resize((np.arange(1, 32) - 0.5) * 2.0**-9, depth)  # ties of small codes
    special[8, ::32] = 448
    special[9] = np.resize((np.arange(16, 32) + 0.5) * 2.0 ** (np.arange(16) % 9 - 4), depth)
    special[9, ::32] = -448
    special[10] = rng.integers(-8, 8, depth) * 2.0**-130  # scales at their least
    special[10, ::32] = 447 * 2.0**-126
    special[11] = rng.standard_normal(depth) * 2.0**-60
    with np.errstate(all="ignore"):
        rows = np.concatenate([special, x]).astype(np.float32).astype(dtype)
    negative_nan = np.isnan(rows.astype(np.float32)) & (rng.random(rows.shape) < 0.5)
    bits = rows.view(np.uint16 if rows.itemsize == 2 else np.uint32)
    bits[negative_nan] |= bits.dtype.type(1 << (8 * rows.itemsize - 1))
    return rows[:count]


def view_of(xp, buffer, offset: int, dtype, shape, strides):
    """A view of a flat uint8 buffer."""
    if xp is np:
        return np.ndarray(shape, dtype, buffer, offset, strides)
    return xp.ndarray(shape, dtype, buffer.data + offset, strides)


def make_pool(xp, layout, blocks, layers, page_size, heads, depth, groups, buffer=None):
    """A buffer of canaries, and the views ``k_blocks`` and ``k_scales`` of it."""
    values, scales = page_size * heads * depth, page_size * heads * groups * 4
    whole = blocks * layers * values
    starts, by_block, by_layer = (0, whole), (layers * values, layers * scales), (values, scales)
    if layout == "layer-major":
        by_block, by_layer = (values, scales), (blocks * values, blocks * scales)
    elif layout == "fused":  # values of a page, then its scales
        starts, by_layer = (0, values), (values + scales,) * 2
        by_block = (layers * (values + scales),) * 2
    elif layout == "reversed":
        starts = (whole - layers * values, whole + (blocks - 1) * layers * scales)
        by_block = tuple(-n for n in by_block)
    elif layout in ("gaps of 4", "odd"):
        gap = 4 if layout == "gaps of 4" else 3
        by_layer = (values + gap, scales)
        by_block = (layers * (values + gap), layers * scales)
        starts = (gap, -(-(gap + blocks * by_block[0]) // 4) * 4)
    size = max(starts) + blocks * layers * (values + scales + 8)
    if buffer is None:
        buffer = xp.full(size, CANARY, np.uint8)
    pages = (blocks, 1, layers, page_size, heads)
    return SimpleNamespace(
        buffer=buffer,
        k_blocks=view_of(
            xp,
            buffer,
            starts[0],
            np.uint8,
            (*pages, depth),
            (by_block[0], 0, by_layer[0], heads * depth, depth, 1),
        ),
        k_scales=view_of(
            xp,
            buffer,
            starts[1],
            np.float32,
            (*pages, groups),
            (by_block[1], 0, by_layer[1], heads * groups * 4, groups * 4, 4),
        ),
    )
