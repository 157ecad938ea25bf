"""The benchmark's arithmetic, and what it says where it cannot measure."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from properties import host

from mla_fp8 import index_scores
from mla_fp8.__main__ import main
from mla_fp8.cli import (
    bench_calls,
    bench_cuda,
    bench_doors,
    bench_gpus,
    bench_select,
    cases,
    info,
    patterns,
    roofline,
    timer,
)
from mla_fp8.cli.bench_calls import operator
from mla_fp8.cli.bench_presets import DATA
from mla_fp8.cli.cases import Case
from mla_fp8.cli.command import CommandError
from mla_fp8.cli.roofline import Roofline

ROOFLINE = Roofline(copy_tb_per_s=4.0, tflops=1400.0, product="a product")


def test_pairs_are_those_of_the_causal_mask():
    case = Case("ragged", 64, (3, 1, 0), (10, 7, 5))
    assert case.pairs == (8 + 9 + 10) + 7
    assert case.flop == 557_056  # 34 pairs, each of 64 products of 128 channels
    assert case.bytes == 3_040  # 22 keys of 132 bytes, 34 scores of 4


def test_figures_of_a_published_shape():
    """DeepGEMM's 257 us at 2048 new of 8192 keys and 64 heads are 937 TFLOP/s."""
    case = Case("prefill", 64, (2048,), (8192,))
    assert round(1e-6 * case.flop / 257) == 936


def test_cases_cover_what_the_page_reports():
    found = cases.cases()
    groups = {"prefill", "decode", "ragged", "pages"}
    groups |= {"topk", "decode topk", "frozen topk", "mixed topk", "select"}
    assert {case.group for case in found} == groups
    assert len(set(found)) == len(found)
    ragged = [case for case in found if case.group == "ragged"]
    for uneven, even in zip(ragged[::2], ragged[1::2], strict=True):
        assert np.isclose(uneven.pairs, even.pairs, rtol=0.01)
        assert max(uneven.keys) > 900 * min(uneven.keys)


def test_without_a_gpu_groups_are_not_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(info, "gpus", list)
    out = tmp_path / "bench.json"
    assert main(["bench", "--only", "decode", "--json", str(out)]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert not out.exists()


def test_pooled_keys_are_counted_by_rows():
    """3 tokens after 7 others, a row for every 4: they see 2, 2 and 2 rows, one more sees 3."""
    case = Case("decode topk", 2, (3, 1), (10, 12), depth=32, k=5, kpool=4)
    assert case.rows == (2, 3)
    assert case.pairs == 6 + 3
    assert case.bytes == 5 * 36 + 4 * 9
    assert case.whole_bytes == 5 * 36 + 4 * 5 * 4
    plain = Case("decode topk", 2, (3, 1), (10, 12))
    assert plain.pairs == 8 + 9 + 10 + 12
    assert plain.whole_bytes == 22 * 132 + 4 * 2048 * 4


def _share(mask) -> float:
    return float(np.mean(mask))


PATTERNS = {  # what makes a pattern what its name says, of rows of 20000
    "normal": lambda x: abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02,
    "negative heavy tail": lambda x: _share(x < 0) > 0.99 and x.min() < 30 * np.median(x),
    "-1/|n|": lambda x: x.max() < 0 and x.min() < -1e3,
    "-exp(2n)": lambda x: x.max() < 0 and x.min() < -1e2,
    "cauchy": lambda x: x.max() > 1e3 and x.min() < -1e3 and abs(np.median(x)) < 0.1,
    "log-normal 3": lambda x: x.min() > 0 and x.max() > 1e4 * np.median(x),
    "two bulks": lambda x: _share(abs(x - 5) < 0.01) == pytest.approx(1 / 16, rel=0.01),
    "ten outliers": lambda x: np.all((x == 1e3).sum(axis=1) == 10),
    "ten negative outliers": lambda x: np.all((x == -1e6).sum(axis=1) == 10),
    "half of the rows negative": lambda x: (
        (np.median(x[::2], axis=1) < 0).all() and (np.median(x[1::2], axis=1) > 0).all()
    ),
    "half zeros": lambda x: _share(x == 0) == pytest.approx(0.5, abs=0.02),
    "k-th is zero": lambda x: np.all((x > 0).sum(axis=1) < 2048) and x.min() == 0,
    "last bits": lambda x: abs(x - 1).max() < 1e-5 and len(np.unique(x)) < 200,
    "ascending": lambda x: (np.diff(x, axis=1) >= 0).all() and len(np.unique(x)) > x.size / 2,
    "all equal": lambda x: len(np.unique(x)) == 1,
}


@pytest.mark.parametrize("name", patterns.ROWS)
def test_patterns_are_what_their_names_say(name):
    found = patterns.rows(name, 6, 20_000)
    assert found.shape == (6, 20_000)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.isfinite(found).all()
    assert PATTERNS[name](found)
    assert np.array_equal(found, patterns.rows(name, 6, 20_000))


def test_each_pattern_has_its_check():
    assert tuple(PATTERNS) == patterns.ROWS


def test_real_problem_has_what_models_have():
    """Gates of both signs, a common direction, later keys with larger scales of a heavy tail."""
    q, k, gates, factors = patterns.real_problem(4, 5000, 32)
    assert (q.shape, k.shape, gates.shape, factors.shape) == (
        (4, 32, 128),
        (5000, 128),
        (4, 32),
        (5000,),
    )
    assert all(array.dtype == np.float32 for array in (q, k, gates, factors))
    assert 0.3 < _share(gates > 0) < 0.7
    assert _share((q @ k.T) > 0) > 0.9
    assert np.median(factors[-1000:]) > 5 * np.median(factors[:1000])
    assert factors.max() > 50 * np.median(factors)


def test_selection_is_measured_on_all_patterns():
    found = cases.select_cases()
    shapes = {case.name for case in found}
    assert len(shapes) == 6
    assert {(case.name, case.data) for case in found} == {
        (shape, name) for shape in shapes for name in patterns.ROWS
    }
    ragged = [bench_select.lengths(case) for case in found if len(case.new) > 1]
    assert ragged[0].shape == (48,)
    assert ragged[0].min() in range(60, 70)
    assert ragged[0].max() in range(131_000, 131_073)
    assert bench_select.lengths(found[0]).tolist() == [16384] * 4096


def test_patterns_stand_beside_normal():
    cases = [Case("select", 0, (4,), (n,), data=d) for n in (99, 77) for d in ("normal", "x")]
    rows = bench_select.figures(cases[:2], [[9, 10, 12], [11.0]])
    rows += bench_select.figures(cases[2:], [[4], [8]])
    assert [(row["us"], row["us_q1"], row["us_q3"]) for row in rows][:2] == [
        (10, 9.5, 11),
        (11,) * 3,
    ]
    assert [row["over_random"] for row in rows] == [1, 1.1, 1, 2]
    table = bench_select.table([*rows, {"group": "decode"}])
    assert [list(column.cells) for column in table.columns] == [
        ["normal", "x"],
        ["10.0 (1.00)", "11.0 (1.10)"],
        ["4.0 (1.00)", "8.0 (2.00)"],
    ]


@pytest.mark.parametrize("kpool", [1, 4])
def test_calls_and_peers_select_the_same_keys(kpool, monkeypatch):
    """NumPy and torch on the CPU know what these calls use of CuPy and of torch on a GPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(cases, "_DRAWN", 1 << 16)
    cupy = SimpleNamespace(empty=np.empty, ndarray=type("ndarray", (), {}))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(bench_calls, "gpu_torch", lambda: torch)
    # The bound of all lengths, 20 + 598, is more than the pages hold.
    case = Case("mixed topk", 4, (2, 20), (600, 90), page_size=16, k=7, kpool=kpool)
    arrays = cases.Arrays(case, 2, np)
    ours, theirs = bench_calls.whole(case, arrays), bench_calls.torch_topk(case, arrays)
    assert (len(ours), len(theirs)) == (2, 2)
    seen = []
    for mine, other in zip(ours, theirs, strict=True):
        found = mine()
        assert np.array_equal(found, np.sort(other().indices.numpy(), axis=1))
        seen.append(found.copy())
    assert not np.array_equal(*seen)  # each call reads its own pages


class _NumPyAsCuPy(ModuleType):
    """NumPy behind what the benchmark uses of CuPy."""

    ndarray = type("ndarray", (), {})
    cuda = SimpleNamespace(Device=lambda: SimpleNamespace(synchronize=lambda: None))

    def __getattr__(self, name):
        return getattr(np, name)

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=lambda: None)


class _OnceEach:
    """A timer that makes each call once; the n-th variant takes n microseconds."""

    def samples(self, variants, repeats):
        for variant in variants.values():
            for call in variant.calls:
                call()
        return {name: [float(n)] * repeats for n, name in enumerate(variants, 1)}


def test_what_is_timed_on_a_gpu_becomes_rows(monkeypatch):
    monkeypatch.setattr(cases, "_DRAWN", 1 << 16)
    monkeypatch.setattr(bench_cuda, "COLD_BYTES", 1 << 17)
    monkeypatch.setattr(bench_cuda, "scoring", lambda case, arrays: [lambda: None] * 2)
    monkeypatch.setattr(bench_cuda, "gpu_torch", lambda: None)
    monkeypatch.setattr(bench_calls, "gpu_torch", lambda: None)
    monkeypatch.setitem(sys.modules, "cupy", _NumPyAsCuPy("cupy"))
    together = [Case("decode topk", heads, (1,) * 2, (90,) * 2, k=7) for heads in (4, 8)]
    first, second = bench_cuda.measure(together, _OnceEach(), ROOFLINE)
    assert [row["heads"] for row in (first, second)] == [4, 8]
    times = ("us", "topk_us", "eager_us", "real_us")
    assert [first[name] for name in times] == [1, 2, 3, 4]
    assert [second[name] for name in times] == [5, 6, 7, 8]
    assert first["host_us"] > 0
    assert first["bound_us"] > 0
    (alone,) = bench_cuda.measure([Case("prefill", 4, (9,), (90,))], _OnceEach(), ROOFLINE)
    assert "topk_us" not in alone


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case("decode topk", 64, (1,) * 4, (5000,) * 4),
        Case("mixed topk", 64, (1, 8), (4096, 128)),  # its bound is more than its pages hold
    ],
)
def test_the_whole_operation_is_measured(case, cupy):
    (row,) = bench_cuda.measure([case], timer.Timer(), ROOFLINE)
    assert 0 < row["bound_us"] < row["host_us"]
    assert 0 < row["us_q1"] <= row["us"] <= row["us_q3"] < row["topk_us"] < row["eager_us"]
    assert ("torch_topk_us" in row) == (timer.gpu_torch() is not None)


@pytest.mark.gpu
def test_pooled_keys_of_a_model_are_measured(cupy):
    shape = {"new": (300,), "keys": (9000,)}
    case = Case("topk", 64, **shape, k=512, kpool=4, model="deepseek_v4_flash")
    (row,) = bench_cuda.measure([case], timer.Timer(), ROOFLINE)
    assert row["us"] > 0
    assert row["topk_us"] > 0
    assert row["kpool"] == 4


@pytest.mark.gpu
def test_the_roofline_of_a_gpu(cupy):
    found = roofline.on_gpu(timer.Timer())
    assert 0.05 < found.copy_tb_per_s < 20
    assert found.tflops is None or found.tflops > 10


@pytest.mark.parametrize("data", ["random", "real-like"])
def test_inputs_are_distinct_and_finite(data, xp, monkeypatch):
    case = Case("mixed topk", 32, (3, 1), (1000, 70), data=data)
    with monkeypatch.context() as patch:
        patch.setattr(cases, "_DRAWN", 1 << 16)  # so that what is drawn is used often
        arrays = cases.Arrays(case, 2, xp)
    blocks = host(arrays.blocks).reshape(-1, case.depth)
    assert len(np.unique(blocks, axis=0)) == len(blocks)
    for table in arrays.tables:
        scores = host(index_scores(*arrays.inputs(table), check=True))
        assert np.isfinite(scores).sum(axis=1).tolist() == [998, 999, 1000, 70]
        assert np.unique(scores[0]).size > 900


@pytest.mark.gpu
def test_selection_is_measured(cupy):
    ragged = (1,) * 3, (64, 20_000, 3000)
    for shape in (((16,), (9000,)), ragged):
        cases = [Case("select", 0, *shape, data=name) for name in ("normal", "all equal")]
        rows = bench_select.measure(cases, timer.Timer())
        assert [row["data"] for row in rows] == ["normal", "all equal"]
        assert all(row["us"] > 0 for row in rows)


@pytest.mark.parametrize("data", DATA)
def test_all_copies_of_the_pages_have_the_data(data, xp, monkeypatch):
    """Launches of a decode graph read other pages, but the same kind of scores."""
    monkeypatch.setattr(cases, "_DRAWN", 1 << 16)
    arrays = cases.Arrays(Case("decode topk", 4, (2,), (700,), data=data), 2, xp)
    of_tables = [host(index_scores(*arrays.inputs(table))) for table in arrays.tables]
    for row in (scores[1] for scores in of_tables):
        step = np.diff(row)
        checks = {
            "random": len(np.unique(row)) > 500,
            "real-like": len(np.unique(row)) > 500,
            "zeros": 0.4 < np.mean(row == 0) < 0.6,
            "ascending": (step >= 0).all() and row[-1] > row[0],
            "descending": (step <= 0).all() and row[-1] < row[0],
            "equal": (step == 0).all() and row[0] > 0,
            "two values": len(np.unique(row)) == 2,
        }
        assert checks[data]


@pytest.mark.parametrize("kpool", [1, 4])
def test_a_call_sees_the_rows_that_a_case_counts(kpool, xp, monkeypatch):
    monkeypatch.setattr(cases, "_DRAWN", 1 << 16)
    case = Case("mixed topk", 4, (9, 1), (130, 31), page_size=16, depth=32, k=3, kpool=kpool)
    arrays = cases.Arrays(case, 1, xp)
    inputs = arrays.inputs(arrays.tables[0])
    scores = host(operator(case).scores(*inputs, check=True))
    assert np.isfinite(scores).sum() == case.pairs
    assert host(operator(case)(*inputs)).shape == (10, 3)


def test_doors_are_compared():
    found = bench_doors.cases()
    assert {case.group for case in found} == {"doors"}
    names = {case.data.split()[0].rstrip(",") for case in found}
    assert names == {"fused", "slots", "kpool", "merge", "write"}
    assert len(set(found)) == len(found)
    row = bench_doors.figures(found[0], "split pools", [3.0], [2.0])
    assert (row["us"], row["compared_us"], row["ratio"]) == (3.0, 2.0, 1.5)
    table = bench_doors.table([row, {"group": "decode"}])
    assert [next(iter(column.cells)) for column in table.columns][::3] == ["fused", "split pools"]


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["fused", "slots", "kpool 4", "merge", "write bfloat16, fused"])
def test_doors_are_measured(data, cupy):
    shape = ((1 << 15,),) * 2 if data[0] == "w" else ((128,), (32768,))
    case = Case("doors", 64, *shape, data=data)
    (row,) = bench_doors.measure(case, timer.Timer())
    assert row["data"] == data
    assert row["us"] > 0
    assert row["compared_us"] > 0


def test_several_gpus_beside_one():
    found = bench_gpus.cases()
    assert [case.data for case in found] == ["keys", "keys", "keys", "rows"]
    shapes = [case.name for case in found]
    assert shapes == ["1 x 1 x 1048576", "16 x 1 x 262144", *["1 x 2048 x 262144"] * 2]
    row = {"group": "gpus", "data": "keys", "shape": "a", "gpus": 2, "speedup": 1.9, "us": 7.0}
    table = bench_gpus.table([row, {"group": "decode"}])
    assert [next(iter(column.cells)) for column in table.columns][-1] == "1.9"


@pytest.mark.parametrize("count", [0, 1])
def test_one_gpu_is_too_few_for_several(count, monkeypatch, capsys):
    monkeypatch.setattr(bench_gpus, "count", lambda: count)
    monkeypatch.setattr(info, "gpus", lambda: [{"name": "A GPU"}])
    assert main(["bench", "--only", "gpus"]) == 2
    assert f"at least two GPUs, so nothing was measured; found {count}" in capsys.readouterr().err


def test_a_process_that_fails_is_reported(monkeypatch):
    """All processes end, and what they printed is in the error."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CommandError, match=r"(?s)a process failed.*\nrank [01], status 1: "):
        bench_gpus.measure(bench_gpus.cases(), 2)


@pytest.mark.gpu
def test_processes_with_a_gpu_each_are_measured(nccl):
    """With one process the same program runs on one GPU."""
    shapes = [((1,), (1 << 18,), "keys"), ((64,), (1 << 17,), "keys"), ((64,), (1 << 17,), "rows")]
    wanted = [Case("gpus", 64, new, keys, data=data) for new, keys, data in shapes]
    rows = bench_gpus.measure(wanted, 1)
    assert [row["shape"] for row in rows] == [case.name for case in wanted]
    parts = ("one_us", "us", "local_us", "gather_us", "merge_us", "local64_us", "merge64_us")
    assert all(row[name] > 0 for row in rows for name in parts)
