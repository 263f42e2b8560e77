"""Counts the instructions of the main loops of a level for ARM: python .ci/count_instructions.py FILE.s...

A main loop is an innermost loop with at least 32 products of a vector and a lane (fmla or bfdot), two steps of a tile. How many
instructions it has for each of them bounds its speed, because a core issues a fixed number a cycle; and a register that
is kept in memory (a spill) is a load or a store on the stack. Prints a line for each loop; exits 1 where there is none,
where one has more than 1.45 instructions a product, or a spill. The assembly is what GCC and Clang write with -S.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

MOST_INSTRUCTIONS = 1.45
LEAST_PRODUCTS = 32

FUNCTION = re.compile(r"^(_Z[\w.]+):")
LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"^\s+([a-z][\w.]*)\s*([^/;]*)")
BRANCH = re.compile(r"(?:b|b\.\w+|b(?:eq|ne|cs|cc|mi|pl|hi|ls|ge|lt|gt|le)|cbn?z|tbn?z)$")
PRODUCT = re.compile(r"(?:fmla|bfdot)\s.*\[\d\]$")


@dataclass(frozen=True)
class Loop:
    """An innermost loop of products."""

    function: str
    products: tuple[str, ...]
    instructions: tuple[tuple[str, str], ...]

    @property
    def ratio(self) -> float:
        return len(self.instructions) / len(self.products)

    @property
    def spills(self) -> int:
        return sum(name.startswith(("ld", "st")) and "[sp" in operands for name, operands in self.instructions)

    def __str__(self) -> str:
        many = f"{len(self.products)} {self.products[0]} of {len(self.instructions)} instructions"
        return f"{many}, {self.ratio:.2f} each, {self.spills} spills: {self.function}"


def functions(text: str) -> dict[str, list[str]]:
    """The lines of each function."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if name := FUNCTION.match(line):
            lines = found.setdefault(name[1], [])
        else:
            lines.append(line)
    return found


def loops(text: str) -> list[Loop]:
    """The main loops of a file of assembly."""
    found = []
    for function, lines in functions(text).items():
        labels = {label[1]: at for at, line in enumerate(lines) if (label := LABEL.match(line))}
        code = {at: (i[1], i[2].strip()) for at, line in enumerate(lines) if (i := INSTRUCTION.match(line))}
        spans = []
        for at, (name, operands) in code.items():
            target = labels.get(re.split(r"[,\s]+", operands)[-1], at) if BRANCH.match(name) else at
            if target < at:
                spans.append((target, at))
        for begin, end in sorted(set(spans)):
            if any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans):
                continue
            body = tuple(code[at] for at in range(begin, end + 1) if at in code)
            products = tuple(name for name, operands in body if PRODUCT.match(f"{name} {operands}"))
            if len(products) >= LEAST_PRODUCTS:
                found.append(Loop(function, products, body))
    return found


def main(paths: list[str]) -> int:
    """Prints the loops of all files; 0 where every file has one, and all are short."""
    fine = bool(paths)
    for path in paths:
        counted = loops(Path(path).read_text())
        print(path, *(f"  {loop}" for loop in counted or ["no loop of products"]), sep="\n")
        fine &= bool(counted) and all(loop.ratio <= MOST_INSTRUCTIONS and not loop.spills for loop in counted)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
