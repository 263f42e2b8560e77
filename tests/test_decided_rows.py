"""Rows that are decided: gradients of what is left to a probability of 1, at any scale, in every loss and primitive.

Members are found in `testing.LOSSES`: every loss that has a scale or scores, so that a new one joins by itself. The
truth is the same call in float64.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear, normalize, softplus

from contrastive_ops.core.numerics import balanced, log_softmax
from contrastive_ops.losses import (
    linear_kl,
    linear_log_prob,
    listwise_distillation,
    similarity_distillation,
    soft_info_nce,
)
from contrastive_ops.ops import similarity_values
from contrastive_ops.testing import LOSSES, leaves, relative_error

SHARPENED = {name: case for name, case in LOSSES.items() if {"scale", "scores"} & set(case.tensors)}
# Below this a gradient is made of numbers that float32 does not have.
SMALLEST = 1e-25


def sharpened(case, scale, rows=24, depth=16):
    """Inputs of a loss at a high scale, whose rows lie close to the partners that they have; float32."""
    first, found = None, {}
    for name, t in case.inputs(rows, depth, torch.float64).items():
        wanted = t.requires_grad
        if t.is_floating_point():
            t = t.detach()
            if name in ("scale", "text_scale"):
                t = torch.full_like(t, scale)
            elif name == "scores":
                t = t * scale / 4
            elif t.dim() == 2 and t.shape[-1] == depth and wanted:
                t = t if first is None or t.shape != first.shape else normalize(first + 0.3 * t, dim=-1)
                first = t if first is None else first
            t = t.float().requires_grad_(wanted)
        found[name] = t
    return found


def in_double(inputs):
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in inputs.items()
    }


@pytest.mark.parametrize("scale", [30.0, 300.0])
@pytest.mark.parametrize("name", SHARPENED)
def test_losses_at_high_scales(name, scale, backend):
    case = SHARPENED[name]
    low = sharpened(case, scale)
    high = in_double(low)
    value, truth = case(low, backend=backend), case(high, backend="reference")
    value.backward()
    truth.backward()
    assert relative_error(value.detach(), truth.detach()) <= 2e-5 or truth.abs() < SMALLEST
    # The first prefix has one dimension: its cosines are 1 or -1 and have no gradient, but sums that cancel.
    allowed = 1e-2 if name.startswith("matryoshka") else 2e-4
    for got, expected in zip(leaves(low), leaves(high), strict=True):
        if expected.grad is not None and expected.grad.norm() > SMALLEST:
            assert relative_error(got.grad, expected.grad) <= allowed


@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0, 100.0, 1000.0])
def test_an_assignment_that_is_annealed(scale, backend):
    """No further from float64 than twice torch in float32, and nothing where it is nothing."""
    torch.manual_seed(0)
    codebook, values, upstream = normalize(torch.randn(70, 24)), torch.randn(70, 8), torch.randn(40, 8)
    x = normalize(codebook[torch.randint(70, (40,))] + 0.05 * torch.randn(40, 24))
    bias = torch.zeros(70)

    def of(function, dtype):
        inputs = [
            t.detach().clone().to(dtype).requires_grad_() for t in (x, codebook, values, torch.tensor(scale), bias)
        ]
        out = function(*inputs)
        (out * upstream.to(dtype)).sum().backward()
        return [out.detach(), *(t.grad for t in inputs)]

    def ours(x, y, values, scale, bias):
        chosen = "reference" if x.dtype == torch.float64 else backend  # dense float64 is noise where p is 1 - 1e-17
        return similarity_values(x, y, values, scale=scale, col_bias=bias, backend=chosen)

    def dense(x, y, values, scale, bias):
        return (scale * x @ y.T + bias).softmax(1) @ values

    got, plain, truth = of(ours, torch.float32), of(dense, torch.float32), of(ours, torch.float64)
    for own, other, expected in zip(got, plain, truth, strict=True):
        error, allowed = ((each.double() - expected).norm() for each in (own, other))
        assert error <= 2 * allowed + 2e-6 * expected.norm()


@pytest.mark.parametrize("gap", [1.0, 5.0, 12.0, 17.0, 40.0])
def test_lists_that_are_learned(gap):
    torch.manual_seed(0)
    order = torch.arange(10, 0, -1.0).repeat(8, 1)
    scores = (order * gap + 0.1 * torch.randn(8, 10)).requires_grad_()
    wide = scores.detach().double().requires_grad_()
    value = listwise_distillation(scores, order, kind="listmle")
    truth = softplus(wide[:, 1:].flip(1).logcumsumexp(1).flip(1) - wide[:, :-1]).sum(1).mean()
    value.backward()
    truth.backward()
    assert relative_error(value.detach(), truth.detach()) <= 1e-4
    assert relative_error(scores.grad, wide.grad) <= 1e-4


@pytest.mark.parametrize("kind", ["kl", "listnet"])
def test_lists_with_one_relevant_document(kind):
    """The teacher is nearly as sure as the student: what differs is a small share of a small share."""
    torch.manual_seed(0)
    scores, teacher = torch.randn(8, 10), torch.randn(8, 10)
    scores[:, 0] += 15.0
    teacher[:, 0] += 17.0
    scores.requires_grad_()
    wide = scores.detach().double().requires_grad_()
    listwise_distillation(scores, teacher, kind=kind).backward()
    log_p, q = wide.log_softmax(1), teacher.double().softmax(1)
    (-(q * log_p).sum(1).mean()).backward()
    assert relative_error(scores.grad, wide.grad) <= 1e-5


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "ce", "js"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_students_and_teachers_that_are_both_decided(divergence, symmetric, backend):
    torch.manual_seed(0)
    y = normalize(torch.randn(40, 16))
    x, teacher = (normalize(y + 0.05 * torch.randn(40, 16)) for _ in range(2))
    options = {"divergence": divergence, "symmetric": symmetric, "scale": 40.0}
    found = []
    for dtype, chosen in ((torch.float32, backend), (torch.float64, "reference")):
        a, b = (t.detach().clone().to(dtype).requires_grad_() for t in (x, y))
        loss = similarity_distillation(a, b, teacher.to(dtype), y.to(dtype), backend=chosen, **options)
        loss.backward()
        found.append((loss.detach(), a.grad, b.grad))
    for got, truth in zip(*found, strict=True):
        assert relative_error(got, truth) <= 2e-4


@pytest.mark.parametrize("size", [8.0, 16.0, 24.0])
def test_large_softmaxes_that_are_decided(size):
    """Divergences and entropies of a head; the label is the decided word in half of the rows."""
    torch.manual_seed(0)
    words, other = torch.randn(50, 12), torch.randn(50, 12) * 0.01
    hidden = normalize(words[torch.arange(20)]) * size
    labels = torch.arange(20)
    labels[::2] += 1
    found = []
    for dtype in (torch.float32, torch.float64):
        h, w = (t.detach().clone().to(dtype).requires_grad_() for t in (hidden, words))
        sums = linear_log_prob(h, w, labels, entropy=True)
        values = [sums.entropy.sum(), sums.log_prob[1::2].sum(), sums.log_prob.sum()]
        values += [linear_kl(h, w, h, (words + other).to(dtype), direction=d).sum() for d in ("reverse", "forward")]
        gradients = [torch.autograd.grad(value, (h, w), retain_graph=True) for value in values]
        found.append([*(v.detach() for v in values), *(g for pair in gradients for g in pair)])
    p = linear(hidden.double(), words.double()).softmax(1)
    assert relative_error(found[1][0], torch.special.entr(p).sum()) <= 1e-9
    for got, truth in zip(*found, strict=True):
        assert relative_error(got, truth) <= 2e-4


def test_soft_targets_that_are_hard(backend):
    torch.manual_seed(0)
    key = normalize(torch.randn(30, 16))
    query = normalize(key + 0.02 * torch.randn(30, 16)).requires_grad_()
    wide = query.detach().double().requires_grad_()
    targets = torch.arange(31), torch.arange(30), torch.ones(30)
    soft_info_nce(query, key, targets, scale=60.0, normalize=False, backend=backend).backward()
    logits = 60 * wide @ key.double().T
    others = logits.masked_fill(torch.eye(30, dtype=torch.bool), -torch.inf).logsumexp(1)
    softplus(others - logits.diagonal()).mean().backward()
    assert relative_error(query.grad, wide.grad) <= 1e-4
    assert cross_entropy(logits.detach(), torch.arange(30)) < 1e-6


def test_the_softmax_itself():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64) * 3
    logits[1, 2] = -torch.inf
    logits[2] = 0.0
    logits.requires_grad_()
    expected = logits.log_softmax(1)
    torch.testing.assert_close(log_softmax(logits), expected)
    upstream = torch.randn(5, 7, dtype=torch.float64).masked_fill(logits.detach().isinf(), 0.0)
    for each in (log_softmax, lambda t: t.log_softmax(1)):
        finite = each(logits).masked_fill(logits.isinf(), 0.0)
        found = torch.autograd.grad((finite * upstream).sum(), logits)[0]
        torch.testing.assert_close(found.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert log_softmax(logits[:, :0]).shape == (5, 0)
    assert log_softmax(torch.tensor([[1.0, torch.nan]])).isnan().all()
    p = torch.tensor([[0.9, 0.06, 0.04], [0.4, 0.3, 0.3]])
    slopes = torch.tensor([[5.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    torch.testing.assert_close(balanced(slopes, p), torch.tensor([[-3.0, 1.0, 2.0], [5.0, 1.0, 2.0]]))
