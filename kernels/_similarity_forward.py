"""The sweep that folds the rows and columns of a similarity matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _pairs
from ._folds import (
    FOUND,
    PLAIN,
    carried_part,
    carry_on,
    empty_carry,
    fold_size,
    part_at,
    part_count,
    store_part,
    tile_part,
)
from ._tiles import guide_products, inner_products, load_rows, product


@triton.jit
def outside_of(i, j, N, M, SELF: tl.constexpr, MIRRORED: tl.constexpr):
    """True where (i, j), of shapes (B, 1) and (1, B), is no pair for a program to read, or to read mirrored.

    Of a matrix that is compared with itself programs compute what lies on and above the diagonal.
    """
    outside = (i >= N) | (j >= M)
    if SELF:
        outside |= (j <= i) if MIRRORED else (j < i)
    return outside


@triton.jit
def linear_terms(logit, outside, rows, cols, N, data, rules):
    """Weighted logits of the pairs in the rows' lists, 0 for all others."""
    weight = _pairs.list_weights(
        logit, rows, cols, N, data[rules.linear_indptr], data[rules.linear_indices], data[rules.linear_weight]
    )
    return tl.where(outside | (weight == 0), 0.0, weight * logit)


@triton.jit(
    do_not_specialize=["N", "M", "first_row", "blocks", "span", "spans", "row_blocks"],
)
def fold_kernel(
    x,
    y,
    x_stride,
    y_stride,
    N,
    M,
    D,
    first_row,
    blocks,
    span,
    spans,
    row_blocks,
    data,
    offsets,
    guide_depth,
    target_logit,
    partials,
    sets: tl.constexpr,
    folds: tl.constexpr,
    guide: tl.constexpr,
    SELF: tl.constexpr,
    RESIDENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GUIDE_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold a block of rows along a span of columns, and the columns along the block.

    Programs that run side by side share a span, so that its columns are read from memory once.

    Args:
        first_row: where the blocks of this launch begin.
        blocks: blocks of this launch.
        span: columns of a span, a multiple of COLS.
        spans: number of spans.
        row_blocks: blocks that `partials` has room for.
        RESIDENT: whether the rows' numbers stay on the chip, all of the dimension at once.
    """
    block = tl.program_id(0) % blocks
    number = tl.program_id(0) // blocks
    start = first_row + block * ROWS
    i = start + tl.arange(0, ROWS)
    begin = number * span
    end = tl.minimum(begin + span, M)
    if SELF:
        begin = tl.maximum(begin, start // COLS * COLS)
    if RESIDENT:
        block_of_x = load_rows(x, i, N, x_stride, 0, D, DEPTH)
    parts = ()
    for f in tl.static_range(len(folds)):
        parts = parts + (empty_carry(folds[f].kind, ROWS),)
    for first_col in range(begin, end, COLS):
        j = first_col + tl.arange(0, COLS)
        if RESIDENT:
            block_of_y = load_rows(y, j, M, y_stride, 0, D, DEPTH)
            dots = product(block_of_x, tl.trans(block_of_y), tl.zeros([ROWS, COLS], tl.float32), PRECISION)
        else:
            dots = inner_products(x, y, i, j, N, M, x_stride, y_stride, D, ROWS, COLS, DEPTH, PRECISION)
        if sets[0].row_factor >= 0:
            dots *= _pairs.unit_factor(i[:, None], j[None, :], N, M, data, sets[0])
        similarity = dots
        if guide[0] >= 0:
            similarity = guide_products(
                data[guide[0]], data[guide[1]], i, j, N, M, guide_depth, ROWS, COLS, GUIDE_DEPTH
            )
        for s in tl.static_range(len(sets)):
            for mirrored in tl.static_range(2 if SELF else 1):
                rows = j[None, :] if mirrored else i[:, None]
                cols = i[:, None] if mirrored else j[None, :]
                outside = outside_of(i[:, None], j[None, :], N, M, SELF, mirrored)
                logit = _pairs.logits(dots, rows, cols, N, M, data, sets[s])
                if s == 0 and target_logit is not None:
                    wanted = _pairs.own_column(rows, cols, N, data, sets[s]) & ~outside
                    tl.store(target_logit + (rows + tl.zeros_like(cols)), logit, mask=wanted)
                z = _pairs.shown(
                    logit, dots, similarity, outside, rows, cols, N, M, data, offsets[s], sets[s], True
                )  # fmt: skip
                for f in tl.static_range(len(folds)):
                    if folds[f].set == s:
                        folded = z
                        if folds[f].kind == PLAIN:
                            folded = linear_terms(logit, outside, rows, cols, N, data, sets[s])
                        if folds[f].cols == (mirrored == 1):
                            part = tile_part(folded, j[None, :], folds[f].kind, 1)
                            parts = parts[:f] + (carry_on(parts[f], part, folds[f].kind),) + parts[f + 1 :]
                        else:
                            part = tile_part(folded, i[:, None], folds[f].kind, 0)
                            own = part_count(folds[f].cols, spans, block, SELF)  # behind those of the spans
                            at = part_at(partials, own, folds, N, M, spans, row_blocks, f, SELF)
                            store_part(at, part, j, fold_size(folds[f], N, M), folds[f].kind)
    for f in tl.static_range(len(folds)):
        if SELF or not folds[f].cols:
            at = part_at(partials, FOUND + number, folds, N, M, spans, row_blocks, f, SELF)
            store_part(at, carried_part(parts[f], folds[f].kind), i, fold_size(folds[f], N, M), folds[f].kind)
