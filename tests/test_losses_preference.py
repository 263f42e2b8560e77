"""Log-probabilities of a large softmax, DPO and its relatives, against dense formulas in float64."""

import itertools
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import LogProb, dpo, linear_log_prob
from contrastive_ops.testing import relative_error, saved_bytes

DOUBLE = torch.float64


def dense(hidden, weight, labels, bias=None, ignore_index=-100):
    log_prob = F.linear(hidden, weight, bias).log_softmax(-1)
    used = labels != ignore_index
    selected = log_prob.gather(-1, torch.where(used, labels, 0)[..., None])[..., 0]
    entropy = -(log_prob.exp() * log_prob).sum(-1)
    return torch.where(used, selected, 0.0), torch.where(used, entropy, 0.0)


def inputs(*shape, words=19, depth=6, dtype=DOUBLE):
    hidden = torch.randn(*shape, depth, dtype=dtype).requires_grad_()
    weight = torch.randn(words, depth, dtype=dtype).requires_grad_()
    bias = torch.randn(words, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(words, shape), bias


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_log_prob_with_any_cotangent(backend, with_bias, entropy):
    hidden, weight, labels, bias = inputs(3, 7)
    labels[1, 4:], labels[2, 0] = -100, -100
    given = {"bias": bias} if with_bias else {}
    found = linear_log_prob(hidden, weight, labels, entropy=entropy, backend=backend, **given)
    expected = dense(hidden, weight, labels, **given)
    found = found if entropy else (found,)
    assert not entropy or isinstance(found, LogProb)
    leaves = [hidden, weight, *given.values()]
    pairs = list(zip(found, expected, strict=False))
    cotangents = [torch.randn_like(value) for value in found]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    got = torch.autograd.grad(found, leaves, cotangents, retain_graph=True)
    want = torch.autograd.grad([b for _, b in pairs], leaves, cotangents)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert (got[0][labels == -100] == 0).all()


def test_every_label_ignored_and_no_rows():
    hidden, weight, labels, _ = inputs(4)
    value = linear_log_prob(hidden, weight, torch.full_like(labels, 5), ignore_index=5)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(4, dtype=DOUBLE)) and torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert linear_log_prob(hidden[:0], weight, labels[:0]).shape == (0,)


def test_a_certain_label_keeps_its_digits():
    hidden, weight = torch.tensor([[40.0]]), torch.tensor([[1.0], [0.0]])
    found = linear_log_prob(hidden, weight, torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([-4.248354e-18]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    hidden, weight, labels, _ = inputs(50, words=90, depth=32, dtype=torch.float32)
    hidden, weight = (each.detach().to(dtype).requires_grad_() for each in (hidden, weight))
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    found, (expected, _) = linear_log_prob(hidden, weight, labels), dense(*wide, labels)
    assert found.dtype == torch.float32
    cotangent = torch.randn(50)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight), cotangent),
        torch.autograd.grad(expected, wide, cotangent.double()),
        strict=True,
    ):
        assert relative_error(a, b) < 5e-3


def test_logits_are_not_kept():
    hidden, weight, labels, _ = inputs(512, words=4096, depth=16, dtype=torch.float32)
    for entropy in (False, True):
        size, _ = saved_bytes(
            lambda entropy=entropy: linear_log_prob(hidden, weight, labels, entropy=entropy, memory_budget=0)
        )
        assert size < 2 * (hidden.numel() + weight.numel()) * 4 + 64 * 512


def test_it_compiles_with_ignored_labels():
    compiled = torch.compile(linear_log_prob, fullgraph=True, backend="aot_eager")
    for rows in (12, 17):
        hidden, weight, labels, _ = inputs(rows, dtype=torch.float32)
        labels[::3] = -100
        torch.testing.assert_close(compiled(hidden, weight, labels), linear_log_prob(hidden, weight, labels))


# ---- DPO -----------------------------------------------------------------------------------------------------------


def dense_dpo(chosen, rejected, reference=None, beta=0.1, kind="sigmoid", label_smoothing=0.0, margin=0.0):
    r = chosen - rejected if reference is None else (chosen - reference[0]) - (rejected - reference[1])
    z = beta * r - margin
    if kind == "ipo":
        return (r - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return torch.clamp(1 - z, min=0)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


OPTIONS = [
    *({"kind": kind, "beta": beta} for kind, beta in itertools.product(("sigmoid", "ipo", "hinge"), (0.05, 2.0))),
    {"label_smoothing": 0.2},
    {"margin": 0.5},
    {"kind": "hinge", "margin": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_reference", [True, False])
def test_dpo(options, with_reference):
    given = [(5 * torch.randn(9, dtype=DOUBLE)).requires_grad_() for _ in range(4 if with_reference else 2)]
    found = dpo(*given, reduction="none", **options)
    expected = dense_dpo(*given[:2], given[2:] if with_reference else None, **options)
    cotangent = torch.randn(9, dtype=DOUBLE)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, given, cotangent), torch.autograd.grad(expected, given, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_dpo_of_sequences_from_a_policy():
    """The whole way: hidden states to log-probabilities to loss, with the tokens of the prompt ignored."""
    hidden, weight, labels, _ = inputs(4, 6)
    labels[:, :2] = -100
    log_prob = linear_log_prob(hidden, weight, labels).sum(1)
    expected, _ = dense(hidden, weight, labels)
    found = dpo(log_prob[:2], log_prob[2:], beta=0.3)
    truth = dense_dpo(expected.sum(1)[:2], expected.sum(1)[2:], beta=0.3).mean()
    torch.testing.assert_close(found, truth)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


V = torch.zeros(3)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (
            lambda: linear_log_prob(V, torch.ones(2, 3), V),
            ValueError,
            "linear_log_prob: hidden must be a tensor (..., D)",
        ),
        (
            lambda: linear_log_prob(torch.ones(2, 3), torch.ones(4, 3), V.long()),
            ValueError,
            "labels must have shape (2,)",
        ),
        (lambda: linear_log_prob(torch.ones(3, 2), torch.ones(4, 2), V), TypeError, "labels must be int64"),
        (
            lambda: linear_log_prob(torch.ones(3, 2), torch.ones(4, 2), V.long() + 4),
            ValueError,
            "linear_log_prob: labels must be in [0, 4), got 4",
        ),
        (lambda: linear_log_prob(torch.ones(3, 2), torch.ones(4, 3), V.long()), ValueError, "same last dimension"),
        (
            lambda: linear_log_prob(torch.ones(3, 2), torch.ones(4, 2), V.long(), bias=V),
            ValueError,
            "bias must have shape (4,)",
        ),
        (lambda: dpo(V, V[:2]), ValueError, "dpo: rejected must have shape (3,), got (2,)"),
        (lambda: dpo(V, V, V), ValueError, "reference_chosen and reference_rejected must both be given, or neither"),
        (lambda: dpo(V, V, beta=0), ValueError, "dpo: beta must be in (0, inf), got 0"),
        (lambda: dpo(V, V, kind="kto"), ValueError, "dpo: kind must be one of 'sigmoid', 'ipo', 'hinge', got 'kto'"),
        (lambda: dpo(V, V, kind="ipo", margin=1.0), ValueError, 'dpo: margin must be 0 for kind="ipo", got 1.0'),
        (lambda: dpo(V, V, label_smoothing=0.5), ValueError, "dpo: label_smoothing must be in [0, 0.5), got 0.5"),
        (lambda: dpo(V, V, kind="hinge", label_smoothing=0.1), ValueError, "label_smoothing must be 0"),
        (lambda: dpo(V[None], V), ValueError, "dpo: chosen must have shape (N,), got (1, 3)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
