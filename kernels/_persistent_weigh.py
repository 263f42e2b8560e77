"""A persistent sweep that leaves the weights of the matrix products that gradients are, and sums of derivatives.

A sum of softplus needs no fold for its slopes, so that the same sweep folds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _pairs
from ._folds import FOUND, LOG2_E, LOGSUMEXP, log_of_1_plus, part_at
from ._persistent_tiles import place_of, source_of, tile_products
from ._similarity_backward import RESIDUAL, rounded, store_sum, summed

# A further sum, along rows: the softplus of what takes part, for a sweep that folds what it weighs.
FOLD = tl.constexpr(3)


@triton.jit
def arriving(d_rows, d_cols, rows, cols, last_row, M):
    """What arrives at the folds of rows and of columns, 0 at those that are None; of shapes (B, 1) and (1, B)."""
    of_rows = tl.zeros_like(rows).to(tl.float32)
    of_cols = tl.zeros_like(cols).to(tl.float32)
    if d_rows is not None:
        of_rows = tl.load(d_rows + rows, mask=rows < last_row, other=0.0)
    if d_cols is not None:
        of_cols = tl.load(d_cols + cols, mask=cols < M, other=0.0)
    return of_rows, of_cols


@triton.jit
def softmax_slopes(z, rows, cols, last_row, M, row_value, d_rows, col_value, d_cols):
    """The derivative of the total by logits z through the logsumexp of rows and that of columns."""
    of_rows, of_cols = arriving(d_rows, d_cols, rows, cols, last_row, M)
    e = tl.zeros_like(z)
    if d_rows is not None:
        e += of_rows * tl.exp2((z - tl.load(row_value + rows, mask=rows < last_row, other=0.0)) * LOG2_E)
    if d_cols is not None:
        e += of_cols * tl.exp2((z - tl.load(col_value + cols, mask=cols < M, other=0.0)) * LOG2_E)
    return e


@triton.jit
def softplus_slopes(logit, rows, cols, last_row, M, d_rows, d_cols):
    """The same through sums of softplus; minus what softplus(-l) of a target adds; and softplus(l)."""
    of_rows, of_cols = arriving(d_rows, d_cols, rows, cols, last_row, M)
    u = tl.exp2(-tl.abs(logit) * LOG2_E)
    inverse = 1.0 / (1.0 + u)
    e = (of_rows + of_cols) * tl.where(logit < 0, u, 1.0) * inverse
    of_target = of_rows * tl.where(logit < 0, 1.0, u) * inverse
    return e, of_target, tl.where(logit < 0, 0.0, logit) + log_of_1_plus(u)


@triton.jit(do_not_specialize=["N", "M", "first_row", "last_row", "row_blocks"])
def persistent_weights_kernel(
    x,
    y,
    x_stride,
    y_stride,
    N,
    M,
    D,
    first_row,
    last_row,
    data,
    offsets,
    row_value,
    d_rows,
    col_value,
    d_cols,
    d_target,
    target_logit,
    norm,
    weights,
    weights_stride,
    row_partials,
    col_partials,
    row_blocks,
    sets: tl.constexpr,
    row_sums: tl.constexpr,
    col_sums: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weigh the tiles of a band of rows; each leaves its weights, and a part of every sum.

    Args:
        first_row: where the band begins.
        last_row: where it ends.
        row_value: folds of rows; None for a sum of softplus, and where they are not folded.
        d_rows: what arrives at them, or None.
        col_value: folds of columns.
        d_cols: what arrives at them, or None.
        d_target: what arrives at the targets' logits, or None.
        target_logit: where these go, for a sweep that folds what it weighs; None otherwise.
        norm: what weights of float16 are multiplied with.
        weights: (rows of the band, M), or None where sums alone are wanted.
        row_partials: parts of `row_sums`, of the rows of the band.
        col_partials: parts of `col_sums`.
        row_blocks: tiles of a column that it has room for.
    """
    of_x = source_of(x, last_row, x_stride, D, ROWS, DEPTH, DESCRIPTORS)
    of_y = source_of(y, M, y_stride, D, COLS, DEPTH, DESCRIPTORS)
    count = last_row - first_row
    if DESCRIPTORS and weights is not None:
        to = tl.make_tensor_descriptor(
            weights, shape=[count, M], strides=[weights_stride, 1], block_shape=[ROWS, COLS]
        )  # fmt: skip
    down = tl.cdiv(count, ROWS)
    across = tl.cdiv(M, COLS)
    for tile in range(tl.program_id(0), down * across, tl.num_programs(0)):
        row_tile, col_tile = place_of(tile, down, across, GROUP)
        row = first_row + row_tile * ROWS
        col = col_tile * COLS
        dots = tile_products(
            of_x, of_y, row, col, last_row, M, D, x_stride, y_stride, ROWS, COLS, DEPTH, DESCRIPTORS, PRECISION
        )
        i = row + tl.arange(0, ROWS)
        j = col + tl.arange(0, COLS)
        rows = i[:, None]
        cols = j[None, :]
        outside = (rows >= last_row) | (cols >= M)
        if sets[0].row_factor >= 0:
            row_unit = tl.load(data[sets[0].row_factor] + rows, mask=rows < last_row, other=1.0)
            col_unit = tl.load(data[sets[0].col_factor] + cols, mask=cols < M, other=1.0)
            dots *= row_unit * col_unit
        logit = _pairs.logits(dots, rows, cols, N, M, data, sets[0])
        z = _pairs.shown(logit, dots, dots, outside, rows, cols, N, M, data, offsets[0], sets[0], False)
        if KIND == LOGSUMEXP:
            e = softmax_slopes(z, rows, cols, last_row, M, row_value, d_rows, col_value, d_cols)
        else:
            e, of_target, folded = softplus_slopes(logit, rows, cols, last_row, M, d_rows, d_cols)
        # No gradient where no pair takes part, whatever the fold or the upstream gradient is.
        takes_part = z != float("-inf")
        e = tl.where(takes_part, e, 0.0)
        if d_target is not None or target_logit is not None:
            own = _pairs.own_column(rows, cols, N, data, sets[0]) & ~outside
            by_target = tl.zeros_like(rows).to(tl.float32)
            if d_target is not None:
                by_target = tl.load(d_target + rows, mask=rows < last_row, other=0.0)
            if target_logit is not None:
                tl.store(target_logit + (rows + tl.zeros_like(cols)), logit, mask=own)
                e = tl.where(own, by_target - of_target, e)
            else:
                e = tl.where(own, by_target, e)
        g = e * _pairs.scale_factor(rows, cols, N, M, data, sets[0])
        if sets[0].row_factor >= 0:
            own_weights, residual = rounded(g * (row_unit * col_unit), norm, x)
            residual *= (1.0 / row_unit) * (1.0 / col_unit)
        else:
            own_weights, residual = rounded(g, norm, x)
        if weights is not None:
            if DESCRIPTORS:
                to.store([row - first_row, col], own_weights)
            else:
                at = weights + (i - first_row).to(tl.int64)[:, None] * weights_stride + cols
                tl.store(at, own_weights, mask=~outside)
        for k in tl.static_range(len(row_sums)):
            if row_sums[k].what == FOLD:
                total = tl.sum(tl.where(takes_part, folded, 0.0), 1)
            elif row_sums[k].what == RESIDUAL:
                total = tl.sum(residual, 1)
            else:
                total = summed(e, dots, sets[0], row_sums[k].what, 1)
            at = part_at(row_partials, FOUND + col_tile, row_sums, count, M, across, 0, k, False)
            store_sum(at, total, i - first_row, count)
        for k in tl.static_range(len(col_sums)):
            if col_sums[k].what == RESIDUAL:
                total = tl.sum(residual, 0)
            else:
                total = summed(e, dots, sets[0], col_sums[k].what, 0)
            at = part_at(col_partials, FOUND + row_tile, col_sums, N, M, 0, row_blocks, k, False)
            store_sum(at, total, j, M)
