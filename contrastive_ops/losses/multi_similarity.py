"""Multi-similarity loss: soft maxima over each row's positives and over its negatives, at two scales."""

from __future__ import annotations

from torch import Tensor

from ..core import checks
from ..core.folds import Fold
from ..core.numerics import softplus
from ..core.rules import Pairs
from . import _arguments
from ._labels import labelled, other_labels
from ._sweep import Sweep


def multi_similarity(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None = None,
    col_labels: Tensor | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-similarity loss: pull positives below ``base`` and push negatives above it, the worst ones most.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(x).T                                       # y = None
        same = (labels[:, None] == labels) & (labels[:, None] != -1)
        positive, negative = same & ~torch.eye(N, dtype=torch.bool), ~same & ~torch.eye(N, dtype=torch.bool)
        pulled = ((-alpha * (s - base)).exp() * positive).sum(1).log1p() / alpha
        pushed = ((beta * (s - base)).exp() * negative).sum(1).log1p() / beta
        (pulled + pushed).mean()                                                    # in log space: nothing overflows

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        labels: (N,) int64. -1 is no label: such a row is a negative of all others and has no positives.
        y: (M, D), columns to compare with; None compares the rows of x with each other, at half the work.
        col_labels: (M,) int64, the labels of y; given together with it.
        alpha: sharpness of the positives, > 0.
        beta: sharpness of the negatives, > 0.
        base: the similarity that positives should exceed and negatives stay below.
        pairs: which pairs of different label are negatives: bounds on the similarity, a guide, ... Pairs of one label
            are positives whatever it says; labels take the place of ``differ``, and ``fill`` is refused.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none"; of all rows.
        normalize: scale all rows to length 1 first; O((N + M) D).
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D) beside ``memory_budget``: one sweep with two folds.

    Source:
        Wang et al., Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning, 2019, without its
        mining; equal to ``MultiSimilarityLoss`` of pytorch-metric-learning.

    Examples:
        >>> x, labels = torch.randn(6, 8), torch.tensor([0, 1, 0, 1, 2, -1])
        >>> multi_similarity(x, labels, reduction="none").shape
        torch.Size([6])
    """
    name = "multi_similarity"
    alpha, beta = checks.number(name, "alpha", alpha, "(0, inf)"), checks.number(name, "beta", beta, "(0, inf)")
    base = checks.number(name, "base", base, "(-inf, inf)")
    x, y, _, of_others, of_same = labelled(name, x, labels, y, col_labels, None, 1.0, 1.0, reduction, weight, normalize)
    of_others = other_labels(name, pairs, of_others, y is None)
    unit = _arguments.in_sweep(normalize, x)
    sweep = Sweep((name, "x", "y"), 1.0, unit=unit, memory_budget=memory_budget, backend=backend)
    pull = Fold("logsumexp", scale=alpha, pairs=of_same, negate=True)
    push = Fold("logsumexp", scale=beta, pairs=of_others)
    (positives, negatives), *_ = sweep.fold(x, y, pull, push)
    losses = softplus(positives + alpha * base) / alpha + softplus(negatives - beta * base) / beta
    return _arguments.reduce_rows(losses, weight, reduction)
