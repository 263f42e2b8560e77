"""What is left out (padding, ignored labels, rows of weight 0) reaches nothing: no value and no gradient."""

import pytest
import torch

from contrastive_ops.losses import linear_cross_entropy, linear_kl, linear_log_prob

IGNORED = -100


def mean(hidden, head, labels):
    return linear_cross_entropy(hidden, head, labels)


def rows(hidden, head, labels):
    return linear_cross_entropy(hidden, head, labels, reduction="none").square().sum()


def log_prob(hidden, head, labels):
    return linear_log_prob(hidden, head, labels).sum()


def entropy(hidden, head, labels):
    found = linear_log_prob(hidden, head, labels, entropy=True)
    return (found.log_prob + found.entropy).sum()


def kl(hidden, head, labels):
    return linear_kl(hidden, head, hidden.flip(0), head, mask=labels != IGNORED).sum()


def weighted(hidden, head, labels):
    # The labels of rows without a weight are no classes at all.
    weight = (labels != IGNORED).to(hidden.dtype)
    return linear_cross_entropy(hidden, head, torch.where(labels == IGNORED, 10**6, labels), weight=weight)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("function", [mean, rows, log_prob, entropy, kl, weighted])
def test_rows_of_a_large_softmax_without_a_label(function, value, compiled):
    labels = torch.randint(9, (4, 5)).masked_fill_(torch.rand(4, 5) < 0.3, IGNORED)
    if function is kl:  # which also reads the rows backwards
        labels = torch.where(labels.flip(0) == IGNORED, IGNORED, labels)
    results = []
    for filling in (0.0, value):
        hidden = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)).double()
        hidden = hidden.masked_fill((labels == IGNORED)[..., None], filling).requires_grad_()
        head = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        torch._dynamo.reset()
        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        found = call(hidden, head, labels)
        results.append((found.detach(), *torch.autograd.grad(found, (hidden, head))))
    for clean, filled in zip(*results, strict=True):
        torch.testing.assert_close(filled, clean, rtol=1e-12, atol=1e-12)
    assert not results[1][1][labels == IGNORED].any()
