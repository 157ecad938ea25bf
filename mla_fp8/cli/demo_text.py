"""Text processing of the demo: passages, words, and 128-channel vectors for words.

The vector of a word is a sum of nearly orthogonal unit vectors. They are hashed from the word's
character n-grams (five values of n), from the word and its predecessor, from its neighbours, and
from its heading.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mla_fp8.cli.command import CommandError

DEPTH = 128
SPELLING = {3: 0.8, 4: 0.6, 5: 0.4, 6: 0.4, 99: 0.4}  # n of the n-grams: weight of their head
HEADS = [*SPELLING.values(), 0.4, 0.7, 0.6]  # weights; the last are pair, context and heading
DECAY = 0.93  # of a neighbour's weight in the context, per word of distance
REACH = 256  # words; beyond them a neighbour's weight is negligible: 0.93 ** 256 < 1e-8
SHARES = (0.1, 0.2, 0.3, 0.4)  # of the text in each sequence
LONGEST = 32768  # words in a sequence; it bounds the memory for keys as floats
LARGEST = 16 << 20  # bytes of a text file
JOIN, CUT = 25, 110  # words: shorter paragraphs are joined, longer ones are cut between lines

# Scripts without spaces: Thai and Lao, Burmese, Khmer, kana, Han. In these scripts every pair of
# adjacent characters is a word. In other scripts a word is a run of at most 64 letters.
_DENSE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"(?=([{_DENSE}]{{1,2}}))[{_DENSE}]|[^\W{_DENSE}]{{1,64}}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；])")
_RULE = re.compile(r"\s*[+|]?[-=*~^#\"+|]{3,}\s*")  # below a heading, or inside a table
# Words that carry no content.
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
    """A few sentences and their place in the text."""

    source: str
    heading: str
    line: int
    text: str


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where each word of ``text`` begins and ends."""
    return [match.span(1 if match[1] else 0) for match in _WORD.finditer(text)]


def words_of(text: str) -> list[str]:
    """The words of ``text``, in lower case."""
    return [text[begin:end].lower() for begin, end in word_spans(text)]


def _pieces(line: str) -> Iterator[str]:
    """A line, cut after sentences if it has more than CUT words, and sentences between words."""
    if len(word_spans(line)) <= CUT:
        yield line
        return
    for sentence in _SENTENCE_END.split(line):
        begins = [begin for begin, _ in word_spans(sentence)]
        for begin, end in pairwise([0, *begins[CUT::CUT], len(sentence)]):
            yield sentence[begin:end]


def split_passages(source: str, text: str) -> list[Passage]:
    """Cut a text at headings and blank lines, and long paragraphs between lines or sentences."""
    passages: list[Passage] = []
    lines = [*text.splitlines(), ""]
    heading, first, count = source, 1, 0
    kept: list[str] = []

    def end_passage() -> None:
        nonlocal count
        if count:
            passages.append(Passage(source, heading, first, " ".join(kept)))
        kept.clear()
        count = 0

    for number, line in enumerate(lines, 1):
        is_last = number == len(lines)
        underlined = not is_last and _RULE.fullmatch(lines[number])
        title = re.match(r"# |\w|\"", line) and (line.startswith("# ") or underlined)
        blank = not line.strip()
        if title or is_last or (blank and count >= JOIN and not kept[-1].endswith(":")):
            end_passage()
        if title:
            heading = line.strip("# ")[:80]
        elif not blank and not _RULE.fullmatch(line):
            for piece in _pieces(line.replace("|", " ")):
                if count >= CUT:
                    end_passage()
                first = first if kept else number
                kept += piece.split()
                count += len(word_spans(piece))
    return passages


def _read(path: Path) -> str:
    """The text of a UTF-8 file, or a `CommandError` that says why it cannot be used."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise CommandError(f"--text can't be read: {error}") from None
    if len(content) > LARGEST:
        raise CommandError(f"--text must have at most {LARGEST >> 20} MiB; {path} has more")
    try:
        if (at := content.find(0)) >= 0:
            raise CommandError(f"--text must be a text in UTF-8; {path} has a NUL byte at {at}")
        return unicodedata.normalize("NFC", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CommandError(
            f"--text must be a text in UTF-8; {path} is not at byte {error.start} "
            "(iconv converts other encodings)"
        ) from None


def load_passages(path: Path | None) -> list[Passage]:
    """The passages of a text file or, without a path, of the reference that CPython ships."""
    if path is not None:
        return split_passages(path.name, _read(path))
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CommandError(
            "this Python ships no pydoc_data.topics: name a text by --text"
        ) from None
    seen: set[str] = set()  # long topics repeat short ones: the shortest topic keeps a passage
    kept: dict[str, list[Passage]] = {}
    for name in sorted(topics, key=lambda name: len(topics[name])):
        kept[name] = [p for p in split_passages(name, topics[name]) if p.text not in seen]
        seen.update(p.text for p in kept[name])
    return [passage for name in topics for passage in kept[name]]


def split_sequences(passages: list[Passage], starts: np.ndarray) -> list[list[Passage]]:
    """Split the passages into sequences of unequal length, between sources where possible.

    A sequence of more than about LONGEST words is split further.
    """
    inner = range(1, len(passages))
    borders = [i for i in inner if passages[i].source != passages[i - 1].source] or inner
    wanted: list[float] = []
    for share in SHARES:
        parts = max(1, -(-int(share * starts[-1]) // LONGEST))
        wanted += [share / parts * starts[-1]] * parts
    at = np.cumsum(wanted[:-1])
    cuts = {min(borders, key=lambda i: abs(starts[i] - w)) for w in at if borders}
    edges = [0, *sorted(cuts), len(passages)]
    return [passages[a:b] for a, b in pairwise(edges)]


def _stem(word: str) -> str:
    return word.strip("_")[:4] or word


def _codes(grams: list[str]) -> np.ndarray:
    """Unit vectors [grams, 128] whose signs are the bits of hashes."""
    size = DEPTH // 8
    hashes = b"".join(hashlib.blake2b(g.encode(), digest_size=size).digest() for g in grams)
    bits = np.unpackbits(np.frombuffer(hashes, np.uint8).reshape(-1, size), axis=1)
    return (2 * bits.astype(np.float32) - 1) / np.float32(DEPTH**0.5)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-6))


def _spelled(n: int, words: list[str]) -> np.ndarray:
    """Unit vectors [words, 128] of the words' n-grams. A word is marked as <word> first."""
    marked = [f"<{word}>" for word in words]
    grams = [[f"{n} {m[i : i + n]}" for i in range(max(1, len(m) - n + 1))] for m in marked]
    counts = np.array([len(of_word) for of_word in grams])
    codes = _codes(list(chain.from_iterable(grams)))
    return _unit(np.add.reduceat(codes, np.cumsum(counts) - counts, axis=0))


def _each(words: list[str], vectors: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """The vectors of words, computed once per distinct word."""
    numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return vectors(list(numbers))[[numbers[word] for word in words]]


class Embedding:
    """Keys and queries for words. The fewer passages contain a word, the more it weighs."""

    def __init__(self, passages: list[Passage]) -> None:
        self._passages = len(passages)
        self._spread = Counter(stem for p in passages for stem in set(map(_stem, words_of(p.text))))

    def rarity(self, word: str) -> float:
        """Inverse document frequency: 1 for an unknown word, and a tenth for stop words."""
        rarity = np.log1p(self._passages / (self._spread[_stem(word)] + 0.5))
        return float(rarity / np.log1p(2 * self._passages) * (0.1 if word in STOP_WORDS else 1))

    def parts(self, passages: list[Passage]) -> Iterator[np.ndarray]:
        """Yield the part of the vectors that each head asks for: unit vectors [words, 128]."""
        words_each = [words_of(p.text) for p in passages]
        words = list(chain.from_iterable(words_each))
        for n in SPELLING:
            yield _each(words, partial(_spelled, n))
        yield self._pairs(words)
        yield self._context(words)
        headings = _each([p.heading for p in passages], self._headings)
        yield np.repeat(headings, [len(each) for each in words_each], axis=0)

    def keys(self, passages: list[Passage]) -> np.ndarray:
        """Keys [words, 128] of consecutive passages: the weighted sum of all parts."""
        parts = zip(HEADS, self.parts(passages), strict=True)
        return np.asarray(sum(np.float32(weight) * part for weight, part in parts))

    def queries(self, passage: Passage) -> tuple[np.ndarray, np.ndarray]:
        """Queries [words, 8, 128] and gates [words, 8]."""
        rarity = np.array([self.rarity(word) for word in words_of(passage.text)])
        gates = rarity[:, None] ** 0.75 * np.array(HEADS)
        return np.stack(list(self.parts([passage])), axis=1), gates.astype(np.float32)

    def _rare(self, words: list[str], prefix: str) -> np.ndarray:
        rarity = np.array([self.rarity(word) for word in words], np.float32)
        codes = _codes([f"{prefix} {_stem(word)}" for word in words])
        return np.asarray(rarity[:, None] * codes)

    def _headings(self, headings: list[str]) -> np.ndarray:
        found = [self._rare(words_of(heading) or [""], "topic").sum(axis=0) for heading in headings]
        return _unit(np.stack(found))

    def _pairs(self, words: list[str]) -> np.ndarray:
        pairs = np.zeros((len(words), DEPTH), np.float32)
        content = [i for i, word in enumerate(words) if word not in STOP_WORDS]
        stems = [_stem(words[i]) for i in content]
        if len(content) > 1:
            pairs[content[1:]] = _codes([f"pair {a} {b}" for a, b in pairwise(stems)])
        return pairs

    def _context(self, words: list[str]) -> np.ndarray:
        """The sum of each word's neighbours, weighted by DECAY per word of distance."""
        own = _each(words, lambda some: self._rare(some, "context"))
        left, right = own.copy(), own.copy()
        step = 1
        while step < min(REACH, len(words)):  # the sums have `step` terms, and then twice as many
            left[step:] += np.float32(DECAY**step) * left[:-step]
            right[:-step] += np.float32(DECAY**step) * right[step:]
            step *= 2
        return _unit(left + right - own)
