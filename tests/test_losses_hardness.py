"""DCL, debiased, HCL and HN-NCE against dense formulas in float64, written from the papers and their code."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contrastive_ops import clip, nt_xent
from contrastive_ops.losses import dcl, debiased, hcl, hn_nce
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])


# ---- The definitions -----------------------------------------------------------------------------------------------


def views(z0, z1, scale, normalize):
    """Logits of all rows with each other, the positives' logits, and which pairs are negatives."""
    z = torch.cat([z0, z1])
    z = F.normalize(z) if normalize else z
    count = len(z0)
    logits = scale * z @ z.T
    positive = torch.cat([logits.diagonal(count), logits.diagonal(-count)])
    return logits, positive, ~torch.eye(count, dtype=torch.bool).repeat(2, 2)


def dense_dcl(z0, z1, scale, normalize=True, sigma=None):
    logits, positive, negative = views(z0, z1, scale, normalize)
    if sigma is not None:
        alike = (positive / scale / sigma)[: len(z0)].detach()
        positive = positive * (2 - len(z0) * alike.softmax(0)).repeat(2)
    return logits.masked_fill(~negative, -torch.inf).logsumexp(1) - positive


def dense_hcl(z0, z1, scale, beta, tau_plus, normalize=True):
    logits, positive, negative = views(z0, z1, scale, normalize)
    count = 2 * len(z0) - 2
    neg = logits.exp()[negative].view(len(logits), -1)
    importance = (beta * neg.log()).exp()
    total = (importance * neg).sum(1) / importance.mean(1)
    total = (total - tau_plus * count * positive.exp()) / (1 - tau_plus)
    total = torch.clamp(total, min=count * torch.exp(-torch.as_tensor(scale)))
    return -(positive.exp() / (positive.exp() + total)).log()


def dense_hn_nce(image, text, scale, alpha, beta, normalize=False):
    if normalize:
        image, text = F.normalize(image), F.normalize(text)
    losses = 0.0
    for logits in (scale * image @ text.T, scale * text @ image.T):
        count, positive = len(logits) - 1, logits.diagonal()
        others = ~torch.eye(len(logits), dtype=torch.bool)
        importance = (beta * logits).exp() * others
        importance = count * importance / importance.sum(1, keepdim=True)
        total = (importance * logits.exp()).sum(1)
        losses = losses - (positive.exp() / (alpha * positive.exp() + total)).log()
    return losses / 2


# ---- Values and gradients ------------------------------------------------------------------------------------------


@FUZZ
@given(
    count=st.integers(2, 9),
    reduction=REDUCTIONS,
    normalize=st.booleans(),
    sigma=st.sampled_from([None, 0.5, 2.0]),
)
def test_dcl(backend, count, reduction, normalize, sigma):
    z0, z1, temperature = leaf(count, 5), leaf(count, 5), torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    options = {"normalize": normalize, "sigma": sigma}
    value = dcl(z0, z1, temperature=temperature, reduction=reduction, backend=backend, **options)
    truth = dense_dcl(z0, z1, 1 / temperature, **options)
    check(value, reduced(truth, reduction), [z0, z1, temperature])


@FUZZ
@given(
    count=st.integers(2, 9),
    reduction=REDUCTIONS,
    normalize=st.booleans(),
    beta=st.sampled_from([0.0, 0.5, 2.0]),
    tau_plus=st.sampled_from([0.0, 0.1, 0.6]),
)
def test_hcl(backend, count, reduction, normalize, beta, tau_plus):
    z0, z1, temperature = leaf(count, 5), leaf(count, 5), torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    options = {"tau_plus": tau_plus, "normalize": normalize}
    value = hcl(z0, z1, beta=beta, temperature=temperature, reduction=reduction, backend=backend, **options)
    truth = reduced(dense_hcl(z0, z1, 1 / temperature, beta, **options), reduction)
    check(value, truth, [z0, z1, temperature])
    if beta == 0:
        value = debiased(z0, z1, temperature=temperature, reduction=reduction, backend=backend, **options)
        truth = reduced(dense_hcl(z0, z1, 1 / temperature, beta, **options), reduction)
        check(value, truth, [z0, z1, temperature])


@FUZZ
@given(
    count=st.integers(2, 9),
    reduction=REDUCTIONS,
    normalize=st.booleans(),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    beta=st.sampled_from([0.0, 0.25, 2.0]),
    weighted=st.booleans(),
)
def test_hn_nce(backend, count, reduction, normalize, alpha, beta, weighted):
    image, text, scale = leaf(count, 5), leaf(count, 5), torch.tensor(1.7, dtype=DOUBLE, requires_grad=True)
    weight = torch.rand(count, dtype=DOUBLE, requires_grad=True) if weighted else None
    options = {"alpha": alpha, "beta": beta, "normalize": normalize}
    value = hn_nce(image, text, scale=scale, weight=weight, reduction=reduction, backend=backend, **options)
    truth = reduced(dense_hn_nce(image, text, scale, **options), reduction, weight)
    check(value, truth, [image, text, scale, *([weight] if weighted else [])])


def test_without_hardness_they_are_the_plain_losses(backend):
    a, b = leaf(12, 5), leaf(12, 5)
    check(hcl(a, b, beta=0.0, tau_plus=0.0, backend=backend), nt_xent(a, b, backend=backend), [a, b])
    check(
        hn_nce(a, b, alpha=1.0, beta=0.0, backend=backend),
        clip(a, b, backend=backend),
        [a, b],
    )


def test_estimate_below_the_bound(backend):
    """Positives that outweigh the negatives make the estimate negative: the bound holds, without a gradient."""
    z0 = F.normalize(torch.eye(4, dtype=DOUBLE) + 0.1).requires_grad_()
    z1 = (z0.detach() + 0.01 * torch.randn(4, 4, dtype=DOUBLE)).requires_grad_()
    options = {"beta": 0.5, "tau_plus": 0.3}
    value = hcl(z0, z1, temperature=0.1, backend=backend, **options)
    truth = dense_hcl(z0, z1, 10.0, **options)
    least = F.softplus(math.log(6) - 10 - views(z0, z1, 10.0, True)[1])
    torch.testing.assert_close(truth, least)
    check(value, truth.mean(), [z0, z1])


TWO_VIEWS = [dcl, lambda a, b, **o: dcl(a, b, sigma=0.5, **o), debiased, hcl]


@pytest.mark.parametrize("which", range(4))
def test_gradcheck(backend, which):
    scale = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)

    def function(a, b, scale):
        return TWO_VIEWS[which](a, b, scale=scale, reduction="none", backend=backend)

    a, b = leaf(3, 2), leaf(3, 2)
    if which == 1:  # its weights are constants, which a finite difference would not know
        a, b = a.detach(), b.detach()
    check_derivatives(function, (a, b, scale))


@pytest.mark.parametrize("alpha,beta", [(0.0, 0.0), (1.0, 0.25)])
def test_gradcheck_of_hn_nce(backend, alpha, beta):
    scale = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)

    def function(a, b, scale):
        return hn_nce(a, b, alpha=alpha, beta=beta, scale=scale, reduction="none", backend=backend, normalize=False)

    leaves = (leaf(3, 2), leaf(3, 2), scale)
    check_derivatives(function, leaves)


@pytest.mark.parametrize("loss", [*TWO_VIEWS, hn_nce])
@pytest.mark.parametrize("count", [0, 1])
def test_without_negatives(backend, loss, count):
    a, b = leaf(count, 4), leaf(count, 4)
    rows = loss(a, b, reduction="none", backend=backend)
    assert rows.shape == ((count if loss is hn_nce else 2 * count),)
    for value in (rows.sum(), loss(a, b, backend=backend), loss(a, b, reduction="sum", backend=backend)):
        assert value == 0
        assert not any(g.any() for g in torch.autograd.grad(value, [a, b]))


# ---- Precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.3, 0.01, 0.001])
@pytest.mark.parametrize("name", ["dcl", "debiased", "hcl", "hn_nce"])
def test_gradient_error_in_bfloat16(backend, name, level):
    a, b = (t.requires_grad_() for t in clustered_pairs(256, 96, level, dtype=torch.bfloat16))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    loss, dense, scale = {
        "dcl": (dcl, dense_dcl, 50.0),
        "debiased": (debiased, lambda *p: dense_hcl(*p, 0.0, 0.001, False), 20.0),
        "hcl": (hcl, lambda *p: dense_hcl(*p, 1.0, 0.001, False), 20.0),
        "hn_nce": (hn_nce, lambda *p: dense_hn_nce(*p, 1.0, 0.25), 50.0),
    }[name]
    options = {"tau_plus": 0.001} if name in ("debiased", "hcl") else {}
    dense_options = {"normalize": False} if name == "dcl" else {}
    value = loss(a, b, scale=scale, normalize=False, backend=backend, **options)
    truth = dense(*exact, scale, **dense_options).mean()
    assert relative_error(value, truth) <= 1e-3
    gradients = zip(torch.autograd.grad(value, [a, b]), torch.autograd.grad(truth, exact), strict=True)
    for got, expected in gradients:
        assert got.dtype == torch.bfloat16
        assert relative_error(got, expected) <= GRADIENT_ERROR_16_BIT


@pytest.mark.parametrize("loss", [*TWO_VIEWS, hn_nce])
def test_nothing_overflows(backend, loss):
    """A temperature of 0.005: exp(200) is no float32, and a hardness of 2 asks for exp(600)."""
    a, b = leaf(16, 4, dtype=torch.float32), leaf(16, 4, dtype=torch.float32)
    options = {"beta": 2.0} if loss in (hcl, hn_nce) else {}
    value = loss(a, b, temperature=0.005, backend=backend, **options)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, [a, b]))


def test_gradient_of_one_view_alone(backend):
    a, b = leaf(6, 4), leaf(6, 4).detach()
    check(hcl(a, b, backend=backend), dense_hcl(a, b, 2.0, 1.0, 0.1).mean(), [a])
    check(hn_nce(a, b, scale=2.0, backend=backend, normalize=False), dense_hn_nce(a, b, 2.0, 1.0, 0.25).mean(), [a])


# ---- Parity and bad input ------------------------------------------------------------------------------------------


def test_parity_with_lightly(backend):
    peers = pytest.importorskip("lightly.loss.dcl_loss")
    a, b = leaf(10, 6), leaf(10, 6)
    check(dcl(a, b, temperature=0.2, backend=backend), peers.DCLLoss(0.2)(a, b), [a, b])
    value = dcl(a, b, temperature=0.2, sigma=0.7, backend=backend)
    check(value, peers.DCLWLoss(0.2, sigma=0.7)(a, b), [a, b])


X, Y = torch.randn(4, 3), torch.randn(5, 3)
BAD = [
    (lambda: dcl(X, Y), ValueError, "dcl: z1 must have the same shape as z0, got z0 (4, 3) and z1 (5, 3)"),
    (lambda: dcl(X, X, sigma=0.0), ValueError, "dcl: sigma must be in (0, inf), got 0.0"),
    (lambda: dcl(X, X, sigma="0.5"), TypeError, "dcl: sigma must be a number, got str"),
    (lambda: dcl(X, X, temperature=-1.0), ValueError, "dcl: temperature must be in (0, inf], got -1.0"),
    (lambda: debiased(X, X, tau_plus=1.0), ValueError, "debiased: tau_plus must be in [0, 1), got 1.0"),
    (lambda: debiased(X, X, tau_plus=float("nan")), ValueError, "debiased: tau_plus must be in [0, 1), got nan"),
    (lambda: hcl(X, X, beta=-0.5), ValueError, "hcl: beta must be in [0, inf), got -0.5"),
    (lambda: hcl(X, X, tau_plus=-0.5), ValueError, "hcl: tau_plus must be in [0, 1), got -0.5"),
    (lambda: hcl(X, X, reduction="avg"), ValueError, "hcl: reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    (
        lambda: hcl(X, X, temperature=0.1, scale=10.0),
        ValueError,
        "hcl: temperature and scale must not both be given",
    ),
    (lambda: hcl(X, X.half()), TypeError, "hcl: z1 must have the same dtype as z0"),
    (lambda: hn_nce(X, Y), ValueError, "hn_nce: text must have the same shape as image, got image (4, 3) and text"),
    (lambda: hn_nce(X, X, alpha=-1.0), ValueError, "hn_nce: alpha must be in [0, inf), got -1.0"),
    (lambda: hn_nce(X, X, beta=float("inf")), ValueError, "hn_nce: beta must be in [0, inf), got inf"),
    (lambda: hn_nce(X, X, beta=True), TypeError, "hn_nce: beta must be a number, got bool"),
    (lambda: hn_nce(X, X, weight=-torch.ones(4)), ValueError, "hn_nce: weight must not be negative, got -1.0"),
    (lambda: hn_nce(X, X, weight=torch.ones(3)), ValueError, "hn_nce: weight must have shape (4,), got (3,)"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[m[:60] for *_, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
