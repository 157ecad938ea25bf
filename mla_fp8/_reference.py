"""The operation in NumPy: the same problem as the kernels, the same answer, to be read in one go.

Scores are computed in float64. A product of two E4M3 numbers is a multiple of 2**-18 below 2**18,
so a sum of 256 of them fits into 44 bits: every dot product is exact, whatever the order in which
BLAS adds. What follows are operations element by element, and heads are added in an order that
their number sets. So a score's bits do not depend on what else is in the batch, nor on how tokens
and keys are cut into blocks. A block of dot products fits into a cache: those of all tokens and all
keys would be written to memory, and read, once for each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import pairwise

import numpy as np

from mla_fp8._check.problem import Problem, Selection
from mla_fp8.fp8 import decode

# BLAS threads wait for each other at each product, so blocks are as large as a cache.
_DOTS_BYTES = 16 << 20  # of dot products at a time
_FEWEST_KEYS, _MOST_KEYS = 1024, 16384  # that they belong to
_CHUNK_BYTES = 32 << 20  # of scores, and of queries in float64, before rows are selected from
_SELECTED_SCORES = 1 << 18  # that are looked through at a time
_UNSELECTABLE, _NAN = np.int32(-(2**31)), np.int32(-(2**31) + 1)  # what `_ordered` gives them

# The two numbers of each two codes, as one number to NumPy.
_PAIRS = decode(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).astype(np.float64).view(complex)


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


def _numbers(codes: np.ndarray) -> np.ndarray:
    """float64 numbers of E4M3 codes, looked up in pairs: the fastest that NumPy has."""
    numbers: np.ndarray = np.take(_PAIRS, codes.view(np.uint16)).view(np.float64)
    return numbers


def gather_keys(
    problem: Problem, sequence: int, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values [keys, kv_heads, depth] and scales of a range of keys, and whether they exist."""
    s = problem.shape
    position = np.arange(begin, end)
    block = problem.k_lookup_table[sequence, position // s.page_size].astype(np.int64)
    exists = (block >= 0) & (block < s.num_blocks)
    codes = np.zeros((position.size, s.kv_heads, s.depth), np.uint8)
    scales = np.zeros((position.size, s.kv_heads, s.scale_groups))
    where = block[exists], 0, problem.layer, position[exists] % s.page_size
    codes[exists] = problem.k_blocks[where]
    scales[exists] = problem.k_scales[where]
    return _numbers(codes), scales, exists


def _dot_products(q: np.ndarray, keys: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[tokens, heads, keys] of queries, and keys [keys, depth] with scales [keys, groups]."""
    tokens, heads, depth = q.shape
    count, groups = scales.shape
    width = depth // groups

    def part(g: int) -> np.ndarray:
        channels = slice(g * width, (g + 1) * width)
        products: np.ndarray = q[..., channels].reshape(-1, width) @ keys[:, channels].T
        if groups > 1:  # the scale of one group is for the whole score
            products *= scales[:, g]
        return products.reshape(tokens, heads, count)

    dots: np.ndarray = reduce(np.add, map(part, range(groups)))
    return dots


def score_keys(q: np.ndarray, qs: np.ndarray, keys: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 scores [tokens, keys] of float64 queries, gates, keys and key scales."""
    count, kv_heads, groups = scales.shape
    per_kv = q.shape[1] // kv_heads
    scores, zeros = np.zeros((len(q), count)), np.zeros(count)
    with np.errstate(all="ignore"):  # NaN and infinity are ordinary numbers here
        for kv in range(kv_heads):
            heads = slice(kv * per_kv, (kv + 1) * per_kv)
            dots = _dot_products(q[:, heads], keys[:, kv], scales[:, kv])
            # IEEE 754 maximumNumber: a NaN product counts as 0. NumPy has vector instructions for
            # this with a row of zeros, not with one zero.
            np.fmax(dots, zeros, out=dots)
            dots *= qs[:, heads, None]
            while half := dots.shape[1] // 2:  # add the upper half of the heads to the lower
                dots[:, :half] += dots[:, -half:]
                dots = dots[:, :-half]
            scores += scales[:, kv, 0] * dots[:, 0] if groups == 1 else dots[:, 0]
        return scores.astype(np.float32)


def _score_tokens(
    problem: Problem, sequence: int, tokens: slice, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float32 scores [tokens, keys] of a sequence's tokens as far as they see, which keys exist."""
    q = _numbers(problem.q[tokens])
    qs = problem.qs[tokens].astype(np.float64)
    keys = int(seen.max())
    scores, exists = np.zeros((len(q), keys), np.float32), np.empty(keys, bool)
    pairs = _DOTS_BYTES // (8 * problem.shape.num_heads)
    step = min(max(pairs // len(q), _FEWEST_KEYS), _MOST_KEYS)
    few = max(1, pairs // step)
    for begin in range(0, keys, step):
        columns = slice(begin, min(begin + step, keys))
        values, scales, exists[columns] = gather_keys(problem, sequence, begin, columns.stop)
        for first in range(0, len(q), few):
            rows = slice(first, first + few)
            if seen[rows].max() > begin:
                scores[rows, columns] = score_keys(q[rows], qs[rows], values, scales)
    return scores, exists


def _scored_rows(problem: Problem) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first token, scores [tokens, keys], which of them the tokens may select)."""
    s = problem.shape
    for sequence, begin, end in token_spans(problem):
        seen = keys_seen(problem, sequence, begin, end)
        step = max(1, _CHUNK_BYTES // max(4 * int(seen.max()), 8 * s.num_heads * s.depth))
        for first in range(begin, end, step):
            tokens = slice(first, min(first + step, end))
            n = seen[first - begin : tokens.stop - begin]
            scores, exists = _score_tokens(problem, sequence, tokens, n)
            for rows in _row_blocks(scores):
                selectable = exists & (np.arange(exists.size) < n[rows, None])
                yield first + rows.start, scores[rows], selectable


def _row_blocks(scores: np.ndarray) -> Iterator[slice]:
    """Rows to select from at a time."""
    rows, columns = scores.shape
    step = max(1, _SELECTED_SCORES // max(1, columns))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _ordered(scores: np.ndarray, selectable: np.ndarray) -> np.ndarray:
    """int32 numbers in the total order of float32 scores: larger is better, equal is equal."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        bits = (scores + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)  # of negative numbers the larger magnitude is less
    np.copyto(bits, _NAN, where=np.isnan(scores))
    np.copyto(bits, _UNSELECTABLE, where=~selectable)
    return bits


def _select_rows(
    selection: Selection, first: int, scores: np.ndarray, selectable: np.ndarray
) -> None:
    """Write the top-k of rows of scores to the rows of the selection from ``first`` on."""
    k = min(selection.k, scores.shape[1])
    if k == 0:
        return
    order = _ordered(scores, selectable)
    least = np.maximum(np.partition(order, -k, axis=1)[:, -k, None], _NAN)
    chosen = order >= least
    counts = np.count_nonzero(chosen, axis=1)
    crowded = np.flatnonzero(counts > k)  # of equals that are too many the first are chosen
    if crowded.size:
        equal = order[crowded] == least[crowded]
        kept = np.count_nonzero(equal, axis=1) - counts[crowded] + k
        chosen[crowded] &= ~equal | (np.cumsum(equal, axis=1) <= kept[:, None])
        counts[crowded] = k
    rows, columns = np.nonzero(chosen)
    if selection.by_score:
        columns = columns[np.lexsort((~order[rows, columns], rows))]
    places = first + rows, np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    selection.indices[places] = columns
    if selection.values is not None:
        selection.values[places] = scores[rows, columns]


def _pad(selection: Selection) -> None:
    """What stands where nothing was selected."""
    selection.indices.fill(-1)
    if selection.values is not None:
        selection.values.fill(-np.inf)


def scratch_bytes(problem: Problem, k: int, by_score: bool, values: bool) -> int:
    """Device memory that `index_topk` takes beside the output: none."""
    return 0


def warmup(problem: Problem, k: int, by_score: bool, values: bool) -> None:
    """Compile what `index_topk` needs: nothing."""


def index_topk(problem: Problem, selection: Selection) -> None:
    """Write the top-k key positions of every token, and their scores where asked for."""
    _pad(selection)
    for first, scores, selectable in _scored_rows(problem):
        _select_rows(selection, first, scores, selectable)


def index_scores(problem: Problem, out: np.ndarray) -> None:
    """Write every score, -inf where the token does not see the key."""
    out.fill(-np.inf)
    for first, scores, selectable in _scored_rows(problem):
        rows, columns = scores.shape
        np.copyto(out[first : first + rows, :columns], scores, where=selectable)


def select_topk(scores: np.ndarray, lengths: np.ndarray | None, selection: Selection) -> None:
    """Write the top-k columns of each row among its first ``lengths`` columns."""
    rows, columns = scores.shape
    lengths = np.full(rows, columns) if lengths is None else lengths
    _pad(selection)
    for block in _row_blocks(scores):
        selectable = np.arange(columns) < lengths[block, None]
        _select_rows(selection, block.start, scores[block], selectable)
