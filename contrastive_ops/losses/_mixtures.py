"""Columns of a tile for labels that are numbers: weighted by differences of labels, and mixtures of rows.

An inner product with a mixture is the mixture of inner products, so no mixture of rows is made.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mixed_with_anchor(own: Tensor, others: Tensor, share: Tensor, gap: Tensor) -> Tensor:
    """(rows, N) logits of ``share`` of the anchor and the rest of another row, by how far their labels are apart.

    Args:
        own: (rows,) logits of the anchors with themselves.
        others: (rows, N) with all rows.
        share: (rows, N) of the anchor.
        gap: (rows, N) the anchor's label less the other's; mixtures of equal labels are left out, by -inf.
    """
    rest = 1 - share
    return (share * own[:, None] + rest * others + (rest * gap.abs()).log1p()).masked_fill(gap == 0, -torch.inf)


def mixed_around(logits: Tensor, gap: Tensor, window: float) -> tuple[Tensor, Tensor, Tensor]:
    """(rows,) logsumexp, sum and number of mixtures that have the anchor's label, of a row below and one above it.

    Memory of (rows, N, N) logits.

    Args:
        logits: (rows, N).
        gap: (rows, N) the anchor's label less the other's.
        window: how far labels may be from the anchor's.
    """
    below, above = (gap > 0) & (gap <= window), (gap < 0) & (-gap <= window)
    there = below[:, :, None] & above[:, None]
    share = (gap[:, None] / (gap[:, None] - gap[:, :, None])).masked_fill(~there, 0.0)
    mixed = logits[:, None] + share * (logits[:, :, None] - logits[:, None])
    lse = mixed.masked_fill(~there, -torch.inf).flatten(1).logsumexp(1)
    return lse, (mixed * there).sum((1, 2)), there.sum((1, 2))
