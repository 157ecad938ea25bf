"""The spec in float64, written from spec.md alone: nothing of `mla_fp8` is imported here."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np


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
        return self.selectable.sum(axis=1)


def max_keys(case, *, device_max_lengths: bool = False) -> int:
    """Columns of the score matrix: what the table can hold, or less if the host knows better."""
    extent = case.k_lookup_table.shape[1] * case.k_blocks.shape[3]
    known = sum(map(int, case.k_max_lengths[0])) // case.spec.kpool
    return extent if device_max_lengths else min(extent, known)


def evaluate(case, *, device_max_lengths: bool = False, absolute: bool = False) -> Expected:
    """Scores and visible keys of a host case, by the clamping rules where its values are wrong.

    `absolute` sums the magnitudes of all terms instead, which is what rounding errors scale with.
    """
    blocks, table = _values(case.k_blocks), case.k_lookup_table.astype(np.int64)
    q = _values(case.q)
    gates = np.ones(q.shape[:2]) if case.qs is None else case.qs
    tokens, columns = len(q), max_keys(case, device_max_lengths=device_max_lengths)
    num_blocks, _, _, page_size, _, _ = blocks.shape
    scores = np.full((tokens, columns), -np.inf)
    selectable = np.zeros((tokens, columns), bool)

    offsets = np.clip(case.input_row_offsets.astype(np.int64), 0, tokens)
    offsets = np.maximum.accumulate(offsets)
    for b, (first, last) in enumerate(pairwise(offsets)):
        new, cached = int(last - first), int(case.k_cache_lengths[b])
        width = min(max((cached + new) // case.spec.kpool, 0), columns)
        if new == 0 or width == 0 or num_blocks == 0:
            continue
        position = np.arange(width)
        page = table[b, position // page_size]
        exists = (page >= 0) & (page < num_blocks)
        where = (np.where(exists, page, 0), 0, int(case.layer_idx), position % page_size)
        seen = _scores(
            q[first:last],
            gates[first:last].astype(np.float64),
            blocks[where],
            case.k_scales[where].astype(np.float64),
            absolute,
        )
        for i in range(new):
            n = cached + i + 1 if str(case.spec.mask).lower() == "causal" else cached + new
            n = min(max(n // case.spec.kpool, 0), columns)
            selectable[first + i, :n] = exists[:n]
        rows = np.s_[first:last, :width]
        scores[rows] = np.where(selectable[rows], seen, -np.inf)
    return Expected(scores, selectable)


def _values(codes: np.ndarray) -> np.ndarray:
    return E4M3[codes.view(np.uint8)]


def _scores(q, qs, keys, scales, absolute):
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


def best_first(scores: np.ndarray, selectable: np.ndarray) -> np.ndarray:
    """Selectable positions of one row in the total order.

    Higher score first, equal scores (-0.0 == 0.0) by position, NaN below every number.
    """
    position = np.flatnonzero(selectable)
    score = np.asarray(scores)[position]
    nan = np.isnan(score)
    return position[np.lexsort((position, -np.where(nan, 0, score), nan))]


def expected_topk(scores, selectable, k: int, sort: str = "position") -> np.ndarray:
    """The output row for given scores: int32 [k], padded with -1."""
    chosen = best_first(scores, selectable)[:k]
    row = np.full(k, -1, np.int32)
    row[: len(chosen)] = chosen if sort == "score" else np.sort(chosen)
    return row
