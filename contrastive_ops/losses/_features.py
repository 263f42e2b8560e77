"""Matrices of features, whose columns are what a loss compares."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from . import _arguments


def feature_matrices(function: str, **matrices: Tensor) -> list[Tensor]:
    """Check matrices, the second of which is partner of the first; return them in the accumulation dtype."""
    (x_name, x), *others = matrices.items()
    checks.check_matrix(function, x_name, x)
    for name, each in others:
        checks.check_matrices(function, x_name, x, name, each)
        _arguments.check_partners(function, x_name, x, name, each)
    with autocast.disabled(x):
        return [each.to(checks.accumulator(each.dtype)) for each in matrices.values()]


def nothing(*matrices: Tensor) -> Tensor:
    """0 with gradient 0, whatever the matrices hold."""
    return torch.stack([each[:0].sum() for each in matrices]).sum()
