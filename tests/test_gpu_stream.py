"""Where the work runs: on the current stream, on the arrays' device, inside a captured graph."""

import numpy as np
import pytest
from generators import Spec
from properties import POISON, host, same_bits

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, index_topk, select_topk

pytestmark = pytest.mark.gpu

SPEC = Spec((3, 1), (300, 900), num_heads=16, k=64)
SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


@pytest.fixture
def busy(cupy):
    """Keeps the current stream busy for about a tenth of a second."""
    kernel = cupy.RawKernel(SPIN, "spin")
    return lambda: kernel((1,), (1,), (np.int64(200_000_000),))


def _two_problems():
    """Same shapes and lengths, other queries."""
    one, two = SPEC.build(), Spec(**{**vars(SPEC), "seed": 1}).build()
    return one, one.replace(q=two.q, qs=two.qs)


def test_work_is_ordered_by_the_current_stream(cupy, busy):
    """Inputs written late on a non-blocking stream: any other stream would read the old ones."""
    old, new = _two_problems()
    here, fresh = old.to(cupy), new.to(cupy)
    op = MLAIndexerRaggedFloat8Paged(**old.params)
    want, stale = op(*fresh.args, return_scores=True), op(*here.args, return_scores=True)
    dense = index_scores(*fresh.args)
    assert not same_bits(want[0], stale[0]), "the two problems must differ"
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        busy()
        here.q[...] = fresh.q
        here.qs[...] = fresh.qs
        got = op(*here.args, return_scores=True)
        late = index_scores(*here.args)
        again = select_topk(late, None, 64)
        stream.synchronize()
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    assert same_bits(late, dense)
    assert same_bits(again, select_topk(dense, None, 64))


def test_a_call_does_not_wait_for_the_device(cupy, busy):
    """No hidden synchronisation: the host returns while the stream is still busy."""
    here = SPEC.build().to(cupy)
    out = cupy.full((4, 64), POISON, np.int32)
    op = MLAIndexerRaggedFloat8Paged(**SPEC.build().params)
    op.execute(out, *here.args)  # compiled and warm
    with cupy.cuda.Stream(non_blocking=True) as stream:
        op.execute(out, *here.args)
        stream.synchronize()
        busy()
        op.execute(out, *here.args)
        assert not stream.done, "the call waited"
        stream.synchronize()


def test_results_are_on_the_inputs_device(cupy):
    devices = cupy.cuda.runtime.getDeviceCount()
    for device in range(devices):
        with cupy.cuda.Device(device):
            here = SPEC.build().to(cupy)
        # the current device need not be the arrays' own
        with cupy.cuda.Device((device + 1) % devices):
            results = [*index_topk(*here.args, k=9, return_scores=True), index_scores(*here.args)]
            results.append(select_topk(results[-1], None, 9))
        for result in results:
            assert result.device.id == device
        with cupy.cuda.Device(device):
            assert same_bits(results[0], index_topk(*here.args, k=9))


def test_a_captured_graph_replays_with_the_same_bits(cupy):
    """Frozen maxima, new lengths and queries: a replay equals an ordinary call on the same."""
    old, new = _two_problems()
    bounds = {"k_max_lengths": np.array([[3, 905]], np.uint32)}
    here = old.to(cupy).replace(**bounds)
    op = MLAIndexerRaggedFloat8Paged(**old.params)
    out = cupy.full((4, 64), POISON, np.int32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        memory = op.workspace(*here.args)
        op(*here.args, out=out, workspace=memory)  # compiles
        stream.synchronize()
        out[...] = POISON
        stream.begin_capture()
        op(*here.args, out=out, workspace=memory)
        graph = stream.end_capture()
        stream.synchronize()
        assert (host(out) == POISON).all(), "capturing must not run anything"
        for case in (old, new, old.replace(k_cache_lengths=np.array([17, 450], np.uint32))):
            fresh = case.to(cupy)
            for name in ("q", "qs", "k_cache_lengths"):
                getattr(here, name)[...] = getattr(fresh, name)
            graph.launch(stream)
            stream.synchronize()
            assert same_bits(out, op(*here.args))
            stream.synchronize()


DECODE = {
    "short rows": Spec((1,) * 4, (1500, 5000, 3000, 700), num_heads=64, depth=128, k=256),
    "long rows": Spec((1,) * 2, (90_000, 40_000), num_heads=64, depth=128, k=256),
}


@pytest.mark.parametrize("before", ["kernel", "copy", "two streams", "an earlier call"])
@pytest.mark.parametrize("name", DECODE)
def test_decode_reads_what_came_before(name, before, cupy, busy):
    """Its launches begin early. What they read was written just before, called and replayed."""
    case = DECODE[name].build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    fresh = here.k_cache_lengths.copy()
    want, memory, out = op(*here.args), op.workspace(*here.args), cupy.empty((4, 256), np.int32)
    out = out[: want.shape[0]]
    here.k_cache_lengths[...] = 300
    assert not same_bits(op(*here.args), want), "the lengths must matter"
    other = cupy.cuda.Stream(non_blocking=True)

    def call(stream):
        out.fill(POISON)
        here.k_cache_lengths.fill(300)
        if before == "an earlier call":
            op(*here.args, out=out, workspace=memory)
        if before == "two streams":
            other.wait_event(stream.record())
            with other:
                cupy.add(fresh, 0, out=here.k_cache_lengths)
            stream.wait_event(other.record())
        elif before == "copy":
            cupy.cuda.runtime.memcpyAsync(
                here.k_cache_lengths.data.ptr, fresh.data.ptr, fresh.nbytes, 3, stream.ptr
            )
        else:
            cupy.add(fresh, 0, out=here.k_cache_lengths)
        op(*here.args, out=out, workspace=memory)

    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        busy()
        call(stream)
        stream.synchronize()
        assert same_bits(out, want)
        stream.begin_capture()
        call(stream)
        graph = stream.end_capture()
        for _ in range(20):
            graph.launch(stream)
        stream.synchronize()
    assert same_bits(out, want)
