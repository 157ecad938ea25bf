"""Wrong input, case by case: what is raised, that it helps, and that nothing is written."""

import ml_dtypes
import numpy as np
import pytest
from generators import ARGUMENTS, Spec
from properties import POISON, assert_helpful, host

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, index_topk, select_topk

# No two extents alike that could stand in for one another: a swapped axis cannot pass unseen.
SPEC = Spec(
    seq_lens=(2, 1),
    cache_lens=(5, 9),
    num_heads=4,
    depth=64,
    kv_heads=2,
    granularity=32,
    page_size=8,
    num_layers=3,
    layer=1,
    k=6,
)
EITHER = (TypeError, ValueError)  # where neither the spec nor the API picks one


def _problem(xp):
    case = SPEC.build()
    here = case.to(xp)
    arguments = {name: getattr(here, name) for name in ARGUMENTS}
    out = xp.full((case.tokens, SPEC.k), POISON, np.int32)
    return MLAIndexerRaggedFloat8Paged(**case.params), {"output_indices": out, **arguments}


def _cut(axis):
    """One entry less along an axis, still contiguous."""

    def change(a, xp):
        return xp.ascontiguousarray(a[(slice(None),) * axis + (slice(0, -1),)])

    return change


def _double(axis):
    return lambda a, xp: xp.concatenate([a, a], axis=axis)


def _shape(*shape):
    return lambda a, xp: a.reshape(shape)


def _cast(dtype):
    return lambda a, xp: (host(a) if dtype in HOST_ONLY else a).astype(dtype)


def _strided(a, xp):
    """The right shape and dtype, but every other element of a larger array."""
    lib = np if isinstance(a, np.ndarray) else xp
    return lib.concatenate([a, a], axis=-1)[..., ::2]


HOST_ONLY = (ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz)
INT, FLOAT = np.int64, np.float64
SHAPES = {  # argument that changes, how; "|": others that the message may name instead
    "q is flat": ("q", _shape(3, -1)),
    "q has a head too few": ("q|num_heads", _cut(1)),
    "q has a channel too few": ("q|depth", _cut(2)),
    "qs is flat": ("qs", _shape(-1)),
    "qs has a token too few": ("qs", _cut(0)),
    "qs has a head too few": ("qs", _cut(1)),
    "offsets are a matrix": ("input_row_offsets", _shape(1, -1)),
    "offsets are empty": ("input_row_offsets", lambda a, xp: a[:0]),
    "lengths are a matrix": ("k_cache_lengths", _shape(1, -1)),
    "lengths of a smaller batch": ("k_cache_lengths|input_row_offsets", _cut(0)),
    "blocks without the axis of one": ("k_blocks", lambda a, xp: a[:, 0]),
    "blocks with keys and values": ("k_blocks", _double(1)),
    "blocks without layers": ("k_blocks|k_scales", lambda a, xp: a[:, :, :0]),
    "blocks with empty pages": ("k_blocks|page_size", lambda a, xp: a[:, :, :, :0]),
    "three kv heads for four": ("k_blocks|kv_heads", lambda a, xp: a[..., [0, 1, 0], :].copy()),
    "blocks have a channel too few": ("k_blocks", _cut(5)),
    "table is flat": ("k_lookup_table", _shape(-1)),
    "table of a smaller batch": ("k_lookup_table", _cut(0)),
    "maxima are flat": ("k_max_lengths", _shape(2)),
    "maxima lie across": ("k_max_lengths", _shape(2, 1)),
    "one maximum": ("k_max_lengths", lambda a, xp: a[:, :1].copy()),
    **{f"scales are short on axis {i}": ("k_scales", _cut(i)) for i in (0, 2, 3, 4, 5)},
    "scales twice": ("k_scales", _double(1)),
    "scales without granules": ("k_scales", lambda a, xp: a[..., 0].copy()),
    "output is flat": ("output_indices", _shape(-1)),
    "output has a token too few": ("output_indices", _cut(0)),
    "output has a token too many": ("output_indices", _double(0)),
    "output has k - 1 columns": ("output_indices", _cut(1)),
    "output has 2 k columns": ("output_indices", _double(1)),
}
DTYPES = [
    *[("q", t) for t in (np.float32, np.float16, np.int8, *HOST_ONLY)],
    *[("k_blocks", t) for t in (np.float32, np.int8, *HOST_ONLY)],
    *[("qs", t) for t in (FLOAT, np.float16, np.int32)],
    *[("k_scales", t) for t in (FLOAT, np.float16)],
    *[("input_row_offsets", t) for t in (INT, np.uint64, np.int16, np.float32)],
    *[("k_cache_lengths", t) for t in (INT, np.float32)],
    *[("k_lookup_table", t) for t in (INT, np.uint8, np.float32)],
    *[("k_max_lengths", t) for t in (INT, np.float32)],
    *[("output_indices", t) for t in (INT, np.uint32, np.float32)],
]
LAYERS = {  # layer_idx -> exception; the case has three layers
    "one past": (3, ValueError),
    "negative": (-1, ValueError),
    "beyond 32 bits": (2**32 + 1, ValueError),
    "float": (1.0, TypeError),
    "text": ("1", TypeError),
    "none": (None, TypeError),
    "vector": (np.array([1], np.uint32), EITHER),
    "float array": (np.array(1.0), EITHER),
}


def _assert_refused(op, arguments, exception, names, came=""):
    """`execute` raises, helpfully, with the poison still in the output."""
    out = arguments["output_indices"]
    before = host(out).copy() if hasattr(out, "dtype") else None
    with pytest.raises(exception) as caught:
        op.execute(*arguments.values())
    assert_helpful(caught.value, names, came)
    if before is not None:
        np.testing.assert_array_equal(host(out), before)


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name, xp):
    names, change = SHAPES[name]
    op, arguments = _problem(xp)
    argument = names.split("|")[0]
    arguments[argument] = change(arguments[argument], xp)
    came = "" if "|" in names else str(tuple(arguments[argument].shape))
    _assert_refused(op, arguments, ValueError, names, came)


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_dtype(name, dtype, xp):
    if xp is not np and dtype in HOST_ONLY:
        pytest.skip("CuPy has no such dtype")
    op, arguments = _problem(xp)
    arguments[name] = _cast(dtype)(arguments[name], xp)
    _assert_refused(op, arguments, EITHER, name, np.dtype(dtype).name)


@pytest.mark.parametrize("name", ["output_indices", *ARGUMENTS[:-1]])
def test_strided(name, xp):
    op, arguments = _problem(xp)
    arguments[name] = _strided(arguments[name], xp)
    _assert_refused(op, arguments, ValueError, name)


@pytest.mark.parametrize("name", ["output_indices", "q", "qs", "k_lookup_table", "k_scales"])
def test_fortran_order(name, xp):
    op, arguments = _problem(xp)
    arguments[name] = xp.asfortranarray(arguments[name])
    _assert_refused(op, arguments, ValueError, name)


@pytest.mark.parametrize("value", [None, "text", 3.5, "list"])
@pytest.mark.parametrize("name", ["output_indices", *ARGUMENTS[:-1]])
def test_not_an_array(name, value, xp):
    op, arguments = _problem(xp)
    if (name, value) == ("qs", None):
        return  # every gate is 1
    arguments[name] = host(arguments[name]).tolist() if value == "list" else value
    came = "None" if value is None else type(arguments[name]).__name__
    _assert_refused(op, arguments, TypeError, name, came)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_index(name, xp):
    op, arguments = _problem(xp)
    arguments["layer_idx"], exception = LAYERS[name]
    _assert_refused(op, arguments, exception, "layer_idx")


def test_read_only_output():
    op, arguments = _problem(np)
    arguments["output_indices"].flags.writeable = False
    _assert_refused(op, arguments, ValueError, "output_indices")


@pytest.mark.parametrize("place", ["output_indices", "scores"])
def test_output_over_an_input(place, xp):
    """Written while it is read: the answer would depend on who is first."""
    op, arguments = _problem(xp)
    memory = xp.zeros(3 * 6, np.int32)
    out = [xp.zeros((3, 6), dtype) for dtype in (np.int32, np.float32)]
    out[place == "scores"] = memory.reshape(3, 6).view(out[place == "scores"].dtype)
    arguments["qs"] = memory[2:14].reshape(3, 4).view(np.float32)
    del arguments["output_indices"]
    with pytest.raises(ValueError, match=r"out.* overlap qs"):
        op(*arguments.values(), out=tuple(out), return_scores=True)
    assert (host(memory) == 0).all()


class OnDevice:
    """What a GPU array of some other library looks like from outside; never dereferenced."""

    def __init__(self, array):
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": "|u1" if array.dtype.itemsize == 1 else array.dtype.str,
            "data": (0, True),
            "version": 3,
        }


@pytest.mark.parametrize("name", ["output_indices", "q", "k_blocks", "k_lookup_table"])
def test_device_array_among_host_arrays(name):
    op, arguments = _problem(np)
    poisoned = arguments["output_indices"]
    arguments[name] = OnDevice(arguments[name])
    with pytest.raises(TypeError) as caught:
        op.execute(*arguments.values())
    assert_helpful(caught.value, f"{name}|qs", "mix")  # q is what the others are compared with
    assert (poisoned == POISON).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["output_indices", *ARGUMENTS[:-1]])
def test_host_array_among_device_arrays(name, cupy):
    op, arguments = _problem(cupy)
    arguments[name] = host(arguments[name])
    if name == "k_max_lengths":  # the one that may
        op.execute(*arguments.values())
    else:
        _assert_refused(op, arguments, TypeError, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["output_indices", "q", "k_scales"])
def test_arrays_of_two_devices(name, cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")
    op, arguments = _problem(cupy)
    with cupy.cuda.Device(1):
        arguments[name] = cupy.asarray(host(arguments[name]))
    _assert_refused(op, arguments, EITHER, name)


@pytest.mark.parametrize(
    ("out", "scores", "exception", "came"),
    [
        ((3, 5, np.int32), None, ValueError, "(3, 5)"),
        ((3, 6, np.int64), None, EITHER, "int64"),
        ((3, 6, np.int32), (3, 5, np.float32), ValueError, "(3, 5)"),
        ((3, 6, np.int32), (3, 6, np.float64), EITHER, "float64"),
    ],
)
def test_out(out, scores, exception, came, xp):
    op, arguments = _problem(xp)
    del arguments["output_indices"]
    arrays = [xp.full(a[:2], 7, a[2]) for a in (out, scores) if a]
    given = arrays[0] if scores is None else tuple(arrays)
    with pytest.raises(exception) as caught:
        op(*arguments.values(), out=given, return_scores=scores is not None)
    assert_helpful(caught.value, r"out|out\[[01]\]|scores|indices|output_indices", came)
    assert all((host(a) == 7).all() for a in arrays)


@pytest.mark.parametrize("return_scores", [False, True])
def test_out_has_the_other_form(return_scores, xp):
    """One array where a pair belongs, and a pair where one array belongs."""
    op, arguments = _problem(xp)
    out = arguments.pop("output_indices")
    pair = (out, xp.zeros(out.shape, np.float32))
    with pytest.raises(EITHER) as caught:
        op(*arguments.values(), out=out if return_scores else pair, return_scores=return_scores)
    assert_helpful(caught.value, "out")
    assert (host(out) == POISON).all()


@pytest.mark.parametrize("shape", [(3, 13), (2, 14), (3, 14, 1)])
def test_index_scores_out(shape, xp):
    _, arguments = _problem(xp)
    del arguments["output_indices"]
    arguments["k_max_lengths"] = np.array([[5, 9]], np.uint32)  # 14 columns
    out = xp.full(shape, 7, np.float32)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at below
        index_scores(*arguments.values(), out=out)
    assert_helpful(caught.value, "out", str(shape))
    assert (host(out) == 7).all()


@pytest.mark.parametrize(
    ("parameter", "value", "exception"),
    [
        *[("num_heads", v, ValueError) for v in (0, -1, 129)],
        *[("depth", v, ValueError) for v in (0, 16, 96, 512, -128)],
        *[("k", v, ValueError) for v in (0, -1, 65537)],
        *[("quantization_granularity", v, ValueError) for v in (0, -32, 16, 48, 96, 127)],
        *[("mask", v, ValueError) for v in ("both", "", "Causal mask")],
        *[(n, v, TypeError) for n in ("num_heads", "depth", "k") for v in (8.0, "8", None)],
        *[("quantization_granularity", v, TypeError) for v in (128.0, "128")],
        *[("mask", v, TypeError) for v in (1, None, True)],
    ],
)
def test_parameter(parameter, value, exception):
    with pytest.raises(exception) as caught:
        MLAIndexerRaggedFloat8Paged(**{parameter: value})
    came = type(value).__name__ if exception is TypeError else str(value)
    assert_helpful(caught.value, parameter, came)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"k": 0}, "k"),
        ({"k": 65537}, "k"),
        ({"k": "6"}, "k"),
        ({"k": 6, "mask": "both"}, "mask"),
        ({"k": 6, "sort": "ascending"}, "sort"),
        ({"k": 6, "sort": None}, "sort"),
    ],
)
def test_index_topk_options(options, name, xp):
    _, arguments = _problem(xp)
    out = arguments.pop("output_indices")
    with pytest.raises(EITHER) as caught:
        index_topk(*arguments.values(), out=out, **options)
    assert_helpful(caught.value, name, str(options[name]))
    assert (host(out) == POISON).all()


SELECT = {
    "k of zero": ("k", {"k": 0}),
    "k too large": ("k", {"k": 65537}),
    "k is a float": ("k", {"k": 6.0}),
    "sort": ("sort", {"sort": "down"}),
    "scores are flat": ("scores", {"scores": ((36,), np.float32)}),
    "scores are doubles": ("scores", {"scores": ((3, 12), np.float64)}),
    "lengths of other rows": ("lengths", {"lengths": ((4,), np.uint32)}),
    "lengths are a matrix": ("lengths", {"lengths": ((3, 1), np.uint32)}),
    "lengths are floats": ("lengths", {"lengths": ((3,), np.float32)}),
    "out has other columns": ("out", {"out": ((3, 7), np.int32)}),
    "out is unsigned": ("out", {"out": ((3, 6), np.uint32)}),
}


@pytest.mark.parametrize("name", SELECT)
def test_select_topk(name, xp):
    argument, changed = SELECT[name]
    given = {"scores": ((3, 12), np.float32), "lengths": ((3,), np.uint32), "k": 6} | changed
    for key, value in given.items():
        if isinstance(value, tuple):  # shape and dtype
            given[key] = xp.full(value[0], 7, value[1])
    with pytest.raises(EITHER) as caught:
        select_topk(**given)
    assert_helpful(caught.value, argument)
    if "out" in given:
        assert (host(given["out"]) == 7).all()


def test_select_topk_strided(xp):
    scores = xp.zeros((3, 24), np.float32)[:, ::2]
    with pytest.raises(ValueError, match=r"scores must .*contiguous.* got"):
        select_topk(scores, None, 2)
