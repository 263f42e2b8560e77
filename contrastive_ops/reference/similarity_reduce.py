"""similarity_reduce in plain PyTorch: any device, any floating dtype, memory bounded by chunks of rows.

Every function takes what the operator of the same name in ops/similarity_reduce.py takes. `backward` is made of
differentiable operations, so that it also defines the second derivative of every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import accumulator
from ..core.fold_kinds import FOLDS
from ..core.numerics import CHUNK_ELEMENTS, chunks_of_rows, times
from ..core.ordered import long_product, wide_dtype
from ..core.problem import Layout, ScaleOf, SetFold
from ..core.recompute import may_overwrite, recomputed
from .pairs import SetOfChunk, chunk_sets, inner_products

# Bits of `needs`.
_SCALE, _ROW_BIAS, _COL_BIAS = 2, 3, 4


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that have few enough logits."""
    return chunks_of_rows(rows, max(1, CHUNK_ELEMENTS // max(columns, 1)))


# ---- Forward -------------------------------------------------------------------------------------------------------


def _fold_into(fold: SetFold, logits: Tensor, part: slice, value: Tensor, winner: Tensor) -> None:
    """Add a chunk's logits to the result of a fold, in place."""
    kind, along = FOLDS[fold.kind], 0 if fold.cols else 1
    if logits.shape[along] == 0:
        return
    if not kind.has_winner:
        found = kind.chunk(logits, along).to(value.dtype)
        if fold.cols:
            value.copy_(kind.merge(value, found))
        else:
            value[part] = found
    elif fold.cols:
        best, index = logits.max(0)
        better = (best > value) | (best.isnan() & ~value.isnan())  # the smallest index wins a tie
        value.copy_(torch.where(better, best, value))
        winner.copy_(torch.where(better, index + part.start, winner))
    else:
        value[part], index = logits.max(1)
        winner[part] = torch.where(value[part] == -torch.inf, -1, index)


class Found:
    """What forward finds, chunk by chunk: a vector for each fold and its winners, the targets' logits, lists."""

    def __init__(self, layout: Layout, x: Tensor, y: Tensor, target: Tensor | None) -> None:
        dtype, sizes = accumulator(x.dtype), (len(x), len(y))
        self.layout = layout
        self.folds = x.new_empty((sum(layout.sizes(*sizes)),), dtype=dtype)
        self.argmax = x.new_full((sum(layout.argmax_sizes(*sizes)),), -1, dtype=torch.int64)
        self.target_logit = x.new_empty((0 if target is None else len(x),), dtype=dtype)
        self.linear = x.new_zeros((len(x) if layout.has_linear else 0,), dtype=dtype)
        self.of_folds = self.folds.split(layout.sizes(*sizes))
        self.winners = self.argmax.split(layout.argmax_sizes(*sizes))
        # Chunks add to the columns: in float64, because millions of rows have many.
        self.values = [
            value.to(wide_dtype(x)) if fold.cols else value
            for fold, value in zip(layout.folds, self.of_folds, strict=True)
        ]
        for fold, value in zip(layout.folds, self.values, strict=True):
            value.fill_(FOLDS[fold.kind].empty)

    def add(self, sets: list[SetOfChunk]) -> None:
        """Fold the pairs of a chunk."""
        first, part = sets[0], sets[0].rows
        if first.target is not None:
            self.target_logit[part] = first.logits.gather(1, first.target[part, None]).squeeze(1)
        if self.layout.has_linear:
            self.linear[part] = first.linear_sum()
        for index, each in enumerate(sets):
            shown = each.shown(may_overwrite())  # whose logits nobody reads again but as a slope's
            for fold, value, winner in zip(self.layout.folds, self.values, self.winners, strict=True):
                if fold.set == index:
                    _fold_into(fold, shown, part, value, winner)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(folds, argmax, target_logit, linear); what was not asked for is empty."""
        for result, value in zip(self.of_folds, self.values, strict=True):
            if value is not result:
                result.copy_(value)
        return self.folds, self.argmax, self.target_logit, self.linear


def forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    kept_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (folds, argmax, target_logit, linear, kept); what was not asked for is empty."""
    columns = x if y is None else y
    layout = Layout.decode(pair_data, spec)
    found = Found(layout, x, columns, target)
    kept = x.new_empty((kept_size,), dtype=accumulator(x.dtype))
    whole = _all_products(kept, len(x), len(columns))
    for part in chunks(len(x), len(columns)):
        dots = inner_products(x[part], columns, out=None if whole is None else whole[part])
        sets = list(chunk_sets(layout, part, dots, x, columns, scale, row_bias, col_bias, target))
        found.add(sets)
    return *found.results(), kept


def _all_products(kept: Tensor, rows: int, columns: int) -> Tensor | None:
    """The inner products of all pairs, where there is room for all of them; else None."""
    return kept[: rows * columns].view(rows, columns) if kept.shape[0] >= rows * columns > 0 else None


# ---- Backward ------------------------------------------------------------------------------------------------------


def _slope(fold: SetFold, logits: Tensor, part: slice, value: Tensor, winner: Tensor, d_value: Tensor) -> Tensor:
    """The derivative of the total by the logits through one fold."""
    own = slice(None) if fold.cols else part
    upstream, shape = d_value[own], (1, -1) if fold.cols else (-1, 1)
    slope = FOLDS[fold.kind].slope
    if slope is not None:
        return _scaled(slope(logits, value[own].reshape(shape)), upstream.reshape(shape))
    zero = torch.zeros_like(logits)
    if fold.cols:
        here = (winner >= part.start) & (winner < part.stop)
        row = torch.where(here, winner - part.start, 0)
        return zero.scatter_add(0, row[None], (upstream * here)[None]) if len(logits) else zero
    column = winner[own]
    column, upstream = column.clamp_min(0), upstream * (column >= 0)
    return zero.scatter_add(1, column[:, None], upstream[:, None]) if logits.shape[1] > 0 else zero


def _has_slope(fold: SetFold) -> bool:
    return FOLDS[fold.kind].has_winner or FOLDS[fold.kind].slope is not None


def _scaled(values: Tensor, factor: Tensor) -> Tensor:
    """``values * factor`` in the memory of values, of which nobody else knows, unless a graph needs them."""
    return values.mul_(factor) if may_overwrite() else values * factor


def _weights(
    chunk: SetOfChunk,
    folds: list[tuple[SetFold, Tensor, Tensor, Tensor]],
    d_target: Tensor | None,
    d_linear: Tensor | None,
) -> Tensor:
    """The derivative of the total by the logits of a set."""
    logits, part = chunk.without_left_out(overwrite=may_overwrite()), chunk.rows
    slopes = [_slope(fold, logits, part, value, winner, d_value) for fold, value, winner, d_value in folds]
    e = sum(slopes[1:], slopes[0]) if slopes else torch.zeros_like(logits)
    e = chunk.without_left_out(e, 0.0, may_overwrite())
    if d_target is not None and chunk.target is not None:
        e = e.scatter_add(1, chunk.target[part, None], d_target[part, None])
    if d_linear is not None:
        e = chunk.add_linear(e, d_linear[part])
    return e


def backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    folds: Tensor,
    argmax: Tensor,
    d_folds: Tensor | None,
    d_target: Tensor | None,
    d_linear: Tensor | None,
    kept: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, scale, row_bias, col_bias in the accumulation dtype."""
    columns = x if y is None else y
    layout = Layout.decode(pair_data, spec)
    active: list[tuple[SetFold, Tensor, Tensor, Tensor]] = []
    if d_folds is not None:
        sizes, argmax_sizes = layout.sizes(len(x), len(columns)), layout.argmax_sizes(len(x), len(columns))
        parts = (folds.split(sizes), argmax.split(argmax_sizes), d_folds.split(sizes))
        active = [each for each in zip(layout.folds, *parts, strict=True) if _has_slope(each[0])]
    # Under autograd (second derivatives) each chunk is computed again instead of being stored, from its inputs.
    whole = None if torch.is_grad_enabled() else _all_products(kept, len(x), len(columns))

    def one_chunk(part: slice) -> tuple[Any, ...]:
        dots = inner_products(x[part], columns) if whole is None else whole[part]
        sets = list(chunk_sets(layout, part, dots, x, columns, scale, row_bias, col_bias, target))
        return chunk_gradients(sets, active, d_target, d_linear, x[part], columns, needs)

    run, gradients = recomputed(one_chunk), Gradients(layout, x, y, scale, needs)
    for part in chunks(len(x), len(columns)):
        gradients.add(part, run(part))
    return gradients.asked_for()


def chunk_gradients(
    sets: list[SetOfChunk],
    active: list[tuple[SetFold, Tensor, Tensor, Tensor]],
    d_target: Tensor | None,
    d_linear: Tensor | None,
    x: Tensor,
    y: Tensor,
    needs: int,
) -> tuple[Any, ...]:
    """What the pairs of a chunk give to dx (its rows), dy, drow_bias (its rows), dcol_bias and each set's dscale."""
    weights: list[Tensor] = []
    e_rows, e_cols = sets[0].dots.new_zeros(len(x)), sets[0].dots.new_zeros(len(y))
    dscale: list[Tensor | None] = []
    for index, each in enumerate(sets):
        of_set = [fold for fold in active if fold[0].set == index]
        e = _weights(each, of_set, *((d_target, d_linear) if index == 0 else (None, None)))
        dscale.append(each.scale_gradient(_times_dots(e, each.dots)) if needs >> _SCALE & 1 else None)
        e_rows = e_rows + each.sign * e.sum(1) if needs >> _ROW_BIAS & 1 else e_rows
        e_cols = e_cols + each.sign * e.sum(0) if needs >> _COL_BIAS & 1 else e_cols
        weights.append(_scaled(e, each.scale))
    total, dtype = sum(weights[1:], weights[0]), sets[0].dots.dtype
    dx, dy = long_product(total, y.to(dtype)), long_product(total.T, x.to(dtype))
    return dx, dy, e_rows, e_cols, *dscale


def _times_dots(e: Tensor, dots: Tensor) -> Tensor:
    """`times`, whose tests cost more than the product, only where a graph or the product needs it."""
    if not may_overwrite():
        return times(e, dots)
    product = e * dots
    return product if product.sum().isfinite() else times(e, dots)


class Gradients:
    """The gradients of x, y, scale, row_bias, col_bias, as sums over chunks of rows."""

    def __init__(self, layout: Layout, x: Tensor, y: Tensor | None, scale: Tensor, needs: int) -> None:
        columns, dtype = x if y is None else y, accumulator(x.dtype)
        self.layout, self.itself, self.needs = layout, y is None, needs
        # What all chunks add to is float64 where that is cheap.
        wide = wide_dtype(x)
        self.dx = x.new_zeros(x.shape, dtype=dtype)
        self.dy = x.new_zeros(columns.shape, dtype=wide if columns.numel() <= CHUNK_ELEMENTS else dtype)
        self.dscale, self.dtypes = torch.zeros_like(scale, dtype=wide), (dtype, scale.dtype)
        self.drow_bias = x.new_zeros((len(x),), dtype=dtype)
        self.dcol_bias = x.new_zeros((len(columns),), dtype=wide)

    def add(self, part: slice, found: tuple[Any, ...]) -> None:
        """Add what `chunk_gradients` returns for a chunk."""
        self.dx[part], dy, self.drow_bias[part], dcol_bias, *dscale = found
        self.dy += dy
        self.dcol_bias += dcol_bias
        slices = self.layout.scale_slices(len(self.dx), len(self.dy))
        for each, own, of_set in zip(self.layout.sets, slices, dscale, strict=True):
            if of_set is not None:
                begin = own.start + part.start if each.scale_of == ScaleOf.ROWS else own.start
                self.dscale[begin : begin + len(of_set)] += of_set

    def asked_for(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients, empty where nobody needs one."""
        dtype, of_scale = self.dtypes
        dx, dy = self.dx, self.dy.to(dtype)
        if self.itself:
            dx, dy = dx + dy, dy[:0]
        full = (dx, dy, self.dscale.to(of_scale), self.drow_bias, self.dcol_bias.to(dtype))
        return tuple(g if self.needs >> bit & 1 else g[:0] for bit, g in enumerate(full))  # type: ignore[return-value]
