"""Means over negatives in which those that are close count more.

With importance weights exp(beta l), the weighted mean of exp(l) is a ratio of sums whose logarithm is
lse((1 + beta) l) - lse(beta l), both from one sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.folds import Fold


def hardness_folds(function: str, scale: float | Tensor, beta: float) -> tuple[str | Fold, ...]:
    """What `weighted_negatives` needs of the sweep."""
    if isinstance(scale, Tensor):
        checks.check_floating(function, "scale", scale)
    if not beta:
        return ("logsumexp",)
    return Fold("logsumexp", scale=(1 + beta) * scale), Fold("logsumexp", scale=beta * scale)


def weighted_negatives(lse: Sequence[Tensor], log_count: Tensor) -> Tensor:
    """The logarithm of the number of negatives times the weighted mean of exp(l); 0 where there are none."""
    empty = lse[0] == -torch.inf  # a difference of infinities would be NaN, in the gradient too
    high, *low = (each.masked_fill(empty, 0.0) for each in lse)
    return high + log_count - low[0] if low else high


def log_number(like: Tensor, count: int | Tensor) -> Tensor:
    """The logarithm of the number of negatives: one for all rows, or (N,)."""
    number = count.to(like.dtype) if isinstance(count, Tensor) else like.new_full((), count)
    return number.clamp_min(1.0).log()
