"""rope: both styles, every dtype, and the same bits on both backends."""

import numpy as np
import pytest
from properties import host, same_bits, sanitized
from quantised import BFLOAT16, KEY_DTYPES, on

from mla_fp8 import fp8


def _angles(rng, tokens, angles):
    """Cosines and sines of positions up to 100000, as models tabulate them."""
    position = rng.integers(0, 100_000, (tokens, 1))
    angle = position * 10000.0 ** (-np.arange(angles) / max(angles, 1))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _rotated(x, cos, sin, interleaved):
    """Pair by pair; each product and sum of float32 numbers is rounded."""
    out, angles = x.astype(np.float32), cos.shape[1]
    rows = out.reshape(len(out), -1, out.shape[-1])
    for j in range(angles):
        first, second = (2 * j, 2 * j + 1) if interleaved else (j, j + angles)
        a, b = rows[..., first].copy(), rows[..., second].copy()
        c, s = cos[:, None, j], sin[:, None, j]
        rows[..., first] = a * c - b * s
        rows[..., second] = b * c + a * s
    return out


@pytest.mark.parametrize("interleaved", sanitized([False, True], [True]))
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_same_bits_as_the_definition(dtype, interleaved, xp):
    rng = np.random.default_rng(5)
    for shape, angles in (((33, 4, 128), 32), ((7, 128), 32), ((5, 2, 64), 32), ((3, 6), 1)):
        x = (rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 15, shape)).astype(dtype)
        cos, sin = _angles(rng, shape[0], angles)
        got = fp8.rope(on(xp, x), xp.asarray(cos), xp.asarray(sin), interleaved=interleaved)
        assert isinstance(got, xp.ndarray)
        assert same_bits(got, _rotated(x, cos, sin, interleaved))


def test_it_is_the_complex_product(xp):
    """The definition of DeepSeek's code: a pair times cos + i sin."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((20, 3, 128)).astype(np.float32)
    cos, sin = _angles(rng, 20, 32)
    turn = (cos.astype(np.float64) + 1j * sin)[:, None]
    pairs = x[..., 0:64:2] + 1j * x[..., 1:64:2]
    got = host(fp8.rope(xp.asarray(x), xp.asarray(cos), xp.asarray(sin), interleaved=True))
    np.testing.assert_allclose(got[..., 0:64:2], (pairs * turn).real, atol=2e-6)
    np.testing.assert_allclose(got[..., 1:64:2], (pairs * turn).imag, atol=2e-6)
    halves = x[..., :32] + 1j * x[..., 32:64]
    got = host(fp8.rope(xp.asarray(x), xp.asarray(cos), xp.asarray(sin), interleaved=False))
    np.testing.assert_allclose(got[..., :32], (halves * turn).real, atol=2e-6)
    np.testing.assert_allclose(got[..., 32:64], (halves * turn).imag, atol=2e-6)
    assert same_bits(got[..., 64:], x[..., 64:])


def test_small_numbers_are_not_flushed(xp):
    x = (np.random.default_rng(7).integers(-9, 9, (4, 64)) * 2.0**-149).astype(np.float32)
    cos, sin = _angles(np.random.default_rng(8), 4, 16)
    got = fp8.rope(xp.asarray(x), xp.asarray(cos), xp.asarray(sin), interleaved=False)
    assert same_bits(got, _rotated(x, cos, sin, False))


@pytest.mark.parametrize("shape", [(0, 4, 128), (3, 0, 128)])
def test_empty_arrays(shape, xp):
    table = xp.zeros((shape[0], 32), np.float32)
    got = fp8.rope(xp.zeros(shape, np.float32), table, table, interleaved=True)
    assert got.shape == shape


def _call(xp, **changes):
    arguments = {
        "x": xp.zeros((3, 2, 64), np.float32),
        "cos": xp.zeros((3, 16), np.float32),
        "sin": xp.zeros((3, 16), np.float32),
        "interleaved": False,
    }
    return fp8.rope(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (lambda xp: {"x": xp.zeros((3, 2, 64))}, ValueError, "x must be bfloat16"),
        (lambda xp: {"x": xp.zeros(64, np.float32)}, ValueError, r"x must be \[tokens"),
        (lambda xp: {"x": xp.zeros((3, 2, 65), np.float32)}, ValueError, "x must have an even"),
        (lambda xp: {"x": xp.zeros((3, 128), np.float32)[:, ::2]}, ValueError, "x must be C-con"),
        (lambda xp: {"x": [[1.0]]}, TypeError, "x must be an array"),
        (lambda xp: {"cos": xp.zeros((2, 16), np.float32)}, ValueError, "cos must be"),
        (lambda xp: {"cos": xp.zeros((3, 16))}, ValueError, "cos must be float32"),
        (lambda xp: {"cos": xp.zeros((3, 33), np.float32)}, ValueError, "sin must be"),
        (lambda xp: {"sin": xp.zeros((3, 8), np.float32)}, ValueError, "sin must be"),
        (lambda xp: {"interleaved": 1}, TypeError, "interleaved must be True or False"),
    ],
)
def test_errors_name_the_argument(changes, error, words, xp):
    with pytest.raises(error, match=words):
        _call(xp, **changes(xp))


def test_more_angles_than_pairs(xp):
    table = xp.zeros((3, 33), np.float32)
    with pytest.raises(ValueError, match="cos must have at most depth / 2 = 32 angles; got 33"):
        _call(xp, cos=table, sin=table)


def test_style_has_no_default(xp):
    """DeepSeek's own demonstration used the wrong one for a while."""
    x, table = xp.zeros((1, 64), np.float32), xp.zeros((1, 8), np.float32)
    with pytest.raises(TypeError, match="interleaved"):
        fp8.rope(x, table, table)


def test_bfloat16_of_numpy(xp):
    if xp is not np:
        pytest.skip("CuPy has no bfloat16")
    x = np.ones((1, 64), BFLOAT16)
    table = np.ones((1, 32), np.float32)
    assert fp8.rope(x, table, table * 0, interleaved=True).dtype == np.float32
