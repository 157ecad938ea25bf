"""What ``python -m mla_fp8 bench`` measures: the shapes of ``docs/benchmarks.md``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """A causal batch: sequences of ``keys`` keys each, the last ``new`` of them new."""

    group: str
    num_heads: int
    new: tuple[int, ...]
    keys: tuple[int, ...]
    page_size: int = 64
    depth: int = 128
    data: str = "random"  # or "zeros": half of the scores; or every row's scores "ascending", ...

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
        return f"{batch} x {tokens} x {length}"


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
    found += [Case("decode topk", 64, (1,) * b, (131072,) * b) for b in (1, 16, 64)]
    found += [Case("decode topk", 64, (1,) * b, (32768,) * b) for b in (1, 256)]
    return found
