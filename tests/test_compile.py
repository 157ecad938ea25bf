"""A kernel of each template on each target; `compile_table.py` compiles all specialisations."""

import re
import subprocess
import sys

import numpy as np
import pytest
from compile_table import archs, kernels
from compiled import faults, machine_code, usage

from mla_fp8._cuda import jit, params
from mla_fp8._plan.kernel import Kernel

pytest.importorskip("cuda.core", reason="cuda-core is not installed: kernels were NOT compiled")

TABLE = kernels()
TEMPLATES = sorted({kernel.template for kernel in TABLE})
REPRESENTATIVES = {  # the first kernel of each template for each target
    (kernel.template, arch): kernel for kernel in reversed(TABLE) for arch in archs(kernel)
}
HOPPER = {  # by the columns of all tokens that share a product
    (macros["kTokens"] * macros["kHeadColumns"], macros["kDepth"]): kernel
    for kernel, macros in ((kernel, dict(kernel.macros)) for kernel in TABLE)
    if kernel.template == "index_scores_sm90"
}


def of_template(template: str) -> Kernel:
    return next(kernel for kernel in TABLE if kernel.template == template)


def refused(kernel: Kernel) -> str:
    """The compiler's words on a kernel that it refuses."""
    with pytest.raises(Exception, match="error") as caught:
        jit.compile_cubin(kernel, "sm_90a")
    return str(caught.value)


def test_the_table_has_every_template():
    assert [file.stem for file in sorted(jit.kernel_folder().glob("*.cu"))] == TEMPLATES
    assert sorted(params.PARAMS) == TEMPLATES


@pytest.mark.parametrize(("template", "arch"), sorted(REPRESENTATIVES))
def test_compiles_without_faults(template, arch):
    kernel = REPRESENTATIVES[template, arch]
    assert faults(kernel, usage(kernel, arch)) == []


@pytest.mark.parametrize(("columns", "depth"), sorted(HOPPER))
def test_hopper_kernels_use_fp8_tensor_cores_and_no_local_memory(columns, depth, tmp_path):
    kernel = HOPPER[columns, depth]
    assert faults(kernel, usage(kernel, "sm_90a")) == []
    code = machine_code(kernel, "sm_90a", tmp_path)
    assert f"QGMMA.64x{min(columns, 128)}x32.F32.E4M3.E4M3" in code
    assert not re.search(r"\b(LDL|STL)\b", code)


@pytest.mark.parametrize("template", TEMPLATES)
def test_plans_give_the_macros_that_a_template_needs_and_no_others(template):
    """Without its macros, the compiler lists the names that a template does not know."""
    kernel = of_template(template)
    missing = set(re.findall(r'identifier "(\w+)" is undefined', refused(Kernel(template, (), 0))))
    assert missing == {name for name, _ in kernel.macros}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_struct_that_differs_from_the_hosts_does_not_compile(template, monkeypatch):
    """Two fields of one type change places on the host, in each struct: same size, other bytes."""
    dtype, structs = params.PARAMS[template]
    exchanged = {name: _exchange(struct) for name, struct in {**structs, "Params": dtype}.items()}
    wrong = {name: struct for name, (struct, _) in exchanged.items()}
    found = params.Params(wrong.pop("Params"), wrong)
    monkeypatch.setitem(params.PARAMS, template, found)
    params.layout_asserts.cache_clear()
    try:
        words = refused(of_template(template))
    finally:
        params.layout_asserts.cache_clear()
    for struct, (_, fields) in exchanged.items():
        for field in fields:
            assert re.search(rf"OFFSET_OF\({struct}, {field}\)", words), (struct, field)


def _exchange(dtype):
    """The struct with two of its fields exchanged, and the names of these."""
    fields = list(dtype.fields)
    first, second = next(
        (a, b)
        for i, a in enumerate(fields)
        for b in fields[i + 1 :]
        if dtype.fields[a][0] == dtype.fields[b][0]
    )
    other = {first: second, second: first}
    names = [other.get(name, name) for name in fields]
    kinds = [(name, dtype.fields[name][0]) for name in names]
    return np.dtype(kinds, align=True), (first, second)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_field_that_only_the_host_has_does_not_compile(template, monkeypatch):
    dtype, structs = params.PARAMS[template]
    fields = [(name, dtype.fields[name][0]) for name in dtype.names]
    longer = np.dtype([*fields, ("only_here", np.int32)], align=True)
    monkeypatch.setitem(params.PARAMS, template, params.Params(longer, structs))
    params.layout_asserts.cache_clear()
    try:
        assert "only_here" in refused(of_template(template))
    finally:
        params.layout_asserts.cache_clear()


@pytest.mark.parametrize(
    ("template", "name", "value"),
    [
        ("fill_invalid", "kThreads", 100),
        ("index_scores", "kDepth", 96),
        ("index_scores", "kHeadChunk", 12),
        ("index_scores", "kHeads", 129),
        ("index_scores", "kKvHeads", 3),
        ("index_scores_sm90", "kBoxRows", 3),
        ("index_scores_sm90", "kDepth", 256),
        ("index_scores_sm90", "kHeads", 200),
        ("index_scores_sm90", "kSharedBytes", 1024),
        ("index_scores_sm90", "kTokens", 64),
        ("schedule", "kThreads", 100),
        ("sort_topk", "kTopK", 65537),
        ("topk_filter", "kThreads", 96),
        ("topk_filter", "kTopK", 4097),
        ("topk_histogram", "kThreads", 100),
        ("topk_histogram", "kTopK", 0),
    ],
)
def test_unsupported_macros_do_not_compile(template, name, value):
    kernel = of_template(template)
    assert name in dict(kernel.macros)
    wrong = tuple((n, value if n == name else v) for n, v in kernel.macros)
    assert "static assertion failed" in refused(Kernel(template, wrong, kernel.threads))


def test_cubins_are_kept_and_named_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path))
    kernel = of_template("sort_topk")
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
    jit.ensure_cubin(of_template("sort_topk"), "sm_120a")
    command = [sys.executable, "-m", "mla_fp8", "info"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "sort_topk" in printed
    assert "kTopK=" in printed
    assert "sm_120a" in printed
