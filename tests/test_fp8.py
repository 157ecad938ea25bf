"""E4M3 codes and scales: every code, every rounding boundary, both backends."""

import ml_dtypes
import numpy as np
import pytest
from properties import host, same_bits
from quantised import quantised

from mla_fp8 import fp8
from mla_fp8.cli import oracle

FP8 = ml_dtypes.float8_e4m3fn
CODES = np.arange(256, dtype=np.uint8)
NUMBERS = CODES[(CODES & 0x7F) != 0x7F]


def _boundaries() -> np.ndarray:
    """Every E4M3 value, every midpoint of neighbours (the ties), and the float32s next to both."""
    values = np.sort(oracle.E4M3[np.arange(0x7F)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, [464, 480]])
    points = points.astype(np.float32)  # exact
    around = [np.nextafter(points, np.float32(side)) for side in (-np.inf, np.inf)]
    points = np.concatenate([points, *around])
    return np.concatenate([points, -points])


def _nearest_even(x: np.ndarray) -> np.ndarray:
    """ml_dtypes rounds to nearest even; saturation is ours (there, beyond 464 is NaN)."""
    return np.clip(x, -448, 448).astype(FP8).view(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, FP8])
def test_decode_every_code(dtype, xp):
    if xp is not np and dtype is FP8:
        pytest.skip("CuPy has no float8")
    got = fp8.decode(xp.asarray(CODES).view(dtype))
    assert isinstance(got, xp.ndarray)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(host(got), oracle.E4M3.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(host(got))[[0, 0x80]], [False, True])


def test_encode_inverts_decode(xp):
    got = fp8.encode(fp8.decode(xp.asarray(NUMBERS)))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(host(got), NUMBERS)


def test_encode_rounds_to_nearest_even_at_every_boundary(xp):
    x = _boundaries()
    np.testing.assert_array_equal(host(fp8.encode(xp.asarray(x))), _nearest_even(x))


def test_encode_random_floats_of_all_magnitudes(xp):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    np.testing.assert_array_equal(host(fp8.encode(xp.asarray(x))), _nearest_even(x))


def test_encode_saturates_and_keeps_nan(xp):
    x = np.array([449, 464, 465, 1e30, np.inf, -449, -1e30, -np.inf, np.nan, -0.0], np.float32)
    got = host(fp8.encode(xp.asarray(x)))
    assert got[:8].tolist() == [0x7E] * 5 + [0xFE] * 3
    assert got[8] & 0x7F == 0x7F
    assert got[9] == 0x80


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_quantize_takes_other_float_types(dtype, xp):
    if xp is not np and dtype is ml_dtypes.bfloat16:
        pytest.skip("CuPy arrays of bfloat16 are not promised")
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(dtype)
    values, scales = fp8.quantize(xp.asarray(x))
    again, same = fp8.quantize(xp.asarray(x.astype(np.float32)))
    np.testing.assert_array_equal(host(scales), host(same))
    np.testing.assert_array_equal(host(values).view(np.uint8), host(again).view(np.uint8))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("granularity", [None, 128, 32])
def test_quantize_round_trip(granularity, power_of_two, xp):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 5, 128)) * 10.0 ** rng.integers(-20, 20, (2, 5, 1))
    x = x.astype(np.float32)
    values, scales = fp8.quantize(xp.asarray(x), granularity, power_of_two=power_of_two)
    granules = 1 if granularity is None else 128 // granularity
    assert values.dtype == (FP8 if xp is np else np.uint8)
    assert values.shape == x.shape
    assert scales.dtype == np.float32
    assert scales.shape == (2, 5, granules)

    amax = np.abs(x).reshape(2, 5, granules, -1).max(axis=-1).astype(np.float64)
    scale = host(scales).astype(np.float64)
    if power_of_two:
        assert (np.frexp(scale)[0] == 0.5).all()
        assert (scale >= amax / 448).all(), "saturates"
        assert (scale / 2 < amax / 448).all(), "wastes a bit"
    else:
        np.testing.assert_allclose(scale, amax / 448, rtol=2.0**-23)
    back = fp8.dequantize(values, scales)
    assert back.dtype == np.float32
    step = np.repeat(scale, 128 // granules, axis=-1)
    # half a unit in the last of 3 mantissa bits, or of the subnormal spacing 2**-9
    bound = np.maximum(np.abs(x) * 2.0**-4, step * 2.0**-10) * (1 + 1e-6)
    assert (np.abs(host(back) - x.astype(np.float64)) <= bound).all()


def test_dequantize_is_value_times_scale(xp):
    codes = np.resize(NUMBERS, (4, 64))
    scales = np.array([[1, 2], [0.5, 3], [0, 7], [2.0**-100, 1e9]], np.float32)
    want = oracle.E4M3[codes].astype(np.float32) * np.repeat(scales, 32, axis=1)
    got = fp8.dequantize(xp.asarray(codes), xp.asarray(scales))
    np.testing.assert_array_equal(host(got), want)


def test_zero_granules_have_scale_one(xp):
    x = np.zeros((2, 64), np.float32)
    x[1, 40] = -0.0
    values, scales = fp8.quantize(xp.asarray(x), 32)
    assert (host(scales) == 1.0).all()
    assert (host(fp8.decode(values)) == 0).all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_tiny_granules_have_normal_scales(power_of_two, xp):
    """A scale below 2**-126 would be subnormal, and GPUs flush those to zero."""
    x = np.array([[2.0**-120] * 32, [1e-44] * 32], np.float32)
    values, scales = fp8.quantize(xp.asarray(x), power_of_two=power_of_two)
    assert host(scales)[0, 0] == 2.0**-126
    assert host(scales)[1, 0] >= 2.0**-126
    assert (np.abs(host(fp8.dequantize(values, scales)) - x) <= 2.0**-126).all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_subnormal_numbers_beside_normal_ones(power_of_two, xp):
    """CuPy's kernels flush subnormal numbers to zero, but the codes must not show it."""
    rng = np.random.default_rng(16)
    x = (rng.integers(-(2**23), 2**23, (40, 64)) * 2.0**-149).astype(np.float32)
    x[:, 0] = 448 * 2.0 ** np.linspace(-134, -118, 40)
    values, scales = fp8.quantize(xp.asarray(x), 32, power_of_two=power_of_two)
    want_values, want_scales = quantised(x, 2, power_of_two)
    assert same_bits(scales, want_scales)
    assert same_bits(host(values).view(np.uint8), want_values)


def test_huge_granules_do_not_overflow(xp):
    x = np.full((1, 32), 2e38, np.float32)
    for power_of_two in (False, True):
        values, scales = fp8.quantize(xp.asarray(x), power_of_two=power_of_two)
        np.testing.assert_allclose(host(fp8.dequantize(values, scales)), x, rtol=2.0**-4)


def test_non_finite_entries_do_not_touch_the_scale(xp):
    x = np.random.default_rng(3).standard_normal((2, 64)).astype(np.float32)
    _, clean = fp8.quantize(xp.asarray(np.where(np.arange(64) < 3, 0, x)))
    x[:, :3] = np.inf, -np.inf, np.nan
    values, scales = fp8.quantize(xp.asarray(x))
    np.testing.assert_array_equal(host(scales), host(clean))
    decoded = host(fp8.decode(values))
    assert decoded[:, :2].tolist() == [[448, -448]] * 2
    assert np.isnan(decoded[:, 2]).all()
    assert not np.isnan(decoded[:, 3:]).any()


def test_only_non_finite_entries_count_as_zero(xp):
    x = np.array([[np.inf, -np.inf, np.nan, 0] * 8], np.float32)
    values, scales = fp8.quantize(xp.asarray(x))
    assert host(scales).tolist() == [[1.0]]
    decoded = host(fp8.decode(values))[0]
    assert decoded[[0, 1, 3]].tolist() == [448, -448, 0]
    assert np.isnan(decoded[2])


def test_empty_arrays_pass_through(xp):
    values, scales = fp8.quantize(xp.zeros((0, 3, 128), np.float32), 64)
    assert values.shape == (0, 3, 128)
    assert scales.shape == (0, 3, 2)
    assert fp8.dequantize(values, scales).shape == (0, 3, 128)


@pytest.mark.parametrize(
    ("call", "name", "came"),
    [
        (lambda xp: fp8.quantize(xp.zeros((2, 64), np.float32), 48), "granularity", "48"),
        (lambda xp: fp8.quantize(xp.zeros((2, 64), np.float32), 0), "granularity", "0"),
        (lambda xp: fp8.quantize(xp.zeros((2, 64), np.float32), 3.5), "granularity", "float"),
        (lambda xp: fp8.quantize(xp.zeros((2, 64), np.int32)), "x", "int32"),
        (lambda xp: fp8.quantize([[1.0, 2.0]]), "x", "list"),
        (lambda xp: fp8.decode(xp.zeros((2, 64), np.int8)), "values", "int8"),
        (
            lambda xp: fp8.dequantize(xp.zeros((2, 64), np.uint8), xp.ones((2, 3), np.float32)),
            "scales",
            "3",
        ),
        (
            lambda xp: fp8.dequantize(xp.zeros((2, 64), np.uint8), xp.ones((3, 1), np.float32)),
            "scales",
            "3",
        ),
    ],
)
def test_wrong_input_is_named(call, name, came, xp):
    with pytest.raises((ValueError, TypeError)) as caught:
        call(xp)
    assert name in str(caught.value)
    assert came in str(caught.value)
