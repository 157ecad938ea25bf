"""What the compiler makes of a kernel: registers, spills and machine code; needs no GPU."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from mla_fp8._cuda import jit
from mla_fp8._plan.kernel import Kernel


@dataclass(frozen=True)
class Usage:
    """The resources that the assembler reports for a kernel."""

    registers: int
    stack: int  # bytes, like the others
    spilled: int  # stored and loaded
    shared: int  # static
    serialized: bool  # the assembler made the tensor-core products wait for one another


@cache
def _compile(kernel: Kernel, arch: str) -> tuple[bytes, str]:
    """The cubin and the log.

    pytest and the compile table share kernels: processes that find the same folder in
    ``MLA_FP8_COMPILED`` compile each once. A file's name holds the digest of all that its kernel
    depends on.
    """
    folder = os.environ.get("MLA_FP8_COMPILED")
    if folder is None:
        return jit.compile_cubin(kernel, arch)
    path = Path(folder, jit.cubin_path(kernel, arch).name)
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            pickle.dump(jit.compile_cubin(kernel, arch), file)
        os.replace(file.name, path)
    cubin, log = pickle.loads(path.read_bytes())
    return cubin, log


def usage(kernel: Kernel, arch: str) -> Usage:
    """Compile for ``arch`` and read the assembler's log."""
    _, log = _compile(kernel, arch)
    registers = re.search(r"Used (\d+) registers", log)
    frames = re.findall(  # one for each function
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if not registers or not frames:
        raise ValueError(f"no resource report for {kernel.template} on {arch}:\n{log}")
    shared = re.search(r"(\d+) bytes smem", log)
    stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    return Usage(
        int(registers[1]),
        stack,
        stores + loads,
        int(shared[1]) if shared else 0,
        "wgmma" in log,  # warning C7514 and its like; the log says nothing else of wgmma
    )


def faults(kernel: Kernel, found: Usage) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty if nothing is."""
    # Where warpgroups move registers (setmaxnreg), the log has the count after the move, and the
    # kernel itself asserts that the block has so many.
    moves_registers = kernel.template.endswith("_sm90")
    wrong = {
        f"spills {found.spilled} bytes": found.spilled > 0,
        f"has a stack frame of {found.stack} bytes": found.stack > 0,
        "has serialized tensor-core products": found.serialized,
        f"takes {found.registers} registers for each of {kernel.threads} threads": (
            not moves_registers and found.registers * kernel.threads > 1 << 16
        ),
    }
    return [words for words, is_wrong in wrong.items() if is_wrong]


def machine_code(kernel: Kernel, arch: str, folder: Path) -> str:
    """The kernel's SASS; skips the test where there is no disassembler."""
    files = []
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    packaged = [str(file.locate()) for file in files if file.stem == "nvdisasm"]
    disassembler = shutil.which("nvdisasm") or (packaged[0] if packaged else None)
    if disassembler is None:
        pytest.skip("no nvdisasm: machine code was NOT read")
    file = folder / "kernel.cubin"
    file.write_bytes(_compile(kernel, arch)[0])
    command = [disassembler, "-c", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
