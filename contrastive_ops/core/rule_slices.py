"""The rules of `Pairs` for some of the rows or columns of the matrix that they were written for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .rules import Bound, Guide, Pairs

Bounds = Bound | tuple[Bound, ...] | None


def each_bound(bounds: Bounds) -> tuple[Bound, ...]:
    """The bounds that `Pairs.below`, `Pairs.above` and `Guide.below` may be.

    One number is that of all pairs, whatever its shape: (1, 1) may be meant for one row and for one column.
    """
    if bounds is None:
        return ()
    listed = bounds if isinstance(bounds, tuple) else (bounds,)
    return tuple(each.reshape(()) if isinstance(each, Tensor) and each.numel() == 1 else each for each in listed)


def map_bounds(bounds: Bounds, function: Callable[[Bound], Bound]) -> Bounds:
    """Apply a function to each of these bounds."""
    return None if bounds is None else tuple(function(each) for each in each_bound(bounds))


def rows_of(pairs: Pairs | None, rows: Tensor, columns: int) -> Pairs | None:
    """The rules for the rows that `rows` (int64) names, as rules of a matrix that has only these and all columns."""
    if pairs is None:
        return None

    def bound(value: Bound) -> Bound:
        per_row = isinstance(value, Tensor) and value.dim() > 0 and not (value.dim() == 2 and value.shape[0] == 1)
        return value[rows] if per_row else value  # type: ignore[index]

    def ids(value: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        return None if value is None else (value[0][rows], value[1])

    exclude = None if pairs.exclude is None else lists_of_rows(*pairs.exclude, rows)
    if pairs.diagonal is not None:
        exclude = with_own_column(exclude, rows + pairs.diagonal, columns)
    guide, weight = pairs.guide, pairs.log_weight
    if guide is not None:
        columns_of_guide = guide.gx if guide.gy is None else guide.gy
        guide = Guide(guide.gx[rows], columns_of_guide, map_bounds(guide.below, bound))  # type: ignore[arg-type]
    return replace(
        pairs,
        diagonal=None,
        differ=ids(pairs.differ),
        same=ids(pairs.same),
        exclude=exclude,
        below=map_bounds(pairs.below, bound),
        above=map_bounds(pairs.above, bound),
        guide=guide,
        log_weight=None if weight is None else (weight[0], weight[1][rows], weight[2]),
    )


def columns_of(pairs: Pairs | None, begin: int, end: int) -> Pairs | None:
    """The rules for the columns [begin, end), as rules of a matrix that has only these."""
    if pairs is None:
        return None

    def bound(value: Bound) -> Bound:
        per_column = isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == 1
        return value[:, begin:end] if per_column else value  # type: ignore[index]

    def ids(value: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        return None if value is None else (value[0], value[1][begin:end])

    guide, weight = pairs.guide, pairs.log_weight
    if guide is not None:
        columns = guide.gx if guide.gy is None else guide.gy
        guide = Guide(guide.gx, columns[begin:end], map_bounds(guide.below, bound))  # type: ignore[arg-type]
    return replace(
        pairs,
        diagonal=None if pairs.diagonal is None else pairs.diagonal - begin,
        differ=ids(pairs.differ),
        same=ids(pairs.same),
        exclude=None if pairs.exclude is None else _columns_of_lists(*pairs.exclude, begin, end),
        below=map_bounds(pairs.below, bound),
        above=map_bounds(pairs.above, bound),
        guide=guide,
        log_weight=None if weight is None else (weight[0], weight[1], weight[2][begin:end]),
    )


def lists_of_rows(indptr: Tensor, indices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of some of the rows."""
    lengths = indptr.diff()[rows]
    starts = lengths.cumsum(0) - lengths
    row = torch.repeat_interleave(lengths)
    at = torch.arange(len(row), device=row.device) - starts[row] + indptr[:-1][rows][row]
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), indices[at]


def _columns_of_lists(indptr: Tensor, indices: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    kept = (indices >= begin) & (indices < end)
    before = torch.cat([indptr.new_zeros(1), kept.cumsum(0)])
    return before[indptr], indices[kept] - begin


def with_own_column(lists: tuple[Tensor, Tensor] | None, column: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Lists with one more column for each row, where there is such a column."""
    indptr, indices = (column.new_zeros(len(column) + 1), column[:0]) if lists is None else lists
    row = torch.cat([torch.repeat_interleave(indptr.diff()), torch.arange(len(column), device=column.device)])
    column = torch.cat([indices, column])
    inside = (column >= 0) & (column < columns)
    row, column = row[inside], column[inside]
    order = row.argsort(stable=True)
    lengths = torch.bincount(row, minlength=len(indptr) - 1)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), column[order]
