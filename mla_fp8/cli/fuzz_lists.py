"""Fuzz cases of `select_topk`, `merge_topk` and `write_keys`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_fp8.cli import oracle, patterns
from mla_fp8.cli.compare import demand, demand_same, guarded, same_bits
from mla_fp8.cli.fuzz_calls import array_module
from mla_fp8.cli.fuzz_data import LAYOUTS, hard_rows, make_pool
from mla_fp8.cli.fuzz_recipe import Recipe
from mla_fp8.keys import write_keys
from mla_fp8.topk import merge_topk, select_topk, topk_workspace

_SPECIALS = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.5, -1.5, 1e-45], np.float32)
SCORES = ("normal", "zeros", "specials", "equal", "close", "bits", "rows of the benchmark")
_FEWEST_COLUMNS = 10  # of the benchmark's rows
_GARBAGE = 0x5A


def _scores(name: str, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """float32 scores [rows, columns] of a pattern."""
    shape = rows, columns
    if name == "rows of the benchmark" and columns >= _FEWEST_COLUMNS:
        kind = str(rng.choice(patterns.ROWS))
        return patterns.rows(kind, rows, columns, int(rng.integers(2**31)))
    if name == "zeros":
        return np.fmax(rng.standard_normal(shape, np.float32), np.float32(-0.0))
    if name == "specials":
        return rng.choice(_SPECIALS, shape)
    if name == "equal":
        return np.full(shape, -2.5, np.float32)
    if name == "close":
        return 1 + rng.integers(0, 9, shape).astype(np.float32) * np.float32(2**-23)
    if name == "bits":
        return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
    return rng.standard_normal(shape, np.float32)


@dataclass(frozen=True)
class _Rows(Recipe):
    """What cases of selection and of merging share."""

    rows: int = 1
    k: int = 1
    values: str = "normal"
    sort: str = "position"
    return_scores: bool = False
    given: bool = False  # out= (and workspace=), full of garbage

    def __post_init__(self) -> None:
        if self.rows < 0 or self.k < 1 or self.values not in SCORES:
            raise ValueError(f"rows, k and values must be those of a case; got {self}")

    def _features(self, operation: str) -> list[str]:
        found = [f"operation: {operation}", f"scores of {operation}: {self.values}"]
        return [*found, f"{operation}: out= given"] if self.given else found

    def _options(self, xp: Any) -> tuple[dict[str, Any], list[Any]]:
        """The keywords that both functions take, and what checks the memory around ``out``."""
        options: dict[str, Any] = {"sort": self.sort, "return_scores": self.return_scores}
        if not self.given:
            return options, []
        dtypes = [np.int32] + [np.float32] * self.return_scores
        outs, checks = zip(
            *(guarded(xp, (self.rows, self.k), dtype, _GARBAGE) for dtype in dtypes), strict=True
        )
        return {**options, "out": outs if self.return_scores else outs[0]}, list(checks)

    def _compare(self, found: Any, columns: np.ndarray, wanted: np.ndarray, ids: Any) -> None:
        """``columns`` are the wanted places in rows of scores ``wanted``; ``ids`` name them."""
        there = columns >= 0
        at = np.where(there, columns, 0)
        positions = at if ids is None else np.take_along_axis(ids, at, axis=1)
        got = found if isinstance(found, tuple) else (found,)
        expected = np.where(there, positions, -1).astype(np.int32)
        demand_same("indices", got[0], expected)
        if self.return_scores:
            values = np.where(there, np.take_along_axis(wanted, at, axis=1), np.float32(-np.inf))
            demand_same("scores beside the indices", got[1], values)


@dataclass(frozen=True)
class Select(_Rows):
    """A call of `select_topk`."""

    columns: int = 1
    lengths: str = "none"  # or "int32", "uint32"
    hostile: bool = False  # lengths out of range

    def features(self) -> list[str]:
        """What this case tries, for the counts."""
        found = [*self._features("select_topk"), f"lengths of select_topk: {self.lengths}"]
        return [*found, "hostile: lengths of select_topk"] if self.hostile else found

    def check(self, backend: str) -> list[str]:
        """Run the case and compare it with the oracle; see `Recipe.check`."""
        xp, rng = array_module(backend), np.random.default_rng(self.seed)
        scores = _scores(self.values, rng, self.rows, self.columns)
        lengths, given = np.full(self.rows, self.columns), None
        if self.lengths != "none":
            lengths = rng.integers(0, self.columns + 1, self.rows)
            if self.hostile:
                wild = rng.choice([-1, -(2**31), 2**31 - 1, 2**32 - 1, self.columns + 1], self.rows)
                lengths = np.where(rng.random(self.rows) < 0.5, wild, lengths)
            bits = (lengths & 0xFFFFFFFF).astype(np.uint32)
            bits = bits if self.lengths == "uint32" else bits.view(np.int32)
            lengths, given = bits.astype(np.int64).clip(0, self.columns), xp.asarray(bits)
        here = xp.asarray(scores)
        options, checks = self._options(xp)
        if self.given:
            kept: dict[str, Any] = {"sort": self.sort, "return_scores": self.return_scores}
            options["workspace"] = topk_workspace(here, given, self.k, **kept)
            options["workspace"][...] = _GARBAGE
        found = select_topk(here, given, self.k, check=not self.hostile, **options)
        for intact in checks:
            intact()
        seen = np.arange(self.columns) < lengths[:, None]
        if self.columns:
            columns = oracle.expected_rows(scores, seen, self.k, self.sort)
            self._compare(found, columns, scores, None)
        demand(same_bits(here, scores), "scores must not be written")
        return ["NumPy" if xp is np else "select_topk"]


@dataclass(frozen=True)
class Merge(_Rows):
    """A call of `merge_topk`."""

    lists: int = 1
    width: int = 1
    padding: int = 0  # percent
    far: bool = False  # positions up to the largest int32

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.lists, self.width) < 1:
            raise ValueError(f"lists and width must be at least 1; got {self}")

    def features(self) -> list[str]:
        """What this case tries, for the counts."""
        return self._features("merge_topk")

    def check(self, backend: str) -> list[str]:
        """Run the case and compare it with the oracle; see `Recipe.check`."""
        xp, rng = array_module(backend), np.random.default_rng(self.seed)
        many, rows = self.lists * self.width, self.rows
        scores = _scores(self.values, rng, rows, many)
        step = (2**31 - 1) // many if self.far else 1
        ids = np.argsort(rng.random((rows, many)), axis=1) * step + rng.integers(0, step)
        ids = np.where(rng.random(ids.shape) < self.padding / 100, -1, ids)
        hidden = np.where(ids < 0, rng.choice([-1, -7, -(2**31)], ids.shape), ids)
        forms = (rows, self.lists, self.width)
        lists = [a.reshape(forms).swapaxes(0, 1) for a in (hidden.astype(np.int32), scores)]
        here = [xp.asarray(np.ascontiguousarray(a)) for a in lists]
        options, checks = self._options(xp)
        found = merge_topk(*here, k=self.k, **options)
        for intact in checks:
            intact()
        order = np.argsort(
            ids, axis=1, kind="stable"
        )  # so that of equal scores the smaller is first
        ids, scores = (np.take_along_axis(a, order, axis=1) for a in (ids, scores))
        columns = oracle.expected_rows(scores, ids >= 0, self.k, self.sort)
        self._compare(found, columns, scores, ids)
        return ["NumPy" if xp is np else "merge_topk"]


@dataclass(frozen=True)
class Write(Recipe):
    """A call of `write_keys`: every byte of the pool and of what lies between its pages."""

    tokens: int = 1
    blocks: int = 1
    page_size: int = 1
    kv_heads: int = 1
    num_layers: int = 1
    layer: int = 0
    depth: int = 32
    groups: int = 1
    layout: str = "contiguous"
    dtype: str = "float32"  # or "float16", or with NumPy "bfloat16"
    power_of_two: bool = False
    by_position: bool = False  # by sequence and position, not by slot

    def __post_init__(self) -> None:
        fits = 0 <= self.layer < self.num_layers and self.depth % self.groups == 0
        if not fits or min(self.blocks, self.page_size, self.kv_heads) < 1 or self.tokens < 0:
            raise ValueError(f"extents must fit; got {self}")

    def features(self) -> list[str]:
        """What this case tries, for the counts."""
        places = "sequences and positions" if self.by_position else "slots"
        name = "write_keys"
        found = {"layout": self.layout, "dtype": self.dtype, "places": places}
        return [f"operation: {name}", *(f"{kind} of {name}: {found[kind]}" for kind in found)]

    def check(self, backend: str) -> list[str]:
        """Run the case and compare it with the oracle; see `Recipe.check`."""
        xp, rng = array_module(backend), np.random.default_rng(self.seed)
        rows = hard_rows(self.tokens * self.kv_heads, self.depth, np.dtype(self.dtype), self.seed)
        keys = rng.permutation(rows).reshape(self.tokens, self.kv_heads, self.depth)
        form = self.blocks, self.num_layers, self.page_size, self.kv_heads, self.depth, self.groups
        pool, wanted = make_pool(xp, self.layout, *form), make_pool(np, self.layout, *form)
        room = self.blocks * self.page_size
        slots = rng.permutation(room + 8)[: self.tokens] - 4  # some below 0, some past the end
        slots = np.resize(slots, self.tokens) if len(slots) else slots
        slots[_repeated(slots)] = -1  # two tokens in one place are unspecified on a GPU
        given: dict[str, np.ndarray] = {"slots": slots.astype(np.int32)}
        if self.by_position:  # two sequences, whose pages alternate
            table = np.arange(self.blocks + 1, dtype=np.int32) - self.blocks % 2
            table = np.resize(np.append(table, 2**31 - 1), (2, len(table) // 2 + 1)).astype(
                np.int32
            )
            sequences, positions = rng.integers(-1, 3, len(slots)), rng.permutation(len(slots)) - 1
            slots = _slots_of(table, sequences, positions, self.page_size, self.blocks)
            positions[_repeated(slots)] = -1
            slots = np.where(positions < 0, -1, slots)
            given = {
                "sequences": sequences.astype(np.int32),
                "positions": positions.astype(np.int64),
                "k_lookup_table": table,
            }
        codes, scales = oracle.quantised(keys, self.groups, self.power_of_two)
        there = (slots >= 0) & (slots < room)
        block, offset = np.divmod(slots[there], self.page_size)
        wanted.k_blocks[block, 0, self.layer, offset] = codes[there]
        wanted.k_scales[block, 0, self.layer, offset] = scales[there]
        write_keys(
            xp.asarray(keys),
            pool.k_blocks,
            pool.k_scales,
            self.layer,
            power_of_two=self.power_of_two,
            **{name: xp.asarray(array) for name, array in given.items()},
        )
        demand(same_bits(pool.buffer, wanted.buffer), "the pool has other bytes")
        return ["NumPy" if xp is np else "write_keys"]


def _repeated(slots: np.ndarray) -> np.ndarray:
    """Which entries were there before."""
    repeated = np.ones(len(slots), bool)
    repeated[np.unique(slots, return_index=True)[1]] = False
    return repeated


def _slots_of(
    table: np.ndarray, sequences: np.ndarray, positions: np.ndarray, page_size: int, blocks: int
) -> np.ndarray:
    """The slot of each token; -1 if it has none."""
    batch, pages = table.shape
    exists = (sequences >= 0) & (sequences < batch) & (positions >= 0)
    exists &= positions < pages * page_size
    page, offset = np.divmod(np.where(exists, positions, 0), page_size)
    block = table[np.where(exists, sequences, 0), page].astype(np.int64)
    return np.where(exists & (block >= 0) & (block < blocks), block * page_size + offset, -1)


def draw(rng: Any, operator: dict[str, int], cuda: bool) -> Recipe:
    """A random case of one of the three; ``rng`` is a `random.Random`."""

    def some(*values: Any) -> Any:
        return rng.choice(values)

    k = operator["k"]
    shared: dict[str, Any] = {
        "seed": rng.getrandbits(31),
        "rows": some(0, 1, 1, 2, 3, 7, 40),
        "k": k,
        "values": some(*SCORES),
        "sort": some("position", "score"),
        "return_scores": rng.random() < 0.5,
        "given": rng.random() < 0.5,
    }
    kind = some("select", "merge", "write")
    if kind == "select":
        columns = some(0, 1, k, k + 1, rng.randint(1, 20), rng.randint(1, 400), 3000)
        if cuda:
            columns = some(columns, 9000, 70000)
            shared["rows"] = min(shared["rows"], 3) if columns > 9000 else shared["rows"]
        lengths = some("none", "int32", "uint32")
        hostile = lengths != "none" and rng.random() < 0.3
        return Select(**shared, columns=columns, lengths=lengths, hostile=hostile)
    if kind == "merge":
        lists = some(1, 2, 3, 8) if cuda else some(1, 2, 3, 5, 8, 17)
        width = min(k, 4096) if cuda else some(1, 2, min(k, 300), rng.randint(1, 64))
        return Merge(
            **shared,
            lists=lists,
            width=width,
            padding=some(0, 0, 20, 90, 100),
            far=rng.random() < 0.5,
        )
    layers = some(1, 1, 2)
    return Write(
        seed=shared["seed"],
        tokens=some(0, 1, 2, 7, 33),
        blocks=some(1, 3, 9),
        page_size=operator["page_size"],
        kv_heads=some(1, 1, 2),
        num_layers=layers,
        layer=rng.randrange(layers),
        depth=operator["depth"],
        groups=operator["groups"],
        layout=some(*LAYOUTS),
        dtype=some("float32", "float16", "float32" if cuda else "bfloat16"),
        power_of_two=rng.random() < 0.5,
        by_position=rng.random() < 0.4,
    )
