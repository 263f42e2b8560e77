"""MoCo against a dense float64 formula."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from torch.nn import functional as F

from contrastive_ops.losses.moco import moco
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
FUZZ = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def dense(query, key, queue, scale, ids=None, queue_ids=None, share=0.0, normalize=True):
    """Rows of the loss: one column for the own key, the others for the queue."""
    q, k, u = (F.normalize(t) if normalize else t for t in (query, key, queue.detach()))
    by_row = scale.expand(len(q))[:, None] if isinstance(scale, torch.Tensor) else scale
    logits = by_row * torch.cat([(q * k).sum(1, keepdim=True), q @ u.T], 1)
    keep = torch.ones_like(logits, dtype=torch.bool)
    if ids is not None:
        keep[:, 1:] = (ids[:, None] != queue_ids) | (ids[:, None] < 0)
    lse = logits.masked_fill(~keep, -torch.inf).logsumexp(1)
    mean = torch.where(keep, logits, 0.0).sum(1) / keep.sum(1)
    return (1 - share) * (lse - logits[:, 0]) + share * (lse - mean)


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_moco(backend, reduction, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    n, entries, depth = draw(st.integers(1, 19)), draw(st.integers(0, 29)), draw(st.integers(1, 7))
    query, key, queue = leaf(n, depth), leaf(n, depth), leaf(entries, depth)
    ids = (torch.randint(-1, 4, (n,)), torch.randint(-1, 4, (entries,))) if draw(st.booleans()) else (None, None)
    scale = (
        torch.rand(n, dtype=DOUBLE) + 1 if draw(st.booleans()) else torch.tensor(2.0, dtype=DOUBLE)
    ).requires_grad_()
    weight = torch.rand(n, dtype=DOUBLE, requires_grad=True) if draw(st.booleans()) else None
    share, normalize = draw(st.sampled_from([0.0, 0.2])), draw(st.booleans())
    value = moco(
        query,
        key,
        queue,
        labels=ids[0],
        queue_labels=ids[1],
        scale=scale,
        label_smoothing=share,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
    )
    rows = dense(query, key, queue, scale, *ids, share, normalize)
    check(value, reduced(rows, reduction, weight), [t for t in (query, key, scale, weight) if t is not None])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_queue_is_frozen_and_keys_may_be(backend, reduction):
    query, key, queue = leaf(6, 4), leaf(6, 4), leaf(9, 4)
    value = moco(query, key, queue, reduction=reduction, backend=backend).sum()
    assert torch.autograd.grad(value, [queue], allow_unused=True, retain_graph=True) == (None,)
    frozen = moco(query, key.detach(), queue, reduction=reduction, backend=backend).sum()
    check(frozen, value, [query])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_negatives_loss_and_gradient_are_zero(backend, reduction):
    query, key, ids = leaf(6, 4), leaf(6, 4), torch.full((6,), 7)
    for queue, options in (
        (leaf(0, 4), {}),
        (leaf(5, 4), {"labels": ids, "queue_labels": torch.full((5,), 7)}),
    ):
        value = moco(query, key, queue, reduction=reduction, backend=backend, **options)
        assert torch.equal(value, torch.zeros_like(value))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(value.sum(), [query, key]))


@pytest.mark.parametrize("ids", [False, True])
def test_diagnostics(backend, ids):
    query, key, queue = leaf(12, 4), leaf(12, 4), leaf(30, 4)
    own = {"labels": torch.arange(12) % 5, "queue_labels": torch.arange(30) % 5} if ids else {}
    plain = moco(query, key, queue, backend=backend, **own)
    loss, measures = moco(query, key, queue, diagnostics=True, backend=backend, **own)
    check(loss, plain, [query, key])
    q, k, u = (F.normalize(t.detach()) for t in (query, key, queue))
    keep = own["labels"][:, None] != own["queue_labels"] if ids else torch.ones(12, 30, dtype=torch.bool)
    positive, similarity = (q * k).sum(1), q @ u.T
    rank = 1 + (keep & (similarity >= positive[:, None])).sum(1)
    assert torch.equal(measures.rank, rank)
    torch.testing.assert_close(measures.accuracy, (rank == 1).double().mean())
    torch.testing.assert_close(measures.positive_similarity, positive.mean())
    torch.testing.assert_close(measures.negative_similarity, similarity[keep].mean())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(backend, reduction):
    queue, ids = torch.randn(5, 3, dtype=DOUBLE), (torch.tensor([0, 1, -1, 2]), torch.tensor([0, 1, 1, -1, 3]))

    def function(query, key, scale):
        options = {"labels": ids[0], "queue_labels": ids[1], "reduction": reduction, "backend": backend}
        return moco(query, key, queue, scale=scale, **options)

    leaves = (leaf(4, 3), leaf(4, 3), torch.tensor(1.3, dtype=DOUBLE, requires_grad=True))
    check_derivatives(function, leaves)


@pairwise(dtype=[torch.bfloat16, torch.float16], level=[0.3, 0.01, 0.001], reduction=["mean", "none"])
def test_gradient_error_in_three_regimes(backend, dtype, level, reduction):
    """The queue holds the positive's neighbours, which nearly cancel it in the gradient."""
    query, key = (t.requires_grad_() for t in clustered_pairs(256, 64, level, dtype=dtype))
    queue = key.detach().roll(1, 0)[:200]
    exact = [t.detach().double().requires_grad_() for t in (query, key)]
    truth = dense(*exact, queue.double(), 50.0, normalize=False).mean()
    value = moco(query, key, queue, scale=50.0, normalize=False, reduction=reduction, backend=backend).mean()
    pairs = zip(torch.autograd.grad(value, [query, key]), torch.autograd.grad(truth, exact), strict=True)
    assert all(got.dtype == dtype and relative_error(got, expected) <= GRADIENT_ERROR_16_BIT for got, expected in pairs)


def test_autocast_brings_queue_and_queries_together(backend):
    query, key, queue = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8), torch.randn(20, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = moco(query, key, queue, backend=backend)
    assert torch.equal(inside, moco(query.bfloat16(), key.bfloat16(), queue, backend=backend))


X, Q, IDS = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
CASES = [
    (lambda: moco(X, Q, Q), ValueError, "moco: key must have the same shape as query, got query (4, 3) and key (5, 3)"),
    (
        lambda: moco(X, X, torch.randn(5, 2)),
        ValueError,
        "moco: queue must have the same last dimension as query, got query (4, 3) and queue (5, 2)",
    ),
    (
        lambda: moco(X, X, Q.bfloat16()),
        TypeError,
        "moco: queue must have the same dtype as query, got query torch.float32 and queue torch.bfloat16",
    ),
    (lambda: moco(X, X, Q, labels=IDS), ValueError, "moco: labels and queue_labels must both be given, or neither"),
    (
        lambda: moco(X, X, Q, labels=IDS, queue_labels=IDS),
        ValueError,
        "moco: queue_labels must have shape (5,), got (4,)",
    ),
    (
        lambda: moco(X, X, Q, labels=IDS.float(), queue_labels=torch.arange(5)),
        TypeError,
        "moco: labels must be int64, got torch.float32",
    ),
    (lambda: moco(X, X, Q, temperature=-1.0), ValueError, "moco: temperature must be in (0, inf], got -1.0"),
    (
        lambda: moco(X, X, Q, scale=torch.ones(3)),
        ValueError,
        "moco: scale must be one number or have shape (4,), got (3,)",
    ),
    (lambda: moco(X, X, Q, weight=-torch.ones(4)), ValueError, "moco: weight must not be negative, got -1.0"),
    (lambda: moco(X, X, Q, label_smoothing=2.0), ValueError, "moco: label_smoothing must be in [0, 1], got 2.0"),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:60] for *_, m in CASES])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
