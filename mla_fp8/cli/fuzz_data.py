"""Numbers and pools of pages for tests and for the fuzzer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

Random = np.random.Generator
Codes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
FP8 = ml_dtypes.float8_e4m3fn
NAN_CODES = np.array([0x7F, 0xFF], np.uint8)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KEY_DTYPES = [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)]
LAYOUTS = ["contiguous", "layer-major", "fused", "reversed", "gaps of 4", "odd"]
CANARY = 0xA5


def encode(x: np.ndarray) -> Codes:
    """E4M3 codes of moderate floats (ml_dtypes, not the package under test)."""
    codes: Codes = np.clip(x, -448, 448).astype(FP8).view(np.uint8)
    return codes


def normal_codes(rng: Random, shape: tuple[int, ...]) -> Codes:
    """E4M3 codes of normally distributed numbers."""
    return encode(rng.standard_normal(shape, dtype=np.float32))


# Each of these changes q, keys (codes), qs and scales in place.


def _keep(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    pass


def _wide(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    """Every code but NaN: magnitudes from 2**-9 to 448 side by side."""
    for codes in (q, keys):
        codes[...] = rng.integers(0, 256, codes.shape, np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0


def _plateau(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    """Nine keys in ten score an exact zero (of either sign): the ReLU plateau."""
    q &= 0x7F
    keys &= 0x7F
    keys[rng.random(keys.shape[:-1]) < 0.9] |= 0x80


def _negative_gates(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    """No score above zero: the zeros of negative dot products are the best keys."""
    q &= 0x7F
    keys &= 0x7F
    keys[rng.random(keys.shape[:-1]) < 0.5] |= 0x80
    qs[...] = -np.abs(qs)


def _zero_rows(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    q[1::2] = 0
    keys[rng.random(keys.shape[:-1]) < 0.5] = 0


def _equal(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    """All keys alike: everything ties, at a score that is not zero."""
    keys[...] = keys.reshape(-1, keys.shape[-1])[0]
    scales[...] = 0.75


def _nan_codes(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    """Single NaN codes in a tenth of the keys and an eighth of the query heads."""
    for codes, share in ((q, 1 / 8), (keys, 1 / 10)):
        rows = codes.reshape(-1, codes.shape[-1])
        hit = np.flatnonzero(rng.random(len(rows)) < share)
        column = rng.integers(0, rows.shape[1], len(hit))
        rows[hit, column] = rng.choice(NAN_CODES, len(hit))


def _special_gates(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    """Tokens in turn: +inf, -inf, NaN, both infinities, ordinary."""
    qs[0::5, 0] = np.inf
    qs[1::5, 0] = -np.inf
    qs[2::5, 0] = np.nan
    qs[3::5, 0] = np.inf
    qs[3::5, -1] = -np.inf


def _negative_zero(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    """Gates of -0.0, keys of -0.0 and scales of zero: all ties, whatever the sign of the zero."""
    qs[0::2] = -0.0
    keys[rng.random(keys.shape[:-1]) < 0.3] = 0x80
    scales[rng.random(scales.shape) < 0.3] = 0.0


def _heavy_tail(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    """Scores over nine decades, of both signs."""
    scales[...] = np.exp(3 * rng.standard_normal(scales.shape))
    qs *= np.exp(rng.standard_normal(qs.shape)).astype(np.float32)


def _last_bits(rng: Random, q: Codes, qs: Floats, keys: Codes, scales: Floats) -> None:
    """Keys alike, and scales that differ in their last bits."""
    keys[...] = keys.reshape(-1, keys.shape[-1])[0]
    scales[...] = 1 + rng.integers(0, 8, scales.shape) * 2.0**-23


VALUES: dict[str, Callable[[Random, Codes, Floats, Codes, Floats], None]] = {
    "normal": _keep,
    "wide": _wide,
    "plateau": _plateau,
    "negative_gates": _negative_gates,
    "zero_rows": _zero_rows,
    "equal": _equal,
    "nan_codes": _nan_codes,
    "special_gates": _special_gates,
    "negative_zero": _negative_zero,
    "heavy_tail": _heavy_tail,
    "last_bits": _last_bits,
}


def hard_rows(count: int, depth: int, dtype: Any, seed: int = 0) -> np.ndarray:
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
    bits: Any = rows.view(np.uint16 if rows.itemsize == 2 else np.uint32)
    bits[negative_nan] |= bits.dtype.type(1 << (8 * rows.itemsize - 1))
    some: np.ndarray = rows[:count]
    return some


def view_of(
    xp: Any,
    buffer: Any,
    offset: int,
    dtype: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Any:
    """A view of a flat uint8 buffer."""
    if xp is np:
        return np.ndarray(shape, dtype, buffer, offset, strides)
    return xp.ndarray(shape, dtype, buffer.data + offset, strides)


def make_pool(
    xp: Any,
    layout: str,
    blocks: int,
    layers: int,
    page_size: int,
    heads: int,
    depth: int,
    groups: int,
    buffer: Any = None,
) -> SimpleNamespace:
    """A buffer of canaries, and the views ``k_blocks`` and ``k_scales`` of it."""
    values, scales = page_size * heads * depth, page_size * heads * groups * 4
    whole = blocks * layers * values
    by_block: tuple[int, ...]
    by_layer: tuple[int, ...]
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
