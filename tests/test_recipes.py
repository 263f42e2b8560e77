"""Calls of papers against independent dense expressions, with an operand moved that must be noticed; bad input."""

import inspect
import math
import re

import papers
import papers_001
import papers_039
import papers_074
import papers_shared
import pytest
import torch
import torch.nn.functional as F

from contrastive_ops import decoding, losses, metrics, mining, ops, recipes

MODULES = (papers_shared, papers_001, papers_039, papers_074)
SPACES = (losses, ops, mining, recipes)
CALLS = {name: getattr(space, name) for space in SPACES for name in space.__all__}
CALLS |= {"F": F, "torch": torch, "math": math, "decoding": decoding, "metrics": metrics, "mining": mining}
CALLS |= {"N": papers_shared.N, "D": papers_shared.D}
FORMULAS = {name: value for module in MODULES for name, value in vars(module).items() if not name.startswith("_")}
CASES = [
    pytest.param(call.split("  #")[0], dense, id=f"{paper.number}-{index}")
    for paper in papers.PAPERS
    for index, (call, dense) in enumerate(paper.checks)
]


def mentioned(call, tensors):
    """The tensors whose names stand in a call, not as attributes or keywords."""
    words = set(re.findall(r"(?<![.\w])\w+\b(?!=)", call))
    return {name: value for name, value in tensors.items() if name in words}


def compare(call, dense, tensors, moved, leaves):
    """The call at moved tensors and the expression at those that were given: values, and gradients of the leaves."""
    value, truth = eval(call, CALLS | moved), eval(dense, FORMULAS | tensors)
    torch.testing.assert_close(value.double(), truth.double(), rtol=1e-7, atol=1e-9)
    if not leaves:
        return
    cotangent = torch.rand_like(truth) + 0.5
    wanted = torch.autograd.grad(truth, list(leaves.values()), cotangent, allow_unused=True)
    found = torch.autograd.grad(value, [moved[name] for name in leaves], cotangent, allow_unused=True)
    assert any(each is not None and each.any() for each in wanted)
    for name, a, b in zip(leaves, found, wanted, strict=True):
        a, b = (torch.zeros_like(leaves[name]) if each is None else each for each in (a, b))
        torch.testing.assert_close(
            a, b, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )


@pytest.mark.parametrize("call, dense", CASES)
def test_call_of_a_paper(call, dense):
    learned, fixed = papers_shared.inputs()
    tensors, leaves = learned | fixed, mentioned(call, learned)
    if not eval(dense, FORMULAS | tensors).requires_grad:
        leaves = {}
    compare(call, dense, tensors, tensors, leaves)
    # One operand is another one: the comparison must see it.
    operands = leaves or {name: value for name, value in mentioned(call, tensors).items() if torch.is_tensor(value)}
    name = next(name for name, value in operands.items() if value.is_floating_point() and value.dim())
    value = operands[name].detach()
    moved = (
        value * 1.01 + 0.01 * torch.linspace(-1, 1, value.shape[-1])
        if leaves
        else -value.roll(1, 0) + 0.3 * torch.randn_like(value)
    )
    with pytest.raises(AssertionError):
        compare(call, dense, tensors, tensors | {name: moved.requires_grad_(name in leaves)}, leaves)


def test_every_paper_has_a_row():
    assert [paper.number for paper in papers.PAPERS] == [f"S{number:03d}" for number in range(1, 120)]
    assert {paper.grade for paper in papers.PAPERS} == set(papers.GRADES)
    without = [paper.number for paper in papers.PAPERS if not paper.checks]
    assert all(paper.needs and paper.title for paper in papers.PAPERS) and len(without) <= 14, without


def test_page_is_up_to_date():
    assert papers.PAGE.read_text() == papers.page(), "run python tests/papers.py"


def test_every_recipe_has_a_row():
    calls = " ".join(call for paper in papers.PAPERS for call, _ in paper.checks)
    for name in set(recipes.__all__) - {"segment_mean"}:
        assert re.search(rf"\b{name}\(", calls), name


def test_recipes_are_short_and_say_where_they_come_from():
    for name in recipes.__all__:
        function = getattr(recipes, name)
        source, text = inspect.getsource(function), inspect.getdoc(function)
        assert "Source:" in text or name == "segment_mean", name
        body = source.split('"""')[2]
        assert len([line for line in body.splitlines() if line.strip()]) <= 24, name
