"""Leaving out what does not count: padding, ignored labels, rows of weight 0.

What is left out is replaced by 0 before anything is computed from it. Masking a result is not enough: its gradient is 0
times the derivative of what was computed, which is NaN where that was NaN or infinite, and reaches every parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor


def left_out(x: Tensor, keep: Tensor, otherwise: float = 0) -> Tensor:
    """`x` with 0 in place of what is not kept, whatever it holds; no gradient goes there.

    Args:
        x: any shape and dtype.
        keep: bool, of the first dimensions of `x`.
        otherwise: instead of 0.
    """
    return torch.where(keep.view(keep.shape + (1,) * (x.dim() - keep.dim())), x, x.new_full((), otherwise))


def times(weight: Tensor, x: Tensor) -> Tensor:
    """``weight * x`` where a weight of 0 gives 0 whatever `x` holds, value and gradients."""
    return weight * torch.where(weight != 0, x, 0)
