"""PagedKeyCache: copies, what fails half way, and limits, which leave a cache as it was."""

import copy
import pickle

import numpy as np
import pytest
from properties import host
from test_cache import DEPTH, _assert_holds, _keys, _on

from mla_fp8 import PagedKeyCache
from mla_fp8 import cache as cache_module
from mla_fp8._cache import dense_keys, pages, pool, sequences
from mla_fp8._reference import keys as reference_keys

MODULES = (cache_module, dense_keys, pages, reference_keys, sequences)


def _state(cache):
    """All that a caller sees of a cache, bit for bit, and which arrays hold it."""
    arrays = [cache.k_lookup_table, *cache._pool.arrays]
    seen = [cache.k_lookup_table, cache.lengths, cache.view().k_cache_lengths, cache.sequences]
    seen += [cache.gather(b, layer) for b in cache.sequences for layer in range(cache.num_layers)]
    values = [host(array).tobytes() for array in seen]
    return list(map(id, arrays)), values, host(cache.input_row_offsets).tolist(), repr(cache)


class _Exhausted:
    """NumPy, but the call of one number finds no memory."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __getattr__(self, name):
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found

        def call(*args, **options):
            self.left -= 1
            if self.left < 0:
                raise MemoryError(name)
            return found(*args, **options)

        return call


@pytest.mark.parametrize("new", [(1, 0), (3, 9)])
def test_an_append_without_memory_changes_nothing(new, monkeypatch):
    """Whichever call it is that finds none; then it is as if that had not been tried."""
    keys, more = _keys((5, 9)), _keys(new, seed=1)
    cache = PagedKeyCache.from_dense(keys, page_size=4)
    before, calls = _state(cache), 0
    while True:
        with monkeypatch.context() as patch:
            exhausted = _Exhausted(calls)
            for module in MODULES:
                patch.setattr(module, "np", exhausted)
            try:
                cache.append(more)
                break
            except MemoryError:
                calls += 1
        assert _state(cache) == before, calls
    assert calls > 3
    _assert_holds(cache, [np.concatenate(pair) for pair in zip(keys, more, strict=True)], np)
    used = (cache.lengths + 3) // 4
    assert f"blocks={used.sum()}/" in repr(cache)


@pytest.mark.parametrize(
    ("what", "new"), [("quantize", (20, 30)), ("quantize", (3, 3)), ("zeros", (20, 30))]
)
def test_an_append_that_cannot_quantise_or_grow_changes_nothing(what, new, monkeypatch):
    """With room in the pool and without; the second of several quantisations fails."""
    cache = PagedKeyCache.from_dense(_keys((5, 9)), page_size=4)
    before = _state(cache)
    monkeypatch.setattr(dense_keys, "_JOINED_AT_ONCE", 3 * DEPTH)
    place, calls = (reference_keys, 1) if what == "quantize" else (pool.Pool, 0)
    right = getattr(place, what)

    def fail(*args, **options):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise MemoryError
        return right(*args, **options)

    monkeypatch.setattr(place, what, fail)
    with pytest.raises(MemoryError):
        cache.append(_keys(new, seed=1))
    assert _state(cache) == before


@pytest.mark.gpu
def test_an_append_without_device_memory_changes_nothing(cupy):
    keys, more = _keys((5, 9)), _keys((30, 2), seed=1)
    cache, given = PagedKeyCache.from_dense(_on(cupy, keys), page_size=4), _on(cupy, more)
    before, failed = _state(cache), 0
    allocate = cupy.get_default_memory_pool().malloc
    for allowed in range(1000):
        left = allowed

        def some(size):
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError(size)
            return allocate(size)

        try:
            with cupy.cuda.using_allocator(some):
                cache.append(given)
            break
        except MemoryError:
            failed += 1
        assert _state(cache) == before, allowed
    assert failed > 2  # the pool's two arrays, and what the keys pass through
    _assert_holds(cache, [np.concatenate(pair) for pair in zip(keys, more, strict=True)], cupy)


@pytest.mark.parametrize("how", ["pickle", "copy", "deepcopy"])
def test_a_copy_is_a_cache_of_its_own(how, xp):
    """With the same keys; what is appended to one does not appear in the other."""
    keys = _keys((5, 9))
    cache = PagedKeyCache.from_dense(_on(xp, keys), page_size=4, granularity=32, power_of_two=True)
    ways = {
        "pickle": lambda c: pickle.loads(pickle.dumps(c)),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
    }
    other = ways[how](cache)
    assert isinstance(other.k_blocks, xp.ndarray)
    assert _state(other)[1:] == _state(cache)[1:]
    more = [_keys((3, 1), seed=seed) for seed in (1, 2)]
    for one, new in zip((cache, other), more, strict=True):
        one.append(_on(xp, new))
    for one, new in zip((cache, other), more, strict=True):
        whole = [np.concatenate(pair) for pair in zip(keys, new, strict=True)]
        _assert_holds(one, whole, xp, granularity=32, power_of_two=True)


def test_a_batch_of_no_sequences(xp):
    cache = PagedKeyCache(0, DEPTH, xp=xp)
    cache.append([])
    assert cache.lengths.size == 0
    assert host(cache.input_row_offsets).tolist() == [0]
    assert host(cache.view().k_max_lengths).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match=r"keys must hold one array per sequence \(0\); got 1"):
        cache.append(_on(xp, _keys((3,))))


@pytest.mark.parametrize(
    ("changes", "exception", "names"),
    [
        ({"batch": -1}, ValueError, "batch must be an integer from 0"),
        ({"batch": 1.0}, TypeError, "batch must be an integer from 0"),
        ({"batch": 2**31}, ValueError, "batch must be an integer from 0"),
        ({"depth": 48}, ValueError, "depth must be one of 32, 64, 128, 256"),
        ({"num_layers": 0}, ValueError, "num_layers must be an integer from 1"),
        ({"kv_heads": 129}, ValueError, "kv_heads must be an integer from 1 to 128"),
        ({"page_size": -1}, ValueError, "page_size must be an integer from 1"),
        ({"granularity": True}, TypeError, "granularity must be an integer from 1"),
        ({"power_of_two": "no"}, TypeError, "power_of_two must be True or False; got str"),
        ({"xp": "numpy"}, TypeError, "xp must be the module numpy or cupy; got str"),
        (
            {"page_size": 2**31 - 1, "num_layers": 2**31 - 1},
            ValueError,
            r"num_layers \* page_size \* kv_heads \* depth must be an integer from 1",
        ),
    ],
)
def test_wrong_caches(changes, exception, names):
    with pytest.raises(exception, match=names):
        PagedKeyCache(**({"batch": 2, "depth": DEPTH} | changes))


def test_more_than_positions_blocks_or_memory_can_count():
    """Named before anything is quantised: these keys are one number, seen from many places."""
    endless = np.broadcast_to(np.float32(1), (2**31 - 2**16 + 1, DEPTH))
    with pytest.raises(ValueError, match=r"keys\[1\] must leave its sequence at most 2147418112"):
        PagedKeyCache.from_dense([endless[:0], endless])
    cache = PagedKeyCache.from_dense([endless[:3]] * 3)
    before = _state(cache)
    with pytest.raises(ValueError, match=r"keys\[2\] must .* got 3 \+ 2147418110"):
        cache.append([endless[:1], endless[:1], endless[: 2**31 - 2**16 - 2]])
    small = PagedKeyCache(3, DEPTH, page_size=1)
    with pytest.raises(ValueError, match="keys must fit 4294967295 blocks of 1 tokens"):
        small.append([endless[:-1]] * 3)
    with pytest.raises(MemoryError, match="no room for 65536 blocks of 149533581307904"):
        PagedKeyCache(3, DEPTH, page_size=2**31 - 1, num_layers=1 << 10, num_blocks=1 << 16)
    assert small.lengths.sum() == 0
    assert _state(cache) == before


@pytest.mark.parametrize("keys", [None, 5, np.float32(1)])
def test_keys_that_are_no_sequence(keys):
    with pytest.raises(TypeError, match="keys must be a sequence of arrays; got"):
        PagedKeyCache.from_dense(keys)


def test_keys_may_come_from_a_generator(xp):
    keys = _keys((5, 9))
    cache = PagedKeyCache.from_dense(key for key in _on(xp, keys))
    cache.append(key[:0] for key in _on(xp, keys))
    _assert_holds(cache, keys, xp)
