"""CosFace and ArcFace against dense float64 formulas and pytorch-metric-learning."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contrastive_ops.losses.margin_softmax import arc_face, cos_face, margin_softmax
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
FUZZ = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def dense(x, prototypes, labels, kind, margin, scale, easy_margin=False, normalize=True):
    """Rows of the loss, angles and all."""
    x, prototypes = (F.normalize(t) if normalize else t for t in (x, prototypes))
    cosine = x @ prototypes.T
    own = cosine.gather(1, labels[:, None])
    margin, scale = (torch.as_tensor(t, dtype=cosine.dtype).expand(len(x))[:, None] for t in (margin, scale))
    if kind == "cosface":
        moved = own - margin
    else:
        angle = torch.acos(own)
        moved = torch.cos(angle + margin)
        if easy_margin:
            moved = torch.where(angle < math.pi / 2, moved, own)
        else:
            moved = torch.where(angle <= math.pi - margin, moved, own - margin * torch.sin(margin))
    logits = scale * cosine.scatter(1, labels[:, None], moved)
    return F.cross_entropy(logits, labels, reduction="none")


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("kind", ["cosface", "arcface"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_margin_softmax(backend, reduction, kind, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    # two dimensions and more: the angle has no derivative at 0 and 180 degrees
    n, classes, depth = draw(st.integers(1, 19)), draw(st.integers(1, 23)), draw(st.integers(2, 7))
    x, prototypes, labels = leaf(n, depth), leaf(classes, depth), torch.randint(0, classes, (n,))
    if draw(st.booleans()):
        labels = torch.zeros_like(labels)
    of_rows, weighted, easy = draw(st.booleans()), draw(st.booleans()), draw(st.booleans()) and kind == "arcface"
    margin = torch.rand(n, dtype=DOUBLE).requires_grad_() if of_rows else draw(st.sampled_from([0.0, 0.4, 1.5]))
    scale = (
        torch.rand(n, dtype=DOUBLE) + 1 if draw(st.booleans()) else torch.tensor(4.0, dtype=DOUBLE)
    ).requires_grad_()
    weight = torch.rand(n, dtype=DOUBLE, requires_grad=True) if weighted else None
    options = {"scale": scale, "weight": weight, "reduction": reduction, "backend": backend}
    value = margin_softmax(x, prototypes, labels, margin=margin, kind=kind, easy_margin=easy, **options)
    rows = dense(x, prototypes, labels, kind, margin, scale, easy)
    leaves = [t for t in (x, prototypes, scale, margin, weight) if isinstance(t, torch.Tensor)]
    check(value, reduced(rows, reduction, weight), leaves)


def test_defaults(backend):
    x, prototypes, labels = leaf(9, 5), leaf(4, 5), torch.arange(9) % 4
    check(
        cos_face(x, prototypes, labels, backend=backend),
        dense(x, prototypes, labels, "cosface", 0.35, 64.0).mean(),
        [x, prototypes],
    )
    check(
        arc_face(x, prototypes, labels, backend=backend),
        dense(x, prototypes, labels, "arcface", 0.5, 64.0).mean(),
        [x, prototypes],
    )


def test_rows_of_length_one_need_no_normalisation(backend):
    x, prototypes, labels = F.normalize(leaf(9, 5)), F.normalize(leaf(4, 5)), torch.arange(9) % 4
    for loss in (cos_face, arc_face):
        inside = loss(x, prototypes, labels, backend=backend)
        torch.testing.assert_close(loss(x, prototypes, labels, normalize=False, backend=backend), inside)


def test_no_margin_is_cross_entropy(backend):
    x, prototypes, labels = leaf(9, 5), leaf(4, 5), torch.arange(9) % 4
    for loss in (cos_face, arc_face):
        truth = F.cross_entropy(5.0 * F.normalize(x) @ F.normalize(prototypes).T, labels)
        check(loss(x, prototypes, labels, margin=0.0, scale=5.0, backend=backend), truth, [x, prototypes])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_row_on_its_prototype_has_a_finite_gradient(backend, dtype):
    """acos has an infinite derivative at 1, and rounding puts cosines there and beyond."""
    prototypes = torch.randn(4, 5, dtype=dtype).requires_grad_()
    labels = torch.arange(8) % 4
    x = torch.cat([prototypes[:4], -prototypes[:4]]).detach().requires_grad_()
    value = arc_face(x, prototypes, labels, margin=0.5, scale=8.0, reduction="none", backend=backend)
    # near the prototype cos(m) s against the others, opposite to it (-1 - m sin m) s
    cosine = F.normalize(x.detach()) @ F.normalize(prototypes.detach()).T
    own = torch.cat([torch.full((4,), math.cos(0.5)), torch.full((4,), -1 - 0.5 * math.sin(0.5))]).to(dtype)
    truth = F.cross_entropy(8.0 * cosine.scatter(1, labels[:, None], own[:, None]), labels, reduction="none")
    torch.testing.assert_close(value, truth, rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), [x, prototypes]))


def test_the_logit_falls_with_the_angle(backend):
    """Beyond 180 degrees less the margin cos(angle + margin) would rise again."""
    angle = torch.linspace(0, math.pi, 200, dtype=DOUBLE)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    prototypes = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=DOUBLE)
    for easy in (False, True):
        value = arc_face(
            x,
            prototypes,
            torch.zeros(200, dtype=torch.int64),
            margin=0.8,
            easy_margin=easy,
            scale=1.0,
            reduction="none",
            backend=backend,
        )
        others = -angle.sin()
        own = others - torch.log(torch.expm1(value))
        falls = own.diff() < 1e-9
        assert falls.all() if not easy else falls.sum() == 198  # the easy margin jumps once, at 90 degrees


def test_one_class_and_no_rows(backend):
    x, prototypes = leaf(3, 4), leaf(1, 4)
    for loss in (cos_face, arc_face):
        value = loss(x, prototypes, torch.zeros(3, dtype=torch.int64), reduction="none", backend=backend)
        assert torch.equal(value, torch.zeros_like(value))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(value.sum(), [x, prototypes]))
        none = torch.zeros(0, dtype=torch.int64)
        assert loss(leaf(0, 4), prototypes, none, reduction="none", backend=backend).shape == (0,)
        assert loss(leaf(0, 4), prototypes, none, reduction="sum", backend=backend) == 0
        assert loss(leaf(0, 4), prototypes, none, backend=backend).isnan()


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_gradcheck(backend, kind):
    labels = torch.tensor([0, 2, 1, 1])

    def function(x, prototypes, scale, margin):
        return margin_softmax(x, prototypes, labels, margin=margin, kind=kind, scale=scale, backend=backend)

    margin = torch.tensor([0.1, 0.3, 0.5, 0.2], dtype=DOUBLE, requires_grad=True)
    leaves = (leaf(4, 3), leaf(3, 3), torch.tensor(1.3, dtype=DOUBLE, requires_grad=True), margin)
    check_derivatives(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", [0.3, 0.01, 0.001])
@pytest.mark.parametrize("loss,kind,margin", [(cos_face, "cosface", 0.05), (arc_face, "arcface", 0.05)])
def test_gradient_error_in_three_regimes(backend, dtype, level, loss, kind, margin):
    x, prototypes = (t.requires_grad_() for t in clustered_pairs(256, 64, level, dtype=dtype))
    labels = torch.arange(256)
    exact = [t.detach().double().requires_grad_() for t in (x, prototypes)]
    truth = dense(*exact, labels, kind, margin, 50.0, normalize=False).mean()
    value = loss(x, prototypes, labels, margin=margin, scale=50.0, normalize=False, backend=backend)
    pairs = zip(torch.autograd.grad(value, [x, prototypes]), torch.autograd.grad(truth, exact), strict=True)
    assert all(got.dtype == dtype and relative_error(got, expected) <= GRADIENT_ERROR_16_BIT for got, expected in pairs)


@pytest.mark.parametrize("name", ["CosFaceLoss", "ArcFaceLoss"])
def test_pytorch_metric_learning(name):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = leaf(40, 6), torch.randint(0, 5, (40,))
    peer = getattr(losses, name)(num_classes=5, embedding_size=6).double()
    weights = peer.W.detach().T.contiguous().requires_grad_()
    ours = {"CosFaceLoss": cos_face, "ArcFaceLoss": arc_face}[name]
    margin = 0.35 if name == "CosFaceLoss" else math.radians(28.6)
    value = ours(x, weights, labels, margin=margin, backend="reference")
    truth = peer(x, labels)
    torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-9)
    got, expected = torch.autograd.grad(value, [x, weights]), torch.autograd.grad(truth, [x, peer.W])
    torch.testing.assert_close(got[0], expected[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got[1], expected[1].T, rtol=1e-7, atol=1e-9)


X, P, L = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 4])
CASES = [
    (
        lambda: cos_face(X, torch.randn(5, 2), L),
        ValueError,
        "cos_face: prototypes must have the same last dimension as x, got x (4, 3) and prototypes (5, 2)",
    ),
    (lambda: arc_face(X, P, L[:3]), ValueError, "arc_face: labels must have shape (4,), got (3,)"),
    (lambda: arc_face(X, P, L.float()), TypeError, "arc_face: labels must be int64, got torch.float32"),
    (lambda: cos_face(X, P, L + 1), ValueError, "cos_face: labels must be in [0, 5), got 5"),
    (lambda: cos_face(X, P, L - 1), ValueError, "cos_face: labels must be in [0, 5), got -1"),
    (lambda: cos_face(X, P, L, margin=-0.1), ValueError, "cos_face: margin must be in [0, inf), got -0.1"),
    (lambda: cos_face(X, P, L, margin="0.1"), TypeError, "cos_face: margin must be a number, got str"),
    (lambda: cos_face(X, P, L, margin=torch.ones(3)), ValueError, "cos_face: margin must have shape (4,), got (3,)"),
    (lambda: arc_face(X, P, L, margin=28.6), ValueError, "arc_face: margin must be in [0, 3.14159265"),
    (
        lambda: margin_softmax(X, P, L, margin=0.1, kind="sphereface"),
        ValueError,
        "margin_softmax: kind must be one of 'cosface', 'arcface', got 'sphereface'",
    ),
    (
        lambda: margin_softmax(X, P, L, margin=0.1, easy_margin=True),
        ValueError,
        "margin_softmax: easy_margin must be False for kind='cosface', got True",
    ),
    (
        lambda: arc_face(X, P, L, temperature=0.1, scale=10.0),
        ValueError,
        "arc_face: temperature and scale must not both be given",
    ),
    (lambda: arc_face(X, P, L, weight=-torch.ones(4)), ValueError, "arc_face: weight must not be negative, got -1.0"),
    (lambda: arc_face(X, P, L, backend="gpu"), ValueError, "arc_face: backend must be one of"),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:60] for *_, m in CASES])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
