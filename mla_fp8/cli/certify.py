"""``python -m mla_fp8 certify``: run the GPU tests on these sources and write a report."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mla_fp8.cli import info
from mla_fp8.cli.command import CommandError, check_output

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "tests" / "gpu_report.json"
_FOLDERS = ("kernels", "mla_fp8")
_PROCESSES = 8  # that share the GPU, if pytest-xdist is installed
_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def tree_digests(root: Path = ROOT) -> dict[str, str]:
    """sha256 of every file in ``kernels/`` and ``mla_fp8/``, by path from ``root``."""
    files = sorted(file for folder in _FOLDERS for file in (root / folder).rglob("*"))
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }


def _pytest(arguments: list[str], prefix: list[str]) -> dict[str, Any]:
    """Run pytest in a new process and count outcomes from its JUnit report."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [*prefix, sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", *arguments]
        process = subprocess.run(command, cwd=ROOT, check=False)
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        if junit.exists():
            for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
                for name in counts:
                    counts[name] += int(suite.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "exit_status": process.returncode,
    }


def _sanitized(tool: str) -> dict[str, Any]:
    """Run the small GPU tests under a tool of compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"exit_status": None, "note": "compute-sanitizer not found"}
    # pytest never exits with 86, so this status means an error that the sanitizer found.
    prefix = [sanitizer, f"--tool={tool}", "--error-exitcode=86"]
    if tool == "memcheck":  # cuda-bindings queries functions that this driver may lack
        prefix.append("--report-api-errors=no")
    return _pytest(["-m", "gpu and sanitize", "tests"], prefix)


def _driver() -> dict[str, str]:
    """Versions of the driver and of CUDA."""
    import cupy

    def dotted(version: int) -> str:
        return f"{version // 1000}.{version % 1000 // 10}"

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return {
        "driver": found.stdout.split("\n")[0].strip() or "unknown",
        "cuda_driver": dotted(cupy.cuda.runtime.driverGetVersion()),
        "cuda_runtime": dotted(cupy.cuda.runtime.runtimeGetVersion()),
    }


def run() -> int:
    """Run the GPU suite and compute-sanitizer, and write the report.

    Returns
    -------
    int
        0 if everything passed.

    Raises
    ------
    CommandError
        If there is no GPU, no pytest or no checkout to certify; the report stays as it is.
    """
    devices = info.gpus()
    if not REPORT.parent.is_dir():
        raise CommandError("needs a checkout of the repository (no tests/ beside the package)")
    if not devices:
        raise CommandError("no usable NVIDIA GPU (or no CuPy), so nothing was certified")
    if find_spec("pytest") is None:
        raise CommandError("needs pytest: pip install -e '.[test]' in the checkout")
    check_output(REPORT.name, REPORT)
    digests = tree_digests()
    # pytest-benchmark, if installed, refuses to run with several processes.
    several = ["-n", str(_PROCESSES), "-p", "no:benchmark"] if find_spec("xdist") else []
    suite = _pytest(["-m", "gpu", *several, "tests"], [])
    with ThreadPoolExecutor(len(_TOOLS)) as workers:  # each waits for a process on one core
        sanitized = dict(zip(_TOOLS, workers.map(_sanitized, _TOOLS), strict=True))
    report = {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpus": devices,
        **_driver(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": info.versions(),
        "gpu_tests": suite,
        **sanitized,
        "sha256": digests,
    }
    if tree_digests() != digests:
        raise CommandError("the sources changed while the tests ran, so nothing was certified")
    REPORT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"certify: GPU tests {suite}; {sanitized}; wrote {REPORT.name}")
    return int(any(found["exit_status"] != 0 for found in (suite, *sanitized.values())))
