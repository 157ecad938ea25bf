"""The command line's own behaviour; what the demo finds is tested in test_demo.py."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mla_fp8 import MLAIndexerRaggedFloat8Paged, __version__
from mla_fp8.__main__ import main
from mla_fp8._cuda import jit
from mla_fp8._plan.kernel import Device
from mla_fp8.cli import certify, info, warmup

ROOT = Path(__file__).parents[1]
NO_COMPILER = "cuda-core is not installed: kernels were NOT compiled"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def refused(capsys, command, words):
    """Whether a command says in one line what is wrong, prints nothing else and ends with 2."""
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"mla_fp8 ?{command[0] if command else ''}: .+\n", printed.err)
    assert re.search(words, printed.err), printed.err
    return True


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "COMMAND"),
        (["dem"], "invalid choice: 'dem'.*demo"),
        (["demo", "-k", "many"], "-k: invalid int value: 'many'"),
        (["info", "--all"], "--all"),
        (["warmup", "--arch", "foo"], "--arch must be one of sm_80, .*sm_90a, .*; got foo"),
        (["warmup", "--arch", "sm_75"], "--arch must be one of sm_80, .*; got sm_75"),
        (["warmup", "--arch", "sm_90"], "--arch must be one of .*sm_90a.*; got sm_90$"),
        (["warmup", "--depth", "96", "--arch", "sm_90a"], "depth must be one of"),
        (["warmup", "--k", "0", "--arch", "sm_90a"], "k must be .*got 0"),
        (["warmup", "--page-size", "-1", "--arch", "sm_90a"], "page_size must be .*got -1"),
        (["warmup", "--mask", "windowed", "--arch", "sm_90a"], "mask must be .*windowed"),
        (["warmup"], "no usable NVIDIA GPU here; --arch"),
        (["bench", "typo"], "invalid choice: 'typo'.*quick"),
        (["bench", "quick", "--only", "decode"], "a preset, --only and the flags .* exclude"),
        (["bench", "quick", "--keys", "9"], "a preset, --only and the flags .* exclude"),
        (["bench", "--only", "all"], "--only needs an NVIDIA GPU .* nothing was measured"),
        (["bench", "--only", "typo"], "--only must be all or some of prefill,.*; got .*typo"),
        (["bench", "--only", "decode,typo"], "--only must be all or some of .*; got .*typo"),
        (["bench", "--only", ""], "--only must be all or some of"),
        (["bench", "--json", "/nowhere/x.json"], "--json can't be written: .*/nowhere/x.json"),
        (["bench", "--json", "."], "--json can't be written: .*directory"),
        (["bench", "--csv", "/nowhere/x.csv"], "--csv can't be written: .*/nowhere/x.csv"),
        (["bench", "--plot", "x.pdf"], r"--plot must end in .png or .svg; got x\.pdf"),
        (["bench", "--compare", "/nowhere.json"], "--compare must be a file that bench --json"),
        (["bench", "--tolerance", "-1"], "--tolerance must be at least 0; got -1"),
        (["bench", "--new", "3", "--keys", "2"], "--new must be 1 to 2; got 3"),
        (["bench", "--new", "1,1", "--keys", "9,9,9"], "--new must have as many .*got 2 and 3"),
        (["bench", "--keys", "9,many"], "--keys must be a number, or several .*got 9,many"),
        (["bench", "--keys", "3", "--kpool", "4"], "--keys must be 4 to .*got 3"),
        (["bench", "--kpool", "0"], "--kpool must be 1 to 64; got 0"),
        (["bench", "--page", "0"], "--page must be 1 to 65535; got 0"),
        (["bench", "--batch", "0"], "--batch must be 1 to 65535; got 0"),
        (["bench", "--depth", "96"], "depth must be one of"),
        (["bench", "--heads", "129"], "num_heads must be .*got 129"),
        (["bench", "--data", "noise"], "--data must be one of random, .*; got noise"),
        (["certify"], "no usable NVIDIA GPU"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_before_the_work(
    capsys, monkeypatch, tmp_path, command, words
):
    if "--arch" in command:
        pytest.importorskip("cuda.core", reason=NO_COMPILER)
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(info, "gpus", list)
    assert refused(capsys, command, words)
    assert not list(tmp_path.iterdir())


def test_files_that_were_there_stay_as_they_were(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(info, "gpus", list)
    out, link = tmp_path / "out.json", tmp_path / "link.json"
    out.write_text("figures")
    link.symlink_to("nothing.json")
    for path in (out, link, tmp_path / "new.json"):
        command = ["bench", "--json", str(path), "--compare", "/nowhere.json"]
        assert refused(capsys, command, "--compare must be a file")
    assert out.read_text() == "figures"
    assert sorted(tmp_path.iterdir()) == [link, out]


def test_warmup_without_a_compiler(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    for path in ("cuda.core", "cuda"):
        monkeypatch.setitem(sys.modules, path, None)
    message = r"needs cuda-core: pip install -e '\.\[cuda13\]' .* checkout"
    assert refused(capsys, ["warmup", "--arch", "sm_90a"], message)
    assert not list(tmp_path.iterdir())


def test_commands_on_a_gpu_that_is_too_old(capsys, monkeypatch, old_gpu):
    monkeypatch.setattr(info, "gpus", lambda: [{"name": "old"}])
    for command in ("warmup", "bench"):
        assert refused(capsys, [command], "8.0 or newer; GPU 0 has 7.5")


def test_ctrl_c(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "gpus", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "mla_fp8 info: interrupted\n"


def test_ctrl_c_in_warmup_compiles_no_more(capsys, monkeypatch, tmp_path):
    pytest.importorskip("cuda.core", reason=NO_COMPILER)
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path))
    asked = []

    def compile_cubin(kernel, arch):
        asked.append(kernel)
        time.sleep(0.02)
        return b"cubin", ""

    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(jit, "compile_cubin", compile_cubin)
    monkeypatch.setattr(warmup, "track", interrupted)
    assert main(["warmup", "--arch", "sm_90a"]) == 130
    assert len(asked) <= 2 * warmup._WORKERS
    assert capsys.readouterr().err == "mla_fp8 warmup: interrupted\n"
    assert len(list(tmp_path.iterdir())) == len(asked)


@pytest.mark.parametrize("command", ["info", "--help", "warmup --help"])
def test_a_closed_pipe_is_no_error(command):
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "mla_fp8", *command.split()],
        env={n: v for n, v in os.environ.items() if n != "PYTHONUNBUFFERED"}
        | {"PYTHONPATH": str(ROOT)},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")


def test_brackets_in_a_path_are_no_markup(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "[red]" / "[/x]"))
    assert main(["info"]) == 0
    assert "[red]/[/x]" in capsys.readouterr().out


def test_info_without_a_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(info, "gpus", list)
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "nothing"))
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "NumPy backend" in printed
    assert "numpy" in printed
    assert "No specialisations compiled yet." in printed


def test_certify_needs_a_checkout_and_pytest(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(info, "gpus", lambda: [{"name": "one"}])
    monkeypatch.setattr(certify, "REPORT", tmp_path / "tests" / "gpu_report.json")
    assert refused(capsys, ["certify"], "needs a checkout")
    monkeypatch.setattr(certify, "REPORT", tmp_path / "gpu_report.json")
    monkeypatch.setattr(certify, "find_spec", lambda name: None)
    assert refused(capsys, ["certify"], "needs pytest")
    assert not list(tmp_path.iterdir())


def test_warmup_compiles_for_a_gpu_that_is_not_here(capsys, monkeypatch, tmp_path):
    pytest.importorskip("cuda.core", reason=NO_COMPILER)
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path))
    some = warmup.kernels(MLAIndexerRaggedFloat8Paged(8, 64, 7), 16, Device("sm_80", 108))
    assert {kernel.template for kernel in some} >= {"schedule", "index_scores", "sort_topk"}
    monkeypatch.setattr(warmup, "kernels", lambda *_: some[:2])
    command = ["warmup", "--arch", "sm_80", "--num-heads", "8", "--depth", "64", "--k", "7"]
    assert main(command) == 0
    assert "2 kernels for sm_80: 2 compiled" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2
    assert main(command) == 0
    assert "2 kernels for sm_80: 0 compiled" in capsys.readouterr().out
