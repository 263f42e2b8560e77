"""Losses of graded pairs, multi-similarity and spectral contrastive, against dense formulas and the libraries."""

import math

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import Pairs
from contrastive_ops.losses import angle, cosent, multi_similarity, pair_mse, spectral_contrastive
from contrastive_ops.testing.compare import check, check_derivatives, leaf, number, reduced

DOUBLE = torch.float64
N, D = 9, 6
GRADES = torch.tensor([0.1, 0.5, 0.5, 0.9, 0.0, 0.3, 0.9, 0.1, 0.4])


# ---- Graded pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pair_mse(reduction, normalize):
    x, y, labels, weight = leaf(N, D), leaf(N, D), leaf(N), torch.rand(N, dtype=DOUBLE, requires_grad=True)
    similarity = F.cosine_similarity(x, y) if normalize else (x * y).sum(1)
    truth = reduced((similarity - labels).square(), reduction, weight)
    value = pair_mse(x, y, labels, weight=weight, reduction=reduction, normalize=normalize)
    check(value, truth, [x, y, labels, weight])


def ordered(scores, labels, scale):
    wrong = (scale * (scores[:, None] - scores))[labels[:, None] < labels]
    return torch.cat([wrong.new_zeros(1), wrong]).logsumexp(0)


def angles(x, y):
    x, y = (F.pad(F.normalize(each), (0, x.shape[1] % 2)) for each in (x, y))
    (a, b), (c, d) = x.chunk(2, 1), y.chunk(2, 1)
    return ((a * c + b * d).sum(1) + (b * c - a * d).sum(1)).abs()


@pytest.mark.parametrize("depth", [6, 5])
@pytest.mark.parametrize("loss, scores", [(cosent, F.cosine_similarity), (angle, angles)])
@pytest.mark.parametrize("labels", [GRADES, (GRADES * 3).long(), GRADES > 0.4], ids=["float", "int", "bool"])
def test_order_of_pairs(loss, scores, labels, depth):
    x, y, scale = leaf(N, depth), leaf(N, depth), number(7.0)
    truth = ordered(scores(x, y), labels.double(), scale)
    check(loss(x, y, labels, scale=scale), truth, [x, y, scale])


def test_order_of_inner_products():
    x, y = leaf(N, D), leaf(N, D)
    truth = ordered((x * y).sum(1), GRADES, 1 / 0.05)
    check(cosent(x, y, GRADES, normalize=False), truth, [x, y])


@pytest.mark.parametrize("loss", [cosent, angle])
def test_second_derivatives_of_orders(loss):
    check_derivatives(lambda x, y: loss(x, y, GRADES[:5], temperature=0.7), (leaf(5, 4), leaf(5, 4)))


@pytest.mark.parametrize("loss", [cosent, angle])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_without_two_labels_there_is_nothing_to_order(loss, rows):
    x, y = leaf(rows, D), leaf(rows, D)
    value = loss(x, y, torch.ones(rows))
    assert value == 0
    for gradient in torch.autograd.grad(value, [x, y], allow_unused=True):
        assert gradient is None or not gradient.any()


def test_order_is_exact_near_convergence():
    """What is left of the loss is far below the rounding of 1."""
    x = torch.eye(2)
    y = torch.stack([-x[0], x[1]])  # cosines -1 and 1, in the right order
    value = cosent(x, y, torch.tensor([0.0, 1.0]), scale=20.0)
    torch.testing.assert_close(value, torch.tensor(-40.0).exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name, loss", [("CoSENTLoss", cosent), ("AnglELoss", angle)])
def test_parity_with_sentence_transformers(name, loss):
    theirs = getattr(pytest.importorskip("sentence_transformers.sentence_transformer.losses"), name)
    x, y = leaf(N, D), leaf(N, D)
    check(loss(x, y, GRADES), theirs(torch.nn.Identity()).compute_loss_from_embeddings([x, y], GRADES), [x, y])


# ---- Labels ----------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, -1, 3, 3])


def dense_multi_similarity(x, y, same, others, alpha, beta, base):
    s = x @ y.T
    pulled = ((-alpha * (s - base)).exp() * same).sum(1).log1p() / alpha
    return pulled + ((beta * (s - base)).exp() * others).sum(1).log1p() / beta


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("below", [None, 0.5])
def test_multi_similarity(backend, two_sided, below):
    x, y, weight = leaf(N, D), leaf(N, D) if two_sided else None, torch.rand(N, dtype=DOUBLE, requires_grad=True)
    u = F.normalize(x)
    v = F.normalize(y) if two_sided else u
    same = (LABELS[:, None] == LABELS) & (LABELS[:, None] != -1)
    own = torch.eye(N, dtype=torch.bool) & (not two_sided)
    others = ~same & ~own & (u @ v.T <= (torch.inf if below is None else below))
    truth = reduced(dense_multi_similarity(u, v, same & ~own, others, 1.5, 8.0, 0.3), "mean", weight)
    columns = (y, LABELS) if two_sided else ()
    given = {"alpha": 1.5, "beta": 8.0, "base": 0.3, "weight": weight, "backend": backend}
    given |= {} if below is None else {"pairs": Pairs(below=below)}
    check(multi_similarity(x, LABELS, *columns, **given), truth, [x, y, weight])


def test_parity_with_pytorch_metric_learning(backend):
    theirs = pytest.importorskip("pytorch_metric_learning.losses").MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    x, labels = leaf(N, D), LABELS.clamp_min(0)
    check(multi_similarity(x, labels, backend=backend), theirs(x, labels), [x], 1e-6)


# ---- Spectral --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_spectral_contrastive(normalize):
    x, y = leaf(N, D), leaf(N, D)
    s = F.normalize(x) @ F.normalize(y).T if normalize else x @ y.T
    off = ~torch.eye(N, dtype=torch.bool)
    truth = -2 * s.diagonal().mean() + s[off].square().mean()
    check(spectral_contrastive(x, y, normalize=normalize), truth, [x, y])
    check_derivatives(lambda x, y: spectral_contrastive(x, y, normalize=normalize), (leaf(4, 3), leaf(4, 3)))


@pytest.mark.parametrize("divergence", ["kl", "js"])
@pytest.mark.parametrize("normalize", [True, False])
def test_contrast_by_other_divergences(normalize, divergence):
    x, y = leaf(N, D), leaf(N, D)
    s = F.normalize(x) @ F.normalize(y).T if normalize else x @ y.T
    own, others = s.diagonal(), s[~torch.eye(N, dtype=torch.bool)]
    truth = F.softplus(-own).mean() + F.softplus(others).mean()
    if divergence == "kl":
        truth = others.exp().mean().log() - own.mean()
    options = {"normalize": normalize, "divergence": divergence}
    check(spectral_contrastive(x, y, **options), truth, [x, y])
    assert abs(spectral_contrastive(x * 1.001, y * 1.001, divergence=divergence) - truth) > 1e-9
    check_derivatives(lambda x, y: spectral_contrastive(x, y, **options), (leaf(4, 3), leaf(4, 3)))
    low = [each.detach().to(torch.bfloat16) for each in (x, y)]
    wide = spectral_contrastive(*(each.double() for each in low), **options)
    torch.testing.assert_close(spectral_contrastive(*low, **options).double(), wide, rtol=1e-5, atol=1e-5)
    large = 1000 * torch.eye(4)
    found = spectral_contrastive(large, large, divergence=divergence)
    torch.testing.assert_close(found, torch.tensor(-1e6 if divergence == "kl" else math.log(2)))


def test_spectral_contrastive_of_few_rows():
    for divergence, alone in (("chi2", -6.0), ("kl", -3.0), ("js", math.log1p(math.exp(-3.0)))):
        assert spectral_contrastive(torch.ones(0, 3), torch.ones(0, 3), divergence=divergence).isnan()
        x = torch.ones(1, 3, requires_grad=True)
        found = spectral_contrastive(x, torch.ones(1, 3), divergence=divergence)
        torch.testing.assert_close(found, torch.tensor(alone))
        assert torch.autograd.grad(found, x)[0].isfinite().all()
    with pytest.raises(ValueError, match="spectral_contrastive: divergence must be one of 'chi2', 'kl', 'js'"):
        spectral_contrastive(torch.ones(2, 3), torch.ones(2, 3), divergence="hellinger")


# ---- Bad input -------------------------------------------------------------------------------------------------------

X = torch.randn(4, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: cosent(X, X, torch.ones(3)), ValueError, "cosent: labels must have shape (4,), got (3,)"),
        (lambda: angle(X, X[:3], torch.ones(4)), ValueError, "angle: y must have the same shape as x"),
        (lambda: cosent(X, X, torch.ones(4), temperature=0.0), ValueError, "cosent: temperature must be in (0, inf]"),
        (lambda: pair_mse(X, X, torch.ones(3)), ValueError, "pair_mse: labels must have shape (4,)"),
        (lambda: multi_similarity(X, torch.ones(4)), TypeError, "multi_similarity: labels must be int64"),
        (
            lambda: multi_similarity(X, torch.arange(4), alpha=0.0),
            ValueError,
            "multi_similarity: alpha must be in (0, inf)",
        ),
        (lambda: spectral_contrastive(X, X[:2]), ValueError, "spectral_contrastive: y must have the same shape as x"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)
