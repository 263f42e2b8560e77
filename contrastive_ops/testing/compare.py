"""What every test of a loss does: leaves, the reduction of row losses, and values and gradients against the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that require a gradient."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def number(value: float) -> Tensor:
    """A float64 scalar that requires a gradient."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def reduced(rows: Tensor, reduction: str, weight: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """The reduction of dense row losses; rows that are not `counted` are 0 and left out of the mean."""
    rows = rows if counted is None else torch.where(counted, rows, 0.0)
    weighted = rows if weight is None else rows * weight
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    if weight is None and counted is None:
        return weighted.sum() / len(rows)
    share = torch.ones_like(rows) if weight is None else weight
    size = (share if counted is None else share * counted).sum()
    return weighted.sum() / size if size > 0 else 0.0 * weighted.sum()


def check(value: Tensor, truth: Tensor, leaves: Sequence[Tensor | None], tolerance: float = 1e-9) -> None:
    """Equal values, NaN where the truth has it, and equal gradients for one random cotangent."""
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not truth.isfinite().all():
        return
    cotangent = torch.randn_like(truth)
    inputs = [each for each in leaves if each is not None]
    got, expected = (torch.autograd.grad(v, inputs, cotangent, materialize_grads=True) for v in (value, truth))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check_derivatives(function: Callable[..., Any], leaves: Tensor | Sequence[Tensor]) -> None:
    """First derivatives against differences entry by entry, second ones along a random direction.

    A wrong or missing term of a second derivative changes its product with any such direction. Entry by entry they
    would take nine tenths of the time.
    """
    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
