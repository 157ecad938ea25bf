"""The notebooks in examples/ as they are saved; `test_site` runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICTURES = {  # of each notebook
    "by_hand": 4,
    "needle": 3,
    "pages": 2,
    "fp8": 4,
    "attention": 3,
    "gpu_time": 5,
}


def load(name: str) -> dict:
    text = (ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8")
    return dict(json.loads(text))


def test_every_notebook_is_here_and_in_the_docs():
    assert {path.stem for path in ROOT.glob("examples/*.ipynb")} == set(PICTURES)
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert [name for name in PICTURES if f"(../examples/{name}.ipynb)" not in page] == []


@pytest.mark.parametrize("name", PICTURES)
def test_saved_without_outputs(name):
    for cell in load(name)["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], cell["id"]
            assert cell["execution_count"] is None, cell["id"]


@pytest.mark.parametrize("name", PICTURES)
def test_links_lead_to_files(name):
    text = "".join("".join(cell["source"]) for cell in load(name)["cells"])
    for part in text.split("](")[1:]:
        target = part.split(")")[0].split("#")[0]
        if not target.startswith("http"):
            assert (ROOT / "examples" / target).exists(), target
