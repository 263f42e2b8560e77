"""Alignment, uniformity, sparsity, decorrelation and whitening against dense formulas in float64."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import (
    RunningCovariance,
    alignment,
    barlow_twins,
    covariance_penalty,
    effective_rank,
    group_whiten,
    log_det,
    sparsity,
    uniformity,
    variance_hinge,
    vicreg,
)
from contrastive_ops.testing import relative_error, saved_bytes

DOUBLE = torch.float64
# More rows than features, and more features than rows, where the dual Gram matrix is used.
SHAPES = [(23, 7), (7, 23), (2, 5), (9, 9)]


def leaf(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def assert_same(function, truth, *inputs, tolerance=1e-10):
    """Values and gradients agree."""
    value, expected = function(*inputs), truth(*inputs)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(value, inputs, cotangent)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- Alignment and uniformity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_alignment(power, normalize):
    def dense(x, y):
        x, y = (F.normalize(x), F.normalize(y)) if normalize else (x, y)
        return torch.linalg.vector_norm(x - y, dim=1) ** power

    options = {"power": power, "normalize": normalize, "reduction": "none"}
    assert_same(lambda x, y: alignment(x, y, **options), dense, leaf(8, 5), leaf(8, 5))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_equal_rows_are_aligned_without_a_gradient(power):
    x = leaf(3, 4)
    value = alignment(x, x.detach().clone(), power=power)
    value.backward()
    assert value == 0 and torch.equal(x.grad, torch.zeros_like(x))


def dense_uniformity(x, queue=None, t=2.0, normalize=True):
    x = F.normalize(x) if normalize else x
    squared = [(x[i] - x[j]).square().sum() for i in range(len(x)) for j in range(i)]
    if queue is not None:
        queue = F.normalize(queue) if normalize else queue
        squared += [(a - b).square().sum() for a in x for b in queue]
    return torch.stack(squared).mul(-t).exp().mean().log()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("t", [0.3, 2.0])
def test_uniformity(backend, normalize, t):
    given = {"t": t, "normalize": normalize}
    assert_same(
        lambda x, q: uniformity(x, q, backend=backend, **given),
        lambda x, q: dense_uniformity(x, q, **given),
        leaf(9, 5),
        leaf(4, 5),
    )
    assert_same(lambda x: uniformity(x, backend=backend, **given), lambda x: dense_uniformity(x, **given), leaf(9, 5))


def test_uniformity_of_few_rows():
    assert uniformity(torch.randn(1, 4)) == 0 and uniformity(torch.randn(0, 4)).isnan()
    pair = torch.eye(2)
    torch.testing.assert_close(uniformity(pair), torch.tensor(-4.0))
    torch.testing.assert_close(uniformity(pair[:1], pair[1:]), torch.tensor(-4.0))
    # Of far points the potential is too small for a float; its logarithm is not.
    torch.testing.assert_close(uniformity(100 * pair, normalize=False), torch.tensor(-40_000.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uniformity_of_sixteen_bits(dtype):
    x = torch.randn(60, 16).to(dtype).requires_grad_()
    (found,) = torch.autograd.grad(uniformity(x), x)
    wide = x.detach().double().requires_grad_()
    truth = dense_uniformity(wide)
    (expected,) = torch.autograd.grad(truth, wide)
    assert uniformity(x).dtype == torch.float32
    torch.testing.assert_close(uniformity(x).double(), truth, rtol=2e-3, atol=2e-3)
    assert relative_error(found, expected) < 5e-3


def test_uniformity_keeps_no_matrix():
    x = torch.randn(1000, 16).requires_grad_()
    size, _ = saved_bytes(lambda: uniformity(x, memory_budget=0))
    assert 0 < size <= 4 * x.numel() * x.element_size()


def test_uniformity_compiles():
    compiled = torch.compile(uniformity, fullgraph=True, backend="aot_eager")
    for rows in (24, 37):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(compiled(x), uniformity(x))


# ---- Sparsity ------------------------------------------------------------------------------------------------------


def test_sparsity():
    assert_same(sparsity, lambda x: sum((x[:, v].abs().sum() / len(x)) ** 2 for v in range(x.shape[1])), leaf(6, 11))
    assert_same(lambda x: sparsity(x, kind="l1"), lambda x: sum(row.abs().sum() for row in x) / len(x), leaf(6, 11))


# ---- Variance and covariance ---------------------------------------------------------------------------------------


def dense_covariance(x, correction=1):
    centred = [row - x.mean(0) for row in x]
    return sum(torch.outer(row, row) for row in centred) / (len(x) - correction)


def dense_penalty(x):
    covariance = dense_covariance(x)
    D = len(covariance)
    return sum(covariance[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / D


@pytest.mark.parametrize("shape", SHAPES)
def test_variance_and_covariance(shape):
    assert_same(
        lambda x: variance_hinge(x, std=1.1),
        lambda x: F.relu(1.1 - (dense_covariance(x).diag() + 1e-4).sqrt()).mean(),
        leaf(*shape),
    )
    assert_same(covariance_penalty, dense_penalty, leaf(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_vicreg(shape):
    def dense(x, y):
        hinges = [F.relu(1 - (dense_covariance(each).diag() + 1e-4).sqrt()).mean() for each in (x, y)]
        return 25 * (x - y).square().mean() + 12.5 * sum(hinges) + dense_penalty(x) + dense_penalty(y)

    assert_same(vicreg, dense, leaf(*shape), leaf(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_barlow_twins(shape):
    def dense(x, y):
        x, y = (F.batch_norm(each, None, None, training=True) for each in (x, y))
        r = torch.stack([torch.stack([(x[:, a] * y[:, b]).mean() for b in range(shape[1])]) for a in range(shape[1])])
        on = torch.eye(shape[1], dtype=DOUBLE)
        return ((r - 1).square() * on).sum() + 0.0051 * (r.square() * (1 - on)).sum()

    assert_same(barlow_twins, dense, leaf(*shape), leaf(*shape), tolerance=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_det(shape):
    def dense(x):
        return torch.logdet(dense_covariance(x, correction=0) + 1e-3 * torch.eye(shape[1], dtype=DOUBLE))

    assert_same(lambda x: log_det(x, eps=1e-3), dense, leaf(*shape), tolerance=1e-8)


def test_log_det_of_a_covariance():
    x = leaf(12, 5)
    covariance = dense_covariance(x, correction=0)
    torch.testing.assert_close(log_det(covariance, covariance=True), log_det(x))
    assert log_det(-torch.eye(3), covariance=True).isnan()
    assert log_det(torch.zeros(0, 3)).isnan()


def test_running_covariance_follows_its_recursion():
    running = RunningCovariance(3, momentum=0.25)
    mean, covariance = torch.zeros(3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE)
    for _ in range(4):
        x = leaf(6, 3)
        found = running(x)
        mean = 0.25 * x.mean(0) + 0.75 * mean
        covariance = 0.25 * (x - mean).T @ (x - mean) / 6 + 0.75 * covariance
        torch.testing.assert_close(found, covariance)
        (a,) = torch.autograd.grad(log_det(found, covariance=True), x)
        (b,) = torch.autograd.grad(torch.logdet(covariance + 1e-6 * torch.eye(3)), x)
        torch.testing.assert_close(a, b)
        mean, covariance = mean.detach(), covariance.detach()
    kept = running.covariance.clone()
    running.eval()(torch.randn(6, 3))
    assert torch.equal(running.covariance, kept) and not running.covariance.requires_grad


def test_running_covariance_forgets_as_corinfomax_does():
    """``R = la_R * R + (1 - la_R) * covariance`` with la_R = 0.01, and the mean likewise."""
    running, x = RunningCovariance(3), leaf(6, 3)
    mean = 0.99 * x.mean(0)
    expected = 0.01 * torch.eye(3) + 0.99 * (x - mean).T @ (x - mean) / 6
    torch.testing.assert_close(running(x), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centre", [False, True])
def test_effective_rank(shape, centre):
    def dense(x):
        x = x - x.mean(0) if centre else x
        share = torch.linalg.svdvals(x).square()
        share = (share / share.sum())[: min(shape) - (centre and shape[0] <= shape[1])]
        return (-(share * share.log()).sum()).exp()

    assert_same(lambda x: effective_rank(x, centre=centre), dense, leaf(*shape), tolerance=1e-7)


def test_effective_rank_of_repeated_directions():
    x = torch.eye(6).requires_grad_()
    value = effective_rank(x)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(6.0))
    assert x.grad.isfinite().all()
    assert effective_rank(torch.zeros(4, 3)).isnan()


# ---- Whitening -----------------------------------------------------------------------------------------------------


def dense_whiten(x, groups, eps):
    parts = []
    for part in x.chunk(groups, 1):
        covariance = dense_covariance(part, correction=0) + eps * torch.eye(part.shape[1], dtype=DOUBLE)
        values, vectors = torch.linalg.eigh(covariance)
        parts.append((part - part.mean(0)) @ vectors @ values.rsqrt().diag() @ vectors.T)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_whitening(groups):
    assert_same(
        lambda x: group_whiten(x, groups, eps=1e-3),
        lambda x: dense_whiten(x, groups, 1e-3),
        leaf(40, 6),
        tolerance=1e-8,
    )


def test_whitening_of_equal_eigenvalues_has_a_finite_gradient():
    x = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]], dtype=DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: group_whiten(x, eps=1e-3), (x,))
    right = torch.autograd.grad(group_whiten(x, eps=1e-3).pow(3).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: group_whiten(x, eps=1e-3).pow(3).sum())(x.detach()), right)


def test_shuffled_groups_are_another_view_of_the_same_features():
    x = torch.randn(50, 8, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(3)
    white = group_whiten(x, 4, eps=1e-12, shuffle=True, generator=generator)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    expected = torch.empty_like(x)
    expected[:, order] = dense_whiten(x[:, order], 4, 1e-12)
    torch.testing.assert_close(white, expected)
    assert not torch.allclose(white, group_whiten(x, 4, eps=1e-12))


# ---- Bad input -----------------------------------------------------------------------------------------------------

X = torch.randn(4, 6)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: alignment(X, X[:3]), ValueError, "alignment: y must have the same shape as x"),
        (lambda: alignment(X, X, power=0), ValueError, "alignment: power must be in (0, inf), got 0"),
        (lambda: uniformity(X, X[:, :2]), ValueError, "uniformity: queue must have the same last dimension as x"),
        (lambda: uniformity(X, t=-1), ValueError, "uniformity: t must be in (0, inf), got -1"),
        (lambda: sparsity(X, kind="l2"), ValueError, "sparsity: kind must be one of 'flops', 'l1', got 'l2'"),
        (lambda: sparsity(X.long()), TypeError, "sparsity: x must be float32"),
        (lambda: vicreg(X, X[:3]), ValueError, "vicreg: y must have the same shape as x"),
        (lambda: barlow_twins(X, X.double()), TypeError, "barlow_twins: y must have the same dtype as x"),
        (lambda: log_det(X, eps=0), ValueError, "log_det: eps must be in (0, inf), got 0"),
        (lambda: log_det(X, covariance=True), ValueError, "log_det: x must have shape (D, D)"),
        (lambda: log_det([1.0]), TypeError, "log_det: x must be a tensor, got list"),
        (lambda: effective_rank(X[0]), ValueError, "effective_rank: x must have two dimensions"),
        (lambda: group_whiten(X, 4), ValueError, "group_whiten: groups must be an int that divides 6 features, got 4"),
        (lambda: RunningCovariance(3)(X), ValueError, "RunningCovariance: x must have shape (N, 3), got (4, 6)"),
        (lambda: RunningCovariance(3, 0), ValueError, "RunningCovariance: momentum must be in (0, 1], got 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_autocast_does_not_round_the_products():
    x = torch.randn(32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = covariance_penalty(x), log_det(x), effective_rank(x), group_whiten(x)
    for a, b in zip(found, (covariance_penalty(x), log_det(x), effective_rank(x), group_whiten(x)), strict=True):
        assert torch.equal(a, b)
    assert math.isfinite(float(found[1]))
