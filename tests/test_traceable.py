"""What the tracer of the oldest torch that is supported asks of Python code: run here with any torch."""

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import contrastive_ops
from contrastive_ops import Pairs
from contrastive_ops.core.records import changed

PARTS = ("core", "losses", "ops", "mining", "moe", "distributed", "testing", "recipes", "reference")


def records():
    """Every dataclass of the package that can be made again from its fields."""
    found = {}
    for part in PARTS:
        package = importlib.import_module(f"contrastive_ops.{part}")
        for each in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for kind in vars(importlib.import_module(each.name)).values():
                if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                    found[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return {name: kind for name, kind in found.items() if name.startswith(contrastive_ops.__name__)}


def test_no_field_would_be_lost():
    """Fields that are only given by keyword are not among those that Python lists for `match`."""
    known = records()
    assert len(known) > 20
    for name, kind in known.items():
        assert kind.__match_args__ == tuple(field.name for field in dataclasses.fields(kind) if field.init), name


def test_as_dataclasses_replace():
    pairs = Pairs(diagonal=1, same=(torch.arange(3), torch.arange(3)))
    one, other = changed(pairs, diagonal=None), dataclasses.replace(pairs, diagonal=None)
    assert all(getattr(one, f.name) is getattr(other, f.name) for f in dataclasses.fields(Pairs))
    assert pairs.diagonal == 1
    with pytest.raises(TypeError, match="nothing"):
        changed(pairs, nothing=1)


def test_traced_of_a_record_that_the_trace_makes():
    def both(x):
        pairs = changed(changed(Pairs(), above=x), below=x + 1)
        return pairs.above * pairs.below

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


def is_size(node, names=frozenset()):
    """x.shape[0], x.size(0), x.numel(), a list of sizes, or a name that was given one."""
    if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        return is_size(node.elt, names)
    if isinstance(node, ast.Subscript):
        return is_size(node.value, names)
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr == "shape"
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("numel", "size")


def named_sizes(function):
    """Names that a function gives to sizes."""
    found = set()
    for node in (each for each in ast.walk(function) if isinstance(each, ast.Assign)):
        for target in node.targets:
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(targets)
            sizes = (to for to, value in zip(targets, values, strict=False) if is_size(value))
            found |= {to.id for to in sizes if isinstance(to, ast.Name)}
    return found


def asked_for_truth(tree):
    """Expressions that Python takes as true or false."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield node.test
        elif isinstance(node, ast.BoolOp):
            yield from node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand
        elif isinstance(node, ast.comprehension):
            yield from node.ifs


def sizes_asked_for_truth(tree):
    """The lines that do so with a size."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = {node.lineno for node in asked_for_truth(tree) if is_size(node)}
    for function in functions:
        names = named_sizes(function)
        found |= {node.lineno for node in asked_for_truth(function) if is_size(node, names)}
    return sorted(found)


def test_no_size_is_taken_as_true_or_false():
    """Before 2.7 that makes a program for this size alone; a comparison with 0 does not."""
    root = Path(contrastive_ops.__file__).parent
    found = [
        f"{path.relative_to(root)}:{line}"
        for path in sorted(root.rglob("*.py"))
        if not {"integrations", "testing"} & set(path.relative_to(root).parts)
        for line in sizes_asked_for_truth(ast.parse(path.read_text()))
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "if x.shape[0]: pass",
        "y = not x.numel()",
        "a = x if b and x.size(1) else b",
        "def f(x):\n    N, D = x.shape\n    return x if N else D",
        "def f(a, b):\n    sizes = [x.shape[0] for x in (a, b)]\n    if sizes[1]: return a",
    ],
)
def test_sizes_are_found(line):
    assert sizes_asked_for_truth(ast.parse(line))


def test_comparisons_are_none():
    assert not sizes_asked_for_truth(ast.parse("def f(x):\n    N = x.shape[0]\n    return x if N > 0 else not x"))
