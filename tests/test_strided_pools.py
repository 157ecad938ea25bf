"""Pools whose blocks and layers have free strides: the same bits as from a contiguous copy."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from generators import Spec
from properties import check_case, message_of, same_bits, sanitized

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_topk
from mla_fp8._check.problem import _alignment_of

SPECS = {
    "decode": Spec((1, 1, 2), (300, 64, 63), num_heads=32, values="wide"),
    "prefill": Spec((130, 0, 7), (5, 9, 250), num_heads=16, depth=64, num_layers=2, layer=1),
    "page size 1": Spec((3, 20), (70, 5), num_heads=16, depth=64, page_size=1),
    "page size 24": Spec((1, 30), (70, 5), num_heads=64, page_size=24, num_layers=3, layer=2),
    "granules": Spec((3, 4), (70, 100), num_heads=12, granularity=32, page_size=16),
    "two kv heads": Spec((3, 4), (70, 100), num_heads=8, kv_heads=2, depth=32, num_layers=2),
    "depth 256": Spec((3, 4), (70, 100), num_heads=4, depth=256, values="nan_codes"),
}
SMALL = ["decode", "prefill", "granules"]  # each kernel of scores
# Bytes between blocks and between layers, in the pool of values, and where the first page begins.
GAPS = {
    "16 bytes": (16, 0, 0),
    "layers too": (48, 32, 16),
    "4 bytes": (4, 0, 0),
    "4 bytes in layers": (0, 4, 0),
    "8 bytes at the start": (0, 0, 8),
    "1 byte": (1, 0, 0),
    "odd": (3, 5, 7),
}


def _bytes(array) -> np.ndarray:
    """A host pool as uint8 [num_blocks, num_layers, bytes of a page]."""
    blocks, _, layers, *_ = array.shape
    page = int(np.prod(array.shape[3:])) * array.itemsize
    return np.ascontiguousarray(array).view(np.uint8).reshape(blocks, layers, page)


def placed(xp, array, *, gap=0, layer_gap=0, start=0, layers_first=False, backwards=False):
    """A host pool in a new buffer of ``xp`` with room between pages, which holds garbage."""
    pages = _bytes(array)
    blocks, layers, page = pages.shape
    inner = blocks * (page + gap) + layer_gap if layers_first else page + layer_gap
    outer = page + gap if layers_first else layers * inner + gap
    strides = (outer, inner)  # of blocks and layers
    size = start + (blocks - 1) * outer + (layers - 1) * inner + page
    buffer = np.full(size + 64, 0x5A, np.uint8)
    view = np.lib.stride_tricks.as_strided(buffer[start:], pages.shape, (*strides, 1))
    view[...] = pages[::-1] if backwards else pages
    there = xp.asarray(buffer)
    dtype = array.dtype if xp is np or array.dtype.itemsize > 1 else np.dtype(np.uint8)
    base = there[start : start + (size - start) // dtype.itemsize * dtype.itemsize].view(dtype)
    tail = np.cumprod([1, *array.shape[:3:-1]])[::-1] * dtype.itemsize
    found = xp.lib.stride_tricks.as_strided(
        base, array.shape, (outer, outer, inner, *map(int, tail))
    )
    return found[::-1] if backwards else found


def fused(xp, case):
    """The two pools in one buffer: the values of a page, then its scales."""
    values, scales = _bytes(case.k_blocks), _bytes(case.k_scales)
    buffer = xp.asarray(np.concatenate([values, scales], axis=2))
    page = buffer.shape[2]
    shapes, views = (case.k_blocks.shape, case.k_scales.shape), []
    flat = buffer.reshape(-1)
    for dtype, shape, first in zip(
        (case.k_blocks.dtype if xp is np else np.uint8, np.float32),
        shapes,
        (0, values.shape[2]),
        strict=True,
    ):
        dtype = np.dtype(dtype)
        last = (flat.size - first) // dtype.itemsize * dtype.itemsize
        base = flat[first : first + last].view(dtype)
        tail = np.cumprod([1, *shape[:3:-1]])[::-1] * dtype.itemsize
        strides = (page * shape[2], page * shape[2], page, *map(int, tail))
        views.append(xp.lib.stride_tricks.as_strided(base, shape, strides))
    return views


def _assert_same(case, xp, k_blocks, k_scales):
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp)
    there = here.replace(k_blocks=k_blocks, k_scales=k_scales)
    assert same_bits(op.scores(*there.args), op.scores(*here.args))
    for options in ({"return_scores": True}, {"sort": "score", "return_scores": True}):
        for ours, theirs in zip(op(*there.args, **options), op(*here.args, **options), strict=True):
            assert same_bits(ours, theirs)
    assert same_bits(op(*there.args), op(*here.args))


@pytest.mark.parametrize(
    ("name", "gaps"), sanitized(product(SPECS, GAPS), [*product(SMALL, ["4 bytes", "odd"])])
)
def test_gaps(name, gaps, xp):
    case, (gap, layer_gap, start) = SPECS[name].build(), GAPS[gaps]
    k_blocks = placed(xp, case.k_blocks, gap=gap, layer_gap=layer_gap, start=start)
    k_scales = placed(xp, case.k_scales, gap=4 * gap, layer_gap=4 * layer_gap, start=4 * start)
    _assert_same(case, xp, k_blocks, k_scales)


@pytest.mark.parametrize("name", SPECS)
def test_layers_before_blocks_and_backwards(name, xp):
    case = SPECS[name].build()
    for options in ({"layers_first": True}, {"backwards": True}):
        k_blocks = placed(xp, case.k_blocks, **options)
        _assert_same(case, xp, k_blocks, placed(xp, case.k_scales, **options))


@pytest.mark.parametrize("name", SPECS)
def test_the_fused_page(name, xp):
    case = SPECS[name].build()
    _assert_same(case, xp, *fused(xp, case))


@pytest.mark.parametrize("page_size", [1, 8, 64, 128])
def test_the_fused_page_against_the_oracle(page_size, xp):
    case = Spec((2, 40), (90, 130), num_heads=8, page_size=page_size).build()
    if xp is np:
        k_blocks, k_scales = fused(np, case)
        check_case(case.replace(k_blocks=k_blocks, k_scales=k_scales), np)
    else:
        _assert_same(case, xp, *fused(xp, case))


def test_one_block_may_have_any_stride(xp):
    case = Spec((3,), (20,), num_heads=8, page_size=64).build()
    first = int(case.k_lookup_table[0, 0])
    one = case.replace(
        k_blocks=case.k_blocks[first : first + 1],
        k_scales=case.k_scales[first : first + 1],
        k_lookup_table=np.zeros_like(case.k_lookup_table),
    )
    k_blocks = placed(xp, case.k_blocks, gap=7)[first : first + 1]
    _assert_same(one, xp, k_blocks, one.to(xp).k_scales)


def test_output_may_lie_between_the_pages(xp):
    case = Spec((2,), (70,), num_heads=8, k=4).build()
    here = case.to(xp)
    room = 4 * 2 * case.spec.k
    k_blocks = placed(xp, case.k_blocks, gap=room)
    page = _bytes(case.k_blocks).shape[2]
    strides = (k_blocks.strides[0], 1)
    behind = xp.lib.stride_tricks.as_strided(k_blocks, (len(case.k_blocks), page + room), strides)
    out = behind.view(np.uint8)[0, page:].view(np.int32).reshape(2, case.spec.k)
    there = here.replace(k_blocks=k_blocks)
    assert index_topk(*there.args, k=case.spec.k, out=out) is out
    assert same_bits(out, index_topk(*here.args, k=case.spec.k))
    inside = behind.view(np.uint8)[0, :room].view(np.int32).reshape(2, case.spec.k)
    text = message_of(lambda: index_topk(*there.args, k=case.spec.k, out=inside))
    assert text.startswith("out must not overlap k_blocks")


@pytest.mark.parametrize("name", ["k_blocks", "k_scales"])
def test_the_last_three_axes_are_contiguous(name, xp):
    case = Spec((2,), (70,), num_heads=8, page_size=8, granularity=32).build()
    here = case.to(xp)
    pool = getattr(here, name)
    for view in (pool[:, :, :, ::-1], pool.swapaxes(3, 5).copy().swapaxes(3, 5)):
        text = message_of(lambda view=view: index_topk(*here.replace(**{name: view}).args, k=4))
        assert text.startswith(f"{name} must be contiguous in its last three axes; got strides")


@pytest.mark.gpu
def test_scales_are_aligned(cupy):
    case = Spec((2,), (70,), num_heads=8).build()
    here = case.to(cupy)
    k_scales = placed(cupy, case.k_scales, gap=4).view(cupy.uint8)
    k_scales = cupy.lib.stride_tricks.as_strided(
        k_scales.view(cupy.float32), case.k_scales.shape, (258, 258, 258, 4, 4, 4)
    )
    text = message_of(lambda: index_topk(*here.replace(k_scales=k_scales).args, k=4))
    assert text.startswith("k_scales must have strides that are multiples of 4 bytes")


def test_outputs_in_jax_are_refused():
    """They are immutable, but on a GPU nothing else would say so."""
    case = Spec((3,), (20,), num_heads=8).build()
    out = type("Array", (), {"__module__": "jaxlib._jax"})()
    with pytest.raises(TypeError, match=r"^out must be writable; got a JAX array"):
        index_topk(*case.args, k=4, out=out)


def test_blocks_may_share_bytes(xp):
    """The tensor memory accelerator is not made for it, so threads copy the keys."""
    case = Spec((3, 40), (200, 70), num_heads=8, page_size=64).build()
    page = case.k_blocks[0]
    dense = case.replace(k_blocks=np.ascontiguousarray(np.broadcast_to(page, case.k_blocks.shape)))
    one = dense.to(xp).k_blocks[:1]
    _assert_same(dense, xp, xp.broadcast_to(one, case.k_blocks.shape), case.to(xp).k_scales)


@pytest.mark.parametrize(
    ("strides", "alignment"),
    [
        ((8192,), 16),
        ((8448,), 16),
        ((8196,), 4),
        ((8193,), 1),
        ((-8192,), 4),
        ((0,), 4),
        ((16,), 4),
    ],
)
def test_alignment_of_keys_by_the_stride_of_blocks(strides, alignment):
    """Of an array in GPU memory, as far as it is looked at."""
    flags, data = SimpleNamespace(c_contiguous=False), SimpleNamespace(ptr=4096)
    pool = SimpleNamespace(
        flags=flags, data=data, shape=(5, 1, 1, 64, 1, 128), strides=(*strides, 0, 0), itemsize=1
    )
    assert _alignment_of(pool) == alignment
