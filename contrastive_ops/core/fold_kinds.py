"""What logits are folded to: the value of no pair, of a chunk, of two parts, and the derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .numerics import merge_lse, softplus


@dataclass(frozen=True)
class FoldKind:
    """A row of `FOLDS`, in plain torch. Logits of pairs that take no part are -inf.

    Attributes:
        empty: the value without a pair.
        chunk: (logits, dim) -> the value along a dimension.
        merge: the value of the pairs of two values.
        slope: (logits, value that broadcasts) -> the derivative by each logit; None where it is 0, or is that of the
            one pair that wins.
        has_winner: whether one pair decides, the first of the largest, whose index is a result too.
    """

    empty: float
    chunk: Callable[[Tensor, int], Tensor]
    merge: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor] | None = None
    has_winner: bool = False


def _probability(logits: Tensor, lse: Tensor) -> Tensor:
    # Without a pair all logits are -inf, and the difference is too.
    return (logits - lse.masked_fill(lse == -torch.inf, 0.0)).exp_()


def _takes_part(logits: Tensor) -> Tensor:
    return logits != -torch.inf


# The folds of `FOLDS` that have no winner, for overloads.
WithoutWinner: TypeAlias = Literal["logsumexp", "sum_softplus", "sum_relu", "sum", "count"]

# The position is the number in `spec`; csrc/slots.h has the same order.
FOLDS = {
    "logsumexp": FoldKind(-torch.inf, torch.logsumexp, merge_lse, _probability),
    "max": FoldKind(-torch.inf, torch.amax, torch.maximum, has_winner=True),
    "sum_softplus": FoldKind(0.0, lambda z, dim: softplus(z).sum(dim), torch.add, lambda z, _: z.sigmoid()),
    "sum_relu": FoldKind(0.0, lambda z, dim: z.relu().sum(dim), torch.add, lambda z, _: (z > 0).to(z.dtype)),
    "sum": FoldKind(
        0.0,
        lambda z, dim: torch.where(_takes_part(z), z, 0.0).sum(dim),
        torch.add,
        lambda z, _: _takes_part(z).to(z.dtype),
    ),
    # Ones in float32 end at 2^24.
    "count": FoldKind(0.0, lambda z, dim: _takes_part(z).sum(dim).to(z.dtype), torch.add),
}
