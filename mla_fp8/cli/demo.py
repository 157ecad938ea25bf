"""``python -m mla_fp8 demo``: ask a text a question and see which keys the indexer selects.

Every word of the text becomes a 128-channel key, the sum of eight parts (`mla_fp8.cli.demo_text`),
and each of eight query heads asks for one part. The text is split into the sequences of a paged FP8
cache. The question is appended to each sequence as new tokens. The passages with the best keys for
the question's words are the answer.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track
from rich.table import Table
from rich.text import Text

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8
from mla_fp8.cli.command import CommandError, Console, check_int, check_output
from mla_fp8.cli.demo_text import (
    DEPTH,
    HEADS,
    STOP_WORDS,
    Embedding,
    Passage,
    load_passages,
    split_sequences,
    word_spans,
    words_of,
)

DEFAULT_QUERY = "how are default parameter values evaluated"
DEFAULT_K = 256
DEFAULT_PAGE_SIZE = 64
DEFAULT_TOP = 3
EXCERPT = 60  # words


class Hits(NamedTuple):
    """The selected keys, one entry each."""

    token: np.ndarray  # word of the question
    position: np.ndarray  # word of the text
    score: np.ndarray


class Answer(NamedTuple):
    """A passage that answers the question."""

    passage: int  # its number
    score: float
    positions: set[int]  # the words of the text whose keys earned the score


def _backend() -> tuple[Any, str]:
    """The array module to use, numpy or cupy, and a description of it."""
    try:
        import cupy
    except ImportError:
        return np, "NumPy (no CuPy found)"
    if not cupy.is_available():
        return np, "NumPy (no GPU found)"
    from mla_fp8._cuda import backend

    try:
        backend.device_facts(cupy.cuda.Device().id)
    except RuntimeError as error:  # too old
        return np, f"NumPy ({error})"
    gpu = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return cupy, f"CuPy on {gpu['name'].decode()}"


def look(
    sequences: list[list[Passage]],
    embedding: Embedding,
    question: str,
    k: int,
    page_size: int,
    console: Console,
) -> tuple[Hits, str]:
    """Select keys for the question in every sequence; return them and a summary of the run."""
    xp, backend = _backend()
    batch = len(sequences)
    cache = PagedKeyCache(batch, DEPTH, page_size=page_size, xp=xp)
    new = [xp.empty((0, DEPTH), np.float32)] * batch
    indexing = track(sequences, "Indexing", console=console, disable=not console.is_terminal)
    for i, sequence in enumerate(indexing):  # one at a time, so that only one is held as floats
        cache.append([*new[:i], xp.asarray(embedding.keys(sequence)), *new[i + 1 :]])
    lengths = cache.lengths
    query = Passage("question", question, 1, question)
    asked = embedding.keys([query])
    cache.append([xp.asarray(asked)] * batch)  # the question's words are the new tokens
    queries, gates = (np.concatenate([a] * batch) for a in embedding.queries(query))
    q, q_scales = fp8.quantize(xp.asarray(queries))
    qs = xp.asarray(gates) * q_scales[..., 0]
    op = MLAIndexerRaggedFloat8Paged(len(HEADS), DEPTH, k, quantization_granularity=DEPTH)
    for _ in range(1 if xp is np else 2):  # the first call on a GPU compiles
        start = time.perf_counter()
        found = op(q, qs, cache.input_row_offsets, *cache.view(), return_scores=True, sort="score")
        indices, scores = found if xp is np else (array.get() for array in found)
        seconds = time.perf_counter() - start
    of_row = np.repeat(np.arange(batch), len(asked))
    row, column = np.nonzero((indices >= 0) & (indices < lengths[of_row, None]))
    position = indices[row, column] + (np.cumsum(lengths) - lengths)[of_row[row]]
    pages = int(np.sum(-(-cache.lengths // page_size)))
    return Hits(row % len(asked), position, scores[row, column]), (
        f"backend: {backend}; {lengths.sum()} tokens in {batch} sequences on {pages} pages of "
        f"{page_size}; top {k} keys of {len(indices)} query tokens in {1e3 * seconds:.1f} ms"
    )


def rank(hits: Hits, words: list[str], starts: np.ndarray) -> list[Answer]:
    """Rank passages by the sum, over the question's content words, of the best score in each."""
    content = [word not in STOP_WORDS for word in words]
    content = content if any(content) else [True] * len(words)
    passage = np.searchsorted(starts, hits.position, side="right") - 1
    best: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for i in np.argsort(hits.score, kind="stable"):  # the best score is written last
        if content[hits.token[i]]:
            best[int(passage[i])][hits.token[i]] = i
    answers = []
    for number, chosen in best.items():
        at = list(chosen.values())
        answers.append(Answer(number, float(hits.score[at].sum()), set(hits.position[at].tolist())))
    return sorted(answers, key=lambda answer: (-answer.score, answer.passage))


def excerpt(text: str, marked: set[int]) -> Text:
    """Part of a passage, from 12 words before the first marked word, with marked words in bold."""
    spans = word_spans(text)
    shown = Text(text)
    for i in marked:
        shown.stylize("bold green", *spans[i])
    first = max(0, int(min(marked)) - 12) if len(spans) > EXCERPT else 0
    last = min(first + EXCERPT, len(spans)) - 1
    end = spans[last][1] if last + 1 < len(spans) else len(text)
    cut = shown[spans[first][0] if first else 0 : end]
    return Text.assemble("… " * (first > 0), cut, " …" * (end < len(text)))


def report(
    query: str, sequences: list[list[Passage]], starts: np.ndarray, answers: list[Answer]
) -> Table:
    """The best passages as a table."""
    passages = [(p, number) for number, part in enumerate(sequences, 1) for p in part]
    table = Table("", "score", "where", "passage", title=Text(query), show_lines=True)
    for place, answer in enumerate(answers, 1):
        passage, sequence = passages[answer.passage]
        where = f"{passage.source}: {passage.heading}, line {passage.line} (sequence {sequence})"
        marked = {position - int(starts[answer.passage]) for position in answer.positions}
        table.add_row(str(place), f"{answer.score:.2f}", Text(where), excerpt(passage.text, marked))
    return table


def draw(
    path: Path, hits: Hits, words: list[str], borders: np.ndarray, marks: dict[int, str]
) -> None:
    """Draw the positions and scores of the selected keys, one row per word of the question."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2 + 0.6 * len(words)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlim=(0, borders[-1]), ylim=(len(words) - 0.8, -1))
    axes.set(xlabel="position in the text (words)", ylabel="word of the question")
    axes.set_yticks(range(len(words)), words)
    for token in range(len(words)):
        chosen = hits.token == token
        height = 0.85 * hits.score[chosen] / hits.score.max(initial=1e-6)
        axes.vlines(hits.position[chosen], token - height, token, color=f"C{token % 10}", lw=0.9)
        axes.axhline(token, color="0.8", linewidth=0.6, zorder=0)
    for number, (begin, end) in enumerate(pairwise([0, *borders]), 1):
        axes.axvline(end, color="black", linewidth=1)
        axes.text((begin + end) / 2, len(words) - 0.85, f"sequence {number}", ha="center")
    for place, (position, label) in enumerate(marks.items(), 1):
        axes.axvline(position, color="crimson", linewidth=1, linestyle=":")
        side = "left" if position < borders[-1] / 2 else "right"
        axes.annotate(
            f"{place}: {label}",
            (position, 1),
            (0, 4 + 12 * (len(marks) - place)),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color="crimson",
            ha=side,
            parse_math=False,
        )
    with warnings.catch_warnings():  # Matplotlib's font lacks some characters
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=150, format="png")


def run(
    query: str = DEFAULT_QUERY,
    text: Path | None = None,
    plot: Path | None = None,
    k: int = DEFAULT_K,
    page_size: int = DEFAULT_PAGE_SIZE,
    top: int = DEFAULT_TOP,
) -> None:
    """Ask a text a question and print the passages that hold the indexer's top keys.

    Parameters
    ----------
    query : str
        The question.
    text : Path, optional
        A text file; by default the language reference that CPython ships.
    plot : Path, optional
        Where to write a picture of the selected keys; needs matplotlib.
    k : int
        Keys to select per word of the question in each sequence.
    page_size : int
        Tokens per page of the cache.
    top : int
        Passages to print.

    Raises
    ------
    CommandError
        If the question or the text has no words, the text cannot be read, a number is out of
        range, the picture cannot be written, or matplotlib is missing.
    """
    check_int("-k", k, range(1, 65537))
    check_int("--page-size", page_size, range(1, 65537))
    check_int("--top", top, range(1, 1001))
    if plot is not None:
        check_output("--plot", plot)
        if find_spec("matplotlib") is None:
            raise CommandError("--plot needs matplotlib: pip install matplotlib")
    try:
        query.encode()
    except UnicodeEncodeError:
        raise CommandError("--query must be a text in UTF-8") from None
    words = words_of(query)
    if not words:
        raise CommandError("--query must hold words")
    console = Console()
    with console.status("Reading"):
        passages = load_passages(text)
        if not passages:
            raise CommandError("--text must hold words")
        starts = np.cumsum([0, *(len(word_spans(p.text)) for p in passages)])
        sequences = split_sequences(passages, starts[:-1])
        embedding = Embedding(passages)
    hits, how = look(sequences, embedding, query, k, page_size, console)
    answers = rank(hits, words, starts[:-1])[:top]
    console.print(report(query, sequences, starts, answers))
    console.print(how, highlight=False, markup=False)
    if plot is not None:
        borders = starts[np.cumsum([len(part) for part in sequences])]
        marks = {int(starts[a.passage]): passages[a.passage].heading for a in answers}
        draw(plot, hits, words, borders, marks)
