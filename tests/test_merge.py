"""Merging lists of selected keys: what one rank with all keys gives, bit for bit."""

from itertools import pairwise

import numpy as np
import pytest
from properties import (
    POISON,
    assert_helpful,
    guarded,
    host,
    message_of,
    one_element_on,
    same_bits,
    sanitized,
)

from mla_fp8 import merge_topk, select_topk

SPECIALS = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.5, -1.5, 1e-45], np.float32)


def expected(indices, scores, k, sort="position"):
    """The result from the contract, with Python's own sort: positions and scores."""
    rows = indices.shape[1]
    positions = np.full((rows, k), -1, np.int32)
    beside = np.full((rows, k), -np.inf, np.float32)
    for t in range(rows):
        entries = zip(indices[:, t].ravel().tolist(), scores[:, t].ravel(), strict=True)
        entries = [(p, s) for p, s in entries if p >= 0]
        entries.sort(key=lambda e: (bool(np.isnan(e[1])), 0 if np.isnan(e[1]) else -e[1], e[0]))
        best = entries[:k] if sort == "score" else sorted(entries[:k], key=lambda e: e[0])
        positions[t, : len(best)] = [p for p, _ in best]
        beside[t, : len(best)] = [s for _, s in best]
    return positions, beside


def check(xp, indices, scores, k=None, **options):
    """Both orders, with and without scores, against the contract."""
    here = xp.asarray(indices), xp.asarray(scores)
    width = indices.shape[2] if k is None else k
    for sort in ("position", "score"):
        want = expected(indices, scores, width, sort)
        found = merge_topk(*here, k=k, sort=sort, return_scores=True, **options)
        assert all(isinstance(array, xp.ndarray) for array in found)
        np.testing.assert_array_equal(host(found[0]), want[0])
        assert same_bits(found[1], want[1])
        assert same_bits(merge_topk(*here, k=k, sort=sort, **options), want[0])


def lists(rng, shape, values="random", padding=0.2, most=2**31 - 1):
    """Lists with distinct positions in a row, in any order, and padding with any score."""
    count, rows, width = shape
    scores = {
        "random": lambda: rng.standard_normal(shape, dtype=np.float32),
        "zeros": lambda: np.fmax(rng.standard_normal(shape, dtype=np.float32), -0.0),
        "specials": lambda: rng.choice(SPECIALS, shape),
        "equal": lambda: np.full(shape, -2.5, np.float32),
        "close": lambda: 1 + rng.integers(0, 9, shape).astype(np.float32) * np.float32(2**-23),
        "bits": lambda: rng.integers(0, 2**32, shape, np.uint32).view(np.float32),
    }[values]()
    many = count * width
    step = max(most // many, 1)
    row = np.arange(many, dtype=np.int64) * step + rng.integers(0, step, many)
    positions = np.stack([rng.permutation(row) for _ in range(rows)]) if rows else np.empty((0, 0))
    indices = positions.astype(np.int32).reshape(rows, count, width).swapaxes(0, 1).copy()
    hidden = rng.random(shape) < padding
    indices[hidden] = rng.choice(np.array([-1, -7, -(2**31)], np.int32), int(hidden.sum()))
    return indices, scores


@pytest.mark.parametrize("values", ["random", "zeros", "specials", "equal", "close", "bits"])
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 4, 301), (8, 1, 2048)])
def test_lists_in_any_order(shape, values, xp):
    rng = np.random.default_rng(sum(shape))
    for most in (2**31 - 1, shape[0] * shape[2]):
        for padding in (0.0, 0.3):
            check(xp, *lists(rng, shape, values, padding, most))


@pytest.mark.parametrize(
    ("shape", "k"),
    sanitized(
        [
            ((1, 1, 1), 1),
            ((2, 2, 9), 300),
            ((64, 2, 3), 5),
            ((1, 2, 5000), 4096),
            ((2, 1, 3000), 4097),
            ((5, 1, 6000), 2048),
        ],
        [((64, 2, 3), 5), ((2, 1, 3000), 4097), ((5, 1, 6000), 2048)],
    ),
)
def test_widths(shape, k, xp):
    """Results narrower and wider than a list, of every way to hold them and the entries."""
    rng = np.random.default_rng(k)
    for values in ("random", "zeros", "specials"):
        check(xp, *lists(rng, shape, values), k)


def test_many_entries(xp):
    indices, scores = lists(np.random.default_rng(8), (2, 1, 65536), "zeros", 0.1)
    check(xp, indices, scores, 65536)


def test_padding_alone(xp):
    indices, scores = lists(np.random.default_rng(0), (4, 3, 64), padding=1.0)
    check(xp, indices, scores)
    indices[2, 1, 7] = 5  # one entry in the middle of one row, below every padding
    scores[2, 1, 7] = np.nan
    check(xp, indices, scores)


def test_exactly_k_entries_and_one_more(xp):
    rng = np.random.default_rng(1)
    for entries in (63, 64, 65):
        indices, scores = lists(rng, (3, 2, 64), "zeros", 0.0)
        hidden = rng.permutation(3 * 64)[entries:]
        indices[hidden // 64, :, hidden % 64] = -1
        check(xp, indices, scores)


def test_many_rows(xp):
    rng = np.random.default_rng(2)
    indices, scores = lists(rng, (2, 40, 4), "zeros")
    indices, scores = (np.tile(array, (1, 2000, 1)) for array in (indices, scores))
    found = host(merge_topk(xp.asarray(indices), xp.asarray(scores)))
    once = expected(indices[:, :40], scores[:, :40], 4)[0]
    assert same_bits(found, np.tile(once, (2000, 1)))


@pytest.mark.parametrize("k", [None, 3])
def test_no_rows(k, xp):
    check(xp, *lists(np.random.default_rng(0), (2, 0, 5)), k)


def shards(total, count, interleaved):
    """The positions of each of ``count`` shards of ``total`` positions."""
    if interleaved:
        return [np.arange(r, total, count) for r in range(count)]
    edges = np.linspace(0, total, count + 1).astype(int)
    edges[1:-1] = edges[1:-1] // 3 * 2  # shards of different sizes; the first may be empty
    return [np.arange(*edge) for edge in pairwise(edges)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(("columns", "k"), [(70, 64), (2, 64), (900, 64), (9000, 2048)])
def test_shards_of_a_selection(columns, k, count, interleaved, xp):
    """Selecting from each shard and merging is selecting from all, rows of any length included."""
    rng = np.random.default_rng(columns + count)
    rows = np.fmax(rng.standard_normal((6, columns), dtype=np.float32) - 0.5, -0.0)
    rows[1], rows[2] = rng.choice(SPECIALS, columns), 0.0
    lengths = np.array([columns, columns, columns, columns // 2, 1, 0])
    found = []
    for positions in shards(columns, count, interleaved):
        own = np.ascontiguousarray(rows[:, positions])
        visible = (positions < lengths[:, None]).sum(axis=1).astype(np.int32)
        columns_of, scores = select_topk(
            xp.asarray(own), xp.asarray(visible), k, return_scores=True
        )
        chosen = host(columns_of)
        start, step = (positions[0], np.diff(positions[:2], prepend=0)[-1]) if own.size else (0, 1)
        step = step if len(positions) > 1 else 1
        found.append((np.where(chosen < 0, -1, start + step * chosen), host(scores)))
    indices = np.stack([pair[0] for pair in found]).astype(np.int32)
    scores = np.stack([pair[1] for pair in found])
    here = xp.asarray(rows), xp.asarray(lengths.astype(np.int32))
    for sort in ("position", "score"):
        whole = select_topk(*here, k, sort=sort, return_scores=True)
        merged = merge_topk(xp.asarray(indices), xp.asarray(scores), sort=sort, return_scores=True)
        assert same_bits(merged[0], whole[0])
        assert same_bits(merged[1], whole[1])


def test_the_same_every_time(xp):
    given = [xp.asarray(a) for a in lists(np.random.default_rng(3), (8, 16, 2048), "zeros")]
    first = merge_topk(*given, sort="score", return_scores=True)
    for _ in range(20):
        again = merge_topk(*given, sort="score", return_scores=True)
        assert all(map(same_bits, again, first))


@pytest.mark.sanitize
@pytest.mark.parametrize("width", [30, 3000])
@pytest.mark.parametrize("sort", ["position", "score"])
def test_repeated_positions_stay_in_bounds(width, sort, xp):
    """Wrong input, which is not checked: rows are filled, with positions that were given."""
    indices = np.full((4, 3, width), 11, np.int32)
    scores = np.zeros((4, 3, width), np.float32)
    (out, intact), k = guarded(xp, (3, 2 * width), np.int32), 2 * width
    merge_topk(xp.asarray(indices), xp.asarray(scores), k=k, sort=sort, out=out)
    intact()
    assert (host(out) == 11).all()


@pytest.mark.parametrize("sort", ["position", "score"])
def test_out_is_filled_returned_and_guarded(sort, xp):
    given = [xp.asarray(a) for a in lists(np.random.default_rng(4), (3, 5, 301))]
    (indices, whole), (scores, sound) = (guarded(xp, (5, 301), d) for d in (np.int32, np.float32))
    options = {"k": 301, "sort": sort}
    fresh = merge_topk(*given, **options, return_scores=True)
    assert merge_topk(*given, **options, out=indices) is indices
    assert same_bits(indices, fresh[0])
    indices[...] = 123
    both = merge_topk(*given, **options, return_scores=True, out=(indices, scores))
    assert both[0] is indices
    assert both[1] is scores
    assert same_bits(indices, fresh[0])
    assert same_bits(scores, fresh[1])
    whole()
    sound()


def test_inputs_are_not_modified_and_need_no_alignment(xp):
    indices, scores = lists(np.random.default_rng(5), (3, 4, 301), "specials")
    here = one_element_on(xp, xp.asarray(indices)), one_element_on(xp, xp.asarray(scores))
    found = merge_topk(*here)
    assert same_bits(here[0], indices)
    assert same_bits(here[1], scores)
    assert same_bits(found, expected(indices, scores, 301)[0])


@pytest.mark.gpu
def test_captured_graph(cupy):
    rng = np.random.default_rng(6)
    first, second = (lists(rng, (4, 9, 64), values) for values in ("zeros", "specials"))
    given, out = [cupy.asarray(a) for a in first], cupy.empty((9, 64), np.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        merge_topk(*given, out=out)
        stream.begin_capture()
        merge_topk(*given, out=out)
        graph = stream.end_capture()
        for array, values in zip(given, second, strict=True):
            array.set(values, stream=stream)
        graph.launch(stream)
        stream.synchronize()
    assert same_bits(out, expected(*second, 64)[0])


SHAPE = (2, 3, 4)
INT, FLOAT = np.zeros(SHAPE, np.int32), np.zeros(SHAPE, np.float32)
WRONG = {
    "int64 indices": (INT.astype(np.int64), FLOAT, {}, "indices"),
    "float64 scores": (INT, FLOAT.astype(np.float64), {}, "scores"),
    "swapped": (FLOAT, INT, {}, "indices"),
    "flat indices": (INT[0], FLOAT, {}, "indices"),
    "flat scores": (INT, FLOAT[0], {}, "scores"),
    "other lists": (INT, np.zeros((3, 3, 4), np.float32), {}, "scores"),
    "other rows": (INT, np.zeros((2, 4, 4), np.float32), {}, "scores"),
    "other width": (INT, np.zeros((2, 3, 5), np.float32), {}, "scores"),
    "no lists": (INT[:0], FLOAT[:0], {}, "indices"),
    "no width": (INT[..., :0].copy(), FLOAT[..., :0].copy(), {}, "indices"),
    "strided indices": (np.zeros((2, 3, 8), np.int32)[..., ::2], FLOAT, {}, "indices"),
    "strided scores": (INT, np.zeros((3, 2, 4), np.float32).swapaxes(0, 1), {}, "scores"),
    "k of 0": (INT, FLOAT, {"k": 0}, "k"),
    "k too large": (INT, FLOAT, {"k": 65537}, "k"),
    "k not an integer": (INT, FLOAT, {"k": 2.0}, "k"),
    "unknown order": (INT, FLOAT, {"sort": "index"}, "sort"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, xp):
    *given, options, name = WRONG[case]
    here = []
    for array in given:
        moved = xp.asarray(array)
        strided = not array.flags.c_contiguous and array.size
        here.append(xp.asfortranarray(moved) if strided and xp is not np else moved)
    (out, intact) = guarded(xp, (3, 4), np.int32)
    out[...] = POISON
    with pytest.raises((ValueError, TypeError)) as caught:
        merge_topk(*here, out=out, **options)
    assert_helpful(caught.value, name)
    assert (host(out) == POISON).all()
    intact()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 4), np.int32), ((3, 5), np.int32), ((3, 4), np.uint32)]
)
def test_wrong_out(shape, dtype, xp):
    given, out = (xp.asarray(INT), xp.asarray(FLOAT)), xp.empty(shape, dtype)
    assert_helpful(message_of(lambda: merge_topk(*given, out=out)), "out")
    pair = xp.empty((3, 4), np.int32), out
    call = lambda: merge_topk(*given, out=pair, return_scores=True)  # noqa: E731
    assert_helpful(message_of(call), "out")


def test_out_that_overlaps_any_list(xp):
    indices, scores = xp.zeros(SHAPE, np.int32), xp.zeros(SHAPE, np.float32)
    for r in range(2):
        message = message_of(lambda r=r: merge_topk(indices, scores, out=indices[r]))
        assert_helpful(message, "out")
        out = scores[r].view(np.int32)
        assert_helpful(message_of(lambda out=out: merge_topk(indices, scores, out=out)), "out")


@pytest.mark.gpu
def test_host_and_device_do_not_mix(cupy):
    for given in ((cupy.asarray(INT), FLOAT), (INT, cupy.asarray(FLOAT))):
        assert_helpful(message_of(lambda given=given: merge_topk(*given)), "scores")
