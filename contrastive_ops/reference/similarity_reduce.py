"""similarity_reduce in plain PyTorch: any device, any floating dtype, memory bounded by chunks of rows.

Every function takes what the operator of the same name in ops/similarity_reduce.py takes. `backward` is made of
differentiable operations, so that it also defines the second derivative of every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._checks import accumulator
from .._ordered import long_product, wide_dtype
from .._similarity import Layout, ScaleOf, SetFold
from ._recompute import recomputed
from .pairs import SetOfChunk, chunk_sets, inner_products

# Logits that one chunk of rows may hold: 4 MiB of float32, some twenty times that with temporaries.
CHUNK_ELEMENTS = 1 << 20


def merge_lse(*lse: Tensor) -> Tensor:
    """Logsumexp over equally shaped tensors, with gradient 0 (not NaN) where all of them are -inf."""
    stacked = torch.stack(lse)
    top = stacked.detach().amax(0)
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = (stacked - top).exp().sum(0)
    empty = total == 0
    # log is kept away from 0, whose infinite slope would turn the masked gradient into NaN.
    return torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, total).log())


def chunks_of_rows(rows: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` rows; one empty slice for no rows, so that shapes are still found out."""
    for begin in range(0, max(rows, 1), step):
        yield slice(begin, min(begin + step, rows))


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    return chunks_of_rows(rows, max(1, CHUNK_ELEMENTS // max(columns, 1)))


# ---- Forward -------------------------------------------------------------------------------------------------------

# What a fold is before its first pair.
_EMPTY = {"logsumexp": -torch.inf, "max": -torch.inf, "sum_softplus": 0.0, "sum_relu": 0.0, "sum": 0.0, "count": 0.0}


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)), exact on both sides (torch's softplus becomes the identity above 20)."""
    return -logsigmoid(-z)


def _fold(kind: str, logits: Tensor, dim: int) -> Tensor:
    """The fold of logits in which pairs that take no part are -inf."""
    if kind == "logsumexp":
        return logits.logsumexp(dim)
    if kind == "count":
        return (logits != -torch.inf).sum(dim).to(logits.dtype)  # ones in float32 end at 2^24
    if kind == "sum":
        return logits.masked_fill(logits == -torch.inf, 0.0).sum(dim)
    return (softplus(logits) if kind == "sum_softplus" else logits.relu()).sum(dim)


def _fold_into(fold: SetFold, logits: Tensor, part: slice, value: Tensor, winner: Tensor) -> None:
    """Add a chunk's logits to the result of a fold, in place."""
    if fold.cols:
        if not logits.shape[0]:
            return
        if fold.kind == "max":
            best, index = logits.max(0)
            better = (best > value) | (best.isnan() & ~value.isnan())  # the smallest index wins a tie
            value.copy_(torch.where(better, best, value))
            winner.copy_(torch.where(better, index + part.start, winner))
        elif fold.kind == "logsumexp":
            value.copy_(merge_lse(value, logits.logsumexp(0).to(value.dtype)))
        else:
            value += _fold(fold.kind, logits, 0)
        return
    if not logits.shape[1]:
        return
    if fold.kind == "max":
        value[part], index = logits.max(1)
        winner[part] = torch.where(value[part] == -torch.inf, -1, index)
    else:
        value[part] = _fold(fold.kind, logits, 1)


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
    y = x if y is None else y
    dtype = accumulator(x.dtype)
    layout = Layout.decode(pair_data, spec)
    sizes, argmax_sizes = layout.sizes(len(x), len(y)), layout.argmax_sizes(len(x), len(y))
    folds = x.new_empty((sum(sizes),), dtype=dtype)
    argmax = x.new_full((sum(argmax_sizes),), -1, dtype=torch.int64)
    results, winners = folds.split(sizes), argmax.split(argmax_sizes)
    # Chunks add to the columns: in float64, because millions of rows have many.
    values = [
        result.to(wide_dtype(x)) if fold.cols else result for fold, result in zip(layout.folds, results, strict=True)
    ]
    for fold, value in zip(layout.folds, values, strict=True):
        value.fill_(_EMPTY[fold.kind])
    target_logit = x.new_empty((0 if target is None else len(x),), dtype=dtype)
    linear = x.new_zeros((len(x) if layout.has_linear else 0,), dtype=dtype)
    for part in _chunks(len(x), len(y)):
        dots = inner_products(x[part], y)
        for index, each in enumerate(chunk_sets(layout, part, dots, x, y, scale, row_bias, col_bias, target)):
            if index == 0 and target is not None:
                target_logit[part] = each.logits.gather(1, target[part, None]).squeeze(1)
            if index == 0 and layout.has_linear:
                linear[part] = each.linear_sum()
            shown = each.shown()
            for fold, value, winner in zip(layout.folds, values, winners, strict=True):
                if fold.set == index:
                    _fold_into(fold, shown, part, value, winner)
    for result, value in zip(results, values, strict=True):
        if value is not result:
            result.copy_(value)
    return folds, argmax, target_logit, linear, x.new_empty((kept_size,), dtype=dtype)


# ---- Backward ------------------------------------------------------------------------------------------------------


def times(e: Tensor, values: Tensor) -> Tensor:
    """``e * values``, but 0 where e is 0 and values are no numbers; with both derivatives also where e is 0."""
    return e * values.masked_fill((e == 0) & ~values.isfinite(), 0.0)


def probability(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 where lse is -inf: a row or column without a pair has no gradient."""
    empty = lse == -torch.inf
    return (logits - lse.masked_fill(empty, 0.0)).exp().masked_fill(empty, 0.0)


def _slope(fold: SetFold, logits: Tensor, part: slice, value: Tensor, winner: Tensor, d_value: Tensor) -> Tensor:
    """The derivative of the total by the logits through one fold."""
    own = slice(None) if fold.cols else part
    upstream, shape = d_value[own], (1, -1) if fold.cols else (-1, 1)
    if fold.kind == "logsumexp":
        return probability(logits, value[own].reshape(shape)) * upstream.reshape(shape)
    if fold.kind == "max":
        zero = torch.zeros_like(logits)
        if fold.cols:
            here = (winner >= part.start) & (winner < part.stop)
            row = torch.where(here, winner - part.start, 0)
            return zero.scatter_add(0, row[None], (upstream * here)[None]) if len(logits) else zero
        column = winner[own]
        column, upstream = column.clamp_min(0), upstream * (column >= 0)
        return zero.scatter_add(1, column[:, None], upstream[:, None]) if logits.shape[1] else zero
    if fold.kind == "sum_softplus":
        slope = logits.sigmoid()
    else:
        slope = (logits > 0 if fold.kind == "sum_relu" else logits != -torch.inf).to(logits.dtype)
    return slope * upstream.reshape(shape)


def _weights(
    each: SetOfChunk,
    folds: list[tuple[SetFold, Tensor, Tensor, Tensor]],
    d_target: Tensor | None,
    d_linear: Tensor | None,
) -> Tensor:
    """The derivative of the total by the logits of a set."""
    logits, part = each.without_left_out(), each.rows
    e = torch.zeros_like(logits)
    for fold, value, winner, d_value in folds:
        e = e + _slope(fold, logits, part, value, winner, d_value)
    left_out = each.left_out()
    if left_out is not None:
        e = e.masked_fill(left_out, 0.0)
    if d_target is not None and each.target is not None:
        e = e.scatter_add(1, each.target[part, None], d_target[part, None])
    if d_linear is not None:
        e = each.add_linear(e, d_linear[part])
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
    dtype = accumulator(x.dtype)
    layout = Layout.decode(pair_data, spec)
    sizes, argmax_sizes = layout.sizes(len(x), len(columns)), layout.argmax_sizes(len(x), len(columns))
    active: list[tuple[SetFold, Tensor, Tensor, Tensor]] = []
    if d_folds is not None:
        parts = (folds.split(sizes), argmax.split(argmax_sizes), d_folds.split(sizes))
        active = [each for each in zip(layout.folds, *parts, strict=True) if each[0].kind != "count"]

    def one_chunk(part: slice) -> tuple[Tensor, ...]:
        dots = inner_products(x[part], columns)
        weights, e_rows, e_cols = torch.zeros_like(dots), dots.new_zeros(len(dots)), dots.new_zeros(len(columns))
        dscale = []
        for index, each in enumerate(chunk_sets(layout, part, dots, x, columns, scale, row_bias, col_bias, target)):
            first = index == 0
            of_set = [f for f in active if f[0].set == index]
            e = _weights(each, of_set, d_target if first else None, d_linear if first else None)
            weights = weights + e * each.scale
            dscale.append(each.scale_gradient(times(e, dots)))
            e_rows, e_cols = e_rows + each.sign * e.sum(1), e_cols + each.sign * e.sum(0)
        dx, dy = long_product(weights, columns.to(dtype)), long_product(weights.T, x[part].to(dtype))
        return dx, dy, e_rows, e_cols, *dscale

    # Under autograd (second derivatives) each chunk is computed again instead of being stored.
    run = recomputed(one_chunk)
    # What all chunks add to is float64 where that is cheap.
    wide = wide_dtype(x)
    dx = x.new_zeros(x.shape, dtype=dtype)
    dy = columns.new_zeros(columns.shape, dtype=wide if columns.numel() <= CHUNK_ELEMENTS else dtype)
    dscale = torch.zeros_like(scale, dtype=wide)
    drow_bias, dcol_bias = x.new_zeros((len(x),), dtype=dtype), x.new_zeros((len(columns),), dtype=wide)
    slices = layout.scale_slices(len(x), len(columns))
    for part in _chunks(len(x), len(columns)):
        dx[part], dy_part, drow_bias[part], dcol_part, *dscale_parts = run(part)
        dy += dy_part
        dcol_bias += dcol_part
        for each, own, dscale_part in zip(layout.sets, slices, dscale_parts, strict=True):
            begin = own.start + part.start if each.scale_of == ScaleOf.ROWS else own.start
            dscale[begin : begin + len(dscale_part)] += dscale_part
    dy, dscale, dcol_bias = dy.to(dtype), dscale.to(scale.dtype), dcol_bias.to(dtype)
    if y is None:
        dx, dy = dx + dy, dy[:0]
    full = (dx, dy, dscale, drow_bias, dcol_bias)
    return tuple(g if needs >> bit & 1 else g[:0] for bit, g in enumerate(full))  # type: ignore[return-value]


# ---- The weighted total --------------------------------------------------------------------------------------------


def row_losses(kind: str, fold: Tensor, target_logit: Tensor, extra: Tensor | None) -> Tensor:
    """The loss of each row from its fold over the others and its target's logit."""
    if kind == "sum_softplus":
        return fold + softplus(-target_logit)
    return softplus((fold if extra is None else merge_lse(fold, extra)) - target_logit)


def row_slopes(
    kind: str, fold: Tensor, target_logit: Tensor, weight: Tensor, extra: Tensor | None, target_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of the weighted total of `row_losses` by fold, target_logit and extra (empty without one)."""
    dextra = fold.new_empty((0,))
    if kind == "sum_softplus":
        d_fold, d_target = weight, -weight * (-target_logit).sigmoid()
    else:
        everything = fold if extra is None else merge_lse(fold, extra)
        d_all = weight * (everything - target_logit).sigmoid()
        d_fold, d_target = d_all * probability(fold, everything), -d_all
        if extra is not None:
            dextra = d_all * probability(extra, everything)
    return d_fold, d_target if target_weight is None else d_target + target_weight, dextra


def total(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    weight: Tensor,
    extra: Tensor | None,
    target_weight: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (losses, target_logit, dx, dy, dscale, drow_bias, dcol_bias, dextra)."""
    problem = (x, y, scale, row_bias, col_bias, target, pair_data, spec)
    kind = Layout.decode(pair_data, spec).folds[0].kind
    fold, argmax, target_logit, _, kept = forward(*problem, 0)
    losses = row_losses(kind, fold, target_logit, extra)
    d_fold, d_target, dextra = row_slopes(kind, fold, target_logit, weight, extra, target_weight)
    gradients = backward(*problem, fold, argmax, d_fold, d_target, None, kept, needs)
    return losses, target_logit, *gradients, dextra
