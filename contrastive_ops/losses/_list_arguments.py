"""Arguments that losses of lists of scores share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.masks import left_out
from . import _arguments


def lists_of(
    name: str,
    scores: Tensor,
    teacher_scores: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    teacher_name: str = "teacher_scores",
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and the teacher's, in the dtype of sums, and which candidates there are."""
    _arguments.check_reduction(name, reduction)
    for key, each in (("scores", scores), (teacher_name, teacher_scores)):
        if not checks.check_tensor(name, key, each).is_floating_point():
            raise TypeError(f"{name}: {key} must be a floating tensor, got {each.dtype}")
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"{name}: scores must have shape (N, K) with K >= 1, got {checks.shape(scores)}")
    if teacher_scores.shape != scores.shape:
        raise ValueError(
            f"{name}: {teacher_name} must have the shape of scores, "
            f"got {checks.shape(scores)} and {checks.shape(teacher_scores)}"
        )
    checks.check_device(name, "scores", scores, teacher_name, teacher_scores)
    if mask is not None:
        if checks.check_tensor(name, "mask", mask).dtype != torch.bool:
            raise TypeError(f"{name}: mask must be a bool tensor, got {mask.dtype}")
        if mask.shape != scores.shape:
            raise ValueError(f"{name}: mask must have shape {checks.shape(scores)}, got {checks.shape(mask)}")
        checks.check_device(name, "scores", scores, "mask", mask)
    if weight is not None:
        _arguments.check_weight(name, weight, scores.shape[0], "scores", scores)
    dtype = checks.accumulator(scores.dtype)
    teacher = teacher_scores.detach().to(dtype)
    there = teacher != -torch.inf
    there = there if mask is None else there & mask
    there = there if weight is None else there & (weight != 0)[:, None]
    # Before scores meet the temperature, whose gradient they would reach.
    return left_out(scores.to(dtype), there), left_out(teacher, there), there


def factor_of(name: str, key: str, temperature: float | Tensor, scores: Tensor) -> Tensor:
    """1 / temperature as a 0-d tensor."""
    if isinstance(temperature, Tensor):
        temperature = checks.one_number(name, key, temperature, "scores", scores)
    return checks.one_number(name, key, _arguments.inverse(name, key, temperature), "scores", scores)
