"""Which pairs (row, column) of a similarity matrix take part."""

# ruff: noqa: D102 - the methods of rules are described in `Rule`.

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks
from . import rule_kinds as kinds
from .results import pytree
from .rule_kinds import Bound, Change, Data, Places, Rule, checked_bounds


class Slot(enum.IntEnum):
    """What a tensor in `pair_data` is."""

    DIFFER_ROWS = 0
    DIFFER_COLS = 1
    SAME_ROWS = 2
    SAME_COLS = 3
    EXCLUDE_INDPTR = 4
    EXCLUDE_INDICES = 5
    BELOW_ROWS = 6
    BELOW_COLS = 7
    ABOVE_ROWS = 8
    ABOVE_COLS = 9
    GUIDE_X = 10
    GUIDE_Y = 11
    GUIDE_BELOW_ROWS = 12
    GUIDE_BELOW_COLS = 13
    CLASS_ROWS = 14
    CLASS_COLS = 15
    LOG_WEIGHT = 16
    FILL = 17
    LINEAR_INDPTR = 18
    LINEAR_INDICES = 19
    LINEAR_WEIGHT = 20
    CODE_SCALE = 21
    # Of the first set: inner products are multiplied by both; what is asked of operators, not of backends.
    ROW_FACTOR = 22
    COL_FACTOR = 23
    UNIT = 24


@pytree
@dataclass(frozen=True, eq=False)
class Guide:
    """A second, frozen similarity that drops pairs: those whose guide similarity exceeds a bound.

    Args:
        gx: (N, D') the guide's rows, in any floating dtype; not differentiated.
        gy: (M, D') the guide's columns; None where a matrix is compared with itself.
        below: keep pairs whose guide similarity <gx_i, gy_j> is at most this; forms as `Pairs.below`.
    """

    gx: Tensor
    gy: Tensor | None
    below: Bound | tuple[Bound, ...]

    def __post_init__(self) -> None:
        """Check what does not depend on the matrices."""
        object.__setattr__(self, "below", checked_bounds("Guide", "below", self.below))


class GuideRule(Rule):
    """A `Guide`: the rows of its matrices, and the bounds of their inner products."""

    counted = True
    bounds = kinds.BoundRule("guide.below", (Slot.GUIDE_BELOW_ROWS,), (Slot.GUIDE_BELOW_COLS,))

    def check(self, value: Any) -> Guide:
        if not isinstance(value, Guide):
            raise TypeError(f"Pairs: {self.name} must be a Guide or None, got {type(value).__name__}")
        return value

    def encode(self, function: str, value: Guide, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        gx, gy = value.gx, value.gx if value.gy is None else value.gy
        checks.check_matrices(function, "guide.gx", gx, "guide.gy", gy)
        checks.check_device(function, "x", x, "guide.gx", gx)
        for name, matrix, like in (("gx", gx, x), ("gy", gy, y)):
            if matrix.shape[0] != like.shape[0]:
                raise ValueError(f"{function}: guide.{name} must have {like.shape[0]} rows, got {checks.shape(matrix)}")
        rows = gx.detach().to(checks.accumulator(x.dtype))
        data = {self.rows[0]: rows, self.cols[0]: rows if value.gy is None else gy.detach().to(rows.dtype)}
        data.update(self.bounds.encode(function, value.below, x, y))
        return data

    def map(self, value: Guide, rows: Change, cols: Change) -> Guide:
        gy = value.gx if value.gy is None else value.gy
        return Guide(rows(value.gx), cols(gy), self.bounds.map(value.below, rows, cols))

    def passes_padding(self, value: Guide) -> bool:
        return self.bounds.passes_padding(value.below)

    def mask(self, data: Data, places: Places) -> Tensor:
        return self.bounds.outside(data, places.guide(data), places)  # type: ignore[misc]


# All rules, in the order in which they are checked. Those that are counted have this order in `STATISTICS`, too.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        kinds.DiagonalRule("diagonal"),
        kinds.IdsRule("differ", (Slot.DIFFER_ROWS,), (Slot.DIFFER_COLS,)),
        kinds.IdsRule("same", (Slot.SAME_ROWS,), (Slot.SAME_COLS,), drops_equal=False),
        kinds.ListsRule("exclude", others=(Slot.EXCLUDE_INDPTR, Slot.EXCLUDE_INDICES)),
        kinds.BoundRule("below", (Slot.BELOW_ROWS,), (Slot.BELOW_COLS,)),
        kinds.BoundRule("above", (Slot.ABOVE_ROWS,), (Slot.ABOVE_COLS,), sign=-1),
        GuideRule("guide", (Slot.GUIDE_X, Slot.GUIDE_BELOW_ROWS), (Slot.GUIDE_Y, Slot.GUIDE_BELOW_COLS)),
        kinds.ClassWeightRule("log_weight", (Slot.CLASS_ROWS,), (Slot.CLASS_COLS,), (Slot.LOG_WEIGHT,)),
        kinds.FillRule("fill", others=(Slot.FILL,)),
        kinds.MaskRule("rows"),
        kinds.MaskRule("columns", of_columns=True),
    )
}

# What similarity_topk counts over all columns of a row. The position is the row of its `statistics`.
STATISTICS = ("eligible", "higher", *(rule.name for rule in RULES.values() if rule.counted))


@pytree
@dataclass(frozen=True, eq=False)
class Pairs:
    """Rules for the pairs that take part in a fold; all rules are ANDed and none needs an N x M tensor.

    Equivalent to::

        s = x @ y.T                                                         # the similarity, without scale and biases
        keep = torch.ones(N, M, dtype=torch.bool)
        keep &= torch.arange(N)[:, None] + diagonal != torch.arange(M)      # diagonal
        equal = lambda r, c: (r[:, None] == c) & (r[:, None] != -1)
        keep &= ~equal(*differ) & equal(*same)                              # differ, same
        keep &= rows[:, None] & columns                                     # rows, columns
        keep[row, column] = False                                           # exclude, for each column in the row's list
        keep &= ~(s > below[:, None]) & ~(s < above[:, None])               # below, above
        keep &= ~(gx @ gy.T > guide.below[:, None])                         # guide
        logits = logits + log_weight[row_class[:, None], column_class]      # log_weight
        logits = logits.masked_fill(~keep, -torch.inf if fill is None else fill)

    The target of a row is never dropped.

    Args:
        diagonal: drop column ``i + diagonal`` of row ``i`` (0 drops each row's own column). None drops nothing.
        differ: (row_ids (N,), col_ids (M,)) int64: keep pairs whose ids differ. Any int64; -1 equals nothing.
        same: (row_ids, col_ids) int64: keep pairs with equal ids. -1 equals nothing.
        exclude: (indptr (N + 1,), indices) int64: row i drops the columns ``indices[indptr[i]:indptr[i + 1]]``.
            In any order; a column that is listed twice is dropped once. One that does not exist is an error that names
            the row.
        below: keep pairs whose similarity <x_i, y_j> (no scale, no bias) is at most this: a float, a 0-d tensor, (N,)
            or (N, 1) for a bound per row, (1, M) for one per column, or a tuple of these, all of which must hold.
        above: keep pairs whose similarity is at least this; the same forms.
        guide: a second similarity that drops pairs; computed tile by tile with the first.
        log_weight: (table (C, C'), row_classes (N,), col_classes (M,)): add ``table[row_class, col_class]`` to the
            logit, nothing for class -1.
        fill: the constant logit of dropped pairs, which then take part without a gradient (some papers' masks mean 0).
            None removes them.
        rows: (N,) bool: False for rows that take part in no pair, such as padding. A loss still counts them, with 0 or
            what their target gives: ``weight`` leaves them out of its mean. Not with ``fill``. What they drop is
            counted as that of ``same``.
        columns: (M,) bool: False for columns that take part in no pair but that of their target.

    Note:
        Bounds and the guide decide and are not differentiated. NaN similarities pass every bound, so that they
        propagate. A pair that a rule drops reaches no value, whatever its rows hold. Nor does a row that takes part in
        no pair reach a gradient; its own is 0. A row with NaN or infinity that takes part in any pair, as a target or
        in ``linear`` too, does: NaN arrives also in the gradients of rows that it has no pair with, as in a product of
        matrices. A bias or a class weight of -inf is no rule: added to NaN it is NaN.
        Not differentiable in ``log_weight``: a table that requires a gradient is refused.
    """

    diagonal: int | None = None
    differ: tuple[Tensor, Tensor] | None = None
    same: tuple[Tensor, Tensor] | None = None
    exclude: tuple[Tensor, Tensor] | None = None
    below: Bound | tuple[Bound, ...] | None = None
    above: Bound | tuple[Bound, ...] | None = None
    guide: Guide | None = None
    log_weight: tuple[Tensor, Tensor, Tensor] | None = None
    fill: float | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        """Check what does not depend on the matrices."""
        for rule, value in given(self):
            object.__setattr__(self, rule.name, rule.check(value))
        if self.fill is not None and (self.rows is not None or self.columns is not None):
            raise ValueError(
                f"Pairs: rows and columns must be None with fill, got masks: fill={self.fill} would be the logit of "
                "the pairs that they drop"
            )


def given(pairs: Pairs, rules: Iterable[Rule] | None = None) -> list[tuple[Rule, Any]]:
    """The rules that these pairs have, and their values."""
    found = []
    for rule in RULES.values() if rules is None else rules:
        value = getattr(pairs, rule.name)
        if value is not None:
            found.append((rule, value))
    return found


def bound_rules() -> list[kinds.BoundRule]:
    """The rules that are bounds of the similarity."""
    return [rule for rule in RULES.values() if isinstance(rule, kinds.BoundRule)]


def resolve(
    function: str, pairs: Pairs, x: Tensor, y: Tensor, rules: Iterable[Rule] | None = None
) -> dict[Slot, Tensor]:
    """Check the rules (or some) against the matrices they are for; return their tensors as the backends take them."""
    data: dict[Slot, Tensor] = {}
    for rule, value in given(pairs, rules):
        data.update(rule.encode(function, value, x, y))
    if pairs.rows is not None or pairs.columns is not None:
        for slots, size, mask in (
            (RULES["same"].rows, x.shape[0], pairs.rows),
            (RULES["same"].cols, y.shape[0], pairs.columns),
        ):
            ids = data[slots[0]] if slots[0] in data else x.new_zeros((size,), dtype=torch.int64)
            data[slots[0]] = ids if mask is None else ids.masked_fill(~mask, -1)  # which equals nothing
    return data
