"""What every loss does with its common arguments: scale or temperature, normalisation, weights, reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks

REDUCTIONS = ("mean", "sum", "none")


def resolve_scale(
    function: str, temperature: float | Tensor | None, scale: float | Tensor | None, default_temperature: float
) -> float | Tensor:
    """Return the factor of the inner products; `temperature` and `scale` exclude each other."""
    if temperature is not None and scale is not None:
        raise ValueError(f"{function}: temperature and scale must not both be given (scale = 1 / temperature)")
    if scale is not None:
        return scale
    value = default_temperature if temperature is None else temperature
    if isinstance(value, Tensor):
        return value.reciprocal()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: temperature must be a float or a tensor, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{function}: temperature must be positive, got {value}")
    return 1.0 / value


def normalized(x: Tensor) -> Tensor:
    """Rows of length 1, with the length computed in at least float32."""
    dtype = _checks.accumulator(x.dtype)
    return torch.nn.functional.normalize(x.to(dtype), dim=-1).to(x.dtype)


def reduce_rows(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Mean (weighted: divided by the sum of weights), sum, or the weighted rows themselves."""
    weighted = losses if weight is None else losses * weight.to(losses.dtype)
    if reduction == "none":
        return weighted
    total = weighted.sum()
    return total if reduction == "sum" else divide(total, losses, weight)


def divide(total: Tensor, losses: Tensor, weight: Tensor | None) -> Tensor:
    """Turn a sum into the mean; NaN for no rows, as everywhere in PyTorch."""
    if weight is not None:
        return total / weight.to(total.dtype).sum()
    return total / losses.shape[0]  # 0 / 0 is NaN; testing for 0 would fix a traced batch size


def check_reduction(function: str, reduction: str) -> None:
    """`reduction` must be one that PyTorch knows."""
    _checks.check_choice(function, "reduction", reduction, REDUCTIONS)
