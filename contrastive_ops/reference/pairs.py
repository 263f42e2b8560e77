"""A chunk of rows as each logit set sees it: logits, and which pairs take part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import accumulator
from ..core.column_lists import entries
from ..core.ordered import segment_sums
from ..core.problem import Layout, LogitSet, ScaleOf
from ..core.recompute import may_overwrite
from ..core.rule_kinds import ClassWeightRule, Data, Places, Rule
from ..core.rules import RULES, Slot


def inner_products(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Inner products in the accumulation dtype: low-precision inputs never give rounded logits."""
    dtype = accumulator(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    return x @ y.T if out is None else torch.mm(x, y.T, out=out)


@dataclass(frozen=True)
class SetOfChunk:
    """One logit set on the rows of one chunk.

    Attributes:
        set: the set.
        rows: which rows.
        dots: inner products of these rows with all columns.
        scale: dlogit/ddot, shaped to broadcast.
        sign: dlogit/dbias.
        logits: logits of all pairs, whatever the rules say.
        target: (N,) the column of each row that no fold sees.
    """

    set: LogitSet
    rows: slice
    dots: Tensor
    scale: Tensor
    sign: int
    logits: Tensor
    target: Tensor | None

    def dropped_by(self, rules: Callable[[Rule], bool]) -> Iterator[tuple[str, Tensor]]:
        """The name of each of these rules that the set has, and True where it drops a pair."""
        places = Places((self.rows, None), ..., self.dots, self._guide)
        data = self.set.data
        return ((rule.name, rule.mask(data, places)) for rule in RULES.values() if rules(rule) and rule.is_in(data))

    def _guide(self, data: Data) -> Tensor:
        return inner_products(data[Slot.GUIDE_X][self.rows], data[Slot.GUIDE_Y])

    @functools.cached_property
    def dropped(self) -> Tensor | None:
        """True where a rule drops a pair; without the diagonal, which is cheaper to write to than to compare."""
        drops = [drop for _, drop in self.dropped_by(lambda rule: rule.drops)]
        return functools.reduce(torch.bitwise_or, drops) if drops else None

    def without_dropped(self, values: Tensor, fill: float, overwrite: bool = False) -> Tensor:
        """Values of all pairs, `fill` where a rule drops one."""
        if self.dropped is not None:
            values = (values.masked_fill_ if overwrite else values.masked_fill)(self.dropped, fill)
        if self.set.diagonal is None:
            return values
        values = values if overwrite else values.clone()
        values.diagonal(self.rows.start + self.set.diagonal).fill_(fill)
        return values

    def without_left_out(
        self, values: Tensor | None = None, fill: float = -torch.inf, overwrite: bool = False
    ) -> Tensor:
        """Values (the logits), `fill` where no gradient goes: dropped pairs, and the target, returned on its own."""
        values = self.without_dropped(self.logits if values is None else values, fill, overwrite)
        return self._without_target(values, fill, overwrite)

    def shown(self, overwrite: bool = False) -> Tensor:
        """Logits as the folds see them: dropped pairs at -inf or at the constant that `fill` gives them."""
        fill = self.set.data.get(Slot.FILL)
        values = self.without_dropped(self.logits, -torch.inf if fill is None else float(fill), overwrite)
        return self._without_target(values, -torch.inf, overwrite)

    def _without_target(self, values: Tensor, fill: float, overwrite: bool) -> Tensor:
        if self.target is None:
            return values
        return (values.scatter_ if overwrite else values.scatter)(1, self.target[self.rows, None], fill)

    def linear_sum(self) -> Tensor:
        """Each row's weighted sum of the logits in its list."""
        row, column, weight = self._linear_lists()
        return segment_sums(weight * self.logits[row, column], row, len(self.logits))

    def add_linear(self, e: Tensor, d_linear: Tensor) -> Tensor:
        """Add the derivative of the linear lists to the derivative by the logits."""
        row, column, weight = self._linear_lists()
        return e.index_put((row, column), weight * d_linear[row], accumulate=True)

    def scale_gradient(self, d_scale: Tensor) -> Tensor:
        """Sum what each pair contributes to the size of this set's scale (that of the chunk's rows)."""
        d_scale = self.sign * d_scale
        if self.set.scale_of == ScaleOf.ROWS:
            return d_scale.sum(1)
        return d_scale.sum(0) if self.set.scale_of == ScaleOf.COLUMNS else d_scale.sum().reshape(1)

    def _linear_lists(self) -> tuple[Tensor, Tensor, Tensor]:
        data = self.set.data
        row, column, found = entries(data[Slot.LINEAR_INDPTR], data[Slot.LINEAR_INDICES], self.rows)
        return row, column, data[Slot.LINEAR_WEIGHT][found]


def affine(dots: Tensor, scale: Tensor, row_bias: Tensor | None, col_bias: Tensor | None) -> Tensor:
    """``dots * scale + (row_bias + col_bias)``, rounded once behind the sum of the biases, as kernels do.

    So backends order logits that nearly tie in the same way where torch fuses the product with the sum.
    """
    if row_bias is None and col_bias is None:
        return dots * scale
    if col_bias is None:  # a sum of matrices: torch is slow with a column of numbers
        col_bias = dots.new_zeros(dots.shape[-1:])
    bias = col_bias if row_bias is None else row_bias + col_bias
    return torch.addcmul(bias, dots, scale)


def add_class_weights(logits: Tensor, each: LogitSet, rows: Any, cols: Any, overwrite: bool = False) -> Tensor:
    """Logits of pairs, of indices as in `Places`, with what the rules add to them."""
    for rule in RULES.values():
        if isinstance(rule, ClassWeightRule) and rule.is_in(each.data):
            entry = rule.entry(each.data, rows, cols)
            logits = logits.add_(entry) if overwrite else logits + entry
    return logits


def chunk_sets(
    layout: Layout,
    rows: slice,
    dots: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
) -> Iterator[SetOfChunk]:
    """Each set of `layout` on the rows of a chunk."""
    for each, own in zip(layout.sets, layout.scale_slices(len(x), len(y)), strict=True):
        factor = scale[own][rows, None] if each.scale_of == ScaleOf.ROWS else scale[own]
        logits = affine(dots, factor, None if row_bias is None else row_bias[rows, None], col_bias)
        logits = add_class_weights(logits, each, (rows, None), ..., may_overwrite())
        sign = -1 if each.negate else 1
        logits = -logits if each.negate else logits
        yield SetOfChunk(each, rows, dots, sign * factor, sign, logits, target)
