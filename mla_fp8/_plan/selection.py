"""Which kernel selects from rows of scores, with how many threads and blocks for a row."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mla_fp8._plan.kernel import WARP, Device, Kernel, ceil_div
from mla_fp8._plan.tuning import Tuning

MAX_FILTER_K = 4096  # the most that topk_filter selects
ROW_THREADS = 256  # threads that select from a row, where rows are many
_SORT_THREADS = 256
TRANSLATE_THREADS = 256
TRANSLATED_AT_ONCE = 4  # elements of a thread: kTogether of translate_topk
_HISTOGRAM_BYTES = 4 * (1024 + 256 + 5)  # of struct Histogram, without its per-warp fields


@dataclass(frozen=True)
class SelectPlan:
    """The selection kernel, and how rows and blocks go together."""

    kernel: Kernel
    rows_per_block: int = 1
    cluster: int = 1  # blocks that share a row
    unscored_kv_len: int = 0  # rows of at most this many keys need no scores

    def blocks(self, rows: int) -> int:
        """Blocks that select from this many rows at the same time."""
        return ceil_div(rows, self.rows_per_block) * self.cluster


def filter_bytes(k: int, threads: int, cluster: int = 1) -> int:
    """Shared memory of ``topk_filter`` for one row, as its ``static_assert`` checks."""
    listed = k + max(16 * threads, (cluster - 1) * k)
    received = 32 + 8 * cluster if cluster > 1 else 0  # struct Received
    row = 8 * listed + _HISTOGRAM_BYTES + 16 * (threads // WARP) + 16
    return 8 * ceil_div(row, 8) + received


def filter_plan(
    k: int,
    threads: int,
    *,
    values: bool,
    rows_per_block: int = 1,
    cluster: int = 1,
    unscored: bool = False,
    own_scores: bool = True,
    slots: int = 0,
    tokens_per_key: int = 0,
) -> SelectPlan:
    """``topk_filter`` with ``threads`` for a row, on our own scores or a caller's.

    ``slots``: 0 for columns, 1 for slots in their place, 2 for both. ``tokens_per_key``: of the
    batch in which the kernel finds rows itself; 0: it reads token rows.
    """
    shared_bytes = rows_per_block * filter_bytes(k, threads, cluster)
    macros = {
        "kTopK": k,
        "kThreads": threads,
        "kCluster": cluster,
        "kValues": int(values),
        "kOwnScores": int(own_scores),
        "kSlots": slots,
        "kRows": rows_per_block,
        "kUnscored": int(unscored),
        "kLocates": int(tokens_per_key > 0),
        "kTokensPerKey": max(tokens_per_key, 1),
        "kSharedBytes": shared_bytes,
    }
    block = threads * rows_per_block
    kernel = Kernel("topk_filter", tuple(macros.items()), block, shared_bytes)
    return SelectPlan(kernel, rows_per_block, cluster, k * unscored)


def _histogram_plan(
    k: int,
    threads: int,
    staged: int,
    *,
    fits: bool,
    values: bool,
    own_scores: bool,
    slots: int,
    tokens_per_key: int,
) -> SelectPlan:
    """``topk_histogram``, which keeps ``staged`` columns of a row in shared memory.

    ``fits``: no row has more columns.
    """
    shared_bytes = 4 * staged + 16 * ceil_div(_HISTOGRAM_BYTES + 1024 + 24 * (threads // WARP), 16)
    macros = {
        "kTopK": k,
        "kThreads": threads,
        "kStaged": staged,
        "kRowsFit": int(fits),
        "kValues": int(values),
        "kOwnScores": int(own_scores),
        "kSlots": slots,
        "kLocates": int(tokens_per_key > 0),
        "kTokensPerKey": max(tokens_per_key, 1),
        "kSharedBytes": shared_bytes,
    }
    return SelectPlan(Kernel("topk_histogram", tuple(macros.items()), threads, shared_bytes))


def _cluster(rows: int, columns: int, device: Device, tuning: Tuning) -> int:
    """Blocks that share a row, a power of two; 16 clusters of 8 do not fit on the GPU at once."""
    if not device.clusters:
        return 1
    most = 8 if rows <= 8 else 4
    most = min(most, device.multiprocessors // max(rows, 1), columns // tuning.cluster_columns)
    return 1 << max(most.bit_length() - 1, 0)


def _row_threads(k: int, rows: int, columns: int, device: Device) -> int:
    """Threads that select from one row: more where there are fewer rows."""
    for threads in (1024, 512):
        fits = filter_bytes(k, threads) <= device.shared_bytes
        if fits and rows * threads <= 1024 * device.multiprocessors and columns > 16 * threads:
            return threads
    return ROW_THREADS


def _alone(kernel: Kernel, device: Device) -> Kernel:
    """The kernel with so much shared memory that a multiprocessor takes one block at a time.

    A selection that begins early starts on the first multiprocessors that scoring leaves. If two
    blocks fit one, they crowd there while others are idle: on an H200, selection from 64 rows of
    4096 columns then takes 3.4 us longer.
    """
    return replace(kernel, shared_bytes=max(kernel.shared_bytes, device.shared_bytes // 2 + 1024))


def plan_select(
    rows: int,
    columns: int,
    k: int,
    device: Device,
    tuning: Tuning,
    *,
    values: bool,
    unscored: bool = False,
    own_scores: bool = True,
    slots: int = 0,
    tokens_per_key: int = 0,
) -> SelectPlan:
    """Plan the selection from ``rows`` rows in one launch.

    ``slots``: 0 for columns, 1 for slots in their place, 2 for both. ``tokens_per_key``: of the
    batch in which the kernel finds rows itself; 0: it reads token rows, or lengths of a caller.

    ``topk_histogram`` takes few short rows, and any rows for large ``k``; ``topk_filter`` takes
    the others. It shares each of few long rows among the blocks of a cluster. On an H200, k = 2048,
    a row of 131072 columns takes 10 us with 8 blocks and 17 us with one; a row of 8192 columns
    takes 6.5 us in ``topk_histogram`` and 7.2 us in ``topk_filter``.
    """

    def plan(cluster: int) -> SelectPlan:
        threads = 512 if cluster > 1 else _row_threads(k, rows, columns, device)
        return filter_plan(
            k,
            threads,
            values=values,
            cluster=cluster,
            unscored=unscored,
            own_scores=own_scores,
            slots=slots,
            # With more rows, registers are scarce, and the wait for a token row hides.
            tokens_per_key=tokens_per_key if cluster > 1 else 0,
        )

    few = rows <= tuning.few_rows
    if k > MAX_FILTER_K or (few and columns <= tuning.histogram_columns):
        # With 1024 threads, twice as many warps repeat what each warp does. On an H200, 1 x 8192
        # takes 9.3 us with 512 and 9.9 us with 1024, and 1 x 16384 takes 12.6 and 12.0 us.
        threads = 1024 if few and columns > tuning.histogram_columns // 2 else 512
        staged = tuning.histogram_columns
        found = _histogram_plan(
            k,
            threads,
            staged,
            fits=columns <= staged,
            values=values,
            own_scores=own_scores,
            slots=slots,
            tokens_per_key=tokens_per_key,
        )
    else:
        cluster = _cluster(rows, columns, device, tuning)
        while cluster > 1 and plan(cluster).kernel.shared_bytes > device.shared_bytes:
            cluster //= 2
        found = plan(cluster)
    early = tokens_per_key > 0 and found.cluster == 1
    if early and found.blocks(rows) <= device.multiprocessors:
        return replace(found, kernel=_alone(found.kernel, device))
    return found


def sort_kernel(k: int) -> Kernel:
    """The kernel that sorts selected rows by score; a thread for each digit."""
    return Kernel("sort_topk", (("kTopK", k), ("kThreads", _SORT_THREADS)), _SORT_THREADS)


def translate_kernel(k: int, slots: int, sharded: bool) -> Kernel:
    """The kernel that rewrites selected columns as positions of a shard, slots, or both.

    ``slots``: 0 for none, 1 for slots in place of columns, 2 for slots beside positions.
    ``sharded``: columns become positions of a shard.
    """
    macros = {
        "kTopK": k,
        "kThreads": TRANSLATE_THREADS,
        "kSlots": slots,
        "kSharded": int(sharded),
    }
    return Kernel("translate_topk", tuple(macros.items()), TRANSLATE_THREADS)
