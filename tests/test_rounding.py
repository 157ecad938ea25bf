"""The fuzzer allows the errors that NumPy and the kernels make, and little more."""

from __future__ import annotations

import hopper
import numpy as np
import pytest

from mla_fp8._reference.operation import score_keys
from mla_fp8.cli import oracle
from mla_fp8.cli.compare import Mismatch, assert_scores_close
from mla_fp8.cli.fuzz_data import VALUES, normal_codes
from mla_fp8.cli.rounding import Sums, largest_errors


def _numbers(values, seed, tokens=6, heads=8, keys=150, depth=128):
    """Codes of queries and keys, gates and scales of a kind that the fuzzer draws."""
    rng = np.random.default_rng(seed)
    q, k = normal_codes(rng, (tokens, heads, depth)), normal_codes(rng, (keys, depth))
    gates = rng.standard_normal((tokens, heads)).astype(np.float32)
    scales = rng.uniform(0.25, 4.0, keys).astype(np.float32)
    VALUES[values](rng, q, gates, k, scales)
    return q, gates, k, scales


def _exact_and_allowed(sums, q, gates, keys, scales):
    arrays = oracle.E4M3[q], gates.astype(float), oracle.E4M3[keys][:, None]
    arrays += (scales.astype(float)[:, None, None],)
    return oracle.exact_scores(*arrays), largest_errors(sums, *arrays)


def _check(got, exact, allowed):
    want = oracle.Expected(exact, np.ones(exact.shape, bool))
    assert_scores_close(got, want, allowed, 1.0, gate=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinite gates
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("values", VALUES)
def test_hoppers_scores_are_within_the_allowed_error(values, depth):
    for seed in range(3):
        numbers = _numbers(values, seed, depth=depth)
        exact, allowed = _exact_and_allowed(Sums.HOPPER, *numbers)
        _check(hopper.scores(*numbers), exact, allowed)


def test_the_allowed_error_is_close_to_that_of_sums_of_one_sign():
    """Every product is cut in the same direction."""
    q, gates, keys, scales = _numbers("normal", 0)
    q, gates, keys = q & 0x7F, np.abs(gates), keys & 0x7F
    exact, allowed = _exact_and_allowed(Sums.HOPPER, q, gates, keys, scales)
    error = np.abs(hopper.scores(q, gates, keys, scales) - exact)
    assert 0.1 < (error / allowed).max() < 0.5
    assert (allowed < 0.01 * exact).all()


@pytest.mark.parametrize("values", ["normal", "wide", "plateau", "nan_codes"])
def test_fp16_products_are_within_the_allowed_error(values):
    """8 products in a step and 23 bits: fewer than Ampere's tensor cores keep."""
    q, _, keys, scales = _numbers(values, 0, heads=1)
    exact, allowed = _exact_and_allowed(Sums.PORTABLE, q, np.ones(q.shape[:2]), keys, scales)
    dots = np.fmax(hopper.dot_products(q[:, 0], keys, step=8, bits=23), np.float32(0))
    _check(dots * scales, exact, allowed)
    assert (allowed < 2e-4 * scales * np.abs(exact).max()).all() or values == "plateau"


def test_numpy_rounds_a_score_once():
    """No score is off by more than half a unit of float32, and some by nearly as much."""
    q, gates, keys, scales = _numbers("normal", 0)
    q, gates, keys = q & 0x7F, np.abs(gates), keys & 0x7F  # so that no terms cancel
    exact, allowed = _exact_and_allowed(Sums.FLOAT64, q, gates, keys, scales)
    found = score_keys(
        oracle.E4M3[q], gates.astype(float), oracle.E4M3[keys][:, None], scales[:, None, None]
    )
    _check(found, exact, allowed)
    assert 0.9 < (np.abs(found - exact) / allowed).max() <= 1


def _as_channels(number: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 numbers of queries and keys whose dot product is ``number * 2 ** -18``."""
    bits = [bit for bit in range(number.bit_length()) if number >> bit & 1]
    assert len(bits) <= channels
    q, k = np.zeros((2, channels))
    for place, bit in enumerate(bits):
        exponent = bit - 18  # of the product of two powers of two, from 2 ** -9 to 2 ** 8
        q[place] = 2.0 ** max(exponent - 8, -9)
        k[place] = 2.0**exponent / q[place]
    return q, k


def test_granules_that_cancel():
    """NumPy rounds the dot product of each granule to float64, and their difference may be tiny."""
    a, b = 2**23 + 9, 2**23 + 15  # two scales, and products that differ by one
    x = pow(a, -1, b) + 2000 * b
    y, one = divmod(a * x - 1, b)
    assert one == 0
    halves = zip(_as_channels(x, 64), _as_channels(y, 64), strict=True)
    q, keys = map(np.concatenate, halves)
    keys[64:] *= -1
    arrays = q[None, None], np.ones((1, 1)), keys[None, None], np.array([[[a, b]]], float)
    assert np.isin(q, oracle.E4M3).all()
    assert np.isin(keys, oracle.E4M3).all()
    exact, found = 2.0**-18, score_keys(*arrays)
    assert found != np.float32(exact)
    assert abs(found - exact) <= largest_errors(Sums.FLOAT64, *arrays)


@pytest.mark.parametrize("sums", Sums)
def test_a_product_too_many_is_not_allowed(sums):
    """One channel of one head, of the 128 channels of 8 heads."""
    q, gates, keys, scales = _numbers("normal", 1)
    exact, allowed = _exact_and_allowed(sums, q, gates, keys, scales)
    without = q.copy()
    without[:, 0, 5] = 0
    other, _ = _exact_and_allowed(sums, without, gates, keys, scales)
    with pytest.raises(Mismatch, match="a score is"):
        _check(other.astype(np.float32), exact, allowed)


def test_a_gate_of_infinity_needs_the_sign_of_its_product():
    q = np.array([[[0x38] * 2 + [0] * 30]], np.uint8)  # 1, 1, 0, ...
    keys = np.zeros((3, 32), np.uint8)
    keys[:, 0], keys[:, 1] = (0x38, 0x38, 0), (0x38, 0xB8, 0)  # 1 + 1, 1 - 1, 0 + 0
    with np.errstate(invalid="ignore"):
        exact, allowed = _exact_and_allowed(
            Sums.HOPPER, q, np.full((1, 1), np.inf), keys, np.ones(3)
        )
    assert exact[0, 0] == np.inf
    assert np.isnan(exact[0, 1:]).all()
    assert np.isinf(allowed).tolist() == [[False, True, False]]
    for sound in ((np.inf, np.nan, np.nan), (np.inf, np.inf, np.nan)):
        _check(np.float32([sound]), exact, allowed)
    for wrong in ((np.inf, 1.0, np.nan), (np.nan, np.nan, np.nan), (np.inf, np.nan, np.inf)):
        with pytest.raises(Mismatch):
            _check(np.float32([wrong]), exact, allowed)
