"""Compiled kernels on disk: a folder of files that each end in a digest.

A file is used only if it holds what was written under its name: the digest covers the name and the
cubin. The digest guards against damage and mixed-up files; file modes guard against other users.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size
_NAME_BYTES = 140  # encrypted home folders allow names of 143 bytes
_NAME = re.compile(r"(\w+)((?:\.\w+=-?\d+)*)\.(sm_\d+[a-z]?)\.[0-9a-f]{16}\.cubin")
_PART = ".part"  # of a file that is being written
_PART_SECONDS = 3600  # a part this old belongs to a process that was killed


def cache_folder() -> Path:
    """The folder of compiled kernels: ``MLA_FP8_CACHE_DIR``, else in the user's cache folder.

    Raises
    ------
    FileNotFoundError
        If neither variable is set and there is no home folder.
    """
    if folder := os.environ.get("MLA_FP8_CACHE_DIR"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "mla_fp8"
    try:
        return Path.home() / ".cache" / "mla_fp8"
    except RuntimeError as error:
        raise FileNotFoundError(f"no cache folder: {error}") from None


def file_name(template: str, macros: list[str], arch: str, content: str) -> str:
    """The name of a compiled kernel: as many macros as there is room for, then a digest."""
    end = f".{arch}.{hashlib.sha256(content.encode()).hexdigest()[:16]}.cubin"
    name = template
    for macro in macros:
        if len(name) + len(macro) + 1 + len(end) > _NAME_BYTES:
            break
        name += f".{macro}"
    return name + end


def _digest(name: str, cubin: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + cubin).digest()


def read(path: Path) -> bytes | None:
    """The cubin in a file, or None where there is no file that can be read.

    Raises
    ------
    ValueError
        If the file does not hold what was written under its name.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    cubin, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if digest != _digest(path.name, cubin):
        raise ValueError(f"{path} does not hold what was written there ({len(content)} bytes)")
    return cubin


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, for the owner alone; an existing one stays as is."""
    for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def write(path: Path, cubin: bytes) -> None:
    """Keep a cubin: the whole file is there, or none.

    The file is written aside and moved in one step, so that no other process reads half a file.
    Everybody may read it, as far as the folder and the umask allow; only the owner may write it.
    """
    make_folder(path.parent)
    _remove_old_parts(path.parent)
    part = path.parent / (secrets.token_hex(8) + _PART)
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
            file.write(cubin + _digest(path.name, cubin))
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def try_out(folder: Path) -> None:
    """Raise `OSError` unless files can be written into a folder, which is made if need be."""
    make_folder(folder)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _remove_old_parts(folder: Path) -> None:
    for part in folder.glob(f"*{_PART}"):
        with suppress(OSError):  # another process is faster, or it is somebody else's
            if time.time() - part.stat().st_mtime > _PART_SECONDS:
                part.unlink()


def listing() -> list[tuple[str, str, str]]:
    """(template, macros, architecture) of every kernel in the folder, newest first."""
    found = []
    with suppress(OSError):
        for file in cache_folder().iterdir():
            match = _NAME.fullmatch(file.name)
            with suppress(OSError):  # gone since
                if match and file.is_file():
                    row = match[1], match[2][1:].replace(".", " "), match[3]
                    found.append((file.stat().st_mtime, row))
    return [row for _, row in sorted(found, reverse=True)]
