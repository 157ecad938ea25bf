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

    @property
    def pairs(self) -> int:
        """(token, key) pairs that are seen."""
        return sum(t * (n - t) + t * (t + 1) // 2 for t, n in zip(self.new, self.keys, strict=True))

    @property
    def flop(self) -> int:
        return 2 * self.num_heads * self.depth * self.pairs

    @property
    def bytes(self) -> int:
        """Keys with their scales read once, scores written once."""
        return (self.depth + 4) * sum(self.keys) + 4 * self.pairs

    @property
    def name(self) -> str:
        batch, new, keys = len(self.new), sorted(set(self.new)), sorted(set(self.keys))
        tokens = f"{new[0]}" if len(new) == 1 else f"{new[0]}..{new[-1]}"
        length = f"{keys[0]}" if len(keys) == 1 else f"{keys[0]}..{keys[-1]}"
        return f"{batch} x {tokens} x {length}" + f" of {self.bound}" * (self.bound > 0)


def _ragged(batch: int, shortest: int, longest: int) -> tuple[int, ...]:
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
        lengths = _ragged(64, 128, 131072)
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
    lengths = _ragged(48, 64, 131072)
    ones, chunk = (1,) * 48, ((512, 512), (16384, 4096))  # and prefill, apart and in one call
    found.append(Case("mixed topk", 64, ones, lengths))
    found.append(Case("mixed topk", 64, *chunk))
    found.append(Case("mixed topk", 64, ones + chunk[0], lengths + chunk[1]))
    return found + select_cases()


def select_cases() -> list[Case]:
    """Selection alone: ``new`` rows for each of ``keys`` lengths, all patterns of scores."""
    counts = [(4096,), (4096,), (16,), (1,), (256,), (1,) * 48]
    columns = [(16384,), (65536,), (131072,), (131072,), (32768,), _ragged(48, 64, 131072)]
    return [
        Case("select", 0, *shape, data=name)
        for shape in zip(counts, columns, strict=True)
        for name in patterns.ROWS
    ]


class _Repeated:
    """Arrays on the device of numbers that were drawn once, each from an offset of its own."""

    def __init__(self, drawn: np.ndarray) -> None:
        import cupy

        self._drawn, self._uses = cupy.asarray(drawn), 0

    def __call__(self, shape: tuple[int, ...]) -> Any:
        import cupy

        flat = cupy.empty(math.prod(shape), self._drawn.dtype)
        for first in range(0, flat.size, self._drawn.size):
            part = flat[first : first + self._drawn.size]
            self._uses += 1  # 40503 is odd: no key is an earlier one
            part[...] = cupy.roll(self._drawn, 40503 * self._uses)[: part.size]
        return flat.reshape(shape)


class Arrays:
    """Inputs of a case on the device; ``copies`` disjoint sets of pages, one table for each."""

    def __init__(self, case: Case, copies: int) -> None:
        import cupy

        rng = np.random.default_rng(0)
        drawn = rng.integers(0, 254, _DRAWN, np.uint8)  # +-0 ... 448, no NaN
        codes = _Repeated(drawn + (drawn >= 127).astype(np.uint8))
        uniform, normal = (
            _Repeated(draw(_DRAWN, np.float32)) for draw in (rng.random, rng.standard_normal)
        )

        page, batch = case.page_size, len(case.new)
        tokens, used = sum(case.new), [-(-n // page) for n in case.keys]
        columns, pages = max(*used, case.bound // page), sum(used)
        self.q = codes((tokens, case.num_heads, case.depth))
        self.qs = normal((tokens, case.num_heads))
        self.offsets = cupy.asarray(np.concatenate([[0], np.cumsum(case.new)]), dtype=np.uint32)
        cached = np.array(case.keys) - np.array(case.new)
        self.lengths = cupy.asarray(cached, dtype=np.uint32)
        self.keys = cupy.asarray(case.keys, dtype=np.int32)
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
            cupy.abs(self.qs, out=self.qs)
            ramp = np.arange(pages * page, dtype=np.float32)
            ramp = {
                "ascending": ramp,
                "descending": ramp[::-1],
                "equal": np.ones_like(ramp),
                "two values": 1 + ramp % 2,
            }[case.data]
            self.scales[order[0]] = cupy.asarray(ramp.reshape(pages, 1, 1, page, 1, 1))
        self.tables = []
        for numbers in order:
            table = np.zeros((batch, columns), np.uint32)
            first = 0
            for b, count in enumerate(used):
                table[b, :count] = numbers[first : first + count]
                first += count
            self.tables.append(cupy.asarray(table))

    def _make_real(self, case: Case, normal: _Repeated, order: np.ndarray, used: list[int]) -> None:
        """Queries, gates and keys as models give them, the keys of sequences in ``used`` pages."""
        import cupy

        common = normal((case.depth,))
        queries = patterns.real_queries(normal, common, *self.qs.shape)
        codes, scales = fp8.quantize(queries)
        self.q, self.qs = codes.view(np.uint8), self.qs * scales[..., 0]
        for numbers in order:
            first = 0
            for length, count in zip(case.keys, used, strict=True):
                # the last page is filled: what is behind the end is not read
                place = cupy.arange(count * case.page_size, dtype=np.float32) / np.float32(length)
                keys, factors = patterns.real_keys(normal, common, place)
                codes, scales = fp8.quantize(keys)
                where = cupy.asarray(numbers[first : first + count])
                self.blocks[where] = codes.view(np.uint8).reshape(count, *self.blocks.shape[1:])
                self.scales[where] = (scales[:, 0] * factors).reshape(count, *self.scales.shape[1:])
                first += count
