"""The scripts in examples/ run and print what they promise, on the CPU and on a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {  # needed package, what is printed on the CPU, and on a GPU (None: no GPU is used)
    "quickstart": ("numpy", r"token 3 by hand: key \d+ \(\d+\.\d+\)", r"by cupy:"),
    "decode_loop": (
        "numpy",
        r"│ 12 +│ 1356 +│ 8 of 8, 8 of 8, 8 of 8 │",
        r"│ 12 +│ 1356 +│ 8 of 8",
    ),
    "sharded": ("numpy", r"3 ranks give what one gives", None),
    "two_gpus": ("numpy", r"1 process on numpy: .* what one gives", r"1 process on cupy"),
    "from_torch": ("torch", r"torch\.topk agree on cpu", r"torch\.topk agree on cuda"),
    "sparse_attention_torch": ("torch", r"on cpu(.*\n){3}k =  16", r"on cuda(.*\n){3}k =  16"),
    "from_jax": ("jax", r"jitted JAX agrees on cpu", r"jitted JAX agrees on"),
    "from_numba": ("numpy", r"needs a GPU", r"NumPy agrees"),
    "from_cupy": ("numpy", r"needs a GPU", r"the graph gave what a plain call gives"),
}


def run(script: str, tmp_path, **environment: str) -> str:
    """What a script prints."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUTF8": "1"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{script}.py")],
        env=os.environ | {"COLUMNS": "200"} | environment,
        cwd=tmp_path,  # what they need is installed, not lying about
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: its examples NOT run")


def need_a_working_numba() -> None:
    """Some releases of numba-cuda cannot compile kernels with NumPy 2.5, which has no row_stack."""
    program = "from numba import cuda; cuda.jit('void(int32)')(lambda x: None)"
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=100)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1]
        pytest.skip(f"Numba cannot compile kernels here ({reason}): its example NOT run")


def test_every_script_is_here():
    assert {path.stem for path in ROOT.glob("examples/*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_without_a_gpu(script, tmp_path):
    package, expected, _ = SCRIPTS[script]
    need(package)
    # Where there is a GPU, it is hidden.
    printed = run(script, tmp_path, CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    assert re.search(expected, printed), printed


@pytest.mark.gpu
@pytest.mark.parametrize("script", [name for name, (*_, on_gpu) in SCRIPTS.items() if on_gpu])
def test_scripts_run_on_a_gpu(script, tmp_path, cupy, request):
    package, _, expected = SCRIPTS[script]
    need("numba" if script == "from_numba" else package)
    if script == "two_gpus":
        request.getfixturevalue("nccl")
    if script == "from_numba":
        need_a_working_numba()
    printed = run(script, tmp_path)
    if script == "from_numba" and "needs a GPU" in printed:
        pytest.skip(printed)
    assert re.search(expected, printed), printed
