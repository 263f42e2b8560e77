"""What every backend of a primitive is given: matrices, logit sets, folds and pair rules as arguments of an operator.

Operators take tensors, lists of tensors and integers. A *logit set* is one reading of the inner products, its scale,
sign and rules for pairs; a *fold* reduces one set along one direction. `Layout.encode` turns both into ``pair_data``
and ``spec``, which `Layout.decode` reads again, as csrc/similarity_decode.h does.

    spec = [sets, folds,
            per set:  scale_of, negate, has_diagonal, diagonal, entries, slot of each entry in pair_data,
            per fold: set, kind, cols]

The scales of all sets are one vector, one after another: 1, N or M numbers each.

A public function makes a `Problem` of its matrices, which checks them, and `LogitSets` of its scales and rules.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autocast, checks
from .column_lists import check_lists, lists_of_rows, with_own_column
from .fold_kinds import FOLDS
from .records import changed
from .rules import RULES, Guide, Pairs, Slot, resolve

# The names of all folds. The position is the number in `spec`.
KINDS = tuple(FOLDS)


class ScaleOf(enum.IntEnum):
    """What the scale of a set belongs to."""

    ALL = 0
    ROWS = 1
    COLUMNS = 2


class SetFold(NamedTuple):
    """One set, folded by `kind` along each row, or along each column."""

    set: int
    kind: str
    cols: bool


@dataclass(frozen=True)
class LogitSet:
    """One reading of the inner products: l = +-(scale * <x_i, y_j> + biases), and the pairs that take part.

    The first set is that of the targets' logits and of the linear lists.
    """

    scale_of: ScaleOf = ScaleOf.ALL
    negate: bool = False
    diagonal: int | None = None
    data: dict[Slot, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """All sets and folds of one call."""

    sets: tuple[LogitSet, ...]
    folds: tuple[SetFold, ...]

    def encode(self) -> tuple[list[Tensor], list[int]]:
        """Return (pair_data, spec)."""
        pair_data: list[Tensor] = []
        spec = [len(self.sets), len(self.folds)]
        for each in self.sets:
            has_diagonal = each.diagonal is not None
            spec += [int(each.scale_of), int(each.negate), int(has_diagonal), each.diagonal or 0, len(each.data)]
            spec += [int(slot) for slot in each.data]
            pair_data += each.data.values()
        for fold in self.folds:
            spec += [fold.set, list(FOLDS).index(fold.kind), int(fold.cols)]
        return pair_data, spec

    @classmethod
    def decode(cls, pair_data: Sequence[Tensor], spec: Sequence[int]) -> Layout:
        """The inverse of `encode`."""
        numbers, tensors = iter(spec), iter(pair_data)
        set_count, fold_count = next(numbers), next(numbers)
        sets = []
        for _ in range(set_count):
            scale_of, negate, has_diagonal, diagonal, entries = (next(numbers) for _ in range(5))
            slots = [Slot(next(numbers)) for _ in range(entries)]
            data = {slot: next(tensors) for slot in slots}
            sets.append(LogitSet(ScaleOf(scale_of), bool(negate), diagonal if has_diagonal else None, data))
        folds = []
        for _ in range(fold_count):
            index, kind, cols = (next(numbers) for _ in range(3))
            folds.append(SetFold(index, list(FOLDS)[kind], bool(cols)))
        return cls(tuple(sets), tuple(folds))

    def scale_slices(self, rows: int, columns: int) -> list[slice]:
        """Where each set's scale stands in the vector of scales."""
        size = {ScaleOf.ALL: 1, ScaleOf.ROWS: rows, ScaleOf.COLUMNS: columns}
        ends = list(itertools.accumulate((size[each.scale_of] for each in self.sets), initial=0))
        return [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def sizes(self, rows: int, columns: int) -> list[int]:
        """The number of results of each fold."""
        return [columns if fold.cols else rows for fold in self.folds]

    def argmax_sizes(self, rows: int, columns: int) -> list[int]:
        """The number of winners of each fold: none unless it is a maximum."""
        sizes = self.sizes(rows, columns)
        return [size if FOLDS[fold.kind].has_winner else 0 for fold, size in zip(self.folds, sizes, strict=True)]

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """What inner products are multiplied by: for each row and for each column."""
        data = self.sets[0].data if self.sets else {}
        return data.get(Slot.ROW_FACTOR), data.get(Slot.COL_FACTOR)

    @property
    def has_linear(self) -> bool:
        """Whether the first set has linear lists."""
        return bool(self.sets) and Slot.LINEAR_INDPTR in self.sets[0].data


def take_rows(
    rows: Tensor,
    shape: tuple[int, int],
    scale: Tensor,
    row_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
) -> tuple[Tensor, Tensor | None, list[Tensor], list[int]]:
    """Return (scale, row_bias, pair_data, spec) of some of the rows of an (N, M) problem without folds."""
    layout = Layout.decode(pair_data, spec)
    scales = [
        scale[own][rows] if each.scale_of == ScaleOf.ROWS else scale[own]
        for each, own in zip(layout.sets, layout.scale_slices(*shape), strict=True)
    ]
    sets = tuple(_rows_of_set(each, rows, shape[1]) for each in layout.sets)
    bias = None if row_bias is None else row_bias[rows]
    return torch.cat(scales), bias, *Layout(sets, ()).encode()


def _rows_of_set(each: LogitSet, rows: Tensor, columns: int) -> LogitSet:
    row_slots = {slot for rule in RULES.values() for slot in rule.rows}
    data = {slot: tensor[rows] if slot in row_slots else tensor for slot, tensor in each.data.items()}
    lists = (data[Slot.EXCLUDE_INDPTR], data[Slot.EXCLUDE_INDICES]) if Slot.EXCLUDE_INDPTR in data else None
    lists = None if lists is None else lists_of_rows(*lists, rows)
    if each.diagonal is not None:
        lists = with_own_column(lists, rows + each.diagonal, columns)
    if lists is not None:
        data[Slot.EXCLUDE_INDPTR], data[Slot.EXCLUDE_INDICES] = lists
    return changed(each, diagonal=None, data=data)


def with_factors(residual: Tensor, partner: Tensor, own: Tensor | None, other: Tensor | None) -> Tensor:
    """What rounding took from the weights of each row, in units of its partner's row, where rows have factors."""
    if own is None or other is None:
        return residual
    there = (partner >= 0) & (partner < len(other))
    return residual * own * torch.where(there, other[torch.where(there, partner, 0)], 0.0)


# ---- From the arguments of a call ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Problem:
    """The matrices of a call and what belongs to their rows and columns, checked and in the dtypes that backends take.

    Attributes:
        names: what errors call the function, x and y.
        x: (N, D).
        y: (M, D); None where x is compared with itself.
        row_bias: (N,) or None.
        col_bias: (M,) or None.
        target: (N,) int64 or None.
    """

    names: tuple[str, str, str]
    x: Tensor
    y: Tensor | None
    row_bias: Tensor | None = None
    col_bias: Tensor | None = None
    target: Tensor | None = None

    @classmethod
    def of(
        cls,
        names: tuple[str, str, str],
        x: Tensor,
        y: Tensor | None,
        row_bias: Tensor | None = None,
        col_bias: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Problem:
        """Check the arguments, and cast them as an autocast region does."""
        function, x_name, y_name = names
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            x, y = autocast.cast(x, y)
        if y is None:
            checks.check_matrix(function, x_name, x)
        else:
            checks.check_matrices(function, x_name, x, y_name, y)
        if row_bias is not None:
            checks.check_vector(function, "row_bias", row_bias, x.shape[0], x_name, x)
            row_bias = row_bias.to(checks.accumulator(x.dtype))
        if col_bias is not None:
            checks.check_vector(function, "col_bias", col_bias, (x if y is None else y).shape[0], x_name, x)
            col_bias = col_bias.to(checks.accumulator(x.dtype))
        if target is not None:
            target = checks.check_index(function, "target", target, x.shape[0], x_name, x)
        return cls(names, x, y, row_bias, col_bias, target)

    def wide(self) -> Problem:
        """The same in the accumulation dtype."""
        dtype = checks.accumulator(self.x.dtype)
        y = None if self.y is None else self.y.to(dtype)
        return Problem(self.names, self.x.to(dtype), y, self.row_bias, self.col_bias, self.target)

    @property
    def columns(self) -> Tensor:
        """(M, D): y, or x where it is compared with itself."""
        return self.x if self.y is None else self.y


class LogitSets:
    """Logit sets of one call: folds that agree in scale, pairs and sign share one."""

    def __init__(self, problem: Problem, unit: bool = False) -> None:
        self.problem, self.unit = problem, unit
        self.sets: list[LogitSet] = []
        self._scales: list[Tensor] = []
        self._known: list[tuple[Any, ...]] = []
        self._resolved: list[tuple[Pairs, dict[Slot, Tensor]]] = []

    def add(
        self,
        scale: float | Tensor,
        pairs: Pairs | None,
        negate: bool = False,
        of_columns: bool = False,
        linear: tuple[Tensor, ...] | None = None,
        bias: float | Tensor | None = None,
    ) -> int:
        """Return the number of the set, which is made if there is none like it."""
        for index, (known_scale, known_bias, known_pairs, *known) in enumerate(self._known):
            same = _is_same(scale, known_scale) and _is_same(bias, known_bias)
            if same and pairs is known_pairs and tuple(known) == (negate, of_columns):
                return index
        (function, x_name, y_name), x = self.problem.names, self.problem.x
        data = {Slot.UNIT: x.new_empty((0,))} if self.unit and not self.sets else {}
        diagonal = None
        if pairs is not None:
            data.update(self._rules(pairs))
            diagonal = pairs.diagonal
        if bias is not None:
            data.update(self._bias(bias, data))
        if linear is not None:
            data.update(_linear_lists(function, linear, x, self.problem.columns))  # |= cannot be traced by torch 2.6
        if of_columns:
            tensor = checks.scale_tensor(function, scale, y_name, self.problem.columns, "col_scale")
        else:
            tensor = checks.scale_tensor(function, scale, x_name, x)
        per_item = ScaleOf.COLUMNS if of_columns else ScaleOf.ROWS
        self.sets.append(LogitSet(per_item if tensor.dim() else ScaleOf.ALL, negate, diagonal, data))
        self._scales.append(tensor.reshape(-1))
        self._known.append((scale, bias, pairs, negate, of_columns))
        return len(self.sets) - 1

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """The matrices, the scales of all sets, one after another, and the biases."""
        p, scales = self.problem, self._scales
        return p.x, p.y, scales[0] if len(scales) == 1 else torch.cat(scales), p.row_bias, p.col_bias

    def layout(self, *folds: SetFold) -> Layout:
        """All sets, and these folds of them."""
        return Layout(tuple(self.sets), folds)

    def _rules(self, pairs: Pairs) -> dict[Slot, Tensor]:
        function = self.problem.names[0]
        if not isinstance(pairs, Pairs):
            raise TypeError(f"{function}: pairs must be Pairs or None, got {type(pairs).__name__}")
        for known, data in self._resolved:
            if known is pairs:
                return data
        if pairs.guide is not None:
            self._check_guide(function, pairs.guide)
        data = resolve(function, pairs, self.problem.x, self.problem.columns)
        self._resolved.append((pairs, data))
        return data

    def _bias(self, bias: float | Tensor, data: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        """One more bias of rows, as a table of a class for each row and one of all columns."""
        function, x = self.problem.names[0], self.problem.x
        if Slot.LOG_WEIGHT in data:
            raise NotImplementedError(
                f"{function}: pairs.log_weight must be None for a fold with a bias, got one\n"
                "  add the bias to its table"
            )
        rows, columns = x.shape[0], self.problem.columns.shape[0]
        table = checks.scale_tensor(function, bias, self.problem.names[1], x, "bias of a fold")
        of_rows = torch.arange(rows, device=x.device)
        of_rows, of_columns = of_rows if table.dim() else torch.zeros_like(of_rows), of_rows.new_zeros(columns)
        return {Slot.CLASS_ROWS: of_rows, Slot.CLASS_COLS: of_columns, Slot.LOG_WEIGHT: table.reshape(-1, 1)}

    def _check_guide(self, function: str, guide: Guide) -> None:
        if self.problem.y is None and guide.gy is not None:
            raise ValueError(
                f"{function}: guide.gy must be None where a matrix is compared with itself, "
                f"got {checks.shape(guide.gy)}"
            )
        others = [known.guide for known, _ in self._resolved if known.guide is not None]
        if others and guide.gx is not others[0].gx:
            raise NotImplementedError(
                f"{function}: pairs.guide must be one guide for all folds of a sweep, got another gx\n"
                "  call similarity_reduce once per guide"
            )


def _is_same(a: object, b: object) -> bool:
    """Equal numbers, or one tensor: by `is`, for a traced program would be bound to the number that id() returns."""
    both_numbers = isinstance(a, (float, int)) and isinstance(b, (float, int))
    return a == b if both_numbers else a is b


def _linear_lists(function: str, linear: object, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
    if not isinstance(linear, tuple) or len(linear) not in (2, 3):
        raise TypeError(
            f"{function}: linear must be (indptr, indices) or (indptr, indices, weights), got {type(linear).__name__}"
        )
    indptr, indices, order = check_lists(function, "linear", linear, x, y)
    dtype = checks.accumulator(x.dtype)
    if len(linear) == 2:
        weight = torch.ones(indices.shape, dtype=dtype, device=x.device)
    else:
        checks.check_vector(function, "linear weights", linear[2], indices.shape[0], "x", x)
        checks.check_constant(function, "linear weights", linear[2])
        weight = linear[2].to(dtype)[order]
    return {Slot.LINEAR_INDPTR: indptr, Slot.LINEAR_INDICES: indices, Slot.LINEAR_WEIGHT: weight}
