"""hadamard: the definition, its own inverse, and the same bits on both backends."""

import numpy as np
import pytest
from properties import host, same_bits, sanitized
from quantised import BFLOAT16, KEY_DTYPES, Bfloat16, on

from mla_fp8 import fp8

DEPTHS = [32, 64, 128, 256]


def _transformed(x: np.ndarray) -> np.ndarray:
    """The transforms of both halves, then their sum and difference; without the factor."""
    if x.shape[-1] == 1:
        return x
    left, right = (_transformed(half) for half in np.split(x, 2, axis=-1))
    return np.concatenate([left + right, left - right], axis=-1)


def _matrix(depth: int) -> np.ndarray:
    i, j = np.indices((depth, depth))
    ones = np.vectorize(lambda n: int(n).bit_count())(i & j)
    return (-1.0) ** ones * depth**-0.5


@pytest.mark.parametrize("depth", sanitized(DEPTHS, [128]))
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_same_bits_as_the_definition(dtype, depth, xp):
    rng = np.random.default_rng(9)
    for shape in ((1,), (65,), (7, 3)):
        scale = 2.0 ** rng.integers(-20, 10, (*shape, 1))
        x = (rng.standard_normal((*shape, depth)) * scale).astype(dtype)
        got = fp8.hadamard(on(xp, x))
        assert isinstance(got, xp.ndarray)
        want = _transformed(x.astype(np.float32)) * np.float32(depth**-0.5)
        assert same_bits(got, want)
        exact = x.astype(np.float64) @ _matrix(depth)
        np.testing.assert_allclose(host(got), exact, atol=1e-5 * scale.max())


def test_it_is_its_own_inverse(xp):
    x = np.random.default_rng(10).standard_normal((5, 128)).astype(np.float32)
    np.testing.assert_allclose(host(fp8.hadamard(fp8.hadamard(xp.asarray(x)))), x, atol=1e-6)


def test_small_numbers_are_not_flushed(xp):
    x = (np.random.default_rng(11).integers(-9, 9, (4, 64)) * 2.0**-149).astype(np.float32)
    want = _transformed(x) * np.float32(0.125)
    assert same_bits(fp8.hadamard(xp.asarray(x)), want)


@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_rows_that_begin_at_any_address(dtype, xp):
    x = np.random.default_rng(12).standard_normal((9, 64)).astype(dtype)
    bits = x.view(np.uint16 if x.itemsize == 2 else np.uint32)
    moved = xp.zeros(bits.size + 1, bits.dtype)
    moved[1:] = xp.asarray(bits.reshape(-1))
    rows = moved[1:].reshape(9, 64)
    is_shown_as_bits = dtype == BFLOAT16 and xp is not np
    rows = Bfloat16(rows.view(np.int16)) if is_shown_as_bits else rows.view(dtype)
    assert same_bits(fp8.hadamard(rows), fp8.hadamard(on(xp, x)))


def test_empty_arrays(xp):
    assert fp8.hadamard(xp.zeros((0, 3, 128), np.float32)).shape == (0, 3, 128)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (lambda xp: xp.zeros((3, 48), np.float32), ValueError, r"x must be \[..., depth\]"),
        (lambda xp: xp.zeros((), np.float32), ValueError, r"x must be \[..., depth\]"),
        (lambda xp: xp.zeros((3, 64)), ValueError, "x must be bfloat16"),
        (lambda xp: xp.zeros((3, 64), np.uint16), ValueError, "x must be bfloat16"),
        (lambda xp: xp.zeros((64, 64), np.float32).T, ValueError, "x must be C-contiguous"),
        (lambda xp: [1.0], TypeError, "x must be an array"),
    ],
)
def test_errors_name_the_argument(x, error, words, xp):
    with pytest.raises(error, match=words):
        fp8.hadamard(x(xp))
