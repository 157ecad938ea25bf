"""Draw the pictures of the concepts and how-to pages: ``python docs/pictures.py``.

Each function draws one SVG file of ``docs/pictures/``. Text outside a box has a grey that can be
read on white and on a dark page; text inside a box is white on a dark colour.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
TEXT, LINE = "#727d88", "#727d88"
GREY, GREEN, BLUE, ORANGE = "#57606a", "#3a7d44", "#2862a8", "#a65300"
CELL = 34  # width of a cell in pixels, its margin included


class Picture:
    """An SVG that grows by boxes, texts and arrows."""

    def __init__(self, width: int, height: int, title: str, meaning: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img"',
            '     font-family="Helvetica, Arial, sans-serif" font-size="13">',
            f"  <title>{escape(title)}</title>",
            f"  <desc>{escape(meaning)}</desc>",
            '  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker>'
            "</defs>",
        ]

    def text(self, x: float, y: float, words: object, *, anchor: str = "start", size: int = 13,
             bold: bool = False, fill: str = TEXT) -> None:  # fmt: skip
        """Write words, (x, y) being the start, middle or end of their base line."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'  <text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{weight} '
            f'fill="{fill}">{escape(str(words))}</text>'
        )

    def box(self, x: float, y: float, words: object = "", *, fill: str | None = GREY,
            width: float = CELL - 4, height: float = 26) -> None:  # fmt: skip
        """Draw a box with white words in it, or an empty frame."""
        paint = f'fill="{fill}"' if fill else f'fill="none" stroke="{LINE}" stroke-dasharray="3 2"'
        self.parts.append(
            f'  <rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" {paint}/>'
        )
        if str(words):
            middle = x + width / 2, y + height / 2 + 4.5
            self.text(*middle, words, anchor="middle", fill="#ffffff" if fill else TEXT)

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through the points, with a head at the last one."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(
            f'  <path d="M{path}" stroke="{LINE}" fill="none" marker-end="url(#head)"/>'
        )

    def bracket(self, x: float, right: float, y: float, words: str) -> None:
        """Draw a bracket below boxes, with words under it."""
        path = f"M{x:g} {y:g} v6 H{right:g} v-6"
        self.parts.append(f'  <path d="{path}" stroke="{LINE}" fill="none"/>')
        self.text((x + right) / 2, y + 22, words, anchor="middle", size=12)

    def save(self, name: str, folder: Path) -> None:
        """Write the file."""
        svg = "\n".join([*self.parts, "</svg>", ""])
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")


def score(folder: Path) -> None:
    """How one score comes about."""
    p = Picture(820, 250, "The score of one key for one token", "Each head multiplies its query by "
                "the key, negative products become 0, gates weigh heads, the key's scale comes "
                "last.")  # fmt: skip
    for x, words in ((20, "query heads of token t"), (240, "dot products"), (400, "max(0, ·)"),
                     (530, "times gate")):  # fmt: skip
        p.text(x, 30, words, bold=True)
    rows = ((2.0, 2.0, 0.5, 1.0), (-1.5, 0.0, 0.3, 0.0), (4.0, 4.0, 0.25, 1.0))
    for h, (dot, positive, gate, term) in enumerate(rows):
        y = 50 + 44 * h
        p.box(20, y, f"q[t, {h}]", fill=BLUE, width=110)
        p.arrow((132, y + 13), (236, y + 13))
        p.box(240, y, f"{dot:g}", fill=GREY, width=70)
        p.arrow((312, y + 13), (396, y + 13))
        p.box(400, y, f"{positive:g}", fill=GREY, width=70)
        p.arrow((472, y + 13), (526, y + 13))
        p.box(530, y, f"{gate:g} · {positive:g} = {term:g}", fill=GREY, width=110)
        p.arrow((642, y + 13), (686, 107))
    for h in range(3):
        p.text(184, 58 + 44 * h, "· k[s]", anchor="middle", size=11)
    p.text(690, 80, "sum, times", size=12)
    p.text(690, 94, "k_scales[s] = 0.5", size=12)
    p.box(690, 100, "score 1", fill=GREEN, width=90)
    p.box(20, 200, "k[s]: one key for all heads, E4M3", fill=ORANGE, width=290)
    p.text(330, 218, "A head that points away from the key counts as 0, not as a minus.", size=12)
    p.save("score", folder)


def pages(folder: Path) -> None:
    """A ragged batch, its table and the pool of blocks."""
    p = Picture(860, 350, "Two sequences in pages", "The lookup table says which block of the pool "
                "holds each page of each sequence.")  # fmt: skip
    p.text(20, 26, "keys of each sequence, in pages of 4", bold=True)
    table = ((5, 1, 3), (0, 4))
    lengths, colours = (10, 6), (GREEN, BLUE)
    for b, (length, colour) in enumerate(zip(lengths, colours, strict=True)):
        y = 46 + 70 * b
        p.text(20, y + 18, f"sequence {b}")
        for s in range(length):
            x = 110 + CELL * s + 8 * (s // 4)
            p.box(x, y, s, fill=colour)
        for page in range(len(table[b])):
            x = 110 + (4 * CELL + 8) * page
            p.text(x + 2, y + 42, f"page {page}", size=11)
    p.text(600, 26, "k_lookup_table", bold=True)
    for b, row in enumerate(table):
        for page in range(3):
            known = page < len(row)
            p.box(600 + CELL * page, 46 + 70 * b, row[page] if known else "?",
                  fill=colours[b] if known else None)  # fmt: skip
    p.text(715, 134, "? is never read", size=11)
    p.text(20, 210, "k_blocks: the pool, one block a page", bold=True)
    owners = {block: (b, page) for b, row in enumerate(table) for page, block in enumerate(row)}
    for block in range(6):
        x = 20 + 138 * block
        p.text(x + 2, 234, f"block {block}", size=12)
        for offset in range(4):
            b, page = owners.get(block, (0, 9))
            s = 4 * page + offset
            used = block in owners and s < lengths[b]
            p.box(x + 31 * offset, 242, s if used else "", width=28,
                  fill=colours[b] if used else None)  # fmt: skip
    p.text(20, 300, "Position 9 of sequence 0: page 9 // 4 = 2, which is in block 3, at offset "
           "9 mod 4 = 1.")  # fmt: skip
    p.text(20, 322, "Its slot, the place in the whole pool: 3 · 4 + 1 = 13.")
    p.save("pages", folder)


def lengths(folder: Path) -> None:
    """Cached and new tokens, and what each new one sees."""
    p = Picture(640, 260, "Lengths and the causal mask", "A sequence with five cached and three "
                "new tokens: the first new token sees six keys, the last one eight.")  # fmt: skip
    left = 190
    p.text(20, 46, "position of the key")
    for s in range(10):
        known = s < 8
        fill = (GREY if s < 5 else GREEN) if known else None
        p.box(left + CELL * s, 28, s, fill=fill)
    p.bracket(left, left + 5 * CELL - 4, 60, "k_cache_lengths = 5")
    p.bracket(left + 5 * CELL, left + 8 * CELL - 4, 60, "3 new tokens")
    p.bracket(left, left + 8 * CELL - 4, 92, "k_total_lengths = 8")
    p.text(left + 8 * CELL + 12, 76, "no keys yet", size=12)
    for i, name in enumerate(("first", "second", "last")):
        y = 136 + 38 * i
        p.text(20, y + 18, f"{name} new token sees")
        for s in range(8):
            p.box(left + CELL * s, y, "", fill=BLUE if s < 6 + i else None)
        p.text(left + 8 * CELL + 12, y + 18, f"n(t) = {6 + i}", size=12)
    p.save("lengths", folder)


def selection(folder: Path) -> None:
    """From scores to a row of the result."""
    p = Picture(760, 250, "From scores to the result", "The three best scores are selected; their "
                "positions come back in ascending order; a short row ends in -1.")  # fmt: skip
    p.text(20, 30, "scores of token t over the keys that it sees", bold=True)
    scores = (0.4, 2.1, 0.0, 1.3, 0.0, 1.3, 0.9, 3.0)
    for s, value in enumerate(scores):
        x = 20 + 56 * s
        p.box(x, 44, f"{value:g}", fill=GREEN if s in (1, 3, 7) else GREY, width=50)
        p.text(x + 25, 86, s, anchor="middle", size=11)
    p.text(480, 62, "k = 3. Positions 3 and 5 tie:", size=12)
    p.text(480, 78, "the smaller position wins.", size=12)
    p.arrow((150, 96), (150, 122))
    p.text(20, 144, 'sort="position"', bold=True)
    p.text(300, 144, 'sort="score"', bold=True)
    p.text(560, 144, "a token that sees 2 keys", bold=True)
    for left, row in ((20, (1, 3, 7)), (300, (7, 1, 3)), (560, (0, 1, -1))):
        for j, entry in enumerate(row):
            p.box(left + 56 * j, 156, entry, fill=GREEN if entry >= 0 else None, width=50)
    p.text(20, 206, "ascending, as a gather likes it", size=12)
    p.text(300, 206, "best first", size=12)
    p.text(560, 206, "ends in -1", size=12)
    p.text(
        20, 234, 'With output="slots" each position becomes block · page_size + offset.', size=12
    )
    p.save("selection", folder)


def fused_page(folder: Path) -> None:
    """The bytes of a fused page."""
    p = Picture(780, 170, "A fused page", "A page of 64 keys of 128 channels: 8192 bytes of "
                "values, then 256 bytes of scales.")  # fmt: skip
    p.text(20, 28, "one page of a serving engine: 64 · (128 + 4) bytes", bold=True)
    for j, name in enumerate(("key 0", "key 1", "key 2", "...", "key 63")):
        p.box(20 + 96 * j, 44, name, fill=GREEN, width=92, height=34)
    for j, name in enumerate(("s0", "s1", "s2", "...", "s63")):
        p.box(506 + 50 * j, 44, name, fill=ORANGE, width=46, height=34)
    p.bracket(20, 496, 84, "values: 64 · 128 bytes of E4M3")
    p.bracket(506, 752, 84, "scales: 64 float32")
    p.text(258, 138, "k_blocks is a view of this part", anchor="middle")
    p.text(629, 138, "k_scales is a view of this one", anchor="middle")
    p.save("fused_page", folder)


def pooled(folder: Path) -> None:
    """Tokens, rows and the tail."""
    p = Picture(760, 250, "Pooled keys", "Rows of four tokens each; a token sees a row once it "
                "sees its last token; tokens after the last whole row are the tail.")  # fmt: skip
    p.text(20, 30, "tokens of a sequence, kpool = 4", bold=True)
    for t in range(14):
        fill = (GREEN, BLUE, ORANGE, GREY)[t // 4]
        p.box(20 + CELL * t + 8 * (t // 4), 44, t, fill=fill)
    p.text(528, 62, "token 13 is the newest", size=12)
    for row, fill in enumerate((GREEN, BLUE, ORANGE)):
        x = 20 + (4 * CELL + 8) * row
        p.arrow((x + 2 * CELL - 2, 74), (x + 2 * CELL - 2, 100))
        p.box(x, 104, f"row {row}", fill=fill, width=4 * CELL - 4)
    p.bracket(20 + 3 * (4 * CELL + 8), 20 + 3 * (4 * CELL + 8) + 2 * CELL - 4, 76, "the tail")
    p.text(20, 158, "Token 13 sees 14 tokens and ⌊14 / 4⌋ = 3 rows; token 10 sees 11 tokens and "
           "2 rows.")  # fmt: skip
    p.text(20, 190, "expand_pools, rows 0 and 2 selected:", bold=True)
    tokens = (0, 1, 2, 3, 8, 9, 10, 11, 12, 13, -1)
    for j, token in enumerate(tokens):
        fill = GREEN if j < 4 else ORANGE if j < 8 else GREY if token >= 0 else None
        p.box(20 + CELL * j, 204, token, fill=fill)
    p.text(20 + CELL * 11 + 8, 222, "k · kpool + kpool - 1 columns", size=12)
    p.save("pooled", folder)


def shards(folder: Path) -> None:
    """Interleaved and contiguous shards."""
    p = Picture(800, 300, "Shards", "Each rank selects among its rows and gives positions in the "
                "whole sequence; merge_topk selects among the lists.")  # fmt: skip
    colours = (GREEN, BLUE, ORANGE)
    p.text(20, 30, "interleaved: key_start = rank, key_step = 3", bold=True)
    p.text(20, 116, "contiguous: key_step = 1, key_start = 0, 4, 8", bold=True)
    for s in range(12):
        x = 20 + CELL * s
        p.box(x, 42, s, fill=colours[s % 3])
        p.box(x, 128, s, fill=colours[s // 4])
    for rank, colour in enumerate(colours):
        p.box(470 + 106 * rank, 42, f"rank {rank}", fill=colour, width=96)
    p.text(20, 190, "each rank's best 2, as positions in the sequence (interleaved)", bold=True)
    lists = ((3, 9), (1, 10), (2, 11))
    for rank, row in enumerate(lists):
        for j, position in enumerate(row):
            p.box(20 + 130 * rank + CELL * j, 204, position, fill=colours[rank])
    p.arrow((370, 217), (450, 217))
    p.text(410, 208, "merge_topk", anchor="middle", size=12)
    p.box(460, 204, 1, fill=BLUE)
    p.box(460 + CELL, 204, 9, fill=GREEN)
    p.text(540, 222, "what one rank with all keys gives", size=12)
    p.text(
        20, 270, "Every one of the best 2 of the sequence is among the best 2 of its rank.", size=12
    )
    p.save("shards", folder)


DRAWN = (score, pages, lengths, selection, fused_page, pooled, shards)


def main(folder: Path = FOLDER) -> None:
    """Draw all pictures."""
    for draw in DRAWN:
        draw(folder)


if __name__ == "__main__":
    main()
