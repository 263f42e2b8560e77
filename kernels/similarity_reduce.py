"""similarity_reduce in Triton: forward, backward and total as the operators take them.

One sweep folds rows and columns. Backward computes logits again: up to a dimension of 256 a kernel per side forms its
gradient in place, beyond that weights are written chunk by chunk for matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import _similarity_plan as plan
from . import _similarity_variants
from ._cover import Combine, pairwise_cover
from ._launch import arch_of
from ._similarity_gradients import compensate, contiguous, finished, fold_then_weigh, norm_of, wanted_of
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
    wanted = wanted_of(p, target, needed)
    if 0 in p.shape[:2]:
        found = plan.Gradients(p.x.new_zeros(p.x.shape).float(), p.y.new_zeros(p.y.shape).float(), {})
    else:
        upstream = {
            "values": folds,
            "argmax": argmax,
            "d_values": contiguous(d_folds),
            "d_target": contiguous(d_target),
            "d_linear": contiguous(d_linear),
            "folds": () if d_folds is None else p.folds(p.layout.folds),
            "norm": norm_of(p, scale, d_folds, d_target, d_linear),
        }
        found = (plan.fused if p.resident else plan.by_chunks)(p, upstream, wanted)
        compensate(p, target, found)
    return finished(p, scale, found, needed)


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
) -> tuple[Tensor, ...]:
    """Return (losses, target_logit, dx, dy, dscale, drow_bias, dcol_bias, dextra)."""
    problem = (x, y, scale, row_bias, col_bias, target, pair_data, spec)
    return fold_then_weigh(forward, backward, problem, weight, extra, target_weight, needs)


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Every two options that users can reach together in some variant."""
    return _similarity_variants.variants(arch, combine)
