"""Options of the cross entropy of a large softmax: smoothing, weights of classes, z-loss, softcap, probabilities."""

import itertools
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import CrossEntropy, _linear_chunks, linear_cross_entropy, linear_kl, linear_log_prob
from contrastive_ops.nn import LinearCrossEntropyLoss
from contrastive_ops.testing import relative_error, saved_bytes
from contrastive_ops.testing.compare import check_derivatives

DOUBLE = torch.float64
WORDS = 19


def dense(hidden, head, labels, bias=None, weight=None, class_weight=None, z_loss=0.0, softcap=None, **options):
    """By plain torch in whatever dtype it is given."""
    logits = F.linear(hidden, head, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    reduction = options.pop("reduction", "mean")
    indices = not labels.is_floating_point()
    if indices:
        labels, logits = labels.flatten(), logits.flatten(0, -2)
    else:
        labels, logits = labels.flatten(0, -2), logits.flatten(0, -2)
    used = labels != -100 if indices else torch.ones(len(labels), dtype=torch.bool)
    weight = torch.ones(len(labels), dtype=logits.dtype) if weight is None else weight.flatten()
    share = torch.where(used, weight, 0.0)
    losses = share * F.cross_entropy(logits, labels, weight=class_weight, reduction="none", **options)
    squares = share * z_loss * logits.logsumexp(1).square()
    if reduction == "none":
        return (losses + squares).view(hidden.shape[:-1])
    if reduction == "sum":
        return losses.sum() + squares.sum()
    size = share if class_weight is None or not indices else share * class_weight[labels.clamp_min(0)]
    return losses.sum() / size.sum() + squares.sum() / share.sum()


def inputs(*shape, dtype=DOUBLE, depth=6):
    hidden = torch.randn(*shape, depth, dtype=dtype).requires_grad_()
    head = torch.randn(WORDS, depth, dtype=dtype).requires_grad_()
    labels = torch.randint(WORDS, shape)
    labels[..., ::3] = -100
    return hidden, head, labels, torch.randn(WORDS, dtype=dtype).requires_grad_()


def probabilities(*shape, dtype=DOUBLE):
    return torch.rand(*shape, WORDS, dtype=dtype).softmax(-1).requires_grad_()


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0},
    "classes": {"class_weight": True},
    "smoothed classes": {"label_smoothing": 0.2, "class_weight": True},
    "z_loss": {"z_loss": 0.03},
    "softcap": {"softcap": 1.5},
    "everything": {"label_smoothing": 0.2, "class_weight": True, "z_loss": 0.03, "softcap": 2.0},
}


def same(found, expected, leaves):
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, leaves, cotangent, retain_graph=True),
        torch.autograd.grad(expected, leaves, cotangent, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_against_plain_torch(name, kind, backend, monkeypatch):
    monkeypatch.setattr(_linear_chunks, "CHUNK_ELEMENTS", 60)  # several chunks
    hidden, head, labels, bias = inputs(3, 7)
    labels = labels if kind == "labels" else probabilities(3, 7)
    options = dict(OPTIONS[name])
    if "class_weight" in options:
        options["class_weight"] = torch.rand(WORDS, dtype=DOUBLE) + 0.5
    for reduction, weighted, with_bias in itertools.product(("mean", "sum", "none"), (False, True), (False, True)):
        given = {**options, "reduction": reduction, "bias": bias if with_bias else None}
        token_weight = torch.rand(3, 7, dtype=DOUBLE).requires_grad_() if weighted else None
        found = linear_cross_entropy(hidden, head, labels, weight=token_weight, backend=backend, **given)
        leaves = [hidden, head, *([bias] if with_bias else []), *([token_weight] if weighted else [])]
        leaves += [labels] if kind == "probabilities" else []
        same(found, dense(hidden, head, labels, weight=token_weight, **given), leaves)
        with torch.no_grad():
            again = linear_cross_entropy(hidden, head, labels, weight=token_weight, backend=backend, **given)
        torch.testing.assert_close(again, found.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_sixteen_bits(dtype, name, kind):
    hidden, head, labels, _ = inputs(50, depth=32, dtype=torch.float32)
    labels = labels if kind == "labels" else probabilities(50, dtype=torch.float32).detach().to(dtype)
    hidden, head = (each.detach().to(dtype).requires_grad_() for each in (hidden, head))
    wide = [each.detach().double().requires_grad_() for each in (hidden, head)]
    options = dict(OPTIONS[name])
    class_weight = torch.rand(WORDS) + 0.5 if "class_weight" in options else None
    found = linear_cross_entropy(hidden, head, labels, **{**options, "class_weight": class_weight})
    options["class_weight"] = None if class_weight is None else class_weight.double()
    expected = dense(*wide, labels.double() if labels.is_floating_point() else labels, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(found, (hidden, head)), torch.autograd.grad(expected, wide), strict=True):
        assert relative_error(a, b) < 5e-3


def test_gradients_are_differentiable():
    hidden, head, bias = (each.detach()[:3, ..., :2].clone() for each in inputs(3)[:2] + (torch.randn(3, 2),))
    hidden, head, bias = hidden.requires_grad_(), head.requires_grad_(), bias[:, 0].double().requires_grad_()
    labels, soft = torch.tensor([2, -100, 0]), torch.rand(3, 3, dtype=DOUBLE).softmax(1).requires_grad_()
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "class_weight": torch.rand(3, dtype=DOUBLE)}
    for softcap in (None, 2.0):
        given = {**options, "softcap": softcap}
        for function, leaves in (
            (lambda *t, g=given: linear_cross_entropy(t[0], t[1], labels, bias=t[2], **g), (hidden, head, bias)),
            (lambda *t, g=given: linear_cross_entropy(t[0], t[1], t[3], bias=t[2], **g), (hidden, head, bias, soft)),
        ):
            check_derivatives(function, leaves)


@pytest.mark.parametrize("softcap", [None, 1e4])
def test_a_certain_label_keeps_its_digits(softcap):
    """Capped or not, by labels or by probabilities: a loss of 4e-18 and its gradient."""
    hidden, head = torch.tensor([[40.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    truth = {None: 4.248354e-18, 1e4: 4.24926e-18}[softcap]
    for labels in (torch.tensor([0]), torch.tensor([[1.0, 0.0]])):
        found = linear_cross_entropy(hidden, head, labels, softcap=softcap)
        torch.testing.assert_close(found, torch.tensor(truth), rtol=1e-2, atol=0)
        (gradient,) = torch.autograd.grad(found, hidden)
        torch.testing.assert_close(gradient, torch.tensor([[-truth]]), rtol=1e-2, atol=0)


def test_no_matrix_of_the_logits_is_kept():
    hidden = torch.randn(512, 16, requires_grad=True)
    head, labels = torch.randn(4096, 16, requires_grad=True), torch.randint(4096, (512,))
    for options in ({"label_smoothing": 0.1}, {"z_loss": 0.1, "memory_budget": 0}, {"softcap": 30.0}):
        size, _ = saved_bytes(lambda options=options: linear_cross_entropy(hidden, head, labels, **options))
        assert size < 3 * (hidden.numel() + head.numel()) * 4 + 64 * 512


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1, "z_loss": 0.1}, {"softcap": 3.0}])
def test_ignored_rows_reach_nothing_compiled_or_not(options):
    def step(hidden, head, labels):
        return linear_cross_entropy(hidden, head, labels, **options)

    hidden, head, labels, _ = inputs(12, dtype=torch.float32)
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    expected = step(hidden, head, labels)
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        found = function(hidden, head, labels)
        torch.testing.assert_close(found, expected)
        for gradient in torch.autograd.grad(found, (hidden, head)):
            assert gradient.isfinite().all()
    assert step(*(each.to("meta") for each in (hidden, head, labels))).shape == ()


def test_probabilities_compile_and_rows_of_weight_0_reach_nothing():
    def step(hidden, head, soft, token_weight):
        return linear_cross_entropy(hidden, head, soft, weight=token_weight, label_smoothing=0.1)

    hidden, head, _, _ = inputs(12, dtype=torch.float32)
    soft, token_weight = probabilities(12, dtype=torch.float32), torch.ones(12)
    with torch.no_grad():
        hidden[3] = soft[3] = torch.nan
    token_weight[3] = 0
    expected = step(hidden, head, soft, token_weight)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, head, soft, token_weight)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, head, soft)),
        torch.autograd.grad(expected, (hidden, head, soft)),
        strict=True,
    ):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("elements", [60, 1 << 20])
def test_capped_log_probabilities_and_entropies(elements, backend, monkeypatch):
    monkeypatch.setattr(_linear_chunks, "CHUNK_ELEMENTS", elements)
    hidden, head, labels, bias = inputs(3, 7)
    leaves = [hidden, head, bias]
    log_prob = (1.5 * torch.tanh(F.linear(hidden, head, bias) / 1.5)).log_softmax(-1)
    used = labels != -100
    expected = torch.where(used, log_prob.gather(-1, torch.where(used, labels, 0)[..., None])[..., 0], 0.0)
    options = {"bias": bias, "softcap": 1.5, "backend": backend}
    same(linear_log_prob(hidden, head, labels, **options), expected, leaves)
    found = linear_log_prob(hidden, head, labels, entropy=True, **options)
    entropy = torch.where(used, -(log_prob.exp() * log_prob).sum(-1), 0.0)
    same(torch.stack(found), torch.stack([expected, entropy]), leaves)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("caps", [(1.5, None), (None, 2.0), (1.5, 2.0)])
def test_capped_divergences(direction, caps, monkeypatch):
    monkeypatch.setattr(_linear_chunks, "CHUNK_ELEMENTS", 60)
    hidden, head, _, bias = inputs(3, 7)
    q_hidden, q_head, _, q_bias = inputs(3, 7, depth=4)
    p, q = F.linear(hidden, head, bias), F.linear(q_hidden, q_head, q_bias).detach()
    p, q = (z if cap is None else cap * torch.tanh(z / cap) for z, cap in zip((p, q), caps, strict=True))
    first, second = (each.log_softmax(-1) for each in ((p, q) if direction == "reverse" else (q, p)))
    options = {"direction": direction, "softcap": caps[0], "reference_softcap": caps[1]}
    found = linear_kl(hidden, head, q_hidden, q_head, bias=bias, reference_bias=q_bias, **options)
    same(found, (first.exp() * (first - second)).sum(-1), [hidden, head, bias])


def test_gradients_of_capped_entropies_and_divergences_are_differentiable():
    hidden, head, _, bias = inputs(4, depth=3)
    head, bias = head.detach()[:7].requires_grad_(), bias.detach()[:7].requires_grad_()
    q_hidden, q_head, labels = torch.randn(4, 2).double(), torch.randn(7, 2).double(), torch.tensor([0, -100, 6, 2])
    caps = {"softcap": 1.5, "reference_softcap": 2.0}

    def entropies(*leaves):
        return tuple(linear_log_prob(*leaves[:2], labels, bias=leaves[2], entropy=True, softcap=1.5))

    def divergence(direction):
        return lambda *t: linear_kl(*t[:2], q_hidden, q_head, bias=t[2], direction=direction, **caps)

    for function in (entropies, divergence("reverse"), divergence("forward")):
        check_derivatives(function, (hidden, head, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_capped_entropies_and_divergences_of_sixteen_bits(dtype):
    hidden, head, labels, _ = inputs(50, depth=32, dtype=torch.float32)
    hidden, head, other = (each.detach().to(dtype).requires_grad_() for each in (hidden, head, torch.randn(WORDS, 32)))
    wide = [each.detach().double().requires_grad_() for each in (hidden, head)]
    z = 5 * torch.tanh(F.linear(*wide) / 5)
    log_p = z.log_softmax(1)
    entropy = (labels != -100) * torch.special.entr(log_p.exp()).sum(1)
    log_q = (4 * torch.tanh(F.linear(wide[0].detach(), other.double()) / 4)).log_softmax(1).detach()
    caps = {"softcap": 5.0, "reference_softcap": 4.0}
    for found, expected in (
        (linear_log_prob(hidden, head, labels, entropy=True, softcap=5.0).entropy, entropy),
        (linear_kl(hidden, head, hidden, other, **caps), (log_p.exp() * (log_p - log_q)).sum(1)),
        (linear_kl(hidden, head, hidden, other, direction="forward", **caps), (log_q.exp() * (log_q - log_p)).sum(1)),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(found.sum(), (hidden, head))
        for a, b in zip(gradients, torch.autograd.grad(expected.sum(), wide, retain_graph=True), strict=True):
            assert a.dtype == dtype and relative_error(a, b) < 5e-3


def test_capped_entropies_and_divergences_keep_no_logits_and_compile():
    def step(hidden, head, labels):
        both = linear_log_prob(hidden, head, labels, entropy=True, softcap=3.0)
        given = {"mask": labels != -100, "softcap": 3.0, "reference_softcap": 2.0}
        return *both, linear_kl(hidden, head, hidden, 2 * head.detach(), **given)

    hidden, head = torch.randn(512, 16, requires_grad=True), torch.randn(4096, 16, requires_grad=True)
    labels = torch.randint(4096, (512,))
    size, _ = saved_bytes(lambda: step(hidden, head, labels))
    assert size < 6 * (hidden.numel() + head.numel()) * 4
    labels[::3] = -100
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    expected = step(hidden, head, labels)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, head, labels)
    torch.testing.assert_close(found, expected)
    for gradient in torch.autograd.grad(sum(map(torch.sum, found)), (hidden, head)):
        assert gradient.isfinite().all()


# ---- The z-loss beside the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "softcap": 2.0}, {"class_weight": True}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_the_z_loss_is_returned_beside_the_loss(options, reduction, kind):
    hidden, head, labels, bias = inputs(3, 7)
    labels = labels if kind == "labels" else probabilities(3, 7).detach()
    options = {**options, "bias": bias, "reduction": reduction, "weight": torch.rand(3, 7, dtype=DOUBLE)}
    if "class_weight" in options:
        options["class_weight"] = torch.rand(WORDS, dtype=DOUBLE) + 0.5
    found = linear_cross_entropy(hidden, head, labels, z_loss=0.3, return_z_loss=True, **options)
    assert isinstance(found, CrossEntropy)
    without = dense(hidden, head, labels, **options)
    whole = dense(hidden, head, labels, z_loss=0.3, **options)
    same(torch.stack(found), torch.stack([whole, whole - without]), [hidden, head, bias])
    torch.testing.assert_close(found.loss, linear_cross_entropy(hidden, head, labels, z_loss=0.3, **options))


def test_without_a_z_loss_it_is_0():
    hidden, head, labels, _ = inputs(3, 7)
    for reduction in ("mean", "sum", "none"):
        found = linear_cross_entropy(hidden, head, labels, return_z_loss=True, reduction=reduction)
        assert found.z_loss.shape == found.loss.shape and not found.z_loss.any()
        torch.testing.assert_close(found.loss, linear_cross_entropy(hidden, head, labels, reduction=reduction))


def test_the_module_and_a_traced_program_return_it_too():
    hidden, head, labels, _ = inputs(12, dtype=torch.float32)
    module = LinearCrossEntropyLoss(z_loss=0.1, return_z_loss=True)
    expected = module(hidden, head, labels)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(hidden, head, labels)
    assert isinstance(found, CrossEntropy)
    torch.testing.assert_close(tuple(found), tuple(expected))
    exported = torch.export.export(module, (hidden, head, labels)).module()(hidden, head, labels)
    torch.testing.assert_close(tuple(exported), tuple(expected))


X, W, V = torch.ones(3, 2), torch.ones(4, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in [0, 1], got 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be in [0, inf), got -1"),
        ({"return_z_loss": 1}, TypeError, "return_z_loss must be True or False, got 1"),
        ({"softcap": 0.0}, ValueError, "softcap must be in (0, inf), got 0"),
        ({"class_weight": torch.ones(3)}, ValueError, "class_weight must have shape (4,), got (3,)"),
        ({"class_weight": torch.ones(4, requires_grad=True)}, ValueError, "class_weight must not require a gradient"),
        ({"labels": torch.ones(3, 5)}, ValueError, "labels must be probabilities of shape (3, 4), got (3, 5)"),
        (
            {"labels": torch.ones(3, 4), "ignore_index": 0},
            ValueError,
            "ignore_index must be None where labels are prob",
        ),
        ({"labels": torch.ones(3)}, TypeError, "labels must be int64, got torch.float32"),
    ],
)
def test_bad_input(options, error, message):
    labels = options.pop("labels", V)
    with pytest.raises(error, match="linear_cross_entropy: " + re.escape(message)):
        linear_cross_entropy(X, W, labels, **options)


@pytest.mark.parametrize("key", ["softcap", "reference_softcap"])
def test_bad_caps(key):
    with pytest.raises(ValueError, match=re.escape(f"linear_kl: {key} must be in (0, inf), got -1.0")):
        linear_kl(X, W, X, W, **{key: -1})
    with pytest.raises(ValueError, match=re.escape("linear_log_prob: softcap must be in (0, inf), got inf")):
        linear_log_prob(X, W, V, entropy=True, softcap=float("inf"))
