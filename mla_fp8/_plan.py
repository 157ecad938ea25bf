"""A call's shape and the device's facts in; kernels, launch sizes, scratch out. Needs no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from mla_fp8._problem import Shape

LOCATE_THREADS = 128
FILL_THREADS = 256
SCORE_WARPS = 8
SORT_THREADS = 256  # one per digit: kDigits of sort_topk.cu
MAX_TOKENS_PER_TILE = 16
SCRATCH_BYTES = 256 << 20  # of scores held between scoring and selection
HOPPER_HEADS = (8, 16, 32, 64, 128)
HOPPER_DEPTHS = (64, 128)
HOPPER_SHARED_BYTES = 227 * 1024  # all that a block may have
_HOPPER_COLUMNS = 256  # tokens x heads of a warpgroup
_HOPPER_TOKENS = 16  # of a warpgroup: with more, what is kept of each lane's does not fit registers
_WARP = 32


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    arch: str  # compiler target: sm_80, sm_90a, ...
    multiprocessors: int
    ordinal: int = 0


@dataclass(frozen=True)
class Kernel:
    """A template of ``kernels/``, its parameters by name, and what a block of it takes."""

    template: str
    parameters: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int = 0  # asked for at launch


Route = Literal["hopper", "portable"]


@dataclass(frozen=True)
class ScorePlan:
    """How to score: the kernel, its blocks, and how many tokens' scores exist at one time."""

    route: Route
    locate: Kernel
    locate_blocks: int
    launches: int  # whose blocks have a share of work each; portable blocks have none, so 0
    score: Kernel
    blocks: int
    tokens_per_tile: int
    chunk_tokens: int
    row_stride: int  # elements from one row of scores to the next
    fill: Kernel | None  # for a dense matrix, where scoring writes only what is seen
    fill_blocks: int


@dataclass(frozen=True)
class TopkPlan:
    """`ScorePlan` plus selection; chunks of tokens bound the scores that exist at one time."""

    scoring: ScorePlan
    select: Kernel
    sort: Kernel | None


def architecture(compute_capability: int) -> str:
    """The compiler target of a GPU: with its own instructions (``a``) where there are any."""
    return f"sm_{compute_capability}{'a' if compute_capability >= 90 else ''}"


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def divider(divisor: int) -> tuple[np.uint32, np.uint32]:
    """Factor and shift with which ``n // divisor == (2 * n * factor >> 32) >> shift``, n < 2 ** 31.

    Granlund and Montgomery, Division by invariant integers using multiplication (PLDI 1994).
    """
    shift = (divisor - 1).bit_length()
    return np.uint32(_ceil_div(1 << (31 + shift), divisor)), np.uint32(shift)


def _power_of_two(n: int) -> int:
    """The least power of two that is at least ``n`` and 1."""
    return 1 << max(n - 1, 0).bit_length()


def _tokens_per_tile(shape: Shape, tokens: int, key_tiles: int, device: Device) -> int:
    """Tokens that share one load of a key tile.

    More save loads; fewer leave more blocks. Tokens of different sequences share nothing, and
    twice the multiprocessors is the least that keeps them all busy. Scores do not depend on it.
    """
    per_sequence = _ceil_div(tokens, max(shape.batch, 1))
    tile = 1
    while 2 * tile <= min(per_sequence, MAX_TOKENS_PER_TILE):
        if key_tiles * _ceil_div(tokens, 2 * tile) < 2 * device.multiprocessors:
            break
        tile *= 2
    return tile


def _locate_kernel(shape: Shape, tile_tokens: int) -> Kernel:
    parameters = {
        "kThreads": LOCATE_THREADS,
        "kCausal": int(shape.causal),
        "kSignedOffsets": int(shape.signed_offsets),
        "kSignedLengths": int(shape.signed_lengths),
        "kTileTokens": tile_tokens,
    }
    return Kernel("locate_work", tuple(parameters.items()), LOCATE_THREADS)


def scoring_route(
    num_heads: int, depth: int, kv_heads: int, scale_groups: int, device: Device
) -> Route:
    """The kernel that scores; never a matter of batch or lengths, on which no bit may depend."""
    fits = num_heads in HOPPER_HEADS and depth in HOPPER_DEPTHS
    plain = kv_heads == 1 and scale_groups == 1
    return "hopper" if device.arch == "sm_90a" and fits and plain else "portable"


def _portable_score(
    shape: Shape, device: Device, dense: bool, tokens: int
) -> tuple[Kernel, int, int]:
    """Kernel, blocks and tokens per tile for ``tokens`` tokens."""
    # Key fragments take depth / 4 registers for every 16 keys of a warp, key scales more: 32 keys
    # of 256 channels do not fit beside the rest.
    keys_per_warp = 16 if shape.depth == 256 else 32
    key_tiles = _ceil_div(shape.max_keys, SCORE_WARPS * keys_per_warp)
    tile = _tokens_per_tile(shape, tokens, key_tiles, device)
    heads = 8 * _ceil_div(shape.num_heads // shape.kv_heads, 8)
    parameters = {
        "kHeads": shape.num_heads,
        "kKvHeads": shape.kv_heads,
        "kDepth": shape.depth,
        "kScaleGroups": shape.scale_groups,
        "kKeysPerWarp": keys_per_warp,
        "kWarps": SCORE_WARPS,
        "kHeadChunk": min(heads, 32 if shape.depth == 256 else 64),
        "kDense": int(dense),
    }
    kernel = Kernel("index_scores", tuple(parameters.items()), _WARP * SCORE_WARPS)
    return kernel, key_tiles * _ceil_div(tokens, tile), tile


def _hopper_score(shape: Shape) -> tuple[Kernel, int]:
    """The kernel, and how many tokens of one sequence a tile of it holds.

    Where a sequence's tokens fit the columns of one warpgroup, warpgroups share them and split the
    keys, as many as their accumulators leave registers for; else two split the tokens.
    """
    rows = shape.num_blocks * shape.num_layers * shape.page_size  # the copy engine counts in int32
    most = min(_HOPPER_COLUMNS // shape.num_heads, _HOPPER_TOKENS)
    tokens = min(most, _power_of_two(shape.max_new))
    columns = tokens * shape.num_heads
    token_groups, key_groups = 2, 1
    if shape.max_new <= most:
        token_groups, key_groups = 1, 4 if columns <= 64 else 2
    parameters = {
        "kHeads": shape.num_heads,
        "kDepth": shape.depth,
        "kTokens": tokens,
        "kTokenGroups": token_groups,
        "kKeyGroups": key_groups,
        "kBoxRows": math.gcd(shape.page_size, 2 * _WARP) if rows < 1 << 31 else 1,
        "kSharedBytes": HOPPER_SHARED_BYTES,
    }
    threads = 128 * (token_groups * key_groups + 1)
    kernel = Kernel("index_scores_sm90", tuple(parameters.items()), threads, HOPPER_SHARED_BYTES)
    return kernel, tokens * token_groups


def _score_plan(
    shape: Shape, device: Device, *, dense: bool, chunk_tokens: int, row_stride: int
) -> ScorePlan:
    route = scoring_route(shape.num_heads, shape.depth, shape.kv_heads, shape.scale_groups, device)
    fill, launches = None, 0
    if route == "hopper":
        score, tile = _hopper_score(shape)
        blocks = device.multiprocessors
        launches = _ceil_div(shape.total_seq_len, max(chunk_tokens, 1))
        if dense:
            fill = Kernel("fill_unseen", (("kThreads", FILL_THREADS),), FILL_THREADS)
    else:
        score, blocks, tile = _portable_score(shape, device, dense, chunk_tokens)
    warps = shape.total_seq_len + launches * blocks
    return ScorePlan(
        route=route,
        locate=_locate_kernel(shape, tile if launches else 0),
        locate_blocks=_ceil_div(warps, LOCATE_THREADS // _WARP),
        launches=launches,
        score=score,
        blocks=blocks,
        tokens_per_tile=tile,
        chunk_tokens=chunk_tokens,
        row_stride=row_stride,
        fill=fill,
        fill_blocks=4 * device.multiprocessors,
    )


@lru_cache(maxsize=1024)
def plan_scores(shape: Shape, device: Device) -> ScorePlan:
    """Plan the dense matrix of all scores, in one launch."""
    return _score_plan(
        shape, device, dense=True, chunk_tokens=shape.total_seq_len, row_stride=shape.max_keys
    )


@lru_cache(maxsize=1024)
def plan_topk(shape: Shape, k: int, by_score: bool, values: bool, device: Device) -> TopkPlan:
    """Plan scoring and selection, ``chunk_tokens`` tokens at a time."""
    row_stride = 4 * _ceil_div(shape.max_keys, 4)  # rows start on 16 bytes
    chunk = max(1, min(shape.total_seq_len, SCRATCH_BYTES // (4 * max(row_stride, k))))
    return TopkPlan(
        scoring=_score_plan(shape, device, dense=False, chunk_tokens=chunk, row_stride=row_stride),
        select=select_kernel(k, shape.max_keys, values=values or by_score, holes=True),
        sort=sort_kernel(k) if by_score else None,
    )


def select_kernel(k: int, columns: int, *, values: bool, holes: bool) -> Kernel:
    """The selection over rows of ``columns`` scores: our own (with holes), or a caller's."""
    threads = 256 if columns <= 8192 else 1024  # short rows: more of them at a time
    parameters = {
        "kTopK": k,
        "kThreads": threads,
        "kValues": int(values),
        "kHoles": int(holes),
        "kLengthStride": 2 if holes else 1,
    }
    return Kernel("select_topk", tuple(parameters.items()), threads)


def sort_kernel(k: int) -> Kernel:
    """The sort of selected rows by score."""
    return Kernel("sort_topk", (("kTopK", k),), SORT_THREADS)
