"""Several GPUs beside one, in the same run: the group ``gpus`` of the benchmark.

A process for each GPU runs `gpu_ranks`. A row has these times:

- ``one_us``: one GPU that computes the whole call alone.
- ``us``: all GPUs together, on the slowest rank.
- ``local_us``, ``gather_us``, ``merge_us``: the parts of ``us``, each timed alone on the slowest
  rank: the rank's selection, the exchange of its result, and the merge into one result.
- ``local8_us``, ``merge8_us``: selection and merge of a rank among 8, measured on one GPU. The same
  for 64.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from mla_fp8.cli.cases import Case
from mla_fp8.cli.command import CommandError

_SECONDS = 300.0  # until the processes are given up
_TIMES = "one_us", "us", "local_us", "gather_us", "merge_us"


def cases() -> list[Case]:
    """The cases of the group; ``data`` says whether ranks share the keys or the rows."""
    decode = [Case("gpus", 64, (1,), (1 << 20,), data="keys")]
    decode.append(Case("gpus", 64, (1,) * 16, (1 << 18,) * 16, data="keys"))
    return decode + [Case("gpus", 64, (2048,), (1 << 18,), data=data) for data in ("keys", "rows")]


def count() -> int:
    """How many GPUs there are."""
    try:
        import cupy
    except ImportError:
        return 0
    return int(cupy.cuda.runtime.getDeviceCount()) if cupy.is_available() else 0


def check() -> None:
    """Raise `CommandError` unless several GPUs can be measured."""
    if (found := count()) < 2:
        raise CommandError(f"the group gpus needs at least two GPUs, so nothing was measured; "
                           f"found {found}")  # fmt: skip
    from cupy.cuda import nccl

    if not nccl.available:
        raise CommandError("the group gpus needs NCCL: pip install nvidia-nccl-cu13 (or -cu12)")


def measure(together: list[Case], size: int | None = None) -> list[dict[str, Any]]:
    """Measure each case by ``size`` processes, with one GPU each, and return a row for each case.

    Raises
    ------
    CommandError
        If a process fails, for example because results differ. The message has what all printed.
    """
    size = size or count()
    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder) / "cases.json", Path(folder) / "rows.json"
        wanted.write_text(json.dumps([asdict(case) for case in together]), encoding="utf-8")
        _run(size, [str(wanted), str(found)], Path(folder))
        rows: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))
    return rows


def _run(size: int, arguments: list[str], folder: Path) -> None:
    """Run a process for each GPU. If one fails, all others are ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # Without NVLink multicast, unless the environment asks for it: it needs a set-up of the host.
    common = {"NCCL_NVLS_ENABLE": "0"} | os.environ
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port - 1)}
    root = str(Path(__file__).parents[2])
    common["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "mla_fp8.cli.gpu_ranks", *arguments]
    processes, outputs = [], [folder / f"{rank}.txt" for rank in range(size)]
    try:
        for rank, output in enumerate(outputs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            with output.open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        command, env=common | place, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        end = time.monotonic() + _SECONDS
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() not in (None, 0) for process in processes)
            if failed or time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        printed = "\n".join(
            f"rank {rank}, status {process.returncode}: {_tail(output)}"
            for rank, (process, output) in enumerate(zip(processes, outputs, strict=True))
        )
        raise CommandError(f"a process failed, or took more than {_SECONDS:g} s.\n{printed}")


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-2000:]


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each row of the group, with its speed-up."""
    columns = "data", "shape", "gpus", *_TIMES, "speedup"
    result = Table(*columns, title="Several GPUs beside one")
    for row in rows:
        if row["group"] == "gpus":
            result.add_row(*(str(row.get(name, "-")) for name in columns))
    return result
