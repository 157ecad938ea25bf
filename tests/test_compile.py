"""The templates compile for every target, spill nothing, and take just the plan's parameters."""

import contextlib
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
from compile_table import archs, kernels, usage

from mla_fp8._cuda import jit
from mla_fp8._plan.kernel import Kernel

pytest.importorskip("cuda.core", reason="cuda-core is not installed: kernels were NOT compiled")

TEMPLATES = sorted(file.stem for file in jit.kernel_folder().glob("*.cu"))


def test_every_template_is_tried():
    assert {kernel.template for kernel in kernels()} == set(TEMPLATES)


@pytest.mark.parametrize(
    ("template", "arch"),
    sorted({(kernel.template, arch) for kernel in kernels() for arch in archs(kernel)}),
)
def test_compiles_without_spilling(template, arch):
    for kernel in kernels():
        if kernel.template == template and arch in archs(kernel):
            found = usage(kernel, arch)
            assert (found.spilled, found.stack) == (0, 0), kernel
            assert found.registers <= 255


@pytest.mark.parametrize("template", TEMPLATES)
def test_plan_and_template_name_the_same_parameters(template):
    """Each parameter has a static_assert on the values it may take, and nothing else is one."""
    text = (jit.kernel_folder() / f"{template}.cu").read_text()
    whole = jit._template_source(template)  # headers too
    declared = re.findall(r"constexpr (?:int|bool) (k[^;]*);", whole)
    constants = set(re.findall(r"\b(k[A-Z]\w*) =(?!=)", " ".join(declared)))
    conditions = " ".join(re.findall(r"static_assert\((.*?),\s", text))
    asserted = set(re.findall(r"\bk[A-Z]\w*", conditions))
    for kernel in kernels():
        if kernel.template == template:
            assert {name for name, _ in kernel.parameters} == asserted - constants


def _disassembler() -> str:
    """nvdisasm of the toolkit, or of the package nvidia-cuda-nvdisasm."""
    files = []
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    found = [str(file.locate()) for file in files if file.stem == "nvdisasm"]
    path = shutil.which("nvdisasm") or (found[0] if found else None)
    return path or pytest.skip("no nvdisasm: machine code was NOT read")


def test_hopper_kernels_use_its_tensor_cores_and_no_local_memory(tmp_path):
    """ptxas says so too where it serialises the products: C7514 and its like."""
    disassembler, file = _disassembler(), tmp_path / "kernel.cubin"
    for kernel in (k for k in kernels() if k.template == "index_scores_sm90"):
        cubin, log = jit.compile_cubin(kernel, "sm_90a")
        assert "wgmma" not in log, (kernel, log)
        file.write_bytes(cubin)
        command = [disassembler, "-c", str(file)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        parameters = dict(kernel.parameters)
        columns = parameters["kTokens"] * parameters["kHeads"]
        assert f"QGMMA.64x{min(columns, 128)}x32.F32.E4M3.E4M3" in code, kernel
        assert not re.search(r"\b(LDL|STL)\b", code), kernel


@pytest.mark.parametrize(
    ("template", "name", "value"),
    [
        ("index_scores", "kDepth", 96),
        ("index_scores", "kHeads", 129),
        ("index_scores", "kKvHeads", 3),
        ("index_scores", "kHeadChunk", 12),
        ("select_topk", "kTopK", 0),
        ("topk_filter", "kTopK", 4097),
        ("topk_filter", "kThreads", 96),
        ("select_topk", "kThreads", 100),
        ("sort_topk", "kTopK", 65537),
        ("schedule", "kCausal", 2),
        ("index_scores_sm90", "kHeads", 24),
        ("index_scores_sm90", "kDepth", 256),
        ("index_scores_sm90", "kTokens", 64),
        ("index_scores_sm90", "kBoxRows", 3),
        ("fill_invalid", "kThreads", 100),
    ],
)
def test_unsupported_parameters_do_not_compile(template, name, value):
    kernel = next(k for k in kernels() if k.template == template)
    assert name in dict(kernel.parameters)
    wrong = tuple((n, value if n == name else v) for n, v in kernel.parameters)
    with pytest.raises(Exception, match="static assertion failed"):
        jit.compile_cubin(Kernel(template, wrong, kernel.threads), "sm_90a")


def test_cubins_are_kept_and_named_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path))
    kernel = next(k for k in kernels() if k.template == "sort_topk")
    path = jit.ensure_cubin(kernel, "sm_90a")
    assert path.parent == tmp_path
    assert path.read_bytes()[:4] == b"\x7fELF"
    written = path.stat().st_mtime_ns
    assert jit.ensure_cubin(kernel, "sm_90a") == path
    assert path.stat().st_mtime_ns == written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    monkeypatch.setattr(jit, "_template_source", lambda template: "// another header\n")
    assert jit.cubin_path(kernel, "sm_90a") != path


def test_info_lists_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path))
    kernel = next(k for k in kernels() if k.template == "sort_topk")
    jit.ensure_cubin(kernel, "sm_120a")
    command = [sys.executable, "-m", "mla_fp8", "info"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "sort_topk" in printed
    assert "kTopK=" in printed
    assert "sm_120a" in printed
