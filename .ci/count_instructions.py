"""Counts the instructions of the main loops of the levels for ARM.

    python .ci/count_instructions.py aarch64-linux-gnu-g++      what this compiler makes of a kernel at both levels
    python .ci/count_instructions.py FILE.s...                  assembly that is there

A main loop is an innermost loop with at least 32 products of a vector and a lane (fmla or bfdot), two steps of a tile.
How many instructions it has for each of them bounds its speed, because a core issues a fixed number a cycle; and a
register that is kept in memory (a spill) is a load or a store on the stack. Prints a line for each loop; exits 1 where
there is none, where one has more than 1.45 instructions a product, or a spill.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "csrc/cpu/grouped_matmul.cpp"  # has the tile of every dtype
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
        """Instructions a product."""
        return len(self.instructions) / len(self.products)

    @property
    def spills(self) -> int:
        """Loads and stores on the stack."""
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


def assembly(compiler: str, source: str, level: str, folder: Path) -> Path:
    """What a compiler for ARM makes of a kernel at a level, with the flags of a build."""
    sys.path.insert(0, str(ROOT))
    import setup_cpu

    flags = [*setup_cpu.COMMON_FLAGS, *setup_cpu.ARM_LEVELS[level]]
    macros = [f"-D{name}={value}" for name, value in setup_cpu.level_macros(level)]
    target = folder / f"{Path(source).stem}-{level}.s"
    subprocess.run([*compiler.split(), *flags, *macros, "-S", ROOT / source, "-o", target], check=True)
    return target


def report(path: Path) -> bool:
    """Prints the loops of a file; whether it has one, and all are short."""
    counted = loops(path.read_text())
    print(path.name, *(f"  {loop}" for loop in counted or ["no loop of products"]), sep="\n")
    return bool(counted) and all(loop.ratio <= MOST_INSTRUCTIONS and not loop.spills for loop in counted)


def main(named: list[str]) -> int:
    """Reports on files, or on what compilers make of the kernel; 0 where all is well."""
    if not named:
        sys.exit("count_instructions: names of .s files, or commands of compilers for ARM, must follow")
    with tempfile.TemporaryDirectory() as folder:
        fine = True
        for name in named:
            print(f"{name}:")
            levels = () if name.endswith(".s") else ("neon", "neon_bf16")
            for path in [assembly(name, KERNEL, level, Path(folder)) for level in levels] or [Path(name)]:
                fine &= report(path)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
