"""``python -m mla_fp8 info``: devices, versions, and the kernels compiled so far."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from rich.table import Table

from mla_fp8._check.parameters import DEPTHS
from mla_fp8._cuda import cubins
from mla_fp8._plan.kernel import Device, architecture
from mla_fp8._plan.scoring import runs_on_hopper
from mla_fp8.cli.command import Console

_PACKAGES = (
    "mla_fp8",
    "numpy",
    "ml_dtypes",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability, multiprocessors and memory of every usable GPU."""
    try:
        import cupy
    except ImportError:
        return []
    if not cupy.is_available():
        return []
    found = []
    for ordinal in range(cupy.cuda.runtime.getDeviceCount()):
        properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
        found.append(
            {
                "name": properties["name"].decode(),
                "compute_capability": f"{properties['major']}.{properties['minor']}",
                "multiprocessors": properties["multiProcessorCount"],
                "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
            }
        )
    return found


def _routes(gpu: dict[str, Any]) -> list[str]:
    """The scoring kernel for each depth, with one key head and one scale per key."""
    device = Device(architecture(int(gpu["compute_capability"].replace(".", ""))), 1)
    return ["hopper" if runs_on_hopper(depth, 1, 1, device) else "portable" for depth in DEPTHS]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def run() -> None:
    """Print devices, versions, the cache folder and the kernel specialisations in it."""
    console = Console()
    table = _table("Devices", "GPU", "name", "compute capability", "multiprocessors", "GiB")
    devices = gpus()
    for ordinal, gpu in enumerate(devices):
        table.add_row(str(ordinal), *map(str, gpu.values()))
    if devices:
        console.print(table)
        table = _table("Scoring kernel, by depth", "GPU", *map(str, DEPTHS))
        for ordinal, gpu in enumerate(devices):
            table.add_row(str(ordinal), *_routes(gpu))
        console.print(table)
    else:
        console.print("No usable NVIDIA GPU (or no CuPy): the NumPy backend will be used.")
    table = _table("Versions", "package", "version")
    for package, version in versions().items():
        table.add_row(package, version)
    console.print(table)
    try:
        folder = str(cubins.cache_folder())
    except FileNotFoundError as error:
        folder = str(error)
    console.print(f"Kernel cache: {folder}", soft_wrap=True, markup=False)
    specialisations = cubins.listing()
    if specialisations:
        table = _table("Specialisations compiled", "template", "parameters", "architecture")
        for row in specialisations:
            table.add_row(*row)
        console.print(table)
    else:
        console.print("No specialisations compiled yet.")
