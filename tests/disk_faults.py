"""What can be wrong with a kernel's file, and with the disk it should be on."""

import errno
import os
import shutil
from pathlib import Path

from compile_table import kernels

from mla_fp8._cuda import cubins, jit

ARCH = "sm_90a"
SORT, OTHER = [k for k in kernels() if k.template == "sort_topk"][:2]


def damage_empty(path):
    path.write_bytes(b"")


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_foreign(path):
    path.write_bytes(b"<html>no such page</html>" * 100)


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def damage_swapped(path):
    shutil.copy(jit.ensure_cubin(OTHER, ARCH), path)


def damage_other_target(path):
    shutil.copy(jit.ensure_cubin(SORT, "sm_80"), path)


DAMAGES = [damage_empty, damage_cut, damage_foreign, damage_bit]


def unusable_file_in_its_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "file"))


def unusable_file_above(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "file" / "kernels"))


def unusable_no_home(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("MLA_FP8_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)


def unusable_read_only(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(Path, "mkdir", refuse)


def unusable_full(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def write(self, content):
            self._file.write(content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(file, mode="r", **options):
        opened = open(file, mode, **options)  # noqa: SIM115
        return Full(opened) if "x" in mode else opened

    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cubins, "open", open_full, raising=False)


UNUSABLE = [
    unusable_file_in_its_place,
    unusable_file_above,
    unusable_no_home,
    unusable_read_only,
    unusable_full,
]
