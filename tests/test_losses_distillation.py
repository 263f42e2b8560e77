"""Losses of distillation against dense formulas: CLIP-KD, open_clip, RKD, ProCLIP, self-similarity; modules, errors."""

import math

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import Pairs, nn
from contrastive_ops.losses import distance_distillation, similarity_distillation
from contrastive_ops.testing.compare import check, check_derivatives, leaf, number, reduced

INF = float("inf")


def log_softmaxes(s, t, dim=1):
    return s.log_softmax(dim), t.log_softmax(dim)


def kl(s, t, dim=1):
    q, p = log_softmaxes(s, t, dim)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(dim)


def ce(s, t, dim=1):
    q, p = log_softmaxes(s, t, dim)
    return -(p.exp() * q).sum(dim)


def reverse_kl(s, t, dim=1):
    return kl(t, s, dim)


def js(s, t, dim=1):
    q, p = log_softmaxes(s, t, dim)
    m = torch.logaddexp(p, q) - math.log(2.0)
    return ((p.exp() * (p - m) + q.exp() * (q - m)) / 2).sum(dim)


DIVERGENCES = {"kl": kl, "ce": ce, "reverse_kl": reverse_kl, "js": js}


def teachers(n, m=None, depth=4):
    return [torch.randn(k, depth, dtype=torch.float64) for k in (n, m or n)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows(divergence, reduction, backend):
    x, y, teacher = leaf(9, 6), leaf(14, 6), teachers(9, 14)
    temperature, weight = number(0.8), leaf(9).detach().abs().requires_grad_()
    rows = DIVERGENCES[divergence](x @ y.T / temperature, teacher[0] @ teacher[1].T / 0.5)
    options = {"temperature": temperature, "teacher_temperature": 0.5, "weight": weight, "backend": backend}
    value = similarity_distillation(
        x, y, *teacher, divergence=divergence, reduction=reduction, normalize=False, **options
    )
    check(value, reduced(rows, reduction, weight), [x, y, temperature, weight])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_directions(divergence, reduction, backend):
    image, text, teacher = leaf(9, 6), leaf(9, 6), teachers(9)
    scale = number(1.4)
    units = [F.normalize(t, dim=1) for t in (image, text, *teacher)]
    s, t = scale * units[0] @ units[1].T, 3.0 * units[2] @ units[3].T
    rows = (DIVERGENCES[divergence](s, t) + DIVERGENCES[divergence](s.T, t.T)) / 2
    options = {"symmetric": True, "scale": scale, "teacher_scale": 3.0, "backend": backend}
    value = similarity_distillation(image, text, *teacher, divergence=divergence, reduction=reduction, **options)
    check(value, reduced(rows, reduction), [image, text, scale])


def test_open_clip(backend):
    loss = pytest.importorskip("open_clip.loss").DistillClipLoss()
    image, text, teacher = leaf(12, 16), leaf(12, 16), teachers(12, depth=8)
    scale, teacher_scale = number(2.5), number(1.5)
    contrastive, truth = loss(image, text, scale, *teacher, teacher_scale.detach())
    options = {"symmetric": True, "scale": scale, "teacher_scale": teacher_scale.detach(), "backend": backend}
    value = similarity_distillation(image, text, *teacher, divergence="ce", normalize=False, **options)
    assert contrastive.isfinite()
    check(value, truth, [image, text, scale])


def test_rows_with_each_other(backend):
    """CompRess: similarities with the other rows of the batch."""
    x, (teacher, _) = leaf(15, 6), teachers(15)
    own = torch.eye(15, dtype=torch.bool)
    s, t = ((20.0 * u @ u.T)[~own].view(15, 14) for u in (F.normalize(x, dim=1), F.normalize(teacher, dim=1)))
    value = similarity_distillation(x, None, teacher, scale=20.0, backend=backend)
    check(value, kl(s, t).mean(), [x])
    everything = similarity_distillation(x, None, teacher, scale=0.5, pairs=Pairs(), backend=backend, normalize=False)
    check(everything, kl(0.5 * x @ x.T, 0.5 * teacher @ teacher.T).mean(), [x])


def test_the_teacher_takes_the_temperature_of_the_student_and_no_gradient(backend):
    x, y, teacher = leaf(9, 6), leaf(9, 6), [leaf(9, 4), leaf(9, 4)]
    temperature = number(0.8)
    truth = kl(x @ y.T / temperature, (teacher[0] @ teacher[1].T / temperature).detach()).mean()
    value = similarity_distillation(x, y, *teacher, temperature=temperature, backend=backend, normalize=False)
    check(value, truth, [x, y, temperature])
    assert torch.autograd.grad(value, teacher, allow_unused=True) == (None, None)


def test_a_mask_of_columns(backend):
    """Padding of the batch, which neither side may look at, and classes that the teacher does not know."""
    x, y, teacher = leaf(9, 6), leaf(12, 6), teachers(9, 12)
    unknown = torch.arange(12) >= 10
    bias = torch.zeros(12, dtype=torch.float64).masked_fill(unknown, -INF)
    s, t = x @ y.T, (teacher[0] @ teacher[1].T)[:, :10]
    truth = -(t.softmax(1) * s.log_softmax(1)[:, :10]).sum(1)
    options = {"scale": 1.0, "teacher_bias": bias, "reduction": "none", "backend": backend}
    value = similarity_distillation(x, y, *teacher, divergence="ce", normalize=False, **options)
    check(value, truth, [x, y])


# ---- Distances -------------------------------------------------------------------------------------------------------


def distances(x):
    """(N, N) with the others of each row, without a gradient of the diagonal."""
    count = len(x)
    others = ~torch.eye(count, dtype=torch.bool)
    row, column = others.nonzero(as_tuple=True)
    return (x[row] - x[column]).norm(dim=1).view(count, count - 1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("delta", [1.0, 0.05])
def test_distances(reduction, relative, delta, backend):
    x, (teacher, _) = leaf(9, 6), teachers(9)
    weight = leaf(9).detach().abs().requires_grad_()
    d, t = distances(x), distances(teacher)
    if relative:
        d, t = d / d.mean(), t / t.mean()
    rows = F.huber_loss(d, t, delta=delta, reduction="none").mean(1)
    options = {"relative": relative, "delta": delta, "weight": weight, "backend": backend}
    value = distance_distillation(x, teacher, reduction=reduction, **options)
    check(value, reduced(rows, reduction, weight), [x, weight])


def test_relational_knowledge_distillation(backend):
    """RkdDistance of the authors' code: pdist with zeros on the diagonal, the mean over all N x N."""

    def pdist(e, eps=1e-12):
        square = e.pow(2).sum(dim=1)
        result = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * (e @ e.t())).clamp(min=eps).sqrt()
        result = result.clone()
        result[range(len(e)), range(len(e))] = 0
        return result

    student, (teacher, _) = leaf(10, 6), teachers(10)
    with torch.no_grad():
        t_d = pdist(teacher)
        t_d = t_d / t_d[t_d > 0].mean()
    d = pdist(student)
    d = d / d[d > 0].mean()
    truth = F.smooth_l1_loss(d, t_d)
    check(distance_distillation(student, teacher, backend=backend) * 9 / 10, truth, [student])


def test_structure_alignment_of_proclip(backend):
    student, (teacher, _) = leaf(10, 6), teachers(10)
    d, t = F.pdist(F.normalize(student, dim=1)), F.pdist(F.normalize(teacher, dim=1))
    truth = F.huber_loss(d, t, reduction="sum")
    value = distance_distillation(student, teacher, relative=False, normalize=True, reduction="mean", backend=backend)
    check(value * 45, truth, [student])


def test_distances_by_differences(backend):
    x, (teacher, _) = leaf(5, 3), teachers(5)
    for relative in (True, False):

        def function(x, relative=relative):
            return distance_distillation(x, teacher, relative=relative, reduction="none", backend=backend)

        check_derivatives(function, (x,))


def test_copies_of_a_row_have_a_finite_gradient(backend):
    """The derivative of a distance at 0 is 0, as in torch."""
    x = torch.randint(-3, 4, (12, 5)).double()
    x[3] = x[7]
    x.requires_grad_()
    for teacher in (teachers(12)[0], torch.zeros(12, 4, dtype=torch.float64)):
        for relative in (True, False):
            value = distance_distillation(x, teacher, relative=relative, backend=backend)
            (dx,) = torch.autograd.grad(value, x)
            assert value.isfinite() and dx.isfinite().all() and dx.any()
    same = torch.ones(6, 5, dtype=torch.float64, requires_grad=True)
    value = distance_distillation(same, same.detach(), backend=backend)
    assert float(value.detach()) == 0 and not torch.autograd.grad(value, same)[0].any()


def test_agreement_is_zero(backend):
    x = torch.nn.functional.normalize(torch.randn(700, 40), dim=1).requires_grad_()
    for relative in (True, False):
        value = distance_distillation(x, x.detach(), relative=relative, backend=backend)
        assert float(value.detach()) == 0 and not torch.autograd.grad(value, x)[0].any()
    # Relative distances do not know the unit of length.
    assert float(distance_distillation(x, 3 * x, backend=backend).detach()) < 1e-10


def test_16_bits_are_compared_in_float32(backend):
    x, teacher = torch.randn(40, 16).bfloat16(), torch.randn(40, 8).bfloat16()
    value = distance_distillation(x, teacher, backend=backend)
    assert value.dtype == torch.float32
    assert torch.equal(value, distance_distillation(x.float(), teacher.float(), backend=backend))


# ---- Modules and errors ----------------------------------------------------------------------------------------------


def test_modules():
    image, text, teacher = torch.randn(8, 6), torch.randn(8, 6), [t.float() for t in teachers(8)]
    module = nn.SimilarityDistillationLoss(0.2, symmetric=True, teacher_scale=4.0, normalize=False)
    expected = similarity_distillation(
        image, text, *teacher, symmetric=True, scale=5.0, teacher_scale=4.0, normalize=False
    )
    torch.testing.assert_close(module(image, text, *teacher), expected)
    module(image, text, *teacher).backward()
    assert module.logit_scale.grad.isfinite()
    value = nn.DistanceDistillationLoss(relative=False)(image, teacher[0])
    torch.testing.assert_close(value, distance_distillation(image, teacher[0], relative=False))


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"y": torch.zeros(6, 8), "teacher_y": torch.zeros(6, 3)}, ValueError, "y must have as many rows as x where"),
        ({"teacher_x": torch.zeros(4, 3)}, ValueError, "teacher_x must have as many rows as x, got x"),
        ({"teacher_y": torch.zeros(4, 3)}, ValueError, "teacher_y must have as many rows as y, got y"),
        ({"scale": 1.0, "temperature": 1.0}, ValueError, "temperature and scale must not both be given"),
        ({"teacher_scale": 1.0, "teacher_temperature": 1.0}, ValueError, "teacher_temperature and teacher_scale must"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be"),
        ({"divergence": "mse"}, ValueError, "divergence must be one of 'kl', 'reverse_kl', 'ce', 'js', got 'mse'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \(5,\)"),
        ({"teacher_x": torch.zeros(5, 3).long()}, TypeError, "teacher_x must be float32"),
    ],
)
def test_errors_of_similarities(change, error, message):
    given = {"x": torch.zeros(5, 8), "y": torch.zeros(5, 8), "teacher_x": torch.zeros(5, 3)}
    given = {**given, "teacher_y": torch.zeros(5, 3), "symmetric": True, **change}
    with pytest.raises(error, match=f"similarity_distillation: {message}"):
        similarity_distillation(**given)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"teacher_x": torch.zeros(4, 3)}, ValueError, r"teacher_x must have as many rows as x, got x \(5, 8\)"),
        ({"teacher_x": torch.zeros(5)}, ValueError, "teacher_x must have two dimensions"),
        ({"teacher_x": torch.zeros(5, 3, device="meta")}, ValueError, "teacher_x must be on the same device as x"),
        ({"x": torch.zeros(5, 8).int()}, TypeError, "x must be float32"),
        ({"delta": 0.0}, ValueError, "delta must be in"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \(5,\)"),
    ],
)
def test_errors_of_distances(change, error, message):
    with pytest.raises(error, match=f"distance_distillation: {message}"):
        distance_distillation(**{"x": torch.zeros(5, 8), "teacher_x": torch.zeros(5, 3), **change})
