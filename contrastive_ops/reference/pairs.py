"""A chunk of rows as each logit set sees it: logits, and which pairs take part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import accumulator
from .._ordered import segment_sums
from .._similarity import Layout, LogitSet, ScaleOf, Slot


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products in the accumulation dtype: low-precision inputs never give rounded logits."""
    dtype = accumulator(x.dtype)
    return x.to(dtype) @ y.to(dtype).T


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
        negated = [None if bound is None else -bound for bound in above]
        yield from _exceeds("above", -self.dots, negated[0], negated[1], rows)
        if Slot.GUIDE_X in data:
            guide = inner_products(data[Slot.GUIDE_X][rows], data[Slot.GUIDE_Y])
            yield from _exceeds("guide", guide, data.get(Slot.GUIDE_BELOW_ROWS), data.get(Slot.GUIDE_BELOW_COLS), rows)

    def dropped(self) -> Tensor | None:
        """True where a rule drops a pair."""
        return _union([drop for _, drop in self.rules()])

    def left_out(self) -> Tensor | None:
        """True where a pair is in no fold: dropped, or the target that is returned on its own."""
        return _union([drop for drop in (self.dropped(), self._own()) if drop is not None])

    def without_left_out(self) -> Tensor:
        """Logits with -inf where no gradient goes."""
        left_out = self.left_out()
        return self.logits if left_out is None else self.logits.masked_fill(left_out, -torch.inf)

    def shown(self) -> Tensor:
        """Logits as the folds see them: dropped pairs at -inf or at the constant that `fill` gives them."""
        dropped, own, fill = self.dropped(), self._own(), self.set.data.get(Slot.FILL)
        logits = self.logits
        if dropped is not None:
            logits = logits.masked_fill(dropped, -torch.inf if fill is None else float(fill))
        return logits if own is None else logits.masked_fill(own, -torch.inf)

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

    def _own(self) -> Tensor | None:
        return None if self.target is None else self.target[self.rows, None] == self._columns()

    def _columns(self) -> Tensor:
        return torch.arange(self.logits.shape[1], device=self.logits.device)

    def _dropped_by_position(self) -> Iterator[tuple[str, Tensor]]:
        data, rows, diagonal = self.set.data, self.rows, self.set.diagonal
        if diagonal is not None:
            row = torch.arange(rows.start, rows.stop, device=self.logits.device)
            yield "diagonal", row[:, None] + diagonal == self._columns()
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
                equal = (row == column) & (row != -1)
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
        logits = dots * factor
        if row_bias is not None:
            logits = logits + row_bias[rows, None]
        if col_bias is not None:
            logits = logits + col_bias
        if Slot.LOG_WEIGHT in each.data:
            logits = logits + _log_weight(each.data, rows)
        sign = -1 if each.negate else 1
        logits = -logits if each.negate else logits
        yield SetOfChunk(each, rows, dots, sign * factor, sign, logits, target)
