"""A call's shape and the device's facts in; kernels, launch sizes, scratch out. Needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mla_fp8._problem import Shape

LOCATE_THREADS = 128
SCORE_WARPS = 8
SORT_THREADS = 256  # one per digit: kDigits of sort_topk.cu
MAX_TOKENS_PER_TILE = 16
SCRATCH_BYTES = 256 << 20  # of scores held between scoring and selection
_WARP = 32


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    arch: str  # compiler target: sm_80, sm_90a, ...
    multiprocessors: int


@dataclass(frozen=True)
class Kernel:
    """A template of ``kernels/``, its parameters by name, and its block size."""

    template: str
    parameters: tuple[tuple[str, int], ...]
    threads: int


@dataclass(frozen=True)
class ScorePlan:
    """How to score: key and token tiles, and how many blocks they make per chunk of tokens."""

    locate: Kernel
    locate_blocks: int
    score: Kernel
    blocks: int
    tokens_per_tile: int
    chunk_tokens: int
    row_stride: int  # elements from one row of scores to the next


@dataclass(frozen=True)
class TopkPlan:
    """`ScorePlan` plus selection; chunks of tokens bound the scores that exist at one time."""

    scoring: ScorePlan
    select: Kernel
    sort: Kernel | None


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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


def _locate_kernel(shape: Shape) -> Kernel:
    parameters = {
        "kThreads": LOCATE_THREADS,
        "kCausal": int(shape.causal),
        "kSignedOffsets": int(shape.signed_offsets),
        "kSignedLengths": int(shape.signed_lengths),
    }
    return Kernel("locate_tokens", tuple(parameters.items()), LOCATE_THREADS)


def _score_plan(
    shape: Shape, device: Device, *, dense: bool, chunk_tokens: int, row_stride: int
) -> ScorePlan:
    # Key fragments take depth / 4 registers for every 16 keys of a warp, key scales more: 32 keys
    # of 256 channels do not fit beside the rest.
    keys_per_warp = 16 if shape.depth == 256 else 32
    key_tiles = _ceil_div(shape.max_keys, SCORE_WARPS * keys_per_warp)
    tile = _tokens_per_tile(shape, chunk_tokens, key_tiles, device)
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
    return ScorePlan(
        locate=_locate_kernel(shape),
        locate_blocks=_ceil_div(shape.total_seq_len, LOCATE_THREADS // _WARP),
        score=Kernel("index_scores", tuple(parameters.items()), _WARP * SCORE_WARPS),
        tokens_per_tile=tile,
        blocks=key_tiles * _ceil_div(chunk_tokens, tile),
        chunk_tokens=chunk_tokens,
        row_stride=row_stride,
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
