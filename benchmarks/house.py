"""Measures of the code itself: how far a call travels, what a rule or an operator costs, what is longest.

    python -m benchmarks.house

docs/design.md has the numbers; a change that makes them worse should say why.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "contrastive_ops"
ROOMS = ("contrastive_ops", "kernels", "csrc", "benchmarks", "tests")
SUFFIXES = {".py", ".cpp", ".h", ".cu"}


def files(*rooms: str) -> Iterator[Path]:
    """Source files of some rooms."""
    for room in rooms:
        yield from (path for path in sorted((ROOT / room).rglob("*")) if path.suffix in SUFFIXES)


def travels(call: Callable[[], object]) -> dict[str, int]:
    """Calls of Python functions of the package, the files they stand in, and changes from file to file."""
    seen: list[str] = []

    def note(frame: object, event: str, _: object) -> None:
        name = frame.f_code.co_filename  # type: ignore[attr-defined]
        if event == "call" and name.startswith(str(PACKAGE)):
            seen.append(name)

    call()  # once before, for what only a first call does
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    changes = [after for before, after in zip(seen, seen[1:], strict=False) if after != before]
    entered, returns = {seen[0]}, 0
    for name in changes:
        returns += name in entered
        entered.add(name)
    return {"calls": len(seen), "files": len(set(seen)), "changes of file": len(changes), "returns": returns}


def hops() -> dict[str, dict[str, int]]:
    """How the forwards of some functions travel on the CPU."""
    import torch

    import contrastive_ops as co

    x, y = (torch.randn(8, 64, requires_grad=True) for _ in range(2))
    labels, logits = torch.arange(8) % 4, torch.randn(8, 32, requires_grad=True)
    lists = torch.arange(9), torch.arange(8)
    return {
        "clip": travels(lambda: co.clip(x, y)),
        "info_nce": travels(lambda: co.info_nce(x, y)),
        "sup_con": travels(lambda: co.sup_con(x, labels)),
        "similarity_topk with exclude": travels(lambda: co.similarity_topk(x, y, 3, pairs=co.Pairs(exclude=lists))),
        "route": travels(lambda: co.route(logits, 2, losses=("switch",))),
    }


def files_of(*patterns: str) -> list[str]:
    """Files outside of tests, benchmarks and losses, which use rules and folds, in whose code a pattern is found."""
    pattern = re.compile("|".join(patterns))
    comment = re.compile(r"^\s*(# |//|\*)")
    found = []
    for path in files("contrastive_ops", "kernels", "csrc"):
        if path.is_relative_to(PACKAGE / "losses"):
            continue
        text = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text()) if path.suffix == ".py" else path.read_text()
        if any(pattern.search(line) and not comment.match(line) for line in text.splitlines()):
            found.append(str(path.relative_to(ROOT)))
    return found


def declared() -> dict[str, int]:
    """Lines of each declared pair of operators."""
    found = {}
    for path in files("contrastive_ops"):
        for node in ast.walk(ast.parse(path.read_text()) if path.suffix == ".py" else ast.Module([], [])):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                function = node.value.func
                if isinstance(function, ast.Name) and function.id == "declare" and node.end_lineno is not None:
                    name = f"{path.stem}:{node.lineno}"
                    found[name] = node.end_lineno - node.lineno + 1
    return found


def functions() -> Iterator[tuple[int, int, str]]:
    """Lines without the docstring and parameters of every Python function of the package."""
    for path in files("contrastive_ops", "kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                yield lines, parameters, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def main() -> int:
    """Prints all measures."""
    for name, found in hops().items():
        print(f"{name}: " + ", ".join(f"{value} {what}" for what, value in found.items()))
    for rule, words in {
        # Its slots, its field, its statistic.
        "rule above": (r"(?i:\babove_(rows|cols)\b)", r'"above"', r"\bpairs\.above\b", r"::above\b", r"^ *above = \d"),
        "fold sum_relu": (r"(?i:\bsum_relu\b)",),
    }.items():
        known = files_of(*words)
        print(f"files that know the {rule}: {len(known)}, {', '.join(known)}")
    lines = declared()
    print(f"lines of a declared pair of operators: {', '.join(f'{k} {v}' for k, v in lines.items())}")
    everything = sorted(functions(), reverse=True)
    print("longest functions: " + "; ".join(f"{name} {count}" for count, _, name in everything[:3]))
    print(f"functions with more than 9 parameters: {sum(parameters > 9 for _, parameters, _ in everything)}")
    sizes = sorted(((len(path.read_text().splitlines()), path) for path in files(*ROOMS[:4])), reverse=True)
    print("longest files: " + "; ".join(f"{path.relative_to(ROOT)} {count}" for count, path in sizes[:3]))
    print(f"files above 400 lines: {sum(count > 400 for count, _ in sizes)}")
    for room in ROOMS:
        print(f"lines of {room}: {sum(len(path.read_text().splitlines()) for path in files(room))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
