"""Which stream a call runs on and who waits for whom; stand-ins for CuPy and torch, so no GPU."""

import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import pytest

from mla_fp8._check import streams
from mla_fp8._check.streams import RepeatedOrder, borrowed, stream_order

CUPY, TORCH, OTHER = 5, 7, 9  # handles of current streams


class _Array:
    """CuPy's."""

    device = SimpleNamespace(id=0)


class _Tensor:
    """torch's."""

    is_cuda = True
    __dlpack__ = None

    def get_device(self):
        return 0


class _Bound:
    """Numba's, say: the legacy stream is 1 by this protocol, 0 elsewhere."""

    def __init__(self, stream):
        self.__cuda_array_interface__ = {"data": (512, False), "stream": stream}


class _OnlyDLPack:
    __dlpack__ = None

    def __dlpack_device__(self):
        return 2, 0


@pytest.fixture
def world(monkeypatch):
    """Its ``log``: ("record", stream, event), ("wait", stream, event); ``captured``: handles."""
    log, captured, numbers = [], set(), count()

    class Event:
        done = True

        def __init__(self, disable_timing):
            self.number = next(numbers)

    class Stream:
        def __init__(self, ptr):
            self.ptr = ptr

        @classmethod
        def from_external(cls, handle):
            return cls(handle.__cuda_stream__()[1])

        def is_capturing(self):
            return self.ptr in captured

        def record(self, event):
            log.append(("record", self.ptr, event.number))
            return event

        def wait_event(self, event):
            log.append(("wait", self.ptr, event.number))

        def synchronize(self):
            log.append(("synchronize", self.ptr, -1))

        def __enter__(self):
            current.append(self)

        def __exit__(self, *_):
            current.pop()

    @contextmanager
    def nothing(*_):
        yield

    current = [Stream(CUPY)]
    runtime = SimpleNamespace(pointerGetAttributes=lambda _: SimpleNamespace(device=0))
    cuda = SimpleNamespace(
        Event=Event,
        Stream=Stream,
        Device=nothing,
        using_allocator=nothing,
        get_current_stream=lambda _=-1: current[-1],
        runtime=runtime,
    )
    theirs = SimpleNamespace(current_stream=lambda _: SimpleNamespace(cuda_stream=TORCH))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=_Array, cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=_Tensor, cuda=theirs))
    return SimpleNamespace(log=log, captured=captured, current=current)


def _of_a_bound_call(first, given):
    order = RepeatedOrder(first, tuple(given))
    with order.binding():
        pass
    return order()


@pytest.mark.parametrize("order", [stream_order, _of_a_bound_call])
@pytest.mark.parametrize(
    ("first", "others", "runs_on", "waits"),
    [
        (_Array(), [_Array()], CUPY, []),
        (_Tensor(), [_Tensor()], TORCH, []),
        (_Tensor(), [_Tensor(), _OnlyDLPack()], TORCH, []),
        (_Tensor(), [_Array(), _Array()], TORCH, [CUPY]),
        (_Array(), [_Tensor(), _Tensor()], CUPY, [TORCH]),
        (_OnlyDLPack(), [_Tensor()], CUPY, [TORCH]),
        (_Bound(OTHER), [_Array()], OTHER, [CUPY]),
        (_Bound(None), [_Bound(OTHER)], CUPY, [OTHER]),
        (_Bound(1), [], 0, []),
        (_Tensor(), [_Bound(OTHER), _Array()], TORCH, [CUPY, OTHER]),
    ],
)
def test_streams_wait_for_one_another(first, others, runs_on, waits, order, world):
    ordered = order(first, [first, *others])
    world.log.clear()
    with ordered:
        assert world.current[-1].ptr == runs_on
        before = len(world.log)
    assert world.current[-1].ptr == CUPY
    found = [(kind, stream) for kind, stream, _ in world.log]
    assert sorted(found[:before:2]) == [("record", other) for other in waits]
    assert found[1:before:2] == [("wait", runs_on)] * len(waits)
    assert found[before::2] == [("record", runs_on)] * len(waits)
    assert sorted(found[before + 1 :: 2]) == [("wait", other) for other in waits]
    assert [number for *_, number in world.log[::2]] == [number for *_, number in world.log[1::2]]


@pytest.mark.parametrize("captured", [{TORCH}, {CUPY}, {CUPY, TORCH}])
def test_only_streams_of_one_graph_wait_while_it_is_captured(captured, world):
    world.captured |= captured
    with stream_order(_Tensor(), [_Array()]):
        pass
    assert len(world.log) == (4 if len(captured) == 2 else 0)


def test_they_wait_for_the_work_of_a_call_that_failed(world):
    with pytest.raises(ZeroDivisionError), stream_order(_Tensor(), [_Array()]):
        raise ZeroDivisionError
    assert [kind for kind, *_ in world.log] == ["record", "wait", "record", "wait"]
    assert borrowed.arrays is None


def test_arrays_without_a_stream_are_kept_until_the_work_is_done(world):
    with stream_order(_OnlyDLPack(), []):
        borrowed.arrays.append("lent")
    assert [entry[:2] for entry in world.log] == [("record", CUPY)]


def test_a_bound_call_of_cupy_has_nothing_to_order(world):
    assert RepeatedOrder(_Array(), (_Array(), None, 3))() is streams._NO_ORDER


def test_a_bound_call_keeps_what_is_lent_until_its_work_is_done(world):
    """What the libraries without a stream have written is there before the first call."""
    order = RepeatedOrder(_OnlyDLPack(), (_OnlyDLPack(),))
    with order.binding():
        borrowed.arrays.append("lent")
    assert ("synchronize", CUPY, -1) in world.log
    world.log.clear()
    for _ in range(2):
        with order():
            assert borrowed.arrays == ["lent"]
    assert [entry[:2] for entry in world.log] == [("record", CUPY)] * 2
    assert borrowed.arrays is None


def test_no_other_library_is_imported():
    names = {"cupy", "torch", "jax", "numba"}
    code = f"import sys, mla_fp8; sys.exit(str({names} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
