"""similarity_topk in plain PyTorch: any device, any floating dtype, memory bounded by chunks of rows.

Every function takes what the operator of the same name in ops/similarity_topk.py takes. `at` and `backward` are made of
differentiable operations, so that they also define the second derivative of every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.checks import accumulator
from ..core.masks import left_out
from ..core.numerics import CHUNK_ELEMENTS, chunks_of_rows, times
from ..core.ordered import add_segments, segment_rows
from ..core.problem import Layout, LogitSet, ScaleOf
from ..core.recompute import recomputed
from ..core.rules import STATISTICS, Slot
from .pairs import SetOfChunk, add_class_weights, affine, chunk_sets, inner_products

# ---- Forward -------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    k: int,
    floor: Tensor | None,
    count_above: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (values, indices, counts, statistics).

    The first set selects; statistics are counted under the rules of the last one and empty without `count_above`.
    """
    dtype = accumulator(x.dtype)
    layout = Layout.decode(pair_data, spec)
    values = x.new_full((len(x), k), -torch.inf, dtype=dtype)
    indices = x.new_full((len(x), k), -1, dtype=torch.int64)
    counts = x.new_zeros((len(x),), dtype=torch.int64)
    statistics = x.new_zeros((0 if count_above is None else len(STATISTICS), len(x)), dtype=torch.int64)
    for part in chunks_of_rows(len(x), max(1, CHUNK_ELEMENTS // max(len(y), 1))):
        dots = inner_products(x[part], y)
        if Slot.CODE_SCALE in layout.sets[0].data:
            dots = dots * layout.sets[0].data[Slot.CODE_SCALE]
        sets = list(chunk_sets(layout, part, dots, x, y, scale, row_bias, col_bias, None))
        scores = _scores(sets[0])
        if floor is not None:
            scores = scores.masked_fill(scores <= floor[part, None], -torch.inf)
        values[part], indices[part], counts[part] = best(scores, k)
        if count_above is not None:
            statistics[:, part] = _statistics(sets[-1], count_above[part, None])
    return values, indices, counts, statistics


def _scores(each: SetOfChunk) -> Tensor:
    """Logits with -inf where a pair takes no part; NaN is no score."""
    logits = each.shown()
    return logits.masked_fill(logits.isnan(), -torch.inf)


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of each row in the order of `order`, padded with -inf and -1, and how many there are."""
    rows, columns = scores.shape
    kept = min(k, columns)
    values = scores.new_full((rows, k), -torch.inf)
    indices = torch.full((rows, k), -1, dtype=torch.int64, device=scores.device)
    if kept == 0:
        return values, indices, indices.new_zeros(rows)
    # torch.topk may return any of equal scores: it is asked for the last value only.
    last = scores.topk(kept, dim=1).values[:, -1:]
    larger, ties = scores > last, (scores == last) & (last > -torch.inf)
    chosen = larger | (ties & (ties.cumsum(1) <= kept - larger.sum(1, keepdim=True)))
    row, column = chosen.nonzero(as_tuple=True)
    counts = chosen.sum(1)
    place = torch.arange(len(row), device=scores.device) - (counts.cumsum(0) - counts)[row]
    values[row, place], indices[row, place] = scores[row, column], column
    # Columns rise within a row, so a stable sort leaves equal scores in that order.
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), indices.gather(1, order), counts


def _statistics(each: SetOfChunk, count_above: Tensor) -> Tensor:
    """(STATISTICS, rows) counts over all columns."""
    scores = _scores(each)
    counts = {"eligible": (scores > -torch.inf).sum(1), "higher": (each.logits > count_above).sum(1)}
    counts.update({name: drop.sum(1) for name, drop in each.dropped_by(lambda rule: rule.counted)})
    nothing = counts["eligible"].new_zeros(len(scores))
    return torch.stack([counts.get(name, nothing) for name in STATISTICS])


def order(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of a list per row: score descending, then index ascending; padded with -inf and -1."""
    by_index = indices.argsort(dim=1, stable=True)
    values, indices = values.gather(1, by_index), indices.gather(1, by_index)
    values = values.masked_fill((indices < 0) | values.isnan(), -torch.inf)
    best_first = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    values, indices = values.gather(1, best_first), indices.gather(1, best_first)
    missing = (0, k - values.shape[1])
    values, indices = pad(values, missing, value=-torch.inf), pad(indices, missing, value=-1)
    return values, indices.masked_fill(values == -torch.inf, -1)


def merge(values: Tensor, indices: Tensor, other_values: Tensor, other_indices: Tensor) -> tuple[Tensor, Tensor]:
    """The best of two lists per row, as long as the first."""
    return order(torch.cat([values, other_values], 1), torch.cat([indices, other_indices], 1), values.shape[1])


# ---- Logits of listed pairs ----------------------------------------------------------------------------------------


def logits_of_listed(
    logit_set: LogitSet,
    rows: slice,
    dots: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    column: Tensor,
    listed: Tensor,
) -> Tensor:
    """(rows, P) logits of similarities `dots` with the columns `column`, -inf where there is none."""
    of_rows = None if row_bias is None else row_bias[rows, None]
    of_columns = None if col_bias is None else segment_rows(col_bias, column.flatten()).view(column.shape)
    logits = add_class_weights(affine(dots, scale, of_rows, of_columns), logit_set, (rows, None), column)
    return logits.masked_fill(~listed, -torch.inf)


def _chunks_of_lists(rows: int, listed: int, depth: int) -> Iterator[tuple[slice, slice]]:
    """Some rows with all that they list; or, where one list is long, some of its entries."""
    entries = max(1, CHUNK_ELEMENTS // max(depth, 1))
    for part in chunks_of_rows(rows, max(1, entries // max(listed, 1))):
        for of_list in chunks_of_rows(listed, entries):
            yield part, of_list


class _Listed:
    """Listed pairs of a chunk of rows: inner products, and what the logits make of them."""

    def __init__(
        self,
        each: LogitSet,
        part: slice,
        of_list: slice,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        indices: Tensor,
    ) -> None:
        self.set, self.rows = each, part
        self.listed = indices[part, of_list] >= 0
        self.column = indices[part, of_list].clamp_min(0)
        dtype = accumulator(x.dtype)
        # What is in no list is not looked at, whatever it holds.
        self.x = left_out(x[part].to(dtype), self.listed.any(1))
        self.y = left_out(y[self.column].to(dtype), self.listed)
        self.dots = (self.x[:, None] * self.y).sum(2)
        if Slot.CODE_SCALE in each.data:
            self.dots = self.dots * each.data[Slot.CODE_SCALE][self.column]
        self.scale = scale[part, None] if each.scale_of == ScaleOf.ROWS else scale
        self.scale = scale[self.column] if each.scale_of == ScaleOf.COLUMNS else self.scale

    def logits(self, row_bias: Tensor | None, col_bias: Tensor | None) -> Tensor:
        return logits_of_listed(
            self.set, self.rows, self.dots, self.scale, row_bias, col_bias, self.column, self.listed
        )


def at(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    indices: Tensor,
) -> Tensor:
    """Return the logits of the columns that each row lists, -inf where it lists -1. Rules do not apply."""
    values = x.new_full(indices.shape, -torch.inf, dtype=accumulator(x.dtype))
    own = Layout.decode(pair_data, spec).sets[0]
    for part, of_list in _chunks_of_lists(len(x) if len(y) else 0, indices.shape[1], x.shape[1]):
        values[part, of_list] = _Listed(own, part, of_list, x, y, scale, indices).logits(row_bias, col_bias)
    return values


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    indices: Tensor,
    d_values: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, scale, row_bias, col_bias in the accumulation dtype."""
    dtype = accumulator(x.dtype)
    layout = Layout.decode(pair_data, spec)
    dx, dy = (x.new_zeros(t.shape, dtype=dtype) for t in (x, y))
    dscale = torch.zeros_like(scale)
    drow_bias, dcol_bias = (x.new_zeros((len(t),), dtype=dtype) for t in (x, y))

    def one_chunk(part: slice, of_list: slice) -> tuple[Tensor, ...]:
        listed = _Listed(layout.sets[0], part, of_list, x, y, scale, indices)
        e = d_values[part, of_list].masked_fill(~listed.listed, 0.0)
        weight = e * listed.scale
        if Slot.CODE_SCALE in layout.sets[0].data:
            weight = weight * layout.sets[0].data[Slot.CODE_SCALE][listed.column]
        dx_part = (weight[:, :, None] * listed.y).sum(1)
        dy_part = left_out(weight[:, :, None] * listed.x[:, None], listed.listed).flatten(0, 1)
        return dx_part, dy_part, e, times(e, listed.dots), listed.column

    run = recomputed(one_chunk)
    for part, of_list in _chunks_of_lists(len(x) if len(y) else 0, indices.shape[1], x.shape[1]):
        dx_part, dy_part, e, e_dots, column = run(part, of_list)
        dx[part] += dx_part
        column = column.flatten()
        add_segments(dy, dy_part, column)
        drow_bias[part] += e.sum(1)
        add_segments(dcol_bias, e.flatten(), column)
        if layout.sets[0].scale_of == ScaleOf.ROWS:
            dscale[part] += e_dots.sum(1)
        elif layout.sets[0].scale_of == ScaleOf.COLUMNS:
            add_segments(dscale, e_dots.flatten(), column)
        else:
            dscale += e_dots.sum()
    full = (dx, dy, dscale, drow_bias, dcol_bias)
    return tuple(g if needs >> bit & 1 else g[:0] for bit, g in enumerate(full))  # type: ignore[return-value]
