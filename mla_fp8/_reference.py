"""The operation in NumPy: the same problem as the kernels, the same answer, to be read in one go.

Scores are computed in float64. A product of two E4M3 numbers is a multiple of 2**-18 below 2**18,
so a sum of 256 of them fits into 44 bits: every dot product is exact, whatever the order in which
BLAS adds. What follows is added head by head, so a score's bits do not depend on what else is in
the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from mla_fp8._problem import Problem, Selection
from mla_fp8.fp8 import decode

_BLOCK_BYTES = 64 << 20  # of dot products held at once


def token_spans(problem: Problem) -> list[tuple[int, int, int]]:
    """(sequence, first token, end token) of every sequence that has tokens.

    Offsets are read as if clamped to [0, total_seq_len] and replaced by their running maximum.
    """
    offsets = problem.input_row_offsets.astype(np.int64)
    offsets = np.maximum.accumulate(np.clip(offsets, 0, problem.shape.total_seq_len))
    return [
        (b, int(begin), int(end)) for b, (begin, end) in enumerate(pairwise(offsets)) if begin < end
    ]


def keys_seen(problem: Problem, sequence: int, begin: int, end: int) -> np.ndarray:
    """n(t) of the tokens ``begin`` ... ``end - 1`` of a sequence, within [0, max_keys]."""
    length = end - begin
    new = np.arange(1, length + 1) if problem.shape.causal else np.full(length, length)
    seen: np.ndarray = problem.cached(sequence, length) + new
    return seen.clip(0, problem.shape.max_keys)


def gather_keys(
    problem: Problem, sequence: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first ``count`` keys: values [count, kv_heads, depth], scales, and whether they exist."""
    s = problem.shape
    position = np.arange(count)
    block = problem.k_lookup_table[sequence, position // s.page_size].astype(np.int64)
    exists = (block >= 0) & (block < s.num_blocks)
    values = np.zeros((count, s.kv_heads, s.depth))
    scales = np.zeros((count, s.kv_heads, s.scale_groups))
    where = block[exists], 0, problem.layer, position[exists] % s.page_size
    values[exists] = decode(problem.k_blocks[where])
    scales[exists] = problem.k_scales[where]
    return values, scales, exists


def score_keys(q: np.ndarray, qs: np.ndarray, keys: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 scores [tokens, keys] of float64 queries, gates, keys and key scales."""
    tokens, heads, depth = q.shape
    count, kv_heads, groups = scales.shape
    per_kv, width = heads // kv_heads, depth // groups
    scores = np.zeros((tokens, count))
    with np.errstate(all="ignore"):  # NaN and infinity are ordinary numbers here
        for kv in range(kv_heads):
            dots = np.zeros((tokens, per_kv, count))
            for g in range(groups):
                channels = slice(g * width, (g + 1) * width)
                rows = q[:, kv * per_kv : (kv + 1) * per_kv, channels].reshape(-1, width)
                products = (rows @ keys[:, kv, channels].T).reshape(dots.shape)
                dots += products if groups == 1 else scales[:, kv, g] * products
            relu = np.fmax(dots, 0)  # IEEE 754 maximumNumber: a NaN product counts as 0
            gated = np.zeros((tokens, count))
            for h in range(per_kv):
                gated += qs[:, kv * per_kv + h, None] * relu[:, h]
            scores += scales[:, kv, 0] * gated if groups == 1 else gated
        return scores.astype(np.float32)


def top_columns(scores: np.ndarray, columns: np.ndarray, selection: Selection) -> np.ndarray:
    """The ``columns`` (ascending) whose ``scores`` rank first, in the order asked for."""
    # A stable sort keeps the smaller column first among equals, has NaN last, and -0.0 == 0.0.
    order = np.argsort(-scores[columns], kind="stable")[: selection.k]
    return columns[order] if selection.by_score else columns[np.sort(order)]


def _write_row(selection: Selection, row: int, scores: np.ndarray, columns: np.ndarray) -> None:
    top = top_columns(scores, columns, selection)
    selection.indices[row, : top.size] = top
    selection.indices[row, top.size :] = -1
    if selection.values is not None:
        selection.values[row, : top.size] = scores[top]
        selection.values[row, top.size :] = -np.inf


def _scored_rows(problem: Problem) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (token, its scores, which keys exist) for every token of a sequence."""
    s = problem.shape
    for sequence, begin, end in token_spans(problem):
        seen = keys_seen(problem, sequence, begin, end)
        keys, scales, exists = gather_keys(problem, sequence, int(seen.max()))
        step = max(1, _BLOCK_BYTES // (8 * s.num_heads * max(1, exists.size)))
        for first in range(begin, end, step):
            tokens = slice(first, min(first + step, end))
            q = decode(problem.q[tokens]).astype(np.float64)
            scores = score_keys(q, problem.qs[tokens].astype(np.float64), keys, scales)
            for token, row in enumerate(scores, first):
                n = seen[token - begin]
                yield token, row[:n], exists[:n]


def scratch_bytes(problem: Problem, k: int, by_score: bool, values: bool) -> int:
    """Device memory that `index_topk` takes beside the output: none."""
    return 0


def warmup(problem: Problem, k: int, by_score: bool, values: bool) -> None:
    """Compile what `index_topk` needs: nothing."""


def index_topk(problem: Problem, selection: Selection) -> None:
    """Write the top-k key positions of every token, and their scores where asked for."""
    nothing = np.empty(0, np.float32), np.empty(0, np.int64)
    for token in range(problem.shape.total_seq_len):
        _write_row(selection, token, *nothing)
    for token, scores, exists in _scored_rows(problem):
        _write_row(selection, token, scores, np.flatnonzero(exists))


def index_scores(problem: Problem, out: np.ndarray) -> None:
    """Write every score, -inf where the token does not see the key."""
    out.fill(-np.inf)
    for token, scores, exists in _scored_rows(problem):
        out[token, : scores.size] = np.where(exists, scores, -np.inf)


def select_topk(scores: np.ndarray, lengths: np.ndarray | None, selection: Selection) -> None:
    """Write the top-k columns of each row among its first ``lengths`` columns."""
    rows, columns = scores.shape
    if lengths is None:
        lengths = np.full(rows, columns)
    for row, length in enumerate(np.clip(lengths.astype(np.int64), 0, columns)):
        _write_row(selection, row, scores[row], np.arange(length))
