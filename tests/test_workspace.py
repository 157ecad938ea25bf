"""Scratch memory from the caller: checked, large enough, and used in captured CUDA graphs."""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from generators import Spec
from properties import POISON, host, same_bits, takes_no_memory

from mla_fp8 import (
    MLAIndexerRaggedFloat8Paged,
    index_scores,
    index_topk,
    select_topk,
    topk_workspace,
)
from mla_fp8.cli import oracle

SPEC = Spec((3, 1, 0, 2), (700, 30, 5, 1300), num_heads=8, depth=64, k=64)
LONG = Spec((2, 1), (40_000, 9), num_heads=64, depth=128, k=5000)  # k beyond the fast path


@dataclasses.dataclass
class Call:
    """A public function with its inputs, and what it takes to call it without allocations."""

    run: Callable
    workspace: Callable

    def outputs(self, xp) -> list:
        """Its results' arrays, in memory of their own, filled with garbage."""
        found = self.run()
        found = found if isinstance(found, tuple) else (found,)
        return [xp.full(a.shape, POISON, a.dtype) for a in found]

    def into(self, outputs: list, **options) -> None:
        self.run(out=outputs[0] if len(outputs) == 1 else tuple(outputs), **options)


def _call(function, workspace, *arguments, memory=None, **options) -> Call:
    return Call(
        partial(function, *arguments, **options),
        partial(workspace, *arguments, **(options if memory is None else memory)),
    )


BOTH = {"return_scores": True, "sort": "score"}
DENSE = {"for_scores": True}
CALLS = {  # every public function that takes a workspace, of: operator, its inputs, scores, lengths
    "operator": lambda op, a, *_: _call(op, op.workspace, *a),
    "operator, by score": lambda op, a, *_: _call(op, op.workspace, *a, sort="score"),
    "operator, with scores": lambda op, a, *_: _call(op, op.workspace, *a, return_scores=True),
    "operator, both": lambda op, a, *_: _call(op, op.workspace, *a, **BOTH),
    "index_topk": lambda op, a, *_: Call(
        partial(index_topk, *a, k=op.k), partial(op.workspace, *a)
    ),
    "scores": lambda op, a, *_: _call(op.scores, op.workspace, *a, memory=DENSE),
    "index_scores": lambda op, a, *_: _call(index_scores, op.workspace, *a, memory=DENSE),
    "select_topk": lambda op, _, s, n: _call(select_topk, topk_workspace, s, n, op.k),
    "select_topk, all columns": lambda op, _, s, n: _call(
        select_topk, topk_workspace, s, None, op.k
    ),
    "select_topk, by score": lambda op, _, s, n: _call(
        select_topk, topk_workspace, s, None, 9, sort="score"
    ),
    "select_topk, both": lambda op, _, s, n: _call(select_topk, topk_workspace, s, n, op.k, **BOTH),
}


def _build(name, spec, xp):
    """The inputs, the operator, and a call of it or of a function."""
    case = spec.build()
    here, op = case.to(xp), MLAIndexerRaggedFloat8Paged(**case.params)
    scores = op.scores(*here.args)
    lengths = xp.asarray(np.arange(here.tokens, dtype=np.uint32) * 300 % scores.shape[1])
    return here, op, CALLS[name](op, here.args, scores, lengths)


@pytest.mark.parametrize("spec", [SPEC, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", CALLS)
def test_a_workspace_changes_no_bit_and_is_large_enough(name, spec, xp):
    """Canaries stand before and behind it."""
    *_, call = _build(name, spec, xp)
    want = call.run()
    memory = call.workspace()
    assert memory.dtype == np.uint8
    room = xp.full(memory.size + 4096, 0xA5, np.uint8)
    outputs = call.outputs(xp)
    call.into(outputs, workspace=room[2048 : 2048 + memory.size])
    for mine, theirs in zip(outputs, want if isinstance(want, tuple) else (want,), strict=True):
        assert same_bits(mine, theirs)
    canaries = np.delete(host(room), np.s_[2048 : 2048 + memory.size])
    assert (canaries == 0xA5).all()


@pytest.mark.parametrize("name", CALLS)
def test_its_size_is_known_before(name, xp):
    here, op, call = _build(name, SPEC, xp)
    memory = call.workspace()
    if not name.startswith("select"):
        assert memory.shape == (op.scratch_bytes(*here.args, **call.workspace.keywords),)
    if xp is np:
        assert memory.shape == (0,)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_workspace_is_refused(name, xp):
    *_, call = _build(name, SPEC, xp)
    size, outputs = call.workspace().size, call.outputs(xp)
    nbytes = -(-max(size, outputs[0].nbytes) // 16) * 16
    room = xp.zeros(nbytes, np.uint8)
    outputs[0] = room[: outputs[0].nbytes].view(outputs[0].dtype).reshape(outputs[0].shape)
    outputs[0][...] = POISON
    first = call.run.args[0]  # q, or scores
    wrong = {
        "must be uint8 \\[bytes\\]; got int8": xp.empty(size, np.int8),
        "must be uint8 \\[bytes\\]; got uint8": xp.empty((size, 1), np.uint8),
        "must be C-contiguous": xp.empty(2 * size + 4, np.uint8)[::2],
        r"must not overlap out(\[0\])?": room,
        "must not overlap (q|scores)": first.view(np.uint8).reshape(-1),
    }
    if size:
        wrong[f"must have at least {size} bytes; got {size - 1}"] = xp.empty(size - 1, np.uint8)
        wrong["must start at a multiple of 16 bytes"] = xp.empty(size + 8, np.uint8)[8:]
    for message, workspace in wrong.items():
        with pytest.raises(ValueError, match=f"workspace {message}"):
            call.into(outputs, workspace=workspace)
        assert all((host(out) == host(xp.full(1, POISON, out.dtype))).all() for out in outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_without_a_workspace_nothing_is_captured_that_needs_one(name, cupy):
    *_, call = _build(name, SPEC, cupy)
    outputs, size = call.outputs(cupy), call.workspace().size
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            if size:
                with pytest.raises(RuntimeError, match=r"workspace must be given .*CUDA graph"):
                    call.into(outputs)
            else:
                call.into(outputs)
        finally:
            stream.end_capture()


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [SPEC, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_allocates_nothing(name, spec, cupy):
    """Replayed, it gives what a new call on the changed inputs gives."""
    here, _, call = _build(name, spec, cupy)
    outputs, memory = call.outputs(cupy), call.workspace()
    call.into(outputs, workspace=memory)
    stream = cupy.cuda.Stream(non_blocking=True)

    def refuse(size):
        raise AssertionError(f"{size} bytes were asked for")

    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(refuse):
        stream.begin_capture()
        call.into(outputs, workspace=memory)
        graph = stream.end_capture()
    for _ in range(2):
        here.qs[...] = -here.qs[::-1]
        if name.startswith("select"):
            call.run.args[0][...] = call.run.args[0][:, ::-1].copy()
        want = call.run()
        for out in outputs:
            out[...] = POISON
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for mine, theirs in zip(outputs, want if isinstance(want, tuple) else (want,), strict=True):
            assert same_bits(mine, theirs)


def _random_offsets(rng, batch, tokens, most):
    """Of sequences of up to ``most`` tokens."""
    while True:
        cuts = np.sort(rng.integers(0, tokens + 1, batch - 1))
        offsets = np.concatenate([[0], cuts, [tokens]])
        if np.diff(offsets).max() <= most:
            return offsets


@pytest.mark.gpu
@pytest.mark.parametrize("sort", ["position", "score"])
def test_one_graph_serves_every_batch_that_fits(sort, cupy):
    """A thousand random batches, of other lengths, offsets, pages and queries."""
    rng = np.random.default_rng(0)
    tokens, batch, page, columns = 9, 5, 16, 300
    blocks = batch * columns
    base = Spec((2, 2, 2, 2, 1), (4000,) * 5, num_heads=64, depth=128, k=300, page_size=page)
    case = base.build()
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    here = case.to(cupy).replace(
        k_blocks=cupy.asarray(rng.integers(0, 127, (blocks, 1, 1, page, 1, 128), dtype=np.uint8)),
        k_scales=cupy.asarray(rng.random((blocks, 1, 1, page, 1, 1), dtype=np.float32)),
        k_lookup_table=cupy.zeros((batch, columns), np.uint32),
        k_max_lengths=np.array([[4, columns * page - 4]], np.uint32),
    )
    out = cupy.full((tokens, 300), POISON, np.int32)
    memory = op.workspace(*here.args, sort=sort)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        op(*here.args, sort=sort, out=out, workspace=memory)
        stream.begin_capture()
        op(*here.args, sort=sort, out=out, workspace=memory)
        graph = stream.end_capture()
        for turn in range(1000):
            offsets = _random_offsets(rng, batch, tokens, 4)
            lengths = np.exp(rng.uniform(0, np.log(columns * page - 4), batch)).astype(np.uint32)
            here.input_row_offsets[...] = cupy.asarray(offsets, dtype=np.uint32)
            here.k_cache_lengths[...] = cupy.asarray(lengths)
            table = rng.permutation(blocks).reshape(batch, columns).astype(np.uint32)
            here.k_lookup_table[...] = cupy.asarray(table)
            q = rng.integers(0, 127, here.q.shape, dtype=np.uint8)
            here.q[...] = cupy.asarray(q).view(here.q.dtype)
            out[...] = POISON
            graph.launch(stream)
            dense = index_scores(*here.args)
            seen = np.concatenate(
                [
                    np.arange(n) + 1 + int(length)
                    for n, length in zip(np.diff(offsets), lengths, strict=True)
                ]
            )
            want = select_topk(dense, cupy.asarray(seen.astype(np.int32)), 300, sort=sort)
            assert same_bits(out, want), turn
            if turn % 20 == 0:  # and by the oracle, which sorts on the host
                rows, found = host(dense), host(out)
                for row, n, mine in zip(rows, seen, found, strict=True):
                    kept = np.arange(len(row)) < n
                    np.testing.assert_array_equal(mine, oracle.expected_topk(row, kept, 300, sort))


@pytest.mark.gpu
def test_a_hundred_thousand_replays(cupy):
    """Ten batches in a graph, each compared with what a call of its own gave; nothing grows."""
    rng = np.random.default_rng(0)
    case = Spec((1, 2, 1, 1), (20_000,) * 4, num_heads=64, depth=128, k=256).build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    memory = op.workspace(*here.args)
    drawn = np.exp(rng.uniform(0, np.log(19_998), (10, 4))).astype(np.uint32)
    lengths, want = cupy.asarray(drawn), []
    for some in lengths:
        here.k_cache_lengths[...] = some
        want.append(op(*here.args))
    assert len({array.get().tobytes() for array in want}) == 10
    out = cupy.empty_like(want[0])
    wrong = cupy.zeros(out.shape, np.uint32)
    compare = cupy.ElementwiseKernel("int32 a, int32 b", "uint32 wrong", "wrong += a != b")
    stream = cupy.cuda.Stream(non_blocking=True)

    def all_batches():
        for some, expected in zip(lengths, want, strict=True):
            cupy.copyto(here.k_cache_lengths, some)
            out.fill(POISON)
            op(*here.args, out=out, workspace=memory)
            compare(out, expected, wrong)

    cupy.cuda.Device().synchronize()
    with stream:
        all_batches()
        stream.synchronize()
        stream.begin_capture()
        all_batches()
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()

        def a_thousand_replays():
            for _ in range(1000):
                graph.launch(stream)

        assert takes_no_memory(a_thousand_replays, attempts=10)
        stream.synchronize()
    assert int(wrong.sum()) == 0
    out.fill(POISON)
    compare(out, want[-1], wrong)  # and it would have told
    assert int(wrong.sum()) == (host(want[-1]) != POISON).sum()


@pytest.mark.gpu
def test_graphs_of_two_streams_share_nothing(cupy):
    """Sorting needs memory as well: replayed at one time, each graph has its own."""
    spec = Spec((64,), (3000,), num_heads=64, depth=128, k=512)
    cases = [dataclasses.replace(spec, seed=seed).build() for seed in (1, 2)]
    graphs = []
    for case in cases:
        here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
        want, out = op(*here.args, sort="score"), cupy.empty((64, 512), np.int32)
        memory = op.workspace(*here.args, sort="score")
        cupy.cuda.Device().synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            op(*here.args, sort="score", out=out, workspace=memory)
            graphs.append((stream.end_capture(), stream, want, out, here, memory))
    for _ in range(200):
        for graph, stream, _, out, *_ in graphs:
            with stream:
                out[...] = POISON
                graph.launch(stream)
        cupy.cuda.Device().synchronize()
        assert all(same_bits(out, want) for _, _, want, out, *_ in graphs)


@pytest.mark.gpu
def test_after_warmup_nothing_is_compiled(cupy, monkeypatch):
    from mla_fp8._cuda import jit

    case = SPEC.build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    out, memory = cupy.empty((case.tokens, 64), np.int32), op.workspace(*here.args)
    op.warmup(*here.args)
    monkeypatch.setattr(jit, "load", lambda *_: pytest.fail("a kernel was loaded"))
    op(*here.args, out=out, workspace=memory)
    assert same_bits(out, op(*here.args))


def test_the_numpy_backend_needs_no_warmup():
    case = SPEC.build()
    MLAIndexerRaggedFloat8Paged(**case.params).warmup(*case.to(np).args)
