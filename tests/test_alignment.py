"""Arrays that do not start on a multiple of their item size: refused on a GPU, read by NumPy."""

from types import SimpleNamespace

import numpy as np
import pytest
from generators import ARGUMENTS, Spec
from properties import POISON, assert_helpful, host, same_bits

from mla_fp8 import PagedKeyCache, fp8, index_scores, index_topk, select_topk
from mla_fp8._check.arrays import check_aligned, check_contiguous, check_start

SPEC = Spec((3, 1), (40, 90), num_heads=4, depth=64, page_size=16, k=20)
WORDS = [n for n in ARGUMENTS[:-1] if n not in ("q", "k_blocks")]  # of four bytes


def _shifted(xp, array, by: int):
    """The same values so many bytes past an aligned address."""
    buffer = xp.zeros(array.nbytes + 16, np.uint8)
    buffer[by : by + array.nbytes] = xp.ascontiguousarray(array).view(np.uint8).ravel()
    return buffer[by : by + array.nbytes].view(array.dtype).reshape(array.shape)


def _on_device(address: int, dtype, strides=(4,)):
    """What is looked at of a GPU array."""
    dtype = np.dtype(dtype)
    return SimpleNamespace(
        flags=SimpleNamespace(c_contiguous=True),
        data=SimpleNamespace(ptr=address),
        dtype=dtype,
        itemsize=dtype.itemsize,
        strides=strides,
        shape=(1,),
    )


@pytest.mark.parametrize("check", [check_contiguous, check_start])
@pytest.mark.parametrize(
    ("dtype", "multiple", "wrong"),
    [(np.float32, 0, 1), (np.uint32, 0, 2), (np.int32, 0, 3), (np.uint8, 16, 8)],
)
def test_addresses(dtype, multiple, wrong, check):
    needed = multiple or 4
    check("qs", _on_device(0x7000, dtype), multiple)
    check("qs", _on_device(0x7000 + needed, dtype), multiple)
    message = f"qs must start at a multiple of {needed} bytes; got address {0x7000 + wrong:#x}"
    with pytest.raises(ValueError, match=message):
        check("qs", _on_device(0x7000 + wrong, dtype), multiple)


def test_strides():
    with pytest.raises(ValueError, match=r"x must have strides that .* 4 bytes; got \(133, 4\)"):
        check_aligned("x", _on_device(0x7000, np.float32, (133, 4)))


@pytest.mark.parametrize("by", [1, 2, 3])
def test_numpy_arrays_may_start_anywhere(by):
    case = SPEC.build()
    want = index_topk(*case.args, k=20, return_scores=True)
    changed = {name: _shifted(np, getattr(case, name), by) for name in ARGUMENTS[:-1]}
    out = _shifted(np, want[0], by), _shifted(np, want[1], by)
    index_topk(*case.replace(**changed).args, k=20, out=out, return_scores=True)
    assert same_bits(out[0], want[0])
    assert same_bits(out[1], want[1])
    scores = _shifted(np, index_scores(*case.args), by)
    assert same_bits(select_topk(scores, None, 5), select_topk(scores.copy(), None, 5))


def _refused(name: str, call, *outputs) -> None:
    before = [host(out).copy() for out in outputs]
    with pytest.raises(ValueError, match="must start at a multiple of 4 bytes") as caught:
        call()
    assert_helpful(caught.value, name, "0x")
    for out, was in zip(outputs, before, strict=True):
        assert same_bits(out, was)


@pytest.mark.gpu
@pytest.mark.parametrize("by", [1, 2])
@pytest.mark.parametrize("name", WORDS)
def test_inputs_on_a_gpu(name, by, cupy):
    here = SPEC.build().to(cupy, device_max_lengths=True)
    want = index_topk(*here.args, k=20)
    shifted = here.replace(**{name: _shifted(cupy, getattr(here, name), by)})
    out = cupy.full((here.tokens, 20), POISON, np.int32)
    _refused(name, lambda: index_topk(*shifted.args, k=20, out=out), out)
    _refused(name, lambda: index_scores(*shifted.args))
    assert same_bits(index_topk(*here.args, k=20), want)  # the context lives


@pytest.mark.gpu
def test_totals_on_a_gpu(cupy):
    here = SPEC.build().to(cupy)
    totals = _shifted(cupy, here.k_cache_lengths + np.uint32(1), 2)
    bare = here.replace(k_cache_lengths=None).args
    _refused("k_total_lengths", lambda: index_topk(*bare, k=5, k_total_lengths=totals))


@pytest.mark.gpu
@pytest.mark.parametrize("which", [0, 1])
def test_outputs_on_a_gpu(which, cupy):
    here = SPEC.build().to(cupy)
    out = [cupy.full((here.tokens, 20), POISON, dtype) for dtype in (np.int32, np.float32)]
    out[which] = _shifted(cupy, out[which], 2)
    call = lambda: index_topk(*here.args, k=20, out=tuple(out), return_scores=True)  # noqa: E731
    _refused(rf"out\[{which}\]|out", call, *out)
    if which == 0:
        _refused("out", lambda: index_topk(*here.args, k=20, out=out[0]), *out)
    else:
        dense = index_scores(*here.args)
        odd = _shifted(cupy, dense, 2)
        _refused("out", lambda: index_scores(*here.args, out=odd), odd)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["scores", "lengths", "out"])
def test_selection_on_a_gpu(name, cupy):
    rng = np.random.default_rng(0)
    given = {
        "scores": cupy.asarray(rng.random((3, 50), np.float32)),
        "lengths": cupy.asarray(np.array([50, 3, 0], np.int32)),
        "out": cupy.full((3, 7), POISON, np.int32),
    }
    want = select_topk(given["scores"], given["lengths"], 7)
    changed = given | {name: _shifted(cupy, given[name], 2)}
    _refused(name, lambda: select_topk(k=7, **changed), changed["out"])
    assert same_bits(select_topk(given["scores"], given["lengths"], 7), want)


@pytest.mark.gpu
def test_numbers_and_keys_on_a_gpu(cupy):
    x = _shifted(cupy, cupy.ones((4, 64), np.float32), 2)
    values, scales = fp8.quantize(cupy.ones((4, 64), np.float32))
    _refused("x", lambda: fp8.quantize(x))
    _refused("x", lambda: fp8.encode(x))
    _refused("scales", lambda: fp8.dequantize(values, _shifted(cupy, scales, 2)))
    _refused(r"keys\[0\]|keys", lambda: PagedKeyCache.from_dense([x]))
    halves = _shifted(cupy, cupy.ones((4, 64), np.float16), 2)
    assert same_bits(fp8.quantize(halves)[0], values)  # on two bytes, and no more are needed
