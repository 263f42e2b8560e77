"""Rows that count as if they had length 1, without rounding them again.

Unit rows of 16 bits are rounded, and what is lost moves logits and gradients by up to a percent. So backends multiply
the rows as they are, brought near length 1 by a power of two, which is exact, and inner products are multiplied by what
is left of the inverse lengths. The derivative through the lengths takes from a gradient what lies along its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import accumulator
from .problem import Layout
from .records import changed
from .rules import Slot
from .unit_rows import SHORTEST, parts_of, unit_rows

# Where an operator of similarity_reduce has its matrices and what describes its sets; see its schema.
_X, _Y, _PAIR_DATA, _SPEC = 0, 1, 6, 7
# Where the number of entries of the first set and its first slot stand in `spec`.
_ENTRIES, _FIRST_SLOT = 6, 7


def is_asked_for(spec: Sequence[int]) -> bool:
    """Whether the rows of both matrices count as if they had length 1."""
    return len(spec) > _FIRST_SLOT and bool(spec[_ENTRIES]) and spec[_FIRST_SLOT] == Slot.UNIT


def run(function: Callable[..., Any], problem: Sequence[Any], is_reference: bool, gradients: int | None) -> Any:
    """Call a backend's function with factors in place of the flag, and take the derivative through the lengths.

    Args:
        function: of the backend; the reference's is made of differentiable operations, and so is what is done here.
        problem: its arguments.
        is_reference: whether it is the reference, which is given unit rows in the accumulation dtype.
        gradients: where the gradients of x and y stand in the results; None where there are none.
    """
    if not is_asked_for(problem[_SPEC]):
        return function(*problem)
    x = _Side(problem[_X], is_reference)
    y = x if problem[_Y] is None else _Side(problem[_Y], is_reference)
    arguments = list(problem)
    arguments[_X], arguments[_Y] = x.rows, None if problem[_Y] is None else y.rows
    factors = None if is_reference else (x.factor, y.factor)
    arguments[_PAIR_DATA], arguments[_SPEC] = _replaced(problem[_PAIR_DATA], problem[_SPEC], factors)
    found = function(*arguments)
    if gradients is None:
        return found
    results = list(found)
    for at, side in enumerate((x,) if y is x else (x, y), gradients):
        if results[at].shape[0] == side.rows.shape[0]:  # one that is not needed has no rows
            results[at] = side.through_lengths(results[at])
    return tuple(results)


class _Side:
    """The rows of one matrix as a backend multiplies them, and what makes them unit rows."""

    def __init__(self, x: Tensor, is_reference: bool) -> None:
        wide = x.to(accumulator(x.dtype))
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(SHORTEST)
        if is_reference:
            self.unit, self.shift = unit_rows(wide), length.reciprocal()
            self.rows = self.unit
            return
        mantissa, exponent = torch.frexp(length)
        # Lengths in [1, 2): then no factor is above 1, and float16 holds whatever it held before.
        self.shift = torch.ldexp(torch.ones_like(length), (1 - exponent).clamp(-126, 126))
        scaled = wide * self.shift
        self.rows, factor = scaled.to(x.dtype), (mantissa * 2).reciprocal()
        self.factor, self.unit = factor[:, 0].contiguous(), scaled * factor

    def through_lengths(self, gradient: Tensor) -> Tensor:
        """The gradient by the rows as they were given."""
        return parts_of(gradient, self.unit)[1] * self.shift


def _replaced(
    pair_data: Sequence[Tensor], spec: Sequence[int], factors: tuple[Tensor, Tensor] | None
) -> tuple[list[Tensor], list[int]]:
    layout = Layout.decode(pair_data, spec)
    first, *others = layout.sets
    data: dict[Slot, Tensor] = {slot: tensor for slot, tensor in first.data.items() if slot != Slot.UNIT}
    if factors is not None:
        data[Slot.ROW_FACTOR], data[Slot.COL_FACTOR] = factors
    return Layout((changed(first, data=data), *others), layout.folds).encode()
