"""DPO and its relatives, and estimates of a divergence, against dense formulas in float64."""

import itertools
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import dpo, kl_estimate, linear_log_prob, log_odds
from contrastive_ops.testing.compare import check, check_derivatives

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


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_options_of_each_pair(kind, with_reference):
    given = [(5 * torch.randn(9, dtype=DOUBLE)).requires_grad_() for _ in range(4 if with_reference else 2)]
    options = {"beta": (torch.rand(9, dtype=DOUBLE) + 0.1).requires_grad_()}
    if kind != "ipo":
        options["margin"] = torch.randn(9, dtype=DOUBLE, requires_grad=True)
    if kind == "sigmoid":
        options["label_smoothing"] = (torch.rand(9, dtype=DOUBLE) / 2).requires_grad_()
    weight = torch.rand(9, dtype=DOUBLE)
    found = dpo(*given, kind=kind, weight=weight, **options)
    rows = dense_dpo(*given[:2], given[2:] if with_reference else None, kind=kind, **options)
    check(found, (weight * rows).sum() / weight.sum(), [*given, *options.values()])


def test_one_number_in_a_tensor_is_that_of_all_pairs_and_may_be_learned():
    chosen, rejected = torch.randn(5, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    for shape in ((), (1,)):
        beta = torch.full(shape, 0.7, dtype=DOUBLE, requires_grad=True)
        check(dpo(chosen, rejected, beta=beta), dense_dpo(chosen, rejected, beta=beta).mean(), [beta])
        assert torch.equal(dpo(chosen, rejected, beta=beta.detach()), dpo(chosen, rejected, beta=0.7))


def test_a_pair_of_weight_0_may_have_any_options():
    chosen, rejected, weight = torch.randn(3), torch.randn(3), torch.tensor([1.0, 0.0, 1.0])
    beta, margin = torch.tensor([0.1, -1.0, 0.2]), torch.tensor([0.0, torch.nan, 1.0])
    assert dpo(chosen, rejected, beta=beta, margin=margin, label_smoothing=margin.abs() / 4, weight=weight).isfinite()


# ---- Odds ------------------------------------------------------------------------------------------------------------


def test_log_odds_is_the_inverse_of_logsigmoid():
    """Of any odds, also where p or 1 - p has no digits of its own; both, and the slope, from the odds themselves."""
    odds = torch.cat([-torch.logspace(-3, 2.8, 60), torch.logspace(-3, 1.4, 60), torch.zeros(1)]).double()
    log_prob = F.logsigmoid(odds).requires_grad_()
    found = log_odds(log_prob)
    (slope,) = torch.autograd.grad(found.sum(), log_prob)
    torch.testing.assert_close(slope, 1 + odds.exp(), rtol=1e-9, atol=0)  # 1 / (1 - p)
    torch.testing.assert_close(found, odds, rtol=1e-9, atol=1e-12)
    # What is lost in float32 are digits of the log-probability, not of the function.
    single = log_prob.detach().float()
    truth = single.double() - (-torch.expm1(single.double())).log()
    torch.testing.assert_close(log_odds(single).double(), truth, rtol=1e-6, atol=1e-6)


def test_log_odds_at_the_ends():
    ends = torch.tensor([0.0, -torch.inf, 0.1, -1e-30])
    found = log_odds(ends)
    assert found[:2].tolist() == [torch.inf, -torch.inf] and found[2].isnan() and found[3].isfinite()
    assert log_odds(ends.half()).dtype == torch.float32
    leaf = torch.tensor([-1e-30, -100.0, -torch.inf], requires_grad=True)
    log_odds(leaf).sum().backward()
    assert leaf.grad[1:].tolist() == [1.0, 1.0] and leaf.grad[0] > 1e29
    check_derivatives(log_odds, (torch.tensor([-0.3, -2.0, -1e-3, -0.6931], dtype=DOUBLE, requires_grad=True),))


def test_orpo_from_hidden_states():
    """Its odds ratio of mean log-probabilities, from the logits of the two answers in float64."""
    hidden, head = (torch.randn(*size, dtype=DOUBLE, requires_grad=True) for size in ((2, 4, 6, 8), (30, 8)))
    labels = torch.randint(30, (2, 4, 6))
    labels[:, 1, 4:] = -100
    count = (labels != -100).sum(-1)
    chosen, rejected = linear_log_prob(hidden, head, labels).sum(-1) / count
    found = dpo(log_odds(chosen), log_odds(rejected), beta=1.0)
    p = (hidden @ head.T).softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    mean = (p.log() * (labels != -100)).sum(-1) / count
    odds = mean.exp() / (1 - mean.exp())
    check(found, -torch.sigmoid((odds[0] / odds[1]).log()).log().mean(), [hidden, head])


def test_orpo_is_that_of_trl():
    trainers = pytest.importorskip("trl.experimental.orpo")
    chosen, rejected = (-torch.rand(7, dtype=DOUBLE) for _ in range(2))
    trainer = object.__new__(trainers.ORPOTrainer)
    trainer.beta, trainer.accelerator = 0.25, type("One", (), {"device": torch.device("cpu")})
    losses = trainer.odds_ratio_loss(chosen, rejected)[0]
    found = -0.25 * dpo(log_odds(chosen), log_odds(rejected), beta=1.0, reduction="none")
    torch.testing.assert_close(found, losses.double(), rtol=1e-5, atol=1e-6)  # theirs is in float32


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
        (lambda: dpo(V, V, beta=V), ValueError, "dpo: beta must be in (0, inf), got 0.0"),
        (lambda: dpo(V, V, beta=V[:2] + 1), ValueError, "dpo: beta must have shape (3,), got (2,)"),
        (lambda: dpo(V, V, label_smoothing=V + 0.5), ValueError, "dpo: label_smoothing must be in [0, 0.5), got 0.5"),
        (lambda: dpo(V, V, margin=V + torch.inf), ValueError, "dpo: margin must be in (-inf, inf), got inf"),
        (
            lambda: dpo(V, V, kind="ipo", margin=V),
            ValueError,
            'dpo: margin must be 0 for kind="ipo", got Tensor of shape (3,)',
        ),
        (lambda: log_odds(V.long()), TypeError, "log_odds: log_prob must be float32, float64, bfloat16 or float16"),
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
