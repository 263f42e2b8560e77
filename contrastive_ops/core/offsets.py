"""What all rows have in common, for whatever depends on their differences only.

A squared distance by way of inner products is a difference of numbers as large as the rows' distance from the origin;
less a common row they are as large as the rows' distances from one another.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are looked at.
_SAMPLE = 33


def common_row(x: Tensor) -> Tensor:
    """(D,) the median of some of the rows of (N, D), coordinate by coordinate: a constant.

    A median of a few rows is the same for one row far from all others, whatever that holds, and it consists of numbers
    that the rows have: differences of integers stay integers.
    """
    x = x.detach()
    if x.shape[0] == 0:
        return x.new_zeros(x.shape[1:])
    place = torch.arange(_SAMPLE, device=x.device) * x.shape[0] // _SAMPLE
    middle = x.index_select(0, place).sort(0).values[_SAMPLE // 2]
    return torch.where(torch.isfinite(middle), middle, 0.0)


def from_common_row(x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Rows of both sides less `common_row` of the first, in their dtype: that of differences, not of 16 bits."""
    origin = common_row(x)
    return x - origin, None if y is None else y - origin


def centred(x: Tensor, dim: int = 0) -> Tensor:
    """Deviations from the mean along a dimension; taken twice, as the first mean of rows off the origin is rounded."""
    x = x - x.mean(dim, keepdim=True)
    return x - x.mean(dim, keepdim=True)
