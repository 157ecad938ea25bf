"""Scratch memory of the caller's: checked, sufficient, and what lets a CUDA graph be captured."""

import dataclasses

import numpy as np
import oracle
import pytest
from generators import Spec
from properties import POISON, host, same_bits

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, select_topk

SPEC = Spec((3, 1, 0, 2), (700, 30, 5, 1300), num_heads=8, depth=64, k=64)
OPTIONS = [(s, r) for s in ("position", "score") for r in (False, True)]


@pytest.mark.parametrize(("sort", "return_scores"), OPTIONS)
def test_a_workspace_changes_no_bit_and_is_large_enough(sort, return_scores, xp):
    """Canaries stand behind it."""
    case = SPEC.build()
    here, op = case.to(xp), MLAIndexerRaggedFloat8Paged(**case.params)
    options = {"sort": sort, "return_scores": return_scores}
    want = op(*here.args, **options)
    memory = op.workspace(*here.args, **options)
    assert memory.dtype == np.uint8
    assert memory.shape == (op.scratch_bytes(*here.args, **options),)
    room = xp.full(memory.size + 4096, 0xA5, np.uint8)
    found = op(*here.args, **options, workspace=room[: memory.size])
    pairs = zip(found, want, strict=True) if return_scores else [(found, want)]
    assert all(same_bits(a, b) for a, b in pairs)
    assert (host(room)[memory.size :] == 0xA5).all()


def test_a_wrong_workspace_is_refused(xp):
    case = SPEC.build()
    here, op = case.to(xp), MLAIndexerRaggedFloat8Paged(**case.params)
    size = op.scratch_bytes(*here.args)
    room = xp.empty(max(size, 4 * 64 * case.tokens), np.uint8)
    out = room[: 4 * 64 * case.tokens].view(np.int32).reshape(case.tokens, 64)
    out[...] = POISON
    wrong = {
        "must be uint8 \\[bytes\\]; got int8": xp.empty(size, np.int8),
        "must be uint8 \\[bytes\\]; got uint8": xp.empty((size, 1), np.uint8),
        "must be C-contiguous": xp.empty(2 * size + 4, np.uint8)[::2],
        "must not overlap out": room,
    }
    if size:
        wrong[f"must have at least {size} bytes; got {size - 1}"] = xp.empty(size - 1, np.uint8)
        wrong["must start at a multiple of 16 bytes"] = xp.empty(size + 8, np.uint8)[8:]
    for message, workspace in wrong.items():
        with pytest.raises(ValueError, match=f"workspace {message}"):
            op(*here.args, out=out, workspace=workspace)
        assert (host(out) == POISON).all()


@pytest.mark.gpu
def test_what_takes_memory_of_its_own_cannot_be_captured(cupy):
    case = SPEC.build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    dense = index_scores(*here.args)
    op(*here.args)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="workspace must be given while a CUDA graph"):
            op(*here.args)
        with pytest.raises(RuntimeError, match="select_topk cannot be called while a CUDA graph"):
            select_topk(dense, None, 5)
        with pytest.raises(RuntimeError, match="index_scores cannot be called while a CUDA graph"):
            index_scores(*here.args)
        stream.end_capture()


@pytest.mark.gpu
def test_a_captured_call_allocates_nothing(cupy):
    case = SPEC.build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    out, memory = op(*here.args), op.workspace(*here.args)

    def refuse(size):
        raise AssertionError(f"{size} bytes were asked for")

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(refuse):
        stream.begin_capture()
        op(*here.args, out=out, workspace=memory)
        stream.end_capture()


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
        before = cupy.cuda.Device().mem_info[0], cupy.get_default_memory_pool().total_bytes()
        for _ in range(10_000):
            graph.launch(stream)
        stream.synchronize()
    assert before == (
        cupy.cuda.Device().mem_info[0],
        cupy.get_default_memory_pool().total_bytes(),
    )
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
