"""What every backend of a primitive is given: logit sets, folds and pair rules as arguments of an operator.

Operators take tensors, lists of tensors and integers. A *logit set* is one reading of the inner products, its scale,
sign and rules for pairs; a *fold* reduces one set along one direction. `Layout.encode` turns both into ``pair_data``
and ``spec``, which `Layout.decode` reads again; csrc/similarity_reduce.h has the same numbers.

    spec = [sets, folds,
            per set:  scale_of, negate, has_diagonal, diagonal, entries, slot of each entry in pair_data,
            per fold: set, kind, cols]

The scales of all sets are one vector, one after another: 1, N or M numbers each.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .fold_kinds import FOLDS

# The names of all folds. The position is the number in `spec`.
KINDS = tuple(FOLDS)


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


def with_factors(residual: Tensor, partner: Tensor, own: Tensor | None, other: Tensor | None) -> Tensor:
    """What rounding took from the weights of each row, in units of its partner's row, where rows have factors."""
    if own is None or other is None:
        return residual
    there = (partner >= 0) & (partner < len(other))
    return residual * own * torch.where(there, other[torch.where(there, partner, 0)], 0.0)
