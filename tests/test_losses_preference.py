"""DPO and its relatives, and estimates of a divergence, against dense formulas in float64."""

import itertools
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import dpo, kl_estimate

DOUBLE = torch.float64

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


# ---- Estimates of a divergence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind,formula",
    [("k1", lambda r: -r), ("k2", lambda r: r**2 / 2), ("k3", lambda r: torch.exp(r) - 1 - r)],
)
def test_kl_estimate(kind, formula):
    log_prob, reference = (torch.randn(3, 7, dtype=DOUBLE).requires_grad_() for _ in range(2))
    found, expected = kl_estimate(log_prob, reference, kind=kind), formula(reference - log_prob)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.sum(), (log_prob, reference)),
        torch.autograd.grad(expected.sum(), (log_prob, reference)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_estimates_have_no_bias(kind):
    """Their expectation under the policy is the divergence: over all classes, no sample is needed to see it."""
    log_p, log_q = (torch.randn(5, 11, dtype=DOUBLE).log_softmax(1) for _ in range(2))
    expectation = (log_p.exp() * kl_estimate(log_p, log_q, kind=kind)).sum(1)
    torch.testing.assert_close(expectation, (log_p.exp() * (log_p - log_q)).sum(1))


def test_k3_keeps_its_digits_between_models_that_are_nearly_the_same():
    found = kl_estimate(torch.tensor([-1e-4]), torch.tensor([0.0]))
    torch.testing.assert_close(found, torch.tensor([5.000167e-9]), rtol=1e-2, atol=0)
    assert found.dtype == torch.float32 and kl_estimate(found.bfloat16(), found.bfloat16()).dtype == torch.float32


V = torch.zeros(3)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: dpo(V, V[:2]), ValueError, "dpo: rejected must have shape (3,), got (2,)"),
        (lambda: dpo(V, V, V), ValueError, "reference_chosen and reference_rejected must both be given, or neither"),
        (lambda: dpo(V, V, beta=0), ValueError, "dpo: beta must be in (0, inf), got 0"),
        (lambda: dpo(V, V, kind="kto"), ValueError, "dpo: kind must be one of 'sigmoid', 'ipo', 'hinge', got 'kto'"),
        (lambda: dpo(V, V, kind="ipo", margin=1.0), ValueError, 'dpo: margin must be 0 for kind="ipo", got 1.0'),
        (lambda: dpo(V, V, label_smoothing=0.5), ValueError, "dpo: label_smoothing must be in [0, 0.5), got 0.5"),
        (lambda: dpo(V, V, kind="hinge", label_smoothing=0.1), ValueError, "label_smoothing must be 0"),
        (lambda: dpo(V[None], V), ValueError, "dpo: chosen must have shape (N,), got (1, 3)"),
        (
            lambda: kl_estimate(V, V, kind="k4"),
            ValueError,
            "kl_estimate: kind must be one of 'k1', 'k2', 'k3', got 'k4'",
        ),
        (lambda: kl_estimate(V, V[:2]), ValueError, "reference_log_prob must have the shape of log_prob, got (3,)"),
        (lambda: kl_estimate(V.long(), V), TypeError, "kl_estimate: log_prob must be a floating tensor"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
