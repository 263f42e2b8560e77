"""Gradients of folds: tiles of logits are computed again, and their derivatives are multiplied or written."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import _pairs
from ._folds import COUNT, FOUND, MAX, PLAIN, add_slope, exact_sum, fold_size, part_at, part_count, with_lost
from ._similarity_forward import outside_of
from ._tiles import guide_products, inner_products, load_rows, product

# What a sum along rows or columns is of: rounding errors of the weights, dtotal/dl, dtotal/dl * inner product.
RESIDUAL = tl.constexpr(0)
BIAS = tl.constexpr(1)
SCALE = tl.constexpr(2)


class TileSum(NamedTuple):
    """A sum of derivatives, compile-time; laid out in memory as a fold of the kind `PLAIN`.

    Attributes:
        what: one of the numbers above.
        cols: one sum per column, not per row.
        set: the logit set, for `SCALE`.
        kind: `PLAIN`.
    """

    what: int
    cols: bool
    set: int = -1
    kind: int = PLAIN.value


@triton.jit
def pair_weights(
    dots, similarity, outside, rows, cols, N, M, data, offset, values, argmax, d_values, d_target, d_linear, rules,
    folds, S: tl.constexpr,
):  # fmt: skip
    """The derivative of the total by the logits of set S, and by the inner products through that set."""
    logit = _pairs.logits(dots, rows, cols, N, M, data, rules)
    z = _pairs.shown(logit, dots, similarity, outside, rows, cols, N, M, data, offset, rules, False)
    e = tl.zeros_like(dots)
    for f in tl.static_range(len(folds)):
        size = fold_size(folds[f], N, M)
        if folds[f].set == S and folds[f].kind != COUNT:
            e = add_slope(e, z, rows, cols, folds[f], size, values, argmax, d_values)
        values += size
        d_values += size
        if folds[f].kind == MAX:
            argmax += size
    # No gradient where no pair takes part, whatever the fold or the upstream gradient is.
    e = tl.where(z == float("-inf"), 0.0, e)
    if S == 0 and d_target is not None:
        own = _pairs.own_column(rows, cols, N, data, rules) & ~outside
        e = tl.where(own, tl.load(d_target + rows, mask=rows < N, other=0.0), e)
    if S == 0 and d_linear is not None:
        weight = _pairs.list_weights(
            dots, rows, cols, N, data[rules.linear_indptr], data[rules.linear_indices], data[rules.linear_weight]
        )
        e += tl.where(outside, 0.0, weight * tl.load(d_linear + rows, mask=rows < N, other=0.0))
    return e, e * _pairs.scale_factor(rows, cols, N, M, data, rules)


@triton.jit
def summed(e, dots, rules, WHAT: tl.constexpr, AXIS: tl.constexpr):
    """What a set adds to a sum along an axis."""
    total = e
    if WHAT == SCALE:
        total = tl.where(e == 0, 0.0, e * dots)
    total = tl.sum(total, AXIS)
    return -total if rules.negate else total


@triton.jit
def no_sums(COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Zeros, for each sum a vector."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([SIZE], tl.float32),)
    return sums


@triton.jit
def add_to(sums, more, K: tl.constexpr):
    """The sums with `more` added to the K-th."""
    return sums[:K] + (sums[K] + more,) + sums[K + 1 :]


@triton.jit
def no_carries(COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Zeros, for each sum a vector and what rounding took from it."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + ((tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)),)
    return sums


@triton.jit
def carry_to(sums, more, K: tl.constexpr):
    """What a program carries with `more` added to the K-th sum."""
    return sums[:K] + (exact_sum(sums[K][0], more, sums[K][1]),) + sums[K + 1 :]


@triton.jit
def store_sum(at, total, index, size):
    """Write a part of a sum whose memory begins at `at`."""
    tl.store(at + index, total, mask=index < size)


@triton.jit
def rounded(g, norm, x):
    """The weights in the dtype that they are multiplied in, and what rounding took from each.

    `norm` is a power of two that keeps float16 in its range, or None.
    """
    if norm is None:
        weights = g.to(x.dtype.element_ty)
        residual = g - weights.to(tl.float32)
    else:
        factor = tl.load(norm)
        weights = (g * factor).to(x.dtype.element_ty)
        residual = g - weights.to(tl.float32) * (1.0 / factor)
    return weights, residual


@triton.jit(
    do_not_specialize=["N", "M", "own_size", "other_size", "blocks", "span", "splits"],
)
def gradient_kernel(
    own,
    other,
    own_stride,
    other_stride,
    own_size,
    other_size,
    N,
    M,
    D,
    blocks,
    span,
    splits,
    data,
    offsets,
    guide_depth,
    values,
    argmax,
    d_values,
    d_target,
    d_linear,
    norm,
    gradient,
    partials,
    sets: tl.constexpr,
    folds: tl.constexpr,
    sums: tl.constexpr,
    guide: tl.constexpr,
    SELF: tl.constexpr,
    OWN_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GUIDE_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a block of one side, rows of x or of y, from a span of the other; all of the dimension at once.

    Axis 0 of a tile is the side that the program owns. A matrix that is compared with itself has both gradients in one.

    Args:
        span: of the other side, a multiple of COLS.
        splits: number of spans; `gradient` has [splits, own_size, D], or is None.
        OWN_COLS: 1 where the side is the columns of the similarity matrix, else 0.
    """
    block = tl.program_id(0) % blocks
    number = tl.program_id(0) // blocks
    o = block * ROWS + tl.arange(0, ROWS)
    block_of_own = load_rows(own, o, own_size, own_stride, 0, D, DEPTH)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    parts = no_carries(len(sums), ROWS)
    begin = number * span
    for first in range(begin, tl.minimum(begin + span, other_size), COLS):
        t = first + tl.arange(0, COLS)
        block_of_other = load_rows(other, t, other_size, other_stride, 0, D, DEPTH)
        dots = product(block_of_own, tl.trans(block_of_other), tl.zeros([ROWS, COLS], tl.float32), PRECISION)
        if sets[0].row_factor >= 0:
            by_unit = _pairs.unit_factor(
                t[None, :] if OWN_COLS else o[:, None], o[:, None] if OWN_COLS else t[None, :], N, M, data, sets[0]
            )
            dots *= by_unit
        similarity = dots
        if guide[0] >= 0:
            own_guide = data[guide[OWN_COLS]]
            other_guide = data[guide[1 - OWN_COLS]]
            similarity = guide_products(
                own_guide, other_guide, o, t, own_size, other_size, guide_depth, ROWS, COLS, GUIDE_DEPTH
            )
        g = tl.zeros_like(dots)
        for s in tl.static_range(len(sets)):
            for mirrored in tl.static_range(OWN_COLS, 2 if SELF else OWN_COLS + 1):
                rows = t[None, :] if mirrored else o[:, None]
                cols = o[:, None] if mirrored else t[None, :]
                outside = (rows >= N) | (cols >= M)
                e, by_dots = pair_weights(
                    dots, similarity, outside, rows, cols, N, M, data, offsets[s], values, argmax, d_values, d_target,
                    d_linear, sets[s], folds, s,
                )  # fmt: skip
                g += by_dots
                for k in tl.static_range(len(sums)):
                    if sums[k].cols == (mirrored == 1) and (sums[k].what == BIAS or sums[k].set == s):
                        parts = carry_to(parts, summed(e, dots, sets[s], sums[k].what, 1), k)
        if sets[0].row_factor >= 0:
            weights, residual = rounded(g * by_unit, norm, own)
            residual /= by_unit
        else:
            weights, residual = rounded(g, norm, own)
        for k in tl.static_range(len(sums)):
            if sums[k].what == RESIDUAL:
                parts = carry_to(parts, tl.sum(residual, 1), k)
        if gradient is not None:
            total = product(weights, block_of_other, total, PRECISION)
    if gradient is not None:
        if norm is not None:
            total *= 1.0 / tl.load(norm)
        k = tl.arange(0, DEPTH)
        at = gradient + (number * own_size.to(tl.int64) + o[:, None]) * D + k[None, :]
        tl.store(at, total, mask=(o < own_size)[:, None] & (k < D)[None, :])
    for k in tl.static_range(len(sums)):
        at = part_at(partials, FOUND + number, sums, N, M, splits, splits, k, False)
        store_sum(at, with_lost(parts[k][0], parts[k][1]), o, own_size)


@triton.jit(
    do_not_specialize=["N", "M", "first_row", "blocks", "first_col", "last_col", "span", "spans", "row_blocks"],
)
def weights_kernel(
    x,
    y,
    x_stride,
    y_stride,
    N,
    M,
    D,
    first_row,
    blocks,
    first_col,
    last_col,
    span,
    spans,
    row_blocks,
    data,
    offsets,
    guide_depth,
    values,
    argmax,
    d_values,
    d_target,
    d_linear,
    norm,
    weights,
    weights_stride,
    partials,
    sets: tl.constexpr,
    folds: tl.constexpr,
    sums: tl.constexpr,
    guide: tl.constexpr,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GUIDE_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dtotal/d(inner product) of a block of rows and a span of columns, for matrix products elsewhere.

    Args:
        first_row: where the blocks of this launch begin.
        first_col: where its columns begin.
        last_col: where they end.
        weights: [rows, columns of this launch], or None where sums alone are wanted. What lies below the diagonal of
            a matrix that is compared with itself is 0: the pair is read both ways above it.
    """
    block = tl.program_id(0) % blocks
    number = tl.program_id(0) // blocks
    start = first_row + block * ROWS
    i = start + tl.arange(0, ROWS)
    begin = first_col + number * span
    end = tl.minimum(begin + span, last_col)
    line = (i - first_row).to(tl.int64)[:, None] * weights_stride
    if SELF:
        diagonal = tl.maximum(begin, first_col + (start - first_col) // COLS * COLS)
        if weights is not None:
            for first in range(begin, tl.minimum(diagonal, end), COLS):
                j = first + tl.arange(0, COLS)
                nothing = tl.zeros([ROWS, COLS], x.dtype.element_ty)
                tl.store(weights + line + (j - first_col)[None, :], nothing, mask=(i < N)[:, None] & (j < end)[None, :])
        begin = diagonal
    parts = no_carries(len(sums), ROWS)
    for first in range(begin, end, COLS):
        j = first + tl.arange(0, COLS)
        dots = inner_products(x, y, i, j, N, last_col, x_stride, y_stride, D, ROWS, COLS, DEPTH, PRECISION)
        if sets[0].row_factor >= 0:
            by_unit = _pairs.unit_factor(i[:, None], j[None, :], N, M, data, sets[0])
            dots *= by_unit
        similarity = dots
        if guide[0] >= 0:
            similarity = guide_products(
                data[guide[0]], data[guide[1]], i, j, N, last_col, guide_depth, ROWS, COLS, GUIDE_DEPTH
            )
        g = tl.zeros_like(dots)
        across = no_sums(len(sums), COLS)
        for s in tl.static_range(len(sets)):
            for mirrored in tl.static_range(2 if SELF else 1):
                rows = j[None, :] if mirrored else i[:, None]
                cols = i[:, None] if mirrored else j[None, :]
                outside = outside_of(i[:, None], j[None, :], N, last_col, SELF, mirrored)
                e, by_dots = pair_weights(
                    dots, similarity, outside, rows, cols, N, M, data, offsets[s], values, argmax, d_values, d_target,
                    d_linear, sets[s], folds, s,
                )  # fmt: skip
                g += by_dots
                for k in tl.static_range(len(sums)):
                    if sums[k].what == BIAS or sums[k].set == s:
                        if sums[k].cols == (mirrored == 1):
                            parts = carry_to(parts, summed(e, dots, sets[s], sums[k].what, 1), k)
                        else:
                            across = add_to(across, summed(e, dots, sets[s], sums[k].what, 0), k)
        if sets[0].row_factor >= 0:
            own_weights, residual = rounded(g * by_unit, norm, x)
            residual /= by_unit
        else:
            own_weights, residual = rounded(g, norm, x)
        if weights is not None:
            at = weights + line + (j - first_col)[None, :]
            tl.store(at, own_weights, mask=(i < N)[:, None] & (j < end)[None, :])
        for k in tl.static_range(len(sums)):
            if sums[k].what == RESIDUAL:
                if SELF or not sums[k].cols:
                    parts = carry_to(parts, tl.sum(residual, 1), k)
                if SELF or sums[k].cols:
                    across = add_to(across, tl.sum(residual, 0), k)
            if SELF or sums[k].cols:
                own = part_count(sums[k].cols, spans, block, SELF)  # behind those of the spans
                at = part_at(partials, own, sums, N, M, spans, row_blocks, k, SELF)
                store_sum(at, across[k], j, last_col)
    for k in tl.static_range(len(sums)):
        if SELF or not sums[k].cols:
            at = part_at(partials, FOUND + number, sums, N, M, spans, row_blocks, k, SELF)
            store_sum(at, with_lost(parts[k][0], parts[k][1]), i, N)


@triton.jit(do_not_specialize=["size"])
def give_back_kernel(
    gradient, residual, partner, other, other_stride, size, D, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """gradient[i] += residual[i] * other[partner[i]], where there is a partner.

    Near convergence a row's gradient is the small difference between its target and what lies close to it, where
    independent rounding errors of weights do not cancel. What rounding took from a row is given back along its partner,
    so that only differences of embeddings are weighted by errors.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mate = tl.load(partner + i, mask=i < size, other=-1)
    weight = tl.load(residual + i, mask=i < size, other=0.0)[:, None]
    has_mate = ((i < size) & (mate >= 0))[:, None]
    for first in range(0, D, DEPTH):
        k = (first + tl.arange(0, DEPTH))[None, :]
        mask = has_mate & (k < D)
        at = gradient + i.to(tl.int64)[:, None] * D + k
        row = tl.load(other + mate[:, None] * other_stride + k, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, tl.load(at, mask=mask, other=0.0) + weight * row, mask=mask)
