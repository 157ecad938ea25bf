"""``bench --compare OLD.json``: which times changed beyond the spread of both runs.

A time counts as slower if its lower quartile lies above the upper quartile of the old run and its
median grew by more than the tolerance. The tolerance is there because the spread inside a run does
not hold what changes between runs: clocks, temperature, the place of arrays in memory. In one run
of 2026-11-28 on an H200 (``docs/data/bench.json``) 18 cases stand in two groups; their two scoring
times differ by 2 % (median) and at most 7.3 %.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mla_fp8.cli.bench_report import SPECIAL, cell
from mla_fp8.cli.bench_rows import TIMES, Row, identity, label
from mla_fp8.cli.cases import Case
from mla_fp8.cli.command import CommandError
from mla_fp8.cli.roofline import Roofline

TOLERANCE = 8.0  # percent
_ORDER = "slower", "faster", "same"


@dataclass(frozen=True)
class Change:
    """One time of a case, in an old and a new run."""

    old: Mapping[str, Any]
    new: Mapping[str, Any]
    name: str  # the field

    @property
    def ratio(self) -> float:
        """The new median over the old one."""
        return float(self.new[self.name] / self.old[self.name])

    def verdict(self, tolerance: float) -> str:
        """``slower``, ``faster`` or ``same``; ``tolerance`` is in percent."""
        (old_q1, old_q3), (new_q1, new_q3) = (self._quartiles(row) for row in (self.old, self.new))
        most = 1 + tolerance / 100
        if new_q1 > old_q3 and self.ratio > most:
            return "slower"
        return "faster" if new_q3 < old_q1 and self.ratio < 1 / most else "same"

    def _quartiles(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Those of the file, or the median twice where an older file has none."""
        low, high = (row.get(f"{self.name}_{which}", row[self.name]) for which in ("q1", "q3"))
        return float(low), float(high)


def load(path: Path, device: str, cases: Iterable[Case]) -> dict[str, Any]:
    """An older result of the same device, which has some of these cases.

    Raises
    ------
    CommandError
        If the file is not a result of ``bench --json``, of another device, or of other cases.
    """
    expected = "--compare must be a file that bench --json wrote"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{expected}; got {path}: {error}") from None
    try:
        rows: list[Row] = found["rows"]
        for roof in found.get("roofline", ()):
            Roofline(**roof)
        its_device = found["device"] if "device" in found else found["gpu"]["name"]
        for row in rows:
            identity(row)
            if not all(float(row.get(name, 1)) > 0 for name in TIMES):
                raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CommandError(f"{expected}; got {path}") from None
    if its_device != device:
        raise CommandError(
            f"--compare must be a result of this device ({device}); got {path} of {its_device}"
        )
    if not {(row["group"], row["shape"]) for row in rows} & {(c.group, c.name) for c in cases}:
        raise CommandError(f"--compare must have a case of this run; {path} has none")
    return found


def changes(old: Iterable[Row], new: Iterable[Row]) -> list[Change]:
    """Every time of ours that both runs have, of the cases that both have."""
    before: dict[tuple[Any, ...], Row] = {}
    for row in old:
        before.setdefault(identity(row), row)
    pairs = [(before[identity(row)], row) for row in new if identity(row) in before]
    return [
        Change(earlier, row, name)
        for earlier, row in pairs
        if earlier.get("pairs", row.get("pairs")) == row.get("pairs")
        for name in TIMES
        if name in earlier and name in row
    ]


def table(found: Sequence[Change], tolerance: float) -> Table:
    """All changes, slower ones first and the largest of each kind first."""
    result = Table(title="Compared with the old run (µs, quartiles)", title_justify="left")
    for head in ("case", "time", "old", "new", "new / old", ""):
        result.add_column(head, overflow="fold")

    def place(change: Change) -> tuple[int, float]:
        return _ORDER.index(change.verdict(tolerance)), -abs(change.ratio - 1)

    styles = {"slower": "bold red", "faster": "green", "same": ""}
    for change in sorted(found, key=place):
        verdict = change.verdict(tolerance)
        special = change.new["group"] in SPECIAL
        words = change.new["group"] if special else TIMES[change.name]
        times = (cell(row, change.name) for row in (change.old, change.new))
        result.add_row(
            label(change.new), words, *times, f"{change.ratio:.3f}", verdict, style=styles[verdict]
        )
    return result


def summary(found: Sequence[Change], rows: Sequence[Row], tolerance: float) -> str:
    """How many times there are of each kind, and how many of the new rows the old file lacks."""
    verdicts = [change.verdict(tolerance) for change in found]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in _ORDER)
    words = f"{len(found)} times compared: {counts} (beyond the quartiles and {tolerance:g} %)"
    if missing := len(rows) - len({id(change.new) for change in found}):
        words += f"; the old file lacks {missing} of {len(rows)} cases"
    if any(f"{change.name}_q1" not in change.old for change in found):
        words += "; where the old file has no quartiles, its medians stand for them"
    return words + "."
