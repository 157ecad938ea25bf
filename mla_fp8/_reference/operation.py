"""The operation in NumPy, in a form that is easy to read.

Scores are computed in float64. A product of two E4M3 numbers is a multiple of 2**-18 below 2**18,
so a sum of 256 products fits into 44 bits: every dot product is exact in any order of additions.
The later steps work element by element, except the sum over heads, whose order depends on the
number of heads alone. So the bits of a score depend neither on the rest of the batch nor on how
tokens and keys are cut into blocks. A block of dot products fits into the processor's cache; a
matrix for all tokens and keys would go through memory once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import pairwise

import numpy as np

from mla_fp8._check.arrays import Array
from mla_fp8._check.outputs import Selection
from mla_fp8._check.parameters import Output
from mla_fp8._check.problem import Problem
from mla_fp8._check.shape import MOST, rows_seen
from mla_fp8._e4m3 import decode

# Blocks fill a cache, because BLAS threads wait for each other after each product.
_DOTS_BYTES = 16 << 20  # of a block of dot products
_FEWEST_KEYS, _MOST_KEYS = 1024, 16384  # of a block
_CHUNK_BYTES = 32 << 20  # of the scores, or of the float64 queries, of tokens scored together
_SELECTED_SCORES = 1 << 18  # scores that are selected from at once
_BEYOND = 1 << 40  # a first row that no length reaches
_UNSELECTABLE, _NAN = np.int32(-(2**31)), np.int32(-(2**31) + 1)  # their places in `_ordered`

# The two numbers for every pair of codes, as one complex number: half as many lookups.
_PAIRS = decode(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).astype(np.float64).view(complex)


def token_ranges(problem: Problem) -> list[tuple[int, int, int]]:
    """(sequence, first token, end token) of every sequence that has tokens.

    Offsets are clamped to [0, total_seq_len] and replaced by their running maximum.
    """
    offsets = problem.input_row_offsets.astype(np.int64)
    offsets = np.maximum.accumulate(np.clip(offsets, 0, problem.shape.total_seq_len))
    return [
        (b, int(begin), int(end)) for b, (begin, end) in enumerate(pairwise(offsets)) if begin < end
    ]


def keys_seen(problem: Problem, sequence: int, begin: int, end: int) -> np.ndarray:
    """kv_len, the cached rows seen, of the tokens ``begin`` to ``end - 1`` of a sequence."""
    s, length = problem.shape, end - begin
    new = np.arange(1, length + 1) if s.causal else np.full(length, length)
    tokens = problem.cached(sequence, length) + new
    rows: np.ndarray = rows_seen(tokens, s.kpool, first_row(problem, sequence), s.key_step)
    return rows.clip(0, s.max_keys)


def first_row(problem: Problem, sequence: int) -> int:
    """The position of the first row that a shard holds of a sequence."""
    if problem.key_starts is None:
        return problem.key_start
    start = int(problem.key_starts[sequence])
    return start if 0 <= start <= MOST else _BEYOND


def _numbers(codes: np.ndarray) -> np.ndarray:
    """E4M3 codes as float64 numbers. Looking up pairs is the fastest way in NumPy."""
    numbers: np.ndarray = np.take(_PAIRS, codes.view(np.uint16)).view(np.float64)
    return numbers


def blocks_of(problem: Problem, sequence: int, position: np.ndarray) -> np.ndarray:
    """The block of each position, as the lookup table has it."""
    pages = position // problem.shape.page_size
    blocks: np.ndarray = problem.k_lookup_table[sequence, pages].astype(np.int64)
    return blocks


def gather_keys(
    problem: Problem, sequence: int, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values [keys, kv_heads, depth], scales and existence of the keys ``begin`` to ``end - 1``.

    A key does not exist if its page number in the lookup table is out of bounds.
    """
    s = problem.shape
    position = np.arange(begin, end)
    block = blocks_of(problem, sequence, position)
    exists = (block >= 0) & (block < s.num_blocks)
    codes = np.zeros((position.size, s.kv_heads, s.depth), np.uint8)
    scales = np.zeros((position.size, s.kv_heads, s.scale_groups))
    where = block[exists], 0, problem.layer, position[exists] % s.page_size
    codes[exists] = problem.k_blocks[where]
    scales[exists] = problem.k_scales[where]
    return _numbers(codes), scales, exists


def _dot_products(q: np.ndarray, keys: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Dot products [tokens, heads, keys] with keys [keys, depth] and scales [keys, groups]."""
    tokens, heads, depth = q.shape
    count, groups = scales.shape
    width = depth // groups

    def part(g: int) -> np.ndarray:
        channels = slice(g * width, (g + 1) * width)
        products: np.ndarray = q[..., channels].reshape(-1, width) @ keys[:, channels].T
        if groups > 1:  # a single group's scale multiplies the score, in `score_keys`
            products *= scales[:, g]
        return products.reshape(tokens, heads, count)

    dots: np.ndarray = reduce(np.add, map(part, range(groups)))
    return dots


def score_keys(q: np.ndarray, qs: np.ndarray, keys: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 scores [tokens, keys] of float64 queries, gates, keys and key scales."""
    count, kv_heads, groups = scales.shape
    per_kv = q.shape[1] // kv_heads
    scores, zeros = np.zeros((len(q), count)), np.zeros(count)
    with np.errstate(all="ignore"):  # NaN and infinity are legal
        for kv in range(kv_heads):
            heads = slice(kv * per_kv, (kv + 1) * per_kv)
            dots = _dot_products(q[:, heads], keys[:, kv], scales[:, kv])
            # IEEE 754 maximumNumber: a NaN product counts as 0. NumPy vectorises this for a row of
            # zeros, but not for a scalar zero.
            np.fmax(dots, zeros, out=dots)
            dots *= qs[:, heads, None]
            while half := dots.shape[1] // 2:  # add the last half of the heads to the first
                dots[:, :half] += dots[:, -half:]
                dots = dots[:, :-half]
            scores += scales[:, kv, 0] * dots[:, 0] if groups == 1 else dots[:, 0]
        return scores.astype(np.float32)


def _score_tokens(
    problem: Problem, sequence: int, tokens: slice, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float32 scores [tokens, keys] of the keys that some token sees, and which keys exist."""
    q = _numbers(problem.q[tokens])
    qs = np.ones(q.shape[:2]) if problem.qs is None else problem.qs[tokens].astype(np.float64)
    keys = int(seen.max())
    scores, exists = np.zeros((len(q), keys), np.float32), np.empty(keys, bool)
    pairs = _DOTS_BYTES // (8 * problem.shape.num_heads)
    step = min(max(pairs // len(q), _FEWEST_KEYS), _MOST_KEYS)
    count = max(1, pairs // step)  # of tokens in a block
    for begin in range(0, keys, step):
        columns = slice(begin, min(begin + step, keys))
        values, scales, exists[columns] = gather_keys(problem, sequence, begin, columns.stop)
        for first in range(0, len(q), count):
            rows = slice(first, first + count)
            if seen[rows].max() > begin:
                scores[rows, columns] = score_keys(q[rows], qs[rows], values, scales)
    return scores, exists


def _scored_rows(problem: Problem) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first token, scores [tokens, keys], which scores may be selected)."""
    s = problem.shape
    for sequence, begin, end in token_ranges(problem):
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
    """Blocks of rows to select from at once."""
    rows, columns = scores.shape
    step = max(1, _SELECTED_SCORES // max(1, columns))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _ordered(scores: np.ndarray, selectable: np.ndarray) -> np.ndarray:
    """Map float32 scores to int32 numbers of the same order; scores that are equal stay equal."""
    with np.errstate(invalid="ignore"):  # raised for a signalling NaN
        bits = (scores + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)  # reverse the order of negative numbers
    np.copyto(bits, _NAN, where=np.isnan(scores))
    np.copyto(bits, _UNSELECTABLE, where=~selectable)
    return bits


def _select_rows(
    selection: Selection, first: int, scores: np.ndarray, selectable: np.ndarray
) -> None:
    """Write the top-k of rows of scores to the selection's rows from ``first`` on."""
    k = min(selection.k, scores.shape[1])
    if k == 0:
        return
    order = _ordered(scores, selectable)
    least = np.maximum(np.partition(order, -k, axis=1)[:, -k, None], _NAN)
    chosen = order >= least
    counts = np.count_nonzero(chosen, axis=1)
    tied = np.flatnonzero(counts > k)  # rows with too many scores equal to the k-th: keep the first
    if tied.size:
        equal = order[tied] == least[tied]
        kept = np.count_nonzero(equal, axis=1) - counts[tied] + k
        chosen[tied] &= ~equal | (np.cumsum(equal, axis=1) <= kept[:, None])
        counts[tied] = k
    rows, columns = np.nonzero(chosen)
    if selection.by_score:
        columns = columns[np.lexsort((~order[rows, columns], rows))]
    places = first + rows, np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    selection.indices[places] = columns
    if selection.values is not None:
        selection.values[places] = scores[rows, columns]


def _pad(selection: Selection) -> None:
    """Fill the outputs with what marks entries without a key."""
    selection.indices.fill(-1)
    if selection.values is not None:
        selection.values.fill(-np.inf)


def topk_workspace_bytes(
    problem: Problem, k: int, by_score: bool, values: bool, output: Output
) -> int:
    """Scratch memory of `index_topk`."""
    return 0


def scores_workspace_bytes(problem: Problem) -> int:
    """Scratch memory of `index_scores`."""
    return 0


def select_workspace_bytes(
    scores: Array, lengths: Array | None, k: int, by_score: bool, values: bool
) -> int:
    """Scratch memory of `select_topk`."""
    return 0


def warmup(problem: Problem, k: int, by_score: bool, values: bool, output: Output) -> None:
    """Compile what `index_topk` needs: nothing."""


def index_topk(problem: Problem, selection: Selection) -> None:
    """Write the top-k key positions of every token and, if the selection has values, the scores."""
    _pad(selection)
    for first, scores, selectable in _scored_rows(problem):
        _select_rows(selection, first, scores, selectable)
    _translate(problem, selection)


def bind_topk(problem: Problem, selection: Selection) -> Callable[[], None]:
    """Return `index_topk` of these arrays, to be called many times."""
    return partial(index_topk, problem, selection)


def _translate(problem: Problem, selection: Selection) -> None:
    """Turn the selected columns into positions, slots or both."""
    s, output = problem.shape, selection.output
    if selection.slots is not None:
        selection.slots.fill(-1)
    if output is Output.POSITIONS and not s.sharded:
        return
    for sequence, begin, end in token_ranges(problem):
        indices = selection.indices[begin:end]
        found = indices >= 0
        columns = indices[found].astype(np.int64)
        block = blocks_of(problem, sequence, columns)
        slots = block * s.page_size + columns % s.page_size
        positions = first_row(problem, sequence) + s.key_step * columns
        indices[found] = slots if output is Output.SLOTS else positions
        if selection.slots is not None:
            selection.slots[begin:end][found] = slots


def index_scores(problem: Problem, out: Array, workspace: Array | None) -> None:
    """Write every score, -inf where the token does not see the key."""
    out.fill(-np.inf)
    for first, scores, selectable in _scored_rows(problem):
        rows, columns = scores.shape
        np.copyto(out[first : first + rows, :columns], scores, where=selectable)


def select_topk(scores: Array, lengths: Array | None, selection: Selection) -> None:
    """Write the top-k columns of each row among its first ``lengths`` columns."""
    rows, columns = scores.shape
    lengths = np.full(rows, columns) if lengths is None else lengths
    _pad(selection)
    for block in _row_blocks(scores):
        selectable = np.arange(columns) < lengths[block, None]
        _select_rows(selection, block.start, scores[block], selectable)
