"""What the benchmark prints, writes and compares, and that it runs in NumPy without a GPU."""

import csv
import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mla_fp8 import presets
from mla_fp8.__main__ import main
from mla_fp8.cli import bench, bench_compare, bench_gpus, bench_report, cases, info, roofline
from mla_fp8.cli.bench_presets import DECODE_TOKENS, PRESETS, one, preset
from mla_fp8.cli.bench_rows import identity, label, row
from mla_fp8.cli.cases import Case
from mla_fp8.cli.command import CommandError
from mla_fp8.cli.roofline import Roofline

PUBLISHED = Path(__file__).parents[1] / "docs" / "data" / "bench.json"
ROOFLINE = Roofline(copy_tb_per_s=4.0, tflops=1000.0, product="a product")
CASE = Case("topk", 64, (4,), (900,))
SHAPE = ["--heads", "2", "--depth", "32", "--k", "4", "--new", "3", "--keys", "40,50"]


@pytest.fixture
def tiny(monkeypatch):
    """A machine without a GPU, and small arrays for its roofline."""
    monkeypatch.setattr(info, "gpus", list)
    monkeypatch.setattr(cases, "_DRAWN", 1 << 14)
    monkeypatch.setattr(roofline, "_CPU_COPY_BYTES", 1 << 12)
    monkeypatch.setattr(roofline, "_CPU_SIDE", 16)


# ---- rows


def test_a_row_has_medians_quartiles_rates_and_ratios():
    case = Case("topk", 64, (2048,), (8192,))
    times = {"ours": [240, 260, 250, 255, 245], "topk": [500], "real": [550], "deepgemm": [300]}
    found = row(case, times | {"torch_topk": [1500], "host": [40], "bound": [9]}, ROOFLINE)
    assert (found["us_q1"], found["us"], found["us_q3"]) == (245, 250, 255)
    assert found["tflops"] == pytest.approx(1e-6 * case.flop / 250, rel=1e-4)
    assert found["tb_per_s"] == pytest.approx(1e-6 * case.bytes / 250, rel=1e-4)
    assert found["roofline_percent"] == pytest.approx(found["tflops"] / 10, abs=0.06)
    assert found["topk_roofline_percent"] == pytest.approx(found["tflops"] / 20, abs=0.06)
    ratios = found["real_ratio"], found["speedup"], found["torch_topk_speedup"]
    assert ratios == (1.1, 1.2, 3)
    assert (found["host_us"], found["bound_us"]) == (40, 9)


def test_the_roofline_is_the_longer_of_moving_and_multiplying():
    assert ROOFLINE.percent(flop=1e9, moved=1, microseconds=4) == 25
    assert ROOFLINE.percent(flop=1, moved=8e6, microseconds=4) == 50
    copy = Roofline(4.0, None, "cuBLASLt")
    assert copy.percent(flop=1e12, moved=8e6, microseconds=4) == 50
    assert "cuBLASLt not measured" in str(copy)
    assert "cuBLASLt not measured" not in str(Roofline(4.0, 3.0, "cuBLASLt"))


def test_the_roofline_of_the_cpu(tiny):
    found = roofline.on_cpu()
    assert found.copy_tb_per_s > 0
    assert found.tflops > 0
    assert "NumPy float64 16^3" in str(found)


def test_labels_name_what_is_unusual():
    assert label(row(CASE, {"ours": [1]}, ROOFLINE)) == "1 x 4 x 900, 64 heads"
    case = Case("topk", 32, (4,), (900,), 16, k=5, kpool=2, data="zeros", model="m")
    expected = "m, 1 x 4 x 900, 32 heads, k 5, kpool 2, page 16, zeros"
    assert label(row(case, {"ours": [1]}, ROOFLINE)) == expected


# ---- presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    large, small = preset(name, small=False), preset(name, small=True)
    assert len({identity(row(c, {"ours": [1]}, ROOFLINE)) for c in large}) == len(large)
    assert [c.num_heads for c in large] == [c.num_heads for c in small]
    for case in large + small:
        assert "topk" in case.group  # the whole operation is measured
        assert all(t <= n for t, n in zip(case.new, case.keys, strict=True))
        assert min(case.rows) >= 1
        assert max(case.new) <= DECODE_TOKENS or case.group != "decode topk"
    assert max(c.flop for c in small) < 5e9  # a second at 5 GFLOP/s
    assert all(c.k >= 8 for c in small)


def test_presets_are_what_their_names_say():
    found = {name: preset(name, small=False) for name in PRESETS}
    assert {c.group for c in found["prefill"]} == {"topk"}
    assert {c.group for c in found["decode"]} == {"decode topk"}
    assert {c.group for c in found["ragged"]} == {"mixed topk"}
    assert {c.group for c in found["quick"]} == {"topk", "decode topk", "mixed topk"}
    assert min(max(c.keys) for c in found["longcontext"]) >= 1 << 18
    models = {n for n, m in vars(presets).items() if isinstance(m, presets.Preset)}
    assert {c.model for c in found["models"]} == models
    pro = next(c for c in found["models"] if c.model == "deepseek_v4_pro")
    assert (pro.num_heads, pro.k, pro.kpool) == (64, 1024, 4)


def test_one_shape():
    case = one(heads=16, batch=2, new="1,5", keys="70", page=16, data="zeros")
    assert (case.new, case.keys) == ((1, 5, 1, 5), (70,) * 4)
    assert (case.group, case.page_size, case.data) == ("mixed topk", 16, "zeros")
    assert one() == Case("decode topk", 64, (1,), (131072,))
    assert one(new="512", keys="4096").group == "topk"


# ---- comparison


def _row(*samples, case=CASE, **others):
    return row(case, {"ours": samples, **{name: [time] for name, time in others.items()}}, ROOFLINE)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((100, 101, 102), (120, 121, 122), "slower"),
        ((100, 101, 102), (80, 81, 82), "faster"),
        ((100, 101, 102), (103, 104, 105), "same"),  # within the tolerance
        ((90, 100, 140), (110, 115, 120), "same"),  # within the old spread
        ((100, 101, 102), (80, 112, 140), "same"),  # within the new spread
        ((100, 101, 500), (120, 121, 122), "same"),  # the old run's upper quartile is 300.5
    ],
)
def test_verdicts(old, new, expected):
    (change,) = bench_compare.changes([_row(*old)], [_row(*new)])
    assert change.verdict(5.0) == expected
    opposite = {"slower": "faster", "faster": "slower", "same": "same"}[expected]
    (change,) = bench_compare.changes([_row(*new)], [_row(*old)])
    assert change.verdict(5.0) == opposite


def test_the_tolerance_is_in_percent():
    (change,) = bench_compare.changes([_row(100)], [_row(106)])
    assert (change.verdict(5), change.verdict(7)) == ("slower", "same")


def test_only_the_same_cases_and_times_are_compared():
    old = [_row(100, topk=300, host=7), _row(5, case=Case("topk", 32, (4,), (900,)))]
    others = Case("topk", 64, (4,), (900,), k=7), Case("decode topk", 64, (4,), (900,))
    new = [_row(100, topk=301, deepgemm=9), *(_row(9, case=case) for case in others)]
    found = bench_compare.changes(old, new)
    assert [(change.name, change.old["us"]) for change in found] == [("us", 100), ("topk_us", 100)]
    assert "the old file lacks 2 of 3 cases" in bench_compare.summary(found, new, 5)


def test_batches_that_only_share_a_name_are_not_compared():
    a, b = (Case("mixed topk", 64, (1,) * 3, (64, n, 900)) for n in (65, 800))
    assert a.name == b.name
    assert not bench_compare.changes([_row(1, case=a)], [_row(1, case=b)])
    assert bench_compare.changes([_row(1, case=a)], [_row(1, case=a)])


def test_the_published_file_can_be_compared_with():
    """It has no quartiles, no k and no depth."""
    wanted = [Case("topk", 64, (4096,), (16384,)), *preset("prefill", small=False)]
    old = bench_compare.load(PUBLISHED, "NVIDIA H200", wanted)
    (change, *_) = bench_compare.changes(old["rows"], [_row(2000, case=wanted[0])])
    assert change.old["shape"] == "1 x 4096 x 16384"
    assert change.verdict(5) == "slower"
    words = bench_compare.summary([change], [change.new], 5)
    assert "1 slower" in words
    assert "no quartiles" in words
    with pytest.raises(CommandError, match=r"of this device .NVIDIA A100.; .* H200"):
        bench_compare.load(PUBLISHED, "NVIDIA A100", wanted)
    with pytest.raises(CommandError, match="must have a case of this run"):
        bench_compare.load(PUBLISHED, "NVIDIA H200", [one(keys="77")])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00",
        "NaN",
        "[]",
        "{}",
        '{"device": "d", "rows": 5}',
        '{"device": "d", "rows": [{"group": "topk"}]}',
        '{"device": "d", "rows": [{"group": "a", "shape": "b", "us": 0}]}',
        '{"device": "d", "rows": [], "roofline": [{"copy": 1}]}',
    ],
)
def test_other_files_are_not_compared_with(text, tmp_path):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(CommandError, match="--compare must be a file that bench --json wrote"):
        bench_compare.load(path, "d", [CASE])


def test_the_table_has_the_worst_first():
    rows = [
        [
            _row(time, case=Case("topk", 64, (4,), (900,), model=name))
            for name, time in zip("abcd", times, strict=True)
        ]
        for times in ((100, 100, 100, 100), (101, 120, 50, 200))
    ]
    table = bench_compare.table(bench_compare.changes(*rows), 5)
    cells = [list(column.cells) for column in table.columns]
    assert [cell[0] for cell in cells[0]] == ["d", "b", "c", "a"]
    assert cells[-1] == ["slower", "slower", "faster", "same"]
    assert cells[-2] == ["2.000", "1.200", "0.500", "1.010"]


# ---- files, and the whole command in NumPy


def test_csv_holds_the_rows(tmp_path):
    rows = [_row(1, 2, 3, topk=5), _row(4, case=Case("topk", 64, (4,), (9,), model="a, b"))]
    bench_report.write_csv(tmp_path / "x.csv", rows)
    with (tmp_path / "x.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for line, expected in zip(found, rows, strict=True):
        assert {n: v for n, v in line.items() if v} == {n: str(v) for n, v in expected.items()}


def test_without_a_gpu_numpy_is_measured(tiny, capsys, tmp_path):
    paths = {name: tmp_path / f"x.{name}" for name in ("json", "csv", "svg", "png")}
    outputs = ["--json", str(paths["json"]), "--csv", str(paths["csv"])]
    assert main(["bench", *SHAPE, *outputs, "--plot", str(paths["svg"])]) == 0
    printed = capsys.readouterr().out
    assert "this is the NumPy backend." in printed
    assert "smaller" not in printed  # a shape that was asked for is measured as it is
    assert "CPU caches are as the call before left them" in printed

    found = json.loads(paths["json"].read_text())
    (line,) = found["rows"]
    assert (line["shape"], line["heads"], line["depth"], line["k"]) == ("2 x 3 x 40..50", 2, 32, 4)
    assert 0 < line["us_q1"] <= line["us"] <= line["us_q3"]
    assert line["topk_us"] > 0
    assert found["gpu"] is None
    assert found["device"].startswith("NumPy on ")
    assert [roof["product"] for roof in found["roofline"]] == ["NumPy float64 16^3"] * 2
    assert found["cases"][0]["keys"] == [40, 50]
    assert paths["csv"].read_text().count("\n") == 2
    assert "matplotlib" in paths["svg"].read_text()
    assert ET.parse(paths["svg"]).getroot().tag.endswith("svg")
    assert main(["bench", *SHAPE, "--plot", str(paths["png"])]) == 0
    assert paths["png"].read_bytes()[:4] == b"\x89PNG"


def test_a_slower_run_ends_with_status_1(tiny, capsys, tmp_path):
    path = tmp_path / "old.json"
    assert main(["bench", *SHAPE, "--json", str(path)]) == 0
    old = json.loads(path.read_text())
    for factor, status, word in ((1000.0, 0, "2 faster"), (0.001, 1, "2 slower")):
        lines = [
            {n: v * factor if "us" in n.split("_") else v for n, v in line.items()}
            for line in old["rows"]
        ]
        path.write_text(json.dumps(old | {"rows": lines}))
        assert main(["bench", *SHAPE, "--compare", str(path)]) == status
        assert word in capsys.readouterr().out


def test_presets_are_smaller_on_the_cpu(tiny, capsys, monkeypatch):
    monkeypatch.setattr("mla_fp8.cli.bench.preset", lambda name, small: [CASE] * small)
    assert main(["bench", "quick"]) == 0
    assert "64 times smaller than on a GPU" in capsys.readouterr().out


def test_torch_is_measured_if_it_is_there(tiny, capsys, tmp_path):
    pytest.importorskip("torch")
    assert main(["bench", *SHAPE, "--json", str(tmp_path / "x.json")]) == 0
    (line,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert line["torch_topk_us"] > line["us"] / 2
    assert line["torch_topk_speedup"] > 0
    assert "× torch.topk" in capsys.readouterr().out


def test_without_torch_no_peer_runs(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", *SHAPE]) == 0
    assert "No peer ran" in capsys.readouterr().out


def test_without_matplotlib_nothing_is_drawn(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("mla_fp8.cli.bench_plot.find_spec", lambda name: None)
    assert main(["bench", *SHAPE, "--plot", str(tmp_path / "x.png")]) == 2
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_out_of_memory_is_one_line(tiny, capsys, monkeypatch):
    def measure(case, roof):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr("mla_fp8.cli.bench_numpy.measure", measure)
    assert main(["bench", *SHAPE]) == 2
    assert "2 x 3 x 40..50 needs more memory: Unable" in capsys.readouterr().err


def _figures():
    spec = importlib.util.spec_from_file_location("figures", PUBLISHED.parents[1] / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    return figures


def _several_gpus(case, number: int) -> dict:
    """A row as `mla_fp8.cli.gpu_ranks` makes it, with figures that can be reckoned by hand."""
    found = {"group": "gpus", "data": case.data, "shape": case.name, "gpus": 2, "speedup": 1.9}
    times = {"one_us": 1000.0, "us": 540.0, "local_us": 500.0, "gather_us": 10.0 + 10 * number}
    times |= {"merge_us": 20.0, "local8_us": 125.0, "merge8_us": 30.0, "local64_us": 16.0}
    return found | times | {"merge64_us": 60.0, "gathered_bytes": 16384 * 10**number}


def test_the_page_of_several_gpus(tmp_path):
    """What is projected is said to be so, and computed as the page says."""
    pytest.importorskip("matplotlib")
    figures = _figures()
    rows = [_several_gpus(case, n) for n, case in enumerate(bench_gpus.cases())]
    found = {"rows": rows, "commit": "abc", "gpu": {"name": "A GPU"}}
    text = figures.gpus(found)
    assert "Commit abc, 2 of A GPU" in text
    assert "by keys | 1000 | 540 | 1.90 × | 500 | 10.0 | 20.0 | 16384 |" in text
    latency, rate = figures.link(rows)
    assert latency == 10.0
    assert rate == 16384 * 1000 / 30
    by_keys, by_rows = (figures.projected(rows[n], latency, rate) for n in (1, 3))
    assert by_keys[1] == (1000.0, 0.0, 0.0)
    assert by_keys[2] == (500.0, 20.0, 20.0)
    assert by_keys[8] == (125.0, 10.0 + 7 * 163840 / rate, 30.0)
    assert by_rows[64] == pytest.approx((16.0, 10.0 + 63 * 16384 * 1000 / 32 / rate, 60.0))
    assert "a projection, not a measurement" in figures.projection(found)
    figures.draw_gpus(found, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    assert drawn.count("projected") >= 8
    assert "by rows" in drawn


def test_the_figures_of_the_documents_can_be_drawn_from_a_result(tiny, monkeypatch, tmp_path):
    gpu = {"name": "A GPU", "multiprocessors": 7}
    wanted = [Case("topk", 64, (4096,), (16384,)), Case("decode topk", 64, (1,), (32768,))]

    def measure(together, roof):
        times = {"ours": [9.0], "topk": [10.0], "real": [11.0], "deepgemm": [5.0]}
        return [row(case, times, roof) for case in together]

    device = bench._Device("A GPU", gpu, "L2 is cold", lambda: ROOFLINE, measure)
    monkeypatch.setattr(info, "gpus", lambda: [gpu])
    monkeypatch.setattr(bench, "_cuda", lambda: device)
    monkeypatch.setattr(bench, "chosen", lambda *_, **__: wanted)
    assert main(["bench", "--only", "all", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    figures = _figures()
    text = figures.machine(found)
    assert "A GPU, 7 multiprocessors" in text
    assert "1000 TFLOP/s before, 1000 after" in text
    line = "topk", "1 x 4096 x 16384"
    assert figures.table(found, figures.load("peers.json"), [line]).endswith(
        "| 10.0 | 11.0 | 0.66 | 0.50 |"
    )


@pytest.mark.gpu
def test_one_shape_on_a_gpu(cupy, capsys, tmp_path):
    path = tmp_path / "x.json"
    command = ["bench", "--new", "1", "--keys", "5000", "--batch", "3", "--json", str(path)]
    assert main(command) == 0
    assert "L2 is cold" in capsys.readouterr().out
    assert (
        json.loads(path.read_text())["gpu"]["name"]
        == cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    )
    assert main([*command[:-2], "--compare", str(path), "--tolerance", "1000"]) == 0
    assert "0 slower" in capsys.readouterr().out
