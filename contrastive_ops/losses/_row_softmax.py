"""Softmaxes of rows, or of rows and columns, with one target: what InfoNCE, CLIP, NT-Xent, MoCo and margins share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.folds import Fold
from ..core.numerics import lse_of_rows, merge_lse, softplus
from ..core.records import changed
from ..core.rules import Pairs
from ..ops.similarity_reduce import budget_bytes
from ..reference.similarity_loss import usual_target
from . import _arguments
from ._columns import (
    logit_sums,
    mean_logit,
    partner_similarity,
    scaled,
    share_of_all,
    smoothing_folds,
    sum_and_count,
    wide,
)
from ._hardness import Hardness
from ._sweep import Sweep
from .diagnostics import Ranking


@dataclasses.dataclass(frozen=True, eq=False)
class OwnColumns:
    """Columns of each row alone, which no sweep sees.

    Attributes:
        similarity: (N, K).
        bias: (N, K), added to their logits, or None.
        keep: (N, K) bool, which of them there are; None for all.
    """

    similarity: Tensor
    bias: Tensor | None = None
    keep: Tensor | None = None

    def logits(self, scale: float | Tensor, hardness: Hardness | None) -> Tensor:
        """(N, K)."""
        logits = scaled(scale, self.similarity)
        logits = logits if self.bias is None else logits + self.bias
        logits = logits if hardness is None else logits + hardness.strength * self.similarity.detach()
        return logits if self.keep is None else logits.masked_fill(~self.keep, -torch.inf)

    def sums(self, logits: Tensor) -> tuple[Tensor, int | Tensor]:
        """(N,) sums of the logits of each row, and how many there are."""
        if self.keep is None:
            return logits.sum(1), logits.shape[1]
        return logits.masked_fill(~self.keep, 0.0).sum(1), self.keep.sum(1).to(logits.dtype)


def row_softmax(
    sweep: Sweep,
    x: Tensor,
    y: Tensor | None,
    *,
    target: Tensor | None,
    own: OwnColumns | None = None,
    extra: Tensor | None = None,
    own_logit: Callable[[Tensor], Tensor] | None = None,
    share: float | Tensor | None = None,
    smooth: str = "all",
    hardness: Hardness | None = None,
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
        own: columns of each row alone.
        extra: (N,) lse of still more logits of each row, for losses without smoothing and diagnostics; not with `own`.
        own_logit: what becomes of the targets' logits before they enter the softmax, such as a margin.
        share: of label smoothing, as `_columns.smoothing_share` returns it.
        smooth: "all" or "others", over which columns it is spread.
        hardness: of the negatives; not with a share.
        z_loss: factor of the squared lse of all columns.
        weight: (N,).
        reduction: "mean", "sum" or "none".
        diagnostics: also return `Diagnostics`.

    Returns:
        The loss, or (loss, Diagnostics).
    """
    columns, scale, unit, col_bias = x if y is None else y, sweep.scale, sweep.unit, sweep.col_bias
    of_own = None
    if own is not None:
        own_logits = own.logits(scale, hardness)
        extra, of_own = lse_of_rows(own_logits), own.sums(own_logits)
    of_smoothing = smoothing_folds(share, sweep.pairs)
    alone = own_logit is None and hardness is None and sweep.also is None
    if alone and not (z_loss or diagnostics or of_smoothing):
        mean = None
        if share is not None:
            sums = logit_sums(x, columns, scale, unit=unit, col_bias=col_bias)
            mean = mean_logit(sums, columns.shape[0], of_own)
            share = share_of_all(share, smooth, columns.shape[0] + (0 if of_own is None else of_own[1]))
        return whole_softmax(
            sweep, "softmax", x, y, share, mean, weight, target=target, extra=extra, reduction=reduction
        )
    target = usual_target(x, y) if target is None else target
    ranking = None
    if diagnostics:
        biased, positive = col_bias is not None, columns.detach()[target]
        known: dict[str, Any] = {"also": sweep.also, "sums_of_all": sweep.sums_of_all}
        known["own"] = None if own is None else (own.similarity, own.keep)
        ranking = Ranking(x, columns, positive, sweep.pairs, unit=unit, biased=biased, **known)
    folds = ("logsumexp" if hardness is None else hardness.fold(), *of_smoothing)
    of_sets = ranking.folds if ranking else ()
    (others, *found), ranks, target_logit = sweep.fold_rows(x, y, *folds, of_sets=of_sets, target=target)
    others = others if hardness is None else hardness.of_rows(others)
    positive = target_logit if own_logit is None else own_logit(target_logit)
    losses = softplus((others if extra is None else merge_lse(others, extra)) - positive)
    of_z = z_loss * (positive + losses).square() if z_loss else 0.0
    if share is not None:
        total, count = sum_and_count(x, columns, scale, target_logit, found, unit=unit, col_bias=col_bias)
        total = total if own_logit is None else total + (positive - target_logit)
        share = share_of_all(share, smooth, count + (0 if of_own is None else of_own[1]))
        losses = losses + share * (positive - mean_logit(total, count, of_own))
    loss = _arguments.reduce_rows(losses + of_z, weight, reduction)
    return (loss, ranking.read(ranks)) if ranking else loss


def given_softmax(
    sweep: Sweep,
    x: Tensor,
    positive: Tensor,
    y: Tensor,
    positive_bias: Tensor | None,
    *,
    own: OwnColumns | None,
    own_logit: Callable[[Tensor], Tensor] | None,
    share: float | Tensor | None,
    smooth: str,
    hardness: Hardness | None,
    z_loss: float,
    weight: Tensor | None,
    reduction: str,
    diagnostics: bool,
) -> Any:
    """`row_softmax` where each row has its positive (N, D), the columns y and its own, and nothing of the batch."""
    unit, rules = sweep.unit, Pairs() if sweep.pairs is None else sweep.pairs
    similarity = partner_similarity(x, positive, unit)
    logit = scaled(sweep.scale, similarity)
    logit = logit if positive_bias is None else logit + positive_bias
    logit = logit if own_logit is None else own_logit(logit)
    ranking = None
    if diagnostics:
        known, biased = None if own is None else (own.similarity, own.keep), sweep.col_bias is not None
        of_all = sweep.sums_of_all
        ranking = Ranking(x, y, positive, rules, own=known, unit=unit, biased=biased, sums_of_all=of_all)
    of_smoothing = () if share is None else (Fold("sum"), Fold("count"))
    found: list[Tensor] = []
    sums: list[Tensor] = []
    if y.shape[0] > 0 or own is None or of_smoothing or ranking:  # or there are its own alone
        folds = ("logsumexp" if hardness is None else hardness.fold(), *of_smoothing)
        (others, *sums), ranks, _ = sweep.fold_rows(x, y, *folds, of_sets=ranking.folds if ranking else ())
        found = [others if hardness is None else hardness.of_rows(others)]
    elif y.requires_grad:
        logit = logit + y.sum()  # of nothing: the gradient of no columns is empty, not none
    total, count = (logit + sums[0], sums[1] + 1) if sums else (logit, 1)
    if own is not None:
        own_logits = own.logits(sweep.scale, hardness)
        found.append(lse_of_rows(own_logits))
        of_own = own.sums(own_logits)
        total, count = total + of_own[0], count + of_own[1]
    losses = softplus(merge_lse(*found) - logit)
    of_z = z_loss * (logit + losses).square() if z_loss else 0.0
    if share is not None:
        losses = losses + share_of_all(share, smooth, count) * (logit - total / count)
    loss = _arguments.reduce_rows(losses + of_z, weight, reduction)
    return (loss, ranking.read(ranks)) if ranking else loss


def both_softmaxes(
    sweep: Sweep,
    x: Tensor,
    y: Tensor,
    *,
    count: int | None = None,
    share: float | Tensor | None,
    smooth: str = "all",
    hardness: Hardness | None = None,
    weight: Tensor | None,
    reduction: str,
    diagnostics: bool,
    row_bias: Tensor | None = None,
) -> Any:
    """The mean of the cross-entropies of row i and of column i with their pair i; arguments as in `row_softmax`.

    `count`: how many rows and columns are pairs; those after them are negatives of the other side alone. There are some
    among the columns where there are among the rows, and `sweep.pairs` are rules, perhaps none.
    """
    scale, unit, col_bias, pairs = sweep.scale, sweep.unit, sweep.col_bias, sweep.pairs
    of_smoothing = smoothing_folds(share, pairs)
    if hardness is None and count is None and not (diagnostics or of_smoothing):
        mean = None
        if share is not None:
            sides = wide(x, unit), wide(y, unit)  # once, or 16-bit gradients would be rounded once more
            both = logit_sums(*sides, scale, col_bias=col_bias)
            both = both + logit_sums(*sides, scale, of_columns=True, col_bias=col_bias)
            mean = both / (2 * x.shape[0])
            share = share_of_all(share, smooth, x.shape[0])
        return whole_softmax(sweep, "softmax_both", x, y, share, mean, weight, reduction=reduction)
    ranking, target = None, usual_target(x, y)
    if count is not None:
        target = target.clamp_max(count)  # of more rows a column that is nobody's either
    if diagnostics:
        biased = col_bias is not None or row_bias is not None
        partners, of_all = y if count is None else y[:count], sweep.sums_of_all
        ranking = Ranking(x, y, partners, pairs, both=True, unit=unit, biased=biased, sums_of_all=of_all)
    folds: tuple[str | Fold, ...] = ("logsumexp" if hardness is None else hardness.fold(), *of_smoothing)
    folds += ranking.folds if ranking else ()
    rows, cols, target_logit, *_ = sweep.fold(x, y, *folds, dim=(0, 1), target=target, row_bias=row_bias)
    target_logit, end = target_logit[:count], len(of_smoothing) + 1
    found_of_both = [[each[:count] for each in found] for found in (rows, cols)]
    losses = torch.zeros_like(target_logit)
    for found, of_columns in zip(found_of_both, (False, True), strict=True):
        others = found[0] if hardness is None else hardness.of_rows(found[0])
        losses = losses + softplus(others - target_logit) / 2
        if share is not None:
            total, number = sum_and_count(x, y, scale, target_logit, found[1:end], of_columns, unit, col_bias)
            losses = losses + share_of_all(share, smooth, number) / 2 * (target_logit - mean_logit(total, number))
    loss = _arguments.reduce_rows(losses, weight, reduction)
    return (loss, ranking.read_both(*(found[end:] for found in found_of_both))) if ranking else loss


def softmaxes_of_blocks(
    sweep: Sweep,
    x: Tensor,
    y: Tensor,
    more_x: Tensor,
    more_y: Tensor,
    *,
    hardness: Hardness | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """`both_softmaxes` with negatives more_x (K', D) of the columns and more_y (K, D) of the rows, in sweeps apart.

    Rules are those of x and y. The biases of y and then of more_y are `sweep.col_bias`, as in one matrix of all.
    """
    name, count, bias = sweep.names[0], x.shape[0], sweep.col_bias
    x, y, more_x, more_y = (wide(each, sweep.unit) for each in (x, y, more_x, more_y))
    budget = budget_bytes(name, sweep.memory_budget, x.device.type)
    blocks = [columns.shape[0] for columns in (y, more_y, more_x)]
    parts = [budget * size // max(sum(blocks), 1) for size in blocks]
    own = None if bias is None else bias[:count]
    shared = changed(sweep, unit=False, col_bias=own, memory_budget=parts[0])
    reduce = "logsumexp" if hardness is None else hardness.fold()
    found = shared.fold(x, y, reduce, dim=(0, 1), target=usual_target(x, y))
    of_rows, of_cols = [found.rows[0]], [found.cols[0]]
    if blocks[1] > 0:
        of_more = None if bias is None else bias[count:]
        given = changed(shared, pairs=None, col_bias=of_more, memory_budget=parts[1])
        of_rows += given.fold(x, more_y, reduce).rows
    if blocks[2] > 0:
        given = changed(shared, pairs=None, col_bias=None, memory_budget=parts[2])
        of_cols += given.fold(y, more_x, reduce, row_bias=own).rows
    losses = torch.zeros_like(found.target)
    for each in (of_rows, of_cols):
        others = merge_lse(*each)
        others = others if hardness is None else hardness.of_rows(others)
        losses = losses + softplus(others - found.target) / 2
    return _arguments.reduce_rows(losses, weight, reduction)


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
