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


def is_size(node):
    """x.shape[0], x.size(0) or x.numel()."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("numel", "size")


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


def test_no_size_is_taken_as_true_or_false():
    """Before 2.7 that makes a program for this size alone; a comparison with 0 does not."""
    root = Path(contrastive_ops.__file__).parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sorted(root.rglob("*.py"))
        if not {"integrations", "testing"} & set(path.relative_to(root).parts)
        for node in asked_for_truth(ast.parse(path.read_text()))
        if is_size(node)
    ]
    assert not found


@pytest.mark.parametrize("line", ["if x.shape[0]: pass", "y = not x.numel()", "a = x if b and x.size(1) else b"])
def test_sizes_are_found(line):
    assert any(is_size(node) for node in asked_for_truth(ast.parse(line)))
