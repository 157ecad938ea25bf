"""The command line's own behaviour; what the demo finds is tested in test_demo.py."""

import pytest

from mla_fp8 import MLAIndexerRaggedFloat8Paged, __version__, certify, info, warmup
from mla_fp8.__main__ import main
from mla_fp8._kernel import Device


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err


def test_info_without_a_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(info, "gpus", list)
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path / "nothing"))
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "NumPy backend" in printed
    assert "numpy" in printed
    assert "No specialisations compiled yet." in printed


def test_certify_without_a_gpu_says_so_and_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(info, "gpus", list)
    monkeypatch.setattr(certify, "REPORT", tmp_path / "gpu_report.json")
    assert main(["certify"]) != 0
    assert "no usable NVIDIA GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_warmup_compiles_for_a_gpu_that_is_not_here(capsys, monkeypatch, tmp_path):
    pytest.importorskip("cuda.core", reason="cuda-core is not installed: kernels were NOT compiled")
    monkeypatch.setenv("MLA_FP8_CACHE_DIR", str(tmp_path))
    some = warmup.kernels(MLAIndexerRaggedFloat8Paged(8, 64, 7), 16, Device("sm_80", 108))
    assert {kernel.template for kernel in some} >= {"locate_work", "index_scores", "sort_topk"}
    monkeypatch.setattr(warmup, "kernels", lambda *_: some[:2])
    command = ["warmup", "--arch", "sm_80", "--num-heads", "8", "--depth", "64", "--k", "7"]
    assert main(command) == 0
    assert "2 kernels for sm_80: 2 compiled" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2
    assert main(command) == 0
    assert "2 kernels for sm_80: 0 compiled" in capsys.readouterr().out


def test_warmup_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(info, "gpus", list)
    assert main(["warmup"]) == 2
    assert "--arch" in capsys.readouterr().out
    assert main(["warmup", "--depth", "96", "--arch", "sm_90a"]) == 2
    assert "depth must be one of" in capsys.readouterr().out
