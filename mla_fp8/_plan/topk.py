"""A call's shape and the device's facts in; kernels, launch sizes, scratch out. Needs no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from mla_fp8._check.problem import Shape
from mla_fp8._plan.kernel import WARP, Device, Kernel, ceil_div, divider, power_of_two
from mla_fp8._plan.selection import (
    SELECT_THREADS,
    STREAM_K,
    select_kernel,
    sort_kernel,
    stream_bytes,
    stream_kernel,
)
from mla_fp8._plan.workspace import (
    RANGE_BYTES,
    ROW_ALIGNMENT,
    SHARE_BYTES,
    SPAN_BYTES,
    WINDOWS,
    Cut,
    Scratch,
    aligned,
    lay_out,
)

LOCATE_THREADS = 128
FILL_THREADS = 256
SCORE_WARPS = 8
RESERVED_LENGTHS = 16  # of Reserved in packed_rows.cuh
MAX_TOKENS_PER_TILE = 16
BUFFERS = 2  # of scores, where some are selected from while the next are computed
MIN_CHUNK_ROWS = 48  # of such a buffer
SCRATCH_BYTES = 60 << 20  # of scores on their way to selection, and what selection needs beside
# The same with few tokens a sequence. Keys are 33 times their scores then, and launches in turns
# cost more than the work where lengths are far below the longest.
FEW_SCRATCH_BYTES = 1 << 30
HOPPER_HEADS = (8, 16, 32, 64, 128)
HOPPER_DEPTHS = (64, 128)
HOPPER_SHARED_BYTES = 227 * 1024  # all that a block may have
_HOPPER_COLUMNS = 256  # tokens x heads of a warpgroup
_HOPPER_TOKENS = 16  # of a warpgroup: with more, what is kept of each lane's does not fit registers

Route = Literal["hopper", "portable"]


@dataclass(frozen=True)
class ScorePlan:
    """How to score: the kernel, its blocks, and how many scores exist at one time."""

    route: Route
    locate: Kernel | None  # None: the kernel that scores does that as well
    launches: int  # whose blocks' shares of work are written down
    score: Kernel
    blocks: int  # of a launch
    tokens_per_tile: int
    cut: Cut
    # If rows are packed: blocks that are left to selection, for rows of the longest length, of
    # 1 / sqrt(2) of it, of half, ...
    reserved: tuple[int, ...]
    skip: int  # tokens that see no more keys than this are not scored
    fill: Kernel | None  # for a dense matrix, where scoring writes only what is seen
    fill_blocks: int
    page_factor: np.uint32  # with which kernels divide by the page size: `divider`
    page_shift: np.uint32

    def locate_blocks(self, tokens: int, launches: int) -> int:
        """Blocks of ``locate_work.cu``, a warp for each token and each share of each launch."""
        return ceil_div(tokens + launches * self.blocks, LOCATE_THREADS // WARP)

    def scratch(
        self, buffers: int = 0, k: int = 0, own_values: bool = False, sorts: bool = False
    ) -> Scratch:
        """Memory for what the launches write beside results."""
        return lay_out(
            self.cut,
            launches=self.launches,
            blocks=self.blocks,
            buffers=buffers,
            k=k,
            own_values=own_values,
            sorts=sorts,
        )


@dataclass(frozen=True)
class TopkPlan:
    """`ScorePlan` plus selection.

    With two buffers one chunk is scored while another is selected from, by blocks of their own.
    """

    scoring: ScorePlan
    buffers: int
    select: Kernel
    select_blocks: int  # while scoring goes on; 0 where it never does
    own_values: bool  # whether selection keeps scores that the caller has no use for
    sort: Kernel | None
    scratch: Scratch


def _tokens_per_tile(shape: Shape, tokens: int, key_tiles: int, device: Device) -> int:
    """Tokens that share one load of a key tile.

    More save loads; fewer leave more blocks. Tokens of different sequences share nothing, and
    twice the multiprocessors is the least that keeps them all busy. Scores do not depend on it.
    """
    per_sequence = ceil_div(tokens, max(shape.batch, 1))
    tile = 1
    while 2 * tile <= min(per_sequence, MAX_TOKENS_PER_TILE):
        if key_tiles * ceil_div(tokens, 2 * tile) < 2 * device.multiprocessors:
            break
        tile *= 2
    return tile


def _locate_kernel(shape: Shape, tile_tokens: int) -> Kernel:
    parameters = {
        "kThreads": LOCATE_THREADS,
        "kCausal": int(shape.causal),
        "kSignedOffsets": int(shape.signed_offsets),
        "kSignedLengths": int(shape.signed_lengths),
        "kTotalLengths": int(shape.total_lengths),
        "kTileTokens": tile_tokens,
        "kSpanBytes": SPAN_BYTES,
        "kRangeBytes": RANGE_BYTES,
        "kShareBytes": SHARE_BYTES,
        "kReservedLengths": RESERVED_LENGTHS,
        "kRowAlignment": ROW_ALIGNMENT,
        "kWindows": WINDOWS,
    }
    return Kernel("schedule", tuple(parameters.items()), LOCATE_THREADS)


def scoring_route(
    num_heads: int, depth: int, kv_heads: int, scale_groups: int, device: Device
) -> Route:
    """The kernel that scores; never a matter of batch or lengths, on which no bit may depend."""
    fits = num_heads in HOPPER_HEADS and depth in HOPPER_DEPTHS
    plain = kv_heads == 1 and scale_groups == 1
    return "hopper" if device.arch == "sm_90a" and fits and plain else "portable"


def _route(shape: Shape, device: Device) -> Route:
    return scoring_route(shape.num_heads, shape.depth, shape.kv_heads, shape.scale_groups, device)


def _portable_score(
    shape: Shape, device: Device, dense: bool, tokens: int
) -> tuple[Kernel, int, int]:
    """Kernel, blocks and tokens per tile for ``tokens`` tokens."""
    # Key fragments take depth / 4 registers for every 16 keys of a warp, key scales more: 32 keys
    # of 256 channels do not fit beside the rest.
    keys_per_warp = 16 if shape.depth == 256 else 32
    key_tiles = ceil_div(shape.max_keys, SCORE_WARPS * keys_per_warp)
    tile = _tokens_per_tile(shape, tokens, key_tiles, device)
    heads = 8 * ceil_div(shape.num_heads // shape.kv_heads, 8)
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
    kernel = Kernel("index_scores", tuple(parameters.items()), WARP * SCORE_WARPS)
    return kernel, key_tiles * ceil_div(tokens, tile), tile


def _most_tokens(shape: Shape) -> int:
    """Of a sequence, that fit a warpgroup."""
    return min(_HOPPER_COLUMNS // shape.num_heads, _HOPPER_TOKENS)


def _hopper_score(shape: Shape) -> tuple[Kernel, int]:
    """The kernel, and how many tokens of one sequence a tile of it holds.

    Where a sequence's tokens fit the columns of one warpgroup, warpgroups share them and split the
    keys, as many as their accumulators leave registers for; else two split the tokens.
    """
    rows = shape.num_blocks * shape.num_layers * shape.page_size  # the copy engine counts in int32
    most = _most_tokens(shape)
    tokens = min(most, power_of_two(shape.max_new))
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
        "kBoxRows": math.gcd(shape.page_size, 2 * WARP) if rows < 1 << 31 else 1,
        "kSharedBytes": HOPPER_SHARED_BYTES,
    }
    threads = 128 * (token_groups * key_groups + 1)
    kernel = Kernel("index_scores_sm90", tuple(parameters.items()), threads, HOPPER_SHARED_BYTES)
    return kernel, tokens * token_groups


def _score_plan(
    shape: Shape,
    device: Device,
    cut: Cut,
    *,
    dense: bool,
    skip: int = 0,
    reserved: tuple[int, ...] = (0,),
) -> ScorePlan:
    """The plan of scoring launches, on all but the first of ``reserved``; of several, see there."""
    route = _route(shape, device)
    fill, launches, locate = None, 0, None
    if route == "hopper":
        score, tile = _hopper_score(shape)
        blocks = device.multiprocessors - (reserved[0] if len(reserved) == 1 else 0)
        if dict(score.parameters)["kKeyGroups"] == 1:
            launches = len(cut.parts) if cut.keys else 0
            locate = _locate_kernel(shape, tile if launches else 0)
        if dense:
            fill = Kernel("fill_invalid", (("kThreads", FILL_THREADS),), FILL_THREADS)
    else:
        score, blocks, tile = _portable_score(shape, device, dense, cut.chunk_tokens)
        locate = _locate_kernel(shape, 0)
    factor, shift = divider(shape.page_size)
    return ScorePlan(
        route=route,
        locate=locate,
        launches=launches,
        score=score,
        blocks=blocks,
        tokens_per_tile=tile,
        cut=cut,
        reserved=reserved if len(reserved) > 1 else (),
        skip=skip,
        fill=fill,
        fill_blocks=4 * device.multiprocessors,
        page_factor=factor,
        page_shift=shift,
    )


@lru_cache(maxsize=1024)
def plan_scores(shape: Shape, device: Device) -> ScorePlan:
    """Plan the dense matrix of all scores, in one launch."""
    tokens, keys = shape.total_seq_len, shape.max_keys
    return _score_plan(shape, device, Cut(tokens, keys, tokens, keys, keys), dense=True)


def _reserved(shape: Shape, tile: int, rows: int, keys: int, at_once: int, device: Device) -> int:
    """Multiprocessors that select from a chunk while the others score the next.

    As many as make the longer of the two the shortest, ``at_once`` rows a multiprocessor; the
    tokens of a tile read a key together. On an H200 one scores a key for a token of 64 heads in
    1.74 ns but reads it in 4.1 ns, and selects from a row in 3.4 us and 0.16 ns a key, beside
    scoring (k = 2048).
    """
    reading = 4.1 / max(min(shape.max_new, tile), 1)
    scoring = rows * keys * max(1.74 * max(shape.num_heads, 16) / 64, reading)
    selecting = at_once * (3400 + 0.16 * keys)

    def longer(reserved: int) -> float:
        rounds = ceil_div(rows, reserved * at_once)
        return max(scoring / (device.multiprocessors - reserved), rounds * selecting)

    return min(range(1, max(device.multiprocessors // 2, 2)), key=longer)


@dataclass(frozen=True)
class _Chunks:
    """How scoring and selection are cut up so that scratch stays bounded."""

    tokens: int
    keys: int
    buffers: int
    reserved: tuple[int, ...]  # multiprocessors that select meanwhile: as for _score_plan
    select: Kernel
    own_values: bool  # whether selection keeps scores that the caller has no use for


def _chunks(shape: Shape, k: int, by_score: bool, values: bool, device: Device) -> _Chunks:
    keys, tokens = shape.max_keys, shape.total_seq_len
    own = by_score and not values

    def row_bytes(buffers: int) -> int:  # scores, a caller's not counted, and sort_topk.cu's spare
        return 4 * (buffers * aligned(keys) + k * own + 2 * k * by_score)

    hopper = _route(shape, device) == "hopper"
    few = hopper and shape.max_new <= _most_tokens(shape)
    most_bytes = FEW_SCRATCH_BYTES if few else SCRATCH_BYTES
    whole = most_bytes // max(row_bytes(1), 1)
    if keys == 0 or tokens <= whole or k > STREAM_K or not hopper:
        rows = max(1, min(whole, tokens))
        skips = hopper and not values and not own
        select = select_kernel(rows, keys, k, device, values=values or own, skips=skips)
        return _Chunks(rows, keys, 1, (0,), select, own)
    if MIN_CHUNK_ROWS * row_bytes(BUFFERS) > most_bytes:
        room = most_bytes // MIN_CHUNK_ROWS - 4 * k * (not values) - 8 * k * by_score
        several = ceil_div(keys, max(room // (4 * BUFFERS), STREAM_K))
        if several > 1:  # the keys in parts as well, and the first parts' scores are needed again
            own = not values
            keys = 2 * WARP * ceil_div(ceil_div(keys, several), 2 * WARP)
    _, tile = _hopper_score(shape)
    rows = min(max(most_bytes // row_bytes(BUFFERS) // tile, 1) * tile, tokens)
    # Long rows are few in a chunk: more threads for each leave fewer idle in the last round.
    long = keys >= 1 << 15 and stream_bytes(k, 512) <= device.shared_bytes
    threads = 512 if long else SELECT_THREADS
    in_block = max(1, min(1024 // threads, device.shared_bytes // stream_bytes(k, threads)))
    reserved = [_reserved(shape, tile, rows, keys, in_block, device)]
    # Rows in parts, or to be sorted, have memory of their own: they are as many in each launch.
    if not few and keys == shape.max_keys and not by_score:
        for i in range(1, RESERVED_LENGTHS):
            shorter = math.sqrt(2) ** i
            more, short = round(rows * shorter), math.ceil(keys / shorter)
            reserved.append(_reserved(shape, tile, more, short, in_block, device))
    select = stream_kernel(
        k, threads, values=values or own, rows=in_block, skips=not values and not own
    )
    return _Chunks(rows, keys, BUFFERS, tuple(reserved), select, own)


@lru_cache(maxsize=1024)
def plan_topk(shape: Shape, k: int, by_score: bool, values: bool, device: Device) -> TopkPlan:
    """Plan scoring and selection."""
    chunks = _chunks(shape, k, by_score, values, device)
    scoring = _score_plan(
        shape,
        device,
        Cut(
            shape.total_seq_len,
            shape.max_keys,
            chunks.tokens,
            chunks.keys,
            row_stride=aligned(chunks.keys),
            packed=len(chunks.reserved) > 1,
        ),
        dense=False,
        skip=k if dict(chunks.select.parameters).get("kUnscored") else 0,
        reserved=chunks.reserved,
    )
    return TopkPlan(
        scoring=scoring,
        buffers=chunks.buffers,
        select=chunks.select,
        select_blocks=max(chunks.reserved),
        own_values=chunks.own_values,
        sort=sort_kernel(k) if by_score else None,
        scratch=scoring.scratch(chunks.buffers, k, chunks.own_values, by_score),
    )
