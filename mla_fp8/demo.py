"""The demo: ask a text a question, and see where the indexer looks.

Every word of the text becomes a 128-channel key: a sum of nearly orthogonal unit vectors, hashed
from the character n-grams of the word (five families), from the word with its predecessor, from
its neighbourhood and from its heading. Each of eight query heads asks for one of these parts. The
text is dealt out to the sequences of a paged FP8 cache, the question is appended to each of them as
its new tokens, and the passages that hold the best keys of the question's words are the answer.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8

DEFAULT_QUERY = "how are default parameter values evaluated"
DEFAULT_K = 256
DEFAULT_PAGE_SIZE = 64
DEFAULT_TOP = 3

DEPTH = 128
# What each head asks for, and how strongly: first the spelling of a word, then what surrounds it.
SPELLING = {3: 0.8, 4: 0.6, 5: 0.4, 6: 0.4, 99: 0.4}  # by the n-grams' n
HEADS = [*SPELLING.values(), 0.4, 0.7, 0.6]  # then pair, context, heading
DECAY = 0.93  # of a neighbour's part in the context, per word of distance
SHARES = (0.1, 0.2, 0.3, 0.4)  # of the text in each sequence
JOIN, CUT = 25, 110  # words: shorter paragraphs are joined, longer ones are cut between lines
EXCERPT = 60  # words

WORD = re.compile(r"\w+")
RULE = re.compile(r"\s*[+|]?[-=*~^#\"+|]{3,}\s*")  # below a heading, or inside a table
# They tell how something is asked, not what about.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about all an and any are as at be been but by can could did do does e explain for from
        g get gets give had happen happens has have how i if in into is it its let many may me
        mean means my no of on one only or our out over please s should so such t tell than that
        the their them then there these they this to us use used using was way we were what when
        where which who why will with work works would you your
        """,
    )
)


class Passage(NamedTuple):
    """A few sentences, and where they stand."""

    source: str
    heading: str
    line: int
    text: str


class Hits(NamedTuple):
    """The chosen keys, one entry each: word of the question, word of the text, score."""

    token: np.ndarray
    position: np.ndarray
    score: np.ndarray


class Answer(NamedTuple):
    """A passage's number, its score, and those of its words that earned it."""

    passage: int
    score: float
    positions: set[int]


def words_of(text: str) -> list[str]:
    """The words of ``text``, in lower case."""
    return WORD.findall(text.lower())


def split_passages(source: str, text: str) -> list[Passage]:
    """Cut a text at headings, at blank lines and, in long paragraphs, between lines."""
    passages: list[Passage] = []
    lines = [*text.splitlines(), ""]
    heading, first, kept = source, 1, ""
    for number, line in enumerate(lines, 1):
        count, underlined = (
            len(words_of(kept)),
            number < len(lines) and RULE.fullmatch(lines[number]),
        )
        title = re.match(r"# |\w|\"", line) and (line.startswith("# ") or underlined)
        ended = not line.strip() and count >= JOIN and not kept.endswith(":")
        if count and (title or ended or count >= CUT or number == len(lines)):
            passages.append(Passage(source, heading, first, kept))
            kept = ""
        if title:
            heading = line.strip("# ")
        elif line.strip() and not RULE.fullmatch(line):
            first = first if kept else number
            kept = " ".join([*kept.split(), *line.replace("|", " ").split()])
    return passages


def load_passages(path: Path | None) -> list[Passage]:
    """The passages of a text file, or of the language reference that CPython ships."""
    if path is not None:
        try:
            return split_passages(path.name, path.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise SystemExit(f"cannot read the text: {error}") from None
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise SystemExit("this Python ships no pydoc_data.topics: name a text by --text") from None
    seen: set[str] = set()  # long topics repeat short ones: the shortest keeps a passage
    kept: dict[str, list[Passage]] = {}
    for name in sorted(topics, key=lambda name: len(topics[name])):
        kept[name] = [p for p in split_passages(name, topics[name]) if p.text not in seen]
        seen.update(p.text for p in kept[name])
    return [passage for name in topics for passage in kept[name]]


def split_sequences(passages: list[Passage], starts: np.ndarray) -> list[list[Passage]]:
    """Deal the passages out to sequences of unequal length, between sources where possible."""
    inner = range(1, len(passages))
    borders = [i for i in inner if passages[i].source != passages[i - 1].source] or inner
    wanted = np.cumsum(SHARES[:-1]) * starts[-1]
    cuts = {min(borders, key=lambda i: abs(starts[i] - w)) for w in wanted if borders}
    edges = [0, *sorted(cuts), len(passages)]
    return [passages[a:b] for a, b in pairwise(edges)]


def _stem(word: str) -> str:
    return word.strip("_")[:4] or word


@cache
def _code(gram: str) -> np.ndarray:
    """A unit vector of 128 signs, the bits of a hash."""
    digest = hashlib.blake2b(gram.encode(), digest_size=DEPTH // 8).digest()
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))
    return (2 * bits.astype(np.float32) - 1) / np.float32(DEPTH**0.5)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-6))


def _spelling(n: int, word: str) -> np.ndarray:
    marked = f"<{word}>"
    grams = [marked[i : i + n] for i in range(max(1, len(marked) - n + 1))]
    return _unit(np.sum([_code(f"{n} {gram}") for gram in grams], axis=0))


def _each(words: list[str], vector: Callable[[str], np.ndarray]) -> np.ndarray:
    vectors = {word: vector(word) for word in set(words)}
    return np.stack([vectors[word] for word in words])


class Embedding:
    """Words to keys and queries; words that few passages have count for more."""

    def __init__(self, passages: list[Passage]) -> None:
        self._passages = len(passages)
        self._spread = Counter(stem for p in passages for stem in set(map(_stem, words_of(p.text))))

    def rarity(self, word: str) -> float:
        """Inverse document frequency, 1 for an unknown word; a tenth of it for a stop word."""
        rarity = np.log1p(self._passages / (self._spread[_stem(word)] + 0.5))
        return float(rarity / np.log1p(2 * self._passages) * (0.1 if word in STOP_WORDS else 1))

    def parts(self, passages: list[Passage]) -> Iterator[np.ndarray]:
        """For each head what it asks for and finds: unit vectors [words, 128]."""
        words = [word for p in passages for word in words_of(p.text)]
        for n in SPELLING:
            yield _each(words, partial(_spelling, n))
        yield self._pairs(words)
        yield self._context(words)
        headings = [_each(words_of(p.heading) or [""], self._topic).sum(axis=0) for p in passages]
        yield np.repeat(
            _unit(np.stack(headings)), [len(words_of(p.text)) for p in passages], axis=0
        )

    def keys(self, passages: list[Passage]) -> np.ndarray:
        """Keys [words, 128] of consecutive passages: all parts in one vector."""
        parts = zip(HEADS, self.parts(passages), strict=True)
        return np.asarray(sum(np.float32(weight) * part for weight, part in parts))

    def queries(self, passage: Passage) -> tuple[np.ndarray, np.ndarray]:
        """Queries [words, 8, 128], and the gates [words, 8] of their heads."""
        rarity = np.array([self.rarity(word) for word in words_of(passage.text)])
        gates = rarity[:, None] ** 0.75 * np.array(HEADS)
        return np.stack(list(self.parts([passage])), axis=1), gates.astype(np.float32)

    def _topic(self, word: str) -> np.ndarray:
        return np.float32(self.rarity(word)) * _code(f"topic {_stem(word)}")

    def _pairs(self, words: list[str]) -> np.ndarray:
        pairs = np.zeros((len(words), DEPTH), np.float32)
        content = [i for i, word in enumerate(words) if word not in STOP_WORDS]
        for before, i in pairwise(content):
            pairs[i] = _code(f"pair {_stem(words[before])} {_stem(words[i])}")
        return pairs

    def _context(self, words: list[str]) -> np.ndarray:
        own = _each(words, lambda w: np.float32(self.rarity(w)) * _code(f"context {_stem(w)}"))
        left, right = own.copy(), own.copy()
        for i in range(1, len(words)):
            left[i] += DECAY * left[i - 1]
            right[-1 - i] += DECAY * right[-i]
        return _unit(left + right - own)


def _backend() -> tuple[Any, str]:
    try:
        import cupy
    except ImportError:
        return np, "NumPy (no CuPy found)"
    if not cupy.is_available():
        return np, "NumPy (no GPU found)"
    gpu = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return cupy, f"CuPy on {gpu['name'].decode()}"


def look(
    sequences: list[list[Passage]], embedding: Embedding, question: str, k: int, page_size: int
) -> tuple[Hits, str]:
    """Index the question in every sequence; returns the chosen keys, and a line on how it went."""
    xp, backend = _backend()
    keys = [embedding.keys(sequence) for sequence in sequences]
    query = Passage("question", question, 1, question)
    asked = embedding.keys([query])
    cache = PagedKeyCache.from_dense([xp.asarray(key) for key in keys], page_size=page_size)
    cache.append([xp.asarray(asked)] * len(keys))  # the question's words are the new tokens
    queries, gates = (np.concatenate([a] * len(keys)) for a in embedding.queries(query))
    q, q_scales = fp8.quantize(xp.asarray(queries))
    qs = xp.asarray(gates) * q_scales[..., 0]
    op = MLAIndexerRaggedFloat8Paged(len(HEADS), DEPTH, k, quantization_granularity=DEPTH)
    for _ in range(1 if xp is np else 2):  # the first call on a GPU compiles
        start = time.perf_counter()
        found = op(q, qs, cache.input_row_offsets, *cache.view(), return_scores=True, sort="score")
        indices, scores = found if xp is np else (array.get() for array in found)
        seconds = time.perf_counter() - start
    lengths = np.array([len(key) for key in keys])
    sequence = np.repeat(np.arange(len(keys)), len(asked))
    row, column = np.nonzero((indices >= 0) & (indices < lengths[sequence, None]))
    position = indices[row, column] + (np.cumsum(lengths) - lengths)[sequence[row]]
    pages = int(np.sum(-(-cache.lengths // page_size)))
    return Hits(row % len(asked), position, scores[row, column]), (
        f"backend: {backend}; {lengths.sum()} tokens in {len(keys)} sequences on {pages} pages of "
        f"{page_size}; top {k} keys of {len(indices)} query tokens in {1e3 * seconds:.1f} ms"
    )


def rank(hits: Hits, words: list[str], starts: np.ndarray) -> list[Answer]:
    """Passages by the sum of the best score that each content word of the question has in them."""
    content = [word not in STOP_WORDS for word in words]
    content = content if any(content) else [True] * len(words)
    passage = np.searchsorted(starts, hits.position, side="right") - 1
    best: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for i in np.argsort(hits.score, kind="stable"):  # the last one that is written is the best
        if content[hits.token[i]]:
            best[int(passage[i])][hits.token[i]] = i
    answers = []
    for number, chosen in best.items():
        at = list(chosen.values())
        answers.append(Answer(number, float(hits.score[at].sum()), set(hits.position[at].tolist())))
    return sorted(answers, key=lambda answer: (-answer.score, answer.passage))


def excerpt(text: str, marked: set[int]) -> Text:
    """A passage from a little before the first marked word on, with these words in bold."""
    spans = [match.span() for match in WORD.finditer(text)]
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
    table = Table("", "score", "where", "passage", title=query, show_lines=True)
    for place, answer in enumerate(answers, 1):
        passage, sequence = passages[answer.passage]
        where = f"{passage.source}: {passage.heading}, line {passage.line} (sequence {sequence})"
        marked = {position - int(starts[answer.passage]) for position in answer.positions}
        table.add_row(str(place), f"{answer.score:.2f}", where, excerpt(passage.text, marked))
    return table


def draw(
    path: Path, hits: Hits, words: list[str], borders: np.ndarray, marks: dict[int, str]
) -> None:
    """Draw a row for each word of the question: where its top keys are, and how high they score."""
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
        )
    figure.savefig(path, dpi=150)


def run(
    query: str = DEFAULT_QUERY,
    text: Path | None = None,
    plot: Path | None = None,
    k: int = DEFAULT_K,
    page_size: int = DEFAULT_PAGE_SIZE,
    top: int = DEFAULT_TOP,
) -> None:
    """Ask a text a question, and print the passages that the indexer's top keys fall in.

    Parameters
    ----------
    query : str
        The question.
    text : Path, optional
        A text file; by default the language reference that CPython ships.
    plot : Path, optional
        Where to write a picture of where each word of the question looks; needs matplotlib.
    k : int
        Keys per word of the question and sequence.
    page_size : int
        Tokens per page of the cache.
    top : int
        Passages to print.

    Raises
    ------
    SystemExit
        If the question or the text holds no words, the text cannot be read, a number is out of
        range or matplotlib is missing.
    """
    if not 1 <= k <= 65536 or min(page_size, top) < 1:
        raise SystemExit("k must be 1 to 65536; page_size and top at least 1")
    if plot is not None and find_spec("matplotlib") is None:
        raise SystemExit("a plot needs matplotlib: pip install matplotlib")
    words, passages = words_of(query), load_passages(text)
    if not words or not passages:
        raise SystemExit("the question and the text must hold words")
    starts = np.cumsum([0, *(len(words_of(p.text)) for p in passages)])
    sequences = split_sequences(passages, starts[:-1])
    hits, how = look(sequences, Embedding(passages), query, k, page_size)
    answers = rank(hits, words, starts[:-1])[:top]
    console = Console()
    console.print(report(query, sequences, starts, answers))
    console.print(how, highlight=False)
    if plot is not None:
        borders = starts[np.cumsum([len(part) for part in sequences])]
        marks = {int(starts[a.passage]): passages[a.passage].heading for a in answers}
        draw(plot, hits, words, borders, marks)
