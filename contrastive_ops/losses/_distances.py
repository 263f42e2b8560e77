"""Distances between rows, and the pairs that a sweep selects by distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.folds import Fold
from ..core.offsets import common_row, from_common_row
from ..core.problem import Problem
from ..core.rules import Pairs
from ..core.unit_rows import unit_rows
from ..ops.similarity_reduce import fold

DISTANCES = ("euclidean", "sqeuclidean", "cosine")


# What logits are made of: what sweeps can do, and what softmaxes can.
METRICS = ("dot", "sqeuclidean")
LOGITS = (*METRICS, "euclidean")


def as_products(
    rows: Sequence[Tensor], columns: Sequence[Tensor], unit: bool = False, shifted: bool = True
) -> list[Tensor]:
    """Matrices of rows, then of columns, whose inner products are minus their squared distances.

    In the accumulation dtype and with two more dimensions, of the lengths less a common row. Any of them may be
    (N, K, D); `unit`: as in `_columns.wide`. Not `shifted`: less nothing, where columns meet rows of other processes.
    """
    wide = [unit_rows(_accumulated(each)) if unit else _accumulated(each) for each in (*rows, *columns)]
    found = []
    with autocast.disabled(wide[0]):
        origin = common_row(wide[0]) if shifted else wide[0].new_zeros(wide[0].shape[-1:])
        for place, each in enumerate(wide):
            x = each - origin
            length, one = -x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])
            found.append(torch.cat([2 * x, length, one] if place < len(rows) else [x, one, length], -1))
    return found


class Points(NamedTuple):
    """Rows as a distance sees them; made once, before rows are taken from them.

    Attributes:
        rows: (N, D) in the accumulation dtype; unit rows for the cosine.
        lacks: (N,) for the cosine, 1 where a row is 0.
    """

    rows: Tensor
    lacks: Tensor | None

    def take(self, index: Tensor) -> Points:
        """The points that `index` names; anything finite for -1."""
        return Points(take_rows(self.rows, index), None if self.lacks is None else take_rows(self.lacks, index))


def points(x: Tensor, distance: str) -> Points:
    """Rows of any floating dtype as `distance` sees them."""
    x = _accumulated(x)
    if distance != "cosine":
        return Points(x, None)
    x = unit_rows(x)
    return Points(x, (x.detach().abs().amax(1) == 0).to(x.dtype) if x.shape[1] > 0 else x.new_ones(x.shape[:1]))


def distance_between(x: Points, y: Points, distance: str, eps: float = 0.0) -> Tensor:
    """(N,) distance of each point of `x` from the same one of `y`.

    Computed from differences, which do not cancel where the points are close. The gradient of the Euclidean distance at
    0 is 0; with `eps`, which is added to each difference as torch does, it is that of torch.
    """
    with autocast.disabled(x.rows):
        difference = x.rows - y.rows
        if distance == "euclidean":
            return torch.linalg.vector_norm(difference + eps if eps else difference, dim=1)
        square = difference.square().sum(1)
        if x.lacks is None or y.lacks is None:
            return square
        # Half the squared difference of unit rows is 1 - cosine; a row of zeros, whose cosines are 0, lacks its half.
        return (square + (x.lacks + y.lacks)) / 2


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows that `index` names; anything finite for -1."""
    if x.shape[0] == 0:
        return x.new_zeros((index.shape[0], *x.shape[1:])) + x.sum(0)  # the sum of no rows: 0, with a gradient
    return x.index_select(0, index.clamp_min(0))  # its gradient is summed in order, that of x[index] is not


def farthest_and_nearest(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor | None,
    distance: str,
    farthest: Pairs,
    nearest: Pairs,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(N,) the columns at the largest distance among some pairs and at the smallest among others, or -1.

    No gradient: the caller computes the distances of the selected pairs again, exactly and for O(N D). `x` and `y` are
    the rows of `points`: in the accumulation dtype, because differences and unit rows in a lower one are rounded.
    """
    with torch.no_grad(), autocast.disabled(x):
        scale, col_bias = 1.0, None
        if distance != "cosine":
            # |y|^2 - 2 <x, y> orders each row's columns as the distance does.
            x, y = from_common_row(x, y)
            scale, col_bias = 2.0, -(x if y is None else y).square().sum(1)
        folds = (Fold("max", pairs=farthest, negate=True), Fold("max", pairs=nearest))
        folded = fold(Problem.of(names, x, y, None, col_bias), reduce=folds, scale=scale, backend=backend)
    return folded.row_argmax[0], folded.row_argmax[1]


def semi_hard_negative(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor | None,
    distance: str,
    negatives: tuple[Tensor, Tensor],
    target: Tensor,
    backend: str,
) -> Tensor:
    """(N,) the nearest negative that is farther than the target, else the farthest negative, or -1 without any.

    Args:
        names: the function and the arguments to name in errors.
        x: (N, D).
        y: (M, D), or None for x.
        distance: one of `DISTANCES`.
        negatives: ids of rows and columns; pairs whose ids differ are negatives.
        target: (N,) the column of each row's positive.
        backend: as in `similarity_reduce`.
    """
    with torch.no_grad(), autocast.disabled(x):
        if distance == "cosine":
            x, y = _unit(x), None if y is None else _unit(y)
        else:
            # <x, y> - |y|^2 / 2 falls as the distance grows. It is made an inner product, with one more dimension,
            # because a bound on <x, y> cannot depend on row and column at once.
            x, y = from_common_row(_accumulated(x), None if y is None else _accumulated(y))
            y = x if y is None else y
            half = -y.square().sum(1, keepdim=True) / 2
            x, y = torch.cat([x, x.new_ones((x.shape[0], 1))], 1), torch.cat([y, half], 1)
        positive = take_rows(x if y is None else y, target)
        # Copies of the positive are no farther than it, whatever the order of summation rounds.
        slack = 8 * torch.finfo(x.dtype).eps * (x * positive).abs().sum(1)
        bound = (x * positive).sum(1) - slack
        farther = Fold("max", pairs=Pairs(differ=negatives, below=bound))
        farthest = Fold("max", pairs=Pairs(differ=negatives), negate=True)
        folded = fold(Problem.of(names, x, y), reduce=(farther, farthest), backend=backend)
    return torch.where(folded.row_argmax[0] >= 0, folded.row_argmax[0], folded.row_argmax[1])


def _accumulated(x: Tensor) -> Tensor:
    return x.to(checks.accumulator(x.dtype))


def _unit(x: Tensor) -> Tensor:
    return unit_rows(_accumulated(x))
