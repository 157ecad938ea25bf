"""torch's tensors on torch's current stream: late producers, graphs, CuPy beside, threads.

torch's streams do not wait for the default stream, on which calls went before. So each of these
read what a producer that sleeps first had not written yet.
"""

import threading

import numpy as np
import pytest
from generators import Spec
from properties import POISON, same_bits, tensors_on_gpu

from mla_fp8 import (
    MLAIndexerRaggedFloat8Paged,
    PagedKeyCache,
    fp8,
    index_scores,
    index_topk,
    select_topk,
)
from mla_fp8._check.problem import Inputs
from mla_fp8._plan.topk import plan_topk
from mla_fp8._plan.tuning import Tuning

pytestmark = pytest.mark.gpu

SPEC = Spec((3, 1), (300, 900), num_heads=16, k=64, fp8_dtype="uint8", index_dtype="int32")
LARGE = Spec((2048,), (14336,), num_heads=8, depth=64, k=64, fp8_dtype="uint8", index_dtype="int32")
LATE = 40_000_000  # cycles, some 20 ms
OP = MLAIndexerRaggedFloat8Paged(**SPEC.build().params)


@pytest.fixture
def torch(torch_on_gpu):
    return torch_on_gpu


def _two_problems(spec=SPEC):
    """Same shapes and lengths, other queries."""
    one, two = spec.build(), Spec(**{**vars(spec), "seed": 1}).build()
    return one, one.replace(q=two.q, qs=two.qs)


def _copy_queries(here: list, fresh: list) -> None:
    here[0].copy_(fresh[0])
    here[1].copy_(fresh[1])


def _execute(torch, arguments):
    out = torch.full((4, OP.k), POISON, dtype=torch.int32, device="cuda")
    OP.execute(out, *arguments)
    return out


def _with_out(torch, arguments):
    out = torch.empty((4, OP.k), dtype=torch.int32, device="cuda")
    assert OP(*arguments, out=out) is out
    return out


CALLS = {
    "operator": lambda torch, a: OP(*a, return_scores=True),
    "execute": _execute,
    "out": _with_out,
    "workspace": lambda torch, a: OP(*a, workspace=OP.workspace(*a)),
    "check": lambda torch, a: OP(*a, check=True),
    "index_topk": lambda torch, a: index_topk(*a, k=70, sort="score"),
    "index_scores": lambda torch, a: index_scores(*a),
    "select_topk": lambda torch, a: select_topk(a[1], None, 5, sort="score"),
    "quantize": lambda torch, a: fp8.quantize(a[1]),
    "dequantize": lambda torch, a: fp8.dequantize(a[0][..., 0].contiguous(), a[1]),
}


def _call(name: str, torch, arguments) -> list:
    """Results as tensors of bytes, made by what torch does next on the stream."""
    results = CALLS[name](torch, arguments)
    results = results if isinstance(results, tuple) else (results,)
    assert all(isinstance(r, torch.Tensor) and r.is_cuda for r in results)
    return [result.contiguous().view(torch.uint8).clone() for result in results]


def _equal(torch, found: list, want: list) -> bool:
    torch.cuda.synchronize()
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("where", ["side", "default"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_reads_what_torch_wrote_before_it(name, where, cupy, torch):
    old, new = _two_problems()
    here, fresh = tensors_on_gpu(torch, old), tensors_on_gpu(torch, new)
    want, stale = _call(name, torch, fresh), _call(name, torch, here)
    assert not _equal(torch, want, stale), "the two problems must differ"
    theirs = torch.cuda.Stream() if where == "side" else torch.cuda.default_stream()
    for _ in range(6):
        _copy_queries(here, tensors_on_gpu(torch, old))
        torch.cuda.synchronize()
        with cupy.cuda.Stream(non_blocking=True), torch.cuda.stream(theirs):
            torch.cuda._sleep(LATE)
            _copy_queries(here, fresh)
            found = _call(name, torch, here)
        assert _equal(torch, found, want)


def test_a_call_does_not_wait_for_torch(torch):
    here = tensors_on_gpu(torch, SPEC.build())
    out = torch.empty((4, OP.k), dtype=torch.int32, device="cuda")
    OP.execute(out, *here)
    with torch.cuda.stream(torch.cuda.Stream()):
        OP.execute(out, *here)
        torch.cuda.synchronize()
        torch.cuda._sleep(10 * LATE)
        OP.execute(out, *here)
        assert not torch.cuda.current_stream().query(), "the call waited"


@pytest.mark.parametrize("given", ["out", "no out"])
def test_torch_captures_a_call_and_replays_it(given, torch):
    old, new = _two_problems()
    here, fresh = tensors_on_gpu(torch, old), tensors_on_gpu(torch, new)
    want, stale = OP(*fresh), OP(*here)
    memory = OP.workspace(*here)
    assert memory.dtype == torch.uint8
    out = torch.full_like(want, POISON) if given == "out" else None
    OP(*here, out=out, workspace=memory)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP(*here, out=out, workspace=memory)
    for arguments, expected in ((fresh, want), (tensors_on_gpu(torch, old), stale), (fresh, want)):
        _copy_queries(here, arguments)
        out.fill_(POISON)
        graph.replay()
        assert _equal(torch, [out], [expected])


def test_torch_captures_a_call_of_many_launches(hopper_gpu, torch):
    """It has streams of its own, first made while torch captures, and ends joined to torch's."""
    from mla_fp8._cuda import backend

    old, new = _two_problems(LARGE)
    here, fresh = tensors_on_gpu(torch, old), tensors_on_gpu(torch, new)
    op = MLAIndexerRaggedFloat8Paged(**old.params)
    shape = op._problem(Inputs(*here), False).shape
    device = backend.device_facts(0)
    assert plan_topk(shape, op.k, False, False, device, Tuning()).mode.pipelined
    want, out, memory = op(*fresh), op(*here), op.workspace(*here)
    assert not _equal(torch, [out], [want])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(*here, out=out, workspace=memory)
    _copy_queries(here, fresh)
    graph.replay()
    assert _equal(torch, [out], [want])


def test_capture_without_a_workspace_is_refused_and_harms_nothing(torch):
    here = tensors_on_gpu(torch, SPEC.build())
    want, dense, counter = OP(*here), index_scores(*here), torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        counter += 1
        with pytest.raises(RuntimeError, match="workspace must be given while a CUDA graph"):
            OP(*here)
        with pytest.raises(RuntimeError, match="workspace must be given while a CUDA graph"):
            select_topk(dense, None, 5, sort="score")
        with pytest.raises(RuntimeError, match="workspace must be given while a CUDA graph"):
            index_scores(*here)
    graph.replay()
    with torch.cuda.stream(stream):
        found = OP(*here)
    assert _equal(torch, [found, counter], [want, torch.ones(1, device="cuda")])


def test_a_captured_call_takes_arrays_of_cupy_beside(cupy, torch):
    """Their stream is not captured: no event of it may be waited for."""
    old, new = _two_problems()
    here, fresh = tensors_on_gpu(torch, old), tensors_on_gpu(torch, new)
    here[4:6] = [cupy.asarray(array) for array in (old.k_cache_lengths, old.k_lookup_table)]
    want, out, memory = OP(*fresh), OP(*here), OP.workspace(*here)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), cupy.cuda.Stream(non_blocking=True):
        OP(*here, out=out, workspace=memory)
    _copy_queries(here, fresh)
    graph.replay()
    assert _equal(torch, [out], [want])


@pytest.mark.parametrize("first", ["torch", "CuPy"])
def test_two_libraries_wait_for_one_another(first, cupy, torch):
    """Both write late, and both write again right after the call, which must not see that."""
    old, new = _two_problems()
    here, fresh = tensors_on_gpu(torch, old), tensors_on_gpu(torch, new)
    want = OP(*fresh, return_scores=True)
    mine = 1 if first == "torch" else 0  # CuPy's argument; the other of q and qs is torch's
    here[mine] = cupy.asarray(here[mine])
    late = cupy.from_dlpack(fresh[mine])
    spare = here[1 - mine].clone()
    torch.cuda.synchronize()
    for _ in range(6):
        with cupy.cuda.Stream(non_blocking=True), torch.cuda.stream(torch.cuda.Stream()):
            producer = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)
            for stream in (producer, torch.cuda.current_stream()):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(LATE)
            here[mine][...] = late
            here[1 - mine].copy_(fresh[1 - mine])
            found = OP(*here, return_scores=True)
            here[mine][...] = 0
            here[1 - mine].copy_(spare)
            if first == "torch":
                assert all(isinstance(f, torch.Tensor) for f in found)
            else:
                assert all(isinstance(f, cupy.ndarray) for f in found)
                found = [f.copy() for f in found]
        torch.cuda.synchronize()
        assert all(same_bits(f, w) for f, w in zip(found, want, strict=True))


def test_a_cupy_out_is_cupys_to_read(cupy, torch):
    here = tensors_on_gpu(torch, SPEC.build())
    want = OP(*here)
    out = cupy.full((4, OP.k), POISON, np.int32)
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LATE)
        assert OP(*here, out=out) is out
        assert same_bits(out.copy(), want)


def test_memory_freed_after_a_call_is_not_written_under_it(cupy, torch):
    """The call waits on CuPy's stream; torch gives its inputs to others meanwhile."""
    case = SPEC.build()
    want = OP(*tensors_on_gpu(torch, case))
    here = tensors_on_gpu(torch, case)
    here[0] = cupy.asarray(case.q)
    mine = here[1].clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), cupy.cuda.Stream(non_blocking=True) as stream:
        here[1] = mine.clone()
        address = here[1].data_ptr()
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(LATE)
        found = OP(*here)
        here[1] = None
        others = [torch.zeros_like(mine) for _ in range(4)]
        assert any(other.data_ptr() == address for other in others), "the memory is taken again"
        stream.synchronize()
        assert same_bits(found, want)


def test_a_result_is_torchs_own_memory(torch):
    """`record_stream` works on it: freed while another stream reads, it is not given away."""
    here, fresh = (tensors_on_gpu(torch, case) for case in _two_problems())
    want, other = OP(*here), OP(*fresh)
    assert not _equal(torch, [want], [other])
    side = torch.cuda.Stream()
    found = OP(*here)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(LATE)
        copy = found.clone()
    found.record_stream(side)
    del found
    others = [OP(*fresh) for _ in range(8)]
    assert _equal(torch, [copy, *others], [want, *[other] * 8])


def test_threads_have_a_stream_each(torch):
    specs = [Spec(**{**vars(SPEC), "seed": seed}) for seed in range(4)]
    problems = [tensors_on_gpu(torch, spec.build()) for spec in specs]
    wants = [OP(*problem) for problem in problems]
    torch.cuda.synchronize()
    wrong, start = [], threading.Barrier(len(specs))

    def work(number: int) -> None:
        q = problems[number][0]
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                late = torch.zeros_like(q)
                torch.cuda._sleep(LATE // 10)
                late.copy_(q)
                found = OP(late, *problems[number][1:])
                if not torch.equal(found, wants[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_takes_keys_that_torch_writes_late(dtype, cupy, torch):
    keys = np.random.default_rng(0).standard_normal((2, 70, 64)).astype(np.float32)
    fresh = torch.from_numpy(keys).to("cuda", getattr(torch, dtype))
    plain = fresh.float().cpu().numpy()
    want = PagedKeyCache.from_dense([key[:1] for key in plain])
    want.append([key[1:] for key in plain])
    cache = PagedKeyCache.from_dense([key[:1] for key in fresh])
    assert isinstance(cache.k_scales, cupy.ndarray)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = torch.zeros_like(fresh)
        torch.cuda._sleep(LATE)
        late.copy_(fresh)
        cache.append([key[1:] for key in late])
        late.zero_()
    assert same_bits(cache.k_blocks, want.k_blocks.view(np.uint8))
    assert same_bits(cache.k_scales, want.k_scales)


def test_empty_tensors_have_a_device(torch):
    here = tensors_on_gpu(torch, Spec(**{**vars(SPEC), "seq_lens": (0, 0)}).build())
    found, scores = OP(*here, return_scores=True)
    assert (tuple(found.shape), found.dtype, found.is_cuda) == ((0, OP.k), torch.int32, True)
    assert (tuple(scores.shape), scores.dtype) == ((0, OP.k), torch.float32)
