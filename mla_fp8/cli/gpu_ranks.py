"""The program of each process of `bench_gpus`, which measures calls on one GPU.

The process uses the GPU whose number is its rank on this host. All ranks draw the same numbers, so
every rank can compute the whole result and compare.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mla_fp8._check.problem import Inputs
from mla_fp8._ranks import Ranks, Wait, ranks_of
from mla_fp8._rows import Pieces, call_of_rank
from mla_fp8.cli.bench_calls import Calls, operator, whole
from mla_fp8.cli.cases import Arrays, Case
from mla_fp8.cli.timer import Timer, Variant, spread
from mla_fp8.distributed import (
    index_topk_sharded,
    index_topk_split_rows,
    nccl_communicator,
    rank_of_process,
    split_rows_workspace,
)
from mla_fp8.topk import merge_topk

Samples = dict[str, list[float]]

_REPEATS = 21
_DECODE_CALLS = 4  # in a graph; each call reads different pages
_PART_CALLS = 4  # in a graph, so that the time to start the graph counts little
_MORE_RANKS = 8, 64  # the projection needs the parts of a rank among so many
_NO_LIMIT = Wait("the benchmark", None)
_LIMIT = Wait("the benchmark", 200.0)


def _silent(function: Callable[..., object], *args: Any, **kwargs: Any) -> Callable[[], None]:
    """The call without its result. So the calls in a graph take turns in using the same memory."""

    def call() -> None:
        function(*args, **kwargs)

    return call


def _interleaved(case: Case, arrays: Arrays, rank: int, size: int) -> list[tuple[Any, ...]]:
    """The inputs of a rank that holds every ``size``-th key, for each table."""
    import cupy

    page, batch, copies = case.page_size, len(case.keys), len(arrays.tables)
    columns = max(-(-len(range(rank, n, size)) // page) for n in case.rows)
    order = np.random.default_rng(2).permutation(copies * batch * columns)
    tables = cupy.asarray(order.reshape(copies, batch, columns).astype(np.uint32))
    blocks = cupy.zeros((order.size, *arrays.blocks.shape[1:]), np.uint8)
    scales = cupy.zeros((order.size, *arrays.scales.shape[1:]), np.float32)
    pairs = (arrays.blocks, blocks), (arrays.scales, scales)
    found = []
    for table, own in zip(arrays.tables, tables, strict=True):
        for b, count in enumerate(case.rows):
            there = cupy.arange(rank, count, size)
            here = cupy.arange(there.size)
            source = table[b, there // page].astype(np.int64) * page + there % page
            target = own[b, here // page].astype(np.int64) * page + here % page
            for given, taken in pairs:
                width = given.shape[-1]
                taken.reshape(-1, width)[target] = given.reshape(-1, width)[source]
        q, qs, offsets, _, lengths, _, most, _, layer = arrays.inputs(table)
        found.append((q, qs, offsets, blocks, lengths, own, most, scales, layer))
    return found


def _assert_same(found: Any, want: Any, what: str) -> None:
    for ours, theirs in zip(found, want, strict=True):
        if not (ours.view(np.uint32) == theirs.view(np.uint32)).all():
            raise AssertionError(f"{what}: the result of all GPUs is not that of one")


class _Split:
    """A way to split the calls of a case over ranks: the calls, and their parts, to be timed."""

    def __init__(self, case: Case, arrays: Arrays, comm: Any) -> None:
        self.op: Any = operator(case)
        self.case, self.arrays, self.comm = case, arrays, comm
        self.ranks: Ranks = ranks_of(comm)
        self.inputs = [arrays.inputs(table) for table in arrays.tables]
        self.bytes = 0  # that each rank sends to each of the others

    def check(self) -> None:
        """Raise unless all GPUs together give the bits that this GPU gives alone."""
        raise NotImplementedError

    def together(self) -> dict[str, Calls]:
        """The calls of all ranks, under the name "", and their parts."""
        raise NotImplementedError

    def alone(self, size: int) -> dict[str, Calls]:
        """The parts of rank 0 of ``size`` ranks, without the exchange: no other rank is needed."""
        raise NotImplementedError

    def _empty(self, *shape: int) -> tuple[Any, Any]:
        xp = self.ranks.xp
        return xp.empty(shape, np.int32), xp.empty(shape, np.float32)

    def _exchange(self, own: tuple[Any, ...], every: tuple[Any, ...]) -> Calls:
        self.bytes = sum(array.nbytes for array in own)
        pairs = list(zip(own, every, strict=True))
        return [_silent(self.ranks.gather, pairs, _NO_LIMIT)] * _PART_CALLS


class _ByKeys(_Split):
    def __init__(self, case: Case, arrays: Arrays, comm: Any) -> None:
        super().__init__(case, arrays, comm)
        rank, size = self.ranks.rank, self.ranks.size
        self.own = _interleaved(case, arrays, rank, size)
        self.place: Any = {"key_start": rank, "key_step": size}
        memory = self.op.workspace(*self.own[0], **self.place, return_scores=True)
        self.options: Any = {"check": False, "workspace": memory}

    def check(self) -> None:
        options: Any = {"return_scores": True, "check": False}
        for own, inputs in zip(self.own, self.inputs, strict=True):
            found = index_topk_sharded(
                self.op, *own, comm=self.comm, **self.place, **self.options, return_scores=True
            )
            _assert_same(found, self.op(*inputs, **options), self.case.name)

    def together(self) -> dict[str, Calls]:
        given = {"comm": self.comm, **self.place, **self.options}
        tokens, k = sum(self.case.new), self.case.k
        lists, every = self._empty(tokens, k), self._empty(self.ranks.size, tokens, k)
        self.op(*self.own[0], **self.place, **self.options, return_scores=True, out=lists)
        for own, all_of_them in zip(lists, every, strict=True):
            self.ranks.gather([(own, all_of_them)], _NO_LIMIT)
        return {
            "": [_silent(index_topk_sharded, self.op, *own, **given) for own in self.own],
            "local": self._local(self.own, self.place, self.options),
            "gather": self._exchange(lists, every),
            "merge": [partial(merge_topk, *every, out=lists[0])] * _PART_CALLS,
        }

    def _local(self, own: list[tuple[Any, ...]], place: Any, options: Any) -> Calls:
        out = self._empty(sum(self.case.new), self.case.k)
        return [
            partial(self.op, *inputs, **place, **options, return_scores=True, out=out)
            for inputs in own
        ]

    def alone(self, size: int) -> dict[str, Calls]:
        tokens, k = sum(self.case.new), self.case.k
        lists = self._empty(size, tokens, k)
        for rank in range(size):
            (inputs, *_) = _interleaved(self.case, self.arrays, rank, size)
            out = tuple(array[rank] for array in lists)
            place: Any = {"key_start": rank, "key_step": size}
            self.op(*inputs, **place, check=False, return_scores=True, out=out)
        first = _interleaved(self.case, self.arrays, 0, size)
        place = {"key_start": 0, "key_step": size}
        memory = self.op.workspace(*first[0], **place, return_scores=True)
        merged = self._empty(tokens, k)[0]
        return {
            "local": self._local(first, place, {"check": False, "workspace": memory}),
            "merge": [partial(merge_topk, *lists, out=merged)] * _PART_CALLS,
        }


class _ByRows(_Split):
    def __init__(self, case: Case, arrays: Arrays, comm: Any) -> None:
        super().__init__(case, arrays, comm)
        memory = split_rows_workspace(self.op, *self.inputs[0], comm=comm)
        self.options: Any = {"comm": comm, "check": False, "workspace": memory}

    def check(self) -> None:
        for inputs in self.inputs:
            found = index_topk_split_rows(self.op, *inputs, **self.options)
            _assert_same([found], [self.op(*inputs, check=False)], self.case.name)

    def together(self) -> dict[str, Calls]:
        size, k = self.ranks.size, self.case.k
        pieces = Pieces(sum(self.case.new), self.ranks.rank, size)
        rows = 2 * pieces.length
        own, every = self._empty(rows, k)[:1], self._empty(size, rows, k)[:1]
        split = partial(index_topk_split_rows, self.op, **self.options)
        return {
            "": [_silent(split, *inputs) for inputs in self.inputs],
            "local": [_silent(split, *inputs, gather=False) for inputs in self.inputs],
            "gather": self._exchange(own, every),
            "merge": [_silent(pieces.in_order, every[0])] * _PART_CALLS,
        }

    def alone(self, size: int) -> dict[str, Calls]:
        pieces, k = Pieces(sum(self.case.new), 0, size), self.case.k
        every = self._empty(size, 2 * pieces.length, k)[0]
        out = self._empty(pieces.tokens_of_rank, k)[0]
        problems = [self.op._problem(Inputs(*inputs), False) for inputs in self.inputs]
        most = self.arrays.most
        first, totals = call_of_rank(problems[0], most, pieces)
        memory = self.op.workspace(*first, k_total_lengths=totals)

        def local(problem: Any) -> None:
            inputs, lengths = call_of_rank(problem, most, pieces)
            options: Any = {"out": out, "check": False, "workspace": memory}
            self.op(*inputs, k_total_lengths=lengths, **options)

        return {
            "local": [partial(local, problem) for problem in problems],
            "merge": [_silent(pieces.in_order, every)] * _PART_CALLS,
        }


def _sampled(timer: Timer, calls: dict[str, Calls]) -> Samples:
    variants = {(0, name): Variant(these, "cupy") for name, these in calls.items()}
    return {name: found for (_, name), found in timer.samples(variants, _REPEATS).items()}


def _slowest(ranks: Ranks, samples: Samples) -> Samples:
    """The time of the slowest rank, for each sample."""
    own = ranks.xp.asarray(list(samples.values()), np.float64)
    every = ranks.xp.empty((ranks.size, *own.shape), np.float64)
    ranks.gather([(own, every)], _LIMIT)
    return dict(zip(samples, every.max(axis=0).tolist(), strict=True))


def _meet(ranks: Ranks) -> Callable[[], None]:
    """A collective at which each GPU waits for all others."""
    pair = ranks.xp.zeros(1, np.uint8), ranks.xp.zeros((ranks.size, 1), np.uint8)
    return partial(ranks.gather, [pair], _NO_LIMIT)


def _measure(case: Case, comm: Any) -> dict[str, Any]:
    """A row of the result."""
    ranks = ranks_of(comm)
    drawn = replace(case, data="random")
    arrays = Arrays(drawn, _DECODE_CALLS if max(case.new) == 1 else 1)
    split = {"keys": _ByKeys, "rows": _ByRows}[case.data](drawn, arrays, comm)
    split.check()
    alone, samples, meet = Timer(with_torch=False), Samples(), _meet(ranks)
    more: dict[str, Samples] = {}
    if ranks.rank == 0:  # while the others wait
        samples["one"] = _sampled(alone, {"one": whole(drawn, arrays)})["one"]
        for size in _MORE_RANKS:
            more[str(size)] = _sampled(alone, split.alone(size))
            ranks.xp.get_default_memory_pool().free_all_blocks()
    del alone
    ranks.gather([(ranks.xp.zeros(1), ranks.xp.zeros((ranks.size, 1)))], _LIMIT)
    timer = Timer(meet, with_torch=False)
    samples |= _slowest(ranks, _sampled(timer, split.together()))
    row: dict[str, Any] = {
        "group": case.group,
        "data": case.data,
        "heads": case.num_heads,
        "shape": case.name,
        "gpus": ranks.size,
        "gathered_bytes": split.bytes,
    }
    for name, times in samples.items():
        row |= spread(f"{name}_us".removeprefix("_"), times)
    for count, parts in more.items():
        for name, times in parts.items():
            row |= spread(f"{name}{count}_us", times)
    if "one" in samples:
        row["speedup"] = round(float(np.median(samples["one"]) / np.median(samples[""])), 3)
    return row


def main(wanted: Path, found: Path) -> None:
    """Measure the cases in the file ``wanted``; rank 0 writes their rows to the file ``found``."""
    import cupy
    from cupy.cuda import nccl

    rank, _, local = rank_of_process()
    cupy.cuda.Device(local).use()
    comm = nccl_communicator(timeout=120.0)
    rows = []
    for given in json.loads(wanted.read_text(encoding="utf-8")):
        case = Case(**given | {name: tuple(given[name]) for name in ("new", "keys")})
        rows.append(_measure(case, comm) | {"nccl": nccl.get_version()})
        cupy.get_default_memory_pool().free_all_blocks()
    if rank == 0:
        found.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
        time.sleep(1)  # until other GPUs have read what this rank has sent
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # at an ordinary exit, threads of NCCL may wait for a rank that has failed
