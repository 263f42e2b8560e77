"""Lists of columns, one for each row, as (indptr, indices): those of row i are indices[indptr[i]:indptr[i + 1]]."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .lists import pair_order


def check_lists(
    function: str, name: str, lists: tuple[Tensor, ...], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Check lists of columns per row; return (indptr, indices, order) with the columns of each row ascending.

    `order` says which of the given entries each returned one is.
    """
    indptr, indices, ascend = checks.check_lists(function, name, lists, x, y)
    if ascend:
        return indptr, indices, torch.arange(indices.shape[0], device=indices.device)
    return indptr, *in_order(indptr, indices)


def in_order(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of each row ascending, and which of the given entries each one is."""
    order = pair_order(row_of_each(indptr, indices), indices)
    return indices[order], order


def row_of_each(indptr: Tensor, indices: Tensor) -> Tensor:
    """(P,) the row of each entry. Not `repeat_interleave`, whose size depends on the data: it could not be traced."""
    place = torch.arange(indices.shape[0], device=indices.device)
    return torch.searchsorted(indptr, place, right=True) - 1


def entries(indptr: Tensor, indices: Tensor, rows: slice) -> tuple[Tensor, Tensor, slice]:
    """The entries of the lists of `rows`: row within the slice, column, and where they stand."""
    bounds = indptr[rows.start : rows.stop + 1]
    found = slice(int(bounds[0]), int(bounds[-1]))
    row = torch.repeat_interleave(bounds.diff())
    return row, indices[found], found


def lists_of_rows(indptr: Tensor, indices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of some of the rows."""
    lengths = indptr.diff()[rows]
    starts = lengths.cumsum(0) - lengths
    row = torch.repeat_interleave(lengths)
    at = torch.arange(len(row), device=row.device) - starts[row] + indptr[:-1][rows][row]
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), indices[at]


def lists_of_columns(indptr: Tensor, indices: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """What the lists name of the columns [begin, end), numbered from `begin`."""
    kept = (indices >= begin) & (indices < end)
    before = torch.cat([indptr.new_zeros(1), kept.cumsum(0)])
    return before[indptr], indices[kept] - begin


def joined(lists: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """For each row the columns of both lists."""
    row = torch.cat([torch.repeat_interleave(indptr.diff()) for indptr, _ in (lists, others)])
    order = row.argsort(stable=True)
    return lists[0] + others[0], torch.cat([lists[1], others[1]])[order]


def with_own_column(lists: tuple[Tensor, Tensor] | None, column: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Lists with one more column for each row, where there is such a column."""
    inside = (column >= 0) & (column < columns)
    own = torch.cat([column.new_zeros(1), inside.cumsum(0)]), column[inside]
    return own if lists is None else joined(lists, own)
