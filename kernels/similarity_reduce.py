"""similarity_reduce in Triton: forward, backward and total as the operators take them.

One sweep folds rows and columns. Backward computes logits again: up to a dimension of 256 a kernel per side forms its
gradient in place, beyond that weights are written chunk by chunk for matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.core.ordered import in_parts
from contrastive_ops.core.problem import Layout, ScaleOf, with_factors
from contrastive_ops.core.weight_norm import weight_norm
from contrastive_ops.reference.row_losses import Terms, kind_of, row_losses, weighted_slopes

from . import _similarity_plan as plan
from . import _similarity_variants
from ._cover import Combine, pairwise_cover
from ._launch import arch_of
from ._similarity_backward import BIAS, RESIDUAL, SCALE, TileSum
from ._similarity_problem import Problem
from ._variants import Variant

__all__ = ["backward", "forward", "total", "variants"]


def forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    kept_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (folds, argmax, target_logit, linear, kept); what was not asked for is empty."""
    p = Problem.of(x, y, scale, row_bias, col_bias, target, pair_data, spec, arch_of(x))
    N, M, _ = p.shape
    folds = p.folds(p.layout.folds) + ((plan.linear_fold(),) if p.layout.has_linear else ())
    sizes = [p.shape[fold.cols] for fold in folds]
    values = x.new_empty((sum(sizes),), dtype=torch.float32)
    argmax = x.new_empty((sum(p.layout.argmax_sizes(N, M)),), dtype=torch.int64)
    target_logit = x.new_empty((0 if target is None else N,), dtype=torch.float32)
    for launch in plan.forward_launches(p, folds, values, argmax, None if target is None else target_logit):
        launch.run()
    linear = values.new_empty((0,))
    if p.layout.has_linear:  # outputs of an operator must not share memory
        values, linear = (part.clone() for part in values.split([sum(sizes[:-1]), N]))
    return values, argmax, target_logit, linear, x.new_empty((kept_size,), dtype=torch.float32)


def backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    folds: Tensor,
    argmax: Tensor,
    d_folds: Tensor | None,
    d_target: Tensor | None,
    d_linear: Tensor | None,
    kept: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, scale, row_bias, col_bias in float32, empty where not needed."""
    p = Problem.of(x, y, scale, row_bias, col_bias, target, pair_data, spec, arch_of(x))
    needed = [bool(needs >> bit & 1) for bit in range(5)]
    wanted = _wanted(p, target, needed)
    if 0 in p.shape[:2]:
        found = plan.Gradients(p.x.new_zeros(p.x.shape).float(), p.y.new_zeros(p.y.shape).float(), {})
    else:
        upstream = {
            "values": folds,
            "argmax": argmax,
            "d_values": _contiguous(d_folds),
            "d_target": _contiguous(d_target),
            "d_linear": _contiguous(d_linear),
            "folds": () if d_folds is None else p.folds(p.layout.folds),
            "norm": _norm(p, scale, d_folds, d_target, d_linear),
        }
        found = (plan.fused if p.resident else plan.by_chunks)(p, upstream, wanted)
        _compensate(p, target, found)
    nothing = folds.new_zeros((0, x.shape[1]))
    dx, dy = found.dx if wanted.dx else None, found.dy if wanted.dy else None
    return (
        nothing if dx is None else dx,
        nothing.clone() if dy is None else dy,
        _scale_gradient(p, scale, found.sums) if needed[2] else folds.new_zeros((0,)),
        *(_bias_gradient(p, cols, found.sums) if needed[3 + cols] else folds.new_zeros((0,)) for cols in (False, True)),
    )


def total(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    weight: Tensor,
    extra: Tensor | None,
    target_weight: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (losses, target_logit, dx, dy, dscale, drow_bias, dcol_bias, dextra)."""
    problem = (x, y, scale, row_bias, col_bias, target, pair_data, spec)
    kind = kind_of(Layout.decode(pair_data, spec))
    fold, argmax, target_logit, _, kept = forward(*problem, 0)
    losses = row_losses(kind, (fold,), target_logit, Terms(extra=extra))
    d_fold, d_target, dextra = weighted_slopes(kind, fold, target_logit, weight, extra, target_weight)
    gradients = backward(*problem, fold, argmax, d_fold, d_target, None, kept, needs)
    return losses, target_logit, *gradients, dextra


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Every two options that users can reach together in some variant."""
    return _similarity_variants.variants(arch, combine)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _wanted(p: Problem, target: Tensor | None, needed: list[bool]) -> plan.Wanted:
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


def _norm(p: Problem, scale: Tensor, *upstream: Tensor | None) -> Tensor | None:
    if p.x.dtype != torch.float16:
        return None
    return weight_norm(p.layout, p.layout.sizes(*p.shape[:2]), p.itself, scale, *upstream)


def _compensate(p: Problem, target: Tensor | None, found: plan.Gradients) -> None:
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
