"""The benchmark's arithmetic, and what it says where it cannot measure."""

import numpy as np

from mla_fp8 import bench, info
from mla_fp8.__main__ import main


def test_pairs_are_those_of_the_causal_mask():
    case = bench.Case("ragged", 64, (3, 1, 0), (10, 7, 5))
    assert case.pairs == (8 + 9 + 10) + 7
    assert case.flop == 2 * 64 * 128 * case.pairs
    assert case.bytes == 132 * (10 + 7 + 5) + 4 * case.pairs


def test_figures_of_a_published_shape():
    """DeepGEMM's 257 us at 2048 new of 8192 keys and 64 heads are 937 TFLOP/s."""
    case = bench.Case("prefill", 64, (2048,), (8192,))
    assert round(1e-6 * case.flop / 257) == 936


def test_cases_cover_what_the_page_reports():
    found = bench.cases()
    groups = {"prefill", "decode", "ragged", "pages"}
    groups |= {"topk", "decode topk", "frozen topk", "mixed topk"}
    assert {case.group for case in found} == groups
    assert len(set(found)) == len(found)
    ragged = [case for case in found if case.group == "ragged"]
    for uneven, even in zip(ragged[::2], ragged[1::2], strict=True):
        assert np.isclose(uneven.pairs, even.pairs, rtol=0.01)
        assert max(uneven.keys) > 900 * min(uneven.keys)


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(info, "gpus", list)
    out = tmp_path / "bench.json"
    assert main(["bench", "--only", "decode", "--out", str(out)]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert not out.exists()
