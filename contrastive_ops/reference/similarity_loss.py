"""similarity_loss in plain PyTorch: the rows' algebra around the sweeps of `similarity_reduce`.

`Composed` puts it around the sweeps of any backend; around those of the reference it defines what is correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..core.checks import accumulator
from ..core.problem import Layout
from . import similarity_reduce
from .pairs import chunk_sets, inner_products
from .row_losses import (
    ONE_DIRECTION,
    Terms,
    divisor,
    kind_of,
    reduced,
    row_losses,
    row_slopes,
    row_weights,
    term_slopes,
    weighted_slopes,
)
from .similarity_reduce import Found, Gradients, chunk_gradients, chunks

# The gradients of x, y, scale, row_bias and col_bias are formed in forward where any of these bits of `needs` is set.
SWEPT = 31


def in_one_pass(kind: str, reduction: str, itself: bool, needs: int) -> bool:
    """Whether forward forms the gradients: what arrives at each row is known and a row is complete when it is left."""
    return bool(needs & SWEPT) and kind in ONE_DIRECTION and reduction != "none" and not itself


def usual_target(x: Tensor, y: Tensor | None) -> Tensor:
    """The target where none is given: column i of row i, and of two stacked views the other view of the same sample."""
    rows = torch.arange(x.shape[0], device=x.device)
    return rows.roll(x.shape[0] // 2) if y is None else rows


class Composed:
    """`forward` over the sweeps of a backend: its functions forward and total of `similarity_reduce`."""

    def __init__(self, sweeps: Any) -> None:
        self.sweeps = sweeps

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        scale: Tensor,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
        target: Tensor | None,
        pair_data: Sequence[Tensor],
        spec: Sequence[int],
        weight: Tensor | None,
        extra: Tensor | None,
        target_weight: Tensor | None,
        count: Tensor | None,
        kind: str,
        reduction: str,
        needs: int,
        kept_size: int,
    ) -> tuple[Tensor, ...]:
        """Return (loss, folds, slopes, kept, dx, dy, dscale, drow_bias, dcol_bias); what has no use is empty.

        `slopes` has the derivatives of the result, or of each row, by extra, weight and target_weight where they are
        given, and, unless the gradients are formed here, by the folds and the target's logits.
        """
        target = usual_target(x, y) if target is None else target
        problem = (x, y, scale, row_bias, col_bias, target, pair_data, spec)
        terms = Terms(weight, extra, target_weight, count)
        like = x.new_empty(x.shape[:1], dtype=accumulator(x.dtype))
        size = divisor(terms, reduction, like)
        of_rows = row_weights(terms, size, like)
        of_target = None if target_weight is None else target_weight / size
        if in_one_pass(kind, reduction, y is None, needs):
            losses, logit, *gradients, d_extra = self.sweeps.total(*problem, of_rows, extra, of_target, needs & SWEPT)
            loss = reduced(losses, logit, terms, reduction)
            slopes = term_slopes(losses, logit, loss, terms, reduction, size)
            slopes = slopes if extra is None else [d_extra, *slopes]
            return loss, like.new_empty(0), torch.cat([like[:0], *slopes]), like.new_empty(0), *gradients
        folds, _, logit, _, kept = self.sweeps.forward(*problem, kept_size)
        each = folds.split(Layout.decode(pair_data, spec).sizes(x.shape[0], (x if y is None else y).shape[0]))
        losses = row_losses(kind, each, logit, terms)
        loss = reduced(losses, logit, terms, reduction)
        # An operator's results must not share memory, and be it none.
        no_gradients = [like.new_empty((0, x.shape[1])) for _ in range(2)] + [like.new_empty(0) for _ in range(3)]
        if not needs:
            return loss, *(like.new_empty(0) for _ in range(3)), *no_gradients
        found = row_slopes(kind, each, logit, terms)
        slopes = [] if found.extra is None else [found.extra * of_rows]
        slopes += term_slopes(losses, logit, loss, terms, reduction, size)
        slopes += [slope * of_rows for slope in found.folds]
        by_target = found.target * of_rows
        slopes.append(by_target if of_target is None else by_target + of_target)
        return loss, folds, torch.cat(slopes), kept, *no_gradients


def total(
    x: Tensor,
    y: Tensor,
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
    """The total of weight * loss + target_weight * target logit, with its gradients, each product made once.

    Return (losses, target_logit, dx, dy, dscale, drow_bias, dcol_bias, dextra).
    """
    layout = Layout.decode(pair_data, spec)
    fold, kind = layout.folds[0], kind_of(layout)
    found, gradients = Found(layout, x, y, target), Gradients(layout, x, y, scale, needs)
    losses, d_fold, d_target = (torch.empty_like(found.folds) for _ in range(3))
    d_extra = found.folds.new_empty((0 if extra is None else len(x),))
    for part in chunks(len(x), len(y)):
        dots = inner_products(x[part], y)
        sets = list(chunk_sets(layout, part, dots, x, y, scale, row_bias, col_bias, target))
        found.add(sets)
        of_rows, terms = found.folds[part], Terms(extra=None if extra is None else extra[part])
        losses[part] = row_losses(kind, (of_rows,), found.target_logit[part], terms)
        slopes = weighted_slopes(
            kind,
            of_rows,
            found.target_logit[part],
            weight[part],
            terms.extra,
            None if target_weight is None else target_weight[part],
        )
        d_fold[part], d_target[part] = slopes[:2]
        if extra is not None:
            d_extra[part] = slopes[2]
        active = [(fold, found.folds, found.argmax, d_fold)]
        gradients.add(part, chunk_gradients(sets, active, d_target, None, x[part], y, needs))
    return losses, found.target_logit, *gradients.asked_for(), d_extra


forward = Composed(SimpleNamespace(forward=similarity_reduce.forward, total=total)).forward
