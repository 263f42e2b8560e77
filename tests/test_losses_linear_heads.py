"""Large softmaxes with several heads on the same rows, torch's K-dimensional loss, and torch's own samples."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import _linear_chunks, linear_cross_entropy, linear_kl, linear_log_prob
from contrastive_ops.testing import relative_error, saved_bytes
from contrastive_ops.testing.compare import check_derivatives

DOUBLE = torch.float64
WORDS, DEPTH, HEADS = 11, 5, (2, 3)


def inputs(*rows, dtype=DOUBLE, heads=HEADS):
    """Hidden states, heads, their biases and labels, of which some are ignored."""
    hidden = torch.randn(*rows, DEPTH, dtype=dtype).requires_grad_()
    weight = torch.randn(WORDS, *heads, DEPTH, dtype=dtype).requires_grad_()
    labels = torch.randint(WORDS, (*rows, *heads))
    labels[torch.rand(labels.shape) < 0.3] = -100
    return hidden, weight, labels, torch.randn(WORDS, *heads, dtype=dtype).requires_grad_()


def dense_logits(hidden, weight, bias=None):
    """(..., heads, V): the classes last."""
    logits = torch.tensordot(hidden, weight, ([-1], [-1]))
    logits = logits if bias is None else logits + bias
    return logits.movedim(hidden.dim() - 1, -1)


def same(found, expected, leaves):
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch.nn.functional.linear_cross_entropy: 2.13")
def test_the_samples_by_which_torch_tests_its_own():
    program = os.path.join(os.path.dirname(__file__), "torch_samples.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) > 600 and any(len(each["shapes"][1]) > 2 for each in found)
    assert [each for each in found if each["difference"] is not None] == []


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch.nn.functional.linear_cross_entropy: 2.13")
@pytest.mark.parametrize(
    "shape,heads", [((), ()), ((1,), ()), ((5,), ()), ((5,), (3,)), ((4,), (1, 2, 1)), ((1,), (1,))]
)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_against_the_function_of_torch(shape, heads, kind):
    """Over what torch's samples vary: rows or one, heads, labels or probabilities, bias, weight, reduction, ignored."""
    hidden, weight, _, bias = inputs(*shape, heads=heads)
    labels = torch.randint(WORDS, (*shape, *heads))
    if kind == "probabilities":
        labels = torch.rand(*shape, WORDS, *heads, dtype=DOUBLE).requires_grad_()
    choices = itertools.product((None, bias), (False, True), ("mean", "sum", "none"), (0.0, 0.3))
    for each_bias, weighted, reduction, smoothing in choices:
        class_weight = torch.rand(WORDS, dtype=DOUBLE) + 0.5 if weighted else None
        given = {"reduction": reduction, "label_smoothing": smoothing}
        found = linear_cross_entropy(hidden, weight, labels, bias=each_bias, class_weight=class_weight, **given)
        truth = F.linear_cross_entropy(hidden, weight, labels, linear_bias=each_bias, weight=class_weight, **given)
        same(
            found,
            truth,
            [each for each in (hidden, weight, each_bias, labels) if each is not None and each.requires_grad],
        )
    if kind == "labels" and shape == (5,):
        labels[1] = 1
        found = linear_cross_entropy(hidden, weight, labels, ignore_index=1)
        same(found, F.linear_cross_entropy(hidden, weight, labels, ignore_index=1), [hidden, weight])


# ---- Dense formulas ------------------------------------------------------------------------------------------------


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 2.0},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0},
}


def dense_cross_entropy(hidden, head, labels, bias, weight, class_weight, reduction, **options):
    z_loss, softcap = options.get("z_loss", 0.0), options.get("softcap")
    logits = dense_logits(hidden, head, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    smoothing = {"label_smoothing": options.get("label_smoothing", 0.0)}
    flat = logits.flatten(0, -2)
    losses = F.cross_entropy(flat, labels.flatten(), weight=class_weight, reduction="none", **smoothing)
    share = (labels != -100) * weight
    losses, squares = share * losses.view(labels.shape), share * z_loss * logits.logsumexp(-1).square()
    if reduction == "none":
        return losses + squares
    if reduction == "sum":
        return losses.sum() + squares.sum()
    return losses.sum() / (share * class_weight[labels.clamp_min(0)]).sum() + squares.sum() / share.sum()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_cross_entropies(name, backend, monkeypatch):
    monkeypatch.setattr(_linear_chunks, "CHUNK_ELEMENTS", 60)
    hidden, weight, labels, bias = inputs(4, 7)
    token_weight = torch.rand(labels.shape, dtype=DOUBLE).requires_grad_()
    class_weight = torch.rand(WORDS, dtype=DOUBLE) + 0.5
    for reduction in ("mean", "sum", "none"):
        given = {"class_weight": class_weight, "reduction": reduction, "weight": token_weight, **OPTIONS[name]}
        found = linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend, **given)
        expected = dense_cross_entropy(hidden, weight, labels, bias, **given)
        same(found, expected, [hidden, weight, bias, token_weight])
        with torch.no_grad():
            again = linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend, **given)
        torch.testing.assert_close(again, found.detach())


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", [(), (6,), (2, 3)])
def test_log_probabilities_and_entropies(rows, entropy, softcap):
    hidden, weight, labels, bias = inputs(*rows)
    found = linear_log_prob(hidden, weight, labels, bias=bias, entropy=entropy, softcap=softcap)
    logits = dense_logits(hidden, weight, bias)
    log_p = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)
    used = labels != -100
    expected = [torch.where(used, log_p.gather(-1, torch.where(used, labels, 0)[..., None])[..., 0], 0.0)]
    expected += [torch.where(used, torch.special.entr(log_p.exp()).sum(-1), 0.0)] if entropy else []
    same(torch.stack(list(found) if entropy else [found]), torch.stack(expected), [hidden, weight, bias])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_divergences(direction):
    hidden, weight, _, bias = inputs(2, 4)
    q_hidden, q_weight = torch.randn(2, 4, 3, dtype=DOUBLE), torch.randn(WORDS, *HEADS, 3, dtype=DOUBLE)
    q_bias, mask = torch.randn(WORDS, *HEADS, dtype=DOUBLE), torch.rand(2, 4, *HEADS) < 0.7
    biases = {"bias": bias, "reference_bias": q_bias}
    found = linear_kl(hidden, weight, q_hidden, q_weight, mask=mask, direction=direction, **biases)
    both = dense_logits(hidden, weight, bias), dense_logits(q_hidden, q_weight, q_bias)
    p, q = (each.log_softmax(-1) for each in (both if direction == "reverse" else both[::-1]))
    same(found, torch.where(mask, (p.exp() * (p - q)).sum(-1), 0.0), [hidden, weight, bias])


def test_gradients_are_differentiable():
    hidden, weight, bias = (torch.randn(*size, dtype=DOUBLE).requires_grad_() for size in ((2, 2), (3, 2, 2), (3, 2)))
    labels, soft = torch.tensor([[0, -100], [2, 1]]), torch.rand(2, 3, 2, dtype=DOUBLE).requires_grad_()
    options, other = {"label_smoothing": 0.2, "z_loss": 0.1}, [torch.randn_like(each) for each in (hidden, weight)]
    for function, leaves in (
        (lambda *t: linear_cross_entropy(t[0], t[1], labels, bias=t[2], **options), (hidden, weight, bias)),
        (lambda *t: linear_cross_entropy(t[0], t[1], t[3], bias=t[2], softcap=2.0), (hidden, weight, bias, soft)),
        (lambda *t: tuple(linear_log_prob(t[0], t[1], labels, entropy=True)), (hidden, weight)),
        (lambda *t: linear_kl(t[0], t[1], *other), (hidden, weight)),
    ):
        check_derivatives(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_many_heads_of_sixteen_bits(dtype, softcap):
    """The gradients of the rows by each of 64 heads are not rounded to 16 bits before they are added up."""
    hidden, weight = torch.randn(40, 32).to(dtype).requires_grad_(), torch.randn(50, 64, 32).to(dtype).requires_grad_()
    labels = torch.randint(50, (40, 64))
    found = linear_cross_entropy(hidden, weight, labels, softcap=softcap)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logits = dense_logits(*wide)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(expected, wide), strict=True):
        assert a.dtype == dtype and relative_error(a, b) < 3e-3


def test_no_matrix_of_the_logits_is_kept():
    rows, words, heads = 512, 4096, 4
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight, labels = torch.randn(words, heads, 16, requires_grad=True), torch.randint(words, (rows, heads))
    # Of each head at most its gradients.
    allowed = 3 * (heads * hidden.numel() + weight.numel()) * 4 + 64 * rows * heads
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "memory_budget": 0}, {"softcap": 30.0}):
        size, _ = saved_bytes(lambda options=options: linear_cross_entropy(hidden, weight, labels, **options))
        assert size < allowed < rows * words * heads * 4
    size, _ = saved_bytes(lambda: linear_log_prob(hidden, weight, labels, entropy=True))
    assert size < allowed
    size, _ = saved_bytes(lambda: linear_kl(hidden, weight, hidden.detach(), weight.detach() + 1))
    assert size < allowed


def test_ignored_rows_of_a_head_reach_nothing_compiled_or_not():
    def step(hidden, weight, labels):
        kl = linear_kl(hidden, weight, hidden, 2 * weight, mask=labels != -100)
        entropies = linear_log_prob(hidden, weight, labels, entropy=True)
        return linear_cross_entropy(hidden, weight, labels), kl, *entropies

    hidden, weight, labels, _ = inputs(12, dtype=torch.float32)
    labels[3] = labels[7] = -100
    labels[:, 1, 1] = -100  # a head without any label
    with torch.no_grad():
        hidden[3], hidden[7], weight[:, 1, 1] = torch.nan, torch.inf, 7.0
    expected = step(hidden, weight, labels)
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        found = function(hidden, weight, labels)
        torch.testing.assert_close(found, expected)
        dx, dw = torch.autograd.grad(sum(map(torch.sum, found)), (hidden, weight))
        assert dx.isfinite().all() and dw.isfinite().all()
        assert not dx[[3, 7]].any() and not dw[:, 1, 1].any()
    shapes = [each.shape for each in step(*(each.to("meta") for each in (hidden, weight, labels)))]
    assert shapes == [each.shape for each in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype):
    hidden, weight = torch.randn(200, 48).to(dtype).requires_grad_(), torch.randn(70, 5, 48).to(dtype).requires_grad_()
    labels, found, threads = torch.randint(70, (200, 5)), [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            loss = linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1)
            found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_every_layout_of_the_weight():
    hidden, weight, labels, bias = inputs(6)
    expected = linear_cross_entropy(hidden, weight, labels, bias=bias)
    other = weight.detach().movedim(-1, 0).contiguous().movedim(0, -1)
    torch.testing.assert_close(linear_cross_entropy(hidden, other, labels, bias=bias), expected)
    of_one = linear_cross_entropy(hidden, weight[:, :1, 0], labels[:, :1, 0], bias=bias[:, :1, 0])
    torch.testing.assert_close(
        of_one, linear_cross_entropy(hidden, weight[:, 0, 0], labels[:, 0, 0], bias=bias[:, 0, 0])
    )


# ---- Errors --------------------------------------------------------------------------------------------------------

X, W, V = torch.ones(3, 2), torch.ones(4, 5, 2), torch.zeros(3, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (
            lambda: linear_cross_entropy(X, W[0, 0], V),
            ValueError,
            "head must be a tensor (V, D) or (V, ..., D), got (2,)",
        ),
        (
            lambda: linear_cross_entropy(X, W[:, :0], V),
            ValueError,
            "head must have no size of 0 between its first and its last, got (4, 0, 2)",
        ),
        (
            lambda: linear_cross_entropy(X, W.long(), V),
            TypeError,
            "head must be float32, float64, bfloat16 or float16",
        ),
        (lambda: linear_cross_entropy(X, W, V[:, :4]), ValueError, "labels must have shape (3, 5), got (3, 4)"),
        (lambda: linear_cross_entropy(X, W, V + 4), ValueError, "labels must be in [0, 4), got 4"),
        (lambda: linear_cross_entropy(X, W, V, bias=W[:, 0, 0]), ValueError, "bias must have shape (4, 5), got (4,)"),
        (
            lambda: linear_cross_entropy(X, W, V, bias=V[:1].expand(4, 5)),
            TypeError,
            "bias must be a floating tensor, got",
        ),
        (
            lambda: linear_cross_entropy(X, W, torch.ones(3, 5, 4)),
            ValueError,
            "labels must be probabilities of shape (3, 4, 5), got (3, 5, 4)",
        ),
        (
            lambda: linear_cross_entropy(X, W, V, weight=X[:, 0]),
            ValueError,
            "weight must have shape (3, 5), got (3,)",
        ),
        (lambda: linear_cross_entropy(X, W, V, weight=V - 1.0), ValueError, "weight must not be negative"),
        (
            lambda: linear_cross_entropy(X, W[..., :1], V),
            ValueError,
            "head must have the same last dimension as hidden",
        ),
        (lambda: linear_kl(X, W, X, W, mask=X[:, 0] > 0), ValueError, "mask must have shape (3, 5), got (3,)"),
        (
            lambda: linear_kl(X, W, X, W[:, 0]),
            ValueError,
            "reference_head must have the classes of head (4, 5), got (4,)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
