"""Softmaxes of rows, or of rows and columns, with one target: what InfoNCE, CLIP, MoCo and margin losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import softplus
from ..core.rules import Pairs
from ..ops.similarity_loss import similarity_loss
from ..ops.similarity_reduce import fold, merge_lse
from . import _arguments
from ._columns import logit_sums, mean_logit, scaled, smoothing_folds, sum_and_count
from .diagnostics import Ranking


def row_softmax(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor,
    *,
    target: Tensor | None,
    scale: float | Tensor,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    own: Tensor | None = None,
    extra: Tensor | None = None,
    own_logit: Callable[[Tensor], Tensor] | None = None,
    share: float | Tensor | None = None,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    reduction: str,
    diagnostics: bool = False,
    unit: bool = False,
    memory_budget: int | None,
    backend: str,
) -> Any:
    """Cross-entropy of each row's logits with its target; arguments are checked by the caller.

    Args:
        names: the loss, its rows and its columns, for errors.
        x: (N, D) the rows.
        y: (M, D) the columns.
        target: (N,) int64. None: column i of row i.
        scale: float, 0-d or (N,).
        pairs: rules for the columns.
        col_bias: (M,), added to the logits of each column.
        own: (N, K) similarities of each row with more columns, which the sweep does not see.
        extra: (N,) lse of still more logits of each row, for losses without smoothing and diagnostics; not with `own`.
        own_logit: what becomes of the targets' logits before they enter the softmax, such as a margin.
        share: of label smoothing, as `_columns.smoothing_share` returns it.
        z_loss: factor of the squared lse of all columns.
        weight: (N,).
        reduction: "mean", "sum" or "none".
        diagnostics: also return `Diagnostics`.
        unit: rows of x and y count as if they had length 1; see `_arguments.in_sweep`.
        memory_budget: as in `similarity_reduce`.
        backend: as in `similarity_reduce`.

    Returns:
        The loss, or (loss, Diagnostics).
    """
    own_logits = None if own is None else scaled(scale, own)
    extra = extra if own_logits is None else own_logits.logsumexp(1)
    of_smoothing = smoothing_folds(share, pairs)
    if own_logit is None and not (z_loss or diagnostics or of_smoothing):
        sums = None
        if share is not None:
            sums = mean_logit(logit_sums(x, y, scale, unit=unit, col_bias=col_bias), y.shape[0], own_logits)
        return whole_softmax(
            names,
            x,
            y,
            "softmax",
            target,
            scale,
            pairs,
            col_bias,
            extra,
            share,
            sums,
            weight,
            reduction,
            unit,
            memory_budget,
            backend,
        )
    target = torch.arange(x.shape[0], device=x.device) if target is None else target
    ranking = Ranking(x, y, y.detach()[target], pairs, own=own, unit=unit) if diagnostics else None
    (others, *more), _, target_logit, *_ = fold(
        x,
        y,
        reduce=("logsumexp", *of_smoothing, *(ranking.folds if ranking else ())),
        scale=scale,
        col_bias=col_bias,
        target=target,
        pairs=pairs,
        unit=unit,
        memory_budget=memory_budget,
        names=names,
        backend=backend,
    )
    positive = target_logit if own_logit is None else own_logit(target_logit)
    losses = softplus((others if extra is None else merge_lse(others, extra)) - positive)
    of_z = z_loss * (positive + losses).square() if z_loss else 0.0
    if share is not None:
        total, count = sum_and_count(x, y, scale, target_logit, more[: len(of_smoothing)], unit=unit, col_bias=col_bias)
        total = total if own_logit is None else total + (positive - target_logit)
        losses = losses + share * (positive - mean_logit(total, count, own_logits))
    loss = _arguments.reduce_rows(losses + of_z, weight, reduction)
    return (loss, ranking.read(more[len(of_smoothing) :])) if ranking else loss


def whole_softmax(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor,
    kind: str,
    target: Tensor | None,
    scale: float | Tensor,
    pairs: Pairs | None,
    col_bias: Tensor | None,
    extra: Tensor | None,
    share: float | Tensor | None,
    mean: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    unit: bool,
    memory_budget: int | None,
    backend: str,
) -> Tensor:
    """The loss as one operator; `mean` has the mean logits of the rows where `share` is spread over them."""
    of_target = None
    if share is not None:
        dtype = checks.accumulator(x.dtype)
        used = x.new_ones(x.shape[:1], dtype=dtype) if weight is None else _arguments.of_weighted(weight, weight)
        of_target = share * used.to(dtype)
    loss = similarity_loss(
        x,
        y,
        kind=kind,
        scale=scale,
        col_bias=col_bias,
        target=target,
        pairs=pairs,
        weight=weight,
        extra=extra,
        target_weight=of_target,
        reduction=reduction,
        unit=unit,
        memory_budget=memory_budget,
        names=names,
        backend=backend,
    )
    return loss if mean is None or share is None else loss - _arguments.reduce_rows(share * mean, weight, reduction)
