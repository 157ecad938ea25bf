"""Same inputs, same bits: again, alone, in a batch, in pieces, in parallel, after pickling."""

import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
from generators import Case, Spec
from properties import POISON, host, same_bits

from mla_fp8 import Mask, MLAIndexerRaggedFloat8Paged, index_scores

# Rows of all lengths; heads that fill a tensor-core tile, and heads that do not.
SPEC = Spec(seq_lens=(33, 1, 0, 7), cache_lens=(0, 2500, 5, 130), num_heads=16)
VARIANTS = {
    "16 heads": SPEC,
    "3 heads": dataclasses.replace(SPEC, num_heads=3, values="wide"),
    "128 heads": dataclasses.replace(SPEC, num_heads=128, seq_lens=(3, 1, 0, 2)),
    "granules": dataclasses.replace(SPEC, granularity=32, num_heads=8),
    "plateau": dataclasses.replace(SPEC, values="plateau"),
    "k above the row": dataclasses.replace(SPEC, k=5000),
}
variants = pytest.mark.parametrize("name", VARIANTS)


def _answer(case: Case, xp, op=None, **options) -> list[np.ndarray]:
    op = op or MLAIndexerRaggedFloat8Paged(**case.params)
    return [host(a) for a in op(*case.to(xp).args, return_scores=True, **options)]


def _dense(case: Case, xp) -> np.ndarray:
    return host(index_scores(*case.to(xp).args, mask=case.spec.mask))


def _assert_same(ours, theirs) -> None:
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@variants
def test_twenty_reruns(name, xp):
    case = VARIANTS[name].build()
    op, here = MLAIndexerRaggedFloat8Paged(**case.params), case.to(xp)
    for sort in ("position", "score"):
        first = op(*here.args, return_scores=True, sort=sort)
        for run in range(20):
            # poison where the next call may look for its scratch and its output
            junk = [xp.full(size, POISON, np.int32) for size in (10 * run + 1, first[0].size)]
            del junk
            _assert_same(op(*here.args, return_scores=True, sort=sort), first)


@variants
def test_a_token_alone_has_the_bits_it_has_in_a_batch(name, xp):
    """Decode token by token against prefill of the same tokens in a ragged batch."""
    case = VARIANTS[name].build()
    dense, answer = _dense(case, xp), _answer(case, xp, sort="score")
    for b, i in ((0, 0), (0, 1), (0, case.spec.seq_lens[0] - 1), (1, 0), (3, 1)):
        token = int(case.input_row_offsets[b]) + i
        alone = case.chunk(b, i, i + 1)
        n = case.spec.cache_lens[b] + i + 1
        assert same_bits(_dense(alone, xp)[0, :n], dense[token, :n]), (b, i)
        _assert_same(_answer(alone, xp, sort="score"), [a[token : token + 1] for a in answer])


@variants
@pytest.mark.parametrize("cut", [1, 2])
def test_chunked_prefill_has_the_bits_of_one_prefill(name, cut, xp):
    case = VARIANTS[name].build()
    new = case.spec.seq_lens[0]
    whole = _answer(case, xp)
    parts = [_answer(case.chunk(0, *ends), xp) for ends in ((0, cut), (cut, new))]
    joined = [np.concatenate(pair) for pair in zip(*parts, strict=True)]
    _assert_same(joined, [a[:new] for a in whole])


@variants
def test_physical_pages_and_frozen_maxima_do_not_matter(name, xp):
    """Other blocks, a wider table, larger bounds: a captured graph's view of the same keys."""
    case = VARIANTS[name].build()
    blocks = len(case.k_blocks)
    order = np.random.default_rng(5).permutation(blocks)
    table = case.k_lookup_table.astype(np.int64)
    real = table < blocks
    table[real] = np.argsort(order)[table[real]]
    wide = np.full((len(table), table.shape[1] + 40), 2**32 - 1, np.int64)
    wide[:, : table.shape[1]] = table
    moved = case.replace(
        k_blocks=case.k_blocks[order],
        k_scales=case.k_scales[order],
        k_lookup_table=wide.astype(np.uint32),
        k_max_lengths=np.array([[4000, 100_000]], np.uint32),
    )
    _assert_same(_answer(moved, xp), _answer(case, xp))


def test_neighbours_in_the_batch_do_not_matter(xp):
    """Only the other sequences' queries change; this one's rows keep their bits."""
    case = SPEC.build()
    q = case.q.copy()
    q.view(np.uint8)[:33] ^= 0x80
    q.view(np.uint8)[34:] = 0x7F
    other = _answer(case.replace(q=q), xp)
    mine = _answer(case, xp)
    _assert_same([a[33] for a in other], [a[33] for a in mine])
    assert not same_bits(other[0], mine[0])


def test_threads_share_one_operation(xp):
    """Scratch is not shared between calls in flight: sizes differ from thread to thread."""
    common = {"num_heads": 8, "depth": 64, "k": 33}
    cases = [Spec((1 + i, 2), (300 * i, 50), seed=i, **common).build().to(xp) for i in range(8)]
    op = MLAIndexerRaggedFloat8Paged(**cases[0].params)
    want = [[host(a) for a in op(*case.args, return_scores=True)] for case in cases]

    def work(i: int):
        stream = nullcontext() if xp is np else xp.cuda.Stream(non_blocking=True)
        with stream:
            got = [op(*cases[i].args, return_scores=True) for _ in range(20)]
            return [[host(a) for a in pair] for pair in got]

    with ThreadPoolExecutor(len(cases)) as pool:
        for expected, runs in zip(want, pool.map(work, range(len(cases))), strict=True):
            for run in runs:
                _assert_same(run, expected)


def test_pickle_round_trip(xp):
    case = SPEC.build()
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    want = _answer(case, xp, op)  # used: whatever it owns must not be in the pickle's way
    loaded = pickle.loads(pickle.dumps(op))
    assert loaded == op
    assert hash(loaded) == hash(op)
    assert loaded.mask is Mask.CAUSAL
    _assert_same(_answer(case, xp, loaded), want)
