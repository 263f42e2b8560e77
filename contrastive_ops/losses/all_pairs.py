"""Losses on the distances of all pairs of a labelled batch: contrastive (Hadsell) and lifted structure.

Roots of distances are no fold, so rows are streamed: 8 N^2 D operations, and never a matrix of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.ordered import ordered_sum
from ..reference.stream import stream_rows
from ._columns import wide
from ._labels import labelled

MEANS = ("nonzero", "pairs")


def batch_contrastive(
    x: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    squared: bool = False,
    mean_over: str = "nonzero",
    normalize: bool = True,
) -> Tensor:
    """Contrastive loss of all pairs of a batch: pull those of one label together, push the others to a margin.

    Equivalent to::

        d = torch.cdist(F.normalize(x), F.normalize(x))
        same, others = labels[:, None] == labels, ~torch.eye(N, dtype=torch.bool)
        near, far = (d - positive_margin).relu()[same & others], (negative_margin - d).relu()[~same]
        near, far = near ** 2 / 2, far ** 2 / 2                             # squared
        near[near > 0].mean() + far[far > 0].mean()                         # "pairs": near.mean() + far.mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        labels: (N,) int64. -1 is no label: such a row is a negative of all others.
        positive_margin: the distance below which positives are not pulled, >= 0.
        negative_margin: the distance that negatives are pushed to, >= 0.
        squared: half the squared hinges, as in the paper; False: hinges, as pytorch-metric-learning has them.
        mean_over: "nonzero" hinges, or all "pairs"; of positives and of negatives apart.
        normalize: scale all rows to length 1 first; False where lengths shall count.

    Returns:
        0-d, in float32 (float64 for float64 inputs). Never negative; 0 where there is no pair. Rows that are alike up
        to rounding have no direction to move in: their gradient is 0.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D) and one chunk of rows. Distances are made of inner products: those below 3e-4 in float32 are
        rounding.

    Source:
        Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping, 2006; equal to ``ContrastiveLoss`` of
        pytorch-metric-learning. Of given pairs: `contrastive`.

    Examples:
        >>> x, labels = torch.randn(6, 8), torch.tensor([0, 1, 0, 1, 2, -1])
        >>> bool(batch_contrastive(x, labels) >= 0)
        True
    """
    name = "batch_contrastive"
    low, high = (
        checks.number(name, argument, value, "[0, inf)")
        for argument, value in (("positive_margin", positive_margin), ("negative_margin", negative_margin))
    )
    checks.flag(name, "squared", squared)
    checks.check_choice(name, "mean_over", mean_over, MEANS)
    x, labels = _checked(name, x, labels, normalize)

    def hinges(distance: Tensor, same: Tensor, others: Tensor, rows: slice) -> tuple[Tensor, ...]:
        sides = ((distance - low).relu() * same, (high - distance).relu() * others)
        counted = [side > 0 for side in sides] if mean_over == "nonzero" else [same, others]
        sums = [(side.square() / 2 if squared else side).sum(1) for side in sides]
        return (*sums, *(each.sum(1) for each in counted))

    with autocast.disabled(x):
        near, far, pulled, pushed = _over_pairs(hinges, x, labels)
        return ordered_sum(near) / pulled.sum().clamp_min(1) + ordered_sum(far) / pushed.sum().clamp_min(1)


def lifted_structure(
    x: Tensor, labels: Tensor, *, margin: float = 1.0, positive_margin: float = 0.0, normalize: bool = True
) -> Tensor:
    """Lifted structure loss: each positive pair against all negatives of both of its rows.

    Equivalent to::

        d = torch.cdist(F.normalize(x), F.normalize(x))
        same, others = labels[:, None] == labels, ~torch.eye(N, dtype=torch.bool)
        lse = (margin - d).masked_fill(same, -torch.inf).logsumexp(1)
        hinges = (torch.logaddexp(lse[:, None], lse) + d - positive_margin).relu()
        hinges[same & others].square().mean() / 2

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        labels: (N,) int64. -1 is no label: such a row is a negative of all others.
        margin: subtracted from the distance of negatives before their logsumexp.
        positive_margin: subtracted from that of positives.
        normalize: scale all rows to length 1 first; False where lengths shall count.

    Returns:
        0-d, in float32 (float64 for float64 inputs). Never negative; 0 without positives or without negatives.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D) and one chunk of rows: two passes, one for the logsumexps and one for positive pairs.

    Source:
        Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, 2016; equal to
        ``LiftedStructureLoss`` of pytorch-metric-learning.

    Examples:
        >>> x, labels = torch.randn(6, 8), torch.tensor([0, 1, 0, 1, 2, -1])
        >>> bool(lifted_structure(x, labels) >= 0)
        True
    """
    name = "lifted_structure"
    margin, low = (
        checks.number(name, argument, value)
        for argument, value in (("margin", margin), ("positive_margin", positive_margin))
    )
    x, labels = _checked(name, x, labels, normalize)

    def pushed(distance: Tensor, same: Tensor, others: Tensor, rows: slice) -> Tensor:
        has = others.any(1)
        logits = (margin - distance).masked_fill(~others & has[:, None], -torch.inf)
        # Without negatives the hinge of no pair is open, and no slope is NaN.
        return torch.where(has, logits.logsumexp(1), torch.finfo(logits.dtype).min / 4)

    def hinges(distance: Tensor, same: Tensor, others: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        open_ = (torch.logaddexp(lse[rows, None], lse) + distance - low).relu() * same
        return open_.square().sum(1) / 2, same.sum(1)

    with autocast.disabled(x):
        lse = _over_pairs(pushed, x, labels)
        sums, counts = _over_pairs(hinges, x, labels)
        return ordered_sum(sums) / counts.sum().clamp_min(1)


def _checked(function: str, x: Tensor, labels: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The rows in the accumulation dtype, of length 1 if asked for, and their labels."""
    x, *_ = labelled(function, x, labels, None, None, None, 1.0, 1.0, "mean", None, normalize)
    return wide(x, normalize), checks.check_index(function, "labels", labels, x.shape[0], "x", x)


def _over_pairs(fn: Callable[[Tensor, Tensor, Tensor, slice], Any], x: Tensor, labels: Tensor) -> Any:
    """`fn` of the distances of a chunk's rows to all rows, and of which pairs are of one label and which of another."""
    lengths, floor = x.square().sum(1), torch.finfo(x.dtype).eps

    def chunk(dots: Tensor, rows: slice) -> Any:
        distance = (lengths[rows, None] + lengths - 2 * dots).clamp_min(floor).sqrt()
        others = torch.ones_like(dots, dtype=torch.bool)
        others[:, rows].fill_diagonal_(False)
        same = (labels[rows, None] == labels) & (labels != -1) & others
        return fn(distance, same, others & ~same, rows)

    return stream_rows(chunk, x)
