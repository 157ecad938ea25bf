"""Which page of a pool holds which tokens: the lookup table, the free list, reference counts.

Nothing here knows the pool's memory. A change that may fail is planned first (`Pages.plan`) and
carried out later (`Pages.commit`), so that its caller can copy and write memory in between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mla_fp8._check.parameters import brief, check_int
from mla_fp8._check.shape import MOST

UNUSED = np.uint32(0xFFFFFFFF)  # a table entry without a page: no block has this number
MOST_BLOCKS = int(UNUSED)


class CacheFull(MemoryError):
    """A cache with a fixed number of blocks has too few free ones. It is unchanged.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import CacheFull, PagedKeyCache
    >>> cache = PagedKeyCache(1, 32, page_size=4, num_blocks=2)
    >>> try:
    ...     cache.append([np.ones((9, 32))])
    ... except CacheFull as error:
    ...     print(error)
    the new tokens need 3 more blocks; 2 of 2 are free
    """


class Step(NamedTuple):
    """New tokens for which pages have been found, but not yet taken."""

    lengths: np.ndarray  # int64 [rows]: tokens of each sequence, the new ones included
    new: np.ndarray  # int64 [rows]
    table: np.ndarray  # the lookup table, widened if it has to be, without the new pages
    references: np.ndarray  # the reference counts, for a grown pool if it has to grow
    free: np.ndarray  # the free list of that pool
    free_count: int  # of it before the pages are taken
    rows: np.ndarray  # table entries that change: rows, columns and their new pages
    columns: np.ndarray
    pages: np.ndarray
    copied: np.ndarray  # pages whose content goes to the first of ``pages``, one each
    shared: tuple[list[int], list[int]]  # the distinct ones of them, and who holds them after it

    @property
    def num_blocks(self) -> int:
        """Blocks that the pool must have."""
        return int(self.references.size)


class Pages:
    """The pages of sequences 0 to ``rows - 1``; a sequence that was freed has none.

    Attributes
    ----------
    lengths, new : int64 NumPy arrays, [rows]
        Tokens of each sequence, and how many of them the last `commit` added. Both arrays are
        replaced, never written to.
    table : uint32 NumPy array, [rows, pages_per_seq]
    live : bool NumPy array, [rows]
        False for sequences that were freed.
    references : int32 NumPy array, [num_blocks]
        How many sequences hold each page.
    """

    def __init__(self, rows: int, page_size: int, num_blocks: int | None) -> None:
        blocks = num_blocks or 0
        self.page_size = page_size
        self.is_fixed = num_blocks is not None
        self.lengths = np.zeros(rows, np.int64)
        self.new = np.zeros(rows, np.int64)
        self.live = np.ones(rows, np.bool_)
        self.table = np.full((rows, 0), UNUSED)
        self.references = np.zeros(blocks, np.int32)
        # A stack: its first `free_count` entries are the free pages, and the last is taken first.
        self._free = np.arange(blocks - 1, -1, -1, dtype=np.uint32)
        self.free_count = blocks

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return int(self.references.size)

    def check_sequence(self, sequence: Any) -> int:
        """``sequence`` as the number of a live sequence."""
        row = check_int("sequence", sequence, range(self.lengths.size))
        if not self.live[row]:
            raise ValueError(f"sequence must be in use; got {row}, which was freed")
        return row

    def check_sequences(self, sequences: Any) -> np.ndarray:
        """The rows of distinct live sequences; None stands for all rows, freed ones included."""
        count = self.lengths.size
        if sequences is None:
            return np.arange(count)
        rows = integers("sequences", sequences)
        inside = bool(((rows >= 0) & (rows < count)).all())
        if not inside or not self.live[rows].all() or np.unique(rows).size != rows.size:
            raise ValueError(
                f"sequences must be distinct sequences in use, from 0 to {count - 1}; "
                f"got {brief(rows.tolist())}"
            )
        return rows

    def plan(self, name: str, counts: np.ndarray, rows: np.ndarray) -> Step:
        """Find pages for ``counts`` new tokens of the sequences ``rows``; ``name`` is for errors.

        A page that other sequences hold too must not be written to: a sequence with new tokens on
        such a page gets another page for it, with the same content.
        """
        for i in np.flatnonzero((counts > 0) & ~self.live[rows]):
            raise ValueError(f"{name}[{i}] must be empty: sequence {rows[i]} was freed")
        for i in np.flatnonzero(counts > MOST - self.lengths[rows]):
            raise ValueError(
                f"{name}[{i}] must leave its sequence at most {MOST} tokens long; "
                f"got {self.lengths[rows[i]]} + {counts[i]}"
            )
        new = np.zeros_like(self.lengths)
        new[rows] = counts
        lengths = self.lengths + new
        held, needed = self._held(self.lengths), self._held(lengths)
        more = needed - held
        shared, left = self._shared(new, held)
        total = shared.size + int(more.sum())
        references, free, free_count = self._room_for(name, total)
        growing = np.repeat(np.arange(new.size), more)
        place = np.arange(growing.size) - np.repeat(np.cumsum(more) - more, more)
        table = self.table
        if needed.max(initial=0) > table.shape[1]:
            table = np.full((new.size, needed.max()), UNUSED)
            table[:, : self.table.shape[1]] = self.table
        return Step(
            lengths,
            new,
            table,
            references,
            free,
            free_count,
            rows=np.concatenate([shared, growing]),
            columns=np.concatenate([held[shared] - 1, held[growing] + place]),
            pages=free[free_count - total : free_count][::-1].copy(),
            copied=table[shared, held[shared] - 1],
            shared=(list(left), list(left.values())),
        )

    def commit(self, step: Step) -> None:
        """Take the pages of ``step``."""
        shared, counts = step.shared
        self.table, self.references, self._free = step.table, step.references, step.free
        self.table[step.rows, step.columns] = step.pages
        self.references[step.pages] = 1
        if shared:  # NumPy takes no empty list as an index
            self.references[shared] = counts
        self.free_count = step.free_count - step.pages.size
        self.lengths, self.new = step.lengths, step.new

    def slots(self, rows: np.ndarray, step: Step | None = None) -> np.ndarray:
        """Slots, block * page_size + offset, of the new tokens of ``rows``: int64 [tokens]."""
        state = self if step is None else step
        lengths, new, table = state.lengths, state.new, state.table
        if step is not None and step.pages.size:
            table = table.copy()
            table[step.rows, step.columns] = step.pages
        counts = new[rows]
        row = np.repeat(rows, counts)
        place = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
        position = (lengths - new)[row] + place
        page = table[row, position // self.page_size].astype(np.int64)
        slots: np.ndarray = page * self.page_size + position % self.page_size
        return slots

    def truncate(self, row: int, length: int) -> None:
        """Shorten a sequence, and free the pages that no sequence holds any more."""
        first, last = (int(self._held(n)) for n in (length, self.lengths[row]))
        pages = self.table[row, first:last].copy()  # of one sequence, so all different
        lengths, new = self.lengths.copy(), self.new.copy()
        lengths[row] = length
        new[row] = max(int(new[row]) - int(self.lengths[row] - length), 0)
        self.table[row, first:last] = UNUSED
        self.references[pages] -= 1
        unheld = pages[self.references[pages] == 0][::-1]
        self._free[self.free_count : self.free_count + unheld.size] = unheld
        self.free_count += unheld.size
        self.lengths, self.new = lengths, new

    def free(self, row: int) -> None:
        """Give back all pages of a sequence, and its number."""
        self.truncate(row, 0)
        self.live[row] = False

    def add(self, like: int | None = None) -> int:
        """The number of a new sequence: empty, or with the pages of the sequence ``like``."""
        unused = np.flatnonzero(~self.live)
        row = int(unused[0]) if unused.size else self.lengths.size
        if row == self.lengths.size:
            blank = np.full((1, self.table.shape[1]), UNUSED)
            self.table = np.concatenate([self.table, blank])
            self.lengths, self.new = np.append(self.lengths, 0), np.append(self.new, 0)
            self.live = np.append(self.live, False)
        lengths = self.lengths.copy()
        if like is not None:
            lengths[row] = lengths[like]
            self.table[row] = self.table[like]
            self.references[self.table[like, : self._held(lengths[like])]] += 1
        self.lengths = lengths
        self.live[row] = True
        return row

    def _held(self, lengths: Any) -> Any:
        """How many pages a sequence of each of these lengths holds."""
        return -(-lengths // self.page_size)

    def _shared(self, new: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
        """Sequences with new tokens that must first get a copy of their last page.

        Beside them the pages to copy, each with the number of sequences that keep it.

        If all sequences that hold a page append to it, the longest keeps it. Its new slots are past
        the tokens of the others, so that writing there changes no token, even if an error follows.
        """
        rows = np.flatnonzero((new > 0) & (self.lengths % self.page_size > 0))
        pages = self.table[rows, held[rows] - 1]
        is_shared = self.references[pages] > 1
        rows, pages = rows[is_shared], pages[is_shared]
        left: dict[int, int] = {}
        copied = []
        for i in np.argsort(self.lengths[rows], kind="stable"):
            page = int(pages[i])
            left.setdefault(page, int(self.references[page]))
            if left[page] > 1:
                left[page] -= 1
                copied.append(int(rows[i]))
        return np.array(copied, np.int64), left

    def _room_for(self, name: str, total: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Reference counts, free list and its length, with at least ``total`` free pages."""
        if total <= self.free_count:
            return self.references, self._free, self.free_count
        if self.is_fixed:
            raise CacheFull(
                f"the new tokens need {total} more blocks; "
                f"{self.free_count} of {self.num_blocks} are free"
            )
        old = self.num_blocks
        used = old - self.free_count + total
        if used > MOST_BLOCKS:
            raise ValueError(
                f"{name} must fit {MOST_BLOCKS} blocks of {self.page_size} tokens; got {used}"
            )
        blocks = max(used, min(2 * old, MOST_BLOCKS))
        added = blocks - old
        references, free = np.zeros(blocks, np.int32), np.empty(blocks, np.uint32)
        references[:old] = self.references
        free[:added] = np.arange(blocks - 1, old - 1, -1)
        free[added : added + self.free_count] = self._free[: self.free_count]
        return references, free, added + self.free_count


def integers(name: str, values: Any) -> np.ndarray:
    """``values``, a sequence or an array of integers on the host, as int64 [count]."""
    if hasattr(values, "__cuda_array_interface__"):
        raise TypeError(f"{name} must be integers on the host; got {type(values).__name__}")
    array = np.asarray(values)
    if array.shape == (0,):
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(
            f"{name} must be integers, one per sequence; got {array.dtype} {array.shape}"
        )
    if array.dtype == np.uint64 and array.max() >= 2**63:
        raise ValueError(f"{name} must fit int64; got {array.max()}")
    return array.astype(np.int64)
