"""What sigmoid losses share: labels, biases and the cross-entropy of labelled pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from ..ops.similarity_reduce import fold, needs_gradient, weighted_total
from . import _arguments
from ._columns import wide
from ._pair_list import pair_similarity


def one_grade(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    row_bias: Tensor,
    target: Tensor,
    grades: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    unit: bool,
    memory_budget: int | None,
    backend: str,
) -> Tensor:
    """One labelled column per row (label 1 where there are no grades), label 0 everywhere else."""
    if reduction != "none" and needs_gradient(x, y, scale, row_bias, weight, grades):
        row_weight = torch.ones_like(row_bias)
        if weight is not None:
            row_weight = _arguments.of_weighted(weight, weight).to(row_bias.dtype)
        total = weighted_total(
            x,
            y,
            kind="sum_softplus",
            scale=scale,
            row_bias=row_bias,
            target=target,
            weight=row_weight,
            # The total takes label 1; softplus(-t) + (1 - grade) t is the cross-entropy of another label.
            target_weight=None if grades is None else (1 - grades) * row_weight,
            unit=unit,
            names=names,
            backend=backend,
        )
        return total if reduction == "sum" else _arguments.divide(total, row_weight, weight)
    (negatives,), _, logit, *_ = fold(
        x,
        y,
        reduce=("sum_softplus",),
        scale=scale,
        row_bias=row_bias,
        target=target,
        unit=unit,
        memory_budget=memory_budget,
        names=names,
        backend=backend,
    )
    labelled = softplus(-logit) if grades is None else cross_entropy(logit, grades)
    return _arguments.reduce_rows(negatives + labelled, weight, reduction)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """softplus(l) - label * l without its cancellation."""
    return labels * softplus(-logits) + (1 - labels) * softplus(logits)


def pair_logits(
    function: str,
    x_name: str,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    cols: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    unit: bool,
) -> Tensor:
    """(P,) the logit of each listed pair, in the accumulation dtype."""
    factor = checks.scale_tensor(function, scale, x_name, x)
    with autocast.disabled(x):
        similarity = (
            pair_similarity(wide(x, True), wide(y, True), rows, cols) if unit else pair_similarity(x, y, rows, cols)
        )
        return similarity * (factor[rows] if factor.dim() else factor) + shared_bias(function, bias, x)


def shared_bias(function: str, bias: float | Tensor, x: Tensor) -> Tensor:
    """0-d: the bias of every pair, in the accumulation dtype."""
    return checks.one_number(function, "bias", bias, "x", x)


def checked_labels(function: str, name: str, labels: Tensor, size: int, x_name: str, x: Tensor) -> Tensor:
    """`labels` must be numbers in [0, 1]; return them in the accumulation dtype."""
    checks.check_vector(function, name, labels, size, x_name, x)
    if checks.may_read(labels):
        wrong = labels.detach()[~((labels >= 0) & (labels <= 1))]
        if wrong.numel():
            raise ValueError(f"{function}: {name} must be in [0, 1], got {float(wrong[0])}")
    return labels.to(checks.accumulator(x.dtype))


def check_once(function: str, rows: Tensor, cols: Tensor) -> None:
    """No column twice in one row's list; both are sorted."""
    if not checks.may_read(rows, waits=True):
        return
    twice = ((rows.diff() == 0) & (cols.diff() == 0)).nonzero()
    if len(twice):
        at = int(twice[0])
        raise ValueError(
            f"{function}: target must name each key at most once per query, got {int(cols[at])} twice in the list of "
            f"row {int(rows[at])}"
        )
