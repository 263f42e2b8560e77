"""Softmax losses with several positives in a row: SupCon, decoupled multi-positive InfoNCE, soft targets.

Positives come from labels or from lists of columns; neither needs an N x M mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.column_lists import check_lists, row_of_each
from ..core.folds import Fold
from ..core.numerics import softplus
from ..core.ordered import segment_sums
from ..core.rules import Pairs
from . import _arguments, _columns
from ._distances import LOGITS, as_products
from ._eager import LABELLED, eager_loss
from ._euclidean import check_plain, euclidean_sup_con
from ._labels import labelled, one_positive, other_labels
from ._sweep import Sweep

# How far from 1 the target weights of a row may sum up: room for 16-bit weights, none for scores that are no shares.
TARGET_TOLERANCE = 1e-2


# Of `sup_con`, by default.
TEMPERATURE = 0.1


def sup_con(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None = None,
    col_labels: Tensor | None = None,
    *,
    positives: str = "mean_log",
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    metric: str = "dot",
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """SupCon: every row must find all rows (or columns of y) that have its label.

    Equivalent to::

        x = F.normalize(x)
        logits = (x @ x.T / temperature).fill_diagonal_(-torch.inf)                 # y = None
        positive = ((labels[:, None] == labels) & (labels[:, None] != -1)).fill_diagonal_(False)
        log_p = logits.log_softmax(1)
        rows = -log_p.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)          # "mean_log"
        rows = positive.sum(1).log() - log_p.masked_fill(~positive, -torch.inf).logsumexp(1)       # "log_mean"
        rows[positive.any(1)].mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        labels: (N,) int64. -1 is no label: such a row is a negative of all others and has no loss of its own.
        y: (M, D), columns to compare with; None compares the rows of x with each other, at half the work.
        col_labels: (M,) int64, the labels of y; given together with it.
        positives: how the positives of a row are averaged: "mean_log" is the mean of their log-probabilities (the
            paper's L_out), "log_mean" the logarithm of their mean probability (L_in).
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead; not both.
        pairs: which pairs of different label are negatives: bounds on the similarity, a guide, ... Pairs of one label
            are positives whatever it says; labels take the place of ``differ``, and ``fill`` is refused.
        col_bias: (M,), or (N,) without y, added to the logits of each column, positives included; differentiable.
        metric: "dot": inner products, cosines where rows are normalised. "sqeuclidean": minus the squared distances, of
            the normalised rows unless ``normalize=False``, in the dtype of sums; bounds of ``pairs`` are of that.
            "euclidean": minus the distances, of which a mean or a sum with a constant ``weight``, and without rules and
            bias, is formed in 6 N M D operations; differentiable once.
        weight: (N,) weight of each row; the mean divides by its sum over the rows that count. Differentiable.
            0 leaves it out.
        reduction: "mean" (over rows with a positive), "sum" or "none".
        normalize: scale all rows to length 1 first; O((N + M) D).
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative. A row without
        a positive has loss 0 and gradient 0 and is left out of the mean, which is 0 where no row has one.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D) beside ``memory_budget``: one sweep with three folds. The factor
        temperature / base_temperature of the authors' code is left to the caller.

    Source:
        Khosla et al., Supervised Contrastive Learning, 2020, equations 2 and 3.

    Examples:
        >>> x, labels = torch.randn(6, 8), torch.tensor([0, 1, 0, 1, 2, -1])
        >>> (sup_con(x, labels, reduction="none") > 0).tolist()
        [True, True, True, True, False, False]
    """
    name = "sup_con"
    checks.check_choice(name, "positives", positives, ("mean_log", "log_mean"))
    if (
        pairs is None
        and col_bias is None
        and metric == "dot"
        and (
            loss := eager_loss(
                positives,
                LABELLED,
                x,
                y,
                temperature=temperature,
                scale=scale,
                default_temperature=TEMPERATURE,
                labels=labels,
                col_labels=col_labels,
                weight=weight,
                reduction=reduction,
                normalize=normalize,
                memory_budget=memory_budget,
                backend=backend,
            )
        )
        is not None
    ):
        return loss
    checks.check_choice(name, "metric", metric, LOGITS)
    if metric == "euclidean":
        check_plain(name, reduction, pairs=pairs, col_bias=col_bias)
    x, y, scale, of_others, of_same = labelled(
        name, x, labels, y, col_labels, temperature, scale, TEMPERATURE, reduction, weight, normalize
    )
    of_others = other_labels(name, pairs, of_others, y is None)
    target, positive_count = one_positive(labels, col_labels)
    unit = _arguments.in_sweep(normalize, x)
    if metric == "euclidean":
        given: dict[str, Any] = {"positives": positives, "weight": weight, "reduction": reduction, "unit": unit}
        known = labels, labels if col_labels is None else col_labels
        return euclidean_sup_con(x, y, scale, known, positive_count, **given)
    if metric == "sqeuclidean":
        x, y = as_products([x], [x if y is None else y], unit)
        unit = False
    if target is None:  # no columns
        nothing = _columns.logit_sums(x, x[:0] if y is None else y, scale, unit=unit)
        return _arguments.mean_over(nothing, positive_count > 0, weight, reduction)
    sweep = Sweep((name, "x", "y"), scale, of_others, col_bias, unit, memory_budget, backend)
    given = {"target": target, "positives": of_same, "weight": weight, "count": positive_count}
    return sweep.loss(positives, x, y, reduction=reduction, **given)


def multi_positive_info_nce(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None = None,
    col_labels: Tensor | None = None,
    *,
    mean_over: str = "rows",
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE for each positive by itself: its denominator is that positive and the row's negatives.

    Equivalent to::

        x = F.normalize(x)
        logits = x @ x.T / temperature                                              # y = None
        same = (labels[:, None] == labels) & (labels[:, None] != -1)
        positive = same & ~torch.eye(N, dtype=torch.bool)
        lse = logits.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)       # over the negatives
        each = torch.logaddexp(logits, lse) - logits                                # the loss of each positive
        rows = each.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)
        rows[positive.any(1)].mean()                                                # mean_over="rows"
        each[positive].mean()                                                       # mean_over="pairs"

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        labels: (N,) int64. -1 is no label: such a row is a negative of all others and has no loss of its own.
        y: (M, D), columns to compare with; None compares the rows of x with each other, at half the work.
        col_labels: (M,) int64, the labels of y; given together with it.
        mean_over: what ``reduction="mean"`` averages: "rows" with a positive, or "pairs", all positive pairs, which
            counts rows with many positives more (pytorch-metric-learning's NTXentLoss).
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        pairs: which pairs of different label are negatives: bounds on the similarity, a guide, ... Pairs of one label
            are positives whatever it says; labels take the place of ``differ``, and ``fill`` is refused.
        col_bias: (M,), or (N,) without y, added to the logits of each column, positives included; differentiable.
        weight: (N,) weight of each row; the mean divides by its sum over rows or pairs. Differentiable.
            0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O((N + M) D).
        memory_budget: bytes of inner products kept for backward by each of two sweeps; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs): the mean over each row's
        positives. Never negative. A row without a positive has loss 0 and gradient 0 and is left out of the mean; a
        row with positives alone has loss 0 and counts.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D) beside ``memory_budget``. Two sweeps: the second needs the lse of the negatives. 16-bit
        inputs are swept in float32, because the two gradients cancel in part. The other positives of a row are not
        pushed away, as they are by `sup_con`.

    Source:
        Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, 2016, for one positive;
        pytorch-metric-learning, NTXentLoss, for several.

    Examples:
        >>> x, labels = torch.randn(6, 8), torch.tensor([0, 1, 0, 1, 2, -1])
        >>> (multi_positive_info_nce(x, labels, reduction="none") > 0).tolist()
        [True, True, True, True, False, False]
    """
    name = "multi_positive_info_nce"
    checks.check_choice(name, "mean_over", mean_over, ("rows", "pairs"))
    x, y, scale, of_others, of_same = labelled(
        name, x, labels, y, col_labels, temperature, scale, 0.07, reduction, weight, normalize
    )
    of_others = other_labels(name, pairs, of_others, y is None)
    sweep = Sweep((name, "x", "y"), scale, of_others, col_bias, False, memory_budget, backend)
    with autocast.disabled(x):
        # The gradients of the two sweeps largely cancel near convergence: they must meet before they are rounded.
        unit = _arguments.in_sweep(normalize, x)
        x, y = _columns.wide(x, unit), None if y is None else _columns.wide(y, unit)
        (others,), *_ = sweep.fold(x, y, "logsumexp")
        alone = others == -torch.inf  # no negatives: the loss is 0, and an infinite bias would be NaN times 0
        folds = (Fold("sum_softplus", negate=True, pairs=of_same), Fold("count", pairs=of_same))
        bias = -others.masked_fill(alone, 0.0)
        (total, count), *_ = sweep.fold(x, y, *folds, row_bias=bias)
    rows = torch.where(alone, 0.0, total / count.clamp_min(1.0))
    if mean_over == "pairs" and reduction == "mean":
        weight = count if weight is None else count * weight.to(count.dtype)
    return _arguments.mean_over(rows, count > 0, weight, reduction)


def soft_info_nce(
    query: Tensor,
    key: Tensor,
    targets: tuple[Tensor, Tensor, Tensor],
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy with soft targets: every query has a short list of keys and the share of each.

    Equivalent to::

        t = torch.sparse_csr_tensor(*targets, size=(N, M)).to_dense()
        t = (1 - label_smoothing) * t + label_smoothing / M
        F.cross_entropy(F.normalize(query) @ F.normalize(key).T / temperature, t, reduction=reduction)

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (M, D).
        targets: (indptr (N + 1,), indices, weights): query i belongs to the keys ``indices[indptr[i]:indptr[i + 1]]``
            with those weights, which are >= 0 and sum to 1 up to 0.01. Not differentiable. Those of a key that is
            listed twice add up. A query with an empty list has no loss.
        temperature: divides the cosines; float, 0-d or (N,) tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        pairs: which keys take part in the softmax of a query: ids, bounds on the similarity, a guide, ... Keys with a
            share must be among them; that of the largest share is, whatever it says.
        col_bias: (M,), added to the logits of each key; differentiable.
        label_smoothing: share of the target distribution that is spread evenly over all keys that take part: a float,
            or an (N,) tensor with a share of each query, differentiable.
        weight: (N,) weight of each row; the mean divides by its sum over the rows that count. Differentiable.
            0 leaves it out.
        reduction: "mean" (over queries with targets), "sum" or "none".
        normalize: scale all rows to length 1 first; O((N + M) D). False where they have it already, or lengths
            shall count.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Its minimum is the entropy of
        the targets.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D) and the lists, beside ``memory_budget``. The key of the largest weight leaves the sweep as
        the target of `info_nce` does, so that nearly one-hot targets are as exact as one key for each query.

    Source:
        Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016, for soft targets and
        smoothing; van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.

    Examples:
        >>> query, key = torch.randn(2, 8), torch.randn(4, 8)
        >>> shares = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]])
        >>> targets = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), torch.tensor([0.5, 0.5, 1.0])
        >>> loss = soft_info_nce(query, key, targets, temperature=1.0)
        >>> cosines = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(cosines, shares), atol=1e-5)
        True
    """
    name = "soft_info_nce"
    query, key, scale = _arguments.two_sides(
        name,
        (("query", query), ("key", key)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        anchors=1,
    )
    _columns.check_filters(name, pairs, col_bias, key.shape[0], "query", query)
    share = _columns.smoothing_share(name, _arguments.of_weighted(weight, label_smoothing), "query", query)
    if isinstance(targets, tuple) and len(targets) == 3:
        targets = _arguments.lists_of_weighted(weight, *targets)  # type: ignore[assignment]
    lists, row = _checked_targets(name, targets, query, key)
    counted, unit = lists[0].diff() > 0, _arguments.in_sweep(normalize, query)
    if key.shape[0] == 0:
        nothing = _columns.logit_sums(query, key, scale, unit=unit) * (1.0 if share is None else share)
        return _arguments.mean_over(nothing, counted, weight, reduction)
    target = _largest(lists, row, key)
    # The target's own share stays out of the lists: its gradient would be the difference of two numbers near 1.
    of_others = lists[2].masked_fill(lists[1] == target[row], 0.0)
    sweep = Sweep((name, "query", "key"), scale, pairs, col_bias, unit, memory_budget, backend)
    folds = _columns.smoothing_folds(share, pairs)
    folded = sweep.fold(query, key, "logsumexp", *folds, target=target, linear=(*lists[:2], of_others))
    (others, *more), _, first, listed, *_ = folded
    total, rest = (segment_sums(each, row, query.shape[0]) for each in (lists[2], of_others))
    # total * lse - all that is listed, with the largest logit taken out of both: that difference would cancel.
    losses = total * softplus(others - first) + (rest * first - listed)
    if share is not None:
        sum_of_all, number = _columns.sum_and_count(query, key, scale, first, more, unit=unit, col_bias=col_bias)
        mean_logit = sum_of_all / number
        losses = losses + share * (listed + (total - rest) * first - total * mean_logit)
    return _arguments.mean_over(losses, counted, weight, reduction)


# ---- Positives from lists ------------------------------------------------------------------------------------------


def _checked_targets(
    function: str, targets: object, query: Tensor, key: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return the lists, with weights in the accumulation dtype, and the row of each entry."""
    if not isinstance(targets, tuple) or len(targets) != 3:
        got = f"{len(targets)} elements" if isinstance(targets, tuple) else type(targets).__name__
        raise TypeError(f"{function}: targets must be a tuple (indptr, indices, weights), got {got}")
    indptr, indices, order = check_lists(function, "targets", targets, query, key)
    checks.check_vector(function, "targets weights", targets[2], indices.shape[0], "query", query)
    checks.check_constant(function, "targets weights", targets[2])
    weights = targets[2].detach().to(checks.accumulator(query.dtype))[order]
    row = row_of_each(indptr, indices)
    if not checks.may_read(weights, waits=True):
        return (indptr, indices, weights), row
    if bool((weights < 0).any()):
        raise ValueError(f"{function}: targets weights must not be negative, got {float(weights.min())}")
    total = segment_sums(weights, row, query.shape[0])
    wrong = ((indptr.diff() > 0) & ~((total - 1).abs() <= TARGET_TOLERANCE)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{function}: targets weights of each row must sum to 1, got {float(total[at]):.6g} in row {at}\n"
            "  divide each row's weights by their sum"
        )
    return (indptr, indices, weights), row


def _largest(lists: tuple[Tensor, Tensor, Tensor], row: Tensor, key: Tensor) -> Tensor:
    """(N,) the first key of the largest weight in each list; key 0 for an empty list, whose row does not count."""
    indptr, indices, weights = lists
    rows = indptr.shape[0] - 1
    largest = weights.new_zeros((rows,)).scatter_reduce(0, row, weights, "amax")
    candidate = torch.where(weights == largest[row], indices, key.shape[0])
    first = indices.new_full((rows,), key.shape[0]).scatter_reduce(0, row, candidate, "amin")
    return torch.where(first == key.shape[0], 0, first)
