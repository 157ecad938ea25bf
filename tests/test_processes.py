"""Processes that compile at once, that are killed while they do, and that are forked after use."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disk_faults import ARCH, SORT

from mla_fp8._cuda import cubins, jit

ROOT = Path(__file__).parents[1]
NO_COMPILER = "cuda-core is not installed: kernels were NOT compiled"
# Compiles one kernel once it is told to, and prints the digest of what it got.
COMPILE = """
import hashlib, os, signal, sys
from disk_faults import ARCH, SORT
from mla_fp8._cuda import cubins, jit
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
{change}
jit._cuda_core(), jit._compiler_versions()
print("ready", flush=True)
sys.stdin.readline()
print(hashlib.sha256(jit.compiled(SORT, ARCH)).hexdigest(), flush=True)
"""
HALF = """
class Half:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, content):
        self.file.write(content[:len(content) // 2])
        self.file.flush()
        die()
cubins.open = lambda *a, **o: Half(open(*a, **o))
"""
DEATHS = {  # where a process dies, and whether it leaves a part of a file
    "before it writes": ("cubins.write = die", False),
    "while it writes": (HALF, True),
    "before the file has its name": ("cubins.os.replace = die", True),
}


def _python(code: str, **options) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes, **options)


def _start(count: int, change: str = "") -> list[subprocess.Popen]:
    """Processes that are about to compile, all at the same time."""
    found = [_python(COMPILE.format(change=change)) for _ in range(count)]
    for process in found:
        assert process.stdout.readline() == "ready\n"
    for process in found:
        process.stdin.write("\n")
        process.stdin.flush()
    return found


def _whole(folder: Path) -> list[Path]:
    """The files with the name of a kernel, each of which holds what was written there."""
    found = list(folder.glob("*.cubin"))
    assert all(cubins.read(file) for file in found)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason=NO_COMPILER)
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_processes_compile_the_same_kernel_at_once(folder):
    """Each gets the whole kernel, and one file is left."""
    processes = _start(3)
    digests = {process.communicate(timeout=120)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    (file,) = folder.iterdir()
    assert digests == {hashlib.sha256(cubins.read(file)).hexdigest() + "\n"}
    assert file == jit.cubin_path(SORT, ARCH)


@pytest.mark.parametrize("death", DEATHS)
def test_a_process_is_killed(death, folder):
    """By kill -9. Nobody takes what it left for a kernel."""
    change, leaves_part = DEATHS[death]
    (process,) = _start(1, change)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert [file.suffix for file in folder.iterdir()] == [".part"] * leaves_part
    assert not jit.is_kept(SORT, ARCH)
    cubin = jit.compiled(SORT, ARCH)
    assert cubin == jit.compile_cubin(SORT, ARCH)[0]
    assert _whole(folder) == [jit.cubin_path(SORT, ARCH)]


def test_processes_are_killed_at_any_time(folder):
    """Some while NVRTC compiles, perhaps one while it writes; others finish at the same time."""
    processes = _start(4)
    for process in processes[:3]:
        time.sleep(0.08)
        process.kill()
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[3].returncode == 0
    (file,) = _whole(folder)
    assert printed[3].strip() == hashlib.sha256(cubins.read(file)).hexdigest()


# The child calls the same operator and says by its status what came of it; 0: all is well.
FORK = """
import os, signal, warnings
from generators import Spec
from properties import host, same_bits
from mla_fp8 import MLAIndexerRaggedFloat8Paged
warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads of BLAS
case = Spec((70, 3), (400, 5), num_heads=16).build()
op = MLAIndexerRaggedFloat8Paged(**case.params)
want = op(*case.args)
{before}
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends a child that hangs
    status = 1
    try:
        status = 0 if same_bits(op(*case.args), want) else 2
        {inside}
    finally:
        os._exit(status)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert same_bits(op(*case.args), want)
{after}
"""
ON_GPU = {
    "before": "import cupy; here = case.to(cupy); found = host(op(*here.args))",
    "inside": """status += 4
        try:
            op(*here.args)
        except RuntimeError:
            status -= 4""",
    "after": "assert same_bits(op(*here.args), found)",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_fork_after_use(gpu, request):
    """In NumPy the child works. CUDA is of no use in it: an error there, no harm to the parent."""
    if gpu:
        request.getfixturevalue("cupy")
    code = FORK.format(**(ON_GPU if gpu else dict.fromkeys(ON_GPU, "pass")))
    process = _python(code)
    process.communicate(timeout=120)
    assert process.returncode == 0
