"""The loss of each row from its folds, and the slopes of that: every kind of `similarity_loss`, once.

Folds are over the columns that take part without the target's, whose logit t stands beside them:

    softmax       softplus(lse - t), lse over the other columns and, where there is one, `extra`
    softmax_both  the mean of that for the rows and the columns of one matrix, whose diagonal has the targets
    sigmoid       sum of softplus + softplus(-t)
    mean_log      softplus(others - all positives) + (all positives - mean logit of the positives)
    log_mean      softplus(others - all positives) + log(number of positives)

In the last two t is one positive of the row, the second set holds the other positives, and all positives together are
t + softplus(rest - t). No term is ever negative. csrc/row_losses.h has the same formulas and the same numbers of kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.masks import left_out, times
from ..core.numerics import merge_lse, probability, softplus
from ..core.ordered import ordered_sum
from ..core.problem import Layout, SetFold

# The folds of each kind; the position of a kind is its number in csrc/row_losses.h.
FOLDS = {
    "softmax": (SetFold(0, "logsumexp", False),),
    "softmax_both": (SetFold(0, "logsumexp", False), SetFold(0, "logsumexp", True)),
    "sigmoid": (SetFold(0, "sum_softplus", False),),
    "mean_log": (SetFold(0, "logsumexp", False), SetFold(1, "logsumexp", False), SetFold(1, "sum", False)),
    "log_mean": (SetFold(0, "logsumexp", False), SetFold(1, "logsumexp", False)),
}
KINDS = tuple(FOLDS)
# Those whose rows are complete before the next ones begin, so that gradients can be formed in the same pass.
ONE_DIRECTION = ("softmax", "sigmoid")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Terms:
    """What a row's loss has beside its folds; each is (N,) or None.

    Attributes:
        weight: of the loss; the mean divides by their sum. A row of weight 0 is left out.
        extra: lse of logits that the sweep does not see, for "softmax".
        target_weight: of the target's logit, which is added, for label smoothing and graded labels.
        count: how many positives a row has; one without any is left out.
    """

    weight: Tensor | None = None
    extra: Tensor | None = None
    target_weight: Tensor | None = None
    count: Tensor | None = None

    def counted(self) -> Tensor | None:
        """Which rows are not left out; None for all."""
        if self.count is None:
            return None if self.weight is None else self.weight != 0
        return self.count > 0 if self.weight is None else (self.count > 0) & (self.weight != 0)


class Slopes(NamedTuple):
    """The derivatives of each row's loss by its folds, by its target's logit, and by `extra` where there is one."""

    folds: tuple[Tensor, ...]
    target: Tensor
    extra: Tensor | None = None


def row_losses(kind: str, folds: Sequence[Tensor], target: Tensor, terms: Terms) -> Tensor:
    """The loss of each row, 0 for one without a positive; differentiable."""
    if kind == "softmax":
        return softplus(_all_others(folds[0], terms.extra) - target)
    if kind == "softmax_both":
        rows, cols = softplus(torch.stack(tuple(folds)) - target)
        return (rows + cols) / 2
    if kind == "sigmoid":
        return folds[0] + softplus(-target)
    spread, count = softplus(folds[1] - target), _number(terms, target)
    inner = spread - (folds[2] - (count - 1) * target) / count if kind == "mean_log" else count.log()
    return _where_positive(softplus(folds[0] - target - spread) + inner, terms)


def row_slopes(kind: str, folds: Sequence[Tensor], target: Tensor, terms: Terms) -> Slopes:
    """The derivatives of `row_losses`."""
    if kind == "softmax":
        return _softmax_slopes(folds[0], target, terms.extra)
    if kind == "softmax_both":
        rows, cols = (torch.stack(tuple(folds)) - target).sigmoid() / 2
        return Slopes((rows, cols), -(rows + cols))
    if kind == "sigmoid":
        return Slopes((torch.ones_like(target),), -(-target).sigmoid())
    spread, count = softplus(folds[1] - target), _number(terms, target)
    outer, share = (folds[0] - target - spread).sigmoid(), (folds[1] - target).sigmoid()
    if kind == "mean_log":
        slopes = [outer, share * (1 - outer), -1 / count, (count - 1) / count - share - outer * (1 - share)]
    else:
        slopes = [outer, -outer * share, -outer * (1 - share)]
    *by_folds, by_target = (_where_positive(each, terms) for each in slopes)
    return Slopes(tuple(by_folds), by_target)


def kind_of(layout: Layout) -> str:
    """The kind of one direction whose fold a layout has."""
    return next(kind for kind in ONE_DIRECTION if FOLDS[kind][0].kind == layout.folds[0].kind)


def weighted_slopes(
    kind: str, fold: Tensor, target: Tensor, weight: Tensor, extra: Tensor | None, target_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of weight * loss + target_weight * target by fold, target and extra (empty without one)."""
    slopes = row_slopes(kind, (fold,), target, Terms(extra=extra))
    by_target = weight * slopes.target
    by_extra = fold.new_empty((0,)) if slopes.extra is None else weight * slopes.extra
    return weight * slopes.folds[0], by_target if target_weight is None else by_target + target_weight, by_extra


def _softmax_slopes(fold: Tensor, target: Tensor, extra: Tensor | None) -> Slopes:
    everything = _all_others(fold, extra)
    slope = (everything - target).sigmoid()
    if extra is None:
        return Slopes((slope,), -slope)
    return Slopes((slope * probability(fold, everything),), -slope, slope * probability(extra, everything))


def _all_others(fold: Tensor, extra: Tensor | None) -> Tensor:
    return fold if extra is None else merge_lse(fold, extra)


def _number(terms: Terms, like: Tensor) -> Tensor:
    """How many positives each row has, at least 1."""
    return torch.ones_like(like) if terms.count is None else terms.count.to(like.dtype).clamp_min(1.0)


def _where_positive(values: Tensor, terms: Terms) -> Tensor:
    return values if terms.count is None else torch.where(terms.count > 0, values, 0.0)


# ---- From rows to one number -----------------------------------------------------------------------------------------


def reduced(losses: Tensor, target: Tensor, terms: Terms, reduction: str) -> Tensor:
    """The weighted losses of the rows, their sum or their mean; differentiable."""
    weighted = losses if terms.weight is None else times(terms.weight, losses)
    if terms.target_weight is not None:
        weighted = weighted + terms.target_weight * target
    return weighted if reduction == "none" else ordered_sum(weighted) / divisor(terms, reduction, losses)


def divisor(terms: Terms, reduction: str, losses: Tensor) -> Tensor | float:
    """What a mean divides by: the number of rows, or the sum of the weights of those that count; anything else by 1.

    A mean of no rows is NaN, and one of which no row counts is 0.
    """
    if reduction != "mean":
        return 1.0
    counted = terms.counted()
    if counted is None:
        return losses.shape[0] if losses.shape[0] > 0 else torch.nan
    size = ordered_sum(counted.to(losses.dtype) if terms.weight is None else left_out(terms.weight, counted))
    return torch.where(size == 0, 1.0, size)


def row_weights(terms: Terms, size: Tensor | float, losses: Tensor) -> Tensor:
    """What the loss of each row is multiplied by in the result."""
    return (torch.ones_like(losses) if terms.weight is None else terms.weight) / size


def term_slopes(
    losses: Tensor, target: Tensor, loss: Tensor, terms: Terms, reduction: str, size: Tensor | float
) -> list[Tensor]:
    """The derivatives of the result by `weight` and `target_weight`, where they are given."""
    found = []
    if terms.weight is not None:
        beyond = losses - loss if reduction == "mean" else losses
        found.append(torch.where(terms.counted(), beyond, 0.0) / size)  # type: ignore[arg-type]
    if terms.target_weight is not None:
        found.append(target / size)
    return found
