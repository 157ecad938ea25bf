"""Numbers that were measured: they set how fast a call is and how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)  # plans are cached by the object: hashing it must be fast
class Tuning:
    """What plans depend on beside shapes and device facts. No result depends on it.

    The defaults were measured on an H200 with 64 heads and k = 2048 (docs/notes).
    """

    # Workspace for scores that wait for their selection. Decode gets more: its keys take 33 times
    # the bytes of its scores, and splitting it costs more than the work where lengths are short.
    prefill_bytes: int = 60 << 20
    decode_bytes: int = 1 << 30
    min_part_rows: int = 48  # rows of a part: with fewer, rows are split by keys too

    # Portable scoring.
    portable_warps: int = 8
    portable_tile_tokens: int = 16  # tokens that share one load of a key tile, at most

    # 128 keys of a tile that is at most half full take 1.0 us, of a full tile 1.8 us for 64 keys
    # each: so that many keys of such a tile are one unit of work.
    half_tile_unit_keys: int = 128

    # Scoring and selection side by side: nanoseconds on one multiprocessor.
    score_key_ns: float = 1.74  # to score one key for a token of 64 heads
    read_key_ns: float = 4.1  # to read one key
    select_row_ns: float = 3400.0  # to select from a row, and for each of its keys
    select_key_ns: float = 0.16

    # Selection.
    shared_rows: int = 32  # up to so many rows have a cluster each, or one block of 1024 threads
    cluster_columns: int = 8192  # columns for each block of a cluster, at least
    histogram_columns: int = 16384  # up to so many columns of few rows: topk_histogram
    long_row: int = 1 << 15  # columns from which prefill selects with 512 threads a row


H200 = Tuning()
