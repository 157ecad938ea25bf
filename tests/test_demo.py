"""The demo finds what a text says."""

import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mla_fp8.__main__ import main
from mla_fp8.cli import demo, demo_text
from mla_fp8.cli.command import CommandError, Console

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
        (["--text", "empty.txt"], "--text must hold words"),
        (["--text", "dots.txt"], "--text must hold words"),
        (["--text", "missing.txt"], "--text can't be read: .*missing.txt"),
        (["--text", "."], "--text can't be read: .*directory"),
        (["--text", "gbk.txt"], "--text must be a text in UTF-8; gbk.txt is not at byte 0 "),
        (
            ["--text", "binary.bin"],
            "--text must be a text in UTF-8; binary.bin has a NUL byte at 4",
        ),
        (["--text", "large.txt"], "--text must have at most 16 MiB; large.txt has more"),
        (["--query", ""], "--query must hold words"),
        (["--query", "?!"], "--query must hold words"),
        (["--query", "bread \udcff"], "--query must be a text"),
        (["-k", "0"], "-k must be 1 to 65536; got 0"),
        (["-k", "65537"], "-k must be 1 to 65536; got 65537"),
        (["--page-size", "0"], "--page-size must be 1 to 65536; got 0"),
        (["--page-size", "100000000000"], "--page-size must be 1 to 65536; got 1000"),
        (["--top", "0"], "--top must be 1 to 1000; got 0"),
        (["--plot", "nowhere/x.png"], "--plot can't be written: .*nowhere/x.png"),
        (["--plot", "."], "--plot can't be written: .*directory"),
    ],
)
def test_bad_input_exits_with_a_message_and_no_plot(
    capsys, monkeypatch, tmp_path, text, arguments, message
):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "look", None)  # none of the work is begun
    Path("empty.txt").touch()
    Path("dots.txt").write_text("... --- ...\n", encoding="utf-8")
    Path("gbk.txt").write_bytes("蜜蜂把蜂蜜储存在哪里".encode("gbk"))
    Path("binary.bin").write_bytes(b"\x7fELF\0\0\0")
    with Path("large.txt").open("wb") as file:
        file.truncate(demo_text.LARGEST + 1)
    before = sorted(tmp_path.iterdir())
    command = ["demo", "--text", str(text), "--plot", "plot.png", *arguments]  # the last one counts
    assert main(command) == 2
    assert sorted(tmp_path.iterdir()) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"mla_fp8 demo: {message}.*\n", printed.err)


def test_plot_without_matplotlib_exits_with_a_message(monkeypatch, tmp_path, text):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CommandError, match="pip install matplotlib"):
        demo.run("bread", text, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("name", ["plot.png", "plot", "plot.dat"])
def test_a_plot_has_the_name_and_holds_the_signs_it_was_given(capsys, tmp_path, name):
    """Whatever the name's end; and a heading may hold what Matplotlib takes for mathematics."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "text.txt"
    path.write_text("# 蜂 costs $x^{$\n\nbees store honey\n", encoding="utf-8")
    demo.run("honey 蜂蜜", path, tmp_path / name)
    assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, "text.txt"])


def test_brackets_are_no_markup(capsys, tmp_path):
    path = tmp_path / "[bold]text[red].txt"
    path.write_text("bees store [red]honey[/]", encoding="utf-8")
    demo.run("[/b] where [i]is honey", path)
    printed = capsys.readouterr().out
    assert "[/b] where [i]is honey" in printed
    assert rows(printed)[0][2].startswith("[bold]text[red].txt: ")
    assert rows(printed)[0][3] == "bees store [red]honey[/]"


CHINESE = {
    "蜜蜂把蜂蜜存放在哪里": (
        "工蜂把花蜜带回蜂巢，经过反复酿造以后，把成熟的蜂蜜存放在六角形的蜡质巢房里。"
    ),
    "灯塔怎样警告船只": (
        "在多岩石的海岸上，灯塔用旋转的透镜警告靠近的船只，光束按照一定的节奏扫过海面。"
    ),
    "面团为什么会发酵": (
        "酵母把糖分解成二氧化碳，气泡留在面团里，面团因此发酵膨胀，直到烤箱使它定型。"
    ),
}


def test_chinese_without_a_space_or_a_line_break_has_passages(capsys, tmp_path):
    filler = "山谷里的村庄很安静，人们早晨起来就去田里工作，傍晚回家吃饭，然后坐在门口谈天。" * 20
    path = tmp_path / "chinese.txt"
    path.write_text("".join(passage + filler for passage in CHINESE.values()), encoding="utf-8")
    passages = demo_text.load_passages(path)
    assert len(passages) > 12
    assert max(len(passage.text) for passage in passages) < 3 * demo_text.CUT
    for question, passage in CHINESE.items():
        assert main(["demo", "--text", str(path), "--query", question, "-k", "16"]) == 0
        best = rows(capsys.readouterr().out)[0][3].replace(" ", "")
        assert passage[15:] in best  # the rest is cut off, a little before the first hit


def test_words_of_scripts_with_and_without_spaces():
    words = demo_text.words_of("İstanbul'da 机器学习 GPU, 深 ภาษา")
    assert words[:1] == ["i̇stanbul"]
    assert words[1:8] == ["da", "机器", "器学", "学习", "习", "gpu", "深"]
    text = "İİ x"  # lower case has more characters than the text
    assert [text[a:b] for a, b in demo_text.word_spans(text)] == ["İİ", "x"]
    assert max(map(len, demo_text.words_of("a" * 1000))) == 64
    assert len(demo_text.words_of("가나다 라마바")) == 2


@pytest.mark.parametrize(
    "text",
    ["word " * 5000, "Bees store honey in wax cells. " * 900, "蜜蜂" * 2500, "a" * 300_000],
    ids=["words", "sentences", "Chinese", "one word"],
)
def test_one_long_line_is_cut_by_length(text):
    passages = demo_text.split_passages("line", text)
    counts = [len(demo_text.words_of(passage.text)) for passage in passages]
    assert sum(counts) >= len(demo_text.words_of(text))
    assert len(passages) >= sum(counts) / (2 * demo_text.CUT)
    assert max(counts) <= 2 * demo_text.CUT + 1
    assert {passage.line for passage in passages} == {1}


def test_a_long_text_is_held_in_floats_a_sequence_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_text, "LONGEST", 500)
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(900)]
    lines = [" ".join(rng.choice(words, 60)) for _ in range(200)]
    lines[150] += " needle"
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    held = []

    class Watched(demo_text.Embedding):
        def keys(self, passages):
            found = super().keys(passages)
            held.append(len(found))
            return found

    monkeypatch.setattr(demo, "Embedding", Watched)
    found = []
    monkeypatch.setattr(demo, "report", lambda *given: found.append(given) or "")
    demo.run("needle", path)
    assert len(held) > 200 * 60 / 500
    assert max(held) <= 2 * 500
    _, sequences, _, answers = found[0]
    passages = [passage for sequence in sequences for passage in sequence]
    assert "needle" in passages[answers[0].passage].text


def test_old_gpus_are_left_to_numpy(capsys, monkeypatch, text, old_gpu):
    device = SimpleNamespace(Device=lambda: SimpleNamespace(id=0))
    old = SimpleNamespace(is_available=lambda: True, ndarray=(), cuda=device)
    monkeypatch.setitem(sys.modules, "cupy", old)
    demo.run("bread", text)
    assert "backend: NumPy (mla_fp8 needs compute capability 8.0" in capsys.readouterr().out


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
    passages = demo_text.load_passages(text)
    lengths = [len(demo_text.words_of(passage.text)) for passage in passages]
    starts = np.cumsum(lengths) - lengths
    sequences = demo_text.split_sequences(passages, starts)
    assert len(sequences) > 1
    question = "bread dough rise"
    hits, _ = demo.look(sequences, demo_text.Embedding(passages), question, 4096, 16, Console())
    seen = sorted(zip(hits.token.tolist(), hits.position.tolist(), strict=True))
    assert seen == [(token, at) for token in range(3) for at in range(sum(lengths))]
    words = [word for passage in passages for word in demo_text.words_of(passage.text)]
    for token, word in enumerate(demo_text.words_of(question)):
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
