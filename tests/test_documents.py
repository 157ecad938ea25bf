"""What documents and docstrings show runs: fenced Python blocks, and doctest examples."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

import mla_fp8
from mla_fp8 import fp8

ROOT = Path(__file__).parents[1]
FOUND = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
PAGES = ["README.md", *(page for page in FOUND if "_build" not in page)]
BLOCK = re.compile(
    r"^(?:<!-- needs: ([\w ]+) -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
USES = {"cupy": re.compile(r"\b(cupy|cp)\b|\"cuda\""), "torch": re.compile(r"\btorch\b")}
SHOWN = re.compile(r"# -> (.*)$", re.MULTILINE)  # a line that a block prints
NUMBERS = ("decode", "dequantize", "encode", "hadamard", "quantize", "rope")
RECORDS = ("CacheView", "Mask")  # names of values, shown in others' examples
PUBLIC = {
    **{n: getattr(mla_fp8, n) for n in mla_fp8.__all__ if n not in ("fp8", *RECORDS)},
    **{f"fp8.{name}": getattr(fp8, name) for name in NUMBERS},
    "PagedKeyCache, inherited": mla_fp8.PagedKeyCache.__base__,
}


def blocks(page: str) -> list[tuple[str, int, set[str]]]:
    """The code of a page's blocks in order, the line before each, and the libraries it needs."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        (m[2], text[: m.start(2)].count("\n"), set((m[1] or "").split()))
        for m in BLOCK.finditer(text)
    ]


def run(page: str, have: set[str]) -> None:
    """Run the blocks that these libraries suffice for; what they print is what they show."""
    names: dict = {}
    for code, line, needs in blocks(page):
        if needs <= have:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * line + code, page, "exec"), names)
            printed = {" ".join(words.split()) for words in out.getvalue().splitlines()}
            for shown in SHOWN.findall(code):
                assert " ".join(shown.split()) in printed, f"{page}: {shown}; printed {printed}"


def needing(*libraries: str) -> list[str]:
    """The pages with a block that needs these libraries and no other."""
    return [p for p in PAGES if any(needs == {*libraries} for _, _, needs in blocks(p))]


ON_THE_HOST, WITH_TORCH = needing(), needing("torch")
ON_A_GPU = sorted({*needing("cupy"), *needing("cupy", "torch")})


def test_pages_have_blocks_of_each_kind():
    assert {"README.md", "docs/tutorial.md", "docs/howto/engines.md"} <= {*ON_THE_HOST}
    assert {"docs/howto/torch.md", "docs/howto/engines.md"} <= {*WITH_TORCH}
    assert {"README.md", "docs/howto/graphs.md", "docs/howto/torch.md"} <= {*ON_A_GPU}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_need(page):
    assert len(blocks(page)) == (ROOT / page).read_text(encoding="utf-8").count("```python")
    for code, line, needs in blocks(page):
        used = {library for library, pattern in USES.items() if pattern.search(code)}
        assert used <= needs <= {"cupy", "torch"}, f"line {line + 1}"


@pytest.mark.parametrize("page", ON_THE_HOST)
def test_blocks_run_on_the_host(page):
    run(page, set())


@pytest.mark.parametrize("page", WITH_TORCH)
def test_blocks_run_with_torch_on_the_host(page):
    pytest.importorskip("torch", reason="torch is not installed: its examples NOT tested")
    run(page, {"torch"})


@pytest.mark.gpu
@pytest.mark.parametrize("page", ON_A_GPU)
def test_blocks_run_on_a_gpu(page, cupy):
    if any("torch" in needs for _, _, needs in blocks(page)):
        pytest.importorskip("torch", reason="torch is not installed: its examples NOT tested")
    run(page, {"cupy", "torch"})
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
