"""Softmaxes of minus Euclidean distances: roots are no folds, and gradients are formed while rows are summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from ..core.ordered import ordered_sum
from ..reference.similarity_loss import usual_target
from . import _arguments
from ._columns import checked_own_target, wide
from ._one_pass import Part, sum_of_distances
from ._sweep import Prepared


def check_plain(function: str, reduction: str, **others: Any) -> None:
    """What `others` has must be off, as its options are by default, and the reduction a number."""
    for option, value in others.items():
        if value is not OFF.get(option) and (isinstance(value, Tensor) or value != OFF.get(option)):
            raise NotImplementedError(
                f"{function}: {option} must be {OFF.get(option)!r} with metric='euclidean', got {checks.shown(value)}\n"
                "  metric='sqeuclidean' takes it"
            )
    if reduction == "none":
        raise NotImplementedError(f"{function}: reduction must be 'mean' or 'sum' with metric='euclidean', got 'none'")


def check_numbers(function: str, factor: float | Tensor, weight: Tensor | None) -> None:
    """The scale must be one number, and weights constants."""
    if isinstance(factor, Tensor) and factor.dim():
        raise NotImplementedError(f"{function}: scale must be one number with metric='euclidean', got one for each row")
    if weight is not None:
        checks.check_constant(function, "weight", weight)


def euclidean_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    *,
    target: Tensor | None,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    margin: float,
    weight: Tensor | None,
    reduction: str,
    normalize: bool,
    **others: Any,
) -> Tensor:
    """`info_nce` over minus distances."""
    name = "info_nce"
    check_plain(name, reduction, **others)
    query, key, factor = _arguments.two_sides(
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
    check_numbers(name, factor, weight)
    margin = checks.number(name, "margin", margin, "[0, inf)")
    if margin and isinstance(factor, Tensor):
        checks.check_constant(name, "scale of a margin", factor)
    target = checked_own_target(name, target, query, key)
    columns = [key]
    if negatives is not None:
        (negatives,) = autocast.cast(negatives)
        checks.check_matrices(name, "query", query, "negatives", negatives)
        columns += _arguments.unit_sides(normalize, negatives)
    unit = _arguments.in_sweep(normalize, query)
    x, y = wide(query, unit), torch.cat([wide(each, unit) for each in columns])
    if target is None:
        target = torch.arange(x.shape[0], device=x.device)
    total = softmax_of_distances(name, factor * x, factor * y, target, factor * margin, _used(weight, x))
    return total if reduction == "sum" else _arguments.divide(total, x[:, 0], weight)


def euclidean_softmax(problem: Prepared, both: bool = False) -> Tensor:
    """A prepared loss of cosines or inner products over minus distances instead, its other options being off.

    Args:
        problem: rows with their partners among the columns, or of one matrix among all others.
        both: columns are rows, too, and the mean of both counts.
    """
    name, factor, unit = problem.sweep.names[0], problem.sweep.scale, problem.sweep.unit
    weight, reduction = problem.options["weight"], problem.options["reduction"]
    check_numbers(name, factor, weight)
    x = factor * wide(problem.x, unit)
    y = x if problem.y is None else factor * wide(problem.y, unit)
    target, used = usual_target(x, problem.y), _used(weight, x)
    total = softmax_of_distances(name, x, y, target, 0.0, used, alone=problem.y is None)
    if both:
        total = (total + softmax_of_distances(name, y, x, target, 0.0, used)) / 2
    return total if reduction == "sum" else _arguments.divide(total, x[:, 0], weight)


def euclidean_sup_con(
    x: Tensor,
    y: Tensor | None,
    factor: float | Tensor,
    labels: tuple[Tensor, Tensor],
    count: Tensor,
    *,
    positives: str,
    weight: Tensor | None,
    reduction: str,
    unit: bool,
) -> Tensor:
    """`sup_con` over minus distances.

    Args:
        x: (N, D).
        y: (M, D), or None for x.
        factor: the scale.
        labels: of the rows and of the columns.
        count: (N,) positives of each row.
        positives: as in `sup_con`.
        weight: (N,) or None.
        reduction: "mean" or "sum".
        unit: as in `_columns.wide`.
    """
    name, alone = "sup_con", y is None
    check_numbers(name, factor, weight)
    x = factor * wide(x, unit)
    y = x if y is None else factor * wide(y, unit)
    used = (count > 0).to(x.dtype)
    used = used if weight is None else used * _arguments.of_weighted(weight, weight).to(x.dtype)

    def losses(squared: Tensor, rows: slice, _: slice, needs: bool) -> Part:
        distance, own = squared.sqrt_(), labels[0][rows, None]
        logits, same, number = -distance, (own == labels[1]) & (own != -1), count[rows, None].to(distance.dtype)
        if alone:
            logits[:, rows].fill_diagonal_(-torch.inf)
            same[:, rows].fill_diagonal_(False)
        log_p = logits.log_softmax(1)
        if positives == "mean_log":
            found = -log_p.masked_fill(~same, 0.0).sum(1, keepdim=True) / number
            shares = same / number
        else:
            inner = log_p.masked_fill(~same, -torch.inf)
            lse = inner.logsumexp(1, keepdim=True)
            found, shares = number.log() - lse, inner.sub_(lse).exp_()
        # Rows without positives are NaN.
        values = torch.where(number > 0, found, 0.0)[:, 0] * used[rows]
        if not needs:
            return Part(values, None)
        slopes = torch.where(number > 0, log_p.exp_().sub_(shares), 0.0).div_(distance.mul_(-2))
        return Part(values, slopes.masked_fill_(distance == 0, 0.0).mul_(used[rows, None]))

    total = sum_of_distances(name, losses, x, y)
    size = ordered_sum(used)
    return total if reduction == "sum" else total / torch.where(size == 0, 1.0, size)


def _used(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else _arguments.of_weighted(weight, weight).to(x.dtype)


# What options are that distances do not take, where they are off; else None.
OFF = {"in_batch": True, "label_smoothing": 0.0, "smooth": "all", "hardness": 0.0, "z_loss": 0.0, "diagnostics": False}


def softmax_of_distances(
    function: str,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    margin: float | Tensor,
    weight: Tensor | None,
    pull: float = 0.0,
    alone: bool = False,
) -> Tensor:
    """The weighted sum of the rows' cross-entropies over minus Euclidean distances; the own one is a margin farther.

    Args:
        function: the loss, for errors.
        x: (N, D), scaled.
        y: (M, D), scaled alike.
        target: (N,) int64 in [0, M).
        margin: scaled, too; a constant.
        weight: (N,), a constant, or None.
        pull: how often the squared distance from the own column is added.
        alone: columns are the rows, and no row is compared with itself.
    """
    margin = margin.detach() if isinstance(margin, Tensor) else margin

    def losses(squared: Tensor, rows: slice, _: slice, needs: bool) -> Part:
        distance, own = squared.sqrt_(), target[rows, None]
        logits = -distance
        if alone:
            logits[:, rows].fill_diagonal_(-torch.inf)
        nearness = logits.gather(1, own)
        positive = nearness - margin
        others = logits.scatter_(1, own, -torch.inf).logsumexp(1, keepdim=True)
        found = softplus(others - positive)
        values = (found + pull * nearness**2 if pull else found)[:, 0]
        values = values if weight is None else values * weight[rows]
        if not needs:
            return Part(values, None)
        every = positive + found
        slopes = logits.sub_(every).exp_().scatter_(1, own, -(others - positive).sigmoid())
        # Of rows that are alike no direction is known.
        slopes.div_(distance.mul_(-2)).masked_fill_(distance == 0, 0.0)
        if pull:
            slopes.scatter_add_(1, own, torch.full_like(nearness, pull))
        return Part(values, slopes if weight is None else slopes.mul_(weight[rows, None]))

    return sum_of_distances(function, losses, x, y)
