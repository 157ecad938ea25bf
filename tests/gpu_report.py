"""Whether `gpu_report.json`, which `python -m mla_fp8 certify` writes on a GPU, is of this tree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

PATH = Path(__file__).with_name("gpu_report.json")
NAMED = 3  # files that a warning names, at most
REMEDY = "run `python -m mla_fp8 certify` on a GPU machine"


def findings(report: Mapping | None, tree: Mapping[str, str]) -> list[str]:
    """What the report does not cover, in words; empty when it is about exactly this tree."""
    if report is None:
        return [f"tests/{PATH.name} is missing: no GPU has tested this tree; {REMEDY}"]
    tested = report.get("sha256")
    if not isinstance(tested, Mapping):
        return [f'tests/{PATH.name} has no "sha256" table: nothing to compare with; {REMEDY}']
    groups = {
        "changed since the GPU tests ran": {p for p in tree if tested.get(p, tree[p]) != tree[p]},
        "never tested on a GPU": set(tree) - set(tested),
        "tested on a GPU but gone now": set(tested) - set(tree),
    }
    stale = [
        f"tests/{PATH.name} is stale: {what}: {_names(paths)}; {REMEDY}"
        for what, paths in groups.items()
        if paths
    ]
    runs = {name: run for name, run in report.items() if isinstance(run, Mapping)}
    bad = [name for name, run in runs.items() if run.get("exit_status", 0) != 0]
    return stale + [f"tests/{PATH.name} says that {name} failed; {REMEDY}" for name in bad]


def _names(paths: set[str]) -> str:
    named, more = sorted(paths)[:NAMED], len(paths) - NAMED
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def findings_for_tree() -> list[str]:
    """The same for the report and the tree on disk; never raises, since it runs in a summary."""
    try:
        from mla_fp8.cli.certify import tree_digests

        tree = tree_digests()
        report = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else None
        return findings(report, tree)
    except Exception as error:
        return [f"tests/{PATH.name} cannot be compared with the tree: {error!r}"]
