"""119 papers: the one table of them, and the page that is made of it.

python tests/papers.py            rewrites docs/papers.md
"""

from pathlib import Path
from typing import NamedTuple

import papers_001
import papers_039
import papers_074

PAGE = Path(__file__).parent.parent / "docs" / "papers.md"
GRADES = {
    "CODE": "read in released code",
    "PAPER": "known from the paper",
    "INFERRED": "from an abstract or a summary: the formula of the call, perhaps not that of the paper",
    "-": "nothing to compute here",
}


class Paper(NamedTuple):
    """A row of the table; each check is a call as a user types it and a dense expression that must equal it."""

    number: str
    title: str
    needs: str
    grade: str
    checks: list[tuple[str, str]]


PAPERS = [Paper(*row) for module in (papers_001, papers_039, papers_074) for row in module.ROWS]

HEAD = """# Papers

119 papers, what each needs, and the call that computes it. The table is in `tests/papers.py`, from which
`python tests/papers.py` makes this page; `tests/test_recipes.py` compares the value and the gradients of every call
with a dense float64 expression, and requires that the comparison fails once an operand is moved.

Functions are those of `contrastive_ops.losses`, `ops`, `mining`, `metrics`, `decoding` and `recipes`. `x`, `y`, `z` are
(N, D) rows: views, queries and documents, hard negatives. Other names say what they are: `labels` and `ids` (N,),
`private` (N, K, D) negatives of each row, `queue` and `corpus` (M, D) without gradients, `scores` (N, K) lists.

How sure a formula is:

"""


def page() -> str:
    """docs/papers.md."""
    lines = [f"- {'none' if grade == '-' else grade}: {words}" for grade, words in GRADES.items()]
    lines += ["", "| | paper | needs | call | formula | test |", "|---|---|---|---|---|---|"]
    for paper in PAPERS:
        calls = "<br>".join(f"`{call}`".replace("|", "\\|") for call, _ in paper.checks) or "none"
        test = f"`test_recipes.py -k {paper.number}`" if paper.checks else "none"
        lines.append(f"| {paper.number} | {paper.title} | {paper.needs} | {calls} | {paper.grade} | {test} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
