"""`PagedKeyCache`: FP8 keys in pages, and the cache arguments of the operation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_fp8 import fp8
from mla_fp8._check.arrays import FP8, Array, check_aligned, device_of, namespace_of
from mla_fp8._check.interop import as_arrays, as_floats
from mla_fp8._check.parameters import DEPTHS, MAX_HEADS, check_int, scale_groups
from mla_fp8._check.shape import MOST
from mla_fp8._check.streams import stream_order

_UNUSED = np.uint32(0xFFFFFFFF)  # a table entry without a page: no block has this number
_QUANTISED_AT_ONCE = 1 << 20  # numbers; `fp8.quantize` needs about 40 bytes of memory for each


class CacheView(NamedTuple):
    """The cache arguments of the operation, in its order: ``op(q, qs, offsets, *view)``.

    `MLAIndexerRaggedFloat8Paged.execute` documents their shapes and dtypes.
    """

    k_blocks: Array
    k_cache_lengths: Array
    k_lookup_table: Array
    k_max_lengths: np.ndarray
    k_scales: Array
    layer_idx: int


class PagedKeyCache:
    """FP8 keys of a batch of sequences in pages, with their scales and lookup table.

    `from_dense` makes a cache, `append` adds tokens, and `view` gives the arguments of the
    operation. The tokens of the last `from_dense` or `append` are the new ones: ``k_cache_lengths``
    of a view does not count them. `append` replaces a full pool of blocks by one of twice the size,
    so the arrays of earlier views may be out of date after it.

    Caches can be pickled and copied. Every copy, shallow or deep, has its own memory: two caches
    with one pool would write their new tokens to the same pages.

    Parameters
    ----------
    batch : int
        Number of sequences.
    depth : int
        Channels per key: 32, 64, 128 or 256.
    num_layers, kv_heads, page_size : int
        Extents of ``k_blocks``.
    granularity : int, optional
        Channels per key scale; by default ``depth``.
    power_of_two : bool
        Round scales up to powers of two.
    xp : module
        numpy or cupy.

    Attributes
    ----------
    k_scales : float32, [num_blocks, 1, num_layers, page_size, kv_heads, depth // granularity]
    k_lookup_table : uint32, [batch, pages_per_seq]
        4294967295 in unused entries.
    lengths : int64 NumPy array, [batch]
        Tokens that each sequence holds.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import PagedKeyCache
    >>> cache = PagedKeyCache.from_dense([np.ones((5, 32)), np.ones((2, 32))], page_size=4)
    >>> cache.append([np.ones((1, 32)), np.ones((3, 32))])
    >>> cache.lengths
    array([6, 5])
    >>> cache.view().k_cache_lengths
    array([5, 2], dtype=uint32)
    >>> cache.k_lookup_table
    array([[0, 1],
           [2, 3]], dtype=uint32)
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
        if getattr(xp, "__name__", None) not in ("numpy", "cupy"):
            raise TypeError(f"xp must be the module numpy or cupy; got {type(xp).__name__}")
        if not isinstance(power_of_two, bool | np.bool_):
            raise TypeError(
                f"power_of_two must be True or False; got {type(power_of_two).__name__}"
            )
        batch = check_int("batch", batch, range(2**31))
        positive = range(1, 2**31)
        self.depth = check_int("depth", depth, DEPTHS)
        self.num_layers = check_int("num_layers", num_layers, positive)
        self.kv_heads = check_int("kv_heads", kv_heads, range(1, MAX_HEADS + 1))
        self.page_size = check_int("page_size", page_size, positive)
        wanted = self.depth if granularity is None else granularity
        self.granularity = min(check_int("granularity", wanted, positive), self.depth)
        self._groups = scale_groups("granularity", self.depth, self.granularity)
        self._block_bytes = check_int(
            "num_layers * page_size * kv_heads * depth",
            self.num_layers * self.page_size * self.kv_heads * self.depth,
            range(1, 2**48),
        )
        self.power_of_two = bool(power_of_two)
        self.lengths = np.zeros(batch, np.int64)
        self._new = np.zeros(batch, np.int64)
        self._blocks_used = 0
        self._table = np.full((batch, 0), _UNUSED)
        self._bytes, self.k_scales = self._pool(xp, 0)
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
            One per sequence, each [length, depth] or [num_layers, length, kv_heads, depth]. They
            are arrays of NumPy or CuPy, or arrays that these can read; bfloat16 too. The cache is
            CuPy's if the keys are on a GPU, else NumPy's.
        page_size : int
            Tokens per page.
        granularity : int, optional
            Channels per key scale; by default ``depth``.
        power_of_two : bool
            Round scales up to powers of two.

        Returns
        -------
        PagedKeyCache

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it.
        """
        keys = _as_list(keys)
        if not keys:
            raise ValueError("keys must hold at least one sequence; got none")
        with stream_order(keys[0], keys, on_cupy=True):
            arrays = _as_keys(keys)
            layers, _, kv_heads, depth = arrays[0].shape
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
            cache._append(arrays)
        return cache

    def __copy__(self) -> PagedKeyCache:
        with device_of(self._bytes):
            return copy.deepcopy(self)

    @property
    def _xp(self) -> Any:
        return namespace_of(self._bytes)

    @property
    def k_blocks(self) -> Array:
        """float8_e4m3fn (NumPy) or uint8 (CuPy) keys.

        Their shape is [num_blocks, 1, num_layers, page_size, kv_heads, depth].
        """
        return self._bytes.view(FP8) if self._xp is np else self._bytes

    @property
    def input_row_offsets(self) -> Array:
        """uint32 [batch + 1]: the operation's argument for the new tokens."""
        offsets = np.concatenate([[0], np.cumsum(self._new)]).astype(np.uint32)
        with device_of(self._bytes):
            return self._xp.asarray(offsets)

    def append(self, keys: Sequence[Any]) -> None:
        """Quantise new tokens and add them to their sequences.

        Parameters
        ----------
        keys : sequence of float arrays
            One per sequence of the batch, as in `from_dense`; a length of 0 adds nothing.

        Raises
        ------
        ValueError, TypeError
            If the arrays do not fit the cache.
        MemoryError
            If there is no room for more blocks.

        Notes
        -----
        The cache is unchanged whenever an error is raised.
        """
        keys = _as_list(keys)
        with stream_order(self._bytes, keys):
            self._append(_as_keys(keys, self._bytes))

    def _append(self, arrays: list[Array]) -> None:
        self._check_fit(arrays)
        new = np.array([array.shape[1] for array in arrays], np.int64)
        lengths = self.lengths + new
        with device_of(self._bytes):
            table, used = self._table_for(lengths)
            values, scales = self._pool_for(used)
            on_device = self.k_lookup_table if table is self._table else self._xp.asarray(table)
            quantised: Iterable[Any] = self._quantised(arrays, new, table)
            if values is self._bytes:  # quantise everything before writing: it may raise
                quantised = list(quantised)
            for at, codes, factors in quantised:
                values[at], scales[at] = codes, factors
        self._bytes, self.k_scales, self._blocks_used = values, scales, used
        self._table, self.k_lookup_table = table, on_device
        self.lengths, self._new = lengths, new

    def _check_fit(self, arrays: list[Array]) -> None:
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
            if self.lengths[i] + array.shape[1] > MOST:
                raise ValueError(
                    f"keys[{i}] must leave its sequence at most {MOST} tokens long; "
                    f"got {self.lengths[i]} + {array.shape[1]}"
                )

    def _quantised(
        self, arrays: list[Array], new: np.ndarray, table: np.ndarray
    ) -> Iterator[tuple[tuple[Any, ...], Array, Array]]:
        """Yield (indices into the pool, codes, scales) of a number of tokens at a time."""
        ends = np.cumsum(new)
        starts, total = ends - new, int(new.sum())
        most = max(_QUANTISED_AT_ONCE // (self.num_layers * self.kv_heads * self.depth), 1)
        for first in range(0, total, most):
            token = np.arange(first, min(first + most, total))
            sequence = np.searchsorted(ends, token, side="right")
            some = range(int(sequence[0]), int(sequence[-1]) + 1)
            places = [(i, first - int(starts[i])) for i in some]
            pieces = [arrays[i][:, max(at, 0) : at + token.size] for i, at in places]
            # NumPy has no common type for some pairs of float types, and cannot concatenate them.
            keys = self._xp.concatenate([p.astype(np.float32, copy=False) for p in pieces], axis=1)
            codes, scales = fp8.quantize(keys, self.granularity, power_of_two=self.power_of_two)
            position = self.lengths[sequence] + token - starts[sequence]
            block = table[sequence, position // self.page_size].astype(np.int64)
            slot = position % self.page_size
            # Advanced indices around a slice give [tokens, num_layers, kv_heads, depth].
            at = self._xp.asarray(block), 0, slice(None), self._xp.asarray(slot)
            yield at, codes.view(np.uint8).swapaxes(0, 1), scales.swapaxes(0, 1)

    def view(self, layer: int = 0) -> CacheView:
        """Return the operation's cache arguments for one layer.

        Parameters
        ----------
        layer : int
            Index of the layer.

        Returns
        -------
        CacheView
            Its arrays share the cache's memory.

        Raises
        ------
        ValueError, TypeError
            If there is no such layer.
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

    def _pool(self, xp: Any, blocks: int) -> tuple[Array, Array]:
        if blocks * self._block_bytes >= 2**63:  # beyond NumPy's sizes
            raise MemoryError(f"no room for {blocks} blocks of {self._block_bytes} bytes")
        shape = (blocks, 1, self.num_layers, self.page_size, self.kv_heads)
        values = xp.zeros((*shape, self.depth), np.uint8)
        return values, xp.zeros((*shape, self._groups), np.float32)

    def _pool_for(self, used: int) -> tuple[Array, Array]:
        """A pool of at least ``used`` blocks that holds the present keys."""
        old = self._bytes.shape[0]
        if used <= old:
            return self._bytes, self.k_scales
        values, scales = self._pool(self._xp, max(used, min(2 * old, int(_UNUSED))))
        values[:old], scales[:old] = self._bytes, self.k_scales
        return values, scales

    def _table_for(self, lengths: np.ndarray) -> tuple[np.ndarray, int]:
        """The lookup table with the pages that ``lengths`` tokens need, and the blocks in use."""
        held = -(-self.lengths // self.page_size)
        needed = -(-lengths // self.page_size)
        used = self._blocks_used + int((needed - held).sum())
        if used == self._blocks_used:
            return self._table, used
        if used > _UNUSED:
            raise ValueError(
                f"keys must fit {_UNUSED} blocks of {self.page_size} tokens; got {used}"
            )
        table = np.full((lengths.size, max(self._table.shape[1], needed.max())), _UNUSED)
        table[:, : self._table.shape[1]] = self._table
        first = self._blocks_used
        for sequence in np.flatnonzero(needed > held):
            pages = slice(held[sequence], needed[sequence])
            taken = int(needed[sequence] - held[sequence])
            table[sequence, pages] = np.arange(first, first + taken)
            first += taken
        return table, used


def _as_list(keys: Sequence[Any]) -> list[Any]:
    try:
        return list(keys)
    except TypeError:
        raise TypeError(f"keys must be a sequence of arrays; got {type(keys).__name__}") from None


def _as_keys(keys: list[Any], cache: Array | None = None) -> list[Array]:
    """Each sequence's keys as [num_layers, length, kv_heads, depth], on the device of ``cache``."""
    given = {f"keys[{i}]": as_floats(f"keys[{i}]", value) for i, value in enumerate(keys)}
    if not given:
        return []
    _, arrays = as_arrays(given if cache is None else {"the cache": cache} | given)
    shaped = []
    for name in given:
        array = arrays[name]
        check_aligned(name, array)
        if array.ndim == 2:
            array = array[None, :, None, :]
        if array.ndim != 4 or "float" not in array.dtype.name or "float8" in array.dtype.name:
            raise ValueError(
                f"{name} must be a float array [length, depth] or "
                f"[num_layers, length, kv_heads, depth]; got {array.dtype} {array.shape}"
            )
        shaped.append(array)
    return shaped
