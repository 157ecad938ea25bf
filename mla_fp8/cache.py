"""`PagedKeyCache`: FP8 keys in pages, and the cache arguments of the operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mla_fp8._cache.dense_keys import as_keys, as_list, joined
from mla_fp8._cache.pages import MOST_BLOCKS, Pages, integers
from mla_fp8._cache.pool import Pool, checked_form, fused_pool
from mla_fp8._cache.sequences import PagedSequences
from mla_fp8._check.arrays import Array, namespace_of
from mla_fp8._check.interop import as_arrays, as_bits
from mla_fp8._check.parameters import brief, check_bool, check_int
from mla_fp8._check.streams import stream_order
from mla_fp8.keys import write_keys


class PagedKeyCache(PagedSequences):
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
    Whenever a method raises an error, all tokens are as they were; only a `write` that runs out of
    memory may have stored some of the new keys.

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
        power_of_two = check_bool("power_of_two", power_of_two)
        batch = check_int("batch", batch, range(2**31))
        form = checked_form(depth, num_layers, kv_heads, page_size, granularity, layout)
        if num_blocks is not None:
            num_blocks = check_int("num_blocks", num_blocks, range(MOST_BLOCKS + 1))
        pages = Pages(batch, form.page_size, num_blocks)
        super().__init__(pages, Pool.zeros(form, xp, num_blocks or 0))
        self.power_of_two = power_of_two

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
        keys = as_list(keys)
        if not keys:
            raise ValueError("keys must hold at least one sequence; got none")
        with stream_order(keys[0], keys, on_cupy=True):
            arrays = as_keys(keys)
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
        DeepGEMM, vLLM and SGLang. The cache copies nothing and erases nothing. `k_blocks` and
        `k_scales` are views of the buffer. An engine that has its own lengths and tables needs only
        these two views. It must not call `append` or `allocate`, because the cache regards all
        pages as free.

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
        cache = cls(
            batch,
            pool.form.depth,
            page_size=page_size,
            power_of_two=power_of_two,
            layout="fused",
            xp=pool.xp,
        )
        cache._pages = Pages(cache.batch, cache.page_size, pool.num_blocks)
        cache._pool = pool
        return cache

    def append(self, keys: Sequence[Any], sequences: Sequence[int] | None = None) -> None:
        """Quantise new tokens and add them to their sequences, in all layers.

        Parameters
        ----------
        keys : sequence of float arrays
            One per sequence, as in `from_dense`. A length of 0 adds nothing, and is the only one
            for the row of a freed sequence.
        sequences : sequence of int, optional
            The sequences that they belong to. The others get no new tokens.

        Raises
        ------
        ValueError, TypeError
            If the arrays do not fit the cache.
        CacheFull
            If the cache has ``num_blocks`` pages and too few are free.
        MemoryError
            If there is no room for more pages.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> cache = PagedKeyCache(3, 32)
        >>> cache.append([np.ones((4, 32)), np.ones((1, 32))], sequences=[2, 0])
        >>> cache.lengths
        array([1, 0, 4])
        """
        keys = as_list(keys)
        rows = self._pages.check_sequences(sequences)
        with stream_order(self._pool.arrays[0], keys):
            self._append(as_keys(keys, self._pool.arrays[0]), rows)

    def _append(self, arrays: list[Array], rows: np.ndarray) -> None:
        if len(arrays) != rows.size:
            raise ValueError(
                f"keys must hold one array per sequence ({rows.size}); got {len(arrays)}"
            )
        expected = (self.num_layers, self.kv_heads, self.depth)
        for i, array in enumerate(arrays):
            if (array.shape[0], *array.shape[2:]) != expected:
                raise ValueError(
                    f"keys[{i}] must be [{expected[0]}, length, {expected[1]}, {expected[2]}]; "
                    f"got {array.shape}"
                )
        counts = np.array([array.shape[1] for array in arrays], np.int64)
        step = self._pages.plan("keys", counts, rows)
        with self._device():
            pool = self._with_room(step)
            slots = self._pool.xp.asarray(self._pages.slots(rows, step))
            for together, some in joined(arrays, slots):
                for layer in range(self.num_layers):
                    self._write(pool, together[layer], layer, some)
        self._take(step, pool)

    def allocate(self, new: Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """Make room for new tokens, whose keys `write` stores one layer at a time.

        The new tokens count from now on, in `lengths` and in `view`: those of sequence ``b`` have
        the positions ``lengths[b] - new[b]`` to ``lengths[b] - 1``. Until `write` has stored a
        layer's keys, their slots hold anything in that layer, earlier keys too.

        Parameters
        ----------
        new : sequence of int
            Number of new tokens of each sequence.
        sequences : sequence of int, optional
            The sequences that they belong to. The others get no new tokens.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it.
        CacheFull
            If the cache has ``num_blocks`` pages and too few are free.
        MemoryError
            If there is no room for more pages.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> cache = PagedKeyCache(2, 32, num_layers=3, page_size=4)
        >>> cache.allocate([5, 1])
        >>> for layer in range(3):
        ...     cache.write(layer, np.ones((6, 1, 32), np.float32))
        >>> cache.slots()
        array([0, 1, 2, 3, 4, 8])
        """
        rows = self._pages.check_sequences(sequences)
        counts = integers("new", new)
        if counts.size != rows.size or (counts < 0).any():
            raise ValueError(
                f"new must be {rows.size} integers >= 0, one per sequence; "
                f"got {brief(counts.tolist())}"
            )
        step = self._pages.plan("new", counts, rows)
        with self._device():
            pool = self._with_room(step)
        self._take(step, pool)

    def write(self, layer: int, keys: Any, sequences: Sequence[int] | None = None) -> None:
        """Quantise one layer's keys of the new tokens and store them.

        Keys are stored as given: apply RoPE and the Hadamard transform before, if the model does.

        Parameters
        ----------
        layer : int
            Index of the layer.
        keys : bfloat16, float16 or float32, [new tokens, kv_heads, depth]
            [new tokens, depth] too, if there is one kv head: the keys of one sequence after the
            other, C-contiguous. Or a list with an array of any float type for each sequence.
        sequences : sequence of int, optional
            The sequences whose new tokens these are, in the order of ``keys``.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it.

        Examples
        --------
        See `allocate`.
        """
        layer = check_int("layer", layer, range(self.num_layers))
        slots = self.slots(sequences)
        if not isinstance(keys, list | tuple):
            tokens, shape = int(slots.size), tuple(getattr(keys, "shape", ()))
            if shape[:1] != (tokens,):
                raise ValueError(
                    f"keys must be float [new tokens = {tokens}, {self.kv_heads}, {self.depth}]; "
                    f"got {shape or type(keys).__name__}"
                )
            # They must be where the cache is. `write_keys` checks the rest, and takes bfloat16.
            as_arrays({"the cache": self._pool.arrays[0], "keys": as_bits("keys", keys)[0]})
            self._write(self._pool, keys, layer, slots)
            return
        rows = self._pages.check_sequences(sequences)
        counts = self._pages.new[rows]
        if len(keys) != rows.size:
            raise ValueError(
                f"keys must hold one array per sequence ({rows.size}); got {len(keys)}"
            )
        with stream_order(self._pool.arrays[0], keys), self._device():
            arrays = as_keys(keys, self._pool.arrays[0], of_layer=True)
            for i, array in enumerate(arrays):
                if array.shape[1:] != (counts[i], self.kv_heads, self.depth):
                    raise ValueError(
                        f"keys[{i}] must be [new tokens = {counts[i]}, {self.kv_heads}, "
                        f"{self.depth}]; got {array.shape[1:]}"
                    )
            for together, some in joined(arrays, slots):
                self._write(self._pool, together[0], layer, some)

    def _write(self, pool: Pool, keys: Array, layer: int, slots: Array) -> None:
        power_of_two = self.power_of_two
        write_keys(keys, pool.values, pool.scales, layer, slots=slots, power_of_two=power_of_two)
