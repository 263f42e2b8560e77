"""Distances between rows, and the pairs that a sweep selects by distance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pairwise_distance

from .. import _autocast, _checks
from ..ops.folds import Fold
from ..ops.pairs import Pairs
from ..ops.similarity_reduce import fold

DISTANCES = ("euclidean", "sqeuclidean", "cosine")


def paired_distance(x: Tensor, y: Tensor, distance: str, eps: float = 0.0) -> Tensor:
    """(N,) distance of each row of `x` from the same row of `y`, both in the accumulation dtype.

    Computed from differences, which do not cancel where the rows are close. The gradient of the Euclidean distance at
    0 is 0; with `eps`, which is added to each difference as torch does, it is that of torch.
    """
    with _autocast.disabled(x):
        if distance == "euclidean":
            return pairwise_distance(x, y, eps=eps)
        if distance == "sqeuclidean":
            return (x - y).square().sum(1)
        # Half the squared difference of unit rows is 1 - cosine; a row of zeros, whose cosines are 0, lacks its half.
        lacks = (x == 0).all(1).to(x.dtype) + (y == 0).all(1).to(x.dtype)
        return ((normalize(x) - normalize(y)).square().sum(1) + lacks) / 2


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows that `index` names; anything finite for -1."""
    if x.shape[0] == 0:
        return x.new_zeros((index.shape[0], x.shape[1]))
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

    No gradient: the caller computes the distances of the selected pairs again, exactly and for O(N D).
    """
    with torch.no_grad(), _autocast.disabled(x):
        scale, col_bias = 1.0, None
        if distance == "cosine":
            # In the accumulation dtype: unit rows in a lower one would be rounded.
            x, y = _unit(x), None if y is None else _unit(y)
        else:
            # |y|^2 - 2 <x, y> orders each row's columns as the distance does.
            dtype = _checks.accumulator(x.dtype)
            scale, col_bias = 2.0, -(x if y is None else y).to(dtype).square().sum(1)
        folded = fold(
            x,
            y,
            reduce=(Fold("max", pairs=farthest, negate=True), Fold("max", pairs=nearest)),
            scale=scale,
            col_bias=col_bias,
            names=names,
            backend=backend,
        )
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
    with torch.no_grad(), _autocast.disabled(x):
        if distance == "cosine":
            x, y = _unit(x), None if y is None else _unit(y)
        else:
            # <x, y> - |y|^2 / 2 falls as the distance grows. It is made an inner product, with one more dimension,
            # because a bound on <x, y> cannot depend on row and column at once.
            x, y = _accumulated(x), _accumulated(x if y is None else y)
            half = -y.square().sum(1, keepdim=True) / 2
            x, y = torch.cat([x, torch.ones_like(x[:, :1])], 1), torch.cat([y, half], 1)
        positive = take_rows(x if y is None else y, target)
        # Copies of the positive are no farther than it, whatever the order of summation rounds.
        slack = 8 * torch.finfo(x.dtype).eps * (x * positive).abs().sum(1)
        bound = (x * positive).sum(1) - slack
        farther = Fold("max", pairs=Pairs(differ=negatives, below=bound))
        farthest = Fold("max", pairs=Pairs(differ=negatives), negate=True)
        folded = fold(x, y, reduce=(farther, farthest), names=names, backend=backend)
    return torch.where(folded.row_argmax[0] >= 0, folded.row_argmax[0], folded.row_argmax[1])


def _accumulated(x: Tensor) -> Tensor:
    return x.to(_checks.accumulator(x.dtype))


def _unit(x: Tensor) -> Tensor:
    return normalize(_accumulated(x))
