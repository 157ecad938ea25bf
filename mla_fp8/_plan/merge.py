"""The kernel that merges lists of selected keys."""

from __future__ import annotations

from mla_fp8._plan.kernel import Device, Kernel, ceil_div, power_of_two

_MAX_COLLECTED = 4096  # selected entries that are sorted in shared memory, at most
_STAGED = range(1024, 16385)  # entries whose keys are kept in shared memory
# Shared of merge_topk.cu without the collected entries and the keys.
_FIXED_BYTES = 8 * (256 + 3) + 4 * (1024 + 32 + 11)


def merge_kernel(
    lists: int, width: int, k: int, by_score: bool, values: bool, device: Device
) -> Kernel:
    """``merge_topk`` for ``lists`` lists of ``width`` entries, one block for each row of results.

    Two blocks of 512 threads share a multiprocessor: one of them reads its row while the other
    selects and sorts.
    """
    entries = lists * width
    collected = k if k <= _MAX_COLLECTED else 1

    def shared_bytes(staged: int) -> int:
        return 8 * ceil_div(8 * collected + _FIXED_BYTES + 4 * staged, 8)

    staged = min(max(power_of_two(entries), _STAGED.start), _STAGED.stop - 1)
    while shared_bytes(staged) > device.shared_bytes:
        staged //= 2
    threads = 256 if entries <= 4096 else 512
    macros = {
        "kTopK": k,
        "kWidth": width,
        "kValues": int(values),
        "kByScore": int(by_score),
        "kThreads": threads,
        "kStaged": staged,
        "kSharedBytes": shared_bytes(staged),
    }
    return Kernel("merge_topk", tuple(macros.items()), threads, shared_bytes(staged))
