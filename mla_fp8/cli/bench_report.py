"""What the benchmark prints and writes: tables, JSON and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mla_fp8.cli.bench_rows import PEERS, Row, label

SPECIAL = "select", "doors", "gpus"  # groups whose rows have other columns, and tables of their own


def cell(row: Mapping[str, Any], name: str) -> str:
    """A figure; a time with its quartiles."""
    if name not in row:
        return "-"
    if name.endswith("speedup"):
        return f"{row[name]:.2f}"
    if not name.endswith("us"):
        return f"{row[name]:.3g}" if row[name] < 100 else f"{row[name]:.0f}"
    text = _time(row[name])
    if f"{name}_q1" not in row:
        return text
    return f"{text} ({_time(row[f'{name}_q1'])}–{_time(row[f'{name}_q3'])})"


def _time(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.3g}"


def tables(rows: Sequence[Row]) -> list[Table]:
    """The tables of scoring and of the whole operation; columns without a figure are left out."""
    rows = [row for row in rows if row["group"] not in SPECIAL]
    scoring = {
        "µs": "us",
        "TFLOP/s": "tflops",
        "TB/s": "tb_per_s",
        "% roofline": "roofline_percent",
        "DeepGEMM, µs": "deepgemm_us",
        "× DeepGEMM": "speedup",
    }
    whole = {
        "µs": "topk_us",
        "% roofline": "topk_roofline_percent",
        "scoring + torch.topk, µs": "torch_topk_us",
        "× torch.topk": "torch_topk_speedup",
    }
    other = {
        "real-like data, µs": "real_us",
        "on an idle GPU, µs": "eager_us",
        "call returns, µs": "host_us",
        "bound call returns, µs": "bound_us",
    }
    found = (
        _table(rows, scoring, "Scoring alone"),
        _table(rows, whole, "Scoring and selection"),
        _table(rows, other, "Scoring and selection: other data, other ways to call"),
    )
    return [table for table in found if len(table.columns) > 1]


def legend(rows: Sequence[Row]) -> str:
    """What the columns are, and which peers were there."""
    words = (
        "Times are medians with quartiles. % roofline: the least time by the roofline above, over "
        "the time taken."
    )
    if any("speedup" in row for row in rows):
        words += " × DeepGEMM: its time over ours, both of scoring."
    if any("torch_topk_speedup" in row for row in rows):
        words += " × torch.topk: the time of our scores and torch.topk, over ours."
    if not any(name in row for row in rows for name in PEERS):
        words += " No peer ran: torch and DeepGEMM are not installed, or not for these shapes."
    return words


def _table(rows: Sequence[Row], columns: Mapping[str, str], title: str) -> Table:
    columns = {head: name for head, name in columns.items() if any(name in row for row in rows)}
    table = Table(title=title, title_justify="left")
    table.add_column("sequences x new tokens x keys", overflow="fold")
    for head in columns:
        table.add_column(head, justify="right", overflow="fold")
    for row in rows:
        if any(name in row for name in columns.values()):
            table.add_row(label(row), *(cell(row, name) for name in columns.values()))
    return table


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Write the whole result: machine, versions, rows and cases."""
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, a line each, under the names of all fields; what a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
