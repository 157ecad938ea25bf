"""What ``python -m mla_fp8 bench`` measures: the shapes of ``docs/benchmarks.md``.

Numbers are drawn by NumPy, a few millions of them, and repeated on the device from other offsets:
cuRAND need not be installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_fp8 import fp8
from mla_fp8.cli import patterns

_DRAWN = 1 << 23


@dataclass(frozen=True)
class Case:
    """A causal batch: sequences of ``keys`` keys each, the last ``new`` of them new."""

    group: str
    num_heads: int
    new: tuple[int, ...]
    keys: tuple[int, ...]
    page_size: int = 64
    depth: int = 128
    data: str = "random"  # or "real-like"; or "zeros": half of the scores; or all "ascending", ...
    bound: int = 0  # keys a sequence may have, as far as the host knows; 0: those of the longest
    k: int = 2048
    kpool: int = 1  # tokens that a cached row stands for; ``keys`` counts tokens
    model: str = ""  # of `mla_fp8.presets`

    @property
    def rows(self) -> tuple[int, ...]:
        """Cached rows of each sequence: its keys, unless they are pooled."""
        return tuple(n // self.kpool for n in self.keys)

    @property
    def pairs(self) -> int:
        """(token, cached row) pairs that are seen."""
        if self.kpool == 1:
            pairs = zip(self.new, self.keys, strict=True)
            return sum(t * (n - t) + t * (t + 1) // 2 for t, n in pairs)
        tokens = (np.arange(n - t, n) + 1 for t, n in zip(self.new, self.keys, strict=True))
        return sum(int((seen // self.kpool).sum()) for seen in tokens)

    @property
    def flop(self) -> int:
        return 2 * self.num_heads * self.depth * self.pairs

    @property
    def bytes(self) -> int:
        """Scoring: keys with their scales read once, scores written once."""
        return (self.depth + 4) * sum(self.rows) + 4 * self.pairs

    @property
    def whole_bytes(self) -> int:
        """The whole operation: keys with their scales read once, k positions written per token."""
        return (self.depth + 4) * sum(self.rows) + 4 * self.k * sum(self.new)

    @property
    def name(self) -> str:
        batch, new, keys = len(self.new), sorted(set(self.new)), sorted(set(self.keys))
        tokens = f"{new[0]}" if len(new) == 1 else f"{new[0]}..{new[-1]}"
        length = f"{keys[0]}" if len(keys) == 1 else f"{keys[0]}..{keys[-1]}"
        return f"{batch} x {tokens} x {length}" + f" of {self.bound}" * (self.bound > 0)


def ragged_lengths(batch: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Log-uniform lengths in a fixed shuffle."""
    lengths = np.exp(np.linspace(math.log(shortest), math.log(longest), batch)).astype(int)
    return tuple(int(n) for n in np.random.default_rng(0).permutation(lengths))


def cases() -> list[Case]:
    """What is measured: the shapes of ``docs/benchmarks.md``."""
    found = []
    shapes = [(2048, 8192), (4096, 16384), (4096, 65536), (4096, 131072)]
    for heads in (64, 32, 128, 16, 8):
        found += [Case("prefill", heads, (t,), (n,)) for t, n in shapes]
    for new in (1, 2):
        for batch in (1, 4, 16, 64, 256):
            for keys in (8192, 32768, 131072):
                found.append(Case("decode", 64, (new,) * batch, (keys,) * batch))
    for heads in (32, 128):
        for batch, keys in ((1, 131072), (16, 32768), (64, 131072), (256, 32768)):
            found.append(Case("decode", heads, (1,) * batch, (keys,) * batch))
    for new in (1, 64):
        lengths = ragged_lengths(64, 128, 131072)
        mean = round(sum(lengths) / 64)
        found.append(Case("ragged", 64, tuple(min(new, n) for n in lengths), lengths))
        found.append(Case("ragged", 64, (new,) * 64, (mean,) * 64))
    for page in (1, 16, 48, 64, 128, 256):
        found.append(Case("pages", 64, (4096,), (16384,), page))
        found.append(Case("pages", 64, (1,) * 64, (32768,) * 64, page))
    for new, keys in ((4096, 16384), (4096, 65536), (8192, 65536), (4096, 131072)):
        found += [Case("topk", heads, (new,), (keys,)) for heads in (64, 128)]
    found += [Case("topk", 32, (4096,), (keys,)) for keys in (4096, 8192, 32768, 65536, 262144)]
    found += [Case("topk", 32, (256,), (1 << 20,))]
    for data in ("zeros", "ascending", "descending", "equal", "two values"):
        found.append(Case("topk", 64, (4096,), (16384,), data=data))
        found.append(Case("topk", 64, (4096,), (65536,), data=data))
    decode = [(1, 131072), (16, 131072), (64, 131072), (1, 32768), (256, 32768), (1, 1 << 20)]
    for b, n in [*decode, (8, 1 << 20), (16, 4096), (1, 8192)]:
        found += [Case("decode topk", heads, (1,) * b, (n,) * b) for heads in (64, 128)]
    found += [Case("decode topk", 64, (new,) * 64, (32768,) * 64) for new in (1, 2, 4)]
    for batch in (1, 8, 64, 256):  # a graph captured for a million keys
        for bound in (0, 1 << 20):
            found.append(Case("frozen topk", 64, (1,) * batch, (4096,) * batch, bound=bound))
    lengths = ragged_lengths(48, 64, 131072)
    ones, chunk = (1,) * 48, ((512, 512), (16384, 4096))  # and prefill, apart and in one call
    found.append(Case("mixed topk", 64, ones, lengths))
    found.append(Case("mixed topk", 64, *chunk))
    found.append(Case("mixed topk", 64, ones + chunk[0], lengths + chunk[1]))
    return found + select_cases()


def select_cases() -> list[Case]:
    """Selection alone: ``new`` rows for each of ``keys`` lengths, all patterns of scores."""
    counts = [(4096,), (4096,), (16,), (1,), (256,), (1,) * 48]
    columns = [(16384,), (65536,), (131072,), (131072,), (32768,), ragged_lengths(48, 64, 131072)]
    return [
        Case("select", 0, *shape, data=name)
        for shape in zip(counts, columns, strict=True)
        for name in patterns.ROWS
    ]


class _Repeated:
    """Arrays of numbers that were drawn once, each from an offset of its own."""

    def __init__(self, drawn: np.ndarray, xp: Any) -> None:
        self._xp, self._drawn, self._uses = xp, xp.asarray(drawn), 0

    def __call__(self, shape: tuple[int, ...]) -> Any:
        flat = self._xp.empty(math.prod(shape), self._drawn.dtype)
        for first in range(0, flat.size, self._drawn.size):
            part = flat[first : first + self._drawn.size]
            self._uses += 1  # 40503 is odd: no key is an earlier one
            part[...] = self._xp.roll(self._drawn, 40503 * self._uses)[: part.size]
        return flat.reshape(shape)


class Arrays:
    """Inputs of a case, in CuPy or ``xp``; ``copies`` disjoint sets of pages, a table for each."""

    def __init__(self, case: Case, copies: int, xp: Any = None) -> None:
        if xp is None:
            import cupy

            xp = cupy
        self._xp = xp
        rng = np.random.default_rng(0)
        drawn = rng.integers(0, 254, _DRAWN, np.uint8)  # +-0 ... 448, no NaN
        codes = _Repeated(drawn + (drawn >= 127).astype(np.uint8), xp)
        uniform, normal = (
            _Repeated(draw(_DRAWN, np.float32), xp) for draw in (rng.random, rng.standard_normal)
        )

        page, batch = case.page_size, len(case.new)
        tokens, used = sum(case.new), [-(-n // page) for n in case.rows]
        columns, pages = max(*used, case.bound // page), sum(used)
        self.q = codes((tokens, case.num_heads, case.depth))
        self.qs = normal((tokens, case.num_heads))
        self.offsets = xp.asarray(np.concatenate([[0], np.cumsum(case.new)]), dtype=np.uint32)
        cached = np.array(case.keys) - np.array(case.new)
        self.lengths = xp.asarray(cached, dtype=np.uint32)
        self.keys = xp.asarray(case.keys, dtype=np.int32)
        longest = max(cached.max(), case.bound - max(case.new))
        self.most = np.array([[max(case.new), longest]], np.uint32)
        # As DeepGEMM stores a block: its keys, then its scales.
        self.blocks = codes((copies * pages, 1, 1, page, 1, case.depth))
        self.scales = uniform((copies * pages, 1, 1, page, 1, 1))
        order = np.random.default_rng(1).permutation(copies * pages).reshape(copies, pages)
        if case.data == "zeros":
            self.blocks[:, :, :, ::2] = 0
        elif case.data == "real-like":
            self._make_real(case, normal, order, used)
        elif case.data != "random":  # one key, and scales that say what the scores are
            self.blocks[...] = self.blocks[0, 0, 0, 0]
            xp.abs(self.qs, out=self.qs)
            ramp = np.arange(pages * page, dtype=np.float32)
            ramp = {
                "ascending": ramp,
                "descending": ramp[::-1],
                "equal": np.ones_like(ramp),
                "two values": 1 + ramp % 2,
            }[case.data]
            for numbers in order:
                self.scales[numbers] = xp.asarray(ramp.reshape(pages, 1, 1, page, 1, 1))
        self.tables = []
        for numbers in order:
            table = np.zeros((batch, columns), np.uint32)
            first = 0
            for b, count in enumerate(used):
                table[b, :count] = numbers[first : first + count]
                first += count
            self.tables.append(xp.asarray(table))

    def inputs(self, table: Any) -> tuple[Any, ...]:
        """The arguments of a call that reads the pages of ``table``."""
        pages = self.blocks, self.lengths, table, self.most, self.scales
        return self.q, self.qs, self.offsets, *pages, 0

    def _make_real(self, case: Case, normal: _Repeated, order: np.ndarray, used: list[int]) -> None:
        """Queries, gates and keys as models give them, the keys of sequences in ``used`` pages."""
        common = normal((case.depth,))
        queries = patterns.real_queries(normal, common, *self.qs.shape)
        codes, scales = fp8.quantize(queries)
        self.q, self.qs = codes.view(np.uint8), self.qs * scales[..., 0]
        for numbers in order:
            first = 0
            for length, count in zip(case.rows, used, strict=True):
                # the last page is filled: what is behind the end is not read
                place = self._xp.arange(count * case.page_size, dtype=np.float32) / np.float32(
                    length
                )
                keys, factors = patterns.real_keys(normal, common, place)
                codes, scales = fp8.quantize(keys)
                where = self._xp.asarray(numbers[first : first + count])
                self.blocks[where] = codes.view(np.uint8).reshape(count, *self.blocks.shape[1:])
                self.scales[where] = (scales[:, 0] * factors).reshape(count, *self.scales.shape[1:])
                first += count
