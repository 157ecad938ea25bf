"""Templates and their parameters in, `cupy.RawModule` kernels out, by way of a cache of cubins.

Compiling to a cubin ourselves, by ``cuda.core``, names the exact target: RawModule's own call of
the compiler adds a ``-arch`` without the ``a`` that architecture-specific instructions need, which
CUDA 12 refuses. The file's name holds the digest of everything that went into it, headers included.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import threading
import warnings
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from mla_fp8._kernel import Kernel

_PACKAGE = Path(__file__).resolve().parent
_IMPORTING = threading.Lock()  # two threads that import cuda-core at once find it half done
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


def kernel_folder() -> Path:
    """The folder of the templates: inside the package when installed, beside it in a checkout."""
    inside = _PACKAGE / "kernels"
    return inside if inside.is_dir() else _PACKAGE.parent / "kernels"


def cache_folder() -> Path:
    """The folder of compiled kernels: ``MLA_FP8_CACHE_DIR``, else in the user's cache folder."""
    if folder := os.environ.get("MLA_FP8_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mla_fp8"


@lru_cache(maxsize=64)
def _template_source(template: str) -> str:
    """A template with its headers inlined, each once, at its first include."""
    seen: set[str] = set()

    def inline(file: str) -> str:
        text = (kernel_folder() / file).read_text(encoding="utf-8").replace("#pragma once\n", "\n")

        def include(match: re.Match[str]) -> str:
            if match[1] in seen:
                return "\n"
            seen.add(match[1])
            line = text[: match.start()].count("\n") + 2
            return f'#line 1 "{match[1]}"\n{inline(match[1])}#line {line} "{file}"\n'

        return _INCLUDE.sub(include, text)

    return f'#line 1 "{template}.cu"\n{inline(f"{template}.cu")}'


def source(kernel: Kernel) -> str:
    """One self-contained source: the parameters as macros, then the template and its headers."""
    defines = "".join(f"#define {name} {value}\n" for name, value in kernel.parameters)
    return defines + _template_source(kernel.template)


def compile_cubin(kernel: Kernel, arch: str) -> tuple[bytes, str]:
    """Compile for one architecture; needs no GPU.

    Returns
    -------
    cubin : bytes
    log : str
        What the assembler says of registers, shared memory and spills.

    Raises
    ------
    ImportError
        If ``cuda-core`` is missing.
    """
    try:
        with _IMPORTING:
            from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise ImportError(
            "compiling kernels needs cuda-core: pip install 'mla_fp8[cuda13]' (or [cuda12])"
        ) from error
    options = ProgramOptions(
        name=f"{kernel.template}.cu", arch=arch, std="c++17", ptxas_options=["-v"]
    )
    log = io.StringIO()
    with warnings.catch_warnings():  # of cuda-core, on drivers older than the compiler
        warnings.simplefilter("ignore")
        cubin = Program(source(kernel), "c++", options).compile("cubin", logs=log)
    return bytes(cubin.code), log.getvalue()


def _compiler_version() -> str:
    try:
        return metadata.version("cuda-bindings")
    except metadata.PackageNotFoundError:
        return "none"


def cubin_path(kernel: Kernel, arch: str) -> Path:
    """Where the compiled kernel is kept."""
    content = "\0".join((source(kernel), arch, _compiler_version()))
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    parameters = [f"{name}={value}" for name, value in kernel.parameters]
    return cache_folder() / ".".join([kernel.template, *parameters, arch, digest, "cubin"])


def ensure_cubin(kernel: Kernel, arch: str) -> Path:
    """The path of the compiled kernel, compiled now if it is not there."""
    path = cubin_path(kernel, arch)
    if not path.exists():
        cubin, _ = compile_cubin(kernel, arch)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved in one step: another process never reads half a file.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    return path


@lru_cache(maxsize=4096)
def load(kernel: Kernel, arch: str, ordinal: int) -> Any:
    """The kernel as a function of a `cupy.RawModule`, on the current device, ``ordinal``."""
    import cupy

    module = cupy.RawModule(path=str(ensure_cubin(kernel, arch)))
    function = module.get_function(kernel.template)
    if kernel.shared_bytes > 48 * 1024:  # granted per device
        function.max_dynamic_shared_size_bytes = kernel.shared_bytes
    return function
