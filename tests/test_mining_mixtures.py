"""Mixtures of rows as negatives of a loss, against dense formulas."""

import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import info_nce
from contrastive_ops.losses import soft_info_nce
from contrastive_ops.mining import mixtures
from contrastive_ops.testing.compare import check, leaf

DOUBLE = torch.float64
N, M, K, D = 6, 9, 4, 5


def drawn():
    pairs, shares = torch.randint(M, (N, K, 2)), torch.rand(N, K, dtype=DOUBLE)
    return leaf(M, D), pairs, shares


def mixed(rows, pairs, shares, i, k):
    first, second = pairs[i, k].tolist()
    return shares[i, k] * rows[first] + (1 - shares[i, k]) * rows[second]


@pytest.mark.parametrize("moved", [0.0, 1e-3])
def test_hard_negative_mixing(backend, moved):
    """MoCHi: mixtures of negatives, and of queries with negatives, beside the batch; one pair after another."""
    queue, pairs, shares = drawn()
    query, key, own = leaf(N, D), leaf(N, D), torch.rand(N, 2, dtype=DOUBLE) / 2
    others = torch.randint(M, (N, 2))
    x, y, h = (F.normalize(each, dim=1) for each in (query, key, queue))
    losses = []
    for i in range(N):
        between = [mixed(h, pairs, shares, i, k) for k in range(K)]
        between += [own[i, k] * x[i] + (1 - own[i, k]) * h[others[i, k]] for k in range(2)]
        columns = torch.cat([y, h, torch.stack([each / each.norm() for each in between])])
        losses.append(F.cross_entropy(columns @ x[i] / 0.2, torch.tensor(i)))
    x, h = (F.normalize(each, dim=1) for each in (query, queue))
    negatives = [mixtures(h, pairs, (shares + moved).clamp(max=1)), mixtures(h, others, own, anchors=x)]
    value = info_nce(query, key, queue, row_negatives=torch.cat(negatives, 1), temperature=0.2, backend=backend)
    truth = torch.stack(losses).mean()
    if moved:
        assert abs(value - truth) > 1e-9
        return
    check(value, truth, [query, key, queue])


def test_mixtures_that_are_weighted_and_constant():
    """SupReMix's negatives: a mixture counts by how far its label is from the anchor's, and has no gradient."""
    x, y, labels = leaf(N, D), leaf(N, D), torch.randn(N, dtype=DOUBLE)
    others = torch.stack([torch.tensor([j for j in range(N) if j != i]) for i in range(N)])
    shares = torch.rand(N, N - 1, dtype=DOUBLE)
    far = (1 - shares) * (labels[:, None] - labels[others]).abs()
    logits = x @ y.T / 0.5
    between = shares[..., None] * x.detach()[:, None] + (1 - shares[..., None]) * x.detach()[others]
    of_mixtures = torch.einsum("nd,nkd->nk", x, between) / 0.5 + (far + 1).log()
    truth = F.cross_entropy(torch.cat([logits, of_mixtures], 1), torch.arange(N))
    negatives = mixtures(x.detach(), others, shares, x.detach())
    options = {"temperature": 0.5, "normalize": False, "row_negatives": negatives}
    check(info_nce(x, y, row_negative_bias=(far + 1).log(), **options), truth, [x, y])


def test_mixed_inputs_have_two_targets():
    """i-Mix, mixup: a row of shares of two queries, and of their keys."""
    query, key, partner, share = leaf(N, D), leaf(N, D), torch.randperm(N), torch.rand(N, dtype=DOUBLE)
    row = torch.arange(N)
    x = share[:, None] * query + (1 - share[:, None]) * query[partner]
    logits = F.normalize(x, dim=1) @ F.normalize(key, dim=1).T / 0.2
    log_p = logits.log_softmax(1)
    truth = -(share * log_p[row, row] + (1 - share) * log_p[row, partner]).mean()
    value = mixtures(query, torch.stack([row, partner], 1)[:, None], share[:, None])[:, 0]
    columns = torch.stack([row, partner], 1).flatten()
    lists = 2 * torch.arange(N + 1), columns, torch.stack([share, 1 - share], 1).flatten()
    check(soft_info_nce(value, key, lists, temperature=0.2), truth, [query, key])


def test_shares_are_differentiable_and_ends_are_the_rows():
    rows, pairs, shares = drawn()
    shares.requires_grad_()
    found = mixtures(rows, pairs, shares)
    truth = torch.stack([torch.stack([mixed(rows, pairs, shares, i, k) for k in range(K)]) for i in range(N)])
    check(found, truth, [rows, shares])
    for share, side in ((0.0, 1), (1.0, 0)):
        assert torch.equal(mixtures(rows, pairs, share), rows[pairs[..., side]])
    half = mixtures(rows.detach().to(torch.bfloat16), pairs)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), rows.detach()[pairs].mean(2), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("n, m, k, d", [(0, 5, 3, 4), (3, 5, 0, 4), (3, 1, 2, 4), (3, 5, 2, 0), (0, 0, 2, 3)])
def test_sizes_of_none_and_one(n, m, k, d):
    rows, anchors = torch.randn(m, d, requires_grad=True), torch.randn(n, d, requires_grad=True)
    found = mixtures(rows, torch.zeros(n, k, 2, dtype=torch.int64), torch.rand(n, k))
    with_anchors = mixtures(rows, torch.zeros(n, k, dtype=torch.int64), 0.3, anchors)
    assert found.shape == with_anchors.shape == (n, k, d)
    (found.sum() + with_anchors.sum()).backward()
    assert rows.grad.shape == (m, d) and anchors.grad.shape == (n, d)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            (torch.full((3, 2, 2), -1),),
            ValueError,
            "partners must name two rows for each mixture, got -1, which stands",
        ),
        ((torch.full((3, 2, 2), 9),), ValueError, "partners must be in [0, 9), got 9"),
        ((torch.zeros(3, 2, dtype=torch.int64),), ValueError, "partners must have shape (N, K, 2) without anchors"),
        (
            (torch.zeros(3, 2, 2, dtype=torch.int64), 0.5, torch.randn(3, D)),
            ValueError,
            "partners must have shape (3, K)",
        ),
        ((torch.zeros(3, 2, 2),), TypeError, "partners must"),
        ((torch.zeros(3, 2, 2, dtype=torch.int64), 1.5), ValueError, "shares must be in [0, 1], got 1.5"),
        (
            (torch.zeros(3, 2, 2, dtype=torch.int64), torch.full((3, 2), -0.5)),
            ValueError,
            "shares must be in [0, 1], got",
        ),
        (
            (torch.zeros(3, 2, 2, dtype=torch.int64), torch.rand(3)),
            ValueError,
            "shares must be one number or have shape",
        ),
        ((torch.zeros(3, 2, dtype=torch.int64), 0.5, torch.randn(3, D + 1)), ValueError, "anchors"),
    ],
)
def test_mixtures_without_partners_are_refused(arguments, error, message):
    with pytest.raises(error, match="mixtures: .*" + re.escape(message)):
        mixtures(torch.randn(M, D), *arguments)
