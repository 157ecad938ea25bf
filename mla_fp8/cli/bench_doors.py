"""What other layouts, outputs, shards and writers cost: the group ``doors`` of the benchmark.

Each line is timed in turn with what it is compared with, as CUDA graphs with a cold L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from mla_fp8.cache import PagedKeyCache
from mla_fp8.cli.bench_calls import Calls, scoring
from mla_fp8.cli.cases import Arrays, Case
from mla_fp8.cli.timer import COLD_BYTES, Timer, Variant, spread
from mla_fp8.indexer import MLAIndexerRaggedFloat8Paged
from mla_fp8.keys import write_keys
from mla_fp8.topk import merge_topk

_TOP_K = 2048
_KPOOL = 4
_RANKS = 8
_DISTINCT = 64  # rows that NumPy makes; the others are copies of them


def cases() -> list[Case]:
    """What is measured; ``data`` says which comparison."""
    shapes = [((1,) * 64, (131072,) * 64), ((1,), (131072,)), ((4096,), (16384,))]
    found = [
        Case("doors", 64, *shape, data=name) for name in ("fused", "slots") for shape in shapes
    ]
    found += [Case("doors", 64, *shape, data="kpool 4") for shape in shapes[:2]]
    found.append(Case("doors", 64, (4096,), (65536,), data="kpool 4"))
    found.append(Case("doors", 64, (4096,), (65536,), data="merge"))
    tokens = ((1 << 20,), (1 << 20,))
    dtypes = ("bfloat16", "float16", "float32")
    found += [Case("doors", 0, *tokens, data=f"write {dtype}") for dtype in dtypes]
    return [*found, Case("doors", 0, *tokens, data="write bfloat16, fused")]


def _fused(blocks: Any, scales: Any) -> tuple[Any, Any]:
    """The pools in one buffer, as strided views of it."""
    import cupy

    count, _, _, page, _, depth = blocks.shape
    buffer = cupy.empty((count, page, 1, depth + 4), np.uint8)
    cache = PagedKeyCache.from_fused(buffer, page_size=page)
    cache.k_blocks[...], cache.k_scales[...] = blocks, scales
    return cache.k_blocks, cache.k_scales


def _calls(
    arrays: Arrays, lengths: Any, most: Any, pools: Any = None, mask: str = "causal", **options: Any
) -> Calls:
    """The whole operation, a call for each table; ``kpool`` and ``output`` are options."""
    import cupy

    tokens, heads, depth = arrays.q.shape
    kpool, output = options.get("kpool", 1), options.get("output", "positions")
    op = MLAIndexerRaggedFloat8Paged(heads, depth, _TOP_K, mask=mask, kpool=kpool)
    blocks, scales = pools or (arrays.blocks, arrays.scales)
    out, memory = cupy.empty((tokens, _TOP_K), np.int32), None
    found: Calls = []
    for table in arrays.tables:
        inputs = arrays.q, arrays.qs, arrays.offsets, blocks, lengths, table, most, scales, 0
        memory = op.workspace(*inputs, output=output) if memory is None else memory
        more = {"output": output, "out": out, "check": False, "workspace": memory}
        found.append(partial(op, *inputs, **more))
    return found


def _operation(case: Case, copies: int) -> tuple[Calls, Calls, str]:
    """Another layout, output or kpool of the whole operation, and the plain call."""
    comparison, case = case.data, replace(case, data="random")
    if comparison != "kpool 4":
        arrays = Arrays(case, copies)
        plain = _calls(arrays, arrays.lengths, arrays.most)
        if comparison == "slots":
            return _calls(arrays, arrays.lengths, arrays.most, output="slots"), plain, "positions"
        pools = _fused(arrays.blocks, arrays.scales)
        return _calls(arrays, arrays.lengths, arrays.most, pools), plain, "split pools"
    # With the null mask both calls score the same pairs.
    mask = "causal" if case.new[0] == 1 else "null"
    rows = Arrays(replace(case, keys=tuple(n // _KPOOL for n in case.keys)), copies)
    most, longer = rows.most.copy(), np.uint32(case.keys[0] - case.keys[0] // _KPOOL)
    most[0, 1] += longer
    pooled = _calls(rows, rows.lengths + longer, most, mask=mask, kpool=_KPOOL)
    return pooled, _calls(rows, rows.lengths, rows.most, mask=mask), "a quarter of the keys"


def _merge(case: Case) -> Calls:
    """Merging the lists of interleaved shards."""
    import cupy

    tokens, keys = case.new[0], case.keys[0] // _RANKS
    rng = np.random.default_rng(0)
    shape = _RANKS, _DISTINCT, keys
    own = np.argsort(rng.random(shape, np.float32))[..., :_TOP_K]
    indices = np.sort(own, axis=2) * _RANKS + np.arange(_RANKS)[:, None, None]
    scores = 1 + rng.random(indices.shape, np.float32)
    repeated = 1, tokens // _DISTINCT, 1
    lists = [cupy.tile(cupy.asarray(a), repeated) for a in (indices.astype(np.int32), scores)]
    out = cupy.empty((tokens, _TOP_K), np.int32)
    return [partial(merge_topk, *lists, out=out)]


class _BFloat16:
    """bfloat16 numbers, which CuPy has no dtype for, as the writers take them from torch."""

    dtype = "bfloat16"

    def __init__(self, bits: Any) -> None:
        self._bits = bits

    def view(self, dtype: str) -> Any:
        return self._bits.view(dtype)


def _writes(case: Case) -> tuple[Calls, Calls, str]:
    """Writing keys by slot, and a copy that reads and writes as many bytes in all."""
    import cupy

    tokens, depth, page = case.new[0], case.depth, case.page_size
    drawn = np.random.default_rng(0).standard_normal((1 << 14, depth), np.float32)
    keys = cupy.tile(cupy.asarray(drawn), (tokens >> 14, 1))
    name = case.data.split()[1].rstrip(",")
    size = 4 if name == "float32" else 2
    if name == "float16":
        keys = keys.astype(np.float16)
    elif name == "bfloat16":
        keys = _BFloat16((keys.view(np.uint32) >> 16).astype(np.uint16).view(np.int16))
    pages = tokens // page, 1, 1, page, 1
    pools = cupy.empty((*pages, depth), np.uint8), cupy.empty((*pages, 1), np.float32)
    pools = _fused(*pools) if case.data.endswith("fused") else pools
    blocks = np.random.default_rng(1).permutation(tokens // page)  # in any order, each filled
    slots = cupy.asarray((blocks[:, None] * page + np.arange(page)).ravel().astype(np.int32))
    moved = tokens * (depth * size + depth + 4 + 4)
    source = cupy.zeros(moved // 2, np.uint8)
    copy = partial(cupy.copyto, cupy.empty_like(source), source)
    return [partial(write_keys, keys, *pools, slots=slots)], [copy], "a copy of the same bytes"


def measure(case: Case, timer: Timer) -> list[dict[str, Any]]:
    """Median microseconds of a comparison."""
    import cupy

    copies = -(-COLD_BYTES // (case.depth * sum(case.keys))) if max(case.new) == 1 else 1
    if case.data == "merge":
        scored = replace(case, data="random")
        ours, theirs = _merge(case), scoring(scored, Arrays(scored, 1))
        words = "scoring of one rank"
    elif case.data.startswith("write"):
        ours, theirs, words = _writes(case)
    else:
        ours, theirs, words = _operation(case, min(copies, 64))
    variants = {(0, "ours"): Variant(ours, "cupy"), (0, "theirs"): Variant(theirs, "cupy")}
    times = timer.samples(variants, 21)
    variants.clear()
    cupy.get_default_memory_pool().free_all_blocks()
    return [figures(case, words, times[0, "ours"], times[0, "theirs"])]


def figures(
    case: Case, compared_with: str, times: Sequence[float], compared: Sequence[float]
) -> dict[str, Any]:
    """A row of the result."""
    return {
        "group": case.group,
        "data": case.data,
        "shape": case.name,
        **spread("us", times),
        "compared_with": compared_with,
        **spread("compared_us", compared),
        "ratio": round(float(np.median(times) / np.median(compared)), 3),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Each comparison, with its ratio."""
    columns = "data", "shape", "us", "compared_with", "compared_us", "ratio"
    result = Table(*columns, title="Other layouts, outputs, shards and writers")
    for row in rows:
        if row["group"] == "doors":
            result.add_row(*(str(row[name]) for name in columns))
    return result
