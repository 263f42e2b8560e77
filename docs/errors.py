"""Every error text of the package, read from its sources: a page of the site, and what its tests compare with.

python docs/errors.py [WORDS]: the errors in which all these words are
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "contrastive_ops"


@dataclass(frozen=True)
class Error:
    """A text that is raised somewhere; what a call fills in is in braces."""

    kind: str
    text: str
    file: str

    @property
    def what(self) -> str:
        """The first line: which argument must be what, and what it was."""
        return self.text.partition("\n")[0]

    @property
    def advice(self) -> str:
        """The lines after it: what to do."""
        return " ".join(line.strip() for line in self.text.splitlines()[1:])

    def pattern(self) -> re.Pattern[str]:
        """What such a message looks like."""
        parts = re.split(r"\{[^{}]*\}", self.text)
        return re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)


def _pieces(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_pieces(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + re.sub(r"[{}]", "", ast.unparse(node.value)) + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _pieces(node.left) + _pieces(node.right)
    return "{" + re.sub(r"[{}]", "", ast.unparse(node)) + "}"


def _named(text: str) -> str:
    """The text with short words for what every message has: its function, and the name of an argument."""
    text = re.sub(r"^\{[^}]*\}(?=[:.])", "{function}", text)
    return text.replace("{name}", "{argument}").replace("{prefix}", "")


def errors() -> Iterator[Error]:
    """All of them, by file and then in the order of its lines."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                kind = node.exc.func.attr if isinstance(node.exc.func, ast.Attribute) else ast.unparse(node.exc.func)
                yield Error(kind, _named(_pieces(node.exc.args[0])), path.relative_to(PACKAGE).as_posix())


def _cell(text: str) -> str:
    """The text as code, whose braces and underscores Markdown leaves alone."""
    return f"`` {text} ``".replace("\n", " ") if text else ""


def page() -> str:
    """Markdown: a table for each room of the package."""
    rooms: dict[str, list[Error]] = {}
    for error in errors():
        folder = error.file.rpartition("/")[0].partition("/")[0]
        rooms.setdefault(f"contrastive_ops.{folder}".rstrip("."), []).append(error)
    lines = [
        "# Every error",
        "",
        "Read from the sources when this page is made. Words in braces are filled in by a call; `{function}` is the",
        "public function that was called. [Troubleshooting](troubleshooting.md) has causes that are not in the words.",
    ]
    for room, found in rooms.items():
        lines += ["", f"## `{room}`", "", "| error | text | what to do |", "|---|---|---|"]
        lines += [f"| {e.kind} | {_cell(e.what)} | {_cell(e.advice)} |" for e in dict.fromkeys(found)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    for each in errors():
        if all(word in each.text for word in sys.argv[1:]):
            print(f"{each.file}: {each.kind}: {each.text}")
