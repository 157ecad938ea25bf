"""Selection on given scores: exact, whatever the row looks like."""

import numpy as np
import pytest
from properties import POISON, assert_helpful, guarded, host, same_bits

from mla_fp8 import select_topk
from mla_fp8.cli import oracle

COLUMNS = 5000
LENGTHS = (0, 1, 6, 7, 8, 63, 64, 65, 2047, 2048, 2049, 4096, 4097, COLUMNS)


def _sprinkled(rng, shape, *specials):
    rows = rng.standard_normal(shape, dtype=np.float32)
    hit = rng.random(shape) < 0.2
    rows[hit] = rng.choice(np.array(specials, np.float32), int(hit.sum()))
    return rows


def _nan_payloads(rng, shape):
    """Quiet and signalling NaNs of both signs: all alike, all last, none an index of its own."""
    rows = rng.standard_normal(shape, dtype=np.float32)
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF])
    hit = rng.random(shape) < 0.5
    rows.view(np.uint32)[hit] = rng.choice(bits.astype(np.uint32), int(hit.sum()))
    return rows


def _last_bits(rng, shape):
    """Scores that differ in the last bits alone: every radix digit but the lowest is the same."""
    low = rng.permuted(np.tile(np.arange(shape[1], dtype=np.uint32), (shape[0], 1)), axis=1)
    return (low + np.float32(1.0).view(np.uint32)).view(np.float32)


def _one_huge(rng, shape):
    rows = rng.standard_normal(shape, dtype=np.float32) * np.float32(1e-20)
    rows[:, 3::1000] = 3e38
    return rows


def _denormals(rng, shape):
    """Below the smallest normal number, both signs: a kernel that flushes them sees ties."""
    bits = rng.integers(0, 2**23, shape, np.uint32)
    return (bits | rng.integers(0, 2, shape, np.uint32) << np.uint32(31)).view(np.float32)


def _tile(values, shape):
    return np.broadcast_to(np.resize(np.asarray(values, np.float32), shape[1]), shape).copy()


ROWS = {
    "random": lambda rng, shape: rng.standard_normal(shape, dtype=np.float32),
    "random bits": lambda rng, shape: rng.integers(0, 2**32, shape, np.uint32).view(np.float32),
    "ascending": lambda rng, shape: _tile(np.arange(shape[1]) - 1000.0, shape),
    "descending": lambda rng, shape: _tile(1000.0 - np.arange(shape[1]), shape),
    "all equal": lambda rng, shape: _tile([-3.5], shape),
    "all zero": lambda rng, shape: _tile([0.0], shape),
    "zeros of both signs": lambda rng, shape: _tile([-0.0, 0.0, 0.0, -0.0, -0.0], shape),
    "ReLU plateau": lambda rng, shape: np.fmax(_sprinkled(rng, shape, 0.0, -0.0) - 1, -0.0),
    "two values": lambda rng, shape: _tile([1.0, 2.0, 1.0], shape),
    "one huge value": _one_huge,
    "NaN and infinities": lambda rng, shape: _sprinkled(rng, shape, np.nan, np.inf, -np.inf),
    "all NaN": lambda rng, shape: _tile([np.nan], shape),
    "all -inf": lambda rng, shape: _tile([-np.inf], shape),
    "NaN payloads": _nan_payloads,
    "last bits": _last_bits,
    "denormals": _denormals,
    "denormals and zeros": lambda rng, shape: _tile([1e-45, 0.0, -1e-45, -0.0], shape),
}


def _check(xp, rows, lengths, k, sort="position", **options):
    """Exactly the oracle's rows, with the given scores beside them."""
    here = xp.asarray(lengths) if lengths is not None else None
    options |= {"sort": sort, "return_scores": True}
    indices, scores = select_topk(xp.asarray(rows), here, k, **options)
    assert isinstance(indices, xp.ndarray)
    indices, scores = host(indices), host(scores)
    assert (indices.dtype, scores.dtype) == (np.int32, np.float32)
    columns = rows.shape[1]
    for r, row in enumerate(rows):
        length = columns if lengths is None else min(max(int(lengths[r]), 0), columns)
        want = oracle.expected_topk(row, np.arange(columns) < length, k, sort)
        np.testing.assert_array_equal(indices[r], want, err_msg=f"row {r} of length {length}")
        beside = np.where(want < 0, np.float32(-np.inf), row[want] if columns else 0)
        np.testing.assert_array_equal(scores[r], beside, err_msg=f"scores of row {r}")


@pytest.mark.parametrize("k", [1, 64, 2048, 4096])
@pytest.mark.parametrize("kind", ROWS)
def test_adversarial_rows(kind, k, xp):
    rng = np.random.default_rng(len(kind) * 1000 + k)
    rows = ROWS[kind](rng, (len(LENGTHS), COLUMNS))
    for sort in ("position", "score"):
        _check(xp, rows, np.array(LENGTHS, np.uint32), k, sort)


@pytest.mark.parametrize("k", [4097, 65536])
@pytest.mark.parametrize("kind", ["random", "ReLU plateau", "NaN payloads", "last bits"])
def test_beyond_the_fast_path(kind, k, xp):
    rows = ROWS[kind](np.random.default_rng(k), (3, 70_000))
    for sort in ("position", "score"):
        _check(xp, rows, np.array([70_000, 65_537, 4_097], np.uint32), k, sort)


@pytest.mark.parametrize("k", [1, 64, 2048, 4096])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_overflow_what_is_kept_of_them(kind, k, xp):
    """Lists of candidates are cut down again and again. With more rows, each has fewer blocks."""
    rows = ROWS[kind](np.random.default_rng(len(kind) + k), (3, 40_000))
    want = [oracle.expected_topk(row, np.ones(len(row), bool), k, "position") for row in rows]
    for many in (3,) if xp is np else (3, 50, 300):
        given = xp.asarray(np.resize(rows, (many, rows.shape[1])))
        found = host(select_topk(given, None, k))
        np.testing.assert_array_equal(found, np.resize(np.array(want), found.shape))


@pytest.mark.parametrize("k", [64, 2048])
@pytest.mark.parametrize("kind", ["random", "ReLU plateau", "ascending", "all NaN", "last bits"])
def test_lengths_around_those_that_blocks_share(kind, k, xp):
    """On Hopper 8 blocks take these rows: some have no column of a row, or one block has all."""
    lengths = np.array([0, 1, k, 8192, 8193, 8192 + 128, 65_537, 70_000], np.int32)
    rows = ROWS[kind](np.random.default_rng(k), (len(lengths), 70_000))
    _check(xp, rows, lengths, k)


@pytest.mark.parametrize("k", [1, 2048, 65536])
@pytest.mark.parametrize(
    "kind",
    [
        "random",
        "ReLU plateau",
        "descending",
        "all equal",
        "two values",
        "NaN payloads",
        "last bits",
    ],
)
def test_a_very_long_row(kind, k, xp):
    rows = ROWS[kind](np.random.default_rng(k), (1, 200_000))
    for sort in ("position", "score"):
        _check(xp, rows, None, k, sort)


@pytest.mark.parametrize("columns", [65, 3000, 9000, 70_000])
def test_nan_scores_keep_their_bits(columns, xp):
    """Whichever kernel selects: that depends on how many rows there are."""
    row = ROWS["NaN payloads"](np.random.default_rng(columns), (1, columns))
    numbers = int((row == row).sum())
    k = min(numbers + 40, columns)
    want = row[0, oracle.expected_topk(row[0], np.ones(columns, bool), k, "score")]
    assert np.isnan(want).sum() >= 20
    for many in (1, 40, 300):
        given = xp.asarray(np.resize(row, (many, columns)))
        _, scores = select_topk(given, None, k, sort="score", return_scores=True)
        assert same_bits(host(scores), np.resize(want, (many, k)))


@pytest.mark.parametrize("columns", [1, 2, 3, 31, 32, 33, 255, 256, 257, 1023, 1025, 40_001])
def test_row_sizes(columns, xp):
    """Odd widths: rows that do not start on 16 bytes, tails of every length."""
    rows = ROWS["ReLU plateau"](np.random.default_rng(columns), (5, columns))
    for k in (1, 64):
        _check(xp, rows, None, k)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("columns", "k"), [(70, 64), (3001, 64), (9000, 2048), (9000, 4097), (17_000, 64)]
)
def test_ragged_lengths(columns, k, xp):
    rng = np.random.default_rng(columns)
    lengths = np.array([0, 1, k - 1, k, k + 1, columns], np.int32)
    for sort in ("position", "score"):
        _check(xp, ROWS["NaN and infinities"](rng, (6, columns)), lengths, k, sort)


@pytest.mark.parametrize("shape", [(0, 10), (0, 0), (4, 0)])
def test_nothing_to_select_from(shape, xp):
    _check(xp, np.zeros(shape, np.float32), None, 5)


TOO_LONG = (np.array([301, 2**31, 2**32 - 1, 10], np.uint32), np.array([-1, 2, 3, 4], np.int32))


@pytest.mark.parametrize("lengths", [*TOO_LONG, np.array([-(2**31), 2**31 - 1, 0, 300], np.int32)])
def test_unchecked_lengths_are_clamped(lengths, xp):
    rows = ROWS["random"](np.random.default_rng(0), (4, 300))
    _check(xp, rows, lengths, 64, check=False)
    if xp is not np:
        _check(xp, rows, lengths, 64)  # the default: nothing is read back from a device


@pytest.mark.parametrize("lengths", TOO_LONG)
@pytest.mark.parametrize("check", [None, True])
def test_checked_lengths_are_refused(lengths, check, xp):
    if check is None and xp is not np:
        pytest.skip("device values are not read back by default")
    out = xp.full((4, 64), POISON, np.int32)
    with pytest.raises(ValueError, match="lengths") as caught:
        select_topk(xp.zeros((4, 300), np.float32), xp.asarray(lengths), 64, out=out, check=check)
    assert_helpful(caught.value, "lengths")
    assert (host(out) == POISON).all()


@pytest.mark.parametrize("many", [70_000])
def test_more_rows_than_a_grid_axis_holds(many, xp):
    """65535 is the limit of a CUDA grid's second axis."""
    rows = np.random.default_rng(1).integers(0, 9, (many, 5)).astype(np.float32)
    best = host(select_topk(xp.asarray(rows), None, 1))[:, 0]
    np.testing.assert_array_equal(best, rows.argmax(axis=1))


@pytest.mark.parametrize("sort", ["position", "score"])
def test_out_is_filled_returned_and_guarded(sort, xp):
    rows = xp.asarray(ROWS["random"](np.random.default_rng(2), (3, 500)))
    lengths = xp.asarray(np.array([500, 3, 0], np.uint32))
    (indices, whole), (scores, sound) = (guarded(xp, (3, 9), d) for d in (np.int32, np.float32))
    assert select_topk(rows, lengths, 9, sort=sort, out=indices) is indices
    fresh = select_topk(rows, lengths, 9, sort=sort, return_scores=True)
    assert same_bits(indices, fresh[0])
    indices[...] = 123
    given = select_topk(rows, lengths, 9, sort=sort, return_scores=True, out=(indices, scores))
    assert given[0] is indices
    assert given[1] is scores
    assert same_bits(indices, fresh[0])
    assert same_bits(scores, fresh[1])
    whole()
    sound()


def test_scores_are_not_modified(xp):
    rows = ROWS["NaN payloads"](np.random.default_rng(3), (4, 3000))
    here = xp.asarray(rows.copy())
    select_topk(here, None, 64, sort="score", return_scores=True)
    assert same_bits(here, rows)


def test_a_row_does_not_depend_on_its_neighbours(xp):
    rows = ROWS["ReLU plateau"](np.random.default_rng(4), (33, 2500))
    together = host(select_topk(xp.asarray(rows), None, 64, sort="score"))
    for r in (0, 16, 32):
        alone = select_topk(xp.asarray(rows[r : r + 1]), None, 64, sort="score")
        assert same_bits(alone, together[r : r + 1])
