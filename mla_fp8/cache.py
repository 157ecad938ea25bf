"""`PagedKeyCache`: the one owner of page bytes on the host's side of the interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_fp8 import fp8
from mla_fp8._arrays import FP8, Array, as_arrays, as_floats, device_of, namespace_of
from mla_fp8._parameters import DEPTHS, check_int, scale_groups
from mla_fp8._streams import stream_order

_UNUSED = np.uint32(0xFFFFFFFF)  # a table slot without a page: no block has this number


class CacheView(NamedTuple):
    """The cache arguments of the operation, in their order: ``op(q, qs, offsets, *view)``."""

    k_blocks: Array
    k_cache_lengths: Array
    k_lookup_table: Array
    k_max_lengths: np.ndarray
    k_scales: Array
    layer_idx: int


class PagedKeyCache:
    """FP8 keys of a batch of sequences in pages, with their scales and lookup table.

    Make one by `from_dense`, extend it by `append`, hand it to the operation by `view`. The tokens
    of the last of these calls are the new ones: a view's ``k_cache_lengths`` does not count them.
    A full pool of blocks is replaced by one of twice the size, so arrays of earlier views
    may be out of date after `append`.

    Attributes
    ----------
    k_scales : float32, [num_blocks, 1, num_layers, page_size, kv_heads, depth // granularity]
    k_lookup_table : uint32, [batch, pages_per_seq]
        4294967295 in unused slots.
    lengths : int64 NumPy array, [batch]
        Tokens held.
    """

    def __init__(
        self,
        batch: int,
        depth: int,
        *,
        num_layers: int = 1,
        kv_heads: int = 1,
        page_size: int = 64,
        granularity: int | None = None,
        power_of_two: bool = False,
        xp: Any = np,
    ) -> None:
        self._xp = xp
        positive = range(1, 2**31)
        self.depth = check_int("depth", depth, DEPTHS)
        self.num_layers = check_int("num_layers", num_layers, positive)
        self.kv_heads = check_int("kv_heads", kv_heads, positive)
        self.page_size = check_int("page_size", page_size, positive)
        wanted = self.depth if granularity is None else granularity
        self.granularity = min(check_int("granularity", wanted, positive), self.depth)
        self._groups = scale_groups("granularity", self.depth, self.granularity)
        self.power_of_two = power_of_two
        self.lengths = np.zeros(batch, np.int64)
        self._new = np.zeros(batch, np.int64)
        self._blocks_used = 0
        self._table = np.full((batch, 0), _UNUSED)
        self._bytes, self.k_scales = self._pool(0)
        self.k_lookup_table: Array = xp.asarray(self._table)

    @classmethod
    def from_dense(
        cls,
        keys: Sequence[Any],
        *,
        page_size: int = 64,
        granularity: int | None = None,
        power_of_two: bool = False,
    ) -> PagedKeyCache:
        """Quantise keys and fill a new cache with them.

        Parameters
        ----------
        keys : sequence of float arrays
            One per sequence, each [length, depth] or [num_layers, length, kv_heads, depth]; NumPy
            or CuPy, or exchangeable with them; bfloat16 too. The cache is NumPy's, or CuPy's if
            they are on a GPU.
        page_size : int
            Tokens per page.
        granularity : int, optional
            Channels per scale; all of them by default.
        power_of_two : bool
            Round scales up to powers of two.

        Returns
        -------
        PagedKeyCache
        """
        arrays = _as_keys(keys)
        if not arrays:
            raise ValueError("keys must hold at least one sequence; got none")
        layers, _, kv_heads, depth = arrays[0].shape
        with device_of(arrays[0]):
            cache = cls(
                len(arrays),
                depth,
                num_layers=layers,
                kv_heads=kv_heads,
                page_size=page_size,
                granularity=granularity,
                power_of_two=power_of_two,
                xp=namespace_of(arrays[0]),
            )
        cache.append(keys)
        return cache

    @property
    def k_blocks(self) -> Array:
        """Keys, float8_e4m3fn (NumPy) or uint8 (CuPy).

        [num_blocks, 1, num_layers, page_size, kv_heads, depth]
        """
        return self._bytes.view(FP8) if self._xp is np else self._bytes

    @property
    def input_row_offsets(self) -> Array:
        """uint32 [batch + 1]: where the new tokens of each sequence begin in ragged rows."""
        return self._xp.asarray(np.concatenate([[0], np.cumsum(self._new)]).astype(np.uint32))

    def append(self, keys: Sequence[Any]) -> None:
        """Quantise new tokens and add them to their sequences.

        Parameters
        ----------
        keys : sequence of float arrays
            One per sequence of the batch, as in `from_dense`; a length of 0 adds nothing.

        Raises
        ------
        ValueError, TypeError
            If the arrays do not fit the cache, which is then unchanged.
        """
        keys = list(keys)
        with stream_order(self._bytes, keys):  # the cache's stream: its memory is taken there
            self._extend(keys)

    def _extend(self, keys: list[Any]) -> None:
        arrays = _as_keys(keys, self._bytes)
        batch = self.lengths.size
        if len(arrays) != batch:
            raise ValueError(f"keys must hold one array per sequence ({batch}); got {len(arrays)}")
        expected = (self.num_layers, self.kv_heads, self.depth)
        for i, array in enumerate(arrays):
            if (array.shape[0], *array.shape[2:]) != expected:
                raise ValueError(
                    f"keys[{i}] must be [{expected[0]}, length, {expected[1]}, {expected[2]}]; "
                    f"got {array.shape}"
                )
        self._append(arrays)

    def _append(self, arrays: list[Array]) -> None:
        xp = self._xp
        new = np.array([array.shape[1] for array in arrays])
        values, scales = fp8.quantize(
            xp.concatenate(arrays, axis=1), self.granularity, power_of_two=self.power_of_two
        )
        self._reserve(self.lengths + new)
        sequence = np.repeat(np.arange(new.size), new)
        first = np.cumsum(new) - new
        position = np.arange(new.sum()) + np.repeat(self.lengths - first, new)
        block = xp.asarray(self._table[sequence, position // self.page_size].astype(np.int64))
        slot = xp.asarray(position % self.page_size)
        # Advanced indices around a slice: [tokens, num_layers, kv_heads, depth].
        self._bytes[block, 0, :, slot] = values.view(np.uint8).swapaxes(0, 1)
        self.k_scales[block, 0, :, slot] = scales.swapaxes(0, 1)
        self.lengths, self._new = self.lengths + new, new

    def view(self, layer: int = 0) -> CacheView:
        """The operation's cache arguments for one layer.

        Parameters
        ----------
        layer : int
            Index of the layer.

        Returns
        -------
        CacheView
            Shares the cache's memory.
        """
        layer = check_int("layer", layer, range(self.num_layers))
        cached = self.lengths - self._new
        bounds = [[self._new.max(initial=0), cached.max(initial=0)]]
        with device_of(self._bytes):
            return CacheView(
                self.k_blocks,
                self._xp.asarray(cached.astype(np.uint32)),
                self.k_lookup_table,
                np.array(bounds, np.uint32),
                self.k_scales,
                layer,
            )

    def __repr__(self) -> str:
        return (
            f"PagedKeyCache(batch={self.lengths.size}, tokens={self.lengths.sum()}, "
            f"blocks={self._blocks_used}/{self._bytes.shape[0]}, page_size={self.page_size}, "
            f"num_layers={self.num_layers}, kv_heads={self.kv_heads}, depth={self.depth}, "
            f"granularity={self.granularity}, {self._xp.__name__})"
        )

    def _pool(self, blocks: int) -> tuple[Array, Array]:
        shape = (blocks, 1, self.num_layers, self.page_size, self.kv_heads)
        values = self._xp.zeros((*shape, self.depth), np.uint8)
        return values, self._xp.zeros((*shape, self._groups), np.float32)

    def _reserve(self, lengths: np.ndarray) -> None:
        """Give every sequence the pages that ``lengths`` tokens need."""
        held = -(-self.lengths // self.page_size)
        needed = -(-lengths // self.page_size)
        used = self._blocks_used + int((needed - held).sum())
        if used > self._bytes.shape[0]:
            old_bytes, old_scales = self._bytes, self.k_scales
            self._bytes, self.k_scales = self._pool(max(used, 2 * old_bytes.shape[0]))
            self._bytes[: old_bytes.shape[0]] = old_bytes
            self.k_scales[: old_scales.shape[0]] = old_scales
        table = np.full((lengths.size, max(self._table.shape[1], needed.max(initial=0))), _UNUSED)
        table[:, : self._table.shape[1]] = self._table
        for sequence in np.flatnonzero(needed > held):
            pages = slice(held[sequence], needed[sequence])
            taken = int(needed[sequence] - held[sequence])
            table[sequence, pages] = np.arange(self._blocks_used, self._blocks_used + taken)
            self._blocks_used += taken
        if not np.array_equal(table, self._table):
            self._table, self.k_lookup_table = table, self._xp.asarray(table)


def _as_keys(keys: Sequence[Any], cache: Array | None = None) -> list[Array]:
    """Each sequence's keys as [num_layers, length, kv_heads, depth], all where ``cache`` is."""
    given = {f"keys[{i}]": as_floats(f"keys[{i}]", value) for i, value in enumerate(keys)}
    if not given:
        return []
    _, arrays = as_arrays(given if cache is None else {"the cache": cache} | given)
    shaped = []
    for name in given:
        array = arrays[name]
        if array.ndim == 2:
            array = array[None, :, None, :]
        if array.ndim != 4 or "float" not in array.dtype.name or "float8" in array.dtype.name:
            raise ValueError(
                f"{name} must be a float array [length, depth] or "
                f"[num_layers, length, kv_heads, depth]; got {array.dtype} {array.shape}"
            )
        shaped.append(array)
    return shaped
