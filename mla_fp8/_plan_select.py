"""How to select from rows of scores: which kernel, and how many blocks and threads for a row."""

from __future__ import annotations

from mla_fp8._kernel import WARP, Device, Kernel, ceil_div

SORT_THREADS = 256  # one per digit: kDigits of sort_topk.cu
STREAM_K = 4096  # the most that stream_topk.cu selects
SELECT_THREADS = 256  # of its for a row, where there are rows enough
_FEW_ROWS = 24  # that have blocks enough to share them among several
_ALONE = 8192  # columns that more blocks than one are not worth: kAlone of select_topk.cu


def stream_bytes(k: int, threads: int) -> int:
    """``sizeof(Shared)`` of ``candidate_list.cuh``, for one row."""
    return 8 * (k + 17 * threads) + 4 * (1024 + 256) + 8 * (threads // WARP) + 40


def stream_kernel(
    k: int, threads: int, *, values: bool, rows: int = 1, skips: bool = False, holes: bool = True
) -> Kernel:
    """``stream_topk``, on our own scores (``holes``) or a caller's, ``rows`` in a block."""
    shared = rows * stream_bytes(k, threads)
    parameters = {
        "kTopK": k,
        "kThreads": threads,
        "kValues": int(values),
        "kHoles": int(holes),
        "kRows": rows,
        "kSkips": int(skips),
        "kSharedBytes": shared,
    }
    return Kernel("stream_topk", tuple(parameters.items()), threads * rows, shared)


def _select_kernel(k: int, threads: int, blocks: int, *, values: bool, holes: bool) -> Kernel:
    """``select_topk``, so many blocks a row."""
    staged = (1 << 15) if blocks > 1 else (1 << 14)
    warps = threads // WARP
    shared = 16 * ceil_div(4 * (staged + 1024 + 4 * 256 + 3 * warps + 6), 16)  # its Shared
    parameters = {
        "kTopK": k,
        "kThreads": threads,
        "kCluster": blocks,
        "kStaged": staged,
        "kValues": int(values),
        "kHoles": int(holes),
        "kSharedBytes": shared,
    }
    return Kernel("select_topk", tuple(parameters.items()), threads, shared)


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

    Of few rows each is shared among blocks, which takes clusters. On an H200, k = 2048: 14.7 us for
    131072 columns with 8 blocks a row, where ``stream_topk`` with its one takes 19.6; 6.4 and
    8.8 us for 8192 with one each. 16 rows of 8 blocks do not run all at once.
    """
    few, blocks = rows <= _FEW_ROWS, 1
    if few and device.clusters:
        most = min(8 if rows <= 8 else 4, columns // _ALONE)
        blocks = 1 << max(most.bit_length() - 1, 0)
        if (
            _select_kernel(k, 1024, blocks, values=values, holes=holes).shared_bytes
            > device.shared_bytes
        ):
            blocks = 1
    if k > STREAM_K or blocks > 1 or (few and columns <= _ALONE):
        return _select_kernel(k, 1024 if few else 512, blocks, values=values, holes=holes)
    threads = _threads_of_row(k, rows, columns, device)
    return stream_kernel(k, threads, values=values, skips=skips, holes=holes)


def plan_blocks(kernel: Kernel, rows: int) -> int:
    """Blocks of a launch that selects from so many rows at once."""
    parameters = dict(kernel.parameters)
    return ceil_div(rows, parameters.get("kRows", 1)) * parameters.get("kCluster", 1)


def sort_kernel(k: int) -> Kernel:
    """The sort of selected rows by score."""
    return Kernel("sort_topk", (("kTopK", k),), SORT_THREADS)
