"""A persistent sweep that folds the rows and columns of a similarity matrix, which never reaches memory."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _pairs
from ._folds import FOUND, LOG2_E, LOGSUMEXP, store_part, tile_part
from ._persistent_tiles import place_of, source_of, tile_products

# Below the largest logit of a tile: beyond it powers of two would lose digits. 120 log(2).
REACH = tl.constexpr(83.0)
LN_2 = tl.constexpr(0.6931471805599453)
# A sum that is smaller is brought to a reference of its own.
SMALL = tl.constexpr(2.0**-30)


@triton.jit
def part_near(reference, total):
    """A part whose sum is of exp(l - reference), with a reference near the logits that it is of.

    Otherwise, merged with a tile of much smaller logits, it would take from those what is not small for this row. The
    sum is divided by the power of two in it, whose logarithm the reference gets.
    """
    power = (total.to(tl.int32, bitcast=True) >> 23) - 127
    power = tl.where((total > 0) & (total < SMALL), power, 0)
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)
    return reference + power.to(tl.float32) * LN_2, total * inverse


@triton.jit
def both_parts(z, KIND: tl.constexpr, APART: tl.constexpr):
    """A tile folded along its rows and along its columns, and whether its logits lie too far apart for that.

    For logsumexp a pair has one exponential for both, unless they are folded `APART`.
    """
    far = 0
    if KIND == LOGSUMEXP and not APART:
        largest = tl.max(z)
        smallest = tl.min(tl.where(z == float("-inf"), float("inf"), z))
        far = 1 - (largest - smallest <= REACH).to(tl.int32)  # also where any logit is infinite
        top = tl.where(largest == float("-inf"), 0.0, tl.ceil(largest))
        e = tl.exp2((z - top) * LOG2_E)
        of_rows = part_near(top, tl.sum(e, 1))
        of_cols = part_near(top, tl.sum(e, 0))
    else:
        of_rows = tile_part(z, z, KIND, 1)
        of_cols = tile_part(z, z, KIND, 0)
    return of_rows, of_cols, far


@triton.jit
def fold_tile(
    dots, row, col, row_tile, col_tile, N, M, first_row, last_row, data, offset, target_logit, row_partials,
    col_partials, rules, KIND: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Leave the parts of a tile of inner products; whether they are wrong because its logits lie too far apart."""
    i = row + tl.arange(0, ROWS)
    j = col + tl.arange(0, COLS)
    rows = i[:, None]
    cols = j[None, :]
    if rules.row_factor >= 0:
        dots *= _pairs.unit_factor(rows, cols, N, M, data, rules)
    outside = (rows >= last_row) | (cols >= M)
    logit = _pairs.logits(dots, rows, cols, N, M, data, rules)
    if target_logit is not None:
        wanted = _pairs.own_column(rows, cols, N, data, rules) & ~outside
        tl.store(target_logit + (rows + tl.zeros_like(cols)), logit, mask=wanted)
    z = _pairs.shown(logit, dots, dots, outside, rows, cols, N, M, data, offset, rules, False)
    planes: tl.constexpr = 2 if KIND == LOGSUMEXP else 1
    far = 0
    if row_partials is not None and col_partials is not None:
        of_rows, of_cols, far = both_parts(z, KIND, APART)
    elif row_partials is not None:
        of_rows = tile_part(z, z, KIND, 1)
    else:
        of_cols = tile_part(z, z, KIND, 0)
    if row_partials is not None:
        count = (last_row - first_row).to(tl.int64)
        store_part(row_partials + (FOUND + col_tile) * planes * count, of_rows, i - first_row, count, KIND)
    if col_partials is not None:
        count = M.to(tl.int64)
        store_part(col_partials + (FOUND + row_tile) * planes * count, of_cols, j, count, KIND)
    return far


@triton.jit(do_not_specialize=["N", "M", "first_row", "last_row"])
def persistent_fold_kernel(
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
    target_logit,
    row_partials,
    col_partials,
    far_tiles,
    sets: tl.constexpr,
    KIND: tl.constexpr,
    APART: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the tiles of a band of rows; each leaves a part for every row and every column that it has.

    Args:
        first_row: where the band begins.
        last_row: where it ends.
        row_partials: of the rows of the band, None where they are not folded.
        col_partials: of all columns, None where they are not folded.
        far_tiles: of every tile, whether one reference was not enough for its logits; None where none is used.
        APART: do nothing but fold these again, rows and columns by themselves.
    """
    of_x = source_of(x, last_row, x_stride, D, ROWS, DEPTH, DESCRIPTORS)
    of_y = source_of(y, M, y_stride, D, COLS, DEPTH, DESCRIPTORS)
    down = tl.cdiv(last_row - first_row, ROWS)
    across = tl.cdiv(M, COLS)
    for tile in range(tl.program_id(0), down * across, tl.num_programs(0)):
        row_tile, col_tile = place_of(tile, down, across, GROUP)
        row = first_row + row_tile * ROWS
        col = col_tile * COLS
        if APART:
            if tl.load(far_tiles + tile) != 0:
                dots = tile_products(
                    of_x, of_y, row, col, last_row, M, D, x_stride, y_stride, ROWS, COLS, DEPTH, DESCRIPTORS, PRECISION
                )
                fold_tile(
                    dots, row, col, row_tile, col_tile, N, M, first_row, last_row, data, offsets[0], None,
                    row_partials, col_partials, sets[0], KIND, True, ROWS, COLS,
                )  # fmt: skip
        else:
            dots = tile_products(
                of_x, of_y, row, col, last_row, M, D, x_stride, y_stride, ROWS, COLS, DEPTH, DESCRIPTORS, PRECISION
            )
            far = fold_tile(
                dots, row, col, row_tile, col_tile, N, M, first_row, last_row, data, offsets[0], target_logit,
                row_partials, col_partials, sets[0], KIND, False, ROWS, COLS,
            )  # fmt: skip
            if far_tiles is not None:
                tl.store(far_tiles + tile, far)
