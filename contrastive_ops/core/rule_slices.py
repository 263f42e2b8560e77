"""The rules of `Pairs` for some of the rows or columns of the matrix that they were written for."""

from __future__ import annotations

from torch import Tensor

from .column_lists import with_own_column
from .records import changed
from .rules import Pairs, given


def rows_of(pairs: Pairs | None, rows: Tensor, columns: int) -> Pairs | None:
    """The rules for the rows that `rows` (int64) names, as rules of a matrix that has only these and all columns."""
    if pairs is None:
        return None
    taken = changed(pairs, **{rule.name: rule.take_rows(value, rows) for rule, value in given(pairs)})
    if pairs.diagonal is None:
        return taken
    return changed(taken, exclude=with_own_column(taken.exclude, rows + pairs.diagonal, columns))


def columns_of(pairs: Pairs | None, begin: int, end: int) -> Pairs | None:
    """The rules for the columns [begin, end), as rules of a matrix that has only these."""
    if pairs is None:
        return None
    return changed(pairs, **{rule.name: rule.take_cols(value, begin, end) for rule, value in given(pairs)})


def columns_named(pairs: object) -> int | None:
    """The number of columns that the rules are written for, where they tell."""
    sizes: list[int] = []

    def note(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part

    if isinstance(pairs, Pairs):
        for rule, value in given(pairs):
            rule.map(value, lambda part: part, note)
    return sizes[0] if sizes else None
