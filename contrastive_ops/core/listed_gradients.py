"""Gradients of the logits of listed pairs, for backends with kernels for inner products and for sums over lists.

A gradient is a weighted sum of rows for each owner of a list: of rows of y for the rows that list them, and of rows of
x for the columns that are listed, whose lists come from a stable sort. So no sum depends on what runs when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import LogitSet, ScaleOf
from .rules import Slot


class Lists(NamedTuple):
    """Entries by owner: the list of owner o is that of the partners from indptr[o] to indptr[o + 1], -1 for none.

    Attributes:
        indptr: (owners + 1,).
        partners: of each entry.
        order: where each entry stands among the pairs (N, listed); None where entries are in their order.
    """

    indptr: Tensor
    partners: Tensor
    order: Tensor | None = None

    def ordered(self, weights: Tensor) -> Tensor:
        """Numbers (N, listed) of the pairs, entry by entry."""
        return weights.flatten() if self.order is None else weights.flatten()[self.order]


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    logit_set: LogitSet,
    indices: Tensor,
    d_values: Tensor,
    needs: int,
    dots: Callable[[], Tensor],
    sum_lists: Callable[[Lists, Tensor, Tensor | None], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, scale, row_bias, col_bias in float32; those not in `needs` have no rows.

    Args:
        x: (N, D).
        y: (M, D), in any dtype that `sum_lists` reads.
        scale: of all sets.
        logit_set: the set that the logits are of.
        indices: (N, listed), -1 for none.
        d_values: (N, listed).
        needs: a bit for each gradient.
        dots: inner products of the pairs, without scale, (N, listed).
        sum_lists: of lists, weights entry by entry and the partners' rows (owners, D) weighted sums of rows; without
            rows (owners,) sums of the weights.
    """
    wants = [bool(needs >> bit & 1) for bit in range(5)]
    if not len(y):  # there is no pair, whatever is listed
        indices, d_values = indices[:, :0], d_values[:, :0]
    rows, columns, listed = len(x), len(y), indices.shape[1]
    of_rows = Lists(torch.arange(rows + 1, device=x.device) * listed, indices.flatten())
    sorted_columns, by_column = indices.flatten().sort(stable=True)
    begins = torch.searchsorted(sorted_columns, torch.arange(columns + 1, device=x.device))
    of_columns = Lists(begins, by_column // max(listed, 1), by_column)
    column = indices.clamp_min(0)
    e = d_values.float().masked_fill(indices < 0, 0.0)
    weight = e * _pair_scales(scale, logit_set.scale_of, column)
    if Slot.CODE_SCALE in logit_set.data:
        weight = weight * logit_set.data[Slot.CODE_SCALE][column]

    def summed(lists: Lists, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        return sum_lists(lists, lists.ordered(weights), rows)

    dscale = torch.zeros_like(scale)
    if wants[2] and indices.numel() > 0:
        e_dots = e * dots()
        if logit_set.scale_of == ScaleOf.COLUMNS:
            dscale[:columns] = summed(of_columns, e_dots)
        elif logit_set.scale_of == ScaleOf.ROWS:
            dscale[:rows] = e_dots.sum(1)
        else:
            dscale[:1] = e_dots.sum()
    nothing = e.new_zeros((0, x.shape[1]))
    return (
        summed(of_rows, weight, y) if wants[0] else nothing,
        summed(of_columns, weight, x) if wants[1] else nothing.clone(),
        dscale if wants[2] else dscale[:0],
        e.sum(1) if wants[3] else e.new_zeros(0),
        summed(of_columns, e) if wants[4] else e.new_zeros(0),
    )


def _pair_scales(scale: Tensor, scale_of: ScaleOf, column: Tensor) -> Tensor:
    """The scale of each listed pair, so shaped that it can be multiplied. That of other sets stands behind."""
    if scale_of == ScaleOf.COLUMNS:
        return scale[column].float()
    return scale[: len(column) if scale_of == ScaleOf.ROWS else 1, None].float()
