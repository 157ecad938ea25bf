"""PagedKeyCache: fused pages, sequences that come and go, and what each argument refuses."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from properties import host, same_bits, sanitized

from mla_fp8 import (
    CacheFull,
    MLAIndexerRaggedFloat8Paged,
    PagedKeyCache,
    fp8,
)
from mla_fp8._backend import backend_of
from mla_fp8.cli.fuzz_data import encode

POISON = 0x5A


def _keys(lengths, depth=64, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, depth), dtype=np.float32) for n in lengths]


def _on(xp, keys):
    return [xp.asarray(key) for key in keys]


def _dense(keys, power_of_two=False):
    return fp8.dequantize(*fp8.quantize(keys, power_of_two=power_of_two))[:, None]


# ---- fused pages


def _buffer(xp, form, blocks, page_size, depth):
    """Poisoned memory, and pages in it: a caller's buffer."""
    size = page_size * (depth + 4)
    apart = 32 if form == "bytes between" else 0
    memory = xp.full((blocks, size + apart), POISON, np.uint8)
    shapes = {
        "page, row, head, byte": (blocks, page_size, 1, depth + 4),
        "page, row, byte": (blocks, page_size, depth + 4),
    }
    return memory, memory[:, :size].reshape(shapes.get(form, (blocks, size)))


FORMS = ["page, row, head, byte", "page, row, byte", "page, byte", "bytes between"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("page_size", "depth", "power_of_two"), [(64, 128, True), (3, 32, False)])
def test_fused_pages_hold_values_then_scales(form, page_size, depth, power_of_two, xp):
    """Byte for byte; the rest of the caller's memory stays as it was."""
    memory, buffer = _buffer(xp, form, 6, page_size, depth)
    options = {"page_size": page_size, "power_of_two": power_of_two}
    cache = PagedKeyCache.from_fused(buffer, batch=2, **options)
    assert (host(memory) == POISON).all()
    assert cache.k_blocks.shape == (6, 1, 1, page_size, 1, depth)
    assert cache.k_scales.shape == (6, 1, 1, page_size, 1, 1)
    assert (cache.num_blocks, cache.free_blocks, cache.granularity) == (6, 6, depth)
    keys = _keys((page_size + 1, 2 * page_size), depth)
    cache.append(_on(xp, keys))
    want = np.full(memory.shape, POISON, np.uint8)
    for key, pages in zip(keys, host(cache.k_lookup_table), strict=True):
        codes, scales = fp8.quantize(key, power_of_two=power_of_two)
        for first, page in zip(range(0, len(key), page_size), pages, strict=True):
            some = slice(first, first + page_size)
            values = codes[some].view(np.uint8).ravel()
            want[page, : values.size] = values
            begin, floats = page_size * depth, scales[some].ravel().view(np.uint8)
            want[page, begin : begin + floats.size] = floats
    np.testing.assert_array_equal(host(memory), want)
    for b, key in enumerate(keys):
        assert same_bits(cache.gather(b), _dense(key, power_of_two))
    memory[...] = 0  # no copy anywhere: the cache sees it
    assert not host(cache.k_blocks).view(np.uint8).any()
    assert not host(cache.k_scales).any()


def test_a_new_cache_in_fused_pages(xp):
    keys = _keys((70, 3))
    cache = PagedKeyCache.from_dense(_on(xp, keys), page_size=8, layout="fused")
    assert cache.buffer.shape == (10, 8, 1, 68)
    cache.append(_on(xp, [key[:9] for key in keys]))
    assert cache.buffer.shape == (20, 8, 1, 68)
    other = PagedKeyCache.from_fused(cache.buffer.copy(), page_size=8, batch=2)
    other.append(_on(xp, [np.concatenate([key, key[:9]]) for key in keys]))
    for b, key in enumerate(keys):
        want = _dense(np.concatenate([key, key[:9]]))
        assert same_bits(cache.gather(b), want)
        assert same_bits(other.gather(b), want)
    assert PagedKeyCache.from_dense(_on(xp, keys)).buffer is None


@pytest.mark.parametrize(("page_size", "depth"), sanitized([(64, 128), (3, 64)], [(3, 64)]))
def test_the_operation_on_fused_pages(page_size, depth, xp):
    """The same bits as on split pages, after a fork and for chosen sequences too."""
    rng = np.random.default_rng(3)
    heads, keys = 8, _keys((150, 30), depth)
    q = xp.asarray(encode(rng.standard_normal((3, heads, depth))))
    qs = xp.asarray(rng.standard_normal((3, heads)).astype(np.float32))
    op = MLAIndexerRaggedFloat8Paged(heads, depth, k=20)
    found = []
    for layout in ("split", "fused"):
        cache = PagedKeyCache.from_dense(_on(xp, keys), page_size=page_size, layout=layout)
        assert cache.fork(0) == 2
        new = _on(xp, _keys((1, 2), depth, seed=1))
        cache.append(new, sequences=[2, 1])
        offsets, view = cache.row_offsets([2, 1]), cache.view(sequences=[2, 1])
        found.append(op(q, qs, offsets, *view, return_scores=True))
    assert all(map(same_bits, *found))


def test_a_buffer_of_torch():
    torch = pytest.importorskip("torch")
    buffer = torch.full((4, 64, 1, 132), POISON, dtype=torch.uint8)
    cache = PagedKeyCache.from_fused(buffer, page_size=64, batch=1)
    cache.append(_keys((5,), 128))
    assert int((buffer != POISON).sum()) > 5 * 120
    assert (cache.buffer == buffer.numpy()).all()


@pytest.mark.parametrize(
    ("change", "exception", "names"),
    [
        (lambda b: {"buffer": b.astype(np.int8)}, ValueError, "buffer must be uint8 .*; got int8"),
        (lambda b: {"buffer": b[..., :67]}, ValueError, r"buffer must be .*\(3, 8, 1, 67\)"),
        (lambda b: {"buffer": b[:, :7]}, ValueError, "buffer must be uint8 .*page_size = 8"),
        (lambda b: {"buffer": b[:, :, 0, 0, None]}, ValueError, "buffer must be"),
        (lambda b: {"buffer": b.reshape(-1)}, ValueError, "buffer must be"),
        (lambda b: {"buffer": b.reshape(3, -1), "page_size": 7}, ValueError, "buffer must be"),
        (lambda b: {"buffer": b[0, 0, 0, 0]}, (TypeError, ValueError), "buffer must be"),
        (lambda b: {"buffer": b.tolist()}, TypeError, "buffer must be an array"),
        (lambda b: {"buffer": b[:, ::-1]}, ValueError, "buffer must have pages of 544 contiguous"),
        (lambda b: {"buffer": b[::-1]}, ValueError, "buffer must have pages .* do not overlap"),
        (lambda b: {"page_size": 0}, ValueError, "page_size must be an integer from 1"),
        (lambda b: {"page_size": 8.0}, TypeError, "page_size must be an integer from 1"),
        (lambda b: {"batch": -1}, ValueError, "batch must be an integer from 0"),
        (lambda b: {"power_of_two": 1}, TypeError, "power_of_two must be True or False"),
    ],
)
def test_wrong_buffers(change, exception, names, xp):
    buffer = xp.zeros((3, 8, 1, 68), np.uint8)
    with pytest.raises(exception, match=names):
        PagedKeyCache.from_fused(**({"buffer": buffer, "page_size": 8} | change(buffer)))


def test_buffers_that_cannot_be_written():
    buffer = np.zeros((3, 8, 1, 68), np.uint8)
    one = np.broadcast_to(buffer[:1], buffer.shape)
    with pytest.raises(ValueError, match=r"buffer must have pages .* do not overlap"):
        PagedKeyCache.from_fused(one, page_size=8)
    buffer.flags.writeable = False
    with pytest.raises(ValueError, match="buffer must be writable; got a read-only array"):
        PagedKeyCache.from_fused(buffer, page_size=8)
    jax = type("Array", (), {"__module__": "jaxlib._jax"})()
    with pytest.raises(TypeError, match="buffer must be writable; got a JAX array"):
        PagedKeyCache.from_fused(jax, page_size=8)


def test_numpy_buffers_need_no_alignment():
    memory = np.zeros(3 * 545 + 1, np.uint8)
    buffer = memory[1:].reshape(3, 545)[:, :544]
    cache = PagedKeyCache.from_fused(buffer, page_size=8, batch=1)
    (keys,) = _keys((20,))
    cache.append([keys])
    assert same_bits(cache.gather(0), _dense(keys))


@pytest.mark.gpu
def test_device_buffers_are_aligned(cupy):
    memory = cupy.zeros(3 * 546 + 2, np.uint8)
    with pytest.raises(ValueError, match="buffer must start at a multiple of 4 bytes"):
        PagedKeyCache.from_fused(memory[2 : 2 + 3 * 544].reshape(3, 544), page_size=8)
    with pytest.raises(ValueError, match="buffer must have pages at multiples of 4 bytes"):
        PagedKeyCache.from_fused(memory[: 3 * 546].reshape(3, 546)[:, :544], page_size=8)


# ---- a fixed pool, and errors half way


def test_a_full_cache_says_so_and_stays_as_it_was(xp):
    (keys,) = _keys((9,))
    with pytest.raises(CacheFull, match="the new tokens need 3 more blocks; 2 of 2 are free"):
        PagedKeyCache.from_dense(_on(xp, [keys]), page_size=4, num_blocks=2)
    cache = PagedKeyCache.from_dense(_on(xp, [keys]), page_size=4, num_blocks=4)
    blocks, scales = cache.k_blocks, cache.k_scales
    before = host(blocks).tobytes(), host(scales).tobytes(), repr(cache)
    for act in (
        lambda: cache.append(_on(xp, [keys[:8]])),
        lambda: cache.allocate([8]),
    ):
        with pytest.raises(MemoryError, match="the new tokens need 2 more blocks; 1 of 4 are free"):
            act()
        assert (host(blocks).tobytes(), host(scales).tobytes(), repr(cache)) == before
    cache.append(_on(xp, [keys[:7]]))
    assert same_bits(cache.gather(0), _dense(np.concatenate([keys, keys[:7]])))
    assert cache.free_blocks == 0
    error = pickle.loads(pickle.dumps(CacheFull("none left")))
    assert isinstance(error, CacheFull)


@pytest.mark.parametrize("shorter", [0, 1])
def test_a_failed_append_to_a_page_that_both_share(shorter, monkeypatch):
    """The longer one keeps the page: what it wrote before the error is past the other's tokens."""
    keys = _keys((6, 9))
    cache = PagedKeyCache.from_dense(keys[:1], page_size=8)
    other = cache.fork(0)
    cache.truncate([0, other][shorter], 5)
    want = [cache.gather(b).tobytes() for b in (0, other)]
    free = cache.free_blocks

    backend = backend_of(np)
    right = backend.write_keys

    def write_and_fail(write):
        right(write)
        raise MemoryError

    monkeypatch.setattr(backend, "write_keys", write_and_fail)
    with pytest.raises(MemoryError):
        cache.append([keys[1][:2], keys[1][2:4]])
    assert [cache.gather(b).tobytes() for b in (0, other)] == want
    assert cache.free_blocks == free


# ---- sequences


def test_numbers_of_sequences_are_used_again(xp):
    cache = PagedKeyCache.from_dense(_on(xp, _keys((5, 9, 2))), page_size=4)
    cache.free(1)
    assert cache.sequences.tolist() == [0, 2]
    assert cache.lengths.tolist() == [5, 0, 2]
    assert cache.free_blocks == 3
    view = cache.view()  # the row of a freed sequence is empty
    assert host(view.k_cache_lengths).tolist() == [0, 0, 0]
    assert host(cache.input_row_offsets).tolist() == [0, 5, 5, 7]
    assert cache.fork(0) == 1
    assert cache.add_sequence() == 3
    assert cache.batch == 4
    assert host(cache.k_lookup_table)[:2, :2].tolist() == [[0, 1], [0, 1]]


def test_growth_keeps_what_is_there(xp):
    """With `allocate`, which writes nothing itself, and earlier views of lengths and tables."""
    (keys,) = _keys((10,))
    cache = PagedKeyCache.from_dense(_on(xp, [keys[:5]]), page_size=2)
    lengths, view = cache.lengths, cache.view()
    table = host(view.k_lookup_table).copy()
    cache.allocate([5])
    assert cache.num_blocks == 6
    assert same_bits(cache.gather(0)[:5], _dense(keys[:5]))
    cache.write(0, xp.asarray(keys[5:]))
    assert same_bits(cache.gather(0), _dense(keys))
    cache.truncate(0, 1)
    assert lengths.tolist() == [5]
    assert same_bits(view.k_lookup_table, table)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("as_list", [False, True])
def test_write_takes_keys_of_any_type(dtype, as_list, xp):
    if xp is not np and dtype == "bfloat16":
        pytest.skip("CuPy has no bfloat16; test_write_keys.py writes torch's")
    (keys,) = _keys((6,))
    keys = keys.astype(getattr(ml_dtypes, dtype, dtype))
    cache = PagedKeyCache(2, 64, num_layers=2, page_size=4, xp=xp)
    cache.allocate([2, 4])
    given = xp.asarray(keys)
    for layer in range(2):
        cache.write(layer, [given[:2], given[2:]] if as_list else given)
    for layer in range(2):
        assert same_bits(cache.gather(0, layer), _dense(keys[:2].astype(np.float32)))
        assert same_bits(cache.gather(1, layer), _dense(keys[2:].astype(np.float32)))


def test_views_upload_only_what_changed(xp):
    cache = PagedKeyCache.from_dense(_on(xp, _keys((5, 9))), page_size=4)
    first, again = cache.view(), cache.view()
    assert first.k_lookup_table is again.k_lookup_table
    assert first.k_cache_lengths is again.k_cache_lengths
    assert cache.slots() is cache.slots()
    cache.append(_on(xp, _keys((1, 1))))  # into pages that they have
    assert cache.view().k_lookup_table is first.k_lookup_table
    cache.append(_on(xp, _keys((3, 0))))
    assert host(cache.view().k_lookup_table).tolist()[0][2] == 5


@pytest.mark.parametrize(
    ("act", "exception", "names"),
    [
        (lambda c, k: c.free(3), ValueError, "sequence must be an integer from 0 to 2; got 3"),
        (lambda c, k: c.free(-1), ValueError, "sequence must be an integer from 0 to 2; got -1"),
        (lambda c, k: c.free(1), ValueError, "sequence must be in use; got 1, which was freed"),
        (lambda c, k: c.free(0.0), TypeError, "sequence must be an integer from 0 to 2"),
        (lambda c, k: c.fork(1), ValueError, "sequence must be in use; got 1"),
        (lambda c, k: c.fork(None), TypeError, "sequence must be an integer from 0 to 2"),
        (lambda c, k: c.gather(1), ValueError, "sequence must be in use; got 1"),
        (lambda c, k: c.gather(0, 2), ValueError, "layer must be an integer from 0 to 1; got 2"),
        (lambda c, k: c.truncate(1, 0), ValueError, "sequence must be in use; got 1"),
        (lambda c, k: c.truncate(0, 6), ValueError, "length must be an integer from 0 to 5; got 6"),
        (lambda c, k: c.truncate(0, -1), ValueError, "length must be an integer from 0 to 5"),
        (lambda c, k: c.truncate(0, 1.0), TypeError, "length must be an integer from 0 to 5"),
        (lambda c, k: c.view(0, [1]), ValueError, r"sequences must be distinct .* got \[1\]"),
        (lambda c, k: c.view(0, [0, 0]), ValueError, r"sequences must be .* got \[0, 0\]"),
        (lambda c, k: c.view(0, [3]), ValueError, r"sequences must .* from 0 to 2; got \[3\]"),
        (lambda c, k: c.view(0, [-1]), ValueError, r"sequences must be distinct .* got \[-1\]"),
        (lambda c, k: c.view(0, 0), TypeError, r"sequences must be integers, one .* int64 \(\)"),
        (lambda c, k: c.view(0, [0.0]), TypeError, "sequences must be integers.*float64"),
        (lambda c, k: c.view(0, [True]), TypeError, "sequences must be integers.*got bool"),
        (lambda c, k: c.slots(["a"]), TypeError, "sequences must be integers"),
        (lambda c, k: c.row_offsets([1]), ValueError, "sequences must be distinct"),
        (lambda c, k: c.allocate([1, 0]), ValueError, "new must be 3 integers >= 0"),
        (lambda c, k: c.allocate([1, 0, -1]), ValueError, r"new must be .* got \[1, 0, -1\]"),
        (lambda c, k: c.allocate([1, 1, 1]), ValueError, r"new\[1\] must be empty: sequence 1 was"),
        (lambda c, k: c.allocate([1.0, 0.0, 1.0]), TypeError, "new must be integers"),
        (lambda c, k: c.allocate(1), TypeError, "new must be integers, one per sequence"),
        (lambda c, k: c.allocate([2**31] * 2, [0, 2]), ValueError, r"new\[0\] must leave its seq"),
        (lambda c, k: c.allocate([2**64 - 1], [0]), ValueError, "new must fit int64"),
        (lambda c, k: c.allocate([1], [1]), ValueError, "sequences must be distinct"),
        (lambda c, k: c.append([k[:, :1]] * 3), ValueError, r"keys\[1\] must be empty: sequence 1"),
        (
            lambda c, k: c.append([k], [0, 2]),
            ValueError,
            r"keys must hold one array .*\(2\); got 1",
        ),
        (lambda c, k: c.append([k], [1]), ValueError, "sequences must be distinct"),
        (lambda c, k: c.write(2, k[0]), ValueError, "layer must be an integer from 0 to 1; got 2"),
        (
            lambda c, k: c.write(0, k[0][:7]),
            ValueError,
            r"keys must be float \[new tokens = 8, 1, 64",
        ),
        (lambda c, k: c.write(0, k), ValueError, r"keys must .* got \(2, 8, 1, 64\)"),
        (lambda c, k: c.write(0, None), ValueError, "keys must .* got NoneType"),
        (lambda c, k: c.write(0, k[0, ..., :32]), ValueError, "keys must be"),
        (lambda c, k: c.write(0, k[0].astype(np.float64)), ValueError, "keys must be"),
        (lambda c, k: c.write(0, k[0].astype(np.int32)), ValueError, "keys must be"),
        (lambda c, k: c.write(0, [k[0]]), ValueError, r"keys must hold one array .*\(3\); got 1"),
        (lambda c, k: c.write(0, [k[0]] * 3), ValueError, r"keys\[0\] must be \[new tokens = 5"),
        (lambda c, k: c.write(0, [k] * 3), ValueError, r"keys\[0\] must be a float array"),
        (lambda c, k: c.write(0, k[0], [1]), ValueError, "sequences must be distinct"),
    ],
)
def test_wrong_calls_leave_the_cache_alone(act, exception, names, xp):
    keys = np.random.default_rng(0).standard_normal((2, 10, 1, 64), dtype=np.float32)
    cache = PagedKeyCache.from_dense(_on(xp, [keys[:, :5], keys[:, :2], keys[:, 5:8]]), page_size=4)
    cache.free(1)

    def state():
        held = [host(cache.gather(b, layer)).tobytes() for b in (0, 2) for layer in range(2)]
        return held, repr(cache), host(cache.k_lookup_table).tolist(), cache._pages.new.tolist()

    before = state()
    with pytest.raises(exception, match=names):
        act(cache, xp.asarray(keys[:, :8]))
    assert state() == before


@pytest.mark.gpu
def test_integers_and_keys_come_from_where_they_belong(cupy):
    cache = PagedKeyCache(2, 64, xp=cupy)
    with pytest.raises(TypeError, match="new must be integers on the host"):
        cache.allocate(cupy.asarray([1, 1]))
    with pytest.raises(TypeError, match="sequences must be integers on the host"):
        cache.view(0, cupy.asarray([1]))
    cache.allocate([1, 1])
    with pytest.raises(TypeError, match="keys must be a CuPy"):
        cache.write(0, np.zeros((2, 64), np.float32))


@pytest.mark.parametrize(
    ("changes", "exception", "names"),
    [
        ({"num_blocks": -1}, ValueError, "num_blocks must be an integer from 0 to 4294967295"),
        ({"num_blocks": 2.0}, TypeError, "num_blocks must be an integer from 0"),
        ({"num_blocks": 2**32}, ValueError, "num_blocks must be an integer from 0"),
        ({"layout": "page"}, ValueError, "layout must be 'split' or 'fused'; got 'page'"),
        ({"layout": None}, ValueError, "layout must be 'split' or 'fused'; got None"),
        ({"layout": "fused", "num_layers": 2}, ValueError, "layout must be 'split' unless .* 2, 1"),
        ({"layout": "fused", "kv_heads": 2}, ValueError, "layout must be 'split' unless"),
        ({"layout": "fused", "granularity": 32}, ValueError, "layout must be .* with 1, 1 and 2"),
    ],
)
def test_wrong_pools(changes, exception, names):
    with pytest.raises(exception, match=names):
        PagedKeyCache(**({"batch": 2, "depth": 64} | changes))
