"""One generator of problems for tests and benchmarks: a frozen `Spec` builds a `Case` of arrays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mla_fp8.cli.fuzz_data import FP8, NAN_CODES, VALUES, normal_codes

ARGUMENTS = (
    "q",
    "qs",
    "input_row_offsets",
    "k_blocks",
    "k_cache_lengths",
    "k_lookup_table",
    "k_max_lengths",
    "k_scales",
    "layer_idx",
)


@dataclass(frozen=True)
class Spec:
    """What a problem looks like; `build` turns it into arrays, the same ones every time."""

    seq_lens: tuple[int, ...] = (3, 1)
    cache_lens: tuple[int, ...] = (70, 130)
    num_heads: int = 8
    depth: int = 128
    kv_heads: int = 1
    granularity: int = 0  # 0: depth
    kpool: int = 1  # tokens that a cached row stands for
    page_size: int = 64
    num_layers: int = 1
    layer: int = 0
    k: int = 64
    mask: str = "causal"
    values: str = "normal"  # see VALUES
    spare_pages: int = 0  # table columns past the longest sequence
    slack: tuple[int, int] = (0, 0)  # k_max_lengths beyond the true maxima
    shared: bool = False  # sequences share the pages of their common prefix
    index_dtype: str = "uint32"  # or int32
    fp8_dtype: str = "float8_e4m3fn"  # or uint8
    seed: int = 0

    def __post_init__(self) -> None:
        assert len(self.seq_lens) == len(self.cache_lens)

    def build(self) -> Case:
        rng = np.random.default_rng(self.seed)
        new = np.array(self.seq_lens, np.int64)
        cached = np.array(self.cache_lens, np.int64)
        total, batch = int(new.sum()), len(new)
        rows = (new + cached) // self.kpool
        used = -(-rows // self.page_size)  # pages per sequence
        columns = int(used.max(initial=0)) + self.spare_pages
        table, num_blocks = self._table(rng, used, columns)
        granularity = min(self.granularity or self.depth, self.depth)

        slots = (num_blocks, 1, self.num_layers, self.page_size, self.kv_heads)
        q = normal_codes(rng, (total, self.num_heads, self.depth))
        qs = rng.standard_normal((total, self.num_heads)).astype(np.float32)
        keys = normal_codes(rng, (*slots, self.depth))
        scales = rng.uniform(0.25, 4.0, (*slots, self.depth // granularity)).astype(np.float32)
        VALUES[self.values](rng, q, qs, keys, scales)
        self._spoil_unused(rng, table, rows, keys, scales)

        fp8 = FP8 if self.fp8_dtype == "float8_e4m3fn" else np.uint8
        most = [[new.max(initial=0), cached.max(initial=0)]]
        return Case(
            spec=self,
            q=q.view(fp8),
            qs=qs,
            input_row_offsets=np.concatenate([[0], new.cumsum()]).astype(self.index_dtype),
            k_blocks=keys.view(fp8),
            k_cache_lengths=cached.astype(self.index_dtype),
            # through int64: garbage of all ones becomes -1 as int32
            k_lookup_table=table.astype(self.index_dtype).reshape(batch, columns),
            k_max_lengths=(np.array(most) + self.slack).astype(self.index_dtype),
            k_scales=scales,
            layer_idx=self.layer,
        )

    def _table(self, rng, used, columns):
        """Permuted pages, prefixes shared on demand, garbage behind each sequence's last page."""
        num_blocks = int(used.sum()) + 3
        pages = iter(rng.permutation(num_blocks))
        garbage = np.array([0, num_blocks - 1, num_blocks, 2**31 - 1, 2**31, 2**32 - 1])
        table = rng.choice(garbage, (len(used), columns))
        for b, count in enumerate(used):
            table[b, :count] = [next(pages) for _ in range(count)]
            if self.shared and b:
                # only whole pages of both sequences' cached prefix are common property
                common = min(self.cache_lens[0], self.cache_lens[b]) // self.kpool // self.page_size
                table[b, :common] = table[0, :common]
        return table, num_blocks

    def _spoil_unused(self, rng, table, lengths, keys, scales):
        """Whatever no sequence holds (free pages, page tails, other layers) becomes NaN."""
        held = np.zeros((len(keys), self.num_layers, self.page_size), bool)
        for b, length in enumerate(lengths):
            position = np.arange(length)
            page = table[b, position // self.page_size].astype(np.int64)
            held[page, self.layer, position % self.page_size] = True
        keys[:, 0][~held] = rng.choice(NAN_CODES, keys[:, 0][~held].shape)
        scales[:, 0][~held] = np.nan


@dataclass(frozen=True)
class Case:
    """The nine arguments as arrays of one backend, and the parameters that go with them."""

    spec: Spec
    q: Any
    qs: Any
    input_row_offsets: Any
    k_blocks: Any
    k_cache_lengths: Any
    k_lookup_table: Any
    k_max_lengths: Any
    k_scales: Any
    layer_idx: Any
    xp: Any = field(default=np, repr=False)

    @property
    def args(self) -> tuple:
        return tuple(getattr(self, name) for name in ARGUMENTS)

    @property
    def params(self) -> dict[str, Any]:
        return {
            "num_heads": self.spec.num_heads,
            "depth": self.spec.depth,
            "k": self.spec.k,
            "quantization_granularity": self.spec.granularity or self.spec.depth,
            "mask": self.spec.mask,
            "kpool": self.spec.kpool,
        }

    @property
    def tokens(self) -> int:
        return self.q.shape[0]

    def replace(self, **arrays) -> Case:
        return dataclasses.replace(self, **arrays)

    def to(self, xp, *, device_max_lengths: bool = False) -> Case:
        """The same case on another backend; `k_max_lengths` stays on the host unless asked."""
        if xp is np:
            return self
        given = [name for name in ARGUMENTS[:-1] if getattr(self, name) is not None]
        moved = {name: to_backend(xp, getattr(self, name)) for name in given}
        if not device_max_lengths:
            moved["k_max_lengths"] = self.k_max_lengths
        return self.replace(xp=xp, **moved)

    def chunk(self, b: int, first: int, last: int) -> Case:
        """New tokens first .. last - 1 of sequence b alone, as the call of their own (host only).

        Under `causal` each of them sees the same keys as in the batch.
        """
        start = int(self.input_row_offsets[b])
        tokens = slice(start + first, start + last)
        offsets, lengths = self.input_row_offsets, self.k_cache_lengths
        new, cached = last - first, int(lengths[b]) + first
        return self.replace(
            q=self.q[tokens],
            qs=self.qs[tokens],
            input_row_offsets=np.array([0, new], offsets.dtype),
            k_cache_lengths=np.array([cached], lengths.dtype),
            k_lookup_table=self.k_lookup_table[b : b + 1],
            k_max_lengths=np.array([[new, cached]], lengths.dtype),
        )


def to_backend(xp, array):
    """FP8 travels as uint8 where the array library has no such dtype."""
    if xp is np:
        return array
    return xp.asarray(array.view(np.uint8) if array.dtype == FP8 else array)


TINY = Spec((2, 1), (5, 9), num_heads=4, depth=64, page_size=8, k=6)  # for what is refused


def tiny_arguments(**arrays):
    """The arguments of a call on `TINY`, some of them replaced."""
    return TINY.build().replace(**arrays).args
