"""`PagedKeyCache`: FP8 keys in pages, and the cache arguments of the operation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_fp8 import fp8
from mla_fp8._check.arrays import FP8, Array, check_aligned, device_of, namespace_of
from mla_fp8._check.interop import as_arrays, as_floats
from mla_fp8._check.parameters import DEPTHS, MAX_HEADS, brief, check_int, scale_groups
from mla_fp8._check.streams import stream_order
from mla_fp8._pages import MOST_BLOCKS, Pages, Step, integers
from mla_fp8._pool import Form, Pool, fused_pool
from mla_fp8.keys import write_keys

_JOINED_AT_ONCE = 1 << 20  # numbers: short sequences are joined in a copy of at most this size


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

    A cache starts with a number of empty sequences, or with the keys that `from_dense` takes.
    `append` adds new tokens in all layers, or `allocate` makes room for them and `write` stores
    one layer at a time. `view` gives the arguments of the operation, for which the tokens of the
    last `append` or `allocate` are the new ones. `truncate` takes back tokens, `fork` starts a
    sequence with another's tokens without copying them, and `free` ends a sequence. Pages that no
    sequence holds are used again.

    A sequence is a row of the lookup table, numbered from 0. The number of a freed sequence goes to
    the next one that `add_sequence` or `fork` starts; until then its row is empty. Methods that
    take ``sequences`` work on those, in that order, and by default on all rows.

    Without ``num_blocks``, a full pool is replaced by one of twice the size, so the arrays of
    earlier views may be out of date. With it, the pool is fixed and a full one raises `CacheFull`.
    Whenever a method raises an error, all tokens are as they were.

    Caches can be pickled and copied. Every copy, shallow or deep, has its own memory: two caches
    with one pool would write their new tokens to the same pages.

    Parameters
    ----------
    batch : int
        Number of sequences at first, all empty.
    depth : int
        Channels per key: 32, 64, 128 or 256.
    num_layers, kv_heads, page_size : int
        Extents of ``k_blocks``.
    granularity : int, optional
        Channels per key scale; by default ``depth``.
    power_of_two : bool
        Round scales up to powers of two.
    num_blocks : int, optional
        Number of pages; by default as many as needed.
    layout : {"split", "fused"}
        "split": values and scales are two arrays. "fused": the page of DeepGEMM, vLLM and SGLang,
        see `from_fused`; for one layer, one kv head and one scale per key.
    xp : module
        numpy or cupy.

    Attributes
    ----------
    depth, num_layers, kv_heads, page_size, granularity, power_of_two
        The parameters.

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
        num_blocks: int | None = None,
        layout: str = "split",
        xp: Any = np,
    ) -> None:
        if getattr(xp, "__name__", None) not in ("numpy", "cupy"):
            raise TypeError(f"xp must be the module numpy or cupy; got {type(xp).__name__}")
        if not isinstance(power_of_two, bool | np.bool_):
            raise TypeError(
                f"power_of_two must be True or False; got {type(power_of_two).__name__}"
            )
        if layout not in ("split", "fused"):
            raise ValueError(f"layout must be 'split' or 'fused'; got {brief(layout)}")
        batch = check_int("batch", batch, range(2**31))
        positive = range(1, 2**31)
        self.depth = check_int("depth", depth, DEPTHS)
        self.num_layers = check_int("num_layers", num_layers, positive)
        self.kv_heads = check_int("kv_heads", kv_heads, range(1, MAX_HEADS + 1))
        self.page_size = check_int("page_size", page_size, positive)
        wanted = self.depth if granularity is None else granularity
        self.granularity = min(check_int("granularity", wanted, positive), self.depth)
        self.power_of_two = bool(power_of_two)
        groups = scale_groups("granularity", self.depth, self.granularity)
        extents = self.num_layers, self.page_size, self.kv_heads, self.depth, groups
        form = Form(*extents, fused=layout == "fused")
        name = "num_layers * page_size * kv_heads * depth"
        check_int(name, form.value_bytes, range(1, 2**48))
        if form.fused and (self.num_layers, self.kv_heads, groups) != (1, 1, 1):
            raise ValueError(
                "layout must be 'split' unless num_layers, kv_heads and scales per key are 1; "
                f"got 'fused' with {self.num_layers}, {self.kv_heads} and {groups}"
            )
        if num_blocks is not None:
            num_blocks = check_int("num_blocks", num_blocks, range(MOST_BLOCKS + 1))
        self._pages = Pages(batch, self.page_size, num_blocks)
        self._pool = Pool.zeros(form, xp, num_blocks or 0)
        self._uploaded: dict[tuple[str, bytes | None], Array] = {}

    @classmethod
    def from_dense(
        cls,
        keys: Sequence[Any],
        *,
        page_size: int = 64,
        granularity: int | None = None,
        power_of_two: bool = False,
        num_blocks: int | None = None,
        layout: str = "split",
    ) -> PagedKeyCache:
        """Quantise keys and fill a new cache with them.

        Parameters
        ----------
        keys : sequence of float arrays
            One per sequence, each [length, depth] or [num_layers, length, kv_heads, depth]. They
            are arrays of NumPy or CuPy, or arrays that these can read; bfloat16 too. The cache is
            CuPy's if the keys are on a GPU, else NumPy's.
        page_size, granularity, power_of_two, num_blocks, layout
            As for `PagedKeyCache`.

        Returns
        -------
        PagedKeyCache

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it.
        CacheFull
            If the keys need more than ``num_blocks`` pages.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> PagedKeyCache.from_dense([np.ones((5, 32)), np.ones((2, 32))], page_size=4).lengths
        array([5, 2])
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
                num_blocks=num_blocks,
                layout=layout,
                xp=namespace_of(arrays[0]),
            )
            cache._append(arrays, np.arange(len(arrays)))
        return cache

    @classmethod
    def from_fused(
        cls, buffer: Any, *, page_size: int, batch: int = 0, power_of_two: bool = False
    ) -> PagedKeyCache:
        """Return a cache whose pages are a caller's memory, in the layout of serving engines.

        A page holds the values of its ``page_size`` keys, then their float32 scales, as in
        DeepGEMM, vLLM and SGLang. The cache copies nothing, erases nothing, and regards all pages
        as free. `k_blocks` and `k_scales` are views of the buffer. An engine that has its own
        lengths and tables needs only these two.

        Parameters
        ----------
        buffer : uint8, [num_blocks, page_size, 1, depth + 4]
            Or [num_blocks, page_size, depth + 4], or [num_blocks, page_size * (depth + 4)]: an
            array of NumPy, CuPy or torch. Every page is contiguous; there may be other bytes
            between pages. On a GPU, pages start at multiples of 4 bytes.
        page_size : int
            Keys per page.
        batch : int
            Number of sequences at first, all empty.
        power_of_two : bool
            Round scales up to powers of two.

        Returns
        -------
        PagedKeyCache

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> buffer = np.zeros((10, 64, 1, 128 + 4), np.uint8)
        >>> cache = PagedKeyCache.from_fused(buffer, page_size=64, batch=1)
        >>> cache.append([np.ones((5, 128))])
        >>> bool(buffer.any()), cache.k_scales.shape
        (True, (10, 1, 1, 64, 1, 1))
        """
        pool = fused_pool(buffer, page_size)
        options = {"page_size": page_size, "power_of_two": power_of_two, "layout": "fused"}
        cache = cls(batch, pool.form.depth, xp=pool.xp, **options)
        cache._pages = Pages(cache.batch, cache.page_size, pool.num_blocks)
        cache._pool = pool
        return cache

    def __copy__(self) -> PagedKeyCache:
        with self._device():
            return copy.deepcopy(self)

    @property
    def batch(self) -> int:
        """Number of rows: sequences in use and freed ones."""
        return int(self._pages.lengths.size)

    @property
    def sequences(self) -> np.ndarray:
        """int64 NumPy array: the sequences in use, ascending."""
        return np.flatnonzero(self._pages.live)

    @property
    def lengths(self) -> np.ndarray:
        """int64 NumPy array [batch]: tokens that each sequence holds, the new ones included."""
        return self._pages.lengths.copy()

    @property
    def num_blocks(self) -> int:
        """Number of pages in the pool."""
        return self._pool.num_blocks

    @property
    def free_blocks(self) -> int:
        """Number of pages that no sequence holds."""
        return self._pages.free_count

    @property
    def buffer(self) -> Array | None:
        """uint8 [num_blocks, page_size, 1, depth + 4]: all pages in the fused layout, else None."""
        if not self._pool.form.fused:
            return None
        pages = self._pool.arrays[0]
        return pages.reshape(self.num_blocks, self.page_size, 1, self.depth + 4)

    @property
    def k_blocks(self) -> Array:
        """float8_e4m3fn (NumPy) or uint8 (CuPy) keys.

        Their shape is [num_blocks, 1, num_layers, page_size, kv_heads, depth].
        """
        values = self._pool.values
        return values.view(FP8) if self._pool.xp is np else values

    @property
    def k_scales(self) -> Array:
        """Scales: float32 [num_blocks, 1, num_layers, page_size, kv_heads, depth // granularity]."""
        return self._pool.scales

    @property
    def k_lookup_table(self) -> Array:
        """uint32 [batch, pages_per_seq]: page numbers, and 4294967295 in unused entries."""
        return self._on_device("table", None, self._pages.table.copy)

    @property
    def input_row_offsets(self) -> Array:
        """uint32 [batch + 1]: the operation's argument for the new tokens of all sequences."""
        return self.row_offsets()
