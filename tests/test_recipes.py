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
from contrastive_ops.testing.compare import check

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
        assert len([line for line in body.splitlines() if line.strip()]) <= 15, name


X, LABELS = torch.randn(6, 4), torch.arange(6) % 2
BAD = {
    "clhaif": (lambda: recipes.clhaif(X, X, X, torch.rand(6), smooth="none"), ValueError, "clhaif: smooth must be"),
    "clhaif share": (
        lambda: recipes.clhaif(X, X, X, torch.full((6,), 2.0), smooth="all"),
        ValueError,
        "info_nce: label_smoothing must",
    ),
    "quick_thought": (
        lambda: recipes.quick_thought(X, X, width=0),
        ValueError,
        "quick_thought: width must be at least 1",
    ),
    "dclr_noise": (lambda: recipes.dclr_noise(X, X, X, steps=-1), ValueError, "dclr_noise: steps must be at least 0"),
    "gcl": (lambda: recipes.gcl(X, X, torch.rand(6), mean_over="all"), ValueError, "gcl: mean_over must be one of"),
    "positive_aware_rules": (
        lambda: recipes.positive_aware_rules("top"),
        ValueError,
        "positive_aware_rules: kind must be",
    ),
    "runner_up_rules": (lambda: recipes.runner_up_rules(0.4, 0.3), ValueError, "rank_window must be two rising shares"),
    "ance": (
        lambda: recipes.ance(X, X, None),
        ValueError,
        "negatives or row_negatives must be given with in_batch=False",
    ),
    "ance block": (lambda: recipes.ance(X, X, X[:3]), ValueError, "row_negatives must have shape"),
    "simcse block": (lambda: recipes.simcse(X, X, X[:3], hard_weight=0.5), ValueError, "row_negatives must have shape"),
    "splade_head": (
        lambda: recipes.splade_head(X[None], X, pooling="mean"),
        ValueError,
        "splade_head: pooling must be one of",
    ),
    "curl": (lambda: recipes.curl(X, X, X[:, None], loss="log"), ValueError, "curl: loss must be one of"),
    "ranksyn_targets": (lambda: recipes.ranksyn_targets(X[0]), ValueError, "ranksyn_targets: similarity must"),
    "unsee": (lambda: recipes.unsee(X, X, X, X, kind="simclr"), ValueError, "unsee: kind must be one of"),
    "unsee states": (
        lambda: recipes.unsee(X, X, X, X, kind="corinfomax"),
        ValueError,
        "unsee: states must be two RunningCovariance",
    ),
    "csr": (lambda: recipes.csr(X, torch.randn(8, 4), torch.zeros(8), X[0], k=3), ValueError, "csr: k must be"),
    "laeo": (lambda: recipes.laeo(X, X, kind="mse"), ValueError, "laeo: kind must be one of"),
    "bitext_margin": (lambda: recipes.bitext_margin(X, X, 7), ValueError, "k must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_values_where_nothing_is_there():
    means, sizes = recipes.segment_mean(X, LABELS, 3)
    assert sizes.tolist() == [3, 3, 0] and not means[2].any()
    assert recipes.superflow(X, X, LABELS, LABELS + 2, 4).isnan()  # no superpixel has both
    shares = torch.rand(6, 6)
    assert recipes.supremix(X, torch.tensor([0.0, 1.0]).repeat(3), shares).isfinite()
    assert recipes.supremix(X[:2], torch.tensor([0.0, 1.0]), shares[:2, :2]).isnan()  # no row has a positive
    head = recipes.splade_head(X.view(2, 3, 4), X, mask=torch.tensor([[True] * 3, [False] * 3]))
    assert head.shape == (2, 6) and not head[1].any()
    left, right = recipes.token_differences(X, X, LABELS, torch.full((6,), 1))
    assert (left == torch.inf).tolist() == (LABELS == 0).tolist() and right.isfinite().all()
    words = torch.tensor([[0, -1], [2, 2]])
    rows = X[:4].abs().view(2, 2, 4)
    scores = recipes.coil_scores(rows, words, rows, torch.tensor([[-1, -1], [2, 0]]))
    assert not scores[:, 0].any() and scores[:, 1].all()


def test_sums_with_slopes_are_the_same_in_chunks(monkeypatch):
    x, y, z = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (11, 11, 4))
    guide, ids = torch.randn(2, 11, 3, dtype=torch.float64), torch.arange(11) % 3
    monkeypatch.setattr("contrastive_ops.losses._one_pass.ELEMENTS", 22)
    found = recipes.dclr(x, y, z, *guide, threshold=0.3, released=True, temperature=0.5)
    s = F.normalize(x) @ F.normalize(torch.cat([y, z])).T / 0.5
    similar = (F.normalize(guide[0]) @ F.normalize(guide[1]).T > 0.3).fill_diagonal_(False)
    p = s.masked_fill(F.pad(similar, (0, 4)), 0.0).softmax(1)
    check(found, F.binary_cross_entropy(p, torch.eye(11, 15, dtype=torch.float64)), [x, y, z])
    found = recipes.cosine_contrastive(x, ids, margin=2.0)
    d = (x[:, None] - x).square().sum(2) / 5
    check(found, torch.where(ids[:, None] == ids, d**2, (2 - d).relu() ** 2).sum(), [x])
    assert not recipes.cosine_contrastive(x.detach(), ids).requires_grad
    with pytest.raises(NotImplementedError, match="cosine_contrastive: create_graph must be False"):
        torch.autograd.grad(recipes.cosine_contrastive(x, ids), x, create_graph=True)


def test_evidence_of_a_hypothesis_may_be_missing():
    entailment, relevance = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    labels = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)
    r = relevance.sigmoid() * mask
    p = (entailment.sigmoid() * r).sum(1)[[0, 2]] / r.sum(1)[[0, 2]]
    found = recipes.evidence_bce(entailment, relevance, labels, mask)
    check(found, F.binary_cross_entropy(p, labels[[0, 2]]), [entailment, relevance])
    certain = recipes.evidence_bce(torch.full((1, 2), -60.0), torch.zeros(1, 2), torch.ones(1))
    torch.testing.assert_close(certain, torch.tensor(60.0))
