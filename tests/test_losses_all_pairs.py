"""Contrastive and lifted structure losses of all pairs against dense formulas and pytorch-metric-learning."""

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import batch_contrastive, lifted_structure
from contrastive_ops.testing.compare import check, check_derivatives, leaf

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, -1, 3, 3])
N, D = 9, 6


def distances(x, normalize):
    u = F.normalize(x) if normalize else x
    square = (u[:, None] - u).square().sum(2)
    return (square + torch.eye(len(x), dtype=x.dtype)).sqrt()  # its own distance is not looked at


def pairs(labels):
    others = ~torch.eye(len(labels), dtype=torch.bool)
    same = (labels[:, None] == labels) & (labels != -1) & others
    return same, others & ~same


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mean_over", ["nonzero", "pairs"])
@pytest.mark.parametrize("squared", [False, True])
def test_contrastive_of_all_pairs(squared, mean_over, normalize):
    x = leaf(N, D)
    d, (same, others) = distances(x, normalize), pairs(LABELS)
    near, far = (d - 0.7).relu()[same], (1.2 - d).relu()[others]
    counts = [(each > 0).sum() if mean_over == "nonzero" else len(each) for each in (near, far)]
    sums = [(each**2 / 2 if squared else each).sum() for each in (near, far)]
    truth = sums[0] / counts[0] + sums[1] / max(counts[1], 1)
    options = {"positive_margin": 0.7, "negative_margin": 1.2, "squared": squared, "mean_over": mean_over}
    check(batch_contrastive(x, LABELS, normalize=normalize, **options), truth, [x])


@pytest.mark.parametrize("normalize", [True, False])
def test_lifted_structure(normalize):
    x = leaf(N, D)
    d, (same, others) = distances(x, normalize), pairs(LABELS)
    lse = (1.5 - d).masked_fill(~others, -torch.inf).logsumexp(1)
    truth = (torch.logaddexp(lse[:, None], lse) + d - 0.2).relu()[same].square().mean() / 2
    check(lifted_structure(x, LABELS, margin=1.5, positive_margin=0.2, normalize=normalize), truth, [x])


@pytest.mark.parametrize("loss", [batch_contrastive, lifted_structure])
def test_chunks_derivatives_and_precision(loss, monkeypatch):
    x = leaf(5, 3)
    check_derivatives(lambda x: loss(x, LABELS[:5]), (x,))
    whole = loss(x, LABELS[:5])
    monkeypatch.setattr("contrastive_ops.reference.stream.CHUNK_ELEMENTS", 10)
    check(loss(x, LABELS[:5]), whole, [x])
    low = x.detach().bfloat16().requires_grad_()
    assert loss(low, LABELS[:5]).dtype == torch.float32
    torch.testing.assert_close(loss(low, LABELS[:5]), loss(low.float(), LABELS[:5]))


@pytest.mark.parametrize("loss", [batch_contrastive, lifted_structure])
@pytest.mark.parametrize("labels", [torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.full((4,), -1)])
def test_without_positives_or_negatives(loss, labels):
    x = torch.ones(4, 3, requires_grad=True)  # and all rows alike
    value = loss(x, labels)
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()
    if loss is lifted_structure:
        assert value == 0


@pytest.mark.parametrize(
    "name, loss", [("ContrastiveLoss", batch_contrastive), ("LiftedStructureLoss", lifted_structure)]
)
def test_parity_with_pytorch_metric_learning(name, loss):
    theirs = getattr(pytest.importorskip("pytorch_metric_learning.losses"), name)()
    x, labels = leaf(N, D), LABELS.clamp_min(0)
    check(loss(x, labels), theirs(x, labels), [x], 1e-6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: batch_contrastive(torch.randn(3, 4), torch.arange(2)), ValueError, "labels must have shape"),
        (lambda: batch_contrastive(torch.randn(3, 4), torch.randn(3)), TypeError, "labels must"),
        (
            lambda: batch_contrastive(torch.randn(3, 4), torch.arange(3), negative_margin=-1),
            ValueError,
            "negative_margin",
        ),
        (
            lambda: batch_contrastive(torch.randn(3, 4), torch.arange(3), mean_over="rows"),
            ValueError,
            "mean_over must be",
        ),
        (lambda: lifted_structure(torch.randn(3), torch.arange(3)), ValueError, "lifted_structure: x must"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
