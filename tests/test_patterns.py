"""Selection on the benchmark's patterns of scores, and on rows that lie to whoever guesses.

Guesses are a sample of evenly spaced columns, bins that are linear between extremes, and counts in
a bin that is crowded.
"""

import numpy as np
import pytest
from generators import Spec
from properties import check_case, host

from mla_fp8 import fp8, select_topk
from mla_fp8.cli import oracle
from mla_fp8.cli.patterns import ROWS, real_problem, rows

SHAPES = [(8, 20_000, 2048), (40, 6000, 64), (3, 140_000, 2048)]  # rows, columns, k
shapes = pytest.mark.parametrize(("count", "columns", "k"), SHAPES)


def _normal(rng, shape):
    return rng.standard_normal(shape, np.float32)


def _two_far_outliers(rng, shape, k):
    scores = _normal(rng, shape)
    scores[:, shape[1] // 3], scores[:, shape[1] // 2] = 3e38, -3e38
    return scores


def _gap(rng, shape, k):
    """Halves a factor of 1e30 apart, each with a tail of its own."""
    return _normal(rng, shape) * np.where(rng.random(shape) < 0.5, np.float32(1), np.float32(1e30))


def _all_exponents(rng, shape, k):
    return np.sign(_normal(rng, shape)) * np.exp2(rng.uniform(-149, 127.9, shape))


def _levels(rng, shape, k):
    """2**-i: a few columns at each level, the last of them denormal and zero."""
    return rng.permuted(np.exp2(-(np.arange(shape[0] * shape[1]) % 152.0)).reshape(shape), axis=1)


def _ulps(rng, shape, k):
    bits = rng.integers(0, 3, shape, np.uint32) + np.float32(-1.5).view(np.uint32)
    return bits.view(np.float32)


def _runs(rng, shape, k):
    scores, run = _normal(rng, shape), 500
    for first in range(0, shape[1], run):
        scores[:, first : first + run].sort(axis=1)
    return scores


def _hidden(rng, shape, k):
    """The best stand side by side at the end, all others are spread far below."""
    scores = -np.exp(3 * _normal(rng, shape))
    scores[:, -k - k // 2 :] += 1e6
    return scores


def _sample_of(best):
    """Every 16th column, and each thousandth of the row, is the best or the worst there is."""

    def make(rng, shape, k):
        scores = _normal(rng, shape)
        for step in (16, max(shape[1] // 1000, 1)):
            spikes = scores[:, ::step]
            spikes += np.where(rng.random(spikes.shape) < 0.99, np.float32(best), 0)
        return scores

    return make


def _spikes(period, phase):
    def make(rng, shape, k):
        scores = _normal(rng, shape)
        scores[:, phase::period] *= 1e4
        return scores

    return make


def _infinities(beyond):
    """k + ``beyond`` columns of +inf, as many of -inf."""

    def make(rng, shape, k):
        scores = _normal(rng, shape)
        scores[:, : k + beyond], scores[:, k + beyond : 2 * (k + beyond)] = np.inf, -np.inf
        return rng.permuted(scores, axis=1)

    return make


def _plateau(above, level=0.25):
    """``above`` of k columns, give or take some, are above a plateau of half the row."""

    def make(rng, shape, k):
        scores = np.minimum(_normal(rng, shape), np.float32(level))
        scores[:, : k + above] = level + 1 + rng.random((shape[0], k + above), np.float32)
        scores[:, k + above : k + above + shape[1] // 2] = level
        return rng.permuted(scores, axis=1)

    return make


def _late_plateau(first, share, level=0.0):
    """A plateau of which the first columns hold ``share`` as much as all others, which is dense."""

    def make(rng, shape, k):
        begins = int(first * shape[1])
        among = np.where(np.arange(shape[1]) < begins, share * 0.95, 0.95)
        below = level - 1 - rng.random(shape, np.float32)
        scores = np.where(rng.random(shape) < among, np.float32(level), below)
        best = rng.random(shape) < 0.25 * k / shape[1]
        return np.where(best, level + 1 + rng.random(shape, np.float32), scores)

    return make


def _few_numbers(rng, shape, k):
    """Fewer than k numbers among NaNs."""
    return np.where(rng.random(shape) < 0.5 * k / shape[1], _normal(rng, shape), np.float32(np.nan))


HOSTILE = {
    "two far outliers": _two_far_outliers,
    "a gap of 1e30": _gap,
    "all exponents": _all_exponents,
    "levels of 2**-i": _levels,
    "steps of an ulp": _ulps,
    "descending": lambda rng, shape, k: -np.sort(-_normal(rng, shape), axis=1),
    "sorted runs": _runs,
    "hidden at the end": _hidden,
    "the sample is the best": _sample_of(100),
    "the sample is the worst": _sample_of(-100),
    "spikes, period 8": _spikes(8, 0),
    "spikes, period 16, off": _spikes(16, 7),
    "spikes, period 32": _spikes(32, 0),
    "spikes, period 64, off": _spikes(64, 63),
    "k - 1 infinities": _infinities(-1),
    "k infinities": _infinities(0),
    "k + 1 infinities": _infinities(1),
    "k above a plateau": _plateau(0),
    "k - 1 above a plateau": _plateau(-1),
    "k + 1 above a plateau": _plateau(1),
    "no plateau at first": _late_plateau(0.1, 0),
    "a sparse plateau at first": _late_plateau(0.3, 0.1),
    "half a plateau at first": _late_plateau(0.15, 0.5, level=-3.0),
    "a plateau at the end": _late_plateau(0.6, 0),
    "runs of 8": lambda rng, shape, k: np.repeat(
        _normal(rng, (shape[0], -(-shape[1] // 8))), 8, axis=1
    )[:, : shape[1]],
    "few numbers": _few_numbers,
}


def _check(xp, scores, k):
    """Whole rows in both orders, and ragged ones, are the oracle's."""
    count, columns = scores.shape
    ragged = np.random.default_rng(k).integers(0, columns + 1, count).astype(np.int32)
    here = xp.asarray(scores)
    for lengths, sort in ((None, "position"), (None, "score"), (ragged, "position")):
        given = None if lengths is None else xp.asarray(lengths)
        found = host(select_topk(here, given, k, sort=sort))
        for r, row in enumerate(scores):
            seen = np.arange(columns) < (columns if lengths is None else lengths[r])
            want = oracle.expected_topk(row, seen, k, sort)
            np.testing.assert_array_equal(found[r], want, err_msg=f"row {r}, {sort}")


@shapes
@pytest.mark.parametrize("name", ROWS)
def test_patterns_of_the_benchmark(name, count, columns, k, xp):
    _check(xp, rows(name, count, columns), k)


@shapes
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rows(name, count, columns, k, xp):
    rng = np.random.default_rng(len(name) + k)
    _check(xp, HOSTILE[name](rng, (count, columns), k).astype(np.float32), k)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 9000), (24, 3000)])
def test_whole_operation_on_what_models_give(tokens, keys, xp):
    spec = Spec((tokens,), (keys - tokens,), num_heads=32, k=512)
    case = spec.build()
    queries, values, gates, factors = real_problem(tokens, keys, spec.num_heads)
    q, q_scales = fp8.quantize(queries)
    codes, scales = fp8.quantize(values)
    place = np.arange(keys)
    slots = case.k_lookup_table[0, place // spec.page_size], 0, 0, place % spec.page_size, 0
    k_blocks, k_scales = case.k_blocks.copy(), case.k_scales.copy()
    k_blocks[slots], k_scales[slots] = codes, scales * factors[:, None]
    qs = q_scales[..., 0] * gates
    check_case(case.replace(q=q, qs=qs, k_blocks=k_blocks, k_scales=k_scales), xp)
