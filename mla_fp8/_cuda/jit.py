"""Compiles a kernel specialisation, or reads it from the cache of cubins, and loads it.

``cuda.core`` compiles to a cubin for the exact target. RawModule's own call of the compiler adds a
``-arch`` without the ``a`` that architecture-specific instructions need, which CUDA 12 refuses. The
name of a cubin's file holds the digest of everything that the cubin depends on: the source with its
headers, the options and the compiler's version. Without a usable disk, cubins stay in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from mla_fp8._check.arrays import INSTALL
from mla_fp8._cuda import cubins
from mla_fp8._cuda.params import layout_asserts
from mla_fp8._plan.kernel import OLDEST, Kernel, architecture

_PACKAGE = Path(__file__).resolve().parents[1]
_IMPORTING = threading.Lock()  # a second thread would find cuda-core half imported
_WARNED = threading.Event()  # set once the user knows that there is no usable disk
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)
_OPTIONS: dict[str, Any] = {"std": "c++17", "ptxas_options": ["-v"]}
_COMPILERS = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")


def kernel_folder() -> Path:
    """The folder of the templates: in the package if installed, beside it in a checkout."""
    inside = _PACKAGE / "kernels"
    return inside if inside.is_dir() else _PACKAGE.parent / "kernels"


@lru_cache(maxsize=64)
def _template_source(template: str) -> str:
    """A template with its headers inlined, each once, at its first include."""
    seen: set[str] = set()

    def inline(file: str) -> str:
        folder = kernel_folder() / "include" if file.endswith(".cuh") else kernel_folder()
        text = (folder / file).read_text(encoding="utf-8").replace("#pragma once\n", "\n")

        def include(match: re.Match[str]) -> str:
            if match[1] in seen:
                return "\n"
            seen.add(match[1])
            line = text[: match.start()].count("\n") + 2
            return f'#line 1 "{match[1]}"\n{inline(match[1])}#line {line} "{file}"\n'

        return _INCLUDE.sub(include, text)

    return f'#line 1 "{template}.cu"\n{inline(f"{template}.cu")}'


def source(kernel: Kernel) -> str:
    """One self-contained source: macros, the template with its headers, and layout asserts."""
    defines = "".join(f"#define {name} {value}\n" for name, value in kernel.macros)
    return defines + _template_source(kernel.template) + layout_asserts(kernel.template)


def _cuda_core() -> Any:
    try:
        with _IMPORTING:
            import cuda.core as core
    except ImportError as error:
        raise ImportError(f"compiling kernels needs cuda-core: {INSTALL}") from error
    return core


def architectures() -> list[str]:
    """The targets that the compiler here has and the kernels can be compiled for.

    Raises
    ------
    ImportError, RuntimeError
        If there is no compiler.
    """
    _cuda_core()
    from cuda.bindings import nvrtc

    _, capabilities = nvrtc.nvrtcGetSupportedArchs()
    return [architecture(capability) for capability in capabilities if capability >= OLDEST]


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
    core = _cuda_core()
    options = core.ProgramOptions(name=f"{kernel.template}.cu", arch=arch, **_OPTIONS)
    log = io.StringIO()
    cubin = core.Program(source(kernel), "c++", options).compile("cubin", logs=log)
    return bytes(cubin.code), log.getvalue()


@lru_cache(maxsize=1)
def _compiler_versions() -> str:
    """The NVRTC version, and the versions of the compiler's packages."""
    try:
        with _IMPORTING:
            from cuda.bindings import nvrtc
        found = [f"NVRTC {nvrtc.nvrtcVersion()[1:]}"]
    except (ImportError, RuntimeError):  # no package, or no library
        found = []
    for package in _COMPILERS:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return " ".join(found)


def cubin_path(kernel: Kernel, arch: str) -> Path:
    """Where the compiled kernel is kept; `FileNotFoundError` if there is no folder for it."""
    content = "\0".join((source(kernel), arch, repr(_OPTIONS), _compiler_versions()))
    macros = [f"{name}={value}" for name, value in kernel.macros]
    return cubins.cache_folder() / cubins.file_name(kernel.template, macros, arch, content)


def is_kept(kernel: Kernel, arch: str) -> bool:
    """Whether the compiled kernel is on disk, whole."""
    try:
        return cubins.read(cubin_path(kernel, arch)) is not None
    except ValueError:
        return False


def ensure_cubin(kernel: Kernel, arch: str) -> Path:
    """The path of the compiled kernel; compiles it first if the file is missing or damaged.

    Raises
    ------
    OSError
        If there is no folder for it, or none that can be written.
    """
    path = cubin_path(kernel, arch)
    if not is_kept(kernel, arch):
        cubins.write(path, compile_cubin(kernel, arch)[0])
    return path


def _warn_of_disk(error: OSError) -> None:
    if not _WARNED.is_set():
        _WARNED.set()
        warnings.warn(
            f"compiled kernels can't be kept on disk, so each process compiles its own ({error}); "
            "set MLA_FP8_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )


def compiled(kernel: Kernel, arch: str) -> bytes:
    """The compiled kernel from disk, or compiled now, and kept there if that can be done."""
    try:
        kept = cubins.read(cubin_path(kernel, arch))
    except OSError:  # no folder: the warning follows below
        kept = None
    except ValueError as error:
        warnings.warn(f"{error}: compiled anew", RuntimeWarning, stacklevel=2)
        kept = None
    if kept is not None:
        return kept
    cubin, _ = compile_cubin(kernel, arch)
    try:
        cubins.write(cubin_path(kernel, arch), cubin)
    except OSError as error:
        _warn_of_disk(error)
    return cubin


@contextmanager
def _private_file(cubin: bytes) -> Iterator[str]:
    """The path of a temporary private file with these bytes.

    CuPy remembers modules by path, so other bytes must have another path.
    """
    digest = hashlib.sha256(cubin).hexdigest()
    if file := _file_in_memory():
        with file:
            file.write(cubin)
            file.flush()
            # File descriptor numbers are reused; "/" and "/./" make the digest a part of the path.
            bits = f"{int(digest[:16], 16):064b}".replace("0", "/").replace("1", "/.")
            yield f"/proc/self/fd{bits}/{file.fileno()}"
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{digest}.cubin")
        path.write_bytes(cubin)
        yield str(path)


def _file_in_memory() -> IO[bytes] | None:
    """An open file that is in no folder, so that a full disk does no harm; on Linux."""
    if not (hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")):
        return None
    try:
        return open(os.memfd_create("mla_fp8"), "wb")
    except OSError:  # a sandbox forbids it
        return None


@lru_cache(maxsize=4096)
def load(kernel: Kernel, arch: str, ordinal: int) -> Any:
    """The kernel as a function of a `cupy.RawModule`, on the current device, ``ordinal``."""
    import cupy

    with _private_file(compiled(kernel, arch)) as path:  # exactly the bytes that were verified
        function = cupy.RawModule(path=path).get_function(kernel.template)  # loads at once
    if kernel.shared_bytes > 48 * 1024:  # granted per device
        function.max_dynamic_shared_size_bytes = kernel.shared_bytes
    return function
