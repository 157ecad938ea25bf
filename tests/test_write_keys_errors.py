"""write_keys refuses what it cannot write correctly, before it writes anything."""

import numpy as np
import pytest
from properties import host
from quantised import CANARY, make_pool, view_of

from mla_fp8 import write_keys


def _arguments(xp, **changes):
    """A right call for two sequences with two pages of four tokens, and changes to it."""
    pool = make_pool(xp, "contiguous", 4, 2, 4, 1, 64, 2)
    arguments = {
        "keys": xp.ones((3, 1, 64), np.float32),
        "k_blocks": pool.k_blocks,
        "k_scales": pool.k_scales,
        "layer_idx": 1,
        "slots": xp.arange(3),
    }
    return arguments | changes, pool.buffer


def _by_position(xp, **changes):
    """The same call by sequence and position."""
    given = {
        "slots": None,
        "sequences": xp.zeros(3, np.int32),
        "positions": xp.arange(3, dtype=np.int32),
        "k_lookup_table": xp.zeros((2, 2), np.uint32),
    }
    return given | changes


def _strided(xp, strides, shape=(4, 1, 2, 4, 1, 64)):
    return view_of(xp, xp.zeros(1 << 14, np.uint8), 4096, np.uint8, shape, strides)


ERRORS = {
    "no place": (lambda xp: {"slots": None}, TypeError, "slots must be given"),
    "two places": (
        lambda xp: {**_by_position(xp), "slots": xp.arange(3)},
        TypeError,
        "got slots, sequences",
    ),
    "no positions": (lambda xp: _by_position(xp, positions=None), TypeError, "slots must be"),
    "no table": (lambda xp: _by_position(xp, k_lookup_table=None), TypeError, "slots must be"),
    "slots float": (lambda xp: {"slots": xp.zeros(3, np.float32)}, ValueError, "slots must be"),
    "slots uint32": (lambda xp: {"slots": xp.zeros(3, np.uint32)}, ValueError, "got uint32"),
    "slots too few": (lambda xp: {"slots": xp.arange(2)}, ValueError, "slots must be"),
    "slots strided": (lambda xp: {"slots": xp.arange(6)[::2]}, ValueError, "slots must be C-con"),
    "slots list": (lambda xp: {"slots": [0, 1, 2]}, TypeError, "slots must be"),
    "sequences": (
        lambda xp: _by_position(xp, sequences=xp.zeros(2, np.int32)),
        ValueError,
        "sequences must be",
    ),
    "positions": (
        lambda xp: _by_position(xp, positions=xp.zeros((3, 1), np.int32)),
        ValueError,
        "positions must be",
    ),
    "table": (
        lambda xp: _by_position(xp, k_lookup_table=xp.zeros(2, np.uint32)),
        ValueError,
        "k_lookup_table must be",
    ),
    "table int64": (
        lambda xp: _by_position(xp, k_lookup_table=xp.zeros((2, 2), np.int64)),
        ValueError,
        "k_lookup_table must be",
    ),
    "keys float64": (lambda xp: {"keys": xp.ones((3, 1, 64))}, ValueError, "keys must be bfloat16"),
    "keys int": (lambda xp: {"keys": xp.ones((3, 64), np.int32)}, ValueError, "keys must be"),
    "keys depth": (lambda xp: {"keys": xp.ones((3, 32), np.float32)}, ValueError, "keys must be"),
    "keys heads": (
        lambda xp: {"keys": xp.ones((3, 2, 64), np.float32)},
        ValueError,
        r"keys must be \[tokens, 1, 64\] or \[tokens, 64\]",
    ),
    "keys strided": (
        lambda xp: {"keys": xp.ones((3, 128), np.float32)[:, ::2]},
        ValueError,
        "keys must be C-contiguous",
    ),
    "k_blocks int8": (
        lambda xp: {"k_blocks": xp.zeros((4, 1, 2, 4, 1, 64), np.int8)},
        ValueError,
        "k_blocks must be",
    ),
    "k_blocks axes": (
        lambda xp: {"k_blocks": xp.zeros((4, 2, 4, 1, 64), np.uint8)},
        ValueError,
        "k_blocks must be",
    ),
    "depth": (
        lambda xp: {"k_blocks": xp.zeros((4, 1, 2, 4, 1, 48), np.uint8)},
        ValueError,
        "k_blocks must have",
    ),
    "k_scales groups": (
        lambda xp: {"k_scales": xp.zeros((4, 1, 2, 4, 1, 4), np.float32)},
        ValueError,
        "k_scales must have 1 or 2 scales",
    ),
    "k_scales blocks": (
        lambda xp: {"k_scales": xp.zeros((5, 1, 2, 4, 1, 2), np.float32)},
        ValueError,
        "k_scales must be",
    ),
    "k_scales float16": (
        lambda xp: {"k_scales": xp.zeros((4, 1, 2, 4, 1, 2), np.float16)},
        ValueError,
        "k_scales must be float32",
    ),
    "layer": (lambda xp: {"layer_idx": 2}, ValueError, "layer_idx must be"),
    "layer float": (lambda xp: {"layer_idx": 1.0}, TypeError, "layer_idx must be"),
    "power_of_two": (lambda xp: {"power_of_two": 1}, TypeError, "power_of_two must be"),
    "page not contiguous": (
        lambda xp: {"k_blocks": _strided(xp, (1024, 0, 512, 128, 64, 2))},
        ValueError,
        "k_blocks must be contiguous in its last three axes",
    ),
    "blocks overlap": (
        lambda xp: {"k_blocks": _strided(xp, (511, 0, 256, 64, 64, 1))},
        ValueError,
        "k_blocks must have pages that do not overlap",
    ),
    "blocks broadcast": (
        lambda xp: {"k_blocks": _strided(xp, (0, 0, 256, 64, 64, 1))},
        ValueError,
        "k_blocks must have pages",
    ),
    "layers overlap": (
        lambda xp: {"k_blocks": _strided(xp, (512, 0, 255, 64, 64, 1))},
        ValueError,
        "k_blocks must have pages",
    ),
    "a page between others": (
        lambda xp: {"k_blocks": _strided(xp, (600, 0, 1000, 64, 64, 1))},
        ValueError,
        "k_blocks must have pages",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case, xp):
    changes, error, words = ERRORS[case]
    arguments, buffer = _arguments(xp, **changes(xp))
    with pytest.raises(error, match=words):
        write_keys(**arguments)
    assert (host(buffer) == CANARY).all(), "something was written"


def test_strides_that_interleave_blocks_and_layers_are_legal(xp):
    """No two pages overlap, although neither axis lies within a step of the other."""
    arguments, _ = _arguments(
        xp, k_blocks=_strided(xp, (600, 0, 1500, 64, 64, 1), (4, 1, 2, 4, 1, 64))
    )
    write_keys(**arguments)


def test_pools_of_one_buffer_must_share_no_byte(xp):
    form = ("fused", 3, 2, 4, 1, 64, 1)
    pool = make_pool(xp, *form)
    keys, slots = xp.ones((1, 64), np.float32), xp.zeros(1, np.int32)
    write_keys(keys, pool.k_blocks, pool.k_scales, slots=slots)
    for offset in (-4, 4):  # into the values of this page, and of the next
        moved = view_of(
            xp,
            pool.buffer,
            4 * 64 + offset,
            np.float32,
            pool.k_scales.shape,
            pool.k_scales.strides,
        )
        with pytest.raises(ValueError, match="k_scales must not overlap k_blocks"):
            write_keys(keys, pool.k_blocks, moved, slots=slots)


@pytest.mark.parametrize("pool_name", ["k_blocks", "k_scales"])
def test_inputs_must_not_overlap_the_pool(pool_name, xp):
    arguments, buffer = _arguments(xp)
    array = arguments[pool_name]
    start = 0 if pool_name == "k_blocks" else 4 * 2 * 4 * 64
    arguments["slots"] = view_of(xp, buffer, start, np.int64, (3,), (8,))
    with pytest.raises(ValueError, match=f"{pool_name} must not overlap slots"):
        write_keys(**arguments)
    assert array is arguments[pool_name]
    if pool_name == "k_blocks":
        arguments, buffer = _arguments(xp)
        arguments["keys"] = view_of(xp, buffer, 256, np.float32, (3, 64), (256, 4))
        with pytest.raises(ValueError, match="k_blocks must not overlap keys"):
            write_keys(**arguments)


@pytest.mark.parametrize("name", ["k_blocks", "k_scales"])
def test_read_only_pools_are_refused(name):
    arguments, buffer = _arguments(np)
    arguments[name].flags.writeable = False
    with pytest.raises(ValueError, match=f"{name} must be writable"):
        write_keys(**arguments)
    assert (buffer == CANARY).all()


@pytest.mark.parametrize("name", ["k_blocks", "k_scales"])
def test_arrays_of_jax_are_refused(name):
    array = type("Array", (), {"__module__": "jaxlib._jax"})()
    arguments, _ = _arguments(np, **{name: array})
    with pytest.raises(TypeError, match=f"{name} must be writable; got a JAX array"):
        write_keys(**arguments)


def test_too_many_slots_are_refused():
    """The pool is a view of one byte per block: nothing so large is allocated."""
    array = np.lib.stride_tricks.as_strided
    table = np.zeros((1, 2**21), np.uint32)
    arguments, _ = _arguments(np, **_by_position(np, k_lookup_table=table))
    arguments["k_blocks"] = array(np.zeros(64, np.uint8), (1, 1, 1, 2**11, 1, 64), (0,) * 5 + (1,))
    arguments["k_scales"] = array(np.zeros(4, np.float32), (1, 1, 1, 2**11, 1, 1), (0,) * 6)
    with pytest.raises(ValueError, match=r"pages_per_seq \* page_size <= 2147483648"):
        write_keys(**arguments)
    arguments["k_blocks"] = array(np.zeros(64, np.uint8), (2**21, 1, 1, 2**11, 1, 64), (0,) * 6)
    arguments["k_scales"] = array(np.zeros(4, np.float32), (2**21, 1, 1, 2**11, 1, 1), (0,) * 6)
    arguments = {**arguments, **dict.fromkeys(("sequences", "positions", "k_lookup_table"))}
    with pytest.raises(ValueError, match=r"num_blocks \* page_size <= 2147483648"):
        write_keys(**{**arguments, "slots": np.arange(3)})
