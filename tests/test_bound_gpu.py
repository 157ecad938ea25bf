"""A bound call on a GPU: streams, devices, graphs, memory, and torch beside it."""

import threading
import time

import numpy as np
import pytest
from generators import Spec
from properties import POISON, host, same_bits, takes_no_memory, tensors_on_gpu
from test_gpu_stream import SPIN

from mla_fp8 import MLAIndexerRaggedFloat8Paged
from mla_fp8._check.problem import Inputs

pytestmark = pytest.mark.gpu

SPECS = {
    "decode": Spec((3, 1), (300, 900), num_heads=16, k=64),
    "by score": Spec((3, 1), (300, 90_000), num_heads=64, k=300),
    "side by side": Spec((2048,), (14336,), num_heads=8, depth=64, k=64),
}
LATE = 40_000_000  # cycles, some 20 ms


def _sort(name) -> dict:
    return {"sort": "score"} if name == "by score" else {}


def _two(spec, cupy):
    """The operator, and two problems of the same shapes and lengths with other queries."""
    one, two = spec.build(), Spec(**{**vars(spec), "seed": 1}).build()
    op = MLAIndexerRaggedFloat8Paged(**one.params)
    return op, one.to(cupy), one.replace(q=two.q, qs=two.qs).to(cupy)


def _copy_queries(here, fresh) -> None:
    here.q[...] = fresh.q
    here.qs[...] = fresh.qs


@pytest.fixture
def busy(cupy):
    """Keeps the current stream busy for about a tenth of a second."""
    kernel = cupy.RawKernel(SPIN, "spin")
    return lambda: kernel((1,), (1,), (np.int64(200_000_000),))


def test_one_of_the_specs_scores_and_selects_side_by_side(hopper_gpu):
    from mla_fp8._cuda import backend

    op, here, _ = _two(SPECS["side by side"], hopper_gpu)
    problem = op._problem(Inputs(*here.args), False)
    assert backend.topk_plan(problem, op.k, False, False).mode.pipelined


@pytest.mark.parametrize("name", SPECS)
def test_calls_run_on_the_current_stream(name, cupy, busy):
    """It need not be the stream of binding. Inputs are written late on it."""
    op, here, fresh = _two(SPECS[name], cupy)
    want, call = op(*fresh.args, **_sort(name)), op.bind(*here.args, **_sort(name))
    assert not same_bits(call(), want)
    old = here.replace(q=here.q.copy(), qs=here.qs.copy())
    for _ in range(2):
        _copy_queries(here, old)
        cupy.cuda.Device().synchronize()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            busy()
            _copy_queries(here, fresh)
            call()
            assert not stream.done, "the call waited"
            assert same_bits(call.results.copy(), want)


@pytest.mark.parametrize("mode", ["Global", "ThreadLocal", "Relaxed"])
@pytest.mark.parametrize("name", SPECS)
def test_a_caller_may_capture_calls_in_a_graph(name, mode, cupy):
    """Beside other work, and beside calls outside of the graph."""
    op, here, fresh = _two(SPECS[name], cupy)
    old = here.replace(q=here.q.copy(), qs=here.qs.copy())
    wants = [op(*case.args, **_sort(name)) for case in (fresh, old)]
    call = op.bind(*here.args, **_sort(name))
    copy = call.results.copy()
    call.results.fill(POISON)
    copy[...] = call.results  # CuPy compiles both before the capture
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture(getattr(cupy.cuda.runtime, f"streamCaptureMode{mode}"))
        call.results.fill(POISON)
        call()
        copy[...] = call.results
        call()
        graph = stream.end_capture()
        for case, want in zip((fresh, old, fresh), (*wants, wants[0]), strict=True):
            _copy_queries(here, case)
            graph.launch(stream)
            assert same_bits(copy, want)
            call.results.fill(POISON)
            assert same_bits(call(), want)


def test_binding_during_a_capture_is_refused(cupy):
    op, here, _ = _two(SPECS["decode"], cupy)
    out, memory = op(*here.args), op.workspace(*here.args)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="bind must be called before a CUDA graph is"):
                op.bind(*here.args, out=out, workspace=memory)
        finally:
            stream.end_capture()


@pytest.mark.parametrize("name", SPECS)
def test_calls_allocate_nothing(name, cupy):
    op, here, _ = _two(SPECS[name], cupy)
    want, call = op(*here.args, **_sort(name)), op.bind(*here.args, **_sort(name))

    def refuse(size):
        raise AssertionError(f"{size} bytes were asked for")

    with cupy.cuda.using_allocator(refuse):
        for _ in range(3):
            call()

        def a_hundred_calls():
            for _ in range(100):
                call()

        assert takes_no_memory(a_hundred_calls)
    assert same_bits(call.results, want)


def test_binding_writes_nothing(cupy):
    op, here, _ = _two(SPECS["decode"], cupy)
    out, memory = op(*here.args), op.workspace(*here.args)
    out.fill(POISON)
    call = op.bind(*here.args, out=out, workspace=memory)
    assert (host(out) == POISON).all()
    assert same_bits(call(), op(*here.args))


def test_on_a_device_that_is_not_current(cupy):
    devices = cupy.cuda.runtime.getDeviceCount()
    for device in range(devices):
        with cupy.cuda.Device(device):
            op, here, fresh = _two(SPECS["decode"], cupy)
        with cupy.cuda.Device((device + 1) % devices):
            call = op.bind(*here.args)
            call()
            with cupy.cuda.Device(device):
                _copy_queries(here, fresh)
            assert call().device.id == device
        with cupy.cuda.Device(device):
            assert same_bits(call.results, op(*fresh.args))


def test_one_graph_serves_every_batch_that_fits(cupy):
    """Random offsets, lengths and tables, against a call of their own."""
    rng = np.random.default_rng(0)
    base = Spec((2, 2, 2, 1), (3000,) * 4, num_heads=64, k=300, page_size=16).build()
    op, here = MLAIndexerRaggedFloat8Paged(**base.params), base.to(cupy)
    here = here.replace(k_max_lengths=np.array([[4, 3000]], np.uint32))
    scales = cupy.asarray(rng.random(here.k_scales.shape, np.float32))
    here.k_scales[...] = scales
    here.k_blocks[...] = cupy.asarray(rng.integers(0, 127, here.k_blocks.shape, np.uint8))
    call = op.bind(*here.args, return_scores=True)
    blocks, pages = len(here.k_blocks), here.k_lookup_table.shape[1]
    for _ in range(300):
        cuts = np.sort(rng.integers(0, 8, 3))
        offsets = np.concatenate([[0], cuts, [7]])
        if np.diff(offsets).max() > 4:
            continue
        here.input_row_offsets[...] = cupy.asarray(offsets, dtype=np.uint32)
        here.k_cache_lengths[...] = cupy.asarray(rng.integers(0, 3000, 4), dtype=np.uint32)
        table = rng.integers(0, blocks, (4, pages))
        here.k_lookup_table[...] = cupy.asarray(table, dtype=np.uint32)
        want = op(*here.args, return_scores=True)
        assert all(same_bits(a, b) for a, b in zip(call(), want, strict=True))


def test_threads_on_streams_of_their_own(cupy):
    """Each has a bound call, and all call one more under a lock that orders its results."""
    problems = [_two(Spec(**{**vars(SPECS["decode"]), "seed": n}), cupy) for n in (3, 4, 5, 6)]
    wants = [op(*here.args) for op, here, _ in problems]
    calls = [op.bind(*here.args) for op, here, _ in problems]
    shared, lock, wrong = calls[0], threading.Lock(), []
    start = threading.Barrier(len(calls))
    cupy.cuda.Device().synchronize()

    def work(number: int) -> None:
        start.wait()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(200):
                with lock:
                    if not same_bits(shared().copy(), wants[0]):
                        wrong.append(number)
                    stream.synchronize()
                if number and not same_bits(calls[number]().copy(), wants[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_call_takes_little_time_of_the_host(cupy):
    """12 us on an H200's host. Three times as many are a fault, not a slow machine."""
    op, here, _ = _two(SPECS["decode"], cupy)
    call, times = op.bind(*here.args), []
    for _ in range(200):
        cupy.cuda.Device().synchronize()
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    assert np.median(times) < 36


@pytest.fixture
def torch(torch_on_gpu):
    return torch_on_gpu


def _torch_problem(torch, cupy, name="decode"):
    spec = Spec(**{**vars(SPECS[name]), "fp8_dtype": "uint8", "index_dtype": "int32"})
    op, here, fresh = _two(spec, cupy)
    return op, tensors_on_gpu(torch, here), tensors_on_gpu(torch, fresh)


@pytest.mark.parametrize("beside", ["torch alone", "CuPy's lengths"])
def test_calls_come_after_what_torch_wrote(beside, cupy, torch):
    """On torch's current stream, or after it where the arrays of two libraries meet."""
    op, here, fresh = _torch_problem(torch, cupy)
    if beside != "torch alone":
        here[4] = cupy.asarray(here[4])
    want, stale = op(*fresh), [here[0].clone(), here[1].clone()]
    call = op.bind(*here)
    assert isinstance(call.results, torch.Tensor)
    assert not torch.equal(call(), want)
    torch.cuda.synchronize()
    for _ in range(4):
        with cupy.cuda.Stream(non_blocking=True), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(LATE)
            here[0].copy_(fresh[0])
            here[1].copy_(fresh[1])
            found = call().clone()
            here[0].copy_(stale[0])
            here[1].copy_(stale[1])
        torch.cuda.synchronize()
        assert torch.equal(found, want)


@pytest.mark.parametrize("name", ["decode", "side by side"])
def test_torch_captures_calls(name, cupy, torch):
    op, here, fresh = _torch_problem(torch, cupy, name)
    want, call = op(*fresh), op.bind(*here)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call() + 1
    here[0].copy_(fresh[0])
    here[1].copy_(fresh[1])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, want + 1)
    assert torch.equal(call(), want)
