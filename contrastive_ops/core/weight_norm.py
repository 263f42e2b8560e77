"""Gradient weights in float16: what brings them into its range."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import Layout
from .rules import Slot


def weight_norm(
    layout: Layout,
    sizes: Sequence[int],
    itself: bool,
    scale: Tensor,
    d_folds: Tensor | None,
    d_target: Tensor | None,
    d_linear: Tensor | None,
) -> Tensor:
    """A power of two that brings the largest possible weight just below what float16 holds.

    Weights of a mean over a large batch would be subnormal, those of a sum at a high scale infinite.

    Args:
        layout: sets and folds.
        sizes: the number of results of each fold.
        itself: whether a matrix is compared with itself, so that a pair has two weights.
        scale: of all sets.
        d_folds: what arrives at all folds.
        d_target: what arrives at the targets' logits.
        d_linear: what arrives at the sums of lists.

    Returns:
        A 0-d tensor; 1 where the bound is 0 or no number.
    """
    bound = scale.new_zeros(())
    if d_folds is not None:
        parts = [part.abs().amax() for part in d_folds.split(list(sizes)) if part.numel() > 0]
        bound = torch.stack(parts).sum() if parts else bound
    if d_target is not None and d_target.numel() > 0:
        bound = bound + d_target.abs().amax()
    if d_linear is not None and d_linear.numel() > 0:
        data = layout.sets[0].data
        weight = data[Slot.LINEAR_WEIGHT].abs().amax() if data[Slot.LINEAR_WEIGHT].numel() > 0 else 0.0
        bound = bound + d_linear.abs().amax() * weight * data[Slot.LINEAR_INDPTR].diff().amax()
    if scale.numel() > 0:
        bound = bound * scale.detach().abs().amax() * (2.0 if itself else 1.0)
    return power_below(bound)


def power_below(bound: Tensor) -> Tensor:
    """A power of two that brings numbers up to `bound` just below what float16 holds; 1 for 0 and for no number."""
    exponent = (14.0 - bound.log2()).floor().clamp(-100.0, 100.0)
    return torch.where(bound.isfinite() & (bound > 0), exponent, 0.0).exp2()
