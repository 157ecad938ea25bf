"""How to score: the kernel, its tiles, its blocks, and what computes their work ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from mla_fp8._check.shape import Shape
from mla_fp8._plan.kernel import WARP, Device, Kernel, ceil_div, power_of_two
from mla_fp8._plan.tuning import Tuning
from mla_fp8._plan.workspace import MIN_WINDOWS, Split, Workspace, lay_out

_SCHEDULE_THREADS = 128
_FILL_THREADS = 256
FEWEST_COLUMNS = 8  # that a token takes in a product; a power of two
HOPPER_DEPTHS = (64, 128)
_HOPPER_SHARED_BYTES = 227 * 1024  # all that a block may have
_UNIT_KEYS = 64  # keys in a unit of work: kUnitKeys of scheduler.cuh
_WARPGROUP_COLUMNS = 256  # tokens x heads that the accumulators of a warpgroup hold
_WARPGROUP_TOKENS = 16  # with more, a lane has too few registers for what it keeps of each
MIN_BOX_ROWS = 8  # keys that a TMA instruction copies, at least; below, threads copy
MAX_TENSOR_BLOCKS = 1 << 31  # TMA coordinates are int32


class Route(Enum):
    """How a call is scored."""

    PORTABLE = "portable"  # mma on any GPU; a scheduler kernel finds each token's row
    DECODE = "decode"  # wgmma; the scoring blocks find their own work: few new tokens a sequence
    PREFILL = "prefill"  # wgmma; a scheduler kernel writes each block's work range


@dataclass(frozen=True)
class HopperTile:
    """The tokens of a tile, and how the consumer warpgroups of a block share its work."""

    tokens: int  # of one warpgroup
    token_groups: int  # warpgroups that split the tokens
    key_groups: int  # warpgroups that split the keys
    box_rows: int  # keys that one TMA instruction copies, if at least MIN_BOX_ROWS

    @property
    def all_tokens(self) -> int:
        return self.tokens * self.token_groups


@dataclass(frozen=True)
class ScorePlan:
    """How to score all parts of a split."""

    route: Route
    split: Split
    kernel: Kernel
    blocks: int  # of a launch; on the portable route, of a launch that scores a full part
    tile_tokens: int
    box_rows: int  # keys of a TMA box; 0: the kernel takes no tensor map
    unscored_kv_len: int  # tokens that see no more keys than this are not scored
    schedule: Kernel | None  # the scheduler kernel
    scheduled_launches: int  # launches whose work ranges the scheduler writes
    fill: Kernel | None  # writes -inf where a dense matrix has no score
    fill_blocks: int

    def schedule_blocks(self, tokens: int, launches: int) -> int:
        """Blocks of the scheduler: a warp for each token row and each work range it writes."""
        return ceil_div(tokens + launches * self.blocks, _SCHEDULE_THREADS // WARP)

    def lay_out(
        self, buffers: int = 0, k: int = 0, keeps_values: bool = False, sorts: bool = False
    ) -> Workspace:
        """The workspace of a call with this plan."""
        return lay_out(
            self.split,
            token_rows=self.split.tokens,
            scheduled_launches=self.scheduled_launches,
            blocks=self.blocks,
            buffers=buffers,
            k=k,
            keeps_values=keeps_values,
            sorts=sorts,
        )


def runs_on_hopper(depth: int, kv_heads: int, scale_groups: int, device: Device) -> bool:
    """Whether ``index_scores_sm90`` scores, rather than ``index_scores``.

    Batch and lengths play no part: the kernels round differently, and no bit of a score may depend
    on what else is in the call.
    """
    fits = depth in HOPPER_DEPTHS and kv_heads == 1 and scale_groups == 1
    return device.arch == "sm_90a" and fits


def head_columns(num_heads: int) -> int:
    """Columns that a token takes in a product of ``index_scores_sm90``; some may be padding."""
    return max(power_of_two(num_heads), FEWEST_COLUMNS)


def hopper_tile(shape: Shape) -> HopperTile:
    """The tile for a sequence's tokens.

    If the tokens of a sequence fit one warpgroup, all warpgroups take all tokens and split the
    keys: four if the registers allow, else two. Otherwise two warpgroups split the tokens.
    """
    columns = head_columns(shape.num_heads)
    most = min(_WARPGROUP_COLUMNS // columns, _WARPGROUP_TOKENS)
    by_tma = shape.key_alignment == 16 and shape.num_blocks < MAX_TENSOR_BLOCKS
    box_rows = math.gcd(shape.page_size, _UNIT_KEYS) if by_tma else 1
    if shape.max_new > most:
        return HopperTile(most, 2, 1, box_rows)
    tokens = power_of_two(shape.max_new)
    return HopperTile(tokens, 1, 4 if tokens * columns <= 64 else 2, box_rows)


def route_of(shape: Shape, device: Device) -> Route:
    """The route of a call."""
    s = shape
    if not runs_on_hopper(s.depth, s.kv_heads, s.scale_groups, device):
        return Route.PORTABLE
    return Route.DECODE if hopper_tile(shape).key_groups > 1 else Route.PREFILL


def _schedule_kernel(shape: Shape, tile_tokens: int, unit_keys: int) -> Kernel:
    macros = {
        "kThreads": _SCHEDULE_THREADS,
        "kTokensPerKey": shape.tokens_per_key,
        "kTileTokens": tile_tokens,
        "kHalfTileUnitKeys": unit_keys,
        "kMinWindows": MIN_WINDOWS,
    }
    return Kernel("schedule", tuple(macros.items()), _SCHEDULE_THREADS)


def _hopper_kernel(shape: Shape, tile: HopperTile, unit_keys: int) -> Kernel:
    macros = {
        "kHeads": shape.num_heads,
        "kHeadColumns": head_columns(shape.num_heads),
        "kDepth": shape.depth,
        "kTokensPerKey": shape.tokens_per_key,
        "kTokens": tile.tokens,
        "kTokenGroups": tile.token_groups,
        "kKeyGroups": tile.key_groups,
        "kBoxRows": tile.box_rows,
        "kKeyAlignment": shape.key_alignment,
        "kHalfTileUnitKeys": unit_keys,
        "kSharedBytes": _HOPPER_SHARED_BYTES,
    }
    threads = 128 * (tile.token_groups * tile.key_groups + 1)  # one warpgroup is the producer
    return Kernel("index_scores_sm90", tuple(macros.items()), threads, _HOPPER_SHARED_BYTES)


def _portable_tile_tokens(
    shape: Shape, tokens: int, key_tiles: int, device: Device, tuning: Tuning
) -> int:
    """Tokens that share one load of a key tile.

    More tokens save loads; fewer give more blocks, at least two for each multiprocessor. Tokens
    of different sequences have no keys in common.
    """
    per_sequence = ceil_div(tokens, max(shape.batch, 1))
    tile = 1
    while 2 * tile <= min(per_sequence, tuning.portable_tile_tokens):
        if key_tiles * ceil_div(tokens, 2 * tile) < 2 * device.multiprocessors:
            break
        tile *= 2
    return tile


def _plan_portable(
    shape: Shape, device: Device, tuning: Tuning, split: Split, dense: bool
) -> ScorePlan:
    # The fragments of 16 keys take depth / 4 registers of a thread, and key scales more: 32 keys
    # of 256 channels do not fit beside the rest.
    keys_per_warp = 16 if shape.depth == 256 else 32
    warps = tuning.portable_warps
    key_tiles = ceil_div(shape.max_keys, warps * keys_per_warp)
    tile = _portable_tile_tokens(shape, split.part_tokens, key_tiles, device, tuning)
    heads = 8 * ceil_div(shape.num_heads // shape.kv_heads, 8)
    macros = {
        "kHeads": shape.num_heads,
        "kKvHeads": shape.kv_heads,
        "kDepth": shape.depth,
        "kScaleGroups": shape.scale_groups,
        "kKeyAlignment": shape.key_alignment,
        "kKeysPerWarp": keys_per_warp,
        "kWarps": warps,
        "kHeadChunk": min(heads, 32 if shape.depth == 256 else 64),
        "kDense": int(dense),
    }
    return ScorePlan(
        route=Route.PORTABLE,
        split=split,
        kernel=Kernel("index_scores", tuple(macros.items()), WARP * warps),
        blocks=key_tiles * ceil_div(split.part_tokens, tile),
        tile_tokens=tile,
        box_rows=0,
        unscored_kv_len=0,
        schedule=_schedule_kernel(shape, 0, _UNIT_KEYS),
        scheduled_launches=0,
        fill=None,
        fill_blocks=0,
    )


def plan_scoring(
    shape: Shape,
    device: Device,
    tuning: Tuning,
    split: Split,
    *,
    dense: bool = False,
    unscored_kv_len: int = 0,
    selection_blocks: int = 0,
) -> ScorePlan:
    """Plan the launches that score a split.

    ``dense``: the scores are the result, with -inf in place of each key that a token does not see.
    ``selection_blocks``: multiprocessors that scoring leaves to selection.
    """
    route = route_of(shape, device)
    if route is Route.PORTABLE:
        return _plan_portable(shape, device, tuning, split, dense)
    tile = hopper_tile(shape)
    unit_keys = tuning.half_tile_unit_keys if route is Route.PREFILL else _UNIT_KEYS
    launches = len(split.parts) if route is Route.PREFILL and split.keys else 0
    schedule = _schedule_kernel(shape, tile.all_tokens if launches else 0, unit_keys)
    fill = Kernel("fill_invalid", (("kThreads", _FILL_THREADS),), _FILL_THREADS)
    return ScorePlan(
        route=route,
        split=split,
        kernel=_hopper_kernel(shape, tile, unit_keys),
        blocks=device.multiprocessors - selection_blocks,
        tile_tokens=tile.all_tokens,
        box_rows=tile.box_rows,
        unscored_kv_len=unscored_kv_len,
        schedule=schedule if route is Route.PREFILL else None,
        scheduled_launches=launches,
        fill=fill if dense else None,
        fill_blocks=4 * device.multiprocessors,
    )


@lru_cache(maxsize=1024)
def plan_scores(shape: Shape, device: Device, tuning: Tuning) -> ScorePlan:
    """Plan the dense matrix of all scores, in one launch."""
    tokens, keys = shape.total_seq_len, shape.max_keys
    return plan_scoring(shape, device, tuning, Split(tokens, keys, tokens, keys, keys), dense=True)
