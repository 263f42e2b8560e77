"""Several prototypes of each class against dense float64 formulas and pytorch-metric-learning."""

import math

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses.margin_softmax import arc_face, cos_face, margin_softmax
from contrastive_ops.testing import saved_bytes
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
N, C, K, D = 13, 5, 3, 6


def dense(x, prototypes, labels, kind, margin, scale, easy_margin=False, normalize=True):
    """Rows of the loss from the best cosine with each class."""
    x, prototypes = (F.normalize(t, dim=-1) if normalize else t for t in (x, prototypes))
    cosine = torch.einsum("nd,ckd->nck", x, prototypes).amax(2)
    own = cosine.gather(1, labels[:, None])
    margin, scale = (torch.as_tensor(t, dtype=cosine.dtype).expand(len(x))[:, None] for t in (margin, scale))
    if kind == "cosface":
        moved = own - margin
    else:
        moved = torch.cos(torch.acos(own) + margin)
        moved = torch.where(
            own > 0 if easy_margin else own >= -margin.cos(), moved, own if easy_margin else own - margin * margin.sin()
        )
    return F.cross_entropy(scale * cosine.scatter(1, labels[:, None], moved), labels, reduction="none")


@pytest.mark.parametrize("kind, easy", [("cosface", False), ("arcface", False), ("arcface", True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("of_rows", [False, True])
def test_the_nearest_of_several_prototypes_counts(backend, kind, easy, reduction, of_rows):
    x, prototypes, labels = leaf(N, D), leaf(C, K, D), torch.randint(C, (N,))
    weight = torch.rand(N, dtype=DOUBLE, requires_grad=True)
    margin = torch.rand(N, dtype=DOUBLE, requires_grad=True) if of_rows else 0.4
    scale = (torch.rand(N, dtype=DOUBLE) + 1 if of_rows else torch.tensor(4.0, dtype=DOUBLE)).requires_grad_()
    given = {"scale": scale, "weight": weight, "reduction": reduction, "backend": backend}
    value = margin_softmax(x, prototypes, labels, margin=margin, kind=kind, easy_margin=easy, **given)
    rows = dense(x, prototypes, labels, kind, margin, scale, easy)
    check(value, reduced(rows, reduction, weight), [x, prototypes, scale, weight, *([margin] if of_rows else [])])


@pytest.mark.parametrize("loss", [cos_face, arc_face])
def test_one_sub_centre_is_none(backend, loss):
    x, prototypes, labels = leaf(N, D), leaf(C, D), torch.randint(C, (N,))
    plain = loss(x, prototypes, labels, backend=backend)
    check(loss(x, prototypes[:, None], labels, backend=backend), plain, [x, prototypes])


def test_derivatives():
    x, prototypes, labels = leaf(4, 3), leaf(3, 2, 3), torch.tensor([0, 2, 1, 2])
    check_derivatives(lambda *leaves: arc_face(*leaves, labels, margin=0.3, scale=4.0), (x, prototypes))


def test_16_bits_are_as_close_as_those_of_float32_rows():
    x, prototypes, labels = torch.randn(N, D), torch.randn(C, K, D), torch.randint(C, (N,))
    low = [each.bfloat16() for each in (x, prototypes)]
    found = arc_face(*low, labels, scale=16.0, reduction="none")
    truth = dense(*(each.double() for each in low), labels, "arcface", 0.5, 16.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


def test_rows_of_weight_0_may_hold_anything():
    x, prototypes, labels = torch.randn(N, D), torch.randn(C, K, D, requires_grad=True), torch.randint(C, (N,))
    x[2], labels[2], weight = torch.nan, 99, (torch.arange(N) != 2).float()
    loss = arc_face(x, prototypes, labels, weight=weight)
    loss.backward()
    assert loss.isfinite() and prototypes.grad.isfinite().all()


def test_similarities_are_not_kept():
    """2,000 rows and 4,000 sub-centres: 32 MB of cosines, of which a chunk is in memory at a time."""
    x, prototypes = torch.randn(2000, 8, requires_grad=True), torch.randn(1000, 4, 8, requires_grad=True)
    size, _ = saved_bytes(lambda: arc_face(x, prototypes, torch.arange(2000) % 1000))
    assert size < 8 * 4 * (x.numel() + prototypes.numel())


def test_sub_centre_arc_face_is_that_of_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = leaf(40, D), torch.randint(C, (40,))
    peer = losses.SubCenterArcFaceLoss(num_classes=C, embedding_size=D, sub_centers=K).double()
    prototypes = peer.W.detach().T.contiguous().view(C, K, D).requires_grad_()
    value, truth = arc_face(x, prototypes, labels, margin=math.radians(28.6)), peer(x, labels)
    torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-9)
    found, wanted = torch.autograd.grad(value, [x, prototypes]), torch.autograd.grad(truth, [x, peer.W])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found[1].flatten(0, 1), wanted[1].T, rtol=1e-7, atol=1e-9)


X, LABELS = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: arc_face(X, torch.randn(3, 0, 3), LABELS), "arc_face: prototypes must"),
        (
            lambda: arc_face(X, torch.randn(3, 2, 4), LABELS),
            "arc_face: prototypes must have the same last dimension as x",
        ),
        (lambda: cos_face(X, torch.randn(2, 5, 3), LABELS), "cos_face: labels must be in [0, 2), got 2"),
        (lambda: arc_face(X, torch.randn(3, 2, 3), LABELS, backend="fast"), "arc_face: backend must be one of"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message)
