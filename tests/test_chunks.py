"""Bounded workspaces: results are the same however tokens and keys are split into launches."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from generators import Spec
from properties import POISON, host, same_bits

from mla_fp8 import MLAIndexerRaggedFloat8Paged
from mla_fp8._check.outputs import check_selection
from mla_fp8._check.problem import Inputs
from mla_fp8._plan.topk import Mode
from mla_fp8._plan.tuning import H200
from mla_fp8._plan.workspace import SCHEDULED_LAUNCHES

pytestmark = pytest.mark.gpu

# Rows from one key to thousands; some see fewer than k. Bytes of a workspace that splits them.
TOKENS = Spec((1500, 3, 0, 1200), (1000, 2900, 5, 0), num_heads=8, depth=64)
KEYS = Spec((300, 3, 0, 40), (9000, 20000, 5, 4300), num_heads=8, depth=64)
DECODE = Spec((4, 1, 2, 3) * 100, (1000, 2900, 5, 400) * 100, num_heads=8, depth=64)
SPLITS = {
    "tokens": (TOKENS, 20 << 20),
    "tokens and keys": (KEYS, 2 << 20),
    "decode": (DECODE, 4 << 20),
}
SMALL = Spec((90, 0, 10), (100, 3, 6000), num_heads=8, depth=64), 1 << 16


class Splitting:
    """The operator of a case with a limit on the bytes for scores that wait for selection."""

    def __init__(self, case) -> None:
        self._op = MLAIndexerRaggedFloat8Paged(**case.params)
        self.limit(1 << 30)

    def limit(self, size: int) -> None:
        self._tuning = dataclasses.replace(H200, prefill_bytes=size, decode_bytes=size)

    def plan(self, here, sort="position", return_scores=False):
        from mla_fp8._cuda import backend

        problem = self._op._problem(Inputs(*here.args), False)
        by_score = sort == "score"
        return backend.topk_plan(problem, self._op.k, by_score, return_scores, self._tuning)

    def __call__(self, here, sort="position", return_scores=False, out=None, workspace=None):
        from mla_fp8._cuda import backend

        problem = self._op._problem(Inputs(*here.args), False)
        given = self._op.k, sort, return_scores, out, workspace
        selection = check_selection(problem.inputs, *given)
        backend.index_topk(problem, selection, self._tuning)
        return selection.results


def _without_pages(case, first, step):
    """The case with page numbers that do not exist."""
    table = case.k_lookup_table.copy()
    table[:, first::step] = 2**32 - 1
    return case.replace(k_lookup_table=table)


@pytest.mark.parametrize("mask", ["causal", "null"])
@pytest.mark.parametrize("k", [100, 2048, 4096])
@pytest.mark.parametrize("split", SPLITS)
def test_splitting_changes_nothing(split, k, mask, hopper_gpu):
    spec, size = SPLITS[split]
    case = dataclasses.replace(spec, k=k, mask=mask).build()
    here, op, whole = case.to(hopper_gpu), Splitting(case), {}
    for limit in (1 << 30, size):
        op.limit(limit)
        for sort in ("position", "score"):
            for return_scores in (False, True):
                plan = op.plan(here, sort, return_scores)
                assert plan.mode.pipelined == (limit == size)
                if split == "tokens and keys":
                    assert (plan.scoring.split.part_keys < 20000) == (limit == size)
                found = op(here, sort, return_scores)
                found = found if return_scores else (found,)
                want = whole.setdefault((sort, return_scores), found)
                assert all(same_bits(a, b) for a, b in zip(found, want, strict=True)), plan.mode
    assert same_bits(whole["position", False][0], whole["position", True][0])
    assert same_bits(whole["score", False][0], whole["score", True][0])


@pytest.mark.parametrize("values", ["plateau", "wide"])
@pytest.mark.parametrize("split", [*SPLITS, pytest.param("small", marks=pytest.mark.sanitize)])
def test_splitting_changes_nothing_of_hard_scores(split, values, hopper_gpu):
    spec, size = {**SPLITS, "small": SMALL}[split]
    case = dataclasses.replace(spec, k=700, values=values, page_size=16).build()
    here, op = _without_pages(case, 3, 7).to(hopper_gpu), Splitting(case)
    want, bare = op(here, return_scores=True), op(here)
    op.limit(size)
    found = op(here, return_scores=True)
    assert all(same_bits(a, b) for a, b in zip(found, want, strict=True))
    assert same_bits(bare, want[0])
    assert same_bits(op(here), want[0])


def test_splitting_changes_nothing_of_large_k(hopper_gpu):
    """`topk_histogram` selects, in one stream; the scheduler runs again after some launches."""
    case = dataclasses.replace(KEYS, k=5000).build()
    here, op = case.to(hopper_gpu), Splitting(case)
    want = op(here)
    for size in (2 << 20, 1 << 18):
        op.limit(size)
        assert op.plan(here).mode is Mode.SEQUENTIAL
        assert same_bits(op(here), want)
    assert op.plan(here).scoring.scheduled_launches > SCHEDULED_LAUNCHES


@pytest.mark.parametrize("split", SPLITS)
def test_memory_is_what_the_plan_says(split, hopper_gpu):
    cupy, (spec, size) = hopper_gpu, SPLITS[split]
    case = dataclasses.replace(spec, k=100).build()
    here, op = case.to(cupy), Splitting(case)
    out = cupy.empty((case.tokens, 100), np.int32)
    for sort in ("position", "score"):
        for limit in (1 << 30, size):
            op.limit(limit)
            op(here, sort, out=out)  # compiled
            cupy.cuda.Device().synchronize()
            pool = cupy.cuda.MemoryPool()
            with cupy.cuda.using_allocator(pool.malloc):
                op(here, sort, out=out)
            cupy.cuda.Device().synchronize()
            planned = op.plan(here, sort).workspace.size
            assert planned <= pool.total_bytes() <= planned + 512


def test_a_pipeline_is_captured_and_replayed(hopper_gpu):
    """Selection runs in another stream, which must join the capture."""
    cupy, (spec, size) = hopper_gpu, SPLITS["tokens and keys"]
    one = dataclasses.replace(spec, k=100).build()
    two = one.replace(q=dataclasses.replace(spec, k=100, seed=1).build().q)
    here, op = one.to(cupy), Splitting(one)
    want = [host(op(case.to(cupy))) for case in (one, two)]
    op.limit(size)
    out = cupy.full((one.tokens, 100), POISON, np.int32)
    memory, other_memory = (cupy.empty(op.plan(here).workspace.size, np.uint8) for _ in range(2))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        op(here, out=out, workspace=memory)
        stream.synchronize()
        assert same_bits(out, want[0])
        out[...] = POISON
        stream.begin_capture()
        op(here, out=out, workspace=memory)
        # The side streams of a captured stream are captured too, so another stream has its own.
        with cupy.cuda.Stream(non_blocking=True) as other:
            assert same_bits(op(here, workspace=other_memory), want[0])
            other.synchronize()
        graph = stream.end_capture()
        for case, rows in ((one, want[0]), (two, want[1]), (one, want[0])):
            here.q[...] = case.to(cupy).q
            graph.launch(stream)
            stream.synchronize()
            assert same_bits(out, rows)


# Decode and prefill in one batch, sequences without tokens, without cached keys, and short of k.
MIXED = Spec(
    (1, 1, 300, 0, 2, 1, 40, 33, 4, 1),
    (9000, 7, 4000, 50, 0, 2600, 8000, 0, 130, 64),
    num_heads=8,
    depth=64,
)


@pytest.mark.parametrize("mask", ["causal", "null"])
@pytest.mark.parametrize(
    ("page_size", "heads", "depth"),
    [(1, 8, 64), (16, 64, 128), (64, 128, 128), (64, 12, 128), (64, 32, 64), (8, 1, 128)],
)
def test_a_mixed_batch_gives_what_its_sequences_give_alone(
    page_size, heads, depth, mask, hopper_gpu
):
    sizes = {"num_heads": heads, "depth": depth, "page_size": page_size}
    case = dataclasses.replace(MIXED, k=300, mask=mask, **sizes).build()
    here, op = _without_pages(case, 5, 9).to(hopper_gpu), Splitting(case)
    op.limit(6 << 20)
    assert op.plan(here, return_scores=True).mode is Mode.WINDOWS
    found, values = op(here, return_scores=True)
    assert same_bits(op(here), found)
    for b, (first, end) in enumerate(pairwise(map(int, case.input_row_offsets))):
        alone = here.replace(
            q=here.q[first:end],
            qs=here.qs[first:end],
            input_row_offsets=hopper_gpu.asarray([0, end - first], dtype=np.uint32),
            k_cache_lengths=here.k_cache_lengths[b : b + 1],
            k_lookup_table=here.k_lookup_table[b : b + 1],
            k_max_lengths=np.array([[end - first, case.k_cache_lengths[b]]], np.uint32),
        )
        indices, scores = op(alone, return_scores=True)
        assert same_bits(found[first:end], indices), b
        assert same_bits(values[first:end], scores), b


WRONG_OFFSETS = {
    "as they should be": lambda offsets: offsets,
    "tokens of no sequence": lambda offsets: np.clip(offsets, 35, 340),
    "backwards": lambda offsets: offsets[::-1],
    "beyond": lambda offsets: offsets * 3,
    "all zero": lambda offsets: offsets * 0,
}


@pytest.mark.parametrize("spare_pages", [0, 3000])
@pytest.mark.parametrize("cached", ["given", "none", "too many", "negative"])
@pytest.mark.parametrize("offsets", WRONG_OFFSETS)
def test_every_token_is_in_one_launch(offsets, cached, spare_pages, hopper_gpu):
    """Whatever offsets and lengths are, and however much larger their bounds are."""
    case = dataclasses.replace(
        MIXED, k=300, spare_pages=spare_pages, slack=(0, 64 * spare_pages), index_dtype="int32"
    ).build()
    lengths = {
        "given": case.k_cache_lengths,
        "none": case.k_cache_lengths * 0,
        "too many": case.k_cache_lengths + 2**30,
        "negative": case.k_cache_lengths - 4000,
    }[cached]
    given = {
        "input_row_offsets": np.ascontiguousarray(WRONG_OFFSETS[offsets](case.input_row_offsets)),
        "k_cache_lengths": lengths,
    }
    here, op = case.replace(**given).to(hopper_gpu), Splitting(case)
    want = op(here)
    row = 4 * case.k_lookup_table.shape[1] * case.spec.page_size
    for rows in (60, 100, 130):  # windows of 32, 96 and 128 of the longest rows
        op.limit(2 * rows * row)
        plan = op.plan(here)
        assert plan.mode is Mode.WINDOWS
        out = hopper_gpu.full(want.shape, POISON, np.int32)
        op(here, out=out)
        assert same_bits(out, want), plan.scoring.scheduled_launches


def test_more_launches_than_are_scheduled_at_a_time(hopper_gpu):
    case = dataclasses.replace(TOKENS, k=100).build()
    here, op = case.to(hopper_gpu), Splitting(case)
    want = op(here)
    op.limit(1 << 20)
    plan = op.plan(here)
    assert plan.mode is Mode.WINDOWS
    assert plan.scoring.scheduled_launches > SCHEDULED_LAUNCHES
    assert same_bits(op(here), want)


@pytest.mark.parametrize("sort", ["position", "score"])
def test_no_keys_at_all(sort, cupy):
    """More tokens than fit into one part when rows are sorted; none of them sees a key."""
    case = Spec((3000,), (0,), num_heads=8, depth=64, k=2048).build()
    here = case.replace(k_max_lengths=np.zeros((1, 2), np.uint32)).to(cupy)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    assert (host(op(*here.args, sort=sort)) == -1).all()


# Batches and limits with which an earlier version wrote past the end of the workspace
# (test_scratch.py has the reason). The bounds on lengths are far above the lengths.
PAST_THE_END = {
    "causal": (
        32768,
        Spec(
            (12, 23, 14, 3, 0, 3, 23, 1),
            (0,) * 8,
            num_heads=128,
            k=512,
            page_size=128,
            spare_pages=9,
            slack=(17, 10**6),
        ),
    ),
    "null": (
        8192,
        Spec((20, 13, 1, 7, 19), (100, 3, 0, 40, 300), num_heads=64, k=20, mask="null"),
    ),
}


@pytest.mark.parametrize("sort", ["position", "score"])
@pytest.mark.parametrize("name", PAST_THE_END)
def test_nothing_is_written_behind_a_workspace(name, sort, hopper_gpu):
    """The bytes behind it keep their values."""
    size, spec = PAST_THE_END[name]
    case = spec.build()
    here, op = case.to(hopper_gpu), Splitting(case)
    want = op(here, sort)
    op.limit(size)
    planned = op.plan(here, sort).workspace.size
    room = hopper_gpu.full(planned + (1 << 20), 0xA5, np.uint8)
    assert same_bits(op(here, sort, workspace=room[:planned]), want)
    assert (host(room)[planned:] == 0xA5).all()
