"""Softmaxes of rows, or of rows and columns, with one target: what InfoNCE, CLIP, NT-Xent, MoCo and margins share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core import checks
from ..core.folds import Fold
from ..core.numerics import softplus
from ..ops.similarity_reduce import merge_lse
from ..reference.similarity_loss import usual_target
from . import _arguments
from ._columns import logit_sums, mean_logit, scaled, smoothing_folds, sum_and_count, wide
from ._sweep import Sweep
from .diagnostics import Ranking


def row_softmax(
    sweep: Sweep,
    x: Tensor,
    y: Tensor | None,
    *,
    target: Tensor | None,
    own: Tensor | None = None,
    extra: Tensor | None = None,
    own_logit: Callable[[Tensor], Tensor] | None = None,
    share: float | Tensor | None = None,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    reduction: str,
    diagnostics: bool = False,
) -> Any:
    """Cross-entropy of each row's logits with its target; arguments are checked by the caller.

    Args:
        sweep: scale, rules, biases and the like.
        x: (N, D) the rows.
        y: (M, D) the columns; None compares the rows of x with each other, and rules then drop each from its own.
        target: (N,) int64. None: column i of row i; without y the other view of the sample.
        own: (N, K) similarities of each row with more columns, which the sweep does not see.
        extra: (N,) lse of still more logits of each row, for losses without smoothing and diagnostics; not with `own`.
        own_logit: what becomes of the targets' logits before they enter the softmax, such as a margin.
        share: of label smoothing, as `_columns.smoothing_share` returns it.
        z_loss: factor of the squared lse of all columns.
        weight: (N,).
        reduction: "mean", "sum" or "none".
        diagnostics: also return `Diagnostics`.

    Returns:
        The loss, or (loss, Diagnostics).
    """
    columns, scale, unit = x if y is None else y, sweep.scale, sweep.unit
    own_logits = None if own is None else scaled(scale, own)
    extra = extra if own_logits is None else own_logits.logsumexp(1)
    of_smoothing = smoothing_folds(share, sweep.pairs)
    if own_logit is None and not (z_loss or diagnostics or of_smoothing):
        mean = None
        if share is not None:
            sums = logit_sums(x, columns, scale, unit=unit, col_bias=sweep.col_bias)
            mean = mean_logit(sums, columns.shape[0], own_logits)
        return whole_softmax(
            sweep, "softmax", x, y, share, mean, weight, target=target, extra=extra, reduction=reduction
        )
    target = usual_target(x, y) if target is None else target
    ranking, biased = None, sweep.col_bias is not None
    if diagnostics:
        ranking = Ranking(x, columns, columns.detach()[target], sweep.pairs, own=own, unit=unit, biased=biased)
    folds: tuple[str | Fold, ...] = ("logsumexp", *of_smoothing, *(ranking.folds if ranking else ()))
    (others, *more), _, target_logit, *_ = sweep.fold(x, y, *folds, target=target)
    positive = target_logit if own_logit is None else own_logit(target_logit)
    losses = softplus((others if extra is None else merge_lse(others, extra)) - positive)
    of_z = z_loss * (positive + losses).square() if z_loss else 0.0
    if share is not None:
        total, count = sum_and_count(
            x, columns, scale, target_logit, more[: len(of_smoothing)], unit=unit, col_bias=sweep.col_bias
        )
        total = total if own_logit is None else total + (positive - target_logit)
        losses = losses + share * (positive - mean_logit(total, count, own_logits))
    loss = _arguments.reduce_rows(losses + of_z, weight, reduction)
    return (loss, ranking.read(more[len(of_smoothing) :])) if ranking else loss


def both_softmaxes(
    sweep: Sweep,
    x: Tensor,
    y: Tensor,
    *,
    share: float | Tensor | None,
    weight: Tensor | None,
    reduction: str,
    diagnostics: bool,
) -> Any:
    """The mean of the cross-entropies of row i and of column i with their pair i; arguments as in `row_softmax`."""
    scale, unit, col_bias = sweep.scale, sweep.unit, sweep.col_bias
    of_smoothing = smoothing_folds(share, sweep.pairs)
    if not (diagnostics or of_smoothing):
        mean = None
        if share is not None:
            sides = wide(x, unit), wide(y, unit)  # once, or 16-bit gradients would be rounded once more
            both = logit_sums(*sides, scale, col_bias=col_bias)
            both = both + logit_sums(*sides, scale, of_columns=True, col_bias=col_bias)
            mean = both / (2 * x.shape[0])
        return whole_softmax(sweep, "softmax_both", x, y, share, mean, weight, reduction=reduction)
    ranking = Ranking(x, y, y, sweep.pairs, both=True, unit=unit, biased=col_bias is not None) if diagnostics else None
    folds: tuple[str | Fold, ...] = ("logsumexp", *of_smoothing, *(ranking.folds if ranking else ()))
    folded = sweep.fold(x, y, *folds, dim=(0, 1), target=usual_target(x, y))
    (rows, *of_rows), (cols, *of_cols), target_logit, *_ = folded
    end = len(of_smoothing)
    losses = (softplus(rows - target_logit) + softplus(cols - target_logit)) / 2
    if share is not None:
        row_mean, col_mean = (
            mean_logit(*sum_and_count(x, y, scale, target_logit, folded[:end], of_columns, unit, col_bias))
            for folded, of_columns in ((of_rows, False), (of_cols, True))
        )
        losses = losses + share * (target_logit - (row_mean + col_mean) / 2)
    loss = _arguments.reduce_rows(losses, weight, reduction)
    return (loss, ranking.read_both(of_rows[end:], of_cols[end:])) if ranking else loss


def whole_softmax(
    sweep: Sweep,
    kind: str,
    x: Tensor,
    y: Tensor | None,
    share: float | Tensor | None,
    mean: Tensor | None,
    weight: Tensor | None,
    **options: Any,
) -> Tensor:
    """The loss as one operator; `mean` has the mean logits of the rows where `share` is spread over them."""
    of_target = None
    if share is not None:
        dtype = checks.accumulator(x.dtype)
        used = x.new_ones(x.shape[:1], dtype=dtype) if weight is None else _arguments.of_weighted(weight, weight)
        of_target = share * used.to(dtype)
    loss = sweep.loss(kind, x, y, weight=weight, target_weight=of_target, **options)
    if mean is None or share is None:
        return loss
    return loss - _arguments.reduce_rows(share * mean, weight, options["reduction"])
