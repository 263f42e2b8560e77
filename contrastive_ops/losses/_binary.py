"""What sigmoid losses share: labels, biases and the cross-entropy of labelled pairs."""

from __future__ import annotations

from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from . import _arguments
from ._columns import wide
from ._pair_list import pair_similarity
from ._sweep import Sweep


def one_grade(
    sweep: Sweep,
    x: Tensor,
    y: Tensor,
    row_bias: Tensor,
    target: Tensor | None,
    grades: Tensor | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """One labelled column per row (label 1 where there are no grades), label 0 everywhere else."""
    spread = None
    if grades is not None:  # the operator takes label 1; softplus(-t) + (1 - grade) t is that of another label
        spread = 1 - grades if weight is None else (1 - grades) * _arguments.of_weighted(weight, weight)
    return sweep.loss(
        "sigmoid", x, y, row_bias=row_bias, target=target, weight=weight, target_weight=spread, reduction=reduction
    )


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
        if wrong.numel() > 0:
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
