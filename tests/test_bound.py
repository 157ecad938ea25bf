"""A bound call: checked once, it computes what the operator does, from what arrays hold then."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
from generators import ARGUMENTS, Spec
from properties import POISON, assert_helpful, host, message_of, same_bits
from test_shards import shard

from mla_fp8 import BoundCall, MLAIndexerRaggedFloat8Paged

SPEC = Spec((3, 0, 1, 2), (300, 9, 900, 40), num_heads=8, depth=64, k=40, page_size=16)
SPECS = {
    "ragged": SPEC,
    "decode": Spec((1,) * 5, (1, 63, 700, 2000, 5), num_heads=64, k=256, values="plateau"),
    "kpool": Spec((9, 1, 2), (170, 900, 3), num_heads=16, kpool=4, k=30),
    "granules": Spec((3, 4), (170, 100), num_heads=12, granularity=32),
    "null mask, by layer": Spec((3, 5), (170, 300), mask="null", num_layers=3, layer=1),
    "k beyond the fast path": Spec((2, 1), (9000, 9), num_heads=8, k=5000),
    "empty": Spec((0, 0), (3, 0)),
    "no sequences": Spec((), ()),
}
OPTIONS = [
    {},
    {"return_scores": True},
    {"sort": "score"},
    {"sort": "score", "return_scores": True},
    {"output": "slots"},
    {"output": "both"},
    {"output": "both", "return_scores": True, "sort": "score"},
]


def _tuple(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _assert_same(found, want) -> None:
    assert isinstance(found, tuple) == isinstance(want, tuple)
    for mine, theirs in zip(_tuple(found), _tuple(want), strict=True):
        assert mine.dtype == theirs.dtype
        assert same_bits(mine, theirs)


def _spoil(results) -> None:
    for array in _tuple(results):
        array[...] = POISON


def _built(spec, xp):
    case = spec.build()
    return MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_it_gives_what_a_call_gives(name, options, xp):
    op, here = _built(SPECS[name], xp)
    want, call = op(*here.args, **options), op.bind(*here.args, **options)
    assert isinstance(call, BoundCall)
    for _ in range(3):
        _spoil(call.results)
        found = call()
        _assert_same(found, want)
        assert all(a is b for a, b in zip(_tuple(found), _tuple(call.results), strict=True))


@pytest.mark.parametrize("start", ["number", "array"])
def test_on_a_shard(start, xp):
    case = shard(SPEC.build(), 2, 3, 310)
    here, op = case.to(xp), MLAIndexerRaggedFloat8Paged(**case.params)
    first = 2 if start == "number" else xp.full(4, 2, np.uint32)
    options = {"key_start": first, "key_step": 3, "return_scores": True}
    call = op.bind(*here.args, **options)
    _assert_same(call(), op(*here.args, **options))
    if start == "array":
        first[...] = 5
        _assert_same(call(), op(*here.args, **options, check=False))


def test_without_gates_and_with_total_lengths(xp):
    op, here = _built(SPEC, xp)
    here = here.replace(qs=None)
    totals = here.k_cache_lengths + xp.asarray(np.array(SPEC.seq_lens, np.uint32))
    arguments, options = list(here.args), {"k_total_lengths": totals}
    arguments[4] = None
    call = op.bind(*arguments, **options)
    _assert_same(call(), op(*arguments, **options))


def test_bounds_on_the_device_are_not_read(xp):
    case = SPEC.build()
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp, device_max_lengths=True)
    _assert_same(op.bind(*here.args)(), op(*here.args))


@pytest.mark.parametrize("name", ["ragged", "decode", "kpool"])
def test_values_may_change_between_calls(name, xp):
    """Queries, gates, keys, scales, lengths, offsets and pages, one after the other."""
    op, here = _built(SPECS[name], xp)
    options = {"output": "both", "return_scores": True}
    call, before = op.bind(*here.args, **options), None
    moved = host(here.input_row_offsets).copy()
    moved[1:-1] = np.minimum(moved[1:-1] + 1, moved[-1])
    changes = {
        "q": here.q[::-1].copy(),
        "qs": -here.qs,
        "k_blocks": xp.roll(here.k_blocks.view(np.uint8), 1, axis=-1).view(here.k_blocks.dtype),
        "k_scales": here.k_scales * xp.asarray(np.float32(0.5)),
        "k_cache_lengths": here.k_cache_lengths // 2,
        "input_row_offsets": xp.asarray(moved),
        "k_lookup_table": here.k_lookup_table[::-1].copy(),
    }
    for name, values in changes.items():
        getattr(here, name)[...] = values
        want = op(*here.args, **options, check=False)
        _assert_same(call(), want)
        found = [host(array).copy() for array in want]
        assert before is None or not all(map(same_bits, found, before)), f"{name} has no effect"
        before = found


def test_wrong_values_are_wrong_when_bound_and_clamped_later(xp):
    op, here = _built(SPEC, xp)
    call = op.bind(*here.args, return_scores=True, check=True)
    for name, wrong in (
        ("k_max_lengths|k_cache_lengths", 2**31),
        ("k_lookup_table", 2**31 - 1),
        ("input_row_offsets", 7),
    ):
        array = getattr(here, name.rpartition("|")[2])
        kept = array.copy()
        array[...] = wrong
        assert_helpful(message_of(lambda: op.bind(*here.args, check=True)), name)
        _assert_same(call(), op(*here.args, return_scores=True, check=False))
        array[...] = kept
    _assert_same(call(), op(*here.args, return_scores=True))


def test_bounds_on_the_host_keep_their_values(xp):
    op, here = _built(SPEC, xp)
    call, want = op.bind(*here.args), op(*here.args)
    here.k_max_lengths[...] = 0
    _assert_same(call(), want)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_the_callers_arrays_are_written_and_returned(options, xp):
    op, here = _built(SPEC, xp)
    want = op(*here.args, **options)
    arrays = [xp.full(a.shape, POISON, a.dtype) for a in _tuple(want)]
    out = tuple(arrays) if isinstance(want, tuple) else arrays[0]
    memory = op.workspace(*here.args, **options)
    call = op.bind(*here.args, **options, out=out, workspace=memory)
    assert all((a == xp.asarray(POISON).astype(a.dtype)).all() for a in arrays), "binding wrote"
    assert call() is out
    assert call.results is out
    _assert_same(out, want)


WRONG = {
    "q": lambda here: {"q": here.q[:, :3]},
    "qs": lambda here: {"qs": here.qs[:-1]},
    "k_scales": lambda here: {"k_scales": here.k_scales.astype(np.float64)},
    "k_lookup_table": lambda here: {"k_lookup_table": here.k_lookup_table[:1]},
    "layer_idx": lambda here: {"layer_idx": 1},
    "out": lambda here: {"out": here.xp.zeros((here.tokens, 39), np.int32)},
    "workspace": lambda here: {"workspace": here.xp.zeros(8, np.int8)},
    "sort": lambda here: {"sort": "best"},
    "output": lambda here: {"output": "rows"},
    "key_step": lambda here: {"key_step": 0},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_call_refuses_is_refused_when_bound(name, xp):
    op, here = _built(SPEC, xp)
    arguments = dict(zip(ARGUMENTS, here.args, strict=True))
    out = xp.full((here.tokens, SPEC.k), POISON, np.int32)
    arguments |= {"out": out} | WRONG[name](here)
    message = message_of(lambda: op.bind(**arguments))
    assert_helpful(message, name)
    assert message == message_of(lambda: op(**arguments))
    assert (out == POISON).all()


@pytest.mark.gpu
def test_a_workspace_that_is_too_small_is_refused(cupy):
    op, here = _built(SPEC, cupy)
    size = op.scratch_bytes(*here.args)
    with pytest.raises(ValueError, match=f"workspace must have at least {size} bytes; got 16"):
        op.bind(*here.args, workspace=cupy.empty(16, np.uint8))


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_stays_where_it_is(copied, xp):
    op, here = _built(SPEC, xp)
    with pytest.raises(TypeError, match=r"BoundCall must stay in its process.*; got .*pickle"):
        copied(op.bind(*here.args))


def test_it_keeps_its_arrays_alive(xp):
    op, here = _built(SPEC, xp)
    want, names = op(*here.args), ("q", "qs", "k_blocks", "k_lookup_table")
    arguments = [array if isinstance(array, int) else array.copy() for array in here.args]
    kept = [weakref.ref(array) for array in arguments[:6]] if xp is np else []
    call = op.bind(*arguments)
    del arguments
    gc.collect()
    spare = [xp.full_like(getattr(here, name), 0) for name in names]  # where freed memory was
    _assert_same(call(), want)
    bound = weakref.ref(call)
    del call, spare
    gc.collect()
    assert bound() is None
    assert all(array() is None for array in kept)


def test_threads_share_one_and_have_their_own(xp):
    """Calls of one object give the same results from any thread; others do not meet them."""
    built = [_built(Spec(**{**vars(SPEC), "seed": seed}), xp) for seed in range(3)]
    calls = [op.bind(*here.args, return_scores=True) for op, here in built]
    wants = [op(*here.args, return_scores=True) for op, here in built]
    start, errors = threading.Barrier(6), []

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(20):
                calls[number % 3]()
        except Exception as error:
            errors.append(error)

    for call in calls:
        _spoil(call.results)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for call, want in zip(calls, wants, strict=True):
        _assert_same(call.results, want)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_tensors_of_torch(device, torch):
    case = Spec(**{**vars(SPEC), "fp8_dtype": "uint8", "index_dtype": "int32"}).build()
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    tensors = [torch.from_numpy(a.copy()).to(device) for a in case.args[:-1]]
    call = op.bind(*tensors, 0, return_scores=True)
    assert all(isinstance(r, torch.Tensor) and r.device.type == device for r in call.results)
    for _ in range(2):
        want = op(*tensors, 0, return_scores=True)
        assert all(map(torch.equal, call(), want))
        tensors[1].neg_()
    want = op(*tensors, 0, return_scores=True)
    out = torch.zeros((case.tokens, SPEC.k), dtype=torch.int32, device=device)
    assert op.bind(*tensors, 0, out=out)() is out
    assert torch.equal(out, want[0])


def test_arrays_of_jax_do_not_change():
    """So results are NumPy's, into which calls may write."""
    jnp = pytest.importorskip("jax.numpy")
    case = Spec(**{**vars(SPEC), "fp8_dtype": "uint8"}).build()
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    call = op.bind(*map(jnp.asarray, case.args[:-1]), 0)
    assert type(call()) is np.ndarray
    _assert_same(call(), op(*case.args))
