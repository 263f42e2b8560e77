"""Rules of losses whose columns are several blocks: keys and negatives, queries and documents, a batch and a queue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.records import changed
from ..core.rules import Pairs, given


def padded(pairs: Pairs, before: int, after: int) -> Pairs:
    """Rules of some columns as those of a matrix with more columns before and after them, which no rule names."""
    return changed(pairs, **{rule.name: rule.pad_cols(value, before, after) for rule, value in given(pairs)})


def passes_padding(pairs: Pairs) -> bool:
    """Whether the columns that `padded` adds keep all their pairs."""
    return all(rule.passes_padding(value) for rule, value in given(pairs))


def _passes(pairs: Pairs, rows: int, before: int, size: int, after: int) -> bool:
    """`passes_padding` where it is known how many rows and columns there are: a diagonal may stay in its block."""
    diagonal = pairs.diagonal
    if diagonal is not None and (diagonal >= 0 or not before) and (rows + diagonal <= size or not after):
        pairs = changed(pairs, diagonal=None)
    return passes_padding(pairs)


def within(function: str, name: str, pairs: Pairs | None, rows: Tensor, before: int, size: int, after: int) -> Pairs:
    """The rules, and that only the `size` columns after `before` others take part.

    Args:
        function: the loss, for errors.
        name: the argument, for errors.
        pairs: rules of these columns.
        rows: a tensor with as many rows as the matrix.
        before: how many columns stand before them.
        size: how many they are.
        after: how many columns follow.
    """
    refuse(function, name, pairs, {"fill": "each row would meet the other columns with that logit"})
    found = padded(Pairs() if pairs is None else pairs, before, after)
    if found.same is not None:
        return found  # the ids of other columns are -1, which equals nothing
    ids = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    columns = ids.new_full((before + size + after,), -1)
    columns[before : before + size] = 0
    return changed(found, same=(ids, columns))


def of_blocks(
    function: str,
    rows: Tensor,
    first: tuple[str, Pairs | None, int],
    second: tuple[str, Pairs | None, int],
) -> tuple[Pairs | None, Pairs | None]:
    """The rules of a matrix whose columns are two blocks, and more rules where one set cannot say those of both.

    Args:
        function: the loss, for errors.
        rows: a tensor with as many rows as the matrix.
        first: the argument, its rules and the number of its columns.
        second: the same of the columns that follow.
    """
    (name, pairs, size), (other_name, others, more) = first, second
    if pairs is None and others is None:
        return None, None
    if others is None and pairs is not None and _passes(pairs, rows.shape[0], 0, size, more):
        return padded(pairs, 0, more), None
    if pairs is None and others is not None and _passes(others, rows.shape[0], size, more, 0):
        return padded(others, size, 0), None
    of_first = within(function, name, pairs, rows, 0, size, more)
    of_second = within(function, other_name, others, rows, size, more, 0)
    if of_first.guide is None or of_second.guide is None:
        return of_first, of_second
    if of_first.guide.gx is not of_second.guide.gx:
        raise NotImplementedError(
            f"{function}: {other_name}.guide must have the gx of {name}.guide, got another tensor\n"
            "  one sweep has one guide"
        )
    columns = of_first.guide.gy + of_second.guide.gy  # type: ignore[operator]  # rows of 0 where the other has its own
    first_guide, second_guide = (changed(each.guide, gy=columns) for each in (of_first, of_second))
    return changed(of_first, guide=first_guide), changed(of_second, guide=second_guide)


def refuse(function: str, name: str, pairs: Pairs | None, rules: dict[str, str]) -> None:
    """Raise for rules that a loss cannot have; each with the reason."""
    for rule, reason in rules.items():
        value: Any = None if pairs is None else getattr(pairs, rule)
        if value is not None:
            got = value if isinstance(value, (int, float)) else type(value).__name__
            raise ValueError(f"{function}: {name}.{rule} must be None, got {got}: {reason}")
