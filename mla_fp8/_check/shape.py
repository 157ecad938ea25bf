"""All plain numbers that a call depends on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

# Kernels count these extents in int32 and may step past the end by less than 2**16.
MOST = 2**31 - 2**16


class Parameters(NamedTuple):
    """The parameters of an operator that its inputs are checked against."""

    num_heads: int
    depth: int
    groups: int  # scales per key
    causal: bool
    kpool: int  # tokens that a cached row stands for


@dataclass(frozen=True)
class Shape:
    """All plain numbers a call depends on. It is hashable, because plans are cached by it."""

    num_heads: int
    depth: int
    kv_heads: int
    scale_groups: int
    causal: bool
    total_seq_len: int
    batch: int
    num_blocks: int
    num_layers: int
    page_size: int
    pages_per_seq: int
    max_new: int  # bound of a sequence's new tokens; results do not depend on it, speed does
    max_keys: int  # bound of the keys a token sees
    signed_offsets: bool
    signed_lengths: bool
    total_lengths: bool = False  # lengths count the new tokens
    kpool: int = 1  # tokens that a cached row stands for
    key_step: int = 1  # rows from one row of a shard to its next
    sharded: bool = False  # the cache is a shard: row j of it need not be position j
    key_alignment: int = 16  # bytes: 16, 4 or 1

    @property
    def tokens_per_key(self) -> int:
        """Tokens from one row of the cache to the next."""
        return self.kpool * self.key_step

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))


def rows_seen(tokens: Any, kpool: int, key_start: Any, key_step: int) -> Any:
    """How many of a shard's rows a token sees that sees this many tokens; or arrays of these.

    Row ``j`` of the shard is row ``key_start + key_step * j`` of the sequence, and that row is
    visible once the last of its ``kpool`` tokens is.
    """
    rows = (tokens + kpool * (key_step - 1 - key_start)) // (kpool * key_step)
    return np.maximum(rows, 0) if isinstance(rows, np.ndarray) else max(rows, 0)


def check_extent(name: str, axis: str, extent: int, most: int) -> None:
    """Raise on an extent that kernels cannot count."""
    if extent > most:
        raise ValueError(f"{name} must have {axis} <= {most}; got {extent}")
