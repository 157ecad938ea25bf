"""What documents and docstrings show runs: fenced Python blocks, and doctest examples."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import numpy as np
import pytest
from generators import ARGUMENTS, Spec

import mla_fp8
from mla_fp8 import MLAIndexerRaggedFloat8Paged, fp8

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBERS = ("decode", "dequantize", "encode", "quantize")
PUBLIC = {
    **{name: getattr(mla_fp8, name) for name in mla_fp8.__all__ if name != "fp8"},
    **{f"fp8.{name}": getattr(fp8, name) for name in NUMBERS},
}


def blocks(page: str) -> dict[str, list]:
    """The code of each library's blocks on a page, in order; lines are numbered as on the page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = {"numpy": [], "cupy": [], "torch": []}
    for match in BLOCK.finditer(text):
        library = "torch" if re.search(r"\btorch\.", match[1]) else "numpy"
        library = "cupy" if re.search(r"\bcupy\b", match[1]) else library
        line = text[: match.start(1)].count("\n")
        found[library].append(compile("\n" * line + match[1], page, "exec"))
    return found


def with_blocks(library: str) -> list[str]:
    return [page for page in PAGES if blocks(page)[library]]


def test_the_main_pages_have_blocks():
    assert {"README.md", "docs/usage.md"} <= set(with_blocks("numpy"))
    assert "README.md" in with_blocks("cupy")
    assert "docs/usage.md" in with_blocks("torch")


@pytest.mark.parametrize("page", with_blocks("numpy"))
def test_blocks_run_on_the_host(page):
    names = {}
    for block in blocks(page)["numpy"]:
        exec(block, names)


def background(xp_of, new: int = 3) -> dict:
    """The names that the GPU blocks of a page take for granted, as arrays of ``xp_of``."""
    case = Spec((new,), (1000,), num_heads=64, k=16, fp8_dtype="uint8", index_dtype="int32").build()
    arrays = {name: xp_of(getattr(case, name)) for name in ARGUMENTS[:-1]}
    arrays["k_max_lengths"] = case.k_max_lengths
    short = ("offsets", "k_blocks", "lengths", "table", "bounds", "k_scales")
    names = dict(zip(("q", "qs", *short), arrays.values(), strict=True))
    return names | {
        "np": np,
        "op": MLAIndexerRaggedFloat8Paged(**case.params),
        "inputs": (*arrays.values(), case.layer_idx),
        "layer": case.layer_idx,
        "total_seq_len": new,
        "next_q": xp_of(case.q[::-1].copy()),
        "values": xp_of(np.arange(1003, dtype=np.float32)),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("page", with_blocks("cupy"))
def test_cupy_blocks_run(page, cupy):
    names = background(cupy.asarray) | {"cupy": cupy}
    for block in blocks(page)["cupy"]:
        exec(block, names)
    cupy.cuda.Device().synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("page", with_blocks("torch"))
def test_torch_blocks_run(page, cupy):
    torch = pytest.importorskip("torch")
    names = background(lambda array: torch.from_numpy(array).to("cuda")) | {"torch": torch}
    q, qs = names["q"], names["qs"]
    names |= {"side": torch.cuda.Stream(), "hidden": q, "project": lambda hidden: (hidden, qs)}
    for block in blocks(page)["torch"]:
        exec(block, names)
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings(name):
    found = doctest.DocTestFinder(exclude_empty=True).find(
        PUBLIC[name], name, module=False, globs={}
    )
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    for example in found:
        runner.run(example)
    assert runner.failures == 0
