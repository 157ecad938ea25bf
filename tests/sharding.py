"""Keys or tokens of a case spread over ranks, and what every rank must get.

Run by threads, by MPI, and by processes with a GPU each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from generators import ARGUMENTS, Case, Spec
from properties import same_bits

from mla_fp8 import MLAIndexerRaggedFloat8Paged
from mla_fp8.distributed import index_topk_sharded, index_topk_split_rows, tokens_of_rank

# Of equal shapes, so that kernels are compiled for each number of ranks only.
SIZES = {"k": 64, "page_size": 16}
SPECS = {
    "random": Spec((3, 1, 2), (70, 0, 333), **SIZES),
    "ties": Spec((2, 4), (200, 31), **SIZES, values="plateau"),
    "few keys": Spec((4, 1), (0, 3), **SIZES, values="negative_zero"),
    "gates": Spec((3, 1), (150, 90), **SIZES, values="special_gates", mask="null"),
    "pooled": Spec((3, 2), (190, 67), **SIZES, kpool=4),
}
ROWS = {  # for ranks that share the tokens
    "causal": Spec((5, 0, 9, 2), (70, 40, 0, 333), **SIZES, values="plateau"),
    "null": Spec((5, 0, 9, 2), (70, 40, 0, 333), **SIZES, mask="null", index_dtype="int32"),
    "one token": Spec((1,), (100,), **SIZES),
    "no token": Spec((0, 0), (100, 3), **SIZES),
    "no sequence": Spec((), (), **SIZES),
    "pooled": Spec((7, 6), (90, 35), **SIZES, kpool=4),
    "bounds": Spec((11,), (50,), **SIZES, slack=(7, 900), spare_pages=2),
}


@dataclass(frozen=True)
class Shard:
    """The positions ``start + step * row`` of each sequence, of ``rows`` rows if it is bounded."""

    start: int
    step: int
    rows: int | None = None

    def of(self, count: int) -> np.ndarray:
        return np.arange(self.start, count, self.step)[: self.rows]


def _rows(case: Case) -> list[int]:
    """The cached rows of each sequence."""
    pairs = zip(case.spec.seq_lens, case.spec.cache_lens, strict=True)
    return [sum(pair) // case.spec.kpool for pair in pairs]


def shard_for(case: Case, rank: int, size: int, interleaved: bool) -> Shard:
    """A rank's shard; contiguous ones are whole pages, and the last of them may be empty."""
    if interleaved:
        return Shard(rank, size)
    longest, page_size = max(_rows(case), default=0), case.spec.page_size
    rows = -(-longest // (size * page_size)) * page_size
    return Shard(rank * rows, 1, rows)


def sharded(case: Case, shard: Shard, seed: int) -> Case:
    """A host case with the keys of a shard alone, in shuffled pages; the rest of them is NaN."""
    page_size, batch = case.spec.page_size, len(case.spec.seq_lens)
    positions = [shard.of(count) for count in _rows(case)]
    rows = shard.rows or max(map(len, positions), default=0)
    pages = max(-(-rows // page_size), 1)
    order = np.random.default_rng(seed).permutation(batch * pages)
    table = order.reshape(batch, pages).astype(case.k_lookup_table.dtype)
    blocks = np.full((batch * pages, *case.k_blocks.shape[1:]), np.nan, np.float32)
    blocks = blocks.astype(case.k_blocks.dtype)
    scales = np.zeros((batch * pages, *case.k_scales.shape[1:]), np.float32)
    for b, wanted in enumerate(positions):
        row = np.arange(len(wanted))
        there = table[b, row // page_size], 0, slice(None), row % page_size
        page = case.k_lookup_table[b, wanted // page_size]
        here = page, 0, slice(None), wanted % page_size
        blocks[there], scales[there] = case.k_blocks[here], case.k_scales[here]
    return case.replace(k_blocks=blocks, k_scales=scales, k_lookup_table=table)


def operator(case: Case) -> MLAIndexerRaggedFloat8Paged:
    """The operator with the parameters of a case."""
    return MLAIndexerRaggedFloat8Paged(**case.params)


def check_shards(comm, rank: int, size: int, xp, name: str, interleaved: bool) -> None:
    """One rank's part: its result has the bits of the operator on all keys."""
    case = SPECS[name].build()
    shard, whole = shard_for(case, rank, size, interleaved), case.to(xp)
    op, own = operator(case), sharded(case, shard, seed=rank).to(xp)
    options = {"comm": comm, "key_start": shard.start, "key_step": shard.step}
    for sort in ("position", "score"):
        want = op(*whole.args, return_scores=True, sort=sort)
        found = index_topk_sharded(op, *own.args, **options, sort=sort, return_scores=True)
        assert same_bits(found[0], want[0]), f"{name} by {sort}, rank {rank} of {size}"
        assert same_bits(found[1], want[1]), f"scores of {name} by {sort}, rank {rank} of {size}"
        assert same_bits(index_topk_sharded(op, *own.args, **options, sort=sort), want[0])


def check_rows(comm, rank: int, size: int, xp, name: str) -> None:
    """One rank's part of rows over ranks: its result has the bits of the operator's."""
    case = ROWS[name].build()
    op, here = operator(case), case.to(xp)
    lengths = {"k_total_lengths": None}
    new = np.diff(case.input_row_offsets.astype(np.int64)).astype(case.k_cache_lengths.dtype)
    inputs = list(here.args)
    for _ in range(2):  # with k_cache_lengths, then with k_total_lengths
        for sort in ("position", "score"):
            want = op(*here.args, return_scores=True, sort=sort)
            options = {"comm": comm, "sort": sort} | lengths
            found = index_topk_split_rows(op, *inputs, **options, return_scores=True)
            label = f"{name} by {sort}, rank {rank} of {size}"
            assert same_bits(found[0], want[0]), label
            assert same_bits(found[1], want[1]), f"scores of {label}"
            assert same_bits(index_topk_split_rows(op, *inputs, **options), want[0]), label
            own = index_topk_split_rows(op, *inputs, **options, gather=False)
            mine = np.r_[tokens_of_rank(case.tokens, rank, size)]
            assert same_bits(own, want[0][xp.asarray(mine.astype(np.int64))]), f"own rows, {label}"
        inputs[ARGUMENTS.index("k_cache_lengths")] = None
        lengths = {"k_total_lengths": here.k_cache_lengths + xp.asarray(new)}


def hostile(seed: int) -> tuple[Case, np.ndarray | None]:
    """A small case with offsets, lengths and bounds of any value, and total lengths or None."""
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 5))
    seq_lens, cache_lens = rng.integers(0, 6, batch), rng.integers(0, 60, batch)
    case = Spec(
        tuple(map(int, seq_lens)),
        tuple(map(int, cache_lens)),
        **{"k": 8, "page_size": 16, "num_heads": 4, "depth": 64},
        mask=("null", "causal")[seed % 2],
        kpool=(1, 1, 4)[seed % 3],
        index_dtype=("int32", "uint32")[seed // 2 % 2],
    ).build()
    dtype = case.k_cache_lengths.dtype
    offsets = rng.integers(-3, case.tokens + 4, batch + 1).astype(dtype)
    values = [-5, -1, 0, 3, 20, 60, 2**31 - 1, 2**31 - 70000, -(2**31)]
    lengths = rng.choice(np.array(values), batch).astype(dtype)
    bounds = np.array([[1, 5]], np.uint32) if seed % 5 == 0 else case.k_max_lengths
    case = case.replace(input_row_offsets=offsets, k_max_lengths=bounds, k_cache_lengths=lengths)
    if seed // 4 % 2:
        return case.replace(k_cache_lengths=None), lengths
    return case, None


def _fewer_tokens(case: Case) -> Case:
    """The case without its last sequence's last token."""
    spec = case.spec
    return dataclasses.replace(spec, seq_lens=(*spec.seq_lens[:-1], spec.seq_lens[-1] - 1)).build()


def check_disagreement(comm, rank: int, size: int, xp) -> None:
    """Whatever the last rank does otherwise, all ranks raise and none waits for ever."""
    case, last = SPECS["random"].build(), rank == size - 1
    given = {"comm": comm, "key_start": rank, "key_step": size, "check": True}
    other = _fewer_tokens(case)
    wider = dataclasses.replace(case.spec, k=case.spec.k + 1).build()
    for name, odd in {"tokens": other, "k": wider}.items():
        own = odd if last else case
        with pytest.raises(ValueError, match=f"{name} must be the same on all ranks; got"):
            index_topk_sharded(operator(own), *own.to(xp).args, **given)
    inputs, op = case.to(xp).args, operator(case)
    with pytest.raises(ValueError, match="sort must be the same on all ranks; got"):
        index_topk_sharded(op, *inputs, **given, sort="score" if last else "position")
    with pytest.raises(ValueError, match="key_step must be the same on all ranks; got"):
        index_topk_sharded(op, *inputs, **given | {"key_step": size + last})
    check_failures(given, op, inputs, last, size)
    index_topk_sharded(op, *inputs, **given)  # the communicator is still of use


def _check_one_fails(function, wrong, given, op, inputs, last: bool, size: int) -> None:
    """The last rank makes each wrong call, the others the right one. It gets its own error.

    ``wrong``: by error, the operator, the inputs and the options of a call.
    """
    for error, (odd, arrays, options) in wrong.items():
        if last:
            with pytest.raises(error):
                function(odd, *arrays, **given | options)
        else:
            with pytest.raises(RuntimeError, match=rf"got errors on ranks \[{size - 1}\]"):
                function(op, *inputs, **given)


def check_failures(given, op, inputs, last: bool, size: int) -> None:
    """The last rank's call fails in several ways: its own error there, RuntimeError elsewhere."""

    def fail(*_, **__):
        raise ZeroDivisionError("in the operator")

    wrong = {
        ZeroDivisionError: (fail, inputs, {}),
        ValueError: (op, inputs, {"sort": "index"}),
        TypeError: (op, (None, *inputs[1:]), {}),
    }
    _check_one_fails(index_topk_sharded, wrong, given, op, inputs, last, size)


def check_rows_disagreement(comm, rank: int, size: int, xp) -> None:
    """`check_disagreement` for ranks that share the tokens."""
    case, last = ROWS["causal"].build(), rank == size - 1
    given = {"comm": comm, "check": True}
    wider = dataclasses.replace(case.spec, k=case.spec.k + 1).build()
    for name, odd in {"tokens": _fewer_tokens(case), "k": wider}.items():
        own = odd if last else case
        with pytest.raises(ValueError, match=f"{name} must be the same on all ranks; got"):
            index_topk_split_rows(operator(own), *own.to(xp).args, **given)
    inputs, op = case.to(xp).args, operator(case)
    odd = {"sort": "score"}, {"gather": False}, {"return_scores": True}
    for options in odd:
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} must be the same on all ranks; got"):
            index_topk_split_rows(op, *inputs, **given | (options if last else {}))
    by_keys = partial(index_topk_sharded, key_start=0)
    function = index_topk_split_rows if last else by_keys
    with pytest.raises(ValueError, match="key_step must be the same on all ranks; got"):
        function(op, *inputs, **given, return_scores=True)
    wrong = {
        ValueError: (op, inputs, {"sort": "index"}),
        TypeError: (op, (None, *inputs[1:]), {}),
    }
    _check_one_fails(index_topk_split_rows, wrong, given, op, inputs, last, size)
    index_topk_split_rows(op, *inputs, **given)  # the communicator is still of use


def check_late_rank(comm, rank: int, size: int) -> None:
    """By MPI: the last rank comes when the others have given up. It gets its result."""
    case, last = SPECS["random"].build(), rank == size - 1
    op, others = operator(case), comm.Dup()
    call = {"comm": others, "timeout": 60 if last else 0.3, "check": False}
    if not last:
        with pytest.raises(TimeoutError, match=f"got no answer from the others on rank {rank}"):
            index_topk_split_rows(op, *case.args, **call)
    comm.Barrier()
    if last:
        assert same_bits(index_topk_split_rows(op, *case.args, **call), op(*case.args))
    comm.Barrier()
