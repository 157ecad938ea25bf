"""PagedKeyCache: what goes in comes out of the pages, however it was appended."""

import tracemalloc
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from generators import Case, Spec
from properties import assert_helpful, check_case, host, same_bits

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8
from mla_fp8._cache import dense_keys
from mla_fp8.cli import oracle
from mla_fp8.cli.fuzz_data import encode

DEPTH = 64


def _keys(lengths, *, layers=None, kv_heads=1, seed=0):
    """Random keys, one array per sequence, in the short or the long form."""
    rng = np.random.default_rng(seed)
    shapes = [(n, DEPTH) if layers is None else (layers, n, kv_heads, DEPTH) for n in lengths]
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def _on(xp, keys):
    return [xp.asarray(key) for key in keys]


def _held(cache, b, layer=0):
    """Codes and scales of one sequence, read through the table as the operation would."""
    position = np.arange(int(cache.lengths[b]))
    page = host(cache.k_lookup_table)[b, position // cache.page_size].astype(np.int64)
    where = (page, 0, layer, position % cache.page_size)
    return host(cache.k_blocks).view(np.uint8)[where], host(cache.k_scales)[where]


def _assert_holds(cache, keys, xp, **options) -> None:
    for b, key in enumerate(keys):
        key = key if key.ndim == 4 else key[None, :, None]
        values, scales = fp8.quantize(
            xp.asarray(key), options.get("granularity"), **_power(options)
        )
        for layer in range(len(key)):
            got = _held(cache, b, layer)
            np.testing.assert_array_equal(got[0], host(values).view(np.uint8)[layer])
            np.testing.assert_array_equal(got[1], host(scales)[layer])


def _power(options):
    return {"power_of_two": options.get("power_of_two", False)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"page_size": 1},
        {"page_size": 7, "granularity": 32},
        {"page_size": 128, "power_of_two": True},
    ],
    ids=str,
)
def test_from_dense_holds_the_quantised_keys(options, xp):
    lengths = (5, 0, 130, 64)
    keys = _keys(lengths)
    cache = PagedKeyCache.from_dense(_on(xp, keys), **options)
    assert cache.lengths.tolist() == list(lengths)
    assert cache.lengths.dtype == np.int64
    assert cache.page_size == options.get("page_size", 64)
    assert (cache.depth, cache.num_layers, cache.kv_heads) == (DEPTH, 1, 1)
    assert cache.granularity == options.get("granularity", DEPTH)
    assert isinstance(cache.k_blocks, xp.ndarray)
    groups = DEPTH // cache.granularity
    assert cache.k_blocks.shape[1:] == (1, 1, cache.page_size, 1, DEPTH)
    assert cache.k_scales.shape == (*cache.k_blocks.shape[:-1], groups)
    _assert_holds(cache, keys, xp, **options)


def test_layers_and_kv_heads(xp):
    keys = _keys((9, 20), layers=3, kv_heads=2)
    cache = PagedKeyCache.from_dense(_on(xp, keys), page_size=8)
    assert (cache.num_layers, cache.kv_heads) == (3, 2)
    assert cache.k_blocks.shape[2:] == (3, 8, 2, DEPTH)
    _assert_holds(cache, keys, xp)


@pytest.mark.parametrize("together", [1, 500, 3000])
@pytest.mark.parametrize("layers", [None, 2])
def test_sequences_written_together_change_nothing(layers, together, monkeypatch, xp):
    """One at a time, a few, or all."""
    keys = _keys((9, 0, 30, 1, 1, 25, 0), layers=layers)
    want = PagedKeyCache.from_dense(_on(xp, keys), page_size=4, granularity=32)
    monkeypatch.setattr(dense_keys, "_JOINED_AT_ONCE", together)
    found = PagedKeyCache.from_dense(_on(xp, keys), page_size=4, granularity=32)
    assert found.k_blocks.shape[0] == 20  # no block more than they need
    for name in ("k_blocks", "k_scales", "k_lookup_table", "lengths"):
        assert same_bits(getattr(found, name), getattr(want, name)), name
    _assert_holds(found, keys, xp, granularity=32)


@pytest.mark.parametrize("lengths", [(131072,), (1000, 0, 128_000, 3) + (1,) * 2069])
def test_from_dense_takes_little_more_than_the_cache(lengths):
    """And what it takes does not grow with the keys."""
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((131072, 128), np.float32)
    keys = np.split(whole, np.cumsum(lengths)[:-1])
    tracemalloc.start()
    try:
        cache = PagedKeyCache.from_dense(keys)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.lengths.sum() == 131072
    assert held >= cache.k_blocks.nbytes + cache.k_scales.nbytes
    assert peak - held < 64 << 20 == whole.nbytes


def test_keys_of_any_float_type_and_layout(xp):
    """Side by side, where NumPy knows no type for both."""
    whole = _keys((8, 8, 8))
    types = (np.float16, ml_dtypes.bfloat16, np.float64) if xp is np else (np.float16, np.float64)
    keys = [key.astype(t) for key, t in zip(whole, types, strict=False)]
    strided = [xp.asarray(key)[::-1].T.copy().T for key in keys]  # Fortran order
    cache = PagedKeyCache.from_dense(strided, page_size=4)
    _assert_holds(cache, [key[::-1].astype(np.float32) for key in keys], xp)


@pytest.mark.parametrize("layers", [None, 2])
def test_append_is_as_if_it_had_been_there(layers, xp):
    """Many appends, ragged and with empty ones, over page ends and reallocations."""
    whole = _keys((100, 7, 0, 33), layers=layers)
    axis = 0 if layers is None else 1
    cuts = [
        (0, 0, 0, 0),
        (3, 0, 0, 8),
        (3, 1, 0, 16),
        (60, 1, 0, 17),
        (61, 7, 0, 33),
        (100, 7, 0, 33),
    ]

    def part(b, first, last):
        return xp.asarray(np.take(whole[b], range(first, last), axis=axis))

    cache = None
    for first, last in pairwise(cuts):
        new = [part(b, *ends) for b, ends in enumerate(zip(first, last, strict=True))]
        if cache is None:
            cache = PagedKeyCache.from_dense(new, page_size=8, granularity=32)
        else:
            cache.append(new)
        assert cache.lengths.tolist() == list(last)
        view = cache.view()
        np.testing.assert_array_equal(host(view.k_cache_lengths), first)
        sizes = np.subtract(last, first)
        offsets = np.concatenate([[0], sizes.cumsum()])
        np.testing.assert_array_equal(host(cache.input_row_offsets), offsets)
        assert host(view.k_max_lengths).tolist() == [[sizes.max(), max(first)]]
    _assert_holds(cache, whole, xp, granularity=32)


def test_views_are_arguments(xp):
    cache = PagedKeyCache.from_dense(_on(xp, _keys((5, 9), layers=2)), page_size=4)
    cache.append(_on(xp, _keys((1, 3), layers=2, seed=1)))
    view = cache.view(1)
    assert view._fields == (
        "k_blocks",
        "k_cache_lengths",
        "k_lookup_table",
        "k_max_lengths",
        "k_scales",
        "layer_idx",
    )
    assert view.layer_idx == 1
    unsigned = ("k_cache_lengths", "k_lookup_table", "k_max_lengths")
    assert all(getattr(view, name).dtype == np.uint32 for name in unsigned)
    assert cache.input_row_offsets.dtype == np.uint32
    assert view.k_max_lengths.shape == (1, 2)
    assert cache.view().layer_idx == 0


@pytest.mark.parametrize("granularity", [None, 32])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_operation_on_a_cache(granularity, power_of_two, xp):
    """From floats to indices, prefill and two decode steps, by the oracle on the same bytes."""
    rng = np.random.default_rng(6)
    options = {"granularity": granularity, "power_of_two": power_of_two}
    cache = PagedKeyCache.from_dense(_on(xp, _keys((18, 3, 9), layers=2)), page_size=8, **options)
    spec = Spec(num_heads=4, depth=DEPTH, granularity=granularity or 0, k=6)
    for lengths in (None, (1, 1, 1), (1, 0, 4)):
        if lengths:
            cache.append(_on(xp, _keys(lengths, layers=2, seed=sum(lengths))))
        tokens = int(host(cache.input_row_offsets)[-1])
        q = encode(rng.standard_normal((tokens, 4, DEPTH)))
        qs = rng.standard_normal((tokens, 4)).astype(np.float32)
        for layer in range(2):
            view = [a if isinstance(a, int) else host(a) for a in cache.view(layer)]
            case = Case(spec, q, qs, host(cache.input_row_offsets), *view)
            check_case(case, xp)
            # the same straight from the cache, as users write it
            op = MLAIndexerRaggedFloat8Paged(**case.params)
            row = op(xp.asarray(q), xp.asarray(qs), cache.input_row_offsets, *cache.view(layer))
            assert same_bits(row, op(*case.to(xp).args))


def test_the_nearest_key_is_found(xp):
    """The point of it all: a query that looks like one key gets that key."""
    keys = _keys((300, 200))
    cache = PagedKeyCache.from_dense(_on(xp, keys))
    queries = np.stack([keys[0][123], keys[1][45]])
    cache.append(_on(xp, [np.zeros((1, DEPTH), np.float32)] * 2))
    q = encode(queries)[:, None]
    op = MLAIndexerRaggedFloat8Paged(1, DEPTH, k=1, quantization_granularity=DEPTH)
    ones = xp.ones((2, 1), np.float32)
    row = op(xp.asarray(q), ones, cache.input_row_offsets, *cache.view())
    assert host(row).tolist() == [[123], [45]]
    want = oracle.evaluate(Case(Spec(), q, host(ones), np.arange(3), *map(host, cache.view())))
    assert want.scores.argmax(axis=1).tolist() == [123, 45]


@pytest.mark.parametrize(
    ("change", "exception", "names"),
    [
        (lambda keys: {"keys": []}, ValueError, "keys"),
        (lambda keys: {"keys": keys[0].tolist()}, (TypeError, ValueError), "keys"),
        (lambda keys: {"keys": [keys[0], keys[1][:, :32]]}, ValueError, "keys|depth"),
        (lambda keys: {"keys": [keys[0], keys[1][None]]}, ValueError, "keys"),
        (
            lambda keys: {"keys": [k.astype(np.int32) for k in keys]},
            (TypeError, ValueError),
            "keys",
        ),
        (lambda keys: {"keys": [k[:, :48] for k in keys]}, ValueError, "keys|depth"),
        (lambda keys: {"page_size": 0}, ValueError, "page_size"),
        (lambda keys: {"page_size": 1.5}, TypeError, "page_size"),
        (lambda keys: {"granularity": 48}, ValueError, "granularity"),
        (lambda keys: {"granularity": 16}, ValueError, "granularity"),
    ],
)
def test_wrong_from_dense(change, exception, names, xp):
    keys = _on(xp, _keys((5, 9)))
    with pytest.raises(exception) as caught:
        PagedKeyCache.from_dense(**({"keys": keys} | change(keys)))
    assert_helpful(caught.value, names)


@pytest.mark.parametrize(
    ("change", "exception"),
    [
        (lambda keys: keys[:1], ValueError),
        (lambda keys: [*keys, keys[0]], ValueError),
        (lambda keys: [keys[0], keys[1][:, :32]], ValueError),
        (lambda keys: [keys[0], keys[1][None, :, None].repeat(2, axis=0)], ValueError),
        (lambda keys: [keys[0], keys[1].astype(np.int32)], (TypeError, ValueError)),
        (lambda keys: [keys[0], None], (TypeError, ValueError)),
    ],
    ids=["a sequence less", "a sequence more", "narrower", "another layer", "integers", "none"],
)
def test_wrong_append_leaves_the_cache_alone(change, exception, xp):
    keys = _keys((5, 9))
    cache = PagedKeyCache.from_dense(_on(xp, keys), page_size=4)
    with pytest.raises(exception) as caught:
        cache.append(change(_on(xp, _keys((1, 2), seed=1))))
    assert_helpful(caught.value, "keys")
    assert cache.lengths.tolist() == [5, 9]
    assert host(cache.view().k_cache_lengths).tolist() == [0, 0]
    _assert_holds(cache, keys, xp)


@pytest.mark.gpu
def test_host_keys_do_not_enter_a_device_cache(cupy):
    keys = _keys((5, 9))
    cache = PagedKeyCache.from_dense(_on(cupy, keys))
    with pytest.raises(TypeError) as caught:
        cache.append(keys)
    assert_helpful(caught.value, "keys")


@pytest.mark.parametrize("layer", [2, -1, 0.5])
def test_a_layer_that_is_not_there(layer, xp):
    cache = PagedKeyCache.from_dense(_on(xp, _keys((5, 9), layers=2)))
    with pytest.raises((TypeError, ValueError)) as caught:
        cache.view(layer)
    assert_helpful(caught.value, "layer|layer_idx", str(layer) if layer != 0.5 else "")
