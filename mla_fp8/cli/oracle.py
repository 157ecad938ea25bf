"""The contract in float64, written from its text alone: nothing of `mla_fp8` is imported here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MOST_POSITIONS = 2**31 - 2**16  # that `key_start` may name
_LEAST_SCALE = np.float32(2.0**-126)
_POWERS_OF_TWO = 2.0 ** np.arange(-126, 128)


def _e4m3_table() -> np.ndarray:
    """Value of each code: 1 sign, 4 exponent (bias 7), 3 mantissa bits; s.1111.111 is NaN."""
    values = np.empty(256)
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        leading = 8 if exponent else 0  # subnormals lack the leading one
        value = (leading + mantissa) * 2.0 ** (max(exponent, 1) - 10)
        if code & 0x7F == 0x7F:
            value = np.nan
        values[code] = -value if code & 0x80 else value
    return values


E4M3 = _e4m3_table()


class Expected(NamedTuple):
    scores: np.ndarray  # float64 [tokens, max_keys]; -inf where not selectable
    selectable: np.ndarray  # bool [tokens, max_keys]

    @property
    def counts(self) -> np.ndarray:
        found: np.ndarray = self.selectable.sum(axis=1)
        return found


def max_keys(
    case: Any, *, device_max_lengths: bool = False, key_start: Any = None, key_step: int = 1
) -> int:
    """Columns of the score matrix: what the table can hold, or less if the host knows better."""
    extent: int = case.k_lookup_table.shape[1] * case.k_blocks.shape[3]
    if device_max_lengths and key_start is None:
        return extent
    most = MOST_POSITIONS if device_max_lengths else sum(map(int, case.k_max_lengths[0]))
    first = key_start if isinstance(key_start, int) else 0
    return min(extent, _rows_of_shard(most // case.spec.kpool, first, key_step))


def _rows_of_shard(rows: int, key_start: int, key_step: int) -> int:
    """How many of the first ``rows`` rows of a sequence a shard holds."""
    return max(-(-(rows - key_start) // key_step), 0)


def token_ranges(case: Any) -> list[tuple[int, int]]:
    """The first token and the end token of each sequence, by the clamping rules."""
    offsets = np.clip(case.input_row_offsets.astype(np.int64), 0, len(case.q))
    return list(pairwise(np.maximum.accumulate(offsets).tolist()))


def evaluate(
    case: Any,
    *,
    device_max_lengths: bool = False,
    absolute: bool = False,
    score: Callable[..., np.ndarray] | None = None,
    key_start: Any = None,
    key_step: int = 1,
) -> Expected:
    """Scores and visible keys of a host case, by the clamping rules where its values are wrong.

    `absolute` sums the magnitudes of all terms instead, which is what rounding errors scale with;
    `score` gives other numbers than scores, from the arrays that `exact_scores` takes.
    `key_start` (None, an integer or an array) and `key_step` are those of a shard.
    """
    shard: dict[str, Any] = {"key_start": key_start, "key_step": key_step}
    blocks, table = _values(case.k_blocks), case.k_lookup_table.astype(np.int64)
    q = _values(case.q)
    gates = np.ones(q.shape[:2]) if case.qs is None else case.qs
    score = score or partial(exact_scores, absolute=absolute)
    tokens, columns = len(q), max_keys(case, device_max_lengths=device_max_lengths, **shard)
    num_blocks, _, _, page_size, _, _ = blocks.shape
    scores = np.full((tokens, columns), -np.inf)
    selectable = np.zeros((tokens, columns), bool)
    causal = str(case.spec.mask).lower() == "causal"
    given = 0 if key_start is None else key_start
    starts = np.broadcast_to(given, len(case.k_cache_lengths))

    for b, (first, last) in enumerate(token_ranges(case)):
        new, cached, start = last - first, int(case.k_cache_lengths[b]), int(starts[b])
        if new == 0 or num_blocks == 0 or not 0 <= start <= MOST_POSITIONS:
            continue
        tokens_seen = [cached + i + 1 if causal else cached + new for i in range(new)]
        seen = [
            min(_rows_of_shard(n // case.spec.kpool, start, key_step), columns) for n in tokens_seen
        ]
        if (width := max(seen)) == 0:
            continue
        position = np.arange(width)
        page = table[b, position // page_size]
        exists = (page >= 0) & (page < num_blocks)
        where = (np.where(exists, page, 0), 0, int(case.layer_idx), position % page_size)
        found = score(
            q[first:last],
            gates[first:last].astype(np.float64),
            blocks[where],
            case.k_scales[where].astype(np.float64),
        )
        rows = np.s_[first:last, :width]
        selectable[rows] = exists & (position < np.array(seen)[:, None])
        scores[rows] = np.where(selectable[rows], found, -np.inf)
    return Expected(scores, selectable)


def _values(codes: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = E4M3[codes.view(np.uint8)]
    return numbers


def exact_scores(
    q: np.ndarray, qs: np.ndarray, keys: np.ndarray, scales: np.ndarray, absolute: bool = False
) -> np.ndarray:
    """[n, H, D], [n, H], [S, kv, D], [S, kv, G] -> [n, S]."""
    if absolute:
        q, qs, keys = (np.abs(np.nan_to_num(x, posinf=0, neginf=0)) for x in (q, qs, keys))
        scales = np.nan_to_num(scales)
    _, heads, depth = q.shape
    groups, granules = keys.shape[1], scales.shape[2]
    size = depth // granules
    total = np.zeros((len(q), len(keys)))
    with np.errstate(invalid="ignore"):  # inf * 0 is a legal NaN
        for kv in range(groups):
            mine = np.s_[:, kv * (heads // groups) : (kv + 1) * (heads // groups)]
            dots = np.zeros((len(q), heads // groups, len(keys)))
            for g in range(granules):
                channels = np.s_[..., g * size : (g + 1) * size]
                part = q[mine][channels] @ keys[:, kv][channels].T
                dots += part if granules == 1 else part * scales[:, kv, g]
            gated = (np.fmax(dots, 0.0) * qs[mine][..., None]).sum(axis=1)
            total += gated * scales[:, kv, 0] if granules == 1 else gated
    return total


def ranked(scores: np.ndarray, selectable: np.ndarray) -> np.ndarray:
    """The columns of each row in the total order, those that are not selectable last.

    Higher score first, equal scores (-0.0 == 0.0) by position, NaN below every number.
    """
    nan = np.isnan(scores)
    position = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.lexsort((position, -np.where(nan, 0, scores), nan, ~selectable), axis=-1)


def best_first(scores: np.ndarray, selectable: np.ndarray) -> np.ndarray:
    """Selectable positions of one row in the total order."""
    order: np.ndarray = ranked(np.asarray(scores)[None], selectable[None])[0]
    return order[: np.count_nonzero(selectable)]


def expected_rows(
    scores: np.ndarray, selectable: np.ndarray, k: int, sort: str = "position"
) -> np.ndarray:
    """The output rows for given scores: int32 [rows, k], padded with -1."""
    rows, columns = scores.shape
    width = min(k, columns)
    chosen = ranked(scores, selectable)[:, :width]
    there = np.arange(width) < selectable.sum(axis=1)[:, None]
    if sort == "position":
        chosen = np.sort(np.where(there, chosen, columns), axis=1)  # what is not there goes last
    found = np.full((rows, k), -1, np.int32)
    found[:, :width] = np.where(there, chosen, -1)
    return found


def expected_topk(
    scores: np.ndarray, selectable: np.ndarray, k: int, sort: str = "position"
) -> np.ndarray:
    """The output row for the scores of one row: int32 [k], padded with -1."""
    row: np.ndarray = expected_rows(np.asarray(scores)[None], selectable[None], k, sort)[0]
    return row


def quantised(
    x: np.ndarray, groups: int, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 codes [..., depth] and float32 scales [..., groups]; ml_dtypes rounds to E4M3."""
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
        granules = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
        amax = np.where(np.isfinite(granules), np.abs(granules), 0).max(axis=-1)
        scales = np.maximum(amax / np.float32(448), _LEAST_SCALE)
        if power_of_two:
            scales = _POWERS_OF_TWO[np.searchsorted(_POWERS_OF_TWO, scales)].astype(np.float32)
        scales[amax < _LEAST_SCALE] = 1
        quotients = (granules / scales[..., None]).reshape(x.shape)
        codes = np.clip(quotients, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    codes[np.isnan(x)] = 0x7F
    return codes, scales
