"""pool_keys and quantize_queries: the definition, and the same bits on both backends."""

import numpy as np
import pytest
from properties import host, same_bits, sanitized
from quantised import BFLOAT16, KEY_DTYPES, hard_rows, on, quantised

from mla_fp8 import fp8, pool_keys, quantize_queries


@pytest.mark.parametrize("weighted", sanitized([False, True], [True]))
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_pools_have_the_bits_of_the_definition(dtype, weighted, xp):
    rng = np.random.default_rng(13)
    for shape, kpool in (((22, 2, 64), 4), ((9, 128), 1), ((9, 128), 3), ((5, 1, 32), 5)):
        keys = (rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 9, shape)).astype(dtype)
        weights = rng.random(shape).astype(np.float32) if weighted else None
        given = () if weights is None else (xp.asarray(weights),)
        got = pool_keys(on(xp, keys), kpool, *given)
        want = []
        for first in range(0, shape[0] - kpool + 1, kpool):
            terms = [keys[token].astype(np.float32) for token in range(first, first + kpool)]
            if weighted:
                terms = [weights[first + i] * term for i, term in enumerate(terms)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            want.append(total if weighted else total / np.float32(kpool))
        assert isinstance(got, xp.ndarray)
        assert same_bits(got, np.array(want))


def test_small_numbers_and_signs_of_zero_stay(xp):
    keys = np.array([[-0.0, 2.0**-149, 2.0**-127], [-0.0, 2.0**-148, -(2.0**-126)]], np.float32)
    assert same_bits(pool_keys(xp.asarray(keys), 2), (keys[:1] + keys[1:]) / np.float32(2))


@pytest.mark.parametrize("tokens", [0, 3])
def test_fewer_tokens_than_a_pool(tokens, xp):
    assert pool_keys(xp.zeros((tokens, 2, 64), np.float32), 4).shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda xp: (xp.zeros((3, 4)), 2), ValueError, "keys must be bfloat16"),
        (lambda xp: (xp.zeros(4, np.float32), 2), ValueError, r"keys must be \[tokens"),
        (lambda xp: (xp.zeros((4, 4), np.float32).T, 2), ValueError, "keys must be C-contig"),
        (lambda xp: (xp.zeros((0, 2**16, 2**16), np.float32), 2), ValueError, "keys must have kv"),
        (lambda xp: (xp.zeros((4, 4), np.float32), 0), ValueError, "kpool must be"),
        (lambda xp: (xp.zeros((4, 4), np.float32), 2.0), TypeError, "kpool must be"),
        (
            lambda xp: (xp.zeros((4, 4), np.float32), 2, xp.zeros((4, 1), np.float32)),
            ValueError,
            "weights must be",
        ),
        (
            lambda xp: (xp.zeros((4, 4), np.float32), 2, xp.zeros((4, 4))),
            ValueError,
            "weights must be float32",
        ),
    ],
)
def test_pool_errors_name_the_argument(arguments, error, words, xp):
    with pytest.raises(error, match=words):
        pool_keys(*arguments(xp))


# ---- queries


@pytest.mark.parametrize("power_of_two", sanitized([False, True], [True]))
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_queries_have_the_bits_of_the_definition(dtype, power_of_two, xp):
    rng = np.random.default_rng(14)
    shapes = ((1, 64, 128), (37, 3, 32), (5, 128, 256), (9, 1, 64))
    for tokens, heads, depth in shapes if dtype == BFLOAT16 else shapes[:2]:
        q = hard_rows(tokens * heads + 12, depth, dtype)[: tokens * heads]
        q = np.ascontiguousarray(q).reshape(tokens, heads, depth)
        weights = rng.standard_normal((tokens, heads)).astype(np.float32)
        codes, scales = quantised(q, 1, power_of_two)
        for given, head_scale, softmax_scale in (
            ({}, heads**-0.5, depth**-0.5),
            ({"softmax_scale": 0.3, "head_scale": 1}, 1, 0.3),
        ):
            values, qs = quantize_queries(
                on(xp, q), xp.asarray(weights), power_of_two=power_of_two, **given
            )
            assert values.dtype == (fp8.FP8 if xp is np else np.uint8)
            assert same_bits(host(values).view(np.uint8), codes)
            with np.errstate(all="ignore"):
                gates = weights * np.float32(head_scale) * scales[..., 0]
                assert same_bits(qs, gates * np.float32(softmax_scale))


def test_scores_are_those_of_the_unquantised_queries(xp):
    """What the gates are for: a score is near sum over heads of weight * softmax * relu(q k)."""
    rng = np.random.default_rng(15)
    q, k = rng.standard_normal((8, 16, 64)), rng.standard_normal((10, 64))
    weights = rng.random((8, 16)).astype(np.float32)
    values, qs = quantize_queries(xp.asarray(q.astype(np.float32)), xp.asarray(weights))
    dots = np.maximum(host(fp8.decode(values)).astype(np.float64) @ k.T, 0)
    got = (host(qs)[..., None] * dots).sum(axis=1)
    want = (weights[..., None] * np.maximum(q @ k.T, 0)).sum(axis=1) * (16 * 64) ** -0.5
    np.testing.assert_allclose(got, want, atol=0.05 * want.max())


def test_no_queries(xp):
    values, qs = quantize_queries(xp.zeros((0, 4, 64), np.float32), xp.zeros((0, 4), np.float32))
    assert values.shape == (0, 4, 64)
    assert qs.shape == (0, 4)


def _queries(xp, q=None, weights=None, **others):
    q = xp.zeros((3, 2, 64), np.float32) if q is None else q
    weights = xp.zeros((3, 2), np.float32) if weights is None else weights
    return quantize_queries(q, weights, **others)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (lambda xp: {"q": xp.zeros((3, 2, 64))}, ValueError, "q must be bfloat16"),
        (lambda xp: {"q": xp.zeros((3, 64), np.float32)}, ValueError, r"q must be \[total"),
        (lambda xp: {"q": xp.zeros((3, 2, 48), np.float32)}, ValueError, r"q must be \[total"),
        (lambda xp: {"q": xp.zeros((3, 129, 64), np.float32)}, ValueError, r"q must be \[total"),
        (lambda xp: {"weights": xp.zeros((3, 1), np.float32)}, ValueError, "weights must be"),
        (lambda xp: {"weights": xp.zeros((3, 2))}, ValueError, "weights must be float32"),
        (lambda xp: {"softmax_scale": "1"}, TypeError, "softmax_scale must be"),
        (lambda xp: {"softmax_scale": np.inf}, ValueError, "softmax_scale must be"),
        (lambda xp: {"head_scale": np.nan}, ValueError, "head_scale must be"),
        (lambda xp: {"head_scale": True}, TypeError, "head_scale must be"),
        (lambda xp: {"power_of_two": 1}, TypeError, "power_of_two must be"),
    ],
)
def test_query_errors_name_the_argument(given, error, words, xp):
    with pytest.raises(error, match=words):
        _queries(xp, **given(xp))
