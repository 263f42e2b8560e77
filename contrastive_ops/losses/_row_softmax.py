"""One softmax a row, its target against the other columns: what InfoNCE, MoCo and margin losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core import checks
from ..core.numerics import softplus
from ..core.ordered import ordered_sum
from ..core.rules import Pairs
from ..ops.similarity_reduce import fold, merge_lse, needs_gradient, weighted_total
from . import _arguments
from ._columns import logit_sums, mean_logit, scaled, smoothing_folds, sum_and_count
from .diagnostics import Ranking


def row_softmax(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor,
    *,
    target: Tensor,
    scale: float | Tensor,
    pairs: Pairs | None = None,
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
        target: (N,) int64.
        scale: float, 0-d or (N,).
        pairs: rules for the columns.
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
    rows_alone = own_logit is not None or bool(z_loss or diagnostics or of_smoothing)
    if reduction != "none" and not rows_alone and needs_gradient(x, y, scale, weight, extra, share):
        mean = None if share is None else mean_logit(logit_sums(x, y, scale, unit=unit), y.shape[0], own_logits)
        return _total(names, x, y, scale, target, pairs, extra, weight, share, mean, reduction, unit, backend)
    ranking = Ranking(x, y, y.detach()[target], pairs, own=own, unit=unit) if diagnostics else None
    (others, *more), _, target_logit, *_ = fold(
        x,
        y,
        reduce=("logsumexp", *of_smoothing, *(ranking.folds if ranking else ())),
        scale=scale,
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
        total, count = sum_and_count(x, y, scale, target_logit, more[: len(of_smoothing)], unit=unit)
        total = total if own_logit is None else total + (positive - target_logit)
        losses = losses + share * (positive - mean_logit(total, count, own_logits))
    loss = _arguments.reduce_rows(losses + of_z, weight, reduction)
    return (loss, ranking.read(more[len(of_smoothing) :])) if ranking else loss


def _total(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    target: Tensor,
    pairs: Pairs | None,
    extra: Tensor | None,
    weight: Tensor | None,
    share: float | Tensor | None,
    mean: Tensor | None,
    reduction: str,
    unit: bool,
    backend: str,
) -> Tensor:
    """The mean or sum with gradients that are formed in the forward pass."""
    dtype = checks.accumulator(x.dtype)
    row_weight = (
        x.new_ones(x.shape[:1], dtype=dtype) if weight is None else _arguments.of_weighted(weight, weight).to(dtype)
    )
    spread = None if share is None else share * row_weight
    total = weighted_total(
        x,
        y,
        scale=scale,
        target=target,
        pairs=pairs,
        weight=row_weight,
        extra=extra,
        target_weight=spread,
        unit=unit,
        names=names,
        backend=backend,
    )
    if spread is not None and mean is not None:
        total = total - ordered_sum(spread * mean)
    return total if reduction == "sum" else _arguments.divide(total, row_weight, weight)
