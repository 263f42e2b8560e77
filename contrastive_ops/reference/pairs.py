"""A chunk of rows as each logit set sees it: logits, and which pairs take part."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import accumulator
from ..core.ordered import segment_sums
from ..core.problem import Layout, LogitSet, ScaleOf, Slot
from ..core.recompute import may_overwrite


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

    def rules(self) -> Iterator[tuple[str, Tensor]]:
        """The name of each rule, and True where it drops a pair; a name may come twice."""
        data, rows = self.set.data, self.rows
        yield from self._dropped_by_position()
        yield from self._dropped_by_ids()
        yield from _exceeds("below", self.dots, data.get(Slot.BELOW_ROWS), data.get(Slot.BELOW_COLS), rows)
        above = [data.get(slot) for slot in (Slot.ABOVE_ROWS, Slot.ABOVE_COLS)]
        if any(bound is not None for bound in above):
            negated = [None if bound is None else -bound for bound in above]
            yield from _exceeds("above", -self.dots, negated[0], negated[1], rows)
        if Slot.GUIDE_X in data:
            guide = inner_products(data[Slot.GUIDE_X][rows], data[Slot.GUIDE_Y])
            yield from _exceeds("guide", guide, data.get(Slot.GUIDE_BELOW_ROWS), data.get(Slot.GUIDE_BELOW_COLS), rows)

    @functools.cached_property
    def dropped(self) -> Tensor | None:
        """True where a rule drops a pair; without the diagonal, which is cheaper to write to than to compare."""
        return _union([drop for name, drop in self.rules() if name != "diagonal"])

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
        row, column, entries = _lists(data[Slot.LINEAR_INDPTR], data[Slot.LINEAR_INDICES], self.rows)
        return row, column, data[Slot.LINEAR_WEIGHT][entries]

    def _dropped_by_position(self) -> Iterator[tuple[str, Tensor]]:
        data, rows, diagonal = self.set.data, self.rows, self.set.diagonal
        if diagonal is not None:
            drop = torch.zeros_like(self.logits, dtype=torch.bool)
            drop.diagonal(rows.start + diagonal).fill_(True)
            yield "diagonal", drop
        if Slot.EXCLUDE_INDPTR in data:
            row, column, _ = _lists(data[Slot.EXCLUDE_INDPTR], data[Slot.EXCLUDE_INDICES], rows)
            drop = torch.zeros_like(self.logits, dtype=torch.bool)
            drop[row, column] = True
            yield "exclude", drop

    def _dropped_by_ids(self) -> Iterator[tuple[str, Tensor]]:
        data = self.set.data
        for name, rows, cols in (
            ("differ", Slot.DIFFER_ROWS, Slot.DIFFER_COLS),
            ("same", Slot.SAME_ROWS, Slot.SAME_COLS),
        ):
            if rows in data:
                row, column = data[rows][self.rows, None], data[cols]
                equal = (row == column) & (column != -1)  # a row of the entries, which are fast to read
                yield name, equal if name == "differ" else ~equal


def _lists(indptr: Tensor, indices: Tensor, rows: slice) -> tuple[Tensor, Tensor, slice]:
    """The entries of the lists of `rows`: row within the chunk, column, and where they stand."""
    bounds = indptr[rows.start : rows.stop + 1]
    entries = slice(int(bounds[0]), int(bounds[-1]))
    row = torch.repeat_interleave(bounds.diff())
    return row, indices[entries], entries


def _exceeds(
    name: str, similarity: Tensor, by_row: Tensor | None, by_column: Tensor | None, rows: slice
) -> Iterator[tuple[str, Tensor]]:
    bounds = [None if by_row is None else by_row[rows, None], by_column]
    yield from ((name, similarity > bound) for bound in bounds if bound is not None)


def _union(drops: list[Tensor]) -> Tensor | None:
    if not drops:
        return None
    union = drops[0]
    for drop in drops[1:]:
        union = union | drop
    return union


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


def _log_weight(data: dict[Slot, Tensor], rows: slice) -> Tensor:
    """The table's entry of each pair; 0 where either has no class."""
    row, column = data[Slot.CLASS_ROWS][rows, None], data[Slot.CLASS_COLS]
    entry = data[Slot.LOG_WEIGHT][row.clamp_min(0), column.clamp_min(0)]
    return entry.masked_fill((row < 0) | (column < 0), 0.0)


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
        if Slot.LOG_WEIGHT in each.data:
            entry = _log_weight(each.data, rows)
            logits = logits.add_(entry) if may_overwrite() else logits + entry
        sign = -1 if each.negate else 1
        logits = -logits if each.negate else logits
        yield SetOfChunk(each, rows, dots, sign * factor, sign, logits, target)
