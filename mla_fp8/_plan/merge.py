"""The kernel that merges lists of selected keys."""

from __future__ import annotations

from math import ceil, sqrt

from mla_fp8._plan.kernel import Device, Kernel, ceil_div, power_of_two

_MAX_COLLECTED = 4096  # selected entries that are put in order in shared memory, at most
_STAGED = range(1024, 16385)  # entries whose keys are kept in shared memory, without candidates
_FIXED_BYTES = 8 * (256 + 3) + 4 * (1024 + 32 + 4 + 10)  # Shared without entries and words

# With candidates: threads of a block and blocks of a multiprocessor, from the fastest to the
# slowest; the first pair that shared memory has room for is taken. On an H200, merging 8 x 2048 for
# 4096 rows takes 262, 262, 271 and 399 us with them, and 297 us with four blocks of 256 threads.
_CONFIGURATIONS = (256, 3), (256, 2), (512, 2), (512, 1)
_BIT_WORDS = range(1024, 4097)  # for bits of positions
_SAMPLE_OF_THREAD = 8  # entries that a thread samples: kSampleVectors in merge_candidates.cuh


def _shared_bytes(listed: int, staged: int) -> int:
    return _FIXED_BYTES + 8 * listed + 4 * staged


def _candidates(entries: int, k: int, samples: int) -> tuple[int, int]:
    """Room for the candidates, and which rank of the sample is the limit; 0: no limit.

    If scores are independent, the number of candidates is almost always within four standard
    deviations of its mean.
    """
    expected = k * samples / entries
    margin = 4 * sqrt(expected * max(1 - k / entries, 0)) + 2
    rank = ceil(expected + margin)
    most = (rank + rank // 8 + 4 + margin) * entries / samples  # rank // 8 + 4: kSampleCrowd
    if entries <= max(most, 4096):
        return entries, 0
    return 256 * ceil_div(ceil(most), 256), rank


def _configuration(
    entries: int, k: int, result_words: int, device: Device
) -> tuple[int, int, int, int, int]:
    """Threads, blocks for each multiprocessor, candidates, place of the limit, and words."""
    for threads, blocks in _CONFIGURATIONS if k <= _MAX_COLLECTED else ():
        candidates, rank = _candidates(entries, k, _SAMPLE_OF_THREAD * threads)
        # The driver adds 1 KiB to the shared memory of each block.
        budget = (device.shared_bytes + 1024) // blocks - 1024
        words = (budget - _shared_bytes(max(candidates, k), 0)) // 8 * 2
        if words >= result_words + _BIT_WORDS.start:
            return threads, blocks, candidates, rank, min(words, result_words + _BIT_WORDS[-1])
    threads = 256 if entries <= 4096 else 512
    most = (device.shared_bytes - _shared_bytes(k if k <= _MAX_COLLECTED else 1, 0)) // 8 * 2
    staged = min(max(power_of_two(entries), _STAGED.start), _STAGED[-1])
    return threads, 2, 0, 0, min(max(staged, result_words + _BIT_WORDS.start), most)


def merge_kernel(
    lists: int, width: int, k: int, by_score: bool, values: bool, aligned: bool, device: Device
) -> Kernel:
    """``merge_topk`` for ``lists`` lists of ``width`` entries, one block for each row of results.

    ``aligned``: both arrays begin at multiples of 16 bytes.
    """
    collected = k if k <= _MAX_COLLECTED else 1
    result_words = 2 * collected if by_score or values else 2 * ceil_div(collected, 2)
    threads, blocks, candidates, rank, words = _configuration(
        lists * width, k, result_words, device
    )
    vector = 4 if aligned and width % 4 == 0 else 1
    macros = {
        "kTopK": k,
        "kWidth": width,
        "kValues": int(values),
        "kByScore": int(by_score),
        "kVector": vector,
        "kVectors": 8 if vector == 1 else 4 if threads == 256 else 2,  # more would spill registers
        "kMaxCandidates": candidates,
        "kSampleRank": rank,
        "kThreads": threads,
        "kBlocks": blocks,
        "kStaged": words,
        "kSharedBytes": _shared_bytes(max(candidates, collected), words),
    }
    return Kernel("merge_topk", tuple(macros.items()), threads, macros["kSharedBytes"])
