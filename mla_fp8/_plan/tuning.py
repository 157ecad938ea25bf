"""Numbers that were measured: they set how fast a call is and how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)  # plans are cached by the object: hashing it must be fast
class Tuning:
    """What plans depend on besides shapes and device facts. No result depends on it.

    The defaults were measured on an H200 with 64 heads and k = 2048 (docs/notes).
    """

    # Workspace for scores that wait for their selection. Decode gets more: its keys take 33 times
    # the bytes of its scores, and for short lengths splitting would take longer than the work.
    prefill_bytes: int = 60 << 20
    decode_bytes: int = 1 << 30
    min_part_rows: int = 48  # rows of a part: with fewer, rows are split by keys too

    # Portable scoring.
    portable_warps: int = 8
    portable_tile_tokens: int = 16  # tokens that share one load of a key tile, at most

    # 128 keys take 1.8 us in a full tile and 1.0 us in a tile that is at most half full. So 128
    # keys of such a tile are one unit of work, which is 64 keys of a full tile.
    half_tile_unit_keys: int = 128

    # Scoring and selection side by side: nanoseconds on one multiprocessor.
    score_key_ns: float = 1.74  # to score one key for a token of 64 heads
    read_key_ns: float = 4.1  # to read one key
    select_row_ns: float = 3400.0  # to select: for each row
    select_key_ns: float = 0.16  # and for each of its keys

    # Selection.
    few_rows: int = 32  # rows whose columns topk_histogram takes, at most
    cluster_columns: int = 8192  # columns for each block of a cluster, at least
    histogram_columns: int = 16384  # columns of few rows that topk_histogram takes, at most
    long_row: int = 1 << 15  # columns from which prefill selects with 512 threads a row


H200 = Tuning()
