"""What both ways to form gradients of a similarity matrix begin with, and what they end with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.core.ordered import in_parts
from contrastive_ops.core.problem import Layout, ScaleOf, with_factors
from contrastive_ops.core.weight_norm import weight_norm
from contrastive_ops.reference.row_losses import Terms, kind_of, row_losses, weighted_slopes

from . import _similarity_plan as plan
from ._similarity_backward import BIAS, RESIDUAL, SCALE, TileSum
from ._similarity_problem import Problem


def contiguous(t: Tensor | None) -> Tensor | None:
    """What arrives, as kernels read it."""
    return None if t is None else t.contiguous()


def wanted_of(p: Problem, target: Tensor | None, needed: list[bool]) -> plan.Wanted:
    """Which gradients and sums answer what is needed."""
    dx, dy = needed[0], needed[1] and not p.itself
    sums = []
    if target is not None and p.x.element_size() == 2:  # what rounding weights loses is given back along the target
        sums += [
            TileSum(RESIDUAL.value, cols) for cols, wants in ((False, dx), (True, dx if p.itself else dy)) if wants
        ]
    sums += [TileSum(BIAS.value, cols) for cols in (False, True) if needed[3 + cols]]
    if needed[2]:
        sums += [_scale_sum(p, index) for index in range(len(p.layout.sets))]
    return plan.Wanted(dx, dy, tuple(sums))


def _scale_sum(p: Problem, index: int) -> TileSum:
    return TileSum(SCALE.value, p.layout.sets[index].scale_of == ScaleOf.COLUMNS, index)


def _scale_gradient(p: Problem, scale: Tensor, sums: dict[TileSum, Tensor]) -> Tensor:
    """The gradient of the scales of all sets, one after another."""
    if not sums:
        return torch.zeros_like(scale)
    found = [sums[_scale_sum(p, index)] for index in range(len(p.layout.sets))]
    return torch.cat(
        [
            (in_parts(each).reshape(1) if own.scale_of == ScaleOf.ALL else each).float()
            for own, each in zip(p.layout.sets, found, strict=True)
        ]
    )


def _bias_gradient(p: Problem, cols: bool, sums: dict[TileSum, Tensor]) -> Tensor:
    each = sums.get(TileSum(BIAS.value, cols))
    return p.x.new_zeros((p.shape[cols],), dtype=torch.float32) if each is None else each.float()


def norm_of(p: Problem, scale: Tensor, *upstream: Tensor | None) -> Tensor | None:
    """What weights of float16 are multiplied with; None for other dtypes."""
    if p.x.dtype != torch.float16:
        return None
    return weight_norm(p.layout, p.layout.sizes(*p.shape[:2]), p.itself, scale, *upstream)


def compensate(p: Problem, target: Tensor | None, found: plan.Gradients) -> None:
    """Give back what rounding the weights took, along each row's target and each column's row."""
    sides: tuple[tuple[bool, Any, Tensor], ...] = (
        (False, found.dx, p.y),
        (True, found.dx if p.itself else found.dy, p.x),
    )
    for cols, gradient, other in sides:
        residual = found.sums.get(TileSum(RESIDUAL.value, cols))
        if target is None or gradient is None or residual is None:
            continue
        partner = target
        if cols and not p.itself:  # of several rows with one target the last, whatever the order of writes
            rows = torch.arange(len(target), device=target.device)
            partner = torch.full((p.shape[1],), -1, device=target.device).scatter_reduce_(0, target, rows, "amax")
        residual = with_factors(residual.float(), partner, *p.factors(cols))
        plan.give_back(gradient, residual, partner.contiguous(), other, p.arch).run()


def finished(
    p: Problem, scale: Tensor, found: plan.Gradients, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, y, scale, row_bias, col_bias, empty where not needed."""
    nothing = p.x.new_zeros((0, p.shape[2]), dtype=torch.float32)
    dx, dy = found.dx if needed[0] else None, found.dy if needed[1] and not p.itself else None
    return (
        nothing if dx is None else dx,
        nothing.clone() if dy is None else dy,
        _scale_gradient(p, scale, found.sums) if needed[2] else nothing.new_zeros((0,)),
        *(
            _bias_gradient(p, cols, found.sums) if needed[3 + cols] else nothing.new_zeros((0,))
            for cols in (False, True)
        ),
    )


def fold_then_weigh(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    problem: Sequence[Any],
    weight: Tensor,
    extra: Tensor | None,
    target_weight: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    """`total` of two sweeps: (losses, target_logit, dx, dy, dscale, drow_bias, dcol_bias, dextra)."""
    *_, pair_data, spec = problem
    kind = kind_of(Layout.decode(pair_data, spec))
    fold, argmax, target_logit, _, kept = forward(*problem, 0)
    losses = row_losses(kind, (fold,), target_logit, Terms(extra=extra))
    d_fold, d_target, dextra = weighted_slopes(kind, fold, target_logit, weight, extra, target_weight)
    gradients = backward(*problem, fold, argmax, d_fold, d_target, None, kept, needs)
    return losses, target_logit, *gradients, dextra
