"""Negatives that count more where they are close: weighted means, and a detached bonus of their logits.

With importance weights exp(beta l), the weighted mean of exp(l) is a ratio of sums whose logarithm is
lse((1 + beta) l) - lse(beta l), both from one sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import checks
from ..core.folds import Fold


def checked_hardness(
    function: str,
    hardness: object,
    scale: float | Tensor,
    label_smoothing: object,
    col_bias: Tensor | None,
    both: bool = False,
) -> Hardness | None:
    """`hardness` must be a number >= 0; None for 0."""
    strength = checks.number(function, "hardness", hardness, "[0, inf)")
    if not strength:
        return None
    if label_smoothing is not None:
        raise ValueError(f"{function}: hardness must be 0 with label smoothing, got {strength}")
    if col_bias is not None and col_bias.requires_grad:
        raise ValueError(f"{function}: hardness must be 0 where col_bias requires a gradient, got {strength}")
    if both and isinstance(scale, Tensor) and scale.dim():
        raise ValueError(f"{function}: hardness must be 0 with a scale for each row, got {strength}")
    if isinstance(scale, Tensor):
        checks.check_floating(function, "scale", scale)
    return Hardness(strength, scale)


@dataclass(frozen=True, eq=False)
class Hardness:
    """A bonus of each negative's logit, strength times its similarity, that is not differentiated.

    Logits with it are those of a larger scale. The gradient of their fold by the similarities is larger / scale times
    the one that is meant, that by the scale is as it should be.

    Attributes:
        strength: >= 0.
        scale: of the loss.
    """

    strength: float
    scale: float | Tensor

    def share(self) -> float | Tensor:
        """Of the gradient that reaches the similarities; 0-d or (N,)."""
        if not isinstance(self.scale, Tensor):
            return self.scale / (self.scale + self.strength)
        scale = self.scale.detach()
        return (scale / (scale + self.strength)).clamp_min(torch.finfo(scale.dtype).tiny)

    def fold(self) -> Fold:
        """The logsumexp of the harder logits, for `of_rows`."""
        larger = self.scale + self.strength
        if isinstance(self.scale, Tensor):
            larger = larger.detach() + (self.scale - self.scale.detach()) / self.share()  # type: ignore[union-attr]
        return Fold("logsumexp", scale=larger)

    def of_rows(self, lse: Tensor) -> Tensor:
        """The folds with the gradient that is meant; -inf stays."""
        share = self.share()
        share = share.to(lse.dtype) if isinstance(share, Tensor) else share
        return lse * share + (lse * (1 - share)).detach()


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
