"""SogCLR with running denominators against the estimator written out in float64, one batch after another."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contrastive_ops.losses.sog_clr import RunningDenominator, sog_clr
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Dense:
    """The papers' estimator, u in a dictionary, g from N x N matrices: the value of log u, the gradient of g / u."""

    def __init__(self, gamma, eps):
        self.gamma, self.eps, self.u = gamma, eps, {}

    def __call__(self, image, text, index, image_scale, text_scale=None):
        text_scale = image_scale if text_scale is None else text_scale
        s, others = image @ text.T, ~torch.eye(len(image), dtype=torch.bool)
        rows = 0.0
        for side, similarity, scale in (("image", s, image_scale), ("text", s.T, text_scale)):
            scale = scale[:, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale
            difference = scale * (similarity - similarity.diagonal()[:, None])
            g = (difference.exp() * others).sum(1) / (len(image) - 1)
            u = []
            for key, own in zip(index.tolist(), g.detach(), strict=True):
                old = self.u.get((side, key))
                u.append(own if old is None else (1 - self.gamma) * old + self.gamma * own)
                self.u[side, key] = u[-1]
            u = torch.stack(u) + self.eps
            rows = rows + (u.log() + g / u - (g / u).detach()) / 2
        return rows


# ---- Values and gradients ------------------------------------------------------------------------------------------

SCALES = {
    "float": lambda one, each, other: ({"temperature": 0.4}, (2.5,)),
    "one": lambda one, each, other: ({"scale": one}, (one,)),
    "each": lambda one, each, other: ({"scale": each}, (each,)),
    "two floats": lambda one, each, other: ({"temperature": 0.4, "text_temperature": 0.8}, (2.5, 1.25)),
    "two each": lambda one, each, other: ({"scale": each, "text_scale": other}, (each, other)),
    "one and each": lambda one, each, other: ({"scale": one, "text_temperature": 1 / other}, (one, other)),
}


@FUZZ
@given(
    count=st.integers(2, 8),
    gamma=st.sampled_from([0.1, 0.6, 1.0]),
    eps=st.sampled_from([0.0, 1e-14, 0.3]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    normalize=st.booleans(),
    scales=st.sampled_from(sorted(SCALES)),
)
def test_three_batches(backend, count, gamma, eps, reduction, normalize, scales):
    state, dense = RunningDenominator(10, gamma), Dense(gamma, eps)
    for step in range(3):
        image, text, index = leaf(count, 5), leaf(count, 5), torch.randperm(10)[:count]
        one, each, other = (0.5 + torch.rand(shape, dtype=DOUBLE) for shape in ((), (count,), (count,)))
        options, used = SCALES[scales](*(t.requires_grad_() for t in (one, each, other)))
        weight = torch.rand(count, dtype=DOUBLE, requires_grad=True) if step else None
        value = sog_clr(
            image,
            text,
            index,
            state,
            eps=eps,
            weight=weight,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            **options,
        )
        a, b = (F.normalize(image), F.normalize(text)) if normalize else (image, text)
        truth = reduced(dense(a, b, index, *used), reduction, weight)
        leaves = [image, text, *(s for s in used if isinstance(s, torch.Tensor)), *([weight] if step else [])]
        # The buffer is float32, and so is the agreement from the second batch on.
        check(value, truth, leaves, 1e-5 if step else 1e-9)


def test_gradient_is_that_of_log_u_over_gamma(backend):
    """The estimator weighs a batch as if it were the whole data set; log u changes gamma times as fast."""
    image, text, index = leaf(5, 4), leaf(5, 4), torch.arange(5)
    state = RunningDenominator(5, gamma=0.25)
    sog_clr(leaf(5, 4), leaf(5, 4), index, state, scale=1.0, eps=0.0, backend=backend, normalize=False)
    state.eval()
    value = sog_clr(image, text, index, state, scale=1.0, eps=0.0, backend=backend, normalize=False)
    (got,) = torch.autograd.grad(value, image)
    step, direction = 1e-5, torch.randn(5, 4, dtype=DOUBLE)
    ends = [
        sog_clr(
            image + sign * step * direction, text, index, state, scale=1.0, eps=0.0, backend=backend, normalize=False
        )
        for sign in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((got * direction).sum() * 0.25, slope, rtol=1e-5, atol=1e-7)


def test_fast_clip_with_a_learned_temperature(backend):
    """temperature * (loss + rho) has the gradients that FastCLIP's code makes."""
    image, text, index = leaf(6, 4), leaf(6, 4), torch.arange(6)
    logit_scale, rho = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True), 8.0
    state = RunningDenominator(6, gamma=0.5)
    loss = sog_clr(image, text, index, state, scale=logit_scale, eps=0.0, backend=backend, normalize=False)
    s, others = image @ text.T, 1 - torch.eye(6, dtype=DOUBLE)
    g = [((m - m.diagonal()[:, None]) * logit_scale).exp().mul(others).sum(1) / 5 for m in (s, s.T)]
    u = [each.detach() for each in g]
    theirs = sum((each / own).mean() for each, own in zip(g, u, strict=True)) / 2 / logit_scale.detach()
    theirs = theirs + rho / logit_scale + sum(own.log().mean() for own in u) / 2 / logit_scale
    leaves = [image, text, logit_scale]
    got = torch.autograd.grad((loss + rho) / logit_scale, leaves)
    for a, b in zip(got, torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradcheck_of_the_batch_alone(backend):
    state, index = RunningDenominator(4, gamma=1.0), torch.arange(4)
    scale, text_scale = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True), leaf(4)

    def function(a, b, scale, text_scale):
        options = {"scale": scale, "text_scale": text_scale, "eps": 0.0, "reduction": "none", "backend": backend}
        return sog_clr(a, b, index, state, normalize=False, **options)

    leaves = (leaf(4, 2), leaf(4, 2), scale, text_scale)
    check_derivatives(function, leaves)


# ---- The state -----------------------------------------------------------------------------------------------------


def test_state_is_stored_in_training_only(backend):
    image, text, index = leaf(3, 4), leaf(3, 4), torch.tensor([5, 0, 3])
    state = RunningDenominator(7, gamma=0.5).eval()
    evaluated = sog_clr(image, text, index, state, backend=backend, normalize=False)
    assert not state.log_u.isfinite().any()
    trained = sog_clr(image, text, index, state.train(), backend=backend, normalize=False)
    assert torch.equal(evaluated, trained)
    assert state.log_u.isfinite().any(0).nonzero().squeeze(1).tolist() == [0, 3, 5]


def test_state_dict_resumes(backend):
    batches = [(leaf(3, 4), leaf(3, 4), torch.randperm(5)[:3]) for _ in range(4)]
    whole, first, second = (RunningDenominator(5, gamma=0.3) for _ in range(3))
    values = [sog_clr(*batch, whole, backend=backend, normalize=False) for batch in batches]
    for batch in batches[:2]:
        sog_clr(*batch, first, backend=backend, normalize=False)
    second.load_state_dict(first.state_dict())
    resumed = [sog_clr(*batch, second, backend=backend, normalize=False) for batch in batches[2:]]
    assert torch.equal(torch.stack(values[2:]), torch.stack(resumed))
    assert list(whole.state_dict()) == ["log_u"] and not list(whole.parameters())


def test_largest_of_repeated_samples_is_stored():
    state, log_mean = RunningDenominator(3), torch.tensor([[1.0, 2.0, 0.5], [4.0, 3.0, 0.25]])
    new = state(torch.tensor([1, 1, 2]), log_mean)
    assert torch.equal(new, log_mean)
    assert state.log_u.tolist() == [[-math.inf, 2.0, 0.5], [-math.inf, 4.0, 0.25]]


def test_what_is_not_finite_is_not_stored(backend):
    state = RunningDenominator(2, gamma=0.5)
    state(torch.tensor([0]), torch.tensor([[1.0], [2.0]]))
    image = torch.tensor([[float("nan"), 1.0], [1.0, 1.0]])
    value = sog_clr(image, torch.ones(2, 2), torch.arange(2), state, backend=backend, normalize=False)
    assert value.isnan()
    assert state.log_u[:, 0].tolist() == [1.0, 2.0]
    assert not state.log_u.isnan().any()


def test_extreme_logits_stay_finite(backend):
    """exp(400) is no float32: the denominators live in log space."""
    image = F.normalize(torch.randn(8, 3)).requires_grad_()
    state = RunningDenominator(8, gamma=0.5)
    for text in (-image.detach(), image.detach()):
        value = sog_clr(
            image, text, torch.arange(8), state, temperature=0.005, eps=0.0, backend=backend, normalize=False
        )
        assert value.isfinite() and torch.autograd.grad(value, image)[0].isfinite().all()
    assert state.log_u.isfinite().all()


@pytest.mark.parametrize("count", [0, 1])
def test_without_negatives(backend, count):
    image, text, state = leaf(count, 3), leaf(count, 3), RunningDenominator(2)
    for reduction in ("mean", "sum", "none"):
        value = sog_clr(
            image, text, torch.arange(count), state, reduction=reduction, eps=0.0, backend=backend, normalize=False
        )
        assert not value.any()
        assert not any(g.any() for g in torch.autograd.grad(value.sum(), [image, text]))
    assert not state.log_u.isfinite().any()


@pytest.mark.parametrize("level", [0.3, 0.01, 0.001])
def test_gradient_error_in_bfloat16(backend, level):
    a, b = (t.requires_grad_() for t in clustered_pairs(256, 96, level, dtype=torch.bfloat16))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    value = sog_clr(a, b, torch.arange(256), RunningDenominator(256), scale=50.0, backend=backend, normalize=False)
    truth = Dense(0.9, 1e-14)(*exact, torch.arange(256), 50.0).mean()
    assert relative_error(value, truth) <= 1e-3
    gradients = zip(torch.autograd.grad(value, [a, b]), torch.autograd.grad(truth, exact), strict=True)
    for got, expected in gradients:
        assert got.dtype == torch.bfloat16
        assert relative_error(got, expected) <= GRADIENT_ERROR_16_BIT


# ---- Bad input -----------------------------------------------------------------------------------------------------

X, Y, I, S = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4), RunningDenominator(4)
BAD = [
    (lambda: RunningDenominator(-1), ValueError, "RunningDenominator: size must be at least 0, got -1"),
    (lambda: RunningDenominator(2.0), TypeError, "RunningDenominator: size must be an int, got float"),
    (lambda: RunningDenominator(2, gamma=0.0), ValueError, "RunningDenominator: gamma must be in (0, 1], got 0.0"),
    (lambda: RunningDenominator(2, gamma="1"), TypeError, "RunningDenominator: gamma must be a number, got str"),
    (lambda: sog_clr(X, Y, I, S), ValueError, "sog_clr: text must have the same shape as image, got image (4, 3) and"),
    (lambda: sog_clr(X, X, I.float(), S), TypeError, "sog_clr: index must be int64, got torch.float32"),
    (lambda: sog_clr(X, X, I[:3], S), ValueError, "sog_clr: index must have shape (4,), got (3,)"),
    (lambda: sog_clr(X, X, I + 1, S), ValueError, "sog_clr: index must be in [0, 4), got 4"),
    (lambda: sog_clr(X, X, I, S.log_u), TypeError, "sog_clr: state must be a RunningDenominator, got Tensor"),
    (lambda: sog_clr(X, X, I, S, eps=-1.0), ValueError, "sog_clr: eps must be in [0, inf), got -1.0"),
    (lambda: sog_clr(X, X, I, S, temperature=0.0), ValueError, "sog_clr: temperature must be in (0, inf], got 0.0"),
    (
        lambda: sog_clr(X, X, I, S, text_temperature=0.0),
        ValueError,
        "sog_clr: text_temperature must be in (0, inf], got 0.0",
    ),
    (
        lambda: sog_clr(X, X, I, S, text_temperature=1.0, text_scale=1.0),
        ValueError,
        "sog_clr: text_temperature and text_scale must not both be given",
    ),
    (
        lambda: sog_clr(X, X, I, S, text_scale=torch.ones(3)),
        ValueError,
        "sog_clr: text_scale must be one number or have shape (4,), got (3,)",
    ),
    (lambda: sog_clr(X, X, I, S, weight=-torch.ones(4)), ValueError, "sog_clr: weight must not be negative, got -1.0"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[m[:60] for *_, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
