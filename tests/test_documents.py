"""What documents and docstrings show runs: fenced Python blocks, and doctest examples."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import mla_fp8
from mla_fp8 import fp8

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ON_A_GPU = re.compile(r"\b(cupy|cp|torch)\b")  # what blocks that need a GPU name
NUMBERS = ("decode", "dequantize", "encode", "hadamard", "quantize", "rope")
RECORDS = ("CacheView", "Mask")  # names of values, shown in others' examples
PUBLIC = {
    **{n: getattr(mla_fp8, n) for n in mla_fp8.__all__ if n not in ("fp8", *RECORDS)},
    **{f"fp8.{name}": getattr(fp8, name) for name in NUMBERS},
    "PagedKeyCache, inherited": mla_fp8.PagedKeyCache.__base__,
}


def blocks(page: str, *, gpu: bool) -> list:
    """The code of a page's blocks in order, without those for a GPU unless there is one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        if gpu or not ON_A_GPU.search(match[1]):
            line = text[: match.start(1)].count("\n")
            found.append(compile("\n" * line + match[1], page, "exec"))
    return found


def run(page: str, *, gpu: bool) -> None:
    names: dict = {}
    for block in blocks(page, gpu=gpu):
        exec(block, names)


def pages(*, gpu: bool) -> list[str]:
    """The pages with blocks for the host, or those with blocks for a GPU."""
    return [p for p in PAGES if len(blocks(p, gpu=gpu)) > (len(blocks(p, gpu=False)) if gpu else 0)]


def test_the_main_pages_have_blocks_of_both_kinds():
    assert {"README.md", "docs/usage.md"} <= {*pages(gpu=False)} & {*pages(gpu=True)}


@pytest.mark.parametrize("page", pages(gpu=False))
def test_blocks_run_on_the_host(page):
    run(page, gpu=False)


@pytest.mark.gpu
@pytest.mark.parametrize("page", pages(gpu=True))
def test_blocks_run_on_a_gpu(page, cupy):
    if any("torch" in block.co_names for block in blocks(page, gpu=True)):
        pytest.importorskip("torch")
    run(page, gpu=True)
    cupy.cuda.Device().synchronize()


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    for example in finder.find(PUBLIC[name], name, module=False, globs={}):
        runner.run(example)
    assert runner.failures == 0
    assert runner.tries > 0, "no example"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!\w+:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for module, name in re.findall(r"`(test_\w+)\.py::(test_\w+)`", text):
        assert callable(getattr(importlib.import_module(module), name, None)), f"{module}: {name}"


def test_each_row_about_trust_names_its_tests():
    """In the form that the test above looks for."""
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!what)(.*) \|$", text, re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        tests = row.split(" | ")[-1].split(", ")
        assert all(re.fullmatch(r"`test_\w+\.py::test_\w+`", name) for name in tests), row


def test_figures_on_the_pages_are_those_of_the_data():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    data = figures.load("bench.json"), figures.load("peers.json")
    for page in figures.PAGES.values():
        text = page.read_text(encoding="utf-8")
        assert figures.fill(text, *data) == text, "run python docs/figures.py"
        assert "<!-- figures.py: end -->" in text
