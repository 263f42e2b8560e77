"""Rows that take part in no pair are 0 in gradients, whatever they hold.

A pair that a rule drops has weight 0, and the products that gradients are would add 0 times NaN. So before a backward
pass, rows that hold NaN or infinity and that the rules leave out of every pair are replaced by 0. Others keep theirs:
a NaN that takes part is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import accumulator, may_read
from ..core.masks import left_out
from ..core.numerics import CHUNK_ELEMENTS, chunks_of_rows
from ..core.problem import Layout, LogitSet
from ..core.records import changed
from ..core.rules import RULES, Slot, bound_rules
from ..reference.pairs import SetOfChunk, inner_products


def cleaned(
    x: Tensor, y: Tensor | None, target: Tensor | None, pair_data: Sequence[Tensor], spec: Sequence[int]
) -> tuple[Tensor, Tensor | None, list[Tensor], list[int]]:
    """x, y, pair_data and spec without what idle rows hold.

    Costs a look at x and y where all numbers are finite, and else the rules of all pairs.
    """
    same = x, y, list(pair_data), list(spec)
    layout = Layout.decode(pair_data, spec)
    columns = x if y is None else y
    if not may_leave_out(layout, len(x), len(columns)) or (all_finite(x) and (y is None or all_finite(y))):
        return same
    idle_rows, idle_columns = _find_idle(layout, x, y, target, _not_finite(x), _not_finite(columns))
    if not bool(idle_rows.any() | idle_columns.any()):
        return same
    sets = tuple(_still_dropped(each, idle_rows, idle_columns, accumulator(x.dtype)) for each in layout.sets)
    rows = left_out(x, ~idle_rows)
    return rows, None if y is None else left_out(y, ~idle_columns), *Layout(sets, layout.folds).encode()


def may_leave_out(layout: Layout, rows: int, columns: int) -> bool:
    """Whether the rules of any set may leave a row or a column without a pair."""
    by_diagonal = min(rows, columns) <= 1 and any(each.diagonal is not None for each in layout.sets)
    sets = [each.data for each in layout.sets if each.data]
    return by_diagonal or any(rule.drops and rule.is_in(data) for data in sets for rule in RULES.values())


def all_finite(x: Tensor) -> bool:
    """Whether x has no NaN and no infinity; True where nobody may look. Waits for a GPU that is not being captured."""
    if not may_read(x, waits=True) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    x = x.detach()
    # A sum that overflows is looked at again.
    return math.isfinite(x.sum(dtype=accumulator(x.dtype)).item()) or bool(x.isfinite().all())


def _not_finite(x: Tensor) -> Tensor:
    return ~x.detach().isfinite().all(1)


def _find_idle(
    layout: Layout, x: Tensor, y: Tensor | None, target: Tensor | None, bad_rows: Tensor, bad_columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the bad rows, and of the bad columns, take part in no pair of any set."""
    rows_of_x, columns = x.detach(), (x if y is None else y).detach()
    if Slot.UNIT in layout.sets[0].data:
        rows_of_x, columns = (F.normalize(each.to(accumulator(each.dtype))) for each in (rows_of_x, columns))
    rows, cols = (torch.zeros_like(bad) for bad in (bad_rows, bad_columns))
    looks = any(rule.reads_similarity and rule.is_in(each.data) for each in layout.sets for rule in RULES.values())
    nothing = x.new_zeros((), dtype=accumulator(x.dtype))
    any_column = bool(bad_columns.any())
    for part in chunks_of_rows(len(x), max(1, CHUNK_ELEMENTS // max(len(columns), 1))):
        if not any_column and not bool(bad_rows[part].any()):
            continue
        shape = part.stop - part.start, len(columns)
        dots = inner_products(rows_of_x[part], columns) if looks else nothing.expand(shape)
        takes_part = _named(layout, part, dots, target)
        for each in layout.sets:
            of_chunk = SetOfChunk(each, part, dots, dots, 1, dots, target)
            takes_part |= of_chunk.without_left_out(torch.ones_like(dots, dtype=torch.bool), False, overwrite=True)
        rows[part] = takes_part.any(1)
        cols |= takes_part.any(0)
    if y is None:
        rows = cols = rows | cols
    return bad_rows & ~rows, bad_columns & ~cols


def _named(layout: Layout, part: slice, dots: Tensor, target: Tensor | None) -> Tensor:
    """True for targets and listed pairs, which no rule drops."""
    named = torch.zeros_like(dots, dtype=torch.bool)
    if target is not None:
        own = target[part, None]
        there = (own >= 0) & (own < dots.shape[1])
        named.scatter_(1, torch.where(there, own, 0), there)
    if layout.has_linear:
        data = layout.sets[0].data
        bounds = data[Slot.LINEAR_INDPTR][part.start : part.stop + 1]
        named[torch.repeat_interleave(bounds.diff()), data[Slot.LINEAR_INDICES][bounds[0] : bounds[-1]]] = True
    return named


def _still_dropped(each: LogitSet, idle_rows: Tensor, idle_columns: Tensor, dtype: torch.dtype) -> LogitSet:
    """The set, whose bounds drop the pairs of idle rows although their similarity is 0 now."""
    for rule in bound_rules():
        if rule.is_in(each.data):
            bounds = rule.closed(each.data, idle_rows, idle_columns, dtype)
            each = changed(each, data={**each.data, **bounds})
    return each


def cleaned_values(values: Tensor, x: Tensor, y: Tensor, pair_data: Sequence[Tensor], spec: Sequence[int]) -> Tensor:
    """The values of columns, without what those of idle columns hold."""
    layout = Layout.decode(pair_data, spec)
    if not may_leave_out(layout, len(x), len(y)) or all_finite(values):
        return values
    nothing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return left_out(values, ~_find_idle(layout, x, y, None, nothing, _not_finite(values))[1])


def without_idle_rows(problem: Sequence[Any], x: int, target: int | None, pair_data: int) -> list[Any]:
    """The arguments of an operator, in which x, y, pair_data and spec stand at these places, `cleaned`."""
    arguments = list(problem)
    given = (*arguments[x : x + 2], None if target is None else arguments[target])
    arguments[x], arguments[x + 1], *described = cleaned(*given, *arguments[pair_data : pair_data + 2])
    arguments[pair_data : pair_data + 2] = described
    return arguments


def clean_rows(given: dict[str, Any], backward: bool) -> dict[str, Any]:
    """The same for operators that are declared: what is replaced before backward."""
    if not backward:
        return {}
    found = cleaned(given["x"], given["y"], given.get("target"), given["pair_data"], given["spec"])
    return dict(zip(("x", "y", "pair_data", "spec"), found, strict=True))
