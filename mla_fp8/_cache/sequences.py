"""The sequences of a paged cache: how they start and end, and the operation's arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_fp8 import fp8
from mla_fp8._cache.pages import Pages, Step
from mla_fp8._cache.pool import Pool
from mla_fp8._check.arrays import FP8, Array, device_of
from mla_fp8._check.parameters import check_int


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


class PagedSequences:
    """The part of `PagedKeyCache` that needs no new keys: its sequences, their pages, its views."""

    def __init__(self, pages: Pages, pool: Pool) -> None:
        form = pool.form
        self.depth, self.granularity = form.depth, form.granularity
        self.num_layers, self.kv_heads, self.page_size = (
            form.num_layers,
            form.kv_heads,
            form.page_size,
        )
        self._pages, self._pool = pages, pool
        self._uploaded: dict[tuple[str, bytes | None], Array] = {}

    def __copy__(self) -> Any:
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
        """float32 scales.

        Their shape is [num_blocks, 1, num_layers, page_size, kv_heads, depth // granularity].
        """
        return self._pool.scales

    @property
    def k_lookup_table(self) -> Array:
        """uint32 [batch, pages_per_seq]: page numbers, and 4294967295 in unused entries."""
        return self._on_device("table", None, self._pages.table.copy)

    @property
    def input_row_offsets(self) -> Array:
        """uint32 [batch + 1]: the operation's argument for the new tokens of all sequences."""
        return self.row_offsets()

    def truncate(self, sequence: int, length: int) -> None:
        """Take back the last tokens of a sequence, and give back the pages that it no longer needs.

        New tokens that remain stay new.

        Parameters
        ----------
        sequence : int
            A sequence in use.
        length : int
            Tokens to keep, at most those that the sequence has.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it.

        Examples
        --------
        Four tokens were proposed, and two of them accepted:

        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> cache = PagedKeyCache.from_dense([np.ones((5, 32))])
        >>> cache.append([np.ones((4, 32))])
        >>> cache.truncate(0, 7)
        >>> cache.lengths, cache.input_row_offsets
        (array([7]), array([0, 2], dtype=uint32))
        """
        row = self._pages.check_sequence(sequence)
        present = int(self._pages.lengths[row])
        self._pages.truncate(row, check_int("length", length, range(present + 1)))
        self._uploaded = {}

    def free(self, sequence: int) -> None:
        """End a sequence: give back its pages and its number.

        Parameters
        ----------
        sequence : int
            A sequence in use.

        Raises
        ------
        ValueError, TypeError
            If there is no such sequence.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> cache = PagedKeyCache.from_dense([np.ones((5, 32)), np.ones((2, 32))])
        >>> cache.free(0)
        >>> cache.sequences, cache.add_sequence()
        (array([1]), 0)
        """
        self._pages.free(self._pages.check_sequence(sequence))
        self._uploaded = {}

    def add_sequence(self) -> int:
        """Start an empty sequence.

        Returns
        -------
        int
            Its number: the lowest that was freed, or that of a new row.

        Examples
        --------
        >>> from mla_fp8 import PagedKeyCache
        >>> cache = PagedKeyCache(2, 32)
        >>> cache.add_sequence(), cache.batch
        (2, 3)
        """
        self._uploaded = {}
        return self._pages.add()

    def fork(self, sequence: int) -> int:
        """Start a sequence with the tokens of another, none of them new, without copying them.

        The two share pages. When one of them appends to a page that others hold too, it gets a copy
        of that page first. Store the new tokens of a sequence in all layers before it is forked.

        Parameters
        ----------
        sequence : int
            A sequence in use.

        Returns
        -------
        int
            The number of the new sequence, as from `add_sequence`.

        Raises
        ------
        ValueError, TypeError
            If there is no such sequence.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> cache = PagedKeyCache.from_dense([np.ones((6, 32))], page_size=4)
        >>> cache.fork(0)
        1
        >>> cache.append([np.ones((1, 32))], sequences=[1])
        >>> cache.k_lookup_table
        array([[0, 1],
               [0, 2]], dtype=uint32)
        """
        row = self._pages.add(like=self._pages.check_sequence(sequence))
        self._uploaded = {}
        return row

    def view(self, layer: int = 0, sequences: Sequence[int] | None = None) -> CacheView:
        """Return the operation's cache arguments for one layer.

        Parameters
        ----------
        layer : int
            Index of the layer.
        sequences : sequence of int, optional
            The sequences of the call, in this order.

        Returns
        -------
        CacheView
            Its arrays of keys and scales share the cache's memory.

        Raises
        ------
        ValueError, TypeError
            If there is no such layer or sequence.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> cache = PagedKeyCache.from_dense([np.ones((5, 32)), np.ones((2, 32))], page_size=4)
        >>> cache.append([np.ones((1, 32)), np.ones((3, 32))])
        >>> cache.view(sequences=[1]).k_cache_lengths
        array([2], dtype=uint32)
        """
        layer = check_int("layer", layer, range(self.num_layers))
        rows, pages = self._pages.check_sequences(sequences), self._pages
        chosen = None if sequences is None else rows
        new, cached = pages.new[rows], (pages.lengths - pages.new)[rows]
        return CacheView(
            self.k_blocks,
            self._on_device("lengths", chosen, lambda: cached.astype(np.uint32)),
            self._on_device("table", chosen, lambda: pages.table[rows]),
            np.array([[new.max(initial=0), cached.max(initial=0)]], np.uint32),
            self.k_scales,
            layer,
        )

    def row_offsets(self, sequences: Sequence[int] | None = None) -> Array:
        """`input_row_offsets` of some sequences.

        Parameters
        ----------
        sequences : sequence of int, optional
            The sequences of the call, in this order.

        Returns
        -------
        uint32, [sequences + 1]

        Raises
        ------
        ValueError, TypeError
            If there is no such sequence.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> cache = PagedKeyCache.from_dense([np.ones((5, 32)), np.ones((2, 32))])
        >>> cache.row_offsets([1, 0])
        array([0, 2, 7], dtype=uint32)
        """
        rows = self._pages.check_sequences(sequences)
        offsets = np.concatenate([[0], np.cumsum(self._pages.new[rows])]).astype(np.uint32)
        return self._on_device("offsets", None if sequences is None else rows, lambda: offsets)

    def slots(self, sequences: Sequence[int] | None = None) -> Array:
        """Return where the new tokens are stored: the slot mapping that `write_keys` takes.

        Parameters
        ----------
        sequences : sequence of int, optional
            The sequences whose new tokens are meant, in this order.

        Returns
        -------
        int64, [new tokens]
            ``block * page_size + offset`` of each.

        Raises
        ------
        ValueError, TypeError
            If there is no such sequence.

        Examples
        --------
        See `allocate`.
        """
        rows = self._pages.check_sequences(sequences)
        chosen = None if sequences is None else rows
        return self._on_device("slots", chosen, lambda: self._pages.slots(rows))

    def gather(self, sequence: int, layer: int = 0) -> Array:
        """Return the keys of a sequence as floats: codes times scales.

        Parameters
        ----------
        sequence : int
            A sequence in use.
        layer : int
            Index of the layer.

        Returns
        -------
        float32, [length, kv_heads, depth]

        Raises
        ------
        ValueError, TypeError
            If there is no such sequence or layer.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import PagedKeyCache
        >>> cache = PagedKeyCache.from_dense([np.full((5, 32), 2.0)], page_size=4)
        >>> keys = cache.gather(0)
        >>> keys.shape, float(keys.max())
        ((5, 1, 32), 2.0)
        """
        row = self._pages.check_sequence(sequence)
        layer = check_int("layer", layer, range(self.num_layers))
        length = int(self._pages.lengths[row])
        pages = self._pages.table[row, : -(-length // self.page_size)].astype(np.int64)
        with self._device():
            at = self._pool.xp.asarray(pages)
            parts = (array[:, 0, layer][at] for array in (self._pool.values, self._pool.scales))
            keys = fp8.dequantize(*parts)
        return keys.reshape(-1, self.kv_heads, self.depth)[:length]

    def __repr__(self) -> str:
        return (
            f"PagedKeyCache(batch={self.batch}, tokens={self._pages.lengths.sum()}, "
            f"blocks={self.num_blocks - self.free_blocks}/{self.num_blocks}, "
            f"page_size={self.page_size}, num_layers={self.num_layers}, "
            f"kv_heads={self.kv_heads}, depth={self.depth}, granularity={self.granularity}, "
            f"{self._pool.xp.__name__})"
        )

    def _device(self) -> Any:
        return device_of(self._pool.arrays[0])

    def _on_device(self, name: str, rows: np.ndarray | None, make: Callable[[], Any]) -> Array:
        """An array for the operation, uploaded once after each change; ``rows`` None: of all."""
        key = name, None if rows is None else rows.tobytes()
        if key not in self._uploaded:
            with self._device():
                self._uploaded[key] = self._pool.xp.asarray(make())
        return self._uploaded[key]

    def _with_room(self, step: Step) -> Pool:
        """A pool with room for the new tokens, in which shared pages have been copied."""
        pool = self._pool.grown(step.num_blocks)
        pool.copy_pages(step.copied, step.pages[: step.copied.size])
        return pool

    def _take(self, step: Step, pool: Pool) -> None:
        """Take pages, when nothing can fail any more."""
        table = self._uploaded.get(("table", None))
        keep = table is not None and not step.pages.size
        self._pages.commit(step)
        self._pool, self._uploaded = pool, {("table", None): table} if keep else {}
