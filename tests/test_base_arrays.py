"""Masked arrays are refused, other subclasses read as their base array, by every function."""

import numpy as np
import pytest
from generators import ARGUMENTS, TINY, tiny_arguments
from properties import POISON, assert_helpful, message_of, same_bits

from mla_fp8 import (
    MLAIndexerRaggedFloat8Paged,
    PagedKeyCache,
    fp8,
    index_scores,
    index_topk,
    select_topk,
)


class Odd(np.ndarray):
    """Every operator of it is wrong."""

    def _refuse(self, *_, **__):
        raise AssertionError("an operator of a subclass was called")

    __add__ = __radd__ = __mul__ = __sub__ = __getitem__ = __array_ufunc__ = _refuse
    view = astype = reshape = max = clip = tolist = _refuse


def _odd(array):
    return np.ndarray.view(np.asarray(array), Odd)


@pytest.mark.parametrize("mask", [np.ma.nomask, True])
@pytest.mark.parametrize("name", ARGUMENTS[:-1])
def test_masked_arguments_are_refused(name, mask):
    array = np.ma.array(getattr(TINY.build(), name), mask=mask)
    found = message_of(lambda: index_topk(*tiny_arguments(**{name: array}), k=6))
    assert_helpful(TypeError(found), name, "MaskedArray")


def test_masked_arrays_are_refused_everywhere():
    args, masked = tiny_arguments(), np.ma.array
    op = MLAIndexerRaggedFloat8Paged(**TINY.build().params)
    scores = np.zeros((3, 9), np.float32)
    lengths = np.zeros(3, np.int32)
    out, values = np.full((3, 6), POISON, np.int32), np.zeros((3, 6), np.float32)
    codes, scales = fp8.quantize(np.ones((3, 64), np.float32))
    for name, call in (
        ("out", lambda: op(*args, out=masked(out))),
        ("out[1]", lambda: op(*args, out=(out, masked(values)), return_scores=True)),
        ("output_indices", lambda: op.execute(masked(out), *args)),
        ("workspace", lambda: op(*args, workspace=masked(np.zeros(9, np.uint8)))),
        ("out", lambda: index_scores(*args, out=masked(np.zeros((3, 11), np.float32)))),
        ("scores", lambda: select_topk(masked(scores), None, 6)),
        ("lengths", lambda: select_topk(scores, masked(lengths), 6)),
        ("out", lambda: select_topk(scores, lengths, 6, out=masked(out))),
        ("x", lambda: fp8.encode(masked(scores))),
        ("x", lambda: fp8.quantize(masked(scores))),
        ("values", lambda: fp8.decode(masked(codes.view(np.uint8)))),
        ("scales", lambda: fp8.dequantize(codes, masked(scales))),
        ("keys[0]", lambda: PagedKeyCache.from_dense([masked(np.ones((3, 64)))])),
    ):
        assert message_of(call).startswith(f"{name} must be an array without a mask; got")
    assert (out == POISON).all()


def test_subclasses_are_read_as_their_base_array():
    case = TINY.build()
    want = index_topk(*case.args, k=6, return_scores=True)
    odd = case.replace(**{name: _odd(getattr(case, name)) for name in ARGUMENTS[:-1]})
    out = _odd(np.zeros((3, 6), np.int32)), _odd(np.zeros((3, 6), np.float32))
    found = index_topk(*odd.args, k=6, out=out, return_scores=True)
    assert found is out
    assert all(same_bits(np.asarray(a), b) for a, b in zip(out, want, strict=True))
    assert [type(array) for array in index_topk(*odd.args, k=6, return_scores=True)] == [
        np.ndarray,
        np.ndarray,
    ]
    dense = index_scores(*case.args)
    assert same_bits(index_scores(*odd.args), dense)
    lengths = np.array([7, 8, 3], np.int32)
    assert same_bits(select_topk(_odd(dense), _odd(lengths), 3), select_topk(dense, lengths, 3))


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [np.matrix, _odd])
def test_numbers_of_subclasses(kind):
    x = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    values, scales = fp8.quantize(x, 32)
    for mine, theirs in zip(fp8.quantize(kind(x), 32), (values, scales), strict=True):
        assert type(mine) is np.ndarray
        assert same_bits(mine, theirs)
    assert same_bits(fp8.encode(kind(x)), fp8.encode(x))
    assert same_bits(fp8.dequantize(values, kind(scales)), fp8.dequantize(values, scales))
    cache = PagedKeyCache.from_dense([kind(x)])
    assert same_bits(cache.k_scales, PagedKeyCache.from_dense([x]).k_scales)
    assert type(cache.k_scales) is np.ndarray


@pytest.mark.gpu
def test_subclasses_of_cupy(cupy):
    class Sub(cupy.ndarray):
        def __getitem__(self, key):
            raise AssertionError("an operator of a subclass was called")

    here = TINY.build().to(cupy)
    sub = here.replace(
        **{n: getattr(here, n).view(Sub) for n in ARGUMENTS[:-1] if n != "k_max_lengths"}
    )
    out = cupy.full((3, 6), POISON, np.int32).view(Sub)
    want = index_topk(*here.args, k=6)
    found = index_topk(*sub.args, k=6, check=True)
    assert type(found) is cupy.ndarray
    assert same_bits(found, want)
    assert index_topk(*sub.args, k=6, out=out) is out
    assert same_bits(out, want)
