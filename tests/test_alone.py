"""A test file imports what it uses, and passes in any order: nothing is there because another test was before it."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    path for folder in ("tests", "contrastive_ops", "benchmarks") for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
]

# A module is an attribute of its package from when somebody has imported it: torch._dynamo.testing is not so at first.
MISSING = """
import json, sys, types, torch

def missing(chain):
    found, names = torch, chain.split(".")
    for index, name in enumerate(names[1:], 2):
        if not isinstance(found, types.ModuleType):
            return None
        if not hasattr(found, name):
            return ".".join(names[:index])
        found = getattr(found, name)

print(json.dumps({chain: missing(chain) for chain in json.load(sys.stdin)}))
"""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression, empty for any other."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) and names else ""


def uses(text: str) -> tuple[set[str], set[str]]:
    """What of torch a file names by dots, and what it imports."""
    tree = ast.parse(text)
    named = {name for node in ast.walk(tree) if (name := dotted(node)).startswith("torch.")}
    named = {name for name in named if not name.startswith("torch.ops.")}  # operators, which are no modules
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return named, imported


def not_imported(texts: dict[str, str]) -> dict[str, set[str]]:
    """Modules of torch by the file that uses them and leaves their import to another."""
    of = {name: uses(text) for name, text in texts.items()}
    chains = json.dumps(sorted(set().union(*(named for named, _ in of.values()))))
    command = [sys.executable, "-c", MISSING]
    run = subprocess.run(command, input=chains, capture_output=True, text=True, check=True)
    missing = {chain: prefix for chain, prefix in json.loads(run.stdout).items() if prefix}
    found = {}
    for name, (named, imported) in of.items():
        here = {missing[chain] for chain in named & set(missing)}
        found[name] = {p for p in here if not any(i == p or i.startswith(f"{p}.") for i in imported)}
    return {name: modules for name, modules in found.items() if modules}


def test_modules_of_torch_are_imported_by_who_uses_them() -> None:
    assert len(FILES) > 100
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
    bad = "import torch\ntorch._dynamo.testing.CompileCounter()\ntorch.nn.functional.relu(torch.ones(1))\n"
    good = f"import torch._dynamo.testing\n{bad}"
    found = not_imported({**texts, "bad": bad, "good": good})
    assert found.pop("bad") == {"torch._dynamo.testing"}
    assert not found, found


def test_the_order_is_that_of_the_seed() -> None:
    """pytest --shuffle SEED; the same in each process of pytest -n, or these would not agree on what there is."""
    shuffled = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["shuffled"]
    plain = [SimpleNamespace(path=Path(name), index=index) for name in ("first", "second") for index in range(40)]
    one, again, two = shuffled(plain, 1), shuffled(plain, 1), shuffled(plain, 2)
    assert one == again != plain and one != two and all(item in one for item in plain) and len(one) == 80
    assert len({item.path for item in one[:40]}) == 1  # the tests of a file stay together


@pytest.mark.parametrize("text", ["import torch\ntorch.no_such_thing", "import torch\ntorch.nn.no_such_module.f()"])
def test_what_is_not_there_is_seen(text: str) -> None:
    assert list(not_imported({"bad": text})) == ["bad"]
