"""The demo finds what a text says, and the example scripts run."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mla_fp8 import demo
from mla_fp8.__main__ import main

ROOT = Path(__file__).parents[1]

# A question and the passage that answers it; each passage has enough words to stand alone.
PASSAGES = {
    "where do bees store honey": """\
Worker bees carry nectar back to the hive and store the ripened honey in hexagonal wax cells, which
they seal with a lid once enough water has evaporated from it over several warm days.""",
    "how does a lighthouse warn ships": """\
On a rocky coast the lighthouse warns approaching ships by a rotating lens, whose beam sweeps the
horizon in a rhythm that sailors look up on their charts to tell one tower from another.""",
    "why does bread dough rise": """\
Yeast ferments sugar into carbon dioxide, and the trapped bubbles make bread dough rise until the
oven sets its gluten into a crumb; a cold kitchen merely slows the rising down overnight.""",
    "when do glaciers calve icebergs": """\
Where glaciers reach the sea their fronts crack, and in the summer months they calve icebergs that
drift away on the current and melt slowly in latitudes far from the valley they came from.""",
    "who tunes a church organ": """\
Twice a year a craftsman climbs into the loft and tunes the church organ pipe by pipe, bending small
metal tongues while an assistant holds down one key after another at the console below.""",
}


@pytest.fixture(autouse=True)
def _wide_and_plain(monkeypatch):
    """Tables without wrapped cells or colours, whatever terminal or CI the tests run in."""
    monkeypatch.setenv("COLUMNS", "2000")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(PASSAGES.values()), encoding="utf-8")
    return path


def rows(printed):
    """The rows of the printed table: number, score, place and passage."""
    lines = [line for line in printed.splitlines() if re.match(r"│ +\d+ +│", line)]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def hide_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # an import raises ImportError


@pytest.mark.parametrize("question", PASSAGES)
def test_finds_the_planted_passage(xp, capsys, monkeypatch, text, question):
    if xp is np:
        hide_cupy(monkeypatch)
    # Fewer keys than words, and pages that divide nothing: not everything is selected anyway.
    arguments = ["--text", str(text), "--query", question, "-k", "8", "--page-size", "7"]
    assert main(["demo", *arguments, "--top", "2"]) == 0
    printed = capsys.readouterr().out
    first, second = rows(printed)
    passage = PASSAGES[question]
    assert first[0] == "1"
    assert first[3] == " ".join(passage.split())
    assert float(first[1]) > float(second[1])
    line = text.read_text(encoding="utf-8").split(passage)[0].count("\n") + 1
    assert f"text.txt: text.txt, line {line} " in first[2]
    assert "pages of 7; top 8 keys" in printed
    expected = r"NumPy \(no CuPy found\)" if xp is np else r"CuPy on .+"
    assert re.search(rf"^backend: {expected}; ", printed, re.MULTILINE)


def test_says_when_cupy_has_no_gpu(capsys, monkeypatch, text):
    without_gpu = SimpleNamespace(is_available=lambda: False, ndarray=())
    monkeypatch.setitem(sys.modules, "cupy", without_gpu)
    demo.run("bread", text)
    assert "backend: NumPy (no GPU found); " in capsys.readouterr().out


def test_default_text_answers_the_default_question(capsys):
    assert main(["demo"]) == 0
    found = rows(capsys.readouterr().out)
    assert len(found) == demo.DEFAULT_TOP
    assert "evaluated from left to right" in found[0][3]


@pytest.mark.parametrize("words", ["Zebras graze.", "zebras"])
def test_a_single_short_passage(capsys, tmp_path, words):
    path = tmp_path / "short.txt"
    path.write_text(words, encoding="utf-8")
    demo.run("do zebras graze", path)
    printed = capsys.readouterr().out
    assert [row[3] for row in rows(printed)] == [words]
    assert f"{len(words.split())} tokens in 1 sequence" in printed


def test_stop_words_alone_are_a_question(capsys, text):
    demo.run("why does it", text)
    assert rows(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "empty.txt"], "must hold words"),
        (["--text", "dots.txt"], "must hold words"),
        (["--text", "missing.txt"], "cannot read the text: .*missing.txt"),
        (["--text", "."], "cannot read the text"),
        (["--query", ""], "must hold words"),
        (["--query", "?!"], "must hold words"),
        (["-k", "0"], "k must be 1 to 65536"),
        (["-k", "65537"], "k must be 1 to 65536"),
        (["--page-size", "0"], "page_size and top at least 1"),
        (["--top", "0"], "page_size and top at least 1"),
    ],
)
def test_bad_input_exits_with_a_message_and_no_plot(
    capsys, monkeypatch, tmp_path, text, arguments, message
):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("dots.txt").write_text("... --- ...\n", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=message):
        main(["demo", "--text", str(text), "--plot", "plot.png", *arguments])  # the last one counts
    assert sorted(tmp_path.iterdir()) == before
    assert capsys.readouterr().out == ""


def test_plot_without_matplotlib_exits_with_a_message(monkeypatch, tmp_path, text):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        demo.run("bread", text, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_plot_is_a_png_that_marks_the_answers(capsys, tmp_path, text):
    pytest.importorskip("matplotlib")
    from matplotlib import colors, image

    path = tmp_path / "plot.png"
    assert main(["demo", "--text", str(text), "--query", "bread dough", "--plot", str(path)]) == 0
    assert rows(capsys.readouterr().out)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 0
    assert height > 0
    pixels = image.imread(path)
    assert pixels.shape[:2] == (height, width)
    for name in ("crimson", "C0", "C1"):  # the answers' marks; a colour for each asked word's keys
        near = np.abs(pixels[..., :3] - colors.to_rgb(name)) < 0.1  # thin lines are blended
        assert near.all(axis=-1).any(), name


def test_look_reports_every_key_of_the_text_and_none_of_the_question(text):
    passages = demo.load_passages(text)
    lengths = [len(demo.words_of(passage.text)) for passage in passages]
    starts = np.cumsum(lengths) - lengths
    sequences = demo.split_sequences(passages, starts)
    assert len(sequences) > 1
    question = "bread dough rise"
    hits, _ = demo.look(sequences, demo.Embedding(passages), question, 4096, 16)
    seen = sorted(zip(hits.token.tolist(), hits.position.tolist(), strict=True))
    assert seen == [(token, at) for token in range(3) for at in range(sum(lengths))]
    words = [word for passage in passages for word in demo.words_of(passage.text)]
    for token, word in enumerate(demo.words_of(question)):
        mine = hits.token == token
        assert words[hits.position[mine][hits.score[mine].argmax()]] == word


def test_rank_adds_the_best_score_of_each_content_word():
    hits = demo.Hits(
        token=np.array([0, 1, 1, 1, 2, 2]),
        position=np.array([0, 1, 2, 12, 13, 25]),
        score=np.array([9.0, 1.0, 2.0, 1.5, 1.0, 0.5], np.float32),
    )
    ranked = demo.rank(hits, ["why", "bread", "rises"], np.array([0, 10, 20]))
    assert ranked == [(1, 2.5, {12, 13}), (0, 2.0, {2}), (2, 0.5, {25})]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("quickstart.py", r"token 3 by hand: key \d+ \(\d+\.\d+\)"),
        ("decode_loop.py", r"│ 12 +│ 1356 +│ 8 of 8, 8 of 8, 8 of 8 │"),
    ],
    ids=["quickstart", "decode_loop"],
)
def test_example_runs(tmp_path, script, expected):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUTF8": "1"},
        cwd=tmp_path,  # what they need is installed, not lying about
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(expected, run.stdout), run.stdout
