"""How to select from rows of scores: which kernel, and how many blocks and threads for a row."""

from __future__ import annotations

from mla_fp8._plan.kernel import WARP, Device, Kernel, ceil_div

SORT_THREADS = 256  # one per digit: kDigits of sort_topk.cu
STREAM_K = 4096  # the most that stream_topk.cu selects
SELECT_THREADS = 256  # of its for a row, where there are rows enough
_FEW_ROWS = 32  # that have blocks enough to share them among several
_ALONE = 8192  # columns that more blocks than one are not worth
_SHORT = 16384  # columns that one block keeps whole: kStaged of select_topk.cu


def stream_bytes(k: int, threads: int, blocks: int = 1) -> int:
    """``sizeof(Shared)`` of ``candidate_list.cuh``, for one row."""
    listed = k + max(16 * threads, (blocks - 1) * k) + threads
    return 8 * listed + 4 * (1024 + 256) + 16 * (threads // WARP) + 40


def stream_kernel(
    k: int,
    threads: int,
    *,
    values: bool,
    rows: int = 1,
    blocks: int = 1,
    skips: bool = False,
    holes: bool = True,
) -> Kernel:
    """``stream_topk``, on our own scores (``holes``) or a caller's.

    ``rows`` in a block, or so many blocks for a row.
    """
    shared = rows * stream_bytes(k, threads, blocks)
    parameters = {
        "kTopK": k,
        "kThreads": threads,
        "kCluster": blocks,
        "kValues": int(values),
        "kOwnScores": int(holes),
        "kRows": rows,
        "kUnscored": int(skips),
        "kSharedBytes": shared,
    }
    return Kernel("topk_filter", tuple(parameters.items()), threads * rows, shared)


def _select_kernel(k: int, threads: int, blocks: int, *, values: bool, holes: bool) -> Kernel:
    """``select_topk``, so many blocks a row."""
    staged = 2 * _SHORT if blocks > 1 else _SHORT
    warps = threads // WARP
    shared = 16 * ceil_div(4 * (staged + 1024 + 4 * 256 + 3 * warps + 6), 16)  # its Shared
    parameters = {
        "kTopK": k,
        "kThreads": threads,
        "kCluster": blocks,
        "kStaged": staged,
        "kValues": int(values),
        "kOwnScores": int(holes),
        "kSharedBytes": shared,
    }
    return Kernel("topk_histogram", tuple(parameters.items()), threads, shared)


def _blocks_of_row(rows: int, columns: int, device: Device) -> int:
    """Blocks that share a row, a power of two; 16 rows of 8 blocks do not run all at once."""
    if not device.clusters:
        return 1
    most = 8 if rows <= 8 else 4
    most = min(most, device.multiprocessors // max(rows, 1), columns // _ALONE)
    return 1 << max(most.bit_length() - 1, 0)


def _threads_of_row(k: int, rows: int, columns: int, device: Device) -> int:
    """Threads that select from one row: the more, the fewer rows there are to share the GPU."""
    for threads in (1024, 512):
        fits = stream_bytes(k, threads) <= device.shared_bytes
        if fits and rows * threads <= 1024 * device.multiprocessors and columns > 16 * threads:
            return threads
    return SELECT_THREADS


def select_kernel(
    rows: int,
    columns: int,
    k: int,
    device: Device,
    *,
    values: bool,
    skips: bool = False,
    holes: bool = True,
) -> Kernel:
    """The selection from so many rows, of our own scores (``holes``) or a caller's.

    Few rows are shared among blocks, which takes clusters. On an H200, k = 2048: 10 us for 131072
    columns with 8 blocks a row, where one takes 17; 15 us for 64 rows with 2 each. Short rows are
    ``select_topk``'s: 6 us for 8192 columns, where ``stream_topk`` takes 7.
    """
    few = rows <= _FEW_ROWS
    short = few and columns <= _SHORT
    blocks = 1 if short else _blocks_of_row(rows, columns, device)

    def kernel(blocks: int) -> Kernel:
        if short or k > STREAM_K:
            return _select_kernel(k, 1024 if few else 512, blocks, values=values, holes=holes)
        threads = 512 if blocks > 1 else _threads_of_row(k, rows, columns, device)
        return stream_kernel(k, threads, values=values, blocks=blocks, skips=skips, holes=holes)

    while blocks > 1 and kernel(blocks).shared_bytes > device.shared_bytes:
        blocks //= 2
    return kernel(blocks)


def sort_kernel(k: int) -> Kernel:
    """The sort of selected rows by score."""
    return Kernel("sort_topk", (("kTopK", k),), SORT_THREADS)
