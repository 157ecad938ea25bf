"""The two backends as one fixture, processes, and a summary of what could not run."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from types import SimpleNamespace

import gpu_report
import numpy as np
import pytest

NO_GPU = "needs a GPU"


@functools.cache
def _why_no_gpu() -> str | None:
    try:
        import cupy
    except ImportError as error:
        return f"{NO_GPU}: CuPy cannot be imported ({error})"
    return None if cupy.is_available() else f"{NO_GPU}: cupy.is_available() is False"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config) -> None:
    """Use all cores, unless there is a GPU: tests measure its memory, and share it only on demand.

    ``-n 0`` turns it off. Processes that share the cores have one BLAS thread each, unless the
    environment says otherwise: with more, half of the time goes into waiting for one another.
    """
    option, main_process = config.option, not hasattr(config, "workerinput")
    if main_process and getattr(option, "numprocesses", 0) is None and not option.usepdb:
        option.numprocesses = "auto" if _why_no_gpu() else 0
        if option.numprocesses:
            for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
                os.environ.setdefault(name, "1")


@pytest.fixture(scope="session")
def cupy():
    """The cupy module; use it in tests marked `gpu`."""
    if reason := _why_no_gpu():
        pytest.skip(reason)
    import cupy

    return cupy


@pytest.fixture
def nccl(cupy):
    """CuPy's module of NCCL, where the library is installed."""
    found = pytest.importorskip("cupy.cuda.nccl")
    if not found.available:
        pytest.skip("NCCL is not installed (nvidia-nccl-cu13): ranks on GPUs NOT tested")
    return found


@pytest.fixture
def torch_on_gpu(cupy):
    """The torch module, where it has CUDA."""
    torch = pytest.importorskip("torch", reason="torch is not installed: its streams NOT tested")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    yield torch
    torch.cuda.synchronize()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, torch):
    """Where tensors are; ``torch`` is the fixture of the test's module."""
    if request.param == "cuda":
        request.getfixturevalue("cupy")
        if not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
    return request.param


@pytest.fixture
def hopper_gpu(cupy):
    """The cupy module, on a GPU with the Hopper route."""
    from mla_fp8._cuda import backend

    device = backend.device_facts(cupy.cuda.Device().id)
    if device.arch != "sm_90a":
        pytest.skip(f"needs a Hopper GPU; this one is {device.arch}")
    return cupy


@pytest.fixture
def old_gpu(monkeypatch):
    """A machine whose GPU is too old, as far as the CUDA backend tells."""

    def device_facts(ordinal):
        raise RuntimeError("mla_fp8 needs compute capability 8.0 or newer; GPU 0 has 7.5")

    backend = SimpleNamespace(device_facts=device_facts)
    monkeypatch.setitem(sys.modules, "mla_fp8._cuda.backend", backend)
    monkeypatch.setattr("mla_fp8._cuda.backend", backend, raising=False)


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """The array module of the backend under test."""
    return np if request.param == "numpy" else request.getfixturevalue("cupy")


@pytest.fixture(autouse=True)
def _no_check_from_outside(monkeypatch):
    """`check=None` means its default, whatever the developer's shell exports."""
    monkeypatch.delenv("MLA_FP8_CHECK", raising=False)


@pytest.fixture(autouse=True)
def _exact_allocations(request):
    """For compute-sanitizer each array is an allocation: a pool would hide overruns."""
    if request.node.get_closest_marker("sanitize") is None or _why_no_gpu():
        yield
        return
    import cupy

    with cupy.cuda.using_allocator(None):
        yield


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in skipped
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in sorted(reasons.items(), key=lambda found: NO_GPU in found[0]):
        if NO_GPU in reason:
            line = f"{count} GPU tests were skipped because there is no GPU here: {reason}"
            terminalreporter.write_line(line, yellow=True, bold=True)
        else:
            terminalreporter.write_line(f"{count} skipped: {reason}")
    for finding in gpu_report.findings_for_tree():
        terminalreporter.write_line(f"warning: {finding}", yellow=True)
