"""Log-probabilities, entropies, cross entropy and divergences of a large softmax, against dense formulas in float64."""

import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import LogProb, _linear_chunks, dpo, linear_cross_entropy, linear_kl, linear_log_prob
from contrastive_ops.testing import relative_error
from contrastive_ops.testing.compare import check_derivatives

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


def test_dpo_of_sequences_from_a_policy():
    """The whole way: hidden states to log-probabilities to loss, with the tokens of the prompt ignored."""
    hidden, weight, labels, _ = inputs(4, 6)
    labels[:, :2] = -100
    log_prob = linear_log_prob(hidden, weight, labels).sum(1)
    expected, _ = dense(hidden, weight, labels)
    found = dpo(log_prob[:2], log_prob[2:], beta=0.3)
    expected = expected.sum(1)
    truth = -F.logsigmoid(0.3 * (expected[:2] - expected[2:])).mean()
    torch.testing.assert_close(found, truth)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


# ---- Entropy -------------------------------------------------------------------------------------------------------


def test_entropies_in_several_chunks(monkeypatch):
    monkeypatch.setattr(_linear_chunks, "CHUNK_ELEMENTS", 60)
    hidden, weight, labels, bias = inputs(23)
    found, expected = (
        linear_log_prob(hidden, weight, labels, bias=bias, entropy=True),
        dense(hidden, weight, labels, bias),
    )
    cotangents = [torch.randn(23, dtype=DOUBLE) for _ in range(2)]
    leaves = (hidden, weight, bias)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(found, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradients_of_entropies_and_divergences_are_differentiable():
    hidden, weight, labels, bias = inputs(4, words=7, depth=3)
    others = [each.detach() for each in inputs(4, words=7, depth=2)[:2]]

    def log_prob_and_entropy(*leaves):
        return tuple(linear_log_prob(*leaves[:2], labels, bias=leaves[2], entropy=True))

    functions = [log_prob_and_entropy]
    for direction in ("reverse", "forward"):
        functions.append(
            lambda *leaves, direction=direction: linear_kl(*leaves[:2], *others, bias=leaves[2], direction=direction)
        )
    for function in functions:
        check_derivatives(function, (hidden, weight, bias))


@pytest.mark.parametrize("needing", [(0,), (1,), (2,), (0, 2)])
def test_any_of_the_inputs_may_need_a_gradient(needing):
    leaves = list(inputs(5))
    labels = leaves.pop(2)
    leaves = [each.detach().requires_grad_(i in needing) for i, each in enumerate(leaves)]
    wanted = [leaves[i] for i in needing]
    found, expected = (
        linear_log_prob(*leaves[:2], labels, bias=leaves[2], entropy=True),
        dense(*leaves[:2], labels, leaves[2]),
    )
    for a, b in zip(
        torch.autograd.grad(sum(found).sum(), wanted), torch.autograd.grad(sum(expected).sum(), wanted), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_words_that_are_switched_off():
    """A bias of -inf: no probability, no share of the entropy or the divergence, and no NaN in a gradient."""
    hidden, weight, labels, _ = inputs(6)
    bias = torch.zeros(19, dtype=DOUBLE)
    bias[labels.unique()[:1]], labels = -torch.inf, labels[labels != labels.unique()[0]]
    hidden = hidden[: len(labels)].detach().requires_grad_()
    kept = bias == 0
    moved = kept.cumsum(0)[labels] - 1
    found = linear_log_prob(hidden, weight, labels, bias=bias, entropy=True)
    expected = dense(hidden, weight[kept], moved)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(sum(found).sum(), (hidden, weight)),
        torch.autograd.grad(sum(expected).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    other = torch.randn_like(weight)
    for direction in ("reverse", "forward"):
        given = {"bias": bias, "reference_bias": bias, "direction": direction}
        found = linear_kl(hidden, weight, hidden, other, **given)
        expected = dense_kl(hidden, weight[kept], hidden, other[kept], direction=direction)
        torch.testing.assert_close(found, expected)
        (a,), (b,) = (torch.autograd.grad(each.sum(), hidden) for each in (found, expected))
        torch.testing.assert_close(a, b)


def test_entropy_keeps_the_digits_of_a_certain_label():
    hidden, weight = torch.tensor([[40.0]]), torch.tensor([[1.0], [0.0]])
    found = linear_log_prob(hidden, weight, torch.tensor([0]), entropy=True)
    torch.testing.assert_close(found.log_prob, torch.tensor([-4.248354e-18]), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.entropy, torch.tensor([41 * 4.248354e-18]), rtol=1e-5, atol=0)


# ---- Cross entropy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [True, False])
def test_cross_entropy(backend, reduction, weighted):
    hidden, weight, labels, bias = inputs(3, 7)
    labels[1, 4:], labels[2, 0] = -100, -100
    token_weight = torch.rand(3, 7, dtype=DOUBLE).requires_grad_() if weighted else None
    given = {"weight": token_weight, "reduction": reduction, "backend": backend}
    found = linear_cross_entropy(hidden, weight, labels, bias=bias, **given)
    rows = F.cross_entropy(F.linear(hidden, weight, bias).mT, labels, reduction="none")
    if weighted:
        rows = rows * token_weight
    count = (labels != -100).to(rows) if token_weight is None else token_weight * (labels != -100)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / count.sum()}[reduction]
    torch.testing.assert_close(found, expected)
    leaves = [hidden, weight, bias, *([token_weight] if weighted else [])]
    cotangent = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, bias=bias, **given), expected.detach())


def test_cross_entropy_without_any_label():
    hidden, weight, labels, _ = inputs(4)
    value = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    value.backward()
    assert value == 0 and not hidden.grad.any() and not weight.grad.any()


def test_a_policy_gradient_is_a_sum_with_weights_of_any_sign():
    hidden, weight, labels, _ = inputs(9)
    advantage = torch.randn(9, dtype=DOUBLE)
    value = linear_cross_entropy(hidden, weight, labels, weight=advantage, reduction="sum")
    expected = -(advantage * dense(hidden, weight, labels)[0]).sum()
    torch.testing.assert_close(value, expected)
    for a, b in zip(
        torch.autograd.grad(value, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


# ---- Divergence ----------------------------------------------------------------------------------------------------


def dense_kl(hidden, weight, reference_hidden, reference_weight, bias=None, reference_bias=None, direction="reverse"):
    log_p = F.linear(hidden, weight, bias).log_softmax(-1)
    log_q = F.linear(reference_hidden, reference_weight, reference_bias).log_softmax(-1).detach()
    first, second = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
    return (first.exp() * (first - second)).sum(-1)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("elements", [60, 1 << 20])
def test_divergence(direction, elements, monkeypatch):
    monkeypatch.setattr(_linear_chunks, "CHUNK_ELEMENTS", elements)
    (hidden, weight, _, bias), reference = inputs(3, 7), inputs(3, 7, depth=4)
    reference = [each.detach().requires_grad_() for each in (*reference[:2], reference[3])]
    mask = torch.rand(3, 7) < 0.7
    biases = {"bias": bias, "reference_bias": reference[2]}
    found = linear_kl(hidden, weight, *reference[:2], mask=mask, direction=direction, **biases)
    expected = torch.where(mask, dense_kl(hidden, weight, *reference[:2], direction=direction, **biases), 0.0)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    leaves = (hidden, weight, bias)
    got = torch.autograd.grad(found, [*leaves, *reference], cotangent, allow_unused=True)
    assert got[3:] == (None, None, None)
    for a, b in zip(got, torch.autograd.grad(expected, leaves, cotangent), strict=False):
        torch.testing.assert_close(a, b)
    assert not got[0][~mask].any()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_models_that_are_nearly_the_same(direction):
    """A divergence of 1e-7 in float32, where a sum of p (log p - log q) has no digit left."""
    hidden, weight, _, _ = inputs(40, words=300, depth=16, dtype=torch.float32)
    other = (weight + 1e-4 * torch.randn_like(weight)).detach()
    found = linear_kl(hidden, weight, hidden, other, direction=direction)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    expected = dense_kl(*wide, wide[0], other.double(), direction=direction)
    assert 1e-9 < expected.max() < 1e-6 and (found >= 0).all()
    assert relative_error(found, expected) < 1e-2
    for a, b in zip(
        torch.autograd.grad(found.sum(), (hidden, weight)), torch.autograd.grad(expected.sum(), wide), strict=True
    ):
        assert relative_error(a, b) < 1e-2


def test_a_model_and_itself():
    hidden, weight, _, _ = inputs(5, 3, dtype=torch.float32)
    found = linear_kl(hidden, weight, hidden, weight)
    found.sum().backward()
    assert not found.any() and not hidden.grad.any() and not weight.grad.any()


def test_divergence_of_sixteen_bits_and_of_other_dtypes():
    hidden, weight, _, _ = inputs(30, words=50, depth=16, dtype=torch.float32)
    other = torch.randn(50, 16)
    hidden, weight = (each.detach().bfloat16().requires_grad_() for each in (hidden, weight))
    found = linear_kl(hidden, weight, hidden.float(), other)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    expected = dense_kl(*wide, wide[0], other.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (a,), (b,) = torch.autograd.grad(found.sum(), hidden), torch.autograd.grad(expected.sum(), wide[:1])
    assert a.dtype == torch.bfloat16 and relative_error(a, b) < 5e-3


def test_divergence_of_no_rows():
    hidden, weight, _, _ = inputs(6)
    assert linear_kl(hidden[:0], weight, hidden[:0], weight).shape == (0,)
    assert linear_kl(hidden, weight, hidden, weight, mask=torch.zeros(6, dtype=torch.bool)).sum() == 0


def test_nan_stays_in_its_row():
    hidden, weight, labels, _ = inputs(6)
    with torch.no_grad():
        hidden[2] = torch.nan
    for found in (
        *linear_log_prob(hidden, weight, labels, entropy=True),
        linear_kl(hidden, weight, hidden.detach().nan_to_num(), weight),
    ):
        assert found.isnan().tolist() == [i == 2 for i in range(6)]
        (gradient,) = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
        assert gradient.isnan().any(1).tolist() == [i == 2 for i in range(6)]


def test_entropies_and_divergences_compile_and_have_shapes_without_data():
    def both(hidden, weight, labels):
        kl = linear_kl(hidden, weight, hidden, 2 * weight, mask=labels != -100)
        return (
            *linear_log_prob(hidden, weight, labels, entropy=True),
            kl,
            linear_cross_entropy(hidden, weight, labels),
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for rows in (12, 17):
        hidden, weight, labels, _ = inputs(rows, dtype=torch.float32)
        labels[::3] = -100
        found, expected = compiled(hidden, weight, labels), both(hidden, weight, labels)
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            torch.autograd.grad(sum(map(torch.sum, found)), (hidden, weight)),
            torch.autograd.grad(sum(map(torch.sum, expected)), (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    shapes = [each.shape for each in both(*(each.to("meta") for each in (hidden, weight, labels)))]
    assert shapes == [each.shape for each in expected]


# ---- Errors --------------------------------------------------------------------------------------------------------

V = torch.zeros(3)
X, W = torch.ones(3, 2), torch.ones(4, 2)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (
            lambda: linear_log_prob(V[0], torch.ones(2, 3), V),
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
        (lambda: linear_kl(V[0], W, X, W), ValueError, "linear_kl: hidden must be a tensor (..., D), got ()"),
        (
            lambda: linear_kl(X, W, X[:2], W),
            ValueError,
            "reference_hidden must have the tokens of hidden (3,), got (2,)",
        ),
        (
            lambda: linear_kl(X, W, X, W[:3]),
            ValueError,
            "reference_head must have the classes of head (4,), got (3,)",
        ),
        (lambda: linear_kl(X, W, X, W, mask=V), TypeError, "linear_kl: mask must be bool, got torch.float32"),
        (lambda: linear_kl(X, W, X, W, mask=V[:2] > 0), ValueError, "linear_kl: mask must have shape (3,), got (2,)"),
        (lambda: linear_kl(X, W, X, W, reference_bias=V), ValueError, "linear_kl: reference_bias must have shape (4,)"),
        (lambda: linear_kl(X, W, X, W, direction="up"), ValueError, "direction must be one of 'reverse', 'forward'"),
        (
            lambda: linear_cross_entropy(X, W, V.long(), weight=V[:2]),
            ValueError,
            "linear_cross_entropy: weight must have shape (3,), got (2,)",
        ),
        (
            lambda: linear_cross_entropy(X, W, V.long(), weight=V - 1),
            ValueError,
            "linear_cross_entropy: weight must not be negative, got -1.0",
        ),
        (lambda: linear_cross_entropy(X, W, V.long(), reduction="max"), ValueError, "reduction must be one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
