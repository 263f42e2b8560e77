"""Neighbours by CSLS and by ratio margins against dense formulas in float64."""

import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.mining import csls, ratio_margin
from contrastive_ops.recipes import bitext_margin

DOUBLE = torch.float64


def dense(x, y, neighbors):
    """(N, M) cosines, and the mean cosine of each row and of each column with its neighbours."""
    s = F.normalize(x) @ F.normalize(y).T
    of_x, of_y = min(neighbors, s.shape[1]), min(neighbors, s.shape[0])
    return s, s.topk(of_x, 1).values.mean(1, keepdim=True), s.topk(of_y, 0).values.mean(0)


SIZES = [(1, 1), (1, 9), (17, 1), (17, 23), (130, 67)]


@pytest.mark.parametrize("neighbors", [1, 4, 10])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_csls(backend, size, neighbors):
    x, y = torch.randn(size[0], 6, dtype=DOUBLE), torch.randn(size[1], 6, dtype=DOUBLE)
    s, near_x, near_y = dense(x, y, neighbors)
    truth = (2 * s - near_x - near_y).topk(min(3, size[1]), 1)
    found = csls(x, y, 3, neighbors=neighbors, backend=backend)
    torch.testing.assert_close(found.values[:, : truth.values.shape[1]], truth.values)
    assert torch.equal(found.indices[:, : truth.values.shape[1]], truth.indices)
    assert (found.indices[:, truth.values.shape[1] :] == -1).all()


@pytest.mark.parametrize("neighbors", [3, 5, 40])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ratio_margin(backend, size, neighbors):
    x, y = (torch.randn(n, 6, dtype=DOUBLE) + 1 for n in size)
    s, near_x, near_y = dense(x, y, neighbors)
    ratio = 2 * s / (near_x + near_y)
    candidates = s.topk(min(neighbors, size[1]), 1).indices
    truth = ratio.gather(1, candidates).sort(dim=1, descending=True, stable=True)
    found = ratio_margin(x, y, 3, neighbors=neighbors, backend=backend)
    kept = min(3, candidates.shape[1])
    torch.testing.assert_close(found.values[:, :kept], truth.values[:, :kept])
    assert torch.equal(found.indices[:, :kept], candidates.gather(1, truth.indices)[:, :kept])
    assert (found.indices[:, kept:] == -1).all() and (found.values[:, kept:] == -torch.inf).all()
    assert (found.counts == kept).all()


def test_a_hub_is_the_nearest_of_all_and_the_best_of_none():
    """One column lies in the middle of all rows; margins see the columns that belong to them."""
    x = F.normalize(torch.eye(8, dtype=DOUBLE) + 1.0)
    y = torch.cat([torch.ones(1, 8, dtype=DOUBLE), 3 * torch.eye(8, dtype=DOUBLE) + 0.35])
    nearest = (F.normalize(x) @ F.normalize(y).T).argmax(1)
    assert (nearest == 0).all()
    for function in (csls, ratio_margin):
        assert torch.equal(function(x, y, neighbors=4).indices[:, 0], torch.arange(1, 9)), function


def test_nothing_has_a_gradient_and_16_bits_are_read():
    x, y = torch.randn(9, 4, requires_grad=True), torch.randn(12, 4)
    for function in (csls, ratio_margin):
        found, low = function(x, y), function(x.detach().bfloat16(), y.bfloat16())
        assert not found.values.requires_grad and low.values.dtype == torch.float32
        torch.testing.assert_close(low.values, found.values, rtol=0.05, atol=0.05)


def test_the_recipe_is_this_function():
    x, y = torch.randn(20, 5), torch.randn(30, 5)
    for one, other in zip(bitext_margin(x, y, 3)[:3], ratio_margin(x, y, 3, neighbors=3)[:3], strict=True):
        assert torch.equal(one, other)


def test_csls_word_by_word():
    """Row by row, as the authors' code has it: from averages of the neighbourhoods of each word."""
    x, y = torch.randn(11, 5, dtype=DOUBLE), torch.randn(13, 5, dtype=DOUBLE)
    cosine = lambda a, b: float(F.cosine_similarity(a, b, dim=0))  # noqa: E731
    of_x = [sum(sorted((cosine(a, b) for b in y), reverse=True)[:10]) / 10 for a in x]
    of_y = [sum(sorted((cosine(a, b) for a in x), reverse=True)[:10]) / 10 for b in y]
    for i, a in enumerate(x):
        scores = [2 * cosine(a, b) - of_x[i] - of_y[j] for j, b in enumerate(y)]
        found = csls(x, y)
        assert found.indices[i, 0] == max(range(13), key=scores.__getitem__)
        assert abs(float(found.values[i, 0]) - max(scores)) < 1e-9


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: csls(X, X, neighbors=0), ValueError, "csls: neighbors must be at least 1, got 0"),
        (lambda: csls(X, X[:, :2]), ValueError, "csls: y must have the same last dimension as x"),
        (lambda: ratio_margin(X, X, 5, neighbors=4), ValueError, "ratio_margin: k must be in [1, 4], got 5"),
        (lambda: ratio_margin(X, X.long()), TypeError, "ratio_margin: y must"),
        (lambda: ratio_margin(X, X, backend="fast"), ValueError, "backend must be one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
