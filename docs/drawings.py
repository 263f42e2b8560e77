"""Draws how each primitive works: docs/images/primitive_*.svg.

python docs/drawings.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parent / "images"
INK, PALE, LINE, OURS, OTHER = "#24323d", "#eef2f4", "#b5c0c8", "#1a7f5a", "#c8803c"
CELL = 20


class Drawing:
    """Shapes on a white card, so that both colour schemes of the site show them alike."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str = PALE, line: str = LINE) -> None:
        """A rectangle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{line}"/>'
        )

    def grid(self, x: float, y: float, columns: int, rows: int) -> None:
        """Cells of a matrix."""
        for row in range(rows):
            for column in range(columns):
                self.box(x + column * CELL, y + row * CELL, CELL, CELL, "#ffffff")

    def cells(self, x: float, y: float, places: list[tuple[int, int]], fill: str = OURS) -> None:
        """Filled cells of a matrix, by column and row."""
        for column, row in places:
            self.box(x + column * CELL, y + row * CELL, CELL, CELL, fill)

    def say(self, x: float, y: float, text: str, anchor: str = "middle", size: int = 13, fill: str = INK) -> None:
        """A line of text."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{escape(text)}</text>'
        )

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A line with a head."""
        self.parts.append(
            f'<path d="M{x0:g} {y0:g}L{x1:g} {y1:g}" stroke="{INK}" stroke-width="1.5" fill="none"'
            ' marker-end="url(#head)"/>'
        )

    def text(self) -> str:
        """The file."""
        width, height = self.size
        head = (
            f'<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
                f' height="{height}" font-family="sans-serif">',
                f"<defs>{head}</defs>",
                f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
                *self.parts,
                "</svg>",
                "",
            ]
        )


def operands(d: Drawing, x: float, y: float, columns: int, rows: int, top: str = "y, (M, D)") -> None:
    """The matrix of logits with x on its left and y above it, and one tile of it."""
    d.box(x - 54, y, 40, rows * CELL)
    d.say(x - 34, y - 8, "x, (N, D)", size=12)
    d.box(x, y - 54, columns * CELL, 34)
    d.say(x + 8, y - 33, top, "start", 12)
    d.grid(x, y, columns, rows)


def similarity_reduce() -> Drawing:
    """Tiles are folded into rows and columns."""
    d = Drawing(620, 330)
    operands(d, 90, 80, 12, 8)
    d.cells(90, 80, [(c, r) for c in range(4, 8) for r in range(2, 5)])
    d.box(36, 120, 40, 60, OURS)
    d.box(170, 26, 80, 34, OURS)
    d.arrow(256, 150, 372, 150)
    d.box(380, 80, 26, 160)
    d.box(380, 120, 26, 60, OURS)
    d.say(414, 140, "folds of rows, (N,):", "start")
    d.say(414, 158, "logsumexp, max, sum, count", "start")
    d.arrow(210, 186, 210, 258)
    d.box(90, 264, 240, 22)
    d.box(170, 264, 80, 22, OURS)
    d.say(210, 306, "folds of columns, (M,)")
    d.say(414, 214, "A tile is made, folded and", "start", 12)
    d.say(414, 230, "forgotten; backward makes it", "start", 12)
    d.say(414, 246, "again, as weights of x and y.", "start", 12)
    return d


def similarity_topk() -> Drawing:
    """Rows keep what beats their threshold."""
    d = Drawing(620, 270)
    operands(d, 90, 80, 12, 8)
    d.cells(90, 80, [(1, 1), (7, 1), (9, 1), (3, 4), (4, 4), (10, 4), (0, 6), (5, 6), (8, 6)])
    d.cells(90, 80, [(5, 1), (2, 4), (11, 6)], OTHER)
    d.arrow(338, 160, 392, 160)
    d.grid(400, 80, 3, 8)
    d.cells(400, 80, [(c, r) for c in range(3) for r in (1, 4, 6)])
    d.say(430, 68, "(N, k)", size=12)
    d.say(474, 110, "above the threshold", "start", 12, OURS)
    d.say(474, 126, "of the row: kept", "start", 12, OURS)
    d.say(474, 160, "dropped by a rule,", "start", 12, OTHER)
    d.say(474, 176, "inside the search", "start", 12, OTHER)
    d.say(474, 210, "others cost one", "start", 12)
    d.say(474, 226, "comparison", "start", 12)
    return d


def similarity_values() -> Drawing:
    """The softmax of a row weighs values."""
    d = Drawing(620, 270)
    operands(d, 90, 80, 8, 8)
    d.cells(90, 80, [(c, r) for c in range(8) for r in (2, 3)])
    d.say(170, 262, "softmax of 512 rows at a time", size=12)
    d.say(282, 166, "\u00d7", size=18)
    d.box(304, 80, 60, 160)
    d.say(334, 68, "values, (M, V)", size=12)
    d.arrow(378, 160, 432, 160)
    d.box(440, 80, 60, 160)
    d.box(440, 120, 60, 40, OURS)
    d.say(470, 68, "(N, V)", size=12)
    d.say(512, 136, "weighted", "start", 12)
    d.say(512, 152, "sums", "start", 12)
    return d


def similarity_prefix() -> Drawing:
    """Products of prefixes are running sums."""
    d = Drawing(620, 270)
    shades = ["#0f5b40", OURS, "#7fbfa6", "#cfe6dc"]
    for k, (width, shade) in enumerate(zip((14, 14, 28, 56), shades, strict=True)):
        left = 30 + (0, 14, 28, 56)[k]
        d.box(left, 80, width, 150, shade)
    d.say(86, 68, "x, in segments", size=12)
    d.say(86, 250, "dims = (d1, d2, d3, D)", size=12)
    for k, shade in enumerate(shades):
        x = 190 + k * 106
        d.grid(x, 110, 4, 4)
        d.cells(x, 110, [(1, 1), (2, 1), (1, 2), (2, 2)], shade)
        d.say(x + 40, 100, ("first d1", "to d2", "to d3", "all D")[k], size=12)
        if k:
            d.arrow(x - 24, 150, x - 4, 150)
            d.say(x - 13, 140, "+", size=15)
        d.arrow(x + 40, 194, x + 40, 212)
        d.say(x + 40, 228, "folds", size=12)
    d.say(390, 252, "one product for all prefixes: each adds its segment", size=12)
    return d


def similarity_distill() -> Drawing:
    """Two products, one tile, a divergence."""
    d = Drawing(620, 270)
    for x, name, fill in ((40, "student, of its D", OURS), (240, "teacher, of its own D", OTHER)):
        d.say(x + 80, 60, name)
        d.grid(x, 76, 8, 8)
        d.cells(x, 76, [(c, r) for c in range(3, 6) for r in range(2, 5)], fill)
    d.say(220, 160, "and", size=13)
    d.arrow(410, 146, 446, 146)
    d.box(454, 76, 26, 160)
    d.box(454, 116, 26, 60, OURS)
    d.say(490, 130, "divergence of", "start", 12)
    d.say(490, 146, "rows, columns,", "start", 12)
    d.say(490, 162, "or both", "start", 12)
    d.say(200, 258, "the same block of both matrices, folded together", size=12)
    return d


def maxsim() -> Drawing:
    """The best token of each document."""
    d = Drawing(620, 270)
    d.say(195, 40, "tokens of documents, one after the other")
    spans = ((0, 5, "A"), (5, 3, "B"), (8, 4, "C"))
    for start, length, name in spans:
        d.box(75 + start * CELL, 52, length * CELL, 22)
        d.say(75 + (start + length / 2) * CELL, 68, name, size=12)
    d.say(66, 150, "tokens", "end", 12)
    d.say(66, 166, "of a query", "end", 12)
    d.grid(75, 80, 12, 6)
    best = [[3, 6, 8], [0, 7, 11], [4, 5, 9], [2, 6, 10], [1, 7, 8], [3, 5, 9]]
    d.cells(75, 80, [(column, row) for row, columns in enumerate(best) for column in columns])
    d.arrow(322, 140, 376, 140)
    d.grid(384, 80, 3, 6)
    d.cells(384, 80, [(c, r) for c in range(3) for r in range(6)])
    d.say(414, 68, "A   B   C", size=12)
    d.say(454, 140, "best of a document", "start", 12)
    d.arrow(414, 204, 414, 226)
    d.say(414, 244, "summed over the tokens of the query: scores (N, M)", size=12)
    return d


def route() -> Drawing:
    """Tokens choose experts, which have room for so many."""
    d = Drawing(620, 270)
    d.say(90, 40, "logits, (T, E)")
    d.grid(50, 52, 4, 9)
    chosen = [0, 2, 0, 3, 0, 1, 2, 0, 2]
    d.cells(50, 52, [(e, t) for t, e in enumerate(chosen)])
    d.cells(50, 52, [(0, 7)], OTHER)
    d.arrow(140, 142, 196, 142)
    d.say(360, 40, "rows in the order of their expert")
    left = 206
    for expert, tokens in ((0, "0 2 4"), (1, "5"), (2, "1 6 8"), (3, "3")):
        for token in tokens.split():
            d.box(left, 110, 34, 34, "#cfe6dc")
            d.say(left + 17, 132, token)
            left += 34
        d.say(left - 17 * len(tokens.split()), 164, f"expert {expert}", size=11)
        left += 8
    d.say(206, 200, "Token 7 came fourth where there was room for three: it is dropped,", "start", 12, OTHER)
    d.say(206, 218, "and who that is (first come, or highest gate) is `priority`.", "start", 12)
    d.say(206, 240, "The same pass adds up what losses and metrics need.", "start", 12)
    return d


def grouped_matmul() -> Drawing:
    """Rows meet the matrix of their group."""
    d = Drawing(620, 270)
    shades = ["#0f5b40", OURS, "#7fbfa6", "#cfe6dc"]
    d.say(60, 40, "tokens, (T, D)")
    d.box(34, 52, 52, 180)
    d.say(214, 40, "rows by `order`")
    for k, (top, height) in enumerate(((52, 60), (112, 20), (132, 60), (192, 40))):
        d.box(188, top, 52, height, shades[k])
        d.box(320 + k * 26, 66 + k * 26, 80, 52, shades[k])
        d.box(520, top, 60, height, shades[k])
    for source, row in ((60, 60), (100, 80), (140, 100), (90, 122), (70, 140), (200, 160), (180, 182), (120, 205)):
        d.arrow(90, source, 184, row)
    d.say(280, 150, "\u00d7", size=18)
    d.say(376, 40, "b, (E, D, F)")
    d.say(500, 150, "=", size=18)
    d.say(550, 40, "(R, F)")
    d.say(310, 254, "rows are read from the tokens while an operand is packed: no dispatched copy", size=12)
    return d


DRAWINGS: tuple[Callable[[], Drawing], ...] = (
    similarity_reduce,
    similarity_topk,
    similarity_values,
    similarity_prefix,
    similarity_distill,
    maxsim,
    route,
    grouped_matmul,
)


def files() -> Iterator[tuple[Path, str]]:
    """Every file and what is in it."""
    for draw in DRAWINGS:
        yield IMAGES / f"primitive_{draw.__name__}.svg", draw().text()


if __name__ == "__main__":
    for path, text in files():
        path.write_text(text)
        print(f"wrote {path}")
