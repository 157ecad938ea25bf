"""The command line's own behaviour; what the demo finds is tested in test_demo.py."""

import pytest

from mla_fp8 import __version__, certify, info
from mla_fp8.__main__ import main


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
