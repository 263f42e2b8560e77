"""What each rank returns of the loss of all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.ordered import ordered_sum
from ._collectives import sum_over_ranks
from ._groups import Shards, Team


def local_reduction(reduction: str) -> str:
    """What a rank does with its rows before the mean or sum of all: their sum, or nothing."""
    return "none" if reduction == "none" else "sum"


def rank_share(
    total: Tensor,
    rows: Shards,
    weight: Tensor | None,
    reduction: str,
    average: bool,
    counted: Tensor | None = None,
) -> Tensor:
    """What a rank returns, so that the mean over ranks, or without `average` the sum, is the loss of all rows.

    Args:
        total: the sum of this rank's losses; its losses where there is no reduction, which are returned as they are.
        rows: those of all ranks.
        weight: (N,) of this rank's rows.
        reduction: "mean", "sum" or "none".
        average: ranks are averaged afterwards, as DDP and FSDP average their gradients.
        counted: (N,) bool, which of this rank's rows are in the mean at all.
    """
    if reduction == "none":
        return total
    factor = rows.team.size if average else 1
    if reduction == "sum":
        return total * factor
    if weight is None and counted is None:
        return total * (factor / (rows.total or torch.nan))
    return total * (factor / _size_of_all(rows.team, total, weight, counted))


def _size_of_all(team: Team, like: Tensor, weight: Tensor | None, counted: Tensor | None) -> Tensor:
    """What the mean divides by: the sum of the weights of all rows that count; 1 where that is 0."""
    if weight is None:
        share = counted.to(like.dtype)  # type: ignore[union-attr]
    else:
        used = weight != 0 if counted is None else counted & (weight != 0)
        share = torch.where(used, weight.to(like.dtype), 0.0)
    size = sum_over_ranks(ordered_sum(share), team)
    return torch.where(size == 0, 1.0, size)
