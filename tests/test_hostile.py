"""Wrong values on every way through the kernels, and what else a caller may get wrong.

docs/trust.md lists it all, with the tests in other files.
"""

import dataclasses
import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import launches
import numpy as np
import pytest
from compile_table import shape
from generators import ARGUMENTS, TINY, Spec
from machine_batch import Batch
from properties import POISON, assert_helpful, check_case, host, same_bits, sanitized
from routes import WAYS, longer
from test_scratch import H200
from test_shards import shard
from test_workspace import SPEC, _build

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_topk
from mla_fp8._plan.tuning import H200 as TUNED
from mla_fp8.cli import oracle

NATIVE = ("q", "k_blocks", "layer_idx")  # no bytes to swap
# For compute-sanitizer: with seeds, and with the step of a shard.
SMALL = [("portable", 0), ("decode", 1), ("prefill", 2), ("prefill, windows", 0)]
SMALL_SHARDS = [("portable", 3), ("prefill, windows", 1)]


class Garbage:
    """Any 32-bit numbers in offsets, lengths and table; enough of them right to see keys."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._dtype = (np.uint32, np.int32)[seed % 2]

    def below(self, limit: int, shape) -> np.ndarray:
        """Two in three of them below a limit."""
        small = self._rng.integers(0, limit, shape, np.uint32)
        return self.among(small, 2 / 3)

    def among(self, right: np.ndarray, share: float) -> np.ndarray:
        """The right numbers, of which only a share stays."""
        bits = self._rng.integers(0, 2**32, right.shape, np.uint32)
        keep = self._rng.random(right.shape) < share
        return np.where(keep, right.astype(np.uint32), bits).astype(self._dtype)

    def of(self, case):
        """The case with such numbers. Page ends become readable, so they hold scales."""
        rows = case.k_lookup_table.shape[1] * case.spec.page_size
        return case.replace(
            k_scales=np.nan_to_num(case.k_scales, nan=0.5),
            input_row_offsets=self.among(case.input_row_offsets, 0.9),
            k_cache_lengths=self.below(rows + 9, case.k_cache_lengths.shape),
            k_lookup_table=self.below(len(case.k_blocks) + 2, case.k_lookup_table.shape),
        )


@pytest.mark.parametrize(("name", "seed"), sanitized(itertools.product(WAYS, range(4)), SMALL))
def test_any_number_on_every_way(name, seed, xp, monkeypatch):
    """What the contract says of these numbers is selected, and nothing else."""
    way = WAYS[name]
    way.use(xp, monkeypatch)
    mask, kpool = ("causal", "null")[seed % 2], (1, 4)[seed // 2]
    spec = dataclasses.replace(way.spec, mask=mask, kpool=kpool, seed=seed)
    spec = longer(spec, kpool)
    cases = (Garbage(number).of(spec.build()) for number in itertools.count(seed, 4))
    sees_keys = (case for case in cases if oracle.evaluate(case).selectable.any())
    check_case(next(sees_keys), xp, check=False)


def _sequences(case) -> np.ndarray:
    """The sequence of each token by offsets that may be wrong; -1: of none."""
    offsets = np.clip(case.input_row_offsets.astype(np.int64), 0, case.tokens)
    token = np.arange(case.tokens)
    found = np.searchsorted(np.maximum.accumulate(offsets), token, side="right") - 1
    return np.where(token < offsets.max(), found, -1)


@pytest.mark.parametrize(("name", "step"), sanitized(itertools.product(WAYS, [1, 3]), SMALL_SHARDS))
def test_any_number_on_a_shard(name, step, xp, monkeypatch):
    """Starts too may be any number: a slot is the one that the table gives for the position."""
    way = WAYS[name]
    way.use(xp, monkeypatch)
    rows = max(map(sum, zip(way.spec.seq_lens, way.spec.cache_lens, strict=True)))
    mine = shard(longer(way.spec, step).build(), 0, step, rows)
    plan = way.plan(H200, mine, key_start=0, key_step=step)
    assert (plan.scoring.route, plan.mode) == (way.route, way.mode)
    op, page_size, seen = MLAIndexerRaggedFloat8Paged(**mine.params), way.spec.page_size, 0
    for seed in range(5):
        garbage = Garbage(seed)
        case = garbage.of(mine)
        starts = garbage.below(9, case.k_cache_lengths.shape)
        options = {"key_start": xp.asarray(starts), "key_step": step, "check": False}
        found = op(*case.to(xp).args, output="both", **options)
        positions, slots = (host(a).astype(np.int64) for a in found)
        chosen, sequence = positions >= 0, _sequences(case)
        assert (positions[~chosen] == -1).all()
        assert (slots[~chosen] == -1).all()
        assert not chosen[sequence < 0].any(), "a token of no sequence"
        assert (chosen[:, :-1] | ~chosen[:, 1:]).all(), "-1 before a position"
        assert ((np.diff(positions) > 0) | ~chosen[:, 1:]).all(), "not ascending"
        first = starts.view(np.uint32).astype(np.int64)[sequence, None]
        row, rest = np.divmod(positions - first, step)
        assert (rest[chosen] == 0).all()
        row = np.where(chosen, row, 0)
        assert (row >= 0).all()
        assert (row < case.k_lookup_table.shape[1] * page_size).all()
        block = case.k_lookup_table.view(np.uint32)[sequence[:, None], row // page_size]
        assert (block[chosen] < len(case.k_blocks)).all()
        want = block.astype(np.int64) * page_size + row % page_size
        np.testing.assert_array_equal(slots[chosen], want[chosen])
        seen += chosen.sum()
    assert seen, "the numbers are too wrong to show anything"


# ----- arrays that are not what they look like


@pytest.mark.parametrize("name", ["out", *(n for n in ARGUMENTS if n not in NATIVE)])
def test_the_other_byte_order_is_named(name):
    """Read as it stands, 1 would be 16777216."""
    case, out = TINY.build(), np.full((3, TINY.k), POISON, np.int32)
    array = out if name == "out" else getattr(case, name)
    swapped = array.astype(array.dtype.newbyteorder())
    given = case if name == "out" else case.replace(**{name: swapped})
    with pytest.raises(ValueError, match=f"got {re.escape(swapped.dtype.str)}") as caught:
        index_topk(*given.args, k=TINY.k, out=swapped if name == "out" else out)
    assert_helpful(caught.value, name)
    assert (out == POISON).all()


@pytest.mark.parametrize("name", [n for n in ARGUMENTS[:-1] if n != "k_max_lengths"])
@pytest.mark.parametrize("side", ["first", "last"])
def test_out_over_any_input(name, side, xp):
    """The first or the last four bytes of the input are an output's too. Bounds are numbers."""
    here = TINY.build().to(xp)
    array, size = getattr(here, name), 4 * here.tokens * TINY.k
    buffer = xp.zeros(16 + 2 * size + array.nbytes, np.uint8)
    first = -(-size // 16) * 16
    inside = buffer[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    inside[...] = array
    start = first + 4 - size if side == "first" else first + array.nbytes - 4
    out = buffer[start : start + size].view(np.int32).reshape(here.tokens, TINY.k)
    before = host(buffer).copy()
    with pytest.raises(ValueError, match=f"out must not overlap {name}"):
        index_topk(*here.replace(**{name: inside}).args, k=TINY.k, out=out)
    np.testing.assert_array_equal(host(buffer), before)


def test_outputs_in_one_another(xp):
    """Positions, slots and scores, two of them in the same memory."""
    op, here = MLAIndexerRaggedFloat8Paged(**TINY.build().params), TINY.build().to(xp)
    rows = here.tokens, TINY.k
    for first, second in itertools.combinations(range(3), 2):
        out = [xp.full(rows, 7, dtype) for dtype in (np.int32, np.int32, np.float32)]
        out[second] = out[first].view(out[second].dtype)
        with pytest.raises(ValueError, match=r"out\[\d\] must not overlap out\[\d\]"):
            op(*here.args, output="both", return_scores=True, out=tuple(out))
        assert (host(out[first]) == 7).all()


# ----- no memory


def test_a_result_that_is_too_large(xp):
    """512 TiB of scores, of keys on pages that do not exist."""
    case = Spec((1 << 17,), (0,), num_heads=1, depth=32, page_size=1, k=4).build()
    here = case.replace(
        k_blocks=np.empty((0, 1, 1, 2**30, 1, 32), case.k_blocks.dtype),
        k_scales=np.empty((0, 1, 1, 2**30, 1, 1), np.float32),
        k_lookup_table=np.zeros((1, 1), np.uint32),
        k_max_lengths=np.array([[1 << 17, 2**30]], np.uint32),
    ).to(xp)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    with pytest.raises(MemoryError, match=r"512\. TiB|562,949,953,421,312"):
        op.scores(*here.args, check=False)
    few = case.chunk(0, 0, 3)
    assert (host(op(*few.to(xp).args)[-1]) == [0, 1, 2, -1]).all()


def test_a_workspace_that_does_not_fit():
    """On stand-ins for CuPy and the GPU. Nothing is launched, and the same call runs later."""
    batch = Batch(shape(), np.arange(5) * 1024, np.full(4, 900))
    plan = launches.run_topk(batch, 30, True, False, H200, TUNED)[1]
    size = plan.workspace.size
    with pytest.raises(MemoryError, match=rf"no room for a workspace of {size} bytes \({size} are"):
        launches.run_topk_without_memory(batch, 30, H200, TUNED)
    assert launches.run_topk(batch, 30, True, False, H200, TUNED)[1] is plan


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["operator, both", "scores", "select_topk, both"])
def test_a_workspace_that_does_not_fit_on_a_gpu(name, cupy):
    """The limit of a memory pool stands for a full GPU."""
    *_, call = _build(name, SPEC, cupy)
    want, outputs, size = call.run(), call.outputs(cupy), call.workspace().size
    pool = cupy.cuda.MemoryPool()
    pool.set_limit(size=size - 1)
    for found in outputs:
        found[...] = POISON
    with (
        cupy.cuda.using_allocator(pool.malloc),
        pytest.raises(MemoryError, match=f"no room for a workspace of {size} bytes"),
    ):
        call.into(outputs)
    assert all((host(a) == host(cupy.full(1, POISON, a.dtype))).all() for a in outputs)
    call.into(outputs)
    for mine, theirs in zip(outputs, want if isinstance(want, tuple) else (want,), strict=True):
        assert same_bits(mine, theirs)


# ----- threads and streams


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["portable", "decode", "prefill", "prefill, windows"])
def test_threads_with_several_streams_each(name, cupy, monkeypatch):
    """One operator. The calls of a thread share kernels' parameters, but no workspace."""
    way = WAYS[name]
    way.use(cupy, monkeypatch)
    specs = [dataclasses.replace(way.spec, seed=seed) for seed in range(4)]
    cases = [spec.build().to(cupy) for spec in specs]
    op = MLAIndexerRaggedFloat8Paged(**cases[0].params)
    want = [host(op(*case.args)) for case in cases]
    cupy.cuda.Device().synchronize()

    def work(number: int) -> bool:
        streams, right = [cupy.cuda.Stream(non_blocking=True) for _ in cases], True
        for _ in range(10):
            found = []
            for stream, case in zip(streams, cases, strict=True):
                with stream:
                    found.append(op(*case.args))
            for stream, rows, expected in zip(streams, found, want, strict=True):
                stream.synchronize()
                with stream:
                    right &= same_bits(rows, expected)
        return right

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(6)))
