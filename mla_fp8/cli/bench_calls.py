"""What the benchmark times on a GPU: our launches and those of the peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from mla_fp8.cli.cases import Arrays, Case
from mla_fp8.cli.timer import gpu_torch, peer
from mla_fp8.indexer import MLAIndexerRaggedFloat8Paged

_PEER_HEADS, _PEER_PAGE = (32, 64), 64

Calls = list[Callable[[], object]]


def operator(case: Case) -> MLAIndexerRaggedFloat8Paged:
    """The operator of a case; a key has one scale."""
    one_scale = case.depth
    return MLAIndexerRaggedFloat8Paged(
        case.num_heads, case.depth, case.k, one_scale, kpool=case.kpool
    )


def scoring(case: Case, arrays: Arrays) -> Calls:
    """A launch of the scoring kernel for each page table, on work scheduled beforehand."""
    import cupy

    from mla_fp8._check.problem import Inputs, check_problem
    from mla_fp8._check.shape import Parameters
    from mla_fp8._cuda import backend
    from mla_fp8._plan.scoring import plan_scores
    from mla_fp8._plan.tuning import H200

    parameters = Parameters(case.num_heads, case.depth, 1, True, case.kpool)
    device = backend.device_facts(cupy.cuda.Device().id)
    calls: Calls = []
    out = None
    for table in arrays.tables:
        problem = check_problem(Inputs(*arrays.inputs(table)), parameters, False)
        if out is None:
            out = cupy.empty((sum(case.new), problem.shape.max_keys), np.float32)
        pipeline = backend.ScoresPipeline(
            problem.shape, plan_scores(problem.shape, device, H200), device
        )
        memory = cupy.empty(pipeline.workspace.size, np.uint8)
        pipeline.bind(problem, out, memory.data.ptr)
        pipeline.schedule(cupy.cuda.get_current_stream().ptr)

        def call(pipeline: Any = pipeline, kept: Any = (out, problem, memory)) -> None:
            pipeline.score(cupy.cuda.get_current_stream().ptr)  # parameters hold addresses alone

        calls.append(call)
    return calls


def whole(case: Case, arrays: Arrays, *, bound: bool = False) -> Calls:
    """The whole operation, a call per table; ``bound``: one bound call, on the first table."""
    import cupy

    op = operator(case)
    calls: Calls = []
    out, memory = cupy.empty((sum(case.new), case.k), np.int32), None
    for table in arrays.tables:
        inputs = arrays.inputs(table)
        memory = op.workspace(*inputs) if memory is None else memory
        if bound:
            return [op.bind(*inputs, out=out, check=False, workspace=memory)]
        calls.append(partial(op, *inputs, out=out, check=False, workspace=memory))
    return calls


def torch_topk(case: Case, arrays: Arrays) -> Calls | None:
    """`torch.topk` on our scores, -inf where a token does not see the key, and scoring before."""
    torch = gpu_torch()
    if torch is None:
        return None
    op = operator(case)
    inputs = arrays.inputs(arrays.tables[0])
    out, memory = op.scores(*inputs, check=False), op.workspace(*inputs, for_scores=True)
    matrix, k = torch.as_tensor(out), min(case.k, out.shape[1])
    calls: Calls = []
    for table in arrays.tables:
        inputs = arrays.inputs(table)
        score = partial(op.scores, *inputs, out=out, check=False, workspace=memory)

        def call(score: Callable[[], object] = score) -> object:
            score()
            return torch.topk(matrix, k, dim=1)

        calls.append(call)
    return calls


def deep_gemm(case: Case, arrays: Arrays) -> Calls | None:
    """The same scores by DeepGEMM: contiguous keys for one sequence's prefill, else pages."""
    gemm, torch = peer("deep_gemm"), gpu_torch()
    if gemm is None or torch is None or case.kpool != 1:
        return None
    if case.num_heads not in _PEER_HEADS or case.depth != 128:
        return None
    e4m3 = torch.float8_e4m3fn
    q, qs = torch.as_tensor(arrays.q).view(e4m3), torch.as_tensor(arrays.qs)
    tokens, batch = sum(case.new), len(case.new)
    longest = max(case.keys)
    if batch == 1 and case.new[0] > 2:
        keys = torch.as_tensor(arrays.blocks).reshape(-1, case.depth)[: case.keys[0]].view(e4m3)
        scales = torch.as_tensor(arrays.scales).reshape(-1)[: case.keys[0]]
        first = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        last = torch.arange(tokens, dtype=torch.int32, device="cuda")
        last += case.keys[0] - tokens + 1
        return [lambda: gemm.fp8_mqa_logits(q, (keys, scales), qs, first, last)]
    if case.page_size != _PEER_PAGE or len(set(case.new)) > 1 or case.new[0] > 2:
        return None
    q = q.reshape(batch, case.new[0], case.num_heads, case.depth)
    fused = torch.as_tensor(arrays.blocks).reshape(-1, _PEER_PAGE * case.depth)
    scales = torch.as_tensor(arrays.scales).reshape(-1, _PEER_PAGE).view(torch.uint8)
    cache = torch.cat([fused, scales], 1).reshape(-1, _PEER_PAGE, 1, case.depth + 4)
    lengths = torch.as_tensor(arrays.keys)
    steps = torch.arange(case.new[0], device="cuda", dtype=torch.int32) - case.new[0] + 1
    lengths = (lengths[:, None] + steps).contiguous()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    plan = gemm.get_paged_mqa_logits_metadata(lengths, _PEER_PAGE, processors)
    calls: Calls = []
    for table in arrays.tables:
        pages = torch.as_tensor(table.view(np.int32))

        def call(pages: Any = pages) -> Any:
            return gemm.fp8_paged_mqa_logits(q, cache, qs, lengths, pages, plan, longest)

        calls.append(call)
    return calls
