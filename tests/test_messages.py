"""What stands in an error: axes, casts, the wrong place of long arrays, extents beyond counting."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from generators import TINY, Spec, tiny_arguments
from properties import POISON, assert_helpful, host, message_of

from mla_fp8 import (
    MLAIndexerRaggedFloat8Paged,
    fp8,
    index_scores,
    index_topk,
    select_topk,
)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "qs",
            np.zeros((3, 7), np.float32),
            "qs must be float32 [total_seq_len = 3, num_heads = 4]; got float32 (3, 7)",
        ),
        (
            "input_row_offsets",
            np.zeros(5, np.uint32),
            "input_row_offsets must be uint32 or int32 [batch + 1 = 3]; got uint32 (5,)",
        ),
        (
            "k_lookup_table",
            np.zeros((4, 17), np.uint32),
            "k_lookup_table must be uint32 or int32 [batch = 2, pages_per_seq]; got uint32 (4, 17)",
        ),
        (
            "k_max_lengths",
            np.zeros(2, np.uint32),
            "k_max_lengths must be uint32 or int32 [1, 2]; got uint32 (2,)",
        ),
    ],
)
def test_axes_have_names_and_extents(name, array, message):
    assert message_of(lambda: index_topk(*tiny_arguments(**{name: array}), k=6)) == message


def test_axes_of_outputs_have_names_and_extents():
    args = tiny_arguments()
    wrong = np.zeros((2, 6), np.int32)
    found = message_of(lambda: index_topk(*args, k=6, out=wrong))
    assert found == "out must be int32 [total_seq_len = 3, k = 6]; got int32 (2, 6)"
    found = message_of(lambda: index_scores(*args, out=wrong.view(np.float32)))
    assert found.startswith("out must be float32 [total_seq_len = 3, max_keys = 11]; got")
    scores = np.zeros((3, 9), np.float32)
    found = message_of(lambda: select_topk(scores, None, 6, out=wrong))
    assert found == "out must be int32 [rows = 3, k = 6]; got int32 (2, 6)"
    found = message_of(lambda: select_topk(scores, np.zeros(4, np.int32), 6))
    assert found == "lengths must be uint32 or int32 [rows = 3]; got int32 (4,)"


def _stranger(dtype: str):
    """An array of a library that is not here, as far as it may be looked at."""
    return SimpleNamespace(dtype=dtype, shape=(3, 4))


TO_FLOAT = "cast it with .astype('float32'), in torch with .float()"
TO_INT = "cast it with .astype('int32'), in torch with .to(torch.int32)"
CASTS = [
    *[("qs", t, "float32", TO_FLOAT) for t in ("bfloat16", "float16", "float64")],
    *[("k_scales", t, "float32", TO_FLOAT) for t in ("float8_e8m0fnu", "float8_e4m3fn")],
    *[
        (name, t, "int32", TO_INT)
        for name in ("input_row_offsets", "k_cache_lengths", "k_lookup_table", "k_max_lengths")
        for t in ("int64", "uint64")
    ],
]


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(("name", "dtype", "wanted", "cast"), CASTS)
def test_the_cast_is_named(name, dtype, wanted, cast, foreign):
    array = getattr(TINY.build(), name).astype(getattr(ml_dtypes, dtype, dtype))
    given = _stranger(f"torch.{dtype}") if foreign else array
    found = message_of(lambda: index_topk(*tiny_arguments(**{name: given}), k=6))
    assert_helpful(ValueError(found), name, dtype)
    assert wanted in found.split("; got")[0]
    assert found.endswith(cast)


@pytest.mark.parametrize("foreign", [False, True])
def test_the_cast_of_an_output_is_named(foreign):
    args, scores = tiny_arguments(), np.zeros((3, 9), np.float32)
    indices = _stranger("torch.int64") if foreign else np.full((3, 6), POISON, np.int64)
    values = _stranger("torch.bfloat16") if foreign else np.zeros((3, 6), ml_dtypes.bfloat16)
    good = np.zeros((3, 6), np.int32)
    for call, cast in (
        (lambda: index_topk(*args, k=6, out=indices), TO_INT),
        (lambda: select_topk(scores, None, 6, out=indices), TO_INT),
        (lambda: index_topk(*args, k=6, out=(good, values), return_scores=True), TO_FLOAT),
        (lambda: index_scores(*args, out=values), TO_FLOAT),
        (lambda: select_topk(scores, indices, 6), TO_INT),
        (lambda: select_topk(values, None, 6), TO_FLOAT),
    ):
        found = message_of(call)
        assert found.endswith(cast)
        assert found.split()[0] in ("out", "out[1]", "lengths", "scores")


def test_values_and_scales_of_other_types_are_named():
    values, scales = fp8.quantize(np.ones((3, 64), np.float32))
    found = message_of(lambda: fp8.dequantize(values, _stranger("torch.float8_e8m0fnu")))
    assert found == f"scales must be float32; got float8_e8m0fnu: {TO_FLOAT}"
    found = message_of(lambda: fp8.dequantize(values, scales.astype(ml_dtypes.float8_e8m0fnu)))
    assert found.startswith("scales must be float32 [..., groups]")
    assert found.endswith(TO_FLOAT)
    found = message_of(lambda: fp8.decode(_stranger("torch.float8_e5m2")))
    assert found == "values must be float8_e4m3fn (or uint8); got torch.float8_e5m2"
    found = message_of(lambda: fp8.quantize(_stranger("torch.float8_e4m3fn")))
    assert found == f"x must be float32; got float8_e4m3fn: {TO_FLOAT}"
    assert "granularity must" in message_of(lambda: fp8.quantize(np.ones((3, 64)), "8"))


@pytest.mark.parametrize(
    ("dtype", "name", "to"),
    [
        ("bfloat16", "qs", "float32"),
        ("float8_e8m0fnu", "k_scales", "float32"),
        ("int64", "k_lookup_table", "int32"),
    ],
)
def test_torch(dtype, name, to):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(getattr(TINY.build(), name).view(to).copy())
    wrong = tensor.to(getattr(torch, dtype))
    found = message_of(lambda: index_topk(*tiny_arguments(**{name: wrong}), k=6))
    assert_helpful(ValueError(found), name, dtype)
    assert to in found.split("; got")[0]
    assert "cast it" in found


LONG = 10_000
BAD_OFFSETS = {
    "ends early": (np.arange(LONG), f"[{LONG - 2}, {LONG - 1}] from [{LONG - 2}] on"),
    "starts late": (np.arange(5, LONG + 5), "[5, 6, 7] from [0] on"),
    "falls": (np.r_[np.arange(7), 2, np.full(LONG - 8, LONG)], "[6, 2, 10000] from [6] on"),
}


@pytest.mark.parametrize("name", BAD_OFFSETS)
def test_of_long_offsets_the_wrong_place_is_shown(name):
    offsets, shown = BAD_OFFSETS[name]
    case = TINY.build()
    found = message_of(
        lambda: index_topk(
            np.zeros((LONG, 4, 64), np.uint8),
            np.zeros((LONG, 4), np.float32),
            offsets.astype(np.uint32),
            case.k_blocks,
            np.zeros(LONG - 1, np.uint32),
            np.zeros((LONG - 1, 2), np.uint32),
            np.array([[LONG, 0]], np.uint32),
            case.k_scales,
            0,
            k=6,
        )
    )
    assert found.startswith("input_row_offsets must")
    assert f"got {shown}" in found


@pytest.mark.parametrize(
    "value", [10**6000, "x" * 9999, np.zeros((9, 9))], ids=lambda value: type(value).__name__
)
def test_long_parameters_are_cut_short(value):
    """Numbers too long for Python to print, words, arrays: named all the same."""
    args = tiny_arguments()
    scores = np.zeros((2, 5), np.float32)
    for name, call in (
        ("num_heads", lambda: MLAIndexerRaggedFloat8Paged(num_heads=value)),
        ("k", lambda: select_topk(scores, None, value)),
        ("sort", lambda: select_topk(scores, None, 2, sort=value)),
        ("mask", lambda: index_topk(*args, k=2, mask=value)),
        ("layer_idx", lambda: index_topk(*args[:-1], value, k=2)),
    ):
        assert message_of(call).startswith(f"{name} must")


def test_long_dtypes_are_cut_short():
    fields = np.dtype([(f"field_{i}", np.float32) for i in range(999)])
    message_of(lambda: index_topk(*tiny_arguments(qs=np.zeros((3, 4), fields)), k=6))


# ----- extents that kernels cannot count


def _huge(shape, dtype):
    return np.broadcast_to(np.zeros((), dtype), shape)


BLOCKS, SCALES = (0, 1, 1, 8, 1, 64), (0, 1, 1, 8, 1, 1)
EXTENTS = {  # what is wrong, and the arrays that make it so
    "num_blocks": {"k_blocks": (2**32, *BLOCKS[1:]), "k_scales": (2**32, *SCALES[1:])},
    "num_layers": {"k_blocks": (0, 1, 2**32, 8, 1, 64), "k_scales": (0, 1, 2**32, 8, 1, 1)},
    "page_size": {"k_blocks": (0, 1, 1, 2**31, 1, 64), "k_scales": (0, 1, 1, 2**31, 1, 1)},
    "pages_per_seq": {"k_lookup_table": (2, 2**32)},
    "batch": {
        "k_cache_lengths": (2**31,),
        "input_row_offsets": (2**31 + 1,),
        "k_lookup_table": (2**31, 2),
    },
    "total_seq_len": {"q": (2**31, 4, 64), "qs": (2**31, 4)},
}


@pytest.mark.parametrize("axis", EXTENTS)
def test_what_kernels_cannot_count_is_refused_by_name(axis):
    case, shapes = TINY.build(), EXTENTS[axis]
    arrays = {name: _huge(shape, getattr(case, name).dtype) for name, shape in shapes.items()}
    found = message_of(lambda: index_topk(*tiny_arguments(**arrays), k=6, check=False))
    name = next(iter(shapes))
    assert found.startswith(f"{name} must have {axis} <= ")
    assert_helpful(ValueError(found), name)


def test_rows_that_kernels_cannot_count_are_refused_by_name():
    out = np.empty((2**31, 0), np.int32)
    found = message_of(lambda: select_topk(np.empty((2**31, 0), np.float32), None, 1, out=out))
    assert found == f"scores must have rows <= {2**31 - 2**16}; got {2**31}"


def test_no_layers():
    wrong = {n: getattr(TINY.build(), n)[:, :, :0] for n in ("k_blocks", "k_scales")}
    found = message_of(lambda: index_topk(*tiny_arguments(**wrong), k=6))
    assert found.startswith("k_blocks must have num_layers")


@pytest.mark.parametrize("depth", [32, 64, 128, 256])
def test_no_scales(depth, xp):
    """Of a depth below the largest granularity, no scales at all were taken for a granularity."""
    case = Spec((2, 1), (5, 9), num_heads=4, depth=depth, page_size=8).build()
    here = case.replace(k_scales=case.k_scales[..., :0]).to(xp)
    out = xp.full((3, 6), POISON, np.int32)
    with pytest.raises(ValueError, match=r"k_scales must have 1 .*; got 0") as caught:
        index_topk(*here.args, k=6, out=out)
    assert_helpful(caught.value, "k_scales", "0")
    assert (host(out) == POISON).all()
