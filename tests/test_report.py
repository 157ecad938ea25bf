"""The GPU report's digests against the tree: fresh, changed, untested, gone, missing."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest

from mla_fp8.cli.certify import tree_digests

TREE = {"kernels/a.cu": "1" * 64, "mla_fp8/b.py": "2" * 64}
ROOT = Path(__file__).resolve().parent.parent


def test_a_fresh_report_is_silent():
    assert gpu_report.findings({"sha256": dict(TREE)}, TREE) == []


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({"sha256": TREE | {"kernels/a.cu": "3" * 64}}, ["changed", "kernels/a.cu"]),
        ({"sha256": {"mla_fp8/b.py": "2" * 64}}, ["never tested", "kernels/a.cu"]),
        ({"sha256": TREE | {"mla_fp8/old.py": "4" * 64}}, ["gone", "mla_fp8/old.py"]),
        ({"sha256": TREE, "racecheck": {"passed": 45, "exit_status": 86}}, ["racecheck failed"]),
        ({}, ["sha256"]),
        (None, ["missing"]),
    ],
    ids=["changed file", "missing file", "extra file", "failed run", "no digests", "no report"],
)
def test_a_stale_report_is_told_in_words(report, words):
    (finding,) = gpu_report.findings(report, TREE)
    for word in [*words, "certify"]:
        assert word in finding
    assert "mla_fp8/b.py" not in finding, "names a file that is as it was"


def test_digests_are_those_of_sha256sum(tmp_path):
    for name in ("kernels/a.cu", "mla_fp8/cli/b.py", "mla_fp8/__pycache__/b.pyc", "docs/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("abc", encoding="utf-8")
    (tmp_path / "mla_fp8" / "empty").touch()
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert tree_digests(tmp_path) == {
        "kernels/a.cu": abc,
        "mla_fp8/cli/b.py": abc,
        "mla_fp8/empty": nothing,
    }


def test_many_files_are_counted():
    tree = {f"kernels/{i}.cu": "5" * 64 for i in range(9)}
    (finding,) = gpu_report.findings({"sha256": {}}, tree)
    assert "kernels/0.cu, kernels/1.cu, kernels/2.cu and 6 more;" in finding


def test_an_unreadable_report_is_a_finding_not_a_crash(tmp_path, monkeypatch):
    broken = tmp_path / "gpu_report.json"
    broken.write_text("{")
    monkeypatch.setattr(gpu_report, "PATH", broken)
    (finding,) = gpu_report.findings_for_tree()
    assert "cannot be compared" in finding


def test_the_summary_has_a_line_for_each_kind_of_skip(tmp_path):
    (tmp_path / "test_skips.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(20))\n"
        "@pytest.mark.parametrize('why', ['needs a GPU: none', 'could not import torch'])\n"
        "def test(why, i):\n"
        "    pytest.skip(why)\n"
        "@pytest.mark.skip(reason='could not import torch')\n"
        "def test_more():\n"
        "    pass\n"
    )
    options = ["-q", "-c", str(ROOT / "pyproject.toml"), "-p", "conftest", "-p", "no:cacheprovider"]
    options += ["-p", "no:xdist"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_skips.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        capture_output=True,
        text=True,
    )
    told = [line for line in run.stdout.splitlines() if "skip" in line.lower()]
    assert told[:-1] == [
        "21 skipped: could not import torch",
        "20 GPU tests were skipped because there is no GPU here: needs a GPU: none",
    ], run.stdout + run.stderr
    assert told[-1].startswith("41 skipped in")
