"""Fuzz cases of the whole operation: what a case holds, and how its arrays are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from mla_fp8.cli import fuzz_calls, oracle
from mla_fp8.cli.fuzz_data import LAYOUTS, NAN_CODES, VALUES, Codes, Floats, make_pool, normal_codes
from mla_fp8.cli.fuzz_recipe import Recipe

LISTS = ("offsets", "lengths", "table", "maxima", "starts")  # that may be int32, or hostile
_NO_BLOCK = 2**32 - 1
_NORMAL = normal_codes(np.random.default_rng(0), (1 << 16,))
_HUGE = (0, 1, -1, -2, 2**31 - 1, -(2**31), 2**32 - 1)  # as 32 bits


@dataclass(frozen=True)
class Index(Recipe):
    """A call of the whole operation and the dense scores behind it."""

    new: tuple[int, ...] = (1,)  # tokens of each sequence
    cached: tuple[int, ...] = (0,)
    num_heads: int = 1
    depth: int = 32
    kv_heads: int = 1
    groups: int = 1  # scales of a key
    k: int = 1
    mask: str = "causal"
    kpool: int = 1
    page_size: int = 1
    num_layers: int = 1
    layer: int = 0
    layout: str = "contiguous"
    values: str = "normal"
    gates: bool = True  # qs is an array
    large_poison: bool = False  # unused memory holds the largest keys, not NaN
    spare_pages: int = 0
    slack: tuple[int, int] = (0, 0)  # of k_max_lengths
    shared: bool = False  # sequences share the pages of their common prefix
    signed: tuple[str, ...] = ()  # lists that are int32, not uint32
    fp8: bool = False  # NumPy: q and k_blocks have the FP8 dtype, not uint8
    totals: bool = False  # k_total_lengths in place of k_cache_lengths
    start: int | None = None  # key_start of a shard
    starts: tuple[int, ...] | None = None  # key_start as an array
    key_step: int = 1
    holes: int = 0  # every so many pages of a shard are on another rank
    cut: int = 0  # pages at the end of a shard's table that are on another rank
    hostile: tuple[str, ...] = ()  # lists, or "scales", with values that are wrong
    check_values: bool | None = False
    output: str = "positions"
    sort: str = "position"
    return_scores: bool = False
    entry: str = "call"  # or "execute", "function", "bind"
    given: bool = False  # out= and workspace=, full of garbage
    device_maxima: bool = False  # CUDA: k_max_lengths is on the device
    scratch: int = 0  # CUDA: bytes for scores on their way to selection; 0: as tuned

    def __post_init__(self) -> None:
        wrong = {
            "one length each": len(self.new) != len(self.cached),
            "one start each": self.starts is not None and len(self.starts) != len(self.new),
            "two kinds of start": self.starts is not None and self.start is not None,
            "heads": min(self.num_heads, self.kv_heads) < 1 or self.num_heads % self.kv_heads > 0,
            "depth": self.depth not in (32, 64, 128, 256),
            "groups": self.groups > 1 and self.depth // self.groups not in (32, 64, 128),
            "extents": min(self.k, self.kpool, self.page_size, self.key_step, self.num_layers) < 1,
            "layer": not 0 <= self.layer < self.num_layers,
            "holes": not self.sharded and bool(self.holes or self.cut),
            "hostile starts": "starts" in self.hostile and self.starts is None,
            "NaN scales of granules": "scales" in self.hostile and self.groups > 1,
            "slack": len(self.slack) != 2,
            "execute": self.entry == "execute" and not self._fits_execute(),
        }
        if any(wrong.values()):
            raise ValueError(f"{[name for name in wrong if wrong[name]]} must fit; got {self}")

    def _fits_execute(self) -> bool:
        plain = self.output == "positions" and self.sort == "position" and not self.return_scores
        return plain and self.given and not (self.totals or self.sharded or self.hostile)

    @property
    def sharded(self) -> bool:
        """Whether the cache holds a part of each sequence."""
        return self.start is not None or self.starts is not None or self.key_step > 1

    @property
    def _poison_is_large(self) -> bool:
        """Whether unused memory holds large keys. Wrong values may name it: no NaN scales then."""
        return self.large_poison or bool(self.hostile)

    @property
    def key_start(self) -> Any:
        """The start for the oracle: None, an integer, or one for each sequence."""
        return self.start if self.starts is None else np.array(self.starts, np.int64)

    def check(self, backend: str) -> list[str]:
        """Run the case and compare it with the oracle; see `Recipe.check`."""
        return fuzz_calls.check(self, backend)

    def features(self) -> list[str]:
        """What this case tries, for the counts."""
        kinds = {
            f"mask: {self.mask}": True,
            f"layout: {self.layout}": True,
            f"values: {self.values}": True,
            f"poison: {'largest scores' if self._poison_is_large else 'NaN'}": True,
            f"output: {self.output}": True,
            f"sort: {self.sort}": True,
            f"entry: {self.entry}": True,
            f"check: {self.check_values}": True,
            f"depth: {self.depth}": True,
            "scores: returned": self.return_scores,
            "qs: None": not self.gates,
            "batch: empty": not self.new,
            "batch: an empty sequence": 0 in self.new,
            "batch: shared pages": self.shared,
            "page size: 1": self.page_size == 1,
            "page size: no power of two": self.page_size & (self.page_size - 1) > 0,
            "k: 1": self.k == 1,
            "k: above 4096": self.k > 4096,
            "kv heads: several": self.kv_heads > 1,
            "scales: several per key": self.groups > 1,
            "kpool: above 1": self.kpool > 1,
            "lengths: total": self.totals,
            "maxima: on the device": self.device_maxima,
            "maxima: above the lengths": any(self.slack),
            "maxima: far above the lengths": self.slack[1] >= 20000,
            "shard: one start": self.start is not None,
            "shard: a start for each sequence": self.starts is not None,
            "shard: interleaved": self.key_step > 1,
            "shard: pages on other ranks": bool(self.holes or self.cut),
            "arrays: FP8 dtype": self.fp8,
            "out= and workspace=": self.given,
            "scratch: limited": self.scratch > 0,
            **{f"int32: {name}": True for name in self.signed if name != "starts" or self.starts},
            **{f"hostile: {name}": True for name in self.hostile},
        }
        return ["operation: index_topk and index_scores", *(name for name in kinds if kinds[name])]

    def smaller(self) -> Iterator[dict[str, Any]]:
        """Changes of fields that make the case simpler: first, fewer sequences."""
        for b in range(len(self.new)):
            names = ("new", "cached", *(("starts",) if self.starts else ()))
            lists = {name: getattr(self, name) for name in names}
            yield {name: values[:b] + values[b + 1 :] for name, values in lists.items()}
        yield from super().smaller()

    # ---- arrays

    def build(self) -> SimpleNamespace:
        """The host arrays of the case, by argument name, and its pool of pages."""
        new, cached = np.array(self.new, np.int64), np.array(self.cached, np.int64)
        tokens, starts = int(new.sum()), np.zeros(len(new), np.int64)
        starts[...] = 0 if self.key_start is None else self.key_start
        held = self._rows(new + cached, starts)
        used = -(-held // self.page_size)
        columns = max(int(used.max(initial=0)) - self.cut, 0) + self.spare_pages
        used = np.minimum(used, columns)
        held = np.minimum(held, columns * self.page_size)
        common = self._rows(cached, starts) // self.page_size
        table, blocks = self._table(used, columns, common if self.shared else 0 * common)
        rng = self._random("numbers")

        q = _normal(rng, (tokens, self.num_heads, self.depth))
        qs = rng.standard_normal((tokens, self.num_heads)).astype(np.float32)
        pages = blocks, 1, self.num_layers, self.page_size, self.kv_heads
        keys = _normal(rng, (*pages, self.depth))
        scales = rng.uniform(0.25, 4.0, (*pages, self.groups)).astype(np.float32)
        VALUES[self.values](rng, q, qs, keys, scales)
        if "scales" in self.hostile:
            scales[rng.random(scales.shape) < 0.2] = np.nan
        self._poison(table, held, keys, scales)
        pool = make_pool(np, self.layout, *pages[:1], *pages[2:], self.depth, self.groups)
        pool.k_blocks[...], pool.k_scales[...] = keys, scales

        offsets = np.concatenate([[0], new.cumsum()])
        lengths = cached + new if self.totals else cached
        maxima = np.array([[new.max(initial=0), cached.max(initial=0)]]) + self.slack
        plausible = {
            "offsets": (offsets, tokens + 2),
            "lengths": (lengths, int((cached + new).max(initial=0)) * 2 + 2),
            "table": (table, blocks + 2),
            "maxima": (maxima, int(maxima.max()) + 2),
            "starts": (starts, int(held.max(initial=0)) * 2 + 2),
        }
        lists = {name: self._list(name, *known) for name, known in plausible.items()}
        given = lists["lengths"].astype(np.int64)
        case = SimpleNamespace(
            spec=SimpleNamespace(mask=self.mask, kpool=self.kpool),
            q=q,
            qs=qs if self.gates else None,
            input_row_offsets=lists["offsets"],
            k_lookup_table=lists["table"].reshape(len(new), columns),
            k_max_lengths=lists["maxima"],
            layer_idx=self.layer,
            lengths=lists["lengths"],
            starts=lists["starts"],
            pool=pool,
            k_blocks=pool.k_blocks,
            k_scales=pool.k_scales,
        )
        ranges = oracle.token_ranges(case)
        more = [end - first for first, end in ranges] if self.totals else 0 * new
        case.k_cache_lengths = given - more  # as the oracle takes them
        return case

    def _random(self, what: str) -> np.random.Generator:
        """Random numbers for one purpose: they stay the same while the rest is made smaller."""
        return np.random.default_rng([self.seed, *what.encode()])

    def _rows(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Rows that this cache holds of sequences of so many tokens."""
        rows: np.ndarray = -(-(tokens // self.kpool - starts) // self.key_step)
        return rows.clip(0)

    def _table(self, used: np.ndarray, columns: int, common: np.ndarray) -> tuple[np.ndarray, int]:
        """Permuted pages, shared ones where wanted, garbage behind each sequence's last page."""
        rng, blocks = self._random("pages"), int(used.sum()) + 3
        pages = iter(rng.permutation(blocks).tolist())
        garbage = np.array([0, blocks - 1, blocks, 2**31 - 1, 2**31, _NO_BLOCK])
        table = rng.choice(garbage, (len(used), columns))
        for b, count in enumerate(used.tolist()):
            table[b, :count] = [next(pages) for _ in range(count)]
            both = min(int(common[0]), int(common[b]), count, int(used[0]))
            table[b, :both] = table[0, :both]
            if self.holes:
                table[b, self.holes - 1 : count : self.holes] = _NO_BLOCK
        return table, blocks

    def _poison(
        self,
        table: np.ndarray,
        held: np.ndarray,
        keys: Codes,
        scales: Floats,
    ) -> None:
        """Fill what no sequence holds: free pages, page tails, other layers."""
        free = np.ones((len(keys), self.num_layers, self.page_size), bool)
        for b, count in enumerate(held.tolist()):
            position = np.arange(count)
            page = table[b, position // self.page_size]
            there = page < len(keys)
            free[page[there], self.layer, position[there] % self.page_size] = False
        if self._poison_is_large:
            keys[:, 0][free], scales[:, 0][free] = 0x7E, 2.0**20
        else:
            rng = self._random("poison")
            keys[:, 0][free] = rng.choice(NAN_CODES, keys[:, 0][free].shape)
            scales[:, 0][free] = np.nan

    def _list(self, name: str, values: np.ndarray, plausible: int) -> np.ndarray:
        """A list as it is given: 32 bits, hostile where the case says so."""
        if name in self.hostile:
            rng = self._random(name)
            wild = rng.choice([*_HUGE, int(rng.integers(2**32))], values.shape)
            small = rng.integers(0, plausible, values.shape)
            kind = rng.random(values.shape)
            values = np.where(kind < 0.4, values, np.where(kind < 0.7, small, wild))
            if name == "maxima" and name in self.signed:
                values = values & 0x7FFFFFFF  # below zero they are refused, whatever `check` is
        bits = (values & 0xFFFFFFFF).astype(np.uint32)
        return bits.view(np.int32) if name in self.signed else bits


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Codes:
    """E4M3 codes of normally distributed numbers, drawn from a table because that is fast."""
    codes: Codes = _NORMAL[rng.integers(0, 1 << 16, shape, np.uint16)]
    return codes


def draw(rng: Any, operator: dict[str, int], cuda: bool) -> Index:
    """A random case for an operator's numbers; ``rng`` is a `random.Random`."""

    def some(*values: Any) -> Any:
        return rng.choice(values)

    def subset(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if rng.random() < 0.5)

    batch = some(0, 1, 1, 2, 2, 3, 3, 4, 6)
    # The most new tokens of a sequence.
    most = some(1, 3, 20, 40, 40, 130) if cuda else some(1, 1, 3, 3, 6, 20, 40)
    long = some(2, 8, 40, 40, 90, 90, 300, some(700, 700, some(2000, 9000) if cuda else 2000))
    new = tuple(rng.randint(0, most) if rng.random() < 0.7 else min(most, 1) for _ in range(batch))
    products = operator["num_heads"] * operator["depth"]
    while sum(new) * long * products > (5e8 if cuda else 3e7) or (
        cuda and sum(new) * operator["k"] > 4e6
    ):
        new, long = tuple(n // 2 for n in new), long // 2 + 1
    kpool = operator["kpool"]
    cached = tuple(rng.randint(0, long) * kpool + rng.randrange(kpool) for _ in new)
    page_size = operator["page_size"]
    layers = some(1, 1, 1, 2, 3)
    kind = some("one", "each") if rng.random() < 0.2 else "none"
    sharded = operator["key_step"] > 1 or kind != "none"
    rows = long // operator["key_step"] + 1
    starts = tuple(rng.randint(0, rows) for _ in new) if kind == "each" else None
    hostile = subset(("offsets", "lengths", "table", "maxima")) if rng.random() < 0.25 else ()
    if starts is not None and rng.random() < 0.3:
        hostile += ("starts",)
    if operator["groups"] == 1 and rng.random() < 0.03:
        hostile += ("scales",)
    wide = rng.random() < (0.15 if cuda else 0.02)  # bounds far above the lengths
    given = rng.random() < 0.4
    output, sort = some("positions", "positions", "slots", "both"), some("position", "score")
    scores = rng.random() < 0.5
    totals = rng.random() < 0.25
    scratch = some(0, 1 << 10, 1 << 12, 1 << 14, 1 << 17) if cuda else 0
    entry = (
        "call" if scratch and rng.random() < 0.7 else some("call", "function", "bind", "execute")
    )
    if entry == "execute":
        output, sort, scores, totals, given = "positions", "position", False, False, True
        entry = "call" if sharded or hostile else entry
    return Index(
        seed=rng.getrandbits(32),
        new=new,
        cached=cached,
        **operator,
        mask=some("causal", "causal", "null"),
        num_layers=layers,
        layer=rng.randrange(layers),
        layout=some("contiguous", "contiguous", *LAYOUTS[1:]),
        values=some("normal", *VALUES),
        gates=rng.random() < 0.85,
        large_poison=rng.random() < 0.5,
        spare_pages=12000 // page_size if wide else some(0, 0, 1, 3),
        slack=(some(0, 0, 1, 50), 20000 if wide else some(0, 0, 7, 3 * page_size)),
        shared=rng.random() < 0.3,
        signed=subset(LISTS) if rng.random() < 0.5 else (),
        fp8=not cuda and rng.random() < 0.5,
        totals=totals,
        start=rng.randint(0, rows) if kind == "one" else None,
        starts=starts,
        holes=some(0, 0, 2, 3) if sharded else 0,
        cut=some(0, 0, 1) if sharded else 0,
        hostile=hostile,
        check_values=False if hostile and rng.random() < 0.7 else some(None, True, False),
        output=output,
        sort=sort,
        return_scores=scores,
        entry=entry,
        given=given,
        device_maxima=cuda and rng.random() < 0.3,
        scratch=scratch if entry == "call" else 0,
    )
