"""Recipes of labels: classes, scores, items and private negatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core import checks
from ..core.ordered import ordered_sum
from ..losses import contrastive, info_nce, triplet
from ..losses._columns import wide
from ..losses._euclidean import softmax_of_distances
from ..losses._mixtures import mixed_around, mixed_with_anchor
from ..losses._one_pass import Part, by_autograd, sum_of_pairs, sum_of_rows
from ..losses._sweep import Sweep
from ..ops import Pairs, merge_lse, similarity_topk


def fedsa_margin(anchors: Tensor) -> Tensor:
    """FedSA's margin: how far anchors are from the nearest other one, on average; no gradient.

    Equivalent to::

        (torch.cdist(anchors, anchors) + torch.inf * torch.eye(C)).amin(1).mean()       # inf * 0 is 0 here

    Args:
        anchors: (C, D), or the means of the classes of a client; the larger of both is taken.

    Source:
        Sun et al., FedSA, 2025 (S002); released code. Another reading of the paper averages over all pairs.
    """
    anchors = anchors.detach()
    near = similarity_topk(anchors, anchors, 1, metric="sqeuclidean", pairs=Pairs(diagonal=0))
    return near.values.neg().clamp_min(0).sqrt().mean()


def fedsa(x: Tensor, labels: Tensor, anchors: Tensor, margin: float | Tensor) -> Tensor:
    """FedSA: rows move to their class's anchor, which must be nearer than the others by a margin.

    Equivalent to::

        d = (x[:, None] - anchors).norm(dim=2)
        F.mse_loss(x, anchors[labels]) + F.cross_entropy(-(d + margin * F.one_hot(labels, C)), labels)

    Args:
        x: (N, D) rows of a client.
        anchors: (C, D); they follow the means of classes, not gradients.
        margin: see `fedsa_margin`.
        labels: (N,) int64 in [0, C).

    Source:
        Sun et al., FedSA, 2025 (S002); released code. The classifier's cross-entropy on anchors is
        ``linear_cross_entropy(anchors, head, torch.arange(C), bias=bias)``.
    """
    rows, depth = x.shape
    return softmax_of_distances("fedsa", wide(x), wide(anchors), labels, margin, None, 1 / max(depth, 1)) / rows


def cosine_contrastive(x: Tensor, labels: Tensor, partner: Tensor | None = None, *, margin: float = 1.0) -> Tensor:
    """COSINE's regulariser: rows of one pseudo-label attract, others keep a distance.

    Equivalent to::

        d = (x[:, None] - x).square().sum(2) / D
        torch.where(labels[:, None] == labels, d**2, (margin - d).relu() ** 2).sum()
        d = ((x - x[partner]).square().sum(1) / D).sqrt()                                   # partner: as released
        torch.where(labels == labels[partner], d**2, (margin - d).relu() ** 2).sum() / (2 * N)

    Args:
        x: (N, D) rows whose pseudo-label is confident.
        labels: (N,) int64 pseudo-labels.
        partner: (N,) a random permutation, for the released code's loss of one pair a row; None for all pairs.
        margin: of the hinge.

    Source:
        Yu et al., Fine-Tuning Pre-trained Language Model with Weak Supervision, 2021 (S010).
    """
    depth = x.shape[1]
    if partner is not None:
        x, same = x / depth**0.5, (labels == labels[partner]).to(torch.float32)
        return contrastive(x, x[partner], same, margin=margin, distance="euclidean")

    def hinges(distance: Tensor, rows: slice, columns: slice, needs: bool) -> Part:
        same = labels[rows, None] == labels[columns]
        open_ = torch.where(same, distance, (distance - margin).clamp_max_(0.0))
        return Part(open_.square().sum(1), open_.mul_(2) if needs else None)

    return sum_of_pairs("cosine_contrastive", hinges, wide(x) / depth**0.5)


def supremix(
    x: Tensor, labels: Tensor, shares: Tensor, *, window: float = math.inf, temperature: float = 0.3
) -> Tensor:
    """SupReMix: supervised contrastive regression, with mixtures of rows as negatives and as positives.

    Equivalent to::

        for i in range(N):
            s, constant = u[i] @ u.T / temperature, u[i] @ u.detach().T / temperature           # unit rows
            real = [s[j] + log(abs(y[i] - y[j]) + 1) for j != i]
            mixed = [c * constant[i] + (1 - c) * constant[j] + log((1 - c) * abs(y[i] - y[j]) + 1)
                     for j if y[j] != y[i]]                                                     # c = shares[i, j]
            of_two = [a * constant[j] + (1 - a) * constant[k] for y[j] < y[i] < y[k]]
                                                                                # a y[j] + (1 - a) y[k] = y[i]
            positives = [s[j] for j != i if y[j] == y[i]] + of_two
            loss[i] = logsumexp(real + mixed + of_two) - mean(positives)

    Args:
        x: (N, D) views of all samples.
        labels: (N,) real numbers.
        shares: (N, N) of the anchor in each mixed negative: draws of Beta(2, 8).
        window: how far labels of a mixed positive may be from the anchor's; 5 in the released script.
        temperature: divides the cosines.

    Returns:
        0-d; NaN where no row has a positive, a row of its label or two rows on both sides of it.

    Source:
        Wu et al., Mixup Your Own Pairs, 2023 (S093). The released code shifts real and mixed logits by maxima of their
        own; this is the formula. Memory of a chunk: N^2 for each of its rows.
    """
    u, size, y = wide(x, True), x.shape[0], labels.to(torch.promote_types(x.dtype, torch.float32))
    counts = torch.zeros_like(y, dtype=torch.int64)

    def losses(dots: Tensor, rows: slice) -> Tensor:
        logits, constant = (dots / temperature).split(size, 1)
        gap, itself = y[rows, None] - y, torch.eye(size, dtype=torch.bool, device=y.device)[rows]
        same = (gap == 0) & ~itself
        real = (logits + gap.abs().log1p()).masked_fill(itself, -torch.inf)
        mixed = mixed_with_anchor(constant[itself], constant, shares[rows], gap)
        lse, total, count = mixed_around(constant, gap, window)
        counts[rows] = count + same.sum(1)
        every = merge_lse(real.logsumexp(1), mixed.logsumexp(1), lse)
        return torch.where(counts[rows] > 0, every - (total + (logits * same).sum(1)) / counts[rows].clamp_min(1), 0.0)

    chunk, sides = max(1, (1 << 20) // max(size, 1) ** 2), (u, torch.cat([u, u.detach()]))
    return sum_of_rows("supremix", by_autograd(losses), *sides, chunk_rows=chunk) / (counts > 0).sum()


def unisrec(sequence: Tensor, item: Tensor, items: Tensor, *, temperature: float = 0.07) -> Tensor:
    """UniSRec's pre-training: sequences must find their next item; the same item of another row has logit 0.

    Equivalent to::

        s = F.normalize(sequence) @ F.normalize(item).T / temperature
        same = (items[:, None] == items) & ~torch.eye(N, dtype=torch.bool)
        F.cross_entropy(s.masked_fill(same, 0.0), torch.arange(N))                  # 0, not -inf

    Args:
        sequence: (N, D); an item may be another view of the sequence.
        item: as `sequence`.
        items: (N,) int64, the next item's id.
        temperature: divides the cosines.

    Source:
        Hou et al., UniSRec, 2022, in the released code of BLaIR, 2024 (S118).
    """
    return info_nce(sequence, item, pairs=Pairs(differ=(items, items), fill=0.0), temperature=temperature)


def mclrec_regularizer(x: Tensor, y: Tensor) -> Tensor:
    """MCLRec's regulariser: hinges of positives over the hardest negative, and of all negatives below both.

    Equivalent to::

        z = torch.cat([x, y])                                       # raw inner products of 2 N rows
        p, n = positives (2N,), negatives (2N, 2N - 2)
        hardest = n.amax(1)
        (p - hardest).relu().mean() + (torch.maximum(p, hardest)[:, None] - n).relu().mean()

    Args:
        x: (N, D) two views of the sequences.
        y: as `x`.

    Source:
        Qin et al., Meta-optimized Contrastive Learning for Sequential Recommendation, 2023 (S058); released code,
        margins of rows. No hinge of the second kind is ever closed, so row sums are enough.
    """
    z, size = torch.cat([x, y]), x.shape[0]
    partner = torch.arange(2 * size, device=z.device).roll(size)
    sweep = Sweep(("mclrec_regularizer", "x", "y"), 1.0, Pairs(diagonal=0))
    found = sweep.fold(z, None, "max", "sum", target=partner)
    (hardest, total), own = found.rows, found.target
    highest = torch.maximum(own, hardest).mean()
    return (own - hardest).relu().mean() + highest - ordered_sum(total) / (2 * size * (2 * size - 2))


def evidence_bce(entailment: Tensor, relevance: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of a hypothesis whose probability is that of its evidence, weighted by relevance.

    Equivalent to::

        c, r = entailment.sigmoid(), relevance.sigmoid().masked_fill(~mask, 0.0)
        F.binary_cross_entropy((c * r).sum(1) / r.sum(1), labels)

    Args:
        entailment: (N, K) logits of each piece of evidence for its hypothesis.
        relevance: (N, K) logits of how much it counts.
        labels: (N,) in [0, 1]; differentiable.
        mask: (N, K) bool, False where there is no evidence. A hypothesis without any has loss 0 and no part in the
            mean.

    Source:
        Baudis et al., Joint Learning of Sentence Embeddings for Relevance and Entailment, 2016 (S087); released code,
        which adds 1e-6 to the probability. Here logarithms are not made of rounded probabilities.
    """
    has = torch.ones_like(relevance, dtype=torch.bool) if mask is None else mask
    counted = has.any(1)
    log_r = logsigmoid(relevance).masked_fill(~has & counted[:, None], -torch.inf)
    size = log_r.logsumexp(1)
    log_p, log_q = ((log_r + logsigmoid(each)).logsumexp(1) - size for each in (entailment, -entailment))
    losses = -(labels * log_p + (1 - labels) * log_q)
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum()


def curl(x: Tensor, positive: Tensor, negatives: Tensor, *, loss: str = "logistic") -> Tensor:
    """CURL's losses of k private negatives; raw inner products.

    Equivalent to::

        v = (x * positive).sum(1, keepdim=True) - torch.einsum("nd,nkd->nk", x, negatives)
        torch.log2(1 + (-v).exp().sum(1)).mean()                    # "logistic"
        (1 - v.amin(1)).relu().mean()                               # "hinge"

    Args:
        x: (N, D).
        positive: as `x`.
        negatives: (N, K, D). Blocks: give means of b positives and of b negatives.
        loss: "logistic" or "hinge".

    Source:
        Arora et al., A Theoretical Analysis of Contrastive Unsupervised Representation Learning, 2019 (S042).
    """
    checks.check_choice("curl", "loss", loss, ("logistic", "hinge"))
    if loss == "hinge":
        return triplet(x, positive, negatives, margin=1.0, distance="dot", hardest=True)
    given = info_nce(x, positive, row_negatives=negatives, in_batch=False, temperature=1.0, normalize=False)
    return given / math.log(2)
