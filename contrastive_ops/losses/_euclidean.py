"""Softmaxes of minus Euclidean distances: roots are no folds, and gradients are formed while rows are summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from . import _arguments
from ._columns import checked_own_target, wide
from ._one_pass import Part, sum_of_distances


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
    """`info_nce` over minus distances; what `others` has must be off, as its options are by default."""
    name = "info_nce"
    for option, value in others.items():
        if value is not OFF.get(option) and (isinstance(value, Tensor) or value != OFF.get(option)):
            raise NotImplementedError(
                f"{name}: {option} must be {OFF.get(option)!r} with metric='euclidean', got {checks.shown(value)}\n"
                "  metric='sqeuclidean' takes it"
            )
    if reduction == "none":
        raise NotImplementedError(f"{name}: reduction must be 'mean' or 'sum' with metric='euclidean', got 'none'")
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
    if isinstance(factor, Tensor) and factor.dim():
        raise NotImplementedError(f"{name}: scale must be one number with metric='euclidean', got one for each row")
    if weight is not None:
        checks.check_constant(name, "weight", weight)
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
    used = None if weight is None else _arguments.of_weighted(weight, weight).to(x.dtype)
    total = softmax_of_distances(name, factor * x, factor * y, target, factor * margin, used)
    return total if reduction == "sum" else _arguments.divide(total, x[:, 0], weight)


# What the options of `info_nce` are that this has not, where they are off.
OFF = {"in_batch": True, "label_smoothing": 0.0, "smooth": "all", "hardness": 0.0, "z_loss": 0.0, "diagnostics": False}


def softmax_of_distances(
    function: str,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    margin: float | Tensor,
    weight: Tensor | None,
    pull: float = 0.0,
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
    """
    margin = margin.detach() if isinstance(margin, Tensor) else margin

    def losses(squared: Tensor, rows: slice, _: slice, needs: bool) -> Part:
        distance, own = squared.sqrt_(), target[rows, None]
        logits = -distance
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
