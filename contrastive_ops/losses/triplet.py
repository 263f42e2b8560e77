"""Losses on distances: triplets, mined triplets, contrastive pairs.

Triplets and pairs that are given cost O(N D). Mined ones are selected by one sweep without gradients (2 N M D), and the
distances of what was selected are computed again from the rows themselves, so that neither values nor gradients
(O(N D)) suffer from |x|^2 - 2 <x, y> + |y|^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from ..core.rules import Pairs
from . import _arguments
from ._columns import checked_row_negatives, wide
from ._distances import DISTANCES, Points, distance_between, farthest_and_nearest, points, semi_hard_negative

# What torch adds to each difference; it decides the gradient at distance 0.
TORCH_EPS = 1e-6


def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float | Tensor = 1.0,
    distance: str = "euclidean",
    hardest: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Triplet margin loss of given triplets: row k of each matrix belongs to row k of the others.

    Equivalent to::

        d = F.pairwise_distance         # "cosine": 1 - F.cosine_similarity; "sqeuclidean": ((a - b) ** 2).sum(1)
                                        # "dot": -(a * b).sum(1)
        F.relu(d(anchor, positive) - d(anchor, negative) + margin).mean()

    Args:
        anchor: (N, D) float32, bfloat16, float16 or float64.
        positive: (N, D).
        negative: (N, D), or (N, K, D) with K negatives of each triplet, whose hinges are summed.
        margin: by how much the negative must be farther than the positive; a number >= 0, or (N,) with one for each
            triplet, differentiable.
        distance: "euclidean", "sqeuclidean", "cosine" or "dot", minus the inner product.
        hardest: of K negatives take the one with the largest hinge alone.
        weight: (N,) weight >= 0 of each triplet; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). The mean of no triplets is NaN.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory and work O(N K D). The Euclidean distance adds 1e-6 to each difference, as torch does, so that its
        gradient at distance 0 is finite and that of `torch.nn.functional.triplet_margin_loss`.

    Source:
        Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, 2015.

    Examples:
        >>> anchor, positive, negative = torch.randn(3, 8, 16)
        >>> truth = torch.nn.functional.triplet_margin_loss(anchor, positive, negative)
        >>> torch.allclose(triplet(anchor, positive, negative), truth)
        True
    """
    name = "triplet"
    _arguments.check_reduction(name, reduction)
    checks.check_choice(name, "distance", distance, (*DISTANCES, "dot"))
    checks.flag(name, "hardest", hardest)
    anchor, positive, negative = autocast.cast(anchor, positive, negative)
    checks.check_matrices(name, "anchor", anchor, "positive", positive)
    _arguments.check_partners(name, "anchor", anchor, "positive", positive)
    negative = checked_row_negatives(name, anchor, negative, "anchor", "negative")
    if weight is not None:
        _arguments.check_weight(name, weight, anchor.shape[0], "anchor", anchor)
        given = (anchor, positive, negative, margin)
        anchor, positive, negative, margin = (_arguments.of_weighted(weight, each) for each in given)
    margin = _arguments.one_or_each(name, "margin", margin, "[0, inf)", "anchor", anchor)
    of_each = margin[:, None] if isinstance(margin, Tensor) else margin
    hinges = (_farther(anchor, positive, negative, distance) + of_each).relu()
    losses = hinges.amax(1) if hardest and hinges.shape[1] > 0 else hinges.sum(1)
    return _arguments.reduce_rows(losses, weight, reduction)


def _farther(anchor: Tensor, positive: Tensor, negative: Tensor, distance: str) -> Tensor:
    """(N, K) by how much the positive is farther than each negative (N, K, D)."""
    rows, each, _ = negative.shape
    if distance == "dot":
        with autocast.disabled(anchor):
            a, p, n = wide(anchor), wide(positive), wide(negative)
            return torch.einsum("nd,nkd->nk", a, n - p[:, None])
    # One copy of the anchors, so that their gradients are added before they are rounded.
    of_anchor = points(anchor, distance)
    near = distance_between(of_anchor, points(positive, distance), distance, TORCH_EPS)
    repeated = Points(*(None if part is None else _repeated(part, each) for part in of_anchor))  # type: ignore[arg-type]
    far = distance_between(repeated, points(negative.flatten(0, 1), distance), distance, TORCH_EPS)
    return near[:, None] - far.view(rows, each)


def _repeated(part: Tensor, times: int) -> Tensor:
    """Each entry several times, one after another; the gradient is summed in order."""
    return part[:, None].expand(-1, times, *part.shape[1:]).flatten(0, 1)


def batch_hard_triplet(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None = None,
    col_labels: Tensor | None = None,
    *,
    margin: float | None = None,
    soft: bool = False,
    distance: str = "euclidean",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Batch-hard triplet loss: each row with its farthest positive and its nearest negative.

    Equivalent to::

        d = torch.cdist(x, y)                                                           # (N, M)
        same = labels[:, None] == col_labels
        positive = same & ~torch.eye(N, dtype=torch.bool)                               # all of `same` where y is given
        farthest = d.masked_fill(~positive, -torch.inf).amax(1)
        nearest = d.masked_fill(same, torch.inf).amin(1)
        F.relu(farthest - nearest + margin)[positive.any(1) & ~same.all(1)].mean()      # soft: F.softplus(f - n)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        labels: (N,) int64. -1 equals nothing: such a row has no positive, and is a negative of all others.
        y: (M, D) columns to select from; None for x itself, where a row is not its own positive.
        col_labels: (M,) int64, with ``y`` alone.
        margin: by how much the nearest negative must be farther than the farthest positive; a number >= 0. None: 0.2.
        soft: softplus of the difference instead of a hinge; it has no margin.
        distance: "euclidean", "sqeuclidean" or "cosine".
        weight: (N,) weight >= 0 of each row; the mean divides by the sum over the rows that count. Differentiable.
            0 leaves it out.
        reduction: "mean", "sum" or "none".
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). A row without a positive or
        without a negative has loss 0 and gradient 0 and is left out of the mean; 0 where no row counts.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D). One sweep selects (2 N M D, half of it with y=None); gradients take O(N D). The gradient of
        the Euclidean distance at 0 is 0. Of equally far columns the first is taken.

    Source:
        Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, 2017. sentence-transformers'
        ``BatchHardTripletLoss`` and ``BatchHardSoftMarginTripletLoss`` are equal where every label occurs twice and two
        labels occur; they count rows without a positive, with a distance of 0.

    Examples:
        >>> x, labels = torch.randn(6, 16), torch.tensor([0, 0, 1, 1, 2, 3])
        >>> batch_hard_triplet(x, labels, margin=0.5, reduction="none")[4:]
        tensor([0., 0.])
    """
    name = "batch_hard_triplet"
    x, y, ids = _mined(name, x, labels, y, col_labels, distance, weight, reduction)
    if soft and margin is not None:
        raise ValueError(f"{name}: margin must be left out with soft=True, got {margin}")
    margin = 0.2 if margin is None else margin
    margin = checks.number(name, "margin", margin, "[0, inf)")
    positives = Pairs(same=ids, diagonal=0 if y is None else None)
    rows, columns = points(x, distance), None if y is None else points(y, distance)
    x, y = rows.rows, None if columns is None else columns.rows
    farthest, nearest = farthest_and_nearest((name, "x", "y"), x, y, distance, positives, Pairs(differ=ids), backend)
    gap = _distance_gap(rows, columns, farthest, nearest, distance)
    losses = softplus(gap) if soft else (gap + margin).relu()
    return _arguments.mean_over(losses, (farthest >= 0) & (nearest >= 0), weight, reduction)


def batch_semi_hard_triplet(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None = None,
    col_labels: Tensor | None = None,
    *,
    target: Tensor | None = None,
    margin: float = 0.2,
    distance: str = "euclidean",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Semi-hard triplet loss: each row with a given positive and the nearest negative that is farther than it.

    Equivalent to::

        d = torch.cdist(x, y)                                                           # (N, M)
        negative = labels[:, None] != col_labels
        positive = d.gather(1, target[:, None])
        outside = d.masked_fill(~(negative & (d > positive)), torch.inf).amin(1)
        inside = d.masked_fill(~negative, -torch.inf).amax(1)                           # where none is farther
        F.relu(positive[:, 0] - torch.where(outside < torch.inf, outside, inside) + margin).mean()

    One positive per row keeps the work at N M D. For every pair (row, positive), as in sentence-transformers, pass the
    rows repeated: ``batch_semi_hard_triplet(x[rows], labels[rows], x, labels, target=positives)``.

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        labels: (N,) int64. -1 equals nothing: all columns are its negatives.
        y: (M, D) columns to select from; None for x itself.
        col_labels: (M,) int64, with ``y`` alone.
        target: (N,) int64 in [-1, M), the column of each row's positive; -1 for none. None: column i, with ``y`` alone.
        margin: by how much the negative must be farther than the positive; a number >= 0. A negative farther than that
            costs nothing.
        distance: "euclidean", "sqeuclidean" or "cosine".
        weight: (N,) weight >= 0 of each row; the mean divides by the sum over the rows that count. Differentiable.
            0 leaves it out.
        reduction: "mean", "sum" or "none".
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). A row without a positive or
        without a negative has loss 0 and gradient 0 and is left out of the mean; 0 where no row counts.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D). One sweep selects (2 N M D); gradients take O(N D). A negative counts as farther where its
        distance is larger by more than rounding.

    Source:
        Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, 2015, with the fallback of
        TensorFlow's ``triplet_semihard_loss`` where no negative is farther than the positive.

    Examples:
        >>> x, y, labels = torch.randn(6, 16), torch.randn(6, 16), torch.arange(6)
        >>> batch_semi_hard_triplet(x, labels, y, labels, reduction="none").shape
        torch.Size([6])
    """
    name = "batch_semi_hard_triplet"
    x, y, ids = _mined(name, x, labels, y, col_labels, distance, weight, reduction)
    margin = checks.number(name, "margin", margin, "[0, inf)")
    columns = x if y is None else y
    if target is None:
        if y is None:
            raise ValueError(f"{name}: target must be given where y is not, got None")
        _arguments.check_partners(name, "x", x, "y", columns)
        target = torch.arange(x.shape[0], device=x.device)
    target = checks.check_index(name, "target", target, x.shape[0], "x", x)
    target = _arguments.of_weighted(weight, target, -1)
    checks.check_index_values(name, "target", target, columns.shape[0], or_none=True)
    chosen = semi_hard_negative((name, "x", "y"), x, y, distance, ids, target, backend)
    others = None if y is None else points(y, distance)
    gap = _distance_gap(points(x, distance), others, target, chosen, distance)
    return _arguments.mean_over((gap + margin).relu(), (target >= 0) & (chosen >= 0), weight, reduction)


def contrastive(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.5,
    distance: str = "cosine",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Contrastive loss of given pairs: pull what belongs together, push the rest to a margin.

    Equivalent to::

        d = 1 - F.cosine_similarity(x, y)                       # "euclidean": F.pairwise_distance(x, y)
        (0.5 * (labels * d ** 2 + (1 - labels) * F.relu(margin - d) ** 2)).mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (N, D); row k of both is a pair.
        labels: (N,) of any dtype: 1 where a pair belongs together, else 0.
        margin: the distance that other pairs are pushed to; a number >= 0.
        distance: "cosine" or "euclidean".
        weight: (N,) weight >= 0 of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). The mean of no pairs is NaN.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory and work O(N D). The Euclidean distance adds 1e-6 to each difference, as torch does.

    Source:
        Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping, 2006; equal to sentence-transformers'
        ``ContrastiveLoss``.

    Examples:
        >>> x, y = torch.randn(4, 16), torch.randn(4, 16)
        >>> loss = contrastive(x, y, torch.tensor([1, 0, 0, 1]))
        >>> bool(loss >= 0)
        True
    """
    name = "contrastive"
    _arguments.check_reduction(name, reduction)
    margin = checks.number(name, "margin", margin, "[0, inf)")
    checks.check_choice(name, "distance", distance, ("cosine", "euclidean"))
    x, y = autocast.cast(x, y)
    checks.check_matrices(name, "x", x, "y", y)
    _arguments.check_partners(name, "x", x, "y", y)
    if weight is not None:
        _arguments.check_weight(name, weight, x.shape[0], "x", x)
        x, y, labels = (_arguments.of_weighted(weight, each) for each in (x, y, labels))
    dtype = checks.accumulator(x.dtype)
    together = _zero_or_one(name, labels, x).to(dtype)
    d = distance_between(points(x, distance), points(y, distance), distance, TORCH_EPS)
    losses = (together * d.square() + (1 - together) * (margin - d).relu().square()) / 2
    return _arguments.reduce_rows(losses, weight, reduction)


def _mined(
    function: str,
    x: Tensor,
    labels: Tensor,
    y: Tensor | None,
    col_labels: Tensor | None,
    distance: str,
    weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Check what mined triplets take; return both matrices, cast, and the labels of rows and columns."""
    _arguments.check_reduction(function, reduction)
    checks.check_choice(function, "distance", distance, DISTANCES)
    x, y = autocast.cast(x, y)
    checks.check_matrix(function, "x", x)
    labels = checks.check_index(function, "labels", labels, x.shape[0], "x", x)
    if weight is not None:
        _arguments.check_weight(function, weight, x.shape[0], "x", x)
    if y is None:
        if col_labels is not None:
            raise ValueError(
                f"{function}: col_labels must be left out where y is, got a tensor\n  columns have `labels`"
            )
        return x, None, (labels, labels)
    checks.check_matrices(function, "x", x, "y", y)
    x = _arguments.of_weighted(weight, x)
    if col_labels is None:
        raise ValueError(f"{function}: col_labels must be given with y, got None")
    col_labels = checks.check_index(function, "col_labels", col_labels, y.shape[0], "x", x)
    return x, y, (labels, col_labels)


def _distance_gap(rows: Points, columns: Points | None, positive: Tensor, negative: Tensor, distance: str) -> Tensor:
    """(N,) distance of each row from the column `positive` less that from the column `negative`."""
    columns = rows if columns is None else columns
    near = distance_between(rows, columns.take(positive), distance)
    return near - distance_between(rows, columns.take(negative), distance)


def _zero_or_one(function: str, labels: object, x: Tensor) -> Tensor:
    labels = checks.check_tensor(function, "labels", labels)
    if tuple(labels.shape) != (x.shape[0],):
        raise ValueError(f"{function}: labels must have shape ({x.shape[0]},), got {checks.shape(labels)}")
    checks.check_device(function, "x", x, "labels", labels)
    if checks.may_read(labels, waits=True):
        wrong = labels[(labels != 0) & (labels != 1)]
        if wrong.numel() > 0:
            raise ValueError(f"{function}: labels must be 0 or 1, got {wrong[0].item()}")
    return labels
