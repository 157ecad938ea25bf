"""`expand_pools` against the definition of spec.md, written token by token."""

from itertools import pairwise

import numpy as np
import pytest
from properties import POISON, assert_helpful, host, same_bits

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, expand_pools, fp8

NEW = (3, 0, 1, 6, 2)
CACHED = (0, 4, 11, 2, 37)
PLACES = [(b, i) for b, new in enumerate(NEW) for i in range(new)]  # sequence, place in it


def _seen(mask: str) -> list[int]:
    """The tokens that each new token sees."""
    if mask == "null":
        return [CACHED[b] + NEW[b] for b, _ in PLACES]
    return [CACHED[b] + i + 1 for b, i in PLACES]


def _expected(rows, seen, kpool: int) -> np.ndarray:
    """The definition, by lists."""
    width = rows.shape[1] * kpool + kpool - 1
    found = np.full((len(rows), width), -1, np.int32)
    for t, (row, n) in enumerate(zip(rows, seen, strict=True)):
        tokens = [kpool * j + i for j in row if j >= 0 for i in range(kpool)]
        tokens += range(n // kpool * kpool, n)
        assert tokens == sorted(tokens)
        found[t, : len(tokens)] = tokens
    return found


def _rows(seen, kpool: int, k: int) -> np.ndarray:
    """For each token ``min(k, whole rows)`` ascending rows, then -1."""
    rng = np.random.default_rng(kpool + k)
    rows = np.full((len(seen), k), -1, np.int32)
    for row, n in zip(rows, seen, strict=True):
        pools = n // kpool
        chosen = rng.permutation(pools)[:k]
        row[: len(chosen)] = np.sort(chosen)
    return rows


def _arguments(xp, dtype: str = "uint32"):
    offsets = np.concatenate([[0], np.cumsum(NEW)]).astype(dtype)
    return xp.asarray(offsets), xp.asarray(np.array(CACHED, dtype))


@pytest.mark.parametrize("mask", ["causal", "null"])
@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("kpool", [1, 2, 4, 7, 64])
def test_tokens_of_the_rows_then_the_tail(kpool, k, mask, xp):
    seen = _seen(mask)
    rows = _rows(seen, kpool, k)
    want, here = _expected(rows, seen, kpool), xp.asarray(rows)
    found = expand_pools(here, *_arguments(xp), kpool, mask=mask)
    assert isinstance(found, xp.ndarray)
    assert same_bits(found, want)
    offsets, cached = _arguments(xp, "int32")
    totals = cached + xp.asarray(np.array(NEW, np.int32))
    out = xp.full(want.shape, POISON, np.int32)
    options = {"k_total_lengths": totals, "mask": mask, "out": out, "check": True}
    assert expand_pools(here, offsets, None, kpool, **options) is out
    assert same_bits(out, want)


def test_rows_of_the_operator(xp):
    """With k as large as the cache, the tokens are all that the token sees, in order."""
    kpool, new, cached = 4, 5, 26
    rng = np.random.default_rng(0)
    keys = xp.asarray(rng.standard_normal(((new + cached) // kpool, 32), np.float32))
    view = PagedKeyCache.from_dense([keys], page_size=8).view()
    lengths = xp.asarray(np.array([cached], np.uint32))
    bounds = np.array([[new, cached]], np.uint32)
    view = view._replace(k_cache_lengths=lengths, k_max_lengths=bounds)
    q, qs = fp8.quantize(xp.asarray(rng.standard_normal((new, 2, 32), np.float32)))
    offsets = xp.asarray(np.array([0, new], np.uint32))
    op = MLAIndexerRaggedFloat8Paged(2, 32, k=8, kpool=kpool)
    found = host(expand_pools(op(q, qs[..., 0], offsets, *view), offsets, lengths, kpool))
    for i, row in enumerate(found):
        n = cached + i + 1
        assert row[:n].tolist() == list(range(n))
        assert (row[n:] == -1).all()


def test_empty(xp):
    offsets, lengths = xp.zeros(1, np.uint32), xp.zeros(0, np.uint32)
    assert expand_pools(xp.zeros((0, 3), np.int32), offsets, lengths, 4).shape == (0, 15)
    offsets, lengths = xp.asarray(np.array([0, 1], np.uint32)), xp.zeros(1, np.uint32)
    none = expand_pools(xp.full((1, 0), -1, np.int32), offsets, lengths, 4)
    assert host(none).tolist() == [[0, -1, -1]]


def _no_sequence(offsets, lengths):
    offsets[:2], offsets[-1] = 2, 9  # the first two tokens and the last three are in none


def _backwards(offsets, lengths):
    offsets[2] = 1


def _far(offsets, lengths):
    offsets[-1], lengths[1:] = 2**31 - 1, 2**31 - 1


def _negative(offsets, lengths):
    offsets[1], lengths[:] = -5, -3


WRONG = [_no_sequence, _backwards, _far, _negative]


def _clamped(offsets, lengths, tokens: int, total: bool) -> list[int]:
    """Tokens seen under the contract's rules for wrong values, causal."""
    offsets = np.maximum.accumulate(np.clip(offsets.astype(np.int64), 0, tokens))
    seen = [0] * tokens
    for b, (start, end) in enumerate(pairwise(offsets)):
        before = int(lengths[b]) - (end - start) * total
        for t in range(start, end):
            seen[t] = min(max(before + t - start + 1, 0), 2**31 - 2**16)
    return seen


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("change", WRONG)
def test_wrong_values_are_clamped(change, total, xp):
    kpool, tokens = 4, sum(NEW)
    offsets, lengths = (host(a).copy() for a in _arguments(np, "int32"))
    change(offsets, lengths)
    seen = _clamped(offsets, lengths, tokens, total)
    rows = np.full((tokens, 3), -1, np.int32)
    offsets, lengths = xp.asarray(offsets), xp.asarray(lengths)
    named = (None, kpool) if total else (lengths, kpool)
    options = {"k_total_lengths": lengths} if total else {}
    found = expand_pools(xp.asarray(rows), offsets, *named, **options, check=False)
    assert same_bits(found, _expected(rows, seen, kpool))
    with pytest.raises(ValueError, match=r"input_row_offsets|k_cache_lengths|k_total_lengths"):
        expand_pools(xp.asarray(rows), offsets, *named, **options, check=True)


def test_wrong_rows_are_the_same_on_both_backends(xp):
    rows = np.array([[2**31 - 1, -7, 3], [-1, 5, -(2**31)]], np.int32)
    arguments = np.array([0, 2], np.uint32), np.array([5], np.uint32)
    want = expand_pools(rows, *arguments, 4, check=False)
    assert want.shape == (2, 15)
    here = [xp.asarray(a) for a in (rows, *arguments)]
    assert same_bits(expand_pools(*here, 4, check=False), want)


@pytest.mark.gpu
def test_nothing_waits_for_the_host(cupy):
    """A call can be captured: it neither copies from nor to the host."""
    rows, out = cupy.full((sum(NEW), 5), -1, np.int32), cupy.empty((sum(NEW), 23), np.int32)
    offsets, lengths = _arguments(cupy)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        expand_pools(rows, offsets, lengths, 4, out=out)  # fills the stream's memory pool
        stream.begin_capture()
        expand_pools(rows, offsets, lengths, 4, out=out)
        graph = stream.end_capture()
        out.fill(POISON)
        graph.launch(stream)
        stream.synchronize()
    assert same_bits(out, _expected(host(rows), _seen("causal"), 4))


ROWS = np.array([[0, 1], [0, 1]], np.int32)  # of two tokens that see 10 and 11 tokens
GOOD = {
    "rows": ROWS,
    "input_row_offsets": np.array([0, 2], np.uint32),
    "k_cache_lengths": np.array([9], np.uint32),
    "kpool": 4,
}
ERRORS = {
    "rows are flat": ("rows", {"rows": ROWS[0]}),
    "rows are int64": ("rows", {"rows": ROWS.astype(np.int64)}),
    "rows are missing": ("rows", {"rows": None}),
    "offsets are floats": ("input_row_offsets", {"input_row_offsets": np.zeros(2, np.float32)}),
    "offsets of a larger batch": (
        "input_row_offsets",
        {"input_row_offsets": np.array([0, 1, 2], np.uint32)},
    ),
    "lengths are missing": ("k_cache_lengths", {"k_cache_lengths": None}),
    "lengths are a matrix": ("k_cache_lengths", {"k_cache_lengths": np.ones((1, 1), np.uint32)}),
    "both kinds of lengths": ("k_cache_lengths", {"k_total_lengths": np.array([11], np.uint32)}),
    "kpool is 0": ("kpool", {"kpool": 0}),
    "kpool is 65": ("kpool", {"kpool": 65}),
    "kpool is a float": ("kpool", {"kpool": 4.0}),
    "mask is unknown": ("mask", {"mask": "window"}),
    "out is too narrow": ("out", {"out": np.zeros((2, 10), np.int32)}),
    "out is int64": ("out", {"out": np.zeros((2, 11), np.int64)}),
}
VALUE_ERRORS = {
    "rows in score order": ("rows", {"rows": np.array([[1, 0], [0, 1]], np.int32)}),
    "a row twice": ("rows", {"rows": np.array([[0, 1], [1, 1]], np.int32)}),
    "a row that is not seen": ("rows", {"rows": np.array([[0, 1], [0, 2]], np.int32)}),
    "a row after -1": ("rows", {"rows": np.array([[-1, 1], [0, 1]], np.int32)}),
    "a row below -1": ("rows", {"rows": np.array([[0, -2], [0, 1]], np.int32)}),
    "offsets end late": ("input_row_offsets", {"input_row_offsets": np.array([0, 3], np.uint32)}),
    "a negative length": ("k_cache_lengths", {"k_cache_lengths": np.array([-1], np.int32)}),
    "fewer tokens than new ones": (
        "k_total_lengths",
        {"k_cache_lengths": None, "k_total_lengths": np.array([1], np.uint32)},
    ),
}


def _refused(xp, name, changes, **options):
    given = {"out": np.full((2, 11), POISON, np.int32)} | GOOD | changes
    given = {n: xp.asarray(a) if isinstance(a, np.ndarray) else a for n, a in given.items()}
    before = host(given["out"]).copy()
    with pytest.raises((TypeError, ValueError)) as caught:
        expand_pools(**given, **options)
    assert_helpful(caught.value, name)
    assert same_bits(before, given["out"])


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, xp):
    _refused(xp, *ERRORS[case])


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_errors_of_values(case, xp):
    _refused(xp, *VALUE_ERRORS[case], check=True)


def test_strided_arrays(xp):
    rows, *others = (xp.asarray(a) for a in list(GOOD.values())[:3])
    with pytest.raises(ValueError, match="rows must be C-contiguous"):
        expand_pools(xp.repeat(rows, 2, axis=1)[:, ::2], *others, 4)
    with pytest.raises(ValueError, match="out must be C-contiguous"):
        expand_pools(rows, *others, 4, out=xp.zeros((2, 22), np.int32)[:, ::2])


def test_out_must_not_overlap(xp):
    memory = xp.full((2, 11), -1, np.int32)
    rows = memory.reshape(11, 2)[:2]
    offsets, lengths = (xp.asarray(GOOD[n]) for n in ("input_row_offsets", "k_cache_lengths"))
    with pytest.raises(ValueError, match="out must not overlap rows"):
        expand_pools(rows, offsets, lengths, 4, out=memory)
