"""The kinds of rules for pairs: how a value is checked, handed to backends, cut into parts, and what it drops.

A rule of `Pairs` is one row of `rules.RULES`: an object of a class of this file, with a name and slots. All who deal
with rules go through that table, so that none but the inner loops of the kernels knows a rule by its name.
"""

# ruff: noqa: D102 - the methods are described once, in `Rule`.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import checks
from .column_lists import entries, in_order, lists_of_columns, lists_of_rows

if TYPE_CHECKING:
    from .rules import Slot

Bound = float | Tensor
Bounds = Bound | tuple[Bound, ...] | None
Data: TypeAlias = "Mapping[Slot, Tensor]"
Change = Callable[[Tensor], Tensor]


class Places(NamedTuple):
    """The pairs that a rule is asked about: some rows with all columns, or a list of pairs.

    Attributes:
        rows: the index that takes from a vector, which has a number for each row, what broadcasts to the pairs. Of some
            rows with all columns it is (slice, None).
        cols: the same for columns.
        similarity: the inner products of the pairs.
        guide: returns the guide's inner products of the pairs from the data of a set; for rules with a guide.
    """

    rows: Any
    cols: Any
    similarity: Tensor
    guide: Callable[[Data], Tensor] | None = None


@dataclass(frozen=True)
class Rule:
    """A rule: a field of `Pairs`, and the slots by which backends know it.

    Attributes:
        name: the field.
        rows: slots with one entry for each row.
        cols: slots with one entry for each column.
        others: slots of neither.
        slots: all of them.
        tensors: how many the tuple has that the value is; 0 where it is none.
        drops: whether it drops pairs; others change logits.
        counted: whether similarity_topk counts under its name what it drops.
        reads_similarity: whether it drops pairs because of their similarity.
    """

    name: str
    rows: tuple[Slot, ...] = ()
    cols: tuple[Slot, ...] = ()
    others: tuple[Slot, ...] = ()
    slots: tuple[Slot, ...] = field(init=False)
    tensors: ClassVar[int] = 0
    drops: ClassVar[bool] = True
    counted: ClassVar[bool] = False
    reads_similarity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", self.rows + self.cols + self.others)

    def is_in(self, data: Data) -> bool:
        """Whether a set has this rule."""
        return any(slot in data for slot in self.slots)

    def check(self, value: Any) -> Any:
        """Check what does not depend on the matrices; return the value as `Pairs` keeps it."""
        if self.tensors and (not isinstance(value, tuple) or len(value) != self.tensors):
            got = f"{len(value)} elements" if isinstance(value, tuple) else type(value).__name__
            raise TypeError(f"Pairs: {self.name} must be a tuple of {self.tensors} tensors, got {got}")
        return value

    def encode(self, function: str, value: Any, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        """Check the value against the matrices and return its tensors as backends take them."""
        raise NotImplementedError

    def map(self, value: Any, rows: Change, cols: Change) -> Any:
        """The value with functions applied to its vectors and matrices that have an entry for each row, or column."""
        return value

    def take_rows(self, value: Any, rows: Tensor) -> Any:
        """The value for some of the rows."""
        return self.map(value, lambda part: part[rows], _same)

    def take_cols(self, value: Any, begin: int, end: int) -> Any:
        """The value for the columns [begin, end)."""
        return self.map(value, _same, lambda part: part[begin:end])

    def pad_cols(self, value: Any, before: int, after: int) -> Any:
        """The value for more columns, of which its ids, lists, classes and bounds of columns say nothing."""
        return self.map(value, _same, lambda part: _padded(part, before, after))

    def passes_padding(self, value: Any) -> bool:
        """Whether the columns that `pad_cols` adds keep all their pairs."""
        return True

    def mask(self, data: Data, places: Places) -> Tensor:
        """True where the rule drops a pair, for sets that have it."""
        raise NotImplementedError

    def _ids(self, function: str, ids: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        name = f"pairs.{self.name} of the"
        rows = checks.check_index(function, f"{name} rows", ids[0], x.shape[0], "x", x)
        cols = checks.check_index(function, f"{name} columns", ids[1], y.shape[0], "x", x)
        return {self.rows[0]: rows, self.cols[0]: cols}


def _same(part: Tensor) -> Tensor:
    return part


def _padded(part: Tensor, before: int, after: int, passes: float = torch.inf) -> Tensor:
    """Ids with -1, bounds with one that everything passes, matrices with rows of 0."""
    if part.dim() == 2:
        return torch.nn.functional.pad(part, (0, 0, before, after))
    return torch.nn.functional.pad(part, (before, after), value=passes if part.is_floating_point() else -1)


class DiagonalRule(Rule):
    """One number, which is no tensor: `LogitSet.diagonal`."""

    def check(self, value: Any) -> int:
        return checks.integer("Pairs", self.name, value)

    def encode(self, function: str, value: Any, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        return {}

    def take_rows(self, value: Any, rows: Tensor) -> None:
        """Some rows have no diagonal: see `rule_slices.rows_of`."""

    def take_cols(self, value: Any, begin: int, end: int) -> int:
        return value - begin

    def pad_cols(self, value: Any, before: int, after: int) -> int:
        return value + before

    def passes_padding(self, value: Any) -> bool:
        """Not sure: where there are fewer columns than rows it may be among those that were added."""
        return False


@dataclass(frozen=True)
class MaskRule(Rule):
    """(N,) or (M,) bool, True where a row or a column takes part: written into the ids of `same` by `rules.resolve`."""

    of_columns: bool = False

    def check(self, value: Any) -> Tensor:
        value = checks.check_tensor("Pairs", self.name, value)
        if value.dtype != torch.bool or value.dim() != 1:
            raise TypeError(
                f"Pairs: {self.name} must be a vector of bool, True where one takes part, "
                f"got {checks.shape(value)} of {value.dtype}"
            )
        return value

    def encode(self, function: str, value: Tensor, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        size, name = (y if self.of_columns else x).shape[0], f"pairs.{self.name}"
        if value.shape[0] != size:
            raise ValueError(f"{function}: {name} must have shape ({size},), got {checks.shape(value)}")
        checks.check_device(function, "x", x, name, value)
        return {}

    def map(self, value: Tensor, rows: Change, cols: Change) -> Tensor:
        return (cols if self.of_columns else rows)(value).to(torch.bool)

    def pad_cols(self, value: Tensor, before: int, after: int) -> Tensor:
        return torch.nn.functional.pad(value, (before, after), value=True) if self.of_columns else value

    def passes_padding(self, value: Tensor) -> bool:
        return self.of_columns


@dataclass(frozen=True)
class IdsRule(Rule):
    """(row_ids, col_ids), of which -1 equals nothing."""

    drops_equal: bool = True
    tensors: ClassVar[int] = 2
    counted: ClassVar[bool] = True

    def encode(self, function: str, value: Any, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        return self._ids(function, value, x, y)

    def map(self, value: Any, rows: Change, cols: Change) -> Any:
        return rows(value[0]), cols(value[1])

    def passes_padding(self, value: Any) -> bool:
        return self.drops_equal

    def mask(self, data: Data, places: Places) -> Tensor:
        row, column = data[self.rows[0]][places.rows], data[self.cols[0]][places.cols]
        equal = (row == column) & (column != -1)  # of a chunk a row of entries, which are fast to read
        return equal if self.drops_equal else ~equal


class ListsRule(Rule):
    """(indptr, indices): the columns that each row drops."""

    tensors = 2

    def encode(self, function: str, value: Any, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        indptr, indices, ascend = checks.check_lists(function, self.name, value, x, y)
        if not ascend:
            indices, _ = in_order(indptr, indices)
        return {self.others[0]: indptr, self.others[1]: indices}

    def take_rows(self, value: Any, rows: Tensor) -> Any:
        return lists_of_rows(value[0], value[1], rows)

    def take_cols(self, value: Any, begin: int, end: int) -> Any:
        return lists_of_columns(value[0], value[1], begin, end)

    def pad_cols(self, value: Any, before: int, after: int) -> Any:
        return value[0], value[1] + before

    def mask(self, data: Data, places: Places) -> Tensor:
        """Of some rows with all columns only."""
        indptr, indices = (data[slot] for slot in self.others)
        row, column, _ = entries(indptr, indices, places.rows[0])
        drop = torch.zeros_like(places.similarity, dtype=torch.bool)
        drop[row, column] = True
        return drop


# ---- Bounds ----------------------------------------------------------------------------------------------------------


def limit(bound: Bound) -> tuple[str, Bound]:
    """A bound of any form that `Pairs` takes, as one: ("pair", number or 0-d), ("row", (N,)) or ("column", (M,)).

    One number is that of all pairs, whatever its shape: (1, 1) may be meant for one row and for one column. What has
    none of the forms is left as it is, for `BoundRule.encode` to refuse.
    """
    if not isinstance(bound, Tensor):
        return "pair", bound
    if bound.numel() == 1:
        return "pair", bound.reshape(())
    if bound.dim() == 1 or (bound.dim() == 2 and bound.shape[1] == 1):
        return "row", bound.reshape(-1)
    return ("column", bound[0]) if bound.dim() == 2 and bound.shape[0] == 1 else ("pair", bound)


def listed_bounds(*bounds: Bounds) -> tuple[Bound, ...]:
    """All bounds of these fields, in one tuple."""
    tuples = (given if isinstance(given, tuple) else (given,) for given in bounds if given is not None)
    return tuple(bound for each in tuples for bound in each)


def checked_bounds(function: str, name: str, value: Any) -> Any:
    """Bounds that are no tensors as floats, whatever they came as."""
    if isinstance(value, tuple):
        return tuple(checked_bounds(function, name, bound) for bound in value)
    return value if value is None or isinstance(value, Tensor) else checks.factor(function, name, value)


@dataclass(frozen=True)
class BoundRule(Rule):
    """Bounds of the similarity: from above where `sign` is 1, from below where it is -1. NaN passes."""

    sign: int = 1
    counted: ClassVar[bool] = True
    reads_similarity: ClassVar[bool] = True

    def check(self, value: Any) -> Any:
        return checked_bounds("Pairs", self.name, value)

    def encode(self, function: str, value: Any, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        """The least bound of each row and of each column (the largest, from below), where there are any."""
        name, n, m = f"pairs.{self.name}", x.shape[0], y.shape[0]
        dtype = checks.accumulator(x.dtype)
        data: dict[Slot, Tensor] = {}
        for bound in listed_bounds(value):
            per, values = limit(checks.factor(function, name, bound))
            slot, size = (self.cols[0], m) if per == "column" else (self.rows[0], n)
            if isinstance(values, Tensor):
                if values.dim() > 1 or (values.dim() and values.shape[0] != size):
                    raise ValueError(
                        f"{function}: {name} must be one number or have shape ({n},), ({n}, 1) or (1, {m}), "
                        f"got {checks.shape(bound)}"  # type: ignore[arg-type]
                    )
                checks.check_device(function, "x", x, name, values)
                values = values.detach().to(dtype).expand(size)
            else:
                values = torch.full((size,), values, dtype=dtype, device=x.device)
            if slot in data:
                values = (torch.minimum if self.sign > 0 else torch.maximum)(data[slot], values)
            data[slot] = values
        return data

    def decode(self, data: Data) -> tuple[Bound, ...] | None:
        """The bounds of a set in the forms that `Pairs` takes."""
        return tuple(data[slot][None] if cols else data[slot] for slot, cols in self._sides(data)) or None

    def _sides(self, data: Data) -> list[tuple[Slot, bool]]:
        """The slots that a set has, and whether of columns."""
        return [(slot, cols) for slot, cols in ((self.rows[0], False), (self.cols[0], True)) if slot in data]

    def map(self, value: Any, rows: Change, cols: Change) -> Any:
        change = {"pair": _same, "row": rows, "column": lambda bound: cols(bound)[None]}
        limits = (limit(bound) for bound in listed_bounds(value))
        return tuple(change[per](values) for per, values in limits)

    def pad_cols(self, value: Any, before: int, after: int) -> Any:
        return self.map(value, _same, lambda part: _padded(part, before, after, self.sign * torch.inf))

    def passes_padding(self, value: Any) -> bool:
        return all(limit(bound)[0] == "column" for bound in listed_bounds(value))

    def outside(self, data: Data, similarity: Tensor, places: Places) -> Tensor:
        """True where a similarity of the pairs is out of bounds."""
        bounds = [data[slot][places.cols if cols else places.rows] for slot, cols in self._sides(data)]
        outside = [similarity > bound if self.sign > 0 else similarity < bound for bound in bounds]
        return outside[0] if len(outside) == 1 else outside[0] | outside[1]

    def mask(self, data: Data, places: Places) -> Tensor:
        return self.outside(data, places.similarity, places)

    def relaxed(self, data: Data, by: Callable[[Tensor, bool], Tensor]) -> dict[Slot, Tensor]:
        """The bounds with more room: ``by(bounds, of columns)``."""
        return {slot: data[slot] + self.sign * by(data[slot], cols) for slot, cols in self._sides(data)}

    def closed(self, data: Data, rows: Tensor, cols: Tensor, dtype: torch.dtype) -> dict[Slot, Tensor]:
        """The bounds, which also drop all pairs of the rows and of the columns for which these are True."""
        passes = self.sign * torch.inf
        found: dict[Slot, Tensor] = {}
        for slot, shut in ((self.rows[0], rows), (self.cols[0], cols)):
            bound = data[slot] if slot in data else torch.full(shut.shape, passes, dtype=dtype, device=shut.device)
            found[slot] = torch.where(shut, -passes, bound)
        return found


# ---- What changes logits ---------------------------------------------------------------------------------------------


class ClassWeightRule(Rule):
    """(table, row_classes, col_classes): what is added to the logit of a pair of classes."""

    tensors = 3
    drops = False

    def encode(self, function: str, value: Any, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        name, table = f"pairs.{self.name}", value[0]
        checks.check_matrix(function, name, table)
        checks.check_constant(function, name, table)
        data = self._ids(function, value[1:], x, y)
        for side, classes, size in zip(("rows", "columns"), value[1:], table.shape, strict=True):
            checks.check_index_values(function, f"{name} classes of the {side}", classes, size, or_none=True)
        data[self.others[0]] = table.to(checks.accumulator(x.dtype))
        return data

    def map(self, value: Any, rows: Change, cols: Change) -> Any:
        return value[0], rows(value[1]), cols(value[2])

    def entry(self, data: Data, rows: Any, cols: Any) -> Tensor:
        """The table's entry of each pair, of indices as in `Places`; 0 where either has no class."""
        row, column = data[self.rows[0]][rows], data[self.cols[0]]
        # Lists that name no column hold 0 in its place, also where there is no column 0.
        column = column[cols] if column.shape[0] > 0 or not isinstance(cols, Tensor) else torch.full_like(cols, -1)
        found = data[self.others[0]][row.clamp_min(0), column.clamp_min(0)]
        return found.masked_fill((row < 0) | (column < 0), 0.0)


class FillRule(Rule):
    """The logit of pairs that the other rules drop."""

    drops = False

    def check(self, value: Any) -> float:
        return checks.number("Pairs", self.name, value, "[-inf, inf]")

    def encode(self, function: str, value: Any, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
        return {self.others[0]: torch.full((), value, dtype=checks.accumulator(x.dtype), device=x.device)}
