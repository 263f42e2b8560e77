"""GE2E against a formula of one utterance at a time, and one written for equal numbers of utterances."""

import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import ge2e
from contrastive_ops.nn import GE2ELoss
from contrastive_ops.testing.compare import check, check_derivatives, leaf, number, reduced

DOUBLE = torch.float64


def dense(x, labels, kind, scale, bias):
    """Rows of the loss, and which of them count."""
    e, rows, counted = F.normalize(x), [], []
    speakers = sorted(set(labels.tolist()) - {-1})
    scale = torch.as_tensor(scale, dtype=x.dtype).expand(len(x))
    for i, label in enumerate(labels.tolist()):
        same = [k for k in range(len(x)) if labels[k] == label and k != i]
        counted.append(label != -1 and bool(same))
        if not counted[-1]:
            rows.append(x[i].sum() * 0)
            continue
        centroids = [e[same].mean(0) if k == label else e[labels == k].mean(0) for k in speakers]
        s = scale[i] * F.cosine_similarity(e[i][None], torch.stack(centroids)) + bias
        j = speakers.index(label)
        others = torch.cat([s[:j], s[j + 1 :]])
        if kind == "softmax":
            rows.append(s.logsumexp(0) - s[j])
        else:
            rows.append(1 - s[j].sigmoid() + (others.sigmoid().amax() if len(others) else 0.0))
    return torch.stack(rows), torch.tensor(counted)


LABELS = {
    "usual": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0],
    "alone and nobody": [5, 1, -1, 0, 1, 2, 0, 1, -1, 0],
    "one speaker": [3] * 10,
    "nobody": [-1] * 10,
    "all alone": list(range(10)),
    "any int64": [(1 << 63) - 1, -(1 << 63)] * 5,
}


@pytest.mark.parametrize("kind", ["softmax", "contrast"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_ge2e(backend, kind, reduction, labels):
    x, labels, weight = leaf(10, 5), torch.tensor(labels), torch.rand(10, dtype=DOUBLE, requires_grad=True)
    scale, bias = number(3.0), number(-1.0)
    rows, counted = dense(x, labels, kind, scale, bias)
    given = {"kind": kind, "scale": scale, "bias": bias, "reduction": reduction, "backend": backend}
    check(ge2e(x, labels, **given), reduced(rows, reduction, counted=counted), [x, scale, bias])
    rows, counted = dense(x, labels, kind, scale, bias)
    check(ge2e(x, labels, weight=weight, **given), reduced(rows, reduction, weight, counted), [x, scale, bias, weight])


def test_a_scale_of_each_utterance(backend):
    x, labels, scale = leaf(9, 4), torch.arange(9) % 3, (torch.rand(9, dtype=DOUBLE) + 1).requires_grad_()
    for kind in ("softmax", "contrast"):
        rows, _ = dense(x, labels, kind, scale, -5.0)
        check(ge2e(x, labels, kind=kind, scale=scale, backend=backend), rows.mean(), [x, scale])


def test_it_is_the_loss_of_a_block_of_speakers_and_utterances():
    """As the paper has it: (S, U, D) and the sum over all, with the defaults of w and b."""
    x = leaf(4, 3, 6)
    e = F.normalize(x, dim=2)
    every, without = e.mean(1), (e.sum(1, keepdim=True) - e) / 2
    s = F.cosine_similarity(e[:, :, None], every[None, None], dim=3)
    own = F.cosine_similarity(e, without, dim=2)
    speaker = torch.arange(4)
    s = s.index_put((speaker[:, None], torch.arange(3), speaker[:, None]), own)
    truth = F.cross_entropy((10 * s - 5).flatten(0, 1), speaker.repeat_interleave(3), reduction="sum")
    check(ge2e(x.flatten(0, 1), speaker.repeat_interleave(3), reduction="sum"), truth, [x])


@pytest.mark.parametrize("kind", ["softmax", "contrast"])
def test_derivatives(backend, kind):
    labels, scale, bias = torch.tensor([0, 1, 0, 1, 2, 2]), number(2.0), number(0.3)
    call = lambda x, s, b: ge2e(x, labels, kind=kind, scale=s, bias=b, backend=backend)  # noqa: E731
    check_derivatives(call, (leaf(6, 3), scale, bias))


def test_nobody_and_rows_of_weight_0_may_hold_anything():
    x, labels, weight = torch.randn(8, 4), torch.arange(8) % 2, torch.ones(8)
    truth = ge2e(x[:6], labels[:6])
    x[6], x[7], labels[6], weight[7] = torch.nan, torch.inf, -1, 0.0
    x.requires_grad_()
    loss = ge2e(x, labels, weight=weight)
    loss.backward()
    torch.testing.assert_close(loss, truth)
    assert x.grad.isfinite().all() and not x.grad[6:].any()


def test_a_traced_loss_has_any_number_of_speakers():
    compiled = torch.compile(ge2e, fullgraph=True, backend="aot_eager")
    for kind in ("softmax", "contrast"):
        for labels in (torch.arange(12) % 4, torch.arange(12) % 3 - 1):
            x = torch.randn(12, 5)
            torch.testing.assert_close(compiled(x, labels, kind=kind), ge2e(x, labels, kind=kind))


def test_scale_and_bias_are_learned():
    module, x, labels = GE2ELoss(kind="contrast"), torch.randn(12, 5), torch.arange(12) % 4
    module(x, labels).backward()
    assert module.logit_scale.grad.abs() > 0 and module.logit_bias.grad.abs() > 0
    torch.testing.assert_close(module(x, labels), ge2e(x, labels, kind="contrast"))
    module = GE2ELoss()
    module(x, labels).backward()
    assert module.logit_scale.grad.abs() > 0 and module.logit_bias.grad == 0


X, Y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ge2e(X, Y, kind="both"), ValueError, "ge2e: kind must be one of 'softmax', 'contrast', got 'both'"),
        (lambda: ge2e(X, Y[:3]), ValueError, "ge2e: labels must have shape (4,), got (3,)"),
        (lambda: ge2e(X, Y.float()), TypeError, "ge2e: labels must be int64, got torch.float32"),
        (lambda: ge2e(X[None], Y), ValueError, "ge2e: x must"),
        (lambda: ge2e(X, Y, bias=torch.ones(4)), ValueError, "ge2e: bias must be one number"),
        (lambda: ge2e(X, Y, backend="fast"), ValueError, "ge2e: backend must be one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
