"""``bench --plot``: times with their quartiles, and shares of the roofline, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mla_fp8.cli.bench_report import SPECIAL, cell
from mla_fp8.cli.bench_rows import PEERS, TIMES, Row, label
from mla_fp8.cli.cases import Case
from mla_fp8.cli.command import CommandError, check_output

_COLORS = {  # by field: ours are blue
    "us": "#56b4e9",
    "deepgemm_us": "#e69f00",
    "topk_us": "#0072b2",
    "torch_topk_us": "#d55e00",
}
_SHARES = {"roofline_percent": "us", "topk_roofline_percent": "topk_us"}


def check(path: Path, cases: Sequence[Case]) -> None:
    """Raise `CommandError` if these cases cannot be drawn into this file."""
    if path.suffix not in (".png", ".svg"):
        raise CommandError(f"--plot must end in .png or .svg; got {path}")
    if all(case.group in SPECIAL for case in cases):
        raise CommandError(f"--plot draws all groups but {', '.join(SPECIAL)}")
    if find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install matplotlib")
    check_output("--plot", path)


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw the rows of all groups that scoring is timed in."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = [row for row in rows if row["group"] not in SPECIAL]
    names = [name for name in _COLORS if any(name in row for row in rows)]
    size = 11, 2.2 + 0.18 * len(rows) * len(names)
    figure = Figure(figsize=size, layout="constrained")
    times, shares = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    times.set(xscale="log", xlabel="µs, lower is better; lines: quartiles")
    for place, name in enumerate(names):
        above = 0.8 * ((place + 0.5) / len(names) - 0.5)
        _times(times, [(y + above, row) for y, row in enumerate(rows) if name in row], name)
    for place, (share, name) in enumerate(_SHARES.items()):
        found = [
            (y + 0.4 * (place - 0.5), row[share]) for y, row in enumerate(rows) if share in row
        ]
        if found:
            bars = shares.barh(*zip(*found, strict=True), 0.36, color=_COLORS[name])
            shares.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    times.margins(x=0.2)
    times.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0f}" if value >= 1 else f"{value:g}")
    )
    times.xaxis.set_minor_formatter(NullFormatter())
    times.grid(axis="x", alpha=0.3)
    times.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    times.set_ylabel("sequences x new tokens x keys")
    times.set_ylim(len(rows) - 0.5, -0.5)
    shares.set_xlim(0, 1.15 * max(row[share] for row in rows for share in _SHARES if share in row))
    shares.set_xlabel("% of the roofline")
    handles, words = times.get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _times(axes: Any, rows: list[tuple[float, Row]], name: str) -> None:
    """A point with its quartiles and its figure for each row, at its height."""
    at = [y for y, _ in rows]
    middle = [row[name] for _, row in rows]
    below = [row[name] - row[f"{name}_q1"] for _, row in rows]
    above = [row[f"{name}_q3"] - row[name] for _, row in rows]
    style = {"fmt": "o", "markersize": 4, "color": _COLORS[name], "label": (TIMES | PEERS)[name]}
    axes.errorbar(middle, at, xerr=(below, above), **style)
    for y, row in rows:
        axes.annotate(
            cell(row, name).partition(" ")[0],
            (row[f"{name}_q3"], y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
