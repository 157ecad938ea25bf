"""Kernels on disk: what is loaded is what was compiled, whatever the disk holds or refuses."""

import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from compile_table import kernels
from disk_faults import ARCH, DAMAGES, OTHER, SORT, UNUSABLE, damage_other_target, damage_swapped

from mla_fp8 import select_topk
from mla_fp8.__main__ import main
from mla_fp8._cuda import cubins, jit

ROOT = Path(__file__).parents[1]
CUBIN = b"\x7fELF" + bytes(range(256))


@pytest.fixture(autouse=True)
def _fresh():
    """No kernel is loaded and no warning given before a test or after."""
    jit.load.cache_clear()
    jit._WARNED.clear()
    yield
    jit.load.cache_clear()
    jit._WARNED.clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that takes no time, and the kernels that it was asked for."""
    asked = []

    def compile_cubin(kernel, arch):
        asked.append(kernel)
        return CUBIN + repr((kernel, arch)).encode(), "log"

    monkeypatch.setattr(jit, "compile_cubin", compile_cubin)
    return asked


@pytest.fixture
def driver(monkeypatch):
    """A CuPy that loads modules as the real one does: by path, once, and at `get_function`."""
    loaded = {}

    class RawModule:
        def __init__(self, *, path):
            self._path = path

        def get_function(self, name):
            if self._path not in loaded:
                loaded[self._path] = Path(self._path).read_bytes()
            return SimpleNamespace(name=name, cubin=loaded[self._path])

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule))
    return loaded


def names(folder):
    return sorted(file.name for file in folder.iterdir())


damages = pytest.mark.parametrize("damage", [*DAMAGES, damage_swapped, damage_other_target])


@damages
def test_a_bad_file_is_compiled_anew_with_one_warning(folder, compiler, driver, damage):
    path = jit.ensure_cubin(SORT, ARCH)
    good = path.read_bytes()
    damage(path)
    compiler.clear()
    with pytest.warns(RuntimeWarning, match=f"{re.escape(str(path))} does not hold") as warned:
        function = jit.load(SORT, ARCH, 0)
    assert len(warned) == 1
    assert compiler == [SORT]
    assert function.cubin == good[: len(function.cubin)] == jit.compile_cubin(SORT, ARCH)[0]
    assert path.read_bytes() == good
    jit.load.cache_clear()
    compiler.clear()
    assert jit.load(SORT, ARCH, 0).cubin == function.cubin  # and no warning
    assert compiler == []


@damages
def test_warmup_replaces_bad_files(folder, compiler, damage):
    path = jit.ensure_cubin(SORT, ARCH)
    good = path.read_bytes()
    damage(path)
    assert not jit.is_kept(SORT, ARCH)
    assert jit.ensure_cubin(SORT, ARCH) == path
    assert path.read_bytes() == good


def test_what_is_loaded_is_what_was_looked_at(folder, compiler, driver, monkeypatch):
    """A file that is swapped behind the check is not read again."""
    path = jit.ensure_cubin(SORT, ARCH)
    good = cubins.read(path)
    look = cubins.read

    def swap_after(path):
        found = look(path)
        path.write_bytes(b"swapped")
        return found

    monkeypatch.setattr(cubins, "read", swap_after)
    assert jit.load(SORT, ARCH, 0).cubin == good


def test_modules_have_paths_of_their_own_and_leave_nothing(folder, compiler, driver):
    """CuPy remembers modules by path: the same number of an open file is not the same module."""
    open_before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    found = [jit.load(kernel, ARCH, 0).cubin for kernel in (SORT, OTHER)]
    assert found == [jit.compile_cubin(kernel, ARCH)[0] for kernel in (SORT, OTHER)]
    assert len(driver) == 2
    assert not any(os.path.exists(path) for path in driver if "fd" not in path)
    if open_before:
        assert len(os.listdir("/proc/self/fd")) == len(open_before)


def test_without_files_in_memory_modules_pass_through_a_folder_that_is_gone(
    folder, compiler, driver, monkeypatch
):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    found = [jit.load(kernel, ARCH, 0).cubin for kernel in (SORT, OTHER)]
    assert found == [jit.compile_cubin(kernel, ARCH)[0] for kernel in (SORT, OTHER)]
    assert len(driver) == 2
    assert not any(Path(path).parent.exists() for path in driver)


@pytest.mark.parametrize("unusable", UNUSABLE)
def test_without_a_disk_kernels_are_compiled_in_memory_with_one_warning(
    tmp_path, monkeypatch, compiler, driver, unusable
):
    unusable(tmp_path, monkeypatch)
    before = names(tmp_path)
    with pytest.warns(RuntimeWarning, match="set MLA_FP8_CACHE_DIR") as warned:
        found = [jit.load(kernel, ARCH, 0).cubin for kernel in (SORT, OTHER)]
    assert len(warned) == 1
    assert found == [jit.compile_cubin(kernel, ARCH)[0] for kernel in (SORT, OTHER)]
    assert names(tmp_path) == before


@pytest.mark.parametrize("unusable", UNUSABLE[:3])
def test_commands_without_a_disk(tmp_path, monkeypatch, capsys, compiler, unusable):
    unusable(tmp_path, monkeypatch)
    assert main(["info"]) == 0
    assert "Kernel cache: " in capsys.readouterr().out
    pytest.importorskip("cuda.core", reason="cuda-core is not installed: kernels were NOT compiled")
    assert main(["warmup", "--arch", "sm_90a"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(
        r"mla_fp8 warmup: no kernels can be kept: .*MLA_FP8_CACHE_DIR.*\n", printed.err
    )
    assert compiler == [], "compiled before it looked"


def test_importing_needs_no_home():
    code = (
        "import mla_fp8; from mla_fp8._cuda import jit; from mla_fp8.cli import demo, info, warmup"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_an_interrupted_write_leaves_nothing(folder, compiler, monkeypatch, error):
    def interrupted(*_):
        raise error

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(error):
        jit.ensure_cubin(SORT, ARCH)
    assert names(folder) == []


def test_what_a_killed_process_left_goes_after_an_hour(folder, compiler):
    folder.mkdir()
    old, new, other = folder / "a.part", folder / "b.part", folder / "old.txt"
    for file in (old, new, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (time.time() - 7200,) * 2)
    path = jit.ensure_cubin(SORT, ARCH)
    assert names(folder) == sorted([new.name, other.name, path.name])


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes(folder, compiler, umask):
    """A new folder is its owner's alone; in a folder that others share they may read the files."""
    before = os.umask(umask)
    try:
        path = jit.ensure_cubin(SORT, ARCH)
        shared = folder.parent / "shared"
        shared.mkdir()
        shared.chmod(0o777)
        cubins.write(shared / path.name, CUBIN)
        cubins.write(folder / "above" / "below" / path.name, CUBIN)
    finally:
        os.umask(before)

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(folder) == mode(folder / "above") == mode(folder / "above" / "below") == 0o700
    assert mode(shared) == 0o777
    assert mode(path) == mode(shared / path.name) == 0o644 & ~umask


def test_many_writers_at_once(folder, compiler):
    barrier = threading.Barrier(8)
    failures = []

    def work():
        barrier.wait()
        try:
            for _ in range(20):
                assert jit.compiled(SORT, ARCH) == jit.compile_cubin(SORT, ARCH)[0]
                (folder / jit.cubin_path(SORT, ARCH).name).unlink(missing_ok=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [name for name in names(folder) if not name.endswith(".cubin")] == []


def test_the_name_tells_the_compiler(folder, monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    before = jit.cubin_path(SORT, ARCH)
    seen = set()
    for version in ((0, 13, 0), (0, 13, 1), (0, 12, 9)):
        monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda version=version: version)
        jit._compiler_versions.cache_clear()
        seen.add(jit.cubin_path(SORT, ARCH))
    monkeypatch.undo()
    jit._compiler_versions.cache_clear()
    assert len(seen) == 3
    for package in ("cuda-core", "nvidia-cuda-nvrtc"):
        with monkeypatch.context() as patch:
            patch.setattr(jit.metadata, "version", lambda name, package=package: name == package)
            jit._compiler_versions.cache_clear()
            seen.add(jit.cubin_path(SORT, ARCH).name)
    jit._compiler_versions.cache_clear()
    assert len(seen) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLA_FP8_CACHE_DIR", str(before.parent))
        assert jit.cubin_path(SORT, ARCH) == before


def test_names_fit_into_any_file_system(folder):
    for kernel in kernels():
        assert len(jit.cubin_path(kernel, "sm_100a").name) <= 143  # of an encrypted home folder
    name = cubins.file_name("a", ["x" * 100, "y" * 100], "sm_80", "content")
    assert name.startswith("a." + "x" * 100 + ".sm_80.")


def test_info_and_warmup_pass_strange_files_over(folder, capsys, monkeypatch, compiler):
    path = jit.ensure_cubin(SORT, ARCH)
    (folder / "strange.cubin").touch()
    (folder / "a.b=1.c.d.cubin").touch()
    (folder / "notes.txt").touch()
    (folder / path.name.replace("sort_topk", "folder")).mkdir()
    (folder / path.name.replace("sort_topk", "gone")).symlink_to("nowhere")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "sort_topk" in printed
    assert not re.search("strange|notes|gone|folder", printed.split("Specialisations compiled")[1])
    rows = cubins.listing()
    parameters = " ".join(f"{name}={value}" for name, value in SORT.macros)
    assert rows == [("sort_topk", parameters, ARCH)]


# With a GPU.

SCORES = np.random.default_rng(0).permutation(64).astype(np.float32).reshape(1, 64)


def _select(cupy):
    """A selection, sorted, with kernels that have to be loaded now."""
    from mla_fp8._cuda import backend

    backend._select_pipeline.cache_clear()
    jit.load.cache_clear()
    found = select_topk(cupy.asarray(SCORES), k=5, sort="score")
    assert found.get().tolist() == [np.argsort(-SCORES[0])[:5].tolist()]


@pytest.mark.gpu
@pytest.mark.parametrize("damage", DAMAGES)
def test_on_a_gpu_a_bad_file_does_no_harm(folder, cupy, damage):
    _select(cupy)
    good = {file: file.read_bytes() for file in folder.iterdir()}
    assert len(good) == 2
    for file in good:
        damage(file)
    with pytest.warns(RuntimeWarning, match="does not hold") as warned:
        _select(cupy)
    assert len(warned) == 2
    assert all(cubins.read(file) for file in good)


@pytest.mark.gpu
def test_on_a_gpu_swapped_files_do_no_harm(folder, cupy):
    _select(cupy)
    one, other = folder.iterdir()
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="does not hold"):
        _select(cupy)


@pytest.mark.gpu
@pytest.mark.parametrize("unusable", UNUSABLE)
def test_on_a_gpu_no_disk_does_no_harm(tmp_path, monkeypatch, cupy, unusable):
    with monkeypatch.context() as patch:  # CuPy has files of its own
        patch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "before"))
        _select(cupy)
    unusable(tmp_path, monkeypatch)
    with pytest.warns(RuntimeWarning, match="set MLA_FP8_CACHE_DIR") as warned:
        _select(cupy)
    assert len(warned) == 1


@pytest.mark.gpu
def test_on_a_gpu_modules_by_way_of_a_folder(folder, cupy, monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    _select(cupy)
