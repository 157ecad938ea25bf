"""Scores in bounded memory: however the work is cut up, by tokens or keys, answers are the same."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from generators import Spec
from properties import POISON, host, same_bits

from mla_fp8 import MLAIndexerRaggedFloat8Paged
from mla_fp8._plan import topk as _plan
from mla_fp8._plan import workspace as _scratch

pytestmark = pytest.mark.gpu

# Rows from one key to thousands; some see fewer than k. Scratch for a part of the scores, in bytes.
TOKENS = Spec((1500, 3, 0, 1200), (1000, 2900, 5, 0), num_heads=8, depth=64)
KEYS = Spec((300, 3, 0, 40), (9000, 20000, 5, 4300), num_heads=8, depth=64)
FEW = Spec((4, 1, 2, 3) * 100, (1000, 2900, 5, 400) * 100, num_heads=8, depth=64)
CUTS = {
    "tokens": (TOKENS, 20 << 20),
    "tokens and keys": (KEYS, 2 << 20),
    "few tokens a sequence": (FEW, 4 << 20),
}
SMALL = Spec((90, 0, 10), (100, 3, 6000), num_heads=8, depth=64), 1 << 16


@pytest.fixture
def scratch(hopper_gpu, monkeypatch):
    """Sets how much there is for the rest of a test; scores are cut up by keys on Hopper alone."""

    from mla_fp8._cuda import backend

    def forget() -> None:
        _plan.plan_topk.cache_clear()
        backend._topk.cache_clear()

    def set_to(size: int) -> None:
        monkeypatch.setattr(_plan, "SCRATCH_BYTES", size)
        monkeypatch.setattr(_plan, "FEW_SCRATCH_BYTES", size)
        forget()

    yield set_to
    forget()


def _plan_of(cupy, op, here, **options):
    from mla_fp8._cuda import backend

    shape = op._problem(here.args, False).shape
    device = backend.device_facts(cupy.cuda.Device().id)
    by_score, values = options["sort"] == "score", options["return_scores"]
    return _plan.plan_topk(shape, op.k, by_score, values, device)


@pytest.mark.parametrize("mask", ["causal", "null"])
@pytest.mark.parametrize("k", [1, 100, 2048, 4096])
@pytest.mark.parametrize("cut", CUTS)
def test_cuts_change_nothing(cut, k, mask, cupy, scratch):
    spec, size = CUTS[cut]
    case = dataclasses.replace(spec, k=k, mask=mask).build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    whole = {}
    for limit in (1 << 30, size):
        scratch(limit)
        for sort in ("position", "score"):
            for return_scores in (False, True):
                options = {"sort": sort, "return_scores": return_scores}
                plan = _plan_of(cupy, op, here, **options)
                assert plan.buffers == 1 + (limit == size)
                if cut == "tokens and keys":
                    assert (plan.scoring.cut.chunk_keys < 20000) == (limit == size)
                found = op(*here.args, **options)
                found = found if return_scores else (found,)
                want = whole.setdefault((sort, return_scores), found)
                assert all(same_bits(a, b) for a, b in zip(found, want, strict=True)), options
    assert same_bits(whole["position", False][0], whole["position", True][0])
    assert same_bits(whole["score", False][0], whole["score", True][0])


@pytest.mark.parametrize("values", ["plateau", "wide"])
@pytest.mark.parametrize("cut", [*CUTS, pytest.param("small", marks=pytest.mark.sanitize)])
def test_cuts_change_nothing_of_hard_scores(cut, values, cupy, scratch):
    spec, size = {**CUTS, "small": SMALL}[cut]
    case = dataclasses.replace(spec, k=700, values=values, page_size=16).build()
    table = case.k_lookup_table.copy()
    table[:, 3::7] = 2**32 - 1  # pages that do not exist
    here = case.replace(k_lookup_table=table).to(cupy)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    scratch(1 << 30)
    want = op(*here.args, return_scores=True, check=False)
    bare = op(*here.args, check=False)
    scratch(size)
    found = op(*here.args, return_scores=True, check=False)
    assert all(same_bits(a, b) for a, b in zip(found, want, strict=True))
    assert same_bits(bare, want[0])
    assert same_bits(op(*here.args, check=False), want[0])


@pytest.mark.parametrize("cut", CUTS)
def test_memory_is_what_the_plan_says(cut, cupy, scratch):
    spec, size = CUTS[cut]
    case = dataclasses.replace(spec, k=100).build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    out = cupy.empty((case.tokens, 100), np.int32)
    for sort in ("position", "score"):
        for tight in (None, size):
            if tight:
                scratch(tight)
            op(*here.args, out=out, sort=sort)  # compiled
            cupy.cuda.Device().synchronize()
            pool = cupy.cuda.MemoryPool()
            with cupy.cuda.using_allocator(pool.malloc):
                op(*here.args, out=out, sort=sort)
            cupy.cuda.Device().synchronize()
            said = op.scratch_bytes(*here.args, sort=sort)
            assert said <= pool.total_bytes() <= said + 512


def test_a_pipeline_is_captured_and_replayed(cupy, scratch):
    """Selection goes on in a stream of its own, which must join the capture."""
    spec, size = CUTS["tokens and keys"]
    one = dataclasses.replace(spec, k=100).build()
    two = one.replace(q=dataclasses.replace(spec, k=100, seed=1).build().q)
    here, op = one.to(cupy), MLAIndexerRaggedFloat8Paged(**one.params)
    want = [host(op(*case.to(cupy).args)) for case in (one, two)]
    scratch(size)
    out = cupy.full((one.tokens, 100), POISON, np.int32)
    memory = op.workspace(*here.args)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        op(*here.args, out=out, workspace=memory)
        stream.synchronize()
        assert same_bits(out, want[0])
        out[...] = POISON
        stream.begin_capture()
        op(*here.args, out=out, workspace=memory)
        # Streams beside a captured one are captured too: others must have streams of their own.
        with cupy.cuda.Stream(non_blocking=True) as other:
            assert same_bits(op(*here.args, workspace=op.workspace(*here.args)), want[0])
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
@pytest.mark.parametrize(("heads", "depth"), [(8, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_mixed_batch_gives_what_its_sequences_give_alone(
    page_size, heads, depth, mask, cupy, scratch
):
    sizes = {"num_heads": heads, "depth": depth, "page_size": page_size}
    case = dataclasses.replace(MIXED, k=300, mask=mask, **sizes).build()
    table = case.k_lookup_table.copy()
    table[:, 5::9] = 2**32 - 1  # pages that do not exist
    here = case.replace(k_lookup_table=table).to(cupy)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    scratch(6 << 20)
    options = {"sort": "position", "return_scores": True}
    assert _plan_of(cupy, op, here, **options).scoring.cut.packed
    found, values = op(*here.args, return_scores=True, check=False)
    assert same_bits(op(*here.args, check=False), found)
    for b, (first, end) in enumerate(pairwise(map(int, case.input_row_offsets))):
        alone = here.replace(
            q=here.q[first:end],
            qs=here.qs[first:end],
            input_row_offsets=cupy.asarray([0, end - first], dtype=np.uint32),
            k_cache_lengths=here.k_cache_lengths[b : b + 1],
            k_lookup_table=here.k_lookup_table[b : b + 1],
            k_max_lengths=np.array([[end - first, case.k_cache_lengths[b]]], np.uint32),
        )
        indices, scores = op(*alone.args, return_scores=True, check=False)
        assert same_bits(found[first:end], indices), b
        assert same_bits(values[first:end], scores), b


WRONG_OFFSETS = {
    "as they should be": lambda offsets: offsets,
    "tokens of no sequence": lambda offsets: np.clip(offsets, 35, 340),
    "backwards": lambda offsets: offsets[::-1],
    "beyond": lambda offsets: offsets * 3,
    "nobody's": lambda offsets: offsets * 0,
}


@pytest.mark.parametrize("spare_pages", [0, 3000])
@pytest.mark.parametrize("cached", ["given", "none", "too many", "negative"])
@pytest.mark.parametrize("offsets", WRONG_OFFSETS)
def test_every_token_is_in_one_launch(offsets, cached, spare_pages, cupy, scratch):
    """Whatever offsets and lengths say, and however far maxima are above them."""
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
    here = case.replace(**given).to(cupy)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    scratch(1 << 30)
    want = op(*here.args, check=False)
    row = 4 * case.k_lookup_table.shape[1] * case.spec.page_size
    for rows in (60, 100, 130):  # of a launch's 32, 96 and 128: 12, 4 and 3 launches
        scratch(2 * rows * row)
        plan = _plan_of(cupy, op, here, sort="position", return_scores=False)
        assert plan.scoring.cut.packed
        out = cupy.full(want.shape, POISON, np.int32)
        op(*here.args, out=out, check=False)
        assert same_bits(out, want), plan.scoring.launches


def test_more_launches_than_are_shared_out_at_a_time(cupy, scratch):
    case = dataclasses.replace(TOKENS, k=100).build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    scratch(1 << 30)
    want = op(*here.args)
    scratch(1 << 20)
    plan = _plan_of(cupy, op, here, sort="position", return_scores=False)
    assert plan.scoring.cut.packed
    assert plan.scoring.launches > _scratch.SHARED_OUT
    assert same_bits(op(*here.args), want)


@pytest.mark.parametrize("sort", ["position", "score"])
def test_no_keys_at_all(sort, cupy):
    """More tokens than sorting has room for at one time, none of which sees a key."""
    case = Spec((3000,), (0,), num_heads=8, depth=64, k=2048).build()
    here = case.replace(k_max_lengths=np.zeros((1, 2), np.uint32)).to(cupy)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    assert (host(op(*here.args, sort=sort)) == -1).all()


# Budgets so small that rows were packed and kept values of their own as well: these went past the
# end (test_scratch.py tells why). Bounds are far above what there is.
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
def test_nothing_is_written_behind_a_workspace(name, sort, cupy, scratch):
    """Canaries stand behind it."""
    size, spec = PAST_THE_END[name]
    case = spec.build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    scratch(1 << 30)
    want = op(*here.args, sort=sort)
    scratch(size)
    said = op.scratch_bytes(*here.args, sort=sort)
    room = cupy.full(said + (1 << 20), 0xA5, np.uint8)
    assert same_bits(op(*here.args, sort=sort, workspace=room[:said]), want)
    assert (host(room)[said:] == 0xA5).all()
